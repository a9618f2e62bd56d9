//! The control plane's shell: it owns the reactor, the sockets and the core, turns what happens into
//! inputs, and carries out effects. The loop is in [`Daemon::run`].

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::net::SocketAddr;

use crate::http::fields::FieldLines;
use crate::http::server::{Request, Response};
use crate::net::{DialRule, Net, NetEvent, Outbound, Outcome, Patience, Sink, Timing};
use crate::reactor::signal::Signals;
use crate::reactor::token::{Kind, Token, TokenMap};
use crate::reactor::{Reactor, Registry, Waker, now};
use crate::replicas::directory::FILE_BYTES;
use crate::replicas::{Activity, AllowList, EnginePolicy, ProbeOrder, Processes, Watch, probe};
use crate::service::auth::Fingerprint;
use crate::service::guard::{Admission, Guard};
use crate::service::lag::LoopLag;
use crate::service::shell::{self, Shell};
use crate::service::state_lock::StateLock;
use crate::service::supervisor::Supervisor;
use crate::service::tls::Tls;
use crate::service::{logging, machine, routes};
use crate::settings::Exit;
use crate::time::{Mono, Now, earliest};
use crate::wire::id::{NodeId, PoolId, ReplicaKey};

use self::jobs::{Front, Job, Jobs};
use self::state::Saver;
use super::api::{self, Action};
use super::config::Config;
use super::core::{Core, Dispatch, Effect, Ending, Input, Options, RequestId};
use super::dashboard::board::Board;
use super::dashboard::history::History;
use super::direct::{Direct, Engine};
use super::drains;
use super::envelope::{to_client, to_engine};
use super::explain::{self, Explain};
use super::meters::Metered;
use super::poller::PollId;
use super::refusal::Refusal;
use super::service_registry::Target;
use super::sessions::{Sessions, Turn};
use super::tasks::Tasks;

mod agents;
mod certificates;
mod dashboard;
mod direct;
mod front_door;
mod jobs;
mod pool_orders;
mod state;
mod tasks;
mod workers;

/// How long a connection to an engine may take to come about, in milliseconds.
const CONNECT_MS: u64 = 2_000;
/// An engine that answers so did not take the request: another one may.
const HOLD_BACK: &[u16] = &[502, 503, 504];
/// An agent also answers 409 when another engine stands behind the name by now, or none.
const HOLD_BACK_FROM_AGENT: &[u16] = &[409, 502, 503, 504];
/// How long after a notice the runtime directory is listed, in milliseconds: many notices are one listing.
const RESCAN_MS: u64 = 50;
/// How long after a request or a piece of an answer the loop waits in naps, in milliseconds: those to come may be
/// near, and are faster then. So long is it between two tokens at 40 a second.
const AWAKE_MS: u64 = 25;
/// How long the end waits for clients that have just connected, or are owed a last answer, in
/// milliseconds: requests follow their connections at once.
const FAREWELL_MS: u64 = 500;
/// Turns in a row that may end with sockets still to be read before clocks are looked at all the same.
const TURNS_BEHIND_MAX: u32 = 64;
/// Field in which a client of the OpenAI routes names its session.
const SESSION_FIELD: &str = "x-session-id";
/// Name of this machine's node in the HOME profile.
const LOCAL_NODE: &str = "local";

/// The process.
pub struct Daemon {
    reactor: Reactor,
    registry: Registry,
    signals: Signals,
    waker: Waker,
    saver: Option<Saver>,
    /// The state directory is this process's alone.
    _lock: Option<StateLock>,
    watch: Option<Watch>,
    processes: Processes,
    net: Net,
    core: Core,
    tasks: Tasks,
    sessions: Sessions,
    jobs: Jobs,
    by_client: TokenMap<RequestId>,
    exchanges: TokenMap<Running>,
    direct: Direct<Token>,
    orders: BTreeMap<u64, pool_orders::Ordered>,
    order_serial: u64,
    explain: Explain,
    lag: LoopLag,
    board: Board<Token>,
    history: History,
    supervisor: Supervisor,
    next_request: RequestId,
    guard: Guard,
    tls: Tls,
    config: Config,
    started: u64,
    effects: Vec<Effect>,
    /// Empty: the memory of the effects before.
    spare_effects: Vec<Effect>,
    /// All is done: the process ends then, or once no client awaits anything.
    ends_by: Option<Mono>,
    over: bool,
}

