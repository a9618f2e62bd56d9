//! The node agent's decisions. Pure: inputs and the time in, effects out.
//!
//! ```text
//!   Listing, Probed ──▶ replicas ──revision──▶ planes ──▶ Effect::Call (register, heartbeat)
//!   Relay asks a slot ─▶ replicas                 ▲
//!   Gpu ──▶ gpus ──hold, let go──▶ replicas       │
//!   Shutdown ──▶ drain ──▶ leave ──▶ Effect::Exit │ Told
//! ```
//!
//! Every change of a replica that a control plane must know raises the registry's revision; every
//! plane is shown the revision after every input, and sends what is new at once.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::replicas::hang::HANG_SUSPECT_MS;
use crate::replicas::{
    Activity, Cause, Change, EnginePolicy, Fault, FileContent, Listing, PoolCounts, ProbeId, ProbeOrder,
    ProbeOutcome, ProcessOrder, ProcessSeen, Refused, Registry, ReplicaLease, Trouble,
};
use crate::service::events::{Events, Happening, Tell};
use crate::time::{Mono, Now, earliest};
use crate::wire::drain::{DrainStatus, Scope};
use crate::wire::handoff::Handoff;
use crate::wire::id::{NodeId, PoolId, ReplicaKey};
use crate::wire::node::{Capabilities, Heartbeat, PoolBeat, RegisterRequest};
use crate::wire::pool::PoolStatus;
use crate::wire::preparation::PoolPreparation;
use crate::wire::url::BaseUrl;

use super::callbacks::{Delivery, Notifier};
use super::gpus::{Engine, GpuId, Gpus, Report};
use super::membership::{Answer, Call, Note, Order, Plane, PlaneState};
use super::operations::DrainTally;
use super::saved::{Keeper, Saved};
use preparing::Preparing;

mod operations;
mod preparing;
#[cfg(test)]
mod tests;

/// Files that are deleted at once: a few milliseconds, for which nothing else is done.
const DELETES_MAX: usize = 32;

/// What the agent is told at start.
#[derive(Debug)]
pub struct Identity {
    /// This node.
    pub node_id: NodeId,
    /// This machine.
    pub machine_id: String,
    /// Where control planes reach this agent; `None` in the HOME profile.
    pub address: Option<BaseUrl>,
    /// Pools that are announced in any case.
    pub pools: Vec<PoolId>,
    /// What the machine has.
    pub capabilities: Capabilities,
    /// Grows with every start.
    pub incarnation: u64,
    /// The kernel's boot id.
    pub boot_id: Option<String>,
}

/// How the agent behaves.
#[derive(Clone, Debug)]
pub struct Options {
    /// Every control plane; none in the HOME profile.
    pub control_planes: Vec<BaseUrl>,
    /// Between heartbeats, where a control plane does not say.
    pub heartbeat_interval_ms: u64,
    /// How long running requests may take to finish at shutdown.
    pub drain_timeout_ms: u64,
    /// Delete handoff files once they are accepted and saved.
    pub auto_delete: bool,
    /// How long all answers of an engine may stand still before it is suspected.
    pub hang_suspect_ms: u64,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            control_planes: Vec::new(),
            heartbeat_interval_ms: 10_000,
            drain_timeout_ms: 30_000,
            auto_delete: false,
            hang_suspect_ms: HANG_SUSPECT_MS,
        }
    }
}

