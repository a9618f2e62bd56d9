//! Which replicas pins cannot tell apart, so that placement finds all that pass by name. Pure.
//!
//! A **cohort** is the replicas of equally named pools that serve the same set of models with the same
//! context length. Those that name their devices are in a second cohort, of which only replicas on the same
//! devices are members: requests for devices are answered from these, all others from the former. So the
//! replicas that pass a request's pins and avoidances, serve its model and have its context are some whole
//! cohorts, a handful in all but odd fleets, and the [index](super::placement_index) has a group for each.
//!
//! Here are the names and how many replicas bear them; who is best in a cohort is the index's.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::wire::id::PoolId;

use super::placement_index::GroupId;
use super::replica_table::Hot;

/// What the replicas of a cohort serve.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Serves {
    /// The set of models.
    pub model_set: u32,
    /// Longest prompt and answer together, in tokens; 0 where unknown.
    pub context_tokens: u32,
}

impl Serves {
    /// What a replica serves.
    #[must_use]
    pub fn of(hot: &Hot) -> Serves {
        Serves { model_set: hot.model_set, context_tokens: hot.context_tokens }
    }
}

/// Cohorts by the name of their pool, then by what they serve. There is no empty one.
pub type Pools = BTreeMap<PoolId, BTreeMap<Serves, GroupId>>;

/// The cohorts of one replica: by its pool alone, and by its devices too where it names them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Membership {
    /// None only for a replica that is not known yet.
    pub of_pool: Option<GroupId>,
    /// None where it names no devices.
    pub of_devices: Option<GroupId>,
}

/// The cohorts. See the introduction of this file.
#[derive(Debug, Default)]
pub struct Cohorts {
    /// By number.
    cohorts: Vec<Option<Cohort>>,
    free: Vec<u32>,
    by_pool: Pools,
    by_devices: BTreeMap<Arc<str>, Pools>,
}

#[derive(Debug)]
struct Cohort {
    devices: Option<Arc<str>>,
    pool: PoolId,
    serves: Serves,
    replicas: u32,
}

impl Cohorts {
    /// All cohorts: with `devices` those of the replicas on exactly these, without those of all replicas.
    #[must_use]
    pub fn pools(&self, devices: Option<&str>) -> Option<&Pools> {
        match devices {
            Some(devices) => self.by_devices.get(devices),
            None => Some(&self.by_pool),
        }
    }

    /// The devices by which a replica is a member.
    #[must_use]
    pub fn devices(&self, membership: Membership) -> Option<&str> {
        let cohort = self.cohorts.get(membership.of_devices?.cohort()? as usize)?.as_ref()?;
        cohort.devices.as_deref()
    }

    /// Adds one replica.
    pub(super) fn join(&mut self, pool: &PoolId, devices: Option<&Arc<str>>, serves: Serves) -> Membership {
        Membership {
            of_pool: Some(self.join_one(pool, None, serves)),
            of_devices: devices.map(|devices| self.join_one(pool, Some(devices), serves)),
        }
    }

    /// Takes one replica out.
    pub(super) fn leave(&mut self, membership: Membership) {
        for group in [membership.of_pool, membership.of_devices].into_iter().flatten() {
            self.leave_one(group);
        }
    }

    fn join_one(&mut self, pool: &PoolId, devices: Option<&Arc<str>>, serves: Serves) -> GroupId {
        let pools = match devices {
            Some(devices) => self.by_devices.entry(devices.clone()).or_default(),
            None => &mut self.by_pool,
        };
        let known = pools.get(pool).and_then(|cohorts| cohorts.get(&serves)).copied();
        if let Some(group) = known
            && let Some(Some(cohort)) =
                group.cohort().and_then(|number| self.cohorts.get_mut(number as usize))
        {
            cohort.replicas += 1;
            return group;
        }
        let number = self.free.pop().unwrap_or_else(|| {
            self.cohorts.push(None);
            u32::try_from(self.cohorts.len() - 1).unwrap_or(u32::MAX)
        });
        let group = GroupId::of_cohort(number, devices.is_some());
        pools.entry(pool.clone()).or_default().insert(serves, group);
        let cohort = Cohort { devices: devices.cloned(), pool: pool.clone(), serves, replicas: 1 };
        self.cohorts[number as usize] = Some(cohort);
        group
    }

    fn leave_one(&mut self, group: GroupId) {
        let Some(number) = group.cohort() else { return };
        let Some(slot) = self.cohorts.get_mut(number as usize) else { return };
        let Some(known) = slot else { return };
        known.replicas -= 1;
        if known.replicas > 0 {
            return;
        }
        let Some(gone) = slot.take() else { return };
        self.free.push(number);
        match &gone.devices {
            None => forget(&mut self.by_pool, &gone),
            Some(devices) => {
                let Some(pools) = self.by_devices.get_mut(devices) else { return };
                forget(pools, &gone);
                if pools.is_empty() {
                    self.by_devices.remove(devices);
                }
            }
        }
    }

    /// Panics where the cohorts contradict themselves, or are not those of `replicas`: membership, pool,
    /// devices and what it serves, of each. For tests and simulations.
    pub(super) fn check_invariants<'a>(
        &self,
        replicas: impl Iterator<Item = (Membership, &'a PoolId, Option<&'a str>, Serves)>,
    ) {
        let mut counts = vec![0; self.cohorts.len()];
        for (membership, pool, devices, serves) in replicas {
            let named = |devices: Option<&str>| self.pools(devices)?.get(pool)?.get(&serves).copied();
            assert!(membership.of_pool.is_some() && membership.of_pool == named(None), "in another's cohort");
            let on_devices = devices.and_then(|devices| named(Some(devices)));
            assert_eq!(membership.of_devices.is_some(), devices.is_some(), "devices without a cohort");
            assert_eq!(membership.of_devices, on_devices, "in the cohort of other devices");
            assert_eq!(self.devices(membership), devices, "the devices of a cohort");
            for group in [membership.of_pool, membership.of_devices].into_iter().flatten() {
                counts[group.cohort().expect("a cohort's group") as usize] += 1;
            }
        }
        let known = self.cohorts.iter().map(|cohort| cohort.as_ref().map_or(0, |cohort| cohort.replicas));
        assert!(known.eq(counts.iter().copied()), "cohorts are counted wrongly");
        let named = self.by_devices.values().chain([&self.by_pool]).flat_map(BTreeMap::values);
        let used = counts.iter().filter(|count| **count > 0).count();
        assert_eq!(named.map(BTreeMap::len).sum::<usize>(), used, "a cohort of nobody");
        assert!(
            self.by_devices
                .values()
                .chain([&self.by_pool])
                .flat_map(BTreeMap::values)
                .all(|of| !of.is_empty())
        );
        assert_eq!(self.free.len() + used, self.cohorts.len(), "lost numbers");
    }
}

fn forget(pools: &mut Pools, gone: &Cohort) {
    if let Some(cohorts) = pools.get_mut(&gone.pool) {
        cohorts.remove(&gone.serves);
        if cohorts.is_empty() {
            pools.remove(&gone.pool);
        }
    }
}
