//! The registry as its caller meets it: leases, fences, snapshots, slots, and what each reports.

use super::*;
use crate::orchestratord::placement::{Ask, Choice, Strategy as Placement, StrategyState, choose, fits};
use crate::orchestratord::replica_table::{BACKOFF_FIRST_MS, BACKOFF_MAX_MS};
use crate::orchestratord::saved::SavedNode;
use crate::wire::id::PoolId;
use crate::wire::node::REPLICAS_MAX;
use crate::wire::pool::ReplicaStatus;
use proptest::prelude::*;

mod restore;

const PEER: &str = "10.0.0.7";

fn id(n: usize) -> NodeId {
    NodeId::new(&format!("n{n}")).expect("an id")
}

fn registration(n: usize, incarnation: Option<u64>, boot: Option<&str>) -> RegisterRequest {
    let body = serde_json::json!({
        "node_id": format!("n{n}"), "address": format!("http://n{n}:9200"), "pools": ["pool-0"],
        "incarnation": incarnation, "boot_id": boot,
    });
    serde_json::from_value(body).expect("a registration")
}

fn replica(name: &str, url: &str, generation: u64, ready: bool, free: u32) -> serde_json::Value {
    serde_json::json!({"replica_id": name, "url": url, "generation": generation, "ready": ready,
        "slots_free": free, "slots_total": 4, "models": ["m"]})
}

fn beat(incarnation: Option<u64>, seq: Option<u64>, replicas: &[serde_json::Value]) -> Heartbeat {
    let body = serde_json::json!({"incarnation": incarnation, "seq": seq,
        "pools": [{"pool_id": "pool-0", "ready": true, "slots_free": 4, "replicas": replicas}]});
    serde_json::from_value(body).expect("a heartbeat")
}

fn idle() -> serde_json::Value {
    replica("r0", "http://127.0.0.1:8080", 1, true, 4)
}

struct World {
    registry: ServiceRegistry,
    now: Now,
    changes: Vec<Change>,
}

impl World {
    fn new() -> Self {
        World {
            registry: ServiceRegistry::new(Limits::default(), 9),
            now: Now::default().plus_ms(1_000),
            changes: Vec::new(),
        }
    }

    fn register(
        &mut self,
        n: usize,
        incarnation: Option<u64>,
        boot: Option<&str>,
    ) -> Result<RegisterReply, Fenced> {
        let request = registration(n, incarnation, boot);
        self.registry.register(&request, PEER, self.now, &mut self.changes)
    }

    fn beat(&mut self, n: usize, beat: &Heartbeat) -> Result<HeartbeatReply, Fenced> {
        let reply = self.registry.heartbeat(&id(n), beat, PEER, self.now, &mut self.changes);
        self.registry.check_invariants();
        reply
    }

    /// A world of `nodes` nodes that have beaten once, with one idle replica each.
    fn online(nodes: usize) -> Self {
        let mut world = World::new();
        for n in 0..nodes {
            world.register(n, Some(1), Some("boot")).expect("registered");
            world.beat(n, &beat(Some(1), Some(1), &[idle()])).expect("accepted");
        }
        world.changes.clear();
        world
    }

    fn pass(&mut self, ms: u64) {
        self.now = self.now.plus_ms(ms);
        self.registry.expire(self.now, &mut self.changes);
        self.registry.check_invariants();
    }

    fn status(&self, n: usize) -> Option<NodeStatus> {
        self.registry.node(&id(n)).map(|node| node.status)
    }

    fn only_replica(&self, n: usize) -> ReplicaRef {
        let node = self.registry.node(&id(n)).expect("known");
        self.registry.replicas_of(node).next().expect("a replica")
    }

    fn takes_work(&self, replica: ReplicaRef) -> bool {
        fits(&self.registry, replica, &Ask::default())
    }
}

#[test]
fn a_silent_node_turns_suspect_then_offline_then_is_forgotten() {
    let mut world = World::online(1);
    let replica = world.only_replica(0);
    let mut seen = vec![(0, world.status(0))];
    let mut ms = 0;
    while world.status(0).is_some() {
        let due = world.registry.deadline().expect("something is due");
        let step = due.ns_since(world.now.mono).div_ceil(1_000_000);
        world.pass(step);
        ms += step;
        if world.status(0) != seen[seen.len() - 1].1 {
            seen.push((ms, world.status(0)));
        }
        assert!(!world.takes_work(replica));
    }
    let expected = [
        (0, Some(NodeStatus::Online)),
        (30_000, Some(NodeStatus::Suspect)),
        (40_000, Some(NodeStatus::Offline)),
        (40_000 + 86_400_000, None),
    ];
    assert_eq!(seen, expected);
    assert_eq!(world.registry.deadline(), None);
}

