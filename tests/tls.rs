//! TLS in real daemons over real sockets: who gets in, what is refused, what goes on while certificates
//! change, and whether other people's clients agree.

#[allow(dead_code, reason = "other tests use the rest of it")]
#[path = "daemons/harness.rs"]
mod harness;
mod tls_support;

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use harness::*;
use rustix::process::Signal;
use rustls::ClientConfig;
use serde_json::{Value, json};
use tls_support::{Pair, Pki, Socket};

const CHAT: &str = "/v1/chat/completions";

/// Connects and completes a handshake with whoever proves to be localhost.
fn connect(port: u16, config: &Arc<ClientConfig>) -> std::io::Result<Socket> {
    let tcp = TcpStream::connect(("127.0.0.1", port))?;
    tcp.set_read_timeout(Some(PATIENCE))?;
    tcp.set_nodelay(true)?;
    let socket = Socket::client(tcp, "localhost", config);
    socket.handshake()?;
    Ok(socket)
}

/// An exchange on a connection of its own. `Err` where no answer came.
fn exchange(
    port: u16,
    config: &Arc<ClientConfig>,
    method: &str,
    path: &str,
    body: &str,
) -> std::io::Result<(u16, String)> {
    let mut socket = connect(port, config)?;
    let length = body.len();
    let head = format!(
        "{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n"
    );
    socket.write_all(&[head.as_bytes(), body.as_bytes()].concat())?;
    let mut text = String::new();
    socket.read_to_string(&mut text)?;
    let status = text.get(9..12).and_then(|code| code.parse().ok());
    let status = status.ok_or_else(|| std::io::Error::other(format!("no answer: {text:?}")))?;
    let body = text.split_once("\r\n\r\n").map_or("", |(_, body)| body);
    Ok((status, body.to_string()))
}

/// An exchange of JSON, chunks undone by their line ends.
fn ask_json(port: u16, config: &Arc<ClientConfig>, path: &str) -> Option<Value> {
    let (_, body) = exchange(port, config, "GET", path, "").ok()?;
    let json = &body[body.find(['{', '['])?..=body.rfind(['}', ']'])?];
    serde_json::from_str(json).ok()
}

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

/// One daemon with a certificate.
struct Secured {
    directory: tempfile::TempDir,
    pki: Pki,
    port: u16,
    daemon: Process,
}

impl Secured {
    /// A control plane in the CLOUD profile that asks nodes for certificates.
    fn control(env: &[(&str, &str)]) -> Secured {
        let pki = Pki::new();
        let pair = pki.issue(&["control-1", "localhost", "127.0.0.1"]);
        Secured::start(ORCHESTRATORD, "ORCHESTRATORD", pki, &pair, env)
    }

    fn start(program: &str, prefix: &str, pki: Pki, pair: &Pair, env: &[(&str, &str)]) -> Secured {
        let directory = tempfile::tempdir().expect("a directory");
        pair.save(directory.path(), "own");
        fs::write(directory.path().join("ca.crt"), &pki.ca_pem).expect("written");
        let port = free_port();
        let own = [
            ("CLOUD_PROFILE", "true".to_string()),
            ("ADDR", format!("127.0.0.1:{port}")),
            ("TLS_CERT", "own.crt".into()),
            ("TLS_KEY", "own.key".into()),
            ("TLS_CLIENT_CA", "ca.crt".into()),
        ]
        .map(|(name, value)| (format!("{prefix}_{name}"), value));
        let mut all: Vec<(&str, &str)> = own.iter().map(|(name, value)| (&name[..], &value[..])).collect();
        all.push(("LLORCH_TLS_CA", "ca.crt"));
        all.extend(env);
        let daemon = Process::start(program, &[], &all, directory.path());
        let secured = Secured { directory, pki, port, daemon };
        let anybody = secured.pki.client(None);
        until("the daemon", || exchange(port, &anybody, "GET", "/health", "").ok());
        secured
    }

    /// A node agent of that control plane, which it dials by name.
    fn agent(&self, node: &str, port: u16, pair: &Pair) -> Process {
        let directory = self.directory.path().join(node);
        fs::create_dir_all(&directory).expect("a directory");
        pair.save(&directory, "own");
        fs::write(directory.join("ca.crt"), &self.pki.ca_pem).expect("written");
        let (addr, address) = (format!("127.0.0.1:{port}"), format!("https://localhost:{port}"));
        let control = format!("https://localhost:{}", self.port);
        let env = [
            ("POOL_MANAGERD_CLOUD_PROFILE", "true"),
            ("POOL_MANAGERD_NODE_ID", node),
            ("POOL_MANAGERD_ADDR", &addr),
            ("POOL_MANAGERD_ADDRESS", &address),
            ("ORCHESTRATORD_URL", &control),
            ("POOL_MANAGERD_TLS_CERT", "own.crt"),
            ("POOL_MANAGERD_TLS_KEY", "own.key"),
            ("POOL_MANAGERD_TLS_CLIENT_CA", "ca.crt"),
            ("LLORCH_TLS_CA", "ca.crt"),
        ];
        Process::start(POOL_MANAGERD, &[], &env, &directory)
    }

