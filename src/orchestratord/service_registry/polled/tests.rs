//! Polls beside heartbeats: whichever way a fact comes, and in which order, the registry is the same.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::super::{Grant, Limits, Replica, ReplicaRef, Target};
use super::*;
use crate::wire::node::{Heartbeat, RegisterRequest};

/// Later than the third heartbeat in a row would have come.
const LATE_MS: u64 = 15_000;

struct World {
    registry: ServiceRegistry,
    now: Now,
    seq: u64,
    changes: Vec<Change>,
}

fn url(text: &str) -> BaseUrl {
    BaseUrl::new(text).expect("a URL")
}

fn agent() -> BaseUrl {
    url("http://10.0.0.1:9200")
}

fn id() -> NodeId {
    NodeId::new("n").expect("an id")
}

/// A replica, as heartbeats and reports alike spell it.
fn replica(name: &str, engine: &str, ready: bool) -> Value {
    json!({"replica_id": name, "url": engine, "ready": ready, "draining": false, "slots_total": 4,
        "slots_free": 3, "generation": 7, "models": ["m"], "engine": "llamacpp", "device_mask": "0",
        "state": if ready { "ready" } else { "probing" }, "reason": if ready { "it answers" } else { "refused" },
        "since_ms": 1})
}

fn pools(replicas: &[Value]) -> Value {
    json!([{"pool_id": "pool-0", "ready": true, "slots_total": 8, "slots_free": 6, "vram_free_bytes": 5,
        "engine": "llamacpp", "models_available": ["m"], "replicas": replicas}])
}

fn report(incarnation: u64, boot: &str, replicas: &[Value]) -> AgentReport {
    let body = json!({"node_id": "n", "machine_id": "m", "incarnation": incarnation, "boot_id": boot,
        "version": "1", "pools": pools(replicas)});
    serde_json::from_value(body).expect("a report")
}

fn registration(incarnation: u64, boot: &str) -> RegisterRequest {
    let body =
        json!({"node_id": "n", "address": "http://node:9200", "incarnation": incarnation, "boot_id": boot});
    serde_json::from_value(body).expect("a registration")
}

impl World {
    fn new() -> World {
        World {
            registry: ServiceRegistry::new(Limits::default(), 9),
            now: Now::default().plus_ms(1_000),
            seq: 0,
            changes: Vec::new(),
        }
    }

    fn poll_at(&mut self, at: &BaseUrl, report: &AgentReport) -> Result<Polled, Fenced> {
        self.pass(1);
        let sent = self.now.mono;
        self.pass(1);
        self.answer(at, report, sent)
    }

    fn answer(&mut self, at: &BaseUrl, report: &AgentReport, sent: Mono) -> Result<Polled, Fenced> {
        let polled = self.registry.polled(report, at, sent, self.now, &mut self.changes);
        self.registry.check_invariants();
        polled
    }

    fn poll(&mut self, replicas: &[Value]) -> Result<Polled, Fenced> {
        self.poll_at(&agent(), &report(1, "boot", replicas))
    }

    fn register(&mut self, incarnation: u64, boot: &str) -> Result<(), Fenced> {
        let request = registration(incarnation, boot);
        self.registry.register(&request, "10.0.0.1", self.now, &mut self.changes).map(|_| ())
    }

    fn beat(&mut self, replicas: &[Value]) -> Result<(), Fenced> {
        self.seq += 1;
        // Heartbeats give a reason for what is not ready only.
        let mut replicas = replicas.to_vec();
        for replica in replicas.iter_mut().filter(|replica| replica["ready"] == true) {
            replica["reason"] = Value::Null;
        }
        let body = json!({"incarnation": 1, "seq": self.seq, "pools": pools(&replicas)});
        let beat: Heartbeat = serde_json::from_value(body).expect("a heartbeat");
        let done = self.registry.heartbeat(&id(), &beat, "10.0.0.1", self.now, &mut self.changes);
        self.registry.check_invariants();
        done.map(|_| ())
    }

    fn pass(&mut self, ms: u64) {
        self.now = self.now.plus_ms(ms);
        self.registry.expire(self.now, &mut self.changes);
        self.registry.check_invariants();
    }

    fn node(&self) -> &Node {
        self.registry.node(&id()).expect("known")
    }

    fn replicas(&self) -> Vec<(ReplicaRef, &Replica)> {
        self.registry.replicas().collect()
    }

