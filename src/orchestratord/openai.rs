//! The OpenAI front door: which paths are forwarded, what a request asks of placement, and the models
//! that there are. Pure.
//!
//! A body is only looked at, by [`super::peek`]; what goes to the engine are the client's bytes. The one
//! change that is ever made is the name of a model that was asked for by an alias.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::sync::Arc;

use serde::Serialize;

use crate::http::server::Response;

use super::admission::Priority;
use super::affinity::Affinity;
use super::aliases::{Aliases, Rewrite};
use super::core::Asked;
use super::peek::peek;
use super::placement::Ask;
use super::refusal::Refusal;
use super::service_registry::ServiceRegistry;

/// Paths whose requests go to engines.
pub const ENGINE_PATHS: [&str; 6] = [
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/rerank",
    "/v1/responses",
    "/v1/messages",
];
/// Of these, the ones whose engines keep nothing of a prompt that a later request could use.
const PREFIXLESS_PATHS: [&str; 2] = ["/v1/embeddings", "/v1/rerank"];

/// Bytes of a body for each token of its prompt, roughly: four letters of English. What a prompt really takes
/// only its engine knows (a picture is some hundred tokens in a megabyte), and an answer that is asked too long
/// is refused by one engine and cut by another; so a long context is looked for, and none is refused.
const BYTES_PER_TOKEN: u64 = 4;

/// A request for an engine.
#[derive(Debug)]
pub struct Forwarding {
    /// What it asks of placement.
    pub asked: Box<Asked>,
    /// What must change in its body.
    pub rewrite: Option<Rewrite>,
    /// The alias by which it asked for its model.
    pub alias: Option<String>,
    /// It wants events as they come.
    pub stream: bool,
}

/// Reads a request to one of [`ENGINE_PATHS`]. `client` names whoever shares a turn in the queue.
///
/// # Errors
/// [`Refusal::Invalid`] for a body that is no JSON object with fields of the expected types.
pub fn forwarding(
    path: &str,
    body: &[u8],
    client: Arc<str>,
    aliases: &Aliases,
) -> Result<Forwarding, Refusal> {
    let read = peek(body).map_err(|error| Refusal::Invalid(error.to_string()))?;
    let session = read.session.as_deref().and_then(Affinity::session);
    let prefix_hash = read.prefix_hash.filter(|_| !PREFIXLESS_PATHS.contains(&path));
    let named = read.model.as_deref();
    let target = named.and_then(|name| aliases.resolve(name));
    let rewrite = read.model_span.zip(target).map(|(span, text)| Rewrite { span, text: text.to_string() });
    let model = target.or(named).map(str::to_string);
    let tokens_max = read.tokens_max.unwrap_or(0);
    let context_tokens = (body.len() as u64 / BYTES_PER_TOKEN).saturating_add(tokens_max);
    let ask = Ask {
        model,
        slots: read.n.unwrap_or(1),
        tokens_max: read.tokens_max.map(|tokens| u32::try_from(tokens).unwrap_or(u32::MAX)),
        affinity: session.or(prefix_hash.map(Affinity::Prefix)),
        context_tokens: Some(context_tokens),
        context_is_wish: true,
        ..Ask::default()
    };
    let priority = Priority::Interactive;
    let asked = Box::new(Asked { ask, priority, client, wait_ms_max: u64::MAX, is_deadline: false });
    let alias = read.model.filter(|_| rewrite.is_some()).map(Cow::into_owned);
    Ok(Forwarding { asked, rewrite, alias, stream: read.stream })
}

/// `GET /v1/models`: every known model, busy ones included, and the aliases of these.
#[must_use]
pub fn models(registry: &ServiceRegistry, aliases: &Aliases, created: u64) -> Response {
    #[derive(Serialize)]
    struct List<'a> {
        object: &'static str,
        data: Vec<Model<'a>>,
    }
    let known: BTreeSet<&str> = registry.table().sets().models().map(|(name, _)| name).collect();
    let usable = aliases.iter().filter(|(_, model)| known.contains(model)).map(|(alias, _)| alias);
    let names: BTreeSet<&str> = known.iter().copied().chain(usable).collect();
    let data = names.into_iter().map(|name| Model::new(name, created)).collect();
    Response::json(200, &List { object: "list", data })
}

