//! Tasks and sessions over real sockets: a control plane in the HOME profile, demonstration engines, and
//! engines that follow a script.

#[path = "daemons/harness.rs"]
#[allow(dead_code, reason = "shared with other tests, which use other parts")]
mod harness;
#[allow(dead_code, reason = "shared with other tests, which use other parts")]
mod relay_support;

use std::io::Write;
use std::net::Shutdown;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use harness::*;
use relay_support::{Engine, Line, Recorded};
use serde_json::{Value, json};

/// An engine that is not needed any more is left this soon.
const PROMPTLY: Duration = Duration::from_millis(100);

/// Judges the faster half: the machine of a test may be busy with others, the daemon has no such excuse.
fn assert_prompt(mut took: Vec<Duration>) {
    took.sort_unstable();
    assert!(took[took.len() / 2] < PROMPTLY, "{took:?}");
}

const SSE: &str = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n";

/// An engine that is healthy and answers each question as `script` says.
fn scripted(script: impl Fn(&mut Line, &Recorded) + Send + Sync + 'static) -> Engine {
    Engine::start(move |line| {
        while let Some(request) = line.request() {
            if request.head.starts_with("POST") {
                return script(line, &request);
            }
            let status = if request.head.starts_with("GET /health ") { "200 OK" } else { "404 Not Found" };
            line.write(format!("HTTP/1.1 {status}\r\nContent-Length: 2\r\n\r\n{{}}").as_bytes());
        }
    })
}

fn questions(engine: &Engine) -> Vec<Recorded> {
    engine.requests().into_iter().filter(|request| request.head.starts_with("POST")).collect()
}

/// A control plane with these engines, all ready.
fn home_with(env: &[(&str, &str)], engines: &[(u16, u32)]) -> Home {
    let home = Home::start(env);
    for (at, (port, slots)) in engines.iter().enumerate() {
        let text = json!({
            "pool_id": "pool-0", "replica_id": format!("r{at}"), "engine": "other", "models": ["m"],
            "url": format!("http://127.0.0.1:{port}"), "slots": slots,
        });
        hand_over(&home.engines(), &format!("{at}.json"), &text.to_string());
    }
    home.until_routable(engines.len() as f64);
    home
}

fn task(id: &str, more: &Value) -> String {
    let mut task = json!({"task_id": id, "prompt": "one two", "max_tokens": 5});
    task.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
    task.to_string()
}

fn create(home: &Home, id: &str, more: &Value) -> Answer {
    post(home.port, "/v2/tasks", &task(id, more))
}

/// The events of a task, each with its name and data, until their end.
fn events(home: &Home, id: &str, query: &str) -> Vec<(String, Value)> {
    let answer = get(home.port, &format!("/v2/tasks/{id}/events{query}")).expect("events");
    assert_eq!(answer.status, 200, "{answer:?}");
    parse(&answer.body)
}

fn parse(body: &str) -> Vec<(String, Value)> {
    let mut found = Vec::new();
    for event in body.split_terminator("\n\n") {
        let (name, data) = event.split_once('\n').expect("two lines");
        let name = name.strip_prefix("event: ").expect("a name").to_string();
        let data = data.strip_prefix("data: ").expect("data");
        found.push((name, serde_json::from_str(data).expect("JSON")));
    }
    found
}

fn names(events: &[(String, Value)]) -> Vec<&str> {
    events.iter().map(|(name, _)| name.as_str()).collect()
}

fn text(events: &[(String, Value)]) -> String {
    let tokens = events.iter().filter(|(name, _)| name == "token");
    tokens.map(|(_, data)| data["t"].as_str().expect("text")).collect()
}

fn until_idle(home: &Home, slots: f64) {
    until("all slots to be free", || metric(home.port, "orchestratord_slots_free").filter(|n| *n == slots));
    until("nothing in flight", || {
        metric(home.port, "orchestratord_requests_in_flight").filter(|n| *n == 0.0)
    });
    assert_eq!(metric(home.port, "orchestratord_requests_waiting"), Some(0.0));
}

