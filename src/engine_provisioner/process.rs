//! An engine's processes: started in a group of their own (and, where the kernel lets us, a cgroup), found
//! again after a restart of this program, signalled and reaped.
//!
//! The group is what counts: engines are trees of processes whose children keep the GPU when only the first
//! one is killed. A process that leaves the group is still in the cgroup.

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, WaitIdStatus};

use super::plan::Plan;
use crate::service::machine::{boot_id, pid_namespace, process};
use crate::wire::handoff::Handoff;

/// A running engine's processes. Dropping it kills them.
#[derive(Debug)]
pub(super) struct Engine {
    /// `None` for one that an earlier run of this program started.
    child: Option<Child>,
    pid: Pid,
    cgroup: Option<Cgroup>,
    reaped: bool,
}

impl Engine {
    /// Starts it.
    ///
    /// # Errors
    /// Why that is not possible.
    pub(super) fn spawn(plan: &Plan, log: &File, cgroup: Option<Cgroup>) -> Result<Engine, String> {
        let program = plan.command[0].to_string_lossy();
        let output =
            || log.try_clone().map(Stdio::from).map_err(|e| format!("cannot share the log file: {e}"));
        let mut child = Command::new(&plan.command[0])
            .args(&plan.command[1..])
            .envs(plan.env.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(output()?)
            .stderr(output()?)
            .process_group(0)
            .spawn()
            .map_err(|error| match error.kind() {
                io::ErrorKind::NotFound => {
                    format!("the engine's program {program:?} does not exist or is not in PATH")
                }
                io::ErrorKind::PermissionDenied => {
                    format!("the engine's program {program:?} may not be executed")
                }
                _ => format!("cannot start the engine's program {program:?}: {error}"),
            })?;
        let Some(pid) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) else {
            let _ = child.kill();
            let _ = child.wait();
            return Err("the engine has no usable process id".into());
        };
        // What it starts from now on is in there with it.
        let cgroup = cgroup.filter(|cgroup| cgroup.add(pid));
        Ok(Engine { child: Some(child), pid, cgroup, reaped: false })
    }

    /// One that runs already, and leads a group of its own.
    pub(super) fn found(pid: Pid, cgroup: Option<PathBuf>) -> Engine {
        Engine { child: None, pid, cgroup: cgroup.map(Cgroup), reaped: false }
    }

    /// Its first process, which is also its group.
    pub(super) fn pid(&self) -> u32 {
        self.pid.as_raw_nonzero().get().unsigned_abs()
    }

    /// Its cgroup's directory, if it has one of its own.
    pub(super) fn cgroup(&self) -> Option<&Path> {
        self.cgroup.as_ref().map(|cgroup| cgroup.0.as_path())
    }

    /// Becomes readable when its first process ends.
    ///
    /// # Errors
    /// Where the kernel gives no such descriptor.
    pub(super) fn descriptor(&self) -> io::Result<OwnedFd> {
        Ok(rustix::process::pidfd_open(self.pid, PidfdFlags::NONBLOCK)?)
    }

    /// `planned` with what only a running process has.
    ///
    /// # Errors
    /// Where the kernel does not tell.
    pub(super) fn complete(&self, planned: &Handoff, generation: u64) -> Result<Handoff, String> {
        // One that ended at once is still there to be read: it was not reaped.
        let (_, pid_start) =
            process(self.pid()).ok_or_else(|| format!("cannot read the start time of pid {}", self.pid()))?;
        Ok(Handoff {
            pid: Some(self.pid()),
            pid_start: Some(pid_start),
            boot_id: boot_id(),
            pid_ns: pid_namespace(),
            generation,
            ..planned.clone()
        })
    }

    /// To the whole group, and nobody else: until the first process is reaped, its id is nobody else's.
    pub(super) fn signal(&self, signal: Signal) {
        if self.reaped {
            return;
        }
        // An error means that nobody is left to signal.
        let _ = rustix::process::kill_process_group(self.pid, signal);
        if signal == Signal::KILL
            && let Some(cgroup) = &self.cgroup
        {
            cgroup.kill();
        }
    }

