//! The relay between a client and an engine of different speeds: who reads slowly slows its engine alone, and
//! who reads fast delays nobody. What is read of engines for nobody but ourselves stays within its limits.

#[allow(dead_code, reason = "shared with another test, which uses other parts")]
pub(crate) mod relay_support;

use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use llama_orch::http::fields::FieldLines;
use llama_orch::net::tls::ClientTls;
use llama_orch::net::{Fault, FaultKind, Limits, Net, NetEvent, Outbound, Outcome, Sink};
use llama_orch::reactor::Reactor;
use llama_orch::reactor::ready::{CARRIED_ON_BYTES, SHARE_BYTES, TURN_BUDGET_BYTES};
use llama_orch::reactor::token::{Kind, Token};
use llama_orch::wire::url::BaseUrl;
use relay_support::{Client, DEADLINE, Engine, Gateway, PATIENT, eventually, flood, security, tide};

const JSON: &str =
    "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 12\r\n\r\n{\"a\": \"b\"} \n";

/// Checks that everything came to rest, once the clients are gone.
fn settle(gateway: Gateway, client: Client) {
    drop(client);
    gateway.settle();
}

#[test]
fn a_slow_client_holds_its_engine_back_and_loses_nothing() {
    const TOTAL: u64 = 64 << 20;
    let written = Arc::new(AtomicU64::new(0));
    let count = written.clone();
    let engine = Engine::start(move |line| {
        while let Some(request) = line.request() {
            if request.head.starts_with("GET /flood") {
                flood(line, &count, TOTAL);
            } else {
                line.write(JSON.as_bytes());
            }
        }
    });
    let gateway = Gateway::start(engine.address);
    let mut slow = gateway.client();
    slow.send("GET /flood HTTP/1.1\r\nHost: a\r\n\r\n");
    // Once the count rests for a while, all buffers between the two are full.
    let (mut last, mut since) = (0, Instant::now());
    eventually("the engine is held back", || {
        let now = written.load(Ordering::SeqCst);
        if now != last {
            (last, since) = (now, Instant::now());
        }
        last > 0 && since.elapsed() > Duration::from_millis(150)
    });
    // Both sockets' kernel buffers grow to several MiB; the gateway itself adds a fraction of one.
    assert!(last < TOTAL / 2, "the engine wrote {last} bytes to a client that reads none");
    let mut other = gateway.client();
    for _ in 0..20 {
        assert_eq!(other.get("/").status, 200, "others are served meanwhile");
    }
    let answer = slow.receive();
    assert!(answer.clean && answer.body.len() as u64 == TOTAL);
    let wrong = answer.body.iter().zip(0..).position(|(byte, at)| *byte != tide(at));
    assert_eq!(wrong, None, "the first wrong byte");
    drop(slow);
    settle(gateway, other);
}

#[test]
fn a_fast_stream_does_not_delay_the_others() {
    let engine = Engine::start(|line| {
        while let Some(request) = line.request() {
            if request.head.starts_with("GET /flood") {
                return flood(line, &AtomicU64::new(0), u64::MAX);
            }
            line.write(JSON.as_bytes());
        }
    });
    let gateway = Gateway::start(engine.address);
    let mut fast = gateway.client();
    fast.send("GET /flood HTTP/1.1\r\nHost: a\r\n\r\n");
    let mut reader = fast.tcp.try_clone().expect("a second handle");
    let read = Arc::new(AtomicU64::new(0));
    let total = read.clone();
    let reading = std::thread::spawn(move || {
        let mut buffer = vec![0; 64 * 1024];
        while let Ok(length @ 1..) = reader.read(&mut buffer) {
            total.fetch_add(length as u64, Ordering::SeqCst);
        }
    });
    eventually("the stream flows", || read.load(Ordering::SeqCst) > 1 << 20);
    let before = read.load(Ordering::SeqCst);
    let mut other = gateway.client();
    let mut took: Vec<Duration> = (0..200)
        .map(|_| {
            let began = Instant::now();
            assert_eq!(other.get("/").status, 200);
            began.elapsed()
        })
        .collect();
    took.sort_unstable();
    // Generous, as tests share two cores; a starved client would wait for ever.
    assert!(took[100] < Duration::from_millis(100), "the median is {:?}", took[100]);
    eventually("the stream flows on", || read.load(Ordering::SeqCst) > before);
    fast.tcp.shutdown(std::net::Shutdown::Both).expect("an open connection");
    reading.join().expect("the reader did not panic");
    drop(fast);
    settle(gateway, other);
}

/// A loop that asks an engine for itself and reads whole answers.
struct Asker {
    reactor: Reactor,
    net: Net,
    to: BaseUrl,
}

