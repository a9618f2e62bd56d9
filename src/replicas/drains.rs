//! What takes no new work, and how far that got: the ledger of drains.
//!
//! A drain is a mark on a [`Scope`]: the whole node, a GPU, a pool, one replica. A replica drains while
//! any mark covers it. Marks know nothing of replicas: one that appears later within a scope is covered
//! at once, and resuming a scope ends that mark alone.
//!
//! No request is ever given a slot within a marked scope, so the requests that a mark waits for are those
//! that ran when it began. Each mark counts them down; at 0 it is drained. If its deadline passes before,
//! [`Registry::expire_drains`] names the requests that are to be cut, once, and the mark goes on counting
//! until they have ended too.
//!
//! The shutdown of this process is a mark like the others, except that nobody can resume it and that it
//! is not kept over a restart.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::hash::BuildHasherDefault;
use std::sync::Arc;

use super::change::Change;
use super::registry::{Registry, ReplicaLease};
use crate::reactor::token::NumberHasher;
use crate::service::events::Happening;
use crate::time::{Mono, Now, Wall, earliest};
use crate::wire::drain::{DrainStatus, Scope, StoredDrain};
use crate::wire::handoff::Handoff;
use crate::wire::id::{PoolId, ReplicaKey};

/// Most drains at once: every replica of a large machine by name, several times over.
pub const DRAINS_MAX: usize = 1_024;
/// Longest time that a drain may give to running requests, in milliseconds: a day. Longer than any answer
/// takes; who wants to wait for ever gives no deadline.
pub const DRAIN_DEADLINE_MS_MAX: u64 = 24 * 60 * 60 * 1_000;
/// Most GPUs that are read from one device mask: machines have up to 16, and masks come from files.
const MASK_GPUS_MAX: usize = 64;

/// The marks. See the file's text.
#[derive(Debug, Default)]
pub(super) struct Drains {
    marks: BTreeMap<Scope, Mark>,
    revision: u64,
}

#[derive(Debug)]
struct Mark {
    since: Now,
    deadline: Option<Now>,
    /// Whether what runs at the deadline has been cut.
    is_cut: bool,
    in_flight: u32,
    finished: u32,
    cut: u32,
    drained_at: Option<Wall>,
}

/// Requests that run, by the number of their lease.
#[derive(Debug, Default)]
pub(super) struct Running {
    /// In no order: where one follows, they are sorted.
    requests: HashMap<u64, Request, BuildHasherDefault<NumberHasher>>,
    next_id: u64,
}

#[derive(Debug)]
struct Request {
    key: ReplicaKey,
    /// As it was when the request got its slots: that says on which GPUs it runs.
    handoff: Arc<Handoff>,
    is_cut: bool,
}

/// What became of a drain; each is returned once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DrainChange {
    /// What it covers.
    pub scope: Scope,
    /// What happened.
    pub what: DrainEvent,
}

/// See [`DrainChange`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DrainEvent {
    /// It began.
    Began {
        /// Requests that it waits for.
        in_flight: u32,
        /// What they are given, in milliseconds.
        deadline_ms: Option<u64>,
    },
    /// It goes on with another deadline.
    Moved {
        /// What running requests are given from now on, in milliseconds.
        deadline_ms: Option<u64>,
    },
    /// It was kept over a restart of this process.
    Restored,
    /// Its deadline passed: requests are being cut.
    Cut {
        /// So many.
        requests: u32,
    },
    /// Nothing runs any more.
    Drained {
        /// Since it began, in nanoseconds.
        took_ns: u64,
        /// Requests that ended by themselves.
        finished: u32,
        /// Requests that were cut.
        cut: u32,
    },
    /// It was ended.
    Resumed {
        /// Requests that it still waited for.
        in_flight: u32,
    },
}

/// There are [`DRAINS_MAX`] drains already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooManyDrains;

impl fmt::Display for TooManyDrains {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "there are {DRAINS_MAX} drains already: resume some of them")
    }
}

