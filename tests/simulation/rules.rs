//! What must hold, whatever happens: the world's own books on requests and slots, kept from inputs and
//! effects alone and held against what a control plane does; and how everything is when all is well.

use std::collections::{BTreeMap, BTreeSet};

use llama_orch::orchestratord::core::{Asked, Dispatch, Effect, Ending};
use llama_orch::orchestratord::placement::{Ask, Choice, Strategy, StrategyState, choose};
use llama_orch::orchestratord::service_registry::{NodeStatus, ReplicaRef};
use llama_orch::time::Mono;
use llama_orch::wire::id::NodeId;

use crate::control::{Control, PendingCall};
use crate::links::Dialect;
use crate::world::{Place, World};

/// How long a lease lasts without a sign of life.
pub(crate) const TTL_MS: u64 = 30_000;
/// How long a replica is out of the rotation after a failure, or up to a fifth less; twice as long after
/// each one in a row.
const CIRCUIT_MS: u64 = 250;
const CIRCUIT_MS_MAX: u64 = 10_000;
/// Engines that one request may be sent to.
const ATTEMPTS_MAX: u32 = 3;
/// How often besides on replicas that only the state file tells of.
const UNTRIED_ATTEMPTS_MAX: u32 = 16;
/// The longest that anybody may wait.
const WAIT_MS_MAX: u64 = 60_000;

/// One control plane's books, from its start to its end.
#[derive(Default)]
pub(crate) struct Ledger {
    requests: BTreeMap<u64, Request>,
    /// Those of them that are neither sent nor at an end.
    pending: BTreeSet<u64>,
    running: u64,
    /// Slots of requests that run.
    in_use: BTreeMap<Place, u32>,
    doubts: BTreeMap<ReplicaRef, Doubt>,
    /// What machines call themselves.
    pub(crate) names: BTreeMap<usize, NodeId>,
}

