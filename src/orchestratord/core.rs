//! The control plane's decisions. Pure: inputs and the time in, effects out.
//!
//! ```text
//!   Register, Heartbeat ─▶ service registry ─┐ a replica takes work, or has a free slot
//!   Polled (nodes without heartbeats) ───────┤
//!   Listing, Probed ─▶ local replicas (HOME) ┤
//!                                            ▼
//!   Ask ─▶ placement ──slot taken──▶ Effect::Dispatch ─▶ Answering ─▶ Ended ─▶ slot given back
//!             └─ no slot ─▶ admission queue ──▲                        └─ failed unanswered: elsewhere
//! ```
//!
//! A request is placed, or put into the queue, in the turn in which it is asked for; a slot that
//! becomes free goes to the first waiter that fits in the same turn. A slot is taken by exactly one
//! grant and given back exactly once, when the exchange behind it has ended.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::BuildHasherDefault;
use std::sync::Arc;

use crate::reactor::token::NumberHasher;
use crate::replicas::{self, Fault, ReplicaLease, Trouble};
use crate::service::events::{Events, Happening, Tell};
use crate::time::{Mono, Now, earliest};
use crate::wire::id::NodeId;

use self::keeping::Keeper;
use self::limits::Abort;
pub use self::predicting::QueuePlace;
use self::waiting::{Hopes, Wanted};
use super::admission::{Admission, Priority, Waiter};
use super::affinity::{self, Affinity};
use super::drain_rate::DrainRate;
use super::explain::Considered;
use super::forecast::Speeds;
pub use super::messages::{Asked, Counts, Dispatch, Effect, Ending, Input, Options, RequestId};
use super::meters::{Ended, Meters};
use super::placement::{Ask, Choice, Strategy, StrategyState, choose};
use super::poller::Poller;
use super::refusal::Refusal;
use super::report::happening;
use super::served_sessions::{ServedSession, ServedSessions};
use super::service_registry::{
    Change, Fenced, Grant, NodeStatus, Replica, ReplicaRef, ServiceRegistry, Target,
};
use super::workers::Idle;

#[cfg(test)]
mod affinity_tests;
mod draining;
mod keeping;
mod limits;
mod polling;
mod predicting;
#[cfg(test)]
mod tests;
mod waiting;
mod workers;

pub use self::waiting::NOBODY_GRACE_MS;

/// Engines that one request is tried on before it is given up.
pub const ATTEMPTS_MAX: u32 = 3;
/// Engines beyond these on which one request may fail because they were restored from the state file and
/// are not there any more. Much of a fleet may have died with the control plane, and each of its engines
/// costs a request two seconds at most; after so many the client should hear of it.
pub const UNTRIED_ATTEMPTS_MAX: u32 = 16;

/// A request between its ask and its end.
#[derive(Debug)]
struct Request {
    asked: Box<Asked>,
    since: Mono,
    attempts: u32,
    /// Of these, on engines of which nothing but the state file told.
    untried: u32,
    tried: Vec<ReplicaRef>,
    running: Option<Run>,
    /// What the last placement saw, until it is told.
    considered: Option<Considered>,
    /// When its time is over, and how long that is after its ask.
    limit: Option<(Mono, u64)>,
    /// Its time is over.
    is_overdue: bool,
}

#[derive(Debug)]
struct Run {
    grant: Grant,
    /// The same slots in the ledger of this machine's engines.
    lease: Option<ReplicaLease>,
    node: NodeId,
    since: Mono,
    answering: bool,
    /// It is being ended from here.
    abort: Option<Abort>,
}

/// The engines of this machine, in the HOME profile.
#[derive(Debug)]
struct Local {
    node: NodeId,
    replicas: replicas::Registry,
    shown_revision: u64,
}

/// Requests by their numbers, in no order: where one follows, they are sorted.
type Requests = HashMap<RequestId, Box<Request>, BuildHasherDefault<NumberHasher>>;

