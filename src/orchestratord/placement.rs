//! Where a request goes.
//!
//! A replica fits if it passes the request's pins (node, pool, devices), serves its model, has a context
//! as long as the request needs (one of unknown length may; a task says what it needs, of other requests it is
//! guessed and only wished) and takes work with enough free slots. Which
//! of the fitting ones is best, the [`Strategy`] says; ties end with the first by (node, pool, replica),
//! so the same registry and the same ask give the same answer.
//!
//! A *ready* replica that names no models is a wildcard: its engine serves what it is asked for. One
//! that is not ready and names none may turn out to serve anything: its models are not known yet.
//!
//! **How it is found.** [`survey`] is the definition: one pass over all replicas, which also counts why
//! the others do not fit, and chooses a refusal from that. [`choose`] gives the same answer without the
//! pass wherever it can:
//!
//! - Pinned to a node: the pass is over its replicas alone.
//! - Otherwise `selection` names the groups of the [index](super::placement_index) that the request concerns,
//!   pins included, and the index the best of their members, the next best one if that does not fit, and so on
//!   for a few.
//! - If nobody has enough free slots, the sums of the index tell which refusal it is.
//!
//! What is left for a pass, over the pool or the devices where it is pinned to them: asks for several slots where
//! only few have that many free, and pins in fleets whose pools or devices nearly all have other names.
//!
//! Nothing here takes slots: the caller does, with [`ServiceRegistry::acquire`], in the same turn.

use std::fmt;

use crate::wire::id::{NodeId, PoolId};

use super::affinity::Affinity;
use super::placement_index::{Found, GroupId, Tally};
use super::replica_table::{Hot, ReplicaTable};
use super::ring::mix;
use super::service_registry::{Replica, ReplicaRef, ServiceRegistry};

use self::selection::{Selection, is_pinned, list_replicas, list_sets, select};
use self::survey::{Among, pass};

pub(super) mod selection;
mod survey;
#[cfg(test)]
mod tests;

pub use self::survey::survey;

/// What a request needs.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ask {
    /// The model by name; `None` or empty takes any.
    pub model: Option<String>,
    /// Slots: the number of answers that it wants at once (`n`), at least 1. A replica with fewer
    /// slots in total gives all of them; its engine queues the rest.
    pub slots: u32,
    /// Only this pool, on whichever node.
    pub pool: Option<PoolId>,
    /// Only this node.
    pub node: Option<NodeId>,
    /// Only replicas on exactly these devices.
    pub device_mask: Option<String>,
    /// These pools first; the others only if none of these has room.
    pub prefer_pools: Vec<PoolId>,
    /// Never these pools.
    pub avoid_pools: Vec<PoolId>,
    /// Most tokens that it may generate, where that is known. Placement does not look at it.
    pub tokens_max: Option<u32>,
    /// Longest prompt and answer together, in tokens, where known.
    pub context_tokens: Option<u64>,
    /// That is a guess: a replica with a shorter context will do where no other has room. Engines know what a
    /// prompt takes, and some cut an answer that is asked too long.
    pub context_is_wish: bool,
    /// What it has in common with others that should meet the same cache.
    pub affinity: Option<Affinity>,
}

impl Ask {
    /// What is left of it without a mere wish for a long context; `None` where it has none.
    #[must_use]
    pub fn without_wish(&self) -> Option<Ask> {
        self.context_is_wish.then(|| Ask { context_tokens: None, context_is_wish: false, ..self.clone() })
    }
}

/// How the best of several fitting replicas is found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Strategy {
    /// Smallest share of slots in use, then most free GPU memory.
    #[default]
    LeastLoaded,
    /// The next one by name after the one chosen last.
    RoundRobin,
    /// Any, with equal chances.
    Random,
    /// Most free GPU memory, then smallest share of slots in use.
    MostVram,
}

impl Strategy {
    /// Every strategy, in the order in which they are documented.
    pub const ALL: [Strategy; 4] =
        [Strategy::LeastLoaded, Strategy::RoundRobin, Strategy::Random, Strategy::MostVram];

    /// The name in configuration.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Strategy::LeastLoaded => "least-loaded",
            Strategy::RoundRobin => "round-robin",
            Strategy::Random => "random",
            Strategy::MostVram => "most-vram",
        }
    }
}

