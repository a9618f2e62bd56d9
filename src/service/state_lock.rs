//! One process for a state directory: two that write the same files would each undo what the other has saved, and
//! take themselves for one another after a restart.
//!
//! The kernel holds the lock, not the file: it goes with the process however that ends, and a file that is left over
//! locks nobody out. What stands in the file is the pid of the process that holds the lock, for people.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{FlockOperation, flock};

use crate::settings::Exit;

/// Most bytes of the file that are read: a pid has ten at most.
const PID_BYTES_MAX: u64 = 16;

/// The lock, held until it is dropped.
#[derive(Debug)]
pub struct StateLock {
    /// `None` where nothing can be written, and so nothing be overwritten either.
    _file: Option<File>,
}

impl StateLock {
    /// Locks `directory`, which is created if there is none, for one `program`; others may share it. `variable` is
    /// the setting to name to who gets a directory that is taken.
    ///
    /// Where the directory cannot be had at all, there is nothing to lock: what that means is told where something
    /// is to be kept in it.
    ///
    /// # Errors
    /// [`Exit`] with the pid of the process that has it.
    pub fn take(directory: &Path, program: &str, variable: &str) -> Result<StateLock, Exit> {
        let Ok(mut file) = open(directory, program) else { return Ok(StateLock { _file: None }) };
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {
                let _ = note_pid(&mut file);
                Ok(StateLock { _file: Some(file) })
            }
            Err(error) if error == rustix::io::Errno::WOULDBLOCK => {
                Err(taken(&file, directory, program, variable))
            }
            // A file system without locks.
            Err(_) => Ok(StateLock { _file: None }),
        }
    }
}

fn open(directory: &Path, program: &str) -> io::Result<File> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    let path = directory.join(format!("{program}.lock"));
    OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)
}

fn note_pid(file: &mut File) -> io::Result<()> {
    file.set_len(0)?;
    file.rewind()?;
    writeln!(file, "{}", std::process::id())
}

fn taken(file: &File, directory: &Path, program: &str, variable: &str) -> Exit {
    let mut text = String::new();
    let _ = file.take(PID_BYTES_MAX).read_to_string(&mut text);
    // Between the lock and the note there is none yet.
    let pid = text.trim().parse::<u32>().map_or_else(|_| String::new(), |pid| format!(" (pid {pid})"));
    Exit::runtime(format!(
        "another {program}{pid} keeps its state in {}; stop it, or set {variable} for one of the two",
        directory.display()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_is_one_process_of_a_kind_s_until_that_ends() {
        let root = tempfile::tempdir().expect("a directory");
        let directory = root.path().join("state");
        let take = |program: &str| StateLock::take(&directory, program, "STATE_DIR");
        let held = take("one").expect("free");
        let refused = take("one").expect_err("held already");
        let own = format!("another one (pid {}) keeps its state in ", std::process::id());
        assert!(refused.message.starts_with(&own), "{refused}");
        assert!(refused.message.ends_with("set STATE_DIR for one of the two"), "{refused}");
        let other = take("other").expect("programs of other kinds have other files");
        drop(held);
        // The file is still there, and locks nobody out.
        let again = take("one").expect("free again");
        drop((other, again));
    }

    #[test]
    fn where_nothing_can_be_kept_nothing_is_locked() {
        let root = tempfile::tempdir().expect("a directory");
        let file = root.path().join("file");
        fs::write(&file, b"").expect("written");
        assert!(StateLock::take(&file.join("below"), "one", "STATE_DIR").is_ok());
    }
}
