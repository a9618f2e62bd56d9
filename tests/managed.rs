//! Managed pools: another model or a prepared engine is ordered over HTTP, and what serves meanwhile goes on.

#[path = "models/server.rs"]
#[allow(dead_code, reason = "shared with another test, which uses other parts")]
mod server;

#[path = "provisioner/harness.rs"]
#[allow(dead_code, reason = "shared with other tests, which use other parts")]
mod provisioner;

#[path = "daemons/harness.rs"]
#[allow(dead_code, reason = "shared with other tests, which use other parts")]
mod daemons;

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use daemons::{POOL_MANAGERD, Process, free_port, get, post, until};
use provisioner::Provisioner;
use rustix::fs::{AtFlags, CWD, Timespec, Timestamps, UTIME_NOW};
use rustix::process::Signal;
use serde_json::{Value, json};
use server::{Reply, Server};

const LLORCH: &str = env!("CARGO_BIN_EXE_llorch");

/// Token of an operator.
const OPERATOR: &str = "operator-012345678901234567890123456789012345";

/// A provisioner with an engine that says its model's path as its name, and an agent beside it.
fn start(root: &Path) -> (Provisioner, Process, u16) {
    fs::write(root.join("a.bin"), "a").expect("written");
    fs::write(root.join("b.bin"), "b").expect("written");
    let flag = format!("--model={}", root.join("a.bin").display());
    let command = [LLORCH, "demo-engine", "--port", "{port}", "--model", "{model}"];
    let mut one = Provisioner::start(root, &["--restart=always", &flag], &command);
    for event in ["spawned", "healthy", "handoff_written"] {
        one.event(event);
    }
    let port = free_port();
    let (addr, engines) = (format!("127.0.0.1:{port}"), root.join("engines").display().to_string());
    let env = [("POOL_MANAGERD_ADDR", addr.as_str()), ("POOL_MANAGERD_RUNTIME_DIR", &engines)];
    let agent = Process::start(POOL_MANAGERD, &[], &env, root);
    until("the replica", || ready(port, "a"));
    (one, agent, port)
}

fn status(port: u16) -> Option<Value> {
    get(port, "/v2/pools/pool-0/status").filter(|answer| answer.status == 200).map(|answer| answer.json())
}

/// The status, once a replica with the model is ready.
fn ready(port: u16, model: &str) -> Option<Value> {
    status(port).filter(|status| status["ready"] == true && status["models_available"] == json!([model]))
}

/// The status, once the last order has ended.
fn ended(port: u16) -> Value {
    until("the end of the order", || status(port).filter(|status| status["reload"]["state"] == "ended"))
}

fn reload(port: u16, model: &str) -> (u16, Value) {
    let answer = post(port, "/v2/pools/pool-0/reload", &json!({"new_model_ref": model}).to_string());
    (answer.status, answer.json())
}

#[test]
fn a_pool_gets_another_model_and_keeps_the_old_one_where_that_fails() {
    let root = tempfile::tempdir().expect("a directory");
    let (one, agent, port) = start(root.path());
    let pid = one.handoff().and_then(|handoff| handoff.pid);
    let (code, told) = reload(port, "/no/such.gguf");
    assert_eq!((code, &told["pool_id"]), (202, &json!("pool-0")), "{told}");
    let told = ended(port);
    assert_eq!(told["reload"]["outcome"]["success"], false, "{told}");
    assert_eq!(told["reload"]["outcome"]["rolled_back"], true, "{told}");
    assert_eq!(told["preparation"]["steps"][0]["status"], "failed", "{told}");
    assert!(told["reload"]["outcome"]["reason"].as_str().is_some_and(|why| why.contains("/no/such.gguf")));
    assert_eq!(told["ready"], true, "{told}");
    assert_eq!(one.handoff().and_then(|handoff| handoff.pid), pid, "the old engine goes on");

    let (code, _) = reload(port, &root.path().join("b.bin").display().to_string());
    assert_eq!(code, 202);
    let told = ended(port);
    assert_eq!(told["reload"]["outcome"]["success"], true, "{told}\n{}", agent.log());
    let steps = told["preparation"]["steps"].as_array().expect("steps");
    for kind in ["model_fetch", "pool_warmup"] {
        let step = steps.iter().find(|step| step["kind"] == kind).expect(kind);
        assert_eq!(step["status"], "completed", "{told}");
    }
    until("the new model", || ready(port, "b"));
    // A replacement of the same is none.
    let pid = one.handoff().and_then(|handoff| handoff.pid);
    assert_eq!(reload(port, &root.path().join("b.bin").display().to_string()).0, 202);
    assert_eq!(ended(port)["reload"]["outcome"]["success"], true);
    assert_eq!(one.handoff().and_then(|handoff| handoff.pid), pid);
}