/// What an exchange is for.
enum Running {
    Probe(Box<ProbeOrder>),
    Agent(NodeId, PoolId),
    Poll(PollId),
    Request(RequestId),
    Ordered(u64, NodeId),
    Told(Engine),
}

impl Daemon {
    /// Binds and reads what is needed once.
    ///
    /// # Errors
    /// [`Exit`] that says what could not be had and what to do.
    pub fn start(mut config: Config) -> Result<Daemon, Exit> {
        for note in &config.notes {
            log::warn!("{note}");
        }
        let Shell { reactor, registry, waker, signals, mut net, bound, supervisor } = Shell::start(
            config.addr,
            "ORCHESTRATORD_ADDR",
            |limits| config.bodies.apply(limits),
            config.fixed(),
            config.memory,
        )?;
        shell::note_other_address(config.addr, bound, config.guard.credentials.keys());
        // Without nodes nothing is kept.
        let lock = config
            .cloud
            .then(|| StateLock::take(&config.state_dir, "orchestratord", "ORCHESTRATORD_STATE_DIR"));
        let lock = lock.transpose()?;
        let rules = address_rules(bound);
        net.set_dial_rule(DialRule::new(move |url, ip| rules.check_address(url, ip)));
        net.keep_streams_alive(config.stream_keepalive_ms);
        let at = now();
        let mut core = Core::new(options(&config, bound)?, at);
        workers::accept(&mut core, &config, bound, at)?;
        let watch = config.watches().then(|| {
            // In this profile files have the memory that nodes would have.
            let files_max = config.tables.registry_bytes_max / FILE_BYTES;
            Watch::new(config.runtime_dir.clone(), config.watch_interval_ms, Token::only(Kind::DirWatch))
                .limited_to(files_max)
        });
        let profile = if config.cloud {
            "CLOUD profile".to_string()
        } else if !config.watches() {
            format!("HOME profile, polling {} agents", config.pool_managers.len())
        } else {
            format!("HOME profile, watching {}", config.runtime_dir.display())
        };
        let guard = Guard::new(std::mem::take(&mut config.guard), &[machine::host_name()]);
        let tls = Tls::start(config.tls.clone(), &mut net, &registry, at)?;
        let scheme = if config.tls.serves() { "https" } else { "http" };
        let (version, shown) = (env!("CARGO_PKG_VERSION"), guard.shown());
        log::info!("orchestratord {version} on {scheme}://{bound}, {profile}, {shown}");
        Ok(Daemon {
            reactor,
            registry,
            signals,
            waker,
            saver: None,
            _lock: lock,
            watch,
            processes: Processes::new(),
            net,
            core,
            tasks: Tasks::new(config.tables.tasks_max, config.tables.gone_max),
            sessions: Sessions::new(config.tables.sessions_max),
            jobs: Jobs::default(),
            by_client: TokenMap::default(),
            exchanges: TokenMap::default(),
            direct: Direct::new(config.hang_suspect_ms),
            orders: BTreeMap::new(),
            order_serial: 0,
            explain: Explain::new(config.tables.explain_max),
            lag: LoopLag::default(),
            board: Board::default(),
            history: History::new(at),
            supervisor,
            next_request: 1,
            guard,
            tls,
            config,
            started: at.wall.unix_ms() / 1000,
            effects: Vec::new(),
            spare_effects: Vec::new(),
            ends_by: None,
            over: false,
        })
    }