impl fmt::Display for Strategy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl std::str::FromStr for Strategy {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Strategy::ALL.into_iter().find(|strategy| strategy.as_str() == text);
        found.ok_or_else(|| {
            let allowed: Vec<&str> = Strategy::ALL.iter().map(|strategy| strategy.as_str()).collect();
            format!("{text:?} is not a placement strategy: use one of {}", allowed.join(", "))
        })
    }
}

/// What strategies remember from one choice to the next, and memory that they reuse.
#[derive(Clone, Debug)]
pub struct StrategyState {
    last: Option<ReplicaRef>,
    random: u64,
    serves: Vec<u64>,
    groups: Vec<GroupId>,
    cohorts: Vec<GroupId>,
    narrow: Vec<u32>,
}

impl StrategyState {
    /// `seed` decides the sequence of [`Strategy::Random`].
    #[must_use]
    pub fn new(seed: u64) -> Self {
        StrategyState {
            last: None,
            random: mix(seed) | 1,
            serves: Vec::new(),
            groups: Vec::new(),
            cohorts: Vec::new(),
            narrow: Vec::new(),
        }
    }

    /// xorshift64: enough to spread requests, and reproducible.
    fn next_random(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }
}

/// The answer to an [`Ask`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Choice {
    /// There: take `slots` of it.
    Replica {
        /// The best one.
        replica: ReplicaRef,
        /// As asked for, or all that it has if that is fewer.
        slots: u32,
    },
    /// Replicas that fit take work, but none has enough free slots.
    Busy,
    /// Replicas that fit are known, or could turn out to fit; none takes work.
    NotReady {
        /// Why the first of them does not, for people.
        reason: String,
    },
    /// No replica passes the pins.
    UnknownPin,
    /// No replica within the pins serves the model.
    UnknownModel,
    /// Replicas within the pins serve the model, but none has a context as long as the request needs.
    ContextTooLong {
        /// The longest that there is, in tokens.
        longest_tokens: u64,
    },
    /// No replica is known at all.
    Nothing,
}

/// A [`Choice`] with its reasons. [`survey`] counts exactly; [`choose`] leaves what the request has tried in
/// vain, and pins where `selection` is not exact, out of account where it could answer from sums.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    /// The answer.
    pub choice: Choice,
    /// Replicas that are known.
    pub considered: u32,
    /// Of these, pass the pins and serve the model.
    pub fitting: u32,
    /// Of these, take work, full ones included.
    pub placeable: u32,
    /// Of these, have enough free slots; a free slot, where it comes from sums.
    pub with_room: u32,
}

/// Chooses a replica by strategy, of those with a context as long as the ask wishes only. `excluded` are those that this request has tried in vain.
pub fn choose(
    registry: &ServiceRegistry,
    ask: &Ask,
    excluded: &[ReplicaRef],
    strategy: Strategy,
    state: &mut StrategyState,
) -> Placement {
    let choose_within = |state: &mut StrategyState, preferred_only| {
        let mut groups = std::mem::take(&mut state.groups);
        let mut narrow = std::mem::take(&mut state.narrow);
        let search = Search { registry, table: registry.table(), ask, excluded, strategy, preferred_only };
        let placement = search.run(state, &mut groups, &mut narrow);
        (state.groups, state.narrow) = (groups, narrow);
        if let Choice::Replica { replica, .. } = placement.choice {
            state.last = Some(replica);
        }
        placement
    };
    if !ask.prefer_pools.is_empty() {
        let preferred = choose_within(state, true);
        if matches!(preferred.choice, Choice::Replica { .. }) {
            return preferred;
        }
    }
    choose_within(state, false)
}

/// Whether `replica` can take `ask` now. As [`choose`] would judge it; for handing a freed slot to
/// one of many waiters.
#[must_use]
pub fn fits(registry: &ServiceRegistry, replica: ReplicaRef, ask: &Ask) -> bool {
    let hot = registry.table().get_hot(replica);
    hot.is_some_and(|hot| has_room(hot, ask)) && could_serve(registry, replica, ask)
}

/// Whether `replica` takes work and could serve `ask`, whatever runs there now.
#[must_use]
pub fn could_serve(registry: &ServiceRegistry, replica: ReplicaRef, ask: &Ask) -> bool {
    let Some(hot) = registry.table().get_hot(replica) else { return false };
    let Some(cold) = registry.replica(replica).filter(|_| hot.placeable) else { return false };
    let serves =
        wanted(ask).is_none_or(|model| cold.models.is_empty() || cold.models.iter().any(|m| m == model));
    serves && context_fits(hot.context_tokens, ask) && passes_pins(cold, ask)
}

