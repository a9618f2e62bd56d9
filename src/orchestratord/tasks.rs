//! The task front door: a task is admitted, its events are read later, and it can be cancelled. Pure:
//! engine bytes in, event bytes out.
//!
//! ```text
//!   create ─▶ waiting ─▶ running ─▶ over        events: started token* (end | error), nothing after
//!                └──── cancel ───────▲          opened at most once, at any time before it expires
//! ```
//!
//! Events that nobody reads yet are buffered up to [`EVENTS_BYTES_MAX`]; beyond that the engine is
//! paused, so a task without a reader costs bounded memory. A task whose events are not opened, or not
//! opened any more, within [`UNREAD_MS`] is forgotten.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::{Value, json};

use crate::http::sse::{self, Event};
use crate::time::{Mono, Now};
use crate::wire::id::{NodeId, PoolId};

use super::admission::Priority;
use super::core::{Asked, RequestId};
use super::peek::Affinity;
use super::placement::Ask;
use super::refusal::Refusal;

/// Tasks that are remembered at once.
pub const TASKS_MAX: usize = 10_000;
/// Event bytes that one task may have unread before its engine is paused.
pub const EVENTS_BYTES_MAX: usize = 64 * 1024;
/// A task whose events nobody opens is forgotten (and cancelled) after this long.
pub const UNREAD_MS: u64 = 120_000;
/// Most tokens that one task may ask for.
const MAX_TOKENS_MAX: i64 = 50_000;
/// Longest context that any engine is asked for, in tokens.
const CTX_MAX: i64 = 32_768 * 32;
/// What is kept of an engine's error answer, in bytes.
const ERROR_BYTES_MAX: usize = 4 * 1024;

/// `POST /v2/tasks`.
#[derive(Debug, Deserialize)]
pub struct TaskRequest {
    task_id: String,
    #[serde(default)]
    session_id: Option<String>,
    #[serde(default)]
    workload: Option<String>,
    #[serde(default)]
    model_ref: Option<String>,
    #[serde(default)]
    ctx: Option<i64>,
    #[serde(default)]
    priority: Option<String>,
    #[serde(default)]
    max_tokens: Option<i64>,
    #[serde(default)]
    deadline_ms: Option<i64>,
    #[serde(default)]
    seed: Option<i64>,
    #[serde(default)]
    prompt: Option<String>,
    #[serde(default)]
    placement: Option<Wishes>,
}

/// `placement` of a task.
#[derive(Debug, Default, Deserialize)]
struct Wishes {
    #[serde(default)]
    pin_pool_id: Option<PoolId>,
    #[serde(default)]
    prefer_pools: Vec<PoolId>,
    #[serde(default)]
    avoid_pools: Vec<PoolId>,
    #[serde(default)]
    require_device_mask: Option<String>,
    #[serde(default)]
    node_id: Option<NodeId>,
}

/// A task that may be asked for.
#[derive(Debug)]
pub struct NewTask {
    /// Its name.
    pub id: String,
    /// What it needs.
    pub asked: Asked,
    /// What its engine is sent, for `/v1/completions`.
    pub body: Vec<u8>,
}

