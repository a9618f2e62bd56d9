//! The node agent's shell: it owns the reactor, the sockets and the core, turns what happens into
//! inputs, and carries out effects. The loop is in [`Daemon::run`].

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use crate::http::fields::FieldLines;
use crate::http::server::Request;
use crate::net::relay::BEGUN_FIELD;
use crate::net::{self, DialRule, FaultKind, Net, NetEvent, Outbound, Outcome, Patience, Sink, forwardable};
use crate::reactor::kmsg::KernelLog;
use crate::reactor::offload::Offload;
use crate::reactor::signal::Signals;
use crate::reactor::token::{Kind, Token, TokenMap};
use crate::reactor::{Reactor, Registry, Waker, now};
use crate::replicas::{
    Activity, AllowList, EnginePolicy, Fault, ProbeOrder, Processes, Refused, ReplicaLease, Watch, probe,
};
use crate::service::guard::{Admission, Guard};
use crate::service::lag::LoopLag;
use crate::service::shell::{self, Shell};
use crate::service::state_lock::StateLock;
use crate::service::supervisor::Supervisor;
use crate::service::tls::Tls;
use crate::service::{durable, logging, machine, routes};
use crate::settings::Exit;
use crate::time::{Now, earliest};
use crate::wire::id::ReplicaKey;

use super::api::{self, Action};
use super::callback_client;
use super::callbacks;
use super::config::Config;
use super::control_client;
use super::core::{CallBody, Core, Effect, Identity, Input, Options};
use super::gpu_reader::GpuReader;
use super::gpus::{Report, xid};
use super::membership::{Answer, Call, Order, Plane};
use super::saved::{self, Saved};

mod managed;
mod operations;

/// What a relayed request may take: prompts are read for minutes before the first token.
const RELAY_PATIENCE: Patience = Patience { connect_ms: 2_000, first_byte_ms: 900_000, idle_ms: 300_000 };
/// Calls that wait to be encoded: a control plane is called once at a time.
const CALLS_MAX: usize = 16;
/// When a replica may be asked again whose key file cannot be used, in milliseconds.
const KEYLESS_RETRY_MS: u64 = 2_000;
/// When a caller that found no free slot should come back.
const FULL_RETRY_MS: u64 = 1_000;

/// The process.
pub struct Daemon {
    reactor: Reactor,
    registry: Registry,
    signals: Signals,
    watch: Watch,
    gpus: GpuReader,
    kernel_log: Option<KernelLog>,
    processes: Processes,
    net: Net,
    core: Core,
    encoder: Option<Encoder>,
    waker: Waker,
    saver: Option<Saver>,
    /// The state directory is this process's alone.
    _lock: StateLock,
    /// Where callbacks may go.
    callback_rule: DialRule,
    lag: LoopLag,
    supervisor: Supervisor,
    exchanges: TokenMap<Running>,
    guard: Guard,
    tls: Tls,
    managed: managed::Managed,
    config: Config,
    effects: Vec<Effect>,
    over: bool,
}

/// Encodes large heartbeats.
type Encoder = Offload<(usize, Order, CallBody), (usize, Order, Vec<u8>)>;
/// Writes the state file.
type Saver = Offload<String, Result<(), String>>;

/// What an exchange is for.
enum Running {
    Probe(Box<ProbeOrder>),
    Relay { client: Token, lease: ReplicaLease },
    Call { plane: usize, call: Call },
    Callback { callback: u64, event: u64 },
}

