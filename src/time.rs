//! Time as values.
//!
//! Nothing in this file asks a clock: the reactor samples both clocks once a turn and hands the
//! result down as a [`Now`]. Decisions (leases, deadlines, backoff) use the monotonic half only;
//! the wall half is for people and for peers to display.
//!
//! [`DeadlineQueue`] answers "what is due?" for any number of keys. It is lazy: moving a deadline
//! later costs nothing until the old one comes due, which is what a keep-alive connection does on
//! every request.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::fmt;

const NS_PER_MS: u64 = 1_000_000;

/// Nanoseconds on the monotonic clock of this process's machine. Never compared between machines.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Mono(pub u64);

impl Mono {
    /// A point this many milliseconds later; saturates instead of wrapping.
    #[must_use]
    pub fn plus_ms(self, ms: u64) -> Mono {
        Mono(self.0.saturating_add(ms.saturating_mul(NS_PER_MS)))
    }

    /// Nanoseconds from `earlier` to here, 0 if `earlier` is later.
    #[must_use]
    pub fn ns_since(self, earlier: Mono) -> u64 {
        self.0.saturating_sub(earlier.0)
    }

    /// Whole milliseconds from `earlier` to here, 0 if `earlier` is later.
    #[must_use]
    pub fn ms_since(self, earlier: Mono) -> u64 {
        self.ns_since(earlier) / NS_PER_MS
    }
}

impl fmt::Debug for Mono {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.6}s", self.0 as f64 / 1e9)
    }
}

/// Nanoseconds since the Unix epoch. For display and for files; no decision rests on it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Wall(pub u64);

impl Wall {
    /// Milliseconds since the Unix epoch, as the JSON fields `*_at_ms` carry it.
    #[must_use]
    pub fn unix_ms(self) -> u64 {
        self.0 / NS_PER_MS
    }

    /// `2026-01-31T12:00:00.123Z`, as heartbeats carry it.
    #[must_use]
    pub fn rfc3339(self) -> String {
        jiff::Timestamp::from_millisecond(i64::try_from(self.unix_ms()).unwrap_or(i64::MAX))
            .map(|at| format!("{at:.3}"))
            .unwrap_or_default()
    }
}

impl fmt::Debug for Wall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.rfc3339())
    }
}

/// One sample of both clocks: everything that happens in a turn of the loop happens at this time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Now {
    /// What decisions use.
    pub mono: Mono,
    /// What people read.
    pub wall: Wall,
}

impl Now {
    /// The same moment advanced on both clocks; simulations and tests move time with it.
    #[must_use]
    pub fn plus_ms(self, ms: u64) -> Now {
        Now { mono: self.mono.plus_ms(ms), wall: Wall(self.wall.0 + ms * NS_PER_MS) }
    }
}

/// The earlier of two optional deadlines.
#[must_use]
pub fn earliest(a: Option<Mono>, b: Option<Mono>) -> Option<Mono> {
    match (a, b) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    }
}

/// A lazy priority queue of `(deadline, key)`.
///
/// The owner of a key keeps the key's true deadline in a [`Deadline`] beside its own state. The
/// queue holds at least one entry at or before every armed deadline; an entry that comes due is
/// checked against the truth by [`DeadlineQueue::confirm`] and re-queued if it was moved.
#[derive(Debug)]
pub struct DeadlineQueue<K> {
    heap: BinaryHeap<Reverse<(Mono, K)>>,
}

/// A deadline as its owner keeps it: when, and the earliest queue entry that covers it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Deadline {
    at: Option<Mono>,
    queued: Option<Mono>,
}

impl Deadline {
    /// When it is due; `None` when disarmed.
    #[must_use]
    pub fn at(&self) -> Option<Mono> {
        self.at
    }

    /// Disarms. Queue entries that are left over die when they come due.
    pub fn disarm(&mut self) {
        self.at = None;
    }
}

impl<K: Ord + Copy> Default for DeadlineQueue<K> {
    fn default() -> Self {
        DeadlineQueue { heap: BinaryHeap::new() }
    }
}

impl<K: Ord + Copy> DeadlineQueue<K> {
    /// Sets `deadline` to `at`. Queues an entry only if none that is early enough exists.
    pub fn arm(&mut self, key: K, deadline: &mut Deadline, at: Mono) {
        deadline.at = Some(at);
        if deadline.queued.is_none_or(|queued| queued > at) {
            deadline.queued = Some(at);
            self.heap.push(Reverse((at, key)));
        }
    }

