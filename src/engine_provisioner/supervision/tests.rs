//! The core against stories, and against a model of the shell that does whatever may happen.

use super::restarts::{BREAKER_FAILURES, BREAKER_OPEN_MS, STABLE_MS, STORM_STARTS_MAX, STORM_WINDOW_MS};
use super::*;
use crate::wire::id::{PoolId, ReplicaId};
use proptest::prelude::*;
use std::collections::BTreeSet;

fn key(replica: &str) -> ReplicaKey {
    ReplicaKey { pool: PoolId::new("p").expect("an id"), replica: ReplicaId::new(replica).expect("an id") }
}

const TERMS: Terms = Terms {
    spec: 1,
    start_ms: 60_000,
    health_every_ms: 5_000,
    health_failures_max: 3,
    drain_ms: 10_000,
    stop_ms: 4_000,
    restart: true,
};

/// The core and its time.
struct Story {
    core: Supervision,
    now: Mono,
}

impl Story {
    fn new() -> Story {
        Story { core: Supervision::new(fastrand::Rng::with_seed(7)), now: Mono(0) }
    }

    fn tell(&mut self, input: Input) -> Vec<Effect> {
        let mut out = Vec::new();
        self.core.handle(input, self.now, &mut out);
        self.core.check_invariants();
        out
    }

    /// Goes to the next deadline.
    fn wait(&mut self) -> Vec<Effect> {
        self.now = self.now.max(self.core.deadline().expect("something is due"));
        self.tell(Input::Time)
    }

    /// An engine that serves, as instance 1.
    fn serving() -> Story {
        let mut story = Story::new();
        assert_eq!(
            story.tell(Input::Want(key("r0"), TERMS, Replace::Overlap)),
            [Effect::Start(1, key("r0"), 1)]
        );
        story.serve(1);
        story
    }

    fn serve(&mut self, id: InstanceId) {
        assert_eq!(self.tell(Input::Spawned(id)), [Effect::Probe(id)]);
        assert_eq!(self.tell(Input::Probed(id, Seen::Ready)), [Effect::Publish(id)]);
        let told = self.tell(Input::Published(id));
        assert!(told.contains(&Effect::Tell(key("r0"), Told::Serving(id))), "{told:?}");
    }

    fn exits(&mut self, instance: InstanceId) -> Vec<Effect> {
        self.tell(Input::Exited { instance, how: "exit status 3".into(), port_taken: false })
    }
}

#[test]
fn an_end_withdraws_first_and_the_start_waits_for_the_pause() {
    let mut story = Story::serving();
    let out = story.exits(1);
    assert_eq!(out[0], Effect::Withdraw(1));
    assert!(matches!(&out[1], Effect::Tell(_, Told::Failed { retry_ms: 500..=1000, .. })), "{out:?}");
    assert_eq!(out[2..], [Effect::Reap(1)]);
    assert_eq!(story.wait(), [Effect::Start(2, key("r0"), 1)]);
    assert!((500..=1000).contains(&story.now.ms_since(Mono(0))));
}

#[test]
fn a_broken_engine_is_withdrawn_at_once_and_its_successor_waits_for_its_end() {
    let mut story = Story::serving();
    for n in 0..3 {
        let out = story.tell(Input::Probed(1, Seen::Hard("refused".into())));
        assert_eq!(out.is_empty(), n < 2, "{n}: {out:?}");
        if n == 2 {
            assert!(matches!(
                out[..],
                [Effect::Withdraw(1), Effect::Tell(_, Told::Failed { .. }), Effect::Terminate(1)]
            ));
        }
    }
    // It ignores what it is asked.
    assert_eq!(story.wait(), [Effect::Tell(key("r0"), Told::Stubborn), Effect::Terminate(1)]);
    assert_eq!(story.wait(), [Effect::Kill(1)]);
    assert_eq!(story.exits(1), [Effect::Reap(1), Effect::Start(2, key("r0"), 1)]);
}

