//! The GPUs of this machine: which there are, how they stand, which replicas use them. Pure.
//!
//! Three things come in: readings of the driver (every GPU at once), XIDs, and the time. Events and
//! verdicts about replicas go out: hold this one, let that one go. Nothing here asks the driver; the
//! thread that does may hang in it, and this file is where that is noticed.
//!
//! ```text
//!          XID of a fault                     the driver says so, or lists it no more
//!     ok ------------------> faulty      ok, faulty -------------------------> lost
//!      ^                       |                                               |
//!      +-----------------------+------------------ lists it again, sound ------+
//!        cleared by an operator; after lost; after the driver was gone
//! ```
//!
//! A fault stays until there is reason to believe that the GPU was reset: an operator says so, the GPU
//! was lost and is back, or the driver was not loaded in between. Memory that reads well is no such
//! reason: the numbers of a broken GPU often do. A lost GPU returns by itself when the driver lists it
//! without complaint. Replicas on a faulty or lost GPU are held out of use, and only those. A driver
//! that hangs, is missing or fails holds nobody: engines that run go on without it being asked.
//!
//! Which GPUs a replica uses is settled once for each of its engines, as the numbers of the others
//! move up when a GPU vanishes. Its device mask says it; without one, the processes that hold memory.

use std::collections::{BTreeMap, BTreeSet};

use crate::service::events::Happening;
use crate::time::{Mono, Now, Wall};
use crate::wire::gpu_load::GpuLoad;
use crate::wire::id::{PoolId, ReplicaKey};
use crate::wire::node::GpuInfo;

mod gpu;
mod mask;
mod reading;
mod report;
pub mod xid;

#[cfg(test)]
mod tests;

pub use gpu::GpuState;
pub use reading::{DriverReading, Memory, Process, Reading, Report, Trouble, Unavailable, Values};

use gpu::Gpu;
use xid::{Class, Xid};

/// GPUs that are known at once: no machine has more, and it bounds the metrics' labels.
pub const GPUS_MAX: usize = 64;
/// How long a reading may take before the driver counts as hanging, in milliseconds: a sound driver
/// needs a few for each GPU.
pub const READING_LIMIT_MS: u64 = 5_000;
/// How long a reading may take that opens the driver first, in milliseconds: GPUs that nobody uses are
/// woken one after another.
pub const OPENING_LIMIT_MS: u64 = 30_000;
/// XIDs of a GPU, or of no GPU that is known, that are remembered: a failing GPU writes a burst.
const XIDS_REMEMBERED_MAX: usize = 16;

/// How the driver stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DriverState {
    /// The first reading is under way.
    Starting,
    /// It answers.
    Ok,
    /// None is loaded.
    Missing,
    /// There is one, and it refuses.
    Failed,
    /// A reading takes too long.
    Hanging,
}

impl DriverState {
    /// The state as the API spells it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            DriverState::Starting => "starting",
            DriverState::Ok => "ok",
            DriverState::Missing => "missing",
            DriverState::Failed => "failed",
            DriverState::Hanging => "hanging",
        }
    }
}

/// Names a GPU for the life of this process, whatever number the driver gives it.
pub type GpuId = u32;

/// A replica's engine, as far as GPUs are concerned.
#[derive(Clone, Copy, Debug)]
pub struct Engine<'a> {
    /// The replica.
    pub key: &'a ReplicaKey,
    /// Its generation.
    pub generation: u64,
    /// GPUs that it is said to use.
    pub mask: Option<&'a str>,
    /// Its process.
    pub pid: Option<u32>,
}

/// What to do with a replica.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// The replica.
    pub key: ReplicaKey,
    /// Its generation.
    pub generation: u64,
    /// Why it is to be held out of use; `None` lets it go.
    pub hold: Option<String>,
}

