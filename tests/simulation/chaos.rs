//! What goes wrong, what clients want, and how it all is put right at the end.

use std::sync::Arc;

use llama_orch::orchestratord::admission::Priority;
use llama_orch::orchestratord::core::Asked;
use llama_orch::orchestratord::placement::Ask;
use llama_orch::pool_managerd::core::Input as AgentInput;
use llama_orch::pool_managerd::membership::PlaneState;
use llama_orch::replicas::{FileContent, ListedFile};
use llama_orch::time::Mono;
use llama_orch::wire::drain::Scope;
use llama_orch::wire::handoff::{Handoff, HandoffFile, parse};
use llama_orch::wire::id::PoolId;

use crate::world::{Arrival, Engine, EnginePhase, Event, World};

/// Two lease times.
const SETTLE_MS: u64 = 60_000;
/// The longest shutdown: its drain, twice the deregistration's limit, and a turn.
const AGENT_EXIT_MS: u64 = 10_000 + 4_000 + 100;
const MODELS: [&str; 3] = ["m-a", "m-b", "m-c"];

impl World {
    /// Starts everybody, and lets things go wrong for a few minutes.
    pub(crate) fn live_through_chaos(&mut self) {
        self.start_control();
        for node in 0..self.nodes.len() {
            for _ in 0..self.random.usize(1..4) {
                self.launch_engine(node);
            }
            self.start_agent(node);
        }
        self.after(500, Event::Fault);
        self.after(200, Event::Ask);
        let end = self.now.mono.plus_ms(self.random.u64(60_000..200_000));
        self.run_until(end);
    }

    /// Puts everything right, waits, and looks.
    pub(crate) fn heal_and_settle(&mut self) {
        self.note("everything is healed");
        self.chaos = false;
        self.loss_percent = 0;
        // Whoever is about to exit does so first.
        let exited = self.now.mono.plus_ms(AGENT_EXIT_MS);
        self.run_until(exited);
        if self.control.as_ref().is_some_and(|control| control.stalled) {
            self.control.as_mut().expect("it is there").stalled = false;
            self.control_turn();
        }
        self.start_control();
        for node in 0..self.nodes.len() {
            let healed = &mut self.nodes[node];
            healed.up_cut_until = Mono(0);
            healed.down_cut_until = Mono(0);
            healed.files.retain(|_, file| !matches!(*file.content, FileContent::Refused(_)));
            let exit_by = healed.agent.as_ref().and_then(|agent| agent.exit_by);
            assert!(exit_by.is_none_or(|at| self.now.mono <= at), "n{node}: its agent outlives its shutdown");
            let ports: Vec<u16> = self.nodes[node].engines.keys().copied().collect();
            for port in ports {
                let (birth, lives) = (self.number(), self.chance(70));
                let engine = self.nodes[node].engines.get_mut(&port).expect("listed");
                if engine.phase != EnginePhase::Healthy {
                    engine.birth = birth;
                    engine.phase = if lives { EnginePhase::Healthy } else { EnginePhase::Refusing };
                }
            }
            self.start_agent(node);
            // What it took up from its state file too.
            self.agent_turn(node, vec![AgentInput::Resume(Scope::Node)]);
            for pool in ["p0", "p1"] {
                let scope = Scope::pool(&PoolId::new(pool).expect("an id"));
                self.agent_turn(node, vec![AgentInput::Resume(scope)]);
            }
        }
        let settled = self.now.mono.plus_ms(SETTLE_MS);
        self.run_until(settled);
        // Who was told that another machine owns its name asks again only when that one's lease is over.
        let stepped_back = self.nodes.iter().filter_map(|node| {
            let plane = &node.agent.as_ref()?.core.planes()[0];
            if *plane.state() == PlaneState::SteppedBack { plane.deadline() } else { None }
        });
        if let Some(at) = stepped_back.max() {
            self.run_until(at.plus_ms(SETTLE_MS));
        }
        self.check_all_is_well();
        let counts = self.control.as_ref().map(|control| control.core.counts());
        self.totals.retried += counts.map_or(0, |counts| counts.retried);
        self.totals.polls += counts.and_then(|counts| counts.polls.get("taken").copied()).unwrap_or(0);
    }