/// One search for a replica with the help of the index.
struct Search<'a> {
    registry: &'a ServiceRegistry,
    table: &'a ReplicaTable,
    ask: &'a Ask,
    excluded: &'a [ReplicaRef],
    strategy: Strategy,
    /// Only pools that the ask prefers.
    preferred_only: bool,
}

impl Search<'_> {
    fn run(&self, state: &mut StrategyState, groups: &mut Vec<GroupId>, narrow: &mut Vec<u32>) -> Placement {
        let index = self.table.placement_index();
        if self.ask.node.is_some() || self.strategy != index.strategy() {
            return self.pass(state, narrow, false);
        }
        let selection = select(self.table, self.ask, self.preferred_only, groups);
        let tried = self.tried(groups);
        // Who has room and was not tried fits, where the selection is exact.
        let has_nobody = index.with_room_for(groups, self.ask.slots)
            <= if selection.is_exact { tried.with_room } else { 0 };
        let (last, is_exact) = (self.last_order(state), selection.is_exact);
        let found = match has_nobody {
            true => Found::Nobody,
            false => index.find(
                groups,
                self.table.hot(),
                last,
                || state.next_random(),
                |at| self.is_wanted(at, is_exact),
            ),
        };
        match found {
            Found::Replica(at) => self.placed(at, index.tally(groups)),
            Found::Nobody => {
                self.refusal(groups, selection, tried).unwrap_or_else(|| self.pass(state, narrow, true))
            }
            // Nobody asks why none has what was only wished for.
            Found::GaveUp if self.ask.context_is_wish => self.counted(Choice::Busy, index.tally(groups)),
            Found::GaveUp => self.pass(state, narrow, false),
        }
    }

    /// Looks at every replica that the pins leave. `nobody_has_room` if that is known already.
    fn pass(&self, state: &mut StrategyState, narrow: &mut Vec<u32>, nobody_has_room: bool) -> Placement {
        narrow.clear();
        let is_narrow = match &self.ask.node {
            Some(node) => {
                let own =
                    self.registry.node(node).into_iter().flat_map(|node| self.registry.replicas_of(node));
                narrow.extend(own.filter_map(|replica| Some(self.table.index_of(replica)? as u32)));
                true
            }
            None => list_replicas(self.table, self.ask, self.preferred_only, narrow),
        };
        let among = if is_narrow { Among::These(narrow) } else { Among::All };
        pass(self, state, among, nobody_has_room)
    }

    /// What those of some groups' members were worth that this request has tried.
    fn tried(&self, groups: &[GroupId]) -> Tried {
        let mut tried = Tried::default();
        let (index, hot) = (self.table.placement_index(), self.table.hot());
        for (n, replica) in self.excluded.iter().enumerate() {
            // One that failed twice counts once.
            let Some(at) = self.table.index_of(*replica).filter(|_| !self.excluded[..n].contains(replica))
            else {
                continue;
            };
            if hot[at].placeable && index.is_among(at, groups, hot) {
                tried.placeable += 1;
                tried.with_room += u32::from(has_room(&hot[at], self.ask));
                if tried.first.is_none_or(|first| hot[at].order < hot[first].order) {
                    tried.first = Some(at);
                }
            }
        }
        tried
    }

    fn is_pinned(&self) -> bool {
        self.ask.node.is_some() || is_pinned(self.ask, self.preferred_only)
    }

    fn passes(&self, index: usize) -> bool {
        self.table.at(index).is_some_and(|(_, replica)| {
            passes_pins(replica, self.ask)
                && (!self.preferred_only || self.ask.prefer_pools.contains(&replica.key.pool))
        })
    }

    fn was_tried(&self, index: usize) -> bool {
        !self.excluded.is_empty()
            && self.table.at(index).is_some_and(|(replica, _)| self.excluded.contains(&replica))
    }

    /// Whether a replica of the selected groups fits that has a free slot.
    fn is_wanted(&self, index: usize, is_exact: bool) -> bool {
        let hot = &self.table.hot()[index];
        has_room(hot, self.ask)
            && (is_exact
                || context_fits(hot.context_tokens, self.ask) && (!self.is_pinned() || self.passes(index)))
            && !self.was_tried(index)
    }

    fn last_order(&self, state: &StrategyState) -> u64 {
        state.last.and_then(|last| self.table.get_hot(last)).map_or(0, |hot| hot.order)
    }

    fn placed(&self, index: usize, tally: Tally) -> Placement {
        let choice = match self.table.at(index) {
            Some((replica, _)) => {
                Choice::Replica { replica, slots: need(&self.table.hot()[index], self.ask) }
            }
            None => Choice::Busy,
        };
        self.counted(choice, tally)
    }

    fn counted(&self, choice: Choice, tally: Tally) -> Placement {
        let lost = if wanted(self.ask).is_some() { tally.lost } else { 0 };
        Placement {
            choice,
            considered: self.table.len() as u32,
            fitting: tally.members - lost,
            placeable: tally.placeable,
            with_room: tally.with_room,
        }
    }

    /// Which refusal it is, where the sums tell.
    fn refusal(&self, groups: &[GroupId], selection: Selection, tried: Tried) -> Option<Placement> {
        let (index, hot) = (self.table.placement_index(), self.table.hot());
        let tally = index.tally(groups);
        // Nobody asks why there is no preferred one.
        if self.preferred_only || self.ask.context_is_wish {
            return Some(self.counted(Choice::Busy, tally));
        }
        // Who is not worth waiting for comes last in cohorts, and is named like any other to who takes any model.
        let has_lost = tally.lost > 0 && wanted(self.ask).is_none() && *groups != [GroupId::ALL];
        if !selection.is_exact || has_lost {
            return None;
        }
        let lost = if wanted(self.ask).is_some() { tally.lost } else { 0 };
        let choice = if tally.placeable > tried.placeable {
            Choice::Busy
        } else if tally.members > lost {
            let first_out = index.first_out(groups, hot);
            let first = first_out.into_iter().chain(tried.first).min_by_key(|at| hot[*at].order)?;
            Choice::NotReady { reason: why_not(self.table, first) }
        } else if self.table.is_empty() {
            Choice::Nothing
        } else if !selection.passes_any {
            Choice::UnknownPin
        } else if let Some(longest) = selection.too_short {
            Choice::ContextTooLong { longest_tokens: u64::from(longest) }
        } else {
            Choice::UnknownModel
        };
        Some(self.counted(choice, tally))
    }
}

