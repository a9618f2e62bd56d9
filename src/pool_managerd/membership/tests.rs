//! One control plane's membership in virtual time.

use super::*;

fn start() -> Now {
    Now { mono: Mono(5_000_000_000), wall: Wall(1_700_000_000_000_000_000) }
}

fn plane() -> Plane {
    Plane::new(BaseUrl::new("http://control:8080").expect("a URL"), 10_000, start())
}

fn agreed() -> Answer {
    Answer::Ok { next_heartbeat_ms: Some(10_000), ttl_ms: Some(30_000), registry_epoch: Some(7) }
}

fn refused() -> Answer {
    Answer::Failed("connection refused".into())
}

/// Makes the call that is due at the plane's own deadline, gives it `answer` at once, and returns
/// when that was.
fn step(plane: &mut Plane, now: &mut Now, answer: Answer, notes: &mut Vec<Note>) -> Call {
    let at = plane.deadline().expect("something is due");
    *now = now.plus_ms(at.ns_since(now.mono).div_ceil(1_000_000));
    let order = plane.poll(*now).expect("a call is due at the deadline");
    assert!(order.timeout_ms <= 30_000 && order.timeout_ms > 0);
    assert_eq!(plane.poll(*now), None, "one call at a time");
    plane.answered(order.call, answer, *now, &mut |n| n / 2, notes);
    order.call
}

/// A plane that is registered, and has told everything.
fn member() -> (Plane, Now, Vec<Note>) {
    let (mut plane, mut now, mut notes) = (plane(), start(), Vec::new());
    assert_eq!(step(&mut plane, &mut now, agreed(), &mut notes), Call::Register);
    assert_eq!(step(&mut plane, &mut now, agreed(), &mut notes), Call::Heartbeat { seq: 1 });
    assert_eq!(now, start(), "both at once");
    assert_eq!(notes.len(), 1);
    notes.clear();
    (plane, now, notes)
}

#[test]
fn registers_at_once_and_then_beats_at_the_interval_with_jitter() {
    for (random, pause_ms) in [(0, 8_000), (u64::MAX, 12_000)] {
        let (mut plane, mut now, mut notes) = member();
        step(&mut plane, &mut now, agreed(), &mut notes);
        let sent_at = now.mono;
        let at = plane.deadline().expect("the next heartbeat");
        now.mono = at;
        let order = plane.poll(now).expect("a heartbeat");
        assert_eq!(order.timeout_ms, 5_000, "half the interval");
        plane.answered(order.call, agreed(), now, &mut |n| random.min(n - 1), &mut notes);
        assert_eq!(plane.deadline().expect("the next").ms_since(at), pause_ms);
        assert!(at > sent_at && notes.is_empty());
    }
}

#[test]
fn the_control_planes_interval_wins_within_bounds() {
    for (wanted, ttl, used) in [
        (Some(3_000), None, 3_000),
        (Some(1), None, INTERVAL_MS_MIN),
        (Some(u64::MAX), None, INTERVAL_MS_MAX),
        (None, Some(15_000), 5_000),
        (None, None, 10_000),
    ] {
        let (mut plane, mut now) = (plane(), start());
        let answer = Answer::Ok { next_heartbeat_ms: wanted, ttl_ms: ttl, registry_epoch: None };
        step(&mut plane, &mut now, answer, &mut Vec::new());
        let PlaneState::Registered { interval_ms, .. } = plane.state() else { panic!("registered") };
        assert_eq!(*interval_ms, used);
    }
}

#[test]
fn a_change_is_told_at_once_and_changes_during_a_call_coalesce() {
    let (mut plane, now, mut notes) = member();
    let now = now.plus_ms(1_000);
    plane.on_change(1, 1, now);
    let order = plane.poll(now).expect("the change is told at once");
    plane.on_change(2, 1, now.plus_ms(10));
    plane.on_change(3, 1, now.plus_ms(20));
    assert_eq!(plane.poll(now.plus_ms(20)), None);
    plane.answered(order.call, agreed(), now.plus_ms(100), &mut |n| n / 2, &mut notes);
    let order = plane.poll(now.plus_ms(100)).expect("what changed meanwhile is told next");
    plane.answered(order.call, agreed(), now.plus_ms(110), &mut |n| n / 2, &mut notes);
    assert!(plane.deadline().expect("the next").ms_since(now.mono) > 5_000, "nothing is left to tell");
    plane.on_change(3, 1, now.plus_ms(120));
    assert!(plane.poll(now.plus_ms(120)).is_none(), "no news");
}

