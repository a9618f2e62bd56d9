//! Which nodes exist, and which of them are alive.
//!
//! A node registers, then sends heartbeats. Each one is a full snapshot of its replicas and renews
//! its lease, by arrival, on this machine's monotonic clock; no timestamp from a peer is looked at.
//!
//! ```text
//!              register                heartbeat                 heartbeat says so
//!   (unknown) ─────────▶ Registering ────────────▶ Online ◀──────────────────────▶ Draining
//!       ▲                     │                    ▲  │                                │
//!       │                     │ node_timeout       │  │ node_timeout                   │
//!       │                     ▼                    │  ▼                                │
//!       │                  Suspect ◀───────────────┼────────────────────────────────── ┘
//!       │                     │ offline_grace      │ heartbeat
//!       │ forget, deregister  ▼                    │
//!       └────────────────  Offline ────────────────┘
//! ```
//!
//! Two messages are ordered by `(incarnation, seq)`. What is older than what is known is refused and
//! changes nothing. An incarnation that is newer than the registered one must register first.
//!
//! **Mass expiry.** When most nodes fall silent together, the fault is likelier here than there.
//! Leases then do not end for up to [`EXPIRY_HOLD_MS`]; replicas that really are gone leave the
//! rotation through their failing data path.
//!
//! **After a start** of the control plane nobody can expire for one `node_timeout`: no lease is older
//! than the process.
//!
//! The cost of a heartbeat depends on its own replicas, that of [`ServiceRegistry::expire`] on what
//! is due. Nothing walks over all nodes except [`ServiceRegistry::nodes`]. Every mutation reports
//! what it changed as a list of [`Change`]; the caller admits waiters, logs and counts from it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

use slab::Slab;

use crate::time::{Mono, Now, Wall, earliest};
use crate::wire::id::{NodeId, PoolId, ReplicaId, ReplicaKey};
use crate::wire::node::{
    Capabilities, Heartbeat, HeartbeatReply, POOLS_MAX, PoolBeat, REPLICAS_MAX, RegisterReply,
    RegisterRequest, ReplicaBeat,
};
use crate::wire::pool::ReplicaStatus;
use crate::wire::url::BaseUrl;

use super::replica_table::{BACKOFF_FIRST_MS, BACKOFF_MAX_MS, Circuit};
pub use super::replica_table::{Grant, Obstacle, Replica, ReplicaRef, ReplicaTable, Target};

/// Longest time for which leases are kept from ending because most nodes are silent at once: longer
/// than a switch needs to restart, shorter than an operator needs to be called.
pub const EXPIRY_HOLD_MS: u64 = 300_000;
/// How often a held expiry looks again.
pub const EXPIRY_HOLD_RECHECK_MS: u64 = 1_000;
/// Fewest nodes of which a silent majority is taken for a fault of our own.
pub const EXPIRY_HOLD_NODES_MIN: usize = 3;
/// Most replicas of one node: far above what GPUs allow, low enough to bound one heartbeat's work.
pub const NODE_REPLICAS_MAX: usize = 4096;
/// Most replicas of all nodes: ten a node at the default limit of nodes, some 50 MB.
pub const REPLICAS_TOTAL_MAX: usize = 100_000;
/// Most models of one replica or pool.
pub const MODELS_MAX: usize = 256;
/// Longest name of a model: paths within model repositories are long.
pub const MODEL_BYTES_MAX: usize = 512;
/// Most GPUs of a node; machines have up to 16, partitioned ones seven times as many.
pub const GPUS_MAX: usize = 256;
/// Texts that are only shown (versions, reasons, names of machines) are cut at this length.
pub const TEXT_BYTES_MAX: usize = 256;
/// Foreign boot ids remembered per node, so that each is reported once.
pub const TWINS_MAX: usize = 8;

/// Name of the one replica of a pool whose sender lists none.
const ONLY_REPLICA: &str = "r0";

/// Times and sizes that an operator may set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// A lease lasts this long after the last sign of life.
    pub node_timeout_ms: u64,
    /// A suspect node counts as offline this much later.
    pub offline_grace_ms: u64,
    /// An offline node is forgotten this much later.
    pub forget_ms: u64,
    /// Most nodes, offline ones included.
    pub nodes_max: usize,
    /// The interval that nodes are told.
    pub heartbeat_interval_ms: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            node_timeout_ms: 30_000,
            offline_grace_ms: 10_000,
            forget_ms: 24 * 3_600_000,
            nodes_max: 10_000,
            heartbeat_interval_ms: 10_000,
        }
    }
}

/// Where a node is in its life. Written on the wire as spelt here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum NodeStatus {
    /// Registered; its first heartbeat is awaited.
    Registering,
    /// It beats.
    Online,
    /// It beats, and asks for no new work.
    Draining,
    /// Its lease has ended: no new work.
    Suspect,
    /// It has been silent for longer than the grace.
    Offline,
}