#[test]
fn a_heartbeat_brings_an_offline_node_back_with_its_replicas() {
    let mut world = World::online(1);
    let replica = world.only_replica(0);
    world.pass(50_000);
    world.pass(50_000);
    assert_eq!(world.status(0), Some(NodeStatus::Offline));
    world.changes.clear();
    world.beat(0, &beat(Some(1), Some(2), &[idle()])).expect("accepted");
    assert_eq!(world.status(0), Some(NodeStatus::Online));
    assert!(world.changes.contains(&Change::ReplicaReady(replica)), "{:?}", world.changes);
    assert!(world.takes_work(replica));
}

#[test]
fn a_node_that_never_beats_does_not_stay_registering() {
    let mut world = World::new();
    world.register(0, Some(1), None).expect("registered");
    assert_eq!(world.status(0), Some(NodeStatus::Registering));
    world.pass(30_000);
    assert_eq!(world.status(0), Some(NodeStatus::Suspect));
}

#[test]
fn a_late_registration_does_not_bring_back_who_has_left() {
    let mut world = World::new();
    world.register(0, Some(5), None).expect("registered");
    world.registry.deregister(&id(0), Some(5), world.now, &mut world.changes).expect("it is known");
    world.now = world.now.plus_ms(DEPARTED_MS - 1);
    for late in [4, 5] {
        assert_eq!(world.register(0, Some(late), None), Err(Fenced::Departed));
    }
    assert_eq!(world.status(0), None);
    world.register(0, Some(6), None).expect("the next start is welcome");
    world.registry.deregister(&id(0), None, world.now, &mut world.changes).expect("by an operator");
    world.register(0, Some(6), None).expect("an operator's removal is no goodbye");
    world.registry.deregister(&id(0), Some(6), world.now, &mut world.changes).expect("it is known");
    world.now = world.now.plus_ms(DEPARTED_MS);
    world.register(0, Some(1), None).expect("a machine may have lost its state directory");
}

#[test]
fn what_is_older_than_what_is_known_is_refused_and_changes_nothing() {
    let mut world = World::new();
    assert_eq!(world.beat(0, &beat(Some(1), Some(1), &[])), Err(Fenced::UnknownNode));
    world.register(0, Some(5), None).expect("registered");
    world.beat(0, &beat(Some(5), Some(7), &[idle()])).expect("accepted");
    world.changes.clear();
    let lease = world.registry.deadline();
    world.now = world.now.plus_ms(5_000);
    let old = beat(Some(5), Some(7), &[]);
    assert_eq!(world.beat(0, &old), Err(Fenced::OldSequence { known: 7 }));
    assert_eq!(world.beat(0, &beat(Some(4), Some(8), &[])), Err(Fenced::OldIncarnation { known: 5 }));
    assert_eq!(world.beat(0, &beat(Some(6), Some(1), &[])), Err(Fenced::UnknownNode));
    assert_eq!(world.register(0, Some(4), None), Err(Fenced::OldIncarnation { known: 5 }));
    let deregistered = world.registry.deregister(&id(0), Some(4), world.now, &mut world.changes);
    assert_eq!(deregistered, Err(Fenced::OldIncarnation { known: 5 }));
    assert!(world.changes.is_empty(), "{:?}", world.changes);
    assert_eq!(world.registry.deadline(), lease, "a refused message renewed the lease");
    world
        .registry
        .deregister(&id(0), None, world.now, &mut world.changes)
        .expect("without incarnation it is accepted");
    assert_eq!(world.status(0), None);
    world.registry.check_invariants();
}

#[test]
fn senders_without_incarnation_and_sequence_are_served() {
    let mut world = World::new();
    for _ in 0..2 {
        world.register(0, None, None).expect("registered");
        for _ in 0..2 {
            world.beat(0, &beat(None, None, &[idle()])).expect("accepted");
        }
        assert_eq!(world.status(0), Some(NodeStatus::Online));
    }
}

#[test]
fn registering_again_with_the_same_incarnation_hides_nothing() {
    let mut world = World::online(1);
    let replica = world.only_replica(0);
    world.register(0, Some(1), Some("boot")).expect("its answer was lost");
    assert_eq!(world.status(0), Some(NodeStatus::Online));
    assert!(world.takes_work(replica));
    assert_eq!(world.beat(0, &beat(Some(1), Some(1), &[])), Err(Fenced::OldSequence { known: 1 }));
}

#[test]
fn a_registration_whose_answer_is_always_lost_flaps_nothing() {
    let mut world = World::online(1);
    world.pass(30_000);
    assert_eq!(world.status(0), Some(NodeStatus::Suspect));
    world.changes.clear();
    for _ in 0..5 {
        world.register(0, Some(1), Some("boot")).expect("its answer is lost");
        world.pass(35_000);
    }
    let became = world.changes.iter().filter_map(|change| match change {
        Change::NodeStatus { to, .. } => Some(*to),
        _ => None,
    });
    assert_eq!(became.collect::<Vec<_>>(), [NodeStatus::Offline], "once, and for good");
    world.beat(0, &beat(Some(1), Some(99), &[])).expect("it has heard the answer");
    assert_eq!(world.status(0), Some(NodeStatus::Online));
}