    /// What requests would meet, of every replica.
    fn seen(&self) -> String {
        let shown = |(_, r): &(ReplicaRef, &Replica)| {
            let target = r.target.engine().map(ToString::to_string);
            json!([
                r.key.to_string(),
                target,
                r.generation,
                r.ready,
                r.draining,
                r.slots_total,
                r.slots_free(),
                r.models.as_ref(),
                r.engine,
                r.device_mask,
                r.vram_free_bytes,
                r.reason,
                r.obstacle().map(|why| why.to_string())
            ])
            .to_string()
        };
        self.replicas().iter().map(shown).collect::<Vec<_>>().join("\n")
    }
}

fn one() -> Vec<Value> {
    vec![replica("r0", "http://127.0.0.1:8080", true)]
}

fn two() -> Vec<Value> {
    vec![replica("r0", "http://127.0.0.1:8080", true), replica("r1", "http://10.0.0.1:8081", false)]
}

#[test]
fn a_node_that_only_answers_polls_is_served_and_lapses_like_any_other() {
    let mut world = World::new();
    assert_eq!(world.poll(&two()), Ok(Polled::Taken));
    let node = world.node();
    assert_eq!((node.status, node.via(), node.machine_id.as_str()), (NodeStatus::Online, Via::Poll, "m"));
    let targets: Vec<Target> = world.replicas().into_iter().map(|(_, r)| r.target.clone()).collect();
    let hidden = Target::Relay { agent: agent(), engine: url("http://127.0.0.1:8080") };
    assert_eq!(targets, [hidden, Target::Direct(url("http://10.0.0.1:8081"))]);
    for _ in 0..20 {
        world.pass(20_000);
        assert_eq!(world.poll(&two()), Ok(Polled::Taken));
        assert_eq!(world.node().status, NodeStatus::Online, "every answer renews its lease");
    }
    world.pass(30_000);
    assert_eq!(world.node().status, NodeStatus::Suspect);
    assert!(world.node().reason.contains("no answer to polls for 30 s"), "{}", world.node().reason);
    world.pass(10_000);
    assert_eq!(world.node().status, NodeStatus::Offline);
    assert_eq!(world.poll(&one()), Ok(Polled::Taken));
    assert_eq!((world.node().status, world.replicas().len()), (NodeStatus::Online, 1));
}

#[test]
fn a_lease_outlasts_missed_polls_however_long_their_interval() {
    let mut world = World::new();
    let limits = Limits { poll_interval_ms: 60_000, ..Limits::default() };
    world.registry = ServiceRegistry::new(limits, 9);
    world.poll(&one()).expect("taken");
    world.pass(179_000);
    assert_eq!(world.node().status, NodeStatus::Online);
    world.pass(2_000);
    assert_eq!(world.node().status, NodeStatus::Suspect);
    // One that registers is held to the ordinary time again.
    world.register(1, "boot").expect("registered");
    world.beat(&one()).expect("accepted");
    world.pass(30_000);
    assert_eq!(world.node().status, NodeStatus::Suspect);
}

#[test]
fn heartbeats_win_while_they_arrive_and_polls_take_over_when_they_stop() {
    let mut world = World::new();
    world.register(1, "boot").expect("registered");
    world.beat(&two()).expect("accepted");
    world.pass(LATE_MS - 10);
    assert!(world.registry.beats(&id(), world.now));
    assert_eq!(world.poll(&one()), Ok(Polled::Heartbeats));
    assert_eq!((world.replicas().len(), world.node().via()), (2, Via::Heartbeat));
    world.pass(10);
    assert!(!world.registry.beats(&id(), world.now));
    assert_eq!(world.poll(&one()), Ok(Polled::Taken));
    let node = world.node();
    assert_eq!((node.via(), node.status), (Via::Poll, NodeStatus::Online), "never suspect in between");
    // Where it said that it is reached still counts.
    assert_eq!(node.address, Some(url("http://node:9200")));
    assert_eq!(world.poll(&one()), Ok(Polled::Taken), "that does not make it another node");
    world.beat(&two()).expect("the same start of the same agent");
    assert_eq!((world.replicas().len(), world.node().via()), (2, Via::Heartbeat));
    assert_eq!(world.poll(&one()), Ok(Polled::Heartbeats));
}

#[test]
fn an_answer_to_a_poll_that_something_newer_overtook_changes_nothing() {
    let mut world = World::new();
    let sent = world.now.mono;
    world.pass(5);
    world.register(2, "boot").expect("registered");
    world.pass(20_000);
    world.changes.clear();
    assert_eq!(world.answer(&agent(), &report(1, "boot", &one()), sent), Ok(Polled::Stale));
    assert_eq!(world.answer(&agent(), &report(2, "other", &one()), sent), Ok(Polled::Stale));
    assert!(world.changes.is_empty() && world.replicas().is_empty(), "{:?}", world.changes);
    // Sent later, and from an earlier start all the same: a proxy's answer, say.
    assert_eq!(world.poll(&one()), Err(Fenced::OldIncarnation { known: 2 }));
    assert_eq!(world.poll_at(&agent(), &report(3, "boot", &one())), Ok(Polled::Taken));
    assert_eq!(world.beat(&one()), Err(Fenced::OldIncarnation { known: 3 }));
}