impl NodeStatus {
    /// The name on the wire.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            NodeStatus::Registering => "Registering",
            NodeStatus::Online => "Online",
            NodeStatus::Draining => "Draining",
            NodeStatus::Suspect => "Suspect",
            NodeStatus::Offline => "Offline",
        }
    }

    /// Whether its replicas, where any are known, may be given work.
    #[must_use]
    pub fn takes_work(self) -> bool {
        matches!(self, NodeStatus::Online | NodeStatus::Registering)
    }

    fn leased(self) -> bool {
        matches!(self, NodeStatus::Online | NodeStatus::Registering | NodeStatus::Draining)
    }
}

impl fmt::Display for NodeStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What a mutation changed, in the order in which it happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// A node registered.
    NodeRegistered {
        /// The node.
        node: NodeId,
        /// Of its agent, where it sends one.
        incarnation: Option<u64>,
        /// It was known before.
        again: bool,
    },
    /// A node's status changed.
    NodeStatus {
        /// The node.
        node: NodeId,
        /// The former status.
        from: NodeStatus,
        /// The present one.
        to: NodeStatus,
        /// Why, for people.
        reason: String,
    },
    /// A node is no longer known.
    NodeGone {
        /// The node.
        node: NodeId,
        /// Why, for people.
        reason: String,
    },
    /// A replica is known from now on. [`Change::ReplicaReady`] follows once it takes work.
    ReplicaFound {
        /// Its handle.
        replica: ReplicaRef,
        /// Its node.
        node: NodeId,
        /// Its name there.
        key: ReplicaKey,
    },
    /// A replica takes work from now on: waiters may be admitted.
    ReplicaReady(ReplicaRef),
    /// A replica takes no work from now on.
    ReplicaNotReady {
        /// Its handle.
        replica: ReplicaRef,
        /// Why, for people.
        reason: String,
    },
    /// A replica that takes work has more free slots than before: waiters may be admitted.
    ReplicaCapacity(ReplicaRef),
    /// A replica is no longer known, or another engine process took its name.
    ReplicaGone {
        /// Its former handle.
        replica: ReplicaRef,
        /// Its node.
        node: NodeId,
        /// Its name there.
        key: ReplicaKey,
        /// Slots that requests from here held.
        in_flight: u32,
        /// Why, for people.
        reason: String,
    },
    /// A pool's replicas are not listed by its node: its status is to be asked from the node's
    /// agent, and handed to [`ServiceRegistry::set_engine_url`].
    AskNode {
        /// The node.
        node: NodeId,
        /// The pool.
        pool: PoolId,
        /// The node's agent.
        agent: BaseUrl,
    },
    /// Another machine uses the name of a node that is alive. Reported once per foreign boot.
    TwinRefused {
        /// The name.
        node: NodeId,
        /// The other machine's boot id.
        boot_id: String,
        /// Where the other one's request came from.
        peer: String,
        /// Where the live one's last message came from.
        holder: String,
    },
    /// Most nodes are silent: leases do not end for now.
    ExpiryHeld {
        /// At least so many nodes missed a heartbeat.
        late: usize,
        /// Nodes that hold a lease.
        of: usize,
    },
    /// Leases end again.
    ExpiryResumed,
}

/// Why a message from a node was refused. Nothing has changed then, except that it may have been
/// reported. Displays as a sentence for operators.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fenced {
    /// No such node, or a newer incarnation of it than the registered one: it must register.
    UnknownNode,
    /// From an earlier start of the node's agent.
    OldIncarnation {
        /// The incarnation that is registered.
        known: u64,
    },
    /// Overtaken by a later heartbeat.
    OldSequence {
        /// The greatest sequence number so far.
        known: u64,
    },
    /// The name belongs to another machine that is alive.
    Twin {
        /// Where that machine's last message came from.
        holder: String,
    },
    /// The name belongs to this machine.
    Local,
    /// A limit on the number of nodes or replicas is reached.
    TooMany {
        /// What there are too many of.
        what: &'static str,
        /// The limit.
        limit: usize,
    },
    /// The message is larger than any node's would be.
    TooLarge {
        /// What is too large.
        what: &'static str,
        /// The limit.
        limit: usize,
    },
}

impl fmt::Display for Fenced {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fenced::UnknownNode => f.write_str("the node is not registered"),
            Fenced::OldIncarnation { known } => {
                write!(f, "a later start of this node's agent (incarnation {known}) is registered")
            }
            Fenced::OldSequence { known } => {
                write!(f, "a later heartbeat (sequence {known}) has already arrived")
            }
            Fenced::Twin { holder } => write!(
                f,
                "another machine of this node id is alive (last heard from {holder}): give one of them another id"
            ),
            Fenced::Local => f.write_str("this node id belongs to the control plane's own machine"),
            Fenced::TooMany { what, limit } => write!(f, "the control plane already has its {limit} {what}"),
            Fenced::TooLarge { what, limit } => write!(f, "more than {limit} {what}"),
        }
    }
}

impl std::error::Error for Fenced {}