#[test]
fn slow_answers_are_borne_longer_than_refused_connections() {
    let mut story = Story::serving();
    for _ in 0..5 {
        assert_eq!(story.tell(Input::Probed(1, Seen::Soft("HTTP 503".into()))), []);
    }
    assert_eq!(story.tell(Input::Probed(1, Seen::Ready)), []);
    for _ in 0..5 {
        assert_eq!(story.tell(Input::Probed(1, Seen::Soft("slow".into()))), []);
    }
    assert_eq!(story.tell(Input::Probed(1, Seen::Soft("slow".into())))[0], Effect::Withdraw(1));
}

#[test]
fn a_replacement_leaves_no_gap_and_its_failure_changes_nothing() {
    let mut story = Story::serving();
    let new = Terms { spec: 2, ..TERMS };
    let out = story.tell(Input::Want(key("r0"), new, Replace::Overlap));
    assert_eq!(out[1..], [Effect::Start(2, key("r0"), 2)]);
    let out = story.exits(2);
    assert!(matches!(&out[0], Effect::Tell(_, Told::KeptOld(why)) if why.contains("exit status 3")));
    assert_eq!(out[1..], [Effect::Reap(2)]);
    assert_eq!(story.core.state_of(1), "serving");

    story.tell(Input::Want(key("r0"), new, Replace::Overlap));
    assert_eq!(story.tell(Input::Spawned(3)), [Effect::Probe(3)]);
    assert_eq!(story.tell(Input::Probed(3, Seen::Ready)), [Effect::Publish(3)]);
    let out = story.tell(Input::Published(3));
    assert!(!out.contains(&Effect::Withdraw(1)), "the file is the new one's: {out:?}");
    assert_eq!(out.last(), Some(&Effect::AskInUse(1)), "{out:?}");
    assert_eq!(story.tell(Input::InUse(1, true)), []);
    assert_eq!(story.tell(Input::InUse(1, false)), [Effect::Terminate(1)]);
    assert_eq!(story.exits(1), [Effect::Reap(1)]);
    assert_eq!(story.core.state_of(3), "serving");
}

#[test]
fn without_room_for_two_a_failed_change_brings_the_old_one_back() {
    let mut story = Story::serving();
    let out = story.tell(Input::Want(key("r0"), Terms { spec: 2, ..TERMS }, Replace::StopFirst));
    assert_eq!(out[1..], [Effect::Withdraw(1), Effect::AskInUse(1)]);
    story.tell(Input::InUse(1, false));
    assert_eq!(story.exits(1), [Effect::Reap(1), Effect::Start(2, key("r0"), 2)]);
    story.tell(Input::Spawned(2));
    let out = story.exits(2);
    assert!(matches!(&out[0], Effect::Tell(_, Told::KeptOld(_))));
    assert_eq!(out[1..], [Effect::Reap(2), Effect::Start(3, key("r0"), 1)], "at once, on the old terms");
}

#[test]
fn a_stop_withdraws_drains_and_ends_in_this_order() {
    let mut story = Story::serving();
    assert_eq!(story.tell(Input::Stop), [Effect::Withdraw(1), Effect::AskInUse(1)]);
    assert!(!story.core.is_over());
    story.tell(Input::InUse(1, true));
    story.now = story.now.plus_ms(10_000);
    assert_eq!(
        story.tell(Input::Time),
        [Effect::Tell(key("r0"), Told::DrainCut), Effect::Terminate(1)],
        "the limit"
    );
    assert_eq!(story.tell(Input::StopNow), [Effect::Kill(1)], "the second signal");
    assert_eq!(story.exits(1), [Effect::Reap(1)]);
    assert!(story.core.is_over());
}

#[test]
fn a_lost_port_is_no_failure_a_few_times() {
    let mut story = Story::new();
    story.tell(Input::Want(key("r0"), TERMS, Replace::Overlap));
    for n in 1..=PORT_RACES_MAX {
        let instance = u64::from(n);
        story.tell(Input::Spawned(instance));
        let out = story.tell(Input::Exited { instance, how: "exit status 1".into(), port_taken: true });
        assert_eq!(
            out,
            [
                Effect::Tell(key("r0"), Told::PortLost),
                Effect::Reap(instance),
                Effect::Start(instance + 1, key("r0"), 1)
            ]
        );
    }
    let instance = u64::from(PORT_RACES_MAX + 1);
    let out = story.tell(Input::Exited { instance, how: "exit status 1".into(), port_taken: true });
    assert!(matches!(&out[0], Effect::Tell(_, Told::Failed { reason, .. }) if reason.contains("port")));
}

