//! When an engine is probed, and what the answers mean.
//!
//! Three phases, one schedule each:
//!
//! - *Starting*: first at once, then with growing pauses. Refused, 503 and slow are all the same
//!   here: a model may load for many minutes.
//! - *Ready*: rarely, and for all replicas of a machine in the same wake-up.
//! - *Suspect*: it answered before and fails now; soon again, with growing pauses.
//!
//! An answer is read as a [`Sign`]. A refused connection ends readiness at once. So does a 503, and a
//! doubtful answer (slow, another status) the second time in a row, but neither while requests go
//! through: engines in long prefills answer their health path late or wrong.
//!
//! Every fall raises a penalty that time forgives. An engine whose penalty is high has to be healthy for
//! a while before it takes work, the longer the more often it fell.

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
/// How long a byte on the data path outranks doubtful answers, in milliseconds: SGLang calls itself
/// unhealthy after 20 s of silence, which a long prefill causes.
pub const WORKED_MS: u64 = 30_000;
/// How long an answer may take, in milliseconds. One engine needs more than a second by design.
pub const PROBE_TIMEOUT_MS: u64 = 5_000;
/// Doubtful answers in a row that end readiness.
pub const DOUBTS_MAX: u32 = 2;
/// What a fall adds to an engine's penalty.
const FALL_PENALTY: u64 = 1_000;
/// Time in which half of a penalty is forgiven, in milliseconds: two falls a day cost nothing.
pub const PENALTY_HALF_LIFE_MS: u64 = 60_000;
/// Penalty from which one good answer no longer suffices: the third fall within half a minute.
const PENALTY_MAX: u64 = 2_500;
/// How long an engine that has just fallen too often must be healthy before it takes work, in
/// milliseconds; it doubles with every fall beyond.
pub const DAMPED_MS_MIN: u64 = 2_000;
/// Longest such time, in milliseconds.
pub const DAMPED_MS_MAX: u64 = 300_000;
/// Longest pause between probes of an engine that should have started long ago, in milliseconds.
pub const OVERDUE_DELAY_MS_MAX: u64 = 30_000;

