//! The shell: one loop over the ends of processes, signals, probes and the clock.
//!
//! [`supervision`](super::supervision) decides; this file carries out, one line an effect. Ends of processes
//! come first in every turn: a handoff must not outlive its engine. What may block for long (reading the
//! configuration again, asking the GPU driver) is done on a thread of its own that lives for one reload.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ffi::OsString;
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, TryRecvError, sync_channel};
use std::time::Duration;

use rustix::process::Signal;
use serde_json::{Value, json};

use super::asking;
use super::control::{Book, Control};
use super::guardian::Guardian;
use super::kept::Kept;
use super::notify::{NoticeId, Notices};
use super::options::{Options, Orphans};
use super::output::EngineLog;
use super::plan::{Config, Plan};
use super::preflight::{self, Prepared};
use super::process::{Cgroup, Engine};
use super::progress::Screen;
use super::publish::Published;
use super::steps::Kind as StepKind;
use super::supervision::{Effect, Input, InstanceId, Replace, Seen, SpecId, Supervision, Terms, Told};
use crate::net::{self, Limits, Net, NetEvent, Outcome};
use crate::reactor::signal::Signals;
use crate::reactor::token::{Kind, Table, Token};
use crate::reactor::{Descriptor, Reactor, Registry, Waker, now};
use crate::replicas::profile::Engine as Profile;
use crate::replicas::{ProbeKind, ProbeOutcome, probe};
use crate::service::credentials::Credentials;
use crate::settings::Exit;
use crate::time::{Mono, earliest};
use crate::wire::handoff::Handoff;
use crate::wire::id::ReplicaKey;

mod managed;

pub(super) use managed::Orders;

/// Exchanges at once: a probe for each of the most engines, and notices.
const EXCHANGES_MAX: usize = 1_024;
/// How long it is tried to reach a port of this machine, only to see whether somebody listens there.
const LOCAL_CONNECT: Duration = Duration::from_millis(100);
/// So long, in milliseconds, an instance counts as used after its handoff was withdrawn: whoever watches the
/// directory has heard of it by then.
const WITHDRAWN_SEEN_MS: u64 = 50;
/// The same for one that was replaced: control planes on other machines hear of it by a heartbeat.
const REPLACED_SEEN_MS: u64 = 1_000;
/// Longest that the end of this program waits for notices, in milliseconds.
const LAST_NOTICES_MS: u64 = 2_000;
/// Longest that it waits for what is being fetched or built to stop.
const LAST_PREPARING: Duration = Duration::from_secs(5);

/// Reads what is wanted, at the start and at every SIGHUP.
pub(super) type Prepare = Arc<dyn Fn(&Wish) -> Result<Prepared, Exit> + Send + Sync>;

/// What is to be got ready.
pub(super) struct Wish {
    /// Nothing runs yet.
    pub(super) is_first: bool,
    /// The configuration is not read anew: only what was ordered has changed.
    pub(super) is_order: bool,
    /// What was ordered.
    pub(super) orders: Orders,
    /// Stops it.
    pub(super) cancel: Arc<AtomicBool>,
    /// To be called when all that costs nothing was looked at.
    pub(super) on_looked: Box<dyn Fn() + Send + Sync>,
}

/// The thread that gets ready what is wanted: it may fetch for hours, and nothing waits for it.
struct Preparing {
    outcome: Receiver<Result<Prepared, Exit>>,
    cancel: Arc<AtomicBool>,
    /// All that costs nothing was looked at: it may take hours from here.
    has_looked: Arc<AtomicBool>,
    /// The configuration has changed meanwhile, and is read once more.
    again: bool,
}

/// What an exchange is about.
enum About {
    Health(InstanceId, ProbeKind),
    Fact(InstanceId, usize, ProbeKind),
    InUse(InstanceId),
    Notice(NoticeId),
}

/// An instance's processes and files.
struct Running {
    config: Arc<Config>,
    plan: Plan,
    engine: Engine,
    log: EngineLog,
    handoff: Handoff,
    published: Option<Published>,
    watch: Option<Token>,
    /// It answered once, and was told of.
    was_healthy: bool,
    began: Mono,
    progress: Option<f64>,
    leaving_since: Option<Mono>,
    was_replaced: bool,
}

/// Whose end a descriptor tells.
enum Watched {
    Engine(InstanceId, Descriptor),
    Guardian(Descriptor),
}

