//! How the registry survives a restart of the control plane: what it gives to be saved, and what it
//! makes of that afterwards.
//!
//! A restored node is in doubt, and yet useful at once:
//!
//! - It holds a lease from the restoration on. Unheard, it turns Suspect and Offline as any other.
//! - Its replicas take work, one request at a time: their circuit starts half open. The first answer
//!   closes it, the first failure opens it, and a heartbeat that says ready settles it as well.
//! - Its incarnation still fences older ones; heartbeats of the same one are simply taken. Nothing is
//!   known about their sequence, nor whether the machine behind the name is still the same: the first
//!   one to register has it.
//! - Where the node had been silent already, it comes back Suspect, without work.
//! - What was written longer ago than [`TRUST_MS`] gets no work before its node has been heard: by then
//!   somebody else may have its address, who must see neither prompts nor the token.
//!
//! **What it costs.** The revision moves only when something that is saved has changed: registration,
//! replicas, what they serve, whether they take work. Free slots and free memory are not among it, so an
//! ordinary heartbeat costs nothing here. What is to be written is made in pieces of a few nodes.

use std::ops::Bound;
use std::sync::Arc;

use crate::orchestratord::saved::{NodeRecord, PoolRecord, ReplicaRecord, Saved, SavedNode, Standing};
use crate::time::{Now, Wall};
use crate::wire::id::NodeId;

use super::pools::{KnownPool, Sums};
use super::snapshot::cut;
use super::weights;
use super::{
    Change, Circuit, Confirmation, Node, NodeStatus, Replica, ReplicaTable, ServiceRegistry, Target, shown,
};

/// Replicas of a file older than this get no work before their node has been heard, in milliseconds:
/// longer than any restart takes, shorter than addresses take to be given to others.
pub const TRUST_MS: u64 = 3_600_000;

/// Why a restored node has the status that it has.
const RESTORED: &str = "restored from the state file, not heard of since the start";
/// The same for one that was silent before.
const RESTORED_SILENT: &str = "restored from the state file, silent before and since";

impl ServiceRegistry {
    /// Grows with everything that is worth saving; 0 as long as nothing ever was.
    #[must_use]
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// What is to be remembered: every node that has registered. One that is only polled is asked again
    /// at once.
    #[must_use]
    pub fn saved(&self, at: Wall) -> Saved {
        Saved::new(self.saved_after(None, usize::MAX).0, at)
    }

    /// The same in pieces: of `count` nodes, those after `last`, and whether there are none behind them.
    #[must_use]
    pub fn saved_after(&self, last: Option<&NodeId>, count: usize) -> (Vec<SavedNode>, bool) {
        let from = last.map_or(Bound::Unbounded, Bound::Excluded);
        let mut nodes =
            self.by_id.range::<NodeId, _>((from, Bound::Unbounded)).map(|(_, index)| &self.nodes[*index]);
        let mut saved = Vec::new();
        for node in nodes.by_ref().filter(|node| node.registered).take(count) {
            saved.extend(NodeRecord::of(node, &self.table).map(|record| SavedNode {
                standing: standing(node.status),
                heard_ms: node.last_heartbeat_at.map(Wall::unix_ms),
                node: record,
            }));
        }
        let is_all = saved.len() < count || nodes.next().is_none();
        (saved, is_all)
    }

    /// Takes up what an earlier start of the control plane saved. Nodes that have been silent for so
    /// long that they would be forgotten are, and nodes that are known already stay as they are.
    pub fn restore(&mut self, saved: &Saved, now: Now, changes: &mut Vec<Change>) {
        let (mut nodes, mut replicas) = (0, 0);
        for node in &saved.nodes {
            let silent_ms = node.heard_ms.map_or(0, |at| now.wall.unix_ms().saturating_sub(at));
            let is_over = node.standing == Standing::Silent && silent_ms > self.limits.forget_ms;
            let weight = weights::of_record(&node.node);
            let is_full =
                self.nodes.len() >= self.limits.nodes_max || self.check_weight(None, weight).is_err();
            if is_over || is_full || self.by_id.contains_key(&node.node.id) {
                continue;
            }
            self.restore_node(node, saved.age_ms(now.wall) <= TRUST_MS, now);
            nodes += 1;
            replicas += node.node.replicas.len();
        }
        if nodes > 0 {
            self.revision += 1;
            changes.push(Change::Restored { nodes, replicas });
        }
    }

