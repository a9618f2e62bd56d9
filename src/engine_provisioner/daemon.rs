//! The shell: one loop over the ends of processes, signals, probes and the clock.
//!
//! [`supervision`](super::supervision) decides; this file carries out, one line an effect. Ends of processes
//! come first in every turn: a handoff must not outlive its engine. What may block for long (reading the
//! configuration again, asking the GPU driver) is done on a thread of its own that lives for one reload.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ffi::OsString;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, sync_channel};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::{Value, json};

use super::control::{Book, Control};
use super::file::ENGINES_MAX;
use super::guardian::Guardian;
use super::kept::Kept;
use super::notify::Notices;
use super::options::{Options, Orphans};
use super::output::Rotations;
use super::plan::Config;
use super::preflight::{self, Prepared};
use super::process::is_removed;
use super::progress::Screen;
use super::supervision::{Effect, Input, InstanceId, Replace, SpecId, Supervision, Terms, Told};
use crate::net::{Limits, Net, NetEvent};
use crate::reactor::signal::Signals;
use crate::reactor::token::{Kind, Table, Token};
use crate::reactor::{Reactor, Registry, Waker, now};
use crate::replicas::ProbeKind;
use crate::service::credentials::Credentials;
use crate::settings::Exit;
use crate::time::{Mono, earliest};
use crate::wire::id::ReplicaKey;

mod instances;
mod managed;
mod questions;

use instances::{Running, Watched};
pub(super) use managed::Orders;
use questions::About;

/// Exchanges at once: a probe for each of the most engines, and notices.
const EXCHANGES_MAX: usize = 1_024;
/// Longest that the end of this program waits for notices, in milliseconds.
const LAST_NOTICES_MS: u64 = 2_000;
/// Longest that it waits for what is being fetched or built to stop.
const LAST_PREPARING: Duration = Duration::from_secs(5);
/// Longest that it waits until killed processes have left their cgroups, and how often it looks.
const LAST_LEAVING: Duration = Duration::from_secs(1);
const LOOK: Duration = Duration::from_millis(5);

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

/// The main process of an instance's container.
type MainProcess = (InstanceId, u32);

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
    /// Main processes of containers, as they are found.
    contained: (SyncSender<MainProcess>, Receiver<MainProcess>),
    watched: Table<Watched>,
    exchanges: BTreeMap<Token, About>,
    notices: Notices,
    /// Those that kill containers: a few seconds at most, and not left behind.
    killers: Vec<std::thread::JoinHandle<()>>,
    /// Cgroups of engines that ended, until they can be removed.
    emptied: Vec<PathBuf>,
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
    rotations: Rotations,
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
    let mut net = Net::new(reactor.registry().map_err(kernel("descriptor"))?, waker.clone(), limits);
    net.set_client_tls(options.tls.client().map_err(Exit::config)?);
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
        contained: sync_channel(ENGINES_MAX),
        watched: Table::new(Kind::Process),
        exchanges: BTreeMap::new(),
        killers: Vec::new(),
        emptied: Vec::new(),
        guardian: None,
        kept,
        preparing: None,
        has_begun: false,
        book,
        control: None,
        is_listening: false,
        orders: Orders::default(),
        managed: None,
        rotations: Rotations::default(),
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
            let own = [self.core.deadline(), self.net.deadline(), self.notices.deadline(), last_wait];
            let deadline =
                own.into_iter().chain([self.rotations.deadline()]).fold(self.screen.deadline(), earliest);
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
            self.take_contained(at);
            self.emptied.retain(|directory| !is_removed(directory));
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
            self.rotations.look(self.running.values_mut().map(|running| &mut running.log), at);
            if self.core.is_over() {
                let until = *last_wait.get_or_insert(at.plus_ms(LAST_NOTICES_MS));
                if self.notices.may_end() || at >= until {
                    break;
                }
            }
        }
        self.screen.hide();
        if let Some(preparing) = self.preparing.take() {
            // What it has started of git and compilers goes with it.
            preparing.cancel.store(true, Ordering::Relaxed);
            let _ = preparing.outcome.recv_timeout(LAST_PREPARING);
        }
        for (_, running) in std::mem::take(&mut self.running) {
            // Not even SIGKILL ended it; nothing more can be done.
            running.engine.let_go();
        }
        let deadline = Instant::now() + LAST_LEAVING;
        while !self.emptied.is_empty() && Instant::now() < deadline {
            std::thread::sleep(LOOK);
            self.emptied.retain(|directory| !is_removed(directory));
        }
        for killer in self.killers {
            let _ = killer.join();
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
        match self.options.tls.client() {
            Ok(tls) => self.net.set_client_tls(tls),
            Err(why) => log::error!("certificates stay as they are: {why}"),
        }
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

    fn send_notices(&mut self, now: Mono) {
        let token = self.credentials.bearer(now);
        for (id, outbound) in self.notices.due(token.as_deref(), now) {
            let exchange = self.net.start(outbound, now);
            self.exchanges.insert(exchange, About::Notice(id));
        }
    }

    fn show(&mut self, now: Mono) {
        if self.preparing.is_some() {
            // Bars of what is fetched and built have the terminal.
            return self.screen.hide();
        }
        let core = &self.core;
        let starting = self.running.iter().filter(|(id, _)| core.is_starting(**id));
        self.screen
            .show(starting.map(|(_, one)| (one.config.key(), now.ms_since(one.began), one.progress)), now);
    }

    fn announce(&mut self, key: &ReplicaKey, told: &Told) {
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
                let said = told.to_string();
                log::error!(
                    "{key}: {}",
                    last.map_or_else(|| said.clone(), |running| running.log.explain(&said))
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
