//! How far engines are on their way: what is built, fetched and loaded before a pool serves.
//!
//! A provisioner tells its node's agent, which tells the control plane with its heartbeats and where it is
//! polled; there a task's answer shows it. Only pools in which something is under way are told of.

use serde::{Deserialize, Serialize};

use super::id::PoolId;

/// Most pools of a node that are told of: as many as a provisioner keeps.
pub const PREPARED_POOLS_MAX: usize = 256;
/// Most steps of one pool: three for each of dozens of replicas.
pub const POOL_STEPS_MAX: usize = 96;

/// A pool in which something is under way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolPreparation {
    /// The pool.
    pub pool_id: PoolId,
    /// What is done for it, and what was done before that.
    #[serde(default)]
    pub steps: Vec<PreparationStep>,
}

/// One step.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PreparationStep {
    /// `engine_provision`, `model_fetch` or `pool_warmup`.
    pub kind: String,
    /// What it is for: a replica, as `pool/replica`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub id: String,
    /// `pending`, `running`, `completed` or `failed`.
    #[serde(default)]
    pub status: String,
    /// What is being done, or why it failed.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub detail: String,
    /// Bytes that are there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes_done: Option<u64>,
    /// Bytes in all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes_total: Option<u64>,
    /// Share that is done, in percent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pct: Option<u64>,
}

impl PreparationStep {
    /// Whether it is under way.
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.status == "running"
    }
}
