//! The processes and the directory of `llorch up`, and the promise that neither outlives it.
//!
//! Each child leads a process group of its own, so that a Ctrl-C at the terminal reaches `up` alone,
//! which then ends the children in order: the engine first, so that its handoff goes before the control
//! plane does.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use serde_json::Value;

use crate::settings::Exit;

use super::ask;

/// Reports of the provisioner that wait to be read: it makes four.
const REPORTS_MAX: usize = 64;
/// How long a child may take to end by itself; the provisioner gives its engine five seconds.
const END_WAIT: Duration = Duration::from_secs(8);
/// Last lines of a log that a failure shows.
const LOG_LINES: usize = 8;
/// Ports that `up` takes where it stays.
const CONTROL_PORT: u16 = 8080;
const AGENT_PORT: u16 = 9200;

/// Everything that `up` owns.
pub(super) struct Home {
    program: PathBuf,
    directory: PathBuf,
    temporary: bool,
    children: Vec<Running>,
    reports: Option<Receiver<Value>>,
    interrupted: Arc<AtomicBool>,
}

struct Running {
    name: &'static str,
    child: Child,
    log: PathBuf,
}

impl Home {
    /// A home in `directory`, or in a temporary one.
    pub(super) fn new(directory: Option<PathBuf>, interrupted: Arc<AtomicBool>) -> Result<Home, Exit> {
        let program = std::env::current_exe()
            .map_err(|error| Exit::runtime(format!("cannot find this program's own file: {error}")))?;
        let temporary = directory.is_none();
        let directory = match directory {
            Some(directory) => directory,
            None => {
                let name = format!("llorch-up-{}-{:08x}", std::process::id(), fastrand::u32(..));
                std::env::temp_dir().join(name)
            }
        };
        for part in ["engines", "logs", "state"] {
            fs::create_dir_all(directory.join(part)).map_err(|error| {
                let path = directory.display();
                Exit::runtime(format!(
                    "cannot create {path}/{part}: {error}; name another directory with --dir"
                ))
            })?;
        }
        let directory = directory
            .canonicalize()
            .map_err(|error| Exit::runtime(format!("cannot use {}: {error}", directory.display())))?;
        Ok(Home { program, directory, temporary, children: Vec::new(), reports: None, interrupted })
    }

    /// Where handoffs appear.
    pub(super) fn engines(&self) -> PathBuf {
        self.directory.join("engines")
    }

    /// Set by SIGINT and SIGTERM.
    pub(super) fn interrupted(&self) -> &AtomicBool {
        &self.interrupted
    }

    /// Leaves the temporary directory in place: its logs are needed.
    pub(super) fn keep_directory(&mut self) {
        self.temporary = false;
    }

    /// Waits a little.
    ///
    /// # Errors
    /// When interrupted.
    pub(super) fn pause(&self, pause: Duration) -> Result<(), Exit> {
        std::thread::sleep(pause);
        if self.interrupted.load(Ordering::Relaxed) { Err(Exit::runtime("interrupted")) } else { Ok(()) }
    }

    /// Starts control plane and node agent and waits until both answer. Returns their ports.
    pub(super) fn start_daemons(
        &mut self,
        once: bool,
        port: Option<u16>,
        wait: Duration,
    ) -> Result<(u16, u16), Exit> {
        let control = free_port(port.or((!once).then_some(CONTROL_PORT)), "--port PORT chooses another")?;
        let agent = match (!once).then_some(AGENT_PORT).filter(|port| is_free(*port)) {
            Some(port) => port,
            None => free_port(None, "")?,
        };
        let engines = self.engines();
        let listen = |port: u16| OsString::from(format!("127.0.0.1:{port}"));
        let flag = |name: &str| OsString::from(name);
        self.start(
            "orchestratord",
            vec![flag("--addr"), listen(control), flag("--runtime-dir"), engines.clone().into()],
        )?;
        self.start(
            "pool-managerd",
            vec![
                flag("--addr"),
                listen(agent),
                flag("--runtime-dir"),
                engines.into(),
                flag("--state-dir"),
                self.directory.join("state").into(),
            ],
        )?;
        let begun = Instant::now();
        for port in [control, agent] {
            while ask::get(port, "/health").is_none() {
                self.check_children()?;
                if begun.elapsed() > wait {
                    return Err(self.failure("the daemons do not answer"));
                }
                self.pause(Duration::from_millis(1))?;
            }
        }
        Ok((control, agent))
    }

