//! The control plane's HTTP interface: a request becomes an answer, or something for the daemon to
//! do. Pure.

use std::sync::Arc;

use serde::de::DeserializeOwned;
use serde_json::json;

use crate::http::server::{Request, Response};
use crate::metrics::{self, Histogram, Scrape};
use crate::replicas::drain_routes::{self, DrainOrder};
use crate::service::auth::{Fingerprint, Policy};
use crate::service::guard::Guard;
use crate::service::lag::LoopLag;
use crate::service::routes::{Found, Route};
use crate::service::tls;
use crate::time::Now;
use crate::wire::id::{NodeId, PoolId};
use crate::wire::json_place;
use crate::wire::node::{Heartbeat, RegisterRequest};

use super::aliases::Aliases;
use super::catalog;
use super::core::Core;
use super::dashboard;
use super::drains;
use super::envelope::{HOPS_MAX, hops};
use super::explain::{self, Explain, Survey};
use super::messages::PoolReady;
use super::meta;
use super::meters;
use super::openai::{self, Forwarding};
use super::pages::{self, Page, limit_of};
use super::patience::ClientPatience;
use super::poller::{POLL_OUTCOMES, POLL_STATES};
use super::pool_orders::PoolOrder;
use super::refusal::Refusal;
use super::service_registry::{Fenced, NodeStatus, Replica};
use super::tasks::{self, NewTask};
use super::workers::{self, WorkerOrder};

/// Largest body of a node's message, in bytes: a heartbeat of the largest node is below it.
const NODE_BODY_BYTES_MAX: usize = 4 * 1024 * 1024;

/// What this interface is, for programs.
const OPEN_API: &str = include_str!("../../packaging/openapi/orchestratord.json");

/// Largest notice about a pool, in bytes: a few names and a URL.
const NOTICE_BYTES_MAX: usize = 16 * 1024;

/// What the daemon must do for a request.
#[derive(Debug)]
pub enum Action {
    /// Answer.
    Respond(Response),
    /// Refuse; `true` in OpenAI's dialect.
    Refuse(Refusal, bool),
    /// Hand a node's registration to the core.
    Register(Box<RegisterRequest>),
    /// Hand a node's heartbeat to the core.
    Heartbeat(NodeId, Box<Heartbeat>),
    /// Hand a node's farewell to the core.
    Deregister(NodeId, Option<u64>),
    /// Hand a notice about a pool to the core.
    PoolReady(PoolReady),
    /// Drain this machine's engines or give them work again, then answer.
    Drain(DrainOrder),
    /// Let a worker join or leave.
    Worker(WorkerOrder),
    /// Pass an order about a pool on to the agents of its nodes.
    Order(PoolOrder, PoolId),
    /// Place the request and relay it to an engine.
    Engine(Box<Forwarding>),
    /// Admit a task.
    CreateTask(Box<NewTask>),
    /// Stream a task's events; `true` with all that happens to it.
    TaskEvents(String, bool),
    /// Cancel a task.
    CancelTask(String),
    /// Show a session.
    ShowSession(String),
    /// Forget a session.
    EndSession(String),
    /// Tell what the dashboard shows, from now on.
    Watch,
}

/// What the daemon knows beside the core.
#[derive(Debug)]
pub struct Facts<'a> {
    /// Other names of models.
    pub aliases: &'a Aliases,
    /// What is remembered of requests.
    pub explain: &'a Explain,
    /// Who may call, for its metrics.
    pub guard: &'a Guard,
    /// Whether nodes may register.
    pub cloud: bool,
    /// `inotify` or `poll`, in the HOME profile.
    pub watch_mode: Option<&'static str>,
    /// When this process started, in seconds since the Unix epoch.
    pub started: u64,
    /// Where the request came from.
    pub peer: &'a Arc<str>,
    /// The token that opened its route, where one was needed.
    pub key: Option<Fingerprint>,
    /// Resident memory, where known, in bytes.
    pub resident_bytes: Option<u64>,
    /// Connected clients.
    pub clients: usize,
    /// Tasks that are remembered.
    pub tasks: usize,
    /// Sessions that are remembered.
    pub sessions: usize,
    /// Bytes of request bodies in memory, and requests refused for want of room.
    pub bodies: (usize, u64),
    /// How far the loop lags behind.
    pub lag: &'a LoopLag,
    /// Times between two pieces of one relayed stream.
    pub token_gaps: &'a Histogram,
    /// What is counted of TLS, where it is spoken.
    pub tls: Option<tls::Meters>,
}

