//! The control plane's core as its daemon drives it.

use std::sync::Arc;

use super::keeping::{LAST_SAVE_MS, REFRESH_MS, RETRY_MS_MAX, SAVE_INTERVAL_MS};
use super::*;
use crate::orchestratord::admission::Priority;
use crate::orchestratord::replica_table::BACKOFF_FIRST_MS;
use crate::orchestratord::saved::Piece;
use crate::orchestratord::service_registry::Limits;
use crate::replicas::{AllowList, EnginePolicy, FileContent, ListedFile, Listing, ProbeOutcome};
use crate::time::Wall;
use crate::wire::handoff::{HandoffFile, parse};
use crate::wire::node::{Heartbeat, RegisterRequest};

pub(super) const NOW: Now = Now { mono: Mono(1_000_000_000), wall: Wall(1_700_000_000_000_000_000) };

pub(super) fn options(local: bool) -> Options {
    let policy = EnginePolicy::new(Vec::new(), Some(8080), AllowList::default(), "ALLOW");
    Options {
        limits: Limits::default(),
        strategy: Strategy::LeastLoaded,
        prefix_affinity: true,
        served_sessions_max: 16_384,
        admission_capacity: 10,
        admission_timeout_ms: 60_000,
        drain_timeout_ms: 30_000,
        hang_suspect_ms: 60_000,
        local: local.then(|| (NodeId::new("local").expect("an id"), policy)),
        polled: Vec::new(),
        addresses: None,
        seed: 1,
    }
}

pub(super) fn handle(core: &mut Core, input: Input, now: Now) -> Vec<Effect> {
    let mut effects = Vec::new();
    core.handle(input, now, &mut effects);
    core.check_invariants();
    effects.retain(|effect| !matches!(effect, Effect::Log(_)));
    effects
}

fn listing(text: &str) -> Input {
    let HandoffFile::Engine(handoff) = parse(text.as_bytes()).expect("a handoff") else { panic!("a URL") };
    let content = Arc::new(FileContent::Handoff(handoff.into()));
    Input::Listing(Listing::whole(vec![ListedFile { name: "a.json".into(), modified: NOW.wall, content }]))
}

pub(super) fn ask(request: RequestId, ask: Ask) -> Input {
    let (priority, client) = (Priority::Batch, "c".into());
    let asked = Asked { ask, priority, client, wait_ms_max: 60_000, is_deadline: false };
    Input::Ask { request, asked: Box::new(asked) }
}

/// A control plane with one local engine that answers its probes.
pub(super) fn serving(text: &str) -> Core {
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

fn told(core: &Core) -> Vec<String> {
    let told = core.events().to_json(0);
    let text = |event: &serde_json::Value| event["text"].as_str().expect("words").to_string();
    told["events"].as_array().expect("events").iter().map(text).collect()
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

fn register(core: &mut Core, name: &str, now: Now) -> Vec<Effect> {
    let text = format!(r#"{{"node_id":"{name}","address":"http://10.0.0.1:9200","incarnation":1}}"#);
    let body = serde_json::from_str(&text).expect("a registration");
    handle(core, Input::Register { reply: 1, peer: "p".into(), body }, now)
}

fn beat(core: &mut Core, name: &str, free: u32, now: Now) -> Vec<Effect> {
    let text = format!(
        r#"{{"incarnation":1,"pools":[{{"pool_id":"p","replicas":[
            {{"replica_id":"a","url":"http://10.0.0.1:1","ready":true,"slots_free":{free},"slots_total":4}}]}}]}}"#
    );
    let body = serde_json::from_str(&text).expect("a heartbeat");
    let node = NodeId::new(name).expect("an id");
    handle(core, Input::Heartbeat { reply: 2, peer: "p".into(), node, body }, now)
}

/// What is saved in `effects`, if anything.
fn save(effects: &[Effect]) -> Option<&Piece> {
    let saves = |effect: &Effect| matches!(effect, Effect::Save(_));
    assert!(effects.iter().filter(|effect| saves(effect)).count() <= 1, "{effects:?}");
    effects.iter().find_map(|effect| if let Effect::Save(saved) = effect { Some(saved) } else { None })
}

#[test]
fn what_changes_is_saved_once_a_second_and_heartbeats_alone_are_not() {
    let mut core = Core::new(options(false), NOW);
    let first = register(&mut core, "n", NOW);
    assert_eq!(save(&first).map(|saved| saved.nodes.len()), Some(1));
    assert!(save(&beat(&mut core, "n", 4, NOW)).is_none(), "one at a time");
    handle(&mut core, Input::Saved(Ok(())), NOW);
    assert!(save(&beat(&mut core, "n", 3, NOW)).is_none(), "not twice in one second");
    let at = core.deadline().expect("the second one");
    assert_eq!(at.ms_since(NOW.mono), SAVE_INTERVAL_MS);
    let mut now = NOW.plus_ms(SAVE_INTERVAL_MS);
    let second = handle(&mut core, Input::Tick, now);
    assert_eq!(save(&second).map(|saved| saved.nodes[0].node.replicas.len()), Some(1));
    handle(&mut core, Input::Saved(Ok(())), now);
    let mut saves = 0;
    for free in 0..100 {
        now = now.plus_ms(5_000);
        saves += u32::from(save(&beat(&mut core, "n", free % 5, now)).is_some());
        saves += u32::from(save(&handle(&mut core, Input::Tick, now)).is_some());
    }
    assert_eq!(saves, 0, "500 s of other loads");
    now = now.plus_ms(REFRESH_MS);
    let refresh = beat(&mut core, "n", 4, now);
    assert!(save(&refresh).is_some(), "so that the file does not grow old");
    assert_eq!(core.counts().saves, 2);
}

