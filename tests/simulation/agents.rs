//! Machines and the node agents on them: how one starts, has its turns, stands still and ends.

use std::collections::BTreeMap;

use llama_orch::pool_managerd::core::{self as agent_core, Identity, Input};
use llama_orch::pool_managerd::membership::{Answer, Call, PlaneState};
use llama_orch::pool_managerd::saved::Saved;
use llama_orch::replicas::{AllowList, EnginePolicy, Facts, ProbeKind, ProbeOrder, ProbeOutcome};
use llama_orch::time::Mono;
use llama_orch::wire::drain::Scope;
use llama_orch::wire::id::{NodeId, PoolId};
use llama_orch::wire::node::Capabilities;

use crate::files::{Directory, Watcher};
use crate::links::Dialect;
use crate::rules::TTL_MS;
use crate::world::{Caller, Engine, EnginePhase, Event, World, url};

/// How long running requests may take to finish when an agent is to stop.
pub(crate) const DRAIN_MS: u64 = 10_000;
/// The longest shutdown: its drain, twice the deregistration's limit, and a turn.
pub(crate) const AGENT_EXIT_MS: u64 = DRAIN_MS + 4_000 + 100;
/// The interval of heartbeats that agents are configured with, and that control planes ask for.
pub(crate) const INTERVAL_MS: u64 = 10_000;
/// The longest pause between two attempts to register: the conflict's, with its jitter.
const PAUSE_MS_MAX: u64 = 300_000 * 6 / 5 + 1;

/// One machine.
pub(crate) struct Node {
    pub(crate) id: NodeId,
    pub(crate) dialect: Dialect,
    /// It was made from the disk of this one.
    pub(crate) twin_of: Option<usize>,
    pub(crate) agent: Option<Agent>,
    /// As the state directory has it; 0 where that is lost.
    pub(crate) incarnation: u64,
    pub(crate) boot: u64,
    /// By how much its wall clock is off.
    pub(crate) wall_offset_ms: i64,
    /// The state file.
    pub(crate) saved: Option<String>,
    pub(crate) directory: Directory,
    pub(crate) engines: BTreeMap<u16, Engine>,
    /// When its agent wants a turn.
    pub(crate) due: Option<Mono>,
    /// Until when nobody starts its agent.
    pub(crate) off_until: Mono,
}

/// A running node agent.
pub(crate) struct Agent {
    pub(crate) core: agent_core::Core,
    pub(crate) life: u64,
    /// The call under way to each control plane.
    pub(crate) calls: Vec<Option<(u64, Call)>>,
    /// When a shutdown must be over.
    pub(crate) exit_by: Option<Mono>,
    /// Its process does not run; what arrives waits.
    pub(crate) stalled: bool,
    pub(crate) resumes_at: Mono,
    pub(crate) inbox: Vec<Input>,
    pub(crate) watcher: Watcher,
}

impl Node {
    pub(crate) fn new(index: usize, dialect: Dialect) -> Node {
        Node {
            id: NodeId::new(&format!("n{index}")).expect("an id"),
            dialect,
            twin_of: None,
            agent: None,
            incarnation: 0,
            boot: 1,
            wall_offset_ms: 0,
            saved: None,
            directory: Directory::new(),
            engines: BTreeMap::new(),
            due: None,
            off_until: Mono(0),
        }
    }
}

/// Another one with every start of a machine.
pub(crate) fn boot_id(node: usize, boot: u64) -> String {
    format!("boot-{node}-{boot}")
}

impl World {
    pub(crate) fn start_agent(&mut self, node: usize) {
        if self.nodes[node].agent.is_some() || self.nodes[node].off_until > self.now.mono {
            return;
        }
        let (life, seed) = (self.number(), self.random.u64(..));
        let now = self.now_at(self.nodes[node].wall_offset_ms);
        let known = &mut self.nodes[node];
        known.incarnation = now.wall.unix_ms().max(known.incarnation + 1);
        let identity = Identity {
            node_id: known.id.clone(),
            machine_id: format!("m{node}"),
            address: Some(url(&format!("http://10.0.0.{}:9200", node + 1))),
            pools: Vec::new(),
            capabilities: Capabilities::default(),
            incarnation: known.incarnation,
            boot_id: Some(boot_id(node, known.boot)),
        };
        let own = vec![std::net::IpAddr::from([10, 0, 0, u8::try_from(node + 1).expect("few nodes")])];
        let policy = EnginePolicy::new(own, Some(9200), AllowList::default(), "ALLOW");
        let planes = self.planes.len();
        let options = agent_core::Options {
            control_planes: (0..planes).map(|plane| url(&format!("http://10.0.1.{plane}:8080"))).collect(),
            heartbeat_interval_ms: INTERVAL_MS,
            drain_timeout_ms: DRAIN_MS,
            ..agent_core::Options::default()
        };
        let core = agent_core::Core::new(identity, policy, &options, seed, now);
        known.agent = Some(Agent {
            core,
            life,
            calls: vec![None; planes],
            exit_by: None,
            stalled: false,
            resumes_at: Mono(0),
            inbox: Vec::new(),
            watcher: Watcher::default(),
        });
        self.note(&format!("n{node} agent starts"));
        let saved = self.nodes[node].saved.clone();
        let saved = saved.map(|text| Saved::read(text.as_bytes()).expect("what was saved can be read"));
        self.agent_turn(node, saved.map(Input::Restore).into_iter().collect());
        self.relist(node, life);
        if self.chaos && self.chance(3) {
            self.totals.count("agents stopped at start");
            self.stop_agent(node);
        }
    }

