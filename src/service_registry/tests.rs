//! The registry as its caller meets it; time is handed in wherever it matters.

use super::*;
use proptest::prelude::*;
use std::sync::Barrier;

const TIMEOUT_MS: u64 = 30_000;

fn id(name: &str) -> NodeId {
    NodeId::new(name).expect("an id")
}

fn info(name: &str) -> NodeInfo {
    NodeInfo { node_id: name.into(), address: format!("http://{name}:9200"), ..NodeInfo::default() }
}

fn pool(name: &str, free: u32, total: u32) -> PoolStatus {
    PoolStatus {
        pool_id: name.into(),
        ready: true,
        slots_free: free,
        slots_total: total,
        ..PoolStatus::default()
    }
}

fn replica(name: &str, free: u32) -> ReplicaStatus {
    ReplicaStatus {
        replica_id: name.into(),
        url: "http://10.0.0.9:8081".into(),
        ready: true,
        slots_free: free,
        slots_total: 4,
        models: vec!["m".into()],
        ..ReplicaStatus::default()
    }
}

/// A registry whose time the test sets.
struct World {
    state: State,
    now: Now,
}

impl World {
    fn new() -> World {
        World { state: State::new(TIMEOUT_MS, 1), now: Now::default().plus_ms(1_000) }
    }

    fn pass(&mut self, ms: u64) -> &mut State {
        self.now = self.now.plus_ms(ms);
        self.state.expire(self.now);
        self.state.core.check_invariants();
        &mut self.state
    }

    fn register(&mut self, name: &str) {
        let request = RegisterRequest::try_from(info(name)).expect("good names");
        self.state.register(&request, self.now).expect("registered");
    }

    fn beat(&mut self, name: &str, pools: Vec<PoolStatus>) -> Result<HeartbeatReply, RegistryError> {
        let beat = Heartbeat::try_from(pools).expect("good names");
        self.state.heartbeat(&id(name), &beat, self.now)
    }

    fn online(&self) -> Vec<String> {
        self.state.online().map(|node| node.id.to_string()).collect()
    }

    fn chosen(&self, pool: &str) -> Option<String> {
        self.state.node_for(&PoolId::new(pool).expect("an id")).map(|node| node.id.to_string())
    }
}

#[test]
fn a_silent_node_is_told_once_takes_no_work_and_comes_back() {
    let mut world = World::new();
    for name in ["a", "b"] {
        world.register(name);
        world.beat(name, vec![pool("pool-0", 4, 4)]).expect("taken");
    }
    world.pass(TIMEOUT_MS / 2);
    world.beat("b", vec![pool("pool-0", 1, 4)]).expect("taken");
    assert_eq!((world.online(), world.chosen("pool-0")), (vec!["a".into(), "b".into()], Some("a".into())));

    let stale = world.pass(TIMEOUT_MS / 2).take_stale();
    assert_eq!(stale, ["a"]);
    assert_eq!((world.online(), world.chosen("pool-0")), (vec!["b".into()], Some("b".into())));
    assert_eq!(world.state.core.node(&id("a")).expect("known").status, NodeStatus::Offline);
    assert!(world.pass(1).take_stale().is_empty(), "told once");

    world.beat("a", vec![pool("pool-0", 4, 4)]).expect("taken");
    assert_eq!(world.chosen("pool-0"), Some("a".into()), "back by itself");
    // Stale again, and back before anybody asked: no news.
    world.pass(TIMEOUT_MS);
    world.beat("a", Vec::new()).expect("taken");
    assert_eq!(world.state.take_stale(), ["b"]);
}

#[test]
fn a_registration_alone_is_not_online_and_ends_too() {
    let mut world = World::new();
    world.register("a");
    assert!(world.online().is_empty());
    assert_eq!(world.pass(TIMEOUT_MS).take_stale(), ["a"]);
    let unknown = world.beat("nobody", Vec::new()).expect_err("unknown");
    assert_eq!((unknown.http_status(), unknown.to_string().contains("not registered")), (404, true));
}

