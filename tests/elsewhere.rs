//! When a request goes to another engine, when it must not, and what its client is told: a control plane and
//! nodes' agents over real sockets, and engines that follow a script. What is asserted is what engines received
//! and what clients got.

#[path = "daemons/harness.rs"]
#[allow(dead_code, reason = "shared with other tests, which use other parts")]
mod harness;
#[path = "openai_clients/plane.rs"]
#[allow(dead_code, reason = "shared with other tests, which use other parts")]
mod plane;
#[allow(dead_code, reason = "shared with other tests, which use other parts")]
mod relay_support;

use std::fs;
use std::io::Read;
use std::sync::{Arc, Condvar, Mutex};

use harness::{POOL_MANAGERD, Process, ask, free_port, get, hand_over, metric, post, until};
use plane::Plane;
use relay_support::{Client, Engine, Line, Recorded, find, reset_on_close};
use serde_json::json;

const PATH: &str = "/v1/completions";
const HEAD: &str = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n";
const TOKEN: &str = "data: {\"choices\":[{\"index\":0,\"text\":\"a\",\"finish_reason\":null}]}\n\n";
const DONE: &str = "data: [DONE]\n\n";
const WHOLE: &str = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}";

/// Without the beginning of a conversation, which would have a replica of its own.
const BODY: &str = r#"{"model":"m"}"#;

fn chunk(data: &str) -> String {
    format!("{:x}\r\n{data}\r\n", data.len())
}

/// An engine that is healthy; `script` gets all requests but the probes, on connections that carried none.
fn scripted(script: impl Fn(&mut Line, &Recorded) -> bool + Send + Sync + 'static) -> Engine {
    Engine::start(move |line| {
        while let Some(request) = line.request() {
            if request.head.starts_with("GET ") {
                let status = if request.head.contains("/health ") { "200 OK" } else { "404 Not Found" };
                let fields = "Connection: close\r\nContent-Length: 2\r\n";
                return line.write(format!("HTTP/1.1 {status}\r\n{fields}\r\n{{}}").as_bytes());
            } else if !script(line, &request) {
                return;
            }
        }
    })
}

fn client(port: u16) -> Client {
    Client::connect(([127, 0, 0, 1], port).into())
}

fn posts(engine: &Engine) -> usize {
    engine.requests().iter().filter(|request| request.head.starts_with("POST")).count()
}

fn replica(pool: &str, port: u16, slots: u32, more: &str) -> String {
    format!(
        r#"{{"pool_id":"{pool}","replica_id":"r0","engine":"other","url":"http://127.0.0.1:{port}","slots":{slots},"model":"m"{more}}}"#
    )
}

/// How an engine breaks that has read a whole request on a fresh connection.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Break {
    /// Without a byte of an answer.
    Silent,
    /// Within the head of its answer.
    InHead,
    /// Behind an interim answer.
    Interim,
}

#[test]
fn a_request_goes_elsewhere_until_a_byte_of_an_answer_came_and_not_behind_it() {
    for cloud in [false, true] {
        for how in [Break::Silent, Break::InHead, Break::Interim] {
            for reset in [false, true] {
                let broken = scripted(move |line, _| {
                    match how {
                        Break::Silent => {}
                        Break::InHead => line.write(b"HTTP/1.1 200 OK\r\nContent-Le"),
                        Break::Interim => line.write(b"HTTP/1.1 102 Processing\r\n\r\n"),
                    }
                    if reset {
                        std::thread::sleep(std::time::Duration::from_millis(5));
                        reset_on_close(&line.tcp);
                    }
                    false
                });
                let whole = scripted(|line, _| {
                    line.write(WHOLE.as_bytes());
                    true
                });
                let plane = Plane::start(cloud, &[]);
                // Both are idle: the first by name is asked first.
                hand_over(&plane.engines(), "a.json", &replica("a", broken.address.port(), 1, ""));
                hand_over(&plane.engines(), "b.json", &replica("b", whole.address.port(), 1, ""));
                plane.until_routable(2);
                let name = format!("CLOUD: {cloud}, {how:?}, reset: {reset}");
                let answer = ask(plane.port, "POST", PATH, None, BODY).expect(&name);
                let elsewhere = usize::from(how == Break::Silent);
                assert_eq!(answer.status, if elsewhere == 1 { 200 } else { 502 }, "{name}: {answer:?}");
                assert_eq!((posts(&broken), posts(&whole)), (1, elsewhere), "{name}");
                if elsewhere == 0 {
                    assert_eq!(answer.json()["error"]["type"], "upstream_error", "{name}: {answer:?}");
                }
                plane.until_free(2);
            }
        }
    }
}

