//! The work: processes, signals, files and the clock.
//!
//! One thread decides, and it has one place where it waits: `Events`, a socket pair into which the
//! signal handler, the thread that waits for the engine's end and the thread that probes its health
//! each write one byte. Ownership does the cleaning up: `Engine` kills its process group when it
//! goes out of scope, `Published` removes the handoff; the latter is declared later and so goes
//! first, on every way out.
//!
//! The engine's end is noticed with `waitid(WNOWAIT)`, which leaves the dead process in the table:
//! until it is reaped its id cannot belong to anyone else, so the group can be signalled safely.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::process::{Pid, Signal, WaitId, WaitIdOptions};
use serde_json::{Value, json};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use super::plan::{Config, HOST, Plan};
use crate::service::machine::{self, boot_id, pid_namespace, process};
use crate::settings::Exit;
use crate::wire::handoff::{self, HANDOFF_BYTES_MAX, Handoff, HandoffFile};

/// First pause between health probes; doubles up to [`PROBE_PAUSE_MAX`]. Short, because a small model
/// is loaded within milliseconds and its requests wait for the handoff.
const PROBE_PAUSE_MIN: Duration = Duration::from_millis(5);
/// Longest pause between health probes: what a large model, loaded for minutes, waits at most.
const PROBE_PAUSE_MAX: Duration = Duration::from_millis(250);
/// Longest health probe. Engines have been seen to take almost 7 s for their first answer.
const PROBE_TIMEOUT: Duration = Duration::from_secs(10);
/// From SIGTERM to SIGKILL. Engines that end streams by themselves do so at once; those that wait for
/// their clients wait longer than anyone who stops them.
const STOP_GRACE: Duration = Duration::from_secs(5);
/// How long a killed engine is waited for. A process that hangs in a GPU driver may never go.
const REAP_TIMEOUT: Duration = Duration::from_secs(5);
/// Pause between looks at a killed process, which mostly is gone at the first one.
const REAP_PAUSE: Duration = Duration::from_millis(5);
/// Lines of the engine's output that an error shows: a stack trace's end and the message before it.
const LOG_TAIL_LINES: usize = 20;
/// Bytes of the engine's output that are searched for those lines.
const LOG_TAIL_BYTES: u64 = 16 * 1024;
/// Longest line shown of them, in characters.
const LOG_LINE_CHARS_MAX: usize = 300;
/// Size from which a log file is set aside (as `.1`, one generation) when the next engine starts, in
/// bytes.
const LOG_FILE_BYTES_MAX: u64 = 64 * 1024 * 1024;

/// Starts the engine, hands it over, and stays until a signal stops both.
///
/// # Errors
/// [`Exit`] with code 78 for a request that cannot work here and 1 for an engine that failed; its
/// message is one line, followed by the last lines of the engine's output where there are any. The
/// engine's processes and its handoff are gone by then.
pub fn supervise(config: &Config) -> Result<(), Exit> {
    // Before anything is started: a signal must never find an engine without a keeper.
    let mut events = Events::new().map_err(|e| Exit::runtime(format!("cannot watch for signals: {e}")))?;
    let plan = Plan::new(config, choose_port(config.port)?)?;
    refuse_a_living_predecessor(&plan.handoff_file)?;
    create_directory(&config.handoff_dir)?;
    let log = EngineLog::open(&config.log_file)?;
    let report = Report { enabled: config.report };

    let mut engine = Engine::spawn(&plan, &log, &events)?;
    log::info!("started {} as pid {}, output in {}", plan.handoff.key(), engine.pid(), log.path.display());
    report.event(json!({"event": "spawned", "pid": engine.pid(), "at_ns": unix_ns()}));
    let handoff = engine.complete(&plan.handoff)?;

    match wait_for_health(config, &plan, &mut events)? {
        Start::Healthy => {}
        Start::Signalled => return stop(engine, None, &mut events, &report),
        Start::Exited => {
            let status = engine.end();
            let hint = match is_listening(&plan) {
                true => {
                    format!(" (port {} was taken by another process: try again)", plan.handoff.url.port())
                }
                false => String::new(),
            };
            return Err(log.failure(&format!("the engine ended before it was healthy: {status}{hint}")));
        }
        Start::TimedOut(last) => {
            engine.end();
            let limit = config.health_timeout_ms;
            return Err(log.failure(&format!(
                "the engine was not healthy within {limit} ms and was killed; {} last said: {last}",
                plan.health_url
            )));
        }
    }
    log::info!("{} is healthy at {}", handoff.key(), handoff.url);
    report.event(
        json!({"event": "healthy", "pid": engine.pid(), "url": handoff.url.to_string(), "at_ns": unix_ns()}),
    );

    let published = Published::write(&plan.handoff_file, &handoff, &report)?;
    log::info!("handed over in {}", plan.handoff_file.display());
    loop {
        match events.wait(None) {
            Event::Signal => return stop(engine, Some(published), &mut events, &report),
            Event::EngineExited => {
                drop(published);
                let status = engine.end();
                report.event(stopped(&engine, &status));
                return Err(log.failure(&format!("the engine ended by itself: {status}")));
            }
            Event::Healthy | Event::TimedOut => {}
        }
    }
}

