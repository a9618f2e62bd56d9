//! The shell's part of orders about a pool: they go to the agent of every node that has the pool, and what
//! they say goes back together. Agents only accept an order, so nobody waits for a model to load.

use std::sync::Arc;

use super::{Daemon, Running};
use crate::http::fields::FieldLines;
use crate::http::server::Response;
use crate::net::{FaultKind, Outbound, Outcome, Patience, Sink};
use crate::orchestratord::core::Input;
use crate::orchestratord::drains;
use crate::orchestratord::pool_orders::{AgentSaid, PoolCall, PoolOrder};
use crate::orchestratord::refusal::Refusal;
use crate::orchestratord::service_registry::{Node, NodeStatus};
use crate::reactor::token::Token;
use crate::replicas::drain_routes::{self, DrainOrder};
use crate::time::Now;
use crate::wire::id::{NodeId, PoolId};
use crate::wire::url::BaseUrl;

/// Most orders at once: they are given by hand.
const ORDERS_MAX: usize = 16;
/// What an agent may take: it answers from memory, or asks a provisioner of its own machine, which does.
const PATIENCE: Patience = Patience { connect_ms: 2_000, first_byte_ms: 10_000, idle_ms: 5_000 };
/// Largest answer of an agent to a reload, in bytes: the steps of a pool.
const RELOAD_BYTES_MAX: usize = 1024 * 1024;
/// Largest answer of an agent about a drain, in bytes: a dozen numbers, or an error in words.
const DRAIN_BYTES_MAX: usize = 64 * 1024;

/// An order whose answers are awaited.
pub(super) struct Ordered {
    client: Token,
    body: Arc<Vec<u8>>,
    call: PoolCall,
}

impl Daemon {
    /// Passes an order on.
    pub(super) fn order(&mut self, client: Token, order: PoolOrder, pool: PoolId, body: Vec<u8>, now: Now) {
        let has_pool = |node: &&Node| node.pools.iter().any(|known| known.pool_id == pool);
        let asked = self.core.registry().nodes().filter(|node| node.status != NodeStatus::Offline);
        let nodes: Vec<(&NodeId, Option<&BaseUrl>)> =
            asked.filter(has_pool).map(|node| (&node.id, node.address.as_ref())).collect();
        let agents: Vec<(NodeId, BaseUrl)> =
            nodes.iter().filter_map(|(node, agent)| Some(((*node).clone(), (*agent)?.clone()))).collect();
        // Drains of workers are kept here.
        let own = nodes.iter().find(|(_, agent)| agent.is_none() && order != PoolOrder::Reload);
        let own = own.map(|(node, _)| (*node).clone());
        let refusal = match (nodes.is_empty(), agents.is_empty() && own.is_none()) {
            (true, _) => Some(Refusal::NotFound(format!("no node that is known has pool {pool}"))),
            (false, true) => Some(Refusal::NotFound(format!(
                "pool {pool} is of this machine and has no agent here: run pool-managerd, or send SIGHUP to its engine-provisioner"
            ))),
            _ if self.orders.len() >= ORDERS_MAX => {
                Some(Refusal::Overloaded("as many orders to agents as may be are under way".into()))
            }
            _ => None,
        };
        if let Some(refusal) = refusal {
            return self.net.respond(client, &refusal.response(false), now.mono);
        }
        self.order_serial += 1;
        let mut call = PoolCall::new(order, pool, agents);
        if let Some(node) = own {
            let said = self.order_own(order, call.pool(), &body, now);
            call.answered(&node, said);
        }
        self.orders.insert(self.order_serial, Ordered { client, body: Arc::new(body), call });
        self.ask_agents(self.order_serial, now);
        self.end_order(self.order_serial, now);
    }

    /// Carries an order out that is about workers.
    fn order_own(&mut self, order: PoolOrder, pool: &PoolId, body: &[u8], now: Now) -> AgentSaid {
        let (method, verb) = order.request();
        let Some(replicas) = self.core.local() else { return AgentSaid::Failed("it has no workers".into()) };
        let segments = ["pools", pool.as_str(), verb];
        match drain_routes::read(&segments, method, body, replicas, |_| true) {
            Some(Ok(order)) => {
                if !matches!(order, DrainOrder::Show(_)) {
                    self.core.handle(Input::Drain(order.clone()), now, &mut self.effects);
                }
                let Response { status, body, .. } = drains::done(&order, self.core.local());
                AgentSaid::Answered { status, body }
            }
            Some(Err(refused)) => AgentSaid::Failed(drains::refusal(refused).message()),
            None => AgentSaid::Failed("it makes no sense".into()),
        }
    }

    /// Answers the client once all have answered.
    fn end_order(&mut self, serial: u64, now: Now) {
        if self.orders.get(&serial).is_some_and(|ordered| ordered.call.is_over())
            && let Some(done) = self.orders.remove(&serial)
        {
            self.net.respond(done.client, &done.call.response(), now.mono);
        }
    }

    /// Asks as many agents as may be asked at once.
    fn ask_agents(&mut self, serial: u64, now: Now) {
        let Some(ordered) = self.orders.get_mut(&serial) else { return };
        let (method, verb) = ordered.call.order().request();
        let bytes_max =
            if ordered.call.order() == PoolOrder::Reload { RELOAD_BYTES_MAX } else { DRAIN_BYTES_MAX };
        while let Some((node, to)) = ordered.call.next_agent() {
            let mut fields = FieldLines::new().with("Content-Type", "application/json");
            if let Some(bearer) = self.guard.bearer(now.mono) {
                fields.push("Authorization", bearer);
            }
            let outbound = Outbound {
                to,
                method: method.into(),
                target: format!("/v2/pools/{}/{verb}", ordered.call.pool()).into(),
                fields,
                body: ordered.body.clone(),
                sink: Sink::Collect { bytes_max },
                patience: PATIENCE,
                keep_ms: None,
            };
            let exchange = self.net.start(outbound, now.mono);
            self.exchanges.insert(exchange, Running::Ordered(serial, node));
        }
    }

    /// An agent has answered; after the last one the client is.
    pub(super) fn order_answered(&mut self, serial: u64, node: NodeId, outcome: Outcome, now: Now) {
        let Some(ordered) = self.orders.get_mut(&serial) else { return };
        let said = match outcome {
            Outcome::Complete { status, body } => AgentSaid::Answered { status, body },
            Outcome::Failed(fault) => match fault.kind {
                FaultKind::Timeout | FaultKind::Unreached => AgentSaid::Late(fault.reason),
                _ => AgentSaid::Failed(fault.reason),
            },
            Outcome::ClientGone | Outcome::Cancelled => AgentSaid::Failed("given up".into()),
        };
        let (order, pool) = (ordered.call.order(), ordered.call.pool().clone());
        let is_taken = ordered.call.answered(&node, said);
        if is_taken && matches!(order, PoolOrder::Drain | PoolOrder::Resume) {
            let draining = order == PoolOrder::Drain;
            self.core.handle(Input::PoolOrdered { node, pool, draining }, now, &mut self.effects);
        }
        self.ask_agents(serial, now);
        self.end_order(serial, now);
    }
}
