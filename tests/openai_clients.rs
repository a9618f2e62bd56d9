//! The real clients, openai-python and openai-node, at a real control plane: what a program that uses them sees
//! when all is well, when it leaves, when something dies, and when it is refused.
//!
//! Opt-in, because the first run downloads the clients: `REQUIRE_OPENAI_CLIENTS=1 cargo test --test
//! openai_clients`. Without the variable each test says that it was skipped. Where there is no Node.js its
//! client is skipped too, unless `REQUIRE_OPENAI_NODE` is set.

#[path = "daemons/harness.rs"]
#[allow(dead_code, reason = "shared with other tests, which use other parts")]
mod harness;
#[path = "openai_clients/plane.rs"]
#[allow(dead_code, reason = "shared with another test, which uses other parts")]
mod plane;
#[allow(dead_code, reason = "shared with other tests, which use other parts")]
mod relay_support;

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{OnceLock, mpsc};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use harness::{Process, ask, demo_engine, free_port, get, metric, open, until};
use plane::Plane;
use relay_support::{Engine, Line, Recorded, reset_on_close};
use rustix::process::Signal;
use serde_json::{Value, json};

/// Major versions that were looked at.
const PYTHON_PACKAGE: &str = "openai>=3,<4";
const NODE_PACKAGE: &str = "openai@6";
/// How soon an engine must learn that its client left.
const CANCEL_MS_MAX: f64 = 100.0;

/// One of the clients, as a process that does one thing after the other.
struct Client {
    name: &'static str,
    child: Child,
    orders: ChildStdin,
    told: BufReader<ChildStdout>,
}

/// The commands that start the clients; installed once.
static INSTALLED: OnceLock<Vec<(&str, PathBuf, &str, PathBuf)>> = OnceLock::new();

fn run(program: &Path, args: &[&str], directory: &Path) {
    let output = Command::new(program).args(args).current_dir(directory).output();
    let output = output.unwrap_or_else(|error| panic!("{}: {error}", program.display()));
    assert!(
        output.status.success(),
        "{} {args:?}: {}",
        program.display(),
        String::from_utf8_lossy(&output.stderr)
    );
}

#[allow(clippy::print_stderr, reason = "a client that is skipped has to be named")]
fn install() -> Vec<(&'static str, PathBuf, &'static str, PathBuf)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/openai-clients");
    let python = root.join("venv/bin/python");
    std::fs::create_dir_all(root.join("node")).expect("a directory");
    if !python.exists() {
        run(Path::new("python3"), &["-m", "venv", "venv"], &root);
    }
    let found = Command::new(&python).args(["-c", "import openai"]).output().expect("Python runs");
    if !found.status.success() {
        let install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", PYTHON_PACKAGE];
        run(&python, &install, &root);
    }
    let mut all = vec![("openai-python", python, "client.py", root.clone())];
    let node = root.join("node");
    if Command::new("node").arg("--version").output().is_ok() {
        if !node.join("node_modules/openai/package.json").exists() {
            run(
                Path::new("npm"),
                &["install", "--no-audit", "--no-fund", "--prefix", ".", NODE_PACKAGE],
                &node,
            );
        }
        all.push(("openai-node", PathBuf::from("node"), "client.mjs", node));
    } else {
        assert!(std::env::var_os("REQUIRE_OPENAI_NODE").is_none(), "there is no node");
        eprintln!("skipped for openai-node: there is no node");
    }
    all
}

/// Both clients, or none where they were not asked for.
#[allow(clippy::print_stderr, reason = "a skipped test has to say so")]
fn clients() -> Vec<Client> {
    if std::env::var_os("REQUIRE_OPENAI_CLIENTS").is_none_or(|value| value != "1") {
        eprintln!("skipped: set REQUIRE_OPENAI_CLIENTS=1 to fetch the clients and test with them");
        return Vec::new();
    }
    let scripts = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/openai_clients");
    let start = |(name, program, script, directory): &(&'static str, PathBuf, &str, PathBuf)| {
        let mut child = Command::new(program)
            .arg(scripts.join(script))
            .current_dir(directory)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the client starts");
        let orders = child.stdin.take().expect("piped");
        let told = BufReader::new(child.stdout.take().expect("piped"));
        Client { name, child, orders, told }
    };
    INSTALLED.get_or_init(install).iter().map(start).collect()
}

