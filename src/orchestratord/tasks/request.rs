//! `POST /v2/tasks`: what a task may say, what an engine is sent for it, and the answer to it. Pure.

use std::fmt;
use std::sync::Arc;

use serde::Deserialize;
use serde_json::{Value, json};

use crate::orchestratord::admission::Priority;
use crate::orchestratord::affinity::Affinity;
use crate::orchestratord::aliases::Aliases;
use crate::orchestratord::core::Asked;
use crate::orchestratord::placement::Ask;
use crate::orchestratord::refusal::Refusal;
use crate::orchestratord::sessions;
use crate::wire::id::{NodeId, PoolId};
use crate::wire::json_place;
use crate::wire::preparation::PoolPreparation;

/// Most tokens that one task may ask for.
pub const MAX_TOKENS_MAX: i64 = 50_000;
/// Tokens of a task that does not say.
const MAX_TOKENS_DEFAULT: i64 = 256;
/// Most steps of preparation that one answer shows.
const STEPS_SHOWN_MAX: usize = 64;
/// Most pools that one task may prefer, and may avoid: placement compares each with those that there are.
const POOLS_NAMED_MAX: usize = 64;
/// Longest context that any engine is asked for, in tokens.
const CTX_MAX: i64 = 32_768 * 32;

#[derive(Debug, Deserialize)]
struct TaskRequest {
    task_id: String,
    session_id: Option<String>,
    workload: Option<String>,
    model_ref: Option<String>,
    ctx: Option<i64>,
    priority: Option<String>,
    max_tokens: Option<i64>,
    deadline_ms: Option<i64>,
    seed: Option<i64>,
    prompt: Option<String>,
    messages: Option<Vec<Value>>,
    kv_hint: Option<String>,
    placement: Option<Wishes>,
}

/// `placement` of a task.
#[derive(Debug, Default, Deserialize)]
struct Wishes {
    mode: Option<String>,
    pin_pool_id: Option<PoolId>,
    prefer_pools: Option<Vec<PoolId>>,
    avoid_pools: Option<Vec<PoolId>>,
    require_device_mask: Option<String>,
    node_id: Option<NodeId>,
}

/// A task that may be asked for.
pub struct NewTask {
    /// Its name.
    pub id: String,
    /// The session that it belongs to.
    pub session: Option<Arc<str>>,
    /// What it needs.
    pub asked: Asked,
    /// The alias by which it asked for its model.
    pub alias: Option<String>,
    /// Where its engine is asked: a prompt is completed, messages are answered.
    pub path: &'static str,
    /// What its engine is sent there.
    pub body: Vec<u8>,
    /// Most tokens that it may generate.
    pub tokens_max: u32,
    /// Its deadline, in milliseconds from its creation.
    pub deadline_ms: Option<u64>,
}

impl fmt::Debug for NewTask {
    /// Without the body, which is a prompt.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NewTask")
            .field("id", &self.id)
            .field("body_bytes", &self.body.len())
            .finish_non_exhaustive()
    }
}

