//! ServedSessions in the core: remembered at dispatch, forgotten with their replica.

use super::super::admission::Priority;
use super::super::affinity::Affinity;
use super::tests::{NOW, handle, options};
use super::*;
use serde_json::json;

fn join(core: &mut Core, node: &str, context_length: u64) {
    let body = json!({"node_id": node, "address": format!("http://{node}:9200")});
    let body = serde_json::from_value(body).expect("a registration");
    handle(core, Input::Register { reply: 90, peer: "peer".into(), body: Box::new(body) }, NOW);
    let replica = json!({"replica_id": "r0", "url": "http://127.0.0.1:1", "ready": true, "slots_free": 2,
        "slots_total": 2, "models": ["m"], "context_length": context_length});
    let body = json!({"pools": [{"pool_id": "p", "replicas": [replica]}]});
    let body = serde_json::from_value(body).expect("a heartbeat");
    let node = NodeId::new(node).expect("an id");
    handle(core, Input::Heartbeat { reply: 91, peer: "peer".into(), node, body: Box::new(body) }, NOW);
}

fn core() -> Core {
    let mut core = Core::new(Options { strategy: Strategy::RoundRobin, ..options(false) }, NOW);
    for node in 0..10 {
        join(&mut core, &format!("n{node}"), 4096);
    }
    core
}

/// Asks, and says which node was chosen, or the code of the refusal.
fn ask(core: &mut Core, request: RequestId, ask: Ask, now: Now) -> String {
    let asked = Asked {
        ask,
        priority: Priority::Interactive,
        client: "c".into(),
        wait_ms_max: 60_000,
        is_deadline: false,
    };
    let effects = handle(core, Input::Ask { request, asked: Box::new(asked) }, now);
    let told = effects.iter().find_map(|effect| match effect {
        Effect::Dispatch(_, dispatch) => Some(dispatch.node.to_string()),
        Effect::Refuse(_, refusal) => Some(refusal.label().to_string()),
        Effect::Waiting { .. } => Some("waits".into()),
        _ => None,
    });
    told.expect("an answer")
}

fn of_session(key: &str) -> Ask {
    Ask { model: Some("m".into()), slots: 1, affinity: Affinity::session(key), ..Ask::default() }
}

#[test]
fn a_session_is_remembered_until_its_replica_goes_or_it_is_idle() {
    let mut core = core();
    let node = ask(&mut core, 1, of_session("s"), NOW);
    handle(&mut core, Input::Ended(1, Ending::Complete), NOW);
    assert_eq!(ask(&mut core, 2, of_session("s"), NOW), node);
    handle(&mut core, Input::Ended(2, Ending::Complete), NOW);
    let session = core.session("s", NOW.mono).expect("two requests");
    assert_eq!((session.requests, session.requests_there, session.last_used), (2, 2, NOW.mono));
    assert!(core.session("other", NOW.mono).is_none());
    let late = NOW.plus_ms(super::super::served_sessions::IDLE_MS);
    assert!(core.session("s", late.mono).is_none(), "idle for too long");
    let id = NodeId::new(&node).expect("an id");
    handle(&mut core, Input::Deregister { reply: 92, node: id, incarnation: None }, NOW);
    assert!(core.session("s", NOW.mono).is_none(), "its replica is gone");
    assert_ne!(ask(&mut core, 3, of_session("s"), NOW), node);
    handle(&mut core, Input::Ended(3, Ending::Complete), NOW);
    core.forget_session("s");
    assert!(core.session("s", NOW.mono).is_none(), "as asked for");
}

#[test]
fn a_request_for_a_longer_context_than_there_is_is_refused_at_once() {
    let mut core = core();
    let long = Ask { context_tokens: Some(5_000), ..of_session("s") };
    assert_eq!(ask(&mut core, 1, long.clone(), NOW), "context_too_long");
    join(&mut core, "n9x", 8192);
    assert_eq!(ask(&mut core, 2, long, NOW), "n9x");
}

#[test]
fn a_wish_for_a_long_context_is_granted_where_there_is_room_and_never_refuses() {
    let mut core = core();
    join(&mut core, "n9x", 8192);
    let wish = |context_tokens| Ask {
        context_tokens: Some(context_tokens),
        context_is_wish: true,
        affinity: None,
        ..of_session("s")
    };
    let total = 11 * 2;
    let mut longest = Vec::new();
    for id in 1..=total {
        let node = ask(&mut core, id, wish(5_000), NOW);
        longest.push(node == "n9x");
    }
    let there = longest.iter().filter(|there| **there).count();
    assert!(there > 0 && longest[..there].iter().all(|there| *there), "it is filled first: {longest:?}");
    assert!(there < longest.len(), "and then the others: {longest:?}");
    assert_eq!(ask(&mut core, total + 1, wish(5_000), NOW), "waits");
    handle(&mut core, Input::Ended(total, Ending::Complete), NOW);
    assert_eq!(
        ask(&mut core, total + 2, wish(1_000_000), NOW),
        "waits",
        "behind who came first, not refused"
    );
}