#[test]
fn a_fetch_of_minutes_holds_nobody_up_and_shows_how_far_it_is() {
    let root = tempfile::tempdir().expect("a directory");
    let (mut one, _agent, port) = start(root.path());
    let content = vec![7; 64 << 20];
    let slow = Server::start(move |ask, _| {
        Reply::of(&content, "\"v1\"", ask).slow(64 << 10, Duration::from_millis(100))
    });
    assert_eq!(reload(port, &slow.url("/m.bin")).0, 202);
    let told = until("progress", || {
        status(port).filter(|told| told["preparation"]["steps"][0]["bytes_done"].as_u64() > Some(0))
    });
    let step = &told["preparation"]["steps"][0];
    assert_eq!((&step["kind"], &step["status"]), (&json!("model_fetch"), &json!("running")), "{told}");
    assert_eq!(step["bytes_total"], 64 << 20, "{told}");
    assert_eq!((&told["reload"]["state"], &told["ready"]), (&json!("running"), &json!(true)), "{told}");
    let (code, told) = reload(port, "/another.gguf");
    assert_eq!((code, &told["code"]), (409, &json!("CONFLICT")), "{told}");
    one.signal(Signal::TERM);
    assert_eq!(one.end().0, 0);
}

#[test]
fn a_prepared_engine_joins_a_pool_and_a_bad_one_leaves_nothing_behind() {
    let root = tempfile::tempdir().expect("a directory");
    let (one, _agent, port) = start(root.path());
    let engine = root.path().join("engine");
    fs::write(&engine, format!("#!/bin/sh\nexec '{LLORCH}' demo-engine \"$@\"\n")).expect("written");
    fs::set_permissions(&engine, fs::Permissions::from_mode(0o755)).expect("set");
    let preload = |binary: &str, replica: &str| {
        let prepared = json!({
            "binary_path": binary, "flags": ["--slots", "2"], "host": "127.0.0.1", "engine_version": "v9",
            "replica_id": replica, "model_path": root.path().join("b.bin"),
        });
        let answer = post(port, "/pools/pool-0/preload", &json!({"prepared": prepared}).to_string());
        (answer.status, answer.json())
    };
    let (code, told) = preload("/bin/false", "bad");
    let why = told["error"].as_str().expect("a reason").to_string();
    assert!(code == 500 && why.starts_with("preload failed: health check failed"), "{code} {told}");
    let (code, told) = preload("/no/such/program", "bad");
    let why = told["error"].as_str().expect("a reason").to_string();
    assert!(code == 500 && why.starts_with("preload failed: ") && why.contains("does not exist"), "{told}");
    // The answer comes when the engine is there.
    let (code, told) = preload(&engine.display().to_string(), "r1");
    assert_eq!((code, &told["pool_id"]), (200, &json!("pool-0")), "{told}");
    let path = told["handoff_path"].as_str().expect("a path");
    let handoff: Value = serde_json::from_slice(&fs::read(path).expect("a handoff")).expect("JSON");
    assert_eq!((&handoff["pid"], &handoff["replica_id"]), (&told["pid"], &json!("r1")), "{handoff}");
    assert_eq!(handoff["engine_version"], "v9", "{handoff}");
    until("the replica", || {
        let answer = get(port, "/v2/pools/pool-0/replicas/r1/status")?;
        (answer.status == 200).then(|| answer.json()).filter(|replica| replica["ready"] == true)
    });
    assert_eq!(one.files().iter().filter(|name| name.ends_with(".json")).count(), 2, "{:?}", one.files());
}

