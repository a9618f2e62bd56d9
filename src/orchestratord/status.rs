//! How the control plane is, in one line for people who ask the service manager. Pure.

use super::core::Core;

impl Core {
    /// `2 of 3 nodes take work, 4 of 5 replicas do, 6 of 16 slots free, 10 requests running, 2 waiting`.
    #[must_use]
    pub fn status(&self) -> String {
        let registry = self.registry();
        let (mut replicas, mut routable, mut slots, mut free) = (0u64, 0u64, 0u64, 0u64);
        for (_, replica) in registry.replicas() {
            replicas += 1;
            if replica.obstacle().is_none() {
                routable += 1;
                slots += u64::from(replica.slots_total);
                free += u64::from(replica.slots_free());
            }
        }
        let mut parts = Vec::new();
        // In the HOME profile the only node is this machine.
        if self.local().is_none() {
            let working = registry.nodes().filter(|node| node.status.takes_work()).count();
            parts.push(format!("{working} of {} take work", count(registry.nodes_len(), "node")));
        }
        if replicas == 0 {
            parts.push("no engine yet".to_string());
        } else {
            parts.push(format!(
                "{routable} of {} routable, {free} of {slots} slots free",
                count(usize::try_from(replicas).unwrap_or(usize::MAX), "replica")
            ));
        }
        if self.in_flight() > 0 || self.waiting() > 0 {
            parts.push(format!("{} running, {} waiting", count(self.in_flight(), "request"), self.waiting()));
        }
        parts.join(", ")
    }
}

fn count(n: usize, what: &str) -> String {
    if n == 1 { format!("1 {what}") } else { format!("{n} {what}s") }
}
