//! What ends an exchange from here: the request's own time is over, or its engine's node has vanished
//! before it said a word.
//!
//! A node that falls silent proves little: where bytes come, the engine lives, and its streams are left
//! alone. An answer that has not begun is another matter once the node is offline or has left: if
//! another engine would take the request now, it goes there.

use super::{ATTEMPTS_MAX, Core, Effect, Mono, RequestId};
use crate::orchestratord::placement::{Choice, choose};
use crate::orchestratord::refusal::Refusal;
use crate::time::Now;
use crate::wire::id::NodeId;

/// Why an exchange was ended from here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Abort {
    /// The request's time is over.
    OutOfTime,
    /// It goes to another engine.
    Moved,
    /// Its engine is drained, and the drain's deadline has passed.
    Drained,
}

impl Core {
    /// A request may take so long altogether, from its ask to its last byte.
    pub(super) fn limit(&mut self, id: RequestId, total_ms: u64) {
        let Some(request) = self.requests.get_mut(&id) else { return };
        let at = request.since.plus_ms(total_ms);
        if let Some((earlier, _)) = request.limit.replace((at, total_ms)) {
            self.limits.remove(&(earlier, id));
        }
        self.limits.insert((at, id));
    }

    /// When [`Core::end_overdue`] is wanted next.
    pub(super) fn limits_deadline(&self) -> Option<Mono> {
        self.limits.first().map(|(at, _)| *at)
    }

    /// Ends requests whose time is over.
    pub(super) fn end_overdue(&mut self, now: Now, effects: &mut Vec<Effect>) {
        while let Some(&(at, id)) = self.limits.first()
            && at <= now.mono
        {
            self.limits.pop_first();
            let Some(request) = self.requests.get_mut(&id) else { continue };
            let limit_ms = request.limit.take().map_or(0, |(_, total_ms)| total_ms);
            match &mut request.running {
                Some(run) => {
                    request.is_overdue = true;
                    run.abort = Some(Abort::OutOfTime);
                    let reason = format!("the request took longer than the {limit_ms} ms that it may take");
                    effects.push(Effect::Abort { request: id, reason, even_answered: true });
                }
                None => {
                    self.admission.remove(id);
                    self.refuse(id, Refusal::OutOfTime, effects);
                }
            }
        }
    }

    /// A node is offline or has left.
    pub(super) fn recall(&mut self, node: &NodeId, effects: &mut Vec<Effect>) {
        let mut silent: Vec<RequestId> = self
            .requests
            .iter()
            .filter(|(_, request)| {
                let is_silent = |run: &super::Run| run.node == *node && !run.answering && run.abort.is_none();
                let has_attempts = request.attempts - request.untried < ATTEMPTS_MAX;
                has_attempts && request.running.as_ref().is_some_and(is_silent)
            })
            .map(|(id, _)| *id)
            .collect();
        silent.sort_unstable();
        for id in silent {
            let Some(request) = self.requests.get_mut(&id) else { continue };
            let Some(run) = &mut request.running else { continue };
            let excluded = [&request.tried[..], &[run.grant.replica()]].concat();
            let state = &mut self.strategy_state;
            let found = choose(&self.registry, &request.asked.ask, &excluded, self.strategy, state);
            if matches!(found.choice, Choice::Replica { .. }) {
                run.abort = Some(Abort::Moved);
                let reason = format!("node {node} is gone");
                effects.push(Effect::Abort { request: id, reason, even_answered: false });
            }
        }
    }
}