#[test]
fn a_preload_that_loads_holds_up_its_caller_alone() {
    let root = tempfile::tempdir().expect("a directory");
    let (_one, _agent, port) = start(root.path());
    let (engine, go) = (root.path().join("engine"), root.path().join("go"));
    let wait = format!("until [ -e '{}' ]; do sleep 0.02; done", go.display());
    fs::write(&engine, format!("#!/bin/sh\n{wait}\nexec '{LLORCH}' demo-engine \"$@\"\n")).expect("written");
    fs::set_permissions(&engine, fs::Permissions::from_mode(0o755)).expect("set");
    let body = json!({"prepared": {"binary_path": engine, "replica_id": "r1"}}).to_string();
    let preload = |prefer: &str| {
        let agent = provisioner::client();
        let url = format!("http://127.0.0.1:{port}/v2/pools/pool-0/preload");
        let mut answer = agent.post(url).header("Prefer", prefer).send(&body).expect("an answer");
        let text = answer.body_mut().read_to_string().expect("a body");
        (answer.status().as_u16(), serde_json::from_str::<Value>(&text).expect("JSON"))
    };
    std::thread::scope(|scope| {
        let waits = scope.spawn(|| preload("handling=strict"));
        until("the engine loads", || status(port).filter(|told| told["reload"]["state"] == "running"));
        // Meanwhile all else is answered, and a second order is refused.
        assert!(!waits.is_finished());
        assert_eq!(preload("respond-async").0, 409);
        assert_eq!(status(port).expect("a status")["ready"], true);
        fs::write(&go, "").expect("written");
        let (code, told) = waits.join().expect("no panic");
        assert!(code == 200 && told["pid"].is_u64(), "{code} {told}");
    });
    // Whoever does not want to wait is told how far it is.
    fs::remove_file(&go).expect("removed");
    let body = json!({"prepared": {"binary_path": engine, "replica_id": "r2"}}).to_string();
    let agent = provisioner::client();
    let url = format!("http://127.0.0.1:{port}/v2/pools/pool-0/preload");
    let answer = agent.post(url).header("Prefer", "wait=1").send(&body).expect("an answer");
    assert_eq!(answer.status().as_u16(), 202);
    let told = status(port).expect("a status");
    assert_eq!(told["reload"]["state"], "running", "{told}");
    fs::write(&go, "").expect("written");
    assert_eq!(ended(port)["reload"]["outcome"]["success"], true);
}

