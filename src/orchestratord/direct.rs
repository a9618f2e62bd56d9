//! Requests that go straight to an engine of a node, past the node's agent: who runs where, and when the
//! agent must be told that nothing comes any more. Pure.
//!
//! An agent judges its engines, and what gives away one that hangs is the data path, of which the agent sees
//! only what it relays. So the agent is told of the rest: once all answers of an engine have stood still for
//! long, and from then on at every look, until bytes come or nothing runs there any more. What it makes of it
//! (a trial request, then holding the replica out until one is answered) reaches the control plane as all
//! that it decides does, by its next heartbeat or poll.

use std::collections::{BTreeMap, BTreeSet};

use crate::replicas::Activity;
use crate::time::{Mono, Now};
use crate::wire::activity::ActivityReport;
use crate::wire::id::{NodeId, ReplicaKey};

/// Looks within the time after which silence is suspicious: a trial request may take half of that, and bytes
/// that come meanwhile are to be told before it ends.
const LOOKS: u64 = 4;
/// Shortest and longest time between two looks, in milliseconds. An agent asks engines that work every 10 s.
const LOOK_MS: std::ops::RangeInclusive<u64> = 250..=10_000;
/// Most agents that are told at one look; the others are at the next ones.
pub const TOLD_PER_LOOK_MAX: usize = 64;

/// One engine: its node, its name and its generation.
pub type Engine = (NodeId, ReplicaKey, u64);

/// Exchanges `E` that run on engines which are dialled directly. See the file's text.
#[derive(Debug)]
pub struct Direct<E> {
    hang_suspect_ms: u64,
    running: BTreeMap<E, Engine>,
    /// Engines whose agents were told that they are silent.
    silent: BTreeSet<Engine>,
    /// Engines whose agents are being told.
    telling: BTreeSet<Engine>,
    /// When to look next, as long as something runs or somebody is silent.
    look_at: Option<Mono>,
}

impl<E: Ord + Copy> Direct<E> {
    /// Nothing runs. `hang_suspect_ms`: how long all answers of an engine may stand still.
    #[must_use]
    pub fn new(hang_suspect_ms: u64) -> Direct<E> {
        Direct {
            hang_suspect_ms,
            running: BTreeMap::new(),
            silent: BTreeSet::new(),
            telling: BTreeSet::new(),
            look_at: None,
        }
    }

    /// A request was sent to an engine.
    pub fn began(&mut self, exchange: E, engine: Engine, now: Mono) {
        self.running.insert(exchange, engine);
        self.look_at.get_or_insert(now.plus_ms(self.look_ms()));
    }

    /// It has ended.
    pub fn ended(&mut self, exchange: E) {
        self.running.remove(&exchange);
    }

    /// An agent was told, or could not be.
    pub fn told(&mut self, engine: &Engine) {
        self.telling.remove(engine);
    }

    /// When [`Direct::look`] is wanted next.
    #[must_use]
    pub fn deadline(&self) -> Option<Mono> {
        self.look_at
    }

    /// Looks at all exchanges if it is time. `progress`: when one was sent, and when its last byte came;
    /// `None` for one that says nothing about its engine. Returns what agents are to be told now.
    pub fn look(
        &mut self,
        now: Now,
        progress: impl Fn(E) -> Option<(Mono, Option<Mono>)>,
    ) -> Vec<(Engine, ActivityReport)> {
        if self.look_at.is_none_or(|at| at > now.mono) {
            return Vec::new();
        }
        self.look_at = (!self.running.is_empty()).then(|| now.mono.plus_ms(self.look_ms()));
        let mut engines: BTreeMap<&Engine, Activity> = BTreeMap::new();
        for (exchange, engine) in &self.running {
            if let Some((sent, last_byte)) = progress(*exchange) {
                engines.entry(engine).or_default().add(sent, last_byte);
            }
        }
        self.silent.retain(|engine| engines.contains_key(engine));
        let mut reports = Vec::new();
        for (engine, activity) in engines {
            let is_silent = activity.silence_ms(self.hang_suspect_ms, now.mono).is_some();
            let is_news = is_silent || self.silent.contains(engine);
            if !is_news || self.telling.contains(engine) || reports.len() >= TOLD_PER_LOOK_MAX {
                continue;
            }
            if is_silent {
                self.silent.insert(engine.clone());
            } else {
                self.silent.remove(engine);
            }
            self.telling.insert(engine.clone());
            reports.push((engine.clone(), activity.report(engine.2, now.mono)));
        }
        reports
    }