    /// Starts an engine through the provisioner; an empty command means the demonstration engine.
    pub(super) fn start_engine(
        &mut self,
        command: &[OsString],
        slots: u32,
        wait: Duration,
    ) -> Result<(), Exit> {
        let mut args: Vec<OsString> = ["--report", "--pool", "pool-0", "--replica", "r0", "--slots"]
            .into_iter()
            .map(OsString::from)
            .collect();
        args.push(slots.to_string().into());
        args.extend(["--handoff-dir".into(), self.engines().into()]);
        args.extend(["--log-file".into(), self.directory.join("logs/engine.log").into()]);
        args.extend(["--health-timeout-ms".into(), wait.as_millis().to_string().into()]);
        if command.is_empty() {
            args.extend(["--engine-version".into(), "demonstration".into(), "--".into()]);
            args.push(self.program.clone().into());
            args.extend(["demo-engine", "--port", "{port}", "--slots"].into_iter().map(OsString::from));
            args.push(slots.to_string().into());
        } else {
            args.push("--".into());
            args.extend(command.iter().cloned());
        }
        self.start("engine-provisioner", args)
    }

    /// What the provisioner has reported since the last call.
    pub(super) fn engine_reports(&self) -> Vec<Value> {
        self.reports.iter().flat_map(Receiver::try_iter).collect()
    }

    /// Whether every child still runs.
    ///
    /// # Errors
    /// The one that does not, with the end of its log.
    pub(super) fn check_children(&mut self) -> Result<(), Exit> {
        for running in &mut self.children {
            if let Ok(Some(status)) = running.child.try_wait() {
                let (name, log) = (running.name, running.log.clone());
                return Err(self.failure_of(&format!("{name} ended by itself ({status})"), &log));
            }
        }
        Ok(())
    }

    /// A failure with the directory of the logs.
    pub(super) fn failure(&self, what: &str) -> Exit {
        Exit::runtime(format!("{what}; logs are in {}", self.directory.join("logs").display()))
    }

    /// Ends every process, the newest first, and removes the directory if it is temporary.
    pub(super) fn end(&mut self) {
        while let Some(mut running) = self.children.pop() {
            let Some(pid) = Pid::from_raw(running.child.id().cast_signed()) else { continue };
            let _ = kill_process(pid, Signal::TERM);
            let begun = Instant::now();
            while matches!(running.child.try_wait(), Ok(None)) {
                if begun.elapsed() > END_WAIT {
                    let _ = kill_process_group(pid, Signal::KILL);
                    let _ = running.child.wait();
                    break;
                }
                std::thread::sleep(Duration::from_millis(2));
            }
        }
        if std::mem::take(&mut self.temporary) {
            let _ = fs::remove_dir_all(&self.directory);
        }
    }

    fn start(&mut self, name: &'static str, args: Vec<OsString>) -> Result<(), Exit> {
        let log = self.directory.join("logs").join(format!("{name}.log"));
        let cannot = |error: std::io::Error| Exit::runtime(format!("cannot start {name}: {error}"));
        let file = File::create(&log).map_err(cannot)?;
        let reports = name == "engine-provisioner";
        let mut child = Command::new(&self.program)
            .arg(OsStr::new(name))
            .args(args)
            .stdin(Stdio::null())
            .stdout(if reports { Stdio::piped() } else { Stdio::from(file.try_clone().map_err(cannot)?) })
            .stderr(file)
            .process_group(0)
            .spawn()
            .map_err(cannot)?;
        if let Some(stdout) = child.stdout.take() {
            let (send, receive) = sync_channel(REPORTS_MAX);
            std::thread::spawn(move || {
                for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                    let report = serde_json::from_str(&line).unwrap_or(Value::Null);
                    if send.send(report).is_err() {
                        return;
                    }
                }
            });
            self.reports = Some(receive);
        }
        self.children.push(Running { name, child, log });
        Ok(())
    }

    fn failure_of(&self, what: &str, log: &Path) -> Exit {
        let text = fs::read_to_string(log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        let end = lines[lines.len().saturating_sub(LOG_LINES)..].join("\n  ");
        Exit::runtime(format!("{what}:\n  {end}\nlogs are in {}", self.directory.join("logs").display()))
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        self.end();
    }
}

fn is_free(port: u16) -> bool {
    TcpListener::bind(("127.0.0.1", port)).is_ok()
}

/// `wanted` if nothing listens there, or any free port where none is wanted.
fn free_port(wanted: Option<u16>, advice: &str) -> Result<u16, Exit> {
    let listener = TcpListener::bind(("127.0.0.1", wanted.unwrap_or(0))).map_err(|error| {
        Exit::runtime(format!("cannot listen on 127.0.0.1:{}: {error}; {advice}", wanted.unwrap_or(0)))
    })?;
    let address = listener.local_addr();
    address.map(|address| address.port()).map_err(|error| Exit::runtime(format!("no port: {error}")))
}
