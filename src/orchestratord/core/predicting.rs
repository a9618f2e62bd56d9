//! When a waiting request may start: what the core measures, and what it knows of the queue, put before
//! [`forecast`](crate::orchestratord::forecast).

use std::collections::BTreeMap;

use super::Core;
use super::waiting::Wanted;
use crate::orchestratord::admission::Waiter;
use crate::orchestratord::forecast::{Load, Need, Running, start_ms};
use crate::orchestratord::messages::RequestId;
use crate::orchestratord::placement::{Ask, could_serve};
use crate::orchestratord::service_registry::ReplicaRef;
use crate::time::Now;

/// A waiting request's place in the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueuePlace {
    /// So many of those who ask for the same go first.
    pub position: usize,
    /// So many wait in all.
    pub depth: usize,
    /// When it may start, in milliseconds from now; `None` where nothing was measured that could tell.
    pub predicted_ms: Option<u64>,
}

impl Core {
    /// The place of a request that waits.
    #[must_use]
    pub fn queue_place(&self, request: RequestId, now: Now) -> Option<QueuePlace> {
        let position = self.admission.position(request)?;
        let predicted_ms = self.predicted_ms(request, now);
        Some(QueuePlace { position, depth: self.admission.len(), predicted_ms })
    }

    /// When a request that waits may start, in milliseconds from now.
    pub(super) fn predicted_ms(&self, request: RequestId, now: Now) -> Option<u64> {
        let request_ask = &self.requests.get(&request)?.asked.ask;
        let relaxed = request_ask.without_wish();
        let ask = relaxed.as_ref().unwrap_or(request_ask);
        let before = self.admission.in_order().take_while(|waiter| waiter.id != request);
        self.start_behind(before, ask, now)
    }

    fn start_behind<'a>(
        &self,
        before: impl Iterator<Item = &'a Waiter<Wanted>>,
        ask: &Ask,
        now: Now,
    ) -> Option<u64> {
        let mut loads: BTreeMap<ReplicaRef, Load> = self
            .registry
            .replicas()
            .filter(|(replica, _)| could_serve(&self.registry, *replica, ask))
            .map(|(replica, known)| {
                let (slots_total, others) = (known.slots_total, known.others);
                (replica, Load { slots_total, others, running: Vec::new(), speed: self.speeds.of(replica) })
            })
            .collect();
        let mut requests: Vec<_> = self.requests.iter().collect();
        requests.sort_unstable_by_key(|(id, _)| **id);
        for (_, request) in requests {
            let Some(run) = &request.running else { continue };
            if let Some(load) = loads.get_mut(&run.grant.replica()) {
                let need = Need { slots: run.grant.slots(), tokens_max: request.asked.ask.tokens_max };
                load.running.push(Running { need, elapsed_ms: now.mono.ms_since(run.since) });
            }
        }
        let loads: Vec<Load> = loads.into_values().collect();
        let asks = before.filter_map(|waiter| Some(&self.requests.get(&waiter.id)?.asked.ask));
        let ahead = asks.filter(|other| compete(other, ask)).map(need);
        start_ms(&loads, ahead, need(ask))
    }

    /// An answer was read token by token.
    pub(super) fn measured(&mut self, id: RequestId, first_token_ms: u64, tokens: u64, decode_ms: u64) {
        if let Some(run) = self.requests.get(&id).and_then(|request| request.running.as_ref()) {
            self.speeds.decoded(run.grant.replica(), first_token_ms, tokens, decode_ms);
        }
    }

    /// A request held a slot for so long and was answered.
    pub(super) fn learn(&mut self, replica: ReplicaRef, service_ms: u64) {
        self.speeds.served(replica, service_ms);
        let registry = &self.registry;
        self.speeds.forget_others(registry.table().len(), |known| registry.replica(known).is_some());
    }
}

fn need(ask: &Ask) -> Need {
    Need { slots: ask.slots.max(1), tokens_max: ask.tokens_max }
}

/// Whether two requests may want the same slot: not if they name different models, pools or nodes.
fn compete(one: &Ask, other: &Ask) -> bool {
    fn may_agree<T: PartialEq>(one: Option<&T>, other: Option<&T>) -> bool {
        one.is_none() || other.is_none() || one == other
    }
    may_agree(one.model.as_ref(), other.model.as_ref())
        && may_agree(one.pool.as_ref(), other.pool.as_ref())
        && may_agree(one.node.as_ref(), other.node.as_ref())
        && may_agree(one.device_mask.as_ref(), other.device_mask.as_ref())
}

#[cfg(test)]
mod tests {
    use super::super::tests::{NOW, ask, handle, serving};
    use super::*;
    use crate::orchestratord::core::{Effect, Ending, Input};
    use crate::orchestratord::refusal::Refusal;

    const ENGINE: &str = r#"{"engine":"other","url":"http://127.0.0.1:1","slots":1,"models":["m"]}"#;

    fn waiting(effects: &[Effect]) -> Option<(usize, Option<u64>)> {
        effects.iter().find_map(|effect| match effect {
            Effect::Waiting { position, predicted_ms, .. } => Some((*position, *predicted_ms)),
            _ => None,
        })
    }