/// Reads and checks a task. `client` names whoever shares a turn in the queue.
///
/// # Errors
/// [`Refusal::Invalid`] that names the field, or [`Refusal::Deadline`].
pub fn parse(body: &[u8], client: Arc<str>, aliases: &Aliases) -> Result<NewTask, Refusal> {
    let invalid = |what: &str| Refusal::Invalid(what.to_string());
    // A list would be read as the fields in order.
    if !body.trim_ascii_start().starts_with(b"{") {
        return Err(invalid("the body is not a JSON object"));
    }
    let task: TaskRequest = serde_json::from_slice(body).map_err(|error| {
        Refusal::Invalid(format!("the body is no task: {}", json_place::discreet(&error)))
    })?;
    // Empty means absent: clients with required fields send it so.
    let session = task.session_id.as_deref().filter(|name| !name.is_empty());
    if !sessions::is_name(&task.task_id) || session.is_some_and(|name| !sessions::is_name(name)) {
        return Err(invalid("task_id and session_id must be 1 to 128 visible ASCII characters without /"));
    }
    match task.workload.as_deref() {
        None | Some("completion") => {}
        Some("embedding" | "rerank") => {
            return Err(invalid(
                "tasks serve the workload completion; for embeddings use POST /v1/embeddings",
            ));
        }
        Some(_) => return Err(invalid("workload must be completion")),
    }
    if task.ctx.is_some_and(|ctx| !(0..=CTX_MAX).contains(&ctx)) {
        return Err(invalid("ctx is out of range"));
    }
    let tokens_max = task.max_tokens.unwrap_or(MAX_TOKENS_DEFAULT);
    let tokens_max = u32::try_from(tokens_max).ok().filter(|n| (1..=MAX_TOKENS_MAX).contains(&i64::from(*n)));
    let tokens_max = tokens_max.ok_or_else(|| invalid("max_tokens must be from 1 to 50000"))?;
    let above_zero = |ms: i64| {
        let ms = u64::try_from(ms).ok().filter(|ms| *ms > 0);
        ms.ok_or_else(|| Refusal::Deadline("deadline_ms must be above 0".into()))
    };
    let deadline_ms = task.deadline_ms.map(above_zero).transpose()?;
    let priority = match task.priority.as_deref() {
        None => Priority::Interactive,
        Some(text) => text.parse::<Priority>().map_err(Refusal::Invalid)?,
    };
    let is_cold = match task.kv_hint.as_deref() {
        None | Some("reuse") => false,
        Some("cold") => true,
        Some(_) => return Err(invalid("kv_hint must be reuse or cold")),
    };
    let wishes = task.placement.unwrap_or_default();
    match wishes.mode.as_deref() {
        Some("pin") if wishes.pin_pool_id.is_none() && wishes.node_id.is_none() => {
            return Err(invalid("placement.mode pin needs placement.pin_pool_id or placement.node_id"));
        }
        None | Some("pin" | "prefer" | "auto") => {}
        Some(_) => return Err(invalid("placement.mode must be pin, prefer or auto")),
    }
    for (name, pools) in [("prefer_pools", &wishes.prefer_pools), ("avoid_pools", &wishes.avoid_pools)] {
        if pools.as_ref().is_some_and(|pools| pools.len() > POOLS_NAMED_MAX) {
            let message = format!("placement.{name} must name at most {POOLS_NAMED_MAX} pools");
            return Err(Refusal::Invalid(message));
        }
    }
    let mut body = json!({"max_tokens": tokens_max, "stream": true});
    let path = match (task.prompt, task.messages) {
        (Some(prompt), None) => {
            body["prompt"] = json!(prompt);
            "/v1/completions"
        }
        (None, Some(messages)) if !messages.is_empty() => {
            body["messages"] = Value::Array(messages);
            "/v1/chat/completions"
        }
        (None, Some(_)) => return Err(invalid("messages is empty")),
        (None, None) => return Err(invalid("prompt is missing")),
        (Some(_), Some(_)) => return Err(invalid("prompt and messages exclude each other")),
    };
    let named = task.model_ref.filter(|model| !model.is_empty());
    let target = named.as_deref().and_then(|name| aliases.resolve(name)).map(str::to_string);
    let (model, alias) = if target.is_some() { (target, named) } else { (named, None) };
    if let Some(model) = &model {
        body["model"] = json!(model);
    }
    if let Some(seed) = task.seed {
        body["seed"] = json!(seed);
    }
    if is_cold {
        // llama-server's name for it; engines that have none ignore it.
        body["cache_prompt"] = json!(false);
    }
    let ask = Ask {
        model,
        slots: 1,
        pool: wishes.pin_pool_id,
        node: wishes.node_id,
        device_mask: wishes.require_device_mask,
        prefer_pools: wishes.prefer_pools.unwrap_or_default(),
        avoid_pools: wishes.avoid_pools.unwrap_or_default(),
        tokens_max: Some(tokens_max),
        affinity: session.and_then(Affinity::session),
        // It knows what it needs, and an engine with less would cut it short.
        context_tokens: task.ctx.and_then(|ctx| u64::try_from(ctx).ok()).filter(|tokens| *tokens > 0),
        context_is_wish: false,
    };
    let wait_ms_max = deadline_ms.unwrap_or(u64::MAX);
    Ok(NewTask {
        session: session.map(Arc::from),
        id: task.task_id,
        asked: Asked { ask, priority, client, wait_ms_max, is_deadline: deadline_ms.is_some() },
        alias,
        path,
        body: body.to_string().into_bytes(),
        tokens_max,
        deadline_ms,
    })
}

/// How an admitted task stands.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Standing {
    /// So many go first; `None` once it has been placed.
    pub position: Option<usize>,
    /// When it may start, in milliseconds; `None` where nothing was measured that could tell.
    pub predicted_ms: Option<u64>,
    /// What it waits for, where no engine that could serve it takes work.
    pub not_ready: Option<String>,
}

