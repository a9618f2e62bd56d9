//! Every way in which a slot can come to fit ends somebody's wait in the same turn; and what becomes of
//! those who wait, or run, where a node vanishes.

use super::super::tests::{NOW, ask, handle, options};
use super::super::{ATTEMPTS_MAX, Ending, Input};
use super::*;
use crate::orchestratord::replica_table::BACKOFF_FIRST_MS;
use crate::orchestratord::service_registry::{Limits, NOT_READY_MS_MAX};
use crate::wire::id::{NodeId, PoolId};

/// What a node says of its only engine.
#[derive(Clone, Copy)]
struct Said {
    ready: bool,
    draining: bool,
    slots: u32,
    models: &'static str,
    mask: &'static str,
}

const IDLE: Said = Said { ready: true, draining: false, slots: 1, models: r#""m""#, mask: "0" };

fn core_with(nodes: &[&str]) -> Core {
    let mut core = Core::new(options(false), NOW);
    for node in nodes {
        join(&mut core, node, NOW);
        beat(&mut core, node, IDLE, NOW);
    }
    core
}

fn join(core: &mut Core, node: &str, now: Now) -> Vec<Effect> {
    let text = format!(r#"{{"node_id":"{node}","address":"http://{node}:9200","incarnation":1}}"#);
    let body = serde_json::from_str(&text).expect("a registration");
    handle(core, Input::Register { reply: 0, peer: "p".into(), body }, now)
}

fn beat(core: &mut Core, node: &str, said: Said, now: Now) -> Vec<Effect> {
    let Said { ready, draining, slots, models, mask } = said;
    let text = format!(
        r#"{{"incarnation":1,"pools":[{{"pool_id":"p","draining":{draining},"replicas":[
            {{"replica_id":"r","url":"http://{node}:1","ready":{ready},"draining":{draining},"slots_free":{slots},
            "slots_total":{slots},"models":[{models}],"device_mask":"{mask}"}}]}}]}}"#
    );
    let body = serde_json::from_str(&text).expect("a heartbeat");
    let node = NodeId::new(node).expect("an id");
    handle(core, Input::Heartbeat { reply: 0, peer: "p".into(), node, body }, now)
}

fn wants(model: &str) -> Ask {
    Ask { model: Some(model.into()), slots: 1, ..Ask::default() }
}

/// The request that `effects` give to an engine, and its node.
fn given(effects: &[Effect]) -> Option<(u64, String)> {
    let found = effects.iter().filter_map(|effect| match effect {
        Effect::Dispatch(id, dispatch) => Some((*id, dispatch.node.to_string())),
        _ => None,
    });
    let found: Vec<_> = found.collect();
    assert!(found.len() <= 1, "{effects:?}");
    found.into_iter().next()
}

fn refused(effects: &[Effect]) -> Option<(u64, &Refusal)> {
    effects.iter().find_map(|effect| match effect {
        Effect::Refuse(id, refusal) => Some((*id, refusal)),
        _ => None,
    })
}

fn failed(connect: bool, timeout: bool, answered: bool) -> Ending {
    Ending::Failed { reason: "broken".into(), connect, timeout, answered }
}

fn first(id: u64) -> Option<(u64, String)> {
    Some((id, "n0".into()))
}

