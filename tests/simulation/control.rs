//! Control planes: each on a machine of its own, knowing nothing of the others; and the requests
//! that they send to engines.

use std::collections::{BTreeMap, VecDeque};

use llama_orch::orchestratord::core::{self as control_core, Asked, Dispatch, Effect, Ending, Options};
use llama_orch::orchestratord::placement::Strategy;
use llama_orch::orchestratord::poller::PollId;
use llama_orch::orchestratord::saved::{Saved, Writer};
use llama_orch::orchestratord::service_registry::{Limits, ReplicaRef, Target};
use llama_orch::pool_managerd::core::CallBody;
use llama_orch::pool_managerd::membership::{Answer, Call};
use llama_orch::replicas::{Fault, ReplicaLease};
use llama_orch::time::Mono;
use llama_orch::wire::id::{NodeId, PoolId};
use llama_orch::wire::pool::PoolStatus;

use crate::agents::boot_id;
use crate::links::understood;
use crate::members::Members;
use crate::polls::PollOutcome;
use crate::rules::{Ledger, TTL_MS};
use crate::world::{Caller, EnginePhase, Event, LeaseBox, World};

/// How long an unreachable peer is waited for.
const CONNECT_TIMEOUT_MS: u64 = 2_000;
const DRAIN_MS: u64 = 10_000;
/// The longest shutdown: the drain, and a turn.
const CONTROL_EXIT_MS: u64 = DRAIN_MS + 100;
/// How long a process that does not run keeps a caller waiting before it looks again.
pub(crate) const STALLED_PAUSE_MS: u64 = 500;

/// A control plane's machine.
#[derive(Default)]
pub(crate) struct Site {
    pub(crate) control: Option<Control>,
    pub(crate) wall_offset_ms: i64,
    /// The state file.
    pub(crate) saved: Option<Vec<u8>>,
    /// Until when nobody starts it.
    pub(crate) off_until: Mono,
}

/// A running control plane.
pub(crate) struct Control {
    pub(crate) core: control_core::Core,
    /// What makes the state file, and what there is of it so far.
    file: (Writer, Vec<u8>),
    pub(crate) life: u64,
    pub(crate) calls: BTreeMap<u64, PendingCall>,
    pub(crate) ledger: Ledger,
    pub(crate) members: Members,
    pub(crate) stalled: bool,
    pub(crate) inbox: VecDeque<Arrival>,
    pub(crate) exit_by: Option<Mono>,
    /// Most nodes were silent when time was last to end something.
    pub(crate) silent_before: bool,
}

/// A node's call that the control plane has not answered.
pub(crate) struct PendingCall {
    pub(crate) from: Caller,
    pub(crate) call: Call,
    pub(crate) body: CallBody,
    /// Of the machine that sent it.
    pub(crate) boot_id: String,
    /// Its agent tells no incarnation.
    pub(crate) is_old: bool,
}

/// A request on its way to, or on, an engine.
#[derive(Debug)]
pub(crate) struct Exchange {
    pub(crate) plane: usize,
    pub(crate) request: u64,
    pub(crate) dispatch: Dispatch,
    node: usize,
    engine: Option<u16>,
    pub(crate) lease: Option<(u64, ReplicaLease)>,
    answered: bool,
}

/// What a control plane's sockets bring.
#[derive(Debug)]
pub(crate) enum Arrival {
    Call { from: Caller, call: Call, body: CallBody },
    AgentSaid { node: NodeId, pool: PoolId, text: String },
    Polled(PollId, PollOutcome),
    Ask(Box<Asked>),
    Leaves(u64),
    Answering { exchange: u64, request: u64 },
    Ended { exchange: u64, request: u64, ending: Ending },
    Shutdown,
}

impl Control {
    /// The replicas that are reached through the same agent as the one on which a request runs.
    fn behind_one_agent(&self, request: u64) -> Vec<ReplicaRef> {
        let registry = self.core.registry();
        let relayed = |replica: &ReplicaRef| {
            registry.replica(*replica).filter(|known| matches!(known.target, Target::Relay { .. }))
        };
        let on = self.ledger.runs_on(request).as_ref().and_then(relayed);
        let node = on.and_then(|known| registry.node(&known.node));
        node.map_or_else(Vec::new, |node| {
            registry.replicas_of(node).filter(|replica| relayed(replica).is_some()).collect()
        })
    }
}

