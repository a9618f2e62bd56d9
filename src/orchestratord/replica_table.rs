//! Every replica that the control plane knows, in one table: what it is, whether it takes work, and
//! the exact ledger of the requests that were dispatched to it from here.
//!
//! The table decides nothing about nodes and leases; the service registry tells it each node's
//! status. It keeps one verdict per replica up to date, [`Hot::placeable`], so that placement reads
//! a dense array of small records and touches nothing else. Four more things make that cheap:
//!
//! - **Model sets.** Replicas that serve the same list of models share one interned set. Placement
//!   turns a model's name into a bit mask over sets once, and tests one bit a replica. Replicas that
//!   differ in their context length differ in their set, too.
//! - **Cohorts.** Replicas of equally named pools that serve the same are known by these names, and so are those
//!   on the same devices: see [`Cohorts`]. Placement finds all that pass a request's pins by name.
//! - **Index.** Who is best at the moment is known from the [`PlacementIndex`], which is told of every
//!   change of a hot record, and of nothing else: a report that changes nothing costs nothing.
//! - **Order labels.** Ties are broken by name (node, pool, replica). Each replica carries a number
//!   that sorts as its name does, so that a tie costs one comparison of integers.
//!
//! **Slots.** `free = slots_total - in_flight - others`. `in_flight` is counted here, at dispatch,
//! and is exact. `others` is load that the node reports and that is not ours; a report is believed
//! only if none of our requests ran at its arrival nor since the report before, because otherwise
//! the two counts overlap in a way that nobody can tell apart.
//!
//! **Circuit breaker.** A failure on the data path opens the breaker at once, whatever heartbeats
//! say. After a backoff it is half open: one request may try. Its success closes the breaker, its
//! failure opens it again for twice as long.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use crate::time::{Mono, Now, Wall};
use crate::wire::id::{NodeId, ReplicaKey};
use crate::wire::url::BaseUrl;

use super::cohorts::{Cohorts, Serves};
use super::model_sets::ModelSets;
use super::placement::Strategy;
use super::placement_index::PlacementIndex;
use super::ring::stable_hash;
use super::service_registry::{Change, NodeStatus};

/// First backoff of a replica whose data path failed: long enough for an engine's restart to begin,
/// short enough that one lost connection goes unnoticed.
pub const BACKOFF_FIRST_MS: u64 = 250;
/// Longest backoff: one failed attempt in ten seconds is a price worth paying for a quick return.
pub const BACKOFF_MAX_MS: u64 = 10_000;

/// Distance between neighbouring order labels when there is room to choose: 2^40 leaves room for
/// 2^23 replicas on either side of the middle and 40 halvings between two of them.
const LABEL_STEP: u64 = 1 << 40;
/// Label of the first replica.
const LABEL_MIDDLE: u64 = 1 << 63;

/// Handle of a replica. A replica that is gone, or replaced by another engine process of the same
/// name, is not found by it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ReplicaRef {
    index: u32,
    serial: u32,
}

#[cfg(test)]
impl ReplicaRef {
    /// A handle of nothing.
    pub(super) fn for_tests(index: u32, serial: u32) -> ReplicaRef {
        ReplicaRef { index, serial }
    }
}

/// Slots that were taken from a replica; giving it back to
/// [`release`](super::service_registry::ServiceRegistry::release) is the only use. It cannot be
/// copied, so no slot is released twice.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "the slots stay taken until the grant is released"]
pub struct Grant {
    replica: ReplicaRef,
    slots: u32,
    /// Which trial of the replica it is, if it is one.
    trial: Option<u32>,
}

impl Grant {
    /// Where the slots are.
    #[must_use]
    pub fn replica(&self) -> ReplicaRef {
        self.replica
    }

    /// How many.
    #[must_use]
    pub fn slots(&self) -> u32 {
        self.slots
    }
}

/// Where requests for a replica are sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// Its node did not say. The node's pool status does.
    AskNode,
    /// Nowhere: the engine would be at an address that must not be dialled.
    Forbidden(BaseUrl),
    /// Straight to the engine.
    Direct(BaseUrl),
    /// To the node's agent, which relays: the engine listens on the node's loopback.
    Relay {
        /// The node agent.
        agent: BaseUrl,
        /// The engine, as the node sees it.
        engine: BaseUrl,
    },
}

