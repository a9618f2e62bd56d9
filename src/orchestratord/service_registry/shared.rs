//! What keeps ten thousand nodes small: values that many of them have in common are kept once, and the
//! few replicas of a node lie in one sorted list.

use std::borrow::Borrow;
use std::collections::BTreeSet;
use std::sync::Arc;

/// Fewest kept values at which those that nobody uses any more are looked for.
const SWEEP_MIN: usize = 64;

/// Values of which equal ones are kept once.
#[derive(Debug)]
pub(super) struct Shared<T: ?Sized> {
    known: BTreeSet<Arc<T>>,
    sweep_at: usize,
}

impl<T: ?Sized> Default for Shared<T> {
    fn default() -> Self {
        Shared { known: BTreeSet::new(), sweep_at: SWEEP_MIN }
    }
}

impl<T: Ord + ?Sized> Shared<T> {
    /// The one copy of a value.
    pub(super) fn keep(&mut self, value: &T) -> Arc<T>
    where
        for<'a> Arc<T>: From<&'a T>,
    {
        if let Some(known) = self.known.get(value) {
            return known.clone();
        }
        self.add(Arc::from(value))
    }

    /// As [`Shared::keep`], for values that cannot be copied out of a reference.
    pub(super) fn keep_whole(&mut self, value: T) -> Arc<T>
    where
        T: Sized,
    {
        match self.known.get(&value) {
            Some(known) => known.clone(),
            None => self.add(Arc::new(value)),
        }
    }

    fn add(&mut self, value: Arc<T>) -> Arc<T> {
        if self.known.len() >= self.sweep_at {
            self.known.retain(|known| Arc::strong_count(known) > 1);
            // So that most additions sweep nothing, however many are in use.
            self.sweep_at = SWEEP_MIN.max(2 * self.known.len());
        }
        self.known.insert(value.clone());
        value
    }
}

/// A map in one sorted list: right for few entries that seldom come and go.
#[derive(Clone, Debug)]
pub(super) struct SortedList<K, V>(Vec<(K, V)>);

impl<K, V> Default for SortedList<K, V> {
    fn default() -> Self {
        SortedList(Vec::new())
    }
}

impl<K: Ord, V> SortedList<K, V> {
    pub(super) fn get<Q: Ord + ?Sized>(&self, key: &Q) -> Option<&V>
    where
        K: Borrow<Q>,
    {
        self.at(key).ok().map(|at| &self.0[at].1)
    }

    pub(super) fn insert(&mut self, key: K, value: V) {
        match self.at(&key) {
            Ok(at) => self.0[at].1 = value,
            Err(at) => self.0.insert(at, (key, value)),
        }
    }

    pub(super) fn remove<Q: Ord + ?Sized>(&mut self, key: &Q) -> Option<V>
    where
        K: Borrow<Q>,
    {
        self.at(key).ok().map(|at| self.0.remove(at).1)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&K, &V)> {
        self.0.iter().map(|(key, value)| (key, value))
    }

    pub(super) fn values(&self) -> impl Iterator<Item = &V> {
        self.0.iter().map(|(_, value)| value)
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    fn at<Q: Ord + ?Sized>(&self, key: &Q) -> Result<usize, usize>
    where
        K: Borrow<Q>,
    {
        self.0.binary_search_by(|(known, _)| known.borrow().cmp(key))
    }
}

impl<K, V> IntoIterator for SortedList<K, V> {
    type Item = (K, V);
    type IntoIter = std::vec::IntoIter<(K, V)>;
    fn into_iter(self) -> Self::IntoIter {
        self.0.into_iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    #[test]
    fn equal_values_are_one_and_unused_ones_go() {
        let mut shared = Shared::<str>::default();
        let kept = shared.keep("kept");
        assert!(Arc::ptr_eq(&kept, &shared.keep("kept")));
        for n in 0..10_000 {
            shared.keep(&n.to_string());
        }
        assert!(shared.known.len() <= SWEEP_MIN, "{} of 10,000 values are kept", shared.known.len());
        assert!(Arc::ptr_eq(&kept, &shared.keep("kept")));
    }

    proptest::proptest! {
        #[test]
        fn a_sorted_list_is_a_map(ops in proptest::collection::vec((0u8..20, proptest::bool::ANY), 0..100)) {
            let (mut list, mut map) = (SortedList::default(), BTreeMap::new());
            for (n, (key, comes)) in ops.into_iter().enumerate() {
                if comes {
                    list.insert(key, n);
                    map.insert(key, n);
                } else {
                    proptest::prop_assert_eq!(list.remove(&key), map.remove(&key));
                }
                proptest::prop_assert_eq!(list.get(&key), map.get(&key));
                proptest::prop_assert!(list.iter().eq(map.iter()) && list.len() == map.len());
            }
        }
    }
}
