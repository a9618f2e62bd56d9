//! From a model reference to files of this machine that an engine can be given.
//!
//! A model that is here already is used as it is, without asking anybody: a machine that is left alone
//! starts its engines whether or not a hub answers. What is not here is fetched into a part file,
//! hashed, checked against what was promised, and only then put among the contents that the catalogue
//! names. Nothing half fetched and nothing wrong is ever visible under a model's name; two processes
//! that want the same thing fetch it once.
//!
//! [`resolve`] blocks, and is meant for a helper thread; it tells how it goes through a callback and
//! stops when its flag is set. Pure: [`mod@reference`], [`gguf`], [`ranges`], [`answer`], [`hub`]. The
//! others touch files ([`store`], `part`, [`digest`]), the network (`client`, `fetch`) or the terminal
//! ([`progress`], [`command`]).

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::replicas::probing::{MODEL_BYTES_PER_MS_MIN, MODEL_READING_MS_MAX, START_MS_MAX};
use crate::service::machine::boot_id;
use crate::settings::{Alias, Exit, Setting, Settings, boolean, number};

pub mod answer;
mod client;
pub mod command;
pub mod digest;
pub mod error;
mod fetch;
pub mod gguf;
pub mod hub;
mod part;
pub mod progress;
pub mod ranges;
pub mod reference;
pub mod store;

pub use client::Secret;
pub use digest::Digest;
pub use error::ModelError;
pub use gguf::Gguf;
pub use progress::{Display, Progress};
pub use reference::Reference;
pub use store::{Entry, State, Store};

use client::{Client, Place, unix_ms};
use digest::Hasher;
use fetch::{Effort, Job};
use hub::Wanted;
use part::Part;
use reference::{HubReference, Pick};
use store::{Lock, StoredFile};

/// Failures in a row after which a download is given up: with doubling pauses, some three minutes.
const FAILURES_MAX: u32 = 8;
/// Pause after the first failure.
const PAUSE_FIRST: Duration = Duration::from_millis(500);
/// Longest silence of a server in the middle of a file.
const STALL: Duration = Duration::from_secs(30);
/// Most connections to a server at once: hubs refuse clients that open many.
const CONNECTIONS_MAX: u64 = 16;
/// Longest token file, in bytes.
const TOKEN_FILE_BYTES_MAX: u64 = 4096;
/// Digits of a digest that name a model or a part file: enough that no two meet.
const KEY_DIGITS: usize = 32;

/// The settings that say where models are kept and how they are fetched.
pub static TABLE: &[Setting] = &[
    Setting {
        flag: "cache-dir",
        env: "ENGINE_PROVISIONER_CACHE_DIR",
        aliases: &[],
        default: None,
        value: "DIR",
        help: "Directory for what is fetched and built; without it llama-orch in the user's cache directory",
    },
    Setting {
        flag: "cache-quota",
        env: "ENGINE_PROVISIONER_CACHE_QUOTA",
        aliases: &[],
        default: None,
        value: "SIZE",
        help: "What models may take on the disk, such as 200GiB; without it as much as there is",
    },
    Setting {
        flag: "hf-endpoint",
        env: "HF_ENDPOINT",
        aliases: &[],
        default: Some("https://huggingface.co"),
        value: "URL",
        help: "Hub that hf: references are fetched from",
    },
    Setting {
        flag: "hf-token-file",
        env: "ENGINE_PROVISIONER_HF_TOKEN_FILE",
        aliases: &[Alias::same("HF_TOKEN_PATH")],
        default: None,
        value: "FILE",
        help: "File with the hub's token, for gated repositories; the variable HF_TOKEN holds the token itself",
    },
    Setting {
        flag: "offline",
        env: "ENGINE_PROVISIONER_OFFLINE",
        aliases: &[Alias::same("HF_HUB_OFFLINE")],
        default: Some("false"),
        value: "BOOL",
        help: "Fetch nothing: models have to be in the cache or on this machine",
    },
    Setting {
        flag: "connections",
        env: "ENGINE_PROVISIONER_CONNECTIONS",
        aliases: &[],
        default: Some("4"),
        value: "N",
        help: "Connections at once for one file, 1 to 16, where the server knows ranges",
    },
];

