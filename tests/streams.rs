//! Streams of events through one relay and through two, as where a node's agent stands before its engine:
//! what their bytes, their silences and their broken ends become for the client. Over real sockets.

#[allow(dead_code, reason = "shared with another test, which uses other parts")]
pub(crate) mod relay_support;

use std::io::{Read, Write};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use llama_orch::net::{Limits, Patience};
use relay_support::{Client, DEADLINE, Engine, Gateway, PATIENT, Received, eventually, find, reset_on_close};

const CHUNKED: &str =
    "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n";
const UNTIL_CLOSE: &str = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n\r\n";
const ERROR_EVENT: &[u8] = b"data: {\"error\":{";
/// What the relay puts into silent streams.
const COMMENT: &str = ": keep-alive\n\n";

fn chunk(data: impl AsRef<[u8]>) -> Vec<u8> {
    let data = data.as_ref();
    [format!("{:x}\r\n", data.len()).as_bytes(), data, b"\r\n"].concat()
}

/// A stream of OpenAI's dialect, event by event, `[DONE]` last.
fn dialect(path: &str) -> Vec<String> {
    let event = |text: &str, finish: &str| {
        if path.ends_with("/chat/completions") {
            format!(
                "data: {{\"choices\":[{{\"delta\":{{\"content\":\"{text}\"}},\"finish_reason\":{finish}}}]}}\n\n"
            )
        } else {
            format!("data: {{\"choices\":[{{\"text\":\"{text}\",\"finish_reason\":{finish}}}]}}\n\n")
        }
    };
    vec![
        event("caf\u{e9}", "null"),
        event("\\\"finish_reason\\\":\\\"stop", "null"),
        event("", "\"length\""),
        "data: [DONE]\n\n".to_string(),
    ]
}

/// What a client may see of an engine's answer that was cut.
#[derive(Debug, PartialEq)]
enum End {
    /// A whole answer.
    Clean,
    /// An error event, and no end of the framing behind it.
    Error,
    /// No end of the framing.
    Cut,
}

fn end_of(received: &Received) -> End {
    let error = find(&received.body, ERROR_EVENT).is_some();
    match (received.clean, error) {
        (true, false) => End::Clean,
        (false, true) => End::Error,
        (false, false) => End::Cut,
        (true, true) => panic!("a clean end behind an error event: {received:?}"),
    }
}

/// An engine that dies within its answer: which bytes it still writes is set before each request.
struct Dying {
    engine: Engine,
    said: Arc<Mutex<Vec<u8>>>,
    resets: Arc<AtomicBool>,
}

impl Dying {
    fn start() -> Dying {
        let said = Arc::new(Mutex::new(Vec::new()));
        let resets = Arc::new(AtomicBool::new(false));
        let (says, with_reset) = (said.clone(), resets.clone());
        let engine = Engine::start(move |line| {
            line.request();
            let bytes = says.lock().expect("no panic in the test").clone();
            line.write(&bytes);
            if with_reset.load(Ordering::SeqCst) {
                // What was written must not be lost with the connection: that is another case.
                std::thread::sleep(Duration::from_millis(1));
                reset_on_close(&line.tcp);
            }
        });
        Dying { engine, said, resets }
    }
}

