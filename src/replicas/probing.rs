//! Whether the engines behind the replicas answer: which probes are due, what their outcomes and the
//! data path's experience mean.
//!
//! The registry keeps at most one probe under way for a replica and [`PROBES_MAX`] in all. A probe
//! is an order that the caller carries out; its outcome comes back under the order's id, and one
//! that does not come back is given up. After its first good answer and before it is announced as
//! ready, an engine is asked once what it serves: see `profile.rs`.

use std::collections::BTreeSet;

use super::change::{Cause, Change, State};
use super::hang::canary_timeout_ms;
use super::health::{PROBE_TIMEOUT_MS, SUSPECT_DELAY_MS_MIN, Sign, Verdict};
use super::profile::{Engine, Facts};
use super::registry::{Registry, Replica};
use crate::time::{Mono, Now, earliest};
use crate::wire::id::{PoolId, ReplicaKey};
use crate::wire::url::BaseUrl;

/// Most probes under way at once: each holds a socket, and the usual limit is 1,024 of them.
pub const PROBES_MAX: usize = 256;
/// When a probe without an answer is given up, in milliseconds after it was ordered: its own limit,
/// and time for the answer to be delivered.
pub const PROBE_LOST_MS: u64 = PROBE_TIMEOUT_MS + 5_000;
/// Shortest pause before a probe that the data path asks for, in milliseconds after the last one:
/// failing requests may come by the thousand.
pub const PROBE_GAP_MS: u64 = 2_000;
/// Longest text from an engine that is shown as a reason, in characters.
const SHOWN_CHARS_MAX: usize = 200;
/// Most probes that are started in one turn of the loop: each is a connect of some tens of microseconds.
pub const PROBES_PER_TURN_MAX: usize = 32;
/// How long an engine may take to start, in milliseconds, beside the time that reading its model takes.
pub const START_MS_MAX: u64 = 600_000;
/// Slowest reading of a model that counts as progress, in bytes a millisecond: a busy network disk.
pub const MODEL_BYTES_PER_MS_MIN: u64 = 50_000;
/// Longest that reading a model may take, in milliseconds, however large a file says it is.
pub const MODEL_READING_MS_MAX: u64 = 6 * 3_600_000;
/// So many times longer may an engine take that is known to be alive.
pub const START_ALIVE_FACTOR: u64 = 3;

/// A probe to be sent. Its outcome is handed to [`Registry::probed`] with the same id.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProbeOrder {
    /// Names this probe.
    pub id: ProbeId,
    /// The engine.
    pub url: BaseUrl,
    /// Path below the URL's own.
    pub path: String,
    /// Body of a POST; a GET without one.
    pub body: Option<String>,
    /// What is asked.
    pub kind: ProbeKind,
    /// How long the whole answer may take, in milliseconds.
    pub timeout_ms: u64,
    /// File that holds the key which the engine wants to see.
    pub auth_file: Option<String>,
}

/// Names a probe: an outcome counts only for the engine and the order that it belongs to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProbeId {
    /// The replica.
    pub key: ReplicaKey,
    /// Its generation when the probe was ordered.
    pub serial: u64,
    /// Number of the order.
    pub seq: u64,
}

/// What a probe asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProbeKind {
    /// Whether the engine serves: any 200 will do.
    Health,
    /// Which models it serves, as the OpenAI list tells it.
    Models,
    /// llama.cpp's own properties.
    Props,
    /// TGI's own properties.
    Info,
    /// Whether it still produces anything: a request for one token.
    Canary,
}

/// How a probe ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ProbeOutcome {
    /// 200.
    Healthy,
    /// 200, and what the answer tells.
    Facts(Facts),
    /// A 5xx status: 503 while loading.
    Loading(u16),
    /// Any other status.
    Unhealthy {
        /// The status.
        status: u16,
    },
    /// 401 or 403.
    Unauthorized {
        /// The status.
        status: u16,
        /// What is wrong with the key, as far as it can be told without showing it.
        why: String,
    },
    /// No connection.
    Refused(String),
    /// This process could not ask, and why: nothing is known.
    NotAsked(String),
    /// No answer in time.
    Slow,
    /// A reset, or an answer that is no HTTP or cut off.
    Broken(String),
}

