//! The shell's part of managed pools: a helper thread talks to provisioners, and its answers go to whom they
//! belong.
//!
//! Orders are only accepted there. Who waits for the end of one is put on a list and answered when it has come;
//! until then the provisioner is asked again and again, and nothing else waits. Where there are provisioners, they
//! are asked now and then what they prepare: control planes want to know.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::Daemon;
use crate::http::server::Response;
use crate::pool_managerd::api;
use crate::pool_managerd::core::Input;
use crate::pool_managerd::operations::PoolOrder;
use crate::pool_managerd::provisioner_client;
use crate::reactor::offload::Offload;
use crate::reactor::token::Token;
use crate::time::{Mono, Now, earliest};
use crate::wire::id::PoolId;
use crate::wire::pool::PROVISIONER_DIRECTORY;
use crate::wire::preparation::PoolPreparation;

/// Most orders and questions that wait for the helper: more are told to come back.
const JOBS_MAX: usize = 64;
/// When they should, in milliseconds.
const BUSY_RETRY_MS: u64 = 2_000;
/// Most pools whose orders are remembered: what one provisioner may keep.
const POOLS_MAX: usize = 256;
/// Most callers that wait for the end of an order: half of the helper's queue, so that others get through.
const WAITING_MAX: usize = JOBS_MAX / 2;
/// Pause between two questions how far an order has come, in milliseconds: each is a line over a local socket,
/// and an engine takes seconds.
const ASK_EVERY_MS: u64 = 50;

/// Pause between two looks at what is prepared, in milliseconds: while something is, and while nothing is.
const LOOK_EVERY_MS: (u64, u64) = (500, 2_000);

type Helper = Offload<Job, Found>;

/// What the helper does.
#[derive(Debug)]
enum Job {
    Order(For, PoolOrder),
    Look,
}

/// What came of it.
#[derive(Debug)]
enum Found {
    Answer(For, PoolOrder, u16, Value),
    Preparing(Vec<PoolPreparation>),
}

/// Whom the answer to a question is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum For {
    /// Whoever asked.
    Client(Token),
    /// Whoever waits for the end of an order.
    Waiting(Token),
}

/// The helper, the pools that provisioners were given orders for, and who waits for their end.
#[derive(Debug, Default)]
pub(super) struct Managed {
    helper: Option<Helper>,
    pub(super) pools: BTreeSet<PoolId>,
    waiting: Vec<Waiting>,
    /// When it is looked what is prepared; `None` while it is.
    look_at: Option<Mono>,
    is_looking: bool,
}

/// A caller that is answered when what it ordered has ended.
#[derive(Debug)]
struct Waiting {
    client: Token,
    pool: PoolId,
    /// The order's number.
    order: Option<u64>,
    /// Not longer than that.
    until: Mono,
    /// When the provisioner is asked next; `None` while it is.
    ask_at: Option<Mono>,
}

impl Managed {
    /// When [`Daemon::ask_provisioners`] is wanted next.
    pub(super) fn deadline(&self) -> Option<Mono> {
        let look_at = self.look_at.filter(|_| !self.is_looking);
        earliest(look_at, self.waiting.iter().filter_map(|waiting| waiting.ask_at).min())
    }
}

impl Daemon {
    pub(super) fn order(&mut self, client: Token, order: PoolOrder, now: Now) {
        let is_taken = self.hand_over(Job::Order(For::Client(client), order));
        if !is_taken {
            let message = "too many ask for managed pools at once";
            let response = api::error(503, "BUSY", message, Some(BUSY_RETRY_MS));
            self.net.respond(client, &response, now.mono);
        }
    }

    /// Whether the helper takes it. Most agents never need one, so it is started when it is.
    fn hand_over(&mut self, job: Job) -> bool {
        if self.managed.helper.is_none() {
            let directory = self.config.runtime_dir.clone();
            let work = move |job| match job {
                Job::Order(whom, order) => {
                    let (status, body) = provisioner_client::ask(&directory, &order);
                    Found::Answer(whom, order, status, body)
                }
                Job::Look => Found::Preparing(provisioner_client::preparing(&directory)),
            };
            match Offload::spawn("provisioners", JOBS_MAX, self.waker.clone(), work) {
                Ok(helper) => self.managed.helper = Some(helper),
                Err(error) => log::error!("cannot start a helper thread: {error}"),
            }
        }
        self.managed.helper.as_ref().is_some_and(|helper| helper.submit(job).is_ok())
    }

