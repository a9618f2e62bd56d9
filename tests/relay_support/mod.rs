//! A gateway, a scripted engine and a raw client, each over real sockets: what the relay tests stand
//! between. The client and the engine share no code with the crate, so that a mistake in its framing
//! cannot hide itself.

#![allow(unreachable_pub)] // A module of a test has no crate to be reached from.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc;
use std::sync::{Arc, LazyLock, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

#[path = "../tls_support/mod.rs"]
pub mod tls_support;

use llama_orch::http::fields::FieldLines;
use llama_orch::http::server::Response;
use llama_orch::net::tls::ClientTls;
use llama_orch::net::{FaultKind, Limits, Net, NetEvent, Outbound, Outcome, Patience, Sink, forwardable};
use llama_orch::reactor::token::{Kind, Token};
use llama_orch::reactor::{Reactor, Waker};
use llama_orch::wire::url::BaseUrl;
use tls_support::{Pki, Socket};

/// Longest that any single step of a test may take.
pub const DEADLINE: Duration = Duration::from_secs(5);

/// Patience that no test reaches by itself.
pub const PATIENT: Patience = Patience { connect_ms: 4_000, first_byte_ms: 20_000, idle_ms: 20_000 };

/// What the sockets are secured with: everything on both sides of the gateway where these tests run a
/// second time, as a part of those of TLS.
pub fn security() -> Option<&'static Security> {
    static SECURITY: LazyLock<Security> = LazyLock::new(|| {
        let pki = Pki::new();
        let pair = pki.issue(&["localhost", "127.0.0.1"]);
        Security { client: pki.client(None), server: pki.server(&pair, false) }
    });
    module_path!().contains("secured").then(|| &*SECURITY)
}

/// Both sides' configurations.
pub struct Security {
    pub client: Arc<rustls::ClientConfig>,
    pub server: Arc<rustls::ServerConfig>,
}

/// Polls `done` until it holds; fails with `what` at the deadline.
pub fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let until = Instant::now() + DEADLINE;
    while !done() {
        assert!(Instant::now() < until, "not within {DEADLINE:?}: {what}");
        std::thread::sleep(Duration::from_micros(500));
    }
}

#[derive(Default)]
struct Seen {
    clients: AtomicUsize,
    exchanges: AtomicUsize,
    requests: AtomicUsize,
    gone: AtomicUsize,
    outcomes: Mutex<Vec<String>>,
    stop: AtomicBool,
}

/// A loop around `Net`, as a daemon has one. Requests for `/local/BYTES` it answers itself with a body
/// of that size, `/hold` never; all else goes to the engine.
pub struct Gateway {
    pub address: SocketAddr,
    seen: Arc<Seen>,
    waker: Waker,
    thread: Option<JoinHandle<()>>,
}

impl Gateway {
    pub fn start(engine: SocketAddr) -> Gateway {
        Gateway::with(engine, Limits::default(), PATIENT)
    }

    pub fn with(engine: SocketAddr, limits: Limits, patience: Patience) -> Gateway {
        let seen = Arc::new(Seen::default());
        let shared = seen.clone();
        let (ready, started) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            let mut reactor = Reactor::new().expect("a reactor");
            let waker = reactor.waker(Token::only(Kind::Waker)).expect("a waker");
            let mut net = Net::new(reactor.registry().expect("a registry"), waker.clone(), limits);
            if let Some(Security { client, server }) = security() {
                net.set_server_tls(Some(server.clone()));
                net.set_client_tls(ClientTls::new(|| Ok(client.clone())));
            }
            let address = net.listen(SocketAddr::from(([127, 0, 0, 1], 0))).expect("a port");
            ready.send((address, waker)).expect("the test waits");
            run(&mut reactor, &mut net, engine, patience, &shared);
        });
        let (address, waker) = started.recv_timeout(DEADLINE).expect("the gateway starts");
        Gateway { address, seen, waker, thread: Some(thread) }
    }

    pub fn client(&self) -> Client {
        Client::connect(self.address)
    }

    /// Requests handed to the owner so far.
    pub fn requests(&self) -> usize {
        self.seen.requests.load(Ordering::SeqCst)
    }

    /// Clients that left while the owner owed them an answer.
    pub fn gone(&self) -> usize {
        self.seen.gone.load(Ordering::SeqCst)
    }

    pub fn clients(&self) -> usize {
        self.seen.clients.load(Ordering::SeqCst)
    }

    /// How the exchanges ended, in order.
    pub fn outcomes(&self) -> Vec<String> {
        self.seen.outcomes.lock().expect("no panic in the gateway").clone()
    }

    /// Waits until nothing is left of any client or exchange, then stops the loop.
    pub fn settle(mut self) {
        eventually("clients and exchanges return to 0", || {
            self.clients() == 0 && self.seen.exchanges.load(Ordering::SeqCst) == 0
        });
        self.stop();
        let thread = self.thread.take().expect("not settled twice");
        eventually("the gateway's loop ends", || thread.is_finished());
        thread.join().expect("the gateway did not panic");
    }

    fn stop(&self) {
        self.seen.stop.store(true, Ordering::SeqCst);
        let _ = self.waker.wake();
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        self.stop();
    }
}