/// How a request failed, as the data path saw it. An engine's 4xx and 500 are no such failures, and
/// neither is a client that left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It could not connect.
    ConnectFailed,
    /// Reset, cut off, or answered with 502, 503 or 504.
    Broken,
}

#[derive(Debug)]
pub(super) struct Outstanding {
    seq: u64,
    kind: ProbeKind,
    lost_at: Mono,
    /// The data path failed after this probe was sent: a good answer proves nothing.
    outdated: bool,
}

/// Replicas by the time at which something has to be done about them.
#[derive(Debug, Default)]
pub(super) struct Schedule {
    /// To be probed; none of them has a probe under way.
    due: BTreeSet<(Mono, ReplicaKey)>,
    /// With a probe under way, and when that is given up.
    lost: BTreeSet<(Mono, ReplicaKey)>,
}

impl Registry {
    /// Hands out the probes that are due, at most [`PROBES_MAX`] under way at once and one a replica.
    pub fn due_probes(&mut self, now: Now, orders: &mut Vec<ProbeOrder>) {
        while let Some((at, key)) = self.schedule.lost.first().filter(|(at, _)| *at <= now.mono).cloned() {
            self.schedule.lost.remove(&(at, key.clone()));
            if let Some(replica) = self.replicas.get_mut(&key) {
                replica.probe = None;
                self.schedule.set(&key, replica, Some(now.mono));
            }
        }
        self.clock = now;
        if self.batch.0 != now.mono {
            self.batch = (now.mono, 0);
        }
        while self.schedule.lost.len() < PROBES_MAX
            && self.batch.1 < PROBES_PER_TURN_MAX
            && let Some((at, key)) = self.schedule.due.first().filter(|(at, _)| *at <= now.mono).cloned()
        {
            self.schedule.due.remove(&(at, key.clone()));
            let Some(replica) = self.replicas.get_mut(&key) else { continue };
            self.batch.1 += 1;
            let kind = if replica.hang.wants_canary() { ProbeKind::Canary } else { replica.next_kind };
            let timeout_ms = match kind {
                ProbeKind::Canary => canary_timeout_ms(self.hang_suspect_ms),
                _ => PROBE_TIMEOUT_MS,
            };
            let lost_at = now.mono.plus_ms(timeout_ms + PROBE_LOST_MS - PROBE_TIMEOUT_MS);
            let seq = self.next_seq;
            self.next_seq += 1;
            replica.due_at = None;
            replica.ordered_at = Some(now.mono);
            replica.probe = Some(Outstanding { seq, kind, lost_at, outdated: false });
            self.schedule.lost.insert((lost_at, key.clone()));
            orders.push(ProbeOrder {
                id: ProbeId { key, serial: replica.serial, seq },
                url: replica.handoff.url.clone(),
                path: kind.path(&replica.handoff.health_path).into(),
                body: (kind == ProbeKind::Canary).then(|| replica.canary_body()),
                kind,
                timeout_ms,
                auth_file: replica.handoff.auth_file.clone(),
            });
        }
    }

    /// Asks a pool's engines as soon as the gap between two probes allows.
    pub fn ask_pool(&mut self, pool: &PoolId, now: Now) {
        let Registry { replicas, schedule, .. } = self;
        for (key, replica) in replicas.iter_mut().filter(|(key, _)| key.pool == *pool) {
            let last = replica.ordered_at.map_or(now.mono, |at| at.plus_ms(PROBE_GAP_MS));
            replica.health.probe_by(last.max(now.mono));
            if replica.probe.is_none() {
                schedule.reset(key, replica);
            }
        }
    }

    /// When [`Registry::due_probes`] is to be called next.
    #[must_use]
    pub fn deadline(&self) -> Option<Mono> {
        let due = self.schedule.due.first().filter(|_| self.schedule.lost.len() < PROBES_MAX);
        // What one turn may not start any more is for the next.
        let next_turn = Mono(self.batch.0.0 + u64::from(self.batch.1 >= PROBES_PER_TURN_MAX));
        earliest(due.map(|(at, _)| (*at).max(next_turn)), self.schedule.lost.first().map(|(at, _)| *at))
    }

    /// Whether there are orders to be taken now.
    #[must_use]
    pub fn has_orders(&self, now: Mono) -> bool {
        !self.process_orders.is_empty() || self.deadline().is_some_and(|at| at <= now)
    }

