//! Control planes that poll: agents that know no control plane, lists of agents, and notices that make the
//! next poll come at once.

#[path = "daemons/harness.rs"]
#[expect(dead_code, reason = "each test binary needs some of it")]
mod harness;

use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::time::{Duration, Instant};

use harness::*;
use serde_json::Value;

const CHAT: &str = "/v1/chat/completions";
const SHORT: &str = r#"{"messages":[{"role":"user","content":"one two"}],"max_tokens":3}"#;
const FAST: &[&str] = &["--prefill-ms", "0", "--tokens-per-second", "0"];

/// An agent that has never heard of a control plane, with its own directory.
struct Agent {
    directory: tempfile::TempDir,
    port: u16,
    daemon: Process,
}

impl Agent {
    fn start(env: &[(&str, &str)]) -> Agent {
        let directory = tempfile::tempdir().expect("a directory");
        let port = free_port();
        let daemon = Agent::daemon(port, env, directory.path());
        Agent { directory, port, daemon }
    }

    fn daemon(port: u16, env: &[(&str, &str)], directory: &Path) -> Process {
        let addr = format!("127.0.0.1:{port}");
        let own = [("POOL_MANAGERD_ADDR", addr.as_str()), ("POOL_MANAGERD_NODE_ID", "test-node")];
        let daemon = Process::start(POOL_MANAGERD, &[], &[&own[..], env].concat(), directory);
        until("pool-managerd", || get(port, "/ready").filter(|answer| answer.status == 200));
        daemon
    }

    fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    fn engines(&self) -> std::path::PathBuf {
        self.directory.path().join(".runtime/engines")
    }
}

/// What `GET /v2/nodes` shows.
fn nodes(port: u16, token: Option<&str>) -> Value {
    let answer = ask(port, "GET", "/v2/nodes", token, "").expect("an answer");
    assert_eq!(answer.status, 200, "{answer:?}");
    answer.json()
}

/// Waits until the polled agent of this URL is in this state.
fn until_polled(port: u16, token: Option<&str>, url: &str, state: &str) -> Value {
    until(state, || {
        let polled = nodes(port, token)["polled"].clone();
        polled.as_array()?.iter().find(|agent| agent["url"] == url && agent["state"] == state).cloned()
    })
}

fn polls(port: u16, outcome: &str) -> f64 {
    let name = format!("orchestratord_polls_total{{outcome=\"{outcome}\"}}");
    until("metrics", || metric(port, &name))
}

#[test]
fn an_agent_that_knows_no_control_plane_serves_goes_and_comes_back() {
    let mut agent = Agent::start(&[]);
    let home = Home::start(&[
        ("POOL_MANAGERD_URL", &agent.url()),
        ("ORCHD_POOL_POLL_INTERVAL_MS", "200"),
        ("ORCHESTRATORD_NODE_TIMEOUT_MS", "1000"),
        ("ORCHESTRATORD_STALE_CHECK_INTERVAL_SECS", "60"),
        ("ORCHD_ADMISSION_TIMEOUT_MS", "300"),
    ]);
    assert!(home.daemon.log().contains("runtime directory is not watched"), "{}", home.daemon.log());
    let engine_port = free_port();
    let _engine = demo_engine(engine_port, FAST, agent.directory.path());
    // Nobody watches the control plane's own directory.
    hand_over(&home.engines(), "own.json", &handoff(engine_port, "own", 4));
    hand_over(&agent.engines(), "a.json", &handoff(engine_port, "r0", 4));
    home.until_routable(1.0);
    let answer = post(home.port, CHAT, SHORT);
    assert!(answer.status == 200 && answer.body.contains("[demo]"), "{answer:?}");
    let relayed = get(agent.port, "/metrics").expect("metrics").body;
    assert!(relayed.contains("pool_managerd_relayed_total{outcome=\"answered\"} 1"), "{relayed}");
    let listed = nodes(home.port, None);
    let node = &listed["nodes"][0];
    assert_eq!((&listed["count"], &node["via"]), (&1.into(), &"poll".into()), "{listed}");
    assert_eq!((&node["node_id"], &node["status"]), (&"test-node".into(), &"Online".into()), "{listed}");
    assert_eq!(node["replicas"][0]["replica_id"], "r0", "{listed}");
    assert_eq!(listed["polled"][0]["node_id"], "test-node", "{listed}");

    // It dies: the next request notices at once, and then its lease ends.
    agent.daemon.kill();
    let answer = post(home.port, CHAT, SHORT);
    assert!(matches!(answer.status, 502 | 503), "{answer:?}");
    home.until_routable(0.0);
    until_polled(home.port, None, &agent.url(), "unreachable");
    until("the lease to end", || (nodes(home.port, None)["nodes"][0]["status"] == "Suspect").then_some(()));

    agent.daemon = Agent::daemon(agent.port, &[], agent.directory.path());
    until_polled(home.port, None, &agent.url(), "answers");
    home.until_routable(1.0);
    assert_eq!(post(home.port, CHAT, SHORT).status, 200);
    let events = get(home.port, "/v2/events").expect("events").json();
    let told: Vec<&str> = events["events"]
        .as_array()
        .expect("events")
        .iter()
        .filter(|event| event["kind"] == "agent")
        .filter_map(|event| event["state"].as_str())
        .collect();
    assert_eq!(told, ["answers", "unreachable", "answers"], "once a transition: {events}");
    assert!(polls(home.port, "taken") >= 2.0 && polls(home.port, "unreachable") >= 1.0);
}