/// Ends what was asked to end: first the handoff, so that no new request comes, then the processes.
fn stop(
    mut engine: Engine,
    published: Option<Published>,
    events: &mut Events,
    report: &Report,
) -> Result<(), Exit> {
    drop(published);
    log::info!("stopping pid {}", engine.pid());
    engine.signal_group(Signal::TERM);
    let deadline = Instant::now() + STOP_GRACE;
    loop {
        match events.wait(Some(deadline)) {
            Event::EngineExited => break,
            Event::Healthy => {}
            Event::Signal => {
                log::warn!("a second signal: killing pid {} at once", engine.pid());
                break;
            }
            Event::TimedOut => {
                log::warn!("pid {} did not end within {STOP_GRACE:?}: killing it", engine.pid());
                break;
            }
        }
    }
    let status = engine.end();
    log::info!("pid {} ended: {status}", engine.pid());
    report.event(stopped(&engine, &status));
    Ok(())
}

fn stopped(engine: &Engine, status: &str) -> Value {
    json!({"event": "stopped", "pid": engine.pid(), "status": status, "at_ns": unix_ns()})
}

/// How the wait for health ended.
enum Start {
    Healthy,
    Signalled,
    Exited,
    /// What the health path said last.
    TimedOut(String),
}

fn wait_for_health(config: &Config, plan: &Plan, events: &mut Events) -> Result<Start, Exit> {
    let deadline = Instant::now() + Duration::from_millis(config.health_timeout_ms);
    let _prober = Prober::start(plan.health_url.clone(), events)
        .map_err(|e| Exit::runtime(format!("cannot start the health probe: {e}")))?;
    Ok(match events.wait(Some(deadline)) {
        Event::Healthy => Start::Healthy,
        Event::Signal => Start::Signalled,
        Event::EngineExited => Start::Exited,
        // One more look, short, for the message alone.
        Event::TimedOut => Start::TimedOut(match probe(&prober_agent(PROBE_PAUSE_MAX), &plan.health_url) {
            Ok(status) => format!("HTTP {status}"),
            Err(error) => error.to_string(),
        }),
    })
}

/// What the deciding thread waits for.
enum Event {
    /// SIGTERM, SIGINT or SIGHUP.
    Signal,
    /// The engine's first process has ended and can be reaped.
    EngineExited,
    /// The health path answered 200.
    Healthy,
    /// Nothing of this before the deadline.
    TimedOut,
}

/// One queue for everything that happens, written byte by byte from handlers and threads. Its bound is
/// the socket buffer's; a full one can only lose further signals.
struct Events {
    receiver: UnixStream,
    sender: UnixStream,
}

const BYTE_ENGINE_EXITED: u8 = b'E';
const BYTE_HEALTHY: u8 = b'H';

impl Events {
    fn new() -> io::Result<Events> {
        let (receiver, sender) = UnixStream::pair()?;
        for signal in [SIGTERM, SIGINT, SIGHUP] {
            // Whoever started this with nohup wants it to outlive the terminal.
            if signal != SIGHUP || !hangup_is_ignored() {
                signal_hook::low_level::pipe::register(signal, sender.try_clone()?)?;
            }
        }
        Ok(Events { receiver, sender })
    }

    /// The next event, or [`Event::TimedOut`] at `deadline`.
    fn wait(&mut self, deadline: Option<Instant>) -> Event {
        loop {
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) || self.receiver.set_read_timeout(left).is_err() {
                return Event::TimedOut;
            }
            let mut byte = [0];
            match self.receiver.read(&mut byte) {
                Ok(_) if byte[0] == BYTE_ENGINE_EXITED => return Event::EngineExited,
                Ok(_) if byte[0] == BYTE_HEALTHY => return Event::Healthy,
                // The signal handler's byte. `self` holds a sender, so there is no end of file.
                Ok(_) => return Event::Signal,
                // A timeout or an interruption: the deadline decides.
                Err(_) => {}
            }
        }
    }
}