    fn restore_node(&mut self, saved: &SavedNode, trusted: bool, now: Now) {
        let record = &saved.node;
        let index = self.add_node(&record.id, now);
        let (status, reason, lease_ms) = match saved.standing {
            Standing::Serving => (NodeStatus::Registering, RESTORED, self.limits.node_timeout_ms),
            Standing::Draining => (NodeStatus::Draining, RESTORED, self.limits.node_timeout_ms),
            Standing::Silent => (NodeStatus::Suspect, RESTORED_SILENT, self.limits.offline_grace_ms),
        };
        self.weighs(index, weights::of_record(record));
        let node = &mut self.nodes[index];
        node.machine_id = cut(&record.machine_id);
        node.address = Some(record.address.clone());
        node.version = record.version.as_deref().map(|version| self.names.keep(&cut(version)));
        node.capabilities = self.machines.keep_whole(shown(&record.capabilities));
        node.incarnation = record.incarnation;
        node.boot_id = record.boot_id.as_deref().map(cut);
        node.status = status;
        node.reason = self.names.keep(reason);
        node.registered_at = wall(record.registered_ms);
        node.last_heartbeat_at = saved.heard_ms.map(wall);
        node.pools = record.pools.iter().map(PoolRecord::shown).collect();
        (node.restored, node.registered) = (true, true);
        self.schedule(index, now.mono.plus_ms(lease_ms));
        // One sentence for all of them is told instead of one for each.
        let mut untold = Vec::new();
        for replica in &record.replicas {
            let target = replica
                .url
                .as_ref()
                .map_or(Target::AskNode, |url| self.addresses.target_of(url, Some(&record.address)));
            let restored =
                self.add_replica(index, replica.key(), replica.generation, target, now, &mut untold);
            self.table.set_models(restored, &replica.models, replica.context_length, &mut untold);
            let names = &mut self.names;
            let mut name = |text: &Option<Arc<str>>| text.as_deref().map(|text| names.keep(&cut(text)));
            self.table.update(restored, now, &mut untold, |r| {
                r.confirmation =
                    if trusted && !replica.doubted { Confirmation::Restored } else { Confirmation::Doubted };
                r.circuit = Circuit::HalfOpen { failures: 0, reason: RESTORED.into(), trying: false };
                r.ready = replica.ready;
                r.draining = replica.draining;
                r.device_mask = name(&replica.device_mask);
                r.engine = name(&replica.engine);
                r.engine_version = name(&replica.engine_version);
                r.vram_free_bytes = replica.vram_free_bytes;
                r.report_slots(replica.slots_total, replica.slots_total);
            });
            untold.clear();
        }
        self.nodes[index].touched = false;
    }

    /// A node was heard: whether what is saved of it has changed.
    pub(super) fn note_changes(&mut self, index: usize) {
        let node = &mut self.nodes[index];
        self.revision += u64::from(std::mem::take(&mut node.touched) && node.registered);
    }
}

/// What of a node's status is saved.
pub(super) fn standing(status: NodeStatus) -> Standing {
    match status {
        NodeStatus::Registering | NodeStatus::Online => Standing::Serving,
        NodeStatus::Draining => Standing::Draining,
        NodeStatus::Suspect | NodeStatus::Offline => Standing::Silent,
    }
}

fn wall(ms: u64) -> Wall {
    Wall(ms.saturating_mul(1_000_000))
}

impl NodeRecord {
    /// `None` for this machine itself.
    fn of(node: &Node, table: &ReplicaTable) -> Option<NodeRecord> {
        Some(NodeRecord {
            id: node.id.clone(),
            machine_id: node.machine_id.clone(),
            address: node.address.clone()?,
            version: node.version.as_deref().map(str::to_string),
            capabilities: node.capabilities.clone(),
            incarnation: node.incarnation,
            boot_id: node.boot_id.clone(),
            registered_ms: node.registered_at.unix_ms(),
            pools: node.pools.iter().map(PoolRecord::of).collect(),
            replicas: node.replicas.values().filter_map(|r| table.get(*r)).map(ReplicaRecord::of).collect(),
        })
    }
}

impl PoolRecord {
    fn of(pool: &KnownPool) -> PoolRecord {
        let sums = pool.sums.as_deref().cloned().unwrap_or_default();
        PoolRecord {
            pool: pool.pool_id.clone(),
            ready: pool.ready,
            draining: pool.draining,
            slots_total: pool.slots_total,
            vram_free_bytes: pool.vram_free_bytes,
            engine: sums.engine,
            engine_version: sums.engine_version,
            models: sums.models,
            listed: pool.sums.is_none(),
        }
    }

    /// The pool as it is shown until its node is heard.
    fn shown(&self) -> KnownPool {
        let sums = || {
            Box::new(Sums {
                engine: self.engine.as_deref().map(cut),
                engine_version: self.engine_version.as_deref().map(cut),
                models: self.models.clone(),
            })
        };
        KnownPool {
            pool_id: self.pool.clone(),
            ready: self.ready,
            draining: self.draining,
            slots_free: self.slots_total.unwrap_or(0),
            slots_total: self.slots_total,
            vram_free_bytes: self.vram_free_bytes,
            sums: (!self.listed).then(sums),
        }
    }
}

impl ReplicaRecord {
    fn of(replica: &Replica) -> ReplicaRecord {
        ReplicaRecord {
            pool: replica.key.pool.clone(),
            replica: replica.key.replica.clone(),
            generation: replica.generation,
            url: replica.target.engine().cloned(),
            ready: replica.ready,
            draining: replica.draining,
            doubted: replica.confirmation == Confirmation::Doubted,
            slots_total: replica.slots_total,
            models: replica.models.clone(),
            context_length: replica.context_length,
            engine: replica.engine.clone(),
            engine_version: replica.engine_version.clone(),
            device_mask: replica.device_mask.clone(),
            vram_free_bytes: replica.vram_free_bytes,
        }
    }
}
