//! The world: who lives in it, what will happen, and how time passes.

use std::collections::{BTreeMap, BTreeSet};

use llama_orch::pool_managerd::core::{self as agent_core, CallBody};
use llama_orch::pool_managerd::membership::{Answer, Call};
use llama_orch::replicas::{Fault, ProbeId, ProbeOutcome, ReplicaLease};
use llama_orch::time::{Mono, Now, Wall, earliest};
use llama_orch::wire::id::{NodeId, PoolId, ReplicaKey};
use llama_orch::wire::url::BaseUrl;

use crate::agents::Node;
use crate::control::{Exchange, Site};
use crate::links::Link;
use crate::totals::Totals;

/// Turns at one moment of virtual time after which a core counts as spinning.
const TICKS_AT_ONCE_MAX: u32 = 200;
const NS_PER_MS: u64 = 1_000_000;

/// What will happen.
#[derive(Debug)]
pub(crate) enum Event {
    /// An agent's call reaches a control plane.
    CallArrives {
        from: Caller,
        call: Call,
        body: CallBody,
    },
    /// The call's end reaches the agent.
    CallEnds {
        from: Caller,
        call: Call,
        answer: Answer,
    },
    /// A control plane's question about a pool reaches the agent, and its answer the control plane.
    AgentAsked {
        plane: usize,
        life: u64,
        node: usize,
        pool: PoolId,
    },
    AgentSays {
        plane: usize,
        life: u64,
        node: NodeId,
        pool: PoolId,
        text: String,
    },
    ProbeEnds {
        node: usize,
        life: u64,
        id: ProbeId,
        outcome: ProbeOutcome,
    },
    /// The agent's state file is on the disk, or could not be written.
    Saved {
        node: usize,
        life: u64,
        text: Option<String>,
    },
    /// The agent's watcher has something to do.
    Watch {
        node: usize,
        life: u64,
    },
    /// It is time to look at every name, whatever was told.
    Relist {
        node: usize,
        life: u64,
    },
    /// A writer goes on with a file: the rest of its bytes, or none if it died.
    WriteGoesOn {
        node: usize,
        name: String,
        bytes: Vec<u8>,
        version: u64,
    },
    DirectoryReturns {
        node: usize,
    },
    ExchangeArrives(u64),
    ExchangeAnswers(u64),
    ExchangeEnds(u64),
    ExchangeFails {
        id: u64,
        connect: bool,
        timeout: bool,
    },
    /// The agent notices that a relayed request's caller is gone.
    RelayEnds {
        node: usize,
        life: u64,
        lease: LeaseBox,
    },
    EngineBecomes {
        node: usize,
        port: u16,
        birth: u64,
        phase: EnginePhase,
    },
    ControlResumes {
        plane: usize,
        life: u64,
    },
    AgentResumes {
        node: usize,
        life: u64,
    },
    StartAgent {
        node: usize,
    },
    /// It is asked to stop again.
    StopAgent {
        node: usize,
        life: u64,
    },
    StartControl {
        plane: usize,
    },
    Fault,
    Ask,
    ClientLeaves {
        plane: usize,
        request: u64,
        life: u64,
    },
}

/// Which call of which process, and to whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Caller {
    pub(crate) node: usize,
    pub(crate) life: u64,
    pub(crate) plane: usize,
    pub(crate) id: u64,
    /// The machine's boot.
    pub(crate) boot: u64,
}

/// A lease on its way back.
#[derive(Debug)]
pub(crate) struct LeaseBox(pub(crate) ReplicaLease, pub(crate) Option<(Fault, String)>);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum EnginePhase {
    /// Nothing listens.
    Refusing,
    /// It answers 503.
    Loading,
    Healthy,
}

#[derive(Debug)]
pub(crate) struct Engine {
    pub(crate) phase: EnginePhase,
    pub(crate) birth: u64,
    pub(crate) models: Vec<String>,
    /// Exchanges that it serves.
    pub(crate) running: Vec<u64>,
}

/// How large a story is and how much happens in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Scale {
    pub(crate) nodes: usize,
    pub(crate) planes: usize,
    pub(crate) clients: usize,
    pub(crate) chaos_ms: u64,
    pub(crate) fault_pause_ms: u64,
    pub(crate) ask_pause_ms: u64,
    /// How unreliable links are, in percent.
    pub(crate) loss_percent: u64,
    /// Every so many turns everything is looked at; what a turn touched is looked at in each.
    pub(crate) look_at_all_every: u64,
    pub(crate) admission_capacity: usize,
}

