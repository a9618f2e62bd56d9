//! The shell around the runtime directory: which files are there, and what they say.
//!
//! Two ways lead to a file. A *pass* looks at every name: the truth, in pieces that are small enough
//! for a turn of the loop. A *hint* names one file of which the kernel said that it changed; it is
//! looked at before anything else. Both end in a [`Listing`]. A file whose identity (inode, size,
//! times) is the same as before keeps its shared contents; all others are read.
//!
//! Files are opened without following links and without blocking, and read up to their limit. Who may
//! write here decides where prompts go, so directory and files count only if they belong to root or to
//! this process's user and nobody else may write them. A file that ends too early gets a moment to
//! become whole before it is refused: its writer may be at work.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, Read};
use std::ops::Bound;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{AtFlags, Dir, Mode, OFlags, RenameFlags, Stat};

use crate::reactor;
use crate::time::{Mono, Wall};
use crate::wire::handoff::{self, HANDOFF_BYTES_MAX, HandoffError, HandoffFile};

use super::directory::{FILES_MAX, FileContent, ListedFile, Listing, Span};

/// Files that are read in one step.
const READS_MAX: usize = 64;
/// Files that are looked at in one step.
const LOOKS_MAX: usize = 1_024;
/// Names that are taken from the kernel in one step.
const NAMES_MAX: usize = 1_024;
/// When a step stops early, in nanoseconds: a loop's turn should stay below 5 ms.
const STEP_NS_MAX: u64 = 1_500_000;
/// Names that changed and wait to be looked at; beyond that a pass is cheaper.
const HINTS_MAX: usize = 1_024;
/// NFS, SMB (three generations), FUSE, 9P, Ceph, AFS, GFS2, OCFS2, Lustre, overlay: numbers from the
/// kernel's `magic.h` and from the file systems' own documentation.
const SHARED_FILE_SYSTEMS: &[u32] = &[
    0x6969,
    0x517b,
    0xfe53_4d42,
    0xff53_4d42,
    0x6573_5546,
    0x0102_1997,
    0x00c3_6400,
    0x5346_414f,
    0x0116_1970,
    0x7461_636f,
    0x0bd0_0bd0,
    0x794c_7630,
];
/// How long a file may end too early before that counts, in milliseconds.
pub const WRITING_MS_MAX: u64 = 250;
/// How long after a change another one may still get the same times, in nanoseconds: the kernel stamps
/// files with the time of its last tick, of which there are 100 a second at the least.
const TIMES_NS_MAX: u64 = 20_000_000;
/// What is appended to the hidden name of a file that is being deleted.
const DELETING: &str = ".accepted";

/// The directory and what was read of it so far.
#[derive(Debug)]
pub struct Scanner {
    directory: PathBuf,
    files_max: usize,
    own_uid: u32,
    known: BTreeMap<Arc<str>, Known>,
    pass: Option<Pass>,
    /// A pass is wanted after the one that is under way.
    again: bool,
    hints: BTreeSet<Arc<str>>,
    /// Files that end too early, and when that counts.
    unfinished: BTreeMap<Arc<str>, Mono>,
    /// Files that could not be read for a cause that may pass without an event.
    unreadable: BTreeSet<Arc<str>>,
    truncated: bool,
    /// What an earlier process was deleting when it ended was put back.
    is_tidy: bool,
}

#[derive(Debug)]
struct Known {
    /// As it was when it was read; [`Identity::NONE`] where it must be read again in any case.
    identity: Identity,
    /// `None` while it has never been whole.
    file: Option<ListedFile>,
}

/// A look at every name.
#[derive(Debug)]
struct Pass {
    /// `None` once all names were taken.
    entries: Option<Dir>,
    /// From where on names that were known are still to be taken.
    known_from: Option<Bound<Arc<str>>>,
    /// Names that are still to be looked at.
    names: BTreeSet<Arc<str>>,
    /// The last name that was looked at.
    done: Bound<Arc<str>>,
    truncated: bool,
}

/// What changes when a file is written, replaced or touched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Identity {
    inode: u64,
    size: u64,
    modified_ns: u64,
    changed_ns: u64,
}

