//! Which file of the runtime directory announces which replica.
//!
//! A [`Listing`] is the truth about the names that it covers: what it holds is there, what it does not
//! hold is gone. A directory is told in one listing or in many small ones, in any order; what follows
//! from them is the same. What is the same as before costs one comparison of pointers a file.
//!
//! Several files may name a replica: the higher generation wins, then the later write, then the first
//! by name. A file that can no longer be used keeps its claim with what it said last.
//!
//! A handoff can also be *adopted*: then it stands without its file, which may be deleted. A file
//! beside it wins unless its generation is lower.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;
use std::sync::Arc;

use super::change::{Change, FileState};
use super::policy::EnginePolicy;
use crate::time::Wall;
use crate::wire::handoff::Handoff;
use crate::wire::id::{PoolId, ReplicaId, ReplicaKey};
use crate::wire::node::{POOLS_MAX, REPLICAS_MAX};

/// Most files taken from one directory, the first by name: ten times the largest machine that we
/// test, and still a listing of a few hundred milliseconds, in small pieces.
pub const FILES_MAX: usize = 100_000;
/// What one file takes of memory, with the replica that it names, in bytes: so much was measured.
pub const FILE_BYTES: usize = 2_304;
/// Most handoffs that stand without a file: what the state file holds is read at once, at start.
pub const ADOPTED_MAX: usize = 4_096;
/// What files beyond the limits are told.
const BEYOND_LIMIT: &str = "beyond the limit of pools or replicas";

/// What was found at some or all names of the directory.
#[derive(Clone, Debug)]
pub struct Listing {
    /// The names that were looked at.
    pub span: Span,
    /// The files that are there, sorted by name, each name once and all of them in the scope.
    pub files: Vec<ListedFile>,
    /// The directory holds more than [`FILES_MAX`] files, and only the first by name are told.
    pub truncated: bool,
    /// With this, every name of the directory has been looked at.
    pub completes: bool,
}

/// Names of a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Span {
    /// All from one bound to the other.
    Range(Bound<Arc<str>>, Bound<Arc<str>>),
    /// These, sorted.
    Names(Vec<Arc<str>>),
}

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
    Handoff(Arc<Handoff>),
    /// A model description without an engine.
    ModelOnly,
    /// It cannot be used, and why.
    Refused(String),
}

/// The handoff and the file that stand behind a replica, or why none does.
pub(super) type Election = Result<(Arc<Handoff>, Option<Arc<str>>), &'static str>;

/// The files as they were last listed.
#[derive(Debug)]
pub(super) struct Directory {
    policy: EnginePolicy,
    pub(super) files: BTreeMap<Arc<str>, File>,
    /// What speaks for each replica; no pool is empty.
    claims: BTreeMap<PoolId, BTreeMap<ReplicaId, Claim>>,
    /// The last pool within [`POOLS_MAX`], where there are more.
    last_pool: Option<PoolId>,
    /// The last replica within [`REPLICAS_MAX`], of pools that have more.
    last_replicas: BTreeMap<PoolId, ReplicaId>,
    truncated: bool,
    adopted: usize,
    /// Grows with every change of what is adopted.
    adopted_revision: u64,
    /// The limit that was last reported as reached.
    limit: Option<String>,
}

/// What speaks for a replica; never nothing.
#[derive(Debug, Default)]
struct Claim {
    files: BTreeSet<Arc<str>>,
    adopted: Option<Arc<Handoff>>,
}

/// A file as it was last read.
#[derive(Debug)]
pub(super) struct File {
    pub(super) modified: Wall,
    pub(super) content: Arc<FileContent>,
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

impl Listing {
    /// The whole directory at once. `files` are sorted by name, each name once.
    #[must_use]
    pub fn whole(mut files: Vec<ListedFile>) -> Listing {
        let truncated = files.len() > FILES_MAX;
        files.truncate(FILES_MAX);
        let span = Span::Range(Bound::Unbounded, Bound::Unbounded);
        Listing { span, files, truncated, completes: true }
    }
}

impl Directory {
    pub(super) fn new(policy: EnginePolicy) -> Directory {
        Directory {
            policy,
            files: BTreeMap::new(),
            claims: BTreeMap::new(),
            last_pool: None,
            last_replicas: BTreeMap::new(),
            truncated: false,
            adopted: 0,
            adopted_revision: 0,
            limit: None,
        }
    }

