//! The GPUs' state, driven by readings, XIDs and the time.

use super::gpu::SAME_XID_MS;
use super::xid::{Pci, Source};
use super::*;
use crate::wire::id::{PoolId, ReplicaId};

const START: Now = Now { mono: Mono(1_000_000_000), wall: Wall(1_700_000_000_000_000_000) };
const MIB: u64 = 1 << 20;

/// Sound values of GPU `n`: the bus is `0x10 + n`, the memory 1000 MiB with 100 * n MiB taken.
fn sound(n: u8) -> Values {
    let used_bytes = 100 * MIB * u64::from(n);
    Values {
        uuid: format!("GPU-{n}{n}{n}{n}"),
        pci: Some(pci(n)),
        name: "Test".into(),
        memory: Some(Memory { total_bytes: 1000 * MIB, used_bytes, free_bytes: 1000 * MIB - used_bytes }),
        compute_capability: Some("9.0".into()),
        ..Values::default()
    }
}

fn pci(n: u8) -> Pci {
    Pci { domain: 0, bus: 0x10 + n, device: 0 }
}

fn xid(n: u8, number: u32, source: Source) -> Report {
    Report::Xid(Xid { pci: pci(n), number, detail: String::new(), source })
}

fn lost() -> Trouble {
    Trouble { is_lost: true, reason: "fell off the bus".into() }
}

fn missing() -> Unavailable {
    Unavailable { is_missing: true, reason: "no library".into() }
}

/// A machine: its GPUs, its replicas, and what was said about them.
struct Machine {
    gpus: Gpus,
    now: Now,
    replicas: Vec<(ReplicaKey, u64, Option<String>, Option<u32>)>,
    held: BTreeMap<String, String>,
    happenings: Vec<Happening>,
}

impl Machine {
    fn new() -> Machine {
        let (gpus, held) = (Gpus::new(START), BTreeMap::new());
        Machine { gpus, now: START, replicas: Vec::new(), held, happenings: Vec::new() }
    }

    /// Two sound GPUs, and the replicas `r0` on the first, `r1` on the second, `both`, `none`.
    fn with_two() -> Machine {
        let mut machine = Machine::new();
        for (name, mask) in [("r0", Some("0")), ("r1", Some("GPU1")), ("both", Some("0,1")), ("none", None)] {
            machine.replica(name, mask, None);
        }
        machine.list(vec![Ok(sound(0)), Ok(sound(1))]);
        machine.happenings.clear();
        machine
    }

    fn replica(&mut self, name: &str, mask: Option<&str>, pid: Option<u32>) {
        let key = ReplicaKey {
            pool: PoolId::new("p").expect("an id"),
            replica: ReplicaId::new(name).expect("an id"),
        };
        self.replicas.retain(|(known, ..)| *known != key);
        self.replicas.push((key, 1, mask.map(str::to_string), pid));
        self.bind();
    }

    fn report(&mut self, report: Report) {
        let before = self.gpus.revision();
        self.gpus.report(report, self.now, &mut self.happenings);
        // The core looks only where the revision has grown.
        if self.gpus.revision() != before {
            self.bind();
        }
        let unseen = self.bound();
        assert!(unseen.is_empty(), "the revision hides {unseen:?}");
    }

    fn bind(&mut self) {
        for verdict in self.bound() {
            let name = verdict.key.replica.to_string();
            match verdict.hold {
                Some(why) => self.held.insert(name, why),
                None => self.held.remove(&name),
            };
        }
    }

    fn bound(&mut self) -> Vec<Verdict> {
        let engines = self.replicas.iter().map(|(key, generation, mask, pid)| Engine {
            key,
            generation: *generation,
            mask: mask.as_deref(),
            pid: *pid,
        });
        self.gpus.bind(engines, &mut self.happenings)
    }

    fn read(&mut self, driver: Result<DriverReading, Unavailable>) {
        self.now = self.now.plus_ms(10_000);
        let next_at = self.now.mono.plus_ms(10_000);
        self.report(Report::Reading(Reading { driver, next_at, next_opens: false }));
    }

    fn list(&mut self, gpus: Vec<Result<Values, Trouble>>) {
        let gpus = gpus.into_iter().enumerate().map(|(n, found)| (n as u32, found)).collect();
        self.read(Ok(DriverReading { version: Some("550.1".into()), gpus }));
    }

    fn held(&self) -> Vec<&str> {
        self.held.keys().map(String::as_str).collect()
    }

    fn states(&self) -> Vec<(u32, &'static str)> {
        self.gpus.gpus.iter().map(|gpu| (gpu.index, gpu.state().as_str())).collect()
    }

    fn warnings(&mut self) -> Vec<String> {
        let warnings = self.happenings.iter().filter(|happening| happening.is_warning);
        let texts = warnings.map(|happening| happening.text.clone()).collect();
        self.happenings.clear();
        texts
    }

