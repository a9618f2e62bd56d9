//! The node agent's shell: it owns the reactor, the sockets and the core, turns what happens into
//! inputs, and carries out effects. The loop is in [`Daemon::run`].

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;
use std::sync::Arc;

use crate::http::server::Request;
use crate::net::{self, FaultKind, Net, NetEvent, Outbound, Outcome, Patience, Sink, forwardable};
use crate::reactor::signal::Signals;
use crate::reactor::token::{Kind, Token};
use crate::reactor::{Reactor, Registry, Waker, now};
use crate::replicas::{
    AllowList, EnginePolicy, Fault, ProbeId, ProbeKind, Refused, ReplicaLease, Watch, probe,
};
use crate::service::auth::{self, Tokens};
use crate::service::lag::LoopLag;
use crate::service::machine;
use crate::service::shell::Shell;
use crate::settings::Exit;
use crate::time::{Now, earliest};
use crate::wire::id::ReplicaKey;

use super::api::{self, Action};
use super::callback_client::CallbackClient;
use super::callbacks;
use super::config::Config;
use super::control_client::ControlClient;
use super::core::{Core, Effect, Identity, Input};

mod operations;

/// What a relayed request may take: prompts are read for minutes before the first token.
const RELAY_PATIENCE: Patience = Patience { connect_ms: 2_000, first_byte_ms: 900_000, idle_ms: 300_000 };
/// When a caller that found no free slot should come back.
const FULL_RETRY_MS: u64 = 1_000;

/// The process.
pub struct Daemon {
    reactor: Reactor,
    registry: Registry,
    signals: Signals,
    watch: Watch,
    net: Net,
    core: Core,
    control: Vec<ControlClient>,
    callbacks: CallbackClient,
    lag: LoopLag,
    exchanges: BTreeMap<Token, Running>,
    tokens: Tokens,
    config: Config,
    effects: Vec<Effect>,
    over: bool,
}

/// What an exchange is for.
enum Running {
    Probe(ProbeId, ProbeKind),
    Relay { client: Token, lease: ReplicaLease },
}

