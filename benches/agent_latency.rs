//! How much of the time between an event and what the node agent makes of it is the kernel's?
//!
//! Three roads, each beside its floor in the same run, with the same pauses, on the same file system, in
//! alternating rounds:
//!
//! - a handoff is renamed into place: until a bare process, blocked in epoll, has woken up, opened, read
//!   and parsed it; until the agent's own watcher and core know the replica (as a library, so that the
//!   work after the wake-up is in the figure);
//! - the same, until a real agent's heartbeat has put it into a real control plane's registry;
//! - an engine is killed: until a bare process that waits on its pidfd has woken up; until a real agent
//!   says "broken", and until the heartbeat that says so has arrived at a listener.
//!
//! Times of daemons are the stamps of their own events: the time at which the turn began that made
//! them. Prints median, 99th percentile and ratios; a noisy machine makes both sides slower.

#![allow(clippy::print_stdout, reason = "a table is what it is for")]

#[path = "support/mod.rs"]
mod support;

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use llama_orch::pool_managerd::core::{Core, Identity, Input, Options};
use llama_orch::reactor::token::{Kind, Token};
use llama_orch::reactor::{self, Reactor};
use llama_orch::replicas::{AllowList, EnginePolicy, Watch};
use llama_orch::service::machine;
use llama_orch::wire::id::NodeId;
use llama_orch::wire::node::Capabilities;
use serde_json::Value;
use support::{PATIENCE, Process, free_port, get, start, unix_ns, until};

/// Pause before each event: long enough for both cores to go idle.
const GAP: Duration = Duration::from_millis(10);
const ROUNDS: usize = 5;
const RENAMES_PER_ROUND: usize = 120;
const KILLS_PER_ROUND: usize = 40;

fn main() {
    let args: Vec<String> = std::env::args().collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        [_, "bare-rename", directory] => bare_rename(Path::new(directory)),
        [_, "agent-rename", directory] => agent_rename(Path::new(directory)),
        [_, "bare-pidfd"] => bare_pidfd(),
        // `cargo test --benches` only wants to know that it builds.
        [_, rest @ ..] if rest.contains(&"--test") => {}
        _ => compare(),
    }
}

fn compare() {
    println!("{:34} {:>9} {:>9}   p50 and p99 beside the floor's", "microseconds", "p50", "p99");
    let (mut bare, mut known) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        bare.extend(renames("bare-rename"));
        known.extend(renames("agent-rename"));
    }
    let floor = report("rename: bare, parsed", &bare, None);
    report("rename: known to the agent", &known, Some(floor));
    let (mut wake, mut stored) = (Vec::new(), Vec::new());
    let mut road = Road::build();
    for _ in 0..ROUNDS {
        wake.extend(renames("bare-rename"));
        stored.extend((0..RENAMES_PER_ROUND / 3).map(|_| road.rename_to_stored()));
    }
    drop(road);
    let floor = report("rename: bare, parsed", &wake, None);
    report("rename: stored by the control plane", &stored, Some(floor));
    let (mut bare, mut broken, mut told) = (Vec::new(), Vec::new(), Vec::new());
    let mut victim = Victim::new();
    let mut agent = Agent::start();
    for _ in 0..ROUNDS {
        for _ in 0..KILLS_PER_ROUND {
            bare.push(victim.kill());
            let (stamp, heartbeat) = agent.kill();
            broken.push(stamp);
            told.push(heartbeat);
        }
    }
    let floor = report("kill -9: bare pidfd", &bare, None);
    report("kill -9: not ready in the agent", &broken, Some(floor));
    report("kill -9: heartbeat has arrived", &told, Some(floor));
    let later: Vec<u64> =
        told.iter().zip(&broken).map(|(told, broken)| told.saturating_sub(*broken)).collect();
    report("not ready -> heartbeat has arrived", &later, None);
}

fn report(what: &str, samples_ns: &[u64], floor: Option<(f64, f64)>) -> (f64, f64) {
    let mut sorted = samples_ns.to_vec();
    sorted.sort_unstable();
    let at = |share: f64| sorted[((sorted.len() - 1) as f64 * share) as usize] as f64 / 1e3;
    let (median, high) = (at(0.5), at(0.99));
    match floor {
        Some((m, h)) => {
            println!("{what:34} {median:9.1} {high:9.1}   x {:.2}  x {:.2}", median / m, high / h)
        }
        None => println!("{what:34} {median:9.1} {high:9.1}"),
    }
    (median, high)
}

