//! Who waits, who is refused, and what happens when engines fail, over real sockets: a control plane, and
//! engines that do what a test tells them.

#[path = "daemons/harness.rs"]
#[allow(dead_code, reason = "shared with other tests, which use other parts")]
mod harness;

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use harness::*;

const CHAT: &str = "/v1/chat/completions";
const ANSWER: &str = "{\"choices\":[],\"usage\":{\"prompt_tokens\":3,\"completion_tokens\":5}}";

/// A request that reached an engine, to be answered by the test.
struct Call {
    stream: TcpStream,
    body: String,
}

impl Call {
    fn answer(mut self, status: &str, fields: &str, body: &str) {
        let length = body.len();
        let head =
            format!("HTTP/1.1 {status}\r\nConnection: close\r\n{fields}Content-Length: {length}\r\n\r\n");
        self.stream.write_all(format!("{head}{body}").as_bytes()).expect("sent");
        let _ = self.stream.shutdown(Shutdown::Write);
    }

    fn ok(self) {
        self.answer("200 OK", "Content-Type: application/json\r\n", ANSWER);
    }

    fn begin_stream(&mut self) {
        let head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n";
        self.stream.write_all(head.as_bytes()).expect("sent");
    }

    fn event(&mut self, data: &str) {
        let event = format!("data: {data}\n\n");
        let chunk = format!("{:x}\r\n{event}\r\n", event.len());
        self.stream.write_all(chunk.as_bytes()).expect("sent");
    }

    /// Resets the connection: closed with bytes unread.
    fn reset(self) {
        rustix::net::sockopt::set_socket_linger(&self.stream, Some(Duration::ZERO)).expect("a socket");
    }

    /// Waits until the caller closed.
    fn until_closed(mut self) {
        self.stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        assert!(matches!(self.stream.read(&mut [0]), Ok(0) | Err(_)), "more than one request");
    }
}

/// An engine that is healthy and hands every question to the test.
struct Engine {
    port: u16,
    calls: Receiver<Call>,
}

impl Engine {
    fn start() -> Engine {
        let listener = harness::listen_on_free_port();
        let port = listener.local_addr().expect("an address").port();
        let (sender, calls) = channel();
        std::thread::spawn(move || serve(&listener, &sender));
        Engine { port, calls }
    }

    fn call(&self) -> Call {
        self.calls.recv_timeout(PATIENCE).expect("a request reaches the engine")
    }

    fn is_idle(&self) -> bool {
        matches!(self.calls.recv_timeout(Duration::from_millis(100)), Err(RecvTimeoutError::Timeout))
    }
}

fn serve(listener: &TcpListener, calls: &Sender<Call>) {
    for stream in listener.incoming() {
        let (Ok(stream), calls) = (stream, calls.clone()) else { return };
        std::thread::spawn(move || {
            let mut reader = BufReader::new(stream.try_clone().expect("a socket"));
            let (mut first, mut length) = (String::new(), 0);
            reader.read_line(&mut first).expect("a request");
            loop {
                let mut line = String::new();
                if reader.read_line(&mut line).unwrap_or(0) <= 2 {
                    break;
                }
                if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                    length = value.trim().parse().expect("a length");
                }
            }
            let mut body = vec![0; length];
            reader.read_exact(&mut body).expect("a body");
            let call = Call { stream, body: String::from_utf8(body).expect("text") };
            if first.starts_with("POST") {
                let _ = calls.send(call);
            } else if first.starts_with("GET /health") {
                call.answer("200 OK", "", "{\"status\":\"ok\"}");
            } else {
                call.answer("404 Not Found", "", "{}");
            }
        });
    }
}

/// A control plane with engines `a`, `b`, ... of so many slots, each with its models.
fn home(env: &[(&str, &str)], engines: &[(&Engine, u32, &str)]) -> Home {
    let home = Home::start(env);
    for (n, (engine, slots, model)) in engines.iter().enumerate() {
        let name = ["a", "b", "c"][n];
        hand_over(&home.engines(), &format!("{name}.json"), &text_of(engine, name, *slots, model));
    }
    home.until_routable(engines.len() as f64);
    home
}