/// What a step may still do.
struct Budget {
    looks: usize,
    reads: usize,
    until: Mono,
}

impl Scanner {
    /// A scanner that has seen nothing, for whoever runs this process.
    #[must_use]
    pub fn new(directory: PathBuf) -> Scanner {
        Scanner::of_user(directory, rustix::process::geteuid().as_raw())
    }

    /// A scanner that judges as a process of the user `own_uid` does.
    #[must_use]
    pub fn of_user(directory: PathBuf, own_uid: u32) -> Scanner {
        Scanner {
            directory,
            files_max: FILES_MAX,
            own_uid,
            known: BTreeMap::new(),
            pass: None,
            again: false,
            hints: BTreeSet::new(),
            unfinished: BTreeMap::new(),
            unreadable: BTreeSet::new(),
            truncated: false,
            is_tidy: false,
        }
    }

    /// The directory.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Creates the directory if it does not exist, closed to other users.
    ///
    /// # Errors
    /// No permission, or something else is in its place.
    pub fn create_directory(&self) -> io::Result<()> {
        use std::os::unix::fs::DirBuilderExt;
        fs::DirBuilder::new().recursive(true).mode(0o750).create(&self.directory)
    }

    /// Whether the directory lies on a file system that does not report every change to this machine's
    /// kernel: network file systems, FUSE, and overlays whose lower layers change.
    #[must_use]
    pub fn is_shared(&self) -> bool {
        rustix::fs::statfs(&self.directory)
            .is_ok_and(|stat| SHARED_FILE_SYSTEMS.contains(&(stat.f_type as u32)))
    }

    /// Wants every name to be looked at, once more if that is under way already.
    pub fn want_pass(&mut self) {
        self.again = true;
    }

    /// Says that a name changed.
    pub fn hint(&mut self, name: &str) {
        if !is_handoff_name(name) {
            return;
        }
        let is_new = !self.known.contains_key(name);
        if self.hints.len() >= HINTS_MAX || (is_new && self.known.len() + self.hints.len() >= self.files_max)
        {
            // Beyond the limit, what one name more means depends on all the others.
            self.want_pass();
        } else {
            self.hints.insert(name.into());
        }
    }

    /// The same with at most so many files, and never more than [`FILES_MAX`].
    #[must_use]
    pub fn limited_to(self, files_max: usize) -> Scanner {
        Scanner { files_max: files_max.clamp(1, FILES_MAX), ..self }
    }

    /// Whether [`Scanner::step`] has something to do at once.
    #[must_use]
    pub fn is_busy(&self) -> bool {
        self.again || self.pass.is_some() || !self.hints.is_empty()
    }

    /// When [`Scanner::step`] has something to do without further hints.
    #[must_use]
    pub fn deadline(&self) -> Option<Mono> {
        self.unfinished.values().min().copied()
    }

    /// Whether a file could not be read: nothing may say so when it can.
    #[must_use]
    pub fn has_unreadable(&self) -> bool {
        !self.unreadable.is_empty()
    }

    /// Does a bounded piece of what is to be done.
    ///
    /// # Errors
    /// The directory cannot be opened or is not to be trusted. What was known stays known: a directory
    /// that is away for a moment (remounted, recreated) is no reason to stop anything. The pass is
    /// given up; the hints are too, for only a pass tells the truth after that.
    pub fn step(&mut self, now: Mono) -> io::Result<Vec<Listing>> {
        let due = self.unfinished.iter().filter(|(_, at)| **at <= now).map(|(name, _)| name.clone());
        self.hints.extend(due.collect::<Vec<_>>());
        if !self.is_busy() {
            return Ok(Vec::new());
        }
        let stepped = self.open_directory().and_then(|directory| self.step_in(&directory, now));
        if stepped.is_err() {
            self.pass = None;
            self.again = false;
            self.hints.clear();
            self.unfinished.clear();
        }
        stepped
    }

    /// Does everything that is to be done, for callers without a loop.
    ///
    /// # Errors
    /// As [`Scanner::step`].
    pub fn finish(&mut self, now: Mono) -> io::Result<Vec<Listing>> {
        let mut listings = Vec::new();
        while self.is_busy() {
            listings.extend(self.step(now)?);
        }
        Ok(listings)
    }

