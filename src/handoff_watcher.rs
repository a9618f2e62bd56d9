//! Watching for handoff files from another program: a thread that calls back.
//!
//! Every handoff in the runtime directory is told once to the callback, when it appears and again when
//! what it says changes. A callback that returns an error is called again with the same handoff after
//! the poll interval, and the others are told meanwhile. Changes are noticed through inotify where the
//! kernel reports them, and by polling everywhere else; the rules for files are those of
//! [`crate::replicas::scan`].
//!
//! ```no_run
//! use llama_orch::handoff_watcher::{HandoffPayload, HandoffWatcher, HandoffWatcherConfig};
//! use std::path::PathBuf;
//!
//! // Create callback that updates pool registry
//! let callback = Box::new(|payload: HandoffPayload| {
//!     println!("Engine ready:");
//!     println!("  pool_id: {}", payload.pool_id);
//!     println!("  replica_id: {}", payload.replica_id);
//!     println!("  url: {}", payload.url);
//!     println!("  slots: {}", payload.slots);
//!     Ok(())
//! });
//!
//! // Configure watcher
//! let config = HandoffWatcherConfig {
//!     runtime_dir: PathBuf::from(".runtime/engines"),
//!     poll_interval_ms: 1000,
//!     auto_delete: true,
//! };
//!
//! // Spawn watcher thread
//! let watcher = HandoffWatcher::new(config, callback);
//! let handle = watcher.spawn();
//!
//! // The watcher runs in the background, until the handle is stopped or dropped.
//! handle.stop();
//! ```
//!
//! Fields that are not given keep their defaults:
//!
//! ```
//! # use llama_orch::handoff_watcher::{HandoffPayload, HandoffWatcher, HandoffWatcherConfig};
//! # use std::path::PathBuf;
//! # let directory = std::env::temp_dir().join(format!("llama-orch-doc-{}", std::process::id()));
//! # std::fs::create_dir_all(&directory)?;
//! # std::fs::write(directory.join("pool-0-r0.json"), r#"{"pool_id":"pool-0","url":"http://localhost:8081"}"#)?;
//! let (tell, told) = std::sync::mpsc::channel();
//! let callback = Box::new(move |payload: HandoffPayload| {
//!     println!("Engine ready: {} at {}", payload.pool_id, payload.url);
//!     tell.send(payload)?;
//!     Ok(())
//! });
//! let config = HandoffWatcherConfig {
//! #   /*
//!     runtime_dir: PathBuf::from(".runtime/engines"),
//! #   */ runtime_dir: directory.clone(),
//!     poll_interval_ms: 1000,
//!     ..HandoffWatcherConfig::default()
//! };
//! let handle = HandoffWatcher::new(config, callback).spawn();
//! let payload = told.recv()?;
//! assert_eq!((payload.url.as_str(), payload.slots), ("http://localhost:8081", 1));
//! handle.stop();
//! # std::fs::remove_dir_all(&directory)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

use std::collections::BTreeMap;
use std::error::Error;
use std::io;
use std::ops::RangeBounds;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use crate::reactor::token::{Kind, Token};
use crate::reactor::{Reactor, Waker};
use crate::replicas::{FileContent, ListedFile, Listing, Span, Watch};
use crate::time::{Mono, earliest};
use crate::wire::handoff::Handoff;

/// What a watcher watches, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HandoffWatcherConfig {
    /// Where handoff files appear, default `.runtime/engines`. Created where it does not exist.
    pub runtime_dir: PathBuf,
    /// Longest that a handoff goes unseen where the kernel reports no changes, and the pause before a
    /// callback that failed is called again; in milliseconds, default 1000, at least 10.
    pub poll_interval_ms: u64,
    /// Delete a file once the callback has returned without an error, default false.
    pub auto_delete: bool,
}

/// What a handoff file says: an engine is ready, and here is where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HandoffPayload {
    /// Pool that the engine belongs to.
    pub pool_id: String,
    /// Its name within the pool.
    pub replica_id: String,
    /// Where it listens.
    pub url: String,
    /// First GPU that it uses, 0 where the file names none.
    pub gpu_device: usize,
    /// Requests that it serves at once.
    pub slots: usize,
    /// `false`: it is known, and not to be used.
    pub ready: bool,
}

