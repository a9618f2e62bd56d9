//! The definition of a choice: one pass over replicas, from which the best one that fits remains.

use super::super::placement_index::is_better;
use super::super::replica_table::NO_MODELS;
use super::super::ring::mix;
use super::{
    Ask, Choice, Hot, Placement, ReplicaRef, ReplicaTable, Search, ServiceRegistry, Strategy, StrategyState,
    context_fits, has_room, need, wanted, why_not,
};

/// What [`choose`](super::choose) would choose, with exact counts, from a pass over all replicas. For
/// explanations, and as the measure of the index; preferences of pools are not looked at.
pub fn survey(
    registry: &ServiceRegistry,
    ask: &Ask,
    excluded: &[ReplicaRef],
    strategy: Strategy,
    state: &mut StrategyState,
) -> Placement {
    let table = registry.table();
    let search = Search { registry, table, ask, excluded, strategy, preferred_only: false };
    pass(&search, state, Among::All, false)
}

/// What the pass is over. What is not among these does not pass the pins.
#[derive(Clone, Copy)]
pub(super) enum Among<'a> {
    All,
    /// Indices in the table.
    These(&'a [u32]),
}

/// The pass. Where `nobody_has_room`, it ends as soon as the refusal is known.
pub(super) fn pass(
    search: &Search<'_>,
    state: &mut StrategyState,
    among: Among<'_>,
    nobody_has_room: bool,
) -> Placement {
    let strategy = search.strategy;
    let salt = if strategy == Strategy::Random { state.next_random() } else { 0 };
    let last = search.last_order(state);
    mark_sets(search.table, search.ask, &mut state.serves);
    let scan = Scan { search, serves: &state.serves, among, nobody_has_room };
    // Each strategy is one comparison; the scan is compiled once for each, with it inlined.
    match strategy {
        Strategy::LeastLoaded => scan.run(|a, b| is_better(Strategy::LeastLoaded, a, b)),
        Strategy::MostVram => scan.run(|a, b| is_better(Strategy::MostVram, a, b)),
        Strategy::RoundRobin => scan.run(|a, b| (a.order <= last, a.order) < (b.order <= last, b.order)),
        Strategy::Random => scan.run(|a, b| (mix(salt ^ a.order), a.order) < (mix(salt ^ b.order), b.order)),
    }
}

struct Scan<'a> {
    search: &'a Search<'a>,
    serves: &'a [u64],
    among: Among<'a>,
    nobody_has_room: bool,
}

impl Scan<'_> {
    /// Whether one replica is better than another, `better` says.
    fn run(&self, better: impl Fn(&Hot, &Hot) -> bool) -> Placement {
        let hot = self.search.table.hot();
        match self.among {
            Among::All => self.over(hot.iter().enumerate(), better),
            Among::These(list) => {
                self.over(list.iter().map(|index| (*index as usize, &hot[*index as usize])), better)
            }
        }
    }

    fn over<'a>(
        &self,
        replicas: impl Iterator<Item = (usize, &'a Hot)>,
        better: impl Fn(&Hot, &Hot) -> bool,
    ) -> Placement {
        let (search, ask, table) = (self.search, self.search.ask, self.search.table);
        let (pinned, any_model) = (search.is_pinned(), wanted(ask).is_none());
        let considered = table.len() as u32;
        let (mut passed, mut fitting, mut placeable, mut with_room) = (0, 0, 0, 0);
        let mut best: Option<(usize, Hot)> = None;
        let mut unready: Option<(usize, &Hot)> = None;
        let mut too_short = None;
        for (index, hot) in replicas {
            if !hot.exists || pinned && !search.passes(index) {
                continue;
            }
            passed += 1;
            let set = hot.model_set as usize;
            if !any_model && self.serves[set / 64] >> (set % 64) & 1 == 0 {
                continue;
            }
            if !context_fits(hot.context_tokens, ask) {
                too_short = too_short.max(Some(hot.context_tokens));
                continue;
            }
            // Offline nodes are remembered for long; what they never named is not worth waiting for.
            if !hot.placeable && !any_model && hot.model_set == NO_MODELS && hot.offline {
                continue;
            }
            fitting += 1;
            if !hot.placeable || search.was_tried(index) {
                if unready.is_none_or(|(_, other)| hot.order < other.order) {
                    unready = Some((index, hot));
                }
                continue;
            }
            placeable += 1;
            if self.nobody_has_room {
                break;
            }
            if !has_room(hot, ask) {
                continue;
            }
            with_room += 1;
            if best.as_ref().is_none_or(|(_, other)| better(hot, other)) {
                best = Some((index, *hot));
            }
        }
        let chosen = best.and_then(|(index, hot)| Some((table.at(index)?.0, need(&hot, ask))));
        let choice = match (chosen, unready) {
            (Some((replica, slots)), _) => Choice::Replica { replica, slots },
            (None, _) if placeable > 0 => Choice::Busy,
            (None, Some((index, _))) => Choice::NotReady { reason: why_not(table, index) },
            (None, None) if considered == 0 => Choice::Nothing,
            (None, None) if passed == 0 => Choice::UnknownPin,
            (None, None) => match too_short {
                Some(longest) => Choice::ContextTooLong { longest_tokens: u64::from(longest) },
                None => Choice::UnknownModel,
            },
        };
        Placement { choice, considered, fitting, placeable, with_room }
    }
}

/// Marks the sets of models that contain the wanted one, and the empty set.
fn mark_sets(table: &ReplicaTable, ask: &Ask, serves: &mut Vec<u64>) {
    serves.clear();
    serves.resize(table.sets().end().div_ceil(64), 0);
    serves[0] |= 1 << NO_MODELS;
    for set in wanted(ask).into_iter().flat_map(|model| table.sets().with(model)) {
        serves[set as usize / 64] |= 1 << (set % 64);
    }
}
