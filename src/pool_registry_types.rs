//! Pools, replicas and machines as other programs describe them: plain values, nothing to construct first.
//!
//! [`crate::node_registration`] tells a control plane of them, [`crate::service_registry`] keeps them.
//! Names are checked when a value is handed over: an [`InvalidStatus`] says which one is no name and what
//! names look like. Every type reads and writes the JSON of heartbeats and registrations.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::wire::id::{PoolId, ReplicaId};
use crate::wire::node::{Heartbeat, PoolBeat, ReplicaBeat};
use crate::wire::url::BaseUrl;

pub use crate::wire::node::{Capabilities as NodeCapabilities, GpuInfo};

/// State of one pool, as a heartbeat tells it. What is not known keeps its default.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PoolStatus {
    /// The pool.
    pub pool_id: String,
    /// Whether at least one replica takes work.
    pub ready: bool,
    /// No new work for the whole pool.
    pub draining: bool,
    /// Free slots of all replicas.
    pub slots_free: u32,
    /// Slots of all replicas; 0 means as many as are free.
    pub slots_total: u32,
    /// Free GPU memory in bytes, 0 where unknown.
    pub vram_free_bytes: u64,
    /// Kind of engine.
    pub engine: Option<String>,
    /// Its version.
    pub engine_version: Option<String>,
    /// Models that its ready replicas serve.
    pub models_available: Vec<String>,
    /// Its replicas. `None`: the control plane asks for them at the node's address,
    /// `GET /v2/pools/{id}/status`.
    pub replicas: Option<Vec<ReplicaStatus>>,
}

/// State of one replica: an engine process that serves requests.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ReplicaStatus {
    /// Its name within the pool.
    pub replica_id: String,
    /// Where its engine listens. On the node's loopback it is reached through the agent that listens at
    /// the node's address; anywhere else it is dialled directly.
    pub url: String,
    /// Takes work now.
    pub ready: bool,
    /// Takes no new work; what runs may finish.
    pub draining: bool,
    /// Of its slots, free.
    pub slots_free: u32,
    /// Requests that it serves at once; 0 means as many as are free.
    pub slots_total: u32,
    /// Changes when another engine process stands behind the same name.
    pub generation: u64,
    /// Models that it serves. Empty: not known (yet).
    pub models: Vec<String>,
    /// Longest prompt and answer together, in tokens.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub context_length: Option<u64>,
    /// Why it is not ready.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// GPUs that it uses.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device_mask: Option<String>,
    /// Kind of engine.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub engine: Option<String>,
    /// Its version.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub engine_version: Option<String>,
}

/// A value that cannot be used. Displays as a sentence that says where it is and what is allowed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InvalidStatus {
    /// Which value: `pool_id`, or that of a replica within its pool.
    pub field: String,
    /// What is wrong with it.
    pub why: String,
}

impl fmt::Display for InvalidStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.field, self.why)
    }
}

impl std::error::Error for InvalidStatus {}

impl InvalidStatus {
    /// For `map_err`: names the field of an error that says the rest.
    pub(crate) fn of<E: fmt::Display>(field: impl Into<String>) -> impl FnOnce(E) -> InvalidStatus {
        let field = field.into();
        move |why| InvalidStatus { field, why: why.to_string() }
    }
}

impl TryFrom<PoolStatus> for PoolBeat {
    type Error = InvalidStatus;

    fn try_from(pool: PoolStatus) -> Result<PoolBeat, InvalidStatus> {
        let pool_id = PoolId::new(&pool.pool_id).map_err(InvalidStatus::of("pool_id"))?;
        let beat = |replica| replica_beat(&pool_id, replica);
        let replicas = pool.replicas.map(|list| list.into_iter().map(beat).collect()).transpose()?;
        Ok(PoolBeat {
            ready: pool.ready,
            draining: pool.draining,
            slots_free: pool.slots_free,
            slots_total: Some(pool.slots_total.max(pool.slots_free)),
            vram_free_bytes: pool.vram_free_bytes,
            engine: pool.engine,
            engine_version: pool.engine_version,
            models_available: pool.models_available,
            replicas,
            pool_id,
        })
    }
}

fn replica_beat(pool: &PoolId, replica: ReplicaStatus) -> Result<ReplicaBeat, InvalidStatus> {
    let field = |name| format!("pool {pool}, replica {:?}, {name}", replica.replica_id);
    Ok(ReplicaBeat {
        replica_id: ReplicaId::new(&replica.replica_id).map_err(InvalidStatus::of(field("replica_id")))?,
        url: BaseUrl::lenient(&replica.url).map_err(InvalidStatus::of(field("url")))?,
        ready: replica.ready,
        draining: replica.draining,
        slots_free: replica.slots_free,
        slots_total: replica.slots_total.max(replica.slots_free),
        generation: replica.generation,
        models: replica.models,
        context_length: replica.context_length,
        reason: replica.reason,
        device_mask: replica.device_mask,
        engine: replica.engine,
        engine_version: replica.engine_version,
    })
}

