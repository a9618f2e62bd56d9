//! Links: what a call and its answer meet on their way. Each direction is cut, slow or lossy for
//! itself; a message may come twice, and the second one up to a minute later.
//!
//! A node speaks the dialect of its release: an old one leaves out what the oldest agents do not
//! know, a newer one says more than anybody here understands.

use llama_orch::orchestratord::refusal::Refusal;
use llama_orch::pool_managerd::core::CallBody;
use llama_orch::pool_managerd::membership::{Answer, Call, Order};
use llama_orch::time::Mono;
use llama_orch::wire::node::Heartbeat;
use serde_json::{Value, json};

use crate::control::Arrival;
use crate::world::{Caller, Event, World};

/// No message lives longer: as long as a control plane remembers who said goodbye.
const MESSAGE_MS_MAX: u64 = 59_000;

/// Between a node and a control plane.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Link {
    /// Until when what the node sends is lost.
    pub(crate) up_cut_until: Mono,
    /// Until when what the control plane sends is lost: answers, and requests to the node.
    pub(crate) down_cut_until: Mono,
}

/// Which release a node's agent is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Dialect {
    Ours,
    /// Heartbeats do not tell the boot.
    Previous,
    /// No incarnation, no sequence, no replicas.
    Old,
    /// Fields that nobody here knows, everywhere; and a drain of a node or pool is told there alone.
    Newer,
}

impl World {
    /// Usually quick, sometimes stuck in some queue for longer than anybody waits.
    pub(crate) fn delay_ms(&mut self) -> u64 {
        if self.chance(self.loss_percent) {
            self.totals.count("calls delayed");
            self.random.u64(100..MESSAGE_MS_MAX)
        } else {
            self.random.u64(0..20)
        }
    }

    pub(crate) fn is_up_cut(&self, node: usize, plane: usize) -> bool {
        self.links[node][plane].up_cut_until > self.now.mono
    }

    pub(crate) fn is_down_cut(&self, node: usize, plane: usize) -> bool {
        self.links[node][plane].down_cut_until > self.now.mono
    }

    /// Requests need both directions.
    pub(crate) fn is_cut(&self, node: usize, plane: usize) -> bool {
        self.is_up_cut(node, plane) || self.is_down_cut(node, plane)
    }

    /// An agent calls a control plane.
    pub(crate) fn send_call(&mut self, from: Caller, order: Order, body: CallBody) {
        self.note(&format!("n{} calls {:?} of control plane {}", from.node, order.call, from.plane));
        self.note_member(&format!("n{} {:?} {}", from.node, order.call, from.plane));
        let gone = Answer::Failed("timed out".into());
        self.after(order.timeout_ms, Event::CallEnds { from, call: order.call, answer: gone });
        let delay_ms = self.delay_ms();
        if self.is_up_cut(from.node, from.plane) || self.chance(self.loss_percent) {
            self.totals.count("calls lost");
            return;
        }
        let body = self.in_its_dialect(from.node, body);
        if self.chance(self.loss_percent) {
            self.totals.count("calls repeated");
            let again_ms = self.random.u64(delay_ms + 1..=MESSAGE_MS_MAX);
            self.after(again_ms, Event::CallArrives { from, call: order.call, body: body.clone() });
        }
        self.after(delay_ms, Event::CallArrives { from, call: order.call, body });
    }

    pub(crate) fn call_arrives(&mut self, from: Caller, call: Call, body: CallBody) {
        let sender = self.nodes[from.node].agent.as_ref();
        if sender.is_none_or(|agent| agent.life != from.life) {
            self.totals.count("messages of an ended start");
            if matches!(body, CallBody::Deregister { .. }) && sender.is_some() {
                self.totals.count("goodbyes of an ended start");
            }
        }
        if self.planes[from.plane].control.is_some() {
            self.arrive(from.plane, Arrival::Call { from, call, body });
        } else {
            let answer = Answer::Failed("connection refused".into());
            self.send_answer(from, call, answer);
        }
    }

    /// Sends an answer on its way back.
    pub(crate) fn send_answer(&mut self, from: Caller, call: Call, answer: Answer) {
        let delay_ms = self.delay_ms();
        if self.is_down_cut(from.node, from.plane) || self.chance(self.loss_percent) {
            self.totals.count("answers lost");
            return;
        }
        if self.chance(self.loss_percent) {
            let again_ms = self.random.u64(delay_ms + 1..=MESSAGE_MS_MAX);
            self.after(again_ms, Event::CallEnds { from, call, answer: answer.clone() });
        }
        self.after(delay_ms, Event::CallEnds { from, call, answer });
    }

    fn in_its_dialect(&mut self, node: usize, body: CallBody) -> CallBody {
        match (self.nodes[node].dialect, body) {
            (Dialect::Ours, body) => body,
            (Dialect::Previous, CallBody::Heartbeat(mut body)) => {
                body.boot_id = None;
                CallBody::Heartbeat(body)
            }
            (Dialect::Previous, body) => body,
            (Dialect::Old, CallBody::Register(mut body)) => {
                body.incarnation = None;
                body.boot_id = None;
                body.version = None;
                CallBody::Register(body)
            }
            (Dialect::Old, CallBody::Heartbeat(mut body)) => {
                body.incarnation = None;
                body.boot_id = None;
                body.seq = None;
                body.draining = false;
                for pool in &mut body.pools {
                    pool.replicas = None;
                }
                CallBody::Heartbeat(body)
            }
            (Dialect::Newer, CallBody::Register(body)) => {
                self.totals.count("newer messages");
                CallBody::Register(Box::new(told_by_a_newer(&body)))
            }
            (Dialect::Newer, CallBody::Heartbeat(mut body)) => {
                self.totals.count("newer messages");
                tell_drains_once(&mut body);
                CallBody::Heartbeat(Box::new(told_by_a_newer(&body)))
            }
            (Dialect::Old | Dialect::Newer, body @ CallBody::Deregister { .. }) => body,
        }
    }
}

/// A drain is told where it was asked for, and not again for everything below.
fn tell_drains_once(beat: &mut Heartbeat) {
    for pool in &mut beat.pools {
        for replica in pool.replicas.iter_mut().flatten().filter(|_| beat.draining || pool.draining) {
            replica.ready = true;
            replica.draining = false;
        }
        pool.draining &= !beat.draining;
    }
}

/// The same message with fields that are not known here, in every object.
fn told_by_a_newer<T: serde::Serialize + serde::de::DeserializeOwned>(body: &T) -> T {
    fn add(value: &mut Value) {
        match value {
            Value::Object(fields) => {
                fields.values_mut().for_each(add);
                fields.insert("of_the_next_release".into(), json!({"n": [1, null, "x"]}));
            }
            Value::Array(values) => values.iter_mut().for_each(add),
            _ => {}
        }
    }
    let mut value = serde_json::to_value(body).expect("it can be written");
    add(&mut value);
    serde_json::from_value(value).expect("what is not known is passed over")
}

/// A refusal as the agent's client reads its status.
pub(crate) fn understood(refusal: &Refusal) -> Answer {
    match refusal.status() {
        404 => Answer::UnknownNode,
        409 => Answer::Conflict(refusal.message()),
        status => Answer::Failed(format!("status {status}")),
    }
}