#[test]
fn who_wants_no_restart_hears_why_and_all_ends() {
    let mut story = Story::new();
    story.tell(Input::Want(key("r0"), Terms { restart: false, ..TERMS }, Replace::Overlap));
    story.tell(Input::Spawned(1));
    let reason = "the engine ended before it was healthy: exit status 3".to_string();
    assert_eq!(story.exits(1), [Effect::GiveUp(1, reason), Effect::Reap(1)]);
    assert!(story.core.is_over());
}

#[test]
fn what_fails_together_is_started_again_in_the_storms_measure() {
    let mut story = Story::new();
    let engines = STORM_STARTS_MAX + 5;
    for n in 0..engines {
        story.tell(Input::Want(key(&format!("r{n}")), TERMS, Replace::Overlap));
    }
    for instance in 1..=engines as u64 {
        story.exits(instance);
    }
    let (mut started, mut told) = (0, 0);
    let half = Mono(0).plus_ms(STORM_WINDOW_MS / 2);
    while story.core.deadline().is_some_and(|at| at < half) {
        for effect in story.wait() {
            started += usize::from(matches!(effect, Effect::Start(..)));
            told += usize::from(matches!(effect, Effect::Tell(_, Told::Storm(_))));
        }
    }
    assert_eq!(started, STORM_STARTS_MAX);
    assert!(told >= 1, "and somebody is told why");
    story.now = Mono(0).plus_ms(STORM_WINDOW_MS + 2_000);
    let rest = story.tell(Input::Time);
    assert_eq!(rest.iter().filter(|effect| matches!(effect, Effect::Start(..))).count(), 5);
}

impl Story {
    /// Instance `id` ends, and the next one is started when its pause is over; returns what was told of it, and
    /// the pause in milliseconds.
    fn fails_and_comes_back(&mut self, id: InstanceId) -> (Told, u64) {
        let (before, out) = (self.now, self.exits(id));
        let told = out.into_iter().find_map(|effect| match effect {
            Effect::Tell(_, told @ Told::Failed { .. }) => Some(told),
            _ => None,
        });
        while !self.wait().contains(&Effect::Start(id + 1, key("r0"), 1)) {}
        (told.expect("a failure is told"), self.now.ms_since(before))
    }

    /// An engine whose breaker is open, as the instance that is returned.
    fn with_open_breaker() -> (Story, InstanceId) {
        let mut story = Story::new();
        story.tell(Input::Want(key("r0"), TERMS, Replace::Overlap));
        for id in 1..=u64::from(BREAKER_FAILURES) {
            story.fails_and_comes_back(id);
        }
        (story, u64::from(BREAKER_FAILURES) + 1)
    }
}

#[test]
fn the_breaker_opens_with_its_reason_and_lets_one_attempt_through_at_a_time() {
    let mut story = Story::new();
    story.tell(Input::Want(key("r0"), TERMS, Replace::Overlap));
    for id in 1..=u64::from(BREAKER_FAILURES) + 3 {
        let (told, pause) = story.fails_and_comes_back(id);
        let opens = id >= u64::from(BREAKER_FAILURES);
        let Told::Failed { reason, retry_ms, failures, is_open } = &told else { unreachable!("it failed") };
        assert!(reason.contains("exit status 3"), "{reason}");
        assert_eq!((u64::from(*failures), *is_open, *retry_ms), (id, opens, pause), "{told:?}");
        assert_eq!(pause >= BREAKER_OPEN_MS / 2, opens, "{told:?}");
        // What is shown says why, when, and that it is the breaker that holds it.
        let shown = told.to_string();
        assert!(shown.contains("exit status 3") && shown.contains("is started again in"), "{shown}");
        assert_eq!(shown.contains("breaker is open"), opens, "{shown}");
    }
}

