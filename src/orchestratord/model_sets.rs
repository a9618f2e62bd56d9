//! Interned lists of models, counted by the replicas that share them. Pure.
//!
//! Replicas that serve the same models with the same context length share one **set**, a small number.
//! What a request needs is thereby decided once a set instead of once a replica.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::replica_table::NO_MODELS;

/// The sets. See the introduction of this file.
#[derive(Debug, Default)]
pub struct ModelSets {
    /// Index 0 is [`NO_MODELS`] and stays empty.
    sets: Vec<Option<Set>>,
    free: Vec<u32>,
    /// By context length in tokens, then by models.
    by_list: BTreeMap<u32, BTreeMap<Arc<[String]>, u32>>,
    by_model: BTreeMap<String, BTreeSet<u32>>,
}

#[derive(Debug)]
struct Set {
    models: Arc<[String]>,
    context_tokens: u32,
    replicas: u32,
}

impl ModelSets {
    /// Sets that contain `model`, in ascending order. [`NO_MODELS`] is never among them.
    pub fn with(&self, model: &str) -> impl Iterator<Item = u32> {
        self.containing(model).into_iter().flatten().copied()
    }

    /// The same as a set; `None` where no set contains it.
    #[must_use]
    pub fn containing(&self, model: &str) -> Option<&BTreeSet<u32>> {
        self.by_model.get(model)
    }

    /// Every known model by name, with the sets that contain it.
    pub fn models(&self) -> impl Iterator<Item = (&str, &BTreeSet<u32>)> {
        self.by_model.iter().map(|(name, sets)| (name.as_str(), sets))
    }

    /// Longest prompt and answer together, in tokens, of each replica of the set; 0 where unknown.
    #[must_use]
    pub fn context_tokens(&self, set: u32) -> u32 {
        self.sets.get(set as usize).and_then(Option::as_ref).map_or(0, |set| set.context_tokens)
    }

    /// One more than the greatest set in use.
    #[must_use]
    pub fn end(&self) -> usize {
        self.sets.len().max(1)
    }

    /// The set of some models, for one more replica. [`NO_MODELS`] has any context length.
    pub(super) fn intern(&mut self, models: &[String], context_tokens: u32) -> (u32, Arc<[String]>) {
        if models.is_empty() {
            return (NO_MODELS, Arc::default());
        }
        if let Some(set) = self.by_list.get(&context_tokens).and_then(|lists| lists.get(models)).copied()
            && let Some(Some(known)) = self.sets.get_mut(set as usize)
        {
            known.replicas += 1;
            return (set, known.models.clone());
        }
        if self.sets.is_empty() {
            self.sets.push(None);
        }
        let list: Arc<[String]> = models.into();
        let set = self.free.pop().unwrap_or_else(|| {
            self.sets.push(None);
            u32::try_from(self.sets.len() - 1).unwrap_or(u32::MAX)
        });
        self.sets[set as usize] = Some(Set { models: list.clone(), context_tokens, replicas: 1 });
        self.by_list.entry(context_tokens).or_default().insert(list.clone(), set);
        for model in models {
            self.by_model.entry(model.clone()).or_default().insert(set);
        }
        (set, list)
    }

    /// One replica less has the set.
    pub(super) fn release(&mut self, set: u32) {
        let Some(slot) = self.sets.get_mut(set as usize) else { return };
        let Some(known) = slot else { return };
        known.replicas -= 1;
        if known.replicas > 0 {
            return;
        }
        let Some(gone) = slot.take() else { return };
        self.free.push(set);
        if let Some(lists) = self.by_list.get_mut(&gone.context_tokens) {
            lists.remove(&gone.models);
            if lists.is_empty() {
                self.by_list.remove(&gone.context_tokens);
            }
        }
        for model in gone.models.iter() {
            if let Some(sets) = self.by_model.get_mut(model) {
                sets.remove(&set);
                if sets.is_empty() {
                    self.by_model.remove(model);
                }
            }
        }
    }

    /// Panics where the sets contradict themselves, or are not counted as in `references`. For tests and
    /// simulations.
    pub(super) fn check_invariants(&self, references: &BTreeMap<u32, u32>) {
        let sets = self.sets.iter().enumerate();
        let counted: BTreeMap<u32, u32> =
            sets.filter_map(|(i, set)| set.as_ref().map(|set| (i as u32, set.replicas))).collect();
        assert_eq!(&counted, references, "model sets are counted wrongly");
        assert!(self.by_model.values().flatten().all(|set| references.contains_key(set)), "a dead set");
        let listed: BTreeSet<u32> = self.by_list.values().flat_map(BTreeMap::values).copied().collect();
        assert!(listed.iter().eq(references.keys()), "a set that is not found by its list");
    }
}
