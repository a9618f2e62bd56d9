//! What happened when, and the table made of it. PURE.
//!
//! Two sources tell times on the wall clock of this machine, in nanoseconds: the provisioner's report
//! lines and orchestratord's events. Their difference is a measurement because the clock is one. What
//! `up` does itself it measures on its own monotonic clock and hands in as durations.

use serde::Deserialize;

/// The replica that `up` starts.
pub(super) const REPLICA: &str = "pool-0/r0";

/// A line of `engine-provisioner --report`.
#[derive(Clone, Debug, Default, Deserialize)]
pub(super) struct Report {
    /// `spawned`, `healthy`, `handoff_written` or `stopped`.
    pub(super) event: String,
    /// When, in nanoseconds since the Unix epoch.
    pub(super) at_ns: u64,
    /// The engine's process.
    pub(super) pid: Option<u32>,
    /// The handoff file.
    pub(super) path: Option<String>,
    /// Where the engine listens.
    pub(super) url: Option<String>,
}

/// The answer to `GET /v2/events`.
#[derive(Debug, Deserialize)]
pub(super) struct EventPage {
    pub(super) events: Vec<Event>,
    /// The number that the next event will have.
    pub(super) next: u64,
}

/// One state change as orchestratord tells it.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct Event {
    pub(super) at_ns: u64,
    pub(super) kind: String,
    pub(super) subject: String,
    pub(super) state: String,
    pub(super) text: String,
}

impl Event {
    /// Whether it is about the replica that `up` starts, whichever way its name is written.
    pub(super) fn is_ours(&self) -> bool {
        let key = self.subject.strip_suffix(REPLICA);
        self.kind == "replica" && key.is_some_and(|node| node.is_empty() || node.ends_with('/'))
    }
}

/// The first time of each step, in nanoseconds since the Unix epoch.
#[derive(Debug, Default)]
pub(super) struct Timeline {
    /// From the start of `up`, not a time of day.
    daemons: Option<u64>,
    spawned: Option<u64>,
    healthy: Option<u64>,
    written: Option<u64>,
    seen: Option<u64>,
    ready: Option<u64>,
    routable: Option<u64>,
    /// Events of the replica that came before the report of its handoff: the report takes another way.
    early: Vec<Event>,
}

/// Events that wait for the report of the handoff: those of one replica, which takes a handful of steps.
const EARLY_MAX: usize = 64;

/// What was measured of the request, in nanoseconds from its sending.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct AnswerTimes {
    pub(super) first_byte: u64,
    pub(super) first_token: Option<u64>,
    pub(super) last_byte: u64,
    /// What the engine says that reading the prompt took.
    pub(super) prefill: Option<u64>,
}

/// One line of the table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Row {
    pub(super) label: &'static str,
    /// Nanoseconds; `None` where it could not be told.
    pub(super) ns: Option<u64>,
    pub(super) note: &'static str,
}

impl Timeline {
    /// Both daemons answer, so many nanoseconds after the start of `up`.
    pub(super) fn daemons_answer(&mut self, after_ns: u64) {
        self.daemons = Some(after_ns);
    }

    /// Takes a line of the provisioner.
    pub(super) fn report(&mut self, report: &Report) {
        let step = match report.event.as_str() {
            "spawned" => &mut self.spawned,
            "healthy" => &mut self.healthy,
            "handoff_written" => &mut self.written,
            _ => return,
        };
        step.get_or_insert(report.at_ns);
        if self.written.is_some() {
            for event in std::mem::take(&mut self.early) {
                self.event(&event);
            }
        }
    }

    /// Takes an event of the replica. Events from before its handoff are about what an earlier run
    /// left behind and count for nothing.
    pub(super) fn event(&mut self, event: &Event) {
        if !event.is_ours() {
            return;
        }
        let Some(written) = self.written else {
            if self.early.len() == EARLY_MAX {
                self.early.remove(0);
            }
            return self.early.push(event.clone());
        };
        if event.at_ns < written {
            return;
        }
        let step = match event.state.as_str() {
            "found" | "replaced" => &mut self.seen,
            "ready" => &mut self.ready,
            "routable" => &mut self.routable,
            _ => return,
        };
        step.get_or_insert(event.at_ns);
    }

    /// Whether the handoff is there to be seen.
    pub(super) fn is_handed_over(&self) -> bool {
        self.written.is_some()
    }

