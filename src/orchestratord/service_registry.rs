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
//! The agents of some nodes are polled instead; their answers are snapshots too, see `polled.rs`.
//!
//! **Mass expiry.** When most nodes fall silent together, the fault is likelier here than there.
//! Leases then do not end for up to [`EXPIRY_HOLD_MS`]; replicas that really are gone leave the
//! rotation through their failing data path.
//!
//! **After a start** of the control plane nobody can expire for one `node_timeout`: no lease is older
//! than the process.
//!
//! What it knows can be saved and restored over such a start; `restore.rs` says how.
//!
//! The cost of a heartbeat depends on its own replicas, that of [`ServiceRegistry::expire`] on what
//! is due. Nothing walks over all nodes except [`ServiceRegistry::nodes`]. Every mutation reports
//! what it changed as a list of [`Change`]; the caller admits waiters, logs and counts from it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::Bound;
use std::sync::Arc;

use slab::Slab;

use crate::replicas::EnginePolicy;
use crate::time::{Mono, Now, Wall};
use crate::wire::gpu_load::{GPU_LOADS_MAX, GpuLoad};
use crate::wire::id::{NodeId, ReplicaKey};
use crate::wire::node::{
    Capabilities, Heartbeat, HeartbeatReply, POOLS_MAX, PoolBeat, RegisterReply, RegisterRequest,
};
use crate::wire::preparation::PoolPreparation;
use crate::wire::url::BaseUrl;

mod addresses;
mod change;
mod circuits;
mod departed;
mod expiry;
mod newcomers;
mod polled;
mod pools;
mod preparing;
mod restore;
mod shared;
mod snapshot;
#[cfg(test)]
mod tests;
mod together;
mod weights;

use self::addresses::Addresses;
pub use self::change::{Change, Fenced};
pub use self::circuits::{CircuitCounts, NOT_READY_MS_MAX};
use self::departed::Departed;
pub use self::departed::{DEPARTED_MAX, DEPARTED_MS};
use self::expiry::Hold;
pub use self::expiry::{EXPIRY_HOLD_MS, EXPIRY_HOLD_NODES_MIN, EXPIRY_HOLD_RECHECK_MS};
pub use self::newcomers::NEWCOMERS_PER_PEER_MAX;
use self::newcomers::{Newcomers, Ticket};
pub use self::polled::{Polled, Via};
pub use self::pools::KnownPool;
pub use self::restore::TRUST_MS;
use self::restore::standing;
use self::shared::{Shared, SortedList};
pub use self::snapshot::{
    MODEL_BYTES_MAX, MODELS_MAX, NODE_REPLICAS_MAX, REPLICAS_TOTAL_MAX, TEXT_BYTES_MAX,
};
use self::snapshot::{cut, too_large};
pub use self::weights::BYTES_MAX;
use self::weights::Weight;
use super::placement;
use super::placement_index::GroupId;
pub use super::replica_table::{
    Circuit, Confirmation, Grant, Obstacle, Replica, ReplicaRef, ReplicaTable, Target,
};

/// Most GPUs of a node; machines have up to 16, partitioned ones seven times as many.
pub const GPUS_MAX: usize = GPU_LOADS_MAX;
/// Foreign boot ids remembered per node, so that each is reported once.
pub const TWINS_MAX: usize = 8;

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
    /// Most bytes of all that nodes tell of themselves.
    pub bytes_max: usize,
    /// The interval that nodes are told.
    pub heartbeat_interval_ms: u64,
    /// The interval in which agents are polled: a node that is known by polls has a lease of at least
    /// [`LEASE_POLLS`] of them.
    pub poll_interval_ms: u64,
}

/// A node that is known by polls may miss one or two of them before its lease ends.
pub const LEASE_POLLS: u64 = 3;

