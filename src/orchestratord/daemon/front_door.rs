//! The shell's part in the front door: requests that go to engines as they came, and what is noted about
//! them for those who ask why.

use crate::http::server::Request;
use crate::net::{NetEvent, Outcome, Timing};
use crate::reactor::token::Token;
use crate::time::Now;

use super::super::affinity::Affinity;
use super::super::core::{Dispatch, Ending, Input, RequestId};
use super::super::explain::{self, Received};
use super::super::openai::Forwarding;
use super::super::patience::ClientPatience;
use super::super::sessions;
use super::super::tasks::NewTask;
use super::jobs::Front;
use super::{Daemon, Running, SESSION_FIELD};

/// How long a replica is left alone whose key file cannot be used, in milliseconds: whoever writes the file
/// again is served soon, and the log is not flooded.
const KEYLESS_PAUSE_MS: u64 = 2_000;

impl Daemon {
    /// Asks for a place for a request. Its body keeps its room in the budget until an engine answers.
    pub(super) fn forward(
        &mut self,
        client: Token,
        mut request: Box<Request>,
        mut forwarding: Forwarding,
        now: Now,
    ) {
        let mut body = std::mem::take(&mut request.body);
        let head = &request.head;
        if let Some(rewrite) = &forwarding.rewrite {
            rewrite.apply(&mut body);
        }
        let affinity = &mut forwarding.asked.ask.affinity;
        if let Some(name) = head.fields.get(SESSION_FIELD).filter(|name| sessions::is_name(name)) {
            // Said to this control plane, it counts more than what the body says to the engine.
            *affinity = Affinity::session(name);
        }
        let session = match affinity {
            Some(Affinity::Session(name)) if sessions::is_name(name) => Some(name.clone()),
            _ => None,
        };
        let room = self.net.take_body(client);
        // Checked by the route.
        let own_ms = ClientPatience::read(&head.fields).ok().and_then(|own| own.total_ms);
        let received = Received {
            id: self.net.request_id(client).unwrap_or_default(),
            path: head.path(),
            model: forwarding.asked.ask.model.as_deref(),
            alias: forwarding.alias.as_deref(),
            stream: forwarding.stream,
            slots: forwarding.asked.ask.slots,
            began: self.net.began(client).unwrap_or(now.mono),
        };
        self.explain.begin(self.next_request, &received, now);
        let number = self.open_job(Front::Engine { client, request }, body, now);
        if let Some(job) = self.jobs.get_mut(number) {
            job.room = room;
        }
        self.by_client.insert(client, number);
        if let Some(name) = session {
            self.join_session(number, name, now);
        }
        let asked = forwarding.asked;
        self.core.handle(Input::Ask { request: number, asked }, now, &mut self.effects);
        self.limit(number, own_ms, now);
    }

    /// A task is remembered by its own name, and has its room in the budget: it outlives the request that
    /// created it.
    pub(super) fn note_task(&mut self, request: RequestId, task: &NewTask, creator: Token, now: Now) {
        let ask = &task.asked.ask;
        let received = Received {
            id: &task.id,
            path: "/v2/tasks",
            model: ask.model.as_deref(),
            alias: task.alias.as_deref(),
            stream: true,
            slots: ask.slots,
            began: self.net.began(creator).unwrap_or(now.mono),
        };
        self.explain.begin(request, &received, now);
        let room = self.net.take_body(creator);
        if let Some(job) = self.jobs.get_mut(request) {
            job.room = room;
        }
    }

    /// The engine's own key cannot be had, without which it would refuse what the client may well ask: the
    /// client must not be told that its own token is bad. The log names the file, the client is not told it.
    pub(super) fn keyless(&mut self, request: RequestId, dispatch: &Dispatch, why: &str, now: Now) {
        let (node, key) = (&dispatch.node, &dispatch.key);
        log::warn!("{node}/{key} gets no requests for {KEYLESS_PAUSE_MS} ms: {why}");
        let reason = format!("the key file of {node}/{key} cannot be used");
        self.explain.attempt_ended(request, None, Some(&reason), now.mono);
        let ending = Ending::NotReady { reason, pause_ms: KEYLESS_PAUSE_MS };
        self.core.handle(Input::Ended(request, ending), now, &mut self.effects);
    }

    /// The name of the request that an event is about, as its client knows it.
    pub(super) fn name_of(&self, event: &NetEvent) -> Option<&str> {
        let client = match event {
            NetEvent::Request { client, .. } => Some(*client),
            NetEvent::Head { exchange, .. } | NetEvent::Finished { exchange, .. } => {
                let Some(Running::Request(request)) = self.exchanges.get(exchange) else { return None };
                match &self.jobs.get(*request)?.front {
                    Front::Call(client) | Front::Engine { client, .. } => Some(*client),
                    Front::Task { creator, reader, .. } => reader.or(*creator),
                }
            }
            NetEvent::ClientGone { .. } | NetEvent::Drained { .. } | NetEvent::Data { .. } => None,
        };
        self.net.correlation(client?)
    }

    /// Notes how an exchange ended, before the core decides what follows from it.
    pub(super) fn explain_attempt(&mut self, exchange: Token, outcome: &Outcome, timing: Timing) {
        let Some(Running::Request(request)) = self.exchanges.get(&exchange) else { return };
        let failure = match outcome {
            Outcome::Failed(fault) => Some(fault.reason.as_str()),
            _ => None,
        };
        self.explain.attempt_ended(*request, timing.connected, failure, timing.ended);
        let (outcome, reason) = match outcome {
            Outcome::ClientGone | Outcome::Cancelled => (explain::Outcome::Withdrawn, ""),
            Outcome::Complete { .. } => (explain::Outcome::Answered, ""),
            // What breaks behind a complete answer breaks nothing.
            Outcome::Failed(_) if self.tasks.is_answered(*request) => (explain::Outcome::Answered, ""),
            Outcome::Failed(fault) if fault.answered => (explain::Outcome::Broken, fault.reason.as_str()),
            // Another engine is tried, or the core refuses it.
            Outcome::Failed(_) => return,
        };
        self.explain.ended(*request, outcome, "", reason, timing.ended);
    }
}