#[test]
fn every_way_in_which_engines_answer_becomes_the_same_events() {
    let completions = "data: {\"choices\":[{\"index\":0,\"text\":\"grün\"}]}\n\n: ping\n\ndata: {\"choices\":[{\"index\":1,\"text\":\"x\"}]}\n\ndata: {\"choices\":[{\"index\":0,\"text\":\"\"}]}\n\ndata: {\"choices\":[{\"index\":0,\"text\":\"🌱\",\"finish_reason\":\"length\"}]}\n\ndata: {\"choices\":[],\"usage\":{\"completion_tokens\":7,\"prompt_tokens\":2}}\n\ndata: [DONE]\n\n";
    let chat = "data: {\"choices\":[{\"delta\":{\"role\":\"assistant\",\"content\":null}}]}\n\ndata: {\"choices\":[{\"delta\":{\"content\":\"grün\"}}]}\n\ndata: {\"choices\":[{\"delta\":{\"content\":\"🌱\"}}]}\n\ndata: {\"choices\":[{\"delta\":{},\"finish_reason\":\"stop\"}],\"usage\":{\"completion_tokens\":7}}\n\ndata: [DONE]\n\n";
    let native = "data: {\"content\":\"grün\",\"stop\":false}\n\ndata: {\"content\":\"🌱\",\"stop\":false}\n\ndata: {\"content\":\"\",\"stop\":true,\"tokens_predicted\":7,\"timings\":{\"cache_n\":1}}\n\n";
    let named = "event: started\ndata: {\"queue_position\":0}\n\nevent: token\ndata: {\"t\":\"grün\",\"i\":0}\n\nevent: token\ndata: {\"t\":\"🌱\",\"i\":1}\n\nevent: end\ndata: {\"tokens_out\":7}\n\n";
    let document = "{\"choices\":[{\"text\":\"grün🌱\"}],\"usage\":{\"completion_tokens\":7}}";
    let bodies: Vec<String> = [completions, chat, native, named]
        .iter()
        .flat_map(|body| [(*body).to_string(), body.replace('\n', "\r\n")])
        .chain([document.to_string()])
        .collect();
    let (asked, count) = (Arc::new(AtomicU64::new(0)), bodies.len());
    let engine = scripted(move |line, _| {
        let body = &bodies[asked.fetch_add(1, Ordering::SeqCst) as usize];
        line.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n");
        // In pieces that cut characters.
        for piece in body.as_bytes().chunks(3) {
            line.write(format!("{:x}\r\n", piece.len()).as_bytes());
            line.write(piece);
            line.write(b"\r\n");
        }
        line.write(b"0\r\n\r\n");
    });
    let home = home_with(&[], &[(engine.address.port(), 1)]);
    for n in 0..count {
        let id = format!("t{n}");
        let more = match n % 2 {
            0 => json!({"model_ref": "m", "seed": 7}),
            _ => json!({"prompt": null, "messages": [{"role": "user", "content": "x"}]}),
        };
        assert_eq!(create(&home, &id, &more).status, 202);
        let events = events(&home, &id, "");
        assert_eq!(text(&events), "grün🌱", "answer {n}");
        let (last, tokens) = events[1..].split_last().expect("events");
        assert_eq!(events[0].0, "started");
        for (i, (name, data)) in tokens.iter().enumerate() {
            assert_eq!((name.as_str(), data["i"].as_u64()), ("token", Some(i as u64)));
        }
        assert_eq!((last.0.as_str(), &last.1["tokens_out"]), ("end", &json!(7)), "answer {n}");
        assert_eq!(last.1["decode_ms"], last.1["decode_time_ms"]);
        let question = questions(&engine).pop().expect("a question");
        let body: Value = serde_json::from_slice(&question.body).expect("JSON");
        let path = if n % 2 == 0 { "/v1/completions " } else { "/v1/chat/completions " };
        assert!(question.head.starts_with(&format!("POST {path}")), "{}", question.head);
        assert_eq!((&body["stream"], &body["max_tokens"]), (&json!(true), &json!(5)), "{body}");
        assert_eq!((body["seed"] == 7, body["messages"].is_array()), (n % 2 == 0, n % 2 == 1), "{body}");
    }
    until_idle(&home, 1.0);
}

#[test]
fn a_task_may_name_its_model_by_an_alias() {
    let engine = scripted(|line, _| {
        line.write(format!("{SSE}data: {{\"choices\":[{{\"text\":\"a\",\"finish_reason\":\"stop\"}}]}}\n\ndata: [DONE]\n\n").as_bytes());
    });
    let home =
        home_with(&[("ORCHESTRATORD_MODEL_ALIASES", "gpt-4o=small,small=m")], &[(engine.address.port(), 1)]);
    for (id, named) in [("t1", "gpt-4o"), ("t2", "m")] {
        assert_eq!(create(&home, id, &json!({"model_ref": named})).status, 202);
        assert_eq!(text(&events(&home, id, "")), "a");
        let body: Value =
            serde_json::from_slice(&questions(&engine).pop().expect("a question").body).expect("JSON");
        assert_eq!(body["model"], "m", "{named}");
    }
    let told = get(home.port, "/v2/explain/t1").expect("an answer").json();
    assert_eq!((&told["model"], &told["alias"]), (&json!("m"), &json!("gpt-4o")), "{told}");
    let unknown = create(&home, "t3", &json!({"model_ref": "none"}));
    assert_eq!(unknown.status, 503, "{unknown:?}");
}

