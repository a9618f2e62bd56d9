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
//! - Pinned to a node, or to pools of few replicas: the pass is over these alone.
//! - Otherwise the [index](super::placement_index) names the best one of those that serve the model, the
//!   next best one if that does not fit, and so on for a few.
//! - If nobody has a free slot, the sums of the index tell which refusal it is.
//!
//! Nothing here takes slots: the caller does, with [`ServiceRegistry::acquire`], in the same turn.

use std::fmt;

use crate::wire::id::{NodeId, PoolId};

use super::affinity::Affinity;
use super::placement_index::{Found, GroupId, Tally};
use super::replica_table::{Hot, NO_MODELS, ReplicaTable};
use super::ring::mix;
use super::service_registry::{Replica, ReplicaRef, ServiceRegistry};

use self::survey::{Among, pass};

mod survey;
#[cfg(test)]
mod tests;

pub use self::survey::survey;

/// Replicas of a node, or of pools, that a pass over them alone is worth: it takes a microsecond. Tests
/// have few replicas, and want the other way, too.
const NARROW_MAX: usize = if cfg!(test) { 2 } else { 64 };

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

/// A [`Choice`] with its reasons. [`survey`] counts exactly; [`choose`] leaves pins, and what the request
/// has tried in vain, out of account where it could answer from sums.
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
        let few = self.narrowed_len();
        if few.is_some_and(|few| few <= NARROW_MAX) || self.strategy != index.strategy() {
            return self.pass(state, narrow, false);
        }
        let too_short = list_groups(self.table, self.ask, groups);
        let last = self.last_order(state);
        match index.find(groups, self.table.hot(), last, || state.next_random(), |at| self.is_wanted(at)) {
            Found::Replica(at) => self.placed(at, index.tally(groups)),
            Found::Nobody => self
                .refusal(index.tally(groups), groups, too_short)
                .unwrap_or_else(|| self.pass(state, narrow, true)),
            // Nobody asks why none has what was only wished for.
            Found::GaveUp if self.ask.context_is_wish => self.counted(Choice::Busy, index.tally(groups)),
            Found::GaveUp => self.pass(state, narrow, false),
        }
    }

    /// Looks at every replica that the pins leave. `nobody_has_room` if that is known already.
    fn pass(&self, state: &mut StrategyState, narrow: &mut Vec<u32>, nobody_has_room: bool) -> Placement {
        narrow.clear();
        let among = match self.narrowed_len() {
            Some(_) => {
                self.narrow_down(narrow);
                Among::These(narrow)
            }
            None => Among::All,
        };
        pass(self, state, among, nobody_has_room)
    }

    /// How many replicas a pin to a node, or to pools, leaves.
    fn narrowed_len(&self) -> Option<usize> {
        if let Some(node) = &self.ask.node {
            return Some(self.registry.node(node).map_or(0, |node| self.registry.replicas_of(node).count()));
        }
        let len = |pool: &PoolId| self.table.in_pool(pool).map_or(0, std::collections::BTreeSet::len);
        match (&self.ask.pool, self.preferred_only) {
            (Some(pool), _) => Some(len(pool)),
            (None, true) => Some(self.ask.prefer_pools.iter().map(len).sum()),
            (None, false) => None,
        }
    }

    fn narrow_down(&self, narrow: &mut Vec<u32>) {
        if let Some(node) = &self.ask.node {
            let own = self.registry.node(node).into_iter().flat_map(|node| self.registry.replicas_of(node));
            narrow.extend(own.filter_map(|replica| Some(self.table.index_of(replica)? as u32)));
            return;
        }
        let of_pool = |pool: &PoolId| self.table.in_pool(pool).into_iter().flatten().copied();
        match &self.ask.pool {
            Some(pool) => narrow.extend(of_pool(pool)),
            None => narrow.extend(self.ask.prefer_pools.iter().flat_map(of_pool)),
        }
    }

    fn is_pinned(&self) -> bool {
        let ask = self.ask;
        ask.pool.is_some()
            || ask.node.is_some()
            || ask.device_mask.is_some()
            || !ask.avoid_pools.is_empty()
            || self.preferred_only
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

    /// Whether a replica that serves the model and has a free slot fits.
    fn is_wanted(&self, index: usize) -> bool {
        let hot = &self.table.hot()[index];
        has_room(hot, self.ask)
            && context_fits(hot.context_tokens, self.ask)
            && (!self.is_pinned() || self.passes(index))
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

    /// Which refusal it is, where the sums tell. `too_short` is the longest context of the groups that
    /// were left out for theirs.
    fn refusal(&self, tally: Tally, groups: &[GroupId], too_short: Option<u32>) -> Option<Placement> {
        // Nobody asks why there is no preferred one.
        if self.preferred_only || self.ask.context_is_wish {
            return Some(self.counted(Choice::Busy, tally));
        }
        // Wildcards are in one group whatever their context.
        let wildcards = self.table.placement_index().tally(&[GroupId::of_set(NO_MODELS)]).members;
        let by_context = self.ask.context_tokens.is_some() && (wildcards > 0 || wanted(self.ask).is_none());
        if self.is_pinned() || by_context {
            return None;
        }
        let is_tried = |replica: &&ReplicaRef| {
            let tried = self.table.get_hot(**replica).filter(|hot| hot.placeable);
            tried.is_some_and(|hot| {
                groups == [GroupId::ALL] || groups.contains(&GroupId::of_set(hot.model_set))
            })
        };
        let tried = self.excluded.iter().filter(is_tried).count() as u32;
        let lost = if wanted(self.ask).is_some() { tally.lost } else { 0 };
        let choice = if tally.placeable > tried {
            Choice::Busy
        } else if tried > 0 {
            // Which of them is the first by name is not known.
            return None;
        } else if tally.members > lost {
            let first = self.table.placement_index().first_out(groups, self.table.hot())?;
            Choice::NotReady { reason: why_not(self.table, first) }
        } else if self.table.is_empty() {
            Choice::Nothing
        } else if let Some(longest) = too_short {
            Choice::ContextTooLong { longest_tokens: u64::from(longest) }
        } else {
            Choice::UnknownModel
        };
        Some(self.counted(choice, tally))
    }
}

/// The groups of the index that an ask concerns. They have no members in common.
pub(super) fn groups_of<'a>(table: &ReplicaTable, ask: &Ask, state: &'a mut StrategyState) -> &'a [GroupId] {
    list_groups(table, ask, &mut state.groups);
    &state.groups
}

/// As [`groups_of`], and the longest context of those that are left out because theirs is too short.
fn list_groups(table: &ReplicaTable, ask: &Ask, groups: &mut Vec<GroupId>) -> Option<u32> {
    groups.clear();
    let Some(model) = wanted(ask) else {
        groups.push(GroupId::ALL);
        return None;
    };
    groups.push(GroupId::of_set(NO_MODELS));
    let mut too_short = None;
    for set in table.sets().with(model) {
        let context_tokens = table.sets().context_tokens(set);
        if context_fits(context_tokens, ask) {
            groups.push(GroupId::of_set(set));
        } else {
            too_short = too_short.max(Some(context_tokens));
        }
    }
    too_short
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
