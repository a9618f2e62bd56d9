//! The processes that `up` started, and their end.
//!
//! Each runs in a process group of its own, so that a Ctrl-C at the terminal reaches only `up`, which
//! ends them in order: the daemons first, while the engine still lets their streams finish, then the
//! provisioner, which withdraws the handoff and ends the engine. Dropping [`Children`] does the same,
//! on every way out. An `up` that is killed outright cannot: therefore its children ask the kernel for
//! a SIGTERM at its end ([`super::end_with_parent`]).

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal};

use super::{Interrupt, PARENT_VARIABLE};

/// How long running streams may take to finish at the end, in milliseconds.
pub(super) const DRAIN_TIMEOUT_MS: u64 = 2_000;
/// From SIGTERM to SIGKILL for the daemons: their drain, and some time to leave.
const DAEMON_GRACE: Duration = Duration::from_millis(DRAIN_TIMEOUT_MS + 1_000);
/// From SIGTERM to SIGKILL for the provisioner, which gives its engine five seconds itself.
const PROVISIONER_GRACE: Duration = Duration::from_secs(6);
/// How long a killed process is waited for.
const KILL_GRACE: Duration = Duration::from_secs(2);
/// Pause between looks at a process that was told to end.
const LOOK: Duration = Duration::from_millis(2);
/// Lines of a log that a failure shows: a provisioner's failure repeats twenty of its engine.
const LOG_TAIL_LINES: usize = 24;
/// Bytes of a log that are searched for them.
const LOG_TAIL_BYTES: u64 = 16 * 1024;
/// Longest line shown of them, in characters.
const LOG_LINE_CHARS_MAX: usize = 300;
/// Variables that configure the daemons. What `up` starts is what `up` says, so they are not inherited.
const PREFIXES: [&str; 5] = ["ORCHESTRATORD_", "ORCHD_", "POOL_MANAGERD_", "ENGINE_PROVISIONER_", "LLORCH_"];

/// One of them.
struct Running {
    name: &'static str,
    child: Child,
    log: PathBuf,
    /// Where this run's part of the log begins.
    log_start: u64,
    ended: Option<ExitStatus>,
}

/// All of them, in the order of their start.
pub(super) struct Children {
    program: PathBuf,
    logs: PathBuf,
    running: Vec<Running>,
    engine: Option<u32>,
    interrupt: Interrupt,
}

impl Children {
    /// None yet; they will be `program`, with their output in the directory `logs`.
    pub(super) fn new(program: PathBuf, logs: PathBuf, interrupt: Interrupt) -> Children {
        Children { program, logs, running: Vec::new(), engine: None, interrupt }
    }

    /// Starts the program `name`. Its standard output goes to its log as well, unless it is wanted.
    pub(super) fn spawn(
        &mut self,
        name: &'static str,
        args: Vec<OsString>,
        wants_output: bool,
    ) -> Result<Option<ChildStdout>, String> {
        let log = self.logs.join(format!("{name}.log"));
        let failed = |what: &str, error: io::Error| format!("{what} {}: {error}", log.display());
        let open = OpenOptions::new().append(true).create(true).mode(0o640).open(&log);
        let file = open.map_err(|error| failed("cannot open", error))?;
        let log_start = file.metadata().map_err(|error| failed("cannot read", error))?.len();
        let output = || file.try_clone().map(Stdio::from).map_err(|error| failed("cannot share", error));
        let mut command = Command::new(&self.program);
        for (variable, _) in std::env::vars_os() {
            let text = variable.to_string_lossy();
            if matches!(&*text, "AUTH_TOKEN" | "CREDENTIALS_DIRECTORY")
                || PREFIXES.iter().any(|prefix| text.starts_with(prefix))
            {
                command.env_remove(&variable);
            }
        }
        let mut child = command
            .arg(name)
            .args(args)
            .env(PARENT_VARIABLE, std::process::id().to_string())
            .stdin(Stdio::null())
            .stdout(if wants_output { Stdio::piped() } else { output()? })
            .stderr(output()?)
            .process_group(0)
            .spawn()
            .map_err(|error| format!("cannot start {name}: {error}"))?;
        let stdout = child.stdout.take();
        self.running.push(Running { name, child, log, log_start, ended: None });
        Ok(stdout)
    }

    /// The engine's process group was told: it is ended too, whatever becomes of its keeper.
    pub(super) fn note_engine(&mut self, pid: u32) {
        self.engine = Some(pid);
    }

    /// Looks whether all still run.
    ///
    /// # Errors
    /// What ended, how, and its last words.
    pub(super) fn check(&mut self) -> Result<(), String> {
        for running in &mut self.running {
            if let Some(status) = running.look() {
                let words = running.last_lines().unwrap_or_default();
                let told = if words.is_empty() { "; it said nothing".into() } else { format!(":\n{words}") };
                return Err(format!("{} ended ({status}){told}", running.name));
            }
        }
        Ok(())
    }

