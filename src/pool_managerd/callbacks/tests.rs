//! Callbacks in virtual time, against receivers that fail, hang and come back.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;
use crate::replicas::AllowList;
use crate::wire::id::ReplicaId;

const START: Now = Now { mono: Mono(77_000_000_000), wall: Wall(1_700_000_000_000_000_000) };

fn policy() -> Policy {
    let own = vec!["203.0.113.9".parse().expect("an address")];
    let rules = EnginePolicy::new(own, Some(9200), AllowList::default(), "");
    let planes = ["http://control.example:8080", "http://198.51.100.1:8080"];
    Policy::new(rules, planes.map(|url| BaseUrl::new(url).expect("a URL")).to_vec())
}

fn url(text: &str) -> BaseUrl {
    BaseUrl::new(text).expect("a URL")
}

fn key(pool: &str, replica: &str) -> ReplicaKey {
    ReplicaKey { pool: PoolId::new(pool).expect("an id"), replica: ReplicaId::new(replica).expect("an id") }
}

fn status(replica: &str, ready: bool, generation: u64) -> ReplicaStatus {
    serde_json::from_value(serde_json::json!({
        "replica_id": replica, "url": "http://127.0.0.1:1", "state": if ready { "ready" } else { "suspect" },
        "reason": "why", "since_ms": 0, "ready": ready, "slots_total": 1, "slots_free": 1, "generation": generation,
    }))
    .expect("a status")
}

struct World {
    notifier: Notifier,
    now: Now,
    happenings: Vec<Happening>,
}

impl World {
    fn new() -> World {
        let mut notifier = Notifier::default();
        notifier.enable(NodeId::new("n").expect("an id"), 9, policy());
        World { notifier, now: START, happenings: Vec::new() }
    }

    fn register(&mut self, text: &str, pool: Option<&str>) -> Result<(), NotRegistered> {
        let pool = pool.map(|pool| PoolId::new(pool).expect("an id"));
        self.notifier.register(&url(text), pool, false, self.now, &mut self.happenings)
    }

    fn observe(&mut self, pool: &str, replica: &str, ready: bool, generation: u64) {
        self.notifier.observe(&key(pool, replica), Some(status(replica, ready, generation)), self.now);
    }

    fn poll(&mut self) -> Vec<Delivery> {
        self.notifier.poll(self.now)
    }

    /// The one delivery that is due.
    fn one(&mut self) -> Delivery {
        let mut due = self.poll();
        assert_eq!(due.len(), 1, "{due:?}");
        due.remove(0)
    }

    fn answer(&mut self, delivery: &Delivery, outcome: Result<(), String>) {
        let (id, event) = (delivery.callback, delivery.event);
        self.notifier.delivered(id, event, outcome, self.now, &mut |n| n - 1, &mut self.happenings);
    }

    fn until_deadline(&mut self) -> u64 {
        let at = self.notifier.deadline().expect("something waits");
        let ms = at.ns_since(self.now.mono).div_ceil(1_000_000);
        self.now = self.now.plus_ms(ms);
        ms
    }
}

fn said(delivery: &Delivery) -> serde_json::Value {
    serde_json::from_str(&delivery.body).expect("JSON")
}

#[test]
fn only_changes_of_readiness_are_told_and_only_to_who_asked() {
    let mut world = World::new();
    world.register("http://127.0.0.1:1/all", None).expect("allowed");
    world.register("http://127.0.0.1:1/b", Some("b")).expect("allowed");
    world.observe("a", "r0", false, 1);
    assert_eq!(world.poll(), [], "it never was ready");
    world.observe("a", "r0", true, 1);
    world.observe("a", "r0", true, 1);
    let told = world.one();
    assert_eq!(
        said(&told),
        serde_json::json!({
            "node_id": "n", "pool_id": "a", "replica_id": "r0", "url": "http://127.0.0.1:1", "ready": true,
            "generation": 1, "state": "ready", "at_ms": 1_700_000_000_000_u64, "event_id": "n-9-1",
        })
    );
    assert_eq!((told.url.path(), told.event_id.as_str()), ("/all", "n-9-1"));
    world.answer(&told, Ok(()));
    assert_eq!((world.poll(), world.notifier.deadline()), (Vec::new(), None));
    world.notifier.observe(&key("a", "r0"), None, world.now);
    let told = world.one();
    assert_eq!((said(&told)["state"].as_str(), said(&told)["ready"].as_bool()), (Some("gone"), Some(false)));
    world.answer(&told, Ok(()));
    world.observe("b", "r0", true, 1);
    let both: BTreeSet<String> = world.poll().iter().map(|d| d.url.path().to_string()).collect();
    assert_eq!(both, BTreeSet::from(["/all".to_string(), "/b".to_string()]));
}