impl Site {
    /// When its core wants a turn.
    pub(crate) fn deadline(&self) -> Option<Mono> {
        self.control.as_ref().filter(|control| !control.stalled)?.core.deadline()
    }
}

impl World {
    pub(crate) fn start_control(&mut self, plane: usize) {
        if self.planes[plane].control.is_some() || self.planes[plane].off_until > self.now.mono {
            return;
        }
        let (life, seed) = (self.number(), self.random.u64(..));
        let options = Options {
            limits: self.limits(),
            strategy: Strategy::ALL[self.random.usize(..Strategy::ALL.len())],
            prefix_affinity: true,
            served_sessions_max: 16_384,
            admission_capacity: self.scale.admission_capacity,
            admission_timeout_ms: 60_000,
            drain_timeout_ms: DRAIN_MS,
            hang_suspect_ms: 60_000,
            local: None,
            polled: self.polled_agents(),
            addresses: None,
            seed,
        };
        let lease_polled_ms = TTL_MS.max(3 * options.limits.poll_interval_ms);
        let now = self.now_at(self.planes[plane].wall_offset_ms);
        self.planes[plane].control = Some(Control {
            core: control_core::Core::new(options, now),
            file: Default::default(),
            life,
            calls: BTreeMap::new(),
            ledger: Ledger::default(),
            members: Members::new(lease_polled_ms),
            stalled: false,
            inbox: VecDeque::new(),
            exit_by: None,
            silent_before: false,
        });
        self.note(&format!("control plane {plane} starts"));
        self.restore_control(plane);
    }

    fn limits(&self) -> Limits {
        let limits = Limits::default();
        Limits { poll_interval_ms: self.poll_interval_ms.unwrap_or(limits.poll_interval_ms), ..limits }
    }

    /// It takes up what it was when it last saved; now and then its state directory is lost with it.
    fn restore_control(&mut self, plane: usize) {
        let lost = self.chance(20);
        let Some(text) = self.planes[plane].saved.take() else { return };
        // How old a file is, only the wall clock tells.
        if lost || self.only_clocks {
            return;
        }
        let now = self.now_at(self.planes[plane].wall_offset_ms);
        let saved = match Saved::read(&text, &Limits::default(), now.wall) {
            Ok(saved) => saved,
            Err(why) => {
                assert!(why.contains(" h ago"), "{why}");
                self.totals.count("state files too old");
                return;
            }
        };
        self.totals.count_many("nodes restored", saved.nodes.len() as u64);
        let Some(control) = &mut self.planes[plane].control else { return };
        control.members.restored(&saved, now);
        self.control_handle(plane, control_core::Input::Restore(saved));
    }

    /// The process is gone: calls get no answer, exchanges are cut.
    pub(crate) fn control_dies(&mut self, plane: usize) {
        let Some(control) = self.planes[plane].control.take() else { return };
        self.totals.count_many("requests cut off", control.ledger.open());
        self.totals.count_many("requests retried", control.core.counts().retried);
        self.totals.count_many("expiry held to its end", control.members.holds_ended);
        for id in self.exchanges_of(plane) {
            if let Some(exchange) = self.exchanges.remove(&id) {
                self.leave_engine(id, &exchange);
                self.return_lease(exchange, None);
            }
        }
    }

    fn exchanges_of(&self, plane: usize) -> Vec<u64> {
        let own = self.exchanges.iter().filter(|(_, exchange)| exchange.plane == plane);
        own.map(|(id, _)| *id).collect()
    }

    /// The control plane's process does not run for a while; what arrives waits in its sockets.
    pub(crate) fn stall_control(&mut self, plane: usize, stall_ms: u64) {
        let control = self.planes[plane].control.as_mut();
        if let Some(control) = control.filter(|control| !control.stalled) {
            control.stalled = true;
            control.exit_by = control.exit_by.map(|at| at.plus_ms(stall_ms));
            let life = control.life;
            self.note(&format!("control plane {plane} stalls for {stall_ms} ms"));
            self.totals.count("control planes stalled");
            self.after(stall_ms, Event::ControlResumes { plane, life });
        }
    }