/// One node as the control plane sees it.
#[derive(Clone, Debug)]
pub struct Node {
    /// Its name.
    pub id: NodeId,
    /// Its machine's name.
    pub machine_id: String,
    /// Where its agent is reached; `None` for this machine itself.
    pub address: Option<BaseUrl>,
    /// Version of its agent.
    pub version: Option<String>,
    /// What its machine has.
    pub capabilities: Capabilities,
    /// Where its last message came from.
    pub peer: String,
    /// Start of its agent; `None` from older agents.
    pub incarnation: Option<u64>,
    /// Boot of its machine; `None` from older agents.
    pub boot_id: Option<String>,
    /// Its present status.
    pub status: NodeStatus,
    /// Since when.
    pub since: Wall,
    /// Why.
    pub reason: String,
    /// When it last registered.
    pub registered_at: Wall,
    /// When it last sent a heartbeat.
    pub last_heartbeat_at: Option<Wall>,
    /// Its pools as last reported. `replicas` is empty here: see [`ServiceRegistry::replicas_of`].
    pub pools: Vec<PoolBeat>,
    seq: Option<u64>,
    /// Heartbeats so far, to tell replicas that the newest one names from others.
    beats: u64,
    last_contact: Mono,
    /// When its status changes if it stays silent; `None` for this machine itself.
    due: Option<Mono>,
    replicas: BTreeMap<ReplicaKey, ReplicaRef>,
    twins: Vec<String>,
}

impl Node {
    /// Milliseconds until its lease ends; 0 once it has, `None` for this machine itself.
    #[must_use]
    pub fn lease_left_ms(&self, now: Now) -> Option<u64> {
        let due = self.due?;
        Some(if self.status.leased() { due.ms_since(now.mono) } else { 0 })
    }
}

/// Nodes, leases and replicas. See the introduction of this file.
#[derive(Debug)]
pub struct ServiceRegistry {
    limits: Limits,
    epoch: u64,
    nodes: Slab<Node>,
    by_id: BTreeMap<NodeId, usize>,
    /// Ends of leases: exactly the nodes that hold one.
    leases: BTreeSet<(Mono, usize)>,
    /// Nodes without a lease, by the time at which they turn Offline or are forgotten.
    lapsed: BTreeSet<(Mono, usize)>,
    /// Ends of backoffs.
    retries: BTreeSet<(Mono, ReplicaRef)>,
    table: ReplicaTable,
    hold: Option<Hold>,
}

/// A mass expiry in progress.
#[derive(Clone, Copy, Debug)]
struct Hold {
    until: Mono,
    recheck: Mono,
}

impl ServiceRegistry {
    /// An empty registry. `epoch` differs after every start of the control plane.
    #[must_use]
    pub fn new(limits: Limits, epoch: u64) -> Self {
        ServiceRegistry {
            limits,
            epoch,
            nodes: Slab::new(),
            by_id: BTreeMap::new(),
            leases: BTreeSet::new(),
            lapsed: BTreeSet::new(),
            retries: BTreeSet::new(),
            table: ReplicaTable::default(),
            hold: None,
        }
    }

    /// Registers a node, or registers it again. The same incarnation twice is one registration whose
    /// answer was lost. A newer incarnation keeps the replicas, unplaceable, until its first
    /// heartbeat says which of them still are what they were.
    ///
    /// # Errors
    /// [`Fenced`]. An older incarnation is let in only where the newer one's lease has ended: a
    /// machine may have lost its state directory.
    pub fn register(
        &mut self,
        request: &RegisterRequest,
        peer: &str,
        now: Now,
        changes: &mut Vec<Change>,
    ) -> Result<RegisterReply, Fenced> {
        too_large("pools", request.pools.len(), POOLS_MAX)?;
        too_large("GPUs", request.capabilities.gpus.len(), GPUS_MAX)?;
        let known = self.by_id.get(&request.node_id).copied();
        let fresh = match known {
            None if self.nodes.len() >= self.limits.nodes_max => {
                return Err(Fenced::TooMany { what: "nodes", limit: self.limits.nodes_max });
            }
            None => true,
            Some(index) => {
                self.fence_twin(index, request, peer, now, changes)?;
                let node = &self.nodes[index];
                if let (Some(new), Some(known)) = (request.incarnation, node.incarnation)
                    && new < known
                    && node.status.leased()
                {
                    return Err(Fenced::OldIncarnation { known });
                }
                request.incarnation != node.incarnation
            }
        };
        let index = match known {
            Some(index) => index,
            None => self.add_node(&request.node_id, now),
        };
        let node = &mut self.nodes[index];
        node.machine_id = cut(request.machine_id.as_deref().unwrap_or(request.node_id.as_str()));
        node.version = request.version.as_deref().map(cut);
        node.capabilities = request.capabilities.clone();
        for gpu in &mut node.capabilities.gpus {
            gpu.name = cut(&gpu.name);
            gpu.compute_capability = cut(&gpu.compute_capability);
        }
        node.incarnation = request.incarnation;
        let boot_id = request.boot_id.as_deref().map(cut);
        if node.boot_id != boot_id {
            node.boot_id = boot_id;
            node.twins.clear();
        }
        node.registered_at = now.wall;
        if fresh || request.incarnation.is_none() {
            node.seq = None;
        }
        let moved = node.address.as_ref() != Some(&request.address);
        node.address = Some(request.address.clone());
        if fresh {
            node.pools = request.pools.iter().map(announced).collect();
        }
        changes.push(Change::NodeRegistered {
            node: request.node_id.clone(),
            incarnation: request.incarnation,
            again: known.is_some(),
        });
        for replica in self.refs_of(index) {
            self.table.update(replica, now, changes, |r| {
                r.confirmed &= !fresh;
                if moved && let Some(engine) = r.target.engine() {
                    r.target = target_of(engine, Some(&request.address));
                }
            });
        }
        self.contact(index, peer, now);
        // A registration does not make a node Online, but must not hide one that is.
        if fresh || !self.nodes[index].status.leased() {
            self.set_status(
                index,
                NodeStatus::Registering,
                "registered, first heartbeat awaited",
                now,
                changes,
            );
        }
        Ok(RegisterReply {
            success: true,
            message: "registered".into(),
            node_id: request.node_id.clone(),
            ttl_ms: Some(self.limits.node_timeout_ms),
            next_heartbeat_ms: Some(self.limits.heartbeat_interval_ms),
            registry_epoch: Some(self.epoch),
        })
    }

