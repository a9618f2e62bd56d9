//! Which file of the runtime directory announces which replica.
//!
//! The full listing is compared with the last one; what is the same costs one comparison of pointers
//! a file. Several files may name a replica: the higher generation wins, then the later write, then
//! the first by name. A file that can no longer be used keeps its claim with what it said last.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::change::{Change, FileState};
use super::policy::EnginePolicy;
use crate::time::Wall;
use crate::wire::handoff::Handoff;
use crate::wire::id::{PoolId, ReplicaKey};
use crate::wire::node::{POOLS_MAX, REPLICAS_MAX};

/// Most files taken from one directory, the first by name: ten times the largest machine that we
/// test, and still a listing of a few milliseconds.
pub const FILES_MAX: usize = 100_000;
/// What files beyond the limits are told.
const BEYOND_LIMIT: &str = "beyond the limit of pools or replicas";

/// One file of a listing.
#[derive(Clone, Debug)]
pub struct ListedFile {
    /// Its name within the directory.
    pub name: Arc<str>,
    /// When it was last written.
    pub modified: Wall,
    /// What it says. The same `Arc` as in the last listing means "unchanged".
    pub content: Arc<FileContent>,
}

/// What a file says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FileContent {
    /// An engine is there.
    Handoff(Box<Handoff>),
    /// A model description without an engine.
    ModelOnly,
    /// It cannot be used, and why.
    Refused(String),
}

/// The handoff and the file that stand behind a replica, or why none does.
pub(super) type Election = Result<(Arc<Handoff>, Arc<str>), &'static str>;

/// The files as they were last listed.
#[derive(Debug)]
pub(super) struct Directory {
    policy: EnginePolicy,
    /// By name, each once.
    pub(super) files: Vec<File>,
    /// Files that name a replica, whether they win or not; no entry is empty.
    claims: BTreeMap<ReplicaKey, BTreeSet<Arc<str>>>,
    /// Replicas that are claimed but beyond the limits of a heartbeat.
    excess: BTreeSet<ReplicaKey>,
    /// The limit that was last reported as reached.
    limit: Option<String>,
}

/// A file as it was last read.
#[derive(Debug)]
pub(super) struct File {
    pub(super) name: Arc<str>,
    pub(super) modified: Wall,
    content: Arc<FileContent>,
    pub(super) good: Option<Good>,
    /// `None` between reading it and choosing among the files for its replica.
    pub(super) state: Option<FileState>,
    pub(super) error: Option<String>,
}

/// What a file last said that could be used.
#[derive(Debug)]
pub(super) struct Good {
    pub(super) handoff: Arc<Handoff>,
    modified: Wall,
}

impl Directory {
    pub(super) fn new(policy: EnginePolicy) -> Directory {
        Directory { policy, files: Vec::new(), claims: BTreeMap::new(), excess: BTreeSet::new(), limit: None }
    }

    /// Takes the directory's full listing, sorted by name, each name once.
    ///
    /// Returns every replica whose files changed, with what stands behind it now.
    pub(super) fn listing(
        &mut self,
        files: &[ListedFile],
        changes: &mut Vec<Change>,
    ) -> Vec<(ReplicaKey, Election)> {
        debug_assert!(files.is_sorted_by(|a, b| a.name < b.name), "a listing is sorted by name");
        let within = &files[..files.len().min(FILES_MAX)];
        let too_many = files.len() > FILES_MAX;
        let mut touched = BTreeSet::new();
        if !self.is_same(within) {
            self.merge(within, &mut touched, changes);
            self.find_excess(&mut touched);
        }
        let limit = if too_many {
            Some(format!(
                "the runtime directory holds more than {FILES_MAX} files: the first by name are used"
            ))
        } else if self.excess.is_empty() {
            None
        } else {
            Some(format!(
                "the files name more than {POOLS_MAX} pools or {REPLICAS_MAX} replicas a pool: the first by name are used"
            ))
        };
        if limit != self.limit {
            changes.push(match &limit {
                Some(reason) => Change::LimitReached { reason: reason.clone() },
                None => Change::LimitCleared,
            });
            self.limit = limit;
        }
        touched
            .into_iter()
            .map(|key| {
                let election = self.elect(&key, changes);
                (key, election)
            })
            .collect()
    }

