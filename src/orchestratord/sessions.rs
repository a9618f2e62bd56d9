//! Sessions: requests that a client says belong together, and which replica served the last of them.
//!
//! A session exists from its first request until it has been idle for [`IDLE_MS`], or a client ends it.
//! It is a record and nothing else: it holds no slot and limits nothing. Whether a request should go
//! where its session was served last, placement decides, by its own
//! [`ServedSessions`](super::served_sessions::ServedSessions).
//!
//! "Warm" means that the replica named here has produced part of an answer in this session since the
//! session came to it, so that its engine may still hold the prompt's beginning in its cache. Engines do
//! not tell how many bytes that is.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::time::Mono;
use crate::wire::id::{NodeId, ReplicaKey};

/// Sessions that are remembered at once; beyond that the one that was idle for longest is forgotten. A
/// record is a few hundred bytes.
pub const SESSIONS_MAX: usize = 10_000;
/// A session without a request for this long is forgotten.
pub const IDLE_MS: u64 = 600_000;
/// Longest name, in bytes.
pub const NAME_BYTES_MAX: usize = 128;

/// Where a session was served.
pub type ServedBy = (ReplicaKey, NodeId, u64);

/// One session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Session {
    /// Requests that were answered to their end.
    pub turns: u64,
    /// Tokens generated in them, as far as they were counted.
    pub tokens_out: u64,
    /// Prompt tokens that the engine took from its cache in the last turn, where it told.
    pub cached_tokens: Option<u64>,
    /// The replica, its node and its generation that served the last request.
    pub served_by: Option<ServedBy>,
    /// That replica has answered since the session came to it.
    pub is_warm: bool,
    /// Requests of it that have not ended.
    active: u32,
    expires: Mono,
}

/// What is known of an answer at its end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Turn {
    /// Tokens generated, where they were counted.
    pub tokens_out: u64,
    /// Prompt tokens from the engine's cache, where it told.
    pub cached_tokens: Option<u64>,
}

/// All sessions.
#[derive(Debug)]
pub struct Sessions {
    capacity: usize,
    table: BTreeMap<Arc<str>, Session>,
    by_expiry: BTreeSet<(Mono, Arc<str>)>,
}

/// Whether this can be a session's name: visible ASCII without `/`, so that it fits into a path.
#[must_use]
pub fn is_name(text: &str) -> bool {
    (1..=NAME_BYTES_MAX).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_graphic() && b != b'/')
}

impl Default for Sessions {
    fn default() -> Sessions {
        Sessions::new(SESSIONS_MAX)
    }
}

impl Sessions {
    /// No session yet; at most `capacity`, and at least one, are remembered.
    #[must_use]
    pub fn new(capacity: usize) -> Sessions {
        Sessions { capacity: capacity.max(1), table: BTreeMap::new(), by_expiry: BTreeSet::new() }
    }

    /// A request of this session came. [`Sessions::ended`] must follow.
    pub fn began(&mut self, name: &Arc<str>, now: Mono) {
        if !self.table.contains_key(name) {
            if self.table.len() >= self.capacity
                && let Some((_, oldest)) = self.by_expiry.first().cloned()
            {
                self.forget(&oldest);
            }
            let session = Session {
                turns: 0,
                tokens_out: 0,
                cached_tokens: None,
                served_by: None,
                is_warm: false,
                active: 0,
                expires: now,
            };
            self.table.insert(name.clone(), session);
        }
        self.renew(name, now, |session| session.active += 1);
    }

    /// A request of this session was sent to a replica.
    pub fn sent(&mut self, name: &str, to: ServedBy, now: Mono) {
        self.renew(name, now, |session| {
            if session.served_by.as_ref() != Some(&to) {
                session.is_warm = false;
                session.cached_tokens = None;
                session.served_by = Some(to);
            }
        });
    }

    /// Its replica has begun to answer.
    pub fn answering(&mut self, name: &str) {
        if let Some(session) = self.table.get_mut(name) {
            session.is_warm = session.served_by.is_some();
        }
    }

    /// A request of this session is over; with what is known of its answer if that was complete.
    pub fn ended(&mut self, name: &str, turn: Option<Turn>, now: Mono) {
        self.renew(name, now, |session| {
            session.active = session.active.saturating_sub(1);
            if let Some(turn) = turn {
                session.turns += 1;
                session.tokens_out = session.tokens_out.saturating_add(turn.tokens_out);
                session.cached_tokens = turn.cached_tokens.or(session.cached_tokens);
            }
        });
    }

    /// The replica that served a session last, its node and its generation.
    #[must_use]
    pub fn last_replica(&self, name: &str) -> Option<ServedBy> {
        self.table.get(name)?.served_by.clone()
    }

    /// A session, and for how long it is remembered without a request, in milliseconds.
    #[must_use]
    pub fn get(&self, name: &str, now: Mono) -> Option<(&Session, u64)> {
        let session = self.table.get(name)?;
        let left_ms = if session.active > 0 { IDLE_MS } else { session.expires.ms_since(now) };
        Some((session, left_ms))
    }

    /// Ends a session. Its running requests go on.
    pub fn forget(&mut self, name: &str) {
        if let Some((name, session)) = self.table.remove_entry(name) {
            self.by_expiry.remove(&(session.expires, name));
        }
    }

