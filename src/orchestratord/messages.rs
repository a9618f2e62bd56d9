//! What goes into the control plane's core and what comes out of it. Pure: values only.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::Deserialize;

use crate::metrics::Histogram;
use crate::replicas::drain_routes::DrainOrder;
use crate::replicas::{
    Activity, EnginePolicy, Listing, ProbeId, ProbeOrder, ProbeOutcome, ProcessOrder, ProcessSeen, Trouble,
};
use crate::service::events::Tell;
use crate::wire::id::{NodeId, PoolId, ReplicaKey};
use crate::wire::node::{Heartbeat, HeartbeatReply, RegisterReply, RegisterRequest};
use crate::wire::pool::{AgentReport, ReplicaStatus};
use crate::wire::url::BaseUrl;

use super::admission::Priority;
use super::explain::Considered;
use super::meters::Metered;
use super::placement::{Ask, Strategy};
use super::poller::{PollId, PollOrder};
use super::refusal::Refusal;
use super::saved::{Piece, Saved};
use super::service_registry::{Limits, Target};
use super::workers::WorkerOrder;

/// Names a request, or a call of a node, until it is answered.
pub type RequestId = u64;

/// What a client wants placed.
#[derive(Clone, Debug)]
pub struct Asked {
    /// What it needs.
    pub ask: Ask,
    /// How urgent it is.
    pub priority: Priority,
    /// With whom it shares a turn in the queue.
    pub client: Arc<str>,
    /// Longest wait, in milliseconds; the configured limit if that is shorter.
    pub wait_ms_max: u64,
    /// That is the time by which the client wants it to start: who cannot be served until then is refused
    /// at once, as far as can be told.
    pub is_deadline: bool,
}

/// How an exchange with an engine ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The answer is complete.
    Complete,
    /// The client left, or the request was cancelled.
    Withdrawn,
    /// This process had no means to try: descriptors, exchanges. The engine has no part in it.
    NotTried(String),
    /// The engine failed.
    Failed {
        /// Why, for people.
        reason: String,
        /// No connection.
        connect: bool,
        /// It was too slow.
        timeout: bool,
        /// The client has seen a part of the answer.
        answered: bool,
    },
    /// The engine broke, for this reason, when a byte of its answer had come that its client has not seen. The
    /// request must not be sent again: it may have had its effect.
    BrokenOff(String),
    /// The engine said that it is not ready. Nothing of that has reached the client.
    NotReady {
        /// What it said, for people.
        reason: String,
        /// How long it wants to be left alone, in milliseconds.
        pause_ms: u64,
    },
    /// It was ended as [`Effect::Abort`] demanded.
    Aborted {
        /// The client has seen a part of the answer.
        answered: bool,
    },
}

/// Why a poll brought no report. Displayed to people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PollError {
    /// No answer.
    Unreachable(String),
    /// An answer that is no report.
    Unusable(String),
}

/// `POST /callbacks/pool-ready`: a hint that a pool became ready, or stopped being ready.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct PoolReady {
    /// The pool.
    pub pool_id: PoolId,
    /// Its node.
    #[serde(default)]
    pub node_id: Option<NodeId>,
    /// Of the agent, or of an engine. Compared with what is known, never dialled for being named here.
    #[serde(default)]
    pub url: Option<String>,
}