struct Request {
    ask: Ask,
    deadline: Mono,
    attempts: u32,
    untried: u32,
    /// Where it failed before an answer began.
    failed_at: Vec<ReplicaRef>,
    state: State,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum State {
    /// Waits, or is about to be decided on.
    Pending,
    Running {
        place: Place,
        replica: ReplicaRef,
        slots: u32,
        /// `None` until the shell has carried the dispatch out.
        exchange: Option<u64>,
    },
    Done(&'static str),
}

/// A replica whose data path failed and has not worked since.
struct Doubt {
    /// Until then it is out of the rotation at least, and at most.
    until: Mono,
    until_most: Mono,
    /// Time has not ended its pause yet, surely or perhaps.
    is_out: bool,
    may_be_out: bool,
    /// Failures in a row at least, and at most.
    failures: u32,
    failures_most: u32,
    trying: Option<u64>,
}

/// The longest pause after so many failures in a row.
fn pause_ms(failures: u32) -> u64 {
    (CIRCUIT_MS << (failures - 1).min(16)).min(CIRCUIT_MS_MAX)
}

impl Ledger {
    pub(crate) fn asked(&mut self, request: u64, asked: &Asked, now: Mono) {
        let deadline = now.plus_ms(asked.wait_ms_max.min(WAIT_MS_MAX));
        let ask = asked.ask.clone();
        let (failed_at, state) = (Vec::new(), State::Pending);
        self.requests.insert(request, Request { ask, deadline, attempts: 0, untried: 0, failed_at, state });
        self.pending.insert(request);
    }

    /// Requests that are neither answered nor refused.
    pub(crate) fn open(&self) -> u64 {
        self.pending.len() as u64 + self.running
    }

    pub(crate) fn node_of(&self, call: &PendingCall) -> NodeId {
        self.names.get(&call.from.node).expect("a machine has a name").clone()
    }

    fn become_(&mut self, request: u64, next: State) -> State {
        match &next {
            State::Pending => self.pending.insert(request),
            _ => self.pending.remove(&request),
        };
        self.running += u64::from(matches!(next, State::Running { .. }));
        let known = self.requests.get_mut(&request).expect("it was asked");
        let was = std::mem::replace(&mut known.state, next);
        self.running -= u64::from(matches!(was, State::Running { .. }));
        was
    }

    /// A client leaves: whether its request waits.
    pub(crate) fn withdraw(&mut self, request: u64) -> bool {
        let waits = self.pending.contains(&request);
        if waits {
            self.become_(request, State::Done("withdrawn"));
        }
        waits
    }

    pub(crate) fn dispatched(&mut self, request: u64, id: u64, dispatch: &Dispatch) {
        match &mut self.requests.get_mut(&request).expect("it was asked").state {
            State::Running { exchange: exchange @ None, slots, .. } if *slots == dispatch.slots => {
                *exchange = Some(id);
            }
            state => panic!("request {request} is sent while {state:?}"),
        }
    }

    pub(crate) fn answering(&mut self, request: u64, id: u64) {
        if let Some(State::Running { replica, exchange, .. }) =
            self.requests.get(&request).map(|request| &request.state)
            && *exchange == Some(id)
        {
            self.doubts.remove(replica);
        }
    }

    pub(crate) fn ended(&mut self, request: u64, id: u64, ending: &Ending, now: Mono) {
        let next = match ending {
            Ending::Complete => State::Done("answered"),
            Ending::Withdrawn => State::Done("withdrawn"),
            Ending::Failed { answered: true, .. } | Ending::Aborted { answered: true } => {
                State::Done("broken")
            }
            Ending::Failed { .. }
            | Ending::BrokenOff(_)
            | Ending::NotTried(_)
            | Ending::NotReady { .. }
            | Ending::Aborted { .. } => State::Pending,
        };
        let State::Running { place, replica, slots, exchange } = self.become_(request, next) else {
            panic!("request {request} ends and did not run");
        };
        assert_eq!(exchange, Some(id), "request {request} runs twice");
        let in_use = self.in_use.get_mut(&place).expect("counted when it began");
        *in_use -= slots;
        if *in_use == 0 {
            self.in_use.remove(&place);
        }
        if let Some(doubt) = self.doubts.get_mut(&replica)
            && doubt.trying == Some(request)
        {
            doubt.trying = None;
        }
        if self.pending.contains(&request) {
            self.requests.get_mut(&request).expect("it was asked").failed_at.push(replica);
        }
        if matches!(ending, Ending::Failed { timeout: false, .. } | Ending::BrokenOff(_)) {
            self.failed(replica, now);
        }
    }

    /// The replica on which a request runs.
    pub(crate) fn runs_on(&self, request: u64) -> Option<ReplicaRef> {
        match &self.requests.get(&request)?.state {
            State::Running { replica, .. } => Some(*replica),
            _ => None,
        }
    }

    /// A replica has failed, or the way to it.
    pub(crate) fn failed(&mut self, replica: ReplicaRef, now: Mono) {
        let (failures, failures_most) = match self.doubts.get_mut(&replica) {
            // While it is out of the rotation failures count once.
            Some(doubt) if doubt.is_out => return,
            Some(doubt) if doubt.may_be_out => {
                // Perhaps it counts, which would be the end of a trial.
                doubt.trying = None;
                doubt.failures_most += 1;
                doubt.until_most = doubt.until_most.max(now.plus_ms(pause_ms(doubt.failures_most)));
                return;
            }
            doubt => doubt.map_or((1, 1), |doubt| (doubt.failures + 1, doubt.failures_most + 1)),
        };
        let doubt = Doubt {
            until: now.plus_ms(pause_ms(failures) * 4 / 5),
            until_most: now.plus_ms(pause_ms(failures_most)),
            is_out: true,
            may_be_out: true,
            failures,
            failures_most,
            trying: None,
        };
        self.doubts.insert(replica, doubt);
    }

    /// Time may have ended pauses.
    pub(crate) fn ticked(&mut self, now: Mono) {
        for doubt in self.doubts.values_mut() {
            doubt.is_out &= doubt.until > now;
            doubt.may_be_out &= doubt.until_most > now;
        }
    }

    fn dispatch(
        &mut self,
        request: u64,
        dispatch: &Dispatch,
        replica: ReplicaRef,
        total: u32,
        is_untried: bool,
    ) {
        let Dispatch { node, key, generation, slots, .. } = dispatch;
        let name = format!("request {request} goes to {node} {key}");
        let place = (node.clone(), key.clone(), *generation);
        let in_use = self.in_use.entry(place.clone()).or_default();
        *in_use += slots;
        assert!(*in_use <= total, "{name}: {in_use} of {total} slots");
        if let Some(doubt) = self.doubts.get_mut(&replica) {
            assert!(!doubt.is_out, "{name}, which has failed and is out until {:?}", doubt.until);
            assert_eq!(doubt.trying, None, "{name}, which one request is trying");
            doubt.trying = Some(request);
        }
        let known = self.requests.get_mut(&request).expect("it was asked");
        // What only the state file tells of may be tried besides, but not without end.
        let attempts = if is_untried { &mut known.untried } else { &mut known.attempts };
        *attempts += 1;
        assert!(known.attempts <= ATTEMPTS_MAX, "{name}: for the {}th time", known.attempts);
        assert!(
            known.untried <= UNTRIED_ATTEMPTS_MAX + ATTEMPTS_MAX,
            "{name}: {} unknown ones",
            known.untried
        );
        let was = self.become_(request, State::Running { place, replica, slots: *slots, exchange: None });
        assert_eq!(was, State::Pending, "{name}");
    }
}

impl Control {
    /// Holds what the core decided against the books.
    pub(crate) fn check_effect(&mut self, effect: &Effect, now: Mono) {
        self.check_member_effect(effect, now);
        match effect {
            Effect::Dispatch(request, dispatch) => self.check_dispatch(*request, dispatch),
            Effect::Refuse(id, refusal) if !self.calls.contains_key(id) => {
                let was = self.ledger.become_(*id, State::Done("refused"));
                assert_eq!(was, State::Pending, "request {id} refused: {}", refusal.message());
            }
            Effect::Waiting { request, .. } => {
                let state = &self.ledger.requests.get(request).expect("it was asked").state;
                assert_eq!(*state, State::Pending, "request {request} waits");
            }
            _ => {}
        }
    }

    fn check_dispatch(&mut self, request: u64, dispatch: &Dispatch) {
        let registry = self.core.registry();
        let node = registry.node(&dispatch.node).expect("a known node");
        let is_it = |replica: &ReplicaRef| registry.replica(*replica).is_some_and(|r| r.key == dispatch.key);
        let replica = registry.replicas_of(node).find(is_it).expect("a known replica");
        let known = registry.replica(replica).expect("just found");
        let is_untried = known.is_untried();
        // Of the oldest agents nobody learns that a replica was away for a moment while requests ran on it:
        // the core counts anew, and the agent refuses what is too much.
        let told = self.check_told(request, dispatch).unwrap_or(u32::MAX);
        self.ledger.dispatch(request, dispatch, replica, told, is_untried);
    }

    /// After every input: nothing is forgotten, and the queue is within its limit.
    pub(crate) fn check_counts(&self, capacity: usize) {
        let (waiting, in_flight) = (self.core.waiting(), self.core.in_flight());
        assert_eq!(
            (waiting + in_flight) as u64,
            self.ledger.open(),
            "requests that are neither ended nor known to the core"
        );
        assert!(waiting <= capacity, "{waiting} requests wait, {capacity} may");
    }
}

impl World {
    /// After every turn of a control plane: nobody waits who could be served, nor for too long.
    pub(crate) fn check_control(&mut self, plane: usize) {
        let now = self.now.mono;
        let Some(control) = &self.planes[plane].control else { return };
        assert!(control.exit_by.is_none_or(|at| now < at), "the control plane outlives its shutdown");
        if !self.turns.is_multiple_of(self.scale.look_at_all_every) {
            return;
        }
        for id in &control.ledger.pending {
            let request = &control.ledger.requests[id];
            assert!(request.deadline > now, "request {id} waits beyond {:?}", request.deadline);
            let state = &mut StrategyState::new(1);
            let registry = control.core.registry();
            // One on which it failed will do only where no other could serve it.
            let tried = &request.failed_at;
            let mut placement = choose(registry, &request.ask, tried, Strategy::LeastLoaded, state);
            if !matches!(placement.choice, Choice::Busy) {
                placement = choose(registry, &request.ask, &[], Strategy::LeastLoaded, state);
            }
            assert!(
                !matches!(placement.choice, Choice::Replica { .. }),
                "request {id} waits for {:?} while a slot is free",
                request.ask
            );
        }
    }

    /// After everything was healed and two lease times have passed: everything is well.
    pub(crate) fn check_all_is_well(&self) {
        for plane in 0..self.planes.len() {
            self.check_plane_is_well(plane);
        }
        for node in self.nodes.iter().filter(|node| node.twin_of.is_none()) {
            let agent = node.agent.as_ref().expect("it was started");
            assert_eq!(agent.core.in_flight(), 0, "{}: relayed requests that do not end", node.id);
            let idle = node.engines.values().all(|engine| engine.running.is_empty());
            assert!(idle, "{}: engines run", node.id);
        }
    }

    fn check_plane_is_well(&self, plane: usize) {
        let control = self.planes[plane].control.as_ref().expect("it was started");
        let registry = control.core.registry();
        assert_eq!((control.core.waiting(), control.core.in_flight()), (0, 0), "requests that do not end");
        assert_eq!(control.ledger.open(), 0, "requests that were forgotten");
        assert!(control.ledger.in_use.is_empty(), "slots that are still in use");
        let nodes = self.nodes.iter().filter(|node| node.twin_of.is_none()).count();
        assert_eq!(registry.nodes_len(), nodes, "nodes that are not there");
        let mut replicas = 0;
        for (index, node) in self.nodes.iter().enumerate().filter(|(_, node)| node.twin_of.is_none()) {
            let known = registry.node(&node.id).unwrap_or_else(|| panic!("{} is not known", node.id));
            let agent = node.agent.as_ref().expect("it was started");
            let state = &agent.core.planes()[plane];
            let incarnation = Some(node.incarnation).filter(|_| node.dialect != Dialect::Old);
            assert_eq!(
                (known.status, known.incarnation),
                (NodeStatus::Online, incarnation),
                "{}: {:?}: {}",
                node.id,
                state.state(),
                state.reason()
            );
            if node.dialect == Dialect::Old {
                replicas += registry.replicas_of(known).count();
                self.check_old_node(plane, index);
                continue;
            }
            for (handoff, serves) in self.announced(index) {
                let key = handoff.key();
                let found = registry.replicas().find(|(_, r)| r.node == node.id && r.key == key);
                let (_, replica) = found.unwrap_or_else(|| panic!("{} {key} is not known", node.id));
                assert_eq!(replica.target.engine(), Some(&handoff.url), "{} {key}", node.id);
                let obstacle = replica.obstacle();
                assert_eq!(obstacle.is_none(), serves, "{} {key}: {obstacle:?}", node.id);
                let slots = (replica.slots_total, replica.in_flight, replica.others);
                assert_eq!(slots, (handoff.slots, 0, 0), "{} {key}: slots", node.id);
                replicas += 1;
            }
        }
        assert_eq!(registry.replicas().count(), replicas, "replicas that no file announces");
    }

    /// Of pools whose replicas are not listed, as much is known as one question tells.
    fn check_old_node(&self, plane: usize, index: usize) {
        let control = self.planes[plane].control.as_ref().expect("it was started");
        let registry = control.core.registry();
        let node = &self.nodes[index];
        let served: BTreeSet<_> = self
            .announced(index)
            .into_iter()
            .filter_map(|(handoff, serves)| serves.then_some(handoff.pool_id))
            .collect();
        for pool in served {
            let of_pool = || registry.replicas().filter(|(_, r)| r.node == node.id && r.key.pool == pool);
            let obstacles: Vec<_> = of_pool().map(|(_, replica)| replica.obstacle()).collect();
            assert!(
                obstacles.iter().any(Option::is_none),
                "{} {pool}: an old agent serves it, and nobody knows: {obstacles:?}",
                node.id
            );
        }
    }
}