impl TryFrom<Vec<PoolStatus>> for Heartbeat {
    type Error = InvalidStatus;

    /// A snapshot of every pool, as senders give it that do not order their heartbeats.
    fn try_from(pools: Vec<PoolStatus>) -> Result<Heartbeat, InvalidStatus> {
        let pools = pools.into_iter().map(PoolBeat::try_from).collect::<Result<_, _>>()?;
        Ok(Heartbeat {
            timestamp: None,
            pools,
            incarnation: None,
            boot_id: None,
            seq: None,
            draining: false,
            preparation: Vec::new(),
            gpu_loads: Vec::new(),
        })
    }
}

impl From<&PoolBeat> for PoolStatus {
    fn from(beat: &PoolBeat) -> PoolStatus {
        let replicas = beat.replicas.as_ref().map(|list| list.iter().map(ReplicaStatus::from).collect());
        PoolStatus {
            pool_id: beat.pool_id.to_string(),
            ready: beat.ready,
            draining: beat.draining,
            slots_free: beat.slots_free,
            slots_total: beat.slots_total(),
            vram_free_bytes: beat.vram_free_bytes,
            engine: beat.engine.clone(),
            engine_version: beat.engine_version.clone(),
            models_available: beat.models_available.clone(),
            replicas,
        }
    }
}

impl From<&ReplicaBeat> for ReplicaStatus {
    fn from(beat: &ReplicaBeat) -> ReplicaStatus {
        ReplicaStatus {
            replica_id: beat.replica_id.to_string(),
            url: beat.url.to_string(),
            ready: beat.ready,
            draining: beat.draining,
            slots_free: beat.slots_free,
            slots_total: beat.slots_total,
            generation: beat.generation,
            models: beat.models.clone(),
            context_length: beat.context_length,
            reason: beat.reason.clone(),
            device_mask: beat.device_mask.clone(),
            engine: beat.engine.clone(),
            engine_version: beat.engine_version.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// What a program says about a pool arrives at the other end, and its JSON is a heartbeat's.
        #[test]
        fn a_status_survives_the_wire(
            flags in any::<(bool, bool, bool, bool)>(),
            (free, more) in (0u32..1000, 0u32..1000),
            (vram, generation) in any::<(u64, u64)>(),
            texts in (proptest::option::of("[a-z]{1,9}"), proptest::option::of("[a-z]{1,9}")),
            models in proptest::collection::vec("[a-z/]{1,9}", 0..4),
            listed in any::<bool>(),
        ) {
            let replica = ReplicaStatus {
                replica_id: "r0".into(), url: "http://10.0.0.1:8081".into(), ready: flags.2, draining: flags.3,
                slots_free: free, slots_total: free + more, generation, models: models.clone(),
                context_length: listed.then_some(generation), reason: texts.0.clone(), device_mask: texts.1.clone(),
                engine: texts.0.clone(), engine_version: texts.1.clone(),
            };
            let pool = PoolStatus {
                pool_id: "pool-0".into(), ready: flags.0, draining: flags.1, slots_free: free,
                slots_total: free + more, vram_free_bytes: vram, engine: texts.0, engine_version: texts.1,
                models_available: models, replicas: listed.then(|| vec![replica]),
            };
            let beat = PoolBeat::try_from(pool.clone()).expect("good names");
            prop_assert_eq!(&PoolStatus::from(&beat), &pool);
            let text = serde_json::to_string(&pool).expect("JSON");
            prop_assert_eq!(serde_json::from_str::<PoolBeat>(&text).expect("a heartbeat's pool"), beat);
        }
    }

    #[test]
    fn a_bad_name_is_named_and_a_total_is_never_below_what_is_free() {
        let with = |replica: ReplicaStatus| PoolStatus {
            pool_id: "pool-0".into(),
            replicas: Some(vec![replica]),
            ..PoolStatus::default()
        };
        let refused = |pool: PoolStatus| PoolBeat::try_from(pool).expect_err("refused").to_string();
        let error = refused(PoolStatus { pool_id: "a b".into(), ..PoolStatus::default() });
        assert!(error.starts_with("pool_id: \"a b\" is not an id"), "{error}");
        let replica = ReplicaStatus { replica_id: "r0".into(), slots_free: 3, ..ReplicaStatus::default() };
        let error = refused(with(replica.clone()));
        assert!(error.starts_with("pool pool-0, replica \"r0\", url: "), "{error}");
        let beat =
            PoolBeat::try_from(with(ReplicaStatus { url: "h:1".into(), ..replica })).expect("good names");
        assert_eq!(beat.replicas.expect("listed")[0].slots_total, 3);
    }
}