struct Daemon {
    options: Options,
    prefix: Vec<OsString>,
    prepare: Prepare,
    credentials: Credentials,
    reactor: Reactor,
    registry: Registry,
    waker: Waker,
    net: Net,
    core: Supervision,
    effects: VecDeque<Effect>,
    specs: BTreeMap<SpecId, Arc<Config>>,
    /// The newest of every engine.
    newest: BTreeMap<ReplicaKey, SpecId>,
    next_spec: SpecId,
    /// Engines whose last change failed: it is tried again at the next occasion.
    to_retry: BTreeSet<ReplicaKey>,
    running: BTreeMap<InstanceId, Running>,
    watched: Table<Watched>,
    exchanges: BTreeMap<Token, About>,
    notices: Notices,
    guardian: Option<Guardian>,
    kept: Option<Kept>,
    preparing: Option<Preparing>,
    /// Something was wanted already.
    has_begun: bool,
    book: Book,
    control: Option<Control>,
    /// It was tried to.
    is_listening: bool,
    orders: Orders,
    managed: Option<managed::Managed>,
    screen: Screen,
    gave_up: Option<Exit>,
    generation: u64,
    agent_trouble_told: bool,
}

/// Keeps engines until a signal ends this program.
///
/// # Errors
/// [`Exit`] for what is refused before anything is started, for what the kernel does not give, and for an
/// engine that failed and was not to be started again.
pub(super) fn run(
    options: Options,
    credentials: Credentials,
    prefix: Vec<OsString>,
    prepare: Prepare,
    book: Book,
) -> Result<(), Exit> {
    let kernel = |what: &'static str| {
        move |error: io::Error| Exit::runtime(format!("the kernel gives no {what}: {error}"))
    };
    let hangup_is_ignored = hangup_is_ignored();
    let reactor = Reactor::new().map_err(kernel("epoll descriptor"))?;
    let registry = reactor.registry().map_err(kernel("descriptor"))?;
    let waker = reactor.waker(Token::only(Kind::Waker)).map_err(kernel("eventfd"))?;
    // Before anything is started: a signal must never find an engine without a keeper.
    let mut signals = Signals::install(&registry).map_err(kernel("socket pair"))?;
    let limits = Limits { exchanges_max: EXCHANGES_MAX, ..Limits::default() };
    let net = Net::new(reactor.registry().map_err(kernel("descriptor"))?, waker.clone(), limits);
    let kept = match options.orphans {
        Orphans::End => None,
        Orphans::Keep => Some(Kept::open(&options.state_dir)?),
    };
    let mut daemon = Daemon {
        notices: Notices::new(options.notify.clone()),
        screen: Screen::new(),
        options,
        prefix,
        prepare,
        credentials,
        reactor,
        registry,
        waker,
        net,
        core: Supervision::new(fastrand::Rng::new()),
        effects: VecDeque::new(),
        specs: BTreeMap::new(),
        newest: BTreeMap::new(),
        next_spec: 1,
        to_retry: BTreeSet::new(),
        running: BTreeMap::new(),
        watched: Table::new(Kind::Process),
        exchanges: BTreeMap::new(),
        guardian: None,
        kept,
        preparing: None,
        has_begun: false,
        book,
        control: None,
        is_listening: false,
        orders: Orders::default(),
        managed: None,
        gave_up: None,
        generation: 0,
        agent_trouble_told: false,
    };
    daemon.prepare()?;
    daemon.serve(&mut signals, hangup_is_ignored)
}

