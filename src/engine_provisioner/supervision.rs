//! What becomes of every engine: started, watched, replaced, stopped. PURE.
//!
//! An *engine* is a name (pool and replica) and the terms on which it should run. An *instance* is one
//! process tree that was started for it; most of the time there is one, during a replacement two.
//!
//! ```text
//!              first good answer, handoff written
//!   Starting ------------------------------------> Serving
//!      |                                              | to be stopped or replaced: handoff withdrawn,
//!      | fails, or is not wanted any more             | or already that of the successor
//!      |                                              v
//!      |        broken, not wanted             Draining (until nobody uses it, or a limit)
//!      |   +------------------------------------------|
//!      v   v                                          v
//!   Stopping: TERM, limit, TERM, limit, KILL ------> (ended)
//! ```
//!
//! The rules that matter most: a handoff is withdrawn before anything else happens to its instance, in the
//! same turn in which its end is known; only an instance that answered is ever published, and its successor
//! only after it did; a successor that fails leaves its predecessor where it is, or brings it back. When an
//! engine is started again, [`restarts`] decides.
//!
//! The core starts nothing and asks no clock: it is handed [`Input`]s and the time, and returns [`Effect`]s.

use std::collections::BTreeMap;
use std::fmt;

use crate::time::{Mono, earliest};
use crate::wire::id::ReplicaKey;
use restarts::{Failures, Storm};

pub mod restarts;
#[cfg(test)]
mod tests;

/// Pause between two looks at an engine that starts, in milliseconds: what its first request waits at most.
/// A refused connection or a 503 costs the engine nothing to speak of.
pub const START_PROBE_MS: u64 = 20;
/// Pause between two looks whether somebody still uses an engine, in milliseconds.
pub const DRAIN_ASK_MS: u64 = 50;
/// From the second SIGTERM to SIGKILL, in milliseconds: llama-server ends at once at a second one.
pub const SECOND_TERM_MS: u64 = 1_000;
/// How long a killed process is waited for, in milliseconds. One that hangs in a driver may never go.
pub const REAP_MS: u64 = 5_000;
/// So many times more often than a refused connection may a probe be slow or get an error answer: engines
/// answer late or with 503 while they read a long prompt.
pub const SOFT_FACTOR: u32 = 2;
/// Starts that lose their port to somebody else and are repeated at once; more is a failure.
pub const PORT_RACES_MAX: u32 = 5;

/// Names an instance.
pub type InstanceId = u64;
/// Names what an instance is started from; the shell knows what it says.
pub type SpecId = u64;

/// On which terms an engine runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Terms {
    /// What is started.
    pub spec: SpecId,
    /// How long it may take to become ready, in milliseconds.
    pub start_ms: u64,
    /// Pause between two probes of a serving engine, in milliseconds.
    pub health_every_ms: u64,
    /// Failed connections in a row that make it broken; 0 for never.
    pub health_failures_max: u32,
    /// How long running requests may take at its end, in milliseconds; 0 to stop at once.
    pub drain_ms: u64,
    /// From the first SIGTERM to the second, in milliseconds.
    pub stop_ms: u64,
    /// Whether a failed one is started again.
    pub restart: bool,
}

/// How an engine is brought to new terms.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Replace {
    /// The new instance is started beside the old one, which serves until the new one does.
    Overlap,
    /// The old one is stopped first: there is no room for both, or they need the same port.
    StopFirst,
}

/// What a probe saw.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Seen {
    /// It serves.
    Ready,
    /// It answered, but not that it serves, or not in time.
    Soft(String),
    /// No connection, or one that broke.
    Hard(String),
    /// This program could not ask: nothing is known.
    Unknown(String),
}

