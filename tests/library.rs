//! The faces for other programs: a node of a real control plane, made of nothing but the library.

#[path = "daemons/harness.rs"]
#[allow(dead_code, reason = "shared with other tests, which use other parts")]
mod harness;

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use harness::*;
use llama_orch::node_registration::{
    HeartbeatPoolStatus, NodeRegistration, NodeRegistrationConfig, RegistrationError, ReplicaStatus,
};
use llama_orch::service_registry::{NodeStatus, ServiceRegistry};

const TOKEN: &str = "canary-0123456789-0123456789-0123456789";

fn control(port: u16, directory: &std::path::Path, env: &[(&str, &str)]) -> Process {
    let addr = format!("127.0.0.1:{port}");
    let own = [("ORCHESTRATORD_CLOUD_PROFILE", "true"), ("ORCHESTRATORD_ADDR", addr.as_str())];
    let daemon = Process::start(ORCHESTRATORD, &[], &[&own[..], env].concat(), directory);
    until("orchestratord", || get(port, "/health").filter(|answer| answer.status == 200));
    daemon
}

fn config(control: u16) -> NodeRegistrationConfig {
    NodeRegistrationConfig {
        node_id: "other-program".into(),
        address: "http://127.0.0.1:9".into(),
        orchestratord_url: format!("http://127.0.0.1:{control}"),
        pools: vec!["pool-0".into()],
        heartbeat_interval_secs: 1,
        ..NodeRegistrationConfig::default()
    }
}

/// The only node as the control plane shows it, once `ask` finds in it what it looks for.
fn node<T>(port: u16, what: &str, ask: impl Fn(&serde_json::Value) -> Option<T>) -> T {
    until(what, || ask(&get(port, "/v2/nodes")?.json()["nodes"][0]))
}

/// Reads a request off `stream`: its first line and its body; `None` if the client left first.
fn read_request(stream: &TcpStream) -> Option<(String, String)> {
    let mut reader = BufReader::new(stream);
    let (mut head, mut line) = (String::new(), String::new());
    while reader.read_line(&mut line).ok()? > 2 {
        head.push_str(&line);
        line.clear();
    }
    let length = head.lines().find_map(|line| {
        let (name, value) = line.split_once(": ")?;
        name.eq_ignore_ascii_case("content-length").then(|| value.parse::<usize>().expect("a length"))
    });
    let mut body = vec![0; length.unwrap_or(0)];
    std::io::Read::read_exact(&mut reader, &mut body).ok()?;
    Some((head.lines().next()?.into(), String::from_utf8(body).expect("text")))
}

fn answer(mut stream: &TcpStream, status: u16, body: &str) {
    let length = body.len();
    // Whoever stops does not wait for the answer to a call under way.
    let _ =
        write!(stream, "HTTP/1.1 {status} x\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{body}");
}

/// Relays to an engine on loopback, as whoever listens at a node's address must.
fn relay_to(engine: u16) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = listener.local_addr().expect("an address").port();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let stream = stream.expect("a connection");
            let (line, body) = read_request(&stream).expect("a request");
            let path = line.split(' ').nth(1).expect("a path");
            let path = path.strip_prefix("/v2/pools/pool-0/replicas/r0/engine").expect("the replica's path");
            let from_engine = post(engine, path, &body);
            answer(&stream, from_engine.status, &from_engine.body);
        }
    });
    port
}