impl Daemon {
    fn serve(mut self, signals: &mut Signals, hangup_is_ignored: bool) -> Result<(), Exit> {
        let mut last_wait: Option<Mono> = None;
        loop {
            let deadline = [self.core.deadline(), self.net.deadline(), self.notices.deadline(), last_wait]
                .into_iter()
                .fold(self.screen.deadline(), earliest);
            let busy = self.net.busy();
            let at = self.reactor.wait(deadline, busy).map_err(|e| Exit::runtime(format!("poll: {e}")))?.mono;
            let events: Vec<_> = self.reactor.events().collect();
            for (token, _) in events.iter().filter(|(token, _)| token.kind() == Kind::Process) {
                self.ended(*token, at);
            }
            for (token, edge) in events {
                match token.kind() {
                    Kind::Process | Kind::Waker => {}
                    Kind::Stop => {
                        for _ in 0..signals.stops() {
                            self.stop(at);
                        }
                    }
                    Kind::Reload => {
                        if signals.reloads() > 0 && !hangup_is_ignored {
                            self.hangup(at);
                        }
                    }
                    _ => self.net.on_edge(token, edge),
                }
            }
            self.net.turn(at);
            while let Some(event) = self.net.next_event() {
                if let NetEvent::Finished { exchange, outcome, .. } = event {
                    self.finished(exchange, outcome, at);
                }
            }
            self.listen();
            self.take_prepared(at)?;
            self.look_after_order(at);
            self.take_order(at);
            self.tell(Input::Time, at);
            self.send_notices(at);
            self.show(at);
            if self.core.is_over() {
                let until = *last_wait.get_or_insert(at.plus_ms(LAST_NOTICES_MS));
                if self.notices.may_end() || at >= until {
                    break;
                }
            }
        }
        self.screen.clear();
        if let Some(preparing) = self.preparing.take() {
            // What it has started of git and compilers goes with it.
            preparing.cancel.store(true, Ordering::Relaxed);
            let _ = preparing.outcome.recv_timeout(LAST_PREPARING);
        }
        for (_, running) in std::mem::take(&mut self.running) {
            // Not even SIGKILL ended it; nothing more can be done.
            running.engine.let_go();
        }
        self.gave_up.map_or(Ok(()), Err)
    }

    fn stop(&mut self, now: Mono) {
        if self.core.is_stopping() {
            log::warn!("a second signal: killing what is left at once");
            return self.tell(Input::StopNow, now);
        }
        for running in self.running.values() {
            log::info!("stopping pid {}", running.engine.pid());
        }
        self.tell(Input::Stop, now);
    }

    /// SIGHUP: a terminal that went away, or an operator who wants the configuration to be read again.
    fn hangup(&mut self, now: Mono) {
        if self.screen.lost_its_terminal() {
            return self.stop(now);
        }
        if self.core.is_stopping() {
            return;
        }
        self.credentials.reload(now);
        if let Some(preparing) = &mut self.preparing {
            // It may be fetching what is not wanted any more.
            preparing.cancel.store(true, Ordering::Relaxed);
            preparing.again = true;
        } else if let Err(exit) = self.prepare() {
            log::error!("nothing is changed: {exit}");
        }
    }

    /// Begins to get ready what is wanted, on a thread of its own.
    fn prepare(&mut self) -> Result<(), Exit> {
        let (sender, outcome) = sync_channel(1);
        let (prepare, waker) = (Arc::clone(&self.prepare), self.waker.clone());
        let cancel = Arc::new(AtomicBool::new(false));
        let has_looked = Arc::new(AtomicBool::new(false));
        let (looked, looked_waker) = (Arc::clone(&has_looked), self.waker.clone());
        let wish = Wish {
            is_first: !self.has_begun,
            is_order: self.has_begun && self.managed.is_some(),
            orders: self.orders.clone(),
            cancel: Arc::clone(&cancel),
            on_looked: Box::new(move || {
                looked.store(true, Ordering::Release);
                let _ = looked_waker.wake();
            }),
        };
        let started = std::thread::Builder::new().name("prepare".into()).spawn(move || {
            let _ = sender.send(prepare(&wish));
            let _ = waker.wake();
        });
        started.map_err(|error| Exit::runtime(format!("cannot start a thread: {error}")))?;
        self.preparing = Some(Preparing { outcome, cancel, has_looked, again: false });
        Ok(())
    }

    /// Lets pool-managerd ask, once it is clear that there will be engines: what is got ready for them may take
    /// hours, and is asked about.
    fn listen(&mut self) {
        let has_looked = |preparing: &Preparing| preparing.has_looked.load(Ordering::Acquire);
        if self.is_listening || !self.preparing.as_ref().is_some_and(has_looked) {
            return;
        }
        self.is_listening = true;
        let listening = Control::listen(&self.options.handoff_dir, self.book.clone(), self.waker.clone());
        self.control =
            listening.map_err(|error| log::warn!("pool-managerd cannot reach this program: {error}")).ok();
    }