    /// The loop: wait, take what happened at one time, act, until the core says that it is over.
    ///
    /// # Errors
    /// [`Exit`] if the reactor fails.
    pub fn run(mut self) -> Result<(), Exit> {
        let mut now = now();
        let mut woke = now.mono;
        let mut turns_behind = 0;
        self.restore(now);
        self.scan(false, now);
        while !self.over {
            self.perform(now);
            self.over |= self.ends_by.is_some_and(|at| now.mono >= at || !self.net.is_awaited());
            if turns_behind == 0 {
                self.tell_supervisor(now);
            }
            let watch = self.watch.as_ref().map(Watch::deadline);
            let is_scanning = self.watch.as_ref().is_some_and(Watch::busy);
            let deadline = earliest(earliest(self.core.deadline(), self.net.deadline()), watch);
            let deadline = earliest(deadline, self.tasks_deadline());
            let deadline = earliest(deadline, self.supervisor.deadline());
            let deadline = earliest(deadline, self.board.deadline());
            let deadline = earliest(deadline, self.ends_by);
            let deadline = earliest(deadline, self.tls.deadline());
            let deadline = earliest(deadline, self.guard.deadline());
            let deadline = earliest(deadline, self.direct.deadline());
            if let Some(slow) = self.lag.worked(woke, crate::reactor::now().mono) {
                log::warn!("{slow}");
            }
            self.reactor.nap_until(self.net.relayed_at().plus_ms(AWAKE_MS));
            now = self
                .reactor
                .wait(deadline, self.net.busy() || is_scanning || self.over)
                .map_err(|error| Exit::runtime(format!("the event loop failed: {error}")))?;
            woke = now.mono;
            self.lag.woke(deadline, woke);
            self.note_history(now);
            let (mut changed, mut stops, mut ended) = (false, 0, Vec::new());
            let mut tokens_changed = false;
            for (token, edge) in self.reactor.events() {
                match token.kind() {
                    Kind::DirWatch => changed = true,
                    Kind::Process => ended.push(token),
                    Kind::Stop => stops += self.signals.stops(),
                    Kind::Certificates => self.tls.changed(&self.registry, now.mono),
                    Kind::Reload => {
                        if self.signals.reloads() > 0 {
                            self.supervisor.reload(now.mono, || {
                                self.tls.reload(&mut self.net, &self.registry, now);
                                self.guard.credentials.reload(now.mono);
                            });
                        }
                    }
                    Kind::Credentials => tokens_changed = true,
                    Kind::Waker | Kind::KernelLog | Kind::Provisioners => {}
                    Kind::Listener | Kind::Client | Kind::Upstream | Kind::Exchange => {
                        self.net.on_edge(token, edge);
                    }
                }
            }
            // Sockets before clocks: after a stall of this process, heartbeats that arrived during it
            // must renew their leases before any lease is looked at.
            self.take_ended(&ended, now);
            if changed || is_scanning || watch.is_some_and(|at| at <= now.mono) {
                self.scan(changed, now);
            }
            self.take_saved(now);
            self.tls.turn(&mut self.net, now);
            self.look_after_guard(tokens_changed, now);
            self.net.turn(now.mono);
            // Where the process was stopped in between, what was read is younger than the wait, and a lease that it
            // renews would end too early.
            let read = crate::reactor::now();
            if self.reactor.was_held_up(read.mono) {
                now = read;
            }
            self.take_net_events(now);
            (0..stops).for_each(|_| self.stop(now));
            self.tasks_turn(now);
            self.tell_of_silence(now);
            self.show_board(now);
            let has_seen_all = !self.reactor.has_more() && !self.reactor.was_held_up(now.mono);
            let caught_up = !self.net.is_behind() && has_seen_all;
            turns_behind = if caught_up { 0 } else { turns_behind + 1 };
            if caught_up || turns_behind >= TURNS_BEHIND_MAX {
                self.core.handle(Input::Tick, now, &mut self.effects);
            }
        }
        Ok(())
    }

    /// A turn has ended that left nothing behind: once the directory was looked at as a whole, where one
    /// is watched, the daemon is ready.
    fn tell_supervisor(&mut self, now: Now) {
        if !self.watch.as_ref().is_some_and(Watch::busy) {
            self.supervisor.ready(|| self.core.status(), now.mono);
        }
        self.supervisor.turned(|| self.core.status(), now.mono);
    }

    /// Looks after the tokens, and answers whom it was refused long enough.
    fn look_after_guard(&mut self, tokens_changed: bool, now: Now) {
        self.guard.turn(tokens_changed, now.mono, &self.registry);
        while let Some((client, response)) = self.guard.due(now.mono) {
            self.net.respond(client, &response, now.mono);
        }
    }

    fn scan(&mut self, changed: bool, now: Now) {
        let Some(watch) = &mut self.watch else { return };
        let scan = watch.turn(changed, now.mono, &self.registry);
        if let Some(trouble) = scan.trouble {
            self.core.handle(Input::WatchTrouble(trouble), now, &mut self.effects);
        }
        for listing in scan.listings {
            self.core.handle(Input::Listing(listing), now, &mut self.effects);
            self.perform(now);
        }
    }

