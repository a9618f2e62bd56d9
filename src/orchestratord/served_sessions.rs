//! Where sessions were served last. Pure.
//!
//! A client that names its session is sent back to the replica that has the conversation in its cache.
//! The table is a help and no promise: it forgets the session that was idle for longest when it is full,
//! one that was idle for [`IDLE_MS`], and one whose replica is gone. A replica is known by its handle,
//! which a new engine process under the old name does not inherit: its cache is empty.
//!
//! This is what placement goes by. What clients are shown of their sessions is kept in
//! [`sessions`](super::sessions).

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::time::Mono;

use super::replica_table::ReplicaRef;

/// Most sessions: some 250 bytes each, so 4 MB. Beyond that many conversations no engine's cache still
/// holds the oldest.
pub const SESSIONS_MAX: usize = 16_384;
/// A session that was idle for this long is forgotten: engines seldom keep a cache for longer.
pub const IDLE_MS: u64 = 600_000;
/// Longest key in bytes; identifiers of conversations are much shorter.
pub const KEY_BYTES_MAX: usize = 256;

/// One session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ServedSession {
    /// Where its last request went.
    pub replica: ReplicaRef,
    /// When that was.
    pub last_used: Mono,
    /// Its requests so far.
    pub requests: u64,
    /// Of these, sent to `replica` since it was elsewhere: if there is one, its cache may be warm.
    pub requests_there: u64,
    /// Which use of all sessions the last one was.
    turn: u64,
}

impl ServedSession {
    /// Milliseconds until it is forgotten if it is not used.
    #[must_use]
    pub fn ttl_ms(&self, now: Mono) -> u64 {
        IDLE_MS.saturating_sub(now.ms_since(self.last_used))
    }
}

/// The table. See the introduction of this file.
#[derive(Debug)]
pub struct ServedSessions {
    capacity: usize,
    by_key: BTreeMap<Arc<str>, ServedSession>,
    /// The least recently used first.
    by_turn: BTreeMap<u64, Arc<str>>,
    turn: u64,
}

impl Default for ServedSessions {
    fn default() -> Self {
        ServedSessions::new(SESSIONS_MAX)
    }
}

impl ServedSessions {
    /// An empty table for at most `capacity` sessions.
    #[must_use]
    pub fn new(capacity: usize) -> ServedSessions {
        ServedSessions { capacity, by_key: BTreeMap::new(), by_turn: BTreeMap::new(), turn: 0 }
    }

    /// A session that was used lately.
    #[must_use]
    pub fn get(&self, key: &str, now: Mono) -> Option<&ServedSession> {
        self.by_key.get(key).filter(|session| session.ttl_ms(now) > 0)
    }

    /// A request of a session goes to `replica`.
    pub fn used(&mut self, key: &Arc<str>, replica: ReplicaRef, now: Mono) {
        self.expire(now);
        let old = self.forget(key);
        if old.is_none() && self.by_key.len() >= self.capacity {
            self.forget_oldest();
        }
        if self.capacity == 0 {
            return;
        }
        self.turn += 1;
        let (requests, there) = old.map_or((0, 0), |old| {
            (old.requests, if old.replica == replica { old.requests_there } else { 0 })
        });
        let session = ServedSession {
            replica,
            last_used: now,
            requests: requests + 1,
            requests_there: there + 1,
            turn: self.turn,
        };
        self.by_turn.insert(self.turn, key.clone());
        self.by_key.insert(key.clone(), session);
    }

    /// Forgets a session, and returns it.
    pub fn forget(&mut self, key: &str) -> Option<ServedSession> {
        let session = self.by_key.remove(key)?;
        self.by_turn.remove(&session.turn);
        Some(session)
    }

    /// How many are known, idle ones included.
    #[must_use]
    pub fn len(&self) -> usize {
        self.by_key.len()
    }

    /// Whether none is known.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.by_key.is_empty()
    }

    /// Panics where the table contradicts itself. For tests and simulations; linear.
    pub fn check_invariants(&self) {
        assert!(self.by_key.len() <= self.capacity, "more sessions than may be");
        assert_eq!(self.by_key.len(), self.by_turn.len(), "a stray turn");
        for (turn, key) in &self.by_turn {
            assert_eq!(self.by_key[key].turn, *turn, "under another turn");
        }
    }

    /// Forgets who was idle for too long. Each is looked at once in its life.
    fn expire(&mut self, now: Mono) {
        while let Some((_, key)) = self.by_turn.first_key_value()
            && self.get(key, now).is_none()
        {
            self.forget_oldest();
        }
    }

    fn forget_oldest(&mut self) {
        if let Some((_, key)) = self.by_turn.pop_first() {
            self.by_key.remove(&key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> Mono {
        Mono(0).plus_ms(ms)
    }

    fn key(n: u64) -> Arc<str> {
        format!("s{n}").into()
    }

    #[test]
    fn a_session_counts_its_requests_and_where_they_went() {
        let (a, b) = (ReplicaRef::for_tests(1, 1), ReplicaRef::for_tests(1, 2));
        let mut sessions = ServedSessions::default();
        for (replica, there) in [(a, 1), (a, 2), (b, 1), (a, 1)] {
            sessions.used(&key(0), replica, at(5));
            let session = sessions.get("s0", at(6)).expect("just used");
            assert_eq!((session.replica, session.requests_there), (replica, there));
        }
        let session = sessions.forget("s0").expect("still known");
        assert_eq!((session.requests, session.last_used, session.ttl_ms(at(5))), (4, at(5), IDLE_MS));
        assert!(sessions.get("s0", at(6)).is_none() && sessions.forget("s0").is_none());
    }

    proptest::proptest! {
        /// Exactly the most recently used ones are known, if they were not idle for too long.
        #[test]
        fn the_least_recently_used_goes_first(
            ops in proptest::collection::vec((0u64..12, 0u64..IDLE_MS / 3), 1..100),
        ) {
            let replica = ReplicaRef::for_tests(0, 0);
            let mut sessions = ServedSessions::new(5);
            let (mut now, mut uses): (Mono, Vec<(u64, Mono)>) = (at(0), Vec::new());
            for (n, pause_ms) in ops {
                now = now.plus_ms(pause_ms);
                uses.retain(|(other, _)| *other != n);
                uses.push((n, now));
                if uses.len() > 5 {
                    uses.remove(0);
                }
                uses.retain(|(_, at)| now.ms_since(*at) < IDLE_MS);
                sessions.used(&key(n), replica, now);
                sessions.check_invariants();
                for n in 0..12 {
                    let known = uses.iter().find(|(other, _)| *other == n).map(|(_, at)| *at);
                    let found = sessions.get(&key(n), now).map(|session| session.last_used);
                    proptest::prop_assert_eq!(found, known);
                }
            }
        }
    }
}
