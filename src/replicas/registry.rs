//! The replicas of one machine: how they stand, and what runs on them.
//!
//! Input: the directory's full listing, requests for slots, drains, the time. Output: [`Change`]s
//! and leases. Which file announces a replica is decided in `directory.rs`, whether its engine
//! answers in `probing.rs`.
//!
//! What is known after a listing depends on that listing alone, with two exceptions on purpose: a
//! file that can no longer be read keeps what it said before, and a replica whose file vanished
//! stays until its last request ended.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::change::{Cause, Change, Refused, State};
use super::directory::{ADOPTED_MAX, Directory, Election, FileContent, Listing};
use super::drains::{Drains, Running};
use super::hang::{HANG_SUSPECT_MS, Hang};
use super::health::Health;
use super::policy::EnginePolicy;
use super::probing::{Outstanding, ProbeKind, Schedule};
use super::process::ProcessOrder;
use super::profile::Facts;
use crate::time::{Mono, Now, Wall};
use crate::wire::handoff::Handoff;
use crate::wire::id::ReplicaKey;

/// Slots that a request occupies until [`Registry::release`].
#[derive(Debug, PartialEq, Eq)]
#[must_use = "slots stay taken until the lease is released"]
pub struct ReplicaLease {
    /// The replica.
    pub key: ReplicaKey,
    /// Generation of the engine that serves the request.
    pub serial: u64,
    /// Its number: unique as long as this process runs.
    pub id: u64,
    /// Slots that it occupies there.
    pub slots: u32,
}

/// The replicas of one machine. See the file's text.
#[derive(Debug)]
pub struct Registry {
    pub(super) directory: Directory,
    pub(super) replicas: BTreeMap<ReplicaKey, Replica>,
    pub(super) drains: Drains,
    pub(super) running: Running,
    pub(super) schedule: Schedule,
    /// What the shell is to do about processes.
    pub(super) process_orders: Vec<ProcessOrder>,
    pub(super) hang_suspect_ms: u64,
    /// When [`Registry::due_probes`] was last called: what plans are told relative to.
    pub(super) clock: Now,
    /// Probes that were handed out at the time of the last ones.
    pub(super) batch: (Mono, usize),
    next_serial: u64,
    pub(super) next_seq: u64,
    /// Requests that run, on engines that were replaced meanwhile too.
    in_flight: u32,
    /// Of these, those on engines that were replaced.
    orphans: u32,
    pub(super) revision: u64,
}

#[derive(Debug)]
pub(super) struct Replica {
    pub(super) handoff: Arc<Handoff>,
    /// The file that announces it; `None` where its handoff was adopted.
    pub(super) file: Option<Arc<str>>,
    pub(super) serial: u64,
    /// Without regard to drains: [`State::Found`] to [`State::Suspect`].
    pub(super) phase: State,
    pub(super) reason: String,
    pub(super) since: Wall,
    drained: bool,
    /// Its process was not looked for yet: it is not asked before that.
    pub(super) awaits_process: bool,
    /// Its process was found, and its end has not been told.
    pub(super) process_lives: bool,
    /// What holds it out of use, and why, for people.
    pub(super) held: BTreeMap<Cause, String>,
    /// Why no file stands behind it any more.
    withdrawn: Option<String>,
    /// What the engine itself told since it came up.
    pub(super) facts: Facts,
    /// So many of its profile's questions were asked since it came up.
    pub(super) asked: usize,
    /// Why the engine did not answer a question to somebody without its key.
    pub(super) wants_key: Option<String>,
    /// It has no health path, and its list of models stands in for it.
    pub(super) health_is_models: bool,
    pub(super) hang: Hang,
    pub(super) health: Health,
    pub(super) next_kind: ProbeKind,
    pub(super) probe: Option<Outstanding>,
    pub(super) due_at: Option<Mono>,
    pub(super) ordered_at: Option<Mono>,
    pub(super) leases: u32,
    pub(super) slots_used: u32,
}

impl Registry {
    /// An empty registry. Generations count up from `first_serial`, which must grow from start to
    /// start (the wall clock in milliseconds does).
    #[must_use]
    pub fn new(policy: EnginePolicy, first_serial: u64) -> Registry {
        Registry {
            directory: Directory::new(policy),
            replicas: BTreeMap::new(),
            drains: Drains::default(),
            running: Running::default(),
            schedule: Schedule::default(),
            process_orders: Vec::new(),
            hang_suspect_ms: HANG_SUSPECT_MS,
            clock: Now { mono: Mono(0), wall: Wall(0) },
            batch: (Mono(0), 0),
            next_serial: first_serial.max(1),
            next_seq: 1,
            in_flight: 0,
            orphans: 0,
            revision: 0,
        }
    }