// Children of this program, so that both sides are a process that is woken up.

/// One of the modes of this program, as a process that prints a time for each thing that it sees.
struct Seer {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

impl Seer {
    fn start(args: &[&str]) -> Seer {
        let program = std::env::current_exe().expect("this program");
        let mut command = Command::new(program);
        command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().expect("it starts");
        let stdin = child.stdin.take().expect("a pipe");
        let stdout = BufReader::new(child.stdout.take().expect("a pipe"));
        Seer { child, stdin, stdout }
    }

    fn next(&mut self) -> u64 {
        let mut line = String::new();
        self.stdout.read_line(&mut line).expect("a line");
        line.trim().parse().expect("a time")
    }
}

impl Drop for Seer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn say(at: u64) {
    println!("{at}");
    std::io::stdout().flush().expect("a reader");
}

/// Renames into a directory that a mode of this program watches.
fn renames(mode: &str) -> Vec<u64> {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path();
    let mut seer = Seer::start(&[mode, &path.display().to_string()]);
    seer.next();
    let mut samples = Vec::new();
    for n in 0..RENAMES_PER_ROUND {
        let temporary = path.join(".bench.tmp");
        fs::write(&temporary, handoff(n, 9)).expect("written");
        std::thread::sleep(GAP);
        let at = unix_ns();
        fs::rename(&temporary, path.join(format!("{n}.json"))).expect("renamed");
        samples.push(seer.next().saturating_sub(at));
    }
    samples
}

fn handoff(n: usize, port: u16) -> String {
    format!(
        r#"{{"pool_id":"bench","replica_id":"r{n}","url":"http://127.0.0.1:{port}","engine":"llamacpp","engine_version":"b4321-cuda","device_mask":"0","slots":4,"model":"qwen2.5-0.5b-instruct-q4_k_m","flags":["--parallel","4","--metrics"]}}"#
    )
}

fn bare_rename(directory: &Path) {
    let mut inotify = inotify::Inotify::init().expect("inotify");
    inotify.watches().add(directory, inotify::WatchMask::MOVED_TO).expect("a watch");
    let epoll = Epoll::on(inotify.as_raw_fd());
    let mut buffer = [0; 4096];
    say(0);
    loop {
        epoll.wait();
        let events = inotify.read_events(&mut buffer).expect("events");
        for name in events.filter_map(|event| event.name.map(|name| name.to_owned())) {
            if name.as_encoded_bytes().starts_with(b".") {
                continue;
            }
            let bytes = fs::read(directory.join(name)).expect("a file");
            let value: Value = serde_json::from_slice(&bytes).expect("JSON");
            assert!(value["slots"] == 4);
            say(unix_ns());
        }
    }
}

/// The agent's road from the event to "known", without its sockets.
fn agent_rename(directory: &Path) {
    let mut reactor = Reactor::new().expect("a reactor");
    let registry = reactor.registry().expect("a registry");
    let mut watch = Watch::new(directory.to_path_buf(), 10_000, Token::only(Kind::DirWatch));
    let identity = Identity {
        node_id: NodeId::new("bench").expect("an id"),
        machine_id: "bench".into(),
        address: None,
        pools: Vec::new(),
        capabilities: Capabilities::default(),
        incarnation: 1,
        boot_id: None,
    };
    let policy = EnginePolicy::new(Vec::new(), None, AllowList::default(), "");
    let mut now = reactor::now();
    let mut core = Core::new(identity, policy, &Options::default(), 1, now);
    let mut effects = Vec::new();
    let (mut changed, mut known) = (false, usize::MAX);
    loop {
        for listing in watch.turn(changed, now.mono, &registry).listings {
            core.handle(Input::Listing(listing), now, &mut effects);
        }
        let replicas = core.replicas().len();
        if replicas != known {
            known = replicas;
            say(unix_ns());
        }
        effects.clear();
        now = reactor.wait(Some(watch.deadline()), watch.busy()).expect("events");
        changed = reactor.events().any(|(token, _)| token.kind() == Kind::DirWatch);
    }
}

/// Reads a pid, waits for its end, prints when that was.
fn bare_pidfd() {
    for line in std::io::stdin().lines() {
        let pid: i32 = line.expect("a line").parse().expect("a pid");
        let pid = rustix::process::Pid::from_raw(pid).expect("a pid");
        let descriptor =
            rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::NONBLOCK).expect("alive");
        let epoll = Epoll::on(descriptor.as_fd().as_raw_fd());
        say(0);
        epoll.wait();
        say(unix_ns());
    }
}