#[test]
fn a_clone_that_counted_to_the_same_number_is_another_node() {
    let mut world = World::online(1);
    let replica = world.only_replica(0);
    let mut of_clone = beat(Some(1), Some(9), &[]);
    of_clone.boot_id = Some("clone".into());
    assert_eq!(world.beat(0, &of_clone), Err(Fenced::UnknownNode));
    assert!(world.takes_work(replica));
    world.pass(15_000);
    world.register(0, Some(1), Some("clone")).expect("the first one is silent");
    assert!(!world.takes_work(replica), "it is the first one's");
    let mut of_first = beat(Some(1), Some(10), &[]);
    of_first.boot_id = Some("boot".into());
    assert_eq!(world.beat(0, &of_first), Err(Fenced::UnknownNode));
}

#[test]
fn a_restarted_agent_keeps_the_ledger_of_engines_that_are_still_the_same() {
    for (same, url) in [(true, "http://127.0.0.1:8080"), (false, "http://127.0.0.1:9999")] {
        let mut world = World::online(1);
        let before = world.only_replica(0);
        let grant = world.registry.acquire(before, 3).expect("free slots");
        world.register(0, Some(2), Some("boot")).expect("registered");
        assert!(!world.takes_work(before), "placed before the new agent said what it has");
        world.beat(0, &beat(Some(2), Some(1), &[replica("r0", url, 1, true, 1)])).expect("accepted");
        let after = world.only_replica(0);
        assert_eq!(after == before, same);
        let free = |world: &World| world.registry.replica(after).expect("known").slots_free();
        assert_eq!(free(&world), 1, "counted by us where it is the same engine, else as reported");
        world.registry.release(grant);
        assert_eq!(free(&world), if same { 4 } else { 1 }, "an old grant is released into nothing");
    }
}

#[test]
fn a_twin_is_refused_and_reported_once_until_the_first_falls_silent() {
    let mut world = World::online(1);
    for _ in 0..3 {
        let refused = world.register(0, Some(9), Some("other"));
        assert_eq!(refused, Err(Fenced::Twin { holder: PEER.into() }));
        world.pass(1_000);
        world.beat(0, &beat(Some(1), None, &[idle()])).expect("the first is served");
    }
    let twins = world.changes.iter().filter(|c| matches!(c, Change::TwinRefused { .. })).count();
    assert_eq!((twins, world.status(0)), (1, Some(NodeStatus::Online)));
    world.pass(15_000);
    world.register(0, Some(9), Some("other")).expect("the first has missed its heartbeat");
}

#[test]
fn silence_of_most_nodes_is_held_against_ourselves_for_five_minutes() {
    let mut world = World::online(4);
    world.pass(20_000);
    world.beat(0, &beat(Some(1), Some(2), &[idle()])).expect("accepted");
    for second in 0..300 {
        world.pass(1_000);
        if second % 10 == 0 {
            world.beat(0, &beat(Some(1), None, &[idle()])).expect("accepted");
        }
        assert_eq!(world.status(1), Some(NodeStatus::Online));
    }
    // The data path still has its say.
    let replica = world.only_replica(1);
    world.registry.data_path_failed(replica, "connection refused", world.now, &mut world.changes);
    assert!(!world.takes_work(replica));
    world.pass(11_000);
    let statuses: Vec<_> = (0..4).map(|n| world.status(n).expect("known")).collect();
    use NodeStatus::{Online, Suspect};
    assert_eq!(statuses, [Online, Suspect, Suspect, Suspect]);
    let held = world.changes.iter().filter(|c| matches!(c, Change::ExpiryHeld { .. })).count();
    let resumed = world.changes.iter().filter(|c| **c == Change::ExpiryResumed).count();
    assert_eq!((held, resumed), (1, 1));
}

#[test]
fn silence_of_few_nodes_is_theirs() {
    let mut world = World::online(4);
    world.pass(20_000);
    for n in 0..2 {
        world.beat(n, &beat(Some(1), Some(2), &[idle()])).expect("accepted");
    }
    world.pass(10_000);
    assert_eq!((world.status(1), world.status(2)), (Some(NodeStatus::Online), Some(NodeStatus::Suspect)));
}

#[test]
fn a_draining_node_keeps_its_lease_and_gets_no_work() {
    let mut world = World::online(1);
    let replica = world.only_replica(0);
    let mut draining = beat(Some(1), Some(2), &[idle()]);
    draining.draining = true;
    world.beat(0, &draining).expect("accepted");
    assert_eq!(world.status(0), Some(NodeStatus::Draining));
    assert!(!world.takes_work(replica) && world.registry.acquire(replica, 1).is_none());
}

