//! The daemons under a service manager: a stand-in for systemd listens on `NOTIFY_SOCKET`, hands over
//! sockets, and looks like the journal.

#[path = "daemons/harness.rs"]
#[allow(dead_code, reason = "each file of tests uses a part of it")]
mod harness;

use std::fs;
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use harness::{
    ORCHESTRATORD, POOL_MANAGERD, Process, demo_engine, free_port, get, hand_over, handoff, until,
};
use rustix::process::Signal;

/// The socket that a daemon tells its state to.
struct Manager {
    socket: UnixDatagram,
    path: String,
    heard: Vec<String>,
}

impl Manager {
    fn new(directory: &Path) -> Manager {
        let path = directory.join("notify");
        let socket = UnixDatagram::bind(&path).expect("a socket");
        socket.set_read_timeout(Some(Duration::from_millis(50))).expect("set");
        Manager { socket, path: path.display().to_string(), heard: Vec::new() }
    }

    fn listen(&mut self) {
        let mut bytes = [0; 4096];
        while let Ok(length) = self.socket.recv(&mut bytes) {
            self.heard.push(String::from_utf8_lossy(&bytes[..length]).into_owned());
        }
    }

    /// Waits for a message with a part, and forgets what came before it.
    fn until(&mut self, part: &str) -> String {
        until(part, || {
            self.listen();
            let index = self.heard.iter().position(|message| message.contains(part))?;
            self.heard.drain(..index);
            Some(self.heard.remove(0))
        })
    }
}

fn field<'a>(message: &'a str, name: &str) -> Option<&'a str> {
    message.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='))
}

#[test]
fn an_agent_says_that_it_is_ready_how_it_is_and_that_it_stops() {
    let directory = tempfile::tempdir().expect("a directory");
    let engines = directory.path().join(".runtime/engines");
    let engine_port = free_port();
    let _engine = demo_engine(engine_port, &["--slots", "4"], directory.path());
    hand_over(&engines, "a.json", &handoff(engine_port, "r0", 4));
    let mut manager = Manager::new(directory.path());
    let port = free_port();
    let addr = format!("127.0.0.1:{port}");
    let env = [("POOL_MANAGERD_ADDR", addr.as_str()), ("NOTIFY_SOCKET", manager.path.as_str())];
    let mut agent = Process::start(POOL_MANAGERD, &[], &env, directory.path());
    let ready = manager.until("READY=1");
    assert_eq!(get(port, "/health").expect("it listens").status, 200, "ready, so it is bound");
    let status = field(&ready, "STATUS").expect("a state");
    assert!(status.starts_with("1 replica in 1 pool"), "its directory was looked at: {ready}");
    let status = manager.until("1 ready");
    assert_eq!(field(&status, "STATUS"), Some("1 replica in 1 pool, 1 ready, 4 of 4 slots free"));

    let before = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    agent.signal(Signal::HUP);
    let reloading = manager.until("RELOADING=1");
    let us: i64 = field(&reloading, "MONOTONIC_USEC").and_then(|us| us.parse().ok()).expect("a time");
    assert!(us >= before.tv_sec * 1_000_000 + before.tv_nsec / 1_000, "{reloading}");
    assert_eq!(manager.until("READY=1"), "READY=1");

    agent.signal(Signal::TERM);
    let stopping = manager.until("STOPPING=1");
    assert_eq!(field(&stopping, "STATUS"), Some("no new work, 0 requests may finish"));
    assert_eq!(agent.end(), Some(0));
}

#[test]
fn a_watchdog_is_fed_as_long_as_the_loop_turns() {
    let directory = tempfile::tempdir().expect("a directory");
    let mut manager = Manager::new(directory.path());
    let addr = format!("127.0.0.1:{}", free_port());
    let env = [
        ("ORCHESTRATORD_ADDR", addr.as_str()),
        ("ORCHD_HANDOFF_WATCH_INTERVAL_MS", "10000"),
        ("NOTIFY_SOCKET", manager.path.as_str()),
        ("WATCHDOG_USEC", "400000"),
    ];
    let daemon = Process::start(ORCHESTRATORD, &[], &env, directory.path());
    manager.until("READY=1");
    for _ in 0..5 {
        assert_eq!(manager.until("WATCHDOG=1"), "WATCHDOG=1");
    }
    daemon.signal(Signal::STOP);
    let stat = format!("/proc/{}/stat", daemon.pid());
    until("a standstill", || fs::read_to_string(&stat).ok().filter(|stat| stat.contains(") T ")));
    manager.listen();
    manager.heard.clear();
    std::thread::sleep(Duration::from_millis(600));
    manager.listen();
    assert_eq!(manager.heard, Vec::<String>::new(), "a loop that stands still feeds nothing");
    daemon.signal(Signal::CONT);
    manager.until("WATCHDOG=1");
}

#[test]
fn without_a_watchdog_an_idle_daemon_wakes_for_nothing_more() {
    let turns = |supervised: bool| {
        let directory = tempfile::tempdir().expect("a directory");
        let manager = Manager::new(directory.path());
        let port = free_port();
        let addr = format!("127.0.0.1:{port}");
        let mut env =
            vec![("ORCHESTRATORD_ADDR", addr.as_str()), ("ORCHD_HANDOFF_WATCH_INTERVAL_MS", "10000")];
        if supervised {
            env.push(("NOTIFY_SOCKET", manager.path.as_str()));
        }
        let _daemon = Process::start(ORCHESTRATORD, &[], &env, directory.path());
        until("the daemon", || get(port, "/ready").filter(|answer| answer.status == 200));
        std::thread::sleep(Duration::from_millis(500));
        let count = || harness::metric(port, "orchestratord_loop_turn_seconds_count").expect("a metric");
        let begun = count();
        std::thread::sleep(Duration::from_secs(6));
        count() - begun
    };
    let (alone, supervised) = (turns(false), turns(true));
    // The two connections may take a turn more or less; a look once a second would be six of them.
    assert!(supervised <= alone + 4.0, "{supervised} turns rather than {alone}");
}