/// What happened.
#[derive(Debug)]
pub enum Input {
    /// What was found in the runtime directory.
    Listing(Listing),
    /// What an earlier start of this agent saved.
    Restore(Saved),
    /// A handoff was handed over without a file.
    Adopt(Box<Handoff>),
    /// A handoff without a file is taken back.
    Abandon(ReplicaKey),
    /// The last [`Effect::Save`] ended, with the reason if it failed.
    Saved(Result<(), String>),
    /// Something is wrong with the runtime directory, or no longer is.
    WatchTrouble(Option<Trouble>),
    /// What was seen of the process of a replica's generation.
    Process(ReplicaKey, u64, ProcessSeen),
    /// What the requests on a replica's generation have been doing.
    Active {
        /// The replica.
        key: ReplicaKey,
        /// Its generation.
        generation: u64,
        /// What they have been doing.
        activity: Activity,
    },
    /// A probe ended.
    Probed(ProbeId, ProbeOutcome),
    /// A control plane answered a call.
    Told {
        /// Which one, by its place in the configuration.
        plane: usize,
        /// The call.
        call: Call,
        /// The answer.
        answer: Answer,
    },
    /// A relayed request ended.
    Relayed {
        /// Its slots.
        lease: ReplicaLease,
        /// Whether the engine answered; the fault and its reason if it did not.
        fault: Option<(Fault, String)>,
    },
    /// A pool is said to be ready: its engines are asked at once.
    Ask(PoolId),
    /// What provisioners prepare, as a whole.
    Preparing(Vec<PoolPreparation>),
    /// Something about the GPUs.
    Gpu(Report),
    /// A GPU is sound, an operator says.
    ClearGpu(GpuId),
    /// A relayed request was cut, as [`Effect::Cut`] asked.
    RelayCut(ReplicaLease),
    /// No new work for a scope; what still runs after so many milliseconds is cut.
    Drain(Scope, Option<u64>),
    /// Work again for a scope.
    Resume(Scope),
    /// A notice reached a callback or did not: the callback, the event, and the reason.
    Delivered(u64, u64, Result<(), String>),
    /// End gracefully.
    Shutdown,
    /// The deadline has passed.
    Tick,
}

/// What to do about it.
#[derive(Debug, PartialEq, Eq)]
pub enum Effect {
    /// Watch a process, or forget it.
    Process(ProcessOrder),
    /// Send a probe.
    Probe(ProbeOrder),
    /// Call a control plane.
    Call {
        /// Which one.
        plane: usize,
        /// The call and its limit.
        order: Order,
        /// Its body.
        body: CallBody,
    },
    /// Write the state file.
    Save(String),
    /// Delete a handoff file, unless it says something else by now.
    DeleteFile(Arc<str>, Arc<FileContent>),
    /// End the relayed requests with these leases: a drain's deadline has passed.
    Cut(Vec<u64>),
    /// POST a notice to a callback.
    Deliver(Box<Delivery>),
    /// Tell the log.
    Log(Arc<dyn Tell>),
    /// Everything has been finished or given up: end the process.
    Exit,
}

/// The body of a call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CallBody {
    /// `POST /v2/nodes/register`
    Register(Box<RegisterRequest>),
    /// `POST /v2/nodes/{id}/heartbeat`
    Heartbeat(Box<Heartbeat>),
    /// `DELETE /v2/nodes/{id}?incarnation=N`
    Deregister {
        /// So that a late deregistration cannot remove a successor.
        incarnation: u64,
    },
}

/// The node agent's state.
#[derive(Debug)]
pub struct Core {
    identity: Identity,
    replicas: Registry,
    gpus: Gpus,
    /// Revisions of the replicas and the GPUs when they were last held against each other.
    bound: Option<u64>,
    planes: Vec<Plane>,
    events: Events,
    keeper: Keeper,
    auto_delete: bool,
    listed: bool,
    watch_trouble: Option<Trouble>,
    drain_timeout_ms: u64,
    shutdown: Shutdown,
    random: fastrand::Rng,
    counts: Counts,
    drain_tally: DrainTally,
    notifier: Notifier,
    preparing: Preparing,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shutdown {
    No,
    /// Running requests may finish until then.
    Draining {
        until: Mono,
    },
    Leaving,
    Done,
}

/// Counters for the metrics.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counts {
    /// Listings taken.
    pub listings: u64,
    /// Files that could not be used, once per change.
    pub files_refused: u64,
    /// Probes sent.
    pub probes: u64,
    /// Heartbeats confirmed.
    pub heartbeats_ok: u64,
    /// Calls to control planes that failed.
    pub calls_failed: u64,
    /// Relayed requests.
    pub relayed: u64,
    /// Relayed requests whose engine failed.
    pub relayed_failed: u64,
    /// Requests that got no slot.
    pub relay_refused: u64,
    /// Relayed requests that were cut by a drain's deadline.
    pub relayed_cut: u64,
}