    fn look_ms(&self) -> u64 {
        (self.hang_suspect_ms / LOOKS).clamp(*LOOK_MS.start(), *LOOK_MS.end())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::id::{PoolId, ReplicaId};

    const LIMIT_MS: u64 = 60_000;

    fn engine(name: &str) -> Engine {
        let key = ReplicaKey {
            pool: PoolId::new("p").expect("an id"),
            replica: ReplicaId::new(name).expect("an id"),
        };
        (NodeId::new("n").expect("an id"), key, 7)
    }

    /// Looks at every deadline until `until_ms`; what was told, by the time of each look.
    fn looks(
        direct: &mut Direct<u32>,
        until_ms: u64,
        progress: impl Fn(u32, Mono) -> Option<(Mono, Option<Mono>)>,
    ) -> Vec<(u64, ActivityReport)> {
        let mut told = Vec::new();
        while let Some(at) = direct.deadline().filter(|at| *at <= Mono(0).plus_ms(until_ms)) {
            let now = Now { mono: at, ..Now::default() };
            for (engine, report) in direct.look(now, |exchange| progress(exchange, at)) {
                direct.told(&engine);
                told.push((at.ms_since(Mono(0)), report));
            }
            assert!(direct.deadline() > Some(at) || direct.deadline().is_none(), "it would spin");
        }
        told
    }

    #[test]
    fn an_agent_is_told_of_silence_until_bytes_come_and_once_more_then() {
        let mut direct = Direct::new(LIMIT_MS);
        direct.began(1, engine("r0"), Mono(0));
        let ms = |ms: u64| Mono(0).plus_ms(ms);
        // A byte after 5 s, the next one after 95 s, and none after that.
        let told = looks(&mut direct, 140_000, |_, now| {
            Some((ms(0), Some(if now < ms(95_000) { ms(5_000) } else { ms(95_000) })))
        });
        let ages: Vec<(u64, Option<u64>)> =
            told.iter().map(|(at, report)| (*at, report.last_byte_age_ms)).collect();
        assert_eq!(
            ages,
            [(70_000, Some(65_000)), (80_000, Some(75_000)), (90_000, Some(85_000)), (100_000, Some(5_000))]
        );
        assert_eq!((told[0].1.generation, told[0].1.begun, told[0].1.waiting_ms), (7, 1, None));
        direct.ended(1);
        assert_eq!(looks(&mut direct, 1_000_000, |_, _| None), [], "nothing runs");
        assert_eq!(direct.deadline(), None);
    }

    #[test]
    fn prefill_is_no_silence_and_neither_is_a_slow_client() {
        let mut direct = Direct::new(LIMIT_MS);
        direct.began(1, engine("r0"), Mono(0));
        direct.began(2, engine("r1"), Mono(0));
        let told = looks(&mut direct, 500_000, |exchange, _| (exchange == 1).then_some((Mono(0), None)));
        assert_eq!(told, []);
    }

    #[test]
    fn an_agent_is_told_once_at_a_time() {
        let mut direct = Direct::new(LIMIT_MS);
        direct.began(1, engine("r0"), Mono(0));
        direct.began(2, engine("r1"), Mono(0));
        let look = |direct: &mut Direct<u32>, ms| {
            let now = Now { mono: Mono(0).plus_ms(ms), ..Now::default() };
            direct.look(now, |_| Some((Mono(0), Some(Mono(0)))))
        };
        assert_eq!(look(&mut direct, 70_000).len(), 2);
        assert_eq!(look(&mut direct, 80_000), [], "both are being told");
        direct.told(&engine("r1"));
        let again = look(&mut direct, 90_000);
        assert_eq!(again.iter().map(|(engine, _)| engine.clone()).collect::<Vec<_>>(), [engine("r1")]);
    }
}