#[test]
fn an_engine_that_dies_at_any_byte_of_a_stream_never_looks_finished() {
    for path in ["/v1/chat/completions", "/v1/completions"] {
        let events = dialect(path);
        for (head, until_close) in [(CHUNKED, false), (UNTIL_CLOSE, true)] {
            for (relays, resets) in [(1, false), (1, true), (2, false)] {
                let dying = Dying::start();
                dying.resets.store(resets, Ordering::SeqCst);
                let agent = Gateway::start(dying.engine.address);
                let plane = (relays == 2).then(|| Gateway::start(agent.address));
                // The whole answer, and where in it an event ends and another may be put in.
                let (mut answer, mut gaps) = (head.as_bytes().to_vec(), vec![head.len()]);
                for event in &events {
                    answer.extend(if until_close { event.clone().into_bytes() } else { chunk(event) });
                    gaps.push(answer.len());
                }
                for end in (head.len().saturating_sub(3)..=answer.len()).rev() {
                    *dying.said.lock().expect("no panic in the engine") = answer[..end].to_vec();
                    let mut client = plane.as_ref().unwrap_or(&agent).client();
                    let received = client.post(path, "{}");
                    let name = format!(
                        "{path} until close: {until_close}, {relays} relays, reset: {resets}, {end} of {}: {:?}",
                        answer.len(),
                        received.text()
                    );
                    if end < head.len() {
                        assert_eq!((received.status, received.clean), (502, true), "{name}");
                        continue;
                    }
                    assert_eq!(received.status, 200, "{name}");
                    let body = received.text();
                    let said_done = body.contains("data: [DONE]");
                    // A reset is never an end, unless all was said before it.
                    let finished = said_done || until_close && !resets && end == gaps[3];
                    let expected = if finished {
                        End::Clean
                    } else if gaps.contains(&end) {
                        End::Error
                    } else {
                        End::Cut
                    };
                    let in_last_chunk = !until_close && said_done && end < answer.len();
                    if in_last_chunk {
                        // Its client has all that it needs; the framing is as broken as the engine's.
                        assert_eq!(end_of(&received), End::Cut, "{name}");
                    } else {
                        assert_eq!(end_of(&received), expected, "{name}");
                    }
                    assert_eq!(
                        body.matches("\"error\"").count(),
                        usize::from(expected == End::Error),
                        "{name}"
                    );
                    let told = received.body.len()
                        - find(&received.body, ERROR_EVENT).unwrap_or(received.body.len());
                    let passed = &received.body[..received.body.len() - told];
                    assert!(events.concat().as_bytes().starts_with(passed), "nothing is made up: {name}");
                    if gaps.contains(&end) {
                        let whole = gaps.iter().position(|gap| *gap == end).expect("one of them");
                        assert_eq!(passed, events[..whole].concat().as_bytes(), "and nothing lost: {name}");
                    }
                    assert!(expected == End::Clean || client.is_closed(), "{name}");
                }
                if let Some(plane) = plane {
                    plane.settle();
                }
                agent.settle();
            }
        }
    }
}

#[test]
fn a_clean_end_of_the_framing_is_no_end_of_a_text_that_did_not_say_so() {
    let error = "data: {\"error\":{\"message\":\"Loading model\"}}\n\n";
    for path in ["/v1/chat/completions", "/v1/completions", "/v1/messages"] {
        let events = dialect(path);
        // What it says, and whether that is all.
        let cases = [
            (String::new(), false),
            (": ping\n\n".to_string(), false),
            (events[..1].concat(), false),
            (events[..2].concat(), false),
            (events[..3].concat(), true),
            (
                format!(
                    "{}data: {{\"choices\":[],\"usage\":{{\"completion_tokens\":2}}}}\n\n",
                    events[..3].concat()
                ),
                true,
            ),
            (events.concat(), true),
            (format!("{}{}", events[0], events[3]), true),
            (format!("{}{error}", events[0]), true),
        ];
        for (said, whole) in cases {
            let whole = whole || path == "/v1/messages";
            for relays in [1, 2] {
                let body = if said.is_empty() { Vec::new() } else { chunk(&said) };
                let answer = [CHUNKED.as_bytes(), &body, b"0\r\n\r\n"].concat();
                // The end of the framing comes in one piece or in two; none of them may be what counts.
                for cut in CHUNKED.len()..=answer.len() {
                    if cut < answer.len().saturating_sub(8).max(CHUNKED.len()) {
                        continue;
                    }
                    let pieces = [answer[..cut].to_vec(), answer[cut..].to_vec()];
                    let engine = Engine::start(move |line| {
                        line.request();
                        line.write(&pieces[0]);
                        std::thread::sleep(Duration::from_millis(2));
                        line.write(&pieces[1]);
                        // The connection stays open, as it does where only the answer is over.
                        line.request();
                    });
                    let agent = Gateway::start(engine.address);
                    let plane = (relays == 2).then(|| Gateway::start(agent.address));
                    let mut client = plane.as_ref().unwrap_or(&agent).client();
                    let received = client.post(path, "{}");
                    let name =
                        format!("{path} {said:?}, {relays} relays, cut at {cut}: {:?}", received.text());
                    assert_eq!((received.status, received.clean), (200, whole), "{name}");
                    if whole {
                        assert_eq!(received.text(), said, "{name}");
                    } else {
                        assert!(received.text().starts_with(&said), "nothing is lost: {name}");
                        let told = received.text().contains("without saying that it is complete");
                        // Nothing fits behind a digit of the last chunk that has passed already.
                        assert!(told || cut >= answer.len() - 5, "{name}");
                        assert!(client.is_closed(), "{name}");
                    }
                    drop(client);
                    if let Some(plane) = plane {
                        plane.settle();
                    }
                    agent.settle();
                }
            }
        }
    }
}

