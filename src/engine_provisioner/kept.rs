//! What is remembered of running engines, so that they can be found again after this program was killed.
//!
//! One file an engine, written when it starts and removed when it ends: the handoff with process, start and
//! boot, its cgroup, and a fingerprint of the configuration. A lock on the directory keeps two provisioners
//! from keeping the same engines; the kernel releases it with the process that held it.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;
use rustix::process::Pid;
use serde_json::{Value, json};

use super::container::Container;
use super::plan::Config;
use super::publish::{create_directory, is_alive};
use crate::service::durable;
use crate::service::machine::{boot_id, process};
use crate::settings::Exit;
use crate::wire::handoff::{self, Handoff, HandoffFile};
use crate::wire::id::ReplicaKey;

/// The directory.
#[derive(Debug)]
pub(super) struct Kept {
    directory: PathBuf,
    /// Holds the lock.
    _lock: File,
}

/// An engine that lives.
#[derive(Debug)]
pub(super) struct Found {
    /// As it was started.
    pub(super) handoff: Handoff,
    /// Its first process, and its group.
    pub(super) pid: Pid,
    /// Its cgroup.
    pub(super) cgroup: Option<PathBuf>,
    /// Its container, where its first process is the client of one.
    pub(super) container: Option<Container>,
    /// The container's main process, and when that started, where it was found and lives.
    pub(super) main: Option<(u32, u64)>,
    /// Whether it was started from the very configuration.
    pub(super) is_unchanged: bool,
}

/// What is remembered of an engine's container.
#[derive(Clone, Copy, Debug)]
pub(super) struct KeptContainer<'a> {
    /// Whom to ask about it.
    pub(super) container: &'a Container,
    /// Its main process, and when that started, once it is known.
    pub(super) main: Option<(u32, u64)>,
}

impl Kept {
    /// Takes the directory.
    ///
    /// # Errors
    /// [`Exit`] where it cannot be used, or another provisioner uses it.
    pub(super) fn open(directory: &Path) -> Result<Kept, Exit> {
        create_directory(directory)?;
        let path = directory.join(".lock");
        let cannot = |error: std::io::Error| {
            Exit::runtime(format!("cannot use {}: {error}; give another --state-dir", path.display()))
        };
        let lock = File::create(&path).map_err(cannot)?;
        rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).map_err(|_| {
            Exit::runtime(format!(
                "another engine-provisioner keeps the engines of {}: stop it first, or give another --state-dir",
                directory.display()
            ))
        })?;
        Ok(Kept { directory: directory.to_path_buf(), _lock: lock })
    }

    /// An engine was started, or its container's main process is known. `handoff` names its first process.
    ///
    /// # Errors
    /// It cannot be written down, so it could not be found again.
    pub(super) fn remember(
        &self,
        config: &Config,
        handoff: &Handoff,
        cgroup: Option<&Path>,
        container: Option<KeptContainer<'_>>,
    ) -> Result<(), String> {
        let file = self.file(&handoff.key());
        let container = container.map(|kept| {
            let mut value = kept.container.to_value();
            (value["main_pid"], value["main_start"]) =
                kept.main.map_or((Value::Null, Value::Null), |(pid, start)| (json!(pid), json!(start)));
            value
        });
        let text = json!({
            "handoff": handoff.to_value(),
            "cgroup": cgroup.map(|path| path.to_string_lossy()),
            "container": container,
            "fingerprint": fingerprint(config),
        });
        durable::replace(&file, text.to_string().as_bytes())
            .map_err(|error| format!("cannot write {}: {error}", file.display()))
    }

    /// An engine ended. What was written since about its successor stays.
    pub(super) fn forget(&self, key: &ReplicaKey, pid: u32) {
        if self.read(key).is_some_and(|(handoff, _)| handoff.pid == Some(pid)) {
            let _ = fs::remove_file(self.file(key));
        }
    }

    /// The engine of this name that an earlier run left behind, if it lives.
    pub(super) fn find(&self, config: &Config) -> Option<Found> {
        let (handoff, kept) = self.read(&config.key())?;
        // Without start and boot a pid means nothing.
        if handoff.pid_start.is_none() || handoff.boot_id.is_none() || !is_alive(&handoff) {
            return None;
        }
        let pid = i32::try_from(handoff.pid?).ok().and_then(Pid::from_raw)?;
        Some(Found {
            pid,
            container: Container::from_value(&kept["container"]),
            main: main_process(&kept),
            cgroup: kept["cgroup"].as_str().map(PathBuf::from),
            is_unchanged: kept["fingerprint"].as_str() == Some(&fingerprint(config)),
            handoff,
        })
    }

    /// The container of an engine of this name whose client ended while nobody kept it: it still runs, and what
    /// kept it was the client.
    pub(super) fn left_behind(&self, config: &Config) -> Option<Container> {
        let (handoff, kept) = self.read(&config.key())?;
        let has_ended = handoff.boot_id.is_some() && !is_alive(&handoff);
        Container::from_value(&kept["container"]).filter(|_| has_ended && main_process(&kept).is_some())
    }

    fn read(&self, key: &ReplicaKey) -> Option<(Handoff, Value)> {
        let bytes = durable::read(&self.file(key)).ok()??;
        let kept: Value = serde_json::from_slice(&bytes).ok()?;
        match handoff::parse(kept["handoff"].to_string().as_bytes()) {
            Ok(HandoffFile::Engine(handoff)) => Some((*handoff, kept)),
            _ => None,
        }
    }

    fn file(&self, key: &ReplicaKey) -> PathBuf {
        self.directory.join(format!("{}-{}.json", key.pool, key.replica))
    }
}

/// The main process of what is kept, if it lives.
fn main_process(kept: &Value) -> Option<(u32, u64)> {
    let pid = u32::try_from(kept["container"]["main_pid"].as_u64()?).ok()?;
    let start = kept["container"]["main_start"].as_u64()?;
    let is_this_boot = kept["handoff"]["boot_id"].as_str().map(String::from) == boot_id();
    let lives = process(pid).is_some_and(|(zombie, now)| !zombie && now == start);
    (is_this_boot && lives).then_some((pid, start))
}

/// FNV-1a over everything that is configured: it only has to tell two configurations of one engine apart.
fn fingerprint(config: &Config) -> String {
    let text = format!("{config:?}");
    let hash = text
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
    format!("{hash:016x}")
}