/// Where models are kept and how they are fetched.
#[derive(Clone, Debug)]
pub struct Options {
    /// Directory of the store.
    pub directory: PathBuf,
    /// What it may take, in bytes.
    pub quota_bytes: Option<u64>,
    /// The hub, without a trailing slash.
    pub hub: String,
    /// Its token.
    pub token: Option<Secret>,
    /// Whether nothing may be fetched.
    pub offline: bool,
    /// Connections at once.
    pub connections: usize,
    /// Failures in a row before it is given up.
    pub failures_max: u32,
    /// Pause after the first of them.
    pub pause_first: Duration,
    /// Longest silence in the middle of a file.
    pub stall: Duration,
}

impl Options {
    /// For a store in `directory`, with defaults for the rest.
    #[must_use]
    pub fn new(directory: &Path) -> Options {
        Options {
            directory: directory.to_path_buf(),
            quota_bytes: None,
            hub: "https://huggingface.co".into(),
            token: None,
            offline: false,
            connections: 4,
            failures_max: FAILURES_MAX,
            pause_first: PAUSE_FIRST,
            stall: STALL,
        }
    }

    /// From the settings of [`TABLE`].
    ///
    /// # Errors
    /// [`Exit`] with code 78 and one line that names what is not usable, never a token.
    pub fn from_settings(
        settings: &Settings,
        env: impl Fn(&str) -> Option<OsString>,
    ) -> Result<Options, Exit> {
        let cache = cache_directory(settings, &env)?;
        let hub = settings.need("hf-endpoint", |text| match Reference::parse(text) {
            Ok(Reference::Url(url)) if !url.contains(['?', '#']) => Ok(url.trim_end_matches('/').to_string()),
            _ => Err("allowed is an http(s) URL such as https://huggingface.co".into()),
        })?;
        let token = match settings.get("hf-token-file", |text| Ok(PathBuf::from(text)))? {
            Some(file) => Some(read_token(&file)?),
            None => env("HF_TOKEN")
                .filter(|token| !token.is_empty())
                .map(|token| {
                    let text = token.into_string().map_err(|_| Exit::config("HF_TOKEN is not UTF-8"))?;
                    Secret::parse(&text).map_err(|why| Exit::config(format!("HF_TOKEN is not usable: {why}")))
                })
                .transpose()?,
        };
        Ok(Options {
            quota_bytes: settings.get("cache-quota", error::parse_size)?,
            hub,
            token,
            offline: settings.need("offline", boolean)?,
            connections: settings
                .need("connections", number(1, CONNECTIONS_MAX))
                .map(|n| usize::try_from(n).unwrap_or(1))?,
            ..Options::new(&cache.join("models"))
        })
    }
}

