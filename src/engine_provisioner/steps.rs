//! How far the preparation of engines has come: what is fetched, built and loaded, for whoever asks.
//!
//! Written by the thread that prepares, read by the loop. One list for everything that is under way or was
//! last; a new preparation of a pool takes the place of its earlier one. When the first of them begins, the
//! socket on which this program is asked is touched: who watches its directory need not ask in vain.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use rustix::fs::{AtFlags, CWD, Timespec, Timestamps, UTIME_NOW};
use serde_json::Value;

use crate::wire::id::{PoolId, ReplicaKey};
use crate::wire::preparation::{PoolPreparation, PreparationStep};

/// Most steps that are remembered: a few for each of the most engines.
const STEPS_MAX: usize = 1_024;
/// Longest text of a step, in characters.
const DETAIL_CHARS_MAX: usize = 1_000;

/// What is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// The engine's program is found or built.
    EngineProvision,
    /// Its model is fetched.
    ModelFetch,
    /// The engine loads.
    PoolWarmup,
}

/// How it is with a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Status {
    Running,
    Completed,
    Failed,
}

/// One step.
#[derive(Clone, Debug)]
pub(super) struct Step {
    kind: Kind,
    /// The replica that it is for.
    id: String,
    pool: PoolId,
    status: Status,
    detail: String,
    bytes_done: Option<u64>,
    bytes_total: Option<u64>,
    pct: Option<u64>,
}

impl Step {
    /// As others read it.
    fn told(&self) -> PreparationStep {
        let kind = match self.kind {
            Kind::EngineProvision => "engine_provision",
            Kind::ModelFetch => "model_fetch",
            Kind::PoolWarmup => "pool_warmup",
        };
        let status = match self.status {
            Status::Running => "running",
            Status::Completed => "completed",
            Status::Failed => "failed",
        };
        PreparationStep {
            kind: kind.into(),
            id: self.id.clone(),
            status: status.into(),
            detail: self.detail.clone(),
            bytes_done: self.bytes_done,
            bytes_total: self.bytes_total,
            pct: self.pct,
        }
    }
}

/// The list, shared.
#[derive(Clone, Debug, Default)]
pub(super) struct Steps {
    all: Arc<Mutex<Vec<Step>>>,
    socket: Arc<OnceLock<PathBuf>>,
}