    pub(crate) fn control_resumes(&mut self, plane: usize, life: u64) {
        let control = self.planes[plane].control.as_mut();
        if let Some(control) = control.filter(|control| control.life == life && control.stalled) {
            control.stalled = false;
            self.note(&format!("control plane {plane} resumes"));
            self.control_turn(plane);
        }
    }

    pub(crate) fn stop_control(&mut self, plane: usize) {
        if self.planes[plane].control.is_some() {
            self.note(&format!("control plane {plane} is to stop"));
            self.arrive(plane, Arrival::Shutdown);
        }
    }

    pub(crate) fn arrive(&mut self, plane: usize, arrival: Arrival) {
        let Some(control) = &mut self.planes[plane].control else { return };
        control.inbox.push_back(arrival);
        if !control.stalled {
            self.control_turn(plane);
        }
    }

    /// One turn of the control plane's loop: all that arrived, then `Tick`.
    pub(crate) fn control_turn(&mut self, plane: usize) {
        self.turns += 1;
        let next = |world: &mut World| world.planes[plane].control.as_mut()?.inbox.pop_front();
        while let Some(arrival) = next(self) {
            if let Some(input) = self.control_input(plane, arrival) {
                self.control_handle(plane, input);
            }
        }
        self.control_handle(plane, control_core::Input::Tick);
        self.check_control(plane);
    }

    fn control_input(&mut self, plane: usize, arrival: Arrival) -> Option<control_core::Input> {
        use control_core::Input;
        let number = self.number();
        Some(match arrival {
            Arrival::Call { from, call, body } => {
                let peer = format!("10.0.0.{}", from.node + 1);
                let reply = number;
                let sender = &self.nodes[from.node];
                let (node, boot_id) = (sender.id.clone(), boot_id(from.node, from.boot));
                let old = sender.dialect == crate::links::Dialect::Old;
                if sender.twin_of.is_some() && call == Call::Register {
                    self.totals.count("registrations of a twin");
                }
                let control = self.planes[plane].control.as_mut()?;
                let pending = PendingCall { from, call, body: body.clone(), boot_id, is_old: old };
                control.ledger.names.insert(from.node, node.clone());
                control.calls.insert(reply, pending);
                match body {
                    CallBody::Register(body) => Input::Register { reply, peer, body },
                    CallBody::Heartbeat(body) => Input::Heartbeat { reply, peer, node, body },
                    CallBody::Deregister { incarnation } => {
                        Input::Deregister { reply, node, incarnation: (!old).then_some(incarnation) }
                    }
                }
            }
            Arrival::AgentSaid { node, pool, text } => {
                let status: PoolStatus = serde_json::from_str(&text).expect("what an agent writes is read");
                self.planes[plane].control.as_mut()?.members.told_of_pool(&node, &pool, &status);
                Input::AgentSaid { node, pool, replicas: status.replicas }
            }
            Arrival::Polled(id, outcome) => Input::Polled(id, outcome),
            Arrival::Ask(asked) => {
                let control = self.planes[plane].control.as_mut()?;
                control.ledger.asked(number, &asked, self.now.mono);
                let life = control.life;
                if self.chance(10) {
                    let patience_ms = self.random.u64(0..15_000);
                    self.after(patience_ms, Event::ClientLeaves { plane, request: number, life });
                }
                Input::Ask { request: number, asked }
            }
            Arrival::Leaves(request) => {
                let is_it = |exchange: &Exchange| exchange.plane == plane && exchange.request == request;
                let on_it = self.exchanges.iter().find_map(|(id, exchange)| is_it(exchange).then_some(*id));
                if let Some(exchange) = on_it {
                    self.end_exchange(exchange, Ending::Withdrawn, None);
                    return None;
                }
                if !self.planes[plane].control.as_mut()?.ledger.withdraw(request) {
                    return None;
                }
                self.totals.count("requests withdrawn");
                Input::Withdraw(request)
            }
            Arrival::Answering { exchange, request } => {
                self.planes[plane].control.as_mut()?.ledger.answering(request, exchange);
                Input::Answering(request)
            }
            Arrival::Ended { exchange, request, ending } => {
                let control = self.planes[plane].control.as_mut()?;
                // Where the agent cannot be reached, none of the engines behind it can.
                let behind = match &ending {
                    Ending::Failed { connect: true, .. } => control.behind_one_agent(request),
                    _ => Vec::new(),
                };
                control.ledger.ended(request, exchange, &ending, self.now.mono);
                behind.into_iter().for_each(|replica| control.ledger.failed(replica, self.now.mono));
                match &ending {
                    Ending::Complete => self.totals.count("requests answered"),
                    Ending::Withdrawn => self.totals.count("requests withdrawn"),
                    Ending::Failed { answered: true, .. } => self.totals.count("requests broken"),
                    Ending::Aborted { .. } => self.totals.count("requests called back"),
                    Ending::Failed { .. }
                    | Ending::BrokenOff(_)
                    | Ending::NotTried(_)
                    | Ending::NotReady { .. } => {}
                }
                Input::Ended(request, ending)
            }
            Arrival::Shutdown => {
                let control = self.planes[plane].control.as_mut()?;
                control.exit_by.get_or_insert(self.now.mono.plus_ms(CONTROL_EXIT_MS));
                Input::Shutdown
            }
        })
    }

