//! How far a daemon's loop lags behind: how long the work of each turn took, and how late the turns
//! came that a timer asked for. Pure.
//!
//! A turn that takes long delays everything that the process does: other clients, heartbeats, timers.
//! The histograms say how often; the largest turn of the last [`WINDOW_MS`] to twice as much is kept
//! beside them, because a single long turn does not show in a quantile.

use std::fmt;

use crate::metrics::{Histogram, Scrape};
use crate::time::Mono;

/// Turns that take longer are told in the log, in milliseconds: a client may notice them.
pub const SLOW_TURN_MS: u64 = 50;
/// Shortest time between two such lines, in milliseconds.
pub const SLOW_LOG_INTERVAL_MS: u64 = 60_000;
/// How long a largest turn is remembered at least, in milliseconds: longer than the usual interval
/// between scrapes.
pub const WINDOW_MS: u64 = 60_000;

/// The measurements of one loop.
#[derive(Clone, Debug, Default)]
pub struct LoopLag {
    turns: Histogram,
    late: Histogram,
    /// When the current window began.
    window_at: Mono,
    max_ns: u64,
    /// Of the window before.
    last_max_ns: u64,
    logged_at: Option<Mono>,
    unlogged: u64,
}

/// A turn that took long and is to be told in the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlowTurn {
    /// Its work took so long, in milliseconds.
    pub took_ms: u64,
    /// Slow turns since the last one that was told.
    pub others: u64,
}

impl fmt::Display for SlowTurn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a turn of the event loop took {} ms, and everything else waited", self.took_ms)?;
        if self.others > 0 {
            write!(f, "; {} other slow turns since this was last said", self.others)?;
        }
        Ok(())
    }
}

impl LoopLag {
    /// The loop woke at `now` and had asked to be woken at `deadline`. Only turns that a timer brought
    /// are counted.
    pub fn woke(&mut self, deadline: Option<Mono>, now: Mono) {
        if let Some(deadline) = deadline.filter(|deadline| *deadline <= now) {
            self.late.observe_ns(now.ns_since(deadline));
        }
    }

    /// A turn's work, begun at `began`, ended at `now`. Returns what is to be told in the log.
    pub fn worked(&mut self, began: Mono, now: Mono) -> Option<SlowTurn> {
        let took_ns = now.ns_since(began);
        self.turns.observe_ns(took_ns);
        self.turn_window(now);
        self.max_ns = self.max_ns.max(took_ns);
        if took_ns <= SLOW_TURN_MS * 1_000_000 {
            return None;
        }
        if self.logged_at.is_some_and(|at| now.ms_since(at) < SLOW_LOG_INTERVAL_MS) {
            self.unlogged += 1;
            return None;
        }
        self.logged_at = Some(now);
        Some(SlowTurn { took_ms: took_ns / 1_000_000, others: std::mem::take(&mut self.unlogged) })
    }

    /// Writes the metrics, their names beginning with `prefix`.
    pub fn scrape(&self, prefix: &str, now: Mono, scrape: &mut Scrape) {
        scrape.histogram(
            &format!("{prefix}_loop_turn_seconds"),
            "How long the work of each turn of the event loop took.",
            &self.turns,
        );
        scrape.gauge(
            &format!("{prefix}_loop_turn_seconds_max"),
            "The longest turn of the last one to two minutes.",
            &[("", self.longest_ns(now) as f64 / 1e9)],
        );
        scrape.histogram(
            &format!("{prefix}_loop_timer_late_seconds"),
            "How late the event loop woke for its timers.",
            &self.late,
        );
    }

    fn longest_ns(&self, now: Mono) -> u64 {
        match now.ms_since(self.window_at) / WINDOW_MS {
            0 => self.max_ns.max(self.last_max_ns),
            1 => self.max_ns,
            _ => 0,
        }
    }

    fn turn_window(&mut self, now: Mono) {
        let windows = now.ms_since(self.window_at) / WINDOW_MS;
        if windows > 0 {
            self.last_max_ns = if windows == 1 { self.max_ns } else { 0 };
            self.max_ns = 0;
            self.window_at = now;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn max_of(lag: &LoopLag, now: Mono) -> f64 {
        let mut scrape = Scrape::default();
        lag.scrape("x", now, &mut scrape);
        let text = scrape.finish();
        let line = text.lines().find(|line| line.starts_with("x_loop_turn_seconds_max ")).expect("the gauge");
        line.rsplit_once(' ').and_then(|(_, value)| value.parse().ok()).expect("a number")
    }

    #[test]
    fn the_longest_turn_is_remembered_for_a_while_and_then_forgotten() {
        let mut lag = LoopLag::default();
        let start = Mono(0).plus_ms(1_000_000);
        lag.worked(start, start.plus_ms(40));
        for second in 1..=60 {
            let at = start.plus_ms(second * 1_000);
            lag.worked(at, at.plus_ms(1));
            assert_eq!(max_of(&lag, at.plus_ms(1)), 0.04, "after {second} s");
        }
        for second in 61..=130 {
            let at = start.plus_ms(second * 1_000);
            lag.worked(at, at.plus_ms(1));
        }
        assert_eq!(max_of(&lag, start.plus_ms(130_001)), 0.001);
        assert_eq!(max_of(&lag, start.plus_ms(900_000)), 0.0, "an idle loop forgets too");
    }

    #[test]
    fn slow_turns_are_told_at_most_once_a_minute_and_all_are_counted() {
        let mut lag = LoopLag::default();
        let mut told = Vec::new();
        for second in 0..120 {
            let at = Mono(0).plus_ms(second * 1_000);
            told.extend(lag.worked(at, at.plus_ms(SLOW_TURN_MS + 1)));
        }
        assert_eq!(
            told,
            [SlowTurn { took_ms: 51, others: 0 }, SlowTurn { took_ms: 51, others: 59 }],
            "at 0 s and at 60 s"
        );
        assert_eq!(lag.worked(Mono(0), Mono(0).plus_ms(SLOW_TURN_MS)), None, "the limit itself is not slow");
        assert_eq!(lag.turns.count(), 121);
    }

    #[test]
    fn only_turns_that_a_timer_brought_can_be_late() {
        let mut lag = LoopLag::default();
        lag.woke(None, Mono(5));
        lag.woke(Some(Mono(9)), Mono(5));
        lag.woke(Some(Mono(4)), Mono(5));
        assert_eq!(lag.late.count(), 1);
    }
}