#[test]
fn a_reset_that_overtakes_the_last_bytes_is_no_end_either() {
    let engine = Engine::start(|line| {
        line.request();
        let events = dialect("/v1/completions");
        line.write(&[UNTIL_CLOSE.as_bytes(), events[0].as_bytes()].concat());
        reset_on_close(&line.tcp);
    });
    let gateway = Gateway::start(engine.address);
    for _ in 0..200 {
        let mut client = gateway.client();
        let received = client.post("/v1/completions", "{}");
        assert!(received.status == 502 || !received.clean, "{received:?}");
    }
    gateway.settle();
}

#[test]
fn other_streams_may_end_by_closing() {
    // Only the dialect that says `[DONE]` can be held to it.
    for (path, clean) in [("/v1/messages", true), ("/v1/completions?x=1", false), ("/completion", true)] {
        let engine = Engine::closing(format!("{UNTIL_CLOSE}data: {{\"content\":\"x\"}}\n\n"));
        let gateway = Gateway::start(engine.address);
        let mut client = gateway.client();
        assert_eq!(client.post(path, "{}").clean, clean, "{path}");
        drop(client);
        gateway.settle();
    }
    // Neither can an answer that is no stream.
    let engine = Engine::closing("HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n{\"choices\":[]}");
    let gateway = Gateway::start(engine.address);
    let mut client = gateway.client();
    assert!(client.post("/v1/completions", "{}").clean);
    drop(client);
    gateway.settle();
}

/// Reads until the bytes received so far hold `what`; returns all.
fn read_until(client: &mut Client, got: &mut Vec<u8>, what: &[u8]) {
    let begun = Instant::now();
    while find(got, what).is_none() {
        assert!(begun.elapsed() < DEADLINE, "{:?} in vain in {:?}", what, String::from_utf8_lossy(got));
        let mut buffer = [0; 4096];
        let length = client.tcp.read(&mut buffer).expect("bytes");
        assert!(length > 0, "it closed: {:?}", String::from_utf8_lossy(got));
        got.extend_from_slice(&buffer[..length]);
    }
}