    fn control_handle(&mut self, plane: usize, input: control_core::Input) {
        let thorough = self.turns.is_multiple_of(self.scale.look_at_all_every);
        let now = self.now_at(self.planes[plane].wall_offset_ms);
        let Some(control) = &mut self.planes[plane].control else { return };
        let tick = matches!(input, control_core::Input::Tick);
        control.look_for_silence(now.mono);
        let poll = match &input {
            control_core::Input::Polled(id, outcome) => control.poll_is_read(*id, outcome, now),
            _ => None,
        };
        let mut effects = Vec::new();
        control.core.handle(input, now, &mut effects);
        if let Some(poll) = poll {
            self.totals.count(control.check_poll(poll, now));
        }
        if thorough {
            control.core.check_invariants();
        }
        if tick {
            control.ledger.ticked(now.mono);
        }
        // In their order: what one effect takes for granted, an earlier one may have brought about.
        for effect in &effects {
            control.check_effect(effect, now.mono);
        }
        control.check_counts(self.scale.admission_capacity);
        if tick {
            control.check_leases(now.mono);
        }
        for effect in effects {
            self.control_effect(plane, effect);
        }
    }

    fn control_effect(&mut self, plane: usize, effect: Effect) {
        let is_call = |world: &World, id: &u64| {
            world.planes[plane].control.as_ref().is_some_and(|control| control.calls.contains_key(id))
        };
        match effect {
            Effect::Process(_) => {}
            Effect::Registered(call, reply) => {
                let answer = Answer::Ok {
                    next_heartbeat_ms: reply.next_heartbeat_ms,
                    ttl_ms: reply.ttl_ms,
                    registry_epoch: reply.registry_epoch,
                };
                self.reply(plane, call, answer);
            }
            Effect::Beaten(call, reply) => {
                self.totals.count("heartbeats taken");
                let next_heartbeat_ms = reply.next_heartbeat_ms;
                self.reply(plane, call, Answer::Ok { next_heartbeat_ms, ttl_ms: None, registry_epoch: None });
            }
            Effect::Removed(call) => {
                let answer = Answer::Ok { next_heartbeat_ms: None, ttl_ms: None, registry_epoch: None };
                self.reply(plane, call, answer);
            }
            Effect::Refuse(call, refusal) if is_call(self, &call) => {
                self.totals.count("calls refused");
                self.reply(plane, call, understood(&refusal));
            }
            Effect::Refuse(request, refusal) => {
                self.note(&format!("request {request} refused: {}", refusal.message()));
                self.totals.count("requests refused");
            }
            Effect::Waiting { .. } => self.totals.count("requests waited"),
            Effect::Dispatch(request, dispatch) => self.dispatch(plane, request, dispatch),
            Effect::Abort { request, even_answered, .. } => {
                let is_meant = |exchange: &Exchange| {
                    let is_it = exchange.plane == plane && exchange.request == request;
                    is_it && (even_answered || !exchange.answered)
                };
                let mut meant = self.exchanges.iter().filter(|(_, exchange)| is_meant(exchange));
                if let Some((id, answered)) = meant.next().map(|(id, exchange)| (*id, exchange.answered)) {
                    self.end_exchange(id, Ending::Aborted { answered }, None);
                }
            }
            Effect::AskAgent { pool, agent, .. } => {
                let life = self.planes[plane].control.as_ref().map_or(0, |control| control.life);
                let node = self.machine_at(agent.ip().expect("an address"));
                if !self.is_cut(node, plane) {
                    let delay_ms = self.random.u64(0..20);
                    self.after(delay_ms, Event::AgentAsked { plane, life, node, pool });
                }
            }
            Effect::Probe(order) => panic!("a control plane without engines of its own probes {order:?}"),
            Effect::Save(piece) => {
                let Some(control) = &mut self.planes[plane].control else { return };
                let (writer, written) = &mut control.file;
                if piece.begins.is_some() {
                    written.clear();
                }
                written.extend(writer.text(&piece));
                if !piece.ends {
                    return self.control_handle(plane, control_core::Input::PieceWritten);
                }
                let text = std::mem::take(written);
                let fails = self.chance(20);
                if !fails {
                    self.planes[plane].saved = Some(text);
                }
                let result = if fails { Err("no space".into()) } else { Ok(()) };
                self.control_handle(plane, control_core::Input::Saved(result));
            }
            Effect::Poll(order) => self.send_poll(plane, order),
            Effect::Noted(_) => panic!("nobody sends notices here"),
            Effect::Log(what) => {
                let happening = what.happening();
                match (happening.kind, happening.state) {
                    ("node", "Suspect") => self.totals.count("nodes suspected"),
                    ("node", "twin") => self.totals.count("twins refused"),
                    ("daemon", "held") => self.totals.count("expiry held"),
                    _ => {}
                }
                if happening.kind == "node" {
                    self.note_member(&format!("{plane} {} {}", happening.subject, happening.state));
                }
                self.note(&format!("control plane {plane}: {}", happening.text));
            }
            Effect::Exit => {
                self.note(&format!("control plane {plane} exits"));
                self.totals.count("control planes exited");
                self.control_dies(plane);
                let pause_ms = self.random.u64(10..10_000);
                self.after(pause_ms, Event::StartControl { plane });
            }
        }
    }

