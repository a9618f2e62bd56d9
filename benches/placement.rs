//! How long does it take to choose a replica, and does it depend on how many there are?
//!
//! 10, 1,000 and 10,000 nodes with four pools of one replica each. A third of the replicas have slots
//! taken. Asked for are any model, one that every fourth replica serves, one that a single node has, one
//! that nobody has, and one whose replicas are all full; the least loaded ones also with pins, and with
//! affinity: of conversations, a new one each time, and of a session that was served before.
//!
//! `placement-pins` asks, among 1,000 and 10,000 nodes, for everything that narrows a request down: a pool, a
//! node, devices, avoidances, preferences, a long context, more slots than anybody has free, and replicas tried
//! in vain; each where some have room and where none has. Of the pools one is free, one takes no work, and one is
//! full. `change` is what a slot costs that is taken and given back.
//!
//! `catalog` shows which models are on which nodes: a page of 1,000 nodes, of as many and of ten times as many.

use std::hint::black_box;

use std::time::Duration;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use llama_orch::http::head::parse_request;
use llama_orch::orchestratord::affinity::{self, Affinity};
use llama_orch::orchestratord::catalog::availability;
use llama_orch::orchestratord::placement::{Ask, Choice, Strategy, StrategyState, choose};
use llama_orch::orchestratord::served_sessions::ServedSessions;
use llama_orch::orchestratord::service_registry::{Limits, ReplicaRef, ServiceRegistry};
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
                    "slots_free":4,"slots_total":4,"models":["{model}"],"device_mask":"{pool}"{}}}]}}"#,
                    (n * 7919) % 80,
                    [r#","context_length":8192"#, r#","context_length":4096"#, "", ""][pool]
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

/// What a request is narrowed down by, whether a replica is found, and what it has tried in vain.
fn narrowed(registry: &ServiceRegistry) -> Vec<(&'static str, Ask, bool, Vec<ReplicaRef>)> {
    let any = || Ask { slots: 1, ..Ask::default() };
    let pool = |n: u32| PoolId::new(&format!("pool-{n}")).expect("an id");
    let in_pool = |n: u32| Ask { pool: Some(pool(n)), ..any() };
    let node = |n: u32| NodeId::new(&format!("gpu-{n:05}")).ok();
    let devices = |mask: &str| Ask { device_mask: Some(mask.into()), ..any() };
    let avoiding = |pools: &[u32]| Ask { avoid_pools: pools.iter().map(|n| pool(*n)).collect(), ..any() };
    let preferring = |pools: &[u32]| Ask { prefer_pools: pools.iter().map(|n| pool(*n)).collect(), ..any() };
    let model = |n: u32| Some(format!("model-{n}"));
    let tried: Vec<ReplicaRef> = registry
        .replicas()
        .filter(|(_, known)| known.key.pool == pool(2) && known.in_flight == 0)
        .map(|(replica, _)| replica)
        .take(3)
        .collect();
    let cases = [
        ("pool-free", in_pool(2), true),
        ("pool-full", in_pool(3), false),
        ("pool-down", in_pool(1), false),
        ("pool-unknown", in_pool(9), false),
        ("pool-model", Ask { model: model(2), ..in_pool(2) }, true),
        ("pool-model-full", Ask { model: model(3), ..in_pool(3) }, false),
        ("pool-other-model", Ask { model: model(0), ..in_pool(2) }, false),
        ("pool-short", Ask { context_tokens: Some(10_000), ..in_pool(0) }, false),
        ("pool-large", Ask { slots: 2, ..in_pool(2) }, true),
        ("node-free", Ask { node: node(5), ..any() }, true),
        ("node-full", Ask { node: node(5), ..in_pool(3) }, false),
        ("node-down", Ask { node: node(5), ..in_pool(1) }, false),
        ("node-unknown", Ask { node: node(99_999), ..any() }, false),
        ("devices-free", devices("2"), true),
        ("devices-full", devices("3"), false),
        ("devices-down", devices("1"), false),
        ("devices-unknown", devices("9"), false),
        ("devices-pool-full", Ask { pool: Some(pool(3)), ..devices("3") }, false),
        ("devices-other-pool", Ask { pool: Some(pool(2)), ..devices("3") }, false),
        ("avoid-free", avoiding(&[0]), true),
        ("avoid-full", avoiding(&[0, 1, 2]), false),
        ("avoid-all", avoiding(&[0, 1, 2, 3]), false),
        ("avoid-model", Ask { model: model(2), ..avoiding(&[2]) }, false),
        ("prefer-free", preferring(&[2]), true),
        ("prefer-full", preferring(&[3, 1]), true),
        ("prefer-full-model", Ask { model: model(3), ..preferring(&[3, 1]) }, false),
        ("prefer-unknown", preferring(&[9]), true),
        ("context-any-model", Ask { context_tokens: Some(10_000), ..avoiding(&[2, 3]) }, false),
        ("context-wish", Ask { context_tokens: Some(10_000), context_is_wish: true, ..in_pool(0) }, false),
    ];
    let mut cases: Vec<_> =
        cases.into_iter().map(|(what, ask, found)| (what, ask, found, Vec::new())).collect();
    cases.push(("tried", Ask { model: model(2), ..any() }, true, tried.clone()));
    cases.push(("tried-pool", in_pool(2), true, tried.clone()));
    let full: Vec<ReplicaRef> = registry.replicas().map(|(replica, _)| replica).skip(3).step_by(4).collect();
    cases.push(("tried-full", Ask { model: model(3), ..any() }, false, full[..3].to_vec()));
    cases
}

fn pins(c: &mut Criterion) {
    let mut group = c.benchmark_group("placement-pins");
    group.warm_up_time(Duration::from_millis(200)).measurement_time(Duration::from_millis(600));
    group.sample_size(30);
    for nodes in [1_000usize, 10_000] {
        let mut registry = registry_of(nodes);
        let all: Vec<_> = registry.replicas().map(|(replica, _)| replica).collect();
        let down = all.iter().skip(1).step_by(4);
        down.for_each(|replica| {
            registry.data_path_failed(*replica, "reset", Now::default(), &mut Vec::new())
        });
        for strategy in Strategy::ALL {
            registry.set_placement(strategy, true);
            for (what, ask, is_found, tried) in narrowed(&registry) {
                let is_essential = ["pool-free", "pool-full", "avoid-full", "devices-down"].contains(&what);
                if strategy != Strategy::LeastLoaded && !is_essential {
                    continue;
                }
                let mut state = StrategyState::new(7);
                let found = choose(&registry, &ask, &tried, strategy, &mut state);
                assert_eq!(matches!(found.choice, Choice::Replica { .. }), is_found, "{what}: {found:?}");
                group.bench_function(BenchmarkId::new(format!("{what}/{strategy}"), nodes), |b| {
                    b.iter(|| choose(black_box(&registry), black_box(&ask), &tried, strategy, &mut state));
                });
            }
        }
        let strategy = Strategy::LeastLoaded;
        registry.set_placement(strategy, true);
        let mut sessions = ServedSessions::default();
        sessions.used(&"session".into(), all[3], Mono(0));
        let any = || Ask { slots: 1, ..Ask::default() };
        let pool = |n: u32| PoolId::new(&format!("pool-{n}")).expect("an id");
        let with_affinity = [
            ("prefix-pool-free", Ask { pool: Some(pool(2)), ..any() }),
            ("prefix-pool-full", Ask { pool: Some(pool(3)), ..any() }),
            ("prefix-devices-full", Ask { device_mask: Some("3".into()), ..any() }),
            ("prefix-avoid-full", Ask { avoid_pools: vec![pool(0), pool(1), pool(2)], ..any() }),
            ("prefix-prefer-full", Ask { prefer_pools: vec![pool(3)], ..any() }),
            ("prefix-node", Ask { node: NodeId::new("gpu-00005").ok(), ..any() }),
            ("session-full-home", Ask { model: Some("model-2".into()), ..any() }),
            ("session-full-pool", Ask { pool: Some(pool(3)), ..any() }),
        ];
        for (what, ask) in with_affinity {
            let mut state = StrategyState::new(7);
            let mut key = 0u64;
            group.bench_function(BenchmarkId::new(format!("{what}/{strategy}"), nodes), |b| {
                b.iter(|| {
                    key = key.wrapping_add(0x9e37_79b9_7f4a_7c15);
                    let affinity = match what.starts_with("session") {
                        true => Affinity::session("session"),
                        false => Some(Affinity::Prefix(key)),
                    };
                    let ask = Ask { affinity, ..ask.clone() };
                    affinity::choose(
                        &registry,
                        &ask,
                        &[],
                        strategy,
                        &mut state,
                        black_box(&sessions),
                        Mono(1),
                    )
                });
            });
        }
        // Three of four slots are taken everywhere, and two are asked for.
        for replica in &all {
            let free = registry.replica(*replica).map_or(0, |known| known.slots_free());
            let _ = registry.acquire(*replica, free.saturating_sub(1));
        }
        for (what, ask) in [
            ("large-full", Ask { slots: 2, model: Some("model-2".into()), ..any() }),
            ("large-pool-full", Ask { slots: 2, pool: Some(pool(2)), ..any() }),
        ] {
            let mut state = StrategyState::new(7);
            group.bench_function(BenchmarkId::new(format!("{what}/{strategy}"), nodes), |b| {
                b.iter(|| choose(black_box(&registry), black_box(&ask), &[], strategy, &mut state));
            });
        }
        let mut turn = 2;
        group.bench_function(BenchmarkId::new("change", nodes), |b| {
            b.iter(|| {
                turn = (turn + 4 * 977) % all.len();
                let grant = registry.acquire(all[turn], 1);
                grant.into_iter().for_each(|grant| registry.release(grant));
            });
        });
    }
    group.finish();
}

fn catalog(c: &mut Criterion) {
    let mut group = c.benchmark_group("catalog");
    group.warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_millis(1_000));
    let request = b"GET /v2/catalog/availability?limit=1000 HTTP/1.1\r\nHost: a\r\n\r\n";
    let head = parse_request(request).expect("a head");
    for nodes in [1_000usize, 10_000] {
        let registry = registry_of(nodes);
        group.bench_function(BenchmarkId::from_parameter(nodes), |b| {
            b.iter(|| availability(black_box(&registry), &head).expect("a page"));
        });
    }
}

criterion_group!(benches, placement, pins, catalog);
criterion_main!(benches);
