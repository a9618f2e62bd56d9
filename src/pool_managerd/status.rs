//! How the agent is, in one line for people who ask the service manager. Pure.

use super::core::Core;
use super::membership::PlaneState;

impl Core {
    /// `3 replicas in 2 pools, 4 of 8 slots free, 1 request running, 1 GPU, known to 1 of 2 control planes`;
    /// what there is none of, and what nobody configured, is left out.
    #[must_use]
    pub fn status(&self) -> String {
        let pools = self.pool_counts();
        let ready = pools.values().filter(|pool| pool.is_ready).count();
        let (total, free) = pools.values().fold((0u64, 0u64), |(total, free), pool| {
            (total + u64::from(pool.slots_total), free + u64::from(pool.slots_free))
        });
        let mut parts = vec![match self.replicas().len() {
            0 => "no engine yet".to_string(),
            replicas => format!("{} in {}", count(replicas, "replica"), count(pools.len(), "pool")),
        }];
        if self.replicas().len() > 0 {
            parts.push(format!("{ready} ready"));
            parts.push(format!("{free} of {total} slots free"));
        }
        if self.in_flight() > 0 {
            parts.push(format!("{} running", count(self.in_flight() as usize, "request")));
        }
        let gpus = self.gpus().capabilities().len();
        if gpus > 0 {
            parts.push(count(gpus, "GPU"));
        }
        if !self.planes().is_empty() {
            let knows = |state: &PlaneState| matches!(state, PlaneState::Registered { .. });
            let known = self.planes().iter().filter(|plane| knows(plane.state())).count();
            parts.push(format!("known to {known} of {}", count(self.planes().len(), "control plane")));
        }
        let drains = self.replicas().drains().count();
        if drains > 0 {
            parts.push(format!("{} in force", count(drains, "drain")));
        }
        parts.join(", ")
    }
}

fn count(n: usize, what: &str) -> String {
    if n == 1 { format!("1 {what}") } else { format!("{n} {what}s") }
}