impl Core {
    /// A core that knows no replica. `seed` decides the jitter.
    #[must_use]
    pub fn new(identity: Identity, policy: EnginePolicy, options: &Options, seed: u64, now: Now) -> Core {
        let interval_ms = options.heartbeat_interval_ms;
        let planes = options.control_planes.iter().map(|url| Plane::new(url.clone(), interval_ms, now));
        let mut replicas = Registry::new(policy, now.wall.unix_ms());
        replicas.set_hang_limit(options.hang_suspect_ms);
        Core {
            replicas,
            gpus: Gpus::new(now),
            bound: None,
            planes: planes.collect(),
            identity,
            events: Events::default(),
            keeper: Keeper::new(0),
            auto_delete: options.auto_delete,
            listed: false,
            watch_trouble: None,
            drain_timeout_ms: options.drain_timeout_ms,
            shutdown: Shutdown::No,
            random: fastrand::Rng::with_seed(seed),
            counts: Counts::default(),
            drain_tally: DrainTally::default(),
            notifier: Notifier::default(),
            preparing: Preparing::default(),
        }
    }

    /// Takes one input and appends what it leads to.
    pub fn handle(&mut self, input: Input, now: Now, effects: &mut Vec<Effect>) {
        let mut changes = Vec::new();
        let mut happenings = Vec::new();
        match input {
            Input::Listing(listing) => {
                self.listed |= listing.completes;
                self.counts.listings += u64::from(listing.completes);
                self.replicas.listing(&listing, now, &mut changes);
                if self.auto_delete {
                    let keys = changes.iter().filter_map(Change::announced).cloned().collect();
                    self.replicas.adopt_announced(&keys, now, &mut changes);
                    self.delete_redundant(effects);
                }
            }
            Input::Restore(saved) => self.restore(&saved, now, &mut changes, effects),
            Input::Adopt(handoff) => {
                // Whoever hands it over was told already if it may not be.
                let _ = self.replicas.adopt(Arc::from(handoff), now, &mut changes);
            }
            Input::Abandon(key) => {
                self.replicas.abandon(&key, now, &mut changes);
            }
            Input::Saved(result) => self.saved(result, now, effects),
            Input::WatchTrouble(trouble) => self.note_watch(trouble, now, effects),
            Input::Process(key, generation, seen) => {
                self.replicas.process_seen(&key, generation, seen, now, &mut changes);
            }
            Input::Active { key, generation, activity } => {
                self.replicas.active(&key, generation, activity, now, &mut changes);
            }
            Input::Probed(id, outcome) => self.replicas.probed(&id, outcome, now, &mut changes),
            Input::Told { plane, call, answer } => self.told(plane, call, answer, now, effects),
            Input::Relayed { lease, fault } => self.relayed(lease, fault, now, &mut changes),
            Input::Ask(pool) => self.replicas.ask_pool(&pool, now),
            Input::RelayCut(lease) => {
                self.counts.relayed_cut += 1;
                self.replicas.release(lease, now, &mut changes);
            }
            Input::Drain(scope, deadline_ms) => {
                // Who asks is told before if there are too many.
                let _ = self.replicas.drain(&scope, deadline_ms, now, &mut changes);
            }
            Input::Resume(scope) => {
                self.replicas.resume(&scope, now, &mut changes);
            }
            Input::Delivered(callback, event, outcome) => {
                self.delivered((callback, event, outcome), now, effects);
            }
            Input::Preparing(pools) => self.preparing.set(pools),
            Input::Gpu(report) => self.gpus.report(report, now, &mut happenings),
            Input::ClearGpu(gpu) => self.gpus.clear(gpu, now, &mut happenings),
            Input::Shutdown => self.begin_shutdown(now, &mut changes),
            Input::Tick if self.shutdown == Shutdown::No => self.gpus.tick(now, &mut happenings),
            Input::Tick => {}
        }
        let cut = self.replicas.expire_drains(now, &mut changes);
        if !cut.is_empty() {
            effects.push(Effect::Cut(cut));
        }
        self.bind_gpus(now, &mut changes, &mut happenings);
        for happening in happenings {
            self.happened(happening, now, effects);
        }
        for change in changes {
            self.announce(change, now, effects);
        }
        self.proceed(now, effects);
    }

    /// When [`Input::Tick`] is wanted next.
    #[must_use]
    pub fn deadline(&self) -> Option<Mono> {
        let planes = self.planes.iter().fold(None, |at, plane| earliest(at, plane.deadline()));
        let drained = match self.shutdown {
            Shutdown::Draining { until } => Some(until),
            _ => None,
        };
        // As long as anybody is watched: a deadline that nothing meets would make the loop spin.
        let watched = earliest(self.replicas.deadline(), self.gpus.deadline());
        let watched = watched.filter(|_| self.shutdown == Shutdown::No);
        let own = earliest(self.replicas.drain_deadline(), self.notifier.deadline());
        earliest(earliest(earliest(planes, drained), watched), earliest(own, self.keeper.deadline()))
    }

