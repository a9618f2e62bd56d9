//! The control plane's core against a simple model of what it promises, whatever happens in whatever
//! order: asks, answers, failures, heartbeats, drains, lost nodes, passing time.
//!
//! - every request ends exactly once;
//! - no replica has room for a request that waits (unless that request failed there, and others could);
//! - nobody waits longer than its deadline, and nobody runs longer than its limit without being told;
//! - what the ledger says is taken is what was granted;
//! - nobody is passed over without bound.

use std::collections::BTreeMap;

use llama_orch::orchestratord::admission::Priority;
use llama_orch::orchestratord::core::{Asked, Core, Dispatch, Effect, Ending, Input, Options};
use llama_orch::orchestratord::placement::{Ask, Choice, Strategy, StrategyState, choose, fits};
use llama_orch::orchestratord::service_registry::{Limits, ReplicaRef};
use llama_orch::time::{Mono, Now, Wall};
use llama_orch::wire::id::{NodeId, PoolId};
use proptest::prelude::*;

const START: Now = Now { mono: Mono(1_000_000_000), wall: Wall(1_700_000_000_000_000_000) };
const NODES: usize = 3;
const CAPACITY: usize = 12;
/// How long requests wait.
const WAIT_MS: u64 = 20_000;
/// Others of the same kind that may be served before one that fitted as well: at most [`CAPACITY`] are
/// ahead, each of up to six kinds lets others pass eight times, and batch lets eight interactive ones pass.
const PASSES_MAX: u32 = 12 * 6 * 9 + 9 * 12;

#[derive(Debug)]
struct Known {
    ask: Ask,
    state: State,
    deadline: Mono,
    limit: Option<Mono>,
    tried: Vec<ReplicaRef>,
    passed: u32,
}

#[derive(Debug)]
enum State {
    Waits,
    Runs(Box<Dispatch>, bool),
    Over,
}

/// What a node says of its two engines.
#[derive(Clone, Copy, Debug)]
struct Engine {
    ready: bool,
    draining: bool,
    slots: u32,
    models: u8,
}

struct World {
    core: Core,
    now: Now,
    known: BTreeMap<u64, Known>,
    next: u64,
    nodes: [[Engine; 2]; NODES],
    incarnations: [u64; NODES],
}

fn options() -> Options {
    Options {
        limits: Limits::default(),
        strategy: Strategy::LeastLoaded,
        admission_capacity: CAPACITY,
        admission_timeout_ms: WAIT_MS,
        drain_timeout_ms: 30_000,
        hang_suspect_ms: 60_000,
        local: None,
        polled: Vec::new(),
        prefix_affinity: true,
        served_sessions_max: 16_384,
        addresses: None,
        seed: 3,
    }
}

impl World {
    fn new() -> World {
        let engine = Engine { ready: true, draining: false, slots: 1, models: 1 };
        let mut world = World {
            core: Core::new(options(), START),
            now: START,
            known: BTreeMap::new(),
            next: 1,
            nodes: [[engine; 2]; NODES],
            incarnations: [1; NODES],
        };
        (0..NODES).for_each(|node| world.register(node));
        world
    }

    fn handle(&mut self, input: Input) {
        let waiting: Vec<u64> =
            self.known.iter().filter(|(_, k)| matches!(k.state, State::Waits)).map(|(id, _)| *id).collect();
        let mut effects = Vec::new();
        self.core.handle(input, self.now, &mut effects);
        self.core.check_invariants();
        for effect in effects {
            match effect {
                Effect::Dispatch(id, dispatch) => {
                    let (key, node) = (dispatch.key.clone(), dispatch.node.clone());
                    let known = self.known.get_mut(&id).expect("it was asked for");
                    assert!(matches!(known.state, State::Waits), "{id} was dispatched twice");
                    known.state = State::Runs(Box::new(dispatch), false);
                    let ask = known.ask.clone();
                    for other in waiting.iter().filter(|other| **other < id) {
                        let other = self.known.get_mut(other).expect("known");
                        let same = other.ask == ask && matches!(other.state, State::Waits);
                        other.passed += u32::from(same);
                        assert!(other.passed <= PASSES_MAX, "{other:?} starves at {node}/{key}");
                    }
                }
                Effect::Refuse(id, refusal) => {
                    if let Some(known) = self.known.get_mut(&id) {
                        assert!(matches!(known.state, State::Waits), "{id} is over or runs: {refusal:?}");
                        known.state = State::Over;
                        let retry = refusal.retry_ms();
                        assert!(retry.is_none_or(|ms| (1_000..=60_000).contains(&ms)), "{refusal:?}");
                    }
                }
                Effect::Abort { request, .. } => {
                    let known = &self.known[&request];
                    assert!(matches!(known.state, State::Runs(..)), "{request} does not run");
                }
                _ => {}
            }
        }
    }

