//! Who waits, for what, and whether there is still hope.
//!
//! A request that failed somewhere waits for another engine; the one on which it failed will do only
//! where no other could serve it. Once a second it is asked whether anybody could ever serve what is
//! waited for: engines that start, or whose node has fallen silent a moment ago, are worth waiting for;
//! engines that drain, and those of nodes that are offline, are not. Where nobody could for
//! [`NOBODY_GRACE_MS`], waiting ends with a refusal.

use std::collections::{BTreeMap, BTreeSet};

use super::{Core, Effect, Request};
use crate::orchestratord::admission::{self, Serves};
use crate::orchestratord::placement::{Ask, Choice, StrategyState, choose, fits};
use crate::orchestratord::refusal::Refusal;
use crate::orchestratord::service_registry::{NodeStatus, Obstacle, Replica, ReplicaRef, ServiceRegistry};
use crate::time::{Mono, Now};

/// How long it is hoped that somebody comes who can serve what nobody can: an agent restarts within, and a
/// handoff is written again.
pub const NOBODY_GRACE_MS: u64 = 10_000;
/// How often it is looked whether there is hope, in milliseconds.
const LOOK_INTERVAL_MS: u64 = 1_000;
/// Asks that are looked at in one go: each may cost a walk over all replicas.
const LOOKS_MAX: usize = 64;

/// What a waiter asks for.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Wanted {
    pub(super) ask: Ask,
    /// Where it failed already.
    pub(super) tried: Vec<ReplicaRef>,
}

impl admission::Wanted for Wanted {
    fn model(&self) -> Option<&str> {
        self.ask.model.as_deref().filter(|model| !model.is_empty())
    }
}

/// Since when nobody could serve what is waited for.
#[derive(Debug, Default)]
pub(super) struct Hopes {
    hopeless: BTreeMap<Ask, Mono>,
    /// The last look, or when the first waiter came.
    pub(super) looked: Option<Mono>,
    /// Where the next look begins.
    next: usize,
}

impl Core {
    /// Gives what `replica` has free to waiters, in their order.
    pub(super) fn serve_waiters(&mut self, replica: ReplicaRef, now: Now, effects: &mut Vec<Effect>) {
        while !self.admission.is_empty() {
            let Some(known) = self.registry.replica(replica).filter(|known| known.slots_free() > 0) else {
                return;
            };
            let (models, total) = (known.models.clone(), known.slots_total);
            let serves = if models.is_empty() { Serves::Anything } else { Serves::Models(&models) };
            let registry = &self.registry;
            let may = |wanted: &Wanted| {
                fits(registry, replica, &wanted.ask)
                    && (!wanted.tried.contains(&replica) || !is_servable(registry, wanted))
            };
            let Some(waiter) = self.admission.next_fitting(serves, may) else { return };
            let slots = waiter.ask.ask.slots.clamp(1, total.max(1));
            self.dispatch(waiter.id, replica, slots, now, effects);
            // Judged to fit and yet not taken: it waits again, and so must this loop.
            if self.requests.get(&waiter.id).is_some_and(|request| request.running.is_none()) {
                return;
            }
        }
    }

    /// Where replicas have changed: gives those who failed a slot where they failed, if that is the only
    /// place left.
    pub(super) fn serve_who_failed(&mut self, now: Now, effects: &mut Vec<Effect>) {
        while std::mem::take(&mut self.replicas_changed) {
            let tried: BTreeSet<ReplicaRef> =
                self.admission.wanted().flat_map(|wanted| wanted.tried.iter().copied()).collect();
            for replica in tried {
                self.serve_waiters(replica, now, effects);
            }
        }
    }

    /// When [`Core::look_for_hope`] is wanted next.
    pub(super) fn look_deadline(&self) -> Option<Mono> {
        let looked = self.hopes.looked.filter(|_| !self.admission.is_empty());
        looked.map(|looked| looked.plus_ms(LOOK_INTERVAL_MS))
    }

    /// Refuses those who wait in vain.
    pub(super) fn look_for_hope(&mut self, now: Now, effects: &mut Vec<Effect>) {
        if self.admission.is_empty() {
            self.hopes = Hopes::default();
            return;
        }
        if self.look_deadline().is_some_and(|at| at > now.mono) {
            return;
        }
        self.hopes.looked = Some(now.mono);
        if !self.hopes.hopeless.is_empty() {
            let wanted: BTreeSet<&Ask> = self.admission.wanted().map(|wanted| &wanted.ask).collect();
            self.hopes.hopeless.retain(|ask, _| wanted.contains(ask));
        }
        let wanted: Vec<Wanted> =
            self.admission.wanted().skip(self.hopes.next).take(LOOKS_MAX).cloned().collect();
        self.hopes.next = if wanted.len() < LOOKS_MAX { 0 } else { self.hopes.next + LOOKS_MAX };
        for wanted in wanted {
            if is_servable_ever(&self.registry, &wanted.ask) {
                self.hopes.hopeless.remove(&wanted.ask);
                continue;
            }
            let since = *self.hopes.hopeless.entry(wanted.ask.clone()).or_insert(now.mono);
            if now.mono.ms_since(since) < NOBODY_GRACE_MS {
                continue;
            }
            for id in self.admission.who_wants(&wanted) {
                self.admission.remove(id);
                self.refuse_late(id, &wanted.ask, now, effects);
            }
        }
    }

