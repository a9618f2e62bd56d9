//! The poller as its core drives it: when it orders what, under any mix of answers, failures, silence and
//! hints.

use proptest::prelude::*;

use super::*;

const INTERVAL_MS: u64 = 5_000;

struct World {
    poller: Poller,
    now: Now,
    news: Vec<Happening>,
}

fn url(n: usize) -> BaseUrl {
    BaseUrl::new(&format!("http://10.0.{}.{}:9200", n / 250, n % 250)).expect("a URL")
}

fn node(n: usize) -> NodeId {
    NodeId::new(&format!("n{n}")).expect("an id")
}

impl World {
    fn new(agents: usize, interval_ms: u64) -> World {
        let now = Now::default().plus_ms(1_000);
        let urls: Vec<BaseUrl> = (0..agents).map(url).collect();
        World { poller: Poller::new(&urls, interval_ms, 1, now), now, news: Vec::new() }
    }

    fn due(&mut self) -> Vec<PollOrder> {
        self.due_but(&[])
    }

    fn due_but(&mut self, beating: &[NodeId]) -> Vec<PollOrder> {
        let orders = self.poller.due(self.now, |node| beating.contains(node), &mut self.news);
        self.poller.check_invariants();
        orders
    }

    fn end(&mut self, id: PollId, state: PollState) {
        let node = (!state.is_failure()).then(|| node(id.agent));
        let error = state.is_trouble().then(|| "why".to_string());
        self.news.extend(self.poller.ended(id, state, error, node, self.now));
        self.poller.check_invariants();
    }

    /// Sleeps until the deadline and returns how long that was, in milliseconds.
    fn sleep(&mut self) -> u64 {
        let at = self.poller.deadline().expect("a deadline");
        let ms = at.ns_since(self.now.mono).div_ceil(1_000_000);
        self.now = self.now.plus_ms(ms);
        ms
    }

    /// A world of one agent that has answered once.
    fn answering() -> World {
        let mut world = World::new(1, INTERVAL_MS);
        let order = world.due().remove(0);
        world.end(order.id, PollState::Answers);
        world.news.clear();
        world
    }

    fn hint(&mut self, node: Option<&NodeId>) -> usize {
        let hint = Hint { node, url: None };
        self.poller.hint(&hint, |_| false, self.now)
    }
}

#[test]
fn agents_are_asked_once_an_interval_and_not_in_step() {
    let mut world = World::answering();
    let mut pauses = Vec::new();
    for _ in 0..50 {
        pauses.push(world.sleep());
        let order = world.due().remove(0);
        assert_eq!(order.timeout_ms, INTERVAL_MS / 2);
        assert!(world.poller.deadline().is_none(), "one poll at a time");
        world.end(order.id, PollState::Answers);
    }
    assert!(pauses.iter().all(|ms| (4_000..=6_000).contains(ms)), "{pauses:?}");
    assert!(pauses.iter().any(|ms| *ms < 4_600) && pauses.iter().any(|ms| *ms > 5_400), "{pauses:?}");
    assert!(world.news.is_empty(), "nothing changed: {:?}", world.news);
}

#[test]
fn failures_are_retried_soon_then_more_and_more_rarely_and_told_once() {
    let mut world = World::answering();
    world.sleep();
    let mut pauses = Vec::new();
    for _ in 0..12 {
        let order = world.due().remove(0);
        world.end(order.id, PollState::Unreachable);
        pauses.push(world.sleep());
    }
    assert!((400..=600).contains(&pauses[0]), "{pauses:?}");
    assert!(pauses.windows(2).take(5).all(|two| two[1] > two[0]), "{pauses:?}");
    assert!(pauses.iter().all(|ms| *ms <= BACKOFF_MS_MAX) && pauses[11] >= 24_000, "{pauses:?}");
    let order = world.due().remove(0);
    world.end(order.id, PollState::Answers);
    assert!((4_000..=6_000).contains(&world.sleep()));
    let told: Vec<&str> = world.news.iter().map(|news| news.state).collect();
    assert_eq!(told, ["unreachable", "answers"], "once a transition");
}