#[test]
fn who_left_is_not_brought_back_by_its_last_answer() {
    let mut world = World::new();
    world.register(1, "boot").expect("registered");
    world.registry.deregister(&id(), Some(1), world.now, &mut world.changes).expect("it leaves");
    assert_eq!(world.poll(&one()), Err(Fenced::Departed));
    assert_eq!(world.registry.nodes_len(), 0);
    assert_eq!(world.poll_at(&agent(), &report(2, "boot", &one())), Ok(Polled::Taken), "its next start");
}

#[test]
fn a_node_that_was_only_polled_registers_before_it_beats() {
    let mut world = World::new();
    world.poll(&one()).expect("taken");
    let before = world.replicas()[0].0;
    assert_eq!(world.beat(&one()), Err(Fenced::UnknownNode), "the agent registers then");
    world.register(1, "boot").expect("the same node");
    assert_eq!(world.node().status, NodeStatus::Online, "it serves on");
    world.beat(&one()).expect("accepted");
    let (after, replica) = world.replicas()[0];
    assert_eq!(after, before);
    let expected = Target::Relay { agent: url("http://node:9200"), engine: url("http://127.0.0.1:8080") };
    assert_eq!(replica.target, expected, "it says how it is reached");
}

#[test]
fn the_first_of_two_agents_of_one_name_stays() {
    let (first, second) = (agent(), url("http://10.0.0.2:9200"));
    let mut world = World::new();
    world.poll_at(&first, &report(1, "boot", &one())).expect("taken");
    for (other, expected) in [
        (report(5, "other", &two()), Err(Fenced::Twin { holder: "10.0.0.1".into() })),
        (report(5, "boot", &two()), Err(Fenced::Twin { holder: "10.0.0.1:9200".into() })),
        (report(1, "boot", &two()), Ok(Polled::Elsewhere)),
    ] {
        assert_eq!(world.poll_at(&second, &other), expected);
        assert_eq!((world.replicas().len(), world.node().address.clone()), (1, Some(first.clone())));
    }
    // The first may restart, reboot and lose its state.
    for (incarnation, boot) in [(2, "boot"), (3, "reboot"), (1, "reboot")] {
        assert_eq!(world.poll_at(&first, &report(incarnation, boot, &one())), Ok(Polled::Taken));
    }
    // When it is silent for too long, the name is free.
    world.pass(30_000);
    assert_eq!(world.poll_at(&second, &report(5, "other", &two())), Ok(Polled::Taken));
    assert!(matches!(world.poll_at(&first, &report(1, "reboot", &one())), Err(Fenced::Twin { .. })));

    // The same with one that registered, also between two of its heartbeats.
    let mut world = World::new();
    world.register(1, "boot").expect("registered");
    world.pass(LATE_MS + 1_000);
    assert!(matches!(world.poll_at(&second, &report(5, "other", &two())), Err(Fenced::Twin { .. })));
    let mut world = World::new();
    world.poll_at(&second, &report(5, "other", &two())).expect("taken");
    world.pass(LATE_MS + 1_000);
    assert!(matches!(world.register(9, "boot"), Err(Fenced::Twin { .. })), "the next poll may tell better");
    world.poll_at(&second, &report(9, "boot", &two())).expect("it was a reboot");
    world.register(9, "boot").expect("so it is the same");
}

/// Its engines are behind its own agent, whatever address the machine gave that it was made from.
#[test]
fn a_copy_that_counted_to_the_same_number_is_another_start() {
    let mut world = World::new();
    let engine = replica("r0", "http://127.0.0.1:8000", true);
    world.register(1, "boot").expect("it is new");
    world.beat(std::slice::from_ref(&engine)).expect("it registered");
    world.pass(30_000);
    let copy = url("http://10.0.0.2:9200");
    let told = report(1, "another boot", std::slice::from_ref(&engine));
    assert_eq!(world.poll_at(&copy, &told).expect("nobody else is alive"), Polled::Taken);
    let (_, replica) = world.replicas()[0];
    assert!(matches!(&replica.target, Target::Relay { agent, .. } if *agent == copy), "{:?}", replica.target);
    assert!(matches!(world.beat(&[engine]), Err(Fenced::UnknownNode)), "it has not registered");
}

