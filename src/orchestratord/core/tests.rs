//! The control plane's core as its daemon drives it.

use std::sync::Arc;

use super::*;
use crate::orchestratord::admission::Priority;
use crate::orchestratord::replica_table::BACKOFF_FIRST_MS;
use crate::orchestratord::service_registry::Limits;
use crate::replicas::{AllowList, EnginePolicy, FileContent, ListedFile, Listing, ProbeOutcome};
use crate::time::Wall;
use crate::wire::handoff::{HandoffFile, parse};
use crate::wire::node::{Heartbeat, RegisterRequest};

const NOW: Now = Now { mono: Mono(1_000_000_000), wall: Wall(1_700_000_000_000_000_000) };

fn options(local: bool) -> Options {
    let policy = EnginePolicy::new(Vec::new(), Some(8080), AllowList::default(), "ALLOW");
    Options {
        limits: Limits::default(),
        strategy: Strategy::LeastLoaded,
        admission_capacity: 10,
        admission_timeout_ms: 60_000,
        drain_timeout_ms: 30_000,
        hang_suspect_ms: 60_000,
        local: local.then(|| (NodeId::new("local").expect("an id"), policy)),
        addresses: None,
        seed: 1,
    }
}

fn handle(core: &mut Core, input: Input, now: Now) -> Vec<Effect> {
    let mut effects = Vec::new();
    core.handle(input, now, &mut effects);
    core.check_invariants();
    effects.retain(|effect| !matches!(effect, Effect::Log(_)));
    effects
}

fn listing(text: &str) -> Input {
    let HandoffFile::Engine(handoff) = parse(text.as_bytes()).expect("a handoff") else { panic!("a URL") };
    let content = Arc::new(FileContent::Handoff(handoff));
    Input::Listing(Listing::whole(vec![ListedFile { name: "a.json".into(), modified: NOW.wall, content }]))
}

fn ask(request: RequestId, ask: Ask) -> Input {
    let asked = Asked { ask, priority: Priority::Batch, client: "c".into(), wait_ms_max: 60_000 };
    Input::Ask { request, asked: Box::new(asked) }
}

/// A control plane with one local engine that answers its probes.
fn serving(text: &str) -> Core {
    let mut core = Core::new(options(true), NOW);
    let effects = handle(&mut core, listing(text), NOW);
    let Some(Effect::Probe(order)) = effects.into_iter().next() else { panic!("a probe") };
    handle(&mut core, Input::Probed(order.id, ProbeOutcome::Healthy), NOW);
    core
}

/// The daemon sleeps until the deadline: one that `Tick` does not move makes it spin.
#[test]
fn a_draining_control_plane_sleeps_until_its_requests_end() {
    let mut core = serving(r#"{"engine":"other","url":"http://127.0.0.1:1","models":["m"]}"#);
    let effects = handle(&mut core, ask(1, Ask::default()), NOW);
    assert!(matches!(effects[..], [Effect::Dispatch(1, _)]), "{effects:?}");
    handle(&mut core, Input::Shutdown, NOW);
    let now = NOW.plus_ms(20_000);
    assert!(handle(&mut core, Input::Tick, now).is_empty(), "no probe is sent any more");
    let at = core.deadline().expect("the drain's limit");
    assert!(at > now.mono, "{at:?} is not after {:?}", now.mono);
    let effects = handle(&mut core, Input::Ended(1, Ending::Complete), now);
    assert!(matches!(effects[..], [Effect::Exit]), "{effects:?}");
}

/// A waiter is served as soon as a replica could take it, whichever fact about the replica changed.
#[test]
fn a_waiter_is_served_when_an_idle_engine_comes_to_fit() {
    let text = |models: &str, mask: &str| {
        format!(
            r#"{{"engine":"other","url":"http://127.0.0.1:1","slots":2,"models":[{models}],"device_mask":"{mask}"}}"#
        )
    };
    let other = r#"{"engine":"other","url":"http://127.0.0.1:2","replica_id":"b","ready":false,"models":["n"],"device_mask":"1"}"#;
    let model = Ask { model: Some("n".into()), ..Ask::default() };
    let devices = Ask { device_mask: Some("1".into()), ..Ask::default() };
    for (wanted, after) in [(model, text(r#""m","n""#, "0")), (devices, text(r#""m""#, "1"))] {
        let mut core = serving(&text(r#""m""#, "0"));
        let both = |first: &str| match (listing(first), listing(other)) {
            (Input::Listing(mut files), Input::Listing(more)) => {
                files
                    .files
                    .extend(more.files.into_iter().map(|file| ListedFile { name: "b.json".into(), ..file }));
                Input::Listing(files)
            }
            _ => panic!("listings"),
        };
        handle(&mut core, both(&text(r#""m""#, "0")), NOW);
        let effects = handle(&mut core, ask(1, wanted.clone()), NOW);
        assert!(matches!(effects[..], [Effect::Waiting { .. }]), "{wanted:?}: {effects:?}");
        let effects = handle(&mut core, both(&after), NOW);
        assert!(matches!(effects[..], [Effect::Dispatch(1, _)]), "{wanted:?}: {effects:?}");
    }
}

/// A request does not wait for another engine while the one on which it failed serves again.
#[test]
fn a_request_goes_back_to_an_engine_that_recovered() {
    let mut core = Core::new(options(false), NOW);
    let node = NodeId::new("n").expect("an id");
    let register: RegisterRequest =
        serde_json::from_str(r#"{"node_id":"n","address":"http://10.0.0.1:9200"}"#).expect("a registration");
    handle(&mut core, Input::Register { reply: 1, peer: "p".into(), body: Box::new(register) }, NOW);
    let beat: Heartbeat = serde_json::from_str(
        r#"{"pools":[{"pool_id":"p","replicas":[
            {"replica_id":"a","url":"http://10.0.0.1:1","ready":true,"slots_free":1,"slots_total":1},
            {"replica_id":"b","url":"http://10.0.0.1:2","ready":true,"slots_free":1,"slots_total":1}]}]}"#,
    )
    .expect("a heartbeat");
    handle(&mut core, Input::Heartbeat { reply: 2, peer: "p".into(), node, body: Box::new(beat) }, NOW);
    let went = |effects: &[Effect]| match effects {
        [Effect::Dispatch(3, dispatch)] => dispatch.key.replica.to_string(),
        _ => panic!("{effects:?}"),
    };
    let failed =
        || Ending::Failed { reason: "reset".into(), connect: false, timeout: false, answered: false };
    let effects = handle(&mut core, ask(3, Ask::default()), NOW);
    assert_eq!(went(&effects), "a");
    let effects = handle(&mut core, Input::Ended(3, failed()), NOW);
    assert_eq!(went(&effects), "b");
    let now = NOW.plus_ms(BACKOFF_FIRST_MS);
    assert!(handle(&mut core, Input::Tick, now).is_empty());
    let effects = handle(&mut core, Input::Ended(3, failed()), now);
    assert_eq!(went(&effects), "a", "its backoff is over");
    let effects = handle(&mut core, Input::Ended(3, failed()), now);
    assert!(matches!(effects[..], [Effect::Refuse(3, Refusal::EngineFailed { .. })]), "{effects:?}");
}
