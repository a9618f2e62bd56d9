//! Why a model cannot be had, and what to do about it. Every text is one line that ends with the latter.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use super::digest::Digest;
use super::gguf::GgufError;
use super::reference::ReferenceError;
use crate::settings::Exit;

/// Why there is no model.
#[derive(Debug)]
pub enum ModelError {
    /// The reference itself is not usable.
    Reference(ReferenceError),
    /// A path of this machine leads to nothing.
    NoSuchFile(PathBuf),
    /// The server has no such file or repository.
    NotFound {
        /// What was asked for.
        name: String,
        /// The server's status code.
        status: u16,
    },
    /// The server wants other credentials.
    Denied {
        /// What was asked for.
        name: String,
        /// The server's status code.
        status: u16,
        /// Whether a token was sent.
        token_sent: bool,
    },
    /// Nothing may be fetched, and it is not in the cache.
    Offline(String),
    /// What arrived is not what was promised.
    Digest {
        /// What was asked for.
        name: String,
        /// What was promised.
        expected: Digest,
        /// What it is.
        found: Digest,
    },
    /// A file of this machine is not what was promised.
    LocalDigest {
        /// The file.
        path: PathBuf,
        /// What was promised.
        expected: Digest,
        /// What it is.
        found: Digest,
    },
    /// Not enough room.
    DiskFull {
        /// Where.
        directory: PathBuf,
        /// Bytes that are needed, where that is known.
        needed: Option<u64>,
        /// Bytes that are free.
        free: u64,
    },
    /// The cache may not grow that much.
    Quota {
        /// Bytes that are needed.
        needed: u64,
        /// Bytes that models in use take.
        held: u64,
        /// What the cache may take in all.
        quota: u64,
    },
    /// The file on the server changed again and again while it was fetched.
    Changing(String),
    /// The network or the server failed more often than is worth trying.
    Network {
        /// What was asked for.
        name: String,
        /// The last failure.
        last: String,
        /// Whether what arrived is kept for the next attempt.
        kept_bytes: u64,
    },
    /// The server answered something that asking again does not change.
    Server {
        /// What was asked for.
        name: String,
        /// What it answered.
        what: String,
    },
    /// It is no model, or not all of one.
    Gguf {
        /// The file.
        name: String,
        /// Why.
        error: GgufError,
    },
    /// A file of this machine is no model, or not all of one.
    LocalGguf {
        /// The file.
        path: PathBuf,
        /// Why.
        error: GgufError,
    },
    /// It ends before its tensors do.
    Truncated {
        /// The file.
        name: String,
        /// Its length, in bytes.
        found: u64,
        /// The least that its header says, in bytes.
        needed: u64,
    },
    /// Several files could be meant, or none.
    Choice(String),
    /// A digest was given for something that is not one file.
    DigestOfDirectory(String),
    /// A file or directory of the cache cannot be used.
    File {
        /// Which.
        path: PathBuf,
        /// What was tried.
        doing: &'static str,
        /// Why not.
        error: io::Error,
    },
    /// A part of the machinery could not be set up.
    Setup(String),
    /// The caller asked to stop. What arrived is kept.
    Cancelled,
}

impl fmt::Display for ModelError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ModelError::Reference(error) => error.fmt(f),
            ModelError::NoSuchFile(path) => {
                write!(f, "there is no {}: give the path of a model file", path.display())?;
                match path
                    .to_str()
                    .filter(|text| text.split('/').count() >= 2 && !text.starts_with(['/', '.']))
                {
                    Some(text) => write!(f, ", or write hf:{text} for a repository"),
                    None => Ok(()),
                }
            }
            ModelError::NotFound { name, status } => {
                write!(
                    f,
                    "{name}: the server has no such file (status {status}): check its name; a private repository also needs a token (--hf-token-file)"
                )
            }
            ModelError::Denied { name, status, token_sent: false } => {
                write!(
                    f,
                    "{name}: the server wants credentials (status {status}): put a token into a file and name it with --hf-token-file, or set HF_TOKEN; a gated repository also wants its terms accepted on its page"
                )
            }
            ModelError::Denied { name, status, token_sent: true } => {
                write!(
                    f,
                    "{name}: the server refuses the token (status {status}): check that it is valid and may read this, and accept the repository's terms on its page if it is gated"
                )
            }
            ModelError::Offline(name) => {
                write!(
                    f,
                    "{name} is not in the cache, and --offline is set: fetch it while online (engine-provisioner models fetch), or copy the file here and give its path"
                )
            }
            ModelError::Digest { name, expected, found } => {
                write!(
                    f,
                    "{name} is not what was promised: {found}, expected {expected}; nothing was kept: check the digest, or where the file comes from"
                )
            }
            ModelError::LocalDigest { path, expected, found } => {
                write!(
                    f,
                    "{} is not what was promised: {found}, expected {expected}: check the digest, or copy the file again",
                    path.display()
                )
            }
            ModelError::DiskFull { directory, needed, free } => {
                write!(f, "no room in {}: ", directory.display())?;
                match needed {
                    Some(needed) => write!(f, "{} are needed and {} are free", size(*needed), size(*free))?,
                    None => write!(f, "{} are free", size(*free))?,
                }
                f.write_str(
                    ": remove models (engine-provisioner models gc, models rm), or give another --cache-dir",
                )
            }
            ModelError::Quota { needed, held, quota } => {
                write!(
                    f,
                    "{} would exceed the cache's quota of {}, of which active models hold {}: retire one (engine-provisioner models retire) or raise --cache-quota",
                    size(*needed),
                    size(*quota),
                    size(*held)
                )
            }
            ModelError::Changing(name) => {
                write!(
                    f,
                    "{name} keeps changing on the server while it is fetched: try again later, or name a fixed revision"
                )
            }
            ModelError::Network { name, last, kept_bytes } => {
                write!(
                    f,
                    "{name}: {last}; tried again in vain: check the network and the server, then run it again"
                )?;
                match kept_bytes {
                    0 => Ok(()),
                    bytes => write!(f, " ({} are kept and not fetched twice)", size(*bytes)),
                }
            }
            ModelError::Server { name, what } => {
                write!(f, "{name}: {what}: check the reference, or ask who runs the server")
            }
            ModelError::Gguf { name, error } => {
                write!(
                    f,
                    "{name}: {error}: it was not kept; check that the reference names the file itself and not a page about it"
                )
            }
            ModelError::LocalGguf { path, error } => {
                write!(f, "{}: {error}: copy or fetch it again, or name another file", path.display())
            }
            ModelError::Truncated { name, found, needed } => {
                write!(
                    f,
                    "{name} is cut short: {} of at least {}: copy or fetch it again",
                    size(*found),
                    size(*needed)
                )
            }
            ModelError::Choice(text) => f.write_str(text),
            ModelError::DigestOfDirectory(name) => {
                write!(
                    f,
                    "{name} is not one file, and a digest is one file's: leave --digest out, or name the file"
                )
            }
            ModelError::File { path, doing, error } => {
                write!(f, "cannot {doing} {}: {error}", path.display())?;
                match error.kind() {
                    io::ErrorKind::PermissionDenied => {
                        f.write_str(": give this user the right to, or another --cache-dir")
                    }
                    io::ErrorKind::ReadOnlyFilesystem => f.write_str(": give another --cache-dir"),
                    _ => Ok(()),
                }
            }
            ModelError::Setup(what) => f.write_str(what),
            ModelError::Cancelled => {
                f.write_str("stopped; what arrived is kept, and the next attempt goes on from there")
            }
        }
    }
}

