//! When which agent is polled.
//!
//! Nodes that send heartbeats need no poll. For others the operator names their agents' URLs, and each of
//! them is asked for its report once an interval: the daemon sends what [`Poller::due`] orders, the service
//! registry judges the answer, and [`Poller::ended`] notes what came of it.
//!
//! ```text
//!               ┌── interval +-20 % ◀── any answer ──┐
//!   due ──▶ under way ───────────────────────────────┤
//!    ▲          └── 0.5 s, doubled, up to 30 s ◀── no usable answer
//!    └── hint: at once, or right after the poll that is under way
//! ```
//!
//! An agent has at most one poll under way, and a turn begins at most [`POLLS_PER_TURN_MAX`]. A hint
//! (somebody says that there is news) begins a poll out of turn, but at most one an agent and
//! [`HINT_MS`]: what comes in between is one poll at the end of that time. An agent whose node beats is
//! passed over until its heartbeats stop.

use std::collections::BTreeSet;

use crate::service::events::Happening;
use crate::time::{Mono, Now, Wall};
use crate::wire::id::NodeId;
use crate::wire::url::BaseUrl;

/// Most agents that are polled: what a person still lists by hand. Larger fleets register.
pub const POLLED_MAX: usize = 256;
/// Most polls that one turn of the loop begins; the next turn follows at once.
pub const POLLS_PER_TURN_MAX: usize = 16;
/// Least time between two polls of an agent that hints began, in milliseconds.
pub const HINT_MS: u64 = 250;
/// Pause after the first failure, in milliseconds; it doubles with every further one.
pub const BACKOFF_MS_MIN: u64 = 500;
/// Longest pause after a failure, in milliseconds.
pub const BACKOFF_MS_MAX: u64 = 30_000;
/// Longest that a poll may take, in milliseconds, however long the interval: an agent answers from memory.
pub const TIMEOUT_MS_MAX: u64 = 5_000;
/// Longest error that is shown, in characters.
const ERROR_CHARS_MAX: usize = 300;

/// Names a poll until it has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PollId {
    agent: usize,
    number: u64,
}

/// A poll to be sent. What came of it is handed to [`Poller::ended`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PollOrder {
    /// Its name.
    pub id: PollId,
    /// The agent.
    pub to: BaseUrl,
    /// Limit for all of it, in milliseconds: at most half of the interval.
    pub timeout_ms: u64,
}

/// Where an agent stands. Written in the API as spelt here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum PollState {
    /// It has not been heard of yet.
    Waiting,
    /// It answers, and its node is what it says.
    Answers,
    /// It is not polled because its node sends heartbeats.
    Heartbeats,
    /// It answers under another URL too, and is known by that.
    Duplicate,
    /// It answers, but its node's name belongs to another one.
    Refused,
    /// It answers something that is no report.
    Unusable,
    /// It does not answer.
    Unreachable,
}

/// Every state, for the metrics.
pub const POLL_STATES: [PollState; 7] = [
    PollState::Waiting,
    PollState::Answers,
    PollState::Heartbeats,
    PollState::Duplicate,
    PollState::Refused,
    PollState::Unusable,
    PollState::Unreachable,
];

/// What may come of a poll, as the metrics spell it.
pub const POLL_OUTCOMES: [&str; 7] =
    ["taken", "stale", "heartbeats", "duplicate", "refused", "unusable", "unreachable"];

/// Who is meant by a hint; what is absent narrows nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hint<'a> {
    /// The node.
    pub node: Option<&'a NodeId>,
    /// The agent's URL.
    pub url: Option<&'a BaseUrl>,
}

/// The polled agents. See the file's text.
#[derive(Debug)]
pub struct Poller {
    interval_ms: u64,
    agents: Vec<Agent>,
    /// Exactly the agents without a poll under way, by the time of their next one.
    schedule: BTreeSet<(Mono, usize)>,
    last_number: u64,
    random: fastrand::Rng,
}