/// What happened.
#[derive(Clone, Debug)]
pub enum Input {
    /// An engine is wanted on these terms; one that runs on others is replaced as told.
    Want(ReplicaKey, Terms, Replace),
    /// An engine that runs already was found, and is wanted on these terms.
    Adopt(ReplicaKey, Terms),
    /// An engine is wanted no longer.
    Unwant(ReplicaKey),
    /// All are to end.
    Stop,
    /// All are to end at once.
    StopNow,
    /// A start was carried out.
    Spawned(InstanceId),
    /// It could not be.
    NotSpawned(InstanceId, String),
    /// A probe is over.
    Probed(InstanceId, Seen),
    /// The handoff is written.
    Published(InstanceId),
    /// It could not be.
    NotPublished(InstanceId, String),
    /// The first process of an instance ended, and how. `port_taken`: somebody else listens on its port.
    Exited {
        /// Which.
        instance: InstanceId,
        /// In words.
        how: String,
        /// Whether somebody else has its port.
        port_taken: bool,
    },
    /// Whether somebody still uses an instance that drains.
    InUse(InstanceId, bool),
    /// Time went by.
    Time,
}

/// What is to be done, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Start an instance; answered by `Spawned` or `NotSpawned`.
    Start(InstanceId, ReplicaKey, SpecId),
    /// Find the processes of an engine that runs already, as this instance.
    TakeOver(InstanceId, ReplicaKey, SpecId),
    /// Ask whether it serves; answered by `Probed`.
    Probe(InstanceId),
    /// Write its handoff; answered by `Published` or `NotPublished`.
    Publish(InstanceId),
    /// Remove its handoff.
    Withdraw(InstanceId),
    /// Look whether somebody uses it; answered by `InUse`.
    AskInUse(InstanceId),
    /// SIGTERM to its processes.
    Terminate(InstanceId),
    /// SIGKILL to its processes.
    Kill(InstanceId),
    /// Its first process ended: end the others, and forget it.
    Reap(InstanceId),
    /// Tell whoever watches.
    Tell(ReplicaKey, Told),
    /// It failed, is not started again, and so all is over.
    GiveUp(InstanceId, String),
}

/// What is told about an engine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Told {
    /// It serves.
    Serving(InstanceId),
    /// It failed and is started again after a pause.
    Failed {
        /// Why.
        reason: String,
        /// Until the next start, in milliseconds.
        retry_ms: u64,
        /// Failures in a row.
        failures: u32,
        /// Whether its breaker is open.
        is_open: bool,
    },
    /// It lost its port to somebody else and is started again at once.
    PortLost,
    /// Too many engines are started again: it waits so long, in milliseconds.
    Storm(u64),
    /// A replacement is started.
    Replacing(Replace),
    /// The replacement failed, and why; what was there before serves, or is started again.
    KeptOld(String),
    /// The old instance gave way to the new one.
    Replaced,
    /// Requests were still running at the end of the time that they were given.
    DrainCut,
    /// SIGTERM was not enough.
    Stubborn,
    /// SIGKILL was not enough either.
    Stuck,
}

#[derive(Debug)]
struct Engine {
    /// On which terms it should run; `None` when it is to go.
    terms: Option<Terms>,
    /// What ran before terms that have not proven themselves.
    fallback: Option<Terms>,
    current: Option<InstanceId>,
    next: Option<InstanceId>,
    /// Not started again before then.
    not_before: Option<Mono>,
    failures: Failures,
    races: u32,
}

#[derive(Debug)]
struct Instance {
    key: ReplicaKey,
    terms: Terms,
    stage: Stage,
    published: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Stage {
    Starting { until: Mono, probe_at: Option<Mono>, last: Option<String> },
    Serving { since: Mono, probe_at: Option<Mono>, hard: u32, soft: u32 },
    Draining { until: Mono, ask_at: Option<Mono> },
    Stopping { step: Step, until: Mono },
    Stuck,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Term,
    SecondTerm,
    Kill,
}

/// All engines of this program.
#[derive(Debug)]
pub struct Supervision {
    engines: BTreeMap<ReplicaKey, Engine>,
    instances: BTreeMap<InstanceId, Instance>,
    next_id: InstanceId,
    storm: Storm,
    rng: fastrand::Rng,
    stopping: bool,
}

impl Supervision {
    /// Without engines; `rng` shortens pauses.
    #[must_use]
    pub fn new(rng: fastrand::Rng) -> Supervision {
        Supervision {
            engines: BTreeMap::new(),
            instances: BTreeMap::new(),
            next_id: 1,
            storm: Storm::default(),
            rng,
            stopping: false,
        }
    }