    /// What must hold after every input and the tick that follows it.
    fn check(&self) {
        let registry = self.core.registry();
        let waiting = self.known.values().filter(|known| matches!(known.state, State::Waits));
        let mut count = 0;
        for known in waiting {
            count += 1;
            assert!(known.deadline > self.now.mono, "{known:?} waits beyond its deadline");
            for (replica, facts) in registry.replicas() {
                if !fits(registry, replica, &known.ask) {
                    continue;
                }
                let mut state = StrategyState::new(1);
                let others = choose(registry, &known.ask, &known.tried, Strategy::LeastLoaded, &mut state);
                let others_could = matches!(others.choice, Choice::Busy | Choice::Replica { .. });
                assert!(
                    known.tried.contains(&replica) && others_could,
                    "{} is idle, and {known:?} waits",
                    facts.key
                );
            }
        }
        assert_eq!(count, self.core.waiting(), "who waits");
        let running = self.known.values().filter(|known| matches!(known.state, State::Runs(..))).count();
        assert_eq!(running, self.core.in_flight(), "who runs");
    }

    fn register(&mut self, node: usize) {
        let text = format!(
            r#"{{"node_id":"n{node}","address":"http://10.0.0.{node}:9200","incarnation":{}}}"#,
            self.incarnations[node]
        );
        let body = serde_json::from_str(&text).expect("a registration");
        self.handle(Input::Register { reply: 0, peer: "p".into(), body });
        self.beat(node);
    }

