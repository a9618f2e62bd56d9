//! Keeping nodes and their pools, for another program: which machines are alive, and which takes the next
//! request of a pool?
//!
//! A node registers and sends heartbeats, each with all of its pools; a node that is silent for longer than
//! the timeout is stale, and comes back with its next heartbeat. The rules are those of the control plane
//! itself ([`crate::orchestratord::service_registry`]): messages of an earlier start of a node count for
//! nothing, a name that is alive on one machine is refused to another, and where most of at least three nodes
//! fall silent together, which is likelier a fault here than there, they stay for a while.
//!
//! Clones share one registry. Every method may be called from any thread, and none waits for anything but
//! another such call. What has become stale is known whenever a method is called, so nothing needs to run in
//! the background; [`spawn_stale_checker`] only writes it to the log.
//!
//! ```
//! use llama_orch::service_registry::{NodeInfo, PoolStatus, ServiceRegistry};
//!
//! let registry = ServiceRegistry::new(30_000);
//! registry.register(NodeInfo {
//!     node_id: "gpu-node-1".into(),
//!     machine_id: "machine-alpha".into(),
//!     address: "http://192.168.1.100:9200".into(),
//!     pools: vec!["pool-0".into()],
//!     ..NodeInfo::default()
//! })?;
//! assert!(registry.get_online_nodes().is_empty(), "it has sent no heartbeat yet");
//!
//! let pool = PoolStatus { pool_id: "pool-0".into(), ready: true, slots_free: 4, ..PoolStatus::default() };
//! let reply = registry.heartbeat("gpu-node-1", vec![pool.clone()])?;
//! assert_eq!(reply.next_heartbeat_ms, Some(10_000));
//! let node = registry.get_node_for_pool("pool-0").expect("it has free slots");
//! assert_eq!(node.address, "http://192.168.1.100:9200");
//!
//! registry.update_pool_status("gpu-node-1", PoolStatus { slots_free: 0, slots_total: 4, ..pool })?;
//! assert!(registry.get_node_for_pool("pool-0").is_none(), "it is full");
//! assert!(registry.mark_stale().is_empty());
//! registry.deregister("gpu-node-1")?;
//! assert!(registry.get_node("gpu-node-1").is_none());
//! # Ok::<(), llama_orch::service_registry::RegistryError>(())
//! ```
//!
//! In a server, with the messages as they came ([`RegisterRequest`], [`Heartbeat`]), whose incarnations and
//! sequence numbers then count:
//!
//! ```
//! # use llama_orch::service_registry::{Heartbeat, RegisterRequest, RegistryError, ServiceRegistry, spawn_stale_checker};
//! pub struct AppState {
//!     pub service_registry: Option<ServiceRegistry>,
//!     pub cloud_profile: bool,
//! }
//!
//! impl AppState {
//!     pub fn cloud_profile_enabled(&self) -> bool {
//!         self.cloud_profile
//!     }
//!     pub fn service_registry(&self) -> &ServiceRegistry {
//!         self.service_registry.as_ref().expect("the cloud profile has one")
//!     }
//! }
//!
//! /// `POST /v2/nodes/register`: status and body of the answer.
//! fn register(state: &AppState, body: &str) -> (u16, String) {
//!     let Ok(request) = serde_json::from_str::<RegisterRequest>(body) else { return (400, body.into()) };
//!     match state.service_registry().register(request) {
//!         Ok(reply) => (200, serde_json::to_string(&reply).expect("JSON")),
//!         Err(error) => (error.http_status(), error.to_string()),
//!     }
//! }
//!
//! let registry = ServiceRegistry::new(30_000);
//! let state = AppState { service_registry: Some(registry.clone()), cloud_profile: true };
//! // CLOUD_PROFILE: Spawn stale node checker
//! if state.cloud_profile_enabled() {
//!     spawn_stale_checker(registry, 10);
//! }
//! let node = r#"{"node_id":"gpu-node-1","address":"192.168.1.100:9200","incarnation":2,"boot_id":"a"}"#;
//! assert_eq!(register(&state, node).0, 200);
//! let past = register(&state, &node.replace("2,", "1,"));
//! assert!(past.0 == 409 && past.1.contains("a later start of this node's agent"), "{past:?}");
//! ```

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use serde::{Serialize, Serializer};

