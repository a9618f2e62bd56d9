//! The front door over real sockets: what engines receive of a request, what clients receive of an
//! answer, and what is told about both afterwards.

#[allow(dead_code, reason = "other tests use the rest of it")]
#[path = "daemons/harness.rs"]
mod harness;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::sync::{Arc, Condvar, Mutex};

use harness::*;
use serde_json::Value;

const CHAT: &str = "/v1/chat/completions";
const ANSWER: &str = r#"{"model":"org/m","usage":{}}"#;
const MIB: usize = 1 << 20;

/// What an engine received.
#[derive(Clone, Debug)]
struct Seen {
    head: String,
    body: Vec<u8>,
}

impl Seen {
    fn fields(&self, name: &str) -> Vec<&str> {
        let fields = self.head.lines().skip(1).filter_map(|line| line.split_once(": "));
        fields.filter(|(field, _)| field.eq_ignore_ascii_case(name)).map(|(_, value)| value).collect()
    }
}

/// An engine that is healthy, records what it is asked, and answers once its gate is open: a request for
/// a stream gets its head and a first event at once.
struct Engine {
    port: u16,
    seen: Arc<Mutex<Vec<Seen>>>,
    gate: Arc<(Mutex<bool>, Condvar)>,
}

impl Engine {
    fn start(open: bool) -> Engine {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("an address").port();
        let (seen, gate) = (Arc::default(), Arc::new((Mutex::new(open), Condvar::new())));
        let engine = Engine { port, seen: Arc::clone(&seen), gate: Arc::clone(&gate) };
        std::thread::spawn(move || {
            for tcp in listener.incoming() {
                let (seen, gate) = (Arc::clone(&seen), Arc::clone(&gate));
                std::thread::spawn(move || serve(tcp.expect("a connection"), &seen, &gate));
            }
        });
        engine
    }

    fn open(&self) {
        *self.gate.0.lock().expect("no panic") = true;
        self.gate.1.notify_all();
    }

    fn seen(&self) -> Vec<Seen> {
        self.seen.lock().expect("no panic").clone()
    }

    /// A handoff for it, with slots and the model `org/m`.
    fn hand_over(&self, home: &Home, replica: &str, slots: u32) {
        let text = format!(
            r#"{{"pool_id":"pool-0","replica_id":"{replica}","url":"http://127.0.0.1:{}","slots":{slots},"model":"org/m"}}"#,
            self.port
        );
        hand_over(&home.engines(), &format!("{replica}.json"), &text);
    }
}

fn serve(mut tcp: TcpStream, seen: &Mutex<Vec<Seen>>, gate: &(Mutex<bool>, Condvar)) -> Option<()> {
    let mut bytes = Vec::new();
    let mut chunk = [0; 65_536];
    let end = loop {
        if let Some(at) = bytes.windows(4).position(|window| window == b"\r\n\r\n") {
            break at;
        }
        let length = tcp.read(&mut chunk).ok().filter(|length| *length > 0)?;
        bytes.extend_from_slice(&chunk[..length]);
    };
    let head = String::from_utf8(bytes[..end].to_vec()).expect("text");
    let mut request = Seen { head, body: bytes[end + 4..].to_vec() };
    let length = request.fields("content-length").first().map_or(0, |text| text.parse().expect("a number"));
    while request.body.len() < length {
        let more = tcp.read(&mut chunk).ok().filter(|more| *more > 0)?;
        request.body.extend_from_slice(&chunk[..more]);
    }
    let close = "Connection: close\r\n";
    if request.head.starts_with("GET ") {
        let status = if request.head.starts_with("GET /health ") { "200 OK" } else { "404 Not Found" };
        write!(tcp, "HTTP/1.1 {status}\r\nContent-Length: 2\r\n{close}\r\n{{}}").ok()?;
        return None;
    }
    let stream = request.body.windows(13).any(|window| window == b"\"stream\":true");
    seen.lock().expect("no panic").push(request);
    if stream {
        let head =
            format!("HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nX-Engine: own\r\n{close}\r\n");
        tcp.write_all(head.as_bytes()).ok()?;
        tcp.write_all(b"data: {\"choices\":[]}\n\n").ok()?;
    }
    let mut is_open = gate.0.lock().expect("no panic");
    while !*is_open {
        is_open = gate.1.wait(is_open).expect("no panic");
    }
    drop(is_open);
    if stream {
        tcp.write_all(b"data: [DONE]\n\n").ok()?;
    } else {
        let length = ANSWER.len();
        write!(
            tcp,
            "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nX-Engine: own\r\nx-llorch-node: liar\r\nContent-Length: {length}\r\n{close}\r\n{ANSWER}"
        )
        .ok()?;
    }
    Some(())
}