fn run(reactor: &mut Reactor, net: &mut Net, engine: SocketAddr, patience: Patience, seen: &Seen) {
    let scheme = if security().is_some() { "https" } else { "http" };
    let to = BaseUrl::new(&format!("{scheme}://{engine}")).expect("an address is a URL");
    let mut relayed: BTreeMap<Token, Token> = BTreeMap::new();
    while !seen.stop.load(Ordering::SeqCst) {
        let now = reactor.wait(net.deadline(), net.busy()).expect("the poll works").mono;
        for (token, edge) in reactor.events() {
            net.on_edge(token, edge);
        }
        net.turn(now);
        while let Some(event) = net.next_event() {
            match event {
                NetEvent::Request { client, request, .. } => {
                    seen.requests.fetch_add(1, Ordering::SeqCst);
                    if let Some(bytes) = request.head.target().strip_prefix("/local/") {
                        let body = "L".repeat(bytes.parse().expect("a size"));
                        net.respond(client, &Response::text(200, body), now);
                    } else if request.head.target() == "/stream" {
                        net.stream_begin(client, "text/event-stream", FieldLines::new(), now);
                        for piece in [&b"data: 1\n\n"[..], b"", b"data: 2\n\n"] {
                            net.stream_push(client, piece, now);
                        }
                        net.stream_end(client, now);
                    } else if request.head.target() != "/hold" {
                        let outbound = Outbound {
                            keep_ms: None,
                            to: to.clone(),
                            method: request.head.method().into(),
                            target: request.head.target().into(),
                            fields: forwardable(&request.head, |_| false),
                            body: Arc::new(request.body),
                            sink: Sink::Client {
                                client,
                                hold_back: &[502, 503, 504],
                                fields: FieldLines::new().with("X-Via", "gateway"),
                            },
                            patience,
                        };
                        let exchange = net.start(outbound, now);
                        assert!(relayed.insert(exchange, client).is_none(), "tokens are not given twice");
                    }
                }
                NetEvent::ClientGone { .. } => {
                    seen.gone.fetch_add(1, Ordering::SeqCst);
                }
                NetEvent::Finished { exchange, outcome, timing } => {
                    let client = relayed.remove(&exchange).expect("each exchange finishes once");
                    assert!(timing.ended >= timing.started, "time runs forward");
                    let named = match outcome {
                        Outcome::Complete { status, .. } => format!("complete {status}"),
                        Outcome::ClientGone => "client gone".into(),
                        Outcome::Cancelled => "cancelled".into(),
                        Outcome::Failed(fault) => {
                            if !fault.answered {
                                net.respond(client, &Response::text(502, fault.reason), now);
                            }
                            let kind = match fault.kind {
                                FaultKind::Status(status) => format!("status {status}"),
                                kind => format!("{kind:?}").to_lowercase(),
                            };
                            format!("{kind}{}", if fault.answered { " answered" } else { "" })
                        }
                    };
                    seen.outcomes.lock().expect("no panic in the test").push(named);
                }
                NetEvent::Drained { .. } | NetEvent::Head { .. } | NetEvent::Data { .. } => {}
            }
        }
        assert_eq!(relayed.len(), net.exchanges(), "no exchange without its end to come");
        seen.exchanges.store(net.exchanges(), Ordering::SeqCst);
        seen.clients.store(net.clients(), Ordering::SeqCst);
    }
}