/// Replicas of some groups that a request has tried in vain and that take work.
#[derive(Clone, Copy, Debug, Default)]
struct Tried {
    placeable: u32,
    /// Of these, have enough free slots.
    with_room: u32,
    /// The first of them by name, by its index.
    first: Option<usize>,
}

/// The groups of the index that an ask concerns, its pins and preferences aside, and the cohorts that are left of
/// these by them; none of the latter where it has none, or they are not known. Groups have no members in common.
pub(super) fn groups_of<'a>(
    table: &ReplicaTable,
    ask: &Ask,
    state: &'a mut StrategyState,
) -> (&'a [GroupId], Option<&'a [GroupId]>) {
    list_sets(table, ask, &mut state.groups);
    let preferred_only = !ask.prefer_pools.is_empty();
    let is_narrowed =
        is_pinned(ask, preferred_only) && select(table, ask, preferred_only, &mut state.cohorts).is_exact;
    (&state.groups, is_narrowed.then_some(&state.cohorts))
}

fn why_not(table: &ReplicaTable, index: usize) -> String {
    let Some((_, replica)) = table.at(index) else { return String::new() };
    let obstacle = replica.obstacle();
    let why = obstacle.map_or("this request failed there already".into(), |o| o.to_string());
    format!("{}/{}: {why}", replica.node, replica.key)
}

fn wanted(ask: &Ask) -> Option<&str> {
    ask.model.as_deref().filter(|model| !model.is_empty())
}

pub(super) fn need(hot: &Hot, ask: &Ask) -> u32 {
    ask.slots.max(1).min(hot.slots_total)
}

fn has_room(hot: &Hot, ask: &Ask) -> bool {
    hot.slots_total.saturating_sub(hot.slots_used) >= need(hot, ask)
}

/// Whether a context of so many tokens, 0 where unknown, is long enough.
fn context_fits(context_tokens: u32, ask: &Ask) -> bool {
    let needed = ask.context_tokens.unwrap_or(0);
    context_tokens == 0 || context_tokens == u32::MAX || u64::from(context_tokens) >= needed
}

fn passes_pins(replica: &Replica, ask: &Ask) -> bool {
    ask.node.as_ref().is_none_or(|node| *node == replica.node)
        && ask.pool.as_ref().is_none_or(|pool| *pool == replica.key.pool)
        && ask.device_mask.as_ref().is_none_or(|mask| replica.device_mask.as_deref() == Some(mask))
        && !ask.avoid_pools.contains(&replica.key.pool)
}