    /// It is asked to end; not always only once.
    pub(crate) fn stop_agent(&mut self, node: usize) {
        let now = self.now.mono;
        let Some(agent) = self.nodes[node].agent.as_mut() else { return };
        if agent.exit_by.is_some() {
            self.totals.count("agents stopped twice");
        }
        // While it does not run it does not know.
        let told_at = if agent.stalled { agent.resumes_at } else { now };
        agent.exit_by.get_or_insert(told_at.plus_ms(AGENT_EXIT_MS));
        self.note(&format!("n{node} agent is to stop"));
        self.agent_told(node, Input::Shutdown);
    }

    pub(crate) fn agent(&mut self, node: usize, life: u64) -> Option<&mut Agent> {
        self.nodes[node].agent.as_mut().filter(|agent| agent.life == life)
    }

    pub(crate) fn agent_input(&mut self, node: usize, life: u64, input: Input) {
        if self.agent(node, life).is_some() {
            self.agent_told(node, input);
        }
    }

    /// Something reaches the agent; while its process does not run, it waits.
    pub(crate) fn agent_told(&mut self, node: usize, input: Input) {
        match &mut self.nodes[node].agent {
            Some(agent) if agent.stalled => agent.inbox.push(input),
            Some(_) => self.agent_turn(node, vec![input]),
            None => {}
        }
    }

    /// One turn of an agent's loop: what arrived, then `Tick`; effects are carried out after each.
    pub(crate) fn agent_turn(&mut self, node: usize, inputs: Vec<Input>) {
        self.turns += 1;
        let thorough = self.turns.is_multiple_of(self.scale.look_at_all_every);
        let now = self.now_at(self.nodes[node].wall_offset_ms);
        for input in inputs.into_iter().chain([Input::Tick]) {
            let Some(agent) = &mut self.nodes[node].agent else { return };
            let mut effects = Vec::new();
            agent.core.handle(input, now, &mut effects);
            if thorough {
                agent.core.check_invariants();
            }
            for effect in effects {
                self.agent_effect(node, effect);
            }
        }
        self.check_agent(node);
        self.agent_touched(node);
    }

    /// Every wait of an agent ends, and the pauses between its heartbeats have a limit.
    fn check_agent(&self, node: usize) {
        let Some(agent) = &self.nodes[node].agent else { return };
        for (plane, call) in agent.core.planes().iter().zip(&agent.calls) {
            let pause_ms = plane.deadline().map(|at| at.ms_since(self.now.mono));
            let within = |limit_ms| pause_ms.is_some_and(|pause_ms| pause_ms <= limit_ms);
            let bounded = match plane.state() {
                PlaneState::Left => true,
                // The call's own limit ends it.
                _ if call.is_some() => true,
                PlaneState::Registered { .. } => within(INTERVAL_MS * 6 / 5),
                PlaneState::Unregistered => within(TTL_MS),
                PlaneState::SteppedBack => within(PAUSE_MS_MAX),
                PlaneState::Registering => false,
                PlaneState::Leaving => within(2 * 2_000),
            };
            assert!(bounded, "n{node}: the pause while {:?} is {pause_ms:?} ms", plane.state());
        }
        let over = agent.exit_by.is_none_or(|at| self.now.mono <= at);
        assert!(over, "n{node}: its agent outlives its shutdown");
    }

