//! When an engine is probed, and what the answers mean.
//!
//! Three phases, one schedule each:
//!
//! - *Starting*: first at once, then with growing pauses. Refused, 503 and slow are all the same
//!   here: a model may load for many minutes.
//! - *Ready*: rarely, and for all replicas of a machine in the same wake-up.
//! - *Suspect*: it answered before and fails now; soon again, with growing pauses.
//!
//! An answer is read as a [`Sign`]. A clear sign (connection refused, 503) ends readiness at once; a
//! doubtful one (slow, another status) only the second time in a row, and never while requests go
//! through: engines in long prefills answer their health path late. An engine that falls again and
//! again has to answer twice in a row before it takes work.

use crate::time::Mono;

/// First pause while starting, in milliseconds: a small engine is up within that.
pub const STARTING_DELAY_MS_MIN: u64 = 25;
/// Longest pause while starting or suspect, in milliseconds. Some engines take any request as a sign
/// that their clients are alive, so nothing asks faster than this for long.
pub const DELAY_MS_MAX: u64 = 2_000;
/// Pause between probes of a ready engine, in milliseconds: the data path notices most failures
/// first, probes find the idle ones.
pub const READY_INTERVAL_MS: u64 = 10_000;
/// First pause after a fall, in milliseconds: long enough for a supervisor to restart a process.
pub const SUSPECT_DELAY_MS_MIN: u64 = 250;
/// How long an answer may take, in milliseconds. One engine needs more than a second by design.
pub const PROBE_TIMEOUT_MS: u64 = 5_000;
/// Doubtful answers in a row that end readiness.
pub const DOUBTS_MAX: u32 = 2;
/// Falls within [`FLAP_WINDOW_MS`] after which one good answer no longer suffices.
pub const FLAP_FALLS: usize = 3;
/// The window for [`FLAP_FALLS`], in milliseconds.
pub const FLAP_WINDOW_MS: u64 = 60_000;
/// Good answers in a row that an engine needs which flaps.
pub const FLAP_HEALTHY_IN_ROW: u32 = 2;

/// What an answer says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sign {
    /// It serves.
    Healthy,
    /// It certainly does not serve now.
    Down,
    /// It may be busy or broken.
    Doubtful,
}

/// Phase of an engine's life as its probes see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Never answered yet.
    Starting,
    /// Serves.
    Ready,
    /// Served, and does not now.
    Suspect,
}

/// Whether a sign moved the engine to another phase.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It did not.
    Unchanged,
    /// It is ready now.
    Rose,
    /// It is no longer ready.
    Fell,
}

/// The probe schedule of one engine.
#[derive(Clone, Debug)]
pub struct Health {
    phase: Phase,
    next_at: Mono,
    delay_ms: u64,
    doubts: u32,
    healthy_in_row: u32,
    /// The last falls, oldest first.
    falls: [Option<Mono>; FLAP_FALLS],
    /// When a request last went through.
    worked_at: Option<Mono>,
}

impl Health {
    /// An engine that was just announced.
    #[must_use]
    pub fn starting(now: Mono) -> Health {
        Health {
            phase: Phase::Starting,
            next_at: now,
            delay_ms: STARTING_DELAY_MS_MIN,
            doubts: 0,
            healthy_in_row: 0,
            falls: [None; FLAP_FALLS],
            worked_at: None,
        }
    }

    /// Where it stands.
    #[must_use]
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// When to probe next.
    #[must_use]
    pub fn next_at(&self) -> Mono {
        self.next_at
    }

    /// Takes a probe's answer into account.
    pub fn observe(&mut self, sign: Sign, now: Mono) -> Verdict {
        match (self.phase, sign) {
            (Phase::Ready, Sign::Healthy) => {
                self.doubts = 0;
                self.next_at = next_aligned(now);
                Verdict::Unchanged
            }
            (Phase::Ready, Sign::Down) => self.fall(now),
            (Phase::Ready, Sign::Doubtful) => self.doubt(now),
            (_, Sign::Healthy) => self.rise(now),
            (_, Sign::Down | Sign::Doubtful) => {
                self.healthy_in_row = 0;
                self.pause(now);
                Verdict::Unchanged
            }
        }
    }

    /// A request got an answer from the engine.
    pub fn worked(&mut self, now: Mono) {
        self.worked_at = Some(now);
        self.doubts = 0;
    }