/// What happened.
#[derive(Debug)]
pub enum Input {
    /// A node registers.
    Register {
        /// Whom to answer.
        reply: RequestId,
        /// Where it came from.
        peer: String,
        /// What it says.
        body: Box<RegisterRequest>,
    },
    /// A node beats.
    Heartbeat {
        /// Whom to answer.
        reply: RequestId,
        /// Where it came from.
        peer: String,
        /// Which node.
        node: NodeId,
        /// What it says.
        body: Box<Heartbeat>,
    },
    /// A node leaves.
    Deregister {
        /// Whom to answer.
        reply: RequestId,
        /// Which node.
        node: NodeId,
        /// Which start of it.
        incarnation: Option<u64>,
    },
    /// What an earlier start of the control plane saved.
    Restore(Saved),
    /// A piece that was not the last one of a save has been written.
    PieceWritten,
    /// The last [`Effect::Save`] ended, with the reason if it failed.
    Saved(Result<(), String>),
    /// Something is wrong with what was saved, or with where it is kept, for people.
    StateTrouble(String),
    /// What was found in the local runtime directory.
    Listing(Listing),
    /// Something is wrong with the local runtime directory, or no longer is.
    WatchTrouble(Option<Trouble>),
    /// What was seen of the process of a local replica's generation.
    Process(ReplicaKey, u64, ProcessSeen),
    /// What the requests on a local replica's generation have been doing.
    Active {
        /// The replica.
        key: ReplicaKey,
        /// Its generation.
        generation: u64,
        /// What they have been doing.
        activity: Activity,
    },
    /// An operator drains local engines, or gives them work again.
    Drain(DrainOrder),
    /// A worker comes or goes.
    Worker(WorkerOrder),
    /// A probe of a local engine ended.
    Probed(ProbeId, ProbeOutcome),
    /// A node's agent told about a pool.
    AgentSaid {
        /// The node.
        node: NodeId,
        /// The pool.
        pool: PoolId,
        /// Its replicas.
        replicas: Vec<ReplicaStatus>,
    },
    /// A node's agent has accepted an order about a pool.
    PoolOrdered {
        /// The node.
        node: NodeId,
        /// The pool.
        pool: PoolId,
        /// No new work, rather than work again.
        draining: bool,
    },
    /// A poll ended.
    Polled(PollId, Result<Box<AgentReport>, PollError>),
    /// Somebody says that there is news of a pool.
    PoolReady {
        /// Whom to answer.
        reply: RequestId,
        /// What it says.
        notice: PoolReady,
    },
    /// A request wants a slot.
    Ask {
        /// The request.
        request: RequestId,
        /// What it wants.
        asked: Box<Asked>,
    },
    /// A request that was just asked for may take so long altogether, in milliseconds.
    Limit {
        /// The request.
        request: RequestId,
        /// From its ask to the last byte of its answer.
        total_ms: u64,
    },
    /// What was measured of an exchange that is about to end.
    Metered(RequestId, Metered),
    /// The head of an engine's answer came.
    Answering(RequestId),
    /// A request's answer, which has come but whose exchange has not ended, was read token by token.
    Measured {
        /// The request.
        request: RequestId,
        /// From dispatch to its first token.
        first_token_ms: u64,
        /// Its tokens.
        tokens: u64,
        /// From the first to the last one.
        decode_ms: u64,
    },
    /// An exchange ended.
    Ended(RequestId, Ending),
    /// A waiting request is no longer wanted.
    Withdraw(RequestId),
    /// End gracefully.
    Shutdown,
    /// The deadline has passed.
    Tick,
}

/// What to do about it.
#[derive(Debug)]
pub enum Effect {
    /// Answer a registration.
    Registered(RequestId, RegisterReply),
    /// Answer a heartbeat.
    Beaten(RequestId, HeartbeatReply),
    /// Answer a deregistration.
    Removed(RequestId),
    /// Answer a notice.
    Noted(RequestId),
    /// Ask an agent for its report.
    Poll(PollOrder),
    /// Refuse a request or a call.
    Refuse(RequestId, Refusal),
    /// A request waits.
    Waiting {
        /// The request.
        request: RequestId,
        /// So many of those who ask for the same go first.
        position: usize,
        /// When it may be its turn, in milliseconds from now; `None` where nothing was measured that
        /// could tell.
        predicted_ms: Option<u64>,
        /// Why no replica that could serve it takes work, if that is what it waits for.
        not_ready: Option<String>,
        /// What placement saw, where this is news.
        considered: Option<Considered>,
    },
    /// Send a request to an engine.
    Dispatch(RequestId, Dispatch),
    /// End an exchange, if it still runs. [`Ending::Aborted`] is the answer.
    Abort {
        /// The request.
        request: RequestId,
        /// Why, for people.
        reason: String,
        /// Also where the answer has begun.
        even_answered: bool,
    },
    /// Watch a process, or forget it.
    Process(ProcessOrder),
    /// Send a probe.
    Probe(ProbeOrder),
    /// Ask a node's agent for a pool's status.
    AskAgent {
        /// The node.
        node: NodeId,
        /// The pool.
        pool: PoolId,
        /// The agent.
        agent: BaseUrl,
    },
    /// Encode this, elsewhere than on the loop, and write it all with the last piece; [`Input::Saved`] is
    /// the answer.
    Save(Piece),
    /// Tell the log.
    Log(Arc<dyn Tell>),
    /// Everything has been finished or given up: end the process.
    Exit,
}

