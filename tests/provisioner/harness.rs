//! Runs the real `engine-provisioner` and watches what it does from outside.
//!
//! A test that fails leaves no process behind: dropping a [`Provisioner`] stops it the way an operator
//! would, and kills what is left of it and of its engine after that.

use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use llama_orch::wire::handoff::{self, Handoff, HandoffFile};
use rustix::process::{Pid, Signal};
use serde_json::Value;

/// Far longer than anything here takes, so that only a hang reaches it.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);
/// Pause between two looks at a condition.
const LOOK: Duration = Duration::from_millis(2);

/// The program under test, to which SIGHUP means something whoever started the tests: one that is started with that
/// signal ignored, as nohup does, leaves it ignored, and children inherit it.
pub(crate) fn program() -> Command {
    let mut command = Command::new("/usr/bin/env");
    command.args(["--default-signal=HUP", env!("CARGO_BIN_EXE_engine-provisioner")]);
    command
}

/// A running `engine-provisioner` for `pool-0/r0`.
pub(crate) struct Provisioner {
    child: Child,
    events: Receiver<Value>,
    errors: Option<JoinHandle<String>>,
    engine: Option<u32>,
    spawned: Option<u32>,
    /// The directory that its handoff goes to.
    pub(crate) handoff_dir: PathBuf,
}

impl Provisioner {
    /// Starts it with its directories under `root`, further `flags`, and the engine's `command`.
    pub(crate) fn start(root: &Path, flags: &[&str], command: &[impl AsRef<OsStr>]) -> Provisioner {
        Provisioner::start_with(root, flags, command, &[])
    }

    /// The same with further variables.
    pub(crate) fn start_with(
        root: &Path,
        flags: &[&str],
        command: &[impl AsRef<OsStr>],
        variables: &[(&str, &OsStr)],
    ) -> Provisioner {
        Provisioner::start_by(program(), root, flags, command, variables)
    }

    /// The same, started by a `program` that becomes it.
    pub(crate) fn start_by(
        mut program: Command,
        root: &Path,
        flags: &[&str],
        command: &[impl AsRef<OsStr>],
        variables: &[(&str, &OsStr)],
    ) -> Provisioner {
        let handoff_dir = root.join("engines");
        let mut child = program
            .args(["run", "--pool", "pool-0", "--replica", "r0", "--report"])
            // A test that wants an engine to be started again says so.
            .args(if flags.contains(&"--restart=always") { None } else { Some("--restart=never") })
            .args(flags)
            .arg("--")
            .args(command)
            .env("ENGINE_PROVISIONER_HANDOFF_DIR", &handoff_dir)
            // No test is to write into the user's own.
            .env("ENGINE_PROVISIONER_CACHE_DIR", root.join("cache"))
            .env_remove("ENGINE_PROVISIONER_GPU_MASK")
            .env_remove("LLORCH_REQUIRE_GPU")
            // Where nobody listens: what runs on this machine is no part of a test.
            .env("POOL_MANAGERD_URL", "http://127.0.0.1:1")
            .env_remove("RUST_LOG")
            .envs(variables.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the binary under test starts");
        let (sender, events) = channel();
        let out = BufReader::new(child.stdout.take().expect("a piped stdout"));
        thread::spawn(move || {
            for line in out.lines().map_while(Result::ok) {
                let event = serde_json::from_str(&line).expect("one JSON object a line");
                if sender.send(event).is_err() {
                    return;
                }
            }
        });
        let mut err = child.stderr.take().expect("a piped stderr");
        let errors = thread::spawn(move || {
            let mut text = String::new();
            let _ = err.read_to_string(&mut text);
            text
        });
        Provisioner { child, events, errors: Some(errors), engine: None, spawned: None, handoff_dir }
    }

    /// Waits for the event `name`, which has to be the next one.
    pub(crate) fn event(&mut self, name: &str) -> Value {
        self.event_within(name, PATIENCE)
    }

    /// As [`Provisioner::event`], with a limit of its own.
    pub(crate) fn event_within(&mut self, name: &str, limit: Duration) -> Value {
        match self.events.recv_timeout(limit) {
            Ok(event) => {
                let pid = event["pid"].as_u64().and_then(|pid| u32::try_from(pid).ok());
                self.engine = pid.or(self.engine);
                if event["event"] == "spawned" {
                    self.spawned = pid;
                }
                assert_eq!(event["event"], name, "{event}");
                event
            }
            Err(RecvTimeoutError::Timeout) => panic!("no event {name:?} within {limit:?}"),
            Err(RecvTimeoutError::Disconnected) => panic!("it ended before {name:?}: {}", self.end().1),
        }
    }

    /// Process and group of the engine, once its first event was seen.
    pub(crate) fn engine(&self) -> u32 {
        self.engine.expect("the engine was started")
    }

    /// The process that was started last: the engine's, or a client of its container.
    pub(crate) fn spawned(&self) -> u32 {
        self.spawned.expect("something was started")
    }

    /// The provisioner's own process.
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Where the handoff of `pool-0/r0` belongs.
    pub(crate) fn handoff_file(&self) -> PathBuf {
        self.handoff_dir.join("pool-0-r0.json")
    }

    /// The handoff as a reader of the directory sees it.
    pub(crate) fn handoff(&self) -> Option<Handoff> {
        let bytes = fs::read(self.handoff_file()).ok()?;
        match handoff::parse(&bytes).expect("what is visible is complete") {
            HandoffFile::Engine(handoff) => Some(*handoff),
            HandoffFile::ModelOnly => panic!("a handoff without a URL"),
        }
    }

    /// Everything in the handoff directory, temporary files included.
    pub(crate) fn files(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.handoff_dir).into_iter().flatten().flatten();
        let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
        // Where it listens for orders stays.
        names.filter(|name| name != ".provisioners").collect()
    }

