//! The queue alone.

use super::*;
use proptest::prelude::*;

/// A model, and something else that only some engines have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Want(Option<&'static str>, u64);

impl Wanted for Want {
    fn model(&self) -> Option<&str> {
        self.0
    }
}

const M: Want = Want(Some("m"), 0);

fn waiter(id: u64, ask: Want, priority: Priority, client: &str) -> Waiter<Want> {
    let since = Mono(id);
    let deadline = since.plus_ms(TIMEOUT_MS_DEFAULT);
    Waiter { id, ask, priority, client: client.into(), since, deadline }
}

fn next(queue: &mut Admission<Want>, models: &[&str], mut fits: impl FnMut(&Want) -> bool) -> Option<u64> {
    let models: Vec<String> = models.iter().map(ToString::to_string).collect();
    let taken = queue.next_fitting(Serves::Models(&models), &mut fits);
    queue.check_invariants();
    taken.map(|waiter| waiter.id)
}

fn drain(queue: &mut Admission<Want>) -> Vec<u64> {
    std::iter::from_fn(|| queue.next_fitting(Serves::Anything, |_| true)).map(|w| w.id).collect()
}

fn push(queue: &mut Admission<Want>, id: u64, ask: Want, priority: Priority, client: &str) -> usize {
    queue.push(waiter(id, ask, priority, client)).expect("room")
}

#[test]
fn batch_waits_behind_eight_interactive_ones_but_not_for_ever() {
    let mut queue = Admission::new(100);
    push(&mut queue, 100, M, Priority::Batch, "b");
    push(&mut queue, 101, M, Priority::Batch, "b");
    for id in 0..20 {
        push(&mut queue, id, M, Priority::Interactive, "i");
    }
    let order = drain(&mut queue);
    let batch: Vec<usize> =
        order.iter().enumerate().filter(|(_, id)| **id >= 100).map(|(at, _)| at).collect();
    assert_eq!(batch, [8, 17], "{order:?}");
}

/// Batch work for one model is not held up because batch work for another is served.
#[test]
fn batch_is_let_through_for_each_model() {
    let mut queue = Admission::new(1000);
    push(&mut queue, 0, M, Priority::Batch, "b");
    let mut taken = Vec::new();
    for id in 1..=20 {
        push(&mut queue, id, M, Priority::Interactive, "i");
        push(&mut queue, 100 + id, Want(Some("n"), 0), Priority::Batch, "b");
        assert_eq!(next(&mut queue, &["n"], |_| true), Some(100 + id));
        taken.extend(next(&mut queue, &["m"], |_| true));
    }
    assert_eq!(taken.iter().position(|id| *id == 0), Some(8), "{taken:?}");
}

#[test]
fn a_flood_of_one_client_delays_another_by_one() {
    let mut queue = Admission::new(1000);
    for id in 0..900 {
        push(&mut queue, id, M, Priority::Interactive, "flood");
    }
    assert_eq!(push(&mut queue, 900, M, Priority::Interactive, "quiet"), 1);
    assert_eq!(drain(&mut queue)[..3], [0, 900, 1]);
}

/// An engine that serves whatever it is asked for: nine hundred different asks are one client's still.
#[test]
fn who_asks_for_many_things_gains_no_turns() {
    let mut queue = Admission::new(1000);
    for id in 0..900 {
        push(&mut queue, id, Want(Some("m"), id), Priority::Interactive, "flood");
    }
    for id in 900..904 {
        push(&mut queue, id, M, Priority::Interactive, "quiet");
    }
    let order = drain(&mut queue);
    let of_quiet: Vec<usize> =
        order.iter().enumerate().filter(|(_, id)| **id >= 900).map(|(at, _)| at).collect();
    assert!(of_quiet.iter().enumerate().all(|(n, at)| *at <= 2 * n + 2), "{of_quiet:?}");
}

/// Its client is served all the time elsewhere, and another one floods the only engine that it can use.
#[test]
fn who_is_served_elsewhere_is_served_here_too() {
    let mut queue = Admission::new(1000);
    let pinned = Want(Some("m"), 7);
    for id in 0..50 {
        push(&mut queue, id, M, Priority::Interactive, "flood");
    }
    push(&mut queue, 900, pinned, Priority::Interactive, "c");
    let mut passed = 0;
    loop {
        let id = 100 + passed;
        push(&mut queue, 2 * id, M, Priority::Interactive, "flood");
        push(&mut queue, 2 * id + 1, Want(Some("n"), 0), Priority::Interactive, "c");
        assert_eq!(next(&mut queue, &["n"], |_| true), Some(2 * id + 1), "elsewhere");
        if next(&mut queue, &["m"], |_| true) == Some(900) {
            break;
        }
        passed += 1;
        assert!(passed <= u64::from(PASSES_MAX) + 1, "it starves");
    }
}

#[test]
fn who_does_not_fit_holds_up_nobody_and_is_not_even_asked() {
    let mut queue = Admission::new(2000);
    for id in 0..1000 {
        push(&mut queue, id, M, Priority::Interactive, "c");
    }
    push(&mut queue, 1000, Want(Some("n"), 0), Priority::Interactive, "c");
    push(&mut queue, 1001, Want(None, 0), Priority::Batch, "c");
    let mut asked = 0;
    let mut count = |_: &Want| {
        asked += 1;
        true
    };
    assert_eq!(next(&mut queue, &["n", "n"], &mut count), Some(1000));
    assert_eq!(next(&mut queue, &["n"], &mut count), Some(1001));
    assert_eq!(next(&mut queue, &["n"], &mut count), None);
    assert_eq!(asked, 3);
    assert_eq!(next(&mut queue, &["m"], |_| false), None);
    assert_eq!((queue.len_for(Some("m")), queue.len_for(Some("n")), queue.len_for(None)), (1000, 0, 0));
}

