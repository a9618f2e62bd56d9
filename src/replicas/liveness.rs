//! The shell around engine processes: the kernel says when one ends.
//!
//! A handoff names its engine by a pid, and a pid alone means little: it may belong to another boot,
//! another pid namespace, or a successor. So a process is opened first and held against what the
//! handoff says about its start afterwards: from then on the descriptor means that process and no
//! other. It becomes readable when the process has ended, and nothing has to be asked in between.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open, test_kill_process};

use crate::reactor::token::{Kind, Table, Token};
use crate::reactor::{Descriptor, Registry};
use crate::service::machine;
use crate::wire::id::ReplicaKey;

use super::process::{ProcessOrder, ProcessSeen};

/// Most processes that are watched at once, each with a descriptor; beyond it probes must do.
pub const PROCESSES_MAX: usize = 1_024;

/// The processes under watch.
#[derive(Debug)]
pub struct Processes {
    watched: Table<Watched>,
    by_replica: BTreeMap<ReplicaKey, Token>,
    boot_id: Option<String>,
    pid_namespace: Option<u64>,
}

#[derive(Debug)]
struct Watched {
    key: ReplicaKey,
    generation: u64,
    pid: u32,
    descriptor: Descriptor,
}

impl Processes {
    /// None yet.
    #[must_use]
    pub fn new() -> Processes {
        Processes {
            watched: Table::new(Kind::Process),
            by_replica: BTreeMap::new(),
            boot_id: machine::boot_id(),
            pid_namespace: machine::pid_namespace(),
        }
    }

    /// Carries out an order. What is seen at once is returned.
    pub fn carry_out(
        &mut self,
        order: ProcessOrder,
        registry: &Registry,
    ) -> Option<(ReplicaKey, u64, ProcessSeen)> {
        match order {
            ProcessOrder::Forget { key } => {
                self.forget(&key, registry);
                None
            }
            ProcessOrder::Watch { key, generation, pid, pid_start, boot_id, pid_ns } => {
                self.forget(&key, registry);
                let is_elsewhere = pid_ns.is_some() && pid_ns != self.pid_namespace;
                let seen = if is_elsewhere {
                    ProcessSeen::Unknown("it runs in another pid namespace".into())
                } else if boot_id.is_some() && boot_id != self.boot_id {
                    ProcessSeen::Ended(format!("process {pid} belongs to an earlier boot of this machine"))
                } else {
                    self.watch(&key, generation, pid, pid_start, registry)
                };
                Some((key, generation, seen))
            }
        }
    }

    /// A descriptor became readable.
    pub fn ended(&mut self, token: Token, registry: &Registry) -> Option<(ReplicaKey, u64, ProcessSeen)> {
        let watched = self.watched.remove(token)?;
        watched.descriptor.deregister(registry);
        self.by_replica.remove(&watched.key);
        let seen = ProcessSeen::Ended(format!("process {} ended", watched.pid));
        Some((watched.key, watched.generation, seen))
    }

    fn watch(
        &mut self,
        key: &ReplicaKey,
        generation: u64,
        pid: u32,
        pid_start: Option<u64>,
        registry: &Registry,
    ) -> ProcessSeen {
        if self.watched.len() >= PROCESSES_MAX {
            return ProcessSeen::Unknown(format!("{PROCESSES_MAX} processes are watched already"));
        }
        let descriptor = match open(pid) {
            Ok(descriptor) => descriptor,
            Err(Errno::SRCH) => return ProcessSeen::Ended(format!("there is no process {pid}")),
            Err(error) => return ProcessSeen::Unknown(format!("process {pid} cannot be watched: {error}")),
        };
        // Read after the open: if this is the process that is meant, so is the one that was opened.
        match machine::process(pid) {
            // A /proc that shows no other user's processes (hidepid) tells nothing.
            None if exists(pid) => {
                return ProcessSeen::Unknown(format!("/proc does not show process {pid} to this user"));
            }
            None | Some((true, _)) => return ProcessSeen::Ended(format!("process {pid} ended")),
            Some((false, started)) if pid_start.is_some_and(|meant| meant != started) => {
                return ProcessSeen::Ended(format!(
                    "process {pid} is another one than the handoff means: it started {started} clock ticks after boot"
                ));
            }
            Some(_) => {}
        }
        let made = self.watched.insert_with(|token| {
            let descriptor = Descriptor::register(descriptor, registry, token)?;
            Ok::<_, std::io::Error>(Watched { key: key.clone(), generation, pid, descriptor })
        });
        match made {
            Ok(token) => {
                self.by_replica.insert(key.clone(), token);
                ProcessSeen::Alive
            }
            Err(error) => ProcessSeen::Unknown(format!("process {pid} cannot be watched: {error}")),
        }
    }

