//! What the registry tells its caller: what a mutation changed, and why a message was refused.

use std::fmt;

use crate::wire::id::{NodeId, PoolId, ReplicaKey};
use crate::wire::url::BaseUrl;

use super::{NodeStatus, ReplicaRef};

/// What a mutation changed, in the order in which it happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// What an earlier start of the control plane saved is known again, all of it with this one change.
    Restored {
        /// Nodes.
        nodes: usize,
        /// Their replicas.
        replicas: usize,
    },
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
    /// A replica has more free slots than before, or fits other requests (its models, its devices):
    /// waiters may be admitted.
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
    /// agent, and handed to [`set_engine_url`](super::ServiceRegistry::set_engine_url).
    AskNode {
        /// The node.
        node: NodeId,
        /// The pool.
        pool: PoolId,
        /// The node's agent.
        agent: BaseUrl,
    },
    /// Another agent uses the name of a node that is alive. Reported once per foreign boot, or per
    /// foreign start where both run on one machine.
    TwinRefused {
        /// The name.
        node: NodeId,
        /// The other one's boot id, or its incarnation where the boot is the same.
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
    /// From a start of the node's agent that has deregistered.
    Departed,
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
    /// The node's agent cannot be where it says, and why.
    Address(String),
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
            Fenced::Departed => f.write_str("this start of the node's agent has deregistered"),
            Fenced::OldSequence { known } => {
                write!(f, "a later heartbeat (sequence {known}) has already arrived")
            }
            Fenced::Twin { holder } => write!(
                f,
                "another machine of this node id is alive (last heard from {holder}): give one of them another id"
            ),
            Fenced::Local => f.write_str("this node id belongs to the control plane's own machine"),
            Fenced::TooMany { what, limit } => write!(f, "the control plane already has its {limit} {what}"),
            Fenced::Address(why) => write!(f, "address: {why}"),
            Fenced::TooLarge { what, limit } => write!(f, "more than {limit} {what}"),
        }
    }
}

impl std::error::Error for Fenced {}
