//! When an engine that failed is started again. PURE.
//!
//! Three limits, from the inside out. *Backoff*: the pause before a start doubles with every failure in a
//! row, from a second to a minute, shortened by up to half at random so that engines which failed together
//! do not start together. *Breaker*: after [`BREAKER_FAILURES`] failures in a row the pause is
//! [`BREAKER_OPEN_MS`], with one attempt after each; an engine that cannot start then costs little. Both are
//! forgotten once an engine has served for [`STABLE_MS`]. *Storm*: all engines of this program together are
//! started again at most [`STORM_STARTS_MAX`] times in [`STORM_WINDOW_MS`]: a fault that they share (a
//! driver, a full disk) must not keep the machine busy with loading models.

use std::collections::VecDeque;

use crate::time::Mono;

/// Pause after the first failure, in milliseconds.
pub const BACKOFF_MS_MIN: u64 = 1_000;
/// Longest pause of the backoff, in milliseconds: an operator who repaired something waits no longer.
pub const BACKOFF_MS_MAX: u64 = 60_000;
/// Serving for so long, in milliseconds, makes earlier failures forgotten.
pub const STABLE_MS: u64 = 5 * 60_000;
/// Failures in a row from which on the breaker is open: by then every pause up to 16 s was tried.
pub const BREAKER_FAILURES: u32 = 6;
/// Pause between attempts while the breaker is open, in milliseconds.
pub const BREAKER_OPEN_MS: u64 = 5 * 60_000;
/// Length of the window in which restarts are counted, in milliseconds.
pub const STORM_WINDOW_MS: u64 = 60_000;
/// Restarts of all engines together within it: every engine of the largest usual machine (16) once.
pub const STORM_STARTS_MAX: usize = 16;

/// The failures in a row of one engine.
#[derive(Clone, Debug, Default)]
pub struct Failures(u32);

/// How long an engine stays down, and whether its breaker is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pause {
    /// In milliseconds.
    pub ms: u64,
    /// Whether it is the breaker's pause.
    pub is_open: bool,
}

impl Failures {
    /// One more failure, of an engine that had served for `served_ms`.
    pub fn add(&mut self, served_ms: Option<u64>, rng: &mut fastrand::Rng) -> Pause {
        if served_ms.is_some_and(|ms| ms >= STABLE_MS) {
            self.0 = 0;
        }
        self.0 = self.0.saturating_add(1);
        let is_open = self.0 >= BREAKER_FAILURES;
        let longest = match is_open {
            true => BREAKER_OPEN_MS,
            false => BACKOFF_MS_MAX.min(BACKOFF_MS_MIN.saturating_mul(1 << (self.0 - 1).min(16))),
        };
        Pause { ms: rng.u64(longest / 2..=longest), is_open }
    }

    /// Failures in a row.
    #[must_use]
    pub fn count(&self) -> u32 {
        self.0
    }

    /// Forgets them: an operator wants a new beginning.
    pub fn forget(&mut self) {
        self.0 = 0;
    }
}

/// The restarts of all engines within the window.
#[derive(Debug, Default)]
pub struct Storm(VecDeque<Mono>);

impl Storm {
    /// Counts a restart now, if there is room for one.
    ///
    /// # Errors
    /// When there will be.
    pub fn admit(&mut self, now: Mono) -> Result<(), Mono> {
        while self.0.front().is_some_and(|first| now.ms_since(*first) >= STORM_WINDOW_MS) {
            self.0.pop_front();
        }
        match self.0.front() {
            Some(first) if self.0.len() >= STORM_STARTS_MAX => Err(first.plus_ms(STORM_WINDOW_MS)),
            _ => {
                self.0.push_back(now);
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn pauses_double_to_a_minute_and_never_shrink_to_nothing(seed: u64) {
            let mut rng = fastrand::Rng::with_seed(seed);
            let mut failures = Failures::default();
            for n in 0..BREAKER_FAILURES - 1 {
                let longest = (1_000u64 << n).min(60_000);
                let pause = failures.add(Some(STABLE_MS - 1), &mut rng);
                prop_assert!(!pause.is_open && (longest / 2..=longest).contains(&pause.ms), "{n}: {pause:?}");
            }
            for _ in 0..40 {
                let pause = failures.add(None, &mut rng);
                prop_assert!(pause.is_open && (150_000..=300_000).contains(&pause.ms), "{pause:?}");
            }
            let pause = failures.add(Some(STABLE_MS), &mut rng);
            prop_assert!(!pause.is_open && pause.ms <= 1_000, "it was stable: {pause:?}");
        }

        #[test]
        fn no_window_sees_more_restarts_than_allowed(steps in prop::collection::vec(0u64..5_000, 1..200)) {
            let (mut storm, mut now, mut admitted) = (Storm::default(), Mono(0), Vec::new());
            for step in steps {
                now = now.plus_ms(step);
                match storm.admit(now) {
                    Ok(()) => admitted.push(now),
                    Err(at) => prop_assert!(at > now && at.ms_since(now) <= STORM_WINDOW_MS),
                }
            }
            for window in admitted.windows(STORM_STARTS_MAX + 1) {
                prop_assert!(window[STORM_STARTS_MAX].ms_since(window[0]) >= STORM_WINDOW_MS);
            }
        }
    }
}