#[test]
fn a_key_file_that_cannot_be_used_holds_its_replica_out_and_blames_no_client() {
    for cloud in [false, true] {
        // It refuses whoever shows no key, as engines do.
        let keyed = scripted(|line, request| {
            let good = request.head.to_ascii_lowercase().contains("authorization: bearer engine-key");
            let answer = "HTTP/1.1 401 Unauthorized\r\nContent-Length: 2\r\n\r\n{}";
            line.write(if good { WHOLE } else { answer }.as_bytes());
            true
        });
        let other = scripted(|line, _| {
            line.write(WHOLE.as_bytes());
            true
        });
        let plane = Plane::start(cloud, &[]);
        let key = plane.directory.path().join("the-engines-key");
        let auth = format!(r#","auth":{{"file":"{}"}}"#, key.display());
        fs::write(&key, "engine-key\n").expect("written");
        hand_over(&plane.engines(), "a.json", &replica("a", keyed.address.port(), 1, &auth));
        hand_over(&plane.engines(), "b.json", &replica("b", other.address.port(), 1, ""));
        plane.until_routable(2);
        assert_eq!((post(plane.port, PATH, BODY).status, posts(&keyed)), (200, 1), "the first by name");
        fs::remove_file(&key).expect("removed");
        for _ in 0..3 {
            assert_eq!(post(plane.port, PATH, BODY).status, 200, "another replica is asked");
        }
        assert_eq!((posts(&keyed), posts(&other)), (1, 3), "CLOUD: {cloud}: nobody is asked without a key");
        let told = get(plane.port, "/v2/pools").expect("pools").body;
        assert!(told.contains("cannot be used") || cloud && told.contains("503"), "{told}");
        let log = match &plane.agent {
            Some(agent) => agent.log(),
            None => plane.control.log(),
        };
        assert!(log.contains("the-engines-key cannot be read") && log.contains("a/r0"), "{log}");

        // Where there is no other, the client waits, and is told of the replica and never of its own token.
        fs::remove_file(plane.engines().join("b.json")).expect("removed");
        until("one replica", || metric(plane.port, "orchestratord_slots").filter(|slots| *slots <= 1.0));
        let mut impatient = client(plane.port);
        let fields = "X-Llorch-Wait-Ms: 300\r\n";
        impatient.send(format!(
            "POST {PATH} HTTP/1.1\r\nHost: localhost\r\n{fields}Content-Length: {}\r\n\r\n{BODY}",
            BODY.len()
        ));
        let refused = impatient.receive();
        assert!(matches!(refused.status, 502 | 503), "{refused:?}");
        assert!(!refused.text().contains("the-engines-key"), "{refused:?}");
        assert_eq!(posts(&keyed), 1);

        // Written again, it serves without a restart.
        fs::write(&key, "engine-key\n").expect("written");
        until("the key to be used again", || (post(plane.port, PATH, BODY).status == 200).then_some(()));
        assert_eq!(posts(&keyed), 2);
    }
}

#[test]
fn a_long_context_is_looked_for_and_only_a_task_that_says_so_is_refused_without_one() {
    let home = harness::Home::start(&[]);
    let directory = home.directory.path();
    let mut engines = Vec::new();
    for (pool, context) in [("short", "512"), ("long", "8192")] {
        let port = free_port();
        let flags = [
            "--dialect",
            "vllm",
            "--model",
            "m",
            "--ctx",
            context,
            "--prefill-ms",
            "0",
            "--tokens-per-second",
            "0",
        ];
        engines.push(harness::demo_engine(port, &flags, directory));
        let text = json!({"pool_id": pool, "replica_id": "r0", "engine": "vllm", "slots": 8,
            "url": format!("http://127.0.0.1:{port}")});
        hand_over(&home.engines(), &format!("{pool}.json"), &text.to_string());
    }
    home.until_routable(2.0);
    let chat = |n: usize, tokens: u64| {
        let messages = json!([{"role": "user", "content": format!("conversation {n}")}]);
        let body = json!({"model": "m", "messages": messages, "max_tokens": tokens}).to_string();
        let answer = post(home.port, "/v1/chat/completions", &body);
        answer.field("x-llorch-pool").unwrap_or_else(|| panic!("nobody was asked: {answer:?}")).to_string()
    };
    let create = |id: &str, context: u64| {
        let body = json!({"task_id": id, "prompt": "p", "model_ref": "m", "max_tokens": 2, "ctx": context});
        post(home.port, "/v2/tasks", &body.to_string())
    };
    let pool_of = |id: &str| {
        let events = get(home.port, &format!("/v2/tasks/{id}/events?verbose=true")).expect("events").body;
        events.split("\"pool_id\":\"").nth(1).and_then(|rest| rest.split('"').next()).map(str::to_string)
    };
    for n in 0..12 {
        assert_eq!(chat(n, 1_000), "long");
        let id = format!("long-{n}");
        assert_eq!((create(&id, 4_096).status, pool_of(&id).as_deref()), (202, Some("long")));
    }
    assert!((0..40).any(|n| chat(n, 5) == "short"), "where a short one does, it is used");
    let refused = create("too-long", 100_000);
    assert_eq!(
        (refused.status, refused.json()["code"].as_str()),
        (400, Some("INVALID_PARAMS")),
        "{refused:?}"
    );
    assert!(refused.body.contains("8192"), "{refused:?}");

    fs::remove_file(home.engines().join("long.json")).expect("removed");
    until("one replica", || metric(home.port, "orchestratord_slots").filter(|slots| *slots <= 8.0));
    assert_eq!(chat(0, 1_000), "short", "what it makes of that is the engine's to say");
    assert_eq!(create("now-too-long", 4_096).status, 400);
}

/// A second node, with an agent and a directory of its own.
fn second_node(plane: &Plane) -> (Process, std::path::PathBuf) {
    let directory = plane.directory.path().join("second");
    fs::create_dir_all(&directory).expect("a directory");
    let port = free_port();
    let (addr, control) = (format!("127.0.0.1:{port}"), format!("http://127.0.0.1:{}", plane.port));
    let address = format!("http://{addr}");
    let env = [
        ("POOL_MANAGERD_CLOUD_PROFILE", "true"),
        ("POOL_MANAGERD_NODE_ID", "second"),
        ("POOL_MANAGERD_ADDRESS", &address),
        ("ORCHESTRATORD_URL", &control),
        ("POOL_MANAGERD_ADDR", &addr),
    ];
    let agent = Process::start(POOL_MANAGERD, &[], &env, &directory);
    until("the second agent", || get(port, "/health").filter(|answer| answer.status == 200));
    (agent, directory.join(".runtime/engines"))
}

#[test]
fn a_node_that_vanishes_ends_its_streams_with_an_error_and_takes_its_waiting_work_elsewhere() {
    const STREAMS: usize = 40;
    const SILENT: usize = 5;
    const WAITING: usize = 20;
    const SECOND_SLOTS: usize = 4;
    // Streams stand still behind their first event, other requests are not answered at all.
    let lost = scripted(|line, request| {
        if find(&request.body, b"\"stream\":true").is_some() {
            line.write(format!("{HEAD}{}", chunk(TOKEN)).as_bytes());
        }
        line.closed_at();
        false
    });
    let gate = Arc::new((Mutex::new(false), Condvar::new()));
    let opens = gate.clone();
    let kept = scripted(move |line, _| {
        let (open, changed) = &*opens;
        let mut open = open.lock().expect("no panic in the test");
        while !*open {
            open = changed.wait(open).expect("no panic in the test");
        }
        drop(open);
        line.write(format!("{HEAD}{}{}0\r\n\r\n", chunk(TOKEN), chunk(DONE)).as_bytes());
        true
    });
    let mut plane = Plane::start(true, &[]);
    let slots = (STREAMS + SILENT) as u32;
    hand_over(&plane.engines(), "m.json", &replica("first", lost.address.port(), slots, ""));
    plane.until_routable(1);
    let ask_for = |stream: bool| {
        let body = json!({"model": "m", "prompt": "p", "stream": stream}).to_string();
        let mut client = client(plane.port);
        let length = body.len();
        client.send(format!(
            "POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n{body}"
        ));
        client
    };
    let mut streams: Vec<Client> = (0..STREAMS).map(|_| ask_for(true)).collect();
    for stream in &mut streams {
        let mut got = Vec::new();
        while find(&got, TOKEN.as_bytes()).is_none() {
            let mut buffer = [0; 1024];
            let length = stream.tcp.read(&mut buffer).expect("the first event");
            assert!(length > 0, "{:?}", String::from_utf8_lossy(&got));
            got.extend_from_slice(&buffer[..length]);
        }
        assert!(got.starts_with(b"HTTP/1.1 200"));
    }
    let silent: Vec<Client> = (0..SILENT).map(|_| ask_for(false)).collect();
    until("all of the first node's slots to be taken", || (posts(&lost) == STREAMS + SILENT).then_some(()));
    let waiting: Vec<Client> = (0..WAITING).map(|n| ask_for(n % 2 == 0)).collect();
    let waits = |count: usize| {
        until("waiters", || {
            metric(plane.port, "orchestratord_requests_waiting").filter(|n| *n == count as f64)
        });
    };
    waits(WAITING);
    let (_second, engines) = second_node(&plane);
    hand_over(&engines, "m.json", &replica("second", kept.address.port(), SECOND_SLOTS as u32, ""));
    waits(WAITING - SECOND_SLOTS);

    plane.agent.as_mut().expect("CLOUD").kill();
    for mut stream in streams {
        let mut rest = Vec::new();
        let _ = stream.tcp.read_to_end(&mut rest);
        let rest = String::from_utf8_lossy(&rest);
        assert!(rest.contains("data: {\"error\":") && rest.contains("upstream_error"), "{rest}");
        assert!(!rest.contains("[DONE]") && !rest.ends_with("0\r\n\r\n"), "it looks finished: {rest}");
    }
    // Those that had no byte of an answer wait with the others.
    until("the lost ones to wait again", || {
        let count = (WAITING - SECOND_SLOTS + SILENT) as f64;
        get(plane.port, "/metrics")
            .filter(|page| page.body.contains(&format!("orchestratord_requests_waiting {count}\n")))
    });
    *gate.0.lock().expect("no panic in the engine") = true;
    gate.1.notify_all();
    for mut client in waiting.into_iter().chain(silent) {
        let answer = client.receive();
        assert_eq!((answer.status, answer.clean), (200, true), "{answer:?}");
        assert!(answer.text().contains("[DONE]"), "{answer:?}");
    }
    assert_eq!(posts(&kept), WAITING + SILENT, "each was sent once");
    until("the first node's slots to be gone", || {
        metric(plane.port, "orchestratord_replicas_routable").filter(|count| *count == 1.0)
    });
}