/// A request as the engine received it.
#[derive(Clone, Debug)]
pub struct Recorded {
    /// Which of its connections brought it, from 0.
    pub connection: usize,
    /// Head, without its empty line.
    pub head: String,
    pub body: Vec<u8>,
}

/// An engine that records what it receives and does what a script says on each connection.
pub struct Engine {
    pub address: SocketAddr,
    recorded: Arc<Mutex<Vec<Recorded>>>,
    connections: Arc<AtomicUsize>,
    stop: Arc<AtomicBool>,
}

/// One connection of the engine.
pub struct Line {
    pub number: usize,
    pub tcp: Socket,
    unread: Vec<u8>,
    recorded: Arc<Mutex<Vec<Recorded>>>,
}

impl Engine {
    /// `script` runs on a thread of its own for every connection, which is closed when it returns.
    pub fn start(script: impl Fn(&mut Line) + Send + Sync + 'static) -> Engine {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address");
        let recorded = Arc::new(Mutex::new(Vec::new()));
        let (connections, stop) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
        let (script, log, count, stopped) =
            (Arc::new(script), recorded.clone(), connections.clone(), stop.clone());
        std::thread::spawn(move || {
            for tcp in listener.incoming() {
                if stopped.load(Ordering::SeqCst) {
                    return;
                }
                let tcp = tcp.expect("accept works");
                tcp.set_nodelay(true).expect("a socket option");
                tcp.set_read_timeout(Some(DEADLINE)).expect("a socket option");
                tcp.set_write_timeout(Some(DEADLINE)).expect("a socket option");
                let number = count.fetch_add(1, Ordering::SeqCst);
                let tcp = match security() {
                    None => Socket::plain(tcp),
                    Some(security) => Socket::server(tcp, &security.server),
                };
                let mut line = Line { number, tcp, unread: Vec::new(), recorded: log.clone() };
                let script = script.clone();
                std::thread::spawn(move || {
                    if line.tcp.handshake().is_ok() {
                        script(&mut line);
                    }
                });
            }
        });
        Engine { address, recorded, connections, stop }
    }

    /// An engine that answers every request with these bytes and keeps its connections.
    pub fn answering(answer: impl AsRef<[u8]> + Send + Sync + 'static) -> Engine {
        Engine::start(move |line| {
            while line.request().is_some() {
                line.write(answer.as_ref());
            }
        })
    }

    /// An engine that answers the first request of each connection with these bytes, then closes it.
    pub fn closing(answer: impl AsRef<[u8]> + Send + Sync + 'static) -> Engine {
        Engine::start(move |line| {
            if line.request().is_some() {
                line.write(answer.as_ref());
            }
        })
    }

    pub fn requests(&self) -> Vec<Recorded> {
        self.recorded.lock().expect("no panic in the engine").clone()
    }

    pub fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(self.address);
    }
}

impl Line {
    /// The next request, recorded; `None` once the peer closed or nothing came in time.
    pub fn request(&mut self) -> Option<Recorded> {
        let end = loop {
            match find(&self.unread, b"\r\n\r\n") {
                Some(at) => break at,
                None => self.more().then_some(())?,
            }
        };
        let head = String::from_utf8(self.unread[..end].to_vec()).expect("a head of text");
        let length: usize =
            field(&head, "content-length").map_or(0, |value| value.parse().expect("a number"));
        while self.unread.len() < end + 4 + length {
            self.more().then_some(())?;
        }
        let body = self.unread[end + 4..end + 4 + length].to_vec();
        self.unread.drain(..end + 4 + length);
        let request = Recorded { connection: self.number, head, body };
        self.recorded.lock().expect("no panic in the test").push(request.clone());
        Some(request)
    }