impl Registry {
    /// Gives a scope no new work until [`Registry::resume`], replicas that it gets later included.
    /// Requests that still run after `deadline_ms` are to be cut; without one they may take for ever. A
    /// second drain of a scope changes its deadline.
    ///
    /// # Errors
    /// [`TooManyDrains`].
    pub fn drain(
        &mut self,
        scope: &Scope,
        deadline_ms: Option<u64>,
        now: Now,
        changes: &mut Vec<Change>,
    ) -> Result<(), TooManyDrains> {
        let deadline = deadline_ms.map(|ms| now.plus_ms(ms.min(DRAIN_DEADLINE_MS_MAX)));
        let told = |what| Change::Drain(DrainChange { scope: scope.clone(), what });
        if let Some(mark) = self.drains.marks.get_mut(scope) {
            mark.deadline = deadline;
            mark.is_cut = false;
            self.drains.revision += 1;
            changes.push(told(DrainEvent::Moved { deadline_ms }));
            return Ok(());
        }
        self.make_room(scope)?;
        let in_flight = self.running.within(scope).count();
        let in_flight = u32::try_from(in_flight).unwrap_or(u32::MAX);
        let mark = Mark { deadline, ..Mark::new(now, in_flight) };
        self.drains.marks.insert(scope.clone(), mark);
        self.drains.revision += 1;
        changes.push(told(DrainEvent::Began { in_flight, deadline_ms }));
        self.drains_changed(scope, now, changes);
        self.drains.conclude(scope, now, changes);
        Ok(())
    }

    /// Ends the drain of a scope; wider and narrower ones go on. False where there was none.
    pub fn resume(&mut self, scope: &Scope, now: Now, changes: &mut Vec<Change>) -> bool {
        if *scope == Scope::Shutdown {
            return false;
        }
        let Some(mark) = self.drains.marks.remove(scope) else { return false };
        self.drains.revision += 1;
        let what = DrainEvent::Resumed { in_flight: mark.in_flight };
        changes.push(Change::Drain(DrainChange { scope: scope.clone(), what }));
        self.drains_changed(scope, now, changes);
        true
    }

    /// Leases of the requests that are to be cut now because a deadline passed; each is named once.
    pub fn expire_drains(&mut self, now: Now, changes: &mut Vec<Change>) -> Vec<u64> {
        let mut leases = Vec::new();
        for (scope, mark) in &mut self.drains.marks {
            if mark.cut_at().is_none_or(|at| at > now.mono) {
                continue;
            }
            mark.is_cut = true;
            let mut requests = 0;
            for (id, request) in self.running.within_mut(scope) {
                requests += 1;
                if !request.is_cut {
                    request.is_cut = true;
                    leases.push(id);
                }
            }
            changes.push(Change::Drain(DrainChange {
                scope: scope.clone(),
                what: DrainEvent::Cut { requests },
            }));
        }
        leases.sort_unstable();
        leases
    }

    /// A request that was to be cut had ended by itself already, and counts as such when it is released.
    pub fn cut_came_too_late(&mut self, lease: &ReplicaLease) {
        if let Some(request) = self.running.requests.get_mut(&lease.id) {
            request.is_cut = false;
        }
    }

    /// When [`Registry::expire_drains`] is wanted next.
    #[must_use]
    pub fn drain_deadline(&self) -> Option<Mono> {
        self.drains.marks.values().fold(None, |at, mark| earliest(at, mark.cut_at()))
    }

    /// How far the drain of exactly this scope got.
    #[must_use]
    pub fn drain_status(&self, scope: &Scope) -> Option<DrainStatus> {
        self.drains.marks.get(scope).map(|mark| mark.status(scope))
    }

    /// The narrowest drain that covers a replica.
    #[must_use]
    pub fn drain_of(&self, key: &ReplicaKey) -> Option<DrainStatus> {
        let mask = self.handoff(key).and_then(|handoff| handoff.device_mask.as_deref());
        scopes_of(key, mask).find_map(|scope| self.drain_status(&scope))
    }

    /// The narrowest drain that covers a pool, whether it has replicas or not.
    #[must_use]
    pub fn drain_of_pool(&self, pool: &PoolId) -> Option<DrainStatus> {
        [Scope::pool(pool), Scope::Node, Scope::Shutdown].iter().find_map(|scope| self.drain_status(scope))
    }

