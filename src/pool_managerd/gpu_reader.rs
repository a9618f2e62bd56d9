//! Asks the NVIDIA driver, on a thread of its own: a driver may hang for minutes or for ever.
//!
//! The thread goes at its own pace: it reads, says when it will read again, and waits meanwhile for the
//! driver's events. The loop is woken for what it must act on: XIDs, GPUs that come, go or break, a
//! driver that comes or goes. New numbers alone wait until the loop turns anyway, which it does at the
//! latest when it wants to know whether the driver hangs.
//!
//! The library is loaded when it is there and looked for now and then while it is not. It is closed
//! between readings while a GPU is out of use: an open driver would forbid an operator to reset it, and
//! only one that is opened anew lists a GPU that has come back.

use std::fs;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::time::Duration;

use nvml_wrapper::bitmasks::event::EventTypes;
use nvml_wrapper::enum_wrappers::device::TemperatureSensor;
use nvml_wrapper::enums::device::UsedGpuMemory;
use nvml_wrapper::enums::event::XidError;
use nvml_wrapper::error::NvmlError;
use nvml_wrapper::event::EventSet;
use nvml_wrapper::{Device, Nvml};

use crate::reactor::{Waker, now};
use crate::time::Mono;

use super::gpus::xid::{Pci, Source, Xid};
use super::gpus::{DriverReading, GPUS_MAX, Memory, Process, Reading, Report, Trouble, Unavailable, Values};

/// Stack of the thread, in bytes: the driver's library is not ours to measure. Only what is touched
/// takes memory.
const STACK_BYTES: usize = 1024 * 1024;
/// Reports that wait for the loop: it takes them every turn, and a full queue wakes it.
const QUEUE_MAX: usize = 16;
/// Between attempts to find a driver where there never was one, in milliseconds: at first, and after many of
/// them. Each waits twice as long as the one before.
const ABSENT_RETRY_MS: (u64, u64) = (60_000, 600_000);
/// Processes of one GPU that are told.
const PROCESSES_MAX: usize = 256;
/// Parents of a process that are followed: an engine's workers are few steps below it.
const ANCESTORS_MAX: usize = 16;
/// What the driver calls an XID whose number it does not know.
const XID_UNKNOWN: u32 = 999;

/// The thread, as the loop sees it.
#[derive(Debug)]
pub(super) struct GpuReader {
    reports: Receiver<Report>,
    keep_closed: Arc<AtomicBool>,
}

impl GpuReader {
    /// Starts the thread; it reads every `interval_ms`.
    ///
    /// # Errors
    /// Where no thread can be had.
    pub(super) fn start(interval_ms: u64, waker: Waker) -> io::Result<GpuReader> {
        let (sender, reports) = sync_channel(QUEUE_MAX);
        let keep_closed = Arc::new(AtomicBool::new(false));
        let mut thread = Thread {
            interval_ms,
            keep_closed: Arc::clone(&keep_closed),
            out: Out { sender, waker, told: None },
        };
        std::thread::Builder::new().name("gpu".into()).stack_size(STACK_BYTES).spawn(move || {
            // The end of the loop is the only error, and ends the thread.
            let _ = thread.run();
        })?;
        Ok(GpuReader { reports, keep_closed })
    }

    /// The next report, if there is one.
    pub(super) fn take(&self) -> Option<Report> {
        self.reports.try_recv().ok()
    }

    /// Whether the driver is to be closed between readings.
    pub(super) fn keep_closed(&self, yes: bool) {
        self.keep_closed.store(yes, Ordering::Relaxed);
    }
}

/// The loop does not listen any more.
struct Over;

struct Thread {
    interval_ms: u64,
    keep_closed: Arc<AtomicBool>,
    out: Out,
}

impl Thread {
    fn run(&mut self) -> Result<(), Over> {
        let mut was_there = false;
        let mut absent_ms = ABSENT_RETRY_MS.0;
        loop {
            let next_at = match Nvml::init() {
                Ok(nvml) => {
                    was_there = true;
                    self.while_open(&nvml)?
                }
                Err(error) => {
                    let pause_ms = if was_there { self.interval_ms } else { self.interval_ms.max(absent_ms) };
                    absent_ms = (absent_ms * 2).min(ABSENT_RETRY_MS.1);
                    let next_at = now().mono.plus_ms(pause_ms);
                    self.out.reading(Err(unavailable(&error)), next_at, true)?;
                    next_at
                }
            };
            sleep_until(next_at);
        }
    }