#[test]
fn loopback_engines_are_reached_through_their_node_and_others_directly() {
    let mut world = World::online(1);
    let replicas = [idle(), replica("r1", "http://10.0.0.9:8080", 1, true, 4)];
    world.beat(0, &beat(Some(1), Some(2), &replicas)).expect("accepted");
    let targets: Vec<Target> = world.registry.replicas().map(|(_, r)| r.target.clone()).collect();
    let url = |text| BaseUrl::new(text).expect("a URL");
    let relay = Target::Relay { agent: url("http://n0:9200"), engine: url("http://127.0.0.1:8080") };
    assert_eq!(targets, [relay, Target::Direct(url("http://10.0.0.9:8080"))]);
    let local = beat(None, None, &[idle()]);
    let home = NodeId::new("home").expect("an id");
    world.registry.set_local(&home, &local.pools, world.now, &mut world.changes).expect("taken");
    let first = world.registry.replicas().next().expect("home sorts first").1;
    assert_eq!(first.target, Target::Direct(url("http://127.0.0.1:8080")));
    world.pass(90_000);
    assert_eq!(world.registry.node(&home).expect("known").status, NodeStatus::Online);
}

#[test]
fn a_report_made_while_our_requests_ran_does_not_fill_a_replica() {
    let mut world = World::online(1);
    let r = world.only_replica(0);
    let free = |world: &World| world.registry.replica(r).expect("known").slots_free();
    let grant = world.registry.acquire(r, 4).expect("free slots");
    let full = [replica("r0", "http://127.0.0.1:8080", 1, true, 0)];
    world.beat(0, &beat(Some(1), Some(2), &full)).expect("accepted");
    world.registry.release(grant);
    assert_eq!(free(&world), 4, "our own load was counted twice");
    world.beat(0, &beat(Some(1), Some(3), &full)).expect("accepted");
    assert_eq!(free(&world), 4, "the report may still show the request that just ended");
    world.beat(0, &beat(Some(1), Some(4), &full)).expect("accepted");
    assert_eq!(free(&world), 0, "somebody else's load, for nothing of ours ran");
}

#[test]
fn a_failing_data_path_backs_off_and_tries_one_request() {
    let mut world = World::online(1);
    let r = world.only_replica(0);
    for backoff_ms in [250, 500, 1_000, 2_000, 4_000, 8_000, 10_000, 10_000] {
        world.registry.data_path_failed(r, "refused", world.now, &mut world.changes);
        world.registry.data_path_failed(r, "refused too", world.now, &mut world.changes);
        world.pass(backoff_ms * 4 / 5 - 1);
        world.beat(0, &beat(Some(1), None, &[idle()])).expect("accepted");
        assert!(!world.takes_work(r), "a heartbeat ended a backoff of {backoff_ms} ms");
        world.changes.clear();
        world.pass(backoff_ms / 5 + 1);
        assert_eq!(world.changes, [Change::ReplicaReady(r)]);
        let trial = world.registry.acquire(r, 1).expect("one may try");
        assert!(world.registry.acquire(r, 1).is_none(), "a second one tried");
        world.registry.release(trial);
    }
    let trial = world.registry.acquire(r, 1).expect("one may try");
    world.changes.clear();
    world.registry.data_path_worked(r, world.now, &mut world.changes);
    assert_eq!(world.changes, [Change::ReplicaReady(r)]);
    assert!(world.takes_work(r));
    world.registry.release(trial);
    world.registry.check_invariants();
}

#[test]
fn a_trial_that_ends_late_makes_no_room_beside_a_later_one() {
    let mut world = World::online(1);
    let r = world.only_replica(0);
    world.registry.data_path_failed(r, "refused", world.now, &mut world.changes);
    world.pass(250);
    let first = world.registry.acquire(r, 1).expect("one may try");
    world.registry.data_path_failed(r, "so did an earlier request", world.now, &mut world.changes);
    world.pass(500);
    let second = world.registry.acquire(r, 1).expect("one may try again");
    world.registry.release(first);
    assert!(world.registry.acquire(r, 1).is_none(), "a second one tried");
    world.registry.release(second);
}

#[test]
fn fewer_slots_may_be_enough_for_who_wants_all_of_them() {
    let mut world = World::online(1);
    let r = world.only_replica(0);
    let mut shrinking = idle();
    shrinking["slots_free"] = 1.into();
    world.beat(0, &beat(Some(1), Some(2), &[shrinking.clone()])).expect("accepted");
    world.changes.clear();
    shrinking["slots_total"] = 1.into();
    world.beat(0, &beat(Some(1), Some(3), &[shrinking])).expect("accepted");
    assert_eq!(world.changes, [Change::ReplicaCapacity(r)], "one of one slot is free, as one of four was");
}