    /// Whether a file stands behind a replica.
    pub(super) fn announces(&self, key: &ReplicaKey) -> bool {
        self.claims.contains_key(key) && !self.excess.contains(key)
    }

    /// Every replica behind which a file stands.
    pub(super) fn announced(&self) -> impl Iterator<Item = &ReplicaKey> {
        self.claims.keys().filter(|key| !self.excess.contains(key))
    }

    fn is_same(&self, listed: &[ListedFile]) -> bool {
        self.files.len() == listed.len()
            && self.files.iter().zip(listed).all(|(known, listed)| {
                Arc::ptr_eq(&known.content, &listed.content)
                    && known.modified == listed.modified
                    && (Arc::ptr_eq(&known.name, &listed.name) || known.name == listed.name)
            })
    }

    /// Brings `files` and `claims` up to the listing; `touched` gets every replica whose files changed.
    fn merge(
        &mut self,
        listed: &[ListedFile],
        touched: &mut BTreeSet<ReplicaKey>,
        changes: &mut Vec<Change>,
    ) {
        let mut known = std::mem::take(&mut self.files).into_iter().peekable();
        let mut merged = Vec::with_capacity(listed.len());
        for listed in listed {
            while let Some(mut gone) = known.next_if(|file| file.name < listed.name) {
                self.unclaim(&mut gone, touched);
            }
            let mut file = match known.next_if(|file| file.name == listed.name) {
                Some(file) => {
                    if Arc::ptr_eq(&file.content, &listed.content) && file.modified == listed.modified {
                        merged.push(file);
                        continue;
                    }
                    file
                }
                None => File::unread(listed),
            };
            self.reread(&mut file, listed, touched, changes);
            merged.push(file);
        }
        for mut gone in known {
            self.unclaim(&mut gone, touched);
        }
        self.files = merged;
    }

    fn reread(
        &mut self,
        file: &mut File,
        listed: &ListedFile,
        touched: &mut BTreeSet<ReplicaKey>,
        changes: &mut Vec<Change>,
    ) {
        let is_new = file.state.is_none();
        file.modified = listed.modified;
        if !is_new && file.content == listed.content {
            // Written again with the same text: only the time counts, between files of one replica.
            file.content = listed.content.clone();
            if let Some(good) = file.good.as_mut().filter(|_| file.state != Some(FileState::KeepingLastGood))
            {
                good.modified = listed.modified;
                touched.insert(good.handoff.key());
            }
            return;
        }
        file.content = listed.content.clone();
        let refused = match &*listed.content {
            FileContent::Handoff(handoff) => match self.policy.check(&handoff.url) {
                Ok(()) => {
                    self.unclaim(file, touched);
                    self.claim(file, Arc::new((**handoff).clone()), touched);
                    return;
                }
                Err(why) => why,
            },
            FileContent::ModelOnly => {
                self.unclaim(file, touched);
                file.state = Some(FileState::Skipped);
                file.error = None;
                changes.push(Change::FileSkipped { name: file.name.clone() });
                return;
            }
            FileContent::Refused(why) => why.clone(),
        };
        let keeps = file.good.as_ref().map(|good| good.handoff.key());
        let state = if keeps.is_some() { FileState::KeepingLastGood } else { FileState::Refused };
        if file.state != Some(state) || file.error.as_deref() != Some(&refused) {
            changes.push(Change::FileRefused { name: file.name.clone(), reason: refused.clone(), keeps });
        }
        file.state = Some(state);
        file.error = Some(refused);
    }

    fn claim(&mut self, file: &mut File, handoff: Arc<Handoff>, touched: &mut BTreeSet<ReplicaKey>) {
        let key = handoff.key();
        self.claims.entry(key.clone()).or_default().insert(file.name.clone());
        touched.insert(key);
        file.good = Some(Good { handoff, modified: file.modified });
        file.state = None;
        file.error = None;
    }

    fn unclaim(&mut self, file: &mut File, touched: &mut BTreeSet<ReplicaKey>) {
        let Some(good) = file.good.take() else { return };
        let key = good.handoff.key();
        if let Some(names) = self.claims.get_mut(&key) {
            names.remove(&file.name);
            if names.is_empty() {
                self.claims.remove(&key);
            }
        }
        touched.insert(key);
    }