impl Default for Limits {
    fn default() -> Self {
        Limits {
            node_timeout_ms: 30_000,
            offline_grace_ms: 10_000,
            forget_ms: 24 * 3_600_000,
            nodes_max: 10_000,
            bytes_max: BYTES_MAX,
            heartbeat_interval_ms: 10_000,
            poll_interval_ms: 5_000,
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
    pub version: Option<Arc<str>>,
    /// What its machine has; machines that have the same share it.
    pub capabilities: Arc<Capabilities>,
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
    pub reason: Arc<str>,
    /// When it last registered.
    pub registered_at: Wall,
    /// When it last sent a heartbeat.
    pub last_heartbeat_at: Option<Wall>,
    /// Its pools as last reported. Their replicas: [`ServiceRegistry::replicas_of`].
    pub pools: Vec<KnownPool>,
    /// What is under way in those of them that are being prepared.
    pub preparation: Vec<PoolPreparation>,
    /// How its GPUs are used, as last told.
    pub gpu_loads: Vec<GpuLoad>,
    /// An earlier start of the control plane knew it, and this one has not heard of it yet.
    pub restored: bool,
    /// Something in it that is saved has changed.
    touched: bool,
    seq: Option<u64>,
    /// It has registered, with this incarnation.
    registered: bool,
    /// When its last registration or heartbeat came.
    told_at: Option<Mono>,
    /// Where it was polled, if that is how it was last heard of.
    polled: Option<BaseUrl>,
    /// Heartbeats so far, to tell replicas that the newest one names from others.
    beats: u32,
    last_contact: Mono,
    /// When its status changes if it stays silent; `None` for this machine itself.
    due: Option<Mono>,
    replicas: SortedList<ReplicaKey, ReplicaRef>,
    twins: Vec<String>,
    /// Until its first heartbeat.
    newcomer: Option<Ticket>,
    weight: Weight,
}

impl Node {
    /// Milliseconds until its lease ends; 0 once it has, `None` for this machine itself.
    #[must_use]
    pub fn lease_left_ms(&self, now: Now) -> Option<u64> {
        let due = self.due?;
        Some(if self.status.leased() { due.ms_since(now.mono) } else { 0 })
    }

    /// Whether it holds a lease, and its silence says something about the others: not before it has beaten
    /// once.
    fn counts(&self) -> bool {
        self.status.leased() && self.newcomer.is_none()
    }
}

/// Nodes, leases and replicas. See the introduction of this file.
#[derive(Debug)]
pub struct ServiceRegistry {
    limits: Limits,
    epoch: u64,
    nodes: Slab<Node>,
    by_id: BTreeMap<NodeId, usize>,
    /// Nodes that prepare something.
    preparing: BTreeSet<usize>,
    /// Ends of leases: exactly the nodes that beat. Those whose first heartbeat is awaited do not count
    /// when most are silent, or names that nobody stands behind would keep the dead alive.
    leases: BTreeSet<(Mono, usize)>,
    /// All others, by the time at which they turn Suspect or Offline, or are forgotten.
    lapsed: BTreeSet<(Mono, usize)>,
    /// Ends of backoffs.
    retries: BTreeSet<(Mono, ReplicaRef)>,
    table: ReplicaTable,
    departed: Departed,
    newcomers: Newcomers,
    addresses: Addresses,
    /// Names of engines, versions and devices, and reasons: most nodes and replicas have the same.
    names: Shared<str>,
    machines: Shared<Capabilities>,
    hold: Option<Hold>,
    /// What all nodes weigh.
    bytes: usize,
    /// See [`ServiceRegistry::revision`].
    revision: u64,
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
            preparing: BTreeSet::new(),
            leases: BTreeSet::new(),
            lapsed: BTreeSet::new(),
            retries: BTreeSet::new(),
            table: ReplicaTable::default(),
            departed: Departed::default(),
            newcomers: Newcomers::default(),
            addresses: Addresses::default(),
            names: Shared::default(),
            machines: Shared::default(),
            hold: None,
            bytes: 0,
            revision: 0,
        }
    }

