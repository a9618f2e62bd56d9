//! A node's snapshot becomes its replicas: the same engine process keeps its handle, and with it its
//! ledger; what is new is added, what is not named any more is dropped. Everything that a snapshot
//! may be too large in is limited here.
//!
//! Nodes of older releases name no replicas, only sums per pool. Such a pool is held as one replica
//! of unknown address until [`ServiceRegistry::set_engine_url`] brings what the node's status says.

use std::sync::Arc;

use crate::time::Now;
use crate::wire::id::{NodeId, PoolId, ReplicaId, ReplicaKey};
use crate::wire::node::{POOLS_MAX, PoolBeat, REPLICAS_MAX, ReplicaBeat};
use crate::wire::pool::ReplicaStatus;

use super::pools::KnownPool;
use super::shared::Shared;
use super::weights::{self, Weight};
use super::{Change, Circuit, Confirmation, Fenced, Replica, ReplicaRef, ServiceRegistry, Target};

/// Most replicas of one node: far above what GPUs allow, low enough to bound one heartbeat's work.
pub const NODE_REPLICAS_MAX: usize = 4096;
/// Most replicas of all nodes: ten a node at the default limit of nodes, some 50 MB.
pub const REPLICAS_TOTAL_MAX: usize = 100_000;
/// Most models of one replica or pool.
pub const MODELS_MAX: usize = 256;
/// Longest name of a model: paths within model repositories are long.
pub const MODEL_BYTES_MAX: usize = 512;
/// Texts that are only shown (versions, reasons, names of machines) are cut at this length.
pub const TEXT_BYTES_MAX: usize = 256;

/// Name of the one replica of a pool whose sender lists none.
const ONLY_REPLICA: &str = "r0";

impl ServiceRegistry {
    /// Takes what a node's status answer said about a pool whose heartbeat lists no replicas.
    /// Ignored where the node is gone or lists them by now.
    pub fn set_engine_url(
        &mut self,
        node: &NodeId,
        pool: &PoolId,
        replicas: &[ReplicaStatus],
        now: Now,
        changes: &mut Vec<Change>,
    ) {
        let Some(&index) = self.by_id.get(node) else { return };
        let Some(known) = self.nodes[index].pools.iter().find(|p| p.pool_id == *pool) else { return };
        if known.sums.is_none() || replicas.is_empty() {
            return;
        }
        let list: Vec<ReplicaBeat> = replicas.iter().map(asked).collect();
        let with_replicas = PoolBeat { replicas: Some(list), ..known.as_beat() };
        let own = self.nodes[index].replicas.len();
        let more = self.check_more(index, &with_replicas);
        let Ok(more) = self.check_size(own, std::slice::from_ref(&with_replicas)).and(more) else { return };
        self.weighs(index, more);
        self.take_pool(index, &with_replicas, now, changes);
        self.note_changes(index);
    }

    /// Takes a node's word about one of its pools, between heartbeats. The other pools stay as they are,
    /// and the lease is not renewed.
    ///
    /// # Errors
    /// [`Fenced`]; nothing has changed then.
    pub fn update_pool(
        &mut self,
        node: &NodeId,
        pool: &PoolBeat,
        now: Now,
        changes: &mut Vec<Change>,
    ) -> Result<(), Fenced> {
        let index = *self.by_id.get(node).ok_or(Fenced::UnknownNode)?;
        let known = &self.nodes[index];
        self.check_size(known.replicas.len(), std::slice::from_ref(pool))?;
        let more = self.check_more(index, pool)?;
        let others = known.replicas.iter().filter(|(key, _)| key.pool != pool.pool_id).count();
        let own = pool.replicas.as_ref().map_or(1, Vec::len);
        too_large("replicas of a node", others + own, NODE_REPLICAS_MAX)?;
        let at = known.pools.iter().position(|known| known.pool_id == pool.pool_id);
        too_large("pools", known.pools.len() + usize::from(at.is_none()), POOLS_MAX)?;
        self.weighs(index, more);
        self.take_pool(index, pool, now, changes);
        let shown = &mut self.nodes[index].pools;
        match at {
            Some(at) => shown[at] = KnownPool::of(pool),
            None => shown.push(KnownPool::of(pool)),
        }
        self.nodes[index].touched = true;
        self.note_changes(index);
        Ok(())
    }