    fn take_ended(&mut self, ended: &[Token], now: Now) {
        for token in ended {
            if let Some((key, generation, seen)) = self.processes.ended(*token, &self.registry) {
                self.core.handle(Input::Process(key, generation, seen), now, &mut self.effects);
            }
        }
        self.perform(now);
    }

    fn take_net_events(&mut self, now: Now) {
        // What was caused by others is logged before, without the name of a request.
        self.perform(now);
        while let Some(event) = self.net.next_event() {
            let _about = logging::about(self.name_of(&event));
            match event {
                NetEvent::Request { client, request, peer } => self.serve(client, request, peer, now),
                NetEvent::ClientGone { client } => self.client_gone(client, now),
                NetEvent::Drained { client } => self.drained(client),
                NetEvent::Head { exchange, status } => self.head(exchange, status, now),
                NetEvent::Data { exchange, bytes } => self.data(exchange, &bytes, now),
                NetEvent::Finished { exchange, outcome, timing } => {
                    self.meter(exchange, &timing, now);
                    self.explain_attempt(exchange, &outcome, timing);
                    self.finished(exchange, outcome, now);
                }
            }
            self.perform(now);
        }
    }

    fn perform(&mut self, now: Now) {
        while !self.effects.is_empty() {
            let mut effects = std::mem::replace(&mut self.effects, std::mem::take(&mut self.spare_effects));
            for effect in effects.drain(..) {
                match effect {
                    Effect::Dispatch(request, dispatch) => self.dispatch(request, &dispatch, now),
                    effect => self.perform_seldom(effect, now),
                }
            }
            self.spare_effects = effects;
        }
    }

    /// Effects that most requests do not have. On its own, so that the code of the one that all have stays small
    /// and lies close together.
    #[inline(never)]
    fn perform_seldom(&mut self, effect: Effect, now: Now) {
        match effect {
            Effect::Registered(call, reply) => self.reply(call, &Response::json(200, &reply), now),
            Effect::Beaten(call, reply) => self.reply(call, &Response::json(200, &reply), now),
            Effect::Removed(call) => self.reply(call, &Response::empty(204), now),
            Effect::Noted(call) => self.reply(call, &Response::empty(202), now),
            Effect::Poll(order) => self.poll_agent(order, now),
            Effect::Refuse(request, refusal) => self.refuse(request, &refusal, now),
            // Tasks were told when they were created; other clients just wait.
            Effect::Waiting { request, position, considered, .. } => {
                self.explain.waits(request, position, considered);
            }
            Effect::Abort { request, reason, even_answered } => {
                let exchange = self.jobs.get(request).and_then(|job| job.exchange);
                if let Some(exchange) = exchange
                    && (even_answered || !self.net.is_answered(exchange))
                {
                    self.net.abort(exchange, &reason, now.mono);
                }
            }
            Effect::Process(order) => {
                if let Some((key, generation, seen)) = self.processes.carry_out(order, &self.registry) {
                    let input = Input::Process(key, generation, seen);
                    self.core.handle(input, now, &mut self.effects);
                }
            }
            Effect::Probe(order) => {
                let exchange = self.net.start(probe::outbound(&order), now.mono);
                self.exchanges.insert(exchange, Running::Probe(Box::new(order)));
            }
            Effect::Save(saved) => self.save(saved, now),
            Effect::AskAgent { node, pool, agent } => self.ask_agent(node, pool, agent, now),
            Effect::Log(what) => {
                logging::tell(&*what);
                // Words are made for those who read them.
                if self.board.is_watched() {
                    self.board.happened(&what.happening());
                }
            }
            Effect::Exit => {
                self.ends_by = Some(now.mono.plus_ms(FAREWELL_MS));
                self.close_board(now);
            }
            // Taken by `perform`.
            Effect::Dispatch(..) => {}
        }
    }

