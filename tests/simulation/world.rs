//! The world: who lives in it, what travels through it, and how a turn of each daemon goes.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use llama_orch::orchestratord::core::{self as control_core, Asked, Dispatch, Ending, Options};
use llama_orch::orchestratord::placement::Strategy;
use llama_orch::orchestratord::poller::PollId;
use llama_orch::orchestratord::refusal::Refusal;
use llama_orch::orchestratord::saved::Saved as Registered;
use llama_orch::orchestratord::service_registry::{Limits, Target};
use llama_orch::pool_managerd::core::{self as agent_core, CallBody, Identity};
use llama_orch::pool_managerd::membership::{Answer, Call};
use llama_orch::pool_managerd::saved::Saved;
use llama_orch::replicas::{
    AllowList, EnginePolicy, Facts, Fault, ListedFile, Listing, ProbeId, ProbeKind, ProbeOrder, ProbeOutcome,
    ReplicaLease,
};
use llama_orch::time::{Mono, Now, Wall, earliest};
use llama_orch::wire::id::{NodeId, ReplicaKey};
use llama_orch::wire::node::Capabilities;
use llama_orch::wire::url::BaseUrl;

use crate::polls::PollOutcome;
use crate::rules::Ledger;

/// Between listings of a runtime directory when no event tells of a change.
const RELIST_MS: u64 = 5_000;
/// How long an unreachable peer is waited for.
const CONNECT_TIMEOUT_MS: u64 = 2_000;
/// The longest shutdown: the drain, and a turn.
const CONTROL_EXIT_MS: u64 = 10_000 + 100;
/// Turns at one moment of virtual time after which a core counts as spinning.
const TICKS_AT_ONCE_MAX: u32 = 50;

/// What happened over all seeds: a simulation in which nothing happens proves nothing.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Totals {
    pub(crate) answered: u64,
    pub(crate) refused: u64,
    pub(crate) withdrawn: u64,
    pub(crate) broken: u64,
    pub(crate) cut_off: u64,
    pub(crate) waited: u64,
    pub(crate) retried: u64,
    pub(crate) heartbeats: u64,
    pub(crate) fenced: u64,
    pub(crate) suspects: u64,
    pub(crate) holds: u64,
    pub(crate) agent_exits: u64,
    pub(crate) control_exits: u64,
    pub(crate) restored: u64,
    pub(crate) faults: u64,
    pub(crate) polls: u64,
}

impl Totals {
    pub(crate) fn add(&mut self, other: &Totals) {
        let pairs = [
            (&mut self.answered, other.answered),
            (&mut self.refused, other.refused),
            (&mut self.withdrawn, other.withdrawn),
            (&mut self.broken, other.broken),
            (&mut self.cut_off, other.cut_off),
            (&mut self.waited, other.waited),
            (&mut self.retried, other.retried),
            (&mut self.heartbeats, other.heartbeats),
            (&mut self.fenced, other.fenced),
            (&mut self.suspects, other.suspects),
            (&mut self.holds, other.holds),
            (&mut self.agent_exits, other.agent_exits),
            (&mut self.control_exits, other.control_exits),
            (&mut self.restored, other.restored),
            (&mut self.faults, other.faults),
            (&mut self.polls, other.polls),
        ];
        pairs.into_iter().for_each(|(sum, one)| *sum += one);
    }

    /// Every kind of story was told.
    pub(crate) fn assert_eventful(&self) {
        let Totals { answered, refused, withdrawn, broken, cut_off, waited, retried, .. } = *self;
        let Totals { heartbeats, fenced, suspects, holds, agent_exits, control_exits, .. } = *self;
        let Totals { restored, faults, .. } = *self;
        assert!(self.polls > 0, "no answer to a poll counted: {self:?}");
        let requests = [answered, refused, withdrawn, broken, cut_off, waited, retried];
        let members = [heartbeats, fenced, suspects, holds, agent_exits, control_exits, restored, faults];
        assert!(requests.iter().chain(&members).all(|count| *count > 0), "nothing of a kind: {self:?}");
    }
}

