//! The world's own books on memberships: who registered, who was heard of when, what each node last
//! said. Kept from messages and answers alone, and held against what a control plane does with them.

use std::collections::{BTreeMap, BTreeSet};

use llama_orch::orchestratord::core::{Dispatch, Effect};
use llama_orch::orchestratord::saved::{Saved, SavedNode, Standing};
use llama_orch::orchestratord::service_registry::TRUST_MS;
use llama_orch::pool_managerd::core::CallBody;
use llama_orch::service::events::Happening;
use llama_orch::time::{Mono, Now};
use llama_orch::wire::id::{NodeId, PoolId, ReplicaKey};
use llama_orch::wire::node::{Heartbeat, ReplicaBeat};
use llama_orch::wire::pool::PoolStatus;
use llama_orch::wire::url::BaseUrl;

use crate::control::{Arrival, Control, PendingCall};
use crate::rules::TTL_MS;

/// How long a node that left is remembered here; no message lives longer.
const LEFT_MS: u64 = 60_000;
/// Who is silent for so long has missed a heartbeat; a name may change hands then.
const LATE_MS: u64 = 15_000;
/// Longest time for which a silent majority keeps its leases.
const HOLD_MS: u64 = 300_000;
/// Fewest nodes that have a majority.
const HOLD_NODES_MIN: usize = 3;

/// The books of one control plane, from its start to its end.
#[derive(Default)]
pub(crate) struct Members {
    nodes: BTreeMap<NodeId, Member>,
    /// The last incarnation of each node that deregistered, and when.
    left: BTreeMap<NodeId, (u64, Mono)>,
    /// The last heartbeat that was taken of each incarnation; twins may have the same one.
    seqs: BTreeMap<(String, u64), u64>,
    /// Since when leases that are over are kept because most nodes are silent.
    hold_since: Option<Mono>,
    /// Holds that lasted as long as they may.
    pub(crate) holds_ended: u64,
}

struct Member {
    incarnation: Option<u64>,
    boot_id: String,
    contact: Mono,
    /// Its lease has ended.
    lapsed: bool,
    /// It has sent a heartbeat at some time: before that its silence says nothing about others.
    has_beaten: bool,
    /// It is known from the state file, and has not been heard of since.
    restored: bool,
    /// What it said last since it registered.
    snapshot: Option<Snapshot>,
    /// Changes of its status.
    transitions: u64,
}

#[derive(Default)]
struct Snapshot {
    draining: bool,
    replicas: BTreeMap<ReplicaKey, Told>,
    /// Pools of which only sums are told.
    unlisted: BTreeSet<PoolId>,
}

struct Told {
    takes_work: bool,
    generation: u64,
    slots: u32,
    url: BaseUrl,
}

impl From<&ReplicaBeat> for Told {
    fn from(beat: &ReplicaBeat) -> Told {
        Told {
            takes_work: beat.ready && !beat.draining,
            generation: beat.generation,
            slots: beat.slots_total,
            url: beat.url.clone(),
        }
    }
}

impl Snapshot {
    fn restored(node: &SavedNode, trusted: bool) -> Snapshot {
        let unlisted = node.node.pools.iter().filter(|pool| !pool.listed);
        let unlisted: BTreeSet<PoolId> = unlisted.map(|pool| pool.pool.clone()).collect();
        let told = node.node.replicas.iter().filter_map(|replica| {
            let said_so = replica.ready && !replica.draining && !replica.doubted;
            // Of the others only sums are told from now on.
            let takes_work = trusted && said_so || unlisted.contains(&replica.pool);
            let (generation, slots) = (replica.generation, replica.slots_total);
            Some((replica.key(), Told { takes_work, generation, slots, url: replica.url.clone()? }))
        });
        let replicas = told.collect();
        Snapshot { draining: node.standing == Standing::Draining, replicas, unlisted }
    }