/// A bare epoll on one descriptor.
struct Epoll {
    poll: std::cell::RefCell<(mio::Poll, mio::Events)>,
}

impl Epoll {
    fn on(descriptor: i32) -> Epoll {
        let poll = mio::Poll::new().expect("epoll");
        let mut source = mio::unix::SourceFd(&descriptor);
        poll.registry().register(&mut source, mio::Token(0), mio::Interest::READABLE).expect("registered");
        Epoll { poll: std::cell::RefCell::new((poll, mio::Events::with_capacity(4))) }
    }

    fn wait(&self) {
        let (poll, events) = &mut *self.poll.borrow_mut();
        poll.poll(events, None).expect("an event");
    }
}

// Real daemons.

/// When an event with `state` and a subject that ends with `subject` happened.
fn when(port: u16, subject: &str, state: &str) -> u64 {
    until(state, || {
        let answer = get(port, "/v2/events")?;
        let is_it = |event: &&Value| {
            event["state"] == state && event["subject"].as_str().is_some_and(|s| s.ends_with(subject))
        };
        answer["events"].as_array()?.iter().find(is_it)?["at_ns"].as_u64()
    })
}

/// An engine that says that it is healthy.
fn engine() -> u16 {
    let listener = machine::listen_on_free_port().expect("a port");
    let port = listener.local_addr().expect("an address").port();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.expect("a probe");
            let mut buffer = [0; 4096];
            let _ = stream.read(&mut buffer);
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}");
        }
    });
    port
}

fn start_agent(directory: &Path, port: u16, control: u16) -> (Process, PathBuf) {
    let engines = directory.join("engines");
    let agent = start(
        env!("CARGO_BIN_EXE_pool-managerd"),
        &[
            "--addr",
            &format!("127.0.0.1:{port}"),
            "--cloud-profile=true",
            "--orchestratord-url",
            &format!("http://127.0.0.1:{control}"),
            "--node-id",
            "bench",
            "--runtime-dir",
            &engines.display().to_string(),
            "--state-dir",
            &directory.join("state").display().to_string(),
            "--watch-interval-ms",
            "10000",
        ],
    );
    until("the agent", || get(port, "/ready").filter(|answer| answer["ready"] == true));
    (agent, engines)
}

/// A control plane and an agent.
struct Road {
    control: u16,
    engine: u16,
    engines: PathBuf,
    next: usize,
    _processes: [Process; 2],
    _directory: tempfile::TempDir,
}

impl Road {
    fn build() -> Road {
        let directory = tempfile::tempdir().expect("a directory");
        let (control, agent) = (free_port(), free_port());
        let state = directory.path().join("control").display().to_string();
        let plane = start(
            env!("CARGO_BIN_EXE_orchestratord"),
            &["--addr", &format!("127.0.0.1:{control}"), "--cloud-profile=true", "--state-dir", &state],
        );
        until("the control plane", || get(control, "/ready"));
        let (agent, engines) = start_agent(directory.path(), agent, control);
        Road {
            control,
            engine: engine(),
            engines,
            next: 0,
            _processes: [plane, agent],
            _directory: directory,
        }
    }

    fn rename_to_stored(&mut self) -> u64 {
        self.next += 1;
        let temporary = self.engines.join(".bench.tmp");
        fs::write(&temporary, handoff(self.next, self.engine)).expect("written");
        std::thread::sleep(GAP);
        let at = unix_ns();
        let path = self.engines.join(format!("{}.json", self.next));
        fs::rename(&temporary, &path).expect("renamed");
        // Whoever asks too early is what the control plane is busy with.
        std::thread::sleep(GAP);
        let subject = format!("bench/r{}", self.next);
        let stored = when(self.control, &subject, "known").saturating_sub(at);
        when(self.control, &subject, "routable");
        fs::remove_file(path).expect("removed");
        when(self.control, &subject, "gone");
        stored
    }
}

fn sleeper() -> Child {
    let mut command = Command::new("sleep");
    command.arg("600").spawn().expect("a process")
}