    fn agent_effect(&mut self, node: usize, effect: agent_core::Effect) {
        let id = self.number();
        let Some(agent) = &mut self.nodes[node].agent else { return };
        let life = agent.life;
        match effect {
            agent_core::Effect::Probe(order) => self.probe(node, life, order),
            agent_core::Effect::Call { plane, order, body } => {
                let under_way = agent.calls[plane].replace((id, order.call));
                assert!(under_way.is_none(), "n{node} calls {:?} during {under_way:?}", order.call);
                let boot = self.nodes[node].boot;
                self.send_call(Caller { node, life, plane, id, boot }, order, body);
            }
            // Handoffs of this world name no process.
            agent_core::Effect::Process(_) => {}
            agent_core::Effect::Save(text) => {
                let text = (!self.chance(self.loss_percent)).then_some(text);
                let delay_ms = self.random.u64(0..20);
                self.after(delay_ms, Event::Saved { node, life, text });
            }
            agent_core::Effect::DeleteFile(name, _) => panic!("n{node}: {name} was not to be deleted"),
            agent_core::Effect::Log(what) => self.note(&format!("n{node} {}", what.happening().text)),
            // A drain without a deadline cuts nothing, and that of a shutdown ends with the process.
            agent_core::Effect::Cut(_) => {}
            agent_core::Effect::Deliver(_) => panic!("nobody registered a callback"),
            agent_core::Effect::Exit => {
                let in_time = agent.exit_by.is_some_and(|at| self.now.mono <= at);
                assert!(in_time, "n{node}: its agent outlives its shutdown");
                self.note(&format!("n{node} agent exits"));
                self.totals.count("agents exited");
                self.agent_dies(node);
                if self.chaos {
                    let pause_ms = self.random.u64(10..40_000);
                    self.after(pause_ms, Event::StartAgent { node });
                }
            }
        }
    }

    pub(crate) fn saved(&mut self, node: usize, life: u64, text: Option<String>) {
        if self.agent(node, life).is_some() {
            let result = text.as_ref().map(|_| ()).ok_or_else(|| "the disk is full".to_string());
            self.nodes[node].saved = text.or(self.nodes[node].saved.take());
            self.agent_told(node, Input::Saved(result));
        }
    }

    pub(crate) fn call_ended(&mut self, from: Caller, call: Call, answer: Answer) {
        let Caller { node, life, plane, id, .. } = from;
        let Some(agent) = self.agent(node, life) else { return };
        let in_time = agent.calls[plane].take_if(|(under_way, _)| *under_way == id).is_some();
        // The transport drops what comes late; of heartbeats a late answer is recognised anyway.
        if in_time || matches!(call, Call::Heartbeat { .. }) {
            self.agent_told(node, Input::Told { plane, call, answer });
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

    /// A control plane asks for a pool of an agent whose heartbeats list no replicas.
    pub(crate) fn agent_asked(&mut self, plane: usize, life: u64, node: usize, pool: &PoolId) {
        let cut = self.is_cut(node, plane);
        let known = &self.nodes[node];
        let Some(agent) = known.agent.as_ref().filter(|agent| !agent.stalled && !cut) else { return };
        let Some(status) = agent.core.pool_status(pool) else { return };
        let text = serde_json::to_string(&status).expect("it can be written");
        let (node, pool) = (known.id.clone(), pool.clone());
        self.totals.count("old agents asked");
        let delay_ms = self.random.u64(0..20);
        self.after(delay_ms, Event::AgentSays { plane, life, node, pool, text });
    }

    /// The agent's process does not run for a while.
    pub(crate) fn stall_agent(&mut self, node: usize, stall_ms: u64) {
        let resumes_at = self.now.mono.plus_ms(stall_ms);
        let Some(agent) = self.nodes[node].agent.as_mut().filter(|agent| !agent.stalled) else { return };
        agent.stalled = true;
        agent.resumes_at = resumes_at;
        agent.exit_by = agent.exit_by.map(|at| at.plus_ms(stall_ms));
        let life = agent.life;
        self.note(&format!("n{node} agent stalls for {stall_ms} ms"));
        self.totals.count("agents stalled");
        self.agent_touched(node);
        self.after(stall_ms, Event::AgentResumes { node, life });
    }

    pub(crate) fn agent_resumes(&mut self, node: usize, life: u64) {
        let Some(agent) = self.agent(node, life).filter(|agent| agent.stalled) else { return };
        agent.stalled = false;
        let waiting = std::mem::take(&mut agent.inbox);
        self.note(&format!("n{node} agent resumes"));
        self.agent_turn(node, waiting);
    }

    /// The agent's process is gone, with what it relayed.
    pub(crate) fn agent_dies(&mut self, node: usize) {
        let Some(agent) = self.nodes[node].agent.take() else { return };
        self.agent_touched(node);
        let relayed = |exchange: &crate::control::Exchange| {
            exchange.lease.as_ref().is_some_and(|(life, _)| *life == agent.life)
        };
        let cut: Vec<u64> =
            self.exchanges.iter().filter_map(|(id, exchange)| relayed(exchange).then_some(*id)).collect();
        for id in cut {
            self.after(1, Event::ExchangeFails { id, connect: false, timeout: false });
        }
    }

    /// Everything may be used again, what the state file says included.
    pub(crate) fn end_drains(&mut self, node: usize) {
        self.agent_told(node, Input::Resume(Scope::Node));
        for pool in ["p0", "p1"] {
            let scope = Scope::pool(&PoolId::new(pool).expect("an id"));
            self.agent_told(node, Input::Resume(scope));
        }
    }
}