pub(crate) struct World {
    /// With a wall clock that nobody set.
    pub(crate) now: Now,
    pub(crate) random: fastrand::Rng,
    events: BTreeMap<(Mono, u64), Event>,
    next_number: u64,
    pub(crate) nodes: Vec<Node>,
    /// When agents want a turn.
    agents_due: BTreeSet<(Mono, usize)>,
    pub(crate) planes: Vec<Site>,
    /// By node, then control plane.
    pub(crate) links: Vec<Vec<Link>>,
    pub(crate) exchanges: BTreeMap<u64, Exchange>,
    pub(crate) totals: Totals,
    pub(crate) trace_hash: u64,
    /// Of what became of nodes and their calls, and nothing else.
    pub(crate) membership_hash: u64,
    trace: bool,
    pub(crate) scale: Scale,
    /// Faults happen and clients ask.
    pub(crate) chaos: bool,
    pub(crate) loss_percent: u64,
    /// Jumps of wall clocks are carried out, not only drawn.
    pub(crate) clocks_jump: bool,
    /// Nobody loses state or gets a twin: for these only wall clocks decide.
    pub(crate) only_clocks: bool,
    pub(crate) is_silent_story: bool,
    pub(crate) turns: u64,
}

impl World {
    /// An empty world of this size.
    pub(crate) fn new(random: fastrand::Rng, scale: Scale) -> World {
        World {
            now: Now { mono: Mono(1_000_000_000), wall: Wall(1_700_000_000_000_000_000) },
            random,
            events: BTreeMap::new(),
            next_number: 1,
            nodes: Vec::new(),
            agents_due: BTreeSet::new(),
            planes: Vec::new(),
            links: Vec::new(),
            exchanges: BTreeMap::new(),
            totals: Totals::default(),
            trace_hash: 0xcbf2_9ce4_8422_2325,
            membership_hash: 0xcbf2_9ce4_8422_2325,
            trace: std::env::var_os("SIM_TRACE").is_some(),
            scale,
            chaos: true,
            loss_percent: scale.loss_percent,
            clocks_jump: true,
            only_clocks: false,
            is_silent_story: false,
            turns: 0,
        }
    }

    /// A number that was not used before.
    pub(crate) fn number(&mut self) -> u64 {
        self.next_number += 1;
        self.next_number
    }

    pub(crate) fn after(&mut self, ms: u64, event: Event) {
        let number = self.number();
        self.events.insert((self.now.mono.plus_ms(ms), number), event);
    }

    pub(crate) fn chance(&mut self, percent: u64) -> bool {
        self.random.u64(0..100) < percent
    }

    #[allow(clippy::print_stdout, reason = "the trace is what it is asked for")]
    pub(crate) fn note(&mut self, text: &str) {
        mix(&mut self.trace_hash, self.now.mono, text);
        if self.trace {
            println!("{:?} {text}", self.now.mono);
        }
    }

    /// Something became of a node.
    pub(crate) fn note_member(&mut self, text: &str) {
        mix(&mut self.membership_hash, self.now.mono, text);
    }

    /// The time as a machine whose wall clock is off by so much has it.
    pub(crate) fn now_at(&self, wall_offset_ms: i64) -> Now {
        let offset_ns = wall_offset_ms.unsigned_abs() * NS_PER_MS;
        let wall = self.now.wall.0;
        let wall = if wall_offset_ms < 0 { wall - offset_ns } else { wall + offset_ns };
        Now { mono: self.now.mono, wall: Wall(wall) }
    }

    fn advance(&mut self, to: Mono) {
        self.now = Now { mono: to, wall: Wall(self.now.wall.0 + to.ns_since(self.now.mono)) };
    }

    /// An agent had a turn, began or ended: when it wants the next one may have changed.
    pub(crate) fn agent_touched(&mut self, node: usize) {
        let known = &mut self.nodes[node];
        if let Some(at) = known.due.take() {
            self.agents_due.remove(&(at, node));
        }
        let agent = known.agent.as_ref().filter(|agent| !agent.stalled);
        known.due = agent.and_then(|agent| agent.core.deadline());
        self.agents_due.extend(known.due.map(|at| (at, node)));
    }

