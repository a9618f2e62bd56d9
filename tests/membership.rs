//! Nodes and their control plane through each other's death, deafness and farewell: real processes,
//! real sockets, and clients that ask all the while.
//!
//! Where a length of time is what a test is about (a process that stands still for two leases), it
//! sleeps; everything else is waited for.

#[path = "membership/cluster.rs"]
#[allow(dead_code, reason = "other tests need other parts of it")]
mod cluster;
#[path = "daemons/harness.rs"]
#[allow(dead_code, reason = "other tests need other parts of it")]
mod harness;
#[path = "membership/swarm.rs"]
mod swarm;

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use cluster::*;
use harness::*;
use llama_orch::reactor::now;
use rustix::process::Signal;
use serde_json::Value;
use swarm::Swarm;

/// Nodes that are simulated where there are to be many; fewer where descriptors are scarce.
const NODES: usize = 1_000;

/// Three nodes with so many replicas each, all of them routable.
fn three_nodes(control: &Control, replicas: usize) -> Vec<Node> {
    let nodes: Vec<Node> =
        ["a", "b", "c"].map(|name| Node::start(name, control.port, replicas, "0", &[])).into();
    control.until_routable(3.0 * replicas as f64);
    nodes
}

#[test]
fn all_nodes_come_back_after_the_control_plane_was_killed_under_load() {
    let mut control = Control::start(&[("ORCHESTRATORD_NODE_TIMEOUT_MS", "2000")]);
    let _nodes = three_nodes(&control, 1);
    let traffic = Traffic::start(control.port, 3);
    traffic.until_answered(50, Instant::now());

    let killed = Instant::now();
    control.process.kill();
    control.start_again();
    let back = Instant::now();
    control.until_online(3.0);
    control.until_routable(3.0);
    assert!(
        back.elapsed() < Duration::from_millis(2_000 + 5_000),
        "{:?} until all were back",
        back.elapsed()
    );
    traffic.until_answered(50, back);
    let asked = traffic.end();
    control.assert_nobody_expired();
    // Who asked before knew a working control plane; who asked after it had come back waited for nodes.
    let before = asked.iter().filter(|asked| asked.ended < killed);
    assert_eq!(failures(before), [""; 0]);
    let after = asked.iter().filter(|asked| asked.begun > back);
    assert_eq!(failures(after), [""; 0]);
}

#[test]
fn a_thousand_nodes_come_back_after_the_control_plane_was_killed() {
    let (timeout_ms, interval_ms) = (5_000, 2_000);
    let mut control = Control::start(&[
        ("ORCHESTRATORD_NODE_TIMEOUT_MS", "5000"),
        ("ORCHESTRATORD_HEARTBEAT_INTERVAL_SECS", "2"),
        ("ORCHESTRATORD_LOG_LEVEL", "warn"),
    ]);
    let nodes = swarm::affordable(NODES);
    // All at once: as after a power cut.
    let swarm = Swarm::start(nodes, control.port, interval_ms, 0);
    control.until_online(nodes as f64);
    control.process.kill();
    control.start_again();
    let (back, since) = (Instant::now(), now().mono);
    control.until_online(nodes as f64);
    assert!(back.elapsed() < Duration::from_millis(timeout_ms + 5_000), "{:?}", back.elapsed());
    // A whole lease later nobody has lost it.
    let beats = swarm.seen().beats;
    until("heartbeats of a lease", || {
        (swarm.seen().beats - beats > nodes as u64 * timeout_ms / interval_ms).then_some(())
    });
    assert_eq!(control.online(), nodes as f64);
    control.assert_nobody_expired();
    let seen = swarm.seen();
    let at_once = seen.registrations_within(100, since);
    assert!(at_once <= nodes / 4, "{at_once} registrations within 100 ms");
    assert_eq!(seen.conflicts, 0);
}