impl Client {
    fn perform(&mut self, port: u16, what: &str, order: Value) -> Seen {
        let mut all = json!({"do": what, "base_url": format!("http://127.0.0.1:{port}/v1")});
        all.as_object_mut().expect("an object").extend(order.as_object().expect("an object").clone());
        writeln!(self.orders, "{all}").expect("the client reads");
        let mut line = String::new();
        self.told.read_line(&mut line).expect("the client tells");
        let seen =
            serde_json::from_str(&line).unwrap_or_else(|error| panic!("{}: {error}: {line:?}", self.name));
        Seen { value: seen, name: format!("{} {all}", self.name) }
    }

    fn chat(&mut self, port: u16, model: &str, more: Value) -> Seen {
        self.ask(port, "chat", model, json!({"messages": [{"role": "user", "content": "one two"}]}), more)
    }

    fn ask(&mut self, port: u16, what: &str, model: &str, mut body: Value, more: Value) -> Seen {
        body["model"] = json!(model);
        body.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        self.perform(port, what, json!({"body": body}))
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a program would have seen.
struct Seen {
    value: Value,
    name: String,
}

impl Seen {
    fn answer(&self) -> &Value {
        assert!(self.value["raised"].is_null(), "{self}");
        &self.value["answer"]
    }

    fn chunks(&self) -> &[Value] {
        self.value["chunks"].as_array().expect("a list")
    }

    fn finished(&self) -> bool {
        self.chunks().iter().any(|chunk| chunk["choices"][0]["finish_reason"].is_string())
    }

    fn raised(&self) -> Option<&Value> {
        Some(&self.value["raised"]).filter(|raised| !raised.is_null())
    }

    /// Asserts that it raised such an error, with such a status, code and part of its message.
    fn assert_raised(&self, name: &str, status: u16, code: &str, part: &str) {
        let raised = self.raised().unwrap_or_else(|| panic!("nothing was raised: {self}"));
        let message = raised["message"].as_str().expect("a message");
        assert_eq!((&raised["name"], &raised["status"]), (&json!(name), &json!(status)), "{self}");
        assert!(raised["code"] == code && message.contains(part), "{code} {part:?}: {self}");
    }

    fn assert_retriable(&self, retriable: bool) {
        let raised = self.raised().unwrap_or_else(|| panic!("nothing was raised: {self}"));
        assert_eq!(raised["should_retry"], json!(retriable.to_string()), "{self}");
        let after: Option<u64> = raised["retry_after"].as_str().map(|after| after.parse().expect("seconds"));
        assert_eq!(after.is_some(), retriable, "{self}");
        assert!(after.is_none_or(|seconds| (1..=60).contains(&seconds)), "{self}");
    }
}

impl std::fmt::Display for Seen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} saw {}", self.name, self.value)
    }
}

/// A scripted engine: `script` gets all requests but the probes, with the path.
fn scripted(script: impl Fn(&mut Line, &Recorded, &str) -> bool + Send + Sync + 'static) -> Engine {
    Engine::start(move |line| {
        while let Some(request) = line.request() {
            let path = request.head.split(' ').nth(1).expect("a target").to_string();
            if path.ends_with("/health") {
                line.write(&whole(200, &json!({"status": "ok"})));
            } else if request.head.starts_with("GET ") {
                line.write(&whole(404, &json!({"error": {"message": "no such page", "code": 404}})));
            } else if !script(line, &request, &path) {
                return;
            }
        }
    })
}

fn whole(status: u16, body: &Value) -> Vec<u8> {
    let body = body.to_string();
    let length = body.len();
    format!("HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}")
        .into_bytes()
}

fn event(data: &Value) -> String {
    format!("data: {data}\n\n")
}

fn text_event(text: &str, finish: Value) -> String {
    event(&json!({
        "id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m",
        "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish}],
    }))
}

const STREAM_HEAD: &str = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n";

/// A stream of events with its head, chunked or until the connection closes; and the places in it behind
/// which an event ends.
fn stream(events: &[String], until_close: bool) -> (Vec<u8>, Vec<usize>) {
    let framing = if until_close { "\r\n" } else { "Transfer-Encoding: chunked\r\n\r\n" };
    let (mut bytes, mut gaps) = (format!("{STREAM_HEAD}{framing}"), Vec::new());
    gaps.push(bytes.len());
    for event in events {
        let chunk = format!("{:x}\r\n{event}\r\n", event.len());
        bytes.push_str(if until_close { event } else { &chunk });
        gaps.push(bytes.len());
    }
    if !until_close {
        bytes.push_str("0\r\n\r\n");
    }
    (bytes.into_bytes(), gaps)
}