use crate::orchestratord::service_registry::{self as core, Change, Fenced, KnownPool, Limits, Node};
use crate::pool_registry_types::ReplicaStatus;
use crate::time::Now;
use crate::wire::id::{NodeId, PoolId};
use crate::wire::node::PoolBeat;
use crate::wire::url::BaseUrl;

pub use crate::orchestratord::service_registry::NodeStatus;
pub use crate::pool_registry_types::{GpuInfo, InvalidStatus, NodeCapabilities, PoolStatus};
pub use crate::wire::node::{Heartbeat, HeartbeatReply, RegisterReply, RegisterRequest};

/// Heartbeats within one timeout that nodes are asked for: two may be lost.
const HEARTBEATS_PER_TIMEOUT: u64 = 3;

/// A node. To register one, the fields from `status` on need not be set.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct NodeInfo {
    /// Its name, 1 to 128 of `A-Z a-z 0-9 . _ -`.
    pub node_id: String,
    /// Its machine's name; the node's where empty.
    pub machine_id: String,
    /// Where it is reached, `http://HOST:PORT`.
    pub address: String,
    /// Its pools.
    pub pools: Vec<String>,
    /// What its machine has.
    pub capabilities: NodeCapabilities,
    /// Version of its agent.
    pub version: Option<String>,
    /// Grows with every start of its agent; `None` where that is not told.
    pub incarnation: Option<u64>,
    /// Boot of its machine, which tells an agent that was started again from one elsewhere of the same name.
    pub boot_id: Option<String>,
    /// `Online` while it sends heartbeats.
    #[serde(serialize_with = "as_text")]
    pub status: NodeStatus,
    /// When it registered, in milliseconds since the Unix epoch.
    pub registered_at_ms: u64,
    /// When its last heartbeat came, in milliseconds since the Unix epoch; 0 before the first.
    pub last_heartbeat_ms: u64,
}

impl Default for NodeInfo {
    fn default() -> NodeInfo {
        NodeInfo {
            node_id: String::new(),
            machine_id: String::new(),
            address: String::new(),
            pools: Vec::new(),
            capabilities: NodeCapabilities::default(),
            version: None,
            incarnation: None,
            boot_id: None,
            status: NodeStatus::Registering,
            registered_at_ms: 0,
            last_heartbeat_ms: 0,
        }
    }
}

fn as_text<S: Serializer>(status: &NodeStatus, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(status.as_str())
}

impl TryFrom<NodeInfo> for RegisterRequest {
    type Error = InvalidStatus;

    fn try_from(node: NodeInfo) -> Result<RegisterRequest, InvalidStatus> {
        let pools = node.pools.iter().map(|pool| PoolId::new(pool));
        Ok(RegisterRequest {
            node_id: NodeId::new(&node.node_id).map_err(InvalidStatus::of("node_id"))?,
            machine_id: Some(node.machine_id).filter(|id| !id.is_empty()),
            address: BaseUrl::lenient(&node.address).map_err(InvalidStatus::of("address"))?,
            pools: pools.collect::<Result<_, _>>().map_err(InvalidStatus::of("pools"))?,
            capabilities: node.capabilities,
            gpu_loads: Vec::new(),
            version: node.version,
            incarnation: node.incarnation,
            boot_id: node.boot_id,
        })
    }
}

impl From<&Node> for NodeInfo {
    fn from(node: &Node) -> NodeInfo {
        NodeInfo {
            node_id: node.id.to_string(),
            machine_id: node.machine_id.clone(),
            address: node.address.as_ref().map(ToString::to_string).unwrap_or_default(),
            pools: node.pools.iter().map(|pool| pool.pool_id.to_string()).collect(),
            capabilities: (*node.capabilities).clone(),
            version: node.version.as_deref().map(str::to_string),
            incarnation: node.incarnation,
            boot_id: node.boot_id.clone(),
            status: node.status,
            registered_at_ms: node.registered_at.unix_ms(),
            last_heartbeat_ms: node.last_heartbeat_at.map_or(0, |at| at.unix_ms()),
        }
    }
}

/// Why a message was refused; nothing has changed then. Displays as a sentence for operators.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RegistryError {
    /// A value in it cannot be used.
    Invalid(InvalidStatus),
    /// The registry does not take it from this node.
    Refused {
        /// The node.
        node_id: String,
        /// Why.
        why: Fenced,
    },
}