    /// Takes a probe's outcome. One that belongs to an earlier engine or order is ignored.
    pub fn probed(&mut self, id: &ProbeId, outcome: ProbeOutcome, now: Now, changes: &mut Vec<Change>) {
        let Some(replica) = self.replicas.get_mut(&id.key).filter(|replica| replica.serial == id.serial)
        else {
            return;
        };
        let Some(probe) = replica.probe.take_if(|probe| probe.seq == id.seq) else { return };
        self.schedule.lost.remove(&(probe.lost_at, id.key.clone()));
        if matches!(outcome, ProbeOutcome::NotAsked(_)) {
            let at = now.mono.plus_ms(PROBE_GAP_MS);
            return self.schedule.set(&id.key, replica, Some(at));
        }
        if probe.kind == ProbeKind::Canary {
            return self.canary_ended(&id.key, &outcome, now, changes);
        }
        let sign = sign_of(&outcome);
        if probe.outdated && sign == Sign::Healthy {
            let at = now.mono.plus_ms(SUSPECT_DELAY_MS_MIN);
            self.schedule.set(&id.key, replica, Some(at));
            return;
        }
        let reason = replica.explain(probe.kind, &outcome);
        let sign = match replica.learn(probe.kind, outcome, sign, &id.key, changes) {
            Learned::AskOn(kind) => {
                replica.next_kind = kind;
                self.schedule.set(&id.key, replica, Some(now.mono));
                return;
            }
            Learned::Judge(sign) => sign,
        };
        self.judge(&id.key, sign, reason, now, changes);
    }

    /// What a sign means for a replica.
    fn judge(&mut self, key: &ReplicaKey, sign: Sign, reason: String, now: Now, changes: &mut Vec<Change>) {
        let Some(replica) = self.replicas.get_mut(key) else { return };
        let before = replica.state();
        let mut rose = false;
        match replica.health.observe(sign, now.mono) {
            Verdict::Rose => {
                replica.enter(State::Ready, "answers its health probe".into());
                rose = true;
            }
            Verdict::Fell => {
                if sign == Sign::Down {
                    // It may come back as another process, with other models.
                    replica.forget_facts();
                }
                replica.enter(State::Suspect, reason.clone());
            }
            Verdict::Unchanged if replica.phase != State::Ready => {
                let reason = replica.health.waits().unwrap_or_else(|| reason.clone());
                if replica.reason != reason {
                    replica.reason.clone_from(&reason);
                    if replica.state() == replica.phase {
                        self.revision += 1;
                        changes.push(Change::Reason { key: key.clone(), state: replica.phase, reason });
                    }
                }
            }
            Verdict::Unchanged => {}
        }
        // A suspicion that came with this outcome is looked into at once.
        let at = if replica.hang.wants_canary() { now.mono } else { replica.health.next_at() };
        self.schedule.set(key, replica, Some(at));
        let serial = replica.serial;
        let limit_ms = replica.start_limit_ms(sign);
        let is_late = replica.phase == State::Probing && replica.health.is_overdue(limit_ms, now.mono);
        let late = is_late.then_some(limit_ms);
        self.announce(key, before, now, changes);
        if rose {
            self.let_go(key, serial, Cause::Start, now, changes);
        } else if let Some(ms) = late {
            let why = format!("has not come up within {} minutes: {reason}", ms / 60_000);
            self.start_is_late(key, why, now, changes);
        }
    }

    fn start_is_late(&mut self, key: &ReplicaKey, why: String, now: Now, changes: &mut Vec<Change>) {
        let Some(replica) = self.replicas.get_mut(key) else { return };
        replica.health.slow_down();
        let serial = replica.serial;
        self.hold(key, serial, Cause::Start, why, now, changes);
        self.schedule_again(key);
    }