/// What a callback says that could not do its work.
pub type CallbackError = Box<dyn Error + Send + Sync>;

/// A watcher that has not started.
pub struct HandoffWatcher {
    config: HandoffWatcherConfig,
    callback: Callback,
}

/// A running watcher. Dropping it stops the watcher too.
#[derive(Debug)]
pub struct HandoffWatcherHandle {
    stop: Arc<AtomicBool>,
    waker: Waker,
    thread: Option<JoinHandle<()>>,
}

type Callback = Box<dyn FnMut(HandoffPayload) -> Result<(), CallbackError> + Send>;

/// Shortest poll interval, in milliseconds: below it the thread would do little else.
const INTERVAL_MS_MIN: u64 = 10;

impl Default for HandoffWatcherConfig {
    fn default() -> HandoffWatcherConfig {
        HandoffWatcherConfig {
            runtime_dir: PathBuf::from(".runtime/engines"),
            poll_interval_ms: 1000,
            auto_delete: false,
        }
    }
}

impl From<&Handoff> for HandoffPayload {
    fn from(handoff: &Handoff) -> HandoffPayload {
        HandoffPayload {
            pool_id: handoff.pool_id.to_string(),
            replica_id: handoff.replica_id.to_string(),
            url: handoff.url.to_string(),
            gpu_device: handoff.gpu_device().map_or(0, |device| device as usize),
            slots: handoff.slots as usize,
            ready: handoff.ready,
        }
    }
}

impl HandoffWatcher {
    /// A watcher that will tell `callback` of every handoff, on a thread of its own.
    #[must_use]
    pub fn new<F>(config: HandoffWatcherConfig, callback: Box<F>) -> HandoffWatcher
    where
        F: FnMut(HandoffPayload) -> Result<(), CallbackError> + Send + 'static,
    {
        HandoffWatcher { config, callback }
    }

    /// Starts the thread.
    ///
    /// # Panics
    /// Where the kernel gives no thread or descriptor; [`HandoffWatcher::try_spawn`] returns that.
    #[must_use = "dropping the handle stops the watcher"]
    pub fn spawn(self) -> HandoffWatcherHandle {
        self.try_spawn().expect("the kernel gives a thread and descriptors")
    }

    /// Starts the thread.
    ///
    /// # Errors
    /// Where the kernel gives no thread or descriptor.
    pub fn try_spawn(self) -> io::Result<HandoffWatcherHandle> {
        let reactor = Reactor::new()?;
        let waker = reactor.waker(Token::only(Kind::Waker))?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let interval_ms = self.config.poll_interval_ms.max(INTERVAL_MS_MIN);
        let watch = Watch::new(self.config.runtime_dir, interval_ms, Token::only(Kind::DirWatch));
        let mut told = Told {
            callback: self.callback,
            files: BTreeMap::new(),
            refused: BTreeMap::new(),
            interval_ms,
            auto_delete: self.config.auto_delete,
        };
        let thread = std::thread::Builder::new().name("handoff-watcher".into()).spawn(move || {
            if let Err(error) = told.run(reactor, watch, &stopped) {
                log::error!("the handoff watcher ended: {error}");
            }
        })?;
        Ok(HandoffWatcherHandle { stop, waker, thread: Some(thread) })
    }
}

impl HandoffWatcherHandle {
    /// Stops the watcher and waits until it has ended. A callback that runs is waited for.
    pub fn stop(mut self) {
        self.end();
    }

    fn end(&mut self) {
        self.stop.store(true, Ordering::Release);
        // Should that fail, the thread looks at the flag at its next turn in any case.
        let _ = self.waker.wake();
        if let Some(thread) = self.thread.take() {
            // A callback's panic was reported by its own thread.
            let _ = thread.join();
        }
    }
}

impl Drop for HandoffWatcherHandle {
    fn drop(&mut self) {
        self.end();
    }
}

/// What was told to the callback.
struct Told {
    callback: Callback,
    files: BTreeMap<Arc<str>, Entry>,
    /// Files that cannot be used, and why, as the log was told.
    refused: BTreeMap<Arc<str>, String>,
    interval_ms: u64,
    auto_delete: bool,
}

