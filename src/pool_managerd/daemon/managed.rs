//! The shell's part of managed pools: a helper thread talks to provisioners, and its answers go to whom they
//! belong.
//!
//! Orders are only accepted there. Who waits for the end of one is put on a list and answered when it has come;
//! until then the provisioner is asked again and again, and nothing else waits.
//!
//! Control planes want to know what is prepared. A provisioner that comes or begins with something touches its
//! socket; then all are asked, and again until nothing is under way. Nobody wakes up in between.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::Daemon;
use crate::http::server::Response;
use crate::pool_managerd::api;
use crate::pool_managerd::core::Input;
use crate::pool_managerd::operations::PoolOrder;
use crate::pool_managerd::provisioner_client;
use crate::reactor::dirwatch::FileWatch;
use crate::reactor::offload::Offload;
use crate::reactor::token::{Kind, Token};
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

/// Pause between two looks at what is prepared, in milliseconds, while something is.
const LOOK_EVERY_MS: u64 = 500;
/// The same while nothing is and the kernel reports no touched sockets.
const LOOK_IDLE_MS: u64 = 2_000;
/// The same where it does: a safety net, for which nobody is woken up.
const SAFETY_NET_MS: u64 = 60_000;

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
    /// When it is looked what is prepared: the first turn after that does it.
    look_at: Mono,
    /// The loop wakes up for it.
    wakes: bool,
    is_looking: bool,
    /// More was touched while it was looked.
    again: bool,
    /// Where provisioners listen; made once some do.
    sockets: Option<FileWatch>,
    /// They are there now, and the kernel reports what becomes of their directory.
    is_watched: bool,
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
    /// Nothing is known to be under way.
    fn look_later(&mut self, are_reported: bool, now: Mono) {
        let pause_ms = if are_reported { SAFETY_NET_MS } else { LOOK_IDLE_MS };
        (self.look_at, self.wakes) = (now.plus_ms(pause_ms), !are_reported);
    }

    /// Whether what provisioners touch now is reported.
    fn is_watching(&self) -> bool {
        self.is_watched && self.sockets.as_ref().is_some_and(FileWatch::is_still)
    }

    /// When [`Daemon::look_for_provisioners`] or [`Daemon::ask_provisioners`] is wanted next.
    pub(super) fn deadline(&self) -> Option<Mono> {
        let look_at = (self.wakes && !self.is_looking).then_some(self.look_at);
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

    /// Finds out whether provisioners have something to tell. `changed`: something happened in the runtime
    /// directory; `told`: where they listen.
    pub(super) fn look_for_provisioners(&mut self, changed: bool, told: bool, now: Now) {
        let managed = &mut self.managed;
        let told = told || (changed && !managed.is_watching());
        if managed.is_looking {
            managed.again |= told;
            return;
        }
        if !told && managed.look_at > now.mono {
            return;
        }
        let directory = self.config.runtime_dir.join(PROVISIONER_DIRECTORY);
        // Most nodes have none.
        let has_any = directory.is_dir();
        let socket = directory.join("any.sock");
        let watch = || FileWatch::new(std::iter::once(socket.as_path()), Token::only(Kind::Provisioners));
        // A watch that is not needed any more is kept: to close one makes the loop stand still.
        managed.is_watched =
            has_any && managed.sockets.get_or_insert_with(watch).renew(&self.registry).is_empty();
        let are_reported = if has_any { managed.is_watched } else { self.watch.mode() == "inotify" };
        managed.look_later(are_reported, now.mono);
        let is_looking = has_any && self.hand_over(Job::Look);
        self.managed.is_looking = is_looking;
        if !has_any {
            self.core.handle(Input::Preparing(Vec::new()), now, &mut self.effects);
        }
    }

    /// Asks how far the orders have come that somebody waits for.
    pub(super) fn ask_provisioners(&mut self, now: Now) {
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
        let managed = &mut self.managed;
        managed.is_looking = false;
        if std::mem::take(&mut managed.again) {
            (managed.look_at, managed.wakes) = (now.mono, true);
        } else if !pools.is_empty() {
            (managed.look_at, managed.wakes) = (now.mono.plus_ms(LOOK_EVERY_MS), true);
        }
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