    /// Takes slots of a replica for a request to be relayed.
    ///
    /// # Errors
    /// [`Refused`].
    pub fn acquire(
        &mut self,
        key: &ReplicaKey,
        generation: Option<u64>,
        slots: u32,
    ) -> Result<(ReplicaLease, BaseUrl, Option<String>), Refused> {
        let handoff = self.replicas.handoff(key).map(|known| (known.url.clone(), known.auth_file.clone()));
        let Some((url, auth_file)) = handoff else {
            self.counts.relay_refused += 1;
            return Err(Refused::absent(generation));
        };
        let taken = self.replicas.acquire(key, generation, slots);
        self.counts.relay_refused += u64::from(taken.is_err());
        taken.map(|lease| (lease, url, auth_file))
    }

    /// The node's name.
    #[must_use]
    pub fn node_id(&self) -> &NodeId {
        &self.identity.node_id
    }

    /// Which start of the agent this is.
    #[must_use]
    pub fn incarnation(&self) -> u64 {
        self.identity.incarnation
    }

    /// A pool; a configured one without replicas is known and not ready.
    #[must_use]
    pub fn pool_status(&self, pool: &PoolId) -> Option<PoolStatus> {
        let is_expected = self.preparing.has(pool) || self.identity.pools.contains(pool);
        let expected = || is_expected.then(|| self.empty_pool(pool));
        self.replicas.pool_status(pool).map(|status| self.with_memory(status)).or_else(expected)
    }

    /// Every pool, configured ones without replicas included.
    #[must_use]
    pub fn pools(&self) -> Vec<PoolStatus> {
        let mut pools: Vec<PoolStatus> =
            self.replicas.pools().into_iter().map(|status| self.with_memory(status)).collect();
        for pool in self.expected_pools() {
            if !pools.iter().any(|known| known.pool_id == *pool) {
                pools.push(self.empty_pool(pool));
            }
        }
        pools.sort_by(|a, b| a.pool_id.cmp(&b.pool_id));
        pools
    }

    /// The numbers of every pool, configured ones without replicas included.
    #[must_use]
    pub fn pool_counts(&self) -> BTreeMap<PoolId, PoolCounts> {
        let expected = self.expected_pools().map(|pool| (pool.clone(), PoolCounts::default()));
        let found = self.replicas.pool_counts().into_iter().map(|(pool, counts)| (pool.clone(), counts));
        expected.chain(found).collect()
    }

    /// The replicas of this machine.
    #[must_use]
    pub fn replicas(&self) -> &Registry {
        &self.replicas
    }

    /// The GPUs of this machine.
    #[must_use]
    pub fn gpus(&self) -> &Gpus {
        &self.gpus
    }

    /// Membership of every control plane.
    #[must_use]
    pub fn planes(&self) -> &[Plane] {
        &self.planes
    }

    /// The last state changes.
    #[must_use]
    pub fn events(&self) -> &Events {
        &self.events
    }

    /// Counters for the metrics.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// What drains did so far.
    #[must_use]
    pub fn drain_tally(&self) -> &DrainTally {
        &self.drain_tally
    }

    /// Relayed requests that run.
    #[must_use]
    pub fn in_flight(&self) -> u32 {
        self.replicas.in_flight()
    }

    /// Whether [`Input::Shutdown`] was given.
    #[must_use]
    pub fn is_shutting_down(&self) -> bool {
        self.shutdown != Shutdown::No
    }

    /// Whether the agent does its job: `Err` says why not.
    ///
    /// # Errors
    /// The first reason.
    pub fn ready(&self) -> Result<(), String> {
        if self.shutdown != Shutdown::No {
            return Err("shutting down".into());
        }
        if let Some(trouble) = self.watch_trouble.as_ref().filter(|trouble| trouble.is_blind) {
            return Err(trouble.text.clone());
        }
        if !self.listed {
            return Err("the runtime directory has not been listed yet".into());
        }
        let member = |plane: &Plane| matches!(plane.state(), PlaneState::Registered { .. });
        if !self.planes.is_empty() && !self.planes.iter().any(member) {
            return Err(format!("registered with no control plane: {}", self.planes[0].reason()));
        }
        Ok(())
    }

