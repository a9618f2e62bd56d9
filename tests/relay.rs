//! The relay over real sockets: a gateway around `Net`, a scripted engine, raw clients. What is
//! asserted is what the other side received. Every wait has a deadline of its own, and after each test
//! nothing of any client or exchange is left.

pub(crate) mod relay_support;

use std::io::{Read, Write};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use llama_orch::net::{Limits, Patience};
use relay_support::{
    Client, DEADLINE, Engine, Gateway, PATIENT, Received, eventually, field, find, flood, reset_on_close,
    security,
};

const JSON: &str =
    "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 12\r\n\r\n{\"a\": \"b\"} \n";
const SSE_HEAD: &str =
    "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n";
/// How soon an engine must learn that its client left.
const CANCEL_MS_MAX: u128 = 100;

fn chunk(data: &str) -> String {
    format!("{:x}\r\n{data}\r\n", data.len())
}

/// Waits until the exchanges have ended like this, which the client may see first.
fn ended(gateway: &Gateway, outcomes: &[&str]) {
    eventually("the exchanges end", || gateway.outcomes().len() >= outcomes.len());
    assert_eq!(gateway.outcomes(), outcomes);
}

/// Checks that everything came to rest, once the clients are gone.
fn settle(gateway: Gateway, client: Client) {
    drop(client);
    gateway.settle();
}

#[test]
fn a_json_answer_passes_unchanged() {
    let engine = Engine::answering(
        "HTTP/1.1 201 Created\r\nContent-Type: application/json\r\nx-Engine: 1\r\nX-B: 2\r\nx-Engine: 3\r\nContent-Length: 11\r\n\r\n{\"a\": \"b\"}\n",
    );
    let gateway = Gateway::start(engine.address);
    let mut client = gateway.client();
    let answer = client
        .send("POST /v1/x?q=%20&q HTTP/1.1\r\nHost: gateway\r\nContent-Type: application/json\r\nx-MiXed: 1\r\nX-B: 2\r\nx-MiXed: 3\r\nX-Correlation-Id: abc\r\nAuthorization: Bearer secret\r\nContent-Length: 7\r\n\r\n{\"m\":1}")
        .receive();
    assert_eq!((answer.status, answer.text().as_str(), answer.clean), (201, "{\"a\": \"b\"}\n", true));
    let kept: Vec<&str> = answer.head.lines().filter(|line| line.to_lowercase().starts_with("x-")).collect();
    let (made, kept) = kept.split_last().expect("fields");
    assert_eq!(kept, ["x-Engine: 1", "X-B: 2", "x-Engine: 3", "X-Via: gateway", "X-Correlation-Id: abc"]);
    assert!(made.starts_with("X-Request-Id: ") && made.len() == "X-Request-Id: ".len() + 36, "{made}");

    let requests = engine.requests();
    assert_eq!(requests.len(), 1);
    let head = &requests[0].head;
    assert!(head.starts_with("POST /v1/x?q=%20&q HTTP/1.1\r\n"), "{head}");
    assert_eq!(field(head, "host"), Some(engine.address.to_string().as_str()));
    assert_eq!((field(head, "authorization"), field(head, "content-length")), (None, Some("7")));
    let order: Vec<&str> = head.lines().filter(|l| l.contains("MiXed") || l.starts_with("X-B")).collect();
    assert_eq!(order, ["x-MiXed: 1", "X-B: 2", "x-MiXed: 3"]);
    assert_eq!(requests[0].body, b"{\"m\":1}");
    ended(&gateway, &["complete 201"]);
    settle(gateway, client);
}

#[test]
fn a_chunked_event_stream_passes_byte_for_byte() {
    let body = "17;ext=\"x\"\r\n: comment\r\n\r\ndata: {\"a\"\r\n0008\r\n: 1}\n\nda\r\n0f\r\nta: \u{e9}\u{20ac}\r\rdata\r\n10\r\n: [DONE]\n\n     \n\r\n0\r\nX-Sum: 1\r\n\r\n";
    for pieces in [body.len(), 7, 1] {
        let engine = Engine::start(move |line| {
            while line.request().is_some() {
                line.write(SSE_HEAD.as_bytes());
                body.as_bytes().chunks(pieces).for_each(|piece| line.write(piece));
            }
        });
        let gateway = Gateway::start(engine.address);
        let mut client = gateway.client();
        for _ in 0..2 {
            let answer = client.post("/v1/chat/completions", "{}");
            assert_eq!(String::from_utf8_lossy(&answer.raw), body, "in pieces of {pieces}");
            assert!(answer.clean && answer.field("content-length").is_none());
            assert_eq!(answer.field("x-accel-buffering"), Some("no"));
        }
        assert_eq!(engine.connections(), 1, "the stream's end was seen, so the connection was kept");
        settle(gateway, client);
    }
}