/// What a route leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum To {
    /// An engine.
    Engine,
    /// The list of models.
    Models,
    /// One model.
    Model,
    /// That this process lives.
    Health,
    /// That it takes requests.
    Ready,
    /// The metrics.
    Metrics,
    /// What happened lately.
    Events,
    /// The watched directory.
    Handoffs,
    /// A notice about a pool.
    PoolReady,
    /// The nodes.
    Nodes,
    /// One node.
    Node,
    /// A node's registration.
    Register,
    /// A node's heartbeat.
    Heartbeat,
    /// A node's farewell.
    Deregister,
    /// Which models are where.
    Availability,
    /// The pools.
    Pools,
    /// One pool's health.
    PoolHealth,
    /// Drains and states of this machine's engines: see [`drains`].
    Local,
    /// What the agents of a pool's nodes do, and this process where it has engines of its own.
    Order(PoolOrder),
    /// An engine without an agent.
    RegisterWorker,
    /// Its end.
    RemoveWorker,
    /// What can be asked of engines.
    Capabilities,
    /// What this program is.
    Version,
    /// Why requests went where they went.
    Explain,
    /// A new task.
    CreateTask,
    /// A task's events.
    TaskEvents,
    /// A task's end.
    CancelTask,
    /// A session.
    Session,
    /// A session's end.
    EndSession,
    /// The dashboard's page.
    Page,
    /// What it shows.
    Watch,
    /// What this interface is.
    OpenApi,
}

const fn route_to(method: &'static str, path: &'static str, policy: Policy, to: To) -> Route<To> {
    Route { method, path, policy, to }
}

