//! What pool-managerd learns of engines of each kind, and what it does about keys and engines that hang.
//! The engines are small servers of this file that answer as the real ones do.

#[path = "daemons/harness.rs"]
#[allow(dead_code, reason = "shared with other tests")]
mod harness;

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use harness::*;
use serde_json::Value;

const KEY: &str = "sk-canary-3f9a";

/// An engine: pages by path, perhaps with a key, and streams that can be made to stand still.
#[derive(Default)]
struct Engine {
    pages: BTreeMap<&'static str, (u16, &'static str)>,
    /// Wanted from everything but `/health`.
    key: Option<&'static str>,
    hangs: AtomicBool,
    /// Methods and paths, in the order in which they came.
    asked: Mutex<Vec<String>>,
}

impl Engine {
    fn start(self) -> (Arc<Engine>, u16) {
        let listener = llama_orch::service::machine::listen_on_free_port().expect("a port");
        let port = listener.local_addr().expect("an address").port();
        let engine = Arc::new(self);
        let shared = engine.clone();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let (engine, stream) = (shared.clone(), stream.expect("a connection"));
                thread::spawn(move || engine.serve(stream));
            }
        });
        (engine, port)
    }

    /// One request a connection. Whoever leaves is left alone.
    fn serve(&self, mut stream: TcpStream) {
        let mut reader = BufReader::new(stream.try_clone().expect("a socket"));
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            if reader.read_line(&mut head).unwrap_or(0) == 0 {
                return;
            }
        }
        let field = |name: &str| {
            head.lines().find_map(|line| {
                let (field, value) = line.split_once(':')?;
                field.eq_ignore_ascii_case(name).then(|| value.trim().to_string())
            })
        };
        let length = field("content-length").and_then(|length| length.parse().ok()).unwrap_or(0);
        let mut body = vec![0; length];
        if reader.read_exact(&mut body).is_err() {
            return;
        }
        let mut words = head.split(' ');
        let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        self.asked.lock().expect("nobody panics with it").push(format!("{method} {path}"));
        let has_key = self.key.is_none_or(|key| field("authorization") == Some(format!("Bearer {key}")));
        if path != "/health" && !has_key {
            return respond(&mut stream, 401, r#"{"error":{"message":"Invalid API Key","code":401}}"#);
        }
        if method == "POST" {
            return self.generate(&mut stream, &String::from_utf8_lossy(&body));
        }
        let (status, text) = self.pages.get(path).copied().unwrap_or((404, "{}"));
        respond(&mut stream, status, text);
    }

    fn generate(&self, stream: &mut TcpStream, body: &str) {
        if !body.contains(r#""stream":true"#) {
            self.wait_while_hanging();
            return respond(stream, 200, r#"{"choices":[{"text":"x","finish_reason":"length"}]}"#);
        }
        let _ = stream
            .write_all(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n");
        for _ in 0..10_000 {
            if stream.write_all(b"data: {\"choices\":[{\"text\":\"x\"}]}\n\n").is_err() {
                return;
            }
            thread::sleep(Duration::from_millis(20));
            self.wait_while_hanging();
        }
    }

    fn wait_while_hanging(&self) {
        while self.hangs.load(Ordering::Relaxed) {
            thread::sleep(Duration::from_millis(20));
        }
    }
}

fn respond(stream: &mut TcpStream, status: u16, text: &str) {
    let head = format!("HTTP/1.1 {status} X\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", text.len());
    let _ = stream.write_all((head + text).as_bytes());
}

/// A node agent with its directory.
struct Agent {
    directory: tempfile::TempDir,
    port: u16,
    process: Process,
}

impl Agent {
    fn start(args: &[&str]) -> Agent {
        let directory = tempfile::tempdir().expect("a directory");
        let port = free_port();
        let addr = format!("127.0.0.1:{port}");
        let process =
            Process::start(POOL_MANAGERD, &[&["--addr", &addr], args].concat(), &[], directory.path());
        until("the agent", || get(port, "/health").filter(|answer| answer.status == 200));
        Agent { directory, port, process }
    }

    fn hand_over(&self, replica: &str, port: u16, more: &str) {
        let text =
            format!(r#"{{"pool_id":"p","replica_id":"{replica}","url":"http://127.0.0.1:{port}"{more}}}"#);
        hand_over(&self.directory.path().join(".runtime/engines"), &format!("{replica}.json"), &text);
    }

    /// Waits until a replica's status is as `want` says.
    fn until(&self, replica: &str, what: &str, want: impl Fn(&Value) -> bool) -> Value {
        until(what, || {
            let status = get(self.port, &format!("/v2/pools/p/replicas/{replica}/status"))?;
            Some(status.json()).filter(|status| want(status))
        })
    }
}

fn engine(pages: &[(&'static str, u16, &'static str)]) -> Engine {
    let pages = pages.iter().map(|(path, status, text)| (*path, (*status, *text))).collect();
    Engine { pages, ..Engine::default() }
}

const PROPS: (&str, u16, &str) =
    ("/props", 200, r#"{"default_generation_settings":{"n_ctx":8192},"total_slots":6,"model_path":"/m"}"#);
const LIST: (&str, u16, &str) =
    ("/v1/models", 200, r#"{"object":"list","data":[{"id":"org/model","max_model_len":4096}]}"#);
const HEALTHY: (&str, u16, &str) = ("/health", 200, "");

#[test]
fn each_kind_of_engine_is_asked_in_its_own_way() {
    let agent = Agent::start(&[]);
    let info =
        ("/info", 200, r#"{"model_id":"org/tgi","max_total_tokens":2048,"max_concurrent_requests":128}"#);
    let cases = [
        (
            "llamacpp",
            engine(&[HEALTHY, PROPS, ("/v1/models", 200, r#"{"data":[{"id":"q"}]}"#)]),
            "q",
            6,
            Some(8192),
        ),
        ("vllm", engine(&[HEALTHY, LIST]), "org/model", 1, Some(4096)),
        ("sglang", engine(&[HEALTHY, LIST]), "org/model", 1, Some(4096)),
        ("tgi", engine(&[HEALTHY, info]), "org/tgi", 128, Some(2048)),
        // Without a health path of its own.
        ("mlx", engine(&[LIST]), "org/model", 1, Some(4096)),
    ];
    let mut engines = Vec::new();
    for (kind, served, model, slots, context) in cases {
        let (served, port) = served.start();
        agent.hand_over(kind, port, &format!(r#","engine":"{kind}""#));
        let status = agent.until(kind, kind, |status| status["ready"] == true);
        assert_eq!(
            (&status["models"][0], &status["slots_total"], &status["context_length"]),
            (&Value::from(model), &Value::from(slots), &Value::from(context)),
            "{kind}: {status}"
        );
        engines.push(served);
    }
    // What was asked once is not asked again by later probes.
    let asked = engines[0].asked.lock().expect("nobody panics with it").clone();
    assert_eq!(asked, ["GET /health", "GET /props", "GET /v1/models"]);
}

#[test]
fn an_engine_takes_its_time_and_its_list_of_models_proves_nothing() {
    let agent = Agent::start(&[]);
    // SGLang lists its models while it loads.
    let (_loading, port) = engine(&[("/health", 503, ""), LIST]).start();
    agent.hand_over("r0", port, r#","engine":"sglang""#);
    let told = |status: &Value| status["reason"].as_str().is_some_and(|why| why.contains("503"));
    let status = agent.until("r0", "the reason", told);
    assert_eq!((&status["state"], &status["ready"]), (&Value::from("probing"), &Value::from(false)));
}

#[test]
fn a_key_is_read_again_named_when_it_is_wrong_and_shown_nowhere() {
    let agent = Agent::start(&[]);
    let keyed = Engine { key: Some(KEY), ..engine(&[("/ping", 200, "ok"), PROPS]) };
    let (_served, port) = keyed.start();
    let key_file = agent.directory.path().join("engine.key");
    let path = key_file.display().to_string();
    let more = format!(r#","model":"m","health_path":"/ping","auth":{{"file":"{path}"}}"#);
    agent.hand_over("r0", port, &more);
    let reason = |status: &Value, part: &str| {
        status["reason"].as_str().is_some_and(|why| why.contains(part) && why.contains(&path))
    };
    agent.until("r0", "a missing key", |status| reason(status, "cannot be read"));
    fs::write(&key_file, "sk-wrong\n").expect("written");
    agent.until("r0", "a wrong key", |status| reason(status, "does not accept the key"));
    fs::write(&key_file, format!("{KEY}\n")).expect("written");
    let status = agent.until("r0", "the right key", |status| status["ready"] == true);
    assert_eq!(status["slots_total"], 6, "its properties were asked with the key: {status}");
    let relayed =
        post(agent.port, "/v2/pools/p/replicas/r0/engine/v1/completions", r#"{"prompt":"x","max_tokens":1}"#);
    assert_eq!(relayed.status, 200, "{relayed:?}");
    let shown = ["/v2/events", "/v2/pools", "/v2/handoffs", "/metrics"]
        .map(|page| get(agent.port, page).expect("an answer").body);
    assert!(!shown.concat().contains(KEY) && !agent.process.log().contains(KEY), "the key is shown");
}

#[test]
fn an_engine_that_hangs_is_tried_held_out_and_returns() {
    let agent = Agent::start(&["--hang-suspect-ms", "2000"]);
    let (served, port) = engine(&[HEALTHY]).start();
    agent.hand_over("r0", port, r#","engine":"openai","model":"m","slots":2"#);
    agent.until("r0", "the engine", |status| status["ready"] == true);
    let mut stream = open(
        agent.port,
        "POST",
        "/v2/pools/p/replicas/r0/engine/v1/completions",
        None,
        r#"{"prompt":"x","stream":true}"#,
    )
    .expect("an answer");
    stream.event().expect("a first event");
    served.hangs.store(true, Ordering::Relaxed);
    let status = agent.until("r0", "the hang", |status| status["state"] == "broken");
    assert!(status["reason"].as_str().is_some_and(|why| why.starts_with("hangs: ")), "{status}");
    let asked = served.asked.lock().expect("nobody panics with it").clone();
    assert!(
        asked.iter().filter(|line| *line == "POST /v1/completions").count() >= 2,
        "it was tried: {asked:?}"
    );
    let refused = post(agent.port, "/v2/pools/p/replicas/r0/engine/v1/completions", r#"{"prompt":"x"}"#);
    assert_eq!(refused.status, 503, "{refused:?}");
    served.hangs.store(false, Ordering::Relaxed);
    agent.until("r0", "its return", |status| status["ready"] == true);
    let events = get(agent.port, "/v2/events").expect("an answer").body;
    for told in
        ["stood still for", "ready -> broken: hangs", "it answered the trial request", "broken -> ready"]
    {
        assert!(events.contains(told), "{told} in {events}");
    }
}