#[test]
fn failures_lengthen_the_pauses_up_to_a_limit_and_are_noted_once() {
    let (mut plane, mut now, mut notes) = (plane(), start(), Vec::new());
    let mut pauses = Vec::new();
    for _ in 0..9 {
        assert_eq!(step(&mut plane, &mut now, refused(), &mut notes), Call::Register);
        pauses.push(plane.deadline().expect("tries again").ms_since(now.mono));
        plane.on_change(now.mono.0, 1, now);
    }
    assert_eq!(pauses, [375, 750, 1_500, 3_000, 6_000, 12_000, 22_500, 22_500, 22_500]);
    assert_eq!(notes.len(), 1, "{notes:?}");
    assert!(notes[0].is_warning && notes[0].text.contains("connection refused"), "{notes:?}");
    step(&mut plane, &mut now, agreed(), &mut notes);
    step(&mut plane, &mut now, agreed(), &mut notes);
    assert_eq!(notes.len(), 3, "registered, and heartbeats are taken: {notes:?}");
}

#[test]
fn lost_heartbeats_are_repeated_for_ever_and_noted_at_the_third() {
    let (mut plane, mut now, mut notes) = member();
    for n in 1..20 {
        assert!(matches!(step(&mut plane, &mut now, refused(), &mut notes), Call::Heartbeat { .. }));
        assert_eq!(notes.len(), usize::from(n >= FAILURES_NOTED), "after {n} failures");
        let next = plane.deadline();
        plane.on_change(u64::from(n), 1, now);
        assert_eq!(plane.deadline(), next, "changes wait while the control plane is away");
        assert!(plane.deadline().expect("tries again").ms_since(now.mono) <= 10_000);
    }
    step(&mut plane, &mut now, agreed(), &mut notes);
    assert_eq!(notes.len(), 2);
    assert!(matches!(plane.state(), PlaneState::Registered { failures: 0, .. }));
}

#[test]
fn a_control_plane_that_forgot_the_node_gets_a_registration_at_once() {
    let (mut plane, mut now, mut notes) = member();
    step(&mut plane, &mut now, Answer::UnknownNode, &mut notes);
    assert_eq!(*plane.state(), PlaneState::Unregistered);
    assert!(plane.deadline().expect("soon").ms_since(now.mono) <= REREGISTER_SPREAD_MS);
    assert_eq!(step(&mut plane, &mut now, agreed(), &mut notes), Call::Register);
}

#[test]
fn one_that_forgets_after_every_registration_is_not_hammered() {
    let (mut plane, mut now, mut notes) = member();
    let before = now;
    for _ in 0..20 {
        step(&mut plane, &mut now, Answer::UnknownNode, &mut notes);
        step(&mut plane, &mut now, agreed(), &mut notes);
    }
    assert!(now.mono.ms_since(before.mono) > 60_000, "only {} ms", now.mono.ms_since(before.mono));
}

#[test]
fn a_heartbeat_that_was_overtaken_by_its_copy_costs_no_lease() {
    let (mut plane, mut now, mut notes) = member();
    let before = now;
    step(&mut plane, &mut now, Answer::Conflict("a later heartbeat has arrived".into()), &mut notes);
    assert_eq!(step(&mut plane, &mut now, agreed(), &mut notes), Call::Register);
    assert!(matches!(step(&mut plane, &mut now, agreed(), &mut notes), Call::Heartbeat { .. }));
    assert!(now.mono.ms_since(before.mono) < 15_000, "{now:?}");
    assert!(notes.iter().all(|note| !note.is_warning), "nothing to look at: {notes:?}");
}

