//! The shell's part of asking agents: questions about one pool, and polls. Both are plain exchanges of the
//! loop, and carry the token that relayed requests carry.

use std::sync::Arc;

use super::{Daemon, Running};
use crate::http::fields::FieldLines;
use crate::net::{Outbound, Outcome, Patience, Sink};
use crate::orchestratord::core::Input;
use crate::orchestratord::messages::PollError;
use crate::orchestratord::poller::{PollId, PollOrder};
use crate::reactor::token::Token;
use crate::time::Now;
use crate::wire::id::{NodeId, PoolId};
use crate::wire::pool::{AgentReport, PoolStatus};
use crate::wire::url::BaseUrl;

/// What a question about a pool may take.
const AGENT_PATIENCE: Patience = Patience { connect_ms: 2_000, first_byte_ms: 5_000, idle_ms: 5_000 };
/// Largest answer about a pool, in bytes.
const POOL_BYTES_MAX: usize = 1024 * 1024;
/// Largest report of an agent, in bytes: as much as a heartbeat may be.
const REPORT_BYTES_MAX: usize = 4 * 1024 * 1024;

impl Daemon {
    /// Asks a node's agent for a pool's status.
    pub(super) fn ask_agent(&mut self, node: NodeId, pool: PoolId, agent: BaseUrl, now: Now) {
        let target = format!("/v2/pools/{pool}/status");
        let exchange = self.ask(agent, target, POOL_BYTES_MAX, AGENT_PATIENCE, now);
        self.exchanges.insert(exchange, Running::Agent(node, pool));
    }

    /// Asks an agent for all that it knows.
    pub(super) fn poll_agent(&mut self, order: PollOrder, now: Now) {
        let connect_ms = (order.timeout_ms / 2).max(1);
        let first_byte_ms = order.timeout_ms.saturating_sub(connect_ms).max(1);
        let patience = Patience { connect_ms, first_byte_ms, idle_ms: first_byte_ms };
        let exchange = self.ask(order.to, "/v2/pools".into(), REPORT_BYTES_MAX, patience, now);
        self.exchanges.insert(exchange, Running::Poll(order.id));
    }

    /// Hands an agent's answer about a pool to the core. No answer is no news.
    pub(super) fn agent_answered(&mut self, node: NodeId, pool: PoolId, outcome: Outcome, now: Now) {
        if let Outcome::Complete { status: 200, body } = outcome
            && let Ok(status) = serde_json::from_slice::<PoolStatus>(&body)
        {
            let replicas = status.replicas;
            self.core.handle(Input::AgentSaid { node, pool, replicas }, now, &mut self.effects);
        }
    }

    /// Hands what came of a poll to the core.
    pub(super) fn poll_ended(&mut self, id: PollId, outcome: Outcome, now: Now) {
        let outcome = match outcome {
            Outcome::Complete { status: 200, body } => serde_json::from_slice::<AgentReport>(&body)
                .map(Box::new)
                .map_err(|error| PollError::Unusable(format!("its answer is no report: {error}"))),
            Outcome::Complete { status: 401, .. } => {
                let why = "it does not accept this control plane's token (401)";
                Err(PollError::Unusable(why.into()))
            }
            Outcome::Complete { status: 403, .. } => {
                let why = "it does not accept this control plane's token for that (403): set LLORCH_NODE_TOKEN_FILE";
                Err(PollError::Unusable(why.into()))
            }
            Outcome::Complete { status: 421, .. } => {
                let why = "it does not go by this name (421): set POOL_MANAGERD_ALLOW_HOSTS there";
                Err(PollError::Unusable(why.into()))
            }
            Outcome::Complete { status, .. } => {
                Err(PollError::Unusable(format!("it answered GET /v2/pools with {status}")))
            }
            Outcome::Failed(fault) => Err(PollError::Unreachable(fault.reason)),
            Outcome::ClientGone | Outcome::Cancelled => {
                Err(PollError::Unreachable("the poll was cancelled".into()))
            }
        };
        self.core.handle(Input::Polled(id, outcome), now, &mut self.effects);
    }

    fn ask(&mut self, to: BaseUrl, target: String, bytes_max: usize, patience: Patience, now: Now) -> Token {
        let mut fields = FieldLines::new().with("Accept", "application/json");
        if let Some(bearer) = self.guard.bearer(now.mono) {
            fields.push("Authorization", bearer);
        }
        let outbound = Outbound {
            to,
            method: "GET".into(),
            target: target.into(),
            fields,
            body: Arc::default(),
            sink: Sink::Collect { bytes_max },
            patience,
            keep_ms: None,
        };
        self.net.start(outbound, now.mono)
    }
}