    /// Takes what was found in the directory.
    pub fn listing(&mut self, listing: &Listing, now: Now, changes: &mut Vec<Change>) {
        let elections = self.directory.listing(listing, changes);
        self.elected(elections, now, changes);
    }

    /// Lets a handoff stand without a file, as if a file were there that nobody can remove.
    ///
    /// # Errors
    /// Why it is refused: an engine URL that is not allowed here.
    pub fn adopt(
        &mut self,
        handoff: Arc<Handoff>,
        now: Now,
        changes: &mut Vec<Change>,
    ) -> Result<(), String> {
        self.may_adopt(&handoff)?;
        let elections = self.directory.adopt(&handoff.key(), Some(handoff), changes);
        self.elected(elections, now, changes);
        Ok(())
    }

    /// Whether [`Registry::adopt`] would take a handoff.
    ///
    /// # Errors
    /// Why not.
    pub fn may_adopt(&self, handoff: &Handoff) -> Result<(), String> {
        self.directory.check_policy(handoff)?;
        if self.directory.adopted(&handoff.key()).is_none() && self.directory.adopted_count() >= ADOPTED_MAX {
            return Err(format!("at most {ADOPTED_MAX} handoffs can stand without a file"));
        }
        Ok(())
    }

    /// The file that announces a replica.
    #[must_use]
    pub fn file_of(&self, key: &ReplicaKey) -> Option<&str> {
        self.replicas.get(key)?.file.as_deref()
    }

    /// Ends [`Registry::adopt`]; a file, if there is one, goes on speaking for the replica. False where
    /// nothing was adopted.
    pub fn abandon(&mut self, key: &ReplicaKey, now: Now, changes: &mut Vec<Change>) -> bool {
        let was = self.directory.adopted(key).is_some();
        let elections = self.directory.adopt(key, None, changes);
        self.elected(elections, now, changes);
        was
    }

    /// The handoff of a replica that stands without a file.
    #[must_use]
    pub fn adopted(&self, key: &ReplicaKey) -> Option<&Arc<Handoff>> {
        self.directory.adopted(key)
    }

    /// Every handoff that stands without a file.
    #[must_use]
    pub fn all_adopted(&self) -> Vec<Arc<Handoff>> {
        self.directory.all_adopted()
    }

    /// Grows with every change of [`Registry::all_adopted`].
    #[must_use]
    pub fn adopted_revision(&self) -> u64 {
        self.directory.adopted_revision()
    }

    /// Files whose handoffs are adopted word for word, by name, as they were listed: nothing is lost with
    /// them.
    pub fn redundant_files(&self) -> impl Iterator<Item = (&Arc<str>, &Arc<FileContent>)> {
        self.directory.redundant()
    }

    /// Lets the handoffs behind `keys` stand without their files.
    pub fn adopt_announced(&mut self, keys: &BTreeSet<ReplicaKey>, now: Now, changes: &mut Vec<Change>) {
        for key in keys {
            if let Some(replica) = self.replicas.get(key).filter(|replica| replica.file.is_some()) {
                // It was allowed as a file. Beyond the limit it stays one.
                let _ = self.adopt(replica.handoff.clone(), now, changes);
            }
        }
    }

    fn elected(&mut self, elections: Vec<(ReplicaKey, Election)>, now: Now, changes: &mut Vec<Change>) {
        for (key, election) in elections {
            match election {
                Ok((handoff, file)) => self.announce_handoff(&key, handoff, file, now, changes),
                Err(why) => self.withdraw(&key, why, now, changes),
            }
        }
    }

