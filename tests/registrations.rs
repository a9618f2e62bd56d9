//! What hostile, broken, older and newer peers send to a control plane in place of a node's messages:
//! each is refused by the name of what is wrong, or served, and nobody else notices.

#[path = "membership/cluster.rs"]
#[allow(dead_code, reason = "other tests need other parts of it")]
mod cluster;
#[path = "daemons/harness.rs"]
#[allow(dead_code, reason = "other tests need other parts of it")]
mod harness;

use std::io::{Read, Write};
use std::net::{SocketAddrV4, TcpStream, ToSocketAddrs};
use std::thread;
use std::time::{Duration, Instant};

use cluster::*;
use harness::*;
use llama_orch::orchestratord::service_registry::NEWCOMERS_PER_PEER_MAX;
use llama_orch::service::machine;
use rustix::net::{AddressFamily, SocketType};
use serde_json::{Value, json};

const REGISTER: &str = "/v2/nodes/register";

/// A registration that is good but for the fields of `other`.
fn registration(other: &Value) -> String {
    let mut body = json!({"node_id": "x", "address": "http://10.9.9.9:9200", "incarnation": 1});
    for (name, value) in other.as_object().expect("fields") {
        body[name] = value.clone();
    }
    body.to_string()
}

/// One engine on a node's loopback, as a heartbeat tells of it.
fn beat(seq: u64, urls: &[&str]) -> String {
    let replicas: Vec<Value> = urls
        .iter()
        .enumerate()
        .map(|(n, url)| {
            json!({"replica_id": format!("r{n}"), "url": url, "ready": true, "slots_free": 4, "slots_total": 4})
        })
        .collect();
    let pool = json!({"pool_id": "pool-0", "ready": true, "slots_free": 4, "replicas": replicas});
    json!({"incarnation": 1, "seq": seq, "pools": [pool]}).to_string()
}

/// Fails unless the answer refuses, with a code, and with a short message that contains `part`.
fn assert_refused(sent: &str, answer: &Answer, status: u16, part: &str) {
    let sent: String = sent.chars().take(300).collect();
    assert_eq!(answer.status, status, "{sent}: {answer:?}");
    let body = answer.json();
    let message = body["message"].as_str().expect("a message");
    assert!(body["code"].is_string() && message.contains(part), "{sent}: {part} is not in {message}");
    assert!(message.len() < 1_500, "{sent}: {} bytes in the message", message.len());
    assert!(!message.chars().any(char::is_control), "{sent}: {message:?}");
}

/// A control plane with a node that serves, and clients that ask all the while.
fn with_traffic(check: impl FnOnce(&Control)) {
    let control = Control::start(&[]);
    let _node = Node::start("real", control.port, 1, "0", &[]);
    control.until_routable(1.0);
    let traffic = Traffic::start(control.port, 1);
    traffic.until_answered(5, Instant::now());
    check(&control);
    traffic.until_answered(5, Instant::now());
    assert_eq!(failures(&traffic.end()), [""; 0]);
    assert_eq!(control.status("real"), "Online");
}

