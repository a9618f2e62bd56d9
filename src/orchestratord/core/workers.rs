//! Workers join the engines of this machine where there are any; a control plane of nodes becomes a node of its
//! own with the first one.

use super::{Core, Effect, Local};
use crate::orchestratord::refusal::Refusal;
use crate::orchestratord::workers::{self, Idle, WorkerOrder};
use crate::replicas::{EnginePolicy, Registry};
use crate::time::Now;
use crate::wire::id::NodeId;

impl Core {
    /// Lets workers register where this process has no engines of its own: they will be those of `node`, at
    /// addresses that `policy` allows.
    pub fn accept_workers(&mut self, node: NodeId, policy: EnginePolicy, hang_suspect_ms: u64, now: Now) {
        if self.local.is_none() {
            self.idle = Some(Idle::new(node, policy, hang_suspect_ms, now));
        }
    }

    /// What workers are among.
    ///
    /// # Errors
    /// Why there can be none.
    pub fn workers(&self) -> Result<&Registry, Refusal> {
        if let Some(local) = &self.local {
            return Ok(&local.replicas);
        }
        let Some(idle) = &self.idle else {
            return Err(Refusal::NotFound("this control plane takes no workers".into()));
        };
        match self.registry.node(&idle.node) {
            Some(_) => Err(Refusal::Conflict(format!(
                "a node is registered as {}: workers need that name, give the node another one",
                idle.node
            ))),
            None => Ok(&idle.replicas),
        }
    }

    /// Carries out what [`workers::join`] or [`workers::leave`] has allowed.
    pub(super) fn worker(&mut self, order: WorkerOrder, now: Now, effects: &mut Vec<Effect>) {
        if let Some(Idle { node, replicas }) = self.idle.take() {
            // There is no directory to be listed.
            self.listed = true;
            self.local = Some(Local { node, replicas, shown_revision: 0 });
        }
        self.with_local(now, effects, |local, now, found| workers::carry_out(order, local, now, found));
    }
}