    fn serve(&mut self, client: Token, request: Box<Request>, peer: SocketAddr, now: Now) {
        let (found, policy, route) = routes::find(api::ROUTES, &request.head, request.head.path());
        let key = match self.guard.judge(&request.head, policy, route, peer, now.mono) {
            Admission::Pass { fields, key } => {
                self.net.add_fields(client, fields);
                key
            }
            Admission::Preflight(response) => return self.net.respond(client, &response, now.mono),
            Admission::Barred(barred, delay_ms) => {
                let response = Refusal::Barred(barred).response(request.head.path().starts_with("/v1/"));
                if let Some(response) = self.guard.hold(client, response, delay_ms, now.mono) {
                    self.net.respond(client, &response, now.mono);
                }
                return;
            }
        };
        let Some(peer) = self.net.address(client).cloned() else { return };
        let facts = api::Facts {
            aliases: &self.config.aliases,
            explain: &self.explain,
            guard: &self.guard,
            cloud: self.config.cloud,
            watch_mode: self.watch.as_ref().map(Watch::mode),
            started: self.started,
            peer: &peer,
            key,
            resident_bytes: (request.head.path() == "/metrics").then(machine::resident_bytes).flatten(),
            clients: self.net.clients(),
            tasks: self.tasks.len(),
            sessions: self.sessions.len(),
            bodies: (self.net.bodies_bytes(), self.net.bodies_refused()),
            lag: &self.lag,
            token_gaps: self.net.token_gaps(),
            tls: self.tls.meters(&self.net),
        };
        let action = api::route(found, &request, &self.core, &facts, now);
        if let Some(refusal) = self.uncertified(client, &action) {
            return self.net.respond(client, &refusal.response(false), now.mono);
        }
        match action {
            Action::Engine(forwarding) => self.forward(client, request, *forwarding, now),
            action => self.serve_seldom(client, action, request, &peer, key, now),
        }
    }

    /// Actions that need no engine. On its own, as [`Daemon::perform_seldom`].
    #[inline(never)]
    fn serve_seldom(
        &mut self,
        client: Token,
        action: Action,
        request: Box<Request>,
        peer: &str,
        key: Option<Fingerprint>,
        now: Now,
    ) {
        match action {
            Action::Respond(response) => self.net.respond(client, &response, now.mono),
            Action::Refuse(refusal, openai) => self.net.respond(client, &refusal.response(openai), now.mono),
            Action::Register(body) => {
                let reply = self.open_job(Front::Call(client), Vec::new(), now);
                self.core.handle(
                    Input::Register { reply, peer: peer.to_string(), body },
                    now,
                    &mut self.effects,
                );
            }
            Action::Heartbeat(node, body) => {
                let reply = self.open_job(Front::Call(client), Vec::new(), now);
                let input = Input::Heartbeat { reply, peer: peer.to_string(), node, body };
                self.core.handle(input, now, &mut self.effects);
            }
            Action::Deregister(node, incarnation) => {
                let reply = self.open_job(Front::Call(client), Vec::new(), now);
                self.core.handle(Input::Deregister { reply, node, incarnation }, now, &mut self.effects);
            }
            Action::PoolReady(notice) => {
                if let Some(watch) = &mut self.watch {
                    watch.look_by(now.mono.plus_ms(RESCAN_MS));
                }
                let reply = self.open_job(Front::Call(client), Vec::new(), now);
                self.core.handle(Input::PoolReady { reply, notice }, now, &mut self.effects);
            }
            Action::Drain(order) => {
                self.core.handle(Input::Drain(order.clone()), now, &mut self.effects);
                self.net.respond(client, &drains::done(&order, self.core.local()), now.mono);
            }
            Action::Worker(order) => self.worker(client, order, key, now),
            Action::Order(order, pool) => self.order(client, order, pool, request.body.to_vec(), now),
            Action::Engine(forwarding) => self.forward(client, request, *forwarding, now),
            Action::CreateTask(task) => self.create_task(client, *task, now),
            Action::TaskEvents(id, verbose) => self.open_task(client, &id, verbose, now),
            Action::CancelTask(id) => self.cancel_task(client, &id, now),
            Action::ShowSession(name) => self.show_session(client, &name, now),
            Action::EndSession(name) => self.end_session(client, &name, now),
            Action::Watch => self.watch_board(client, now),
        }
    }

    fn open_job(&mut self, front: Front, body: Vec<u8>, now: Now) -> RequestId {
        let request = self.next_request;
        self.next_request += 1;
        self.jobs.insert(request, Job::new(front, body, now));
        request
    }