#[test]
fn an_answer_until_close_is_framed_for_the_client() {
    let engine = Engine::closing("HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\nuntil the end");
    let gateway = Gateway::start(engine.address);
    let mut client = gateway.client();
    for _ in 0..2 {
        let answer = client.get("/");
        assert_eq!(answer.field("transfer-encoding"), Some("chunked"));
        assert_eq!((answer.text().as_str(), answer.clean), ("until the end", true));
    }
    let mut old = gateway.client();
    let answer = old.send("GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n").receive();
    assert_eq!((answer.field("transfer-encoding"), answer.field("connection")), (None, Some("close")));
    assert_eq!((answer.text().as_str(), answer.clean), ("until the end", true));
    assert_eq!(engine.connections(), 3);
    drop(old);
    settle(gateway, client);
}

#[test]
fn chunks_are_undone_for_a_client_that_knows_none() {
    let engine =
        Engine::answering(format!("{SSE_HEAD}{}{}0\r\n\r\n", chunk("data: 1\n\n"), chunk("data: 2\n\n")));
    let gateway = Gateway::start(engine.address);
    let mut client = gateway.client();
    let answer = client.send("GET / HTTP/1.0\r\n\r\n").receive();
    assert_eq!((answer.text().as_str(), answer.clean), ("data: 1\n\ndata: 2\n\n", true));
    assert_eq!((answer.field("transfer-encoding"), answer.field("connection")), (None, Some("close")));
    settle(gateway, client);

    let engine = Engine::answering(JSON);
    let gateway = Gateway::start(engine.address);
    let mut client = gateway.client();
    for _ in 0..2 {
        let answer = client.send("GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n").receive();
        assert_eq!((answer.field("connection"), answer.clean), (Some("keep-alive"), true));
    }
    settle(gateway, client);
}

#[test]
fn answers_without_a_body_keep_both_connections() {
    let engine = Engine::start(|line| {
        while let Some(request) = line.request() {
            line.write(match request.head.split(' ').next() {
                Some("HEAD") => b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n",
                Some("GET") => b"HTTP/1.1 304 Not Modified\r\nETag: x\r\n\r\n",
                _ => b"HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 204 No Content\r\nX: y\r\n\r\n",
            });
        }
    });
    let gateway = Gateway::start(engine.address);
    let mut client = gateway.client();
    for _ in 0..2 {
        assert_eq!(client.post("/", "").status, 204);
        assert_eq!(client.get("/").status, 304);
        let mut head = Vec::new();
        client.send("HEAD / HTTP/1.1\r\nHost: a\r\n\r\n");
        while find(&head, b"\r\n\r\n").is_none() {
            let mut byte = [0];
            client.tcp.read_exact(&mut byte).expect("a head");
            head.push(byte[0]);
        }
        assert!(find(&head, b"Content-Length: 99\r\n").is_some(), "{}", String::from_utf8_lossy(&head));
    }
    assert_eq!(engine.connections(), 1);
    settle(gateway, client);
}

#[test]
fn one_engine_connection_serves_many_requests() {
    let engine = Engine::answering(JSON);
    let gateway = Gateway::start(engine.address);
    let mut client = gateway.client();
    for turn in 0..100 {
        let answer = client.post(&format!("/{turn}"), "{}");
        assert!(answer.status == 200 && answer.clean);
    }
    assert_eq!((engine.connections(), engine.requests().len()), (1, 100));
    settle(gateway, client);
}

