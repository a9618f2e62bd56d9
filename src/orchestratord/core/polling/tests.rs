//! Polls and notices as the daemon drives them.

use serde_json::json;

use super::*;
use crate::orchestratord::core::tests::{NOW, ask, handle, options};
use crate::orchestratord::core::{Ask, Input, Options};
use crate::orchestratord::poller::PollOrder;
use crate::wire::id::{NodeId, PoolId};

fn core(agents: &[&str]) -> Core {
    let polled = agents.iter().map(|url| BaseUrl::new(url).expect("a URL")).collect();
    Core::new(Options { polled, ..options(false) }, NOW)
}

fn polls(effects: Vec<Effect>) -> Vec<PollOrder> {
    let order = |effect| if let Effect::Poll(order) = effect { Some(order) } else { None };
    effects.into_iter().filter_map(order).collect()
}

fn report(node: &str, pool: &str) -> Outcome {
    let body = format!(
        r#"{{"node_id":"{node}","incarnation":1,"pools":[{{"pool_id":"{pool}","ready":true,"url":"http://10.0.0.1:1",
            "replica_id":"r0","slots_total":1,"slots_free":1}}]}}"#
    );
    Ok(Box::new(serde_json::from_str(&body).expect("a report")))
}

type Outcome = Result<Box<AgentReport>, PollError>;

fn notice(pool: &str, node: Option<&str>) -> Input {
    let pool_id = PoolId::new(pool).expect("an id");
    let node_id = node.map(|node| NodeId::new(node).expect("an id"));
    Input::PoolReady { reply: 9, notice: PoolReady { pool_id, node_id, url: None } }
}

fn is_noted(effects: &[Effect]) -> bool {
    matches!(effects, [Effect::Noted(9)])
}

fn is_not_found(effects: &[Effect], part: &str) -> bool {
    matches!(effects, [Effect::Refuse(9, Refusal::NotFound(what))] if what.contains(part))
}

#[test]
fn a_waiting_request_is_served_by_the_answer_to_a_poll() {
    let mut core = core(&["http://10.0.0.1:9200"]);
    let effects = handle(&mut core, ask(1, Ask::default()), NOW);
    assert!(matches!(effects[..], [Effect::Waiting { .. }]), "{effects:?}");
    assert_eq!(core.deadline(), Some(NOW.mono), "the first poll is due at once");
    let order = polls(handle(&mut core, Input::Tick, NOW)).remove(0);
    assert!(core.deadline().is_some_and(|at| at > NOW.mono), "nothing else is due");
    let effects = handle(&mut core, Input::Polled(order.id, report("n", "p")), NOW.plus_ms(1));
    assert!(matches!(effects[..], [Effect::Dispatch(1, _)]), "{effects:?}");
    assert!(handle(&mut core, Input::Polled(order.id, report("n", "q")), NOW.plus_ms(2)).is_empty());
    assert!(core.registry().node(&NodeId::new("n").expect("an id")).is_some_and(|n| n.pools.len() == 1));
}

#[test]
fn an_agent_that_does_not_answer_is_told_once_and_disturbs_no_other() {
    let mut core = core(&["http://10.0.0.1:9200", "http://10.0.0.2:9200"]);
    let mut now = NOW;
    for _ in 0..40 {
        for order in polls(handle(&mut core, Input::Tick, now)) {
            let outcome = match order.to.host() {
                "10.0.0.1" => report("n", "p"),
                _ => Err(PollError::Unreachable("connection refused".into())),
            };
            handle(&mut core, Input::Polled(order.id, outcome), now);
        }
        now = now.plus_ms(1_000);
    }
    let told = core.events().to_json(0);
    let events = told["events"].as_array().expect("events").iter().filter(|event| event["kind"] == "agent");
    let states: Vec<_> = events.map(|event| json!([event["subject"], event["state"]])).collect();
    assert_eq!(
        states[..],
        [json!(["http://10.0.0.1:9200", "answers"]), json!(["http://10.0.0.2:9200", "unreachable"])]
    );
    let counts = &core.counts().polls;
    assert!(counts["taken"] >= 7 && (5..20).contains(&counts["unreachable"]), "{counts:?}");
}

