//! From edges to levels, and whose turn it is.
//!
//! epoll reports an edge once. Whoever stops reading before the socket is empty (a budget ran out, a
//! buffer is above its high-water mark) must remember that it is still readable: [`Latch`]. Sessions
//! that can make progress stand in the [`ReadyList`], each at most once; one that used up its budget
//! goes to the back, so that a fast peer cannot starve the others.

use std::collections::{BTreeSet, VecDeque};

use super::Edge;
use super::token::Token;

/// Bytes that one session may move in one turn.
pub const TURN_BUDGET_BYTES: usize = 256 * 1024;

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
    queued: BTreeSet<Token>,
}

impl ReadyList {
    /// Puts a session at the end, unless it stands in the list.
    pub fn push(&mut self, token: Token) {
        if self.queued.insert(token) {
            self.queue.push_back(token);
        }
    }

    /// Takes the first.
    pub fn pop(&mut self) -> Option<Token> {
        let token = self.queue.pop_front()?;
        self.queued.remove(&token);
        Some(token)
    }

    /// How many stand in the list: a turn takes as many as stood there when it began.
    #[must_use]
    pub fn len(&self) -> usize {
        self.queue.len()
    }

    /// Whether nobody can make progress, so that the loop may block.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.queue.is_empty()
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
}