    fn close_job(&mut self, request: RequestId, now: Now) -> Option<Box<Job>> {
        self.leave_session(request, None, now);
        let job = self.jobs.remove(request)?;
        let client = match &job.front {
            Front::Call(_) => None,
            Front::Engine { client, .. } => Some(*client),
            Front::Task { reader, .. } => *reader,
        };
        if let Some(client) = client {
            self.by_client.remove(&client);
        }
        Some(job)
    }

    fn reply(&mut self, call: RequestId, response: &Response, now: Now) {
        if let Some(Front::Call(client)) = self.close_job(call, now).map(|job| job.front) {
            self.net.respond(client, response, now.mono);
        }
    }

    fn refuse(&mut self, request: RequestId, refusal: &Refusal, now: Now) {
        let (code, told) = (refusal.code(), refusal.message());
        self.explain.ended(request, explain::Outcome::Refused, code, &told, now.mono);
        match self.jobs.get(request).map(|job| &job.front) {
            Some(Front::Call(client)) => {
                let client = *client;
                self.close_job(request, now);
                self.net.respond(client, &refusal.response(false), now.mono);
            }
            Some(Front::Engine { client, .. }) => {
                let client = *client;
                self.close_job(request, now);
                self.net.respond(client, &refusal.response(true), now.mono);
            }
            // Not admitted: its creator is told. Admitted before: its events say so.
            Some(Front::Task { creator: Some(creator), .. }) => {
                let creator = *creator;
                self.close_job(request, now);
                self.net.respond(creator, &refusal.response(false), now.mono);
            }
            Some(Front::Task { .. }) => {
                self.tasks.failed(request, refusal.code(), &refusal.message(), refusal.retry_ms());
                self.push_task_events(request, now);
                self.close_job(request, now);
            }
            None => {}
        }
    }

    fn dispatch(&mut self, request: RequestId, dispatch: &Dispatch, now: Now) {
        let Some(job) = self.jobs.get(request) else {
            // Its client left in the same turn.
            self.explain_dispatch(request, dispatch, now);
            return self.core.handle(Input::Ended(request, Ending::Withdrawn), now, &mut self.effects);
        };
        let (mut fields, method, path) = match &job.front {
            Front::Engine { client, request } => {
                let head = &request.head;
                let (id, correlation) = (self.net.request_id(*client), self.net.correlation(*client));
                let fields = to_engine(head, id.unwrap_or_default(), correlation.unwrap_or_default());
                (fields, head.method(), head.target())
            }
            Front::Task { path, .. } => {
                (FieldLines::new().with("Content-Type", "application/json"), "POST", *path)
            }
            Front::Call(_) => return,
        };
        let (to, target, hold_back) = match &dispatch.target {
            Target::Direct(engine) => (engine.clone(), Cow::Borrowed(path), HOLD_BACK),
            Target::Relay { agent, .. } => {
                let (pool, replica) = (&dispatch.key.pool, &dispatch.key.replica);
                fields.push_number("X-Llorch-Generation", dispatch.generation);
                fields.push_number("X-Llorch-Slots", dispatch.slots.into());
                let target = format!("/v2/pools/{pool}/replicas/{replica}/engine{path}");
                (agent.clone(), target.into(), HOLD_BACK_FROM_AGENT)
            }
            Target::AskNode | Target::Forbidden(_) => {
                self.explain_dispatch(request, dispatch, now);
                return self.undeliverable(request, now);
            }
        };
        let bearer = match (&dispatch.target, dispatch.auth_file.as_deref()) {
            (Target::Relay { .. }, _) => self.guard.bearer(now.mono),
            (_, None) => None,
            (_, Some(file)) => match probe::read_key(file) {
                Ok(key) => Some(format!("Bearer {key}")),
                Err(why) => {
                    self.explain_dispatch(request, dispatch, now);
                    return self.keyless(request, dispatch, &why, now);
                }
            },
        };
        if let Some(bearer) = bearer {
            fields.push("Authorization", bearer);
        }
        let sink = match &job.front {
            Front::Engine { client, .. } => {
                let queue_ms = now.mono.ms_since(job.since);
                let fields = to_client(dispatch, queue_ms, job.attempts + 1);
                Sink::Client { client: *client, hold_back, fields }
            }
            _ => Sink::Owner { hold_back },
        };
        let body = job.body.clone().unwrap_or_default();
        let patience = Patience {
            connect_ms: CONNECT_MS,
            first_byte_ms: self.config.first_byte_timeout_ms,
            idle_ms: self.config.idle_timeout_ms,
        };
        let method = method.into();
        let outbound = Outbound { to, method, target, fields, body, sink, patience, keep_ms: None };
        let exchange = self.net.start(outbound, now.mono);
        // What need not come before the engine has its request comes behind.
        self.explain_dispatch(request, dispatch, now);
        self.task_dispatched(request, dispatch, now);
        self.exchanges.insert(exchange, Running::Request(request));
        self.note_direct(exchange, dispatch, now);
        if let Some(job) = self.jobs.get_mut(request) {
            job.attempts += 1;
            job.exchange = Some(exchange);
            job.on = Some((dispatch.key.clone(), dispatch.generation));
        }
    }