#[test]
fn a_turn_begins_a_bounded_number_of_polls_and_all_get_their_turn() {
    let mut world = World::new(POLLED_MAX + 10, INTERVAL_MS);
    assert_eq!(world.poller.len(), POLLED_MAX);
    let mut turns = 0;
    let mut asked = BTreeSet::new();
    while world.poller.deadline().is_some() {
        let orders = world.due();
        assert!((1..=POLLS_PER_TURN_MAX).contains(&orders.len()), "{} in a turn", orders.len());
        asked.extend(orders.into_iter().map(|order| order.to));
        turns += 1;
    }
    assert_eq!((turns, asked.len()), (POLLED_MAX / POLLS_PER_TURN_MAX, POLLED_MAX));
}

#[test]
fn hints_are_followed_at_once_and_coalesced() {
    let mut world = World::answering();
    assert_eq!(world.hint(Some(&node(0))), 1);
    assert_eq!(world.sleep(), 0, "at once");
    let order = world.due().remove(0);
    world.now = world.now.plus_ms(3);
    // Many more while the poll is under way: it may have missed what they are about.
    (0..100).for_each(|_| assert_eq!(world.hint(None), 1));
    assert!(world.poller.deadline().is_none(), "still one poll at a time");
    world.end(order.id, PollState::Answers);
    let rest = world.sleep();
    assert!((HINT_MS - 3..=HINT_MS).contains(&rest), "{rest}");
    let order = world.due().remove(0);
    world.end(order.id, PollState::Answers);
    assert!(world.sleep() > 3_000, "a hundred hints were one poll");
}

#[test]
fn a_hint_ends_a_backoff() {
    let mut world = World::new(1, INTERVAL_MS);
    for _ in 0..8 {
        let order = world.due().remove(0);
        world.end(order.id, PollState::Unreachable);
        world.sleep();
    }
    let order = world.due().remove(0);
    world.end(order.id, PollState::Unreachable);
    assert_eq!(world.hint(Some(&node(7))), 1, "the agent has not told its name yet: it may be this one");
    assert_eq!(world.sleep(), 0);
    let order = world.due().remove(0);
    world.end(order.id, PollState::Answers);
    assert_eq!(world.hint(Some(&node(7))), 0, "it is another one");
}

#[test]
fn hints_narrow_down_to_who_may_be_meant() {
    let mut world = World::new(3, INTERVAL_MS);
    for order in world.due() {
        world.end(order.id, PollState::Answers);
    }
    let mut asked = |hint: &Hint, pool_of: usize| {
        let count = world.poller.hint(hint, |known| *known == node(pool_of), world.now);
        let orders = world.due();
        assert_eq!(count, orders.len());
        orders.iter().for_each(|order| world.end(order.id, PollState::Answers));
        world.now = world.now.plus_ms(HINT_MS);
        orders.into_iter().map(|order| order.to).collect::<Vec<_>>()
    };
    let (one, two) = (node(1), url(2));
    assert_eq!(asked(&Hint { node: Some(&one), url: None }, 9), [url(1)]);
    assert_eq!(
        asked(&Hint { node: Some(&one), url: Some(&two) }, 9),
        [url(2)],
        "the URL is that of an agent"
    );
    assert_eq!(asked(&Hint { node: None, url: None }, 0), [url(0)], "the one that has the pool");
    assert_eq!(asked(&Hint { node: None, url: None }, 9).len(), 3, "any of them may have it by now");
    let stranger = BaseUrl::new("http://169.254.169.254/latest").expect("a URL");
    let met = asked(&Hint { node: None, url: Some(&stranger) }, 0);
    assert!(!met.contains(&stranger), "{met:?}");
}

#[test]
fn a_node_that_beats_is_passed_over_until_it_is_silent() {
    let mut world = World::answering();
    let beating = [node(0)];
    for _ in 0..5 {
        assert!(world.sleep() >= 4_000);
        assert!(world.due_but(&beating).is_empty());
        assert_eq!(world.poller.count(PollState::Heartbeats), 1);
    }
    assert_eq!(world.hint(None), 1);
    world.sleep();
    assert!(world.due_but(&beating).is_empty(), "a hint changes nothing about that");
    world.sleep();
    assert_eq!(world.due_but(&[]).len(), 1);
}