    /// Takes a node's snapshot and renews its lease.
    ///
    /// # Errors
    /// [`Fenced`]; [`Fenced::UnknownNode`] asks the node to register.
    pub fn heartbeat(
        &mut self,
        node: &NodeId,
        beat: &Heartbeat,
        peer: &str,
        now: Now,
        changes: &mut Vec<Change>,
    ) -> Result<HeartbeatReply, Fenced> {
        let index = *self.by_id.get(node).ok_or(Fenced::UnknownNode)?;
        let known = &self.nodes[index];
        if known.address.is_none() {
            return Err(Fenced::Local);
        }
        if let (Some(new), Some(old)) = (beat.incarnation, known.incarnation) {
            if new < old {
                return Err(Fenced::OldIncarnation { known: old });
            }
            if new > old {
                return Err(Fenced::UnknownNode);
            }
            if let (Some(seq), Some(last)) = (beat.seq, known.seq)
                && seq <= last
            {
                return Err(Fenced::OldSequence { known: last });
            }
        }
        self.check_size(index, &beat.pools)?;
        let known = &mut self.nodes[index];
        known.incarnation = known.incarnation.or(beat.incarnation);
        known.seq = beat.seq.or(known.seq);
        known.last_heartbeat_at = Some(now.wall);
        self.contact(index, peer, now);
        // Replicas first: when the node turns Online, they are already what it says they are.
        self.take_snapshot(index, &beat.pools, now, changes);
        let (status, reason) = if beat.draining {
            (NodeStatus::Draining, "the node asks for no new work")
        } else {
            (NodeStatus::Online, "it sends heartbeats")
        };
        self.set_status(index, status, reason, now, changes);
        Ok(HeartbeatReply { success: true, next_heartbeat_ms: Some(self.limits.heartbeat_interval_ms) })
    }

    /// Removes a node. A late message of an earlier incarnation cannot remove its successor.
    ///
    /// # Errors
    /// [`Fenced::UnknownNode`], [`Fenced::OldIncarnation`] or [`Fenced::Local`].
    pub fn deregister(
        &mut self,
        node: &NodeId,
        incarnation: Option<u64>,
        changes: &mut Vec<Change>,
    ) -> Result<(), Fenced> {
        let index = *self.by_id.get(node).ok_or(Fenced::UnknownNode)?;
        if self.nodes[index].address.is_none() {
            return Err(Fenced::Local);
        }
        if let (Some(new), Some(known)) = (incarnation, self.nodes[index].incarnation)
            && new < known
        {
            return Err(Fenced::OldIncarnation { known });
        }
        self.drop_node(index, "deregistered", changes);
        Ok(())
    }

