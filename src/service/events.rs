//! The last state changes of a daemon, as `GET /v2/events` tells them. Pure.

use std::collections::VecDeque;

use serde::Serialize;

use crate::time::Wall;

/// Changes that are remembered.
pub const EVENTS_MAX: usize = 1000;

/// One state change.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Event {
    /// Grows by one with every event of this process.
    pub seq: u64,
    /// When, in nanoseconds since the Unix epoch.
    pub at_ns: u64,
    /// What changed: `node`, `agent`, `replica`, `gpu`, `file`, `drain`, `callback`, `membership`, `task` or `daemon`.
    pub kind: &'static str,
    /// What it was about: a node, a pool and replica, a file.
    pub subject: String,
    /// The new state, as the API spells it; empty where the event is not about one.
    pub state: &'static str,
    /// What happened, for people.
    pub text: String,
}

/// An event before it has its number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Happening {
    /// See [`Event::kind`].
    pub kind: &'static str,
    /// See [`Event::subject`].
    pub subject: String,
    /// See [`Event::state`].
    pub state: &'static str,
    /// See [`Event::text`].
    pub text: String,
    /// Whether an operator should look at it.
    pub is_warning: bool,
}

/// The remembered events, oldest first.
#[derive(Debug, Default)]
pub struct Events {
    ring: VecDeque<Event>,
    next_seq: u64,
}

impl Events {
    /// Remembers what happened; the oldest event goes if there are too many.
    pub fn push(&mut self, happening: &Happening, at: Wall) {
        if self.ring.len() == EVENTS_MAX {
            self.ring.pop_front();
        }
        self.ring.push_back(Event {
            seq: self.next_seq,
            at_ns: at.0,
            kind: happening.kind,
            subject: happening.subject.clone(),
            state: happening.state,
            text: happening.text.clone(),
        });
        self.next_seq += 1;
    }

    /// Events with a number of at least `seq`.
    pub fn since(&self, seq: u64) -> impl Iterator<Item = &Event> {
        let first = self.ring.front().map_or(0, |event| event.seq);
        self.ring.iter().skip(usize::try_from(seq.saturating_sub(first)).unwrap_or(usize::MAX))
    }

    /// The answer to `GET /v2/events?since=N`.
    #[must_use]
    pub fn to_json(&self, since: u64) -> serde_json::Value {
        let events: Vec<&Event> = self.since(since).collect();
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
            events.push(&happening, Wall(n));
        }
        let numbers = |since| events.since(since).map(|e| e.seq).collect::<Vec<_>>();
        assert_eq!((numbers(0).len(), numbers(0)[0]), (EVENTS_MAX, 500));
        assert_eq!(numbers(1498), [1498, 1499]);
        assert_eq!((numbers(1500).len(), events.to_json(0)["next"].as_u64()), (0, Some(1500)));
    }
}
