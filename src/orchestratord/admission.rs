//! Who waits for a slot, and who is next.
//!
//! Two classes: interactive work goes before batch work, but after [`INTERACTIVE_RUN_MAX`]
//! interactive ones in a row a waiting batch one goes first. Within a class clients take turns, and
//! within a client the first to come is the first to go, so one client with a thousand requests
//! delays another client's single request by one.
//!
//! What a waiter asks for is opaque here (`A`): the queue hands asks to a predicate and takes out
//! the first that fits, so that a request for a busy model does not hold up one for an idle model.
//! The queue is bounded; beyond that the only honest answer is a refusal.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;
use std::sync::Arc;

use crate::time::Mono;

/// Default number of waiting requests. Each holds a connection and a body, so the bound is one of
/// memory; a queue that is longer than this is not served within anybody's patience anyway.
pub const CAPACITY_DEFAULT: usize = 1000;
/// Default time that a request waits, in milliseconds: shorter than common client timeouts.
pub const TIMEOUT_MS_DEFAULT: u64 = 60_000;
/// Interactive requests in a row before a waiting batch request goes first.
pub const INTERACTIVE_RUN_MAX: u32 = 8;

/// How urgent a request is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Priority {
    /// Somebody looks at the screen.
    #[default]
    Interactive,
    /// Nobody does.
    Batch,
}

impl Priority {
    /// The name on the wire and in metrics.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Priority::Interactive => "interactive",
            Priority::Batch => "batch",
        }
    }
}

impl std::str::FromStr for Priority {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "interactive" => Ok(Priority::Interactive),
            "batch" => Ok(Priority::Batch),
            _ => Err(format!("{text:?} is not a priority: use interactive or batch")),
        }
    }
}

/// A waiting request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Waiter<A> {
    /// The caller's name for it.
    pub id: u64,
    /// What it asks for.
    pub ask: A,
    /// How urgent it is.
    pub priority: Priority,
    /// With whom it shares a turn.
    pub client: Arc<str>,
    /// When it began to wait.
    pub since: Mono,
    /// When it gives up.
    pub deadline: Mono,
}

/// Why a request may not wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// As many as allowed wait already.
    Full {
        /// The limit.
        capacity: usize,
    },
    /// A request of this id waits already.
    Known,
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Refused::Full { capacity } => write!(f, "{capacity} requests are waiting already"),
            Refused::Known => f.write_str("this request is waiting already"),
        }
    }
}

/// The queue. See the introduction of this file.
#[derive(Debug)]
pub struct Admission<A> {
    capacity: usize,
    waiters: BTreeMap<u64, Waiter<A>>,
    deadlines: BTreeSet<(Mono, u64)>,
    interactive: Class,
    batch: Class,
    /// Interactive requests taken since a batch one was, while one was waiting.
    interactive_run: u32,
}

/// The order within one class: clients in turn, and each one's requests by arrival.
#[derive(Debug, Default)]
struct Class {
    turns: VecDeque<Arc<str>>,
    queues: BTreeMap<Arc<str>, VecDeque<u64>>,
}

impl<A> Admission<A> {
    /// An empty queue for at most `capacity` requests.
    #[must_use]
    pub fn new(capacity: usize) -> Self {
        Admission {
            capacity,
            waiters: BTreeMap::new(),
            deadlines: BTreeSet::new(),
            interactive: Class::default(),
            batch: Class::default(),
            interactive_run: 0,
        }
    }

    /// Lets a request wait. Returns its position, as [`Admission::position`].
    ///
    /// # Errors
    /// [`Refused`]; nothing has changed then.
    pub fn push(&mut self, waiter: Waiter<A>) -> Result<usize, Refused> {
        if self.waiters.contains_key(&waiter.id) {
            return Err(Refused::Known);
        }
        if self.waiters.len() >= self.capacity {
            return Err(Refused::Full { capacity: self.capacity });
        }
        let (id, priority) = (waiter.id, waiter.priority);
        self.class(priority).push(&waiter.client, id);
        self.deadlines.insert((waiter.deadline, id));
        let client = waiter.client.clone();
        self.waiters.insert(id, waiter);
        Ok(self.class(priority).position(&client, id).unwrap_or(0))
    }

