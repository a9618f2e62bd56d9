//! A consistent-hash ring: which replica a key belongs to, so that few keys move when replicas come
//! and go.
//!
//! Every replica has **one** point on a circle of 2^64, from its name. A key is hashed [`PROBES`] times,
//! and belongs to the replica whose point follows one of these probes most closely (multi-probe
//! consistent hashing, Appleton and O'Reilly 2015). One point a replica leaves arcs of very different
//! lengths; several probes even that out as well as hundreds of virtual nodes a replica would, which at
//! 40,000 replicas would be megabytes, and much work whenever one comes or goes. What a ring promises
//! holds: a replica that leaves gives away its own keys only, one that comes takes keys for itself only,
//! and the same replicas make the same ring in whichever order they came. Rendezvous hashing promises
//! that too, at the price of looking at every replica; jump hashing numbers its buckets and cannot lose
//! one from the middle.
//!
//! The replicas next after the first are those that follow a probe next most closely, so a key whose
//! replica is full goes to the same second one every time.

use std::collections::BTreeSet;
use std::ops::Bound::{Excluded, Unbounded};

/// Probes of a key. Replicas differ in their share of keys by about one in [`PROBES`], which is what
/// bounded load allows anyway; each costs a search in a tree.
pub const PROBES: u64 = 5;

/// Low bits of a place on the ring that hold the replica's index. The bits above them are a point exact
/// enough for some hundred thousand replicas, at half the memory of both side by side.
const INDEX_BITS: u32 = 24;
const INDEX_MASK: u64 = (1 << INDEX_BITS) - 1;

/// Points of replicas.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ring {
    /// See [`place`].
    places: BTreeSet<u64>,
}

/// A replica's point in the high bits, its index in the low ones.
fn place(point: u64, index: u32) -> u64 {
    debug_assert!(u64::from(index) <= INDEX_MASK, "tables of replicas are far smaller");
    (point & !INDEX_MASK) | u64::from(index)
}

/// One probe, and the replica that follows it most closely among those that were not looked at.
struct Cursor<'a> {
    places: &'a BTreeSet<u64>,
    /// Its low bits are 0.
    probe: u64,
    place: u64,
}

impl Ring {
    /// Puts a replica on the ring, or takes it off.
    pub fn set(&mut self, point: u64, index: u32, is_on: bool) {
        if is_on {
            self.places.insert(place(point, index));
        } else {
            self.places.remove(&place(point, index));
        }
    }

    /// Whether a replica is on the ring.
    #[must_use]
    pub fn contains(&self, point: u64, index: u32) -> bool {
        self.places.contains(&place(point, index))
    }

    /// The first replica of some rings, taken as one, from the key on that is accepted. At most
    /// `looks_max` are asked about; one may be asked about more than once.
    pub fn find<'a>(
        rings: impl Iterator<Item = &'a Ring>,
        key: u64,
        looks_max: usize,
        mut accepts: impl FnMut(usize) -> bool,
    ) -> Option<usize> {
        let probes = |ring: &'a Ring| (0..PROBES).filter_map(move |n| Cursor::at(ring, probe(key, n)));
        let mut cursors: Vec<Cursor<'a>> = rings.flat_map(probes).collect();
        for _ in 0..looks_max {
            let (nearest, cursor) =
                cursors.iter_mut().enumerate().min_by_key(|(_, cursor)| cursor.distance())?;
            let index = (cursor.place & INDEX_MASK) as usize;
            if accepts(index) {
                return Some(index);
            }
            if !cursor.advance() {
                cursors.swap_remove(nearest);
            }
        }
        None
    }
}