    /// Finds the replicas beyond the limits of a heartbeat: of pools, and within each pool of
    /// replicas, the first by name are in.
    fn find_excess(&mut self, touched: &mut BTreeSet<ReplicaKey>) {
        let mut excess = BTreeSet::new();
        if self.claims.len() > POOLS_MAX.min(REPLICAS_MAX) {
            let (mut pools, mut replicas) = (0, 0);
            let mut pool: Option<&PoolId> = None;
            for key in self.claims.keys() {
                if pool != Some(&key.pool) {
                    pool = Some(&key.pool);
                    pools += 1;
                    replicas = 0;
                }
                replicas += 1;
                if pools > POOLS_MAX || replicas > REPLICAS_MAX {
                    excess.insert(key.clone());
                }
            }
        }
        touched.extend(self.excess.symmetric_difference(&excess).cloned());
        self.excess = excess;
    }

    /// Chooses among the files that name a replica.
    fn elect(&mut self, key: &ReplicaKey, changes: &mut Vec<Change>) -> Election {
        let names = self.claims.get(key).cloned().unwrap_or_default();
        let ranked = |name: &Arc<str>| {
            let at = self.files.binary_search_by(|file| file.name.cmp(name)).ok()?;
            let good = self.files[at].good.as_ref()?;
            Some((good.handoff.generation, good.modified, Reverse(name.clone()), at))
        };
        let mut candidates: Vec<_> = names.iter().filter_map(ranked).collect();
        candidates.sort_unstable();
        let Some((generation, modified, Reverse(winner), winner_at)) = candidates.pop() else {
            return Err("its handoff file is gone");
        };
        let is_excess = self.excess.contains(key);
        for (other_generation, other_modified, Reverse(name), at) in candidates {
            let why = if other_generation < generation {
                format!("with the higher generation {generation}")
            } else if other_modified < modified {
                "written later".to_string()
            } else {
                "first by name".to_string()
            };
            let reason = format!("{winner:?} announces {key} too and wins, {why}");
            if self.files[at].settle(FileState::Shadowed, Some(reason.clone())) {
                changes.push(Change::FileShadowed { name, reason });
            }
        }
        let file = &mut self.files[winner_at];
        if is_excess {
            file.settle(FileState::Refused, Some(BEYOND_LIMIT.into()));
            return Err(BEYOND_LIMIT);
        }
        if file.settle(FileState::Accepted, None) {
            changes.push(Change::FileAccepted { name: winner.clone(), key: key.clone() });
        }
        let handoff = file.good.as_ref().map(|good| good.handoff.clone());
        handoff.map(|handoff| (handoff, winner)).ok_or("its handoff file is gone")
    }

    /// Part of [`super::Registry::check_invariants`].
    pub(super) fn check_invariants(&self) {
        assert!(self.files.is_sorted_by(|a, b| a.name < b.name), "files are sorted");
        let mut claimed = 0;
        for file in &self.files {
            assert!(file.state.is_some(), "{} was judged", file.name);
            if let Some(good) = &file.good {
                claimed += 1;
                let names = self.claims.get(&good.handoff.key());
                assert!(names.is_some_and(|names| names.contains(&file.name)), "{} claims", file.name);
            }
        }
        assert_eq!(
            claimed,
            self.claims.values().map(BTreeSet::len).sum::<usize>(),
            "no claim without its file"
        );
    }
}

impl File {
    fn unread(listed: &ListedFile) -> File {
        File {
            name: listed.name.clone(),
            modified: listed.modified,
            content: listed.content.clone(),
            good: None,
            state: None,
            error: None,
        }
    }

    /// Sets the outcome of the choice among files; true if it is another one than before. A file
    /// that keeps its last good state stays so: that it cannot be read is the greater news.
    fn settle(&mut self, state: FileState, error: Option<String>) -> bool {
        if self.state == Some(FileState::KeepingLastGood)
            || (self.state == Some(state) && self.error == error)
        {
            return false;
        }
        self.state = Some(state);
        self.error = error;
        true
    }
}
