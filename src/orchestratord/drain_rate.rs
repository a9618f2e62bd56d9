//! How fast requests end, and so: when is it worth while to try again? Pure.
//!
//! Ends are counted a model, in a window that slides by [`STEP_MS`]. Whoever is refused is told a time
//! that lies between two bounds: until then those who are ahead have been served, at the rate that was
//! measured, and by then also those who were refused before it in the same window have had their turn.
//! Within the bounds the time is drawn, so that many who are refused at once do not come back at once.

use std::collections::{BTreeMap, VecDeque};

use crate::time::Mono;

/// Ends are counted in steps of this length.
pub const STEP_MS: u64 = 5_000;
/// Steps in the window: a minute, within which several answers of a slow engine end.
pub const STEPS: usize = 12;
/// Models whose ends are counted apart; those of others count for all models together. Each costs a
/// few hundred bytes.
pub const MODELS_MAX: usize = 1_000;
/// Shortest advice, in milliseconds: `Retry-After` counts in seconds.
pub const RETRY_MS_MIN: u64 = 1_000;
/// Longest advice, in milliseconds: clients ignore much longer ones.
pub const RETRY_MS_MAX: u64 = 60_000;
/// Latest start of the time in which a retry is drawn, so that there is room to spread.
const EARLIEST_MS_MAX: u64 = 30_000;
/// Advice where nothing has ended yet, in milliseconds.
const UNMEASURED_MS: u64 = 5_000;

/// Ends and refusals of all models. See the introduction of this file.
#[derive(Debug)]
pub struct DrainRate {
    all: Window,
    by_model: BTreeMap<String, Window>,
    random: u64,
}

/// One model's last minute: (step, ended, refused).
#[derive(Debug, Default)]
struct Window {
    steps: VecDeque<(u64, u64, u64)>,
    /// When the first end was counted.
    begun: Option<Mono>,
}

impl DrainRate {
    /// Nothing has ended yet. `seed` decides how retries are spread.
    #[must_use]
    pub fn new(seed: u64) -> DrainRate {
        DrainRate { all: Window::default(), by_model: BTreeMap::new(), random: seed | 1 }
    }

    /// A request for `model` gave its slot back.
    pub fn ended(&mut self, model: Option<&str>, now: Mono) {
        self.all.add(now, 1, 0);
        if let Some(window) = self.window(model, now) {
            window.add(now, 1, 0);
        }
    }

    /// A request for `model` is refused, with `ahead` waiting for the same, of `waiting` in all: after how
    /// many milliseconds to try again. It counts as refused.
    pub fn retry_ms(&mut self, model: Option<&str>, ahead: usize, waiting: usize, now: Mono) -> u64 {
        self.all.add(now, 0, 1);
        let place_ms = self.all.time_for(1, now).unwrap_or(UNMEASURED_MS).min(UNMEASURED_MS);
        let (measured, refused) = match self.window(model, now) {
            Some(window) => {
                window.add(now, 0, 1);
                let refused = window.counts(now).1;
                let served_ms = window.time_for(ahead as u64 + 1, now);
                (served_ms.map(|ms| (ms, window.time_for(refused, now).unwrap_or(0))), refused)
            }
            // One of very many models: the rate of all of them says more than none.
            None => {
                let refused = self.all.counts(now).1;
                let served_ms = self.all.time_for(waiting as u64 + 1, now);
                (served_ms.map(|ms| (ms, self.all.time_for(refused, now).unwrap_or(0))), refused)
            }
        };
        let (earliest_ms, others_ms) = measured.unwrap_or((UNMEASURED_MS, refused.saturating_mul(100)));
        let earliest_ms = earliest_ms.max(place_ms).clamp(RETRY_MS_MIN, EARLIEST_MS_MAX);
        let latest_ms = earliest_ms.saturating_mul(2).saturating_add(others_ms).min(RETRY_MS_MAX);
        earliest_ms + self.draw(latest_ms - earliest_ms)
    }

    /// Ends of `model` in the last minute.
    #[cfg(test)]
    fn ended_lately(&self, model: Option<&str>, now: Mono) -> u64 {
        match model {
            Some(model) => self.by_model.get(model).map_or(0, |window| window.counts(now).0),
            None => self.all.counts(now).0,
        }
    }

    /// The window of a model; `None` for any model, and where there are too many.
    fn window(&mut self, model: Option<&str>, now: Mono) -> Option<&mut Window> {
        let model = model?;
        if !self.by_model.contains_key(model) {
            if self.by_model.len() >= MODELS_MAX {
                self.by_model.retain(|_, window| window.counts(now) != (0, 0));
            }
            if self.by_model.len() >= MODELS_MAX {
                return None;
            }
            self.by_model.insert(model.to_string(), Window::default());
        }
        self.by_model.get_mut(model)
    }