impl<'a> Cursor<'a> {
    fn at(ring: &'a Ring, probe: u64) -> Option<Cursor<'a>> {
        let (places, probe) = (&ring.places, probe & !INDEX_MASK);
        let place = *places.range(probe..).next().or_else(|| places.first())?;
        Some(Cursor { places, probe, place })
    }

    /// From the probe on; of replicas at one point the first by index is nearest.
    fn distance(&self) -> u64 {
        self.place.wrapping_sub(self.probe)
    }

    /// Goes to the next place; false at the end of the round.
    fn advance(&mut self) -> bool {
        let before = self.distance();
        let next = self.places.range((Excluded(self.place), Unbounded)).next();
        let Some(place) = next.or_else(|| self.places.first()) else { return false };
        self.place = *place;
        self.distance() > before
    }
}

/// A hash that is the same on every machine and in every version: FNV-1a with 64 bits (offset basis
/// `cbf29ce484222325`, prime `100000001b3`, a byte at a time), then the finalizer of splitmix64, because
/// FNV leaves the high bits of similar texts alike.
#[must_use]
pub fn stable_hash(bytes: &[u8]) -> u64 {
    let fnv = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
    mix(bytes.iter().fold(0xcbf2_9ce4_8422_2325, fnv))
}

/// The finalizer of splitmix64: spreads any difference over all bits.
pub(super) fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

fn probe(key: u64, n: u64) -> u64 {
    mix(key.wrapping_add((n + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    fn ring_of(replicas: impl IntoIterator<Item = u32>) -> Ring {
        let mut ring = Ring::default();
        for index in replicas {
            ring.set(stable_hash(format!("node-{index}/pool/r0").as_bytes()), index, true);
        }
        ring
    }

    fn owner(ring: &Ring, key: u64) -> Option<usize> {
        Ring::find([ring].into_iter(), mix(key), 1, |_| true)
    }

    #[test]
    fn the_hash_is_the_one_that_is_described() {
        assert_eq!(stable_hash(b""), mix(0xcbf2_9ce4_8422_2325));
        assert_eq!(stable_hash(b"a"), mix(0xaf63_dc4c_8601_ec8c), "FNV-1a of \"a\" as published");
        assert_eq!(stable_hash(b"foobar"), mix(0x8594_4171_f739_67e8), "FNV-1a of \"foobar\" as published");
    }

    #[test]
    fn shares_of_keys_are_alike() {
        let ring = ring_of(0..100);
        let mut keys: BTreeMap<usize, u32> = BTreeMap::new();
        (0..100_000).filter_map(|key| owner(&ring, key)).for_each(|one| *keys.entry(one).or_default() += 1);
        let most = keys.values().max().expect("keys");
        assert!(keys.len() > 90 && *most < 1_500, "{} have keys, the busiest {most}", keys.len());
    }

    #[test]
    fn a_walk_visits_everybody_and_ends() {
        let (even, odd) = (ring_of((0..20).step_by(2)), ring_of((1..20).step_by(2)));
        let mut seen = BTreeSet::new();
        let found = Ring::find([&even, &odd].into_iter(), 7, usize::MAX, |index| {
            seen.insert(index);
            false
        });
        assert_eq!((found, seen.len()), (None, 20));
        assert_eq!(Ring::find([&Ring::default()].into_iter(), 7, 9, |_| true), None);
    }

    proptest::proptest! {
        /// One that leaves gives away its own keys only, and about as many as one has; coming back in
        /// another order makes the same ring; two rings are one.
        #[test]
        fn few_keys_move(count in 2u32..200, gone in 0u32..200, seed in 0u64..1_000) {
            let gone = gone % count;
            let before = ring_of(0..count);
            let after = ring_of((0..count).filter(|index| *index != gone).rev());
            let keys = 2_000;
            let mut moved = 0;
            for key in (0..keys).map(|key| key + seed * keys) {
                let (old, new) = (owner(&before, key), owner(&after, key));
                proptest::prop_assert!(old == new || old == Some(gone as usize), "{old:?} -> {new:?}");
                moved += u64::from(old != new);
            }
            proptest::prop_assert!(moved <= 4 * keys / u64::from(count) + 20, "{moved} of {keys} keys moved");
            let mut again = after.clone();
            again.set(stable_hash(format!("node-{gone}/pool/r0").as_bytes()), gone, true);
            proptest::prop_assert_eq!(&again, &before);
            let parts = [ring_of((0..count).filter(|i| i % 3 == 0)), ring_of((0..count).filter(|i| i % 3 != 0))];
            let of_parts = Ring::find(parts.iter(), mix(seed), 1, |_| true);
            proptest::prop_assert_eq!(of_parts, owner(&before, seed));
        }
    }
}