    /// A request to the engine failed. `generation`: the one on which it ran.
    ///
    /// No connection ends readiness at once; other faults only bring the next probe forward.
    pub fn data_path_failed(
        &mut self,
        key: &ReplicaKey,
        generation: u64,
        fault: Fault,
        reason: &str,
        now: Now,
        changes: &mut Vec<Change>,
    ) {
        let Some(replica) = self.replicas.get_mut(key).filter(|replica| replica.serial == generation) else {
            return;
        };
        if replica.phase != State::Ready {
            return;
        }
        let before = replica.state();
        if let Some(probe) = &mut replica.probe {
            probe.outdated = true;
        }
        match fault {
            Fault::ConnectFailed => {
                if replica.health.connect_failed(now.mono) == Verdict::Fell {
                    replica.forget_facts();
                    replica.enter(State::Suspect, format!("a request could not connect: {}", shown(reason)));
                }
            }
            Fault::Broken => {
                let last = replica.ordered_at.map_or(now.mono, |at| at.plus_ms(PROBE_GAP_MS));
                replica.health.probe_by(last.max(now.mono));
            }
        }
        if replica.probe.is_none() {
            self.schedule.reset(key, replica);
        }
        self.announce(key, before, now, changes);
    }

    /// The engine answered a request. For one interval this outranks probes that get no answer.
    pub fn data_path_worked(&mut self, key: &ReplicaKey, generation: u64, now: Now) {
        if let Some(replica) = self.replicas.get_mut(key).filter(|replica| replica.serial == generation) {
            replica.health.worked(now.mono);
        }
    }
}

/// What follows from an answer.
enum Learned {
    /// One more question.
    AskOn(ProbeKind),
    /// Nothing more to ask: the sign counts.
    Judge(Sign),
}

impl Replica {
    /// Takes what an answer tells about the engine, and chooses the next question.
    fn learn(
        &mut self,
        kind: ProbeKind,
        outcome: ProbeOutcome,
        sign: Sign,
        key: &ReplicaKey,
        changes: &mut Vec<Change>,
    ) -> Learned {
        let engine = Engine::named(&self.handoff.engine);
        let asks_health = kind == self.health_kind();
        match outcome {
            ProbeOutcome::Unhealthy { status: 404 }
                if kind == ProbeKind::Health && engine.lists_models_as_health() =>
            {
                self.health_is_models = true;
                return Learned::AskOn(ProbeKind::Models);
            }
            ProbeOutcome::Facts(facts) => {
                self.facts.add(facts);
                self.wants_key = None;
            }
            ProbeOutcome::Unauthorized { why, .. } if !asks_health => {
                let text =
                    format!("{} is not answered, what it would tell stays unknown: {why}", kind.path(""));
                if self.wants_key.as_ref() != Some(&text) {
                    changes.push(Change::Note { key: key.clone(), text: text.clone(), is_warning: true });
                }
                self.wants_key = Some(text);
            }
            _ => {}
        }
        // That the engine is healthy was asked before its other questions. What it does not tell stays
        // unknown; only an engine that is gone by now is not healthy any more.
        let sign = if asks_health || sign == Sign::Down { sign } else { Sign::Healthy };
        self.asked += usize::from(!asks_health);
        // The key may be right by now. Asked again between requests only: see `profile.rs`.
        let asks_again = self.wants_key.is_some() && self.slots_used == 0;
        if asks_again && asks_health {
            self.asked = 0;
        }
        let questions = engine.questions(&self.handoff);
        let next = questions.iter().skip(self.asked).find(|kind| **kind != self.health_kind());
        if sign == Sign::Healthy
            && (self.phase != State::Ready || asks_again)
            && let Some(next) = next
        {
            if self.phase != State::Ready {
                self.reason = "answers, and is asked what it serves".into();
            }
            return Learned::AskOn(*next);
        }
        if !asks_health && sign == Sign::Healthy {
            self.tell_facts(key, changes);
        }
        self.next_kind = self.health_kind();
        Learned::Judge(sign)
    }

    fn tell_facts(&self, key: &ReplicaKey, changes: &mut Vec<Change>) {
        if let Some(own) =
            self.facts.slots.filter(|own| self.handoff.slots_given && *own < self.handoff.slots)
        {
            let text =
                format!("the handoff says {} slots and the engine {own}: {own} are used", self.handoff.slots);
            changes.push(Change::Note { key: key.clone(), text, is_warning: true });
        }
    }

    fn health_kind(&self) -> ProbeKind {
        if self.health_is_models { ProbeKind::Models } else { ProbeKind::Health }
    }

    fn forget_facts(&mut self) {
        self.facts = Facts::default();
        self.wants_key = None;
        self.asked = 0;
        self.health_is_models = false;
    }

