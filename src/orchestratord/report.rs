//! What the registry's changes are called in the log and in `GET /v2/events`. Pure.

use crate::service::events::Happening;

use super::service_registry::{Change, NodeStatus, ReplicaRef, ServiceRegistry};

/// A change of the service registry as an event; `None` for changes that are no news to people.
#[must_use]
pub fn happening(change: &Change, registry: &ServiceRegistry) -> Option<Happening> {
    let name = |replica: ReplicaRef| {
        registry
            .replica(replica)
            .map_or_else(|| "?".to_string(), |known| format!("{}/{}", known.node, known.key))
    };
    let event = |kind, subject: String, state, text: String, is_warning| {
        Some(Happening { kind, subject, state, text, is_warning })
    };
    match change {
        Change::Restored { nodes, replicas } => {
            let text = format!("{nodes} nodes with {replicas} replicas restored, awaiting their heartbeats");
            event("daemon", "state".into(), "restored", text, false)
        }
        Change::NodeRegistered { node, again, .. } => {
            let text = format!("node {node} registered{}", if *again { " again" } else { "" });
            event("node", node.to_string(), "Registering", text, false)
        }
        Change::NodeStatus { node, from, to, reason } => {
            let is_warning = matches!(to, NodeStatus::Suspect | NodeStatus::Offline);
            let text = format!("node {node}: {from} -> {to}: {reason}");
            event("node", node.to_string(), to.as_str(), text, is_warning)
        }
        Change::NodeGone { node, reason } => {
            event("node", node.to_string(), "gone", format!("node {node} is gone: {reason}"), false)
        }
        Change::ReplicaFound { node, key, .. } => {
            let subject = format!("{node}/{key}");
            let text = format!("{subject}: known");
            event("replica", subject, "known", text, false)
        }
        Change::ReplicaReady(replica) => {
            let subject = name(*replica);
            let text = format!("{subject}: takes work");
            event("replica", subject, "routable", text, false)
        }
        Change::ReplicaNotReady { replica, reason } => {
            let subject = name(*replica);
            let text = format!("{subject}: takes no work: {reason}");
            event("replica", subject, "not-routable", text, true)
        }
        Change::ReplicaGone { node, key, reason, .. } => {
            let subject = format!("{node}/{key}");
            let text = format!("{subject}: gone: {reason}");
            event("replica", subject, "gone", text, false)
        }
        Change::TwinRefused { node, peer, holder, .. } => {
            let text = format!(
                "two agents call themselves {node}: {holder} keeps the name, {peer} is refused; give one of them another POOL_MANAGERD_NODE_ID"
            );
            event("node", node.to_string(), "twin", text, true)
        }
        Change::ExpiryHeld { late, of } => {
            let text = format!(
                "{late} of {of} nodes fell silent together: the fault may be here, they keep their leases for now"
            );
            event("daemon", "leases".into(), "held", text, true)
        }
        Change::ExpiryResumed => {
            event("daemon", "leases".into(), "resumed", "leases end again".into(), false)
        }
        Change::ReplicaCapacity(_) | Change::AskNode { .. } => None,
    }
}
