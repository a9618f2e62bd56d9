//! Engines that accept requests and produce nothing any more. Pure.
//!
//! An engine may hang and still call itself healthy. What gives it away is the data path: answers that
//! had begun stand still, all of them, for longer than any engine pauses between two tokens. That is a
//! suspicion and no more; a trial request for one token, the canary, decides. Any whole answer to it,
//! an error too, shows that the engine works. If none comes, the replica is held out of use, and the
//! canary is repeated until one is answered.
//!
//! A request without its first byte is in prefill, which may take minutes. As long as one is, silence
//! says nothing for [`PREFILL_MS_MAX`].

use super::change::{Cause, Change};
use super::probing::ProbeOutcome;
use super::registry::{Registry, Replica};
use crate::time::{Mono, Now};
use crate::wire::activity::ActivityReport;
use crate::wire::id::ReplicaKey;

/// How long all answers of an engine may stand still before it is suspected, in milliseconds: llama.cpp
/// writes a comment after 30 s of silence.
pub const HANG_SUSPECT_MS: u64 = 60_000;
/// How long requests may wait for their first byte before that is suspicious, in milliseconds.
pub const PREFILL_MS_MAX: u64 = 600_000;
/// Longest that the canary may take, in milliseconds: it may have to wait for a slot.
pub const CANARY_TIMEOUT_MS_MAX: u64 = 30_000;
/// Where less silence is suspicious than usual, so is a shorter wait: this share of it.
const CANARY_SHARE: u64 = 2;
/// First pause after a canary that was not answered, in milliseconds.
pub const CANARY_PAUSE_MS_MIN: u64 = 5_000;
/// Longest such pause, in milliseconds.
pub const CANARY_PAUSE_MS_MAX: u64 = 60_000;

/// How long a canary may take, in milliseconds.
pub(super) fn canary_timeout_ms(hang_suspect_ms: u64) -> u64 {
    (hang_suspect_ms / CANARY_SHARE).min(CANARY_TIMEOUT_MS_MAX)
}

/// What the requests that run on a replica have been doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Activity {
    /// Requests whose answers have begun.
    pub begun: u32,
    /// When the last byte of any of these came.
    pub last_byte: Option<Mono>,
    /// When the request was sent that has waited longest for its first byte.
    pub waiting_since: Option<Mono>,
}

impl Activity {
    /// Adds a request that runs: when it was sent, and when its last byte came, if one has.
    pub fn add(&mut self, sent: Mono, last_byte: Option<Mono>) {
        match last_byte {
            Some(at) => {
                self.begun += 1;
                self.last_byte = self.last_byte.max(Some(at));
            }
            None => self.waiting_since = Some(self.waiting_since.map_or(sent, |since| since.min(sent))),
        }
    }

    /// For how long nothing has come that should have, in milliseconds, if that is suspicious.
    #[must_use]
    pub fn silence_ms(&self, hang_suspect_ms: u64, now: Mono) -> Option<u64> {
        // A long prefill may hold up all other answers of its engine, and whoever comes later does not
        // prolong that.
        let limit_ms =
            if self.waiting_since.is_some() { PREFILL_MS_MAX.max(hang_suspect_ms) } else { hang_suspect_ms };
        let since = self.last_byte.or(self.waiting_since)?;
        Some(now.ms_since(since)).filter(|ms| *ms >= limit_ms)
    }

    /// The same for another process, of an engine's generation.
    #[must_use]
    pub fn report(&self, generation: u64, now: Mono) -> ActivityReport {
        ActivityReport {
            generation,
            begun: self.begun,
            last_byte_age_ms: self.last_byte.map(|at| now.ms_since(at)),
            waiting_ms: self.waiting_since.map(|since| now.ms_since(since)),
        }
    }

    /// What another process reports, which arrived now.
    #[must_use]
    pub fn reported(report: &ActivityReport, now: Mono) -> Activity {
        let before = |ms: u64| Mono(now.0.saturating_sub(ms.saturating_mul(1_000_000)));
        Activity {
            begun: report.begun,
            last_byte: report.last_byte_age_ms.map(before),
            waiting_since: report.waiting_ms.map(before),
        }
    }
}

