//! What operators and tools do with a node agent that runs: drain and resume, be told of changes, and
//! relay within its slots. Real daemons, real sockets.

#[path = "daemons/harness.rs"]
#[allow(dead_code)]
mod harness;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use harness::*;
use rustix::process::Signal;
use serde_json::Value;

const SHORT: &str = r#"{"messages":[{"role":"user","content":"one two"}],"max_tokens":3}"#;

/// A streamed question for so many tokens.
fn stream_of(tokens: u32) -> String {
    format!(r#"{{"messages":[{{"role":"user","content":"x y"}}],"stream":true,"max_tokens":{tokens}}}"#)
}

/// Where the agent relays chats for a replica of `pool-0`.
fn chat(replica: &str) -> String {
    format!("/v2/pools/pool-0/replicas/{replica}/engine/v1/chat/completions")
}

/// A node agent without a control plane.
struct Agent {
    directory: tempfile::TempDir,
    port: u16,
    process: Process,
}

impl Agent {
    fn start(env: &[(&str, &str)]) -> Agent {
        let directory = tempfile::tempdir().expect("a directory");
        let port = free_port();
        let addr = format!("127.0.0.1:{port}");
        let env = [&[("POOL_MANAGERD_ADDR", addr.as_str())], env].concat();
        let process = Process::start(POOL_MANAGERD, &[], &env, directory.path());
        until("the agent", || get(port, "/health").filter(|answer| answer.status == 200));
        Agent { directory, port, process }
    }

    fn engines(&self) -> PathBuf {
        self.directory.path().join(".runtime/engines")
    }

    /// Announces an engine, and waits until its replica is ready.
    fn announce(&self, engine: u16, replica: &str, slots: u32, mask: &str) {
        let mut text: Value = serde_json::from_str(&handoff(engine, replica, slots)).expect("JSON");
        if !mask.is_empty() {
            text["device_mask"] = mask.into();
        }
        hand_over(&self.engines(), &format!("{replica}.json"), &text.to_string());
        until("a ready replica", || (self.replica(replica)["ready"] == true).then_some(()));
    }

    fn replica(&self, replica: &str) -> Value {
        let answer = get(self.port, &format!("/v2/pools/pool-0/replicas/{replica}/status"));
        answer.filter(|answer| answer.status == 200).map_or(Value::Null, |answer| answer.json())
    }

    fn state(&self, replica: &str) -> String {
        self.replica(replica)["state"].as_str().unwrap_or_default().to_string()
    }

    /// Events of a kind about a subject, by state.
    fn events(&self, kind: &str, subject: &str) -> Vec<String> {
        let events = get(self.port, "/v2/events").expect("events").json();
        let events = events["events"].as_array().expect("a list").clone();
        let meant = events.iter().filter(|event| event["kind"] == kind && event["subject"] == subject);
        meant.map(|event| event["state"].as_str().expect("a state").to_string()).collect()
    }

    fn metrics(&self) -> String {
        get(self.port, "/metrics").expect("metrics").body
    }
}

/// Sends a request, and returns its connection unread.
fn send(port: u16, path: &str, fields: &str, body: &str) -> TcpStream {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).expect("connected");
    stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    let length = body.len();
    write!(
        stream,
        "POST {path} HTTP/1.1\r\nHost: localhost\r\n{fields}Content-Length: {length}\r\n\r\n{body}"
    )
    .expect("sent");
    stream
}

/// Reads until the connection ends, in whatever way; false if it broke.
fn rest_of(stream: &mut TcpStream) -> (String, bool) {
    let mut bytes = Vec::new();
    let whole = stream.read_to_end(&mut bytes).is_ok();
    (String::from_utf8_lossy(&bytes).into_owned(), whole)
}

/// A request as a listener of these tests saw it.
#[derive(Clone, Debug)]
struct Seen {
    line: String,
    head: String,
    body: String,
    at: Instant,
}