#[test]
fn an_agent_that_never_answers_disturbs_no_other() {
    let agent = Agent::start(&[]);
    // Takes connections and says nothing.
    let silent = TcpListener::bind("127.0.0.1:0").expect("a port");
    let silent = format!("http://{}", silent.local_addr().expect("an address"));
    let refusing = format!("http://127.0.0.1:{}", free_port());
    let list = format!("{silent},{},{refusing}", agent.url());
    let home = Home::start(&[("ORCHD_POOL_MANAGERS", &list), ("ORCHD_POOL_POLL_INTERVAL_MS", "300")]);
    let engine_port = free_port();
    let _engine = demo_engine(engine_port, FAST, agent.directory.path());
    hand_over(&agent.engines(), "a.json", &handoff(engine_port, "r0", 4));
    home.until_routable(1.0);
    for url in [&silent, &refusing] {
        let shown = until_polled(home.port, None, url, "unreachable");
        assert!(shown["error"].is_string() && shown["node_id"].is_null(), "{shown}");
    }
    for n in 0..20 {
        let answer = post(home.port, CHAT, SHORT);
        assert_eq!(answer.status, 200, "request {n}: {answer:?}");
    }
    until("both to be tried again", || (polls(home.port, "unreachable") >= 4.0).then_some(()));
    assert_eq!(nodes(home.port, None)["count"], 1);
    let log = home.daemon.log();
    assert_eq!(log.matches("cannot be polled").count(), 2, "once each in\n{log}");
}

