//! A directory's "something changed", from inotify. A hint and no more: the listing is the truth, so
//! a lost or invented event costs a listing and nothing else.
//!
//! The watch is on an inode. If the directory is removed, renamed or unmounted, the events that this
//! file reports as [`Hint::lost`] tell the owner to arm it again by path. The kernel's queue of events is
//! kept meanwhile: to close one takes the kernel tens of milliseconds, in which a loop would stand still.

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use inotify::{EventMask, Inotify, WatchDescriptor, WatchMask};
use mio::unix::SourceFd;

use super::Registry;
use super::token::Token;

/// Enough for about a hundred events a read. The kernel refuses buffers below one event's size.
const BUFFER_BYTES: usize = 8 * 1024;
/// Largest event: its head, and a name of 255 bytes with its end and its padding.
const EVENT_BYTES_MAX: usize = 16 + 256;
/// Reads of one call: a writer that never pauses must not keep the loop for itself.
const READS_MAX: usize = 64;

/// What the events since the last call mean, beside the names that changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Hint {
    /// Names were lost, or the directory itself changed: list all of it.
    pub dirty: bool,
    /// The watch is gone: arm it again.
    pub lost: bool,
}

/// A watch on one directory at a time.
#[derive(Debug)]
pub struct DirWatch {
    inotify: Inotify,
    buffer: Vec<u8>,
    armed: Option<Armed>,
}

#[derive(Debug)]
struct Armed {
    watch: WatchDescriptor,
    inode: (u64, u64),
}

fn inode_of(directory: &Path) -> io::Result<(u64, u64)> {
    let metadata = directory.metadata()?;
    Ok((metadata.dev(), metadata.ino()))
}

impl DirWatch {
    /// A watch on nothing yet.
    ///
    /// # Errors
    /// The kernel's limit on inotify instances is reached.
    pub fn new(registry: &Registry, token: Token) -> io::Result<DirWatch> {
        let inotify = Inotify::init()?;
        registry.register(&mut SourceFd(&inotify.as_raw_fd()), token.into(), mio::Interest::READABLE)?;
        Ok(DirWatch { inotify, buffer: vec![0; BUFFER_BYTES], armed: None })
    }

    /// Watches `directory` and nothing else. Arm first, list afterwards: what changes in between is then
    /// reported.
    ///
    /// # Errors
    /// The directory does not exist or is not readable, or the kernel's limit on watches is reached.
    pub fn arm(&mut self, directory: &Path) -> io::Result<()> {
        self.disarm();
        let inode = inode_of(directory)?;
        let mask = WatchMask::CREATE
            | WatchMask::CLOSE_WRITE
            | WatchMask::MOVED_TO
            | WatchMask::MOVED_FROM
            | WatchMask::DELETE
            | WatchMask::ATTRIB
            | WatchMask::DELETE_SELF
            | WatchMask::MOVE_SELF
            | WatchMask::ONLYDIR;
        let watch = self.inotify.watches().add(directory, mask)?;
        self.armed = Some(Armed { watch, inode });
        Ok(())
    }

    /// Watches nothing.
    pub fn disarm(&mut self) {
        if let Some(armed) = self.armed.take() {
            // With its inode the watch is gone already.
            let _ = self.inotify.watches().remove(armed.watch);
        }
    }

    /// Whether it watches something.
    #[must_use]
    pub fn is_armed(&self) -> bool {
        self.armed.is_some()
    }

    /// Takes the pending events, and tells the names of what changed. If there is no end of them, all of
    /// the directory is to be listed; what comes later is a new edge.
    pub fn take(&mut self, changed: &mut impl FnMut(&str)) -> Hint {
        let mut hint = Hint::default();
        for _ in 0..READS_MAX {
            let events = match self.inotify.read_events(&mut self.buffer) {
                Ok(events) => events,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return hint,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                // A watch that cannot be read is no watch.
                Err(_) => return Hint { dirty: true, lost: true },
            };
            let mut count = 0;
            for event in events {
                count += 1;
                // What was watched before still tells of its end.
                let is_current = self.armed.as_ref().is_some_and(|armed| armed.watch == event.wd);
                if !is_current && !event.mask.contains(EventMask::Q_OVERFLOW) {
                    continue;
                }
                let gone =
                    EventMask::DELETE_SELF | EventMask::MOVE_SELF | EventMask::IGNORED | EventMask::UNMOUNT;
                hint.lost |= event.mask.intersects(gone);
                match event.name {
                    // Nobody who starts engines writes a name that is not UTF-8.
                    Some(name) => changed(name.to_str().unwrap_or_default()),
                    None => hint.dirty = true,
                }
            }
            // Where one more would have had room, there was none; what comes later is a new edge.
            if (count + 1) * EVENT_BYTES_MAX <= BUFFER_BYTES {
                return hint;
            }
        }
        Hint { dirty: true, ..hint }
    }

    /// Whether the path still leads to the directory that is watched. Something mounted over it sends
    /// no event.
    #[must_use]
    pub fn is_still(&self, directory: &Path) -> bool {
        self.armed.as_ref().is_some_and(|armed| inode_of(directory).is_ok_and(|inode| inode == armed.inode))
    }
}

/// Watches on the directories in which a few files lie: files that are read once and again when they
/// change, such as tokens and certificates.
#[derive(Debug)]
pub struct FileWatch {
    token: Token,
    directories: Vec<(PathBuf, Option<DirWatch>)>,
}