/// Reads and checks a task.
///
/// # Errors
/// [`Refusal::Invalid`] that names the field, or [`Refusal::Deadline`].
pub fn parse(body: &[u8], client: std::sync::Arc<str>) -> Result<NewTask, Refusal> {
    let invalid = |what: &str| Refusal::Invalid(what.to_string());
    let task: TaskRequest = serde_json::from_slice(body)
        .map_err(|error| Refusal::Invalid(format!("the body is no task: {error}")))?;
    if !good_name(&task.task_id) || task.session_id.as_deref().is_some_and(|id| !good_name(id)) {
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
    let max_tokens = task.max_tokens.unwrap_or(256);
    if !(1..=MAX_TOKENS_MAX).contains(&max_tokens) {
        return Err(invalid("max_tokens must be from 1 to 50000"));
    }
    let wait_ms_max = match task.deadline_ms {
        None => u64::MAX,
        Some(ms) => u64::try_from(ms).ok().filter(|ms| *ms > 0).ok_or(Refusal::Deadline)?,
    };
    let priority = match task.priority.as_deref() {
        None => Priority::Interactive,
        Some(text) => text.parse::<Priority>().map_err(Refusal::Invalid)?,
    };
    let prompt = task.prompt.ok_or_else(|| invalid("prompt is missing"))?;
    let wishes = task.placement.unwrap_or_default();
    let model = task.model_ref.filter(|model| !model.is_empty());
    let mut body = json!({"prompt": prompt, "max_tokens": max_tokens, "stream": true});
    if let Some(model) = &model {
        body["model"] = json!(model);
    }
    if let Some(seed) = task.seed {
        body["seed"] = json!(seed);
    }
    let ask = Ask {
        model,
        slots: 1,
        pool: wishes.pin_pool_id,
        node: wishes.node_id,
        device_mask: wishes.require_device_mask,
        prefer_pools: wishes.prefer_pools,
        avoid_pools: wishes.avoid_pools,
    };
    let asked = Asked { ask, priority, client, wait_ms_max, affinity: Affinity::default() };
    Ok(NewTask { id: task.task_id, asked, body: body.to_string().into_bytes() })
}

fn good_name(id: &str) -> bool {
    (1..=128).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_graphic() && b != b'/')
}

/// The answer to an admitted task.
#[must_use]
pub fn admission_body(id: &str, queue_position: usize, predicted_start_ms: u64) -> Value {
    let sse = format!("/v2/tasks/{id}/events");
    json!({
        "task_id": id,
        "queue_position": queue_position,
        "predicted_start_ms": predicted_start_ms,
        "backoff_ms": 0,
        "streams": {"sse_verbose": format!("{sse}?verbose=true"), "sse": sse},
        "preparation": {"steps": []},
    })
}

/// All tasks.
#[derive(Debug, Default)]
pub struct Tasks {
    tasks: BTreeMap<String, Task>,
    by_request: BTreeMap<RequestId, String>,
    expiries: BTreeMap<(Mono, RequestId), ()>,
}

#[derive(Debug)]
struct Task {
    request: RequestId,
    /// Rendered events that the reader has not been given.
    events: Vec<u8>,
    opened: bool,
    over: bool,
    expires: Mono,
    parser: sse::Events,
    error_body: Vec<u8>,
    status: u16,
    tokens: u64,
    first_token: Option<Mono>,
    saw_error: Option<String>,
}

impl Tasks {
    /// Remembers an admitted task; its first event is there at once.
    ///
    /// # Errors
    /// [`Refusal::Conflict`] for a name in use, [`Refusal::TooMany`].
    pub fn create(
        &mut self,
        id: &str,
        request: RequestId,
        queue_position: usize,
        predicted_start_ms: u64,
        now: Now,
    ) -> Result<(), Refusal> {
        self.check_new(id)?;
        let expires = now.mono.plus_ms(UNREAD_MS);
        let mut task = Task {
            request,
            events: Vec::new(),
            opened: false,
            over: false,
            expires,
            parser: sse::Events::default(),
            error_body: Vec::new(),
            status: 200,
            tokens: 0,
            first_token: None,
            saw_error: None,
        };
        let started = json!({"queue_position": queue_position, "predicted_start_ms": predicted_start_ms});
        sse::encode_event(&mut task.events, "started", &started);
        self.tasks.insert(id.to_string(), task);
        self.by_request.insert(request, id.to_string());
        self.expiries.insert((expires, request), ());
        Ok(())
    }

    /// Whether a task of this name could be created.
    ///
    /// # Errors
    /// As [`Tasks::create`].
    pub fn check_new(&self, id: &str) -> Result<(), Refusal> {
        if self.tasks.contains_key(id) {
            return Err(Refusal::Conflict(format!("a task named {id:?} exists already")));
        }
        if self.tasks.len() >= TASKS_MAX {
            return Err(Refusal::TooMany(format!("{TASKS_MAX} tasks exist already; read or cancel some")));
        }
        Ok(())
    }