    fn metric(&self, name: &str) -> Option<f64> {
        scraped(self.port, &self.pki.client(None), name)
    }

    fn until_routable(&self, count: f64) {
        until("replicas", || self.metric("orchestratord_replicas_routable").filter(|n| *n == count));
    }
}

fn scraped(port: u16, config: &Arc<ClientConfig>, name: &str) -> Option<f64> {
    let (_, body) = exchange(port, config, "GET", "/metrics", "").ok()?;
    let line = body.lines().find(|line| line.starts_with(&format!("{name} ")))?.to_string();
    line.rsplit_once(' ')?.1.parse().ok()
}

fn chat(max_tokens: u32) -> String {
    json!({"messages": [{"role": "user", "content": "Hello"}], "stream": true, "max_tokens": max_tokens})
        .to_string()
}

#[test]
fn with_certificates_everywhere_a_node_registers_and_its_engine_streams() {
    let control = Secured::control(&[]);
    let (agent_port, engine_port) = (free_port(), free_port());
    let pair = control.pki.issue(&["gpu-node-1", "localhost"]);
    let agent = control.agent("gpu-node-1", agent_port, &pair);
    let engines = control.directory.path().join("gpu-node-1/.runtime/engines");
    let _engine = demo_engine(engine_port, &["--tokens-per-second", "0"], control.directory.path());
    hand_over(&engines, "r0.json", &handoff(engine_port, "r0", 4));
    control.until_routable(1.0);
    let anybody = control.pki.client(None);
    for _ in 0..3 {
        let (status, body) = exchange(control.port, &anybody, "POST", CHAT, &chat(32)).expect("an answer");
        assert!(status == 200 && body.contains("data: [DONE]"), "{status} {body}");
    }
    // The engine is on the node's loopback: its agent was asked, within TLS and with a certificate.
    let relayed = "pool_managerd_relayed_total{outcome=\"answered\"}";
    assert_eq!(scraped(agent_port, &anybody, relayed), Some(3.0), "{}", agent.log());

    // Without a certificate the agent says no more than probes and scrapes need.
    for (path, status) in [("/health", 200), ("/metrics", 200), ("/v2/pools", 403), ("/pools", 403)] {
        let (found, body) = exchange(agent_port, &anybody, "GET", path, "").expect("an answer");
        assert_eq!(found, status, "{path}: {body}");
        assert_eq!(body.contains("CERTIFICATE_REQUIRED"), status == 403, "{body}");
    }
    let somebody = control.pki.client(Some(&control.pki.issue(&["operator"])));
    assert_eq!(exchange(agent_port, &somebody, "GET", "/v2/pools", "").expect("an answer").0, 200);
}