    fn more(&mut self) -> bool {
        let mut buffer = [0; 16 * 1024];
        match self.tcp.read(&mut buffer) {
            Ok(length) => {
                self.unread.extend_from_slice(&buffer[..length]);
                length > 0
            }
            Err(_) => false,
        }
    }

    /// Writes, whether or not the peer still listens.
    pub fn write(&mut self, bytes: &[u8]) {
        let _ = self.tcp.write_all(bytes);
    }

    /// Reads and forgets until the peer closes.
    pub fn closed_after_anything(&mut self) {
        let mut buffer = [0; 64 * 1024];
        while let Ok(1..) = self.tcp.read(&mut buffer) {}
    }

    /// Waits for the peer's close and says when it came; panics if bytes come instead, or nothing.
    pub fn closed_at(&mut self) -> Instant {
        let mut byte = [0; 1];
        match self.tcp.read(&mut byte) {
            Ok(0) => Instant::now(),
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Instant::now(),
            other => panic!("a close was to come, not {other:?}"),
        }
    }
}

/// Makes closing `tcp` a reset.
pub fn reset_on_close(tcp: &TcpStream) {
    rustix::net::sockopt::set_socket_linger(tcp, Some(Duration::ZERO)).expect("a socket option");
}

/// A client that writes raw bytes.
pub struct Client {
    pub tcp: Socket,
    unread: Vec<u8>,
}

/// An answer as the client received it.
#[derive(Clone, Debug, Default)]
pub struct Received {
    pub status: u16,
    /// Head, without its empty line.
    pub head: String,
    /// Body as it came, framing included.
    pub raw: Vec<u8>,
    pub body: Vec<u8>,
    /// It ended as its framing says it must.
    pub clean: bool,
}