    #[test]
    fn nothing_is_predicted_before_something_was_measured_and_then_by_that() {
        let mut core = serving(ENGINE);
        handle(&mut core, ask(1, Ask::default()), NOW);
        let effects = handle(&mut core, ask(2, Ask::default()), NOW);
        assert_eq!(waiting(&effects), Some((0, None)), "{effects:?}");
        // The first took 3 s; the second has run for 1 s of as many when the third and fourth come.
        let now = NOW.plus_ms(3_000);
        let effects = handle(&mut core, Input::Ended(1, Ending::Complete), now);
        assert!(matches!(effects[..], [Effect::Dispatch(2, _)]), "{effects:?}");
        let now = now.plus_ms(1_000);
        assert_eq!(waiting(&handle(&mut core, ask(3, Ask::default()), now)), Some((0, Some(2_000))));
        assert_eq!(waiting(&handle(&mut core, ask(4, Ask::default()), now)), Some((1, Some(5_000))));
        let place = QueuePlace { position: 1, depth: 2, predicted_ms: Some(4_500) };
        assert_eq!(core.queue_place(4, now.plus_ms(500)), Some(place));
        handle(&mut core, Input::Withdraw(3), now);
        assert_eq!(core.queue_place(4, now).map(|place| place.predicted_ms), Some(Some(2_000)));
        assert_eq!(core.queue_place(2, now), None, "it runs");
    }

    #[test]
    fn who_waits_for_another_model_is_not_ahead() {
        let mut core = serving(ENGINE);
        let model = |name: &str| Ask { model: Some(name.into()), ..Ask::default() };
        let pool = Ask { pool: crate::wire::id::PoolId::new("default").ok(), ..Ask::default() };
        assert!(!compete(&model("m"), &model("n")) && compete(&model("m"), &pool));
        handle(&mut core, ask(1, model("m")), NOW);
        handle(&mut core, Input::Ended(1, Ending::Complete), NOW.plus_ms(1_000));
        let now = NOW.plus_ms(1_000);
        for (request, position, ms) in [(2, None, None), (3, Some(0), Some(1_000)), (4, Some(1), Some(2_000))]
        {
            let told = waiting(&handle(&mut core, ask(request, model("m")), now));
            assert_eq!(told, position.map(|position| (position, ms)), "{request}");
        }
    }

    #[test]
    fn a_short_answer_is_predicted_to_be_short() {
        let mut core = serving(ENGINE);
        let tokens = |count| Ask { tokens_max: Some(count), ..Ask::default() };
        handle(&mut core, ask(1, Ask::default()), NOW);
        let measured = Input::Measured { request: 1, first_token_ms: 100, tokens: 101, decode_ms: 1_000 };
        handle(&mut core, measured, NOW.plus_ms(1_100));
        handle(&mut core, Input::Ended(1, Ending::Complete), NOW.plus_ms(1_100));
        let now = NOW.plus_ms(1_100);
        handle(&mut core, ask(2, tokens(10)), now);
        assert_eq!(waiting(&handle(&mut core, ask(3, tokens(50)), now)), Some((0, Some(200))));
        assert_eq!(waiting(&handle(&mut core, ask(4, tokens(10)), now)), Some((1, Some(800))));
    }

    #[test]
    fn a_deadline_before_the_predicted_start_is_refused_at_once() {
        let mut core = serving(ENGINE);
        handle(&mut core, ask(1, Ask::default()), NOW);
        handle(&mut core, Input::Ended(1, Ending::Complete), NOW.plus_ms(9_000));
        handle(&mut core, ask(2, Ask::default()), NOW.plus_ms(9_000));
        for (request, deadline_ms, fits) in [(3, 8_000, false), (4, 10_000, true)] {
            let Input::Ask { mut asked, .. } = ask(request, Ask::default()) else { panic!("an ask") };
            (asked.wait_ms_max, asked.is_deadline) = (deadline_ms, true);
            let effects = handle(&mut core, Input::Ask { request, asked }, NOW.plus_ms(9_000));
            let refused = matches!(effects[..], [Effect::Refuse(_, Refusal::Deadline(_))]);
            assert_eq!((refused, waiting(&effects).is_some()), (!fits, fits), "{effects:?}");
        }
        // A client's patience is no deadline: it may be lucky, and waits as long as it likes.
        let Input::Ask { mut asked, .. } = ask(5, Ask::default()) else { panic!("an ask") };
        asked.wait_ms_max = 8_000;
        let effects = handle(&mut core, Input::Ask { request: 5, asked }, NOW.plus_ms(9_000));
        assert_eq!(waiting(&effects), Some((1, Some(18_000))), "{effects:?}");
        let effects = handle(&mut core, Input::Tick, NOW.plus_ms(17_001));
        let refusal = effects.iter().find_map(|effect| match effect {
            Effect::Refuse(5, refusal) => Some(refusal),
            _ => None,
        });
        assert!(matches!(refusal, Some(Refusal::Waited { full: true, .. })), "{effects:?}");
        // It was feasible, but the engine takes longer than it used to.
        let effects = handle(&mut core, Input::Tick, NOW.plus_ms(19_001));
        assert!(matches!(effects[..], [.., Effect::Refuse(4, Refusal::Deadline(_))]), "{effects:?}");
    }
}
