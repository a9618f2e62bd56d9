//! When will a waiting request start? Answered from what was measured, or not at all.
//!
//! [`Speeds`] keeps moving averages for every replica: how long a request holds a slot, how long the
//! first token takes, and the time between two tokens. [`start_ms`] plays the queue forward over the
//! slots of the replicas that could serve the request: a running request frees its slot when the average
//! is over, whoever waits ahead takes the slot that is free first, and so on until it is the request's
//! turn. A replica that was never measured counts as the mean of the measured ones beside it; where none
//! of them was measured there is no answer.
//!
//! Nothing here decides anything: placement does not look at predictions.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};

use super::replica_table::ReplicaRef;

/// Samples after which the average moves by one part in so many: fast enough to follow a change of load,
/// slow enough not to follow one long answer.
const AVERAGE_SAMPLES: u64 = 8;
/// Slots that one prediction looks at; more are never the next to become free by much.
const SLOTS_MAX: usize = 16_384;

/// A moving average; the first samples count equally.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Average {
    value: u64,
    samples: u64,
}

impl Average {
    fn add(&mut self, value: u64) {
        self.samples = (self.samples + 1).min(AVERAGE_SAMPLES);
        let (weight, rest) = (self.samples, self.samples - 1);
        let sum = u128::from(self.value) * u128::from(rest) + u128::from(value);
        self.value = u64::try_from(sum / u128::from(weight)).unwrap_or(u64::MAX);
    }

    fn get(self) -> Option<u64> {
        (self.samples > 0).then_some(self.value)
    }
}

/// What was measured of one replica.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Speed {
    service_us: Average,
    first_token_us: Average,
    token_us: Average,
}

impl Speed {
    /// How long a request holds a slot that may generate so many tokens at most; `None` before one has.
    fn service_us(&self, tokens_max: Option<u32>) -> Option<u64> {
        let usual = self.service_us.get()?;
        let longest = self.longest_us(tokens_max);
        Some(longest.map_or(usual, |longest| usual.min(longest)))
    }

    fn longest_us(&self, tokens_max: Option<u32>) -> Option<u64> {
        let (tokens, first, each) =
            (u64::from(tokens_max?), self.first_token_us.get()?, self.token_us.get()?);
        Some(first.saturating_add(tokens.saturating_mul(each)))
    }
}

/// What was measured of all replicas.
#[derive(Debug, Default)]
pub struct Speeds {
    by_replica: BTreeMap<ReplicaRef, Speed>,
}

impl Speeds {
    /// A request held a slot of this replica for so long.
    pub fn served(&mut self, replica: ReplicaRef, service_ms: u64) {
        let speed = self.by_replica.entry(replica).or_default();
        speed.service_us.add(service_ms.saturating_mul(1000));
    }

    /// An answer of this replica began after `first_token_ms` and had `tokens` tokens, the last of them
    /// `decode_ms` after the first.
    pub fn decoded(&mut self, replica: ReplicaRef, first_token_ms: u64, tokens: u64, decode_ms: u64) {
        let speed = self.by_replica.entry(replica).or_default();
        speed.first_token_us.add(first_token_ms.saturating_mul(1000));
        // One token has no time between tokens.
        if let Some(gaps) = tokens.checked_sub(1).filter(|gaps| *gaps > 0) {
            speed.token_us.add(decode_ms.saturating_mul(1000) / gaps);
        }
    }

    /// What was measured of this replica.
    #[must_use]
    pub fn of(&self, replica: ReplicaRef) -> Option<Speed> {
        self.by_replica.get(&replica).copied()
    }

    /// Forgets replicas that are not there any more. To be called with how many there are: it looks only
    /// if most of what is remembered must be outdated.
    pub fn forget_others(&mut self, known: usize, is_known: impl Fn(ReplicaRef) -> bool) {
        if self.by_replica.len() > 2 * known + 16 {
            self.by_replica.retain(|replica, _| is_known(*replica));
        }
    }
}

/// A request as a prediction sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Need {
    /// Slots that it takes, at least 1.
    pub slots: u32,
    /// Most tokens that it may generate, where that is known.
    pub tokens_max: Option<u32>,
}

/// A request that runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Running {
    /// What it takes.
    pub need: Need,
    /// For how long it has run, in milliseconds.
    pub elapsed_ms: u64,
}

/// A replica that could serve the request.
#[derive(Clone, Debug, Default)]
pub struct Load {
    /// Its slots.
    pub slots_total: u32,
    /// Slots that somebody else takes; since when is not known.
    pub others: u32,
    /// What runs there.
    pub running: Vec<Running>,
    /// What was measured of it.
    pub speed: Option<Speed>,
}