    /// Deletes a file, unless it says something else than `content` by now. A writer may replace it at
    /// the same moment, so it is taken out of the way first, and looked at there.
    ///
    /// # Errors
    /// No permission, or a failing disk.
    pub fn delete(&mut self, name: &Arc<str>, content: &Arc<FileContent>) -> io::Result<()> {
        let is_meant =
            |known: &Known| known.file.as_ref().is_some_and(|file| Arc::ptr_eq(&file.content, content));
        if !self.known.get(name).is_some_and(is_meant) {
            return Ok(());
        }
        let directory = self.open_directory()?;
        let aside = format!(".{name}{DELETING}");
        match rustix::fs::renameat(&directory, &**name, &directory, &aside) {
            Err(rustix::io::Errno::NOENT) => {
                self.hints.insert(name.clone());
                return Ok(());
            }
            renamed => renamed?,
        }
        // Times and inode do not tell two writings apart that follow each other closely; the words do.
        let stat = rustix::fs::statat(&directory, &aside, AtFlags::SYMLINK_NOFOLLOW)?;
        let found =
            read_checked(&directory, &aside, &stat, self.own_uid).ok().and_then(|bytes| read(&bytes).ok());
        if found.as_ref() == Some(&**content) {
            rustix::fs::unlinkat(&directory, &aside, AtFlags::empty())?;
        } else {
            put_back(&directory, &aside, name)?;
        }
        // The next listing tells what is there now, whether or not the kernel reports it.
        self.hints.insert(name.clone());
        Ok(())
    }

    fn step_in(&mut self, directory: &OwnedFd, now: Mono) -> io::Result<Vec<Listing>> {
        let until = Mono(reactor::now().mono.0.saturating_add(STEP_NS_MAX));
        let mut budget = Budget { looks: LOOKS_MAX, reads: READS_MAX, until };
        let mut listings = Vec::new();
        if !self.hints.is_empty() {
            listings.push(self.follow_hints(directory, &mut budget, now));
        }
        if self.pass.is_none() && self.again {
            self.again = false;
            let entries = Dir::read_from(directory)?;
            let names = BTreeSet::new();
            let done = Bound::Unbounded;
            self.pass =
                Some(Pass { entries: Some(entries), known_from: None, names, done, truncated: false });
        }
        if let Some(mut pass) = self.pass.take() {
            if pass.entries.is_some() {
                self.enumerate(&mut pass, directory)?;
            }
            if pass.entries.is_none() {
                self.add_known(&mut pass);
            }
            let has_all = pass.entries.is_none() && pass.known_from.is_none();
            let listing = if has_all { self.look(&mut pass, directory, &mut budget, now) } else { None };
            if listing.as_ref().is_none_or(|listing| !listing.completes) {
                self.pass = Some(pass);
            }
            listings.extend(listing);
        }
        Ok(listings)
    }

