//! When to look at the runtime directory: at once at what the kernel reports, and now and then at all
//! of it.
//!
//! Events are a hint. Where there are none (no inotify instances left, a network file system) every
//! name is looked at every watch interval; where there are, that is a safety net and comes
//! [`SAFETY_NET_FACTOR`] times more rarely, and each interval asks only whether the path still leads to
//! what is watched. A directory that is missing, removed, renamed, recreated or
//! mounted over is found again by path.

use std::collections::BTreeSet;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use crate::reactor::Registry;
use crate::reactor::dirwatch::DirWatch;
use crate::reactor::token::Token;
use crate::time::{Mono, earliest};

use super::directory::{FileContent, Listing};
use super::scan::Scanner;

/// How much rarer the look at every name is while events arrive.
pub const SAFETY_NET_FACTOR: u64 = 30;
/// How much longer than that it may wait for a turn that something else brings about, in watch intervals:
/// an idle process is not woken up for it.
pub const SAFETY_NET_SLACK: u64 = 15;
/// First pause before a directory that is away is looked for again, in milliseconds; it doubles up to
/// the watch interval.
pub const AWAY_MS_MIN: u64 = 50;
/// Files of which is remembered that they cannot be deleted: beyond that the log says enough.
const UNDELETABLE_MAX: usize = 1_024;

/// A directory under watch.
#[derive(Debug)]
pub struct Watch {
    scanner: Scanner,
    token: Token,
    interval_ms: u64,
    /// None until the kernel gives one.
    events: Option<DirWatch>,
    /// The kernel reports what this machine does to the file system, and others write to it too.
    is_shared: bool,
    /// Everything is looked at in the first turn after this.
    due_at: Mono,
    /// And the loop wakes up for it then.
    wake_at: Mono,
    away_ms: u64,
    /// It was never listed: it is created where it does not exist.
    is_new: bool,
    /// As last reported.
    trouble: Option<Trouble>,
    /// When the path is next asked whether it still leads to what is watched.
    check_at: Mono,
    /// Files of which it was told that they cannot be deleted.
    undeletable: BTreeSet<Arc<str>>,
}

/// What is wrong with the directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trouble {
    /// What, and what to do.
    pub text: String,
    /// It cannot be listed: what is known may be out of date. Otherwise it is only noticed later.
    pub is_blind: bool,
}

/// What a call of [`Watch::turn`] found.
#[derive(Debug, Default)]
pub struct Scan {
    /// What was found, to be taken in this order.
    pub listings: Vec<Listing>,
    /// Trouble that began or changed (`Some(Some(..))`), or that ended (`Some(None)`).
    pub trouble: Option<Option<Trouble>>,
}

impl Watch {
    /// Watches `directory`, looking at all of it every `interval_ms` where there are no events. Creates
    /// the directory where it does not exist at first.
    #[must_use]
    pub fn new(directory: PathBuf, interval_ms: u64, token: Token) -> Watch {
        Watch {
            scanner: Scanner::new(directory),
            token,
            interval_ms,
            events: None,
            is_shared: false,
            due_at: Mono(0),
            wake_at: Mono(0),
            away_ms: AWAY_MS_MIN,
            is_new: true,
            trouble: None,
            check_at: Mono(0),
            undeletable: BTreeSet::new(),
        }
    }

    /// The same with at most so many files.
    #[must_use]
    pub fn limited_to(mut self, files_max: usize) -> Watch {
        self.scanner = self.scanner.limited_to(files_max);
        self
    }

