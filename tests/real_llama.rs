//! A real llama.cpp: started and handed over by `engine-provisioner`, asked, also by a node agent that is
//! told nothing but its URL, stopped; then on the whole road with `llorch up`.
//!
//! Opt-in, because the first run downloads llama.cpp: `REQUIRE_REAL_LLAMA=1 cargo test --test
//! real_llama`. Without the variable the test says that it was skipped.

#[path = "provisioner/harness.rs"]
#[allow(dead_code, reason = "shared with another test, which uses other parts")]
mod harness;

#[path = "daemons/harness.rs"]
#[allow(dead_code, reason = "shared with other tests, which use other parts")]
mod daemons;

use std::io::{BufRead, BufReader};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use harness::{Provisioner, client, group, until_group_is_gone};
use rustix::process::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;

/// The first start downloads some 30 MB and generates the model.
const FIRST_START: Duration = Duration::from_secs(170);
/// The first start installs what the second one uses.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
/// Tokens of the answer. The model never ends by itself.
const TOKENS: usize = 24;

/// Starts llama.cpp with the tiny model, and the port and the slots behind it.
const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/real_llama/engine.sh");

/// llama.cpp with so many slots, handed over; `None` where nobody asked for the test.
#[allow(clippy::print_stderr, reason = "a skipped test has to say so")]
fn start(slots: u32) -> Option<(TempDir, Provisioner)> {
    if std::env::var_os("REQUIRE_REAL_LLAMA").is_none_or(|value| value != "1") {
        eprintln!("skipped: set REQUIRE_REAL_LLAMA=1 to fetch llama.cpp and test with it");
        return None;
    }
    let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let root = tempfile::tempdir().expect("a temporary directory");
    let slots_flag = format!("--slots={slots}");
    let flags = [&slots_flag, "--model=tiny-random", "--health-timeout-ms=165000"];
    let command = ["sh", SCRIPT, "{port}", &slots.to_string()];
    let mut provisioner = Provisioner::start(root.path(), &flags, &command);
    provisioner.event("spawned");
    provisioner.event_within("healthy", FIRST_START);
    provisioner.event("handoff_written");
    Some((root, provisioner))
}