impl std::error::Error for ModelError {}

impl From<ReferenceError> for ModelError {
    fn from(error: ReferenceError) -> ModelError {
        ModelError::Reference(error)
    }
}

impl From<ModelError> for Exit {
    fn from(error: ModelError) -> Exit {
        let message = error.to_string();
        match error {
            ModelError::Reference(_)
            | ModelError::NoSuchFile(_)
            | ModelError::Choice(_)
            | ModelError::Offline(_)
            | ModelError::Setup(_)
            | ModelError::DigestOfDirectory(_) => Exit::config(message),
            _ => Exit::runtime(message),
        }
    }
}

impl ModelError {
    /// A failure at a path; one for lack of room says so.
    pub(super) fn file(path: &Path, doing: &'static str, error: io::Error) -> ModelError {
        let full = [rustix::io::Errno::NOSPC, rustix::io::Errno::DQUOT, rustix::io::Errno::FBIG];
        if full.iter().any(|errno| error.raw_os_error() == Some(errno.raw_os_error())) {
            let directory = path.parent().unwrap_or(path).to_path_buf();
            let free = free_bytes(&directory).unwrap_or(0);
            return ModelError::DiskFull { directory, needed: None, free };
        }
        ModelError::File { path: path.to_path_buf(), doing, error }
    }
}

/// Bytes that this user may still write where `directory` is.
pub(super) fn free_bytes(directory: &Path) -> Option<u64> {
    let stat = rustix::fs::statvfs(directory).ok()?;
    Some(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// Bytes as people read them: `1.5 GiB`.
#[must_use]
pub fn size(bytes: u64) -> String {
    const UNITS: [(&str, u32); 4] = [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)];
    for (unit, shift) in UNITS {
        if bytes >= 1 << shift {
            let tenths = (u128::from(bytes) * 10) >> shift;
            return format!("{}.{} {unit}", tenths / 10, tenths % 10);
        }
    }
    format!("{bytes} bytes")
}

/// A number of bytes with a unit, as `200GiB` or `1.5 TB`; decimal units count thousands.
///
/// # Errors
/// What is allowed.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let allowed = || "allowed is a size such as 200GiB, 1.5TB or a number of bytes".to_string();
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let factor: u64 = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "kib" | "k" => 1 << 10,
        "mib" | "m" => 1 << 20,
        "gib" | "g" => 1 << 30,
        "tib" | "t" => 1 << 40,
        "kb" => 1000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "tb" => 1_000_000_000_000,
        _ => return Err(allowed()),
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, "0"));
    let digits = fraction.get(..fraction.len().min(6)).unwrap_or("0");
    let whole: u64 = whole.parse().map_err(|_| allowed())?;
    let part: u64 = digits.parse().map_err(|_| allowed())?;
    let scale = 10u64.pow(u32::try_from(digits.len()).unwrap_or(0));
    let bytes =
        u128::from(whole) * u128::from(factor) + u128::from(part) * u128::from(factor) / u128::from(scale);
    u64::try_from(bytes).map_err(|_| allowed())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_and_written() {
        for (text, bytes) in
            [("0", 0), ("200GiB", 200 << 30), ("1.5 TB", 1_500_000_000_000), ("2k", 2048), ("7b", 7)]
        {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for bad in ["", "GiB", "1.GiB5", "-1", "1e9", "1PB", "99999999999TiB", "1..5k", "1.x"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
        assert_eq!(size(1_610_612_736), "1.5 GiB");
        assert_eq!(size(1023), "1023 bytes");
    }

    #[test]
    fn a_relative_path_that_looks_like_a_repository_says_so() {
        let told = ModelError::NoSuchFile("org/repo".into()).to_string();
        assert!(told.contains("hf:org/repo"), "{told}");
        assert!(!ModelError::NoSuchFile("/m/a.gguf".into()).to_string().contains("hf:"));
    }
}