#[test]
fn a_silent_stream_gets_comments_behind_its_head_and_between_events_only() {
    const EVERY_MS: u64 = 40;
    for (head, until_close) in [(CHUNKED, false), (UNTIL_CLOSE, true)] {
        for version in ["1.1", "1.0"] {
            let (go, wait) = mpsc::channel::<()>();
            let wait = Mutex::new(wait);
            let engine = Engine::start(move |line| {
                line.request();
                let wait = wait.lock().expect("one connection");
                let piece = |data: &str| if until_close { data.as_bytes().to_vec() } else { chunk(data) };
                wait.recv_timeout(DEADLINE).expect("the test goes on");
                line.write(head.as_bytes());
                wait.recv_timeout(DEADLINE).expect("the test goes on");
                line.write(&piece("data: 1\n\nda"));
                // A silence within an event, which nobody may break.
                std::thread::sleep(Duration::from_millis(4 * EVERY_MS));
                line.write(&piece("ta: 2\n\n"));
                wait.recv_timeout(DEADLINE).expect("the test goes on");
                line.write(&piece("data: [DONE]\n\n"));
                if !until_close {
                    line.write(b"0\r\n\r\n");
                }
            });
            let limits = Limits { keep_alive_ms: EVERY_MS, ..Limits::default() };
            let gateway = Gateway::with(engine.address, limits, PATIENT);
            let mut client = gateway.client();
            client.send(format!(
                "POST /v1/x HTTP/{version}\r\nHost: a\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{{}}"
            ));
            // Nothing comes before the engine's own head: until then the request may be tried elsewhere.
            client.tcp.set_read_timeout(Some(Duration::from_millis(4 * EVERY_MS))).expect("a socket option");
            let early = client.tcp.read(&mut [0; 16]);
            assert!(early.is_err(), "bytes before the engine's head: {early:?}");
            client.tcp.set_read_timeout(Some(DEADLINE)).expect("a socket option");
            let mut got = Vec::new();
            go.send(()).expect("the engine waits");
            read_until(&mut client, &mut got, COMMENT.as_bytes());
            go.send(()).expect("the engine waits");
            read_until(&mut client, &mut got, b"ta: 2\n\n");
            let event = got.len();
            while find(&got[event..], COMMENT.as_bytes()).is_none() {
                let mut buffer = [0; 4096];
                let length = client.tcp.read(&mut buffer).expect("bytes");
                assert!(length > 0, "it closed");
                got.extend_from_slice(&buffer[..length]);
            }
            go.send(()).expect("the engine waits");
            let mut rest = Vec::new();
            client.tcp.read_to_end(&mut rest).expect("an end");
            got.extend(rest);
            let text = String::from_utf8_lossy(&got).into_owned();
            let body = &text[find(&got, b"\r\n\r\n").expect("a head") + 4..];
            let framed = version == "1.1";
            assert!(!framed || body.ends_with("0\r\n\r\n"), "{text:?}");
            let lines: Vec<&str> = body.split("\r\n").collect();
            let data: String = if framed {
                lines.chunks(2).filter_map(|chunk| chunk.get(1)).copied().collect()
            } else {
                body.to_string()
            };
            // Without the comments, each between two events, it is what the engine wrote.
            let parts: Vec<&str> = data.split(COMMENT).collect();
            let between = |part: &str| part.is_empty() || part.ends_with("\n\n");
            assert!(parts.len() > 2 && parts.iter().all(|part| between(part)), "HTTP/{version}: {text:?}");
            assert_eq!(parts.concat(), "data: 1\n\ndata: 2\n\ndata: [DONE]\n\n", "HTTP/{version}: {text:?}");
            drop(client);
            gateway.settle();
        }
    }
}

#[test]
fn nothing_is_put_into_a_compressed_stream() {
    let head = CHUNKED.replace("\r\n\r\n", "\r\nContent-Encoding: gzip\r\n\r\n");
    // Bytes that would be an event's end if they were text.
    let body = b"\x1f\x8b\x08 some\n\n";
    let engine = Engine::start(move |line| {
        line.request();
        line.write(head.as_bytes());
        std::thread::sleep(Duration::from_millis(60));
        line.write(&chunk(body));
        std::thread::sleep(Duration::from_millis(60));
    });
    let limits = Limits { keep_alive_ms: 10, ..Limits::default() };
    let gateway = Gateway::with(engine.address, limits, PATIENT);
    let mut client = gateway.client();
    let received = client.post("/v1/chat/completions", "{}");
    assert_eq!((received.body.as_slice(), received.clean), (&body[..], false));
    drop(client);
    gateway.settle();
}

#[test]
fn a_long_prompt_may_be_read_behind_the_head_too() {
    const IDLE_MS: u64 = 80;
    let engine = Engine::start(|line| {
        line.request();
        line.write(CHUNKED.as_bytes());
        for _ in 0..2 {
            std::thread::sleep(Duration::from_millis(3 * IDLE_MS));
            line.write(&chunk(":\n\n"));
        }
        std::thread::sleep(Duration::from_millis(3 * IDLE_MS));
        // From here on it may be silent for a short time only.
        line.write(&chunk("data: 1\n\n"));
        line.closed_at();
    });
    let patience = Patience { idle_ms: IDLE_MS, ..PATIENT };
    let agent = Gateway::with(engine.address, Limits::default(), patience);
    let limits = Limits { keep_alive_ms: 60, ..Limits::default() };
    let plane = Gateway::with(agent.address, limits, patience);
    let mut client = plane.client();
    let received = client.post("/v1/chat/completions", "{}");
    let text = received.text().replace(COMMENT, "");
    assert!(text.starts_with(":\n\n:\n\ndata: 1\n\ndata: {\"error\":"), "{received:?}");
    let reason = format!("no byte for {IDLE_MS} ms in the middle of the answer");
    assert!(text.contains(&reason) && !received.clean, "{received:?}");
    assert!(received.text().contains(COMMENT), "the client was kept company meanwhile");
    drop(client);
    plane.settle();
    agent.settle();
}

