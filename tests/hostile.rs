//! Hostile peers against real sockets: requests that two servers could read in two ways, judged by what an
//! engine behind a real `orchestratord` receives and by what the client gets; and answers of hostile engines,
//! judged by what the client gets. Both are data, in `hostile/requests.txt` and `hostile/answers.txt`, whose
//! first lines say how they are written.

#[path = "daemons/harness.rs"]
#[allow(dead_code, reason = "shared with other tests, which use other parts")]
mod harness;
#[path = "openai_clients/plane.rs"]
#[allow(dead_code, reason = "shared with another test, which uses other parts")]
mod plane;
#[allow(dead_code, reason = "shared with other tests, which use other parts")]
mod relay_support;

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use plane::Plane;
use relay_support::{Client as RelayClient, Engine, Gateway, find};

/// Payloads that there must be at least.
const REQUESTS_MIN: usize = 150;
const ANSWERS_MIN: usize = 30;
/// What every request means to send.
const JSON: &str = r#"{"model":"m","prompt":"p"}"#;
const POST: &str = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n";
const ENGINE_ANSWER: &[u8] = b"HTTP/1.1 201 Created\r\nContent-Length: 2\r\n\r\n{}";
/// Made for a machine that is much slower than any.
const PATIENCE: Duration = Duration::from_secs(30);

/// One record of a data file.
struct Vector {
    title: String,
    verdict: Vec<String>,
    payload: Vec<u8>,
}

fn vectors(text: &str) -> Vec<Vector> {
    let records = text.split("\n\n").map(str::trim_start).filter(|record| !record.starts_with('#'));
    let vectors = records.map(|record| {
        let mut lines = record.lines();
        let title = lines.next().expect("a title").to_string();
        let verdict = lines.next().and_then(|line| line.strip_prefix("> "));
        let verdict = verdict.unwrap_or_else(|| panic!("{title}: no verdict"));
        Vector {
            verdict: verdict.split(' ').map(str::to_string).collect(),
            payload: bytes_of(&lines.collect::<String>()),
            title,
        }
    });
    vectors.collect()
}

/// The bytes that a payload's text stands for.
fn bytes_of(text: &str) -> Vec<u8> {
    let (mut bytes, mut rest) = (Vec::new(), text);
    while let Some(next) = rest.chars().next() {
        match next {
            '\\' => {
                let escape = rest.as_bytes()[1];
                let used = if escape == b'x' { 4 } else { 2 };
                bytes.push(match escape {
                    b'r' => b'\r',
                    b'n' => b'\n',
                    b't' => b'\t',
                    b'0' => 0,
                    b'\\' => b'\\',
                    b'x' => u8::from_str_radix(&rest[2..4], 16).expect("two hexadecimal digits"),
                    other => panic!("an unknown escape {:?} in {text:?}", char::from(other)),
                });
                rest = &rest[used..];
            }
            '<' => {
                let (name, behind) = rest[1..].split_once('>').expect("a closing bracket");
                bytes.extend(named(name));
                rest = behind;
            }
            _ => {
                bytes.extend(next.to_string().bytes());
                rest = &rest[next.len_utf8()..];
            }
        }
    }
    bytes
}

fn named(name: &str) -> Vec<u8> {
    let length = JSON.len();
    match name {
        "POST" => POST.into(),
        "JSON" => JSON.into(),
        "CHUNKED" => format!("{POST}Transfer-Encoding: chunked\r\n\r\n").into(),
        "SMUGGLED" => format!(
            "POST /v1/completions?smuggled HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n{JSON}"
        )
        .into(),
        repeated => {
            let (count, what) = repeated.split_once('*').expect("a count, a star and a text");
            bytes_of(what).repeat(count.parse().expect("a count"))
        }
    }
}

/// The bytes of one connection.
type Record = Arc<Mutex<Vec<u8>>>;

/// An engine that keeps every byte of every connection on which something else than a probe came.
struct Recorder {
    url: String,
    connections: Arc<Mutex<Vec<Record>>>,
}

impl Recorder {
    fn start() -> Recorder {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let url = format!("http://{}", listener.local_addr().expect("an address"));
        let connections = Arc::new(Mutex::new(Vec::new()));
        let all = connections.clone();
        std::thread::spawn(move || {
            for tcp in listener.incoming().map_while(Result::ok) {
                let record = Arc::new(Mutex::new(Vec::new()));
                all.lock().expect("no panic here").push(record.clone());
                std::thread::spawn(move || answer_all(tcp, &record));
            }
        });
        Recorder { url, connections }
    }

