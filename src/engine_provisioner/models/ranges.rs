//! Which bytes of a file are there already. PURE.
//!
//! A set of disjoint, sorted spans. Several connections fill a file in any order; what is missing is
//! asked for next, and what is there from the beginning on can be hashed.

use std::collections::BTreeMap;
use std::ops::Range;

/// Bytes that are there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ranges {
    /// Beginning to end (exclusive); no two touch.
    spans: BTreeMap<u64, u64>,
}

impl Ranges {
    /// Adds `span`; what is there already may be added again.
    pub fn add(&mut self, span: Range<u64>) {
        if span.is_empty() {
            return;
        }
        let (mut start, mut end) = (span.start, span.end);
        let touching: Vec<u64> =
            self.spans.range(..=end).rev().take_while(|(_, e)| **e >= start).map(|(s, _)| *s).collect();
        for key in touching {
            if let Some(other_end) = self.spans.remove(&key) {
                start = start.min(key);
                end = end.max(other_end);
            }
        }
        self.spans.insert(start, end);
    }

    /// The end of what is there from the beginning on.
    #[must_use]
    pub fn prefix_end(&self) -> u64 {
        self.spans.get(&0).copied().unwrap_or(0)
    }

    /// Bytes that are there.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.spans.iter().map(|(start, end)| end - start).sum()
    }

    /// The end of the last span.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.spans.last_key_value().map_or(0, |(_, end)| *end)
    }

    /// The first missing piece below `total`, at most `length_max` long.
    #[must_use]
    pub fn first_missing(&self, total: u64, length_max: u64) -> Option<Range<u64>> {
        let start = self.prefix_end();
        if start >= total {
            return None;
        }
        let next = self.spans.range(start + 1..).next().map_or(total, |(next, _)| (*next).min(total));
        Some(start..next.min(start.saturating_add(length_max)))
    }

    /// The spans, in order.
    pub fn iter(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.spans.iter().map(|(start, end)| (*start, *end))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn it_knows_exactly_what_was_added(spans in proptest::collection::vec((0u64..60, 0u64..12), 0..20)) {
            let (mut ranges, mut truth) = (Ranges::default(), BTreeSet::new());
            for (start, length) in spans {
                ranges.add(start..start + length);
                truth.extend(start..start + length);
            }
            let told: BTreeSet<u64> = ranges.iter().flat_map(|(start, end)| start..end).collect();
            prop_assert_eq!(&told, &truth);
            prop_assert_eq!(ranges.bytes(), truth.len() as u64);
            prop_assert_eq!(ranges.prefix_end(), (0..).find(|n| !truth.contains(n)).expect("one is missing"));
            let list: Vec<(u64, u64)> = ranges.iter().collect();
            prop_assert!(list.windows(2).all(|pair| pair[0].1 < pair[1].0), "{:?}", list);
        }

        #[test]
        fn asking_for_what_is_missing_ends_with_everything(
            spans in proptest::collection::vec((0u64..60, 0u64..12), 0..10), length_max in 1u64..20,
        ) {
            let mut ranges = Ranges::default();
            spans.into_iter().for_each(|(start, length)| ranges.add(start..(start + length).min(64)));
            let mut asked = 0;
            while let Some(span) = ranges.first_missing(64, length_max) {
                prop_assert!(!span.is_empty() && span.end - span.start <= length_max);
                prop_assert!(ranges.iter().all(|(start, end)| span.end <= start || span.start >= end));
                ranges.add(span);
                asked += 1;
                prop_assert!(asked <= 64);
            }
            prop_assert_eq!(ranges.prefix_end(), 64);
        }
    }
}