#[test]
fn replicas_that_a_node_does_not_list_are_asked_for_and_then_used() {
    let mut world = World::new();
    world.register(0, None, None).expect("registered");
    let body = r#"{"timestamp":"2025-09-30T00:00:00Z","pools":[{"pool_id":"pool-0","ready":true,
        "slots_free":3,"models_available":["m"]}]}"#;
    let old: Heartbeat = serde_json::from_str(body).expect("a heartbeat");
    let pool = PoolId::new("pool-0").expect("an id");
    let agent = BaseUrl::new("http://n0:9200").expect("a URL");
    let ask = Change::AskNode { node: id(0), pool: pool.clone(), agent };
    for _ in 0..2 {
        world.changes.clear();
        world.beat(0, &old).expect("accepted");
        assert!(world.changes.contains(&ask));
        assert!(!world.takes_work(world.only_replica(0)));
    }
    let status: ReplicaStatus = serde_json::from_str(
        r#"{"replica_id":"r7","url":"http://127.0.0.1:8080","state":"ready","reason":"","since_ms":0,
        "ready":true,"slots_total":3,"slots_free":3}"#,
    )
    .expect("a status");
    world.registry.set_engine_url(&id(0), &pool, &[status], world.now, &mut world.changes);
    world.registry.check_invariants();
    let replica = world.only_replica(0);
    assert!(world.takes_work(replica));
    world.changes.clear();
    world.beat(0, &old).expect("accepted");
    assert_eq!((world.only_replica(0), world.changes.len()), (replica, 0));
    assert_eq!(world.registry.models()[0].placeable, 1);
}

#[test]
fn what_no_node_would_send_is_refused() {
    let mut world = World::online(1);
    let names: Vec<serde_json::Value> =
        (0..=REPLICAS_MAX).map(|n| replica(&format!("r{n}"), "http://h:1", 0, true, 1)).collect();
    let refused = world.beat(0, &beat(Some(1), Some(2), &names));
    assert!(matches!(refused, Err(Fenced::TooLarge { .. })), "{refused:?}");
    world.registry.limits.nodes_max = 1;
    assert_eq!(world.register(1, None, None), Err(Fenced::TooMany { what: "nodes", limit: 1 }));
    let twice = [idle(), replica("r0", "http://h:1", 7, true, 4)];
    world.beat(0, &beat(Some(1), Some(2), &twice)).expect("accepted");
    assert_eq!(world.registry.replicas().count(), 1, "a replica named twice is one");
}

#[derive(Clone, Debug)]
enum Step {
    Register { node: usize, newer: bool },
    Beat { node: usize, draining: bool, replicas: Vec<(u8, u8, bool, u32)> },
    Update { node: usize, replicas: Option<Vec<(u8, u8, bool, u32)>> },
    Deregister { node: usize, older: bool },
    Wait { ms: u64 },
    Place { slots: u32 },
    Acquire { pick: usize, slots: u32 },
    Release { pick: usize },
    Fail { pick: usize },
    Work { pick: usize },
    Restart { ms: u64 },
}

fn step() -> impl Strategy<Value = Step> {
    let replicas = proptest::collection::vec((0u8..3, 0u8..2, any::<bool>(), 0u32..6), 0..4);
    let update = replicas.clone();
    prop_oneof![
        2 => (0usize..4, any::<bool>()).prop_map(|(node, newer)| Step::Register { node, newer }),
        6 => (0usize..4, proptest::bool::weighted(0.1), replicas)
            .prop_map(|(node, draining, replicas)| Step::Beat { node, draining, replicas }),
        2 => (0usize..4, proptest::option::of(update)).prop_map(|(node, replicas)| Step::Update { node, replicas }),
        1 => (0usize..4, any::<bool>()).prop_map(|(node, older)| Step::Deregister { node, older }),
        3 => prop_oneof![0u64..300, 5_000u64..40_000].prop_map(|ms| Step::Wait { ms }),
        4 => (0u32..4).prop_map(|slots| Step::Place { slots }),
        2 => (any::<usize>(), 1u32..4).prop_map(|(pick, slots)| Step::Acquire { pick, slots }),
        3 => any::<usize>().prop_map(|pick| Step::Release { pick }),
        2 => any::<usize>().prop_map(|pick| Step::Fail { pick }),
        1 => any::<usize>().prop_map(|pick| Step::Work { pick }),
        1 => (0u64..40_000).prop_map(|ms| Step::Restart { ms }),
    ]
}

#[test]
fn what_a_node_says_of_one_pool_between_heartbeats_is_saved() {
    let mut world = World::new();
    world.register(0, Some(1), Some("boot")).expect("registered");
    let before = world.registry.revision();
    let mut pool = beat(None, None, &[]).pools.remove(0);
    pool.replicas = None;
    world.registry.update_pool(&id(0), &pool, world.now, &mut world.changes).expect("a known node");
    assert!(world.registry.revision() > before);
}