    fn of(beat: &Heartbeat) -> Snapshot {
        let mut snapshot = Snapshot { draining: beat.draining, ..Snapshot::default() };
        for pool in &beat.pools {
            match &pool.replicas {
                None => {
                    snapshot.unlisted.insert(pool.pool_id.clone());
                }
                Some(replicas) => {
                    for replica in replicas {
                        let key =
                            ReplicaKey { pool: pool.pool_id.clone(), replica: replica.replica_id.clone() };
                        let mut told = Told::from(replica);
                        told.takes_work &= !pool.draining;
                        snapshot.replicas.insert(key, told);
                    }
                }
            }
        }
        snapshot
    }
}

impl Members {
    /// What an earlier start saved is as good as its nodes' last words, until they speak again.
    pub(crate) fn restored(&mut self, saved: &Saved, now: Now) {
        let trusted = saved.age_ms(now.wall) <= TRUST_MS;
        for node in &saved.nodes {
            let record = &node.node;
            let member = Member {
                incarnation: record.incarnation,
                boot_id: record.boot_id.clone().unwrap_or_default(),
                contact: now.mono,
                lapsed: node.standing == Standing::Silent,
                has_beaten: true,
                restored: true,
                snapshot: Some(Snapshot::restored(node, trusted)),
                transitions: 0,
            };
            self.nodes.insert(record.id.clone(), member);
        }
    }

    /// What an agent said about a pool of which its heartbeats tell only sums.
    pub(crate) fn told_of_pool(&mut self, node: &NodeId, pool: &PoolId, status: &PoolStatus) {
        let snapshot = self.nodes.get_mut(node).and_then(|member| member.snapshot.as_mut());
        let Some(snapshot) = snapshot.filter(|snapshot| snapshot.unlisted.contains(pool)) else { return };
        if status.replicas.is_empty() {
            return;
        }
        snapshot.replicas.retain(|key, _| key.pool != *pool);
        for replica in &status.replicas {
            let key = ReplicaKey { pool: pool.clone(), replica: replica.replica_id.clone() };
            let (generation, slots, url) = (replica.generation, replica.slots_total, replica.url.clone());
            snapshot.replicas.insert(key, Told { takes_work: true, generation, slots, url });
        }
    }

    /// How often the status of a node has changed.
    pub(crate) fn transitions(&self, node: &NodeId) -> u64 {
        self.nodes.get(node).map_or(0, |member| member.transitions)
    }

    fn registered(&mut self, node: &NodeId, call: &PendingCall, incarnation: Option<u64>, now: Mono) {
        self.is_no_ghost(node, incarnation, now);
        let boot_id = &call.boot_id;
        let mut member = Member {
            incarnation,
            boot_id: boot_id.clone(),
            contact: now,
            lapsed: false,
            has_beaten: false,
            restored: false,
            snapshot: None,
            transitions: 0,
        };
        if let Some(known) = self.nodes.remove(node) {
            let is_other_machine = known.boot_id != *boot_id;
            if incarnation.is_some() && known.incarnation.is_some() {
                assert!(
                    incarnation >= known.incarnation || known.lapsed,
                    "{node}: {incarnation:?} replaced {:?}",
                    known.incarnation
                );
                assert!(
                    !is_other_machine || known.restored || now.ms_since(known.contact) >= LATE_MS,
                    "{node}: {boot_id} took the name of {}, which was heard of {} ms ago",
                    known.boot_id,
                    now.ms_since(known.contact)
                );
            }
            member.transitions = known.transitions;
            member.has_beaten = known.has_beaten;
            // Of the oldest agents nothing tells one start from another.
            let is_same = incarnation == known.incarnation && !is_other_machine;
            // It only repeats itself, and brings nothing back before it has been heard to beat.
            member.lapsed = is_same && incarnation.is_some() && known.lapsed;
            if is_same || (incarnation.is_none() && known.incarnation.is_none()) {
                member.snapshot = known.snapshot;
            }
        }
        self.nodes.insert(node.clone(), member);
    }