/// Every route, the most used first.
pub static ROUTES: &[Route<To>] = &[
    route_to("POST", "/v1/chat/completions", Policy::Client, To::Engine),
    route_to("POST", "/v2/nodes/{node}/heartbeat", Policy::Node, To::Heartbeat),
    route_to("POST", "/v1/completions", Policy::Client, To::Engine),
    route_to("POST", "/v1/embeddings", Policy::Client, To::Engine),
    route_to("POST", "/v1/rerank", Policy::Client, To::Engine),
    route_to("POST", "/v1/responses", Policy::Client, To::Engine),
    route_to("POST", "/v1/messages", Policy::Client, To::Engine),
    route_to("GET", "/v1/models", Policy::Client, To::Models),
    route_to("GET", "/v1/models/{model...}", Policy::Client, To::Model),
    route_to("POST", "/v2/tasks", Policy::Client, To::CreateTask),
    route_to("GET", "/v2/tasks/{task}/events", Policy::Client, To::TaskEvents),
    route_to("POST", "/v2/tasks/{task}/cancel", Policy::Client, To::CancelTask),
    route_to("GET", "/v2/sessions/{session}", Policy::Client, To::Session),
    route_to("DELETE", "/v2/sessions/{session}", Policy::Client, To::EndSession),
    route_to("GET", "/health", Policy::Public, To::Health),
    route_to("GET", "/ready", Policy::Public, To::Ready),
    route_to("GET", "/metrics", Policy::Public, To::Metrics),
    route_to("POST", "/v2/nodes/register", Policy::Node, To::Register),
    route_to("GET", "/v2/nodes", Policy::Admin, To::Nodes),
    route_to("GET", "/v2/nodes/{node}", Policy::Admin, To::Node),
    route_to("DELETE", "/v2/nodes/{node}", Policy::NodeOrAdmin, To::Deregister),
    route_to("POST", "/callbacks/pool-ready", Policy::Node, To::PoolReady),
    route_to("POST", "/v2/callbacks/pool-ready", Policy::Node, To::PoolReady),
    route_to("POST", "/v2/callbacks/ready", Policy::Node, To::PoolReady),
    route_to("GET", "/v2/catalog/availability", Policy::Admin, To::Availability),
    route_to("GET", "/v2/pools", Policy::Admin, To::Pools),
    route_to("GET", "/v2/pools/{pool}/health", Policy::Admin, To::PoolHealth),
    route_to("GET", "/control/pools/{pool}/health", Policy::Admin, To::PoolHealth),
    route_to("POST", "/v2/pools/{pool}/reload", Policy::Admin, To::Order(PoolOrder::Reload)),
    route_to("GET", "/v2/pools/{pool}/status", Policy::NodeOrAdmin, To::Local),
    route_to("GET", "/v2/pools/{pool}/replicas/{replica}/status", Policy::NodeOrAdmin, To::Local),
    route_to("GET", "/v2/drains", Policy::Admin, To::Local),
    route_to("GET", "/v2/node/drain", Policy::Admin, To::Local),
    route_to("POST", "/v2/node/drain", Policy::Admin, To::Local),
    route_to("POST", "/v2/node/resume", Policy::Admin, To::Local),
    route_to("GET", "/v2/gpus/{gpu}/drain", Policy::Admin, To::Local),
    route_to("POST", "/v2/gpus/{gpu}/drain", Policy::Admin, To::Local),
    route_to("POST", "/v2/gpus/{gpu}/resume", Policy::Admin, To::Local),
    route_to("GET", "/v2/pools/{pool}/drain", Policy::Admin, To::Order(PoolOrder::ShowDrain)),
    route_to("POST", "/v2/pools/{pool}/drain", Policy::Admin, To::Order(PoolOrder::Drain)),
    route_to("POST", "/v2/pools/{pool}/resume", Policy::Admin, To::Order(PoolOrder::Resume)),
    route_to("GET", "/v2/pools/{pool}/replicas/{replica}/drain", Policy::Admin, To::Local),
    route_to("POST", "/v2/pools/{pool}/replicas/{replica}/drain", Policy::Admin, To::Local),
    route_to("POST", "/v2/pools/{pool}/replicas/{replica}/resume", Policy::Admin, To::Local),
    route_to("POST", "/v2/workers/register", Policy::Node, To::RegisterWorker),
    route_to("DELETE", "/v2/pools/{pool}/replicas/{replica}", Policy::NodeOrAdmin, To::RemoveWorker),
    route_to("GET", "/v2/meta/capabilities", Policy::Any, To::Capabilities),
    route_to("GET", "/v2/meta/version", Policy::Any, To::Version),
    route_to("GET", "/v2/handoffs", Policy::Admin, To::Handoffs),
    route_to("GET", "/v2/events", Policy::Admin, To::Events),
    route_to("GET", "/v2/explain/{request...}", Policy::Admin, To::Explain),
    route_to("GET", "/", Policy::Page, To::Page),
    route_to("GET", "/v2/dashboard/events", Policy::Admin, To::Watch),
    route_to("GET", "/openapi.json", Policy::Any, To::OpenApi),
];

