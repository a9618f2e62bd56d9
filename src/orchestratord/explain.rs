//! Why a request went where it went: what is remembered of the last [`EXPLAIN_MAX`] requests, for
//! `GET /v2/explain`. Pure.
//!
//! ```text
//!   begin ─▶ waits? ─▶ dispatched ─▶ answering ─▶ attempt_ended ─▶ ended
//!                          ▲                            │
//!                          └────── another engine ──────┘
//! ```
//!
//! The daemon notes each step as it carries it out, with numbers that placement had computed anyway, so
//! that a step costs a search in a ring and a few stores. Records have fixed limits and give their memory
//! to their successors: a full ring allocates next to nothing. What is costly, to say of every replica
//! why it does not serve a request that still waits, is worked out by [`Survey`] when somebody asks.
//!
//! Nothing of a prompt, an answer or a user is here: names of models, nodes and requests, and times.

use std::cmp::Ordering;
use std::collections::{BTreeMap, VecDeque};

use serde::{Serialize, Serializer};

use crate::time::{Mono, Now, Wall};
use crate::wire::id::{NodeId, ReplicaKey};

use super::core::RequestId;
use super::peek::cut;
use super::placement::{Ask, Placement};
use super::service_registry::{NodeStatus, Obstacle, Replica, ServiceRegistry};

/// Requests that are remembered: at a hundred a second, those of the last forty seconds; some 3 MiB.
pub const EXPLAIN_MAX: usize = 4_096;
/// Requests listed where no limit is given.
pub const LISTED_DEFAULT: usize = 100;
/// Most requests in one listing: about a megabyte.
pub const LISTED_MAX: usize = 1_000;
/// Attempts that one record keeps, the newest: a request has three, unless a fleet died.
const ATTEMPTS_KEPT: usize = 8;
/// Longest name of a request or a model that is kept, in bytes.
const NAME_BYTES_MAX: usize = 128;
/// Longest reason that is kept, in bytes.
const REASON_BYTES_MAX: usize = 256;
/// Replicas that a survey names.
const NAMED_MAX: usize = 8;

/// How many replicas placement looked at, and how many were left after each question.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Considered {
    /// Looked at.
    pub replicas: u32,
    /// Of these, pass the pins and serve the model.
    pub fitting: u32,
    /// Of these, take work.
    pub placeable: u32,
    /// Of these, have enough free slots.
    pub with_room: u32,
}

impl From<&Placement> for Considered {
    fn from(placement: &Placement) -> Considered {
        Considered {
            replicas: placement.considered,
            fitting: placement.fitting,
            placeable: placement.placeable,
            with_room: placement.with_room,
        }
    }
}

impl Serialize for Considered {
    /// As refusals by reason, which is what people ask for.
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Shown {
            replicas: u32,
            refused: Refused,
            with_room: u32,
        }
        #[derive(Serialize)]
        struct Refused {
            other_model_or_place: u32,
            takes_no_work: u32,
            full: u32,
        }
        let refused = Refused {
            other_model_or_place: self.replicas.saturating_sub(self.fitting),
            takes_no_work: self.fitting.saturating_sub(self.placeable),
            full: self.placeable.saturating_sub(self.with_room),
        };
        Shown { replicas: self.replicas, refused, with_room: self.with_room }.serialize(serializer)
    }
}

/// What is known of a request when it has been received.
#[derive(Clone, Copy, Debug)]
pub struct Received<'a> {
    /// Its id, as the client reads it in `x-request-id`; a task's name.
    pub id: &'a str,
    /// Its path.
    pub path: &'a str,
    /// The model that is placed.
    pub model: Option<&'a str>,
    /// The alias by which the client asked for it.
    pub alias: Option<&'a str>,
    /// It wants events as they come.
    pub stream: bool,
    /// Slots that it wants.
    pub slots: u32,
    /// When its first byte came.
    pub began: Mono,
}

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The answer is complete, whatever its status says.
    Answered,
    /// The client left, or cancelled it.
    Withdrawn,
    /// The engine failed in the middle of its answer.
    Broken,
    /// It was refused; the reason says why.
    Refused,
}