/// When `own` starts, in milliseconds from now, behind the waiters `ahead` that compete for the same
/// replicas, in their order. `None` if nothing was measured on any of them.
#[must_use]
pub fn start_ms(loads: &[Load], ahead: impl IntoIterator<Item = Need>, own: Need) -> Option<u64> {
    let stand_in = mean(loads)?;
    let speeds: Vec<Speed> = loads
        .iter()
        .map(|load| load.speed.filter(|speed| speed.service_us.get().is_some()).unwrap_or(stand_in))
        .collect();
    // Every slot, by when it is free.
    let mut slots: BinaryHeap<Reverse<(u64, usize)>> = BinaryHeap::new();
    for (at, load) in loads.iter().enumerate() {
        let speed = &speeds[at];
        let half_us = speed.service_us(None)? / 2;
        let others = (0..load.others).map(|_| half_us);
        let ours = load.running.iter().flat_map(|running| {
            let left_us = left_us(speed, running);
            (0..running.need.slots.max(1)).map(move |_| left_us)
        });
        let free = std::iter::repeat(0);
        let room = SLOTS_MAX.saturating_sub(slots.len()).min(load.slots_total as usize);
        slots.extend(ours.chain(others).chain(free).take(room).map(|free_at| Reverse((free_at, at))));
    }
    let mut take = |need: Need| -> Option<u64> {
        let count = (need.slots.max(1) as usize).min(slots.len());
        let taken: Vec<(u64, usize)> = (0..count).filter_map(|_| slots.pop()).map(|slot| slot.0).collect();
        // It begins once the last of its slots is free.
        let start = taken.last()?.0;
        for (_, at) in taken {
            let until = start.saturating_add(speeds[at].service_us(need.tokens_max)?);
            slots.push(Reverse((until, at)));
        }
        Some(start)
    };
    for need in ahead {
        take(need)?;
    }
    take(own).map(|us| us.div_ceil(1000))
}

/// How long a running request will still take. One that is overdue is given half the usual time again:
/// less would predict a start that does not come, over and over.
fn left_us(speed: &Speed, running: &Running) -> u64 {
    let tokens_max = running.need.tokens_max;
    let elapsed_us = running.elapsed_ms.saturating_mul(1000);
    let usual = speed.service_us(tokens_max).unwrap_or(0);
    if elapsed_us < usual {
        return usual - elapsed_us;
    }
    let longest = speed.longest_us(tokens_max).map_or(u64::MAX, |us| us.saturating_sub(elapsed_us));
    (usual / 2).min(longest)
}

