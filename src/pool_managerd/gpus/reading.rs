//! What is told of the GPUs: readings of the driver, XIDs, the kernel's log. Pure values.

use super::xid::{Pci, Xid};
use crate::time::Mono;

/// What the outside tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Report {
    /// A reading of the driver ended.
    Reading(Reading),
    /// An XID.
    Xid(Xid),
    /// The kernel's log is read, or why it is not.
    KernelLog(Result<(), String>),
}

/// How a reading ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reading {
    /// What it found.
    pub driver: Result<DriverReading, Unavailable>,
    /// When the next reading begins.
    pub next_at: Mono,
    /// Whether that one opens the driver first, which takes longer.
    pub next_opens: bool,
}

/// Why there is no reading.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unavailable {
    /// No driver is loaded. Otherwise there is one that does not answer properly.
    pub is_missing: bool,
    /// For people.
    pub reason: String,
}

/// What the driver says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DriverReading {
    /// Its version.
    pub version: Option<String>,
    /// Every GPU that it lists: its number, and its values or why there are none.
    pub gpus: Vec<(u32, Result<Values, Trouble>)>,
}

/// Why a GPU could not be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trouble {
    /// The driver says that the GPU is lost or must be reset. Otherwise it may be a passing trouble.
    pub is_lost: bool,
    /// For people.
    pub reason: String,
}

/// What is read of one GPU; `None` for what it does not tell.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Values {
    /// `GPU-...`
    pub uuid: String,
    /// Where it sits.
    pub pci: Option<Pci>,
    /// Product name.
    pub name: String,
    /// Memory.
    pub memory: Option<Memory>,
    /// Compute capability, `major.minor`.
    pub compute_capability: Option<String>,
    /// Share of time in which it computed, in percent.
    pub utilization_percent: Option<u32>,
    /// Temperature, in degrees Celsius.
    pub temperature_celsius: Option<u32>,
    /// Power that it draws, in milliwatts.
    pub power_milliwatts: Option<u32>,
    /// Whether it is divided into MIG instances.
    pub mig_enabled: Option<bool>,
    /// Processes that compute on it.
    pub processes: Vec<Process>,
}

/// A GPU's memory, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// All of it.
    pub total_bytes: u64,
    /// Taken.
    pub used_bytes: u64,
    /// Free.
    pub free_bytes: u64,
}

/// A process that computes on a GPU.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Process {
    /// Its id.
    pub pid: u32,
    /// Its command's name, where this machine knows it.
    pub name: Option<String>,
    /// Memory of the GPU that it holds, in bytes.
    pub memory_bytes: Option<u64>,
    /// Its parent, that one's parent, and so on.
    pub ancestors: Vec<u32>,
}

impl Process {
    /// Whether it is the process `pid`, or was started by it.
    pub(super) fn descends_from(&self, pid: u32) -> bool {
        self.pid == pid || self.ancestors.contains(&pid)
    }
}