    /// What a node weighs with one more pool: whatever it replaces, the next heartbeat settles that.
    fn check_more(&self, index: usize, pool: &PoolBeat) -> Result<Weight, Fenced> {
        let old = self.nodes[index].weight;
        let more = Weight { pools: old.pools + weights::of_pools(std::slice::from_ref(pool)), ..old };
        self.check_weight(Some(index), more)?;
        Ok(more)
    }

    /// Makes the replicas of one pool what `pool` says. What it had before and is not named is gone; other
    /// pools are untouched.
    fn take_pool(&mut self, index: usize, pool: &PoolBeat, now: Now, changes: &mut Vec<Change>) {
        let beats = self.nodes[index].beats.wrapping_add(1);
        self.nodes[index].beats = beats;
        let Some(list) = &pool.replicas else { return self.take_unlisted(index, pool, beats, now, changes) };
        let old: Vec<(ReplicaKey, ReplicaRef)> = self.nodes[index]
            .replicas
            .iter()
            .filter(|(k, _)| k.pool == pool.pool_id)
            .map(|(k, r)| (k.clone(), *r))
            .collect();
        for (key, replica) in old {
            if !list.iter().any(|r| r.replica_id == key.replica) {
                self.drop_replica(index, &key, replica, "its node does not name it", changes);
            }
        }
        for replica in list {
            self.take_replica(index, pool, replica, beats, now, changes);
        }
    }

    /// Whether a snapshot keeps to the limits, of a node that has `own` replicas so far.
    pub(super) fn check_size(&self, own: usize, pools: &[PoolBeat]) -> Result<(), Fenced> {
        too_large("pools", pools.len(), POOLS_MAX)?;
        let mut replicas = 0;
        for pool in pools {
            check_models(&pool.models_available)?;
            let list = pool.replicas.as_deref().unwrap_or_default();
            too_large("replicas in a pool", list.len(), REPLICAS_MAX)?;
            replicas += list.len().max(1);
            for replica in list {
                check_models(&replica.models)?;
            }
        }
        too_large("replicas of a node", replicas, NODE_REPLICAS_MAX)?;
        if self.table.len() - own + replicas > REPLICAS_TOTAL_MAX && replicas > own {
            return Err(Fenced::TooMany { what: "replicas", limit: REPLICAS_TOTAL_MAX });
        }
        Ok(())
    }

    /// Makes a node's replicas what its snapshot says.
    pub(super) fn take_snapshot(
        &mut self,
        index: usize,
        pools: &[PoolBeat],
        now: Now,
        changes: &mut Vec<Change>,
    ) {
        let beats = self.nodes[index].beats.wrapping_add(1);
        self.nodes[index].beats = beats;
        for pool in pools {
            match &pool.replicas {
                Some(list) => {
                    for replica in list {
                        self.take_replica(index, pool, replica, beats, now, changes);
                    }
                }
                None => self.take_unlisted(index, pool, beats, now, changes),
            }
        }
        let table = &self.table;
        let gone: Vec<(ReplicaKey, ReplicaRef)> = self.nodes[index]
            .replicas
            .iter()
            .filter(|(_, r)| table.get(**r).is_none_or(|r| r.seen_in_beat != beats))
            .map(|(key, r)| (key.clone(), *r))
            .collect();
        for (key, replica) in gone {
            self.drop_replica(index, &key, replica, "its node does not name it", changes);
        }
        let node = &mut self.nodes[index];
        let shown = &mut node.pools;
        node.touched |= shown.len() != pools.len();
        shown.truncate(pools.len());
        shown.reserve_exact(pools.len() - shown.len());
        for (at, pool) in pools.iter().enumerate() {
            match shown.get_mut(at) {
                Some(old) if old.is_as_in(pool) => {
                    old.slots_free = pool.slots_free;
                    old.vram_free_bytes = pool.vram_free_bytes;
                }
                Some(old) => {
                    let named = (old.pool_id == pool.pool_id).then(|| old.pool_id.clone());
                    *old = KnownPool::of(pool);
                    old.pool_id = named.unwrap_or(pool.pool_id.clone());
                    node.touched = true;
                }
                None => shown.push(KnownPool::of(pool)),
            }
        }
    }