    /// The handoffs that count on a node: of those that name one replica the highest generation, then
    /// the newest, then the first by name. With each, whether its engine serves.
    pub(crate) fn announced(&self, node: usize) -> Vec<(Handoff, bool)> {
        let node = &self.nodes[node];
        let mut best: Vec<(&ListedFile, &Handoff)> = Vec::new();
        for file in node.files.values() {
            let FileContent::Handoff(handoff) = &*file.content else { continue };
            match best.iter_mut().find(|(_, other)| other.key() == handoff.key()) {
                None => best.push((file, handoff)),
                Some(other) => {
                    if (handoff.generation, file.modified) > (other.1.generation, other.0.modified) {
                        *other = (file, handoff);
                    }
                }
            }
        }
        let serves = |handoff: &Handoff| {
            let engine = node.engines.get(&handoff.url.port());
            handoff.ready && engine.is_some_and(|engine| engine.phase == EnginePhase::Healthy)
        };
        best.into_iter().map(|(_, handoff)| (handoff.clone(), serves(handoff))).collect()
    }

    pub(crate) fn ask(&mut self) {
        if !self.chaos {
            return;
        }
        let pause_ms = self.random.u64(0..=2 * self.ask_pause_ms);
        self.after(pause_ms, Event::Ask);
        let pool = |random: &mut fastrand::Rng| PoolId::new(["p0", "p1"][random.usize(..2)]).expect("an id");
        let random = &mut self.random;
        let model = match random.u64(0..100) {
            0..20 => None,
            20..22 => Some("m-unknown"),
            _ => Some(MODELS[random.usize(..MODELS.len())]),
        };
        let ask = Ask {
            model: model.map(String::from),
            slots: random.u32(0..=3),
            pool: (random.u64(0..100) < 15).then(|| pool(random)),
            node: (random.u64(0..100) < 5).then(|| self.nodes[0].id.clone()),
            device_mask: (random.u64(0..100) < 5).then(|| "0".to_string()),
            prefer_pools: if random.u64(0..100) < 10 { vec![pool(random)] } else { Vec::new() },
            avoid_pools: if random.u64(0..100) < 5 { vec![pool(random)] } else { Vec::new() },
        };
        let asked = Asked {
            ask,
            priority: if random.bool() { Priority::Interactive } else { Priority::Batch },
            client: ["alice", "bob", "carol"][random.usize(..3)].into(),
            wait_ms_max: random.u64(100..60_000),
            affinity: Default::default(),
        };
        self.arrive(Arrival::Ask(Box::new(asked)));
    }

    /// One thing goes wrong, or changes.
    pub(crate) fn fault(&mut self) {
        if !self.chaos {
            return;
        }
        self.totals.faults += 1;
        let pause_ms = self.random.u64(100..8_000);
        self.after(pause_ms, Event::Fault);
        let node = self.random.usize(..self.nodes.len());
        match self.random.u64(0..100) {
            0..10 => self.cut_links(node),
            10..16 => {
                self.note(&format!("n{node} agent crashes"));
                self.agent_dies(node);
                self.restart_agent_later(node);
            }
            16..19 => self.reboot(node),
            19..25 => {
                if let Some(agent) = &mut self.nodes[node].agent {
                    agent.exit_by.get_or_insert(self.now.mono.plus_ms(AGENT_EXIT_MS));
                    self.note(&format!("n{node} agent is to stop"));
                    self.agent_turn(node, vec![AgentInput::Shutdown]);
                }
            }
            25..28 => {
                self.note("control plane crashes");
                self.control_dies();
                let pause_ms = self.random.u64(10..20_000);
                self.after(pause_ms, Event::StartControl);
            }
            28..30 => self.stop_control(),
            30..34 => self.stall_control(),
            34..46 => self.launch_engine(node),
            46..56 => self.engine_dies(node),
            56..66 => self.engine_restarts(node),
            66..74 => self.remove_file(node),
            74..78 => self.break_file(node),
            78..90 => self.rewrite_file(node),
            _ => {
                let pool = PoolId::new(["p0", "p1"][self.random.usize(..2)]).expect("an id");
                let drain = self.random.bool();
                let scope = if self.chance(30) { Scope::Node } else { Scope::pool(&pool) };
                self.note(&format!("n{node} {scope} drains: {drain}"));
                let input = if drain { AgentInput::Drain(scope, None) } else { AgentInput::Resume(scope) };
                self.agent_turn(node, vec![input]);
            }
        }
    }