impl RegistryError {
    /// The status with which a server answers: 400, 404 for a node that must register first, 409 for a
    /// message of an earlier start or of another machine, 413 or 503 beyond a limit.
    #[must_use]
    pub fn http_status(&self) -> u16 {
        match self {
            RegistryError::Invalid(_) => 400,
            RegistryError::Refused { why: Fenced::UnknownNode, .. } => 404,
            RegistryError::Refused { why: Fenced::TooLarge { .. }, .. } => 413,
            RegistryError::Refused { why: Fenced::TooMany { .. }, .. } => 503,
            RegistryError::Refused { .. } => 409,
        }
    }
}

impl fmt::Display for RegistryError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RegistryError::Invalid(invalid) => invalid.fmt(f),
            RegistryError::Refused { node_id, why } => write!(f, "node {node_id}: {why}"),
        }
    }
}

impl std::error::Error for RegistryError {}

impl From<InvalidStatus> for RegistryError {
    fn from(invalid: InvalidStatus) -> RegistryError {
        RegistryError::Invalid(invalid)
    }
}

impl From<Infallible> for RegistryError {
    fn from(never: Infallible) -> RegistryError {
        match never {}
    }
}

/// The registry. Clones are the same one.
#[derive(Clone, Debug)]
pub struct ServiceRegistry(Arc<Mutex<State>>);

impl ServiceRegistry {
    /// An empty registry. A node is stale after `timeout_ms` without a heartbeat; it is asked for three in
    /// that time.
    #[must_use]
    pub fn new(timeout_ms: u64) -> ServiceRegistry {
        let epoch = crate::reactor::now().wall.unix_ms();
        ServiceRegistry(Arc::new(Mutex::new(State::new(timeout_ms, epoch))))
    }

    /// Registers a node, a [`NodeInfo`] or a [`RegisterRequest`] as it came, or registers it again. It is
    /// `Registering` until its first heartbeat.
    ///
    /// # Errors
    /// [`RegistryError`].
    pub fn register(
        &self,
        node: impl TryInto<RegisterRequest, Error: Into<RegistryError>>,
    ) -> Result<RegisterReply, RegistryError> {
        let request = node.try_into().map_err(Into::into)?;
        self.at_once(|state, now| state.register(&request, now))
    }

    /// Takes a heartbeat: the state of every pool of the node as a `Vec<PoolStatus>`, or a [`Heartbeat`] as
    /// it came. What is not named is gone. The node is `Online` from now on.
    ///
    /// # Errors
    /// [`RegistryError`]; a node that is not known must register first.
    pub fn heartbeat(
        &self,
        node_id: &str,
        pools: impl TryInto<Heartbeat, Error: Into<RegistryError>>,
    ) -> Result<HeartbeatReply, RegistryError> {
        let (node, beat) = (checked(node_id)?, pools.try_into().map_err(Into::into)?);
        self.at_once(|state, now| state.heartbeat(&node, &beat, now))
    }

    /// Removes a node, whatever its incarnation.
    ///
    /// # Errors
    /// [`RegistryError`] where it is not known.
    pub fn deregister(&self, node_id: &str) -> Result<(), RegistryError> {
        let node = checked(node_id)?;
        self.at_once(|state, now| state.deregister(&node, None, now))
    }

    /// Removes a node unless a later start of it has registered: for `DELETE /v2/nodes/{id}?incarnation=N`.
    /// A registration of this incarnation that arrives late is refused.
    ///
    /// # Errors
    /// [`RegistryError`].
    pub fn deregister_incarnation(&self, node_id: &str, incarnation: u64) -> Result<(), RegistryError> {
        let node = checked(node_id)?;
        self.at_once(|state, now| state.deregister(&node, Some(incarnation), now))
    }

    /// One node, stale or not.
    #[must_use]
    pub fn get_node(&self, node_id: &str) -> Option<NodeInfo> {
        let node = NodeId::new(node_id).ok()?;
        self.at_once(|state, _| state.core.node(&node).map(NodeInfo::from))
    }

    /// Every node, stale ones included, by name.
    #[must_use]
    pub fn get_nodes(&self) -> Vec<NodeInfo> {
        self.at_once(|state, _| state.core.nodes().map(NodeInfo::from).collect())
    }

