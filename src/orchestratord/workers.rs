//! Workers: engines that no agent announces and no file. Whoever starts one names its URL, and this process
//! watches it as it would an engine of its own machine: by the same rules for its address, with the same
//! probes, slots and drains. Pure.
//!
//! A worker stands until it is taken away, or this process ends; whoever keeps it running says it again after
//! that, and may at any time. What it says is a handoff, of which only what holds on every machine counts:
//! neither its process nor a file with its key can be looked at from here.

use std::sync::Arc;

use serde_json::{Value, json};

use crate::http::server::Response;
use crate::replicas::{Change, EnginePolicy, Registry};
use crate::time::Now;
use crate::wire::handoff::{self, Handoff, HandoffFile};
use crate::wire::id::{NodeId, ReplicaKey};

use super::core::Core;
use super::refusal::Refusal;

/// A change of the workers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WorkerOrder {
    /// One joins, or is what this says from now on.
    Join(Arc<Handoff>),
    /// One goes.
    Leave(ReplicaKey),
}

/// Reads a registration's body.
///
/// # Errors
/// [`Refusal::Invalid`] for what is no handoff with a URL.
pub fn read(body: &[u8]) -> Result<Handoff, Refusal> {
    let without_url =
        r#"`url` is missing: where the engine listens, such as {"url": "http://10.0.0.7:8080"}"#;
    if serde_json::from_slice::<Value>(body).is_ok_and(|body| body.is_object() && body["url"].is_null()) {
        return Err(Refusal::Invalid(without_url.into()));
    }
    let handoff = match handoff::parse(body) {
        Ok(HandoffFile::Engine(handoff)) => *handoff,
        Ok(HandoffFile::ModelOnly) => return Err(Refusal::Invalid(without_url.into())),
        Err(why) => return Err(Refusal::Invalid(why.to_string())),
    };
    let unseen = (None, None, None, None);
    let (pid, pid_start, boot_id, pid_ns) = unseen;
    Ok(Handoff { pid, pid_start, boot_id, pid_ns, auth_file: None, ..handoff })
}

/// Whether a worker may join.
///
/// # Errors
/// [`Refusal::Invalid`] for a URL that is not allowed, [`Refusal::Conflict`] where its name is a file's.
pub fn join(handoff: Handoff, core: &Core) -> Result<WorkerOrder, Refusal> {
    let key = handoff.key();
    let workers = core.workers()?;
    if let Some(file) = workers.file_of(&key) {
        return Err(Refusal::Conflict(format!("{key} stands behind the handoff file {file:?}")));
    }
    workers.may_adopt(&handoff).map_err(Refusal::Invalid)?;
    Ok(WorkerOrder::Join(Arc::new(handoff)))
}

/// Whether a worker may leave.
///
/// # Errors
/// [`Refusal::NotFound`], or [`Refusal::Conflict`] where a file stands behind the replica.
pub fn leave(key: ReplicaKey, core: &Core) -> Result<WorkerOrder, Refusal> {
    let workers = core.workers()?;
    if workers.adopted(&key).is_some() {
        return Ok(WorkerOrder::Leave(key));
    }
    Err(match workers.file_of(&key) {
        Some(file) => {
            Refusal::Conflict(format!("{key} stands behind the handoff file {file:?}: remove that"))
        }
        None => Refusal::NotFound(format!("{key} is no worker that registered here")),
    })
}

/// The answer to an order that was carried out. `identity`: who gave it, where that was shown.
#[must_use]
pub fn done(order: &WorkerOrder, identity: Option<String>) -> Response {
    let WorkerOrder::Join(handoff) = order else { return Response::empty(204) };
    let mut body = json!({"ok": true, "pool_id": handoff.pool_id, "replica_id": handoff.replica_id});
    if let Some(identity) = identity {
        body["identity"] = json!(identity);
    }
    Response::json(200, &body)
}

/// What a control plane without engines of its own needs for workers, until the first one comes.
#[derive(Debug)]
pub(super) struct Idle {
    /// The node that workers are of.
    pub(super) node: NodeId,
    /// Nobody yet.
    pub(super) replicas: Registry,
}

impl Idle {
    /// `policy`: where they may be.
    pub(super) fn new(node: NodeId, policy: EnginePolicy, hang_suspect_ms: u64, now: Now) -> Idle {
        let mut replicas = Registry::new(policy, now.wall.unix_ms());
        replicas.set_hang_limit(hang_suspect_ms);
        Idle { node, replicas }
    }
}

/// Carries an order out.
pub(super) fn carry_out(order: WorkerOrder, replicas: &mut Registry, now: Now, changes: &mut Vec<Change>) {
    match order {
        // Who asks is told before if it may not.
        WorkerOrder::Join(handoff) => {
            let _ = replicas.adopt(handoff, now, changes);
        }
        WorkerOrder::Leave(key) => {
            replicas.abandon(&key, now, changes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_is_enough_and_nothing_of_this_machine_is_believed() {
        let handoff = read(br#"{"url":"http://10.0.0.7:8080"}"#).expect("a worker");
        assert_eq!((handoff.key().to_string().as_str(), handoff.slots_given), ("default/r0", false));
        let text = br#"{"pool_id":"p","replica_id":"w1","url":"http://10.0.0.7:8080","slots":4,"pid":1,
            "auth":{"file":"/etc/llama-orch/admin-token"},"models":["m"]}"#;
        let handoff = read(text).expect("a worker");
        assert_eq!((handoff.pid, handoff.auth_file, handoff.slots, handoff.models.len()), (None, None, 4, 1));
    }

    #[test]
    fn what_is_missing_is_named() {
        for (bad, part) in [
            ("{}", "`url` is missing"),
            (r#"{"pool_id":"p","url":null}"#, "`url` is missing"),
            (r#"{"pool_id":"p","model":"m"}"#, "`url` is missing"),
            (r#"{"url":"ftp://x"}"#, "url"),
            (r#"{"url":"http://h:1","pool_id":"a/b"}"#, "pool_id"),
            ("[]", "object"),
            ("", "empty"),
        ] {
            let refusal = read(bad.as_bytes()).expect_err(bad);
            assert!(refusal.status() == 400 && refusal.message().contains(part), "{bad}: {refusal:?}");
        }
    }
}
