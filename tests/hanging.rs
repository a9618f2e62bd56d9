//! An engine that hangs is tried, held out and taken back, also where pool-managerd does not see its requests:
//! orchestratord alone (HOME profile), and engines that orchestratord dials directly (CLOUD profile).

#[path = "daemons/harness.rs"]
#[allow(dead_code, reason = "shared with other tests")]
mod harness;
#[path = "engines/served.rs"]
mod served;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use harness::*;
use llama_orch::service::machine::own_addresses;
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

fn stream(port: u16, token: Option<&str>) -> Open {
    let body = r#"{"model":"m","prompt":"x","stream":true}"#;
    let mut stream = open(port, "POST", COMPLETIONS, token, body).expect("an answer");
    stream.event().expect("a first event");
    stream
}

/// The only replica as the control plane shows it.
fn replica(port: u16) -> Option<Value> {
    Some(get(port, "/v2/pools")?.json()["pools"][0]["replicas"][0].clone())
}

fn posts(engine: &Engine) -> usize {
    let asked = engine.asked.lock().expect("nobody panics with it");
    asked.iter().filter(|line| line.starts_with("POST")).count()
}

#[test]
fn an_engine_that_hangs_is_tried_held_out_and_returns() {
    let home = Home::start(&[("ORCHESTRATORD_HANG_SUSPECT_MS", "2000")]);
    let served = engine_of(&home, 2);
    let _stream = stream(home.port, None);
    served.hangs.store(true, Ordering::Relaxed);
    let held = until("the hang", || replica(home.port).filter(|replica| replica["routable"] == false));
    let why = held["reason"].as_str().unwrap_or_default();
    assert!(why.contains("hangs: its answers had stood still for"), "{held}");
    assert!(held["since_ms"].as_u64().is_some_and(|at| at > 0), "{held}");
    assert_eq!(posts(&served), 2, "its stream and one trial request");
    served.hangs.store(false, Ordering::Relaxed);
    until("its return", || replica(home.port).filter(|replica| replica["routable"] == true));
    let events = get(home.port, "/v2/events").expect("an answer").body;
    for told in
        ["stood still for", "ready -> broken: hangs", "it answered the trial request", "broken -> ready"]
    {
        assert!(events.contains(told), "{told} in {events}");
    }
    let answer = post(home.port, COMPLETIONS, &json!({"model": "m", "prompt": "x"}).to_string());
    assert_eq!(answer.status, 200, "{answer:?}");
}

/// A machine's agent does not see requests that go past it, and is told when nothing comes any more.
#[test]
#[allow(clippy::print_stderr, reason = "a skipped test has to say so")]
fn an_engine_that_is_dialled_directly_is_judged_by_its_agent_too() {
    // Only engines on a loopback address are relayed to.
    let Some(address) = own_addresses().into_iter().find(|ip| ip.is_ipv4() && !ip.is_loopback()) else {
        eprintln!("skipped: this machine has no address beside loopback");
        return;
    };
    let directory = tempfile::tempdir().expect("a directory");
    let (port, agent) = (free_port(), free_port());
    let (control_addr, agent_addr) = (format!("127.0.0.1:{port}"), format!("127.0.0.1:{agent}"));
    let (control_url, agent_url) = (format!("http://{control_addr}"), format!("http://{agent_addr}"));
    let token = "a-token-0123456789abcdef0123456789abcdef";
    let control = [
        ("ORCHESTRATORD_ADDR", control_addr.as_str()),
        ("ORCHESTRATORD_CLOUD_PROFILE", "true"),
        ("ORCHESTRATORD_HANG_SUSPECT_MS", "2000"),
        ("LLORCH_API_TOKEN", token),
    ];
    let _control = Process::start(ORCHESTRATORD, &[], &control, directory.path());
    until("orchestratord", || get(port, "/health").filter(|answer| answer.status == 200));
    let env = [
        ("POOL_MANAGERD_ADDR", agent_addr.as_str()),
        ("POOL_MANAGERD_CLOUD_PROFILE", "true"),
        ("POOL_MANAGERD_NODE_ID", "node"),
        ("POOL_MANAGERD_ADDRESS", &agent_url),
        ("POOL_MANAGERD_HANG_SUSPECT_MS", "2000"),
        ("ORCHESTRATORD_URL", &control_url),
        ("LLORCH_API_TOKEN", token),
    ];
    let _agent = Process::start(POOL_MANAGERD, &[], &env, directory.path());
    let (served, engine_port) = engine(&[HEALTHY]).start_on(address);
    let text = format!(
        r#"{{"pool_id":"p","replica_id":"r0","engine":"openai","model":"m","slots":2,"url":"http://{address}:{engine_port}"}}"#
    );
    hand_over(&directory.path().join(".runtime/engines"), "r0.json", &text);
    until("the replica", || metric(port, "orchestratord_replicas_routable").filter(|n| *n == 1.0));
    let _stream = stream(port, Some(token));
    assert_eq!(metric(agent, "pool_managerd_relayed_in_flight"), Some(0.0), "it went past the agent");
    served.hangs.store(true, Ordering::Relaxed);
    let with_token = |port, path: &str| ask(port, "GET", path, Some(token), "").expect("an answer");
    let held = until("the hang", || {
        Some(with_token(agent, "/v2/pools/p/replicas/r0/status").json())
            .filter(|told| told["state"] == "broken")
    });
    assert!(held["reason"].as_str().is_some_and(|why| why.starts_with("hangs: ")), "{held}");
    assert_eq!(posts(&served), 2, "its stream and one trial request");
    until("the control plane", || metric(port, "orchestratord_replicas_routable").filter(|n| *n == 0.0));
    served.hangs.store(false, Ordering::Relaxed);
    until("its return", || metric(port, "orchestratord_replicas_routable").filter(|n| *n == 1.0));
    let unknown = ask(agent, "POST", "/v2/pools/p/replicas/r0/activity", Some(token), r#"{"generation":1}"#);
    assert_eq!(unknown.map(|answer| answer.status), Some(409), "another engine is meant");
    let nobody = ask(agent, "POST", "/v2/pools/p/replicas/r0/activity", None, r#"{"generation":1}"#);
    assert_eq!(nobody.map(|answer| answer.status), Some(401), "whoever tells must be one of ours");
}