    fn beaten(&mut self, node: &NodeId, call: &PendingCall, beat: &Heartbeat, now: Mono) {
        self.is_no_ghost(node, beat.incarnation, now);
        let member = self.nodes.get_mut(node).unwrap_or_else(|| panic!("{node} beats and is no member"));
        if let (Some(incarnation), Some(seq)) = (beat.incarnation, beat.seq) {
            assert_eq!(member.incarnation, Some(incarnation), "{node}: an incarnation that did not register");
            // Without it, a clone that counted to the same incarnation is not told apart.
            if beat.boot_id.is_some() {
                assert_eq!(
                    member.boot_id, call.boot_id,
                    "{node}: a heartbeat of a machine that did not register"
                );
            }
            let last = self.seqs.insert((call.boot_id.clone(), incarnation), seq);
            assert!(last.is_none_or(|last| seq > last), "{node}: heartbeat {seq} after {last:?}");
        }
        member.contact = now;
        (member.lapsed, member.has_beaten, member.restored) = (false, true, false);
        let mut snapshot = Snapshot::of(beat);
        if let Some(before) = member.snapshot.take() {
            // What its agent was asked for stands until it is asked again.
            let kept = before.replicas.into_iter().filter(|(key, _)| snapshot.unlisted.contains(&key.pool));
            let kept: Vec<_> = kept.collect();
            snapshot.replicas.extend(kept);
        }
        member.snapshot = Some(snapshot);
    }

    fn removed(&mut self, node: &NodeId, call: &PendingCall, incarnation: Option<u64>, now: Mono) {
        let known = self.nodes.remove(node).unwrap_or_else(|| panic!("{node} leaves and is no member"));
        let Some(incarnation) = incarnation else { return };
        assert!(
            known.incarnation.is_none_or(|known| incarnation >= known),
            "{node}: the goodbye of {incarnation} ({}) removed {:?}",
            call.boot_id,
            known.incarnation
        );
        let last = self.left.get(node).map_or(incarnation, |(left, _)| incarnation.max(*left));
        self.left.insert(node.clone(), (last, now));
    }

    /// Who said goodbye stays away.
    fn is_no_ghost(&self, node: &NodeId, incarnation: Option<u64>, now: Mono) {
        let left = self.left.get(node).filter(|(_, at)| now.ms_since(*at) < LEFT_MS).map(|(left, _)| *left);
        if let (Some(incarnation), Some(left)) = (incarnation, left) {
            assert!(incarnation > left, "{node}: {incarnation} is back, {left} left");
        }
    }

    /// Whether most of those who hold a lease have missed a heartbeat.
    fn is_mass_silent(&self, now: Mono) -> bool {
        let leased = || self.nodes.values().filter(|member| !member.lapsed && member.has_beaten);
        let late = leased().filter(|member| now.ms_since(member.contact) >= LATE_MS).count();
        let of = leased().count();
        of >= HOLD_NODES_MIN && late > of / 2
    }
}

impl Control {
    /// What follows for the books from what was answered, and whether it may be.
    pub(crate) fn check_member_effect(&mut self, effect: &Effect, now: Mono) {
        match effect {
            Effect::Registered(call, _) | Effect::Beaten(call, _) | Effect::Removed(call) => {
                let call = self.calls.get(call).expect("a call that was made");
                let node = self.ledger.node_of(call);
                match (&call.body, effect) {
                    (CallBody::Register(body), Effect::Registered(..)) => {
                        self.members.registered(&body.node_id, call, body.incarnation, now);
                    }
                    (CallBody::Heartbeat(beat), Effect::Beaten(..)) => {
                        self.members.beaten(&node, call, beat, now);
                    }
                    (CallBody::Deregister { incarnation }, Effect::Removed(_)) => {
                        let incarnation = Some(*incarnation).filter(|_| !call.is_old);
                        self.members.removed(&node, call, incarnation, now);
                    }
                    (body, effect) => panic!("{body:?} is answered by {effect:?}"),
                }
            }
            Effect::Log(what) if what.happening().kind == "node" => self.check_status(&what.happening(), now),
            _ => {}
        }
    }