#[test]
fn five_minutes_of_service_close_the_breaker_and_less_do_not() {
    for (served_ms, is_closed) in [(STABLE_MS - 1, false), (STABLE_MS, true), (10 * STABLE_MS, true)] {
        let (mut story, id) = Story::with_open_breaker();
        story.serve(id);
        story.now = story.now.plus_ms(served_ms);
        let (told, pause) = story.fails_and_comes_back(id);
        let Told::Failed { failures, is_open, .. } = told else { unreachable!("it failed") };
        assert_eq!(
            (failures == 1, !is_open, pause <= 1_000),
            (is_closed, is_closed, is_closed),
            "{served_ms}"
        );
    }
}

#[test]
fn an_operator_who_wants_it_anew_waits_for_no_breaker() {
    let (mut story, id) = Story::with_open_breaker();
    story.exits(id);
    let out = story.tell(Input::Want(key("r0"), Terms { spec: 2, ..TERMS }, Replace::Overlap));
    assert!(out.contains(&Effect::Start(id + 1, key("r0"), 2)), "{out:?}");
    let out = story.exits(id + 1);
    let is_clean =
        |effect: &Effect| matches!(effect, Effect::Tell(_, Told::Failed { failures: 1, is_open: false, .. }));
    assert!(out.iter().any(is_clean), "{out:?}");
}

/// What the world may do to the core.
#[derive(Clone, Debug)]
enum Act {
    Want(u8, u8, bool),
    Unwant(u8),
    Stop,
    StopNow,
    Probe(u8, u8),
    Exit(u8, bool),
    Idle(u8, bool),
    Wait(u32),
    FailPublish,
    FailSpawn,
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        4 => (0u8..3, 0u8..3, any::<bool>()).prop_map(|(e, s, o)| Act::Want(e, s, o)),
        1 => (0u8..3).prop_map(Act::Unwant),
        1 => Just(Act::Stop),
        1 => Just(Act::StopNow),
        12 => (any::<u8>(), 0u8..4).prop_map(|(i, s)| Act::Probe(i, s)),
        5 => (any::<u8>(), any::<bool>()).prop_map(|(i, p)| Act::Exit(i, p)),
        4 => (any::<u8>(), any::<bool>()).prop_map(|(i, u)| Act::Idle(i, u)),
        6 => (0u32..400_000).prop_map(Act::Wait),
        1 => Just(Act::FailPublish),
        1 => Just(Act::FailSpawn),
    ]
}

/// The shell as the core may count on it: processes, files, and what was asked.
#[derive(Default)]
struct World {
    alive: BTreeMap<InstanceId, ReplicaKey>,
    asked_to_end: BTreeSet<InstanceId>,
    files: BTreeMap<ReplicaKey, InstanceId>,
    fail_publish: bool,
    fail_spawn: bool,
    hurry: bool,
}

impl World {
    fn carry_out(&mut self, core: &mut Supervision, mut effects: Vec<Effect>, now: Mono) {
        while !effects.is_empty() {
            let mut further = Vec::new();
            for effect in effects {
                let mut tell = |core: &mut Supervision, input| core.handle(input, now, &mut further);
                match effect {
                    Effect::Start(id, key, _) => {
                        if std::mem::take(&mut self.fail_spawn) {
                            tell(core, Input::NotSpawned(id, "no such program".into()));
                        } else {
                            assert!(self.alive.insert(id, key).is_none(), "started twice");
                            tell(core, Input::Spawned(id));
                        }
                    }
                    Effect::Publish(id) => {
                        let key = self.alive.get(&id).expect("only what lives is published").clone();
                        if std::mem::take(&mut self.fail_publish) {
                            tell(core, Input::NotPublished(id, "disk full".into()));
                        } else {
                            self.files.insert(key, id);
                            tell(core, Input::Published(id));
                        }
                    }
                    Effect::Withdraw(id) => self.files.retain(|_, owner| *owner != id),
                    Effect::Terminate(id) => {
                        assert!(self.alive.contains_key(&id), "a signal to nobody");
                        assert!(!self.files.values().any(|owner| *owner == id), "withdrawn first");
                        self.asked_to_end.insert(id);
                    }
                    Effect::Kill(id) => {
                        assert!(self.alive.contains_key(&id), "a signal to nobody");
                        assert!(!self.files.values().any(|owner| *owner == id), "withdrawn first");
                        assert!(self.hurry || self.asked_to_end.contains(&id), "asked first");
                    }
                    Effect::Reap(id) => assert!(!self.alive.contains_key(&id), "it ended"),
                    Effect::Probe(id) | Effect::AskInUse(id) => {
                        assert!(self.alive.contains_key(&id), "a question to nobody");
                    }
                    Effect::TakeOver(..) | Effect::Tell(..) => {}
                    Effect::GiveUp(..) => panic!("restart was wanted"),
                }
            }
            effects = further;
        }
        core.check_invariants();
        for (key, owner) in &self.files {
            assert_eq!(self.alive.get(owner), Some(key), "a handoff of a dead engine");
        }
    }