    /// Forgets those that were idle for too long.
    pub fn expire(&mut self, now: Mono) {
        while let Some((at, name)) = self.by_expiry.first().cloned()
            && at <= now
        {
            if self.table.get(&name).is_some_and(|session| session.active > 0) {
                self.renew(&name, now, |_| {});
            } else {
                self.forget(&name);
            }
        }
    }

    /// When [`Sessions::expire`] is wanted next.
    #[must_use]
    pub fn deadline(&self) -> Option<Mono> {
        self.by_expiry.first().map(|(at, _)| *at)
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.table.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.table.is_empty()
    }

    fn renew(&mut self, name: &str, now: Mono, change: impl FnOnce(&mut Session)) {
        let Some((name, _)) = self.table.get_key_value(name) else { return };
        let name = name.clone();
        let Some(session) = self.table.get_mut(&name) else { return };
        change(session);
        self.by_expiry.remove(&(session.expires, name.clone()));
        session.expires = now.plus_ms(IDLE_MS);
        self.by_expiry.insert((session.expires, name));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::id::{PoolId, ReplicaId};
    use proptest::prelude::*;

    fn replica(name: &str, generation: u64) -> ServedBy {
        let key = ReplicaKey {
            pool: PoolId::new("p").expect("an id"),
            replica: ReplicaId::new(name).expect("an id"),
        };
        (key, NodeId::new("n").expect("an id"), generation)
    }

    fn ms(ms: u64) -> Mono {
        Mono(0).plus_ms(ms)
    }

    #[test]
    fn a_session_is_remembered_until_it_was_idle_for_long() {
        let (mut sessions, name): (_, Arc<str>) = (Sessions::default(), "s".into());
        sessions.began(&name, ms(0));
        sessions.sent("s", replica("a", 1), ms(5));
        sessions.expire(ms(5 * IDLE_MS));
        assert_eq!(sessions.last_replica("s"), Some(replica("a", 1)), "its request still runs");
        let turn = Turn { tokens_out: 7, cached_tokens: Some(3) };
        sessions.ended("s", Some(turn), ms(5 * IDLE_MS));
        let (session, left_ms) = sessions.get("s", ms(5 * IDLE_MS + 10)).expect("known");
        assert_eq!((session.turns, session.tokens_out, left_ms), (1, 7, IDLE_MS - 10));
        sessions.expire(ms(6 * IDLE_MS - 1));
        assert_eq!(sessions.len(), 1);
        assert_eq!(sessions.deadline(), Some(ms(6 * IDLE_MS)));
        sessions.expire(ms(6 * IDLE_MS));
        assert_eq!((sessions.len(), sessions.deadline()), (0, None));
    }

    #[test]
    fn a_session_is_cold_on_another_replica_or_another_start_of_it() {
        let (mut sessions, name): (_, Arc<str>) = (Sessions::default(), "s".into());
        sessions.began(&name, ms(0));
        let warm = |sessions: &Sessions| sessions.get("s", ms(0)).map(|(session, _)| session.is_warm);
        sessions.sent("s", replica("a", 1), ms(0));
        assert_eq!(warm(&sessions), Some(false), "nothing was generated yet");
        sessions.answering("s");
        sessions.sent("s", replica("a", 1), ms(0));
        assert_eq!(warm(&sessions), Some(true), "the same again");
        for other in [replica("a", 2), replica("b", 2)] {
            sessions.sent("s", other, ms(0));
            assert_eq!(warm(&sessions), Some(false));
            sessions.answering("s");
        }
        sessions.forget("s");
        sessions.sent("s", replica("a", 1), ms(0));
        sessions.ended("s", Some(Turn::default()), ms(0));
        assert!(sessions.is_empty(), "an ended session is not revived by what still ran in it");
    }

    proptest! {
        /// Whatever happens: the table is bounded, and everything in it has one time at which it ends.
        #[test]
        fn the_table_is_bounded(ops in proptest::collection::vec((0u8..5, 0usize..30, 0u64..400_000), 0..200)) {
            let mut sessions = Sessions::default();
            let mut now = ms(0);
            for (op, name, later) in ops {
                let name: Arc<str> = format!("s{name}").into();
                match op {
                    0 => sessions.began(&name, now),
                    1 => sessions.sent(&name, replica("a", 1), now),
                    2 => sessions.ended(&name, Some(Turn::default()), now),
                    3 => sessions.forget(&name),
                    _ => {
                        now = now.plus_ms(later);
                        sessions.expire(now);
                        prop_assert!(sessions.deadline().is_none_or(|at| at > now));
                    }
                }
                prop_assert_eq!(sessions.by_expiry.len(), sessions.table.len());
                for (name, session) in &sessions.table {
                    prop_assert!(sessions.by_expiry.contains(&(session.expires, name.clone())));
                }
            }
        }
    }

    #[test]
    fn the_longest_idle_makes_room() {
        let mut sessions = Sessions::default();
        for n in 0..=SESSIONS_MAX {
            let name: Arc<str> = format!("s{n}").into();
            sessions.began(&name, ms(n as u64));
            sessions.ended(&name, None, ms(n as u64));
        }
        assert_eq!(sessions.len(), SESSIONS_MAX);
        assert!(sessions.get("s0", ms(0)).is_none() && sessions.get("s1", ms(0)).is_some());
    }
}