    fn reply(&mut self, plane: usize, call: u64, answer: Answer) {
        let pending = self.planes[plane].control.as_mut().and_then(|control| control.calls.remove(&call));
        let pending = pending.expect("a call is answered once, and only if it was made");
        self.send_answer(pending.from, pending.call, answer);
    }

    pub(crate) fn agent_says(&mut self, plane: usize, life: u64, node: NodeId, pool: PoolId, text: &str) {
        if self.planes[plane].control.as_ref().is_some_and(|control| control.life == life) {
            self.arrive(plane, Arrival::AgentSaid { node, pool, text: text.to_string() });
        }
    }

    pub(crate) fn client_leaves(&mut self, plane: usize, request: u64, life: u64) {
        if self.planes[plane].control.as_ref().is_some_and(|control| control.life == life) {
            self.arrive(plane, Arrival::Leaves(request));
        }
    }

    // Requests on their way to engines.

    /// The machine that has an address.
    pub(crate) fn machine_at(&self, ip: std::net::IpAddr) -> usize {
        let std::net::IpAddr::V4(ip) = ip else { panic!("{ip} is no address of this world") };
        usize::from(ip.octets()[3]) - 1
    }

    fn dispatch(&mut self, plane: usize, request: u64, dispatch: Dispatch) {
        let id = self.number();
        let address = match &dispatch.target {
            Target::Direct(engine) => engine.ip(),
            Target::Relay { agent, .. } => agent.ip(),
            Target::AskNode | Target::Forbidden(_) => {
                panic!("request {request} is sent to an unknown address")
            }
        };
        let node = self.machine_at(address.expect("an address"));
        self.note(&format!("request {request} goes to n{node} {} {}", dispatch.key, dispatch.generation));
        let cut = self.is_cut(node, plane);
        let Some(control) = &mut self.planes[plane].control else { return };
        control.ledger.dispatched(request, id, &dispatch);
        let exchange =
            Exchange { plane, request, dispatch, node, engine: None, lease: None, answered: false };
        self.exchanges.insert(id, exchange);
        if cut {
            self.after(CONNECT_TIMEOUT_MS, Event::ExchangeFails { id, connect: true, timeout: false });
        } else {
            let delay_ms = self.random.u64(0..20);
            self.after(delay_ms, Event::ExchangeArrives(id));
        }
    }

