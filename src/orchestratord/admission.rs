//! Who waits for a slot, and who is next.
//!
//! Waiters who ask for exactly the same stand in one group, and groups are found by the model that they
//! name: a slot that becomes free is offered to the groups that its engine could serve, one question a
//! group, however many wait for other models.
//!
//! **Clients take turns.** Within a group the client that was served longest ago is next, a newcomer
//! comes behind those who are there, and within a client the first to come is the first to go: one
//! client with a thousand requests delays another client's single request by one. Where several groups
//! fit, the one is next whose next client was served longest ago, whatever it was served; who asks for
//! many different things gains no turns by that.
//!
//! **Nobody starves.** A client that is served often elsewhere would always be the last to be served
//! here. So where the group that was served longest ago has been passed over [`PASSES_MAX`] times, it is
//! next. Interactive work goes before batch work, but a batch group that fits lets at most
//! [`INTERACTIVE_RUN_MAX`] interactive requests pass.
//!
//! What a waiter asks for is opaque here ([`Wanted`]), but for the model. The queue is bounded; beyond
//! that the only honest answer is a refusal.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

use crate::time::Mono;

/// Default number of waiting requests. Each holds a connection and a body, so the bound is one of
/// memory; a queue that is longer than this is not served within anybody's patience anyway.
pub const CAPACITY_DEFAULT: usize = 1000;
/// Default time that a request waits, in milliseconds: shorter than common client timeouts.
pub const TIMEOUT_MS_DEFAULT: u64 = 60_000;
/// Interactive requests that may pass a batch group that fits as well.
pub const INTERACTIVE_RUN_MAX: u32 = 8;
/// How often the group that was served longest ago may be passed over: seldom enough that turns of
/// clients decide nearly always.
pub const PASSES_MAX: u32 = 8;

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
    /// Every priority.
    pub const ALL: [Priority; 2] = [Priority::Interactive, Priority::Batch];

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

/// What is asked for. Equal asks share a group.
pub trait Wanted: Clone + Ord {
    /// The model by name; `None` takes any.
    fn model(&self) -> Option<&str>;
}

/// What an engine serves: which groups are offered its slot.
#[derive(Clone, Copy, Debug)]
pub enum Serves<'a> {
    /// These models, and asks that name none.
    Models(&'a [String]),
    /// Whatever it is asked for.
    Anything,
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
    /// When it was asked for: within its client the oldest is the first, so one that comes back to the
    /// queue has not lost its place.
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
    by_age: BTreeSet<(Priority, Mono, u64)>,
    interactive: Class<A>,
    batch: Class<A>,
    /// Turns given so far: numbers the order in which clients and groups came or were served.
    turns: u64,
}

/// Everybody of one priority.
#[derive(Debug)]
struct Class<A> {
    by_model: BTreeMap<String, Groups<A>>,
    any_model: Groups<A>,
    clients: BTreeMap<Arc<str>, Client>,
    len: usize,
}

#[derive(Debug)]
struct Groups<A> {
    groups: BTreeMap<A, Group>,
    len: usize,
}

/// A client that waits for anything.
#[derive(Debug)]
struct Client {
    waiting: usize,
    /// Its turn: when it came, or was served last.
    turn: u64,
}

/// Those who ask for the same.
#[derive(Debug)]
struct Group {
    lines: BTreeMap<Arc<str>, Line>,
    /// Whose turn is next, by [`Line::turn`].
    order: BTreeMap<u64, Arc<str>>,
    /// When it came to be, or was served last.
    turn: u64,
    /// Slots that it fitted and that another group of its class got.
    passed: u32,
    /// Slots that it fitted and that interactive requests got, if it is a batch group.
    outranked: u32,
    /// Fits the slot that is being given away.
    fits: bool,
}

/// One client's requests in a group.
#[derive(Debug)]
struct Line {
    turn: u64,
    ids: BTreeSet<(Mono, u64)>,
}

/// Who of a class is next for a slot.
struct Next {
    id: u64,
    /// Groups that fit.
    groups: usize,
    /// It is next because it was passed over for long.
    was_passed: bool,
    /// Its class has let as many interactive requests pass as it must.
    is_outranked: bool,
}