#[test]
fn answers_that_are_no_streams_of_events_get_no_comments() {
    for head in [
        "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: 9\r\n\r\n",
    ] {
        let is_chunked = head.contains("chunked");
        let engine = Engine::start(move |line| {
            line.request();
            line.write(head.as_bytes());
            std::thread::sleep(Duration::from_millis(100));
            line.write(&if is_chunked { chunk("data: 1\n\n") } else { b"data: 1\n\n".to_vec() });
            if is_chunked {
                line.write(b"0\r\n\r\n");
            }
        });
        let limits = Limits { keep_alive_ms: 10, ..Limits::default() };
        let gateway = Gateway::with(engine.address, limits, PATIENT);
        let mut client = gateway.client();
        let received = client.post("/", "{}");
        assert_eq!((received.text().as_str(), received.clean), ("data: 1\n\n", true), "{head}");
        drop(client);
        gateway.settle();
    }
}

#[test]
fn line_ends_marks_large_events_and_characters_cut_in_two_pass_byte_for_byte() {
    let body: Vec<u8> = [
        "\u{feff}data: bom\n\n".as_bytes(),
        b"data: cr\r\rdata: crlf\r\n\r\nevent: x\rdata: mixed\r\n\n\n\r\n",
        b": comment\n\nid: 7\nretry: 10\n\ndata\n\ndata:\n\n",
        "data: \u{e9}\u{20ac}\u{1f600}\n\n".as_bytes(),
        b"data: \xff\xfe\x00 no text\n\n",
        &[b"data: ".to_vec(), vec![b'x'; 1 << 20], b"\n\n".to_vec()].concat(),
        b"data: [DONE]\n\n",
    ]
    .concat();
    for size in [1, 3, 61, 4_096, 70_000, body.len()] {
        for until_close in [false, true] {
            // A byte a write is enough for the part that is not one large event.
            let small = body.len() - (1 << 20) - 32;
            let pieces: Vec<Vec<u8>> = if size < 100 {
                let mut cut: Vec<Vec<u8>> = body[..small].chunks(size).map(<[u8]>::to_vec).collect();
                cut.push(body[small..].to_vec());
                cut
            } else {
                body.chunks(size).map(<[u8]>::to_vec).collect()
            };
            let framed: Vec<Vec<u8>> = pieces.iter().map(chunk).collect();
            let raw = [framed.concat(), b"0\r\n\r\n".to_vec()].concat();
            let written = if until_close { pieces } else { framed };
            let engine = Engine::start(move |line| {
                line.request();
                line.write(if until_close { UNTIL_CLOSE } else { CHUNKED }.as_bytes());
                written.iter().for_each(|piece| line.write(piece));
                if !until_close {
                    line.write(b"0\r\n\r\n");
                }
            });
            let agent = Gateway::start(engine.address);
            let limits = Limits { keep_alive_ms: 5_000, ..Limits::default() };
            let plane = Gateway::with(agent.address, limits, PATIENT);
            let mut client = plane.client();
            let received = client.post("/v1/chat/completions", "{}");
            assert!(received.clean && received.body == body, "pieces of {size}, until close: {until_close}");
            assert!(until_close || received.raw == raw, "the framing too, in pieces of {size}");
            drop(client);
            plane.settle();
            agent.settle();
        }
    }
}

