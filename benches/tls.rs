//! What TLS costs the control plane on connections that are kept: processor time a request, in the clear and
//! within TLS, for an answer of its own, a relayed answer, and a relayed stream; and what a handshake costs.
//!
//! `cargo bench --bench tls`; with the path of an `orchestratord` behind `--` that one is measured.

#[allow(dead_code, reason = "tests use the rest of it")]
#[path = "../tests/daemons/harness.rs"]
mod harness;
#[path = "../tests/tls_support/mod.rs"]
mod tls_support;

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};

use harness::*;
use tls_support::{Pki, Socket};

const CHAT: &str = "/v1/chat/completions";
/// Rounds in turn, of which the cheapest counts: what else runs on a machine only ever adds.
const ROUNDS: usize = 12;
/// Requests of a round.
const REQUESTS: usize = 600;
const STREAMS: usize = 12;
const HANDSHAKES: usize = 500;
/// Events of one stream, each of which is written by itself.
const EVENTS: usize = 200;

/// An engine on this machine that answers at once: with a stream where one is asked for.
fn engine() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = listener.local_addr().expect("an address").port();
    std::thread::spawn(move || {
        for tcp in listener.incoming() {
            std::thread::spawn(move || serve(&tcp.expect("a connection")));
        }
    });
    port
}

fn serve(tcp: &TcpStream) {
    let _ = tcp.set_nodelay(true);
    let mut reader = BufReader::new(tcp);
    let (mut out, answer) = (tcp, "x".repeat(600));
    loop {
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            if !matches!(reader.read_line(&mut head), Ok(1..)) {
                return;
            }
        }
        let length = head.lines().find_map(|line| {
            line.to_ascii_lowercase().strip_prefix("content-length: ").map(|n| n.parse().expect("a number"))
        });
        let mut body = vec![0; length.unwrap_or(0)];
        if reader.read_exact(&mut body).is_err() {
            return;
        }
        let path = head.split(' ').nth(1).unwrap_or_default();
        let said = if path != CHAT {
            r#"{"data":[{"id":"m"}]}"#.to_string()
        } else if String::from_utf8_lossy(&body).contains("\"stream\":true") {
            let _ = out.write_all(
                b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n",
            );
            let event =
                "data: {\"choices\":[{\"delta\":{\"content\":\"token \"},\"finish_reason\":null}]}\n\n";
            for _ in 0..EVENTS {
                let _ = out.write_all(format!("{:x}\r\n{event}\r\n", event.len()).as_bytes());
                std::thread::sleep(std::time::Duration::from_micros(100));
            }
            let _ = out.write_all(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n");
            continue;
        } else {
            format!(r#"{{"model":"m","choices":[{{"message":{{"content":"{answer}"}}}}]}}"#)
        };
        let length = said.len();
        let head =
            format!("HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n");
        if out.write_all(&[head.as_bytes(), said.as_bytes()].concat()).is_err() {
            return;
        }
    }
}

/// Processor time of a process so far, in nanoseconds, of all its threads.
fn cpu_ns(pid: u32) -> u64 {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).expect("a process");
    let of = |path: std::path::PathBuf| {
        let text = fs::read_to_string(path.join("schedstat")).expect("a thread");
        text.split(' ').next().and_then(|ns| ns.parse::<u64>().ok()).expect("a number")
    };
    tasks.map(|task| of(task.expect("a thread").path())).sum()
}

/// Sends a request and reads to the end of its answer, which is known by its last bytes.
fn exchange(socket: &Socket, request: &[u8], end: &[u8]) {
    let (mut out, mut input) = (socket, socket);
    out.write_all(request).expect("sent");
    let (mut seen, mut buffer) = (Vec::new(), [0; 16 * 1024]);
    while !seen.ends_with(end) {
        let length = input.read(&mut buffer).expect("an answer");
        assert!(length > 0, "it was closed behind {}", String::from_utf8_lossy(&seen));
        seen.extend_from_slice(&buffer[..length]);
    }
    assert!(seen.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&seen[..seen.len().min(300)]));
}

/// What is measured.
struct Case {
    name: &'static str,
    count: usize,
    request: Vec<u8>,
    /// Last bytes of the answer.
    end: &'static [u8],
}