    /// The earliest entry: no armed deadline is before it, though it may itself be outdated.
    #[must_use]
    pub fn next(&self) -> Option<Mono> {
        self.heap.peek().map(|Reverse((at, _))| *at)
    }

    /// Drops what comes first as long as nobody owns it any more: nobody is woken up for it.
    pub fn forget_orphans(&mut self, has_owner: impl Fn(K) -> bool) {
        while let Some(&Reverse((_, key))) = self.heap.peek()
            && !has_owner(key)
        {
            self.heap.pop();
        }
    }

    /// Takes the earliest entry that is due. Whether its key is really due, [`Self::confirm`] says.
    pub fn pop_due(&mut self, now: Mono) -> Option<(Mono, K)> {
        let &Reverse((queued_at, key)) = self.heap.peek()?;
        if queued_at > now {
            return None;
        }
        self.heap.pop();
        Some((queued_at, key))
    }

    /// Holds a popped entry against the owner's deadline: true if it has passed (it is then
    /// disarmed), otherwise the key is queued again for its later deadline.
    pub fn confirm(&mut self, entry: (Mono, K), deadline: &mut Deadline, now: Mono) -> bool {
        let (queued_at, key) = entry;
        if deadline.queued == Some(queued_at) {
            deadline.queued = None;
        }
        match deadline.at {
            Some(at) if at <= now => {
                deadline.at = None;
                true
            }
            Some(at) => {
                self.arm(key, deadline, at);
                false
            }
            None => false,
        }
    }

    /// Entries held, outdated ones included: the queue's memory is proportional to this.
    #[must_use]
    pub fn len(&self) -> usize {
        self.heap.len()
    }

    /// Whether the queue holds no entry.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.heap.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    #[test]
    fn wall_prints_as_rfc3339_with_milliseconds() {
        assert_eq!(Wall(1_700_000_000_123 * NS_PER_MS).rfc3339(), "2023-11-14T22:13:20.123Z");
    }

    #[test]
    fn moving_a_deadline_later_adds_no_entries() {
        let mut queue = DeadlineQueue::default();
        let mut deadline = Deadline::default();
        for ms in 1..1000 {
            queue.arm(7u32, &mut deadline, Mono(0).plus_ms(ms));
        }
        assert_eq!(queue.len(), 1);
        let early = queue.pop_due(Mono(0).plus_ms(998)).expect("the first entry is due");
        assert!(!queue.confirm(early, &mut deadline, Mono(0).plus_ms(998)));
        let due = queue.pop_due(Mono(0).plus_ms(999)).expect("queued again");
        assert!(queue.confirm(due, &mut deadline, Mono(0).plus_ms(999)));
        assert_eq!(deadline.at(), None);
    }

    proptest::proptest! {
        /// Whatever is armed, moved and disarmed: a key expires if and only if its deadline passed.
        #[test]
        fn expires_exactly_what_is_due(ops in proptest::collection::vec((0u8..8, 0u64..50, 0u8..4), 1..200)) {
            let mut queue = DeadlineQueue::default();
            let mut truth: BTreeMap<u8, Deadline> = BTreeMap::new();
            let mut now = Mono(0);
            for (key, ms, op) in ops {
                match op {
                    0 => { truth.remove(&key); }
                    1 => truth.entry(key).or_default().disarm(),
                    2 => queue.arm(key, truth.entry(key).or_default(), now.plus_ms(ms)),
                    _ => now = now.plus_ms(ms),
                }
                let due: Vec<u8> = truth.iter().filter(|(_, d)| d.at().is_some_and(|at| at <= now)).map(|(k, _)| *k).collect();
                let mut fired = Vec::new();
                queue.forget_orphans(|key| truth.contains_key(&key));
                proptest::prop_assert!(queue.next().is_none() || !truth.is_empty());
                while let Some(entry) = queue.pop_due(now) {
                    if let Some(deadline) = truth.get_mut(&entry.1)
                        && queue.confirm(entry, deadline, now)
                    {
                        fired.push(entry.1);
                    }
                }
                fired.sort_unstable();
                proptest::prop_assert_eq!(fired, due);
            }
        }
    }
}