    /// All requests but probes since the last call. Panics where the bytes are not one canonical request
    /// behind the other, with nothing between them or behind the last.
    fn take(&self) -> Vec<Seen> {
        let mut seen = Vec::new();
        for record in self.connections.lock().expect("no panic here").iter() {
            let mut bytes = record.lock().expect("no panic here");
            let mut rest = &bytes[..];
            while !rest.is_empty() {
                let (one, behind) = canonical(rest);
                rest = behind;
                if one.line.starts_with("POST") {
                    seen.push(one);
                }
            }
            bytes.clear();
        }
        seen
    }
}

/// Answers what looks like the end of a request, without having an opinion of its own on where it is: a
/// head, and as many bytes as its first length says.
fn answer_all(mut tcp: TcpStream, record: &Mutex<Vec<u8>>) {
    let (mut unread, mut piece) = (Vec::new(), [0; 16 * 1024]);
    loop {
        let Ok(length @ 1..) = tcp.read(&mut piece) else { return };
        unread.extend_from_slice(&piece[..length]);
        // Recorded before anything is answered, so that whoever has the answer finds the request here.
        record.lock().expect("no panic here").extend_from_slice(&piece[..length]);
        while let Some(end) = find(&unread, b"\r\n\r\n") {
            let head = String::from_utf8_lossy(&unread[..end]).into_owned();
            let body = relay_support::field(&head, "content-length").map_or(0, |n| n.parse().unwrap_or(0));
            if unread.len() < end + 4 + body {
                break;
            }
            unread.drain(..end + 4 + body);
            let answer: &[u8] = match head.split(' ').take(2).collect::<Vec<_>>()[..] {
                ["GET", "/health"] => b"HTTP/1.1 200 OK\r\nContent-Length: 15\r\n\r\n{\"status\":\"ok\"}",
                ["GET", _] => b"HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n\r\n{}",
                _ => ENGINE_ANSWER,
            };
            if tcp.write_all(answer).is_err() {
                return;
            }
        }
    }
}

#[derive(Debug)]
struct Seen {
    line: String,
    body: Vec<u8>,
}

/// The request at the start of `bytes`, held against a grammar that is narrower than HTTP's.
fn canonical(bytes: &[u8]) -> (Seen, &[u8]) {
    let shown = String::from_utf8_lossy(bytes);
    let end =
        find(bytes, b"\r\n\r\n").unwrap_or_else(|| panic!("the engine got a piece of a head: {shown:?}"));
    let mut lines =
        bytes[..end].split(|byte| *byte == b'\n').map(|line| line.strip_suffix(b"\r").unwrap_or(line));
    let line = String::from_utf8(lines.next().expect("split gives one").to_vec()).expect("a line of text");
    let words: Vec<&str> = line.split(' ').collect();
    assert_eq!((words.len(), words.last()), (3, Some(&"HTTP/1.1")), "{shown:?}");
    let mut lengths = Vec::new();
    let mut hosts = 0;
    for field in lines {
        let colon =
            field.iter().position(|byte| *byte == b':').unwrap_or_else(|| panic!("no field: {shown:?}"));
        let (name, value) = (&field[..colon], &field[colon + 1..]);
        let good = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
        assert!(!name.is_empty() && name.iter().all(good), "an odd name: {shown:?}");
        assert!(value.starts_with(b" ") || value.is_empty(), "{shown:?}");
        assert!(value.iter().all(|byte| *byte >= b' ' && *byte != 0x7f), "an odd value: {shown:?}");
        match name.to_ascii_lowercase().as_slice() {
            b"content-length" => lengths.push(value.trim_ascii().to_vec()),
            b"host" => hosts += 1,
            b"transfer-encoding"
            | b"te"
            | b"trailer"
            | b"upgrade"
            | b"expect"
            | b"keep-alive"
            | b"proxy-connection"
            | b"proxy-authorization"
            | b"x-smuggled-field" => {
                panic!("a field of one connection was passed on: {shown:?}")
            }
            _ => {}
        }
    }
    assert_eq!(hosts, 1, "{shown:?}");
    assert!(lengths.len() <= 1, "{shown:?}");
    let length = lengths.first().map_or(0, |length| {
        let text = String::from_utf8_lossy(length).into_owned();
        let number: usize = text.parse().expect("a length");
        assert_eq!(number.to_string(), text, "a length in its plain form: {shown:?}");
        number
    });
    let body = bytes.get(end + 4..end + 4 + length).unwrap_or_else(|| panic!("half a body: {shown:?}"));
    (Seen { line, body: body.to_vec() }, &bytes[end + 4 + length..])
}

/// What a client gets: whole answers by their framing, and whether the connection ended behind them.
struct Client {
    tcp: TcpStream,
    unread: Vec<u8>,
}

impl Client {
    fn connect(port: u16) -> Client {
        let tcp = TcpStream::connect(("127.0.0.1", port)).expect("the daemon listens");
        tcp.set_nodelay(true).expect("a socket option");
        tcp.set_read_timeout(Some(PATIENCE)).expect("a socket option");
        Client { tcp, unread: Vec::new() }
    }

