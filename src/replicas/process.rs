//! Whether the processes behind the replicas live.
//!
//! A handoff that names a pid is believed once that process was found, and no longer than it lives:
//! then its replica is out of use, whatever its port answers, until a new handoff comes. Where nobody
//! can tell (another pid namespace, no descriptor left), probes decide alone.

use super::change::{Cause, Change};
use super::registry::Registry;
use crate::time::Now;
use crate::wire::id::ReplicaKey;

/// What the shell is to do about a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ProcessOrder {
    /// Find it, and tell when it ends. Replaces an earlier order for the replica.
    Watch {
        /// The replica.
        key: ReplicaKey,
        /// Its generation.
        generation: u64,
        /// The engine's process.
        pid: u32,
        /// When it started, in clock ticks after boot.
        pid_start: Option<u64>,
        /// The boot in which it lives.
        boot_id: Option<String>,
        /// The pid namespace in which `pid` counts.
        pid_ns: Option<u64>,
    },
    /// Forget it.
    Forget {
        /// The replica.
        key: ReplicaKey,
    },
}

/// What was seen of a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ProcessSeen {
    /// It lives, and its end will be told.
    Alive,
    /// It does not live (any more), and why that is known.
    Ended(String),
    /// Nobody can tell, and why.
    Unknown(String),
}

impl Registry {
    /// Takes the orders that wait. To be carried out before probes are sent.
    pub fn take_process_orders(&mut self) -> Vec<ProcessOrder> {
        std::mem::take(&mut self.process_orders)
    }

    /// Takes what was seen of a replica's process. What belongs to an earlier engine is ignored.
    pub fn process_seen(
        &mut self,
        key: &ReplicaKey,
        generation: u64,
        seen: ProcessSeen,
        now: Now,
        changes: &mut Vec<Change>,
    ) {
        let Some(replica) = self.replicas.get_mut(key).filter(|replica| replica.serial == generation) else {
            return;
        };
        replica.awaits_process = false;
        replica.process_lives = seen == ProcessSeen::Alive;
        match seen {
            ProcessSeen::Alive => self.schedule_again(key),
            ProcessSeen::Unknown(why) => {
                self.schedule_again(key);
                changes.push(Change::Unwatched { key: key.clone(), reason: why });
            }
            ProcessSeen::Ended(why) => {
                let adopted = self.directory.adopted(key).is_some();
                self.hold(key, generation, Cause::Process, why, now, changes);
                if adopted {
                    // No file says that it is there, and it is not.
                    self.abandon(key, now, changes);
                }
            }
        }
    }

    pub(super) fn order_process(&mut self, key: &ReplicaKey) {
        let Some(replica) = self.replicas.get_mut(key) else { return };
        let handoff = &replica.handoff;
        let order = handoff.pid.map(|pid| ProcessOrder::Watch {
            key: key.clone(),
            generation: replica.serial,
            pid,
            pid_start: handoff.pid_start,
            boot_id: handoff.boot_id.clone(),
            pid_ns: handoff.pid_ns,
        });
        replica.awaits_process = order.is_some();
        self.process_orders.extend(order);
    }

    pub(super) fn forget_process(&mut self, key: &ReplicaKey) {
        self.process_orders.push(ProcessOrder::Forget { key: key.clone() });
    }
}