    /// Takes the snapshot of a node that needs no lease because this process watches it itself; its
    /// engines are dialled directly.
    ///
    /// # Errors
    /// [`Fenced::TooLarge`] and [`Fenced::TooMany`].
    pub fn set_local(
        &mut self,
        node: &NodeId,
        pools: &[PoolBeat],
        now: Now,
        changes: &mut Vec<Change>,
    ) -> Result<(), Fenced> {
        let index = match self.by_id.get(node) {
            Some(index) => *index,
            None if self.nodes.len() >= self.limits.nodes_max => {
                return Err(Fenced::TooMany { what: "nodes", limit: self.limits.nodes_max });
            }
            None => self.add_node(node, now),
        };
        self.check_size(index, pools)?;
        self.unschedule(index);
        let known = &mut self.nodes[index];
        known.address = None;
        known.last_heartbeat_at = Some(now.wall);
        known.last_contact = now.mono;
        self.take_snapshot(index, pools, now, changes);
        self.set_status(index, NodeStatus::Online, "on this machine", now, changes);
        Ok(())
    }

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
        let Some(beat) = self.nodes[index].pools.iter().find(|p| p.pool_id == *pool).cloned() else { return };
        if beat.replicas.is_some() || replicas.is_empty() {
            return;
        }
        let list: Vec<ReplicaBeat> = replicas.iter().map(asked).collect();
        let mut with_replicas = beat;
        with_replicas.replicas = Some(list);
        if self.check_size(index, std::slice::from_ref(&with_replicas)).is_err() {
            return;
        }
        self.nodes[index].beats += 1;
        let beats = self.nodes[index].beats;
        // What this pool had before and the answer does not name is gone; other pools are untouched.
        let old: Vec<(ReplicaKey, ReplicaRef)> = self.nodes[index]
            .replicas
            .iter()
            .filter(|(k, _)| k.pool == *pool)
            .map(|(k, r)| (k.clone(), *r))
            .collect();
        for (key, replica) in old {
            if !replicas.iter().any(|r| r.replica_id == key.replica) {
                self.drop_replica(index, &key, replica, "its node does not name it", changes);
            }
        }
        for replica in with_replicas.replicas.iter().flatten() {
            self.take_replica(index, &with_replicas, replica, beats, now, changes);
        }
    }

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
                let silent_s = now.mono.ms_since(self.nodes[index].last_contact) / 1000;
                let reason = format!("no heartbeat for {silent_s} s");
                self.set_status(index, NodeStatus::Suspect, &reason, now, changes);
            }
        }
        while let Some(&(due, index)) = self.lapsed.first()
            && due <= now.mono
        {
            let silent_s = now.mono.ms_since(self.nodes[index].last_contact) / 1000;
            let reason = format!("no heartbeat for {silent_s} s");
            if self.nodes[index].status == NodeStatus::Suspect {
                self.set_status(index, NodeStatus::Offline, &reason, now, changes);
            } else {
                self.drop_node(index, &reason, changes);
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

    /// Takes `slots` of a replica for a request; `None` if it does not take work or has fewer.
    pub fn acquire(&mut self, replica: ReplicaRef, slots: u32) -> Option<Grant> {
        self.table.acquire(replica, slots)
    }

    /// Gives the slots back when the request has ended. If the replica still takes work, waiters may
    /// be admitted.
    pub fn release(&mut self, grant: Grant) {
        self.table.release(grant);
    }

    /// A request could not be delivered (no connection, or closed before the answer began). The
    /// replica leaves the rotation at once, for 250 ms at first and up to 10 s after more failures
    /// in a row. Failures while it is out count once.
    pub fn data_path_failed(
        &mut self,
        replica: ReplicaRef,
        reason: &str,
        now: Now,
        changes: &mut Vec<Change>,
    ) {
        let Some(known) = self.table.get(replica) else { return };
        let failures = match &known.circuit {
            Circuit::Open { .. } => return,
            Circuit::Closed => 1,
            Circuit::HalfOpen { failures, .. } => failures.saturating_add(1),
        };
        let doublings = (failures - 1).min(16);
        let until = now.mono.plus_ms((BACKOFF_FIRST_MS << doublings).min(BACKOFF_MAX_MS));
        self.retries.insert((until, replica));
        let reason = cut(reason);
        self.table.update(replica, now, changes, |r| r.circuit = Circuit::Open { until, failures, reason });
    }

    /// A replica answered a request: its data path is trusted again. To be called when the head of
    /// an answer arrives, for until then a replica in doubt is given one request at a time.
    pub fn data_path_worked(&mut self, replica: ReplicaRef, now: Now, changes: &mut Vec<Change>) {
        let Some(known) = self.table.get(replica) else { return };
        match known.circuit {
            Circuit::Closed => return,
            Circuit::Open { until, .. } => {
                self.retries.remove(&(until, replica));
            }
            Circuit::HalfOpen { .. } => {}
        }
        self.table.update(replica, now, changes, |r| r.circuit = Circuit::Closed);
    }

    /// Every node, by name.
    pub fn nodes(&self) -> impl Iterator<Item = &Node> {
        self.by_id.values().map(|index| &self.nodes[*index])
    }

    /// How many nodes are known, offline ones included.
    #[must_use]
    pub fn nodes_len(&self) -> usize {
        self.nodes.len()
    }

    /// One node.
    #[must_use]
    pub fn node(&self, node: &NodeId) -> Option<&Node> {
        self.by_id.get(node).map(|index| &self.nodes[*index])
    }

    /// Handles of a node's replicas, by pool and name.
    pub fn replicas_of<'a>(&self, node: &'a Node) -> impl Iterator<Item = ReplicaRef> + 'a {
        node.replicas.values().copied()
    }

    /// One replica, if the handle is current.
    #[must_use]
    pub fn replica(&self, replica: ReplicaRef) -> Option<&Replica> {
        self.table.get(replica)
    }

    /// Every replica, by node, pool and name.
    pub fn replicas(&self) -> impl Iterator<Item = (ReplicaRef, &Replica)> {
        self.table.iter()
    }

    /// The table that placement reads.
    #[must_use]
    pub fn table(&self) -> &ReplicaTable {
        &self.table
    }

    /// Every known model by name.
    #[must_use]
    pub fn models(&self) -> Vec<ModelSummary> {
        let mut per_set = vec![(0u32, 0u32); self.table.sets_len()];
        for hot in self.table.hot().iter().filter(|hot| hot.exists) {
            let (known, placeable) = &mut per_set[hot.model_set as usize];
            *known += 1;
            *placeable += u32::from(hot.placeable);
        }
        self.table
            .models()
            .map(|(name, sets)| {
                let count =
                    |pick: fn((u32, u32)) -> u32| sets.iter().map(|s| pick(per_set[*s as usize])).sum();
                ModelSummary { name: name.to_string(), replicas: count(|p| p.0), placeable: count(|p| p.1) }
            })
            .collect()
    }

    /// Panics where the registry contradicts itself. For tests and simulations; linear.
    pub fn check_invariants(&self) {
        self.table.check_invariants();
        assert_eq!(self.by_id.len(), self.nodes.len(), "a node without a name");
        let mut replicas = 0;
        for (id, &index) in &self.by_id {
            let node = &self.nodes[index];
            assert_eq!(&node.id, id, "a node under another name");
            assert_eq!(node.due.is_none(), node.address.is_none(), "{id}: exactly local nodes have no lease");
            if let Some(due) = node.due {
                let leased = node.status.leased();
                assert_eq!(self.leases.contains(&(due, index)), leased, "{id}: lease while {}", node.status);
                assert_eq!(
                    self.lapsed.contains(&(due, index)),
                    !leased,
                    "{id}: lapsed while {}",
                    node.status
                );
            }
            for (key, replica) in &node.replicas {
                let known = self.table.get(*replica).expect("a node's replica exists");
                assert_eq!((&known.node, &known.key), (id, key), "a replica of another node");
                assert_eq!(known.node_status, node.status, "{id} {key}: outdated status");
                if let Circuit::Open { until, .. } = known.circuit {
                    assert!(self.retries.contains(&(until, *replica)), "{id} {key}: never tried again");
                }
            }
            replicas += node.replicas.len();
        }
        assert_eq!(replicas, self.table.len(), "a replica without a node");
        let timers = self.leases.len() + self.lapsed.len();
        assert_eq!(timers, self.nodes.iter().filter(|(_, n)| n.due.is_some()).count(), "a stray timer");
        assert!(self.retries.iter().all(|(_, r)| self.table.get(*r).is_some()), "a stray retry");
    }

    /// Refuses another machine that claims the name of one that is alive.
    fn fence_twin(
        &mut self,
        index: usize,
        request: &RegisterRequest,
        peer: &str,
        now: Now,
        changes: &mut Vec<Change>,
    ) -> Result<(), Fenced> {
        let late_ms = self.limits.heartbeat_interval_ms.saturating_mul(3) / 2;
        let node = &mut self.nodes[index];
        if node.address.is_none() {
            return Err(Fenced::Local);
        }
        let (Some(theirs), Some(ours)) = (request.boot_id.as_deref().map(cut), &node.boot_id) else {
            return Ok(());
        };
        if theirs == *ours || now.mono.ms_since(node.last_contact) >= late_ms {
            return Ok(());
        }
        let holder = node.peer.clone();
        if !node.twins.contains(&theirs) && node.twins.len() < TWINS_MAX {
            node.twins.push(theirs.clone());
            changes.push(Change::TwinRefused {
                node: node.id.clone(),
                boot_id: theirs,
                peer: cut(peer),
                holder: holder.clone(),
            });
        }
        Err(Fenced::Twin { holder })
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

    fn check_size(&self, index: usize, pools: &[PoolBeat]) -> Result<(), Fenced> {
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
        let own = self.nodes[index].replicas.len();
        if self.table.len() - own + replicas > REPLICAS_TOTAL_MAX && replicas > own {
            return Err(Fenced::TooMany { what: "replicas", limit: REPLICAS_TOTAL_MAX });
        }
        Ok(())
    }

    /// Makes a node's replicas what its snapshot says.
    fn take_snapshot(&mut self, index: usize, pools: &[PoolBeat], now: Now, changes: &mut Vec<Change>) {
        self.nodes[index].beats += 1;
        let beats = self.nodes[index].beats;
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
        let shown = &mut self.nodes[index].pools;
        shown.truncate(pools.len());
        for (at, pool) in pools.iter().enumerate() {
            match shown.get_mut(at) {
                Some(old) if same_pool(old, pool) => {
                    old.slots_free = pool.slots_free;
                    old.vram_free_bytes = pool.vram_free_bytes;
                }
                Some(old) => *old = without_replicas(pool),
                None => shown.push(without_replicas(pool)),
            }
        }
    }

    /// One replica that a snapshot names. Named twice, the first mention counts.
    fn take_replica(
        &mut self,
        index: usize,
        pool: &PoolBeat,
        beat: &ReplicaBeat,
        beats: u64,
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
            let target = target_of(&beat.url, address.as_ref());
            self.add_replica(index, key, beat.generation, target, now, changes)
        });
        let models = if beat.models.is_empty() && pool.replicas.as_ref().is_some_and(|l| l.len() == 1) {
            &pool.models_available
        } else {
            &beat.models
        };
        self.table.set_models(replica, models);
        self.table.update(replica, now, changes, |r| {
            r.seen_in_beat = beats;
            r.confirmed = true;
            r.ready = beat.ready;
            r.draining = beat.draining || pool.draining;
            r.vram_free_bytes = pool.vram_free_bytes;
            set_text(&mut r.reason, beat.reason.as_deref());
            set_text(&mut r.device_mask, beat.device_mask.as_deref());
            set_text(&mut r.engine, beat.engine.as_deref().or(pool.engine.as_deref()));
            set_text(
                &mut r.engine_version,
                beat.engine_version.as_deref().or(pool.engine_version.as_deref()),
            );
            r.report_slots(beat.slots_free, beat.slots_total.max(beat.slots_free));
        });
    }

    /// A pool of which only sums are reported. Its replicas are those that the node's status
    /// answer named, or until then one whose address is not known.
    fn take_unlisted(
        &mut self,
        index: usize,
        pool: &PoolBeat,
        beats: u64,
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
            let doubtful = old.target == Target::AskNode || !old.ready || old.circuit != Circuit::Closed;
            ask |= pool.ready && doubtful;
            if !pool.models_available.is_empty() && (alone || old.models.is_empty()) {
                self.table.set_models(replica, &pool.models_available);
            }
            self.table.update(replica, now, changes, |r| {
                r.seen_in_beat = beats;
                r.confirmed = true;
                r.ready = pool.ready;
                r.draining = pool.draining;
                r.vram_free_bytes = pool.vram_free_bytes;
                set_text(&mut r.engine, pool.engine.as_deref());
                set_text(&mut r.engine_version, pool.engine_version.as_deref());
                if alone {
                    r.report_slots(pool.slots_free, pool.slots_total());
                }
            });
        }
        if ask && let Some(agent) = self.nodes[index].address.clone() {
            changes.push(Change::AskNode {
                node: self.nodes[index].id.clone(),
                pool: pool.pool_id.clone(),
                agent,
            });
        }
    }

    fn add_replica(
        &mut self,
        index: usize,
        key: ReplicaKey,
        generation: u64,
        target: Target,
        now: Now,
        changes: &mut Vec<Change>,
    ) -> ReplicaRef {
        let node = &mut self.nodes[index];
        let replica = Replica {
            node: node.id.clone(),
            key: key.clone(),
            node_status: node.status,
            confirmed: true,
            generation,
            target,
            ready: false,
            draining: false,
            slots_total: 0,
            slots_reported_free: 0,
            in_flight: 0,
            others: 0,
            models: Arc::default(),
            engine: None,
            engine_version: None,
            device_mask: None,
            vram_free_bytes: 0,
            reason: None,
            since: now.wall,
            circuit: Circuit::Closed,
            ours_since_report: false,
            seen_in_beat: 0,
        };
        let reference = self.table.insert(replica, now, changes);
        node.replicas.insert(key, reference);
        reference
    }

    fn drop_replica(
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
    }

    fn add_node(&mut self, id: &NodeId, now: Now) -> usize {
        let index = self.nodes.insert(Node {
            id: id.clone(),
            machine_id: id.to_string(),
            address: None,
            version: None,
            capabilities: Capabilities::default(),
            peer: String::new(),
            incarnation: None,
            boot_id: None,
            status: NodeStatus::Registering,
            since: now.wall,
            reason: "registered, first heartbeat awaited".into(),
            registered_at: now.wall,
            last_heartbeat_at: None,
            pools: Vec::new(),
            seq: None,
            beats: 0,
            last_contact: now.mono,
            due: None,
            replicas: BTreeMap::new(),
            twins: Vec::new(),
        });
        self.by_id.insert(id.clone(), index);
        index
    }

    fn drop_node(&mut self, index: usize, reason: &str, changes: &mut Vec<Change>) {
        self.unschedule(index);
        let replicas = std::mem::take(&mut self.nodes[index].replicas);
        for (key, replica) in replicas {
            self.drop_replica(index, &key, replica, reason, changes);
        }
        let node = self.nodes.remove(index);
        self.by_id.remove(&node.id);
        changes.push(Change::NodeGone { node: node.id, reason: reason.to_string() });
    }

    fn refs_of(&self, index: usize) -> Vec<ReplicaRef> {
        self.nodes[index].replicas.values().copied().collect()
    }

    /// A sign of life: a node that holds a lease has it renewed.
    fn contact(&mut self, index: usize, peer: &str, now: Now) {
        let node = &mut self.nodes[index];
        if node.peer != peer {
            node.peer = cut(peer);
        }
        node.last_contact = now.mono;
        if node.status.leased() {
            self.schedule(index, now.mono.plus_ms(self.limits.node_timeout_ms));
        }
    }

    fn set_status(
        &mut self,
        index: usize,
        status: NodeStatus,
        reason: &str,
        now: Now,
        changes: &mut Vec<Change>,
    ) {
        let node = &mut self.nodes[index];
        if node.status == status {
            return;
        }
        let from = std::mem::replace(&mut node.status, status);
        node.since = now.wall;
        node.reason = reason.to_string();
        changes.push(Change::NodeStatus {
            node: node.id.clone(),
            from,
            to: status,
            reason: reason.to_string(),
        });
        let silence_ms = match status {
            NodeStatus::Suspect => self.limits.offline_grace_ms,
            NodeStatus::Offline => self.limits.forget_ms,
            _ => self.limits.node_timeout_ms,
        };
        self.schedule(index, now.mono.plus_ms(silence_ms));
        for replica in self.refs_of(index) {
            self.table.update(replica, now, changes, |r| r.node_status = status);
        }
    }

    fn schedule(&mut self, index: usize, due: Mono) {
        self.unschedule(index);
        let node = &mut self.nodes[index];
        if node.address.is_none() {
            return;
        }
        node.due = Some(due);
        let timers = if node.status.leased() { &mut self.leases } else { &mut self.lapsed };
        timers.insert((due, index));
    }

    fn unschedule(&mut self, index: usize) {
        if let Some(due) = self.nodes[index].due.take() {
            self.leases.remove(&(due, index));
            self.lapsed.remove(&(due, index));
        }
    }
}

