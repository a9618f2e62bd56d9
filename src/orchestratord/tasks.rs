//! The task front door: a task is admitted, its events are read later, and it can be cancelled. Pure:
//! engine bytes in, event bytes out.
//!
//! ```text
//!   create ─▶ waiting ─▶ running ─▶ over        events: started (token | metrics)* (end | error)
//!                └──── cancel ───────▲          opened at most once, at any time before it expires
//! ```
//!
//! Nothing follows `end` or `error`, and nothing follows a cancel but the `end` that says so. `metrics`
//! events tell a reader who asked for it (`verbose=true`) what happens to the task: its place in the
//! queue, the engine that it was sent to, failures that were retried, and what was measured.
//!
//! Events that nobody reads yet are buffered up to [`EVENTS_BYTES_MAX`]; beyond that the engine is
//! paused, so a task without a reader costs bounded memory. A task whose events are not opened within
//! [`UNREAD_MS`] is forgotten, as is one whose reader left or was given the last event; its name is known
//! for some time longer, so that who asks again is told that it is gone.
//!
//! [`request`] reads the task, [`answer`] the engine's answer; this file has the tasks' life and the
//! order of their events.

use std::collections::{BTreeMap, VecDeque};

use serde_json::{Value, json};

use crate::http::sse;
use crate::net::budget::BodyHold;
use crate::time::{Mono, Now};

use super::core::RequestId;
use super::refusal::{RETRY_MS_DEFAULT, Refusal};
use super::sessions::Turn;

pub mod answer;
pub mod request;
#[cfg(test)]
mod tests;

use self::answer::{Answer, Failure};
pub use self::request::{MAX_TOKENS_MAX, NewTask, Standing, admission_body, parse, steps};

/// Tasks that are remembered at once.
pub const TASKS_MAX: usize = 10_000;
/// Event bytes that one task may have unread before its engine is paused.
pub const EVENTS_BYTES_MAX: usize = 64 * 1024;
/// A task whose events nobody opens is forgotten (and cancelled) after this long.
pub const UNREAD_MS: u64 = 120_000;
/// Names of forgotten tasks that are remembered; some hundred bytes each.
pub const GONE_MAX: usize = 10_000;
/// Unread `metrics` events of one task; beyond that the oldest is dropped.
pub const NARRATION_MAX: usize = 64;
/// Tasks that are told their place in the queue at a time: each costs a look at the whole queue.
pub const NARRATED_MAX: usize = 50;
/// How often a task that waits is told its place in the queue: a person reads no faster.
pub const NARRATION_MS: u64 = 500;

/// All tasks.
#[derive(Debug)]
pub struct Tasks {
    tasks_max: usize,
    gone_max: usize,
    tasks: BTreeMap<String, Task>,
    by_request: BTreeMap<RequestId, String>,
    expiries: BTreeMap<(Mono, RequestId), ()>,
    gone: BTreeMap<String, (u64, &'static str)>,
    gone_order: VecDeque<(u64, String)>,
    gone_count: u64,
    narrate_at: Option<Mono>,
    /// The last one that was told its place in the queue.
    narrated: RequestId,
}

#[derive(Debug)]
struct Task {
    request: RequestId,
    /// Rendered events that the reader has not been given.
    events: Vec<u8>,
    /// Rendered `metrics` events, each with the offset in `events` before which it belongs.
    narration: VecDeque<(usize, Vec<u8>)>,
    opened: bool,
    verbose: bool,
    over: bool,
    expires: Mono,
    created: Mono,
    tokens_max: u32,
    deadline: Option<Mono>,
    /// Its last known place in the queue; `None` while it does not wait.
    position: Option<usize>,
    attempts: u32,
    dispatched: Option<Mono>,
    answer: Answer,
    /// Room in the budget of bodies for what is kept of it.
    room: Option<BodyHold>,
    tokens: u64,
    first_token: Option<Mono>,
    last_token: Option<Mono>,
}

/// How an answer ended, as far as others want to know.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Measured {
    /// From dispatch to the first token.
    pub first_token_ms: u64,
    /// Tokens.
    pub tokens: u64,
    /// From the first token to the last one.
    pub decode_ms: u64,
    /// For the session's record.
    pub turn: Turn,
}

/// What part of an answer led to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// More is to come, or was not wanted.
    More,
    /// The answer is complete; with what was measured if it had any token.
    Answered(Option<Measured>),
    /// The answer cannot be used: the task is over, its engine may be left.
    Unusable,
}