    fn open_directory(&self) -> io::Result<OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let open = |more| rustix::fs::open(&self.directory, flags | more, Mode::empty());
        let directory = match open(OFlags::NOATIME) {
            // It belongs to somebody else.
            Err(rustix::io::Errno::PERM) => open(OFlags::empty()),
            opened => opened,
        }?;
        check_owner(&rustix::fs::fstat(&directory)?, self.own_uid, "the directory")
            .map_err(io::Error::other)?;
        Ok(directory)
    }

    fn follow_hints(&mut self, directory: &OwnedFd, budget: &mut Budget, now: Mono) -> Listing {
        let mut names = Vec::new();
        let mut files = Vec::new();
        while !budget.is_spent()
            && let Some(name) = self.hints.pop_first()
        {
            if let Some(file) = self.look_at(directory, &name, budget, now) {
                // A pass that took its names before this one existed must not miss it.
                if let Some(pass) = self.pass.as_mut().filter(|pass| pass.is_ahead(&name)) {
                    pass.names.insert(name.clone());
                }
                files.push(file);
            }
            names.push(name);
        }
        let truncated = self.truncated || self.pass.as_ref().is_some_and(|pass| pass.truncated);
        Listing { span: Span::Names(names), files, truncated, completes: false }
    }

    /// Takes names from the kernel.
    fn enumerate(&mut self, pass: &mut Pass, directory: &OwnedFd) -> io::Result<()> {
        let Some(entries) = &mut pass.entries else { return Ok(()) };
        for _ in 0..NAMES_MAX {
            let Some(entry) = entries.next() else {
                pass.entries = None;
                pass.known_from = Some(Bound::Unbounded);
                self.is_tidy = true;
                return Ok(());
            };
            let entry = entry?;
            // A name that is not UTF-8 was written by no starter of engines.
            let Ok(mut name) = entry.file_name().to_str() else { continue };
            // What a process was deleting when it was killed may not be what it had accepted.
            if !self.is_tidy
                && let Some(original) = deleting(name)
            {
                if let Err(error) = put_back(directory, name, original) {
                    log::warn!("handoff file {name:?}: cannot be named {original:?} again: {error}");
                }
                name = original;
            }
            if is_handoff_name(name) {
                pass.names.insert(name.into());
                if pass.names.len() > self.files_max {
                    pass.names.pop_last();
                    pass.truncated = true;
                }
            }
        }
        Ok(())
    }

    /// Takes names that were known. They are looked at even if the kernel did not tell them: directories
    /// that change while they are read may leave out what is there.
    fn add_known(&self, pass: &mut Pass) {
        let Some(from) = pass.known_from.take() else { return };
        let last = pass.names.last().filter(|_| pass.truncated).cloned();
        let to = last.map_or(Bound::Unbounded, Bound::Included);
        if let (Bound::Excluded(from), Bound::Included(to)) = (&from, &to)
            && from >= to
        {
            return;
        }
        let known = self.known.range::<Arc<str>, _>((from.as_ref(), to.as_ref())).map(|(name, _)| name);
        let names: Vec<Arc<str>> = known.take(NAMES_MAX).cloned().collect();
        if names.len() == NAMES_MAX {
            pass.known_from = names.last().cloned().map(Bound::Excluded);
        }
        pass.names.extend(names);
    }

    /// Looks at the next names of a pass. `None` if there was no time for any.
    fn look(
        &mut self,
        pass: &mut Pass,
        directory: &OwnedFd,
        budget: &mut Budget,
        now: Mono,
    ) -> Option<Listing> {
        let from = pass.done.clone();
        let mut files: Vec<ListedFile> = Vec::new();
        let mut last = None;
        while !budget.is_spent()
            && let Some(name) = pass.names.pop_first()
        {
            files.extend(self.look_at(directory, &name, budget, now));
            last = Some(name);
        }
        let completes = pass.names.is_empty();
        let to = match last {
            _ if completes => Bound::Unbounded,
            Some(last) => {
                pass.done = Bound::Excluded(last.clone());
                Bound::Included(last)
            }
            None => return None,
        };
        // What is known and was not among the names is gone.
        let is_listed = |name: &Arc<str>| files.binary_search_by(|file| file.name.cmp(name)).is_ok();
        let known = self.known.range::<Arc<str>, _>((from.as_ref(), to.as_ref()));
        let gone = known.filter(|(name, known)| known.file.is_some() && !is_listed(name));
        for name in gone.map(|(name, _)| name.clone()).collect::<Vec<_>>() {
            self.known.remove(&name);
            self.unreadable.remove(&name);
        }
        if completes {
            self.truncated = pass.truncated;
        }
        let truncated = self.truncated || pass.truncated;
        Some(Listing { span: Span::Range(from, to), files, truncated, completes })
    }

    /// Looks at one name, and reads the file if it is another one than before.
    fn look_at(
        &mut self,
        directory: &OwnedFd,
        name: &Arc<str>,
        budget: &mut Budget,
        now: Mono,
    ) -> Option<ListedFile> {
        budget.looks = budget.looks.saturating_sub(1);
        let looked_at = reactor::now().wall;
        let stat = match rustix::fs::statat(directory, &**name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => stat,
            Err(rustix::io::Errno::NOENT) => {
                self.unfinished.remove(name);
                self.unreadable.remove(name);
                // There is room for a file that was beyond the limit.
                self.again |= self.known.remove(name).is_some() && self.truncated;
                return None;
            }
            Err(error) => {
                let file = refused(name, Wall(0), format!("cannot be looked at: {error}"));
                return self.remember(name, file, Identity::NONE, true);
            }
        };
        let identity = Identity::of(&stat);
        let limit = self.unfinished.get(name).copied();
        let known = self.known.get(name);
        if let Some(known) = known
            && known.identity == identity
            && limit.is_none_or(|limit| limit > now)
        {
            return known.file.clone();
        }
        budget.reads = budget.reads.saturating_sub(1);
        let modified = Wall(identity.modified_ns);
        let bytes = match read_checked(directory, name, &stat, self.own_uid) {
            Ok(bytes) => bytes,
            // Without an identity it is read again by every pass.
            Err(Unread { reason, may_pass }) => {
                return self.remember(name, refused(name, modified, reason), Identity::NONE, may_pass);
            }
        };
        let content = match read(&bytes) {
            Ok(content) => content,
            Err(error) if error.is_incomplete() && limit.is_none_or(|limit| limit > now) => {
                self.unfinished.entry(name.clone()).or_insert_with(|| now.plus_ms(WRITING_MS_MAX));
                let file = known.and_then(|known| known.file.clone());
                let identity = Identity::NONE;
                self.known.insert(name.clone(), Known { identity, file: file.clone() });
                self.unreadable.remove(name);
                return file;
            }
            Err(error) => FileContent::Refused(error.to_string()),
        };
        let file = ListedFile { name: name.clone(), modified, content: Arc::new(content) };
        let identity = if identity.is_final(looked_at) { identity } else { Identity::NONE };
        self.remember(name, file, identity, false)
    }

    fn remember(
        &mut self,
        name: &Arc<str>,
        file: ListedFile,
        identity: Identity,
        unreadable: bool,
    ) -> Option<ListedFile> {
        self.unfinished.remove(name);
        // The same words again are the same file.
        let same = self
            .known
            .get(name)
            .and_then(|known| known.file.as_ref())
            .filter(|known| known.content == file.content && known.modified == file.modified);
        let file = same.cloned().unwrap_or(file);
        self.known.insert(name.clone(), Known { identity, file: Some(file.clone()) });
        if unreadable {
            self.unreadable.insert(name.clone());
        } else {
            self.unreadable.remove(name);
        }
        Some(file)
    }
}