    /// Takes what has been got ready.
    ///
    /// # Errors
    /// [`Exit`] where it cannot be, and nothing runs yet.
    fn take_prepared(&mut self, now: Mono) -> Result<(), Exit> {
        let outcome = match self.preparing.as_ref().map(|preparing| preparing.outcome.try_recv()) {
            None | Some(Err(TryRecvError::Empty)) => return Ok(()),
            Some(Ok(outcome)) => outcome,
            Some(Err(TryRecvError::Disconnected)) => Err(Exit::runtime("what was to be got ready was lost")),
        };
        let again = self.preparing.take().is_some_and(|preparing| preparing.again);
        if self.core.is_stopping() {
            return Ok(());
        }
        if again {
            return self.prepare();
        }
        match outcome {
            Ok(prepared) => {
                if !std::mem::replace(&mut self.has_begun, true) {
                    self.guard()?;
                }
                self.order_prepared(&prepared.configs);
                self.want(prepared, now);
            }
            Err(exit) if !self.has_begun => return Err(exit),
            Err(exit) => {
                log::error!("nothing is changed: {exit}");
                self.report("refused", None, json!({"reason": exit.message}));
                self.order_failed(&exit.message, now);
            }
        }
        Ok(())
    }

    /// Brings the engines to what was prepared: only what differs is touched.
    fn want(&mut self, prepared: Prepared, now: Mono) {
        let Prepared { configs, free_vram_bytes, replace_all } = prepared;
        let wanted: Vec<ReplicaKey> = configs.iter().map(Config::key).collect();
        self.book.keeps(wanted.iter().map(|key| key.pool.clone()));
        let gone: Vec<ReplicaKey> = self.newest.keys().filter(|key| !wanted.contains(key)).cloned().collect();
        for key in gone {
            log::info!("{key} is not wanted any more");
            self.newest.remove(&key);
            self.book.steps.forget(&key);
            self.tell(Input::Unwant(key), now);
        }
        for config in configs {
            let key = config.key();
            let before = self.newest.get(&key).and_then(|spec| self.specs.get(spec));
            let is_first = before.is_none();
            let is_same = before.is_some_and(|before| **before == config);
            let is_retried = self.to_retry.remove(&key);
            if is_same && !replace_all && !is_retried {
                continue;
            }
            let spec = self.next_spec;
            self.next_spec += 1;
            let terms = terms(spec, &config);
            let replace = self.room_for_two(&key, &config, free_vram_bytes);
            let found = is_first.then(|| self.kept.as_ref()?.find(&config)).flatten();
            self.specs.insert(spec, Arc::new(config));
            self.newest.insert(key.clone(), spec);
            match found {
                Some(found) => {
                    self.tell(Input::Adopt(key.clone(), terms), now);
                    if !found.is_unchanged {
                        log::info!("{key} was changed while nobody kept it: it is started anew");
                        self.tell(Input::Want(key, terms, Replace::StopFirst), now);
                    }
                }
                None => self.tell(Input::Want(key, terms, replace), now),
            }
        }
        let used: Vec<SpecId> = self.newest.values().copied().collect();
        self.specs.retain(|spec, config| used.contains(spec) || Arc::strong_count(config) > 1);
    }

    /// Whether a second instance fits beside the first: not on the same port, and only with memory for both.
    fn room_for_two(&self, key: &ReplicaKey, config: &Config, free_vram_bytes: Option<u64>) -> Replace {
        let mut others = self.running.values().filter(|running| running.config.key() == *key);
        let Some(old) = others.next() else { return Replace::Overlap };
        let resident = super::process::resident_bytes(old.engine.pid());
        let model = config.model_file.as_ref().map_or(0, |(_, bytes)| *bytes);
        let fits = match (config.device_mask.is_some(), free_vram_bytes) {
            // A model takes more than its file: context and buffers come on top.
            (true, Some(free)) => model > 0 && model + model / 4 < free,
            (true, None) => false,
            (false, _) => preflight::available_memory().is_none_or(|free| resident.max(model) < free / 5 * 4),
        };
        if fits && config.port == 0 { Replace::Overlap } else { Replace::StopFirst }
    }

    /// Hands the core what happened, and carries out what it answers.
    fn tell(&mut self, input: Input, now: Mono) {
        let mut out = Vec::new();
        self.core.handle(input, now, &mut out);
        let nested = !self.effects.is_empty();
        self.effects.extend(out);
        if nested {
            // Whoever empties the queue comes to these too.
            return;
        }
        while let Some(effect) = self.effects.front().cloned() {
            if let Some(input) = self.carry_out(effect, now) {
                let mut out = Vec::new();
                self.core.handle(input, now, &mut out);
                self.effects.extend(out);
            }
            self.effects.pop_front();
        }
    }

