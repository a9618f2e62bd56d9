//! The last minutes in bins of five seconds: requests, tokens, times to the first token, and who waited. Pure.
//!
//! Counters are read when a bin ends, by the first turn of the loop behind its end: while the loop slept,
//! nothing was counted, so that nobody has to be woken for it. The bin that has not ended yet is read when
//! somebody asks.

use std::collections::VecDeque;

use serde::Serialize;

use crate::time::Now;

/// Length of a bin, in milliseconds.
pub const BIN_MS: u64 = 5_000;
/// Bins that are kept: ten minutes.
pub const BINS_MAX: usize = 120;
/// Classes of times to the first token; each is half again as long as the one before, from a millisecond to
/// some ten minutes.
const CLASSES: usize = 34;
/// End of the first class, in nanoseconds.
const FIRST_CLASS_NS: u64 = 1_000_000;

/// What is counted elsewhere, since the process started, and how things stand.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sample {
    /// Requests that were answered.
    pub answered: u64,
    /// Requests that were refused.
    pub refused: u64,
    /// Requests whose engine failed within its answer.
    pub broken: u64,
    /// Pieces of streams that followed another one.
    pub pieces: u64,
    /// Requests that wait for a slot.
    pub waiting: u64,
    /// Requests on an engine.
    pub running: u64,
}

/// One bin, as watchers are told it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Bin {
    /// Its number since the process started.
    pub number: u64,
    /// When it began, in milliseconds since the Unix epoch.
    pub at_ms: u64,
    /// Requests that were answered in it.
    pub answered: u64,
    /// Requests that were refused in it.
    pub refused: u64,
    /// Requests whose engine failed within its answer.
    pub broken: u64,
    /// Tokens of answers: pieces of streams as they passed, and what engines told of other answers.
    pub tokens: u64,
    /// Requests that waited when it ended.
    pub waiting: u64,
    /// Requests on an engine when it ended.
    pub running: u64,
    /// Time to the first token that half of the streams were below, in milliseconds; `None` without a stream.
    pub first_token_p50_ms: Option<u64>,
    /// The same for 95 of 100.
    pub first_token_p95_ms: Option<u64>,
}

/// The bins. See the introduction of this file.
#[derive(Debug)]
pub struct History {
    ended: VecDeque<Bin>,
    began: Now,
    number: u64,
    /// What the counters said when the present bin began.
    before: Sample,
    /// Tokens of the present bin that no counter tells.
    tokens: u64,
    first_tokens: [u32; CLASSES],
}

impl History {
    /// Nothing has happened yet.
    #[must_use]
    pub fn new(now: Now) -> History {
        History {
            ended: VecDeque::new(),
            began: now,
            number: 0,
            before: Sample::default(),
            tokens: 0,
            first_tokens: [0; CLASSES],
        }
    }

    /// Ends the bins that are over. `sample` is asked only if one is.
    pub fn turn(&mut self, now: Now, sample: impl FnOnce() -> Sample) {
        let over = now.mono.ms_since(self.began.mono) / BIN_MS;
        if over == 0 {
            return;
        }
        let sample = sample();
        // Those before the last few are forgotten at once.
        let skipped = over.saturating_sub(BINS_MAX as u64 + 1);
        self.end_bin(&sample);
        self.began = self.began.plus_ms(skipped * BIN_MS);
        self.number += skipped;
        for _ in 1..(over - skipped) {
            self.end_bin(&sample);
        }
    }

    fn end_bin(&mut self, sample: &Sample) {
        if self.ended.len() == BINS_MAX {
            self.ended.pop_front();
        }
        self.ended.push_back(self.present(sample));
        self.before = *sample;
        self.tokens = 0;
        self.first_tokens = [0; CLASSES];
        self.began = self.began.plus_ms(BIN_MS);
        self.number += 1;
    }

    /// A stream ended whose first token came so long after its ask. It was a token of its own, which no counter of
    /// gaps tells.
    pub fn streamed(&mut self, first_token_ns: u64) {
        let mut class = 0;
        let mut end = FIRST_CLASS_NS;
        while first_token_ns > end && class + 1 < CLASSES {
            class += 1;
            end += end / 2;
        }
        self.first_tokens[class] = self.first_tokens[class].saturating_add(1);
        self.tokens += 1;
    }

    /// An answer ended that was no stream.
    pub fn answered_at_once(&mut self, tokens: u64) {
        self.tokens += tokens;
    }

