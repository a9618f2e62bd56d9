//! Two machines with different pasts of which the same must be said.

use super::*;

/// Name, URL and file.
type SaidReplica = (ReplicaKey, String, Option<String>);
type SaidFile = (String, FileState);

/// What a registry says of its replicas and files, without what depends on when it heard of them.
fn said(registry: &Registry) -> (Vec<SaidReplica>, Vec<SaidFile>) {
    let replicas = registry.pools().into_iter().flat_map(|pool| {
        let id = pool.pool_id;
        pool.replicas.into_iter().map(move |replica| {
            let key = ReplicaKey { pool: id.clone(), replica: replica.replica_id };
            (key, replica.url.to_string(), replica.handoff_file)
        })
    });
    let files = registry.files().map(|file| (file.name.to_string(), file.state));
    (replicas.collect(), files.collect())
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(12))]
    /// Files come and go one by one around the limits of pools and of replicas a pool: what is used is
    /// what a single listing of them all would lead to.
    #[test]
    fn around_the_limits_single_names_lead_to_the_same_as_a_whole_listing(
        many_pools: bool, ops in proptest::collection::vec((0usize..40, 0u8..3), 20..120),
    ) {
        let (most, step) = if many_pools { (POOLS_MAX, 13) } else { (REPLICAS_MAX, 51) };
        let text = |n: usize| {
            let name = format!("x{n:05}");
            let (pool, replica) = if many_pools { (name.as_str(), "r") } else { ("p", name.as_str()) };
            json(pool, replica, 1, r#","ready":false"#)
        };
        let mut machine = Machine::new();
        // Every other name is free, so that files come before, between and after those that are there.
        for n in 0..most - 5 {
            machine.write(&format!("{:05}.json", 2 * n), &text(2 * n));
        }
        machine.list();
        for (place, what) in ops {
            let n = place * step + usize::from(what == 2) * 2 * (most - 20);
            let name: Arc<str> = format!("{n:05}.json").into();
            if machine.dir.remove(&name).is_none() {
                machine.write(&name, &text(n));
            }
            let files = machine.dir.get(&name).cloned().into_iter().collect();
            let listing = Listing { span: Span::Names(vec![name]), files, truncated: false, completes: false };
            machine.registry.listing(&listing, machine.now, &mut machine.changes);
        }
        machine.registry.check_invariants();
        let mut fresh = Machine::new();
        fresh.dir = machine.dir.clone();
        fresh.list();
        proptest::prop_assert_eq!(said(&machine.registry), said(&fresh.registry));
    }

    /// The wall clock is for people: whatever it jumps to, the same happens at the same time.
    #[test]
    fn jumps_of_the_wall_clock_change_nothing(
        steps in proptest::collection::vec((0u64..8_000, 0u8..9, -86_400_000i64..86_400_000), 1..60),
    ) {
        let (mut steady, mut jumping) = (Machine::new(), Machine::new());
        for machine in [&mut steady, &mut jumping] {
            machine.write("a.json", &json("p", "r0", 8081, ""));
            machine.write("b.json", &json("p", "r1", 8082, r#","ready":false"#));
        }
        for (ms, kind, jump_ms) in steps {
            for machine in [&mut steady, &mut jumping] {
                machine.pass_ms(ms);
            }
            let wall = jumping.now.wall.0;
            jumping.now.wall = Wall(wall.saturating_add_signed(jump_ms * 1_000_000));
            for machine in [&mut steady, &mut jumping] {
                machine.list();
                machine.answer_all(outcome(kind));
            }
            proptest::prop_assert_eq!(steady.registry.deadline(), jumping.registry.deadline());
            proptest::prop_assert_eq!(steady.told(), jumping.told());
        }
    }
}