/// Starts orchestratord with `listener` as its descriptor 3, as systemd would.
fn activated(listener: &OwnedFd, directory: &Path, pid: &str, addr: &str) -> Daemon {
    // The shell keeps its process id through exec, so that it can name it.
    let script = format!("LISTEN_PID={pid} LISTEN_FDS=1 exec {ORCHESTRATORD} 3<&0 </dev/null");
    let log = fs::File::create(directory.join("log")).expect("a log");
    let child = Command::new("/bin/sh")
        .args(["-c", &script])
        .current_dir(directory)
        .env("ORCHESTRATORD_ADDR", addr)
        .stdin(Stdio::from(listener.try_clone().expect("a duplicate")))
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .expect("it starts");
    Daemon(child)
}

/// A process that is killed with the test.
struct Daemon(Child);

impl Daemon {
    fn end(&mut self) -> Option<i32> {
        until("the end", || self.0.try_wait().expect("a child")).code()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_socket_that_is_handed_over_refuses_nobody_over_a_restart() {
    let directory = tempfile::tempdir().expect("a directory");
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = listener.local_addr().expect("an address").port();
    let held = OwnedFd::from(listener);
    let mut first = activated(&held, directory.path(), "$$", "127.0.0.1:1");
    until("the daemon", || get(port, "/ready").filter(|answer| answer.status == 200));
    let log = fs::read_to_string(directory.path().join("log")).expect("a log");
    assert!(log.contains(&format!("listening on 127.0.0.1:{port}, as the service manager says")), "{log}");

    let (stop, stopped) = std::sync::mpsc::channel::<()>();
    let clients = std::thread::spawn(move || {
        let mut answered = 0;
        while stopped.try_recv().is_err() {
            // Between two processes a connection waits, and is answered by the second.
            let answer = get(port, "/health");
            assert!(answer.is_some_and(|answer| answer.status == 200), "refused after {answered}");
            answered += 1;
        }
        answered
    });
    for _ in 0..3 {
        let pid = rustix::process::Pid::from_raw(first.0.id().cast_signed()).expect("a pid");
        rustix::process::kill_process(pid, Signal::TERM).expect("signalled");
        assert_eq!(first.end(), Some(0));
        std::thread::sleep(Duration::from_millis(100));
        first = activated(&held, directory.path(), "$$", "127.0.0.1:1");
        until("the next one", || get(port, "/ready").filter(|answer| answer.status == 200));
    }
    stop.send(()).expect("they still ask");
    assert!(clients.join().expect("nobody was refused") > 3);
}

#[test]
fn what_is_handed_over_and_cannot_be_used_is_named_and_what_is_not_meant_is_left() {
    let directory = tempfile::tempdir().expect("a directory");
    let file: OwnedFd = fs::File::open("/dev/null").expect("a file").into();
    let mut daemon = activated(&file, directory.path(), "$$", "127.0.0.1:1");
    assert_eq!(daemon.end(), Some(78));
    let log = fs::read_to_string(directory.path().join("log")).expect("a log");
    assert!(log.contains("descriptor 3 is no TCP socket") && log.contains("ListenStream="), "{log}");
    // Meant for its parent, of which it inherited the variables: its own address counts.
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let addr = taken.local_addr().expect("an address").to_string();
    let mut daemon = activated(&file, directory.path(), "1", &addr);
    assert_eq!(daemon.end(), Some(1));
    let log = fs::read_to_string(directory.path().join("log")).expect("a log");
    assert!(log.contains(&format!("cannot listen on {addr}")), "{log}");
}

#[test]
fn the_journal_gets_priorities_and_json_is_one_object_a_line() {
    let directory = tempfile::tempdir().expect("a directory");
    let run = |args: &str, journal: bool| {
        let log = fs::File::create(directory.path().join("log")).expect("a log");
        let stat = rustix::fs::fstat(&log).expect("a file");
        let mut command = Command::new(POOL_MANAGERD);
        command.args(args.split_whitespace()).current_dir(directory.path()).stderr(log);
        let port = free_port();
        command.env("POOL_MANAGERD_ADDR", format!("127.0.0.1:{port}"));
        command.env("POOL_MANAGERD_NODE_ID", "gpu-1");
        if journal {
            command.env("JOURNAL_STREAM", format!("{}:{}", stat.st_dev, stat.st_ino));
        }
        let mut child = command.spawn().expect("it starts");
        let begun = Instant::now();
        while get(port, "/health").is_none() && begun.elapsed() < harness::PATIENCE {
            std::thread::sleep(Duration::from_millis(5));
        }
        child.kill().expect("killed");
        child.wait().expect("it ends");
        fs::read_to_string(directory.path().join("log")).expect("a log")
    };
    let text = run("", true);
    assert!(text.lines().any(|line| line.starts_with("<6>pool-managerd ")), "{text}");
    let json = run("--log-format json", false);
    for line in json.lines() {
        let line: serde_json::Value = serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"));
        assert_eq!((&line["program"], &line["node"]), (&"pool-managerd".into(), &"gpu-1".into()), "{line}");
        assert!(line["ts"].as_str().is_some_and(|ts| ts.ends_with('Z')) && line["message"].is_string());
    }
    assert!(!json.is_empty());
    let both = run("--log-format=json", true);
    assert!(both.lines().all(|line| line.starts_with("<6>{") || line.starts_with("<4>{")), "{both}");
}