/// How long each of many small events takes from the engine's write to the client's read, in order of length. An
/// event is written when the one before has been read, so that one that is held back stops all.
fn delays(relays: usize) -> Vec<Duration> {
    const EVENTS: usize = 300;
    let (go, wait) = mpsc::channel::<()>();
    let wait = Mutex::new(wait);
    let written = Arc::new(Mutex::new(Instant::now()));
    let at = written.clone();
    let engine = Engine::start(move |line| {
        line.request();
        line.write(CHUNKED.as_bytes());
        for _ in 0..EVENTS {
            wait.lock().expect("one connection").recv_timeout(DEADLINE).expect("the test goes on");
            *at.lock().expect("no panic in the test") = Instant::now();
            line.write(&chunk("data: x\n\n"));
        }
    });
    let agent = (relays > 0).then(|| Gateway::start(engine.address));
    let plane = agent.as_ref().filter(|_| relays > 1).map(|agent| Gateway::start(agent.address));
    let address = plane.as_ref().or(agent.as_ref()).map_or(engine.address, |gateway| gateway.address);
    let mut client = Client::connect(address);
    client.send("POST /v1/x HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n{}");
    read_until(&mut client, &mut Vec::new(), b"\r\n\r\n");
    let mut took: Vec<Duration> = (0..EVENTS)
        .map(|_| {
            go.send(()).expect("the engine waits");
            read_until(&mut client, &mut Vec::new(), b"data: x\n\n\r\n");
            written.lock().expect("no panic in the engine").elapsed()
        })
        .collect();
    drop(client);
    for gateway in [plane, agent].into_iter().flatten() {
        gateway.settle();
    }
    took.sort_unstable();
    took
}

#[test]
fn small_writes_are_never_held_back() {
    // The machine may be loaded with other tests, so what the sockets alone take is measured beside it; a
    // write that waits for an acknowledgement or for company would take 40 ms, each time.
    let attempts: Vec<(Duration, Duration, Duration)> = (0..5)
        .map(|_| {
            let (direct, through) = (delays(0), delays(2));
            (direct[296], through[150], through[296])
        })
        .take_while(|(direct, median, p99)| {
            *median >= Duration::from_millis(5) || *p99 >= *direct + Duration::from_millis(5)
        })
        .collect();
    assert!(attempts.len() < 5, "direct p99, relayed median and p99: {attempts:?}");
}

#[test]
fn a_client_that_leaves_right_behind_done_was_served() {
    for reset in [false, true] {
        let (tell, told) = mpsc::channel();
        let engine = Engine::start(move |line| {
            line.request();
            line.write(&[CHUNKED.as_bytes(), &chunk("data: [DONE]\n\n")].concat());
            // It owes the end of its framing until the client has left.
            tell.send(line.closed_at()).expect("the test listens");
        });
        let agent = Gateway::start(engine.address);
        let plane = Gateway::start(agent.address);
        let mut client = plane.client();
        client.send("POST /v1/x HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n{}");
        read_until(&mut client, &mut Vec::new(), b"[DONE]\n\n");
        if reset {
            reset_on_close(&client.tcp);
        } else {
            client.fin();
        }
        drop(client);
        told.recv_timeout(DEADLINE).expect("the engine's connection is closed");
        for gateway in [plane, agent] {
            eventually("the exchange ends", || !gateway.outcomes().is_empty());
            assert_eq!(gateway.outcomes(), ["complete 200"], "reset: {reset}");
            gateway.settle();
        }
    }
}

#[test]
fn a_kept_connection_that_closes_at_the_worst_moment_costs_no_request() {
    const REQUESTS: usize = 1_000;
    const ANSWER: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";
    // After each answer the connection is closed: at once, a moment later, or when the next request is
    // there, which is then read and not answered with a single byte.
    let answered = Arc::new(Mutex::new(Vec::new()));
    let log = answered.clone();
    let engine = Engine::start(move |line| {
        let Some(request) = line.request() else { return };
        log.lock().expect("no panic in the test").push(request.body);
        line.write(ANSWER);
        match line.number % 4 {
            0 => {}
            1 => std::thread::sleep(Duration::from_micros(50)),
            2 => std::thread::sleep(Duration::from_micros(300)),
            _ => {
                line.request();
                reset_on_close(&line.tcp);
            }
        }
    });
    let gateway = Gateway::start(engine.address);
    let mut client = gateway.client();
    for turn in 0..REQUESTS {
        let answer = client.post("/", &turn.to_string());
        assert_eq!((answer.status, answer.text().as_str()), (200, "ok"), "request {turn}");
    }
    let expected: Vec<Vec<u8>> = (0..REQUESTS).map(|turn| turn.to_string().into_bytes()).collect();
    assert_eq!(*answered.lock().expect("no panic in the engine"), expected, "each was answered once");
    drop(client);
    gateway.settle();
}

