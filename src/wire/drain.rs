//! Drains as the API tells them and as a state file keeps them: what takes no new work, since when,
//! until when, and how far it got.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::id::{PoolId, ReplicaId, ReplicaKey};

/// What a drain covers. Replicas that appear within it later are covered too.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Scope {
    /// Everything on this machine.
    Node,
    /// Replicas whose device mask names this GPU.
    Gpu {
        /// Its index, as engines are given it.
        index: u32,
    },
    /// Every replica of a pool.
    Pool {
        /// The pool.
        pool_id: PoolId,
    },
    /// One replica.
    Replica {
        /// Its pool.
        pool_id: PoolId,
        /// Its name within the pool.
        replica_id: ReplicaId,
    },
    /// Everything, because this process is about to end. It cannot be asked for, is never resumed and
    /// never kept.
    Shutdown,
}

impl Scope {
    /// The scope of one replica.
    #[must_use]
    pub fn replica(key: &ReplicaKey) -> Scope {
        Scope::Replica { pool_id: key.pool.clone(), replica_id: key.replica.clone() }
    }

    /// The scope of a pool.
    #[must_use]
    pub fn pool(pool: &PoolId) -> Scope {
        Scope::Pool { pool_id: pool.clone() }
    }

    /// `node`, `gpu`, `pool`, `replica` or `shutdown`.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Scope::Node => "node",
            Scope::Gpu { .. } => "gpu",
            Scope::Pool { .. } => "pool",
            Scope::Replica { .. } => "replica",
            Scope::Shutdown => "shutdown",
        }
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Scope::Node | Scope::Shutdown => f.write_str(self.kind()),
            Scope::Gpu { index } => write!(f, "gpu {index}"),
            Scope::Pool { pool_id } => write!(f, "pool {pool_id}"),
            Scope::Replica { pool_id, replica_id } => write!(f, "replica {pool_id}/{replica_id}"),
        }
    }
}

/// How far a drain got.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DrainStatus {
    /// What it covers.
    pub scope: Scope,
    /// Always true: a scope that is not drained has no status.
    pub draining: bool,
    /// Since when, in milliseconds since the Unix epoch.
    pub since_ms: u64,
    /// When requests that still run are cut, in milliseconds since the Unix epoch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline_at_ms: Option<u64>,
    /// Requests of the scope that still run through this agent's relay.
    pub in_flight: u32,
    /// Nothing runs any more.
    pub drained: bool,
    /// Since when nothing runs, in milliseconds since the Unix epoch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drained_at_ms: Option<u64>,
    /// The deadline passed with requests running, and not all of them have ended yet.
    pub overdue: bool,
    /// Requests that ended by themselves since the drain began.
    pub finished: u32,
    /// Requests that were ended because the deadline had passed.
    pub cut: u32,
}

/// A drain as it is kept over a restart. Both times are wall-clock milliseconds since the Unix epoch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredDrain {
    /// What it covers.
    pub scope: Scope,
    /// When it began.
    pub since_ms: u64,
    /// When requests that still run are cut.
    #[serde(default)]
    pub deadline_at_ms: Option<u64>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scopes_are_kept_as_tagged_objects() {
        let key = ReplicaKey {
            pool: PoolId::new("p").expect("an id"),
            replica: ReplicaId::new("r").expect("an id"),
        };
        for (scope, text) in [
            (Scope::Node, r#"{"kind":"node"}"#),
            (Scope::Gpu { index: 3 }, r#"{"kind":"gpu","index":3}"#),
            (Scope::pool(&key.pool), r#"{"kind":"pool","pool_id":"p"}"#),
            (Scope::replica(&key), r#"{"kind":"replica","pool_id":"p","replica_id":"r"}"#),
        ] {
            assert_eq!(serde_json::to_string(&scope).expect("JSON"), text);
            assert_eq!(serde_json::from_str::<Scope>(text).expect(text), scope);
        }
        assert!(serde_json::from_str::<Scope>(r#"{"kind":"pool","pool_id":"../x"}"#).is_err());
    }
}