    /// Ends all, in order, and waits for them; an interrupt meanwhile ends them at once. Returns the
    /// names of those that had to be killed.
    pub(super) fn end(&mut self) -> Vec<&'static str> {
        self.interrupt.clear();
        let mut killed = Vec::new();
        for (is_daemon, grace) in [(true, DAEMON_GRACE), (false, PROVISIONER_GRACE)] {
            let mut stage: Vec<_> =
                self.running.iter_mut().filter(|running| running.is_daemon() == is_daemon).collect();
            stage.iter_mut().for_each(|running| running.signal(Signal::TERM));
            let deadline = Instant::now() + grace;
            while stage.iter_mut().any(|running| running.look().is_none())
                && Instant::now() < deadline
                && !self.interrupt.is_set()
            {
                thread::sleep(LOOK);
            }
            for running in stage {
                if running.look().is_none() {
                    running.kill();
                    killed.push(running.name);
                }
            }
        }
        // A provisioner that ended by itself has ended its engine.
        let keeper = self.running.iter().find(|running| !running.is_daemon());
        let abandoned = keeper.is_some_and(|keeper| keeper.ended.is_none_or(|s| s.signal().is_some()));
        if let Some(group) = self.engine.take().filter(|_| abandoned).and_then(pid)
            && rustix::process::kill_process_group(group, Signal::KILL).is_ok()
        {
            killed.push("the engine");
        }
        self.running.clear();
        killed
    }
}

impl Drop for Children {
    fn drop(&mut self) {
        self.end();
    }
}

impl Running {
    fn is_daemon(&self) -> bool {
        self.name != "engine-provisioner"
    }

    /// How it ended, once it has.
    fn look(&mut self) -> Option<ExitStatus> {
        if self.ended.is_none() {
            self.ended = self.child.try_wait().unwrap_or_default();
        }
        self.ended
    }

    /// Only to one that was not reaped: its id is nobody else's until then.
    fn signal(&mut self, signal: Signal) {
        if self.look().is_none()
            && let Some(pid) = pid(self.child.id())
        {
            let _ = rustix::process::kill_process(pid, signal);
        }
    }

    fn kill(&mut self) {
        if let Some(group) = pid(self.child.id()) {
            let _ = rustix::process::kill_process_group(group, Signal::KILL);
        }
        let deadline = Instant::now() + KILL_GRACE;
        while self.look().is_none() && Instant::now() < deadline {
            thread::sleep(LOOK);
        }
    }

    /// The end of what it wrote in this run, indented; `None` if that cannot be read.
    fn last_lines(&self) -> Option<String> {
        let mut file = File::open(&self.log).ok()?;
        let length = file.metadata().ok()?.len();
        file.seek(SeekFrom::Start(self.log_start.max(length.saturating_sub(LOG_TAIL_BYTES)))).ok()?;
        let mut bytes = Vec::new();
        file.take(LOG_TAIL_BYTES).read_to_end(&mut bytes).ok()?;
        Some(indented_tail(&String::from_utf8_lossy(&bytes)))
    }
}

/// As a terminal may show it: no control characters, no blank lines.
fn indented_tail(text: &str) -> String {
    let shown = |line: &str| -> String {
        line.chars().filter(|c| !c.is_control()).take(LOG_LINE_CHARS_MAX).collect()
    };
    let lines: Vec<String> = text.lines().map(shown).filter(|line| !line.trim().is_empty()).collect();
    let tail: Vec<String> = lines[lines.len().saturating_sub(LOG_TAIL_LINES)..]
        .iter()
        .map(|line| format!("  {}", line.trim_end()))
        .collect();
    tail.join("\n")
}

fn pid(raw: u32) -> Option<Pid> {
    i32::try_from(raw).ok().and_then(Pid::from_raw)
}

/// A directory of one run: engines' handoffs, logs, state. A temporary one is removed by
/// [`Home::remove`].
pub(super) struct Home {
    /// Its absolute path.
    pub(super) path: PathBuf,
    is_temporary: bool,
}

impl Home {
    /// Takes `wanted`, or makes a temporary directory that only this user can read.
    pub(super) fn create(wanted: Option<&Path>) -> Result<Home, String> {
        let (path, is_temporary) = match wanted {
            Some(path) => (std::path::absolute(path).map_err(|e| format!("{}: {e}", path.display()))?, false),
            None => {
                let name = format!("llorch-up-{}-{:08x}", std::process::id(), fastrand::u32(..));
                (std::env::temp_dir().join(name), true)
            }
        };
        // A temporary directory that exists belongs to somebody else.
        let mut builder = std::fs::DirBuilder::new();
        std::os::unix::fs::DirBuilderExt::mode(builder.recursive(!is_temporary), 0o750);
        let failed = |at: &Path, error: io::Error| format!("cannot create {}: {error}", at.display());
        builder.create(&path).map_err(|error| failed(&path, error))?;
        let home = Home { path, is_temporary };
        builder.recursive(true);
        for name in ["engines", "logs", "state"] {
            let directory = home.path.join(name);
            builder.create(&directory).map_err(|error| failed(&directory, error))?;
        }
        Ok(home)
    }

    /// Removes it if it is temporary. What is left, in words.
    pub(super) fn remove(&self) -> String {
        if !self.is_temporary {
            return format!("logs and state stay in {}", self.path.display());
        }
        match std::fs::remove_dir_all(&self.path) {
            Ok(()) => "left nothing behind".into(),
            Err(error) => format!("cannot remove {}: {error}", self.path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_is_shown_by_its_end_without_what_could_command_a_terminal() {
        let text: String = (0..100).map(|n| format!("line {n}\n\n")).collect();
        let tail = indented_tail(&(text + "\u{1b}[31mlast words\r\n"));
        assert_eq!(tail.lines().count(), LOG_TAIL_LINES);
        assert_eq!(tail.lines().last(), Some("  [31mlast words"));
        assert!(indented_tail(&"x".repeat(10_000)).len() <= LOG_LINE_CHARS_MAX + 2);
        assert_eq!(indented_tail("\n \n"), "");
    }
}