#[test]
fn a_stale_connection_is_replaced_once_and_unnoticed() {
    // The second request meets the close: read by the engine, but not answered with a single byte.
    let engine = Engine::start(|line| {
        line.request();
        line.write(JSON.as_bytes());
        if line.number > 0 {
            while line.request().is_some() {
                line.write(JSON.as_bytes());
            }
        }
        line.request();
    });
    let gateway = Gateway::start(engine.address);
    let mut client = gateway.client();
    for turn in 0..3 {
        assert_eq!(client.post("/", &turn.to_string()).status, 200, "request {turn}");
    }
    let order: Vec<(usize, Vec<u8>)> =
        engine.requests().into_iter().map(|r| (r.connection, r.body)).collect();
    let expected: [(usize, &[u8]); 4] = [(0, b"0"), (0, b"1"), (1, b"1"), (1, b"2")];
    assert_eq!(order, expected.map(|(line, body)| (line, body.to_vec())));
    settle(gateway, client);
}

#[test]
fn nothing_is_sent_twice_after_a_byte_of_the_answer_or_on_a_fresh_connection() {
    for (kept, partial) in [(true, "H"), (true, "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n"), (false, "")] {
        let engine = Engine::start(move |line| {
            if kept && line.number == 0 {
                line.request();
                line.write(JSON.as_bytes());
            }
            line.request();
            line.write(partial.as_bytes());
        });
        let gateway = Gateway::start(engine.address);
        let mut client = gateway.client();
        if kept {
            assert_eq!(client.post("/", "1").status, 200);
        }
        assert_eq!(client.post("/", "2").status, 502, "after {partial:?}");
        assert_eq!(engine.requests().iter().filter(|r| r.body == b"2").count(), 1, "after {partial:?}");
        eventually("the exchange ends", || gateway.outcomes().last().is_some_and(|last| last == "reset"));
        settle(gateway, client);
    }
}

#[test]
fn an_engine_that_closes_at_the_worst_moment_is_never_noticed() {
    // It promises to keep the connection and closes it as soon as the answer is out.
    let engine = Engine::closing(JSON);
    let gateway = Gateway::start(engine.address);
    let mut client = gateway.client();
    for turn in 0..500 {
        let answer = client.post("/", &turn.to_string());
        assert_eq!(answer.status, 200, "request {turn}: {}", answer.text());
    }
    assert_eq!(engine.requests().len(), 500, "no request was read twice");
    settle(gateway, client);
}

#[test]
fn a_connection_with_more_than_its_answer_is_not_used_again() {
    for answer in [
        format!("{JSON}HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nwrong"),
        "HTTP/1.1 204 No Content\r\nContent-Length: 5\r\n\r\nwrong".into(),
        format!("{SSE_HEAD}0\r\n\r\nwrong"),
    ] {
        let engine = Engine::answering(answer.clone());
        let gateway = Gateway::start(engine.address);
        let mut client = gateway.client();
        for _ in 0..5 {
            let received = client.get("/");
            assert!(received.clean && !received.text().contains("wrong"), "{received:?}");
            assert!(received.status != 204 || received.field("content-length").is_none(), "{received:?}");
        }
        assert_eq!(engine.connections(), 5, "{answer}");
        settle(gateway, client);
    }
}

#[test]
fn bytes_that_nobody_asked_for_are_no_answer() {
    // An idle connection gets a farewell; the next request must not take it for its answer.
    let (farewell, said) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let (go, done) = (farewell.clone(), said.clone());
    let engine = Engine::start(move |line| {
        while line.request().is_some() {
            line.write(JSON.as_bytes());
            if line.number == 0 {
                eventually("the test goes on", || go.load(Ordering::SeqCst) == 1);
                line.write(b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
                done.store(1, Ordering::SeqCst);
                return;
            }
        }
    });
    let gateway = Gateway::start(engine.address);
    let mut client = gateway.client();
    assert_eq!(client.get("/").status, 200);
    farewell.store(1, Ordering::SeqCst);
    eventually("the farewell is sent", || said.load(Ordering::SeqCst) == 1);
    assert_eq!(client.get("/").status, 200);
    settle(gateway, client);
}

/// How the client leaves.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Leave {
    Fin,
    Reset,
    Close,
}

fn leave(client: Client, how: Leave) {
    match how {
        Leave::Fin => {
            client.fin();
            // Stays half open until the test is over.
            std::thread::spawn(move || {
                let mut rest = Vec::new();
                let _ = (&client.tcp).read_to_end(&mut rest);
            });
        }
        Leave::Reset => reset_on_close(&client.tcp),
        Leave::Close => {}
    }
}