/// The best by the documented order, found the slow way.
fn best_by_hand(registry: &ServiceRegistry, ask: &Ask) -> Option<ReplicaRef> {
    let fitting = registry.replicas().filter(|(r, _)| fits(registry, *r, ask));
    let better = |(_, a): &(ReplicaRef, &Replica), (_, b): &(ReplicaRef, &Replica)| {
        let load = |r: &Replica| f64::from(r.in_flight + r.others) / f64::from(r.slots_total);
        load(a).total_cmp(&load(b)).then(b.vram_free_bytes.cmp(&a.vram_free_bytes))
    };
    // `min_by` keeps the first of equals, and replicas come by name.
    fitting.min_by(better).map(|(replica, _)| replica)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// Whatever nodes, requests, clocks and restarts do: the registry does not contradict itself, every slot
    /// is accounted for, only what takes work is chosen, and the deadline is never too late. When
    /// everybody beats again, everybody is Online and every idle replica takes work.
    #[test]
    fn holds_under_any_sequence(steps in proptest::collection::vec(step(), 1..120)) {
        let mut world = World::new();
        let mut state = StrategyState::new(1);
        let mut grants: Vec<Grant> = Vec::new();
        let (mut incarnations, mut seq) = ([1u64; 4], 0u64);
        let mut saved: Option<(u64, Vec<SavedNode>)> = None;
        let any_replica = |world: &World, pick: usize| {
            let all: Vec<_> = world.registry.replicas().map(|(r, _)| r).collect();
            (!all.is_empty()).then(|| all[pick % all.len()])
        };
        for step in steps {
            match step {
                Step::Register { node, newer } => {
                    incarnations[node] += u64::from(newer);
                    world.register(node, Some(incarnations[node]), Some("boot")).expect("never older, never a twin");
                }
                Step::Beat { node, draining, replicas } => {
                    seq += 1;
                    let replicas: Vec<_> = replicas.iter().map(|(name, generation, ready, free)| {
                        replica(&format!("r{name}"), "http://127.0.0.1:1", u64::from(*generation), *ready, *free)
                    }).collect();
                    let mut beat = beat(Some(incarnations[node]), Some(seq), &replicas);
                    beat.draining = draining;
                    let known = world.registry.node(&id(node)).map(|n| n.incarnation);
                    let reply = world.beat(node, &beat);
                    prop_assert_eq!(reply.is_ok(), known.is_some(), "{:?}", reply);
                }
                Step::Update { node, replicas } => {
                    let listed = |(name, generation, ready, free): &(u8, u8, bool, u32)| {
                        replica(&format!("r{name}"), "http://127.0.0.1:1", u64::from(*generation), *ready, *free)
                    };
                    let list: Option<Vec<_>> = replicas.as_ref().map(|list| list.iter().map(listed).collect());
                    let mut pool = beat(None, None, list.as_deref().unwrap_or_default()).pools.remove(0);
                    pool.replicas = pool.replicas.filter(|_| list.is_some());
                    let before = world.registry.node(&id(node)).map(|n| (n.status, n.last_contact));
                    let done = world.registry.update_pool(&id(node), &pool, world.now, &mut world.changes);
                    prop_assert_eq!(done.is_ok(), before.is_some(), "{:?}", done);
                    let after = world.registry.node(&id(node)).map(|n| (n.status, n.last_contact));
                    prop_assert_eq!(before, after, "it is no sign of life");
                }
                Step::Deregister { node, older } => {
                    let incarnation = incarnations[node] - u64::from(older);
                    let known = world.registry.node(&id(node)).is_some();
                    let gone = world.registry.deregister(&id(node), Some(incarnation), world.now, &mut world.changes).is_ok();
                    prop_assert_eq!(gone, known && !older);
                    // Who has left comes back as another start.
                    incarnations[node] += u64::from(gone);
                }
                Step::Wait { ms } => {
                    let until = world.now.plus_ms(ms);
                    // A held expiry may also end early, because heartbeats came.
                    if let Some(due) = world.registry.deadline() && world.registry.hold.is_none() && due > world.now.mono.plus_ms(1) {
                        let early = Mono(due.0 - 1).min(until.mono);
                        let before = world.changes.len();
                        world.registry.expire(Now { mono: early, wall: until.wall }, &mut world.changes);
                        let early: Vec<_> = world.changes[before..].iter().filter(|c| **c != Change::ExpiryResumed).collect();
                        prop_assert!(early.is_empty(), "before its deadline: {early:?}");
                    }
                    world.pass(ms);
                }
                Step::Place { slots } => {
                    let ask = Ask { model: Some("m".into()), slots, ..Ask::default() };
                    let expected = best_by_hand(&world.registry, &ask);
                    let found = choose(&world.registry, &ask, &[], Placement::LeastLoaded, &mut state);
                    let Choice::Replica { replica, slots } = found.choice else {
                        prop_assert_eq!(expected, None);
                        continue;
                    };
                    prop_assert_eq!(Some(replica), expected);
                    let chosen = world.registry.replica(replica).expect("it exists");
                    prop_assert!(chosen.obstacle().is_none() && chosen.slots_free() >= slots);
                    prop_assert!(world.registry.node(&chosen.node).expect("its node exists").status.takes_work());
                    grants.push(world.registry.acquire(replica, slots).expect("what is chosen can be had"));
                }
                Step::Acquire { pick, slots } => {
                    if let Some(replica) = any_replica(&world, pick) {
                        let known = world.registry.replica(replica).expect("it exists");
                        let may = known.obstacle().is_none() && known.slots_free() >= slots;
                        let grant = world.registry.acquire(replica, slots);
                        prop_assert_eq!(grant.is_some(), may);
                        grants.extend(grant);
                    }
                }
                Step::Release { pick } => {
                    if !grants.is_empty() {
                        let grant = grants.swap_remove(pick % grants.len());
                        world.registry.release(grant);
                    }
                }
                Step::Fail { pick } => {
                    if let Some(replica) = any_replica(&world, pick) {
                        world.registry.data_path_failed(replica, "refused", world.now, &mut world.changes);
                        prop_assert!(world.registry.replica(replica).expect("it exists").obstacle().is_some());
                    }
                }
                Step::Work { pick } => {
                    if let Some(replica) = any_replica(&world, pick) {
                        world.registry.data_path_worked(replica, world.now, &mut world.changes);
                    }
                }
                Step::Restart { ms } => {
                    world = world.restarted(ms);
                    grants.clear();
                    state = StrategyState::new(1);
                }
            }
            world.registry.check_invariants();
            // What is saved does not change behind the revision's back.
            let kept = (world.registry.revision(), worth_saving(&world.registry));
            if let Some((revision, before)) = &saved && *revision == kept.0 {
                prop_assert_eq!(before, &kept.1);
            }
            saved = Some(kept);
            for (reference, replica) in world.registry.replicas() {
                let held: u32 = grants.iter().filter(|g| g.replica() == reference).map(Grant::slots).sum();
                prop_assert_eq!(replica.in_flight, held, "{} {}", replica.node, replica.key);
            }
        }
        for grant in grants.drain(..) {
            world.registry.release(grant);
        }
        world.pass(BACKOFF_MAX_MS);
        for (node, incarnation) in incarnations.iter().enumerate() {
            world.register(node, Some(*incarnation), Some("boot")).expect("registered");
            for _ in 0..2 {
                seq += 1;
                world.beat(node, &beat(Some(*incarnation), Some(seq), &[idle()])).expect("accepted");
            }
            prop_assert_eq!(world.status(node), Some(NodeStatus::Online));
            let replica = world.registry.replica(world.only_replica(node)).expect("it exists");
            prop_assert_eq!((replica.obstacle(), replica.slots_free()), (None, 4));
        }
    }
}