    /// Panics where the state contradicts itself. For tests and simulations.
    pub fn check_invariants(&self) {
        self.replicas.check_invariants();
    }

    fn told(&mut self, plane: usize, call: Call, answer: Answer, now: Now, effects: &mut Vec<Effect>) {
        let Some(plane) = self.planes.get_mut(plane) else { return };
        match (&call, &answer) {
            (Call::Heartbeat { .. }, Answer::Ok { .. }) => self.counts.heartbeats_ok += 1,
            (_, Answer::Ok { .. }) => {}
            _ => self.counts.calls_failed += 1,
        }
        let mut notes: Vec<Note> = Vec::new();
        let random = &mut self.random;
        plane.answered(call, answer, now, &mut |n| random.u64(0..n.max(1)), &mut notes);
        let (subject, state) = (plane.url().to_string(), plane.state().as_str());
        for note in notes {
            let happening = Happening {
                kind: "membership",
                subject: subject.clone(),
                state,
                text: note.text,
                is_warning: note.is_warning,
            };
            self.happened(happening, now, effects);
        }
    }

    fn relayed(
        &mut self,
        lease: ReplicaLease,
        fault: Option<(Fault, String)>,
        now: Now,
        changes: &mut Vec<Change>,
    ) {
        self.counts.relayed += 1;
        match fault {
            None => self.replicas.data_path_worked(&lease.key, lease.serial, now),
            Some((fault, reason)) => {
                self.counts.relayed_failed += 1;
                self.replicas.data_path_failed(&lease.key, lease.serial, fault, &reason, now, changes);
            }
        }
        self.replicas.cut_came_too_late(&lease);
        self.replicas.release(lease, now, changes);
    }

    fn restore(&mut self, saved: &Saved, now: Now, changes: &mut Vec<Change>, effects: &mut Vec<Effect>) {
        let (handoffs, lost) = saved.handoffs(self.identity.boot_id.as_deref());
        for handoff in handoffs {
            let key = handoff.key();
            if let Err(why) = self.replicas.adopt(handoff, now, changes) {
                self.say(key.to_string(), format!("{key}: not restored: {why}"), now, effects);
            }
        }
        if lost > 0 {
            let text =
                format!("{lost} saved handoffs are of an earlier boot or cannot be read: not restored");
            self.say("state".into(), text, now, effects);
        }
        self.restore_operations(&saved.drains, &saved.callbacks, now, effects);
        self.keeper = Keeper::new(self.kept_revision());
    }

    fn saved(&mut self, result: Result<(), String>, now: Now, effects: &mut Vec<Effect>) {
        let is_news = self.keeper.ended(result.is_ok(), now.mono);
        if let (true, Err(why)) = (is_news, result) {
            let text = format!(
                "the accepted handoffs cannot be saved: {why}; they would be lost with a restart, and no file is deleted; check POOL_MANAGERD_STATE_DIR"
            );
            self.say("state".into(), text, now, effects);
        }
        self.delete_redundant(effects);
    }

    /// Deletes the files of which everything has been saved.
    fn delete_redundant(&mut self, effects: &mut Vec<Effect>) {
        if self.auto_delete && self.keeper.has(self.kept_revision()) {
            // The others follow when the listing without these comes.
            let files = self.replicas.redundant_files().take(DELETES_MAX);
            effects.extend(files.map(|(name, content)| Effect::DeleteFile(name.clone(), content.clone())));
        }
    }

    fn say(&mut self, subject: String, text: String, now: Now, effects: &mut Vec<Effect>) {
        let happening = Happening { kind: "daemon", subject, state: "", text, is_warning: true };
        self.happened(happening, now, effects);
    }

    fn begin_shutdown(&mut self, now: Now, changes: &mut Vec<Change>) {
        if self.shutdown == Shutdown::No {
            self.shutdown = Shutdown::Draining { until: now.mono.plus_ms(self.drain_timeout_ms) };
            // There is always room for the mark of a shutdown.
            let _ = self.replicas.drain(&Scope::Shutdown, Some(self.drain_timeout_ms), now, changes);
        }
    }

    fn note_watch(&mut self, trouble: Option<Trouble>, now: Now, effects: &mut Vec<Effect>) {
        self.watch_trouble.clone_from(&trouble);
        let (text, is_warning) = match trouble {
            Some(trouble) => (trouble.text, true),
            None => ("the runtime directory is watched again".into(), false),
        };
        self.happened(
            Happening { kind: "daemon", subject: "watch".into(), state: "", text, is_warning },
            now,
            effects,
        );
    }

