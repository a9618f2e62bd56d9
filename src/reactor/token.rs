//! Tokens that outlive nothing: `(kind, index, generation)` packed into the word that epoll carries.
//!
//! An event may still be in the batch when its session has been closed and its slot given to a new
//! one. The generation tells them apart: [`Table`] finds nothing for a token of a dead session, and
//! so the event dies there.

use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasherDefault, Hasher};

use slab::Slab;

/// What kind of source a token names. A closed set: each daemon's loop matches on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Kind {
    /// A listening socket.
    Listener,
    /// A client's connection.
    Client,
    /// A connection to an engine or a peer.
    Upstream,
    /// An exchange with an engine or a peer, which a connection serves for a while.
    Exchange,
    /// The watch on the runtime directory.
    DirWatch,
    /// A process whose end is awaited.
    Process,
    /// Helper threads that have results.
    Waker,
    /// SIGTERM and SIGINT.
    Stop,
    /// SIGHUP.
    Reload,
    /// The kernel's log.
    KernelLog,
    /// The watches on directories with certificates.
    Certificates,
    /// The watches on the directories in which tokens lie.
    Credentials,
    /// The watch on the directory in which provisioners listen.
    Provisioners,
}

const KINDS: [Kind; 13] = [
    Kind::Listener,
    Kind::Client,
    Kind::Upstream,
    Kind::Exchange,
    Kind::DirWatch,
    Kind::Process,
    Kind::Waker,
    Kind::Stop,
    Kind::Reload,
    Kind::KernelLog,
    Kind::Certificates,
    Kind::Credentials,
    Kind::Provisioners,
];

/// What somebody keeps of sessions, by their tokens. In no order.
pub type TokenMap<T> = HashMap<Token, T, BuildHasherDefault<NumberHasher>>;

/// Some sessions. In no order.
pub type TokenSet = HashSet<Token, BuildHasherDefault<NumberHasher>>;

/// For numbers that this process gave out itself: nobody can choose them so that they collide, and one
/// multiplication spreads them.
#[derive(Clone, Copy, Debug, Default)]
pub struct NumberHasher(u64);

impl Hasher for NumberHasher {
    fn write_u64(&mut self, number: u64) {
        // An odd number near 2^64 over the golden ratio: what numbers that follow each other become lies far apart.
        self.0 = (self.0 ^ number).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }

    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.write_u64(u64::from(*byte)));
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

const GENERATION_BITS: u32 = 24;

/// Names one source or session, for as long as it lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Token(u64);

impl Token {
    /// The token of a source of which there is only one.
    #[must_use]
    pub const fn only(kind: Kind) -> Token {
        Token::new(kind, 0, 0)
    }

    const fn new(kind: Kind, index: u32, generation: u32) -> Token {
        Token((kind as u64) << 56 | ((generation as u64) & ((1 << GENERATION_BITS) - 1)) << 32 | index as u64)
    }

    /// What it names.
    #[must_use]
    pub fn kind(self) -> Kind {
        KINDS[(self.0 >> 56) as usize % KINDS.len()]
    }

    fn index(self) -> usize {
        (self.0 & 0xffff_ffff) as usize
    }
}

impl From<Token> for mio::Token {
    fn from(token: Token) -> mio::Token {
        mio::Token(token.0 as usize)
    }
}

impl From<mio::Token> for Token {
    fn from(token: mio::Token) -> Token {
        Token(token.0 as u64)
    }
}

/// Sessions of one kind by token.
#[derive(Debug)]
pub struct Table<T> {
    kind: Kind,
    slots: Slab<(Token, T)>,
    generation: u32,
}

impl<T> Table<T> {
    /// An empty table.
    #[must_use]
    pub fn new(kind: Kind) -> Table<T> {
        Table { kind, slots: Slab::new(), generation: 0 }
    }

    /// Adds what `make` builds of its own token, if it can be built.
    ///
    /// # Errors
    /// What `make` returns.
    pub fn insert_with<E>(&mut self, make: impl FnOnce(Token) -> Result<T, E>) -> Result<Token, E> {
        self.generation = self.generation.wrapping_add(1);
        let entry = self.slots.vacant_entry();
        let token = Token::new(self.kind, entry.key() as u32, self.generation);
        entry.insert((token, make(token)?));
        Ok(token)
    }

    /// Adds a value that does not need its own token.
    pub fn insert(&mut self, value: T) -> Token {
        let Ok(token) = self.insert_with(|_| Ok::<T, std::convert::Infallible>(value));
        token
    }

    /// The session, if it still lives.
    #[must_use]
    pub fn get(&self, token: Token) -> Option<&T> {
        self.slots.get(token.index()).filter(|(own, _)| *own == token).map(|(_, value)| value)
    }

    /// The session, if it still lives.
    pub fn get_mut(&mut self, token: Token) -> Option<&mut T> {
        self.slots.get_mut(token.index()).filter(|(own, _)| *own == token).map(|(_, value)| value)
    }

    /// Takes the session out, if it still lives.
    pub fn remove(&mut self, token: Token) -> Option<T> {
        self.get(token)?;
        self.slots.try_remove(token.index()).map(|(_, value)| value)
    }

    /// All sessions.
    pub fn iter(&self) -> impl Iterator<Item = (Token, &T)> {
        self.slots.iter().map(|(_, (token, value))| (*token, value))
    }

    /// How many sessions live.
    #[must_use]
    pub fn len(&self) -> usize {
        self.slots.len()
    }

    /// Whether none lives.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_of_a_dead_session_finds_nothing() {
        let mut table = Table::new(Kind::Client);
        let first = table.insert("first");
        assert_eq!(table.remove(first), Some("first"));
        let second = table.insert("second");
        assert_eq!(first.index(), second.index(), "the slot is used again");
        assert_eq!(table.get(first), None);
        assert_eq!(table.remove(first), None);
        assert_eq!((table.get(second), second.kind()), (Some(&"second"), Kind::Client));
    }

    #[test]
    fn every_kind_survives_the_packing() {
        for kind in KINDS {
            let token = Token::new(kind, u32::MAX, u32::MAX);
            assert_eq!((Token::from(mio::Token::from(token)), token.kind()), (token, kind));
        }
    }
}