#[test]
fn a_client_that_leaves_takes_its_engine_connection_along() {
    for how in [Leave::Fin, Leave::Reset, Leave::Close] {
        for streaming in [false, true] {
            let (tell, told) = mpsc::channel();
            let engine = Engine::start(move |line| {
                line.request();
                if streaming {
                    line.write(format!("{SSE_HEAD}{}", chunk("data: 1\n\n")).as_bytes());
                }
                tell.send(None).expect("the test listens");
                tell.send(Some(line.closed_at())).expect("the test listens");
            });
            let gateway = Gateway::start(engine.address);
            let mut client = gateway.client();
            client.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n{}");
            assert_eq!(told.recv_timeout(DEADLINE), Ok(None), "the engine has the request");
            if streaming {
                let mut buffer = [0; 1024];
                while !buffer.windows(9).any(|w| w == b"data: 1\n\n") {
                    assert!(client.tcp.read(&mut buffer).expect("the first event") > 0);
                }
            }
            let left = Instant::now();
            leave(client, how);
            let closed = told.recv_timeout(DEADLINE).expect("the engine's line ends").expect("a time");
            let took = closed.saturating_duration_since(left).as_millis();
            assert!(took <= CANCEL_MS_MAX, "{how:?}, streaming: {streaming}: {took} ms");
            ended(&gateway, &["client gone"]);
            gateway.settle();
        }
    }
}

#[test]
fn a_client_whose_farewell_comes_with_its_request_has_left_all_the_same() {
    let engine = Engine::start(|line| {
        if line.request().is_some() {
            line.closed_at();
        }
    });
    for _ in 0..20 {
        let gateway = Gateway::start(engine.address);
        let mut client = gateway.client();
        client.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n{}");
        drop(client);
        gateway.settle();
    }
}

#[test]
fn a_client_that_leaves_while_the_owner_thinks_is_reported() {
    for how in [Leave::Fin, Leave::Reset, Leave::Close] {
        let engine = Engine::answering(JSON);
        let gateway = Gateway::start(engine.address);
        let mut client = gateway.client();
        client.send("GET /hold HTTP/1.1\r\nHost: a\r\n\r\n");
        eventually("the request arrives", || gateway.requests() == 1);
        leave(client, how);
        eventually("the owner hears of it", || gateway.gone() == 1);
        gateway.settle();
    }
}

#[test]
fn an_engine_that_dies_never_looks_finished() {
    let events: Vec<String> =
        ["data: {\"a\":1}\n\n", "data: {\"b\":2}\n\n"].iter().map(|e| chunk(e)).collect();
    let answer = format!("{SSE_HEAD}{}0\r\n\r\n", events.concat());
    let (head, body_ends) = (SSE_HEAD.len(), SSE_HEAD.len() + events.concat().len());
    let gaps = [head, head + events[0].len(), body_ends];
    for reset in [false, true] {
        let (cut, script) = (Arc::new(AtomicUsize::new(0)), answer.clone());
        let at = cut.clone();
        let engine = Engine::start(move |line| {
            line.request();
            line.write(&script.as_bytes()[..at.load(Ordering::SeqCst)]);
            if reset {
                // After a farewell of its own making the client must not be the one that is reset.
                std::thread::sleep(Duration::from_millis(2));
                reset_on_close(&line.tcp);
            }
        });
        let gateway = Gateway::start(engine.address);
        for end in 0..answer.len() {
            cut.store(end, Ordering::SeqCst);
            let mut client = gateway.client();
            let received = client.post("/", "{}");
            let name = format!("died after {end} bytes, reset: {reset}: {:?}", received.text());
            if end < head {
                assert_eq!((received.status, received.clean), (502, true), "{name}");
                continue;
            }
            assert_eq!(received.status, 200, "{name}");
            let error = find(&received.body, b"\n\ndata: {\"error\":").is_some()
                || received.body.starts_with(b"data: {\"error\":");
            assert_eq!(error, gaps.contains(&end), "{name}");
            assert!(!received.clean, "not even behind an error event: {name}");
            assert!(error || script_prefix(&answer, &received), "nothing is made up: {name}");
            assert!(client.is_closed(), "{name}");
        }
        gateway.settle();
    }
}

fn script_prefix(answer: &str, received: &Received) -> bool {
    answer.as_bytes()[SSE_HEAD.len()..].starts_with(&received.raw)
}