    /// Refuses waiters whose time is over, with what they waited for.
    pub(super) fn end_waits(&mut self, now: Now, effects: &mut Vec<Effect>) {
        for waiter in self.admission.expire(now.mono) {
            self.refuse_late(waiter.id, &waiter.ask.ask, now, effects);
        }
    }

    fn refuse_late(&mut self, id: u64, ask: &Ask, now: Now, effects: &mut Vec<Effect>) {
        let placement = choose(&self.registry, ask, &[], self.strategy, &mut self.strategy_state);
        let is_past_deadline = self.requests.get(&id).is_some_and(|request| {
            request.asked.is_deadline && request.since.plus_ms(request.asked.wait_ms_max) <= now.mono
        });
        let (is_full, is_unready) = (
            matches!(placement.choice, Choice::Busy | Choice::Replica { .. }),
            matches!(placement.choice, Choice::NotReady { .. }),
        );
        let reason = match placement.choice {
            Choice::Busy | Choice::Replica { .. } => "every slot was busy".to_string(),
            Choice::NotReady { reason } => reason,
            _ => "no engine is known that could serve it".to_string(),
        };
        let retry_ms = self.retry_ms(ask, now);
        let refusal = if is_past_deadline {
            Refusal::Deadline(format!("deadline_ms has passed before a slot became free: {reason}"))
        } else if is_unready {
            Refusal::Unready { reason, node: ask.node.is_some(), retry_ms }
        } else {
            Refusal::Waited { reason, full: is_full, retry_ms }
        };
        self.refuse(id, refusal, effects);
    }

    /// When whoever asks for this and is refused should try again, in milliseconds.
    pub(super) fn retry_ms(&mut self, ask: &Ask, now: Now) -> u64 {
        let model = ask.model.as_deref().filter(|model| !model.is_empty());
        let (ahead, waiting) = (self.admission.len_for(model), self.admission.len());
        self.drains.retry_ms(model, ahead, waiting, now.mono)
    }
}

impl Request {
    pub(super) fn wanted(&self) -> Wanted {
        // How long the answer may be says nothing about where it can come from; and whoever waits takes what
        // comes.
        let ask = self.asked.ask.without_wish().unwrap_or_else(|| self.asked.ask.clone());
        let ask = Ask { tokens_max: None, affinity: None, ..ask };
        Wanted { ask, tried: self.tried.clone() }
    }
}

/// Whether a replica on which it has not failed takes work that fits, full ones included.
fn is_servable(registry: &ServiceRegistry, wanted: &Wanted) -> bool {
    let (strategy, mut state) = (registry.table().placement_index().strategy(), StrategyState::new(0));
    let found = choose(registry, &wanted.ask, &wanted.tried, strategy, &mut state);
    matches!(found.choice, Choice::Busy | Choice::Replica { .. })
}

/// Whether any replica serves it, or may do so soon.
fn is_servable_ever(registry: &ServiceRegistry, ask: &Ask) -> bool {
    // Whether there is one is the same for each strategy.
    let strategy = registry.table().placement_index().strategy();
    match choose(registry, ask, &[], strategy, &mut StrategyState::new(0)).choice {
        Choice::Busy | Choice::Replica { .. } => true,
        Choice::NotReady { .. } => {
            registry.replicas().any(|(_, replica)| may_serve(replica, ask)) || registry.is_prepared(ask)
        }
        Choice::Nothing | Choice::ContextTooLong { .. } | Choice::UnknownModel | Choice::UnknownPin => {
            registry.is_prepared(ask)
        }
    }
}

fn may_serve(replica: &Replica, ask: &Ask) -> bool {
    let model = ask.model.as_ref().filter(|model| !model.is_empty());
    let is_hopeless = matches!(
        replica.obstacle(),
        Some(Obstacle::Draining | Obstacle::NoSlots)
            | Some(Obstacle::Node(_, NodeStatus::Offline | NodeStatus::Draining))
    );
    !is_hopeless
        && (replica.models.is_empty() || model.is_none_or(|model| replica.models.contains(model)))
        && ask.node.as_ref().is_none_or(|node| *node == replica.node)
        && ask.pool.as_ref().is_none_or(|pool| *pool == replica.key.pool)
        && ask.device_mask.as_ref().is_none_or(|mask| replica.device_mask.as_deref() == Some(mask.as_str()))
        && !ask.avoid_pools.contains(&replica.key.pool)
}

#[cfg(test)]
mod tests;