/// The control plane's state.
#[derive(Debug)]
pub struct Core {
    registry: ServiceRegistry,
    admission: Admission<Wanted>,
    hopes: Hopes,
    /// A replica takes other work than before, or is being tried: who failed elsewhere may have waited for it.
    replicas_changed: bool,
    drains: DrainRate,
    limits: BTreeSet<(Mono, RequestId)>,
    meters: Meters,
    requests: Requests,
    local: Option<Local>,
    /// Where this process has no engines, and workers may come.
    idle: Option<Idle>,
    poller: Poller,
    strategy: Strategy,
    strategy_state: StrategyState,
    sessions: ServedSessions,
    wait_ms_max: u64,
    drain_timeout_ms: u64,
    ends_at: Option<Mono>,
    over: bool,
    events: Events,
    counts: Counts,
    speeds: Speeds,
    watch_trouble: Option<Trouble>,
    listed: bool,
    keeper: Keeper,
}

impl Core {
    /// A core that knows nobody.
    #[must_use]
    pub fn new(options: Options, now: Now) -> Core {
        let local = options.local.map(|(node, policy)| {
            let mut replicas = replicas::Registry::new(policy, now.wall.unix_ms());
            replicas.set_hang_limit(options.hang_suspect_ms);
            Local { node, replicas, shown_revision: 0 }
        });
        let mut registry = ServiceRegistry::new(options.limits, now.wall.unix_ms());
        if let Some(rules) = options.addresses {
            registry.set_address_rules(rules);
        }
        registry.set_placement(options.strategy, options.prefix_affinity);
        Core {
            poller: Poller::new(&options.polled, options.limits.poll_interval_ms, options.seed, now),
            registry,
            admission: Admission::new(options.admission_capacity),
            hopes: Hopes::default(),
            replicas_changed: false,
            drains: DrainRate::new(options.seed),
            limits: BTreeSet::new(),
            meters: Meters::default(),
            requests: Requests::default(),
            local,
            idle: None,
            strategy: options.strategy,
            strategy_state: StrategyState::new(options.seed),
            sessions: ServedSessions::new(options.served_sessions_max),
            wait_ms_max: options.admission_timeout_ms,
            drain_timeout_ms: options.drain_timeout_ms,
            ends_at: None,
            over: false,
            events: Events::default(),
            counts: Counts::default(),
            speeds: Speeds::default(),
            watch_trouble: None,
            listed: false,
            keeper: Keeper::new(0, now.mono),
        }
    }

    /// Takes one input and appends what it leads to.
    pub fn handle(&mut self, input: Input, now: Now, effects: &mut Vec<Effect>) {
        let mut changes = Vec::new();
        let tick = matches!(input, Input::Tick);
        let is_written = matches!(input, Input::PieceWritten);
        match input {
            Input::Ask { request, asked } => {
                self.ask(request, asked, now, effects);
                let is_dispatched =
                    matches!(effects.last(), Some(Effect::Dispatch(dispatched, _)) if *dispatched == request);
                if is_dispatched && !self.replicas_changed {
                    // Its engine is waited for, and nothing else has changed.
                    return;
                }
            }
            Input::Metered(id, metered) => {
                if let Some(request) = self.requests.get(&id) {
                    let model = request.asked.ask.model.as_deref();
                    self.meters.metered(model, metered, request.since);
                }
                // Nothing follows from numbers.
                return;
            }
            Input::Answering(request) => {
                self.answering(request, now, &mut changes);
                if changes.is_empty() {
                    // An answer as it should be.
                    return;
                }
            }
            Input::Ended(request, ending) => self.ended(request, ending, now, &mut changes, effects),
            Input::PieceWritten | Input::Tick => {}
            input => self.handle_seldom(input, now, &mut changes, effects),
        }
        self.cut_drained(now, effects);
        self.show_local(now, &mut changes);
        // Time ends nothing while other inputs may wait: a heartbeat that arrived in time, but was not
        // yet handled, must find its lease.
        if tick {
            self.registry.expire(now, &mut changes);
        }
        self.follow(changes, now, effects);
        self.serve_who_failed(now, effects);
        self.send_probes(now, effects);
        if tick {
            self.end_waits(now, effects);
            self.end_overdue(now, effects);
            self.look_for_hope(now, effects);
            self.send_polls(now, effects);
        }
        self.end_shutdown(now, effects);
        self.keep(is_written, now, effects);
    }