#[test]
fn notices_are_hints_for_whoever_is_known() {
    let mut core = core(&["http://10.0.0.1:9200"]);
    let order = polls(handle(&mut core, Input::Tick, NOW)).remove(0);
    handle(&mut core, Input::Polled(order.id, report("n", "p")), NOW);
    let effects = handle(&mut core, notice("p", Some("stranger")), NOW);
    assert!(is_not_found(&effects, "node stranger is not known"), "{effects:?}");
    assert!(polls(handle(&mut core, Input::Tick, NOW)).is_empty(), "it polled nobody");
    let mut now = NOW;
    // A pool that is new is as good as a known one, and so is a notice without a node.
    for about in [notice("p", Some("n")), notice("new", Some("n")), notice("p", None), notice("new", None)] {
        now = now.plus_ms(1_000);
        assert!(is_noted(&handle(&mut core, about, now)));
        let order = polls(handle(&mut core, Input::Tick, now)).remove(0);
        let told = core.registry().replicas().count();
        handle(&mut core, Input::Polled(order.id, report("n", "p")), now);
        assert_eq!(core.registry().replicas().count(), told, "said twice, known once");
    }
}

#[test]
fn without_polled_agents_notices_are_harmless() {
    let mut core = core(&[]);
    assert!(is_not_found(&handle(&mut core, notice("p", None), NOW), "pool p is not known"));
    assert!(is_not_found(&handle(&mut core, notice("p", Some("n")), NOW), "node n is not known"));
    let body = serde_json::from_str(r#"{"node_id":"n","address":"http://10.0.0.1:9200","pools":["p"]}"#);
    let body = Box::new(body.expect("a registration"));
    handle(&mut core, Input::Register { reply: 1, peer: "p".into(), body }, NOW);
    for about in [notice("p", None), notice("p", Some("n")), notice("new", Some("n"))] {
        assert!(is_noted(&handle(&mut core, about, NOW)), "its heartbeats tell the rest");
    }
    assert!(polls(handle(&mut core, Input::Tick, NOW)).is_empty());
}

#[test]
fn a_drain_that_an_agent_accepted_counts_before_the_agent_tells_of_it() {
    let mut core = core(&["http://10.0.0.1:9200"]);
    let order = polls(handle(&mut core, Input::Tick, NOW)).remove(0);
    handle(&mut core, Input::Polled(order.id, report("n", "p")), NOW);
    let (node, now) = (NodeId::new("n").expect("an id"), NOW.plus_ms(1));
    let ordered = |pool: &str, draining| {
        let pool = PoolId::new(pool).expect("an id");
        Input::PoolOrdered { node: node.clone(), pool, draining }
    };
    handle(&mut core, ordered("q", true), now);
    let draining = |core: &Core| core.registry().replicas().all(|(_, replica)| replica.draining);
    assert!(!draining(&core), "that was another pool");
    handle(&mut core, ordered("p", true), now);
    assert!(draining(&core));
    let effects = handle(&mut core, ask(1, Ask::default()), now);
    assert!(matches!(effects[..], [Effect::Waiting { .. }]), "{effects:?}");
    // Its agent is asked at once, and what it says counts.
    let order = polls(handle(&mut core, Input::Tick, now)).pop().expect("a poll");
    let later = now.plus_ms(1);
    let effects = handle(&mut core, Input::Polled(order.id, report("n", "p")), later);
    assert!(matches!(effects[..], [Effect::Dispatch(1, _)]), "{effects:?}");
    assert!(!draining(&core));
    // Work again is something that only the agent can say.
    handle(&mut core, ordered("p", true), later);
    handle(&mut core, ordered("p", false), later);
    assert!(draining(&core));
    core.check_invariants();
}