impl Target {
    /// The engine's URL as its node sees it.
    #[must_use]
    pub fn engine(&self) -> Option<&BaseUrl> {
        match self {
            Target::AskNode => None,
            Target::Forbidden(engine) | Target::Direct(engine) | Target::Relay { engine, .. } => Some(engine),
        }
    }

    /// Whether requests can be sent there.
    #[must_use]
    pub fn is_known(&self) -> bool {
        matches!(self, Target::Direct(_) | Target::Relay { .. })
    }
}

/// Whether the data path to a replica is trusted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Circuit {
    /// It works as far as known.
    Closed,
    /// It failed; nothing is sent until `until`.
    Open {
        /// When one request may try.
        until: Mono,
        /// Failures in a row.
        failures: u32,
        /// The newest failure.
        reason: Arc<str>,
    },
    /// The backoff has passed; one request may try.
    HalfOpen {
        /// Failures in a row; 0 where there was none, but a restart of the control plane.
        failures: u32,
        /// The newest failure.
        reason: Arc<str>,
        /// The one request is on its way.
        trying: bool,
    },
}

/// How sure it is that a replica exists as it is known here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Confirmation {
    /// The node's present agent has reported it.
    Beaten,
    /// An earlier start of the control plane knew it, and its node has not beaten since this one. It
    /// takes work, and its circuit starts half open.
    Restored,
    /// The node's agent has restarted and not reported it yet: it takes no work.
    Doubted,
}

/// One replica as the control plane sees it.
#[derive(Clone, Debug)]
pub struct Replica {
    /// Its node.
    pub node: NodeId,
    /// Its pool and its name there.
    pub key: ReplicaKey,
    /// Status of its node.
    pub node_status: NodeStatus,
    /// How sure it is that the replica exists.
    pub confirmation: Confirmation,
    /// Tells engine processes of the same name apart.
    pub generation: u64,
    /// Where requests go.
    pub target: Target,
    /// Its node says that it takes work.
    pub ready: bool,
    /// Its node says that it takes no new work.
    pub draining: bool,
    /// Requests that it serves at once.
    pub slots_total: u32,
    /// Free slots by its node's last report.
    pub slots_reported_free: u32,
    /// Slots taken by requests from here.
    pub in_flight: u32,
    /// Slots taken by somebody else, where that is known.
    pub others: u32,
    /// Models that it serves; empty where not known.
    pub models: Arc<[String]>,
    /// Longest prompt and answer together, in tokens, where known.
    pub context_length: Option<u64>,
    /// Kind of engine.
    pub engine: Option<Arc<str>>,
    /// Its version.
    pub engine_version: Option<Arc<str>>,
    /// GPUs that it uses.
    pub device_mask: Option<Arc<str>>,
    /// Free GPU memory of its pool, 0 where unknown.
    pub vram_free_bytes: u64,
    /// Why its node says it is not ready.
    pub reason: Option<Arc<str>>,
    /// When it last started or stopped taking work.
    pub since: Wall,
    /// State of the data path.
    pub circuit: Circuit,
    /// A request of ours ran at some time since the last report.
    pub(super) ours_since_report: bool,
    /// Trials of a data path in doubt so far.
    pub(super) trials: u32,
    /// The node's count of heartbeats when this replica was last in one.
    pub(super) seen_in_beat: u32,
}

/// Why a replica takes no work. Displayed to people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Obstacle {
    /// Its node's status forbids it.
    Node(NodeId, NodeStatus),
    /// The node's agent restarted, or the control plane after long, and has not reported the replica yet.
    Unconfirmed,
    /// The engine's address is being asked from its node.
    AddressUnknown,
    /// The engine's address is one that no engine has.
    AddressForbidden,
    /// It drains.
    Draining,
    /// Its node says that it is not ready, and perhaps why.
    NotReady(Option<Arc<str>>),
    /// The data path failed, and how.
    CircuitOpen(Arc<str>),
    /// After a failure one request is trying, and how it had failed.
    Trying(Arc<str>),
    /// After a restart of the control plane one request is trying.
    TryingRestored,
    /// It has no slots.
    NoSlots,
}

impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Obstacle::Node(node, status) => write!(f, "node {node} is {status}"),
            Obstacle::Unconfirmed => {
                f.write_str("the node's agent has not reported the replica since a restart")
            }
            Obstacle::AddressUnknown => f.write_str("the engine's address is being asked from its node"),
            Obstacle::AddressForbidden => {
                f.write_str("the engine's address is link-local, multicast or this control plane's own")
            }
            Obstacle::Draining => f.write_str("draining"),
            Obstacle::NotReady(None) => f.write_str("its node reports it as not ready"),
            Obstacle::NotReady(Some(reason)) => write!(f, "its node reports it as not ready: {reason}"),
            Obstacle::CircuitOpen(reason) => write!(f, "out of rotation after a failure: {reason}"),
            Obstacle::Trying(reason) => write!(f, "one request tries it after a failure: {reason}"),
            Obstacle::TryingRestored => {
                f.write_str("one request tries it after a restart of the control plane")
            }
            Obstacle::NoSlots => f.write_str("it has no slots"),
        }
    }
}

impl Replica {
    /// Slots that a request may take now.
    #[must_use]
    pub fn slots_free(&self) -> u32 {
        self.slots_total.saturating_sub(self.in_flight.saturating_add(self.others))
    }

    /// Whether nothing but the state file tells of it: no request has been answered there, and none has
    /// failed.
    #[must_use]
    pub fn is_untried(&self) -> bool {
        self.confirmation == Confirmation::Restored
            && matches!(self.circuit, Circuit::HalfOpen { failures: 0, .. })
    }

    /// The first reason why it takes no work; `None` if it does (though it may be full).
    #[must_use]
    pub fn obstacle(&self) -> Option<Obstacle> {
        if !self.node_status.takes_work() {
            return Some(Obstacle::Node(self.node.clone(), self.node_status));
        }
        if self.confirmation == Confirmation::Doubted {
            return Some(Obstacle::Unconfirmed);
        }
        if self.draining {
            return Some(Obstacle::Draining);
        }
        if !self.ready {
            return Some(Obstacle::NotReady(self.reason.clone()));
        }
        match self.target {
            Target::AskNode => return Some(Obstacle::AddressUnknown),
            Target::Forbidden(_) => return Some(Obstacle::AddressForbidden),
            Target::Direct(_) | Target::Relay { .. } => {}
        }
        if self.slots_total == 0 {
            return Some(Obstacle::NoSlots);
        }
        match &self.circuit {
            Circuit::Open { reason, .. } => Some(Obstacle::CircuitOpen(reason.clone())),
            Circuit::HalfOpen { failures: 0, trying: true, .. } => Some(Obstacle::TryingRestored),
            Circuit::HalfOpen { reason, trying: true, .. } => Some(Obstacle::Trying(reason.clone())),
            Circuit::HalfOpen { .. } | Circuit::Closed => None,
        }
    }

    /// Whether it may be given work, its free slots aside. As [`Replica::obstacle`], without words.
    fn placeable(&self) -> bool {
        self.node_status.takes_work()
            && self.confirmation != Confirmation::Doubted
            && self.ready
            && !self.draining
            && self.target.is_known()
            && self.slots_total > 0
            && matches!(self.circuit, Circuit::Closed | Circuit::HalfOpen { trying: false, .. })
    }

    /// Its node has reported it. A circuit that is half open only because of a restart is closed with
    /// that, if the node says that it takes work.
    pub(super) fn confirm(&mut self) {
        self.confirmation = Confirmation::Beaten;
        if self.ready && matches!(self.circuit, Circuit::HalfOpen { failures: 0, .. }) {
            self.circuit = Circuit::Closed;
        }
    }

    /// What of it is saved and changes often: of the rest, who changes it knows.
    pub(super) fn saved_numbers(&self) -> (bool, bool, u32, bool) {
        (self.ready, self.draining, self.slots_total, self.confirmation == Confirmation::Doubted)
    }

    /// Takes a report of free slots. The rule for `others` is in this file's introduction.
    pub(super) fn report_slots(&mut self, free: u32, total: u32) {
        self.slots_total = total;
        self.slots_reported_free = free.min(total);
        self.others =
            if self.ours_since_report || self.in_flight > 0 { 0 } else { total - self.slots_reported_free };
        self.ours_since_report = self.in_flight > 0;
    }
}

