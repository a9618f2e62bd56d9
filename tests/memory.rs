//! Daemons with little memory: they say what fits and what does not, and ten thousand clients that send the
//! largest heads and bodies are refused in part rather than anything be killed.

#[path = "daemons/harness.rs"]
#[allow(dead_code, reason = "shared with other tests, which use other parts")]
mod harness;
#[path = "openai_clients/plane.rs"]
#[allow(dead_code, reason = "shared with another test, which uses other parts")]
mod plane;

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use harness::{ORCHESTRATORD, POOL_MANAGERD, Process, get, metric, open, post, until};
use llama_orch::service::machine::raise_descriptor_limit;
use plane::Plane;
use rustix::process::{Pid, Resource, Rlimit, prlimit};

/// A control group with so much memory, while it lives.
struct Group(PathBuf);

impl Group {
    /// `None` where this test may make none.
    #[allow(clippy::print_stderr, reason = "what is left out has to say so")]
    fn make(mib: u64) -> Option<Group> {
        for (root, file) in
            [("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")]
        {
            let path = Path::new(root).join(format!("llorch-test-{}-{mib}", std::process::id()));
            if fs::create_dir(&path).is_err() {
                continue;
            }
            let group = Group(path);
            let limit = group.0.join(file);
            if limit.exists() && fs::write(limit, (mib << 20).to_string()).is_ok() {
                return Some(group);
            }
        }
        eprintln!("no control group can be made here: without one");
        None
    }

    fn processes(&self) -> PathBuf {
        self.0.join("cgroup.procs")
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // Its processes are gone, and the kernel may need a moment to notice.
        let begun = Instant::now();
        while fs::remove_dir(&self.0).is_err() && begun.elapsed() < Duration::from_secs(5) {
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

#[test]
fn the_control_group_says_how_much_memory_there_is() {
    let Some(group) = Group::make(192) else { return };
    let directory = tempfile::tempdir().expect("a directory");
    for (program, prefix) in [(ORCHESTRATORD, "ORCHESTRATORD"), (POOL_MANAGERD, "POOL_MANAGERD")] {
        let (addr, address) = (format!("{prefix}_ADDR"), format!("127.0.0.1:{}", harness::free_port()));
        let script = format!("echo $$ > {} && exec {program}", group.processes().display());
        let daemon = Process::start("/bin/sh", &["-c", &script], &[(&addr, &address)], directory.path());
        let told = || daemon.log().contains("of the 192 MiB that the control group gives").then_some(());
        until("limits that fit", told);
    }
}

/// What the daemon is given, in MiB.
const MEMORY_MIB: u64 = 256;
/// Clients at once, where there are descriptors for them.
const CLIENTS: u64 = 10_000;

#[test]
fn a_daemon_that_cannot_fit_says_what_it_needs() {
    let directory = tempfile::tempdir().expect("a directory");
    for (program, prefix) in [(ORCHESTRATORD, "ORCHESTRATORD"), (POOL_MANAGERD, "POOL_MANAGERD")] {
        let (addr, memory) = (format!("{prefix}_ADDR"), format!("{prefix}_MEMORY_MAX"));
        let address = format!("127.0.0.1:{}", harness::free_port());
        let run = |most: &str| {
            Process::start(program, &[], &[(&addr, address.as_str()), (&memory, most)], directory.path())
        };
        let mut small = run("16M");
        assert_eq!(small.end(), Some(78), "{prefix}");
        let said = small.log();
        for part in ["--memory-max gives 16 MiB", "MiB for program and tables +", "exchanges of 160 KiB ="] {
            assert!(said.contains(part), "{part}: {said}");
        }
        let lowered = run("256M");
        until("what was lowered", || lowered.log().contains("limits are lowered to fit").then_some(()));
    }
}

/// An engine that is healthy and never answers a POST.
fn silent_engine() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let url = format!("http://{}", listener.local_addr().expect("an address"));
    std::thread::spawn(move || {
        let mut held = Vec::new();
        for mut tcp in listener.incoming().map_while(Result::ok) {
            let mut piece = [0; 1024];
            match tcp.read(&mut piece) {
                Ok(length @ 1..) if piece[..length].starts_with(b"GET /health") => {
                    let _ = tcp.write_all(
                        b"HTTP/1.1 200 OK\r\nContent-Length: 15\r\nConnection: close\r\n\r\n{\"status\":\"ok\"}",
                    );
                }
                Ok(length @ 1..) if piece[..length].starts_with(b"GET ") => {
                    let _ = tcp.write_all(
                        b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
                    );
                }
                _ => held.push(tcp),
            }
        }
    });
    url
}

/// Bytes that one of the clients sends: a head that does not end, a body that does not end, or a whole
/// request with a large head behind which more is sent.
fn hostile(number: u64) -> Vec<u8> {
    let head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n";
    let filler = "x".repeat(31 * 1024);
    let json = r#"{"model":"m","prompt":"p"}"#;
    match number % 4 {
        0 => format!("{head}X: {filler}"),
        1 => format!("{head}Content-Length: 1000000\r\n\r\n{}", "x".repeat(900_000)),
        2 => format!("{head}X: {filler}\r\nContent-Length: {}\r\n\r\n{json}{head}X: {filler}", json.len()),
        _ => format!("{head}Transfer-Encoding: chunked\r\n\r\nf4240\r\n{}", "x".repeat(60_000)),
    }
    .into_bytes()
}

fn peak_bytes(process: &Process) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", process.pid())).expect("it runs");
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).expect("a peak");
    let kib: u64 = line.split_whitespace().nth(1).and_then(|kib| kib.parse().ok()).expect("a number");
    kib * 1024
}

