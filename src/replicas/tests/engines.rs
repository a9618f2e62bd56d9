//! What engines are asked, and what their answers and their silence mean.

use super::*;

/// A question's path and its answer.
type Told = (&'static str, &'static str);

#[test]
fn engines_are_asked_once_what_they_serve_and_what_they_tell_counts() {
    let props = ("/props", r#"{"total_slots":6,"default_generation_settings":{"n_ctx":4096}}"#);
    let list = ("/v1/models", r#"{"data":[{"id":"x","max_model_len":1024},{"id":"y"},{"id":"x"}]}"#);
    let info = ("/info", r#"{"model_id":"z","max_total_tokens":2048,"max_concurrent_requests":128}"#);
    type Case<'a> = (&'a str, &'a [Told], &'a [&'a str], u32, Option<u64>);
    let cases: [Case; 8] = [
        ("", &[props, list], &["x", "y"], 6, Some(1024)),
        (r#","model":"m""#, &[props], &["m"], 6, Some(4096)),
        (r#","model":"m","slots":4"#, &[props], &["m"], 4, Some(4096)),
        (r#","model":"m","slots":9"#, &[props], &["m"], 6, Some(4096)),
        (r#","engine":"vllm","model":"m","slots":9"#, &[list], &["m"], 9, Some(1024)),
        (r#","engine":"SGLang""#, &[list], &["x", "y"], 1, Some(1024)),
        (r#","engine":"tgi","slots":200"#, &[info], &["z"], 128, Some(2048)),
        (r#","engine":"other","model":"m""#, &[], &["m"], 1, None),
    ];
    for (more, questions, models, slots, context_length) in cases {
        let mut machine = Machine::new();
        machine.write(
            "a.json",
            &format!(r#"{{"url":"http://127.0.0.1:8081/base","auth":{{"file":"/k"}}{more}}}"#),
        );
        machine.list();
        machine.due();
        assert_eq!(machine.orders[0].kind, ProbeKind::Health, "{more}");
        machine.answer_each(|_| ProbeOutcome::Healthy);
        for (path, answer) in questions {
            assert_eq!(machine.state("default", "r0").as_deref(), Some("probing"), "not before: {more}");
            assert_eq!(machine.due(), 1);
            assert_eq!(
                (machine.orders[0].path.as_str(), machine.orders[0].auth_file.as_deref()),
                (*path, Some("/k"))
            );
            machine.answer_each(|order| ProbeOutcome::Facts(Facts::read(order.kind, answer.as_bytes())));
        }
        assert_eq!(machine.state("default", "r0").as_deref(), Some("ready"), "{more}");
        let beats = machine.registry.pool_beats();
        let replica = &beats[0].replicas.as_ref().expect("replicas")[0];
        assert_eq!(
            (
                replica.models.iter().map(String::as_str).collect::<Vec<_>>(),
                replica.slots_total,
                replica.context_length
            ),
            (models.to_vec(), slots, context_length),
            "{more}"
        );
        let noted = machine.told().iter().filter(|line| line.contains("the engine 6: 6 are used")).count();
        assert_eq!(noted, usize::from(more.contains(r#""m","slots":9"#) && !more.contains("vllm")), "{more}");
        machine.until_deadline();
        machine.due();
        assert_eq!(machine.orders[0].kind, ProbeKind::Health, "asked once a start: {more}");
    }
}

#[test]
fn an_engine_that_does_not_tell_is_used_all_the_same() {
    for outcome in [
        ProbeOutcome::Unhealthy { status: 404 },
        ProbeOutcome::Loading(501),
        ProbeOutcome::Unauthorized { status: 401, why: "it wants a key".into() },
        ProbeOutcome::Slow,
        ProbeOutcome::Broken("cut off".into()),
    ] {
        let mut machine = Machine::new();
        machine.write("a.json", r#"{"url":"http://127.0.0.1:8081","slots":3}"#);
        machine.list();
        machine.due();
        for _ in 0..3 {
            machine.answer_each(|order| match order.kind {
                ProbeKind::Health => ProbeOutcome::Healthy,
                _ => outcome.clone(),
            });
            machine.due();
        }
        assert_eq!(machine.state("default", "r0").as_deref(), Some("ready"), "{outcome:?}");
        let beats = machine.registry.pool_beats();
        assert_eq!((beats[0].slots_total, beats[0].models_available.len()), (Some(3), 0));
        let told = machine.told().iter().filter(|line| line.contains("it wants a key")).count();
        assert_eq!(told, if matches!(outcome, ProbeOutcome::Unauthorized { .. }) { 2 } else { 0 });
    }
    // One that is gone by then is not healthy.
    let mut machine = Machine::new();
    machine.write("a.json", r#"{"url":"http://127.0.0.1:8081"}"#);
    machine.list();
    machine.due();
    machine.answer_each(|_| ProbeOutcome::Healthy);
    machine.due();
    machine.answer_each(|_| ProbeOutcome::Refused("refused".into()));
    assert_eq!(machine.state("default", "r0").as_deref(), Some("probing"));
}

#[test]
fn an_engine_that_wanted_a_key_is_asked_again_while_it_is_idle() {
    let mut machine = Machine::new();
    machine.write("a.json", r#"{"url":"http://127.0.0.1:8081","model":"m"}"#);
    machine.list();
    let questions = std::cell::Cell::new(0);
    let round = |machine: &mut Machine, props: ProbeOutcome| {
        machine.until_deadline();
        machine.due();
        for _ in 0..2 {
            machine.answer_each(|order| match order.kind {
                ProbeKind::Health => ProbeOutcome::Healthy,
                _ => {
                    questions.set(questions.get() + 1);
                    props.clone()
                }
            });
            machine.due();
        }
        questions.get()
    };
    let refused = ProbeOutcome::Unauthorized { status: 401, why: "it wants a key".into() };
    assert_eq!(round(&mut machine, refused.clone()), 1);
    assert_eq!(round(&mut machine, refused.clone()), 2, "asked again");
    let lease = machine.registry.acquire(&key("default", "r0"), None, 1).expect("it is ready");
    assert_eq!(round(&mut machine, refused), 2, "not while it works");
    machine.registry.release(lease, machine.now, &mut Vec::new());
    let told = ProbeOutcome::Facts(Facts::read(ProbeKind::Props, br#"{"total_slots":7}"#));
    assert_eq!(round(&mut machine, told.clone()), 3);
    assert_eq!(machine.registry.pool_beats()[0].slots_total, Some(7));
    assert_eq!(round(&mut machine, told), 3, "it has answered");
    let complaints = machine.told().iter().filter(|line| line.contains("it wants a key")).count();
    assert_eq!(complaints, 1, "told once");
}

#[test]
fn a_list_of_models_stands_in_for_a_health_path_of_unknown_engines_only() {
    for (engine, stands_in) in [("mlx", true), ("vllm", false)] {
        let mut machine = Machine::new();
        machine.write("a.json", &format!(r#"{{"url":"http://127.0.0.1:8081","engine":"{engine}"}}"#));
        machine.list();
        machine.due();
        machine.answer_each(|_| ProbeOutcome::Unhealthy { status: 404 });
        if stands_in {
            machine.due();
            assert_eq!(machine.orders[0].kind, ProbeKind::Models);
            machine.answer_each(|order| {
                ProbeOutcome::Facts(Facts::read(order.kind, br#"{"data":[{"id":"x"}]}"#))
            });
            assert_eq!(machine.state("default", "r0").as_deref(), Some("ready"));
            assert_eq!(machine.registry.pool_beats()[0].models_available, ["x"]);
            machine.until_deadline();
            machine.due();
            assert_eq!(machine.orders[0].kind, ProbeKind::Models, "and goes on doing so");
        } else {
            assert_eq!(machine.due(), 0);
            assert_eq!(machine.state("default", "r0").as_deref(), Some("probing"));
        }
    }
}

#[test]
fn starting_for_too_long_is_broken_until_it_answers() {
    let minutes = |machine: &mut Machine, outcome: ProbeOutcome| {
        let begun = machine.now.mono;
        while machine.state("p", "r0").as_deref() == Some("probing") {
            machine.answer_all(outcome.clone());
            machine.until_deadline();
            assert!(machine.now.mono.ms_since(begun) < 10_000_000, "for ever");
        }
        machine.now.mono.ms_since(begun) / 60_000
    };
    let refused = || ProbeOutcome::Refused("refused".into());
    let cases = [("", refused(), 10), ("", ProbeOutcome::Loading(503), 30), (r#","pid":7"#, refused(), 30)];
    let large = (r#","model_bytes":90000000000"#, refused(), 40);
    for (more, outcome, expected) in cases.into_iter().chain([large]) {
        let mut machine = Machine::new();
        machine.write("a.json", &json("p", "r0", 8081, more));
        machine.list();
        assert_eq!(minutes(&mut machine, outcome.clone()), expected, "{more} {outcome:?}");
        assert_eq!(machine.state("p", "r0").as_deref(), Some("broken"));
        assert!(
            machine.reason("p", "r0").contains("has not come up within"),
            "{}",
            machine.reason("p", "r0")
        );
        let mut pauses_ms = Vec::new();
        for _ in 0..6 {
            machine.answer_all(outcome.clone());
            pauses_ms.push(machine.until_deadline());
        }
        assert_eq!(pauses_ms[5], 30_000, "asked more and more rarely: {pauses_ms:?}");
        machine.answer_all(ProbeOutcome::Healthy);
        assert_eq!(machine.state("p", "r0").as_deref(), Some("ready"), "{more}");
    }
}

/// A registry with a replica on which one request runs, whose last byte came at the start.
fn busy() -> (Machine, ReplicaLease, Activity) {
    let mut machine = Machine::with_ready_engine();
    let lease = machine.registry.acquire(&key("p", "r0"), None, 1).expect("a slot");
    let mut activity = Activity::default();
    activity.add(machine.now.mono, Some(machine.now.mono));
    (machine, lease, activity)
}

/// Passes so many milliseconds, answering probes as `answer` does, with `activity` told before each.
fn live(machine: &mut Machine, ms: u64, activity: &Activity, answer: impl Fn(&ProbeOrder) -> ProbeOutcome) {
    let (until, generation) = (machine.now.mono.plus_ms(ms), machine.generation("p", "r0"));
    while machine.registry.deadline().is_some_and(|at| at <= until) {
        machine.until_deadline();
        machine.due();
        for order in std::mem::take(&mut machine.orders) {
            let outcome = answer(&order);
            if outcome == ProbeOutcome::Slow {
                machine.pass_ms(order.timeout_ms);
            }
            let Machine { registry, now, changes, .. } = &mut *machine;
            registry.active(&order.id.key, generation, *activity, *now, changes);
            registry.probed(&order.id, outcome, *now, changes);
            registry.check_invariants();
        }
    }
}

#[test]
fn an_engine_that_stands_still_is_tried_once_before_it_is_held_out() {
    let hangs = |order: &ProbeOrder| match order.kind {
        ProbeKind::Canary => ProbeOutcome::Slow,
        _ => ProbeOutcome::Healthy,
    };
    let (mut machine, lease, activity) = busy();
    live(&mut machine, 59_000, &activity, hangs);
    assert!(machine.told().is_empty(), "not yet");
    live(&mut machine, 62_000, &activity, hangs);
    let told = machine.told();
    assert!(told[0].contains("stood still for") && told[0].contains("trial request"), "{told:?}");
    assert!(told[1].contains("ready -> broken: hangs"), "{told:?}");
    assert_eq!(told.len(), 2, "{told:?}");
    assert!(machine.registry.acquire(&key("p", "r0"), None, 1).is_err());
    live(&mut machine, 600_000, &activity, hangs);
    assert!(machine.told().is_empty(), "told once");
    machine.registry.release(lease, machine.now, &mut machine.changes);
    live(&mut machine, 120_000, &Activity::default(), |_| ProbeOutcome::Healthy);
    assert_eq!(machine.state("p", "r0").as_deref(), Some("ready"));
    machine.until_deadline();
    machine.due();
    assert_eq!(machine.orders[0].kind, ProbeKind::Health);
}

#[test]
fn what_answers_the_trial_or_is_in_prefill_is_not_hung() {
    for answer in [ProbeOutcome::Healthy, ProbeOutcome::Unhealthy { status: 400 }, ProbeOutcome::Loading(500)]
    {
        let (mut machine, lease, activity) = busy();
        live(&mut machine, 300_000, &activity, |order| match order.kind {
            ProbeKind::Canary => {
                assert!(order.body.as_deref().is_some_and(|body| body.contains(r#""max_tokens":1"#)));
                answer.clone()
            }
            _ => ProbeOutcome::Healthy,
        });
        assert_eq!(machine.state("p", "r0").as_deref(), Some("ready"));
        let trials = machine.told().iter().filter(|line| line.contains("trial request: ")).count();
        assert!(trials <= 1 + 300 / 60, "one trial a limit: {trials}");
        machine.registry.release(lease, machine.now, &mut machine.changes);
    }
    let (mut machine, lease, _) = busy();
    let mut prefill = Activity::default();
    prefill.add(machine.now.mono, None);
    live(&mut machine, 600_000, &prefill, |order| {
        assert_eq!(order.kind, ProbeKind::Health, "long prompts are read for minutes");
        ProbeOutcome::Healthy
    });
    machine.registry.release(lease, machine.now, &mut machine.changes);
}

#[test]
fn a_503_while_bytes_come_is_not_believed() {
    let (mut machine, lease, _) = busy();
    for _ in 0..20 {
        let mut activity = Activity::default();
        activity.add(machine.now.mono, Some(machine.now.mono.plus_ms(5_000)));
        live(&mut machine, 10_000, &activity, |_| ProbeOutcome::Loading(503));
        assert_eq!(machine.state("p", "r0").as_deref(), Some("ready"));
    }
    live(&mut machine, 51_000, &Activity::default(), |_| ProbeOutcome::Loading(503));
    assert_eq!(machine.state("p", "r0").as_deref(), Some("suspect"));
    machine.registry.release(lease, machine.now, &mut machine.changes);
}
