//! The registry over a restart of the control plane: what comes back, what is made of it, and what the
//! first words of nodes then mean.

use super::*;
use crate::orchestratord::saved::Saved;

/// Seconds for which the control plane is away, in most of these tests.
const AWAY_MS: u64 = 5_000;

impl World {
    /// The same world after the control plane was away for so long: what was in flight is gone, what
    /// was saved is read from its text.
    pub(super) fn restarted(&self, away_ms: u64) -> World {
        let text = self.registry.saved(self.now.wall).text();
        // A monotonic clock may begin anew with the machine.
        let now = Now { mono: Mono(7), wall: self.now.plus_ms(away_ms).wall };
        let mut world = World { now, ..World::new() };
        let saved = Saved::read(&text, &Limits::default(), now.wall).expect("it was just written");
        world.registry.restore(&saved, now, &mut world.changes);
        world.registry.check_invariants();
        world
    }

    fn circuit(&self, replica: ReplicaRef) -> Circuit {
        self.registry.replica(replica).expect("known").circuit.clone()
    }

    fn confirmation(&self, n: usize) -> Confirmation {
        self.registry.replica(self.only_replica(n)).expect("known").confirmation
    }
}

#[test]
fn a_restored_node_gets_one_request_at_once_and_more_when_it_has_answered() {
    let mut world = World::online(2).restarted(AWAY_MS);
    assert_eq!(world.changes, [Change::Restored { nodes: 2, replicas: 2 }], "told in one sentence");
    let node = world.registry.node(&id(0)).expect("known");
    assert!(node.restored && node.status == NodeStatus::Registering, "{node:?}");
    assert!(node.reason.starts_with("restored from the state file"), "{}", node.reason);
    assert_eq!(node.lease_left_ms(world.now), Some(30_000), "a whole lease from the start on");

    let replica = world.only_replica(0);
    assert_eq!(world.confirmation(0), Confirmation::Restored);
    let grant = world.registry.acquire(replica, 1).expect("placed before anything was heard");
    assert!(world.registry.acquire(replica, 1).is_none(), "a second one while the first has no answer");
    let why = world.registry.replica(replica).expect("known").obstacle().expect("one request tries it");
    assert!(why.to_string().contains("restart of the control plane"), "{why}");
    world.registry.data_path_worked(replica, world.now, &mut world.changes);
    assert_eq!(world.circuit(replica), Circuit::Closed);
    let second = world.registry.acquire(replica, 3).expect("it answers");
    for grant in [grant, second] {
        world.registry.release(grant);
    }
    world.registry.check_invariants();
}

#[test]
fn a_restored_node_that_does_not_answer_is_out_after_one_failure() {
    let mut world = World::online(1).restarted(AWAY_MS);
    let replica = world.only_replica(0);
    let grant = world.registry.acquire(replica, 1).expect("it may be there");
    world.registry.data_path_failed(replica, "connection refused", world.now, &mut world.changes);
    world.registry.release(grant);
    assert!(!world.takes_work(replica));
    world.pass(BACKOFF_FIRST_MS);
    // A heartbeat does not settle what the data path has seen with its own eyes.
    world.beat(0, &beat(Some(1), Some(2), &[idle()])).expect("accepted");
    assert!(matches!(world.circuit(replica), Circuit::HalfOpen { failures: 1, .. }));
}

#[test]
fn the_first_heartbeat_of_the_same_incarnation_is_taken_whatever_its_number() {
    for seq in [1, 900] {
        let mut world = World::online(1).restarted(AWAY_MS);
        let replica = world.only_replica(0);
        world.changes.clear();
        world.beat(0, &beat(Some(1), Some(seq), &[idle()])).expect("nobody has to register anew");
        let node = world.registry.node(&id(0)).expect("known");
        assert!(!node.restored && node.status == NodeStatus::Online);
        assert_eq!((world.confirmation(0), world.circuit(replica)), (Confirmation::Beaten, Circuit::Closed));
        assert_eq!(world.only_replica(0), replica, "the same engine, the same ledger");
        assert_eq!(world.beat(0, &beat(Some(1), Some(seq), &[])), Err(Fenced::OldSequence { known: seq }));
    }
}