struct Entry {
    content: Arc<FileContent>,
    /// When the callback is to be called again; `None` once it has taken the handoff.
    again_at: Option<Mono>,
}

impl Told {
    fn run(&mut self, mut reactor: Reactor, mut watch: Watch, stop: &AtomicBool) -> io::Result<()> {
        let registry = reactor.registry()?;
        let mut now = crate::reactor::now();
        let mut changed = false;
        while !stop.load(Ordering::Acquire) {
            let scan = watch.turn(changed, now.mono, &registry);
            match scan.trouble {
                Some(Some(trouble)) => log::warn!("{}", trouble.text),
                Some(None) => log::info!("the runtime directory is watched again"),
                None => {}
            }
            for listing in scan.listings {
                self.take(listing, now.mono);
            }
            self.call(now.mono, &mut watch, stop);
            let again_at = self.files.values().filter_map(|entry| entry.again_at).min();
            now = reactor.wait(earliest(Some(watch.deadline()), again_at), watch.busy())?;
            changed = reactor.events().any(|(token, _)| token.kind() == Kind::DirWatch);
        }
        Ok(())
    }

    fn take(&mut self, listing: Listing, now: Mono) {
        let is_listed = |name: &Arc<str>| listing.files.binary_search_by(|file| file.name.cmp(name)).is_ok();
        match &listing.span {
            Span::Names(names) => {
                for name in names.iter().filter(|name| !is_listed(name)) {
                    self.files.remove(name);
                    self.refused.remove(name);
                }
            }
            Span::Range(from, to) => {
                let known = self.files.range::<Arc<str>, _>((from.as_ref(), to.as_ref()));
                let gone = known.map(|(name, _)| name.clone()).filter(|name| !is_listed(name));
                for name in gone.collect::<Vec<_>>() {
                    self.files.remove(&name);
                }
                let within = (from.as_ref(), to.as_ref());
                self.refused.retain(|name, _| !within.contains(name) || is_listed(name));
            }
        }
        for ListedFile { name, content, .. } in listing.files {
            if !matches!(*content, FileContent::Refused(_)) {
                self.refused.remove(&name);
            }
            match (&*content, self.files.get_mut(&name)) {
                (FileContent::Handoff(_), Some(entry)) if entry.content == content => entry.content = content,
                (FileContent::Handoff(_), _) => {
                    self.files.insert(name, Entry { content, again_at: Some(now) });
                }
                (FileContent::ModelOnly, _) => {
                    self.files.remove(&name);
                }
                // What it said before still counts.
                (FileContent::Refused(why), _) => {
                    if self.refused.get(&name) != Some(why) {
                        log::warn!("{name:?}: refused: {why}");
                        self.refused.insert(name, why.clone());
                    }
                    continue;
                }
            }
        }
    }