    fn cut_links(&mut self, node: usize) {
        let until = self.now.mono.plus_ms(self.random.u64(500..60_000));
        // A switch that dies takes all nodes with it.
        let cut = if self.chance(20) { 0..self.nodes.len() } else { node..node + 1 };
        let (up, down) = [(true, false), (false, true), (true, true)][self.random.usize(..3)];
        self.note(&format!("links of {cut:?} are cut, up {up}, down {down}, until {until:?}"));
        for node in cut {
            let cut = &mut self.nodes[node];
            cut.up_cut_until = if up { until } else { cut.up_cut_until };
            cut.down_cut_until = if down { until } else { cut.down_cut_until };
        }
    }

    fn restart_agent_later(&mut self, node: usize) {
        let pause_ms = self.random.u64(5..50_000);
        self.after(pause_ms, Event::StartAgent { node });
    }

    fn reboot(&mut self, node: usize) {
        self.note(&format!("n{node} reboots"));
        self.agent_dies(node);
        self.nodes[node].boot += 1;
        let ports: Vec<u16> = self.nodes[node].engines.keys().copied().collect();
        ports.into_iter().for_each(|port| self.kill_engine(node, port));
        self.restart_agent_later(node);
    }

    fn stop_control(&mut self) {
        if self.control.is_some() {
            self.note("control plane is to stop");
            self.arrive(Arrival::Shutdown);
        }
    }

    /// The control plane's process does not run for a while; what arrives waits in its sockets.
    fn stall_control(&mut self) {
        let stall_ms = self.random.u64(100..45_000);
        if let Some(control) = self.control.as_mut().filter(|control| !control.stalled) {
            control.stalled = true;
            control.exit_by = control.exit_by.map(|at| at.plus_ms(stall_ms));
            let life = control.life;
            self.note(&format!("control plane stalls for {stall_ms} ms"));
            self.after(stall_ms, Event::ControlResumes { life });
        }
    }

    /// Somebody starts an engine and announces it: before it listens, while it loads, or after.
    fn launch_engine(&mut self, node: usize) {
        let port = loop {
            let port = self.random.u16(9300..9400);
            if !self.nodes[node].engines.contains_key(&port) {
                break port;
            }
        };
        let models = self.some_models();
        let engine = Engine { phase: EnginePhase::Refusing, birth: 0, models, running: Vec::new() };
        self.nodes[node].engines.insert(port, engine);
        self.start_engine(node, port);
        let (pool, replica) = (self.random.u8(0..2), self.random.u8(0..3));
        let name = match self.random.u64(0..10) {
            0 => format!("other-p{pool}-r{replica}.json"),
            _ => format!("p{pool}-r{replica}.json"),
        };
        let host = if self.random.bool() { "127.0.0.1".into() } else { format!("10.0.0.{}", node + 1) };
        let models =
            if self.random.bool() { self.nodes[node].engines[&port].models.clone() } else { Vec::new() };
        let text = serde_json::json!({
            "url": format!("http://{host}:{port}"),
            "pool_id": format!("p{pool}"),
            "replica_id": format!("r{replica}"),
            "slots": self.random.u32(1..=4),
            "ready": !self.chance(5),
            "device_mask": self.random.u8(0..2).to_string(),
            "generation": self.random.u64(0..3),
            "models": models,
        });
        let HandoffFile::Engine(handoff) = parse(text.to_string().as_bytes()).expect("a handoff") else {
            panic!("it has a URL");
        };
        self.write_file(node, name.into(), FileContent::Handoff(handoff.into()));
    }