    /// One replica that a snapshot names. Named twice, the first mention counts.
    fn take_replica(
        &mut self,
        index: usize,
        pool: &PoolBeat,
        beat: &ReplicaBeat,
        beats: u32,
        now: Now,
        changes: &mut Vec<Change>,
    ) {
        let node = &self.nodes[index];
        let key = ReplicaKey { pool: pool.pool_id.clone(), replica: beat.replica_id.clone() };
        let address = node.address.clone();
        let mut known = node.replicas.get(&key).copied();
        if let Some(replica) = known
            && let Some(old) = self.table.get(replica)
        {
            if old.seen_in_beat == beats {
                return;
            }
            if old.generation != beat.generation || old.target.engine() != Some(&beat.url) {
                self.drop_replica(index, &key, replica, "another engine process took its place", changes);
                known = None;
            }
        }
        let replica = known.unwrap_or_else(|| {
            let target = self.addresses.target_of(&beat.url, address.as_ref());
            self.add_replica(index, key, beat.generation, target, now, changes)
        });
        let models = if beat.models.is_empty() && pool.replicas.as_ref().is_some_and(|l| l.len() == 1) {
            &pool.models_available
        } else {
            &beat.models
        };
        let mut touched = self.table.set_models(replica, models, beat.context_length, changes);
        if self
            .table
            .get(replica)
            .is_some_and(|known| known.device_mask.as_deref() != beat.device_mask.as_deref())
        {
            changes.push(Change::ReplicaCapacity(replica));
        }
        let names = &mut self.names;
        self.table.update(replica, now, changes, |r| {
            let before = r.saved_numbers();
            r.seen_in_beat = beats;
            r.ready = beat.ready;
            r.confirm();
            r.draining = beat.draining || pool.draining;
            r.vram_free_bytes = pool.vram_free_bytes;
            set_name(&mut r.reason, beat.reason.as_deref(), names);
            touched |= set_name(&mut r.device_mask, beat.device_mask.as_deref(), names);
            touched |= set_name(&mut r.engine, beat.engine.as_deref().or(pool.engine.as_deref()), names);
            let version = beat.engine_version.as_deref().or(pool.engine_version.as_deref());
            touched |= set_name(&mut r.engine_version, version, names);
            r.report_slots(beat.slots_free, beat.slots_total.max(beat.slots_free));
            touched |= before != r.saved_numbers();
        });
        self.nodes[index].touched |= touched;
    }

    /// A pool of which only sums are reported. Its replicas are those that the node's status
    /// answer named, or until then one whose address is not known.
    fn take_unlisted(
        &mut self,
        index: usize,
        pool: &PoolBeat,
        beats: u32,
        now: Now,
        changes: &mut Vec<Change>,
    ) {
        let node = &self.nodes[index];
        let of_pool = |(k, r): (&ReplicaKey, &ReplicaRef)| (k.pool == pool.pool_id).then_some(*r);
        let mut own: Vec<ReplicaRef> = node.replicas.iter().filter_map(of_pool).collect();
        if own.is_empty() {
            let Ok(replica) = ReplicaId::new(ONLY_REPLICA) else { return };
            let key = ReplicaKey { pool: pool.pool_id.clone(), replica };
            own.push(self.add_replica(index, key, 0, Target::AskNode, now, changes));
        }
        let alone = own.len() == 1;
        let mut ask = false;
        for replica in own {
            let Some(old) = self.table.get(replica) else { continue };
            // A pool that comes back, or cannot be reached, may have moved to another port.
            let doubtful = old.target == Target::AskNode
                || !old.ready
                || old.circuit != Circuit::Closed
                || old.confirmation == Confirmation::Restored;
            ask |= pool.ready && doubtful;
            let mut touched = false;
            if !pool.models_available.is_empty() && (alone || old.models.is_empty()) {
                let context_length = old.context_length;
                touched |= self.table.set_models(replica, &pool.models_available, context_length, changes);
            }
            let names = &mut self.names;
            self.table.update(replica, now, changes, |r| {
                let before = r.saved_numbers();
                r.seen_in_beat = beats;
                r.ready = pool.ready;
                r.confirm();
                r.draining = pool.draining;
                r.vram_free_bytes = pool.vram_free_bytes;
                touched |= set_name(&mut r.engine, pool.engine.as_deref(), names);
                touched |= set_name(&mut r.engine_version, pool.engine_version.as_deref(), names);
                if alone {
                    r.report_slots(pool.slots_free, pool.slots_total());
                }
                touched |= before != r.saved_numbers();
            });
            self.nodes[index].touched |= touched;
        }
        if ask && let Some(agent) = self.nodes[index].address.clone() {
            changes.push(Change::AskNode {
                node: self.nodes[index].id.clone(),
                pool: pool.pool_id.clone(),
                agent,
            });
        }
    }