#[test]
fn an_old_client_is_reset_where_a_close_would_look_like_the_end() {
    let engine = Engine::start(|line| {
        let plain = line.request().is_some_and(|request| request.head.starts_with("GET /plain"));
        let kind = if plain { "text/plain" } else { "text/event-stream" };
        line.write(
            format!("HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nTransfer-Encoding: chunked\r\n\r\n")
                .as_bytes(),
        );
        line.write(chunk("data: half").as_bytes());
    });
    let gateway = Gateway::start(engine.address);
    for target in ["/plain", "/events"] {
        let mut client = gateway.client();
        let received = client.send(format!("GET {target} HTTP/1.0\r\n\r\n")).receive();
        assert!(!received.clean, "{target}: {received:?}");
    }
    gateway.settle();
}

#[test]
fn an_event_stream_that_closes_inside_an_event_has_not_ended() {
    for (body, clean) in [("data: 1\n\n", true), ("data: 1\n\ndata: 2", false), ("data: [DONE]\n", true)] {
        let engine =
            Engine::closing(format!("HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n{body}"));
        let gateway = Gateway::start(engine.address);
        let mut client = gateway.client();
        let received = client.get("/");
        assert_eq!((received.clean, received.text().as_str()), (clean, body), "{body:?}");
        settle(gateway, client);
    }
}

#[test]
fn a_stream_that_said_done_is_complete_however_its_engine_closes() {
    let engine = Engine::closing(format!("{SSE_HEAD}{}{}", chunk("data: 1\n\n"), chunk("data: [DONE]\n\n")));
    let gateway = Gateway::start(engine.address);
    let mut client = gateway.client();
    let received = client.post("/", "{}");
    assert_eq!((received.text().as_str(), received.clean), ("data: 1\n\ndata: [DONE]\n\n", true));
    ended(&gateway, &["complete 200"]);
    settle(gateway, client);
}

#[test]
fn fields_of_one_connection_stay_on_it() {
    let engine = Engine::answering(
        "HTTP/1.1 200 OK\r\nConnection: X-Hop, close\r\nX-Hop: 1\r\nKeep-Alive: timeout=5\r\nProxy-Authenticate: x\r\nUpgrade: h2c\r\nconnection: x-second, content-length\r\nX-Second: 1\r\nX-Stays: 1\r\nContent-Length: 2\r\n\r\nok",
    );
    let gateway = Gateway::start(engine.address);
    let mut client = gateway.client();
    client.send("GET / HTTP/1.1\r\nHost: a\r\nConnection: X-One\r\nConnection: keep-alive, x-TWO,,TE\r\nX-One: 1\r\nX-Two: 2\r\nTE: trailers\r\nTrailer: x\r\nUpgrade: h2c\r\nProxy-Authorization: x\r\nKeep-Alive: 5\r\nProxy-Connection: x\r\nX-Forwarded-For: 1.2.3.4\r\nX-Forwarded-Proto: https\r\nX-Real-IP: 1.2.3.4\r\nForwarded: for=x\r\nX-Llorch-Hops: 0\r\nX-Conversation-Id: 1\r\nX-Stays: 1\r\n\r\n");
    let answer = client.receive();
    assert_eq!((answer.status, answer.text().as_str(), answer.clean), (200, "ok", true));
    let names = |head: &str| -> Vec<String> {
        head.lines().skip(1).map(|l| l.split(':').next().unwrap_or_default().to_lowercase()).collect()
    };
    // Hops are counted over all servers on the way.
    assert_eq!(names(&engine.requests()[0].head), ["host", "x-llorch-hops", "x-stays"]);
    assert_eq!(
        names(&answer.head),
        ["x-stays", "content-length", "x-via", "x-correlation-id", "x-request-id"]
    );
    // The engine's wish to close is not the client's.
    assert_eq!(client.get("/").status, 200);
    assert_eq!(engine.connections(), 2);
    settle(gateway, client);
}

#[test]
fn held_back_answers_reach_no_client() {
    for status in [502, 503, 504] {
        let engine = Engine::answering(format!(
            "HTTP/1.1 {status} No\r\nX-Secret: 1\r\nContent-Length: 6\r\n\r\nsecret"
        ));
        let gateway = Gateway::start(engine.address);
        let mut client = gateway.client();
        let answer = client.post("/", "{}");
        assert_eq!((answer.status, answer.clean, answer.field("x-secret")), (502, true, None));
        assert_eq!(answer.text(), format!("the engine answered {status}"));
        ended(&gateway, &[&format!("status {status}")]);
        // The same client can be served again on the same connection.
        assert_eq!(client.get("/local/3").text(), "LLL");
        settle(gateway, client);
    }
    let engine = Engine::answering("HTTP/1.1 500 Internal Server Error\r\nContent-Length: 3\r\n\r\nbad");
    let gateway = Gateway::start(engine.address);
    let mut client = gateway.client();
    assert_eq!(client.get("/").text(), "bad", "a 500 is the engine's own answer");
    settle(gateway, client);
}