/// Bit 0 of the mask of ignored signals is signal 1, SIGHUP.
fn hangup_is_ignored() -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).is_some_and(|mask| mask & 1 == 1)
}

/// The engine's process group. Dropping it kills the group.
struct Engine {
    child: Child,
    pid: Pid,
    /// The exit status once the first process was reaped: from then on its id is not ours to signal.
    ended: Option<String>,
}

impl Engine {
    fn spawn(plan: &Plan, log: &EngineLog, events: &Events) -> Result<Engine, Exit> {
        let program = plan.command[0].to_string_lossy();
        let failed = |what: &str, error: io::Error| Exit::runtime(format!("{what}: {error}"));
        let output = |file: &File| file.try_clone().map(Stdio::from);
        let mut child = Command::new(&plan.command[0])
            .args(&plan.command[1..])
            .envs(plan.env.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(output(&log.file).map_err(|e| failed("cannot share the log file", e))?)
            .stderr(output(&log.file).map_err(|e| failed("cannot share the log file", e))?)
            .process_group(0)
            .spawn()
            .map_err(|error| match error.kind() {
                io::ErrorKind::NotFound => Exit::runtime(format!(
                    "the engine's program {program:?} does not exist or is not in PATH"
                )),
                io::ErrorKind::PermissionDenied => {
                    Exit::runtime(format!("the engine's program {program:?} may not be executed"))
                }
                _ => failed(&format!("cannot start the engine's program {program:?}"), error),
            })?;
        let Some(pid) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) else {
            let _ = child.kill();
            let _ = child.wait();
            return Err(Exit::runtime("the engine has no usable process id"));
        };
        let engine = Engine { child, pid, ended: None };
        let mut sender = events.sender.try_clone().map_err(|e| failed("cannot watch the engine", e))?;
        let wait = move || {
            let options = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
            while let Err(rustix::io::Errno::INTR) = rustix::process::waitid(WaitId::Pid(pid), options) {}
            let _ = sender.write_all(&[BYTE_ENGINE_EXITED]);
        };
        thread::Builder::new()
            .name("engine-end".into())
            .spawn(wait)
            .map_err(|e| failed("cannot watch the engine", e))?;
        Ok(engine)
    }

    fn pid(&self) -> u32 {
        self.child.id()
    }

    /// `planned` with what only a running process has. Its generation is the time in milliseconds: of
    /// two engines that claim one name, the one that started later counts.
    fn complete(&self, planned: &Handoff) -> Result<Handoff, Exit> {
        // One that ended at once is still there to be read: it was not reaped.
        let (_, pid_start) = process(self.pid())
            .ok_or_else(|| Exit::runtime(format!("cannot read the start time of pid {}", self.pid())))?;
        Ok(Handoff {
            pid: Some(self.pid()),
            pid_start: Some(pid_start),
            boot_id: boot_id(),
            pid_ns: pid_namespace(),
            generation: unix_ns() / 1_000_000,
            ..planned.clone()
        })
    }

    fn signal_group(&self, signal: Signal) {
        if self.ended.is_none() {
            // An error means that nobody is left to signal.
            let _ = rustix::process::kill_process_group(self.pid, signal);
        }
    }

    /// Kills what is left of the group and reaps its first process: how that ended, in words.
    fn end(&mut self) -> String {
        if let Some(status) = &self.ended {
            return status.clone();
        }
        self.signal_group(Signal::KILL);
        let deadline = Instant::now() + REAP_TIMEOUT;
        let status = loop {
            match self.child.try_wait() {
                Ok(Some(status)) => break describe(status),
                Ok(None) if Instant::now() < deadline => thread::sleep(REAP_PAUSE),
                Ok(None) => break format!("pid {} does not react to SIGKILL", self.pid()),
                Err(error) => break error.to_string(),
            }
        };
        self.ended = Some(status.clone());
        status
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.end();
    }
}

/// `exit status 3` or `killed by signal 9 (SIGKILL)`.
fn describe(status: ExitStatus) -> String {
    match status.code() {
        Some(code) => format!("exit status {code}"),
        None => format!("killed by {}", status.to_string().replacen("signal: ", "signal ", 1)),
    }
}

/// The thread that asks for health until the answer is 200. Dropping it asks it to end.
struct Prober(Arc<AtomicBool>);

