//! `llorch demo-engine`: a demonstration engine, a process of its own. **It holds no model.**
//!
//! It has the manners of llama-server, or of another engine that `--dialect` names, so that the daemons
//! can be tried, tested and measured on a machine without GPU and model: a start that takes its time,
//! slots that fill up and make further requests wait in silence, answers streamed at a set pace, a
//! disconnect that frees its slot, an API key, and, as long as a file exists, a hang. What it says is the
//! prompt's own words, shuffled, behind the marker `[demo]`, and its pages say what it is: nobody should
//! take it for a model.
//!
//! One thread a connection, blocking sockets. A signal ends the process at once. `http` moves bytes,
//! `dialect` decides what is answered, `answers` what is said, and this file has the state (slots, start
//! of the process, key) and the pace.

use std::ffi::OsString;
use std::io::{self, Write};
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};
use subtle::ConstantTimeEq;

use crate::replicas::probe;
use crate::settings::{Exit, Setting, Settings, flag, number};
use answers::{Answer, Ask, Endpoint, Progress, Refusal, error_body};
use dialect::{About, Dialect, Reply};
use http::{Connection, Ended, Request};

mod answers;
mod dialect;
mod http;

/// Most connections at a time, each with its thread; the next one is answered 503 and closed.
const CONNECTIONS_MAX: usize = 256;
/// Stack of a connection's thread, in bytes: JSON of the deepest nesting allowed fits many times.
const STACK_BYTES: usize = 512 * 1024;
/// How often a request that waits for a slot or for its next token looks whether its client is there.
const CLIENT_CHECK: Duration = Duration::from_millis(20);
/// Lag from which the pace starts anew instead of catching up, as after a client that did not read.
const LAG_MAX: Duration = Duration::from_millis(100);
/// Pause after an accept that failed, mostly for lack of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// Connections that the kernel holds until they are accepted.
const BACKLOG: i32 = 128;

pub(super) static TABLE: &[Setting] = &[
    flag("port", None, "PORT", "Port to listen on; 0 takes a free one"),
    flag("host", Some("127.0.0.1"), "IP", "Address to listen on"),
    flag("slots", Some("4"), "N", "Requests served at once, 1 to 256; further ones wait"),
    flag("tokens-per-second", Some("50"), "N", "Pace of one answer; 0 is as fast as possible"),
    flag("prefill-ms", Some("20"), "MS", "Time from a slot to the first token, 0 to 600000 milliseconds"),
    flag("load-ms", Some("0"), "MS", "Time after the start in which it loads"),
    flag("ctx", Some("4096"), "TOKENS", "Context size in words, 16 to 1048576"),
    flag("model", Some("llorch-demo"), "NAME", "Model name that is shown"),
    flag("dialect", Some("llamacpp"), "NAME", "Whose manners it has: llamacpp, vllm, sglang, tgi or openai"),
    flag("api-key-file", None, "FILE", "File whose first line is the key that it wants to see"),
    flag("hang-while", None, "FILE", "Produces nothing, and stays healthy, while this file exists"),
];