impl Seen {
    fn field(&self, name: &str) -> Option<String> {
        self.head.lines().find_map(|line| {
            let (field, value) = line.split_once(": ")?;
            field.eq_ignore_ascii_case(name).then(|| value.trim().to_string())
        })
    }

    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }
}

/// Listens, notes every request, and answers each as `answer` says; `None`: not at all, the connection
/// stays open.
struct Listener {
    port: u16,
    seen: Arc<Mutex<Vec<Seen>>>,
    accepted: Arc<AtomicUsize>,
}

impl Listener {
    fn start(answer: impl Fn(&Seen) -> Option<(u16, String)> + Send + Sync + 'static) -> Listener {
        let listener = harness::listen_on_free_port();
        let port = listener.local_addr().expect("an address").port();
        let (seen, accepted) = (Arc::new(Mutex::new(Vec::new())), Arc::new(AtomicUsize::new(0)));
        let (notes, count, answer) = (seen.clone(), accepted.clone(), Arc::new(answer));
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                count.fetch_add(1, Ordering::SeqCst);
                let (notes, answer) = (notes.clone(), answer.clone());
                thread::spawn(move || serve(stream, &notes, &*answer));
            }
        });
        Listener { port, seen, accepted }
    }

    fn seen(&self, path: &str) -> Vec<Seen> {
        let seen = self.seen.lock().expect("no panic");
        seen.iter().filter(|seen| seen.line.split(' ').nth(1) == Some(path)).cloned().collect()
    }
}

/// Serves one request and closes.
fn serve(stream: TcpStream, notes: &Mutex<Vec<Seen>>, answer: &dyn Fn(&Seen) -> Option<(u16, String)>) {
    let mut reader = BufReader::new(stream);
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        if reader.read_line(&mut head).unwrap_or(0) == 0 {
            return;
        }
    }
    let line = head.lines().next().unwrap_or_default().to_string();
    let mut seen = Seen { line, head, body: String::new(), at: Instant::now() };
    let length = seen.field("content-length").and_then(|n| n.parse().ok()).unwrap_or(0);
    let mut body = vec![0; length];
    if reader.read_exact(&mut body).is_err() {
        return;
    }
    seen.body = String::from_utf8_lossy(&body).into_owned();
    let answered = answer(&seen);
    notes.lock().expect("no panic").push(seen);
    let Some((status, text)) = answered else {
        // The connection stays open until the other side has enough.
        let _ = reader.read_to_end(&mut Vec::new());
        return;
    };
    let length = text.len();
    // Whoever has left by now needs no answer.
    let _ = write!(
        reader.get_mut(),
        "HTTP/1.1 {status} X\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n{text}"
    );
}