impl Prober {
    fn start(url: String, events: &Events) -> io::Result<Prober> {
        let over = Arc::new(AtomicBool::new(false));
        let (mut sender, seen) = (events.sender.try_clone()?, Arc::clone(&over));
        thread::Builder::new().name("health-probe".into()).spawn(move || {
            let agent = prober_agent(PROBE_TIMEOUT);
            let mut pause = PROBE_PAUSE_MIN;
            while !seen.load(Ordering::Relaxed) {
                // Refused, slow, 503 and any other answer all mean that it is still starting.
                if let Ok(200) = probe(&agent, &url) {
                    let _ = sender.write_all(&[BYTE_HEALTHY]);
                    return;
                }
                thread::sleep(pause);
                pause = (pause * 2).min(PROBE_PAUSE_MAX);
            }
        })?;
        Ok(Prober(over))
    }
}

impl Drop for Prober {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn probe(agent: &ureq::Agent, url: &str) -> Result<u16, ureq::Error> {
    agent.get(url).call().map(|answer| answer.status().as_u16())
}

/// Every probe is a connection of its own: one that is kept would occupy the engine for nothing.
fn prober_agent(timeout: Duration) -> ureq::Agent {
    let limit = Some(timeout);
    ureq::Agent::config_builder()
        .timeout_global(limit)
        .timeout_per_call(limit)
        .timeout_resolve(limit)
        .timeout_connect(limit)
        .timeout_send_request(limit)
        .timeout_send_body(limit)
        .timeout_recv_response(limit)
        .timeout_recv_body(limit)
        .max_idle_connections(0)
        .proxy(None)
        .max_redirects(0)
        .http_status_as_error(false)
        .build()
        .new_agent()
}

/// The handoff file while it is ours. Dropping it removes the file, unless another engine's
/// provisioner has replaced it.
struct Published {
    file: PathBuf,
    pid: Option<u32>,
}

impl Published {
    fn write(file: &Path, handoff: &Handoff, report: &Report) -> Result<Published, Exit> {
        let failed = |e: io::Error| Exit::runtime(format!("cannot write {}: {e}", file.display()));
        // A dot-name, which no watcher reads; the pid keeps two writers apart.
        let temporary = file.with_file_name(format!(".{}.{}", handoff.file_name(), std::process::id()));
        let write = || {
            let _ = fs::remove_file(&temporary);
            let mut out = OpenOptions::new().write(true).create_new(true).mode(0o640).open(&temporary)?;
            // Exactly so, whatever the umask: the agent reads it by its group.
            out.set_permissions(fs::Permissions::from_mode(0o640))?;
            out.write_all(handoff.to_json().as_bytes())?;
            out.sync_all()?;
            let at_ns = unix_ns();
            fs::rename(&temporary, file)?;
            Ok(at_ns)
        };
        let at_ns = write().map_err(|error| {
            let _ = fs::remove_file(&temporary);
            failed(error)
        })?;
        report.event(json!({"event": "handoff_written", "path": file.to_string_lossy(), "at_ns": at_ns}));
        Ok(Published { file: file.to_path_buf(), pid: handoff.pid })
    }
}

impl Drop for Published {
    fn drop(&mut self) {
        match read_handoff(&self.file) {
            Some(handoff) if handoff.pid != self.pid => {
                log::warn!("{} belongs to another engine now: left alone", self.file.display());
            }
            _ => match fs::remove_file(&self.file) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    log::error!("cannot remove {}: {error}", self.file.display());
                }
                _ => {}
            },
        }
    }
}

fn read_handoff(file: &Path) -> Option<Handoff> {
    let mut bytes = Vec::new();
    File::open(file).ok()?.take(HANDOFF_BYTES_MAX as u64 + 1).read_to_end(&mut bytes).ok()?;
    match handoff::parse(&bytes) {
        Ok(HandoffFile::Engine(handoff)) => Some(*handoff),
        _ => None,
    }
}

/// Two engines under one name would take turns in one file. What a crash left behind is overwritten.
fn refuse_a_living_predecessor(file: &Path) -> Result<(), Exit> {
    let Some(handoff) = read_handoff(file) else { return Ok(()) };
    let Some(pid) = handoff.pid else { return Ok(()) };
    let same_boot = handoff.boot_id.is_none() || handoff.boot_id == boot_id();
    let same_start = process(pid)
        .is_some_and(|(zombie, start)| !zombie && handoff.pid_start.is_none_or(|told| told == start));
    if same_boot && same_start {
        return Err(Exit::runtime(format!(
            "{} already runs as pid {pid}, says {}: stop it first, or give another --replica",
            handoff.key(),
            file.display()
        )));
    }
    Ok(())
}