#[test]
fn tokens_of_many_streams_are_on_time_beside_one_that_floods() {
    const STREAMS: usize = 20;
    const EVENTS: usize = 20;
    let engine = Engine::start(|line| {
        while let Some(request) = line.request() {
            line.write(CHUNKED.as_bytes());
            if request.head.starts_with("GET /flood") {
                let piece = chunk(vec![b'x'; 64 * 1024]);
                while line.tcp.write_all(&piece).is_ok() {}
                return;
            }
            for _ in 0..EVENTS {
                line.write(&chunk("data: x\n\n"));
                std::thread::sleep(Duration::from_millis(10));
            }
            line.write(b"0\r\n\r\n");
        }
    });
    let gateway = Gateway::start(engine.address);
    let mut flood = gateway.client();
    flood.send("GET /flood HTTP/1.1\r\nHost: a\r\n\r\n");
    let mut reader = flood.tcp.try_clone().expect("a second handle");
    let (read, total) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let count = read.clone();
    let reading = std::thread::spawn(move || {
        let mut buffer = vec![0; 64 * 1024];
        while let Ok(length @ 1..) = reader.read(&mut buffer) {
            count.fetch_add(length, Ordering::SeqCst);
        }
    });
    eventually("the flood flows", || read.load(Ordering::SeqCst) > 1 << 20);
    std::thread::scope(|scope| {
        for _ in 0..STREAMS {
            let (gateway, total) = (&gateway, &total);
            scope.spawn(move || {
                let begun = Instant::now();
                let received = gateway.client().get("/");
                assert!(received.clean && begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());
                total.fetch_add(received.text().matches("data: x\n\n").count(), Ordering::SeqCst);
            });
        }
    });
    assert_eq!(total.load(Ordering::SeqCst), STREAMS * EVENTS);
    flood.tcp.shutdown(std::net::Shutdown::Both).expect("an open connection");
    reading.join().expect("the reader did not panic");
    drop(flood);
    gateway.settle();
}

#[test]
fn a_stream_goes_on_after_its_reader_paused_with_all_buffers_full() {
    const TOTAL: usize = 48 << 20;
    for until_close in [false, true] {
        let written = Arc::new(AtomicUsize::new(0));
        let count = written.clone();
        let engine = Engine::start(move |line| {
            line.request();
            line.write(if until_close { UNTIL_CLOSE } else { CHUNKED }.as_bytes());
            let piece = if until_close { vec![b'x'; 4096] } else { chunk(vec![b'x'; 4096]) };
            for _ in 0..TOTAL / 4096 {
                line.write(&piece);
                count.fetch_add(4096, Ordering::SeqCst);
            }
            line.write(if until_close { b"\n\n" } else { b"2\r\n\n\n\r\n0\r\n\r\n" });
        });
        let gateway = Gateway::start(engine.address);
        let mut client = gateway.client();
        client.send("POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n{}");
        for _ in 0..3 {
            let (mut last, mut since) = (0, Instant::now());
            eventually("the engine is held back", || {
                let now = written.load(Ordering::SeqCst);
                if now != last {
                    (last, since) = (now, Instant::now());
                }
                last > 0 && since.elapsed() > Duration::from_millis(200)
            });
            // Some of what waits is taken: less than the relay holds, so that the rest lies in the sockets.
            let mut some = vec![0; 32 * 1024];
            client.tcp.read_exact(&mut some).expect("bytes");
        }
        let mut rest = Vec::new();
        client.tcp.set_read_timeout(Some(Duration::from_secs(3))).expect("a socket option");
        let begun = Instant::now();
        while rest.len() < TOTAL - 3 * 32 * 1024 {
            let mut buffer = [0; 64 * 1024];
            let length = client
                .tcp
                .read(&mut buffer)
                .unwrap_or_else(|error| panic!("{error} after {} bytes", rest.len()));
            assert!(length > 0 && begun.elapsed() < Duration::from_secs(20), "{} bytes", rest.len());
            rest.extend_from_slice(&buffer[..length]);
        }
        drop(client);
        gateway.settle();
    }
}