#[test]
fn who_comes_back_to_the_queue_has_not_lost_its_place() {
    let mut queue = Admission::new(10);
    for id in 1..4 {
        push(&mut queue, id, M, Priority::Interactive, "c");
    }
    let first = queue.next_fitting(Serves::Anything, |_| true).expect("one");
    assert_eq!(queue.push(first), Ok(0));
    assert_eq!(drain(&mut queue), [1, 2, 3]);
}

#[test]
fn a_full_queue_refuses_and_a_late_waiter_leaves() {
    let mut queue = Admission::new(1);
    queue.push(waiter(1, M, Priority::Batch, "c")).expect("room");
    assert_eq!(queue.push(waiter(1, M, Priority::Batch, "c")), Err(Refused::Known));
    assert_eq!(queue.push(waiter(2, M, Priority::Interactive, "c")), Err(Refused::Full { capacity: 1 }));
    assert_eq!((queue.who_wants(&M), queue.wanted().count()), (vec![1], 1));
    let due = queue.deadline().expect("one waits");
    assert!(queue.expire(Mono(due.0 - 1)).is_empty());
    let ids: Vec<u64> = queue.expire(due).into_iter().map(|w| w.id).collect();
    assert_eq!((ids, queue.deadline(), queue.is_empty()), (vec![1], None, true));
}

proptest! {
    /// Whatever comes and goes: nobody is lost or served twice, one client's requests for one thing keep
    /// their order, positions tell the order of service, nobody outlives the deadline, and who fits is not
    /// passed over more often than the rules allow.
    #[test]
    fn nobody_is_lost(ops in proptest::collection::vec((0u8..6, 0u64..40, 0usize..4, any::<bool>(), 0usize..5), 1..200)) {
        let wants = [M, Want(Some("m"), 1), Want(Some("n"), 0), Want(None, 0), Want(None, 1)];
        let mut queue = Admission::new(20);
        let (mut now, mut next_id) = (Mono(0), 0u64);
        let mut inside: BTreeMap<u64, u32> = BTreeMap::new();
        for (op, number, client, batch, want) in ops {
            match op {
                0 | 1 => {
                    let priority = if batch { Priority::Batch } else { Priority::Interactive };
                    let mut one = waiter(next_id, wants[want], priority, ["a", "b", "c", "d"][client]);
                    one.deadline = now.plus_ms(100 + number * 10);
                    let pushed = queue.push(one);
                    prop_assert_eq!(pushed.is_ok(), inside.len() < 20);
                    if let Ok(position) = pushed {
                        prop_assert_eq!(queue.position(next_id), Some(position));
                        inside.insert(next_id, 0);
                    }
                    next_id += 1;
                }
                2 => prop_assert_eq!(queue.remove(number).is_some(), inside.remove(&number).is_some()),
                3 => {
                    now = now.plus_ms(number);
                    for waiter in queue.expire(now) {
                        prop_assert!(waiter.deadline <= now && inside.remove(&waiter.id).is_some());
                    }
                    prop_assert!(queue.deadline().is_none_or(|due| due > now));
                }
                _ => {
                    let before: BTreeMap<u64, usize> =
                        inside.keys().map(|id| (*id, queue.position(*id).expect("waits"))).collect();
                    let models = [vec!["m".to_string()], vec!["n".into()], vec!["m".into(), "n".into()]];
                    let serves = models.get(client).map_or(Serves::Anything, |models| Serves::Models(models));
                    let serves_model = |want: &Want| match (serves, want.0) {
                        (Serves::Models(models), Some(model)) => models.iter().any(|m| m == model),
                        _ => true,
                    };
                    let fits = |want: &Want| batch || want.1 == 0;
                    let could: Vec<Waiter<Want>> = queue
                        .waiters
                        .values()
                        .filter(|waiter| serves_model(&waiter.ask) && fits(&waiter.ask))
                        .cloned()
                        .collect();
                    let Some(taken) = queue.next_fitting(serves, fits) else {
                        prop_assert!(could.is_empty(), "idle though {could:?} fit");
                        continue;
                    };
                    prop_assert!(could.contains(&taken), "it does not fit");
                    prop_assert_eq!(before[&taken.id], 0, "not the first of those who want the same");
                    prop_assert!(inside.remove(&taken.id).is_some());
                    for other in could.iter().filter(|other| other.id != taken.id) {
                        let same = (other.priority, other.ask) == (taken.priority, taken.ask);
                        let expected = before[&other.id] - usize::from(same);
                        prop_assert_eq!(queue.position(other.id), Some(expected));
                        prop_assert!(!same || other.client != taken.client || other.id > taken.id, "overtaken");
                        let passed = inside.get_mut(&other.id).expect("waits");
                        *passed += u32::from(taken.id > other.id);
                        // Each of at most five groups lets others pass eight times, and within a group each of
                        // its client's at most twenty older requests lets each of three other clients pass.
                        prop_assert!(*passed <= 9 * 9 * 5 * 4, "passed over {passed} times");
                    }
                }
            }
            queue.check_invariants();
            prop_assert_eq!(queue.len(), inside.len());
            let order: Vec<_> = queue.in_order().map(|waiter| (waiter.priority, waiter.since, waiter.id)).collect();
            prop_assert!(order.is_sorted() && order.iter().all(|(.., id)| inside.contains_key(id)), "{order:?}");
        }
    }
}