/// What placement reads of a replica: 40 bytes, nothing behind a pointer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Hot {
    /// Sorts as `(node, pool, replica)` does.
    pub order: u64,
    /// Free GPU memory, 0 where unknown.
    pub vram_free_bytes: u64,
    /// Slots, as in [`Replica`].
    pub slots_total: u32,
    /// Of these, taken by us or by others.
    pub slots_used: u32,
    /// Which set of models it serves; [`NO_MODELS`] where none is known.
    pub model_set: u32,
    /// Longest prompt and answer together, in tokens; 0 where unknown.
    pub context_tokens: u32,
    /// Tells this replica from an earlier one at the same index.
    serial: u32,
    /// Takes work, free slots aside.
    pub placeable: bool,
    /// Its node has been silent for longer than the grace.
    pub offline: bool,
    /// The index is in use.
    pub exists: bool,
}

/// The empty set of models.
pub const NO_MODELS: u32 = 0;

/// The table. See the introduction of this file.
#[derive(Debug, Default)]
pub struct ReplicaTable {
    cold: Vec<Option<Replica>>,
    /// Same index as `cold`.
    hot: Vec<Hot>,
    free: Vec<u32>,
    by_name: BTreeMap<(NodeId, ReplicaKey), u32>,
    sets: ModelSets,
    cohorts: Cohorts,
    placement_index: PlacementIndex,
    /// Slots of all replicas.
    slots_total: u64,
}

impl ReplicaTable {
    /// Replicas in the table.
    #[must_use]
    pub fn len(&self) -> usize {
        self.by_name.len()
    }