#[test]
fn a_callback_makes_a_slow_poll_come_at_once() {
    const TOKEN: &str = "a-token-that-is-long-enough-for-anyone";
    let port = free_port();
    let callback = format!("http://127.0.0.1:{port}/callbacks/pool-ready");
    let agent = Agent::start(&[
        ("LLORCH_API_TOKEN", TOKEN),
        ("POOL_MANAGERD_CALLBACK_ENABLED", "true"),
        ("POOL_MANAGERD_ORCHESTRATORD_CALLBACK_URL", &callback),
    ]);
    let directory = tempfile::tempdir().expect("a directory");
    let (addr, url) = (format!("127.0.0.1:{port}"), agent.url());
    let env = [
        ("LLORCH_API_TOKEN", TOKEN),
        ("ORCHESTRATORD_ADDR", addr.as_str()),
        ("POOL_MANAGERD_URL", url.as_str()),
        ("ORCHD_POOL_POLL_INTERVAL_MS", "60000"),
    ];
    let control = Process::start(ORCHESTRATORD, &[], &env, directory.path());
    until("orchestratord", || get(port, "/ready").filter(|answer| answer.status == 200));
    assert!(control.log().contains("after 180000 ms without an answer"), "{}", control.log());
    until_polled(port, Some(TOKEN), &url, "answers");
    assert_eq!(polls(port, "taken"), 1.0);

    let engine_port = free_port();
    let _engine = demo_engine(engine_port, FAST, agent.directory.path());
    let routable = |count: f64| {
        until("replicas", || metric(port, "orchestratord_replicas_routable").filter(|n| *n == count));
    };
    let renamed = Instant::now();
    hand_over(&agent.engines(), "a.json", &handoff(engine_port, "r0", 4));
    routable(1.0);
    assert!(renamed.elapsed() < Duration::from_secs(5), "{:?}", renamed.elapsed());
    let answer = ask(port, "POST", CHAT, Some(TOKEN), SHORT).expect("an answer");
    assert_eq!(answer.status, 200, "{answer:?}");
    let removed = Instant::now();
    fs::remove_file(agent.engines().join("a.json")).expect("removed");
    routable(0.0);
    assert!(removed.elapsed() < Duration::from_secs(5), "{:?}", removed.elapsed());

    // What else may knock there.
    let path = "/callbacks/pool-ready";
    let known =
        r#"{"pool_id":"pool-0","node_id":"test-node","url":"http://169.254.169.254/","replica_id":"r0"}"#;
    for (token, method, path, body, expected) in [
        (None, "POST", path, known, 401),
        (Some(TOKEN), "GET", path, "", 405),
        (Some(TOKEN), "POST", path, "", 400),
        (Some(TOKEN), "POST", path, r#"{"pool_id":"a/b"}"#, 400),
        (Some(TOKEN), "POST", path, r#"{"pool_id":"pool-0","node_id":"stranger"}"#, 404),
        (Some(TOKEN), "POST", path, known, 202),
        (Some(TOKEN), "POST", "/v2/callbacks/ready", r#"{"pool_id":"pool-0"}"#, 202),
        (Some(TOKEN), "POST", "/v2/callbacks/pool-ready", r#"{"pool_id":"pool-0"}"#, 202),
    ] {
        let answer = ask(port, method, path, token, body).expect("an answer");
        assert_eq!(answer.status, expected, "{method} {path} {body}: {answer:?}");
        assert!(expected != 202 || answer.body.is_empty(), "{answer:?}");
    }
    // A flood is a few polls.
    let (before, begun) = (polls(port, "taken"), Instant::now());
    for _ in 0..100 {
        assert_eq!(ask(port, "POST", path, Some(TOKEN), known).expect("an answer").status, 202);
    }
    let allowed = 2.0 + begun.elapsed().as_millis() as f64 / 250.0;
    let extra = polls(port, "taken") - before;
    assert!(extra <= allowed, "{extra} polls in {:?}", begun.elapsed());
    assert_eq!(polls(port, "unreachable"), 0.0, "nothing else was dialled");
}

#[test]
fn a_node_that_registers_and_is_listed_is_one_node() {
    let directory = tempfile::tempdir().expect("a directory");
    let (control_port, agent_port) = (free_port(), free_port());
    let (addr, agent_url) = (format!("127.0.0.1:{control_port}"), format!("http://127.0.0.1:{agent_port}"));
    let control = || {
        let env = [
            ("ORCHESTRATORD_CLOUD_PROFILE", "true"),
            ("ORCHESTRATORD_ADDR", addr.as_str()),
            ("POOL_MANAGERD_URL", agent_url.as_str()),
            ("ORCHD_POOL_POLL_INTERVAL_MS", "200"),
        ];
        Process::start(ORCHESTRATORD, &[], &env, directory.path())
    };
    let mut first = control();
    let control_url = format!("http://{addr}");
    let cloud = [
        ("POOL_MANAGERD_CLOUD_PROFILE", "true"),
        ("POOL_MANAGERD_ADDRESS", agent_url.as_str()),
        ("ORCHESTRATORD_URL", control_url.as_str()),
        ("POOL_MANAGERD_HEARTBEAT_INTERVAL_SECS", "1"),
    ];
    let _agent = Agent::daemon(agent_port, &cloud, directory.path());
    let engine_port = free_port();
    let _engine = demo_engine(engine_port, FAST, directory.path());
    hand_over(&directory.path().join(".runtime/engines"), "a.json", &handoff(engine_port, "r0", 4));
    let until_settled = || {
        let url = agent_url.as_str();
        until("its heartbeats", || {
            let shown = get(control_port, "/v2/nodes").filter(|answer| answer.status == 200)?.json();
            let node = &shown["nodes"][0];
            let settled = node["via"] == "heartbeat"
                && node["replicas"][0]["routable"] == true
                && shown["polled"][0]["state"] == "heartbeats"
                && shown["polled"][0]["url"] == url;
            (settled && shown["count"] == 1 && node["replicas"].as_array()?.len() == 1).then_some(())
        });
    };
    until_settled();
    assert_eq!(post(control_port, CHAT, SHORT).status, 200);
    let taken = polls(control_port, "taken");
    // The control plane starts again: it may hear of the node by either way first.
    first.kill();
    let _second = control();
    until_settled();
    assert_eq!(post(control_port, CHAT, SHORT).status, 200);
    assert!(taken < 5.0, "{taken} polls although heartbeats arrived");
}

#[test]
fn a_control_plane_that_watches_takes_notices_too() {
    let home = Home::start(&[]);
    let engine_port = free_port();
    let _engine = demo_engine(engine_port, FAST, home.directory.path());
    hand_over(&home.engines(), "a.json", &handoff(engine_port, "r0", 4));
    let answer = post(home.port, "/callbacks/pool-ready", r#"{"pool_id":"pool-0"}"#);
    assert_eq!((answer.status, answer.body.as_str()), (202, ""));
    home.until_routable(1.0);
    assert_eq!(get(home.port, "/v2/nodes").expect("an answer").status, 503, "it has no nodes to show");
}