    /// Takes what was found. Returns every replica whose files changed, with what stands behind it now.
    pub(super) fn listing(
        &mut self,
        listing: &Listing,
        changes: &mut Vec<Change>,
    ) -> Vec<(ReplicaKey, Election)> {
        debug_assert!(listing.files.is_sorted_by(|a, b| a.name < b.name), "a listing is sorted by name");
        let mut touched = BTreeSet::new();
        for name in self.missing(listing) {
            if let Some(mut gone) = self.files.remove(&name) {
                self.unclaim(&name, &mut gone, &mut touched);
            }
        }
        for listed in &listing.files {
            let known = self.files.get(&listed.name);
            if known.is_some_and(|known| known.is(listed)) {
                continue;
            }
            let mut file = self.files.remove(&listed.name).unwrap_or_else(|| File::unread(listed));
            self.reread(&mut file, listed, &mut touched, changes);
            self.files.insert(listed.name.clone(), file);
        }
        self.truncated = listing.truncated;
        self.settle_touched(touched, changes)
    }

    /// Lets a handoff stand without a file. `None` ends that.
    pub(super) fn adopt(
        &mut self,
        key: &ReplicaKey,
        handoff: Option<Arc<Handoff>>,
        changes: &mut Vec<Change>,
    ) -> Vec<(ReplicaKey, Election)> {
        let mut touched = BTreeSet::new();
        let held = self.adopted(key);
        if held == handoff.as_ref() || (held.is_none() && self.adopted >= ADOPTED_MAX) {
            return Vec::new();
        }
        self.adopted = self.adopted + usize::from(handoff.is_some()) - usize::from(held.is_some());
        self.adopted_revision += 1;
        self.claim_mut(key).adopted = handoff;
        self.drop_empty_claim(key);
        touched.insert(key.clone());
        self.settle_touched(touched, changes)
    }

    /// The handoff of a replica that stands without a file.
    pub(super) fn adopted(&self, key: &ReplicaKey) -> Option<&Arc<Handoff>> {
        self.claim_of(key)?.adopted.as_ref()
    }

    /// How many handoffs stand without a file.
    pub(super) fn adopted_count(&self) -> usize {
        self.adopted
    }

    /// Every handoff that stands without a file.
    pub(super) fn all_adopted(&self) -> Vec<Arc<Handoff>> {
        self.all_claims().filter_map(|(_, claim)| claim.adopted.clone()).collect()
    }

    /// Grows with every change of what is adopted.
    pub(super) fn adopted_revision(&self) -> u64 {
        self.adopted_revision
    }

    /// Files whose handoffs are adopted word for word: nothing is lost with them.
    pub(super) fn redundant(&self) -> impl Iterator<Item = (&Arc<str>, &Arc<FileContent>)> {
        let is_redundant = |file: &File| {
            file.state == Some(FileState::Accepted)
                && file.good.as_ref().is_some_and(|good| {
                    self.adopted(&good.handoff.key()).is_some_and(|adopted| *adopted == good.handoff)
                })
        };
        self.files
            .iter()
            .filter(move |(_, file)| is_redundant(file))
            .map(|(name, file)| (name, &file.content))
    }

    /// Whether an engine URL is allowed here.
    pub(super) fn check_policy(&self, handoff: &Handoff) -> Result<(), String> {
        self.policy.check(&handoff.url)
    }

    /// Whether a file or an adopted handoff stands behind a replica.
    pub(super) fn announces(&self, key: &ReplicaKey) -> bool {
        self.claim_of(key).is_some() && !self.is_excess(key)
    }

    /// Every replica behind which a file or an adopted handoff stands.
    pub(super) fn announced(&self) -> impl Iterator<Item = ReplicaKey> {
        self.all_claims().map(|(key, _)| key).filter(|key| !self.is_excess(key))
    }

    fn all_claims(&self) -> impl Iterator<Item = (ReplicaKey, &Claim)> {
        self.claims.iter().flat_map(|(pool, replicas)| {
            let key = move |replica: &ReplicaId| ReplicaKey { pool: pool.clone(), replica: replica.clone() };
            replicas.iter().map(move |(replica, claim)| (key(replica), claim))
        })
    }

    fn claim_of(&self, key: &ReplicaKey) -> Option<&Claim> {
        self.claims.get(&key.pool)?.get(&key.replica)
    }

    /// Names in the listing's scope that are known and not in the listing.
    fn missing(&self, listing: &Listing) -> Vec<Arc<str>> {
        let is_listed = |name: &Arc<str>| listing.files.binary_search_by(|file| file.name.cmp(name)).is_ok();
        match &listing.span {
            Span::Names(names) => names
                .iter()
                .filter(|name| self.files.contains_key(*name) && !is_listed(name))
                .cloned()
                .collect(),
            Span::Range(from, to) => {
                let mut listed = listing.files.iter().peekable();
                let known = self.files.range::<Arc<str>, _>((from.as_ref(), to.as_ref()));
                let gone = known.filter(|(name, _)| {
                    while listed.next_if(|file| file.name < **name).is_some() {}
                    listed.peek().is_none_or(|file| file.name != **name)
                });
                gone.map(|(name, _)| name.clone()).collect()
            }
        }
    }

