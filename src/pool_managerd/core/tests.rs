//! The node agent's core as its daemon drives it.

use std::sync::Arc;

use super::super::callbacks::Policy;
use super::*;
use crate::replicas::{AllowList, FileContent};
use crate::time::Wall;
use crate::wire::handoff::{HandoffFile, parse};

const NOW: Now = Now { mono: Mono(1_000_000_000), wall: Wall(1_700_000_000_000_000_000) };

fn core(control_planes: &[BaseUrl]) -> Core {
    let identity = Identity {
        node_id: NodeId::new("n").expect("an id"),
        machine_id: "m".into(),
        address: Some(BaseUrl::new("http://10.0.0.1:9200").expect("a URL")),
        pools: Vec::new(),
        capabilities: Capabilities::default(),
        incarnation: 1,
        boot_id: None,
    };
    let policy = EnginePolicy::new(Vec::new(), Some(9200), AllowList::default(), "ALLOW");
    Core::new(identity, policy, control_planes, 10_000, 30_000, 1, NOW)
}

fn file(name: &str, text: &str) -> ListedFile {
    let HandoffFile::Engine(handoff) = parse(text.as_bytes()).expect("a handoff") else { panic!("a URL") };
    ListedFile { name: name.into(), modified: NOW.wall, content: Arc::new(FileContent::Handoff(handoff)) }
}

fn handle(core: &mut Core, input: Input, now: Now) -> Vec<Effect> {
    let mut effects = Vec::new();
    core.handle(input, now, &mut effects);
    core.check_invariants();
    effects
}

/// The daemon sleeps until the deadline: one that `Tick` does not move makes it spin.
#[test]
fn a_draining_agent_sleeps_until_its_requests_end() {
    let mut core = core(&[]);
    let listing = vec![
        file("a.json", r#"{"url":"http://127.0.0.1:1","replica_id":"a","models":["m"]}"#),
        file("b.json", r#"{"url":"http://127.0.0.1:2","replica_id":"b","models":["m"]}"#),
    ];
    let effects = handle(&mut core, Input::Listing(listing), NOW);
    let mut probes = effects.into_iter().filter_map(|effect| match effect {
        Effect::Probe(order) => Some(order),
        _ => None,
    });
    let (a, b) = (probes.next().expect("a probe"), probes.next().expect("another"));
    handle(&mut core, Input::Probed(a.id.clone(), ProbeOutcome::Healthy), NOW);
    handle(&mut core, Input::Probed(b.id, ProbeOutcome::Loading(503)), NOW);
    let (lease, ..) = core.acquire(&a.id.key, None, 1).expect("it is ready");

    handle(&mut core, Input::Shutdown, NOW);
    let mut now = NOW;
    for _ in 0..3 {
        let at = core.deadline().expect("the drain's limit");
        assert!(at > now.mono, "{at:?} is not after {:?}", now.mono);
        now = now.plus_ms(9_999);
        assert_eq!(handle(&mut core, Input::Tick, now), [], "no probe is sent any more");
    }
    let effects = handle(&mut core, Input::Relayed { lease, fault: None }, now);
    assert!(effects.contains(&Effect::Exit), "{effects:?}");
    assert_eq!(core.deadline(), None);
}

/// A ready replica with a request on it.
fn busy_core() -> (Core, ReplicaLease) {
    let mut core = core(&[]);
    let listing = vec![file("a.json", r#"{"url":"http://127.0.0.1:1","models":["m"]}"#)];
    let effects = handle(&mut core, Input::Listing(listing), NOW);
    let probe = effects.into_iter().find_map(|effect| match effect {
        Effect::Probe(order) => Some(order.id),
        _ => None,
    });
    let id = probe.expect("a probe");
    handle(&mut core, Input::Probed(id.clone(), ProbeOutcome::Healthy), NOW);
    let (lease, ..) = core.acquire(&id.key, None, 1).expect("it is ready");
    (core, lease)
}

#[test]
fn a_shutdown_cuts_what_its_limit_does_not_suffice_for() {
    let (mut core, lease) = busy_core();
    handle(&mut core, Input::Shutdown, NOW);
    let at = core.deadline().expect("its limit");
    assert_eq!(at, NOW.mono.plus_ms(30_000));
    let late = NOW.plus_ms(30_000);
    let effects = handle(&mut core, Input::Tick, late);
    let cut = effects.iter().position(|effect| *effect == Effect::Cut(vec![lease.id])).expect("it is cut");
    let exit = effects.iter().position(|effect| *effect == Effect::Exit).expect("nobody is told any more");
    assert!(cut < exit, "clients are told before the process ends: {effects:?}");
}

#[test]
fn what_a_restart_must_keep_is_told_by_a_revision_and_taken_back() {
    let (mut core, lease) = busy_core();
    let mut effects = Vec::new();
    let policy = EnginePolicy::new(Vec::new(), Some(9200), AllowList::default(), "");
    core.enable_callbacks(Policy::new(policy.clone(), Vec::new()));
    let before = core.kept_revision();
    handle(&mut core, Input::Drain(Scope::Node, Some(60_000)), NOW);
    assert!(core.kept_revision() > before);
    let url = BaseUrl::new("http://127.0.0.1:7/x").expect("a URL");
    let before = core.kept_revision();
    core.register_callback(&url, None, false, NOW, &mut effects).expect("allowed");
    assert!(core.kept_revision() > before);
    let before = core.kept_revision();
    handle(&mut core, Input::Relayed { lease, fault: None }, NOW);
    assert_eq!(core.kept_revision(), before, "progress needs no keeping");

    let (drains, callbacks) = (core.replicas().export_drains(), core.callbacks().export());
    let mut next = busy_core().0;
    next.enable_callbacks(Policy::new(policy, Vec::new()));
    next.restore(&drains, &callbacks, NOW, &mut effects);
    next.check_invariants();
    assert_eq!((next.replicas().export_drains(), next.callbacks().export()), (drains, callbacks));
    assert!(next.replicas().pools().iter().all(|pool| pool.draining));
    handle(&mut next, Input::Resume(Scope::Node), NOW);
    assert!(next.replicas().pools().iter().all(|pool| pool.ready));
}