/// Decides about a request that the guard has let pass, and that leads here.
#[must_use]
pub fn route(found: Found<'_, To>, request: &Request, core: &Core, facts: &Facts<'_>, now: Now) -> Action {
    let head = &request.head;
    let path = head.path();
    let refuse = |refusal| Action::Refuse(refusal, path.starts_with("/v1/"));
    let (to, parts) = match found {
        Found::Route(to, parts) => (to, parts),
        Found::Method(allow) => return refuse(Refusal::Method(allow)),
        Found::Nothing => return refuse(Refusal::NoSuchPath),
    };
    let part = parts.first().copied().unwrap_or_default();
    match to {
        To::Engine if hops(&head.fields) >= HOPS_MAX => refuse(Refusal::Loop),
        To::Engine => {
            let patience = ClientPatience::read(&head.fields);
            let read = |own: ClientPatience| {
                let read = openai::forwarding(path, &request.body, client_of(facts), facts.aliases)?;
                Ok((own, read))
            };
            match patience.and_then(read) {
                Ok((own, mut forwarding)) => {
                    let asked = &mut forwarding.asked;
                    asked.wait_ms_max = asked.wait_ms_max.min(own.wait_ms_max());
                    Action::Engine(Box::new(forwarding))
                }
                Err(refusal) => refuse(refusal),
            }
        }
        To::Models => Action::Respond(openai::models(core.registry(), facts.aliases, facts.started)),
        To::Model => match openai::model(core.registry(), facts.aliases, part, facts.started) {
            Ok(response) => Action::Respond(response),
            Err(refusal) => refuse(refusal),
        },
        To::Health => respond(
            200,
            &json!({"status": "ok", "version": env!("CARGO_PKG_VERSION"), "service": "orchestratord"}),
        ),
        To::Ready => match core.ready() {
            Ok(()) => respond(200, &json!({"ready": true})),
            Err(reason) => respond(503, &json!({"ready": false, "reason": reason})),
        },
        To::Metrics => Action::Respond(scrape(core, facts, now)),
        To::Events => {
            let since = head.query("since").and_then(|n| n.parse().ok()).unwrap_or(0);
            respond(200, &core.events().to_json(since))
        }
        To::Handoffs => handoffs(core, facts),
        To::PoolReady => match read_notice(&request.body) {
            Ok(notice) => Action::PoolReady(notice),
            Err(refusal) => refuse(refusal),
        },
        To::Register | To::Heartbeat | To::Deregister if !facts.cloud => refuse(Refusal::CloudDisabled),
        // Polled nodes may be looked at in every profile.
        To::Nodes | To::Node | To::Availability if !facts.cloud && core.poller().is_empty() => {
            refuse(Refusal::CloudDisabled)
        }
        To::Nodes | To::Node | To::Register | To::Heartbeat | To::Deregister => {
            nodes(to, part, request, core, now)
        }
        To::Availability => match catalog::availability(core.registry(), head) {
            Ok(response) => Action::Respond(response),
            Err(refusal) => refuse(refusal),
        },
        To::Pools => match Page::of(head) {
            Ok(page) => Action::Respond(pages::pools(core.registry(), page, now)),
            Err(refusal) => refuse(refusal),
        },
        To::Explain => explained(part, request, core, facts, now),
        To::PoolHealth => pool_health(core, part),
        To::Local => drains::route(request, core),
        // Where a directory is watched all engines are this process's own.
        To::Order(order) if order != PoolOrder::Reload && facts.watch_mode.is_some() => {
            drains::route(request, core)
        }
        To::Order(order) => match ordered(order, part, &request.body) {
            Ok(pool) => Action::Order(order, pool),
            Err(refusal) => refuse(refusal),
        },
        To::RegisterWorker => {
            match workers::read(&request.body).and_then(|worker| workers::join(worker, core)) {
                Ok(order) => Action::Worker(order),
                Err(refusal) => refuse(refusal),
            }
        }
        To::RemoveWorker => {
            let replica = parts.get(1).copied().unwrap_or_default();
            let key = drain_routes::replica_key(part, replica).map_err(drains::refusal);
            match key.and_then(|key| workers::leave(key, core)) {
                Ok(order) => Action::Worker(order),
                Err(refusal) => refuse(refusal),
            }
        }
        To::Capabilities => respond(200, &meta::capabilities(core.registry())),
        To::Version => respond(200, &meta::version()),
        To::CreateTask => match tasks::parse(&request.body, client_of(facts), facts.aliases) {
            Ok(task) => Action::CreateTask(Box::new(task)),
            Err(refusal) => refuse(refusal),
        },
        To::TaskEvents => {
            let verbose = matches!(head.query("verbose"), Some("true" | "1" | "yes" | ""));
            Action::TaskEvents(part.to_string(), verbose)
        }
        To::CancelTask => Action::CancelTask(part.to_string()),
        To::Session => Action::ShowSession(part.to_string()),
        To::EndSession => Action::EndSession(part.to_string()),
        To::Page => Action::Respond(dashboard::page()),
        // A stream without a body would never end.
        To::Watch if head.method() == "HEAD" => {
            Action::Respond(Response { content_type: "text/event-stream", ..Response::empty(200) })
        }
        To::Watch => Action::Watch,
        To::OpenApi => Action::Respond(Response::document(OPEN_API)),
    }
}