/// Sends a request with fields of its own; the answer may be read later.
fn send(port: u16, path: &str, fields: &str, body: &[u8]) -> TcpStream {
    let mut tcp = TcpStream::connect(("127.0.0.1", port)).expect("a connection");
    tcp.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    let length = body.len();
    let head = format!(
        "POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{fields}Content-Length: {length}\r\n\r\n"
    );
    tcp.write_all(head.as_bytes()).expect("sent");
    // A refusal may come before everything is sent.
    let _ = tcp.write_all(body);
    tcp
}

fn receive(mut tcp: TcpStream) -> Answer {
    let mut text = String::new();
    tcp.read_to_string(&mut text).expect("an answer");
    let (head, body) = text.split_once("\r\n\r\n").expect("a head");
    let status = head.split(' ').nth(1).and_then(|code| code.parse().ok()).expect("a status");
    Answer { status, head: head.to_string(), body: body.to_string() }
}

fn json(port: u16, path: &str) -> Value {
    get(port, path).expect("an answer").json()
}

/// A chat of about so many bytes.
fn chat_of(bytes: usize) -> String {
    format!(r#"{{"messages":[{{"role":"user","content":"secret {}"}}]}}"#, "x".repeat(bytes))
}

#[test]
fn every_path_is_forwarded_with_its_names_and_comes_back_with_its_replica() {
    let engine = Engine::start(true);
    let home = Home::start(&[]);
    engine.hand_over(&home, "r0", 4);
    home.until_routable(1.0);
    let trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let fields = format!(
        "x-request-id: mine-1\r\ntraceparent: {trace}\r\nX-Llorch-Slots: 9\r\nx-llorch-node: me\r\nX-Own: 1\r\n"
    );
    // Odd blanks, an unknown field and a field twice: no byte changes.
    let body = "{ \"model\" :\t\"org\\/m\", \"x\":[1.50],\"n\":1,\"n\": 1 ,\"input\":\"a\"}\n".as_bytes();
    for path in
        [CHAT, "/v1/completions", "/v1/embeddings", "/v1/rerank", "/v1/responses", "/v1/messages?beta=1"]
    {
        let answer = receive(send(home.port, path, &fields, body));
        assert_eq!((answer.status, answer.body.as_str()), (200, ANSWER), "{path}");
        let seen = engine.seen().pop().expect("a request");
        assert!(seen.head.starts_with(&format!("POST {path} HTTP/1.1\r\n")), "{}", seen.head);
        assert_eq!(seen.body, body, "{path}");
        for (name, values) in [
            ("x-request-id", &["mine-1"][..]),
            ("traceparent", &[trace]),
            ("x-own", &["1"]),
            ("x-llorch-slots", &[]),
            ("x-llorch-node", &[]),
        ] {
            assert_eq!(seen.fields(name), values, "{path}: {name}");
        }
        let told =
            ["x-request-id", "x-llorch-node", "x-llorch-pool", "x-llorch-replica", "x-llorch-attempts"];
        let told = told.map(|name| answer.field(name).unwrap_or_default());
        assert_eq!(told, ["mine-1", "local", "pool-0", "r0", "1"], "{path}");
        assert!(answer.field("x-llorch-queue-ms").is_some_and(|ms| ms.parse::<u64>().is_ok()));
        assert_eq!(answer.field("x-engine"), Some("own"));
        assert_eq!(answer.head.to_ascii_lowercase().matches("x-llorch-node").count(), 1, "{}", answer.head);
    }
    // Without a name, or with one that is none, the request gets one, the same everywhere.
    for fields in ["", "X-Request-Id: a b\r\n"] {
        let body = br#"{"stream":true,"model":"org/m"}"#;
        let answer = receive(send(home.port, CHAT, fields, body));
        let id = answer.field("x-request-id").expect("an id").to_string();
        assert_eq!(engine.seen().pop().expect("a request").fields("x-request-id"), [id.as_str()]);
        assert_eq!(answer.field("x-correlation-id"), Some(id.as_str()));
        assert_eq!(answer.field("x-llorch-replica"), Some("r0"), "streams say it too");
        assert!(answer.body.contains("[DONE]"));
        assert_eq!(json(home.port, &format!("/v2/explain/{id}"))["stream"], true);
    }
    let wrong = post(home.port, CHAT, r#"{"model":["org/m"]}"#);
    assert_eq!(
        (wrong.status, wrong.json()["error"]["message"].as_str()),
        (400, Some("model must be a string"))
    );
}

#[test]
fn an_alias_changes_nothing_but_the_name() {
    let engine = Engine::start(true);
    let home = Home::start(&[("ORCHESTRATORD_MODEL_ALIASES", "gpt-4o=org/m,ghost=nobody")]);
    engine.hand_over(&home, "r0", 4);
    home.until_routable(1.0);
    let body = r#"{ "stop":["gpt-4o"], "model" : "gpt-4o" , "user":"gpt-4o"}"#;
    assert_eq!(post(home.port, CHAT, body).status, 200);
    let wanted = r#"{ "stop":["gpt-4o"], "model" : "org/m" , "user":"gpt-4o"}"#;
    assert_eq!(String::from_utf8_lossy(&engine.seen()[0].body), wanted);
    let listed = json(home.port, "/v1/models");
    let names: Vec<_> = listed["data"].as_array().expect("a list").iter().map(|m| &m["id"]).collect();
    assert_eq!(names, ["gpt-4o", "org/m"]);
    for name in ["gpt-4o", "org/m", "org%2Fm"] {
        assert_eq!(get(home.port, &format!("/v1/models/{name}")).expect("an answer").status, 200, "{name}");
    }
    let unknown = get(home.port, "/v1/models/none").expect("an answer");
    assert_eq!((unknown.status, unknown.json()["error"]["code"].as_str()), (404, Some("model_not_found")));
    let unknown = post(home.port, CHAT, r#"{"model":"none"}"#);
    assert_eq!(unknown.status, 404);
    let message = unknown.json()["error"]["message"].as_str().expect("a message").to_string();
    assert!(message.ends_with("available: org/m"), "{message}");

    let output = Command::new(ORCHESTRATORD).args(["--model-alias", "a=b", "--model-alias", "b=a"]).output();
    let output = output.expect("it ran");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(78), "{said}");
    assert!(said.contains("--model-alias") && said.contains("circle"), "{said}");
}

#[test]
fn large_bodies_find_room_or_are_told_when_to_come_again() {
    let engine = Engine::start(false);
    let limits = [("ORCHESTRATORD_MAX_BODY_MIB", "1"), ("ORCHESTRATORD_BODY_BUDGET_MIB", "4")];
    let home = Home::start(&limits);
    engine.hand_over(&home, "r0", 1);
    home.until_routable(1.0);
    let held = || metric(home.port, "orchestratord_request_body_bytes").expect("a metric");
    let never = receive(send(home.port, CHAT, "", chat_of(MIB).as_bytes()));
    assert_eq!((never.status, never.field("x-should-retry")), (413, Some("false")));
    assert_eq!(never.json()["error"]["type"], "invalid_request_error");
    assert_eq!(held(), 0.0);

    // One runs, two wait: three quarters of the budget are taken, also while they wait.
    let large = chat_of(MIB - 10_000);
    let mut open: Vec<TcpStream> = Vec::new();
    for count in 1..=3 {
        open.push(send(home.port, CHAT, "", large.as_bytes()));
        until("a body to be held", || (held() >= (count * (MIB - 10_000)) as f64).then_some(()));
    }
    let chunks = format!("{:x}\r\n{large}\r\n0\r\n\r\n", large.len());
    let chunked = format!(
        "POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nx-request-id: late\r\nTransfer-Encoding: chunked\r\n\r\n{chunks}"
    );
    let mut tcp = TcpStream::connect(("127.0.0.1", home.port)).expect("a connection");
    let _ = tcp.write_all(chunked.as_bytes());
    for refused in [receive(tcp), receive(send(home.port, CHAT, "x-request-id: late\r\n", large.as_bytes()))]
    {
        let told = ["retry-after", "x-backoff-ms", "x-should-retry", "x-request-id"];
        let told = told.map(|name| refused.field(name).unwrap_or_default());
        assert_eq!((refused.status, told), (503, ["1", "1000", "true", "late"]), "{refused:?}");
        assert_eq!(refused.json()["error"]["type"], "server_error");
    }
    let small = send(home.port, CHAT, "", chat_of(10_000).as_bytes());
    until("a small one to wait", || {
        metric(home.port, "orchestratord_requests_waiting").filter(|n| *n == 3.0)
    });
    assert_eq!(metric(home.port, "orchestratord_request_bodies_refused_total"), Some(2.0));

    // Who leaves makes room.
    open.pop();
    until("room", || (held() < 2.5 * MIB as f64).then_some(()));
    open.push(send(home.port, CHAT, "", large.as_bytes()));
    until("its body to be held", || (held() > 2.9 * MIB as f64).then_some(()));
    engine.open();
    for answered in open.into_iter().chain([small]).map(receive) {
        assert_eq!(answered.status, 200);
    }
    until("all room to be free", || (held() == 0.0).then_some(()));
}

#[test]
fn a_body_goes_when_its_answer_begins() {
    let engine = Engine::start(false);
    let home = Home::start(&[]);
    engine.hand_over(&home, "r0", 1);
    home.until_routable(1.0);
    let body = chat_of(MIB).replacen('{', "{\"stream\":true,", 1);
    let streaming = send(home.port, CHAT, "", body.as_bytes());
    until("the stream to begin", || {
        let id = &json(home.port, "/v2/explain")["requests"][0];
        (id["attempts"][0]["status"] == 200).then_some(())
    });
    until("its body to go", || {
        metric(home.port, "orchestratord_request_body_bytes").filter(|bytes| *bytes == 0.0)
    });
    assert_eq!(metric(home.port, "orchestratord_requests_in_flight"), Some(1.0));
    engine.open();
    assert!(receive(streaming).body.contains("[DONE]"));
}

#[test]
fn a_waiting_task_holds_its_body_until_it_is_cancelled() {
    let home = Home::start(&[]);
    let held = || metric(home.port, "orchestratord_request_body_bytes").expect("a metric");
    let task = format!(r#"{{"task_id":"t-1","prompt":"secret {}"}}"#, "x".repeat(MIB));
    assert_eq!(post(home.port, "/v2/tasks", &task).status, 202);
    until("its body to be held", || (held() >= MIB as f64).then_some(()));
    let told = json(home.port, "/v2/explain/t-1");
    assert_eq!((&told["state"], &told["path"]), (&"waiting".into(), &"/v2/tasks".into()));
    assert_eq!(told["waiting_for"]["replicas"], 0);
    assert_eq!(post(home.port, "/v2/tasks/t-1/cancel", "").status, 204);
    until("its body to go", || (held() == 0.0).then_some(()));
    assert_eq!(json(home.port, "/v2/explain/t-1")["outcome"], "withdrawn");
}

#[test]
fn explain_tells_why_a_request_is_where_it_is() {
    let engine = Engine::start(false);
    let home = Home::start(&[("ORCHESTRATORD_MODEL_ALIASES", "gpt=org/m")]);
    engine.hand_over(&home, "r0", 1);
    home.until_routable(1.0);
    let body = r#"{"model":"gpt","messages":[{"role":"user","content":"secret words"}]}"#;
    let why = |id: &str| json(home.port, &format!("/v2/explain/{id}"));
    let first = send(home.port, CHAT, "x-request-id: org/first\r\n", body.as_bytes());
    until("it to run", || (why("org/first")["state"] == "running").then_some(()));
    let second = send(home.port, CHAT, "x-request-id: second\r\n", body.as_bytes());
    until("it to wait", || (why("second")["state"] == "waiting").then_some(()));
    let waiting = why("second");
    assert_eq!(waiting["waiting_for"]["refused"]["full"], 1, "{waiting}");
    assert_eq!(waiting["waiting_for"]["named"][0]["replica"], "local/pool-0/r0");
    assert_eq!(
        (&waiting["considered"]["refused"]["full"], &waiting["queued_behind"]),
        (&1.into(), &0.into())
    );
    assert_eq!((&waiting["model"], &waiting["alias"]), (&"org/m".into(), &"gpt".into()));
    let running = why("org/first");
    let attempt = &running["attempts"][0];
    assert_eq!((&attempt["node"], &attempt["replica"]), (&"local".into(), &"r0".into()));
    assert_eq!(attempt["considered"]["with_room"], 1, "{running}");

    engine.open();
    assert_eq!((receive(first).status, receive(second).status), (200, 200));
    let over = until("its end", || Some(why("second")).filter(|told| told["state"] == "over"));
    let attempt = &over["attempts"][0];
    assert_eq!((&over["outcome"], &attempt["chosen_by"]), (&"answered".into(), &"freed_slot".into()));
    let phases = ["connect_ms", "first_byte_ms", "last_byte_ms"].map(|name| attempt[name].as_f64());
    assert!(phases.is_sorted() && phases[0].is_some(), "{over}");
    assert!(over["queue_ms"].as_f64() > Some(0.0), "{over}");

    // A refusal is told too, and what left.
    assert_eq!(receive(send(home.port, CHAT, "x-request-id: none\r\n", br#"{"model":"none"}"#)).status, 404);
    let refused = why("none");
    assert_eq!((&refused["outcome"], &refused["attempts_total"]), (&"refused".into(), &0.into()));
    assert!(refused["reason"].as_str().is_some_and(|reason| reason.contains("org/m")), "{refused}");
    assert_eq!(get(home.port, "/v2/explain/unheard-of").expect("an answer").status, 404);
    assert_eq!(get(home.port, "/v2/explain?limit=x").expect("an answer").status, 400);
    let listed = get(home.port, "/v2/explain?limit=2").expect("an answer");
    let ids: Vec<_> = listed.json()["requests"]
        .as_array()
        .expect("a list")
        .iter()
        .map(|r| r["request_id"].clone())
        .collect();
    assert_eq!((ids, listed.json()["count"].as_u64()), (vec!["none".into(), "second".into()], Some(3)));
    let all = get(home.port, "/v2/explain").expect("an answer").body;
    assert!(!all.contains("secret"), "no word of a prompt: {all}");
}

#[test]
fn explain_names_each_attempt() {
    let engine = Engine::start(true);
    let home = Home::start(&[("ORCHESTRATORD_PLACEMENT_STRATEGY", "round-robin")]);
    let dying = Engine::start(true);
    engine.hand_over(&home, "r1", 4);
    // Healthy as long as it is only probed: a listener that hangs up on everything else.
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = listener.local_addr().expect("an address").port();
    std::thread::spawn(move || {
        for tcp in listener.incoming() {
            let mut tcp = tcp.expect("a connection");
            let mut bytes = [0; 65_536];
            let length = tcp.read(&mut bytes).unwrap_or(0);
            if bytes[..length].starts_with(b"GET /health ") {
                let _ = tcp.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}");
            }
        }
    });
    let bad = Engine { port, ..dying };
    bad.hand_over(&home, "r0", 4);
    home.until_routable(2.0);
    let told = until("a request that was tried twice", || {
        let answer = receive(send(home.port, CHAT, "", br#"{"model":"org/m"}"#));
        assert_eq!(answer.status, 200, "{answer:?}");
        let id = answer.field("x-request-id").expect("an id").to_string();
        (answer.field("x-llorch-attempts") == Some("2"))
            .then(|| json(home.port, &format!("/v2/explain/{id}")))
    });
    let [first, second] = &told["attempts"].as_array().expect("a list")[..] else { panic!("{told}") };
    assert_eq!((&first["replica"], &second["replica"]), (&"r0".into(), &"r1".into()));
    assert!(first["failure"].as_str().is_some_and(|why| !why.is_empty()), "{told}");
    assert_eq!((&second["failure"], &second["status"]), (&Value::Null, &200.into()));
}

#[test]
fn listings_come_in_pages() {
    let directory = tempfile::tempdir().expect("a directory");
    let port = free_port();
    let addr = format!("127.0.0.1:{port}");
    let env = [("ORCHESTRATORD_ADDR", addr.as_str()), ("ORCHESTRATORD_CLOUD_PROFILE", "true")];
    let _control = Process::start(ORCHESTRATORD, &[], &env, directory.path());
    until("orchestratord", || get(port, "/health").filter(|answer| answer.status == 200));
    for node in 0..5 {
        let body = format!(r#"{{"node_id":"n{node}","address":"http://127.0.0.1:9","incarnation":1}}"#);
        assert_eq!(post(port, "/v2/nodes/register", &body).status, 200);
        let beat = format!(
            r#"{{"incarnation":1,"seq":1,"pools":[{{"pool_id":"own-{node}"}},{{"pool_id":"all","replicas":[{{"replica_id":"r0","url":"http://127.0.0.1:1","ready":true,"slots_total":2,"slots_free":2,"models":["m"]}}]}}]}}"#
        );
        assert_eq!(post(port, &format!("/v2/nodes/n{node}/heartbeat"), &beat).status, 200);
    }
    for (list, path, id, count) in
        [("nodes", "/v2/nodes", "node_id", 5), ("pools", "/v2/pools", "pool_id", 6)]
    {
        let whole = json(port, path);
        assert_eq!((whole["count"].as_u64(), whole.get("next")), (Some(count), None), "{path}");
        let (mut ids, mut after) = (Vec::new(), String::new());
        loop {
            let page = json(port, &format!("{path}?limit=2&after={after}"));
            assert_eq!(page["count"].as_u64(), Some(count), "{path}");
            ids.extend(page[list].as_array().expect("a list").iter().map(|entry| entry[id].clone()));
            match page.get("next") {
                Some(next) => after = next.as_str().expect("an id").to_string(),
                None => break,
            }
        }
        let wanted: Vec<Value> =
            whole[list].as_array().expect("a list").iter().map(|entry| entry[id].clone()).collect();
        assert_eq!(ids, wanted, "{path}");
        assert_eq!(get(port, &format!("{path}?limit=0")).expect("an answer").status, 400);
    }
    let all = &json(port, "/v2/pools?limit=1")["pools"][0];
    assert_eq!(
        (&all["pool_id"], &all["slots_total"], &all["ready"]),
        (&"all".into(), &10.into(), &true.into())
    );
    // Busy, unreachable, whatever: a model that is known is listed.
    assert_eq!(json(port, "/v1/models")["data"][0]["id"], "m");
}