#[derive(Debug)]
struct Agent {
    url: BaseUrl,
    /// When its next poll is due; `None` while one is under way.
    due: Option<Now>,
    /// The poll under way, and when it was sent.
    under_way: Option<(u64, Mono)>,
    /// The next poll is one that a hint asked for.
    is_hinted: bool,
    /// When a hint last began a poll.
    hinted_at: Option<Mono>,
    failures: u32,
    state: PollState,
    since: Wall,
    error: Option<String>,
    /// The node that it last said it is.
    node: Option<NodeId>,
    answered_at: Option<Wall>,
}

impl PollState {
    /// The name in the API.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            PollState::Waiting => "waiting",
            PollState::Answers => "answers",
            PollState::Heartbeats => "heartbeats",
            PollState::Duplicate => "duplicate",
            PollState::Refused => "refused",
            PollState::Unusable => "unusable",
            PollState::Unreachable => "unreachable",
        }
    }

    /// Whether an operator should look at it.
    fn is_trouble(self) -> bool {
        matches!(self, PollState::Refused | PollState::Unusable | PollState::Unreachable)
    }

    fn is_failure(self) -> bool {
        matches!(self, PollState::Unusable | PollState::Unreachable)
    }
}

impl Poller {
    /// Polls `urls`, the first [`POLLED_MAX`] of them and each once, beginning now. `seed` decides the
    /// jitter.
    #[must_use]
    pub fn new(urls: &[BaseUrl], interval_ms: u64, seed: u64, now: Now) -> Poller {
        let mut agents: Vec<Agent> = Vec::new();
        for url in urls {
            if agents.len() < POLLED_MAX && !agents.iter().any(|known| known.url == *url) {
                agents.push(Agent::new(url.clone(), now));
            }
        }
        let schedule = (0..agents.len()).map(|index| (now.mono, index)).collect();
        let random = fastrand::Rng::with_seed(seed);
        Poller { interval_ms: interval_ms.max(1), agents, schedule, last_number: 0, random }
    }

    /// Orders the polls that are due. `beats` tells whether a node's heartbeats arrive.
    pub fn due(
        &mut self,
        now: Now,
        beats: impl Fn(&NodeId) -> bool,
        happenings: &mut Vec<Happening>,
    ) -> Vec<PollOrder> {
        let mut orders = Vec::new();
        while orders.len() < POLLS_PER_TURN_MAX
            && let Some(&(at, index)) = self.schedule.first()
            && at <= now.mono
        {
            let agent = &mut self.agents[index];
            if agent.node.as_ref().is_some_and(&beats) {
                happenings.extend(agent.become_state(PollState::Heartbeats, None, now));
                (agent.is_hinted, agent.failures) = (false, 0);
                let pause_ms = self.jittered_ms(self.interval_ms);
                self.plan(index, Some(now.plus_ms(pause_ms)));
                continue;
            }
            if std::mem::take(&mut agent.is_hinted) {
                agent.hinted_at = Some(now.mono);
            }
            self.last_number += 1;
            agent.under_way = Some((self.last_number, now.mono));
            orders.push(PollOrder {
                id: PollId { agent: index, number: self.last_number },
                to: agent.url.clone(),
                timeout_ms: (self.interval_ms / 2).clamp(1, TIMEOUT_MS_MAX),
            });
            self.plan(index, None);
        }
        orders
    }

    /// When [`Poller::due`] is wanted next.
    #[must_use]
    pub fn deadline(&self) -> Option<Mono> {
        self.schedule.first().map(|(at, _)| *at)
    }

    /// The agent of a poll that is under way, and when the poll was sent.
    #[must_use]
    pub fn under_way(&self, id: PollId) -> Option<(&BaseUrl, Mono)> {
        let agent = self.agents.get(id.agent)?;
        let (_, sent) = agent.under_way.filter(|(number, _)| *number == id.number)?;
        Some((&agent.url, sent))
    }

