//! Drains where no pool-managerd runs (HOME profile): orchestratord keeps them itself, and shows how this
//! machine's engines are. Real daemons, real sockets.

#[path = "daemons/harness.rs"]
#[allow(dead_code, reason = "shared with other tests")]
mod harness;
#[path = "engines/served.rs"]
mod served;

use std::fs;
use std::process::Command;

use harness::*;
use serde_json::Value;
use served::engine;

const HEALTHY: (&str, u16, &str) = ("/health", 200, "");
const COMPLETIONS: &str = "/v1/completions";
const STREAM: &str = r#"{"model":"m","prompt":"x","stream":true}"#;
const WHOLE: &str = r#"{"model":"m","prompt":"x"}"#;

/// A control plane with one replica of four slots on GPU 0, in pool `p`.
fn home() -> Home {
    let home = Home::start(&[]);
    let (_served, port) = engine(&[HEALTHY]).start();
    let text = format!(
        r#"{{"pool_id":"p","replica_id":"r0","engine":"openai","model":"m","slots":4,"gpu_device":0,"url":"http://127.0.0.1:{port}"}}"#
    );
    hand_over(&home.engines(), "r0.json", &text);
    home.until_routable(1.0);
    home
}

fn stream(home: &Home) -> Open {
    let mut stream = open(home.port, "POST", COMPLETIONS, None, STREAM).expect("an answer");
    stream.event().expect("a first event");
    stream
}

fn until_drain(home: &Home, path: &str, what: &str, want: impl Fn(&Value) -> bool) -> Value {
    until(what, || Some(get(home.port, path)?.json()).filter(|drain| want(drain)))
}

#[test]
fn a_drain_waits_for_what_runs_and_tells_how_far_it_is() {
    let home = home();
    for path in ["/v2/node", "/v2/gpus/0", "/v2/pools/p", "/v2/pools/p/replicas/r0"] {
        let running = stream(&home);
        let begun = post(home.port, &format!("{path}/drain"), "");
        assert_eq!((begun.status, &begun.json()["in_flight"]), (202, &1.into()), "{path}: {begun:?}");
        home.until_routable(0.0);
        let status = get(home.port, "/v2/pools/p/replicas/r0/status").expect("an answer").json();
        assert_eq!((&status["state"], &status["reason"]), (&"draining".into(), &"drained on request".into()));
        let drain = get(home.port, &format!("{path}/drain")).expect("an answer").json();
        assert_eq!((&drain["draining"], &drain["drained"]), (&true.into(), &false.into()), "{path}: {drain}");
        drop(running);
        let drained = until_drain(&home, &format!("{path}/drain"), path, |drain| drain["drained"] == true);
        assert_eq!((&drained["finished"], &drained["cut"]), (&1.into(), &0.into()), "{path}: {drained}");
        let resumed = post(home.port, &format!("{path}/resume"), "");
        assert_eq!((resumed.status, &resumed.json()["draining"]), (200, &false.into()), "{path}");
        home.until_routable(1.0);
    }
    assert_eq!(post(home.port, COMPLETIONS, WHOLE).status, 200, "it takes work again");
    let drains = get(home.port, "/v2/drains").expect("an answer").json();
    assert_eq!(drains["drains"].as_array().map(Vec::len), Some(0), "{drains}");
    let events = get(home.port, "/v2/events").expect("an answer").body;
    for told in ["drain began: 1 requests run", "ready -> draining", "1 requests ended by themselves"] {
        assert!(events.contains(told), "{told} in {events}");
    }
    for (path, body, status) in [
        ("/v2/pools/q/drain", "", 404),
        ("/v2/pools/p/replicas/r1/drain", "", 404),
        ("/v2/gpus/x/drain", "", 400),
        ("/v2/pools/p/drain", r#"{"deadline_ms":-1}"#, 400),
    ] {
        assert_eq!(post(home.port, path, body).status, status, "{path}");
    }
}

#[test]
fn at_its_deadline_a_drain_cuts_what_still_runs_and_never_with_a_clean_end() {
    let home = home();
    let mut running = stream(&home);
    let begun = post(home.port, "/v2/pools/p/drain", r#"{"deadline_ms":200}"#);
    assert_eq!(begun.status, 202, "{begun:?}");
    let mut last = String::new();
    while let Some(event) = running.event() {
        last = event;
    }
    assert!(last.contains("drain") && last.contains("error"), "it ends with an error: {last:?}");
    let drained = until_drain(&home, "/v2/pools/p/drain", "its end", |drain| drain["drained"] == true);
    assert_eq!((&drained["finished"], &drained["cut"]), (&0.into(), &1.into()), "{drained}");
}

#[test]
fn a_replica_whose_file_vanishes_drains_and_then_is_gone() {
    let home = home();
    let running = stream(&home);
    fs::remove_file(home.engines().join("r0.json")).expect("removed");
    let status = until("the drain", || {
        let status = get(home.port, "/v2/pools/p/replicas/r0/status")?;
        Some(status.json()).filter(|status| status["state"] == "draining")
    });
    assert_eq!(status["slots_free"], 3, "its request is known: {status}");
    drop(running);
    let path = "/v2/pools/p/replicas/r0/status";
    until("its end", || get(home.port, path).filter(|answer| answer.status == 404));
}

#[test]
fn the_command_drains_a_control_plane_that_watches_its_own_machine() {
    let home = home();
    let url = format!("http://127.0.0.1:{}", home.port);
    let llorch = |args: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_llorch"))
            .args(args)
            .args(["--url", &url])
            .output()
            .expect("it runs");
        let text = [output.stdout, output.stderr].concat();
        (output.status.code(), String::from_utf8_lossy(&text).into_owned())
    };
    let (code, told) = llorch(&["drain", "pool", "p"]);
    assert!(code == Some(0) && told.contains("drained"), "{code:?} {told}");
    home.until_routable(0.0);
    let (code, told) = llorch(&["resume", "pool", "p"]);
    assert!(code == Some(0) && told.contains("takes work again"), "{code:?} {told}");
    home.until_routable(1.0);
}