/// With whom a request shares a turn in the queue: whoever shows the same token from the same address. A
/// token alone is none of one client's where all of an installation have the same one; a token that was not
/// checked counts for nothing, as anybody could make one up for each request.
fn client_of(facts: &Facts<'_>) -> Arc<str> {
    match facts.key {
        Some(key) => Arc::from(format!("{key} {}", facts.peer)),
        None => facts.peer.clone(),
    }
}

fn respond(status: u16, body: &impl serde::Serialize) -> Action {
    Action::Respond(Response::json(status, body))
}

fn nodes(to: To, node: &str, request: &Request, core: &Core, now: Now) -> Action {
    let refuse = |refusal| Action::Refuse(refusal, false);
    let id = || NodeId::new(node).map_err(|why| Refusal::Invalid(why.to_string()));
    match to {
        To::Register => read_body(&request.body).map_or_else(refuse, Action::Register),
        To::Heartbeat => match id().and_then(|node| Ok((node, read_body(&request.body)?))) {
            Ok((node, body)) => Action::Heartbeat(node, body),
            Err(refusal) => refuse(refusal),
        },
        To::Deregister => {
            let incarnation = request.head.query("incarnation").map(str::parse::<u64>).transpose();
            match (id(), incarnation) {
                (Ok(node), Ok(incarnation)) => Action::Deregister(node, incarnation),
                (Err(refusal), _) => refuse(refusal),
                (_, Err(_)) => refuse(Refusal::Invalid("incarnation is not a number".into())),
            }
        }
        To::Node => match id() {
            Ok(node) => match core.registry().node(&node) {
                Some(node) => Action::Respond(pages::node(core.registry(), node, now)),
                None => refuse(Refusal::NotFound(format!("node {node} is not registered"))),
            },
            Err(refusal) => refuse(refusal),
        },
        _ => match Page::of(&request.head) {
            Ok(page) => {
                let status = request.head.query("status");
                Action::Respond(pages::nodes(core.registry(), core.poller(), status, page, now))
            }
            Err(refusal) => refuse(refusal),
        },
    }
}

fn read_notice(body: &[u8]) -> Result<PoolReady, Refusal> {
    if body.len() > NOTICE_BYTES_MAX {
        return Err(Refusal::Invalid(format!("the body is larger than {NOTICE_BYTES_MAX} bytes")));
    }
    serde_json::from_slice(body).map_err(|error| Refusal::Invalid(format!("the body: {error}")))
}

fn read_body<T: DeserializeOwned>(body: &[u8]) -> Result<Box<T>, Refusal> {
    if body.len() > NODE_BODY_BYTES_MAX {
        let (what, limit) = ("bytes in a node's message", NODE_BODY_BYTES_MAX);
        return Err(Refusal::Fenced(Fenced::TooLarge { what, limit }));
    }
    json_place::read(body).map(Box::new).map_err(|error| Refusal::Invalid(format!("the body: {error}")))
}

/// The pool of an order that agents can be given.
fn ordered(order: PoolOrder, pool: &str, body: &[u8]) -> Result<PoolId, Refusal> {
    let pool = PoolId::new(pool).map_err(|why| Refusal::Invalid(why.to_string()))?;
    if body.len() > NOTICE_BYTES_MAX {
        return Err(Refusal::Invalid(format!("the body is larger than {NOTICE_BYTES_MAX} bytes")));
    }
    if order == PoolOrder::Drain {
        drain_routes::deadline_ms(body).map_err(drains::refusal)?;
    }
    Ok(pool)
}

