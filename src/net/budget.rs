//! The memory that request bodies may take, all together.
//!
//! Whoever has a body in memory has a [`BodyHold`] for it: first the client's session, while it arrives,
//! then whoever takes it over with [`super::Net::take_body`], as long as the body may still be needed,
//! in a queue or on its way to an engine. A hold that is dropped gives its bytes back.
//!
//! A few large bodies must not keep out the many small ones, heartbeats of nodes among them: what grows
//! beyond [`SMALL_BODY_BYTES`] may take [`large_share`] of the budget, and the rest is left to what is
//! smaller.
//!
//! Parts of answers that somebody keeps for a client who has not come for them yet count too, and so do
//! large answers that are read as a whole.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Bodies up to this size count as small: chats of a few pages, heartbeats of nodes with many engines.
pub const SMALL_BODY_BYTES: usize = 64 * 1024;

/// What of a budget large bodies may take: three quarters.
#[must_use]
pub fn large_share(budget_bytes: usize) -> usize {
    budget_bytes / 4 * 3
}

/// What of a budget may be taken when something else than bodies asks for more, which may stay for minutes: half, so
/// that bodies still find room.
#[must_use]
fn kept_share(budget_bytes: usize) -> usize {
    budget_bytes / 2
}

/// All bodies that are held.
#[derive(Debug)]
pub(super) struct BodyBudget {
    held: Arc<AtomicUsize>,
    bytes_max: usize,
    refused: u64,
}

impl BodyBudget {
    pub(super) fn new(bytes_max: usize) -> BodyBudget {
        BodyBudget { held: Arc::default(), bytes_max, refused: 0 }
    }

    /// Bytes of all holds.
    pub(super) fn held_bytes(&self) -> usize {
        self.held.load(Ordering::Relaxed)
    }

    /// Bodies that found no room.
    pub(super) fn refused(&self) -> u64 {
        self.refused
    }

    pub(super) fn hold(&self) -> BodyHold {
        BodyHold { held: self.held.clone(), bytes: 0 }
    }

    /// Whether a body of `length` bytes that is to come would find room at this moment.
    pub(super) fn admits(&mut self, length: usize) -> bool {
        let share = if length > SMALL_BODY_BYTES { large_share(self.bytes_max) } else { self.bytes_max };
        let fits = self.held_bytes().saturating_add(length) <= share;
        self.refused += u64::from(!fits);
        fits
    }

    /// Lets a hold of something else than a body grow to `bytes`. False if there is no room for them; then it stays as
    /// it was.
    pub(super) fn keep(&mut self, hold: &mut BodyHold, bytes: usize) -> bool {
        let more = bytes.saturating_sub(hold.bytes);
        let fits = more == 0 || self.held_bytes().saturating_add(more) <= kept_share(self.bytes_max);
        if fits {
            self.held.fetch_add(more, Ordering::Relaxed);
            hold.bytes += more;
        }
        fits
    }

    /// Lets a hold grow to `bytes`. False if there is no room for them; then it stays as it was.
    pub(super) fn grow(&mut self, hold: &mut BodyHold, bytes: usize) -> bool {
        let more = bytes.saturating_sub(hold.bytes);
        if more == 0 {
            return true;
        }
        let share = if bytes > SMALL_BODY_BYTES { large_share(self.bytes_max) } else { self.bytes_max };
        let fits = self.held_bytes().saturating_add(more) <= share;
        if fits {
            self.held.fetch_add(more, Ordering::Relaxed);
            hold.bytes = bytes;
        } else {
            self.refused += 1;
        }
        fits
    }
}

/// Bytes of the budget, as long as it lives.
#[derive(Debug)]
pub struct BodyHold {
    held: Arc<AtomicUsize>,
    bytes: usize,
}

impl Drop for BodyHold {
    fn drop(&mut self) {
        self.held.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_dropped_is_given_back() {
        let mut budget = BodyBudget::new(1 << 20);
        let (mut one, mut two) = (budget.hold(), budget.hold());
        assert!(budget.grow(&mut one, 500_000) && budget.grow(&mut one, 700_000));
        assert!(!budget.grow(&mut two, 200_000), "beyond the share of large bodies");
        assert!(budget.grow(&mut two, SMALL_BODY_BYTES), "room is kept for small ones");
        assert_eq!((budget.held_bytes(), budget.refused()), (700_000 + SMALL_BODY_BYTES, 1));
        drop(one);
        assert!(budget.grow(&mut two, 200_000));
        drop(two);
        assert_eq!(budget.held_bytes(), 0);
    }

    #[test]
    fn what_is_kept_leaves_half_to_bodies() {
        let mut budget = BodyBudget::new(1 << 20);
        let (mut kept, mut body) = (budget.hold(), budget.hold());
        assert!(budget.keep(&mut kept, 500_000) && !budget.keep(&mut kept, 600_000));
        assert_eq!((budget.held_bytes(), budget.refused()), (500_000, 0));
        assert!(budget.grow(&mut body, 200_000));
        assert!(budget.keep(&mut kept, 400_000), "what it has already it may keep");
        assert!(!budget.keep(&mut kept, 500_001));
        drop(kept);
        assert_eq!(budget.held_bytes(), 200_000);
    }

    #[test]
    fn small_bodies_have_a_limit_too() {
        let mut budget = BodyBudget::new(1 << 20);
        let mut holds: Vec<BodyHold> = Vec::new();
        while budget.admits(SMALL_BODY_BYTES) {
            let mut hold = budget.hold();
            assert!(budget.grow(&mut hold, SMALL_BODY_BYTES));
            holds.push(hold);
        }
        assert_eq!(holds.len(), 16);
    }
}