    /// Notes what came of a poll: the state of its agent, why if that is not [`PollState::Answers`], and the
    /// node that it says it is. Returns what is news to people.
    pub fn ended(
        &mut self,
        id: PollId,
        state: PollState,
        error: Option<String>,
        node: Option<NodeId>,
        now: Now,
    ) -> Option<Happening> {
        self.under_way(id)?;
        let agent = &mut self.agents[id.agent];
        agent.under_way = None;
        if let Some(node) = node {
            agent.node = Some(node);
            agent.answered_at = Some(now.wall);
        }
        agent.failures = if state.is_failure() { agent.failures.saturating_add(1) } else { 0 };
        let happening = agent.become_state(state, error, now);
        let (failures, is_hinted) = (agent.failures, agent.is_hinted);
        let pause_ms = match failures {
            0 => self.jittered_ms(self.interval_ms),
            _ => self.backoff_ms(failures),
        };
        let next = now.plus_ms(pause_ms);
        self.plan(id.agent, Some(next));
        if is_hinted {
            self.hasten(id.agent, now);
        }
        happening
    }

    /// Polls the agents that a hint may mean at once, and returns how many these are. `concerns` tells which
    /// of the known nodes a hint that names no node is about; if it is about none of them, any may be meant.
    pub fn hint(&mut self, hint: &Hint<'_>, concerns: impl Fn(&NodeId) -> bool, now: Now) -> usize {
        let by = |fits: &dyn Fn(&Agent) -> bool| -> Vec<usize> {
            (0..self.agents.len()).filter(|index| fits(&self.agents[*index])).collect()
        };
        let by_url = by(&|agent| hint.url == Some(&agent.url));
        let meant = match hint.node {
            _ if !by_url.is_empty() => by_url,
            Some(node) => match by(&|agent| agent.node.as_ref() == Some(node)) {
                // It may be the first sign of life of an agent that could not be asked for its name.
                none if none.is_empty() => by(&|agent| agent.node.is_none() || agent.state.is_failure()),
                known => known,
            },
            None => match by(&|agent| agent.node.as_ref().is_some_and(&concerns)) {
                none if none.is_empty() => by(&|_| true),
                known => known,
            },
        };
        for index in &meant {
            self.agents[*index].is_hinted = true;
            self.hasten(*index, now);
        }
        meant.len()
    }

    /// How many agents are polled.
    #[must_use]
    pub fn len(&self) -> usize {
        self.agents.len()
    }