/// What limits a task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// Tokens that it may still generate.
    pub tokens: u64,
    /// Time to its deadline, where it has one.
    pub time_ms: Option<u64>,
}

impl Default for Tasks {
    fn default() -> Tasks {
        Tasks::new(TASKS_MAX, GONE_MAX)
    }
}

impl Tasks {
    /// No tasks yet; so many may be, and so many names of forgotten ones are remembered.
    #[must_use]
    pub fn new(tasks_max: usize, gone_max: usize) -> Tasks {
        Tasks {
            tasks_max,
            gone_max: gone_max.max(1),
            tasks: BTreeMap::new(),
            by_request: BTreeMap::new(),
            expiries: BTreeMap::new(),
            gone: BTreeMap::new(),
            gone_order: VecDeque::new(),
            gone_count: 0,
            narrate_at: None,
            narrated: RequestId::default(),
        }
    }

    /// Remembers an admitted task; its first event is there at once.
    ///
    /// # Errors
    /// [`Refusal::Conflict`] for a name in use, [`Refusal::TooMany`].
    pub fn create(
        &mut self,
        new: &NewTask,
        request: RequestId,
        standing: &Standing,
        now: Now,
    ) -> Result<(), Refusal> {
        self.check_new(&new.id)?;
        // The name is in use again.
        self.gone.remove(&new.id);
        let expires = now.mono.plus_ms(UNREAD_MS);
        let mut task = Task {
            request,
            events: Vec::new(),
            narration: VecDeque::new(),
            opened: false,
            verbose: false,
            over: false,
            expires,
            created: now.mono,
            tokens_max: new.tokens_max,
            deadline: new.deadline_ms.map(|ms| now.mono.plus_ms(ms)),
            position: None,
            attempts: 0,
            dispatched: None,
            answer: Answer::default(),
            room: None,
            tokens: 0,
            first_token: None,
            last_token: None,
        };
        sse::encode_event(&mut task.events, "started", &standing.to_json());
        if standing.position.is_some() {
            task.waits(standing, None);
        }
        self.tasks.insert(new.id.clone(), task);
        self.by_request.insert(request, new.id.clone());
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
        let most = self.tasks_max;
        if self.tasks.len() >= most {
            return Err(Refusal::TooMany(format!("{most} tasks exist already; read or cancel some")));
        }
        Ok(())
    }

    /// Opens a task's events, with its `metrics` events if it is to be `verbose`. Returns its request.
    ///
    /// # Errors
    /// [`Refusal::NotFound`] for a name that nobody knows, [`Refusal::Gone`] for a task that is forgotten,
    /// or [`Refusal::Conflict`] if its events are being read.
    pub fn open(&mut self, id: &str, verbose: bool, now: Now) -> Result<RequestId, Refusal> {
        let Some(task) = self.tasks.get_mut(id) else {
            return Err(match self.gone.get(id) {
                Some((_, why)) => Refusal::Gone(format!("task {id:?} is gone: {why}")),
                None => Refusal::NotFound(format!("there is no task {id:?}")),
            });
        };
        if std::mem::replace(&mut task.opened, true) {
            return Err(Refusal::Conflict(format!("the events of task {id:?} are being read already")));
        }
        task.verbose = verbose;
        if !verbose {
            task.narration.clear();
        }
        self.expiries.remove(&(task.expires, task.request));
        if verbose && !task.over && task.dispatched.is_none() {
            self.narrate_at.get_or_insert(now.mono.plus_ms(NARRATION_MS));
        }
        Ok(task.request)
    }

    /// Takes the events that the reader has not been given, and whether they were the last. After the
    /// last the task is forgotten.
    pub fn take_events(&mut self, request: RequestId) -> (Vec<u8>, bool) {
        let Some(task) = self.of(request) else { return (Vec::new(), true) };
        let (events, over) = (task.take_events(), task.over);
        if over && task.opened {
            self.forget(request, "its events have been read");
        }
        (events, over)
    }

    /// Whether a task's events are being read.
    #[must_use]
    pub fn is_opened(&self, request: RequestId) -> bool {
        self.get(request).is_some_and(|task| task.opened)
    }

    /// Whether its last event is there.
    #[must_use]
    pub fn is_over(&self, request: RequestId) -> bool {
        self.get(request).is_some_and(|task| task.over)
    }

