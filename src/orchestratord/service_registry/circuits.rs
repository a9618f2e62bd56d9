//! The circuit of each replica: what opens it, for how long, and what closes it.
//!
//! ```text
//!             connect error, reset, 502/503/504             backoff is over
//!   Closed ─────────────────────────────────────▶ Open ─────────────────────▶ HalfOpen
//!     ▲                                             ▲                           │ one request tries
//!     │                      the same again: twice as long ◀────────────────────┤
//!     └──────────────────────────── the head of an answer ◀─────────────────────┘
//! ```
//!
//! An engine that says itself that it is not ready, and when to ask again, is left alone for that long;
//! it counts as no failure. Timeouts and statuses below 500 are no business of the circuit: a long prompt,
//! or a bad request, must not take an engine out of rotation.

use super::super::replica_table::{BACKOFF_FIRST_MS, BACKOFF_MAX_MS};
use super::snapshot::cut;
use super::{Change, Circuit, ReplicaRef, ServiceRegistry};
use crate::time::Now;

/// Longest pause for which an engine that is not ready may ask, in milliseconds.
pub const NOT_READY_MS_MAX: u64 = 60_000;
/// A backoff is shortened by up to one part in so many: replicas that failed together are not tried
/// together.
const JITTER_PARTS: u64 = 5;

/// Circuits by state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CircuitCounts {
    /// The data path works as far as known.
    pub closed: u64,
    /// Out of rotation.
    pub open: u64,
    /// One request may try, or tries.
    pub half_open: u64,
}

impl ServiceRegistry {
    /// A request could not be delivered (no connection, or closed before the answer began). The
    /// replica leaves the rotation at once, for 250 ms at first and up to 10 s after more failures
    /// in a row. Failures while it is out count once.
    pub fn data_path_failed(
        &mut self,
        replica: ReplicaRef,
        reason: &str,
        now: Now,
        changes: &mut Vec<Change>,
    ) {
        let Some(known) = self.table.get(replica) else { return };
        let failures = match &known.circuit {
            Circuit::Open { .. } => return,
            Circuit::Closed => 1,
            Circuit::HalfOpen { failures, .. } => failures.saturating_add(1),
        };
        let doublings = (failures - 1).min(16);
        let backoff_ms = (BACKOFF_FIRST_MS << doublings).min(BACKOFF_MAX_MS);
        let order = self.table.get_hot(replica).map_or(0, |hot| hot.order);
        let drawn = mix(self.epoch ^ order.rotate_left(17) ^ u64::from(failures));
        let jitter_ms = drawn % (backoff_ms / JITTER_PARTS + 1);
        self.open_circuit(replica, backoff_ms - jitter_ms, failures, reason, now, changes);
    }

    /// The engine answered that it is not ready. The replica leaves the rotation for as long as it asked
    /// for; its failures in a row stay what they were.
    pub fn data_path_not_ready(
        &mut self,
        replica: ReplicaRef,
        pause_ms: u64,
        reason: &str,
        now: Now,
        changes: &mut Vec<Change>,
    ) {
        let Some(known) = self.table.get(replica) else { return };
        let failures = match &known.circuit {
            Circuit::Open { .. } => return,
            Circuit::Closed => 1,
            Circuit::HalfOpen { failures, .. } => (*failures).max(1),
        };
        let pause_ms = pause_ms.clamp(BACKOFF_FIRST_MS, NOT_READY_MS_MAX);
        self.open_circuit(replica, pause_ms, failures, reason, now, changes);
    }

    fn open_circuit(
        &mut self,
        replica: ReplicaRef,
        pause_ms: u64,
        failures: u32,
        reason: &str,
        now: Now,
        changes: &mut Vec<Change>,
    ) {
        let until = now.mono.plus_ms(pause_ms);
        self.retries.insert((until, replica));
        let reason = cut(reason);
        self.table.update(replica, now, changes, |r| {
            r.circuit = Circuit::Open { until, failures, reason: reason.into() };
        });
    }

    /// A replica answered a request: its data path is trusted again. To be called when the head of
    /// an answer arrives, for until then a replica in doubt is given one request at a time.
    pub fn data_path_worked(&mut self, replica: ReplicaRef, now: Now, changes: &mut Vec<Change>) {
        let Some(known) = self.table.get(replica) else { return };
        match known.circuit {
            Circuit::Closed => return,
            Circuit::Open { until, .. } => {
                self.retries.remove(&(until, replica));
            }
            Circuit::HalfOpen { .. } => {}
        }
        self.table.update(replica, now, changes, |r| r.circuit = Circuit::Closed);
    }

    /// How many circuits are in which state.
    #[must_use]
    pub fn circuits(&self) -> CircuitCounts {
        let mut counts = CircuitCounts::default();
        for (_, replica) in self.replicas() {
            match replica.circuit {
                Circuit::Closed => counts.closed += 1,
                Circuit::Open { .. } => counts.open += 1,
                Circuit::HalfOpen { .. } => counts.half_open += 1,
            }
        }
        counts
    }
}

/// The finalizer of splitmix64.
fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}
