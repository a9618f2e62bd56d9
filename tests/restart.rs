//! A control plane that is killed and comes back, as processes: who is served at once, who is not, and
//! what is made of a state file that cannot be used.

#[path = "daemons/harness.rs"]
#[allow(dead_code, reason = "every test program uses its own part of it")]
mod harness;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use harness::*;
use rustix::process::Signal;
use serde_json::Value;

const CHAT: &str = "/v1/chat/completions";
const SHORT: &str = r#"{"messages":[{"role":"user","content":"one two"}],"max_tokens":3}"#;
/// Longest that anybody should notice of a restart, once the control plane listens again.
const AT_ONCE: Duration = Duration::from_secs(1);

/// A control plane. Heartbeats come once a minute, so whatever happens sooner happens without them.
struct Control {
    directory: tempfile::TempDir,
    port: u16,
    state: PathBuf,
    process: Process,
}

impl Control {
    fn start() -> Control {
        let directory = tempfile::tempdir().expect("a directory");
        let state = directory.path().join("state");
        Control::start_with(directory, state)
    }

    fn start_with(directory: tempfile::TempDir, state: PathBuf) -> Control {
        let port = free_port();
        let process = Control::spawn(port, &state, directory.path());
        Control { directory, port, state, process }
    }

    fn spawn(port: u16, state: &Path, directory: &Path) -> Process {
        let (addr, state) = (format!("127.0.0.1:{port}"), state.to_string_lossy());
        let env = [
            ("ORCHESTRATORD_CLOUD_PROFILE", "true"),
            ("ORCHESTRATORD_ADDR", &addr),
            ("ORCHESTRATORD_STATE_DIR", &state),
            ("ORCHESTRATORD_HEARTBEAT_INTERVAL_SECS", "60"),
            ("ORCHESTRATORD_NODE_TIMEOUT_MS", "300000"),
        ];
        let process = Process::start(ORCHESTRATORD, &[], &env, directory);
        until("orchestratord", || get(port, "/ready").filter(|answer| answer.status == 200));
        process
    }

    fn end_by(&mut self, signal: Signal) {
        if signal == Signal::KILL {
            return self.process.kill();
        }
        self.process.signal(signal);
        assert_eq!(self.process.end(), Some(0), "{}", self.process.log());
    }

    fn again(&mut self) {
        self.process = Control::spawn(self.port, &self.state, self.directory.path());
    }

    fn file(&self) -> PathBuf {
        self.state.join("registry.json")
    }

    fn nodes(&self) -> Vec<Value> {
        let listed = get(self.port, "/v2/nodes").expect("an answer").json();
        listed["nodes"].as_array().expect("nodes").clone()
    }

    /// Waits until the file says that so many nodes have a ready replica.
    fn until_saved(&self, count: usize) {
        until("the state file", || {
            let saved: Value =
                serde_json::from_slice(&fs::read(self.file()).ok()?).expect("never half a file");
            let ready = |node: &&Value| node["node"]["replicas"][0]["ready"] == true;
            (saved["nodes"].as_array()?.iter().filter(ready).count() == count).then_some(())
        });
    }

    fn events(&self, part: &str) -> Vec<String> {
        let events = get(self.port, "/v2/events").expect("an answer").json();
        let texts = events["events"].as_array().expect("events").iter().map(|event| &event["text"]);
        texts.filter_map(Value::as_str).filter(|text| text.contains(part)).map(str::to_string).collect()
    }
}

/// A node agent with its engine.
struct Node {
    agent: Process,
    engine: Process,
    _directory: tempfile::TempDir,
}

impl Node {
    fn start(name: &str, control: &Control) -> Node {
        let directory = tempfile::tempdir().expect("a directory");
        let (port, engine_port) = (free_port(), free_port());
        let fast = ["--prefill-ms", "0", "--tokens-per-second", "0"];
        let engine = demo_engine(engine_port, &fast, directory.path());
        let engines = directory.path().join(".runtime/engines");
        hand_over(&engines, "a.json", &handoff(engine_port, "r0", 4));
        let (addr, url) = (format!("127.0.0.1:{port}"), format!("http://127.0.0.1:{}", control.port));
        let env = [
            ("POOL_MANAGERD_CLOUD_PROFILE", "true"),
            ("POOL_MANAGERD_NODE_ID", name),
            ("POOL_MANAGERD_ADDR", &addr),
            ("ORCHESTRATORD_URL", &url),
        ];
        let agent = Process::start(POOL_MANAGERD, &[], &env, directory.path());
        Node { agent, engine, _directory: directory }
    }
}

/// A control plane with two nodes that serve, all of it saved.
fn served_by_two() -> (Control, [Node; 2]) {
    let control = Control::start();
    let nodes = ["one", "two"].map(|name| Node::start(name, &control));
    until("two replicas", || metric(control.port, "orchestratord_replicas_routable").filter(|n| *n == 2.0));
    control.until_saved(2);
    assert_eq!(post(control.port, CHAT, SHORT).status, 200);
    (control, nodes)
}

