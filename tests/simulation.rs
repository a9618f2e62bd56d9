//! Both cores, several nodes and a hostile network, in virtual time.
//!
//! Each seed is one story: node agents and a control plane (the real, pure cores) exchange the real
//! messages over links that delay, lose, duplicate and partition; agents, machines, engines and the
//! control plane crash and come back; handoff files appear, change, break and vanish; clients ask and
//! sometimes leave. In every other story the control plane polls agents that it does not hear. The world drives the cores as their daemons do: what arrived, then `Tick`, and
//! `Tick` at every `deadline()`. What must hold at every step is in `simulation/rules.rs`. At the end
//! everything is healed, and within two lease times everything must be well.
//!
//! `SIM_SEED=n` replays one seed, `SIM_SEEDS=n` says how many are run, `SIM_TRACE=1` prints what
//! happens.

#[path = "simulation/chaos.rs"]
mod chaos;
#[path = "simulation/polls.rs"]
mod polls;
#[path = "simulation/rules.rs"]
mod rules;
#[path = "simulation/world.rs"]
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};

use world::World;

/// Stories that are told by default: some ten seconds in a debug build.
const SEEDS_DEFAULT: u64 = 200;

#[test]
#[allow(clippy::print_stdout, reason = "how eventful the stories were, for whoever asks with --nocapture")]
fn whatever_fails_the_rules_hold_and_everything_heals() {
    let number = |name| std::env::var(name).ok().map(|text| text.parse::<u64>().expect(name));
    let seeds = match number("SIM_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("SIM_SEEDS").unwrap_or(SEEDS_DEFAULT),
    };
    let mut totals = world::Totals::default();
    for seed in seeds.clone() {
        totals.add(&tell(seed).totals);
    }
    println!("{} seeds: {totals:?}", seeds.end - seeds.start);
    if seeds.end - seeds.start >= SEEDS_DEFAULT {
        totals.assert_eventful();
    }
}

#[test]
fn the_same_seed_tells_the_same_story() {
    for seed in [1, 7] {
        let (first, second) = (tell(seed), tell(seed));
        assert_eq!(first.trace_hash, second.trace_hash, "seed {seed}");
        assert_ne!(first.trace_hash, tell(seed + 1).trace_hash, "another seed, another story");
    }
}

/// Runs one seed to its end; a rule that breaks is told together with how to see it again.
fn tell(seed: u64) -> World {
    let told = catch_unwind(AssertUnwindSafe(|| {
        let mut world = World::new(seed);
        world.live_through_chaos();
        world.heal_and_settle();
        world
    }));
    told.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("a panic without words");
        panic!(
            "seed {seed}: {text}\nreplay with: SIM_SEED={seed} SIM_TRACE=1 cargo test --test simulation whatever -- --nocapture"
        )
    })
}