#[derive(Debug)]
struct Attempt {
    node: NodeId,
    key: ReplicaKey,
    /// `None` where a slot that became free was handed to the first in the queue.
    considered: Option<Considered>,
    sent: Mono,
    connected: Option<Mono>,
    first_byte: Option<Mono>,
    ended: Option<Mono>,
    status: Option<u16>,
    failure: Option<Box<str>>,
}

#[derive(Debug, Default)]
struct Record {
    request: RequestId,
    id: String,
    path: String,
    model: String,
    alias: String,
    stream: bool,
    slots: u32,
    received_at: Wall,
    began: Mono,
    received: Mono,
    /// It waits, or waited at first: behind so many of its class.
    queued_behind: Option<usize>,
    /// What placement saw when it began to wait.
    considered: Option<Considered>,
    attempts: Vec<Attempt>,
    attempts_total: u32,
    outcome: Option<Outcome>,
    code: &'static str,
    reason: String,
    ended: Option<Mono>,
}

/// The records, oldest first. Requests are begun in the order of their numbers.
#[derive(Debug)]
pub struct Explain {
    records: VecDeque<Record>,
    capacity: usize,
}

impl Default for Explain {
    fn default() -> Explain {
        Explain::new(EXPLAIN_MAX)
    }
}

impl Explain {
    /// Remembers the last `capacity` requests, at least one.
    #[must_use]
    pub fn new(capacity: usize) -> Explain {
        Explain { records: VecDeque::new(), capacity: capacity.max(1) }
    }

    /// A request was received. Its number must be above those of all before it.
    pub fn begin(&mut self, request: RequestId, what: &Received<'_>, now: Now) {
        debug_assert!(self.records.back().is_none_or(|last| last.request < request));
        if self.records.len() < self.capacity {
            self.records.push_back(Record::default());
        } else {
            // The oldest becomes the newest where it lies.
            self.records.rotate_left(1);
        }
        let Some(record) = self.records.back_mut() else { return };
        record.attempts.clear();
        refill(&mut record.id, what.id, NAME_BYTES_MAX);
        refill(&mut record.path, what.path, NAME_BYTES_MAX);
        refill(&mut record.model, what.model.unwrap_or_default(), NAME_BYTES_MAX);
        refill(&mut record.alias, what.alias.unwrap_or_default(), NAME_BYTES_MAX);
        record.reason.clear();
        record.request = request;
        (record.stream, record.slots) = (what.stream, what.slots);
        (record.received_at, record.began, record.received) = (now.wall, what.began, now.mono);
        (record.queued_behind, record.considered, record.attempts_total) = (None, None, 0);
        (record.outcome, record.code, record.ended) = (None, "", None);
    }

    /// It waits behind `position` others.
    pub fn waits(&mut self, request: RequestId, position: usize, considered: Option<Considered>) {
        if let Some(record) = self.of(request) {
            record.queued_behind.get_or_insert(position);
            record.considered = considered.or(record.considered);
        }
    }

    /// It is sent to an engine.
    pub fn dispatched(
        &mut self,
        request: RequestId,
        node: &NodeId,
        key: &ReplicaKey,
        considered: Option<Considered>,
        now: Mono,
    ) {
        let Some(record) = self.of(request) else { return };
        record.attempts_total += 1;
        if record.attempts.len() == ATTEMPTS_KEPT {
            record.attempts.remove(0);
        }
        if record.attempts.is_empty() {
            // Mostly the only one.
            record.attempts.reserve_exact(1);
        }
        record.attempts.push(Attempt {
            node: node.clone(),
            key: key.clone(),
            considered,
            sent: now,
            connected: None,
            first_byte: None,
            ended: None,
            status: None,
            failure: None,
        });
    }

