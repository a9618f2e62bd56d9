//! A directory's "something changed", from inotify. A hint and no more: the listing is the truth, so
//! a lost or invented event costs a listing and nothing else.
//!
//! The watch is on an inode. If the directory is removed, renamed or unmounted, the events that this
//! file reports as [`Hint::lost`] tell the owner to arm it again by path.

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use inotify::{EventMask, Inotify, WatchMask};
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

/// An armed watch on one directory.
#[derive(Debug)]
pub struct DirWatch {
    inotify: Inotify,
    buffer: Vec<u8>,
    inode: (u64, u64),
}

fn inode_of(directory: &Path) -> io::Result<(u64, u64)> {
    let metadata = directory.metadata()?;
    Ok((metadata.dev(), metadata.ino()))
}

impl DirWatch {
    /// Arms a watch. Arm first, list afterwards: what changes in between is then reported.
    ///
    /// # Errors
    /// The directory does not exist or is not readable, or the kernel's limits on inotify instances or
    /// watches are reached.
    pub fn arm(directory: &Path, registry: &Registry, token: Token) -> io::Result<DirWatch> {
        let inode = inode_of(directory)?;
        let inotify = Inotify::init()?;
        let mask = WatchMask::CREATE
            | WatchMask::CLOSE_WRITE
            | WatchMask::MOVED_TO
            | WatchMask::MOVED_FROM
            | WatchMask::DELETE
            | WatchMask::ATTRIB
            | WatchMask::DELETE_SELF
            | WatchMask::MOVE_SELF
            | WatchMask::ONLYDIR;
        inotify.watches().add(directory, mask)?;
        registry.register(&mut SourceFd(&inotify.as_raw_fd()), token.into(), mio::Interest::READABLE)?;
        Ok(DirWatch { inotify, buffer: vec![0; BUFFER_BYTES], inode })
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
        inode_of(directory).is_ok_and(|inode| inode == self.inode)
    }

    /// Leaves the poll before it is dropped.
    pub fn deregister(&self, registry: &Registry) {
        let _ = registry.deregister(&mut SourceFd(&self.inotify.as_raw_fd()));
    }
}