    /// Settles which replicas use which GPUs, where either has changed, and what follows from it.
    fn bind_gpus(&mut self, now: Now, changes: &mut Vec<Change>, happenings: &mut Vec<Happening>) {
        let own_boot = self.identity.boot_id.as_ref();
        let engine = |(key, generation, handoff)| {
            let Handoff { boot_id, pid, device_mask, .. }: &Handoff = handoff;
            let pid = pid.filter(|_| boot_id.is_none() || boot_id.as_ref() == own_boot);
            Engine { key, generation, mask: device_mask.as_deref(), pid }
        };
        let is_new = self.bound != Some(self.gpus.revision());
        let mut verdicts = Vec::new();
        if is_new {
            verdicts = self.gpus.bind(self.replicas.engines().map(engine), happenings);
        } else {
            // A directory that fills up is told in pieces: only what a piece changes is looked at.
            for key in changes.iter().filter_map(Change::engine_changed) {
                match self.replicas.engine(key) {
                    Some(found) => verdicts.extend(self.gpus.bind_one(&engine(found), happenings)),
                    None => self.gpus.unbind(key),
                }
            }
        }
        for verdict in verdicts {
            let (key, generation) = (verdict.key, verdict.generation);
            match verdict.hold {
                Some(why) => self.replicas.hold(&key, generation, Cause::Gpu, why, now, changes),
                None => self.replicas.let_go(&key, generation, Cause::Gpu, now, changes),
            }
        }
        if !is_new {
            return;
        }
        self.bound = Some(self.gpus.revision());
        let present = self.gpus.capabilities();
        if self.identity.capabilities.gpus != present {
            self.identity.capabilities.gpus = present;
            self.planes.iter_mut().for_each(|plane| plane.introduce_again(now));
        }
    }

    fn with_memory(&self, mut status: PoolStatus) -> PoolStatus {
        let memory = self.gpus.memory_of(&status.pool_id);
        status.vram_total_bytes = memory.total_bytes;
        status.vram_free_bytes = memory.free_bytes;
        status
    }

    fn announce(&mut self, change: Change, now: Now, effects: &mut Vec<Effect>) {
        self.counts.files_refused += u64::from(matches!(change, Change::FileRefused { .. }));
        match &change {
            Change::Drain(change) => self.drain_tally.note(change),
            Change::State { key, .. } | Change::Replaced { key, .. } | Change::Gone { key, .. }
                if self.notifier.is_enabled() =>
            {
                self.notifier.observe(key, self.replicas.replica_status(key), now);
            }
            _ => {}
        }
        self.happened(change, now, effects);
    }

    fn happened(&mut self, what: impl Tell + 'static, now: Now, effects: &mut Vec<Effect>) {
        let what: Arc<dyn Tell> = Arc::new(what);
        self.events.push(what.clone(), now.wall);
        effects.push(Effect::Log(what));
    }

    /// What follows from the state, whatever the input was: probes, calls, the steps of a shutdown.
    fn proceed(&mut self, now: Now, effects: &mut Vec<Effect>) {
        if self.keeper.begins(self.kept_revision(), now.mono) {
            let saved = Saved::new(
                self.identity.boot_id.clone(),
                &self.replicas.all_adopted(),
                self.replicas.export_drains(),
                self.notifier.export(),
            );
            effects.push(Effect::Save(saved.text()));
        }
        effects.extend(self.replicas.take_process_orders().into_iter().map(Effect::Process));
        if let Shutdown::Draining { until } = self.shutdown
            && (self.replicas.in_flight() == 0 && self.drain_is_told() || now.mono >= until)
        {
            self.shutdown = Shutdown::Leaving;
            self.planes.iter_mut().for_each(|plane| plane.shutdown(now));
        }
        let due = self.notifier.poll(now);
        effects.extend(due.into_iter().map(|delivery| Effect::Deliver(Box::new(delivery))));
        let revision = self.told_revision();
        for index in 0..self.planes.len() {
            self.planes[index].on_change(revision, self.replicas.len(), now);
            if let Some(order) = self.planes[index].poll(now) {
                let body = self.body(order.call, now);
                effects.push(Effect::Call { plane: index, order, body });
            }
        }
        let mut orders = Vec::new();
        if self.shutdown == Shutdown::No {
            self.replicas.due_probes(now, &mut orders);
            self.counts.probes += orders.len() as u64;
            effects.extend(orders.into_iter().map(Effect::Probe));
        }
        let left = |plane: &Plane| *plane.state() == PlaneState::Left;
        if self.shutdown == Shutdown::Leaving && self.planes.iter().all(left) {
            self.shutdown = Shutdown::Done;
            effects.push(Effect::Exit);
        }
    }