#[test]
fn a_real_llama_cpp_is_handed_over_streams_and_is_stopped() {
    let Some((root, mut provisioner)) = start(2) else { return };
    let handoff = provisioner.handoff().expect("the handoff was written");
    assert_eq!((handoff.pid, handoff.slots), (Some(provisioner.engine()), 2));
    assert_eq!(handoff.models, ["tiny-random"]);
    let get = |path: &str| -> Value {
        let mut answer = client().get(format!("{}{path}", handoff.url)).call().expect("llama.cpp answers");
        serde_json::from_str(&answer.body_mut().read_to_string().expect("a body")).expect("JSON")
    };
    assert_eq!(get("/props")["total_slots"], 2, "the handoff tells what the engine says");
    assert_eq!(get("/v1/models")["data"][0]["id"], "tiny-random");

    // An agent that is told nothing but the URL learns the rest from the engine.
    let (agent_port, directory) = (daemons::free_port(), root.path().join("agent"));
    std::fs::create_dir(&directory).expect("a directory");
    let addr = format!("127.0.0.1:{agent_port}");
    let env = [("POOL_MANAGERD_ADDR", addr.as_str())];
    let agent = daemons::Process::start(daemons::POOL_MANAGERD, &[], &env, &directory);
    let told = json!({"url": handoff.url.to_string(), "pool_id": "p", "replica_id": "r"});
    daemons::hand_over(&directory.join(".runtime/engines"), "a.json", &told.to_string());
    let replica = daemons::until("the replica", || {
        let answer = daemons::get(agent_port, "/v2/pools/p/replicas/r/status")?;
        (answer.status == 200).then(|| answer.json()).filter(|replica| replica["ready"] == true)
    });
    let context_length = &get("/props")["default_generation_settings"]["n_ctx"];
    assert!(context_length.as_u64().is_some_and(|tokens| tokens > 0), "{context_length}");
    assert_eq!(&replica["context_length"], context_length, "{replica}\n{}", agent.log());
    assert_eq!(replica["slots_total"], 2, "{replica}");
    assert_eq!(replica["models"], json!(["tiny-random"]), "{replica}");
    drop(agent);

    let ask = json!({
        "messages": [{"role": "user", "content": "Say something."}],
        "max_tokens": TOKENS, "temperature": 0, "stream": true,
    });
    let answer = client()
        .post(format!("{}/v1/chat/completions", handoff.url))
        .header("Content-Type", "application/json")
        .send(ask.to_string())
        .expect("llama.cpp answers");
    assert_eq!(answer.status(), 200);
    let lines = BufReader::new(answer.into_body().into_reader()).lines();
    let events: Vec<String> = lines
        .map(|line| line.expect("the stream ends cleanly"))
        .filter_map(|line| line.strip_prefix("data: ").map(str::to_string))
        .collect();
    let (end, chunks) = events.split_last().expect("a stream has events");
    assert_eq!(end, "[DONE]");
    let chunks: Vec<Value> = chunks.iter().map(|chunk| serde_json::from_str(chunk).expect("JSON")).collect();
    let tokens: Vec<&str> =
        chunks.iter().filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(tokens.len(), TOKENS, "one event a token: {tokens:?}");
    assert!(tokens.concat().chars().all(|c| c.is_ascii_lowercase() || c == ' '), "syllables: {tokens:?}");
    let last = chunks.last().expect("chunks before the end");
    assert_eq!(last["choices"][0]["finish_reason"], "length");

    assert!(!group(provisioner.engine()).is_empty());
    provisioner.signal(Signal::TERM);
    provisioner.event("stopped");
    let (code, said) = provisioner.end();
    assert_eq!(code, 0, "{said}");
    until_group_is_gone(provisioner.engine());
    assert_eq!(provisioner.files(), [""; 0]);
    // The same engine on the whole road: provisioner, handoff, probe, placement, relay.
    let up = std::process::Command::new(env!("CARGO_BIN_EXE_llorch"))
        .args(["up", "--once", "--max-tokens", "8", "--engine", "sh", SCRIPT, "{port}", "2"])
        .env("TMPDIR", root.path())
        .output()
        .expect("llorch runs");
    let (printed, errors) = (String::from_utf8_lossy(&up.stdout), String::from_utf8_lossy(&up.stderr));
    assert!(up.status.success(), "{printed}\n{errors}");
    assert!(printed.contains("local/pool-0/r0: takes work"), "{printed}");
    let tokens =
        printed.lines().find(|line| line.trim_start().starts_with("tokens")).expect("a row of tokens");
    assert_eq!(tokens.split_whitespace().nth(1), Some("8"), "{tokens}");
}

/// Seeds that are asked for, each twice.
const SEEDS: u32 = 64;
/// Tokens of each of these answers.
const SEED_TOKENS: usize = 8;

#[test]
fn the_same_seed_gives_the_same_tokens_byte_for_byte() {
    let Some((_root, provisioner)) = start(1) else { return };
    let url = provisioner.handoff().expect("the handoff was written").url;
    let ask = |seed: u32| -> Vec<String> {
        let body = json!({
            "messages": [{"role": "user", "content": "Say something."}], "max_tokens": SEED_TOKENS,
            "temperature": 1.0, "seed": seed, "stream": true, "cache_prompt": false,
        });
        let answer = client()
            .post(format!("{url}/v1/chat/completions"))
            .header("Content-Type", "application/json")
            .send(body.to_string())
            .expect("llama.cpp answers");
        assert_eq!(answer.status(), 200);
        let lines = BufReader::new(answer.into_body().into_reader()).lines();
        let chunks = lines
            .map(|line| line.expect("the stream ends cleanly"))
            .filter_map(|line| serde_json::from_str::<Value>(line.strip_prefix("data: ")?).ok());
        // Ids and times differ by nature; what was generated may not.
        chunks.filter_map(|mut chunk| Some(chunk["choices"].as_array_mut()?.pop()?.to_string())).collect()
    };
    let first: Vec<Vec<String>> = (0..SEEDS).map(ask).collect();
    // The second time in another order: what was asked before is not to matter.
    for seed in (0..SEEDS).rev() {
        assert_eq!(ask(seed), first[seed as usize], "seed {seed}");
    }
    assert!(first.iter().all(|chunks| chunks.len() > SEED_TOKENS), "{:?}", first[0]);
    let different: std::collections::BTreeSet<&Vec<String>> = first.iter().collect();
    assert!(different.len() > SEEDS as usize / 2, "{} answers to {SEEDS} seeds", different.len());
}