#[test]
fn a_draining_node_says_so_by_polls_too() {
    let mut world = World::new();
    let draining = AgentReport { draining: true, ..report(1, "boot", &one()) };
    world.poll_at(&agent(), &draining).expect("taken");
    assert_eq!(world.node().status, NodeStatus::Draining);
    world.poll(&one()).expect("taken");
    assert_eq!(world.node().status, NodeStatus::Online);
}

#[test]
fn this_machine_and_answers_without_measure_are_refused_and_leave_nothing_behind() {
    let mut world = World::new();
    let many: Vec<Value> = (0..5_000).map(|n| replica(&format!("r{n}"), "http://10.0.0.1:1", true)).collect();
    assert!(matches!(world.poll(&many), Err(Fenced::TooLarge { .. })));
    assert_eq!(world.registry.nodes_len(), 0);
    world.registry.set_local(&id(), &[], world.now, &mut world.changes).expect("local");
    assert_eq!(world.poll(&one()), Err(Fenced::Local));
}

#[test]
fn an_agent_that_names_one_replica_a_pool_is_understood() {
    let mut world = World::new();
    let body = json!({"node_id": "n", "pools": [{"pool_id": "p", "ready": true, "slots_total": 2, "slots_free": 2,
        "url": "http://10.0.0.1:8080", "replica_id": "r0", "models_available": ["m"]}]});
    let report: AgentReport = serde_json::from_value(body).expect("a report");
    assert_eq!(world.poll_at(&agent(), &report), Ok(Polled::Taken));
    let replica = world.replicas()[0].1;
    assert_eq!((replica.obstacle(), replica.slots_free(), replica.models.len()), (None, 2, 1));
}

/// One way for a fact to arrive.
#[derive(Clone, Copy, Debug)]
enum Way {
    Register,
    Beat,
    Poll,
    /// An answer to a poll sent before everything else.
    OldPoll,
    Pass(u64),
}

fn ways() -> impl Strategy<Value = Vec<Way>> {
    let way = prop_oneof![
        1 => Just(Way::Register),
        3 => Just(Way::Beat),
        3 => Just(Way::Poll),
        1 => Just(Way::OldPoll),
        3 => (0u64..25_000).prop_map(Way::Pass),
    ];
    prop::collection::vec(way, 1..60)
}

proptest! {
    /// Register, heartbeats, polls, in any order and number: the replicas and their handles are those of the
    /// first message that named them, and a request that runs keeps its slot.
    #[test]
    fn the_way_of_a_fact_leaves_no_trace(ways in ways()) {
        let mut reference = World::new();
        reference.poll(&two()).expect("taken");
        let expected = reference.seen();
        let mut world = World::new();
        let old = world.now.mono;
        let mut grant: Option<Grant> = None;
        let mut handles = None;
        world.pass(1);
        for way in ways {
            let told = match way {
                Way::Register => world.register(1, "boot").map(|()| false),
                Way::Beat => match world.beat(&two()) {
                    Err(Fenced::UnknownNode) => world.register(1, "boot").and_then(|()| world.beat(&two())),
                    done => done,
                }
                .map(|()| true),
                Way::Poll => world.poll(&two()).map(|_| false),
                Way::OldPoll => world.answer(&agent(), &report(1, "boot", &two()), old).map(|_| false),
                Way::Pass(ms) => {
                    world.pass(ms);
                    Ok(false)
                }
            };
            let told = told.map_err(|fenced| TestCaseError::fail(format!("{way:?}: {fenced}")))?;
            let Some(node) = world.registry.node(&id()) else { continue };
            if told {
                prop_assert_eq!((node.status, node.via()), (NodeStatus::Online, Via::Heartbeat));
            }
            if world.replicas().is_empty() {
                continue;
            }
            let now: Vec<ReplicaRef> = world.replicas().iter().map(|(replica, _)| *replica).collect();
            prop_assert_eq!(handles.get_or_insert_with(|| now.clone()), &now, "an engine lost its handle");
            if node.status != NodeStatus::Online {
                continue;
            }
            match &grant {
                None => {
                    prop_assert_eq!(&world.seen(), &expected);
                    grant = world.registry.acquire(now[0], 1);
                    prop_assert!(grant.is_some());
                }
                Some(_) => {
                    let (_, replica) = world.replicas()[0];
                    prop_assert_eq!((replica.in_flight, replica.ready, replica.slots_total), (1, true, 4));
                }
            }
        }
    }
}