    /// Reads until there is a reason to close the driver; returns when to open it again.
    fn while_open(&mut self, nvml: &Nvml) -> Result<Mono, Over> {
        let mut events: Option<Option<EventSet<'_>>> = None;
        loop {
            let next_at = now().mono.plus_ms(self.interval_ms);
            let driver = read(nvml);
            let is_sound =
                driver.as_ref().is_ok_and(|driver| driver.gpus.iter().all(|(_, found)| found.is_ok()));
            let close = !is_sound || self.keep_closed.load(Ordering::Relaxed);
            self.out.reading(driver, next_at, close)?;
            if close {
                return Ok(next_at);
            }
            let set = events.get_or_insert_with(|| subscribe(nvml));
            if !self.listen(set.as_ref(), next_at)? {
                // Without a set that works, the kernel's log and the readings tell.
                *set = None;
            }
        }
    }

    /// Passes the driver's events on until `until`. False if that is not possible.
    fn listen(&mut self, set: Option<&EventSet<'_>>, until: Mono) -> Result<bool, Over> {
        let Some(set) = set else {
            sleep_until(until);
            return Ok(true);
        };
        loop {
            let left_ms = until.ns_since(now().mono).div_ceil(1_000_000);
            if left_ms == 0 {
                return Ok(true);
            }
            match set.wait(u32::try_from(left_ms).unwrap_or(u32::MAX)) {
                Ok(event) => {
                    let number = match event.event_data {
                        Some(XidError::Value(number)) => u32::try_from(number).unwrap_or(XID_UNKNOWN),
                        Some(XidError::Unknown) => XID_UNKNOWN,
                        None => continue,
                    };
                    // One that cannot be placed any more: the next reading shows what became of it.
                    let Some(pci) = event.device.pci_info().ok().and_then(|pci| Pci::parse(&pci.bus_id))
                    else {
                        return Ok(true);
                    };
                    let xid = Xid { pci, number, detail: String::new(), source: Source::Nvml };
                    self.out.send(Report::Xid(xid), true)?;
                }
                Err(NvmlError::Timeout) => {}
                Err(_) => {
                    sleep_until(until);
                    return Ok(false);
                }
            }
        }
    }
}

/// The way to the loop.
struct Out {
    sender: SyncSender<Report>,
    waker: Waker,
    /// What the loop was last woken for: why there is no driver, or a line for each GPU.
    told: Option<Vec<String>>,
}

impl Out {
    fn reading(
        &mut self,
        driver: Result<DriverReading, Unavailable>,
        next_at: Mono,
        next_opens: bool,
    ) -> Result<(), Over> {
        let essence = match &driver {
            Err(unavailable) => vec![unavailable.reason.clone()],
            Ok(driver) => driver.gpus.iter().map(|(index, found)| essence(*index, found)).collect(),
        };
        let is_news = self.told.as_ref() != Some(&essence);
        self.told = Some(essence);
        self.send(Report::Reading(Reading { driver, next_at, next_opens }), is_news)
    }

    /// Waits only where the loop has not taken anything for a long time, and wakes it before.
    fn send(&self, report: Report, wake: bool) -> Result<(), Over> {
        let full = match self.sender.try_send(report) {
            Ok(()) => None,
            Err(TrySendError::Full(report)) => Some(report),
            Err(TrySendError::Disconnected(_)) => return Err(Over),
        };
        if wake || full.is_some() {
            self.waker.wake().map_err(|_| Over)?;
        }
        full.map_or(Ok(()), |report| self.sender.send(report).map_err(|_| Over))
    }
}

fn essence(index: u32, found: &Result<Values, Trouble>) -> String {
    match found {
        Ok(values) => format!("{index} {}", values.uuid),
        Err(trouble) => format!("{index} {}", trouble.reason),
    }
}

fn sleep_until(at: Mono) {
    std::thread::sleep(Duration::from_nanos(at.ns_since(now().mono)));
}