#[test]
fn a_drained_replica_finishes_what_runs_and_takes_nothing_new() {
    let agent = Agent::start(&[]);
    let engine = free_port();
    let _engine = demo_engine(engine, &["--tokens-per-second", "20"], agent.directory.path());
    agent.announce(engine, "r0", 4, "");
    let path = "/v2/pools/pool-0/replicas/r0/drain";
    assert_eq!(get(agent.port, path).expect("an answer").json()["draining"], false);

    let mut stream = open(agent.port, "POST", &chat("r0"), None, &stream_of(12)).expect("an answer");
    stream.event().expect("a first event");
    let drained = post(agent.port, path, "");
    let progress = drained.json();
    assert_eq!((drained.status, progress["in_flight"].as_u64()), (202, Some(1)), "{drained:?}");
    assert!(progress["draining"] == true && progress["drained"] == false, "{progress}");
    let refused = post(agent.port, &chat("r0"), SHORT);
    assert_eq!((refused.status, refused.json()["code"].as_str()), (503, Some("POOL_UNREADY")), "{refused:?}");
    assert_eq!(
        (agent.state("r0").as_str(), agent.replica("r0")["drain"]["in_flight"].as_u64()),
        ("draining", Some(1))
    );

    let events: Vec<String> = std::iter::from_fn(|| stream.event()).collect();
    assert_eq!(events.last().map(String::as_str), Some("[DONE]"), "{events:?}");
    let progress = until("the drain to be done", || {
        Some(get(agent.port, path)?.json()).filter(|progress| progress["drained"] == true)
    });
    assert_eq!((progress["finished"].as_u64(), progress["cut"].as_u64()), (Some(1), Some(0)), "{progress}");
    let all = get(agent.port, "/drains").expect("an answer").json();
    assert_eq!(
        all["drains"][0]["scope"],
        serde_json::json!({"kind":"replica","pool_id":"pool-0","replica_id":"r0"})
    );

    let resumed = post(agent.port, "/pools/pool-0/replicas/r0/resume", "");
    assert_eq!((resumed.status, resumed.json()["draining"].as_bool()), (200, Some(false)), "{resumed:?}");
    assert_eq!(post(agent.port, &chat("r0"), SHORT).status, 200);
    assert_eq!(agent.events("drain", "replica pool-0/r0"), ["began", "drained", "resumed"]);
    let metrics = agent.metrics();
    for line in [
        "pool_managerd_drain_events_total{scope=\"replica\",outcome=\"drained\"} 1",
        "pool_managerd_drain_duration_seconds_count 1",
        "pool_managerd_drains 0",
    ] {
        assert!(metrics.lines().any(|known| known == line), "{line} is missing in\n{metrics}");
    }
    assert!(metric(agent.port, "pool_managerd_loop_turn_seconds_max").is_some_and(|seconds| seconds > 0.0));
    assert!(metric(agent.port, "pool_managerd_loop_turn_seconds_count").is_some_and(|turns| turns > 10.0));
    until("a timer", || {
        metric(agent.port, "pool_managerd_loop_timer_late_seconds_count").filter(|turns| *turns > 0.0)
    });
}