#[test]
fn an_engine_that_is_not_there_or_not_http_is_a_bad_gateway() {
    let nobody =
        std::net::TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("an address");
    let gateway = Gateway::start(nobody);
    let mut client = gateway.client();
    assert_eq!(client.post("/", "{}").status, 502);
    ended(&gateway, &["connect"]);
    settle(gateway, client);

    for garbage in
        ["SSH-2.0-OpenSSH_9.6\r\n\r\n", "HTTP/1.1 200 OK\nContent-Length: 0\n\n", "\r\n\r\n\r\n\r\n"]
    {
        let engine = Engine::answering(garbage);
        let gateway = Gateway::start(engine.address);
        let mut client = gateway.client();
        assert_eq!(client.post("/", "{}").status, 502, "{garbage:?}");
        ended(&gateway, &["protocol"]);
        settle(gateway, client);
    }
}

#[test]
fn an_early_answer_is_passed_on_and_its_connection_given_up() {
    // The engine refuses after the head, and reads no further before its answer has been passed on: more
    // of the body than sockets hold is then still to be sent.
    let (passed_on, waiting) = std::sync::mpsc::channel();
    let waiting = std::sync::Mutex::new(waiting);
    let engine = Engine::start(move |line| {
        let mut some = [0; 1024];
        assert!(line.tcp.read(&mut some).expect("a head") > 0);
        line.write(b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 3\r\n\r\nbig");
        waiting.lock().expect("one engine").recv_timeout(DEADLINE).expect("the answer is passed on");
        line.closed_after_anything();
    });
    let gateway = Gateway::start(engine.address);
    let mut client = gateway.client();
    for _ in 0..2 {
        let answer = client.post("/", &"b".repeat(16 << 20));
        assert_eq!((answer.status, answer.text().as_str()), (413, "big"));
        passed_on.send(()).expect("the engine waits");
    }
    assert_eq!(engine.connections(), 2);
    settle(gateway, client);
}

#[test]
fn a_thousand_pipelined_requests_are_answered_in_order() {
    let engine = Engine::start(|line| {
        while let Some(request) = line.request() {
            let body = request.head.split(' ').nth(1).expect("a target").to_string();
            line.write(format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len()).as_bytes());
        }
    });
    let gateway = Gateway::start(engine.address);
    for local in [false, true] {
        let mut client = gateway.client();
        let all: String = (0..1000)
            .map(|turn| {
                let target = if local { format!("/local/{}", turn % 7) } else { format!("/{turn}") };
                format!("GET {target} HTTP/1.1\r\nHost: a\r\n\r\n")
            })
            .collect();
        client.send(all);
        for turn in 0..1000 {
            let expected = if local { "L".repeat(turn % 7) } else { format!("/{turn}") };
            assert_eq!(client.receive().text(), expected);
        }
    }
    assert_eq!((engine.connections(), engine.requests().len()), (1, 1000));
    gateway.settle();
}

#[test]
fn a_client_that_never_reads_gets_no_endless_answers() {
    const BYTES: usize = 1 << 20;
    const REQUESTS: usize = 100;
    let engine = Engine::answering(JSON);
    let gateway = Gateway::start(engine.address);
    let mut greedy = gateway.client();
    for _ in 0..REQUESTS {
        greedy.send(format!("GET /local/{BYTES} HTTP/1.1\r\nHost: a\r\n\r\n"));
        // Each arrives by itself: once another client was served, the gateway has seen it.
        assert_eq!(gateway.client().get("/").status, 200);
    }
    let served = gateway.requests() - REQUESTS;
    assert!(served < 40, "{served} MiB of answers were made for a client that reads none");
    for _ in 0..REQUESTS {
        let answer = greedy.receive();
        assert!(answer.clean && answer.body.len() == BYTES && answer.body.iter().all(|b| *b == b'L'));
    }
    settle(gateway, greedy);
}