impl<A: Wanted> Admission<A> {
    /// An empty queue for at most `capacity` requests.
    #[must_use]
    pub fn new(capacity: usize) -> Self {
        Admission {
            capacity,
            waiters: BTreeMap::new(),
            deadlines: BTreeSet::new(),
            by_age: BTreeSet::new(),
            interactive: Class::default(),
            batch: Class::default(),
            turns: 0,
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
        self.turns += 1;
        let (id, turn) = (waiter.id, self.turns);
        self.class(waiter.priority).push(&waiter, turn);
        self.deadlines.insert((waiter.deadline, id));
        self.by_age.insert((waiter.priority, waiter.since, id));
        self.waiters.insert(id, waiter);
        Ok(self.position(id).unwrap_or(0))
    }

    /// Takes a request out that no longer waits (its client left).
    pub fn remove(&mut self, id: u64) -> Option<Waiter<A>> {
        self.take(id, None)
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

    /// Takes out who is next for a slot of an engine that `serves` so much, of those whose ask `fits`. At
    /// most one call of `fits` a group.
    pub fn next_fitting(
        &mut self,
        serves: Serves<'_>,
        mut fits: impl FnMut(&A) -> bool,
    ) -> Option<Waiter<A>> {
        let interactive = self.interactive.next(serves, &mut fits);
        let batch = self.batch.next(serves, &mut fits);
        let next = match (interactive, batch) {
            (Some(_), Some(batch)) if batch.is_outranked => batch,
            (Some(interactive), batch) => {
                if batch.is_some() {
                    self.batch.each_fitting(serves, |group| group.outranked += 1);
                }
                interactive
            }
            (None, batch) => batch?,
        };
        let priority = self.waiters.get(&next.id)?.priority;
        let class = self.class(priority);
        if next.groups > 1 || priority == Priority::Batch {
            class.each_fitting(serves, |group| {
                group.passed = if next.was_passed { 0 } else { group.passed + 1 };
                group.outranked = 0;
            });
        }
        self.turns += 1;
        self.take(next.id, Some(self.turns))
    }

    /// How many of those who ask for the same with the same priority go before a request; 0 is next.
    #[must_use]
    pub fn position(&self, id: u64) -> Option<usize> {
        let waiter = self.waiters.get(&id)?;
        self.class_of(waiter.priority).groups_of(&waiter.ask)?.groups.get(&waiter.ask)?.position(waiter)
    }

    /// Everybody, interactive work first, within that by age: about the order in which they are served if
    /// all fit, without the turns of clients. For forecasts.
    pub fn in_order(&self) -> impl Iterator<Item = &Waiter<A>> {
        self.by_age.iter().filter_map(|(.., id)| self.waiters.get(id))
    }

    /// Since when the one waits that has waited longest.
    #[must_use]
    pub fn oldest(&self) -> Option<Mono> {
        let first = |priority: &Priority| {
            let (found, since, _) = self.by_age.range((*priority, Mono::default(), 0)..).next()?;
            (found == priority).then_some(*since)
        };
        Priority::ALL.iter().filter_map(first).min()
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

    /// How many of this priority wait.
    #[must_use]
    pub fn len_of(&self, priority: Priority) -> usize {
        self.class_of(priority).len
    }

    /// How many wait for this model; for any, with `None`.
    #[must_use]
    pub fn len_for(&self, model: Option<&str>) -> usize {
        let of = |class: &Class<A>| match model {
            Some(model) => class.by_model.get(model).map_or(0, |groups| groups.len),
            None => class.any_model.len,
        };
        of(&self.interactive) + of(&self.batch)
    }

    /// Everything that is asked for; twice, if with both priorities.
    pub fn wanted(&self) -> impl Iterator<Item = &A> {
        [&self.interactive, &self.batch].into_iter().flat_map(|class| {
            class.by_model.values().chain([&class.any_model]).flat_map(|groups| groups.groups.keys())
        })
    }

    /// Who asks for exactly this.
    #[must_use]
    pub fn who_wants(&self, ask: &A) -> Vec<u64> {
        [&self.interactive, &self.batch]
            .into_iter()
            .filter_map(|class| class.groups_of(ask)?.groups.get(ask))
            .flat_map(|group| group.lines.values())
            .flat_map(|line| line.ids.iter().map(|(_, id)| *id))
            .collect()
    }

    /// Panics where the queue contradicts itself. For tests and simulations; linear.
    pub fn check_invariants(&self) {
        assert!(self.waiters.len() <= self.capacity, "more wait than may");
        assert_eq!(self.deadlines.len(), self.waiters.len(), "a stray deadline");
        assert!(self.by_age.len() == self.waiters.len() && self.in_order().count() == self.waiters.len());
        let mut queued = 0;
        for priority in Priority::ALL {
            let class = self.class_of(priority);
            let mut by_client: BTreeMap<&Arc<str>, usize> = BTreeMap::new();
            let named = class.by_model.iter().map(|(model, groups)| (Some(model.as_str()), groups));
            for (model, groups) in named.chain([(None, &class.any_model)]) {
                assert!(model.is_none() || groups.len > 0, "a model that nobody wants");
                let mut in_model = 0;
                for (ask, group) in &groups.groups {
                    assert_eq!(ask.model(), model, "under another model");
                    let order: Vec<_> = group.order.iter().collect();
                    assert_eq!(order.len(), group.lines.len(), "a client without a turn");
                    for (turn, client) in order {
                        assert_eq!(group.lines[client].turn, *turn, "two turns");
                        assert!(*turn <= self.turns && group.turn <= self.turns, "a turn to come");
                    }
                    for (client, line) in &group.lines {
                        assert!(!line.ids.is_empty(), "a turn for nobody");
                        for (since, id) in &line.ids {
                            let waiter = &self.waiters[id];
                            assert_eq!((&waiter.client, waiter.priority), (client, priority), "misplaced");
                            assert!(waiter.ask == *ask && waiter.since == *since, "in the wrong group");
                            assert!(self.deadlines.contains(&(waiter.deadline, *id)), "waits for ever");
                        }
                        in_model += line.ids.len();
                        *by_client.entry(client).or_default() += line.ids.len();
                    }
                }
                assert_eq!(groups.len, in_model, "counted wrongly");
                queued += in_model;
            }
            let counted = class.clients.iter().map(|(client, known)| (client, known.waiting));
            assert!(counted.eq(by_client), "clients are counted wrongly");
        }
        assert_eq!(queued, self.waiters.len(), "a waiter in no queue");
    }

    /// With `turn` it is served, which is its client's turn and its group's.
    fn take(&mut self, id: u64, turn: Option<u64>) -> Option<Waiter<A>> {
        let waiter = self.waiters.remove(&id)?;
        self.deadlines.remove(&(waiter.deadline, id));
        self.by_age.remove(&(waiter.priority, waiter.since, id));
        self.class(waiter.priority).remove(&waiter, turn);
        Some(waiter)
    }

    fn class(&mut self, priority: Priority) -> &mut Class<A> {
        match priority {
            Priority::Interactive => &mut self.interactive,
            Priority::Batch => &mut self.batch,
        }
    }

    fn class_of(&self, priority: Priority) -> &Class<A> {
        match priority {
            Priority::Interactive => &self.interactive,
            Priority::Batch => &self.batch,
        }
    }
}

impl<A: Ord> Default for Groups<A> {
    fn default() -> Self {
        Groups { groups: BTreeMap::new(), len: 0 }
    }
}

impl<A: Ord> Default for Class<A> {
    fn default() -> Self {
        Class { by_model: BTreeMap::new(), any_model: Groups::default(), clients: BTreeMap::new(), len: 0 }
    }
}

impl<A: Wanted> Class<A> {
    fn push(&mut self, waiter: &Waiter<A>, turn: u64) {
        let client = self.clients.entry(waiter.client.clone()).or_insert_with(|| Client { waiting: 0, turn });
        client.waiting += 1;
        self.len += 1;
        let groups = match waiter.ask.model() {
            Some(model) if !self.by_model.contains_key(model) => {
                self.by_model.entry(model.to_string()).or_default()
            }
            Some(model) => match self.by_model.get_mut(model) {
                Some(groups) => groups,
                None => return,
            },
            None => &mut self.any_model,
        };
        groups.len += 1;
        let group = groups.groups.entry(waiter.ask.clone()).or_insert_with(|| Group {
            lines: BTreeMap::new(),
            order: BTreeMap::new(),
            turn,
            passed: 0,
            outranked: 0,
            fits: false,
        });
        if !group.lines.contains_key(&waiter.client) {
            group.lines.insert(waiter.client.clone(), Line { turn, ids: BTreeSet::new() });
            group.order.insert(turn, waiter.client.clone());
        }
        if let Some(line) = group.lines.get_mut(&waiter.client) {
            line.ids.insert((waiter.since, waiter.id));
        }
    }

    fn remove(&mut self, waiter: &Waiter<A>, served: Option<u64>) {
        self.len -= 1;
        if let Some(client) = self.clients.get_mut(&waiter.client) {
            client.waiting -= 1;
            client.turn = served.unwrap_or(client.turn);
            if client.waiting == 0 {
                self.clients.remove(&waiter.client);
            }
        }
        let model = waiter.ask.model();
        let groups = match model {
            Some(model) => self.by_model.get_mut(model),
            None => Some(&mut self.any_model),
        };
        let Some(groups) = groups else { return };
        groups.len -= 1;
        let is_empty = groups.len == 0;
        if let Some(group) = groups.groups.get_mut(&waiter.ask) {
            group.remove(waiter, served);
            if group.lines.is_empty() {
                groups.groups.remove(&waiter.ask);
            }
        }
        if let Some(model) = model.filter(|_| is_empty) {
            self.by_model.remove(model);
        }
    }

    fn groups_of(&self, ask: &A) -> Option<&Groups<A>> {
        match ask.model() {
            Some(model) => self.by_model.get(model),
            None => Some(&self.any_model),
        }
    }

    /// Hands every group that an engine might serve to `each`.
    fn each(
        &mut self,
        serves: Serves<'_>,
        mut each: impl FnMut(&A, &mut Group, &BTreeMap<Arc<str>, Client>),
    ) {
        let clients = &self.clients;
        let mut all = |groups: &mut Groups<A>| {
            groups.groups.iter_mut().for_each(|(ask, group)| each(ask, group, clients));
        };
        all(&mut self.any_model);
        match serves {
            Serves::Anything => self.by_model.values_mut().for_each(all),
            Serves::Models(models) => {
                for (at, model) in models.iter().enumerate() {
                    // Once, even if it is named twice.
                    if let Some(groups) = self.by_model.get_mut(model)
                        && !models[..at].contains(model)
                    {
                        all(groups);
                    }
                }
            }
        }
    }

    fn each_fitting(&mut self, serves: Serves<'_>, mut act: impl FnMut(&mut Group)) {
        self.each(serves, |_, group, _| {
            if group.fits {
                act(group);
            }
        });
    }

    /// Who is next. The groups that fit are marked.
    fn next(&mut self, serves: Serves<'_>, fits: &mut impl FnMut(&A) -> bool) -> Option<Next> {
        if self.len == 0 {
            return None;
        }
        let (mut groups, mut is_outranked) = (0, false);
        let mut by_client: Option<(u64, Mono, u64)> = None;
        let mut by_age: Option<(u64, u32, u64)> = None;
        self.each(serves, |ask, group, clients| {
            group.fits = fits(ask);
            let Some((client, &(since, id))) = group.first().filter(|_| group.fits) else { return };
            groups += 1;
            is_outranked |= group.outranked >= INTERACTIVE_RUN_MAX;
            let turn = clients.get(client).map_or(0, |client| client.turn);
            if by_client.is_none_or(|best| (turn, since, id) < best) {
                by_client = Some((turn, since, id));
            }
            if by_age.is_none_or(|(oldest, ..)| group.turn < oldest) {
                by_age = Some((group.turn, group.passed, id));
            }
        });
        let was_passed = groups > 1 && by_age.is_some_and(|(_, passed, _)| passed >= PASSES_MAX);
        let id = if was_passed { by_age.map(|(.., id)| id) } else { by_client.map(|(.., id)| id) };
        Some(Next { id: id?, groups, was_passed, is_outranked })
    }
}

impl Group {
    /// The client whose turn it is, and its first request.
    fn first(&self) -> Option<(&Arc<str>, &(Mono, u64))> {
        let (_, client) = self.order.first_key_value()?;
        Some((client, self.lines.get(client)?.ids.first()?))
    }

    fn remove<A>(&mut self, waiter: &Waiter<A>, served: Option<u64>) {
        if let Some(turn) = served {
            (self.turn, self.passed) = (turn, 0);
        }
        let Some(line) = self.lines.get_mut(&waiter.client) else { return };
        line.ids.remove(&(waiter.since, waiter.id));
        if line.ids.is_empty() {
            self.order.remove(&line.turn);
            self.lines.remove(&waiter.client);
        } else if let Some(turn) = served {
            // Who was served goes to the end of the turns.
            self.order.remove(&line.turn);
            line.turn = turn;
            self.order.insert(turn, waiter.client.clone());
        }
    }

    fn position<A>(&self, waiter: &Waiter<A>) -> Option<usize> {
        let line = self.lines.get(&waiter.client)?;
        let own = (waiter.since, waiter.id);
        // Mostly it has just come and is the last one.
        let depth = if line.ids.last() == Some(&own) {
            line.ids.len() - 1
        } else {
            line.ids.iter().position(|other| *other == own)?
        };
        if depth == 0 && self.order.last_key_value().is_some_and(|(turn, _)| *turn == line.turn) {
            return Some(self.lines.len() - 1);
        }
        let ahead = |other: &Line| other.ids.len().min(depth + usize::from(other.turn < line.turn));
        let others = self.lines.values().filter(|other| other.turn != line.turn);
        Some(depth + others.map(ahead).sum::<usize>())
    }
}

#[cfg(test)]
mod tests;
