//! The daemons as processes: what an operator or a client sees when real files appear, real engines
//! die and real sockets close.

#[path = "daemons/harness.rs"]
mod harness;

use std::fs;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use harness::*;
use rustix::process::Signal;
use serde_json::Value;

const CHAT: &str = "/v1/chat/completions";
const SHORT: &str = r#"{"messages":[{"role":"user","content":"one two"}],"max_tokens":3}"#;

/// A streamed question for so many tokens.
fn stream_of(tokens: u32) -> String {
    format!(r#"{{"messages":[{{"role":"user","content":"x y"}}],"stream":true,"max_tokens":{tokens}}}"#)
}

/// Control plane and node agent in the CLOUD profile.
struct Cloud {
    directory: tempfile::TempDir,
    control_port: u16,
    agent_port: u16,
    control: Process,
    agent: Process,
}

impl Cloud {
    fn control(port: u16, directory: &std::path::Path, env: &[(&str, &str)]) -> Process {
        let addr = format!("0.0.0.0:{port}");
        let own = [("ORCHESTRATORD_CLOUD_PROFILE", "true"), ("ORCHESTRATORD_ADDR", &addr)];
        Process::start(ORCHESTRATORD, &[], &[&own[..], env].concat(), directory)
    }

    fn agent(port: u16, control: u16, directory: &std::path::Path, env: &[(&str, &str)]) -> Process {
        let (addr, address) = (format!("0.0.0.0:{port}"), format!("http://localhost:{port}"));
        let url = format!("http://localhost:{control}");
        let own = [
            ("POOL_MANAGERD_CLOUD_PROFILE", "true"),
            ("POOL_MANAGERD_NODE_ID", "test-node"),
            ("POOL_MANAGERD_ADDRESS", &address),
            ("ORCHESTRATORD_URL", &url),
            ("POOL_MANAGERD_ADDR", &addr),
        ];
        Process::start(POOL_MANAGERD, &[], &[&own[..], env].concat(), directory)
    }

    fn start(env: &[(&str, &str)]) -> Cloud {
        let directory = tempfile::tempdir().expect("a directory");
        let (control_port, agent_port) = (free_port(), free_port());
        let control = Cloud::control(control_port, directory.path(), env);
        let agent = Cloud::agent(agent_port, control_port, directory.path(), env);
        Cloud { directory, control_port, agent_port, control, agent }
    }

    fn engines(&self) -> std::path::PathBuf {
        self.directory.path().join(".runtime/engines")
    }

    /// The node's view, once `ask` finds in it what it looks for.
    fn node<T>(&self, what: &str, ask: impl Fn(&serde_json::Value) -> Option<T>) -> T {
        until(what, || ask(&get(self.control_port, "/v2/nodes")?.json()["nodes"][0]))
    }

    fn until_status(&self, status: &str) {
        self.node(status, |node| (node["status"] == status).then_some(()));
    }

    fn until_routable(&self) {
        self.node("a routable replica", |node| (node["replicas"][0]["routable"] == true).then_some(()));
    }
}

#[test]
fn three_terminals() {
    let mut cloud = Cloud::start(&[]);
    cloud.until_status("Online");
    let engine_port = free_port();
    let text = format!(
        r#"{{"pool_id":"pool-0","replica_id":"r0","engine":"llamacpp","url":"http://localhost:{engine_port}","engine_version":"v1","slots":4}}"#
    );
    hand_over(&cloud.engines(), "pool-0_r0.json", &text);
    // Nothing listens there: known, not ready, and why; in both daemons.
    let reason = cloud.node("a reason", |node| {
        let replica = &node["replicas"][0];
        let reason = replica["reason"].as_str().filter(|reason| reason.contains("refused"))?;
        (replica["ready"] == false && replica["slots_total"] == 4).then(|| reason.to_string())
    });
    assert!(reason.contains(&engine_port.to_string()), "{reason}");
    let status = get(cloud.agent_port, "/v2/pools/pool-0/status").expect("an answer").json();
    assert!(status["ready"] == false && status["replicas"][0]["state"] == "probing", "{status}");

    // An engine starts there, and the replica becomes ready by itself.
    let _engine = demo_engine(engine_port, &[], cloud.directory.path());
    cloud.until_routable();
    let mut answer = open(cloud.control_port, "POST", CHAT, None, &stream_of(3)).expect("an answer");
    let events: Vec<String> = std::iter::from_fn(|| answer.event()).collect();
    assert!(events.concat().contains("[demo]") && events.last().is_some_and(|e| e == "[DONE]"), "{events:?}");
    // The engine listens on loopback, so its node relayed.
    let relayed = get(cloud.agent_port, "/metrics").expect("metrics").body;
    assert!(relayed.contains("pool_managerd_relayed_total{outcome=\"answered\"} 1"), "{relayed}");

    cloud.agent.signal(Signal::TERM);
    assert_eq!(cloud.agent.end(), Some(0));
    let nodes = get(cloud.control_port, "/v2/nodes").expect("an answer").json();
    assert_eq!(nodes["count"], 0, "it said goodbye: {nodes}");
    cloud.control.signal(Signal::INT);
    assert_eq!(cloud.control.end(), Some(0));
}

#[test]
fn a_request_that_waits_is_answered_when_a_handoff_appears() {
    let home = Home::start(&[]);
    let engine_port = free_port();
    let fast = ["--prefill-ms", "0", "--tokens-per-second", "0"];
    let _engine = demo_engine(engine_port, &fast, home.directory.path());
    let port = home.port;
    let waiting = thread::spawn(move || {
        let answer = open(port, "POST", CHAT, None, &stream_of(3)).expect("an answer");
        (answer.status, Instant::now())
    });
    until("the request to wait", || metric(port, "orchestratord_requests_waiting").filter(|n| *n == 1.0));
    let renamed = Instant::now();
    hand_over(&home.engines(), "a.json", &handoff(engine_port, "r0", 4));
    let (status, at) = waiting.join().expect("an answer");
    assert_eq!(status, 200);
    assert!(at - renamed < Duration::from_millis(500), "{:?} from rename to answer", at - renamed);
    let refused = post(port, "/v2/nodes/register", "{}");
    assert!(
        refused.status == 503 && refused.body.contains("ORCHESTRATORD_CLOUD_PROFILE=true"),
        "{refused:?}"
    );
}

#[test]
fn files_come_go_and_change_and_bad_ones_harm_nobody() {
    let home = Home::start(&[]);
    let (first, second) = (free_port(), free_port());
    let _first = demo_engine(first, &["--model", "first"], home.directory.path());
    let _second = demo_engine(second, &["--model", "second"], home.directory.path());
    let models = || get(home.port, "/v1/models").expect("an answer").json()["data"].to_string();
    for (name, text) in [
        ("broken.json", "{\"url\":"),
        ("meta.json", r#"{"url":"http://169.254.169.254/","pool_id":"meta"}"#),
        ("any.json", r#"{"url":"http://0.0.0.0:80","pool_id":"any"}"#),
        ("tls.json", r#"{"url":"https://169.254.169.254:1","pool_id":"tls"}"#),
        ("path.json", r#"{"url":"http://127.0.0.1:1","pool_id":"../x"}"#),
    ] {
        hand_over(&home.engines(), name, text);
    }
    std::os::unix::fs::symlink("/etc/shadow", home.engines().join("link.json")).expect("linked");
    hand_over(&home.engines(), "good.json", &handoff(first, "r0", 4));
    home.until_routable(1.0);
    // A file that ends too early may still be written: it is refused after a moment.
    until("six files to be refused", || {
        let listed = get(home.port, "/v2/handoffs").expect("an answer").json();
        let files = listed["files"].as_array().expect("files");
        let is_refused = |file: &&Value| file["state"] == "refused" && file["error"].is_string();
        (files.len() == 7 && files.iter().filter(is_refused).count() == 6).then_some(())
    });
    assert!(models().contains("first"));

    hand_over(&home.engines(), "good.json", &handoff(second, "r0", 4));
    until("the new engine", || models().contains("second").then_some(()));
    let answer = post(home.port, CHAT, SHORT).json();
    assert_eq!(answer["model"], "second", "{answer}");
    fs::remove_file(home.engines().join("good.json")).expect("removed");
    home.until_routable(0.0);
    assert_eq!(models(), "[]");
    let log = home.daemon.log();
    for name in ["broken.json", "meta.json", "any.json", "tls.json", "path.json", "link.json"] {
        assert_eq!(log.matches(&format!("{name}\": refused")).count(), 1, "{name} in\n{log}");
    }
}

#[test]
fn a_dead_engine_costs_no_request_while_another_lives() {
    let home = Home::start(&[]);
    let (one, two) = (free_port(), free_port());
    let mut engine = demo_engine(one, &["--prefill-ms", "0"], home.directory.path());
    let _other = demo_engine(two, &["--prefill-ms", "0"], home.directory.path());
    hand_over(&home.engines(), "one.json", &handoff(one, "r0", 4));
    hand_over(&home.engines(), "two.json", &handoff(two, "r1", 4));
    home.until_routable(2.0);
    engine.kill();
    for n in 0..20 {
        let answer = post(home.port, CHAT, SHORT);
        assert_eq!(answer.status, 200, "request {n}: {answer:?}");
    }
    home.until_routable(1.0);
    // It comes back by itself when something answers there again.
    let _engine = demo_engine(one, &[], home.directory.path());
    home.until_routable(2.0);
}

#[test]
fn slots_are_kept_and_freed_when_a_client_leaves() {
    let home = Home::start(&[]);
    let engine_port = free_port();
    let _engine =
        demo_engine(engine_port, &["--slots", "1", "--tokens-per-second", "20"], home.directory.path());
    hand_over(&home.engines(), "a.json", &handoff(engine_port, "r0", 1));
    home.until_routable(1.0);
    let mut long = open(home.port, "POST", CHAT, None, &stream_of(400)).expect("an answer");
    long.event().expect("a first event");
    let port = home.port;
    let next = thread::spawn(move || (post(port, CHAT, SHORT).status, Instant::now()));
    // A second one waits, and one that leaves is forgotten.
    until("one to wait", || metric(port, "orchestratord_requests_waiting").filter(|n| *n == 1.0));
    {
        use std::io::Write;
        let mut leaver = std::net::TcpStream::connect(("127.0.0.1", port)).expect("connected");
        write!(
            leaver,
            "POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n\r\n{SHORT}",
            SHORT.len()
        )
        .expect("sent");
        until("two to wait", || metric(port, "orchestratord_requests_waiting").filter(|n| *n == 2.0));
    }
    until("the leaver to be forgotten", || {
        metric(port, "orchestratord_requests_waiting").filter(|n| *n == 1.0)
    });
    let left = Instant::now();
    drop(long);
    let (status, at) = next.join().expect("an answer");
    assert_eq!(status, 200);
    // Three tokens at twenty a second take 150 ms; the stream that was left had 20 s to go.
    assert!(at - left < Duration::from_secs(5), "{:?} until the slot was used again", at - left);
    until("all slots to be free", || metric(port, "orchestratord_slots_free").filter(|n| *n == 1.0));
}

#[test]
fn what_cannot_wait_is_refused_with_a_time_to_come_back() {
    let home = Home::start(&[("ORCHD_ADMISSION_CAPACITY", "1"), ("ORCHD_ADMISSION_TIMEOUT_MS", "400")]);
    let port = home.port;
    let waits = thread::spawn(move || post(port, CHAT, SHORT));
    until("one to wait", || metric(port, "orchestratord_requests_waiting").filter(|n| *n == 1.0));
    let full = post(port, CHAT, SHORT);
    assert_eq!((full.status, full.field("x-should-retry")), (429, Some("true")), "{full:?}");
    let seconds: u64 = full.field("retry-after").and_then(|s| s.parse().ok()).expect("a Retry-After");
    assert!((1..=60).contains(&seconds));
    let late = waits.join().expect("an answer");
    assert!(late.status == 503 && late.json()["error"]["message"].is_string(), "{late:?}");
    let task = post(port, "/v2/tasks", r#"{"task_id":"t","prompt":"p","max_tokens":0}"#);
    assert_eq!((task.status, task.json()["code"].as_str()), (400, Some("INVALID_PARAMS")));
}

#[test]
fn tasks_are_told_in_order_and_can_be_cancelled() {
    let home = Home::start(&[]);
    let engine_port = free_port();
    let _engine = demo_engine(engine_port, &["--tokens-per-second", "50"], home.directory.path());
    hand_over(&home.engines(), "a.json", &handoff(engine_port, "r0", 1));
    home.until_routable(1.0);
    let created = post(home.port, "/v2/tasks", r#"{"task_id":"a","prompt":"p q","max_tokens":3}"#);
    assert_eq!((created.status, created.json()["queue_position"].as_u64()), (202, Some(0)), "{created:?}");
    let names = |text: &str| -> Vec<String> {
        text.lines().filter_map(|line| line.strip_prefix("event: ").map(str::to_string)).collect()
    };
    let events = get(home.port, "/v2/tasks/a/events").expect("events");
    assert_eq!(names(&events.body), ["started", "token", "token", "token", "end"], "{events:?}");
    assert_eq!(get(home.port, "/v2/tasks/a/events").expect("an answer").status, 410, "it was read");

    post(home.port, "/v2/tasks", r#"{"task_id":"busy","prompt":"p","max_tokens":500}"#);
    let waiting = post(home.port, "/v2/tasks", r#"{"task_id":"b","prompt":"p","max_tokens":3}"#);
    assert_eq!(waiting.status, 202);
    for task in ["b", "busy", "busy"] {
        assert_eq!(post(home.port, &format!("/v2/tasks/{task}/cancel"), "").status, 204);
    }
    let events = get(home.port, "/v2/tasks/b/events").expect("events");
    assert_eq!(names(&events.body), ["started", "end"]);
    assert!(events.body.contains("\"canceled\":true"), "{events:?}");
    until("the slot to be free", || metric(home.port, "orchestratord_slots_free").filter(|n| *n == 1.0));
}

#[test]
fn with_a_token_nothing_is_open_but_probes_and_scrapes() {
    let secret = "canary-token-0123456789abcdef0123456789";
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("token");
    fs::write(&file, format!("{secret}\n")).expect("written");
    let name = file.to_string_lossy().into_owned();
    let cloud = Cloud::start(&[("LLORCH_API_TOKEN_FILE", &name)]);
    let with = |token: Option<&str>, path: &str| ask(cloud.control_port, "GET", path, token, "");
    until("the node", || {
        (with(Some(secret), "/v2/nodes")?.json()["nodes"][0]["status"] == "Online").then_some(())
    });
    for path in ["/v2/nodes", "/v2/pools", "/v2/events", "/v1/models", "/no/such/path"] {
        let (missing, bad) =
            (with(None, path).expect("an answer"), with(Some("wrong"), path).expect("an answer"));
        assert_eq!((missing.status, bad.status), (401, 401), "{path}");
        assert!(missing.field("x-correlation-id").is_some());
    }
    assert_eq!(with(None, "/v2/nodes").expect("an answer").json()["code"], 40101);
    assert_eq!(with(Some("wrong"), "/v2/nodes").expect("an answer").json()["code"], 40102);
    for path in ["/health", "/ready", "/metrics"] {
        assert_eq!(with(None, path).expect("an answer").status, 200, "{path}");
    }
    // The relay to the node carries the token too.
    let engine_port = free_port();
    let _engine = demo_engine(engine_port, &[], directory.path());
    hand_over(&cloud.engines(), "a.json", &handoff(engine_port, "r0", 1));
    let answer = ask(cloud.control_port, "POST", CHAT, Some(secret), SHORT).expect("an answer");
    assert_eq!(answer.status, 200, "{answer:?}");
    assert_eq!(get(cloud.agent_port, "/v2/pools").expect("an answer").status, 401);
    // Rotation: the new and the old one, after SIGHUP.
    fs::write(&file, format!("fresh-token\n{secret}\n")).expect("written");
    cloud.control.signal(Signal::HUP);
    until("the new token", || with(Some("fresh-token"), "/v2/nodes").filter(|answer| answer.status == 200));
    assert_eq!(with(Some(secret), "/v2/nodes").expect("an answer").status, 200);
    for process in [&cloud.control, &cloud.agent] {
        let line = fs::read(format!("/proc/{}/cmdline", process.pid())).expect("a command line");
        assert!(!String::from_utf8_lossy(&line).contains(secret) && !process.log().contains(secret));
    }
}

#[test]
fn both_sides_survive_the_other_ones_death() {
    let quick = [
        ("POOL_MANAGERD_HEARTBEAT_INTERVAL_SECS", "1"),
        ("ORCHESTRATORD_HEARTBEAT_INTERVAL_SECS", "1"),
        ("ORCHESTRATORD_NODE_TIMEOUT_MS", "2500"),
    ];
    let mut cloud = Cloud::start(&quick);
    let engine_port = free_port();
    let _engine = demo_engine(engine_port, &[], cloud.directory.path());
    hand_over(&cloud.engines(), "a.json", &handoff(engine_port, "r0", 1));
    cloud.until_routable();
    cloud.control.kill();
    cloud.control = Cloud::control(cloud.control_port, cloud.directory.path(), &quick);
    cloud.until_routable();
    cloud.agent.kill();
    cloud.until_status("Suspect");
    cloud.agent = Cloud::agent(cloud.agent_port, cloud.control_port, cloud.directory.path(), &quick);
    cloud.until_status("Online");
    cloud.until_routable();
}

#[test]
fn bad_configuration_is_one_line_and_exit_78() {
    let run = |program: &str, args: &[&str], env: &[(&str, &str)]| {
        let output = Command::new(program).args(args).envs(env.iter().copied()).output().expect("it runs");
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    for (program, name, value) in [
        (ORCHESTRATORD, "ORCHESTRATORD_NODE_TIMEOUT_MS", "soon"),
        (ORCHESTRATORD, "ORCHESTRATORD_ADDR", "here"),
        (POOL_MANAGERD, "POOL_MANAGERD_CLOUD_PROFILE", "perhaps"),
        (POOL_MANAGERD, "POOL_MANAGERD_WATCH_INTERVAL_MS", "1"),
    ] {
        let (code, said) = run(program, &[], &[(name, value)]);
        assert_eq!((code, said.lines().count()), (Some(78), 1), "{said}");
        assert!(said.contains(name) && said.contains(value) && said.contains("allowed"), "{said}");
    }
    assert_eq!(run(ORCHESTRATORD, &["--nonsense"], &[]).0, Some(2));
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let addr = taken.local_addr().expect("an address").to_string();
    let (code, said) = run(POOL_MANAGERD, &["--addr", &addr], &[]);
    assert!(
        code == Some(1) && said.contains(&addr) && said.contains("POOL_MANAGERD_ADDR"),
        "{code:?} {said}"
    );
}

#[test]
fn a_directory_that_cannot_be_had_is_said_and_found_again() {
    let root = tempfile::tempdir().expect("a directory");
    let blocked = root.path().join("file");
    fs::write(&blocked, "").expect("written");
    let port = free_port();
    let (addr, engines) = (format!("127.0.0.1:{port}"), blocked.join("engines").display().to_string());
    let args = ["--addr", &addr, "--runtime-dir", &engines, "--watch-interval-ms", "100"];
    let daemon = Process::start(POOL_MANAGERD, &args, &[], root.path());
    let not_ready = until("a daemon that is not ready", || get(port, "/ready").filter(|a| a.status == 503));
    assert!(not_ready.body.contains("--runtime-dir"), "{not_ready:?}");
    fs::remove_file(&blocked).expect("removed");
    until("the directory", || get(port, "/ready").filter(|answer| answer.status == 200));
    assert_eq!(daemon.log().matches("--runtime-dir").count(), 1, "{}", daemon.log());
}

#[test]
fn sigterm_lets_a_stream_finish_and_a_second_one_does_not() {
    let mut home = Home::start(&[]);
    let engine_port = free_port();
    let _engine = demo_engine(engine_port, &["--tokens-per-second", "20"], home.directory.path());
    hand_over(&home.engines(), "a.json", &handoff(engine_port, "r0", 2));
    home.until_routable(1.0);
    let mut stream = open(home.port, "POST", CHAT, None, &stream_of(12)).expect("an answer");
    stream.event().expect("a first event");
    home.daemon.signal(Signal::TERM);
    until("new clients to be turned away", || get(home.port, "/health").is_none().then_some(()));
    let rest: Vec<String> = std::iter::from_fn(|| stream.event()).collect();
    assert_eq!(rest.last().map(String::as_str), Some("[DONE]"), "{rest:?}");
    assert_eq!(home.daemon.end(), Some(0));

    let mut home = Home::start(&[]);
    hand_over(&home.engines(), "a.json", &handoff(engine_port, "r0", 2));
    home.until_routable(1.0);
    let mut stream = open(home.port, "POST", CHAT, None, &stream_of(400)).expect("an answer");
    stream.event().expect("a first event");
    home.daemon.signal(Signal::TERM);
    until("new clients to be turned away", || get(home.port, "/health").is_none().then_some(()));
    let second = Instant::now();
    home.daemon.signal(Signal::TERM);
    assert_eq!(home.daemon.end(), Some(0));
    assert!(second.elapsed() < Duration::from_secs(5));
}

#[test]
fn an_idle_node_agent_sleeps() {
    let cloud = Cloud::start(&[]);
    let engine_port = free_port();
    let _engine = demo_engine(engine_port, &[], cloud.directory.path());
    for n in 0..10 {
        hand_over(&cloud.engines(), &format!("r{n}.json"), &handoff(engine_port, &format!("r{n}"), 4));
    }
    until("ten ready replicas", || {
        let status = get(cloud.agent_port, "/v2/pools/pool-0/status")?.json();
        (status["replicas"].as_array()?.iter().filter(|replica| replica["ready"] == true).count() == 10)
            .then_some(())
    });
    let tasks = format!("/proc/{}/task", cloud.agent.pid());
    assert!(fs::read_dir(&tasks).expect("threads").count() <= 3, "one loop and at most two helpers");
    // A window of time is what is measured here, so this sleeps.
    let before = times_woken(&cloud.agent);
    thread::sleep(Duration::from_secs(3));
    let woken = times_woken(&cloud.agent) - before;
    assert!(woken <= 60, "{woken} wake-ups in 3 s: probes, a heartbeat, and nothing else");
}

/// How often a thread of the process has waited, and gone on.
fn times_woken(process: &Process) -> u64 {
    let threads = fs::read_dir(format!("/proc/{}/task", process.pid())).expect("threads").flatten();
    let status = threads.filter_map(|thread| fs::read_to_string(thread.path().join("status")).ok());
    let line = |text: String| {
        let line = text.lines().find(|line| line.starts_with("voluntary_ctxt_switches"))?.to_string();
        line.split_whitespace().last()?.parse::<u64>().ok()
    };
    status.filter_map(line).sum()
}

#[test]
fn a_node_agent_without_replicas_wakes_up_for_heartbeats_alone() {
    let cloud = Cloud::start(&[]);
    cloud.until_status("Online");
    // A window of time is what is measured here, so this sleeps: after what follows a start.
    thread::sleep(Duration::from_secs(2));
    let before = times_woken(&cloud.agent);
    thread::sleep(Duration::from_secs(10));
    let woken = times_woken(&cloud.agent) - before;
    // Two heartbeats with their answers at most; the rest is for a machine on which a page has to be read again.
    assert!(woken <= 6, "{woken} wake-ups in 10 s");
}