#[test]
fn a_program_is_a_node_over_its_whole_life() {
    let directory = tempfile::tempdir().expect("a directory");
    let (port, engine_port) = (free_port(), free_port());
    let mut daemon = control(port, directory.path(), &[]);
    let _engine = demo_engine(engine_port, &["--prefill-ms", "0"], directory.path());
    let address = format!("http://127.0.0.1:{}", relay_to(engine_port));
    let registration = NodeRegistration::new(NodeRegistrationConfig { address, ..config(port) });

    // From any thread.
    let registered = thread::scope(|scope| scope.spawn(|| registration.register()).join());
    let registered = registered.expect("no panic").expect("registered");
    assert_eq!((registered.ttl_ms, registered.next_heartbeat_ms), (Some(30_000), Some(10_000)));
    node(port, "the node", |node| (node["status"] == "Registering").then_some(()));

    let is_ready = Arc::new(AtomicBool::new(false));
    let ready = is_ready.clone();
    let heartbeat = registration.spawn_heartbeat(move || {
        let (ready, slots) = (ready.load(Ordering::Acquire), 4);
        let replica = ReplicaStatus {
            replica_id: "r0".into(),
            url: format!("http://127.0.0.1:{engine_port}"),
            ready,
            slots_free: slots,
            ..ReplicaStatus::default()
        };
        let unnamed = HeartbeatPoolStatus { pool_id: "no name".into(), ..HeartbeatPoolStatus::default() };
        let pool = HeartbeatPoolStatus {
            pool_id: "pool-0".into(),
            ready,
            slots_free: slots,
            replicas: Some(vec![replica]),
            ..HeartbeatPoolStatus::default()
        };
        vec![unnamed, pool]
    });
    node(port, "Online", |node| {
        (node["status"] == "Online" && node["replicas"][0]["ready"] == false).then_some(())
    });
    assert!(matches!(
        registration.try_spawn_heartbeat(Vec::new),
        Err(RegistrationError::AlreadyBeating { .. })
    ));
    // Far from the next heartbeat, which the control plane wants in ten seconds: the change is told because it is announced.
    until("the interval", || Some(heartbeat.status()).filter(|status| status.interval_ms == Some(10_000)));
    let changed = Instant::now();
    is_ready.store(true, Ordering::Release);
    heartbeat.beat_now();
    node(port, "a routable replica", |node| (node["replicas"][0]["routable"] == true).then_some(()));
    assert!(changed.elapsed() < Duration::from_secs(4), "told after {:?}", changed.elapsed());
    let body = r#"{"messages":[{"role":"user","content":"one two"}],"max_tokens":3}"#;
    let said = post(port, "/v1/chat/completions", body);
    assert!(said.status == 200 && said.body.contains("[demo]"), "{said:?}");

    daemon.kill();
    let mut daemon = control(port, directory.path(), &[]);
    // It knows nobody: the next heartbeat is told so.
    heartbeat.beat_now();
    node(port, "the node again", |node| (node["replicas"][0]["routable"] == true).then_some(()));
    until("its status", || Some(heartbeat.status()).filter(|status| status.is_registered));

    heartbeat.stop();
    registration.deregister().expect("goodbye");
    let nodes = get(port, "/v2/nodes").expect("an answer").json();
    assert_eq!(nodes["count"], 0, "{nodes}");
    registration.deregister().expect("gone is gone");

    // The same program may come back: that is another incarnation.
    registration.register().expect("registered again");
    let heartbeat = registration.spawn_heartbeat(Vec::new);
    node(port, "Online again", |node| (node["status"] == "Online").then_some(()));
    // A goodbye ends heartbeats that run: nothing brings the node back.
    registration.deregister().expect("goodbye");
    until("the end of heartbeats", || Some(heartbeat.status()).filter(|status| status.state == "ended"));
    let nodes = get(port, "/v2/nodes").expect("an answer").json();
    assert_eq!(nodes["count"], 0, "{nodes}");
    daemon.kill();
}

#[test]
fn a_control_plane_that_never_answers_holds_nobody() {
    let silent = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = silent.local_addr().expect("an address").port();
    let (tell, told) = channel();
    thread::spawn(move || {
        let mut open = Vec::new();
        for stream in silent.incoming() {
            let stream = stream.expect("a connection");
            let Some((line, _)) = read_request(&stream) else { continue };
            open.push(stream);
            if tell.send(line).is_err() {
                return;
            }
        }
    });
    let registration = NodeRegistration::new(config(port));
    let begun = Instant::now();
    let error = registration.register().expect_err("no answer").to_string();
    assert!(begun.elapsed() < Duration::from_secs(5), "half a second was its limit: {:?}", begun.elapsed());
    let url = format!("http://127.0.0.1:{port}");
    for part in [url.as_str(), "other-program", "orchestratord_url"] {
        assert!(error.contains(part), "{part}: {error}");
    }
    told.recv_timeout(PATIENCE).expect("the call of register");
    let heartbeat = registration.spawn_heartbeat(Vec::new);
    for _ in 0..3 {
        let line = told.recv_timeout(PATIENCE).expect("it keeps trying");
        assert!(line.starts_with("POST /v2/nodes/register "), "{line}");
    }
    // The third call hangs now.
    let begun = Instant::now();
    heartbeat.stop();
    assert!(begun.elapsed() < Duration::from_secs(1), "stopped after {:?}", begun.elapsed());
    // Nobody there at all, and a name that does not exist.
    for url in [format!("http://127.0.0.1:{}", free_port()), "http://no-such-host.invalid:1".into()] {
        let registration =
            NodeRegistration::new(NodeRegistrationConfig { orchestratord_url: url.clone(), ..config(1) });
        let error = registration.register().expect_err("nobody there");
        assert!(matches!(error, RegistrationError::Failed { .. }) && error.to_string().contains(&url));
    }
}