    fn nth(&self, index: u8) -> Option<InstanceId> {
        let count = self.alive.len();
        self.alive.keys().nth(usize::from(index) % count.max(1)).copied()
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// Whatever happens: no handoff without a living engine, signals in their order and only to what lives,
    /// and an end when one is asked for.
    #[test]
    fn the_handoffs_tell_the_truth_and_a_stop_ends_all(acts in prop::collection::vec(act(), 1..120), seed: u64) {
        let mut core = Supervision::new(fastrand::Rng::with_seed(seed));
        let (mut world, mut now) = (World::default(), Mono(0));
        let step = |core: &mut Supervision, world: &mut World, input: Input, now: Mono| {
            let mut out = Vec::new();
            core.handle(input, now, &mut out);
            world.carry_out(core, out, now);
        };
        for act in acts {
            let input = match act {
                Act::Want(e, s, overlap) => {
                    let replace = if overlap { Replace::Overlap } else { Replace::StopFirst };
                    let drain_ms = u64::from(s % 2) * 10_000;
                    Input::Want(key(&format!("r{e}")), Terms { spec: s.into(), drain_ms, ..TERMS }, replace)
                }
                Act::Unwant(e) => Input::Unwant(key(&format!("r{e}"))),
                Act::Stop => Input::Stop,
                Act::StopNow => {
                    world.hurry = true;
                    Input::StopNow
                }
                Act::Probe(i, seen) => {
                    let Some(id) = world.nth(i) else { continue };
                    Input::Probed(id, match seen {
                        0 => Seen::Hard("refused".into()),
                        1 => Seen::Soft("slow".into()),
                        _ => Seen::Ready,
                    })
                }
                Act::Exit(i, port_taken) => {
                    let Some(id) = world.nth(i) else { continue };
                    world.alive.remove(&id);
                    Input::Exited { instance: id, how: "exit status 1".into(), port_taken }
                }
                Act::Idle(i, in_use) => {
                    let Some(id) = world.nth(i) else { continue };
                    Input::InUse(id, in_use)
                }
                Act::Wait(ms) => {
                    now = now.plus_ms(ms.into());
                    Input::Time
                }
                Act::FailPublish => { world.fail_publish = true; continue }
                Act::FailSpawn => { world.fail_spawn = true; continue }
            };
            step(&mut core, &mut world, input, now);
        }
        step(&mut core, &mut world, Input::Stop, now);
        for _ in 0..200 {
            if core.is_over() {
                break;
            }
            now = now.max(core.deadline().expect("an end is on its way"));
            step(&mut core, &mut world, Input::Time, now);
        }
        prop_assert!(core.is_over());
        prop_assert!(world.files.is_empty());
    }

    /// However often an engine fails, once it served for long its next start comes soon.
    #[test]
    fn a_stable_engine_has_a_clean_record(failures in 0u32..20) {
        let mut story = Story::new();
        story.tell(Input::Want(key("r0"), TERMS, Replace::Overlap));
        let mut id = 1;
        for _ in 0..failures {
            story.exits(id);
            id += 1;
            while !story.wait().contains(&Effect::Start(id, key("r0"), 1)) {}
        }
        story.serve(id);
        story.now = story.now.plus_ms(STABLE_MS);
        let out = story.exits(id);
        let soon = out.iter().any(|e| matches!(e, Effect::Tell(_, Told::Failed { retry_ms: ..=1000, failures: 1, .. })));
        prop_assert!(soon, "{out:?}");
    }
}