#[test]
fn broken_answers_end_in_one_error_with_the_code_that_fits() {
    let token = "data: {\"content\":\"a\",\"stop\":false}\n\n";
    // The answer, whether the connection is reset behind it, and the error.
    let cases = [
        (
            format!(
                "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n{:x}\r\n{token}\r\n0\r\n\r\n",
                token.len()
            ),
            false,
            "WORKER_RESET",
            true,
            "without saying that it is complete",
        ),
        (format!("{SSE}{token}"), false, "WORKER_RESET", true, "closed before the answer's end"),
        (format!("{SSE}{token}data: {{\"cont"), false, "WORKER_RESET", true, "closed before the answer's end"),
        (
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n25\r\ndata: {\"content\":\"a\",\"stop\":false}\n\n\r\n".to_string(),
            true,
            "WORKER_RESET",
            true,
            "",
        ),
        (format!("{SSE}{token}data: {{\"error\":{{\"message\":\"out of memory\"}}}}\n\n"), false, "INTERNAL", true, "out of memory"),
        (format!("{SSE}{token}error: {{\"message\":\"out of memory\"}}\n\n"), false, "INTERNAL", true, "out of memory"),
        ("HTTP/1.1 500 E\r\nContent-Length: 27\r\n\r\n{\"error\":{\"message\":\"bad\"}}\n".to_string(), false, "INTERNAL", true, "500: bad"),
        ("HTTP/1.1 400 E\r\nContent-Length: 27\r\n\r\n{\"error\":{\"message\":\"bad\"}}\n".to_string(), false, "INVALID_PARAMS", false, "400: bad"),
        ("HTTP/1.1 429 E\r\nContent-Length: 2\r\n\r\n{}".to_string(), false, "REPLICA_EXHAUSTED", true, "429"),
    ];
    let answers: Vec<(String, bool)> = cases.iter().map(|case| (case.0.clone(), case.1)).collect();
    let asked = AtomicU64::new(0);
    let engine = scripted(move |line, _| {
        let (answer, resets) = &answers[asked.fetch_add(1, Ordering::SeqCst) as usize];
        line.write(answer.as_bytes());
        if *resets {
            let _ = line.tcp.shutdown(Shutdown::Both);
        }
    });
    let home = home_with(&[], &[(engine.address.port(), 1)]);
    for (n, (answer, _, code, retriable, message)) in cases.iter().enumerate() {
        home.until_routable(1.0);
        let id = format!("t{n}");
        assert_eq!(create(&home, &id, &json!({})).status, 202);
        let events = events(&home, &id, "");
        let expected =
            if answer.contains("\"a\"") { &["started", "token", "error"][..] } else { &["started", "error"] };
        assert_eq!(names(&events), expected, "{answer}");
        let error = &events.last().expect("events").1;
        assert_eq!(
            (error["code"].as_str(), error["retriable"].as_bool()),
            (Some(*code), Some(*retriable)),
            "{error}"
        );
        assert_eq!(error["retry_after_ms"].is_u64(), *retriable, "{error}");
        assert!(error["message"].as_str().is_some_and(|text| text.contains(message)), "{error}");
    }
}

#[test]
fn an_engine_that_does_not_take_a_task_is_passed_over() {
    let refusing = scripted(|line, _| line.write(b"HTTP/1.1 503 Busy\r\nContent-Length: 2\r\n\r\n{}"));
    let good = scripted(|line, _| {
        line.write(format!("{SSE}data: {{\"content\":\"a\",\"stop\":true}}\n\n").as_bytes());
    });
    // The first by name is asked first.
    let home = home_with(&[], &[(refusing.address.port(), 1), (good.address.port(), 1)]);
    assert_eq!(create(&home, "t", &json!({})).status, 202);
    let events = events(&home, "t", "?verbose=true");
    assert_eq!(text(&events), "a", "{events:?}");
    let phases: Vec<&str> = events.iter().filter_map(|(_, data)| data["phase"].as_str()).collect();
    assert_eq!(phases, ["dispatched", "retried", "dispatched", "prefill", "finished"]);
    let sent = |n: usize| events.iter().filter(|(_, data)| data["phase"] == "dispatched").nth(n);
    let replica = |n: usize| sent(n).map(|(_, data)| data["replica_id"].clone());
    assert_eq!((replica(0), replica(1)), (Some(json!("r0")), Some(json!("r1"))));
    assert_eq!((questions(&refusing).len(), questions(&good).len()), (1, 1));
    assert!(events.iter().all(|(_, data)| data["phase"].is_null() || data["human"].is_string()));
}

#[test]
fn an_engine_that_never_takes_one_is_unavailable() {
    // Its refusal does not even end.
    let refusing = scripted(|line, _| {
        line.write(b"HTTP/1.1 503 Busy\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n");
        line.closed_after_anything();
    });
    let home = home_with(&[], &[(refusing.address.port(), 1)]);
    assert_eq!(create(&home, "t", &json!({})).status, 202);
    let events = events(&home, "t", "");
    assert_eq!(names(&events), ["started", "error"]);
    assert_eq!(events[1].1["code"], "POOL_UNAVAILABLE", "{events:?}");
    assert!(events[1].1["message"].as_str().is_some_and(|text| text.contains("503")), "{events:?}");
}

/// An engine that streams a token every few milliseconds and says when it was left.
fn endless() -> (Engine, mpsc::Receiver<Instant>) {
    let (left, was_left) = mpsc::channel();
    let left = Mutex::new(left);
    let engine = scripted(move |line, _| {
        line.write(SSE.as_bytes());
        let left = left.lock().expect("no panic").clone();
        line.tcp.set_read_timeout(Some(Duration::from_millis(2))).expect("a socket option");
        loop {
            line.write(b"data: {\"content\":\"a\",\"stop\":false}\n\n");
            let mut byte = [0];
            match std::io::Read::read(&mut line.tcp, &mut byte) {
                Err(error)
                    if matches!(
                        error.kind(),
                        std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut
                    ) => {}
                _ => break,
            }
        }
        let _ = left.send(Instant::now());
    });
    (engine, was_left)
}

#[test]
fn a_cancel_stops_the_engine_and_nothing_follows_it() {
    let (engine, was_left) = endless();
    let home = home_with(&[], &[(engine.address.port(), 1)]);
    let mut took = Vec::new();
    // While it streams, with a reader and without one, and while it waits.
    for reads in [true, false, true, false] {
        assert_eq!(create(&home, "runs", &json!({})).status, 202);
        assert_eq!(create(&home, "waits", &json!({})).json()["queue_position"], 0);
        let mut reader =
            reads.then(|| open(home.port, "GET", "/v2/tasks/runs/events", None, "").expect("events"));
        if let Some(reader) = &mut reader {
            (0..5).for_each(|_| assert!(reader.event().is_some()));
        }
        assert_eq!(post(home.port, "/v2/tasks/waits/cancel", "").status, 204);
        let cancelled = Instant::now();
        let answer = post(home.port, "/v2/tasks/runs/cancel", "");
        assert_eq!((answer.status, answer.body.as_str()), (204, ""));
        let left = was_left.recv_timeout(PATIENCE).expect("the engine is left");
        took.push(left - cancelled);
        until_idle(&home, 1.0);
        assert_eq!(post(home.port, "/v2/tasks/runs/cancel", "").status, 204, "twice");
        let waits = events(&home, "waits", "");
        assert_eq!(names(&waits), ["started", "end"]);
        assert_eq!((&waits[1].1["canceled"], &waits[1].1["tokens_out"]), (&json!(true), &json!(0)));
        let last = match reader {
            Some(mut reader) => std::iter::from_fn(|| reader.event()).last().expect("an end"),
            None => events(&home, "runs", "").pop().expect("an end").1.to_string(),
        };
        assert!(last.contains("\"canceled\":true"), "{last}");
    }
    assert_eq!(questions(&engine).len(), 4, "what waited was never sent");
    assert_prompt(took);
}

#[test]
fn a_cancel_before_the_engine_answers_reaches_it_too() {
    let (left, was_left) = mpsc::channel();
    let left = Mutex::new(left);
    let engine = scripted(move |line, _| {
        let at = line.closed_at();
        let _ = left.lock().expect("no panic").send(at);
    });
    let home = home_with(&[], &[(engine.address.port(), 1)]);
    let mut took = Vec::new();
    // While the engine is silent, and then at once, before it was even reached perhaps.
    for n in 0..20u64 {
        let id = format!("t{n}");
        assert_eq!(create(&home, &id, &json!({})).status, 202);
        if n < 10 {
            until("the question", || (questions(&engine).len() as u64 > n).then_some(()));
        }
        let cancelled = Instant::now();
        assert_eq!(post(home.port, &format!("/v2/tasks/{id}/cancel"), "").status, 204);
        if n < 10 {
            let at = was_left.recv_timeout(PATIENCE).expect("the engine is left");
            took.push(at - cancelled);
        }
        until_idle(&home, 1.0);
        assert_eq!(names(&events(&home, &id, "")), ["started", "end"]);
    }
    assert_prompt(took);
}

#[test]
fn a_cancel_at_the_very_end_leaves_one_end_and_a_free_slot() {
    let directory = tempfile::tempdir().expect("a directory");
    let port = free_port();
    let _engine = demo_engine(port, &["--tokens-per-second", "2000", "--prefill-ms", "0"], directory.path());
    let home = home_with(&[], &[(port, 2)]);
    for n in 0..60u64 {
        let id = format!("t{n}");
        assert_eq!(create(&home, &id, &json!({"max_tokens": 20})).status, 202);
        let reader = (n % 2 == 0).then(|| {
            let (port, path) = (home.port, format!("/v2/tasks/{id}/events"));
            thread::spawn(move || get(port, &path).expect("events"))
        });
        // About when it ends: the answer takes ten milliseconds.
        thread::sleep(Duration::from_micros(250 * n));
        assert_eq!(post(home.port, &format!("/v2/tasks/{id}/cancel"), "").status, 204);
        let events = match reader {
            Some(reader) => {
                let answer = reader.join().expect("events");
                assert_eq!(answer.status, 200, "{answer:?}");
                parse(&answer.body)
            }
            None => events(&home, &id, ""),
        };
        let ends = events.iter().filter(|(name, _)| name == "end" || name == "error").count();
        assert_eq!((ends, events.last().map(|(name, _)| name.as_str())), (1, Some("end")), "{events:?}");
    }
    until_idle(&home, 2.0);
}

#[test]
fn a_reader_that_leaves_cancels_and_a_slow_one_slows_the_engine() {
    let (engine, was_left) = endless();
    let home = home_with(&[], &[(engine.address.port(), 1)]);
    let mut took = Vec::new();
    for _ in 0..5 {
        assert_eq!(create(&home, "t", &json!({})).status, 202, "a name that is gone may be used again");
        let mut reader = open(home.port, "GET", "/v2/tasks/t/events", None, "").expect("events");
        (0..3).for_each(|_| assert!(reader.event().is_some()));
        let second = get(home.port, "/v2/tasks/t/events").expect("an answer");
        assert_eq!((second.status, &second.json()["code"]), (409, &json!("CONFLICT")));
        let leaves = Instant::now();
        drop(reader);
        took.push(was_left.recv_timeout(PATIENCE).expect("the engine is left") - leaves);
        until_idle(&home, 1.0);
    }
    assert_prompt(took);
    assert_eq!(metric(home.port, "orchestratord_tasks"), Some(0.0), "it is forgotten");
    let late = get(home.port, "/v2/tasks/t/events").expect("an answer");
    assert_eq!((late.status, &late.json()["code"]), (410, &json!("GONE")), "its reader has left");
    let unknown = get(home.port, "/v2/tasks/other/events").expect("an answer");
    assert_eq!((unknown.status, &unknown.json()["code"]), (404, &json!("NOT_FOUND")));
    drop(home);

    // An engine as fast as it can be, 40 MB of it.
    let written = Arc::new(AtomicU64::new(0));
    let counter = written.clone();
    let fast = scripted(move |line, _| {
        line.write(SSE.as_bytes());
        let token = format!("data: {{\"content\":\"{}\",\"stop\":false}}\n\n", "a".repeat(4000)).repeat(10);
        for _ in 0..1_000 {
            if line.tcp.write_all(token.as_bytes()).is_err() {
                return;
            }
            counter.fetch_add(token.len() as u64, Ordering::SeqCst);
        }
        line.write(b"data: {\"content\":\"\",\"stop\":true}\n\n");
    });
    let home = home_with(&[], &[(fast.address.port(), 1)]);
    assert_eq!(create(&home, "t", &json!({})).status, 202);
    let stalled = |what: &str| {
        let mut last = (0, Instant::now());
        until(what, || {
            let now = written.load(Ordering::SeqCst);
            if now != last.0 || now == 0 {
                last = (now, Instant::now());
            }
            (last.1.elapsed() > Duration::from_millis(300)).then_some(now)
        })
    };
    let before = stalled("the engine to stall without a reader");
    // What the sockets between them hold is the kernel's affair.
    assert!(before < 12_000_000, "{before} bytes were taken for nobody");
    let mut reader = open(home.port, "GET", "/v2/tasks/t/events", None, "").expect("events");
    let after = stalled("the engine to stall behind a reader that does not read");
    assert!(after < 24_000_000, "{after} bytes were taken for a reader that does not read");
    let mut seen = 0;
    while let Some(data) = reader.event() {
        seen += data.matches("aaaa").count() / 1000;
    }
    assert_eq!(seen, 10_000, "every token came in the end");
    assert!(reader.status == 200 && written.load(Ordering::SeqCst) > 40_000_000);
}

#[test]
fn refusals_carry_the_code_of_their_situation() {
    let (engine, _was_left) = endless();
    let env = [("ORCHD_ADMISSION_CAPACITY", "1"), ("ORCHD_ADMISSION_TIMEOUT_MS", "400")];
    let home = Home::start(&env);
    let refused = |answer: Answer, status: u16, code: &str, retriable: bool| {
        let body = answer.json();
        assert_eq!((answer.status, body["code"].as_str()), (status, Some(code)), "{answer:?}");
        assert_eq!(
            (body["retriable"].as_bool(), body["retry_after_ms"].is_u64()),
            (Some(retriable), retriable),
            "{body}"
        );
        assert_eq!(
            (answer.field("retry-after").is_some(), answer.field("x-backoff-ms").is_some()),
            (retriable, retriable)
        );
        assert!(body["message"].is_string() && answer.field("x-correlation-id").is_some(), "{answer:?}");
    };
    let failed = |id: &str, more: &Value, code: &str, retriable: bool| {
        let created = create(&home, id, more);
        assert_eq!(created.status, 202, "{created:?}");
        let events = events(&home, id, "");
        assert_eq!(names(&events), ["started", "error"], "{events:?}");
        assert_eq!(
            (events[1].1["code"].as_str(), events[1].1["retriable"].as_bool()),
            (Some(code), Some(retriable)),
            "{events:?}"
        );
        assert_eq!(events[1].1["retry_after_ms"].is_u64(), retriable, "{events:?}");
    };
    // Nobody is there.
    failed("nobody", &json!({}), "POOL_UNAVAILABLE", true);
    // Somebody is known and does not answer.
    let dead =
        json!({"pool_id": "dead", "url": format!("http://127.0.0.1:{}", free_port()), "models": ["m"]});
    hand_over(&home.engines(), "dead.json", &dead.to_string());
    until("the dead pool", || {
        let known = get(home.port, "/v2/pools/dead/health")?.json()["last_error"].to_string();
        known.contains("refused").then_some(())
    });
    failed("unready", &json!({"placement": {"pin_pool_id": "dead"}}), "POOL_UNREADY", true);
    let warm = create(&home, "warming", &json!({"placement": {"pin_pool_id": "dead"}})).json();
    assert_eq!(
        (&warm["preparation"]["steps"][0]["kind"], &warm["predicted_start_ms"]),
        (&json!("pool_warmup"), &Value::Null)
    );
    failed_after_wait(&home, "warming", "POOL_UNREADY");
    refused(create(&home, "t", &json!({"placement": {"pin_pool_id": "none"}})), 400, "INVALID_PARAMS", false);
    refused(create(&home, "t", &json!({"placement": {"node_id": "none"}})), 503, "NODE_UNAVAILABLE", true);
    failed("node", &json!({"placement": {"node_id": "local"}}), "NODE_UNAVAILABLE", true);
    refused(create(&home, "t", &json!({"max_tokens": 0})), 400, "INVALID_PARAMS", false);
    refused(create(&home, "t", &json!({"deadline_ms": -1})), 400, "DEADLINE_UNMET", false);
    let text = json!({"pool_id": "pool-0", "engine": "other", "models": ["m"], "slots": 1,
        "url": format!("http://127.0.0.1:{}", engine.address.port())});
    hand_over(&home.engines(), "a.json", &text.to_string());
    home.until_routable(1.0);
    refused(create(&home, "t", &json!({"model_ref": "none"})), 503, "MODEL_NOT_AVAILABLE", false);
    // The only slot is taken.
    assert_eq!(create(&home, "runs", &json!({})).status, 202);
    failed("late", &json!({}), "REPLICA_EXHAUSTED", true);
    failed("deadline", &json!({"deadline_ms": 100}), "DEADLINE_UNMET", false);
    assert_eq!(create(&home, "waits", &json!({})).status, 202);
    let full = create(&home, "t", &json!({}));
    assert_eq!(full.json()["policy_label"], "reject");
    refused(full, 429, "ADMISSION_REJECT", true);
    refused(create(&home, "waits", &json!({})), 409, "CONFLICT", false);
}

fn failed_after_wait(home: &Home, id: &str, code: &str) {
    let events = events(home, id, "");
    assert_eq!((names(&events), events[1].1["code"].as_str()), (vec!["started", "error"], Some(code)));
}

#[test]
fn a_task_is_told_its_place_and_a_start_that_comes_true() {
    let directory = tempfile::tempdir().expect("a directory");
    let port = free_port();
    let pace = ["--tokens-per-second", "20", "--prefill-ms", "0", "--slots", "1"];
    let _engine = demo_engine(port, &pace, directory.path());
    let home = home_with(&[], &[(port, 1)]);
    let first = create(&home, "a", &json!({"deadline_ms": 60_000}));
    let told = first.json();
    assert_eq!((&told["queue_position"], &told["predicted_start_ms"]), (&json!(0), &json!(0)));
    assert_eq!(
        (first.field("x-budget-tokens-remaining"), first.field("x-budget-time-remaining-ms")),
        (Some("5"), Some("60000"))
    );
    let unknown = create(&home, "b", &json!({}));
    assert_eq!(unknown.json()["predicted_start_ms"], Value::Null, "nothing was measured yet: {unknown:?}");
    for id in ["a", "b"] {
        events(&home, id, "");
    }
    until_idle(&home, 1.0);
    // Five tokens at twenty a second take a quarter of a second, less the first.
    assert_eq!(create(&home, "c", &json!({})).status, 202);
    let (asked, mut told) = (Instant::now(), Vec::new());
    for (at, id) in ["d", "e", "f"].iter().enumerate() {
        let body = create(&home, id, &json!({})).json();
        assert_eq!(body["queue_position"], at, "{body}");
        told.push((body["predicted_start_ms"].as_u64().expect("measured by now"), body));
    }
    let mut reader = open(home.port, "GET", "/v2/tasks/f/events?verbose=true", None, "").expect("events");
    assert!(reader.head.to_ascii_lowercase().contains("x-budget-tokens-remaining: 5"), "{}", reader.head);
    let mut positions = Vec::new();
    let mut seen: Vec<Value> = Vec::new();
    while let Some(data) = reader.event() {
        let data: Value = serde_json::from_str(&data).expect("JSON");
        if data["phase"] == "dispatched" {
            let (took, predicted) = (asked.elapsed().as_millis() as u64, told[2].0);
            assert!(took.abs_diff(predicted) < 1_000, "predicted {predicted} ms, started after {took} ms");
        }
        positions.extend(data["queue_position"].as_u64().filter(|_| data["phase"] == "queued"));
        seen.push(data);
    }
    let started = json!({"queue_position": 2, "predicted_start_ms": told[2].0});
    assert_eq!(seen[0], started, "as the admission said");
    assert!(positions.windows(2).all(|pair| pair[1] < pair[0]) && positions.len() > 1, "{positions:?}");
    assert!(told.windows(2).all(|pair| pair[0].0 < pair[1].0), "{told:?}");
    let finished = seen.iter().find(|data| data["phase"] == "finished").expect("a sum");
    let rate = finished["tokens_per_second"].as_f64().expect("a rate");
    assert!((5.0..40.0).contains(&rate), "{finished}");
    // A deadline before the start that is to be expected is refused at once.
    assert_eq!(create(&home, "g", &json!({"max_tokens": 200})).status, 202);
    let infeasible = create(&home, "h", &json!({"deadline_ms": 10}));
    assert_eq!(
        (infeasible.status, &infeasible.json()["code"]),
        (400, &json!("DEADLINE_UNMET")),
        "{infeasible:?}"
    );
    assert_eq!(post(home.port, "/v2/tasks/g/cancel", "").status, 204);
}

#[test]
fn sessions_tell_what_was_served_where() {
    let directory = tempfile::tempdir().expect("a directory");
    let port = free_port();
    let _engine = demo_engine(port, &["--tokens-per-second", "0", "--prefill-ms", "0"], directory.path());
    let home = home_with(&[], &[(port, 1)]);
    let session = || get(home.port, "/v2/sessions/s1").expect("an answer");
    assert_eq!(session().status, 404);
    assert_eq!(create(&home, "a", &json!({"session_id": "s1"})).status, 202);
    assert_eq!(names(&events(&home, "a", "")).last(), Some(&"end"));
    let told = until("a turn", || Some(session().json()).filter(|told| told["turns"] == 1));
    assert!((590_000..=600_000).contains(&told["ttl_ms_remaining"].as_u64().expect("a time")), "{told}");
    assert_eq!(
        (&told["tokens_out"], &told["kv_warmth"], &told["kv_bytes"]),
        (&json!(5), &json!(true), &Value::Null)
    );
    assert_eq!(
        (&told["last_replica"]["replica_id"], &told["last_replica"]["node_id"]),
        (&json!("r0"), &json!("local"))
    );
    assert!(
        told["time_budget_remaining_ms"].is_u64() && told.get("tokens_budget_remaining").is_some(),
        "{told}"
    );
    assert_eq!(metric(home.port, "orchestratord_sessions"), Some(1.0));
    // An OpenAI request of the same session.
    let body = r#"{"messages":[{"role":"user","content":"x"}],"max_tokens":2}"#;
    let mut stream = std::net::TcpStream::connect(("127.0.0.1", home.port)).expect("connected");
    write!(
        stream,
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nX-Session-Id: s1\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
    .expect("sent");
    let mut answer = String::new();
    std::io::Read::read_to_string(&mut stream, &mut answer).expect("an answer");
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    until("a second turn", || (session().json()["turns"] == 2).then_some(()));
    let end = || ask(home.port, "DELETE", "/v2/sessions/s1", None, "").expect("an answer").status;
    assert_eq!((end(), end(), session().status), (204, 204, 404));
    let wrong = post(home.port, "/v2/sessions/s1", "");
    assert_eq!((wrong.status, wrong.field("allow")), (405, Some("GET, DELETE")));
}

#[test]
fn a_session_stays_with_its_replica_at_both_front_doors_until_it_is_forgotten() {
    let start = || {
        scripted(|line, _| {
            let end = "data: {\"choices\":[{\"index\":0,\"text\":\"a\",\"finish_reason\":\"stop\"}]}\n\ndata: [DONE]\n\n";
            line.write(format!("{SSE}{end}").as_bytes());
        })
    };
    let engines = [start(), start(), start()];
    let env =
        [("ORCHESTRATORD_PLACEMENT_STRATEGY", "round-robin"), ("ORCHESTRATORD_PREFIX_AFFINITY", "false")];
    let home = home_with(&env, &engines.each_ref().map(|engine| (engine.address.port(), 4)));
    let served_by = |body: &str| {
        let answer = post(home.port, "/v1/completions", body);
        assert_eq!(answer.status, 200, "{answer:?}");
        answer.field("x-llorch-replica").expect("a replica").to_string()
    };
    let (of_session, of_nobody) = (r#"{"prompt":"x","session_id":"s1"}"#, r#"{"prompt":"x"}"#);
    let session = || get(home.port, "/v2/sessions/s1").expect("an answer");
    let replica = served_by(of_session);
    for n in 0..4 {
        let _between = served_by(of_nobody);
        assert_eq!(served_by(of_session), replica, "request {n}");
        let _between = served_by(of_nobody);
        let id = format!("t{n}");
        assert_eq!(create(&home, &id, &json!({"session_id": "s1"})).status, 202);
        assert_eq!(names(&events(&home, &id, "")).last(), Some(&"end"));
        let told = session().json();
        assert!(
            told["last_replica"]["replica_id"].as_str().is_some_and(|id| replica.ends_with(id)),
            "{told}"
        );
    }
    // From here the strategy would go on to another one.
    until("a turn of the session's replica", || (served_by(of_nobody) == replica).then_some(()));
    let end = ask(home.port, "DELETE", "/v2/sessions/s1", None, "").expect("an answer");
    assert_eq!((end.status, session().status), (204, 404));
    assert_ne!(served_by(of_session), replica, "it was forgotten");
}

#[test]
fn tasks_and_sessions_need_the_token_once_there_is_one() {
    let token = "token-0123456789abcdef0123456789abcdef";
    let home = Home::start(&[("LLORCH_API_TOKEN", token)]);
    for (method, path) in [
        ("POST", "/v2/tasks"),
        ("GET", "/v2/tasks/t/events"),
        ("POST", "/v2/tasks/t/cancel"),
        ("GET", "/v2/sessions/s"),
        ("DELETE", "/v2/sessions/s"),
    ] {
        for (given, code) in [(None, 40101), (Some("wrong"), 40102)] {
            let answer = ask(home.port, method, path, given, "").expect("an answer");
            assert_eq!((answer.status, &answer.json()["code"]), (401, &json!(code)), "{method} {path}");
        }
        let allowed = ask(home.port, method, path, Some(token), "").expect("an answer");
        assert_ne!(allowed.status, 401, "{method} {path}");
    }
}

#[test]
fn a_control_plane_that_must_have_a_token_does_not_start_without_one() {
    let directory = tempfile::tempdir().expect("a directory");
    let env = [("ORCHESTRATORD_REQUIRE_AUTH", "true"), ("ORCHESTRATORD_ADDR", "127.0.0.1:0")];
    let mut daemon = Process::start(ORCHESTRATORD, &[], &env, directory.path());
    assert_eq!(daemon.end(), Some(78), "{}", daemon.log());
    assert!(daemon.log().contains("ORCHESTRATORD_REQUIRE_AUTH"), "{}", daemon.log());
}
