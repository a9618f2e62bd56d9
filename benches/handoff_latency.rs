//! How long after a handoff's rename is its replica known, and how long until a waiting request has
//! its first byte? Real processes, real files, real sockets, on whatever machine this runs.
//!
//! `known` and `routable` are taken from the time stamps of the control plane's own events, so asking
//! for them does not disturb what is measured; a stamp is the time at which the turn began that made
//! the event, so the turn's own work (some tens of microseconds) is not in it. What a client sees, the
//! first byte, is measured from outside. The watch interval is ten seconds: what is found sooner was not
//! found by polling.

#[path = "support/mod.rs"]
mod support;

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use support::{Process, free_port, get, start, unix_ns, until};

use criterion::{Criterion, criterion_group, criterion_main};
use serde_json::Value;

/// A control plane, perhaps with a node agent in front of it, and an engine.
struct Road {
    control: u16,
    engine: u16,
    engines: PathBuf,
    next_event: u64,
    _processes: Vec<Process>,
    _directory: tempfile::TempDir,
}

impl Road {
    fn build(cloud: bool) -> Road {
        let directory = tempfile::tempdir().expect("a directory");
        let engines = directory.path().join("engines");
        let (control, agent, engine) = (free_port(), free_port(), free_port());
        let listen = |port: u16| format!("127.0.0.1:{port}");
        let watched = engines.display().to_string();
        let mut processes = vec![
            start(
                env!("CARGO_BIN_EXE_llorch"),
                &[
                    "demo-engine",
                    "--port",
                    &engine.to_string(),
                    "--prefill-ms",
                    "0",
                    "--tokens-per-second",
                    "0",
                ],
            ),
            start(
                env!("CARGO_BIN_EXE_orchestratord"),
                &[
                    "--addr",
                    &listen(control),
                    &format!("--cloud-profile={cloud}"),
                    "--state-dir",
                    &directory.path().join("control").display().to_string(),
                    "--runtime-dir",
                    &watched,
                    "--watch-interval-ms",
                    "10000",
                ],
            ),
        ];
        until("the control plane", || get(control, "/ready"));
        until("the engine", || get(engine, "/health").filter(|health| health["status"] == "ok"));
        if cloud {
            let state = directory.path().join("state").display().to_string();
            processes.push(start(
                env!("CARGO_BIN_EXE_pool-managerd"),
                &[
                    "--addr",
                    &listen(agent),
                    "--cloud-profile=true",
                    "--orchestratord-url",
                    &format!("http://127.0.0.1:{control}"),
                    "--node-id",
                    "bench",
                    "--runtime-dir",
                    &watched,
                    "--state-dir",
                    &state,
                    "--watch-interval-ms",
                    "10000",
                ],
            ));
            let online = |nodes: Value| (nodes["nodes"][0]["status"] == "Online").then_some(());
            until("the node", || get(control, "/v2/nodes").and_then(online));
        }
        let mut road =
            Road { control, engine, engines, next_event: 0, _processes: processes, _directory: directory };
        road.next_event = get(control, "/v2/events").expect("events")["next"].as_u64().expect("a number");
        road
    }

    /// Renames a handoff into place and returns when that was.
    fn hand_over(&self) -> u64 {
        let text = format!(r#"{{"url":"http://127.0.0.1:{}","pool_id":"bench","slots":4}}"#, self.engine);
        let temporary = self.engines.join(".bench.tmp");
        fs::write(&temporary, text).expect("written");
        let at = unix_ns();
        fs::rename(&temporary, self.handoff()).expect("renamed");
        at
    }

    fn handoff(&self) -> PathBuf {
        self.engines.join("bench.json")
    }

    /// When the registry told of the replica that it is in `state`.
    fn when(&mut self, state: &str) -> u64 {
        let (control, since) = (self.control, self.next_event);
        let path = format!("/v2/events?since={since}");
        let (at, seq) = until(state, || {
            let answer = get(control, &path)?;
            let found = answer["events"].as_array()?.iter().find(|event| {
                event["state"] == state
                    && event["subject"].as_str().is_some_and(|s| s.matches('/').count() == 2)
            })?;
            Some((found["at_ns"].as_u64()?, found["seq"].as_u64()?))
        });
        self.next_event = seq + 1;
        at
    }

    fn withdraw(&mut self) {
        fs::remove_file(self.handoff()).expect("removed");
        self.when("gone");
    }
}

/// Sum over `count` handoffs of the time from rename until the registry tells `state`.
fn rename_to(road: &mut Road, state: &str, count: u64) -> Duration {
    let mut total = 0;
    for _ in 0..count {
        let renamed = road.hand_over();
        total += road.when(state).saturating_sub(renamed);
        road.withdraw();
    }
    Duration::from_nanos(total)
}

/// Sum over `count` handoffs of the time from rename until a request that waits for it has the first
/// byte of its streamed answer's body.
fn rename_to_first_byte(road: &mut Road, count: u64) -> Duration {
    let mut total = Duration::ZERO;
    for _ in 0..count {
        let mut client = TcpStream::connect(("127.0.0.1", road.control)).expect("connected");
        client.set_read_timeout(Some(Duration::from_secs(20))).expect("a timeout");
        let body = r#"{"messages":[{"role":"user","content":"hello there"}],"stream":true,"max_tokens":4}"#;
        write!(
            client,
            "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        )
        .expect("sent");
        let control = road.control;
        until("the request to wait", || waiting(control).filter(|waiting| *waiting == 1));
        road.hand_over();
        let begun = Instant::now();
        let mut answer = Vec::new();
        while !has_body(&answer) {
            let mut buffer = [0; 4096];
            let length = client.read(&mut buffer).expect("an answer");
            assert!(length > 0, "the answer ended early");
            answer.extend_from_slice(&buffer[..length]);
        }
        total += begun.elapsed();
        drop(client);
        road.withdraw();
    }
    total
}

fn waiting(port: u16) -> Option<u64> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).ok()?;
    write!(stream, "GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    let line = answer.lines().find(|line| line.starts_with("orchestratord_requests_waiting "))?;
    line.rsplit_once(' ')?.1.parse().ok()
}

fn has_body(answer: &[u8]) -> bool {
    answer.windows(4).position(|window| window == b"\r\n\r\n").is_some_and(|end| answer.len() > end + 4)
}

fn handoff_latency(c: &mut Criterion) {
    let mut group = c.benchmark_group("handoff_latency");
    group.sample_size(20).warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(4));
    let mut home = Road::build(false);
    assert!(Path::new(&home.engines).is_dir(), "the control plane made its runtime directory");
    group.bench_function("home/rename_to_known", |b| b.iter_custom(|n| rename_to(&mut home, "known", n)));
    group.bench_function("home/rename_to_routable", |b| {
        b.iter_custom(|n| rename_to(&mut home, "routable", n))
    });
    group.bench_function("home/rename_to_first_byte_of_waiting_request", |b| {
        b.iter_custom(|n| rename_to_first_byte(&mut home, n));
    });
    drop(home);
    let mut cloud = Road::build(true);
    group.bench_function("cloud/rename_to_known", |b| b.iter_custom(|n| rename_to(&mut cloud, "known", n)));
    group.bench_function("cloud/rename_to_routable", |b| {
        b.iter_custom(|n| rename_to(&mut cloud, "routable", n))
    });
    group.bench_function("cloud/rename_to_first_byte_of_waiting_request", |b| {
        b.iter_custom(|n| rename_to_first_byte(&mut cloud, n));
    });
    group.finish();
}

criterion_group!(benches, handoff_latency);
criterion_main!(benches);
