//! What is chosen, and what is said where nothing is.

use super::*;
use crate::orchestratord::service_registry::{Change, Limits};
use crate::time::Now;
use crate::wire::node::{Heartbeat, RegisterRequest};
use proptest::prelude::{Strategy as Generator, any, prop_oneof};
use proptest::prop_assert_eq;
use serde_json::json;
use std::collections::BTreeMap;

/// One pool with one replica: (pool, models, ready, free slots of 4, free GPU memory).
type Spec = (&'static str, &'static [&'static str], bool, u32, u64);

/// Nodes `n0`, `n1`, ... in the given order.
fn registry(nodes: &[&[Spec]]) -> ServiceRegistry {
    let mut registry = ServiceRegistry::new(Limits::default(), 1);
    let mut changes: Vec<Change> = Vec::new();
    // The last is registered first: order by name must not be order of arrival.
    for (n, specs) in nodes.iter().enumerate().rev() {
        let name = format!("n{n}");
        let body = json!({"node_id": name, "address": format!("http://{name}:9200")});
        let request: RegisterRequest = serde_json::from_value(body).expect("a registration");
        registry.register(&request, "peer", Now::default(), &mut changes).expect("registered");
        let pools: Vec<_> = specs
            .iter()
            .map(|(pool, models, ready, free, vram)| {
                let replica = json!({"replica_id": "r0", "url": "http://127.0.0.1:1", "ready": ready,
                    "slots_free": free, "slots_total": 4, "models": models, "device_mask": pool});
                json!({"pool_id": pool, "vram_free_bytes": vram, "replicas": [replica]})
            })
            .collect();
        let beat: Heartbeat = serde_json::from_value(json!({"pools": pools})).expect("a heartbeat");
        let node = NodeId::new(&name).expect("an id");
        registry.heartbeat(&node, &beat, "peer", Now::default(), &mut changes).expect("accepted");
    }
    registry.check_invariants();
    registry
}

fn ask(model: &str) -> Ask {
    Ask { model: Some(model.into()), slots: 1, ..Ask::default() }
}

fn pool(name: &str) -> PoolId {
    PoolId::new(name).expect("an id")
}

/// `node/pool` of the choice, or its refusal.
fn chosen(registry: &ServiceRegistry, ask: &Ask, strategy: Strategy, state: &mut StrategyState) -> String {
    match choose(registry, ask, &[], strategy, state).choice {
        Choice::Replica { replica, .. } => {
            assert!(fits(registry, replica, ask), "chosen, but does not fit");
            let found = registry.replica(replica).expect("it exists");
            format!("{}/{}", found.node, found.key.pool)
        }
        Choice::NotReady { .. } => "NotReady".into(),
        refusal => format!("{refusal:?}"),
    }
}

fn first(registry: &ServiceRegistry, ask: &Ask) -> String {
    chosen(registry, ask, Strategy::LeastLoaded, &mut StrategyState::new(1))
}

#[test]
fn least_loaded_goes_by_share_then_memory_then_name() {
    let m: &[&str] = &["m"];
    let by_share = registry(&[&[("a", m, true, 2, 9)], &[("b", m, true, 3, 0)]]);
    assert_eq!(first(&by_share, &ask("m")), "n1/b");
    let by_memory = registry(&[&[("a", m, true, 3, 1)], &[("b", m, true, 3, 2)]]);
    assert_eq!(first(&by_memory, &ask("m")), "n1/b");
    let by_name = registry(&[&[("b", m, true, 4, 0), ("a", m, true, 4, 0)], &[("a", m, true, 4, 0)]]);
    assert_eq!(first(&by_name, &ask("m")), "n0/a");
    let most_vram = registry(&[&[("a", m, true, 4, 1)], &[("b", m, true, 1, 2)]]);
    let mut state = StrategyState::new(1);
    assert_eq!(chosen(&most_vram, &ask("m"), Strategy::MostVram, &mut state), "n1/b");
}

#[test]
fn round_robin_visits_all_in_turn_and_random_visits_all() {
    let m: &[&str] = &["m"];
    let mut registry = registry(&[
        &[("a", m, true, 4, 0), ("b", m, true, 4, 5)],
        &[("a", m, false, 4, 0)],
        &[("a", m, true, 1, 0)],
    ]);
    registry.set_placement(Strategy::RoundRobin, false);
    let mut state = StrategyState::new(1);
    let turns: Vec<String> =
        (0..4).map(|_| chosen(&registry, &ask("m"), Strategy::RoundRobin, &mut state)).collect();
    assert_eq!(turns, ["n0/a", "n0/b", "n2/a", "n0/a"]);
    registry.set_placement(Strategy::Random, false);
    let sequence = |seed| -> Vec<String> {
        let mut state = StrategyState::new(seed);
        (0..300).map(|_| chosen(&registry, &ask("m"), Strategy::Random, &mut state)).collect()
    };
    assert_eq!(sequence(5), sequence(5), "the seed decides");
    let mut counts: BTreeMap<String, u32> = BTreeMap::new();
    sequence(5).into_iter().for_each(|name| *counts.entry(name).or_default() += 1);
    assert!(counts.len() == 3 && counts.values().all(|n| *n > 60), "{counts:?}");
}

#[test]
fn refusals_say_which_kind() {
    let m: &[&str] = &["m"];
    assert_eq!(first(&registry(&[]), &ask("m")), "Nothing");
    let known = registry(&[&[("full", m, true, 0, 0), ("down", &["x"], false, 4, 0)]]);
    assert_eq!(first(&known, &ask("m")), "Busy");
    assert_eq!(first(&known, &ask("x")), "NotReady");
    assert_eq!(first(&known, &ask("y")), "UnknownModel");
    assert_eq!(first(&known, &Ask { pool: Some(pool("elsewhere")), ..ask("m") }), "UnknownPin");
    assert_eq!(first(&known, &Ask { pool: Some(pool("down")), ..ask("m") }), "UnknownModel");
    let loading = registry(&[&[("a", m, true, 4, 0), ("b", &[], false, 4, 0)]]);
    assert_eq!(first(&loading, &ask("y")), "NotReady", "what the second one serves is not known yet");
    let wildcard = registry(&[&[("a", m, true, 4, 0), ("b", &[], true, 4, 0)]]);
    assert_eq!(first(&wildcard, &ask("y")), "n0/b");
    assert_eq!(first(&wildcard, &ask("")), "n0/a");
}

#[test]
fn pins_are_kept_and_preferences_are_not_forced() {
    let m: &[&str] = &["m"];
    let registry = registry(&[
        &[("a", m, true, 4, 0), ("b", m, true, 1, 0), ("c", m, true, 0, 0)],
        &[("a", m, true, 4, 0)],
    ]);
    let node = |name: &str| Some(NodeId::new(name).expect("an id"));
    assert_eq!(first(&registry, &Ask { node: node("n1"), ..ask("m") }), "n1/a");
    assert_eq!(first(&registry, &Ask { pool: Some(pool("b")), ..ask("m") }), "n0/b");
    assert_eq!(first(&registry, &Ask { pool: Some(pool("c")), ..ask("m") }), "Busy");
    assert_eq!(first(&registry, &Ask { device_mask: Some("b".into()), ..ask("m") }), "n0/b");
    assert_eq!(first(&registry, &Ask { avoid_pools: vec![pool("a")], ..ask("m") }), "n0/b");
    assert_eq!(first(&registry, &Ask { prefer_pools: vec![pool("b")], ..ask("m") }), "n0/b");
    assert_eq!(first(&registry, &Ask { prefer_pools: vec![pool("c")], ..ask("m") }), "n0/a");
}

#[test]
fn a_large_ask_takes_a_whole_replica_and_a_failed_one_is_not_chosen_again() {
    let m: &[&str] = &["m"];
    let registry = registry(&[&[("a", m, true, 3, 0)], &[("a", m, true, 4, 0)]]);
    let large = Ask { slots: 9, ..ask("m") };
    let mut state = StrategyState::new(1);
    let found = choose(&registry, &large, &[], Strategy::LeastLoaded, &mut state);
    let Choice::Replica { replica, slots: 4 } = found.choice else { panic!("{found:?}") };
    let counted = survey(&registry, &large, &[], Strategy::LeastLoaded, &mut state);
    assert_eq!((counted.considered, counted.placeable, counted.with_room), (2, 2, 1));
    let again = choose(&registry, &ask("m"), &[replica], Strategy::LeastLoaded, &mut state);
    assert!(matches!(again.choice, Choice::Replica { replica: other, .. } if other != replica));
    let all: Vec<ReplicaRef> = registry.replicas().map(|(replica, _)| replica).collect();
    let none = choose(&registry, &ask("m"), &all, Strategy::LeastLoaded, &mut state);
    assert_eq!(none.choice, Choice::NotReady { reason: "n0/a/r0: this request failed there already".into() });
}

#[test]
fn strategies_are_read_as_they_are_written() {
    for strategy in Strategy::ALL {
        assert_eq!(strategy.to_string().parse(), Ok(strategy));
    }
    let error = "fastest".parse::<Strategy>().expect_err("no such strategy");
    assert!(error.contains("least-loaded, round-robin, random, most-vram"), "{error}");
}

#[test]
fn a_context_that_is_too_short_is_no_choice() {
    let mut changes = Vec::new();
    let mut world = World::new(Strategy::LeastLoaded, false);
    for (node, context_length) in [(0, json!(4096)), (1, json!(8192)), (2, json!(null))] {
        world.beat(
            node,
            &json!({"replica_id": "r0", "url": "http://127.0.0.1:1", "ready": true,
            "slots_free": 2 - node / 2, "slots_total": 2, "models": ["m"], "context_length": context_length}),
        );
    }
    let long = |context_tokens| Ask { context_tokens: Some(context_tokens), ..ask("m") };
    assert_eq!(first(&world.registry, &long(4096)), "n0/p0");
    assert_eq!(first(&world.registry, &long(4097)), "n1/p0");
    assert_eq!(first(&world.registry, &long(9000)), "n2/p0", "one of unknown length may serve it");
    let last = NodeId::new("n2").expect("an id");
    world.registry.deregister(&last, None, Now::default(), &mut changes).expect("known");
    assert_eq!(first(&world.registry, &long(9000)), "ContextTooLong { longest_tokens: 8192 }");
    assert_eq!(
        first(&world.registry, &Ask { model: None, ..long(9000) }),
        "ContextTooLong { longest_tokens: 8192 }"
    );
}

/// A registry to which anything may happen.
struct World {
    registry: ServiceRegistry,
    strategy: Strategy,
    grants: Vec<crate::orchestratord::service_registry::Grant>,
    now: Now,
    changes: Vec<Change>,
}

/// What happens to it; numbers choose among what there is.
#[derive(Clone, Debug)]
enum Event {
    /// A heartbeat of a node: for each of its replicas whether it is ready, slots, free ones, models,
    /// context, GPU memory and devices.
    Beat(usize, Vec<(bool, u32, u32, usize, usize, u64, usize)>),
    Acquire(usize, u32),
    Release(usize),
    Fail(usize),
    Answer(usize),
    Pass(u64),
    Leave(usize),
}

const NODES: usize = 7;
const POOLS: [&str; 3] = ["p0", "p1", "p2"];
const DEVICES: [Option<&str>; 4] = [Some("0"), Some("1"), Some("0,1"), None];
const MODELS: [&[&str]; 5] = [&["a"], &["a", "b"], &["b"], &["c"], &[]];

impl World {
    fn new(strategy: Strategy, with_rings: bool) -> World {
        let mut registry = ServiceRegistry::new(Limits::default(), 1);
        registry.set_placement(strategy, with_rings);
        World { registry, strategy, grants: Vec::new(), now: Now::default(), changes: Vec::new() }
    }

    /// One replica in pool `p0` of a node.
    fn beat(&mut self, node: usize, replica: &serde_json::Value) {
        self.beat_pools(node, json!([{"pool_id": "p0", "replicas": [replica]}]));
    }

    fn beat_pools(&mut self, node: usize, pools: serde_json::Value) {
        let name = format!("n{node}");
        let id = NodeId::new(&name).expect("an id");
        let body = json!({"node_id": name, "address": format!("http://{name}:9200")});
        let request: RegisterRequest = serde_json::from_value(body).expect("a registration");
        let beat: Heartbeat = serde_json::from_value(json!({"pools": pools})).expect("a heartbeat");
        if self.registry.node(&id).is_none() {
            self.registry.register(&request, "peer", self.now, &mut self.changes).expect("registered");
        }
        self.registry.heartbeat(&id, &beat, "peer", self.now, &mut self.changes).expect("accepted");
    }

    fn replica(&self, number: usize) -> Option<ReplicaRef> {
        let count = self.registry.table().len();
        self.registry.replicas().nth(number.checked_rem(count)?).map(|(replica, _)| replica)
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Beat(node, replicas) => {
                let mut pools = vec![Vec::new(); POOLS.len()];
                for (n, (ready, total, free, models, context, vram, devices)) in
                    replicas.into_iter().enumerate()
                {
                    let context_length = [None, Some(1_000), Some(2_000)][context];
                    pools[n % POOLS.len()].push((
                        vram,
                        json!({"replica_id": format!("r{n}"), "url": "http://127.0.0.1:1", "ready": ready,
                            "slots_free": free.min(total), "slots_total": total, "models": MODELS[models],
                            "context_length": context_length, "device_mask": DEVICES[devices]}),
                    ));
                }
                let pools = pools.into_iter().zip(POOLS).map(|(replicas, pool)| {
                    let vram = replicas.first().map_or(0, |(vram, _)| *vram);
                    let replicas: Vec<_> = replicas.into_iter().map(|(_, replica)| replica).collect();
                    json!({"pool_id": pool, "vram_free_bytes": vram, "replicas": replicas})
                });
                self.beat_pools(node, pools.collect());
            }
            Event::Acquire(number, slots) => {
                let replica = self.replica(number);
                self.grants.extend(replica.and_then(|replica| self.registry.acquire(replica, slots)));
            }
            Event::Release(number) => {
                if let Some(at) = number.checked_rem(self.grants.len()) {
                    self.registry.release(self.grants.swap_remove(at));
                }
            }
            Event::Fail(number) => {
                if let Some(replica) = self.replica(number) {
                    self.registry.data_path_failed(replica, "reset", self.now, &mut self.changes);
                }
            }
            Event::Answer(number) => {
                if let Some(replica) = self.replica(number) {
                    self.registry.data_path_worked(replica, self.now, &mut self.changes);
                }
            }
            Event::Pass(ms) => {
                self.now = self.now.plus_ms(ms);
                self.registry.expire(self.now, &mut self.changes);
            }
            Event::Leave(node) => {
                let node = NodeId::new(&format!("n{node}")).expect("an id");
                let _ = self.registry.deregister(&node, None, self.now, &mut self.changes);
            }
        }
    }

    /// What the pass over all replicas chooses, preferences included.
    fn surveyed(&self, ask: &Ask, excluded: &[ReplicaRef], state: &mut StrategyState) -> Placement {
        let (registry, table, strategy) = (&self.registry, self.registry.table(), self.strategy);
        let preferred = Search { registry, table, ask, excluded, strategy, preferred_only: true };
        let found = pass(&preferred, state, Among::All, false);
        if !ask.prefer_pools.is_empty() && matches!(found.choice, Choice::Replica { .. }) {
            return found;
        }
        survey(registry, ask, excluded, strategy, state)
    }
}

fn event() -> impl Generator<Value = Event> {
    let replica = (any::<bool>(), 0u32..4, 0u32..4, 0..MODELS.len(), 0usize..3, 0u64..3, 0..DEVICES.len());
    prop_oneof![
        6 => (0..NODES, proptest::collection::vec(replica, 0..6)).prop_map(|(n, r)| Event::Beat(n, r)),
        4 => (0usize..50, 1u32..3).prop_map(|(n, slots)| Event::Acquire(n, slots)),
        2 => (0usize..50).prop_map(Event::Release),
        2 => (0usize..50).prop_map(Event::Fail),
        1 => (0usize..50).prop_map(Event::Answer),
        1 => (0u64..25_000).prop_map(Event::Pass),
        1 => (0..NODES).prop_map(Event::Leave),
    ]
}

fn any_ask() -> impl Generator<Value = (Ask, Vec<usize>)> {
    let rarely = |end: usize| prop_oneof![4 => proptest::strategy::Just(None), 1 => (0..end).prop_map(Some)];
    let pools = || prop_oneof![2 => proptest::collection::vec(0usize..4, 0..1), 1 => proptest::collection::vec(0usize..4, 1..4)];
    let basics = (0usize..5, 0usize..4, rarely(4), rarely(3));
    let tried = prop_oneof![2 => proptest::collection::vec(0usize..50, 0..1), 1 => proptest::collection::vec(0usize..50, 1..6)];
    let pins = (
        rarely(NODES + 1),
        prop_oneof![1 => rarely(4), 1 => (0..4usize).prop_map(Some)],
        pools(),
        pools(),
        tried,
    );
    (basics, pins).prop_map(|((model, slots, devices, context), (node, own, prefer, avoid, excluded))| {
        let named = |n: usize| pool(["p0", "p1", "p2", "p9"][n]);
        let ask = Ask {
            model: [None, Some("a"), Some("b"), Some("c"), Some("z")][model].map(String::from),
            slots: [1, 1, 2, 3][slots],
            pool: own.map(named),
            node: node.map(|n| NodeId::new(&format!("n{n}")).expect("an id")),
            device_mask: devices.map(|n| DEVICES[n].unwrap_or("2").to_string()),
            prefer_pools: prefer.into_iter().map(named).collect(),
            avoid_pools: avoid.into_iter().map(named).collect(),
            context_tokens: context.map(|n| [500, 1_500, 2_500][n]),
            context_is_wish: false,
            affinity: None,
            tokens_max: None,
        };
        (ask, excluded)
    })
}

proptest::proptest! {
    /// Whatever has happened to the registry: the index chooses what the pass over all replicas chooses,
    /// and refuses with the same words.
    #[test]
    fn the_index_chooses_as_the_pass_does(
        strategy in 0usize..4,
        with_rings in any::<bool>(),
        events in proptest::collection::vec(event(), 1..40),
        asks in proptest::collection::vec(any_ask(), 1..12),
    ) {
        let mut world = World::new(Strategy::ALL[strategy], with_rings);
        let mut state = StrategyState::new(3);
        for event in events {
            world.happen(event);
            world.registry.check_invariants();
            for (ask, tried) in &asks {
                let tried: Vec<ReplicaRef> = tried.iter().filter_map(|n| world.replica(*n)).collect();
                let expected = world.surveyed(ask, &tried, &mut state.clone());
                let found = choose(&world.registry, ask, &tried, world.strategy, &mut state);
                match (&found.choice, &expected.choice) {
                    (Choice::Replica { replica, .. }, Choice::Replica { replica: other, .. })
                        if world.strategy == Strategy::Random =>
                    {
                        let is_preferred = |replica: ReplicaRef| {
                            let known = world.registry.replica(replica).expect("it was chosen");
                            ask.prefer_pools.contains(&known.key.pool)
                        };
                        proptest::prop_assert!(fits(&world.registry, *replica, ask), "{ask:?}: {found:?}");
                        proptest::prop_assert!(!tried.contains(replica), "{ask:?}: {found:?}");
                        prop_assert_eq!(is_preferred(*replica), is_preferred(*other));
                    }
                    _ => prop_assert_eq!(&found.choice, &expected.choice, "{:?}", ask),
                }
                let plain = Ask { model: ask.model.clone(), slots: 1, ..Ask::default() };
                if *ask == plain && tried.is_empty() {
                    prop_assert_eq!(
                        (found.considered, found.fitting, found.placeable, found.with_room),
                        (expected.considered, expected.fitting, expected.placeable, expected.with_room)
                    );
                }
            }
        }
        // Changing the strategy builds the index anew.
        world.registry.set_placement(Strategy::ALL[(strategy + 1) % 4], !with_rings);
        world.registry.check_invariants();
    }

    /// Every replica that fits is drawn equally often, however many others there are.
    #[test]
    fn random_draws_are_uniform(ready in proptest::collection::vec(0u8..4, 4..40), seed in any::<u64>()) {
        let mut world = World::new(Strategy::Random, false);
        for (node, kind) in ready.iter().enumerate() {
            // Of another model, full, a wildcard, of the model.
            let (models, free) = [(&["x"][..], 2), (&["m"][..], 0), (&[][..], 2), (&["m"][..], 1)][*kind as usize];
            world.beat(node, &json!({"replica_id": "r0", "url": "http://127.0.0.1:1", "ready": true,
                "slots_free": free, "slots_total": 2, "models": models}));
        }
        let fitting = ready.iter().filter(|kind| **kind >= 2).count();
        proptest::prop_assume!(fitting > 0);
        let (mut state, mut drawn) = (StrategyState::new(seed), BTreeMap::new());
        let draws = 400 * fitting;
        for _ in 0..draws {
            let name = chosen(&world.registry, &ask("m"), Strategy::Random, &mut state);
            *drawn.entry(name).or_insert(0u32) += 1;
        }
        prop_assert_eq!(drawn.len(), fitting);
        // Five standard deviations of 20 on either side.
        proptest::prop_assert!(drawn.values().all(|n| (300..=500).contains(n)), "{:?}", drawn);
    }
}

/// More replicas out of reach than the index looks at: it gives up, and the pass finds the one.
#[test]
fn one_that_fits_among_thousands_that_do_not_is_found() {
    for strategy in Strategy::ALL {
        let mut world = World::new(strategy, false);
        for node in 0..300 {
            let devices = if node == 150 { "special" } else { "0" };
            world.beat(
                node,
                &json!({"replica_id": "r0", "url": "http://127.0.0.1:1", "ready": true,
                "slots_free": 2, "slots_total": 2, "models": ["m"], "device_mask": devices}),
            );
        }
        let mut state = StrategyState::new(9);
        let special = Ask { device_mask: Some("special".into()), ..ask("m") };
        assert_eq!(chosen(&world.registry, &special, strategy, &mut state), "n150/p0", "{strategy}");
        let pooled = Ask { pool: Some(pool("p0")), ..special };
        assert_eq!(chosen(&world.registry, &pooled, strategy, &mut state), "n150/p0", "{strategy}");
        let full = world.replica(0).expect("the first");
        world.grants.extend(world.registry.acquire(full, 2));
        let none = Ask { device_mask: Some("none".into()), ..ask("m") };
        assert_eq!(chosen(&world.registry, &none, strategy, &mut state), "UnknownPin", "{strategy}");
    }
}

/// Pools that all have other names are more cohorts than are looked at; and what is pinned to one of them is
/// found all the same.
#[test]
fn pools_of_many_names_are_told_apart() {
    for strategy in Strategy::ALL {
        let mut world = World::new(strategy, false);
        for node in 0..40 {
            let replica = json!({"replica_id": "r0", "url": "http://127.0.0.1:1", "ready": true,
                "slots_free": 1, "slots_total": 1, "models": ["m"], "device_mask": node.to_string()});
            world.beat_pools(node, json!([{"pool_id": format!("p{node}"), "replicas": [replica]}]));
        }
        world.registry.check_invariants();
        let mut state = StrategyState::new(9);
        let mut find = |world: &World, ask: &Ask| chosen(&world.registry, ask, strategy, &mut state);
        let pinned = Ask { pool: Some(pool("p17")), ..ask("m") };
        let on_devices = Ask { device_mask: Some("17".into()), ..ask("m") };
        let avoiding = Ask {
            avoid_pools: (0..40).filter(|n| *n != 17).map(|n| pool(&format!("p{n}"))).collect(),
            ..ask("m")
        };
        for one in [&pinned, &on_devices, &avoiding] {
            assert_eq!(find(&world, one), "n17/p17", "{strategy}");
        }
        let full = world
            .registry
            .replicas()
            .find(|(_, known)| known.key.pool == pool("p17"))
            .expect("it is there")
            .0;
        world.grants.extend(world.registry.acquire(full, 1));
        for one in [&pinned, &on_devices, &avoiding] {
            assert_eq!(find(&world, one), "Busy", "{strategy}");
        }
        let elsewhere = Ask { device_mask: Some("18".into()), ..pinned };
        assert_eq!(find(&world, &elsewhere), "UnknownPin", "{strategy}");
    }
}
