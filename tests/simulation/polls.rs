//! Polls on their way: a control plane asks, and the agent, the links and time decide what comes back.
//!
//! A poll needs both directions. It may be lost on either way, and slow on either way; a process that
//! stands still answers when it runs again, if anybody waits then. What is answered is how the agent is
//! when it is asked, so that it may be outdated when it is read. Each end of a poll is told, and the
//! first one counts.

use llama_orch::orchestratord::messages::PollError;
use llama_orch::orchestratord::poller::{PollId, PollOrder};
use llama_orch::wire::pool::AgentReport;
use llama_orch::wire::url::BaseUrl;

use crate::control::{Arrival, STALLED_PAUSE_MS};
use crate::links::{Dialect, told_by_a_newer};
use crate::world::{Event, World, url};

/// What comes of a poll.
pub(crate) type PollOutcome = Result<Box<AgentReport>, PollError>;

/// Which poll of which process, and whom it asks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Poll {
    plane: usize,
    life: u64,
    node: usize,
    id: PollId,
    timeout_ms: u64,
}

impl World {
    /// The agents that a control plane which starts now polls: all that there are, twins included.
    pub(crate) fn polled_agents(&self) -> Vec<BaseUrl> {
        let all = (0..self.nodes.len()).filter(|_| self.poll_interval_ms.is_some());
        all.map(|node| url(&format!("http://10.0.0.{}:9200", node + 1))).collect()
    }

    pub(crate) fn send_poll(&mut self, plane: usize, order: PollOrder) {
        let now = self.now.mono;
        let PollOrder { id, to, timeout_ms } = order;
        let node = self.machine_at(to.ip().expect("an address"));
        let Some(control) = &mut self.planes[plane].control else { return };
        control.members.poll_sent(id, to, now);
        let poll = Poll { plane, life: control.life, node, id, timeout_ms };
        self.after(
            timeout_ms,
            Event::PollEnds { poll, outcome: Err(PollError::Unreachable("timed out".into())) },
        );
        let delay_ms = self.poll_delay_ms(timeout_ms);
        if self.is_down_cut(node, plane) || self.chance(self.loss_percent) {
            self.totals.count("polls lost");
            return;
        }
        self.after(delay_ms, Event::PollArrives(poll));
    }

    /// The agent tells how it is now; what it says takes a while to come back.
    pub(crate) fn poll_arrives(&mut self, poll: Poll) {
        let Poll { plane, node, timeout_ms, .. } = poll;
        let known = &self.nodes[node];
        let outcome = match &known.agent {
            None => Err(PollError::Unreachable("connection refused".into())),
            // Its kernel has taken the connection.
            Some(agent) if agent.stalled => return self.after(STALLED_PAUSE_MS, Event::PollArrives(poll)),
            Some(agent) => Ok(Box::new(in_its_dialect(known.dialect, agent.core.report()))),
        };
        let delay_ms = self.poll_delay_ms(timeout_ms);
        if self.is_up_cut(node, plane) || self.chance(self.loss_percent) {
            self.totals.count("polls lost");
            return;
        }
        let outcome = match outcome {
            Ok(_) if self.chance(self.loss_percent) => Err(PollError::Unusable("half an answer".into())),
            outcome => outcome,
        };
        self.after(delay_ms, Event::PollEnds { poll, outcome });
    }

    pub(crate) fn poll_ends(&mut self, poll: Poll, outcome: PollOutcome) {
        let Poll { plane, life, id, .. } = poll;
        if self.planes[plane].control.as_ref().is_some_and(|control| control.life == life) {
            self.arrive(plane, Arrival::Polled(id, outcome));
        }
    }

    /// Now and then about as long as anybody waits: what was true then need not be true any more.
    fn poll_delay_ms(&mut self, timeout_ms: u64) -> u64 {
        if self.chaos && self.chance(15) {
            self.random.u64(0..timeout_ms * 11 / 10)
        } else {
            self.random.u64(0..20)
        }
    }
}

fn in_its_dialect(dialect: Dialect, mut report: AgentReport) -> AgentReport {
    match dialect {
        Dialect::Ours | Dialect::Previous => report,
        Dialect::Old => {
            (report.machine_id, report.version) = (None, None);
            (report.incarnation, report.boot_id) = (None, None);
            report.draining = false;
            report.gpu_loads.clear();
            report
        }
        Dialect::Newer => {
            // A drain is told where it was asked for, and not again for everything below.
            for pool in &mut report.pools {
                for replica in pool.replicas.iter_mut().filter(|_| report.draining || pool.draining) {
                    (replica.ready, replica.draining) = (true, false);
                }
                pool.draining &= !report.draining;
            }
            told_by_a_newer(&report)
        }
    }
}