    fn memory(&self) -> Memory {
        self.gpus.memory_of(&PoolId::new("p").expect("an id"))
    }
}

#[test]
fn a_fault_takes_out_its_replicas_and_only_those_until_an_operator_clears_it() {
    let mut machine = Machine::with_two();
    machine.report(xid(1, 79, Source::KernelLog));
    assert_eq!((machine.held(), machine.states()), (vec!["both", "r1"], vec![(0, "ok"), (1, "faulty")]));
    assert!(machine.held["r1"].contains("GPU 1 is faulty: XID 79 (the GPU has fallen off the bus)"));
    assert_eq!(machine.warnings().len(), 1);
    machine.replica("later", Some("1"), None);
    assert_eq!(machine.held(), ["both", "later", "r1"]);
    machine.list(vec![Ok(sound(0)), Ok(sound(1))]);
    assert_eq!(machine.held().len(), 3, "memory that reads well is no sign of health");
    machine.report(xid(1, 48, Source::KernelLog));
    assert!(machine.held["r1"].ends_with(", then XID 48"), "{:?}", machine.held);

    let id = machine.gpus.find("1").expect("it is there");
    machine.gpus.clear(id, machine.now, &mut machine.happenings);
    machine.bind();
    assert_eq!((machine.held().len(), machine.states()[1]), (0, (1, "ok")));
}

#[test]
fn a_programs_mistake_is_only_noted() {
    let mut machine = Machine::with_two();
    machine.report(xid(1, 31, Source::KernelLog));
    assert!(machine.held.is_empty() && machine.states()[1].1 == "ok");
    assert!(machine.happenings.iter().any(|h| h.state == "xid" && h.subject == "1" && !h.is_warning));
    assert_eq!(machine.gpus.to_json()["gpus"][1]["xids"]["31"], 1);
}

#[test]
fn the_same_xid_from_both_sources_counts_once() {
    let mut machine = Machine::with_two();
    let count = |machine: &Machine| machine.gpus.to_json()["gpus"][0]["xids"]["43"].as_u64();
    machine.report(xid(0, 43, Source::KernelLog));
    machine.report(xid(0, 43, Source::Nvml));
    assert_eq!(count(&machine), Some(1));
    machine.report(xid(0, 43, Source::Nvml));
    assert_eq!(count(&machine), Some(2), "each telling has one counterpart");
    machine.now = machine.now.plus_ms(SAME_XID_MS + 1);
    machine.report(xid(0, 43, Source::KernelLog));
    assert_eq!(count(&machine), Some(3), "later it is another one");
    machine.report(xid(0, 43, Source::KernelLog));
    assert_eq!(count(&machine), Some(4), "one source tells each time");
}

#[test]
fn an_xid_before_the_first_reading_counts_when_its_gpu_is_known() {
    let mut machine = Machine::new();
    machine.replica("r1", Some("1"), None);
    machine.report(xid(1, 79, Source::KernelLog));
    assert!(machine.held.is_empty() && machine.warnings()[0].contains("no GPU is known"));
    machine.list(vec![Ok(sound(0)), Ok(sound(1))]);
    assert_eq!((machine.held(), machine.states()[1].1), (vec!["r1"], "faulty"));
}

#[test]
fn a_lost_gpu_returns_by_itself_and_then_its_fault_is_over_too() {
    let mut machine = Machine::with_two();
    machine.report(xid(1, 79, Source::KernelLog));
    machine.list(vec![Ok(sound(0)), Err(lost())]);
    assert_eq!(machine.states(), [(0, "ok"), (1, "lost")]);
    assert!(machine.held["r1"].contains("lost: fell off the bus; XID 79"), "{:?}", machine.held);
    assert_eq!(machine.memory().total_bytes, 1000 * MIB, "what is lost has no memory");
    assert_eq!((machine.gpus.capabilities().len(), machine.gpus.loads().len()), (1, 1));
    machine.list(vec![Ok(sound(0)), Ok(sound(1))]);
    assert_eq!((machine.held().len(), machine.states()), (0, vec![(0, "ok"), (1, "ok")]));
    assert_eq!((machine.memory().free_bytes, machine.gpus.capabilities().len()), (1900 * MIB, 2));
}

