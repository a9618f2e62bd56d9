//! The loop's questions: whether engines serve and what they are, whether somebody still uses them, and what
//! became of notices. Each is an exchange of the loop, and its answer goes to whom it concerns.

use serde_json::json;

use super::Daemon;
use crate::engine_provisioner::asking;
use crate::engine_provisioner::container::Contained;
use crate::engine_provisioner::notify::NoticeId;
use crate::engine_provisioner::supervision::{Input, InstanceId, Seen};
use crate::net::{self, Outcome};
use crate::reactor::token::Token;
use crate::replicas::profile::Engine as Profile;
use crate::replicas::{ProbeKind, ProbeOutcome, probe};
use crate::time::Mono;

/// So long, in milliseconds, an instance counts as used after its handoff was withdrawn: whoever watches the
/// directory has heard of it by then.
const WITHDRAWN_SEEN_MS: u64 = 50;
/// The same for one that was replaced: control planes on other machines hear of it by a heartbeat.
const REPLACED_SEEN_MS: u64 = 1_000;

/// What an exchange is about.
pub(super) enum About {
    Health(InstanceId, ProbeKind),
    Fact(InstanceId, usize, ProbeKind),
    InUse(InstanceId),
    Notice(NoticeId),
}

impl Daemon {
    pub(super) fn ask(&mut self, id: InstanceId, kind: ProbeKind, about: About, now: Mono) {
        let Some(running) = self.running.get(&id) else { return };
        let order = asking::order(&running.handoff, kind, id);
        let exchange = self.net.start(probe::outbound(&order), now);
        self.exchanges.insert(exchange, about);
    }

    pub(super) fn finished(&mut self, exchange: Token, ended: Outcome, now: Mono) {
        let Some(about) = self.exchanges.remove(&exchange) else { return };
        match about {
            About::Health(id, kind) => self.probed(id, kind, ended, now),
            About::Fact(id, index, kind) => {
                let Some(running) = self.running.get_mut(&id) else { return };
                let order = asking::order(&running.handoff, kind, id);
                if let ProbeOutcome::Facts(facts) = probe::outcome(&order, ended)
                    && let Some(warning) = asking::learn(&mut running.handoff, running.config.slots, facts)
                {
                    log::warn!("{warning}");
                }
                self.ask_fact(id, index + 1, now);
            }
            About::InUse(id) => {
                let Some(running) = self.running.get(&id) else { return };
                let key = running.config.key();
                let known = match &ended {
                    Outcome::Complete { status, body } => asking::is_known(*status, body, &key),
                    _ => None,
                };
                let answers = matches!(ended, Outcome::Complete { .. });
                if known.is_none() && answers && !std::mem::replace(&mut self.agent_trouble_told, true) {
                    log::warn!("{} does not say whether {key} is drained", self.options.pool_managerd);
                }
                let in_use = known.unwrap_or_else(|| self.has_connections(id)) || self.may_be_unseen(id, now);
                self.tell(Input::InUse(id, in_use), now);
            }
            About::Notice(id) => {
                let answer = match &ended {
                    Outcome::Complete { status, body } => Ok((*status, body.as_slice())),
                    Outcome::Failed(fault) => Err(fault.reason.clone()),
                    Outcome::ClientGone | Outcome::Cancelled => Err("given up".into()),
                };
                if let Some(text) = self.notices.ended(&id, answer, now) {
                    log::warn!("{text}");
                }
            }
        }
    }

    pub(super) fn probed(&mut self, id: InstanceId, kind: ProbeKind, ended: net::Outcome, now: Mono) {
        let Some(running) = self.running.get_mut(&id) else { return };
        if let Outcome::Complete { body, .. } = &ended {
            running.progress = asking::progress(body).or(running.progress);
        }
        let order = asking::order(&running.handoff, kind, id);
        let outcome = probe::outcome(&order, ended);
        let seen = match asking::seen(outcome, &running.handoff) {
            None if kind == ProbeKind::Health => {
                return self.ask(id, ProbeKind::Models, About::Health(id, ProbeKind::Models), now);
            }
            None => Seen::Soft("HTTP 404".into()),
            Some(seen) => seen,
        };
        let is_unknown = |contained: &Contained| contained.pid.is_none();
        if seen == Seen::Ready && running.contained.as_ref().is_some_and(is_unknown) {
            let why = "its container's main process is not known yet";
            return self.tell(Input::Probed(id, Seen::Soft(why.into())), now);
        }
        if seen == Seen::Ready && !std::mem::replace(&mut running.was_healthy, true) {
            let (key, url) = (running.config.key(), running.handoff.url.to_string());
            let pid = running.engine.pid();
            log::info!("{key} is healthy at {url}");
            self.report("healthy", Some(&key), json!({"pid": pid, "url": url}));
            return self.ask_fact(id, 0, now);
        }
        self.tell(Input::Probed(id, seen), now);
    }

    /// Asks the engine about itself, one question after the other; then it is ready.
    pub(super) fn ask_fact(&mut self, id: InstanceId, index: usize, now: Mono) {
        let Some(running) = self.running.get(&id) else { return };
        let questions = Profile::named(&running.plan.handoff.engine).questions(&running.plan.handoff);
        match questions.get(index) {
            Some(kind) => self.ask(id, *kind, About::Fact(id, index, *kind), now),
            None => self.tell(Input::Probed(id, Seen::Ready), now),
        }
    }

    /// pool-managerd is asked; where nobody answers there, the kernel's table of connections.
    pub(super) fn ask_in_use(&mut self, id: InstanceId, now: Mono) -> Option<Input> {
        let running = self.running.get_mut(&id)?;
        running.leaving_since.get_or_insert(now);
        if running.was_replaced {
            // pool-managerd knows the name by its new engine.
            let in_use = self.has_connections(id) || self.may_be_unseen(id, now);
            return Some(Input::InUse(id, in_use));
        }
        let token = self.credentials.bearer(now);
        let outbound =
            asking::about_pool(&self.options.pool_managerd, &running.config.key(), token.as_deref());
        let exchange = self.net.start(outbound, now);
        self.exchanges.insert(exchange, About::InUse(id));
        None
    }

    pub(super) fn may_be_unseen(&self, id: InstanceId, now: Mono) -> bool {
        self.running.get(&id).is_some_and(|running| {
            let limit = if running.was_replaced { REPLACED_SEEN_MS } else { WITHDRAWN_SEEN_MS };
            running.leaving_since.is_some_and(|since| now.ms_since(since) < limit)
        })
    }

    pub(super) fn has_connections(&self, id: InstanceId) -> bool {
        let Some(running) = self.running.get(&id) else { return false };
        let port = running.handoff.url.port();
        ["/proc/net/tcp", "/proc/net/tcp6"].iter().any(|table| {
            std::fs::read_to_string(table).is_ok_and(|text| asking::connections(&text, port) > 0)
        })
    }
}