    fn carry_out(&mut self, effect: Effect, now: Mono) -> Option<Input> {
        match effect {
            Effect::Start(id, key, spec) => Some(match self.start(id, &key, spec, now) {
                Ok(()) => Input::Spawned(id),
                Err(why) => Input::NotSpawned(id, why),
            }),
            Effect::TakeOver(id, key, spec) => Some(match self.take_over(id, &key, spec, now) {
                Ok(()) => Input::Spawned(id),
                Err(why) => Input::NotSpawned(id, why),
            }),
            Effect::Probe(id) => {
                self.ask(id, ProbeKind::Health, About::Health(id, ProbeKind::Health), now);
                None
            }
            Effect::Publish(id) => Some(match self.publish(id, now) {
                Ok(()) => Input::Published(id),
                Err(why) => Input::NotPublished(id, why),
            }),
            Effect::Withdraw(id) => {
                self.withdraw(id, now);
                None
            }
            Effect::AskInUse(id) => self.ask_in_use(id, now),
            Effect::Terminate(id) => {
                self.signal(id, Signal::TERM);
                None
            }
            Effect::Kill(id) => {
                self.signal(id, Signal::KILL);
                None
            }
            Effect::Reap(id) => {
                self.reap(id);
                None
            }
            Effect::Tell(key, told) => {
                self.announce(&key, &told);
                self.order_told(&key, &told, now);
                None
            }
            Effect::GiveUp(id, reason) => {
                let text = self.running.get(&id).map_or(reason.clone(), |one| one.log.explain(&reason));
                self.gave_up = Some(Exit::runtime(text));
                None
            }
        }
    }

    fn start(&mut self, id: InstanceId, key: &ReplicaKey, spec: SpecId, now: Mono) -> Result<(), String> {
        let config = Arc::clone(self.specs.get(&spec).ok_or("nobody knows what to start")?);
        let port = preflight::choose_port(config.port).map_err(|exit| exit.message)?;
        let plan = Plan::new(&config, port).map_err(|exit| exit.message)?;
        let log = EngineLog::open(&config.log_file).map_err(|exit| exit.message)?;
        let cgroup = Cgroup::create(&format!("{}-{}-{id}", key.pool, key.replica));
        let at_ns = crate::reactor::now().wall.0;
        let engine = Engine::spawn(&plan, &log.file, cgroup)?;
        // The time in milliseconds: of two engines that claim one name, the one that started later counts.
        let wall_ms = crate::reactor::now().wall.unix_ms();
        self.generation = wall_ms.max(self.generation + 1);
        let handoff = engine.complete(&plan.handoff, self.generation)?;
        if let (Some(guardian), Some(start)) = (&mut self.guardian, handoff.pid_start) {
            guardian.keep(engine.pid(), start, engine.cgroup());
        }
        if let Some(kept) = &self.kept {
            kept.remember(&config, &handoff, engine.cgroup())?;
        }
        self.book.steps.begin(StepKind::PoolWarmup, key, "loading");
        log::info!("started {key} as pid {}, output in {}", engine.pid(), log.path.display());
        self.report("spawned", Some(key), json!({"pid": engine.pid(), "at_ns": at_ns}));
        self.add(id, config, plan, engine, log, handoff, now)
    }

    /// An engine that an earlier run of this program started and left behind.
    fn take_over(&mut self, id: InstanceId, key: &ReplicaKey, spec: SpecId, now: Mono) -> Result<(), String> {
        let config = Arc::clone(self.specs.get(&spec).ok_or("nobody knows what is taken over")?);
        let found = self.kept.as_ref().and_then(|kept| kept.find(&config));
        let found = found.ok_or("the engine that was to be taken over is gone")?;
        let mut plan = Plan::new(&config, found.handoff.url.port()).map_err(|exit| exit.message)?;
        plan.handoff.url = found.handoff.url.clone();
        let log = EngineLog::open(&config.log_file).map_err(|exit| exit.message)?;
        let engine = Engine::found(found.pid, found.cgroup);
        self.generation = self.generation.max(found.handoff.generation);
        let handoff = engine.complete(&plan.handoff, found.handoff.generation)?;
        log::info!("took over {key}, which runs as pid {}", engine.pid());
        self.report("adopted", Some(key), json!({"pid": engine.pid()}));
        self.add(id, config, plan, engine, log, handoff, now)
    }

