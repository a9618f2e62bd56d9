//! Whether the engines behind the replicas answer: which probes are due, what their outcomes and the
//! data path's experience mean.
//!
//! The registry keeps at most one probe under way for a replica and [`PROBES_MAX`] in all. A probe
//! is an order that the caller carries out; its outcome comes back under the order's id, and one
//! that does not come back is given up. When no file names an engine's models, the engine is asked
//! once, after its first good answer and before it is announced as ready.

use std::collections::BTreeSet;

use super::change::{Change, State};
use super::health::{PROBE_TIMEOUT_MS, SUSPECT_DELAY_MS_MIN, Sign, Verdict};
use super::registry::{Registry, Replica};
use crate::time::{Mono, Now, earliest};
use crate::wire::handoff::{MODELS_MAX, TEXT_BYTES_MAX};
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
/// Where an engine lists its models.
const MODELS_PATH: &str = "/v1/models";

/// A probe to be sent. Its outcome is handed to [`Registry::probed`] with the same id.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProbeOrder {
    /// Names this probe.
    pub id: ProbeId,
    /// The engine.
    pub url: BaseUrl,
    /// Path below the URL's own.
    pub path: String,
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
}

/// How a probe ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ProbeOutcome {
    /// 200.
    Healthy,
    /// 200 with a list of models.
    Models(Vec<String>),
    /// A 5xx status: 503 while loading.
    Loading(u16),
    /// Any other status.
    Unhealthy {
        /// The status.
        status: u16,
    },
    /// No connection, or a reset before the answer.
    Refused(String),
    /// No answer in time.
    Slow,
    /// An answer that is no HTTP, or cut off.
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
        while self.schedule.lost.len() < PROBES_MAX
            && let Some((at, key)) = self.schedule.due.first().filter(|(at, _)| *at <= now.mono).cloned()
        {
            self.schedule.due.remove(&(at, key.clone()));
            let Some(replica) = self.replicas.get_mut(&key) else { continue };
            let lost_at = now.mono.plus_ms(PROBE_LOST_MS);
            let (seq, kind) = (self.next_seq, replica.next_kind);
            self.next_seq += 1;
            replica.due_at = None;
            replica.ordered_at = Some(now.mono);
            replica.probe = Some(Outstanding { seq, kind, lost_at, outdated: false });
            self.schedule.lost.insert((lost_at, key.clone()));
            orders.push(ProbeOrder {
                id: ProbeId { key, serial: replica.serial, seq },
                url: replica.handoff.url.clone(),
                path: match kind {
                    ProbeKind::Health => replica.handoff.health_path.clone(),
                    ProbeKind::Models => MODELS_PATH.into(),
                },
                kind,
                timeout_ms: PROBE_TIMEOUT_MS,
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
        earliest(due.map(|(at, _)| *at), self.schedule.lost.first().map(|(at, _)| *at))
    }

    /// Takes a probe's outcome. One that belongs to an earlier engine or order is ignored.
    pub fn probed(&mut self, id: &ProbeId, outcome: ProbeOutcome, now: Now, changes: &mut Vec<Change>) {
        let Some(replica) = self.replicas.get_mut(&id.key).filter(|replica| replica.serial == id.serial)
        else {
            return;
        };
        let Some(probe) = replica.probe.take_if(|probe| probe.seq == id.seq) else { return };
        self.schedule.lost.remove(&(probe.lost_at, id.key.clone()));
        let mut sign = sign_of(&outcome);
        if probe.outdated && sign == Sign::Healthy {
            let at = now.mono.plus_ms(SUSPECT_DELAY_MS_MIN);
            self.schedule.set(&id.key, replica, Some(at));
            return;
        }
        let reason = replica.explain(&outcome);
        if probe.kind == ProbeKind::Models {
            replica.next_kind = ProbeKind::Health;
            // The engine is healthy: that was asked before. Which models it serves may stay unknown.
            if !matches!(outcome, ProbeOutcome::Refused(_)) {
                sign = Sign::Healthy;
                replica.learned = Some(match outcome {
                    ProbeOutcome::Models(models) => bounded(models),
                    _ => Vec::new(),
                });
            }
        } else if sign == Sign::Healthy && replica.phase != State::Ready && replica.must_ask_models() {
            replica.next_kind = ProbeKind::Models;
            replica.reason = "answers, and is asked which models it serves".into();
            self.schedule.set(&id.key, replica, Some(now.mono));
            return;
        }
        let before = replica.state();
        match replica.health.observe(sign, now.mono) {
            Verdict::Rose => replica.enter(State::Ready, "answers its health probe".into()),
            Verdict::Fell => {
                if sign == Sign::Down {
                    // It may come back as another process, with other models.
                    replica.learned = None;
                }
                replica.enter(State::Suspect, reason);
            }
            Verdict::Unchanged if replica.phase != State::Ready && replica.reason != reason => {
                replica.reason.clone_from(&reason);
                self.revision += 1;
                changes.push(Change::Reason { key: id.key.clone(), state: replica.state(), reason });
            }
            Verdict::Unchanged => {}
        }
        let at = replica.health.next_at();
        self.schedule.set(&id.key, replica, Some(at));
        self.announce(&id.key, before, now, changes);
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
                    replica.learned = None;
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

impl Replica {
    fn must_ask_models(&self) -> bool {
        self.handoff.models.is_empty() && self.learned.is_none()
    }

    /// An outcome as a reason for people.
    fn explain(&self, outcome: &ProbeOutcome) -> String {
        let path = &self.handoff.health_path;
        match outcome {
            ProbeOutcome::Healthy | ProbeOutcome::Models(_) => {
                "answers again, and has to do so twice because it failed often".into()
            }
            ProbeOutcome::Loading(503) => format!("{path} answers 503: it is loading or overloaded"),
            ProbeOutcome::Loading(status) | ProbeOutcome::Unhealthy { status } => {
                format!("{path} answers {status}")
            }
            ProbeOutcome::Refused(why) => format!("cannot connect to {}: {}", self.handoff.url, shown(why)),
            ProbeOutcome::Slow => format!("{path} gave no answer within {PROBE_TIMEOUT_MS} ms"),
            ProbeOutcome::Broken(why) => format!("{path} gave no usable answer: {}", shown(why)),
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
        ProbeOutcome::Healthy | ProbeOutcome::Models(_) => Sign::Healthy,
        ProbeOutcome::Refused(_) | ProbeOutcome::Loading(503) => Sign::Down,
        ProbeOutcome::Loading(_)
        | ProbeOutcome::Unhealthy { .. }
        | ProbeOutcome::Slow
        | ProbeOutcome::Broken(_) => Sign::Doubtful,
    }
}

/// Model names within the limits that handoffs keep, each once.
fn bounded(models: Vec<String>) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    for name in models.into_iter().take(MODELS_MAX) {
        if !name.is_empty() && name.len() <= TEXT_BYTES_MAX && !names.contains(&name) {
            names.push(name);
        }
    }
    names
}

/// A peer's text, short and without control characters.
fn shown(text: &str) -> String {
    text.chars().take(SHOWN_CHARS_MAX).map(|c| if c.is_control() { ' ' } else { c }).collect()
}