    /// How long it may take to start, in milliseconds.
    fn start_limit_ms(&self, sign: Sign) -> u64 {
        let reading_ms = self.handoff.model_bytes.unwrap_or(0) / MODEL_BYTES_PER_MS_MIN;
        let limit_ms = START_MS_MAX + reading_ms.min(MODEL_READING_MS_MAX);
        // It says that it is at work, or at least has not died of it.
        let is_alive = sign == Sign::Unavailable || self.process_lives;
        limit_ms.saturating_mul(if is_alive { START_ALIVE_FACTOR } else { 1 })
    }

    /// An outcome as a reason for people.
    fn explain(&self, kind: ProbeKind, outcome: &ProbeOutcome) -> String {
        let path = kind.path(&self.handoff.health_path);
        match outcome {
            ProbeOutcome::Healthy | ProbeOutcome::Facts(_) => "answers again".into(),
            ProbeOutcome::Loading(503) => format!("{path} answers 503: it is loading or overloaded"),
            ProbeOutcome::Loading(status) | ProbeOutcome::Unhealthy { status } => {
                format!("{path} answers {status}")
            }
            ProbeOutcome::Unauthorized { status, why } => format!("{path} answers {status}: {why}"),
            ProbeOutcome::Refused(why) => format!("cannot connect to {}: {}", self.handoff.url, shown(why)),
            ProbeOutcome::Slow => format!("{path} gave no answer within {PROBE_TIMEOUT_MS} ms"),
            ProbeOutcome::Broken(why) | ProbeOutcome::NotAsked(why) => {
                format!("{path} gave no usable answer: {}", shown(why))
            }
        }
    }
}

impl ProbeKind {
    /// Where it is asked.
    pub(super) fn path(self, health_path: &str) -> &str {
        match self {
            ProbeKind::Health => health_path,
            ProbeKind::Models => "/v1/models",
            ProbeKind::Props => "/props",
            ProbeKind::Info => "/info",
            ProbeKind::Canary => "/v1/completions",
        }
    }
}

impl Schedule {
    /// Sets when the next probe is due, for a replica without one under way.
    fn set(&mut self, key: &ReplicaKey, replica: &mut Replica, at: Option<Mono>) {
        if replica.due_at == at {
            return;
        }
        if let Some(old) = replica.due_at.take() {
            self.due.remove(&(old, key.clone()));
        }
        if let Some(at) = at {
            self.due.insert((at, key.clone()));
        }
        replica.due_at = at;
    }

    /// As [`Schedule::set`], to what its health asks for; to nothing where it is not to be probed.
    pub(super) fn reset(&mut self, key: &ReplicaKey, replica: &mut Replica) {
        let at = replica.is_probed().then(|| replica.health.next_at());
        self.set(key, replica, at);
    }

    /// Forgets a replica and its probe, whose outcome will be ignored.
    pub(super) fn cancel(&mut self, key: &ReplicaKey, replica: &mut Replica) {
        self.set(key, replica, None);
        if let Some(probe) = replica.probe.take() {
            self.lost.remove(&(probe.lost_at, key.clone()));
        }
    }

    /// Whether the schedule and a replica agree; for the registry's invariants.
    pub(super) fn holds(&self, key: &ReplicaKey, replica: &Replica) -> bool {
        replica.due_at.is_none_or(|at| self.due.contains(&(at, key.clone())))
            && replica.probe.as_ref().is_none_or(|probe| self.lost.contains(&(probe.lost_at, key.clone())))
    }

    /// Replicas waiting for a probe, and probes under way.
    pub(super) fn counts(&self) -> (usize, usize) {
        (self.due.len(), self.lost.len())
    }
}

fn sign_of(outcome: &ProbeOutcome) -> Sign {
    match outcome {
        ProbeOutcome::Healthy | ProbeOutcome::Facts(_) => Sign::Healthy,
        ProbeOutcome::Refused(_) => Sign::Down,
        ProbeOutcome::Loading(503) => Sign::Unavailable,
        ProbeOutcome::Loading(_)
        | ProbeOutcome::Unhealthy { .. }
        | ProbeOutcome::Unauthorized { .. }
        | ProbeOutcome::Slow
        | ProbeOutcome::NotAsked(_)
        | ProbeOutcome::Broken(_) => Sign::Doubtful,
    }
}

/// A peer's text, short and without control characters.
fn shown(text: &str) -> String {
    text.chars().take(SHOWN_CHARS_MAX).map(|c| if c.is_control() { ' ' } else { c }).collect()
}
