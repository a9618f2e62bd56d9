//! Both cores, many nodes, control planes, clients, directories and a hostile network, in virtual time.
//!
//! Each seed is one story: node agents and control planes (the real, pure cores) exchange the real
//! messages over links that delay, lose, repeat, reorder and cut, each way for itself; processes stand
//! still, machines crash, lose their disks, get twins and have their clocks set; handoff files appear,
//! change, break, move and vanish under a watcher that misses events; clients ask and sometimes leave.
//! The world drives the cores as their daemons do: what arrived, then `Tick`, and `Tick` at every
//! `deadline()`. What must hold at every step is in `rules.rs` and `members.rs`. At the end everything
//! is healed, and within two lease times everything must be well.
//!
//! Every tenth seed has fifty nodes and five hundred clients, every tenth a silence of minutes.
//! `SIM_SEED=n` replays one seed, `SIM_SEEDS=n` says how many are told, `SIM_TRACE=1` prints what
//! happens. `MUTANTS=1` has every rule of the cores taken out, one at a time, and wants to be told.

#[path = "simulation/agents.rs"]
mod agents;
#[path = "simulation/chaos.rs"]
mod chaos;
#[path = "simulation/control.rs"]
mod control;
#[path = "simulation/directory.rs"]
mod directory;
#[path = "simulation/files.rs"]
mod files;
#[path = "simulation/links.rs"]
mod links;
#[path = "simulation/members.rs"]
mod members;
#[path = "simulation/mutants.rs"]
mod mutants;
#[path = "simulation/rules.rs"]
mod rules;
#[path = "simulation/stories.rs"]
mod stories;
#[path = "simulation/totals.rs"]
mod totals;
#[path = "simulation/world.rs"]
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use totals::Totals;
use world::World;

/// Stories that are told by default: about a minute of one processor in a debug build.
const SEEDS_DEFAULT: u64 = 200;
/// Stories that are told at once: the machine has other tests to run.
const THREADS_MAX: usize = 2;

#[test]
#[allow(clippy::print_stdout, reason = "how eventful the stories were, for whoever asks with --nocapture")]
fn whatever_fails_the_rules_hold_and_everything_heals() {
    let number = |name| std::env::var(name).ok().map(|text| text.parse::<u64>().expect(name));
    let seeds = match number("SIM_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("SIM_SEEDS").unwrap_or(SEEDS_DEFAULT),
    };
    let next = AtomicU64::new(seeds.start);
    let totals = Mutex::new(Totals::default());
    let broken = Mutex::new(None::<(u64, String)>);
    let threads = std::thread::available_parallelism().map_or(1, |threads| threads.get().min(THREADS_MAX));
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds.end || broken.lock().expect("held by no panic").is_some() {
                        return;
                    }
                    match tell(seed) {
                        Ok(told) => totals.lock().expect("held by no panic").add(&told),
                        Err(why) => {
                            let mut broken = broken.lock().expect("held by no panic");
                            if broken.as_ref().is_none_or(|(first, _)| seed < *first) {
                                *broken = Some((seed, why));
                            }
                        }
                    }
                }
            });
        }
    });
    if let Some((_, why)) = broken.into_inner().expect("held by no panic") {
        panic!("{why}");
    }
    let totals = totals.into_inner().expect("held by no panic");
    println!("{} seeds: {totals:?}", seeds.end - seeds.start);
    if seeds.end - seeds.start >= SEEDS_DEFAULT {
        totals.assert_eventful();
    }
}

#[test]
fn the_same_seed_tells_the_same_story() {
    for seed in [1, 4, 7] {
        let (first, second) = (World::tell(seed), World::tell(seed));
        assert_eq!(first.trace_hash, second.trace_hash, "seed {seed}");
        assert_eq!(first.totals, second.totals, "seed {seed}");
        assert_ne!(first.trace_hash, World::tell(seed + 1).trace_hash, "another seed, another story");
    }
}

/// No decision on members or leases rests on a wall clock, on either side.
#[test]
fn wall_clocks_decide_nothing() {
    for seed in [0, 2, 3, 5, 6, 14] {
        let (set, right) = (World::tell_with_clocks(seed, true), World::tell_with_clocks(seed, false));
        assert_eq!(set.membership_hash, right.membership_hash, "seed {seed}");
    }
}

/// The watcher misses nothing for longer than its interval.
#[test]
fn after_quiet_what_is_known_is_what_the_directory_says() {
    let overflows = directory::tell(0..40);
    assert!(overflows > 0 || !std::path::Path::new("/proc/sys/fs/inotify").exists(), "no event was lost");
}

/// Runs one seed to its end; a rule that breaks is told together with how to see it again.
fn tell(seed: u64) -> Result<Totals, String> {
    catch_unwind(AssertUnwindSafe(|| World::tell(seed).totals)).map_err(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("a panic without words");
        format!(
            "seed {seed}: {text}\nreplay with: SIM_SEED={seed} SIM_TRACE=1 cargo test --test simulation whatever -- --nocapture"
        )
    })
}