impl FileWatch {
    /// For these files; nothing is watched before [`FileWatch::renew`].
    pub fn new<'a>(files: impl Iterator<Item = &'a Path>, token: Token) -> FileWatch {
        let parent = |file: &Path| match file.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent.to_path_buf(),
            _ => PathBuf::from("."),
        };
        let mut directories: Vec<PathBuf> = files.map(parent).collect();
        directories.sort_unstable();
        directories.dedup();
        FileWatch { token, directories: directories.into_iter().map(|path| (path, None)).collect() }
    }

    /// Takes what was reported, and watches what is not watched, or is another directory by now. To be
    /// called before the files are looked at. Returns where that cannot be done.
    pub fn renew(&mut self, registry: &Registry) -> Vec<(&Path, io::Error)> {
        let mut failed = Vec::new();
        for (directory, watch) in &mut self.directories {
            let mut arm = || {
                if watch.is_none() {
                    *watch = Some(DirWatch::new(registry, self.token)?);
                }
                let Some(watch) = watch else { return Ok(()) };
                let is_lost = watch.take(&mut |_| ()).lost;
                if is_lost || !watch.is_still(directory) { watch.arm(directory) } else { Ok(()) }
            };
            if let Err(error) = arm() {
                failed.push((directory.as_path(), error));
            }
        }
        failed
    }

    /// Whether all is watched, and still stands at its path. While somebody holds a directory that was removed,
    /// be it by a socket in it, no event tells of its end.
    #[must_use]
    pub fn is_still(&self) -> bool {
        self.directories
            .iter()
            .all(|(directory, watch)| watch.as_ref().is_some_and(|watch| watch.is_still(directory)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reactor::Reactor;
    use crate::reactor::token::Kind;
    use std::fs;

    fn names(watch: &mut DirWatch) -> (Vec<String>, Hint) {
        let mut names = Vec::new();
        let hint = watch.take(&mut |name| names.push(name.to_string()));
        (names, hint)
    }

    #[test]
    fn what_becomes_of_a_directory_that_was_watched_before_is_not_told() {
        let home = tempfile::tempdir().expect("a directory");
        let (old, new) = (home.path().join("old"), home.path().join("new"));
        fs::create_dir(&old).expect("made");
        fs::create_dir(&new).expect("made");
        let reactor = Reactor::new().expect("a reactor");
        let registry = reactor.registry().expect("a registry");
        let mut watch = DirWatch::new(&registry, Token::only(Kind::DirWatch)).expect("a watch");
        assert!(!watch.is_armed() && !watch.is_still(&old));
        watch.arm(&old).expect("armed");
        fs::write(old.join("a"), "").expect("written");
        assert!(names(&mut watch).0.contains(&"a".to_string()));

        fs::write(old.join("b"), "").expect("written");
        watch.arm(&new).expect("armed");
        fs::write(old.join("c"), "").expect("written");
        fs::remove_dir_all(&old).expect("removed");
        assert_eq!(names(&mut watch), (Vec::new(), Hint::default()));
        assert!(watch.is_still(&new) && !watch.is_still(&old));
        fs::write(new.join("d"), "").expect("written");
        assert!(names(&mut watch).0.contains(&"d".to_string()));

        fs::rename(&new, home.path().join("elsewhere")).expect("renamed");
        assert!(names(&mut watch).1.lost);
        assert!(!watch.is_still(&new));
        watch.disarm();
        assert!(!watch.is_armed() && watch.arm(&new).is_err(), "it is not there");
    }

    #[test]
    fn files_are_watched_in_whichever_directory_stands_at_their_path() {
        let home = tempfile::tempdir().expect("a directory");
        let directory = home.path().join("secrets");
        fs::create_dir(&directory).expect("made");
        let mut reactor = Reactor::new().expect("a reactor");
        let registry = reactor.registry().expect("a registry");
        let files = [directory.join("token"), directory.join("key"), home.path().join("away/file")];
        let mut watch = FileWatch::new(files.iter().map(PathBuf::as_path), Token::only(Kind::Credentials));
        let failed = watch.renew(&registry);
        assert_eq!(failed.len(), 1, "{failed:?}");
        assert_eq!(failed[0].0, home.path().join("away"));

        let mut is_signalled = || {
            reactor.wait(None, true).expect("no wait");
            reactor.events().count() > 0
        };
        is_signalled();
        fs::write(&files[0], "new").expect("written");
        assert!(is_signalled());
        watch.renew(&registry);
        // Another directory under the same name, as some tools replace one.
        fs::rename(&directory, home.path().join("before")).expect("renamed");
        fs::create_dir(&directory).expect("made");
        watch.renew(&registry);
        is_signalled();
        fs::write(&files[1], "new").expect("written");
        assert!(is_signalled());
    }

    #[test]
    fn a_directory_that_was_removed_while_somebody_holds_it_is_missed() {
        let home = tempfile::tempdir().expect("a directory");
        let directory = home.path().join("sockets");
        fs::create_dir(&directory).expect("made");
        let reactor = Reactor::new().expect("a reactor");
        let registry = reactor.registry().expect("a registry");
        let socket = directory.join("1.sock");
        let mut watch = FileWatch::new(std::iter::once(socket.as_path()), Token::only(Kind::Provisioners));
        assert!(!watch.is_still() && watch.renew(&registry).is_empty() && watch.is_still());
        let held = std::os::unix::net::UnixListener::bind(&socket).expect("bound");
        fs::remove_dir_all(&directory).expect("removed");
        assert!(!watch.is_still());
        fs::create_dir(&directory).expect("made");
        assert!(!watch.is_still(), "it is another one");
        assert!(watch.renew(&registry).is_empty() && watch.is_still());
        drop(held);
    }
}