/// The numbers of the others move up: masks that were settled go on meaning the same GPUs.
#[test]
fn a_gpu_that_vanishes_takes_nobody_elses_replicas() {
    let mut machine = Machine::with_two();
    machine.list(vec![Ok(sound(1))]);
    assert_eq!(machine.states(), [(0, "ok"), (0, "lost")]);
    assert_eq!(machine.held(), ["both", "r0"]);
    machine.replica("new", Some("0"), None);
    assert_eq!(machine.held(), ["both", "r0"], "a new engine means the numbers of now");
    let uuids = |machine: &Machine| -> Vec<String> {
        machine.gpus.gpus.iter().map(|gpu| gpu.uuid().expect("read").to_string()).collect()
    };
    assert_eq!(uuids(&machine), ["GPU-1111", "GPU-0000"]);

    let gone = machine.gpus.find("gpu-0000").expect("by its id");
    machine.gpus.clear(gone, machine.now, &mut machine.happenings);
    machine.bind();
    assert_eq!((uuids(&machine).len(), machine.held().len()), (1, 0), "forgotten on request");
    machine.list(vec![Ok(sound(0)), Ok(sound(1))]);
    assert_eq!(machine.states(), [(0, "ok"), (1, "ok")]);
}

#[test]
fn a_passing_trouble_holds_nobody() {
    let mut machine = Machine::with_two();
    machine.list(vec![Ok(sound(0)), Err(Trouble { is_lost: false, reason: "busy".into() })]);
    assert_eq!((machine.states()[1].1, machine.held().len()), ("unreadable", 0));
    assert_eq!(machine.warnings().len(), 1);
    machine.list(vec![Ok(sound(0)), Ok(sound(1))]);
    assert_eq!(machine.states()[1].1, "ok");
}

#[test]
fn a_driver_that_is_away_holds_nobody_and_one_that_was_reloaded_has_no_faults() {
    let mut machine = Machine::with_two();
    machine.report(xid(0, 119, Source::Nvml));
    assert_eq!(machine.held(), ["both", "r0"]);
    let mismatch = Unavailable { is_missing: false, reason: "version mismatch".into() };
    for _ in 0..3 {
        machine.read(Err(mismatch.clone()));
    }
    assert_eq!(machine.warnings().len(), 2, "the fault, and the driver once");
    machine.list(vec![Ok(sound(0)), Ok(sound(1))]);
    assert_eq!(machine.held().len(), 2, "it was away, not reloaded");
    machine.read(Err(missing()));
    assert_eq!(machine.states(), [(0, "faulty"), (1, "ok")]);
    machine.list(vec![Ok(sound(0)), Ok(sound(1))]);
    assert_eq!(machine.held().len(), 0);
}

#[test]
fn no_driver_is_no_trouble_and_no_reason_to_warn_about_masks() {
    let mut machine = Machine::new();
    machine.replica("r0", Some("0"), None);
    for _ in 0..3 {
        machine.read(Err(missing()));
    }
    assert!(machine.held.is_empty());
    assert_eq!((machine.happenings.len(), machine.warnings().len()), (1, 0));
    let json = machine.gpus.to_json();
    assert_eq!((&json["driver"]["state"], &json["count"]), (&"missing".into(), &0.into()));
    assert_eq!(json["unmapped"][0]["reason"], "no GPU is known: no library");
}

#[test]
fn a_mask_that_names_no_gpu_is_warned_about_once() {
    let mut machine = Machine::with_two();
    machine.replica("odd", Some("0,7"), None);
    machine.list(vec![Ok(sound(0)), Ok(sound(1))]);
    machine.list(vec![Ok(sound(0))]);
    let warnings = machine.warnings();
    assert_eq!(warnings.iter().filter(|text| text.contains("p/odd")).count(), 1, "{warnings:?}");
    assert!(!machine.held().contains(&"odd"), "{:?}", machine.held);
    assert_eq!(machine.gpus.to_json()["unmapped"][0]["replica_id"], "odd");
    machine.report(xid(0, 79, Source::KernelLog));
    assert!(machine.held().contains(&"odd"), "what it names rightly counts");
}

#[test]
fn without_a_mask_the_processes_tell_and_those_of_nobody_are_orphans() {
    let mut machine = Machine::with_two();
    machine.replica("plain", None, Some(10));
    let process =
        |pid, ancestors: &[u32]| Process { pid, ancestors: ancestors.to_vec(), ..Process::default() };
    let mut second = sound(1);
    second.processes = vec![process(12, &[11, 10]), process(99, &[98])];
    machine.list(vec![Ok(sound(0)), Ok(second)]);
    let json = machine.gpus.to_json();
    let gpu = &json["gpus"][1];
    assert_eq!(
        (&gpu["processes"][0]["replica_id"], &gpu["orphans"][0]["pid"]),
        (&"plain".into(), &99.into())
    );
    assert_eq!(
        (gpu["orphans"].as_array().map(Vec::len), json["gpus"][0]["orphans"][0].is_null()),
        (Some(1), true)
    );
    machine.list(vec![Ok(sound(0)), Err(lost())]);
    assert!(machine.held().contains(&"plain"), "where it was counts when the GPU is gone");
}