/// Where a request goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dispatch {
    /// The node.
    pub node: NodeId,
    /// The replica there.
    pub key: ReplicaKey,
    /// The engine process behind the name.
    pub generation: u64,
    /// How it is reached.
    pub target: Target,
    /// Slots that were taken.
    pub slots: u32,
    /// File with the engine's own key, where this process can read it.
    pub auth_file: Option<String>,
    /// What placement saw; `None` for a freed slot that was handed to the first in the queue.
    pub considered: Option<Considered>,
}

/// What the core is told at start.
#[derive(Debug)]
pub struct Options {
    /// Times of the registry.
    pub limits: Limits,
    /// How replicas are chosen.
    pub strategy: Strategy,
    /// Whether requests with the same beginning go to the same replica, where that costs no balance.
    pub prefix_affinity: bool,
    /// Sessions of which placement remembers where they were served.
    pub served_sessions_max: usize,
    /// Requests that may wait.
    pub admission_capacity: usize,
    /// How long one waits.
    pub admission_timeout_ms: u64,
    /// Limit of a graceful shutdown.
    pub drain_timeout_ms: u64,
    /// How long all answers of a local engine may stand still before it is suspected.
    pub hang_suspect_ms: u64,
    /// In the HOME profile: this machine's name, and where its engines may be.
    pub local: Option<(NodeId, EnginePolicy)>,
    /// Agents that are polled, every [`Limits::poll_interval_ms`].
    pub polled: Vec<BaseUrl>,
    /// In the CLOUD profile: the rules for addresses that nodes name.
    pub addresses: Option<EnginePolicy>,
    /// Decides the random strategy and the jitter of polls.
    pub seed: u64,
}

/// Counters and durations for the metrics.
#[derive(Clone, Debug, Default)]
pub struct Counts {
    /// Requests that an engine answered.
    pub answered: u64,
    /// Requests whose client left.
    pub withdrawn: u64,
    /// Requests whose engine failed after part of the answer had been forwarded.
    pub broken: u64,
    /// Requests sent to another engine after a failure.
    pub retried: u64,
    /// Exchanges that engines failed.
    pub failures: Failures,
    /// Refusals by their label.
    pub refused: BTreeMap<&'static str, u64>,
    /// Registrations accepted.
    pub registrations: u64,
    /// Heartbeats accepted.
    pub heartbeats: u64,
    /// Messages of nodes that were refused.
    pub fenced: u64,
    /// Polls that ended, by what came of them.
    pub polls: BTreeMap<&'static str, u64>,
    /// Times that the registry was saved.
    pub saves: u64,
    /// Times that it could not be saved.
    pub saves_failed: u64,
    /// From ask to dispatch.
    pub waited: Histogram,
    /// From dispatch to the answer's head.
    pub first_byte: Histogram,
    /// From ask to end, answered requests only.
    pub duration: Histogram,
}

/// Exchanges that engines failed, by what that means for them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Failures {
    /// No connection.
    pub connect: u64,
    /// Reset, cut off, or answered with 502, 503 or 504.
    pub broken: u64,
    /// Too slow.
    pub timeout: u64,
    /// Not ready, as the engine said itself.
    pub not_ready: u64,
    /// Its node vanished before the answer began.
    pub vanished: u64,
}

impl Failures {
    /// One more.
    pub fn add(&mut self, connect: bool, timeout: bool) {
        match (connect, timeout) {
            (_, true) => self.timeout += 1,
            (true, false) => self.connect += 1,
            (false, false) => self.broken += 1,
        }
    }
}
