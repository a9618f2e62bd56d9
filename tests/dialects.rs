//! Engines of every kind, as the daemons meet them: real processes with each engine's manners, their
//! loading, their pages, their keys.

#[path = "daemons/harness.rs"]
#[allow(dead_code, reason = "shared with other tests, which use other parts")]
mod harness;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use harness::*;
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";
const SHORT: &str = r#"{"messages":[{"role":"user","content":"one two"}],"max_tokens":3}"#;
/// A key that nobody may ever see: it is looked for in all that the daemons say.
const KEY: &str = "sk-canary-0123456789abcdef";
const WRONG_KEY: &str = "sk-wrong-canary-0123456789";
/// How long the engines load.
const LOAD: Duration = Duration::from_millis(1_500);

/// A node agent without a control plane.
struct Agent {
    directory: tempfile::TempDir,
    port: u16,
    process: Process,
}

impl Agent {
    fn start(flags: &[&str]) -> Agent {
        let directory = tempfile::tempdir().expect("a directory");
        let port = free_port();
        let addr = format!("127.0.0.1:{port}");
        let process =
            Process::start(POOL_MANAGERD, flags, &[("POOL_MANAGERD_ADDR", addr.as_str())], directory.path());
        until("the agent", || get(port, "/health").filter(|answer| answer.status == 200));
        Agent { directory, port, process }
    }

    fn announce(&self, handoff: &Value) {
        let name = format!("{}.json", handoff["pool_id"].as_str().expect("a pool"));
        hand_over(&self.directory.path().join(".runtime/engines"), &name, &handoff.to_string());
    }

    /// The only replica of a pool, as the pool's status tells it.
    fn replica(&self, pool: &str) -> Option<Value> {
        let answer = get(self.port, &format!("/v2/pools/{pool}/status"))?;
        (answer.status == 200).then(|| answer.json()["replicas"][0].clone()).filter(|found| !found.is_null())
    }

    fn until_ready(&self, pool: &str) -> Value {
        until("a ready replica", || self.replica(pool).filter(|replica| replica["ready"] == true))
    }

    /// Waits until a replica is not ready for a reason that holds all of `parts`.
    fn until_reason(&self, pool: &str, parts: &[&str]) -> Value {
        until(&format!("a reason with {parts:?}"), || {
            let replica = self.replica(pool)?;
            let reason = replica["reason"].as_str()?.to_string();
            (replica["ready"] == false && parts.iter().all(|part| reason.contains(part))).then_some(replica)
        })
    }

    /// All that it says to whoever listens.
    fn all_words(&self) -> String {
        let paths = ["/v2/pools", "/v2/events", "/v2/handoffs", "/metrics"];
        let pages = paths.iter().filter_map(|path| get(self.port, path)).map(|answer| answer.body);
        pages.chain([self.process.log()]).collect()
    }
}

/// A demonstration engine, not waited for.
fn engine(port: u16, flags: &[&str], directory: &Path) -> Process {
    let number = port.to_string();
    let all = [&["demo-engine", "--port", &number, "--prefill-ms", "0"], flags].concat();
    Process::start(env!("CARGO_BIN_EXE_llorch"), &all, &[], directory)
}

fn write_key(directory: &Path, name: &str, key: &str) -> PathBuf {
    let file = directory.join(name);
    fs::write(&file, format!("{key}\n")).expect("written");
    file
}

fn relay(pool: &str, path: &str) -> String {
    format!("/v2/pools/{pool}/replicas/r0/engine{path}")
}

