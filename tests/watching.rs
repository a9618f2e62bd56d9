//! The runtime directory under fire: real files on a real file system, real daemons, and writers that
//! do everything wrong.
//!
//! `SOAK=1` makes the long ones run as long as they should.

#[path = "daemons/harness.rs"]
mod harness;

#[path = "watching/directory.rs"]
mod directory;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// Whether this process may do everything.
pub(crate) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// A process that sleeps in a mount namespace of its own, in which something is mounted. It ends with
/// the test, and the mount with it.
pub(crate) struct Namespace {
    child: Child,
    directory: tempfile::TempDir,
}

impl Namespace {
    /// `mount` is a shell command that mounts something on the directory `$1`. `None`, with a word to the
    /// tests' reader, where that is not permitted.
    pub(crate) fn with(mount: &str) -> Option<Namespace> {
        let directory = tempfile::tempdir().expect("a directory");
        let script = format!("{mount} && touch \"$2\" && exec sleep 600");
        let ready = directory.path().join("ready");
        let inner = directory.path().join("mounted");
        fs::create_dir(&inner).expect("made");
        let child = Command::new("unshare")
            .args(["-m", "--propagation", "private", "sh", "-c", &script, "sh"])
            .args([&inner, &ready])
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        let mut child = child.ok()?;
        let is_ready = harness::until("a mount", || {
            (ready.exists() || child.try_wait().expect("a child").is_some()).then(|| ready.exists())
        });
        if !is_ready {
            skip("nothing can be mounted here");
            return None;
        }
        Some(Namespace { child, directory })
    }

    /// The mounted directory, seen from outside.
    pub(crate) fn directory(&self) -> PathBuf {
        self.inside(&self.directory.path().join("mounted"))
    }

    /// A path within the namespace, seen from outside.
    pub(crate) fn inside(&self, path: &Path) -> PathBuf {
        let root = PathBuf::from(format!("/proc/{}/root", self.child.id()));
        root.join(path.strip_prefix("/").expect("an absolute path"))
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Says that a test cannot be run here.
#[allow(clippy::print_stderr, reason = "the reader of the tests' output should know")]
pub(crate) fn skip(why: &str) {
    eprintln!("skipped: {why}");
}