    /// Bytes of events that wait for a reader.
    #[must_use]
    pub fn unread_bytes(&self, request: RequestId) -> usize {
        self.get(request).map_or(0, |task| task.events.len())
    }

    /// Bytes that are kept of a task's answer: of its events, and of an answer that can only be read as a whole.
    #[must_use]
    pub fn kept_bytes(&self, request: RequestId) -> usize {
        self.get(request).map_or(0, Task::kept_bytes)
    }

    /// Where the room of what is kept is counted: it is given back with the task, or with what its reader is given.
    pub fn room(&mut self, request: RequestId) -> Option<&mut Option<BodyHold>> {
        self.of(request).map(|task| &mut task.room)
    }

    /// What limits a task.
    #[must_use]
    pub fn budget(&self, request: RequestId, now: Now) -> Option<Budget> {
        self.get(request).map(|task| task.budget(now))
    }

    // The queue.

    /// Tasks whose readers want to be told their place in the queue, if it is time to tell them: at most
    /// [`NARRATED_MAX`], in turn.
    pub fn due_narrations(&mut self, now: Now) -> Vec<RequestId> {
        if self.narrate_at.is_none_or(|at| at > now.mono) {
            return Vec::new();
        }
        let waits = |request: &RequestId| {
            self.get(*request).is_some_and(|task| task.verbose && !task.over && task.dispatched.is_none())
        };
        let (first, after) =
            (self.by_request.range(..=self.narrated), self.by_request.range(self.narrated + 1..));
        let in_turn = after.chain(first).map(|(request, _)| *request);
        let due: Vec<RequestId> = in_turn.filter(waits).take(NARRATED_MAX).collect();
        self.narrated = due.last().copied().unwrap_or_default();
        self.narrate_at = (!due.is_empty()).then(|| now.mono.plus_ms(NARRATION_MS));
        due
    }

    /// A task's place in the queue, of so many that wait. Told if it has changed.
    pub fn queued(&mut self, request: RequestId, standing: &Standing, queue_depth: usize) {
        if let Some(task) = self.of(request).filter(|task| !task.over)
            && standing.position.is_some()
            && task.position != standing.position
        {
            task.waits(standing, Some(queue_depth));
        }
    }

    // Its engine.

    /// A task was sent to an engine: `to` for people, `facts` for programs.
    pub fn dispatched(&mut self, request: RequestId, to: &str, mut facts: Value, now: Now) {
        let Some(task) = self.of(request).filter(|task| !task.over) else { return };
        task.answer = Answer::default();
        task.position = None;
        task.attempts += 1;
        task.dispatched = Some(now.mono);
        let waited_ms = now.mono.ms_since(task.created);
        facts["phase"] = json!("dispatched");
        facts["attempt"] = json!(task.attempts);
        facts["waited_ms"] = json!(waited_ms);
        facts["human"] = json!(format!("sent to {to} after {waited_ms} ms"));
        task.narrate(&facts);
    }

    /// Its engine failed before it answered; another one may be tried.
    pub fn retried(&mut self, request: RequestId, reason: &str) {
        if let Some(task) = self.of(request).filter(|task| !task.over) {
            task.dispatched = None;
            let human = format!("the engine failed before it answered: {reason}");
            task.narrate(&json!({"phase": "retried", "attempt": task.attempts, "human": human}));
        }
    }

    /// The engine's status.
    pub fn answering(&mut self, request: RequestId, status: u16) {
        if let Some(task) = self.of(request).filter(|task| !task.over) {
            task.answer.head(status);
            if status == 200 {
                task.narrate(&json!({"phase": "prefill", "human": "the engine has taken the prompt"}));
            }
        }
    }

    /// Part of the engine's answer.
    pub fn received(&mut self, request: RequestId, bytes: &[u8], now: Now) -> Progress {
        let Some(task) = self.of(request).filter(|task| !task.over) else { return Progress::More };
        task.read(now, |answer, each| answer.feed(bytes, each));
        if let Some(failure) = task.answer.failure().cloned() {
            task.fail(&failure);
            return Progress::Unusable;
        }
        if task.answer.is_done() {
            task.end(false, now);
            return Progress::Answered(task.measured());
        }
        Progress::More
    }