    /// A request could not connect: the engine is down, whatever the last probe said.
    pub fn connect_failed(&mut self, now: Mono) -> Verdict {
        match self.phase {
            Phase::Ready => {
                let verdict = self.fall(now);
                self.next_at = now;
                verdict
            }
            Phase::Starting | Phase::Suspect => Verdict::Unchanged,
        }
    }

    /// Asks for a probe no later than `at`.
    pub fn probe_by(&mut self, at: Mono) {
        self.next_at = self.next_at.min(at);
    }

    fn rise(&mut self, now: Mono) -> Verdict {
        self.healthy_in_row += 1;
        if self.healthy_in_row < self.healthy_needed() {
            self.next_at = now.plus_ms(DELAY_MS_MAX);
            return Verdict::Unchanged;
        }
        self.phase = Phase::Ready;
        self.doubts = 0;
        self.healthy_in_row = 0;
        self.next_at = next_aligned(now);
        Verdict::Rose
    }

    fn fall(&mut self, now: Mono) -> Verdict {
        self.falls.rotate_left(1);
        self.falls[FLAP_FALLS - 1] = Some(now);
        self.phase = Phase::Suspect;
        self.doubts = 0;
        self.healthy_in_row = 0;
        self.delay_ms = SUSPECT_DELAY_MS_MIN;
        self.worked_at = None;
        self.pause(now);
        Verdict::Fell
    }

    fn doubt(&mut self, now: Mono) -> Verdict {
        if self.worked_at.is_some_and(|at| now.ms_since(at) < READY_INTERVAL_MS) {
            self.next_at = next_aligned(now);
            return Verdict::Unchanged;
        }
        self.doubts += 1;
        if self.doubts >= DOUBTS_MAX {
            return self.fall(now);
        }
        self.next_at = now.plus_ms(DELAY_MS_MAX);
        Verdict::Unchanged
    }

    fn healthy_needed(&self) -> u32 {
        match (self.falls[0], self.falls[FLAP_FALLS - 1]) {
            (Some(first), Some(last)) if last.ms_since(first) <= FLAP_WINDOW_MS => FLAP_HEALTHY_IN_ROW,
            _ => 1,
        }
    }

    fn pause(&mut self, now: Mono) {
        self.next_at = now.plus_ms(self.delay_ms);
        self.delay_ms = (self.delay_ms * 2).min(DELAY_MS_MAX);
    }
}

/// The next multiple of the ready interval on the monotonic clock: replicas that became ready at
/// different times are still probed in one wake-up.
fn next_aligned(now: Mono) -> Mono {
    let interval_ns = READY_INTERVAL_MS * 1_000_000;
    Mono((now.0 / interval_ns).saturating_add(1).saturating_mul(interval_ns))
}

#[cfg(test)]
mod tests {
    use super::*;

    const T0: Mono = Mono(1_234_567_890_123);

    /// A ready engine and the time at which it became ready.
    fn ready() -> (Health, Mono) {
        let mut health = Health::starting(T0);
        assert_eq!(health.observe(Sign::Healthy, T0), Verdict::Rose);
        (health, T0)
    }

    #[test]
    fn a_starting_engine_is_asked_at_once_and_then_with_doubling_pauses() {
        let mut health = Health::starting(T0);
        assert_eq!(health.next_at(), T0);
        let mut now = T0;
        let mut pauses = Vec::new();
        for sign in [Sign::Down, Sign::Doubtful].into_iter().cycle().take(9) {
            assert_eq!(health.observe(sign, now), Verdict::Unchanged);
            pauses.push(health.next_at().ms_since(now));
            now = health.next_at();
        }
        assert_eq!(pauses, [25, 50, 100, 200, 400, 800, 1_600, 2_000, 2_000]);
        assert_eq!(health.observe(Sign::Healthy, now), Verdict::Rose);
    }

    #[test]
    fn ready_engines_are_probed_together() {
        let (first, _) = ready();
        let mut second = Health::starting(T0);
        let later = T0.plus_ms(1);
        assert_eq!(second.observe(Sign::Healthy, later), Verdict::Rose);
        assert_eq!(first.next_at(), second.next_at());
        assert_eq!(first.next_at().0 % (READY_INTERVAL_MS * 1_000_000), 0);
        let at = first.next_at();
        second.observe(Sign::Healthy, at);
        assert_eq!(second.next_at().ms_since(at), READY_INTERVAL_MS);
    }