#[test]
fn what_cannot_be_ordered_is_refused() {
    let root = tempfile::tempdir().expect("a directory");
    let (mut one, _agent, port) = start(root.path());
    for (path, body, code) in [
        ("/v2/pools/other/reload", r#"{"new_model_ref":"m"}"#, 404),
        ("/v2/pools/pool-0/reload", r#"{"model":"m"}"#, 400),
        ("/v2/pools/pool-0/reload", "", 400),
        ("/v2/pools/pool-0/reload", r#"{"new_model_ref":"a\nb"}"#, 400),
        ("/v2/pools/pool-0/preload", r#"{"prepared":{"binary_path":"/b","pool_id":"other"}}"#, 400),
        ("/v2/pools/pool-0/preload", r#"{"prepared":{}}"#, 400),
    ] {
        let answer = post(port, path, body);
        assert_eq!(answer.status, code, "{path} {body}: {answer:?}");
    }
    let directory = root.path().join("engines/.provisioners");
    let mode = fs::metadata(&directory).expect("it is there").permissions().mode() & 0o777;
    assert_eq!(mode, 0o700, "others could order");
    one.signal(Signal::TERM);
    one.event("stopped");
    assert_eq!(one.end().0, 0);
    assert!(!directory.exists(), "a socket was left");
    let answer = post(port, "/v2/pools/pool-0/reload", r#"{"new_model_ref":"m"}"#);
    assert_eq!(answer.status, 404, "{answer:?}");
}

#[test]
fn the_control_plane_passes_a_reload_on_to_the_nodes_agent() {
    let root = tempfile::tempdir().expect("a directory");
    let (_one, agent, port) = start(root.path());
    let plane = free_port();
    let (addr, agent_url) = (format!("127.0.0.1:{plane}"), format!("http://127.0.0.1:{port}"));
    let directory = root.path().join("plane");
    fs::create_dir(&directory).expect("created");
    let token = directory.join("node");
    fs::write(&token, "node-token-0123456789012345678901234567890123\n").expect("written");
    drop(agent);
    // With a token of its own for nodes, which is all that a control plane shows.
    let (token, engines) = (token.display().to_string(), root.path().join("engines").display().to_string());
    let agent_addr = format!("127.0.0.1:{port}");
    let env = [
        ("POOL_MANAGERD_ADDR", agent_addr.as_str()),
        ("POOL_MANAGERD_RUNTIME_DIR", &engines),
        ("LLORCH_NODE_TOKEN_FILE", &token),
    ];
    let _agent = Process::start(POOL_MANAGERD, &[], &env, root.path());
    let env = [
        ("ORCHESTRATORD_ADDR", addr.as_str()),
        ("POOL_MANAGERD_URL", agent_url.as_str()),
        ("ORCHD_POOL_POLL_INTERVAL_MS", "200"),
        ("LLORCH_NODE_TOKEN_FILE", token.as_str()),
        ("LLORCH_API_TOKEN", OPERATOR),
    ];
    let _plane = Process::start(daemons::ORCHESTRATORD, &[], &env, &directory);
    let model = root.path().join("b.bin").display().to_string();
    let call = |method: &str, path: &str, body: &str| daemons::ask(plane, method, path, Some(OPERATOR), body);
    let body = json!({"new_model_ref": model}).to_string();
    until("the plane", || get(plane, "/health"));
    until("the engine through the plane", || {
        let models = call("GET", "/v1/models", "")?.json();
        (models["data"][0]["id"] == "a").then_some(())
    });
    let told = until("the node", || {
        let answer = call("POST", "/v2/pools/pool-0/reload", &body)?;
        (answer.status != 404).then_some(answer)
    });
    assert_eq!(told.status, 202, "{told:?}");
    let told = told.json();
    assert_eq!((&told["pool_id"], &told["nodes"][0]["status"]), (&json!("pool-0"), &json!(202)), "{told}");
    assert!(told["nodes"][0]["preparation"]["steps"].is_array(), "{told}");
    until("the new model", || {
        let models = call("GET", "/v1/models", "")?.json();
        (models["data"][0]["id"] == "b").then_some(())
    });
    let status = |path: &str, body: &str| call("POST", path, body).expect("an answer").status;
    assert_eq!(status("/v2/pools/nowhere/reload", &body), 404);
    assert_eq!(status("/v2/pools/pool-0/reload", "{}"), 400);
    assert_eq!(post(plane, "/v2/pools/pool-0/reload", &body).status, 401);
}

#[test]
fn provisioners_are_asked_when_they_have_something_to_tell_and_not_in_between() {
    let root = tempfile::tempdir().expect("a directory");
    let (port, engines) = (free_port(), root.path().join("engines"));
    let addr = format!("127.0.0.1:{port}");
    let env = [
        ("POOL_MANAGERD_ADDR", addr.as_str()),
        ("POOL_MANAGERD_RUNTIME_DIR", engines.to_str().expect("UTF-8")),
    ];
    let agent = Process::start(POOL_MANAGERD, &[], &env, root.path());
    until("the agent", || get(port, "/ready").filter(|answer| answer.status == 200));

    // A provisioner that does nothing is asked once.
    let directory = engines.join(".provisioners");
    fs::create_dir(&directory).expect("created");
    let socket = directory.join("1.sock");
    let listener = UnixListener::bind(&socket).expect("bound");
    touch(&socket);
    let (asked, is_busy) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
    let (counted, busy) = (asked.clone(), is_busy.clone());
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.expect("a connection");
            let mut line = String::new();
            BufReader::new(&stream).read_line(&mut line).expect("a question");
            assert_eq!(line.trim_end(), r#"{"op":"preparing"}"#);
            counted.fetch_add(1, Ordering::SeqCst);
            let step = json!({"kind": "model_fetch", "id": "p/r0", "status": "running", "detail": "m"});
            let pools = if busy.load(Ordering::SeqCst) {
                json!([{"pool_id": "p", "steps": [step]}])
            } else {
                json!([])
            };
            writeln!(stream, "{}", json!({"status": 200, "pools": pools})).expect("an answer");
        }
    });
    let count = || asked.load(Ordering::SeqCst);
    until("a first question", || (count() > 0).then_some(()));
    // A window of time is what is measured here, so this sleeps.
    std::thread::sleep(Duration::from_millis(500));
    let before = count();
    std::thread::sleep(Duration::from_secs(5));
    assert_eq!(count(), before, "nothing has happened");

    // One that begins with something is asked until that is over.
    is_busy.store(true, Ordering::SeqCst);
    touch(&socket);
    until("questions while something is under way", || (count() >= before + 3).then_some(()));
    is_busy.store(false, Ordering::SeqCst);
    std::thread::sleep(Duration::from_secs(1));
    let after = count();
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(count(), after, "it is over");

    // The directory goes with the last provisioner and comes with the next. One that still holds its socket keeps
    // the kernel from telling so; the agent has long seen the socket go by then.
    let mut held = Vec::new();
    for _ in 0..4 {
        fs::remove_file(&socket).expect("removed");
        std::thread::sleep(Duration::from_millis(20));
        fs::remove_dir(&directory).expect("removed");
        fs::create_dir(&directory).expect("created");
        let listener = UnixListener::bind(&socket).expect("bound");
        listener.set_nonblocking(true).expect("asked now and then");
        touch(&socket);
        let (mut stream, _) = until("a question", || listener.accept().ok());
        writeln!(stream, "{}", json!({"status": 200, "pools": []})).expect("an answer");
        held.push(listener);
    }
    drop(agent);
}

fn touch(file: &Path) {
    let now = Timespec { tv_sec: 0, tv_nsec: UTIME_NOW };
    let times = Timestamps { last_access: now, last_modification: now };
    rustix::fs::utimensat(CWD, file, &times, AtFlags::empty()).expect("touched");
}

#[test]
fn an_engine_that_keeps_failing_is_shown_with_the_reason_and_its_next_start() {
    let root = tempfile::tempdir().expect("a directory");
    let command = ["sh", "-c", "exit 3 # {port}"];
    let mut one = Provisioner::start(root.path(), &["--restart=always"], &command);
    one.event("spawned");
    let failed = one.event("failed");
    assert_eq!((&failed["failures"], &failed["breaker_open"]), (&json!(1), &json!(false)), "{failed}");
    assert!(failed["reason"].as_str().is_some_and(|why| why.contains("exit status 3")), "{failed}");
    assert!(failed["retry_ms"].as_u64().is_some_and(|ms| (500..=1_000).contains(&ms)), "{failed}");
    let port = free_port();
    let (addr, engines) = (format!("127.0.0.1:{port}"), root.path().join("engines").display().to_string());
    let env = [("POOL_MANAGERD_ADDR", addr.as_str()), ("POOL_MANAGERD_RUNTIME_DIR", &engines)];
    let _agent = Process::start(POOL_MANAGERD, &[], &env, root.path());
    let step = until("its reason", || {
        let step = status(port)?["preparation"]["steps"][0].clone();
        (step["status"] == "failed").then_some(step)
    });
    assert_eq!((&step["kind"], &step["id"]), (&json!("pool_warmup"), &json!("pool-0/r0")), "{step}");
    let detail = step["detail"].as_str().expect("a text");
    assert!(detail.contains("exit status 3; it is started again in"), "{detail}");
}

#[test]
fn a_task_shows_what_its_pool_is_waiting_for() {
    // The agent knows the control plane, and tells it with its heartbeats.
    shown_to_a_task(|_, plane| {
        (
            Vec::new(),
            vec![("POOL_MANAGERD_CLOUD_PROFILE", "true".into()), ("ORCHESTRATORD_URL", plane.into())],
        )
    });
}

#[test]
fn a_task_shows_what_a_polled_agent_tells_too() {
    // The control plane knows the agent, and asks it.
    shown_to_a_task(|agent, _| {
        let plane = vec![("POOL_MANAGERD_URL", agent.into()), ("ORCHD_POOL_POLL_INTERVAL_MS", "100".into())];
        (plane, Vec::new())
    });
}

/// Variables of a process.
type Env = Vec<(&'static str, String)>;

/// A node fetches its model while tasks are submitted. `know` says which further variables make control plane and
/// agent known to each other, given the URLs of agent and control plane.
fn shown_to_a_task(know: impl Fn(&str, &str) -> (Env, Env)) {
    let root = tempfile::tempdir().expect("a directory");
    let content = vec![7; 1 << 20];
    let go = Arc::new(AtomicBool::new(false));
    let (gate, bytes) = (Arc::clone(&go), content.clone());
    // The first connection breaks; the next ones are held until the test has seen enough.
    let server = Server::start(move |ask, nth| {
        let reply = Reply::of(&bytes, "\"v1\"", ask);
        if nth == 0 {
            return reply.cut(64 << 10);
        }
        until("the gate", || gate.load(Ordering::Acquire).then_some(()));
        reply
    });
    let (plane, port) = (free_port(), free_port());
    let (plane_addr, addr) = (format!("127.0.0.1:{plane}"), format!("127.0.0.1:{port}"));
    let (plane_url, agent_url) = (format!("http://{plane_addr}"), format!("http://{addr}"));
    let engines = root.path().join("engines");
    fs::create_dir(&engines).expect("created");
    let engines = engines.display().to_string();
    let directory = root.path().join("plane");
    fs::create_dir(&directory).expect("created");
    let (further_plane, further_agent) = know(&agent_url, &plane_url);
    let with = |own: &[(&'static str, &str)], further: &Env| -> Env {
        own.iter().map(|(name, value)| (*name, (*value).to_string())).chain(further.iter().cloned()).collect()
    };
    let start = |program, env: &Env, directory: &Path| {
        let env: Vec<(&str, &str)> = env.iter().map(|(name, value)| (*name, value.as_str())).collect();
        Process::start(program, &[], &env, directory)
    };
    let env = [("ORCHESTRATORD_CLOUD_PROFILE", "true"), ("ORCHESTRATORD_ADDR", plane_addr.as_str())];
    let _plane = start(daemons::ORCHESTRATORD, &with(&env, &further_plane), &directory);
    let env = [
        ("POOL_MANAGERD_ADDR", addr.as_str()),
        ("POOL_MANAGERD_PUBLIC_URL", &agent_url),
        ("POOL_MANAGERD_NODE_ID", "node-a"),
        ("POOL_MANAGERD_RUNTIME_DIR", &engines),
    ];
    let _agent = start(POOL_MANAGERD, &with(&env, &further_agent), root.path());
    let flag = format!("--model={}", server.url("/m.bin"));
    let command = [LLORCH, "demo-engine", "--port", "{port}", "--model", "{model}"];
    let mut one = Provisioner::start(root.path(), &["--restart=always", &flag], &command);
    let preparation = || get(plane, "/v2/nodes").map(|nodes| nodes.json()["nodes"][0]["preparation"].clone());
    let submit = |id: &str| {
        let task = json!({"task_id": id, "prompt": "p", "placement": {"pin_pool_id": "pool-0"}});
        let told = daemons::ask(plane, "POST", "/v2/tasks", None, &task.to_string()).expect("an answer");
        assert_eq!(told.status, 202, "{told:?}");
        told.json()
    };
    // Nobody knows a replica of it yet, but that it comes, and what is done for it.
    until("the fetch", || preparation().filter(|told| told[0]["steps"][0]["bytes_total"].is_u64()));
    let told = submit("first");
    let step = &told["preparation"]["steps"][0];
    assert_eq!((&step["kind"], &step["status"]), (&json!("model_fetch"), &json!("running")), "{told}");
    assert_eq!((&step["id"], &step["group"]), (&json!("pool-0/r0"), &json!("pool-0")), "{told}");
    assert_eq!((&step["node_id"], &step["bytes_total"]), (&json!("node-a"), &json!(1 << 20)), "{told}");
    assert_eq!(told["predicted_start_ms"], Value::Null, "{told}");
    go.store(true, Ordering::Release);
    for event in ["spawned", "healthy", "handoff_written"] {
        one.event(event);
    }
    let events = daemons::ask(plane, "GET", "/v2/tasks/first/events", None, "").expect("events");
    assert!(events.body.contains("event: end"), "it waited for its pool: {}", events.body);
    // What is there needs no steps.
    until("the end of the steps", || preparation().filter(Value::is_null));
    assert_eq!(submit("second")["preparation"]["steps"], json!([]));
}
