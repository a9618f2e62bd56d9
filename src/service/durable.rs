//! Small files that survive a crash: written beside their place, flushed, and renamed into it.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Largest state file that is written or read, in bytes: thousands of handoffs, or ten thousand nodes.
const BYTES_MAX: u64 = 64 << 20;

/// Replaces a file as a whole, readable by its owner and group. After a crash either the old or the
/// new one is there. Blocks on the disk.
///
/// # Errors
/// No permission, no space, no such directory; more bytes than would be read.
pub fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    write(path, bytes, 0o750, 0o640)
}

/// As [`replace`], readable by its owner only.
///
/// # Errors
/// As [`replace`].
pub fn replace_private(path: &Path, bytes: &[u8]) -> io::Result<()> {
    write(path, bytes, 0o700, 0o600)
}

/// Makes sure that [`replace_private`] can be expected to work in `directory`, which is created if there
/// is none.
///
/// # Errors
/// As [`replace`].
pub fn check_private(directory: &Path) -> io::Result<()> {
    let trial = directory.join(".writable");
    write(&trial, b"", 0o700, 0o600)?;
    fs::remove_file(trial)
}

fn write(path: &Path, bytes: &[u8], directory_mode: u32, mode: u32) -> io::Result<()> {
    let mut replacement = Replacement::begin(path, directory_mode, mode)?;
    replacement.add(bytes)?;
    replacement.finish()
}

/// A file that takes the place of another one once it is whole. Dropped before, it changes nothing.
#[derive(Debug)]
pub struct Replacement {
    file: File,
    temporary: PathBuf,
    path: PathBuf,
    bytes: u64,
}

impl Replacement {
    /// Begins to replace `path` by a file that is readable by its owner only.
    ///
    /// # Errors
    /// As [`replace`].
    pub fn private(path: &Path) -> io::Result<Replacement> {
        Replacement::begin(path, 0o700, 0o600)
    }

    fn begin(path: &Path, directory_mode: u32, mode: u32) -> io::Result<Replacement> {
        let directory = path.parent().unwrap_or(Path::new("."));
        fs::DirBuilder::new().recursive(true).mode(directory_mode).create(directory)?;
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let temporary = directory.join(format!(".{name}.tmp"));
        let file = OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(&temporary)?;
        Ok(Replacement { file, temporary, path: path.to_path_buf(), bytes: 0 })
    }

    /// Appends to it.
    ///
    /// # Errors
    /// As [`replace`].
    pub fn add(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.bytes += bytes.len() as u64;
        if self.bytes > BYTES_MAX {
            return Err(io::Error::other(format!("more than {BYTES_MAX} bytes are not kept")));
        }
        self.file.write_all(bytes)
    }

    /// Puts it into its place.
    ///
    /// # Errors
    /// As [`replace`].
    pub fn finish(self) -> io::Result<()> {
        self.file.sync_all()?;
        fs::rename(&self.temporary, &self.path)?;
        File::open(self.path.parent().unwrap_or(Path::new(".")))?.sync_all()
    }
}

/// Reads a file; `None` where there is none.
///
/// # Errors
/// It cannot be read, or is larger than anything that was ever written there.
pub fn read(path: &Path) -> io::Result<Option<Vec<u8>>> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut bytes = Vec::new();
    file.take(BYTES_MAX + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > BYTES_MAX {
        return Err(io::Error::other(format!("larger than {BYTES_MAX} bytes")));
    }
    Ok(Some(bytes))
}

/// Puts a file that cannot be used out of the way, for people to look at. Returns where it is now.
///
/// # Errors
/// It cannot be renamed.
pub fn set_aside(path: &Path) -> io::Result<PathBuf> {
    let mut aside = path.as_os_str().to_owned();
    aside.push(".unusable");
    let aside = PathBuf::from(aside);
    fs::rename(path, &aside)?;
    Ok(aside)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_private_file_is_its_owners_alone() {
        let root = tempfile::tempdir().expect("a directory");
        let directory = root.path().join("state");
        check_private(&directory).expect("it can be written");
        let path = directory.join("state.json");
        replace_private(&path, b"one").expect("written");
        for (path, expected) in [(&path, 0o600), (&directory, 0o700)] {
            let mode = std::os::unix::fs::PermissionsExt::mode(
                &fs::metadata(path).expect("it is there").permissions(),
            );
            assert_eq!(mode & 0o777, expected, "{}: {mode:o}", path.display());
        }
        assert_eq!(fs::read_dir(&directory).expect("listed").count(), 1, "nothing else");
        assert!(check_private(&path).is_err() && check_private(&path.join("below")).is_err());
    }

    #[test]
    fn a_file_is_replaced_as_a_whole_and_closed_to_others() {
        let root = tempfile::tempdir().expect("a directory");
        let path = root.path().join("new/state.json");
        assert_eq!(read(&path).expect("no file is no error"), None);
        replace(&path, b"one").expect("written");
        replace(&path, b"two").expect("written");
        assert_eq!(read(&path).expect("read").as_deref(), Some(&b"two"[..]));
        let mode =
            std::os::unix::fs::PermissionsExt::mode(&fs::metadata(&path).expect("a file").permissions());
        assert_eq!(mode & 0o007, 0, "{mode:o}");
        assert_eq!(
            fs::read_dir(path.parent().expect("a parent")).expect("listed").count(),
            1,
            "nothing else"
        );
        let aside = set_aside(&path).expect("renamed");
        assert_eq!((read(&path).expect("gone"), fs::read(aside).expect("there")), (None, b"two".to_vec()));
    }
}
