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

    /// How many wait.
    #[must_use]
    pub fn len(&self) -> usize {
        self.waiters.len()
    }

    /// How many wait in one class.
    #[must_use]
    pub fn len_of(&self, priority: Priority) -> usize {
        let class = if priority == Priority::Interactive { &self.interactive } else { &self.batch };
        class.queues.values().map(VecDeque::len).sum()
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
