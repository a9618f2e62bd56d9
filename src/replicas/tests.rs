//! The room as a whole, in virtual time: listings, probes and requests against one registry.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;
use std::sync::Arc;

use super::health::{PROBE_TIMEOUT_MS, READY_INTERVAL_MS, WORKED_MS};
use super::policy::AllowList;
use super::probing::{PROBE_GAP_MS, PROBE_LOST_MS, PROBES_MAX, PROBES_PER_TURN_MAX};
use super::*;
use crate::time::{Mono, Now, Wall};
use crate::wire::drain::Scope;
use crate::wire::handoff::{self, Handoff, HandoffFile};
use crate::wire::id::{PoolId, ReplicaId, ReplicaKey};
use crate::wire::node::{POOLS_MAX, REPLICAS_MAX};

mod engines;
mod equivalence;

/// A registry with a directory and engines around it.
struct Machine {
    registry: Registry,
    now: Now,
    dir: BTreeMap<Arc<str>, ListedFile>,
    changes: Vec<Change>,
    orders: Vec<ProbeOrder>,
}

fn content(json: &str) -> FileContent {
    match handoff::parse(json.as_bytes()) {
        Ok(HandoffFile::Engine(handoff)) => FileContent::Handoff(handoff.into()),
        Ok(HandoffFile::ModelOnly) => FileContent::ModelOnly,
        Err(why) => FileContent::Refused(why.to_string()),
    }
}

/// A handoff of `pool/replica`; `more` is further JSON, each field after a comma.
fn json(pool: &str, replica: &str, port: u16, more: &str) -> String {
    format!(
        r#"{{"pool_id":"{pool}","replica_id":"{replica}","url":"http://127.0.0.1:{port}","slots":4,"model":"m"{more}}}"#
    )
}

fn key(pool: &str, replica: &str) -> ReplicaKey {
    ReplicaKey { pool: PoolId::new(pool).expect("an id"), replica: ReplicaId::new(replica).expect("an id") }
}

impl Machine {
    fn new() -> Machine {
        let policy = EnginePolicy::new(Vec::new(), Some(9200), AllowList::default(), "ALLOW");
        Machine {
            registry: Registry::new(policy, 1_000),
            now: Now { mono: Mono(77_000_000_000), wall: Wall(1_700_000_000_000_000_000) },
            dir: BTreeMap::new(),
            changes: Vec::new(),
            orders: Vec::new(),
        }
    }

    /// With `p/r0` ready.
    fn with_ready_engine() -> Machine {
        let mut machine = Machine::new();
        machine.write("a.json", &json("p", "r0", 8081, ""));
        machine.list();
        machine.answer_all(ProbeOutcome::Healthy);
        assert_eq!(machine.state("p", "r0"), Some("ready".to_string()));
        machine.changes.clear();
        machine
    }

    fn pass_ms(&mut self, ms: u64) {
        self.now = self.now.plus_ms(ms);
    }

    fn write(&mut self, name: &str, text: &str) {
        let name: Arc<str> = name.into();
        let content = Arc::new(content(text));
        self.dir.insert(name.clone(), ListedFile { name, modified: self.now.wall, content });
    }

    fn list(&mut self) {
        let listing = Listing::whole(self.dir.values().cloned().collect());
        self.registry.listing(&listing, self.now, &mut self.changes);
        self.registry.check_invariants();
        self.look_at_processes(|_| ProcessSeen::Alive);
    }

    /// The same directory as [`Machine::list`] tells, a name at a time.
    fn list_in_pieces(&mut self, as_ranges: bool) {
        let known = self.registry.files().map(|file| Arc::from(file.name)).collect::<BTreeSet<Arc<str>>>();
        let names: BTreeSet<Arc<str>> = self.dir.keys().cloned().chain(known).collect();
        let mut from = Bound::Unbounded;
        for name in &names {
            let files = self.dir.get(name).cloned().into_iter().collect();
            let span = if as_ranges {
                Span::Range(from, Bound::Included(name.clone()))
            } else {
                Span::Names(vec![name.clone()])
            };
            from = Bound::Excluded(name.clone());
            let listing = Listing { span, files, truncated: false, completes: false };
            self.registry.listing(&listing, self.now, &mut self.changes);
            self.registry.check_invariants();
        }
        self.look_at_processes(|_| ProcessSeen::Alive);
    }

    /// Carries out the orders about processes, seeing of each pid what `see` says.
    fn look_at_processes(&mut self, see: impl Fn(u32) -> ProcessSeen) {
        for order in self.registry.take_process_orders() {
            let ProcessOrder::Watch { key, generation, pid, .. } = order else { continue };
            self.registry.process_seen(&key, generation, see(pid), self.now, &mut self.changes);
            self.registry.check_invariants();
        }
    }

    /// Orders what is due now.
    fn due(&mut self) -> usize {
        let before = self.orders.len();
        self.registry.due_probes(self.now, &mut self.orders);
        self.registry.check_invariants();
        self.orders.len() - before
    }