/// Kills processes that [`bare_pidfd`] waits for.
struct Victim(Seer);

impl Victim {
    fn new() -> Victim {
        Victim(Seer::start(&["bare-pidfd"]))
    }

    fn kill(&mut self) -> u64 {
        let mut child = sleeper();
        writeln!(self.0.stdin, "{}", child.id()).expect("a reader");
        self.0.next();
        std::thread::sleep(GAP);
        let at = unix_ns();
        child.kill().expect("killed");
        let seen = self.0.next().saturating_sub(at);
        child.wait().expect("reaped");
        seen
    }
}

/// A real agent whose control plane is a listener of this program, and its engines.
struct Agent {
    port: u16,
    engine: u16,
    engines: PathBuf,
    next: usize,
    heartbeats: Receiver<(u64, String)>,
    _process: Process,
    _directory: tempfile::TempDir,
}

impl Agent {
    fn start() -> Agent {
        let directory = tempfile::tempdir().expect("a directory");
        let listener = machine::listen_on_free_port().expect("a port");
        let control = listener.local_addr().expect("an address").port();
        let (tell, heartbeats) = channel();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (stream, tell) = (stream.expect("a connection"), tell.clone());
                std::thread::spawn(move || answer_calls(stream, &tell));
            }
        });
        let port = free_port();
        let (process, engines) = start_agent(directory.path(), port, control);
        let engine = engine();
        Agent { port, engine, engines, next: 0, heartbeats, _process: process, _directory: directory }
    }

    /// Time until the agent said "broken", and until a heartbeat that says so had arrived.
    fn kill(&mut self) -> (u64, u64) {
        self.next += 1;
        let mut child = sleeper();
        let (_, started) = machine::process(child.id()).expect("alive");
        let with_pid = format!(r#","pid":{},"pid_start":{started}}}"#, child.id());
        let text = handoff(self.next, self.engine).trim_end_matches('}').to_string() + &with_pid;
        let path = self.engines.join(format!("{}.json", self.next));
        let temporary = self.engines.join(".bench.tmp");
        fs::write(&temporary, text).expect("written");
        fs::rename(&temporary, &path).expect("renamed");
        let subject = format!("bench/r{}", self.next);
        when(self.port, &subject, "ready");
        std::thread::sleep(GAP);
        while self.heartbeats.try_recv().is_ok() {}
        let at = unix_ns();
        child.kill().expect("killed");
        let dead = format!("process {} ended", child.id());
        let heartbeat = loop {
            let (arrived, body) = self.heartbeats.recv_timeout(PATIENCE).expect("a heartbeat");
            if body.contains(&dead) {
                break arrived.saturating_sub(at);
            }
        };
        let broken = when(self.port, &subject, "broken").saturating_sub(at);
        child.wait().expect("reaped");
        fs::remove_file(path).expect("removed");
        when(self.port, &subject, "gone");
        (broken, heartbeat)
    }
}

/// A control plane that says yes to everything, and when the last byte of each body arrived.
fn answer_calls(mut stream: TcpStream, tell: &std::sync::mpsc::Sender<(u64, String)>) {
    stream.set_nodelay(true).expect("TCP");
    let mut bytes = Vec::new();
    let mut buffer = vec![0; 64 * 1024];
    while let Ok(length @ 1..) = stream.read(&mut buffer) {
        let arrived = unix_ns();
        bytes.extend_from_slice(&buffer[..length]);
        let Some(end) = bytes.windows(4).position(|window| window == b"\r\n\r\n") else { continue };
        let head = String::from_utf8_lossy(&bytes[..end]).to_ascii_lowercase();
        let field = head.lines().find_map(|line| line.strip_prefix("content-length: "));
        let body_length: usize = field.map_or(0, |field| field.trim().parse().expect("a length"));
        if bytes.len() < end + 4 + body_length {
            continue;
        }
        let body = String::from_utf8_lossy(&bytes[end + 4..end + 4 + body_length]).into_owned();
        bytes.clear();
        if tell.send((arrived, body)).is_err() {
            return;
        }
        let yes = br#"{"success":true,"node_id":"bench","next_heartbeat_ms":10000,"ttl_ms":30000}"#;
        let head = format!(
            "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
            yes.len()
        );
        if stream.write_all(&[head.as_bytes(), yes].concat()).is_err() {
            return;
        }
    }
}
