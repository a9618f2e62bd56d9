//! What orchestratord does itself about engines where no pool-managerd runs (HOME profile): an engine that hangs
//! is tried, held out and taken back.

#[path = "daemons/harness.rs"]
#[allow(dead_code, reason = "shared with other tests")]
mod harness;
#[path = "engines/served.rs"]
mod served;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use harness::*;
use serde_json::{Value, json};
use served::{Engine, engine};

const HEALTHY: (&str, u16, &str) = ("/health", 200, "");
const COMPLETIONS: &str = "/v1/completions";

/// An engine with a handoff, once it takes work.
fn engine_of(home: &Home, slots: u32) -> Arc<Engine> {
    let (served, port) = engine(&[HEALTHY]).start();
    let text = format!(
        r#"{{"pool_id":"p","replica_id":"r0","engine":"openai","model":"m","slots":{slots},"url":"http://127.0.0.1:{port}"}}"#
    );
    hand_over(&home.engines(), "r0.json", &text);
    home.until_routable(1.0);
    served
}

fn stream(home: &Home) -> Open {
    let body = r#"{"model":"m","prompt":"x","stream":true}"#;
    let mut stream = open(home.port, "POST", COMPLETIONS, None, body).expect("an answer");
    stream.event().expect("a first event");
    stream
}

/// The only replica as the control plane shows it.
fn replica(home: &Home) -> Option<Value> {
    Some(get(home.port, "/v2/pools")?.json()["pools"][0]["replicas"][0].clone())
}

fn posts(engine: &Engine) -> usize {
    let asked = engine.asked.lock().expect("nobody panics with it");
    asked.iter().filter(|line| line.starts_with("POST")).count()
}

#[test]
fn an_engine_that_hangs_is_tried_held_out_and_returns() {
    let home = Home::start(&[("ORCHESTRATORD_HANG_SUSPECT_MS", "2000")]);
    let served = engine_of(&home, 2);
    let _stream = stream(&home);
    served.hangs.store(true, Ordering::Relaxed);
    let held = until("the hang", || replica(&home).filter(|replica| replica["routable"] == false));
    let why = held["reason"].as_str().unwrap_or_default();
    assert!(why.contains("hangs: its answers had stood still for"), "{held}");
    assert!(held["since_ms"].as_u64().is_some_and(|at| at > 0), "{held}");
    assert_eq!(posts(&served), 2, "its stream and one trial request");
    served.hangs.store(false, Ordering::Relaxed);
    until("its return", || replica(&home).filter(|replica| replica["routable"] == true));
    let events = get(home.port, "/v2/events").expect("an answer").body;
    for told in
        ["stood still for", "ready -> broken: hangs", "it answered the trial request", "broken -> ready"]
    {
        assert!(events.contains(told), "{told} in {events}");
    }
    let answer = post(home.port, COMPLETIONS, &json!({"model": "m", "prompt": "x"}).to_string());
    assert_eq!(answer.status, 200, "{answer:?}");
}