/// Serves until a signal ends the process; `args` are those behind `demo-engine`.
///
/// # Errors
/// [`Exit`] for settings that are not usable and an address that cannot be listened on.
pub fn run(args: Vec<OsString>) -> Result<(), Exit> {
    let settings = Settings::read(
        "llorch demo-engine",
        "A demonstration engine without a model: speaks engines' APIs, answers with the prompt's words",
        TABLE,
        None,
        args,
        |_| None,
    )?;
    let host = settings.need("host", |text| {
        text.parse::<IpAddr>().map_err(|_| "allowed is an IP address such as 127.0.0.1".to_string())
    })?;
    let port = settings.need("port", number(0, u16::MAX.into()))?;
    let address = SocketAddr::new(host, u16::try_from(port).unwrap_or_default());
    let slots = usize::try_from(settings.need("slots", number(1, 256))?).unwrap_or(1);
    let tokens_per_second = settings.need("tokens-per-second", number(0, 1_000_000))?;
    let engine = Engine {
        slots: Slots { busy: Mutex::new(vec![false; slots]), freed: Condvar::new() },
        gap: Duration::from_nanos(1_000_000_000u64.checked_div(tokens_per_second).unwrap_or(0)),
        prefill: Duration::from_millis(settings.need("prefill-ms", number(0, 600_000))?),
        ready_at: Instant::now() + Duration::from_millis(settings.need("load-ms", number(0, 86_400_000))?),
        context: settings.need("ctx", number(16, 1 << 20))?,
        model: settings.need("model", |text| Ok(text.to_string()))?,
        dialect: settings.need("dialect", Dialect::named)?,
        key: settings.get("api-key-file", probe::read_key)?,
        hang_while: settings.get("hang-while", |text| Ok(PathBuf::from(text)))?,
    };
    let cannot = |error| Exit::runtime(format!("cannot listen on {address}: {error}"));
    let bound = bind(address).map_err(cannot)?;
    if !engine.dialect.listens_while_loading() {
        // Who connects meanwhile is refused, and an address that cannot be had was told at once.
        thread::sleep(engine.ready_at.saturating_duration_since(Instant::now()));
    }
    let listener = bound.listen().map_err(cannot)?;
    let address = listener.local_addr().unwrap_or(address);
    let _ = writeln!(io::stdout(), "demonstration engine (no model) listening on http://{address}");
    accept(&listener, &Arc::new(engine))
}

/// A socket that has its port and does not listen yet.
struct Bound(OwnedFd);

fn bind(address: SocketAddr) -> io::Result<Bound> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let socket = rustix::net::socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    // As the standard library does: the port of an engine that just ended can be taken again.
    sockopt::set_socket_reuseaddr(&socket, true)?;
    rustix::net::bind(&socket, &address)?;
    Ok(Bound(socket))
}

impl Bound {
    fn listen(self) -> io::Result<TcpListener> {
        rustix::net::listen(&self.0, BACKLOG)?;
        Ok(TcpListener::from(self.0))
    }
}

fn accept(listener: &TcpListener, engine: &Arc<Engine>) -> ! {
    // Every connection's thread holds one more reference to this.
    let open = Arc::new(());
    loop {
        let Ok((stream, _)) = listener.accept() else {
            thread::sleep(ACCEPT_PAUSE);
            continue;
        };
        let Ok(mut connection) = Connection::new(stream) else { continue };
        if Arc::strong_count(&open) > CONNECTIONS_MAX {
            let body = error_body(503, "unavailable_error", "Too many connections");
            let _ = connection.respond(503, &body, false);
            continue;
        }
        let (engine, held) = (Arc::clone(engine), Arc::clone(&open));
        let serve = move || {
            engine.serve(&mut connection);
            drop(held);
        };
        if thread::Builder::new().stack_size(STACK_BYTES).spawn(serve).is_err() {
            thread::sleep(ACCEPT_PAUSE);
        }
    }
}

struct Engine {
    slots: Slots,
    /// Between two tokens of one answer.
    gap: Duration,
    prefill: Duration,
    ready_at: Instant,
    /// In words, prompt and answer together.
    context: u64,
    model: String,
    dialect: Dialect,
    /// What an `Authorization: Bearer` has to show.
    key: Option<String>,
    /// While this file exists nothing is produced.
    hang_while: Option<PathBuf>,
}

impl Engine {
    fn serve(&self, connection: &mut Connection) {
        loop {
            match connection.read_request() {
                Ok(request) => {
                    if !self.answer(connection, &request).unwrap_or(false) {
                        return;
                    }
                }
                Err(Ended::Refused(status, reason)) => {
                    let body = error_body(status, "invalid_request_error", reason);
                    if connection.respond(status, &body, false).is_ok() {
                        connection.linger();
                    }
                    return;
                }
                Err(Ended::Closed) => return,
            }
        }
    }

