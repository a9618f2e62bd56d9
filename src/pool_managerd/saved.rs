//! What the node agent remembers over a restart: handoffs that stand without a file, drains that
//! operators asked for, callbacks that were registered.
//!
//! ```text
//!   a handoff was adopted ──▶ Effect::Save(text) ──▶ Input::Saved ──▶ its file may be deleted
//! ```
//!
//! One save is under way at a time, and what changes meanwhile goes into the next. A save that failed is
//! tried again with growing pauses; until one succeeds, no file is deleted.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::time::Mono;
use crate::wire::drain::StoredDrain;
use crate::wire::handoff::{Handoff, HandoffFile, parse};

use super::callbacks::StoredCallback;

/// Name of the file in the state directory.
pub const FILE_NAME: &str = "agent.json";
/// The shape that this version writes.
const VERSION: u32 = 1;
/// First pause after a save that failed, in milliseconds.
pub const RETRY_MS_MIN: u64 = 1_000;
/// Longest pause after saves that failed, in milliseconds.
pub const RETRY_MS_MAX: u64 = 60_000;

/// The file's contents.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Saved {
    version: u32,
    /// The boot in which it was written: engines do not outlive it.
    #[serde(default)]
    boot_id: Option<String>,
    #[serde(default)]
    handoffs: Vec<Value>,
    /// Drains that operators asked for.
    #[serde(default)]
    pub drains: Vec<StoredDrain>,
    /// Callbacks that were registered.
    #[serde(default)]
    pub callbacks: Vec<StoredCallback>,
}

impl Saved {
    /// What is to be remembered.
    #[must_use]
    pub fn new(
        boot_id: Option<String>,
        handoffs: &[Arc<Handoff>],
        drains: Vec<StoredDrain>,
        callbacks: Vec<StoredCallback>,
    ) -> Saved {
        let handoffs = handoffs.iter().map(|handoff| handoff.to_value()).collect();
        Saved { version: VERSION, boot_id, handoffs, drains, callbacks }
    }

    /// The file's text.
    #[must_use]
    pub fn text(&self) -> String {
        let mut text = serde_json::to_string_pretty(self).unwrap_or_default();
        text.push('\n');
        text
    }

    /// Reads the file's bytes.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn read(bytes: &[u8]) -> Result<Saved, String> {
        let saved: Saved = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
        if saved.version != VERSION {
            return Err(format!("it has version {}, and this program reads {VERSION}", saved.version));
        }
        Ok(saved)
    }

    /// The handoffs, as far as they can still hold in the boot `boot_id`, and how many cannot.
    #[must_use]
    pub fn handoffs(&self, boot_id: Option<&str>) -> (Vec<Arc<Handoff>>, usize) {
        if self.boot_id.as_deref() != boot_id {
            return (Vec::new(), self.handoffs.len());
        }
        let read = |value: &Value| match parse(value.to_string().as_bytes()) {
            Ok(HandoffFile::Engine(handoff)) => Some(Arc::from(handoff)),
            Ok(HandoffFile::ModelOnly) | Err(_) => None,
        };
        let handoffs: Vec<Arc<Handoff>> = self.handoffs.iter().filter_map(read).collect();
        let lost = self.handoffs.len() - handoffs.len();
        (handoffs, lost)
    }
}

/// When to save.
#[derive(Debug)]
pub struct Keeper {
    /// The revision that was last saved, and the one that is being saved.
    saved: u64,
    under_way: Option<u64>,
    not_before: Option<Mono>,
    pause_ms: u64,
}

impl Keeper {
    /// With `revision` saved already.
    #[must_use]
    pub fn new(revision: u64) -> Keeper {
        Keeper { saved: revision, under_way: None, not_before: None, pause_ms: RETRY_MS_MIN }
    }

    /// Whether `revision` is to be saved now. If so, [`Keeper::ended`] must be told how that went.
    pub fn begins(&mut self, revision: u64, now: Mono) -> bool {
        if self.under_way.is_some() || revision == self.saved || self.not_before.is_some_and(|at| at > now) {
            return false;
        }
        self.under_way = Some(revision);
        self.not_before = None;
        true
    }

    /// A save ended. True if it is the first one to fail in a row.
    pub fn ended(&mut self, succeeded: bool, now: Mono) -> bool {
        let Some(revision) = self.under_way.take() else { return false };
        if succeeded {
            self.saved = revision;
            self.pause_ms = RETRY_MS_MIN;
            return false;
        }
        let is_first = self.pause_ms == RETRY_MS_MIN;
        self.not_before = Some(now.plus_ms(self.pause_ms));
        self.pause_ms = (self.pause_ms * 2).min(RETRY_MS_MAX);
        is_first
    }

    /// Whether `revision` is on the disk.
    #[must_use]
    pub fn has(&self, revision: u64) -> bool {
        self.saved == revision
    }

    /// When a failed save is to be tried again.
    #[must_use]
    pub fn deadline(&self) -> Option<Mono> {
        self.not_before
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn handoff(text: &str) -> Arc<Handoff> {
        match parse(text.as_bytes()) {
            Ok(HandoffFile::Engine(handoff)) => Arc::from(handoff),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_was_saved_is_restored_in_the_same_boot_only() {
        let one = handoff(r#"{"url":"http://127.0.0.1:1","slots":3,"pid":7,"pid_start":9,"generation":4}"#);
        let text = Saved::new(Some("boot".into()), std::slice::from_ref(&one), Vec::new(), Vec::new()).text();
        let saved = Saved::read(text.as_bytes()).expect("readable");
        assert_eq!(saved.handoffs(Some("boot")), (vec![one], 0));
        assert_eq!(saved.handoffs(Some("next")), (vec![], 1));
        let other = text.replace("\"version\": 1", "\"version\": 2");
        assert!(Saved::read(other.as_bytes()).expect_err("newer").contains("version 2"));
        assert!(Saved::read(&text.as_bytes()[..text.len() / 2]).is_err());
    }

    #[test]
    fn one_save_at_a_time_and_a_failed_one_again_later() {
        let mut keeper = Keeper::new(0);
        let now = Mono(1);
        assert!(!keeper.begins(0, now), "nothing new");
        assert!(keeper.begins(1, now));
        assert!(!keeper.begins(2, now), "one at a time");
        assert!(keeper.ended(false, now), "the first failure is worth a word");
        assert!(!keeper.begins(2, now) && !keeper.has(1));
        let later = keeper.deadline().expect("tried again");
        assert_eq!(later.ms_since(now), RETRY_MS_MIN);
        assert!(keeper.begins(2, later));
        assert!(!keeper.ended(false, later));
        let later = keeper.deadline().expect("tried again");
        assert!(keeper.begins(2, later) && !keeper.ended(true, later));
        assert!(keeper.has(2) && keeper.deadline().is_none() && !keeper.begins(2, later));
    }
}
