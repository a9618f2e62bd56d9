//! From edges to levels, and whose turn it is.
//!
//! epoll reports an edge once. Whoever stops reading before the socket is empty (a budget ran out, a
//! buffer is above its high-water mark) must remember that it is still readable: [`Latch`]. Sessions
//! that can make progress stand in the [`ReadyList`], each at most once. Most have little to say, and somebody
//! waits for it; these have their turn first, and at once. One that had more than [`SHARE_BYTES`] goes to
//! those that carry on, of which a turn serves only as many as move [`CARRIED_ON_BYTES`]: many fast peers together
//! make a turn little longer than one of them does, and starve neither the others nor each other.

use std::collections::VecDeque;

use super::Edge;
use super::token::{Token, TokenSet};

/// Bytes that a session may move when it became ready; with more it carries on behind the others. Tokens of a
/// stream and most requests and answers are smaller.
pub const SHARE_BYTES: usize = 32 * 1024;
/// Bytes that a session may move in one turn as it carries on.
pub const TURN_BUDGET_BYTES: usize = 256 * 1024;
/// With so many bytes moved, no other session carries on in this turn: less than a millisecond's work.
pub const CARRIED_ON_BYTES: usize = 512 * 1024;

/// What a socket is known to allow.
#[derive(Clone, Copy, Debug, Default)]
pub struct Latch {
    /// A read may yield something.
    pub readable: bool,
    /// A write may take something.
    pub writable: bool,
    /// The peer closed: a short read does not mean that the socket is empty.
    pub hangup: bool,
}

impl Latch {
    /// For a socket of which nothing is known: trying is cheaper than waiting for the first edge.
    pub const OPTIMISTIC: Latch = Latch { readable: true, writable: true, hangup: false };

    /// The kernel reported.
    pub fn on_edge(&mut self, edge: Edge) {
        self.readable |= edge.readable;
        self.writable |= edge.writable;
        self.hangup |= edge.hangup;
    }
}

/// Sessions that can make progress, in order, each once.
#[derive(Debug, Default)]
pub struct ReadyList {
    queue: VecDeque<Token>,
    /// Those that used up their share.
    carry_on: VecDeque<Token>,
    queued: TokenSet,
}

impl ReadyList {
    /// Puts a session at the end, unless it stands in the list.
    pub fn push(&mut self, token: Token) {
        if self.queued.insert(token) {
            self.queue.push_back(token);
        }
    }

    /// Puts a session that used up its share behind all others, unless it stands in the list.
    pub fn push_behind(&mut self, token: Token) {
        if self.queued.insert(token) {
            self.carry_on.push_back(token);
        }
    }

    /// Takes the first that became ready.
    pub fn pop(&mut self) -> Option<Token> {
        let token = self.queue.pop_front()?;
        self.queued.remove(&token);
        Some(token)
    }

    /// Takes the first that carries on.
    pub fn pop_behind(&mut self) -> Option<Token> {
        let token = self.carry_on.pop_front()?;
        self.queued.remove(&token);
        Some(token)
    }

    /// How many became ready: a turn takes as many as stood there when it began.
    #[must_use]
    pub fn len(&self) -> usize {
        self.queue.len()
    }

    /// How many carry on.
    #[must_use]
    pub fn behind(&self) -> usize {
        self.carry_on.len()
    }

    /// Whether nobody can make progress, so that the loop may block.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.queued.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::super::token::{Kind, Token};
    use super::*;

    #[test]
    fn a_session_stands_in_the_list_once_and_may_come_back() {
        let mut list = ReadyList::default();
        let (a, b) = (Token::only(Kind::Client), Token::only(Kind::Upstream));
        for token in [a, b, a, a] {
            list.push(token);
        }
        assert_eq!((list.pop(), list.len()), (Some(a), 1));
        list.push(a);
        assert_eq!((list.pop(), list.pop(), list.pop()), (Some(b), Some(a), None));
    }

    #[test]
    fn who_used_up_its_share_stands_behind_and_keeps_the_loop_awake() {
        let mut list = ReadyList::default();
        let (a, b) = (Token::only(Kind::Client), Token::only(Kind::Upstream));
        list.push_behind(a);
        list.push(b);
        list.push(a);
        assert_eq!((list.len(), list.behind(), list.pop(), list.pop()), (1, 1, Some(b), None));
        assert!(!list.is_empty());
        assert_eq!((list.pop_behind(), list.pop_behind(), list.is_empty()), (Some(a), None, true));
    }
}