    /// Inputs that most requests do not bring. On its own, so that the code of those that all do stays small and
    /// lies close together.
    #[inline(never)]
    fn handle_seldom(
        &mut self,
        input: Input,
        now: Now,
        changes: &mut Vec<Change>,
        effects: &mut Vec<Effect>,
    ) {
        match input {
            Input::Register { reply, peer, body } => {
                let done = self.registry.register(&body, &peer, now, changes);
                self.counts.registrations += u64::from(done.is_ok());
                self.answer(reply, done.map(|ok| Effect::Registered(reply, ok)), effects);
            }
            Input::Heartbeat { reply, peer, node, body } => {
                let done = self.registry.heartbeat(&node, &body, &peer, now, changes);
                self.counts.heartbeats += u64::from(done.is_ok());
                self.answer(reply, done.map(|ok| Effect::Beaten(reply, ok)), effects);
            }
            Input::Deregister { reply, node, incarnation } => {
                let done = self.registry.deregister(&node, incarnation, now, changes);
                self.answer(reply, done.map(|()| Effect::Removed(reply)), effects);
            }
            Input::Restore(saved) => self.restore(&saved, now, changes),
            Input::Saved(result) => self.saved(result, now, effects),
            Input::StateTrouble(text) => self.state_trouble(text, now, effects),
            Input::Listing(listing) => {
                self.listed |= listing.completes;
                self.with_local(now, effects, |local, now, found| local.listing(&listing, now, found));
            }
            Input::Process(key, generation, seen) => self.with_local(now, effects, |local, now, found| {
                local.process_seen(&key, generation, seen, now, found);
            }),
            Input::Active { key, generation, activity } => {
                self.with_local(now, effects, |local, now, found| {
                    local.active(&key, generation, activity, now, found);
                })
            }
            Input::Worker(order) => self.worker(order, now, effects),
            Input::Drain(order) => self.drain(&order, now, effects),
            Input::Probed(id, outcome) => {
                self.with_local(now, effects, |local, now, found| local.probed(&id, outcome, now, found));
            }
            Input::WatchTrouble(trouble) => self.note_watch(trouble, now, effects),
            Input::AgentSaid { node, pool, replicas } => {
                self.registry.set_engine_url(&node, &pool, &replicas, now, changes);
            }
            Input::PoolOrdered { node, pool, draining } => {
                self.pool_ordered(&node, &pool, draining, now, changes);
            }
            Input::Polled(id, outcome) => self.polled(id, outcome, now, changes, effects),
            Input::PoolReady { reply, notice } => self.pool_ready(reply, &notice, now, effects),
            Input::Limit { request, total_ms } => self.limit(request, total_ms),
            Input::Measured { request, first_token_ms, tokens, decode_ms } => {
                self.measured(request, first_token_ms, tokens, decode_ms);
            }
            Input::Withdraw(request) => self.withdraw(request),
            Input::Shutdown => {
                self.ends_at.get_or_insert(now.mono.plus_ms(self.drain_timeout_ms));
            }
            Input::Ask { .. }
            | Input::Metered(..)
            | Input::Answering(_)
            | Input::Ended(..)
            | Input::PieceWritten
            | Input::Tick => {}
        }
    }

    /// When [`Input::Tick`] is wanted next.
    #[must_use]
    pub fn deadline(&self) -> Option<Mono> {
        // As long as probes are sent: a deadline that nothing meets would make the loop spin.
        let drains = self.local.as_ref().and_then(|local| local.replicas.drain_deadline());
        let local = self.local.as_ref().filter(|_| self.ends_at.is_none());
        let local = earliest(local.and_then(|local| local.replicas.deadline()), drains);
        let queue =
            earliest(self.admission.deadline(), earliest(self.limits_deadline(), self.look_deadline()));
        let end = self.ends_at.filter(|_| !self.over && !self.is_keeping_last());
        earliest(
            earliest(self.registry.deadline(), earliest(queue, self.poller.deadline())),
            earliest(local, earliest(end, self.keeping_deadline())),
        )
    }

    /// Nodes and replicas.
    #[must_use]
    pub fn registry(&self) -> &ServiceRegistry {
        &self.registry
    }