    /// Takes slots of a replica for one request. `generation`: the engine that the caller means, where
    /// it knows. A request that wants more slots than the replica has takes all of them.
    ///
    /// # Errors
    /// [`Refused`], with what a client can be told.
    pub fn acquire(
        &mut self,
        key: &ReplicaKey,
        generation: Option<u64>,
        slots: u32,
    ) -> Result<ReplicaLease, Refused> {
        let replica = self.replicas.get_mut(key).ok_or_else(|| Refused::absent(generation))?;
        if generation.is_some_and(|generation| generation != replica.serial) {
            return Err(Refused::StaleGeneration { current: Some(replica.serial) });
        }
        match replica.state() {
            State::Ready => {}
            State::Draining => return Err(Refused::Draining),
            State::Found | State::Probing | State::Suspect | State::Broken => {
                return Err(Refused::NotReady { reason: replica.reason().to_string() });
            }
        }
        let slots = slots.clamp(1, replica.slots());
        if slots > replica.slots_free() {
            return Err(Refused::Full { slots: replica.slots() });
        }
        replica.slots_used += slots;
        replica.leases += 1;
        self.in_flight += 1;
        let id = self.running.begin(key, replica.handoff.clone());
        Ok(ReplicaLease { key: key.clone(), serial: replica.serial, id, slots })
    }

    /// Gives a request's slots back.
    pub fn release(&mut self, lease: ReplicaLease, now: Now, changes: &mut Vec<Change>) {
        self.in_flight = self.in_flight.saturating_sub(1);
        self.request_ended(lease.id, now, changes);
        match self.replicas.get_mut(&lease.key).filter(|replica| replica.serial == lease.serial) {
            Some(replica) => {
                replica.slots_used = replica.slots_used.saturating_sub(lease.slots);
                replica.leases = replica.leases.saturating_sub(1);
                self.forget_if_done(&lease.key, changes);
            }
            None => self.orphans = self.orphans.saturating_sub(1),
        }
    }

    /// Requests that run, those on engines that were replaced meanwhile included.
    #[must_use]
    pub fn in_flight(&self) -> u32 {
        self.in_flight
    }

    /// Holds a replica out of use until [`Registry::let_go`] is called for the same cause or another
    /// engine stands behind the name. `generation`: the engine that is meant.
    pub fn hold(
        &mut self,
        key: &ReplicaKey,
        generation: u64,
        cause: Cause,
        reason: String,
        now: Now,
        changes: &mut Vec<Change>,
    ) {
        let Some(replica) = self.replicas.get_mut(key).filter(|replica| replica.serial == generation) else {
            return;
        };
        if replica.held.get(&cause) == Some(&reason) {
            return;
        }
        let before = (replica.state(), replica.reason().to_string());
        replica.held.insert(cause, reason);
        self.held_changed(key, before, now, changes);
    }

    /// Ends a hold. Nothing happens where there was none.
    pub fn let_go(
        &mut self,
        key: &ReplicaKey,
        generation: u64,
        cause: Cause,
        now: Now,
        changes: &mut Vec<Change>,
    ) {
        let Some(replica) = self.replicas.get_mut(key).filter(|replica| replica.serial == generation) else {
            return;
        };
        let before = (replica.state(), replica.reason().to_string());
        if replica.held.remove(&cause).is_some() {
            self.held_changed(key, before, now, changes);
        }
    }

    fn held_changed(
        &mut self,
        key: &ReplicaKey,
        (state, reason): (State, String),
        now: Now,
        changes: &mut Vec<Change>,
    ) {
        self.schedule_again(key);
        self.revision += 1;
        let Some(replica) = self.replicas.get_mut(key) else { return };
        if replica.state() == state && replica.reason() != reason {
            changes.push(Change::Reason { key: key.clone(), state, reason: replica.reason().to_string() });
        }
        self.announce(key, state, now, changes);
    }

    /// Grows with every change that a heartbeat must carry at once. Slots that come and go with
    /// requests are no such change: whoever places requests counts them itself.
    #[must_use]
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// How many replicas are known.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "nobody asks whether there are none")]
    pub fn len(&self) -> usize {
        self.replicas.len()
    }

    /// The handoff on which a replica runs.
    #[must_use]
    pub fn handoff(&self, key: &ReplicaKey) -> Option<&Handoff> {
        self.replicas.get(key).map(|replica| &*replica.handoff)
    }