    /// Asks what is prepared, and how far the orders have come that somebody waits for.
    pub(super) fn ask_provisioners(&mut self, now: Now) {
        if !self.managed.is_looking && self.managed.look_at.is_none_or(|look_at| look_at <= now.mono) {
            self.managed.look_at = Some(now.mono.plus_ms(LOOK_EVERY_MS.1));
            // Most nodes have none.
            let has_any = self.config.runtime_dir.join(PROVISIONER_DIRECTORY).is_dir();
            self.managed.is_looking = has_any && self.hand_over(Job::Look);
            if !has_any {
                self.core.handle(Input::Preparing(Vec::new()), now, &mut self.effects);
            }
        }
        for at in 0..self.managed.waiting.len() {
            let waiting = &mut self.managed.waiting[at];
            if waiting.ask_at.is_none_or(|ask_at| ask_at > now.mono) {
                continue;
            }
            waiting.ask_at = None;
            let (client, pool) = (waiting.client, waiting.pool.clone());
            if !self.hand_over(Job::Order(For::Waiting(client), PoolOrder::Status(pool))) {
                self.managed.waiting[at].ask_at = Some(now.mono.plus_ms(ASK_EVERY_MS));
            }
        }
    }

    /// Answers what the helper has found out.
    pub(super) fn take_ordered(&mut self, now: Now) {
        while let Some(found) = self.managed.helper.as_ref().and_then(Offload::take) {
            let (whom, order, status, body) = match found {
                Found::Answer(whom, order, status, body) => (whom, order, status, body),
                Found::Preparing(pools) => {
                    self.take_preparing(pools, now);
                    continue;
                }
            };
            let client = match whom {
                For::Waiting(client) => {
                    self.look_after_waiting(client, status, body, now);
                    continue;
                }
                For::Client(client) => client,
            };
            let response = match &order {
                PoolOrder::Status(pool) => self.status_with(pool, status, body),
                order => {
                    if status == 202 && self.managed.pools.len() < POOLS_MAX {
                        self.managed.pools.insert(order.pool().clone());
                    }
                    if status == 202 && self.waits(client, order, &body, now) {
                        continue;
                    }
                    answer(status, body)
                }
            };
            self.net.respond(client, &response, now.mono);
        }
    }

    fn take_preparing(&mut self, pools: Vec<PoolPreparation>, now: Now) {
        let (busy_ms, idle_ms) = LOOK_EVERY_MS;
        let pause_ms = if pools.is_empty() { idle_ms } else { busy_ms };
        (self.managed.is_looking, self.managed.look_at) = (false, Some(now.mono.plus_ms(pause_ms)));
        for pool in pools.iter().map(|preparation| &preparation.pool_id) {
            if self.managed.pools.len() < POOLS_MAX && !self.managed.pools.contains(pool) {
                self.managed.pools.insert(pool.clone());
            }
        }
        self.core.handle(Input::Preparing(pools), now, &mut self.effects);
    }

    /// Whether the answer to an order that was accepted has to wait for its end.
    fn waits(&mut self, client: Token, order: &PoolOrder, body: &Value, now: Now) -> bool {
        let PoolOrder::Preload(pool, _, wait_ms @ 1..) = order else { return false };
        if self.managed.waiting.len() >= WAITING_MAX {
            return false;
        }
        self.managed.waiting.push(Waiting {
            client,
            pool: pool.clone(),
            order: body["order"].as_u64(),
            until: now.mono.plus_ms(*wait_ms),
            ask_at: Some(now.mono.plus_ms(ASK_EVERY_MS)),
        });
        true
    }

    /// The provisioner has told how far it is.
    fn look_after_waiting(&mut self, client: Token, status: u16, mut body: Value, now: Now) {
        let Some(at) = self.managed.waiting.iter().position(|waiting| waiting.client == client) else {
            return;
        };
        let waiting = &mut self.managed.waiting[at];
        let is_it = body["order"].as_u64() == waiting.order;
        let is_running = status == 200 && is_it && body["state"] != "ended";
        if is_running && now.mono < waiting.until {
            waiting.ask_at = Some(now.mono.plus_ms(ASK_EVERY_MS));
            return;
        }
        let pool = self.managed.waiting.swap_remove(at).pool;
        let response = if status != 200 {
            let message = format!("preload failed: the engine-provisioner of pool {pool} went away");
            api::error(500, "PRELOAD_FAILED", &message, None)
        } else if is_it && !is_running {
            preloaded(&pool, &body["outcome"])
        } else {
            if let Some(body) = body.as_object_mut() {
                body.insert("pool_id".into(), json!(pool));
            }
            Response::json(202, &body)
        };
        self.net.respond(client, &response, now.mono);
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

/// The answer to a preload that has ended.
fn preloaded(pool: &PoolId, outcome: &Value) -> Response {
    if outcome["success"] == true {
        let (pid, path) = (&outcome["pid"], &outcome["handoff_path"]);
        return Response::json(200, &json!({"pool_id": pool, "pid": pid, "handoff_path": path}));
    }
    let reason = outcome["reason"].as_str().unwrap_or("preload failed");
    api::error(500, "PRELOAD_FAILED", reason, None)
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