impl Received {
    pub fn field(&self, name: &str) -> Option<&str> {
        field(&self.head, name)
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

impl Client {
    pub fn connect(address: SocketAddr) -> Client {
        let tcp = TcpStream::connect_timeout(&address, DEADLINE).expect("the gateway listens");
        tcp.set_nodelay(true).expect("a socket option");
        tcp.set_read_timeout(Some(DEADLINE)).expect("a socket option");
        tcp.set_write_timeout(Some(DEADLINE)).expect("a socket option");
        let tcp = match security() {
            None => Socket::plain(tcp),
            Some(security) => Socket::client(tcp, "localhost", &security.client),
        };
        // Where this fails, so does whatever comes next.
        let _ = tcp.handshake();
        Client { tcp, unread: Vec::new() }
    }

    pub fn send(&mut self, bytes: impl AsRef<[u8]>) -> &mut Client {
        self.tcp.write_all(bytes.as_ref()).expect("the gateway takes bytes");
        self
    }

    pub fn get(&mut self, target: &str) -> Received {
        self.send(format!("GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n")).receive()
    }

    pub fn post(&mut self, target: &str, body: &str) -> Received {
        let length = body.len();
        self.send(format!(
            "POST {target} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n{body}"
        ));
        self.receive()
    }

    pub fn fin(&self) {
        self.tcp.shutdown(Shutdown::Write).expect("an open connection");
    }

    /// The next answer; not clean if the connection ended before it.
    pub fn receive(&mut self) -> Received {
        let mut got = Received::default();
        while find(&self.unread, b"\r\n\r\n").is_none() {
            if self.more() == 0 {
                return got;
            }
        }
        let end = find(&self.unread, b"\r\n\r\n").expect("found above");
        got.head = String::from_utf8_lossy(&self.unread[..end]).into_owned();
        got.status = got.head.get(9..12).and_then(|code| code.parse().ok()).expect("a status line");
        self.unread.drain(..end + 4);
        let chunked = got.field("transfer-encoding") == Some("chunked");
        let length: Option<usize> = got.field("content-length").map(|value| value.parse().expect("a number"));
        if got.status < 200 || got.status == 204 || got.status == 304 {
            got.clean = true;
        } else if chunked {
            got.clean = self.chunks(&mut got).is_some();
        } else if let Some(length) = length {
            got.clean = self.take(length, &mut got.raw).is_some();
            got.body = got.raw.clone();
        } else {
            got.clean = self.until_close(&mut got.raw);
            got.body = got.raw.clone();
        }
        got
    }

    /// Whether the gateway closes without another byte.
    pub fn is_closed(&mut self) -> bool {
        self.unread.is_empty() && self.more() == 0
    }

    /// Whether it ends with a FIN after any bytes; a reset is no clean end.
    fn until_close(&mut self, raw: &mut Vec<u8>) -> bool {
        loop {
            raw.append(&mut self.unread);
            let mut buffer = [0; 64 * 1024];
            match self.tcp.read(&mut buffer) {
                Ok(0) => return true,
                Ok(length) => self.unread.extend_from_slice(&buffer[..length]),
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return false,
                Err(error) => panic!("neither bytes nor an end: {error}"),
            }
        }
    }

    fn chunks(&mut self, got: &mut Received) -> Option<()> {
        loop {
            let mut line = Vec::new();
            let complete = self.line(&mut line);
            got.raw.extend_from_slice(&line);
            complete?;
            let text = String::from_utf8_lossy(&line).into_owned();
            let size = text.trim_end().split(';').next().expect("split gives one");
            let size =
                usize::from_str_radix(size, 16).unwrap_or_else(|_| panic!("a chunk size, not {text:?}"));
            if size == 0 {
                loop {
                    let mut trailer = Vec::new();
                    let complete = self.line(&mut trailer);
                    got.raw.extend_from_slice(&trailer);
                    complete?;
                    if trailer == b"\r\n" {
                        return Some(());
                    }
                }
            }
            let at = got.raw.len();
            let complete = self.take(size, &mut got.raw);
            got.body.extend_from_slice(&got.raw[at..]);
            complete?;
            let mut end = Vec::new();
            self.take(2, &mut end)?;
            assert_eq!(end, b"\r\n", "a chunk ends with a line end");
            got.raw.extend_from_slice(b"\r\n");
        }
    }

    fn line(&mut self, line: &mut Vec<u8>) -> Option<()> {
        loop {
            if let Some(at) = find(&self.unread, b"\r\n") {
                line.extend(self.unread.drain(..at + 2));
                return Some(());
            }
            if self.more() == 0 {
                line.append(&mut self.unread);
                return None;
            }
        }
    }

    fn take(&mut self, length: usize, to: &mut Vec<u8>) -> Option<()> {
        let mut left = length;
        loop {
            let here = left.min(self.unread.len());
            to.extend(self.unread.drain(..here));
            left -= here;
            if left == 0 {
                return Some(());
            }
            if self.more() == 0 {
                return None;
            }
        }
    }

    /// Reads once; 0 at the end, however it came. Silence for too long fails the test.
    fn more(&mut self) -> usize {
        let mut buffer = [0; 64 * 1024];
        match self.tcp.read(&mut buffer) {
            Ok(length) => {
                self.unread.extend_from_slice(&buffer[..length]);
                length
            }
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => 0,
            Err(error) => panic!("neither bytes nor an end: {error}"),
        }
    }
}

/// The first field of this name in a head of lines.
pub fn field<'h>(head: &'h str, name: &str) -> Option<&'h str> {
    head.lines().skip(1).find_map(|line| {
        let (key, value) = line.split_once(':')?;
        key.eq_ignore_ascii_case(name).then(|| value.trim())
    })
}

pub fn find(bytes: &[u8], what: &[u8]) -> Option<usize> {
    bytes.windows(what.len()).position(|window| window == what)
}

/// The byte at a place of a flood.
pub fn tide(at: u64) -> u8 {
    (at ^ at >> 8 ^ at >> 16) as u8
}

/// Writes chunks of 64 KiB of [`tide`] up to `total`, counting, until the peer closes.
pub fn flood(line: &mut Line, written: &AtomicU64, total: u64) {
    line.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n");
    let mut at = 0;
    while at < total {
        let mut piece = b"10000\r\n".to_vec();
        piece.extend((at..at + 0x10000).map(tide));
        piece.extend_from_slice(b"\r\n");
        if line.tcp.write_all(&piece).is_err() {
            return;
        }
        at += 0x10000;
        written.store(at, Ordering::SeqCst);
    }
    line.write(b"0\r\n\r\n");
}
