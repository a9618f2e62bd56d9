//! Nodes that said goodbye, for as long as something that they sent before may still arrive.
//!
//! A registration that was stuck on its way (in a stalled socket, or repeated by a proxy) must not
//! bring back an agent that has ended: its replicas would look alive for a whole lease.
//!
//! Goodbyes are not saved over a restart of the control plane: what was stuck on its way to the old process has
//! ended with that process's connections, and what a proxy repeats to the new one names a node without replicas,
//! which takes no work and goes with its lease.

use std::collections::BTreeMap;

use crate::time::Mono;
use crate::wire::id::NodeId;

/// How long a goodbye is remembered, in milliseconds: twice the longest time that an agent waits for
/// an answer.
pub const DEPARTED_MS: u64 = 60_000;
/// Most goodbyes that are remembered; beyond it the oldest is forgotten. As many as a rack restarts
/// within a minute.
pub const DEPARTED_MAX: usize = 1024;

/// The last incarnation of each, and until when it is remembered.
#[derive(Debug, Default)]
pub(super) struct Departed {
    nodes: BTreeMap<NodeId, (u64, Mono)>,
}

impl Departed {
    pub(super) fn remember(&mut self, node: &NodeId, incarnation: u64, now: Mono) {
        self.nodes.retain(|_, (_, until)| *until > now);
        if self.nodes.len() >= DEPARTED_MAX {
            let oldest = self.nodes.iter().min_by_key(|(_, (_, until))| *until).map(|(node, _)| node.clone());
            oldest.and_then(|oldest| self.nodes.remove(&oldest));
        }
        self.nodes.insert(node.clone(), (incarnation, now.plus_ms(DEPARTED_MS)));
    }

    /// Whether this incarnation, or a later one, has said goodbye.
    pub(super) fn includes(&self, node: &NodeId, incarnation: u64, now: Mono) -> bool {
        self.nodes.get(node).is_some_and(|(last, until)| incarnation <= *last && now < *until)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_goodbye_makes_room() {
        let mut departed = Departed::default();
        let id = |n: usize| NodeId::new(&format!("n{n}")).expect("an id");
        for n in 0..=DEPARTED_MAX {
            departed.remember(&id(n), 1, Mono(n as u64));
        }
        let now = Mono(DEPARTED_MAX as u64);
        assert_eq!(departed.nodes.len(), DEPARTED_MAX);
        assert!(!departed.includes(&id(0), 1, now) && departed.includes(&id(DEPARTED_MAX), 1, now));
    }
}