#[test]
fn most_of_three_nodes_that_fall_silent_together_stay_for_a_while() {
    let mut world = World::new();
    for name in ["a", "b", "c"] {
        world.register(name);
        world.beat(name, Vec::new()).expect("taken");
    }
    assert!(world.pass(TIMEOUT_MS).take_stale().is_empty());
    assert_eq!(world.pass(core::EXPIRY_HOLD_MS).take_stale(), ["a", "b", "c"]);
}

#[test]
fn one_pool_is_updated_and_nothing_else() {
    let mut world = World::new();
    world.register("a");
    let listed = |list: Vec<ReplicaStatus>| PoolStatus { replicas: Some(list), ..pool("pool-0", 4, 8) };
    world
        .beat("a", vec![listed(vec![replica("r0", 4), replica("r1", 4)]), pool("pool-1", 2, 2)])
        .expect("taken");
    let update = |world: &mut World, status: PoolStatus| {
        let beat = PoolBeat::try_from(status).expect("good names");
        let done = world.state.update_pool(&id("a"), &beat, world.now);
        world.state.core.check_invariants();
        done
    };
    let one_left = PoolStatus { slots_free: 1, ..listed(vec![replica("r1", 1)]) };
    update(&mut world, one_left.clone()).expect("taken");
    update(&mut world, pool("pool-2", 3, 3)).expect("a new one");
    let pools = world.state.pools(&id("a"));
    assert_eq!(pools[0], one_left);
    let names: Vec<&str> = pools.iter().map(|pool| pool.pool_id.as_str()).collect();
    assert_eq!(names, ["pool-0", "pool-1", "pool-2"]);
    // It is no sign of life.
    world.pass(TIMEOUT_MS - 1);
    update(&mut world, one_left).expect("taken");
    assert_eq!(world.pass(1).take_stale(), ["a"]);
    assert_eq!(world.chosen("pool-0"), None);
    // The next heartbeat is the whole truth again.
    world.beat("a", vec![pool("pool-1", 2, 2)]).expect("taken");
    assert_eq!(world.state.pools(&id("a")).len(), 1);
    let many = (0..crate::wire::node::REPLICAS_MAX + 1).map(|n| replica(&format!("r{n}"), 1)).collect();
    assert_eq!(update(&mut world, listed(many)).expect_err("too large").http_status(), 413);
}

proptest! {
    /// Whatever nodes there are: the chosen one takes work, no other has a smaller share in use, and there
    /// is one whenever any qualifies.
    #[test]
    fn the_least_loaded_node_that_takes_work_is_chosen(
        nodes in proptest::collection::vec((0u32..5, 0u32..5, any::<bool>(), any::<bool>(), any::<bool>()), 0..8),
    ) {
        let mut world = World::new();
        let mut shares = std::collections::BTreeMap::new();
        for (n, (free, used, ready, draining, beats)) in nodes.into_iter().enumerate() {
            let name = format!("n{n}");
            world.register(&name);
            if beats {
                let status = PoolStatus { ready, draining, ..pool("p", free, free + used) };
                world.beat(&name, vec![status]).expect("taken");
            }
            if beats && ready && !draining && free > 0 {
                shares.insert(name, f64::from(used) / f64::from(free + used));
            }
        }
        let chosen = world.chosen("p");
        prop_assert_eq!(chosen.is_some(), !shares.is_empty());
        if let Some(chosen) = chosen {
            let least = shares.values().copied().fold(f64::INFINITY, f64::min);
            prop_assert!((shares[&chosen] - least).abs() < 1e-9, "{} of {:?}", chosen, shares);
        }
    }
}

#[test]
fn equal_loads_go_by_memory_then_by_name() {
    let mut world = World::new();
    for (name, vram) in [("c", 1), ("b", 2), ("a", 1)] {
        world.register(name);
        let status = PoolStatus { vram_free_bytes: vram, ..pool("p", 2, 4) };
        world.beat(name, vec![status]).expect("taken");
    }
    assert_eq!(world.chosen("p"), Some("b".into()));
    world.state.deregister(&id("b"), None, world.now).expect("known");
    assert_eq!(world.chosen("p"), Some("a".into()));
}