    /// The head of an answer came, with this status.
    pub fn answering(&mut self, request: RequestId, status: u16, now: Mono) {
        if let Some(attempt) = self.of(request).and_then(|record| record.attempts.last_mut()) {
            attempt.status = Some(status);
            attempt.first_byte.get_or_insert(now);
        }
    }

    /// The engine's part in it is over; `failure` says what went wrong.
    pub fn attempt_ended(
        &mut self,
        request: RequestId,
        connected: Option<Mono>,
        failure: Option<&str>,
        now: Mono,
    ) {
        if let Some(attempt) = self.of(request).and_then(|record| record.attempts.last_mut()) {
            attempt.connected = connected;
            attempt.ended = Some(now);
            attempt.failure = failure.map(|why| cut(why, REASON_BYTES_MAX).into());
        }
    }

    /// It is over. `code` and `reason` where that needs saying. The first end counts.
    pub fn ended(
        &mut self,
        request: RequestId,
        outcome: Outcome,
        code: &'static str,
        reason: &str,
        now: Mono,
    ) {
        let Some(record) = self.of(request).filter(|record| record.outcome.is_none()) else { return };
        record.outcome = Some(outcome);
        record.code = code;
        refill(&mut record.reason, reason, REASON_BYTES_MAX);
        record.ended = Some(now);
    }

    /// The number of the newest request of this name, if it is remembered, and whether it waits for a slot.
    #[must_use]
    pub fn find(&self, id: &str) -> Option<(RequestId, bool)> {
        let record = self.records.iter().rev().find(|record| record.id == cut(id, NAME_BYTES_MAX))?;
        Some((record.request, record.state() == "waiting"))
    }

    /// `GET /v2/explain/{id}`: everything of one request.
    #[must_use]
    pub fn one(&self, request: RequestId, survey: Option<&Survey>, now: Mono) -> Option<Vec<u8>> {
        let record = &self.records[self.index(request)?];
        serde_json::to_vec(&record.view(survey, now)).ok()
    }

    /// `GET /v2/explain`: the newest, newest first.
    #[must_use]
    pub fn newest(&self, limit: usize, now: Mono) -> Vec<u8> {
        #[derive(Serialize)]
        struct Page<'a> {
            count: usize,
            requests: Vec<RecordView<'a>>,
        }
        let requests = self.records.iter().rev().take(limit).map(|record| record.view(None, now)).collect();
        serde_json::to_vec(&Page { count: self.records.len(), requests }).unwrap_or_default()
    }

    fn index(&self, request: RequestId) -> Option<usize> {
        // Numbers grow by one at least: it lies as far from the end as its number is below the last, or less far.
        let last = self.records.back()?.request;
        let count = self.records.len();
        let first = count.saturating_sub(1 + usize::try_from(last.checked_sub(request)?).unwrap_or(count));
        if self.records.get(first)?.request == request {
            return Some(first);
        }
        let (mut from, mut to) = (first + 1, count);
        while from < to {
            let middle = from + (to - from) / 2;
            match self.records[middle].request.cmp(&request) {
                Ordering::Equal => return Some(middle),
                Ordering::Less => from = middle + 1,
                Ordering::Greater => to = middle,
            }
        }
        None
    }

    fn of(&mut self, request: RequestId) -> Option<&mut Record> {
        let index = self.index(request)?;
        self.records.get_mut(index)
    }
}

fn refill(text: &mut String, with: &str, bytes_max: usize) {
    text.clear();
    text.push_str(cut(with, bytes_max));
}

/// Milliseconds, with three digits behind the point.
fn ms(ns: u64) -> f64 {
    (ns / 1_000) as f64 / 1_000.0
}