#[test]
fn a_registration_is_told_what_is_ready_and_may_be_repeated() {
    let mut world = World::new();
    world.observe("a", "r0", true, 1);
    world.observe("a", "r1", true, 1);
    world.observe("a", "r1", false, 1);
    assert_eq!(world.notifier.deadline(), None, "nobody asked");
    for _ in 0..2 {
        world.register("http://127.0.0.1:1", None).expect("allowed");
        let told = world.one();
        assert_eq!((said(&told)["replica_id"].as_str(), told.event_id.as_str()), (Some("r0"), "n-9-1"));
        world.answer(&told, Ok(()));
        assert_eq!(world.poll(), []);
    }
    assert_eq!(world.notifier.sizes().0, 1);
    assert_eq!(world.notifier.unregister(&url("http://127.0.0.1:1"), None, &mut world.happenings), 1);
    assert_eq!(world.notifier.unregister(&url("http://127.0.0.1:1"), None, &mut world.happenings), 0);
    world.observe("a", "r2", true, 1);
    assert_eq!(world.poll(), []);
}

#[test]
fn failures_are_repeated_with_growing_pauses_under_the_same_id() {
    let mut world = World::new();
    world.register("http://127.0.0.1:1", None).expect("allowed");
    world.observe("a", "r0", true, 1);
    let mut pauses = Vec::new();
    for attempt in 1..=ATTEMPTS_MAX {
        let told = world.one();
        assert_eq!(told.event_id, "n-9-1");
        assert_eq!(world.poll(), [], "one at a time");
        world.answer(&told, Err("refused".into()));
        if attempt < ATTEMPTS_MAX {
            pauses.push(world.until_deadline());
        }
    }
    assert_eq!(pauses[..3], [500, 1_000, 2_000]);
    assert_eq!(pauses.iter().max(), Some(&RETRY_MS_MAX));
    assert_eq!((world.poll(), world.notifier.deadline()), (Vec::new(), None), "given up");
    assert_eq!(
        (world.notifier.counts().failed, world.notifier.counts().given_up),
        (u64::from(ATTEMPTS_MAX), 1)
    );
    let states: Vec<&str> = world.happenings.iter().map(|happening| happening.state).collect();
    assert_eq!(states, ["registered", "failing", "given-up"], "not a line for every attempt");
    // The next change finds a receiver that may be there again.
    world.observe("a", "r0", false, 1);
    let told = world.one();
    assert_eq!(told.event_id, "n-9-2");
    world.answer(&told, Ok(()));
    assert_eq!(world.notifier.to_json()["callbacks"][0]["last"]["outcome"], "delivered");
}

#[test]
fn what_changed_meanwhile_replaces_what_waits() {
    let mut world = World::new();
    world.register("http://127.0.0.1:1", None).expect("allowed");
    world.observe("a", "r0", true, 1);
    let first = world.one();
    world.observe("a", "r0", false, 1);
    world.observe("a", "r0", true, 2);
    assert_eq!(world.poll(), [], "the first is still under way");
    world.answer(&first, Ok(()));
    let newest = world.one();
    assert_eq!((said(&newest)["generation"].as_u64(), newest.event), (Some(2), 3));
    // An outcome that comes late, or for a callback that is gone, harms nothing.
    world.answer(&first, Err("late".into()));
    world.notifier.unregister(&url("http://127.0.0.1:1"), None, &mut world.happenings);
    world.answer(&newest, Ok(()));
    assert_eq!(world.notifier.deadline(), None);
}

#[test]
fn receivers_that_hang_take_the_helpers_and_no_more() {
    let mut world = World::new();
    for n in 0..CALLBACKS_MAX {
        world.register(&format!("http://127.0.0.1:1/{n}"), None).expect("room");
    }
    assert_eq!(world.register("http://127.0.0.1:1/more", None), Err(NotRegistered::TooMany));
    world.register("http://127.0.0.1:1/0", None).expect("it is known");
    world.observe("a", "r0", true, 1);
    let under_way = world.poll();
    assert_eq!((under_way.len(), world.poll().len()), (DELIVERIES_MAX, 0));
    assert_eq!(world.notifier.deadline(), None, "an outcome is waited for, not a timer");
    world.answer(&under_way[0], Ok(()));
    assert_eq!(world.poll().len(), 1);
}

#[test]
fn only_near_hosts_are_called() {
    let policy = policy();
    for good in [
        "http://127.0.0.1:1",
        "https://127.0.0.1:1",
        "http://localhost:1/x",
        "http://[::1]:1",
        "http://10.1.2.3:1",
        "http://192.168.0.9:1",
        "http://[fd12::1]:1",
        "http://198.51.100.1:9999",
        "http://some-name:1",
    ] {
        assert_eq!(policy.check(&url(good)), Ok(()), "{good}");
    }
    for bad in [
        "http://169.254.169.254/latest",
        "https://169.254.169.254/latest",
        "http://[fe80::1]:1",
        "http://[fd00:ec2::254]:80",
        "http://0.0.0.0:1",
        "http://[::]:1",
        "http://224.0.0.1:1",
        "http://255.255.255.255:1",
        "http://8.8.8.8:1",
        "http://[::ffff:169.254.169.254]:80",
        "http://[2001:db8::1]:1",
        "http://127.0.0.1:9200",
    ] {
        assert!(policy.check(&url(bad)).is_err(), "{bad}");
    }
    // What a name resolves to is judged too; a control plane may live anywhere but where nobody does.
    let (name, plane) = (url("http://some-name:1"), url("http://control.example:1"));
    let judge = |url: &BaseUrl, ip: &str| policy.check_address(url, ip.parse().expect("an address")).is_ok();
    assert!(judge(&name, "10.0.0.1") && !judge(&name, "8.8.8.8") && !judge(&name, "169.254.169.254"));
    assert!(judge(&plane, "8.8.8.8") && !judge(&plane, "169.254.169.254"));
    // The token is for the control planes themselves.
    assert!(policy.is_trusted(&url("http://control.example:8080/callbacks/pool-ready")));
    for other in ["http://control.example:8081", "http://127.0.0.1:8080", "http://x.control.example:8080"] {
        assert!(!policy.is_trusted(&url(other)), "{other}");
    }
}