    /// Whether the connection goes on. An error means that the client has left.
    fn answer(&self, connection: &mut Connection, request: &Request) -> io::Result<bool> {
        let reply = {
            let busy = self.slots.lock();
            let about = About { model: &self.model, context: self.context, busy: &busy, now_s: unix_s() };
            let (asked, is_loading) = ((&*request.method, &*request.path), Instant::now() < self.ready_at);
            self.dialect.reply(asked, is_loading, self.is_authorized(request), &about)
        };
        let generated = match reply {
            Reply::Now(status, body) => return connection.respond(status, &body, request.keep_alive),
            Reply::Empty(status, after) => {
                pace(connection, Instant::now() + after)?;
                return connection.respond_empty(status, request.keep_alive);
            }
            Reply::Generate(endpoint) => self.generate(connection, request, endpoint),
            Reply::Embed => self.embed(connection, request),
        };
        match generated {
            Ok(goes_on) => Ok(goes_on),
            Err(Refused::By(Refusal { status, kind, message })) => {
                connection.respond(status, &error_body(status, kind, &message), request.keep_alive)
            }
            Err(Refused::Left(error)) => Err(error),
        }
    }

    fn is_authorized(&self, request: &Request) -> bool {
        let Some(key) = &self.key else { return true };
        let shown = request.authorization.as_deref().and_then(|value| value.strip_prefix("Bearer "));
        shown.is_some_and(|shown| bool::from(shown.as_bytes().ct_eq(key.as_bytes())))
    }

    fn generate(
        &self,
        connection: &mut Connection,
        request: &Request,
        endpoint: Endpoint,
    ) -> Result<bool, Refused> {
        let ask = Ask::read(endpoint, &request.body, self.context, &self.model)?;
        let slot = self.slot(connection)?;
        self.produce(connection, self.ready_at)?;
        let answer = Answer::new(ask, slot.id, answer_id(), unix_s());
        let started = Instant::now();
        if answer.ask.stream {
            connection.start_stream()?;
            if let Some(event) = answer.opening() {
                connection.write_chunk(&event)?;
            }
        }
        let mut due = started + self.prefill;
        self.produce(connection, due)?;
        let first_token = Instant::now();
        let mut text = String::new();
        for index in 0..answer.ask.tokens {
            if index > 0 {
                due = (due + self.gap).max(Instant::now().checked_sub(LAG_MAX).unwrap_or(due));
                self.produce(connection, due)?;
            }
            let token = answer.token(index);
            if answer.ask.stream {
                connection.write_chunk(&answer.token_event(index, &token))?;
            } else {
                text.push_str(&token);
            }
        }
        let progress = Progress {
            prompt_ms: first_token.duration_since(started).as_secs_f64() * 1e3,
            predicted_ms: first_token.elapsed().as_secs_f64() * 1e3,
        };
        if answer.ask.stream {
            // The slot is free by the time that the client knows of the end.
            drop(slot);
            connection.write_chunk(&answer.closing(&progress))?;
            connection.end_stream()?;
            // As llama-server does after a stream, though it says so beforehand.
            return Ok(false);
        }
        drop(slot);
        Ok(connection.respond(200, &answer.whole(&text, &progress), request.keep_alive)?)
    }

    fn embed(&self, connection: &mut Connection, request: &Request) -> Result<bool, Refused> {
        let body = answers::embeddings(&request.body, self.context, &self.model)?;
        let slot = self.slot(connection)?;
        self.produce(connection, self.ready_at.max(Instant::now() + self.prefill))?;
        drop(slot);
        Ok(connection.respond(200, &body, request.keep_alive)?)
    }

    /// A slot; where all are busy, after a wait or not at all.
    fn slot(&self, connection: &Connection) -> Result<Slot<'_>, Refused> {
        match self.slots.try_take() {
            Some(slot) => Ok(slot),
            None if self.dialect.refuses_when_full() => Err(Refused::By(Refusal::overloaded())),
            None => Ok(self.slots.take(connection)?),
        }
    }

    /// Time passes until `due`, and on for as long as the engine hangs.
    fn produce(&self, connection: &Connection, due: Instant) -> io::Result<()> {
        pace(connection, due)?;
        while self.hang_while.as_ref().is_some_and(|file| file.exists()) {
            pace(connection, Instant::now() + CLIENT_CHECK)?;
        }
        Ok(())
    }
}