    fn beat(&mut self, node: usize) {
        let pools: Vec<String> = self.nodes[node]
            .iter()
            .enumerate()
            .map(|(at, engine)| {
                let models = match engine.models {
                    0 => r#""a""#,
                    1 => r#""a","b""#,
                    _ => "",
                };
                format!(
                    r#"{{"pool_id":"p{at}","draining":{},"replicas":[{{"replica_id":"r","url":"http://10.0.0.{node}:{at}1",
                    "ready":{},"draining":{},"slots_free":{slots},"slots_total":{slots},"models":[{models}]}}]}}"#,
                    engine.draining, engine.ready, engine.draining, slots = engine.slots
                )
            })
            .collect();
        let text = format!(r#"{{"incarnation":{},"pools":[{}]}}"#, self.incarnations[node], pools.join(","));
        let body = serde_json::from_str(&text).expect("a heartbeat");
        let node = NodeId::new(&format!("n{node}")).expect("an id");
        self.handle(Input::Heartbeat { reply: 0, peer: "p".into(), node, body });
    }

    fn ask(&mut self, a: u8, b: u8) {
        let model = [Some("a"), Some("b"), None][usize::from(a % 3)].map(String::from);
        let pool = (b.is_multiple_of(4)).then(|| PoolId::new("p1").expect("an id"));
        let slots = 1 + u32::from(b.is_multiple_of(7));
        let ask = Ask { model, pool, slots, ..Ask::default() };
        let priority = if b.is_multiple_of(2) { Priority::Interactive } else { Priority::Batch };
        let asked = Asked {
            ask: ask.clone(),
            priority,
            client: ["x", "y", "z"][usize::from(a / 3 % 3)].into(),
            wait_ms_max: if b.is_multiple_of(5) { 3_000 } else { u64::MAX },
            is_deadline: false,
        };
        let id = self.next;
        self.next += 1;
        let deadline = self.now.mono.plus_ms(asked.wait_ms_max.min(WAIT_MS));
        let known = Known { ask, state: State::Waits, deadline, limit: None, tried: Vec::new(), passed: 0 };
        self.known.insert(id, known);
        self.handle(Input::Ask { request: id, asked: Box::new(asked) });
        if a.is_multiple_of(4) && !matches!(self.known[&id].state, State::Over) {
            let known = self.known.get_mut(&id).expect("just asked");
            known.limit = Some(self.now.mono.plus_ms(5_000));
            known.deadline = known.deadline.min(self.now.mono.plus_ms(5_000));
            self.handle(Input::Limit { request: id, total_ms: 5_000 });
        }
    }

    fn replica_of(&self, dispatch: &Dispatch) -> Option<ReplicaRef> {
        let at = |r: &llama_orch::orchestratord::service_registry::Replica| {
            r.node == dispatch.node && r.key == dispatch.key && r.generation == dispatch.generation
        };
        self.core.registry().replicas().find(|(_, replica)| at(replica)).map(|(replica, _)| replica)
    }

    /// The exchange of the `nth` running request goes on or ends.
    fn exchange(&mut self, nth: u8, how: u8) {
        let running: Vec<u64> = self
            .known
            .iter()
            .filter(|(_, k)| matches!(k.state, State::Runs(..)))
            .map(|(id, _)| *id)
            .collect();
        let Some(id) = running.get(usize::from(nth) % running.len().max(1)).copied() else { return };
        let known = self.known.get_mut(&id).expect("it runs");
        let State::Runs(dispatch, answered) = &mut known.state else { return };
        if how.is_multiple_of(8) {
            *answered = true;
            return self.handle(Input::Answering(id));
        }
        let (dispatch, answered) = (dispatch.clone(), *answered);
        let failed = |connect, timeout| Ending::Failed { reason: "r".into(), connect, timeout, answered };
        let (ending, again) = match how % 8 {
            1..=3 => (Ending::Complete, false),
            4 => (Ending::Withdrawn, false),
            5 => (failed(true, false), !answered),
            6 if answered => (failed(false, false), false),
            6 => (Ending::NotReady { reason: "r".into(), pause_ms: 2_000 }, true),
            _ => (failed(false, true), !answered),
        };
        let replica = self.replica_of(&dispatch);
        let known = self.known.get_mut(&id).expect("it runs");
        // Whoever failed unanswered is placed again, waits, or is refused in the same turn.
        known.state = if again { State::Waits } else { State::Over };
        if again {
            known.tried.extend(replica);
        }
        self.handle(Input::Ended(id, ending));
    }

    fn tick(&mut self) {
        self.handle(Input::Tick);
    }

    fn pass(&mut self, ms: u64) {
        let until = self.now.mono.plus_ms(ms);
        let mut turns = 0;
        while let Some(due) = self.core.deadline().filter(|due| *due <= until) {
            let ahead = due.ns_since(self.now.mono);
            self.now = Now { mono: self.now.mono.max(due), wall: Wall(self.now.wall.0 + ahead) };
            self.tick();
            self.check();
            turns += 1;
            assert!(turns < 10_000, "the core's deadline does not move: {due:?}");
        }
        let ahead = until.ns_since(self.now.mono);
        self.now = Now { mono: until, wall: Wall(self.now.wall.0 + ahead) };
    }

    fn step(&mut self, (op, a, b): (u8, u8, u8)) {
        let node = usize::from(a) % NODES;
        match op % 12 {
            0..=3 => self.ask(a, b),
            4..=6 => self.exchange(a, b),
            7 => {
                let engine = &mut self.nodes[node][usize::from(b) % 2];
                *engine = Engine {
                    ready: b & 4 == 0,
                    draining: b & 24 == 24,
                    slots: u32::from(b / 32) % 3,
                    models: b % 3,
                };
                self.beat(node);
            }
            8 => self.beat(node),
            9 => match b % 4 {
                0 => {
                    let name = NodeId::new(&format!("n{node}")).expect("an id");
                    self.handle(Input::Deregister { reply: 0, node: name, incarnation: None });
                }
                _ => {
                    self.incarnations[node] += 1;
                    self.register(node);
                }
            },
            10 => {
                let waiting = self.known.iter().find(|(_, known)| matches!(known.state, State::Waits));
                if let Some((id, _)) = waiting {
                    let id = *id;
                    self.known.get_mut(&id).expect("it waits").state = State::Over;
                    self.handle(Input::Withdraw(id));
                }
            }
            _ => self.pass(u64::from(b) * 100),
        }
        self.tick();
        self.check();
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn promises_are_kept_in_any_order_of_events(
        steps in proptest::collection::vec((any::<u8>(), any::<u8>(), any::<u8>()), 1..250)
    ) {
        let mut world = World::new();
        for step in steps {
            world.step(step);
        }
        // Who runs ends, and time ends what waits.
        for _ in 0..2 {
            for nth in 0..40 {
                world.exchange(nth, 1);
            }
            world.pass(2 * WAIT_MS);
        }
        while world.core.in_flight() > 0 {
            world.exchange(0, 1);
        }
        world.pass(2 * WAIT_MS);
        world.check();
        prop_assert!(world.known.values().all(|known| matches!(known.state, State::Over)), "someone never ended");
    }
}
