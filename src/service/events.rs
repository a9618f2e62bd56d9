//! The last state changes of a daemon, as `GET /v2/events` tells them. Pure.

use std::borrow::Cow;
use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;

use serde::Serialize;

use crate::time::Wall;

/// Changes that are remembered.
pub const EVENTS_MAX: usize = 1000;

/// A state change, in words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Happening {
    /// What changed: `node`, `agent`, `replica`, `gpu`, `file`, `drain`, `callback`, `membership`, `task` or
    /// `daemon`.
    pub kind: &'static str,
    /// What it was about: a node, a pool and replica, a file.
    pub subject: String,
    /// The new state, as the API spells it; empty where the event is not about one.
    pub state: &'static str,
    /// What happened, for people.
    pub text: String,
    /// Whether an operator should look at it.
    pub is_warning: bool,
}

/// What can be put into words. That happens when somebody asks: a change is on its way to whom it
/// concerns before anybody describes it.
pub trait Tell: fmt::Debug + Send + Sync {
    /// The words.
    fn happening(&self) -> Cow<'_, Happening>;
}

/// The same words are the same news.
impl PartialEq for dyn Tell {
    fn eq(&self, other: &dyn Tell) -> bool {
        self.happening() == other.happening()
    }
}

impl Eq for dyn Tell {}

impl Tell for Happening {
    fn happening(&self) -> Cow<'_, Happening> {
        Cow::Borrowed(self)
    }
}

/// A remembered change.
#[derive(Debug)]
struct Event {
    at: Wall,
    what: Arc<dyn Tell>,
}

/// As `GET /v2/events` tells it.
#[derive(Debug, Serialize)]
struct Told<'a> {
    /// Grows by one with every event of this process.
    seq: u64,
    /// When, in nanoseconds since the Unix epoch.
    at_ns: u64,
    kind: &'static str,
    subject: &'a str,
    state: &'static str,
    text: &'a str,
}

/// The remembered events, oldest first.
#[derive(Debug, Default)]
pub struct Events {
    ring: VecDeque<Event>,
    next_seq: u64,
}

impl Events {
    /// Remembers what happened; the oldest event goes if there are too many.
    pub fn push(&mut self, what: Arc<dyn Tell>, at: Wall) {
        if self.ring.len() == EVENTS_MAX {
            self.ring.pop_front();
        }
        self.ring.push_back(Event { at, what });
        self.next_seq += 1;
    }

    /// Events with a number of at least `seq`, with their numbers.
    fn since(&self, seq: u64) -> impl Iterator<Item = (u64, &Event)> {
        let first = self.next_seq - self.ring.len() as u64;
        let skipped = usize::try_from(seq.saturating_sub(first)).unwrap_or(usize::MAX);
        (first..).zip(&self.ring).skip(skipped)
    }

    /// The number of the next event.
    #[must_use]
    pub fn next_seq(&self) -> u64 {
        self.next_seq
    }

    /// The newest events with a number of at least `seq`, `limit` of them at most, oldest first: number, time and
    /// what can be put into words.
    pub fn newest(&self, seq: u64, limit: usize) -> impl Iterator<Item = (u64, Wall, &dyn Tell)> {
        let seq = seq.max(self.next_seq.saturating_sub(limit as u64));
        self.since(seq).map(|(seq, event)| (seq, event.at, &*event.what))
    }

    /// The answer to `GET /v2/events?since=N`.
    #[must_use]
    pub fn to_json(&self, since: u64) -> serde_json::Value {
        let told = |(seq, event): (u64, &Event)| {
            let Happening { kind, subject, state, text, .. } = &*event.what.happening();
            let told = Told { seq, at_ns: event.at.0, kind, subject, state, text };
            serde_json::to_value(told).unwrap_or_default()
        };
        let events: Vec<serde_json::Value> = self.since(since).map(told).collect();
        serde_json::json!({ "events": events, "next": self.next_seq })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_thousand_are_kept_and_found_by_number() {
        let mut events = Events::default();
        for n in 0..1500 {
            let text = n.to_string();
            let happening =
                Happening { kind: "node", subject: String::new(), state: "", text, is_warning: false };
            events.push(Arc::new(happening), Wall(n));
        }
        let numbers = |since| events.since(since).map(|(seq, _)| seq).collect::<Vec<_>>();
        assert_eq!((numbers(0).len(), numbers(0)[0]), (EVENTS_MAX, 500));
        assert_eq!(numbers(1498), [1498, 1499]);
        let newest = |since, limit| events.newest(since, limit).map(|(seq, ..)| seq).collect::<Vec<_>>();
        assert_eq!(
            (newest(0, 2), newest(1499, 50), newest(1500, 50)),
            (vec![1498, 1499], vec![1499], vec![])
        );
        assert_eq!((numbers(1500).len(), events.to_json(0)["next"].as_u64()), (0, Some(1500)));
    }
}