    pub(crate) fn exchange_arrives(&mut self, id: u64) {
        let Some(exchange) = self.exchanges.get(&id) else { return };
        let (node, dispatch) = (exchange.node, exchange.dispatch.clone());
        let engine = match &dispatch.target {
            Target::Relay { .. } => {
                let Some(agent) = &mut self.nodes[node].agent else {
                    return self.exchange_failed(id, true, false);
                };
                if agent.stalled {
                    // Its kernel has taken the connection.
                    return self.after(STALLED_PAUSE_MS, Event::ExchangeArrives(id));
                }
                let life = agent.life;
                let acquired = agent.core.acquire(&dispatch.key, Some(dispatch.generation), dispatch.slots);
                let present = agent.core.replicas().replica_status(&dispatch.key).map(|now| now.generation);
                self.agent_turn(node, Vec::new());
                match acquired {
                    Ok((lease, engine, _)) => {
                        assert_eq!(
                            present,
                            Some(dispatch.generation),
                            "n{node}: a request for another engine of {} is taken",
                            dispatch.key
                        );
                        if let Some(exchange) = self.exchanges.get_mut(&id) {
                            exchange.lease = Some((life, lease));
                        }
                        engine
                    }
                    Err(_) => return self.exchange_failed(id, false, false),
                }
            }
            target => target.engine().expect("a known address").clone(),
        };
        let port = engine.port();
        match self.nodes[node].engines.get_mut(&port).map(|engine| (engine.phase, engine)) {
            Some((EnginePhase::Healthy, engine)) => {
                engine.running.push(id);
                if let Some(exchange) = self.exchanges.get_mut(&id) {
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

    pub(crate) fn exchange_answers(&mut self, id: u64) {
        let Some(exchange) = self.exchanges.get(&id) else { return };
        let (plane, node, request) = (exchange.plane, exchange.node, exchange.request);
        if !self.is_cut(node, plane) {
            if let Some(exchange) = self.exchanges.get_mut(&id) {
                exchange.answered = true;
            }
            self.arrive(plane, Arrival::Answering { exchange: id, request });
        }
    }

    pub(crate) fn exchange_ends(&mut self, id: u64) {
        let Some(exchange) = self.exchanges.get(&id) else { return };
        let (plane, node, answered) = (exchange.plane, exchange.node, exchange.answered);
        if self.is_cut(node, plane) || !answered {
            let timeout = self.chance(30);
            self.exchange_failed(id, false, timeout);
        } else {
            self.end_exchange(id, Ending::Complete, None);
        }
    }

    pub(crate) fn exchange_failed(&mut self, id: u64, connect: bool, timeout: bool) {
        let Some(exchange) = self.exchanges.get(&id) else { return };
        let (answered, relayed) = (exchange.answered, exchange.lease.is_some());
        let reason = if connect { "connection refused" } else { "reset" }.to_string();
        let fault = if connect { Fault::ConnectFailed } else { Fault::Broken };
        // Behind a relay, the connection to the agent has worked.
        let connect = connect && !relayed;
        let ending = Ending::Failed { reason: reason.clone(), connect, timeout, answered };
        self.end_exchange(id, ending, Some((fault, reason)));
    }

    fn end_exchange(&mut self, id: u64, ending: Ending, fault: Option<(Fault, String)>) {
        let Some(exchange) = self.exchanges.remove(&id) else { return };
        self.leave_engine(id, &exchange);
        let (plane, request) = (exchange.plane, exchange.request);
        self.return_lease(exchange, fault);
        self.arrive(plane, Arrival::Ended { exchange: id, request, ending });
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