    fn explain_dispatch(&mut self, request: RequestId, dispatch: &Dispatch, now: Now) {
        let (node, key) = (&dispatch.node, &dispatch.key);
        self.explain.dispatched(request, node, key, dispatch.considered, now.mono);
    }

    fn undeliverable(&mut self, request: RequestId, now: Now) {
        let reason = "the engine's address is not known yet".to_string();
        self.explain.attempt_ended(request, None, Some(&reason), now.mono);
        let ending = Ending::Failed { reason, connect: true, timeout: false, answered: false };
        self.core.handle(Input::Ended(request, ending), now, &mut self.effects);
    }

    /// A request may take no longer than its client says, or than is configured.
    fn limit(&mut self, request: RequestId, own_ms: Option<u64>, now: Now) {
        let configured_ms = Some(self.config.request_timeout_ms).filter(|ms| *ms > 0);
        if let Some(total_ms) = own_ms.into_iter().chain(configured_ms).min() {
            self.core.handle(Input::Limit { request, total_ms }, now, &mut self.effects);
        }
    }

    fn meter(&mut self, exchange: Token, timing: &Timing, now: Now) {
        if let Some(Running::Request(request)) = self.exchanges.get(&exchange) {
            let metered = Metered {
                first_token: timing.first_token,
                tokens_in: timing.tokens.prompt,
                tokens_out: timing.tokens.completion,
            };
            if let Some(job) = self.jobs.get(*request) {
                match timing.first_token {
                    Some(first) => self.history.streamed(first.ns_since(job.since)),
                    None => self.history.answered_at_once(timing.tokens.completion.unwrap_or(0)),
                }
            }
            self.core.handle(Input::Metered(*request, metered), now, &mut self.effects);
        }
    }

    fn head(&mut self, exchange: Token, status: u16, now: Now) {
        if let Some(Running::Request(request)) = self.exchanges.get(&exchange) {
            let request = *request;
            self.task_head(request, status, now);
            self.explain.answering(request, status, now.mono);
            if let Some(job) = self.jobs.get_mut(request) {
                // Nothing else will be tried any more.
                (job.body, job.room) = (None, None);
            }
            self.core.handle(Input::Answering(request), now, &mut self.effects);
        }
    }

    /// Tells what the requests on a local replica have been doing, if any run: before each outcome of a
    /// probe.
    fn tell_activity(&mut self, key: &ReplicaKey, generation: u64, now: Now) {
        let mut activity = Activity::default();
        for job in self.jobs.iter() {
            if let (Some((on, serial)), Some(exchange)) = (&job.on, job.exchange)
                && on == key
                && *serial == generation
                && let Some(progress) = self.net.progress(exchange)
            {
                activity.add(progress.started, progress.last_byte);
            }
        }
        if activity != Activity::default() {
            let input = Input::Active { key: key.clone(), generation, activity };
            self.core.handle(input, now, &mut self.effects);
        }
    }

    fn finished(&mut self, exchange: Token, outcome: Outcome, now: Now) {
        self.direct.ended(exchange);
        match self.exchanges.remove(&exchange) {
            Some(Running::Probe(order)) => {
                self.tell_activity(&order.id.key, order.id.serial, now);
                let outcome = probe::outcome(&order, outcome);
                let input = Input::Probed(order.id, outcome);
                self.core.handle(input, now, &mut self.effects);
            }
            Some(Running::Agent(node, pool)) => {
                self.agent_answered(node, pool, outcome, now);
            }
            Some(Running::Poll(id)) => self.poll_ended(id, outcome, now),
            Some(Running::Ordered(serial, node)) => self.order_answered(serial, node, outcome, now),
            Some(Running::Told(engine)) => self.agent_told(&engine, &outcome),
            Some(Running::Request(request)) => self.request_ended(request, outcome, now),
            None => {}
        }
    }

