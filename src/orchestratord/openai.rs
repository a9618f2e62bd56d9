//! The OpenAI front door: what is read of a request before its bytes go to an engine unchanged. Pure.

use std::borrow::Cow;
use std::sync::Arc;

use serde::Deserialize;
use serde_json::json;

use crate::http::server::Response;

use super::admission::Priority;
use super::core::Asked;
use super::placement::Ask;
use super::refusal::Refusal;
use super::service_registry::ServiceRegistry;

/// Paths whose requests go to engines.
pub const ENGINE_PATHS: [&str; 3] = ["/v1/chat/completions", "/v1/completions", "/v1/embeddings"];
/// Most answers that one request may ask for.
const ANSWERS_MAX: u32 = 128;

/// The fields of a body that placement needs. The body is validated as JSON in the same pass, and
/// nothing else of it is kept.
#[derive(Deserialize)]
struct Peek<'a> {
    #[serde(borrow, default)]
    model: Option<Cow<'a, str>>,
    #[serde(default)]
    n: Option<u32>,
}

/// What a request asks of placement. `client` names whoever shares a turn in the queue.
///
/// # Errors
/// [`Refusal::Invalid`] for a body that is no JSON object with fields of the expected types.
pub fn asked(body: &[u8], client: Arc<str>) -> Result<Asked, Refusal> {
    // A list would be read as the fields in order.
    if !body.trim_ascii_start().starts_with(b"{") {
        return Err(Refusal::Invalid("the body is not a JSON object".into()));
    }
    let peek: Peek = serde_json::from_slice(body)
        .map_err(|error| Refusal::Invalid(format!("the body is not a usable JSON object: {error}")))?;
    let slots = peek.n.unwrap_or(1);
    if !(1..=ANSWERS_MAX).contains(&slots) {
        return Err(Refusal::Invalid(format!("n must be from 1 to {ANSWERS_MAX}")));
    }
    let model = peek.model.map(Cow::into_owned).filter(|model| !model.is_empty());
    let ask = Ask { model, slots, ..Ask::default() };
    let priority = Priority::Interactive;
    Ok(Asked { ask, priority, client, wait_ms_max: u64::MAX, is_deadline: false })
}

/// `GET /v1/models`: every known model, busy ones included.
#[must_use]
pub fn models(registry: &ServiceRegistry, created: u64) -> Response {
    let names = registry.models().into_iter().map(|model| model.name);
    let data: Vec<_> = names.map(|name| model_object(&name, created)).collect();
    Response::json(200, &json!({"object": "list", "data": data}))
}

/// `GET /v1/models/{id}`.
///
/// # Errors
/// [`Refusal::UnknownModel`].
pub fn model(registry: &ServiceRegistry, name: &str, created: u64) -> Result<Response, Refusal> {
    let known: Vec<String> = registry.models().into_iter().map(|model| model.name).collect();
    if known.iter().any(|known| known == name) {
        Ok(Response::json(200, &model_object(name, created)))
    } else {
        Err(Refusal::UnknownModel { model: name.to_string(), known })
    }
}

fn model_object(name: &str, created: u64) -> serde_json::Value {
    json!({"id": name, "object": "model", "created": created, "owned_by": "llama-orch"})
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(body: &str) -> Result<Asked, Refusal> {
        asked(body.as_bytes(), "client".into())
    }

    #[test]
    fn only_what_placement_needs_is_read() {
        let read =
            ask(r#"{"messages":[{"content":"\ud83d\ude00"}],"model":"a\/b","n":2,"stream":true,"x":[[1]]}"#)
                .expect("a usable body");
        assert_eq!((read.ask.model.as_deref(), read.ask.slots), (Some("a/b"), 2));
        let read = ask(r#"{"model":null}"#).expect("a usable body");
        assert_eq!((read.ask.model, read.ask.slots), (None, 1));
    }

    #[test]
    fn what_is_no_request_is_refused_before_an_engine_sees_it() {
        for bad in
            ["", "[]", "{", r#"{"model":7}"#, r#"{"n":0}"#, r#"{"n":-1}"#, r#"{"n":1000}"#, r#"{"a":1}x"#]
        {
            assert!(matches!(ask(bad), Err(Refusal::Invalid(_))), "{bad}");
        }
    }
}