impl Standing {
    /// One that was placed at once.
    #[must_use]
    pub fn placed() -> Standing {
        Standing { position: None, predicted_ms: Some(0), not_ready: None }
    }

    /// The fields of the admission's answer and of the first event: equal in both.
    #[must_use]
    pub fn to_json(&self) -> Value {
        json!({"queue_position": self.position.unwrap_or(0), "predicted_start_ms": self.predicted_ms})
    }
}

/// What nodes do for the pools that could serve a task, as its answer shows it.
pub fn steps<'a>(preparations: impl Iterator<Item = (&'a NodeId, &'a PoolPreparation)>) -> Vec<Value> {
    let of_pool = |(node, pool): (&NodeId, &'a PoolPreparation)| {
        let node = node.clone();
        pool.steps.iter().filter_map(move |step| {
            let mut shown = serde_json::to_value(step).ok()?;
            (shown["group"], shown["node_id"]) = (json!(pool.pool_id), json!(node));
            Some(shown)
        })
    };
    preparations.flat_map(of_pool).take(STEPS_SHOWN_MAX).collect()
}

/// The answer to an admitted task. `predicted_start_ms` is null where it is not known. `steps` are what nodes
/// tell; where none does, and nobody is ready, the reason is all that is known.
#[must_use]
pub fn admission_body(id: &str, standing: &Standing, mut steps: Vec<Value>) -> Value {
    let sse = format!("/v2/tasks/{id}/events");
    let warming =
        |reason: &String| json!({"kind": "pool_warmup", "status": "pending", "description": reason});
    if steps.is_empty() {
        steps = standing.not_ready.iter().map(warming).collect();
    }
    let mut body = standing.to_json();
    body["task_id"] = json!(id);
    body["backoff_ms"] = json!(0);
    body["streams"] = json!({"sse_verbose": format!("{sse}?verbose=true"), "sse": sse});
    body["preparation"] = json!({"steps": steps});
    body
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::preparation::PreparationStep;

    fn parse(text: &str) -> Result<NewTask, Refusal> {
        super::parse(text.as_bytes(), "c".into(), &Aliases::parse("gpt=org/qwen").expect("aliases"))
    }

    #[test]
    fn tasks_are_checked_field_by_field() {
        let good = parse(
            r#"{"task_id":"t","session_id":"s","workload":"completion","model_ref":"m","engine":"llamacpp","ctx":10,
            "priority":"batch","max_tokens":5,"deadline_ms":1000,"prompt":"p","seed":1,"kv_hint":"cold","inputs":null,
            "placement":{"mode":"pin","pin_pool_id":"p0","prefer_pools":null}}"#,
        )
        .expect("a good task");
        assert_eq!((good.asked.priority, good.asked.wait_ms_max), (Priority::Batch, 1000));
        assert_eq!((good.asked.ask.context_tokens, good.asked.ask.context_is_wish), (Some(10), false));
        assert_eq!(good.asked.ask.pool.as_ref().map(PoolId::as_str), Some("p0"));
        assert_eq!((good.tokens_max, good.deadline_ms, good.session.as_deref()), (5, Some(1000), Some("s")));
        let body: Value = serde_json::from_slice(&good.body).expect("JSON");
        let sent = json!({"prompt": "p", "max_tokens": 5, "stream": true, "model": "m", "seed": 1, "cache_prompt": false});
        assert_eq!((body, good.path), (sent, "/v1/completions"));
        for (bad, part) in [
            ("{}", "task_id"),
            ("[\"t\"]", "JSON object"),
            (r#"{"task_id":"a/b","prompt":""}"#, "visible ASCII"),
            (r#"{"task_id":"t","session_id":"a b","prompt":""}"#, "visible ASCII"),
            (r#"{"task_id":"t"}"#, "prompt is missing"),
            (r#"{"task_id":"t","messages":[]}"#, "messages is empty"),
            (r#"{"task_id":"t","prompt":"","messages":[{}]}"#, "exclude"),
            (r#"{"task_id":"t","prompt":"","max_tokens":0}"#, "max_tokens"),
            (r#"{"task_id":"t","prompt":"","max_tokens":50001}"#, "max_tokens"),
            (r#"{"task_id":"t","prompt":"","ctx":-1}"#, "ctx"),
            (r#"{"task_id":"t","prompt":"","deadline_ms":0}"#, "deadline_ms"),
            (r#"{"task_id":"t","prompt":"","workload":"embedding"}"#, "embeddings"),
            (r#"{"task_id":"t","prompt":"","priority":"vip"}"#, "vip"),
            (r#"{"task_id":"t","prompt":"","kv_hint":"hot"}"#, "kv_hint"),
            (r#"{"task_id":"t","prompt":"","placement":{"mode":"pin"}}"#, "pin_pool_id"),
            (r#"{"task_id":"t","prompt":"","placement":{"mode":"x"}}"#, "mode"),
        ] {
            let refusal = parse(bad).expect_err(bad);
            assert!(
                refusal.status() == 400 && refusal.message().contains(part),
                "{bad}: {}",
                refusal.message()
            );
        }
    }

    #[test]
    fn so_many_pools_may_be_named_and_no_more() {
        for name in ["prefer_pools", "avoid_pools"] {
            let task = |count| {
                let pools = vec!["p"; count];
                json!({"task_id": "t", "prompt": "", "placement": {(name): pools}}).to_string()
            };
            parse(&task(POOLS_NAMED_MAX)).expect("as many as are allowed");
            let refusal = parse(&task(POOLS_NAMED_MAX + 1)).expect_err("one too many");
            assert!(refusal.status() == 400 && refusal.message().contains(name), "{}", refusal.message());
        }
    }

    #[test]
    fn an_alias_is_placed_and_sent_as_its_model() {
        for (named, model, alias) in [("gpt", "org/qwen", Some("gpt")), ("m", "m", None)] {
            let task = json!({"task_id": "t", "prompt": "gpt", "model_ref": named}).to_string();
            let task = parse(&task).expect("a good task");
            assert_eq!((task.asked.ask.model.as_deref(), task.alias.as_deref()), (Some(model), alias));
            let body: Value = serde_json::from_slice(&task.body).expect("JSON");
            assert_eq!((body["model"].as_str(), body["prompt"].as_str()), (Some(model), Some("gpt")));
        }
    }

    #[test]
    fn messages_go_where_chats_are_answered() {
        let chat = parse(r#"{"task_id":"t","session_id":"","messages":[{"role":"user","content":"x"}]}"#)
            .expect("a good task");
        let body: Value = serde_json::from_slice(&chat.body).expect("JSON");
        assert_eq!((chat.path, body["messages"][0]["content"].as_str()), ("/v1/chat/completions", Some("x")));
        assert!(
            chat.session.is_none() && body.get("prompt").is_none() && body["max_tokens"] == 256,
            "{body}"
        );
    }

    #[test]
    fn an_admission_says_where_to_listen_and_what_is_not_known() {
        let waits = Standing { position: Some(3), predicted_ms: None, not_ready: Some("it loads".into()) };
        let body = admission_body("t", &waits, Vec::new());
        assert_eq!((body["queue_position"].as_u64(), &body["predicted_start_ms"]), (Some(3), &Value::Null));
        assert_eq!(body["streams"]["sse_verbose"], "/v2/tasks/t/events?verbose=true");
        assert_eq!(body["preparation"]["steps"][0]["kind"], "pool_warmup");
        let (pool, node) = (PoolId::new("p").expect("an id"), NodeId::new("n").expect("an id"));
        let fetch = PreparationStep {
            kind: "model_fetch".into(),
            id: "p/r0".into(),
            status: "running".into(),
            bytes_done: Some(1),
            ..PreparationStep::default()
        };
        let told = PoolPreparation { pool_id: pool, steps: vec![fetch] };
        let body = admission_body("t", &waits, steps(std::iter::once((&node, &told))));
        assert_eq!(
            body["preparation"]["steps"],
            json!([{"kind": "model_fetch", "id": "p/r0", "group": "p", "node_id": "n", "status": "running", "bytes_done": 1}])
        );
        let many = std::iter::repeat_n((&node, &told), 2 * STEPS_SHOWN_MAX);
        assert_eq!(steps(many).len(), STEPS_SHOWN_MAX);
        let body = admission_body("t", &Standing::placed(), Vec::new());
        assert_eq!(
            (body["queue_position"].as_u64(), body["predicted_start_ms"].as_u64()),
            (Some(0), Some(0))
        );
        assert_eq!(body["preparation"]["steps"], json!([]));
    }
}