    /// Orders what is due now, and answers every question about health with `outcome`; what else is asked
    /// at the same time is not told.
    fn answer_all(&mut self, outcome: ProbeOutcome) {
        self.due();
        while !self.orders.is_empty() {
            self.answer_each(|order| match order.kind {
                ProbeKind::Health => outcome.clone(),
                _ => ProbeOutcome::Facts(Facts::default()),
            });
            self.due();
        }
    }

    /// Answers every order.
    fn answer_each(&mut self, answer: impl Fn(&ProbeOrder) -> ProbeOutcome) {
        for order in std::mem::take(&mut self.orders) {
            let outcome = answer(&order);
            self.registry.probed(&order.id, outcome, self.now, &mut self.changes);
            self.registry.check_invariants();
        }
    }

    /// Goes to the registry's own deadline.
    fn until_deadline(&mut self) -> u64 {
        let at = self.registry.deadline().expect("something is due");
        let ms = at.ns_since(self.now.mono).div_ceil(1_000_000);
        self.pass_ms(ms);
        ms
    }

    fn state(&self, pool: &str, replica: &str) -> Option<String> {
        let status = self.registry.pool_status(&PoolId::new(pool).expect("an id"))?;
        status.replicas.into_iter().find(|r| r.replica_id.as_str() == replica).map(|r| r.state)
    }

    fn reason(&self, pool: &str, replica: &str) -> String {
        let status = self.registry.pool_status(&PoolId::new(pool).expect("an id")).expect("a pool");
        status.replicas.into_iter().find(|r| r.replica_id.as_str() == replica).expect("a replica").reason
    }

    fn generation(&self, pool: &str, replica: &str) -> u64 {
        let status = self.registry.pool_status(&PoolId::new(pool).expect("an id")).expect("a pool");
        status.replicas.iter().find(|r| r.replica_id.as_str() == replica).expect("a replica").generation
    }

    fn file(&self, name: &str) -> (FileState, Option<String>) {
        let view = self.registry.files().find(|file| file.name == name).expect("a file");
        (view.state, view.error.map(str::to_string))
    }

    /// What happened since the last call, as the log would show it.
    fn told(&mut self) -> Vec<String> {
        self.changes.drain(..).map(|change| change.to_string()).collect()
    }
}

#[test]
fn a_handoff_becomes_ready_and_every_step_is_told_once() {
    let mut machine = Machine::new();
    machine.write("a.json", &json("p", "r0", 8081, ""));
    machine.list();
    machine.list();
    assert_eq!(
        machine.told(),
        [
            r#""a.json": accepted for p/r0"#,
            r#"p/r0: found in "a.json""#,
            "p/r0: found -> probing: waiting for its first answer",
        ]
    );
    assert!(matches!(machine.registry.acquire(&key("p", "r0"), None, 1), Err(Refused::NotReady { .. })));
    let revision = machine.registry.revision();
    machine.answer_all(ProbeOutcome::Loading(503));
    let told = machine.told();
    assert!(
        told.len() == 1 && told[0].starts_with("p/r0: still probing") && told[0].contains("503"),
        "{told:?}"
    );
    let status = machine.registry.pool_status(&key("p", "r0").pool).expect("a pool");
    let planned = status.replicas[0].next_probe_at_ms.expect("it is asked again");
    assert_eq!(planned, machine.now.wall.unix_ms() + machine.until_deadline(), "and says when");
    machine.answer_all(ProbeOutcome::Loading(503));
    assert!(machine.told().is_empty(), "the same reason again is no news");
    machine.until_deadline();
    machine.answer_all(ProbeOutcome::Healthy);
    assert_eq!(machine.told(), ["p/r0: probing -> ready: answers its health probe"]);
    assert!(machine.registry.revision() > revision);
    let beats = machine.registry.pool_beats();
    assert_eq!((beats[0].ready, beats[0].slots_free, beats[0].models_available.len()), (true, 4, 1));
    let view = machine.registry.files().next().expect("a file");
    assert_eq!((view.state, view.error, view.replica), (FileState::Accepted, None, Some(key("p", "r0"))));
}