    /// Opens a task's events. Returns its request.
    ///
    /// # Errors
    /// [`Refusal::NotFound`], or [`Refusal::Conflict`] if they were opened before.
    pub fn open(&mut self, id: &str) -> Result<RequestId, Refusal> {
        let unknown = || Refusal::NotFound(format!("there is no task {id:?}, or its events have been read"));
        let task = self.tasks.get_mut(id).ok_or_else(unknown)?;
        if std::mem::replace(&mut task.opened, true) {
            return Err(Refusal::Conflict(format!("the events of task {id:?} are being read already")));
        }
        self.expiries.remove(&(task.expires, task.request));
        Ok(task.request)
    }

    /// Takes the events that the reader has not been given, and whether they were the last. After the
    /// last the task is forgotten.
    pub fn take_events(&mut self, request: RequestId) -> (Vec<u8>, bool) {
        let Some(task) = self.of(request) else { return (Vec::new(), true) };
        let (events, over) = (std::mem::take(&mut task.events), task.over);
        if over && task.opened {
            self.forget(request);
        }
        (events, over)
    }

    /// Whether a task's events are being read.
    #[must_use]
    pub fn is_opened(&self, request: RequestId) -> bool {
        self.by_request.get(&request).and_then(|id| self.tasks.get(id)).is_some_and(|task| task.opened)
    }

    /// Bytes of events that wait for a reader.
    #[must_use]
    pub fn unread_bytes(&self, request: RequestId) -> usize {
        let task = self.by_request.get(&request).and_then(|id| self.tasks.get(id));
        task.map_or(0, |task| task.events.len())
    }

    /// The engine's status.
    pub fn answering(&mut self, request: RequestId, status: u16) {
        if let Some(task) = self.of(request) {
            task.status = status;
        }
    }

    /// Part of the engine's answer.
    pub fn received(&mut self, request: RequestId, bytes: &[u8], now: Now) {
        let Some(task) = self.of(request).filter(|task| !task.over) else { return };
        if task.status != 200 {
            let room = ERROR_BYTES_MAX.saturating_sub(task.error_body.len());
            task.error_body.extend_from_slice(&bytes[..bytes.len().min(room)]);
            return;
        }
        let mut parser = std::mem::take(&mut task.parser);
        let fed = parser.feed(bytes, |event| task.engine_event(&event, now));
        task.parser = parser;
        if fed.is_err() {
            task.saw_error = Some("the engine sent an event that is larger than 1 MiB".into());
        }
    }

    /// The engine's answer is complete.
    pub fn completed(&mut self, request: RequestId, now: Now) {
        let Some(task) = self.of(request).filter(|task| !task.over) else { return };
        if task.status != 200 {
            let text = String::from_utf8_lossy(&task.error_body).chars().take(500).collect::<String>();
            let (status, retriable) = (task.status, task.status >= 500 || task.status == 429);
            let code = if (400..500).contains(&status) { "INVALID_PARAMS" } else { "INTERNAL" };
            return task.fail(code, &format!("the engine answered {status}: {text}"), retriable);
        }
        match task.saw_error.take() {
            Some(error) => task.fail("INTERNAL", &error, true),
            None => task.end(false, now),
        }
    }

    /// The task is refused, or its engine failed.
    pub fn failed(&mut self, request: RequestId, code: &str, message: &str, retry_after_ms: Option<u64>) {
        let Some(task) = self.of(request).filter(|task| !task.over) else { return };
        let mut error = json!({"code": code, "message": message, "retriable": retry_after_ms.is_some()});
        if let Some(ms) = retry_after_ms {
            error["retry_after_ms"] = json!(ms);
        }
        task.finish("error", &error);
    }

    /// Cancels a task; no token follows. Returns its request if it was still to end.
    pub fn cancel(&mut self, id: &str, now: Now) -> Option<RequestId> {
        let task = self.tasks.get_mut(id).filter(|task| !task.over)?;
        task.end(true, now);
        Some(task.request)
    }

    /// Forgets a task: its reader left.
    pub fn abandon(&mut self, request: RequestId) {
        self.forget(request);
    }

