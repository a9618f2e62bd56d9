//! Where a request goes: one pass over all replicas, from which the best one that fits remains.
//!
//! A replica fits if it passes the request's pins (node, pool, devices), serves its model and takes
//! work with enough free slots. Which of the fitting ones is best, the [`Strategy`] says; ties end
//! with the first by (node, pool, replica), so the same registry and the same ask give the same
//! answer. The pass also counts why the others do not fit, and a refusal is chosen from that.
//!
//! A *ready* replica that names no models is a wildcard: its engine serves what it is asked for. One
//! that is not ready and names none may turn out to serve anything: its models are not known yet.
//!
//! Nothing here takes slots: the caller does, with [`ServiceRegistry::acquire`], in the same turn.

use std::fmt;

use crate::wire::id::{NodeId, PoolId};

use super::replica_table::{Hot, NO_MODELS, ReplicaTable};
use super::service_registry::{NodeStatus, Replica, ReplicaRef, ServiceRegistry};

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
#[derive(Debug)]
pub struct StrategyState {
    last: Option<ReplicaRef>,
    random: u64,
    serves: Vec<u64>,
}

impl StrategyState {
    /// `seed` decides the sequence of [`Strategy::Random`].
    #[must_use]
    pub fn new(seed: u64) -> Self {
        StrategyState { last: None, random: mix(seed) | 1, serves: Vec::new() }
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
    /// No replica is known at all.
    Nothing,
}

/// A [`Choice`] with its reasons.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    /// The answer.
    pub choice: Choice,
    /// Replicas that were looked at.
    pub considered: u32,
    /// Of these, passed the pins and serve the model.
    pub fitting: u32,
    /// Of these, take work, full ones included.
    pub placeable: u32,
    /// Of these, have enough free slots.
    pub with_room: u32,
}

/// Chooses a replica. `excluded` are those that this request has tried in vain.
pub fn choose(
    registry: &ServiceRegistry,
    ask: &Ask,
    excluded: &[ReplicaRef],
    strategy: Strategy,
    state: &mut StrategyState,
) -> Placement {
    if !ask.prefer_pools.is_empty() {
        let preferred = choose_within(registry, ask, excluded, strategy, state, true);
        if matches!(preferred.choice, Choice::Replica { .. }) {
            return preferred;
        }
    }
    choose_within(registry, ask, excluded, strategy, state, false)
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
    serves && passes_pins(cold, ask)
}

fn choose_within(
    registry: &ServiceRegistry,
    ask: &Ask,
    excluded: &[ReplicaRef],
    strategy: Strategy,
    state: &mut StrategyState,
    preferred_only: bool,
) -> Placement {
    let table = registry.table();
    let salt = if strategy == Strategy::Random { state.next_random() } else { 0 };
    let last = state.last.and_then(|last| table.get_hot(last)).map_or(0, |hot| hot.order);
    mark_sets(table, ask, &mut state.serves);
    let mut scan = Scan { table, ask, excluded, preferred_only, serves: &state.serves };
    // Each strategy is one comparison; the scan is compiled once for each, with it inlined.
    let placement = match strategy {
        Strategy::LeastLoaded => scan.run(|a, b| {
            (cross_load(a, b), b.vram_free_bytes, a.order).lt(&(cross_load(b, a), a.vram_free_bytes, b.order))
        }),
        Strategy::MostVram => scan.run(|a, b| {
            (b.vram_free_bytes, cross_load(a, b), a.order).lt(&(a.vram_free_bytes, cross_load(b, a), b.order))
        }),
        Strategy::RoundRobin => scan.run(|a, b| (a.order <= last, a.order) < (b.order <= last, b.order)),
        Strategy::Random => scan.run(|a, b| (mix(salt ^ a.order), a.order) < (mix(salt ^ b.order), b.order)),
    };
    if let Choice::Replica { replica, .. } = placement.choice {
        state.last = Some(replica);
    }
    placement
}

/// Stands for `a`'s share of slots in use when compared with `cross_load(b, a)`: no division, no floats.
fn cross_load(a: &Hot, b: &Hot) -> u64 {
    u64::from(a.slots_used) * u64::from(b.slots_total)
}

struct Scan<'a> {
    table: &'a ReplicaTable,
    ask: &'a Ask,
    excluded: &'a [ReplicaRef],
    preferred_only: bool,
    serves: &'a [u64],
}

