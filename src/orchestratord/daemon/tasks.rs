//! Tasks and sessions, as the shell sees them: a task's events go to whoever opened them.

use std::sync::Arc;

use serde_json::json;

use crate::http::fields::FieldLines;
use crate::http::server::Response;
use crate::net::Fault;
use crate::net::buffer::HIGH_WATER_BYTES;
use crate::orchestratord::blame;
use crate::orchestratord::core::{Dispatch, Effect, Ending, Input, RequestId};
use crate::orchestratord::explain;
use crate::orchestratord::refusal::{RETRY_MS_DEFAULT, Refusal};
use crate::orchestratord::sessions::{self, Turn};
use crate::orchestratord::tasks::{self, Budget, EVENTS_BYTES_MAX, Measured, NewTask, Progress, Standing};
use crate::reactor::token::Token;
use crate::time::{Mono, Now, earliest};

use super::{Daemon, Front, Job};

/// Bytes of its answer that a task may keep without room among the bodies: those that its record counts for.
const KEPT_FREE_BYTES: usize = 1_024;

impl Daemon {
    /// When [`Daemon::tasks_turn`] is wanted next.
    pub(super) fn tasks_deadline(&self) -> Option<Mono> {
        earliest(self.tasks.deadline(), self.sessions.deadline())
    }

    /// What time does to tasks and sessions.
    pub(super) fn tasks_turn(&mut self, now: Now) {
        for request in self.tasks.expire(now.mono) {
            self.withdraw(request, now);
        }
        for request in self.tasks.due_narrations(now) {
            if let Some(place) = self.core.queue_place(request, now) {
                let standing = Standing {
                    position: Some(place.position),
                    predicted_ms: place.predicted_ms,
                    not_ready: None,
                };
                self.tasks.queued(request, &standing, place.depth);
                self.push_task_events(request, now);
            }
        }
        self.sessions.expire(now.mono);
    }

    pub(super) fn create_task(&mut self, client: Token, task: NewTask, now: Now) {
        if let Err(refusal) = self.tasks.check_new(&task.id) {
            return self.net.respond(client, &refusal.response(false), now.mono);
        }
        let front = Front::Task { creator: Some(client), reader: None, path: task.path };
        let request = self.open_job(front, task.body.clone(), now);
        self.note_task(request, &task, client, now);
        let asked = Box::new(task.asked.clone());
        self.core.handle(Input::Ask { request, asked }, now, &mut self.effects);
        self.limit(request, None, now);
        // The core has decided in this call: placed, waiting or refused.
        let mut standing = Standing::placed();
        for effect in &self.effects {
            match effect {
                // Carrying it out tells the creator.
                Effect::Refuse(id, _) if *id == request => return,
                Effect::Waiting { request: id, position, predicted_ms, not_ready, .. } if *id == request => {
                    standing = Standing {
                        position: Some(*position),
                        predicted_ms: *predicted_ms,
                        not_ready: not_ready.clone(),
                    };
                }
                _ => {}
            }
        }
        if let Some(Job { front: Front::Task { creator, .. }, .. }) = self.jobs.get_mut(request) {
            *creator = None;
        }
        let created = self.tasks.create(&task, request, &standing, now);
        debug_assert!(created.is_ok(), "checked above");
        let steps = tasks::steps(self.core.registry().preparations(&task.asked.ask));
        if let Some(name) = &task.session {
            self.join_session(request, name.clone(), now);
        }
        let mut response = Response::json(202, &tasks::admission_body(&task.id, &standing, steps));
        let budget = Budget { tokens: u64::from(task.tokens_max), time_ms: task.deadline_ms };
        for (name, value) in budget_fields(budget) {
            response = response.with(name, value);
        }
        self.net.respond(client, &response, now.mono);
    }

    pub(super) fn open_task(&mut self, client: Token, id: &str, verbose: bool, now: Now) {
        let request = match self.tasks.open(id, verbose, now) {
            Ok(request) => request,
            Err(refusal) => return self.net.respond(client, &refusal.response(false), now.mono),
        };
        self.by_client.insert(client, request);
        match self.jobs.get_mut(request) {
            Some(Job { front: Front::Task { reader, .. }, .. }) => *reader = Some(client),
            _ => {
                // It is over already; what is left are its events.
                let front = Front::Task { creator: None, reader: Some(client), path: "" };
                self.jobs.insert(request, Job::new(front, Vec::new(), now));
            }
        }
        let mut fields = FieldLines::new().with("Cache-Control", "no-cache").with("X-Accel-Buffering", "no");
        for (name, value) in self.tasks.budget(request, now).map(budget_fields).unwrap_or_default() {
            fields.push(name, value);
        }
        self.net.stream_begin(client, "text/event-stream", fields, now.mono);
        self.push_task_events(request, now);
    }

