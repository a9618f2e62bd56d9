//! The models of this machine: files named by their content, and a catalogue of what they are.
//!
//! ```text
//!   catalogue.json          what is there, and whether it is in use (Active) or may go (Retired)
//!   provenance.jsonl        when which file came from where: appended to, never rewritten
//!   blobs/sha256-HEX        contents, each once, read-only
//!   entries/ID/NAME.gguf    links to them under the names that they had: engines find the further
//!                           parts of a split model by name
//!   partial/KEY.part        on its way, with its note and its lock
//! ```
//!
//! Several processes share it. Whoever reads and changes the catalogue holds its lock; whoever uses a
//! blob holds a shared lock on the blob itself for as long as it does, so that nothing in use is
//! removed, and nothing needs to be cleaned up after a process that was killed.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, symlink};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, SystemTime};

use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::client::unix_ms;
use super::digest::Digest;
use super::error::{ModelError, size};
use super::gguf::Gguf;
use crate::service::durable;

/// How often a lock that another process holds is tried again.
const LOCK_PAUSE: Duration = Duration::from_millis(50);
/// Age from which what nobody fetches any more is removed, since its last byte.
const PARTIAL_AGE_MAX: Duration = Duration::from_secs(7 * 24 * 3600);
/// Most entries of a catalogue: more than anybody has disks for.
const ENTRIES_MAX: usize = 10_000;

/// Whether a model is in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// It may be started at any time.
    Active,
    /// It may be removed.
    Retired,
}

/// One file of a model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredFile {
    /// Its name where it came from.
    pub name: String,
    /// Its content.
    pub digest: Digest,
    /// Its length.
    pub bytes: u64,
}

/// One model, as the catalogue keeps it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Name of its directory of links; from its reference.
    pub id: String,
    /// What it was asked for as, without secrets.
    pub reference: String,
    /// Whether it is in use.
    pub state: State,
    /// What an engine is given.
    pub path: PathBuf,
    /// Its files in the cache; none for one that lies elsewhere on this machine.
    #[serde(default)]
    pub files: Vec<StoredFile>,
    /// Length of all of it.
    pub bytes: u64,
    /// When it came, in milliseconds since 1970.
    pub added_ms: u64,
    /// When it was last asked for, in milliseconds since 1970.
    pub used_ms: u64,
    /// `llama`, `qwen2`, ...
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub architecture: Option<String>,
    /// Longest context that it was trained for, in tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub context_length: Option<u64>,
    /// Such as `Q4_K_M`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quantisation: Option<String>,
    /// Weights.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parameters: Option<u64>,
    /// The boot of this machine in which it was written, until it is known to be on the disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unsynced_boot: Option<String>,
}

impl Entry {
    pub(super) fn tell(&mut self, gguf: &Gguf) {
        self.architecture = gguf.architecture.clone();
        self.context_length = gguf.context_length;
        self.quantisation = gguf.quantisation.map(str::to_string);
        self.parameters = Some(gguf.parameters);
    }
}

/// What is there.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Catalogue {
    /// In the order in which they came.
    pub models: Vec<Entry>,
}

/// What a cleaning removed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cleaned {
    /// Retired models, by reference.
    pub models: Vec<String>,
    /// Files in all.
    pub files: usize,
    /// Bytes that are free now.
    pub bytes: u64,
    /// What would go but is in use.
    pub in_use: usize,
}

/// The directory of models.
#[derive(Clone, Debug)]
pub struct Store {
    root: PathBuf,
}