impl Daemon {
    /// Binds, reads what is needed once, and starts the helpers.
    ///
    /// # Errors
    /// [`Exit`] that says what could not be had and what to do.
    pub fn start(mut config: Config) -> Result<Daemon, Exit> {
        for note in &config.notes {
            log::warn!("{note}");
        }
        let Shell { reactor, registry, waker, signals, mut net, bound, supervisor } = Shell::start(
            config.addr,
            "POOL_MANAGERD_ADDR",
            |limits| config.bodies.apply(limits),
            config.fixed(),
            config.memory,
        )?;
        shell::note_other_address(config.addr, bound, config.guard.credentials.keys());
        let lock = StateLock::take(&config.state_dir, "pool-managerd", "POOL_MANAGERD_STATE_DIR")?;
        net.set_dial_rule(dial_rule(&config, bound.port()));
        let mut core = make_core(&config, bound.port());
        let policy = callback_policy(&config, bound.port());
        let mut effects = Vec::new();
        enable_callbacks(&mut core, &config, &policy, &mut effects)?;
        let watch =
            Watch::new(config.runtime_dir.clone(), config.watch_interval_ms, Token::only(Kind::DirWatch))
                .limited_to(config.files_max());
        let gpus = GpuReader::start(config.gpu_discovery_interval_ms, waker.clone())
            .map_err(|error| Exit::runtime(format!("cannot start a helper thread: {error}")))?;
        let guard = Guard::new(std::mem::take(&mut config.guard), &own_names(&config));
        let tls = Tls::start(config.tls.clone(), &mut net, &registry, now())?;
        let scheme = if config.tls.serves() { "https" } else { "http" };
        log::info!(
            "pool-managerd {} on {scheme}://{bound}, node {}, watching {}, {}",
            env!("CARGO_PKG_VERSION"),
            config.node_id,
            config.runtime_dir.display(),
            guard.shown()
        );
        Ok(Daemon {
            reactor,
            registry,
            signals,
            watch,
            gpus,
            kernel_log: None,
            processes: Processes::new(),
            net,
            core,
            encoder: None,
            waker,
            saver: None,
            _lock: lock,
            callback_rule: callback_client::dial_rule(policy),
            lag: LoopLag::default(),
            supervisor,
            exchanges: TokenMap::default(),
            guard,
            tls,
            managed: managed::Managed::default(),
            config,
            effects,
            over: false,
        })
    }

