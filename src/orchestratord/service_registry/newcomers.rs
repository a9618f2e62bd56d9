//! Nodes that have registered and not sent a heartbeat yet, so that they can make room for others.
//!
//! An agent beats as soon as its registration is confirmed, so a node is a newcomer for one round trip.
//! Who registers names and never beats is broken or hostile, and must not fill the table: the oldest
//! newcomer goes first, and no peer has more than [`NEWCOMERS_PER_PEER_MAX`] of them. An agent that had
//! to go is told so by the answer to its heartbeat, and registers again.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// Most newcomers of one peer: many nodes may stand behind one proxy, but they do not all register
/// within the same round trip.
pub const NEWCOMERS_PER_PEER_MAX: usize = 1024;

/// Names a newcomer; it grows with each.
pub(super) type Ticket = u64;

/// Who they are, by age and by where they came from.
#[derive(Debug, Default)]
pub(super) struct Newcomers {
    next: Ticket,
    by_age: BTreeMap<Ticket, (usize, Arc<str>)>,
    by_peer: BTreeMap<Arc<str>, BTreeSet<Ticket>>,
}

impl Newcomers {
    /// Adds the node at `index` of the registry.
    pub(super) fn add(&mut self, index: usize, peer: &str) -> Ticket {
        let ticket = self.next;
        self.next += 1;
        let peer = self.by_peer.get_key_value(peer).map_or_else(|| Arc::from(peer), |(peer, _)| peer.clone());
        self.by_age.insert(ticket, (index, peer.clone()));
        self.by_peer.entry(peer).or_default().insert(ticket);
        ticket
    }

    /// It has sent a heartbeat, or is gone.
    pub(super) fn remove(&mut self, ticket: Ticket) {
        let Some((_, peer)) = self.by_age.remove(&ticket) else { return };
        if let Some(tickets) = self.by_peer.get_mut(&peer) {
            tickets.remove(&ticket);
            if tickets.is_empty() {
                self.by_peer.remove(&peer);
            }
        }
    }

    /// The oldest of all.
    pub(super) fn oldest(&self) -> Option<usize> {
        self.by_age.values().next().map(|(index, _)| *index)
    }

    /// The oldest of a peer that has as many as it may.
    pub(super) fn oldest_of_full(&self, peer: &str) -> Option<usize> {
        let tickets = self.by_peer.get(peer).filter(|tickets| tickets.len() >= NEWCOMERS_PER_PEER_MAX)?;
        tickets.first().and_then(|ticket| self.by_age.get(ticket)).map(|(index, _)| *index)
    }

    /// How many there are. For invariants.
    pub(super) fn len(&self) -> usize {
        debug_assert_eq!(self.by_peer.values().map(BTreeSet::len).sum::<usize>(), self.by_age.len());
        self.by_age.len()
    }

    /// The node that holds a ticket. For invariants.
    pub(super) fn holder(&self, ticket: Ticket) -> Option<usize> {
        self.by_age.get(&ticket).map(|(index, _)| *index)
    }
}