#[test]
fn a_heartbeat_that_says_not_ready_leaves_the_doubt_until_one_says_ready() {
    let mut world = World::online(1).restarted(AWAY_MS);
    let replica = world.only_replica(0);
    let unready = super::replica("r0", "http://127.0.0.1:8080", 1, false, 0);
    world.beat(0, &beat(Some(1), Some(2), &[unready])).expect("accepted");
    assert!(!world.takes_work(replica));
    world.beat(0, &beat(Some(1), Some(3), &[idle()])).expect("accepted");
    assert_eq!(world.circuit(replica), Circuit::Closed);
}

#[test]
fn an_older_incarnation_is_fenced_and_a_newer_one_registers() {
    let mut world = World::new();
    world.register(0, Some(5), Some("boot")).expect("registered");
    world.beat(0, &beat(Some(5), Some(1), &[idle()])).expect("accepted");
    let mut world = world.restarted(AWAY_MS);
    let replica = world.only_replica(0);
    let fenced = Err(Fenced::OldIncarnation { known: 5 });
    assert_eq!(world.beat(0, &beat(Some(4), Some(9), &[])), fenced);
    assert_eq!(world.register(0, Some(4), Some("boot")), Err(Fenced::OldIncarnation { known: 5 }));
    assert!(world.takes_work(replica), "a refused message changes nothing");
    assert_eq!(world.beat(0, &beat(Some(6), Some(1), &[])), Err(Fenced::UnknownNode));
    world.register(0, Some(6), Some("boot")).expect("registered");
    assert_eq!(world.confirmation(0), Confirmation::Doubted);
    assert!(!world.takes_work(replica), "the new agent has not said what it has");
    world.registry.check_invariants();
    // Nor does another restart turn the doubt into work.
    let world = world.restarted(AWAY_MS);
    assert!(!world.takes_work(world.only_replica(0)));
}

#[test]
fn a_machine_that_rebooted_meanwhile_registers_at_once() {
    let mut world = World::online(1).restarted(AWAY_MS);
    world.register(0, Some(2), Some("next boot")).expect("nobody here has heard of the first boot");
    assert_eq!(world.register(0, Some(3), Some("boot")), Err(Fenced::Twin { holder: PEER.into() }));
}

#[test]
fn a_restored_node_that_is_never_heard_of_ends_as_any_other() {
    let mut world = World::online(1).restarted(AWAY_MS);
    let replica = world.only_replica(0);
    let mut seen = Vec::new();
    while let Some(status) = world.status(0) {
        seen.push(status);
        let due = world.registry.deadline().expect("something is due");
        world.pass(due.ns_since(world.now.mono).div_ceil(1_000_000));
        assert!(!world.takes_work(replica));
    }
    use NodeStatus::{Offline, Registering, Suspect};
    assert_eq!(seen, [Registering, Suspect, Offline]);
    // Of many, most of which are never heard of, none ends before the hold does.
    let mut world = World::online(4).restarted(AWAY_MS);
    world.pass(31_000);
    assert_eq!(world.status(3), Some(Registering));
    assert!(world.changes.iter().any(|change| matches!(change, Change::ExpiryHeld { .. })));
}

#[test]
fn who_was_silent_draining_or_forgotten_comes_back_so() {
    let mut world = World::online(3);
    world.pass(20_000);
    world.beat(1, &beat(Some(1), Some(2), &[idle()])).expect("accepted");
    let mut draining = beat(Some(1), Some(2), &[idle()]);
    draining.draining = true;
    world.beat(2, &draining).expect("accepted");
    world.pass(10_000);
    let before: Vec<_> = (0..3).map(|n| world.status(n)).collect();
    use NodeStatus::{Draining, Online, Registering, Suspect};
    assert_eq!(before, [Some(Suspect), Some(Online), Some(Draining)]);

    let mut again = world.restarted(AWAY_MS);
    let after: Vec<_> = (0..3).map(|n| again.status(n)).collect();
    assert_eq!(after, [Some(Suspect), Some(Registering), Some(Draining)]);
    let takes: Vec<_> = (0..3).map(|n| again.takes_work(again.only_replica(n))).collect();
    assert_eq!(takes, [false, true, false]);
    again.beat(0, &beat(Some(1), Some(9), &[idle()])).expect("back again");
    assert!(again.takes_work(again.only_replica(0)));

    // Restarts do not keep alive for ever who has long been gone.
    let forget_ms = Limits::default().forget_ms;
    let again = world.restarted(forget_ms - 30_000);
    assert_eq!(again.status(0), Some(Suspect));
    let again = world.restarted(forget_ms - 29_999);
    assert_eq!((again.status(0), again.registry.nodes_len()), (None, 2));
}

