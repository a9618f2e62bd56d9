//! What an agent answers when it is polled, for nodes that send no heartbeats: on this machine in the HOME
//! profile, or where only the control plane may open connections.
//!
//! An answer is a full snapshot, taken as a heartbeat is: same replicas, same lease. Two rules keep the
//! two ways apart:
//!
//! - **What a node says itself wins.** While its heartbeats arrive in time its answers to polls change
//!   nothing; nor does an answer to a poll that was sent before the last message from the node came.
//! - **The first stays.** A node belongs to the URL under which it answers first, until its lease ends. An
//!   answer of the same agent under a second URL is ignored; one of another agent of this name is refused.
//!
//! At its own URL an agent may change as it likes (a restart, a reboot, a lost state directory): polls of
//! one URL do not overtake each other, so the last answer is the truth.

use crate::time::{Mono, Now};
use crate::wire::id::{NodeId, PoolId};
use crate::wire::node::{PoolBeat, ReplicaBeat};
use crate::wire::pool::{AgentReport, PoolStatus};
use crate::wire::url::BaseUrl;

use super::snapshot::{asked, cut, too_large};
use super::weights::{self, Weight};
use super::{
    Change, Fenced, GPUS_MAX, LEASE_POLLS, Node, NodeStatus, ServiceRegistry, is_other_boot, refs_of, shown,
};

/// How a node was last heard of. Written in the API as spelt here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Via {
    /// It registered or sent a heartbeat.
    Heartbeat,
    /// Its agent answered a poll.
    Poll,
    /// This process watches it itself.
    Local,
}

/// What became of an answer that was not refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Polled {
    /// The node is what the answer says, and its lease is renewed.
    Taken,
    /// The node's heartbeats arrive: nothing changed.
    Heartbeats,
    /// The node has said something itself since the poll was sent: nothing changed.
    Stale,
    /// The same agent is polled under another URL: nothing changed.
    Elsewhere,
}

impl Via {
    /// The name in the API.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Via::Heartbeat => "heartbeat",
            Via::Poll => "poll",
            Via::Local => "local",
        }
    }
}

impl Node {
    /// How it was last heard of.
    #[must_use]
    pub fn via(&self) -> Via {
        match (&self.address, &self.polled) {
            (None, _) => Via::Local,
            (_, Some(_)) => Via::Poll,
            (_, None) => Via::Heartbeat,
        }
    }

    /// Why its lease ended.
    pub(super) fn silence(&self, now: Now) -> String {
        let silent_s = now.mono.ms_since(self.last_contact) / 1000;
        match self.via() {
            Via::Poll => format!("no answer to polls for {silent_s} s"),
            _ => format!("no heartbeat for {silent_s} s"),
        }
    }
}

impl ServiceRegistry {
    /// Whether a node's own messages arrive in time, so that it need not be polled.
    #[must_use]
    pub fn beats(&self, node: &NodeId, now: Now) -> bool {
        self.by_id.get(node).is_some_and(|index| self.node_beats(*index, now))
    }

    /// Takes what the agent at `url` answered to a poll that was sent at `sent`.
    ///
    /// # Errors
    /// [`Fenced`]: the answer is too large, or the name belongs to another agent.
    pub fn polled(
        &mut self,
        report: &AgentReport,
        url: &BaseUrl,
        sent: Mono,
        now: Now,
        changes: &mut Vec<Change>,
    ) -> Result<Polled, Fenced> {
        too_large("GPUs", report.capabilities.gpus.len(), GPUS_MAX)?;
        too_large("GPUs", report.gpu_loads.len(), GPUS_MAX)?;
        let known = self.by_id.get(&report.node_id).copied();
        if let Some(index) = known
            && let Some(ignored) = self.place_answer(index, report, url, sent, now)?
        {
            return Ok(ignored);
        }
        if report.incarnation.is_some_and(|i| self.departed.includes(&report.node_id, i, now.mono)) {
            return Err(Fenced::Departed);
        }
        let pools: Vec<PoolBeat> = report.pools.iter().map(pool_beat).collect();
        self.check_size(known.map_or(0, |index| self.nodes[index].replicas.len()), &pools)?;
        let weight = Weight {
            pools: weights::of_pools(&pools),
            gpu_loads: weights::of_gpu_loads(&report.gpu_loads),
            ..known.map_or_else(Weight::default, |index| self.nodes[index].weight)
        };
        self.check_weight(known, weight)?;
        let index = match known {
            Some(index) => index,
            None if self.nodes.len() >= self.limits.nodes_max => {
                return Err(Fenced::TooMany { what: "nodes", limit: self.limits.nodes_max });
            }
            None => self.add_node(&report.node_id, now),
        };
        self.weighs(index, weight);
        let is_news = self.identify(index, report, url, now, changes);
        if let Some(ticket) = self.nodes[index].newcomer.take() {
            self.newcomers.remove(ticket);
        }
        self.contact(index, url.host(), now);
        // Replicas first, as with heartbeats.
        self.take_snapshot(index, &pools, now, changes);
        self.set_preparation(index, &report.preparation);
        self.nodes[index].gpu_loads.clone_from(&report.gpu_loads);
        let (status, reason) = if report.draining {
            (NodeStatus::Draining, "the node asks for no new work")
        } else {
            (NodeStatus::Online, "it answers polls")
        };
        self.set_status(index, status, reason, now, changes);
        self.nodes[index].touched |= is_news;
        self.note_changes(index);
        Ok(Polled::Taken)
    }