#[test]
fn a_client_may_wait_for_leave_to_send_its_body_or_not() {
    let engine = Engine::answering(JSON);
    let gateway = Gateway::start(engine.address);
    let head = "POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n";
    let mut client = gateway.client();
    for waits in [true, false, true] {
        if waits {
            assert_eq!(client.send(head).receive().status, 100);
            assert_eq!(client.send("hello").receive().status, 200);
        } else {
            client.send(format!("{head}hello"));
            assert_eq!((client.receive().status, client.receive().status), (100, 200));
        }
    }
    for request in engine.requests() {
        assert_eq!((request.body.as_slice(), field(&request.head, "expect")), (&b"hello"[..], None));
    }
    settle(gateway, client);
}

#[test]
fn a_refusal_reaches_a_client_that_is_still_sending() {
    let engine = Engine::answering(JSON);
    let limits = Limits { body_bytes_max: 100_000, ..Limits::default() };
    let gateway = Gateway::with(engine.address, limits, PATIENT);
    let sized = |length: usize| {
        let body = "b".repeat(length);
        format!("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: {length}\r\n\r\n{body}")
    };
    let mut client = gateway.client();
    assert_eq!(client.send(sized(100_000)).receive().status, 200, "a body at the limit");
    drop(client);
    let chunked = "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n";
    let many = format!("{chunked}{}0\r\n\r\n", chunk(&"b".repeat(1000)).repeat(4000));
    let table = [
        (sized(100_001), 413),
        (sized(4 << 20), 413),
        (many, 413),
        (format!("GET / HTTP/1.1\r\nHost: a\r\nX : y\r\n\r\n{}", "x".repeat(4 << 20)), 400),
        ("x".repeat(4 << 20), 431),
    ];
    for (bytes, status) in table {
        for _ in 0..5 {
            // Everything is sent before a byte of the answer is read.
            let mut client = gateway.client();
            let answer = client.send(&bytes).receive();
            assert_eq!((answer.status, answer.clean), (status, true), "{} bytes", bytes.len());
            assert_eq!(answer.field("connection"), Some("close"));
            assert!(answer.text().contains("\"retriable\":false"), "{}", answer.text());
            assert!(client.is_closed());
        }
    }
    assert_eq!(engine.requests().len(), 1, "nothing of a refused request reaches the engine");
    gateway.settle();
}

#[test]
fn clients_above_the_limit_are_closed_and_the_others_served() {
    let engine = Engine::answering(JSON);
    let limits = Limits { clients_max: 3, ..Limits::default() };
    let gateway = Gateway::with(engine.address, limits, PATIENT);
    let mut served: Vec<Client> = (0..3).map(|_| gateway.client()).collect();
    served.iter_mut().for_each(|client| assert_eq!(client.get("/").status, 200));
    let mut refused = gateway.client();
    if security().is_none() {
        assert_eq!(refused.receive().status, 503, "one too many");
    }
    assert!(refused.is_closed(), "one too many");
    served.iter_mut().for_each(|client| assert_eq!(client.get("/").status, 200));
    served.pop();
    eventually("a place is free", || gateway.clients() == 2);
    assert_eq!(gateway.client().get("/").status, 200);
    drop(served);
    gateway.settle();
}

#[test]
fn a_request_that_does_not_arrive_in_time_is_given_up() {
    let engine = Engine::answering(JSON);
    let limits = Limits { request_ms: 60, idle_ms: 60, ..Limits::default() };
    let gateway = Gateway::with(engine.address, limits, PATIENT);
    let unfinished = [
        "GET / HT",
        "GET / HTTP/1.1\r\nHost: a\r\n",
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhell",
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhe",
    ];
    for start in unfinished {
        let mut client = gateway.client();
        let answer = client.send(start).receive();
        assert_eq!((answer.status, answer.clean), (408, true), "{start:?}");
        assert!(client.is_closed());
    }
    // A drip does not buy time.
    let mut client = gateway.client();
    let began = Instant::now();
    let mut drip = "GET / HTTP/1.1\r\nHost: a\r\nX: ".bytes().chain(std::iter::repeat(b'x'));
    let answered = loop {
        if client.tcp.write_all(&[drip.next().expect("endless")]).is_err() {
            break began.elapsed();
        }
        client.tcp.set_nonblocking(true).expect("a socket option");
        let seen = client.tcp.peek(&mut [0]).is_ok();
        client.tcp.set_nonblocking(false).expect("a socket option");
        if seen {
            break began.elapsed();
        }
        assert!(began.elapsed() < DEADLINE, "a dripping head is waited for");
        std::thread::sleep(Duration::from_millis(1));
    };
    assert!(answered < Duration::from_secs(1), "{answered:?}");
    assert!(gateway.client().is_closed(), "a client that says nothing is closed without a word");
    let mut kept = gateway.client();
    assert_eq!(kept.get("/").status, 200);
    assert!(kept.is_closed(), "so is one that has no further request");
    settle(gateway, client);
}

