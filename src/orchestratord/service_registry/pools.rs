//! What is kept of a node's pools: little, because their replicas are in the table and have the rest.

use crate::time::Now;
use crate::wire::id::{NodeId, PoolId};
use crate::wire::node::PoolBeat;

use super::snapshot::cut;
use super::{Change, ServiceRegistry};

/// A pool as its node last reported it.
#[derive(Clone, Debug)]
pub struct KnownPool {
    /// Its name.
    pub pool_id: PoolId,
    /// Whether at least one replica takes work.
    pub ready: bool,
    /// No new work for the whole pool.
    pub draining: bool,
    /// Free slots of all replicas.
    pub slots_free: u32,
    /// Slots of all replicas, where its node says that.
    pub slots_total: Option<u32>,
    /// Free GPU memory, 0 where unknown.
    pub vram_free_bytes: u64,
    /// What is known of its replicas together where its node lists none; `None` where it does.
    pub(super) sums: Option<Box<Sums>>,
}

/// What an older agent says of all replicas of a pool.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Sums {
    pub(super) engine: Option<String>,
    pub(super) engine_version: Option<String>,
    pub(super) models: Vec<String>,
}

impl KnownPool {
    /// Of which a registration gives only the name.
    pub(super) fn announced(pool: &PoolId) -> KnownPool {
        KnownPool {
            pool_id: pool.clone(),
            ready: false,
            draining: false,
            slots_free: 0,
            slots_total: None,
            vram_free_bytes: 0,
            sums: Some(Box::default()),
        }
    }

    /// What is kept of a report.
    pub(super) fn of(beat: &PoolBeat) -> KnownPool {
        let sums = || {
            Box::new(Sums {
                engine: beat.engine.as_deref().map(cut),
                engine_version: beat.engine_version.as_deref().map(cut),
                models: beat.models_available.clone(),
            })
        };
        KnownPool {
            pool_id: beat.pool_id.clone(),
            ready: beat.ready,
            draining: beat.draining,
            slots_free: beat.slots_free,
            slots_total: beat.slots_total,
            vram_free_bytes: beat.vram_free_bytes,
            sums: beat.replicas.is_none().then(sums),
        }
    }

    /// Slots of all replicas: never fewer than the free ones.
    #[must_use]
    pub fn slots_total(&self) -> u32 {
        self.slots_total.unwrap_or(0).max(self.slots_free)
    }

    /// A report that says as much.
    pub(crate) fn as_beat(&self) -> PoolBeat {
        let sums = self.sums.as_deref().cloned().unwrap_or_default();
        PoolBeat {
            pool_id: self.pool_id.clone(),
            ready: self.ready,
            draining: self.draining,
            slots_free: self.slots_free,
            slots_total: self.slots_total,
            vram_free_bytes: self.vram_free_bytes,
            engine: sums.engine,
            engine_version: sums.engine_version,
            models_available: sums.models,
            replicas: self.sums.is_none().then(Vec::new),
        }
    }

    /// Whether a report says nothing new, free slots and memory aside: those change all the time, and
    /// nothing that is saved depends on them.
    pub(super) fn is_as_in(&self, beat: &PoolBeat) -> bool {
        let same_sums = || {
            self.sums.as_ref().is_none_or(|sums| {
                sums.engine == beat.engine
                    && sums.engine_version == beat.engine_version
                    && sums.models == beat.models_available
            })
        };
        self.pool_id == beat.pool_id
            && (self.ready, self.draining, self.slots_total) == (beat.ready, beat.draining, beat.slots_total)
            && self.sums.is_none() == beat.replicas.is_some()
            && same_sums()
    }
}

impl ServiceRegistry {
    /// A node's agent has said that it gives a pool no new work. What the node tells next says it again, or
    /// something else.
    pub fn drains(&mut self, node: &NodeId, pool: &PoolId, now: Now, changes: &mut Vec<Change>) {
        let Some(index) = self.by_id.get(node).copied() else { return };
        let node = &mut self.nodes[index];
        let Some(known) = node.pools.iter_mut().find(|known| known.pool_id == *pool) else { return };
        node.touched |= !std::mem::replace(&mut known.draining, true);
        for (key, replica) in node.replicas.iter() {
            if key.pool == *pool {
                node.touched |= self.table.get(*replica).is_some_and(|replica| !replica.draining);
                self.table.update(*replica, now, changes, |replica| replica.draining = true);
            }
        }
        self.note_changes(index);
    }
}