#[test]
fn what_was_saved_long_ago_gets_no_work_before_it_is_heard() {
    for (away_ms, takes) in [(TRUST_MS, true), (TRUST_MS + 1, false)] {
        let mut world = World::online(1).restarted(away_ms);
        let replica = world.only_replica(0);
        assert_eq!(world.takes_work(replica), takes, "{away_ms}");
        world.beat(0, &beat(Some(1), Some(2), &[idle()])).expect("accepted");
        assert!(world.takes_work(replica));
    }
}

#[test]
fn a_pool_without_a_list_is_asked_for_again() {
    let bare = || -> Heartbeat {
        let body = serde_json::json!({"pools": [{"pool_id": "pool-0", "ready": true, "slots_free": 4}]});
        serde_json::from_value(body).expect("a heartbeat")
    };
    let status: ReplicaStatus = serde_json::from_value(serde_json::json!({
        "replica_id": "r0", "url": "http://127.0.0.1:8080", "state": "ready", "ready": true, "slots_free": 4,
        "slots_total": 4, "generation": 0, "draining": false, "reason": "", "since_ms": 0,
    }))
    .expect("a status");
    let asks = |world: &World| world.changes.iter().filter(|c| matches!(c, Change::AskNode { .. })).count();
    let pool = PoolId::new("pool-0").expect("an id");
    let mut world = World::new();
    world.register(0, None, None).expect("registered");
    world.beat(0, &bare()).expect("accepted");
    let unasked = world.restarted(AWAY_MS);
    assert!(!unasked.takes_work(unasked.only_replica(0)), "no address was known");
    world.registry.set_engine_url(&id(0), &pool, &[status], world.now, &mut world.changes);

    let mut world = world.restarted(AWAY_MS);
    let replica = world.only_replica(0);
    assert!(world.takes_work(replica));
    world.registry.data_path_worked(replica, world.now, &mut world.changes);
    world.beat(0, &bare()).expect("accepted");
    assert_eq!(asks(&world), 1, "even if it answers: another one may stand there by now");
    world.beat(0, &bare()).expect("accepted");
    assert_eq!(asks(&world), 1);
}

#[test]
fn only_what_is_saved_is_worth_a_save() {
    let mut world = World::new();
    let moved = |world: &World, before: &mut u64| {
        let now = world.registry.revision();
        std::mem::replace(before, now) != now
    };
    let local = beat(None, None, &[idle()]);
    let home = NodeId::new("home").expect("an id");
    world.registry.set_local(&home, &local.pools, world.now, &mut world.changes).expect("taken");
    let mut seen = 0;
    assert!(!moved(&world, &mut seen), "this machine's own engines are found again without help");
    assert!(world.registry.saved(world.now.wall).nodes.is_empty());

    world.register(0, Some(1), Some("boot")).expect("registered");
    assert!(moved(&world, &mut seen), "a registration");
    let r = |generation, ready, free| super::replica("r0", "http://127.0.0.1:8080", generation, ready, free);
    let other_port = super::replica("r0", "http://127.0.0.1:8081", 2, true, 4);
    let steps = [
        ("a replica", true, vec![r(1, true, 4)]),
        ("a plain heartbeat", false, vec![r(1, true, 4)]),
        ("other load", false, vec![r(1, true, 1)]),
        ("not ready", true, vec![r(1, false, 4)]),
        ("ready", true, vec![r(1, true, 4)]),
        ("another generation", true, vec![r(2, true, 4)]),
        ("another port", true, vec![other_port]),
        ("no replica", true, vec![]),
    ];
    for (seq, (what, expected, replicas)) in (1..).zip(steps) {
        world.now = world.now.plus_ms(1_000);
        world.beat(0, &beat(Some(1), Some(seq), &replicas)).expect("accepted");
        assert_eq!(moved(&world, &mut seen), expected, "{what}");
    }
    let mut draining = beat(Some(1), Some(50), &[]);
    draining.draining = true;
    for (seq, expected) in [(50, true), (51, false)] {
        draining.seq = Some(seq);
        world.beat(0, &draining).expect("accepted");
        assert_eq!(moved(&world, &mut seen), expected, "draining");
    }
    world.pass(30_000);
    assert!(moved(&world, &mut seen), "silent");
    world.pass(10_000);
    assert_eq!(world.status(0), Some(NodeStatus::Offline));
    assert!(!moved(&world, &mut seen), "still silent");
    world.pass(Limits::default().forget_ms);
    assert!(world.status(0).is_none() && moved(&world, &mut seen), "forgotten");
    world.register(0, Some(2), None).expect("registered");
    world.registry.deregister(&id(0), None, world.now, &mut world.changes).expect("known");
    moved(&world, &mut seen);
    world.registry.deregister(&id(0), None, world.now, &mut world.changes).expect_err("unknown");
    assert!(!moved(&world, &mut seen));
}

