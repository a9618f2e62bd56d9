//! Which story a seed tells: who is in it, what becomes of them, and how it all ends well.

use llama_orch::pool_managerd::membership::PlaneState;
use llama_orch::time::Mono;

use crate::agents::{AGENT_EXIT_MS, Node};
use crate::control::Site;
use crate::links::{Dialect, Link};
use crate::rules::TTL_MS;
use crate::world::{EnginePhase, Event, Scale, World};

/// Within so long everything is well again.
const SETTLE_MS: u64 = 2 * TTL_MS;
/// Longer than any message lives, and than a lease and its grace.
const STEADY_MS: u64 = 65_000;
/// How soon a control plane knows what a node has seen, whatever the interval of heartbeats is.
const NEWS_MS: u64 = 1_500;
/// Rounds in which those who stepped back come forward again: each ends a lease that kept one out.
const ROUNDS_MAX: usize = 6;

/// What kind of story it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// A few nodes, and everything that can happen to them.
    Few,
    /// Fifty nodes and five hundred clients.
    Swarm,
    /// Most nodes fall silent, or the control plane does, for longer than anybody waits.
    Silence,
}

impl Kind {
    fn of(seed: u64) -> Kind {
        match seed % 10 {
            9 => Kind::Swarm,
            4 => Kind::Silence,
            _ => Kind::Few,
        }
    }

    fn scale(self, random: &mut fastrand::Rng) -> Scale {
        match self {
            Kind::Few => Scale {
                nodes: random.usize(2..=4),
                planes: if random.u64(0..100) < 30 { 2 } else { 1 },
                clients: 3,
                chaos_ms: random.u64(60_000..200_000),
                fault_pause_ms: 8_000,
                ask_pause_ms: [200, 600, 2_000][random.usize(..3)],
                loss_percent: [0, 2, 10][random.usize(..3)],
                look_at_all_every: 1,
                admission_capacity: 30,
            },
            Kind::Swarm => Scale {
                nodes: 50,
                planes: 1,
                clients: 500,
                chaos_ms: random.u64(25_000..40_000),
                fault_pause_ms: 1_500,
                ask_pause_ms: 30,
                loss_percent: [0, 2, 5][random.usize(..3)],
                look_at_all_every: 64,
                admission_capacity: 300,
            },
            Kind::Silence => Scale {
                nodes: random.usize(3..=5),
                planes: 1,
                clients: 3,
                chaos_ms: random.u64(20_000..60_000),
                fault_pause_ms: 4_000,
                ask_pause_ms: 2_000,
                loss_percent: [0, 5][random.usize(..2)],
                look_at_all_every: 1,
                admission_capacity: 30,
            },
        }
    }
}

impl World {
    /// Tells the story of a seed from its beginning to its end.
    pub(crate) fn tell(seed: u64) -> World {
        World::begin(seed).live()
    }

    /// The same story with wall clocks that are set, or only said to be. Nobody loses what only the
    /// clock could replace.
    pub(crate) fn tell_with_clocks(seed: u64, jump: bool) -> World {
        let mut world = World::begin(seed);
        world.clocks_jump = jump;
        world.only_clocks = true;
        world.live()
    }

    fn begin(seed: u64) -> World {
        let mut random = fastrand::Rng::with_seed(seed);
        let kind = Kind::of(seed);
        let scale = kind.scale(&mut random);
        let mut world = World::new(random, scale);
        world.is_silent_story = kind == Kind::Silence;
        for index in 0..scale.nodes {
            let dialect = match world.random.u64(0..100) {
                0..8 => Dialect::Old,
                8..16 => Dialect::Newer,
                16..32 => Dialect::Previous,
                _ => Dialect::Ours,
            };
            world.nodes.push(Node::new(index, dialect));
            world.links.push(vec![Link::default(); scale.planes]);
        }
        world.planes.extend((0..scale.planes).map(|_| Site::default()));
        world
    }

    fn live(mut self) -> World {
        self.live_through_chaos();
        if self.is_silent_story {
            self.long_silence();
        }
        self.heal();
        if !self.is_silent_story && self.scale.nodes < 10 && self.chance(25) {
            self.steady_one_way_partition();
        }
        self.settle();
        self.news_travel_fast();
        for plane in 0..self.planes.len() {
            let Some(control) = &self.planes[plane].control else { continue };
            let (retried, held) = (control.core.counts().retried, control.members.holds_ended);
            self.totals.count_many("requests retried", retried);
            self.totals.count_many("expiry held to its end", held);
        }
        self
    }

    /// Starts everybody, and lets things go wrong for a while.
    fn live_through_chaos(&mut self) {
        for plane in 0..self.planes.len() {
            self.start_control(plane);
        }
        for node in 0..self.nodes.len() {
            for _ in 0..self.random.usize(1..4) {
                self.launch_engine(node);
            }
            let pause_ms = self.random.u64(0..2_000);
            self.after(pause_ms, Event::StartAgent { node });
        }
        self.after(500, Event::Fault);
        self.after(200, Event::Ask);
        self.run_for(self.scale.chaos_ms);
    }