    /// Takes what happened. What is to be done is appended to `out`.
    pub fn handle(&mut self, input: Input, now: Mono, out: &mut Vec<Effect>) {
        match input {
            Input::Want(key, terms, replace) => self.want(key, terms, replace, now, out),
            Input::Adopt(key, terms) => self.adopt(key, terms, now, out),
            Input::Unwant(key) => self.unwant(&key, now, out),
            Input::Stop => self.stop(now, out),
            Input::StopNow => {
                self.stop(now, out);
                let all: Vec<InstanceId> = self.instances.keys().copied().collect();
                for id in all {
                    self.kill(id, now, out);
                }
            }
            Input::Spawned(id) => {
                if let Some(Instance { stage: Stage::Starting { probe_at, .. }, .. }) =
                    self.instances.get_mut(&id)
                {
                    *probe_at = Some(now);
                }
            }
            Input::NotSpawned(id, reason) => {
                self.fail(id, reason, now, out);
                self.remove(id);
            }
            Input::Probed(id, seen) => self.probed(id, seen, now, out),
            Input::Published(id) => self.published(id, now, out),
            Input::NotPublished(id, reason) => {
                self.fail(id, reason, now, out);
                self.terminate(id, now, out);
            }
            Input::Exited { instance, how, port_taken } => self.exited(instance, &how, port_taken, now, out),
            Input::InUse(id, in_use) => self.in_use(id, in_use, now, out),
            Input::Time => {}
        }
        self.pass_time(now, out);
        self.start_what_is_due(now, out);
    }

    /// When [`Input::Time`] is due.
    #[must_use]
    pub fn deadline(&self) -> Option<Mono> {
        // One whose earlier instance still ends is started when that has, not at a time.
        let is_held = |key: &ReplicaKey| self.instances.values().any(|instance| instance.key == *key);
        let waits = self.engines.iter().filter(|(key, engine)| engine.current.is_none() && !is_held(key));
        let starts = waits.filter_map(|(_, engine)| engine.not_before).min();
        let stages = self.instances.values().filter_map(|instance| match &instance.stage {
            Stage::Starting { until, probe_at, .. } => earliest(Some(*until), *probe_at),
            Stage::Serving { probe_at, .. } => *probe_at,
            Stage::Draining { until, ask_at } => earliest(Some(*until), *ask_at),
            Stage::Stopping { until, .. } => Some(*until),
            Stage::Stuck => None,
        });
        earliest(starts, stages.min())
    }

    /// Whether all was stopped and nothing is left that could still end.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.stopping && self.instances.values().all(|instance| instance.stage == Stage::Stuck)
    }

    /// Whether all is to end.
    #[must_use]
    pub fn is_stopping(&self) -> bool {
        self.stopping
    }

    /// Whether an instance has not become ready yet.
    #[must_use]
    pub fn is_starting(&self, id: InstanceId) -> bool {
        self.instances.get(&id).is_some_and(|i| matches!(i.stage, Stage::Starting { .. }))
    }

    /// The name of an instance's engine.
    #[must_use]
    pub fn key_of(&self, id: InstanceId) -> Option<&ReplicaKey> {
        self.instances.get(&id).map(|instance| &instance.key)
    }