#[test]
fn another_program_of_the_same_name_is_named() {
    let directory = tempfile::tempdir().expect("a directory");
    let port = free_port();
    let _daemon = control(port, directory.path(), &[]);
    let other =
        r#"{"node_id":"other-program","address":"http://127.0.0.1:7","incarnation":1,"boot_id":"another"}"#;
    assert_eq!(post(port, "/v2/nodes/register", other).status, 200);
    let registration = NodeRegistration::new(config(port));
    let error = registration.register().expect_err("the name is taken");
    assert!(matches!(error, RegistrationError::Conflict { .. }), "{error:?}");
    let text = error.to_string();
    for part in ["other-program", "another machine", "last heard from 127.0.0.1", "set another node_id"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let heartbeat = registration.spawn_heartbeat(Vec::new);
    let status = until("a step back", || {
        Some(heartbeat.status()).filter(|status| status.state == "stepped-back" && !status.is_registered)
    });
    assert!(status.reason.contains("another machine"), "{status}");
    heartbeat.stop();
    let nodes = get(port, "/v2/nodes").expect("an answer").json();
    assert_eq!(nodes["nodes"][0]["address"], "http://127.0.0.1:7", "the first keeps it: {nodes}");
}

#[test]
fn tokens_are_sent_and_never_shown() {
    let directory = tempfile::tempdir().expect("a directory");
    let port = free_port();
    let _daemon = control(port, directory.path(), &[("LLORCH_API_TOKEN", TOKEN)]);
    let with = |token: Option<&str>| {
        NodeRegistration::new(NodeRegistrationConfig { api_token: token.map(Into::into), ..config(port) })
    };
    let good = with(Some(TOKEN));
    good.register().expect("registered");
    good.deregister().expect("goodbye");
    good.register().expect("come back as another incarnation");
    assert!(!format!("{good:?}").contains(TOKEN));
    let shown = format!("{:?}", NodeRegistrationConfig { api_token: Some(TOKEN.into()), ..config(port) });
    assert!(!shown.contains(TOKEN) && shown.contains("(hidden)"), "{shown}");
    for (token, says) in [(None, "it wants a token"), (Some("wrong"), "it refuses the token")] {
        let error = with(token).register().expect_err("refused");
        assert!(error.to_string().contains(says) && !error.to_string().contains("wrong"), "{error}");
    }
    let unusable = with(Some("canary with blanks")).register().expect_err("no token").to_string();
    assert!(unusable.contains("api_token") && !unusable.contains("canary"), "{unusable}");

    // A server that repeats what it was sent.
    let echo = TcpListener::bind("127.0.0.1:0").expect("a port");
    let echo_port = echo.local_addr().expect("an address").port();
    thread::spawn(move || {
        let (stream, _) = echo.accept().expect("a connection");
        read_request(&stream).expect("a request");
        answer(&stream, 500, &format!("what is Bearer {TOKEN}?"));
    });
    let config = NodeRegistrationConfig { api_token: Some(TOKEN.into()), ..config(echo_port) };
    let error = NodeRegistration::new(config).register().expect_err("status 500");
    assert!(error.to_string().contains("what is Bearer (hidden)?"), "{error}");
    assert!(!format!("{error:?}").contains(TOKEN), "{error:?}");
}

#[test]
fn what_is_wrong_is_said_before_anything_is_sent() {
    let refused = |config: NodeRegistrationConfig, field: &str| {
        let registration = NodeRegistration::new(config);
        let results = [
            registration.register().map(|_| ()),
            registration.try_spawn_heartbeat(Vec::new).map(|_| ()),
            registration.deregister(),
        ];
        for result in results {
            let error = result.expect_err("refused").to_string();
            assert!(error.starts_with(&format!("NodeRegistrationConfig.{field}: ")), "{error}");
        }
    };
    refused(NodeRegistrationConfig { node_id: "a b".into(), ..config(1) }, "node_id");
    refused(NodeRegistrationConfig { address: String::new(), ..config(1) }, "address");
    refused(NodeRegistrationConfig { orchestratord_url: "c:1".into(), ..config(1) }, "orchestratord_url");
    let secure = "https://control:8443".to_string();
    let no_roots = Some("/nowhere/ca.pem".into());
    refused(
        NodeRegistrationConfig { orchestratord_url: secure, tls_ca: no_roots, ..config(1) },
        "tls_ca, tls_client",
    );
    refused(NodeRegistrationConfig { pools: vec!["../x".into()], ..config(1) }, "pools");

    let home = Home::start(&[]);
    let error = NodeRegistration::new(config(home.port)).register().expect_err("no nodes there");
    assert!(error.to_string().contains("ORCHESTRATORD_CLOUD_PROFILE=true"), "{error}");
}

#[test]
fn a_closure_that_panics_ends_its_heartbeats_and_nothing_else() {
    let registration = NodeRegistration::new(config(free_port()));
    let directory = tempfile::tempdir().expect("a directory");
    let port = free_port();
    let _daemon = control(port, directory.path(), &[]);
    let registration_there = NodeRegistration::new(config(port));
    let broken = registration_there.spawn_heartbeat(|| panic!("on purpose"));
    let status = until("the end", || Some(broken.status()).filter(|status| status.state == "ended"));
    assert!(!status.is_registered && status.reason.contains("failed"), "{status}");
    let heartbeat = until("a place", || registration_there.try_spawn_heartbeat(Vec::new).ok());
    node(port, "Online", |node| (node["status"] == "Online").then_some(()));
    drop((broken, heartbeat));
    // Where nobody listens the closure is never asked.
    let heartbeat = registration.spawn_heartbeat(|| panic!("asked without being registered"));
    until("a failure", || Some(heartbeat.status()).filter(|status| status.reason.contains("refused")));
    assert_eq!(heartbeat.status().state, "unregistered");
}

/// Both faces together: a server of our own over the registry, and a node that registers with it.
#[test]
fn a_registry_behind_another_server_takes_nodes() {
    let registry = ServiceRegistry::new(30_000);
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = listener.local_addr().expect("an address").port();
    let lines = Arc::new(Mutex::new(Vec::new()));
    let (served, seen) = (registry.clone(), lines.clone());
    thread::spawn(move || {
        for stream in listener.incoming() {
            let stream = stream.expect("a connection");
            let Some((line, body)) = read_request(&stream) else { continue };
            seen.lock().expect("the lines").push(line.clone());
            let done = if line.starts_with("POST /v2/nodes/register ") {
                let reply = served.register(from_json::<llama_orch::wire::node::RegisterRequest>(&body));
                reply.map(|reply| to_json(&reply))
            } else if line.starts_with("POST /v2/nodes/other-program/heartbeat ") {
                let reply =
                    served.heartbeat("other-program", from_json::<llama_orch::wire::node::Heartbeat>(&body));
                reply.map(|reply| to_json(&reply))
            } else {
                let incarnation = line.split(['=', ' ']).nth(2).and_then(|number| number.parse().ok());
                let incarnation = incarnation.expect("an incarnation");
                served.deregister_incarnation("other-program", incarnation).map(|()| "{}".into())
            };
            match done {
                Ok(body) => answer(&stream, 200, &body),
                Err(error) => answer(&stream, error.http_status(), &error.to_string()),
            }
        }
    });
    let pool = HeartbeatPoolStatus {
        pool_id: "pool-0".into(),
        ready: true,
        slots_free: 2,
        slots_total: 4,
        ..HeartbeatPoolStatus::default()
    };
    let registration = NodeRegistration::new(config(port));
    registration.register().expect("registered");
    let sent = pool.clone();
    let heartbeat = registration.spawn_heartbeat(move || vec![sent.clone()]);
    let found = until("the node", || registry.get_node_for_pool("pool-0"));
    assert_eq!((found.node_id.as_str(), found.status), ("other-program", NodeStatus::Online));
    assert_eq!(registry.get_pool_status("other-program", "pool-0"), Some(pool));
    // Forgotten, it registers again by itself.
    registry.deregister("other-program").expect("known");
    heartbeat.beat_now();
    until("the node again", || registry.get_node_for_pool("pool-0"));
    heartbeat.stop();
    registration.deregister().expect("goodbye");
    assert!(registry.get_nodes().is_empty());
    let lines = lines.lock().expect("the lines");
    let registrations = lines.iter().filter(|line| line.contains("/register ")).count();
    assert_eq!(registrations, 2, "one by register, which heartbeats went by, and one more: {lines:?}");
}

fn from_json<T: serde::de::DeserializeOwned>(body: &str) -> T {
    serde_json::from_str(body).expect("a message")
}

fn to_json(reply: &impl serde::Serialize) -> String {
    serde_json::to_string(reply).expect("JSON")
}
