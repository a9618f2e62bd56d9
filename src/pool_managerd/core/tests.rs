//! The node agent's core as its daemon drives it.

use std::sync::Arc;

use super::super::callbacks::Policy;
use super::*;
use crate::replicas::{AllowList, FileContent, ListedFile};
use crate::time::Wall;
use crate::wire::handoff::{HandoffFile, parse};

const NOW: Now = Now { mono: Mono(1_000_000_000), wall: Wall(1_700_000_000_000_000_000) };

fn core(control_planes: &[BaseUrl]) -> Core {
    core_with(Options {
        control_planes: control_planes.to_vec(),
        heartbeat_interval_ms: 10_000,
        drain_timeout_ms: 30_000,
        ..Options::default()
    })
}

fn core_with(options: Options) -> Core {
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
    Core::new(identity, policy, &options, 1, NOW)
}

fn file(name: &str, text: &str) -> ListedFile {
    let HandoffFile::Engine(handoff) = parse(text.as_bytes()).expect("a handoff") else { panic!("a URL") };
    ListedFile {
        name: name.into(),
        modified: NOW.wall,
        content: Arc::new(FileContent::Handoff(handoff.into())),
    }
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
        file("a.json", r#"{"engine":"other","url":"http://127.0.0.1:1","replica_id":"a","models":["m"]}"#),
        file("b.json", r#"{"engine":"other","url":"http://127.0.0.1:2","replica_id":"b","models":["m"]}"#),
    ];
    let effects = handle(&mut core, Input::Listing(Listing::whole(listing)), NOW);
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

/// What a control plane must know leaves in the same turn.
#[test]
fn a_gpu_that_breaks_is_told_at_once() {
    use crate::pool_managerd::gpus::xid::{Pci, Source, Xid};
    use crate::pool_managerd::gpus::{DriverReading, Memory, Reading, Report, Values};

    let agreed = || Answer::Ok { next_heartbeat_ms: None, ttl_ms: None, registry_epoch: None };
    let call = |effects: Vec<Effect>| {
        effects.into_iter().find_map(|effect| match effect {
            Effect::Call { order, body, .. } => Some((order.call, body)),
            _ => None,
        })
    };
    let mut core = core(&[BaseUrl::new("http://control:8080").expect("a URL")]);
    let first = call(handle(&mut core, Input::Tick, NOW)).expect("a registration");
    let beat = call(handle(&mut core, Input::Told { plane: 0, call: first.0, answer: agreed() }, NOW));
    let told = Input::Told { plane: 0, call: beat.expect("a heartbeat").0, answer: agreed() };
    handle(&mut core, told, NOW);

    let pci = Pci { domain: 0, bus: 0x65, device: 0 };
    let memory = Memory { total_bytes: 100, used_bytes: 40, free_bytes: 60 };
    let values = Values { uuid: "GPU-a".into(), pci: Some(pci), memory: Some(memory), ..Values::default() };
    let reading = Report::Reading(Reading {
        driver: Ok(DriverReading { version: None, gpus: vec![(0, Ok(values))] }),
        next_at: NOW.mono.plus_ms(10_000),
        next_opens: false,
    });
    let (again, body) = call(handle(&mut core, Input::Gpu(reading), NOW)).expect("registers again");
    let CallBody::Register(body) = body else { panic!("a registration: {body:?}") };
    assert_eq!((body.capabilities.gpus.len(), body.capabilities.gpus[0].vram_total_bytes), (1, 100));
    assert_eq!(body.gpu_loads.iter().map(|load| load.memory()).collect::<Vec<_>>(), [Some((100, 60))]);
    let beat = call(handle(&mut core, Input::Told { plane: 0, call: again, answer: agreed() }, NOW));
    let told = Input::Told { plane: 0, call: beat.expect("a heartbeat").0, answer: agreed() };
    handle(&mut core, told, NOW);

    let handoff = r#"{"url":"http://127.0.0.1:1","replica_id":"a","models":["m"],"device_mask":"0"}"#;
    let now = NOW.plus_ms(100);
    let (beat, body) =
        call(handle(&mut core, Input::Listing(Listing::whole(vec![file("a.json", handoff)])), now))
            .expect("a heartbeat");
    let CallBody::Heartbeat(body) = body else { panic!("a heartbeat: {body:?}") };
    assert_eq!(body.pools[0].vram_free_bytes, 60);
    handle(&mut core, Input::Told { plane: 0, call: beat, answer: agreed() }, now);

    let now = now.plus_ms(100);
    let xid = Xid { pci, number: 79, detail: String::new(), source: Source::KernelLog };
    let (_, body) = call(handle(&mut core, Input::Gpu(Report::Xid(xid)), now)).expect("told at once");
    let CallBody::Heartbeat(body) = body else { panic!("a heartbeat: {body:?}") };
    let replica = &body.pools[0].replicas.as_ref().expect("replicas")[0];
    let reason = replica.reason.as_deref().expect("a reason");
    assert!(!replica.ready && reason.contains("GPU 0") && reason.contains("XID 79"), "{reason}");
}

#[test]
fn a_handoff_file_is_deleted_once_what_it_says_is_saved_and_not_before() {
    let options = || Options { auto_delete: true, ..Options::default() };
    let mut core = core_with(options());
    let text = r#"{"url":"http://127.0.0.1:8081","pool_id":"p","pid":7}"#;
    let listing = |files: Vec<ListedFile>| Input::Listing(Listing::whole(files));
    let saves = |effects: &[Effect]| effects.iter().filter(|e| matches!(e, Effect::Save(_))).count();
    let deletes = |effects: &[Effect]| effects.iter().filter(|e| matches!(e, Effect::DeleteFile(..))).count();
    let first = file("a.json", text);
    let effects = handle(&mut core, listing(vec![first.clone()]), NOW);
    assert_eq!((saves(&effects), deletes(&effects)), (1, 0));
    // It changes while it is being saved: what was saved is not all of it.
    let second = file("a.json", &text.replace("8081", "8082"));
    let effects = handle(&mut core, listing(vec![second.clone()]), NOW);
    assert_eq!((saves(&effects), deletes(&effects)), (0, 0), "one save at a time");
    let effects = handle(&mut core, Input::Saved(Ok(())), NOW);
    assert_eq!((saves(&effects), deletes(&effects)), (1, 0));
    let effects = handle(&mut core, Input::Saved(Err("no space".into())), NOW);
    assert_eq!((saves(&effects), deletes(&effects)), (0, 0));
    assert!(
        effects.iter().any(|e| matches!(e, Effect::Log(what) if what.happening().text.contains("no space"))),
        "{effects:?}"
    );
    let later = Now { mono: core.deadline().expect("tried again"), ..NOW };
    let effects = handle(&mut core, Input::Tick, later);
    let saved =
        effects.iter().find_map(|e| if let Effect::Save(text) = e { Some(text.clone()) } else { None });
    let saved = saved.expect("saved again");
    let effects = handle(&mut core, Input::Saved(Ok(())), later);
    let name = Arc::from("a.json");
    assert_eq!(effects, [Effect::DeleteFile(name, second.content.clone())]);
    let effects = handle(&mut core, listing(vec![]), later);
    assert_eq!(effects, [], "the file is gone and nothing else has changed");
    assert_eq!(core.pools().len(), 1);

    // The next start takes it up again.
    let mut next = core_with(options());
    let saved = Saved::read(saved.as_bytes()).expect("readable");
    handle(&mut next, Input::Restore(saved), NOW);
    let effects = handle(&mut next, listing(vec![]), NOW);
    assert_eq!((saves(&effects), deletes(&effects)), (0, 0), "what was restored is saved");
    let pools = next.pools();
    assert_eq!(pools[0].url.as_ref().map(BaseUrl::port), Some(8082), "{pools:?}");
}

/// A ready replica with a request on it.
fn busy_core() -> (Core, ReplicaLease) {
    let mut core = core(&[]);
    let listing = vec![file("a.json", r#"{"url":"http://127.0.0.1:1","models":["m"]}"#)];
    let effects = handle(&mut core, Input::Listing(Listing::whole(listing)), NOW);
    let probe = |effects: Vec<Effect>| {
        let order = effects.into_iter().find_map(|effect| match effect {
            Effect::Probe(order) => Some(order.id),
            _ => None,
        });
        order.expect("a probe")
    };
    let id = probe(effects);
    let id = probe(handle(&mut core, Input::Probed(id, ProbeOutcome::Healthy), NOW));
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
fn drains_and_callbacks_outlive_a_restart() {
    let (mut core, lease) = busy_core();
    let mut effects = Vec::new();
    let policy = EnginePolicy::new(Vec::new(), Some(9200), AllowList::default(), "");
    core.enable_callbacks(Policy::new(policy.clone(), Vec::new()));
    let saved = |effects: Vec<Effect>| {
        effects.into_iter().find_map(|e| if let Effect::Save(text) = e { Some(text) } else { None })
    };
    let first = saved(handle(&mut core, Input::Drain(Scope::Node, Some(60_000)), NOW));
    assert!(first.is_some_and(|text| text.contains("drains")));
    handle(&mut core, Input::Saved(Ok(())), NOW);
    let url = BaseUrl::new("http://127.0.0.1:7/x").expect("a URL");
    core.register_callback(&url, None, false, NOW, &mut effects).expect("allowed");
    let second = saved(effects).expect("saved again");
    handle(&mut core, Input::Saved(Ok(())), NOW);
    let third = saved(handle(&mut core, Input::Relayed { lease, fault: None }, NOW));
    assert_eq!(third, None, "progress needs no keeping");

    let (drains, callbacks) = (core.replicas().export_drains(), core.callbacks().export());
    let mut next = busy_core().0;
    next.enable_callbacks(Policy::new(policy, Vec::new()));
    let saved = Saved::read(second.as_bytes()).expect("readable");
    handle(&mut next, Input::Restore(saved), NOW);
    next.check_invariants();
    assert_eq!((next.replicas().export_drains(), next.callbacks().export()), (drains, callbacks));
    assert!(next.replicas().pools().iter().all(|pool| pool.draining));
    handle(&mut next, Input::Resume(Scope::Node), NOW);
    assert!(next.replicas().pools().iter().all(|pool| pool.ready));
}

#[test]
fn many_files_are_deleted_a_few_at_a_time() {
    let mut core = core_with(Options { auto_delete: true, ..Options::default() });
    let count = 5 * DELETES_MAX / 2;
    let mut files: Vec<ListedFile> = (0..count)
        .map(|n| {
            let text = format!(r#"{{"url":"http://127.0.0.1:1","replica_id":"r{n}","ready":false}}"#);
            file(&format!("{n:04}.json"), &text)
        })
        .collect();
    handle(&mut core, Input::Listing(Listing::whole(files.clone())), NOW);
    let mut effects = handle(&mut core, Input::Saved(Ok(())), NOW);
    let mut turns = 0;
    while !files.is_empty() {
        let deleted = effects.iter().filter(|e| matches!(e, Effect::DeleteFile(..))).count();
        assert!((1..=DELETES_MAX).contains(&deleted), "{deleted} in one turn");
        files.drain(..deleted);
        effects = handle(&mut core, Input::Listing(Listing::whole(files.clone())), NOW);
        turns += 1;
    }
    assert_eq!((turns, core.pools()[0].replicas.len()), (3, count));
}