    /// One word for what an engine does now.
    #[must_use]
    pub fn state_of(&self, id: InstanceId) -> &'static str {
        match self.instances.get(&id).map(|instance| &instance.stage) {
            Some(Stage::Starting { .. }) => "starting",
            Some(Stage::Serving { .. }) => "serving",
            Some(Stage::Draining { .. }) => "draining",
            Some(Stage::Stopping { .. }) => "stopping",
            Some(Stage::Stuck) => "stuck",
            None => "ended",
        }
    }

    /// Panics where the state contradicts itself.
    #[cfg(test)]
    fn check_invariants(&self) {
        for (key, engine) in &self.engines {
            for id in engine.current.iter().chain(&engine.next) {
                let instance = self.instances.get(id).expect("an engine's instance exists");
                assert_eq!(&instance.key, key);
                assert!(
                    matches!(instance.stage, Stage::Starting { .. } | Stage::Serving { .. }),
                    "what leaves belongs to nobody: {instance:?}"
                );
            }
            assert!(engine.next.is_none() || engine.current.is_some(), "a successor needs a predecessor");
            assert!(engine.current.is_none() || engine.current != engine.next);
            let published =
                self.instances.iter().filter(|(_, i)| i.published && i.key == *key).map(|(id, _)| *id);
            assert!(published.clone().count() <= 1, "one file, one instance");
            assert!(published.clone().all(|id| Some(id) == engine.current), "only what serves is published");
        }
    }

    fn want(&mut self, key: ReplicaKey, terms: Terms, replace: Replace, now: Mono, out: &mut Vec<Effect>) {
        if self.stopping {
            return;
        }
        let engine = self.engines.entry(key.clone()).or_insert_with(Engine::new);
        // An operator's wish is a new beginning.
        engine.failures.forget();
        engine.not_before = None;
        let unfinished = engine.next.take();
        let is_serving = |id: &InstanceId| {
            self.instances.get(id).is_some_and(|instance| matches!(instance.stage, Stage::Serving { .. }))
        };
        let leaving = match (engine.current.filter(is_serving), engine.terms) {
            (Some(old), Some(before)) => {
                out.push(Effect::Tell(key.clone(), Told::Replacing(replace)));
                match replace {
                    Replace::Overlap => {
                        let id = self.next_id;
                        self.next_id += 1;
                        engine.next = Some(id);
                        self.instances.insert(id, Instance::starting(key.clone(), terms, now));
                        out.push(Effect::Start(id, key, terms.spec));
                        None
                    }
                    Replace::StopFirst => {
                        engine.terms = Some(terms);
                        engine.fallback = Some(before);
                        engine.current = None;
                        Some(old)
                    }
                }
            }
            // Nothing serves: what starts on other terms makes room.
            _ => {
                engine.terms = Some(terms);
                engine.current.take()
            }
        };
        for id in leaving.into_iter().chain(unfinished) {
            self.leave(id, now, out);
        }
    }

    fn adopt(&mut self, key: ReplicaKey, terms: Terms, now: Mono, out: &mut Vec<Effect>) {
        let engine = self.engines.entry(key.clone()).or_insert_with(Engine::new);
        if self.stopping || engine.current.is_some() {
            return;
        }
        let id = self.next_id;
        self.next_id += 1;
        engine.terms = Some(terms);
        engine.current = Some(id);
        self.instances.insert(id, Instance::starting(key.clone(), terms, now));
        out.push(Effect::TakeOver(id, key, terms.spec));
    }

    fn unwant(&mut self, key: &ReplicaKey, now: Mono, out: &mut Vec<Effect>) {
        let Some(engine) = self.engines.remove(key) else { return };
        for id in engine.current.into_iter().chain(engine.next) {
            self.leave(id, now, out);
        }
    }

    fn stop(&mut self, now: Mono, out: &mut Vec<Effect>) {
        self.stopping = true;
        let keys: Vec<ReplicaKey> = self.engines.keys().cloned().collect();
        for key in keys {
            self.unwant(&key, now, out);
        }
    }

    fn probed(&mut self, id: InstanceId, seen: Seen, now: Mono, out: &mut Vec<Effect>) {
        let Some(instance) = self.instances.get_mut(&id) else { return };
        let terms = instance.terms;
        let broken = match &mut instance.stage {
            Stage::Starting { probe_at, last, .. } => {
                match seen {
                    Seen::Ready => out.push(Effect::Publish(id)),
                    Seen::Soft(why) | Seen::Hard(why) | Seen::Unknown(why) => {
                        *probe_at = Some(now.plus_ms(START_PROBE_MS));
                        *last = Some(why);
                    }
                }
                return;
            }
            Stage::Serving { probe_at, hard, soft, .. } => {
                *probe_at = Some(now.plus_ms(terms.health_every_ms));
                let max = terms.health_failures_max;
                match seen {
                    Seen::Ready => {
                        (*hard, *soft) = (0, 0);
                        return;
                    }
                    Seen::Unknown(_) => return,
                    Seen::Soft(why) => {
                        *soft += 1;
                        (max > 0 && *soft + *hard >= max.saturating_mul(SOFT_FACTOR)).then_some(why)
                    }
                    Seen::Hard(why) => {
                        *hard += 1;
                        (max > 0 && *hard >= max).then_some(why)
                    }
                }
            }
            _ => return,
        };
        if let Some(why) = broken {
            self.fail(id, format!("the engine does not answer its health probes any more: {why}"), now, out);
            self.terminate(id, now, out);
        }
    }

    fn published(&mut self, id: InstanceId, now: Mono, out: &mut Vec<Effect>) {
        let Some(instance) = self.instances.get_mut(&id) else { return };
        let key = instance.key.clone();
        instance.published = true;
        let terms = instance.terms;
        let probe_at = Some(now.plus_ms(terms.health_every_ms));
        instance.stage = Stage::Serving { since: now, probe_at, hard: 0, soft: 0 };
        let engine = self.engines.get_mut(&key);
        let Some(engine) = engine.filter(|e| e.current == Some(id) || e.next == Some(id)) else {
            return self.leave(id, now, out);
        };
        engine.fallback = None;
        engine.races = 0;
        out.push(Effect::Tell(key.clone(), Told::Serving(id)));
        if engine.next == Some(id) {
            engine.next = None;
            engine.terms = Some(terms);
            let old = engine.current.replace(id);
            if let Some(old) = old {
                // The file speaks of the new one by now.
                self.instances.entry(old).and_modify(|instance| instance.published = false);
                self.leave(old, now, out);
            }
            out.push(Effect::Tell(key, Told::Replaced));
        }
    }

    fn exited(&mut self, id: InstanceId, how: &str, port_taken: bool, now: Mono, out: &mut Vec<Effect>) {
        let Some(instance) = self.instances.get(&id) else { return };
        let key = instance.key.clone();
        match &instance.stage {
            Stage::Starting { .. } => {
                let engine = self.engines.get_mut(&key).filter(|engine| engine.current == Some(id));
                match engine.filter(|engine| port_taken && engine.races < PORT_RACES_MAX) {
                    Some(engine) => {
                        engine.races += 1;
                        engine.current = None;
                        out.push(Effect::Tell(key, Told::PortLost));
                    }
                    None => {
                        let hint = if port_taken { " (another process has its port)" } else { "" };
                        let reason = format!("the engine ended before it was healthy: {how}{hint}");
                        self.fail(id, reason, now, out);
                    }
                }
            }
            Stage::Serving { .. } => {
                self.fail(id, format!("the engine ended by itself: {how}"), now, out);
            }
            Stage::Draining { .. } | Stage::Stopping { .. } | Stage::Stuck => {}
        }
        out.push(Effect::Reap(id));
        self.remove(id);
    }

    fn in_use(&mut self, id: InstanceId, in_use: bool, now: Mono, out: &mut Vec<Effect>) {
        let Some(Instance { stage: Stage::Draining { ask_at, .. }, .. }) = self.instances.get_mut(&id) else {
            return;
        };
        *ask_at = Some(now.plus_ms(DRAIN_ASK_MS));
        if !in_use {
            self.terminate(id, now, out);
        }
    }

    /// An instance did not do what it should. Its handoff goes; what comes next is decided. Its processes
    /// are the caller's to end.
    fn fail(&mut self, id: InstanceId, reason: String, now: Mono, out: &mut Vec<Effect>) {
        self.withdraw(id, out);
        let Some(instance) = self.instances.get(&id) else { return };
        let served_ms = match instance.stage {
            Stage::Serving { since, .. } => Some(now.ms_since(since)),
            _ => None,
        };
        let (key, restart) = (instance.key.clone(), instance.terms.restart);
        let Some(engine) = self.engines.get_mut(&key) else { return };
        if engine.next == Some(id) {
            engine.next = None;
            out.push(Effect::Tell(key, Told::KeptOld(reason)));
            return;
        }
        if engine.current != Some(id) {
            return;
        }
        engine.current = None;
        // A successor that is on its way takes the place of the one that failed.
        if let Some(next) = engine.next.take() {
            engine.current = Some(next);
            engine.terms = self.instances.get(&next).map(|next| next.terms).or(engine.terms);
            return;
        }
        if let Some(fallback) = engine.fallback.take().filter(|_| served_ms.is_none()) {
            engine.terms = Some(fallback);
            out.push(Effect::Tell(key, Told::KeptOld(reason)));
            return;
        }
        if !restart {
            out.push(Effect::GiveUp(id, reason));
            return self.stop(now, out);
        }
        let pause = engine.failures.add(served_ms, &mut self.rng);
        engine.not_before = Some(now.plus_ms(pause.ms));
        let failures = engine.failures.count();
        out.push(Effect::Tell(
            key,
            Told::Failed { reason, retry_ms: pause.ms, failures, is_open: pause.is_open },
        ));
    }

    fn withdraw(&mut self, id: InstanceId, out: &mut Vec<Effect>) {
        if let Some(instance) = self.instances.get_mut(&id)
            && std::mem::take(&mut instance.published)
        {
            out.push(Effect::Withdraw(id));
        }
    }

    /// A sound instance is to go: what serves may finish its requests.
    fn leave(&mut self, id: InstanceId, now: Mono, out: &mut Vec<Effect>) {
        self.withdraw(id, out);
        let Some(instance) = self.instances.get_mut(&id) else { return };
        match instance.stage {
            Stage::Serving { .. } if instance.terms.drain_ms > 0 => {
                let until = now.plus_ms(instance.terms.drain_ms);
                instance.stage = Stage::Draining { until, ask_at: Some(now) };
            }
            Stage::Starting { .. } | Stage::Serving { .. } => self.terminate(id, now, out),
            Stage::Draining { .. } | Stage::Stopping { .. } | Stage::Stuck => {}
        }
    }

    fn terminate(&mut self, id: InstanceId, now: Mono, out: &mut Vec<Effect>) {
        let Some(instance) = self.instances.get_mut(&id) else { return };
        if !matches!(instance.stage, Stage::Stopping { .. } | Stage::Stuck) {
            let until = now.plus_ms(instance.terms.stop_ms);
            instance.stage = Stage::Stopping { step: Step::Term, until };
            out.push(Effect::Terminate(id));
        }
    }

    fn kill(&mut self, id: InstanceId, now: Mono, out: &mut Vec<Effect>) {
        self.withdraw(id, out);
        let Some(instance) = self.instances.get_mut(&id) else { return };
        if !matches!(instance.stage, Stage::Stopping { step: Step::Kill, .. } | Stage::Stuck) {
            instance.stage = Stage::Stopping { step: Step::Kill, until: now.plus_ms(REAP_MS) };
            out.push(Effect::Kill(id));
        }
    }

    fn remove(&mut self, id: InstanceId) {
        if let Some(instance) = self.instances.remove(&id)
            && let Some(engine) = self.engines.get_mut(&instance.key)
        {
            engine.current.take_if(|current| *current == id);
            engine.next.take_if(|next| *next == id);
        }
    }

    fn pass_time(&mut self, now: Mono, out: &mut Vec<Effect>) {
        let ids: Vec<InstanceId> = self.instances.keys().copied().collect();
        for id in ids {
            self.pass_time_of(id, now, out);
        }
    }

    fn pass_time_of(&mut self, id: InstanceId, now: Mono, out: &mut Vec<Effect>) {
        let Some(instance) = self.instances.get_mut(&id) else { return };
        let is_due = |at: &mut Option<Mono>| at.take_if(|at| *at <= now).is_some();
        let key = instance.key.clone();
        match &mut instance.stage {
            Stage::Starting { until, last, .. } if *until <= now => {
                let last = last.take().unwrap_or_else(|| "nothing yet".into());
                let ms = instance.terms.start_ms;
                let reason = format!("the engine was not healthy within {ms} ms; it last said: {last}");
                self.fail(id, reason, now, out);
                self.terminate(id, now, out);
            }
            Stage::Starting { probe_at, .. } | Stage::Serving { probe_at, .. } => {
                if is_due(probe_at) {
                    out.push(Effect::Probe(id));
                }
            }
            Stage::Draining { until, .. } if *until <= now => {
                if instance.terms.drain_ms > 0 {
                    out.push(Effect::Tell(key, Told::DrainCut));
                }
                self.terminate(id, now, out);
            }
            Stage::Draining { ask_at, .. } => {
                if is_due(ask_at) {
                    out.push(Effect::AskInUse(id));
                }
            }
            Stage::Stopping { step, until } if *until <= now => match step {
                Step::Term => {
                    (*step, *until) = (Step::SecondTerm, now.plus_ms(SECOND_TERM_MS));
                    out.push(Effect::Tell(key, Told::Stubborn));
                    out.push(Effect::Terminate(id));
                }
                Step::SecondTerm => self.kill(id, now, out),
                Step::Kill => {
                    instance.stage = Stage::Stuck;
                    out.push(Effect::Tell(key, Told::Stuck));
                }
            },
            Stage::Stopping { .. } | Stage::Stuck => {}
        }
    }

    /// An engine is started once its time has come and none of its earlier instances is left: these hold
    /// the memory that it needs.
    fn start_what_is_due(&mut self, now: Mono, out: &mut Vec<Effect>) {
        let Supervision { engines, instances, next_id, storm, .. } = self;
        for (key, engine) in engines.iter_mut() {
            let Some(terms) = engine.terms.filter(|_| engine.current.is_none()) else { continue };
            let is_waiting = engine.not_before.is_some_and(|at| at > now);
            if is_waiting || instances.values().any(|instance| instance.key == *key) {
                continue;
            }
            if engine.failures.count() > 0
                && let Err(at) = storm.admit(now)
            {
                engine.not_before = Some(at);
                out.push(Effect::Tell(key.clone(), Told::Storm(at.ms_since(now))));
                continue;
            }
            engine.not_before = None;
            engine.current = Some(*next_id);
            instances.insert(*next_id, Instance::starting(key.clone(), terms, now));
            out.push(Effect::Start(*next_id, key.clone(), terms.spec));
            *next_id += 1;
        }
    }
}