    /// Takes a request out that no longer waits (its client left).
    pub fn remove(&mut self, id: u64) -> Option<Waiter<A>> {
        let waiter = self.waiters.remove(&id)?;
        self.deadlines.remove(&(waiter.deadline, id));
        self.class(waiter.priority).remove(&waiter.client, id);
        Some(waiter)
    }

    /// Takes out whoever has waited for too long, the most overdue first.
    pub fn expire(&mut self, now: Mono) -> Vec<Waiter<A>> {
        let mut expired = Vec::new();
        while let Some(&(deadline, id)) = self.deadlines.first()
            && deadline <= now
        {
            expired.extend(self.remove(id));
        }
        expired
    }

    /// When [`Admission::expire`] is wanted next.
    #[must_use]
    pub fn deadline(&self) -> Option<Mono> {
        self.deadlines.first().map(|(deadline, _)| *deadline)
    }

    /// Takes out the first request in order that `fits`. At most one call of `fits` a waiter.
    pub fn next_fitting(&mut self, mut fits: impl FnMut(&A) -> bool) -> Option<Waiter<A>> {
        let batch_first = self.interactive_run >= INTERACTIVE_RUN_MAX;
        let order = if batch_first {
            [Priority::Batch, Priority::Interactive]
        } else {
            [Priority::Interactive, Priority::Batch]
        };
        let waiters = &self.waiters;
        let mut fits_id = |id: u64| waiters.get(&id).is_some_and(|waiter| fits(&waiter.ask));
        let found = order.into_iter().find_map(|priority| match priority {
            Priority::Interactive => self.interactive.in_order().find(|id| fits_id(*id)),
            Priority::Batch => self.batch.in_order().find(|id| fits_id(*id)),
        })?;
        let waiter = self.remove(found)?;
        self.class(waiter.priority).end_turn(&waiter.client);
        self.interactive_run = match waiter.priority {
            Priority::Interactive if !self.batch.queues.is_empty() => self.interactive_run.saturating_add(1),
            _ => 0,
        };
        Some(waiter)
    }

    /// How many of its class go before a request if all fit; 0 is next.
    #[must_use]
    pub fn position(&self, id: u64) -> Option<usize> {
        let waiter = self.waiters.get(&id)?;
        match waiter.priority {
            Priority::Interactive => self.interactive.position(&waiter.client, id),
            Priority::Batch => self.batch.position(&waiter.client, id),
        }
    }

    /// Everybody in the order in which they are served if all fit.
    pub fn in_order(&self) -> impl Iterator<Item = &Waiter<A>> {
        let mut interactive = self.interactive.in_order().peekable();
        let mut batch = self.batch.in_order().peekable();
        let mut run = self.interactive_run;
        std::iter::from_fn(move || {
            let batch_next = interactive.peek().is_none() || run >= INTERACTIVE_RUN_MAX;
            let id = if batch_next && batch.peek().is_some() {
                run = 0;
                batch.next()
            } else {
                run = if batch.peek().is_some() { run.saturating_add(1) } else { 0 };
                interactive.next()
            };
            self.waiters.get(&id?)
        })
    }

    /// How many wait.
    #[must_use]
    pub fn len(&self) -> usize {
        self.waiters.len()
    }

    /// Whether nobody waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.waiters.is_empty()
    }

    /// Panics where the queue contradicts itself. For tests and simulations; linear.
    pub fn check_invariants(&self) {
        assert!(self.waiters.len() <= self.capacity, "more wait than may");
        assert_eq!(self.deadlines.len(), self.waiters.len(), "a stray deadline");
        let mut queued = 0;
        for (class, priority) in [(&self.interactive, Priority::Interactive), (&self.batch, Priority::Batch)]
        {
            let turns: BTreeSet<&Arc<str>> = class.turns.iter().collect();
            assert_eq!(turns.len(), class.turns.len(), "a client has two turns");
            assert!(
                turns.into_iter().eq(class.queues.keys()),
                "a client without a turn, or a turn for nobody"
            );
            for (client, queue) in &class.queues {
                assert!(!queue.is_empty(), "a turn for nobody");
                for id in queue {
                    let waiter = &self.waiters[id];
                    assert_eq!((&waiter.client, waiter.priority), (client, priority), "in the wrong queue");
                    assert!(self.deadlines.contains(&(waiter.deadline, *id)), "waits for ever");
                }
                queued += queue.len();
            }
        }
        assert_eq!(queued, self.waiters.len(), "a waiter in no queue");
    }

    fn class(&mut self, priority: Priority) -> &mut Class {
        match priority {
            Priority::Interactive => &mut self.interactive,
            Priority::Batch => &mut self.batch,
        }
    }
}