#[test]
fn a_conflict_makes_the_node_step_back_and_say_so_once() {
    let (mut plane, mut now, mut notes) = member();
    step(&mut plane, &mut now, Answer::Conflict("another boot".into()), &mut notes);
    let mut pauses = Vec::new();
    for _ in 0..6 {
        step(&mut plane, &mut now, Answer::Conflict("another boot".into()), &mut notes);
        assert_eq!(*plane.state(), PlaneState::SteppedBack);
        assert!(plane.reason().contains("another boot"));
        pauses.push(plane.deadline().expect("later").ms_since(now.mono));
    }
    assert_eq!(notes.len(), 1, "{notes:?}");
    assert!(pauses[0] >= CONFLICT_PAUSE_MS_MIN && pauses.is_sorted(), "{pauses:?}");
    assert_eq!(step(&mut plane, &mut now, agreed(), &mut notes), Call::Register);
    plane.shutdown(now);
    assert_eq!(*plane.state(), PlaneState::Leaving);
}

#[test]
fn a_member_registers_again_when_its_machine_changes_and_stays_a_member() {
    let (mut plane, mut now, mut notes) = member();
    now = now.plus_ms(1_000);
    plane.introduce_again(now);
    assert_eq!(plane.poll(now).map(|order| order.call), Some(Call::Register), "at once");
    assert!(matches!(plane.state(), PlaneState::Registered { .. }));
    plane.introduce_again(now);
    plane.answered(Call::Register, agreed(), now, &mut |_| 0, &mut notes);
    assert_eq!(step(&mut plane, &mut now, agreed(), &mut notes), Call::Register, "it changed meanwhile");
    assert_eq!(step(&mut plane, &mut now, agreed(), &mut notes), Call::Heartbeat { seq: 2 });
    assert_eq!(now.mono.ms_since(start().mono), 1_000);
    assert_eq!(step(&mut plane, &mut now, agreed(), &mut notes), Call::Heartbeat { seq: 3 });
    assert!(notes.iter().all(|note| !note.is_warning), "{notes:?}");
}

/// A control plane that takes no second registration must still get its heartbeats.
#[test]
fn a_registration_that_is_refused_again_and_again_costs_no_heartbeats() {
    let (mut plane, mut now, mut notes) = member();
    plane.introduce_again(now);
    for seq in 2..20 {
        let before = now;
        assert_eq!(step(&mut plane, &mut now, refused(), &mut notes), Call::Register);
        assert_eq!(step(&mut plane, &mut now, agreed(), &mut notes), Call::Heartbeat { seq });
        assert!(now.mono.ms_since(before.mono) <= 13_000, "{now:?}");
        assert!(matches!(plane.state(), PlaneState::Registered { .. }));
    }
}

#[test]
fn other_refusals_are_told_apart() {
    for (answer, says) in [
        (Answer::Unauthorized, "token"),
        (Answer::CloudDisabled, "ORCHESTRATORD_CLOUD_PROFILE"),
        (Answer::ForeignName, "set ORCHESTRATORD_ALLOW_HOSTS=control there"),
    ] {
        let (mut plane, mut now, mut notes) = (plane(), start(), Vec::new());
        step(&mut plane, &mut now, answer.clone(), &mut notes);
        step(&mut plane, &mut now, answer, &mut notes);
        assert_eq!(notes.len(), 1);
        assert!(notes[0].text.contains(says) && notes[0].text.contains("http://control:8080"), "{notes:?}");
    }
}

#[test]
fn shutdown_deregisters_once_and_only_what_was_registered() {
    let (mut plane, mut now, mut notes) = member();
    plane.shutdown(now);
    plane.shutdown(now);
    assert_eq!(step(&mut plane, &mut now, refused(), &mut notes), Call::Deregister);
    assert_eq!((plane.state(), plane.deadline()), (&PlaneState::Left, None));
    assert_eq!(plane.poll(now.plus_ms(100_000)), None);

    let mut never = super::tests::plane();
    never.shutdown(start());
    assert_eq!((never.poll(start()), never.state()), (None, &PlaneState::Left));

    // A registration under way at shutdown may succeed: then it is withdrawn.
    let mut plane = super::tests::plane();
    let order = plane.poll(start()).expect("registers");
    plane.shutdown(start());
    plane.answered(order.call, agreed(), start(), &mut |_| 0, &mut notes);
    assert_eq!(plane.poll(start()).map(|order| order.call), Some(Call::Deregister));
}

