//! What operators and tools ask of the core beside its inputs: callbacks, and what a restart must keep.

use super::{Core, Effect, Shutdown};
use crate::pool_managerd::callbacks::{NotRegistered, Notifier, Policy, StoredCallback};
use crate::service::events::Happening;
use crate::time::Now;
use crate::wire::drain::{Scope, StoredDrain};
use crate::wire::id::PoolId;
use crate::wire::pool::AgentReport;
use crate::wire::url::BaseUrl;

impl Core {
    /// Switches callbacks on; `policy` says which URLs may be called.
    pub fn enable_callbacks(&mut self, policy: Policy) {
        self.notifier.enable(self.identity.node_id.clone(), self.identity.incarnation, policy);
    }

    /// Registers a callback, see [`Notifier::register`].
    ///
    /// # Errors
    /// [`NotRegistered`].
    pub fn register_callback(
        &mut self,
        url: &BaseUrl,
        pool: Option<PoolId>,
        is_configured: bool,
        now: Now,
        effects: &mut Vec<Effect>,
    ) -> Result<(), NotRegistered> {
        let mut happenings = Vec::new();
        let registered = self.notifier.register(url, pool, is_configured, now, &mut happenings);
        self.tell(happenings, now, effects);
        self.proceed(now, effects);
        registered
    }

    /// Removes the callbacks of a URL, of all pools or of one. Returns how many there were.
    pub fn unregister_callback(
        &mut self,
        url: &BaseUrl,
        pool: Option<&PoolId>,
        now: Now,
        effects: &mut Vec<Effect>,
    ) -> usize {
        let mut happenings = Vec::new();
        let removed = self.notifier.unregister(url, pool, &mut happenings);
        self.tell(happenings, now, effects);
        removed
    }

    /// What a control plane that polls is told: what a heartbeat would say.
    #[must_use]
    pub fn report(&self) -> AgentReport {
        let identity = &self.identity;
        AgentReport {
            node_id: identity.node_id.clone(),
            machine_id: Some(identity.machine_id.clone()).filter(|name| !name.is_empty()),
            version: Some(env!("CARGO_PKG_VERSION").to_string()),
            incarnation: Some(identity.incarnation),
            boot_id: identity.boot_id.clone(),
            draining: self.is_node_draining(),
            capabilities: identity.capabilities.clone(),
            pools: self.pools(),
            preparation: self.preparing.pools().to_vec(),
            gpu_loads: self.gpus.loads(),
        }
    }

    /// Whether the whole node takes no new work: it is ending, or drained.
    pub(super) fn is_node_draining(&self) -> bool {
        self.shutdown != Shutdown::No || self.replicas.drain_status(&Scope::Node).is_some()
    }

    /// The callbacks.
    #[must_use]
    pub fn callbacks(&self) -> &Notifier {
        &self.notifier
    }

    /// Takes back the drains and callbacks that an earlier process kept, before anything runs.
    pub(super) fn restore_operations(
        &mut self,
        drains: &[StoredDrain],
        callbacks: &[StoredCallback],
        now: Now,
        effects: &mut Vec<Effect>,
    ) {
        let (mut changes, mut happenings) = (Vec::new(), Vec::new());
        self.replicas.restore_drains(drains, now, &mut changes);
        for change in changes {
            self.announce(change, now, effects);
        }
        if self.notifier.is_enabled() {
            self.notifier.restore(callbacks, now, &mut happenings);
        }
        self.tell(happenings, now, effects);
    }

    /// Grows with everything that must be kept over a restart.
    pub(super) fn kept_revision(&self) -> u64 {
        self.replicas.adopted_revision() + self.replicas.drains_revision() + self.notifier.revision()
    }

    pub(super) fn delivered(
        &mut self,
        (callback, event, outcome): (u64, u64, Result<(), String>),
        now: Now,
        effects: &mut Vec<Effect>,
    ) {
        let mut happenings = Vec::new();
        let random = &mut self.random;
        let mut draw = |n: u64| random.u64(0..n.max(1));
        self.notifier.delivered(callback, event, outcome, now, &mut draw, &mut happenings);
        self.tell(happenings, now, effects);
    }

    fn tell(&mut self, happenings: Vec<Happening>, now: Now, effects: &mut Vec<Effect>) {
        for happening in happenings {
            self.happened(happening, now, effects);
        }
    }
}
