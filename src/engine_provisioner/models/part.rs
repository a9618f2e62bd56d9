//! A file on its way: its bytes, and beside them a note of which of them are there.
//!
//! The note is what makes going on possible, after a lost connection as after a SIGKILL. It says of
//! which state of the remote file the bytes are, and in which boot of this machine they were written:
//! after a power failure the note may have reached the disk and the bytes not, so bytes of another boot
//! count only where a digest will be held against the whole.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FallocateFlags, fallocate};
use serde::{Deserialize, Serialize};

use super::answer::Validator;
use super::error::ModelError;
use super::ranges::Ranges;
use crate::service::durable;
use crate::service::machine::boot_id;

/// Spans in a note; a download has few, one a connection.
const SPANS_MAX: usize = 4096;

/// The note beside the bytes.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Note {
    total: u64,
    etag: Option<String>,
    last_modified: Option<String>,
    boot_id: Option<String>,
    spans: Vec<(u64, u64)>,
}

/// A file on its way.
pub(super) struct Part {
    path: PathBuf,
    note_path: PathBuf,
    pub(super) file: File,
    /// What is there already.
    pub(super) done: Ranges,
    /// Length of the whole, once known.
    pub(super) total: Option<u64>,
    /// The state of the remote file that the bytes are of.
    pub(super) validator: Validator,
}

impl Part {
    /// Opens what an earlier attempt left behind, or begins. The caller holds the lock on it.
    pub(super) fn open(path: &Path, digest_known: bool) -> Result<Part, ModelError> {
        let note_path = path.with_extension("json");
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o640);
        let file = options.open(path).map_err(|error| ModelError::file(path, "write", error))?;
        let mut part = Part {
            path: path.to_path_buf(),
            file,
            done: Ranges::default(),
            total: None,
            validator: Validator::default(),
            note_path,
        };
        let note = durable::read(&part.note_path).ok().flatten();
        if let Some(note) = note.and_then(|bytes| serde_json::from_slice::<Note>(&bytes).ok()) {
            part.take_up(note, digest_known);
        }
        Ok(part)
    }

    /// What a note says counts as far as the file can be what it speaks of.
    fn take_up(&mut self, note: Note, digest_known: bool) {
        let length = self.file.metadata().map_or(0, |meta| meta.len());
        let end = note.spans.iter().map(|span| span.1).max().unwrap_or(0);
        let plausible = note.spans.len() <= SPANS_MAX
            && note.spans.iter().all(|(start, end)| start < end)
            && end <= note.total
            && end <= length;
        if !plausible || !(digest_known || note.boot_id.is_some() && note.boot_id == boot_id()) {
            return;
        }
        note.spans.iter().for_each(|(start, end)| self.done.add(*start..*end));
        self.total = Some(note.total);
        self.validator = Validator { etag: note.etag, last_modified: note.last_modified };
    }

    /// Drops what is there, because it is of another state of the file.
    pub(super) fn reset(&mut self) -> Result<(), ModelError> {
        let _ = fs::remove_file(&self.note_path);
        self.done = Ranges::default();
        self.total = None;
        self.validator = Validator::default();
        self.file.set_len(0).map_err(|error| ModelError::file(&self.path, "write", error))
    }

    /// Takes the room that is still needed, so that a full disk is found out now.
    pub(super) fn reserve(&mut self, total: u64) -> Result<(), ModelError> {
        self.total = Some(total);
        match fallocate(&self.file, FallocateFlags::empty(), 0, total.max(1)) {
            // Not every file system can.
            Ok(())
            | Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS | rustix::io::Errno::INVAL) => {}
            Err(errno) => return Err(ModelError::file(&self.path, "write", errno.into())),
        }
        self.file.set_len(total).map_err(|error| ModelError::file(&self.path, "write", error))
    }

    /// Writes the note: from here on an end of this process loses nothing of `done`.
    pub(super) fn save(&self, done: &Ranges) -> io::Result<()> {
        let Some(total) = self.total else { return Ok(()) };
        let note = Note {
            total,
            etag: self.validator.etag.clone(),
            last_modified: self.validator.last_modified.clone(),
            boot_id: boot_id(),
            spans: done.iter().collect(),
        };
        let bytes = serde_json::to_vec(&note).map_err(io::Error::other)?;
        // Renamed, but not flushed: a note that a power failure takes is of a boot that is over.
        let temporary = self.note_path.with_extension("json.tmp");
        fs::write(&temporary, bytes)?;
        fs::rename(&temporary, &self.note_path)
    }

    /// Forgets it all: nothing of it is kept.
    pub(super) fn remove(self) {
        let _ = fs::remove_file(&self.note_path);
        let _ = fs::remove_file(&self.path);
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Puts the whole file into its place.
    pub(super) fn publish(self, place: &Path) -> Result<(), ModelError> {
        let failed = |error| ModelError::file(place, "write", error);
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o440);
        self.file.set_permissions(mode).map_err(failed)?;
        fs::rename(&self.path, place).map_err(failed)?;
        let _ = fs::remove_file(&self.note_path);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn validator() -> Validator {
        Validator { etag: Some("\"v1\"".into()), last_modified: None }
    }

    #[test]
    fn what_was_noted_is_taken_up_again_and_only_that() {
        let root = tempfile::tempdir().expect("a directory");
        let path = root.path().join("a.part");
        let mut part = Part::open(&path, false).expect("new");
        part.reserve(100).expect("room");
        part.validator = validator();
        part.done.add(0..10);
        part.save(&part.done).expect("saved");
        part.done.add(50..60);
        drop(part);

        let part = Part::open(&path, false).expect("again");
        assert_eq!(part.done.iter().collect::<Vec<_>>(), [(0, 10)]);
        assert_eq!((part.total, part.validator.clone()), (Some(100), validator()));
        part.remove();
        assert_eq!(fs::read_dir(root.path()).expect("listed").count(), 0);
    }

    #[test]
    fn bytes_of_another_boot_count_only_under_a_digest() {
        let root = tempfile::tempdir().expect("a directory");
        let path = root.path().join("a.part");
        fs::write(&path, [0; 10]).expect("written");
        fs::write(path.with_extension("json"), r#"{"total":10,"boot_id":"other","spans":[[0,5]]}"#)
            .expect("written");
        assert_eq!(Part::open(&path, false).expect("opened").done.bytes(), 0);
        assert_eq!(Part::open(&path, true).expect("opened").done.bytes(), 5);
    }

    proptest! {
        #[test]
        fn a_note_that_cannot_be_true_counts_nothing(
            text in ".{0,40}|\\{\"total\":[0-9]{1,3},\"spans\":\\[\\[[0-9]{1,3},[0-9]{1,3}\\]\\]\\}",
        ) {
            let root = tempfile::tempdir().expect("a directory");
            let path = root.path().join("a.part");
            fs::write(&path, [0; 100]).expect("written");
            fs::write(path.with_extension("json"), text).expect("written");
            let part = Part::open(&path, true).expect("opened");
            prop_assert!(part.done.end() <= 100 && part.done.end() <= part.total.unwrap_or(0));
        }
    }
}