#[test]
fn whoever_never_beats_makes_room_for_others_the_oldest_first() {
    let mut world = World::new();
    world.registry.limits.nodes_max = 4;
    world.register(0, Some(1), Some("boot")).expect("registered");
    world.beat(0, &beat(Some(1), Some(1), &[idle()])).expect("it is real");
    for n in 1..=9 {
        world.register(n, Some(1), None).expect("there is always room");
        world.registry.check_invariants();
    }
    let known: Vec<usize> = (0..10).filter(|n| world.status(*n).is_some()).collect();
    assert_eq!(known, [0, 7, 8, 9]);
    let gone = world.changes.iter().filter(|c| matches!(c, Change::NodeGone { .. })).count();
    assert_eq!(gone, 6, "each is told");
    // Who has to go hears of it, and comes again.
    assert_eq!(world.beat(1, &beat(Some(1), Some(1), &[idle()])), Err(Fenced::UnknownNode));
    world.register(1, Some(1), None).expect("again");
    world.beat(1, &beat(Some(1), Some(1), &[idle()])).expect("accepted");
    for n in [8, 9] {
        world.beat(n, &beat(Some(1), Some(1), &[idle()])).expect("accepted");
    }
    // All are alive: nobody makes room.
    assert_eq!(world.register(5, Some(1), None), Err(Fenced::TooMany { what: "nodes", limit: 4 }));
    // The one that is offline does.
    for _ in 0..5 {
        world.pass(10_000);
        for n in [0, 1, 8] {
            world.beat(n, &beat(Some(1), None, &[idle()])).expect("accepted");
        }
    }
    assert_eq!(world.status(9), Some(NodeStatus::Offline));
    world.register(5, Some(1), None).expect("room");
    assert_eq!(world.status(9), None);
    world.registry.check_invariants();
}