impl Pass {
    fn is_ahead(&self, name: &Arc<str>) -> bool {
        match &self.done {
            Bound::Excluded(done) | Bound::Included(done) => name > done,
            Bound::Unbounded => true,
        }
    }
}

impl Budget {
    fn is_spent(&self) -> bool {
        // The clock is asked now and then: asking costs about a tenth of a look.
        self.looks == 0
            || self.reads == 0
            || (self.looks.is_multiple_of(16) && reactor::now().mono >= self.until)
    }
}

/// Whether a name can be a handoff's: `*.json`, not hidden.
fn is_handoff_name(name: &str) -> bool {
    name.ends_with(".json") && !name.starts_with('.')
}

fn read(bytes: &[u8]) -> Result<FileContent, HandoffError> {
    Ok(match handoff::parse(bytes)? {
        HandoffFile::Engine(handoff) => FileContent::Handoff(handoff.into()),
        HandoffFile::ModelOnly => FileContent::ModelOnly,
    })
}

/// Gives a file its name back, unless something newer has taken it meanwhile: then the file goes.
fn put_back(directory: &OwnedFd, aside: &str, name: &str) -> io::Result<()> {
    match rustix::fs::renameat_with(directory, aside, directory, name, RenameFlags::NOREPLACE) {
        // File systems over the network know no such rename, but links, which replace nothing either.
        Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS | rustix::io::Errno::OPNOTSUPP) => {
            match rustix::fs::linkat(directory, aside, directory, name, AtFlags::empty()) {
                Ok(()) | Err(rustix::io::Errno::EXIST) => {
                    Ok(rustix::fs::unlinkat(directory, aside, AtFlags::empty())?)
                }
                Err(error) => Err(error.into()),
            }
        }
        Err(rustix::io::Errno::EXIST) => Ok(rustix::fs::unlinkat(directory, aside, AtFlags::empty())?),
        Err(rustix::io::Errno::NOENT) => Ok(()),
        renamed => Ok(renamed?),
    }
}