    /// Forgets tasks whose events nobody opened in time, and returns them: one of them may still run.
    pub fn expire(&mut self, now: Mono) -> Vec<RequestId> {
        let mut expired = Vec::new();
        while let Some((&(at, request), ())) = self.expiries.first_key_value()
            && at <= now
        {
            self.expiries.remove(&(at, request));
            self.forget(request);
            expired.push(request);
        }
        expired
    }

    /// When [`Tasks::expire`] is wanted next.
    #[must_use]
    pub fn deadline(&self) -> Option<Mono> {
        self.expiries.first_key_value().map(|((at, _), ())| *at)
    }

    /// How many are remembered.
    #[must_use]
    pub fn len(&self) -> usize {
        self.tasks.len()
    }

    /// Whether none is remembered.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.tasks.is_empty()
    }

    fn of(&mut self, request: RequestId) -> Option<&mut Task> {
        self.tasks.get_mut(self.by_request.get(&request)?)
    }

    fn forget(&mut self, request: RequestId) {
        if let Some(task) = self.by_request.remove(&request).and_then(|id| self.tasks.remove(&id)) {
            self.expiries.remove(&(task.expires, task.request));
        }
    }
}

impl Task {
    /// One event of the engine's stream, in any of the dialects that engines speak.
    fn engine_event(&mut self, event: &Event, now: Now) {
        if event.data == b"[DONE]" {
            return;
        }
        let Ok(data) = serde_json::from_slice::<Value>(&event.data) else {
            self.saw_error.get_or_insert_with(|| "the engine sent an event that is no JSON".into());
            return;
        };
        if let Some(error) = data.get("error") {
            let message =
                error.get("message").and_then(Value::as_str).unwrap_or("the engine reported an error");
            self.saw_error.get_or_insert_with(|| message.to_string());
            return;
        }
        let choice = data.get("choices").and_then(|choices| choices.get(0));
        let text = choice
            .and_then(|choice| choice.get("text").or_else(|| choice.get("delta")?.get("content")))
            .or_else(|| data.get("content"))
            .and_then(Value::as_str);
        if let Some(text) = text.filter(|text| !text.is_empty()) {
            self.first_token.get_or_insert(now.mono);
            let token = json!({"t": text, "i": self.tokens});
            sse::encode_event(&mut self.events, "token", &token);
            self.tokens += 1;
        }
    }

    fn end(&mut self, canceled: bool, now: Now) {
        let decode_ms = self.first_token.map_or(0, |first| now.mono.ms_since(first));
        let mut end = json!({"tokens_out": self.tokens, "decode_ms": decode_ms, "decode_time_ms": decode_ms});
        if canceled {
            end["canceled"] = json!(true);
        }
        self.finish("end", &end);
    }

    fn fail(&mut self, code: &str, message: &str, retriable: bool) {
        self.finish("error", &json!({"code": code, "message": message, "retriable": retriable}));
    }