#[derive(Serialize)]
struct RecordView<'a> {
    request_id: &'a str,
    path: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    model: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    alias: &'a str,
    stream: bool,
    slots: u32,
    state: &'static str,
    outcome: Option<Outcome>,
    #[serde(skip_serializing_if = "str::is_empty")]
    code: &'static str,
    #[serde(skip_serializing_if = "str::is_empty")]
    reason: &'a str,
    received_at_ms: u64,
    /// From its first byte to its last.
    receive_ms: f64,
    /// From then until it was first sent to an engine, or until now.
    queue_ms: f64,
    /// Until its end, or until now.
    total_ms: f64,
    queued_behind: Option<usize>,
    /// What placement saw when it began to wait.
    #[serde(skip_serializing_if = "Option::is_none")]
    considered: Option<Considered>,
    attempts_total: u32,
    attempts: Vec<AttemptView<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    waiting_for: Option<&'a Survey>,
}

#[derive(Serialize)]
struct AttemptView<'a> {
    node: &'a NodeId,
    pool: &'a str,
    replica: &'a str,
    chosen_by: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    considered: Option<Considered>,
    /// Since it was received, or since the attempt before ended.
    wait_ms: f64,
    /// Since it was sent, each of them.
    connect_ms: Option<f64>,
    first_byte_ms: Option<f64>,
    last_byte_ms: Option<f64>,
    status: Option<u16>,
    #[serde(skip_serializing_if = "Option::is_none")]
    failure: Option<&'a str>,
}

impl Record {
    fn state(&self) -> &'static str {
        match (self.outcome, self.attempts.last()) {
            (Some(_), _) => "over",
            (None, Some(attempt)) if attempt.ended.is_none() => "running",
            (None, _) => "waiting",
        }
    }

    fn view<'a>(&'a self, survey: Option<&'a Survey>, now: Mono) -> RecordView<'a> {
        let end = self.ended.unwrap_or(now);
        // Of attempts that are not kept the time is not known either.
        let mut free_since = self.received;
        let attempts: Vec<AttemptView<'a>> = self
            .attempts
            .iter()
            .map(|attempt| {
                let since_sent = |at: Option<Mono>| at.map(|at| ms(at.ns_since(attempt.sent)));
                let wait_ms = ms(attempt.sent.ns_since(free_since));
                free_since = attempt.ended.unwrap_or(free_since);
                AttemptView {
                    node: &attempt.node,
                    pool: attempt.key.pool.as_str(),
                    replica: attempt.key.replica.as_str(),
                    chosen_by: if attempt.considered.is_some() { "placement" } else { "freed_slot" },
                    considered: attempt.considered,
                    wait_ms,
                    connect_ms: since_sent(attempt.connected),
                    first_byte_ms: since_sent(attempt.first_byte),
                    last_byte_ms: since_sent(attempt.ended.filter(|_| attempt.first_byte.is_some())),
                    status: attempt.status,
                    failure: attempt.failure.as_deref(),
                }
            })
            .collect();
        let first_sent = self.attempts.first().map_or(end, |attempt| attempt.sent);
        RecordView {
            request_id: &self.id,
            path: &self.path,
            model: &self.model,
            alias: &self.alias,
            stream: self.stream,
            slots: self.slots,
            state: self.state(),
            outcome: self.outcome,
            code: self.code,
            reason: &self.reason,
            received_at_ms: self.received_at.unix_ms(),
            receive_ms: ms(self.received.ns_since(self.began)),
            queue_ms: ms(first_sent.ns_since(self.received)),
            total_ms: ms(end.ns_since(self.began)),
            queued_behind: self.queued_behind,
            considered: self.considered,
            attempts_total: self.attempts_total,
            attempts,
            waiting_for: survey,
        }
    }
}

/// Why none of the replicas takes an ask at this moment. Linear in replicas.
#[derive(Debug, Default, PartialEq, Eq, Serialize)]
pub struct Survey {
    /// Replicas that are known.
    pub replicas: u32,
    /// How many of them do not take it, by the first reason.
    pub refused: BTreeMap<&'static str, u32>,
    /// The first few that serve the model and pass the pins, with the reason in words.
    pub named: Vec<Named>,
}

/// One replica in a [`Survey`].
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct Named {
    /// `node/pool/replica`
    pub replica: String,
    /// Why it does not take the request now.
    pub reason: String,
}

