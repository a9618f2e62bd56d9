//! When to scan the runtime directory: at once when the kernel reports a change, and now and then in
//! any case.
//!
//! Events are a hint. Where there are none (no inotify instances left, a network file system) the
//! directory is listed every watch interval; where there are, the listing is a safety net and comes
//! [`SAFETY_NET_FACTOR`] times more rarely. A directory that is missing, removed, renamed or
//! recreated is found again by path within the watch interval.

use std::io;
use std::path::PathBuf;

use crate::reactor::Registry;
use crate::reactor::dirwatch::DirWatch;
use crate::reactor::token::Token;
use crate::time::Mono;

use super::directory::ListedFile;
use super::scan::Scanner;

/// How much rarer the listing is while events arrive.
pub const SAFETY_NET_FACTOR: u64 = 30;

/// A directory under watch.
#[derive(Debug)]
pub struct Watch {
    scanner: Scanner,
    token: Token,
    interval_ms: u64,
    armed: Option<DirWatch>,
    due_at: Mono,
    /// Why the directory cannot be watched or listed, as last reported.
    trouble: Option<String>,
}

/// What a call of [`Watch::turn`] found.
#[derive(Debug, Default)]
pub struct Scan {
    /// The full listing, if one was made.
    pub files: Option<Vec<ListedFile>>,
    /// Trouble that began or changed (`Some(Some(..))`), or that ended (`Some(None)`).
    pub trouble: Option<Option<String>>,
}

impl Watch {
    /// Watches `directory`, listing it every `interval_ms` where there are no events. Creates the
    /// directory where it does not exist.
    #[must_use]
    pub fn new(directory: PathBuf, interval_ms: u64, token: Token) -> Watch {
        let scanner = Scanner::new(directory);
        Watch { scanner, token, interval_ms, armed: None, due_at: Mono(0), trouble: None }
    }

    /// `inotify` or `poll`: how changes are noticed.
    #[must_use]
    pub fn mode(&self) -> &'static str {
        if self.armed.is_some() { "inotify" } else { "poll" }
    }

    /// When [`Watch::turn`] must run at the latest.
    #[must_use]
    pub fn deadline(&self) -> Mono {
        self.due_at
    }

    /// Scans if the kernel `signalled` a change that matters, or if it is time.
    pub fn turn(&mut self, signalled: bool, now: Mono, registry: &Registry) -> Scan {
        let mut dirty = now >= self.due_at;
        if signalled && let Some(watch) = &mut self.armed {
            let hint = watch.take();
            dirty |= hint.dirty || hint.lost;
            if hint.lost {
                watch.deregister(registry);
                self.armed = None;
            }
        }
        if !dirty {
            return Scan::default();
        }
        let mut trouble = None;
        if self.armed.is_none() {
            match self.arm(registry) {
                Ok(watch) => self.armed = Some(watch),
                Err(error) => trouble = Some(self.explain(&error)),
            }
        }
        let files = match self.scanner.scan() {
            Ok(files) => Some(files),
            Err(error) => {
                trouble = Some(self.explain(&error));
                None
            }
        };
        let factor = if self.armed.is_some() && files.is_some() { SAFETY_NET_FACTOR } else { 1 };
        self.due_at = now.plus_ms(self.interval_ms * factor);
        let changed = trouble != self.trouble;
        self.trouble.clone_from(&trouble);
        Scan { files, trouble: changed.then_some(trouble) }
    }

    fn arm(&self, registry: &Registry) -> io::Result<DirWatch> {
        match DirWatch::arm(self.scanner.directory(), registry, self.token) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                self.scanner.create_directory()?;
                DirWatch::arm(self.scanner.directory(), registry, self.token)
            }
            armed => armed,
        }
    }

    fn explain(&self, error: &io::Error) -> String {
        let directory = self.scanner.directory().display();
        let advice = match error.kind() {
            io::ErrorKind::PermissionDenied => {
                "give the user of this daemon access to it, or name another directory with --runtime-dir"
            }
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => {
                "create it, or name another directory with --runtime-dir"
            }
            // ENOSPC and EMFILE mean the limits fs.inotify.max_user_watches and max_user_instances.
            _ => "it is listed regularly instead; fs.inotify limits may be too low",
        };
        format!("runtime directory {directory}: {error}: {advice}")
    }
}