#[test]
fn whatever_makes_a_slot_fit_ends_a_wait_in_the_same_turn() {
    let busy = || {
        let mut core = core_with(&["n0"]);
        assert_eq!(given(&handle(&mut core, ask(1, wants("m")), NOW)), first(1));
        assert_eq!(given(&handle(&mut core, ask(2, wants("m")), NOW)), None);
        core
    };
    // A slot is freed: by an answer's end, by a client that left, by one who was never served.
    for ending in [Ending::Complete, Ending::Withdrawn, Ending::NotTried("no descriptor".into())] {
        let effects = handle(&mut busy(), Input::Ended(1, ending), NOW);
        assert_eq!(given(&effects), first(2), "{effects:?}");
    }
    // A failure that is none of the engine's: too slow.
    let effects = handle(&mut busy(), Input::Ended(1, failed(false, true, false)), NOW);
    assert_eq!(given(&effects), first(2), "{effects:?}");
    // More slots than before; another node.
    let mut core = busy();
    assert_eq!(given(&beat(&mut core, "n0", Said { slots: 2, ..IDLE }, NOW)), first(2));
    let mut core = busy();
    join(&mut core, "n1", NOW);
    assert_eq!(given(&beat(&mut core, "n1", IDLE, NOW)), Some((2, "n1".into())));
    // The circuit is half open, one tries, and the head of its answer closes it for the others.
    let mut core = busy();
    beat(&mut core, "n0", Said { slots: 2, ..IDLE }, NOW);
    handle(&mut core, ask(3, wants("m")), NOW);
    handle(&mut core, Input::Ended(1, failed(false, false, true)), NOW);
    handle(&mut core, Input::Ended(2, Ending::Complete), NOW);
    let now = NOW.plus_ms(BACKOFF_FIRST_MS);
    assert_eq!(given(&handle(&mut core, Input::Tick, now)), first(3), "half open");
    handle(&mut core, ask(4, wants("m")), now);
    assert_eq!(given(&handle(&mut core, Input::Answering(3), now)), first(4), "closed");
    // A trial whose client left makes room for another.
    let mut core = busy();
    handle(&mut core, Input::Ended(1, failed(true, false, true)), NOW);
    assert_eq!(given(&handle(&mut core, Input::Tick, now)), first(2));
    handle(&mut core, ask(3, wants("m")), now);
    assert_eq!(given(&handle(&mut core, Input::Ended(2, Ending::Withdrawn), now)), first(3));
}

