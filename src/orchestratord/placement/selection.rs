//! Which groups of the index a request concerns.
//!
//! Without pins these are the group of all replicas, or those of the sets that contain the model. With pins
//! they are cohorts: all that pass. Where these are more than [`COHORTS_MAX`], it is the former again, of
//! whose members the pins have to be looked at.

use std::collections::BTreeMap;

use crate::wire::id::PoolId;

use super::super::placement_index::GroupId;
use super::super::replica_table::{NO_MODELS, ReplicaTable};
use super::{Ask, context_fits, wanted};

/// Cohorts that are looked at: each costs some 30 ns, so that this many cost two microseconds. Fleets have
/// few pools, of one or two models each. Tests have few replicas, and want the other way, too.
const COHORTS_MAX: usize = if cfg!(test) { 6 } else { 64 };

/// What is known of the groups that were selected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Selection {
    /// Their members are exactly those that pass the pins, serve the model and have a context as long as is
    /// needed. Otherwise they are more.
    pub(super) is_exact: bool,
    /// Somebody passes the pins, whatever it serves. Only where it is exact.
    pub(super) passes_any: bool,
    /// The longest context of those that were left out because theirs is too short.
    pub(super) too_short: Option<u32>,
}

/// Whether pins other than to a node narrow the ask down.
pub(super) fn is_pinned(ask: &Ask, preferred_only: bool) -> bool {
    ask.pool.is_some() || ask.device_mask.is_some() || !ask.avoid_pools.is_empty() || preferred_only
}

/// Lists the groups that an ask concerns. They have no members in common. Pins to a node are not looked at.
pub(super) fn select(
    table: &ReplicaTable,
    ask: &Ask,
    preferred_only: bool,
    groups: &mut Vec<GroupId>,
) -> Selection {
    // Wildcards are in one group whatever their context, and so are all replicas.
    let has_mixed = || {
        let wildcards = table.placement_index().tally(&[GroupId::of_set(NO_MODELS)]).members;
        wildcards > 0 || wanted(ask).is_none()
    };
    let by_context = ask.context_tokens.is_some() && !ask.context_is_wish && has_mixed();
    let is_pinned = is_pinned(ask, preferred_only);
    if (is_pinned || by_context)
        && let Some(selection) = select_cohorts(table, ask, preferred_only, groups)
    {
        return selection;
    }
    let too_short = list_sets(table, ask, groups);
    let is_exact = !is_pinned && (ask.context_tokens.is_none() || !has_mixed());
    Selection { is_exact, passes_any: !table.is_empty(), too_short }
}

/// Lists all replicas, or those that serve the model, pins or not. Returns the longest context of those that
/// are left out because theirs is too short.
pub(super) fn list_sets(table: &ReplicaTable, ask: &Ask, groups: &mut Vec<GroupId>) -> Option<u32> {
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

/// Lists the indices of a superset of the replicas that pass the pins to pools and devices; false where there
/// are no such pins, and it would be all.
pub(super) fn list_replicas(
    table: &ReplicaTable,
    ask: &Ask,
    preferred_only: bool,
    replicas: &mut Vec<u32>,
) -> bool {
    if ask.pool.is_none() && ask.device_mask.is_none() && !preferred_only {
        return false;
    }
    if let Some(pools) = table.cohorts().pools(ask.device_mask.as_deref()) {
        each_pool(pools, ask, preferred_only, usize::MAX, |cohorts| {
            for group in cohorts.values() {
                replicas.extend_from_slice(table.placement_index().members(*group));
            }
            Some(())
        });
    }
    true
}

/// None where there are too many.
fn select_cohorts(
    table: &ReplicaTable,
    ask: &Ask,
    preferred_only: bool,
    groups: &mut Vec<GroupId>,
) -> Option<Selection> {
    groups.clear();
    let mut selection = Selection { is_exact: true, passes_any: false, too_short: None };
    let Some(pools) = table.cohorts().pools(ask.device_mask.as_deref()) else { return Some(selection) };
    let (is_any, sets) = match wanted(ask) {
        Some(model) => (false, table.sets().containing(model)),
        None => (true, None),
    };
    let mut looks_left = COHORTS_MAX;
    each_pool(pools, ask, preferred_only, COHORTS_MAX, |cohorts| {
        selection.passes_any = true;
        looks_left = looks_left.checked_sub(cohorts.len())?;
        for (serves, group) in cohorts {
            let set = serves.model_set;
            if !is_any && set != NO_MODELS && !sets.is_some_and(|sets| sets.contains(&set)) {
                continue;
            }
            if context_fits(serves.context_tokens, ask) {
                groups.push(*group);
            } else {
                selection.too_short = selection.too_short.max(Some(serves.context_tokens));
            }
        }
        Some(())
    })?;
    Some(selection)
}

/// Visits each of the pools that pass once, until `visit` returns none. None then, and where more than
/// `pools_max` would have to be looked at.
fn each_pool<T>(
    pools: &BTreeMap<PoolId, T>,
    ask: &Ask,
    preferred_only: bool,
    pools_max: usize,
    mut visit: impl FnMut(&T) -> Option<()>,
) -> Option<()> {
    let passes = |pool: &PoolId| {
        !ask.avoid_pools.contains(pool) && (!preferred_only || ask.prefer_pools.contains(pool))
    };
    match &ask.pool {
        Some(pool) => match pools.get(pool).filter(|_| passes(pool)) {
            Some(found) => visit(found),
            None => Some(()),
        },
        None if preferred_only => {
            for (n, pool) in ask.prefer_pools.iter().take(pools_max).enumerate() {
                if !ask.prefer_pools[..n].contains(pool)
                    && let Some(found) = pools.get(pool).filter(|_| passes(pool))
                {
                    visit(found)?;
                }
            }
            (ask.prefer_pools.len() <= pools_max).then_some(())
        }
        None if pools.len() > pools_max => None,
        None => pools.iter().filter(|(pool, _)| passes(pool)).try_for_each(|(_, found)| visit(found)),
    }
}