#[test]
fn all_that_clients_do_works_and_bodies_are_passed_verbatim() {
    let call =
        json!({"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{\"x\": 1}"}});
    let message = json!({"role": "assistant", "content": null, "tool_calls": [call]});
    let completion = json!({
        "id": "c", "object": "chat.completion", "created": 1, "model": "m", "odd": {"kept": [1, null]},
        "choices": [{"index": 0, "message": message, "finish_reason": "tool_calls"}],
    });
    let delta = json!({"index": 0, "delta": {"tool_calls": [{"index": 0, "id": "call_1", "type": "function",
        "function": {"name": "f", "arguments": "{\"x\""}}]}, "finish_reason": null});
    let more = json!({"index": 0, "delta": {"tool_calls": [{"index": 0, "function": {"arguments": ": 1}"}}]},
        "finish_reason": "tool_calls"});
    let chunk = |choice: &Value| json!({"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]});
    let events = [event(&chunk(&delta)), event(&chunk(&more)), "data: [DONE]\n\n".to_string()];
    let embedding = json!({"object": "list", "model": "m", "data": [{"object": "embedding", "index": 0, "embedding": [0.5, -0.25]}]});
    let (said, embedded) = (completion.clone(), embedding.clone());
    let engine = scripted(move |line, request, path| {
        let body: Value = serde_json::from_slice(&request.body).expect("JSON");
        let failing = body["input"] == "fail";
        line.write(&if path.ends_with("/embeddings") && failing {
            let message = "This server does not support embeddings. Start it with `--embeddings`";
            whole(501, &json!({"error": {"code": 501, "message": message, "type": "not_supported_error"}}))
        } else if path.ends_with("/embeddings") {
            whole(200, &embedded)
        } else if body["stream"] == true {
            stream(&events, false).0
        } else {
            whole(200, &said)
        });
        true
    });
    for cloud in [false, true] {
        let mut clients = clients();
        if clients.is_empty() {
            return;
        }
        let plane = Plane::start(cloud, &[]);
        plane.announce("scripted", &format!("http://{}", engine.address), 4);
        let demo_port = free_port();
        let fast = ["--tokens-per-second", "0", "--ctx", "16", "--model", "demo"];
        let _demo = demo_engine(demo_port, &fast, plane.directory.path());
        plane.announce("demo", &format!("http://127.0.0.1:{demo_port}"), 4);
        plane.until_routable(2);
        for client in &mut clients {
            let models = client.perform(plane.port, "models", json!({}));
            assert_eq!(models.answer(), &json!(["demo", "scripted"]), "{models}");

            let plain = client.chat(plane.port, "demo", json!({"max_tokens": 3}));
            let said = plain.answer()["choices"][0]["message"]["content"].as_str().unwrap_or_default();
            assert!(said.starts_with("[demo]"), "{plain}");
            let streamed = client.chat(plane.port, "demo", json!({"max_tokens": 3, "stream": true}));
            assert!(streamed.raised().is_none() && streamed.finished(), "{streamed}");
            let text = json!({"prompt": "one two"});
            let completed =
                client.ask(plane.port, "completion", "demo", text, json!({"stream": true, "max_tokens": 3}));
            assert!(completed.raised().is_none() && completed.finished(), "{completed}");

            // The client sends its tools through, and gets the engine's calls of them.
            let tools = json!([{"type": "function", "function": {"name": "f", "parameters":
                {"type": "object", "properties": {"x": {"type": "integer", "description": "caf\u{e9}"}}}}}]);
            let called = client.chat(plane.port, "scripted", json!({"tools": tools, "tool_choice": "auto"}));
            assert_eq!(called.answer(), &completion, "verbatim: {called}");
            let recorded = engine.requests();
            let asked =
                recorded.iter().rfind(|request| request.head.starts_with("POST ")).expect("a request");
            let asked: Value = serde_json::from_slice(&asked.body).expect("JSON");
            assert_eq!((&asked["tools"], &asked["tool_choice"]), (&tools, &json!("auto")), "{asked}");
            let called = client.chat(plane.port, "scripted", json!({"tools": tools, "stream": true}));
            assert!(called.raised().is_none(), "{called}");
            assert_eq!(called.chunks(), [chunk(&delta), chunk(&more)], "verbatim: {called}");

            let input = |text: &str| json!({"input": text, "encoding_format": "float"});
            let embedded = client.ask(plane.port, "embedding", "scripted", input("x"), json!({}));
            assert_eq!(embedded.answer(), &embedding, "{embedded}");
            let refused = client.ask(plane.port, "embedding", "scripted", input("fail"), json!({}));
            let raised = refused.raised().expect("an error");
            assert_eq!(
                (&raised["name"], &raised["status"]),
                (&json!("InternalServerError"), &json!(501)),
                "{refused}"
            );
            assert!(raised["message"].as_str().is_some_and(|m| m.contains("--embeddings")), "{refused}");

            // What the engine says of a prompt that is too long is passed on.
            let long = "word ".repeat(100);
            let messages = json!({"messages": [{"role": "user", "content": long}]});
            for streams in [false, true] {
                let long =
                    client.ask(plane.port, "chat", "demo", messages.clone(), json!({"stream": streams}));
                let raised = long.raised().expect("an error");
                assert_eq!(
                    (&raised["name"], &raised["status"]),
                    (&json!("BadRequestError"), &json!(400)),
                    "{long}"
                );
                assert!(raised["message"].as_str().is_some_and(|m| m.contains("context")), "{long}");
            }
        }
    }
}

#[test]
fn comments_in_a_silent_stream_trouble_no_client() {
    let events =
        [text_event("a", Value::Null), text_event("", json!("stop")), "data: [DONE]\n\n".to_string()];
    let engine = scripted(move |line, _, _| {
        let (bytes, gaps) = stream(&events, false);
        for (from, to) in [(0, gaps[0]), (gaps[0], gaps[1]), (gaps[1], gaps[2]), (gaps[2], bytes.len())] {
            line.write(&bytes[from..to]);
            std::thread::sleep(Duration::from_millis(250));
        }
        true
    });
    let mut clients = clients();
    if clients.is_empty() {
        return;
    }
    let plane = Plane::start(true, &[("ORCHESTRATORD_STREAM_KEEPALIVE_MS", "100")]);
    plane.announce("m", &format!("http://{}", engine.address), 1);
    plane.until_routable(1);
    let raw = ask(plane.port, "POST", "/v1/chat/completions", None, r#"{"messages":[],"stream":true}"#);
    assert!(raw.expect("an answer").body.matches(": keep-alive\n\n").count() >= 3, "they are there");
    for client in &mut clients {
        let seen = client.chat(plane.port, "m", json!({"stream": true}));
        assert!(seen.raised().is_none() && seen.finished() && seen.chunks().len() == 2, "{seen}");
    }
}

#[test]
fn a_client_that_leaves_takes_its_engine_connection_along() {
    let (tell, told) = mpsc::channel();
    let engine = scripted(move |line, _, _| {
        let (bytes, gaps) = stream(&[text_event("a", Value::Null), text_event("b", Value::Null)], false);
        line.write(&bytes[..gaps[2]]);
        line.closed_at();
        let at = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs_f64();
        tell.send(at).expect("the test listens");
        false
    });
    for cloud in [false, true] {
        let mut clients = clients();
        if clients.is_empty() {
            return;
        }
        let plane = Plane::start(cloud, &[]);
        plane.announce("m", &format!("http://{}", engine.address), 1);
        plane.until_routable(1);
        for client in &mut clients {
            let mut took: Vec<f64> = (0..7)
                .map(|_| {
                    let body = json!({"model": "m", "messages": [], "stream": true});
                    let seen = client.perform(plane.port, "chat", json!({"body": body, "leave_after": 2}));
                    assert!(seen.raised().is_none() && seen.chunks().len() == 2, "{seen}");
                    let closed =
                        told.recv_timeout(Duration::from_secs(5)).expect("the engine's connection closes");
                    plane.until_free(1);
                    (closed - seen.value["left_at"].as_f64().expect("a time")) * 1000.0
                })
                .collect();
            took.sort_unstable_by(f64::total_cmp);
            // The clients are slow to close at times, and so is a machine with other tests to run.
            assert!(took[3] <= CANCEL_MS_MAX, "{}, CLOUD: {cloud}: {took:?} ms", client.name);
        }
    }
}

#[test]
fn no_client_takes_a_stream_that_broke_for_one_that_ended() {
    let events = [
        text_event("a", Value::Null),
        text_event("caf\u{e9}", Value::Null),
        text_event("", json!("stop")),
        "data: [DONE]\n\n".to_string(),
    ];
    let transcripts = [stream(&events, false), stream(&events, true)];
    let cuts: Vec<(usize, usize)> = (0..2)
        .flat_map(|framing| {
            let (bytes, gaps) = &transcripts[framing];
            let ends = gaps[0] - 1..bytes.len();
            let near = |end: &usize| gaps.iter().any(|gap| end.abs_diff(*gap) <= 1);
            ends.filter(move |end| near(end) || end % 13 == 0)
                .map(move |end| (framing, end))
                .collect::<Vec<_>>()
        })
        .collect();
    let written = transcripts.clone();
    let engine = scripted(move |line, _, path| {
        // /FRAMING/END/HOW/CLIENT/...
        let parts: Vec<&str> = path.split('/').collect();
        let number = |at: usize| parts[at].parse::<usize>().expect("a number");
        line.write(&written[number(1)].0[..number(2)]);
        if parts[3] == "reset" {
            std::thread::sleep(Duration::from_millis(1));
            reset_on_close(&line.tcp);
        }
        false
    });
    for cloud in [false, true] {
        let mut clients = clients();
        if clients.is_empty() {
            return;
        }
        let plane = Plane::start(cloud, &[]);
        // A replica for each cut: one that has failed is out of rotation for a while.
        for client in 0..clients.len() {
            for (framing, end) in &cuts {
                let how = if end % 2 == 0 { "close" } else { "reset" };
                let url = format!("http://{}/{framing}/{end}/{how}/{client}", engine.address);
                plane.announce(&format!("m-{client}-{framing}-{end}"), &url, 1);
            }
        }
        plane.until_routable(cuts.len() * clients.len());
        for (number, client) in clients.iter_mut().enumerate() {
            for (framing, end) in &cuts {
                let model = format!("m-{number}-{framing}-{end}");
                let seen = client.chat(plane.port, &model, json!({"stream": true}));
                let (bytes, gaps) = &transcripts[*framing];
                let name =
                    format!("CLOUD: {cloud}, until close: {framing}, {end} of {}: {seen}", bytes.len());
                assert!(seen.raised().is_some() || seen.finished(), "{name}");
                if gaps[..3].contains(end) {
                    let raised = seen.raised().expect("checked above");
                    assert_eq!(raised["code"], "upstream_error", "the program is told why: {name}");
                }
                let whole = gaps[1..3].iter().filter(|gap| *gap <= end).count();
                assert!(seen.chunks().len() >= whole, "nothing that came is lost: {name}");
            }
        }
    }
}

#[test]
fn a_killed_engine_or_node_raises_in_every_client() {
    let mut clients = clients();
    for cloud in [false, true] {
        for client in &mut clients {
            let mut plane = Plane::start(cloud, &[]);
            let slow = ["--tokens-per-second", "100", "--prefill-ms", "0"];
            let ports: Vec<u16> = (0..4).map(|_| free_port()).collect();
            let mut engines: Vec<Process> = ports
                .iter()
                .enumerate()
                .map(|(number, port)| {
                    let engine = demo_engine(*port, &slow, plane.directory.path());
                    plane.announce(&format!("m{number}"), &format!("http://127.0.0.1:{port}"), 1);
                    engine
                })
                .collect();
            plane.until_routable(engines.len());
            let last = engines.len() - 1;
            for (number, engine) in engines.iter_mut().enumerate() {
                let port = plane.port;
                std::thread::scope(|scope| {
                    let asking = scope.spawn(|| {
                        let long = json!({"stream": true, "max_tokens": 2000});
                        client.chat(port, &format!("m{number}"), long)
                    });
                    until("the stream", || {
                        metric(port, "orchestratord_requests_in_flight").filter(|n| *n == 1.0)
                    });
                    std::thread::sleep(Duration::from_millis(100 + 37 * number as u64));
                    match &mut plane.agent {
                        Some(agent) if number == last => agent.kill(),
                        _ => engine.kill(),
                    }
                    let seen = asking.join().expect("the client tells");
                    assert!(seen.raised().is_some() && !seen.finished(), "CLOUD: {cloud}: {seen}");
                    assert!(!seen.chunks().is_empty(), "it was in the middle: {seen}");
                });
            }
        }
    }
}

#[test]
fn refusals_are_what_clients_expect_and_say_when_to_come_back() {
    let mut clients = clients();
    if clients.is_empty() {
        return;
    }
    let token = ("LLORCH_API_TOKEN", "right-0123456789");
    let mut plane = Plane::start(
        false,
        &[token, ("ORCHD_ADMISSION_CAPACITY", "1"), ("ORCHD_ADMISSION_TIMEOUT_MS", "1500")],
    );
    let ask_for_nobody = json!({"body": {"model": "m", "messages": []}, "key": token.1});
    for client in &mut clients {
        let alone = client.perform(plane.port, "chat", ask_for_nobody.clone());
        alone.assert_raised("InternalServerError", 503, "no_replica", "");
        alone.assert_retriable(true);
    }
    let engine_port = free_port();
    let _engine = demo_engine(engine_port, &["--tokens-per-second", "50"], plane.directory.path());
    plane.announce("m", &format!("http://127.0.0.1:{engine_port}"), 1);
    plane.until_routable(1);
    let body = |model: &str, tokens: u32| json!({"model": model, "max_tokens": tokens, "messages": [{"role": "user", "content": "x"}]});
    let port = plane.port;
    for client in &mut clients {
        let denied = client.perform(port, "chat", json!({"body": body("m", 1), "key": "wrong"}));
        denied.assert_raised("AuthenticationError", 401, "invalid_api_key", "BAD_TOKEN");
        denied.assert_retriable(false);
        let unknown = client.perform(port, "chat", json!({"body": body("nobody", 1), "key": token.1}));
        unknown.assert_raised(
            "NotFoundError",
            404,
            "model_not_found",
            "no engine serves the model \"nobody\"; available: m",
        );
        unknown.assert_retriable(false);

        // One runs, one waits, no further one may; and who waited too long is told.
        let long = json!({"model": "m", "max_tokens": 3000, "stream": true, "messages": [{"role": "user", "content": "x"}]});
        let mut running =
            open(port, "POST", "/v1/chat/completions", Some(token.1), &long.to_string()).expect("an answer");
        running.event().expect("a first event");
        let waiting = std::thread::spawn(move || {
            let short = json!({"model": "m", "max_tokens": 1, "messages": []}).to_string();
            open(port, "POST", "/v1/chat/completions", Some(token.1), &short).expect("an answer").status
        });
        until("one to wait", || metric(port, "orchestratord_requests_waiting").filter(|n| *n == 1.0));
        let full = client.perform(port, "chat", json!({"body": body("m", 1), "key": token.1}));
        full.assert_raised("RateLimitError", 429, "queue_full", "1 requests are waiting already");
        full.assert_retriable(true);
        assert_eq!(waiting.join().expect("it waits"), 503);
        let late = client.perform(port, "chat", json!({"body": body("m", 1), "key": token.1}));
        late.assert_raised("InternalServerError", 503, "slots_busy", "no slot became free in time");
        late.assert_retriable(true);
        // A client with its usual retries comes back when it was told to, and is served.
        let freed = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(2_000));
            drop(running);
        });
        let patient =
            client.perform(port, "chat", json!({"body": body("m", 1), "key": token.1, "max_retries": 3}));
        assert!(patient.answer()["choices"][0]["message"]["content"].is_string(), "{patient}");
        freed.join().expect("it was freed");
        plane.until_free(1);
    }

    // While it shuts down, running streams finish and new clients are told.
    let long = json!({"model": "m", "max_tokens": 100, "stream": true, "messages": [{"role": "user", "content": "x"}]});
    let mut running =
        open(port, "POST", "/v1/chat/completions", Some(token.1), &long.to_string()).expect("an answer");
    running.event().expect("a first event");
    let mut kept = relay_support::Client::connect(([127, 0, 0, 1], port).into());
    assert_eq!(kept.get("/health").status, 200);
    plane.control.signal(Signal::TERM);
    until("new connections to be turned away", || get(port, "/health").is_none().then_some(()));
    for client in &mut clients {
        let away = client.perform(port, "chat", json!({"body": body("m", 1), "key": token.1}));
        let raised = away.raised().expect("an error");
        if raised["status"].is_null() {
            assert_eq!(raised["name"], "APIConnectionError", "{away}");
        } else {
            // A client that kept its connection is told on it.
            away.assert_raised("InternalServerError", 503, "service_unavailable", "is shutting down");
            away.assert_retriable(true);
        }
    }
    let body = body("m", 1).to_string();
    kept.send(format!(
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {}\r\nContent-Length: {}\r\n\r\n{body}",
        token.1,
        body.len()
    ));
    let told = kept.receive();
    assert_eq!((told.status, told.field("x-should-retry")), (503, Some("true")));
    assert!(matches!(told.field("retry-after"), Some("1" | "2")), "{}", told.head);
    let rest: Vec<String> = std::iter::from_fn(|| running.event()).collect();
    assert_eq!(rest.last().map(String::as_str), Some("[DONE]"));
    assert_eq!(plane.control.end(), Some(0));
}