    /// Whether the table is empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.by_name.is_empty()
    }

    /// Slots of all replicas, whether they take work or not.
    #[must_use]
    pub fn slots_total(&self) -> u64 {
        self.slots_total
    }

    /// Who is best at the moment.
    #[must_use]
    pub fn placement_index(&self) -> &PlacementIndex {
        &self.placement_index
    }

    /// The cohorts that placement finds by name.
    #[must_use]
    pub fn cohorts(&self) -> &Cohorts {
        &self.cohorts
    }

    /// What placement scans. An index that is not in use has `exists == false`.
    #[must_use]
    pub fn hot(&self) -> &[Hot] {
        &self.hot
    }

    /// The handle of the replica at `index` of [`ReplicaTable::hot`].
    #[must_use]
    pub fn at(&self, index: usize) -> Option<(ReplicaRef, &Replica)> {
        let replica = self.cold.get(index)?.as_ref()?;
        Some((self.reference(u32::try_from(index).ok()?), replica))
    }

    /// The replica, if the handle is current.
    #[must_use]
    pub fn get(&self, replica: ReplicaRef) -> Option<&Replica> {
        self.index(replica).and_then(|index| self.cold[index].as_ref())
    }

    /// Its index in [`ReplicaTable::hot`], if the handle is current.
    #[must_use]
    pub fn index_of(&self, replica: ReplicaRef) -> Option<usize> {
        self.index(replica)
    }

    /// Its hot half.
    #[must_use]
    pub fn get_hot(&self, replica: ReplicaRef) -> Option<&Hot> {
        self.index(replica).map(|index| &self.hot[index])
    }

    /// All replicas, by (node, pool, replica).
    pub fn iter(&self) -> impl Iterator<Item = (ReplicaRef, &Replica)> {
        self.by_name.values().filter_map(|index| self.at(*index as usize))
    }

    /// Which sets of models there are.
    #[must_use]
    pub fn sets(&self) -> &ModelSets {
        &self.sets
    }

    /// Lets the index answer another strategy, with or without rings. Linear.
    pub(super) fn set_placement(&mut self, strategy: Strategy, with_rings: bool) {
        self.placement_index.configure(strategy, with_rings, &self.hot);
    }

    /// Adds a replica that is not in the table, names it in `changes`, and says whether it takes work.
    pub(super) fn insert(&mut self, mut replica: Replica, now: Now, changes: &mut Vec<Change>) -> ReplicaRef {
        replica.since = now.wall;
        let (models, context_length) = (std::mem::take(&mut replica.models), replica.context_length.take());
        let name = (replica.node.clone(), replica.key.clone());
        let index = self.free.pop().unwrap_or_else(|| {
            self.cold.push(None);
            self.hot.push(Hot::default());
            u32::try_from(self.cold.len() - 1).unwrap_or(u32::MAX)
        });
        self.by_name.insert(name.clone(), index);
        let order = self.label_for(&name);
        let slot = &mut self.hot[index as usize];
        *slot = Hot { order, exists: true, serial: slot.serial.wrapping_add(1), ..Hot::default() };
        let point = stable_hash(format!("{}/{}", replica.node, replica.key).as_bytes());
        let serves = Serves { model_set: NO_MODELS, context_tokens: 0 };
        let membership = self.cohorts.join(&replica.key.pool, replica.device_mask.as_ref(), serves);
        self.placement_index.insert(index as usize, point, membership, &self.hot);
        changes.push(Change::ReplicaFound {
            replica: self.reference(index),
            node: replica.node.clone(),
            key: replica.key.clone(),
        });
        self.cold[index as usize] = Some(replica);
        let reference = self.reference(index);
        self.set_models(reference, &models, context_length, changes);
        self.refresh(reference, now, changes);
        reference
    }

    /// Removes a replica. What is in flight there is released into nothing.
    pub(super) fn remove(&mut self, replica: ReplicaRef, reason: &str, changes: &mut Vec<Change>) {
        let Some(index) = self.index(replica) else { return };
        let Some(gone) = self.cold[index].take() else { return };
        self.placement_index.remove(index, &self.hot);
        self.slots_total -= u64::from(self.hot[index].slots_total);
        self.cohorts.leave(self.placement_index.membership(index));
        self.sets.release(self.hot[index].model_set);
        self.by_name.remove(&(gone.node.clone(), gone.key.clone()));
        self.hot[index] = Hot { serial: self.hot[index].serial, ..Hot::default() };
        self.free.push(replica.index);
        changes.push(Change::ReplicaGone {
            replica,
            node: gone.node,
            key: gone.key,
            in_flight: gone.in_flight,
            reason: reason.to_string(),
        });
    }

    /// Changes a replica, brings its verdict up to date and names what that means for waiters.
    pub(super) fn update(
        &mut self,
        replica: ReplicaRef,
        now: Now,
        changes: &mut Vec<Change>,
        change: impl FnOnce(&mut Replica),
    ) {
        if let Some(index) = self.index(replica)
            && let Some(cold) = self.cold[index].as_mut()
        {
            change(cold);
            if self.cohorts.devices(self.placement_index.membership(index)) != cold.device_mask.as_deref() {
                let serves = Serves::of(&self.hot[index]);
                self.regroup(index, serves);
            }
            self.refresh(replica, now, changes);
        }
    }

    /// Sets what a replica serves: its models, and how long a prompt and its answer may be. No verdict
    /// depends on them, but other waiters may fit. True if they were others before.
    pub(super) fn set_models(
        &mut self,
        replica: ReplicaRef,
        models: &[String],
        context_length: Option<u64>,
        changes: &mut Vec<Change>,
    ) -> bool {
        let Some(index) = self.index(replica) else { return false };
        let Some(cold) = self.cold[index].as_mut() else { return false };
        if cold.models[..] == *models && cold.context_length == context_length {
            return false;
        }
        let old = self.hot[index].model_set;
        cold.context_length = context_length;
        let context_tokens = u32::try_from(context_length.unwrap_or(0)).unwrap_or(u32::MAX);
        let (model_set, list) = self.sets.intern(models, context_tokens);
        cold.models = list;
        self.regroup(index, Serves { model_set, context_tokens });
        self.sets.release(old);
        if self.hot[index].placeable {
            changes.push(Change::ReplicaCapacity(replica));
        }
        true
    }

    /// Takes slots, if the replica takes work and has as many.
    pub(super) fn acquire(&mut self, replica: ReplicaRef, slots: u32) -> Option<Grant> {
        let index = self.index(replica)?;
        let cold = self.cold[index].as_mut()?;
        if !self.hot[index].placeable || cold.slots_free() < slots {
            return None;
        }
        cold.in_flight += slots;
        cold.ours_since_report = true;
        let mut trial = None;
        if let Circuit::HalfOpen { trying, .. } = &mut cold.circuit {
            *trying = true;
            cold.trials = cold.trials.wrapping_add(1);
            trial = Some(cold.trials);
        }
        self.refresh_quietly(index);
        Some(Grant { replica, slots, trial })
    }

    /// Gives slots back.
    pub(super) fn release(&mut self, grant: Grant) {
        let Some(index) = self.index(grant.replica) else { return };
        let Some(cold) = self.cold[index].as_mut() else { return };
        cold.in_flight = cold.in_flight.saturating_sub(grant.slots);
        // A trial that ended without a verdict (its client left) makes room for another one, unless the data
        // path failed again since and a later one is under way.
        if grant.trial == Some(cold.trials)
            && let Circuit::HalfOpen { trying, .. } = &mut cold.circuit
        {
            *trying = false;
        }
        self.refresh_quietly(index);
    }

    /// A replica serves this from now on, or has other devices.
    fn regroup(&mut self, index: usize, serves: Serves) {
        let Some(cold) = self.cold[index].as_ref() else { return };
        let before = self.placement_index.membership(index);
        let membership = self.cohorts.join(&cold.key.pool, cold.device_mask.as_ref(), serves);
        self.placement_index.regroup(index, serves, membership, &mut self.hot);
        self.cohorts.leave(before);
    }

    /// Recomputes the verdict and names the difference.
    fn refresh(&mut self, replica: ReplicaRef, now: Now, changes: &mut Vec<Change>) {
        let Some(index) = self.index(replica) else { return };
        let before = self.hot[index];
        self.refresh_quietly(index);
        let after = self.hot[index];
        let Some(cold) = self.cold[index].as_mut() else { return };
        let free = |hot: &Hot| hot.slots_total.saturating_sub(hot.slots_used);
        match (before.placeable, after.placeable) {
            (false, true) => {
                cold.since = now.wall;
                changes.push(Change::ReplicaReady(replica));
            }
            (true, false) => {
                cold.since = now.wall;
                let reason = cold.obstacle().map(|o| o.to_string()).unwrap_or_default();
                changes.push(Change::ReplicaNotReady { replica, reason });
            }
            // Who wants more slots than there are is given all: with fewer in total that may be enough.
            (true, true) if free(&after) > free(&before) || after.slots_total < before.slots_total => {
                changes.push(Change::ReplicaCapacity(replica));
            }
            _ => {}
        }
    }

    fn refresh_quietly(&mut self, index: usize) {
        let Some(cold) = self.cold[index].as_ref() else { return };
        let before = self.hot[index];
        let after = Hot {
            placeable: cold.placeable(),
            offline: cold.node_status == NodeStatus::Offline,
            slots_total: cold.slots_total,
            slots_used: cold.in_flight.saturating_add(cold.others),
            vram_free_bytes: cold.vram_free_bytes,
            ..before
        };
        if after != before {
            self.hot[index] = after;
            self.slots_total =
                self.slots_total - u64::from(before.slots_total) + u64::from(after.slots_total);
            self.placement_index.update(index, &before, &self.hot);
        }
    }

    fn index(&self, replica: ReplicaRef) -> Option<usize> {
        let index = replica.index as usize;
        let hot = self.hot.get(index)?;
        (hot.exists && hot.serial == replica.serial).then_some(index)
    }

    fn reference(&self, index: u32) -> ReplicaRef {
        ReplicaRef { index, serial: self.hot[index as usize].serial }
    }

    /// An order label for a name that was just put into `by_name`: between its neighbours' labels.
    /// Where no number is left between them, all labels are dealt anew; that is linear, and comes
    /// at most once in 40 insertions.
    fn label_for(&mut self, name: &(NodeId, ReplicaKey)) -> u64 {
        use std::ops::Bound::{Excluded, Unbounded};
        let label = |index: &u32| self.hot[*index as usize].order;
        let before = self.by_name.range((Unbounded, Excluded(name))).next_back().map(|(_, i)| label(i));
        let after = self.by_name.range((Excluded(name), Unbounded)).next().map(|(_, i)| label(i));
        let found = match (before, after) {
            (None, None) => Some(LABEL_MIDDLE),
            (Some(before), None) => before.checked_add(LABEL_STEP),
            (None, Some(after)) => after.checked_sub(LABEL_STEP),
            (Some(before), Some(after)) => Some(before + (after - before) / 2).filter(|l| *l != before),
        };
        found.unwrap_or_else(|| {
            let mut next = LABEL_MIDDLE - LABEL_STEP * (self.by_name.len() as u64 / 2);
            let mut own = next;
            for (other, index) in &self.by_name {
                if other == name {
                    own = next;
                }
                self.hot[*index as usize].order = next;
                next += LABEL_STEP;
            }
            self.placement_index.relabel(&self.hot);
            own
        })
    }

    /// Panics where the table contradicts itself. For tests and simulations.
    pub(super) fn check_invariants(&self) {
        let mut references = BTreeMap::new();
        let mut order_before = None;
        for ((node, key), index) in &self.by_name {
            let hot = &self.hot[*index as usize];
            let cold = self.cold[*index as usize].as_ref().expect("a named replica exists");
            assert!(hot.exists && (&cold.node, &cold.key) == (node, key), "{node} {key}: under another name");
            assert!(order_before < Some(hot.order), "{node} {key}: its label does not sort as its name");
            order_before = Some(hot.order);
            assert_eq!(hot.placeable, cold.placeable(), "{node} {key}: outdated verdict");
            assert_eq!(hot.placeable, cold.obstacle().is_none(), "{node} {key}: verdict without a reason");
            assert_eq!(
                (hot.slots_total, hot.slots_used, hot.vram_free_bytes),
                (cold.slots_total, cold.in_flight + cold.others, cold.vram_free_bytes),
                "{node} {key}: outdated slots"
            );
            assert!(cold.others <= cold.slots_total, "{node} {key}: more load than slots");
            assert_eq!(hot.model_set == NO_MODELS, cold.models.is_empty(), "{node} {key}: models");
            let context_tokens = u32::try_from(cold.context_length.unwrap_or(0)).unwrap_or(u32::MAX);
            assert_eq!(hot.context_tokens, context_tokens, "{node} {key}: context length");
            *references.entry(hot.model_set).or_insert(0u32) += 1;
        }
        assert_eq!(self.cold.iter().flatten().count(), self.by_name.len(), "replicas without a name");
        assert_eq!(self.free.len() + self.by_name.len(), self.cold.len(), "lost indices");
        references.remove(&NO_MODELS);
        self.sets.check_invariants(&references);
        self.placement_index.check_invariants(&self.hot);
        let slots = self.hot.iter().map(|hot| u64::from(hot.slots_total)).sum::<u64>();
        assert_eq!(self.slots_total, slots, "slots are summed wrongly");
        let members = self.by_name.values().filter_map(|index| {
            let (index, cold) = (*index as usize, self.cold[*index as usize].as_ref()?);
            let serves = Serves::of(&self.hot[index]);
            let membership = self.placement_index.membership(index);
            Some((membership, &cold.key.pool, cold.device_mask.as_deref(), serves))
        });
        self.cohorts.check_invariants(members);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::id::{PoolId, ReplicaId};

    fn replica(name: u64, model: u64) -> Replica {
        let pool = PoolId::new("p").expect("an id");
        let key = ReplicaKey { pool, replica: ReplicaId::new(&format!("r{name:04}")).expect("an id") };
        Replica {
            node: NodeId::new("n").expect("an id"),
            key,
            node_status: NodeStatus::Online,
            confirmation: Confirmation::Beaten,
            generation: 0,
            target: Target::Direct(BaseUrl::new("http://h:1").expect("a URL")),
            ready: true,
            draining: false,
            slots_total: 1,
            slots_reported_free: 1,
            in_flight: 0,
            others: 0,
            models: vec![format!("m{model}")].into(),
            context_length: None,
            engine: None,
            engine_version: None,
            device_mask: None,
            vram_free_bytes: 0,
            reason: None,
            since: Wall(0),
            circuit: Circuit::Closed,
            ours_since_report: false,
            trials: 0,
            seen_in_beat: 0,
        }
    }

    proptest::proptest! {
        /// Labels sort as names and model sets are counted right, whatever comes and goes in which
        /// order; and a handle never finds a successor.
        #[test]
        fn the_table_agrees_with_itself(ops in proptest::collection::vec((0u64..60, 0u64..4), 1..200)) {
            let (mut table, mut changes) = (ReplicaTable::default(), Vec::new());
            let mut inside: BTreeMap<u64, ReplicaRef> = BTreeMap::new();
            for (name, model) in ops {
                match inside.remove(&name) {
                    Some(known) => {
                        table.remove(known, "gone", &mut changes);
                        proptest::prop_assert!(table.get(known).is_none());
                    }
                    None => {
                        let added = table.insert(replica(name, model), Now::default(), &mut changes);
                        inside.insert(name, added);
                    }
                }
                table.check_invariants();
                proptest::prop_assert!(table.iter().map(|(r, _)| r).eq(inside.values().copied()));
            }
        }
    }

    #[test]
    fn labels_last_where_every_newcomer_goes_between_the_same_two() {
        let (mut table, mut changes) = (ReplicaTable::default(), Vec::new());
        table.insert(replica(9999, 0), Now::default(), &mut changes);
        for name in 0..200 {
            table.insert(replica(name, 0), Now::default(), &mut changes);
            table.check_invariants();
        }
        assert_eq!(table.len(), 201);
    }
}