impl Engine {
    fn new() -> Engine {
        Engine {
            terms: None,
            fallback: None,
            current: None,
            next: None,
            not_before: None,
            failures: Failures::default(),
            races: 0,
        }
    }
}

impl Instance {
    fn starting(key: ReplicaKey, terms: Terms, now: Mono) -> Instance {
        // Probed once it was spawned.
        let stage = Stage::Starting { until: now.plus_ms(terms.start_ms), probe_at: None, last: None };
        Instance { key, terms, stage, published: false }
    }
}

impl fmt::Display for Told {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Told::Serving(_) => f.write_str("serves"),
            Told::Failed { reason, retry_ms, failures, is_open } => {
                let breaker = if *is_open { " (its breaker is open)" } else { "" };
                write!(
                    f,
                    "{reason}; it is started again in {:.1} s after {failures} failures in a row{breaker}",
                    *retry_ms as f64 / 1e3
                )
            }
            Told::PortLost => {
                f.write_str("another process took its port: it is started again with another one")
            }
            Told::Storm(ms) => write!(
                f,
                "{} engines were started again within {} s: it waits {:.1} s more",
                restarts::STORM_STARTS_MAX,
                restarts::STORM_WINDOW_MS / 1_000,
                *ms as f64 / 1e3
            ),
            Told::Replacing(Replace::Overlap) => {
                f.write_str("its replacement is started beside it, and takes over once it serves")
            }
            Told::Replacing(Replace::StopFirst) => {
                f.write_str("it is stopped to be replaced: there is no room for two")
            }
            Told::KeptOld(why) => write!(f, "its replacement failed, so the old one stays: {why}"),
            Told::Replaced => f.write_str("its replacement serves; the old one finishes what it has"),
            Told::DrainCut => f.write_str("requests still run at the end of the time that they were given"),
            Told::Stubborn => f.write_str("it did not end after SIGTERM: it is sent another one"),
            Told::Stuck => {
                f.write_str("its process does not even react to SIGKILL, and still holds its memory")
            }
        }
    }
}
