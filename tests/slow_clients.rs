//! Thousands of clients that are as slow as they can be, in every way that there is, and what the others notice of
//! them: nearly nothing. Others ask real daemons, through a node's agent where there is one, for short answers of
//! an engine; how long these take is compared with the same daemons before anybody was slow, and with twins of
//! theirs, without slow clients, at the same moments. A machine that is busy is so for all of them, and now and then
//! for one alone; so each round is held against its own twin, and the median of the rounds must do.

#[path = "daemons/harness.rs"]
#[allow(dead_code, reason = "shared with other tests, which use other parts")]
mod harness;
#[path = "openai_clients/plane.rs"]
#[allow(dead_code, reason = "shared with another test, which uses other parts")]
mod plane;
mod tls_support;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use harness::{ORCHESTRATORD, Process, free_port, hand_over, metric, until};
use llama_orch::service::machine::raise_descriptor_limit;
use plane::Plane;
use rustls::ClientConfig;
use tls_support::{Pki, Socket};

/// Clients of all kinds at once, where there are descriptors for them.
const SLOW: usize = 10_000;
/// Of these, such that read an endless answer a little at a time.
const READERS: usize = 64;
/// Handshakes that are begun and completed while others are measured.
const HANDSHAKES: usize = 10_000;
/// How much longer the slowest hundredth of others' requests may take.
const SLOWER_MAX: Duration = Duration::from_millis(5);
/// Measurements, of which the median must do.
const ROUNDS: usize = 5;
/// Others' requests may take so many times as long as those of a twin that is as busy as the machine: where this is
/// more than [`SLOWER_MAX`], both wait for processors.
const SLOWER_RATIO: f64 = 1.5;
/// Requests of a measurement, to each of what is compared.
const REQUESTS: usize = 1_500;
/// Made for a machine that is much slower than any.
const PATIENCE: Duration = Duration::from_secs(60);

const PATH: &str = "/v1/completions";
const BODY: &str = r#"{"model":"m","prompt":"p"}"#;
const SAID: &str = r#"{"said":"short"}"#;

/// An engine that is healthy, answers shortly, and without an end whoever asks for a flood.
fn engine() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let url = format!("http://{}", listener.local_addr().expect("an address"));
    std::thread::spawn(move || {
        for tcp in listener.incoming().map_while(Result::ok) {
            std::thread::spawn(move || serve(tcp));
        }
    });
    url
}