#[test]
fn a_dead_node_costs_no_request_that_began_after_its_death() {
    // The lease outlives the test: only the data path can tell. All requests begin alike, and are to go to
    // every node all the same.
    let env = [("ORCHESTRATORD_NODE_TIMEOUT_MS", "60000"), ("ORCHESTRATORD_PREFIX_AFFINITY", "false")];
    let control = Control::start(&env);
    let mut nodes = three_nodes(&control, 4);
    let traffic = Traffic::start(control.port, 3);
    traffic.until_answered(50, Instant::now());
    let killed = Instant::now();
    let mut dead = nodes.remove(0);
    dead.agent.kill();
    dead.engine.as_mut().expect("an engine").kill();
    let died = Instant::now();
    until("a failed connection", || {
        control
            .events("replica")
            .contains(&("a/pool-0/r0".to_string(), "not-routable".to_string()))
            .then_some(())
    });
    let (noticed, retries) = (Instant::now(), metric(control.port, "orchestratord_retries_total"));
    traffic.until_answered(200, noticed + Duration::from_secs(1));
    let asked = traffic.end();
    let after = asked.iter().filter(|asked| asked.begun > died);
    assert_eq!(failures(after), [""; 0]);
    let before = asked.iter().filter(|asked| asked.ended < killed);
    assert_eq!(failures(before), [""; 0]);
    assert_eq!(control.status("a"), "Online", "its lease lasts");
    // Each pause ends with one attempt a replica at most; the pauses double.
    let waited = noticed.elapsed().as_millis() as u64;
    let attempts = (0..).take_while(|n| 250u64 * ((1 << (n + 1)) - 1) < waited).count();
    let tried =
        metric(control.port, "orchestratord_retries_total").zip(retries).map(|(now, then)| now - then);
    let requests = asked.iter().filter(|asked| asked.begun > noticed).count();
    assert!(
        tried.is_some_and(|tried| tried <= 4.0 * attempts as f64),
        "{tried:?} of {requests} requests went to the dead node in {waited} ms"
    );
}

/// A port to which connections cannot be made, and are not refused either: as with a machine that is gone.
/// It is one as long as what is returned lives.
fn black_hole() -> (u16, TcpListener, Vec<TcpStream>) {
    let (listener, port) = deaf();
    rustix::net::listen(&listener, 0).expect("a queue of one");
    let address = std::net::SocketAddr::from(([127, 0, 0, 1], port));
    let queued = std::iter::from_fn(|| TcpStream::connect_timeout(&address, Duration::from_millis(300)).ok());
    let queued: Vec<TcpStream> = queued.take(16).collect();
    assert!(queued.len() < 16, "its queue never fills");
    (port, listener, queued)
}