#[test]
fn a_reading_that_takes_too_long_is_reported_once_and_recovered_from() {
    let mut machine = Machine::with_two();
    let begins = machine.now.mono.plus_ms(10_000);
    let limit = machine.gpus.deadline().expect("watched");
    assert_eq!(limit, begins.plus_ms(READING_LIMIT_MS));
    let mut at = |ms| {
        machine.now = machine.now.plus_ms(ms);
        machine.gpus.tick(machine.now, &mut machine.happenings);
        machine.gpus.driver.state
    };
    assert_eq!(
        (at(14_999), at(1), at(60_000)),
        (DriverState::Ok, DriverState::Hanging, DriverState::Hanging)
    );
    assert_eq!((machine.warnings().len(), machine.gpus.deadline()), (1, None), "nothing to wait for");
    assert!(machine.held.is_empty());
    let json = machine.gpus.to_json();
    assert_eq!(json["driver"]["since_ms"], (START.plus_ms(20_000)).wall.unix_ms());
    machine.list(vec![Ok(sound(0)), Ok(sound(1))]);
    assert_eq!(machine.gpus.driver.state, DriverState::Ok);
    assert!(machine.gpus.deadline() > Some(machine.now.mono));
}

#[test]
fn more_gpus_than_any_machine_has_are_not_taken() {
    let mut machine = Machine::new();
    let many = |n: u8| Values { uuid: format!("GPU-{n}"), pci: None, ..sound(0) };
    for _ in 0..2 {
        machine.list((0..=GPUS_MAX as u8).map(|n| Ok(many(n))).collect());
    }
    assert_eq!((machine.gpus.gpus.len(), machine.warnings().len()), (GPUS_MAX, 1));
}

/// One thing that may happen to a machine with three GPUs.
#[derive(Clone, Debug)]
enum Op {
    List(Vec<u8>),
    Xid(u8, u32),
    Away(bool),
    Clear(u32),
    Wait(u64),
}

fn op() -> impl proptest::strategy::Strategy<Value = Op> {
    use proptest::prelude::*;
    prop_oneof![
        // 0: not listed, 1: sound, 2: lost, 3: unreadable.
        4 => proptest::collection::vec(0u8..4, 3).prop_map(Op::List),
        3 => (0u8..4, proptest::sample::select(vec![13u32, 31, 48, 79, 154])).prop_map(|(n, x)| Op::Xid(n, x)),
        1 => proptest::bool::ANY.prop_map(Op::Away),
        1 => (0u32..4).prop_map(Op::Clear),
        1 => (0u64..40_000).prop_map(Op::Wait),
    ]
}

proptest::proptest! {
    /// Whatever happens: a replica is held exactly while a GPU of its own is lost or faulty; and when
    /// all is well again and cleared, nobody is held and every GPU is there once.
    #[test]
    fn holds_follow_the_gpus(ops in proptest::collection::vec(op(), 0..60)) {
        let mut machine = Machine::new();
        for n in 0..3 {
            machine.replica(&format!("r{n}"), Some(&format!("GPU-{n}{n}{n}{n}")), None);
        }
        for op in ops {
            match op {
                Op::List(kinds) => {
                    let kinds = (0u8..).zip(kinds).filter(|(_, kind)| *kind != 0);
                    machine.list(kinds.map(|(n, kind)| match kind {
                        1 => Ok(sound(n)),
                        kind => Err(Trouble { is_lost: kind == 2, reason: "trouble".into() }),
                    }).collect());
                }
                Op::Xid(n, number) => machine.report(xid(n, number, Source::KernelLog)),
                Op::Away(is_missing) => machine.read(Err(Unavailable { is_missing, reason: "away".into() })),
                Op::Clear(n) => {
                    if let Some(id) = machine.gpus.find(&n.to_string()) {
                        machine.gpus.clear(id, machine.now, &mut machine.happenings);
                        machine.bind();
                    }
                }
                Op::Wait(ms) => {
                    machine.now = machine.now.plus_ms(ms);
                    machine.gpus.tick(machine.now, &mut machine.happenings);
                    machine.bind();
                }
            }
            for n in 0..3 {
                let gpu = machine.gpus.gpus.iter().find(|gpu| gpu.uuid() == Some(&format!("GPU-{n}{n}{n}{n}")));
                let is_out = gpu.is_some_and(|gpu| gpu.state().is_out());
                proptest::prop_assert_eq!(machine.held.contains_key(&format!("r{n}")), is_out);
            }
            proptest::prop_assert!(machine.gpus.to_json()["gpus"].is_array());
        }
        machine.list((0..3).map(|n| Ok(sound(n))).collect());
        for n in 0..3 {
            let id = machine.gpus.find(&n.to_string()).expect("listed");
            machine.gpus.clear(id, machine.now, &mut machine.happenings);
        }
        machine.bind();
        proptest::prop_assert_eq!(machine.states(), vec![(0, "ok"), (1, "ok"), (2, "ok")]);
        proptest::prop_assert!(machine.held.is_empty());
    }
}