/// A port that is free right now. It may be gone when the engine asks for it; the engine then fails,
/// and the error says so.
fn choose_port(wanted: u16) -> Result<u16, Exit> {
    let listener = match wanted {
        0 => machine::listen_on_free_port(),
        wanted => TcpListener::bind((HOST, wanted)),
    };
    let bound = listener.and_then(|listener| listener.local_addr());
    bound.map(|address| address.port()).map_err(|error| match error.kind() {
        io::ErrorKind::AddrInUse => Exit::runtime(format!(
            "port {wanted} is already in use: stop what listens there, or give --port 0 for a free one"
        )),
        _ => Exit::runtime(format!("cannot use port {wanted}: {error}")),
    })
}

/// Whether anyone listens where the engine, now dead, should have.
fn is_listening(plan: &Plan) -> bool {
    let address = std::net::SocketAddr::from(([127, 0, 0, 1], plan.handoff.url.port()));
    TcpStream::connect_timeout(&address, PROBE_PAUSE_MAX).is_ok()
}

fn create_directory(directory: &Path) -> Result<(), Exit> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o750)
        .create(directory)
        .map_err(|e| Exit::runtime(format!("cannot create {}: {e}", directory.display())))
}

/// The file that takes the engine's output, and where this run's part of it begins.
struct EngineLog {
    path: PathBuf,
    file: File,
    start: u64,
}

impl EngineLog {
    fn open(path: &Path) -> Result<EngineLog, Exit> {
        if let Some(parent) = path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
            create_directory(parent)?;
        }
        let failed = |e: io::Error| Exit::runtime(format!("cannot open log file {}: {e}", path.display()));
        if fs::metadata(path).is_ok_and(|meta| meta.is_file() && meta.len() > LOG_FILE_BYTES_MAX) {
            let mut aside = path.as_os_str().to_os_string();
            aside.push(".1");
            fs::rename(path, aside).map_err(failed)?;
        }
        let file =
            OpenOptions::new().append(true).read(true).create(true).mode(0o640).open(path).map_err(failed)?;
        let start = file.metadata().map_err(failed)?.len();
        Ok(EngineLog { path: path.to_path_buf(), file, start })
    }

    /// A failure with the last lines that this run's engine printed.
    fn failure(&self, message: &str) -> Exit {
        let lines = self.tail().unwrap_or_default();
        if lines.is_empty() {
            return Exit::runtime(format!("{message} (it printed nothing)"));
        }
        let mut text = format!("{message}; the end of {}:", self.path.display());
        for line in lines {
            text.push_str("\n  ");
            text.push_str(&line);
        }
        Exit::runtime(text)
    }

    fn tail(&self) -> io::Result<Vec<String>> {
        let mut file = &self.file;
        let from = self.start.max(file.metadata()?.len().saturating_sub(LOG_TAIL_BYTES));
        file.seek(SeekFrom::Start(from))?;
        let mut bytes = Vec::new();
        file.take(LOG_TAIL_BYTES).read_to_end(&mut bytes)?;
        Ok(last_lines(&String::from_utf8_lossy(&bytes)))
    }
}

/// The last lines of `text` as they may be shown on a terminal: no control characters, no blank lines.
fn last_lines(text: &str) -> Vec<String> {
    let shown = |line: &str| -> String {
        line.chars()
            .filter(|c| !c.is_control())
            .take(LOG_LINE_CHARS_MAX)
            .collect::<String>()
            .trim_end()
            .into()
    };
    let lines: Vec<String> = text.lines().map(shown).filter(|line| !line.is_empty()).collect();
    lines[lines.len().saturating_sub(LOG_TAIL_LINES)..].to_vec()
}

/// JSON lines on standard output for whoever measures or drives this program.
struct Report {
    enabled: bool,
}

impl Report {
    /// A reader that went away is no reason to stop an engine, so an error is dropped.
    fn event(&self, event: Value) {
        if self.enabled {
            let mut out = io::stdout().lock();
            let _ = writeln!(out, "{event}").and_then(|()| out.flush());
        }
    }
}

/// Wall clock in nanoseconds: for people and for measurements between processes of one machine.
fn unix_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shown_log_ends_with_the_last_words_and_moves_no_cursor() {
        let text: String = (0..100).map(|n| format!("line {n}\n\n")).collect();
        let lines = last_lines(&(text + "\u{1b}[31mout of memory\u{1b}[0m\r\n"));
        assert_eq!(lines.len(), LOG_TAIL_LINES);
        assert_eq!(lines.last().map(String::as_str), Some("[31mout of memory[0m"));
        assert!(last_lines(&"x".repeat(10_000))[0].len() <= LOG_LINE_CHARS_MAX);
    }
}