/// Why a request got no answer.
enum Refused {
    By(Refusal),
    /// The client did not wait for it.
    Left(io::Error),
}

impl From<Refusal> for Refused {
    fn from(refusal: Refusal) -> Refused {
        Refused::By(refusal)
    }
}

impl From<io::Error> for Refused {
    fn from(error: io::Error) -> Refused {
        Refused::Left(error)
    }
}

/// Sleeps until `due`, with an eye on the client.
fn pace(connection: &Connection, due: Instant) -> io::Result<()> {
    loop {
        connection.check_client()?;
        let left = due.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(());
        }
        thread::sleep(left.min(CLIENT_CHECK));
    }
}

/// What is served at once. Who finds none free waits, in no particular order, as long as its client
/// does; the bound on connections bounds the waiters.
struct Slots {
    busy: Mutex<Vec<bool>>,
    freed: Condvar,
}

/// A slot that is taken; dropping it frees it.
struct Slot<'a> {
    slots: &'a Slots,
    id: usize,
}

impl Slots {
    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<bool>> {
        self.busy.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn try_take(&self) -> Option<Slot<'_>> {
        self.claim(&mut self.lock())
    }

    fn claim(&self, busy: &mut [bool]) -> Option<Slot<'_>> {
        let id = busy.iter().position(|busy| !busy)?;
        busy[id] = true;
        Some(Slot { slots: self, id })
    }

    fn take(&self, connection: &Connection) -> io::Result<Slot<'_>> {
        let mut busy = self.lock();
        loop {
            if let Some(slot) = self.claim(&mut busy) {
                return Ok(slot);
            }
            let waited = self.freed.wait_timeout(busy, CLIENT_CHECK);
            busy = waited.unwrap_or_else(PoisonError::into_inner).0;
            connection.check_client()?;
        }
    }
}

impl Drop for Slot<'_> {
    fn drop(&mut self) {
        self.slots.lock()[self.id] = false;
        self.slots.freed.notify_one();
    }
}

fn unix_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

