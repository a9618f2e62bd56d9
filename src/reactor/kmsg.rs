//! The kernel's log as a readable source: `/dev/kmsg` gives one record a read, from the end of the log
//! on.
//!
//! Readers that are too slow lose the oldest records and are told so once; they go on. Anything that
//! can be polled may stand in for it, such as a named pipe.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use mio::unix::SourceFd;
use rustix::io::Errno;

use super::Registry;
use super::token::Token;

/// The kernel's own limit on a record with its prefix.
const RECORD_BYTES_MAX: usize = 8 * 1024;
/// Records read in one turn: a kernel that floods its log must not hold the loop.
const RECORDS_PER_TURN: usize = 256;

/// An open log.
#[derive(Debug)]
pub struct KernelLog {
    file: File,
    buffer: Vec<u8>,
    has_more: bool,
}

impl KernelLog {
    /// Opens the log behind its last record.
    ///
    /// # Errors
    /// It does not exist, may not be read, or cannot be polled.
    pub fn open(path: &Path, registry: &Registry, token: Token) -> io::Result<KernelLog> {
        let nonblocking = rustix::fs::OFlags::NONBLOCK.bits().cast_signed();
        let mut file = OpenOptions::new().read(true).custom_flags(nonblocking).open(path)?;
        // A pipe has no end to go to, and nothing old in it.
        let _ = file.seek(SeekFrom::End(0));
        registry.register(&mut SourceFd(&file.as_raw_fd()), token.into(), mio::Interest::READABLE)?;
        Ok(KernelLog { file, buffer: vec![0; RECORD_BYTES_MAX], has_more: false })
    }

    /// Takes what was written since the last call, up to a limit; what is left, [`KernelLog::busy`]
    /// tells.
    ///
    /// # Errors
    /// The log cannot be read any more.
    pub fn take(&mut self, mut record: impl FnMut(&[u8])) -> io::Result<()> {
        self.has_more = false;
        for _ in 0..RECORDS_PER_TURN {
            match self.file.read(&mut self.buffer) {
                Ok(0) => return Ok(()),
                Ok(length) => record(&self.buffer[..length]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if is_gap(&error) => {}
                Err(error) => return Err(error),
            }
        }
        self.has_more = true;
        Ok(())
    }

    /// Whether [`KernelLog::take`] has left something.
    #[must_use]
    pub fn busy(&self) -> bool {
        self.has_more
    }

    /// Leaves the poll before it is dropped.
    pub fn deregister(&self, registry: &Registry) {
        let _ = registry.deregister(&mut SourceFd(&self.file.as_raw_fd()));
    }
}

/// Records were overwritten before they were read (`EPIPE`), or one is larger than any should be
/// (`EINVAL`): the next read goes on behind them.
fn is_gap(error: &io::Error) -> bool {
    let code = error.raw_os_error().map(Errno::from_raw_os_error);
    matches!(code, Some(Errno::PIPE | Errno::INVAL | Errno::INTR))
}

#[cfg(test)]
mod tests {
    use super::super::token::Kind;
    use super::super::{Reactor, now};
    use super::*;
    use std::io::Write;

    #[test]
    fn what_is_written_is_read_in_turns() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("kmsg");
        let mode = rustix::fs::Mode::from_raw_mode(0o600);
        rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, mode, 0).expect("a pipe");
        let mut writer = OpenOptions::new().read(true).write(true).open(&path).expect("a writer");
        let mut reactor = Reactor::new().expect("a reactor");
        let registry = reactor.registry().expect("a registry");
        let token = Token::only(Kind::KernelLog);
        let mut log = KernelLog::open(&path, &registry, token).expect("it can be polled");
        let mut bytes = 0;
        log.take(|record| bytes += record.len()).expect("nothing yet");
        assert_eq!(bytes, 0);

        writer.write_all(b"one\n").expect("written");
        reactor.wait(Some(now().mono.plus_ms(10_000)), false).expect("a turn");
        assert!(reactor.events().any(|(own, edge)| own == token && edge.readable));
        log.take(|record| bytes += record.len()).expect("read");
        assert_eq!((bytes, log.busy()), (4, false));

        let missing = KernelLog::open(&directory.path().join("none"), &registry, token).expect_err("absent");
        assert_eq!(missing.kind(), io::ErrorKind::NotFound);
        let plain = directory.path().join("plain");
        std::fs::write(&plain, "x").expect("written");
        KernelLog::open(&plain, &registry, token).expect_err("a plain file cannot be polled");
    }

    #[test]
    fn a_reader_that_was_too_slow_goes_on() {
        for code in [Errno::PIPE, Errno::INVAL, Errno::INTR] {
            assert!(is_gap(&io::Error::from(code)), "{code:?}");
        }
        assert!(!is_gap(&io::Error::from(Errno::ACCESS)));
    }
}