    /// Whether [`Registry::drain`] would be refused.
    ///
    /// # Errors
    /// [`TooManyDrains`].
    pub fn can_drain(&self, scope: &Scope) -> Result<(), TooManyDrains> {
        let room = self.drains.marks.len() < DRAINS_MAX || self.drains.marks.contains_key(scope);
        if room || *scope == Scope::Shutdown || self.oldest_vain_drain().is_some() {
            Ok(())
        } else {
            Err(TooManyDrains)
        }
    }

    /// Every drain, the widest first.
    pub fn drains(&self) -> impl Iterator<Item = DrainStatus> {
        self.drains.marks.iter().map(|(scope, mark)| mark.status(scope))
    }

    /// Grows with everything that [`Registry::export_drains`] would tell differently.
    #[must_use]
    pub fn drains_revision(&self) -> u64 {
        self.drains.revision
    }

    /// The drains that a restart must not end.
    #[must_use]
    pub fn export_drains(&self) -> Vec<StoredDrain> {
        let kept = self.drains.marks.iter().filter(|(scope, _)| **scope != Scope::Shutdown);
        kept.map(|(scope, mark)| StoredDrain {
            scope: scope.clone(),
            since_ms: mark.since.wall.unix_ms(),
            deadline_at_ms: mark.deadline.map(|at| at.wall.unix_ms()),
        })
        .collect()
    }

    /// Takes back what [`Registry::export_drains`] gave to an earlier process; for the start, before
    /// anything runs. Drains that exist already stay as they are, and what is beyond the limits is left
    /// out.
    pub fn restore_drains(&mut self, stored: &[StoredDrain], now: Now, changes: &mut Vec<Change>) {
        for drain in stored {
            let scope = &drain.scope;
            let known = self.drains.marks.contains_key(scope);
            if *scope == Scope::Shutdown || known || self.drains.marks.len() >= DRAINS_MAX {
                continue;
            }
            let now_ms = now.wall.unix_ms();
            let past_ns = now_ms.saturating_sub(drain.since_ms).saturating_mul(1_000_000);
            let since = Now {
                mono: Mono(now.mono.0.saturating_sub(past_ns)),
                wall: Wall(drain.since_ms.saturating_mul(1_000_000)),
            };
            let in_flight = u32::try_from(self.running.within(scope).count()).unwrap_or(u32::MAX);
            let left = |at: u64| now.plus_ms(at.saturating_sub(now_ms).min(DRAIN_DEADLINE_MS_MAX));
            let mark = Mark {
                deadline: drain.deadline_at_ms.map(left),
                drained_at: (in_flight == 0).then_some(now.wall),
                ..Mark::new(since, in_flight)
            };
            self.drains.marks.insert(scope.clone(), mark);
            self.drains.revision += 1;
            changes.push(Change::Drain(DrainChange { scope: scope.clone(), what: DrainEvent::Restored }));
            self.drains_changed(scope, now, changes);
        }
    }

    /// A request ended: every drain that waited for it waits for one less.
    pub(super) fn request_ended(&mut self, lease: u64, now: Now, changes: &mut Vec<Change>) {
        let Some(request) = self.running.requests.remove(&lease) else { return };
        if self.drains.marks.is_empty() {
            return;
        }
        let mask = request.handoff.device_mask.as_deref();
        for scope in scopes_of(&request.key, mask) {
            let Some(mark) = self.drains.marks.get_mut(&scope) else { continue };
            mark.in_flight = mark.in_flight.saturating_sub(1);
            *(if request.is_cut { &mut mark.cut } else { &mut mark.finished }) += 1;
            self.drains.conclude(&scope, now, changes);
        }
    }

    /// Where there are too many drains, the oldest one of a replica or pool that no longer exists goes.
    fn make_room(&mut self, scope: &Scope) -> Result<(), TooManyDrains> {
        self.can_drain(scope)?;
        if self.drains.marks.len() >= DRAINS_MAX
            && let Some(vain) = self.oldest_vain_drain()
        {
            self.drains.marks.remove(&vain);
        }
        Ok(())
    }

