//! Drains and the states of this machine's engines, in the HOME profile: what the agent of a node answers to
//! operators, answered here where no agent runs. Elsewhere drains are kept by the agents of the nodes. Pure.

use serde_json::json;

use crate::http::server::{Request, Response};
use crate::replicas::Registry;
use crate::replicas::drain_routes::{self, DrainOrder, DrainRefused};

use super::api::Action;
use super::core::Core;
use super::refusal::Refusal;

/// Decides about a request below `/v2`.
#[must_use]
pub fn route(request: &Request, core: &Core) -> Action {
    let refuse = |refusal| Action::Refuse(refusal, false);
    let Some((node, replicas)) = core.local_node().zip(core.local()) else {
        return refuse(Refusal::NotFound(
            "this process has no engines of its own: each node's pool-managerd knows and drains its engines"
                .into(),
        ));
    };
    let path = request.head.path().trim_start_matches("/v2").trim_start_matches('/');
    let segments: Vec<&str> = path.split('/').collect();
    match segments.as_slice() {
        ["drains"] => respond(&drain_routes::list(replicas, node)),
        ["pools", pool, "status"] => match drain_routes::pool_id(pool) {
            Ok(pool) => match replicas.pool_status(&pool) {
                Some(status) => respond(&json!(status)),
                None => refuse(Refusal::NotFound(format!("pool {pool} not found"))),
            },
            Err(refused) => refuse(refusal(refused)),
        },
        ["pools", pool, "replicas", replica, "status"] => match drain_routes::replica_key(pool, replica) {
            Ok(key) => match replicas.replica_status(&key) {
                Some(status) => respond(&json!(status)),
                None => refuse(Refusal::NotFound(format!("replica {key} not found"))),
            },
            Err(refused) => refuse(refusal(refused)),
        },
        segments => {
            let method = request.head.method();
            match drain_routes::read(segments, method, &request.body, replicas, |_| false) {
                Some(Ok(DrainOrder::Show(scope))) => respond(&drain_routes::progress(replicas, &scope)),
                Some(Ok(order)) => Action::Drain(order),
                Some(Err(refused)) => refuse(refusal(refused)),
                None => refuse(Refusal::NoSuchPath),
            }
        }
    }
}

/// The answer to an order that was carried out.
#[must_use]
pub fn done(order: &DrainOrder, replicas: Option<&Registry>) -> Response {
    let (status, scope) = match order {
        DrainOrder::Drain(scope, _) => (202, scope),
        DrainOrder::Resume(scope) | DrainOrder::Show(scope) => (200, scope),
    };
    Response::json(status, &replicas.map(|replicas| drain_routes::progress(replicas, scope)))
}

fn respond(body: &serde_json::Value) -> Action {
    Action::Respond(Response::json(200, body))
}

/// Why an order makes no sense, in the control plane's words.
#[must_use]
pub fn refusal(refused: DrainRefused) -> Refusal {
    match refused {
        DrainRefused::Invalid(why) => Refusal::Invalid(why),
        DrainRefused::NotFound(why) => Refusal::NotFound(why),
        DrainRefused::TooMany(why) => Refusal::Overloaded(why),
        DrainRefused::Method(allow) => Refusal::Method(allow.into()),
    }
}