    /// Nobody hears of anybody for several minutes: cut off, switched off, or without a control plane.
    fn long_silence(&mut self) {
        let silence_ms = self.random.u64(340_000..420_000);
        let until = self.now.mono.plus_ms(silence_ms);
        let how = self.random.u64(0..3);
        self.note(&format!("silence {how} for {silence_ms} ms"));
        // The others stay, so that most are away and not all.
        let away = if self.random.bool() { self.nodes.len() } else { self.nodes.len() / 2 + 1 };
        match how {
            0 => {
                for node in 0..away {
                    for link in &mut self.links[node] {
                        link.up_cut_until = until;
                        link.down_cut_until = until;
                    }
                }
            }
            1 => {
                for node in 0..away {
                    self.agent_dies(node);
                    self.nodes[node].off_until = until;
                }
            }
            _ => {
                self.control_dies(0);
                self.planes[0].off_until = until;
                // Nobody who starts now was ever a member.
                for node in 0..self.nodes.len() {
                    self.agent_dies(node);
                    self.after(1_000, Event::StartAgent { node });
                }
            }
        }
        // What else goes wrong comes before and after: the control plane is to live through it.
        let faults = std::mem::replace(&mut self.chaos, false);
        self.run_until(until);
        self.chaos = faults;
        self.start_control(0);
    }

    /// Puts everything right.
    fn heal(&mut self) {
        self.note("everything is healed");
        self.chaos = false;
        self.loss_percent = 0;
        for plane in 0..self.planes.len() {
            self.planes[plane].off_until = Mono(0);
            if let Some(life) = self.planes[plane].control.as_ref().map(|control| control.life) {
                self.control_resumes(plane, life);
            }
        }
        for node in 0..self.nodes.len() {
            self.nodes[node].off_until = Mono(0);
            if let Some(life) = self.nodes[node].agent.as_ref().map(|agent| agent.life) {
                self.agent_resumes(node, life);
            }
        }
        // Whoever is about to exit does so first.
        self.run_for(AGENT_EXIT_MS);
        for plane in 0..self.planes.len() {
            self.start_control(plane);
        }
        for node in 0..self.nodes.len() {
            self.links[node].iter_mut().for_each(|link| *link = Link::default());
            if self.nodes[node].twin_of.is_some() {
                self.agent_dies(node);
                self.nodes[node].off_until = Mono(u64::MAX);
                continue;
            }
            self.heal_files(node);
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
            self.end_drains(node);
        }
    }

    /// One direction of one node's links is dead, and stays so: what follows from it follows once.
    fn steady_one_way_partition(&mut self) {
        let node = self.random.usize(..self.scale.nodes);
        let up = self.random.bool();
        if self.nodes[node].dialect == Dialect::Old {
            // Of the oldest agents nothing tells a repeated registration from a new start.
            return;
        }
        self.note(&format!("n{node} is cut off in one direction, up {up}"));
        self.totals.count("steady one-way partitions");
        let until = self.now.mono.plus_ms(5 * STEADY_MS);
        for link in &mut self.links[node] {
            let cut = if up { &mut link.up_cut_until } else { &mut link.down_cut_until };
            *cut = until;
        }
        self.run_for(STEADY_MS);
        let id = self.nodes[node].id.clone();
        let transitions = |world: &World| -> Vec<u64> {
            let controls = world.planes.iter().filter_map(|site| site.control.as_ref());
            controls.map(|control| control.members.transitions(&id)).collect()
        };
        let before = transitions(self);
        self.run_until(until);
        // Whose registrations go on arriving loses its lease, and its place, once.
        let steady = before.iter().zip(transitions(self)).all(|(before, after)| after - before <= 2);
        assert!(steady, "{id} flaps while one direction is cut (up {up})");
    }

    /// Waits, and looks.
    fn settle(&mut self) {
        self.run_for(SETTLE_MS);
        // Who was told that another machine owns its name asks again only when that one's lease is over.
        for _ in 0..ROUNDS_MAX {
            let agents = self.nodes.iter().filter_map(|node| node.agent.as_ref());
            let planes = agents.flat_map(|agent| agent.core.planes());
            let waiting = planes.filter(|plane| *plane.state() == PlaneState::SteppedBack);
            let Some(at) = waiting.filter_map(|plane| plane.deadline()).max() else { break };
            self.run_until(at.plus_ms(TTL_MS));
        }
        self.check_all_is_well();
    }

    /// What changes on a node is known at once, not with the next heartbeat.
    fn news_travel_fast(&mut self) {
        for _ in 0..3 {
            let node = self.random.usize(..self.scale.nodes);
            if self.nodes[node].dialect != Dialect::Old && self.change_slots(node) {
                self.run_for(NEWS_MS);
            }
        }
        self.check_all_is_well();
    }
}