fn answer_id() -> String {
    format!("{:032x}", fastrand::u128(..))
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Read};
    use std::net::TcpStream;

    use super::*;

    /// A served engine with one slot, as fast as `gap` lets it; its thread ends with the tests.
    fn start(gap: Duration, load: Duration) -> (SocketAddr, Arc<Engine>) {
        start_with(|engine| {
            engine.gap = gap;
            engine.ready_at = Instant::now() + load;
        })
    }

    fn start_with(change: impl FnOnce(&mut Engine)) -> (SocketAddr, Arc<Engine>) {
        let mut engine = Engine {
            slots: Slots { busy: Mutex::new(vec![false]), freed: Condvar::new() },
            gap: Duration::ZERO,
            prefill: Duration::ZERO,
            ready_at: Instant::now(),
            context: 4096,
            model: "m".into(),
            dialect: Dialect::LlamaCpp,
            key: None,
            hang_while: None,
        };
        change(&mut engine);
        let engine = Arc::new(engine);
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("a bound socket");
        let served = Arc::clone(&engine);
        thread::spawn(move || accept(&listener, &served));
        (address, engine)
    }

    fn post(path: &str, body: &str) -> String {
        format!("POST {path} HTTP/1.1\r\nHost: h\r\nContent-Length: {}\r\n\r\n{body}", body.len())
    }

    fn dial(address: SocketAddr, bytes: &str) -> BufReader<TcpStream> {
        let mut stream = TcpStream::connect(address).expect("it listens");
        stream.set_read_timeout(Some(Duration::from_secs(20))).expect("a usable timeout");
        stream.write_all(bytes.as_bytes()).expect("it reads");
        BufReader::new(stream)
    }

    /// One answer with a length: its status and its body.
    fn answer(stream: &mut BufReader<TcpStream>) -> (String, String) {
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            assert_ne!(stream.read_line(&mut head).expect("an answer"), 0, "closed after {head:?}");
        }
        let length = head.lines().find_map(|line| line.strip_prefix("Content-Length: ")).expect("a length");
        let mut body = vec![0; length.parse().expect("a number")];
        stream.read_exact(&mut body).expect("the whole body");
        (head[9..12].to_string(), String::from_utf8(body).expect("UTF-8"))
    }

    #[test]
    fn a_client_that_leaves_frees_the_slot_for_the_one_that_waits() {
        let (address, engine) = start(Duration::from_secs(3600), Duration::ZERO);
        let mut first = dial(address, &post("/completion", r#"{"prompt":"a","stream":true}"#));
        let mut line = String::new();
        first.read_line(&mut line).expect("the stream begins");
        assert_eq!(engine.slots.lock()[..], [true]);
        let mut second = dial(address, &post("/completion", r#"{"prompt":"b","n_predict":1}"#));
        second.get_ref().set_read_timeout(Some(Duration::from_millis(100))).expect("a usable timeout");
        assert!(second.read_line(&mut line).is_err(), "it was not told to wait: {line}");
        second.get_ref().set_read_timeout(Some(Duration::from_secs(20))).expect("a usable timeout");
        drop(first);
        let (status, body) = answer(&mut second);
        assert_eq!(status, "200");
        assert!(body.contains(r#""content":"[demo]""#), "{body}");
    }

    #[test]
    fn a_stream_is_one_event_a_token_and_ends_cleanly() {
        let (address, _) = start(Duration::ZERO, Duration::ZERO);
        let ask = r#"{"messages":[{"content":"a b"}],"max_tokens":3,"stream":true}"#;
        let mut stream = dial(address, &post("/v1/chat/completions", ask));
        let mut text = String::new();
        stream.read_to_string(&mut text).expect("it closes after a stream");
        assert_eq!(text.matches("data: {").count(), 5, "role, three tokens, finish: {text}");
        assert!(text.contains(r#""content":"[demo]""#) && text.contains(r#""finish_reason":"length""#));
        assert!(text.ends_with("data: [DONE]\n\n\r\n0\r\n\r\n"), "{text}");
    }

    #[test]
    fn requests_on_one_connection_are_answered_in_turn_however_their_bodies_come() {
        let (address, _) = start(Duration::ZERO, Duration::ZERO);
        let chunked = "POST /completion HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n\
            7\r\n{\"promp\r\n5;x=y\r\nt\":\"a\r\n12\r\n b\",\"n_predict\":2}\r\n0\r\nTrailer: x\r\n\r\n";
        let plain = post("/v1/embeddings", r#"{"input":"a"}"#);
        let mut stream = dial(address, &format!("{chunked}{plain}GET /health?x HTTP/1.1\r\nHost: h\r\n\r\n"));
        for expected in [r#""tokens_evaluated":2"#, r#""object":"embedding""#, r#"{"status":"ok"}"#] {
            let (status, body) = answer(&mut stream);
            assert!(status == "200" && body.contains(expected), "{expected}: {status} {body}");
        }
    }

    #[test]
    fn while_it_loads_every_path_says_so() {
        let (address, _) = start(Duration::ZERO, Duration::from_secs(3600));
        let mut stream =
            dial(address, &format!("GET /health HTTP/1.1\r\nHost: h\r\n\r\n{}", post("/x", "{}")));
        for _ in 0..2 {
            let (status, body) = answer(&mut stream);
            assert_eq!(status, "503");
            assert_eq!(body, error_body(503, "unavailable_error", "Loading model").to_string());
        }
    }

    #[test]
    fn a_bound_port_refuses_until_it_is_listened_on() {
        let bound = bind(SocketAddr::from(([127, 0, 0, 1], 0))).expect("a free port");
        let address = SocketAddr::try_from(rustix::net::getsockname(&bound.0).expect("an address"));
        let address = address.expect("an IP address");
        let refused = TcpStream::connect(address).expect_err("nobody listens");
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
        let listener = bound.listen().expect("it listens");
        TcpStream::connect(address).expect("it listens");
        listener.accept().expect("a connection");
        assert!(bind(address).is_err(), "it is taken");
    }

    #[test]
    fn while_the_file_exists_nothing_is_produced_and_afterwards_it_goes_on() {
        let directory = tempfile::tempdir().expect("a directory");
        let file = directory.path().join("hang");
        let (address, _) = start_with(|engine| engine.hang_while = Some(file.clone()));
        std::fs::write(&file, "").expect("written");
        let ask = r#"{"prompt":"a","n_predict":1}"#;
        let mut hung = dial(address, &post("/v1/completions", ask));
        let mut healthy = dial(address, "GET /health HTTP/1.1\r\nHost: h\r\n\r\n");
        assert_eq!(answer(&mut healthy).0, "200");
        hung.get_ref().set_read_timeout(Some(Duration::from_millis(100))).expect("a usable timeout");
        assert!(hung.fill_buf().is_err(), "not even a head");
        std::fs::remove_file(&file).expect("removed");
        hung.get_ref().set_read_timeout(Some(Duration::from_secs(20))).expect("a usable timeout");
        assert_eq!(answer(&mut hung).0, "200");
    }

    #[test]
    fn the_key_is_wanted_in_full() {
        let (address, _) = start_with(|engine| engine.key = Some("sk-1".into()));
        for (shown, expected) in [
            ("Authorization: Bearer sk-1\r\n", "200"),
            ("authorization: Bearer sk-1 \r\n", "200"),
            ("Authorization: Bearer sk-\r\n", "401"),
            ("Authorization: Bearer sk-11\r\n", "401"),
            ("Authorization: sk-1\r\n", "401"),
            ("", "401"),
        ] {
            let ask = format!("GET /props HTTP/1.1\r\nHost: h\r\n{shown}\r\n");
            assert_eq!(answer(&mut dial(address, &ask)).0, expected, "{shown}");
        }
    }

    #[test]
    fn tgi_refuses_what_it_has_no_slot_for() {
        let (address, engine) = start_with(|engine| engine.dialect = Dialect::Tgi);
        let _busy = engine.slots.try_take().expect("a free slot");
        let mut refused = dial(address, &post("/v1/completions", r#"{"prompt":"a"}"#));
        assert_eq!(answer(&mut refused).0, "429");
    }

    #[test]
    fn broken_requests_get_their_reason_and_the_connection_closes() {
        let (address, _) = start(Duration::ZERO, Duration::ZERO);
        let long = format!("GET / HTTP/1.1\r\nHost: h\r\nX: {}", "x".repeat(17_000));
        let chunked = "POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n";
        for (bytes, expected) in [
            ("NOT HTTP\r\n\r\n".to_string(), "400"),
            ("GET / HTTP/1.1\r\n\r\n".to_string(), "400"),
            ("POST / HTTP/1.1\r\nHost: h\r\nContent-Length: +5\r\n\r\n".to_string(), "400"),
            (
                "POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n".to_string(),
                "400",
            ),
            ("POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 99999999\r\n\r\n".to_string(), "413"),
            ("POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: gzip\r\n\r\n".to_string(), "501"),
            (format!("{chunked}Content-Length: 3\r\n\r\n"), "400"),
            (format!("{chunked}\r\nxyz\r\n"), "400"),
            (format!("{chunked}\r\nffffffff\r\n"), "413"),
            (format!("{chunked}\r\n2\r\nabc\r\n"), "400"),
            (long, "431"),
        ] {
            let mut stream = dial(address, &bytes);
            let (status, body) = answer(&mut stream);
            assert_eq!(status, expected, "{bytes:?}: {body}");
            assert_eq!(stream.read(&mut [0]).expect("closed in order"), 0, "{bytes:?}");
        }
    }
}