    /// Nodes that send heartbeats and take work, by name.
    #[must_use]
    pub fn get_online_nodes(&self) -> Vec<NodeInfo> {
        self.at_once(|state, _| state.online().map(NodeInfo::from).collect())
    }

    /// The node for the next request of a pool: of those that are online, and whose pool is ready, not
    /// draining and has a free slot, the one with the smallest share of slots in use; between equals the one
    /// with more free GPU memory, then the first by name. `None` where there is none.
    #[must_use]
    pub fn get_node_for_pool(&self, pool_id: &str) -> Option<NodeInfo> {
        let pool = PoolId::new(pool_id).ok()?;
        self.at_once(|state, _| state.node_for(&pool).map(NodeInfo::from))
    }

    /// The state of one pool, as its node last told it.
    #[must_use]
    pub fn get_pool_status(&self, node_id: &str, pool_id: &str) -> Option<PoolStatus> {
        let pools = self.get_node_pools(node_id);
        pools.into_iter().find(|pool| pool.pool_id == pool_id)
    }

    /// The state of every pool of a node, as it last told it; none where the node is not known.
    #[must_use]
    pub fn get_node_pools(&self, node_id: &str) -> Vec<PoolStatus> {
        let Ok(node) = NodeId::new(node_id) else { return Vec::new() };
        self.at_once(|state, _| state.pools(&node))
    }

    /// Takes what is new about one pool of a node, between heartbeats. Its other pools stay as they are, and
    /// it must send its heartbeats as before.
    ///
    /// # Errors
    /// [`RegistryError`].
    pub fn update_pool_status(&self, node_id: &str, pool: PoolStatus) -> Result<(), RegistryError> {
        let (node, pool) = (checked(node_id)?, PoolBeat::try_from(pool)?);
        self.at_once(|state, now| state.update_pool(&node, &pool, now))
    }

    /// Names of the nodes that have become stale since this was last asked, and still are.
    pub fn mark_stale(&self) -> Vec<String> {
        self.at_once(|state, _| state.take_stale())
    }

    /// Does something at one time, with whatever is overdue by then done first.
    fn at_once<T>(&self, act: impl FnOnce(&mut State, Now) -> T) -> T {
        // No call leaves the registry half changed, so a thread that panicked has harmed nothing.
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let now = crate::reactor::now();
        state.expire(now);
        act(&mut state, now)
    }
}

/// Starts a thread that calls [`ServiceRegistry::mark_stale`] every so many seconds, at least 1, and writes
/// to the log which nodes fell silent. It ends when nothing else holds the registry any more.
///
/// # Panics
/// Where the kernel gives no thread.
pub fn spawn_stale_checker(registry: ServiceRegistry, interval_secs: u64) -> JoinHandle<()> {
    let held = Arc::downgrade(&registry.0);
    drop(registry);
    let interval = Duration::from_secs(interval_secs.max(1));
    let check = move || {
        while let Some(state) = held.upgrade() {
            for node in ServiceRegistry(state).mark_stale() {
                log::warn!("node {node} is stale: no heartbeat within the timeout");
            }
            std::thread::park_timeout(interval);
        }
    };
    std::thread::Builder::new().name("stale-checker".into()).spawn(check).expect("the kernel gives a thread")
}

fn checked(node_id: &str) -> Result<NodeId, RegistryError> {
    NodeId::new(node_id).map_err(InvalidStatus::of("node_id")).map_err(RegistryError::Invalid)
}

/// What the lock guards. It is handed the time, as the core is.
#[derive(Debug)]
struct State {
    core: core::ServiceRegistry,
    /// Nodes that became stale, still are, and were not told yet.
    stale: BTreeSet<NodeId>,
    changes: Vec<Change>,
}

impl State {
    fn new(timeout_ms: u64, epoch: u64) -> State {
        let limits = Limits {
            node_timeout_ms: timeout_ms,
            offline_grace_ms: 0,
            heartbeat_interval_ms: timeout_ms / HEARTBEATS_PER_TIMEOUT,
            ..Limits::default()
        };
        let core = core::ServiceRegistry::new(limits, epoch);
        State { core, stale: BTreeSet::new(), changes: Vec::new() }
    }

    fn expire(&mut self, now: Now) {
        self.core.expire(now, &mut self.changes);
        self.note();
    }