    pub(super) fn cancel_task(&mut self, client: Token, id: &str, now: Now) {
        // Its events end first, so that nothing which the engine still sends comes behind this answer.
        if let Some(request) = self.tasks.cancel(id, now) {
            self.push_task_events(request, now);
            self.withdraw(request, now);
        }
        self.net.respond(client, &Response::empty(204), now.mono);
    }

    /// A request's engine is about to be asked.
    pub(super) fn task_dispatched(&mut self, request: RequestId, dispatch: &Dispatch, now: Now) {
        if let Some(name) = self.jobs.get(request).and_then(|job| job.session.clone()) {
            let to = (dispatch.key.clone(), dispatch.node.clone(), dispatch.generation);
            self.sessions.sent(&name, to, now.mono);
        }
        if !matches!(self.jobs.get(request), Some(Job { front: Front::Task { .. }, .. })) {
            return;
        }
        let strategy = self.config.strategy;
        let to = format!("{}/{}, chosen by {strategy}", dispatch.node, dispatch.key);
        let facts = json!({
            "node_id": dispatch.node,
            "pool_id": dispatch.key.pool,
            "replica_id": dispatch.key.replica,
            "placement_strategy": strategy.as_str(),
            "queue_depth": self.core.waiting(),
        });
        self.tasks.dispatched(request, &to, facts, now);
        self.push_task_events(request, now);
    }

    /// The head of a request's answer.
    pub(super) fn task_head(&mut self, request: RequestId, status: u16, now: Now) {
        let Some(job) = self.jobs.get(request) else { return };
        if let Some(name) = job.session.as_ref().filter(|_| status == 200) {
            self.sessions.answering(name);
        }
        if matches!(job.front, Front::Task { .. }) {
            self.tasks.answering(request, status);
            self.push_task_events(request, now);
        }
    }

    pub(super) fn data(&mut self, exchange: Token, bytes: &[u8], now: Now) {
        let Some(super::Running::Request(request)) = self.exchanges.get(&exchange) else { return };
        let request = *request;
        if !self.jobs.contains(request) {
            return;
        }
        let progress = self.tasks.received(request, bytes, now);
        if let Progress::Answered(Some(measured)) = progress {
            self.note_answer(request, measured, now);
        }
        self.push_task_events(request, now);
        if progress == Progress::Unusable {
            let why = "the engine's answer is of no use";
            self.explain.ended(request, explain::Outcome::Broken, "", why, now.mono);
            self.net.cancel(exchange, now.mono);
            return;
        }
        let has_room = self.find_room(request);
        let is_opened = self.tasks.is_opened(request);
        if !has_room && is_opened {
            // What is kept is an answer that must be whole before anybody can read it.
            let why = "no room in memory for the engine's answer";
            self.tasks.failed(request, "POOL_UNAVAILABLE", why, Some(RETRY_MS_DEFAULT));
            self.push_task_events(request, now);
            self.explain.ended(request, explain::Outcome::Broken, "", why, now.mono);
            self.net.cancel(exchange, now.mono);
        } else if !is_opened && (!has_room || self.tasks.unread_bytes(request) > EVENTS_BYTES_MAX) {
            // Its reader lets it go on.
            self.net.pause(exchange, true);
        }
    }

    /// Counts what is kept of a task's answer among the bodies. False if there is no room for it.
    fn find_room(&mut self, request: RequestId) -> bool {
        let bytes = self.tasks.kept_bytes(request).saturating_sub(KEPT_FREE_BYTES);
        self.tasks.room(request).is_none_or(|room| self.net.keep(room, bytes))
    }

    /// The exchange of a task ended with a whole answer, or with one that lacks nothing.
    pub(super) fn task_answered(&mut self, request: RequestId, now: Now) {
        if let Some(measured) = self.tasks.completed(request, now) {
            self.note_answer(request, measured, now);
        }
    }

    fn note_answer(&mut self, request: RequestId, measured: Measured, now: Now) {
        let input = Input::Measured {
            request,
            first_token_ms: measured.first_token_ms,
            tokens: measured.tokens,
            decode_ms: measured.decode_ms,
        };
        self.core.handle(input, now, &mut self.effects);
        self.leave_session(request, Some(measured.turn), now);
    }

    /// What the failure of an exchange means for its request.
    pub(super) fn task_fault(&mut self, request: RequestId, fault: Fault, now: Now) -> Ending {
        if !matches!(self.jobs.get(request), Some(Job { front: Front::Task { .. }, .. })) {
            return blame::ending(fault);
        }
        // What breaks behind a complete answer breaks nothing.
        if fault.answered && self.tasks.is_answered(request) {
            self.task_answered(request, now);
            return Ending::Complete;
        }
        let reason = fault.reason.clone();
        let ending = blame::ending(fault);
        match &ending {
            Ending::Failed { answered: true, timeout, .. } => self.tasks.broken(request, &reason, *timeout),
            Ending::Aborted { answered: true } => {
                self.tasks.failed(request, Refusal::OutOfTime.code(), &reason, Refusal::OutOfTime.retry_ms());
            }
            Ending::Failed { .. } | Ending::NotReady { .. } | Ending::Aborted { .. } => {
                self.tasks.retried(request, &reason);
            }
            Ending::BrokenOff(_) | Ending::NotTried(_) | Ending::Complete | Ending::Withdrawn => {}
        }
        ending
    }