/// `GET /v2/explain`, and below it one request; its id may have slashes.
fn explained(id: &str, request: &Request, core: &Core, facts: &Facts<'_>, now: Now) -> Action {
    let body = match id {
        "" => match limit_of(&request.head, explain::LISTED_DEFAULT, explain::LISTED_MAX) {
            Ok(limit) => facts.explain.newest(limit, now.mono),
            Err(refusal) => return Action::Refuse(refusal, false),
        },
        id => {
            let found = facts.explain.find(id).and_then(|(number, waits)| {
                let ask = core.awaited(number).filter(|_| waits);
                let survey = ask.map(|ask| Survey::new(core.registry(), ask));
                facts.explain.one(number, survey.as_ref(), now.mono)
            });
            let unknown = || Refusal::NotFound(format!("no request {id:?} is remembered"));
            match found.ok_or_else(unknown) {
                Ok(body) => body,
                Err(refusal) => return Action::Refuse(refusal, false),
            }
        }
    };
    Action::Respond(Response { status: 200, content_type: "application/json", fields: Vec::new(), body })
}

/// An unknown pool is not an error here: it is a pool that does not live.
fn pool_health(core: &Core, pool: &str) -> Action {
    let Ok(pool) = PoolId::new(pool) else {
        return Action::Refuse(Refusal::Invalid("the pool in the path is no id".into()), false);
    };
    let members: Vec<&Replica> =
        core.registry().replicas().map(|(_, replica)| replica).filter(|r| r.key.pool == pool).collect();
    let routable = |replica: &&&Replica| replica.obstacle().is_none();
    let trouble = members.iter().find_map(|replica| replica.obstacle()).map(|why| why.to_string());
    let unknown = members.is_empty().then(|| format!("no replica of pool {pool} is known"));
    respond(
        200,
        &json!({
            "pool_id": pool,
            "live": members.iter().any(|replica| replica.ready),
            "ready": members.iter().any(|replica| routable(&replica)),
            "draining": !members.is_empty() && members.iter().all(|replica| replica.draining),
            "engine_version": members.iter().find_map(|replica| replica.engine_version.as_deref()),
            "last_error": unknown.or(trouble),
            "metrics": {
                "queue_depth": core.waiting(),
                "slots_total": members.iter().filter(routable).map(|r| r.slots_total).sum::<u32>(),
                "slots_free": members.iter().filter(routable).map(|r| r.slots_free()).sum::<u32>(),
                "in_flight": members.iter().map(|replica| replica.in_flight).sum::<u32>(),
            },
        }),
    )
}

fn handoffs(core: &Core, facts: &Facts<'_>) -> Action {
    match core.local() {
        Some(local) => respond(200, &local.files_json(facts.watch_mode.unwrap_or("poll"))),
        None => Action::Refuse(
            Refusal::NotFound(
                "this process watches no directory: each node's pool-managerd shows its handoffs".into(),
            ),
            false,
        ),
    }
}

