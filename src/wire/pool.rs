//! A pool's status as `GET /v2/pools/{id}/status` tells it, by the node agent and by the control
//! plane alike, and the agent's report about all of its pools.

use serde::{Deserialize, Serialize};

use super::drain::DrainStatus;
use super::gpu_load::GpuLoad;
use super::id::{NodeId, PoolId, ReplicaId};
use super::node::Capabilities;
use super::preparation::PoolPreparation;
use super::url::BaseUrl;

/// Directory below that of the handoffs in which provisioners listen for what is to become of their pools.
pub const PROVISIONER_DIRECTORY: &str = ".provisioners";

/// All that a node's agent tells about its node at once: `GET /v2/pools`. A control plane that polls takes
/// it for what a heartbeat would have said.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentReport {
    /// The node's name.
    pub node_id: NodeId,
    /// The machine's name; the node's where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machine_id: Option<String>,
    /// Version of the agent.
    #[serde(default)]
    pub version: Option<String>,
    /// Grows with every start of the agent; absent from older agents.
    #[serde(default)]
    pub incarnation: Option<u64>,
    /// The kernel's boot id: tells a restarted agent from a twin on another machine.
    #[serde(default)]
    pub boot_id: Option<String>,
    /// The whole node takes no new work.
    #[serde(default)]
    pub draining: bool,
    /// What the machine has.
    #[serde(default)]
    pub capabilities: Capabilities,
    /// Every pool of the node, by name.
    #[serde(default)]
    pub pools: Vec<PoolStatus>,
    /// Pools in which something is built, fetched or loaded.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub preparation: Vec<PoolPreparation>,
    /// How each of the machine's GPUs is used; empty from older agents, and where none can be read.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub gpu_loads: Vec<GpuLoad>,
}

/// State of one pool. The first six fields are what the oldest clients look for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolStatus {
    /// The pool.
    pub pool_id: PoolId,
    /// At least one engine answers.
    #[serde(default)]
    pub live: bool,
    /// At least one replica takes work.
    #[serde(default)]
    pub ready: bool,
    /// Every replica is draining.
    #[serde(default)]
    pub draining: bool,
    /// The narrowest drain that covers the pool.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drain: Option<DrainStatus>,
    /// Requests that run through this node's relay.
    #[serde(default)]
    pub active_leases: u32,
    /// Version of the first replica's engine.
    #[serde(default)]
    pub engine_version: Option<String>,
    /// Kind of the first replica's engine.
    #[serde(default)]
    pub engine: Option<String>,
    /// Slots of all replicas.
    #[serde(default)]
    pub slots_total: u32,
    /// Free slots of all replicas.
    #[serde(default)]
    pub slots_free: u32,
    /// GPUs of the first replica.
    #[serde(default)]
    pub device_mask: Option<String>,
    /// GPU memory, 0 where unknown.
    #[serde(default)]
    pub vram_total_bytes: u64,
    /// Free GPU memory, 0 where unknown.
    #[serde(default)]
    pub vram_free_bytes: u64,
    /// Models that the ready replicas serve.
    #[serde(default)]
    pub models_available: Vec<String>,
    /// The newest reason why a replica is not ready.
    #[serde(default)]
    pub last_error: Option<String>,
    /// URL of the first replica, for clients that know only one a pool.
    #[serde(default)]
    pub url: Option<BaseUrl>,
    /// Name of the first replica.
    #[serde(default)]
    pub replica_id: Option<ReplicaId>,
    /// Every replica, by name.
    #[serde(default)]
    pub replicas: Vec<ReplicaStatus>,
}

/// State of one replica.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplicaStatus {
    /// Its name within the pool.
    pub replica_id: ReplicaId,
    /// Where its engine listens.
    pub url: BaseUrl,
    /// `found`, `probing`, `ready`, `suspect` or `draining`.
    pub state: String,
    /// Why it is in that state, for people.
    pub reason: String,
    /// Since when, in milliseconds since the Unix epoch.
    pub since_ms: u64,
    /// When its engine is asked next, in milliseconds since the Unix epoch, where that is planned.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_probe_at_ms: Option<u64>,
    /// Takes work now.
    pub ready: bool,
    /// Takes no new work.
    #[serde(default)]
    pub draining: bool,
    /// The narrowest drain that covers it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drain: Option<DrainStatus>,
    /// Requests that it serves at once.
    pub slots_total: u32,
    /// Of these, free.
    pub slots_free: u32,
    /// Changes when another engine process stands behind the same name.
    #[serde(default)]
    pub generation: u64,
    /// Models that it serves.
    #[serde(default)]
    pub models: Vec<String>,
    /// Longest prompt and answer together, in tokens, where the engine tells it.
    #[serde(default)]
    pub context_length: Option<u64>,
    /// Kind of engine.
    #[serde(default)]
    pub engine: Option<String>,
    /// Its version.
    #[serde(default)]
    pub engine_version: Option<String>,
    /// GPUs that it uses.
    #[serde(default)]
    pub device_mask: Option<String>,
    /// File that announced it.
    #[serde(default)]
    pub handoff_file: Option<String>,
}