/// What an answer says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sign {
    /// It serves.
    Healthy,
    /// Nobody listens there.
    Down,
    /// It says itself that it does not serve now.
    Unavailable,
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
    delay_ms_max: u64,
    doubts: u32,
    started_at: Mono,
    /// Since when it answers well while it is not ready, and for how long it has to, in milliseconds.
    healthy_since: Option<(Mono, u64)>,
    /// The penalty at the last fall, and when that was.
    penalty: u64,
    fell_at: Option<Mono>,
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
            delay_ms_max: DELAY_MS_MAX,
            doubts: 0,
            started_at: now,
            healthy_since: None,
            penalty: 0,
            fell_at: None,
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
            (Phase::Ready, Sign::Unavailable | Sign::Doubtful) if self.works(now) => {
                self.next_at = next_aligned(now);
                Verdict::Unchanged
            }
            (Phase::Ready, Sign::Unavailable) => self.fall(now),
            (Phase::Ready, Sign::Doubtful) => self.doubt(now),
            (_, Sign::Healthy) => self.rise(now),
            (_, Sign::Down | Sign::Unavailable | Sign::Doubtful) => {
                self.healthy_since = None;
                self.pause(now);
                Verdict::Unchanged
            }
        }
    }

    /// A request got a byte from the engine at `at`.
    pub fn worked(&mut self, at: Mono) {
        self.worked_at = self.worked_at.max(Some(at));
        self.doubts = 0;
    }

    /// Whether it has been starting for longer than `limit_ms`.
    #[must_use]
    pub fn is_overdue(&self, limit_ms: u64, now: Mono) -> bool {
        self.phase == Phase::Starting && now.ms_since(self.started_at) >= limit_ms
    }

    /// Makes further pauses longer: it should have started long ago.
    pub fn slow_down(&mut self) {
        self.delay_ms_max = OVERDUE_DELAY_MS_MAX;
    }

    /// Why an engine that answers well takes no work yet, for people.
    #[must_use]
    pub fn waits(&self) -> Option<String> {
        let (_, needed_ms) = self.healthy_since?;
        Some(format!(
            "answers again, but fell about {} times lately: takes work once it has been healthy for {} s",
            (self.penalty + FALL_PENALTY / 2) / FALL_PENALTY,
            needed_ms / 1000
        ))
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

    /// Puts the next probe off until `at`.
    pub fn probe_at(&mut self, at: Mono) {
        self.next_at = at;
    }

    fn rise(&mut self, now: Mono) -> Verdict {
        let (since, needed_ms) = match self.healthy_since {
            Some(known) => known,
            None => (now, self.healthy_ms_needed(now)),
        };
        self.healthy_since = Some((since, needed_ms));
        if now.ms_since(since) < needed_ms {
            self.next_at = now.plus_ms(DELAY_MS_MAX).min(since.plus_ms(needed_ms)).max(now.plus_ms(1));
            return Verdict::Unchanged;
        }
        self.phase = Phase::Ready;
        self.doubts = 0;
        self.healthy_since = None;
        self.delay_ms_max = DELAY_MS_MAX;
        self.next_at = next_aligned(now);
        Verdict::Rose
    }

    fn fall(&mut self, now: Mono) -> Verdict {
        self.penalty = self.penalty_at(now) + FALL_PENALTY;
        self.fell_at = Some(now);
        self.phase = Phase::Suspect;
        self.doubts = 0;
        self.healthy_since = None;
        self.delay_ms = SUSPECT_DELAY_MS_MIN;
        self.worked_at = None;
        self.pause(now);
        Verdict::Fell
    }

    fn doubt(&mut self, now: Mono) -> Verdict {
        self.doubts += 1;
        if self.doubts >= DOUBTS_MAX {
            return self.fall(now);
        }
        self.next_at = now.plus_ms(DELAY_MS_MAX);
        Verdict::Unchanged
    }

    /// Whether requests went through lately.
    fn works(&self, now: Mono) -> bool {
        self.worked_at.is_some_and(|at| now.ms_since(at) < WORKED_MS)
    }

    /// What time has left of the penalty: half of it for each half-life, in straight lines between.
    fn penalty_at(&self, now: Mono) -> u64 {
        let ms = self.fell_at.map_or(0, |at| now.ms_since(at));
        let halved = self.penalty.checked_shr((ms / PENALTY_HALF_LIFE_MS).min(64) as u32).unwrap_or(0);
        halved - halved * (ms % PENALTY_HALF_LIFE_MS) / PENALTY_HALF_LIFE_MS / 2
    }

    /// How long it must be healthy before it takes work, in milliseconds.
    fn healthy_ms_needed(&self, now: Mono) -> u64 {
        let Some(beyond) = self.penalty_at(now).checked_sub(PENALTY_MAX) else { return 0 };
        (DAMPED_MS_MIN << (beyond / FALL_PENALTY).min(16)).min(DAMPED_MS_MAX)
    }

    fn pause(&mut self, now: Mono) {
        self.next_at = now.plus_ms(self.delay_ms);
        self.delay_ms = (self.delay_ms * 2).min(self.delay_ms_max);
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
        now = now.plus_ms(WORKED_MS);
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
    fn an_engine_that_flaps_must_be_healthy_for_longer_and_longer() {
        let (mut health, mut now) = ready();
        let mut needed = Vec::new();
        for _ in 0..12 {
            now = now.plus_ms(1_000);
            assert_eq!(health.observe(Sign::Down, now), Verdict::Fell);
            let since = now;
            while health.observe(Sign::Healthy, now) != Verdict::Rose {
                let why = health.waits().expect("it says why");
                assert!(why.contains("healthy for"), "{why}");
                now = health.next_at();
            }
            needed.push(now.ms_since(since));
        }
        assert_eq!(needed[..2], [0, 0], "two falls are forgiven");
        assert!(needed[2] >= DAMPED_MS_MIN, "{needed:?}");
        assert!(needed.iter().max() > Some(&(4 * DAMPED_MS_MIN)), "{needed:?}");
        assert!(needed.iter().all(|ms| *ms <= DAMPED_MS_MAX), "{needed:?}");
        // Time forgives.
        now = now.plus_ms(20 * PENALTY_HALF_LIFE_MS);
        assert_eq!(health.observe(Sign::Down, now), Verdict::Fell);
        assert_eq!(health.observe(Sign::Healthy, now), Verdict::Rose);
    }

    #[test]
    fn what_starts_for_too_long_is_asked_more_rarely() {
        let mut health = Health::starting(T0);
        let mut now = T0;
        while !health.is_overdue(600_000, now) {
            health.observe(Sign::Down, now);
            assert!(health.next_at().ms_since(now) <= DELAY_MS_MAX);
            now = health.next_at();
        }
        assert!(now.ms_since(T0) < 603_000);
        health.slow_down();
        for _ in 0..10 {
            health.observe(Sign::Down, now);
            now = health.next_at();
        }
        health.observe(Sign::Down, now);
        assert_eq!(health.next_at().ms_since(now), OVERDUE_DELAY_MS_MAX);
        assert_eq!(health.observe(Sign::Healthy, now), Verdict::Rose);
        assert!(!health.is_overdue(0, now));
    }

    proptest::proptest! {
        /// Whatever the answers: the next probe lies ahead, within one interval, and healthy answers
        /// bring any engine back within the longest damping.
        #[test]
        fn every_engine_is_asked_again_and_can_return(signs in proptest::collection::vec((0u8..6, 0u64..20_000), 0..60)) {
            let mut health = Health::starting(T0);
            let mut now = T0;
            for (sign, ms) in signs {
                now = now.plus_ms(ms);
                match sign {
                    0 => { health.observe(Sign::Healthy, now); }
                    1 => { health.observe(Sign::Down, now); }
                    2 => { health.observe(Sign::Doubtful, now); }
                    3 => { health.worked(now); continue; }
                    4 => { health.observe(Sign::Unavailable, now); }
                    _ => { health.connect_failed(now); continue; }
                }
                proptest::prop_assert!(health.next_at() > now);
                proptest::prop_assert!(health.next_at().ms_since(now) <= READY_INTERVAL_MS);
            }
            let healed = now;
            health.observe(Sign::Healthy, now);
            while health.phase() != Phase::Ready {
                now = health.next_at();
                proptest::prop_assert!(now.ms_since(healed) <= DAMPED_MS_MAX);
                health.observe(Sign::Healthy, now);
            }
        }

        /// As long as requests go through, nothing but a refused connection takes an engine out.
        #[test]
        fn what_works_stays_ready(signs in proptest::collection::vec((0u8..3, 0u64..READY_INTERVAL_MS), 0..60)) {
            let (mut health, mut now) = ready();
            for (sign, ms) in signs {
                health.worked(now);
                now = now.plus_ms(ms);
                health.observe([Sign::Healthy, Sign::Unavailable, Sign::Doubtful][usize::from(sign)], now);
                proptest::prop_assert_eq!(health.phase(), Phase::Ready);
            }
            health.observe(Sign::Down, now);
            proptest::prop_assert_eq!(health.phase(), Phase::Suspect);
        }
    }
}
