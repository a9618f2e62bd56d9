//! Requests that belong together go to the same replica, because it has their beginning in its cache.
//! On top of any strategy, and only as long as nobody pays for it:
//!
//! 1. A session that was served before goes back to its replica, if that fits and has room.
//! 2. Otherwise the key, of a session or of a conversation's beginning, has its order of replicas on a
//!    [`Ring`]; the first of them goes that fits, has room, and is not more loaded than others by more
//!    than a quarter ("consistent hashing with bounded loads", Mirrokni, Thorup and Zadimoghaddam 2016).
//! 3. If [`LOOKS_MAX`] of them do not do, the strategy decides. Those that do not pass the request's pins are
//!    not counted where pins leave few cohorts.
//!
//! **The bound.** A replica may have `ceil(5/4 * its slots * taken / slots)` slots in use, where `taken`
//! are the slots in use on all replicas that take work and serve the model, this request's included, and
//! `slots` are all their slots. With equal replicas that is 5/4 of the average. There is always one under
//! the bound, and at least every fifth is, so that few looks find one. An idle replica is under it.
//!
//! The bound holds when a request is placed. It is not a reason to wait, and a session's own replica is
//! used beyond it: its cache is warm, the others' is not.

use std::sync::Arc;

use crate::time::Mono;

use super::placement::{self, Ask, Choice, Placement, Strategy, StrategyState, fits, groups_of, need};
use super::placement_index::Tally;
use super::replica_table::Hot;
use super::ring::{Ring, mix, stable_hash};
use super::served_sessions::{KEY_BYTES_MAX, ServedSessions};
use super::service_registry::{ReplicaRef, ServiceRegistry};

/// Replicas on the ring that are looked at: with a fifth of them under the bound, the chance that none
/// of so many is, is below one in a thousand.
pub const LOOKS_MAX: usize = 32;

/// Rings of cohorts that are walked around instead of those of the sets that contain the model: each costs as many
/// searches as a key has probes.
const RINGS_MAX: usize = 4;

/// What requests have in common that should meet the same cache.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Affinity {
    /// The client named its session. Remembered, see [`ServedSessions`].
    Session(Arc<str>),
    /// The hash of the conversation's beginning: of what follows the system prompt, which thousands of
    /// conversations share, and stays as it is while the conversation goes on.
    Prefix(u64),
}

impl Affinity {
    /// A session by its key; `None` where that is empty or longer than [`KEY_BYTES_MAX`].
    #[must_use]
    pub fn session(key: &str) -> Option<Affinity> {
        (!key.is_empty() && key.len() <= KEY_BYTES_MAX).then(|| Affinity::Session(key.into()))
    }

    fn key(&self) -> u64 {
        match self {
            Affinity::Session(key) => stable_hash(key.as_bytes()),
            Affinity::Prefix(hash) => *hash,
        }
    }
}

/// Chooses a replica as [`placement::choose`] does, but by the ask's affinity where it has one. Rings
/// are there only if the registry was told to keep them. Where none with the context that the ask wishes has
/// room, any will do.
pub fn choose(
    registry: &ServiceRegistry,
    ask: &Ask,
    excluded: &[ReplicaRef],
    strategy: Strategy,
    state: &mut StrategyState,
    sessions: &ServedSessions,
    now: Mono,
) -> Placement {
    let found = choose_as_asked(registry, ask, excluded, strategy, state, sessions, now);
    if matches!(found.choice, Choice::Replica { .. }) {
        return found;
    }
    match ask.without_wish() {
        Some(ask) => choose_as_asked(registry, &ask, excluded, strategy, state, sessions, now),
        None => found,
    }
}

fn choose_as_asked(
    registry: &ServiceRegistry,
    ask: &Ask,
    excluded: &[ReplicaRef],
    strategy: Strategy,
    state: &mut StrategyState,
    sessions: &ServedSessions,
    now: Mono,
) -> Placement {
    let by_affinity = ask.affinity.as_ref().and_then(|affinity| {
        by_session(registry, ask, excluded, affinity, sessions, now)
            .or_else(|| by_ring(registry, ask, excluded, affinity, state))
    });
    match by_affinity {
        Some(placement) => placement,
        None => placement::choose(registry, ask, excluded, strategy, state),
    }
}