/// What will happen.
#[derive(Debug)]
pub(crate) enum Event {
    /// An agent's call reaches the control plane.
    CallArrives {
        node: usize,
        life: u64,
        id: u64,
        body: CallBody,
    },
    /// The call's end reaches the agent.
    CallEnds {
        node: usize,
        life: u64,
        id: u64,
        call: Call,
        answer: Answer,
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
    List {
        node: usize,
        life: u64,
        again: bool,
    },
    /// A poll reaches an agent.
    PollArrives {
        node: usize,
        life: u64,
        id: PollId,
    },
    /// A poll's end reaches the control plane.
    PollEnds {
        node: usize,
        life: u64,
        id: PollId,
        outcome: PollOutcome,
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
        life: u64,
    },
    StartAgent {
        node: usize,
    },
    StartControl,
    Fault,
    Ask,
    ClientLeaves {
        request: u64,
        life: u64,
    },
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

/// One machine.
pub(crate) struct Node {
    pub(crate) id: NodeId,
    pub(crate) agent: Option<Agent>,
    pub(crate) incarnation: u64,
    pub(crate) boot: u64,
    /// The state file.
    pub(crate) saved: Option<String>,
    pub(crate) files: BTreeMap<Arc<str>, ListedFile>,
    pub(crate) engines: BTreeMap<u16, Engine>,
    /// Until when calls to, and answers from, the control plane are lost on the way.
    pub(crate) up_cut_until: Mono,
    /// The other way, which is that of requests too.
    pub(crate) down_cut_until: Mono,
}

/// A running node agent.
pub(crate) struct Agent {
    pub(crate) core: agent_core::Core,
    pub(crate) life: u64,
    pub(crate) call: Option<(u64, Call)>,
    /// When a shutdown must be over.
    pub(crate) exit_by: Option<Mono>,
}

/// A running control plane.
pub(crate) struct Control {
    pub(crate) core: control_core::Core,
    pub(crate) life: u64,
    pub(crate) calls: BTreeMap<u64, PendingCall>,
    pub(crate) exchanges: BTreeMap<u64, Exchange>,
    pub(crate) ledger: Ledger,
    pub(crate) stalled: bool,
    pub(crate) inbox: VecDeque<Arrival>,
    pub(crate) exit_by: Option<Mono>,
}

/// A node's call that the control plane has not answered.
pub(crate) struct PendingCall {
    node: usize,
    life: u64,
    id: u64,
    pub(crate) body: CallBody,
}

/// A request on its way to, or on, an engine.
#[derive(Debug)]
pub(crate) struct Exchange {
    pub(crate) request: u64,
    pub(crate) dispatch: Dispatch,
    node: usize,
    engine: Option<u16>,
    lease: Option<(u64, ReplicaLease)>,
    answered: bool,
}

/// What the control plane's sockets bring.
#[derive(Debug)]
pub(crate) enum Arrival {
    Call { node: usize, life: u64, id: u64, body: CallBody },
    Ask(Box<Asked>),
    Leaves(u64),
    Answering(u64),
    Polled(PollId, PollOutcome),
    Ended { exchange: u64, request: u64, ending: Ending },
    Shutdown,
}

pub(crate) struct World {
    pub(crate) now: Now,
    pub(crate) random: fastrand::Rng,
    events: BTreeMap<(Mono, u64), Event>,
    next_number: u64,
    pub(crate) nodes: Vec<Node>,
    pub(crate) control: Option<Control>,
    /// The control plane's state file.
    registered: Option<Vec<u8>>,
    pub(crate) totals: Totals,
    pub(crate) trace_hash: u64,
    trace: bool,
    /// Faults happen and clients ask.
    pub(crate) chaos: bool,
    /// How unreliable links are in this story, in percent.
    pub(crate) loss_percent: u64,
    pub(crate) ask_pause_ms: u64,
    /// The control plane polls the agents that it does not hear.
    pub(crate) polls: bool,
}

impl World {
    pub(crate) fn new(seed: u64) -> World {
        let mut random = fastrand::Rng::with_seed(seed);
        let start = Now { mono: Mono(1_000_000_000), wall: Wall(1_700_000_000_000_000_000) };
        let nodes = (0..random.usize(2..=4)).map(|index| Node {
            id: NodeId::new(&format!("n{index}")).expect("an id"),
            agent: None,
            incarnation: 0,
            boot: 1,
            saved: None,
            files: BTreeMap::new(),
            engines: BTreeMap::new(),
            up_cut_until: Mono(0),
            down_cut_until: Mono(0),
        });
        let nodes = nodes.collect();
        let loss_percent = [0, 2, 10][random.usize(..3)];
        let ask_pause_ms = [200, 600, 2_000][random.usize(..3)];
        World {
            now: start,
            random,
            events: BTreeMap::new(),
            next_number: 1,
            nodes,
            control: None,
            registered: None,
            totals: Totals::default(),
            trace_hash: 0xcbf2_9ce4_8422_2325,
            trace: std::env::var_os("SIM_TRACE").is_some(),
            chaos: true,
            loss_percent,
            ask_pause_ms,
            polls: seed.is_multiple_of(2),
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
        for byte in self.now.mono.0.to_le_bytes().iter().chain(text.as_bytes()) {
            self.trace_hash = (self.trace_hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3);
        }
        if self.trace {
            println!("{:?} {text}", self.now.mono);
        }
    }

    /// Lets time pass until `until`: events in their order, and every core's `Tick` when it is due.
    pub(crate) fn run_until(&mut self, until: Mono) {
        let mut ticks = 0;
        loop {
            let event = self.events.first_key_value().map(|((at, _), _)| *at);
            let control = self.control.as_ref().filter(|control| !control.stalled);
            let mut due = control.and_then(|control| control.core.deadline());
            for agent in self.nodes.iter().filter_map(|node| node.agent.as_ref()) {
                due = earliest(due, agent.core.deadline());
            }
            let Some(at) = earliest(event, due).filter(|at| *at <= until) else { break };
            if at > self.now.mono {
                self.now = Now { mono: at, wall: Wall(self.now.wall.0 + at.ns_since(self.now.mono)) };
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
        self.now = Now { mono: until, wall: Wall(self.now.wall.0 + until.ns_since(self.now.mono)) };
    }

    fn tick_who_is_due(&mut self) -> String {
        let now = self.now.mono;
        let mut who = String::new();
        for node in 0..self.nodes.len() {
            let agent = self.nodes[node].agent.as_ref();
            if agent.and_then(|agent| agent.core.deadline()).is_some_and(|at| at <= now) {
                who = format!("n{node}");
                self.agent_turn(node, Vec::new());
            }
        }
        let control = self.control.as_ref().filter(|control| !control.stalled);
        if control.and_then(|control| control.core.deadline()).is_some_and(|at| at <= now) {
            who = "the control plane".into();
            self.control_turn();
        }
        who
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::CallArrives { node, life, id, body } => {
                if self.control.is_some() {
                    self.arrive(Arrival::Call { node, life, id, body });
                } else {
                    let answer = Answer::Failed("connection refused".into());
                    self.answer(node, life, id, call_of(&body), answer);
                }
            }
            Event::CallEnds { node, life, id, call, answer } => self.call_ended(node, life, id, call, answer),
            Event::ProbeEnds { node, life, id, outcome } => {
                self.agent_input(node, life, agent_core::Input::Probed(id, outcome));
            }
            Event::Saved { node, life, text } => {
                if self.agent(node, life).is_some() {
                    let result = text.as_ref().map(|_| ()).ok_or_else(|| "the disk is full".to_string());
                    self.nodes[node].saved = text.or(self.nodes[node].saved.take());
                    self.agent_input(node, life, agent_core::Input::Saved(result));
                }
            }
            Event::List { node, life, again } => {
                if self.agent(node, life).is_some() {
                    if again {
                        self.after(RELIST_MS, Event::List { node, life, again });
                    }
                    let listing = Listing::whole(self.nodes[node].files.values().cloned().collect());
                    self.agent_input(node, life, agent_core::Input::Listing(listing));
                }
            }
            Event::PollArrives { node, life, id } => self.poll_arrives(node, life, id),
            Event::PollEnds { node, life, id, outcome } => self.poll_ends(node, life, id, outcome),
            Event::ExchangeArrives(id) => self.exchange_arrives(id),
            Event::ExchangeAnswers(id) => self.exchange_answers(id),
            Event::ExchangeEnds(id) => {
                let Some(exchange) = self.exchange(id) else { return };
                let (node, answered) = (exchange.node, exchange.answered);
                if self.is_cut(node) || !answered {
                    let timeout = self.chance(30);
                    self.exchange_failed(id, false, timeout);
                } else {
                    self.end_exchange(id, Ending::Complete, None);
                }
            }
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
            Event::ControlResumes { life } => {
                if let Some(control) = self.control.as_mut().filter(|control| control.life == life) {
                    control.stalled = false;
                    self.control_turn();
                }
            }
            Event::StartAgent { node } => self.start_agent(node),
            Event::StartControl => self.start_control(),
            Event::Fault => self.fault(),
            Event::Ask => self.ask(),
            Event::ClientLeaves { request, life } => {
                if self.control.as_ref().is_some_and(|control| control.life == life) {
                    self.arrive(Arrival::Leaves(request));
                }
            }
        }
    }

    // Node agents.

    pub(crate) fn start_agent(&mut self, node: usize) {
        if self.nodes[node].agent.is_some() {
            return;
        }
        let (life, seed, now) = (self.number(), self.random.u64(..), self.now);
        let known = &mut self.nodes[node];
        known.incarnation = now.wall.unix_ms().max(known.incarnation + 1);
        let identity = Identity {
            node_id: known.id.clone(),
            machine_id: known.id.to_string(),
            address: Some(url(&format!("http://10.0.0.{}:9200", node + 1))),
            pools: Vec::new(),
            capabilities: Capabilities::default(),
            incarnation: known.incarnation,
            boot_id: Some(format!("boot-{node}-{}", known.boot)),
        };
        let own = vec![std::net::IpAddr::from([10, 0, 0, u8::try_from(node + 1).expect("few nodes")])];
        let policy = EnginePolicy::new(own, Some(9200), AllowList::default(), "ALLOW");
        let drain_ms = 10_000;
        let options = agent_core::Options {
            control_planes: vec![url("http://10.0.1.1:8080")],
            heartbeat_interval_ms: 10_000,
            drain_timeout_ms: drain_ms,
            ..agent_core::Options::default()
        };
        let core = agent_core::Core::new(identity, policy, &options, seed, now);
        known.agent = Some(Agent { core, life, call: None, exit_by: None });
        self.note(&format!("n{node} agent starts"));
        self.after(RELIST_MS, Event::List { node, life, again: true });
        let listing = Listing::whole(self.nodes[node].files.values().cloned().collect());
        let saved = self.nodes[node].saved.clone();
        let saved = saved.map(|text| Saved::read(text.as_bytes()).expect("what was saved can be read"));
        let inputs = saved.map(agent_core::Input::Restore).into_iter();
        self.agent_turn(node, inputs.chain([agent_core::Input::Listing(listing)]).collect());
    }

    fn agent(&mut self, node: usize, life: u64) -> Option<&mut Agent> {
        self.nodes[node].agent.as_mut().filter(|agent| agent.life == life)
    }

    fn agent_input(&mut self, node: usize, life: u64, input: agent_core::Input) {
        if self.agent(node, life).is_some() {
            self.agent_turn(node, vec![input]);
        }
    }

    /// One turn of an agent's loop: what arrived, then `Tick`; effects are carried out after each.
    pub(crate) fn agent_turn(&mut self, node: usize, inputs: Vec<agent_core::Input>) {
        for input in inputs.into_iter().chain([agent_core::Input::Tick]) {
            let now = self.now;
            let Some(agent) = &mut self.nodes[node].agent else { return };
            let mut effects = Vec::new();
            agent.core.handle(input, now, &mut effects);
            agent.core.check_invariants();
            for effect in effects {
                self.agent_effect(node, effect);
            }
        }
    }

    fn agent_effect(&mut self, node: usize, effect: agent_core::Effect) {
        let (id, delay_ms) = (self.number(), self.delay_ms());
        let Some(agent) = &mut self.nodes[node].agent else { return };
        let life = agent.life;
        match effect {
            agent_core::Effect::Probe(order) => self.probe(node, life, order),
            agent_core::Effect::Call { order, body, .. } => {
                let text = format!("n{node} calls {:?}", order.call);
                assert!(agent.call.is_none(), "n{node} calls {:?} during {:?}", order.call, agent.call);
                assert_eq!(call_of(&body), order.call, "n{node}: a body of another call");
                agent.call = Some((id, order.call));
                self.note(&text);
                let gone = Answer::Failed("timed out".into());
                let ends = Event::CallEnds { node, life, id, call: order.call, answer: gone };
                self.after(order.timeout_ms, ends);
                if self.nodes[node].up_cut_until > self.now.mono || self.chance(self.loss_percent) {
                    return;
                }
                if self.chance(self.loss_percent) {
                    let again_ms = delay_ms + self.random.u64(1..20_000);
                    self.after(again_ms, Event::CallArrives { node, life, id, body: body.clone() });
                }
                self.after(delay_ms, Event::CallArrives { node, life, id, body });
            }
            // Handoffs of this world name no process.
            agent_core::Effect::Process(_) => {}
            agent_core::Effect::Save(text) => {
                let text = (!self.chance(self.loss_percent)).then_some(text);
                self.after(delay_ms, Event::Saved { node, life, text });
            }
            agent_core::Effect::DeleteFile(name, _) => panic!("n{node}: {name} was not to be deleted"),
            agent_core::Effect::Log(what) => self.note(&format!("n{node} {}", what.happening().text)),
            // The process ends soon after, and its connections with it.
            agent_core::Effect::Cut(_) => {}
            agent_core::Effect::Deliver(_) => panic!("nobody registered a callback"),
            agent_core::Effect::Exit => {
                self.note(&format!("n{node} agent exits"));
                self.totals.agent_exits += 1;
                self.agent_dies(node);
                if self.chaos {
                    let pause_ms = self.random.u64(10..40_000);
                    self.after(pause_ms, Event::StartAgent { node });
                }
            }
        }
    }

    /// Usually quick, sometimes stuck in some queue for longer than anybody waits.
    pub(crate) fn delay_ms(&mut self) -> u64 {
        if self.chance(self.loss_percent) { self.random.u64(100..25_000) } else { self.random.u64(0..20) }
    }

    fn call_ended(&mut self, node: usize, life: u64, id: u64, call: Call, answer: Answer) {
        let Some(agent) = self.agent(node, life) else { return };
        let in_time = agent.call.take_if(|(under_way, _)| *under_way == id).is_some();
        // The transport drops what comes late; of heartbeats a late answer is recognised anyway.
        if in_time || matches!(call, Call::Heartbeat { .. }) {
            let told = agent_core::Input::Told { plane: 0, call, answer };
            self.agent_turn(node, vec![told]);
        }
    }

    fn probe(&mut self, node: usize, life: u64, order: ProbeOrder) {
        let engine = self.nodes[node].engines.get(&order.url.port());
        let outcome = match engine.map(|engine| engine.phase) {
            None | Some(EnginePhase::Refusing) => ProbeOutcome::Refused("connection refused".into()),
            Some(EnginePhase::Loading) => ProbeOutcome::Loading(503),
            Some(EnginePhase::Healthy) if order.kind == ProbeKind::Health => ProbeOutcome::Healthy,
            Some(EnginePhase::Healthy) => {
                let models = engine.map_or_else(Vec::new, |engine| engine.models.clone());
                ProbeOutcome::Facts(Facts { models, ..Facts::default() })
            }
        };
        let (outcome, delay_ms) = match self.random.u64(0..100) {
            0..2 if self.chaos => (ProbeOutcome::Slow, order.timeout_ms),
            2 if self.chaos => return,
            _ => (outcome, self.random.u64(0..30)),
        };
        self.after(delay_ms, Event::ProbeEnds { node, life, id: order.id, outcome });
    }

    /// The agent's process is gone, with what it relayed.
    pub(crate) fn agent_dies(&mut self, node: usize) {
        let Some(agent) = self.nodes[node].agent.take() else { return };
        let Some(control) = &self.control else { return };
        let on_it = |(id, exchange): (&u64, &Exchange)| {
            exchange.lease.as_ref().is_some_and(|(life, _)| *life == agent.life).then_some(*id)
        };
        let cut: Vec<u64> = control.exchanges.iter().filter_map(on_it).collect();
        for id in cut {
            self.after(1, Event::ExchangeFails { id, connect: false, timeout: false });
        }
    }

    // The control plane.

    pub(crate) fn start_control(&mut self) {
        if self.control.is_some() {
            return;
        }
        let (life, seed) = (self.number(), self.random.u64(..));
        let options = Options {
            limits: Limits::default(),
            strategy: Strategy::ALL[self.random.usize(..Strategy::ALL.len())],
            admission_capacity: 30,
            admission_timeout_ms: 60_000,
            drain_timeout_ms: 10_000,
            hang_suspect_ms: 60_000,
            local: None,
            polled: self.polled_agents(),
            seed,
        };
        self.control = Some(Control {
            core: control_core::Core::new(options, self.now),
            life,
            calls: BTreeMap::new(),
            exchanges: BTreeMap::new(),
            ledger: Ledger::default(),
            stalled: false,
            inbox: VecDeque::new(),
            exit_by: None,
        });
        self.note("control plane starts");
        // Now and then its state directory is lost with it.
        if let Some(text) = self.registered.take().filter(|_| self.chance(80)) {
            let saved =
                Registered::read(&text, &Limits::default(), self.now.wall).expect("it was just written");
            self.totals.restored += saved.nodes.len() as u64;
            self.control_handle(control_core::Input::Restore(saved));
        }
    }

    /// The process is gone: calls get no answer, exchanges are cut.
    pub(crate) fn control_dies(&mut self) {
        let Some(control) = self.control.take() else { return };
        self.totals.cut_off += control.ledger.open();
        let counts = control.core.counts();
        self.totals.retried += counts.retried;
        for (id, exchange) in control.exchanges {
            self.leave_engine(id, &exchange);
            self.return_lease(exchange, None);
        }
    }

    pub(crate) fn arrive(&mut self, arrival: Arrival) {
        let Some(control) = &mut self.control else { return };
        control.inbox.push_back(arrival);
        if !control.stalled {
            self.control_turn();
        }
    }

    /// One turn of the control plane's loop: all that arrived, then `Tick`.
    pub(crate) fn control_turn(&mut self) {
        while let Some(arrival) = self.control.as_mut().and_then(|control| control.inbox.pop_front()) {
            let input = self.control_input(arrival);
            if let Some(input) = input {
                self.control_handle(input);
            }
        }
        self.control_handle(control_core::Input::Tick);
        self.check_control();
    }

    fn control_input(&mut self, arrival: Arrival) -> Option<control_core::Input> {
        let number = self.number();
        let control = self.control.as_mut()?;
        Some(match arrival {
            Arrival::Call { node, life, id, body } => {
                let peer = format!("10.0.0.{}", node + 1);
                let reply = number;
                control.calls.insert(reply, PendingCall { node, life, id, body: body.clone() });
                let node = self.nodes[node].id.clone();
                match body {
                    CallBody::Register(body) => control_core::Input::Register { reply, peer, body },
                    CallBody::Heartbeat(body) => control_core::Input::Heartbeat { reply, peer, node, body },
                    CallBody::Deregister { incarnation } => {
                        control_core::Input::Deregister { reply, node, incarnation: Some(incarnation) }
                    }
                }
            }
            Arrival::Ask(asked) => {
                control.ledger.asked(number, &asked.ask);
                let life = control.life;
                if self.chance(10) {
                    let patience_ms = self.random.u64(0..15_000);
                    self.after(patience_ms, Event::ClientLeaves { request: number, life });
                }
                control_core::Input::Ask { request: number, asked }
            }
            Arrival::Leaves(request) => {
                let on_it = |(id, exchange): (&u64, &Exchange)| (exchange.request == request).then_some(*id);
                let exchange = control.exchanges.iter().find_map(on_it);
                match exchange {
                    Some(exchange) => {
                        self.end_exchange(exchange, Ending::Withdrawn, None);
                        return None;
                    }
                    None if control.ledger.withdraw(request) => {
                        self.totals.withdrawn += 1;
                        control_core::Input::Withdraw(request)
                    }
                    None => return None,
                }
            }
            Arrival::Polled(id, outcome) => control_core::Input::Polled(id, outcome),
            Arrival::Answering(request) => control_core::Input::Answering(request),
            Arrival::Ended { exchange, request, ending } => {
                control.ledger.ended(request, exchange, &ending);
                match &ending {
                    Ending::Complete => self.totals.answered += 1,
                    Ending::Withdrawn => self.totals.withdrawn += 1,
                    Ending::Failed { answered: true, .. } => self.totals.broken += 1,
                    Ending::Failed { .. }
                    | Ending::NotTried(_)
                    | Ending::NotReady { .. }
                    | Ending::Aborted { .. } => {}
                }
                control_core::Input::Ended(request, ending)
            }
            Arrival::Shutdown => {
                control.exit_by.get_or_insert(self.now.mono.plus_ms(CONTROL_EXIT_MS));
                control_core::Input::Shutdown
            }
        })
    }

    fn control_handle(&mut self, input: control_core::Input) {
        let now = self.now;
        let Some(control) = &mut self.control else { return };
        let before = control.ledger.before(&control.core, &control.calls, &input, now);
        let mut effects = Vec::new();
        control.core.handle(input, now, &mut effects);
        control.core.check_invariants();
        control.ledger.check_effects(&control.core, &control.calls, before, &effects);
        for effect in effects {
            self.control_effect(effect);
        }
    }

    fn control_effect(&mut self, effect: control_core::Effect) {
        use control_core::Effect;
        match effect {
            Effect::Process(_) => {}
            Effect::Abort { request, even_answered, .. } => {
                let of = |(id, exchange): (&u64, &Exchange)| {
                    let is_meant = exchange.request == request && (even_answered || !exchange.answered);
                    is_meant.then_some((*id, exchange.answered))
                };
                let found = self.control.as_ref().and_then(|control| control.exchanges.iter().find_map(of));
                if let Some((exchange, answered)) = found {
                    self.end_exchange(exchange, Ending::Aborted { answered }, None);
                }
            }
            Effect::Registered(call, reply) => {
                let answer = Answer::Ok {
                    next_heartbeat_ms: reply.next_heartbeat_ms,
                    ttl_ms: reply.ttl_ms,
                    registry_epoch: reply.registry_epoch,
                };
                self.reply(call, answer);
            }
            Effect::Beaten(call, reply) => {
                self.totals.heartbeats += 1;
                let next_heartbeat_ms = reply.next_heartbeat_ms;
                self.reply(call, Answer::Ok { next_heartbeat_ms, ttl_ms: None, registry_epoch: None });
            }
            Effect::Removed(call) => {
                self.reply(call, Answer::Ok { next_heartbeat_ms: None, ttl_ms: None, registry_epoch: None });
            }
            Effect::Refuse(request, refusal) => {
                if self.control.as_ref().is_some_and(|control| control.calls.contains_key(&request)) {
                    self.totals.fenced += 1;
                    self.reply(request, understood(&refusal));
                } else {
                    self.note(&format!("request {request} refused: {}", refusal.message()));
                    self.totals.refused += 1;
                }
            }
            Effect::Waiting { .. } => self.totals.waited += 1,
            Effect::Save(saved) => {
                let fails = self.chance(20);
                if !fails {
                    self.registered = Some(saved.text());
                }
                let result = if fails { Err("no space".into()) } else { Ok(()) };
                self.control_handle(control_core::Input::Saved(result));
            }
            Effect::Dispatch(request, dispatch) => self.dispatch(request, dispatch),
            Effect::Probe(_) | Effect::AskAgent { .. } => {
                panic!("nobody here needs a probe or a question: {effect:?}");
            }
            Effect::Poll(order) => self.poll(order),
            Effect::Noted(_) => panic!("nobody sends notices here"),
            Effect::Log(what) => {
                let happening = what.happening();
                self.totals.suspects += u64::from(happening.state == "Suspect");
                self.totals.holds += u64::from(happening.state == "held");
                self.note(&happening.text);
            }
            Effect::Exit => {
                self.note("control plane exits");
                self.totals.control_exits += 1;
                self.control_dies();
                let pause_ms = self.random.u64(10..10_000);
                self.after(pause_ms, Event::StartControl);
            }
        }
    }

    fn reply(&mut self, call: u64, answer: Answer) {
        let pending = self.control.as_mut().and_then(|control| control.calls.remove(&call));
        let pending = pending.expect("a call is answered once, and only if it was made");
        self.answer(pending.node, pending.life, pending.id, call_of(&pending.body), answer);
    }

    /// Sends an answer on its way back.
    fn answer(&mut self, node: usize, life: u64, id: u64, call: Call, answer: Answer) {
        let delay_ms = self.delay_ms();
        if self.nodes[node].down_cut_until > self.now.mono || self.chance(self.loss_percent) {
            return;
        }
        if self.chance(self.loss_percent) {
            let again_ms = delay_ms + self.random.u64(1..5_000);
            self.after(again_ms, Event::CallEnds { node, life, id, call, answer: answer.clone() });
        }
        self.after(delay_ms, Event::CallEnds { node, life, id, call, answer });
    }

    // Requests on their way to engines.

    fn is_cut(&self, node: usize) -> bool {
        let node = &self.nodes[node];
        node.up_cut_until > self.now.mono || node.down_cut_until > self.now.mono
    }

    fn exchange(&mut self, id: u64) -> Option<&mut Exchange> {
        self.control.as_mut()?.exchanges.get_mut(&id)
    }

    fn dispatch(&mut self, request: u64, dispatch: Dispatch) {
        let id = self.number();
        let node = self.nodes.iter().position(|node| node.id == dispatch.node).expect("a known node");
        self.note(&format!("request {request} goes to n{node} {} {}", dispatch.key, dispatch.generation));
        let cut = self.is_cut(node);
        let Some(control) = &mut self.control else { return };
        control.ledger.dispatched(request, id, &dispatch);
        let exchange = Exchange { request, dispatch, node, engine: None, lease: None, answered: false };
        control.exchanges.insert(id, exchange);
        if cut {
            self.after(CONNECT_TIMEOUT_MS, Event::ExchangeFails { id, connect: true, timeout: false });
        } else {
            let delay_ms = self.random.u64(0..20);
            self.after(delay_ms, Event::ExchangeArrives(id));
        }
    }

    fn exchange_arrives(&mut self, id: u64) {
        let Some(exchange) = self.exchange(id) else { return };
        let (node, dispatch) = (exchange.node, exchange.dispatch.clone());
        let engine = match &dispatch.target {
            Target::Direct(engine) => engine.clone(),
            Target::Relay { .. } => {
                let Some(agent) = &mut self.nodes[node].agent else {
                    return self.exchange_failed(id, true, false);
                };
                let life = agent.life;
                let acquired = agent.core.acquire(&dispatch.key, Some(dispatch.generation), dispatch.slots);
                self.agent_turn(node, Vec::new());
                match acquired {
                    Ok((lease, engine, _)) => {
                        let Some(exchange) = self.exchange(id) else { return };
                        exchange.lease = Some((life, lease));
                        engine
                    }
                    Err(_) => return self.exchange_failed(id, false, false),
                }
            }
            Target::AskNode => panic!("sent to an unknown address"),
        };
        let port = engine.port();
        match self.nodes[node].engines.get_mut(&port).map(|engine| (engine.phase, engine)) {
            Some((EnginePhase::Healthy, engine)) => {
                engine.running.push(id);
                if let Some(exchange) = self.exchange(id) {
                    exchange.engine = Some(port);
                }
                let head_ms = self.random.u64(5..2_000);
                let rest_ms = self.random.u64(0..8_000);
                self.after(head_ms, Event::ExchangeAnswers(id));
                self.after(head_ms + rest_ms, Event::ExchangeEnds(id));
            }
            Some((EnginePhase::Loading, _)) => self.exchange_failed(id, false, false),
            Some((EnginePhase::Refusing, _)) | None => self.exchange_failed(id, true, false),
        }
    }

    fn exchange_answers(&mut self, id: u64) {
        let Some(exchange) = self.exchange(id) else { return };
        let (node, request) = (exchange.node, exchange.request);
        if !self.is_cut(node) {
            if let Some(exchange) = self.exchange(id) {
                exchange.answered = true;
            }
            self.arrive(Arrival::Answering(request));
        }
    }

    pub(crate) fn exchange_failed(&mut self, id: u64, connect: bool, timeout: bool) {
        let Some(exchange) = self.exchange(id) else { return };
        let (answered, relayed) = (exchange.answered, exchange.lease.is_some());
        let reason = if connect { "connection refused" } else { "reset" }.to_string();
        let fault = if connect { Fault::ConnectFailed } else { Fault::Broken };
        // Behind a relay, the connection to the agent has worked.
        let connect = connect && !relayed;
        let ending = Ending::Failed { reason: reason.clone(), connect, timeout, answered };
        self.end_exchange(id, ending, Some((fault, reason)));
    }

    fn end_exchange(&mut self, id: u64, ending: Ending, fault: Option<(Fault, String)>) {
        let Some(exchange) = self.control.as_mut().and_then(|control| control.exchanges.remove(&id)) else {
            return;
        };
        self.leave_engine(id, &exchange);
        let request = exchange.request;
        self.return_lease(exchange, fault);
        self.arrive(Arrival::Ended { exchange: id, request, ending });
    }

    fn leave_engine(&mut self, id: u64, exchange: &Exchange) {
        let engine = exchange.engine.and_then(|port| self.nodes[exchange.node].engines.get_mut(&port));
        if let Some(engine) = engine {
            engine.running.retain(|other| *other != id);
        }
    }

    /// The agent learns that a relayed request has ended, a little earlier or later than the caller.
    fn return_lease(&mut self, exchange: Exchange, fault: Option<(Fault, String)>) {
        if let Some((life, lease)) = exchange.lease {
            let delay_ms = self.random.u64(0..50);
            let node = exchange.node;
            self.after(delay_ms, Event::RelayEnds { node, life, lease: LeaseBox(lease, fault) });
        }
    }
}

pub(crate) fn call_of(body: &CallBody) -> Call {
    match body {
        CallBody::Register(_) => Call::Register,
        CallBody::Heartbeat(body) => Call::Heartbeat { seq: body.seq.expect("agents number them") },
        CallBody::Deregister { .. } => Call::Deregister,
    }
}

/// A refusal as the agent's client reads its status.
fn understood(refusal: &Refusal) -> Answer {
    match refusal.status() {
        404 => Answer::UnknownNode,
        409 => Answer::Conflict(refusal.message()),
        status => Answer::Failed(format!("status {status}")),
    }
}

pub(crate) fn url(text: &str) -> BaseUrl {
    BaseUrl::new(text).expect("a URL")
}

/// A replica of a node, for maps.
pub(crate) type Place = (NodeId, ReplicaKey, u64);