impl Asker {
    fn new(engine: &Engine, limits: Limits) -> Asker {
        let reactor = Reactor::new().expect("a reactor");
        let waker = reactor.waker(Token::only(Kind::Waker)).expect("a waker");
        let mut net = Net::new(reactor.registry().expect("a registry"), waker, limits);
        let mut scheme = "http";
        if let Some(security) = security() {
            net.set_client_tls(ClientTls::new(|| Ok(security.client.clone())));
            scheme = "https";
        }
        let to = BaseUrl::new(&format!("{scheme}://{}", engine.address)).expect("a URL");
        Asker { reactor, net, to }
    }

    fn ask(&mut self, target: &str, sink: Sink) -> Token {
        let outbound = Outbound {
            to: self.to.clone(),
            method: "GET".into(),
            target: target.into(),
            fields: FieldLines::new(),
            body: Arc::default(),
            sink,
            patience: PATIENT,
            keep_ms: None,
        };
        self.net.start(outbound, llama_orch::reactor::now().mono)
    }

    fn turn(&mut self) {
        let soon = llama_orch::reactor::now().mono.plus_ms(10);
        let now = self.reactor.wait(Some(soon), self.net.busy()).expect("the poll works").mono;
        for (token, edge) in self.reactor.events() {
            self.net.on_edge(token, edge);
        }
        self.net.turn(now);
    }

    /// Turns until an exchange has ended, or `done` holds.
    fn turn_until(&mut self, done: impl Fn(&Net) -> bool) -> Option<(Token, Outcome)> {
        let until = Instant::now() + DEADLINE;
        loop {
            while let Some(event) = self.net.next_event() {
                if let NetEvent::Finished { exchange, outcome, .. } = event {
                    return Some((exchange, outcome));
                }
            }
            if done(&self.net) {
                return None;
            }
            assert!(Instant::now() < until, "nothing ends");
            self.turn();
        }
    }

    /// The body of the exchange that ends next, which must be this one.
    fn body(&mut self, expected: Token) -> Result<Vec<u8>, Fault> {
        match self.turn_until(|_| false) {
            Some((exchange, Outcome::Complete { status: 200, body })) if exchange == expected => Ok(body),
            Some((exchange, Outcome::Failed(fault))) if exchange == expected => Err(fault),
            other => panic!("another end: {other:?}"),
        }
    }
}

#[test]
fn a_turn_moves_little_of_many_fast_streams_together() {
    const FAST: usize = 48;
    const PIECES: usize = 8;
    const PIECE: usize = 0x10000;
    let written = Arc::new(AtomicU64::new(0));
    let count = written.clone();
    let engine = Engine::start(move |line| {
        while line.request().is_some() {
            line.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n");
            for _ in 0..PIECES {
                line.write(&[&b"10000\r\n"[..], &[b'x'; PIECE], b"\r\n"].concat());
                count.fetch_add(1, Ordering::SeqCst);
            }
            line.write(b"0\r\n\r\n");
        }
    });
    let mut asker = Asker::new(&engine, Limits::default());
    for _ in 0..FAST {
        asker.ask("/", Sink::Owner { hold_back: &[] });
    }
    let (mut moved, mut largest, mut ended) = (0, 0, 0);
    let until = Instant::now() + 4 * DEADLINE;
    while ended < FAST {
        assert!(Instant::now() < until, "{ended} have ended, {moved} bytes have come");
        asker.turn();
        let mut bytes_of_turn = 0;
        while let Some(event) = asker.net.next_event() {
            match event {
                NetEvent::Data { bytes, .. } => bytes_of_turn += bytes.len(),
                NetEvent::Finished { outcome, .. } => {
                    assert!(matches!(outcome, Outcome::Complete { status: 200, .. }), "{outcome:?}");
                    ended += 1;
                }
                _ => {}
            }
        }
        moved += bytes_of_turn;
        largest = largest.max(bytes_of_turn);
    }
    assert_eq!((moved, written.load(Ordering::SeqCst)), (FAST * PIECES * PIECE, (FAST * PIECES) as u64));
    let most = FAST * SHARE_BYTES + CARRIED_ON_BYTES + TURN_BUDGET_BYTES;
    assert!(largest <= most, "{largest} bytes in a turn, where {most} are the most");
}