#[test]
fn an_engine_that_is_not_to_be_used_is_known_and_left_alone() {
    let mut machine = Machine::new();
    machine.write("a.json", &json("p", "r0", 8081, r#","ready":false"#));
    machine.list();
    assert_eq!((machine.state("p", "r0").as_deref(), machine.due()), (Some("found"), 0));
    assert_eq!(machine.reason("p", "r0"), "the handoff says ready: false");
    machine.write("a.json", &json("p", "r0", 8081, ""));
    machine.list();
    machine.answer_all(ProbeOutcome::Healthy);
    assert_eq!(machine.state("p", "r0").as_deref(), Some("ready"));
    machine.write("a.json", &json("p", "r0", 8081, r#","ready":false"#));
    machine.list();
    assert_eq!((machine.state("p", "r0").as_deref(), machine.registry.deadline()), (Some("found"), None));
}

#[test]
fn other_details_are_taken_in_place_and_another_engine_starts_anew() {
    let mut machine = Machine::with_ready_engine();
    let generation = machine.generation("p", "r0");
    machine.write("a.json", &json("p", "r0", 8081, r#","slots_total":9,"models":["n"]"#));
    machine.list();
    assert_eq!(machine.state("p", "r0").as_deref(), Some("ready"));
    assert_eq!(machine.generation("p", "r0"), generation);
    assert_eq!(machine.registry.pool_beats()[0].models_available, ["m", "n"]);
    assert_eq!(machine.registry.pool_beats()[0].slots_total, Some(9));

    let lease = machine.registry.acquire(&key("p", "r0"), Some(generation), 2).expect("a slot");
    for (port, change) in
        [(8081, r#","pid":7"#), (8081, r#","pid":7,"generation":3"#), (8082, r#","pid":7,"generation":3"#)]
    {
        let before = machine.generation("p", "r0");
        machine.write("a.json", &json("p", "r0", port, change));
        machine.list();
        assert!(machine.generation("p", "r0") > before, "{change}");
        assert_eq!(machine.state("p", "r0").as_deref(), Some("probing"));
        machine.answer_all(ProbeOutcome::Healthy);
    }
    let current = machine.generation("p", "r0");
    assert_eq!(
        machine.registry.acquire(&key("p", "r0"), Some(generation), 1),
        Err(Refused::StaleGeneration { current: Some(current) })
    );
    assert_eq!(
        machine.registry.pool_beats()[0].slots_free,
        4,
        "the old engine's request is not on the new one"
    );
    assert_eq!(machine.registry.in_flight(), 1, "but it runs");
    machine.registry.release(lease, machine.now, &mut machine.changes);
    assert_eq!(machine.registry.in_flight(), 0);
    machine.registry.check_invariants();
}

#[test]
fn a_vanished_file_lets_requests_finish_and_then_the_replica_goes() {
    let mut machine = Machine::with_ready_engine();
    let lease = machine.registry.acquire(&key("p", "r0"), None, 1).expect("a slot");
    let generation = machine.generation("p", "r0");
    machine.dir.clear();
    machine.list();
    machine.list();
    assert_eq!(machine.told(), ["p/r0: ready -> draining: its handoff file is gone"]);
    assert_eq!(machine.registry.acquire(&key("p", "r0"), None, 1), Err(Refused::Draining));
    assert!(machine.registry.pool_beats()[0].draining);
    machine.registry.release(lease, machine.now, &mut machine.changes);
    assert_eq!(machine.told(), ["p/r0: gone: its handoff file is gone"]);
    assert!(machine.registry.pools().is_empty());
    assert_eq!(machine.registry.acquire(&key("p", "r0"), None, 1), Err(Refused::Unknown));
    // Who knew it is told that it is gone: a control plane asks another one then.
    let gone = Refused::StaleGeneration { current: None };
    assert_eq!(machine.registry.acquire(&key("p", "r0"), Some(generation), 1), Err(gone));
}

#[test]
fn a_file_that_returns_while_requests_run_takes_its_replica_up_again() {
    let mut machine = Machine::with_ready_engine();
    let generation = machine.generation("p", "r0");
    let lease = machine.registry.acquire(&key("p", "r0"), None, 1).expect("a slot");
    let kept = machine.dir.clone();
    machine.dir.clear();
    machine.list();
    machine.dir = kept;
    machine.list();
    assert_eq!(machine.state("p", "r0").as_deref(), Some("probing"), "nobody asked it meanwhile");
    machine.answer_all(ProbeOutcome::Healthy);
    assert_eq!(machine.state("p", "r0").as_deref(), Some("ready"));
    assert_eq!(machine.generation("p", "r0"), generation);
    assert_eq!(machine.registry.pool_beats()[0].slots_free, 3, "the request still occupies its slot");
    machine.registry.release(lease, machine.now, &mut machine.changes);
    assert_eq!(machine.registry.pool_beats()[0].slots_free, 4);
}

#[test]
fn a_file_that_cannot_be_read_keeps_what_it_said_and_is_told_once_a_reason() {
    let mut machine = Machine::with_ready_engine();
    for _ in 0..3 {
        machine.write("a.json", "");
        machine.list();
    }
    let told = machine.told();
    assert_eq!(told.len(), 1, "{told:?}");
    assert!(told[0].contains("empty file") && told[0].contains("p/r0 stays"), "{told:?}");
    assert_eq!(machine.state("p", "r0").as_deref(), Some("ready"));
    assert_eq!(machine.file("a.json").0, FileState::KeepingLastGood);
    machine.write("a.json", "{");
    machine.list();
    assert_eq!(machine.told().len(), 1, "another reason is news");
    machine.write("a.json", r#"{"url":"http://169.254.169.254"}"#);
    machine.list();
    assert!(machine.file("a.json").1.expect("an error").contains("link-local"));
    assert_eq!(machine.state("p", "r0").as_deref(), Some("ready"));
    machine.told();
    machine.write("a.json", &json("p", "r0", 8081, ""));
    machine.list();
    assert_eq!(machine.told(), [r#""a.json": accepted for p/r0"#], "the replica never noticed");
    machine.write("b.json", "");
    machine.list();
    assert_eq!(machine.file("b.json").0, FileState::Refused);
    machine.write("a.json", r#"{"model":{"id":"m"}}"#);
    machine.list();
    assert_eq!((machine.state("p", "r0"), machine.file("a.json").0), (None, FileState::Skipped));
}

#[test]
fn between_two_files_for_a_replica_generation_then_time_then_name_decide() {
    let mut machine = Machine::new();
    let port = |machine: &Machine| machine.registry.handoff(&key("p", "r0")).expect("known").url.port();
    machine.write("b.json", &json("p", "r0", 2, ""));
    machine.write("a.json", &json("p", "r0", 1, ""));
    machine.list();
    assert_eq!(port(&machine), 1, "a tie in everything: first by name");
    assert_eq!(machine.file("b.json").0, FileState::Shadowed);
    machine.pass_ms(5);
    machine.write("b.json", &json("p", "r0", 2, ""));
    machine.list();
    assert_eq!(port(&machine), 2, "written later, though with the same text");
    assert!(machine.file("a.json").1.expect("a reason").contains(r#""b.json" announces p/r0 too"#));
    machine.write("a.json", &json("p", "r0", 1, r#","generation":1"#));
    machine.pass_ms(5);
    machine.write("b.json", &json("p", "r0", 2, ""));
    machine.list();
    assert_eq!(port(&machine), 1, "the higher generation");
    machine.dir.remove("a.json");
    machine.list();
    assert_eq!((port(&machine), machine.file("b.json")), (2, (FileState::Accepted, None)));
}

#[test]
fn outcomes_of_earlier_orders_and_engines_are_ignored() {
    let mut machine = Machine::new();
    machine.write("a.json", &json("p", "r0", 1, ""));
    machine.list();
    machine.due();
    let old_engine = machine.orders.remove(0);
    machine.write("a.json", &json("p", "r0", 2, ""));
    machine.list();
    machine.registry.probed(&old_engine.id, ProbeOutcome::Healthy, machine.now, &mut machine.changes);
    assert_eq!(machine.state("p", "r0").as_deref(), Some("probing"));
    machine.due();
    let lost = machine.orders.remove(0);
    assert_eq!(lost.url.port(), 2);
    assert_eq!(machine.until_deadline(), PROBE_LOST_MS, "one at a time, until it is given up");
    assert_eq!(machine.due(), 1);
    machine.registry.probed(&lost.id, ProbeOutcome::Healthy, machine.now, &mut machine.changes);
    assert_eq!(machine.state("p", "r0").as_deref(), Some("probing"));
    machine.answer_all(ProbeOutcome::Healthy);
    assert_eq!(machine.state("p", "r0").as_deref(), Some("ready"));
}

#[test]
fn a_failed_connection_counts_at_once_and_outdates_the_probe_under_way() {
    let mut machine = Machine::with_ready_engine();
    let generation = machine.generation("p", "r0");
    machine.until_deadline();
    machine.due();
    let (registry, changes, now) = (&mut machine.registry, &mut machine.changes, machine.now);
    registry.data_path_failed(&key("p", "r0"), generation - 1, Fault::ConnectFailed, "old", now, changes);
    assert!(changes.is_empty(), "an earlier engine's failure");
    registry.data_path_failed(&key("p", "r0"), generation, Fault::ConnectFailed, "re\nfused", now, changes);
    assert_eq!(machine.told(), ["p/r0: ready -> suspect: a request could not connect: re fused"]);
    machine.answer_all(ProbeOutcome::Healthy);
    assert_eq!(machine.state("p", "r0").as_deref(), Some("suspect"), "that answer was asked for before");
    machine.until_deadline();
    machine.answer_all(ProbeOutcome::Healthy);
    assert_eq!(machine.state("p", "r0").as_deref(), Some("ready"));
}

#[test]
fn other_faults_only_bring_the_next_probe_forward_and_not_without_end() {
    let mut machine = Machine::with_ready_engine();
    let generation = machine.generation("p", "r0");
    let mut probes = 0;
    for _ in 0..1_000 {
        machine.pass_ms(10);
        let (now, key) = (machine.now, key("p", "r0"));
        machine.registry.data_path_failed(&key, generation, Fault::Broken, "cut", now, &mut machine.changes);
        probes += machine.due();
        machine.answer_all(ProbeOutcome::Healthy);
    }
    assert!((2..=1 + 10_000 / PROBE_GAP_MS as usize).contains(&probes), "{probes} probes in 10 s");
    assert!(machine.told().is_empty(), "it answers its probes: still ready");
}

#[test]
fn a_busy_engine_with_slow_probes_stays_ready_and_an_idle_one_does_not() {
    let mut machine = Machine::with_ready_engine();
    let generation = machine.generation("p", "r0");
    for _ in 0..4 {
        machine.until_deadline();
        machine.due();
        machine.pass_ms(PROBE_TIMEOUT_MS);
        machine.registry.data_path_worked(&key("p", "r0"), generation, machine.now);
        machine.answer_all(ProbeOutcome::Slow);
    }
    assert!(machine.told().is_empty());
    machine.pass_ms(WORKED_MS);
    machine.answer_all(ProbeOutcome::Slow);
    machine.until_deadline();
    machine.answer_all(ProbeOutcome::Slow);
    assert_eq!(machine.told(), ["p/r0: ready -> suspect: /health gave no answer within 5000 ms"]);
}

#[test]
fn slots_are_counted_and_refusals_say_why() {
    let mut machine = Machine::with_ready_engine();
    let all = machine.registry.acquire(&key("p", "r0"), None, 100).expect("more than there are: all");
    assert_eq!(all.slots, 4);
    assert_eq!(machine.registry.acquire(&key("p", "r0"), None, 1), Err(Refused::Full { slots: 4 }));
    machine.registry.release(all, machine.now, &mut machine.changes);
    let revision = machine.registry.revision();
    let three = machine.registry.acquire(&key("p", "r0"), None, 3).expect("three of four");
    assert_eq!(machine.registry.acquire(&key("p", "r0"), None, 2), Err(Refused::Full { slots: 4 }));
    let status = machine.registry.pools().remove(0);
    assert_eq!((status.active_leases, status.slots_free, status.slots_total), (1, 1, 4));
    machine.registry.release(three, machine.now, &mut machine.changes);
    assert_eq!(machine.registry.revision(), revision, "requests alone cause no heartbeats");
}

#[test]
fn beyond_the_limits_the_first_by_name_are_used_and_an_alarm_is_given_once() {
    let mut machine = Machine::new();
    for n in 0..REPLICAS_MAX + 5 {
        machine.write(&format!("r{n:05}.json"), &json("p", &format!("r{n:05}"), 1, ""));
    }
    for n in 0..POOLS_MAX {
        machine.write(&format!("q{n:05}.json"), &json(&format!("q{n:05}"), "r", 1, ""));
    }
    machine.list();
    machine.list();
    let alarms = machine.told().iter().filter(|line| line.contains("more than")).count();
    assert_eq!(alarms, 1);
    let beats = machine.registry.pool_beats();
    assert_eq!(beats.len(), POOLS_MAX);
    assert_eq!(beats[0].replicas.as_ref().map(Vec::len), Some(REPLICAS_MAX));
    assert_eq!(machine.file(&format!("r{:05}.json", REPLICAS_MAX)).0, FileState::Refused);
    assert_eq!(machine.state(&format!("q{:05}", POOLS_MAX - 1), "r"), None);
    machine.dir.remove("r00000.json");
    machine.dir.remove("q00000.json");
    machine.list();
    assert_eq!(
        machine.state("p", &format!("r{REPLICAS_MAX:05}")).as_deref(),
        Some("probing"),
        "one moves up"
    );
    assert_eq!(machine.state(&format!("q{:05}", POOLS_MAX - 1), "r").as_deref(), Some("probing"));
}

#[test]
fn any_number_of_files_for_one_replica_is_one_replica() {
    let mut machine = Machine::new();
    for n in 0..20_000 {
        machine.write(&format!("{n:05}.json"), r#"{"url":"http://127.0.0.1:8081"}"#);
    }
    machine.list();
    assert_eq!(machine.registry.pools().len(), 1);
    assert_eq!(machine.registry.files().filter(|file| file.state == FileState::Shadowed).count(), 19_999);
    machine.dir.clear();
    machine.list();
    assert!(machine.registry.pools().is_empty());
}

#[test]
fn only_so_many_probes_are_under_way() {
    let mut machine = Machine::new();
    for n in 0..PROBES_MAX + 10 {
        machine.write(&format!("{n}.json"), &json("p", &format!("r{n}"), 1, ""));
    }
    machine.list();
    let mut turns = Vec::new();
    loop {
        let started = machine.due();
        assert_eq!(machine.due(), 0, "what a turn may start it has started");
        if started == 0 {
            break;
        }
        turns.push(started);
        machine.now = Now { mono: Mono(machine.now.mono.0 + 1), ..machine.now };
    }
    assert_eq!(turns, vec![PROBES_PER_TURN_MAX; PROBES_MAX / PROBES_PER_TURN_MAX]);
    assert!(machine.registry.deadline().expect("the lost ones") > machine.now.mono, "no spinning meanwhile");
    machine.answer_each(|_| ProbeOutcome::Refused("refused".into()));
    assert_eq!(machine.due(), 10);
}

/// What the directory says, computed in the plainest way.
fn expected(files: &BTreeMap<Arc<str>, (Handoff, Wall)>) -> BTreeMap<ReplicaKey, Handoff> {
    let mut best: BTreeMap<ReplicaKey, &Arc<str>> = BTreeMap::new();
    let rank = |name: &Arc<str>| {
        let (handoff, modified) = &files[name];
        (handoff.generation, *modified, Reverse(name.clone()))
    };
    for (name, (handoff, _)) in files {
        let winner = best.entry(handoff.key()).or_insert(name);
        if rank(winner) < rank(name) {
            *winner = name;
        }
    }
    best.into_iter().map(|(key, name)| (key, files[name].0.clone())).collect()
}

#[derive(Clone, Debug)]
enum Op {
    Write {
        file: u8,
        text: String,
    },
    Remove {
        file: u8,
    },
    /// All at once, in ranges of one name, or name by name.
    List {
        how: u8,
    },
    Pass {
        ms: u64,
    },
    Order,
    Answer {
        which: usize,
        outcome: u8,
    },
    Acquire {
        replica: u8,
        slots: u32,
    },
    Release {
        which: usize,
    },
    Fail {
        replica: u8,
        connect: bool,
    },
    Work {
        replica: u8,
    },
    Drain {
        replica: u8,
        what: u8,
    },
}

fn op() -> impl proptest::strategy::Strategy<Value = Op> {
    use proptest::prelude::*;
    let text =
        (0u8..3, 1u16..4, 0u64..3, 1u32..5, 0u8..12).prop_map(|(replica, port, generation, slots, kind)| {
            match kind {
                0 => String::new(),
                1 => r#"{"model":"only"}"#.to_string(),
                2 => r#"{"url":"http://0.0.0.0:1"}"#.to_string(),
                3 => json("p", &format!("r{replica}"), port, r#","ready":false"#),
                4 => {
                    format!(r#"{{"pool_id":"p","replica_id":"r{replica}","url":"http://127.0.0.1:{port}"}}"#)
                }
                _ => json(
                    "p",
                    &format!("r{replica}"),
                    port,
                    &format!(r#","generation":{generation},"slots_total":{slots}"#),
                ),
            }
        });
    prop_oneof![
        4 => (0u8..4, text).prop_map(|(file, text)| Op::Write { file, text }),
        1 => (0u8..4).prop_map(|file| Op::Remove { file }),
        4 => (0u8..3).prop_map(|how| Op::List { how }),
        2 => (0u64..12_000).prop_map(|ms| Op::Pass { ms }),
        4 => Just(Op::Order),
        5 => (0usize..4, 0u8..9).prop_map(|(which, outcome)| Op::Answer { which, outcome }),
        4 => (0u8..3, 0u32..4).prop_map(|(replica, slots)| Op::Acquire { replica, slots }),
        3 => (0usize..8).prop_map(|which| Op::Release { which }),
        1 => (0u8..3, any::<bool>()).prop_map(|(replica, connect)| Op::Fail { replica, connect }),
        1 => (0u8..3).prop_map(|replica| Op::Work { replica }),
        1 => (0u8..3, 0u8..4).prop_map(|(replica, what)| Op::Drain { replica, what }),
    ]
}

fn outcome(kind: u8) -> ProbeOutcome {
    match kind {
        0..=2 => ProbeOutcome::Healthy,
        3 => ProbeOutcome::Facts(Facts { models: vec!["x".into()], ..Facts::default() }),
        4 => ProbeOutcome::Loading(503),
        5 => ProbeOutcome::Refused("no".into()),
        6 => ProbeOutcome::Slow,
        7 => ProbeOutcome::Unhealthy { status: 404 },
        _ => ProbeOutcome::Broken("no HTTP".into()),
    }
}

/// Follows the changes as a reader of the event log would.
fn follow(story: &mut BTreeMap<ReplicaKey, State>, changes: &mut Vec<Change>) {
    for change in changes.drain(..) {
        match change {
            Change::Found { key, .. } => assert_eq!(story.insert(key, State::Found), None, "found twice"),
            Change::State { key, from, to, .. } => {
                assert_ne!(from, to);
                assert_eq!(story.insert(key, to), Some(from), "states follow each other");
            }
            Change::Gone { key, .. } => assert!(story.remove(&key).is_some(), "gone twice"),
            _ => {}
        }
    }
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(512))]
    /// Whatever happened, with listings missed in between: after one more listing the replicas are
    /// what the directory says, and once the engines answer every one that may be used is ready.
    /// Slots are exact all the way, and the changes alone tell every state.
    #[test]
    fn the_registry_is_a_function_of_the_directory(ops in proptest::collection::vec(op(), 1..120)) {
        let mut machine = Machine::new();
        let mut good: BTreeMap<Arc<str>, (Handoff, Wall)> = BTreeMap::new();
        let mut leases: Vec<ReplicaLease> = Vec::new();
        let mut story = BTreeMap::new();
        let list = |machine: &mut Machine, how: u8, good: &mut BTreeMap<Arc<str>, (Handoff, Wall)>| {
            match how {
                0 => machine.list(),
                _ => machine.list_in_pieces(how == 1),
            }
            good.retain(|name, _| machine.dir.contains_key(name));
            for file in machine.dir.values() {
                match &*file.content {
                    FileContent::Handoff(handoff) if handoff.url.host() == "127.0.0.1" => {
                        good.insert(file.name.clone(), ((**handoff).clone(), file.modified));
                    }
                    FileContent::ModelOnly => { good.remove(&file.name); }
                    _ => {}
                }
            }
        };
        for op in ops {
            let key_of = |replica: u8| key("p", &format!("r{replica}"));
            match op {
                Op::Write { file, text } => machine.write(&format!("{file}.json"), &text),
                Op::Remove { file } => { machine.dir.remove(format!("{file}.json").as_str()); }
                Op::List { how } => list(&mut machine, how, &mut good),
                Op::Pass { ms } => machine.pass_ms(ms),
                Op::Order => { machine.due(); }
                Op::Answer { which, outcome: kind } => if which < machine.orders.len() {
                    let order = machine.orders.remove(which);
                    machine.registry.probed(&order.id, outcome(kind), machine.now, &mut machine.changes);
                }
                Op::Acquire { replica, slots } => {
                    let ready = machine.state("p", &format!("r{replica}")).as_deref() == Some("ready");
                    match machine.registry.acquire(&key_of(replica), None, slots) {
                        Ok(lease) => { proptest::prop_assert!(ready); leases.push(lease); }
                        Err(Refused::Full { .. }) => proptest::prop_assert!(ready),
                        Err(_) => proptest::prop_assert!(!ready),
                    }
                }
                Op::Release { which } => if which < leases.len() {
                    machine.registry.release(leases.remove(which), machine.now, &mut machine.changes);
                }
                Op::Fail { replica, connect } => if let Some(lease) = leases.iter().find(|l| l.key == key_of(replica)) {
                    let fault = if connect { Fault::ConnectFailed } else { Fault::Broken };
                    machine.registry.data_path_failed(&lease.key, lease.serial, fault, "x", machine.now, &mut machine.changes);
                }
                Op::Work { replica } => if let Some(lease) = leases.iter().find(|l| l.key == key_of(replica)) {
                    machine.registry.data_path_worked(&lease.key, lease.serial, machine.now);
                }
                Op::Drain { replica, what } => {
                    let (registry, now, changes) = (&mut machine.registry, machine.now, &mut machine.changes);
                    let key = key_of(replica);
                    match what {
                        0 => registry.drain(&Scope::replica(&key), None, now, changes).is_ok(),
                        1 => registry.resume(&Scope::replica(&key), now, changes),
                        2 => registry.drain(&Scope::pool(&key.pool), None, now, changes).is_ok(),
                        _ => registry.resume(&Scope::pool(&key.pool), now, changes),
                    };
                }
            }
            machine.registry.check_invariants();
            follow(&mut story, &mut machine.changes);
            proptest::prop_assert_eq!(machine.registry.in_flight() as usize, leases.len());
            for pool in machine.registry.pools() {
                for replica in pool.replicas {
                    let key = ReplicaKey { pool: pool.pool_id.clone(), replica: replica.replica_id };
                    let used: u32 = leases.iter().filter(|l| l.key == key && l.serial == replica.generation).map(|l| l.slots).sum();
                    proptest::prop_assert_eq!(replica.slots_free, replica.slots_total.saturating_sub(used));
                    proptest::prop_assert_eq!(story.get(&key).map(|state| state.as_str()), Some(replica.state.as_str()));
                }
            }
            proptest::prop_assert_eq!(story.len(), machine.registry.pools().iter().map(|pool| pool.replicas.len()).sum::<usize>());
        }

        list(&mut machine, 0, &mut good);
        for lease in leases {
            machine.registry.release(lease, machine.now, &mut machine.changes);
        }
        let pool = key("p", "r0").pool;
        machine.registry.resume(&Scope::pool(&pool), machine.now, &mut machine.changes);
        for replica in 0..3 {
            machine.registry.resume(&Scope::replica(&key("p", &format!("r{replica}"))), machine.now, &mut machine.changes);
        }
        machine.orders.clear();
        let healed_at = machine.now.mono;
        while machine.registry.deadline().is_some_and(|at| at.ms_since(healed_at) < PROBE_LOST_MS + READY_INTERVAL_MS) {
            machine.until_deadline();
            machine.answer_all(ProbeOutcome::Healthy);
        }
        machine.registry.check_invariants();
        let expected = expected(&good);
        let known = machine.registry.pools().into_iter().flat_map(|pool| pool.replicas).collect::<Vec<_>>();
        proptest::prop_assert_eq!(known.len(), expected.len());
        for (replica, (key, handoff)) in known.iter().zip(&expected) {
            proptest::prop_assert_eq!(machine.registry.handoff(key), Some(handoff));
            proptest::prop_assert_eq!(replica.state.as_str(), if handoff.ready { "ready" } else { "found" });
        }
        proptest::prop_assert_eq!(machine.registry.in_flight(), 0);
    }
}

#[test]
fn a_held_replica_returns_when_the_last_cause_is_gone() {
    let mut machine = Machine::with_ready_engine();
    let key = key("p", "r0");
    let generation = machine.registry.pool_beats()[0].replicas.as_ref().expect("replicas")[0].generation;
    let state = |machine: &Machine| {
        let status = machine.registry.pool_status(&key.pool).expect("a pool");
        (status.replicas[0].state.clone(), status.replicas[0].reason.clone())
    };
    let hold = |machine: &mut Machine, cause, reason: &str| {
        let Machine { registry, now, changes, .. } = machine;
        registry.hold(&key, generation, cause, reason.into(), *now, changes);
        registry.check_invariants();
    };
    hold(&mut machine, Cause::Gpu, "GPU 0: XID 79");
    hold(&mut machine, Cause::Hung, "silent");
    assert_eq!(state(&machine), ("broken".into(), "GPU 0: XID 79".into()));
    assert!(machine.registry.acquire(&key, None, 1).is_err());
    let let_go = |machine: &mut Machine, generation, cause| {
        let Machine { registry, now, changes, .. } = machine;
        registry.let_go(&key, generation, cause, *now, changes);
        registry.check_invariants();
    };
    let_go(&mut machine, generation, Cause::Gpu);
    assert_eq!(state(&machine), ("broken".into(), "silent".into()));
    let_go(&mut machine, generation - 1, Cause::Hung);
    assert_eq!(state(&machine).0, "broken", "another engine's hold");
    let_go(&mut machine, generation, Cause::Hung);
    assert_eq!(state(&machine).0, "ready");
    // A process that is gone is not asked any more.
    let hold = |machine: &mut Machine, cause| {
        let Machine { registry, now, changes, .. } = machine;
        registry.hold(&key, generation, cause, "process 7 ended".into(), *now, changes);
    };
    hold(&mut machine, Cause::Process);
    assert_eq!(machine.registry.deadline(), None);
    assert!(!machine.registry.pool_status(&key.pool).expect("a pool").live);
    // Another engine behind the same name starts from the beginning.
    machine.write("a.json", &json("p", "r0", 8082, ""));
    machine.list();
    machine.answer_all(ProbeOutcome::Healthy);
    assert_eq!(state(&machine).0, "ready");
}

#[test]
fn a_replica_is_asked_once_its_process_was_found_and_broken_once_it_ended() {
    let mut machine = Machine::new();
    machine.write("a.json", &json("p", "r0", 8081, r#","pid":7"#));
    let listing = Listing::whole(machine.dir.values().cloned().collect());
    machine.registry.listing(&listing, machine.now, &mut machine.changes);
    assert_eq!(machine.due(), 0, "not before its process was looked for");
    machine.look_at_processes(|_| ProcessSeen::Alive);
    machine.answer_all(ProbeOutcome::Healthy);
    assert_eq!(machine.state("p", "r0").as_deref(), Some("ready"));
    let generation = machine.generation("p", "r0");
    let (key, now) = (key("p", "r0"), machine.now);
    let ended = || ProcessSeen::Ended("process 7 ended".into());
    machine.registry.process_seen(&key, generation - 1, ended(), now, &mut machine.changes);
    assert_eq!(machine.state("p", "r0").as_deref(), Some("ready"), "an earlier engine's process");
    let revision = machine.registry.revision();
    machine.registry.process_seen(&key, generation, ended(), now, &mut machine.changes);
    assert_eq!(machine.state("p", "r0").as_deref(), Some("broken"));
    assert_eq!(machine.reason("p", "r0"), "process 7 ended");
    assert!(machine.registry.revision() > revision, "heartbeats carry it at once");
    assert_eq!(machine.registry.deadline(), None, "what answers on its port now is not it");
    // Its successor is another engine.
    machine.write("a.json", &json("p", "r0", 8081, r#","pid":8"#));
    machine.list();
    machine.answer_all(ProbeOutcome::Healthy);
    assert_eq!(machine.state("p", "r0").as_deref(), Some("ready"));
    // Where nobody can tell, probes decide.
    machine.write("b.json", &json("p", "r1", 8082, r#","pid":9"#));
    let listing = Listing::whole(machine.dir.values().cloned().collect());
    machine.registry.listing(&listing, machine.now, &mut machine.changes);
    machine.look_at_processes(|_| ProcessSeen::Unknown("elsewhere".into()));
    machine.answer_all(ProbeOutcome::Healthy);
    assert_eq!(machine.state("p", "r1").as_deref(), Some("ready"));
}

#[test]
fn an_adopted_handoff_outlives_its_file_and_ends_with_its_process() {
    let mut machine = Machine::new();
    machine.write("a.json", &json("p", "r0", 8081, r#","pid":7,"generation":5"#));
    machine.list();
    machine.answer_all(ProbeOutcome::Healthy);
    let key = key("p", "r0");
    let handoff = machine.registry.handoff(&key).cloned().expect("a handoff");
    let generation = machine.generation("p", "r0");
    machine.changes.clear();
    let Machine { registry, now, changes, .. } = &mut machine;
    registry.adopt(Arc::new(handoff), *now, changes).expect("allowed");
    machine.dir.clear();
    machine.list();
    assert!(machine.told().is_empty(), "the file's removal is no news");
    assert_eq!(machine.generation("p", "r0"), generation);
    assert_eq!(machine.state("p", "r0").as_deref(), Some("ready"));
    // An older file does not displace it, a newer one does, and a file without generations wins over none.
    machine.write("old.json", &json("p", "r0", 8090, r#","generation":4"#));
    machine.list();
    assert_eq!(machine.file("old.json").0, FileState::Shadowed);
    assert_eq!(machine.generation("p", "r0"), generation);
    machine.write("new.json", &json("p", "r0", 8091, r#","generation":6"#));
    machine.list();
    assert_eq!(machine.file("new.json").0, FileState::Accepted);
    assert!(machine.generation("p", "r0") > generation);
    machine.dir.clear();
    machine.list();
    assert_eq!(machine.registry.handoff(&key).map(|handoff| handoff.url.port()), Some(8081));
    let (generation, now) = (machine.generation("p", "r0"), machine.now);
    let ended = ProcessSeen::Ended("process 7 ended".into());
    machine.registry.process_seen(&key, generation, ended, now, &mut machine.changes);
    machine.registry.check_invariants();
    assert_eq!(machine.state("p", "r0"), None, "nothing stands behind it any more");
    assert!(machine.registry.all_adopted().is_empty());
}
