//! The shell around the runtime directory: which files are there, and what they say.
//!
//! A scan lists the whole directory and reads the files whose identity (inode, size, times) differs
//! from the last scan's; all others keep their shared contents. Files are opened without following
//! links and without blocking, and read up to their limit. Who may write here decides where prompts
//! go, so a file counts only if it belongs to root or to this process's user and nobody else may
//! write it.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{Mode, OFlags, Stat};

use crate::time::Wall;
use crate::wire::handoff::{self, HANDOFF_BYTES_MAX, HandoffFile};

use super::directory::{FILES_MAX, FileContent, ListedFile};

/// The directory and what was read of it so far.
#[derive(Debug)]
pub struct Scanner {
    directory: PathBuf,
    known: BTreeMap<Arc<str>, Known>,
}

#[derive(Debug)]
struct Known {
    identity: Identity,
    file: ListedFile,
}

/// What changes when a file is written, replaced or touched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Identity {
    inode: u64,
    size: u64,
    modified_ns: u64,
    changed_ns: u64,
}

impl Scanner {
    /// A scanner that has seen nothing.
    #[must_use]
    pub fn new(directory: PathBuf) -> Scanner {
        Scanner { directory, known: BTreeMap::new() }
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

    /// Lists the directory: every `*.json` that is not hidden, sorted by name.
    ///
    /// # Errors
    /// The directory cannot be listed. What was known stays known: a directory that is away for a
    /// moment (remounted, recreated) is no reason to stop anything.
    pub fn scan(&mut self) -> io::Result<Vec<ListedFile>> {
        let directory = rustix::fs::open(
            &self.directory,
            OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        let mut names: Vec<String> = Vec::new();
        for entry in rustix::fs::Dir::read_from(&directory)? {
            let entry = entry?;
            // A name that is not UTF-8 was written by no starter of engines.
            let Ok(name) = entry.file_name().to_str() else { continue };
            if name.ends_with(".json") && !name.starts_with('.') {
                names.push(name.to_string());
            }
        }
        names.sort_unstable();
        // One more than the registry takes, so that it can tell that there are too many.
        names.truncate(FILES_MAX + 1);
        let mut before = std::mem::take(&mut self.known);
        for name in names {
            let known = before.remove_entry(name.as_str());
            let (name, known) = match known {
                Some((name, known)) => (name, Some(known)),
                None => (Arc::from(name), None),
            };
            // Gone between listing and reading: the next event says so again.
            if let Some(read) = read(&directory, &name, known) {
                self.known.insert(name, read);
            }
        }
        Ok(self.known.values().map(|known| known.file.clone()).collect())
    }
}

fn read(directory: &impl AsFd, name: &Arc<str>, known: Option<Known>) -> Option<Known> {
    let stat = match rustix::fs::statat(directory, &**name, rustix::fs::AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => stat,
        Err(rustix::io::Errno::NOENT) => return None,
        Err(error) => {
            return Some(refused(name, Identity::NONE, Wall(0), format!("cannot be looked at: {error}")));
        }
    };
    let identity = Identity::of(&stat);
    if let Some(known) = known.filter(|known| known.identity == identity) {
        return Some(known);
    }
    let modified = Wall(identity.modified_ns);
    match read_checked(directory, name, &stat) {
        Ok(bytes) => {
            let content = match handoff::parse(&bytes) {
                Ok(HandoffFile::Engine(handoff)) => FileContent::Handoff(handoff),
                Ok(HandoffFile::ModelOnly) => FileContent::ModelOnly,
                Err(error) => FileContent::Refused(error.to_string()),
            };
            let file = ListedFile { name: name.clone(), modified, content: Arc::new(content) };
            Some(Known { identity, file })
        }
        // Without an identity it is read again by every scan: the cause may pass (permissions, EIO).
        Err(reason) => Some(refused(name, Identity::NONE, modified, reason)),
    }
}

fn refused(name: &Arc<str>, identity: Identity, modified: Wall, reason: String) -> Known {
    let content = Arc::new(FileContent::Refused(reason));
    Known { identity, file: ListedFile { name: name.clone(), modified, content } }
}

fn read_checked(directory: &impl AsFd, name: &str, listed: &Stat) -> Result<Vec<u8>, String> {
    // Checked before the open, because opening a device or a FIFO can itself do something.
    check_kind(listed)?;
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY;
    let file = rustix::fs::openat(directory, name, flags, Mode::empty())
        .map_err(|error| format!("cannot be opened: {error}"))?;
    let stat = rustix::fs::fstat(&file).map_err(|error| format!("cannot be looked at: {error}"))?;
    check_kind(&stat)?;
    check_owner(&stat)?;
    let mut bytes = Vec::with_capacity(usize::try_from(stat.st_size).unwrap_or(0).min(HANDOFF_BYTES_MAX) + 1);
    File::from(file)
        .take(HANDOFF_BYTES_MAX as u64 + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| format!("cannot be read: {error}"))?;
    Ok(bytes)
}

fn check_kind(stat: &Stat) -> Result<(), String> {
    match rustix::fs::FileType::from_raw_mode(stat.st_mode) {
        rustix::fs::FileType::RegularFile => {}
        rustix::fs::FileType::Symlink => return Err("a symbolic link: links are not followed".into()),
        _ => return Err("not a regular file".into()),
    }
    if stat.st_nlink > 1 {
        return Err("has a second hard link: whoever holds that could change it unseen".into());
    }
    Ok(())
}

fn check_owner(stat: &Stat) -> Result<(), String> {
    let own = rustix::process::geteuid().as_raw();
    if stat.st_uid != 0 && stat.st_uid != own {
        return Err(format!(
            "belongs to user {}: handoffs must belong to root or to the user that this daemon runs as ({own})",
            stat.st_uid
        ));
    }
    if stat.st_mode & 0o002 != 0 {
        return Err("every user may write it: remove that permission (chmod o-w)".into());
    }
    Ok(())
}

impl Identity {
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

    fn states(scanner: &mut Scanner) -> Vec<(String, String)> {
        let listed = scanner.scan().expect("the directory can be listed");
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
        let first = scanner.scan().expect("listed");
        let second = scanner.scan().expect("listed");
        assert!(Arc::ptr_eq(&first[0].content, &second[0].content));
        let other = directory.path().join(".a.tmp");
        fs::write(&other, r#"{"url":"http://127.0.0.1:2"}"#).expect("written");
        fs::rename(&other, &path).expect("renamed");
        let third = scanner.scan().expect("listed");
        assert!(!Arc::ptr_eq(&first[0].content, &third[0].content));
        fs::remove_file(&path).expect("removed");
        assert!(scanner.scan().expect("listed").is_empty());
    }
}
