//! The node agent's HTTP interface: a request becomes an answer, or something for the daemon to do.
//! Pure.

use std::collections::BTreeSet;

use serde::Deserialize;
use serde_json::json;

use crate::http::head::RequestHead;
use crate::http::server::{Request, Response};
use crate::metrics::{self, Scrape, label_value};
use crate::replicas::{PoolCounts, Refused};
use crate::service::auth::{Denied, Policy};
use crate::service::guard::{Barred, Guard};
use crate::service::lag::LoopLag;
use crate::service::routes::{ANY_METHOD, Found, Route};
use crate::service::tls;
use crate::time::Mono;
use crate::wire::activity::ActivityReport;
use crate::wire::handoff::{self, Handoff, HandoffFile};
use crate::wire::id::{PoolId, ReplicaId, ReplicaKey};

use super::core::Core;
use super::gpus::GpuId;
use super::membership::PlaneState;
use super::operations::{self, Operation, PoolOrder};

/// Field in which a control plane says which engine it means.
pub const GENERATION_FIELD: &str = "x-llorch-generation";
/// Field in which a control plane says how many slots a request takes.
pub const SLOTS_FIELD: &str = "x-llorch-slots";
/// What this interface is, for programs.
const OPEN_API: &str = include_str!("../../packaging/openapi/pool-managerd.json");
/// Largest body that is read for its `n`, in bytes: reading holds the loop up, by a few milliseconds here.
const SLOTS_BODY_BYTES_MAX: usize = 2 << 20;

/// What the daemon must do for a request.
#[derive(Debug)]
pub enum Action {
    /// Answer.
    Respond(Response),
    /// Relay to the engine of a replica.
    Relay {
        /// The replica.
        key: ReplicaKey,
        /// The engine that the caller means.
        generation: Option<u64>,
        /// Slots that the request takes.
        slots: u32,
        /// Path and query below the engine's URL.
        target: String,
    },
    /// A GPU is sound, an operator says; then answer.
    ClearGpu(GpuId),
    /// Take a handoff that comes without a file, then answer.
    Adopt(Box<Handoff>),
    /// Take such a handoff back, then answer.
    Abandon(ReplicaKey),
    /// Ask a pool's engines how they are, then answer.
    Ask(PoolId),
    /// Take what a control plane's requests have been doing on a replica, then answer.
    Active(ReplicaKey, ActivityReport),
    /// Do something that an operator or a tool asked for, then answer.
    Operate(Operation),
}

/// What the daemon knows beside the core.
#[derive(Debug)]
pub struct Facts<'a> {
    /// Who may call, for its metrics.
    pub guard: &'a Guard,
    /// `inotify` or `poll`.
    pub watch_mode: &'static str,
    /// Resident memory, where known, in bytes.
    pub resident_bytes: Option<u64>,
    /// How far the loop lags behind.
    pub lag: &'a LoopLag,
    /// The time of this turn.
    pub now: Mono,
    /// What is counted of TLS, where it is spoken.
    pub tls: Option<tls::Meters>,
    /// Pools that provisioners were given orders for.
    pub managed: &'a BTreeSet<PoolId>,
    /// The caller has shown a certificate, or none is asked for.
    pub is_certified: bool,
}

/// What a route leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum To {
    /// That this process lives.
    Health,
    /// That it has listed its directory.
    Ready,
    /// The metrics.
    Metrics,
    /// The pools.
    Pools,
    /// One pool.
    PoolStatus,
    /// A pool is said to be ready, or a handoff comes without a file.
    Announced,
    /// Such a handoff is taken back.
    Abandon,
    /// An engine.
    Relay,
    /// What a control plane's own requests have been doing on an engine.
    Activity,
    /// The GPUs.
    Gpus,
    /// A GPU is sound again.
    ClearGpu,
    /// The watched directory.
    Handoffs,
    /// What happened lately.
    Events,
    /// Drains, callbacks and single replicas: see [`operations`].
    Operation,
    /// What this interface is.
    OpenApi,
}

const fn route_to(method: &'static str, path: &'static str, policy: Policy, to: To) -> Route<To> {
    Route { method, path, policy, to }
}