    /// All bins, the present one last.
    pub fn bins(&self, sample: &Sample) -> Vec<Bin> {
        self.ended.iter().copied().chain([self.present(sample)]).collect()
    }

    /// The last bin that ended, and the present one.
    pub fn newest(&self, sample: &Sample) -> Vec<Bin> {
        self.ended.back().copied().into_iter().chain([self.present(sample)]).collect()
    }

    fn present(&self, sample: &Sample) -> Bin {
        let before = &self.before;
        Bin {
            number: self.number,
            at_ms: self.began.wall.unix_ms(),
            answered: sample.answered.saturating_sub(before.answered),
            refused: sample.refused.saturating_sub(before.refused),
            broken: sample.broken.saturating_sub(before.broken),
            tokens: sample.pieces.saturating_sub(before.pieces) + self.tokens,
            waiting: sample.waiting,
            running: sample.running,
            first_token_p50_ms: self.quantile(50),
            first_token_p95_ms: self.quantile(95),
        }
    }

    /// The end of the class that holds so many hundredths, in milliseconds.
    fn quantile(&self, percent: u64) -> Option<u64> {
        let count: u64 = self.first_tokens.iter().map(|n| u64::from(*n)).sum();
        let wanted = (count * percent).div_ceil(100).max(1);
        let (mut seen, mut end) = (0, FIRST_CLASS_NS);
        for n in self.first_tokens {
            seen += u64::from(n);
            if seen >= wanted {
                return Some(end / 1_000_000);
            }
            end += end / 2;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_sleep_ends_many_bins_and_what_was_counted_belongs_to_the_first() {
        let start = Now::default();
        let mut history = History::new(start);
        history.turn(start.plus_ms(4_999), || panic!("no bin is over"));
        let sample = Sample { answered: 7, waiting: 2, ..Sample::default() };
        history.turn(start.plus_ms(17_000), || sample);
        let bins = history.bins(&sample);
        let told: Vec<_> =
            bins.iter().map(|bin| (bin.number, bin.at_ms, bin.answered, bin.waiting)).collect();
        assert_eq!(told, [(0, 0, 7, 2), (1, 5_000, 0, 2), (2, 10_000, 0, 2), (3, 15_000, 0, 2)]);
    }

    #[test]
    fn a_long_sleep_costs_no_more_than_the_bins_that_are_kept() {
        let mut history = History::new(Now::default());
        history.turn(Now::default().plus_ms(365 * 24 * 3_600_000), Sample::default);
        let bins = history.bins(&Sample::default());
        assert_eq!(bins.len(), BINS_MAX + 1);
        assert_eq!(bins[BINS_MAX].number, 365 * 24 * 3_600_000 / BIN_MS);
        assert!(bins.windows(2).all(|pair| pair[1].at_ms == pair[0].at_ms + BIN_MS));
    }

    proptest! {
        /// Nothing is lost and nothing is counted twice, however turns fall.
        #[test]
        fn bins_add_up(steps in proptest::collection::vec((0u64..12_000, 0u64..50, 0u64..5), 1..60)) {
            let (mut now, mut sample) = (Now::default(), Sample::default());
            let mut history = History::new(now);
            let mut at_once = 0;
            for (pause_ms, pieces, tokens) in steps {
                now = now.plus_ms(pause_ms);
                history.turn(now, || sample);
                sample.pieces += pieces;
                history.answered_at_once(tokens);
                at_once += tokens;
            }
            let bins = history.bins(&sample);
            prop_assume!(bins.len() <= BINS_MAX);
            prop_assert_eq!(bins.iter().map(|bin| bin.tokens).sum::<u64>(), sample.pieces + at_once);
        }

        /// A quantile is never below the truth, and at most half above it.
        #[test]
        fn quantiles_are_near(times in proptest::collection::vec(2_000_000u64..500_000_000_000, 1..200)) {
            let mut history = History::new(Now::default());
            times.iter().for_each(|ns| history.streamed(*ns));
            let bin = history.bins(&Sample::default())[0];
            let mut sorted = times.clone();
            sorted.sort_unstable();
            let truth_ms = sorted[(sorted.len() * 95).div_ceil(100) - 1] / 1_000_000;
            let told = bin.first_token_p95_ms.expect("there were streams");
            prop_assert!(told >= truth_ms && told <= truth_ms * 3 / 2 + 2, "{} for {}", told, truth_ms);
        }
    }
}