    /// The loop: wait, take what happened at one time, act, until the core says that it is over.
    ///
    /// # Errors
    /// [`Exit`] if the reactor fails.
    pub fn run(mut self) -> Result<(), Exit> {
        let mut now = now();
        self.restore(now);
        self.open_kernel_log(now);
        self.scan(false, now);
        while !self.over {
            self.perform(now);
            self.tell_supervisor(now);
            let deadline = earliest(self.core.deadline(), self.net.deadline());
            let deadline = earliest(deadline, Some(self.watch.deadline()));
            let deadline = earliest(deadline, self.supervisor.deadline());
            let deadline = earliest(deadline, self.tls.deadline());
            let deadline = earliest(deadline, self.guard.deadline());
            let deadline = earliest(deadline, self.managed.deadline());
            if let Some(slow) = self.lag.worked(now.mono, crate::reactor::now().mono) {
                log::warn!("{slow}");
            }
            let logged_more = self.kernel_log.as_ref().is_some_and(KernelLog::busy);
            now = self
                .reactor
                .wait(deadline, self.net.busy() || self.watch.busy() || logged_more || self.over)
                .map_err(|error| Exit::runtime(format!("the event loop failed: {error}")))?;
            self.lag.woke(deadline, now.mono);
            let (mut changed, mut stops, mut ended) = (false, 0, Vec::new());
            let (mut logged, mut tokens_changed, mut provisioners_told) = (logged_more, false, false);
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
                    Kind::Waker => {}
                    Kind::KernelLog => logged = true,
                    Kind::Credentials => tokens_changed = true,
                    Kind::Provisioners => provisioners_told = true,
                    Kind::Listener | Kind::Client | Kind::Upstream | Kind::Exchange => {
                        self.net.on_edge(token, edge);
                    }
                }
            }
            self.take_ended(&ended, now);
            // The directory first: what it announces may be what a waiting request needs.
            self.scan(changed, now);
            self.take_encoded(now);
            self.take_gpu_reports(logged, now);
            self.take_saved(now);
            self.take_ordered(now);
            self.look_for_provisioners(changed, provisioners_told, now);
            self.ask_provisioners(now);
            self.tls.turn(&mut self.net, now);
            self.look_after_guard(tokens_changed, now);
            self.net.turn(now.mono);
            self.take_net_events(now);
            (0..stops).for_each(|_| self.stop(now));
            self.core.handle(Input::Tick, now, &mut self.effects);
        }
        Ok(())
    }

    /// A turn has ended: once the directory was looked at as a whole, the daemon is ready.
    fn tell_supervisor(&mut self, now: Now) {
        if !self.watch.busy() {
            self.supervisor.ready(|| self.core.status(), now.mono);
        }
        self.supervisor.turned(|| self.core.status(), now.mono);
    }

    /// Takes up what an earlier start saved. What cannot be read is put aside and named.
    fn restore(&mut self, now: Now) {
        let path = self.config.state_dir.join(saved::FILE_NAME);
        let read = match durable::read(&path) {
            Ok(None) => return,
            Ok(Some(bytes)) => Saved::read(&bytes),
            Err(error) => Err(error.to_string()),
        };
        match read {
            Ok(saved) => self.core.handle(Input::Restore(saved), now, &mut self.effects),
            Err(why) => {
                let aside = match durable::set_aside(&path) {
                    Ok(aside) => format!("it is now {}", aside.display()),
                    Err(error) => format!("and it cannot be renamed: {error}"),
                };
                log::warn!("{}: {why}: starting without it, {aside}", path.display());
            }
        }
    }

    fn scan(&mut self, changed: bool, now: Now) {
        let scan = self.watch.turn(changed, now.mono, &self.registry);
        if let Some(trouble) = scan.trouble {
            self.core.handle(Input::WatchTrouble(trouble), now, &mut self.effects);
        }
        for listing in scan.listings {
            self.core.handle(Input::Listing(listing), now, &mut self.effects);
            // Probes and heartbeats leave before anything else is looked at.
            self.perform(now);
        }
    }

    fn take_ended(&mut self, ended: &[Token], now: Now) {
        for token in ended {
            if let Some((key, generation, seen)) = self.processes.ended(*token, &self.registry) {
                self.core.handle(Input::Process(key, generation, seen), now, &mut self.effects);
            }
        }
        // Control planes hear of it before anything else is looked at.
        self.perform(now);
    }

    /// Makes a call to a control plane.
    fn call(&mut self, plane: usize, order: Order, body: CallBody, now: Now) {
        let body = if control_client::is_large(&body) {
            match self.encode_elsewhere((plane, order, body)) {
                Ok(()) => return,
                Err(body) => body,
            }
        } else {
            body
        };
        self.send_call(plane, order, control_client::encode(&body), now);
    }

    /// Few nodes ever need the helper, so it is started when one does.
    fn encode_elsewhere(&mut self, job: (usize, Order, CallBody)) -> Result<(), CallBody> {
        if self.encoder.is_none() {
            let encode = |(plane, order, body)| (plane, order, control_client::encode(&body));
            // Without a thread it is encoded here after all.
            self.encoder = Offload::spawn("encoder", CALLS_MAX, self.waker.clone(), encode).ok();
        }
        match &self.encoder {
            Some(encoder) => encoder.submit(job).map_err(|(_, _, body)| body),
            None => Err(job.2),
        }
    }

    fn send_call(&mut self, plane: usize, order: Order, body: Vec<u8>, now: Now) {
        let Some(url) = self.core.planes().get(plane).map(Plane::url) else { return };
        let (node, incarnation) = (self.core.node_id(), self.core.incarnation());
        let bearer = self.guard.bearer(now.mono);
        let outbound = control_client::outbound("pool-managerd", url, node, order, incarnation, body, bearer);
        let exchange = self.net.start(outbound, now.mono);
        self.exchanges.insert(exchange, Running::Call { plane, call: order.call });
    }

    fn take_gpu_reports(&mut self, logged: bool, now: Now) {
        if logged {
            self.read_kernel_log(now);
        }
        while let Some(report) = self.gpus.take() {
            self.core.handle(Input::Gpu(report), now, &mut self.effects);
        }
        self.gpus.keep_closed(self.core.gpus().any_out());
    }

    fn open_kernel_log(&mut self, now: Now) {
        let Some(path) = &self.config.kmsg else { return };
        let opened = KernelLog::open(path, &self.registry, Token::only(Kind::KernelLog));
        let told = match &opened {
            Ok(_) => Ok(()),
            Err(error) => Err(format!("{}: {error}", path.display())),
        };
        self.kernel_log = opened.ok();
        self.core.handle(Input::Gpu(Report::KernelLog(told)), now, &mut self.effects);
    }

    fn read_kernel_log(&mut self, now: Now) {
        let Some(kernel_log) = &mut self.kernel_log else { return };
        let mut xids = Vec::new();
        let read = kernel_log.take(|record| xids.extend(xid::parse(record)));
        if let Err(error) = read {
            kernel_log.deregister(&self.registry);
            self.kernel_log = None;
            let told = Report::KernelLog(Err(format!("it cannot be read any more: {error}")));
            self.core.handle(Input::Gpu(told), now, &mut self.effects);
        }
        for xid in xids {
            self.core.handle(Input::Gpu(Report::Xid(xid)), now, &mut self.effects);
        }
    }

    fn take_encoded(&mut self, now: Now) {
        while let Some((plane, order, body)) = self.encoder.as_ref().and_then(Offload::take) {
            self.send_call(plane, order, body, now);
        }
    }

    fn take_saved(&mut self, now: Now) {
        while let Some(result) = self.saver.as_ref().and_then(Offload::take) {
            self.core.handle(Input::Saved(result), now, &mut self.effects);
        }
    }

    fn respond_with_pool(&mut self, client: Token, status: u16, pool: &crate::wire::id::PoolId, now: Now) {
        let response = crate::http::server::Response::json(status, &self.core.pool_status(pool));
        self.net.respond(client, &response, now.mono);
    }

    fn take_net_events(&mut self, now: Now) {
        while let Some(event) = self.net.next_event() {
            match event {
                NetEvent::Request { client, request, peer } => {
                    // What was caused by others is logged before, without its name.
                    self.perform(now);
                    let _about = logging::about(self.net.correlation(client));
                    self.serve(client, *request, peer, now);
                    // Here, so that what is logged of it names it.
                    self.perform(now);
                }
                NetEvent::Finished { exchange, outcome, .. } => self.finished(exchange, outcome, now),
                NetEvent::ClientGone { .. }
                | NetEvent::Drained { .. }
                | NetEvent::Head { .. }
                | NetEvent::Data { .. } => {}
            }
        }
    }

    fn perform(&mut self, now: Now) {
        while !self.effects.is_empty() {
            // Others wait for the rest; the log can wait for that.
            let is_log = |effect: &Effect| matches!(effect, Effect::Log(_));
            let (told, acted): (Vec<Effect>, Vec<Effect>) =
                std::mem::take(&mut self.effects).into_iter().partition(is_log);
            for effect in acted.into_iter().chain(told) {
                match effect {
                    Effect::Process(order) => {
                        if let Some((key, generation, seen)) = self.processes.carry_out(order, &self.registry)
                        {
                            let input = Input::Process(key, generation, seen);
                            self.core.handle(input, now, &mut self.effects);
                        }
                    }
                    Effect::Probe(order) => {
                        let exchange = self.net.start(probe::outbound(&order), now.mono);
                        self.exchanges.insert(exchange, Running::Probe(Box::new(order)));
                    }
                    Effect::Call { plane, order, body } => self.call(plane, order, body, now),
                    Effect::Save(text) => self.save(text, now),
                    Effect::DeleteFile(name, content) => self.watch.delete(&name, &content),
                    Effect::Cut(leases) => self.cut(&leases, now),
                    Effect::Deliver(delivery) => self.deliver(&delivery, now),
                    Effect::Log(what) => logging::tell(&*what),
                    Effect::Exit => self.over = true,
                }
            }
        }
    }

    fn save(&mut self, text: String, now: Now) {
        let submitted = match &self.saver {
            Some(saver) => saver.submit(text).map_err(|_| "earlier saves still hang".to_string()),
            None => self.start_saver().and_then(|saver| {
                let submitted = saver.submit(text).map_err(|_| "its helper takes nothing".to_string());
                self.saver = Some(saver);
                submitted
            }),
        };
        if let Err(why) = submitted {
            self.core.handle(Input::Saved(Err(why)), now, &mut self.effects);
        }
    }

    /// Most agents never save anything, so the helper is started for the first save only.
    fn start_saver(&self) -> Result<Saver, String> {
        let path = self.config.state_dir.join(saved::FILE_NAME);
        Offload::spawn("state", 1, self.waker.clone(), move |text: String| {
            durable::replace(&path, text.as_bytes()).map_err(|error| format!("{}: {error}", path.display()))
        })
        .map_err(|error| format!("cannot start a helper thread: {error}"))
    }

    /// Looks after the tokens, and answers whom it was refused long enough.
    fn look_after_guard(&mut self, tokens_changed: bool, now: Now) {
        self.guard.turn(tokens_changed, now.mono, &self.registry);
        while let Some((client, response)) = self.guard.due(now.mono) {
            self.net.respond(client, &response, now.mono);
        }
    }

    fn serve(&mut self, client: Token, request: Request, peer: SocketAddr, now: Now) {
        let (found, policy, route) = routes::find(api::ROUTES, &request.head, api::path_of(&request.head));
        match self.guard.judge(&request.head, policy, route, peer, now.mono) {
            Admission::Pass { fields, .. } => self.net.add_fields(client, fields),
            Admission::Preflight(response) => return self.net.respond(client, &response, now.mono),
            Admission::Barred(barred, delay_ms) => {
                let response = api::barred(barred);
                if let Some(response) = self.guard.hold(client, response, delay_ms, now.mono) {
                    self.net.respond(client, &response, now.mono);
                }
                return;
            }
        }
        let facts = api::Facts {
            guard: &self.guard,
            watch_mode: self.watch.mode(),
            resident_bytes: (request.head.path() == "/metrics").then(machine::resident_bytes).flatten(),
            lag: &self.lag,
            now: now.mono,
            tls: self.tls.meters(&self.net),
            managed: &self.managed.pools,
            is_certified: !self.tls.knows_clients() || self.net.client_certificate(client).is_some(),
        };
        match api::route(found, &request, &self.core, &facts) {
            Action::Respond(response) => self.net.respond(client, &response, now.mono),
            Action::Relay { key, generation, slots, target } => {
                self.relay(client, request, &key, generation, slots, target, now);
            }
            Action::Adopt(handoff) => {
                let pool = handoff.pool_id.clone();
                self.core.handle(Input::Adopt(handoff), now, &mut self.effects);
                self.respond_with_pool(client, 202, &pool, now);
            }
            Action::Abandon(key) => {
                self.core.handle(Input::Abandon(key), now, &mut self.effects);
                self.net.respond(client, &crate::http::server::Response::empty(204), now.mono);
            }
            Action::Ask(pool) => {
                self.core.handle(Input::Ask(pool.clone()), now, &mut self.effects);
                self.respond_with_pool(client, 202, &pool, now);
            }
            Action::Active(key, report) => {
                let generation = report.generation;
                let activity = Activity::reported(&report, now.mono);
                self.core.handle(Input::Active { key, generation, activity }, now, &mut self.effects);
                self.net.respond(client, &crate::http::server::Response::empty(204), now.mono);
            }
            Action::ClearGpu(gpu) => {
                self.core.handle(Input::ClearGpu(gpu), now, &mut self.effects);
                let gpu = self.core.gpus().gpu_json(gpu);
                self.net.respond(client, &crate::http::server::Response::json(200, &gpu), now.mono);
            }
            Action::Operate(operation) => self.operate(client, operation, now),
        }
    }

    #[expect(clippy::too_many_arguments, reason = "they are one parsed request")]
    fn relay(
        &mut self,
        client: Token,
        request: Request,
        key: &ReplicaKey,
        generation: Option<u64>,
        slots: u32,
        target: String,
        now: Now,
    ) {
        let (lease, url, auth_file) = match self.core.acquire(key, generation, slots) {
            Ok(acquired) => acquired,
            Err(refused) => return self.net.respond(client, &refusal(key, &refused), now.mono),
        };
        let mut fields = forwardable(&request.head, |_| false);
        match auth_file.as_deref().map(probe::read_key).transpose() {
            Ok(Some(key)) => fields.push("Authorization", format!("Bearer {key}")),
            Ok(None) => {}
            // Without it the engine would refuse what the caller may well ask.
            Err(why) => {
                log::warn!("{key} cannot be asked: {why}");
                self.core.handle(Input::Relayed { lease, fault: None }, now, &mut self.effects);
                let message = format!("{key}: its key file cannot be used");
                let response = api::error(503, "POOL_UNREADY", &message, Some(KEYLESS_RETRY_MS));
                return self.net.respond(client, &response, now.mono);
            }
        }
        let outbound = Outbound {
            to: url,
            method: request.head.method().into(),
            target: target.into(),
            fields,
            body: Arc::new(request.body),
            sink: Sink::Client { client, hold_back: &[], fields: FieldLines::new() },
            patience: RELAY_PATIENCE,
            keep_ms: None,
        };
        let exchange = self.net.start(outbound, now.mono);
        self.exchanges.insert(exchange, Running::Relay { client, lease });
    }

    /// Tells what the requests on a replica have been doing, if any run: before each outcome of a probe.
    fn tell_activity(&mut self, key: &ReplicaKey, generation: u64, now: Now) {
        let mut activity = Activity::default();
        for (exchange, running) in &self.exchanges {
            if let Running::Relay { lease, .. } = running
                && lease.key == *key
                && lease.serial == generation
                && let Some(progress) = self.net.progress(*exchange)
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
        match self.exchanges.remove(&exchange) {
            Some(Running::Probe(order)) => {
                self.tell_activity(&order.id.key, order.id.serial, now);
                let outcome = probe::outcome(&order, outcome);
                let input = Input::Probed(order.id, outcome);
                self.core.handle(input, now, &mut self.effects);
            }
            Some(Running::Relay { client, lease }) => {
                if let Outcome::Failed(net::Fault { kind: FaultKind::Aborted, answered, .. }) = outcome {
                    if !answered {
                        let message = format!("{}: {}", lease.key, crate::replicas::drain_routes::CUT_REASON);
                        let response = api::error(503, "POOL_UNREADY", &message, Some(FULL_RETRY_MS));
                        self.net.respond(client, &response, now.mono);
                    }
                    return self.core.handle(Input::RelayCut(lease), now, &mut self.effects);
                }
                let fault = match &outcome {
                    Outcome::Failed(fault) => {
                        if !fault.answered {
                            let message = format!("{}: {}", lease.key, fault.reason);
                            let late = matches!(fault.kind, FaultKind::Timeout | FaultKind::Unreached);
                            let status = if late { 504 } else { 502 };
                            let mut response =
                                api::error(status, "POOL_UNAVAILABLE", &message, Some(FULL_RETRY_MS));
                            if fault.begun {
                                response = response.with(BEGUN_FIELD, "true");
                            }
                            self.net.respond(client, &response, now.mono);
                        }
                        fault_of(fault)
                    }
                    Outcome::Complete { .. } | Outcome::ClientGone | Outcome::Cancelled => None,
                };
                self.core.handle(Input::Relayed { lease, fault }, now, &mut self.effects);
            }
            Some(Running::Call { plane, call }) => {
                let answer = control_client::answer(call, outcome);
                if matches!(answer, Answer::Unauthorized) {
                    self.guard.credentials.was_refused();
                }
                self.core.handle(Input::Told { plane, call, answer }, now, &mut self.effects);
            }
            Some(Running::Callback { callback, event }) => {
                let outcome = callback_client::outcome(outcome);
                self.core.handle(Input::Delivered(callback, event, outcome), now, &mut self.effects);
            }
            None => {}
        }
    }

    fn stop(&mut self, now: Now) {
        if self.core.is_shutting_down() {
            log::warn!("a second signal: ending at once");
            self.over = true;
            return;
        }
        let told = format!("no new work, {} requests may finish", self.core.in_flight());
        log::info!("signal: {told}");
        self.supervisor.stopping(&told, now.mono);
        self.core.handle(Input::Shutdown, now, &mut self.effects);
    }
}

