//! How long does it take to choose a replica, and does it depend on how many there are?
//!
//! 10, 1,000 and 10,000 nodes with four pools of one replica each. A third of the replicas have slots
//! taken. Asked for are any model, one that every fourth replica serves, one that a single node has, one
//! that nobody has, and one whose replicas are all full; the least loaded ones also with pins, and with
//! affinity: of conversations, a new one each time, and of a session that was served before.

use std::hint::black_box;

use std::time::Duration;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use llama_orch::orchestratord::affinity::{self, Affinity};
use llama_orch::orchestratord::placement::{Ask, Choice, Strategy, StrategyState, choose};
use llama_orch::orchestratord::served_sessions::ServedSessions;
use llama_orch::orchestratord::service_registry::{Limits, ServiceRegistry};
use llama_orch::time::{Mono, Now};
use llama_orch::wire::id::{NodeId, PoolId};
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
                let model = if n == nodes / 2 && pool == 0 { "rare".into() } else { format!("model-{pool}") };
                format!(
                    r#"{{"pool_id":"pool-{pool}","ready":true,"slots_free":4,"vram_free_bytes":{},
                    "replicas":[{{"replica_id":"r0","url":"http://127.0.0.1:808{pool}","ready":true,
                    "slots_free":4,"slots_total":4,"models":["{model}"],"device_mask":"{pool}"}}]}}"#,
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
        // All of the fourth pool are full.
        if n % 4 == 3 {
            assert!(registry.acquire(replica, 4).is_some(), "its slots are free");
        } else if n % 3 == 0 {
            assert!(registry.acquire(replica, 1 + (n as u32 % 4)).is_some(), "its slots are free");
        }
    }
    registry
}

fn placement(c: &mut Criterion) {
    let mut group = c.benchmark_group("placement");
    group.warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_millis(1_000));
    for nodes in [10usize, 1_000, 10_000] {
        let mut registry = registry_of(nodes);
        let ask = |model: Option<&str>| Ask { model: model.map(String::from), slots: 1, ..Ask::default() };
        let pool = |name: &str| PoolId::new(name).expect("an id");
        for strategy in Strategy::ALL {
            registry.set_placement(strategy, true);
            let mut cases = vec![
                ("any", ask(None)),
                ("one-of-four", ask(Some("model-2"))),
                ("rare", ask(Some("rare"))),
                ("unknown", ask(Some("model-9"))),
                ("full", ask(Some("model-3"))),
            ];
            if strategy == Strategy::LeastLoaded {
                cases.extend([
                    ("pool", Ask { pool: Some(pool("pool-2")), ..ask(None) }),
                    ("full-pool", Ask { pool: Some(pool("pool-3")), ..ask(None) }),
                    ("node", Ask { node: NodeId::new("gpu-00003").ok(), ..ask(None) }),
                    ("devices", Ask { device_mask: Some("1".into()), ..ask(None) }),
                    ("two-slots", Ask { slots: 2, ..ask(Some("model-2")) }),
                ]);
            }
            for (what, ask) in cases {
                let mut state = StrategyState::new(7);
                let found = choose(&registry, &ask, &[], strategy, &mut state);
                let is_refused = ["unknown", "full", "full-pool"].contains(&what);
                assert_eq!(matches!(found.choice, Choice::Replica { .. }), !is_refused, "{what}");
                group.bench_function(BenchmarkId::new(format!("{what}/{strategy}"), nodes), |b| {
                    b.iter(|| choose(black_box(&registry), black_box(&ask), &[], strategy, &mut state));
                });
            }
        }
        let strategy = Strategy::LeastLoaded;
        registry.set_placement(strategy, true);
        let mut sessions = ServedSessions::default();
        let (served, _) = registry.replicas().nth(2).expect("the third pool of the first node");
        sessions.used(&"session".into(), served, Mono(0));
        for (what, model) in [("prefix", "model-2"), ("prefix-full", "model-3"), ("session", "model-2")] {
            let mut state = StrategyState::new(7);
            let mut key = 0u64;
            group.bench_function(BenchmarkId::new(format!("{what}/{strategy}"), nodes), |b| {
                b.iter(|| {
                    key = key.wrapping_add(0x9e37_79b9_7f4a_7c15);
                    let affinity = match what {
                        "session" => Affinity::session("session"),
                        _ => Some(Affinity::Prefix(key)),
                    };
                    let ask = Ask { affinity, ..ask(Some(model)) };
                    let sessions = black_box(&sessions);
                    affinity::choose(&registry, &ask, &[], strategy, &mut state, sessions, Mono(1))
                });
            });
        }
    }
    group.finish();
}

criterion_group!(benches, placement);
criterion_main!(benches);