    #[expect(clippy::too_many_arguments, reason = "the parts of one record")]
    fn add(
        &mut self,
        id: InstanceId,
        config: Arc<Config>,
        plan: Plan,
        engine: Engine,
        log: EngineLog,
        handoff: Handoff,
        now: Mono,
    ) -> Result<(), String> {
        let cannot = |error: io::Error| format!("cannot watch pid {}: {error}", engine.pid());
        let descriptor = engine.descriptor().map_err(cannot)?;
        let registry = &self.registry;
        let watch = self.watched.insert_with(|token| {
            Ok::<_, io::Error>(Watched::Engine(id, Descriptor::register(descriptor, registry, token)?))
        });
        let watch = Some(watch.map_err(cannot)?);
        self.running.insert(
            id,
            Running {
                config,
                plan,
                engine,
                log,
                handoff,
                published: None,
                watch,
                was_healthy: false,
                began: now,
                progress: None,
                leaving_since: None,
                was_replaced: false,
            },
        );
        Ok(())
    }

    fn ask(&mut self, id: InstanceId, kind: ProbeKind, about: About, now: Mono) {
        let Some(running) = self.running.get(&id) else { return };
        let order = asking::order(&running.handoff, kind, id);
        let exchange = self.net.start(probe::outbound(&order), now);
        self.exchanges.insert(exchange, about);
    }

    fn finished(&mut self, exchange: Token, ended: Outcome, now: Mono) {
        let Some(about) = self.exchanges.remove(&exchange) else { return };
        match about {
            About::Health(id, kind) => self.probed(id, kind, ended, now),
            About::Fact(id, index, kind) => {
                let Some(running) = self.running.get_mut(&id) else { return };
                let order = asking::order(&running.handoff, kind, id);
                if let ProbeOutcome::Facts(facts) = probe::outcome(&order, ended)
                    && let Some(warning) = asking::learn(&mut running.handoff, running.config.slots, facts)
                {
                    log::warn!("{warning}");
                }
                self.ask_fact(id, index + 1, now);
            }
            About::InUse(id) => {
                let Some(running) = self.running.get(&id) else { return };
                let key = running.config.key();
                let known = match &ended {
                    Outcome::Complete { status, body } => asking::is_known(*status, body, &key),
                    _ => None,
                };
                let answers = matches!(ended, Outcome::Complete { .. });
                if known.is_none() && answers && !std::mem::replace(&mut self.agent_trouble_told, true) {
                    log::warn!("{} does not say whether {key} is drained", self.options.pool_managerd);
                }
                let in_use = known.unwrap_or_else(|| self.has_connections(id)) || self.may_be_unseen(id, now);
                self.tell(Input::InUse(id, in_use), now);
            }
            About::Notice(id) => {
                let answer = match &ended {
                    Outcome::Complete { status, body } => Ok((*status, body.as_slice())),
                    Outcome::Failed(fault) => Err(fault.reason.clone()),
                    Outcome::ClientGone | Outcome::Cancelled => Err("given up".into()),
                };
                if let Some(text) = self.notices.ended(&id, answer, now) {
                    log::warn!("{text}");
                }
            }
        }
    }

    fn probed(&mut self, id: InstanceId, kind: ProbeKind, ended: net::Outcome, now: Mono) {
        let Some(running) = self.running.get_mut(&id) else { return };
        if let Outcome::Complete { body, .. } = &ended {
            running.progress = asking::progress(body).or(running.progress);
        }
        let order = asking::order(&running.handoff, kind, id);
        let outcome = probe::outcome(&order, ended);
        let seen = match asking::seen(outcome, &running.handoff) {
            None if kind == ProbeKind::Health => {
                return self.ask(id, ProbeKind::Models, About::Health(id, ProbeKind::Models), now);
            }
            None => Seen::Soft("HTTP 404".into()),
            Some(seen) => seen,
        };
        if seen == Seen::Ready && !std::mem::replace(&mut running.was_healthy, true) {
            let (key, url) = (running.config.key(), running.handoff.url.to_string());
            let pid = running.engine.pid();
            log::info!("{key} is healthy at {url}");
            self.report("healthy", Some(&key), json!({"pid": pid, "url": url}));
            return self.ask_fact(id, 0, now);
        }
        self.tell(Input::Probed(id, seen), now);
    }

    /// Asks the engine about itself, one question after the other; then it is ready.
    fn ask_fact(&mut self, id: InstanceId, index: usize, now: Mono) {
        let Some(running) = self.running.get(&id) else { return };
        let questions = Profile::named(&running.plan.handoff.engine).questions(&running.plan.handoff);
        match questions.get(index) {
            Some(kind) => self.ask(id, *kind, About::Fact(id, index, *kind), now),
            None => self.tell(Input::Probed(id, Seen::Ready), now),
        }
    }