/// A lock between processes; it goes with its file handle.
#[derive(Debug)]
pub struct Lock(#[expect(dead_code, reason = "held, not read")] File);

impl Store {
    /// Opens it, and creates what is missing.
    ///
    /// # Errors
    /// [`ModelError::File`] where it cannot be written.
    pub fn open(root: &Path) -> Result<Store, ModelError> {
        for directory in ["", "blobs", "entries", "partial"] {
            let path = root.join(directory);
            let made = fs::DirBuilder::new().recursive(true).mode(0o750).create(&path);
            made.map_err(|error| ModelError::file(&path, "create", error))?;
        }
        Ok(Store { root: root.to_path_buf() })
    }

    /// Where it is.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    pub(super) fn blob(&self, digest: &Digest) -> PathBuf {
        self.root.join("blobs").join(format!("sha256-{}", digest.hex()))
    }

    pub(super) fn partial(&self, key: &str) -> PathBuf {
        self.root.join("partial").join(format!("{key}.part"))
    }

    /// What is there right now.
    ///
    /// # Errors
    /// [`ModelError::File`] where it cannot be read.
    pub fn catalogue(&self) -> Result<Catalogue, ModelError> {
        let _lock = self.lock()?;
        self.read()
    }

    /// Changes the catalogue under its lock.
    pub(super) fn update<T>(
        &self,
        change: impl FnOnce(&mut Catalogue) -> Result<T, ModelError>,
    ) -> Result<T, ModelError> {
        let _lock = self.lock()?;
        let before = self.read()?;
        let mut catalogue = before.clone();
        let result = change(&mut catalogue)?;
        if catalogue.models.len() > ENTRIES_MAX {
            return Err(ModelError::Setup(format!(
                "the catalogue is full ({ENTRIES_MAX} models): remove some"
            )));
        }
        if catalogue != before {
            self.write(&catalogue)?;
        }
        Ok(result)
    }

    fn write(&self, catalogue: &Catalogue) -> Result<(), ModelError> {
        let path = self.root.join("catalogue.json");
        let bytes = serde_json::to_vec_pretty(catalogue).map_err(io::Error::other);
        let written = bytes.and_then(|bytes| durable::replace(&path, &bytes));
        written.map_err(|error| ModelError::file(&path, "write", error))
    }

    fn lock(&self) -> Result<Lock, ModelError> {
        let path = self.root.join("catalogue.lock");
        let failed = |error| ModelError::file(&path, "lock", error);
        let mut options = OpenOptions::new();
        let file = options
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o640)
            .open(&path)
            .map_err(failed)?;
        // Held for as long as it takes to read and write a small file.
        flock(&file, FlockOperation::LockExclusive).map_err(|errno| failed(errno.into()))?;
        Ok(Lock(file))
    }

    fn read(&self) -> Result<Catalogue, ModelError> {
        let path = self.root.join("catalogue.json");
        let bytes = durable::read(&path).map_err(|error| ModelError::file(&path, "read", error))?;
        let Some(bytes) = bytes else { return Ok(Catalogue::default()) };
        match serde_json::from_slice(&bytes) {
            Ok(catalogue) => Ok(catalogue),
            Err(error) => {
                let aside =
                    durable::set_aside(&path).map_err(|error| ModelError::file(&path, "move", error))?;
                log::warn!(
                    "{} is unusable ({error}): it is {} now, and models are found again as they are asked for",
                    path.display(),
                    aside.display()
                );
                Ok(Catalogue::default())
            }
        }
    }

    /// The lock on what is being fetched under `key`. Says once through `waiting` that somebody else
    /// has it, and waits until that ends or `cancelled` says so.
    pub(super) fn lock_partial(
        &self,
        key: &str,
        mut waiting: impl FnMut(),
        cancelled: impl Fn() -> bool,
    ) -> Result<Lock, ModelError> {
        let path = self.partial(key).with_extension("lock");
        let failed = |error| ModelError::file(&path, "lock", error);
        let mut told = false;
        loop {
            let mut options = OpenOptions::new();
            let opened = options.read(true).write(true).create(true).truncate(false).mode(0o640).open(&path);
            let file = opened.map_err(failed)?;
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                // Whoever had it may have removed it: a lock on a file without a name locks nobody out.
                Ok(()) if is_at(&file, &path) => return Ok(Lock(file)),
                Ok(()) => {}
                Err(rustix::io::Errno::WOULDBLOCK | rustix::io::Errno::INTR) => {
                    if !told {
                        told = true;
                        waiting();
                    }
                    if cancelled() {
                        return Err(ModelError::Cancelled);
                    }
                    thread::sleep(LOCK_PAUSE);
                }
                Err(errno) => return Err(failed(errno.into())),
            }
        }
    }

    /// Removes the name of a lock that is held and not needed any more.
    pub(super) fn unlock_partial(&self, key: &str, lock: Lock) {
        let _ = fs::remove_file(self.partial(key).with_extension("lock"));
        drop(lock);
    }

    /// Holds the blobs of an entry for as long as the files live; `None` where one is missing or is not
    /// as long as it was. The caller holds the catalogue's lock.
    pub(super) fn lease(&self, entry: &Entry) -> Option<Vec<File>> {
        let lease = |file: &StoredFile| {
            let opened = File::open(self.blob(&file.digest)).ok()?;
            flock(&opened, FlockOperation::NonBlockingLockShared).ok()?;
            (opened.metadata().ok()?.len() == file.bytes).then_some(opened)
        };
        entry.files.iter().map(lease).collect()
    }

    /// Makes the links of an entry; returns what an engine is given: the first file, or the directory
    /// where there is no GGUF among them.
    pub(super) fn link(&self, id: &str, files: &[StoredFile]) -> Result<PathBuf, ModelError> {
        let directory = self.root.join("entries").join(id);
        let _ = fs::remove_dir_all(&directory);
        for file in files {
            let link = directory.join(&file.name);
            let failed = |error| ModelError::file(&link, "write", error);
            let parent = link.parent().unwrap_or(&directory);
            fs::DirBuilder::new().recursive(true).mode(0o750).create(parent).map_err(failed)?;
            let up = "../".repeat(2 + file.name.matches('/').count());
            symlink(format!("{up}blobs/sha256-{}", file.digest.hex()), &link).map_err(failed)?;
        }
        match files
            .first()
            .filter(|file| files.len() == 1 || file.name.to_ascii_lowercase().ends_with(".gguf"))
        {
            Some(first) => Ok(directory.join(&first.name)),
            None => Ok(directory),
        }
    }

    /// Appends a line about where something came from. One write: lines of several processes do not mix.
    pub(super) fn provenance(&self, line: &Value) -> Result<(), ModelError> {
        let path = self.root.join("provenance.jsonl");
        let failed = |error| ModelError::file(&path, "write", error);
        let mut options = OpenOptions::new();
        let mut file = options.append(true).create(true).mode(0o640).open(&path).map_err(failed)?;
        file.write_all(format!("{line}\n").as_bytes()).map_err(failed)
    }

    /// Bytes that blobs and partial files take.
    ///
    /// # Errors
    /// [`ModelError::File`] where they cannot be listed.
    pub fn bytes(&self) -> Result<u64, ModelError> {
        let mut bytes = 0;
        for directory in ["blobs", "partial"] {
            for (_, meta) in self.list(directory)? {
                // What is reserved counts too.
                bytes += meta.blocks().saturating_mul(512).max(meta.len());
            }
        }
        Ok(bytes)
    }

    fn list(&self, directory: &str) -> Result<Vec<(PathBuf, fs::Metadata)>, ModelError> {
        let path = self.root.join(directory);
        let entries = fs::read_dir(&path).map_err(|error| ModelError::file(&path, "list", error))?;
        // What vanishes while it is listed is not there.
        Ok(entries.flatten().filter_map(|entry| Some((entry.path(), entry.metadata().ok()?))).collect())
    }

    /// Marks a model as in use or not. `None` where the catalogue does not know it.
    ///
    /// # Errors
    /// [`ModelError::File`] where the catalogue cannot be changed.
    pub fn mark(&self, reference: &str, state: State) -> Result<Option<Entry>, ModelError> {
        self.update(|catalogue| {
            let found = find(catalogue, reference);
            Ok(found.map(|entry| {
                entry.state = state;
                entry.clone()
            }))
        })
    }

    /// Takes a model out of the catalogue and removes what only it needed. `None` where the catalogue
    /// does not know it.
    ///
    /// # Errors
    /// [`ModelError::Choice`] where it is in use; [`ModelError::File`].
    pub fn remove(&self, reference: &str) -> Result<Option<Cleaned>, ModelError> {
        self.update(|catalogue| {
            let Some(entry) = find(catalogue, reference).map(|entry| entry.clone()) else { return Ok(None) };
            let only_here = |file: &&StoredFile| !needed(catalogue, &file.digest, &entry.id);
            if entry.files.iter().filter(only_here).any(|file| self.is_in_use(&file.digest)) {
                return Err(ModelError::Choice(format!(
                    "{} is in use by an engine: stop the engine first, or retire the model and it goes with the next gc",
                    entry.reference
                )));
            }
            let mut cleaned = Cleaned::default();
            self.drop_entry(catalogue, &entry, &mut cleaned);
            Ok(Some(cleaned))
        })
    }

    /// Removes retired models, contents that no model has, and what was left half fetched a week ago.
    /// Nothing that is in use.
    ///
    /// # Errors
    /// [`ModelError::File`].
    pub fn clean(&self) -> Result<Cleaned, ModelError> {
        self.update(|catalogue| {
            let mut cleaned = Cleaned::default();
            let mut retired: Vec<Entry> =
                catalogue.models.iter().filter(|entry| entry.state == State::Retired).cloned().collect();
            retired.sort_by_key(|entry| entry.used_ms);
            for entry in retired {
                if entry.files.iter().any(|file| self.is_in_use(&file.digest)) {
                    cleaned.in_use += 1;
                } else {
                    self.drop_entry(catalogue, &entry, &mut cleaned);
                }
            }
            for (path, meta) in self.list("blobs")? {
                let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                let known = catalogue.models.iter().flat_map(|entry| &entry.files);
                if known.into_iter().any(|file| name == format!("sha256-{}", file.digest.hex())) {
                    continue;
                }
                match is_locked(&path) {
                    true => cleaned.in_use += 1,
                    false => remove_file(&path, &meta, &mut cleaned),
                }
            }
            for (path, _) in self.list("entries")? {
                let id = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                if !catalogue.models.iter().any(|entry| entry.id == id) {
                    let _ = fs::remove_dir_all(&path);
                }
            }
            self.clean_partial(&mut cleaned)?;
            Ok(cleaned)
        })
    }

    fn clean_partial(&self, cleaned: &mut Cleaned) -> Result<(), ModelError> {
        for (path, meta) in self.list("partial")? {
            let age = meta.modified().ok().and_then(|at| SystemTime::now().duration_since(at).ok());
            let is_part = path.extension().is_some_and(|extension| extension == "part");
            if !is_part || age.is_none_or(|age| age < PARTIAL_AGE_MAX) {
                continue;
            }
            let key = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            // Held by somebody: being fetched again right now.
            let Ok(lock) = self.lock_partial(&key, || {}, || true) else { continue };
            remove_file(&path, &meta, cleaned);
            let _ = fs::remove_file(path.with_extension("json"));
            self.unlock_partial(&key, lock);
        }
        Ok(())
    }

    fn drop_entry(&self, catalogue: &mut Catalogue, entry: &Entry, cleaned: &mut Cleaned) {
        for file in &entry.files {
            let path = self.blob(&file.digest);
            if !needed(catalogue, &file.digest, &entry.id)
                && let Ok(meta) = fs::metadata(&path)
            {
                remove_file(&path, &meta, cleaned);
            }
        }
        let _ = fs::remove_dir_all(self.root.join("entries").join(&entry.id));
        catalogue.models.retain(|other| other.id != entry.id);
        cleaned.models.push(entry.reference.clone());
    }

    fn is_in_use(&self, digest: &Digest) -> bool {
        is_locked(&self.blob(digest))
    }

    /// Makes room below `quota` for `needed` more bytes, by cleaning where that helps.
    pub(super) fn admit(&self, needed: u64, quota: Option<u64>) -> Result<(), ModelError> {
        let fits = |held: u64| quota.is_none_or(|quota| held.saturating_add(needed) <= quota);
        let has_room = || super::error::free_bytes(&self.root).is_none_or(|free| free >= needed);
        if !fits(self.bytes()?) || !has_room() {
            let cleaned = self.clean()?;
            if cleaned.files > 0 {
                log::info!(
                    "made room for {}: removed {} of retired models",
                    size(needed),
                    size(cleaned.bytes)
                );
            }
        }
        let held = self.bytes()?;
        if let Some(quota) = quota.filter(|_| !fits(held)) {
            return Err(ModelError::Quota { needed, held, quota });
        }
        match super::error::free_bytes(&self.root) {
            Some(free) if free < needed => {
                Err(ModelError::DiskFull { directory: self.root.clone(), needed: Some(needed), free })
            }
            _ => Ok(()),
        }
    }
}

