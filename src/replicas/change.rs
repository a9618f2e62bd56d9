//! What the registry says: states, changes of state, refusals, each with a line for people.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

use super::drains::DrainChange;
use crate::service::events::{Happening, Tell};
use crate::time::Wall;
use crate::wire::id::ReplicaKey;

/// Where a replica stands. Only [`State::Ready`] takes work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum State {
    /// Announced, but its handoff says that it is not to be used yet.
    Found,
    /// Asked, and not yet answering: it starts, or loads its model.
    Probing,
    /// Answers.
    Ready,
    /// Answered before and does not now.
    Suspect,
    /// Held out of use for a [`Cause`], whatever its probes say.
    Broken,
    /// Takes no new work; what runs may finish.
    Draining,
}

impl State {
    /// The state as the API spells it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            State::Found => "found",
            State::Probing => "probing",
            State::Ready => "ready",
            State::Suspect => "suspect",
            State::Broken => "broken",
            State::Draining => "draining",
        }
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Why a replica is held out of use. Several may hold one; it returns when the last has let go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Cause {
    /// Its process ended, or never was the one that its handoff means. It is not probed any more.
    Process,
    /// A GPU that it uses failed.
    Gpu,
    /// It stopped producing and did not answer a trial request.
    Hung,
    /// It has been starting for longer than any engine takes.
    Start,
}

/// What became of a file of the runtime directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileState {
    /// Its replica runs on it.
    Accepted,
    /// It describes a model without an engine.
    Skipped,
    /// It cannot be used, and never could.
    Refused,
    /// Another file names the same replica and wins.
    Shadowed,
    /// It cannot be used as it is now; what it said before still counts.
    KeepingLastGood,
}

impl FileState {
    /// The state as the API spells it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            FileState::Accepted => "accepted",
            FileState::Skipped => "skipped",
            FileState::Refused => "refused",
            FileState::Shadowed => "shadowed",
            FileState::KeepingLastGood => "keeping-last-good",
        }
    }
}

impl fmt::Display for FileState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// One file as the API shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileView<'a> {
    /// Its name within the directory.
    pub name: &'a str,
    /// What became of it.
    pub state: FileState,
    /// Why it is not accepted.
    pub error: Option<&'a str>,
    /// The replica that it names, or named when it was last good.
    pub replica: Option<ReplicaKey>,
    /// When it was last written.
    pub modified: Wall,
}

/// Something that changed; each is returned exactly once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// A replica is known that was not.
    Found {
        /// The replica.
        key: ReplicaKey,
        /// The file that announces it; `None` where its handoff was adopted.
        file: Option<Arc<str>>,
    },
    /// A replica's state.
    State {
        /// The replica.
        key: ReplicaKey,
        /// What it was.
        from: State,
        /// What it is.
        to: State,
        /// Why.
        reason: String,
    },
    /// Why a replica still is in its state; told when the reason changes.
    Reason {
        /// The replica.
        key: ReplicaKey,
        /// Its state.
        state: State,
        /// The new reason.
        reason: String,
    },
    /// Another engine stands behind the name: it starts from the beginning.
    Replaced {
        /// The replica.
        key: ReplicaKey,
        /// The file that says so, if one does.
        file: Option<Arc<str>>,
        /// The new engine's generation.
        generation: u64,
    },
    /// The same engine with other details (slots, models).
    Updated {
        /// The replica.
        key: ReplicaKey,
        /// The file that says so, if one does.
        file: Option<Arc<str>>,
    },
    /// A replica is no longer known.
    Gone {
        /// The replica.
        key: ReplicaKey,
        /// Why.
        reason: String,
    },
    /// Nobody can tell whether a replica's process lives: its probes decide alone.
    Unwatched {
        /// The replica.
        key: ReplicaKey,
        /// Why.
        reason: String,
    },
    /// A drain.
    Drain(DrainChange),
    /// Something about a replica that is worth a line.
    Note {
        /// The replica.
        key: ReplicaKey,
        /// What.
        text: String,
        /// Whether an operator should look at it.
        is_warning: bool,
    },
    /// A file's contents are in use.
    FileAccepted {
        /// The file.
        name: Arc<str>,
        /// The replica that it announces.
        key: ReplicaKey,
    },
    /// A file describes only a model.
    FileSkipped {
        /// The file.
        name: Arc<str>,
    },
    /// A file cannot be used.
    FileRefused {
        /// The file.
        name: Arc<str>,
        /// Why.
        reason: String,
        /// The replica that stays on what the file said before.
        keeps: Option<ReplicaKey>,
    },
    /// A file lost against another one that names the same replica.
    FileShadowed {
        /// The file.
        name: Arc<str>,
        /// Why the other one won, by name.
        reason: String,
    },
    /// The directory holds more than is taken from it.
    LimitReached {
        /// Which limit.
        reason: String,
    },
    /// The directory is within the limits again.
    LimitCleared,
}

impl Change {
    /// The replica of which a file now says something that it did not say before.
    #[must_use]
    pub fn announced(&self) -> Option<&ReplicaKey> {
        match self {
            Change::FileAccepted { key, .. } => Some(key),
            _ => None,
        }
    }