/// Where everything that is fetched or built is kept.
///
/// # Errors
/// [`Exit`] with code 78 where there is neither a setting nor a home directory.
pub fn cache_directory(settings: &Settings, env: impl Fn(&str) -> Option<OsString>) -> Result<PathBuf, Exit> {
    if let Some(directory) = settings.get("cache-dir", |text| Ok(PathBuf::from(text)))? {
        return std::path::absolute(&directory)
            .map_err(|error| Exit::config(format!("--cache-dir: {error}")));
    }
    // systemd names a directory in CACHE_DIRECTORY.
    if let Some(given) = env("CACHE_DIRECTORY").map(PathBuf::from).filter(|path| path.is_absolute()) {
        return Ok(given);
    }
    let absolute = |name| env(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let cache = absolute("XDG_CACHE_HOME").or_else(|| absolute("HOME").map(|home| home.join(".cache")));
    cache.map(|cache| cache.join("llama-orch")).ok_or_else(|| {
        Exit::config(
            "there is no home directory to keep models in: give --cache-dir or ENGINE_PROVISIONER_CACHE_DIR",
        )
    })
}

fn read_token(file: &Path) -> Result<Secret, Exit> {
    let mut text = String::new();
    let read =
        File::open(file).and_then(|opened| opened.take(TOKEN_FILE_BYTES_MAX).read_to_string(&mut text));
    read.map_err(|error| Exit::config(format!("cannot read the token file {}: {error}", file.display())))?;
    Secret::parse(&text).map_err(|why| Exit::config(format!("{} is not usable: {why}", file.display())))
}

/// What is asked for.
#[derive(Clone, Debug)]
pub struct Request {
    /// The model.
    pub reference: Reference,
    /// What it has to be; for a single file.
    pub digest: Option<Digest>,
    /// Whether to ask the server although it is here: a branch may have moved on.
    pub refresh: bool,
}

/// A model that is here. As long as this value lives, nobody removes its files.
#[derive(Debug)]
pub struct Model {
    /// What an engine is given: a file, or a directory for engines that read several.
    pub path: PathBuf,
    /// Length of all of it.
    pub bytes: u64,
    /// Of a single file, where it is known.
    pub digest: Option<Digest>,
    /// What its header says, where it is a GGUF; of a split one, the first part's with all weights.
    pub gguf: Option<Gguf>,
    /// Whether it was fetched just now.
    pub fetched: bool,
    /// Locks on its contents.
    #[expect(dead_code, reason = "held, not read")]
    lease: Vec<File>,
}

impl Model {
    /// How long an engine may take to become ready with it, in milliseconds: a fixed part, and the
    /// time in which a slow disk reads it.
    #[must_use]
    pub fn ready_within_ms(&self) -> u64 {
        ready_within_ms(self.bytes)
    }
}

/// How long an engine may take to become ready with a model of so many bytes, in milliseconds.
#[must_use]
pub fn ready_within_ms(bytes: u64) -> u64 {
    START_MS_MAX + (bytes / MODEL_BYTES_PER_MS_MIN).min(MODEL_READING_MS_MAX)
}

/// Makes a model ready. Blocks for as long as it takes; `cancel` stops it within a fraction of a
/// second, and what arrived by then is kept for the next time.
///
/// # Errors
/// [`ModelError`], whose text says what to do.
pub fn resolve(
    options: &Options,
    request: &Request,
    cancel: &Arc<AtomicBool>,
    tell: &mut dyn FnMut(Progress<'_>),
) -> Result<Model, ModelError> {
    match &request.reference {
        Reference::Local(path) => local(&options.directory, request, path, cancel, tell),
        _ => remote(&Store::open(&options.directory)?, options, request, cancel, tell),
    }
}

/// A file or directory outside the cache: checked, and named in the catalogue where there can be one.
fn local(
    cache: &Path,
    request: &Request,
    path: &Path,
    cancel: &Arc<AtomicBool>,
    tell: &mut dyn FnMut(Progress<'_>),
) -> Result<Model, ModelError> {
    let failed = |error: std::io::Error| match error.kind() {
        std::io::ErrorKind::NotFound => ModelError::NoSuchFile(path.to_path_buf()),
        _ => ModelError::File { path: path.to_path_buf(), doing: "read", error },
    };
    let path = fs::canonicalize(path).map_err(failed)?;
    let name = path.display().to_string();
    let mut digest = None;
    let (mut bytes, mut gguf) = (0, None);
    if path.is_dir() {
        if request.digest.is_some() {
            return Err(ModelError::DigestOfDirectory(name));
        }
        for entry in fs::read_dir(&path).map_err(failed)?.flatten() {
            // Through links: a directory of links to files elsewhere is usual.
            bytes += fs::metadata(entry.path()).map_or(0, |meta| meta.len());
        }
    } else {
        let parts = hub::parts_of(&name);
        if parts.len() > 1 && request.digest.is_some() {
            return Err(ModelError::DigestOfDirectory(name));
        }
        for part in &parts {
            let file = File::open(part).map_err(|error| match error.kind() {
                std::io::ErrorKind::NotFound => ModelError::NoSuchFile(part.into()),
                _ => ModelError::File { path: part.into(), doing: "read", error },
            })?;
            let length = file.metadata().map_err(failed)?.len();
            bytes += length;
            let told = header(&file, part, length).map_err(|error| match error {
                ModelError::Gguf { error, .. } => ModelError::LocalGguf { path: part.into(), error },
                error => error,
            });
            add_header(&mut gguf, told?);
            if let Some(expected) = request.digest {
                let found = hash(&file, Path::new(part), length, cancel, tell)?;
                if found != expected {
                    return Err(ModelError::LocalDigest { path: part.into(), expected, found });
                }
                digest = Some(found);
            }
        }
    }
    let now_ms = unix_ms();
    let id = key(&format!("file:{name}"));
    let store = Store::open(cache);
    let named = store.and_then(|store| {
        store.update(|catalogue| {
            let known = catalogue.models.iter().position(|entry| entry.id == id);
            let added_ms = known.map_or(now_ms, |at| catalogue.models[at].added_ms);
            let mut entry = Entry {
                id: id.clone(),
                reference: format!("file:{name}"),
                state: State::Active,
                path: path.clone(),
                files: Vec::new(),
                bytes,
                added_ms,
                used_ms: now_ms,
                architecture: None,
                context_length: None,
                quantisation: None,
                parameters: None,
                unsynced_boot: None,
            };
            gguf.iter().for_each(|gguf| entry.tell(gguf));
            match known {
                Some(at) => catalogue.models[at] = entry,
                None => catalogue.models.push(entry),
            }
            Ok(())
        })
    });
    if let Err(error) = named {
        // It lies where it lies: without a place for the catalogue it is used all the same.
        tell(Progress::Note(&format!("{name} is not in the catalogue: {error}")));
    }
    Ok(Model { path, bytes, digest, gguf, fetched: false, lease: Vec::new() })
}

/// The header of a GGUF; `None` for a file that neither is one nor says so by its name.
fn header(file: &File, name: &str, length: u64) -> Result<Option<Gguf>, ModelError> {
    use std::io::{Seek, SeekFrom};
    let mut reader = BufReader::with_capacity(64 << 10, file);
    let rewound = reader.seek(SeekFrom::Start(0)).map_err(gguf::GgufError::Io);
    match rewound.and_then(|_| gguf::read(reader)) {
        Ok(gguf) => match gguf.file_bytes_min.filter(|needed| *needed > length) {
            Some(needed) => Err(ModelError::Truncated { name: name.into(), found: length, needed }),
            None => Ok(Some(gguf)),
        },
        Err(gguf::GgufError::NotGguf(_)) if !name.to_ascii_lowercase().ends_with(".gguf") => Ok(None),
        Err(error) => Err(ModelError::Gguf { name: name.into(), error }),
    }
}

fn add_header(whole: &mut Option<Gguf>, part: Option<Gguf>) {
    match (whole.as_mut(), part) {
        (Some(whole), Some(part)) => {
            whole.parameters = whole.parameters.saturating_add(part.parameters);
            whole.tensors = whole.tensors.saturating_add(part.tensors);
        }
        (None, part) => *whole = part,
        (Some(_), None) => {}
    }
}

/// Hashes a file that is here.
fn hash(
    file: &File,
    path: &Path,
    length: u64,
    cancel: &AtomicBool,
    tell: &mut dyn FnMut(Progress<'_>),
) -> Result<Digest, ModelError> {
    let name = path.display().to_string();
    tell(Progress::Started { name: &name, total_bytes: Some(length), kept_bytes: 0 });
    let mut hasher = Hasher::new();
    while hasher.done_bytes() < length {
        if cancel.load(Ordering::Relaxed) {
            return Err(ModelError::Cancelled);
        }
        hasher.advance(file, length).map_err(|error| ModelError::file(path, "read", error))?;
        tell(Progress::Bytes { done_bytes: hasher.done_bytes(), total_bytes: Some(length) });
    }
    tell(Progress::Finished { name: &name, bytes: length });
    Ok(hasher.finish())
}

fn key(text: &str) -> String {
    Digest::of(text.as_bytes()).hex().chars().take(KEY_DIGITS).collect()
}

/// What has a name in the cache, or gets one.
fn remote(
    store: &Store,
    options: &Options,
    request: &Request,
    cancel: &Arc<AtomicBool>,
    tell: &mut dyn FnMut(Progress<'_>),
) -> Result<Model, ModelError> {
    let shown = request.reference.shown();
    // A signed URL is another one each time, and its query is no one else's business.
    let id = match &request.reference {
        Reference::Url(url) => key(url),
        reference => key(&reference.shown()),
    };
    if !request.refresh
        && let Some(model) = cached(store, &id, &shown, request.digest, cancel, tell)?
    {
        return Ok(model);
    }
    if options.offline {
        return Err(ModelError::Offline(shown));
    }
    let client = Client::new(options.stall, Arc::clone(cancel))?;
    let fetching = Fetching { store, options, request, client: &client, id: &id, shown: &shown };
    client.watched(|| fetching.fetch(cancel, tell))
}

/// A model that the catalogue knows, or a content that some other model has.
fn cached(
    store: &Store,
    id: &str,
    shown: &str,
    digest: Option<Digest>,
    cancel: &Arc<AtomicBool>,
    tell: &mut dyn FnMut(Progress<'_>),
) -> Result<Option<Model>, ModelError> {
    let found = store.update(|catalogue| {
        let wanted = |entry: &Entry| match (digest, entry.files.as_slice()) {
            (None, _) => entry.id == id,
            (Some(digest), [file]) => file.digest == digest,
            (Some(_), _) => false,
        };
        // The one of this very name first; under a digest the name does not matter.
        let at = catalogue.models.iter().position(|entry| entry.id == id && wanted(entry));
        let Some(at) = at.or_else(|| catalogue.models.iter().position(wanted)) else { return Ok(None) };
        let Some(lease) = store.lease(&catalogue.models[at]) else { return Ok(None) };
        let entry = &mut catalogue.models[at];
        entry.used_ms = unix_ms();
        entry.state = State::Active;
        if !entry.path.exists() {
            entry.path = store.link(&entry.id, &entry.files)?;
        }
        Ok(Some((entry.clone(), lease)))
    })?;
    let Some((mut entry, lease)) = found else { return Ok(None) };
    if let Some(boot) = entry.unsynced_boot.take() {
        let sound = settle(&entry, &lease, Some(boot) == boot_id(), cancel, tell)?;
        let id = entry.id.clone();
        store.update(|catalogue| {
            match catalogue.models.iter().position(|known| known.id == id) {
                Some(at) if sound => catalogue.models[at].unsynced_boot = None,
                Some(at) => drop(catalogue.models.remove(at)),
                None => {}
            }
            Ok(())
        })?;
        if !sound {
            tell(Progress::Note("its content did not survive the end of the last boot: fetching it again"));
            for file in &entry.files {
                let _ = fs::remove_file(store.blob(&file.digest));
            }
            return Ok(None);
        }
    }
    if entry.reference != shown {
        tell(Progress::Note(&format!("{} has the same content", entry.reference)));
    }
    model(&entry, lease, false).map(Some)
}

/// Makes sure that a content that was renamed into its place before it was flushed is on the disk. In
/// the boot in which it was written that is a flush; after another one its digest has to be right.
fn settle(
    entry: &Entry,
    lease: &[File],
    same_boot: bool,
    cancel: &AtomicBool,
    tell: &mut dyn FnMut(Progress<'_>),
) -> Result<bool, ModelError> {
    for (file, stored) in lease.iter().zip(&entry.files) {
        if same_boot {
            file.sync_data().map_err(|error| ModelError::file(&entry.path, "flush", error))?;
        } else if hash(file, Path::new(&stored.name), stored.bytes, cancel, tell)? != stored.digest {
            return Ok(false);
        }
    }
    Ok(true)
}

fn model(entry: &Entry, lease: Vec<File>, fetched: bool) -> Result<Model, ModelError> {
    let mut gguf = None;
    for (file, stored) in lease.iter().zip(&entry.files) {
        add_header(&mut gguf, header(file, &stored.name, stored.bytes)?);
    }
    let digest = if let [only] = entry.files.as_slice() { Some(only.digest) } else { None };
    Ok(Model { path: entry.path.clone(), bytes: entry.bytes, digest, gguf, fetched, lease })
}

/// One file that has arrived, or was here.
struct Arrived {
    stored: StoredFile,
    from: String,
    /// `None` where its content was here already.
    part: Option<Part>,
    held: Option<(String, Lock)>,
}

struct Fetching<'a> {
    store: &'a Store,
    options: &'a Options,
    request: &'a Request,
    client: &'a Client,
    id: &'a str,
    shown: &'a str,
}

impl Fetching<'_> {
    fn effort(&self) -> Effort {
        Effort {
            connections: self.options.connections,
            failures_max: self.options.failures_max,
            pause_first: self.options.pause_first,
        }
    }

    fn fetch(
        &self,
        cancel: &Arc<AtomicBool>,
        tell: &mut dyn FnMut(Progress<'_>),
    ) -> Result<Model, ModelError> {
        let (place, wanted) = self.wanted(tell)?;
        if wanted.len() > 1 && self.request.digest.is_some() {
            return Err(ModelError::DigestOfDirectory(self.shown.to_string()));
        }
        let mut arrived = Vec::with_capacity(wanted.len());
        for file in &wanted {
            let place = place(&file.name);
            let key = key(reference::shown_url(&place.url));
            let mut waited = false;
            let lock = self.store.lock_partial(
                &key,
                || {
                    waited = true;
                    tell(Progress::Waiting { name: self.shown });
                },
                || self.client.cancelled(),
            )?;
            if waited
                && let Some(model) =
                    cached(self.store, self.id, self.shown, self.request.digest, cancel, tell)?
            {
                self.store.unlock_partial(&key, lock);
                return Ok(model);
            }
            arrived.push(self.file(file, place, key, lock, tell)?);
        }
        self.publish(arrived)
    }

    /// Which files, and where each is.
    #[allow(clippy::type_complexity, reason = "a function from a name to a place")]
    fn wanted(
        &self,
        tell: &mut dyn FnMut(Progress<'_>),
    ) -> Result<(Box<dyn Fn(&str) -> Place + '_>, Vec<Wanted>), ModelError> {
        let hub = match &self.request.reference {
            Reference::Hub(hub) => hub,
            Reference::Url(url) => {
                let path = reference::shown_url(url);
                let last = path.rsplit('/').next().filter(|name| reference::is_relative_file(name));
                let name = last.unwrap_or("model").to_string();
                let place = move |_: &str| Place { url: url.clone(), token: None };
                return Ok((
                    Box::new(place),
                    vec![Wanted { name, digest: self.request.digest, bytes: None }],
                ));
            }
            Reference::Local(path) => return Err(ModelError::NoSuchFile(path.clone())),
        };
        let (revision, mut wanted) = match &hub.pick {
            // A name is enough: what it is the hub says when it is asked for it.
            Pick::File(file) => {
                let named = |name| Wanted { name, digest: None, bytes: None };
                (hub.revision.clone(), hub::parts_of(file).into_iter().map(named).collect::<Vec<_>>())
            }
            Pick::Any | Pick::Quantisation(_) => self.listed(hub, tell)?,
        };
        if let [only] = wanted.as_mut_slice() {
            only.digest = self.request.digest.or(only.digest);
        }
        let place = move |name: &str| Place {
            url: hub::file_url(&self.options.hub, &hub.repo, &revision, name),
            token: self.options.token.clone(),
        };
        Ok((Box::new(place), wanted))
    }

    /// What the hub lists, as of one commit: a branch may move on between two files.
    fn listed(
        &self,
        hub: &HubReference,
        tell: &mut dyn FnMut(Progress<'_>),
    ) -> Result<(String, Vec<Wanted>), ModelError> {
        let place =
            Place { url: hub::listing_url(&self.options.hub, hub), token: self.options.token.clone() };
        let job = Job { name: self.shown, place, expected: None, bytes: None, hub: true };
        let text = fetch::text(self.client, &job, self.effort(), tell)?;
        let listing: hub::Listing = serde_json::from_str(&text).map_err(|error| ModelError::Server {
            name: self.shown.into(),
            what: format!("the hub's list of files does not parse ({error})"),
        })?;
        let wanted = hub::choose(hub, &listing).map_err(ModelError::Choice)?;
        let commit = listing.sha.filter(|sha| sha.len() <= 64 && sha.bytes().all(|b| b.is_ascii_hexdigit()));
        Ok((commit.unwrap_or_else(|| hub.revision.clone()), wanted))
    }

    fn file(
        &self,
        file: &Wanted,
        place: Place,
        key: String,
        lock: Lock,
        tell: &mut dyn FnMut(Progress<'_>),
    ) -> Result<Arrived, ModelError> {
        let from = reference::shown_url(&place.url).to_string();
        if let Some(digest) = file.digest
            && let Ok(meta) = fs::metadata(self.store.blob(&digest))
            && file.bytes.is_none_or(|bytes| bytes == meta.len())
        {
            let stored = StoredFile { name: file.name.clone(), digest, bytes: meta.len() };
            return Ok(Arrived { stored, from, part: None, held: Some((key, lock)) });
        }
        let name = format!(
            "{}{}",
            self.shown,
            if self.shown.ends_with(&file.name) { String::new() } else { format!(" {}", file.name) }
        );
        let hub = matches!(self.request.reference, Reference::Hub(_));
        let job = Job { name: &name, place, expected: file.digest, bytes: file.bytes, hub };
        let mut part = Part::open(&self.store.partial(&key), file.digest.is_some())?;
        let mut admit = |needed| self.store.admit(needed, self.options.quota_bytes);
        let fetched =
            fetch::fetch(self.client, &job, self.effort(), &mut part, &mut admit, tell).and_then(|digest| {
                let bytes =
                    part.file.metadata().map_err(|error| ModelError::file(part.path(), "read", error))?.len();
                if bytes == 0 {
                    return Err(ModelError::Server { name: name.clone(), what: "the file is empty".into() });
                }
                header(&part.file, &file.name, bytes)?;
                Ok(StoredFile { name: file.name.clone(), digest, bytes })
            });
        match fetched {
            Ok(stored) => {
                tell(Progress::Finished { name: &name, bytes: stored.bytes });
                Ok(Arrived { stored, from, part: Some(part), held: Some((key, lock)) })
            }
            Err(error) => {
                // Wrong bytes are wrong tomorrow too. Missing ones are worth keeping what is there.
                let keep = matches!(
                    error,
                    ModelError::Network { .. }
                        | ModelError::Cancelled
                        | ModelError::DiskFull { .. }
                        | ModelError::Changing(_)
                ) && part.done.bytes() > 0
                    && part.total.is_some();
                if !keep {
                    part.remove();
                    self.store.unlock_partial(&key, lock);
                }
                Err(error)
            }
        }
    }

    /// Gives what arrived its name: all of it or nothing.
    fn publish(&self, mut arrived: Vec<Arrived>) -> Result<Model, ModelError> {
        let files: Vec<StoredFile> = arrived.iter().map(|one| one.stored.clone()).collect();
        let (entry, lease) = self.store.update(|catalogue| {
            let mut new = Vec::new();
            for one in &mut arrived {
                if let Some(part) = one.part.take() {
                    part.publish(&self.store.blob(&one.stored.digest))?;
                    new.push((one.stored.clone(), one.from.clone()));
                }
            }
            let now_ms = unix_ms();
            let known = catalogue.models.iter().position(|entry| entry.id == self.id);
            let mut entry = Entry {
                id: self.id.to_string(),
                reference: self.shown.to_string(),
                state: State::Active,
                path: self.store.link(self.id, &files)?,
                bytes: files.iter().map(|file| file.bytes).sum(),
                files,
                added_ms: known.map_or(now_ms, |at| catalogue.models[at].added_ms),
                used_ms: now_ms,
                architecture: None,
                context_length: None,
                quantisation: None,
                parameters: None,
                unsynced_boot: (!new.is_empty()).then(|| boot_id().unwrap_or_default()),
            };
            let lease = self.store.lease(&entry).ok_or_else(|| {
                ModelError::Setup(format!(
                    "{}: its content vanished from the cache meanwhile: run it again",
                    self.shown
                ))
            })?;
            let mut gguf = None;
            for (file, stored) in lease.iter().zip(&entry.files) {
                add_header(&mut gguf, header(file, &stored.name, stored.bytes)?);
            }
            gguf.iter().for_each(|gguf| entry.tell(gguf));
            match known {
                Some(at) => catalogue.models[at] = entry.clone(),
                None => catalogue.models.push(entry.clone()),
            }
            for (file, from) in &new {
                self.store.provenance(&store::origin(&entry, file, from, self.request.digest))?;
            }
            Ok((entry, lease))
        })?;
        for (key, lock) in arrived.into_iter().filter_map(|one| one.held) {
            self.store.unlock_partial(&key, lock);
        }
        model(&entry, lease, true)
    }
}