#[test]
fn an_engine_that_falls_silent_is_given_up() {
    let table: [(String, u16, &str); 3] = [
        (String::new(), 502, "timeout"),
        (format!("{SSE_HEAD}{}", chunk("data: 1\n\n")), 200, "timeout answered"),
        (format!("{SSE_HEAD}{}", chunk("data: 1")), 200, "timeout answered"),
    ];
    for (answer, status, outcome) in table {
        let (tell, told) = mpsc::channel();
        let said = answer.clone();
        let engine = Engine::start(move |line| {
            line.request();
            line.write(said.as_bytes());
            line.closed_at();
            tell.send(()).expect("the test listens");
        });
        let patience = Patience { connect_ms: 1000, first_byte_ms: 60, idle_ms: 60 };
        let gateway = Gateway::with(engine.address, Limits::default(), patience);
        let mut client = gateway.client();
        let received = client.post("/", "{}");
        assert_eq!(received.status, status, "{answer:?}");
        let error = received.text().contains("data: {\"error\":");
        assert_eq!(received.clean, status == 502, "{answer:?}: {received:?}");
        assert_eq!(error, answer.ends_with("\n\n\r\n"), "{answer:?}");
        told.recv_timeout(DEADLINE).expect("the engine's connection is closed");
        ended(&gateway, &[outcome]);
        settle(gateway, client);
    }
}

#[test]
fn a_client_that_takes_nothing_is_given_up_and_its_engine_freed() {
    let (tell, told) = mpsc::channel();
    let engine = Engine::start(move |line| {
        line.request();
        flood(line, &AtomicU64::new(0), u64::MAX);
        tell.send(()).expect("the test listens");
    });
    let limits = Limits { write_stall_ms: 1_500, ..Limits::default() };
    // The engine is blocked for longer than it may be silent, and must not be blamed for it.
    let gateway = Gateway::with(engine.address, limits, Patience { idle_ms: 500, ..PATIENT });
    let mut client = gateway.client();
    client.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n");
    told.recv_timeout(DEADLINE).expect("the engine's connection is closed");
    ended(&gateway, &["client gone"]);
    settle(gateway, client);
}

#[test]
fn a_stream_of_the_owners_is_framed_for_its_client() {
    let engine = Engine::answering(JSON);
    let gateway = Gateway::start(engine.address);
    let mut client = gateway.client();
    for _ in 0..2 {
        let answer = client.get("/stream");
        assert_eq!((answer.text().as_str(), answer.clean), ("data: 1\n\ndata: 2\n\n", true));
        assert_eq!(answer.field("transfer-encoding"), Some("chunked"));
    }
    let mut old = gateway.client();
    let answer = old.send("GET /stream HTTP/1.0\r\nConnection: keep-alive\r\n\r\n").receive();
    assert_eq!((answer.text().as_str(), answer.clean), ("data: 1\n\ndata: 2\n\n", true));
    assert_eq!(answer.field("connection"), Some("close"));
    drop(old);
    settle(gateway, client);
}

#[test]
fn a_burst_of_clients_that_come_and_go_leaves_nothing() {
    let engine = Engine::start(|line| {
        while line.request().is_some() {
            line.write(format!("{SSE_HEAD}{}", chunk("data: 1\n\n")).as_bytes());
            line.write(format!("{}0\r\n\r\n", chunk("data: [DONE]\n\n")).as_bytes());
        }
    });
    let gateway = Gateway::start(engine.address);
    for turn in 0..300 {
        let mut client = gateway.client();
        let request = "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n{}";
        client.send(&request[..turn % (request.len() + 1)]);
        match turn % 3 {
            0 => reset_on_close(&client.tcp),
            1 => client.fin(),
            _ => {}
        }
    }
    let mut client = gateway.client();
    assert!(client.post("/", "{}").clean);
    settle(gateway, client);
}