    /// The engine's answer has ended. Returns what was measured if the task is over by that.
    pub fn completed(&mut self, request: RequestId, now: Now) -> Option<Measured> {
        let task = self.of(request).filter(|task| !task.over)?;
        let mut result = Ok(Default::default());
        task.read(now, |answer, each| result = answer.conclude(each));
        match result {
            Ok(_) => task.end(false, now),
            Err(failure) => task.fail(&failure),
        }
        task.measured()
    }

    /// Whether its answer has said that its text is complete: what breaks afterwards breaks nothing.
    #[must_use]
    pub fn is_answered(&self, request: RequestId) -> bool {
        self.get(request).is_some_and(|task| task.answer.is_complete())
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

    /// Its engine failed in the middle of its answer: it was too slow, or it broke.
    pub fn broken(&mut self, request: RequestId, reason: &str, timeout: bool) {
        let code = if timeout { "DECODE_TIMEOUT" } else { "WORKER_RESET" };
        self.failed(request, code, reason, Some(RETRY_MS_DEFAULT));
    }

    /// Cancels a task; no token follows. Returns its request if it was still to end.
    pub fn cancel(&mut self, id: &str, now: Now) -> Option<RequestId> {
        let task = self.tasks.get_mut(id).filter(|task| !task.over)?;
        task.end(true, now);
        Some(task.request)
    }

    /// Forgets a task: its reader left.
    pub fn abandon(&mut self, request: RequestId) {
        self.forget(request, "its reader left");
    }

    /// Forgets tasks whose events nobody opened in time, and returns them: one of them may still run.
    pub fn expire(&mut self, now: Mono) -> Vec<RequestId> {
        let mut expired = Vec::new();
        while let Some((&(at, request), ())) = self.expiries.first_key_value()
            && at <= now
        {
            self.expiries.remove(&(at, request));
            self.forget(request, "nobody opened its events in time");
            expired.push(request);
        }
        expired
    }

    /// When [`Tasks::expire`] or [`Tasks::due_narrations`] is wanted next.
    #[must_use]
    pub fn deadline(&self) -> Option<Mono> {
        let expiry = self.expiries.first_key_value().map(|((at, _), ())| *at);
        crate::time::earliest(expiry, self.narrate_at)
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

    fn get(&self, request: RequestId) -> Option<&Task> {
        self.tasks.get(self.by_request.get(&request)?)
    }

    fn of(&mut self, request: RequestId) -> Option<&mut Task> {
        self.tasks.get_mut(self.by_request.get(&request)?)
    }

    fn forget(&mut self, request: RequestId, why: &'static str) {
        let Some(id) = self.by_request.remove(&request) else { return };
        let Some(task) = self.tasks.remove(&id) else { return };
        self.expiries.remove(&(task.expires, task.request));
        if self.gone_order.len() >= self.gone_max
            && let Some((count, oldest)) = self.gone_order.pop_front()
            // The name may have been used and forgotten again since.
            && self.gone.get(&oldest).is_some_and(|(known, _)| *known == count)
        {
            self.gone.remove(&oldest);
        }
        self.gone_count += 1;
        self.gone.insert(id.clone(), (self.gone_count, why));
        self.gone_order.push_back((self.gone_count, id));
    }
}

impl Task {
    /// Lets `step` go on with the answer and writes the tokens that come of it.
    fn read(&mut self, now: Now, step: impl FnOnce(&mut Answer, &mut dyn FnMut(&str))) {
        let mut answer = std::mem::take(&mut self.answer);
        let mut each = |text: &str| {
            self.first_token.get_or_insert(now.mono);
            self.last_token = Some(now.mono);
            sse::encode_event(&mut self.events, "token", &json!({"t": text, "i": self.tokens}));
            self.tokens += 1;
        };
        step(&mut answer, &mut each);
        self.answer = answer;
    }

    fn kept_bytes(&self) -> usize {
        let narration: usize = self.narration.iter().map(|(_, event)| event.len()).sum();
        self.events.capacity() + narration + self.answer.kept_bytes()
    }

    fn take_events(&mut self) -> Vec<u8> {
        if self.answer.kept_bytes() == 0 {
            self.room = None;
        }
        let events = std::mem::take(&mut self.events);
        let narration = std::mem::take(&mut self.narration);
        if narration.is_empty() || !self.verbose {
            return events;
        }
        let (mut merged, mut from) = (Vec::with_capacity(events.len() + 1024), 0);
        for (at, event) in narration {
            merged.extend_from_slice(&events[from..at]);
            merged.extend_from_slice(&event);
            from = at;
        }
        merged.extend_from_slice(&events[from..]);
        merged
    }

    fn narrate(&mut self, metrics: &Value) {
        if self.opened && !self.verbose {
            return;
        }
        if self.narration.len() >= NARRATION_MAX {
            self.narration.pop_front();
        }
        let mut event = Vec::new();
        sse::encode_event(&mut event, "metrics", metrics);
        self.narration.push_back((self.events.len(), event));
    }

    fn waits(&mut self, standing: &Standing, queue_depth: Option<usize>) {
        self.position = standing.position;
        let mut metrics = standing.to_json();
        metrics["phase"] = json!("queued");
        if let Some(depth) = queue_depth {
            metrics["queue_depth"] = json!(depth);
        }
        let place = format!("{} go first", standing.position.unwrap_or(0));
        let human = match (&standing.not_ready, standing.predicted_ms) {
            (Some(reason), _) => format!("{place}; no engine takes it yet: {reason}"),
            (None, Some(ms)) => format!("{place}; it may start in {ms} ms"),
            (None, None) => format!("{place}; how long that takes is not known yet"),
        };
        metrics["human"] = json!(human);
        self.narrate(&metrics);
    }

    fn budget(&self, now: Now) -> Budget {
        let tokens = u64::from(self.tokens_max).saturating_sub(self.tokens_out());
        Budget { tokens, time_ms: self.deadline.map(|at| at.ms_since(now.mono)) }
    }

    /// What the engine counted, or else the pieces that came.
    fn tokens_out(&self) -> u64 {
        self.answer.totals().tokens_out.unwrap_or(self.tokens)
    }

    fn decode_ms(&self) -> u64 {
        match (self.first_token, self.last_token) {
            (Some(first), Some(last)) => last.ms_since(first),
            _ => 0,
        }
    }

    fn measured(&self) -> Option<Measured> {
        if !self.answer.is_complete() {
            return None;
        }
        let first = self.first_token?;
        Some(Measured {
            first_token_ms: self.dispatched.map_or(0, |at| first.ms_since(at)),
            // Pieces are what time was measured between.
            tokens: self.tokens,
            decode_ms: self.decode_ms(),
            turn: Turn { tokens_out: self.tokens_out(), cached_tokens: self.answer.totals().cached_tokens },
        })
    }

    /// What is known at the end, for a reader who wants to know.
    fn sum_up(&mut self, now: Now) {
        let totals = self.answer.totals();
        let budget = self.budget(now);
        let mut metrics = json!({
            "phase": "finished",
            "finish_reason": self.answer.finish_reason(),
            "tokens_in": totals.tokens_in,
            "cached_tokens": totals.cached_tokens,
            "kv_warmth": totals.cached_tokens.map(|cached| cached > 0),
            "tokens_budget_remaining": budget.tokens,
            "time_budget_remaining_ms": budget.time_ms,
        });
        let (tokens, decode_ms) = (self.tokens_out(), self.decode_ms());
        if let (Some(first), Some(dispatched)) = (self.first_token, self.dispatched) {
            metrics["first_token_ms"] = json!(first.ms_since(dispatched));
        }
        let mut human = format!("{tokens} tokens");
        if tokens > 1 && decode_ms > 0 {
            let rate = (tokens - 1) as f64 * 1000.0 / decode_ms as f64;
            metrics["tokens_per_second"] = json!((rate * 10.0).round() / 10.0);
            human = format!("{tokens} tokens, {rate:.1} a second");
        }
        metrics["human"] = json!(human);
        self.narrate(&metrics);
    }

    fn end(&mut self, canceled: bool, now: Now) {
        if !canceled {
            self.sum_up(now);
        }
        let decode_ms = self.decode_ms();
        let tokens = self.tokens_out();
        let mut end = json!({"tokens_out": tokens, "decode_ms": decode_ms, "decode_time_ms": decode_ms});
        if canceled {
            end["canceled"] = json!(true);
        }
        self.finish("end", &end);
    }

    fn fail(&mut self, failure: &Failure) {
        let mut error =
            json!({"code": failure.code, "message": failure.message, "retriable": failure.retriable});
        if failure.retriable {
            error["retry_after_ms"] = json!(RETRY_MS_DEFAULT);
        }
        self.finish("error", &error);
    }

    fn finish(&mut self, name: &str, data: &Value) {
        sse::encode_event(&mut self.events, name, data);
        self.over = true;
    }
}