/// What is suspected of a replica.
#[derive(Debug, Default)]
pub(super) struct Hang {
    /// For how long it had been silent when that became suspicious.
    silent_ms: Option<u64>,
    /// The last byte that came, as far as it was told.
    last_byte: Option<Mono>,
    /// When the canary was last answered: silence before that proves nothing.
    cleared_at: Option<Mono>,
    canaries_unanswered: u32,
}

impl Hang {
    pub(super) fn wants_canary(&self) -> bool {
        self.silent_ms.is_some()
    }
}

impl Registry {
    /// How long all answers of an engine may stand still before it is suspected, in milliseconds.
    pub fn set_hang_limit(&mut self, hang_suspect_ms: u64) {
        self.hang_suspect_ms = hang_suspect_ms;
    }

    /// Takes what the requests on a replica have been doing, or some of them. To be told before each outcome
    /// of a probe, while requests run.
    pub fn active(
        &mut self,
        key: &ReplicaKey,
        generation: u64,
        mut activity: Activity,
        now: Now,
        changes: &mut Vec<Change>,
    ) {
        let Some(replica) = self.replicas.get_mut(key).filter(|replica| replica.serial == generation) else {
            return;
        };
        if let Some(at) = activity.last_byte {
            replica.health.worked(at);
            // Others may have told of bytes that came later.
            replica.hang.last_byte = replica.hang.last_byte.max(Some(at));
            activity.last_byte = replica.hang.last_byte;
        }
        let is_cleared =
            replica.hang.cleared_at.is_some_and(|at| now.mono.ms_since(at) < self.hang_suspect_ms);
        let Some(ms) = activity.silence_ms(self.hang_suspect_ms, now.mono) else { return };
        if is_cleared || replica.hang.wants_canary() || !replica.is_probed() {
            return;
        }
        replica.hang.silent_ms = Some(ms);
        let text = format!("its answers have stood still for {} s: it is sent a trial request", ms / 1000);
        changes.push(Change::Note { key: key.clone(), text, is_warning: true });
        replica.health.probe_by(now.mono);
        self.schedule_again(key);
    }

    pub(super) fn canary_ended(
        &mut self,
        key: &ReplicaKey,
        outcome: &ProbeOutcome,
        now: Now,
        changes: &mut Vec<Change>,
    ) {
        let Some(replica) = self.replicas.get_mut(key) else { return };
        let generation = replica.serial;
        let produced = replica.ordered_at.is_some_and(|ordered| replica.hang.last_byte > Some(ordered));
        let answered = match outcome {
            ProbeOutcome::Healthy
            | ProbeOutcome::Facts(_)
            | ProbeOutcome::Loading(_)
            | ProbeOutcome::Unhealthy { .. }
            | ProbeOutcome::Unauthorized { .. } => true,
            // It is down rather than hung: the next health probe says so.
            ProbeOutcome::Refused(_) => true,
            ProbeOutcome::NotAsked(_) => return self.schedule_again(key),
            ProbeOutcome::Slow | ProbeOutcome::Broken(_) => false,
        };
        if answered || produced {
            replica.hang = Hang { cleared_at: Some(now.mono), ..Hang::default() };
            replica.health.probe_by(now.mono);
            let text = "it answered the trial request".to_string();
            changes.push(Change::Note { key: key.clone(), text, is_warning: false });
            self.let_go(key, generation, Cause::Hung, now, changes);
        } else {
            let silent_ms = replica.hang.silent_ms.unwrap_or_default();
            let exponent = replica.hang.canaries_unanswered.min(16);
            replica.hang.canaries_unanswered += 1;
            let pause_ms = (CANARY_PAUSE_MS_MIN << exponent).min(CANARY_PAUSE_MS_MAX);
            replica.health.probe_at(now.mono.plus_ms(pause_ms));
            let why = format!(
                "hangs: its answers had stood still for {} s, and a trial request got no answer within {} s; it is tried again until one does",
                silent_ms / 1000,
                canary_timeout_ms(self.hang_suspect_ms).div_ceil(1000)
            );
            if replica.hang.canaries_unanswered == 1 {
                self.hold(key, generation, Cause::Hung, why, now, changes);
            }
        }
        self.schedule_again(key);
    }
}

impl Replica {
    /// The smallest request that makes an engine produce something.
    pub(super) fn canary_body(&self) -> String {
        let model = self.models().first().map_or("default", String::as_str);
        serde_json::json!({"model": model, "prompt": "ok", "max_tokens": 1, "stream": false}).to_string()
    }
}