#[test]
fn a_deadline_cuts_what_still_runs_and_nobody_sees_a_clean_end() {
    let agent = Agent::start(&[]);
    let (slow, silent) =
        (free_port(), Listener::start(|seen| seen.line.starts_with("GET").then(|| (200, "{}".to_string()))));
    let _engine = demo_engine(slow, &["--tokens-per-second", "20"], agent.directory.path());
    agent.announce(slow, "r0", 4, "");
    agent.announce(silent.port, "r1", 4, "");
    let mut stream = send(agent.port, &chat("r0"), "", &stream_of(2_000));
    let mut head = [0; 12];
    stream.read_exact(&mut head).expect("its head");
    let mut unanswered = send(agent.port, &chat("r1"), "", SHORT);
    until("both to run", || metric(agent.port, "pool_managerd_relayed_in_flight").filter(|n| *n == 2.0));

    let drained = post(agent.port, "/v2/pools/pool-0/drain", r#"{"deadline_ms":60000}"#);
    assert_eq!((drained.status, drained.json()["in_flight"].as_u64()), (202, Some(2)), "{drained:?}");
    // A second drain of the same scope moves the deadline.
    let begun = Instant::now();
    post(agent.port, "/v2/pools/pool-0/drain", r#"{"deadline_ms":300}"#);
    let (text, _) = rest_of(&mut stream);
    assert!(begun.elapsed() >= Duration::from_millis(250), "{:?}: before the deadline", begun.elapsed());
    assert!(text.contains("[demo]") || text.contains("data: "), "some of the answer came: {text}");
    assert!(!text.contains("[DONE]"), "a clean end: {text}");
    assert!(text.contains("\"error\"") || !text.ends_with("0\r\n\r\n"), "a clean end: {text}");
    let mut line = String::new();
    BufReader::new(&mut unanswered).read_line(&mut line).expect("an answer");
    assert!(line.starts_with("HTTP/1.1 503"), "who has seen nothing yet may try elsewhere: {line}");

    let progress = until("the drain to be done", || {
        let status = get(agent.port, "/v2/pools/pool-0/status")?.json();
        Some(status["drain"].clone()).filter(|drain| drain["drained"] == true)
    });
    assert_eq!((progress["cut"].as_u64(), progress["in_flight"].as_u64()), (Some(2), Some(0)), "{progress}");
    assert_eq!(agent.events("drain", "pool pool-0"), ["began", "moved", "cut", "drained"]);
    let metrics = agent.metrics();
    assert!(metrics.contains("pool_managerd_relayed_total{outcome=\"cut\"} 2"), "{metrics}");
    assert!(
        metrics.contains("pool_managerd_relayed_total{outcome=\"failed\"} 0"),
        "engines are not blamed: {metrics}"
    );
}

#[test]
fn what_cannot_be_drained_is_refused_by_name() {
    let agent = Agent::start(&[]);
    for (path, body, status, part) in [
        ("/v2/pools/nowhere/drain", "", 404, "nowhere"),
        ("/v2/pools/pool-0/replicas/r9/drain", "", 404, "pool-0/r9"),
        ("/v2/gpus/first/drain", "", 400, "index"),
        ("/v2/gpus/65536/drain", "", 400, "index"),
        ("/v2/node/drain", r#"{"deadline_ms":"soon"}"#, 400, "`deadline_ms`"),
        ("/v2/node/drain", r#"{"deadline_ms":86400001}"#, 400, "`deadline_ms`"),
        ("/v2/node/drain", "[1]", 400, "JSON object"),
        ("/v2/callbacks/register", "{}", 400, "`callback_url`"),
        ("/v2/callbacks/register", r#"{"url":"http://169.254.169.254/"}"#, 400, "link-local"),
        ("/v2/callbacks/register", r#"{"url":"http://8.8.8.8/"}"#, 400, "`callback_url`"),
        ("/v2/callbacks/register", r#"{"url":"http://127.0.0.1:1","pool_id":""}"#, 400, "`pool_id`"),
        ("/v2/callbacks/unregister", r#"{"url":"http://127.0.0.1:1"}"#, 404, "127.0.0.1:1"),
        ("/v2/drains", "", 405, "GET"),
    ] {
        let answer = post(agent.port, path, body);
        assert!(answer.status == status && answer.body.contains(part), "{path} {body}: {answer:?}");
    }
    assert_eq!(get(agent.port, "/v2/drains").expect("an answer").json()["drains"], serde_json::json!([]));
    let twice = [0, 1].map(|_| post(agent.port, "/v2/gpus/3/drain", "").status);
    assert_eq!(twice, [202, 202], "a GPU may be drained before an engine runs on it");
}

#[test]
fn a_gpu_or_the_whole_node_is_drained_and_control_planes_know_at_once() {
    let directory = tempfile::tempdir().expect("a directory");
    let control_port = free_port();
    let control_addr = format!("127.0.0.1:{control_port}");
    // Heartbeats that come by themselves would come too late for this test's patience.
    let env = [
        ("ORCHESTRATORD_CLOUD_PROFILE", "true"),
        ("ORCHESTRATORD_ADDR", control_addr.as_str()),
        ("ORCHESTRATORD_HEARTBEAT_INTERVAL_SECS", "60"),
        ("ORCHESTRATORD_NODE_TIMEOUT_MS", "180000"),
    ];
    let _control = Process::start(ORCHESTRATORD, &[], &env, directory.path());
    until("the control plane", || get(control_port, "/ready").filter(|answer| answer.status == 200));
    let url = format!("http://{control_addr}");
    let agent = Agent::start(&[
        ("POOL_MANAGERD_CLOUD_PROFILE", "true"),
        ("POOL_MANAGERD_NODE_ID", "n"),
        ("ORCHESTRATORD_URL", &url),
        ("POOL_MANAGERD_HEARTBEAT_INTERVAL_SECS", "60"),
    ]);
    let engine = free_port();
    let _engine = demo_engine(engine, &[], directory.path());
    for (replica, mask) in [("r0", "0"), ("r1", "GPU1"), ("r2", "0,1"), ("r3", "")] {
        agent.announce(engine, replica, 4, mask);
    }
    let routable = || -> Option<Vec<String>> {
        let node = get(control_port, "/v2/nodes")?.json()["nodes"][0].clone();
        let replicas = node["replicas"].as_array()?.iter().filter(|replica| replica["routable"] == true);
        Some(replicas.filter_map(|replica| replica["replica_id"].as_str().map(str::to_string)).collect())
    };
    let until_routable = |what: &str, expected: &[&str]| {
        let begun = Instant::now();
        until(what, || routable().filter(|found| found == expected));
        assert!(begun.elapsed() < Duration::from_secs(5), "{what}: {:?} is no 'at once'", begun.elapsed());
    };
    until_routable("four replicas", &["r0", "r1", "r2", "r3"]);
    assert_eq!(post(agent.port, "/v2/gpus/0/drain", "").status, 202);
    until_routable("those on other GPUs", &["r1", "r3"]);
    assert_eq!(get(agent.port, "/v2/gpus/0/drain").expect("an answer").json()["drained"], true);
    assert_eq!(post(agent.port, "/v2/node/drain", r#"{"deadline_ms":1000}"#).status, 202);
    until_routable("none", &[]);
    let status = get(control_port, "/v2/nodes").expect("an answer").json()["nodes"][0]["status"].clone();
    assert_eq!(status, "Draining");
    // One that appears later is covered too.
    hand_over(&agent.engines(), "r4.json", &handoff(engine, "r4", 4));
    until("a drained newcomer", || (agent.state("r4") == "draining").then_some(()));
    assert_eq!(post(agent.port, "/v2/node/resume", "").status, 200);
    until_routable("all but the GPU's", &["r1", "r3", "r4"]);
    assert_eq!(post(agent.port, "/gpus/0/resume", "").status, 200);
    until_routable("all", &["r0", "r1", "r2", "r3", "r4"]);
    let lag = metric(control_port, "orchestratord_loop_turn_seconds_max");
    assert!(lag.is_some_and(|seconds| seconds > 0.0), "{lag:?}");
}

#[test]
fn sigterm_drains_with_the_configured_limit() {
    let engine = free_port();
    let directory = tempfile::tempdir().expect("a directory");
    let _engine = demo_engine(engine, &["--tokens-per-second", "20"], directory.path());
    let mut agent = Agent::start(&[("POOL_MANAGERD_DRAIN_TIMEOUT_MS", "10000")]);
    agent.announce(engine, "r0", 4, "");
    let mut stream = open(agent.port, "POST", &chat("r0"), None, &stream_of(12)).expect("an answer");
    stream.event().expect("a first event");
    agent.process.signal(Signal::TERM);
    until("the shutdown to be seen", || (agent.state("r0") == "draining").then_some(()));
    let drains = get(agent.port, "/v2/drains").expect("an answer").json();
    assert_eq!(
        (drains["drains"][0]["scope"]["kind"].as_str(), drains["drains"][0]["in_flight"].as_u64()),
        (Some("shutdown"), Some(1))
    );
    let events: Vec<String> = std::iter::from_fn(|| stream.event()).collect();
    assert_eq!(events.last().map(String::as_str), Some("[DONE]"), "{events:?}");
    assert_eq!(agent.process.end(), Some(0));

    let mut agent = Agent::start(&[("POOL_MANAGERD_DRAIN_TIMEOUT_MS", "400")]);
    agent.announce(engine, "r0", 4, "");
    let mut stream = send(agent.port, &chat("r0"), "", &stream_of(2_000));
    stream.read_exact(&mut [0; 12]).expect("its head");
    let begun = Instant::now();
    agent.process.signal(Signal::TERM);
    let (text, _) = rest_of(&mut stream);
    assert!(!text.contains("[DONE]"), "a clean end: {text}");
    assert!(text.contains("\"error\"") || !text.ends_with("0\r\n\r\n"), "a clean end: {text}");
    assert_eq!(agent.process.end(), Some(0));
    assert!(begun.elapsed() < Duration::from_secs(8), "{:?}", begun.elapsed());
    assert!(agent.process.log().contains("1 requests are cut"), "{}", agent.process.log());
}

#[test]
fn a_callback_is_told_of_each_change_once_it_can_hear() {
    let refusals = AtomicUsize::new(2);
    let receiver = Listener::start(move |_| {
        let refuse = refusals.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1)).is_ok();
        Some((if refuse { 500 } else { 204 }, String::new()))
    });
    let secret = "canary-token-0123456789abcdef0123456789";
    let agent = Agent::start(&[("LLORCH_API_TOKEN", secret)]);
    let call = |method: &str, path: &str, body: &str| {
        ask(agent.port, method, path, Some(secret), body).expect("an answer")
    };
    assert_eq!(get(agent.port, "/v2/callbacks").expect("an answer").status, 401);
    let body = format!(r#"{{"callback_url":"http://127.0.0.1:{}/told","pool_id":"pool-0"}}"#, receiver.port);
    let registered = [0, 1].map(|_| call("POST", "/v2/callbacks/register", &body).status);
    assert_eq!(registered, [201, 201], "again is no mistake");

    let engine = free_port();
    let mut process = demo_engine(engine, &[], agent.directory.path());
    hand_over(&agent.engines(), "r0.json", &handoff(engine, "r0", 4));
    let told = until("three attempts", || Some(receiver.seen("/told")).filter(|told| told.len() == 3));
    for attempt in &told {
        assert_eq!(attempt.field("idempotency-key").as_deref(), attempt.json()["event_id"].as_str());
        assert_eq!(attempt.body, told[0].body, "a repetition is the same");
        assert_eq!(attempt.field("authorization"), None, "it is no control plane");
    }
    assert!(told[1].at - told[0].at >= Duration::from_millis(200), "there is a pause");
    let notice = told[0].json();
    assert_eq!(
        (
            notice["pool_id"].as_str(),
            notice["replica_id"].as_str(),
            notice["ready"].as_bool(),
            notice["state"].as_str()
        ),
        (Some("pool-0"), Some("r0"), Some(true), Some("ready")),
        "{notice}"
    );
    process.kill();
    let told = until("the next change", || Some(receiver.seen("/told")).filter(|told| told.len() == 4));
    let next = told[3].json();
    assert!(
        next["ready"] == false && next["reason"].is_string() && next["event_id"] != notice["event_id"],
        "{next}"
    );

    let list = until("an idle callback", || {
        let list = call("GET", "/v2/callbacks", "").json();
        (list["callbacks"][0]["state"] == "idle").then_some(list)
    });
    assert_eq!(
        (list["callbacks"].as_array().map(Vec::len), list["callbacks"][0]["delivered"].as_u64()),
        (Some(1), Some(2))
    );
    let gone = call(
        "DELETE",
        &format!("/v2/callbacks/register?url=http%3A%2F%2F127.0.0.1%3A{}%2Ftold", receiver.port),
        "",
    );
    assert_eq!(gone.status, 200, "{gone:?}");
    let _process = demo_engine(engine, &[], agent.directory.path());
    until("the engine to be back", || {
        let status = call("GET", "/v2/pools/pool-0/status", "").json();
        (status["ready"] == true).then_some(())
    });
    assert_eq!(receiver.seen("/told").len(), 4, "it is told no more");
}

#[test]
fn a_configured_callback_at_the_control_plane_gets_the_token_and_what_is_ready() {
    let secret = "canary-token-0123456789abcdef0123456789";
    let plane = Listener::start(|_| Some((200, r#"{"success":true}"#.into())));
    let (url, told) =
        (format!("http://127.0.0.1:{}", plane.port), format!("http://127.0.0.1:{}/told", plane.port));
    let agent = Agent::start(&[
        ("LLORCH_API_TOKEN", secret),
        ("POOL_MANAGERD_CLOUD_PROFILE", "true"),
        ("ORCHESTRATORD_URL", &url),
        ("ORCHESTRATORD_CALLBACK_URL", &told),
    ]);
    let engine = free_port();
    let _engine = demo_engine(engine, &[], agent.directory.path());
    hand_over(&agent.engines(), "r0.json", &handoff(engine, "r0", 4));
    let seen = until("a notice", || plane.seen("/told").into_iter().next());
    assert_eq!(seen.field("authorization"), Some(format!("Bearer {secret}")));
    // Who registers now is told what is ready now.
    let late = Listener::start(|_| Some((200, String::new())));
    let body = format!(r#"{{"url":"http://localhost:{}/late"}}"#, late.port);
    let registered = ask(agent.port, "POST", "/callbacks/register", Some(secret), &body).expect("an answer");
    assert_eq!(registered.status, 201, "{registered:?}");
    let first = until("the ready replica", || late.seen("/late").into_iter().next());
    assert_eq!(first.json()["event_id"], seen.json()["event_id"], "it is the same change");
    assert_eq!(first.field("authorization"), None);

    let off = Agent::start(&[("POOL_MANAGERD_CALLBACK_ENABLED", "false")]);
    assert_eq!(post(off.port, "/v2/callbacks/register", &body).status, 503);
}

#[test]
fn what_a_callbacks_name_leads_to_is_judged_before_it_is_dialled() {
    let agent = Agent::start(&[]);
    // Names for addresses that only the resolver understands.
    let names =
        [("http://134744072:9/x", "neither on this machine"), ("http://0xa9fea9fe:9/x", "link-local")];
    for (name, _) in names {
        let body = format!(r#"{{"url":"{name}"}}"#);
        assert_eq!(post(agent.port, "/v2/callbacks/register", &body).status, 201, "it is only a name");
    }
    let engine = free_port();
    let _engine = demo_engine(engine, &[], agent.directory.path());
    agent.announce(engine, "r0", 4, "");
    for (name, why) in names {
        let refused = until("a refusal", || {
            let list = get(agent.port, "/v2/callbacks")?.json();
            let own = list["callbacks"].as_array()?.iter().find(|own| own["url"] == name)?.clone();
            own["last"]["error"].as_str().map(str::to_string)
        });
        assert!(refused.contains(why), "{name}: {refused}");
    }
}

#[test]
fn receivers_that_hang_delay_nobody() {
    let plane = Listener::start(|_| Some((200, r#"{"success":true,"next_heartbeat_ms":1000}"#.into())));
    let hung = Listener::start(|_| None);
    let url = format!("http://127.0.0.1:{}", plane.port);
    let agent = Agent::start(&[
        ("POOL_MANAGERD_CLOUD_PROFILE", "true"),
        ("POOL_MANAGERD_NODE_ID", "n"),
        ("ORCHESTRATORD_URL", &url),
        ("POOL_MANAGERD_HEARTBEAT_INTERVAL_SECS", "1"),
    ]);
    for n in 0..8 {
        let body = format!(r#"{{"url":"http://127.0.0.1:{}/{n}"}}"#, hung.port);
        assert_eq!(post(agent.port, "/v2/callbacks/register", &body).status, 201);
    }
    let engine = free_port();
    let _engine = demo_engine(engine, &[], agent.directory.path());
    agent.announce(engine, "r0", 4, "");
    until("deliveries to hang", || Some(hung.accepted.load(Ordering::SeqCst)).filter(|n| *n >= 4));
    let beats = || plane.seen("/v2/nodes/n/heartbeat").len();
    let (before, stop) = (beats(), Arc::new(AtomicBool::new(false)));
    let (port, flag) = (agent.port, stop.clone());
    let asking = thread::spawn(move || {
        let mut longest = Duration::ZERO;
        while !flag.load(Ordering::SeqCst) {
            let begun = Instant::now();
            assert_eq!(get(port, "/health").expect("an answer").status, 200);
            longest = longest.max(begun.elapsed());
        }
        longest
    });
    until("heartbeats to go on", || Some(beats()).filter(|n| *n >= before + 3));
    stop.store(true, Ordering::SeqCst);
    let longest = asking.join().expect("answers");
    assert!(longest < Duration::from_secs(1), "{longest:?} for one answer");
    let failed = "pool_managerd_callback_deliveries_total{outcome=\"failed\"}";
    until("the deliveries to be given up for now", || {
        let metrics = agent.metrics();
        let line = metrics.lines().find(|line| line.starts_with(failed))?.to_string();
        line.rsplit(' ').next()?.parse::<u32>().ok().filter(|failed| *failed >= 4)
    });
    assert_eq!(post(agent.port, &chat("r0"), SHORT).status, 200);
}

#[test]
fn what_an_engine_has_no_slots_for_never_reaches_it() {
    let engine = Listener::start(|seen| seen.line.starts_with("GET").then(|| (200, "{}".to_string())));
    let agent = Agent::start(&[]);
    agent.announce(engine.port, "r0", 4, "");
    let generation = agent.replica("r0")["generation"].as_u64().expect("a generation");
    let json = "Content-Type: application/json; charset=utf-8\r\n";
    let free = || agent.replica("r0")["slots_free"].as_u64();
    let reached = || engine.seen("/v1/chat/completions").len();
    let refused = |fields: &str, body: &str| -> String {
        let mut stream = send(agent.port, &chat("r0"), &format!("Connection: close\r\n{fields}"), body);
        rest_of(&mut stream).0
    };

    let three = send(agent.port, &chat("r0"), json, r#"{"prompt":"p","n":3}"#);
    until("three slots to be taken", || free().filter(|free| *free == 1));
    until("the engine to have it", || Some(reached()).filter(|n| *n == 1));
    let full = refused(json, r#"{"n":2}"#);
    assert!(full.starts_with("HTTP/1.1 503") && full.contains("REPLICA_EXHAUSTED"), "{full}");
    assert!(full.to_ascii_lowercase().contains("\r\nretry-after: 1\r\n"), "{full}");
    let stale = refused(&format!("x-llorch-generation: {}\r\n", generation + 1), "{}");
    assert!(stale.starts_with("HTTP/1.1 409") && stale.contains("STALE_GENERATION"), "{stale}");
    // One that is not there (any more) is another matter to whoever knew it than to whoever guesses its name.
    for (fields, status) in [("x-llorch-generation: 7\r\n", 409), ("", 404)] {
        let mut stream = send(agent.port, &chat("r9"), &format!("Connection: close\r\n{fields}"), "{}");
        let gone = rest_of(&mut stream).0;
        assert!(gone.starts_with(&format!("HTTP/1.1 {status}")), "{gone}");
    }
    assert_eq!(reached(), 1, "neither reached the engine");
    // Every connection carries one request, so an engine that was dialled in vain would show.
    let requests = || engine.seen.lock().expect("no panic").len();
    until("as many requests as connections", || {
        (engine.accepted.load(Ordering::SeqCst) == requests()).then_some(())
    });

    // What the caller says beats the body; a body that is no JSON, or says nonsense, counts once.
    for (fields, body) in [
        (format!("{json}x-llorch-slots: 1\r\n"), r#"{"n":4}"#),
        ("Content-Type: text/plain\r\n".to_string(), r#"{"n":4}"#),
        (json.to_string(), r#"{"n":-7}"#),
        (json.to_string(), r#"{"n":"four"}"#),
        (json.to_string(), r#"{"messages":[{"content":"say \"n\":4"}]}"#),
    ] {
        let before = reached();
        let one = send(agent.port, &chat("r0"), &fields, body);
        until("the last slot to be taken", || free().filter(|free| *free == 0));
        until("the engine to have it", || Some(reached()).filter(|n| *n == before + 1));
        drop(one);
        until("the slot to be free again", || free().filter(|free| *free == 1));
    }
    drop(three);
    until("all slots to be free", || free().filter(|free| *free == 4));
    // More than there are takes all of them.
    let _all = send(agent.port, &chat("r0"), json, r#"{"n":99999999999999999999}"#);
    until("every slot to be taken", || free().filter(|free| *free == 0));
}