/// A model and how many replicas serve it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelSummary {
    /// Its name.
    pub name: String,
    /// Replicas that have it.
    pub replicas: u32,
    /// Of these, the ones that take work.
    pub placeable: u32,
}

fn too_large(what: &'static str, count: usize, limit: usize) -> Result<(), Fenced> {
    if count > limit { Err(Fenced::TooLarge { what, limit }) } else { Ok(()) }
}

fn check_models(models: &[String]) -> Result<(), Fenced> {
    too_large("models of a replica", models.len(), MODELS_MAX)?;
    let longest = models.iter().map(String::len).max().unwrap_or(0);
    too_large("bytes in the name of a model", longest, MODEL_BYTES_MAX)
}

/// An engine on its node's loopback is reached through the node's agent; one on this machine, or on
/// an address of its own, is dialled directly.
fn target_of(engine: &BaseUrl, agent: Option<&BaseUrl>) -> Target {
    let hidden = engine.ip().is_some_and(|ip| ip.is_loopback() || ip.is_unspecified());
    match agent {
        Some(agent) if hidden => Target::Relay { agent: agent.clone(), engine: engine.clone() },
        _ => Target::Direct(engine.clone()),
    }
}

/// A pool of which a registration gives only the name.
fn announced(pool: &PoolId) -> PoolBeat {
    PoolBeat {
        pool_id: pool.clone(),
        ready: false,
        draining: false,
        slots_free: 0,
        slots_total: None,
        vram_free_bytes: 0,
        engine: None,
        engine_version: None,
        models_available: Vec::new(),
        replicas: None,
    }
}

