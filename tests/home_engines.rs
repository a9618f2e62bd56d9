//! What orchestratord learns of this machine's engines and does about them where no pool-managerd runs (HOME
//! profile): as `engines.rs` has it for pool-managerd.

#[path = "daemons/harness.rs"]
#[allow(dead_code, reason = "shared with other tests")]
mod harness;
#[path = "engines/served.rs"]
mod served;

use std::fs;

use harness::*;
use serde_json::Value;
use served::{Engine, engine};

const KEY: &str = "sk-canary-51b7";
const PROPS: (&str, u16, &str) =
    ("/props", 200, r#"{"default_generation_settings":{"n_ctx":8192},"total_slots":6,"model_path":"/m"}"#);

/// Waits until the replica `p/r0` is as `want` says.
fn until_replica(home: &Home, what: &str, want: impl Fn(&Value) -> bool) -> Value {
    until(what, || {
        let status = get(home.port, "/v2/pools/p/replicas/r0/status")?;
        Some(status.json()).filter(|status| want(status))
    })
}

#[test]
fn a_key_is_read_again_named_when_it_is_wrong_and_shown_nowhere() {
    let home = Home::start(&[]);
    let (_served, port) = Engine { key: Some(KEY), ..engine(&[("/ping", 200, "ok"), PROPS]) }.start();
    let key_file = home.directory.path().join("engine.key");
    let path = key_file.display().to_string();
    let text = format!(
        r#"{{"pool_id":"p","replica_id":"r0","model":"m","health_path":"/ping","auth":{{"file":"{path}"}},"url":"http://127.0.0.1:{port}"}}"#
    );
    hand_over(&home.engines(), "r0.json", &text);
    let says = |status: &Value, part: &str| {
        status["reason"].as_str().is_some_and(|why| why.contains(part) && why.contains(&path))
    };
    until_replica(&home, "a missing key", |status| says(status, "cannot be read"));
    fs::write(&key_file, "sk-wrong\n").expect("written");
    until_replica(&home, "a wrong key", |status| says(status, "does not accept the key"));
    fs::write(&key_file, format!("{KEY}\n")).expect("written");
    let status = until_replica(&home, "the right key", |status| status["ready"] == true);
    assert_eq!(status["slots_total"], 6, "its properties were asked with the key: {status}");
    let answer = post(home.port, "/v1/completions", r#"{"model":"m","prompt":"x","max_tokens":1}"#);
    assert_eq!(answer.status, 200, "{answer:?}");
    let shown = ["/v2/events", "/v2/pools", "/v2/handoffs", "/metrics"]
        .map(|page| get(home.port, page).expect("an answer").body);
    assert!(!shown.concat().contains(KEY) && !home.daemon.log().contains(KEY), "the key is shown");
}

#[test]
fn the_end_of_a_process_is_seen_and_said_with_its_time() {
    let home = Home::start(&[]);
    let port = free_port();
    let mut engine = demo_engine(port, &[], home.directory.path());
    let text = format!(
        r#"{{"pool_id":"p","replica_id":"r0","url":"http://127.0.0.1:{port}","pid":{}}}"#,
        engine.pid()
    );
    hand_over(&home.engines(), "r0.json", &text);
    let ready = until_replica(&home, "the engine", |status| status["state"] == "ready");
    engine.kill();
    let ended = until_replica(&home, "its end", |status| status["state"] == "broken");
    let why = ended["reason"].as_str().unwrap_or_default();
    assert!(why.contains("process") && why.contains(&engine.pid().to_string()), "{ended}");
    assert!(ended["since_ms"].as_u64() >= ready["since_ms"].as_u64(), "{ended}");
    home.until_routable(0.0);
    let pool = get(home.port, "/v2/pools/p/status").expect("an answer").json();
    assert_eq!((&pool["ready"], &pool["last_error"]), (&false.into(), &ended["reason"]), "{pool}");
    let events = get(home.port, "/v2/events").expect("an answer").body;
    assert!(events.contains("ready -> broken") || events.contains("suspect -> broken"), "{events}");
}