/// Every route, the most used first. Each exists with and without `/v2` before it.
pub static ROUTES: &[Route<To>] = &[
    route_to(ANY_METHOD, "/pools/{pool}/replicas/{replica}/engine/{path...}", Policy::Node, To::Relay),
    route_to("GET", "/pools", Policy::NodeOrAdmin, To::Pools),
    route_to("GET", "/pools/{pool}/status", Policy::NodeOrAdmin, To::PoolStatus),
    route_to("POST", "/pools/{pool}/status", Policy::NodeOrAdmin, To::PoolStatus),
    route_to("GET", "/health", Policy::Public, To::Health),
    route_to("GET", "/ready", Policy::Public, To::Ready),
    route_to("GET", "/metrics", Policy::Public, To::Metrics),
    route_to("POST", "/pools/{pool}/ready", Policy::NodeOrAdmin, To::Announced),
    route_to("DELETE", "/pools/{pool}/replicas/{replica}", Policy::NodeOrAdmin, To::Abandon),
    route_to("GET", "/pools/{pool}/replicas/{replica}/status", Policy::NodeOrAdmin, To::Operation),
    route_to("POST", "/pools/{pool}/replicas/{replica}/status", Policy::NodeOrAdmin, To::Operation),
    route_to("POST", "/pools/{pool}/replicas/{replica}/activity", Policy::Node, To::Activity),
    route_to("GET", "/gpus", Policy::Admin, To::Gpus),
    route_to("POST", "/gpus/{gpu}/clear", Policy::Admin, To::ClearGpu),
    route_to("GET", "/handoffs", Policy::Admin, To::Handoffs),
    route_to("GET", "/events", Policy::Admin, To::Events),
    route_to("GET", "/drains", Policy::Admin, To::Operation),
    route_to("GET", "/node/drain", Policy::Admin, To::Operation),
    route_to("POST", "/node/drain", Policy::Admin, To::Operation),
    route_to("POST", "/node/resume", Policy::Admin, To::Operation),
    route_to("GET", "/gpus/{gpu}/drain", Policy::Admin, To::Operation),
    route_to("POST", "/gpus/{gpu}/drain", Policy::Admin, To::Operation),
    route_to("POST", "/gpus/{gpu}/resume", Policy::Admin, To::Operation),
    route_to("GET", "/pools/{pool}/drain", Policy::NodeOrAdmin, To::Operation),
    route_to("POST", "/pools/{pool}/drain", Policy::NodeOrAdmin, To::Operation),
    route_to("POST", "/pools/{pool}/resume", Policy::NodeOrAdmin, To::Operation),
    route_to("GET", "/pools/{pool}/replicas/{replica}/drain", Policy::Admin, To::Operation),
    route_to("POST", "/pools/{pool}/replicas/{replica}/drain", Policy::Admin, To::Operation),
    route_to("POST", "/pools/{pool}/replicas/{replica}/resume", Policy::Admin, To::Operation),
    route_to("POST", "/pools/{pool}/preload", Policy::NodeOrAdmin, To::Operation),
    route_to("POST", "/pools/{pool}/reload", Policy::NodeOrAdmin, To::Operation),
    route_to("GET", "/callbacks", Policy::Admin, To::Operation),
    route_to("GET", "/openapi.json", Policy::Any, To::OpenApi),
    route_to("POST", "/callbacks/register", Policy::NodeOrAdmin, To::Operation),
    route_to("DELETE", "/callbacks/register", Policy::NodeOrAdmin, To::Operation),
    route_to("POST", "/callbacks/unregister", Policy::NodeOrAdmin, To::Operation),
];

/// A request's path without its version.
#[must_use]
pub fn path_of(head: &RequestHead) -> &str {
    let path = head.path();
    path.strip_prefix("/v2").filter(|rest| rest.starts_with('/')).unwrap_or(path)
}