    /// How changes are noticed: `inotify`, `poll`, or both where the file system is shared with others.
    #[must_use]
    pub fn mode(&self) -> &'static str {
        match (self.is_armed(), self.is_shared) {
            (true, false) => "inotify",
            (true, true) => "inotify+poll",
            (false, _) => "poll",
        }
    }

    /// When [`Watch::turn`] must run at the latest.
    #[must_use]
    pub fn deadline(&self) -> Mono {
        earliest(Some(self.wake_at), self.scanner.deadline()).unwrap_or(self.wake_at)
    }

    /// Looks at everything by `at` at the latest.
    pub fn look_by(&mut self, at: Mono) {
        self.due_at = self.due_at.min(at);
        self.wake_at = self.wake_at.min(at);
    }

    fn look_at(&mut self, at: Mono) {
        (self.due_at, self.wake_at) = (at, at);
    }

    /// Whether a look is under way that must go on before the loop blocks.
    #[must_use]
    pub fn busy(&self) -> bool {
        self.scanner.is_busy()
    }

    /// Looks at what the kernel `signalled`, and at everything if it is time. Each call does a bounded
    /// piece of it.
    pub fn turn(&mut self, signalled: bool, now: Mono, registry: &Registry) -> Scan {
        if signalled && let Some(watch) = &mut self.events {
            let scanner = &mut self.scanner;
            let hint = watch.take(&mut |name| scanner.hint(name));
            if hint.lost {
                watch.disarm();
            }
            if hint.dirty || hint.lost {
                self.look_at(now);
            }
        }
        if now >= self.check_at {
            self.check_at = now.plus_ms(self.interval_ms);
            // Neither a mount over the directory nor another name for one above it sends an event. Nobody is
            // woken up to look for that: any turn will do, and the safety net is one.
            if self.is_elsewhere() {
                self.look_at(now);
            }
        }
        let mut trouble = self.trouble.clone();
        if now >= self.due_at {
            trouble = self.prepare(registry);
            self.scanner.want_pass();
            self.look_at(now.plus_ms(self.interval_ms));
        }
        let listings = match self.scanner.step(now) {
            Ok(listings) => listings,
            Err(error) => {
                self.disarm();
                trouble = Some(self.explain(&error, true));
                self.look_at(now.plus_ms(self.away_ms.min(self.interval_ms)));
                self.away_ms = (self.away_ms * 2).min(self.interval_ms);
                Vec::new()
            }
        };
        if listings.iter().any(|listing| listing.completes) {
            self.away_ms = AWAY_MS_MIN;
            self.is_new = false;
            let events_suffice = self.is_armed() && !self.is_shared;
            let (factor, slack) = if events_suffice { (SAFETY_NET_FACTOR, SAFETY_NET_SLACK) } else { (1, 0) };
            self.due_at = now.plus_ms(self.interval_ms * factor);
            self.wake_at = self.due_at.plus_ms(self.interval_ms * slack);
        }
        if self.scanner.has_unreadable() {
            self.look_by(now.plus_ms(self.interval_ms));
        }
        let changed = trouble != self.trouble;
        self.trouble.clone_from(&trouble);
        Scan { listings, trouble: changed.then_some(trouble) }
    }

    /// Arms the watch before everything is looked at, so that nothing falls between the two. Trouble
    /// with that is none with looking.
    fn prepare(&mut self, registry: &Registry) -> Option<Trouble> {
        if self.is_new {
            // If that fails, looking says so.
            let _ = self.scanner.create_directory();
        }
        if self.is_elsewhere() {
            self.disarm();
        }
        if !self.is_armed()
            && let Err(error) = self.arm(registry)
        {
            return Some(self.explain(&error, false));
        }
        self.is_shared.then(|| Trouble {
            text: format!(
                "runtime directory {}: its file system does not report what other machines or layers change; every file is looked at every {} ms instead",
                self.scanner.directory().display(),
                self.interval_ms
            ),
            is_blind: false,
        })
    }

    /// Deletes a file, unless it says something else than `content` by now.
    pub fn delete(&mut self, name: &Arc<str>, content: &Arc<FileContent>) {
        match self.scanner.delete(name, content) {
            Ok(()) => {
                self.undeletable.remove(name);
            }
            // It is tried again with every listing, and told once.
            Err(error) => {
                if self.undeletable.len() < UNDELETABLE_MAX && self.undeletable.insert(name.clone()) {
                    log::warn!(
                        "handoff file {name:?}: cannot be deleted: {error}; give the user of this daemon write access to the runtime directory"
                    );
                }
            }
        }
    }

    fn arm(&mut self, registry: &Registry) -> io::Result<()> {
        if self.events.is_none() {
            self.events = Some(DirWatch::new(registry, self.token)?);
        }
        if let Some(events) = &mut self.events {
            events.arm(self.scanner.directory())?;
            self.is_shared = self.scanner.is_shared();
        }
        Ok(())
    }

    fn disarm(&mut self) {
        if let Some(events) = &mut self.events {
            events.disarm();
        }
    }

    fn is_armed(&self) -> bool {
        self.events.as_ref().is_some_and(DirWatch::is_armed)
    }

    /// The path leads to something else than what is watched.
    fn is_elsewhere(&self) -> bool {
        self.events.as_ref().is_some_and(|e| e.is_armed() && !e.is_still(self.scanner.directory()))
    }

    fn explain(&self, error: &io::Error, is_blind: bool) -> Trouble {
        let directory = self.scanner.directory().display();
        let advice = match error.kind() {
            io::ErrorKind::PermissionDenied => {
                "give the user of this daemon access to it, or name another directory with --runtime-dir"
            }
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => {
                "create it, or name another directory with --runtime-dir; what was known stays in use"
            }
            _ if is_blind => "what was known stays in use, and it is tried again",
            // ENOSPC and EMFILE mean the limits fs.inotify.max_user_watches and max_user_instances.
            _ => "it is looked at every watch interval instead; fs.inotify limits may be too low",
        };
        Trouble { text: format!("runtime directory {directory}: {error}: {advice}"), is_blind }
    }
}