    /// How its first process ended, in words; it stays in the process table.
    pub(super) fn ending(&self) -> String {
        if self.child.is_none() {
            return "its process is gone".into();
        }
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT | WaitIdOptions::NOHANG;
        match rustix::process::waitid(WaitId::Pid(self.pid), options) {
            Ok(Some(status)) => describe(&status),
            _ => "its process is gone".into(),
        }
    }

    /// Its first process has ended: ends the others, and takes it out of the process table. Returns its cgroup's
    /// directory where that cannot be removed yet, because what was killed takes a moment to leave.
    pub(super) fn reap(&mut self) -> Option<PathBuf> {
        self.signal(Signal::KILL);
        if let Some(child) = &mut self.child {
            let _ = child.try_wait();
        }
        self.reaped = true;
        self.cgroup.take().map(|cgroup| cgroup.0).filter(|directory| !is_removed(directory))
    }

    /// Leaves the processes to themselves.
    pub(super) fn let_go(mut self) {
        self.reaped = true;
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        if !self.reaped {
            let _ = self.reap();
        }
    }
}

/// `exit status 3` or `killed by signal 9 (SIGKILL)`.
fn describe(status: &WaitIdStatus) -> String {
    use std::os::unix::process::ExitStatusExt;
    match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => format!("exit status {code}"),
        (None, Some(signal)) => {
            let status = std::process::ExitStatus::from_raw(signal);
            format!("killed by {}", status.to_string().replacen("signal: ", "signal ", 1))
        }
        _ => "ended".into(),
    }
}

/// Resident memory of a group in bytes, as far as /proc shows it.
pub(super) fn resident_bytes(group: u32) -> u64 {
    let mut total = 0;
    for pid in members(group) {
        let statm = fs::read_to_string(format!("/proc/{pid}/statm")).unwrap_or_default();
        let pages = statm.split_whitespace().nth(1).and_then(|n| n.parse::<u64>().ok()).unwrap_or(0);
        total += pages * rustix::param::page_size() as u64;
    }
    total
}

/// The living processes of a group.
pub(super) fn members(group: u32) -> Vec<u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|pid| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let mut fields = stat.rsplit_once(')').map_or("", |(_, rest)| rest).split_ascii_whitespace();
        let lives = fields.next().is_some_and(|state| state != "Z" && state != "X");
        lives && fields.nth(1).and_then(|text| text.parse::<u32>().ok()) == Some(group)
    })
    .collect()
}

/// A cgroup (version 2) for one engine.
#[derive(Debug)]
pub(super) struct Cgroup(PathBuf);

impl Cgroup {
    /// Makes one below this process's own. `None` where that is not possible: no version 2, or not
    /// delegated to this user.
    pub(super) fn create(name: &str) -> Option<Cgroup> {
        let own = fs::read_to_string("/proc/self/cgroup").ok()?;
        let own = own.lines().find_map(|line| line.strip_prefix("0::/"))?.to_string();
        let mounts = fs::read_to_string("/proc/self/mounts").ok()?;
        let is_v2 = |line: &&str| line.split(' ').nth(2) == Some("cgroup2");
        let root = mounts.lines().find(is_v2)?.split(' ').nth(1)?;
        let directory = Path::new(root).join(own).join(format!("engine-{name}-{}", std::process::id()));
        fs::create_dir(&directory).ok()?;
        Some(Cgroup(directory))
    }

    fn add(&self, pid: Pid) -> bool {
        let added = fs::write(self.0.join("cgroup.procs"), pid.as_raw_nonzero().to_string());
        if added.is_err() {
            let _ = fs::remove_dir(&self.0);
        }
        added.is_ok()
    }

    fn kill(&self) {
        kill_cgroup(&self.0);
    }
}

/// Whether a cgroup is gone: nobody is in it any more.
pub(super) fn is_removed(directory: &Path) -> bool {
    fs::remove_dir(directory).is_ok() || !directory.exists()
}

/// Kills everything in a cgroup. Kernels before 5.14 cannot; there the group alone must do.
pub(super) fn kill_cgroup(directory: &Path) {
    let _ = fs::write(directory.join("cgroup.kill"), "1");
}