#[test]
#[allow(clippy::print_stdout, reason = "the figures are worth reading")]
fn thousands_of_hostile_clients_are_refused_before_memory_ends() {
    let most = raise_descriptor_limit().unwrap_or(1024);
    let clients = CLIENTS.min(most.saturating_sub(200));
    let memory = format!("{MEMORY_MIB}M");
    let plane =
        Plane::start(false, &[("ORCHESTRATORD_MEMORY_MAX", &memory), ("ORCHESTRATORD_MAX_BODY_MIB", "1")]);
    plane.announce("m", &silent_engine(), 64);
    plane.until_routable(1);
    // Beyond this an allocation fails, which ends the process as the kernel's killer would.
    let pid = Pid::from_raw(plane.control.pid().cast_signed()).expect("a pid");
    let limit = Some(MEMORY_MIB << 20);
    prlimit(Some(pid), Resource::Data, Rlimit { current: limit, maximum: limit }).expect("a limit");
    // And beyond this the kernel's killer ends it indeed.
    let group = Group::make(MEMORY_MIB);
    if let Some(group) = &group {
        fs::write(group.processes(), plane.control.pid().to_string()).expect("it goes there");
    }

    let payloads: Vec<Vec<u8>> = (0..4).map(hostile).collect();
    let begun = Instant::now();
    let mut open: Vec<(TcpStream, usize, usize)> = Vec::new();
    for number in 0..clients {
        let tcp = TcpStream::connect(("127.0.0.1", plane.port)).expect("the kernel takes connections");
        tcp.set_nonblocking(true).expect("a socket option");
        open.push((tcp, (number % 4) as usize, 0));
    }
    // Rounds of writing as much as is taken, until a whole round gets nothing to anybody.
    let (mut refused, mut closed, mut quiet) = (0u64, 0u64, 0);
    while quiet < 20 && begun.elapsed() < Duration::from_secs(120) {
        let mut moved = false;
        open.retain_mut(|(tcp, kind, at)| {
            let mut answer = [0; 512];
            match tcp.read(&mut answer) {
                Ok(0) => {
                    closed += 1;
                    return false;
                }
                Ok(length) => {
                    let text = String::from_utf8_lossy(&answer[..length]);
                    // No room for one more connection or body, or for one more that waits its turn.
                    let is_refusal =
                        ["HTTP/1.1 503 ", "HTTP/1.1 429 "].iter().any(|start| text.starts_with(start));
                    assert!(is_refusal, "{text}");
                    refused += 1;
                    return false;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(_) => {
                    closed += 1;
                    return false;
                }
            }
            if let Ok(length) = tcp.write(&payloads[*kind][*at..]) {
                *at += length;
                moved |= length > 0;
            }
            true
        });
        quiet = if moved { 0 } else { quiet + 1 };
        std::thread::sleep(Duration::from_millis(if moved { 0 } else { 20 }));
    }
    let peak = peak_bytes(&plane.control);
    println!(
        "{clients} clients: {} held, {refused} told so, {closed} closed; peak {} MiB of {MEMORY_MIB}, {:?}",
        open.len(),
        peak >> 20,
        begun.elapsed()
    );
    assert!(refused > 0, "nobody was told");
    assert!(peak < MEMORY_MIB << 20, "{peak} bytes");
    drop(open);
    until("the daemon to serve again", || get(plane.port, "/health").filter(|answer| answer.status == 200));
    drop(plane);
    drop(group);
}

/// An engine that is healthy and answers every POST with tokens without an end.
fn endless_engine() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let url = format!("http://{}", listener.local_addr().expect("an address"));
    std::thread::spawn(move || {
        for mut tcp in listener.incoming().map_while(Result::ok) {
            std::thread::spawn(move || {
                let mut piece = [0; 4096];
                let length = tcp.read(&mut piece).unwrap_or(0);
                if !piece[..length].starts_with(b"POST ") {
                    let is_health = piece[..length].starts_with(b"GET /health");
                    let status = if is_health { "200 OK" } else { "404 Not Found" };
                    let _ = write!(
                        tcp,
                        "HTTP/1.1 {status}\r\nContent-Length: 15\r\nConnection: close\r\n\r\n{{\"status\":\"ok\"}}"
                    );
                    return;
                }
                let event = "data: {\"choices\":[{\"index\":0,\"text\":\"a word or two\",\"finish_reason\":null}]}\n\n";
                let chunk = format!("{:x}\r\n{event}\r\n", event.len());
                let head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n";
                let mut written = tcp.write_all(head.as_bytes());
                while written.is_ok() {
                    written = tcp.write_all(chunk.as_bytes());
                }
            });
        }
    });
    url
}