/// An engine's timeouts and broken answers are its fault; they only bring the next probe forward.
fn fault_of(fault: &net::Fault) -> Option<(Fault, String)> {
    let kind = match fault.kind {
        FaultKind::Local => return None,
        FaultKind::Connect => Fault::ConnectFailed,
        FaultKind::Unreached
        | FaultKind::Timeout
        | FaultKind::Reset
        | FaultKind::Protocol
        | FaultKind::Status(_)
        | FaultKind::Aborted => Fault::Broken,
    };
    Some((kind, fault.reason.clone()))
}

fn refusal(key: &ReplicaKey, refused: &Refused) -> crate::http::server::Response {
    let message = format!("{key}: {refused}");
    match refused {
        Refused::Unknown => api::error(404, "NOT_FOUND", &message, None),
        Refused::NotReady { .. } | Refused::Draining => {
            api::error(503, "POOL_UNREADY", &message, Some(FULL_RETRY_MS))
        }
        Refused::Full { .. } => api::error(503, "REPLICA_EXHAUSTED", &message, Some(FULL_RETRY_MS)),
        Refused::StaleGeneration { .. } => api::error(409, "STALE_GENERATION", &message, None),
    }
}

/// Names by which others reach this agent.
fn own_names(config: &Config) -> Vec<String> {
    let advertised = config.cloud.as_ref().map(|cloud| cloud.address.host().to_string());
    [machine::host_name(), config.node_id.to_string()].into_iter().chain(advertised).collect()
}