#[test]
fn the_first_request_after_a_restart_waits_for_no_heartbeat() {
    let (mut control, _nodes) = served_by_two();
    let mode = |path: &Path| fs::metadata(path).expect("it is there").permissions().mode() & 0o777;
    assert_eq!((mode(&control.file()), mode(&control.state)), (0o600, 0o700));
    for signal in [Signal::KILL, Signal::TERM] {
        control.end_by(signal);
        control.again();
        let begun = Instant::now();
        let nodes = control.nodes();
        assert_eq!(nodes.len(), 2);
        for node in &nodes {
            let replica = &node["replicas"][0];
            assert!(node["unconfirmed"] == true && node["status"] == "Registering", "{node}");
            assert!(replica["unconfirmed"] == true && replica["routable"] == true, "{node}");
        }
        let answer = post(control.port, CHAT, SHORT);
        assert!(answer.status == 200 && answer.body.contains("[demo]"), "{answer:?}");
        assert!(begun.elapsed() < AT_ONCE, "{:?} until the answer", begun.elapsed());
        assert_eq!(control.events("2 nodes with 2 replicas restored").len(), 1);
        for name in ["orchestratord_heartbeats_total", "orchestratord_registrations_total"] {
            assert_eq!(metric(control.port, name), Some(0.0), "nobody had to say anything");
        }
    }
}

#[test]
fn a_node_that_died_meanwhile_swallows_no_request_and_one_that_changed_is_taken_as_it_is() {
    let (mut control, [mut dead, mut other]) = served_by_two();
    control.end_by(Signal::KILL);
    dead.engine.kill();
    dead.agent.kill();
    control.again();
    for n in 0..10 {
        let begun = Instant::now();
        let answer = post(control.port, CHAT, SHORT);
        assert_eq!(answer.status, 200, "request {n}: {answer:?}");
        assert!(begun.elapsed() < AT_ONCE, "request {n}: {:?}", begun.elapsed());
    }
    // What nodes say themselves counts as ever.
    other.agent.signal(Signal::TERM);
    assert_eq!(other.agent.end(), Some(0));
    let left: Vec<Value> = control.nodes().iter().map(|node| node["node_id"].clone()).collect();
    assert_eq!(left, ["one"]);
}

#[test]
fn a_node_is_confirmed_by_its_first_word() {
    let (mut control, [_one, mut two]) = served_by_two();
    control.end_by(Signal::KILL);
    control.again();
    // A change is told at once: the engine of one node dies.
    two.engine.kill();
    until("the node to tell it", || {
        let nodes = control.nodes();
        let (one, two) = (&nodes[0], &nodes[1]);
        (one["unconfirmed"] == true && two["unconfirmed"] == false && two["status"] == "Online").then_some(())
    });
    let nodes = control.nodes();
    let replica = &nodes[1]["replicas"][0];
    assert!(replica["unconfirmed"] == false && replica["routable"] == false, "{replica}");
}

#[test]
fn a_file_that_cannot_be_used_is_put_aside_and_named() {
    let (mut control, _nodes) = served_by_two();
    control.end_by(Signal::KILL);
    let good = fs::read_to_string(control.file()).expect("a file");
    let with = |field: &str, number: u64| {
        let mut saved: Value = serde_json::from_str(&good).expect("a file");
        saved[field] = number.into();
        saved.to_string()
    };
    let half = good[..good.len() / 2].to_string();
    for (text, why) in [
        (half, "EOF"),
        ("\u{0}\u{0}\u{0}\u{0}".to_string(), "expected value"),
        (r#"{"version":1,"handoffs":[]}"#.to_string(), "missing field"),
        (with("version", 7), "version 7"),
        (with("written_ms", 1_700_000_000_000), "h ago"),
    ] {
        fs::write(control.file(), &text).expect("written");
        control.again();
        let aside = control.state.join("registry.json.unusable");
        assert_eq!(fs::read_to_string(&aside).expect("put aside"), text);
        for told in [control.process.log(), control.events("starting without it").concat()] {
            assert!(told.contains(why) && told.contains("registry.json.unusable"), "{why}: {told}");
        }
        control.end_by(Signal::KILL);
    }
}

#[test]
fn a_directory_that_cannot_be_written_is_only_a_warning() {
    let directory = tempfile::tempdir().expect("a directory");
    let blocked = directory.path().join("file");
    fs::write(&blocked, "").expect("written");
    let control = Control::start_with(directory, blocked.join("state"));
    let warned = control.events("ORCHESTRATORD_STATE_DIR");
    assert!(warned.len() == 1 && warned[0].contains("file/state"), "{warned:?}");
    let _node = Node::start("one", &control);
    until("an answer", || (post(control.port, CHAT, SHORT).status == 200).then_some(()));
    until("a save to fail", || {
        metric(control.port, "orchestratord_state_saves_total{outcome=\"failed\"}").filter(|n| *n >= 1.0)
    });
    assert_eq!(control.events("cannot be saved").len(), 1);
}

#[test]
fn the_home_profile_keeps_nothing() {
    let mut home = Home::start(&[]);
    let engine_port = free_port();
    let _engine = demo_engine(engine_port, &[], home.directory.path());
    hand_over(&home.engines(), "a.json", &handoff(engine_port, "r0", 1));
    home.until_routable(1.0);
    home.daemon.signal(Signal::TERM);
    assert_eq!(home.daemon.end(), Some(0));
    assert!(!home.directory.path().join(".runtime/state").exists());
}