impl Steps {
    fn with<T>(&self, change: impl FnOnce(&mut Vec<Step>) -> T) -> T {
        // Nothing that is done under the lock can leave the list half changed.
        change(&mut self.all.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// From now on they are told on this socket, which is listened on.
    pub(super) fn are_told_on(&self, socket: &Path) {
        let _ = self.socket.set(socket.into());
        // Who saw it come may have been refused: a socket is there a moment before it is listened on.
        let _ = touch(socket);
    }

    /// Forgets what was done for a pool.
    pub(super) fn clear(&self, pool: &PoolId) {
        self.with(|steps| steps.retain(|step| step.pool != *pool));
    }

    /// A step begins, or goes on with another text.
    pub(super) fn begin(&self, kind: Kind, key: &ReplicaKey, detail: &str) {
        let detail: String = detail.chars().take(DETAIL_CHARS_MAX).collect();
        let is_first = self.with(|steps| {
            let is_first = !steps.iter().any(|step| step.status == Status::Running);
            if let Some(step) = find(steps, kind, key) {
                if step.status != Status::Running {
                    (step.bytes_done, step.bytes_total, step.pct) = (None, None, None);
                }
                (step.status, step.detail) = (Status::Running, detail);
                return is_first;
            }
            if steps.len() >= STEPS_MAX {
                return false;
            }
            steps.push(Step {
                kind,
                id: key.to_string(),
                pool: key.pool.clone(),
                status: Status::Running,
                detail,
                bytes_done: None,
                bytes_total: None,
                pct: None,
            });
            is_first
        });
        if is_first && let Some(socket) = self.socket.get() {
            // Who is not told now asks a little later.
            let _ = touch(socket);
        }
    }

    /// So many bytes of it are there.
    pub(super) fn bytes(&self, kind: Kind, key: &ReplicaKey, done: u64, total: Option<u64>) {
        self.with(|steps| {
            if let Some(step) = find(steps, kind, key) {
                (step.bytes_done, step.bytes_total) = (Some(done), total);
                step.pct = total.filter(|total| *total > 0).map(|total| done.saturating_mul(100) / total);
            }
        });
    }

    /// So much of it is done, in percent.
    pub(super) fn percent(&self, kind: Kind, key: &ReplicaKey, percent: u64) {
        self.with(|steps| {
            if let Some(step) = find(steps, kind, key) {
                step.pct = Some(percent);
            }
        });
    }

    /// It is over.
    pub(super) fn end(&self, kind: Kind, key: &ReplicaKey, outcome: Result<(), &str>) {
        self.with(|steps| {
            let Some(step) = find(steps, kind, key) else { return };
            match outcome {
                Ok(()) => (step.status, step.pct) = (Status::Completed, Some(100)),
                Err(why) => {
                    step.status = Status::Failed;
                    step.detail = why.chars().take(DETAIL_CHARS_MAX).collect();
                }
            }
        });
    }

    /// Whether anything was done for a pool.
    pub(super) fn has(&self, pool: &PoolId) -> bool {
        self.with(|steps| steps.iter().any(|step| step.pool == *pool))
    }

    /// Nobody wants that engine any more.
    pub(super) fn forget(&self, key: &ReplicaKey) {
        let id = key.to_string();
        self.with(|steps| steps.retain(|step| step.id != id));
    }

    /// The pools in which something is under way, or whose engine failed to start, with all their steps.
    pub(super) fn under_way(&self) -> Vec<PoolPreparation> {
        self.with(|steps| {
            let unfinished = steps.iter().filter(|step| match step.status {
                Status::Running => true,
                // It is started again.
                Status::Failed => step.kind == Kind::PoolWarmup,
                Status::Completed => false,
            });
            let pools: BTreeSet<&PoolId> = unfinished.map(|step| &step.pool).collect();
            let told = |pool: &PoolId| PoolPreparation {
                pool_id: pool.clone(),
                steps: steps.iter().filter(|step| step.pool == *pool).map(Step::told).collect(),
            };
            pools.into_iter().map(told).collect()
        })
    }

    /// Those of a pool, as they are shown.
    pub(super) fn of(&self, pool: &PoolId) -> Value {
        self.with(|steps| {
            let of_pool: Vec<PreparationStep> =
                steps.iter().filter(|step| step.pool == *pool).map(Step::told).collect();
            serde_json::to_value(of_pool).unwrap_or_default()
        })
    }
}

fn touch(file: &Path) -> io::Result<()> {
    let now = Timespec { tv_sec: 0, tv_nsec: UTIME_NOW };
    let times = Timestamps { last_access: now, last_modification: now };
    Ok(rustix::fs::utimensat(CWD, file, &times, AtFlags::SYMLINK_NOFOLLOW)?)
}

fn find<'a>(steps: &'a mut [Step], kind: Kind, key: &ReplicaKey) -> Option<&'a mut Step> {
    let id = key.to_string();
    steps.iter_mut().find(|step| step.kind == kind && step.id == id)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::id::ReplicaId;

    #[test]
    fn a_step_goes_from_running_to_its_end_and_is_seen_under_its_pool() {
        let pool = |name| PoolId::new(name).expect("an id");
        let key = ReplicaKey { pool: pool("p"), replica: ReplicaId::new("r0").expect("an id") };
        let (steps, kind) = (Steps::default(), Kind::ModelFetch);
        steps.begin(kind, &key, "m.gguf");
        steps.bytes(kind, &key, 50, Some(200));
        let told = steps.of(&key.pool);
        assert_eq!(told[0]["kind"], "model_fetch");
        assert_eq!((&told[0]["status"], &told[0]["pct"]), (&"running".into(), &25.into()));
        steps.end(kind, &key, Err("no room"));
        let told = steps.of(&key.pool);
        assert_eq!((&told[0]["status"], &told[0]["detail"]), (&"failed".into(), &"no room".into()));
        assert_eq!(steps.of(&pool("q")), serde_json::json!([]));
        steps.clear(&key.pool);
        assert_eq!(steps.of(&key.pool), serde_json::json!([]));
    }
}