    /// Writes until all is written or nobody takes it any more.
    fn send(&mut self, bytes: &[u8]) {
        let _ = self.tcp.write_all(bytes);
    }

    /// The next answer's status, or what is there instead: `close` at the connection's end, `silence`.
    /// Panics if the answer is ambiguous.
    fn status(&mut self) -> Result<u16, &'static str> {
        let end = loop {
            if let Some(end) = find(&self.unread, b"\r\n\r\n") {
                break end;
            }
            match self.more() {
                Some(true) => {}
                Some(false) => {
                    let rest = String::from_utf8_lossy(&self.unread).into_owned();
                    assert!(rest.is_empty(), "the connection ended inside an answer: {rest:?}");
                    return Err("close");
                }
                None => return Err("silence"),
            }
        };
        let head = String::from_utf8(self.unread[..end].to_vec()).expect("a head of text");
        let status = head[9..12].parse().expect("a status");
        let lower = head.to_ascii_lowercase();
        let lengths: Vec<&str> =
            lower.lines().filter_map(|line| line.strip_prefix("content-length: ")).collect();
        assert!(!lower.contains("transfer-encoding"), "an answer of a known length is asked for: {head}");
        assert_eq!(lengths.len(), usize::from(status >= 200 && status != 204), "{head}");
        let length: usize = lengths.first().map_or(0, |length| length.parse().expect("a length"));
        while self.unread.len() < end + 4 + length {
            assert!(self.more() == Some(true), "the connection ended inside a body: {head}");
        }
        self.unread.drain(..end + 4 + length);
        Ok(status)
    }

    /// Reads once: whether bytes came, or `None` if neither they nor an end did in time.
    fn more(&mut self) -> Option<bool> {
        let mut piece = [0; 16 * 1024];
        match self.tcp.read(&mut piece) {
            Ok(length) => {
                self.unread.extend_from_slice(&piece[..length]);
                Some(length > 0)
            }
            Err(error) if error.kind() == ErrorKind::ConnectionReset => Some(false),
            Err(_) => None,
        }
    }
}

/// How a payload's bytes are sent.
#[derive(Clone, Copy, Debug)]
enum Cut {
    Whole,
    At(usize),
    Single,
}

/// Sends a payload and says what became of it, in the verdict's words, and what the engine saw.
fn judge(port: u16, recorder: &Recorder, vector: &Vector, cut: Cut) -> (Vec<String>, Vec<Seen>) {
    let mut client = Client::connect(port);
    match cut {
        Cut::Whole => client.send(&vector.payload),
        Cut::At(at) => {
            client.send(&vector.payload[..at]);
            // Gives the daemon a chance to see the pieces apart; nothing depends on it.
            std::thread::yield_now();
            client.send(&vector.payload[at..]);
        }
        Cut::Single => vector.payload.iter().for_each(|byte| client.send(&[*byte])),
    }
    let mut found = Vec::new();
    let statuses = vector.verdict.len() - 1;
    let ends = match vector.verdict.last().map(String::as_str) {
        Some("eof") => {
            client.tcp.shutdown(Shutdown::Write).expect("an open connection");
            "eof"
        }
        Some("open") => "open",
        _ => "close",
    };
    while found.len() < statuses || ends != "open" {
        match client.status() {
            Ok(status) => found.push(status.to_string()),
            Err(end) => {
                found.push(if (ends, end) == ("eof", "close") { "eof" } else { end }.to_string());
                return (found, recorder.take());
            }
        }
    }
    let seen = recorder.take();
    client.send(format!("{POST}Content-Length: {}\r\n\r\n{JSON}", JSON.len()).as_bytes());
    let still = client.status() == Ok(201) && recorder.take().len() == 1;
    found.push(if still { "open" } else { "not in step" }.to_string());
    (found, seen)
}

#[test]
fn an_engine_gets_one_canonical_request_or_nothing() {
    let vectors = vectors(include_str!("hostile/requests.txt"));
    assert!(vectors.len() >= REQUESTS_MIN, "{} payloads", vectors.len());
    let recorder = Recorder::start();
    let plane = Plane::start(false, &[("ORCHESTRATORD_MAX_BODY_MIB", "1")]);
    plane.announce("m", &recorder.url, 4);
    plane.until_routable(1);
    let mut wrong = Vec::new();
    for vector in &vectors {
        let length = vector.payload.len();
        let mut cuts = vec![Cut::Whole];
        if length < 2_000 {
            cuts.extend([Cut::Single, Cut::At(length / 3), Cut::At(length / 2), Cut::At(length - 1)]);
        }
        for cut in cuts {
            let (found, seen) = judge(plane.port, &recorder, vector, cut);
            let served = vector.verdict.iter().filter(|word| *word == "201").count();
            let as_meant = seen.len() == served
                && seen.iter().all(|one| {
                    one.line.starts_with("POST /v1/completions")
                        && !one.line.contains("smuggled")
                        && one.body == JSON.as_bytes()
                });
            if found != vector.verdict || !as_meant {
                wrong.push(format!(
                    "{}, {cut:?}: {found:?} instead of {:?}; the engine saw {seen:?}",
                    vector.title, vector.verdict
                ));
                break;
            }
        }
    }
    assert!(wrong.is_empty(), "{} of {}: {wrong:#?}", wrong.len(), vectors.len());
}