fn scrape(core: &Core, facts: &Facts<'_>, now: Now) -> Response {
    let (counts, registry) = (core.counts(), core.registry());
    let mut scrape = Scrape::default();
    let by_status = [
        NodeStatus::Registering,
        NodeStatus::Online,
        NodeStatus::Draining,
        NodeStatus::Suspect,
        NodeStatus::Offline,
    ]
    .map(|status| {
        let count = registry.nodes().filter(|node| node.status == status).count();
        (format!("status=\"{status}\""), count as f64)
    });
    let samples: Vec<(&str, f64)> = by_status.iter().map(|(label, count)| (label.as_str(), *count)).collect();
    scrape.gauge("orchestratord_nodes", "Nodes by status.", &samples);
    let routable = registry.replicas().filter(|(_, replica)| replica.obstacle().is_none());
    let (replicas, slots, free) = routable.fold((0u64, 0u64, 0u64), |(n, slots, free), (_, replica)| {
        (n + 1, slots + u64::from(replica.slots_total), free + u64::from(replica.slots_free()))
    });
    scrape.gauge("orchestratord_replicas_routable", "Replicas that take work.", &[("", replicas as f64)]);
    scrape.gauge("orchestratord_slots", "Slots of replicas that take work.", &[("", slots as f64)]);
    scrape.gauge("orchestratord_slots_free", "Of these, free.", &[("", free as f64)]);
    scrape.gauge(
        "orchestratord_requests_in_flight",
        "Requests on an engine.",
        &[("", core.in_flight() as f64)],
    );
    scrape.gauge(
        "orchestratord_requests_waiting",
        "Requests that wait for a slot.",
        &[("", core.waiting() as f64)],
    );
    scrape.gauge("orchestratord_client_connections", "Connected clients.", &[("", facts.clients as f64)]);
    scrape.gauge("orchestratord_tasks", "Tasks that are remembered.", &[("", facts.tasks as f64)]);
    scrape.gauge("orchestratord_sessions", "Sessions that are remembered.", &[("", facts.sessions as f64)]);
    let (body_bytes, bodies_refused) = facts.bodies;
    scrape.gauge("orchestratord_request_body_bytes", "Request bodies in memory.", &[("", body_bytes as f64)]);
    scrape.counter(
        "orchestratord_request_bodies_refused_total",
        "Requests refused because their bodies found no room in memory.",
        &[("", bodies_refused)],
    );
    let outcomes =
        [("answered", counts.answered), ("withdrawn", counts.withdrawn), ("broken", counts.broken)];
    let mut labelled: Vec<(String, u64)> =
        outcomes.iter().map(|(outcome, count)| (format!("outcome=\"{outcome}\""), *count)).collect();
    let refused =
        counts.refused.iter().map(|(label, count)| (format!("outcome=\"refused_{label}\""), *count));
    labelled.extend(refused);
    let samples: Vec<(&str, u64)> = labelled.iter().map(|(label, count)| (label.as_str(), *count)).collect();
    scrape.counter("orchestratord_requests_total", "Requests by outcome.", &samples);
    scrape.counter(
        "orchestratord_retries_total",
        "Requests sent to another engine.",
        &[("", counts.retried)],
    );
    scrape.counter(
        "orchestratord_registrations_total",
        "Registrations accepted.",
        &[("", counts.registrations)],
    );
    scrape.counter("orchestratord_heartbeats_total", "Heartbeats accepted.", &[("", counts.heartbeats)]);
    let saves = [("outcome=\"ok\"", counts.saves), ("outcome=\"failed\"", counts.saves_failed)];
    scrape.counter("orchestratord_state_saves_total", "Times the registry was written to disk.", &saves);
    scrape.counter("orchestratord_fenced_total", "Messages of nodes refused.", &[("", counts.fenced)]);
    let polls = POLL_OUTCOMES
        .map(|outcome| (format!("outcome=\"{outcome}\""), counts.polls.get(outcome).copied().unwrap_or(0)));
    let samples: Vec<(&str, u64)> = polls.iter().map(|(label, count)| (label.as_str(), *count)).collect();
    scrape.counter("orchestratord_polls_total", "Polls of agents, by what came of them.", &samples);
    let agents =
        POLL_STATES.map(|state| (format!("state=\"{}\"", state.as_str()), core.poller().count(state) as f64));
    let samples: Vec<(&str, f64)> = agents.iter().map(|(label, count)| (label.as_str(), *count)).collect();
    scrape.gauge("orchestratord_polled_agents", "Agents to be polled, by state.", &samples);
    scrape.histogram("orchestratord_wait_seconds", "From ask to dispatch.", &counts.waited);
    scrape.histogram(
        "orchestratord_first_byte_seconds",
        "From dispatch to the answer's head.",
        &counts.first_byte,
    );
    scrape.histogram("orchestratord_request_seconds", "From ask to the answer's end.", &counts.duration);
    meters::scrape(core, facts.token_gaps, &mut scrape);
    facts.guard.scrape("orchestratord", &mut scrape);
    facts.lag.scrape("orchestratord", now.mono, &mut scrape);
    if let Some(tls) = &facts.tls {
        tls.scrape("orchestratord", &mut scrape);
    }
    if let Some(bytes) = facts.resident_bytes {
        scrape.gauge("process_resident_memory_bytes", "Resident memory.", &[("", bytes as f64)]);
    }
    let body = scrape.finish().into_bytes();
    Response { status: 200, content_type: metrics::CONTENT_TYPE, fields: Vec::new(), body }
}