    /// From 0 to `most`, by xorshift64.
    fn draw(&mut self, most: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random % (most + 1)
    }
}

impl Window {
    fn add(&mut self, now: Mono, ended: u64, refused: u64) {
        if ended > 0 {
            self.begun.get_or_insert(now);
        }
        let step = now.ms_since(Mono(0)) / STEP_MS;
        match self.steps.back_mut() {
            Some(last) if last.0 == step => {
                last.1 += ended;
                last.2 += refused;
            }
            _ => self.steps.push_back((step, ended, refused)),
        }
        while self.steps.front().is_some_and(|(first, ..)| first + STEPS as u64 <= step) {
            self.steps.pop_front();
        }
    }

    fn counts(&self, now: Mono) -> (u64, u64) {
        let step = now.ms_since(Mono(0)) / STEP_MS;
        let inside = self.steps.iter().filter(|(at, ..)| at + STEPS as u64 > step);
        inside.fold((0, 0), |sum, (_, ended, refused)| (sum.0 + ended, sum.1 + refused))
    }

    /// How long so many ends take, in milliseconds; `None` where none was ever seen. Where none was seen
    /// lately, one takes a whole window at least.
    fn time_for(&self, count: u64, now: Mono) -> Option<u64> {
        let span_ms = (STEP_MS * STEPS as u64).min(now.ms_since(self.begun?)).max(RETRY_MS_MIN);
        let ended = self.counts(now).0;
        let span_ms = if ended == 0 { STEP_MS * STEPS as u64 } else { span_ms };
        Some(count.saturating_mul(span_ms) / ended.max(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: Mono = Mono(1_000_000_000_000);

    /// So many ends a second, for `seconds`.
    fn measured(rate: u64, seconds: u64) -> (DrainRate, Mono) {
        let mut drains = DrainRate::new(7);
        let mut now = START;
        for _ in 0..seconds * rate {
            now = now.plus_ms(1000 / rate);
            drains.ended(Some("m"), now);
        }
        (drains, now)
    }

    #[test]
    fn the_advice_follows_the_rate_of_the_model_that_was_asked_for() {
        let (mut drains, now) = measured(10, 60);
        drains.ended(Some("slow"), now);
        // Ten a second: a hundred ahead take ten seconds.
        let quick = drains.retry_ms(Some("m"), 100, 150, now);
        assert!((9_000..=22_000).contains(&quick), "{quick}");
        // One a minute, of which one was seen.
        let slow = drains.retry_ms(Some("slow"), 50, 150, now.plus_ms(30_000));
        assert!((30_000..=60_000).contains(&slow), "{slow}");
        let next = drains.retry_ms(Some("m"), 0, 150, now);
        assert!((1_000..=3_000).contains(&next), "{next}");
    }

    #[test]
    fn the_window_slides() {
        let (drains, now) = measured(2, 120);
        let lately = drains.ended_lately(Some("m"), now);
        assert!((110..=120).contains(&lately), "{lately}");
        assert_eq!(drains.ended_lately(Some("m"), now.plus_ms(60_000)), 0);
        assert_eq!(drains.ended_lately(Some("n"), now), 0);
    }

    /// Counted in whole seconds, as clients obey `Retry-After`.
    #[test]
    fn a_thousand_refused_at_once_do_not_come_back_at_once() {
        for rate in [0, 1, 10, 100] {
            let (mut drains, now) = measured(rate.max(1), if rate == 0 { 0 } else { 60 });
            let mut seconds = [0u32; 61];
            for _ in 0..1000 {
                let ms = drains.retry_ms(Some("m"), 1000, 1000, now);
                assert!((RETRY_MS_MIN..=RETRY_MS_MAX).contains(&ms), "{ms}");
                seconds[ms.div_ceil(1000) as usize] += 1;
            }
            let most = seconds.iter().max().copied().unwrap_or_default();
            assert!(most <= 120, "at {rate} a second {most} come back in one second: {seconds:?}");
        }
    }

    #[test]
    fn models_without_end_cost_bounded_memory() {
        let mut drains = DrainRate::new(1);
        for n in 0..MODELS_MAX * 2 {
            drains.ended(Some(&format!("m{n}")), START);
            assert!((RETRY_MS_MIN..=RETRY_MS_MAX).contains(&drains.retry_ms(
                Some(&format!("x{n}")),
                5,
                10,
                START
            )));
        }
        assert_eq!(drains.by_model.len(), MODELS_MAX);
        let later = START.plus_ms(120_000);
        drains.ended(Some("new"), later);
        assert_eq!((drains.by_model.len(), drains.ended_lately(Some("new"), later)), (1, 1));
    }
}
