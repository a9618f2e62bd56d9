//! Every refusal of the control plane in one table: what a client is told, and how.
//!
//! A refusal knows its status, its code in either dialect, whether trying again makes sense and when.
//! The two renderings are OpenAI's error object under `/v1/` and the flat envelope everywhere else.

use serde_json::json;

use crate::http::server::Response;
use crate::service::auth::Denied;
use crate::service::guard::Barred;

use super::service_registry::Fenced;

/// Pause that a client is advised to make when nothing better is known, in milliseconds.
pub const RETRY_MS_DEFAULT: u64 = 1_000;
/// Longest `Retry-After`, in seconds: clients ignore much longer ones.
const RETRY_AFTER_SECONDS_MAX: u64 = 60;

/// Models that a refusal names: enough to see a typing error, few enough to read.
const KNOWN_NAMED_MAX: usize = 20;

/// Why a request is not served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// It has come through too many control planes: it goes round in a circle.
    Loop,
    /// The request makes no sense; the text says what is wrong.
    Invalid(String),
    /// Nothing is at this path.
    NoSuchPath,
    /// Something is at this path, for other methods.
    Method(String),
    /// What the path names does not exist.
    NotFound(String),
    /// The guard does not let it pass: its token, its `Host`, or the page that made it.
    Barred(Barred),
    /// Nobody serves the model.
    UnknownModel {
        /// As asked for.
        model: String,
        /// What there is.
        known: Vec<String>,
    },
    /// No replica passes the request's pins.
    UnknownPin,
    /// No replica takes prompt and answer of this length.
    ContextTooLong {
        /// What the request needs, in tokens.
        wanted_tokens: u64,
        /// The longest that there is.
        longest_tokens: u64,
    },
    /// The deadline cannot be met, and why.
    Deadline(String),
    /// As many requests wait as may.
    QueueFull {
        /// The limit.
        capacity: usize,
        /// When a place is likely, in milliseconds.
        retry_ms: u64,
    },
    /// It waited as long as it may.
    Waited {
        /// What it waited for.
        reason: String,
        /// Whether replicas that fit were full, rather than not there.
        full: bool,
        /// When a slot is likely, in milliseconds.
        retry_ms: u64,
    },
    /// It waited as long as it may, or need not wait, for replicas that are known and take no work.
    Unready {
        /// Why they do not.
        reason: String,
        /// The request wants a certain node.
        node: bool,
        /// When a slot is likely, in milliseconds.
        retry_ms: u64,
    },
    /// The engines that were tried failed before they answered.
    EngineFailed {
        /// The last failure.
        reason: String,
        /// It was too slow, rather than broken.
        timeout: bool,
        /// When to try again if it was broken, in milliseconds.
        retry_ms: u64,
    },
    /// The time that the request may take is over, and no answer has begun.
    OutOfTime,
    /// This process is at a limit of its own; the text says which.
    Overloaded(String),
    /// This process is about to end.
    ShuttingDown,
    /// The node routes exist in the CLOUD profile only.
    CloudDisabled,
    /// A node's message was refused.
    Fenced(Fenced),
    /// A node's message came without a certificate that names the node; the text says what came instead.
    Certificate(String),
    /// What the path names has existed.
    Gone(String),
    /// Something with this name exists already.
    Conflict(String),
    /// Too many of something that a client creates.
    TooMany(String),
}

/// A row of the table.
struct Row {
    status: u16,
    code: &'static str,
    /// `type` and `code` in OpenAI's dialect.
    openai: (&'static str, &'static str),
    retry_ms: Option<u64>,
    label: &'static str,
}

