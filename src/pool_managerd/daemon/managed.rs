//! The shell's part of managed pools: a helper thread talks to provisioners, and its answers go to whom they
//! belong.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::Daemon;
use crate::http::server::Response;
use crate::pool_managerd::api;
use crate::pool_managerd::operations::PoolOrder;
use crate::pool_managerd::provisioner_client;
use crate::reactor::offload::Offload;
use crate::reactor::token::Token;
use crate::time::Now;
use crate::wire::id::PoolId;

/// Most orders and questions that wait for the helper: more are told to come back.
const WAITING_MAX: usize = 64;
/// When they should, in milliseconds.
const BUSY_RETRY_MS: u64 = 2_000;
/// Most pools whose orders are remembered: what one provisioner may keep.
const POOLS_MAX: usize = 256;

type Helper = Offload<(Token, PoolOrder), (Token, PoolOrder, u16, Value)>;

/// The helper, and the pools that provisioners were given orders for.
#[derive(Debug, Default)]
pub(super) struct Managed {
    helper: Option<Helper>,
    pub(super) pools: BTreeSet<PoolId>,
}

impl Daemon {
    pub(super) fn order(&mut self, client: Token, order: PoolOrder, now: Now) {
        if self.managed.helper.is_none() {
            let directory = self.config.runtime_dir.clone();
            let work = move |(client, order): (Token, PoolOrder)| {
                let (status, body) = provisioner_client::ask(&directory, &order);
                (client, order, status, body)
            };
            match Offload::spawn("provisioners", WAITING_MAX, self.waker.clone(), work) {
                Ok(helper) => self.managed.helper = Some(helper),
                Err(error) => log::error!("cannot start a helper thread: {error}"),
            }
        }
        let taken = self.managed.helper.as_ref().map(|helper| helper.submit((client, order)));
        if !matches!(taken, Some(Ok(()))) {
            let message = "too many ask for managed pools at once";
            let response = api::error(503, "BUSY", message, Some(BUSY_RETRY_MS));
            self.net.respond(client, &response, now.mono);
        }
    }

    /// Answers what the helper has found out.
    pub(super) fn take_ordered(&mut self, now: Now) {
        while let Some((client, order, status, body)) = self.managed.helper.as_ref().and_then(Offload::take) {
            let response = match &order {
                PoolOrder::Status(pool) => self.status_with(pool, status, body),
                order => {
                    if status == 202 && self.managed.pools.len() < POOLS_MAX {
                        self.managed.pools.insert(order.pool().clone());
                    }
                    answer(status, body)
                }
            };
            self.net.respond(client, &response, now.mono);
        }
    }

    /// A pool's status with how far its order has come.
    fn status_with(&mut self, pool: &PoolId, status: u16, body: Value) -> Response {
        let own = self.core.pool_status(pool).and_then(|own| serde_json::to_value(own).ok());
        if status != 200 {
            // Its provisioner has ended, and what it knew with it.
            self.managed.pools.remove(pool);
        }
        match own {
            None if status != 200 => api::error(404, "NOT_FOUND", &format!("pool {pool} not found"), None),
            own => {
                let mut own = own.unwrap_or_else(|| json!({"pool_id": pool, "live": false, "ready": false}));
                if status == 200 {
                    own["preparation"] = body["preparation"].clone();
                    own["reload"] = json!({"state": body["state"], "outcome": body["outcome"]});
                }
                Response::json(200, &own)
            }
        }
    }
}

fn answer(status: u16, body: Value) -> Response {
    let code = match status {
        202 => return Response::json(202, &body),
        400 => "INVALID_PARAMS",
        404 => "NOT_FOUND",
        409 => "CONFLICT",
        _ => "PROVISIONER_UNAVAILABLE",
    };
    let retry_ms = (status == 503 || status == 409).then_some(BUSY_RETRY_MS);
    api::error(status, code, body["error"].as_str().unwrap_or("the provisioner refuses it"), retry_ms)
}