#[test]
fn tasks_that_nobody_reads_leave_room_for_everybody_else() {
    const TASKS: usize = 60;
    const BUDGET: f64 = (2 << 20) as f64;
    let limits = [("ORCHESTRATORD_MAX_BODY_MIB", "1"), ("ORCHESTRATORD_BODY_BUDGET_MIB", "2")];
    let plane = Plane::start(false, &limits);
    plane.announce("m", &endless_engine(), 64);
    plane.until_routable(1);
    let held = || metric(plane.port, "orchestratord_request_body_bytes").expect("a metric");
    for number in 0..TASKS {
        let body = format!(r#"{{"task_id":"t{number}","prompt":"p","max_tokens":50000}}"#);
        assert_eq!(post(plane.port, "/v2/tasks", &body).status, 202);
    }
    // Each would keep 64 KiB, and all of them nearly 4 MiB.
    until("half of the budget to be taken", || (held() > 0.4 * BUDGET).then_some(()));
    let (mut rests, begun) = (0, Instant::now());
    while rests < 10 {
        assert!(begun.elapsed() < Duration::from_secs(60), "they go on without a reader");
        let before = held();
        assert!(before <= 0.5 * BUDGET, "{before} bytes");
        std::thread::sleep(Duration::from_millis(50));
        rests = if held() == before { rests + 1 } else { 0 };
    }
    // One that is read goes on, and others have room.
    let mut reader = open(plane.port, "GET", "/v2/tasks/t3/events", None, "").expect("events");
    for _ in 0..5_000 {
        assert!(reader.event().is_some(), "it goes on");
    }
    let large = format!(r#"{{"model":"m","prompt":"{}","stream":true}}"#, "x".repeat(400_000));
    let other = open(plane.port, "POST", "/v1/completions", None, &large).expect("an answer");
    assert_eq!(other.status, 200, "{}", other.head);
    drop((reader, other));
    for number in 0..TASKS {
        post(plane.port, &format!("/v2/tasks/t{number}/cancel"), "");
        let _ = get(plane.port, &format!("/v2/tasks/t{number}/events"));
    }
    until("all room to be given back", || (held() == 0.0).then_some(()));
}