/// Decides about a request that the guard has let pass, and that leads here.
#[must_use]
pub fn route(found: Found<'_, To>, request: &Request, core: &Core, facts: &Facts<'_>) -> Action {
    let is_open = matches!(found, Found::Route(To::Health | To::Ready | To::Metrics, _));
    if !is_open && !facts.is_certified {
        let message = "this agent serves callers with a certificate of its client CA only";
        return Action::Respond(error(403, "CERTIFICATE_REQUIRED", message, None));
    }
    let (to, parts) = match found {
        Found::Route(to, parts) => (to, parts),
        Found::Method(allow) => return Action::Respond(not_allowed(&allow)),
        Found::Nothing => return Action::Respond(nowhere()),
    };
    let part = |index: usize| parts.get(index).copied().unwrap_or_default();
    match to {
        To::Health => respond(
            200,
            &json!({"status": "ok", "version": env!("CARGO_PKG_VERSION"), "service": "pool-managerd"}),
        ),
        To::Ready => ready(core),
        To::Metrics => Action::Respond(scrape(core, facts)),
        To::Pools => respond(200, &core.report()),
        To::PoolStatus => with_pool(part(0), |id| match core.pool_status(&id) {
            _ if facts.managed.contains(&id) => Action::Operate(Operation::Order(PoolOrder::Status(id))),
            Some(status) => respond(200, &status),
            None => Action::Respond(not_found(&format!("pool {id} not found"))),
        }),
        To::Announced => with_pool(part(0), |pool| announced(request, pool, core, facts)),
        To::Abandon => with_pool(part(0), |pool| abandon(pool, part(1), core)),
        To::Relay => relay(request, part(0), part(1)),
        To::Activity => with_pool(part(0), |pool| activity(&request.body, pool, part(1), core)),
        To::Gpus => respond(200, &core.gpus().to_json()),
        To::ClearGpu => match core.gpus().find(part(0)) {
            Some(id) => Action::ClearGpu(id),
            None => Action::Respond(not_found("there is no such GPU")),
        },
        To::Handoffs => respond(200, &core.replicas().files_json(facts.watch_mode)),
        To::Events => {
            let since = request.head.query("since").and_then(|n| n.parse().ok()).unwrap_or(0);
            respond(200, &core.events().to_json(since))
        }
        To::OpenApi => Action::Respond(Response::document(OPEN_API)),
        To::Operation => {
            let segments: Vec<&str> = path_of(&request.head).trim_start_matches('/').split('/').collect();
            match operations::route(&segments, request, core) {
                Some(operation) => operation.map_or_else(Action::Respond, Action::Operate),
                None => Action::Respond(nowhere()),
            }
        }
    }
}

/// The answer to a request that the guard does not let pass.
#[must_use]
pub fn barred(barred: Barred) -> Response {
    let message = barred.message("POOL_MANAGERD");
    let (status, code) = match barred {
        Barred::Denied(Denied::Missing | Denied::Bad(_)) => (401, json!(barred.number())),
        Barred::Denied(Denied::Scope) => (403, json!("WRONG_SCOPE")),
        Barred::Host => (421, json!("FOREIGN_HOST")),
        Barred::Origin => (403, json!("FOREIGN_ORIGIN")),
    };
    let mut body = json!({"code": code, "message": message, "error": message, "retriable": false});
    let Barred::Denied(denied) = barred else { return Response::json(status, &body) };
    body["hint"] = json!("send Authorization: Bearer TOKEN");
    Response::json(status, &body).with("WWW-Authenticate", denied.challenge())
}

fn nowhere() -> Response {
    not_found("there is nothing at this path")
}

/// An error in the shape of this interface.
#[must_use]
pub fn error(status: u16, code: &str, message: &str, retry_after_ms: Option<u64>) -> Response {
    let retriable = retry_after_ms.is_some();
    let mut body = json!({"code": code, "message": message, "error": message, "retriable": retriable});
    let Some(after_ms) = retry_after_ms else { return Response::json(status, &body) };
    body["retry_after_ms"] = json!(after_ms);
    Response::json(status, &body)
        .with("Retry-After", after_ms.div_ceil(1000).clamp(1, 60).to_string())
        .with("X-Backoff-Ms", after_ms.to_string())
}

fn respond(status: u16, body: &impl serde::Serialize) -> Action {
    Action::Respond(Response::json(status, body))
}

/// Nothing is there.
pub(super) fn not_found(message: &str) -> Response {
    error(404, "NOT_FOUND", message, None)
}

/// The path serves other methods.
pub(super) fn not_allowed(allow: &str) -> Response {
    let response = error(405, "METHOD_NOT_ALLOWED", &format!("this path serves {allow}"), None);
    response.with("Allow", allow)
}

fn with_pool(pool: &str, then: impl FnOnce(PoolId) -> Action) -> Action {
    match PoolId::new(pool) {
        Ok(id) => then(id),
        Err(why) => Action::Respond(error(400, "INVALID_PARAMS", &why.to_string(), None)),
    }
}