fn mean(loads: &[Load]) -> Option<Speed> {
    let measured: Vec<Speed> = loads.iter().filter_map(|load| load.speed).collect();
    let average = |of: fn(&Speed) -> Average| {
        let known: Vec<u128> = measured.iter().filter_map(|speed| of(speed).get()).map(u128::from).collect();
        let sum: u128 = known.iter().sum();
        let value = sum.checked_div(known.len() as u128).and_then(|mean| u64::try_from(mean).ok());
        value.map_or(Average::default(), |value| Average { value, samples: 1 })
    };
    let mean = Speed {
        service_us: average(|speed| speed.service_us),
        first_token_us: average(|speed| speed.first_token_us),
        token_us: average(|speed| speed.token_us),
    };
    mean.service_us.get().map(|_| mean)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ONE: Need = Need { slots: 1, tokens_max: None };

    fn speed(service_ms: u64) -> Speed {
        let mut speed = Speed::default();
        speed.service_us.add(service_ms * 1000);
        speed
    }

    /// A queue in front of replicas that take exactly as long as they were measured to take: a request
    /// starts on the replica with the slot that is free first. Returns when each of `count` starts.
    fn simulate(replicas: &[(u32, u64, Vec<u64>)], count: usize) -> Vec<u64> {
        let mut slots: Vec<(u64, usize)> = Vec::new();
        for (at, (total, service, elapsed)) in replicas.iter().enumerate() {
            slots.extend(elapsed.iter().map(|elapsed| (service - elapsed, at)));
            slots.extend((elapsed.len()..*total as usize).map(|_| (0, at)));
        }
        let mut starts = Vec::new();
        for _ in 0..count {
            slots.sort_unstable();
            let (free_at, at) = slots[0];
            starts.push(free_at);
            slots[0] = (free_at + replicas[at].1, at);
        }
        starts
    }

    fn loads(replicas: &[(u32, u64, Vec<u64>)]) -> Vec<Load> {
        let load = |(total, service, elapsed): &(u32, u64, Vec<u64>)| Load {
            slots_total: *total,
            others: 0,
            running: elapsed.iter().map(|ms| Running { need: ONE, elapsed_ms: *ms }).collect(),
            speed: Some(speed(*service)),
        };
        replicas.iter().map(load).collect()
    }

    proptest! {
        /// Where answers take as long as they did before, everybody starts when it was predicted.
        #[test]
        fn a_steady_queue_starts_when_predicted(
            replicas in proptest::collection::vec((1u32..5, 1u64..5_000, proptest::collection::vec(0.0f64..1.0, 0..5)), 1..6),
            waiting in 1usize..40,
        ) {
            let replicas: Vec<(u32, u64, Vec<u64>)> = replicas
                .into_iter()
                .map(|(total, service, shares)| {
                    let elapsed = shares.iter().take(total as usize).map(|share| (share * service as f64) as u64);
                    (total, service, elapsed.filter(|elapsed| *elapsed < service).collect())
                })
                .collect();
            let starts = simulate(&replicas, waiting);
            for (ahead, start) in starts.iter().enumerate() {
                let predicted = start_ms(&loads(&replicas), std::iter::repeat_n(ONE, ahead), ONE);
                prop_assert_eq!(predicted, Some(*start), "{} ahead", ahead);
            }
        }

        /// One more ahead never makes it start earlier, and measuring nothing never predicts anything.
        #[test]
        fn more_ahead_is_no_earlier(
            slots in 1u32..4, service in proptest::option::of(1u64..9_000), needs in proptest::collection::vec(1u32..6, 0..20),
        ) {
            let load = Load { slots_total: slots, others: 1, running: Vec::new(), speed: service.map(speed) };
            let need = |slots: u32| Need { slots, tokens_max: None };
            let mut last = None;
            for ahead in 0..=needs.len() {
                let start = start_ms(std::slice::from_ref(&load), needs[..ahead].iter().map(|n| need(*n)), ONE);
                prop_assert_eq!(start.is_some(), service.is_some());
                prop_assert!(start >= last, "{:?} after {:?}", start, last);
                last = start;
            }
        }
    }

    /// Answers of varying length, on two replicas of different speed: predictions made from what was
    /// measured are right on average, which one average over both replicas would not be.
    #[test]
    fn a_noisy_queue_starts_about_when_predicted() {
        let mut random = fastrand::Rng::with_seed(7);
        let usual = [200u64, 2_000];
        let mut measured = [Speed::default(); 2];
        for _ in 0..50 {
            for at in 0..2 {
                measured[at].service_us.add(usual[at] * random.u64(500..1_500));
            }
        }
        let loads: Vec<Load> = measured
            .iter()
            .map(|speed| Load {
                slots_total: 2,
                running: vec![Running { need: ONE, elapsed_ms: 0 }; 2],
                speed: Some(*speed),
                others: 0,
            })
            .collect();
        let predicted = start_ms(&loads, std::iter::repeat_n(ONE, 60), ONE).expect("measured") as f64;
        let runs = 200;
        let mut sum = 0.0;
        for _ in 0..runs {
            let mut take = |at: usize| usual[at] * random.u64(500..1_500);
            let mut slots: Vec<(u64, usize)> = [0, 0, 1, 1].map(|at| (take(at), at)).to_vec();
            let mut start = 0;
            for _ in 0..=60 {
                slots.sort_unstable();
                let (free_at, at) = slots[0];
                start = free_at;
                slots[0].0 += take(at);
            }
            sum += start as f64 / 1000.0;
        }
        let mean = sum / f64::from(runs);
        assert!((predicted - mean).abs() < 0.25 * mean, "predicted {predicted} ms, started after {mean} ms");
    }

    #[test]
    fn an_unmeasured_replica_counts_as_its_neighbours_and_alone_as_unknown() {
        let busy = |speed| Load {
            slots_total: 1,
            others: 0,
            running: vec![Running { need: ONE, elapsed_ms: 0 }],
            speed,
        };
        assert_eq!(start_ms(&[busy(None)], [], ONE), None);
        assert_eq!(start_ms(&[], [], ONE), None);
        assert_eq!(start_ms(&[busy(None), busy(Some(speed(800)))], [ONE], ONE), Some(800));
    }

    #[test]
    fn a_short_request_is_not_expected_to_take_the_usual_time() {
        let mut known = speed(10_000);
        known.first_token_us.add(100_000);
        known.token_us.add(10_000);
        let short = Need { slots: 1, tokens_max: Some(5) };
        let load = |need, elapsed_ms| Load {
            slots_total: 1,
            others: 0,
            running: vec![Running { need, elapsed_ms }],
            speed: Some(known),
        };
        assert_eq!(start_ms(&[load(short, 50)], [], ONE), Some(100));
        assert_eq!(start_ms(&[load(ONE, 4_000)], [short], ONE), Some(6_150));
        assert_eq!(start_ms(&[load(ONE, 99_000)], [], ONE), Some(5_000), "it is overdue");
    }

    #[test]
    fn averages_follow_what_is_measured() {
        let mut average = Average::default();
        assert_eq!(average.get(), None);
        average.add(100);
        average.add(300);
        assert_eq!(average.get(), Some(200), "the first samples count equally");
        (0..100).for_each(|_| average.add(1_000));
        assert!(average.get().is_some_and(|value| value > 990), "{average:?}");
    }
}