impl Survey {
    /// Looks at every replica.
    #[must_use]
    pub fn new(registry: &ServiceRegistry, ask: &Ask) -> Survey {
        let mut survey = Survey::default();
        for (_, replica) in registry.replicas() {
            survey.replicas += 1;
            let obstacle = replica.obstacle();
            let is_short = replica.slots_free() < ask.slots.clamp(1, replica.slots_total.max(1));
            let is_elsewhere = elsewhere(replica, ask);
            let label = match (is_elsewhere, &obstacle) {
                (Some(label), _) => label,
                (None, Some(obstacle)) => label_of(obstacle),
                (None, None) if is_short => "full",
                (None, None) => "others_go_first",
            };
            *survey.refused.entry(label).or_default() += 1;
            if is_elsewhere.is_some() || survey.named.len() == NAMED_MAX {
                continue;
            }
            let reason = match obstacle {
                Some(obstacle) => obstacle.to_string(),
                None if is_short => {
                    format!("{} of {} slots are free", replica.slots_free(), replica.slots_total)
                }
                None => "it fits, and other requests go first".into(),
            };
            survey.named.push(Named { replica: format!("{}/{}", replica.node, replica.key), reason });
        }
        survey
    }
}

/// What of an ask a replica can never meet.
fn elsewhere(replica: &Replica, ask: &Ask) -> Option<&'static str> {
    let model = ask.model.as_deref().filter(|model| !model.is_empty());
    if ask.node.as_ref().is_some_and(|node| *node != replica.node) {
        Some("other_node")
    } else if ask.pool.as_ref().is_some_and(|pool| *pool != replica.key.pool) {
        Some("other_pool")
    } else if ask.device_mask.is_some() && ask.device_mask.as_deref() != replica.device_mask.as_deref() {
        Some("other_devices")
    } else if ask.avoid_pools.contains(&replica.key.pool) {
        Some("avoided_pool")
    } else if model
        .is_some_and(|model| !replica.models.is_empty() && !replica.models.iter().any(|name| name == model))
    {
        Some("other_model")
    } else if !ask.context_is_wish
        && replica.context_length.is_some_and(|longest| ask.context_tokens.unwrap_or(0) > longest)
    {
        Some("shorter_context")
    } else {
        None
    }
}

