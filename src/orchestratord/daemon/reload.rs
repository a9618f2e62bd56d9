//! The shell's part of reloading a pool: the order goes to the agent of every node that has the pool, and what
//! they say goes back together. They only accept it, so nobody waits for a model to load.

use serde_json::{Value, json};

use super::{Daemon, Running};
use crate::http::fields::FieldLines;
use crate::http::server::Response;
use crate::net::{Outbound, Outcome, Patience, Sink};
use crate::orchestratord::refusal::Refusal;
use crate::orchestratord::service_registry::NodeStatus;
use crate::reactor::token::Token;
use crate::time::Now;
use crate::wire::id::{NodeId, PoolId};
use crate::wire::url::BaseUrl;

/// Most nodes that are told at once: pools of more are reloaded by their nodes' names.
const NODES_MAX: usize = 64;
/// Most reloads at once: they are made by hand.
const RELOADS_MAX: usize = 16;
/// What an agent may take: it asks a provisioner of its own machine, which answers from memory.
const PATIENCE: Patience = Patience { connect_ms: 2_000, first_byte_ms: 10_000, idle_ms: 5_000 };
/// Largest answer of an agent, in bytes: the steps of a pool.
const ANSWER_BYTES_MAX: usize = 1024 * 1024;

/// A reload whose answers are awaited.
pub(super) struct Reloading {
    client: Token,
    pool: PoolId,
    awaited: usize,
    answers: Vec<Value>,
}

impl Daemon {
    /// Passes an order on.
    pub(super) fn reload(&mut self, client: Token, pool: PoolId, body: Vec<u8>, now: Now) {
        let has_pool = |pools: &[crate::orchestratord::service_registry::KnownPool]| {
            pools.iter().any(|known| known.pool_id == pool)
        };
        let nodes: Vec<(NodeId, Option<BaseUrl>)> = self
            .core
            .registry()
            .nodes()
            .filter(|node| node.status != NodeStatus::Offline && has_pool(&node.pools))
            .map(|node| (node.id.clone(), node.address.clone()))
            .take(NODES_MAX)
            .collect();
        let agents: Vec<(NodeId, BaseUrl)> =
            nodes.iter().filter_map(|(node, agent)| Some((node.clone(), agent.clone()?))).collect();
        let refusal = match (nodes.is_empty(), agents.is_empty()) {
            (true, _) => Some(Refusal::NotFound(format!("no node that is known has pool {pool}"))),
            (false, true) => Some(Refusal::NotFound(format!(
                "pool {pool} is of this machine and has no agent here: run pool-managerd, or send SIGHUP to its engine-provisioner"
            ))),
            _ if self.reloads.len() >= RELOADS_MAX => {
                Some(Refusal::Overloaded("as many reloads as may be are under way".into()))
            }
            _ => None,
        };
        if let Some(refusal) = refusal {
            return self.net.respond(client, &refusal.response(false), now.mono);
        }
        self.reload_serial += 1;
        let serial = self.reload_serial;
        let awaited = agents.len();
        let reloading = Reloading { client, pool: pool.clone(), awaited, answers: Vec::new() };
        self.reloads.insert(serial, reloading);
        let body = std::sync::Arc::new(body);
        for (node, agent) in agents {
            let mut fields = FieldLines::new().with("Content-Type", "application/json");
            if let Some(bearer) = self.guard.bearer(now.mono) {
                fields.push("Authorization", bearer);
            }
            let outbound = Outbound {
                to: agent,
                method: "POST".into(),
                target: format!("/v2/pools/{pool}/reload").into(),
                fields,
                body: body.clone(),
                sink: Sink::Collect { bytes_max: ANSWER_BYTES_MAX },
                patience: PATIENCE,
                keep_ms: None,
            };
            let exchange = self.net.start(outbound, now.mono);
            self.exchanges.insert(exchange, Running::Reload(serial, node));
        }
    }

    /// An agent has answered; after the last one the client is.
    pub(super) fn reload_answered(&mut self, serial: u64, node: NodeId, outcome: Outcome, now: Now) {
        let Some(reloading) = self.reloads.get_mut(&serial) else { return };
        let answer = match outcome {
            Outcome::Complete { status, body } => {
                let mut answer = serde_json::from_slice::<Value>(&body)
                    .ok()
                    .filter(Value::is_object)
                    .unwrap_or_else(|| json!({"error": "its answer is no JSON"}));
                answer["status"] = json!(status);
                answer
            }
            Outcome::Failed(fault) => json!({"status": 502, "error": fault.reason}),
            Outcome::ClientGone | Outcome::Cancelled => json!({"status": 502, "error": "given up"}),
        };
        let mut answer = answer;
        answer["node_id"] = json!(node);
        reloading.answers.push(answer);
        if reloading.answers.len() < reloading.awaited {
            return;
        }
        if let Some(done) = self.reloads.remove(&serial) {
            let response = Response::json(
                status_of(&done.answers),
                &json!({"pool_id": done.pool, "nodes": done.answers}),
            );
            self.net.respond(done.client, &response, now.mono);
        }
    }
}

/// Accepted where any node accepts it; each node's own stands in the answer.
fn status_of(answers: &[Value]) -> u16 {
    let any = |status: u16| answers.iter().any(|answer| answer["status"] == status);
    [202, 409, 400, 404].into_iter().find(|status| any(*status)).unwrap_or(502)
}