    /// The replica behind whose name an engine came, went or became another one.
    #[must_use]
    pub fn engine_changed(&self) -> Option<&ReplicaKey> {
        match self {
            Change::Found { key, .. }
            | Change::Replaced { key, .. }
            | Change::Updated { key, .. }
            | Change::Gone { key, .. } => Some(key),
            _ => None,
        }
    }

    fn in_words(&self) -> Happening {
        let text = self.to_string();
        let (kind, subject, state, is_warning) = match self {
            Change::Found { key, .. } => ("replica", key.to_string(), "found", false),
            Change::State { key, to, .. } => {
                let is_warning = matches!(to, State::Suspect | State::Broken);
                ("replica", key.to_string(), to.as_str(), is_warning)
            }
            Change::Reason { key, state, .. } => ("replica", key.to_string(), state.as_str(), false),
            Change::Replaced { key, .. } => ("replica", key.to_string(), "replaced", false),
            Change::Updated { key, .. } => ("replica", key.to_string(), "", false),
            Change::Note { key, is_warning, .. } => ("replica", key.to_string(), "", *is_warning),
            Change::Unwatched { key, .. } => ("replica", key.to_string(), "", true),
            Change::Gone { key, .. } => ("replica", key.to_string(), "gone", false),
            Change::FileAccepted { name, .. } => ("file", name.escape_debug().to_string(), "accepted", false),
            Change::FileSkipped { name } => ("file", name.escape_debug().to_string(), "skipped", false),
            Change::FileRefused { name, .. } => ("file", name.escape_debug().to_string(), "refused", true),
            Change::FileShadowed { name, .. } => ("file", name.escape_debug().to_string(), "shadowed", true),
            Change::LimitReached { .. } => ("daemon", "watch".to_string(), "", true),
            Change::LimitCleared => ("daemon", "watch".to_string(), "", false),
            Change::Drain(change) => return change.happening(),
        };
        Happening { kind, subject, state, text, is_warning }
    }
}

impl Tell for Change {
    fn happening(&self) -> Cow<'_, Happening> {
        Cow::Owned(self.in_words())
    }
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Change::Found { key, file } => write!(f, "{key}: found in {}", Source(file.as_deref())),
            Change::State { key, from, to, reason } => write!(f, "{key}: {from} -> {to}: {reason}"),
            Change::Reason { key, state, reason } => write!(f, "{key}: still {state}: {reason}"),
            Change::Replaced { key, file, generation } => {
                let source = Source(file.as_deref());
                write!(f, "{key}: {source} announces another engine, now generation {generation}")
            }
            Change::Updated { key, file } => {
                write!(f, "{key}: details changed in {}", Source(file.as_deref()))
            }
            Change::Note { key, text, .. } => write!(f, "{key}: {text}"),
            Change::Unwatched { key, reason } => {
                write!(f, "{key}: whether its process lives cannot be told, probes decide: {reason}")
            }
            Change::Gone { key, reason } => write!(f, "{key}: gone: {reason}"),
            Change::Drain(change) => change.fmt(f),
            Change::FileAccepted { name, key } => write!(f, "{name:?}: accepted for {key}"),
            Change::FileSkipped { name } => {
                write!(f, "{name:?}: skipped, it describes a model without an engine")
            }
            Change::FileRefused { name, reason, keeps: None } => write!(f, "{name:?}: refused: {reason}"),
            Change::FileRefused { name, reason, keeps: Some(key) } => {
                write!(f, "{name:?}: refused: {reason}; {key} stays on what it said before")
            }
            Change::FileShadowed { name, reason } => write!(f, "{name:?}: not used: {reason}"),
            Change::LimitReached { reason } => f.write_str(reason),
            Change::LimitCleared => f.write_str("the runtime directory is within its limits again"),
        }
    }
}

/// Where a handoff was found, for people.
struct Source<'a>(Option<&'a str>);

impl fmt::Display for Source<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(file) => write!(f, "{file:?}"),
            None => f.write_str("the accepted handoffs"),
        }
    }
}

/// Why a request gets no slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refused {
    /// No such replica.
    Unknown,
    /// It does not answer (yet).
    NotReady {
        /// Why, for people.
        reason: String,
    },
    /// It takes no new work.
    Draining,
    /// Its free slots do not suffice.
    Full {
        /// Slots that it has.
        slots: u32,
    },
    /// The caller means an engine that no longer stands behind the name.
    StaleGeneration {
        /// The generation that does, if any.
        current: Option<u64>,
    },
}

impl Refused {
    /// There is no such replica; `generation`: the engine that the caller means, where it knows, and which was
    /// there when it heard of it.
    #[must_use]
    pub fn absent(generation: Option<u64>) -> Refused {
        generation.map_or(Refused::Unknown, |_| Refused::StaleGeneration { current: None })
    }
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Refused::Unknown => f.write_str("no such replica"),
            Refused::NotReady { reason } => write!(f, "not ready: {reason}"),
            Refused::Draining => f.write_str("draining: it takes no new work"),
            Refused::Full { slots } => write!(f, "too few of its {slots} slots are free"),
            Refused::StaleGeneration { current: Some(current) } => {
                write!(f, "another engine stands behind this name: its generation is {current}")
            }
            Refused::StaleGeneration { current: None } => {
                f.write_str("no engine stands behind this name any more")
            }
        }
    }
}