#[test]
fn a_save_that_fails_is_told_once_and_serving_goes_on() {
    let mut core = Core::new(options(false), NOW);
    register(&mut core, "n", NOW);
    let mut now = NOW;
    for _ in 0..5 {
        handle(&mut core, Input::Saved(Err("no space".into())), now);
        beat(&mut core, "n", 4, now);
        let effects = handle(&mut core, ask(3, Ask::default()), now);
        assert!(matches!(effects[..], [Effect::Dispatch(3, _)]), "{effects:?}");
        handle(&mut core, Input::Ended(3, Ending::Complete), now);
        now = now.plus_ms(RETRY_MS_MAX);
        assert!(save(&beat(&mut core, "n", 4, now)).is_some(), "tried again");
    }
    let told = told(&core).iter().filter(|text| text.contains("no space")).count();
    assert_eq!((told, core.counts().saves_failed), (1, 5));
}

#[test]
fn the_end_waits_for_the_last_save_and_not_for_a_disk_that_hangs() {
    let mut core = Core::new(options(false), NOW);
    assert!(matches!(handle(&mut core, Input::Shutdown, NOW)[..], [Effect::Exit]), "nothing to save");
    for hangs in [false, true] {
        let mut core = Core::new(options(false), NOW);
        register(&mut core, "n", NOW);
        handle(&mut core, Input::Saved(Ok(())), NOW);
        let effects = handle(&mut core, Input::Shutdown, NOW);
        assert!(matches!(effects[..], [Effect::Save(_)]), "{effects:?}");
        assert!(handle(&mut core, Input::Tick, NOW).is_empty());
        let at = core.deadline().expect("it must not wait for ever");
        assert_eq!(at.ms_since(NOW.mono), LAST_SAVE_MS, "and not spin until then");
        let effects = if hangs {
            handle(&mut core, Input::Tick, NOW.plus_ms(LAST_SAVE_MS))
        } else {
            handle(&mut core, Input::Saved(Ok(())), NOW)
        };
        assert!(matches!(effects[..], [Effect::Exit]), "{effects:?}");
    }
    let mut home = serving(r#"{"engine":"other","url":"http://127.0.0.1:1","models":["m"]}"#);
    let effects = handle(&mut home, Input::Shutdown, NOW);
    assert!(matches!(effects[..], [Effect::Exit]), "the HOME profile saves nothing: {effects:?}");
}

/// Much of a fleet may die with the control plane; a request finds who is left.
#[test]
fn engines_that_are_only_remembered_do_not_use_up_a_request() {
    let mut before = Core::new(options(false), NOW);
    let names: Vec<String> = (0..10).map(|n| format!("n{n}")).collect();
    for name in &names {
        register(&mut before, name, NOW);
        beat(&mut before, name, 4, NOW);
    }
    let saved = before.registry().saved(NOW.wall);
    let mut core = Core::new(options(false), NOW);
    handle(&mut core, Input::Restore(saved), NOW);
    let told = told(&core);
    assert_eq!(told, ["10 nodes with 10 replicas restored, awaiting their heartbeats"]);
    let mut effects = handle(&mut core, ask(3, Ask::default()), NOW);
    for name in &names {
        let [Effect::Dispatch(3, dispatch)] = &effects[..] else { panic!("{effects:?}") };
        assert_eq!(dispatch.node.as_str(), name, "each is tried once");
        let reason = "connection refused".to_string();
        let failed = Ending::Failed { reason, connect: true, timeout: false, answered: false };
        effects = handle(&mut core, Input::Ended(3, failed), NOW);
    }
    assert!(matches!(effects[..], [Effect::Waiting { .. }]), "{effects:?}");
    beat(&mut core, "n4", 4, NOW);
    let effects = handle(&mut core, Input::Tick, NOW.plus_ms(BACKOFF_FIRST_MS));
    assert!(matches!(effects[..], [Effect::Dispatch(3, _)]), "and once more after the backoff: {effects:?}");
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

/// What this process lacks is no fault of the engine.
#[test]
fn an_engine_that_was_not_even_tried_stays_in_rotation() {
    let mut core = serving(r#"{"engine":"other","url":"http://127.0.0.1:1","models":["m"]}"#);
    handle(&mut core, ask(1, Ask::default()), NOW);
    let effects = handle(&mut core, Input::Ended(1, Ending::NotTried("no descriptor is left".into())), NOW);
    match &effects[..] {
        [Effect::Refuse(1, refusal @ Refusal::Overloaded(_))] => {
            assert_eq!(refusal.status(), 503);
            assert!(refusal.message().contains("no descriptor is left"), "{refusal:?}");
        }
        _ => panic!("{effects:?}"),
    }
    let effects = handle(&mut core, ask(2, Ask::default()), NOW);
    assert!(matches!(effects[..], [Effect::Dispatch(2, _)]), "{effects:?}");
}