    fn finish(&mut self, name: &str, data: &Value) {
        sse::encode_event(&mut self.events, name, data);
        self.over = true;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(bytes: &[u8]) -> Vec<String> {
        let mut found = Vec::new();
        let mut events = sse::Events::default();
        let each = |event: Event| found.push(String::from_utf8(event.name).expect("a name"));
        events.feed(bytes, each).expect("short events");
        found
    }

    fn task() -> Tasks {
        let mut tasks = Tasks::default();
        tasks.create("t", 1, 0, 0, Now::default()).expect("a new task");
        tasks
    }

    #[test]
    fn every_engine_dialect_becomes_tokens_and_then_one_end() {
        let streams: [&[u8]; 3] = [
            b"data: {\"choices\":[{\"text\":\"a\"}]}\n\ndata: {\"choices\":[{\"text\":\"b\",\"finish_reason\":\"stop\"}]}\n\ndata: [DONE]\n\n",
            b"data: {\"choices\":[{\"delta\":{\"role\":\"assistant\",\"content\":null}}]}\n\ndata: {\"choices\":[{\"delta\":{\"content\":\"a\"}}]}\n\ndata: {\"choices\":[{\"delta\":{\"content\":\"b\"}}]}\n\n",
            b"data: {\"content\":\"a\",\"stop\":false}\n\ndata: {\"content\":\"b\",\"stop\":false}\n\ndata: {\"content\":\"\",\"stop\":true}\n\n",
        ];
        for stream in streams {
            let mut tasks = task();
            for byte in stream {
                tasks.received(1, &[*byte], Now::default());
            }
            tasks.completed(1, Now::default().plus_ms(7));
            assert_eq!(tasks.open("t"), Ok(1));
            let (events, over) = tasks.take_events(1);
            assert_eq!(
                (names(&events), over),
                (["started", "token", "token", "end"].map(String::from).to_vec(), true)
            );
            let text = String::from_utf8(events).expect("text");
            assert!(text.contains(r#"{"i":1,"t":"b"}"#) && text.contains(r#""tokens_out":2"#), "{text}");
            assert!(tasks.is_empty(), "a task that was read to its end is forgotten");
        }
    }

    #[test]
    fn nothing_follows_a_cancel_or_an_error() {
        let mut tasks = task();
        assert_eq!(tasks.cancel("t", Now::default()), Some(1));
        tasks.received(1, b"data: {\"content\":\"late\"}\n\n", Now::default());
        tasks.failed(1, "WORKER_RESET", "late", None);
        assert_eq!(tasks.cancel("t", Now::default()), None, "cancelling twice changes nothing");
        assert_eq!(names(&tasks.take_events(1).0), ["started", "end"]);

        let mut tasks = task();
        tasks.received(1, b"data: {\"error\":{\"message\":\"out of memory\"}}\n\n", Now::default());
        tasks.completed(1, Now::default());
        let text = String::from_utf8(tasks.take_events(1).0).expect("text");
        assert!(
            text.contains("event: error") && text.contains("out of memory") && !text.contains("event: end"),
            "{text}"
        );
    }

    #[test]
    fn events_are_opened_once_and_unread_tasks_are_forgotten() {
        let mut tasks = task();
        assert_eq!(tasks.open("t"), Ok(1));
        assert!(matches!(tasks.open("t"), Err(Refusal::Conflict(_))));
        assert!(matches!(tasks.open("other"), Err(Refusal::NotFound(_))));
        assert!(matches!(tasks.create("t", 2, 0, 0, Now::default()), Err(Refusal::Conflict(_))));
        assert_eq!(tasks.expire(Mono(u64::MAX)), Vec::<RequestId>::new(), "it is being read");

        let mut tasks = task();
        let at = tasks.deadline().expect("an expiry");
        assert_eq!((tasks.expire(at), tasks.len()), (vec![1], 0));
    }

    #[test]
    fn tasks_are_checked_field_by_field() {
        let parse = |text: &str| super::parse(text.as_bytes(), "c".into());
        let good = parse(r#"{"task_id":"t","session_id":"s","workload":"completion","model_ref":"m","engine":"llamacpp","ctx":10,
            "priority":"batch","max_tokens":5,"deadline_ms":1000,"prompt":"p","seed":1,"placement":{"pin_pool_id":"p0"}}"#)
            .expect("a good task");
        assert_eq!((good.asked.priority, good.asked.wait_ms_max), (Priority::Batch, 1000));
        assert_eq!(good.asked.ask.pool.as_ref().map(PoolId::as_str), Some("p0"));
        for (bad, part) in [
            ("{}", "task_id"),
            (r#"{"task_id":"a/b","prompt":""}"#, "visible ASCII"),
            (r#"{"task_id":"t"}"#, "prompt is missing"),
            (r#"{"task_id":"t","prompt":"","max_tokens":0}"#, "max_tokens"),
            (r#"{"task_id":"t","prompt":"","ctx":-1}"#, "ctx"),
            (r#"{"task_id":"t","prompt":"","deadline_ms":0}"#, "deadline_ms"),
            (r#"{"task_id":"t","prompt":"","workload":"embedding"}"#, "embeddings"),
            (r#"{"task_id":"t","prompt":"","priority":"vip"}"#, "vip"),
        ] {
            let refusal = parse(bad).expect_err(bad);
            assert!(
                refusal.status() == 400 && refusal.message().contains(part),
                "{bad}: {}",
                refusal.message()
            );
        }
    }
}