fn label_of(obstacle: &Obstacle) -> &'static str {
    match obstacle {
        Obstacle::Node(_, NodeStatus::Draining) | Obstacle::Draining => "draining",
        Obstacle::Node(..) => "node",
        Obstacle::Unconfirmed => "unconfirmed",
        Obstacle::AddressUnknown => "address_unknown",
        Obstacle::AddressForbidden => "address_forbidden",
        Obstacle::NotReady(_) => "not_ready",
        Obstacle::NoSlots => "no_slots",
        // What else keeps a replica out is a failure that it has not lived down.
        _ => "failed_lately",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::id::{PoolId, ReplicaId};
    use serde_json::Value;

    fn at(ms: u64) -> Now {
        Now::default().plus_ms(ms)
    }

    fn received(id: &str) -> Received<'_> {
        Received {
            id,
            path: "/v1/completions",
            model: Some("m"),
            alias: None,
            stream: false,
            slots: 1,
            began: at(0).mono,
        }
    }

    fn replica(number: u32) -> (NodeId, ReplicaKey) {
        let pool = PoolId::new("p").expect("an id");
        let replica = ReplicaId::new(&format!("r{number}")).expect("an id");
        (NodeId::new("n").expect("an id"), ReplicaKey { pool, replica })
    }

    fn shown(explain: &Explain, request: RequestId, now: Now) -> Value {
        serde_json::from_slice(&explain.one(request, None, now.mono).expect("remembered")).expect("JSON")
    }

    #[test]
    fn each_phase_of_each_attempt_is_told() {
        let mut explain = Explain::default();
        let seen = Considered { replicas: 9, fitting: 5, placeable: 3, with_room: 0 };
        explain.begin(7, &received("a"), at(4));
        assert_eq!(explain.find("a"), Some((7, true)));
        explain.waits(7, 2, Some(seen));
        let (node, key) = replica(0);
        explain.dispatched(7, &node, &key, None, at(14).mono);
        assert_eq!(explain.find("a"), Some((7, false)));
        explain.attempt_ended(7, None, Some("refused"), at(15).mono);
        let (node, key) = replica(1);
        let again = Considered { with_room: 2, ..seen };
        explain.dispatched(7, &node, &key, Some(again), at(16).mono);
        explain.answering(7, 200, at(20).mono);
        explain.attempt_ended(7, Some(at(17).mono), None, at(26).mono);
        explain.ended(7, Outcome::Answered, "", "", at(26).mono);
        explain.ended(7, Outcome::Withdrawn, "", "", at(27).mono);
        let told = shown(&explain, 7, at(90));
        for (name, wanted) in
            [("receive_ms", 4.0), ("queue_ms", 10.0), ("total_ms", 26.0), ("queued_behind", 2.0)]
        {
            assert_eq!(told[name].as_f64(), Some(wanted), "{name}");
        }
        assert_eq!((&told["outcome"], &told["state"]), (&"answered".into(), &"over".into()));
        assert_eq!(told["considered"]["refused"]["full"], 3);
        let [first, second] = &told["attempts"].as_array().expect("a list")[..] else { panic!("{told}") };
        assert_eq!((&first["failure"], &first["chosen_by"]), (&"refused".into(), &"freed_slot".into()));
        assert_eq!(first["last_byte_ms"], Value::Null);
        assert_eq!(second["considered"]["refused"]["takes_no_work"], 2);
        assert_eq!(second["considered"]["refused"]["other_model_or_place"], 4);
        let times = ["wait_ms", "connect_ms", "first_byte_ms", "last_byte_ms"];
        assert_eq!(times.map(|name| second[name].as_f64()), [1.0, 1.0, 4.0, 10.0].map(Some));
    }

    #[test]
    fn memory_is_bounded_and_the_newest_stay() {
        let mut explain = Explain::new(100);
        let long = "é".repeat(4_000);
        for request in 0..1_000 {
            let id = if request % 2 == 0 { format!("id-{request}") } else { long.clone() };
            explain.begin(request, &Received { model: Some(&long), ..received(&id) }, at(request));
            for number in 0..20 {
                let (node, key) = replica(number);
                explain.dispatched(request, &node, &key, None, at(request).mono);
                explain.attempt_ended(request, None, Some(&long), at(request).mono);
            }
            explain.ended(request, Outcome::Refused, "BUSY", &long, at(request).mono);
        }
        assert_eq!((explain.find("id-898"), explain.find("id-900")), (None, Some((900, false))));
        assert_eq!(explain.find(&long), Some((999, false)), "the newest of a name");
        // What is forgotten may still go on.
        explain.answering(5, 200, at(1).mono);
        let told = shown(&explain, 999, at(0));
        assert_eq!(
            (told["attempts_total"].as_u64(), told["attempts"][0]["replica"].as_str()),
            (Some(20), Some("r12"))
        );
        let bytes: usize = explain
            .records
            .iter()
            .map(|record| {
                let texts = [&record.id, &record.path, &record.model, &record.alias, &record.reason];
                let failures = record.attempts.iter().filter_map(|a| a.failure.as_deref()).map(str::len);
                assert!(record.attempts.capacity() <= ATTEMPTS_KEPT);
                texts.iter().map(|text| text.capacity()).sum::<usize>() + failures.sum::<usize>()
            })
            .sum();
        assert!(bytes <= 100 * 4_096, "{bytes} bytes of text");
        let listed: Value = serde_json::from_slice(&explain.newest(3, at(0).mono)).expect("JSON");
        let ids: Vec<_> =
            listed["requests"].as_array().expect("a list").iter().map(|r| &r["request_id"]).collect();
        assert_eq!((ids.len(), ids[1], listed["count"].as_u64()), (3, &Value::from("id-998"), Some(100)));
    }
}
