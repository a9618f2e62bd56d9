//! The node agent's core as its daemon drives it.

use std::sync::Arc;

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
        auto_delete: false,
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
        effects.iter().any(|e| matches!(e, Effect::Log(h) if h.text.contains("no space"))),
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