    /// Whether the replica is given requests.
    pub(super) fn is_routable(&self) -> bool {
        self.routable.is_some()
    }

    /// The table. `to_first_token` is from the start of `up`, in nanoseconds.
    pub(super) fn rows(&self, answer: &AnswerTimes, to_first_token: Option<u64>) -> Vec<Row> {
        let between = |from: Option<u64>, to: Option<u64>| Some(to?.saturating_sub(from?));
        let row = |label, ns, note| Row { label, ns, note };
        let engine_start = between(self.spawned, self.healthy);
        let mut rows = vec![
            row("start of up -> daemons answer", self.daemons, "two processes, each asked for its health"),
            row("engine spawned -> healthy", engine_start, "the engine's own time"),
            row("handoff written -> seen", between(self.written, self.seen), "inotify, listing, parsing"),
            row("seen -> ready", between(self.seen, self.ready), "health probe"),
            row(
                "ready -> routable",
                between(self.ready, self.routable),
                "one turn of the loop: same clock sample",
            ),
            row("request -> first byte", Some(answer.first_byte), "the answer's head"),
            row("request -> first token", answer.first_token, "includes the engine's reading of the prompt"),
            row(
                "first byte -> last byte",
                Some(answer.last_byte.saturating_sub(answer.first_byte)),
                "the engine's pace",
            ),
            row("start of up -> first token", to_first_token, "everything"),
        ];
        // Told apart only where the engine says what reading the prompt took.
        if let (Some(all), Some(start), Some(prefill)) = (to_first_token, engine_start, answer.prefill) {
            let ours = all.saturating_sub(start).saturating_sub(prefill);
            rows.push(row(
                "  without the engine's own",
                Some(ours),
                "its start and its reading of the prompt",
            ));
        }
        rows
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(event: &str, at_ns: u64) -> Report {
        Report { event: event.into(), at_ns, ..Report::default() }
    }

    fn event(subject: &str, state: &str, at_ns: u64) -> Event {
        let (kind, text) = ("replica".to_string(), String::new());
        Event { at_ns, kind, subject: subject.into(), state: state.into(), text }
    }

    #[test]
    fn the_steps_are_differences_of_one_clock() {
        let mut timeline = Timeline::default();
        timeline.daemons_answer(9);
        [("spawned", 100), ("healthy", 150), ("handoff_written", 160)]
            .iter()
            .for_each(|(name, at)| timeline.report(&report(name, *at)));
        assert!(timeline.is_handed_over() && !timeline.is_routable());
        for (subject, state, at) in [
            (REPLICA, "found", 167),
            (REPLICA, "probing", 168),
            (REPLICA, "ready", 180),
            ("local/pool-0/r0", "routable", 181),
            (REPLICA, "found", 500),
        ] {
            timeline.event(&event(subject, state, at));
        }
        assert!(timeline.is_routable());
        let answer = AnswerTimes { first_byte: 3, first_token: Some(23), last_byte: 90, prefill: Some(20) };
        let ns: Vec<_> = timeline.rows(&answer, Some(400)).iter().map(|row| row.ns).collect();
        let expected = [9, 50, 7, 13, 1, 3, 23, 87, 400, 330].map(Some);
        assert_eq!(ns, expected);
    }

    #[test]
    fn a_report_that_comes_after_the_events_it_led_to_changes_nothing() {
        let mut timeline = Timeline::default();
        for (subject, state, at) in
            [(REPLICA, "found", 21), (REPLICA, "ready", 22), ("local/pool-0/r0", "routable", 23)]
        {
            timeline.event(&event(subject, state, at));
        }
        assert!(!timeline.is_routable());
        timeline.report(&report("handoff_written", 20));
        assert!(timeline.is_routable());
    }

    #[test]
    fn what_an_earlier_run_left_behind_is_not_measured() {
        let mut timeline = Timeline::default();
        timeline.event(&event(REPLICA, "found", 10));
        timeline.report(&report("handoff_written", 20));
        timeline.event(&event(REPLICA, "ready", 15));
        timeline.event(&event("local/pool-0/r0", "routable", 19));
        timeline.event(&event("local/other-pool-0/r0", "routable", 30));
        assert!(!timeline.is_routable());
        let rows = timeline.rows(&AnswerTimes::default(), Some(5));
        let unknown = rows.iter().filter(|row| row.ns.is_none()).count();
        assert_eq!((rows.len(), unknown), (9, 6), "the daemons, four steps, the first token: {rows:?}");
    }
}