    /// Grows with everything that control planes must hear of at once.
    fn told_revision(&self) -> u64 {
        let is_ending = u64::from(self.shutdown != Shutdown::No);
        self.replicas.revision() + self.preparing.revision() + is_ending
    }

    /// Whether every control plane that counts on this node knows that it takes no new work.
    fn drain_is_told(&self) -> bool {
        let revision = self.told_revision();
        self.planes.iter().all(|plane| {
            !matches!(plane.state(), PlaneState::Registered { failures: 0, .. })
                || plane.told() == Some(revision)
        })
    }

    fn body(&self, call: Call, now: Now) -> CallBody {
        let identity = &self.identity;
        match (call, &identity.address) {
            (Call::Register, Some(address)) => CallBody::Register(Box::new(RegisterRequest {
                node_id: identity.node_id.clone(),
                machine_id: Some(identity.machine_id.clone()),
                address: address.clone(),
                pools: self.pool_counts().into_keys().collect(),
                capabilities: identity.capabilities.clone(),
                gpu_loads: self.gpus.loads(),
                version: Some(env!("CARGO_PKG_VERSION").to_string()),
                incarnation: Some(identity.incarnation),
                boot_id: identity.boot_id.clone(),
            })),
            (Call::Heartbeat { seq }, _) => CallBody::Heartbeat(Box::new(Heartbeat {
                timestamp: Some(now.wall.rfc3339()),
                pools: self.pool_beats(),
                incarnation: Some(identity.incarnation),
                boot_id: identity.boot_id.clone(),
                seq: Some(seq),
                draining: self.is_node_draining(),
                preparation: self.preparing.pools().to_vec(),
                gpu_loads: self.gpus.loads(),
            })),
            (Call::Deregister | Call::Register, _) => {
                CallBody::Deregister { incarnation: identity.incarnation }
            }
        }
    }

    /// Pools of which there may be no replica yet: those that are configured, and those that are being prepared.
    fn expected_pools(&self) -> impl Iterator<Item = &PoolId> {
        let prepared = self.preparing.pools().iter().map(|preparation| &preparation.pool_id);
        self.identity.pools.iter().chain(prepared)
    }

    fn empty_pool(&self, pool: &PoolId) -> PoolStatus {
        empty_pool(pool, self.replicas.drain_of_pool(pool))
    }

    fn pool_beats(&self) -> Vec<PoolBeat> {
        let mut beats = self.replicas.pool_beats();
        for beat in &mut beats {
            beat.vram_free_bytes = self.gpus.memory_of(&beat.pool_id).free_bytes;
        }
        for pool in self.expected_pools() {
            if !beats.iter().any(|beat| beat.pool_id == *pool) {
                let draining = self.replicas.drain_of_pool(pool).is_some();
                beats.push(PoolBeat { draining, ..empty_beat(pool) });
            }
        }
        beats
    }
}

fn empty_beat(pool: &PoolId) -> PoolBeat {
    PoolBeat {
        pool_id: pool.clone(),
        ready: false,
        draining: false,
        slots_free: 0,
        slots_total: Some(0),
        vram_free_bytes: 0,
        engine: None,
        engine_version: None,
        models_available: Vec::new(),
        replicas: Some(Vec::new()),
    }
}

fn empty_pool(pool: &PoolId, drain: Option<DrainStatus>) -> PoolStatus {
    PoolStatus {
        pool_id: pool.clone(),
        live: false,
        ready: false,
        draining: drain.is_some(),
        drain,
        active_leases: 0,
        engine_version: None,
        engine: None,
        slots_total: 0,
        slots_free: 0,
        device_mask: None,
        vram_total_bytes: 0,
        vram_free_bytes: 0,
        models_available: Vec::new(),
        last_error: Some("no handoff names this pool yet".into()),
        url: None,
        replica_id: None,
        replicas: Vec::new(),
    }
}