fn make_core(config: &Config, own_port: u16) -> Core {
    let at = now();
    let incarnation = next_incarnation(&config.state_dir, at.wall.unix_ms());
    let planes = config.cloud.as_ref().map_or(&[][..], |cloud| &cloud.control_planes);
    let identity = Identity {
        node_id: config.node_id.clone(),
        machine_id: config.cloud.as_ref().map_or_else(String::new, |cloud| cloud.machine_id.clone()),
        address: config.cloud.as_ref().map(|cloud| cloud.address.clone()),
        pools: config.pools.clone(),
        capabilities: machine::capabilities(),
        incarnation,
        boot_id: machine::boot_id(),
    };
    let policy = EnginePolicy::new(
        machine::own_addresses(),
        Some(own_port),
        config.allow_engine_hosts.clone(),
        "POOL_MANAGERD_ALLOW_ENGINE_HOSTS",
    );
    let options = Options {
        control_planes: planes.to_vec(),
        heartbeat_interval_ms: config.cloud.as_ref().map_or(0, |cloud| cloud.heartbeat_interval_ms),
        drain_timeout_ms: config.drain_timeout_ms,
        auto_delete: config.auto_delete,
        hang_suspect_ms: config.hang_suspect_ms,
    };
    Core::new(identity, policy, &options, fastrand::u64(..), at)
}