    /// Chooses again for every replica that was touched, and for those that a limit now cuts off or lets
    /// in.
    fn settle_touched(
        &mut self,
        mut touched: BTreeSet<ReplicaKey>,
        changes: &mut Vec<Change>,
    ) -> Vec<(ReplicaKey, Election)> {
        self.find_limits(&mut touched);
        let limit = if self.truncated {
            Some(format!(
                "the runtime directory holds more than {} files: the first by name are used",
                self.files.len()
            ))
        } else if self.last_pool.is_none() && self.last_replicas.is_empty() {
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
                    self.unclaim(&listed.name, file, touched);
                    self.claim(&listed.name, file, handoff.clone(), touched);
                    return;
                }
                Err(why) => why,
            },
            FileContent::ModelOnly => {
                self.unclaim(&listed.name, file, touched);
                file.state = Some(FileState::Skipped);
                file.error = None;
                changes.push(Change::FileSkipped { name: listed.name.clone() });
                return;
            }
            FileContent::Refused(why) => why.clone(),
        };
        let keeps = file.good.as_ref().map(|good| good.handoff.key());
        let state = if keeps.is_some() { FileState::KeepingLastGood } else { FileState::Refused };
        if file.state != Some(state) || file.error.as_deref() != Some(&refused) {
            changes.push(Change::FileRefused { name: listed.name.clone(), reason: refused.clone(), keeps });
        }
        file.state = Some(state);
        file.error = Some(refused);
    }

    fn claim(
        &mut self,
        name: &Arc<str>,
        file: &mut File,
        handoff: Arc<Handoff>,
        touched: &mut BTreeSet<ReplicaKey>,
    ) {
        let key = handoff.key();
        self.claim_mut(&key).files.insert(name.clone());
        touched.insert(key);
        file.good = Some(Good { handoff, modified: file.modified });
        file.state = None;
        file.error = None;
    }

    fn unclaim(&mut self, name: &Arc<str>, file: &mut File, touched: &mut BTreeSet<ReplicaKey>) {
        let Some(good) = file.good.take() else { return };
        let key = good.handoff.key();
        self.claim_mut(&key).files.remove(name);
        self.drop_empty_claim(&key);
        touched.insert(key);
    }

    fn claim_mut(&mut self, key: &ReplicaKey) -> &mut Claim {
        self.claims.entry(key.pool.clone()).or_default().entry(key.replica.clone()).or_default()
    }

    fn drop_empty_claim(&mut self, key: &ReplicaKey) {
        let Some(replicas) = self.claims.get_mut(&key.pool) else { return };
        if replicas.get(&key.replica).is_some_and(|claim| claim.files.is_empty() && claim.adopted.is_none()) {
            replicas.remove(&key.replica);
        }
        if replicas.is_empty() {
            self.claims.remove(&key.pool);
        }
    }

    fn is_excess(&self, key: &ReplicaKey) -> bool {
        self.last_pool.as_ref().is_some_and(|last| key.pool > *last)
            || self.last_replicas.get(&key.pool).is_some_and(|last| key.replica > *last)
    }

    /// Finds where the limits of a heartbeat cut: of pools, and within each pool of replicas, the first
    /// by name are in. Whatever lies between an old cut and a new one is touched.
    fn find_limits(&mut self, touched: &mut BTreeSet<ReplicaKey>) {
        let pools: BTreeSet<PoolId> = touched.iter().map(|key| key.pool.clone()).collect();
        for pool in pools {
            let replicas = self.claims.get(&pool).filter(|replicas| replicas.len() > REPLICAS_MAX);
            let cut = replicas.and_then(|replicas| replicas.keys().nth(REPLICAS_MAX - 1)).cloned();
            let before = match &cut {
                Some(cut) => self.last_replicas.insert(pool.clone(), cut.clone()),
                None => self.last_replicas.remove(&pool),
            };
            if let Some((low, high)) = between(before, cut)
                && let Some(replicas) = self.claims.get(&pool)
            {
                let moved =
                    replicas.range((Bound::Excluded(low), Bound::Unbounded)).map(|(replica, _)| replica);
                let moved = moved.take_while(|replica| high.as_ref().is_none_or(|high| *replica <= high));
                touched.extend(moved.map(|id| ReplicaKey { pool: pool.clone(), replica: id.clone() }));
            }
        }
        let too_many = self.claims.len() > POOLS_MAX;
        let cut = too_many.then(|| self.claims.keys().nth(POOLS_MAX - 1).cloned()).flatten();
        let before = std::mem::replace(&mut self.last_pool, cut.clone());
        if let Some((low, high)) = between(before, cut) {
            for (pool, replicas) in self.claims.range((Bound::Excluded(low), Bound::Unbounded)) {
                if high.as_ref().is_some_and(|high| pool > high) {
                    break;
                }
                let key = |replica: &ReplicaId| ReplicaKey { pool: pool.clone(), replica: replica.clone() };
                touched.extend(replicas.keys().map(key));
            }
        }
    }

    /// Chooses among what speaks for a replica.
    fn elect(&mut self, key: &ReplicaKey, changes: &mut Vec<Change>) -> Election {
        let Some(claim) = self.claim_of(key) else { return Err("its handoff file is gone") };
        let adopted = claim.adopted.clone();
        let ranked = |name: &Arc<str>| {
            let good = self.files.get(name)?.good.as_ref()?;
            Some((good.handoff.generation, good.modified, Reverse(name.clone())))
        };
        let mut candidates: Vec<_> = claim.files.iter().filter_map(ranked).collect();
        candidates.sort_unstable();
        let is_excess = self.is_excess(key);
        let outranked = |generation: u64| adopted.as_ref().is_some_and(|held| held.generation > generation);
        let winner = candidates.pop_if(|(generation, ..)| !outranked(*generation));
        for (generation, modified, Reverse(name)) in candidates {
            let reason = match &winner {
                Some((best, latest, Reverse(winner))) => {
                    let why = if generation < *best {
                        format!("with the higher generation {best}")
                    } else if modified < *latest {
                        "written later".to_string()
                    } else {
                        "first by name".to_string()
                    };
                    format!("{winner:?} announces {key} too and wins, {why}")
                }
                None => format!("{key} was accepted before with a higher generation than {generation}"),
            };
            let Some(file) = self.files.get_mut(&name) else { continue };
            if file.settle(FileState::Shadowed, Some(reason.clone())) {
                changes.push(Change::FileShadowed { name, reason });
            }
        }
        let Some((_, _, Reverse(winner))) = winner else {
            return match adopted {
                Some(_) if is_excess => Err(BEYOND_LIMIT),
                Some(handoff) => Ok((handoff, None)),
                None => Err("its handoff file is gone"),
            };
        };
        let Some(file) = self.files.get_mut(&winner) else { return Err("its handoff file is gone") };
        if is_excess {
            file.settle(FileState::Refused, Some(BEYOND_LIMIT.into()));
            return Err(BEYOND_LIMIT);
        }
        if file.settle(FileState::Accepted, None) {
            changes.push(Change::FileAccepted { name: winner.clone(), key: key.clone() });
        }
        let handoff = file.good.as_ref().map(|good| good.handoff.clone());
        handoff.map(|handoff| (handoff, Some(winner))).ok_or("its handoff file is gone")
    }

    /// Part of [`super::Registry::check_invariants`].
    pub(super) fn check_invariants(&self) {
        let mut claimed = 0;
        for (name, file) in &self.files {
            assert!(file.state.is_some(), "{name} was judged");
            if let Some(good) = &file.good {
                claimed += 1;
                let claim = self.claim_of(&good.handoff.key());
                assert!(claim.is_some_and(|claim| claim.files.contains(name)), "{name} claims");
            }
        }
        let count = |of: fn(&Claim) -> usize| self.all_claims().map(|(_, claim)| of(claim)).sum::<usize>();
        assert_eq!(claimed, count(|claim| claim.files.len()), "no claim without its file");
        assert_eq!(self.adopted, count(|claim| usize::from(claim.adopted.is_some())), "adopted are counted");
        let mut taken: BTreeMap<PoolId, usize> = BTreeMap::new();
        for key in self.announced() {
            *taken.entry(key.pool).or_default() += 1;
        }
        assert!(taken.len() <= POOLS_MAX, "pools are limited");
        assert!(taken.values().all(|replicas| *replicas <= REPLICAS_MAX), "replicas are limited");
    }
}

/// What lies between two cuts, `None` meaning that nothing is cut off: after the lower, up to the
/// higher one or to the end. `None` where they are the same.
fn between<T: Ord>(a: Option<T>, b: Option<T>) -> Option<(T, Option<T>)> {
    match (a, b) {
        (Some(a), Some(b)) if a == b => None,
        (Some(a), Some(b)) if a < b => Some((a, Some(b))),
        (Some(a), Some(b)) => Some((b, Some(a))),
        (Some(only), None) | (None, Some(only)) => Some((only, None)),
        (None, None) => None,
    }
}

impl File {
    fn unread(listed: &ListedFile) -> File {
        File {
            modified: listed.modified,
            content: listed.content.clone(),
            good: None,
            state: None,
            error: None,
        }
    }

    /// Whether it was read as it is listed.
    fn is(&self, listed: &ListedFile) -> bool {
        Arc::ptr_eq(&self.content, &listed.content) && self.modified == listed.modified
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
