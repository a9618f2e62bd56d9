//! Routes of the control plane for operators and for programs that run engines of their own: pools drained on
//! every node at once, what is where, what can be asked, and engines without an agent. Real daemons, real
//! sockets.

#[path = "membership/cluster.rs"]
#[allow(dead_code, reason = "shared with other tests")]
mod cluster;
#[path = "daemons/harness.rs"]
#[allow(dead_code, reason = "shared with other tests")]
mod harness;

use cluster::*;
use harness::*;
use serde_json::{Value, json};

const POOL: &str = "/v2/pools/pool-0";

/// A stream that has begun.
fn stream(port: u16) -> Open {
    let mut stream = open(port, "POST", CHAT, None, &stream_of(100_000)).expect("an answer");
    stream.event().expect("a first event");
    stream
}

fn show(port: u16, path: &str) -> Value {
    let answer = get(port, path).expect("an answer");
    assert_eq!(answer.status, 200, "{path}: {answer:?}");
    answer.json()
}

/// Requests that an agent has relayed to its engines.
fn relayed(node: &Node) -> f64 {
    let answer = get(node.port, "/metrics").expect("metrics");
    let of_relay = |line: &&str| line.starts_with("pool_managerd_relayed_total");
    answer.body.lines().filter(of_relay).filter_map(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok()).sum()
}