fn by_session(
    registry: &ServiceRegistry,
    ask: &Ask,
    excluded: &[ReplicaRef],
    affinity: &Affinity,
    sessions: &ServedSessions,
    now: Mono,
) -> Option<Placement> {
    let Affinity::Session(key) = affinity else { return None };
    let replica = sessions.get(key, now)?.replica;
    let hot = registry.table().get_hot(replica)?;
    let does = !excluded.contains(&replica) && fits(registry, replica, ask);
    does.then(|| {
        placed(replica, hot, ask, Tally { members: 1, placeable: 1, with_room: 1, ..Tally::default() })
    })
}

fn by_ring(
    registry: &ServiceRegistry,
    ask: &Ask,
    excluded: &[ReplicaRef],
    affinity: &Affinity,
    state: &mut StrategyState,
) -> Option<Placement> {
    // A single node has few replicas, which a walk around the ring would hardly meet.
    if ask.node.is_some() {
        return None;
    }
    let table = registry.table();
    let index = table.placement_index();
    let (groups, cohorts) = groups_of(table, ask, state);
    let tally = index.tally(groups);
    // Of one replica there is no choice.
    if tally.members == 1 || index.with_room_for(cohorts.unwrap_or(groups), ask.slots) == 0 {
        return None;
    }
    // On the rings of those that pass nobody is looked at in vain for its name.
    let few = cohorts.filter(|cohorts| cohorts.len() <= groups.len().max(RINGS_MAX));
    let is_wanted = |index: usize| {
        let hot = &table.hot()[index];
        under_bound(hot, need(hot, ask), &tally)
            && table.at(index).is_some_and(|(replica, known)| {
                !excluded.contains(&replica)
                    && (ask.prefer_pools.is_empty() || ask.prefer_pools.contains(&known.key.pool))
                    && fits(registry, replica, ask)
            })
    };
    // Keys that a client chooses are spread once more.
    let key = mix(affinity.key());
    let at = Ring::find(index.rings(few.unwrap_or(groups)), key, LOOKS_MAX, is_wanted)?;
    let (replica, _) = table.at(at)?;
    Some(placed(replica, &table.hot()[at], ask, tally))
}

fn placed(replica: ReplicaRef, hot: &Hot, ask: &Ask, tally: Tally) -> Placement {
    Placement {
        choice: Choice::Replica { replica, slots: need(hot, ask) },
        considered: tally.members,
        fitting: tally.members,
        placeable: tally.placeable,
        with_room: tally.with_room,
    }
}

