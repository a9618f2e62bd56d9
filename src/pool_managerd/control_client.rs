//! Calls to control planes as exchanges: how an order becomes a request, and an ending an answer.
//!
//! They leave from the loop itself, on a kept connection: a heartbeat that says that an engine died is
//! on the wire before anything else is looked at, without waiting for another thread to wake up. A
//! control plane that hangs keeps its own exchange waiting and nothing else.

use std::sync::Arc;

use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::http::fields::FieldLines;
use crate::net::{self, Outbound, Patience, Sink};
use crate::wire::id::NodeId;
use crate::wire::node::{HeartbeatReply, RegisterReply};
use crate::wire::url::BaseUrl;

use super::core::CallBody;
use super::membership::{Answer, Call, Order};

/// Largest answer that is read, in bytes.
const ANSWER_BYTES_MAX: usize = 64 * 1024;
/// Most replicas of a heartbeat that the loop encodes itself.
const ENCODED_IN_PLACE_MAX: usize = 256;
/// Kept connections outlive the longest interval between heartbeats, in milliseconds.
const KEEP_MS: u64 = 90_000;

/// A call's body as JSON. A deregistration has none.
pub(crate) fn encode(body: &CallBody) -> Vec<u8> {
    match body {
        CallBody::Register(body) => serde_json::to_vec(body).unwrap_or_default(),
        CallBody::Heartbeat(body) => serde_json::to_vec(body).unwrap_or_default(),
        CallBody::Deregister { .. } => Vec::new(),
    }
}

/// Whether encoding a body takes too long for a turn of the loop: at about a microsecond a replica.
pub(crate) fn is_large(body: &CallBody) -> bool {
    let CallBody::Heartbeat(heartbeat) = body else { return false };
    let replicas = heartbeat.pools.iter().filter_map(|pool| pool.replicas.as_ref()).map(Vec::len);
    replicas.sum::<usize>() > ENCODED_IN_PLACE_MAX
}

/// The request that makes a call. `program` is who calls; `incarnation` is what a deregistration is for.
pub(crate) fn outbound(
    program: &str,
    plane: &BaseUrl,
    node: &NodeId,
    order: Order,
    incarnation: u64,
    body: Vec<u8>,
    bearer: Option<String>,
) -> Outbound<'static> {
    let (method, target) = match order.call {
        Call::Register => ("POST", "/v2/nodes/register".to_string()),
        Call::Heartbeat { .. } => ("POST", format!("/v2/nodes/{node}/heartbeat")),
        Call::Deregister => ("DELETE", format!("/v2/nodes/{node}?incarnation={incarnation}")),
    };
    let mut fields = FieldLines::new()
        .with("User-Agent", format!("{program}/{}", env!("CARGO_PKG_VERSION")))
        .with("Content-Type", "application/json");
    if let Some(bearer) = bearer {
        fields.push("Authorization", bearer);
    }
    let timeout_ms = order.timeout_ms;
    Outbound {
        to: plane.clone(),
        method: method.into(),
        target: target.into(),
        fields,
        body: Arc::new(body),
        sink: Sink::Collect { bytes_max: ANSWER_BYTES_MAX },
        patience: Patience { connect_ms: timeout_ms, first_byte_ms: timeout_ms, idle_ms: timeout_ms },
        keep_ms: Some(KEEP_MS),
    }
}

/// What an exchange's ending says.
pub(crate) fn answer(call: Call, ended: net::Outcome) -> Answer {
    match ended {
        net::Outcome::Complete { status, body } => understand(call, status, &String::from_utf8_lossy(&body)),
        net::Outcome::Failed(fault) => Answer::Failed(fault.reason),
        net::Outcome::ClientGone | net::Outcome::Cancelled => Answer::Failed("given up".into()),
    }
}
fn understand(call: Call, status: u16, text: &str) -> Answer {
    match (status, call) {
        (200..=299, Call::Register) => {
            let reply = read::<RegisterReply>(text);
            Answer::Ok {
                next_heartbeat_ms: reply.as_ref().and_then(|reply| reply.next_heartbeat_ms),
                ttl_ms: reply.as_ref().and_then(|reply| reply.ttl_ms),
                registry_epoch: reply.as_ref().and_then(|reply| reply.registry_epoch),
            }
        }
        (200..=299, _) => {
            let next_heartbeat_ms = read::<HeartbeatReply>(text).and_then(|reply| reply.next_heartbeat_ms);
            Answer::Ok { next_heartbeat_ms, ttl_ms: None, registry_epoch: None }
        }
        (404, _) => Answer::UnknownNode,
        (409, _) => Answer::Conflict(message(text)),
        (403, _) if text.contains("CERTIFICATE_") => {
            Answer::Failed(format!("it refuses this node's certificate: {}", message(text)))
        }
        (401 | 403, _) => Answer::Unauthorized,
        (421, _) => Answer::ForeignName,
        (503, _) if text.contains("CLOUD_DISABLED") || text.contains("ORCHESTRATORD_CLOUD_PROFILE") => {
            Answer::CloudDisabled
        }
        _ => Answer::Failed(format!("status {status}: {}", message(text))),
    }
}

fn read<T: DeserializeOwned>(text: &str) -> Option<T> {
    serde_json::from_str(text).ok()
}

/// What an error body says to people, or its beginning.
fn message(text: &str) -> String {
    #[derive(Deserialize)]
    struct Body {
        message: String,
    }
    let said = read::<Body>(text).map_or_else(|| text.to_string(), |body| body.message);
    said.chars().filter(|c| !c.is_control()).take(200).collect()
}
