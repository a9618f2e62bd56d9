//! A directory's "something changed", from inotify. A hint and no more: the listing is the truth, so
//! a lost or invented event costs a listing and nothing else.
//!
//! The watch is on an inode. If the directory is removed, renamed or unmounted, the events that this
//! file reports as [`Hint::lost`] tell the owner to arm it again by path.

use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

use inotify::{EventMask, Inotify, WatchMask};
use mio::unix::SourceFd;

use super::Registry;
use super::token::Token;

/// Enough for about a hundred events a read. The kernel refuses buffers below one event's size.
const BUFFER_BYTES: usize = 8 * 1024;

/// What the events since the last call mean.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Hint {
    /// List the directory.
    pub dirty: bool,
    /// The watch is gone: arm it again.
    pub lost: bool,
}

/// An armed watch on one directory.
#[derive(Debug)]
pub struct DirWatch {
    inotify: Inotify,
    buffer: Vec<u8>,
}

impl DirWatch {
    /// Arms a watch. Arm first, list afterwards: what changes in between is then reported.
    ///
    /// # Errors
    /// The directory does not exist or is not readable, or the kernel's limits on inotify instances or
    /// watches are reached.
    pub fn arm(directory: &Path, registry: &Registry, token: Token) -> io::Result<DirWatch> {
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
        Ok(DirWatch { inotify, buffer: vec![0; BUFFER_BYTES] })
    }

    /// Takes all pending events.
    pub fn take(&mut self) -> Hint {
        let mut hint = Hint::default();
        loop {
            let events = match self.inotify.read_events(&mut self.buffer) {
                Ok(events) => events,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return hint,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                // A watch that cannot be read is no watch.
                Err(_) => return Hint { dirty: true, lost: true },
            };
            for event in events {
                // Names that can be no handoff (temporary files of writers) are not worth a listing.
                let relevant = event.name.is_none_or(|name| {
                    let name = name.as_encoded_bytes();
                    name.ends_with(b".json") && !name.starts_with(b".")
                });
                let gone =
                    EventMask::DELETE_SELF | EventMask::MOVE_SELF | EventMask::IGNORED | EventMask::UNMOUNT;
                hint.lost |= event.mask.intersects(gone);
                hint.dirty |= relevant || event.mask.contains(EventMask::Q_OVERFLOW);
            }
        }
    }

    /// Leaves the poll before it is dropped.
    pub fn deregister(&self, registry: &Registry) {
        let _ = registry.deregister(&mut SourceFd(&self.inotify.as_raw_fd()));
    }
}