#[test]
fn a_node_speaks_for_itself_only() {
    let control = Secured::control(&[]);
    let (a, b, none) = (
        control.pki.client(Some(&control.pki.issue(&["node-a"]))),
        control.pki.client(Some(&control.pki.issue(&["some machine", "node-b"]))),
        control.pki.client(None),
    );
    let register = |node: &str| json!({"node_id": node, "address": "http://127.0.0.1:1"}).to_string();
    let send = |config, method, path: &str, body: &str| {
        exchange(control.port, config, method, path, body).expect("an answer")
    };
    let beat = r#"{"timestamp":"2026-01-01T00:00:00Z","pools":[]}"#;
    for (config, node, good) in [
        (&a, "node-b", false),
        (&none, "node-a", false),
        (&a, "NODE-A", false),
        (&a, "node-a", true),
        (&b, "node-b", true),
    ] {
        let (status, body) = send(config, "POST", "/v2/nodes/register", &register(node));
        assert_eq!(status, if good { 200 } else { 403 }, "{node}: {body}");
        assert!(good || (body.contains("CERTIFICATE_MISMATCH") && body.contains(node)), "{body}");
    }
    let named = send(&a, "POST", "/v2/nodes/register", &register("node-b")).1;
    assert!(named.contains("the certificate is that of node-a"), "{named}");
    for (config, status) in [(&a, 403), (&none, 403), (&b, 200)] {
        assert_eq!(send(config, "POST", "/v2/nodes/node-b/heartbeat", beat).0, status);
    }
    assert_eq!(send(&a, "DELETE", "/v2/nodes/node-b", "").0, 403);
    assert_eq!(send(&none, "POST", "/callbacks/pool-ready", r#"{"pool_id":"pool-0"}"#).0, 403);
    assert_eq!(
        send(&a, "POST", "/callbacks/pool-ready", r#"{"pool_id":"pool-0"}"#).0,
        404,
        "it was looked for"
    );
    assert_eq!(send(&none, "GET", "/v2/nodes", "").0, 200, "other routes need no certificate");
    assert_eq!(send(&b, "DELETE", "/v2/nodes/node-b", "").0, 204);

    // An agent is told why, and says so.
    let agent = control.agent("node-c", free_port(), &control.pki.issue(&["node-d", "localhost"]));
    until("the agent's complaint", || {
        agent.log().contains("the certificate is that of node-d, localhost, not of node node-c").then_some(())
    });
}

#[test]
fn certificates_that_prove_nothing_are_refused_on_both_sides() {
    let control = Secured::control(&[]);
    // Of another CA, and expired: the handshake fails, so that nothing is served.
    let stranger = Pki::new().issue(&["node-a"]);
    let expired = control.pki.issue_until(&["node-a"], 2021);
    for bad in [&stranger, &expired] {
        let config = control.pki.client(Some(bad));
        let refused = exchange(control.port, &config, "GET", "/health", "");
        assert!(refused.is_err(), "{refused:?}");
    }
    until("both to be counted", || {
        (control.metric("orchestratord_tls_handshakes_total{outcome=\"failed\"}")? >= 2.0).then_some(())
    });
    // A control plane that is expired, or somebody else: its nodes stay away, and say why.
    for (names, year, why) in [
        (&["localhost"][..], 2021, "certificate expired"),
        (&["control-2", "127.0.0.2"], 2090, "not valid for name"),
    ] {
        let pki = Pki::new();
        let pair = pki.issue_until(names, year);
        let directory = tempfile::tempdir().expect("a directory");
        let server = TlsServer::start(pki.server(&pair, false), |_| (200, "{}".into()));
        fs::write(directory.path().join("ca.crt"), &pki.ca_pem).expect("written");
        let url = format!("https://localhost:{}", server.port);
        let addr = format!("127.0.0.1:{}", free_port());
        let agent = Process::start(
            POOL_MANAGERD,
            &[],
            &[
                ("POOL_MANAGERD_CLOUD_PROFILE", "true"),
                ("POOL_MANAGERD_ADDR", &addr),
                ("ORCHESTRATORD_URL", &url),
                ("LLORCH_TLS_CA", "ca.crt"),
            ],
            directory.path(),
        );
        let log =
            until("the agent's complaint", || Some(agent.log()).filter(|log| log.contains("certificate")));
        assert!(log.contains(why), "{log}");
        assert_eq!(server.requests(), 0, "nothing was said to it");
    }
}

/// A server with TLS that answers every request as `answer` says.
struct TlsServer {
    port: u16,
    heads: Arc<Mutex<Vec<String>>>,
}

impl TlsServer {
    fn start(
        config: Arc<rustls::ServerConfig>,
        answer: impl Fn(&str) -> (u16, String) + Send + Sync + 'static,
    ) -> TlsServer {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("an address").port();
        let heads = Arc::new(Mutex::new(Vec::new()));
        let (seen, answer) = (heads.clone(), Arc::new(answer));
        std::thread::spawn(move || {
            for tcp in listener.incoming() {
                let socket = Socket::server(tcp.expect("a connection"), &config);
                let (seen, answer) = (seen.clone(), answer.clone());
                std::thread::spawn(move || {
                    if socket.handshake().is_ok() {
                        serve(&socket, &seen, &*answer);
                    }
                });
            }
        });
        TlsServer { port, heads }
    }

    fn requests(&self) -> usize {
        self.heads.lock().expect("no panic").len()
    }
}

fn serve(socket: &Socket, seen: &Mutex<Vec<String>>, answer: &dyn Fn(&str) -> (u16, String)) {
    let mut reader = BufReader::new(socket);
    loop {
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            if !matches!(reader.read_line(&mut head), Ok(1..)) {
                return;
            }
        }
        let length = head.lines().find_map(|line| {
            line.to_ascii_lowercase().strip_prefix("content-length: ").map(|n| n.parse().expect("a number"))
        });
        let mut body = vec![0; length.unwrap_or(0)];
        if reader.read_exact(&mut body).is_err() {
            return;
        }
        let (status, body) = answer(&head);
        seen.lock().expect("no panic").push(head);
        let length = body.len();
        let answer = format!(
            "HTTP/1.1 {status} S\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}"
        );
        if (&mut &*socket).write_all(answer.as_bytes()).is_err() {
            return;
        }
    }
}

#[test]
fn engines_and_callbacks_may_speak_https() {
    let pki = Pki::new();
    let pair = pki.issue(&["localhost"]);
    let answer = |head: &str| match head.split(' ').nth(1) {
        Some(CHAT) => (200, r#"{"model":"m","choices":[],"usage":{"prompt_tokens":1}}"#.to_string()),
        Some("/v1/models") => (200, r#"{"data":[{"id":"m"}]}"#.into()),
        Some("/health" | "/told") => (200, "{}".into()),
        _ => (404, "{}".into()),
    };
    // It wants to see a certificate: the one that the daemons show as clients.
    let engine = TlsServer::start(pki.server(&pair, true), answer);
    let url = format!("https://localhost:{}", engine.port);
    let directory = tempfile::tempdir().expect("a directory");
    fs::write(directory.path().join("ca.crt"), &pki.ca_pem).expect("written");
    pki.issue(&["control-1"]).save(directory.path(), "client");
    let client = [
        ("LLORCH_TLS_CA", "ca.crt"),
        ("LLORCH_TLS_CLIENT_CERT", "client.crt"),
        ("LLORCH_TLS_CLIENT_KEY", "client.key"),
    ];
    let (control_port, agent_port) = (free_port(), free_port());
    let (control_addr, agent_addr) = (format!("127.0.0.1:{control_port}"), format!("127.0.0.1:{agent_port}"));
    let own = [("ORCHESTRATORD_ADDR", control_addr.as_str())];
    let _control = Process::start(ORCHESTRATORD, &[], &[&own[..], &client].concat(), directory.path());
    let told = format!("{url}/told");
    let own = [
        ("POOL_MANAGERD_ADDR", agent_addr.as_str()),
        ("POOL_MANAGERD_ORCHESTRATORD_CALLBACK_URL", told.as_str()),
    ];
    let _agent = Process::start(POOL_MANAGERD, &[], &[&own[..], &client].concat(), directory.path());
    let handoff = json!({"url": url, "pool_id": "pool-0", "replica_id": "r0", "slots": 2}).to_string();
    hand_over(&directory.path().join(".runtime/engines"), "r0.json", &handoff);
    until("a replica", || metric(control_port, "orchestratord_replicas_routable").filter(|n| *n == 1.0));
    assert_eq!(post(control_port, CHAT, r#"{"messages":[]}"#).status, 200);
    until("the callback", || {
        let heads = engine.heads.lock().expect("no panic");
        heads.iter().any(|head| head.starts_with("POST /told ")).then_some(())
    });
}

#[test]
fn a_request_in_clear_text_is_told_so_and_nothing_else() {
    let control = Secured::control(&[]);
    let answer = get(control.port, "/health").expect("an answer in clear text");
    assert!(answer.status == 400 && answer.body.contains("use https"), "{answer:?}");
    // Neither is nonsense answered, nor a handshake that stops.
    let mut tcp = TcpStream::connect(("127.0.0.1", control.port)).expect("connected");
    tcp.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    tcp.write_all(&[22, 3, 1, 0, 4, 99, 0, 0, 0]).expect("written");
    let mut said = Vec::new();
    let _ = tcp.read_to_end(&mut said);
    assert!(said.first().is_none_or(|byte| *byte == 21), "an alert or nothing, not {said:?}");
    assert_eq!(control.metric("orchestratord_tls_handshakes_total{outcome=\"clear_text\"}"), Some(1.0));
    assert_eq!(control.metric("orchestratord_tls_handshakes_unfinished"), Some(0.0), "but this one's");
}

#[test]
fn certificates_are_replaced_while_a_stream_runs() {
    let control = Secured::control(&[("ORCHESTRATORD_CLOUD_PROFILE", "false")]);
    let (directory, anybody) = (control.directory.path(), control.pki.client(None));
    let engine_port = free_port();
    let _engine = demo_engine(engine_port, &["--tokens-per-second", "25"], directory);
    hand_over(&directory.join(".runtime/engines"), "r0.json", &handoff(engine_port, "r0", 4));
    control.until_routable(1.0);
    let body = chat(100);
    let mut stream = connect(control.port, &anybody).expect("a connection");
    let length = body.len();
    write!(stream, "POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n{body}")
        .expect("sent");
    let mut lines = BufReader::new(&stream).lines();
    let mut event =
        || lines.by_ref().map(|line| line.expect("a line")).find(|line| line.starts_with("data: "));
    assert!(event().is_some_and(|first| first.contains("choices")));

    let shown = || connect(control.port, &anybody).ok()?.peer_certificate();
    let old = shown().expect("a certificate");
    let new = control.pki.issue(&["control-1", "localhost"]);
    new.save(directory, "own");
    let second = until("the new certificate", || shown().filter(|shown| *shown != old));
    // Broken pairs change nothing, and the log names the file.
    fs::write(directory.join("own.crt"), "-----BEGIN CERTIFICATE-----\nnonsense\n").expect("written");
    until("a warning", || {
        let log = control.daemon.log();
        let warned = log.lines().any(|line| {
            line.contains("goes on with the old") && line.contains("ORCHESTRATORD_TLS_CERT=own.crt")
        });
        warned.then_some(())
    });
    assert_eq!(shown().as_ref(), Some(&second));
    control.daemon.signal(Signal::HUP);
    until("a second warning", || {
        (control.metric("orchestratord_tls_reloads_total{outcome=\"failed\"}")? >= 2.0).then_some(())
    });
    assert_eq!(shown().as_ref(), Some(&second));
    // A pair that is renamed into its place.
    let third = control.pki.issue(&["localhost"]);
    third.save(directory, "next");
    fs::rename(directory.join("next.key"), directory.join("own.key")).expect("renamed");
    fs::rename(directory.join("next.crt"), directory.join("own.crt")).expect("renamed");
    until("the third certificate", || shown().filter(|shown| *shown != second && *shown != old));

    // All of this went on beside the stream.
    let mut count = 1;
    let last = std::iter::from_fn(&mut event).inspect(|_| count += 1).find(|data| data == "data: [DONE]");
    assert!(last.is_some() && count > 50, "{count} events");
}

#[test]
fn what_an_operator_should_know_is_in_the_log() {
    use std::os::unix::fs::PermissionsExt;
    let directory = tempfile::tempdir().expect("a directory");
    let pki = Pki::new();
    let (_, key) = pki.issue_until(&["localhost"], 2021).save(directory.path(), "own");
    fs::set_permissions(&key, fs::Permissions::from_mode(0o644)).expect("a mode");
    let addr = format!("127.0.0.1:{}", free_port());
    let env = [
        ("POOL_MANAGERD_ADDR", addr.as_str()),
        ("POOL_MANAGERD_TLS_CERT", "own.crt"),
        ("POOL_MANAGERD_TLS_KEY", "own.key"),
    ];
    let daemon = Process::start(POOL_MANAGERD, &[], &env, directory.path());
    until("both warnings", || {
        let log = daemon.log();
        let readable = log.contains("POOL_MANAGERD_TLS_KEY=own.key: everybody on this machine can read");
        (readable && log.contains("POOL_MANAGERD_TLS_CERT=own.crt: this certificate has EXPIRED"))
            .then_some(())
    });
    drop(daemon);
    // What cannot be used from the start ends the start.
    for (file, variable) in [("own.key", "POOL_MANAGERD_TLS_KEY"), ("own.crt", "POOL_MANAGERD_TLS_CERT")] {
        fs::write(directory.path().join(file), "nonsense").expect("written");
        let mut daemon = Process::start(POOL_MANAGERD, &[], &env, directory.path());
        assert_eq!(daemon.end(), Some(78));
        assert!(daemon.log().contains(&format!("{variable}={file}: ")), "{}", daemon.log());
    }
}

#[test]
fn a_handshake_that_never_ends_is_ended() {
    let control = Secured::control(&[]);
    let begun = Instant::now();
    let mut tcp = TcpStream::connect(("127.0.0.1", control.port)).expect("connected");
    let limit = Duration::from_millis(llama_orch::net::tls::HANDSHAKE_MS);
    tcp.set_read_timeout(Some(limit + PATIENCE)).expect("a timeout");
    tcp.write_all(&[22, 3, 1, 2, 0, 1]).expect("written");
    assert_eq!(tcp.read(&mut [0; 16]).expect("an end"), 0);
    assert!(begun.elapsed() >= limit, "{:?}", begun.elapsed());
    assert_eq!(control.metric("orchestratord_tls_handshakes_total{outcome=\"expired\"}"), Some(1.0));
}

#[test]
fn a_flood_of_whole_handshakes_leaves_the_others_alone() {
    let control = Secured::control(&[]);
    let anybody = control.pki.client(None);
    let (stop, done) = (AtomicBool::new(false), AtomicUsize::new(0));
    let mut taken = std::thread::scope(|scope| {
        let other = scope.spawn(|| latencies(control.port, &anybody, &stop));
        for _ in 0..8 {
            scope.spawn(|| {
                for _ in 0..150 {
                    connect(control.port, &anybody).expect("a handshake");
                    done.fetch_add(1, Ordering::SeqCst);
                }
            });
        }
        until("the flood to pass", || (done.load(Ordering::SeqCst) == 1_200).then_some(()));
        stop.store(true, Ordering::SeqCst);
        other.join().expect("no panic")
    });
    taken.sort();
    let p99 = taken[taken.len() * 99 / 100];
    report(&format!("1200 handshakes, 8 at a time: p99 of others {p99:?} of {}", taken.len()));
    assert!(p99 < Duration::from_millis(200), "{p99:?}");
}

/// Raises this process' own limit on descriptors and says how many connections a test may open.
fn connections_max(wanted: usize) -> usize {
    let limit = llama_orch::service::machine::raise_descriptor_limit().unwrap_or(1024);
    wanted.min(usize::try_from(limit).unwrap_or(wanted).saturating_sub(500))
}

/// Latencies of requests on a kept connection, from one thread, until `stop`.
fn latencies(port: u16, config: &Arc<ClientConfig>, stop: &AtomicBool) -> Vec<Duration> {
    let mut socket = connect(port, config).expect("a connection");
    let mut taken = Vec::new();
    let mut buffer = [0; 4096];
    while !stop.load(Ordering::SeqCst) {
        let begun = Instant::now();
        socket.write_all(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n").expect("sent");
        assert!(socket.read(&mut buffer).expect("an answer") > 0);
        taken.push(begun.elapsed());
        std::thread::sleep(Duration::from_millis(1));
    }
    taken.sort();
    taken
}

#[test]
fn ten_thousand_slow_handshakes_leave_the_others_alone() {
    let control = Secured::control(&[]);
    let anybody = control.pki.client(None);
    let (stop, opened) = (AtomicBool::new(false), AtomicUsize::new(0));
    let wanted = connections_max(10_000);
    let taken = std::thread::scope(|scope| {
        let others: Vec<_> =
            (0..2).map(|_| scope.spawn(|| latencies(control.port, &anybody, &stop))).collect();
        // A hello of 512 bytes is announced; some of it comes, and more of it now and then.
        let mut slow: Vec<TcpStream> = Vec::new();
        let mut fresh: Vec<Duration> = Vec::new();
        while slow.len() < wanted {
            let Ok(mut tcp) = TcpStream::connect(("127.0.0.1", control.port)) else { break };
            tcp.set_nonblocking(true).expect("a socket option");
            let _ = tcp.write(&[22, 3, 1, 2, 0, 1, 0, 1, 252, 3, 3]);
            slow.push(tcp);
            opened.fetch_add(1, Ordering::SeqCst);
            if slow.len().is_multiple_of(1_000) {
                for tcp in &mut slow {
                    let _ = tcp.write(&[0]);
                }
                let begun = Instant::now();
                let (status, _) = exchange(control.port, &anybody, "GET", "/health", "").expect("an answer");
                assert_eq!(status, 200, "whoever means it still gets in");
                fresh.push(begun.elapsed());
            }
        }
        let unfinished = control.metric("orchestratord_tls_handshakes_unfinished").expect("a number");
        assert!(unfinished <= llama_orch::net::tls::HANDSHAKES_MAX as f64 + 1.0, "{unfinished}");
        stop.store(true, Ordering::SeqCst);
        let slowest_fresh = fresh.iter().max().copied().unwrap_or_default();
        assert!(slowest_fresh < Duration::from_secs(5), "a new client waited {slowest_fresh:?}");
        others.into_iter().flat_map(|other| other.join().expect("no panic")).collect::<Vec<_>>()
    });
    let mut taken = taken;
    taken.sort();
    let p99 = taken[taken.len() * 99 / 100];
    // A few milliseconds where the machine has nothing else to do.
    report(&format!("{} slow handshakes: p99 {p99:?} of {}", opened.into_inner(), taken.len()));
    assert!(p99 < Duration::from_millis(200), "{p99:?}");
    // None of them may stay for ever.
    let late = Instant::now() + Duration::from_millis(llama_orch::net::tls::HANDSHAKE_MS) + PATIENCE;
    while control.metric("orchestratord_tls_handshakes_unfinished").is_none_or(|n| n > 1.0) {
        assert!(Instant::now() < late, "unfinished handshakes stay");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[allow(clippy::print_stderr, reason = "figures for whoever reads the test's output")]
fn report(text: &str) {
    eprintln!("{text}");
}

/// What idle connections cost, in bytes each, of resident memory.
fn idle_cost(port: u16, pid: u32, count: usize, open: impl Fn() -> Socket) -> f64 {
    let resident = || {
        let text = fs::read_to_string(format!("/proc/{pid}/statm")).expect("a process");
        let pages: u64 = text.split(' ').nth(1).and_then(|n| n.parse().ok()).expect("a number");
        pages * rustix::param::page_size() as u64
    };
    let request = |socket: &mut Socket| {
        socket.write_all(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n").expect("sent");
        assert!(socket.read(&mut [0; 4096]).expect("an answer") > 0, "port {port}");
    };
    let mut connections: Vec<Socket> = Vec::new();
    let mut grow = |to: usize| {
        while connections.len() < to {
            let mut socket = open();
            request(&mut socket);
            connections.push(socket);
        }
        resident()
    };
    // What is grown once for all of them is no cost of each.
    let before = grow(200);
    let after = grow(200 + count);
    (after.saturating_sub(before)) as f64 / count as f64
}

#[test]
fn a_connection_within_tls_costs_at_most_12_kib_more() {
    let (control, plain) = (Secured::control(&[]), Home::start(&[]));
    let pair = control.pki.issue(&["node-a"]);
    let config = control.pki.client(Some(&pair));
    let count = connections_max(2_000).min(2_000);
    let secured =
        idle_cost(control.port, control.daemon.pid(), count, || connect(control.port, &config).expect("TLS"));
    let clear = idle_cost(plain.port, plain.daemon.pid(), count, || {
        Socket::plain(TcpStream::connect(("127.0.0.1", plain.port)).expect("connected"))
    });
    report(&format!("an idle connection: {secured:.0} bytes with certificates, {clear:.0} in the clear"));
    assert!(secured - clear <= 12.0 * 1024.0, "{secured} and {clear} bytes");
}

/// The blocks of commands under a heading of the README, in order.
fn commands_of(heading: &str) -> Vec<String> {
    let readme =
        fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md")).expect("a README");
    let section = readme.split_once(&format!("\n## {heading}\n")).expect("the heading").1;
    let section = section.split_once("\n## ").map_or(section, |(section, _)| section);
    let blocks = section.split("```sh\n").skip(1);
    blocks.map(|block| block.split_once("\n```").expect("an end").0.to_string()).collect()
}

fn has(program: &str) -> bool {
    let found = Command::new(program).arg("--version").output().is_ok();
    if !found {
        report(&format!("skipped: there is no {program}"));
    }
    found
}

/// `NAME=value` words of commands, up to each program's name.
fn environments(block: &str) -> Vec<(String, Vec<(String, String)>)> {
    let mut programs = Vec::new();
    let mut environment = Vec::new();
    for word in block.split_whitespace().filter(|word| *word != "\\") {
        match word.split_once('=') {
            Some((name, value)) => environment.push((name.to_string(), value.to_string())),
            None => programs.push((word.to_string(), std::mem::take(&mut environment))),
        }
    }
    programs
}

#[test]
fn the_private_ca_of_the_readme_works_as_written() {
    if !has("openssl") {
        return;
    }
    let blocks = commands_of("Encrypt it");
    let directory = tempfile::tempdir().expect("a directory");
    let made = Command::new("sh").args(["-euc", &blocks[0]]).current_dir(directory.path()).output();
    let made = made.expect("a shell");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let (control_port, agent_port, engine_port) = (free_port(), free_port(), free_port());
    // As written, but for the ports, and for names that only a network would know.
    let on_this_machine = |value: &str| {
        value
            .replace("0.0.0.0:8080", &format!("127.0.0.1:{control_port}"))
            .replace("0.0.0.0:9200", &format!("127.0.0.1:{agent_port}"))
            .replace("control-1:8080", &format!("localhost:{control_port}"))
            .replace("gpu-node-1:9200", &format!("localhost:{agent_port}"))
    };
    let mut running = Vec::new();
    for (program, environment) in environments(&blocks[1]) {
        let environment: Vec<(String, String)> =
            environment.iter().map(|(name, value)| (name.clone(), on_this_machine(value))).collect();
        let environment: Vec<(&str, &str)> =
            environment.iter().map(|(name, value)| (&name[..], &value[..])).collect();
        let program = if program == "orchestratord" { ORCHESTRATORD } else { POOL_MANAGERD };
        running.push(Process::start(program, &[], &environment, directory.path()));
    }
    assert_eq!(running.len(), 2);
    let _engine = demo_engine(engine_port, &["--tokens-per-second", "0"], directory.path());
    hand_over(&directory.path().join(".runtime/engines"), "r0.json", &handoff(engine_port, "r0", 4));
    let base = format!("https://localhost:{control_port}");
    let ca = directory.path().join("ca.crt");
    until("the node", || {
        if has("curl") {
            let (_, body) = curl(&ca, &[&format!("{base}/v2/nodes")])?;
            let nodes: Value = serde_json::from_str(&body).ok()?;
            let node = &nodes["nodes"][0];
            (node["node_id"] == "gpu-node-1" && node["replicas"][0]["routable"] == true).then_some(())
        } else {
            running[0].log().contains("gpu-node-1").then_some(())
        }
    });
    if has("curl") {
        let (status, body) =
            curl(&ca, &["-N", "-d", &chat(16), &format!("{base}{CHAT}")]).expect("an answer");
        assert!(status == 200 && body.contains("data: [DONE]"), "{status} {body}");
        for (node, status) in [("gpu-node-1", 200), ("gpu-node-2", 403)] {
            let (cert, key) =
                (directory.path().join("gpu-node-1.crt"), directory.path().join("gpu-node-1.key"));
            let beat = r#"{"timestamp":"2026-01-01T00:00:00Z","pools":[]}"#;
            let url = format!("{base}/v2/nodes/{node}/heartbeat");
            let args = ["--cert", text(&cert), "--key", text(&key), "-d", beat, &url];
            assert_eq!(curl(&ca, &args).expect("an answer").0, status, "{node}");
        }
    }
}

/// What `curl` makes of it: status and body. `None` where it gets no answer.
fn curl(ca: &Path, args: &[&str]) -> Option<(u16, String)> {
    let limit = PATIENCE.as_secs().to_string();
    let output = Command::new("curl")
        .args(["-sS", "--noproxy", "*", "--max-time", &limit, "-w", "\n%{http_code}", "--cacert", text(ca)])
        .args(args)
        .output()
        .expect("curl");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let (body, status) = said.rsplit_once('\n')?;
    output.status.success().then(|| (status.parse().expect("a status"), body.to_string()))
}

const PYTHON: &str = r#"
import http.client, json, ssl, sys
port, ca, cert, key = int(sys.argv[1]), *sys.argv[2:]
for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
    context = ssl.create_default_context(cafile=ca)
    context.load_cert_chain(cert, key)
    context.set_alpn_protocols(["http/1.1"])
    context.minimum_version = context.maximum_version = version
    line = http.client.HTTPSConnection("localhost", port, context=context, timeout=20)
    for count in range(3):
        line.request("GET", "/v2/nodes")
        answer = line.getresponse()
        assert answer.status == 200 and "nodes" in json.loads(answer.read()), answer.status
    assert line.sock.selected_alpn_protocol() == "http/1.1"
    body = b"x" * 3_000_000
    line.request("POST", "/v1/chat/completions", body)
    answer = line.getresponse()
    assert answer.status == 400, answer.status
    answer.read()
    line.request("GET", "/health", headers={"Connection": "close"})
    assert line.getresponse().read()
    # Closed with a farewell: unwrap() raises where there was none.
    print(version.name, line.sock.unwrap() if line.sock else "closed")
"#;

#[test]
fn other_peoples_clients_agree() {
    let control = Secured::control(&[]);
    let directory = control.directory.path();
    let (cert, key) = control.pki.issue(&["operator"]).save(directory, "client");
    let ca = directory.join("ca.crt");
    let url = format!("https://localhost:{}/v2/nodes", control.port);
    if has("curl") {
        let pair = ["--cert", text(&cert), "--key", text(&key)];
        for version in [&["--tls-max", "1.2"][..], &["--tlsv1.3"]] {
            for identity in [&pair[..], &[]] {
                // Twice on one connection, and no other.
                let counted = ["-w", "%{num_connects}\n", "-o", "/dev/null"];
                let args = [version, identity, &[&url, &url], &counted].concat();
                let output = Command::new("curl")
                    .args(["-sS", "--noproxy", "*", "--cacert", text(&ca), "-o", "/dev/null"])
                    .args(args)
                    .output()
                    .expect("curl");
                let said = String::from_utf8_lossy(&output.stdout).into_owned();
                let complained = String::from_utf8_lossy(&output.stderr).into_owned();
                assert_eq!((said.as_str(), complained.as_str()), ("1\n0\n", ""), "{version:?}");
            }
        }
        assert_eq!(curl(&ca, &["--tls-max", "1.1", &url]), None, "too old");
        assert_eq!(curl(Path::new("/dev/null"), &[&url]), None, "nobody vouches for it");
    }
    if has("python3") {
        let port = control.port.to_string();
        let args: [&str; 6] = ["-c", PYTHON, &port, text(&ca), text(&cert), text(&key)];
        let output = Command::new("python3").args(args).output().expect("python3");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
}

#[test]
fn a_program_may_be_a_node_over_https() {
    use llama_orch::node_registration::{NodeRegistration, NodeRegistrationConfig};
    let control = Secured::control(&[]);
    let directory = control.directory.path();
    let pair = control.pki.issue(&["program-1"]).save(directory, "program");
    let config = |node: &str, tls_client: Option<(PathBuf, PathBuf)>| NodeRegistrationConfig {
        node_id: node.into(),
        address: "http://127.0.0.1:1".into(),
        orchestratord_url: format!("https://localhost:{}", control.port),
        tls_ca: Some(directory.join("ca.crt")),
        tls_client,
        ..NodeRegistrationConfig::default()
    };
    let good = NodeRegistration::new(config("program-1", Some(pair.clone())));
    good.register().expect("registered");
    let anybody = control.pki.client(None);
    let nodes = ask_json(control.port, &anybody, "/v2/nodes").expect("nodes");
    assert_eq!(nodes["nodes"][0]["node_id"], "program-1", "{nodes}");
    good.deregister().expect("gone");
    for (node, pair, why) in [
        ("program-2", Some(pair), "the certificate is that of program-1, not of node program-2"),
        ("program-1", None, "need its certificate"),
    ] {
        let error = NodeRegistration::new(config(node, pair)).register().expect_err("refused").to_string();
        assert!(error.contains(why), "{error}");
    }
}
