//! How large the tables may grow that outlive a request: tasks, sessions, what is remembered for explanations, and
//! what nodes have told of themselves. Pure.
//!
//! Each has a limit that suits a large installation. Where memory is given, they are made smaller together, so that
//! they never take more than a quarter of it: an eighth for what nodes tell, an eighth for the rest. What finds no
//! room is then refused (a task, a node) or takes the place of the oldest (a session, an explanation).

use super::explain::EXPLAIN_MAX;
use super::served_sessions;
use super::service_registry::BYTES_MAX;
use super::sessions;
use super::tasks::{GONE_MAX, TASKS_MAX};

/// A task beside its events and its answer, which count as bodies, in bytes.
const TASK_BYTES: usize = 2 * 1024;
/// The name of a task that is gone: kept twice, with what keeps them in order.
const GONE_BYTES: usize = 512;
/// A session that clients may look at, with a name of full length.
const SESSION_BYTES: usize = 640;
/// What placement keeps of a session: mostly a key, which is seldom as long as it may be.
const SERVED_BYTES: usize = 384;
/// What is remembered of a request, with two attempts and reasons of usual length: records give their memory to
/// their successors.
const EXPLAIN_BYTES: usize = 3 * 1024;

/// Share of memory for what nodes tell, and as much for all other tables: one part in so many.
const SHARE: usize = 8;

/// The limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tables {
    /// Tasks at once.
    pub tasks_max: usize,
    /// Names of tasks that are gone.
    pub gone_max: usize,
    /// Sessions that clients may look at.
    pub sessions_max: usize,
    /// Sessions that placement knows.
    pub served_sessions_max: usize,
    /// Requests that are explained.
    pub explain_max: usize,
    /// What nodes have told of themselves, in bytes as the registry counts them.
    pub registry_bytes_max: usize,
}

impl Default for Tables {
    fn default() -> Tables {
        Tables {
            tasks_max: TASKS_MAX,
            gone_max: GONE_MAX,
            sessions_max: sessions::SESSIONS_MAX,
            served_sessions_max: served_sessions::SESSIONS_MAX,
            explain_max: EXPLAIN_MAX,
            registry_bytes_max: BYTES_MAX,
        }
    }
}

impl Tables {
    /// As large as they may be with so many bytes of memory; `None` where nobody counts them.
    #[must_use]
    pub fn within(memory_bytes: Option<usize>) -> Tables {
        let full = Tables::default();
        let Some(memory_bytes) = memory_bytes else { return full };
        let (share, wanted) = (memory_bytes / SHARE, full.bytes() - full.registry_bytes_max);
        // Of any size in 64 bits: a table has some ten thousand entries, a share some gigabytes.
        let part = |most: usize| most.min(most * share.min(wanted) / wanted);
        Tables {
            tasks_max: part(full.tasks_max),
            gone_max: part(full.gone_max),
            sessions_max: part(full.sessions_max),
            served_sessions_max: part(full.served_sessions_max),
            explain_max: part(full.explain_max),
            registry_bytes_max: full.registry_bytes_max.min(share),
        }
    }

    /// What they may take, in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.tasks_max * TASK_BYTES
            + self.gone_max * GONE_BYTES
            + self.sessions_max * SESSION_BYTES
            + self.served_sessions_max * SERVED_BYTES
            + self.explain_max * EXPLAIN_BYTES
            + self.registry_bytes_max
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn large_machines_and_those_that_nobody_limits_have_all_of_it() {
        assert_eq!(Tables::within(None), Tables::default());
        assert_eq!(Tables::within(Some(16 << 30)), Tables::default());
        let small = Tables::within(Some(256 << 20));
        assert!(
            small.tasks_max > 4_000 && small.explain_max > 1_500 && small.sessions_max > 4_000,
            "{small:?}"
        );
    }

    proptest! {
        /// Never more than a quarter, something of each, and more memory never means less.
        #[test]
        fn tables_take_a_quarter_of_memory_at_most(mib in 16usize..4096, more in 0usize..1024) {
            let tables = Tables::within(Some(mib << 20));
            prop_assert!(tables.bytes() <= (mib << 20) / 4);
            let least = [tables.tasks_max, tables.gone_max, tables.sessions_max, tables.served_sessions_max, tables.explain_max];
            prop_assert!(least.iter().all(|most| *most >= 100), "{tables:?}");
            let larger = Tables::within(Some((mib + more) << 20));
            prop_assert!(larger.tasks_max >= tables.tasks_max && larger.registry_bytes_max >= tables.registry_bytes_max);
        }
    }
}