impl Class {
    fn push(&mut self, client: &Arc<str>, id: u64) {
        if !self.queues.contains_key(client) {
            self.turns.push_back(client.clone());
        }
        self.queues.entry(client.clone()).or_default().push_back(id);
    }

    fn remove(&mut self, client: &Arc<str>, id: u64) {
        let Some(queue) = self.queues.get_mut(client) else { return };
        queue.retain(|other| *other != id);
        if queue.is_empty() {
            self.queues.remove(client);
            self.turns.retain(|other| other != client);
        }
    }

    /// A client that was served goes to the end of the turns.
    fn end_turn(&mut self, client: &Arc<str>) {
        if let Some(at) = self.turns.iter().position(|other| other == client)
            && let Some(client) = self.turns.remove(at)
        {
            self.turns.push_back(client);
        }
    }

    /// Everybody in the order of service: one of each client, then the second of each, and so on.
    fn in_order(&self) -> impl Iterator<Item = u64> {
        let mut round: VecDeque<_> = self
            .turns
            .iter()
            .filter_map(|client| self.queues.get(client))
            .map(|queue| queue.iter())
            .collect();
        std::iter::from_fn(move || {
            while let Some(mut queue) = round.pop_front() {
                if let Some(id) = queue.next() {
                    round.push_back(queue);
                    return Some(*id);
                }
            }
            None
        })
    }