impl Refusal {
    fn row(&self) -> Row {
        let row = |status, code, openai, retry_ms, label| Row { status, code, openai, retry_ms, label };
        const BAD: (&str, &str) = ("invalid_request_error", "invalid_request");
        const AWAY: (&str, &str) = ("service_unavailable", "service_unavailable");
        let soon = Some(RETRY_MS_DEFAULT);
        match self {
            Refusal::Loop => row(508, "LOOP", ("invalid_request_error", "loop"), None, "loop"),
            Refusal::Invalid(_) => row(400, "INVALID_PARAMS", BAD, None, "invalid"),
            Refusal::NoSuchPath => {
                row(404, "NOT_FOUND", ("invalid_request_error", "unknown_url"), None, "not_found")
            }
            Refusal::Method(_) => row(
                405,
                "METHOD_NOT_ALLOWED",
                ("invalid_request_error", "method_not_allowed"),
                None,
                "method",
            ),
            Refusal::NotFound(_) => {
                row(404, "NOT_FOUND", ("invalid_request_error", "not_found"), None, "not_found")
            }
            Refusal::Barred(Barred::Denied(Denied::Missing | Denied::Bad(_))) => {
                row(401, "UNAUTHORIZED", ("authentication_error", "invalid_api_key"), None, "denied")
            }
            Refusal::Barred(Barred::Denied(Denied::Scope)) => {
                row(403, "WRONG_SCOPE", ("permission_error", "wrong_scope"), None, "denied")
            }
            Refusal::Barred(Barred::Host) => {
                row(421, "FOREIGN_HOST", ("invalid_request_error", "foreign_host"), None, "denied")
            }
            Refusal::Barred(Barred::Origin) => {
                row(403, "FOREIGN_ORIGIN", ("permission_error", "foreign_origin"), None, "denied")
            }
            Refusal::UnknownModel { .. } => row(
                404,
                "MODEL_NOT_AVAILABLE",
                ("invalid_request_error", "model_not_found"),
                None,
                "unknown_model",
            ),
            Refusal::UnknownPin => row(400, "INVALID_PARAMS", BAD, None, "unknown_pin"),
            Refusal::ContextTooLong { .. } => row(
                400,
                "INVALID_PARAMS",
                ("invalid_request_error", "context_length_exceeded"),
                None,
                "context_too_long",
            ),
            Refusal::Deadline(_) => row(400, "DEADLINE_UNMET", BAD, None, "deadline"),
            Refusal::QueueFull { retry_ms, .. } => row(
                429,
                "ADMISSION_REJECT",
                ("rate_limit_error", "queue_full"),
                Some(*retry_ms),
                "queue_full",
            ),
            Refusal::Waited { full: true, retry_ms, .. } => row(
                503,
                "REPLICA_EXHAUSTED",
                ("service_unavailable", "slots_busy"),
                Some(*retry_ms),
                "waited_full",
            ),
            Refusal::Waited { full: false, retry_ms, .. } => row(
                503,
                "POOL_UNAVAILABLE",
                ("service_unavailable", "no_replica"),
                Some(*retry_ms),
                "waited_none",
            ),
            Refusal::Unready { node: false, retry_ms, .. } => row(
                503,
                "POOL_UNREADY",
                ("service_unavailable", "no_replica"),
                Some(*retry_ms),
                "waited_unready",
            ),
            Refusal::Unready { node: true, retry_ms, .. } => row(
                503,
                "NODE_UNAVAILABLE",
                ("service_unavailable", "no_replica"),
                Some(*retry_ms),
                "waited_node",
            ),
            Refusal::EngineFailed { timeout: false, retry_ms, .. } => row(
                502,
                "POOL_UNAVAILABLE",
                ("upstream_error", "engine_failed"),
                Some(*retry_ms),
                "engine_failed",
            ),
            Refusal::EngineFailed { timeout: true, .. } => {
                row(504, "DECODE_TIMEOUT", ("upstream_error", "engine_timeout"), None, "engine_timeout")
            }
            Refusal::OutOfTime => {
                row(504, "DEADLINE_UNMET", ("timeout", "deadline_exceeded"), None, "out_of_time")
            }
            Refusal::Overloaded(_) => row(503, "POOL_UNAVAILABLE", AWAY, soon, "overloaded"),
            Refusal::ShuttingDown => row(503, "SHUTTING_DOWN", AWAY, soon, "shutting_down"),
            Refusal::CloudDisabled => row(503, "CLOUD_DISABLED", AWAY, None, "cloud_disabled"),
            Refusal::Fenced(Fenced::UnknownNode) => row(404, "NODE_UNKNOWN", BAD, None, "fenced"),
            Refusal::Fenced(Fenced::TooMany { .. }) => row(503, "TOO_MANY", AWAY, soon, "fenced"),
            Refusal::Fenced(Fenced::Address(_)) => row(400, "INVALID_PARAMS", BAD, None, "fenced"),
            Refusal::Fenced(Fenced::TooLarge { .. }) => row(413, "TOO_LARGE", BAD, None, "fenced"),
            Refusal::Fenced(_) => row(409, "NODE_CONFLICT", BAD, None, "fenced"),
            Refusal::Certificate(_) => row(403, "CERTIFICATE_MISMATCH", BAD, None, "denied"),
            Refusal::Gone(_) => row(410, "GONE", ("invalid_request_error", "gone"), None, "gone"),
            Refusal::Conflict(_) => row(409, "CONFLICT", BAD, None, "conflict"),
            Refusal::TooMany(_) => {
                row(429, "ADMISSION_REJECT", ("rate_limit_error", "too_many"), soon, "too_many")
            }
        }
    }