    fn announce_handoff(
        &mut self,
        key: &ReplicaKey,
        handoff: Arc<Handoff>,
        file: Option<Arc<str>>,
        now: Now,
        changes: &mut Vec<Change>,
    ) {
        let drained = self.drains.cover(key, handoff.device_mask.as_deref());
        let Some(replica) = self.replicas.get_mut(key) else {
            changes.push(Change::Found { key: key.clone(), file: file.clone() });
            let mut replica = Replica::found(handoff, file, self.next_serial, now);
            self.next_serial += 1;
            self.revision += 1;
            replica.drained = drained;
            replica.start(now.mono);
            self.replicas.insert(key.clone(), replica);
            self.order_process(key);
            self.schedule_again(key);
            self.announce(key, State::Found, now, changes);
            return;
        };
        replica.file = file;
        if replica.handoff == handoff && replica.withdrawn.is_none() {
            return;
        }
        let before = replica.state();
        let returns = replica.withdrawn.take().is_some();
        let old = std::mem::replace(&mut replica.handoff, handoff);
        replica.drained = drained;
        if !is_same_engine(&old, &replica.handoff) {
            self.orphans += replica.leases;
            let mut successor =
                Replica::found(replica.handoff.clone(), replica.file.clone(), self.next_serial, now);
            self.next_serial += 1;
            successor.drained = drained;
            changes.push(Change::Replaced {
                key: key.clone(),
                file: replica.file.clone(),
                generation: successor.serial,
            });
            self.schedule.cancel(key, replica);
            *replica = successor;
            replica.start(now.mono);
            self.forget_process(key);
            self.order_process(key);
        } else {
            if old != replica.handoff {
                changes.push(Change::Updated { key: key.clone(), file: replica.file.clone() });
            }
            if returns {
                self.order_process(key);
            }
            let Some(replica) = self.replicas.get_mut(key) else { return };
            if returns || old.ready != replica.handoff.ready || old.health_path != replica.handoff.health_path
            {
                self.schedule.cancel(key, replica);
                replica.start(now.mono);
            }
        }
        self.revision += 1;
        self.schedule_again(key);
        self.announce(key, before, now, changes);
    }

    /// Schedules the next probe, where one is wanted and none is under way.
    pub(super) fn schedule_again(&mut self, key: &ReplicaKey) {
        let Some(replica) = self.replicas.get_mut(key) else { return };
        if !replica.is_probed() {
            self.schedule.cancel(key, replica);
        } else if replica.probe.is_none() {
            self.schedule.reset(key, replica);
        }
    }

    fn withdraw(&mut self, key: &ReplicaKey, why: &str, now: Now, changes: &mut Vec<Change>) {
        let Some(replica) = self.replicas.get_mut(key).filter(|replica| replica.withdrawn.is_none()) else {
            return;
        };
        let before = replica.state();
        self.schedule.cancel(key, replica);
        replica.withdrawn = Some(why.to_string());
        let is_busy = replica.leases > 0;
        self.revision += 1;
        self.forget_process(key);
        if is_busy {
            self.announce(key, before, now, changes);
        }
        self.forget_if_done(key, changes);
    }

    /// Removes a withdrawn replica on which nothing runs any more.
    fn forget_if_done(&mut self, key: &ReplicaKey, changes: &mut Vec<Change>) {
        let Some(replica) = self.replicas.get(key).filter(|replica| replica.leases == 0) else { return };
        let Some(reason) = replica.withdrawn.clone() else { return };
        self.replicas.remove(key);
        self.revision += 1;
        changes.push(Change::Gone { key: key.clone(), reason });
    }

    fn is_drained(&self, key: &ReplicaKey, replica: &Replica) -> bool {
        self.drains.cover(key, replica.handoff.device_mask.as_deref())
    }

    pub(super) fn apply_drains(&mut self, now: Now, changes: &mut Vec<Change>) {
        let moved: Vec<ReplicaKey> = self
            .replicas
            .iter()
            .filter(|(key, replica)| replica.drained != self.is_drained(key, replica))
            .map(|(key, _)| key.clone())
            .collect();
        for key in moved {
            let Some(replica) = self.replicas.get_mut(&key) else { continue };
            let before = replica.state();
            replica.drained = !replica.drained;
            self.revision += 1;
            self.announce(&key, before, now, changes);
        }
    }

    /// Reports a replica's state if it differs from `before`.
    pub(super) fn announce(&mut self, key: &ReplicaKey, before: State, now: Now, changes: &mut Vec<Change>) {
        let Some(replica) = self.replicas.get_mut(key) else { return };
        let to = replica.state();
        if to != before {
            replica.since = now.wall;
            self.revision += 1;
            let reason = replica.reason().to_string();
            changes.push(Change::State { key: key.clone(), from: before, to, reason });
        }
    }