#[test]
fn answers_to_polls_that_are_over_change_nothing() {
    let mut world = World::answering();
    world.sleep();
    let order = world.due().remove(0);
    world.end(order.id, PollState::Answers);
    let before = format!("{:?}", world.poller);
    world.end(order.id, PollState::Unreachable);
    world.end(PollId { agent: 99, number: 1 }, PollState::Refused);
    assert_eq!(format!("{:?}", world.poller), before);
}

/// What may happen next.
#[derive(Clone, Debug)]
enum Step {
    /// The loop sleeps until the deadline, or this long if nothing is planned.
    Sleep(u64),
    /// A poll under way ends.
    End(usize, PollState),
    Hint(Option<usize>),
    /// A node's heartbeats begin or stop.
    Beats(usize, bool),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let state = prop::sample::select(POLL_STATES[1..].to_vec());
    let step = prop_oneof![
        4 => (1u64..400).prop_map(Step::Sleep),
        4 => (any::<usize>(), state).prop_map(|(which, state)| Step::End(which, state)),
        2 => prop::option::of(0usize..6).prop_map(Step::Hint),
        1 => (0usize..6, any::<bool>()).prop_map(|(which, on)| Step::Beats(which, on)),
    ];
    prop::collection::vec(step, 1..300)
}

proptest! {
    /// Whatever happens, the loop never spins, no agent has two polls under way, none is forgotten or asked
    /// too often, and nobody is polled whose heartbeats arrive.
    #[test]
    fn the_rules_hold_in_any_order(agents in 1usize..6, interval_ms in 100u64..60_000, steps in steps()) {
        let mut world = World::new(agents, interval_ms);
        let mut under_way: Vec<(PollOrder, Now)> = Vec::new();
        let mut beating: Vec<NodeId> = Vec::new();
        // Per agent: when it was last polled and whether nothing but hints could make it come sooner.
        let mut last: Vec<Option<Now>> = vec![None; agents];
        let mut extra: Vec<Vec<Mono>> = vec![Vec::new(); agents];
        for step in steps {
            match step {
                Step::Sleep(ms) => match world.poller.deadline() {
                    Some(at) => {
                        let sleep = at.ns_since(world.now.mono).div_ceil(1_000_000);
                        prop_assert!(sleep <= (interval_ms * 6 / 5 + 1).max(BACKOFF_MS_MAX), "{sleep} ms");
                        world.now = world.now.plus_ms(sleep);
                    }
                    None => {
                        prop_assert_eq!(under_way.len(), agents, "an agent was forgotten");
                        world.now = world.now.plus_ms(ms);
                    }
                },
                Step::End(which, state) if !under_way.is_empty() => {
                    let (order, sent) = under_way.remove(which % under_way.len());
                    prop_assert_eq!(world.poller.under_way(order.id), Some((&order.to, sent.mono)));
                    world.end(order.id, state);
                }
                Step::End(..) => {}
                Step::Hint(which) => {
                    world.hint(which.map(node).as_ref());
                }
                Step::Beats(which, on) => {
                    beating.retain(|known| *known != node(which));
                    beating.extend(on.then(|| node(which)));
                }
            }
            let orders = world.due_but(&beating);
            let later = world.poller.deadline();
            prop_assert!(later.is_none_or(|at| at > world.now.mono), "a deadline that nothing meets");
            for order in orders {
                let agent = order.id.agent;
                prop_assert!(under_way.iter().all(|(other, _)| other.to != order.to), "two polls at once");
                prop_assert!(order.timeout_ms <= (interval_ms / 2).max(1));
                if let Some(last) = last[agent] {
                    let pause_ms = world.now.mono.ms_since(last.mono);
                    if pause_ms < (interval_ms * 4 / 5).min(BACKOFF_MS_MIN * 4 / 5) {
                        extra[agent].push(world.now.mono);
                    }
                }
                last[agent] = Some(world.now);
                under_way.push((order, world.now));
            }
        }
        for times in extra {
            prop_assert!(times.windows(2).all(|two| two[1].ms_since(two[0]) >= HINT_MS), "{times:?}");
        }
    }
}