/// The name that a file had before it was being deleted, if it was.
fn deleting(name: &str) -> Option<&str> {
    name.strip_prefix('.')?.strip_suffix(DELETING).filter(|name| is_handoff_name(name))
}

fn refused(name: &Arc<str>, modified: Wall, reason: String) -> ListedFile {
    ListedFile { name: name.clone(), modified, content: Arc::new(FileContent::Refused(reason)) }
}

/// Why a file was not read.
struct Unread {
    reason: String,
    /// It may end without an event; all others end with the file's replacement or a change of its mode.
    may_pass: bool,
}

fn read_checked(directory: &impl AsFd, name: &str, listed: &Stat, own_uid: u32) -> Result<Vec<u8>, Unread> {
    let failed = |what: &str, error: &dyn std::fmt::Display| Unread {
        reason: format!("{what}: {error}"),
        may_pass: true,
    };
    // Checked before the open, because opening a device or a FIFO can itself do something.
    check_kind(listed)?;
    let mut flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY;
    // To note when a file was read is a change, which waits while the file system's journal is written.
    // Only the owner may do without.
    flags.set(OFlags::NOATIME, listed.st_uid == own_uid);
    let file = rustix::fs::openat(directory, name, flags, Mode::empty())
        .map_err(|error| failed("cannot be opened", &error))?;
    let stat = rustix::fs::fstat(&file).map_err(|error| failed("cannot be looked at", &error))?;
    check_kind(&stat)?;
    check_owner(&stat, own_uid, "it").map_err(|reason| Unread { reason, may_pass: false })?;
    read_bounded(file, usize::try_from(stat.st_size).unwrap_or(usize::MAX))
        .map_err(|error| failed("cannot be read", &error))
}

