//! What operators and tools ask of the agent: drains, and callbacks. A request becomes an answer or an
//! [`Operation`] for the daemon to carry out. Pure.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::{Value, json};

use crate::http::server::{Request, Response};
use crate::metrics::{Histogram, Scrape};
use crate::replicas::drain_routes::{self, DrainOrder, DrainRefused};
use crate::replicas::{DrainChange, DrainEvent};
use crate::wire::drain::Scope;
use crate::wire::id::PoolId;
use crate::wire::url::BaseUrl;

use super::api::{error, not_allowed, not_found};
use super::callbacks::NotRegistered;
use super::core::Core;

/// When somebody who found a full table should come back, in milliseconds.
const TABLE_FULL_RETRY_MS: u64 = 60_000;
/// Longest reference of a model, in bytes: paths and signed URLs are shorter.
const REFERENCE_BYTES_MAX: usize = 4_096;
/// Longest that the answer to a preload waits for the engine, in milliseconds: an engine with a model that is
/// here loads in minutes. Beyond it, and where the caller wants that, it is told how far it has come.
const PRELOAD_WAIT_MS_MAX: u64 = 600_000;

/// Something for the daemon to do before it answers.
#[derive(Debug, PartialEq, Eq)]
pub enum Operation {
    /// No new work for a scope; what still runs after so many milliseconds is cut.
    Drain(Scope, Option<u64>),
    /// Work again for a scope.
    Resume(Scope),
    /// Tell a URL of changes in a pool, or in all.
    Register(BaseUrl, Option<PoolId>),
    /// Tell it no more.
    Unregister(BaseUrl, Option<PoolId>),
    /// Hand something to the provisioner that keeps a pool, or ask it.
    Order(PoolOrder),
}

/// What is asked of the provisioner that keeps a pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PoolOrder {
    /// How far it has come.
    Status(PoolId),
    /// Its engines get another model, by this reference.
    Reload(PoolId, String),
    /// An engine that was prepared is started in it; the answer waits so long for it, in milliseconds.
    Preload(PoolId, Value, u64),
}

impl PoolOrder {
    /// The pool.
    #[must_use]
    pub fn pool(&self) -> &PoolId {
        match self {
            PoolOrder::Status(pool) | PoolOrder::Reload(pool, _) | PoolOrder::Preload(pool, ..) => pool,
        }
    }
}

/// What to do for a request below `/v2`; `None` where the path is none of these.
#[must_use]
pub fn route(segments: &[&str], request: &Request, core: &Core) -> Option<Result<Operation, Response>> {
    let method = match request.head.method() {
        "HEAD" => "GET",
        method => method,
    };
    Some(match segments {
        ["drains"] if method == "GET" => {
            Err(Response::json(200, &drain_routes::list(core.replicas(), core.node_id())))
        }
        ["callbacks"] if method == "GET" => Err(Response::json(200, &core.callbacks().to_json())),
        ["drains" | "callbacks"] => Err(not_allowed("GET")),
        ["callbacks", "register"] => match method {
            "POST" => register(request),
            "DELETE" => unregister_query(request),
            _ => Err(not_allowed("POST, DELETE")),
        },
        ["callbacks", "unregister"] if method == "POST" => unregister(request),
        ["callbacks", "unregister"] => Err(not_allowed("POST")),
        ["pools", pool, "replicas", replica, "status"] => drain_routes::replica_key(pool, replica)
            .map_err(refusal)
            .and_then(|key| match (method, core.replicas().replica_status(&key)) {
                ("GET" | "POST", Some(status)) => Err(Response::json(200, &status)),
                ("GET" | "POST", None) => Err(not_found(&format!("replica {key} not found"))),
                _ => Err(not_allowed("GET, POST")),
            }),
        ["pools", pool, verb @ ("preload" | "reload")] => match method {
            "POST" => {
                let wait_ms = if *verb == "preload" { wait_ms(request.head.fields.get("prefer")) } else { 0 };
                pool_id(pool).and_then(|pool| order(pool, &request.body, wait_ms)).map(Operation::Order)
            }
            _ => Err(not_allowed("POST")),
        },
        _ => {
            let (replicas, is_expected) = (core.replicas(), |pool: &PoolId| core.pool_status(pool).is_some());
            match drain_routes::read(segments, request.head.method(), &request.body, replicas, is_expected)? {
                Ok(DrainOrder::Show(scope)) => Err(progress(200, core, &scope)),
                Ok(DrainOrder::Drain(scope, deadline_ms)) => Ok(Operation::Drain(scope, deadline_ms)),
                Ok(DrainOrder::Resume(scope)) => Ok(Operation::Resume(scope)),
                Err(refused) => Err(refusal(refused)),
            }
        }
    })
}

