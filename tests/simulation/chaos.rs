//! What goes wrong, and what clients want.

use std::sync::Arc;

use llama_orch::orchestratord::admission::Priority;
use llama_orch::orchestratord::core::Asked;
use llama_orch::orchestratord::placement::Ask;
use llama_orch::pool_managerd::core::Input as AgentInput;
use llama_orch::wire::drain::Scope;
use llama_orch::wire::handoff::{Handoff, HandoffFile, parse};
use llama_orch::wire::id::PoolId;
use serde_json::json;

use crate::agents::Node;
use crate::control::Arrival;
use crate::links::{Dialect, Link};
use crate::rules::TTL_MS;
use crate::world::{Engine, EnginePhase, Event, World};

const MODELS: [&str; 3] = ["m-a", "m-b", "m-c"];
const HOUR_MS: i64 = 3_600_000;
const DAY_MS: i64 = 24 * HOUR_MS;

impl World {
    /// A client wants something.
    pub(crate) fn ask(&mut self) {
        if !self.chaos {
            return;
        }
        let pause_ms = self.random.u64(0..=2 * self.scale.ask_pause_ms);
        self.after(pause_ms, Event::Ask);
        let (clients, planes) = (self.scale.clients, self.planes.len());
        let random = &mut self.random;
        let pool = |random: &mut fastrand::Rng| PoolId::new(["p0", "p1"][random.usize(..2)]).expect("an id");
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
            ..Ask::default()
        };
        let priority = if random.bool() { Priority::Interactive } else { Priority::Batch };
        let client = format!("client-{}", random.usize(..clients)).into();
        let wait_ms_max = random.u64(100..60_000);
        let is_deadline = wait_ms_max.is_multiple_of(2);
        let asked = Asked { ask, priority, client, wait_ms_max, is_deadline };
        let plane = random.usize(..planes);
        self.arrive(plane, Arrival::Ask(Box::new(asked)));
    }

    /// One thing goes wrong, or changes.
    pub(crate) fn fault(&mut self) {
        if !self.chaos {
            return;
        }
        self.totals.count("faults");
        let pause_ms = self.random.u64(100..self.scale.fault_pause_ms);
        self.after(pause_ms, Event::Fault);
        let node = self.random.usize(..self.nodes.len());
        let plane = self.random.usize(..self.planes.len());
        match self.random.u64(0..100) {
            0..9 => self.cut_links(node, plane),
            9..14 => self.agent_crashes(node),
            14..17 => self.reboot(node),
            17..22 => self.stop_agent(node),
            22..24 => {
                self.stop_agent(node);
                self.meanwhile(node, plane);
            }
            24..27 => self.control_crashes(plane),
            27..29 => self.stop_control(plane),
            29..32 => {
                let stall_ms = [self.random.u64(100..TTL_MS), 3 * TTL_MS][self.random.usize(..2)];
                self.stall_control(plane, stall_ms);
            }
            32..36 => {
                let stall_ms = [TTL_MS * 9 / 10, 2 * TTL_MS, self.random.u64(100..TTL_MS)];
                let stall_ms = stall_ms[self.random.usize(..3)];
                self.stall_agent(node, stall_ms);
            }
            36..41 => self.set_clock(node, plane),
            41..44 => self.clone_disk(node),
            44..53 => self.launch_engine(node),
            53..60 => self.engine_dies(node),
            60..67 => self.engine_restarts(node),
            67..72 => {
                if let Some(name) = self.any_file(node) {
                    self.remove_file(node, &name);
                }
            }
            72..75 => {
                if let Some(name) = self.any_file(node) {
                    self.write_file(node, &name, b"not JSON".to_vec());
                }
            }
            75..83 => self.rewrite_file(node),
            83..86 => {
                if let Some(name) = self.any_file(node) {
                    let to = format!("moved-{}.json", self.random.u8(0..5));
                    self.rename_file(node, &name, &to);
                }
            }
            86..89 => self.directory_goes(node),
            89..91 => self.many_vanish(),
            _ => self.drain(node),
        }
    }

    fn cut_links(&mut self, node: usize, plane: usize) {
        let until = self.now.mono.plus_ms(self.random.u64(500..60_000));
        // A switch that dies takes all nodes with it.
        let cut = if self.chance(20) { 0..self.nodes.len() } else { node..node + 1 };
        let (up, down) = [(true, false), (false, true), (true, true)][self.random.usize(..3)];
        self.note(&format!("links of {cut:?} to {plane} are cut, up {up}, down {down}, until {until:?}"));
        for node in cut {
            let cut = &mut self.links[node][plane];
            cut.up_cut_until = if up { until } else { cut.up_cut_until };
            cut.down_cut_until = if down { until } else { cut.down_cut_until };
        }
    }

    fn agent_crashes(&mut self, node: usize) {
        self.note(&format!("n{node} agent crashes"));
        self.agent_dies(node);
        if self.chance(20) && !self.only_clocks {
            // Its state directory is lost: only the clock tells one start from another.
            self.totals.count("agents without their state");
            self.nodes[node].saved = None;
            self.nodes[node].incarnation = 0;
        }
        let pause_ms = self.random.u64(5..50_000);
        self.after(pause_ms, Event::StartAgent { node });
    }

    fn reboot(&mut self, node: usize) {
        self.note(&format!("n{node} reboots"));
        self.nodes[node].boot += 1;
        let ports: Vec<u16> = self.nodes[node].engines.keys().copied().collect();
        ports.into_iter().for_each(|port| self.kill_engine(node, port));
        self.agent_crashes(node);
    }

    /// While an agent stops: it is asked again, or the control plane goes away.
    fn meanwhile(&mut self, node: usize, plane: usize) {
        let Some(life) = self.nodes[node].agent.as_ref().map(|agent| agent.life) else { return };
        if self.chance(70) {
            let pause_ms = self.random.u64(0..10_000);
            self.after(pause_ms, Event::StopAgent { node, life });
        } else {
            self.control_crashes(plane);
        }
    }

    fn control_crashes(&mut self, plane: usize) {
        self.note(&format!("control plane {plane} crashes"));
        self.control_dies(plane);
        let pause_ms = self.random.u64(10..20_000);
        self.after(pause_ms, Event::StartControl { plane });
    }

    /// Half of the agents vanish, or all, and return.
    fn many_vanish(&mut self) {
        let away = if self.random.bool() { self.nodes.len() } else { self.nodes.len() / 2 };
        self.note(&format!("{away} agents vanish"));
        for node in 0..away {
            self.agent_crashes(node);
        }
    }

    /// Somebody sets a wall clock, on either side.
    fn set_clock(&mut self, node: usize, plane: usize) {
        let offset_ms = [DAY_MS, -DAY_MS, 3 * HOUR_MS, 0][self.random.usize(..4)];
        let of_node = self.random.bool();
        self.totals.count("wall clocks set");
        if !self.clocks_jump {
            return;
        }
        if of_node {
            self.nodes[node].wall_offset_ms = offset_ms;
        } else {
            self.planes[plane].wall_offset_ms = offset_ms;
        }
    }

    /// A second machine is made from a node's disk.
    fn clone_disk(&mut self, node: usize) {
        let has_twin = self.nodes.iter().any(|node| node.twin_of.is_some());
        let original = &self.nodes[node];
        if has_twin || self.only_clocks || original.dialect == Dialect::Old || original.incarnation == 0 {
            return;
        }
        let index = self.nodes.len();
        let mut twin = Node::new(index, original.dialect);
        twin.id = original.id.clone();
        twin.twin_of = Some(node);
        twin.saved = original.saved.clone();
        twin.incarnation = original.incarnation;
        // Where its clock is behind it counts on from what the disk says: one more than the original, or, from a
        // copy that was made before the original's last start, to the same number.
        if self.random.bool() {
            twin.wall_offset_ms = -DAY_MS;
            twin.incarnation -= u64::from(self.random.bool());
        }
        self.nodes.push(twin);
        self.links.push(vec![Link::default(); self.planes.len()]);
        self.note(&format!("n{index} is made from the disk of n{node}"));
        self.launch_engine(index);
        self.start_agent(index);
    }

    fn drain(&mut self, node: usize) {
        let pool = PoolId::new(["p0", "p1"][self.random.usize(..2)]).expect("an id");
        let drain = self.random.bool();
        let scope = if self.chance(30) { Scope::Node } else { Scope::pool(&pool) };
        self.note(&format!("n{node} {scope} drains: {drain}"));
        let input = if drain { AgentInput::Drain(scope, None) } else { AgentInput::Resume(scope) };
        self.agent_told(node, input);
    }

    // Engines.

    /// Somebody starts an engine and announces it: before it listens, while it loads, or after.
    pub(crate) fn launch_engine(&mut self, node: usize) {
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
        let text = json!({
            "url": format!("http://{host}:{port}"),
            "pool_id": format!("p{pool}"),
            "replica_id": format!("r{replica}"),
            "slots": self.random.u32(1..=4),
            "ready": !self.chance(5),
            "device_mask": self.random.u8(0..2).to_string(),
            "generation": self.random.u64(0..3),
            "models": models,
        });
        self.write_file(node, &name, text.to_string().into_bytes());
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

    // Handoffs.

    fn any_file(&mut self, node: usize) -> Option<Arc<str>> {
        let names: Vec<Arc<str>> = self.nodes[node].directory.files.keys().cloned().collect();
        (!names.is_empty()).then(|| names[self.random.usize(..names.len())].clone())
    }

    fn read_file(&self, node: usize, name: &str) -> Option<Box<Handoff>> {
        match parse(&self.nodes[node].directory.files.get(name)?.bytes) {
            Ok(HandoffFile::Engine(handoff)) => Some(handoff),
            Ok(HandoffFile::ModelOnly) | Err(_) => None,
        }
    }

    /// A file says something else about the same engine, or that another one took its place.
    fn rewrite_file(&mut self, node: usize) {
        let Some(name) = self.any_file(node) else { return };
        let Some(mut handoff) = self.read_file(node, &name) else { return };
        match self.random.u64(0..5) {
            0 => handoff.slots = self.random.u32(1..=4),
            1 => handoff.models = self.some_models(),
            2 => handoff.ready = !handoff.ready,
            3 => handoff.device_mask = Some(self.random.u8(0..2).to_string()),
            _ => handoff.generation += 1,
        }
        self.write_file(node, &name, handoff.to_value().to_string().into_bytes());
    }

    /// A file names another number of slots. False where there is none.
    pub(crate) fn change_slots(&mut self, node: usize) -> bool {
        let Some(name) = self.any_file(node) else { return false };
        let Some(mut handoff) = self.read_file(node, &name) else { return false };
        handoff.slots = handoff.slots % 4 + 1;
        self.write_file(node, &name, handoff.to_value().to_string().into_bytes());
        true
    }

    /// The directory is there, and what cannot be read is gone.
    pub(crate) fn heal_files(&mut self, node: usize) {
        self.directory_returns(node);
        let names: Vec<Arc<str>> = self.nodes[node].directory.files.keys().cloned().collect();
        for name in names {
            if self.read_file(node, &name).is_none() {
                self.remove_file(node, &name);
            }
        }
    }
}
