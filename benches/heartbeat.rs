//! What does one heartbeat cost the control plane, and does it depend on how many nodes there are?
//!
//! One heartbeat of four pools with one replica each, its reading from JSON aside, into registries
//! of 10, 1,000 and 10,000 nodes. The load of each pool changes with every heartbeat.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use llama_orch::orchestratord::service_registry::{Limits, ServiceRegistry};
use llama_orch::time::Now;
use llama_orch::wire::id::NodeId;
use llama_orch::wire::node::{Heartbeat, RegisterRequest};

fn register(node: usize) -> RegisterRequest {
    let body = format!(
        r#"{{"node_id":"gpu-{node:05}","address":"http://gpu-{node:05}:9200","incarnation":1,"boot_id":"b{node}"}}"#
    );
    serde_json::from_str(&body).expect("a registration")
}

fn beat(seq: u64) -> Heartbeat {
    let pools: Vec<String> = (0..4)
        .map(|pool| {
            let free = (seq + pool) % 5;
            format!(
                r#"{{"pool_id":"pool-{pool}","ready":true,"slots_free":{free},"slots_total":4,
                "vram_free_bytes":{seq},"models_available":["model-{pool}"],"replicas":[{{"replica_id":"r0",
                "url":"http://127.0.0.1:808{pool}","ready":true,"slots_free":{free},"slots_total":4,
                "generation":1,"models":["model-{pool}"],"engine":"llamacpp","device_mask":"{pool}"}}]}}"#
            )
        })
        .collect();
    let body = format!(r#"{{"incarnation":1,"seq":{seq},"pools":[{}]}}"#, pools.join(","));
    serde_json::from_str(&body).expect("a heartbeat")
}

fn heartbeat(c: &mut Criterion) {
    let mut group = c.benchmark_group("heartbeat");
    for nodes in [10usize, 1_000, 10_000] {
        let mut registry = ServiceRegistry::new(Limits::default(), 1);
        let mut now = Now::default();
        let mut changes = Vec::new();
        // Three by turns: the numbers of nodes are no multiples of it, so none has the same one twice running.
        let mut beats: Vec<Heartbeat> = (1..=3).map(beat).collect();
        let ids: Vec<NodeId> =
            (0..nodes).map(|n| NodeId::new(&format!("gpu-{n:05}")).expect("an id")).collect();
        for (n, id) in ids.iter().enumerate() {
            registry.register(&register(n), "10.0.0.1", now, &mut changes).expect("registered");
            registry.heartbeat(id, &beats[0], "10.0.0.1", now, &mut changes).expect("accepted");
        }
        let (mut turn, mut seq) = (0, 3);
        group.bench_function(BenchmarkId::new("nodes", nodes), |b| {
            b.iter(|| {
                turn = (turn + 7919) % nodes;
                seq += 1;
                now = now.plus_ms(1);
                let beat = &mut beats[seq as usize % 3];
                beat.seq = Some(seq);
                changes.clear();
                let reply = registry.heartbeat(&ids[turn], black_box(beat), "10.0.0.1", now, &mut changes);
                black_box(reply).expect("accepted")
            });
        });
    }
    group.finish();
}

criterion_group!(benches, heartbeat);
criterion_main!(benches);