/// What people and placement see of a registry, but for what a restart is meant to change.
fn seen(registry: &ServiceRegistry) -> Vec<String> {
    let nodes = registry.nodes().map(|n| {
        let capabilities = serde_json::to_string(&n.capabilities).expect("text");
        let standing = standing(n.status);
        let pools: Vec<_> =
            n.pools.iter().map(|p| (&p.pool_id, p.ready, p.draining, p.slots_total)).collect();
        format!(
            "{} {} {:?} {:?} {capabilities} {:?} {:?} {standing:?} {pools:?} {:?}",
            n.id, n.machine_id, n.address, n.version, n.incarnation, n.boot_id, n.last_heartbeat_at
        )
    });
    let replicas = registry.replicas().map(|(_, r)| {
        format!(
            "{} {} {} {:?} {} {} {} {:?} {:?} {:?} {:?} {}",
            r.node,
            r.key,
            r.generation,
            r.target,
            r.ready,
            r.draining,
            r.slots_total,
            r.models,
            r.engine,
            r.engine_version,
            r.device_mask,
            r.confirmation == Confirmation::Doubted
        )
    });
    nodes.chain(replicas).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    /// Whatever nodes did before: what was saved is what comes back, fences included, and saving it
    /// again gives the same text.
    #[test]
    fn what_is_restored_is_what_was(steps in proptest::collection::vec(step(), 1..40), away_ms in 0u64..TRUST_MS) {
        let mut world = World::new();
        let (mut incarnations, mut seq) = ([1u64; 4], 0);
        for step in steps {
            match step {
                Step::Register { node, newer } => {
                    incarnations[node] += u64::from(newer);
                    let _ = world.register(node, Some(incarnations[node]), Some("boot"));
                }
                Step::Beat { node, draining, replicas } => {
                    seq += 1;
                    let replicas: Vec<_> = replicas.iter().map(|(name, generation, ready, free)| {
                        super::replica(&format!("r{name}"), "http://127.0.0.1:1", u64::from(*generation), *ready, *free)
                    }).collect();
                    let mut beat = beat(Some(incarnations[node]), Some(seq), &replicas);
                    beat.draining = draining;
                    let _ = world.beat(node, &beat);
                }
                Step::Deregister { node, .. } => {
                    let _ = world.registry.deregister(&id(node), None, world.now, &mut world.changes);
                }
                Step::Wait { ms } => world.pass(ms),
                _ => {}
            }
        }
        let mut again = world.restarted(away_ms);
        prop_assert_eq!(seen(&world.registry), seen(&again.registry));
        let at = world.now.wall;
        prop_assert_eq!(world.registry.saved(at).text(), again.registry.saved(at).text());
        for (_, replica) in again.registry.replicas() {
            let before = world.registry.replicas().find(|(_, old)| old.node == replica.node && old.key == replica.key);
            let took = before.expect("it was there").1.obstacle().is_none();
            prop_assert_eq!(replica.obstacle().is_none(), took, "{} {}", replica.node, replica.key);
        }
        for (n, incarnation) in incarnations.into_iter().enumerate() {
            let Some(known) = again.registry.node(&id(n)) else { continue };
            let registered = known.incarnation.expect("registered with one");
            let older = again.beat(n, &beat(Some(registered - 1), None, &[]));
            prop_assert_eq!(older, Err(Fenced::OldIncarnation { known: registered }));
            let newer = again.beat(n, &beat(Some(registered + 1), None, &[]));
            prop_assert_eq!(newer, Err(Fenced::UnknownNode));
            if incarnation == registered {
                again.beat(n, &beat(Some(registered), Some(1), &[idle()])).expect("the same start");
                prop_assert_eq!(again.status(n), Some(NodeStatus::Online));
            }
        }
    }
}