/// `GET /v1/models/{id}`. `name` as it is in the path, slashes and escapes included.
///
/// # Errors
/// [`Refusal::UnknownModel`].
pub fn model(
    registry: &ServiceRegistry,
    aliases: &Aliases,
    name: &str,
    created: u64,
) -> Result<Response, Refusal> {
    let name = unescaped(name);
    let target = aliases.resolve(&name).unwrap_or(&name);
    if registry.table().sets().models().any(|(known, _)| known == target) {
        Ok(Response::json(200, &Model::new(&name, created)))
    } else {
        let known = registry.table().sets().models().map(|(name, _)| name.to_string()).collect();
        Err(Refusal::UnknownModel { model: name.into_owned(), known })
    }
}

#[derive(Serialize)]
struct Model<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    owned_by: &'static str,
}

impl<'a> Model<'a> {
    fn new(id: &'a str, created: u64) -> Model<'a> {
        Model { id, object: "model", created, owned_by: "llama-orch" }
    }
}

/// A path's text without percent escapes; as it is where they make no text.
fn unescaped(text: &str) -> Cow<'_, str> {
    if !text.contains('%') {
        return Cow::Borrowed(text);
    }
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, behind)) = rest.split_first() {
        let digit = |at: usize| behind.get(at).and_then(|b| char::from(*b).to_digit(16));
        match (first, digit(0), digit(1)) {
            (b'%', Some(high), Some(low)) => {
                bytes.push((high << 4 | low) as u8);
                rest = &behind[2..];
            }
            _ => {
                bytes.push(*first);
                rest = behind;
            }
        }
    }
    String::from_utf8(bytes).map_or(Cow::Borrowed(text), Cow::Owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHAT: &str = "/v1/chat/completions";

    fn read(path: &str, body: &str, aliases: &str) -> Result<Forwarding, Refusal> {
        let aliases = Aliases::parse(aliases).expect("aliases");
        forwarding(path, body.as_bytes(), "client".into(), &aliases)
    }

    #[test]
    fn only_what_placement_needs_is_read() {
        let body = r#"{"messages":[{"role":"user","content":"\ud83d\ude00"}],"model":"a\/b","n":2,"stream":true,"prompt_cache_key":"s","x":[[1]]}"#;
        let found = read(CHAT, body, "").expect("a usable body");
        assert_eq!(
            (found.asked.ask.model.as_deref(), found.asked.ask.slots, found.stream),
            (Some("a/b"), 2, true)
        );
        assert_eq!((found.asked.ask.affinity, found.rewrite), (Affinity::session("s"), None));
        let chat = r#"{"messages":[{"role":"user","content":"hi"}],"session_id":"","max_tokens":7}"#;
        let found = read(CHAT, chat, "").expect("a usable body");
        assert!(matches!(found.asked.ask.affinity, Some(Affinity::Prefix(_))), "{:?}", found.asked.ask);
        assert_eq!(found.asked.ask.tokens_max, Some(7));
        let wished = (found.asked.ask.context_tokens, found.asked.ask.context_is_wish);
        assert_eq!(wished, (Some(chat.len() as u64 / 4 + 7), true));
        let found = read(CHAT, r#"{"model":null}"#, "").expect("a usable body");
        assert_eq!((found.asked.ask.model, found.asked.ask.slots), (None, 1));
        let found = read("/v1/embeddings", r#"{"input":"x"}"#, "").expect("a usable body");
        assert_eq!(found.asked.ask.affinity, None);
    }

    #[test]
    fn an_alias_is_placed_and_forwarded_as_its_model() {
        let body = r#"{"model": "gpt", "user": "gpt"}"#;
        let found = read(CHAT, body, "gpt=org/qwen").expect("a usable body");
        assert_eq!(
            (found.asked.ask.model.as_deref(), found.alias.as_deref()),
            (Some("org/qwen"), Some("gpt"))
        );
        let mut body = body.as_bytes().to_vec();
        found.rewrite.expect("another name").apply(&mut body);
        assert_eq!(body, br#"{"model": "org/qwen", "user": "gpt"}"#);
    }

    #[test]
    fn what_is_no_request_is_refused_before_an_engine_sees_it() {
        for bad in
            ["", "[]", "{", r#"{"model":7}"#, r#"{"n":0}"#, r#"{"n":-1}"#, r#"{"n":1000}"#, r#"{"a":1}x"#]
        {
            assert!(matches!(read(CHAT, bad, ""), Err(Refusal::Invalid(_))), "{bad}");
        }
    }

    #[test]
    fn names_in_paths_may_be_escaped() {
        for (path, name) in [
            ("org/model", "org/model"),
            ("org%2Fmodel%3aq4", "org/model:q4"),
            ("%C3%A9", "é"),
            ("a%2", "a%2"),
            ("%zz%", "%zz%"),
            ("%ff", "%ff"),
        ] {
            assert_eq!(unescaped(path), name);
        }
    }
}