impl Scan<'_> {
    /// The pass. Whether one replica is better than another, `better` says.
    fn run(&mut self, better: impl Fn(&Hot, &Hot) -> bool) -> Placement {
        let ask = self.ask;
        let pinned = ask.pool.is_some()
            || ask.node.is_some()
            || ask.device_mask.is_some()
            || !ask.avoid_pools.is_empty()
            || self.preferred_only;
        let any_model = wanted(ask).is_none();
        let (mut considered, mut passed, mut fitting, mut placeable, mut with_room) = (0, 0, 0, 0, 0);
        let mut best: Option<(usize, Hot)> = None;
        let mut unready: Option<(usize, &Hot)> = None;
        for (index, hot) in self.table.hot().iter().enumerate() {
            if !hot.exists {
                continue;
            }
            considered += 1;
            if pinned && !self.passes(index) {
                continue;
            }
            passed += 1;
            let set = hot.model_set as usize;
            if !any_model && self.serves[set / 64] >> (set % 64) & 1 == 0 {
                continue;
            }
            // Offline nodes are remembered for long; what they never named is not worth waiting for.
            if !hot.placeable && !any_model && hot.model_set == NO_MODELS && self.is_offline(index) {
                continue;
            }
            fitting += 1;
            let tried = !self.excluded.is_empty()
                && self.table.at(index).is_some_and(|(replica, _)| self.excluded.contains(&replica));
            if !hot.placeable || tried {
                if unready.is_none_or(|(_, other)| hot.order < other.order) {
                    unready = Some((index, hot));
                }
                continue;
            }
            placeable += 1;
            if !has_room(hot, ask) {
                continue;
            }
            with_room += 1;
            if best.as_ref().is_none_or(|(_, other)| better(hot, other)) {
                best = Some((index, *hot));
            }
        }
        let chosen = best.and_then(|(index, hot)| Some((self.table.at(index)?.0, need(&hot, ask))));
        let choice = match (chosen, unready) {
            (Some((replica, slots)), _) => Choice::Replica { replica, slots },
            (None, _) if placeable > 0 => Choice::Busy,
            (None, Some((index, _))) => Choice::NotReady { reason: self.why_not(index) },
            (None, None) if considered == 0 => Choice::Nothing,
            (None, None) if passed == 0 => Choice::UnknownPin,
            (None, None) => Choice::UnknownModel,
        };
        Placement { choice, considered, fitting, placeable, with_room }
    }

    fn passes(&self, index: usize) -> bool {
        self.table.at(index).is_some_and(|(_, replica)| {
            passes_pins(replica, self.ask)
                && (!self.preferred_only || self.ask.prefer_pools.contains(&replica.key.pool))
        })
    }

    fn is_offline(&self, index: usize) -> bool {
        self.table.at(index).is_none_or(|(_, replica)| replica.node_status == NodeStatus::Offline)
    }

    fn why_not(&self, index: usize) -> String {
        let Some((_, replica)) = self.table.at(index) else { return String::new() };
        let obstacle = replica.obstacle();
        let why = obstacle.map_or("this request failed there already".into(), |o| o.to_string());
        format!("{}/{}: {why}", replica.node, replica.key)
    }
}

/// Marks the sets of models that contain the wanted one, and the empty set.
fn mark_sets(table: &ReplicaTable, ask: &Ask, serves: &mut Vec<u64>) {
    serves.clear();
    serves.resize(table.sets_len().div_ceil(64), 0);
    serves[0] |= 1 << NO_MODELS;
    for set in wanted(ask).into_iter().flat_map(|model| table.sets_with(model)) {
        serves[set as usize / 64] |= 1 << (set % 64);
    }
}

fn wanted(ask: &Ask) -> Option<&str> {
    ask.model.as_deref().filter(|model| !model.is_empty())
}

fn need(hot: &Hot, ask: &Ask) -> u32 {
    ask.slots.max(1).min(hot.slots_total)
}

fn has_room(hot: &Hot, ask: &Ask) -> bool {
    hot.slots_total.saturating_sub(hot.slots_used) >= need(hot, ask)
}

fn passes_pins(replica: &Replica, ask: &Ask) -> bool {
    ask.node.as_ref().is_none_or(|node| *node == replica.node)
        && ask.pool.as_ref().is_none_or(|pool| *pool == replica.key.pool)
        && ask.device_mask.as_ref().is_none_or(|mask| replica.device_mask.as_deref() == Some(mask))
        && !ask.avoid_pools.contains(&replica.key.pool)
}

