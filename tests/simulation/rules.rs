//! What must hold, whatever happens: the world's own books on requests, slots and memberships, kept
//! from inputs and effects alone and held against what the control plane does.

use std::collections::BTreeMap;

use llama_orch::orchestratord::core::{Core, Dispatch, Effect, Ending, Input};
use llama_orch::orchestratord::placement::{Ask, Choice, Strategy, StrategyState, choose};
use llama_orch::orchestratord::service_registry::{Confirmation, NodeStatus, Replica, ReplicaRef};
use llama_orch::time::{Mono, Now};
use llama_orch::wire::id::NodeId;

use crate::world::{PendingCall, Place, World};

/// How long a node that left is remembered here; no message lives longer.
const LEFT_MS: u64 = 60_000;

/// One control plane's books, from its start to its end.
#[derive(Default)]
pub(crate) struct Ledger {
    requests: BTreeMap<u64, Request>,
    /// Slots of requests that run.
    in_use: BTreeMap<Place, u32>,
    /// The last incarnation of each node that deregistered, and when.
    left: BTreeMap<NodeId, (u64, Mono)>,
    /// The last heartbeat that was accepted of each incarnation.
    seqs: BTreeMap<(NodeId, u64), u64>,
}

struct Request {
    ask: Ask,
    state: State,
    /// Where it failed before the answer began.
    failed_at: Vec<Place>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum State {
    /// Waits, or is about to be decided on.
    Pending,
    Running {
        place: Place,
        slots: u32,
        /// `None` until the shell has carried the dispatch out.
        exchange: Option<u64>,
    },
    Done(&'static str),
}

/// What was known of a node before it sent a message.
pub(crate) struct Before {
    node: NodeId,
    known: Option<(Option<u64>, NodeStatus)>,
    incarnation: Option<u64>,
    seq: Option<u64>,
    now: Mono,
}

impl Ledger {
    pub(crate) fn asked(&mut self, request: u64, ask: &Ask) {
        self.requests
            .insert(request, Request { ask: ask.clone(), state: State::Pending, failed_at: Vec::new() });
    }

    /// Requests that are neither answered nor refused.
    pub(crate) fn open(&self) -> u64 {
        let open = self.requests.values().filter(|request| !matches!(request.state, State::Done(_)));
        open.count() as u64
    }

    /// A client leaves: whether its request waits.
    pub(crate) fn withdraw(&mut self, request: u64) -> bool {
        let request = self.requests.get_mut(&request).expect("it was asked");
        let waits = request.state == State::Pending;
        if waits {
            request.state = State::Done("withdrawn");
        }
        waits
    }

    pub(crate) fn dispatched(&mut self, request: u64, id: u64, dispatch: &Dispatch) {
        match &mut self.requests.get_mut(&request).expect("it was asked").state {
            State::Running { exchange: exchange @ None, slots, .. } if *slots == dispatch.slots => {
                *exchange = Some(id);
            }
            state => panic!("request {request} is sent while {state:?}"),
        }
    }

    pub(crate) fn ended(&mut self, request: u64, id: u64, ending: &Ending) {
        let known = self.requests.get_mut(&request).expect("it was asked");
        let next = match ending {
            Ending::Complete => State::Done("answered"),
            Ending::Withdrawn => State::Done("withdrawn"),
            Ending::Failed { answered: true, .. } => State::Done("broken"),
            Ending::Failed { .. }
            | Ending::NotTried(_)
            | Ending::NotReady { .. }
            | Ending::Aborted { .. } => State::Pending,
        };
        let State::Running { place, slots, exchange } = std::mem::replace(&mut known.state, next) else {
            panic!("request {request} ends and did not run");
        };
        if known.state == State::Pending {
            known.failed_at.push(place.clone());
        }
        assert_eq!(exchange, Some(id), "request {request} runs twice");
        let in_use = self.in_use.get_mut(&place).expect("counted when it began");
        *in_use -= slots;
        if *in_use == 0 {
            self.in_use.remove(&place);
        }
    }

    /// What to compare with when a node's message has been handled.
    pub(crate) fn before(
        &self,
        core: &Core,
        calls: &BTreeMap<u64, PendingCall>,
        input: &Input,
        now: Now,
    ) -> Option<Before> {
        let (reply, node, incarnation, seq) = match input {
            Input::Register { reply, body, .. } => (reply, &body.node_id, body.incarnation, None),
            Input::Heartbeat { reply, node, body, .. } => (reply, node, body.incarnation, body.seq),
            Input::Deregister { reply, node, incarnation } => (reply, node, *incarnation, None),
            _ => return None,
        };
        assert!(calls.contains_key(reply), "a call that is to be answered");
        let known = core.registry().node(node).map(|node| (node.incarnation, node.status));
        Some(Before { node: node.clone(), known, incarnation, seq, now: now.mono })
    }

    /// Holds what the core decided against the books.
    pub(crate) fn check_effects(
        &mut self,
        core: &Core,
        calls: &BTreeMap<u64, PendingCall>,
        before: Option<Before>,
        effects: &[Effect],
    ) {
        let accepted = effects.iter().any(|effect| {
            matches!(effect, Effect::Registered(..) | Effect::Beaten(..) | Effect::Removed(..))
        });
        if let Some(before) = before.filter(|_| accepted) {
            self.check_member(before, effects);
        }
        for effect in effects {
            match effect {
                Effect::Dispatch(request, dispatch) => self.check_dispatch(core, *request, dispatch),
                Effect::Refuse(id, refusal) if !calls.contains_key(id) => {
                    let request = self.requests.get_mut(id).expect("it was asked");
                    let was = std::mem::replace(&mut request.state, State::Done("refused"));
                    assert_eq!(was, State::Pending, "request {id} refused: {}", refusal.message());
                }
                Effect::Waiting { request, .. } => {
                    let state = &self.requests.get(request).expect("it was asked").state;
                    assert_eq!(*state, State::Pending, "request {request} waits");
                }
                _ => {}
            }
        }
        let known = core.waiting() + core.in_flight();
        assert_eq!(known as u64, self.open(), "requests that are neither ended nor known to the core");
    }

    fn check_member(&mut self, before: Before, effects: &[Effect]) {
        let Before { node, known, incarnation, seq, now } = before;
        let incarnation = incarnation.expect("agents tell it");
        let left = self.left.get(&node).filter(|(_, at)| now.ms_since(*at) < LEFT_MS).map(|(left, _)| *left);
        let removed = effects.iter().any(|effect| matches!(effect, Effect::Removed(_)));
        if removed {
            let last = self.left.get(&node).map_or(incarnation, |(left, _)| incarnation.max(*left));
            self.left.insert(node.clone(), (last, now));
        } else {
            assert!(
                left.is_none_or(|left| incarnation > left),
                "{node}: {incarnation} is back, {left:?} left"
            );
        }
        if let Some((Some(registered), status)) = known {
            let leased =
                matches!(status, NodeStatus::Online | NodeStatus::Registering | NodeStatus::Draining);
            assert!(
                incarnation >= registered || !leased,
                "{node}: {incarnation} replaced {registered}, {status}"
            );
        }
        if let Some(seq) = seq {
            let (registered, _) = known.expect("only members beat");
            assert_eq!(registered, Some(incarnation), "{node}: an incarnation that did not register");
            let last = self.seqs.insert((node.clone(), incarnation), seq);
            assert!(last.is_none_or(|last| seq > last), "{node}: heartbeat {seq} after {last:?}");
        }
    }

    fn check_dispatch(&mut self, core: &Core, request: u64, dispatch: &Dispatch) {
        let Dispatch { node, key, generation, slots, .. } = dispatch;
        let found = core.registry().replicas().find(|(_, known)| known.node == *node && known.key == *key);
        let (_, replica) =
            found.unwrap_or_else(|| panic!("request {request} goes to {key}, which is unknown"));
        let name = format!("request {request} goes to {node} {key}");
        assert_eq!(replica.generation, *generation, "{name}, another engine by now");
        let status = core.registry().node(node).map(|node| node.status);
        assert!(status.is_some_and(NodeStatus::takes_work), "{name}, whose node is {status:?}");
        assert!(
            replica.confirmation != Confirmation::Doubted && replica.ready && !replica.draining,
            "{name}, which takes none: {replica:?}"
        );
        let place = (node.clone(), key.clone(), *generation);
        let in_use = self.in_use.entry(place.clone()).or_default();
        *in_use += slots;
        assert!(*in_use <= replica.slots_total, "{name}: {in_use} of {} slots", replica.slots_total);
        let known = self.requests.get_mut(&request).expect("it was asked");
        let running = State::Running { place, slots: *slots, exchange: None };
        let was = std::mem::replace(&mut known.state, running);
        assert_eq!(was, State::Pending, "{name}");
    }
}

impl World {
    /// After every turn of the control plane: nobody waits who could be served.
    pub(crate) fn check_control(&mut self) {
        let Some(control) = &self.control else { return };
        for (id, request) in &control.ledger.requests {
            if request.state == State::Pending {
                let state = &mut StrategyState::new(1);
                let registry = control.core.registry();
                // One on which it failed will do where no other could serve it.
                let failed_there = |replica: &Replica| {
                    let place = (&replica.node, &replica.key, replica.generation);
                    request.failed_at.iter().any(|(node, key, serial)| (node, key, *serial) == place)
                };
                let replicas = registry.replicas().filter(|(_, replica)| failed_there(replica));
                let tried: Vec<ReplicaRef> = replicas.map(|(replica, _)| replica).collect();
                let mut placement = choose(registry, &request.ask, &tried, Strategy::LeastLoaded, state);
                if !matches!(placement.choice, Choice::Busy) {
                    placement = choose(registry, &request.ask, &[], Strategy::LeastLoaded, state);
                }
                assert!(
                    !matches!(placement.choice, Choice::Replica { .. }),
                    "request {id} waits for {:?} while a slot is free",
                    request.ask
                );
            }
        }
        assert!(
            control.exit_by.is_none_or(|at| self.now.mono < at),
            "the control plane outlives its shutdown"
        );
    }

    /// After everything was healed and two lease times have passed: everything is well.
    pub(crate) fn check_all_is_well(&self) {
        let control = self.control.as_ref().expect("it was started");
        let registry = control.core.registry();
        assert_eq!((control.core.waiting(), control.core.in_flight()), (0, 0), "requests that do not end");
        assert_eq!(control.ledger.open(), 0, "requests that were forgotten");
        assert!(control.ledger.in_use.is_empty(), "slots that are still in use");
        assert_eq!(registry.nodes_len(), self.nodes.len(), "nodes that are not there");
        let mut replicas = 0;
        for (index, node) in self.nodes.iter().enumerate() {
            let agent = node.agent.as_ref().expect("it was started");
            assert_eq!(agent.core.in_flight(), 0, "{}: relayed requests that do not end", node.id);
            let known = registry.node(&node.id).unwrap_or_else(|| panic!("{} is not known", node.id));
            let plane = &agent.core.planes()[0];
            assert_eq!(
                (known.status, known.incarnation),
                (NodeStatus::Online, Some(node.incarnation)),
                "{}: {:?}: {}",
                node.id,
                plane.state(),
                plane.reason()
            );
            for (handoff, serves) in self.announced(index) {
                let key = handoff.key();
                let found = registry.replicas().find(|(_, r)| r.node == node.id && r.key == key);
                let (_, replica) = found.unwrap_or_else(|| panic!("{} {key} is not known", node.id));
                assert_eq!(replica.target.engine(), Some(&handoff.url), "{} {key}", node.id);
                let obstacle = replica.obstacle();
                assert_eq!(obstacle.is_none(), serves, "{} {key}: {obstacle:?}", node.id);
                let slots = (replica.slots_total, replica.in_flight, replica.others);
                assert_eq!(slots, (handoff.slots, 0, 0), "{} {key}: slots", node.id);
                replicas += 1;
            }
            assert!(
                node.engines.values().all(|engine| engine.running.is_empty()),
                "{}: engines run",
                node.id
            );
        }
        assert_eq!(registry.replicas().count(), replicas, "replicas that no file announces");
    }
}