/// The GPUs of this machine. See the file's text.
#[derive(Debug)]
pub struct Gpus {
    gpus: Vec<Gpu>,
    next_id: GpuId,
    driver: Driver,
    /// When the driver counts as hanging unless a reading ends before.
    answer_by: Option<Mono>,
    /// When the reading under way was to begin.
    began_at: Mono,
    /// The driver has answered at least once.
    has_answered: bool,
    /// No driver was loaded since it last answered.
    was_missing: bool,
    read_at: Option<Wall>,
    too_many: bool,
    bindings: BTreeMap<ReplicaKey, Binding>,
    /// XIDs of GPUs that no reading has told of yet.
    unplaced: Vec<Xid>,
    xids_by_class: [u64; Class::ALL.len()],
    kernel_log: Result<(), String>,
    revision: u64,
}

#[derive(Debug)]
struct Driver {
    state: DriverState,
    reason: String,
    since: Wall,
    version: Option<String>,
}

/// What is known of a replica's GPUs.
#[derive(Clone, Debug)]
struct Binding {
    generation: u64,
    mask: Option<String>,
    pid: Option<u32>,
    gpus: Vec<GpuId>,
    missing: Vec<String>,
    hold: Option<String>,
}

impl Gpus {
    /// Before the first reading, which begins now.
    #[must_use]
    pub fn new(now: Now) -> Gpus {
        Gpus {
            gpus: Vec::new(),
            next_id: 0,
            driver: Driver {
                state: DriverState::Starting,
                reason: "not read yet".into(),
                since: now.wall,
                version: None,
            },
            answer_by: Some(now.mono.plus_ms(OPENING_LIMIT_MS)),
            began_at: now.mono,
            has_answered: false,
            was_missing: false,
            read_at: None,
            too_many: false,
            bindings: BTreeMap::new(),
            unplaced: Vec::new(),
            xids_by_class: [0; Class::ALL.len()],
            kernel_log: Err("off".into()),
            revision: 0,
        }
    }

    /// Takes a report and appends what happened.
    pub fn report(&mut self, report: Report, now: Now, out: &mut Vec<Happening>) {
        match report {
            Report::Reading(reading) => self.read(reading, now, out),
            Report::Xid(xid) => self.xid(xid, now, out),
            Report::KernelLog(state) => {
                if let Err(reason) = &state {
                    let text = format!("GPU faults are not read from the kernel's log: {reason}");
                    out.push(happening("kernel-log", "", text, false));
                }
                self.kernel_log = state;
            }
        }
    }

    /// Notices a reading that takes too long.
    pub fn tick(&mut self, now: Now, out: &mut Vec<Happening>) {
        if self.answer_by.is_none_or(|at| at > now.mono) {
            return;
        }
        self.answer_by = None;
        let ns = now.mono.ns_since(self.began_at);
        let reason = format!("a reading has been under way for {} s", ns / 1_000_000_000);
        self.enter_driver(DriverState::Hanging, reason, now, out);
        self.driver.since = Wall(now.wall.0.saturating_sub(ns));
    }

    /// When [`Gpus::tick`] has something to do.
    #[must_use]
    pub fn deadline(&self) -> Option<Mono> {
        self.answer_by
    }

