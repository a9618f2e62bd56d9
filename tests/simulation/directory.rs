//! The real watcher over a real directory, in virtual time: whatever writers do to it, and whatever the
//! kernel's queue of events loses, after quiet and one watch interval what is known is what the
//! directory says.
//!
//! Only the clock is the world's own here. So the interval is the one that an operator configures, and
//! the safety net, which is thirty times as long, never comes to the rescue.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use llama_orch::reactor::token::{Kind, Token};
use llama_orch::reactor::{Reactor, Registry as Sources};
use llama_orch::replicas::{AllowList, EnginePolicy, Registry, Watch};
use llama_orch::time::{Mono, Now, Wall};
use llama_orch::wire::handoff::{HandoffFile, parse};

const INTERVAL_MS: u64 = 1_000;
/// Steps of virtual time: short against everything that is waited for.
const STEP_MS: u64 = 10;
/// The interval, the moment that a writer gets, and the first pause of a directory that was away.
const QUIET_MS: u64 = INTERVAL_MS + 250 + 50 + 2 * STEP_MS;
/// Operations between two looks.
const BURST_MAX: usize = 12;
const ROUNDS: usize = 6;
/// More turns at one moment than any piece of work needs.
const TURNS_MAX: u32 = 10_000;
/// Beyond that a queue is not filled for a test.
const QUEUE_MAX: usize = 50_000;

struct Story {
    directory: PathBuf,
    random: fastrand::Rng,
    now: Now,
    reactor: Reactor,
    sources: Sources,
    watch: Watch,
    known: Registry,
    overflows: u64,
}

/// Tells the stories of these seeds; how often events were lost.
pub(crate) fn tell(seeds: std::ops::Range<u64>) -> u64 {
    // In memory where there is such a place: it is the order of things that matters, not the disk.
    let memory = Path::new("/dev/shm");
    let make = || tempfile::tempdir_in(memory).or_else(|_| tempfile::tempdir());
    let mut overflows = 0;
    for seed in seeds {
        let parent = make().expect("a directory");
        let mut story = Story::new(parent.path().join("engines"), seed);
        for round in 0..ROUNDS {
            story.burst();
            story.quiet();
            let (known, told) = (story.known(), story.told());
            assert_eq!(known, told, "directory seed {seed}, round {round}");
        }
        overflows += story.overflows;
    }
    overflows
}

/// What decides between files of one replica: generation, then time.
type Rank = (u64, std::time::SystemTime);
/// Where each replica's engine is, and its slots.
type Replicas = BTreeMap<String, (String, u32)>;

impl Story {
    fn new(directory: PathBuf, seed: u64) -> Story {
        let reactor = Reactor::new().expect("a poll");
        let sources = reactor.registry().expect("a descriptor");
        let watch = Watch::new(directory.clone(), INTERVAL_MS, Token::only(Kind::DirWatch));
        let policy = EnginePolicy::new(Vec::new(), None, AllowList::default(), "ALLOW");
        let now = Now { mono: Mono(1_000_000_000), wall: Wall(1_700_000_000_000_000_000) };
        let mut story = Story {
            directory,
            random: fastrand::Rng::with_seed(seed),
            now,
            reactor,
            sources,
            watch,
            known: Registry::new(policy, 1),
            overflows: 0,
        };
        story.turns();
        story
    }

    /// Turns of the loop, as many as there is something to do.
    fn turns(&mut self) {
        for turn in 0.. {
            assert!(turn < TURNS_MAX, "the watcher's deadline does not move: its daemon would spin");
            self.reactor.wait(None, true).expect("a poll");
            let signalled = self.reactor.events().any(|(token, _)| token.kind() == Kind::DirWatch);
            let is_due = self.watch.deadline() <= self.now.mono;
            if !signalled && !is_due && !self.watch.busy() {
                return;
            }
            let scan = self.watch.turn(signalled, self.now.mono, &self.sources);
            for listing in scan.listings {
                self.known.listing(&listing, self.now, &mut Vec::new());
                self.known.check_invariants();
            }
        }
    }

    fn pass(&mut self, ms: u64) {
        for _ in 0..ms.div_ceil(STEP_MS) {
            let mono = self.now.mono.plus_ms(STEP_MS);
            self.now = Now { mono, wall: Wall(self.now.wall.0 + mono.ns_since(self.now.mono)) };
            self.turns();
        }
    }

