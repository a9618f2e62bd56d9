//! The registry as others see it: heartbeats, pool status, the list of files.

use std::collections::BTreeSet;

use super::change::{FileState, FileView, State};
use super::registry::{Registry, Replica};
use crate::time::Now;
use crate::wire::handoff::Handoff;
use crate::wire::id::{PoolId, ReplicaKey};
use crate::wire::node::{POOLS_MAX, PoolBeat, REPLICAS_MAX, ReplicaBeat};
use crate::wire::pool::{PoolStatus, ReplicaStatus};

/// What a pool has, as numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PoolCounts {
    /// At least one replica takes work.
    pub is_ready: bool,
    /// Slots of all replicas.
    pub slots_total: u32,
    /// Free slots where work can go now.
    pub slots_free: u32,
}

type Entry<'a> = (&'a ReplicaKey, &'a Replica);

impl Registry {
    /// One replica's generation and handoff.
    #[must_use]
    pub fn engine(&self, key: &ReplicaKey) -> Option<(&ReplicaKey, u64, &Handoff)> {
        let (key, replica) = self.replicas.get_key_value(key)?;
        Some((key, replica.serial, &replica.handoff))
    }

    /// Every replica with its generation and its handoff, by name.
    pub fn engines(&self) -> impl Iterator<Item = (&ReplicaKey, u64, &Handoff)> {
        self.replicas.iter().map(|(key, replica)| (key, replica.serial, &*replica.handoff))
    }

    /// What a heartbeat says, by pool and replica. GPU memory is left at 0: this room knows none.
    #[must_use]
    pub fn pool_beats(&self) -> Vec<PoolBeat> {
        let mut pools = self.by_pool();
        if pools.len() > POOLS_MAX {
            // Only pools that run out beside the ones that are announced can be too many.
            pools.retain(|pool| pool.iter().any(|(_, replica)| !replica.is_withdrawn()));
        }
        pools.iter().filter_map(|pool| self.beat(pool)).collect()
    }

    /// One pool's status, `None` where it has no replica.
    #[must_use]
    pub fn pool_status(&self, pool: &PoolId) -> Option<PoolStatus> {
        let replicas: Vec<Entry> = self.replicas.iter().filter(|(key, _)| key.pool == *pool).collect();
        self.status(&replicas)
    }

    /// One replica's status.
    #[must_use]
    pub fn replica_status(&self, key: &ReplicaKey) -> Option<ReplicaStatus> {
        self.replicas.get(key).map(|replica| self.status_of(key, replica))
    }

    /// Every pool's status, by name.
    #[must_use]
    pub fn pools(&self) -> Vec<PoolStatus> {
        self.by_pool().iter().filter_map(|pool| self.status(pool)).collect()
    }