    /// Lets time pass until `until`: events in their order, and every core's `Tick` when it is due.
    pub(crate) fn run_until(&mut self, until: Mono) {
        let mut ticks = 0;
        loop {
            let event = self.events.first_key_value().map(|((at, _), _)| *at);
            let mut due = self.agents_due.first().map(|(at, _)| *at);
            for site in &self.planes {
                due = earliest(due, site.deadline());
            }
            let Some(at) = earliest(event, due).filter(|at| *at <= until) else { break };
            if at > self.now.mono {
                self.advance(at);
                ticks = 0;
            }
            if event.is_some_and(|event| event <= self.now.mono) {
                let (_, event) = self.events.pop_first().expect("looked at");
                self.happen(event);
            } else {
                ticks += 1;
                let who = self.tick_who_is_due();
                assert!(
                    ticks < TICKS_AT_ONCE_MAX,
                    "the deadline of {who} does not move: its daemon would spin"
                );
            }
        }
        self.advance(until);
    }

    pub(crate) fn run_for(&mut self, ms: u64) {
        self.run_until(self.now.mono.plus_ms(ms));
    }

    fn tick_who_is_due(&mut self) -> String {
        let now = self.now.mono;
        if let Some(&(at, node)) = self.agents_due.first()
            && at <= now
        {
            self.agent_turn(node, Vec::new());
            return format!("n{node}");
        }
        for plane in 0..self.planes.len() {
            if self.planes[plane].deadline().is_some_and(|at| at <= now) {
                self.control_turn(plane);
                return format!("control plane {plane}");
            }
        }
        String::new()
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::CallArrives { from, call, body } => self.call_arrives(from, call, body),
            Event::CallEnds { from, call, answer } => self.call_ended(from, call, answer),
            Event::AgentAsked { plane, life, node, pool } => self.agent_asked(plane, life, node, &pool),
            Event::AgentSays { plane, life, node, pool, text } => {
                self.agent_says(plane, life, node, pool, &text);
            }
            Event::ProbeEnds { node, life, id, outcome } => {
                self.agent_input(node, life, agent_core::Input::Probed(id, outcome));
            }
            Event::Saved { node, life, text } => self.saved(node, life, text),
            Event::Watch { node, life } => self.watch(node, life),
            Event::Relist { node, life } => self.relist(node, life),
            Event::WriteGoesOn { node, name, bytes, version } => {
                self.write_goes_on(node, &name, bytes, version);
            }
            Event::DirectoryReturns { node } => self.directory_returns(node),
            Event::ExchangeArrives(id) => self.exchange_arrives(id),
            Event::ExchangeAnswers(id) => self.exchange_answers(id),
            Event::ExchangeEnds(id) => self.exchange_ends(id),
            Event::ExchangeFails { id, connect, timeout } => self.exchange_failed(id, connect, timeout),
            Event::RelayEnds { node, life, lease: LeaseBox(lease, fault) } => {
                self.agent_input(node, life, agent_core::Input::Relayed { lease, fault });
            }
            Event::EngineBecomes { node, port, birth, phase } => {
                let engine = self.nodes[node].engines.get_mut(&port);
                if let Some(engine) = engine.filter(|engine| engine.birth == birth) {
                    engine.phase = phase;
                    self.note(&format!("n{node} engine {port} becomes {phase:?}"));
                }
            }
            Event::ControlResumes { plane, life } => self.control_resumes(plane, life),
            Event::AgentResumes { node, life } => self.agent_resumes(node, life),
            Event::StartAgent { node } => self.start_agent(node),
            Event::StopAgent { node, life } => {
                if self.agent(node, life).is_some() {
                    self.stop_agent(node);
                }
            }
            Event::StartControl { plane } => self.start_control(plane),
            Event::Fault => self.fault(),
            Event::Ask => self.ask(),
            Event::ClientLeaves { plane, request, life } => self.client_leaves(plane, request, life),
        }
    }
}

fn mix(hash: &mut u64, at: Mono, text: &str) {
    for byte in at.0.to_le_bytes().iter().chain(text.as_bytes()) {
        *hash = (*hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3);
    }
}

pub(crate) fn url(text: &str) -> BaseUrl {
    BaseUrl::new(text).expect("a URL")
}

/// A replica of a node, for maps.
pub(crate) type Place = (NodeId, ReplicaKey, u64);