/// Reads a file of about `size` bytes, and no more than one byte beyond the limit.
fn read_bounded(file: OwnedFd, size: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; size.min(HANDOFF_BYTES_MAX) + 1];
    let mut file = File::from(file);
    let mut length = 0;
    loop {
        match file.read(&mut bytes[length..]) {
            Ok(0) => break,
            // Of a plain file less than was asked for is its end.
            Ok(read) if length + read < bytes.len() => {
                length += read;
                break;
            }
            // It grew since it was looked at.
            Ok(read) if bytes.len() <= HANDOFF_BYTES_MAX => {
                length += read;
                bytes.resize(HANDOFF_BYTES_MAX + 1, 0);
            }
            Ok(read) => {
                length += read;
                break;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    bytes.truncate(length);
    Ok(bytes)
}

fn check_kind(stat: &Stat) -> Result<(), Unread> {
    let (reason, may_pass) = match rustix::fs::FileType::from_raw_mode(stat.st_mode) {
        // The other link's removal is reported to whoever watches the other directory.
        rustix::fs::FileType::RegularFile if stat.st_nlink > 1 => {
            ("has a second hard link: whoever holds that could change it unseen", true)
        }
        rustix::fs::FileType::RegularFile => return Ok(()),
        rustix::fs::FileType::Symlink => ("a symbolic link: links are not followed", false),
        _ => ("not a regular file", false),
    };
    Err(Unread { reason: reason.into(), may_pass })
}

fn check_owner(stat: &Stat, own: u32, what: &str) -> Result<(), String> {
    if stat.st_uid != 0 && stat.st_uid != own {
        return Err(format!(
            "{what} belongs to user {}: handoffs must belong to root or to the user that this daemon runs as ({own})",
            stat.st_uid
        ));
    }
    if stat.st_mode & 0o002 != 0 {
        return Err(format!("every user may write {what}: remove that permission (chmod o-w)"));
    }
    Ok(())
}

impl Identity {
    /// Whether what is written after `at` gets other times than these.
    fn is_final(&self, at: Wall) -> bool {
        self.changed_ns.saturating_add(TIMES_NS_MAX) < at.0
    }

    const NONE: Identity = Identity { inode: 0, size: 0, modified_ns: 0, changed_ns: 0 };

    fn of(stat: &Stat) -> Identity {
        let ns =
            |s: i64, ns: u64| u64::try_from(s).unwrap_or(0).saturating_mul(1_000_000_000).saturating_add(ns);
        Identity {
            inode: stat.st_ino,
            size: u64::try_from(stat.st_size).unwrap_or(0),
            modified_ns: ns(stat.st_mtime, stat.st_mtime_nsec),
            changed_ns: ns(stat.st_ctime, stat.st_ctime_nsec),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A pass from beginning to end, as one listing of the whole directory.
    fn scan(scanner: &mut Scanner) -> Vec<ListedFile> {
        scanner.want_pass();
        let listings = scanner.finish(reactor::now().mono).expect("the directory can be listed");
        assert!(listings.last().is_some_and(|listing| listing.completes));
        listings.into_iter().flat_map(|listing| listing.files).collect()
    }

    fn states(scanner: &mut Scanner) -> Vec<(String, String)> {
        let listed = scan(scanner);
        let say = |content: &FileContent| match content {
            FileContent::Handoff(handoff) => handoff.key().to_string(),
            FileContent::ModelOnly => "model".into(),
            FileContent::Refused(reason) => reason.clone(),
        };
        listed.iter().map(|file| (file.name.to_string(), say(&file.content))).collect()
    }

    #[test]
    fn only_plain_files_of_ours_are_read() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = |name: &str| directory.path().join(name);
        let good = r#"{"pool_id":"p","url":"http://127.0.0.1:1"}"#;
        fs::write(path("good.json"), good).expect("written");
        fs::write(path(".hidden.json"), good).expect("written");
        fs::write(path("note.txt"), good).expect("written");
        fs::write(path("huge.json"), vec![b' '; HANDOFF_BYTES_MAX + 1]).expect("written");
        std::os::unix::fs::symlink("/etc/shadow", path("link.json")).expect("linked");
        fs::create_dir(path("dir.json")).expect("made");
        rustix::fs::mknodat(rustix::fs::CWD, path("fifo.json"), rustix::fs::FileType::Fifo, Mode::RUSR, 0)
            .expect("a fifo");
        fs::write(path("twice.json"), good).expect("written");
        fs::hard_link(path("twice.json"), path("elsewhere")).expect("linked");
        fs::write(path("open.json"), good).expect("written");
        fs::set_permissions(path("open.json"), std::os::unix::fs::PermissionsExt::from_mode(0o666))
            .expect("opened to all");
        let found = states(&mut Scanner::new(directory.path().into()));
        let expected = [
            ("dir.json", "not a regular file"),
            ("fifo.json", "not a regular file"),
            ("good.json", "p/r0"),
            ("huge.json", "larger than"),
            ("link.json", "symbolic link"),
            ("open.json", "every user may write"),
            ("twice.json", "second hard link"),
        ];
        assert_eq!(found.len(), expected.len(), "{found:?}");
        for ((name, state), (expected_name, part)) in found.iter().zip(expected) {
            assert!(name == expected_name && state.contains(part), "{name}: {state}");
        }
    }

    #[test]
    fn an_unchanged_file_keeps_its_contents_and_a_rewritten_one_does_not() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("a.json");
        fs::write(&path, r#"{"url":"http://127.0.0.1:1"}"#).expect("written");
        let mut scanner = Scanner::new(directory.path().into());
        let first = scan(&mut scanner);
        let second = scan(&mut scanner);
        assert!(Arc::ptr_eq(&first[0].content, &second[0].content));
        let other = directory.path().join(".a.tmp");
        fs::write(&other, r#"{"url":"http://127.0.0.1:2"}"#).expect("written");
        fs::rename(&other, &path).expect("renamed");
        let third = scan(&mut scanner);
        assert!(!Arc::ptr_eq(&first[0].content, &third[0].content));
        fs::remove_file(&path).expect("removed");
        assert!(scan(&mut scanner).is_empty());
    }
}