/// What a line of provenance says.
pub(super) fn origin(entry: &Entry, file: &StoredFile, from: &str, expected: Option<Digest>) -> Value {
    json!({
        "ts_ms": unix_ms(),
        "model_id": entry.id,
        "path": entry.path,
        "size_bytes": file.bytes,
        "digest": file.digest,
        "name": file.name,
        "from": from,
        "cfg": {"model_ref": entry.reference, "expected_digest": expected},
    })
}

fn needed(catalogue: &Catalogue, digest: &Digest, but: &str) -> bool {
    let others = catalogue.models.iter().filter(|other| other.id != but);
    others.flat_map(|other| &other.files).any(|file| file.digest == *digest)
}

/// By reference or by id.
fn find<'a>(catalogue: &'a mut Catalogue, reference: &str) -> Option<&'a mut Entry> {
    catalogue.models.iter_mut().find(|entry| entry.reference == reference || entry.id == reference)
}

fn is_at(file: &File, path: &Path) -> bool {
    match (file.metadata(), fs::metadata(path)) {
        (Ok(a), Ok(b)) => (a.dev(), a.ino()) == (b.dev(), b.ino()),
        _ => false,
    }
}

/// Whether anybody holds a lease on a blob.
fn is_locked(path: &Path) -> bool {
    File::open(path).is_ok_and(|file| flock(&file, FlockOperation::NonBlockingLockExclusive).is_err())
}

fn remove_file(path: &Path, meta: &fs::Metadata, cleaned: &mut Cleaned) {
    match fs::remove_file(path) {
        Ok(()) => {
            cleaned.files += 1;
            cleaned.bytes += meta.len();
        }
        Err(error) => log::warn!("cannot remove {}: {error}", path.display()),
    }
}
