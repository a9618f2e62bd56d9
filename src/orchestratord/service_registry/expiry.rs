//! What time ends: leases, the grace of those without one, memories, backoffs. And when it must not: most
//! nodes that fall silent together are likelier victims of a fault here.

use crate::time::{Mono, Now, earliest};

use super::{Change, Circuit, NodeStatus, ServiceRegistry};

/// Longest time for which leases are kept from ending because most nodes are silent at once: longer
/// than a switch needs to restart, shorter than an operator needs to be called.
pub const EXPIRY_HOLD_MS: u64 = 300_000;
/// How often a held expiry looks again.
pub const EXPIRY_HOLD_RECHECK_MS: u64 = 1_000;
/// Fewest nodes of which a silent majority is taken for a fault of our own.
pub const EXPIRY_HOLD_NODES_MIN: usize = 3;

/// A mass expiry in progress.
#[derive(Clone, Copy, Debug)]
pub(super) struct Hold {
    until: Mono,
    recheck: Mono,
}

impl ServiceRegistry {
    /// Ends leases, grace periods and backoffs that are due.
    pub fn expire(&mut self, now: Now, changes: &mut Vec<Change>) {
        while let Some(&(due, replica)) = self.retries.first()
            && due <= now.mono
        {
            self.retries.pop_first();
            self.table.update(replica, now, changes, |r| {
                if let Circuit::Open { failures, reason, .. } = &r.circuit {
                    let (failures, reason) = (*failures, reason.clone());
                    r.circuit = Circuit::HalfOpen { failures, reason, trying: false };
                }
            });
        }
        if self.leases_may_end(now, changes) {
            while let Some(&(due, index)) = self.leases.first()
                && due <= now.mono
            {
                let reason = self.nodes[index].silence(now);
                self.set_status(index, NodeStatus::Suspect, &reason, now, changes);
            }
        }
        while let Some(&(due, index)) = self.lapsed.first()
            && due <= now.mono
        {
            let reason = self.nodes[index].silence(now);
            match self.nodes[index].status {
                NodeStatus::Suspect => self.set_status(index, NodeStatus::Offline, &reason, now, changes),
                NodeStatus::Offline => self.drop_node(index, &reason, changes),
                _ => self.set_status(index, NodeStatus::Suspect, &reason, now, changes),
            }
        }
    }

    /// When [`ServiceRegistry::expire`] is wanted next.
    #[must_use]
    pub fn deadline(&self) -> Option<Mono> {
        let lease = match self.hold {
            Some(hold) => Some(hold.recheck.min(hold.until)),
            None => self.leases.first().map(|(due, _)| *due),
        };
        let lapsed = self.lapsed.first().map(|(due, _)| *due);
        let retry = self.retries.first().map(|(due, _)| *due);
        earliest(lease, earliest(lapsed, retry))
    }

    /// Whether leases may end now: not while most nodes are silent at once, unless for too long.
    fn leases_may_end(&mut self, now: Now, changes: &mut Vec<Change>) -> bool {
        let is_due = self.leases.first().is_some_and(|(due, _)| *due <= now.mono);
        if !is_due {
            if self.hold.take().is_some() {
                changes.push(Change::ExpiryResumed);
            }
            return false;
        }
        // Late is who missed a heartbeat: the others of a common fault follow within one interval.
        let timeout_ms = self.limits.node_timeout_ms;
        let late_ms = (self.limits.heartbeat_interval_ms.saturating_mul(3) / 2).min(timeout_ms);
        let horizon = now.mono.plus_ms(timeout_ms - late_ms);
        let of = self.leases.len();
        let late = self.leases.iter().take_while(|(due, _)| *due <= horizon).take(of / 2 + 1).count();
        let mass = of >= EXPIRY_HOLD_NODES_MIN && late > of / 2;
        match (&mut self.hold, mass) {
            (None, false) => true,
            (None, true) => {
                let recheck = now.mono.plus_ms(EXPIRY_HOLD_RECHECK_MS);
                self.hold = Some(Hold { until: now.mono.plus_ms(EXPIRY_HOLD_MS), recheck });
                changes.push(Change::ExpiryHeld { late, of });
                false
            }
            (Some(hold), true) if now.mono < hold.until => {
                hold.recheck = now.mono.plus_ms(EXPIRY_HOLD_RECHECK_MS);
                false
            }
            (Some(_), _) => {
                self.hold = None;
                changes.push(Change::ExpiryResumed);
                true
            }
        }
    }
}