    fn some_models(&mut self) -> Vec<String> {
        let mut models: Vec<String> = MODELS.iter().map(|model| model.to_string()).collect();
        self.random.shuffle(&mut models);
        models.truncate(self.random.usize(1..=2));
        models
    }

    fn start_engine(&mut self, node: usize, port: u16) {
        let birth = self.number();
        let listens_ms = self.random.u64(0..3_000);
        let healthy_ms = listens_ms + self.random.u64(0..12_000);
        if let Some(engine) = self.nodes[node].engines.get_mut(&port) {
            engine.birth = birth;
            self.after(listens_ms, Event::EngineBecomes { node, port, birth, phase: EnginePhase::Loading });
            self.after(healthy_ms, Event::EngineBecomes { node, port, birth, phase: EnginePhase::Healthy });
        }
    }

    fn kill_engine(&mut self, node: usize, port: u16) {
        let birth = self.number();
        let Some(engine) = self.nodes[node].engines.get_mut(&port) else { return };
        engine.phase = EnginePhase::Refusing;
        engine.birth = birth;
        let cut = std::mem::take(&mut engine.running);
        self.note(&format!("n{node} engine {port} dies"));
        for id in cut {
            self.after(1, Event::ExchangeFails { id, connect: false, timeout: false });
        }
    }

    fn any_engine(&mut self, node: usize) -> Option<u16> {
        let ports: Vec<u16> = self.nodes[node].engines.keys().copied().collect();
        (!ports.is_empty()).then(|| ports[self.random.usize(..ports.len())])
    }

    fn engine_dies(&mut self, node: usize) {
        if let Some(port) = self.any_engine(node) {
            self.kill_engine(node, port);
        }
    }

    fn engine_restarts(&mut self, node: usize) {
        if let Some(port) = self.any_engine(node) {
            self.kill_engine(node, port);
            self.start_engine(node, port);
        }
    }

    fn any_file(&mut self, node: usize) -> Option<Arc<str>> {
        let names: Vec<Arc<str>> = self.nodes[node].files.keys().cloned().collect();
        (!names.is_empty()).then(|| names[self.random.usize(..names.len())].clone())
    }

    fn remove_file(&mut self, node: usize) {
        if let Some(name) = self.any_file(node) {
            self.note(&format!("n{node} {name} is removed"));
            self.nodes[node].files.remove(&name);
            self.directory_changed(node);
        }
    }

    fn break_file(&mut self, node: usize) {
        if let Some(name) = self.any_file(node) {
            self.write_file(node, name, FileContent::Refused("not JSON".into()));
        }
    }

    /// A file says something else about the same engine, or that another one took its place.
    fn rewrite_file(&mut self, node: usize) {
        let Some(name) = self.any_file(node) else { return };
        let FileContent::Handoff(handoff) = &*self.nodes[node].files[&name].content else { return };
        let mut handoff = (**handoff).clone();
        match self.random.u64(0..5) {
            0 => handoff.slots = self.random.u32(1..=4),
            1 => handoff.models = self.some_models(),
            2 => handoff.ready = !handoff.ready,
            3 => handoff.device_mask = Some(self.random.u8(0..2).to_string()),
            _ => handoff.generation += 1,
        }
        self.write_file(node, name, FileContent::Handoff(handoff.into()));
    }

    fn write_file(&mut self, node: usize, name: Arc<str>, content: FileContent) {
        self.note(&format!("n{node} {name} says {content:?}"));
        let file = ListedFile { name: name.clone(), modified: self.now.wall, content: Arc::new(content) };
        self.nodes[node].files.insert(name, file);
        self.directory_changed(node);
    }

    /// The kernel tells of a change, unless it forgets to.
    fn directory_changed(&mut self, node: usize) {
        let delay_ms = self.random.u64(0..3);
        let told = !self.chance(20);
        if let Some(life) = self.nodes[node].agent.as_ref().map(|agent| agent.life).filter(|_| told) {
            self.after(delay_ms, Event::List { node, life, again: false });
        }
    }
}
