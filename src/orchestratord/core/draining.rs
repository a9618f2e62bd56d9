//! Drains of this machine's engines: the ledger of [`crate::replicas`] is told of every request that runs on
//! them, so that a drain knows what it waits for, and a replica whose file has vanished stays until its last
//! request has ended.

use super::limits::Abort;
use super::{Core, Effect, Local, RequestId};
use crate::orchestratord::service_registry::{ReplicaRef, ServiceRegistry};
use crate::replicas::ReplicaLease;
use crate::replicas::drain_routes::{CUT_REASON, DrainOrder};
use crate::time::Now;
use crate::wire::id::NodeId;

impl Core {
    /// This machine's node, in the HOME profile.
    #[must_use]
    pub fn local_node(&self) -> Option<&NodeId> {
        self.local.as_ref().map(|local| &local.node)
    }

    /// Carries out what an operator asked for.
    pub(super) fn drain(&mut self, order: &DrainOrder, now: Now, effects: &mut Vec<Effect>) {
        self.with_local(now, effects, |local, now, found| match order {
            DrainOrder::Drain(scope, deadline_ms) => {
                // Who asks is told before if there are too many.
                let _ = local.drain(scope, *deadline_ms, now, found);
            }
            DrainOrder::Resume(scope) => {
                local.resume(scope, now, found);
            }
            DrainOrder::Show(_) => {}
        });
    }

    /// Notes that a request has ended on its engine.
    pub(super) fn end_lease(&mut self, id: RequestId, now: Now, effects: &mut Vec<Effect>) {
        if self.local.is_none() {
            return;
        }
        let running = self.requests.get_mut(&id).and_then(|request| request.running.as_mut());
        if let Some(lease) = running.and_then(|run| run.lease.take()) {
            self.with_local(now, effects, |local, now, found| local.release(lease, now, found));
        }
    }

    /// Ends the requests for which a drain's deadline has passed.
    pub(super) fn cut_drained(&mut self, now: Now, effects: &mut Vec<Effect>) {
        let mut leases = Vec::new();
        self.with_local(now, effects, |local, now, found| leases = local.expire_drains(now, found));
        if leases.is_empty() {
            return;
        }
        let mut cut: Vec<RequestId> = Vec::new();
        for (id, request) in &mut self.requests {
            let Some(run) = &mut request.running else { continue };
            if run.lease.as_ref().is_some_and(|lease| leases.contains(&lease.id)) && run.abort.is_none() {
                run.abort = Some(Abort::Drained);
                cut.push(*id);
            }
        }
        cut.sort_unstable();
        for request in cut {
            let reason = CUT_REASON.to_string();
            effects.push(Effect::Abort { request, reason, even_answered: true });
        }
    }
}

impl Local {
    /// Notes a request that was given slots of a replica. `None` where the engine has failed in this very
    /// turn: the request will, too.
    pub(super) fn lease(
        &mut self,
        registry: &ServiceRegistry,
        replica: ReplicaRef,
        slots: u32,
    ) -> Option<ReplicaLease> {
        let known = registry.replica(replica).filter(|known| known.node == self.node)?;
        self.replicas.acquire(&known.key, Some(known.generation), slots).ok()
    }
}