#[test]
fn no_peer_has_more_newcomers_than_it_may() {
    let mut world = World::new();
    let register = |world: &mut World, n: usize, peer: &str| {
        let request = registration(n, Some(1), None);
        world.registry.register(&request, peer, world.now, &mut world.changes).expect("registered");
        world.changes.clear();
    };
    register(&mut world, 0, "10.0.0.8");
    for n in 1..=NEWCOMERS_PER_PEER_MAX + 500 {
        register(&mut world, n, PEER);
    }
    assert_eq!(world.registry.nodes_len(), NEWCOMERS_PER_PEER_MAX + 1);
    assert!(world.status(0).is_some(), "another peer's");
    assert!(world.status(500).is_none() && world.status(501).is_some(), "the oldest went");
    // A first heartbeat ends the newcomer, and its place is free for another one of that peer.
    world.beat(501, &beat(Some(1), Some(1), &[idle()])).expect("accepted");
    register(&mut world, 9_999, PEER);
    assert!(world.status(501).is_some() && world.status(502).is_some());
    world.registry.check_invariants();
}

#[test]
fn names_that_nobody_stands_behind_keep_no_dead_node_alive() {
    let mut world = World::online(4);
    for n in 10..30 {
        world.register(n, Some(1), None).expect("registered");
    }
    world.pass(20_000);
    for n in 1..4 {
        world.beat(n, &beat(Some(1), Some(2), &[idle()])).expect("accepted");
    }
    world.pass(10_000);
    assert_eq!(world.status(0), Some(NodeStatus::Suspect), "twenty silent names are no silent majority");
    assert_eq!((world.status(1), world.status(10)), (Some(NodeStatus::Online), Some(NodeStatus::Suspect)));
    assert!(!world.changes.iter().any(|c| matches!(c, Change::ExpiryHeld { .. })));
}

#[test]
fn an_agent_out_of_reach_takes_what_stands_behind_it_along() {
    let mut world = World::online(2);
    let behind = [idle(), replica("r1", "http://127.0.0.1:8081", 1, true, 4)];
    let all = [&behind[..], &[replica("r2", "http://10.0.0.9:8080", 1, true, 4)]].concat();
    world.beat(0, &beat(Some(1), Some(2), &all)).expect("accepted");
    let node = world.registry.node(&id(0)).expect("known");
    let replicas: Vec<ReplicaRef> = world.registry.replicas_of(node).collect();
    world.registry.agent_failed(replicas[0], "connection refused", world.now, &mut world.changes);
    world.registry.check_invariants();
    let routable: Vec<bool> = replicas.iter().map(|replica| world.takes_work(*replica)).collect();
    assert_eq!(routable, [false, false, true], "the third is dialled directly");
    assert!(world.takes_work(world.only_replica(1)), "another node's");
    world.pass(BACKOFF_FIRST_MS);
    assert!(replicas.iter().all(|replica| world.takes_work(*replica)), "each is tried again");
}

#[test]
fn of_two_agents_with_one_boot_the_later_start_has_the_name_and_it_is_said_once() {
    let mut world = World::online(1);
    let mut elsewhere = registration(0, Some(2), Some("boot"));
    elsewhere.address = BaseUrl::new("http://n0:9300").expect("a URL");
    world.registry.register(&elsewhere, PEER, world.now, &mut world.changes).expect("it started later");
    world.changes.clear();
    for _ in 0..3 {
        assert_eq!(world.register(0, Some(1), Some("boot")), Err(Fenced::OldIncarnation { known: 2 }));
    }
    let twins: Vec<&Change> =
        world.changes.iter().filter(|c| matches!(c, Change::TwinRefused { .. })).collect();
    assert!(
        matches!(twins[..], [Change::TwinRefused { peer, holder, .. }]
            if peer == "http://n0:9200" && holder == "http://n0:9300"),
        "{twins:?}"
    );
    // From the same address it is a late message, and no news.
    world.changes.clear();
    elsewhere.incarnation = Some(1);
    assert!(world.registry.register(&elsewhere, PEER, world.now, &mut world.changes).is_err());
    assert_eq!(world.changes, []);
}

/// What is saved, but for what may change with every heartbeat.
fn worth_saving(registry: &ServiceRegistry) -> Vec<SavedNode> {
    let mut nodes = registry.saved(Wall(0)).nodes;
    for node in &mut nodes {
        node.heard_ms = None;
        node.node.pools.iter_mut().for_each(|pool| pool.vram_free_bytes = 0);
        node.node.replicas.iter_mut().for_each(|replica| replica.vram_free_bytes = 0);
    }
    nodes
}