#[test]
fn a_pool_drains_on_every_node_and_takes_work_again() {
    let control = Control::start(&[]);
    let nodes = ["a", "b"].map(|name| Node::start(name, control.port, 1, "50", &[]));
    control.until_routable(2.0);
    let running = stream(control.port);
    let begun = post(control.port, &format!("{POOL}/drain"), r#"{"deadline_ms":3600000}"#);
    assert_eq!(begun.status, 202, "{begun:?}");
    let told = begun.json();
    assert_eq!((&told["draining"], &told["in_flight"]), (&json!(true), &json!(1)), "{told}");
    assert!(told["deadline_at_ms"].is_u64(), "{told}");
    let names: Vec<&str> = told["nodes"]
        .as_array()
        .expect("a list")
        .iter()
        .filter_map(|node| node["node_id"].as_str())
        .collect();
    assert_eq!(names, ["a", "b"]);
    // From the answer on nothing goes there, whenever the next heartbeats come.
    let before: f64 = nodes.iter().map(relayed).sum();
    let refused = ask(control.port, "GET", "/v2/pools", None, "").expect("an answer").json();
    for replica in refused["pools"][0]["replicas"].as_array().expect("a list") {
        assert_eq!((&replica["routable"], &replica["reason"]), (&json!(false), &json!("draining")));
    }
    let body = r#"{"messages":[{"role":"user","content":"x"}],"max_tokens":3}"#;
    let waits = std::thread::scope(|scope| {
        let asked = scope.spawn(|| {
            let asked = ask(control.port, "POST", CHAT, None, body).expect("an answer");
            (asked.status, asked.body)
        });
        until("the request to wait", || {
            metric(control.port, "orchestratord_requests_waiting").filter(|waiting| *waiting == 1.0)
        });
        let shown = show(control.port, &format!("{POOL}/drain"));
        assert_eq!((&shown["drained"], &shown["in_flight"]), (&json!(false), &json!(1)), "{shown}");
        assert_eq!(nodes.iter().map(relayed).sum::<f64>(), before, "nothing new was sent to an agent");
        drop(running);
        let drained = until("what runs to end", || {
            Some(show(control.port, &format!("{POOL}/drain"))).filter(|shown| shown["drained"] == true)
        });
        assert_eq!((&drained["finished"], &drained["cut"]), (&json!(1), &json!(0)), "{drained}");
        control.until_routable(0.0);
        let resumed = post(control.port, &format!("{POOL}/resume"), "");
        assert_eq!((resumed.status, &resumed.json()["draining"]), (200, &json!(false)), "{resumed:?}");
        control.until_routable(2.0);
        asked.join().expect("no panic")
    });
    assert_eq!(waits.0, 200, "{}", waits.1);
    assert_eq!(show(control.port, &format!("{POOL}/drain"))["draining"], false);
}

#[test]
fn a_node_that_cannot_be_told_is_named() {
    let control = Control::start(&[("ORCHESTRATORD_NODE_TIMEOUT_MS", "60000")]);
    let mut nodes = ["a", "b"].map(|name| Node::start(name, control.port, 1, "0", &[]));
    control.until_routable(2.0);
    for (path, body, status) in [
        ("/v2/pools/none/drain", "", 404),
        ("/v2/pools/none/resume", "", 404),
        ("/v2/pools/pool-0/drain", r#"{"deadline_ms":-1}"#, 400),
        ("/v2/pools/pool-0/drain", "[]", 400),
        ("/v2/node/drain", "", 404),
    ] {
        assert_eq!(post(control.port, path, body).status, status, "{path} {body}");
    }
    nodes[1].agent.kill();
    let refused = post(control.port, &format!("{POOL}/drain"), "");
    let told = refused.json();
    assert_eq!((refused.status, &told["code"]), (502, &json!("AGENT_FAILED")), "{told}");
    assert!(
        told["message"].as_str().is_some_and(|why| why.starts_with("1 of 2 agents") && why.contains("b: "))
    );
    assert_eq!(
        (&told["nodes"][0]["status"], &told["nodes"][1]["status"]),
        (&json!(202), &json!(502)),
        "{told}"
    );
    // Where it was taken it is in force.
    let status = show(nodes[0].port, &format!("{POOL}/drain"));
    assert_eq!(status["draining"], true, "{status}");
    until("the node that lives to take no work", || {
        let node = control.node("a")?;
        (node["replicas"][0]["routable"] == false).then_some(())
    });
}

#[test]
fn a_node_that_stays_silent_is_named_in_the_end() {
    let control = Control::start(&[("ORCHESTRATORD_NODE_TIMEOUT_MS", "60000")]);
    // Connections are made there, and nobody takes them.
    let silent = listen_on_free_port();
    let port = silent.local_addr().expect("an address").port();
    let node = format!(r#"{{"node_id":"deaf","address":"http://127.0.0.1:{port}","pools":["pool-0"]}}"#);
    assert_eq!(post(control.port, "/v2/nodes/register", &node).status, 200);
    let refused = get(control.port, &format!("{POOL}/drain")).expect("an answer");
    let told = refused.json();
    assert_eq!((refused.status, &told["code"]), (504, &json!("AGENT_TIMEOUT")), "{told}");
    assert!(told["message"].as_str().is_some_and(|why| why.contains("deaf: ")), "{told}");
}

#[test]
fn agents_take_the_control_planes_orders_with_the_token_of_nodes() {
    let (node, admin) =
        ("node-token-0123456789abcdef0123456789abcd", "admin-token-0123456789abcdef0123456789abc");
    let directory = tempfile::tempdir().expect("a directory");
    let file = |name: &str, text: &str| {
        let path = directory.path().join(name);
        std::fs::write(&path, text).expect("written");
        path.display().to_string()
    };
    let (node_file, admin_file) = (file("node", node), file("admin", admin));
    let client_file = file("client", "client-token-0123456789abcdef0123456789");
    let keys = [
        ("LLORCH_CLIENT_TOKEN_FILE", client_file.as_str()),
        ("LLORCH_NODE_TOKEN_FILE", node_file.as_str()),
        ("LLORCH_ADMIN_TOKEN_FILE", admin_file.as_str()),
    ];
    let control = Control::start(&keys);
    let nodes = ["a", "b"].map(|name| Node::start(name, control.port, 1, "0", &keys));
    control.until_routable(2.0);
    let ask = |token: &str, verb: &str| {
        ask(control.port, "POST", &format!("{POOL}/{verb}"), Some(token), "").expect("an answer")
    };
    assert_eq!(ask(node, "drain").status, 403, "that is for operators");
    assert_eq!(ask(admin, "drain").status, 202);
    control.until_routable(0.0);
    assert_eq!(ask(admin, "resume").status, 200);
    control.until_routable(2.0);

    // What a file of its machine says an agent tells an engine for operators alone.
    let with_key = json!({"url": "http://127.0.0.1:9", "replica_id": "r9", "auth": {"file": client_file}});
    let announce = |token: &str, handoff: &Value| {
        let path = format!("{POOL}/ready");
        harness::ask(nodes[0].port, "POST", &path, Some(token), &handoff.to_string()).expect("an answer")
    };
    let refused = announce(node, &with_key);
    assert_eq!((refused.status, &refused.json()["code"]), (403, &json!("WRONG_SCOPE")), "{refused:?}");
    assert_eq!(announce(admin, &with_key).status, 202);
    assert_eq!(announce(node, &json!({"url": "http://127.0.0.1:9", "replica_id": "r8"})).status, 202);
}

#[test]
fn models_are_where_their_replicas_are() {
    let home = Home::start(&[]);
    let refused = get(home.port, "/v2/catalog/availability").expect("an answer");
    assert_eq!((refused.status, &refused.json()["code"]), (503, &json!("CLOUD_DISABLED")));

    let control = Control::start(&[]);
    let mut nodes = ["a", "b"].map(|name| Node::bare(name, control.port, &[]));
    for (node, model) in nodes.iter_mut().zip(["everywhere", "everywhere"]) {
        let (port, own) = (free_port(), format!("only-{}", node.name));
        node.engine = Some(demo_engine(port, &["--model", model], node.directory.path()));
        let engines = node.directory.path().join(".runtime/engines");
        hand_over(&engines, "r0.json", &handoff(port, "r0", 4));
        let second = format!(
            r#"{{"pool_id":"other","replica_id":"r0","url":"http://127.0.0.1:{port}","slots":2,"models":["{own}"]}}"#
        );
        hand_over(&engines, "other.json", &second);
    }
    control.until_routable(4.0);
    let shown = show(control.port, "/v2/catalog/availability");
    assert_eq!(shown["replicated_models"], json!(["everywhere"]), "{shown}");
    assert_eq!(shown["single_node_models"], json!(["only-a", "only-b"]), "{shown}");
    assert_eq!((&shown["total_models"], &shown["total_nodes"]), (&json!(3), &json!(2)), "{shown}");
    let model = &shown["models"][0];
    assert_eq!((&model["model_id"], &model["nodes"]), (&json!("everywhere"), &json!(["a", "b"])), "{shown}");
    assert_eq!((&model["total_nodes"], &model["total_capacity"]), (&json!(2), &json!(8)), "{shown}");
    let a = &shown["nodes"]["a"];
    assert_eq!((&a["online"], &a["models"]), (&json!(true), &json!(["everywhere", "only-a"])), "{shown}");
    assert_eq!(a["address"], format!("http://127.0.0.1:{}", nodes[0].port));
    assert_eq!(a["pools"][0], json!({"pool_id": "other", "ready": true, "models": ["only-a"]}), "{shown}");
    let first = show(control.port, "/v2/catalog/availability?limit=1");
    assert_eq!((first["nodes"].get("b"), &first["next"]), (None, &json!("a")), "{first}");
    let second = show(control.port, "/v2/catalog/availability?limit=1&after=a");
    assert!(second["nodes"]["b"].is_object() && second.get("next").is_none(), "{second}");
}

/// Registers a worker.
fn register(port: u16, body: &Value) -> Answer {
    post(port, "/v2/workers/register", &body.to_string())
}

fn chat(port: u16) -> Answer {
    post(port, CHAT, SHORT)
}

#[test]
fn an_engine_without_an_agent_serves_beside_those_of_this_machine() {
    let home = Home::start(&[]);
    let (port, second) = (free_port(), free_port());
    let _engine = demo_engine(port, &["--model", "m", "--slots", "3"], home.directory.path());
    let missing = register(home.port, &json!({"pool_id": "p"}));
    assert_eq!(missing.status, 400, "{missing:?}");
    assert!(missing.body.contains("`url` is missing"), "{missing:?}");
    for (url, part) in [
        ("http://169.254.169.254", "169.254"),
        ("http://192.0.2.7:8080", "ORCHESTRATORD_ALLOW_ENGINE_HOSTS"),
        (&format!("http://127.0.0.1:{}", home.port), "127.0.0.1"),
    ] {
        let refused = register(home.port, &json!({"url": url}));
        assert!(refused.status == 400 && refused.body.contains(part), "{url}: {refused:?}");
    }
    let registered = register(home.port, &json!({"url": format!("http://127.0.0.1:{port}")}));
    let told = registered.json();
    assert_eq!(
        (registered.status, &told),
        (200, &json!({"ok": true, "pool_id": "default", "replica_id": "r0"}))
    );
    home.until_routable(1.0);
    let answer = chat(home.port);
    assert_eq!((answer.status, answer.field("x-llorch-pool")), (200, Some("default")), "{answer:?}");
    // Said again it is no news, and a file has its name for itself.
    let again = register(home.port, &json!({"url": format!("http://127.0.0.1:{port}")}));
    assert_eq!(again.status, 200);
    let _second = demo_engine(second, &[], home.directory.path());
    hand_over(&home.engines(), "r0.json", &handoff(second, "r0", 4));
    home.until_routable(2.0);
    let taken = json!({"pool_id": "pool-0", "replica_id": "r0", "url": format!("http://127.0.0.1:{port}")});
    assert_eq!(register(home.port, &taken).status, 409);
    let remove = |path: &str| ask(home.port, "DELETE", path, None, "").expect("an answer").status;
    assert_eq!(remove("/v2/pools/pool-0/replicas/r0"), 409, "a file stands behind it");
    assert_eq!(remove("/v2/pools/default/replicas/r9"), 404);
    assert_eq!(remove("/v2/pools/default/replicas/r0"), 204);
    home.until_routable(1.0);
}

#[test]
fn a_control_plane_of_nodes_takes_workers_and_drains_them_too() {
    let token = "a-token-0123456789abcdef0123456789abcdef";
    let control = Control::start(&[("LLORCH_API_TOKEN", token)]);
    let call = |method: &str, path: &str, body: &str| {
        ask(control.port, method, path, Some(token), body).expect("an answer")
    };
    let (port, directory) = (free_port(), tempfile::tempdir().expect("a directory"));
    let mut engine = demo_engine(port, &["--model", "m"], directory.path());
    let body = json!({"pool_id": "pool-0", "replica_id": "w", "url": format!("http://127.0.0.1:{port}")})
        .to_string();
    assert_eq!(post(control.port, "/v2/workers/register", &body).status, 401);
    let told = call("POST", "/v2/workers/register", &body);
    assert_eq!(told.status, 200, "{told:?}");
    assert!(told.json()["identity"].as_str().is_some_and(|who| who.starts_with("token ")), "{told:?}");
    control.until_routable(1.0);
    let answer = call("POST", CHAT, SHORT);
    assert_eq!((answer.status, answer.field("x-llorch-node")), (200, Some("workers")), "{answer:?}");
    let shown = call("GET", "/v2/catalog/availability", "").json();
    assert_eq!(shown["nodes"]["workers"]["models"], json!(["m"]), "{shown}");
    // Its pool is one as any other, also where a node has it too.
    let _node = Node::start("a", control.port, 1, "0", &[("LLORCH_API_TOKEN", token)]);
    control.until_routable(2.0);
    let drained = call("POST", &format!("{POOL}/drain"), "");
    let names: Vec<Value> = drained.json()["nodes"].as_array().expect("a list").clone();
    assert_eq!((drained.status, names.len()), (202, 2), "{drained:?}");
    assert_eq!((&names[0]["node_id"], &names[1]["node_id"]), (&json!("a"), &json!("workers")));
    control.until_routable(0.0);
    assert_eq!(call("POST", &format!("{POOL}/resume"), "").status, 200);
    control.until_routable(2.0);
    let url = format!("http://127.0.0.1:{}", control.port);
    for (verb, told, routable) in [("drain", "drained", 0.0), ("resume", "takes work again", 2.0)] {
        let llorch = std::process::Command::new(env!("CARGO_BIN_EXE_llorch"))
            .args([verb, "pool", "pool-0", "--url", &url])
            .env("LLORCH_API_TOKEN", token)
            .output()
            .expect("it runs");
        assert!(
            llorch.status.success() && String::from_utf8_lossy(&llorch.stdout).contains(told),
            "{llorch:?}"
        );
        control.until_routable(routable);
    }
    // Nobody says that it is gone, and it is found out.
    engine.kill();
    control.until_routable(1.0);
    assert_eq!(call("DELETE", &format!("{POOL}/replicas/w"), "").status, 204);
    let health = || call("GET", "/v2/nodes/workers", "").json();
    until("its end", || (health()["replicas"] == json!([])).then_some(()));
    let stolen =
        call("POST", "/v2/nodes/register", r#"{"node_id":"workers","address":"http://127.0.0.1:9"}"#);
    assert_eq!(stolen.status, 409, "{stolen:?}");
}

#[test]
fn what_can_be_asked_is_what_engines_tell() {
    let home = Home::start(&[]);
    let told = show(home.port, "/v2/meta/capabilities");
    assert_eq!(told["engines"], json!([]), "nobody has told anything: {told}");
    let port = free_port();
    let _engine = demo_engine(port, &["--model", "m", "--slots", "3"], home.directory.path());
    assert_eq!(register(home.port, &json!({"url": format!("http://127.0.0.1:{port}")})).status, 200);
    home.until_routable(1.0);
    let told = show(home.port, "/v2/meta/capabilities");
    let engine = &told["engines"][0];
    assert_eq!((&engine["engine"], &engine["concurrency"]), (&json!("llamacpp"), &json!(3)), "{told}");
    assert_eq!(
        (&engine["supported_workloads"], &engine["features"]["models"]),
        (&json!(["completion"]), &json!(["m"]))
    );
    assert!(engine["ctx_max"].as_u64().is_some_and(|tokens| tokens > 0), "{told}");
    let version = show(home.port, "/v2/meta/version");
    assert_eq!(version["version"], env!("CARGO_PKG_VERSION"), "{version}");
    assert!(version.get("build_commit").is_some() && version.get("build_time").is_some(), "{version}");
}