    /// HTTP status.
    #[must_use]
    pub fn status(&self) -> u16 {
        self.row().status
    }

    /// Code in the flat envelope, and in task events.
    #[must_use]
    pub fn code(&self) -> &'static str {
        self.row().code
    }

    /// Label in the metrics: one of a fixed set.
    #[must_use]
    pub fn label(&self) -> &'static str {
        self.row().label
    }

    /// When to try again, if that makes sense, in milliseconds.
    #[must_use]
    pub fn retry_ms(&self) -> Option<u64> {
        self.row().retry_ms
    }

    /// What the client is told.
    #[must_use]
    pub fn message(&self) -> String {
        match self {
            Refusal::Invalid(what)
            | Refusal::NotFound(what)
            | Refusal::Certificate(what)
            | Refusal::Gone(what)
            | Refusal::Deadline(what)
            | Refusal::Conflict(what)
            | Refusal::TooMany(what) => what.clone(),
            Refusal::Loop => {
                "the request has passed two control planes already: one of them takes the other, or itself, for an engine"
                    .into()
            }
            Refusal::NoSuchPath => "there is nothing at this path".into(),
            Refusal::Method(allow) => format!("this path serves {allow}"),
            Refusal::Barred(barred) => barred.message("ORCHESTRATORD"),
            Refusal::UnknownModel { model, known } if known.is_empty() => {
                format!("no engine serves the model {model:?}, or any other at the moment")
            }
            Refusal::UnknownModel { model, known } => {
                let named = &known[..known.len().min(KNOWN_NAMED_MAX)];
                let more = match known.len() - named.len() {
                    0 => String::new(),
                    more => format!(" and {more} more"),
                };
                format!("no engine serves the model {model:?}; available: {}{more}", named.join(", "))
            }
            Refusal::UnknownPin => "no replica matches the pool, node or device that the request asks for".into(),
            Refusal::ContextTooLong { wanted_tokens, longest_tokens } => format!(
                "the request needs a context of {wanted_tokens} tokens; the longest that serves it has {longest_tokens}"
            ),
            Refusal::QueueFull { capacity, .. } => format!("{capacity} requests are waiting already"),
            Refusal::Waited { reason, .. } => format!("no slot became free in time: {reason}"),
            Refusal::Unready { reason, .. } => format!("no engine took it in time: {reason}"),
            Refusal::EngineFailed { reason, .. } => format!("the engine failed before it answered: {reason}"),
            Refusal::OutOfTime => "the time that the request may take is over".into(),
            Refusal::Overloaded(reason) => format!("this control plane is at its limit: {reason}"),
            Refusal::ShuttingDown => "this control plane is shutting down".into(),
            Refusal::CloudDisabled => {
                "nodes are served in the CLOUD profile only: start orchestratord with ORCHESTRATORD_CLOUD_PROFILE=true"
                    .into()
            }
            Refusal::Fenced(fenced) => fenced.to_string(),
        }
    }

    /// The answer. `openai`: in OpenAI's dialect.
    #[must_use]
    pub fn response(&self, openai: bool) -> Response {
        let mut row = self.row();
        if let (Refusal::UnknownModel { .. }, false) = (self, openai) {
            // Tasks say what is missing, not where they looked: the model may come with another node.
            row.status = 503;
        }
        let (message, retriable) = (self.message(), row.retry_ms.is_some());
        let mut response = if openai {
            let (kind, code) = row.openai;
            let error = json!({"message": message, "type": kind, "param": null, "code": code});
            let retry = if retriable { "true" } else { "false" };
            Response::json(row.status, &json!({"error": error})).with("x-should-retry", retry)
        } else {
            let mut body =
                json!({"code": row.code, "message": message, "error": message, "retriable": retriable});
            match self {
                Refusal::Barred(barred) => {
                    barred.number().into_iter().for_each(|code| body["code"] = json!(code))
                }
                Refusal::QueueFull { .. } => body["policy_label"] = json!("reject"),
                _ => {}
            }
            if let Some(retry_ms) = row.retry_ms {
                body["retry_after_ms"] = json!(retry_ms);
            }
            Response::json(row.status, &body)
        };
        if let Some(retry_ms) = row.retry_ms {
            let seconds = retry_ms.div_ceil(1000).clamp(1, RETRY_AFTER_SECONDS_MAX);
            // OpenAI's clients read `Retry-After-Ms` first: whole seconds would bring all back together.
            response = response
                .with("Retry-After", seconds.to_string())
                .with("Retry-After-Ms", retry_ms.min(RETRY_AFTER_SECONDS_MAX * 1000).to_string())
                .with("X-Backoff-Ms", retry_ms.to_string());
        }
        match self {
            Refusal::Method(allow) => response.with("Allow", allow.clone()),
            Refusal::Barred(Barred::Denied(denied)) => response.with("WWW-Authenticate", denied.challenge()),
            _ => response,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_can_be_tried_again_says_when_in_every_way() {
        let full = Refusal::QueueFull { capacity: 5, retry_ms: 2_500 };
        for openai in [true, false] {
            let response = full.response(openai);
            let field = |name| response.fields.iter().find(|(n, _)| *n == name).map(|(_, v)| v.as_str());
            assert_eq!(
                (response.status, field("Retry-After"), field("X-Backoff-Ms")),
                (429, Some("3"), Some("2500"))
            );
            assert_eq!(field("Retry-After-Ms"), Some("2500"));
        }
        let body: serde_json::Value = serde_json::from_slice(&full.response(false).body).expect("JSON");
        assert_eq!((body["retry_after_ms"].as_u64(), body["retriable"].as_bool()), (Some(2500), Some(true)));
    }

    #[test]
    fn an_unknown_model_names_what_is_there() {
        let refusal = Refusal::UnknownModel { model: "x".into(), known: vec!["a".into(), "b".into()] };
        let body: serde_json::Value = serde_json::from_slice(&refusal.response(true).body).expect("JSON");
        assert_eq!(body["error"]["code"], "model_not_found");
        assert!(body["error"]["message"].as_str().is_some_and(|m| m.ends_with("available: a, b")));
        let known = (0..25).map(|n| format!("m{n}")).collect();
        let message = Refusal::UnknownModel { model: "x".into(), known }.message();
        assert!(message.ends_with(", m19 and 5 more"), "{message}");
    }
}
