//! Drains against a registry with ready engines, in virtual time.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::replicas::{
    AllowList, EnginePolicy, FileContent, ListedFile, ProbeOutcome, Refused, ReplicaLease, State,
};
use crate::wire::handoff::{HandoffFile, parse};
use crate::wire::id::{PoolId, ReplicaId};

const START: Now = Now { mono: Mono(77_000_000_000), wall: Wall(1_700_000_000_000_000_000) };
/// No leases to be cut.
const NOTHING: [u64; 0] = [];
/// `(pool, replica, GPUs)`; the last one has no GPU.
const REPLICAS: [(&str, &str, &str); 4] =
    [("a", "r0", "0"), ("a", "r1", "GPU1"), ("b", "r0", "0,1"), ("b", "r1", "")];

struct Machine {
    registry: Registry,
    now: Now,
    changes: Vec<Change>,
}

fn key(pool: &str, replica: &str) -> ReplicaKey {
    ReplicaKey { pool: PoolId::new(pool).expect("an id"), replica: ReplicaId::new(replica).expect("an id") }
}

fn file(pool: &str, replica: &str, gpus: &str) -> ListedFile {
    let mask = if gpus.is_empty() { String::new() } else { format!(r#","device_mask":"{gpus}""#) };
    let text = format!(
        r#"{{"pool_id":"{pool}","replica_id":"{replica}","url":"http://127.0.0.1:1","slots":8,"model":"m"{mask}}}"#
    );
    let HandoffFile::Engine(handoff) = parse(text.as_bytes()).expect("a handoff") else { panic!("a URL") };
    let name = format!("{pool}-{replica}.json").into();
    ListedFile { name, modified: START.wall, content: Arc::new(FileContent::Handoff(handoff.into())) }
}

impl Machine {
    fn with(replicas: &[(&str, &str, &str)]) -> Machine {
        let policy = EnginePolicy::new(Vec::new(), None, AllowList::default(), "ALLOW");
        let mut machine = Machine { registry: Registry::new(policy, 1_000), now: START, changes: Vec::new() };
        machine.announce(replicas);
        machine.changes.clear();
        machine
    }

    fn announce(&mut self, replicas: &[(&str, &str, &str)]) {
        let files: Vec<ListedFile> = replicas.iter().map(|(p, r, gpus)| file(p, r, gpus)).collect();
        self.registry.listing(&crate::replicas::Listing::whole(files), self.now, &mut self.changes);
        // Its health, then what it serves.
        for _ in 0..2 {
            let mut orders = Vec::new();
            self.registry.due_probes(self.now, &mut orders);
            for order in orders {
                self.registry.probed(&order.id, ProbeOutcome::Healthy, self.now, &mut self.changes);
            }
        }
        self.registry.check_invariants();
    }

    fn drain(&mut self, scope: &Scope, deadline_ms: Option<u64>) {
        self.registry.drain(scope, deadline_ms, self.now, &mut self.changes).expect("there is room");
        self.registry.check_invariants();
    }

    fn resume(&mut self, scope: &Scope) -> bool {
        let was = self.registry.resume(scope, self.now, &mut self.changes);
        self.registry.check_invariants();
        was
    }

    fn acquire(&mut self, pool: &str, replica: &str) -> Result<ReplicaLease, Refused> {
        self.registry.acquire(&key(pool, replica), None, 1)
    }

    fn release(&mut self, lease: ReplicaLease) {
        self.registry.release(lease, self.now, &mut self.changes);
        self.registry.check_invariants();
    }

    /// Passes time as a daemon does: to each deadline on the way. Returns the leases to cut.
    fn pass_ms(&mut self, ms: u64) -> Vec<u64> {
        let end = self.now.plus_ms(ms);
        let mut cut = Vec::new();
        while let Some(at) = self.registry.drain_deadline().filter(|at| *at <= end.mono) {
            self.now = self.now.plus_ms(at.ns_since(self.now.mono).div_ceil(1_000_000));
            cut.extend(self.registry.expire_drains(self.now, &mut self.changes));
            self.registry.check_invariants();
        }
        self.now = end;
        cut
    }

    fn drains_told(&mut self) -> Vec<DrainChange> {
        let drains = self.changes.drain(..).filter_map(|change| match change {
            Change::Drain(change) => Some(change),
            _ => None,
        });
        drains.collect()
    }

    fn status(&self, scope: &Scope) -> DrainStatus {
        self.registry.drain_status(scope).expect("it is drained")
    }
}

#[test]
fn masks_are_read_as_people_write_them() {
    for (mask, gpus) in [
        ("0", &[0][..]),
        ("0,1", &[0, 1]),
        ("GPU0,GPU1", &[0, 1]),
        (" gpu-3 ; cuda:2, 2", &[3, 2]),
        ("", &[]),
        ("GPU-8f3e1c5a-0000-1111-2222-333344445555", &[]),
        ("all", &[]),
        ("-1,+2,4294967296", &[1]),
        ("GPU", &[]),
    ] {
        assert_eq!(gpu_indices(mask), gpus, "{mask}");
    }
    assert!(gpu_indices(&"7,".repeat(100_000)).len() <= MASK_GPUS_MAX);
}

#[test]
fn each_scope_covers_its_replicas_and_those_that_come_later() {
    let node = Scope::Node;
    let of = |scope: Scope, covered: &[usize]| (scope, covered.to_vec());
    for (scope, covered) in [
        of(node, &[0, 1, 2, 3]),
        of(Scope::Gpu { index: 0 }, &[0, 2]),
        of(Scope::Gpu { index: 1 }, &[1, 2]),
        of(Scope::Gpu { index: 7 }, &[]),
        of(Scope::pool(&key("b", "r0").pool), &[2, 3]),
        of(Scope::replica(&key("a", "r1")), &[1]),
    ] {
        for later in [false, true] {
            let mut machine = Machine::with(if later { &[] } else { &REPLICAS });
            machine.drain(&scope, None);
            machine.announce(&REPLICAS);
            for (index, (pool, replica, _)) in REPLICAS.iter().enumerate() {
                let taken = machine.acquire(pool, replica);
                let refused = matches!(taken, Err(Refused::Draining));
                assert_eq!(refused, covered.contains(&index), "{scope}: {pool}/{replica}, later: {later}");
                if let Ok(lease) = taken {
                    machine.release(lease);
                }
            }
            assert!(machine.resume(&scope) && !machine.resume(&scope));
            assert!(
                machine.registry.pools().iter().flat_map(|pool| &pool.replicas).all(|r| r.ready),
                "{scope}"
            );
        }
    }
}

#[test]
fn a_gpu_that_a_handoff_names_later_counts_from_then_on() {
    let mut machine = Machine::with(&[("a", "r0", "0")]);
    machine.drain(&Scope::Gpu { index: 1 }, None);
    let lease = machine.acquire("a", "r0").expect("it is on GPU 0");
    machine.announce(&[("a", "r0", "1")]);
    assert_eq!(machine.acquire("a", "r0"), Err(Refused::Draining));
    assert_eq!(machine.status(&Scope::Gpu { index: 1 }).in_flight, 0, "the request began on GPU 0");
    machine.release(lease);
    machine.announce(&[("a", "r0", "0")]);
    machine.acquire("a", "r0").map(|lease| machine.release(lease)).expect("it is on GPU 0 again");
}

#[test]
fn progress_counts_what_ran_when_the_drain_began() {
    let mut machine = Machine::with(&REPLICAS);
    let leases: Vec<ReplicaLease> = ["r0", "r0", "r1"].map(|r| machine.acquire("a", r).expect("free")).into();
    let other = machine.acquire("b", "r1").expect("free");
    let pool = Scope::pool(&key("a", "r0").pool);
    machine.drain(&pool, None);
    assert_eq!((machine.status(&pool).in_flight, machine.status(&pool).drained), (3, false));
    assert_eq!(machine.registry.drain_deadline(), None, "no deadline, no timer");
    assert_eq!(machine.pass_ms(500), NOTHING);
    for lease in leases {
        assert!(!machine.status(&pool).drained);
        machine.release(lease);
    }
    let status = machine.status(&pool);
    assert_eq!((status.in_flight, status.drained, status.finished, status.cut), (0, true, 3, 0));
    assert_eq!(status.drained_at_ms, Some(machine.now.wall.unix_ms()));
    let told: Vec<String> = machine.drains_told().iter().map(ToString::to_string).collect();
    assert_eq!(
        told,
        [
            "pool a: drain began: 3 requests run, no deadline",
            "pool a: drained after 500 ms: 3 requests ended by themselves, 0 were cut"
        ]
    );
    machine.release(other);
}

#[test]
fn at_the_deadline_what_runs_is_cut_once() {
    let mut machine = Machine::with(&REPLICAS);
    let (a, b) = (machine.acquire("a", "r0").expect("free"), machine.acquire("b", "r0").expect("free"));
    let gpu = Scope::Gpu { index: 0 };
    machine.drain(&gpu, Some(1_000));
    machine.drain(&Scope::pool(&key("a", "r0").pool), Some(400));
    machine.drain(&Scope::pool(&key("a", "r0").pool), Some(2_000));
    assert_eq!(machine.pass_ms(999), NOTHING);
    let id = b.id;
    machine.release(a);
    assert_eq!(machine.pass_ms(10_000), [id]);
    let status = machine.status(&gpu);
    assert!(status.overdue && !status.drained);
    machine.release(b);
    let status = machine.status(&gpu);
    assert_eq!((status.overdue, status.drained, status.finished, status.cut), (false, true, 1, 1));
    let events: Vec<&str> = machine.drains_told().iter().map(|change| change.what.as_str()).collect();
    assert_eq!(events, ["began", "began", "moved", "drained", "cut", "drained"]);
}

#[test]
fn a_request_that_ended_before_it_could_be_cut_is_not_counted_as_cut() {
    let mut machine = Machine::with(&REPLICAS);
    let lease = machine.acquire("a", "r0").expect("free");
    machine.drain(&Scope::Node, Some(100));
    assert_eq!(machine.pass_ms(100), [lease.id]);
    machine.registry.cut_came_too_late(&lease);
    machine.release(lease);
    let status = machine.status(&Scope::Node);
    assert_eq!((status.finished, status.cut, status.drained), (1, 0, true));
}

#[test]
fn another_deadline_for_a_drain_that_was_cut_is_kept_too() {
    let mut machine = Machine::with(&REPLICAS);
    let lease = machine.acquire("a", "r0").expect("free");
    machine.drain(&Scope::Node, Some(0));
    assert_eq!(machine.pass_ms(0), [lease.id], "no time at all");
    machine.drain(&Scope::Node, Some(5_000));
    assert_eq!(machine.pass_ms(6_000), NOTHING, "it is being cut already");
    machine.release(lease);
    assert_eq!(machine.registry.drain_deadline(), None);
}

#[test]
fn a_shutdown_is_told_like_a_drain_but_never_resumed_nor_kept() {
    let mut machine = Machine::with(&REPLICAS);
    machine.drain(&Scope::Shutdown, Some(10));
    assert!(!machine.resume(&Scope::Shutdown));
    assert_eq!(machine.acquire("a", "r0"), Err(Refused::Draining));
    assert_eq!(machine.registry.export_drains(), []);
}

#[test]
fn the_ledger_is_bounded_and_makes_room_of_what_no_longer_exists() {
    let mut machine = Machine::with(&REPLICAS);
    for index in 0..u32::try_from(DRAINS_MAX - 1).expect("small") {
        machine.drain(&Scope::Gpu { index }, None);
    }
    let gone = Scope::replica(&key("a", "gone"));
    machine.drain(&gone, None);
    let pool = Scope::pool(&key("a", "r0").pool);
    machine.drain(&pool, None);
    assert_eq!(machine.registry.drain_status(&gone), None, "its room was needed");
    let refused = machine.registry.drain(&Scope::Node, None, machine.now, &mut machine.changes);
    assert_eq!((refused, machine.registry.can_drain(&Scope::Node)), (Err(TooManyDrains), Err(TooManyDrains)));
    machine.drain(&pool, Some(5));
    machine.drain(&Scope::Shutdown, Some(5));
    assert_eq!(machine.registry.drains().count(), DRAINS_MAX + 1, "a shutdown always finds room");
    assert_eq!(machine.registry.export_drains().len(), DRAINS_MAX);
}

#[test]
fn drains_survive_a_restart_with_their_wall_clock() {
    let mut before = Machine::with(&REPLICAS);
    let gpu = Scope::Gpu { index: 1 };
    before.drain(&Scope::Node, None);
    before.drain(&gpu, Some(60_000));
    let revision = before.registry.drains_revision();
    let kept = before.registry.export_drains();
    let text = serde_json::to_string(&kept).expect("JSON");
    let kept: Vec<StoredDrain> = serde_json::from_str(&text).expect("the same");

    let mut after = Machine::with(&[]);
    // Another boot: the monotonic clock begins anew, the wall clock goes on.
    after.now = Now { mono: Mono(5), wall: before.now.plus_ms(10_000).wall };
    after.registry.restore_drains(&kept, after.now, &mut after.changes);
    after.announce(&REPLICAS);
    assert_eq!(after.acquire("b", "r1"), Err(Refused::Draining));
    assert_eq!(after.registry.export_drains(), kept);
    let status = after.status(&gpu);
    assert_eq!((status.since_ms, status.drained), (before.now.wall.unix_ms(), true), "nothing runs");
    assert_eq!(after.pass_ms(100_000), NOTHING, "nothing is cut");
    assert!(after.resume(&Scope::Node));
    assert_eq!(after.acquire("a", "r1"), Err(Refused::Draining), "the GPU is still drained");
    assert!(after.resume(&gpu) && after.acquire("a", "r1").is_ok());
    assert_eq!(revision, 2);
    let again = after.registry.drains_revision();
    after.registry.restore_drains(&[], after.now, &mut after.changes);
    assert_eq!(after.registry.drains_revision(), again);
}

#[derive(Clone, Debug)]
enum Op {
    Drain(Scope, Option<u64>),
    Resume(Scope),
    Acquire(usize),
    Release(usize),
    Pass(u64),
    Announce(u8),
}

fn scope() -> impl Strategy<Value = Scope> {
    let replica = (0..REPLICAS.len()).prop_map(|n| Scope::replica(&key(REPLICAS[n].0, REPLICAS[n].1)));
    let pool = prop_oneof![Just("a"), Just("b")].prop_map(|pool| Scope::pool(&key(pool, "r0").pool));
    prop_oneof![Just(Scope::Node), (0u32..2).prop_map(|index| Scope::Gpu { index }), pool, replica]
}

fn op() -> impl Strategy<Value = Op> {
    let deadline = proptest::option::of(0u64..2_000);
    prop_oneof![
        2 => (scope(), deadline).prop_map(|(scope, ms)| Op::Drain(scope, ms)),
        2 => scope().prop_map(Op::Resume),
        6 => (0..REPLICAS.len()).prop_map(Op::Acquire),
        4 => (0usize..16).prop_map(Op::Release),
        2 => (0u64..1_500).prop_map(Op::Pass),
        1 => (0u8..16).prop_map(Op::Announce),
    ]
}

proptest! {
    /// No slot is ever given within a marked scope, every request is cut at most once and only past a
    /// deadline that covers it, and every drain counts exactly. Once all is resumed, all work again.
    #[test]
    fn marks_rule_whatever_happens(ops in proptest::collection::vec(op(), 1..80)) {
        let mut machine = Machine::with(&REPLICAS);
        let mut marks: BTreeMap<Scope, Option<Now>> = BTreeMap::new();
        let mut leases: Vec<ReplicaLease> = Vec::new();
        let mut cut: Vec<u64> = Vec::new();
        for op in ops {
            match op {
                Op::Drain(scope, ms) => {
                    marks.insert(scope.clone(), ms.map(|ms| machine.now.plus_ms(ms)));
                    machine.drain(&scope, ms);
                }
                Op::Resume(scope) => prop_assert_eq!(machine.resume(&scope), marks.remove(&scope).is_some()),
                Op::Acquire(n) => {
                    let (pool, replica, gpus) = REPLICAS[n];
                    let own: Vec<Scope> = scopes_of(&key(pool, replica), Some(gpus)).collect();
                    match machine.acquire(pool, replica) {
                        Ok(lease) => {
                            prop_assert!(!own.iter().any(|scope| marks.contains_key(scope)));
                            leases.push(lease);
                        }
                        Err(Refused::Draining) => {
                            let withdrawn = machine.registry.drain_of(&key(pool, replica)).is_none();
                            prop_assert!(withdrawn || own.iter().any(|scope| marks.contains_key(scope)));
                        }
                        Err(_) => {}
                    }
                }
                Op::Release(n) => if n < leases.len() {
                    let lease = leases.swap_remove(n);
                    machine.release(lease);
                }
                Op::Pass(ms) => {
                    for id in machine.pass_ms(ms) {
                        prop_assert!(!cut.contains(&id), "cut twice");
                        let lease = leases.iter().find(|lease| lease.id == id).expect("it runs");
                        let (.., gpus) = REPLICAS[REPLICAS.iter().position(|(p, r, _)| key(p, r) == lease.key).expect("known")];
                        let due = |scope| marks.get(&scope).is_some_and(|at| at.is_some_and(|at| at.mono <= machine.now.mono));
                        prop_assert!(scopes_of(&lease.key, Some(gpus)).any(due), "no deadline has passed");
                        cut.push(id);
                    }
                }
                Op::Announce(mask) => {
                    let kept: Vec<_> = (0..REPLICAS.len()).filter(|n| mask & (1 << n) != 0).map(|n| REPLICAS[n]).collect();
                    machine.announce(&kept);
                }
            }
            machine.registry.check_invariants();
            let told: Vec<Scope> = machine.registry.drains().map(|status| status.scope).collect();
            prop_assert_eq!(told, marks.keys().cloned().collect::<Vec<_>>());
        }
        for lease in leases {
            machine.release(lease);
        }
        prop_assert!(machine.registry.drains().all(|status| status.drained && !status.overdue));
        prop_assert_eq!(machine.registry.drain_deadline(), None);
        for scope in marks.keys() {
            machine.resume(scope);
        }
        machine.announce(&REPLICAS);
        machine.pass_ms(120_000);
        machine.announce(&REPLICAS);
        for pool in machine.registry.pools() {
            for replica in pool.replicas {
                prop_assert_eq!(replica.state.as_str(), State::Ready.as_str());
            }
        }
    }
}