#[test]
fn whatever_a_node_changes_about_an_idle_engine_ends_a_wait_in_the_same_turn() {
    let masked = Ask { device_mask: Some("1".into()), ..wants("m") };
    for (before, wanted, after) in [
        (Said { ready: false, ..IDLE }, wants("m"), IDLE),
        (Said { draining: true, ..IDLE }, wants("m"), IDLE),
        (Said { slots: 0, ..IDLE }, wants("m"), IDLE),
        (IDLE, wants("n"), Said { models: r#""m","n""#, ..IDLE }),
        (IDLE, wants("n"), Said { models: "", ..IDLE }),
        (IDLE, masked, Said { mask: "1", ..IDLE }),
    ] {
        // Another engine that serves all of it, but not now.
        let mut core = core_with(&["n1"]);
        let other = Said { ready: false, models: r#""m","n""#, mask: "1", ..IDLE };
        beat(&mut core, "n1", other, NOW);
        join(&mut core, "n0", NOW);
        beat(&mut core, "n0", before, NOW);
        assert_eq!(given(&handle(&mut core, ask(1, wanted.clone()), NOW)), None, "{wanted:?}");
        assert_eq!(given(&beat(&mut core, "n0", after, NOW)), first(1), "{wanted:?}");
    }
    // A node that was suspect beats again.
    let mut core = core_with(&["n0"]);
    let later = NOW.plus_ms(Limits::default().node_timeout_ms);
    handle(&mut core, Input::Tick, later);
    assert_eq!(given(&handle(&mut core, ask(1, wants("m")), later)), None);
    assert_eq!(given(&beat(&mut core, "n0", IDLE, later)), first(1));
}

#[test]
fn an_engine_that_is_not_ready_by_its_own_words_is_left_alone_and_not_blamed() {
    let mut core = core_with(&["n0"]);
    let mut now = NOW;
    for pause_ms in [2_000, 2_000, NOT_READY_MS_MAX * 100] {
        let effects = handle(&mut core, ask(1, wants("m")), now);
        assert_eq!(given(&effects), first(1), "{effects:?}");
        let not_ready = Ending::NotReady { reason: "503".into(), pause_ms };
        assert_eq!(given(&handle(&mut core, Input::Ended(1, not_ready), now)), None);
        handle(&mut core, Input::Withdraw(1), now);
        let pause_ms = pause_ms.min(NOT_READY_MS_MAX);
        handle(&mut core, Input::Tick, now.plus_ms(pause_ms - 1));
        beat(&mut core, "n0", IDLE, now.plus_ms(pause_ms - 1));
        assert_eq!(core.registry().circuits().open, 1, "{pause_ms}");
        now = now.plus_ms(pause_ms);
        handle(&mut core, Input::Tick, now);
        beat(&mut core, "n0", IDLE, now);
    }
    // A failure now is the second in a row at most: half a second.
    handle(&mut core, ask(2, wants("m")), now);
    handle(&mut core, Input::Ended(2, failed(true, false, false)), now);
    handle(&mut core, Input::Tick, now.plus_ms(2 * BACKOFF_FIRST_MS));
    assert_eq!(core.registry().circuits().half_open, 1);
}

#[test]
fn a_request_that_failed_waits_for_another_engine_as_long_as_there_is_one() {
    let mut core = core_with(&["n0", "n1"]);
    handle(&mut core, ask(1, Ask { node: Some(NodeId::new("n1").expect("an id")), ..wants("m") }), NOW);
    assert_eq!(given(&handle(&mut core, ask(2, wants("m")), NOW)), first(2));
    let effects = handle(&mut core, Input::Ended(2, failed(true, false, false)), NOW);
    assert_eq!(given(&effects), None, "n1 is busy, n0 failed");
    let now = NOW.plus_ms(BACKOFF_FIRST_MS);
    let effects = handle(&mut core, Input::Tick, now);
    assert_eq!(given(&effects), None, "n0 may be tried again, but not by whom it failed");
    assert_eq!(given(&handle(&mut core, ask(3, wants("m")), now)), first(3), "by others");
    handle(&mut core, Input::Answering(3), now);
    handle(&mut core, Input::Ended(3, Ending::Complete), now);
    // The other one leaves: the recovered one is the only one.
    let effects = beat(&mut core, "n1", Said { draining: true, ..IDLE }, now);
    assert_eq!(given(&effects), first(2), "{effects:?}");
}

#[test]
fn a_request_is_tried_three_times_and_refused_with_a_time() {
    let mut core = core_with(&["n0", "n1", "n2", "n3"]);
    let mut effects = handle(&mut core, ask(1, wants("m")), NOW);
    for attempt in 0..ATTEMPTS_MAX {
        assert_eq!(given(&effects), Some((1, format!("n{attempt}"))));
        effects = handle(&mut core, Input::Ended(1, failed(false, false, false)), NOW);
    }
    match refused(&effects) {
        Some((1, refusal @ Refusal::EngineFailed { timeout: false, .. })) => {
            assert!(refusal.retry_ms().is_some_and(|ms| (1_000..=60_000).contains(&ms)), "{refusal:?}");
        }
        other => panic!("{other:?}"),
    }
    assert_eq!((core.counts().failures.broken, core.counts().retried), (3, 2));
    // Slow, and known to be: no second try.
    handle(&mut core, ask(2, wants("m")), NOW);
    let effects = handle(&mut core, Input::Ended(2, failed(false, true, false)), NOW);
    assert!(matches!(refused(&effects), Some((2, Refusal::EngineFailed { timeout: true, .. }))));
    assert_eq!(core.registry().circuits().open, 3, "n3 stays");
}

/// Ticks as its daemon does, until it refuses `id` or so long has passed.
fn refused_after(core: &mut Core, id: u64, mut now: Now, ms: u64) -> Option<u64> {
    let begun = now.mono;
    loop {
        let due = core.deadline()?;
        now = now.plus_ms(due.ms_since(now.mono).max(1));
        if now.mono.ms_since(begun) > ms {
            return None;
        }
        if refused(&handle(core, Input::Tick, now)).is_some_and(|(refused, _)| refused == id) {
            return Some(now.mono.ms_since(begun));
        }
    }
}

#[test]
fn waiters_are_held_while_there_is_hope_and_not_longer() {
    // Starting: hope, up to the whole wait.
    let mut core = core_with(&["n0"]);
    for (n, said) in [Said { ready: false, ..IDLE }, IDLE].into_iter().enumerate() {
        let id = n as u64 + 1;
        beat(&mut core, "n0", said, NOW);
        let held = if n == 0 { wants("m") } else { Ask { slots: 1, ..wants("m") } };
        handle(&mut core, ask(10 + id, held), NOW);
        if n == 1 {
            // Full: hope.
            handle(&mut core, ask(id, wants("m")), NOW);
        }
        assert_eq!(refused_after(&mut core, 10 + id, NOW, 25_000), None);
    }
    // Draining, with nobody else: a grace.
    let mut core = core_with(&["n0"]);
    handle(&mut core, ask(1, wants("m")), NOW);
    handle(&mut core, ask(2, wants("m")), NOW);
    beat(&mut core, "n0", Said { draining: true, ..IDLE }, NOW);
    let after = refused_after(&mut core, 2, NOW, 60_000).expect("refused");
    assert!((NOBODY_GRACE_MS..NOBODY_GRACE_MS + 3_000).contains(&after), "{after}");
    // Silent: suspect is hope, offline is none.
    let mut core = core_with(&["n0"]);
    handle(&mut core, ask(1, wants("m")), NOW);
    let later = NOW.plus_ms(15_000);
    handle(&mut core, ask(2, wants("m")), later);
    let after = refused_after(&mut core, 2, later, 60_000).expect("refused");
    let offline_ms = Limits::default().node_timeout_ms + Limits::default().offline_grace_ms - 15_000;
    let grace = offline_ms + NOBODY_GRACE_MS;
    assert!((grace..grace + 3_000).contains(&after), "{after}");
    // Whoever comes back within the grace is served.
    let mut core = core_with(&["n0"]);
    handle(&mut core, ask(1, wants("m")), NOW);
    handle(&mut core, ask(2, wants("m")), NOW);
    let node = NodeId::new("n0").expect("an id");
    handle(&mut core, Input::Deregister { reply: 0, node, incarnation: None }, NOW);
    assert_eq!(refused_after(&mut core, 2, NOW, NOBODY_GRACE_MS - 2_000), None);
    let now = NOW.plus_ms(NOBODY_GRACE_MS - 2_000);
    join(&mut core, "n1", now);
    assert_eq!(given(&beat(&mut core, "n1", IDLE, now)), Some((2, "n1".into())));
}

#[test]
fn silent_requests_leave_a_node_that_is_gone_and_streams_stay() {
    let mut core = core_with(&["n0", "n1"]);
    beat(&mut core, "n0", Said { slots: 3, ..IDLE }, NOW);
    let pinned = Ask { node: Some(NodeId::new("n0").expect("an id")), ..wants("m") };
    for (id, wanted) in [(1, pinned.clone()), (2, wants("m")), (3, pinned)] {
        handle(&mut core, ask(id, wanted), NOW);
    }
    // Two on n0 and one on n1, which leaves n1 idle again.
    let on_n0: Vec<u64> = vec![1, 3];
    handle(&mut core, Input::Ended(2, Ending::Complete), NOW);
    handle(&mut core, ask(4, wants("m")), NOW);
    handle(&mut core, Input::Ended(4, Ending::Complete), NOW);
    handle(&mut core, Input::Answering(on_n0[0]), NOW);
    let free = Ask { pool: Some(PoolId::new("p").expect("an id")), ..wants("m") };
    beat(&mut core, "n1", Said { ready: false, ..IDLE }, NOW);
    assert_eq!(given(&handle(&mut core, ask(5, free), NOW)), first(5));
    beat(&mut core, "n1", IDLE, NOW);
    let node = NodeId::new("n0").expect("an id");
    let effects = handle(&mut core, Input::Deregister { reply: 0, node, incarnation: None }, NOW);
    let aborted: Vec<(u64, bool)> = effects
        .iter()
        .filter_map(|effect| match effect {
            Effect::Abort { request, even_answered, .. } => Some((*request, *even_answered)),
            _ => None,
        })
        .collect();
    assert_eq!(aborted, [(5, false)], "1 streams, and 3 could go nowhere else");
    let effects = handle(&mut core, Input::Ended(5, Ending::Aborted { answered: false }), NOW);
    assert_eq!(given(&effects), Some((5, "n1".into())));
    assert_eq!(core.counts().failures.vanished, 1);
    handle(&mut core, Input::Ended(1, Ending::Complete), NOW);
    assert_eq!(core.counts().answered, 3);
}

#[test]
fn a_request_has_no_more_time_than_it_was_given() {
    let mut core = core_with(&["n0"]);
    for id in [1, 2] {
        handle(&mut core, ask(id, wants("m")), NOW);
        handle(&mut core, Input::Limit { request: id, total_ms: 5_000 }, NOW);
    }
    let at = NOW.plus_ms(5_000);
    assert_eq!(core.deadline().map(|due| due <= at.mono), Some(true));
    let effects = handle(&mut core, Input::Tick, at);
    assert!(matches!(refused(&effects), Some((2, Refusal::OutOfTime))), "{effects:?}");
    assert!(effects.iter().any(|e| matches!(e, Effect::Abort { request: 1, even_answered: true, .. })));
    // It failed while it was being ended: it is not tried once more.
    let effects = handle(&mut core, Input::Ended(1, failed(false, false, false)), at);
    assert!(matches!(refused(&effects), Some((1, Refusal::OutOfTime))), "{effects:?}");
    assert!(core.deadline().is_none_or(|due| due > at.mono), "nothing is left to do at once");
}