    #[test]
    fn a_clear_sign_ends_readiness_at_once_and_a_doubt_only_twice_in_a_row() {
        let (mut health, now) = ready();
        assert_eq!(health.observe(Sign::Down, now), Verdict::Fell);

        let (mut health, now) = ready();
        assert_eq!(health.observe(Sign::Doubtful, now), Verdict::Unchanged);
        assert_eq!(health.observe(Sign::Healthy, now), Verdict::Unchanged);
        assert_eq!(health.observe(Sign::Doubtful, now), Verdict::Unchanged);
        assert_eq!(health.observe(Sign::Doubtful, now), Verdict::Fell);
    }

    #[test]
    fn requests_that_go_through_outrank_doubts_but_not_a_refused_connection() {
        let (mut health, mut now) = ready();
        for _ in 0..5 {
            health.worked(now);
            now = now.plus_ms(READY_INTERVAL_MS - 1);
            assert_eq!(health.observe(Sign::Doubtful, now), Verdict::Unchanged);
        }
        now = now.plus_ms(READY_INTERVAL_MS);
        assert_eq!(health.observe(Sign::Doubtful, now), Verdict::Unchanged);
        assert_eq!(health.observe(Sign::Doubtful, now), Verdict::Fell);

        let (mut health, now) = ready();
        health.worked(now);
        assert_eq!(health.connect_failed(now), Verdict::Fell);
        assert_eq!(health.next_at(), now, "asked at once");
        assert_eq!(health.connect_failed(now), Verdict::Unchanged);
    }

    #[test]
    fn a_suspect_engine_is_asked_soon_and_returns_on_one_good_answer() {
        let (mut health, mut now) = ready();
        health.observe(Sign::Down, now);
        let mut pauses = vec![health.next_at().ms_since(now)];
        for _ in 0..4 {
            now = health.next_at();
            health.observe(Sign::Down, now);
            pauses.push(health.next_at().ms_since(now));
        }
        assert_eq!(pauses, [250, 500, 1_000, 2_000, 2_000]);
        assert_eq!(health.observe(Sign::Healthy, now), Verdict::Rose);
    }

    #[test]
    fn an_engine_that_flaps_must_answer_twice_in_a_row() {
        let (mut health, mut now) = ready();
        for _ in 0..2 {
            now = now.plus_ms(1_000);
            assert_eq!(health.observe(Sign::Down, now), Verdict::Fell);
            assert_eq!(health.observe(Sign::Healthy, now), Verdict::Rose);
        }
        assert_eq!(health.observe(Sign::Down, now), Verdict::Fell);
        assert_eq!(health.observe(Sign::Healthy, now), Verdict::Unchanged);
        assert_eq!(health.observe(Sign::Down, now), Verdict::Unchanged, "the row is broken");
        assert_eq!(health.observe(Sign::Healthy, now), Verdict::Unchanged);
        assert_eq!(health.observe(Sign::Healthy, now), Verdict::Rose);
        // Old falls are forgiven.
        now = now.plus_ms(FLAP_WINDOW_MS + 1);
        assert_eq!(health.observe(Sign::Down, now), Verdict::Fell);
        assert_eq!(health.observe(Sign::Healthy, now), Verdict::Rose);
    }

    proptest::proptest! {
        /// Whatever the answers: the next probe lies ahead, within one interval, and healthy answers
        /// bring any engine back after at most two.
        #[test]
        fn every_engine_is_asked_again_and_can_return(signs in proptest::collection::vec((0u8..5, 0u64..20_000), 0..60)) {
            let mut health = Health::starting(T0);
            let mut now = T0;
            for (sign, ms) in signs {
                now = now.plus_ms(ms);
                match sign {
                    0 => { health.observe(Sign::Healthy, now); }
                    1 => { health.observe(Sign::Down, now); }
                    2 => { health.observe(Sign::Doubtful, now); }
                    3 => { health.worked(now); continue; }
                    _ => { health.connect_failed(now); continue; }
                }
                proptest::prop_assert!(health.next_at() > now);
                proptest::prop_assert!(health.next_at().ms_since(now) <= READY_INTERVAL_MS);
            }
            health.observe(Sign::Healthy, now);
            health.observe(Sign::Healthy, now);
            proptest::prop_assert_eq!(health.phase(), Phase::Ready);
        }
    }
}
