//! Daemons with little memory: they say what fits and what does not, and ten thousand clients that send the
//! largest heads and bodies are refused in part rather than anything be killed.

#[path = "daemons/harness.rs"]
#[allow(dead_code, reason = "shared with other tests, which use other parts")]
mod harness;
#[path = "openai_clients/plane.rs"]
#[allow(dead_code, reason = "shared with another test, which uses other parts")]
mod plane;

use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use harness::{ORCHESTRATORD, POOL_MANAGERD, Process, get, until};
use llama_orch::service::machine::raise_descriptor_limit;
use plane::Plane;
use rustix::process::{Pid, Resource, Rlimit, prlimit};

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
}
