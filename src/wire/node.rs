//! What a node agent and a control plane say to each other about the node: registration, heartbeat,
//! deregistration.
//!
//! A heartbeat is a full snapshot, never a difference, so a lost one costs nothing. `(incarnation,
//! seq)` orders them: the incarnation grows with every start of the agent, the sequence with every
//! heartbeat of one incarnation. Peers that know only the older fields send neither; they are served,
//! unordered.

use serde::{Deserialize, Serialize};

use super::gpu_load::GpuLoad;
use super::id::{NodeId, PoolId, ReplicaId};
use super::preparation::PoolPreparation;
use super::url::BaseUrl;

/// Most pools in a registration or heartbeat.
pub const POOLS_MAX: usize = 256;
/// Most replicas in one pool of a heartbeat.
pub const REPLICAS_MAX: usize = 1024;

/// `POST /v2/nodes/register`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegisterRequest {
    /// The node's name.
    pub node_id: NodeId,
    /// The machine's name; the node's where absent.
    #[serde(default)]
    pub machine_id: Option<String>,
    /// Where the node agent is reached from the control plane.
    pub address: BaseUrl,
    /// Pools that the node announces.
    #[serde(default)]
    pub pools: Vec<PoolId>,
    /// What the machine has.
    #[serde(default)]
    pub capabilities: Capabilities,
    /// How each of the machine's GPUs is used; empty from older agents, and where none can be read.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub gpu_loads: Vec<GpuLoad>,
    /// Version of the agent.
    #[serde(default)]
    pub version: Option<String>,
    /// Grows with every start of the agent; absent from older agents.
    #[serde(default)]
    pub incarnation: Option<u64>,
    /// The kernel's boot id: tells a restarted agent from a twin on another machine.
    #[serde(default)]
    pub boot_id: Option<String>,
}

/// What a node's machine has.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Capabilities {
    /// GPUs; empty where none was found.
    #[serde(default)]
    pub gpus: Vec<GpuInfo>,
    /// Logical processors.
    #[serde(default)]
    pub cpu_cores: Option<u32>,
    /// Main memory, in bytes.
    #[serde(default)]
    pub ram_total_bytes: Option<u64>,
}

/// One GPU of a node.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct GpuInfo {
    /// Index, as in a device mask.
    #[serde(default)]
    pub device_id: u32,
    /// Product name.
    #[serde(default)]
    pub name: String,
    /// Memory, in bytes.
    #[serde(default)]
    pub vram_total_bytes: u64,
    /// Compute capability, `major.minor`.
    #[serde(default)]
    pub compute_capability: String,
}

/// Answer to a registration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegisterReply {
    /// Whether the node is registered now.
    pub success: bool,
    /// For people.
    #[serde(default)]
    pub message: String,
    /// The registered name.
    pub node_id: NodeId,
    /// How long the registration lasts without a heartbeat, in milliseconds.
    #[serde(default)]
    pub ttl_ms: Option<u64>,
    /// When the first heartbeat is wanted at the latest, in milliseconds from now.
    #[serde(default)]
    pub next_heartbeat_ms: Option<u64>,
    /// Differs after every start of the control plane.
    #[serde(default)]
    pub registry_epoch: Option<u64>,
}

/// `POST /v2/nodes/{id}/heartbeat`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Heartbeat {
    /// The node's own wall clock, RFC 3339. For display only.
    #[serde(default)]
    pub timestamp: Option<String>,
    /// Every pool of the node.
    #[serde(default)]
    pub pools: Vec<PoolBeat>,
    /// As in the registration.
    #[serde(default)]
    pub incarnation: Option<u64>,
    /// As in the registration: machines with one disk's copies may have the same incarnation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot_id: Option<String>,
    /// Grows by one with every heartbeat of an incarnation.
    #[serde(default)]
    pub seq: Option<u64>,
    /// The agent is shutting down: no new work.
    #[serde(default)]
    pub draining: bool,
    /// Pools in which something is built, fetched or loaded.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub preparation: Vec<PoolPreparation>,
    /// How each of the machine's GPUs is used; empty from older agents, and where none can be read.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub gpu_loads: Vec<GpuLoad>,
}