/// The answer to an operation that was carried out on a scope.
#[must_use]
pub fn progress(status: u16, core: &Core, scope: &Scope) -> Response {
    Response::json(status, &drain_routes::progress(core.replicas(), scope))
}

/// The answer to a registration.
#[must_use]
pub fn registered(url: &BaseUrl, pool: Option<&PoolId>, outcome: &Result<(), NotRegistered>) -> Response {
    match outcome {
        Ok(()) => Response::json(201, &json!({"registered": true, "callback_url": url, "pool_id": pool})),
        Err(why @ NotRegistered::Url(_)) => bad(&why.to_string()),
        Err(why @ NotRegistered::TooMany) => {
            error(503, "TOO_MANY_CALLBACKS", &why.to_string(), Some(TABLE_FULL_RETRY_MS))
        }
        Err(why @ NotRegistered::Disabled) => error(503, "CALLBACKS_DISABLED", &why.to_string(), None),
    }
}

/// The answer to the removal of so many callbacks.
#[must_use]
pub fn unregistered(url: &BaseUrl, removed: usize) -> Response {
    if removed == 0 {
        not_found(&format!("no callback is registered for {url}"))
    } else {
        Response::json(200, &json!({"removed": removed}))
    }
}

/// What drains did so far, by scope and event.
#[derive(Debug, Default)]
pub struct DrainTally {
    /// At most five scopes times six events.
    events: BTreeMap<(&'static str, &'static str), u64>,
    took: Histogram,
}

impl DrainTally {
    /// Counts a change.
    pub fn note(&mut self, change: &DrainChange) {
        *self.events.entry((change.scope.kind(), change.what.as_str())).or_default() += 1;
        if let DrainEvent::Drained { took_ns, .. } = change.what {
            self.took.observe_ns(took_ns);
        }
    }
}

/// Writes the metrics of drains and callbacks.
pub fn scrape(core: &Core, scrape: &mut Scrape) {
    let tally = core.drain_tally();
    let labels: Vec<(String, u64)> = tally
        .events
        .iter()
        .map(|((scope, event), count)| (format!("scope=\"{scope}\",outcome=\"{event}\""), *count))
        .collect();
    let samples: Vec<(&str, u64)> = labels.iter().map(|(labels, count)| (labels.as_str(), *count)).collect();
    scrape.counter("pool_managerd_drain_events_total", "What became of drains.", &samples);
    scrape.histogram(
        "pool_managerd_drain_duration_seconds",
        "From a drain's begin until nothing ran any more.",
        &tally.took,
    );
    scrape.gauge(
        "pool_managerd_drains",
        "Drains that are in force.",
        &[("", core.replicas().drains().count() as f64)],
    );
    let (callbacks, waiting) = core.callbacks().sizes();
    let counts = core.callbacks().counts();
    scrape.gauge("pool_managerd_callbacks", "Callbacks that are registered.", &[("", callbacks as f64)]);
    scrape.gauge(
        "pool_managerd_callback_notices_waiting",
        "Notices that no receiver has confirmed yet.",
        &[("", waiting as f64)],
    );
    scrape.counter(
        "pool_managerd_callback_deliveries_total",
        "Deliveries to callbacks, by outcome: attempts that worked or failed, notices given up or without room.",
        &[
            ("outcome=\"delivered\"", counts.delivered),
            ("outcome=\"failed\"", counts.failed),
            ("outcome=\"given_up\"", counts.given_up),
            ("outcome=\"dropped\"", counts.dropped),
        ],
    );
}