impl Daemon {
    /// Binds, reads what is needed once, and starts the helpers.
    ///
    /// # Errors
    /// [`Exit`] that says what could not be had and what to do.
    pub fn start(config: Config) -> Result<Daemon, Exit> {
        for note in &config.notes {
            log::warn!("{note}");
        }
        let Shell { reactor, registry, waker, signals, net, bound } =
            Shell::start(config.addr, "POOL_MANAGERD_ADDR")?;
        let (mut core, control) = make_core(&config, bound.port(), &waker)?;
        let policy = callback_policy(&config, bound.port());
        let mut effects = Vec::new();
        enable_callbacks(&mut core, &config, &policy, &mut effects)?;
        let watch =
            Watch::new(config.runtime_dir.clone(), config.watch_interval_ms, Token::only(Kind::DirWatch));
        log::info!(
            "pool-managerd {} on http://{bound}, node {}, watching {}",
            env!("CARGO_PKG_VERSION"),
            config.node_id,
            config.runtime_dir.display()
        );
        Ok(Daemon {
            reactor,
            registry,
            signals,
            watch,
            net,
            core,
            control,
            callbacks: CallbackClient::new(policy, waker),
            lag: LoopLag::default(),
            exchanges: BTreeMap::new(),
            tokens: config.tokens.clone(),
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
        self.scan(false, now);
        while !self.over {
            self.perform(now);
            let deadline = earliest(self.core.deadline(), self.net.deadline());
            let deadline = earliest(deadline, Some(self.watch.deadline()));
            if let Some(slow) = self.lag.worked(now.mono, crate::reactor::now().mono) {
                log::warn!("{slow}");
            }
            now = self
                .reactor
                .wait(deadline, self.net.busy() || self.over)
                .map_err(|error| Exit::runtime(format!("the event loop failed: {error}")))?;
            self.lag.woke(deadline, now.mono);
            let (mut changed, mut stops) = (false, 0);
            for (token, edge) in self.reactor.events() {
                match token.kind() {
                    Kind::DirWatch => changed = true,
                    Kind::Stop => stops += self.signals.stops(),
                    Kind::Reload => {
                        if self.signals.reloads() > 0 {
                            auth::reload(self.config.token_file.as_deref(), &mut self.tokens);
                        }
                    }
                    Kind::Waker => {}
                    Kind::Listener | Kind::Client | Kind::Upstream | Kind::Exchange => {
                        self.net.on_edge(token, edge);
                    }
                }
            }
            // The directory first: what it announces may be what a waiting request needs.
            self.scan(changed, now);
            self.take_answers(now);
            self.net.turn(now.mono);
            self.take_net_events(now);
            (0..stops).for_each(|_| self.stop(now));
            self.core.handle(Input::Tick, now, &mut self.effects);
        }
        Ok(())
    }

    fn scan(&mut self, changed: bool, now: Now) {
        let scan = self.watch.turn(changed, now.mono, &self.registry);
        if let Some(trouble) = scan.trouble {
            self.core.handle(Input::WatchTrouble(trouble), now, &mut self.effects);
        }
        if let Some(files) = scan.files {
            self.core.handle(Input::Listing(files), now, &mut self.effects);
            // Probes and heartbeats leave before anything else is looked at.
            self.perform(now);
        }
    }

    fn take_answers(&mut self, now: Now) {
        for plane in 0..self.control.len() {
            while let Some((call, answer)) = self.control[plane].take() {
                self.core.handle(Input::Told { plane, call, answer }, now, &mut self.effects);
            }
        }
        self.take_deliveries(now);
    }

    fn take_net_events(&mut self, now: Now) {
        while let Some(event) = self.net.next_event() {
            match event {
                NetEvent::Request { client, request, .. } => self.serve(client, *request, now),
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
            for effect in std::mem::take(&mut self.effects) {
                match effect {
                    Effect::Probe(order) => {
                        let exchange = self.net.start(probe::outbound(&order), now.mono);
                        self.exchanges.insert(exchange, Running::Probe(order.id, order.kind));
                    }
                    Effect::Call { plane, order, body } => {
                        if !self.control[plane].submit(order, body, self.tokens.bearer()) {
                            let answer = super::membership::Answer::Failed("earlier calls still hang".into());
                            let told = Input::Told { plane, call: order.call, answer };
                            self.core.handle(told, now, &mut self.effects);
                        }
                    }
                    Effect::Cut(leases) => self.cut(&leases, now),
                    Effect::Deliver(delivery) => self.deliver(delivery, now),
                    Effect::Log(happening) if happening.is_warning => log::warn!("{}", happening.text),
                    Effect::Log(happening) => log::info!("{}", happening.text),
                    Effect::Exit => self.over = true,
                }
            }
        }
    }

    fn serve(&mut self, client: Token, request: Request, now: Now) {
        let facts = api::Facts {
            tokens: &self.tokens,
            watch_mode: self.watch.mode(),
            resident_bytes: (request.head.path() == "/metrics").then(machine::resident_bytes).flatten(),
            lag: &self.lag,
            now: now.mono,
        };
        match api::route(&request, &self.core, &facts) {
            Action::Respond(response) => self.net.respond(client, &response, now.mono),
            Action::Relay { key, generation, slots, target } => {
                self.relay(client, request, &key, generation, slots, target, now);
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
        let mut fields = forwardable(&request.head);
        if let Some(engine_key) = auth_file.as_deref().and_then(probe::read_key) {
            fields.push(("Authorization".into(), format!("Bearer {engine_key}").into_bytes()));
        }
        let outbound = Outbound {
            to: url,
            method: request.head.method().to_string(),
            target,
            fields,
            body: Arc::new(request.body),
            sink: Sink::Client { client, hold_back: &[], fields: Vec::new() },
            patience: RELAY_PATIENCE,
        };
        let exchange = self.net.start(outbound, now.mono);
        self.exchanges.insert(exchange, Running::Relay { client, lease });
    }

    fn finished(&mut self, exchange: Token, outcome: Outcome, now: Now) {
        match self.exchanges.remove(&exchange) {
            Some(Running::Probe(id, kind)) => {
                let input = Input::Probed(id, probe::outcome(kind, outcome));
                self.core.handle(input, now, &mut self.effects);
            }
            Some(Running::Relay { client, lease }) => {
                if let Outcome::Failed(net::Fault { kind: FaultKind::Aborted, answered, .. }) = outcome {
                    if !answered {
                        let message = format!("{}: {}", lease.key, operations::CUT_REASON);
                        let response = api::error(503, "POOL_UNREADY", &message, Some(FULL_RETRY_MS));
                        self.net.respond(client, &response, now.mono);
                    }
                    return self.core.handle(Input::RelayCut(lease), now, &mut self.effects);
                }
                let fault = match &outcome {
                    Outcome::Failed(fault) => {
                        if !fault.answered {
                            let message = format!("{}: {}", lease.key, fault.reason);
                            let status = if fault.kind == FaultKind::Timeout { 504 } else { 502 };
                            let response =
                                api::error(status, "POOL_UNAVAILABLE", &message, Some(FULL_RETRY_MS));
                            self.net.respond(client, &response, now.mono);
                        }
                        fault_of(fault)
                    }
                    Outcome::Complete { .. } | Outcome::ClientGone | Outcome::Cancelled => None,
                };
                self.core.handle(Input::Relayed { lease, fault }, now, &mut self.effects);
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
        log::info!("signal: no new work, {} requests may finish", self.core.in_flight());
        self.core.handle(Input::Shutdown, now, &mut self.effects);
    }
}

/// An engine's timeouts and broken answers are its fault; they only bring the next probe forward.
fn fault_of(fault: &net::Fault) -> Option<(Fault, String)> {
    let kind = match fault.kind {
        FaultKind::Connect => Fault::ConnectFailed,
        FaultKind::Timeout
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

fn make_core(config: &Config, own_port: u16, waker: &Waker) -> Result<(Core, Vec<ControlClient>), Exit> {
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
    let interval_ms = config.cloud.as_ref().map_or(0, |cloud| cloud.heartbeat_interval_ms);
    let seed = fastrand::u64(..);
    let core = Core::new(identity, policy, planes, interval_ms, config.drain_timeout_ms, seed, at);
    let control = planes
        .iter()
        .map(|url| ControlClient::start(url, &config.node_id, waker.clone()))
        .collect::<io::Result<Vec<_>>>()
        .map_err(|error| Exit::runtime(format!("cannot start a helper thread: {error}")))?;
    Ok((core, control))
}

fn callback_policy(config: &Config, own_port: u16) -> callbacks::Policy {
    let rules = EnginePolicy::new(machine::own_addresses(), Some(own_port), AllowList::default(), "");
    let planes = config.cloud.as_ref().map(|cloud| cloud.control_planes.clone());
    callbacks::Policy::new(rules, planes.unwrap_or_default())
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
    let save = || -> io::Result<()> {
        fs::create_dir_all(state_dir)?;
        let new = state_dir.join(".incarnation.tmp");
        fs::write(&new, format!("{next}\n"))?;
        fs::File::open(&new)?.sync_all()?;
        fs::rename(&new, &file)
    };
    if let Err(error) = save() {
        log::warn!(
            "state directory {}: {error}: the incarnation follows the clock alone; set POOL_MANAGERD_STATE_DIR",
            state_dir.display()
        );
    }
    next
}