    /// Holds the parts against each other; tests call it after every step.
    ///
    /// # Panics
    /// When they contradict each other, which is a mistake in this room.
    pub fn check_invariants(&self) {
        self.directory.check_invariants();
        self.check_drains();
        let mut leases = self.orphans;
        let (mut due, mut lost) = (0, 0);
        for (key, replica) in &self.replicas {
            leases += replica.leases;
            assert!(replica.slots_used >= replica.leases, "{key}: a request takes at least one slot");
            assert_eq!(replica.drained, self.is_drained(key, replica), "{key}: drain marks are applied");
            assert_eq!(
                replica.withdrawn.is_none(),
                self.directory.announces(key),
                "{key}: stands behind a file"
            );
            assert!(replica.withdrawn.is_none() || replica.leases > 0, "{key}: is gone once nothing runs");
            assert!(replica.phase != State::Ready || replica.handoff.ready, "{key}: ready though not to be");
            assert!(replica.serial < self.next_serial, "{key}: generations are not used twice");
            assert_eq!(
                replica.is_probed(),
                replica.due_at.is_some() || replica.probe.is_some(),
                "{key}: is asked again"
            );
            assert!(replica.due_at.is_none() || replica.probe.is_none(), "{key}: one probe at a time");
            due += usize::from(replica.due_at.is_some());
            lost += usize::from(replica.probe.is_some());
            assert!(self.schedule.holds(key, replica), "{key}: is scheduled");
        }
        assert_eq!(leases, self.in_flight, "every lease is counted once");
        assert_eq!((due, lost), self.schedule.counts(), "nothing is scheduled for others");
        for key in self.directory.announced() {
            assert!(self.replicas.contains_key(&key), "{key}: announced and known");
        }
    }
}

impl Replica {
    fn found(handoff: Arc<Handoff>, file: Option<Arc<str>>, serial: u64, now: Now) -> Replica {
        Replica {
            handoff,
            file,
            serial,
            phase: State::Found,
            reason: "announced".into(),
            since: now.wall,
            drained: false,
            awaits_process: false,
            process_lives: false,
            held: BTreeMap::new(),
            withdrawn: None,
            facts: Facts::default(),
            asked: 0,
            wants_key: None,
            health_is_models: false,
            hang: Hang::default(),
            health: Health::starting(now.mono),
            next_kind: ProbeKind::Health,
            probe: None,
            due_at: None,
            ordered_at: None,
            leases: 0,
            slots_used: 0,
        }
    }

    /// Begins its life, or begins it again. What runs on it goes on.
    fn start(&mut self, now: Mono) {
        self.health = Health::starting(now);
        self.next_kind = ProbeKind::Health;
        self.held.remove(&Cause::Start);
        if self.handoff.ready {
            self.enter(State::Probing, "waiting for its first answer".into());
        } else {
            self.enter(State::Found, "the handoff says ready: false".into());
        }
    }

    pub(super) fn enter(&mut self, phase: State, reason: String) {
        self.phase = phase;
        self.reason = reason;
    }

    pub(super) fn state(&self) -> State {
        if self.drained || self.withdrawn.is_some() {
            State::Draining
        } else if !self.held.is_empty() {
            State::Broken
        } else {
            self.phase
        }
    }

    pub(super) fn reason(&self) -> &str {
        match &self.withdrawn {
            Some(why) => why,
            None if self.drained => "drained on request",
            None => self.held.values().next().unwrap_or(&self.reason),
        }
    }

    /// Whether its engine is to be asked how it is.
    pub(super) fn is_probed(&self) -> bool {
        self.handoff.ready
            && self.withdrawn.is_none()
            && !self.awaits_process
            && !self.held.contains_key(&Cause::Process)
    }

    pub(super) fn is_withdrawn(&self) -> bool {
        self.withdrawn.is_some()
    }

    /// Requests that it serves at once: what its file says, but no more than what it says itself.
    pub(super) fn slots(&self) -> u32 {
        match self.facts.slots {
            Some(own) if self.handoff.slots_given => own.min(self.handoff.slots),
            Some(own) => own,
            None => self.handoff.slots,
        }
    }

    pub(super) fn slots_free(&self) -> u32 {
        self.slots().saturating_sub(self.slots_used)
    }

    /// What it serves; empty where nobody knows.
    pub(super) fn models(&self) -> &[String] {
        if self.handoff.models.is_empty() { &self.facts.models } else { &self.handoff.models }
    }
}

/// Whether two handoffs of one replica mean the same process.
fn is_same_engine(a: &Handoff, b: &Handoff) -> bool {
    (&a.url, a.pid, a.pid_start, &a.boot_id, a.generation, &a.engine, &a.engine_version)
        == (&b.url, b.pid, b.pid_start, &b.boot_id, b.generation, &b.engine, &b.engine_version)
}
