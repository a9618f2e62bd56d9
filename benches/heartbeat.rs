//! What does one heartbeat cost the control plane, and does it depend on how many nodes there are?
//!
//! One heartbeat of four pools with one replica each into registries of 10, 1,000 and 10,000 nodes,
//! read from JSON before or not. The load of each pool changes with every heartbeat; the node tells nothing of
//! its GPUs, or the use of eight.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use llama_orch::orchestratord::service_registry::{Limits, ServiceRegistry};
use llama_orch::time::Now;
use llama_orch::wire::id::NodeId;
use llama_orch::wire::node::{Heartbeat, RegisterRequest};

/// Sequence numbers begin here, so that all have ten digits.
const SEQ_FIRST: u64 = 1_000_000_000;

fn register(node: usize) -> RegisterRequest {
    let body = format!(
        r#"{{"node_id":"gpu-{node:05}","address":"http://gpu-{node:05}:9200","incarnation":1,"boot_id":"b{node}"}}"#
    );
    serde_json::from_str(&body).expect("a registration")
}

/// A heartbeat as it comes from the network. The number of digits of `seq` does not change, and it stands
/// first. It tells the use of so many GPUs.
fn body(seq: u64, gpus: u64) -> String {
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
    let loads: Vec<String> = (0..gpus)
        .map(|gpu| {
            format!(
                r#"{{"device_id":{gpu},"vram_total_bytes":85899345920,"vram_free_bytes":{},
                "utilization_percent":{},"temperature_celsius":61}}"#,
                seq << 20,
                (seq + gpu) % 100
            )
        })
        .collect();
    let loads =
        if loads.is_empty() { String::new() } else { format!(r#","gpu_loads":[{}]"#, loads.join(",")) };
    format!(r#"{{"seq":{:010},"incarnation":1,"pools":[{}]{loads}}}"#, SEQ_FIRST + seq, pools.join(","))
}

fn beat(seq: u64) -> Heartbeat {
    serde_json::from_str(&body(seq, 0)).expect("a heartbeat")
}

/// A registry with so many nodes that have each sent one heartbeat.
fn registry(nodes: usize, now: Now) -> (ServiceRegistry, Vec<NodeId>) {
    let mut registry = ServiceRegistry::new(Limits::default(), 1);
    let (mut changes, first) = (Vec::new(), beat(1));
    let ids: Vec<NodeId> = (0..nodes).map(|n| NodeId::new(&format!("gpu-{n:05}")).expect("an id")).collect();
    for (n, id) in ids.iter().enumerate() {
        registry.register(&register(n), "10.0.0.1", now, &mut changes).expect("registered");
        registry.heartbeat(id, &first, "10.0.0.1", now, &mut changes).expect("accepted");
        changes.clear();
    }
    (registry, ids)
}

fn heartbeat(c: &mut Criterion) {
    let mut group = c.benchmark_group("heartbeat");
    for nodes in [10usize, 1_000, 10_000] {
        let mut now = Now::default();
        let (mut registry, ids) = registry(nodes, now);
        let mut changes = Vec::new();
        // Three by turns: the numbers of nodes are no multiples of it, so none has the same one twice running.
        let mut beats: Vec<Heartbeat> = (1..=3).map(beat).collect();
        let (mut turn, mut seq) = (0, SEQ_FIRST + 2);
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
        for (name, gpus) in [("nodes, with JSON", 0), ("nodes, with JSON and 8 GPUs", 8)] {
            let mut bodies: Vec<Vec<u8>> = (1..=2).map(|seq| body(seq, gpus).into_bytes()).collect();
            group.bench_function(BenchmarkId::new(name, nodes), |b| {
                b.iter(|| {
                    turn = (turn + 7919) % nodes;
                    seq += 1;
                    now = now.plus_ms(1);
                    let body = &mut bodies[seq as usize % 2];
                    write_digits(&mut body[7..17], seq);
                    changes.clear();
                    let beat: Heartbeat = serde_json::from_slice(black_box(body)).expect("a heartbeat");
                    let reply = registry.heartbeat(&ids[turn], &beat, "10.0.0.1", now, &mut changes);
                    black_box(reply).expect("accepted")
                });
            });
        }
    }
    group.finish();
}

fn write_digits(place: &mut [u8], mut number: u64) {
    for digit in place.iter_mut().rev() {
        *digit = b'0' + (number % 10) as u8;
        number /= 10;
    }
}

criterion_group!(benches, heartbeat);
criterion_main!(benches);
