//! When the registry is saved, and what is told about it.
//!
//! ```text
//!   revision moves ──▶ Effect::Save, a piece a turn ──▶ (a helper writes) ──▶ Input::Saved ──▶ the next
//! ```
//!
//! One save is under way at a time, at most one begins in [`SAVE_INTERVAL_MS`], and what changes
//! meanwhile goes into the next. A save that failed is tried again with growing pauses, and told once;
//! nothing else waits for any of it. Without changes a save every [`REFRESH_MS`] keeps the file young,
//! for its age decides what is made of it. At shutdown there is a last one, which may take
//! [`LAST_SAVE_MS`].

use crate::orchestratord::saved::{Piece, Saved};
use crate::orchestratord::service_registry::Change;
use crate::service::events::Happening;
use crate::time::{Mono, Now, earliest};
use crate::wire::id::NodeId;

use super::{Core, Effect};

/// Between the beginnings of two saves, in milliseconds: what a crash may cost is a second of changes.
pub(super) const SAVE_INTERVAL_MS: u64 = 1_000;
/// So many nodes make that a second longer: the file has some 2 KB of each, and in a large fleet something
/// changes all the time.
pub(super) const NODES_PER_SECOND: usize = 1_000;
/// How old the file may become without changes, in milliseconds: a small part of
/// [`TRUST_MS`](crate::orchestratord::service_registry::TRUST_MS), and seldom enough not to be noticed.
pub(super) const REFRESH_MS: u64 = 600_000;
/// First pause after a save that failed, in milliseconds.
pub(super) const RETRY_MS_MIN: u64 = 1_000;
/// Longest pause after saves that failed, in milliseconds.
pub(super) const RETRY_MS_MAX: u64 = 60_000;
/// How long the end of the process waits for the last save, in milliseconds: a disk that hangs must
/// not keep a service manager waiting.
pub(super) const LAST_SAVE_MS: u64 = 2_000;

/// Nodes in one piece: some tenths of a millisecond of a turn where each has several replicas.
pub(super) const PIECE_NODES: usize = 128;

/// When to save.
#[derive(Debug)]
pub(super) struct Keeper {
    /// The revision that was last saved, and the one that is being saved.
    saved: u64,
    under_way: Option<u64>,
    /// Nothing begins earlier.
    not_before: Option<Mono>,
    /// The file is to be written again by then.
    refresh_at: Option<Mono>,
    pause_ms: u64,
    /// Since when pieces are handed out, and the last node that was in one.
    pieces: Option<(Mono, NodeId)>,
    /// At shutdown: when the process ends at the latest, and whether the last save has begun.
    last: Option<(Mono, bool)>,
}

impl Keeper {
    /// With `revision` saved already: 0 for a registry that has nothing.
    pub(super) fn new(revision: u64, now: Mono) -> Keeper {
        let refresh_at = (revision > 0).then(|| now.plus_ms(REFRESH_MS));
        Keeper {
            saved: revision,
            under_way: None,
            not_before: None,
            refresh_at,
            pause_ms: RETRY_MS_MIN,
            pieces: None,
            last: None,
        }
    }

    /// Whether `revision` is to be saved now. If so, [`Keeper::ended`] must be told how that went.
    fn begins(&mut self, revision: u64, now: Mono) -> bool {
        if self.under_way.is_some() {
            return false;
        }
        let is_last = matches!(self.last, Some((_, false)));
        let is_due = revision != self.saved || self.refresh_at.is_some_and(|at| at <= now);
        if !is_last && (!is_due || self.not_before.is_some_and(|at| at > now)) {
            return false;
        }
        if let Some((_, has_begun)) = &mut self.last {
            *has_begun = true;
        }
        self.under_way = Some(revision);
        self.not_before = Some(now.plus_ms(SAVE_INTERVAL_MS));
        true
    }

    /// A save ended. True if it is the first one to fail in a row.
    fn ended(&mut self, succeeded: bool, now: Mono) -> bool {
        self.pieces = None;
        let Some(revision) = self.under_way.take() else { return false };
        if succeeded {
            self.saved = revision;
            self.refresh_at = Some(now.plus_ms(REFRESH_MS));
            self.pause_ms = RETRY_MS_MIN;
            return false;
        }
        let is_first = self.pause_ms == RETRY_MS_MIN;
        self.not_before = Some(now.plus_ms(self.pause_ms));
        self.pause_ms = (self.pause_ms * 2).min(RETRY_MS_MAX);
        is_first
    }

    /// Whether the process may end. The first question orders the last save.
    fn may_end(&mut self, revision: u64, now: Mono) -> bool {
        if revision == 0 {
            return true;
        }
        let (by, has_begun) = *self.last.get_or_insert((now.plus_ms(LAST_SAVE_MS), false));
        now >= by || (has_begun && self.under_way.is_none())
    }

    /// When [`Keeper::begins`] or [`Keeper::may_end`] is to be asked again.
    fn deadline(&self, revision: u64) -> Option<Mono> {
        let end = self.last.map(|(by, _)| by);
        if let Some((since, _)) = &self.pieces {
            return Some(*since);
        }
        if self.under_way.is_some() {
            return end;
        }
        let due = if revision == self.saved { self.refresh_at } else { self.not_before };
        earliest(due.max(self.not_before.filter(|_| due.is_some())), end)
    }
}

impl Core {
    /// When the registry is to be saved next, or the last save is given up.
    pub(super) fn keeping_deadline(&self) -> Option<Mono> {
        self.keeper.deadline(self.registry.revision()).filter(|_| !self.over)
    }

