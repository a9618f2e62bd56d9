//! Small files that survive a crash: written beside their place, flushed, and renamed into it.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Largest state file that is read, in bytes: thousands of handoffs.
const BYTES_MAX: u64 = 64 << 20;

/// Replaces a file as a whole, readable by its owner and group. After a crash either the old or the
/// new one is there. Blocks on the disk.
///
/// # Errors
/// No permission, no space, no such directory.
pub fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let directory = path.parent().unwrap_or(Path::new("."));
    fs::DirBuilder::new().recursive(true).mode(0o750).create(directory)?;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let temporary = directory.join(format!(".{name}.tmp"));
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o640).open(&temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&temporary, path)?;
    File::open(directory)?.sync_all()
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