    fn forget(&mut self, key: &ReplicaKey, registry: &Registry) {
        if let Some(watched) = self.by_replica.remove(key).and_then(|token| self.watched.remove(token)) {
            watched.descriptor.deregister(registry);
        }
    }
}

impl Default for Processes {
    fn default() -> Processes {
        Processes::new()
    }
}

/// Whether there is such a process, of whichever user.
fn exists(pid: u32) -> bool {
    Pid::from_raw(pid.cast_signed()).is_some_and(|pid| !matches!(test_kill_process(pid), Err(Errno::SRCH)))
}

fn open(pid: u32) -> Result<OwnedFd, Errno> {
    let pid = Pid::from_raw(pid.cast_signed()).ok_or(Errno::SRCH)?;
    pidfd_open(pid, PidfdFlags::NONBLOCK)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reactor::Reactor;
    use crate::wire::id::{PoolId, ReplicaId};
    use std::process::{Child, Command};

    fn key(replica: &str) -> ReplicaKey {
        ReplicaKey {
            pool: PoolId::new("p").expect("an id"),
            replica: ReplicaId::new(replica).expect("an id"),
        }
    }

    fn sleeper() -> Child {
        Command::new("sleep").arg("600").spawn().expect("a process")
    }

    fn order(child: &Child, pid_start: Option<u64>) -> ProcessOrder {
        let (boot_id, pid_ns) = (machine::boot_id(), machine::pid_namespace());
        ProcessOrder::Watch { key: key("r0"), generation: 7, pid: child.id(), pid_start, boot_id, pid_ns }
    }

    #[test]
    fn the_kernel_says_when_the_process_that_is_meant_ends() {
        let mut reactor = Reactor::new().expect("a reactor");
        let registry = reactor.registry().expect("a registry");
        let mut processes = Processes::new();
        let mut child = sleeper();
        let (_, started) = machine::process(child.id()).expect("it runs");
        let (_, generation, seen) =
            processes.carry_out(order(&child, Some(started)), &registry).expect("an answer");
        assert_eq!((generation, seen), (7, ProcessSeen::Alive));
        child.kill().expect("killed");
        reactor.wait(None, false).expect("an event");
        let (token, _) = reactor.events().next().expect("an event");
        let (who, generation, seen) = processes.ended(token, &registry).expect("it was watched");
        assert_eq!((who, generation), (key("r0"), 7));
        assert_eq!(seen, ProcessSeen::Ended(format!("process {} ended", child.id())));
        assert!(processes.ended(token, &registry).is_none(), "told once");
        // Ended and not reaped, then reaped: it is not alive either way.
        for _ in 0..2 {
            let seen = processes.carry_out(order(&child, Some(started)), &registry).expect("an answer").2;
            assert!(matches!(seen, ProcessSeen::Ended(_)), "{seen:?}");
            child.wait().expect("reaped");
        }
    }

    #[test]
    fn another_start_another_boot_and_another_namespace_are_told_apart() {
        let reactor = Reactor::new().expect("a reactor");
        let registry = reactor.registry().expect("a registry");
        let mut processes = Processes::new();
        let mut child = sleeper();
        let (_, started) = machine::process(child.id()).expect("it runs");
        let mut see = |change: &dyn Fn(&mut ProcessOrder)| {
            let mut order = order(&child, None);
            change(&mut order);
            processes.carry_out(order, &registry).expect("an answer").2
        };
        assert_eq!(see(&|_| {}), ProcessSeen::Alive);
        let start = |to: u64| {
            move |order: &mut ProcessOrder| {
                if let ProcessOrder::Watch { pid_start, .. } = order {
                    *pid_start = Some(to);
                }
            }
        };
        assert_eq!(see(&start(started)), ProcessSeen::Alive);
        let other = see(&start(started + 1));
        assert!(matches!(&other, ProcessSeen::Ended(why) if why.contains("another one")), "{other:?}");
        let boot = see(&|order| {
            if let ProcessOrder::Watch { boot_id, .. } = order {
                *boot_id = Some("another".into());
            }
        });
        assert!(matches!(&boot, ProcessSeen::Ended(why) if why.contains("earlier boot")), "{boot:?}");
        let elsewhere = see(&|order| {
            if let ProcessOrder::Watch { pid_ns, pid_start, .. } = order {
                (*pid_ns, *pid_start) = (Some(1), Some(1));
            }
        });
        assert!(matches!(elsewhere, ProcessSeen::Unknown(_)), "{elsewhere:?}");
        child.kill().expect("killed");
        child.wait().expect("reaped");
    }
}