    /// Whether the end has come as far as the file is concerned.
    pub(super) fn has_kept(&mut self, now: Now) -> bool {
        self.keeper.may_end(self.registry.revision(), now.mono)
    }

    /// Whether the process only waits for its last save.
    pub(super) fn is_keeping_last(&self) -> bool {
        self.keeper.last.is_some()
    }

    pub(super) fn restore(&mut self, saved: &Saved, now: Now, changes: &mut Vec<Change>) {
        self.registry.restore(saved, now, changes);
        self.keeper = Keeper::new(self.registry.revision(), now.mono);
    }

    /// Begins a save if one is due, and goes on with the one under way at each tick.
    pub(super) fn keep(&mut self, tick: bool, now: Now, effects: &mut Vec<Effect>) {
        let begins = !self.over && self.keeper.begins(self.registry.revision(), now.mono);
        let last = match &self.keeper.pieces {
            None if begins => None,
            Some((_, last)) if tick => Some(last),
            _ => return,
        };
        if begins {
            let more_ms = (self.registry.nodes_len() / NODES_PER_SECOND) as u64 * 1_000;
            self.keeper.not_before = Some(now.mono.plus_ms(SAVE_INTERVAL_MS + more_ms));
        }
        let (nodes, ends) = self.registry.saved_after(last, PIECE_NODES);
        let last = nodes.last().map(|saved| saved.node.id.clone()).filter(|_| !ends);
        self.keeper.pieces = last.map(|last| (now.mono, last));
        effects.push(Effect::Save(Piece { begins: begins.then_some(now.wall), nodes, ends }));
    }

    pub(super) fn saved(&mut self, result: Result<(), String>, now: Now, effects: &mut Vec<Effect>) {
        let is_news = self.keeper.ended(result.is_ok(), now.mono);
        match result {
            Ok(()) => self.counts.saves += 1,
            Err(why) => {
                self.counts.saves_failed += 1;
                if is_news {
                    let text = format!(
                        "the registry cannot be saved: {why}; after a restart, nodes would get work only once they have been heard; check ORCHESTRATORD_STATE_DIR"
                    );
                    self.state_trouble(text, now, effects);
                }
            }
        }
    }

    pub(super) fn state_trouble(&mut self, text: String, now: Now, effects: &mut Vec<Effect>) {
        let happening =
            Happening { kind: "daemon", subject: "state".into(), state: "", text, is_warning: true };
        self.happened(happening, now, effects);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Mono = Mono(1);

    #[test]
    fn one_save_at_a_time_and_one_an_interval() {
        let mut keeper = Keeper::new(0, NOW);
        assert!(!keeper.begins(0, NOW) && keeper.deadline(0).is_none(), "nothing was ever worth it");
        assert!(keeper.begins(1, NOW), "the first change is saved at once");
        assert!(!keeper.begins(2, NOW) && keeper.deadline(2).is_none(), "its end brings the next");
        assert!(!keeper.ended(true, NOW));
        assert!(!keeper.begins(2, NOW), "not twice in one interval");
        let next = keeper.deadline(2).expect("the interval ends");
        assert_eq!(next.ms_since(NOW), SAVE_INTERVAL_MS);
        assert!(keeper.begins(2, next) && !keeper.ended(true, next));
        let refresh = keeper.deadline(2).expect("the file must not grow old");
        assert_eq!(refresh.ms_since(next), REFRESH_MS);
        assert!(!keeper.begins(2, Mono(refresh.0 - 1)) && keeper.begins(2, refresh));
    }

    #[test]
    fn a_failed_save_is_told_once_and_tried_again_later_and_later() {
        let mut keeper = Keeper::new(0, NOW);
        let (mut now, mut pauses) = (NOW, Vec::new());
        for attempt in 0..9 {
            assert!(keeper.begins(1, now));
            assert_eq!(keeper.ended(false, now), attempt == 0);
            let next = keeper.deadline(1).expect("tried again");
            assert!(!keeper.begins(2, Mono(next.0 - 1)), "a change does not bring it forward");
            pauses.push(next.ms_since(now) / 1000);
            now = next;
        }
        assert_eq!(pauses, [1, 2, 4, 8, 16, 32, 60, 60, 60]);
        assert!(keeper.begins(2, now) && !keeper.ended(true, now));
        let next = now.plus_ms(SAVE_INTERVAL_MS);
        assert!(keeper.begins(3, next) && keeper.ended(false, next), "a new trouble is news again");
    }

    #[test]
    fn the_end_waits_for_one_last_save_but_not_for_ever() {
        assert!(Keeper::new(0, NOW).may_end(0, NOW), "nothing was ever worth it");
        let mut keeper = Keeper::new(3, NOW);
        assert!(!keeper.may_end(3, NOW) && keeper.begins(3, NOW) && !keeper.may_end(3, NOW));
        keeper.ended(false, NOW);
        assert!(keeper.may_end(3, NOW), "a last save that failed is not tried again");

        // One that is under way does not know what happened since it began.
        let mut keeper = Keeper::new(3, NOW);
        assert!(keeper.begins(4, NOW) && !keeper.may_end(5, NOW) && !keeper.begins(5, NOW));
        keeper.ended(true, NOW);
        assert!(!keeper.may_end(5, NOW) && keeper.begins(5, NOW));
        let by = keeper.deadline(5).expect("the disk may hang");
        assert_eq!(by.ms_since(NOW), LAST_SAVE_MS);
        assert!(keeper.may_end(5, by));
    }
}