    /// Every file of the last listing, by name, and what became of it.
    pub fn files(&self) -> impl Iterator<Item = FileView<'_>> {
        self.directory.files.iter().map(|(name, file)| FileView {
            name,
            state: file.state.unwrap_or(FileState::Refused),
            error: file.error.as_deref(),
            replica: file.good.as_ref().map(|good| good.handoff.key()),
            modified: file.modified,
        })
    }

    /// The answer to `GET /v2/handoffs`: every file, its state and its error.
    #[must_use]
    pub fn files_json(&self, watch_mode: &str) -> serde_json::Value {
        let files: Vec<_> = self
            .files()
            .map(|file| {
                serde_json::json!({
                    "file": file.name,
                    "state": file.state.as_str(),
                    "error": file.error,
                    "pool_id": file.replica.as_ref().map(|key| &key.pool),
                    "replica_id": file.replica.as_ref().map(|key| &key.replica),
                    "modified_ms": file.modified.unix_ms(),
                })
            })
            .collect();
        serde_json::json!({"watch_mode": watch_mode, "files": files})
    }

    /// The numbers of every pool, by name: what a scrape shows of any count of replicas.
    #[must_use]
    pub fn pool_counts(&self) -> Vec<(&PoolId, PoolCounts)> {
        let count = |replicas: &Vec<Entry>| PoolCounts {
            is_ready: replicas.iter().any(|(_, replica)| replica.state() == State::Ready),
            slots_total: slots_total(replicas),
            slots_free: slots_free(replicas),
        };
        self.by_pool().iter().map(|replicas| (&replicas[0].0.pool, count(replicas))).collect()
    }

    fn by_pool(&self) -> Vec<Vec<Entry<'_>>> {
        let mut pools: Vec<Vec<Entry>> = Vec::new();
        for entry in &self.replicas {
            match pools.last_mut().filter(|pool| pool[0].0.pool == entry.0.pool) {
                Some(pool) => pool.push(entry),
                None => pools.push(vec![entry]),
            }
        }
        pools
    }

    fn is_pool_draining(&self, replicas: &[Entry]) -> bool {
        replicas.iter().all(|(_, replica)| replica.state() == State::Draining)
    }

    fn beat(&self, replicas: &[Entry]) -> Option<PoolBeat> {
        let &(key, first) = replicas.first()?;
        let mut beats: Vec<ReplicaBeat> = replicas
            .iter()
            .filter(|(_, replica)| replicas.len() <= REPLICAS_MAX || !replica.is_withdrawn())
            .map(|(key, replica)| ReplicaBeat {
                replica_id: key.replica.clone(),
                url: replica.handoff.url.clone(),
                ready: replica.state() == State::Ready,
                draining: replica.state() == State::Draining,
                slots_free: replica.slots_free(),
                slots_total: replica.slots(),
                generation: replica.serial,
                models: replica.models().to_vec(),
                context_length: replica.facts.context_length,
                reason: (replica.state() != State::Ready).then(|| replica.reason().to_string()),
                device_mask: replica.handoff.device_mask.clone(),
                engine: Some(replica.handoff.engine.clone()),
                engine_version: replica.handoff.engine_version.clone(),
            })
            .collect();
        beats.truncate(REPLICAS_MAX);
        Some(PoolBeat {
            pool_id: key.pool.clone(),
            ready: beats.iter().any(|beat| beat.ready),
            draining: self.is_pool_draining(replicas),
            slots_free: slots_free(replicas),
            slots_total: Some(slots_total(replicas)),
            vram_free_bytes: 0,
            engine: Some(first.handoff.engine.clone()),
            engine_version: first.handoff.engine_version.clone(),
            models_available: models(replicas),
            replicas: Some(beats),
        })
    }

    fn status(&self, replicas: &[Entry]) -> Option<PoolStatus> {
        let &(key, first) = replicas.first()?;
        let newest_trouble = replicas
            .iter()
            .filter(|(_, replica)| replica.state() != State::Ready)
            .max_by_key(|(_, replica)| replica.since);
        Some(PoolStatus {
            pool_id: key.pool.clone(),
            live: replicas.iter().any(|(_, replica)| replica.phase == State::Ready && replica.is_probed()),
            ready: replicas.iter().any(|(_, replica)| replica.state() == State::Ready),
            draining: self.is_pool_draining(replicas),
            drain: self.drain_of_pool(&key.pool),
            active_leases: replicas.iter().map(|(_, replica)| replica.leases).sum(),
            engine_version: first.handoff.engine_version.clone(),
            engine: Some(first.handoff.engine.clone()),
            slots_total: slots_total(replicas),
            slots_free: slots_free(replicas),
            device_mask: first.handoff.device_mask.clone(),
            vram_total_bytes: 0,
            vram_free_bytes: 0,
            models_available: models(replicas),
            last_error: newest_trouble.map(|(_, replica)| replica.reason().to_string()),
            url: Some(first.handoff.url.clone()),
            replica_id: Some(key.replica.clone()),
            replicas: replicas.iter().map(|(key, replica)| self.status_of(key, replica)).collect(),
        })
    }

    fn status_of(&self, key: &ReplicaKey, replica: &Replica) -> ReplicaStatus {
        ReplicaStatus {
            replica_id: key.replica.clone(),
            url: replica.handoff.url.clone(),
            state: replica.state().as_str().to_string(),
            reason: replica.reason().to_string(),
            since_ms: replica.since.unix_ms(),
            next_probe_at_ms: replica.due_at.map(|at| {
                let Now { mono, wall } = self.clock;
                wall.unix_ms() + at.ms_since(mono)
            }),
            ready: replica.state() == State::Ready,
            draining: replica.state() == State::Draining,
            drain: self.drain_of(key),
            slots_total: replica.slots(),
            slots_free: replica.slots_free(),
            generation: replica.serial,
            models: replica.models().to_vec(),
            context_length: replica.facts.context_length,
            engine: Some(replica.handoff.engine.clone()),
            engine_version: replica.handoff.engine_version.clone(),
            device_mask: replica.handoff.device_mask.clone(),
            handoff_file: replica.file.as_deref().map(str::to_string),
        }
    }
}

/// Free slots where work can go now.
fn slots_free(replicas: &[Entry]) -> u32 {
    let ready = replicas.iter().filter(|(_, replica)| replica.state() == State::Ready);
    ready.map(|(_, replica)| replica.slots_free()).fold(0, u32::saturating_add)
}

fn slots_total(replicas: &[Entry]) -> u32 {
    replicas.iter().map(|(_, replica)| replica.slots()).fold(0, u32::saturating_add)
}

/// Models that can be served now, sorted, each once.
fn models(replicas: &[Entry]) -> Vec<String> {
    let ready = replicas.iter().filter(|(_, replica)| replica.state() == State::Ready);
    let names: BTreeSet<&String> = ready.flat_map(|(_, replica)| replica.models()).collect();
    names.into_iter().cloned().collect()
}