    fn call(&mut self, now: Mono, watch: &mut Watch, stop: &AtomicBool) {
        for (name, entry) in &mut self.files {
            if stop.load(Ordering::Acquire) {
                return;
            }
            if entry.again_at.is_none_or(|at| at > now) {
                continue;
            }
            let FileContent::Handoff(handoff) = &*entry.content else { continue };
            match (self.callback)(HandoffPayload::from(&**handoff)) {
                Ok(()) => {
                    entry.again_at = None;
                    if self.auto_delete {
                        watch.delete(name, &entry.content);
                    }
                }
                Err(error) => {
                    log::warn!("{name:?}: the callback failed, it is called again later: {error}");
                    entry.again_at = Some(now.plus_ms(self.interval_ms));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
    use std::time::Duration;

    const PATIENCE: Duration = Duration::from_secs(20);

    struct Fixture {
        directory: tempfile::TempDir,
        told: Receiver<HandoffPayload>,
        handle: HandoffWatcherHandle,
    }

    /// A watcher whose callback tells the test, and fails as long as `fails` says so.
    fn watch(auto_delete: bool, mut fails: impl FnMut(&HandoffPayload) -> bool + Send + 'static) -> Fixture {
        let directory = tempfile::tempdir().expect("a directory");
        let (tell, told) = channel();
        let callback = Box::new(move |payload: HandoffPayload| {
            let failed = fails(&payload);
            tell.send(payload)?;
            if failed { Err("not now".into()) } else { Ok(()) }
        });
        let runtime_dir = directory.path().join("engines");
        let config = HandoffWatcherConfig { runtime_dir, poll_interval_ms: 50, auto_delete };
        Fixture { directory, told, handle: HandoffWatcher::new(config, callback).spawn() }
    }

    impl Fixture {
        fn write(&self, name: &str, text: &str) {
            let directory = self.directory.path().join("engines");
            std::fs::create_dir_all(&directory).expect("a directory");
            let temporary = directory.join(format!(".{name}.tmp"));
            std::fs::write(&temporary, text).expect("written");
            std::fs::rename(temporary, directory.join(name)).expect("renamed");
        }

        fn next(&self) -> HandoffPayload {
            self.told.recv_timeout(PATIENCE).expect("a handoff")
        }
    }

    #[test]
    fn test_handoff_detection() {
        let watched = watch(false, |_| false);
        let text = r#"{"pool_id":"pool-0","replica_id":"r0","url":"http://localhost:8081","gpu_device":2,"slots":4,"ready":true}"#;
        watched.write("pool-0-r0.json", text);
        let payload = HandoffPayload {
            pool_id: "pool-0".into(),
            replica_id: "r0".into(),
            url: "http://localhost:8081".into(),
            gpu_device: 2,
            slots: 4,
            ready: true,
        };
        assert_eq!(watched.next(), payload);
        // The same again is not told again, a change is, and a broken file harms nobody.
        watched.write("broken.json", "[]");
        watched.write("pool-0-r0.json", text);
        watched.write("pool-0-r0.json", &text.replace("\"slots\":4", "\"slots\":8"));
        assert_eq!(watched.next(), HandoffPayload { slots: 8, ..payload });
        watched.handle.stop();
        assert_eq!(
            watched.told.recv_timeout(PATIENCE),
            Err(RecvTimeoutError::Disconnected),
            "stopped, and told no more"
        );
    }

    #[test]
    fn a_callback_that_fails_is_called_again_and_delays_nobody() {
        let mut left = 3;
        let watched = watch(true, move |payload| {
            let fails = payload.replica_id == "bad" && left > 0;
            left -= i32::from(fails);
            fails
        });
        watched.write("a.json", r#"{"replica_id":"bad","url":"http://127.0.0.1:1"}"#);
        assert_eq!(watched.next().replica_id, "bad");
        watched.write("b.json", r#"{"replica_id":"good","url":"http://127.0.0.1:2"}"#);
        let mut names: Vec<String> = (0..4).map(|_| watched.next().replica_id).collect();
        names.sort_unstable();
        assert_eq!(names, ["bad", "bad", "bad", "good"]);
        // Files are deleted once they are taken, and not before.
        let directory = watched.directory.path().join("engines");
        let begun = std::time::Instant::now();
        while std::fs::read_dir(&directory).expect("listed").count() > 0 {
            assert!(begun.elapsed() < PATIENCE, "the files stay");
            std::thread::yield_now();
        }
    }

    #[test]
    fn a_file_that_cannot_be_used_is_told_once_a_reason_until_it_is_gone() {
        let (callback, files, refused) = (Box::new(|_| Ok(())), BTreeMap::new(), BTreeMap::new());
        let mut told = Told { callback, files, refused, interval_ms: 50, auto_delete: false };
        let refused = |why: &str| ListedFile {
            name: "a.json".into(),
            modified: crate::time::Wall(1),
            content: Arc::new(FileContent::Refused(why.into())),
        };
        let mut told_after = |files: Vec<ListedFile>| {
            told.take(Listing::whole(files), Mono(1));
            told.refused.values().cloned().collect::<Vec<_>>()
        };
        assert_eq!(told_after(vec![refused("one")]), ["one"]);
        assert_eq!(told_after(vec![refused("two")]), ["two"]);
        let good = FileContent::ModelOnly;
        assert!(told_after(vec![ListedFile { content: Arc::new(good), ..refused("") }]).is_empty());
        assert_eq!(told_after(vec![refused("two")]), ["two"]);
        assert!(told_after(vec![]).is_empty());
    }
}