/// Names of engines are judged again when they have been resolved. Control planes are where the operator
/// says.
fn dial_rule(config: &Config, own_port: u16) -> DialRule {
    let rules = EnginePolicy::new(machine::own_addresses(), Some(own_port), AllowList::default(), "");
    let planes = config.cloud.as_ref().map_or(Vec::new(), |cloud| cloud.control_planes.clone());
    DialRule::new(move |url, ip| if planes.contains(url) { Ok(()) } else { rules.check_address(url, ip) })
}

fn callback_policy(config: &Config, own_port: u16) -> callbacks::Policy {
    let rules = EnginePolicy::new(machine::own_addresses(), Some(own_port), AllowList::default(), "");
    let planes = config.cloud.iter().flat_map(|cloud| cloud.control_planes.iter().cloned());
    // Whoever configured a callback trusts it as a control plane: it may be the only one that is named.
    callbacks::Policy::new(rules, planes.chain(config.callback_url.clone()).collect())
}

fn enable_callbacks(
    core: &mut Core,
    config: &Config,
    policy: &callbacks::Policy,
    effects: &mut Vec<Effect>,
) -> Result<(), Exit> {
    if !config.callback_enabled {
        return Ok(());
    }
    core.enable_callbacks(policy.clone());
    let Some(url) = &config.callback_url else { return Ok(()) };
    core.register_callback(url, None, true, now(), effects)
        .map_err(|why| Exit::config(format!("POOL_MANAGERD_ORCHESTRATORD_CALLBACK_URL={url}: {why}")))
}

/// One more than the last start's, and never less than the clock says: a node whose state directory
/// was lost must not come back as its own past.
fn next_incarnation(state_dir: &Path, wall_ms: u64) -> u64 {
    let file = state_dir.join("incarnation");
    let last = fs::read_to_string(&file).ok().and_then(|text| text.trim().parse::<u64>().ok()).unwrap_or(0);
    let next = wall_ms.max(last.saturating_add(1));
    if let Err(error) = durable::replace(&file, format!("{next}\n").as_bytes()) {
        log::warn!(
            "state directory {}: {error}: the incarnation follows the clock alone; set POOL_MANAGERD_STATE_DIR",
            state_dir.display()
        );
    }
    next
}