#[test]
fn what_was_asked_for_survives_a_restart() {
    let mut world = World::new();
    world.register("http://127.0.0.1:1/a", Some("a")).expect("allowed");
    world.register("http://127.0.0.1:1/b", None).expect("allowed");
    let own = url("http://127.0.0.1:1/configured");
    world.notifier.register(&own, None, true, world.now, &mut world.happenings).expect("allowed");
    let text = serde_json::to_string(&world.notifier.export()).expect("JSON");
    let mut kept: Vec<StoredCallback> = serde_json::from_str(&text).expect("the same");
    assert_eq!(kept.len(), 2, "the configuration comes back by itself");
    kept.push(StoredCallback { url: url("http://169.254.169.254"), pool_id: None });
    let mut after = World::new();
    after.notifier.restore(&kept, after.now, &mut after.happenings);
    assert_eq!(after.notifier.export(), world.notifier.export());
    assert!(
        after
            .happenings
            .iter()
            .any(|happening| happening.is_warning && happening.text.contains("link-local"))
    );
    assert_eq!(
        Notifier::default().register(&own, None, false, START, &mut Vec::new()),
        Err(NotRegistered::Disabled)
    );
}

proptest! {
    /// Whatever fails: once the receivers work, each one has been told the newest state of every replica
    /// that ever changed while it was registered, never one that is older than what it knew, and a
    /// repetition always has the id and the content of the first attempt.
    #[test]
    fn receivers_end_up_with_the_truth(steps in proptest::collection::vec((0u8..4, 0u8..4, any::<bool>(), any::<bool>()), 1..80)) {
        let mut world = World::new();
        for n in 0..3 {
            world.register(&format!("http://127.0.0.1:1/{n}"), None).expect("room");
        }
        let mut truth: BTreeMap<u8, bool> = BTreeMap::new();
        let mut known: BTreeMap<(u64, String), (u64, bool)> = BTreeMap::new();
        let mut bodies: BTreeMap<String, String> = BTreeMap::new();
        let mut under_way: Vec<Delivery> = Vec::new();
        let mut take = |world: &mut World, under_way: &mut Vec<Delivery>| {
            for delivery in world.poll() {
                let first = bodies.entry(delivery.event_id.clone()).or_insert_with(|| delivery.body.clone());
                assert_eq!(*first, delivery.body);
                assert!(!under_way.iter().any(|other| other.callback == delivery.callback), "one at a time");
                under_way.push(delivery);
            }
        };
        let receive = |world: &mut World, delivery: &Delivery, known: &mut BTreeMap<(u64, String), (u64, bool)>| {
            let body = said(delivery);
            let replica = body["replica_id"].as_str().expect("a replica").to_string();
            let news = (delivery.event, body["ready"].as_bool().expect("a flag"));
            if let Some(old) = known.insert((delivery.callback, replica), news) {
                assert!(old.0 <= news.0, "an older state came after a newer one");
            }
            world.answer(delivery, Ok(()));
        };
        for (what, replica, ready, ok) in steps {
            match what {
                0 | 1 => {
                    world.observe("p", &format!("r{replica}"), ready, 1);
                    if ready || truth.contains_key(&replica) {
                        truth.insert(replica, ready);
                    }
                }
                2 => take(&mut world, &mut under_way),
                _ if under_way.is_empty() => world.now = world.now.plus_ms(u64::from(replica) * 400),
                _ => {
                    let delivery = under_way.remove(usize::from(replica) % under_way.len());
                    if ok {
                        receive(&mut world, &delivery, &mut known);
                    } else {
                        world.answer(&delivery, Err("no".into()));
                    }
                }
            }
        }
        for delivery in under_way.split_off(0) {
            receive(&mut world, &delivery, &mut known);
        }
        while world.notifier.deadline().is_some() {
            world.until_deadline();
            take(&mut world, &mut under_way);
            for delivery in under_way.split_off(0) {
                receive(&mut world, &delivery, &mut known);
            }
        }
        for (replica, ready) in truth {
            for callback in 1..=3 {
                prop_assert_eq!(known.get(&(callback, format!("r{replica}"))).map(|news| news.1), Some(ready));
            }
        }
        prop_assert_eq!(world.notifier.sizes().1, 0);
    }
}