    fn request_ended(&mut self, request: RequestId, outcome: Outcome, now: Now) {
        let is_task = matches!(self.jobs.get(request), Some(Job { front: Front::Task { .. }, .. }));
        if let Some(job) = self.jobs.get_mut(request) {
            job.exchange = None;
        }
        let (ending, over) = match outcome {
            Outcome::Complete { status, .. } => {
                self.task_answered(request, now);
                if !is_task && status == 200 {
                    self.leave_session(request, Some(Turn::default()), now);
                }
                (Ending::Complete, true)
            }
            Outcome::ClientGone | Outcome::Cancelled => (Ending::Withdrawn, true),
            Outcome::Failed(fault) => {
                let answered = fault.answered;
                (self.task_fault(request, fault, now), answered)
            }
        };
        let is_wanted = self.jobs.contains(request) && !self.tasks.is_over(request);
        self.core.handle(Input::Ended(request, ending), now, &mut self.effects);
        if !is_wanted {
            // It is over; if it was cancelled while its engine failed, nothing is tried any more.
            self.core.handle(Input::Withdraw(request), now, &mut self.effects);
        }
        if is_task {
            self.push_task_events(request, now);
        }
        if (over && !is_task) || !is_wanted {
            self.close_job(request, now);
        }
    }

    fn client_gone(&mut self, client: Token, now: Now) {
        if self.board.left(client) {
            return;
        }
        let Some(request) = self.by_client.remove(&client) else { return };
        self.tasks.abandon(request);
        self.withdraw(request, now);
    }

    /// A request is not wanted any more, wherever it is.
    fn withdraw(&mut self, request: RequestId, now: Now) {
        let exchange = self.jobs.get(request).and_then(|job| job.exchange);
        self.explain.ended(request, explain::Outcome::Withdrawn, "", "", now.mono);
        match exchange {
            Some(exchange) => self.net.cancel(exchange, now.mono),
            None => self.core.handle(Input::Withdraw(request), now, &mut self.effects),
        }
        if !self.tasks.is_opened(request) {
            self.close_job(request, now);
        }
    }

    fn stop(&mut self, now: Now) {
        if self.core.is_shutting_down() {
            log::warn!("a second signal: ending at once");
            self.over = true;
            return;
        }
        let told = format!("no new requests, {} may finish", self.core.in_flight() + self.core.waiting());
        log::info!("signal: {told}");
        self.supervisor.stopping(&told, now.mono);
        self.net.stop_listening();
        self.core.handle(Input::Shutdown, now, &mut self.effects);
    }
}

/// What nodes and name servers must not make this process dial.
fn address_rules(bound: SocketAddr) -> EnginePolicy {
    EnginePolicy::new(machine::own_addresses(), Some(bound.port()), AllowList::default(), "")
}

/// Where engines may be that this process dials without an agent's word.
fn engine_rules(config: &Config, bound: SocketAddr) -> EnginePolicy {
    let allow = config.allow_engine_hosts.clone();
    let own = machine::own_addresses();
    EnginePolicy::new(own, Some(bound.port()), allow, "ORCHESTRATORD_ALLOW_ENGINE_HOSTS")
}

fn options(config: &Config, bound: SocketAddr) -> Result<Options, Exit> {
    let local = if !config.watches() {
        None
    } else {
        let node = NodeId::new(LOCAL_NODE).map_err(|error| Exit::runtime(error.to_string()))?;
        Some((node, engine_rules(config, bound)))
    };
    Ok(Options {
        limits: config.registry,
        addresses: config.cloud.then(|| address_rules(bound)),
        strategy: config.strategy,
        prefix_affinity: config.prefix_affinity,
        served_sessions_max: config.tables.served_sessions_max,
        admission_capacity: config.admission_capacity,
        admission_timeout_ms: config.admission_timeout_ms,
        drain_timeout_ms: config.drain_timeout_ms,
        hang_suspect_ms: config.hang_suspect_ms,
        local,
        polled: config.pool_managers.clone(),
        seed: fastrand::u64(..),
    })
}