/// A pool is said to be ready: with a handoff as the body its engine is taken in as if a file had
/// announced it; without one the pool's engines are asked at once.
fn announced(request: &Request, pool: PoolId, core: &Core, facts: &Facts<'_>) -> Action {
    let body: &[u8] = &request.body;
    if body.is_empty() {
        return if core.pool_status(&pool).is_some() {
            Action::Ask(pool)
        } else {
            Action::Respond(not_found(&format!(
                "pool {pool} not found; a handoff as the body would announce it"
            )))
        };
    }
    let invalid = |why: &str| Action::Respond(error(400, "INVALID_PARAMS", why, None));
    let mut handoff = match handoff::parse(body) {
        Ok(HandoffFile::Engine(handoff)) => handoff,
        Ok(HandoffFile::ModelOnly) => return invalid("`url` is missing"),
        Err(why) => return invalid(&why.to_string()),
    };
    let names_pool =
        serde_json::from_slice::<serde_json::Value>(body).is_ok_and(|body| !body["pool_id"].is_null());
    if names_pool && handoff.pool_id != pool {
        return invalid(&format!("`pool_id` must be that of the path, {pool}"));
    }
    // What a file of this machine says is sent to the engine: that is for an operator to decide, or for who may
    // write handoff files, and not for control planes.
    let keys = facts.guard.credentials.keys();
    if handoff.auth_file.is_some() && keys.check(Policy::Admin, &request.head.fields).is_err() {
        let message = "`auth.file` can be named with an operator's token, or in a handoff file";
        return Action::Respond(error(403, "WRONG_SCOPE", message, None));
    }
    handoff.pool_id = pool;
    match core.replicas().may_adopt(&handoff) {
        Ok(()) => Action::Adopt(handoff),
        Err(why) => invalid(&why),
    }
}

fn abandon(pool: PoolId, replica: &str, core: &Core) -> Action {
    let Ok(replica) = ReplicaId::new(replica) else {
        return Action::Respond(error(400, "INVALID_PARAMS", "the replica in the path is no id", None));
    };
    let key = ReplicaKey { pool, replica };
    if core.replicas().adopted(&key).is_some() {
        return Action::Abandon(key);
    }
    match core.replicas().file_of(&key) {
        Some(file) => {
            let message = format!("{key} stands behind the handoff file {file:?}: remove that");
            Action::Respond(error(409, "HAS_HANDOFF_FILE", &message, None))
        }
        None => Action::Respond(not_found(&format!("replica {key} not found"))),
    }
}

/// What a control plane tells of its requests that it sent straight to an engine.
fn activity(body: &[u8], pool: PoolId, replica: &str, core: &Core) -> Action {
    let invalid = |why: &str| Action::Respond(error(400, "INVALID_PARAMS", why, None));
    let Ok(replica) = ReplicaId::new(replica) else { return invalid("the replica in the path is no id") };
    let key = ReplicaKey { pool, replica };
    let report = match serde_json::from_slice::<ActivityReport>(body) {
        Ok(report) => report,
        Err(why) => return invalid(&format!("the body: {why}")),
    };
    match core.replicas().engine(&key) {
        None => Action::Respond(not_found(&format!("replica {key} not found"))),
        Some((_, current, _)) if current != report.generation => {
            let message = format!("{key}: {}", Refused::StaleGeneration { current: Some(current) });
            Action::Respond(error(409, "STALE_GENERATION", &message, None))
        }
        Some(_) => Action::Active(key, report),
    }
}

fn relay(request: &Request, pool: &str, replica: &str) -> Action {
    let (Ok(pool), Ok(replica)) = (PoolId::new(pool), ReplicaId::new(replica)) else {
        return Action::Respond(error(
            400,
            "INVALID_PARAMS",
            "the pool or replica in the path is no id",
            None,
        ));
    };
    // The engine's part of the target is taken as it was sent, so that nothing in it is re-encoded.
    let target = request.head.target().split_once("/engine").map_or("", |(_, rest)| rest);
    if !target.starts_with('/') {
        return Action::Respond(not_found("the engine's path is missing"));
    }
    let number = |name| request.head.fields.get(name).map(str::parse::<u64>).transpose();
    let (Ok(generation), Ok(slots)) = (number(GENERATION_FIELD), number(SLOTS_FIELD)) else {
        return Action::Respond(error(400, "INVALID_PARAMS", "an x-llorch field is no number", None));
    };
    Action::Relay {
        key: ReplicaKey { pool, replica },
        generation,
        slots: slots.map_or_else(|| slots_of(request), |n| u32::try_from(n).unwrap_or(u32::MAX)),
        target: target.to_string(),
    }
}