/// What is kept of a pool for display: whether it lists replicas, but not which.
fn without_replicas(pool: &PoolBeat) -> PoolBeat {
    PoolBeat {
        pool_id: pool.pool_id.clone(),
        engine: pool.engine.as_deref().map(cut),
        engine_version: pool.engine_version.as_deref().map(cut),
        models_available: pool.models_available.clone(),
        replicas: pool.replicas.as_ref().map(|_| Vec::new()),
        ..*pool
    }
}

/// Whether two reports of a pool differ in numbers only.
fn same_pool(old: &PoolBeat, new: &PoolBeat) -> bool {
    old.pool_id == new.pool_id
        && (old.ready, old.draining, old.slots_total) == (new.ready, new.draining, new.slots_total)
        && old.engine == new.engine
        && old.engine_version == new.engine_version
        && old.models_available == new.models_available
        && old.replicas.is_some() == new.replicas.is_some()
}

/// A replica of a status answer, as a heartbeat would have listed it.
fn asked(status: &ReplicaStatus) -> ReplicaBeat {
    ReplicaBeat {
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
fn cut(text: &str) -> String {
    let end = (0..=TEXT_BYTES_MAX.min(text.len())).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
    text[..end].chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// Sets a text that seldom changes, without allocating where it does not.
fn set_text(old: &mut Option<String>, new: Option<&str>) {
    if old.as_deref() != new {
        *old = new.map(cut);
    }
}

#[cfg(test)]
mod tests;