    fn oldest_vain_drain(&self) -> Option<Scope> {
        let exists = |scope: &Scope| match scope {
            Scope::Pool { pool_id } => self.replicas.keys().any(|key| key.pool == *pool_id),
            Scope::Replica { pool_id, replica_id } => {
                let key = ReplicaKey { pool: pool_id.clone(), replica: replica_id.clone() };
                self.replicas.contains_key(&key)
            }
            Scope::Node | Scope::Gpu { .. } | Scope::Shutdown => true,
        };
        let vain = self.drains.marks.iter().filter(|(scope, mark)| mark.in_flight == 0 && !exists(scope));
        vain.min_by_key(|(_, mark)| mark.since.mono).map(|(scope, _)| scope.clone())
    }

    fn drains_changed(&mut self, scope: &Scope, now: Now, changes: &mut Vec<Change>) {
        // A heartbeat says of the node itself whether it drains, and a node may be empty.
        self.revision += u64::from(*scope == Scope::Node);
        self.apply_drains(now, changes);
    }

    /// The part of [`Registry::check_invariants`] that is about drains.
    pub(super) fn check_drains(&self) {
        assert!(self.drains.marks.len() <= DRAINS_MAX + 1, "drains are bounded");
        for (scope, mark) in &self.drains.marks {
            let running = self.running.within(scope).count();
            assert_eq!(mark.in_flight as usize, running, "{scope}: waits for what runs within it");
            assert_eq!(mark.in_flight == 0, mark.drained_at.is_some(), "{scope}: drained once nothing runs");
        }
        assert_eq!(self.running.requests.len(), self.in_flight() as usize, "every lease is known");
    }
}

impl Drains {
    /// Whether a replica may get no new work.
    pub(super) fn cover(&self, key: &ReplicaKey, mask: Option<&str>) -> bool {
        !self.marks.is_empty() && scopes_of(key, mask).any(|scope| self.marks.contains_key(&scope))
    }

    fn conclude(&mut self, scope: &Scope, now: Now, changes: &mut Vec<Change>) {
        let Some(mark) = self.marks.get_mut(scope) else { return };
        if mark.in_flight > 0 || mark.drained_at.is_some() {
            return;
        }
        mark.drained_at = Some(now.wall);
        let what = DrainEvent::Drained {
            took_ns: now.mono.ns_since(mark.since.mono),
            finished: mark.finished,
            cut: mark.cut,
        };
        changes.push(Change::Drain(DrainChange { scope: scope.clone(), what }));
    }
}

impl Mark {
    fn new(since: Now, in_flight: u32) -> Mark {
        Mark { since, deadline: None, is_cut: false, in_flight, finished: 0, cut: 0, drained_at: None }
    }

    /// When what runs is to be cut; `None` where nothing is to be.
    fn cut_at(&self) -> Option<Mono> {
        self.deadline.filter(|_| !self.is_cut && self.in_flight > 0).map(|at| at.mono)
    }

    fn status(&self, scope: &Scope) -> DrainStatus {
        DrainStatus {
            scope: scope.clone(),
            draining: true,
            since_ms: self.since.wall.unix_ms(),
            deadline_at_ms: self.deadline.map(|at| at.wall.unix_ms()),
            in_flight: self.in_flight,
            drained: self.drained_at.is_some(),
            drained_at_ms: self.drained_at.map(Wall::unix_ms),
            overdue: self.is_cut && self.in_flight > 0,
            finished: self.finished,
            cut: self.cut,
        }
    }
}

impl Running {
    /// Notes a request that got slots of a replica. Returns the lease's number.
    pub(super) fn begin(&mut self, key: &ReplicaKey, handoff: Arc<Handoff>) -> u64 {
        self.next_id += 1;
        self.requests.insert(self.next_id, Request { key: key.clone(), handoff, is_cut: false });
        self.next_id
    }

    fn within(&self, scope: &Scope) -> impl Iterator<Item = u64> {
        self.requests.iter().filter(|(_, request)| request.is_within(scope)).map(|(id, _)| *id)
    }