#[test]
fn shutdown_ends_although_a_call_hangs() {
    let (mut plane, now, mut notes) = member();
    plane.on_change(1, 1, now.plus_ms(100));
    let order = plane.poll(now.plus_ms(100)).expect("a heartbeat");
    plane.shutdown(now.plus_ms(200));
    let by = plane.deadline().expect("gives up");
    assert_eq!(by.ms_since(now.mono), 200 + 2 * DEREGISTER_TIMEOUT_MS);
    assert_eq!(plane.poll(Now { mono: by, ..now }), None);
    assert_eq!(*plane.state(), PlaneState::Left);
    plane.answered(order.call, agreed(), now.plus_ms(9_000), &mut |_| 0, &mut notes);
    assert_eq!(*plane.state(), PlaneState::Left, "a late answer revives nothing");

    let mut plane = super::tests::plane();
    let order = plane.poll(start()).expect("registers");
    plane.shutdown(start());
    assert_eq!(plane.poll(start().plus_ms(60_000)), None);
    plane.answered(order.call, agreed(), start().plus_ms(60_000), &mut |_| 0, &mut notes);
    assert_eq!(*plane.state(), PlaneState::Left, "nor does a late registration");
}

proptest::proptest! {
    /// Whatever is answered and whenever: one call at a time, sequence numbers grow, something is
    /// always due; and once the control plane agrees, the node is a member that has told its
    /// newest revision within the longest pause.
    #[test]
    fn always_converges_to_membership(ops in proptest::collection::vec((0u8..10, 0u64..40_000, proptest::num::u64::ANY), 0..120)) {
        let (mut plane, mut now, mut notes) = (plane(), start(), Vec::new());
        let mut under_way: Option<Call> = None;
        let mut last_seq = 0;
        let mut revision = 0;
        for (op, ms, random) in ops {
            now = now.plus_ms(ms);
            if let Some(order) = plane.poll(now) {
                proptest::prop_assert_eq!(under_way, None);
                if let Call::Heartbeat { seq } = order.call {
                    proptest::prop_assert!(seq > last_seq);
                    last_seq = seq;
                }
                under_way = Some(order.call);
            }
            let answer = match op {
                0 => agreed(),
                1 => Answer::UnknownNode,
                2 => Answer::Conflict("x".into()),
                3 => Answer::CloudDisabled,
                4 => Answer::Unauthorized,
                5 | 6 => refused(),
                8 => {
                    plane.introduce_again(now);
                    continue;
                }
                _ => {
                    revision += u64::from(op == 7);
                    plane.on_change(revision, 1, now);
                    proptest::prop_assert!(under_way.is_some() || plane.deadline().is_some());
                    continue;
                }
            };
            if let Some(call) = under_way.take() {
                plane.answered(call, answer, now, &mut |n| random % n, &mut notes);
            }
            proptest::prop_assert!(plane.deadline().is_some());
        }
        if let Some(call) = under_way.take() {
            plane.answered(call, agreed(), now, &mut |n| n - 1, &mut notes);
        }
        let healed_at = now;
        for _ in 0..3 {
            step(&mut plane, &mut now, agreed(), &mut notes);
        }
        proptest::prop_assert!(matches!(plane.state(), PlaneState::Registered { failures: 0, .. }), "{:?}", plane);
        proptest::prop_assert_eq!(plane.told, Some(revision));
        proptest::prop_assert_eq!(plane.introduction, Introduction::Told);
        let limit_ms = CONFLICT_PAUSE_MS_MAX * 6 / 5 + 2 * INTERVAL_MS_MAX;
        proptest::prop_assert!(now.mono.ms_since(healed_at.mono) <= limit_ms);
    }
}
