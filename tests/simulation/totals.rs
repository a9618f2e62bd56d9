//! What happened over all seeds: a simulation in which nothing happens proves nothing.

use std::collections::BTreeMap;

/// How often something happened, by its name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Totals(BTreeMap<&'static str, u64>);

/// What must have happened at least once in the stories that are told by default.
const EVENTFUL: &[&str] = &[
    "faults",
    "requests answered",
    "requests refused",
    "requests withdrawn",
    "requests broken",
    "requests cut off",
    "requests waited",
    "requests retried",
    "heartbeats taken",
    "calls refused",
    "calls delayed",
    "calls repeated",
    "calls lost",
    "answers lost",
    "messages of an ended start",
    "goodbyes of an ended start",
    "registrations of a twin",
    "twins refused",
    "nodes suspected",
    "expiry held",
    "expiry held to its end",
    "agents exited",
    "agents stopped twice",
    "agents stopped at start",
    "agents stalled",
    "agents without their state",
    "control planes exited",
    "control planes stalled",
    "nodes restored",
    "state files too old",
    "wall clocks set",
    "old agents asked",
    "newer messages",
    "files half written",
    "events lost",
    "events repeated",
    "events overflowed",
    "directories away",
    "steady one-way partitions",
];

impl Totals {
    pub(crate) fn count(&mut self, what: &'static str) {
        self.count_many(what, 1);
    }

    pub(crate) fn count_many(&mut self, what: &'static str, times: u64) {
        *self.0.entry(what).or_default() += times;
    }

    pub(crate) fn add(&mut self, other: &Totals) {
        other.0.iter().for_each(|(what, times)| self.count_many(what, *times));
    }

    /// Every kind of story was told.
    pub(crate) fn assert_eventful(&self) {
        let missing: Vec<_> = EVENTFUL.iter().filter(|what| !self.0.contains_key(**what)).collect();
        assert!(missing.is_empty(), "it never happened: {missing:?}; it did: {self:?}");
    }
}