/// What the engines' side of the second test answers when it means well.
const GOOD: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\ngood";

/// The client's answer in the verdict's words. Panics where two clients could read it in two ways.
/// Also says whether the connection ends behind it.
fn received(client: &mut RelayClient) -> (String, bool) {
    let got = client.receive();
    if got.status == 0 {
        return ("nothing".into(), true);
    }
    let lower = got.head.to_ascii_lowercase();
    let count = |name: &str| lower.lines().filter(|line| line.starts_with(&format!("{name}:"))).count();
    assert!(count("content-length") + count("transfer-encoding") <= 1, "{}", got.head);
    assert!(!lower.replace("\r\n", "").contains(['\r', '\n', '\0']), "{:?}", got.head);
    for name in ["trailer", "upgrade", "keep-alive", "proxy-authenticate"] {
        assert_eq!(count(name), 0, "a field of one connection was passed on: {}", got.head);
    }
    let text = match (got.clean, got.status) {
        (false, status) => format!("{status} cut"),
        (true, 200) => format!("200 {}", got.text()).trim_end().to_string(),
        (true, status) => status.to_string(),
    };
    (text, !got.clean || lower.contains("connection: close"))
}

#[test]
fn a_client_never_gets_an_ambiguous_answer() {
    let vectors = vectors(include_str!("hostile/answers.txt"));
    assert!(vectors.len() >= ANSWERS_MIN, "{} payloads", vectors.len());
    let mut wrong = Vec::new();
    for vector in &vectors {
        let payload = vector.payload.clone();
        let (closes, payload) = match payload.strip_suffix(b"CLOSE") {
            Some(before) => (true, before.to_vec()),
            None => (false, payload),
        };
        let engine = Engine::start(move |line| {
            if line.number == 0 && line.request().is_some() {
                line.write(&payload);
                if closes {
                    return;
                }
            }
            while line.request().is_some() {
                line.write(GOOD);
            }
        });
        let gateway = Gateway::start(engine.address);
        let mut client = gateway.client();
        client.send("GET /x HTTP/1.1\r\nHost: localhost\r\n\r\n");
        let (found, ends) = received(&mut client);
        let mut next = if ends { gateway.client() } else { client };
        next.send("GET /y HTTP/1.1\r\nHost: localhost\r\n\r\n");
        let (behind, _) = received(&mut next);
        if found != vector.verdict.join(" ") || behind != "200 good" {
            wrong.push(format!(
                "{}: {found:?} instead of {:?}, then {behind:?}",
                vector.title,
                vector.verdict.join(" ")
            ));
        }
    }
    assert!(wrong.is_empty(), "{} of {}: {wrong:#?}", wrong.len(), vectors.len());
}

#[test]
fn a_circle_of_control_planes_is_refused_at_the_second() {
    for cloud in [false, true] {
        let plane = Plane::start(cloud, &[]);
        // It takes itself for an engine, in the CLOUD profile by way of its node's agent. Its own address is
        // refused by that name, so another stands between: all bytes pass through it unchanged.
        let through = pipe_to(plane.port);
        plane.announce("m", &format!("http://127.0.0.1:{through}"), 8);
        plane.until_routable(1);
        let answer = harness::post(plane.port, "/v1/completions", JSON);
        assert_eq!(
            (answer.status, answer.json()["error"]["code"].as_str()),
            (508, Some("loop")),
            "{answer:?}"
        );
    }
}

/// A port whose connections are joined to another's.
fn pipe_to(port: u16) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let own = listener.local_addr().expect("an address").port();
    std::thread::spawn(move || {
        for near in listener.incoming().map_while(Result::ok) {
            let Ok(far) = TcpStream::connect(("127.0.0.1", port)) else { continue };
            let copies = [(near.try_clone(), far.try_clone()), (Ok(far), Ok(near))];
            for (from, to) in copies {
                let (mut from, mut to) = (from.expect("a descriptor"), to.expect("a descriptor"));
                std::thread::spawn(move || {
                    let _ = std::io::copy(&mut from, &mut to);
                    let _ = to.shutdown(Shutdown::Write);
                });
            }
        }
    });
    own
}