    pub(super) fn add_replica(
        &mut self,
        index: usize,
        key: ReplicaKey,
        generation: u64,
        target: Target,
        now: Now,
        changes: &mut Vec<Change>,
    ) -> ReplicaRef {
        let node = &mut self.nodes[index];
        node.touched = true;
        // One copy of the pool's name serves all that is kept of it.
        let named = node.pools.iter().map(|known| &known.pool_id).find(|known| **known == key.pool);
        let pool = named.unwrap_or(&key.pool).clone();
        let key = ReplicaKey { pool, ..key };
        let replica = Replica {
            node: node.id.clone(),
            key: key.clone(),
            node_status: node.status,
            confirmation: Confirmation::Beaten,
            generation,
            target,
            ready: false,
            draining: false,
            slots_total: 0,
            slots_reported_free: 0,
            in_flight: 0,
            others: 0,
            models: Arc::default(),
            context_length: None,
            engine: None,
            engine_version: None,
            device_mask: None,
            vram_free_bytes: 0,
            reason: None,
            since: now.wall,
            circuit: Circuit::Closed,
            ours_since_report: false,
            trials: 0,
            seen_in_beat: 0,
        };
        let reference = self.table.insert(replica, now, changes);
        node.replicas.insert(key, reference);
        reference
    }

    pub(super) fn drop_replica(
        &mut self,
        index: usize,
        key: &ReplicaKey,
        replica: ReplicaRef,
        reason: &str,
        changes: &mut Vec<Change>,
    ) {
        if let Some(Replica { circuit: Circuit::Open { until, .. }, .. }) = self.table.get(replica) {
            self.retries.remove(&(*until, replica));
        }
        self.table.remove(replica, reason, changes);
        self.nodes[index].replicas.remove(key);
        self.nodes[index].touched = true;
    }
}

pub(super) fn too_large(what: &'static str, count: usize, limit: usize) -> Result<(), Fenced> {
    if count > limit { Err(Fenced::TooLarge { what, limit }) } else { Ok(()) }
}

fn check_models(models: &[String]) -> Result<(), Fenced> {
    too_large("models of a replica", models.len(), MODELS_MAX)?;
    let longest = models.iter().map(String::len).max().unwrap_or(0);
    too_large("bytes in the name of a model", longest, MODEL_BYTES_MAX)
}

/// A replica of a status answer, as a heartbeat would have listed it.
pub(super) fn asked(status: &ReplicaStatus) -> ReplicaBeat {
    ReplicaBeat {
        context_length: status.context_length,
        replica_id: status.replica_id.clone(),
        url: status.url.clone(),
        ready: status.ready,
        draining: status.draining,
        slots_free: status.slots_free,
        slots_total: status.slots_total,
        generation: status.generation,
        models: status.models.clone(),
        reason: Some(status.reason.clone()).filter(|reason| !status.ready && !reason.is_empty()),
        device_mask: status.device_mask.clone(),
        engine: status.engine.clone(),
        engine_version: status.engine_version.clone(),
    }
}

/// Text from a peer that is only shown: bounded, and without control characters.
pub(super) fn cut(text: &str) -> String {
    let end = (0..=TEXT_BYTES_MAX.min(text.len())).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
    text[..end].chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// Sets a text that seldom changes and that many replicas have in common. True if it changed.
fn set_name(old: &mut Option<Arc<str>>, new: Option<&str>, names: &mut Shared<str>) -> bool {
    let changes = old.as_deref() != new;
    if changes {
        *old = new.map(|new| names.keep(&cut(new)));
    }
    changes
}