/// Whether a replica may take `slots` more of what `all` have; see the introduction of this file.
fn under_bound(hot: &Hot, slots: u32, all: &Tally) -> bool {
    // x <= ceil(a / b) exactly if (x - 1) * b < a.
    let wanted = u128::from(hot.slots_used) + u128::from(slots);
    let taken = u128::from(all.used) + u128::from(slots);
    hot.slots_used == 0
        || wanted.saturating_sub(1) * 4 * u128::from(all.slots) < 5 * u128::from(hot.slots_total) * taken
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::orchestratord::placement::Strategy;
    use crate::orchestratord::service_registry::{Grant, Limits};
    use crate::time::Now;
    use crate::wire::id::NodeId;
    use crate::wire::node::{Heartbeat, RegisterRequest};
    use proptest::prelude::*;
    use serde_json::json;
    use std::collections::BTreeMap;

    fn id(node: usize) -> NodeId {
        NodeId::new(&format!("n{node}")).expect("an id")
    }

    /// One replica of the model `m` a node: (node, slots). They come in the given order.
    fn registry(nodes: impl IntoIterator<Item = (usize, u32)>) -> ServiceRegistry {
        let mut registry = ServiceRegistry::new(Limits::default(), 1);
        registry.set_placement(Strategy::LeastLoaded, true);
        let (now, mut changes) = (Now::default(), Vec::new());
        for (node, slots) in nodes {
            let body = json!({"node_id": id(node), "address": format!("http://n{node}:9200")});
            let request: RegisterRequest = serde_json::from_value(body).expect("a registration");
            let replica = json!({"replica_id": "r0", "url": "http://127.0.0.1:1", "ready": true,
                "slots_free": slots, "slots_total": slots, "models": ["m"]});
            let body = json!({"pools": [{"pool_id": "p", "replicas": [replica]}]});
            let beat: Heartbeat = serde_json::from_value(body).expect("a heartbeat");
            registry.register(&request, "peer", now, &mut changes).expect("registered");
            registry.heartbeat(&id(node), &beat, "peer", now, &mut changes).expect("accepted");
        }
        registry
    }

    fn ask(affinity: Option<Affinity>) -> Ask {
        Ask { model: Some("m".into()), slots: 1, affinity, ..Ask::default() }
    }

    fn chosen(registry: &ServiceRegistry, ask: &Ask, sessions: &ServedSessions) -> Option<ReplicaRef> {
        let mut state = StrategyState::new(1);
        let found = choose(registry, ask, &[], Strategy::LeastLoaded, &mut state, sessions, Mono(0));
        match found.choice {
            Choice::Replica { replica, .. } => Some(replica),
            _ => None,
        }
    }

    /// Where the idle registry sends each of many conversations.
    fn map(registry: &ServiceRegistry, keys: u64) -> BTreeMap<u64, NodeId> {
        let node = |key: u64| {
            let ask = ask(Some(Affinity::Prefix(stable_hash(format!("conversation {key}").as_bytes()))));
            let replica = chosen(registry, &ask, &ServedSessions::default()).expect("all are free");
            registry.replica(replica).expect("it was chosen").node.clone()
        };
        (0..keys).map(|key| (key, node(key))).collect()
    }

    #[test]
    fn keys_are_bounded() {
        assert!(
            Affinity::session("").is_none() && Affinity::session(&"k".repeat(KEY_BYTES_MAX + 1)).is_none()
        );
        assert_eq!(Affinity::session("s"), Some(Affinity::Session("s".into())));
    }

    #[test]
    fn without_a_ring_the_strategy_decides() {
        let mut registry = registry([(0, 4), (1, 4), (2, 4)]);
        registry.set_placement(Strategy::LeastLoaded, false);
        assert!(map(&registry, 50).values().all(|node| *node == id(0)), "the first by name of equal ones");
    }

    #[test]
    fn a_session_stays_where_it_is_while_there_is_room() {
        let mut registry = registry((0..20).map(|node| (node, 2)));
        let mut sessions = ServedSessions::default();
        let key: Arc<str> = "s".into();
        let session = ask(Affinity::session("s"));
        let by_ring = chosen(&registry, &session, &sessions).expect("all are free");
        // Elsewhere than the ring says, as after a failure.
        let other =
            registry.replicas().map(|(replica, _)| replica).find(|r| *r != by_ring).expect("20 of them");
        sessions.used(&key, other, Mono(0));
        assert_eq!(chosen(&registry, &session, &sessions), Some(other), "what is remembered wins");
        let first = registry.acquire(other, 1).expect("it is free");
        assert_eq!(chosen(&registry, &session, &sessions), Some(other), "also beyond the bound of the ring");
        let second = registry.acquire(other, 1).expect("it has one more");
        assert_eq!(chosen(&registry, &session, &sessions), Some(by_ring), "it is full");
        registry.release(first);
        registry.release(second);
        let (node, mut changes) = (registry.replica(other).expect("known").node.clone(), Vec::new());
        registry.deregister(&node, None, Now::default(), &mut changes).expect("known");
        assert_eq!(chosen(&registry, &session, &sessions), Some(by_ring), "it is gone");
        let elsewhere = Ask { model: Some("x".into()), ..session };
        assert_eq!(chosen(&registry, &elsewhere, &sessions), None, "nobody serves that");
    }

    /// Nodes of three pools, each of one replica: (slots, of which taken, model, devices).
    fn pools_of(nodes: &[Vec<(u32, u32, usize, usize)>]) -> ServiceRegistry {
        let mut registry = ServiceRegistry::new(Limits::default(), 1);
        registry.set_placement(Strategy::LeastLoaded, true);
        let (now, mut changes) = (Now::default(), Vec::new());
        for (node, pools) in nodes.iter().enumerate() {
            let body = json!({"node_id": id(node), "address": format!("http://n{node}:9200")});
            let request: RegisterRequest = serde_json::from_value(body).expect("a registration");
            let pools: Vec<_> = pools
                .iter()
                .enumerate()
                .map(|(n, (slots, taken, model, devices))| {
                    let model = ["m", "x"][*model];
                    let replica = json!({"replica_id": "r0", "url": "http://127.0.0.1:1", "ready": true,
                        "slots_free": slots.saturating_sub(*taken), "slots_total": slots,
                        "models": [model], "device_mask": devices.to_string()});
                    json!({"pool_id": format!("p{n}"), "replicas": [replica]})
                })
                .collect();
            let beat: Heartbeat = serde_json::from_value(json!({"pools": pools})).expect("a heartbeat");
            registry.register(&request, "peer", now, &mut changes).expect("registered");
            registry.heartbeat(&id(node), &beat, "peer", now, &mut changes).expect("accepted");
        }
        registry
    }

    proptest! {
        /// Pins leave a key's order of replicas as it is: the first of it that passes them, fits, has room and is
        /// under the bound is found wherever a walk past all others would meet it, and nobody else ever.
        #[test]
        fn pins_do_not_change_the_order(
            nodes in proptest::collection::vec(
                proptest::collection::vec((1u32..5, 0u32..6, 0usize..2, 0usize..2), 3), 1..40),
            asks in proptest::collection::vec(
                (any::<u64>(), any::<bool>(), 0usize..5, 0usize..3, proptest::collection::vec(0usize..4, 0..3), any::<bool>(), 1u32..3), 1..20),
        ) {
            let registry = pools_of(&nodes);
            let table = registry.table();
            for (key, any_model, own, devices, named, prefers, slots) in asks {
                let pool = |n: usize| crate::wire::id::PoolId::new(&format!("p{n}")).expect("an id");
                let named: Vec<_> = named.into_iter().map(pool).collect();
                let (prefer_pools, avoid_pools) = if prefers { (named, Vec::new()) } else { (Vec::new(), named) };
                let ask = Ask {
                    model: (!any_model).then(|| "m".to_string()),
                    pool: (own < 4).then(|| pool(own)),
                    device_mask: (devices < 2).then(|| devices.to_string()),
                    slots,
                    prefer_pools,
                    avoid_pools,
                    ..Ask::default()
                };
                let mut state = StrategyState::new(1);
                let affinity = Affinity::Prefix(key);
                let found = by_ring(&registry, &ask, &[], &affinity, &mut state).map(|found| found.choice);
                let (groups, _) = groups_of(table, &ask, &mut state);
                let tally = table.placement_index().tally(groups);
                let walk = |looks_max: usize| {
                    Ring::find(table.placement_index().rings(groups), mix(key), looks_max, |at| {
                        let (replica, known) = table.at(at).expect("on the ring");
                        let hot = &table.hot()[at];
                        under_bound(hot, need(hot, &ask), &tally)
                            && fits(&registry, replica, &ask)
                            && (ask.prefer_pools.is_empty() || ask.prefer_pools.contains(&known.key.pool))
                    })
                    .map(|at| Choice::Replica { replica: table.at(at).expect("it was chosen").0, slots: need(&table.hot()[at], &ask) })
                };
                match found {
                    Some(found) => prop_assert_eq!(Some(found), walk(usize::MAX), "{:?}", ask),
                    None if tally.members == 1 => {}
                    None => prop_assert_eq!(None, walk(LOOKS_MAX), "{:?}", ask),
                }
            }
        }

        /// No replica is given more than a quarter above its share of the load, whatever the keys are;
        /// the same key goes to the same replica while the load is the same.
        #[test]
        fn load_is_bounded(
            slots in proptest::collection::vec(1u32..9, 2..30),
            requests in proptest::collection::vec((0u64..6, any::<bool>(), 0usize..100), 1..150),
        ) {
            let mut registry = registry(slots.iter().copied().enumerate());
            let all = u64::from(slots.iter().sum::<u32>());
            let mut grants: Vec<Grant> = Vec::new();
            for (key, ends_one, which) in requests {
                if ends_one && !grants.is_empty() {
                    registry.release(grants.swap_remove(which % grants.len()));
                }
                let ask = ask(Some(Affinity::Prefix(stable_hash(&key.to_le_bytes()))));
                let found = chosen(&registry, &ask, &ServedSessions::default());
                prop_assert_eq!(found, chosen(&registry, &ask, &ServedSessions::default()));
                prop_assert_eq!(found.is_some(), (grants.len() as u64) < all, "refused, or found, wrongly");
                let Some(replica) = found else { continue };
                grants.push(registry.acquire(replica, 1).expect("it was chosen"));
                let known = registry.replica(replica).expect("it was chosen");
                let share = u64::from(known.slots_total) * grants.len() as u64;
                prop_assert!(u64::from(known.in_flight) <= (5 * share).div_ceil(4 * all), "{:?}", known);
            }
        }

        /// Arrival does not matter; a node that leaves gives away only its own conversations.
        #[test]
        fn few_conversations_move(count in 2usize..40, gone in 0usize..40) {
            let gone = gone % count;
            let mut all = registry((0..count).map(|node| (node, 4)));
            let backwards = registry((0..count).rev().map(|node| (node, 4)));
            let before = map(&all, 300);
            prop_assert_eq!(&before, &map(&backwards, 300));
            all.deregister(&id(gone), None, Now::default(), &mut Vec::new()).expect("known");
            let after = map(&all, 300);
            for (key, node) in &after {
                prop_assert!(before[key] == *node || before[key] == id(gone), "{} moved", key);
            }
        }
    }
}