/// The answer to an order about a drain that makes no sense.
fn refusal(refused: DrainRefused) -> Response {
    match refused {
        DrainRefused::Invalid(why) => bad(&why),
        DrainRefused::NotFound(why) => not_found(&why),
        DrainRefused::TooMany(why) => error(503, "TOO_MANY_DRAINS", &why, Some(TABLE_FULL_RETRY_MS)),
        DrainRefused::Method(allow) => not_allowed(allow),
    }
}

/// Reads `{"new_model_ref": string}` or `{"prepared": {...}}`.
fn order(pool: PoolId, body: &[u8], wait_ms: u64) -> Result<PoolOrder, Response> {
    let shape =
        "the body must be {\"new_model_ref\": REFERENCE} or {\"prepared\": {\"binary_path\": PATH, ...}}";
    let body: Value = serde_json::from_slice(body).map_err(|_| bad(shape))?;
    match (&body["new_model_ref"], &body["prepared"]) {
        (Value::String(model), Value::Null) if is_text(model) => Ok(PoolOrder::Reload(pool, model.clone())),
        (Value::Null, Value::Object(prepared)) => {
            let mut prepared = prepared.clone();
            for (name, fallback) in [("pool_id", pool.as_str()), ("replica_id", "r0")] {
                prepared.entry(name).or_insert_with(|| fallback.into());
            }
            if prepared["pool_id"].as_str() != Some(pool.as_str()) {
                return Err(bad(&format!("`pool_id` must be that of the path, {pool}")));
            }
            if !prepared.get("binary_path").and_then(Value::as_str).is_some_and(is_text) {
                return Err(bad("`prepared.binary_path` is missing"));
            }
            Ok(PoolOrder::Preload(pool, Value::Object(prepared), wait_ms))
        }
        _ => Err(bad(shape)),
    }
}

/// How long a caller wants to wait for a preload, by the field `Prefer`: `respond-async`, or `wait=SECONDS`.
fn wait_ms(prefer: Option<&str>) -> u64 {
    let mut wait_ms = PRELOAD_WAIT_MS_MAX;
    for preference in prefer.unwrap_or_default().split([',', ';']).map(str::trim) {
        let seconds = preference.strip_prefix("wait=").and_then(|seconds| seconds.parse::<u64>().ok());
        if preference.eq_ignore_ascii_case("respond-async") {
            wait_ms = 0;
        } else if let Some(seconds) = seconds {
            wait_ms = wait_ms.min(seconds.saturating_mul(1_000));
        }
    }
    wait_ms
}

/// Whether it can be a reference or a path.
fn is_text(text: &str) -> bool {
    (1..=REFERENCE_BYTES_MAX).contains(&text.len()) && !text.chars().any(char::is_control)
}

fn register(request: &Request) -> Result<Operation, Response> {
    callback(&request.body).map(|(url, pool)| Operation::Register(url, pool))
}

fn unregister(request: &Request) -> Result<Operation, Response> {
    callback(&request.body).map(|(url, pool)| Operation::Unregister(url, pool))
}

fn unregister_query(request: &Request) -> Result<Operation, Response> {
    let parameter = |name| request.head.query(name).map(percent_decoded);
    let url = parameter("url").or_else(|| parameter("callback_url"));
    let url = url.ok_or_else(|| bad("`url` is missing in the query"))?;
    let pool = parameter("pool_id").map(|pool| pool_id(&pool)).transpose()?;
    Ok(Operation::Unregister(callback_url(&url)?, pool))
}

