//! Nobody's engines: what becomes of them when their provisioner is killed outright.
//!
//! A process that receives SIGKILL cannot clean up. So the provisioner starts a second, tiny one, the
//! guardian, and tells it over a socket which groups of processes it keeps. The guardian does nothing but
//! read. When the socket ends, because its other end died with the provisioner, it ends the groups that
//! are still on its list, politely first, and then itself.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal};

use super::container::{id_in, kill};
use super::process::{kill_cgroup, members};
use crate::service::machine::process;
use crate::settings::Exit;

/// First word of the guardian's command line.
pub(super) const COMMAND: &str = "guard";
/// From SIGTERM to SIGKILL: nobody waits for the engine's last words any more.
const GRACE: Duration = Duration::from_secs(3);
/// Pause between looks at groups that were told to end.
const LOOK: Duration = Duration::from_millis(20);
/// Variables without which no container can be killed; it has no others.
const CONTAINER_VARIABLES: &[&str] =
    &["PATH", "HOME", "XDG_RUNTIME_DIR", "DOCKER_HOST", "DOCKER_CONTEXT", "CONTAINER_HOST"];
/// Groups that it keeps at most: more engines than any machine runs.
const GROUPS_MAX: usize = 1_024;
/// Buffer for reading, in bytes: many lines of numbers and a path.
const BUFFER_BYTES: usize = 8 * 1024;

/// The provisioner's end of it.
#[derive(Debug)]
pub(super) struct Guardian {
    child: Child,
    line: UnixStream,
}

impl Guardian {
    /// Starts it. `prefix` are the words that make this executable an engine-provisioner.
    ///
    /// # Errors
    /// Where no process or socket can be had.
    pub(super) fn start(prefix: &[OsString]) -> io::Result<Guardian> {
        let (line, theirs) = UnixStream::pair()?;
        // A guardian that does not read must not hold up anybody.
        line.set_nonblocking(true)?;
        let child = Command::new(std::env::current_exe()?)
            // A name of its own: whoever kills all provisioners by name does not mean it.
            .arg0("engine-guardian")
            .args(prefix)
            .arg(COMMAND)
            .env_clear()
            .envs(CONTAINER_VARIABLES.iter().filter_map(|name| Some((name, std::env::var_os(name)?))))
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()?;
        Ok(Guardian { child, line })
    }

    /// Becomes readable when it ends.
    ///
    /// # Errors
    /// Where the kernel gives no such descriptor.
    pub(super) fn descriptor(&self) -> io::Result<OwnedFd> {
        let pid = Pid::from_child(&self.child);
        Ok(rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::NONBLOCK)?)
    }

    /// A group is to end with this process.
    pub(super) fn keep(&mut self, group: u32, start: u64, cgroup: Option<&Path>) {
        let cgroup = cgroup.map(|path| path.display().to_string()).unwrap_or_default();
        self.tell(&format!("+ {group} {start} {cgroup}\n"));
    }

    /// A group is only the client of a container, which `tool` knows by the id in a file.
    pub(super) fn contains(&mut self, group: u32, tool: &OsStr, id_file: &Path) {
        self.tell(&format!("c {group} {}\t{}\n", tool.to_string_lossy(), id_file.display()));
    }

    /// A group has ended.
    pub(super) fn forget(&mut self, group: u32) {
        self.tell(&format!("- {group}\n"));
    }

    fn tell(&mut self, text: &str) {
        if let Err(error) = self.line.write_all(text.as_bytes()) {
            log::warn!("the guardian of the engines does not listen: {error}");
        }
    }

    /// It ended: takes it out of the process table.
    pub(super) fn reap(mut self) {
        let _ = self.child.try_wait();
    }
}

impl Drop for Guardian {
    /// Its list is empty when this program ends in good order, so it has nothing to wait for.
    fn drop(&mut self) {
        let _ = self.line.shutdown(std::net::Shutdown::Both);
        let _ = self.child.wait();
    }
}

/// What it knows of a group.
struct Group {
    start: u64,
    cgroup: Option<PathBuf>,
    /// Who knows its container, and the file with that one's id.
    container: Option<(OsString, PathBuf)>,
}

