//! How long does it take to choose a replica?
//!
//! 10 and 1,000 nodes with four pools of one replica each, a third of all slots taken, for an ask
//! that any replica can serve, one that a fourth of them can, and one that none can.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use llama_orch::orchestratord::placement::{Ask, Choice, Strategy, StrategyState, choose};
use llama_orch::orchestratord::service_registry::{Limits, ServiceRegistry};
use llama_orch::time::Now;
use llama_orch::wire::id::NodeId;
use llama_orch::wire::node::{Heartbeat, RegisterRequest};

fn registry_of(nodes: usize) -> ServiceRegistry {
    let mut registry = ServiceRegistry::new(Limits::default(), 1);
    let mut changes = Vec::new();
    let now = Now::default();
    for n in 0..nodes {
        let body =
            format!(r#"{{"node_id":"gpu-{n:05}","address":"http://gpu-{n:05}:9200","incarnation":1}}"#);
        let request: RegisterRequest = serde_json::from_str(&body).expect("a registration");
        let pools: Vec<String> = (0..4)
            .map(|pool| {
                format!(
                    r#"{{"pool_id":"pool-{pool}","ready":true,"slots_free":4,"vram_free_bytes":{},
                    "replicas":[{{"replica_id":"r0","url":"http://127.0.0.1:808{pool}","ready":true,
                    "slots_free":4,"slots_total":4,"models":["model-{pool}"]}}]}}"#,
                    (n * 7919) % 80
                )
            })
            .collect();
        let body = format!(r#"{{"incarnation":1,"seq":1,"pools":[{}]}}"#, pools.join(","));
        let beat: Heartbeat = serde_json::from_str(&body).expect("a heartbeat");
        registry.register(&request, "10.0.0.1", now, &mut changes).expect("registered");
        let id = NodeId::new(&format!("gpu-{n:05}")).expect("an id");
        registry.heartbeat(&id, &beat, "10.0.0.1", now, &mut changes).expect("accepted");
    }
    let all: Vec<_> = registry.replicas().map(|(replica, _)| replica).collect();
    for (n, replica) in all.into_iter().enumerate() {
        if n % 3 == 0 {
            assert!(registry.acquire(replica, 1 + (n as u32 % 4)).is_some(), "its slots are free");
        }
    }
    registry
}

fn placement(c: &mut Criterion) {
    let mut group = c.benchmark_group("placement");
    for nodes in [10usize, 1_000] {
        let registry = registry_of(nodes);
        for (what, model) in [("any", None), ("one-of-four", Some("model-2")), ("unknown", Some("model-9"))] {
            let ask = Ask { model: model.map(String::from), slots: 1, ..Ask::default() };
            for strategy in Strategy::ALL {
                let mut state = StrategyState::new(7);
                let found = choose(&registry, &ask, &[], strategy, &mut state);
                assert_eq!(matches!(found.choice, Choice::Replica { .. }), what != "unknown");
                group.bench_function(BenchmarkId::new(format!("{what}/{strategy}"), nodes), |b| {
                    b.iter(|| choose(black_box(&registry), black_box(&ask), &[], strategy, &mut state));
                });
            }
        }
    }
    group.finish();
}

criterion_group!(benches, placement);
criterion_main!(benches);