/// Reads `{"callback_url"|"url": string, "pool_id"?: string}`.
fn callback(body: &[u8]) -> Result<(BaseUrl, Option<PoolId>), Response> {
    #[derive(Deserialize)]
    struct Body {
        callback_url: Option<Value>,
        url: Option<Value>,
        pool_id: Option<Value>,
    }
    let body: Body = serde_json::from_slice(body).map_err(|_| {
        bad("the body must be a JSON object such as {\"callback_url\": \"http://HOST:PORT/PATH\"}")
    })?;
    let url = body.callback_url.or(body.url).ok_or_else(|| bad("`callback_url` is missing"))?;
    let url = url.as_str().ok_or_else(|| bad("`callback_url` must be a string"))?;
    let pool = match &body.pool_id {
        None => None,
        Some(Value::String(pool)) => Some(pool_id(pool)?),
        Some(_) => return Err(bad("`pool_id` must be a string")),
    };
    Ok((callback_url(url)?, pool))
}

fn callback_url(text: &str) -> Result<BaseUrl, Response> {
    BaseUrl::new(text).map_err(|why| bad(&format!("`callback_url`: {why}")))
}

fn pool_id(text: &str) -> Result<PoolId, Response> {
    drain_routes::pool_id(text).map_err(refusal)
}

fn bad(message: &str) -> Response {
    error(400, "INVALID_PARAMS", message, None)
}

/// A query parameter's value with its escapes undone; what is no escape stays as it is.
fn percent_decoded(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut rest = bytes;
    while let Some((first, tail)) = rest.split_first() {
        let hex = |at: usize| tail.get(at).and_then(|b| char::from(*b).to_digit(16));
        match (first, hex(0), hex(1)) {
            (b'%', Some(high), Some(low)) => {
                out.push(u8::try_from(high * 16 + low).unwrap_or(b'?'));
                rest = &tail[2..];
            }
            _ => {
                out.push(*first);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(response: &Response) -> (u16, String) {
        (response.status, String::from_utf8_lossy(&response.body).into_owned())
    }

    #[test]
    fn a_caller_waits_as_long_as_it_prefers() {
        for (prefer, expected_ms) in [
            (None, PRELOAD_WAIT_MS_MAX),
            (Some("handling=lenient"), PRELOAD_WAIT_MS_MAX),
            (Some("wait=x"), PRELOAD_WAIT_MS_MAX),
            (Some("respond-async"), 0),
            (Some("Respond-Async, wait=7"), 0),
            (Some("handling=lenient; wait=7"), 7_000),
            (Some("wait=99999999999999999999999"), PRELOAD_WAIT_MS_MAX),
            (Some("wait=999999999999"), PRELOAD_WAIT_MS_MAX),
        ] {
            assert_eq!(wait_ms(prefer), expected_ms, "{prefer:?}");
        }
    }

    #[test]
    fn callbacks_are_read_and_bad_fields_named() {
        let (url, pool) =
            callback(br#"{"url":"http://h:1/x","pool_id":"p"}"#).map_err(|r| message(&r)).expect("good");
        assert_eq!((url.to_string().as_str(), pool.expect("a pool").as_str()), ("http://h:1/x", "p"));
        for (wrong, names) in [
            ("", "JSON object"),
            ("{}", "`callback_url` is missing"),
            (r#"{"callback_url":7}"#, "`callback_url` must be"),
            (r#"{"callback_url":"h:1"}"#, "`callback_url`"),
            (r#"{"callback_url":"http://u:p@h:1"}"#, "`callback_url`"),
            (r#"{"callback_url":"http://h:1","pool_id":"a/b"}"#, "`pool_id`"),
            (r#"{"callback_url":"http://h:1","pool_id":1}"#, "`pool_id`"),
        ] {
            let (status, text) = message(&callback(wrong.as_bytes()).expect_err(wrong));
            assert!(status == 400 && text.contains(names), "{wrong}: {text}");
        }
    }

    #[test]
    fn escapes_are_undone() {
        assert_eq!(percent_decoded("http%3A%2F%2Fh%3a1%2fx"), "http://h:1/x");
        assert_eq!(percent_decoded("100%"), "100%");
        assert_eq!(percent_decoded("%zz%4"), "%zz%4");
    }
}