#[test]
fn every_kind_of_engine_is_ready_once_it_has_loaded_and_with_what_it_tells() {
    let agent = Agent::start(&[]);
    // What the handoff says, and slots, context length and models that come of it.
    type Case = (&'static str, Value, u64, Value, Value);
    let cases: [Case; 5] = [
        ("llamacpp", json!({}), 3, json!(640), json!(["own"])),
        ("vllm", json!({"slots": 5}), 5, json!(640), json!(["own"])),
        ("sglang", json!({"model": "named"}), 1, json!(640), json!(["named"])),
        ("tgi", json!({"slots": 9}), 3, json!(640), json!(["own"])),
        ("openai", json!({"slots": 2}), 2, Value::Null, json!(["own"])),
    ];
    let begun = Instant::now();
    let load_ms = LOAD.as_millis().to_string();
    let mut processes = Vec::new();
    for (dialect, more, ..) in &cases {
        let port = free_port();
        let flags =
            ["--dialect", dialect, "--load-ms", &load_ms, "--slots", "3", "--ctx", "640", "--model", "own"];
        processes.push(engine(port, &flags, agent.directory.path()));
        let mut handoff = json!({
            "pool_id": dialect, "replica_id": "r0", "url": format!("http://127.0.0.1:{port}"),
            "engine": dialect,
        });
        handoff.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        agent.announce(&handoff);
    }
    let (mut waited, mut sglang_ready_at) = (Vec::new(), None);
    let mut ready = Vec::new();
    until("five ready replicas", || {
        for (dialect, ..) in &cases {
            let Some(replica) = agent.replica(dialect) else { continue };
            if replica["ready"] == false && !waited.contains(dialect) {
                waited.push(*dialect);
            }
            if replica["ready"] == true && !ready.contains(dialect) {
                let age = begun.elapsed();
                assert!(age >= LOAD, "{dialect} was ready after {age:?}: {replica}");
                ready.push(*dialect);
                if *dialect == "sglang" {
                    sglang_ready_at = Some(age);
                }
            }
        }
        (ready.len() == cases.len()).then_some(())
    });
    assert_eq!(waited.len(), cases.len(), "each was seen loading");
    assert!(sglang_ready_at >= Some(LOAD + Duration::from_secs(1)), "its health takes a second");
    for (dialect, _, slots, context_length, models) in &cases {
        let replica = agent.replica(dialect).expect("a replica");
        assert_eq!(replica["slots_total"], *slots, "{replica}");
        assert_eq!(replica["context_length"], *context_length, "{replica}");
        assert_eq!(replica["models"], *models, "{replica}");
        let answer = post(agent.port, &relay(dialect, CHAT), SHORT);
        assert!(answer.status == 200 && answer.body.contains("[demo]"), "{dialect}: {answer:?}");
    }
}

#[test]
fn a_key_that_is_missing_or_wrong_is_named_by_its_file_and_a_corrected_one_is_used_without_a_restart() {
    let agent = Agent::start(&[]);
    let directory = agent.directory.path();
    let own = write_key(directory, "engine-key", KEY).display().to_string();
    let port = free_port();
    let flags = ["--dialect", "openai", "--api-key-file", &own, "--model", "own"];
    let _engine = engine(port, &flags, directory);
    let mut handoff = json!({
        "pool_id": "p", "replica_id": "r0", "url": format!("http://127.0.0.1:{port}"), "engine": "openai",
    });
    agent.announce(&handoff);
    agent.until_reason("p", &["401", "names no file", "auth.file"]);

    let file = directory.join("agents-key");
    let name = file.display().to_string();
    handoff["auth"] = json!({"file": name});
    agent.announce(&handoff);
    agent.until_reason("p", &["401", "cannot be read", &name]);

    write_key(directory, "agents-key", WRONG_KEY);
    let replica = agent.until_reason("p", &["401", "does not accept the key in", &name]);
    assert_eq!(replica["state"], "probing");
    let generation = replica["generation"].clone();

    write_key(directory, "agents-key", KEY);
    let replica = agent.until_ready("p");
    assert_eq!((&replica["generation"], &replica["models"]), (&generation, &json!(["own"])));
    assert_eq!(ask(port, "POST", CHAT, None, SHORT).expect("an answer").status, 401, "it wants the key");
    let answer = post(agent.port, &relay("p", CHAT), SHORT);
    assert!(answer.status == 200 && answer.body.contains("[demo]"), "the relay shows it: {answer:?}");
    let listed = get(agent.port, &relay("p", "/v1/models")).expect("an answer");
    assert_eq!(listed.status, 200, "{listed:?}");

    let words = agent.all_words();
    assert!(words.contains(&name), "the file is named");
    assert!(!words.contains(KEY) && !words.contains(WRONG_KEY), "{words}");
}

#[test]
fn an_engine_whose_health_is_open_is_ready_without_its_key_and_the_log_says_what_is_wrong() {
    let agent = Agent::start(&[]);
    let directory = agent.directory.path();
    let own = write_key(directory, "engine-key", KEY).display().to_string();
    let wrong = write_key(directory, "agents-key", WRONG_KEY).display().to_string();
    let port = free_port();
    let _engine = engine(port, &["--api-key-file", &own, "--slots", "3"], directory);
    agent.announce(&json!({
        "pool_id": "p", "replica_id": "r0", "url": format!("http://127.0.0.1:{port}"), "model": "m",
        "auth": {"file": wrong},
    }));
    let replica = agent.until_ready("p");
    assert_eq!((&replica["slots_total"], &replica["context_length"]), (&json!(1), &Value::Null));
    // Readiness waits for nothing else.
    let said = until("the log to say it", || {
        let log = agent.process.log();
        log.lines().find(|line| line.contains("/props is not answered")).map(str::to_string)
    });
    assert!(said.contains("does not accept the key in") && said.contains(&wrong), "{said}");
    assert_eq!(post(agent.port, &relay("p", CHAT), SHORT).status, 401);
    write_key(directory, "agents-key", KEY);
    assert_eq!(post(agent.port, &relay("p", CHAT), SHORT).status, 200, "the next request shows the new key");
    let words = agent.all_words();
    assert!(!words.contains(KEY) && !words.contains(WRONG_KEY), "{words}");
}

#[test]
fn the_home_profile_shows_keys_and_asks_engines_too() {
    let home = Home::start(&[]);
    let directory = home.directory.path();
    let key = write_key(directory, "key", KEY).display().to_string();
    let port = free_port();
    let flags =
        ["--dialect", "vllm", "--api-key-file", &key, "--ctx", "640", "--model", "own", "--load-ms", "500"];
    let _engine = engine(port, &flags, directory);
    let handoff = json!({
        "pool_id": "p", "replica_id": "r0", "url": format!("http://127.0.0.1:{port}"), "engine": "vllm",
        "slots": 2, "auth": {"file": key},
    });
    hand_over(&home.engines(), "a.json", &handoff.to_string());
    home.until_routable(1.0);
    let models = get(home.port, "/v1/models").expect("models").json();
    assert_eq!(models["data"][0]["id"], "own", "{models}");
    let ask = r#"{"model":"own","messages":[{"role":"user","content":"one two"}],"max_tokens":3}"#;
    let answer = post(home.port, CHAT, ask);
    assert!(answer.status == 200 && answer.body.contains("[demo]"), "{answer:?}");
    let pages = ["/v2/nodes", "/v2/pools", "/v2/events", "/v1/models", "/metrics"];
    let words: String = pages.iter().filter_map(|path| get(home.port, path)).map(|page| page.body).collect();
    assert!(!words.contains(KEY) && !home.daemon.log().contains(KEY), "{words}");
}