    /// Gives a task's reader what is new; ends the stream behind the last event.
    pub(super) fn push_task_events(&mut self, request: RequestId, now: Now) {
        let Some(Job { front: Front::Task { reader, .. }, exchange, .. }) = self.jobs.get(request) else {
            return;
        };
        let exchange = *exchange;
        let Some(reader) = *reader else { return };
        let (events, over) = self.tasks.take_events(request);
        let mut backlog = 0;
        if !events.is_empty() {
            backlog = self.net.stream_push(reader, &events, now.mono);
        }
        if over {
            self.net.stream_end(reader, now.mono);
            self.by_client.remove(&reader);
            if exchange.is_none() {
                self.close_job(request, now);
            } else if let Some(Job { front: Front::Task { reader, .. }, .. }) = self.jobs.get_mut(request) {
                // Its exchange has not ended yet; nobody listens to it any more.
                *reader = None;
            }
        }
        if let Some(exchange) = exchange {
            self.net.pause(exchange, !over && backlog > HIGH_WATER_BYTES);
        }
    }

    pub(super) fn resume_task(&mut self, client: Token) {
        let request = self.by_client.get(&client);
        if let Some(exchange) = request.and_then(|id| self.jobs.get(*id)).and_then(|job| job.exchange) {
            self.net.pause(exchange, false);
        }
    }

    // Sessions.

    /// A request belongs to a session until its job is closed.
    pub(super) fn join_session(&mut self, request: RequestId, name: Arc<str>, now: Now) {
        self.sessions.began(&name, now.mono);
        if let Some(job) = self.jobs.get_mut(request) {
            job.session = Some(name);
        }
    }

    /// A request's part in its session is over.
    pub(super) fn leave_session(&mut self, request: RequestId, turn: Option<Turn>, now: Now) {
        if let Some(name) = self.jobs.get_mut(request).and_then(|job| job.session.take()) {
            self.sessions.ended(&name, turn, now.mono);
        }
    }

    pub(super) fn show_session(&mut self, client: Token, name: &str, now: Now) {
        let response = match self.sessions.get(name, now.mono) {
            Some((session, ttl_ms)) => {
                let registry = self.core.registry();
                let stands = session.served_by.as_ref().is_some_and(|(key, node, generation)| {
                    registry.replicas().any(|(_, known)| {
                        known.key == *key
                            && known.node == *node
                            && known.generation == *generation
                            && known.obstacle().is_none()
                    })
                });
                Response::json(200, &session_body(name, session, ttl_ms, stands))
            }
            None => {
                let idle_s = sessions::IDLE_MS / 1000;
                let text = format!("there is no session {name:?}, or none for the last {idle_s} s");
                Refusal::NotFound(text).response(false)
            }
        };
        self.net.respond(client, &response, now.mono);
    }

    pub(super) fn end_session(&mut self, client: Token, name: &str, now: Now) {
        self.sessions.forget(name);
        self.core.forget_session(name);
        self.net.respond(client, &Response::empty(204), now.mono);
    }
}

/// A session for programs. `stands`: the replica that served it last takes work. What nobody knows is
/// null: engines do not tell the size of their cache, and nothing limits a session but its time.
fn session_body(name: &str, session: &sessions::Session, ttl_ms: u64, stands: bool) -> serde_json::Value {
    let served_by = session.served_by.as_ref().map(|(key, node, generation)| {
        json!({"node_id": node, "pool_id": key.pool, "replica_id": key.replica, "generation": generation})
    });
    json!({
        "session_id": name,
        "ttl_ms_remaining": ttl_ms,
        "turns": session.turns,
        "tokens_out": session.tokens_out,
        "kv_bytes": null,
        "kv_warmth": session.is_warm && stands,
        "cached_tokens": session.cached_tokens,
        "last_replica": served_by,
        "tokens_budget_remaining": null,
        "time_budget_remaining_ms": ttl_ms,
        "cost_budget_remaining": null,
    })
}

fn budget_fields(budget: Budget) -> Vec<(&'static str, String)> {
    let mut fields = vec![("X-Budget-Tokens-Remaining", budget.tokens.to_string())];
    fields.extend(budget.time_ms.map(|ms| ("X-Budget-Time-Remaining-Ms", ms.to_string())));
    fields
}