    /// Grows with every change that may lead to other verdicts.
    #[must_use]
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// Settles which GPUs all engines use. Returns the replicas that are to be held from now on, or no
    /// longer, because of them.
    pub fn bind<'a>(
        &mut self,
        engines: impl Iterator<Item = Engine<'a>>,
        out: &mut Vec<Happening>,
    ) -> Vec<Verdict> {
        let mut before = std::mem::take(&mut self.bindings);
        let mut verdicts = Vec::new();
        for engine in engines {
            let old = before.remove(engine.key);
            verdicts.extend(self.bind_to(&engine, old, out));
        }
        verdicts
    }

    /// Settles which GPUs one engine uses, after it came or changed.
    pub fn bind_one(&mut self, engine: &Engine<'_>, out: &mut Vec<Happening>) -> Option<Verdict> {
        // On machines without a GPU nothing is to be settled. The first answer settles all of them.
        if !self.has_answered {
            return None;
        }
        let old = self.bindings.remove(engine.key);
        self.bind_to(engine, old, out)
    }

    /// Forgets an engine that is gone.
    pub fn unbind(&mut self, key: &ReplicaKey) {
        self.bindings.remove(key);
    }

    fn bind_to(
        &mut self,
        engine: &Engine<'_>,
        old: Option<Binding>,
        out: &mut Vec<Happening>,
    ) -> Option<Verdict> {
        let old = old.filter(|old| old.generation == engine.generation);
        // Thousands of replicas may be settled again at once: what stays as it was costs little.
        let old = match old {
            Some(old) if self.is_settled(&old, engine) => {
                self.bindings.insert(engine.key.clone(), old);
                return None;
            }
            old => old,
        };
        let binding = self.binding(engine, old.as_ref(), out);
        let verdict = (binding.hold != old.and_then(|old| old.hold)).then(|| Verdict {
            key: engine.key.clone(),
            generation: engine.generation,
            hold: binding.hold.clone(),
        });
        self.bindings.insert(engine.key.clone(), binding);
        verdict
    }

    /// GPUs that work can be given to, as registrations tell them.
    #[must_use]
    pub fn capabilities(&self) -> Vec<GpuInfo> {
        let present = self.gpus.iter().filter(|gpu| gpu.lost.is_none());
        present
            .filter_map(|gpu| {
                let values = gpu.values.as_ref()?;
                Some(GpuInfo {
                    device_id: gpu.index,
                    name: values.name.clone(),
                    vram_total_bytes: values.memory.map_or(0, |memory| memory.total_bytes),
                    compute_capability: values.compute_capability.clone().unwrap_or_default(),
                })
            })
            .collect()
    }

    /// How each GPU is used, as heartbeats tell it: nothing that is older than the driver's last answer.
    #[must_use]
    pub fn loads(&self) -> Vec<GpuLoad> {
        if self.driver.state != DriverState::Ok {
            return Vec::new();
        }
        let load = |gpu: &Gpu| {
            let values = gpu.current()?;
            Some(GpuLoad {
                device_id: gpu.index,
                vram_total_bytes: values.memory.map(|memory| memory.total_bytes),
                vram_free_bytes: values.memory.map(|memory| memory.free_bytes),
                utilization_percent: values.utilization_percent,
                temperature_celsius: values.temperature_celsius,
            })
        };
        self.gpus.iter().filter(|gpu| gpu.unreadable.is_none()).filter_map(load).collect()
    }

    /// Memory of the GPUs that a pool's replicas use, each GPU once; zeros where unknown.
    #[must_use]
    pub fn memory_of(&self, pool: &PoolId) -> Memory {
        let mut sum = Memory::default();
        if self.gpus.is_empty() {
            return sum;
        }
        let of_pool = self.bindings.iter().filter(|(key, _)| key.pool == *pool);
        let used: BTreeSet<GpuId> = of_pool.flat_map(|(_, binding)| binding.gpus.iter().copied()).collect();
        for gpu in self.gpus.iter().filter(|gpu| gpu.lost.is_none() && used.contains(&gpu.id)) {
            if let Some(memory) = gpu.values.as_ref().and_then(|values| values.memory) {
                sum.total_bytes = sum.total_bytes.saturating_add(memory.total_bytes);
                sum.used_bytes = sum.used_bytes.saturating_add(memory.used_bytes);
                sum.free_bytes = sum.free_bytes.saturating_add(memory.free_bytes);
            }
        }
        sum
    }

    /// The GPU that a number or an id means; of two with the same number the one that is listed.
    #[must_use]
    pub fn find(&self, selector: &str) -> Option<GpuId> {
        let is_meant = |gpu: &&Gpu| match selector.parse::<u32>() {
            Ok(index) => gpu.index == index,
            Err(_) => gpu.uuid().is_some_and(|uuid| uuid.eq_ignore_ascii_case(selector)),
        };
        let meant = || self.gpus.iter().filter(is_meant);
        meant().find(|gpu| gpu.is_listed).or_else(|| meant().next()).map(|gpu| gpu.id)
    }

    /// An operator says that a GPU is sound: its fault is over. One that the driver lists no more is
    /// forgotten.
    pub fn clear(&mut self, id: GpuId, now: Now, out: &mut Vec<Happening>) {
        let Some(position) = self.gpus.iter().position(|gpu| gpu.id == id) else { return };
        self.revision += 1;
        let gpu = &mut self.gpus[position];
        if gpu.lost.is_some() && !gpu.is_listed {
            let text = format!("GPU {}: forgotten on request", gpu.index);
            out.push(happening(&gpu.index.to_string(), "gone", text, false));
            self.gpus.remove(position);
        } else {
            gpu.change(now, out, |gpu| gpu.fault = None);
        }
    }

    /// Whether a GPU is lost or faulty, so that somebody may want to reset it.
    #[must_use]
    pub fn any_out(&self) -> bool {
        self.gpus.iter().any(|gpu| gpu.state().is_out())
    }

    fn read(&mut self, reading: Reading, now: Now, out: &mut Vec<Happening>) {
        let limit_ms = if reading.next_opens { OPENING_LIMIT_MS } else { READING_LIMIT_MS };
        self.began_at = reading.next_at;
        self.answer_by = Some(reading.next_at.plus_ms(limit_ms));
        match reading.driver {
            Err(Unavailable { is_missing, reason }) => {
                self.was_missing |= is_missing;
                let state = if is_missing { DriverState::Missing } else { DriverState::Failed };
                self.enter_driver(state, reason, now, out);
            }
            Ok(driver) => {
                self.revision += u64::from(!self.has_answered);
                self.has_answered = true;
                self.read_at = Some(now.wall);
                self.driver.version = driver.version;
                let reason = format!("it lists {} GPUs", driver.gpus.len());
                self.enter_driver(DriverState::Ok, reason, now, out);
                let before = self.signature();
                let was_reloaded = std::mem::take(&mut self.was_missing);
                self.list(driver.gpus, was_reloaded, now, out);
                self.revision += u64::from(before != self.signature());
            }
        }
    }

    fn enter_driver(&mut self, state: DriverState, reason: String, now: Now, out: &mut Vec<Happening>) {
        let driver = &mut self.driver;
        let is_news = driver.state != state || state != DriverState::Ok && driver.reason != reason;
        driver.reason = reason;
        if !is_news {
            return;
        }
        if driver.state != state {
            driver.since = now.wall;
        }
        let before = std::mem::replace(&mut driver.state, state);
        let version = driver.version.as_deref().filter(|_| state == DriverState::Ok);
        let text = format!(
            "NVIDIA driver{}{}: {}: {}",
            if version.is_some() { " " } else { "" },
            version.unwrap_or(""),
            state.as_str(),
            driver.reason
        );
        // A machine without GPUs has no driver, which is nothing to look at.
        let is_warning = match state {
            DriverState::Starting | DriverState::Ok => false,
            DriverState::Missing => !self.gpus.is_empty(),
            DriverState::Failed | DriverState::Hanging => true,
        };
        out.push(happening("driver", state.as_str(), text, is_warning));
        // What a mask that names no GPU means depends on whether there is a driver. One that hangs is there.
        self.revision += u64::from(state == DriverState::Ok && before != DriverState::Hanging);
    }

    /// Compares what the driver lists with what is known.
    fn list(
        &mut self,
        listed: Vec<(u32, Result<Values, Trouble>)>,
        was_reloaded: bool,
        now: Now,
        out: &mut Vec<Happening>,
    ) {
        let (sound, troubled): (Vec<_>, Vec<_>) = listed.into_iter().partition(|(_, found)| found.is_ok());
        let mut seen: Vec<GpuId> = Vec::new();
        for (index, values) in sound.into_iter().filter_map(|(index, found)| Some((index, found.ok()?))) {
            let known = self.gpus.iter().position(|gpu| gpu.uuid() == Some(values.uuid.as_str()));
            let unnamed = || self.gpus.iter().position(|gpu| gpu.values.is_none() && gpu.index == index);
            let Some(position) = known.or_else(unnamed).or_else(|| self.add(index, now, out)) else {
                continue;
            };
            let gpu = &mut self.gpus[position];
            seen.push(gpu.id);
            if gpu.values.is_none() {
                out.push(happening(&index.to_string(), "found", introduction(index, &values), false));
            }
            let pci = values.pci;
            gpu.change(now, out, |gpu| {
                if gpu.lost.take().is_some() || was_reloaded {
                    gpu.fault = None;
                }
                gpu.unreadable = None;
                gpu.is_listed = true;
                gpu.index = index;
                gpu.values = Some(values);
            });
            let is_here = |xid: &mut Xid| Some(xid.pci) == pci;
            for xid in self.unplaced.extract_if(.., is_here).collect::<Vec<_>>() {
                gpu.suffer(&xid, now, out);
            }
        }
        for (index, trouble) in troubled.into_iter().filter_map(|(index, found)| Some((index, found.err()?)))
        {
            let known = self.gpus.iter().position(|gpu| gpu.index == index && !seen.contains(&gpu.id));
            let Some(position) = known.or_else(|| self.add(index, now, out)) else { continue };
            let gpu = &mut self.gpus[position];
            seen.push(gpu.id);
            gpu.change(now, out, |gpu| {
                gpu.is_listed = true;
                if trouble.is_lost {
                    gpu.lost = Some(trouble.reason);
                } else if gpu.lost.is_none() {
                    gpu.unreadable = Some(trouble.reason);
                }
            });
        }
        // One that was never read has no name by which it could be known again.
        self.gpus.retain(|gpu| gpu.values.is_some() || seen.contains(&gpu.id));
        for gpu in self.gpus.iter_mut().filter(|gpu| !seen.contains(&gpu.id)) {
            gpu.change(now, out, |gpu| {
                gpu.is_listed = false;
                gpu.lost.get_or_insert_with(|| "the driver lists it no more".into());
            });
        }
        self.gpus.sort_by_key(|gpu| (gpu.index, !gpu.is_listed, gpu.id));
    }

    /// A place for a GPU that was not known; `None` where there are too many.
    fn add(&mut self, index: u32, now: Now, out: &mut Vec<Happening>) -> Option<usize> {
        if self.gpus.len() >= GPUS_MAX {
            if !std::mem::replace(&mut self.too_many, true) {
                let text = format!("more than {GPUS_MAX} GPUs: the others are not looked at");
                out.push(happening(&index.to_string(), "", text, true));
            }
            return None;
        }
        let id = self.next_id;
        self.next_id = self.next_id.wrapping_add(1);
        self.gpus.push(Gpu::unread(id, index, now));
        Some(self.gpus.len() - 1)
    }

    fn xid(&mut self, xid: Xid, now: Now, out: &mut Vec<Happening>) {
        let class = xid.class();
        let here = self.gpus.iter_mut().find(|gpu| gpu.pci() == Some(xid.pci));
        let Some(gpu) = here else {
            self.xids_by_class[class as usize] += 1;
            let text = format!("{xid} on {}, where no GPU is known: {}", xid.pci, xid.detail);
            out.push(happening(&xid.pci.to_string(), "xid", text, class == Class::Fault));
            if self.unplaced.len() >= XIDS_REMEMBERED_MAX {
                self.unplaced.remove(0);
            }
            self.unplaced.push(xid);
            return;
        };
        if gpu.is_told_again(&xid, now.mono) {
            return;
        }
        self.xids_by_class[class as usize] += 1;
        self.revision += u64::from(gpu.suffer(&xid, now, out));
    }

    /// Whether a replica's mask is understood, and all of its GPUs are there and sound, as before.
    fn is_settled(&self, old: &Binding, engine: &Engine<'_>) -> bool {
        let is_sound = |id: &GpuId| self.gpus.iter().any(|gpu| gpu.id == *id && !gpu.state().is_out());
        engine.mask.is_some()
            && (old.mask.as_deref(), old.pid) == (engine.mask, engine.pid)
            && (old.missing.is_empty() && old.hold.is_none() && !old.gpus.is_empty())
            && old.gpus.iter().all(is_sound)
    }

    fn binding(&self, engine: &Engine<'_>, old: Option<&Binding>, out: &mut Vec<Happening>) -> Binding {
        let mut binding = Binding {
            generation: engine.generation,
            mask: engine.mask.map(str::to_string),
            pid: engine.pid,
            gpus: Vec::new(),
            missing: Vec::new(),
            hold: None,
        };
        let old = old.filter(|old| old.mask.as_deref() == engine.mask);
        let still = |old: &&Binding| {
            let exists = |id: &GpuId| self.gpus.iter().any(|gpu| gpu.id == *id);
            !old.gpus.is_empty() && old.gpus.iter().all(exists)
        };
        match (engine.mask, old.filter(still)) {
            (Some(_), Some(old)) if old.missing.is_empty() => binding.gpus.clone_from(&old.gpus),
            (Some(mask), _) => self.resolve(mask, &mut binding),
            (None, old) => {
                binding.gpus = self.gpus_of_process(engine.pid);
                if let (true, Some(old)) = (binding.gpus.is_empty(), old) {
                    binding.gpus.clone_from(&old.gpus);
                }
            }
        }
        let is_news = old.is_none_or(|old| old.missing != binding.missing);
        if let (true, true, Some(first)) = (is_news, self.has_answered, binding.missing.first()) {
            let text = format!(
                "{}: its device mask {:?} is not understood: {first}; it is used nevertheless",
                engine.key,
                engine.mask.unwrap_or("")
            );
            out.push(happening(&engine.key.to_string(), "", text, true));
        }
        let out_of_use =
            self.gpus.iter().filter(|gpu| gpu.state().is_out() && binding.gpus.contains(&gpu.id));
        let reasons: Vec<String> = out_of_use
            .map(|gpu| format!("GPU {} is {}: {}", gpu.index, gpu.state().as_str(), gpu.reason()))
            .collect();
        binding.hold = (!reasons.is_empty()).then(|| reasons.join("; "));
        binding
    }

    fn resolve(&self, mask: &str, binding: &mut Binding) {
        let named: Vec<mask::Named<'_>> = self
            .gpus
            .iter()
            .map(|gpu| mask::Named {
                index: gpu.index,
                uuid: gpu.uuid(),
                is_mig: gpu.values.as_ref().is_some_and(|values| values.mig_enabled == Some(true)),
                is_listed: gpu.is_listed,
            })
            .collect();
        let resolved = mask::resolve(mask, &named);
        binding.gpus = resolved.gpus.iter().map(|position| self.gpus[*position].id).collect();
        binding.missing = resolved.missing;
    }

    /// GPUs on which a process or one that it started holds memory.
    fn gpus_of_process(&self, pid: Option<u32>) -> Vec<GpuId> {
        let Some(pid) = pid else { return Vec::new() };
        let uses = |gpu: &&Gpu| gpu.processes().iter().any(|process| process.descends_from(pid));
        self.gpus.iter().filter(uses).map(|gpu| gpu.id).collect()
    }

    /// What verdicts rest on.
    fn signature(&self) -> Vec<(GpuId, u32, String, bool, Vec<u32>)> {
        let of = |gpu: &Gpu| {
            let pids = gpu.processes().iter().map(|process| process.pid).collect();
            (gpu.id, gpu.index, gpu.reason(), gpu.state().is_out(), pids)
        };
        self.gpus.iter().map(of).collect()
    }
}

fn introduction(index: u32, values: &Values) -> String {
    let memory = values.memory.map_or(String::new(), |memory| format!(", {} MiB", memory.total_bytes >> 20));
    let pci = values.pci.map_or(String::new(), |pci| format!(" at {pci}"));
    format!("GPU {index}: found: {}{memory}{pci}, {}", values.name, values.uuid)
}

fn happening(subject: &str, state: &'static str, text: String, is_warning: bool) -> Happening {
    Happening { kind: "gpu", subject: subject.to_string(), state, text, is_warning }
}
