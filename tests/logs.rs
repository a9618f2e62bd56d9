//! What a log line says beside its sentence, of real daemons: which node, and because of which request.

#[allow(dead_code, reason = "other tests use the rest of it")]
#[path = "daemons/harness.rs"]
mod harness;

use std::io::{Read, Write};
use std::net::TcpStream;

use harness::*;
use rustix::process::Signal;
use serde_json::Value;

/// A request that has a name.
fn ask_as(port: u16, method: &str, path: &str, name: &str, token: &str) -> String {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).expect("a connection");
    stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    write!(
        stream,
        "{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nX-Correlation-Id: {name}\r\nAuthorization: Bearer {token}\r\nContent-Length: 0\r\n\r\n"
    )
    .expect("written");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer");
    answer
}

fn agent(format: &str, directory: &tempfile::TempDir) -> (Process, u16) {
    let port = free_port();
    let addr = format!("127.0.0.1:{port}");
    let env = [
        ("POOL_MANAGERD_ADDR", addr.as_str()),
        ("POOL_MANAGERD_NODE_ID", "gpu-7"),
        ("POOL_MANAGERD_LOG_FORMAT", format),
        ("LLORCH_API_TOKEN", "0123456789012345678901234567890123456789012"),
    ];
    let agent = Process::start(POOL_MANAGERD, &[], &env, directory.path());
    until("the agent", || get(port, "/health").filter(|answer| answer.status == 200));
    (agent, port)
}

#[test]
fn a_line_of_json_names_node_request_and_change() {
    let directory = tempfile::tempdir().expect("a directory");
    let (agent, port) = agent("json", &directory);
    let token = "0123456789012345678901234567890123456789012";
    assert!(ask_as(port, "POST", "/v2/node/drain", "drain-42", token).contains("drain-42"), "it is echoed");
    ask_as(port, "GET", "/v2/pools", "guess-43", "not-the-token");
    let lines = || -> Vec<Value> {
        let log = agent.log();
        let whole = log.rfind('\n').map_or("", |end| &log[..end]);
        whole.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|_| panic!("{line}"))).collect()
    };
    let about = |name: &str| until(name, || lines().into_iter().find(|line| line["correlation_id"] == name));
    let drain = about("drain-42");
    assert_eq!((&drain["kind"], &drain["node"]), (&"drain".into(), &"gpu-7".into()), "{drain}");
    assert!(about("guess-43")["message"].as_str().is_some_and(|text| text.contains("refused 127.0.0.1")));
    for line in lines() {
        assert_eq!(line["node"], "gpu-7", "{line}");
        for field in ["ts", "level", "program", "message"] {
            assert!(line[field].as_str().is_some_and(|text| !text.is_empty()), "{field}: {line}");
        }
    }
    let first = &lines()[0];
    assert!(first.get("correlation_id").is_none(), "nobody asked for the start: {first}");
}

/// Who keeps engines runs beside the agent, and its lines are read by the same eyes and programs.
#[test]
fn a_provisioner_writes_its_lines_like_a_daemon() {
    let directory = tempfile::tempdir().expect("a directory");
    let engines = directory.path().join("engines");
    let env = [
        ("ENGINE_PROVISIONER_HANDOFF_DIR", engines.to_str().expect("a plain name")),
        ("ENGINE_PROVISIONER_CACHE_DIR", engines.to_str().expect("a plain name")),
        ("POOL_MANAGERD_URL", "http://127.0.0.1:1"),
    ];
    let run = |format: &str| {
        let format = format!("--log-format={format}");
        let words = [
            "run",
            "--restart=never",
            &format,
            "--",
            env!("CARGO_BIN_EXE_llorch"),
            "demo-engine",
            "--port",
            "{port}",
        ];
        let keeper = Process::start(env!("CARGO_BIN_EXE_engine-provisioner"), &words, &env, directory.path());
        let line = until("a line", || {
            let log = keeper.log();
            log.lines().find(|line| line.contains("is healthy at")).map(str::to_string)
        });
        (keeper, line)
    };
    let (mut keeper, line) = run("json");
    let read: Value = serde_json::from_str(&line).unwrap_or_else(|_| panic!("{line}"));
    assert_eq!((&read["program"], &read["level"]), (&"engine-provisioner".into(), &"info".into()), "{line}");
    assert!(read["message"].as_str().is_some_and(|text| text.starts_with("default/r0 is healthy")), "{line}");
    keeper.signal(Signal::TERM);
    assert_eq!(keeper.end(), Some(0));
    let (_keeper, line) = run("text");
    assert!(line.contains("Z INFO  default/r0 is healthy at http://"), "{line}");
}

#[test]
fn a_text_is_a_sentence_and_says_so_behind_it() {
    let directory = tempfile::tempdir().expect("a directory");
    let (agent, port) = agent("text", &directory);
    ask_as(port, "GET", "/v2/pools", "guess-44", "not-the-token");
    let line =
        until("the line", || agent.log().lines().find(|line| line.contains("guess-44")).map(str::to_string));
    assert!(line.contains(" WARN  refused 127.0.0.1"), "{line}");
    assert!(line.ends_with(" node=gpu-7 correlation_id=guess-44"), "{line}");
}