    fn publish(&mut self, id: InstanceId, now: Mono) -> Result<(), String> {
        let running = self.running.get_mut(&id).ok_or("its process is gone")?;
        let key = running.config.key();
        let (published, at_ns) = Published::write(&running.plan.handoff_file, &running.handoff)?;
        running.published = Some(published);
        let (path, handoff) = (running.plan.handoff_file.clone(), running.handoff.clone());
        self.report("handoff_written", Some(&key), json!({"path": path.to_string_lossy(), "at_ns": at_ns}));
        log::info!("handed over in {}", path.display());
        // The file was its predecessor's until now.
        for (other, running) in &mut self.running {
            if *other != id
                && running.config.key() == key
                && let Some(published) = running.published.take()
            {
                published.let_go();
                running.was_replaced = true;
            }
        }
        self.notices.changed(&handoff, true, now);
        Ok(())
    }

    fn withdraw(&mut self, id: InstanceId, now: Mono) {
        let Some(running) = self.running.get_mut(&id) else { return };
        if running.published.take().is_some() {
            self.notices.changed(&running.handoff, false, now);
        }
    }

    /// pool-managerd is asked; where nobody answers there, the kernel's table of connections.
    fn ask_in_use(&mut self, id: InstanceId, now: Mono) -> Option<Input> {
        let running = self.running.get_mut(&id)?;
        running.leaving_since.get_or_insert(now);
        if running.was_replaced {
            // pool-managerd knows the name by its new engine.
            let in_use = self.has_connections(id) || self.may_be_unseen(id, now);
            return Some(Input::InUse(id, in_use));
        }
        let token = self.credentials.bearer(now);
        let outbound =
            asking::about_pool(&self.options.pool_managerd, &running.config.key(), token.as_deref());
        let exchange = self.net.start(outbound, now);
        self.exchanges.insert(exchange, About::InUse(id));
        None
    }

    fn may_be_unseen(&self, id: InstanceId, now: Mono) -> bool {
        self.running.get(&id).is_some_and(|running| {
            let limit = if running.was_replaced { REPLACED_SEEN_MS } else { WITHDRAWN_SEEN_MS };
            running.leaving_since.is_some_and(|since| now.ms_since(since) < limit)
        })
    }

    fn has_connections(&self, id: InstanceId) -> bool {
        let Some(running) = self.running.get(&id) else { return false };
        let port = running.handoff.url.port();
        ["/proc/net/tcp", "/proc/net/tcp6"].iter().any(|table| {
            std::fs::read_to_string(table).is_ok_and(|text| asking::connections(&text, port) > 0)
        })
    }

    fn signal(&mut self, id: InstanceId, signal: Signal) {
        if let Some(running) = self.running.get(&id) {
            running.engine.signal(signal);
        }
    }

    /// A process ended.
    fn ended(&mut self, token: Token, now: Mono) {
        match self.watched.remove(token) {
            None => {}
            Some(Watched::Guardian(descriptor)) => {
                descriptor.deregister(&self.registry);
                log::warn!("the guardian of the engines ended: starting another one");
                if let Some(guardian) = self.guardian.take() {
                    guardian.reap();
                }
                if let Err(exit) = self.guard() {
                    log::error!("{exit}");
                }
            }
            Some(Watched::Engine(id, descriptor)) => {
                descriptor.deregister(&self.registry);
                let Some(running) = self.running.get_mut(&id) else { return };
                running.watch = None;
                let how = running.engine.ending();
                let address = SocketAddr::from(([127, 0, 0, 1], running.handoff.url.port()));
                let is_starting = !running.was_healthy && self.core.is_starting(id);
                let port_taken = is_starting && TcpStream::connect_timeout(&address, LOCAL_CONNECT).is_ok();
                self.tell(Input::Exited { instance: id, how, port_taken }, now);
            }
        }
    }

    fn reap(&mut self, id: InstanceId) {
        let Some(mut running) = self.running.remove(&id) else { return };
        let key = running.config.key();
        let (pid, how) = (running.engine.pid(), running.engine.ending());
        running.engine.reap();
        if let Some(guardian) = &mut self.guardian {
            guardian.forget(pid);
        }
        if let Some(kept) = &self.kept {
            kept.forget(&key, pid);
        }
        log::info!("pid {pid} ended: {how}");
        self.report("stopped", Some(&key), json!({"pid": pid, "status": how}));
    }