fn text_of(engine: &Engine, name: &str, slots: u32, model: &str) -> String {
    format!(
        r#"{{"engine":"other","pool_id":"{name}","url":"http://127.0.0.1:{}","slots":{slots},"models":["{model}"]}}"#,
        engine.port
    )
}

/// A client's connection; its answer is read when it is asked for.
struct Client(BufReader<TcpStream>);

fn ask_with(port: u16, path: &str, fields: &str, body: &str) -> Client {
    let stream = TcpStream::connect(("127.0.0.1", port)).expect("a control plane");
    send(stream, path, fields, body)
}

fn send(mut stream: TcpStream, path: &str, fields: &str, body: &str) -> Client {
    stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    let length = body.len();
    let head = format!(
        "POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{fields}Content-Length: {length}\r\n\r\n"
    );
    stream.write_all(format!("{head}{body}").as_bytes()).expect("sent");
    Client(BufReader::new(stream))
}

fn chat(home: &Home, model: &str, text: &str) -> Client {
    ask_with(home.port, CHAT, "", &format!(r#"{{"model":"{model}","text":"{text}"}}"#))
}

impl Client {
    fn answer(mut self) -> Answer {
        let mut text = Vec::new();
        // A broken stream is an answer too.
        let _ = self.0.read_to_end(&mut text);
        let text = String::from_utf8(text).expect("text");
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
        let status = head.split(' ').nth(1).and_then(|code| code.parse().ok()).expect("a status");
        Answer { status, head: head.to_string(), body: body.to_string() }
    }

    /// Whether a text is among what has come and was not read yet.
    fn has_come(&self, text: &str) -> bool {
        let mut bytes = [0; 4096];
        let len = self.0.get_ref().peek(&mut bytes).expect("a stream");
        String::from_utf8_lossy(&bytes[..len]).contains(text)
    }

    fn leave(self) {
        self.0.into_inner().shutdown(Shutdown::Both).expect("a socket");
    }
}

fn metrics(home: &Home) -> String {
    get(home.port, "/metrics").expect("metrics").body
}

fn until_metric(home: &Home, line: &str) {
    until(line, || metrics(home).lines().any(|found| found == line).then_some(()));
}

fn until_waiting(home: &Home, count: f64) {
    until("waiters", || metric(home.port, "orchestratord_requests_waiting").filter(|n| *n == count));
}

#[test]
fn a_full_queue_refuses_with_the_measured_pace_and_spreads_retries() {
    let engine = Engine::start();
    let home = home(&[("ORCHD_ADMISSION_CAPACITY", "2")], &[(&engine, 1, "m")]);
    let running = chat(&home, "m", "runs");
    let call = engine.call();
    let waiting = [chat(&home, "m", "waits"), chat(&home, "m", "waits too")];
    until_waiting(&home, 2.0);
    assert!(metrics(&home).contains("orchestratord_queue_depth{priority=\"interactive\"} 2"));
    let mut backoffs = BTreeSet::new();
    for _ in 0..40 {
        let refused = chat(&home, "m", "too many").answer();
        assert_eq!((refused.status, refused.field("x-should-retry")), (429, Some("true")), "{refused:?}");
        let seconds: u64 = refused.field("Retry-After").and_then(|s| s.parse().ok()).expect("seconds");
        let ms: u64 = refused.field("X-Backoff-Ms").and_then(|s| s.parse().ok()).expect("milliseconds");
        assert!((1..=60).contains(&seconds) && ms.div_ceil(1000) == seconds, "{refused:?}");
        backoffs.insert(ms);
    }
    assert!(backoffs.len() > 30, "they come back together: {backoffs:?}");
    until_metric(&home, "orchestratord_requests_total{outcome=\"refused_queue_full\"} 40");
    call.ok();
    assert_eq!(running.answer().status, 200);
    for client in waiting {
        engine.call().ok();
        assert_eq!(client.answer().status, 200);
    }
    until_metric(&home, "orchestratord_model_requests_total{model=\"m\",outcome=\"answered\"} 3");
    until_metric(&home, "orchestratord_prompt_tokens_total{model=\"m\"} 9");
    until_metric(&home, "orchestratord_completion_tokens_total{model=\"m\"} 15");
    assert!(metrics(&home).contains("orchestratord_wait_seconds_count 3"));
}

#[test]
fn a_client_that_leaves_the_queue_never_reaches_an_engine() {
    let engine = Engine::start();
    let home = home(&[], &[(&engine, 1, "m")]);
    let running = chat(&home, "m", "runs");
    let call = engine.call();
    let leaving = chat(&home, "m", "leaves");
    let staying = chat(&home, "m", "stays");
    until_waiting(&home, 2.0);
    leaving.leave();
    until_waiting(&home, 1.0);
    call.ok();
    assert_eq!(running.answer().status, 200);
    let next = engine.call();
    assert!(next.body.contains("stays"), "{}", next.body);
    next.ok();
    assert_eq!(staying.answer().status, 200);
    until_metric(&home, "orchestratord_model_requests_total{model=\"m\",outcome=\"withdrawn\"} 1");

    // One that leaves while its engine thinks: the engine sees it, and the slot is free again.
    let leaving = chat(&home, "m", "leaves the engine");
    let call = engine.call();
    let next = chat(&home, "m", "next");
    until_waiting(&home, 1.0);
    leaving.leave();
    call.until_closed();
    engine.call().ok();
    assert_eq!(next.answer().status, 200);
}

/// A chat that shows a token and comes from an address of its own.
fn chat_as(home: &Home, token: &str, from: [u8; 4], text: &str) -> Client {
    let socket = rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::STREAM, None)
        .expect("a socket");
    rustix::net::bind(&socket, &std::net::SocketAddr::from((from, 0))).expect("an address of this machine");
    rustix::net::connect(&socket, &std::net::SocketAddr::from(([127, 0, 0, 1], home.port)))
        .expect("a control plane");
    let body = format!(r#"{{"model":"m","text":"{text}"}}"#);
    send(TcpStream::from(socket), CHAT, &format!("Authorization: Bearer {token}\r\n"), &body)
}

#[test]
fn clients_take_turns_by_key_and_address_and_keys_count_only_where_they_are_checked() {
    const ONE: [u8; 4] = [127, 0, 0, 1];
    const OTHER: [u8; 4] = [127, 0, 0, 2];
    let (new, old) = ("the-current-token-of-all-clients-", "the-previous-token-of-all-clients");
    let tokens = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(tokens.path(), format!("{new}\n{old}\n")).expect("written");
    let path = tokens.path().to_str().expect("text");
    let with_tokens = [("LLORCH_CLIENT_TOKEN_FILE", path)];
    // Who waits, in the order of their coming, and in which order they are served.
    let waiters = [
        ("new 1", new, ONE),
        ("new 2", new, ONE),
        ("new 3", new, ONE),
        ("old 1", old, ONE),
        ("new elsewhere 1", new, OTHER),
        ("old 2", old, ONE),
    ];
    for (env, order) in [
        (&with_tokens[..], ["new 1", "old 1", "new elsewhere 1", "new 2", "old 2", "new 3"]),
        (&[], ["new 1", "new elsewhere 1", "new 2", "new 3", "old 1", "old 2"]),
    ] {
        let engine = Engine::start();
        let home = Home::start(env);
        hand_over(&home.engines(), "a.json", &text_of(&engine, "a", 1, "m"));
        home.until_routable(1.0);
        let running = chat_as(&home, new, [127, 0, 0, 3], "runs");
        let mut call = engine.call();
        let mut waiting = Vec::new();
        for (count, (text, token, from)) in waiters.into_iter().enumerate() {
            waiting.push(chat_as(&home, token, from, text));
            until_waiting(&home, (count + 1) as f64);
        }
        for text in order {
            call.ok();
            call = engine.call();
            assert!(call.body.contains(&format!("\"{text}\"")), "{} in the place of {text}", call.body);
        }
        call.ok();
        for client in waiting.into_iter().chain([running]) {
            assert_eq!(client.answer().status, 200);
        }
        assert!(!metrics(&home).contains("the-current") && !home.daemon.log().contains("the-current"));
    }
}

#[test]
fn a_slot_of_one_model_does_not_wait_for_another() {
    let (busy, idle) = (Engine::start(), Engine::start());
    let home = home(&[], &[(&busy, 1, "busy"), (&idle, 1, "idle")]);
    let running = [chat(&home, "busy", "1"), chat(&home, "idle", "1")];
    let (on_busy, on_idle) = (busy.call(), idle.call());
    let flood: Vec<Client> = (0..100).map(|_| chat(&home, "busy", "flood")).collect();
    let quiet = chat(&home, "idle", "quiet");
    until_waiting(&home, 101.0);
    on_idle.ok();
    idle.call().ok();
    assert_eq!(quiet.answer().status, 200);
    until_waiting(&home, 100.0);
    flood.into_iter().for_each(Client::leave);
    until_waiting(&home, 0.0);
    on_busy.ok();
    running.into_iter().for_each(|client| assert_eq!(client.answer().status, 200));
}

#[test]
fn failures_before_the_first_byte_go_elsewhere_and_never_twice_to_the_same_engine() {
    let (a, b) = (Engine::start(), Engine::start());
    let home = home(&[], &[(&a, 4, "m"), (&b, 4, "m")]);
    let mut seen = 0;
    for failure in ["502 Bad Gateway", "503 Service Unavailable", "504 Gateway Timeout", "reset"] {
        home.until_routable(2.0);
        let client = chat(&home, "m", failure);
        // Both are idle: the first by name is asked first.
        let call = a.call();
        if failure == "reset" {
            call.reset()
        } else {
            call.answer(failure, "", "engine's own words")
        }
        b.call().ok();
        let answer = client.answer();
        assert!(answer.status == 200 && answer.body == ANSWER, "{failure}: {answer:?}");
        assert!(a.is_idle(), "{failure}: the same engine again");
        seen += 1;
        until_metric(&home, &format!("orchestratord_retries_total {seen}"));
        until_metric(&home, &format!("orchestratord_engine_failures_total{{kind=\"broken\"}} {seen}"));
        // Out of rotation for a moment, and why; then one request may try, and closes the circuit.
        let events = get(home.port, "/v2/events").expect("events").body;
        assert!(events.contains("out of rotation after a failure"), "{events}");
        until_metric(&home, "orchestratord_circuits{state=\"half_open\"} 1");
        let client = chat(&home, "m", "trial");
        a.call().ok();
        assert_eq!(client.answer().status, 200);
        until_metric(&home, "orchestratord_circuits{state=\"closed\"} 2");
    }
}

#[test]
fn statuses_that_are_no_failures_pass_as_they_came() {
    let (a, b) = (Engine::start(), Engine::start());
    let home = home(&[], &[(&a, 4, "m"), (&b, 4, "m")]);
    for status in ["400 Bad Request", "404 Not Found", "429 Too Many Requests", "500 Internal Server Error"] {
        let client = chat(&home, "m", status);
        a.call().answer(status, "X-Own: yes\r\n", "own words");
        let answer = client.answer();
        assert_eq!(answer.status.to_string(), status[..3]);
        assert!(answer.body == "own words" && answer.field("X-Own") == Some("yes"), "{answer:?}");
    }
    until_metric(&home, "orchestratord_circuits{state=\"closed\"} 2");
}

#[test]
fn an_engine_that_says_when_it_will_be_ready_is_not_broken() {
    let (a, b) = (Engine::start(), Engine::start());
    let home = home(&[], &[(&a, 4, "m"), (&b, 4, "m")]);
    let client = chat(&home, "m", "loading");
    a.call().answer("503 Service Unavailable", "Retry-After: 2\r\n", "Loading model");
    let begun = Instant::now();
    b.call().ok();
    assert_eq!(client.answer().status, 200);
    until_metric(&home, "orchestratord_engine_failures_total{kind=\"not_ready\"} 1");
    let pools = get(home.port, "/v2/pools").expect("pools").json();
    let circuit = &pools["pools"][0]["replicas"][0]["circuit"];
    assert!(circuit["state"] == "open" && circuit["failures"] == 1, "{circuit}");
    assert!(circuit["tried_again_in_ms"].as_u64().is_some_and(|ms| ms <= 2_000), "{circuit}");
    until_metric(&home, "orchestratord_circuits{state=\"half_open\"} 1");
    assert!(begun.elapsed() >= Duration::from_millis(1_500), "sooner than it asked for");
}

#[test]
fn slow_engines_end_requests_and_stay_in_rotation() {
    let engine = Engine::start();
    let env = [("ORCHESTRATORD_FIRST_BYTE_TIMEOUT_MS", "300"), ("ORCHESTRATORD_IDLE_TIMEOUT_MS", "300")];
    let home = home(&env, &[(&engine, 2, "m")]);
    let client = chat(&home, "m", "no first byte");
    let _silent = engine.call();
    let answer = client.answer();
    assert_eq!((answer.status, answer.field("x-should-retry")), (504, Some("false")), "{answer:?}");
    let client = chat(&home, "m", "no next byte");
    let mut call = engine.call();
    call.begin_stream();
    call.event("{\"n\":1}");
    let answer = client.answer();
    assert!(answer.status == 200 && answer.body.contains("no byte for 300 ms"), "{answer:?}");
    until_metric(&home, "orchestratord_engine_failures_total{kind=\"timeout\"} 2");
    until_metric(&home, "orchestratord_circuits{state=\"closed\"} 1");
    until_metric(&home, "orchestratord_model_requests_total{model=\"m\",outcome=\"broken\"} 1");
}

/// The end that time brings is told by nobody else: the loop must not sleep over it.
#[test]
fn a_deadline_is_answered_when_it_is_over_and_not_when_something_else_happens() {
    let engine = Engine::start();
    let home = home(&[], &[(&engine, 4, "m")]);
    for _ in 0..3 {
        let begun = Instant::now();
        let late = ask_with(home.port, CHAT, "X-Llorch-Deadline-Ms: 50\r\n", r#"{"model":"m"}"#);
        let call = engine.call();
        assert_eq!(late.answer().status, 504);
        // The next probe would wake it, too: ten seconds after the last.
        assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
        call.until_closed();
    }
}

#[test]
fn clients_may_be_less_patient() {
    let engine = Engine::start();
    let home = home(&[], &[(&engine, 1, "m")]);
    let body = r#"{"model":"m"}"#;
    let late = ask_with(home.port, CHAT, "X-Llorch-Deadline-Ms: 300\r\n", body);
    let call = engine.call();
    let waits = ask_with(home.port, CHAT, "X-Llorch-Wait-Ms: 200\r\n", body).answer();
    assert_eq!((waits.status, waits.field("x-should-retry")), (503, Some("true")), "{waits:?}");
    assert!(waits.body.contains("every slot was busy"), "{waits:?}");
    let answer = late.answer();
    assert_eq!(answer.status, 504, "{answer:?}");
    call.until_closed();
    // The slot is free; and a stream whose time is over ends with an error.
    let late = ask_with(home.port, CHAT, "X-Llorch-Deadline-Ms: 500\r\n", body);
    let mut call = engine.call();
    call.begin_stream();
    call.event("{\"n\":1}");
    let answer = late.answer();
    assert!(answer.body.contains("n\":1") && answer.body.contains("longer than the 500 ms"), "{answer:?}");
    for bad in ["X-Llorch-Deadline-Ms: 0\r\n", "X-Llorch-Wait-Ms: soon\r\n"] {
        assert_eq!(ask_with(home.port, CHAT, bad, body).answer().status, 400, "{bad}");
    }
    until_metric(&home, "orchestratord_requests_total{outcome=\"refused_out_of_time\"} 1");
    until_metric(&home, "orchestratord_requests_total{outcome=\"refused_waited_full\"} 1");
    until_metric(&home, "orchestratord_circuits{state=\"closed\"} 1");
}

#[test]
fn waiting_ends_early_where_nobody_is_left() {
    let engine = Engine::start();
    let home = home(&[], &[(&engine, 1, "m")]);
    let running = chat(&home, "m", "runs");
    let call = engine.call();
    let waiting = chat(&home, "m", "waits");
    until_waiting(&home, 1.0);
    std::fs::remove_file(home.engines().join("a.json")).expect("its handoff");
    let begun = Instant::now();
    let refused = waiting.answer();
    assert_eq!((refused.status, refused.field("x-should-retry")), (503, Some("true")), "{refused:?}");
    assert!(begun.elapsed() < Duration::from_secs(15), "the full wait is a minute");
    // What runs there is left alone.
    call.ok();
    assert_eq!(running.answer().status, 200);
}

#[test]
fn streams_are_measured_where_they_pass() {
    let engine = Engine::start();
    let home = home(&[], &[(&engine, 1, "m")]);
    let begun = Instant::now();
    let client = chat(&home, "m", "stream");
    let mut call = engine.call();
    call.begin_stream();
    for n in 0..3 {
        let event = format!("{{\"n\":{n}}}");
        call.event(&event);
        // A piece is what arrives at once: on a busy machine the next one would catch up.
        until("the event", || client.has_come(&event).then_some(()));
        std::thread::sleep(Duration::from_millis(30));
    }
    call.event("{\"usage\":{\"prompt_tokens\":11,\"completion_tokens\":22}}");
    call.event("[DONE]");
    call.stream.write_all(b"0\r\n\r\n").expect("sent");
    assert!(client.answer().body.contains("[DONE]"));
    until_metric(&home, "orchestratord_time_to_first_token_seconds_count 1");
    until_metric(&home, "orchestratord_prompt_tokens_total{model=\"m\"} 11");
    until_metric(&home, "orchestratord_completion_tokens_total{model=\"m\"} 22");
    let gaps = metric(home.port, "orchestratord_inter_token_seconds_count").expect("gaps");
    let sum = metric(home.port, "orchestratord_inter_token_seconds_sum").expect("their sum");
    // As long as the pauses, and no longer than all of this took.
    let longest = begun.elapsed().as_secs_f64();
    assert!((3.0..=5.0).contains(&gaps) && (0.09..=longest).contains(&sum), "{gaps} {sum} of {longest}");
    let first = metric(home.port, "orchestratord_first_byte_seconds_count").expect("first bytes");
    assert_eq!(first, 1.0);
}

#[test]
fn every_measure_of_the_data_plane_follows_what_it_measures() {
    let (a, b) = (Engine::start(), Engine::start());
    let home = home(&[], &[(&a, 1, "m"), (&b, 1, "m")]);
    let value = |name: &str| {
        let page = metrics(&home);
        let line = page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.and_then(|text| text.parse::<f64>().ok()).unwrap_or_else(|| panic!("{name} is not in:\n{page}"))
    };
    let measures = [
        "orchestratord_inter_token_seconds_count",
        "orchestratord_time_to_first_token_seconds_count",
        "orchestratord_retries_total",
        "orchestratord_engine_failures_total{kind=\"broken\"}",
        "orchestratord_queue_depth{priority=\"interactive\"}",
        "orchestratord_queue_depth{priority=\"batch\"}",
        "orchestratord_circuits{state=\"open\"}",
        "orchestratord_circuits{state=\"half_open\"}",
        "orchestratord_requests_in_flight",
        "orchestratord_wait_seconds_count",
    ];
    for name in measures {
        assert_eq!(value(name), 0.0, "{name} before anything has happened");
    }
    assert_eq!(value("orchestratord_circuits{state=\"closed\"}"), 2.0);

    // An engine breaks: retried, its circuit opens, and is half open some time later.
    let client = chat(&home, "m", "breaks");
    a.call().reset();
    let mut stream = b.call();
    assert_eq!(value("orchestratord_retries_total"), 1.0);
    assert_eq!(value("orchestratord_engine_failures_total{kind=\"broken\"}"), 1.0);
    let (open, half_open) =
        ("orchestratord_circuits{state=\"open\"}", "orchestratord_circuits{state=\"half_open\"}");
    assert_eq!(value(open) + value(half_open) + value("orchestratord_circuits{state=\"closed\"}"), 2.0);
    until_metric(&home, "orchestratord_circuits{state=\"half_open\"} 1");
    assert_eq!(value(open), 0.0);

    // The trial takes the other slot, so that others wait, each in its class.
    let trial = chat(&home, "m", "trial");
    let trial_call = a.call();
    let waiting = chat(&home, "m", "waits");
    let task = r#"{"task_id":"t","prompt":"p","model_ref":"m","priority":"batch"}"#;
    assert_eq!(post(home.port, "/v2/tasks", task).status, 202);
    until_waiting(&home, 2.0);
    assert_eq!(value("orchestratord_queue_depth{priority=\"interactive\"}"), 1.0);
    assert_eq!(value("orchestratord_queue_depth{priority=\"batch\"}"), 1.0);
    assert_eq!(value("orchestratord_requests_in_flight"), 2.0);
    assert_eq!(ask(home.port, "POST", "/v2/tasks/t/cancel", None, "").expect("an answer").status, 204);
    until_metric(&home, "orchestratord_queue_depth{priority=\"batch\"} 0");

    // The stream: three gaps between four events, and what the engine counted.
    stream.begin_stream();
    for n in 0..3 {
        stream.event(&format!("{{\"n\":{n}}}"));
        // A piece is what arrives at once: the next one must not catch up.
        until_metric(&home, &format!("orchestratord_inter_token_seconds_count {n}"));
    }
    stream.event("{\"usage\":{\"prompt_tokens\":7,\"completion_tokens\":9}}");
    stream.event("[DONE]");
    stream.stream.write_all(b"0\r\n\r\n").expect("sent");
    drop(stream);
    assert!(client.answer().body.contains("[DONE]"));
    until_metric(&home, "orchestratord_time_to_first_token_seconds_count 1");
    assert!(value("orchestratord_inter_token_seconds_count") >= 3.0);
    assert_eq!(value("orchestratord_prompt_tokens_total{model=\"m\"}"), 7.0);
    assert_eq!(value("orchestratord_completion_tokens_total{model=\"m\"}"), 9.0);

    // The trial was good: closed again; the waiter was served, and its wait was measured.
    trial_call.ok();
    assert_eq!(trial.answer().status, 200);
    b.call().ok();
    assert_eq!(waiting.answer().status, 200);
    until_metric(&home, "orchestratord_circuits{state=\"closed\"} 2");
    until_metric(&home, "orchestratord_queue_depth{priority=\"interactive\"} 0");
    until_metric(&home, "orchestratord_requests_in_flight 0");
    assert_eq!(value("orchestratord_wait_seconds_count"), 3.0);
    assert_eq!(value("orchestratord_completion_tokens_total{model=\"m\"}"), 9.0 + 5.0 + 5.0);
    assert_eq!(value("orchestratord_retries_total"), 1.0);
}