#[test]
fn a_machine_that_vanished_costs_a_moment_and_no_request() {
    let control = Control::start(&[("ORCHESTRATORD_NODE_TIMEOUT_MS", "60000")]);
    let _node = Node::start("z", control.port, 1, "0", &[]);
    control.until_routable(1.0);
    let (hole, _listener, _queued) = black_hole();
    // By its own account it has the most free slots, so it is asked first.
    let body = format!(r#"{{"node_id":"a","address":"http://127.0.0.1:{hole}","incarnation":1}}"#);
    assert_eq!(post(control.port, "/v2/nodes/register", &body).status, 200);
    let replicas: Vec<String> = (0..4)
        .map(|n| {
            let url = format!("http://127.0.0.1:808{n}");
            format!(r#"{{"replica_id":"r{n}","url":"{url}","ready":true,"slots_free":64,"slots_total":64}}"#)
        })
        .collect();
    let pool =
        format!(r#"{{"pool_id":"pool-0","ready":true,"slots_free":64,"replicas":[{}]}}"#, replicas.join(","));
    let body = format!(r#"{{"incarnation":1,"seq":1,"pools":[{pool}]}}"#);
    assert_eq!(post(control.port, "/v2/nodes/a/heartbeat", &body).status, 200);
    control.until_routable(5.0);
    let begun = Instant::now();
    let traffic = Traffic::start(control.port, 2);
    traffic.until_answered(100, begun);
    let asked = traffic.end();
    assert_eq!(failures(&asked), [""; 0]);
    assert!(metric(control.port, "orchestratord_retries_total").is_some_and(|n| n >= 1.0), "nobody tried it");
    assert_eq!(control.status("a"), "Online", "its lease lasts");
}

#[test]
fn a_node_that_stands_still_is_suspected_after_its_lease_and_not_before() {
    const TTL_MS: u64 = 4_000;
    let control = Control::start(&[("ORCHESTRATORD_NODE_TIMEOUT_MS", "4000")]);
    let nodes = three_nodes(&control, 1);
    let traffic = Traffic::start(control.port, 2);
    traffic.until_answered(20, Instant::now());
    let last_beat = || control.node("a").expect("it is known")["last_heartbeat_ms"].clone();
    let stop_after_a_heartbeat = |for_ms: u64| {
        let last = last_beat();
        until("a heartbeat", || (last_beat() != last).then_some(()));
        nodes[0].agent.signal(Signal::STOP);
        thread::sleep(Duration::from_millis(for_ms));
    };
    stop_after_a_heartbeat(TTL_MS * 9 / 10);
    nodes[0].agent.signal(Signal::CONT);
    let last = last_beat();
    until("the next heartbeat", || (last_beat() != last).then_some(()));
    control.assert_nobody_expired();

    stop_after_a_heartbeat(TTL_MS * 2);
    assert_eq!(control.status("a"), "Suspect");
    let begun = Instant::now();
    traffic.until_answered(20, begun);
    nodes[0].agent.signal(Signal::CONT);
    control.until_online(3.0);
    control.until_routable(3.0);
    let states: Vec<String> = control
        .events("node")
        .into_iter()
        .filter(|(node, state)| node == "a" && state != "Registering")
        .map(|(_, state)| state)
        .collect();
    assert_eq!(states, ["Online", "Suspect", "Online"], "there and back, once");
    let asked = traffic.end();
    // Connections to a process that stands still are made by the kernel, and wait: only what was sent
    // to it may be late, and nothing is lost.
    assert_eq!(failures(&asked), [""; 0]);
}

#[test]
fn nobody_expires_when_the_control_plane_itself_stood_still() {
    // An agent beats once a second at most: two lost ones must not matter.
    const TTL_MS: u64 = 3_000;
    let control = Control::start(&[("ORCHESTRATORD_NODE_TIMEOUT_MS", "3000")]);
    // Two: of three, most would be given the benefit of the doubt.
    let _nodes = ["a", "b"].map(|name| Node::start(name, control.port, 1, "0", &[]));
    control.until_routable(2.0);
    let traffic = Traffic::start(control.port, 2);
    traffic.until_answered(20, Instant::now());
    let beats = || metric(control.port, "orchestratord_heartbeats_total").expect("a count");
    // Where in its loop it is stopped, and what has arrived by then, is chance: several times.
    for stopped_ms in [3 * TTL_MS, TTL_MS * 3 / 2, TTL_MS * 3 / 2, TTL_MS * 3 / 2] {
        let seen = beats();
        // Most likely in the middle of a turn that goes on to read what came while it stood still.
        for _ in 0..64 {
            let _ = TcpStream::connect(("127.0.0.1", control.port));
        }
        control.process.signal(Signal::STOP);
        thread::sleep(Duration::from_millis(stopped_ms));
        control.process.signal(Signal::CONT);
        let resumed = Instant::now();
        until("heartbeats", || (beats() >= seen + 4.0).then_some(()));
        traffic.until_answered(20, resumed);
        control.assert_nobody_expired();
    }
    control.until_online(2.0);
    control.until_routable(2.0);
    let asked = traffic.end();
    assert_eq!(failures(&asked), [""; 0], "clients only waited");
}

/// A control plane that accepts connections and never says a word.
fn deaf() -> (TcpListener, u16) {
    let listener = harness::listen_on_free_port();
    let port = listener.local_addr().expect("an address").port();
    (listener, port)
}

#[test]
fn a_farewell_ends_in_time_whatever_the_control_plane_does() {
    // While it registers, and nobody answers.
    let (listener, port) = deaf();
    let mut node = Node::bare("n", port, &[]);
    let _held = listener.accept().expect("it registers");
    let begun = Instant::now();
    node.agent.signal(Signal::TERM);
    assert_eq!(node.agent.end(), Some(0));
    // Twice the limit of a deregistration, and a little for the process itself.
    assert!(begun.elapsed() < Duration::from_millis(5_000), "{:?}", begun.elapsed());

    // Without any control plane.
    let mut node = Node::bare("n", free_port(), &[]);
    until("the agent", || get(node.port, "/health").filter(|answer| answer.status == 200));
    let begun = Instant::now();
    node.agent.signal(Signal::TERM);
    assert_eq!(node.agent.end(), Some(0));
    assert!(begun.elapsed() < Duration::from_millis(5_000), "{:?}", begun.elapsed());
}

#[test]
fn an_agent_whose_control_plane_goes_by_another_name_says_what_to_set_there() {
    let (listener, port) = deaf();
    thread::spawn(move || {
        for mut tcp in listener.incoming().map_while(Result::ok) {
            thread::spawn(move || {
                let _ = tcp.read(&mut [0; 16 * 1024]);
                let refusal =
                    "HTTP/1.1 421 Misdirected Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
                let _ = tcp.write_all(refusal.as_bytes());
            });
        }
    });
    let url = format!("http://localhost:{port}");
    let node = Node::bare("n", port, &[("ORCHESTRATORD_URL", &url)]);
    let told = "it does not go by the name localhost (421): set ORCHESTRATORD_ALLOW_HOSTS=localhost there";
    until("what to set", || node.agent.log().contains(told).then_some(()));
}

/// Where the agent relays chats for its replica.
const RELAY: &str = "/v2/pools/pool-0/replicas/r0/engine/v1/chat/completions";

/// A node with a slow engine and a stream of so many tokens that has begun, straight from its agent.
fn streaming_node(control: &Control, tokens: u32, env: &[(&str, &str)]) -> (Node, Open) {
    let node = Node::start("n", control.port, 1, "20", env);
    control.until_routable(1.0);
    let mut stream = open(node.port, "POST", RELAY, None, &stream_of(tokens)).expect("an answer");
    stream.event().expect("a first event");
    (node, stream)
}

#[test]
fn a_draining_node_finishes_its_streams_and_says_goodbye() {
    let control = Control::start(&[]);
    let (mut node, mut stream) = streaming_node(&control, 30, &[]);
    node.agent.signal(Signal::TERM);
    until("the node to drain", || (control.status("n") == "Draining").then_some(()));
    let rest: Vec<String> = std::iter::from_fn(|| stream.event()).collect();
    assert_eq!(rest.last().map(String::as_str), Some("[DONE]"), "{rest:?}");
    assert_eq!(node.agent.end(), Some(0));
    assert_eq!(control.nodes(), [Value::Null; 0], "it said goodbye");
}

#[test]
fn a_second_signal_ends_a_drain_at_once() {
    let control = Control::start(&[]);
    let (mut node, _stream) = streaming_node(&control, 2_000, &[]);
    node.agent.signal(Signal::TERM);
    until("the node to drain", || (control.status("n") == "Draining").then_some(()));
    let second = Instant::now();
    node.agent.signal(Signal::TERM);
    assert_eq!(node.agent.end(), Some(0));
    assert!(second.elapsed() < Duration::from_secs(1), "{:?}", second.elapsed());
}

#[test]
fn a_drain_ends_at_its_limit_though_the_control_plane_is_gone() {
    let mut control = Control::start(&[]);
    let (mut node, mut stream) =
        streaming_node(&control, 2_000, &[("POOL_MANAGERD_DRAIN_TIMEOUT_MS", "2000")]);
    control.process.kill();
    let begun = Instant::now();
    node.agent.signal(Signal::TERM);
    let rest: Vec<String> = std::iter::from_fn(|| stream.event()).collect();
    assert!(begun.elapsed() >= Duration::from_millis(1_900), "cut after {:?}", begun.elapsed());
    assert!(rest.len() > 20 && rest.last().is_none_or(|last| last != "[DONE]"), "{rest:?}");
    assert_eq!(node.agent.end(), Some(0));
    assert!(begun.elapsed() < Duration::from_millis(2_000 + 5_000), "{:?}", begun.elapsed());
}

fn copy_directory(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("a directory");
    for entry in fs::read_dir(from).expect("a directory").flatten() {
        fs::copy(entry.path(), to.join(entry.file_name())).expect("copied");
    }
}

#[test]
fn of_two_agents_with_one_cloned_state_one_keeps_the_name() {
    let control = Control::start(&[]);
    let first = Node::start("n", control.port, 1, "0", &[]);
    control.until_routable(1.0);
    let clone = tempfile::tempdir().expect("a directory");
    copy_directory(&first.directory.path().join(".runtime/state"), &clone.path().join(".runtime/state"));
    let second = Node::within(clone, "n", control.port, &[]);
    let stepped_back = |node: &Node| node.agent.log().contains("steps back");
    until("one to step back", || (stepped_back(&first) || stepped_back(&second)).then_some(()));
    until("the control plane to say so", || {
        control.events("node").contains(&("n".to_string(), "twin".to_string())).then_some(())
    });
    let keeper = if stepped_back(&first) { &second } else { &first };
    let address = || control.node("n").and_then(|node| Some(node["address"].as_str()?.to_string()));
    let kept = format!("http://127.0.0.1:{}", keeper.port);
    until("the keeper to be known", || (address()? == kept && control.status("n") == "Online").then_some(()));
    // Some heartbeats later nothing has changed hands.
    let count = |state: &str| control.events("node").iter().filter(|(_, known)| known == state).count();
    let (registrations, twins) = (count("Registering"), count("twin"));
    let beats = metric(control.port, "orchestratord_heartbeats_total").expect("a count");
    until("heartbeats", || {
        metric(control.port, "orchestratord_heartbeats_total").filter(|now| *now >= beats + 4.0)
    });
    assert_eq!((count("Registering"), count("twin")), (registrations, twins), "no flapping");
    assert_eq!(address(), Some(kept));
    assert!(!(stepped_back(&first) && stepped_back(&second)), "one of them is a member");
}