/// The guardian itself: reads standard input to its end, then ends what is left.
///
/// # Errors
/// Where no signal handler can be installed.
pub(super) fn run() -> Result<(), Exit> {
    // Who stops the whole service means the provisioner, and that tells it what remains.
    for signal in [signal_hook::consts::SIGTERM, signal_hook::consts::SIGINT, signal_hook::consts::SIGHUP] {
        signal_hook::flag::register(signal, std::sync::Arc::default())
            .map_err(|error| Exit::runtime(error.to_string()))?;
    }
    let mut groups = BTreeMap::new();
    for line in BufReader::with_capacity(BUFFER_BYTES, io::stdin().lock()).lines().map_while(Result::ok) {
        take(&line, &mut groups);
    }
    end(&groups);
    Ok(())
}

fn take(line: &str, groups: &mut BTreeMap<u32, Group>) {
    if let Some((group, container)) = line.strip_prefix("c ").and_then(|rest| rest.split_once(' ')) {
        let known = group.parse().ok().and_then(|group| groups.get_mut(&group));
        if let (Some(known), Some((tool, file))) = (known, container.split_once('\t')) {
            known.container = Some((tool.into(), file.into()));
        }
        return;
    }
    let mut words = line.splitn(4, ' ');
    let (Some(sign), Some(Ok(group))) = (words.next(), words.next().map(str::parse)) else { return };
    match (sign, words.next().map(str::parse)) {
        ("+", Some(Ok(start))) if groups.len() < GROUPS_MAX => {
            let cgroup = words.next().filter(|path| !path.is_empty()).map(PathBuf::from);
            groups.insert(group, Group { start, cgroup, container: None });
        }
        ("-", _) => {
            groups.remove(&group);
        }
        _ => {}
    }
}

fn end(groups: &BTreeMap<u32, Group>) {
    let all = |signal| {
        for (group, known) in groups.iter().filter(|(group, known)| is_it(**group, known)) {
            if let Some(pid) = i32::try_from(*group).ok().and_then(Pid::from_raw) {
                let _ = rustix::process::kill_process_group(pid, signal);
            }
            if signal == Signal::KILL
                && let Some(cgroup) = &known.cgroup
            {
                kill_cgroup(cgroup);
            }
        }
    };
    all(Signal::TERM);
    let deadline = Instant::now() + GRACE;
    while Instant::now() < deadline && groups.keys().any(|group| !members(*group).is_empty()) {
        thread::sleep(LOOK);
    }
    all(Signal::KILL);
    // A client passes SIGTERM on, and nothing after its own end.
    for (tool, file) in groups.values().filter_map(|known| known.container.as_ref()) {
        if let Some(id) = id_in(file) {
            kill(tool, &id);
        }
        let _ = std::fs::remove_file(file);
    }
    thread::sleep(LOOK);
    for cgroup in groups.values().filter_map(|known| known.cgroup.as_ref()) {
        let _ = std::fs::remove_dir(cgroup);
    }
}

/// Whether a group is the one that was told: its first process started then, or has ended while others
/// still keep its number from being given to anybody else.
fn is_it(group: u32, known: &Group) -> bool {
    match process(group) {
        Some((_, start)) => start == known.start,
        None => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_told_and_not_taken_back_is_ended() {
        let mut groups = BTreeMap::new();
        for line in [
            "+ 5 100 ",
            "+ 6 200 /a b/c",
            "- 5",
            "+ x 1 ",
            "",
            "+ 7",
            "? 6 1",
            "- 99",
            "c 6 docker\t/a b",
            "c 9 x\ty",
        ] {
            take(line, &mut groups);
        }
        assert_eq!(groups.keys().copied().collect::<Vec<_>>(), [6]);
        assert_eq!(groups[&6].cgroup.as_deref(), Some(Path::new("/a b/c")));
        assert_eq!(groups[&6].container, Some(("docker".into(), "/a b".into())));
        assert!(
            !is_it(std::process::id(), &Group { start: 1, cgroup: None, container: None }),
            "another process by now"
        );
        for n in 0..2 * GROUPS_MAX {
            take(&format!("+ {n} 1 "), &mut groups);
        }
        assert_eq!(groups.len(), GROUPS_MAX);
    }
}