    fn burst(&mut self) {
        if self.random.u64(0..12) == 0 {
            self.overflow();
        }
        for _ in 0..self.random.usize(1..=BURST_MAX) {
            self.operate();
            if self.random.u64(0..3) == 0 {
                let pause_ms = self.random.u64(0..400);
                self.pass(pause_ms);
            }
        }
    }

    /// More happens than the kernel keeps in mind while nobody listens.
    fn overflow(&mut self) {
        let queue = fs::read_to_string("/proc/sys/fs/inotify/max_queued_events");
        let Some(length) = queue.ok().and_then(|text| text.trim().parse::<usize>().ok()) else { return };
        if length > QUEUE_MAX || !self.directory.exists() {
            return;
        }
        let (a, b) = (self.directory.join(".a.tmp"), self.directory.join(".b.tmp"));
        fs::write(&a, "").expect("written");
        for _ in 0..length / 4 + 16 {
            fs::rename(&a, &b).expect("renamed");
            fs::rename(&b, &a).expect("renamed");
        }
        self.overflows += 1;
        // What happens now is told by no event.
        for _ in 0..BURST_MAX {
            self.operate();
        }
        self.turns();
    }

    fn operate(&mut self) {
        if !self.directory.exists() {
            fs::create_dir_all(&self.directory).expect("made");
            return;
        }
        let path = self.directory.join(format!("f{}.json", self.random.u8(0..8)));
        let text = self.handoff();
        // What others do to the same name decides what is there, not whether this one succeeds.
        let _ = match self.random.u64(0..20) {
            0..8 => {
                let hidden = self.directory.join(".next.tmp");
                fs::write(&hidden, text).and_then(|()| fs::rename(&hidden, &path))
            }
            8..10 => fs::write(&path, text),
            // Its writer dies midway.
            10..12 => fs::write(&path, &text[..self.random.usize(0..text.len())]),
            12 => fs::write(&path, "not JSON"),
            13..16 => fs::remove_file(&path),
            16..18 => fs::rename(&path, self.directory.join(format!("f{}.json", self.random.u8(0..8)))),
            18 => fs::remove_dir_all(&self.directory),
            _ => {
                let away = self.directory.with_extension(self.random.u32(..).to_string());
                fs::rename(&self.directory, away)
            }
        };
    }

    fn handoff(&mut self) -> String {
        let (replica, port) = (self.random.u8(0..5), self.random.u16(9300..9400));
        let (slots, generation) = (self.random.u8(1..9), self.random.u8(0..3));
        format!(
            r#"{{"url":"http://127.0.0.1:{port}","pool_id":"p","replica_id":"r{replica}","slots":{slots},"generation":{generation}}}"#
        )
    }

    /// Nobody does anything any more; what cannot be used was taken away.
    fn quiet(&mut self) {
        if !self.directory.exists() {
            fs::create_dir_all(&self.directory).expect("made");
        }
        for (path, bytes) in self.files() {
            if parse(&bytes).is_err() {
                fs::remove_file(path).expect("removed");
            }
        }
        self.pass(QUIET_MS);
    }

    /// Handoff files in their order.
    fn files(&self) -> Vec<(PathBuf, Vec<u8>)> {
        let entries = fs::read_dir(&self.directory).expect("it is there");
        let paths = entries.map(|entry| entry.expect("an entry").path());
        let mut paths: Vec<PathBuf> =
            paths.filter(|path| path.extension().is_some_and(|e| e == "json")).collect();
        paths.sort();
        paths.into_iter().map(|path| (path.clone(), fs::read(path).expect("read"))).collect()
    }

    /// What the directory says: of files that name one replica the highest generation counts, then the
    /// newest, then the first by name.
    fn told(&self) -> Replicas {
        let mut best: BTreeMap<String, (Rank, (String, u32))> = BTreeMap::new();
        for (path, bytes) in self.files() {
            let Ok(HandoffFile::Engine(handoff)) = parse(&bytes) else { continue };
            let modified = fs::metadata(path).and_then(|file| file.modified()).expect("its times");
            let rank = (handoff.generation, modified);
            let told = (rank, (handoff.url.to_string(), handoff.slots));
            let key = handoff.key().to_string();
            if best.get(&key).is_none_or(|(other, _)| rank > *other) {
                best.insert(key, told);
            }
        }
        best.into_iter().map(|(key, (_, told))| (key, told)).collect()
    }

    fn known(&self) -> Replicas {
        let engines = self.known.engines();
        engines.map(|(key, _, engine)| (key.to_string(), (engine.url.to_string(), engine.slots))).collect()
    }
}