/// A pool in a heartbeat.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolBeat {
    /// The pool.
    pub pool_id: PoolId,
    /// Whether at least one replica takes work.
    #[serde(default)]
    pub ready: bool,
    /// No new work for the whole pool.
    #[serde(default)]
    pub draining: bool,
    /// Free slots of all replicas.
    #[serde(default)]
    pub slots_free: u32,
    /// Slots of all replicas; `slots_free` where absent.
    #[serde(default)]
    pub slots_total: Option<u32>,
    /// Free GPU memory, 0 where unknown.
    #[serde(default)]
    pub vram_free_bytes: u64,
    /// Kind of engine.
    #[serde(default)]
    pub engine: Option<String>,
    /// Its version.
    #[serde(default)]
    pub engine_version: Option<String>,
    /// Models that its ready replicas serve.
    #[serde(default)]
    pub models_available: Vec<String>,
    /// Replicas; absent from older agents.
    #[serde(default)]
    pub replicas: Option<Vec<ReplicaBeat>>,
}

/// A replica in a heartbeat.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplicaBeat {
    /// The replica, within its pool.
    pub replica_id: ReplicaId,
    /// Where its engine listens, as the node sees it.
    pub url: BaseUrl,
    /// Takes work now.
    pub ready: bool,
    /// Takes no new work; what runs may finish.
    #[serde(default)]
    pub draining: bool,
    /// Slots that no request of which the node knows occupies.
    pub slots_free: u32,
    /// Requests that it serves at once.
    pub slots_total: u32,
    /// Changes when another engine process stands behind the same name.
    #[serde(default)]
    pub generation: u64,
    /// Models that it serves. Empty: not known (yet).
    #[serde(default)]
    pub models: Vec<String>,
    /// Longest prompt and answer together, in tokens, where the engine tells it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub context_length: Option<u64>,
    /// Why it is not ready.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// GPUs that it uses.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device_mask: Option<String>,
    /// Kind of engine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub engine: Option<String>,
    /// Its version.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub engine_version: Option<String>,
}

/// Answer to a heartbeat.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeartbeatReply {
    /// Whether the lease was renewed.
    pub success: bool,
    /// When the next one is wanted at the latest, in milliseconds from now.
    #[serde(default)]
    pub next_heartbeat_ms: Option<u64>,
}

impl PoolBeat {
    /// Total slots, with the fallback for senders that give only the free ones.
    #[must_use]
    pub fn slots_total(&self) -> u32 {
        self.slots_total.unwrap_or(self.slots_free).max(self.slots_free)
    }
}

impl Heartbeat {
    /// Whether the counts are within [`POOLS_MAX`] and [`REPLICAS_MAX`].
    #[must_use]
    pub fn within_limits(&self) -> bool {
        self.pools.len() <= POOLS_MAX
            && self
                .pools
                .iter()
                .all(|pool| pool.replicas.as_ref().is_none_or(|list| list.len() <= REPLICAS_MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn older_registrations_are_read() {
        for body in [
            r#"{"node_id":"n","machine_id":"m","address":"http://h:9200","pools":["pool-0"],"capabilities":{}}"#,
            r#"{"node_id":"n","address":"h:9200","capabilities":{"gpus":[{"device":0,"vram_gb":24}]}}"#,
            r#"{"node_id":"n","address":"h:9200","capabilities":{"gpu_count":1,"total_vram_mb":24000,"cuda_version":"12"}}"#,
        ] {
            let request: RegisterRequest = serde_json::from_str(body).expect(body);
            assert_eq!((request.address.port(), request.incarnation), (9200, None));
        }
    }

    #[test]
    fn older_heartbeats_are_read() {
        let beat: Heartbeat = serde_json::from_str(
            r#"{"timestamp":"2025-09-30T00:00:00Z","pools":[{"pool_id":"pool-0","ready":true,"slots_free":4}]}"#,
        )
        .expect("the smallest heartbeat");
        assert_eq!((beat.pools[0].slots_total(), beat.pools[0].replicas.is_none()), (4, true));
        assert!(beat.within_limits());
    }
}