    fn check_status(&mut self, happening: &Happening, now: Mono) {
        let Some((_, member)) =
            self.members.nodes.iter_mut().find(|(id, _)| id.as_str() == happening.subject)
        else {
            return;
        };
        let from_to = happening.text.contains(" -> ");
        member.transitions += u64::from(from_to);
        if !from_to || happening.state != "Suspect" {
            return;
        }
        let (node, silent_ms) = (&happening.subject, now.ms_since(member.contact));
        let has_beaten = member.has_beaten;
        assert!(silent_ms >= TTL_MS, "{node}: its lease ended {silent_ms} ms after its last sign of life");
        member.lapsed = true;
        let incarnation = member.incarnation;
        let waits = self.inbox.iter().any(|arrival| {
            let Arrival::Call { body: CallBody::Heartbeat(beat), from, .. } = arrival else { return false };
            self.ledger.names.get(&from.node).is_some_and(|id| id.as_str() == node)
                && beat.incarnation == incarnation
        });
        assert!(!waits, "{node}: its lease ended while its heartbeat waited to be read");
        if !has_beaten {
            return;
        }
        if let Some(since) = self.members.hold_since {
            let held_ms = now.ms_since(since);
            assert!(
                held_ms >= HOLD_MS || !self.silent_before,
                "{node}: its lease ended {held_ms} ms after most nodes fell silent"
            );
            self.members.holds_ended += u64::from(held_ms >= HOLD_MS);
        } else {
            assert!(!self.silent_before, "{node}: its lease ended when most nodes fell silent together");
        }
    }

    /// Before time may end anything.
    pub(crate) fn look_for_silence(&mut self, now: Mono) {
        self.silent_before = self.members.is_mass_silent(now);
    }

    /// After time has ended what it may: no lease lasts longer than it should.
    pub(crate) fn check_leases(&mut self, now: Mono) {
        let members = &mut self.members;
        let is_overdue = |member: &Member| !member.lapsed && now.ms_since(member.contact) >= TTL_MS;
        let idle = members.nodes.iter().find(|(_, member)| !member.has_beaten && is_overdue(member));
        assert!(
            idle.is_none(),
            "{}: has never beaten and keeps its lease",
            idle.map_or("", |(id, _)| id.as_str())
        );
        let Some((node, member)) = members.nodes.iter().find(|(_, member)| is_overdue(member)) else {
            members.hold_since = None;
            return;
        };
        let silent_ms = now.ms_since(member.contact);
        assert!(
            members.is_mass_silent(now),
            "{node}: still has its lease after {silent_ms} ms, and most nodes are well"
        );
        let since = members.hold_since.unwrap_or(now);
        assert!(
            now.ms_since(since) < HOLD_MS,
            "{node}: still has its lease after {silent_ms} ms, and most nodes are silent since {since:?}"
        );
        members.hold_since = Some(since);
    }

    /// Work goes only where the node's last word says that it may.
    pub(crate) fn check_told(&self, request: u64, dispatch: &Dispatch) -> Option<u32> {
        let Dispatch { node, key, generation, target, .. } = dispatch;
        let name = format!("request {request} goes to {node} {key}");
        let member = self.members.nodes.get(node).unwrap_or_else(|| panic!("{name}, which is no member"));
        assert!(!member.lapsed, "{name}, whose lease has ended");
        let snapshot = member.snapshot.as_ref();
        let snapshot =
            snapshot.unwrap_or_else(|| panic!("{name}, which has said nothing since it registered"));
        assert!(!snapshot.draining, "{name}, which drains");
        let told =
            snapshot.replicas.get(key).unwrap_or_else(|| panic!("{name}, which its node does not name"));
        assert!(told.takes_work, "{name}, which is not ready or drains");
        assert_eq!(told.generation, *generation, "{name}, another engine by now");
        assert_eq!(target.engine(), Some(&told.url), "{name}, at another address");
        (!snapshot.unlisted.contains(&key.pool)).then_some(told.slots)
    }
}