    fn position(&self, client: &Arc<str>, id: u64) -> Option<usize> {
        let depth = self.queues.get(client)?.iter().position(|other| *other == id)?;
        let turn = self.turns.iter().position(|other| other == client)?;
        let ahead = |(at, other): (usize, &Arc<str>)| {
            let waiting = self.queues.get(other).map_or(0, VecDeque::len);
            waiting.min(if at < turn { depth + 1 } else { depth })
        };
        Some(self.turns.iter().enumerate().map(ahead).sum())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn waiter(id: u64, priority: Priority, client: &str) -> Waiter<u64> {
        let since = Mono(0);
        Waiter {
            id,
            ask: id,
            priority,
            client: client.into(),
            since,
            deadline: since.plus_ms(TIMEOUT_MS_DEFAULT),
        }
    }

    fn drain(queue: &mut Admission<u64>) -> Vec<u64> {
        std::iter::from_fn(|| queue.next_fitting(|_| true)).map(|w| w.id).collect()
    }

    #[test]
    fn batch_waits_behind_eight_interactive_ones_but_not_for_ever() {
        let mut queue = Admission::new(100);
        queue.push(waiter(100, Priority::Batch, "b")).expect("room");
        queue.push(waiter(101, Priority::Batch, "b")).expect("room");
        for id in 0..20 {
            queue.push(waiter(id, Priority::Interactive, "i")).expect("room");
        }
        let order = drain(&mut queue);
        let batch: Vec<usize> =
            order.iter().enumerate().filter(|(_, id)| **id >= 100).map(|(at, _)| at).collect();
        assert_eq!(batch, [8, 17], "{order:?}");
    }

    #[test]
    fn a_flood_of_one_client_delays_another_by_one() {
        let mut queue = Admission::new(1000);
        for id in 0..900 {
            queue.push(waiter(id, Priority::Interactive, "flood")).expect("room");
        }
        assert_eq!(queue.push(waiter(900, Priority::Interactive, "quiet")), Ok(1));
        assert_eq!(drain(&mut queue)[..3], [0, 900, 1]);
    }

    #[test]
    fn who_does_not_fit_holds_up_nobody() {
        let mut queue = Admission::new(10);
        for id in 0..4 {
            queue.push(waiter(id, Priority::Interactive, "c")).expect("room");
        }
        assert_eq!(queue.next_fitting(|ask| *ask >= 2).map(|w| w.id), Some(2));
        assert_eq!(queue.next_fitting(|ask| *ask > 9), None);
        assert_eq!(drain(&mut queue), [0, 1, 3]);
    }

    #[test]
    fn a_full_queue_refuses_and_a_late_waiter_leaves() {
        let mut queue = Admission::new(1);
        queue.push(waiter(1, Priority::Batch, "c")).expect("room");
        assert_eq!(queue.push(waiter(1, Priority::Batch, "c")), Err(Refused::Known));
        assert_eq!(queue.push(waiter(2, Priority::Interactive, "c")), Err(Refused::Full { capacity: 1 }));
        let due = queue.deadline().expect("one waits");
        assert!(queue.expire(Mono(due.0 - 1)).is_empty());
        let ids: Vec<u64> = queue.expire(due).into_iter().map(|w| w.id).collect();
        assert_eq!((ids, queue.deadline(), queue.is_empty()), (vec![1], None, true));
    }

    proptest! {
        /// Whatever comes and goes: nobody is lost or served twice, one client's requests keep their
        /// order, positions tell the order of service, and nobody outlives the deadline.
        #[test]
        fn nobody_is_lost(ops in proptest::collection::vec((0u8..5, 0u64..40, 0usize..4, any::<bool>()), 1..150)) {
            let mut queue = Admission::new(20);
            let (mut now, mut next_id) = (Mono(0), 0u64);
            let mut inside: BTreeSet<u64> = BTreeSet::new();
            for (op, number, client, batch) in ops {
                match op {
                    0 | 1 => {
                        let priority = if batch { Priority::Batch } else { Priority::Interactive };
                        let mut one = waiter(next_id, priority, ["a", "b", "c", "d"][client]);
                        one.deadline = now.plus_ms(number * 10);
                        let pushed = queue.push(one);
                        prop_assert_eq!(pushed.is_ok(), inside.len() < 20);
                        if let Ok(position) = pushed {
                            prop_assert_eq!(queue.position(next_id), Some(position));
                            inside.insert(next_id);
                        }
                        next_id += 1;
                    }
                    2 => {
                        prop_assert_eq!(queue.remove(number).is_some(), inside.remove(&number));
                        let order: Vec<u64> = queue.in_order().map(|waiter| waiter.id).collect();
                        let (mut all, mut sorted) = (order.clone(), inside.iter().copied().collect::<Vec<_>>());
                        all.sort_unstable();
                        sorted.sort_unstable();
                        prop_assert_eq!(all, sorted);
                        if inside.len() == 20 {
                            prop_assert_eq!(drain(&mut queue), order);
                            inside.clear();
                        }
                    }
                    3 => {
                        now = now.plus_ms(number);
                        for waiter in queue.expire(now) {
                            prop_assert!(waiter.deadline <= now && inside.remove(&waiter.id));
                        }
                        prop_assert!(queue.deadline().is_none_or(|due| due > now));
                    }
                    _ => {
                        let before: BTreeMap<u64, usize> =
                            inside.iter().map(|id| (*id, queue.position(*id).expect("waits"))).collect();
                        let Some(taken) = queue.next_fitting(|_| true) else {
                            prop_assert!(inside.is_empty());
                            continue;
                        };
                        prop_assert_eq!(before[&taken.id], 0, "not the first of its class");
                        prop_assert!(inside.remove(&taken.id));
                        for id in &inside {
                            let waits = &queue.waiters[id];
                            let same = waits.priority == taken.priority;
                            prop_assert_eq!(queue.position(*id), Some(before[id] - usize::from(same)));
                            prop_assert!(!same || waits.client != taken.client || *id > taken.id, "overtaken");
                        }
                    }
                }
                queue.check_invariants();
                prop_assert_eq!(queue.len(), inside.len());
            }
        }
    }
}