/// The finalizer of splitmix64: spreads any difference over all bits.
fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::orchestratord::service_registry::{Change, Limits};
    use crate::time::Now;
    use crate::wire::node::{Heartbeat, RegisterRequest};
    use serde_json::json;
    use std::collections::BTreeMap;

    /// One pool with one replica: (pool, models, ready, free slots of 4, free GPU memory).
    type Spec = (&'static str, &'static [&'static str], bool, u32, u64);

    /// Nodes `n0`, `n1`, ... in the given order.
    fn registry(nodes: &[&[Spec]]) -> ServiceRegistry {
        let mut registry = ServiceRegistry::new(Limits::default(), 1);
        let mut changes: Vec<Change> = Vec::new();
        // The last is registered first: order by name must not be order of arrival.
        for (n, specs) in nodes.iter().enumerate().rev() {
            let name = format!("n{n}");
            let body = json!({"node_id": name, "address": format!("http://{name}:9200")});
            let request: RegisterRequest = serde_json::from_value(body).expect("a registration");
            registry.register(&request, "peer", Now::default(), &mut changes).expect("registered");
            let pools: Vec<_> = specs
                .iter()
                .map(|(pool, models, ready, free, vram)| {
                    let replica = json!({"replica_id": "r0", "url": "http://127.0.0.1:1", "ready": ready,
                        "slots_free": free, "slots_total": 4, "models": models, "device_mask": pool});
                    json!({"pool_id": pool, "vram_free_bytes": vram, "replicas": [replica]})
                })
                .collect();
            let beat: Heartbeat = serde_json::from_value(json!({"pools": pools})).expect("a heartbeat");
            let node = NodeId::new(&name).expect("an id");
            registry.heartbeat(&node, &beat, "peer", Now::default(), &mut changes).expect("accepted");
        }
        registry.check_invariants();
        registry
    }

    fn ask(model: &str) -> Ask {
        Ask { model: Some(model.into()), slots: 1, ..Ask::default() }
    }

    fn pool(name: &str) -> PoolId {
        PoolId::new(name).expect("an id")
    }

    /// `node/pool` of the choice, or its refusal.
    fn chosen(
        registry: &ServiceRegistry,
        ask: &Ask,
        strategy: Strategy,
        state: &mut StrategyState,
    ) -> String {
        match choose(registry, ask, &[], strategy, state).choice {
            Choice::Replica { replica, .. } => {
                assert!(fits(registry, replica, ask), "chosen, but does not fit");
                let found = registry.replica(replica).expect("it exists");
                format!("{}/{}", found.node, found.key.pool)
            }
            Choice::NotReady { .. } => "NotReady".into(),
            refusal => format!("{refusal:?}"),
        }
    }

    fn first(registry: &ServiceRegistry, ask: &Ask) -> String {
        chosen(registry, ask, Strategy::LeastLoaded, &mut StrategyState::new(1))
    }

    #[test]
    fn least_loaded_goes_by_share_then_memory_then_name() {
        let m: &[&str] = &["m"];
        let by_share = registry(&[&[("a", m, true, 2, 9)], &[("b", m, true, 3, 0)]]);
        assert_eq!(first(&by_share, &ask("m")), "n1/b");
        let by_memory = registry(&[&[("a", m, true, 3, 1)], &[("b", m, true, 3, 2)]]);
        assert_eq!(first(&by_memory, &ask("m")), "n1/b");
        let by_name = registry(&[&[("b", m, true, 4, 0), ("a", m, true, 4, 0)], &[("a", m, true, 4, 0)]]);
        assert_eq!(first(&by_name, &ask("m")), "n0/a");
        let most_vram = registry(&[&[("a", m, true, 4, 1)], &[("b", m, true, 1, 2)]]);
        let mut state = StrategyState::new(1);
        assert_eq!(chosen(&most_vram, &ask("m"), Strategy::MostVram, &mut state), "n1/b");
    }

    #[test]
    fn round_robin_visits_all_in_turn_and_random_visits_all() {
        let m: &[&str] = &["m"];
        let registry = registry(&[
            &[("a", m, true, 4, 0), ("b", m, true, 4, 5)],
            &[("a", m, false, 4, 0)],
            &[("a", m, true, 1, 0)],
        ]);
        let mut state = StrategyState::new(1);
        let turns: Vec<String> =
            (0..4).map(|_| chosen(&registry, &ask("m"), Strategy::RoundRobin, &mut state)).collect();
        assert_eq!(turns, ["n0/a", "n0/b", "n2/a", "n0/a"]);
        let sequence = |seed| -> Vec<String> {
            let mut state = StrategyState::new(seed);
            (0..300).map(|_| chosen(&registry, &ask("m"), Strategy::Random, &mut state)).collect()
        };
        assert_eq!(sequence(5), sequence(5), "the seed decides");
        let mut counts: BTreeMap<String, u32> = BTreeMap::new();
        sequence(5).into_iter().for_each(|name| *counts.entry(name).or_default() += 1);
        assert!(counts.len() == 3 && counts.values().all(|n| *n > 60), "{counts:?}");
    }

    #[test]
    fn refusals_say_which_kind() {
        let m: &[&str] = &["m"];
        assert_eq!(first(&registry(&[]), &ask("m")), "Nothing");
        let known = registry(&[&[("full", m, true, 0, 0), ("down", &["x"], false, 4, 0)]]);
        assert_eq!(first(&known, &ask("m")), "Busy");
        assert_eq!(first(&known, &ask("x")), "NotReady");
        assert_eq!(first(&known, &ask("y")), "UnknownModel");
        assert_eq!(first(&known, &Ask { pool: Some(pool("elsewhere")), ..ask("m") }), "UnknownPin");
        assert_eq!(first(&known, &Ask { pool: Some(pool("down")), ..ask("m") }), "UnknownModel");
        let loading = registry(&[&[("a", m, true, 4, 0), ("b", &[], false, 4, 0)]]);
        assert_eq!(first(&loading, &ask("y")), "NotReady", "what the second one serves is not known yet");
        let wildcard = registry(&[&[("a", m, true, 4, 0), ("b", &[], true, 4, 0)]]);
        assert_eq!(first(&wildcard, &ask("y")), "n0/b");
        assert_eq!(first(&wildcard, &ask("")), "n0/a");
    }

    #[test]
    fn pins_are_kept_and_preferences_are_not_forced() {
        let m: &[&str] = &["m"];
        let registry = registry(&[
            &[("a", m, true, 4, 0), ("b", m, true, 1, 0), ("c", m, true, 0, 0)],
            &[("a", m, true, 4, 0)],
        ]);
        let node = |name: &str| Some(NodeId::new(name).expect("an id"));
        assert_eq!(first(&registry, &Ask { node: node("n1"), ..ask("m") }), "n1/a");
        assert_eq!(first(&registry, &Ask { pool: Some(pool("b")), ..ask("m") }), "n0/b");
        assert_eq!(first(&registry, &Ask { pool: Some(pool("c")), ..ask("m") }), "Busy");
        assert_eq!(first(&registry, &Ask { device_mask: Some("b".into()), ..ask("m") }), "n0/b");
        assert_eq!(first(&registry, &Ask { avoid_pools: vec![pool("a")], ..ask("m") }), "n0/b");
        assert_eq!(first(&registry, &Ask { prefer_pools: vec![pool("b")], ..ask("m") }), "n0/b");
        assert_eq!(first(&registry, &Ask { prefer_pools: vec![pool("c")], ..ask("m") }), "n0/a");
    }

    #[test]
    fn a_large_ask_takes_a_whole_replica_and_a_failed_one_is_not_chosen_again() {
        let m: &[&str] = &["m"];
        let registry = registry(&[&[("a", m, true, 3, 0)], &[("a", m, true, 4, 0)]]);
        let large = Ask { slots: 9, ..ask("m") };
        let mut state = StrategyState::new(1);
        let found = choose(&registry, &large, &[], Strategy::LeastLoaded, &mut state);
        let Choice::Replica { replica, slots: 4 } = found.choice else { panic!("{found:?}") };
        assert_eq!((found.considered, found.placeable, found.with_room), (2, 2, 1));
        let again = choose(&registry, &ask("m"), &[replica], Strategy::LeastLoaded, &mut state);
        assert!(matches!(again.choice, Choice::Replica { replica: other, .. } if other != replica));
        let all: Vec<ReplicaRef> = registry.replicas().map(|(replica, _)| replica).collect();
        let none = choose(&registry, &ask("m"), &all, Strategy::LeastLoaded, &mut state);
        assert_eq!(
            none.choice,
            Choice::NotReady { reason: "n0/a/r0: this request failed there already".into() }
        );
    }

    #[test]
    fn strategies_are_read_as_they_are_written() {
        for strategy in Strategy::ALL {
            assert_eq!(strategy.to_string().parse(), Ok(strategy));
        }
        let error = "fastest".parse::<Strategy>().expect_err("no such strategy");
        assert!(error.contains("least-loaded, round-robin, random, most-vram"), "{error}");
    }
}