#[test]
fn what_cannot_be_used_is_named() {
    let registry = ServiceRegistry::new(TIMEOUT_MS);
    let says = |result: Result<RegisterReply, RegistryError>, text: &str| {
        let error = result.expect_err("refused");
        assert!(error.http_status() == 400 && error.to_string().starts_with(text), "{error}");
    };
    says(registry.register(info("a b")), "node_id: ");
    says(registry.register(NodeInfo { address: "ftp://h".into(), ..info("a") }), "address: ");
    says(registry.register(NodeInfo { pools: vec!["..".into()], ..info("a") }), "pools: ");
    let error = registry.heartbeat("a", vec![pool("", 1, 1)]).expect_err("refused");
    assert!(error.to_string().starts_with("pool_id: "), "{error}");
    assert!(registry.get_node("a b").is_none() && registry.get_node_for_pool("..").is_none());
}

#[test]
fn another_machine_and_an_earlier_start_are_refused_and_the_first_is_named() {
    let registry = ServiceRegistry::new(TIMEOUT_MS);
    let start = |boot: &str, incarnation| NodeInfo {
        boot_id: Some(boot.into()),
        incarnation: Some(incarnation),
        ..info("a")
    };
    registry.register(start("one", 5)).expect("registered");
    let other = NodeInfo { address: "http://elsewhere:9200".into(), ..start("two", 9) };
    let twin = registry.register(other).expect_err("another machine");
    assert!(twin.http_status() == 409 && twin.to_string().contains("http://a:9200"), "{twin}");
    registry.register(start("one", 6)).expect("started again");
    assert_eq!(registry.deregister_incarnation("a", 5).expect_err("late").http_status(), 409);
    registry.deregister_incarnation("a", 6).expect("goodbye");
    assert_eq!(registry.register(start("one", 6)).expect_err("late").http_status(), 409);
}

#[test]
fn a_thread_that_panics_with_the_lock_harms_nobody() {
    let registry = ServiceRegistry::new(TIMEOUT_MS);
    registry.register(info("a")).expect("registered");
    let held = registry.clone();
    let panicked = std::thread::spawn(move || {
        let _held = held.0.lock().expect("the lock");
        panic!("on purpose");
    });
    assert!(panicked.join().is_err() && registry.0.is_poisoned());
    registry.heartbeat("a", vec![pool("p", 1, 1)]).expect("goes on");
    assert_eq!(registry.get_node_for_pool("p").expect("online").node_id, "a");
}

#[test]
fn many_threads_share_one_registry() {
    const THREADS: usize = 8;
    let (registry, start) = (ServiceRegistry::new(TIMEOUT_MS), Barrier::new(THREADS));
    std::thread::scope(|scope| {
        for n in 0..THREADS {
            let (registry, start) = (registry.clone(), &start);
            scope.spawn(move || {
                let name = format!("n{n}");
                start.wait();
                for free in 1..=50 {
                    registry.register(info(&name)).expect("registered");
                    registry.heartbeat(&name, vec![pool("p", free, 50)]).expect("taken");
                    registry.get_node_for_pool("p").expect("at least our own");
                    registry.update_pool_status(&name, pool("p", free, 60)).expect("taken");
                }
            });
        }
    });
    let online = registry.get_online_nodes();
    assert_eq!(online.len(), THREADS);
    for node in online {
        assert_eq!(registry.get_pool_status(&node.node_id, "p"), Some(pool("p", 50, 60)));
    }
}

#[test]
fn the_stale_checker_ends_with_the_registry() {
    let registry = ServiceRegistry::new(1);
    let checker = spawn_stale_checker(registry.clone(), 3600);
    registry.register(info("a")).expect("registered");
    assert!(!checker.is_finished());
    drop(registry);
    checker.thread().unpark();
    checker.join().expect("ended");
}

#[test]
fn a_node_is_shown_as_json() {
    let registry = ServiceRegistry::new(TIMEOUT_MS);
    registry.register(NodeInfo { pools: vec!["pool-0".into()], ..info("a") }).expect("registered");
    let node = serde_json::to_value(registry.get_node("a").expect("known")).expect("JSON");
    assert_eq!((&node["status"], &node["machine_id"]), (&"Registering".into(), &"a".into()));
    assert!(node["registered_at_ms"].as_u64() > Some(0) && node["last_heartbeat_ms"] == 0, "{node}");
}