/// Microseconds of processor time for each of `count` requests on one connection.
fn cost_us(pid: u32, socket: &Socket, count: usize, request: &[u8], end: &[u8]) -> f64 {
    let before = cpu_ns(pid);
    (0..count).for_each(|_| exchange(socket, request, end));
    (cpu_ns(pid) - before) as f64 / count as f64 / 1e3
}

#[allow(clippy::print_stdout, reason = "its figures are what a benchmark is for")]
fn main() {
    let given = std::env::args().skip(1).find(|arg| !arg.starts_with("--"));
    let program = given.unwrap_or_else(|| ORCHESTRATORD.to_string());
    let (directory, pki) = (tempfile::tempdir().expect("a directory"), Pki::new());
    fs::write(directory.path().join("ca.crt"), &pki.ca_pem).expect("written");
    pki.issue(&["localhost"]).save(directory.path(), "own");
    let config = pki.client(Some(&pki.issue(&["node-a"])));
    let engines = directory.path().join(".runtime/engines");
    hand_over(&engines, "r0.json", &handoff(engine(), "r0", 8));
    let start = |secured: bool| {
        let port = free_port();
        let addr = format!("127.0.0.1:{port}");
        let mut env = vec![("ORCHESTRATORD_ADDR", addr.as_str())];
        if secured {
            env.extend([
                ("ORCHESTRATORD_TLS_CERT", "own.crt"),
                ("ORCHESTRATORD_TLS_KEY", "own.key"),
                ("ORCHESTRATORD_TLS_CLIENT_CA", "ca.crt"),
            ]);
        }
        (port, Process::start(&program, &[], &env, directory.path()))
    };
    let daemons = [start(false), start(true)];
    let connect = |secured: bool, port: u16| {
        let tcp = until("the daemon", || TcpStream::connect(("127.0.0.1", port)).ok());
        tcp.set_nodelay(true).expect("a socket option");
        if !secured {
            return Socket::plain(tcp);
        }
        let socket = Socket::client(tcp, "localhost", &config);
        socket.handshake().expect("agreed");
        socket
    };
    let post = |body: &str| {
        let length = body.len();
        format!("POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n{body}")
            .into_bytes()
    };
    let words = "a word and another one ".repeat(60);
    let chat = post(&format!(r#"{{"messages":[{{"role":"user","content":"{words}"}}]}}"#));
    let stream = post(r#"{"stream":true,"messages":[{"role":"user","content":"Hello"}]}"#);
    let health = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n".to_vec();
    let case = |name, count, request, end| Case { name, count, request, end };
    let cases = [
        case("an answer of its own", REQUESTS, health, &b"}"[..]),
        case("a relayed answer", REQUESTS, chat, b"}]}"),
        case("a relayed stream of 200 tokens", STREAMS, stream, b"\r\n0\r\n\r\n"),
    ];
    for (port, daemon) in &daemons {
        let secured = *port == daemons[1].0;
        let socket = connect(secured, *port);
        until("the engine", || {
            let text = daemon.log();
            text.contains("r0").then_some(())
        });
        drop(socket);
    }
    for Case { name, count, request, end } in cases {
        let mut least = [f64::MAX; 2];
        let lines = [false, true].map(|secured| connect(secured, daemons[usize::from(secured)].0));
        for _ in 0..ROUNDS {
            for ((least, line), (_, daemon)) in least.iter_mut().zip(&lines).zip(&daemons) {
                *least = least.min(cost_us(daemon.pid(), line, count, &request, end));
            }
        }
        let [clear, secured] = least;
        println!(
            "{name}: {clear:.1} us in the clear, {secured:.1} us within TLS, {:.2} times",
            secured / clear
        );
    }
    let (port, daemon) = &daemons[1];
    let before = cpu_ns(daemon.pid());
    (0..HANDSHAKES).for_each(|_| drop(connect(true, *port)));
    let us = (cpu_ns(daemon.pid()) - before) as f64 / HANDSHAKES as f64 / 1e3;
    println!("a connection with its handshake, both sides with certificates: {us:.0} us");
}
