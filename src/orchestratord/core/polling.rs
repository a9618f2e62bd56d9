//! What polls and callbacks tell: both end in the service registry, by the door that heartbeats use, or in
//! nothing.

use super::{Core, Effect};
use crate::orchestratord::messages::{PollError, PoolReady, RequestId};
use crate::orchestratord::poller::{Hint, PollId, PollState, Poller};
use crate::orchestratord::refusal::Refusal;
use crate::orchestratord::service_registry::{Change, Polled};
use crate::time::Now;
use crate::wire::id::{NodeId, PoolId};
use crate::wire::pool::AgentReport;
use crate::wire::url::BaseUrl;

impl Core {
    /// The agents that are polled.
    #[must_use]
    pub fn poller(&self) -> &Poller {
        &self.poller
    }

    /// Begins the polls that are due.
    pub(super) fn send_polls(&mut self, now: Now, effects: &mut Vec<Effect>) {
        let (registry, mut happenings) = (&self.registry, Vec::new());
        let orders = self.poller.due(now, |node| registry.beats(node, now), &mut happenings);
        effects.extend(orders.into_iter().map(Effect::Poll));
        for happening in happenings {
            self.happened(happening, now, effects);
        }
    }

    /// Takes what came of a poll.
    pub(super) fn polled(
        &mut self,
        id: PollId,
        outcome: Result<Box<AgentReport>, PollError>,
        now: Now,
        changes: &mut Vec<Change>,
        effects: &mut Vec<Effect>,
    ) {
        let Some((url, sent)) = self.poller.under_way(id) else { return };
        let node = outcome.as_ref().ok().map(|report| report.node_id.clone());
        let taken = outcome.map(|report| self.registry.polled(&report, url, sent, now, changes));
        let (label, state, error) = match taken {
            Ok(Ok(Polled::Taken)) => ("taken", PollState::Answers, None),
            Ok(Ok(Polled::Stale)) => ("stale", PollState::Answers, None),
            Ok(Ok(Polled::Heartbeats)) => ("heartbeats", PollState::Heartbeats, None),
            Ok(Ok(Polled::Elsewhere)) => ("duplicate", PollState::Duplicate, None),
            Ok(Err(fenced)) => ("refused", PollState::Refused, Some(fenced.to_string())),
            Err(PollError::Unusable(why)) => ("unusable", PollState::Unusable, Some(why)),
            Err(PollError::Unreachable(why)) => ("unreachable", PollState::Unreachable, Some(why)),
        };
        *self.counts.polls.entry(label).or_default() += 1;
        if let Some(happening) = self.poller.ended(id, state, error, node, now) {
            self.happened(happening, now, effects);
        }
    }

    /// A node's agent has accepted an order about a pool. That it takes no new work counts at once; that it takes
    /// work again, once it says so: its engines may have become something else meanwhile.
    pub(super) fn pool_ordered(
        &mut self,
        node: &NodeId,
        pool: &PoolId,
        draining: bool,
        now: Now,
        changes: &mut Vec<Change>,
    ) {
        if draining {
            self.registry.drains(node, pool, now, changes);
        }
        let hint = Hint { node: Some(node), url: None };
        self.poller.hint(&hint, |_| false, now);
    }

    /// Somebody says that a pool became ready, or stopped being ready: whoever knows is asked at once. What
    /// the notice says itself is not believed, and no address in it is dialled that is not polled anyway.
    pub(super) fn pool_ready(
        &mut self,
        reply: RequestId,
        notice: &PoolReady,
        now: Now,
        effects: &mut Vec<Effect>,
    ) {
        let PoolReady { pool_id, node_id, url } = notice;
        let registry = &self.registry;
        let url = url.as_deref().and_then(|url| BaseUrl::lenient(url).ok());
        let hint = Hint { node: node_id.as_ref(), url: url.as_ref() };
        let asked = self.poller.hint(&hint, |node| registry.has_pool(node, pool_id), now);
        // A node that registered tells by itself, also of pools that are new.
        let is_known = match node_id {
            Some(node) => registry.node(node).is_some(),
            None => registry.nodes().any(|node| registry.has_pool(&node.id, pool_id)),
        };
        if asked > 0 || is_known || self.local.is_some() {
            effects.push(Effect::Noted(reply));
        } else {
            let what = match node_id {
                Some(node) => {
                    format!("node {node} is not known: it has neither registered nor answered a poll")
                }
                None => format!("pool {pool_id} is not known on any node"),
            };
            effects.push(Effect::Refuse(reply, Refusal::NotFound(what)));
        }
    }
}

#[cfg(test)]
mod tests;