    /// Sends the provisioner a signal.
    pub(crate) fn signal(&self, signal: Signal) {
        rustix::process::kill_process(pid(self.child.id()), signal).expect("the provisioner is there");
    }

    /// Whether it ended, in whatever way.
    pub(crate) fn is_gone(&mut self) -> bool {
        self.child.try_wait().expect("a child can be waited for").is_some()
    }

    /// Waits for its end: the exit code, and what it said on stderr.
    pub(crate) fn end(&mut self) -> (i32, String) {
        let status =
            until("the provisioner ends", || self.child.try_wait().expect("a child can be waited for"));
        let said = self.errors.take().expect("only asked once").join().expect("the reader has ended");
        (status.code().expect("it was not killed"), said)
    }
}

impl Drop for Provisioner {
    fn drop(&mut self) {
        while let Ok(event) = self.events.try_recv() {
            self.engine = event["pid"].as_u64().and_then(|pid| u32::try_from(pid).ok()).or(self.engine);
        }
        if let Ok(None) = self.child.try_wait() {
            let _ = rustix::process::kill_process(pid(self.child.id()), Signal::TERM);
            let deadline = Instant::now() + Duration::from_secs(8);
            while Instant::now() < deadline && matches!(self.child.try_wait(), Ok(None)) {
                thread::sleep(LOOK);
            }
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        if let Some(engine) = self.engine.filter(|engine| !group(*engine).is_empty()) {
            let _ = rustix::process::kill_process_group(pid(engine), Signal::KILL);
        }
    }
}

/// Looks again and again until there is something, or the test has hung.
pub(crate) fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "waited in vain: {what}");
        thread::sleep(LOOK);
    }
}

/// Waits until nobody runs in the process group `leader` any more.
pub(crate) fn until_group_is_gone(leader: u32) {
    until("the process group is gone", || group(leader).is_empty().then_some(()));
}

/// Processes of a group that still run; zombies hold nothing any more and do not count.
pub(crate) fn group(leader: u32) -> Vec<u32> {
    let entries = fs::read_dir("/proc").expect("/proc is mounted").flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_string_lossy().parse::<u32>().ok());
    pids.filter(|pid| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let mut fields = stat.rsplit_once(')').map_or("", |(_, rest)| rest).split_ascii_whitespace();
        let runs = fields.next().is_some_and(|state| state != "Z" && state != "X");
        runs && fields.nth(1) == Some(leader.to_string().as_str())
    })
    .collect()
}

/// A process id as rustix takes it.
pub(crate) fn pid(raw: u32) -> Pid {
    i32::try_from(raw).ok().and_then(Pid::from_raw).expect("a process id")
}

/// An HTTP client that hangs no test and follows nobody's proxy.
pub(crate) fn client() -> ureq::Agent {
    ureq::Agent::config_builder()
        .timeout_global(Some(PATIENCE))
        .proxy(None)
        .http_status_as_error(false)
        .build()
        .new_agent()
}