#[test]
fn answers_that_are_read_as_a_whole_share_the_budget_of_bodies() {
    const LARGE: usize = 500_000;
    const SMALL: usize = 50_000;
    let (release, held) = mpsc::channel::<()>();
    let held = Mutex::new(held);
    let engine = Engine::start(move |line| {
        while let Some(request) = line.request() {
            let length = if request.head.starts_with("GET /small") { SMALL } else { LARGE };
            line.write(format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n").as_bytes());
            line.write(&vec![b'a'; length - 1]);
            if request.head.starts_with("GET /held") {
                held.lock().expect("no panic").recv_timeout(DEADLINE).expect("released");
            }
            line.write(b"z");
        }
    });
    // Of one MiB large ones may have three quarters: room for one of these, not for two.
    let mut asker = Asker::new(&engine, Limits { bodies_bytes_max: 1 << 20, ..Limits::default() });

    let first = asker.ask("/held", Sink::Collect { bytes_max: LARGE });
    assert!(asker.turn_until(|net| net.bodies_bytes() >= LARGE - 1).is_none(), "it is not complete");
    let second = asker.ask("/", Sink::Collect { bytes_max: LARGE });
    let fault = asker.body(second).expect_err("there is room for one");
    assert_eq!(fault.kind, FaultKind::Local, "{fault:?}");
    assert!(fault.reason.contains("no room in memory"), "{fault:?}");
    assert!((LARGE - 1..=LARGE).contains(&asker.net.bodies_bytes()), "what failed gave its room back");
    let small = asker.ask("/small", Sink::Collect { bytes_max: SMALL });
    assert_eq!(asker.body(small).expect("small ones count as the exchange's own").len(), SMALL);

    release.send(()).expect("the engine waits");
    let body = asker.body(first).expect("it goes on");
    assert!(body.len() == LARGE && body.ends_with(b"az"));
    assert_eq!((asker.net.bodies_bytes(), asker.net.bodies_refused()), (0, 1));
    let again = asker.ask("/", Sink::Collect { bytes_max: LARGE });
    assert_eq!(asker.body(again).expect("there is room again").len(), LARGE);
    // A limit of its own comes before that of all.
    let limited = asker.ask("/", Sink::Collect { bytes_max: LARGE / 2 });
    assert_eq!(asker.body(limited).expect_err("larger than asked for").kind, FaultKind::Protocol);
    assert_eq!((asker.net.bodies_bytes(), asker.net.exchanges()), (0, 0));
}

/// Streams through a loop that turns when it is told to, so that what arrives in which turn is known.
struct Crowd {
    reactor: Reactor,
    net: Net,
    /// Where the engines are.
    to: BaseUrl,
    clients: Vec<TcpStream>,
    engines: Vec<TcpStream>,
    /// How much later it seems to the loop than it is.
    late_ms: u64,
}

/// So long that no comment is due by itself.
const KEEP_ALIVE_MS: u64 = 600_000;
/// A piece of a stream, in a chunk.
const PIECE: &[u8] = b"9\r\ndata: 1\n\n\r\n";

impl Crowd {
    /// So many streams of which the head has reached the client.
    fn new(streams: usize) -> Crowd {
        let reactor = Reactor::new().expect("a reactor");
        let waker = reactor.waker(Token::only(Kind::Waker)).expect("a waker");
        let limits = Limits { keep_alive_ms: KEEP_ALIVE_MS, ..Limits::default() };
        let mut net = Net::new(reactor.registry().expect("a registry"), waker, limits);
        let address = net.listen("127.0.0.1:0".parse().expect("an address")).expect("a port");
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let to = format!("http://{}", listener.local_addr().expect("an address"));
        let to = BaseUrl::new(&to).expect("a URL");
        let mut crowd = Crowd { reactor, net, to, clients: Vec::new(), engines: Vec::new(), late_ms: 0 };
        for _ in 0..streams {
            let mut client = TcpStream::connect(address).expect("the loop listens");
            client.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").expect("the loop takes bytes");
            let client_token = crowd.event(|event| match event {
                NetEvent::Request { client, .. } => Some(client),
                _ => None,
            });
            crowd.relay(client_token);
            let (mut engine, _) = listener.accept().expect("the loop dials");
            engine.set_nodelay(true).expect("a socket option");
            let head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
            engine.write_all(head).expect("the loop takes bytes");
            crowd.event(|event| matches!(event, NetEvent::Head { .. }).then_some(()));
            assert!(engine.read(&mut [0; 4096]).expect("a request") > 0);
            client.set_nonblocking(true).expect("a socket option");
            crowd.clients.push(client);
            crowd.engines.push(engine);
        }
        crowd.turn();
        assert!(crowd.arrived().iter().all(|bytes| *bytes > 0), "every client has its head");
        crowd
    }

    /// Passes a client's request on to an engine.
    fn relay(&mut self, client: Token) -> Token {
        let outbound = Outbound {
            to: self.to.clone(),
            method: "GET".into(),
            target: "/".into(),
            fields: FieldLines::new(),
            body: Arc::default(),
            sink: Sink::Client { client, hold_back: &[], fields: FieldLines::new() },
            patience: PATIENT,
            keep_ms: None,
        };
        self.net.start(outbound, llama_orch::reactor::now().mono)
    }

    fn turn(&mut self) {
        let soon = llama_orch::reactor::now().mono.plus_ms(1);
        let now = self.reactor.wait(Some(soon), self.net.busy()).expect("the poll works").mono;
        for (token, edge) in self.reactor.events() {
            self.net.on_edge(token, edge);
        }
        self.net.turn(now.plus_ms(self.late_ms));
    }

    /// Turns until something happens that is waited for.
    fn event<T>(&mut self, wanted: impl Fn(NetEvent) -> Option<T>) -> T {
        let until = Instant::now() + DEADLINE;
        loop {
            while let Some(event) = self.net.next_event() {
                if let Some(found) = wanted(event) {
                    return found;
                }
            }
            assert!(Instant::now() < until, "it does not happen");
            self.turn();
        }
    }

    /// One turn that finds a piece of every stream. Returns how many pieces each client has got since.
    fn piece_of_each(&mut self) -> Vec<usize> {
        for engine in &mut self.engines {
            engine.write_all(PIECE).expect("the loop takes bytes");
        }
        self.turn();
        self.arrived().iter().map(|bytes| bytes / PIECE.len()).collect()
    }

    /// Bytes that came to each client.
    fn arrived(&mut self) -> Vec<usize> {
        let mut buffer = [0; 4096];
        let read = |client: &mut TcpStream| match client.read(&mut buffer) {
            Ok(length) => length,
            Err(error) if error.kind() == ErrorKind::WouldBlock => 0,
            Err(error) => panic!("the connection broke: {error}"),
        };
        self.clients.iter_mut().map(read).collect()
    }
}

#[test]
fn pieces_that_come_in_every_turn_go_two_at_a_time_and_wait_for_no_third() {
    let mut many = Crowd::new(16);
    assert_eq!(many.piece_of_each(), [1; 16], "a first piece goes at once");
    assert_eq!(many.piece_of_each(), [0; 16], "each had one in the last turn");
    assert!(many.net.busy(), "what is held keeps the loop awake");
    assert_eq!(many.piece_of_each(), [2; 16]);
    assert_eq!(many.piece_of_each(), [0; 16]);
    many.turn();
    assert_eq!(many.arrived(), [PIECE.len(); 16], "a turn that brings nothing ends the wait");
    assert!(!many.net.busy());

    // After a stall, when all is due at once, nobody is taken for slow.
    many.turn();
    assert_eq!(many.piece_of_each(), [1; 16]);
    many.late_ms = KEEP_ALIVE_MS;
    assert_eq!(many.piece_of_each(), [1; 16], "what is due is not held");
    assert_eq!(many.net.clients(), 16);

    let mut few = Crowd::new(4);
    for _ in 0..6 {
        assert_eq!(few.piece_of_each(), [1; 4], "few are written to in the turn of each piece");
    }
}

#[test]
fn of_requests_that_come_together_those_that_end_at_once_never_reach_an_engine() {
    const REQUESTS: usize = 3;
    let mut crowd = Crowd::new(REQUESTS);
    for engine in &mut crowd.engines {
        engine.write_all(b"0\r\n\r\n").expect("the loop takes bytes");
    }
    for _ in 0..REQUESTS {
        crowd.event(|event| matches!(event, NetEvent::Finished { .. }).then_some(()));
    }
    for client in &mut crowd.clients {
        client.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").expect("the loop takes bytes");
    }
    crowd.turn();
    let exchanges: Vec<Token> = (0..REQUESTS)
        .map(|_| match crowd.net.next_event() {
            Some(NetEvent::Request { client, .. }) => crowd.relay(client),
            other => panic!("all requests come in one turn, not {other:?}"),
        })
        .collect();
    crowd.net.abort(exchanges[0], "the client is gone", llama_orch::reactor::now().mono);
    assert!(crowd.net.busy(), "what is to be sent keeps the loop awake");
    crowd.turn();
    let mut asked: Vec<String> = Vec::new();
    for engine in &mut crowd.engines {
        let mut buffer = [0; 4096];
        engine.set_read_timeout(Some(DEADLINE)).expect("a socket option");
        let length = engine.read(&mut buffer).expect("a request, or the connection's end");
        asked.push(String::from_utf8_lossy(&buffer[..length.min(14)]).into_owned());
    }
    asked.sort();
    assert_eq!(asked, ["", "GET / HTTP/1.1", "GET / HTTP/1.1"]);
}
