//! What pool-managerd learns of engines of each kind, and what it does about keys and engines that hang.
//! The engines are small servers that answer as the real ones do.

#[path = "daemons/harness.rs"]
#[allow(dead_code, reason = "shared with other tests")]
mod harness;
#[path = "engines/served.rs"]
mod served;

use std::fs;
use std::sync::atomic::Ordering;

use harness::*;
use serde_json::Value;
use served::{Engine, engine};

const KEY: &str = "sk-canary-3f9a";

/// A node agent with its directory.
struct Agent {
    directory: tempfile::TempDir,
    port: u16,
    process: Process,
}

impl Agent {
    fn start(args: &[&str]) -> Agent {
        let directory = tempfile::tempdir().expect("a directory");
        let port = free_port();
        let addr = format!("127.0.0.1:{port}");
        let process =
            Process::start(POOL_MANAGERD, &[&["--addr", &addr], args].concat(), &[], directory.path());
        until("the agent", || get(port, "/health").filter(|answer| answer.status == 200));
        Agent { directory, port, process }
    }

    fn hand_over(&self, replica: &str, port: u16, more: &str) {
        let text =
            format!(r#"{{"pool_id":"p","replica_id":"{replica}","url":"http://127.0.0.1:{port}"{more}}}"#);
        hand_over(&self.directory.path().join(".runtime/engines"), &format!("{replica}.json"), &text);
    }

    /// Waits until a replica's status is as `want` says.
    fn until(&self, replica: &str, what: &str, want: impl Fn(&Value) -> bool) -> Value {
        until(what, || {
            let status = get(self.port, &format!("/v2/pools/p/replicas/{replica}/status"))?;
            Some(status.json()).filter(|status| want(status))
        })
    }
}

const PROPS: (&str, u16, &str) =
    ("/props", 200, r#"{"default_generation_settings":{"n_ctx":8192},"total_slots":6,"model_path":"/m"}"#);
const LIST: (&str, u16, &str) =
    ("/v1/models", 200, r#"{"object":"list","data":[{"id":"org/model","max_model_len":4096}]}"#);
const HEALTHY: (&str, u16, &str) = ("/health", 200, "");

#[test]
fn each_kind_of_engine_is_asked_in_its_own_way() {
    let agent = Agent::start(&[]);
    let info =
        ("/info", 200, r#"{"model_id":"org/tgi","max_total_tokens":2048,"max_concurrent_requests":128}"#);
    let cases = [
        (
            "llamacpp",
            engine(&[HEALTHY, PROPS, ("/v1/models", 200, r#"{"data":[{"id":"q"}]}"#)]),
            "q",
            6,
            Some(8192),
        ),
        ("vllm", engine(&[HEALTHY, LIST]), "org/model", 1, Some(4096)),
        ("sglang", engine(&[HEALTHY, LIST]), "org/model", 1, Some(4096)),
        ("tgi", engine(&[HEALTHY, info]), "org/tgi", 128, Some(2048)),
        // Without a health path of its own.
        ("mlx", engine(&[LIST]), "org/model", 1, Some(4096)),
    ];
    let mut engines = Vec::new();
    for (kind, served, model, slots, context) in cases {
        let (served, port) = served.start();
        agent.hand_over(kind, port, &format!(r#","engine":"{kind}""#));
        let status = agent.until(kind, kind, |status| status["ready"] == true);
        assert_eq!(
            (&status["models"][0], &status["slots_total"], &status["context_length"]),
            (&Value::from(model), &Value::from(slots), &Value::from(context)),
            "{kind}: {status}"
        );
        engines.push(served);
    }
    // What was asked once is not asked again by later probes.
    let asked = engines[0].asked.lock().expect("nobody panics with it").clone();
    assert_eq!(asked, ["GET /health", "GET /props", "GET /v1/models"]);
}

#[test]
fn an_engine_takes_its_time_and_its_list_of_models_proves_nothing() {
    let agent = Agent::start(&[]);
    // SGLang lists its models while it loads.
    let (_loading, port) = engine(&[("/health", 503, ""), LIST]).start();
    agent.hand_over("r0", port, r#","engine":"sglang""#);
    let told = |status: &Value| status["reason"].as_str().is_some_and(|why| why.contains("503"));
    let status = agent.until("r0", "the reason", told);
    assert_eq!((&status["state"], &status["ready"]), (&Value::from("probing"), &Value::from(false)));
}

#[test]
fn a_key_is_read_again_named_when_it_is_wrong_and_shown_nowhere() {
    let agent = Agent::start(&[]);
    let keyed = Engine { key: Some(KEY), ..engine(&[("/ping", 200, "ok"), PROPS]) };
    let (_served, port) = keyed.start();
    let key_file = agent.directory.path().join("engine.key");
    let path = key_file.display().to_string();
    let more = format!(r#","model":"m","health_path":"/ping","auth":{{"file":"{path}"}}"#);
    agent.hand_over("r0", port, &more);
    let reason = |status: &Value, part: &str| {
        status["reason"].as_str().is_some_and(|why| why.contains(part) && why.contains(&path))
    };
    agent.until("r0", "a missing key", |status| reason(status, "cannot be read"));
    fs::write(&key_file, "sk-wrong\n").expect("written");
    agent.until("r0", "a wrong key", |status| reason(status, "does not accept the key"));
    fs::write(&key_file, format!("{KEY}\n")).expect("written");
    let status = agent.until("r0", "the right key", |status| status["ready"] == true);
    assert_eq!(status["slots_total"], 6, "its properties were asked with the key: {status}");
    let relayed =
        post(agent.port, "/v2/pools/p/replicas/r0/engine/v1/completions", r#"{"prompt":"x","max_tokens":1}"#);
    assert_eq!(relayed.status, 200, "{relayed:?}");
    let shown = ["/v2/events", "/v2/pools", "/v2/handoffs", "/metrics"]
        .map(|page| get(agent.port, page).expect("an answer").body);
    assert!(!shown.concat().contains(KEY) && !agent.process.log().contains(KEY), "the key is shown");
}

#[test]
fn an_engine_that_hangs_is_tried_held_out_and_returns() {
    let agent = Agent::start(&["--hang-suspect-ms", "2000"]);
    let (served, port) = engine(&[HEALTHY]).start();
    agent.hand_over("r0", port, r#","engine":"openai","model":"m","slots":2"#);
    agent.until("r0", "the engine", |status| status["ready"] == true);
    let mut stream = open(
        agent.port,
        "POST",
        "/v2/pools/p/replicas/r0/engine/v1/completions",
        None,
        r#"{"prompt":"x","stream":true}"#,
    )
    .expect("an answer");
    stream.event().expect("a first event");
    served.hangs.store(true, Ordering::Relaxed);
    let status = agent.until("r0", "the hang", |status| status["state"] == "broken");
    assert!(status["reason"].as_str().is_some_and(|why| why.starts_with("hangs: ")), "{status}");
    let asked = served.asked.lock().expect("nobody panics with it").clone();
    assert!(
        asked.iter().filter(|line| *line == "POST /v1/completions").count() >= 2,
        "it was tried: {asked:?}"
    );
    let refused = post(agent.port, "/v2/pools/p/replicas/r0/engine/v1/completions", r#"{"prompt":"x"}"#);
    assert_eq!(refused.status, 503, "{refused:?}");
    served.hangs.store(false, Ordering::Relaxed);
    agent.until("r0", "its return", |status| status["ready"] == true);
    let events = get(agent.port, "/v2/events").expect("an answer").body;
    for told in
        ["stood still for", "ready -> broken: hangs", "it answered the trial request", "broken -> ready"]
    {
        assert!(events.contains(told), "{told} in {events}");
    }
}
