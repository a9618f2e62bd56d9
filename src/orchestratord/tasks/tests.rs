//! Tasks as their readers see them.

use proptest::prelude::*;

use super::answer::tests::engine_bytes;
use super::*;
use crate::http::sse::Event;
use crate::orchestratord::aliases::Aliases;

fn new_task(id: &str) -> NewTask {
    let body = format!(r#"{{"task_id":"{id}","prompt":"p","max_tokens":9,"deadline_ms":5000}}"#);
    parse(body.as_bytes(), "c".into(), &Aliases::default()).expect("a task")
}

/// The events, each with its name and its data.
fn events(bytes: &[u8]) -> Vec<(String, Value)> {
    let mut found = Vec::new();
    let mut events = sse::Events::default();
    let each = |event: Event| {
        let name = String::from_utf8(event.name).expect("a name");
        found.push((name, serde_json::from_slice(&event.data).expect("JSON")));
    };
    events.feed(bytes, each).expect("short events");
    found
}

fn names(bytes: &[u8]) -> Vec<String> {
    events(bytes).into_iter().map(|(name, _)| name).collect()
}

/// One task that was placed at once.
fn task() -> Tasks {
    let mut tasks = Tasks::default();
    tasks.create(&new_task("t"), 1, &Standing::placed(), Now::default()).expect("a new task");
    tasks.dispatched(1, "an engine", json!({}), Now::default());
    tasks
}

const STREAM: &[u8] = b"data: {\"choices\":[{\"text\":\"a\"}]}\n\ndata: {\"choices\":[{\"text\":\"b\",\"finish_reason\":\"stop\"}]}\n\ndata: [DONE]\n\n";

#[test]
fn an_answer_becomes_tokens_and_then_one_end() {
    let mut tasks = task();
    tasks.answering(1, 200);
    for (at, byte) in STREAM.iter().enumerate() {
        tasks.received(1, &[*byte], Now::default().plus_ms(at as u64));
    }
    tasks.completed(1, Now::default().plus_ms(900));
    assert_eq!(tasks.open("t", false, Now::default()), Ok(1));
    let (bytes, over) = tasks.take_events(1);
    assert!(over && tasks.is_empty(), "a task that was read to its end is forgotten");
    let events = events(&bytes);
    assert_eq!(names(&bytes), ["started", "token", "token", "end"]);
    assert_eq!(events[0].1, json!({"queue_position": 0, "predicted_start_ms": 0}));
    assert_eq!(events[1].1, json!({"t": "a", "i": 0}));
    assert_eq!(events[2].1, json!({"t": "b", "i": 1}));
    let gap = events[3].1["decode_ms"].as_u64().expect("a duration");
    assert!(gap > 30 && gap < 80, "from the first token to the last: {gap}");
    assert_eq!(events[3].1, json!({"tokens_out": 2, "decode_ms": gap, "decode_time_ms": gap}));
}

#[test]
fn what_the_engine_counted_is_believed() {
    let mut tasks = task();
    let counted = b"data: {\"choices\":[{\"text\":\"ab\",\"finish_reason\":\"stop\"}],\"usage\":{\"completion_tokens\":5}}\n\ndata: [DONE]\n\n";
    let progress = tasks.received(1, counted, Now::default().plus_ms(70));
    let Progress::Answered(Some(measured)) = progress else { panic!("{progress:?}") };
    assert_eq!((measured.first_token_ms, measured.tokens, measured.turn.tokens_out), (70, 1, 5));
    assert_eq!(tasks.completed(1, Now::default()), None, "it is measured once");
    assert_eq!(events(&tasks.take_events(1).0)[2].1["tokens_out"], 5);
    assert_eq!(
        tasks.budget(1, Now::default().plus_ms(1_000)),
        Some(Budget { tokens: 4, time_ms: Some(4_000) })
    );
}

#[test]
fn nothing_follows_a_cancel_or_an_error() {
    let mut tasks = task();
    tasks.received(1, b"data: {\"content\":\"a\"}\n\n", Now::default());
    assert_eq!(tasks.cancel("t", Now::default()), Some(1));
    tasks.received(1, b"data: {\"content\":\"late\"}\n\n", Now::default());
    tasks.answering(1, 200);
    tasks.retried(1, "late");
    tasks.dispatched(1, "late", json!({}), Now::default());
    tasks.completed(1, Now::default());
    tasks.failed(1, "WORKER_RESET", "late", None);
    assert_eq!(tasks.cancel("t", Now::default()), None, "cancelling twice changes nothing");
    assert_eq!(tasks.open("t", true, Now::default()), Ok(1));
    let bytes = tasks.take_events(1).0;
    assert_eq!(names(&bytes), ["started", "metrics", "token", "end"]);
    assert_eq!(events(&bytes)[3].1["canceled"], true);

    let mut tasks = task();
    let broken = b"data: {\"error\":{\"message\":\"out of memory\"}}\n\ndata: {\"content\":\"late\"}\n\n";
    assert_eq!(tasks.received(1, broken, Now::default()), Progress::Unusable);
    tasks.completed(1, Now::default());
    let bytes = tasks.take_events(1).0;
    assert_eq!(names(&bytes), ["started", "error"]);
    let error = json!({"code": "INTERNAL", "message": "out of memory", "retriable": true, "retry_after_ms": RETRY_MS_DEFAULT});
    assert_eq!(events(&bytes)[1].1, error);
}

#[test]
fn a_slow_engine_and_a_broken_one_are_told_apart() {
    for (timeout, code) in [(true, "DECODE_TIMEOUT"), (false, "WORKER_RESET")] {
        let mut tasks = task();
        tasks.answering(1, 200);
        tasks.broken(1, "no byte came", timeout);
        let events = events(&tasks.take_events(1).0);
        assert_eq!((events[1].0.as_str(), events[1].1["code"].as_str()), ("error", Some(code)));
    }
}

#[test]
fn events_are_opened_once_and_unread_tasks_are_forgotten() {
    let now = Now::default();
    let mut tasks = task();
    assert_eq!(tasks.open("t", false, now), Ok(1));
    assert!(matches!(tasks.open("t", false, now), Err(Refusal::Conflict(_))));
    assert!(matches!(tasks.open("other", false, now), Err(Refusal::NotFound(_))));
    let again = tasks.create(&new_task("t"), 2, &Standing::placed(), now);
    assert!(matches!(again, Err(Refusal::Conflict(_))));
    assert_eq!(tasks.expire(Mono(u64::MAX)), Vec::<RequestId>::new(), "it is being read");

    let mut tasks = task();
    let at = tasks.deadline().expect("an expiry");
    assert_eq!((tasks.expire(at), tasks.len()), (vec![1], 0));
    let Err(Refusal::Gone(why)) = tasks.open("t", false, now) else { panic!("it is gone") };
    assert!(why.contains("nobody opened"), "{why}");
    tasks.create(&new_task("t"), 2, &Standing::placed(), now).expect("the name is free again");
    assert_eq!(tasks.open("t", false, now), Ok(2));
    tasks.abandon(2);
    let Err(Refusal::Gone(why)) = tasks.open("t", false, now) else { panic!("it is gone") };
    assert!(why.contains("reader left"), "{why}");
}

#[test]
fn names_of_forgotten_tasks_are_bounded() {
    let mut tasks = Tasks::default();
    for request in 0..=GONE_MAX as u64 + 1 {
        let id = if request % 2 == 0 { "again".to_string() } else { format!("t{request}") };
        tasks.create(&new_task(&id), request, &Standing::placed(), Now::default()).expect("a new task");
        tasks.abandon(request);
    }
    assert_eq!(tasks.gone_order.len(), GONE_MAX);
    assert!(tasks.gone.len() <= GONE_MAX);
    assert!(matches!(tasks.open("again", false, Now::default()), Err(Refusal::Gone(_))));
    assert!(matches!(tasks.open("t1", false, Now::default()), Err(Refusal::NotFound(_))));
}

#[test]
fn a_reader_who_asks_is_told_what_happens() {
    let mut tasks = Tasks::default();
    let waits = |position, ms| Standing { position: Some(position), predicted_ms: ms, not_ready: None };
    let now = Now::default();
    tasks.create(&new_task("t"), 1, &waits(2, None), now).expect("a new task");
    assert_eq!(tasks.open("t", true, now), Ok(1));
    assert!(tasks.due_narrations(now).is_empty(), "not yet");
    let later = now.plus_ms(NARRATION_MS);
    assert!(tasks.deadline().is_some_and(|at| at <= later.mono));
    assert_eq!(tasks.due_narrations(later), [1]);
    tasks.queued(1, &waits(2, Some(700)), 4);
    tasks.queued(1, &waits(1, Some(300)), 3);
    tasks.dispatched(1, "n/p/r0", json!({"node_id": "n"}), later);
    assert_eq!(tasks.due_narrations(later.plus_ms(NARRATION_MS)), Vec::<RequestId>::new());
    tasks.retried(1, "refused");
    tasks.dispatched(1, "n/p/r1", json!({"node_id": "n"}), later.plus_ms(10));
    tasks.answering(1, 200);
    tasks.received(1, STREAM, later.plus_ms(20));
    let events = events(&tasks.take_events(1).0);
    let told: Vec<String> = events
        .iter()
        .map(|(name, data)| data["phase"].as_str().map_or(name.clone(), |phase| format!("{name} {phase}")))
        .collect();
    let expected = [
        "started",
        "metrics queued",
        "metrics queued",
        "metrics dispatched",
        "metrics retried",
        "metrics dispatched",
        "metrics prefill",
        "token",
        "token",
        "metrics finished",
        "end",
    ];
    assert_eq!(told, expected);
    assert_eq!(events[0].1, json!({"queue_position": 2, "predicted_start_ms": null}));
    assert_eq!((&events[2].1["queue_position"], &events[2].1["queue_depth"]), (&json!(1), &json!(3)));
    assert_eq!((&events[5].1["attempt"], &events[5].1["waited_ms"]), (&json!(2), &json!(NARRATION_MS + 10)));
    assert!(events.iter().all(|(name, data)| name != "metrics" || data["human"].is_string()));
}

#[test]
fn many_that_wait_are_told_in_turn() {
    let mut tasks = Tasks::default();
    let waits = Standing { position: Some(9), predicted_ms: None, not_ready: None };
    let count = 2 * NARRATED_MAX as u64 + 20;
    for request in 1..=count {
        let id = format!("t{request}");
        tasks.create(&new_task(&id), request, &waits, Now::default()).expect("a new task");
        tasks.open(&id, request % 4 != 0, Now::default()).expect("not open yet");
    }
    let mut told = Vec::new();
    for round in 1..=2 {
        let due = tasks.due_narrations(Now::default().plus_ms(round * NARRATION_MS));
        assert!(due.len() <= NARRATED_MAX, "{}", due.len());
        told.extend(due);
    }
    let verbose: Vec<u64> = (1..=count).filter(|request| request % 4 != 0).collect();
    assert_eq!(told[..verbose.len()], verbose, "everybody once, then the first again");
    assert!(told[verbose.len()..].iter().eq(&verbose[..told.len() - verbose.len()]));
}

#[test]
fn narration_that_nobody_reads_is_bounded() {
    let mut tasks = task();
    for _ in 0..10 * NARRATION_MAX {
        tasks.retried(1, "x");
    }
    assert_eq!(tasks.open("t", true, Now::default()), Ok(1));
    assert_eq!(names(&tasks.take_events(1).0).len(), 1 + NARRATION_MAX);
}

/// What a reader gets of an engine that sends `pieces` and then ends, or breaks.
fn read(pieces: &[&[u8]], status: u16, verbose: bool, breaks: bool, cancel_after: Option<usize>) -> Vec<u8> {
    let now = Now::default();
    let mut tasks = task();
    tasks.open("t", verbose, now).expect("not open yet");
    tasks.answering(1, status);
    for (at, piece) in pieces.iter().enumerate() {
        if cancel_after == Some(at) {
            tasks.cancel("t", now);
        }
        tasks.received(1, piece, now);
    }
    if breaks && !tasks.is_answered(1) {
        tasks.broken(1, "reset", false);
    } else {
        tasks.completed(1, now);
    }
    let (bytes, over) = tasks.take_events(1);
    assert!(over, "every task ends");
    bytes
}

proptest! {
    /// Whatever an engine sends in whatever pieces: `started` first, tokens numbered from 0, exactly one
    /// `end` or `error` and nothing behind it, and the same however the bytes were cut.
    #[test]
    fn the_events_are_well_formed(
        bytes in engine_bytes(), size in 1usize..9, verbose: bool, breaks: bool,
        status in proptest::sample::select(vec![200u16, 200, 200, 400, 503]),
        cancel in proptest::option::of(0usize..30),
    ) {
        let pieces: Vec<&[u8]> = bytes.chunks(size).collect();
        let seen = read(&pieces, status, verbose, breaks, None);
        prop_assert_eq!(&seen, &read(&[&bytes], status, verbose, breaks, None));
        for seen in [seen, read(&pieces, status, verbose, breaks, cancel)] {
            let events = events(&seen);
            let names: Vec<&str> = events.iter().map(|(name, _)| name.as_str()).collect();
            prop_assert_eq!(names[0], "started");
            let (last, before) = names.split_last().expect("events");
            prop_assert!(matches!(*last, "end" | "error"), "{:?}", names);
            let allowed = |name: &&str| *name == "token" || (verbose && *name == "metrics");
            prop_assert!(before[1..].iter().all(allowed), "{:?}", names);
            let numbers = events.iter().filter(|(name, _)| name == "token").map(|(_, data)| data["i"].as_u64());
            prop_assert!(numbers.eq((0..).map(Some).take(names.iter().filter(|name| **name == "token").count())));
            let data = &events.last().expect("events").1;
            let fields: &[&str] = match *last {
                "end" => &["tokens_out", "decode_ms", "decode_time_ms"],
                _ => &["code", "message", "retriable"],
            };
            prop_assert!(fields.iter().all(|field| !data[*field].is_null()), "{}", data);
        }
    }
}