/// Slots that a request takes whose sender does not say so: one for each answer that its body asks for
/// with `n`. What is no number from 1 up counts as 1; more than the engine has takes all of them.
fn slots_of(request: &Request) -> u32 {
    #[derive(Deserialize)]
    struct Body {
        n: Option<f64>,
    }
    let json = request.head.fields.get("content-type").is_some_and(is_json);
    let worth_reading = json && request.head.method() == "POST" && request.body.len() <= SLOTS_BODY_BYTES_MAX;
    // Most bodies say nothing of it, and that is found out much faster than the rest is read.
    if !worth_reading || memchr::memmem::find(&request.body, b"\"n\"").is_none() {
        return 1;
    }
    let answers = serde_json::from_slice::<Body>(&request.body).ok().and_then(|body| body.n).unwrap_or(1.0);
    // The conversion saturates.
    answers.max(1.0) as u32
}

fn is_json(content_type: &str) -> bool {
    let kind = content_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    kind == "application/json" || kind.ends_with("+json")
}

fn ready(core: &Core) -> Action {
    match core.ready() {
        Ok(()) => respond(200, &json!({"ready": true})),
        Err(reason) => respond(503, &json!({"ready": false, "reason": reason})),
    }
}

fn scrape(core: &Core, facts: &Facts<'_>) -> Response {
    let counts = core.counts();
    let mut scrape = Scrape::default();
    let pools = core.pool_counts();
    let labels: Vec<String> =
        pools.keys().map(|pool| format!("pool_id=\"{}\"", label_value(pool.as_str()))).collect();
    let by_pool = |value: fn(&PoolCounts) -> f64| -> Vec<(&str, f64)> {
        labels.iter().map(String::as_str).zip(pools.values().map(value)).collect()
    };
    scrape.gauge(
        "pool_managerd_pool_ready",
        "Whether a pool takes work.",
        &by_pool(|p| f64::from(u8::from(p.is_ready))),
    );
    scrape.gauge("pool_managerd_pool_slots", "Slots of a pool.", &by_pool(|p| f64::from(p.slots_total)));
    scrape.gauge(
        "pool_managerd_pool_slots_free",
        "Free slots of a pool.",
        &by_pool(|p| f64::from(p.slots_free)),
    );
    let replicas = core.replicas().len() as f64;
    scrape.gauge("pool_managerd_replicas", "Replicas that are known.", &[("", replicas)]);
    scrape.gauge(
        "pool_managerd_relayed_in_flight",
        "Relayed requests that run.",
        &[("", f64::from(core.in_flight()))],
    );
    let member = |plane: &super::membership::Plane| matches!(plane.state(), PlaneState::Registered { .. });
    let members = core.planes().iter().filter(|plane| member(plane)).count();
    scrape.gauge(
        "pool_managerd_control_planes",
        "Control planes that are configured.",
        &[("", core.planes().len() as f64)],
    );
    scrape.gauge(
        "pool_managerd_control_planes_registered",
        "Control planes that know this node.",
        &[("", members as f64)],
    );
    scrape.counter(
        "pool_managerd_listings_total",
        "Listings of the runtime directory.",
        &[("", counts.listings)],
    );
    scrape.counter(
        "pool_managerd_handoffs_refused_total",
        "Handoff files that could not be used, once a change.",
        &[("", counts.files_refused)],
    );
    scrape.counter("pool_managerd_probes_total", "Probes sent to engines.", &[("", counts.probes)]);
    scrape.counter(
        "pool_managerd_heartbeats_total",
        "Heartbeats that a control plane confirmed.",
        &[("", counts.heartbeats_ok)],
    );
    scrape.counter(
        "pool_managerd_control_calls_failed_total",
        "Calls to control planes that failed.",
        &[("", counts.calls_failed)],
    );
    let served = counts.relayed.saturating_sub(counts.relayed_failed);
    scrape.counter(
        "pool_managerd_relayed_total",
        "Requests for engines, by outcome.",
        &[
            ("outcome=\"answered\"", served),
            ("outcome=\"failed\"", counts.relayed_failed),
            ("outcome=\"refused\"", counts.relay_refused),
            ("outcome=\"cut\"", counts.relayed_cut),
        ],
    );
    core.gpus().scrape(&mut scrape);
    operations::scrape(core, &mut scrape);
    facts.guard.scrape("pool_managerd", &mut scrape);
    facts.lag.scrape("pool_managerd", facts.now, &mut scrape);
    if let Some(tls) = &facts.tls {
        tls.scrape("pool_managerd", &mut scrape);
    }
    if let Some(bytes) = facts.resident_bytes {
        scrape.gauge("process_resident_memory_bytes", "Resident memory.", &[("", bytes as f64)]);
    }
    Response {
        status: 200,
        content_type: metrics::CONTENT_TYPE,
        fields: Vec::new(),
        body: scrape.finish().into_bytes(),
    }
}
