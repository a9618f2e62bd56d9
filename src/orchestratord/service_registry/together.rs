//! What the registry decides about more than one node or replica at once: who makes room for whom, which
//! of two agents has the name, and what is out of reach together.

use crate::time::{Mono, Now};
use crate::wire::node::RegisterRequest;

use super::{Change, Fenced, NodeStatus, ReplicaRef, ServiceRegistry, TWINS_MAX, Target, refs_of};

impl ServiceRegistry {
    /// A node's agent could not be reached, on the way to `replica`: nothing can that stands behind it.
    /// Otherwise one request would fail at one of its replicas after another.
    pub fn agent_failed(&mut self, replica: ReplicaRef, reason: &str, now: Now, changes: &mut Vec<Change>) {
        let Some(known) = self.table.get(replica) else { return };
        let Some(index) = self.by_id.get(&known.node) else { return };
        for other in refs_of(&self.nodes[*index]) {
            if self.table.get(other).is_some_and(|other| matches!(other.target, Target::Relay { .. })) {
                self.data_path_failed(other, reason, now, changes);
            }
        }
    }

    /// An agent of this very boot, started before the one that has the name, and at another address: it
    /// is no delayed message, but a second agent with a copy of the same state.
    pub(super) fn note_older_twin(
        &mut self,
        index: usize,
        request: &RegisterRequest,
        incarnation: u64,
        changes: &mut Vec<Change>,
    ) {
        let node = &mut self.nodes[index];
        let Some(holder) = node.address.as_ref().filter(|address| **address != request.address) else {
            return;
        };
        let mark = format!("incarnation {incarnation}");
        if node.twins.contains(&mark) || node.twins.len() >= TWINS_MAX {
            return;
        }
        changes.push(Change::TwinRefused {
            node: node.id.clone(),
            boot_id: mark.clone(),
            peer: request.address.to_string(),
            holder: holder.to_string(),
        });
        node.twins.push(mark);
    }

    /// Sees to it that one more node fits, if need be at the cost of one that never beat or, after
    /// those, of the one that has been offline for longest.
    pub(super) fn make_room(&mut self, peer: &str, changes: &mut Vec<Change>) -> Result<(), Fenced> {
        if let Some(index) = self.newcomers.oldest_of_full(peer) {
            self.drop_node(index, "it never sent a heartbeat, and others from there register", changes);
        }
        if self.nodes.len() < self.limits.nodes_max {
            return Ok(());
        }
        if let Some(index) = self.newcomers.oldest() {
            self.drop_node(index, "it never sent a heartbeat, and others need its place", changes);
            return Ok(());
        }
        let is_offline = |(_, index): &&(Mono, usize)| self.nodes[*index].status == NodeStatus::Offline;
        let Some((_, index)) = self.lapsed.iter().find(is_offline).copied() else {
            return Err(Fenced::TooMany { what: "nodes", limit: self.limits.nodes_max });
        };
        self.drop_node(index, "it is offline, and others need its place", changes);
        Ok(())
    }
}