    /// Refuses agents and engines at addresses that [`EnginePolicy::check_address`] forbids.
    pub fn set_address_rules(&mut self, rules: EnginePolicy) {
        self.addresses.0 = Some(rules);
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
        too_large("GPUs", request.gpu_loads.len(), GPUS_MAX)?;
        self.addresses.check(&request.address).map_err(Fenced::Address)?;
        if request.incarnation.is_some_and(|i| self.departed.includes(&request.node_id, i, now.mono)) {
            return Err(Fenced::Departed);
        }
        let known = self.by_id.get(&request.node_id).copied();
        let registered = weights::of_registration(request);
        let gpu_loads = weights::of_gpu_loads(&request.gpu_loads);
        let pools = known.map_or(0, |index| self.nodes[index].weight.pools);
        let weight = Weight { registered, pools, gpu_loads };
        self.check_weight(known, weight)?;
        let fresh = match known {
            None => {
                self.make_room(peer, changes)?;
                true
            }
            Some(index) => {
                self.fence_twin(index, request, peer, now, changes)?;
                let node = &self.nodes[index];
                if let (Some(new), Some(known)) = (request.incarnation, node.incarnation)
                    && new < known
                    && node.status.leased()
                {
                    self.note_older_twin(index, request, new, changes);
                    return Err(Fenced::OldIncarnation { known });
                }
                request.incarnation != node.incarnation
                    || is_other_boot(request.boot_id.as_deref(), node.boot_id.as_deref())
            }
        };
        let index = match known {
            Some(index) => index,
            None => {
                let index = self.add_node(&request.node_id, now);
                self.nodes[index].newcomer = Some(self.newcomers.add(index, peer));
                index
            }
        };
        self.weighs(index, weight);
        let node = &mut self.nodes[index];
        node.machine_id = cut(request.machine_id.as_deref().unwrap_or(request.node_id.as_str()));
        node.version = request.version.as_deref().map(|version| self.names.keep(&cut(version)));
        node.capabilities = self.machines.keep_whole(shown(&request.capabilities));
        node.gpu_loads.clone_from(&request.gpu_loads);
        node.incarnation = request.incarnation;
        let boot_id = request.boot_id.as_deref().map(cut);
        if node.boot_id != boot_id {
            node.boot_id = boot_id;
            node.twins.clear();
        }
        node.registered_at = now.wall;
        (node.registered, node.told_at, node.polled) = (true, Some(now.mono), None);
        if fresh || request.incarnation.is_none() {
            node.seq = None;
        }
        let moved = node.address.as_ref() != Some(&request.address);
        node.address = Some(request.address.clone());
        if fresh {
            node.pools = request.pools.iter().map(KnownPool::announced).collect();
        }
        changes.push(Change::NodeRegistered {
            node: request.node_id.clone(),
            incarnation: request.incarnation,
            again: known.is_some(),
        });
        let addresses = &self.addresses;
        for replica in refs_of(&self.nodes[index]) {
            self.table.update(replica, now, changes, |r| {
                if fresh {
                    r.confirmation = Confirmation::Doubted;
                }
                if moved && let Some(engine) = r.target.engine() {
                    r.target = addresses.target_of(engine, Some(&request.address));
                }
            });
        }
        self.contact(index, peer, now);
        // A registration does not make a node Online, but must not hide one that is. One that only
        // repeats itself has not heard the answer: before it can, its status would flap with every attempt.
        let is_told_apart = request.incarnation.is_some();
        if fresh || (!is_told_apart && !self.nodes[index].status.leased()) {
            self.set_status(
                index,
                NodeStatus::Registering,
                "registered, first heartbeat awaited",
                now,
                changes,
            );
        }
        self.revision += 1;
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
            // A clone that counted to the same number: whose name it is, a registration settles.
            if is_other_boot(beat.boot_id.as_deref(), known.boot_id.as_deref()) {
                return Err(Fenced::UnknownNode);
            }
            if let (Some(seq), Some(last)) = (beat.seq, known.seq)
                && seq <= last
            {
                return Err(Fenced::OldSequence { known: last });
            }
        }
        if !known.registered {
            return Err(Fenced::UnknownNode);
        }
        self.check_size(self.nodes[index].replicas.len(), &beat.pools)?;
        too_large("GPUs", beat.gpu_loads.len(), GPUS_MAX)?;
        let gpu_loads = weights::of_gpu_loads(&beat.gpu_loads);
        let weight = Weight { pools: weights::of_pools(&beat.pools), gpu_loads, ..self.nodes[index].weight };
        self.check_weight(Some(index), weight)?;
        self.weighs(index, weight);
        let known = &mut self.nodes[index];
        known.touched |= known.incarnation.is_none() && beat.incarnation.is_some();
        known.incarnation = known.incarnation.or(beat.incarnation);
        known.seq = beat.seq.or(known.seq);
        known.last_heartbeat_at = Some(now.wall);
        (known.told_at, known.polled) = (Some(now.mono), None);
        if let Some(ticket) = known.newcomer.take() {
            self.newcomers.remove(ticket);
        }
        self.contact(index, peer, now);
        // Replicas first: when the node turns Online, they are already what it says they are.
        self.take_snapshot(index, &beat.pools, now, changes);
        self.set_preparation(index, &beat.preparation);
        self.nodes[index].gpu_loads.clone_from(&beat.gpu_loads);
        let (status, reason) = if beat.draining {
            (NodeStatus::Draining, "the node asks for no new work")
        } else {
            (NodeStatus::Online, "it sends heartbeats")
        };
        self.set_status(index, status, reason, now, changes);
        self.note_changes(index);
        Ok(HeartbeatReply { success: true, next_heartbeat_ms: Some(self.limits.heartbeat_interval_ms) })
    }

    /// Removes a node. A late message of an earlier incarnation cannot remove its successor, and a
    /// late registration of this one cannot bring it back.
    ///
    /// # Errors
    /// [`Fenced::UnknownNode`], [`Fenced::OldIncarnation`] or [`Fenced::Local`].
    pub fn deregister(
        &mut self,
        node: &NodeId,
        incarnation: Option<u64>,
        now: Now,
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
        if let Some(incarnation) = incarnation {
            self.departed.remember(node, incarnation, now.mono);
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
        self.check_size(self.nodes[index].replicas.len(), pools)?;
        self.unschedule(index);
        let known = &mut self.nodes[index];
        known.address = None;
        known.restored = false;
        known.last_heartbeat_at = Some(now.wall);
        known.last_contact = now.mono;
        self.take_snapshot(index, pools, now, changes);
        self.set_status(index, NodeStatus::Online, "on this machine", now, changes);
        Ok(())
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

    /// Every node, by name.
    pub fn nodes(&self) -> impl Iterator<Item = &Node> {
        self.by_id.values().map(|index| &self.nodes[*index])
    }

    /// Every node behind `after`, by name; all of them with `None`.
    pub fn nodes_after<'a>(&'a self, after: Option<&NodeId>) -> impl Iterator<Item = &'a Node> + use<'a> {
        let start = after.map_or(Bound::Unbounded, Bound::Excluded);
        self.by_id.range::<NodeId, _>((start, Bound::Unbounded)).map(|(_, index)| &self.nodes[*index])
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

    /// Keeps the index of the table for this strategy, with or without rings for affinity. Other
    /// strategies can be asked for at any time, at the cost of a pass over all replicas.
    pub fn set_placement(&mut self, strategy: placement::Strategy, with_rings: bool) {
        self.table.set_placement(strategy, with_rings);
    }

    /// Every known model by name.
    #[must_use]
    pub fn models(&self) -> Vec<ModelSummary> {
        let index = self.table.placement_index();
        let summary = |(name, sets): (&str, &BTreeSet<u32>)| {
            let groups: Vec<GroupId> = sets.iter().map(|set| GroupId::of_set(*set)).collect();
            let tally = index.tally(&groups);
            ModelSummary { name: name.to_string(), replicas: tally.members, placeable: tally.placeable }
        };
        self.table.sets().models().map(summary).collect()
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
                let beats = node.counts();
                assert_eq!(self.leases.contains(&(due, index)), beats, "{id}: lease while {}", node.status);
                assert_eq!(self.lapsed.contains(&(due, index)), !beats, "{id}: lapsed while {}", node.status);
            }
            if let Some(ticket) = node.newcomer {
                assert_eq!(self.newcomers.holder(ticket), Some(index), "{id}: a lost newcomer");
            }
            for (key, replica) in node.replicas.iter() {
                let known = self.table.get(*replica).expect("a node's replica exists");
                assert_eq!((&known.node, &known.key), (id, key), "a replica of another node");
                assert_eq!(known.node_status, node.status, "{id} {key}: outdated status");
                let untried = matches!(known.circuit, Circuit::HalfOpen { failures: 0, .. });
                assert!(
                    !untried || known.confirmation != Confirmation::Beaten || !known.ready,
                    "{id} {key}: in doubt though its node says that it is ready"
                );
                if let Circuit::Open { until, .. } = known.circuit {
                    assert!(self.retries.contains(&(until, *replica)), "{id} {key}: never tried again");
                }
            }
            replicas += node.replicas.len();
        }
        assert_eq!(replicas, self.table.len(), "a replica without a node");
        let newcomers = self.nodes.iter().filter(|(_, node)| node.newcomer.is_some()).count();
        assert_eq!(newcomers, self.newcomers.len(), "a newcomer that is none");
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
        // One that is polled is heard of at the next poll, and then tells of a reboot itself.
        let late_ms = match self.nodes[index].polled {
            Some(_) => self.lease_ms(index),
            None => self.limits.heartbeat_interval_ms.saturating_mul(3) / 2,
        };
        let node = &mut self.nodes[index];
        if node.address.is_none() {
            return Err(Fenced::Local);
        }
        let (Some(theirs), Some(ours)) = (request.boot_id.as_deref().map(cut), &node.boot_id) else {
            return Ok(());
        };
        // Whom this process never heard may be the same machine after a reboot.
        if theirs == *ours || node.restored || now.mono.ms_since(node.last_contact) >= late_ms {
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

    fn add_node(&mut self, id: &NodeId, now: Now) -> usize {
        let index = self.nodes.insert(Node {
            id: id.clone(),
            machine_id: id.to_string(),
            address: None,
            version: None,
            capabilities: Arc::default(),
            peer: String::new(),
            incarnation: None,
            boot_id: None,
            status: NodeStatus::Registering,
            since: now.wall,
            reason: "registered, first heartbeat awaited".into(),
            registered_at: now.wall,
            last_heartbeat_at: None,
            pools: Vec::new(),
            preparation: Vec::new(),
            gpu_loads: Vec::new(),
            restored: false,
            touched: false,
            seq: None,
            registered: false,
            told_at: None,
            polled: None,
            beats: 0,
            last_contact: now.mono,
            due: None,
            replicas: SortedList::default(),
            twins: Vec::new(),
            newcomer: None,
            weight: Weight::default(),
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
        self.weighs(index, Weight::default());
        let node = self.nodes.remove(index);
        self.preparing.remove(&index);
        self.revision += u64::from(node.registered);
        self.by_id.remove(&node.id);
        if let Some(ticket) = node.newcomer {
            self.newcomers.remove(ticket);
        }
        changes.push(Change::NodeGone { node: node.id, reason: reason.to_string() });
    }

    /// A sign of life: a node that holds a lease has it renewed.
    fn contact(&mut self, index: usize, peer: &str, now: Now) {
        let node = &mut self.nodes[index];
        if node.peer != peer {
            node.peer = cut(peer);
        }
        if std::mem::take(&mut node.restored) {
            node.reason = self.names.keep("heard of again after a restart of the control plane");
        }
        node.last_contact = now.mono;
        if node.status.leased() {
            self.schedule(index, now.mono.plus_ms(self.lease_ms(index)));
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
        self.revision += u64::from(node.registered && standing(from) != standing(status));
        node.since = now.wall;
        node.reason = self.names.keep(reason);
        changes.push(Change::NodeStatus {
            node: node.id.clone(),
            from,
            to: status,
            reason: reason.to_string(),
        });
        let silence_ms = match status {
            NodeStatus::Suspect => self.limits.offline_grace_ms,
            NodeStatus::Offline => self.limits.forget_ms,
            _ => self.lease_ms(index),
        };
        self.schedule(index, now.mono.plus_ms(silence_ms));
        for replica in refs_of(&self.nodes[index]) {
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
        let timers = if node.counts() { &mut self.leases } else { &mut self.lapsed };
        timers.insert((due, index));
    }

    fn unschedule(&mut self, index: usize) {
        if let Some(due) = self.nodes[index].due.take() {
            self.leases.remove(&(due, index));
            self.lapsed.remove(&(due, index));
        }
    }
}

/// What a machine has, with bounded texts.
fn shown(capabilities: &Capabilities) -> Capabilities {
    let mut capabilities = capabilities.clone();
    for gpu in &mut capabilities.gpus {
        gpu.name = cut(&gpu.name);
        gpu.compute_capability = cut(&gpu.compute_capability);
    }
    capabilities
}

fn refs_of(node: &Node) -> Vec<ReplicaRef> {
    node.replicas.values().copied().collect()
}

/// Whether two boots are known, and differ.
fn is_other_boot(theirs: Option<&str>, ours: Option<&str>) -> bool {
    theirs.zip(ours).is_some_and(|(theirs, ours)| theirs != ours && cut(theirs) != ours)
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