    /// Starts the guardian, unless engines are to outlive this program, and tells it what runs.
    fn guard(&mut self) -> Result<(), Exit> {
        if self.options.orphans == Orphans::Keep {
            return Ok(());
        }
        let failed = |error: io::Error| {
            Exit::runtime(format!(
                "cannot start the guardian of the engines: {error}; --orphans=keep does without it"
            ))
        };
        let mut guardian = Guardian::start(&self.prefix).map_err(failed)?;
        let descriptor = guardian.descriptor().map_err(failed)?;
        let registry = &self.registry;
        self.watched
            .insert_with(|token| {
                Ok::<_, io::Error>(Watched::Guardian(Descriptor::register(descriptor, registry, token)?))
            })
            .map_err(failed)?;
        for running in self.running.values() {
            if let Some(start) = running.handoff.pid_start {
                guardian.keep(running.engine.pid(), start, running.engine.cgroup());
            }
        }
        self.guardian = Some(guardian);
        Ok(())
    }

    fn send_notices(&mut self, now: Mono) {
        let token = self.credentials.bearer(now);
        for (id, outbound) in self.notices.due(token.as_deref(), now) {
            let exchange = self.net.start(outbound, now);
            self.exchanges.insert(exchange, About::Notice(id));
        }
    }

    fn show(&mut self, now: Mono) {
        let core = &self.core;
        let starting = self.running.iter().filter(|(id, _)| core.is_starting(**id));
        self.screen
            .show(starting.map(|(_, one)| (one.config.key(), now.ms_since(one.began), one.progress)), now);
    }

    fn announce(&mut self, key: &ReplicaKey, told: &Told) {
        self.screen.clear();
        if matches!(told, Told::KeptOld(_)) {
            self.to_retry.insert(key.clone());
        }
        let mut fields = json!({"reason": told.to_string()});
        let event = match told {
            Told::Serving(_) => {
                log::info!("{key} serves");
                return;
            }
            Told::Failed { reason, retry_ms, failures, is_open } => {
                // Its output explains best; the instance is there until it is reaped.
                let last = self.running.values().rev().find(|running| running.config.key() == *key);
                let text = last.map_or_else(|| reason.clone(), |running| running.log.explain(reason));
                let breaker = if *is_open { " (its breaker is open)" } else { "" };
                log::error!(
                    "{key}: {text}\n{key} is started again in {:.1} s after {failures} failures in a row{breaker}",
                    *retry_ms as f64 / 1e3
                );
                fields = json!({"reason": reason, "retry_ms": retry_ms, "failures": failures, "breaker_open": is_open});
                "failed"
            }
            Told::KeptOld(_) => "kept_old",
            Told::PortLost => "port_lost",
            Told::Storm(_) => "storm",
            Told::Replacing(_) => "replacing",
            Told::Replaced => "replaced",
            Told::DrainCut => "drain_cut",
            Told::Stubborn => "stubborn",
            Told::Stuck => "stuck",
        };
        match told {
            Told::Failed { .. } => {}
            Told::Replacing(_) | Told::Replaced => log::info!("{key}: {told}"),
            Told::KeptOld(_) | Told::Stuck => log::error!("{key}: {told}"),
            _ => log::warn!("{key}: {told}"),
        }
        self.report(event, Some(key), fields);
    }

    /// One JSON line on standard output for whoever measures or drives this program.
    fn report(&self, event: &str, key: Option<&ReplicaKey>, fields: Value) {
        if !self.options.report {
            return;
        }
        let mut line = json!({"event": event, "at_ns": now().wall.0});
        if let Some(key) = key {
            line["replica"] = json!(key.to_string());
        }
        if let (Some(line), Value::Object(fields)) = (line.as_object_mut(), fields) {
            line.extend(fields);
        }
        // A reader that went away is no reason to stop an engine, so an error is dropped.
        use std::io::Write;
        let mut out = io::stdout().lock();
        let _ = writeln!(out, "{line}").and_then(|()| out.flush());
    }
}

fn terms(spec: SpecId, config: &Config) -> Terms {
    Terms {
        spec,
        start_ms: config.start_ms(),
        health_every_ms: config.health_every_ms,
        health_failures_max: config.health_failures,
        drain_ms: config.drain_ms,
        stop_ms: config.stop_ms,
        restart: config.restart,
    }
}

/// Whoever started this with nohup wants it to outlive the terminal. Bit 0 of the mask of ignored signals is
/// signal 1, SIGHUP.
fn hangup_is_ignored() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).is_some_and(|mask| mask & 1 == 1)
}
