//! Polls on their way: the control plane asks, and the agent, the links and time decide what comes back.

use llama_orch::orchestratord::messages::PollError;
use llama_orch::orchestratord::poller::{PollId, PollOrder};
use llama_orch::wire::pool::AgentReport;
use llama_orch::wire::url::BaseUrl;

use crate::world::{Arrival, Event, World, url};

/// What comes of a poll.
pub(crate) type PollOutcome = Result<Box<AgentReport>, PollError>;

impl World {
    /// The agents that a control plane polls in this story.
    pub(crate) fn polled_agents(&self) -> Vec<BaseUrl> {
        let all = 0..self.nodes.len();
        let agents = all.map(|node| url(&format!("http://10.0.0.{}:9200", node + 1)));
        agents.filter(|_| self.polls).collect()
    }

    pub(crate) fn poll(&mut self, order: PollOrder) {
        let host: usize = order.to.host().trim_start_matches("10.0.0.").parse().expect("a node's address");
        let (node, id) = (host - 1, order.id);
        let Some(life) = self.control.as_ref().map(|control| control.life) else { return };
        let outcome = Err(PollError::Unreachable("timed out".into()));
        self.after(order.timeout_ms, Event::PollEnds { node, life, id, outcome });
        let delay_ms = self.delay_ms();
        if self.nodes[node].down_cut_until <= self.now.mono && !self.chance(self.loss_percent) {
            self.after(delay_ms, Event::PollArrives { node, life, id });
        }
    }

    /// The agent tells how it stands now; what it says takes a while to come back.
    pub(crate) fn poll_arrives(&mut self, node: usize, life: u64, id: PollId) {
        let delay_ms = self.delay_ms();
        let known = &self.nodes[node];
        if known.up_cut_until > self.now.mono {
            return;
        }
        let outcome = match &known.agent {
            Some(agent) => Ok(Box::new(agent.core.report())),
            None => Err(PollError::Unreachable("connection refused".into())),
        };
        self.after(delay_ms, Event::PollEnds { node, life, id, outcome });
    }

    /// The first end of a poll counts; the core knows which polls are over.
    pub(crate) fn poll_ends(&mut self, node: usize, life: u64, id: PollId, outcome: PollOutcome) {
        let lives = self.control.as_ref().is_some_and(|control| control.life == life);
        if lives {
            self.note(&format!("n{node} poll ends: {:?}", outcome.as_ref().map(|report| report.incarnation)));
            self.arrive(Arrival::Polled(id, outcome));
        }
    }
}