    /// How long a node may be silent before it is suspect.
    pub(super) fn lease_ms(&self, index: usize) -> u64 {
        let timeout_ms = self.limits.node_timeout_ms;
        match self.nodes[index].via() {
            Via::Poll => timeout_ms.max(self.limits.poll_interval_ms.saturating_mul(LEASE_POLLS)),
            _ => timeout_ms,
        }
    }

    /// Decides whether an answer about a known node counts: `None` if it does.
    fn place_answer(
        &self,
        index: usize,
        report: &AgentReport,
        url: &BaseUrl,
        sent: Mono,
        now: Now,
    ) -> Result<Option<Polled>, Fenced> {
        let node = &self.nodes[index];
        if node.address.is_none() {
            return Err(Fenced::Local);
        }
        if node.told_at.is_some_and(|told_at| sent <= told_at) {
            return Ok(Some(Polled::Stale));
        }
        if !node.status.leased() || node.polled.as_ref() == Some(url) {
            return Ok(None);
        }
        let boot_id = report.boot_id.as_deref().map(cut);
        let other_boot = boot_id.is_some() && node.boot_id.is_some() && boot_id != node.boot_id;
        let other_start = report.incarnation != node.incarnation;
        match &node.polled {
            // Of a node that only the state file knows, nobody can say whether it is still the same.
            _ if other_boot && !node.restored => Err(Fenced::Twin { holder: node.peer.clone() }),
            Some(holder) if other_start => Err(Fenced::Twin { holder: holder.authority().to_string() }),
            Some(_) => Ok(Some(Polled::Elsewhere)),
            None if self.node_beats(index, now) => Ok(Some(Polled::Heartbeats)),
            None => match (report.incarnation, node.incarnation) {
                (Some(new), Some(known)) if new < known => Err(Fenced::OldIncarnation { known }),
                _ => Ok(None),
            },
        }
    }

    fn node_beats(&self, index: usize, now: Now) -> bool {
        let late_ms = self.limits.heartbeat_interval_ms.saturating_mul(3) / 2;
        let late_ms = late_ms.min(self.limits.node_timeout_ms);
        let told_at = self.nodes[index].told_at;
        told_at.is_some_and(|told_at| now.mono.ms_since(told_at) < late_ms)
    }

    /// Makes a node who its agent says it is. Whether that is news.
    fn identify(
        &mut self,
        index: usize,
        report: &AgentReport,
        url: &BaseUrl,
        now: Now,
        changes: &mut Vec<Change>,
    ) -> bool {
        let node = &mut self.nodes[index];
        let before = (node.incarnation, node.boot_id.clone(), node.machine_id.clone(), node.version.clone());
        let capabilities = shown(&report.capabilities);
        let is_same_machine = *node.capabilities == capabilities;
        // A copy of its disk may have counted to the same number.
        if node.incarnation != report.incarnation
            || is_other_boot(report.boot_id.as_deref(), node.boot_id.as_deref())
        {
            node.incarnation = report.incarnation;
            // What was saved of its earlier start is not true of this one.
            self.revision += u64::from(node.registered);
            (node.registered, node.seq) = (false, None);
        }
        let boot_id = report.boot_id.as_deref().map(cut);
        if node.boot_id != boot_id {
            node.boot_id = boot_id;
            node.twins.clear();
        }
        node.machine_id = cut(report.machine_id.as_deref().unwrap_or(report.node_id.as_str()));
        node.version = report.version.as_deref().map(|version| self.names.keep(&cut(version)));
        node.capabilities = self.machines.keep_whole(capabilities);
        node.polled = Some(url.clone());
        // Where a node says that it is reached counts for as long as that start of it lives.
        let after = (node.incarnation, node.boot_id.clone(), node.machine_id.clone(), node.version.clone());
        let is_news = before != after || !is_same_machine;
        if node.registered || node.address.as_ref() == Some(url) {
            return is_news;
        }
        node.address = Some(url.clone());
        let addresses = &self.addresses;
        for replica in refs_of(&self.nodes[index]) {
            self.table.update(replica, now, changes, |r| {
                if let Some(engine) = r.target.engine() {
                    r.target = addresses.target_of(engine, Some(url));
                }
            });
        }
        true
    }

    /// Whether a node has a pool of this name.
    #[must_use]
    pub fn has_pool(&self, node: &NodeId, pool: &PoolId) -> bool {
        self.node(node).is_some_and(|node| node.pools.iter().any(|known| known.pool_id == *pool))
    }
}

/// A pool of an answer, as a heartbeat would have told it. Agents that name only one replica a pool are
/// understood too.
fn pool_beat(status: &PoolStatus) -> PoolBeat {
    let mut replicas: Vec<ReplicaBeat> = status.replicas.iter().map(asked).collect();
    if let (true, Some(url), Some(replica_id)) = (replicas.is_empty(), &status.url, &status.replica_id) {
        replicas.push(ReplicaBeat {
            replica_id: replica_id.clone(),
            url: url.clone(),
            ready: status.ready,
            draining: status.draining,
            slots_free: status.slots_free,
            slots_total: status.slots_total,
            generation: 0,
            models: status.models_available.clone(),
            context_length: None,
            reason: status.last_error.clone().filter(|_| !status.ready),
            device_mask: status.device_mask.clone(),
            engine: status.engine.clone(),
            engine_version: status.engine_version.clone(),
        });
    }
    PoolBeat {
        pool_id: status.pool_id.clone(),
        ready: status.ready,
        draining: status.draining,
        slots_free: status.slots_free,
        slots_total: Some(status.slots_total),
        vram_free_bytes: status.vram_free_bytes,
        engine: status.engine.clone(),
        engine_version: status.engine_version.clone(),
        models_available: status.models_available.clone(),
        replicas: Some(replicas),
    }
}

#[cfg(test)]
mod tests;