fn serve(mut tcp: TcpStream) {
    let (mut unread, mut piece) = (Vec::new(), [0; 16 * 1024]);
    tcp.set_nodelay(true).expect("a socket option");
    loop {
        let Some(end) = unread.windows(4).position(|four| four == b"\r\n\r\n") else {
            match tcp.read(&mut piece) {
                Ok(length @ 1..) => unread.extend_from_slice(&piece[..length]),
                _ => return,
            }
            continue;
        };
        let head = String::from_utf8_lossy(&unread[..end]).to_ascii_lowercase();
        let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
        let whole = end + 4 + length.map_or(0, |length| length.parse::<usize>().expect("a length"));
        while unread.len() < whole {
            match tcp.read(&mut piece) {
                Ok(length @ 1..) => unread.extend_from_slice(&piece[..length]),
                _ => return,
            }
        }
        let body: Vec<u8> = unread.drain(..whole).skip(end + 4).collect();
        if body.windows(5).any(|five| five == b"flood") {
            return flood(&mut tcp);
        }
        let (status, said) = match head.split(' ').nth(1) {
            Some("/health") => ("200 OK", r#"{"status":"ok"}"#),
            Some(PATH) => ("200 OK", SAID),
            _ => ("404 Not Found", "{}"),
        };
        let length = said.len();
        let answer = format!(
            "HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n{said}"
        );
        if tcp.write_all(answer.as_bytes()).is_err() {
            return;
        }
    }
}

fn flood(tcp: &mut TcpStream) {
    let head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n";
    let event = format!("data: {}\n\n", "x".repeat(4_000));
    let chunk = format!("{:x}\r\n{event}\r\n", event.len());
    let mut written = tcp.write_all(head.as_bytes());
    while written.is_ok() {
        written = tcp.write_all(chunk.as_bytes());
    }
}

/// A client like any other, on a connection that it keeps.
struct Other(Socket);

impl Other {
    fn connect(port: u16, config: Option<&Arc<ClientConfig>>) -> std::io::Result<Other> {
        let tcp = TcpStream::connect(("127.0.0.1", port))?;
        tcp.set_nodelay(true)?;
        tcp.set_read_timeout(Some(PATIENCE))?;
        let socket = match config {
            Some(config) => Socket::client(tcp, "localhost", config),
            None => Socket::plain(tcp),
        };
        socket.handshake()?;
        Ok(Other(socket))
    }

    /// Asks once and says how long the whole answer took.
    fn ask(&mut self) -> std::io::Result<Duration> {
        let begun = Instant::now();
        let length = BODY.len();
        let request =
            format!("POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n{BODY}");
        self.0.write_all(request.as_bytes())?;
        let (mut got, mut piece) = (Vec::new(), [0; 4096]);
        while !got.ends_with(SAID.as_bytes()) {
            match self.0.read(&mut piece)? {
                0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
                length => got.extend_from_slice(&piece[..length]),
            }
            let is_refused = got.len() > 12 && !got.starts_with(b"HTTP/1.1 200");
            if is_refused {
                return Err(std::io::Error::other(String::from_utf8_lossy(&got).into_owned()));
            }
        }
        Ok(begun.elapsed())
    }
}

/// The slowest hundredth of requests takes longer than this.
fn p99(mut taken: Vec<Duration>) -> Duration {
    taken.sort();
    taken[taken.len() * 99 / 100]
}

/// The p99 of two, asked in turn.
fn compare(one: &mut Other, two: &mut Other) -> (Duration, Duration) {
    let mut taken = (Vec::new(), Vec::new());
    for _ in 0..REQUESTS {
        taken.0.push(one.ask().expect("an answer"));
        taken.1.push(two.ask().expect("an answer"));
        // Not as fast as they can: a client that keeps a processor busy measures itself.
        std::thread::sleep(Duration::from_micros(500));
    }
    (p99(taken.0), p99(taken.1))
}

/// Holds what the slow ones cost the others, in the median of the rounds, against what they may.
#[allow(clippy::print_stderr, reason = "the figures are worth reading")]
fn judge(what: &str, before: Duration, loaded: &mut Other, twin: &mut Other) {
    let rounds = (0..ROUNDS).map(|round| {
        let (with, without) = compare(loaded, twin);
        eprintln!(
            "{what}, round {round}: p99 {with:?} with them, {without:?} of a twin without, {before:?} before"
        );
        // Positive where they cost more than they may.
        let allowed = (without + SLOWER_MAX).max(without.mul_f64(SLOWER_RATIO));
        (with.as_secs_f64() - allowed.as_secs_f64(), with, without)
    });
    let mut rounds: Vec<(f64, Duration, Duration)> = rounds.collect();
    rounds.sort_by(|one, two| one.0.total_cmp(&two.0));
    let (excess, ..) = rounds[ROUNDS / 2];
    assert!(excess <= 0.0, "{what} cost the others too much: {rounds:?}, {before:?} before");
}

/// What a slow client does.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Slow {
    Head,
    Body,
    Chunk,
}

impl Slow {
    fn of(number: usize) -> Slow {
        [Slow::Head, Slow::Body, Slow::Chunk][number % 3]
    }

    fn begins(self) -> String {
        let head = format!("POST {PATH} HTTP/1.1\r\nHost: localhost\r\n");
        match self {
            Slow::Head => format!("{head}X-Slow: "),
            Slow::Body => format!("{head}Content-Length: 100000\r\n\r\n{{"),
            Slow::Chunk => format!("{head}Transfer-Encoding: chunked\r\n\r\n10000\r\n{{"),
        }
    }