#[test]
fn a_bad_registration_is_refused_by_the_name_of_its_field() {
    with_traffic(|control| {
        let own = format!("http://127.0.0.1:{}", control.port);
        let own_by_name = format!("http://LOCALHOST:{}", control.port);
        let long = "x".repeat(10 * 1024);
        let ids = ["", ".", "..", "a/b", "a b", "a\u{7}b", "a\nb", "\u{1b}[31m", "knöten", "名", &long];
        let addresses = [
            ("http://169.254.169.254", "link-local"),
            ("http://[fe80::1]:9200", "link-local"),
            ("http://[::ffff:169.254.169.254]:80", "link-local"),
            ("http://[fd00:ec2::254]:80", "link-local"),
            ("http://0.0.0.0:9200", "can be dialled"),
            ("http://[::]:9200", "can be dialled"),
            ("http://224.0.0.1:9200", "multicast"),
            ("http://255.255.255.255:9200", "broadcast"),
            (&own, "this very process"),
            (&own_by_name, "this very process"),
            ("http://user:secret@h:9200", "user name or password"),
            ("file:///etc/passwd", "URL"),
            ("gopher://h:9200", "scheme"),
            ("https://224.0.0.1:9200", "multicast"),
            ("http://h:0", "port 0"),
            ("http://h:70000", "URL"),
            ("http://h:9200/?a=b", "query"),
            ("http://h:9200/#a", "fragment"),
            ("http://h h:9200", "URL"),
            ("http://", "URL"),
            ("", "URL"),
            ("http://\u{202e}h:9200", "URL"),
            (&long, "URL"),
        ];
        for id in ids {
            let body = registration(&json!({"node_id": id}));
            assert_refused(&body, &post(control.port, REGISTER, &body), 400, "node_id: ");
        }
        for (address, why) in addresses {
            let body = registration(&json!({"address": address}));
            let answer = post(control.port, REGISTER, &body);
            assert_refused(&body, &answer, 400, "address: ");
            assert_refused(&body, &answer, 400, why);
            assert!(!answer.body.contains("secret"), "{answer:?}");
        }
        let pools: Vec<String> = (0..257).map(|n| format!("p{n}")).collect();
        let gpus: Vec<Value> = (0..257).map(|n| json!({"device_id": n})).collect();
        for (field, value, status, part) in [
            ("node_id", json!(5), 400, "node_id: "),
            ("node_id", json!(["x"]), 400, "node_id: "),
            ("node_id", Value::Null, 400, "node_id: "),
            ("address", json!(9200), 400, "address: "),
            ("pools", json!("pool-0"), 400, "pools: "),
            ("pools", json!(["pool-0", 7]), 400, "pools[1]: "),
            ("pools", json!(["ok", "../x"]), 400, "pools[1]: "),
            ("pools", json!(pools), 413, "pools"),
            ("capabilities", json!("many"), 400, "capabilities: "),
            ("capabilities", json!({"gpus": 8}), 400, "capabilities.gpus: "),
            ("capabilities", json!({"gpus": [{"device_id": -1}]}), 400, "capabilities.gpus[0].device_id: "),
            ("capabilities", json!({"gpus": gpus}), 413, "GPUs"),
            ("incarnation", json!(-1), 400, "incarnation: "),
            ("incarnation", json!(1.5), 400, "incarnation: "),
            ("incarnation", json!("1"), 400, "incarnation: "),
            ("boot_id", json!({"a": 1}), 400, "boot_id: "),
            ("version", json!(1), 400, "version: "),
        ] {
            let body = registration(&json!({field: value}));
            assert_refused(&body, &post(control.port, REGISTER, &body), status, part);
        }
        let deep = "[".repeat(100_000);
        for (body, part) in [
            ("", "EOF"),
            ("null", "invalid type"),
            ("[]", "invalid length"),
            ("{}", "node_id"),
            (r#"{"node_id":"x"}"#, "address"),
            (r#"{"node_id":"x","node_id":"y","address":"h:1"}"#, "node_id"),
            (r#"{"node_id":"x","address":"h:1","incarnation":18446744073709551616}"#, "incarnation: "),
            (r#"{"node_id":"x","address":"h:1"} x"#, "trailing"),
            (r#"{"node_id":"x","address":"h:1""#, "EOF"),
            (deep.as_str(), "body"),
        ] {
            assert_refused(body, &post(control.port, REGISTER, body), 400, part);
        }
        let huge = registration(&json!({"version": "x".repeat(10 << 20)}));
        assert_refused(&huge, &post(control.port, REGISTER, &huge), 413, "4194304 bytes");
        assert_eq!(control.nodes().len(), 1, "none of them is known");
    });
}

#[test]
fn a_bad_heartbeat_is_refused_by_the_name_of_its_field_and_changes_nothing() {
    with_traffic(|control| {
        let body = registration(&json!({}));
        assert_eq!(post(control.port, REGISTER, &body).status, 200);
        let path = "/v2/nodes/x/heartbeat";
        assert_eq!(post(control.port, path, &beat(1, &["http://127.0.0.1:8081"])).status, 200);
        let many = |n: usize, value: Value| json!(vec![value; n]);
        let replica =
            json!({"replica_id": "r", "url": "h:1", "ready": true, "slots_free": 1, "slots_total": 1});
        let with = |field: &str, value: Value| {
            let mut replica = replica.clone();
            replica[field] = value;
            json!([{"pool_id": "p"}, {"pool_id": "p", "replicas": [replica]}])
        };
        for (pools, status, part) in [
            (json!("p"), 400, "pools: "),
            (json!([{"ready": true}]), 400, "pools[0]: missing field `pool_id`"),
            (json!([{"pool_id": "p", "slots_free": -1}]), 400, "pools[0].slots_free: "),
            (json!([{"pool_id": "p", "slots_free": 4_294_967_296u64}]), 400, "pools[0].slots_free: "),
            (json!([{"pool_id": "p", "vram_free_bytes": 1e30}]), 400, "pools[0].vram_free_bytes: "),
            (with("url", json!("file:///etc/shadow")), 400, "pools[1].replicas[0].url: "),
            (with("url", json!("http://h:99999")), 400, "pools[1].replicas[0].url: "),
            (with("replica_id", json!("../r")), 400, "pools[1].replicas[0].replica_id: "),
            (with("slots_total", json!("many")), 400, "pools[1].replicas[0].slots_total: "),
            (with("models", many(257, json!("m"))), 413, "models"),
            (with("models", json!(["m".repeat(600)])), 413, "name of a model"),
            (many(257, json!({"pool_id": "p"})), 413, "pools"),
            (json!([{"pool_id": "p", "replicas": many(1_025, replica.clone())}]), 413, "replicas"),
            (json!([{"pool_id": "p", "engine": "x".repeat(10 << 20)}]), 413, "4194304 bytes"),
        ] {
            let body = json!({"incarnation": 1, "seq": 9, "pools": pools}).to_string();
            assert_refused(&body, &post(control.port, path, &body), status, part);
        }
        for (path, status, part) in [
            ("/v2/nodes/nobody/heartbeat", 404, "not registered"),
            ("/v2/nodes/../heartbeat", 400, "is not an id"),
            ("/v2/nodes/%00/heartbeat", 400, "is not an id"),
        ] {
            assert_refused(path, &post(control.port, path, &beat(2, &[])), status, part);
        }
        let node = control.node("x").expect("it is known");
        assert_eq!(node["replicas"].as_array().map(Vec::len), Some(1), "as its one good heartbeat said");
        // The sequence number of what was refused has not been used up.
        assert_eq!(post(control.port, path, &beat(2, &[])).status, 200);
    });
}

#[test]
fn no_request_goes_where_no_engine_can_be() {
    let control = Control::start(&[("ORCHD_ADMISSION_TIMEOUT_MS", "500")]);
    let port = control.port;
    assert_eq!(post(port, REGISTER, &registration(&json!({}))).status, 200);
    let mut urls = vec!["http://169.254.169.254:80".to_string(), "http://224.0.0.1:80".to_string()];
    let outside = machine::own_addresses().into_iter().find(|ip| ip.is_ipv4() && !ip.is_loopback());
    urls.extend(outside.map(|ip| format!("http://{ip}:{port}")));
    let urls: Vec<&str> = urls.iter().map(String::as_str).collect();
    assert_eq!(post(port, "/v2/nodes/x/heartbeat", &beat(1, &urls)).status, 200);
    let node = control.node("x").expect("it is known");
    for (replica, url) in node["replicas"].as_array().expect("replicas").iter().zip(&urls) {
        let reason = replica["reason"].as_str().unwrap_or_default();
        assert!(replica["routable"] == false && reason.contains("link-local"), "{url}: {replica}");
    }
    let answer = post(port, CHAT, SHORT);
    assert_eq!(answer.status, 503, "{answer:?}");

    assert_eq!(ask(port, "DELETE", "/v2/nodes/x", None, "").expect("an answer").status, 204);
    // A name is judged once it has been resolved: an agent that is this very control plane.
    let host = machine::host_name();
    if (host.as_str(), 0).to_socket_addrs().is_ok_and(|mut found| found.next().is_some()) {
        let body = registration(&json!({"node_id": "y", "address": format!("http://{host}:{port}")}));
        assert_eq!(post(port, REGISTER, &body).status, 200, "a name may be anything");
        assert_eq!(post(port, "/v2/nodes/y/heartbeat", &beat(1, &["http://127.0.0.1:1"])).status, 200);
        let answer = post(port, CHAT, SHORT);
        assert!(matches!(answer.status, 502 | 503) && answer.body.contains("in a circle"), "{answer:?}");
    }
}

#[test]
fn a_name_that_leads_an_agent_to_itself_is_no_engine() {
    let host = machine::host_name();
    if !(host.as_str(), 0).to_socket_addrs().is_ok_and(|mut found| found.next().is_some()) {
        return; // A machine that does not know its own name.
    }
    let cloud =
        [("POOL_MANAGERD_CLOUD_PROFILE", "false"), ("POOL_MANAGERD_ALLOW_ENGINE_HOSTS", host.as_str())];
    let node = Node::bare("n", free_port(), &cloud);
    let text = format!(r#"{{"pool_id":"pool-0","replica_id":"r0","url":"http://{host}:{}"}}"#, node.port);
    hand_over(&node.directory.path().join(".runtime/engines"), "a.json", &text);
    until("the reason", || {
        let status = get(node.port, "/v2/pools/pool-0/status").filter(|answer| answer.status == 200)?.json();
        let reason = status["replicas"][0]["reason"].as_str()?.to_string();
        reason.contains("in a circle").then_some(())
    });
}

/// A connection from another loopback address, as another peer would have it.
fn connect_from(peer: u8, port: u16) -> TcpStream {
    let socket = rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None).expect("a socket");
    rustix::net::bind(&socket, &SocketAddrV4::new([127, 0, 1, peer].into(), 0)).expect("bound");
    rustix::net::connect(&socket, &SocketAddrV4::new([127, 0, 0, 1].into(), port)).expect("connected");
    let stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    stream
}

/// Registers so many nodes that do not exist over one connection, and returns how many were taken.
fn register_bogus(peer: u8, port: u16, nodes: usize) -> usize {
    const BATCH: usize = 100;
    let mut stream = connect_from(peer, port);
    let mut taken = 0;
    for first in (0..nodes).step_by(BATCH) {
        let count = BATCH.min(nodes - first);
        let mut text = String::new();
        for n in first..first + count {
            let body = registration(&json!({"node_id": format!("bogus-{peer}-{n}")}));
            let length = body.len();
            text.push_str(&format!(
                "POST {REGISTER} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n{body}"
            ));
        }
        stream.write_all(text.as_bytes()).expect("sent");
        let mut answers = String::new();
        while answers.matches("\"node_id\"").count() + answers.matches("\"retriable\"").count() < count {
            let mut piece = [0; 16 * 1024];
            let length = stream.read(&mut piece).expect("answers");
            assert_ne!(length, 0, "closed: {answers}");
            answers.push_str(std::str::from_utf8(&piece[..length]).expect("ASCII"));
        }
        taken += answers.matches("HTTP/1.1 200").count();
    }
    taken
}

fn resident_kib(process: &Process) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{}/status", process.pid())).expect("a status");
    let line = text.lines().find(|line| line.starts_with("VmRSS:")).expect("its memory");
    line.split_whitespace().nth(1).and_then(|kib| kib.parse().ok()).expect("a number")
}

#[test]
fn names_that_nobody_stands_behind_lock_nobody_out() {
    let control = Control::start(&[("ORCHESTRATORD_LOG_LEVEL", "error")]);
    let _early = Node::start("early", control.port, 1, "0", &[]);
    control.until_routable(1.0);
    let traffic = Traffic::start(control.port, 1);
    let before = resident_kib(&control.process);
    // One peer gets so far, however much it sends: `BOGUS_NODES=100000` sends more.
    let many = std::env::var("BOGUS_NODES").ok().and_then(|n| n.parse().ok()).unwrap_or(3_000);
    assert_eq!(register_bogus(1, control.port, many), many);
    let all = metric(control.port, "orchestratord_nodes{status=\"Registering\"}").expect("a count");
    assert_eq!(all as usize, NEWCOMERS_PER_PEER_MAX);
    let grown = resident_kib(&control.process).saturating_sub(before);
    assert!(grown < 8 * 1024, "{grown} KiB for {many} bogus nodes of one peer");
    // Many peers fill the table.
    for peer in 2..=12 {
        assert_eq!(register_bogus(peer, control.port, 1_000), 1_000);
    }
    let all = metric(control.port, "orchestratord_nodes{status=\"Registering\"}").expect("a count");
    assert_eq!(all, 9_999.0, "with the real one, all that there may be");
    let late = Node::start("late", control.port, 1, "0", &[]);
    control.until_routable(2.0);
    let grown = resident_kib(&control.process).saturating_sub(before);
    assert!(grown < 64 * 1024, "{grown} KiB for a full table");
    assert_eq!(control.status("early"), "Online");
    assert_eq!(control.status(&late.name), "Online");
    assert_eq!(failures(&traffic.end()), [""; 0]);
}

#[test]
fn registrations_that_never_end_register_nobody_and_delay_nobody() {
    with_traffic(|control| {
        let body = registration(&json!({}));
        let head =
            format!("POST {REGISTER} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n\r\n", body.len());
        let connect = || TcpStream::connect(("127.0.0.1", control.port)).expect("connected");
        // Half of it, then nothing more.
        let mut half = connect();
        half.write_all(format!("{head}{}", &body[..body.len() / 2]).as_bytes()).expect("sent");
        half.shutdown(std::net::Shutdown::Write).expect("shut");
        let mut rest = String::new();
        half.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        let _ = half.read_to_string(&mut rest);
        assert!(!rest.contains("200"), "{rest}");
        // A byte now and then, from many at once.
        let mut slow: Vec<TcpStream> = (0..50).map(|_| connect()).collect();
        let whole = format!("{head}{body}");
        for byte in whole.as_bytes().iter().take(20) {
            for stream in &mut slow {
                stream.write_all(&[*byte]).expect("sent");
            }
            let asked = Instant::now();
            assert_eq!(get(control.port, "/health").expect("an answer").status, 200);
            assert!(asked.elapsed() < Duration::from_secs(1), "{:?}", asked.elapsed());
            thread::sleep(Duration::from_millis(20));
        }
        assert_eq!(control.nodes().len(), 1);
        drop(slow);
        until("their connections to be closed", || {
            metric(control.port, "orchestratord_client_connections").filter(|n| *n < 10.0)
        });
    });
}

#[test]
fn nodes_of_the_oldest_and_of_future_versions_are_served() {
    let control = Control::start(&[("ORCHD_ADMISSION_TIMEOUT_MS", "5000")]);
    let port = control.port;
    // An agent that registers nowhere; its messages are written here.
    let node = Node::start("n", port, 1, "0", &[("ORCHESTRATORD_REGISTER_ON_STARTUP", "false")]);
    until("the engine", || (node.ready_replicas() == 1).then_some(()));
    let address = format!("http://127.0.0.1:{}", node.port);
    let oldest = (
        json!({"node_id": "n", "machine_id": "m", "address": address, "pools": ["pool-0"],
            "capabilities": {"gpus": []}}),
        json!({"timestamp": "2025-09-30T12:00:00Z",
            "pools": [{"pool_id": "pool-0", "ready": true, "slots_free": 4}]}),
    );
    let future = (
        json!({"node_id": "n", "machine_id": null, "address": address, "pools": ["pool-0"],
            "capabilities": {"gpus": [{"device_id": 0, "name": "X", "nvlink": {"peers": [1, 2]}}], "npus": 2},
            "version": "99.0", "incarnation": 7, "boot_id": null, "zone": {"name": "z"}, "labels": ["a"]}),
        json!({"timestamp": 5e9.to_string(), "incarnation": 7, "seq": 1, "mood": [{}], "draining": false,
            "pools": [{"pool_id": "pool-0", "ready": true, "draining": false, "slots_free": 4,
                "slots_total": 4, "vram_free_bytes": 0, "engine": null, "models_available": [],
                "kv_cache": {"hits": 0.5}, "replicas": null}]}),
    );
    for (register, heartbeat) in [oldest, future] {
        let answer = post(port, REGISTER, &register.to_string());
        let said = answer.json();
        assert_eq!((answer.status, &said["success"], &said["node_id"]), (200, &json!(true), &json!("n")));
        let answer = post(port, "/v2/nodes/n/heartbeat", &heartbeat.to_string());
        let said = answer.json();
        assert_eq!((answer.status, &said["success"]), (200, &json!(true)), "{answer:?}");
        assert!(said["next_heartbeat_ms"].is_u64(), "{said}");
        assert_eq!(control.status("n"), "Online");
        // Where the engine is, the control plane asks.
        let answer = post(port, CHAT, SHORT);
        assert_eq!(answer.status, 200, "{answer:?}");
        assert_eq!(ask(port, "DELETE", "/v2/nodes/n", None, "").expect("an answer").status, 204);
        assert!(control.nodes().is_empty());
    }
}