    /// Whether no agent is polled.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.agents.is_empty()
    }

    /// How many agents are in a state.
    #[must_use]
    pub fn count(&self, state: PollState) -> usize {
        self.agents.iter().filter(|agent| agent.state == state).count()
    }

    /// Agents that an operator should look at: where they are, how they stand, and why.
    pub fn troubled(&self) -> impl Iterator<Item = (&BaseUrl, PollState, Option<&str>)> {
        let troubled = self.agents.iter().filter(|agent| agent.state.is_trouble());
        troubled.map(|agent| (&agent.url, agent.state, agent.error.as_deref()))
    }

    /// Every agent, for the API.
    #[must_use]
    pub fn to_json(&self) -> Vec<serde_json::Value> {
        let view = |agent: &Agent| {
            serde_json::json!({
                "url": agent.url,
                "state": agent.state.as_str(),
                "since_ms": agent.since.unix_ms(),
                "error": agent.error,
                "node_id": agent.node,
                "failures": agent.failures,
                "last_answer_ms": agent.answered_at.map(Wall::unix_ms),
                "next_poll_at_ms": agent.due.map(|due| due.wall.unix_ms()),
            })
        };
        self.agents.iter().map(view).collect()
    }

    /// Panics where the state contradicts itself. For tests and simulations.
    pub fn check_invariants(&self) {
        assert!(self.agents.len() <= POLLED_MAX, "too many agents");
        for (index, agent) in self.agents.iter().enumerate() {
            assert_ne!(
                agent.due.is_some(),
                agent.under_way.is_some(),
                "{}: planned and under way",
                agent.url
            );
            assert!(agent.due.is_none_or(|due| self.schedule.contains(&(due.mono, index))), "never polled");
        }
        let planned = self.agents.iter().filter(|agent| agent.due.is_some()).count();
        assert_eq!(planned, self.schedule.len(), "a stray plan");
    }

    /// Sets when an agent is polled next.
    fn plan(&mut self, index: usize, due: Option<Now>) {
        if let Some(before) = std::mem::replace(&mut self.agents[index].due, due) {
            self.schedule.remove(&(before.mono, index));
        }
        if let Some(due) = due {
            self.schedule.insert((due.mono, index));
        }
    }

    /// Brings the next poll forward, as far as hints may. One under way is left alone: it is followed by
    /// another when it ends.
    fn hasten(&mut self, index: usize, now: Now) {
        let agent = &self.agents[index];
        let Some(due) = agent.due else { return };
        let rest_ms = agent.hinted_at.map_or(0, |last| last.plus_ms(HINT_MS).ms_since(now.mono));
        // Rounded up: whole milliseconds are kept to.
        let rest_ms = rest_ms + u64::from(rest_ms > 0);
        let at = now.plus_ms(rest_ms);
        if at.mono < due.mono {
            self.plan(index, Some(at));
        }
    }

    /// Within 20 % of `ms`, so that agents are not polled in step.
    fn jittered_ms(&mut self, ms: u64) -> u64 {
        (ms - ms / 5 + self.random.u64(..=ms / 5 * 2)).max(1)
    }

    fn backoff_ms(&mut self, failures: u32) -> u64 {
        let doubled = BACKOFF_MS_MIN << failures.saturating_sub(1).min(16);
        let pause_ms = self.jittered_ms(doubled.min(BACKOFF_MS_MAX));
        pause_ms.min(BACKOFF_MS_MAX)
    }
}

impl Agent {
    fn new(url: BaseUrl, now: Now) -> Agent {
        Agent {
            url,
            due: Some(now),
            under_way: None,
            is_hinted: false,
            hinted_at: None,
            failures: 0,
            state: PollState::Waiting,
            since: now.wall,
            error: None,
            node: None,
            answered_at: None,
        }
    }

    /// Takes a new state, and says so where people want to know: trouble began, changed or ended, or it
    /// answered for the first time.
    fn become_state(&mut self, state: PollState, error: Option<String>, now: Now) -> Option<Happening> {
        self.error = error.map(|error| {
            let plain = error.chars().map(|c| if c.is_control() { ' ' } else { c });
            plain.take(ERROR_CHARS_MAX).collect()
        });
        if self.state == state {
            return None;
        }
        let before = std::mem::replace(&mut self.state, state);
        self.since = now.wall;
        let is_news = state.is_trouble() || before.is_trouble() || before == PollState::Waiting;
        let reason = self.error.as_deref().map(|error| format!(": {error}")).unwrap_or_default();
        let node = self.node.as_ref().map(|node| format!(" (node {node})")).unwrap_or_default();
        let text = match state {
            PollState::Waiting => return None,
            PollState::Answers if before.is_trouble() => format!("{}{node} answers polls again", self.url),
            PollState::Answers => format!("{}{node} answers polls", self.url),
            PollState::Heartbeats => format!("{}{node} is not polled: its heartbeats arrive", self.url),
            PollState::Duplicate => format!("{}{node} is known by another URL already", self.url),
            PollState::Refused => format!("{}{node} is not taken in{reason}", self.url),
            PollState::Unusable | PollState::Unreachable => {
                format!("{}{node} cannot be polled{reason}; it is tried again", self.url)
            }
        };
        is_news.then(|| Happening {
            kind: "agent",
            subject: self.url.to_string(),
            state: state.as_str(),
            text,
            is_warning: state.is_trouble(),
        })
    }
}

#[cfg(test)]
mod tests;