    fn within_mut(&mut self, scope: &Scope) -> impl Iterator<Item = (u64, &mut Request)> {
        let all = self.requests.iter_mut();
        all.filter(|(_, request)| request.is_within(scope)).map(|(id, request)| (*id, request))
    }
}

impl Request {
    fn is_within(&self, scope: &Scope) -> bool {
        scopes_of(&self.key, self.handoff.device_mask.as_deref()).any(|own| own == *scope)
    }
}

/// Every scope that covers a replica with this device mask, each once, the narrowest first.
fn scopes_of(key: &ReplicaKey, mask: Option<&str>) -> impl Iterator<Item = Scope> {
    let gpus = mask.map(gpu_indices).unwrap_or_default();
    let narrow = [Scope::replica(key), Scope::pool(&key.pool)];
    let gpus = gpus.into_iter().map(|index| Scope::Gpu { index });
    narrow.into_iter().chain(gpus).chain([Scope::Node, Scope::Shutdown])
}

/// The GPUs that a device mask names, each once, in order: `0`, `0,1`, `GPU0,GPU1`, `cuda:1`. What is no
/// index (a GPU's UUID, say) is left out.
#[must_use]
pub fn gpu_indices(mask: &str) -> Vec<u32> {
    let mut found: Vec<u32> = Vec::new();
    for word in mask.split([',', ';', ' ', '\t']).take(MASK_GPUS_MAX) {
        let word = word.trim().to_ascii_lowercase();
        let word = ["gpu", "cuda"].iter().find_map(|prefix| word.strip_prefix(prefix)).unwrap_or(&word);
        let digits = word.trim_start_matches([':', '-', '_', '=']);
        // `parse` would take a sign too.
        let index = digits.parse::<u32>().ok().filter(|_| digits.bytes().all(|b| b.is_ascii_digit()));
        if let Some(index) = index.filter(|index| !found.contains(index)) {
            found.push(index);
        }
    }
    found
}

impl DrainEvent {
    /// The event in one word: a state in the list of events, a label in the metrics.
    #[must_use]
    pub fn as_str(&self) -> &'static str {
        match self {
            DrainEvent::Began { .. } => "began",
            DrainEvent::Moved { .. } => "moved",
            DrainEvent::Restored => "restored",
            DrainEvent::Cut { .. } => "cut",
            DrainEvent::Drained { .. } => "drained",
            DrainEvent::Resumed { .. } => "resumed",
        }
    }
}

impl DrainChange {
    /// The change as an event.
    #[must_use]
    pub fn happening(&self) -> Happening {
        Happening {
            kind: "drain",
            subject: self.scope.to_string(),
            state: self.what.as_str(),
            text: self.to_string(),
            is_warning: matches!(self.what, DrainEvent::Cut { .. }),
        }
    }
}

impl fmt::Display for DrainChange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let limit =
            |ms: Option<u64>| ms.map_or_else(|| "no deadline".into(), |ms| format!("{ms} ms to finish"));
        write!(f, "{}: ", self.scope)?;
        match self.what {
            DrainEvent::Began { in_flight, deadline_ms } => {
                write!(f, "drain began: {in_flight} requests run, {}", limit(deadline_ms))
            }
            DrainEvent::Moved { deadline_ms } => write!(f, "drain goes on: {}", limit(deadline_ms)),
            DrainEvent::Restored => f.write_str("drain goes on: it began before this process"),
            DrainEvent::Cut { requests } => {
                write!(f, "the drain's deadline passed: {requests} requests are cut")
            }
            DrainEvent::Drained { took_ns, finished, cut } => {
                let ms = took_ns / 1_000_000;
                write!(f, "drained after {ms} ms: {finished} requests ended by themselves, {cut} were cut")
            }
            DrainEvent::Resumed { in_flight: 0 } => f.write_str("drain ended: it takes work again"),
            DrainEvent::Resumed { in_flight } => {
                write!(f, "drain ended with {in_flight} requests still running: it takes work again")
            }
        }
    }
}

#[cfg(test)]
mod tests;