    fn open(self, port: u16) -> std::io::Result<TcpStream> {
        let mut tcp = TcpStream::connect(("127.0.0.1", port))?;
        tcp.set_nonblocking(true)?;
        tcp.write_all(self.begins().as_bytes())?;
        Ok(tcp)
    }
}

/// Sends one more byte on each connection, over and over, about a thousand a second, and opens those again that
/// were closed for their slowness.
fn dribble(mut held: Vec<(u16, Slow, TcpStream)>, stop: &AtomicBool, reopened: &AtomicUsize) {
    for at in (0..held.len()).cycle() {
        if stop.load(Ordering::SeqCst) {
            return;
        }
        let (port, slow, tcp) = &mut held[at];
        if tcp.write(b"x").is_err()
            && let Ok(again) = slow.open(*port)
        {
            *tcp = again;
            reopened.fetch_add(1, Ordering::SeqCst);
        }
        if at % 10 == 9 {
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// Reads a kilobyte now and then of each answer.
fn sip(mut readers: Vec<TcpStream>, stop: &AtomicBool) {
    while !stop.load(Ordering::SeqCst) {
        for reader in &mut readers {
            let _ = reader.read(&mut [0; 1024]);
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Connections that this process and a daemon may have for slow clients, others left room for.
fn slow_clients_max() -> usize {
    let limit = usize::try_from(raise_descriptor_limit().unwrap_or(1024)).unwrap_or(usize::MAX);
    // A daemon keeps a descriptor for the engine of every client, and this process needs one a client.
    SLOW.min((limit / 2).saturating_sub(600))
}

#[test]
#[allow(clippy::print_stderr, reason = "the figures are worth reading")]
fn slow_heads_bodies_and_readers_cost_the_others_five_milliseconds_at_most() {
    let at_one = slow_clients_max();
    let engine = engine();
    let planes = [(); 2].map(|()| {
        let plane = Plane::start(true, &[]);
        plane.announce("m", &engine, 1_024);
        plane.until_routable(1);
        plane
    });
    let [slowed, quiet] = &planes;
    let connect = |plane: &Plane| Other::connect(plane.port, None).expect("a connection");
    let (mut loaded, mut twin) = (connect(slowed), connect(quiet));
    // Once for what is done once.
    compare(&mut loaded, &mut twin);
    let (before, _) = compare(&mut loaded, &mut twin);

    // The control plane has most of them; the agent has the rest of as many as there should be.
    let of_agent = (SLOW - at_one).min(at_one).max(at_one / 20);
    let ports = std::iter::repeat_n(slowed.port, at_one - READERS);
    let ports = ports.chain(std::iter::repeat_n(slowed.agent_port, of_agent));
    let mut held: Vec<(u16, Slow, TcpStream)> = Vec::new();
    for (number, port) in ports.enumerate() {
        let slow = Slow::of(number);
        held.push((port, slow, slow.open(port).expect("the kernel takes connections")));
    }
    let readers = (0..READERS).map(|_| {
        let mut tcp = TcpStream::connect(("127.0.0.1", slowed.port)).expect("a connection");
        let body = r#"{"model":"m","prompt":"flood","stream":true}"#;
        let length = body.len();
        write!(tcp, "POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n{body}")
            .expect("sent");
        tcp.set_nonblocking(true).expect("a socket option");
        tcp
    });
    let readers: Vec<TcpStream> = readers.collect();
    until("all streams to begin", || {
        let running = metric(slowed.port, "orchestratord_requests_in_flight")?;
        (running >= READERS as f64).then_some(())
    });
    let count = held.len() + READERS;
    let (stop, reopened) = (AtomicBool::new(false), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        let halves = held.len() / 2;
        let rest = held.split_off(halves);
        let (stop, reopened) = (&stop, &reopened);
        scope.spawn(move || dribble(held, stop, reopened));
        scope.spawn(move || dribble(rest, stop, reopened));
        scope.spawn(move || sip(readers, stop));
        let verdict = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            judge(&format!("{count} slow clients"), before, &mut loaded, &mut twin);
            // And whoever comes now is served too.
            connect(slowed).ask().expect("an answer")
        }));
        stop.store(true, Ordering::SeqCst);
        match verdict {
            Ok(fresh) => eprintln!("a new client beside them: {fresh:?}"),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    });
    for (whose, plane) in [("with them", slowed), ("without", quiet)] {
        let longest = metric(plane.port, "orchestratord_loop_turn_seconds_max").unwrap_or_default();
        eprintln!("longest turn of a loop {whose}: {:.1} ms", longest * 1e3);
    }
    eprintln!("{} were closed for their slowness and came again", reopened.load(Ordering::SeqCst));
}

/// A control plane that speaks TLS, with an engine beside it.
struct Secured {
    _directory: tempfile::TempDir,
    _daemon: Process,
    port: u16,
}

impl Secured {
    fn start(pki: &Pki, engine: &str) -> Secured {
        let directory = tempfile::tempdir().expect("a directory");
        pki.issue(&["localhost"]).save(directory.path(), "own");
        let port = free_port();
        let address = format!("127.0.0.1:{port}");
        let env = [
            ("ORCHESTRATORD_ADDR", address.as_str()),
            ("ORCHESTRATORD_TLS_CERT", "own.crt"),
            ("ORCHESTRATORD_TLS_KEY", "own.key"),
        ];
        let daemon = Process::start(ORCHESTRATORD, &[], &env, directory.path());
        let handoff =
            format!(r#"{{"pool_id":"pool-0","replica_id":"m","url":"{engine}","slots":64,"model":"m"}}"#);
        hand_over(&directory.path().join(".runtime/engines"), "m.json", &handoff);
        Secured { _directory: directory, _daemon: daemon, port }
    }

    fn connect(&self, config: &Arc<ClientConfig>) -> Other {
        until("an engine behind TLS", || {
            let mut other = Other::connect(self.port, Some(config)).ok()?;
            other.ask().ok().map(|_| other)
        })
    }
}

#[test]
#[allow(clippy::print_stderr, reason = "the figures are worth reading")]
fn handshakes_by_the_thousand_cost_the_others_five_milliseconds_at_most() {
    let pki = Pki::new();
    let config = pki.client(None);
    let engine = engine();
    let [slowed, quiet] = [(); 2].map(|()| Secured::start(&pki, &engine));
    let (mut loaded, mut twin) = (slowed.connect(&config), quiet.connect(&config));
    compare(&mut loaded, &mut twin);
    let (before, _) = compare(&mut loaded, &mut twin);

    let slow = slow_clients_max() / 2;
    let (stop, done) = (AtomicBool::new(false), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        // Half of them begin a handshake and never go on with it.
        let (stop, done, port, config) = (&stop, &done, slowed.port, &config);
        scope.spawn(move || {
            let mut held = std::collections::VecDeque::new();
            while !stop.load(Ordering::SeqCst) {
                if held.len() >= slow {
                    held.pop_front();
                }
                if let Ok(mut tcp) = TcpStream::connect(("127.0.0.1", port)) {
                    let _ = tcp.write(&[22, 3, 1, 2, 0, 1, 0, 1, 252, 3, 3]);
                    held.push_back(tcp);
                    done.fetch_add(1, Ordering::SeqCst);
                }
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        // The others complete one and leave, each as fast as it can.
        for _ in 0..2 {
            scope.spawn(move || {
                while !stop.load(Ordering::SeqCst) {
                    if Other::connect(port, Some(config)).is_ok() {
                        done.fetch_add(1, Ordering::SeqCst);
                    }
                }
            });
        }
        let verdict = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            judge("handshakes without an end", before, &mut loaded, &mut twin);
            // As many as there should be, whatever the first rounds said.
            while done.load(Ordering::SeqCst) < HANDSHAKES {
                loaded.ask().expect("an answer");
                std::thread::sleep(Duration::from_millis(1));
            }
        }));
        stop.store(true, Ordering::SeqCst);
        if let Err(panic) = verdict {
            std::panic::resume_unwind(panic);
        }
    });
    eprintln!("{} handshakes", done.load(Ordering::SeqCst));
    loaded.ask().expect("an answer");
}