/// Why the driver cannot be opened or asked.
fn unavailable(error: &NvmlError) -> Unavailable {
    match error {
        NvmlError::LibloadingError(error) => {
            Unavailable { is_missing: true, reason: format!("NVIDIA's library is not there: {error}") }
        }
        NvmlError::DriverNotLoaded | NvmlError::LibraryNotFound => {
            Unavailable { is_missing: true, reason: error.to_string() }
        }
        error => Unavailable { is_missing: false, reason: error.to_string() },
    }
}

fn read(nvml: &Nvml) -> Result<DriverReading, Unavailable> {
    let count = nvml.device_count().map_err(|error| unavailable(&error))?;
    // One more than is taken, so that it is noticed.
    let count = count.min(GPUS_MAX as u32 + 1);
    let gpus = (0..count).map(|index| (index, nvml.device_by_index(index).map_err(trouble).and_then(values)));
    Ok(DriverReading { version: nvml.sys_driver_version().ok(), gpus: gpus.collect() })
}

fn values(device: Device<'_>) -> Result<Values, Trouble> {
    let memory = told(device.memory_info())?.map(|memory| Memory {
        total_bytes: memory.total,
        used_bytes: memory.used,
        free_bytes: memory.free,
    });
    let compute = told(device.cuda_compute_capability())?;
    Ok(Values {
        uuid: device.uuid().map_err(trouble)?,
        pci: told(device.pci_info())?.and_then(|pci| Pci::parse(&pci.bus_id)),
        name: told(device.name())?.unwrap_or_default(),
        memory,
        compute_capability: compute.map(|version| format!("{}.{}", version.major, version.minor)),
        utilization_percent: told(device.utilization_rates())?.map(|rates| rates.gpu),
        temperature_celsius: told(device.temperature(TemperatureSensor::Gpu))?,
        power_milliwatts: told(device.power_usage())?,
        mig_enabled: told(device.mig_mode())?.map(|mode| mode.current == 1),
        processes: processes(&device)?,
    })
}

/// What is not told is not known, unless the reason is that the GPU is out of reach.
fn told<T>(result: Result<T, NvmlError>) -> Result<Option<T>, Trouble> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error @ (NvmlError::GpuLost | NvmlError::ResetRequired)) => Err(trouble(error)),
        Err(_) => Ok(None),
    }
}

fn trouble(error: NvmlError) -> Trouble {
    let is_lost = matches!(error, NvmlError::GpuLost | NvmlError::ResetRequired);
    Trouble { is_lost, reason: error.to_string() }
}

fn processes(device: &Device<'_>) -> Result<Vec<Process>, Trouble> {
    let found = told(device.running_compute_processes())?.unwrap_or_default();
    let process = |info: nvml_wrapper::struct_wrappers::device::ProcessInfo| Process {
        pid: info.pid,
        name: fs::read_to_string(format!("/proc/{}/comm", info.pid)).ok().map(|name| name.trim().to_string()),
        memory_bytes: match info.used_gpu_memory {
            UsedGpuMemory::Used(bytes) => Some(bytes),
            UsedGpuMemory::Unavailable => None,
        },
        ancestors: std::iter::successors(parent_of(info.pid), |pid| parent_of(*pid))
            .take(ANCESTORS_MAX)
            .collect(),
    };
    Ok(found.into_iter().take(PROCESSES_MAX).map(process).collect())
}

/// The parent of a process; none for the first one and for those of other pid namespaces.
fn parent_of(pid: u32) -> Option<u32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, in parentheses, may hold anything.
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_whitespace().nth(1)?.parse().ok().filter(|parent| *parent > 1)
}

/// A set with the XIDs of every GPU that can tell them; none where no GPU can.
fn subscribe(nvml: &Nvml) -> Option<EventSet<'_>> {
    let join = |index: u32, set| {
        nvml.device_by_index(index).ok()?.register_events(EventTypes::CRITICAL_XID_ERROR, set).ok()
    };
    let count = nvml.device_count().ok()?.min(GPUS_MAX as u32);
    // A GPU that refuses takes the set with it, so each is tried on one of its own first.
    let able: Vec<u32> = (0..count)
        .filter(|index| nvml.create_event_set().ok().and_then(|set| join(*index, set)).is_some())
        .collect();
    let set = nvml.create_event_set().ok().filter(|_| !able.is_empty())?;
    able.into_iter().try_fold(set, |set, index| join(index, set))
}
