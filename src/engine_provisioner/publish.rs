//! The handoff file while it is ours: written by a rename, removed when its engine goes.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use crate::reactor::now;
use crate::service::machine::{boot_id, process};
use crate::settings::Exit;
use crate::wire::handoff::{self, HANDOFF_BYTES_MAX, Handoff, HandoffFile};

/// The handoff file while it is ours. Dropping it removes the file, unless another engine's
/// provisioner has replaced it.
pub(super) struct Published {
    file: PathBuf,
    pid: Option<u32>,
}

impl Published {
    /// Writes it. Returns when, in nanoseconds of the wall clock, too.
    ///
    /// # Errors
    /// What the file system says.
    pub(super) fn write(file: &Path, handoff: &Handoff) -> Result<(Published, u64), String> {
        let failed = |e: io::Error| format!("cannot write the handoff {}: {e}", file.display());
        // A dot-name, which no watcher reads; the pid keeps two writers apart.
        let temporary = file.with_file_name(format!(".{}.{}", handoff.file_name(), std::process::id()));
        let write = || {
            let _ = fs::remove_file(&temporary);
            let mut out = OpenOptions::new().write(true).create_new(true).mode(0o640).open(&temporary)?;
            // Exactly so, whatever the umask: the agent reads it by its group.
            out.set_permissions(fs::Permissions::from_mode(0o640))?;
            out.write_all(handoff.to_json().as_bytes())?;
            out.sync_all()?;
            // Before anybody can see it: what others tell of it is measured from here.
            let at_ns = now().wall.0;
            fs::rename(&temporary, file)?;
            Ok(at_ns)
        };
        let at_ns = write().map_err(|error| {
            let _ = fs::remove_file(&temporary);
            failed(error)
        })?;
        Ok((Published { file: file.to_path_buf(), pid: handoff.pid }, at_ns))
    }

    /// The file speaks of another engine by now, and stays.
    pub(super) fn let_go(mut self) {
        self.file = PathBuf::new();
    }
}

impl Drop for Published {
    fn drop(&mut self) {
        if self.file.as_os_str().is_empty() {
            return;
        }
        match read_handoff(&self.file) {
            Some(handoff) if handoff.pid != self.pid => {
                log::warn!("{} belongs to another engine now: left alone", self.file.display());
            }
            _ => match fs::remove_file(&self.file) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    log::error!("cannot remove {}: {error}", self.file.display());
                }
                _ => {}
            },
        }
    }
}

/// The handoff in a file, if there is a usable one.
pub(super) fn read_handoff(file: &Path) -> Option<Handoff> {
    let mut bytes = Vec::new();
    File::open(file).ok()?.take(HANDOFF_BYTES_MAX as u64 + 1).read_to_end(&mut bytes).ok()?;
    match handoff::parse(&bytes) {
        Ok(HandoffFile::Engine(handoff)) => Some(*handoff),
        _ => None,
    }
}

/// Two engines under one name would take turns in one file. What a crash left behind is overwritten.
pub(super) fn refuse_a_living_predecessor(file: &Path) -> Result<(), Exit> {
    let Some(handoff) = read_handoff(file) else { return Ok(()) };
    let Some(pid) = handoff.pid else { return Ok(()) };
    if is_alive(&handoff) {
        return Err(Exit::runtime(format!(
            "{} already runs as pid {pid}, says {}: stop it first, or give another --replica",
            handoff.key(),
            file.display()
        )));
    }
    Ok(())
}

/// Whether the very process that a handoff names lives.
pub(super) fn is_alive(handoff: &Handoff) -> bool {
    let same_boot = handoff.boot_id.is_none() || handoff.boot_id == boot_id();
    let is_it = |(zombie, start): (bool, u64)| !zombie && handoff.pid_start.is_none_or(|told| told == start);
    same_boot && handoff.pid.and_then(process).is_some_and(is_it)
}

/// A directory that this user's group may look into.
pub(super) fn create_directory(directory: &Path) -> Result<(), Exit> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o750)
        .create(directory)
        .map_err(|e| Exit::runtime(format!("cannot create {}: {e}", directory.display())))
}