    /// The engines of this machine, in the HOME profile.
    #[must_use]
    pub fn local(&self) -> Option<&replicas::Registry> {
        self.local.as_ref().map(|local| &local.replicas)
    }

    /// A session that is remembered: its replica is still there.
    #[must_use]
    pub fn session(&self, key: &str, now: Mono) -> Option<&ServedSession> {
        let session = self.sessions.get(key, now)?;
        self.registry.replica(session.replica).map(|_| session)
    }

    /// Forgets a session; its next request goes where a new one's would.
    pub fn forget_session(&mut self, key: &str) {
        self.sessions.forget(key);
    }

    /// The last state changes.
    #[must_use]
    pub fn events(&self) -> &Events {
        &self.events
    }

    /// Counters and durations for the metrics.
    #[must_use]
    pub fn counts(&self) -> &Counts {
        &self.counts
    }

    /// What a request asks for, if it waits for a slot.
    #[must_use]
    pub fn awaited(&self, request: RequestId) -> Option<&Ask> {
        self.requests.get(&request).filter(|known| known.running.is_none()).map(|known| &known.asked.ask)
    }

    /// Requests that wait for a slot.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.admission.len()
    }

    /// Of these, the ones of this priority.
    #[must_use]
    pub fn waiting_of(&self, priority: Priority) -> usize {
        self.admission.len_of(priority)
    }

    /// How long the one has waited that waits longest, in milliseconds.
    #[must_use]
    pub fn oldest_wait_ms(&self, now: Mono) -> Option<u64> {
        self.admission.oldest().map(|since| now.ms_since(since))
    }

    /// What is counted by model.
    #[must_use]
    pub fn meters(&self) -> &Meters {
        &self.meters
    }

    /// Requests that run on an engine.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.requests.values().filter(|request| request.running.is_some()).count()
    }

    /// Whether [`Input::Shutdown`] was given.
    #[must_use]
    pub fn is_shutting_down(&self) -> bool {
        self.ends_at.is_some()
    }

    /// Whether this process serves; `Err` says why not. A control plane without a single engine is
    /// ready: requests may wait.
    ///
    /// # Errors
    /// The first reason.
    pub fn ready(&self) -> Result<(), String> {
        if self.ends_at.is_some() {
            return Err("shutting down".into());
        }
        if let Some(trouble) = self.watch_trouble.as_ref().filter(|trouble| trouble.is_blind) {
            return Err(trouble.text.clone());
        }
        if self.local.is_some() && !self.listed {
            return Err("the runtime directory has not been listed yet".into());
        }
        Ok(())
    }

    /// Panics where the state contradicts itself. For tests and simulations.
    pub fn check_invariants(&self) {
        self.registry.check_invariants();
        self.admission.check_invariants();
        self.poller.check_invariants();
        self.sessions.check_invariants();
        if let Some(local) = &self.local {
            local.replicas.check_invariants();
        }
        let waiting = self.requests.values().filter(|request| request.running.is_none()).count();
        assert_eq!(waiting, self.admission.len(), "a request neither runs nor waits");
        let limited = self.requests.values().filter(|request| request.limit.is_some()).count();
        assert_eq!(limited, self.limits.len(), "a stray limit");
        let mut granted: BTreeMap<ReplicaRef, u32> = BTreeMap::new();
        for run in self.requests.values().filter_map(|request| request.running.as_ref()) {
            *granted.entry(run.grant.replica()).or_default() += run.grant.slots();
        }
        for (replica, known) in self.registry.replicas() {
            let ours = granted.get(&replica).copied().unwrap_or(0);
            assert_eq!(known.in_flight, ours, "the ledger of {} differs from its grants", known.key);
        }
    }

    // Nodes.

    fn answer(&mut self, reply: RequestId, done: Result<Effect, Fenced>, effects: &mut Vec<Effect>) {
        match done {
            Ok(effect) => effects.push(effect),
            Err(fenced) => {
                self.counts.fenced += 1;
                effects.push(Effect::Refuse(reply, Refusal::Fenced(fenced)));
            }
        }
    }

    /// What follows from changes of the registry: waiters are served, the log is told.
    fn follow(&mut self, changes: Vec<Change>, now: Now, effects: &mut Vec<Effect>) {
        for change in changes {
            if let Some(happening) = happening(&change, &self.registry) {
                self.happened(happening, now, effects);
            }
            match change {
                Change::ReplicaReady(replica) | Change::ReplicaCapacity(replica) => {
                    self.replicas_changed = true;
                    self.serve_waiters(replica, now, effects);
                }
                Change::ReplicaNotReady { .. } | Change::ReplicaGone { .. } => self.replicas_changed = true,
                Change::NodeStatus { node, to: NodeStatus::Offline, .. } | Change::NodeGone { node, .. } => {
                    self.recall(&node, effects);
                }
                Change::AskNode { node, pool, agent } => effects.push(Effect::AskAgent { node, pool, agent }),
                _ => {}
            }
        }
    }

    // This machine's engines.

    fn with_local(
        &mut self,
        now: Now,
        effects: &mut Vec<Effect>,
        act: impl FnOnce(&mut replicas::Registry, Now, &mut Vec<replicas::Change>),
    ) {
        let Some(local) = &mut self.local else { return };
        let mut found = Vec::new();
        act(&mut local.replicas, now, &mut found);
        for change in found {
            self.happened(change, now, effects);
        }
    }

    /// Shows the registry what the local engines have become.
    fn show_local(&mut self, now: Now, changes: &mut Vec<Change>) {
        let Some(local) = &mut self.local else { return };
        let revision = local.replicas.revision();
        if local.shown_revision != revision {
            local.shown_revision = revision;
            // The limits of a listing are within those of the registry.
            let _ = self.registry.set_local(&local.node, &local.replicas.pool_beats(), now, changes);
        }
    }

    fn note_watch(&mut self, trouble: Option<Trouble>, now: Now, effects: &mut Vec<Effect>) {
        self.watch_trouble.clone_from(&trouble);
        let (text, is_warning) = match trouble {
            Some(trouble) => (trouble.text, true),
            None => ("the runtime directory is watched again".into(), false),
        };
        let happening = Happening { kind: "daemon", subject: "watch".into(), state: "", text, is_warning };
        self.happened(happening, now, effects);
    }

    // Requests.

    fn ask(&mut self, id: RequestId, asked: Box<Asked>, now: Now, effects: &mut Vec<Effect>) {
        if self.ends_at.is_some() {
            return self.refuse(id, Refusal::ShuttingDown, effects);
        }
        let request = Request {
            asked,
            since: now.mono,
            attempts: 0,
            untried: 0,
            tried: Vec::new(),
            running: None,
            considered: None,
            limit: None,
            is_overdue: false,
        };
        self.requests.insert(id, Box::new(request));
        self.place(id, now, effects);
    }

    /// Gives a request a slot, or a place in the queue, or a refusal.
    fn place(&mut self, id: RequestId, now: Now, effects: &mut Vec<Effect>) {
        let Some(request) = self.requests.get_mut(&id) else { return };
        if request.is_overdue {
            return self.refuse(id, Refusal::OutOfTime, effects);
        }
        let (strategy, state) = (self.strategy, &mut self.strategy_state);
        let (ask, sessions) = (&request.asked.ask, &self.sessions);
        let placement =
            affinity::choose(&self.registry, ask, &request.tried, strategy, state, sessions, now.mono);
        let (first, tried) = (request.attempts == 0, !request.tried.is_empty());
        request.considered = Some(Considered::from(&placement));
        match placement.choice {
            Choice::Replica { replica, slots } => self.dispatch(id, replica, slots, now, effects),
            Choice::UnknownModel if first => {
                let model = request.asked.ask.model.clone().unwrap_or_default();
                let known = self.registry.models().into_iter().map(|model| model.name).collect();
                self.refuse(id, Refusal::UnknownModel { model, known }, effects);
            }
            Choice::UnknownPin if first && self.registry.is_prepared(ask) => {
                let reason = "what it asks for is being prepared".to_string();
                self.wait(id, Some(reason), now, effects);
            }
            Choice::UnknownPin if first => {
                let ask = request.asked.ask.clone();
                let refusal = match ask.node.as_ref().filter(|node| self.registry.node(node).is_none()) {
                    Some(node) => {
                        let reason = format!("node {node} is not known");
                        Refusal::Unready { reason, node: true, retry_ms: self.retry_ms(&ask, now) }
                    }
                    None => Refusal::UnknownPin,
                };
                self.refuse(id, refusal, effects);
            }
            Choice::ContextTooLong { longest_tokens } if first => {
                let wanted_tokens = ask.context_tokens.unwrap_or(0);
                self.refuse(id, Refusal::ContextTooLong { wanted_tokens, longest_tokens }, effects);
            }
            Choice::Busy => self.wait(id, None, now, effects),
            // Nobody else could: one that failed is as good as any once its circuit allows it.
            _ if tried => {
                let (strategy, state) = (self.strategy, &mut self.strategy_state);
                match choose(&self.registry, &request.wanted().ask, &[], strategy, state).choice {
                    Choice::Replica { replica, slots } => self.dispatch(id, replica, slots, now, effects),
                    Choice::NotReady { reason } => self.wait(id, Some(reason), now, effects),
                    _ => self.wait(id, None, now, effects),
                }
            }
            Choice::NotReady { reason } => self.wait(id, Some(reason), now, effects),
            Choice::Nothing | Choice::ContextTooLong { .. } | Choice::UnknownModel | Choice::UnknownPin => {
                self.wait(id, None, now, effects);
            }
        }
    }

    fn wait(&mut self, id: RequestId, not_ready: Option<String>, now: Now, effects: &mut Vec<Effect>) {
        let Some(request) = self.requests.get(&id) else { return };
        let deadline = request.asked.is_deadline.then(|| request.since.plus_ms(request.asked.wait_ms_max));
        let wait_ms = self.wait_ms_max.min(request.asked.wait_ms_max);
        let waiter = Waiter {
            id,
            ask: request.wanted(),
            priority: request.asked.priority,
            client: request.asked.client.clone(),
            since: request.since,
            deadline: request.since.plus_ms(wait_ms),
        };
        match self.admission.push(waiter) {
            Ok(position) => {
                self.hopes.looked.get_or_insert(now.mono);
                let considered = self.requests.get_mut(&id).and_then(|request| request.considered.take());
                let predicted_ms = self.predicted_ms(id, now);
                let is_late = |ms: &u64| deadline.is_some_and(|at| *ms > at.ms_since(now.mono));
                match predicted_ms.filter(is_late) {
                    Some(ms) => {
                        self.admission.remove(id);
                        let reason = format!("deadline_ms cannot be met: the start is expected in {ms} ms");
                        self.refuse(id, Refusal::Deadline(reason), effects);
                    }
                    None => {
                        let waiting =
                            Effect::Waiting { request: id, position, predicted_ms, not_ready, considered };
                        effects.push(waiting);
                    }
                }
            }
            Err(_) => {
                let (capacity, ask) = (self.admission.len(), request.asked.ask.clone());
                let retry_ms = self.retry_ms(&ask, now);
                self.refuse(id, Refusal::QueueFull { capacity, retry_ms }, effects);
            }
        }
    }

    fn dispatch(
        &mut self,
        id: RequestId,
        replica: ReplicaRef,
        slots: u32,
        now: Now,
        effects: &mut Vec<Effect>,
    ) {
        let Some(request) = self.requests.get_mut(&id) else { return };
        let Some(grant) = self.registry.acquire(replica, slots) else {
            return self.wait(id, None, now, effects);
        };
        let slots = grant.slots();
        let lease = self.local.as_mut().and_then(|local| local.lease(&self.registry, replica, slots));
        let Some(known) = self.registry.replica(replica) else { return };
        let auth_file =
            self.local.as_ref().and_then(|local| local.replicas.handoff(&known.key)?.auth_file.clone());
        let dispatch = Dispatch {
            node: known.node.clone(),
            key: known.key.clone(),
            generation: known.generation,
            target: known.target.clone(),
            slots: grant.slots(),
            auth_file,
            considered: request.considered.take(),
        };
        if let Some(Affinity::Session(key)) = &request.asked.ask.affinity {
            self.sessions.used(key, replica, now.mono);
        }
        if request.attempts == 0 {
            self.counts.waited.observe_ns(now.mono.ns_since(request.since));
        }
        request.attempts += 1;
        self.meters.dispatched(request.asked.ask.model.as_deref());
        let node = known.node.clone();
        request.running = Some(Run { grant, lease, node, since: now.mono, answering: false, abort: None });
        effects.push(Effect::Dispatch(id, dispatch));
        // A trial keeps everybody else away.
        self.replicas_changed |= self.registry.table().get_hot(replica).is_some_and(|hot| !hot.placeable);
    }

    fn answering(&mut self, id: RequestId, now: Now, changes: &mut Vec<Change>) {
        let Some(run) = self.requests.get_mut(&id).and_then(|request| request.running.as_mut()) else {
            return;
        };
        if !std::mem::replace(&mut run.answering, true) {
            self.counts.first_byte.observe_ns(now.mono.ns_since(run.since));
            let replica = run.grant.replica();
            self.registry.data_path_worked(replica, now, changes);
            if let (Some(local), Some(known)) = (&mut self.local, self.registry.replica(replica)) {
                local.replicas.data_path_worked(&known.key, known.generation, now);
            }
        }
    }

    fn ended(
        &mut self,
        id: RequestId,
        ending: Ending,
        now: Now,
        changes: &mut Vec<Change>,
        effects: &mut Vec<Effect>,
    ) {
        self.end_lease(id, now, effects);
        let Some(request) = self.requests.get_mut(&id) else { return };
        let Some(run) = request.running.take() else { return };
        let replica = run.grant.replica();
        let is_untried = self.registry.replica(replica).is_some_and(Replica::is_untried);
        request.untried += u32::from(is_untried && request.untried < UNTRIED_ATTEMPTS_MAX);
        let (since, attempts) = (request.since, request.attempts - request.untried);
        let abort = run.abort;
        match ending {
            Ending::Complete => {
                self.counts.answered += 1;
                self.counts.duration.observe_ns(now.mono.ns_since(since));
                self.learn(replica, now.mono.ms_since(run.since));
                self.over(id, Ended::Answered, now);
            }
            Ending::Withdrawn => {
                self.counts.withdrawn += 1;
                self.over(id, Ended::Withdrawn, now);
            }
            Ending::NotTried(reason) => self.refuse(id, Refusal::Overloaded(reason), effects),
            Ending::Failed { reason, connect, timeout, answered } => {
                request.tried.push(replica);
                let ask = request.asked.ask.clone();
                self.counts.failures.add(connect, timeout);
                self.engine_failed(replica, &reason, connect, timeout, now, changes, effects);
                self.registry.release(run.grant);
                if answered {
                    self.counts.broken += 1;
                    self.over(id, Ended::Broken, now);
                } else if timeout || attempts >= ATTEMPTS_MAX {
                    let retry_ms = self.retry_ms(&ask, now);
                    self.refuse(id, Refusal::EngineFailed { reason, timeout, retry_ms }, effects);
                } else {
                    self.counts.retried += 1;
                    self.place(id, now, effects);
                }
                return self.serve_waiters(replica, now, effects);
            }
            Ending::BrokenOff(reason) => {
                let ask = request.asked.ask.clone();
                self.counts.failures.add(false, false);
                self.engine_failed(replica, &reason, false, false, now, changes, effects);
                self.registry.release(run.grant);
                let retry_ms = self.retry_ms(&ask, now);
                self.refuse(id, Refusal::EngineFailed { reason, timeout: false, retry_ms }, effects);
                return self.serve_waiters(replica, now, effects);
            }
            Ending::NotReady { reason, pause_ms } => {
                request.tried.push(replica);
                let ask = request.asked.ask.clone();
                self.counts.failures.not_ready += 1;
                self.registry.data_path_not_ready(replica, pause_ms, &reason, now, changes);
                self.registry.release(run.grant);
                if attempts >= ATTEMPTS_MAX {
                    let retry_ms = self.retry_ms(&ask, now);
                    self.refuse(id, Refusal::EngineFailed { reason, timeout: false, retry_ms }, effects);
                } else {
                    self.counts.retried += 1;
                    self.place(id, now, effects);
                }
                return self.serve_waiters(replica, now, effects);
            }
            Ending::Aborted { answered: true } => {
                self.counts.broken += 1;
                self.over(id, Ended::Broken, now);
            }
            Ending::Aborted { .. } if matches!(abort, Some(Abort::Moved | Abort::Drained)) => {
                request.tried.push(replica);
                self.counts.failures.vanished += u64::from(abort == Some(Abort::Moved));
                self.counts.retried += 1;
                self.registry.release(run.grant);
                self.place(id, now, effects);
                return self.serve_waiters(replica, now, effects);
            }
            Ending::Aborted { .. } => self.refuse(id, Refusal::OutOfTime, effects),
        }
        self.release(run.grant, now, effects);
    }

    /// A request has ended that held a slot.
    fn over(&mut self, id: RequestId, how: Ended, now: Now) {
        if let Some(request) = self.forget(id) {
            let model = request.asked.ask.model.as_deref();
            self.meters.ended(model, how);
            self.drains.ended(model, now.mono);
        }
    }

    fn forget(&mut self, id: RequestId) -> Option<Box<Request>> {
        let request = self.requests.remove(&id)?;
        if let Some((at, _)) = request.limit {
            self.limits.remove(&(at, id));
        }
        Some(request)
    }

    #[expect(clippy::too_many_arguments, reason = "they are one failure")]
    fn engine_failed(
        &mut self,
        replica: ReplicaRef,
        reason: &str,
        connect: bool,
        timeout: bool,
        now: Now,
        changes: &mut Vec<Change>,
        effects: &mut Vec<Effect>,
    ) {
        let Some(known) = self.registry.replica(replica) else { return };
        let (key, generation) = (known.key.clone(), known.generation);
        let relayed = matches!(known.target, Target::Relay { .. });
        // Slow is not broken: a long prompt must not take an engine out of rotation.
        if !timeout {
            self.registry.data_path_failed(replica, reason, now, changes);
        }
        if connect && relayed {
            self.registry.agent_failed(replica, reason, now, changes);
        }
        let fault = if connect { Fault::ConnectFailed } else { Fault::Broken };
        self.with_local(now, effects, |local, now, found| {
            local.data_path_failed(&key, generation, fault, reason, now, found);
        });
    }

    fn release(&mut self, grant: Grant, now: Now, effects: &mut Vec<Effect>) {
        let replica = grant.replica();
        self.registry.release(grant);
        self.serve_waiters(replica, now, effects);
    }

    /// A request that waits is forgotten; one that runs ends by [`Input::Ended`].
    fn withdraw(&mut self, id: RequestId) {
        if self.admission.remove(id).is_some() {
            self.counts.withdrawn += 1;
            if let Some(request) = self.forget(id) {
                self.meters.ended(request.asked.ask.model.as_deref(), Ended::Withdrawn);
            }
        }
    }

    fn refuse(&mut self, id: RequestId, refusal: Refusal, effects: &mut Vec<Effect>) {
        *self.counts.refused.entry(refusal.label()).or_default() += 1;
        if let Some(request) = self.forget(id) {
            self.meters.ended(request.asked.ask.model.as_deref(), Ended::Refused);
        }
        effects.push(Effect::Refuse(id, refusal));
    }

    fn send_probes(&mut self, now: Now, effects: &mut Vec<Effect>) {
        let Some(local) = self.local.as_mut().filter(|local| local.replicas.has_orders(now.mono)) else {
            return;
        };
        effects.extend(local.replicas.take_process_orders().into_iter().map(Effect::Process));
        let mut orders = Vec::new();
        if self.ends_at.is_none() {
            local.replicas.due_probes(now, &mut orders);
        }
        effects.extend(orders.into_iter().map(Effect::Probe));
    }

    fn end_shutdown(&mut self, now: Now, effects: &mut Vec<Effect>) {
        if let Some(at) = self.ends_at
            && !self.over
            && (self.requests.is_empty() || now.mono >= at)
            && self.has_kept(now)
        {
            self.over = true;
            effects.push(Effect::Exit);
        }
    }

    fn happened(&mut self, what: impl Tell + 'static, now: Now, effects: &mut Vec<Effect>) {
        let what: Arc<dyn Tell> = Arc::new(what);
        self.events.push(what.clone(), now.wall);
        effects.push(Effect::Log(what));
    }
}