    fn register(&mut self, request: &RegisterRequest, now: Now) -> Result<RegisterReply, RegistryError> {
        let done = self.core.register(request, &request.address.to_string(), now, &mut self.changes);
        self.end(&request.node_id, done)
    }

    fn heartbeat(
        &mut self,
        node: &NodeId,
        beat: &Heartbeat,
        now: Now,
    ) -> Result<HeartbeatReply, RegistryError> {
        let known = self.core.node(node);
        let peer = known.and_then(|node| node.address.as_ref()).map(ToString::to_string).unwrap_or_default();
        let done = self.core.heartbeat(node, beat, &peer, now, &mut self.changes);
        self.end(node, done)
    }

    fn deregister(&mut self, node: &NodeId, incarnation: Option<u64>, now: Now) -> Result<(), RegistryError> {
        let done = self.core.deregister(node, incarnation, now, &mut self.changes);
        self.end(node, done)
    }

    fn update_pool(&mut self, node: &NodeId, pool: &PoolBeat, now: Now) -> Result<(), RegistryError> {
        let done = self.core.update_pool(node, pool, now, &mut self.changes);
        self.end(node, done)
    }

    fn online(&self) -> impl Iterator<Item = &Node> {
        self.core.nodes().filter(|node| node.status == NodeStatus::Online)
    }

    fn node_for(&self, pool: &PoolId) -> Option<&Node> {
        let has_slot = |p: &&KnownPool| p.pool_id == *pool && p.ready && !p.draining && p.slots_free > 0;
        let candidates = self.online().filter_map(|node| Some((node, node.pools.iter().find(has_slot)?)));
        let (node, _) =
            candidates.reduce(|best, next| if is_better(next.1, best.1) { next } else { best })?;
        Some(node)
    }

    fn pools(&self, node: &NodeId) -> Vec<PoolStatus> {
        let Some(node) = self.core.node(node) else { return Vec::new() };
        node.pools.iter().map(|pool| self.pool(node, pool)).collect()
    }

    fn pool(&self, node: &Node, pool: &KnownPool) -> PoolStatus {
        let mut status = PoolStatus::from(&pool.as_beat());
        if let Some(list) = &mut status.replicas {
            let replicas = self.core.replicas_of(node).filter_map(|replica| self.core.replica(replica));
            list.extend(replicas.filter(|replica| replica.key.pool == pool.pool_id).map(replica_status));
        }
        status
    }

    fn take_stale(&mut self) -> Vec<String> {
        std::mem::take(&mut self.stale).iter().map(ToString::to_string).collect()
    }

    fn end<T>(&mut self, node: &NodeId, done: Result<T, Fenced>) -> Result<T, RegistryError> {
        self.note();
        done.map_err(|why| RegistryError::Refused { node_id: node.to_string(), why })
    }

    fn note(&mut self) {
        for change in self.changes.drain(..) {
            match change {
                Change::NodeStatus { node, to: NodeStatus::Suspect | NodeStatus::Offline, .. } => {
                    self.stale.insert(node);
                }
                Change::NodeStatus { node, .. } | Change::NodeGone { node, .. } => {
                    self.stale.remove(&node);
                }
                _ => {}
            }
        }
    }
}

/// Whether `a` has the smaller share of its slots in use, or else more free memory. Both have slots.
fn is_better(a: &KnownPool, b: &KnownPool) -> bool {
    let used = |pool: &KnownPool| u64::from(pool.slots_total() - pool.slots_free);
    let load = |of: &KnownPool, with: &KnownPool| used(of) * u64::from(with.slots_total());
    (load(a, b), b.vram_free_bytes) < (load(b, a), a.vram_free_bytes)
}

fn replica_status(replica: &core::Replica) -> ReplicaStatus {
    ReplicaStatus {
        replica_id: replica.key.replica.to_string(),
        url: replica.target.engine().map(ToString::to_string).unwrap_or_default(),
        ready: replica.ready,
        draining: replica.draining,
        slots_free: replica.slots_reported_free,
        slots_total: replica.slots_total,
        generation: replica.generation,
        models: replica.models.to_vec(),
        context_length: None,
        reason: replica.reason.as_deref().map(str::to_string),
        device_mask: replica.device_mask.as_deref().map(str::to_string),
        engine: replica.engine.as_deref().map(str::to_string),
        engine_version: replica.engine_version.as_deref().map(str::to_string),
    }
}

#[cfg(test)]
mod tests;
