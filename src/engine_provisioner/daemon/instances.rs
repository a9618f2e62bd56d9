//! The loop's part of instances: their processes and their files, from the start to the last trace.
//!
//! An instance is added when its processes run and their end is watched; its handoff is written, let go to a
//! successor, or removed; and it is reaped when its first process has ended.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use rustix::process::Signal;
use serde_json::json;

use super::Daemon;
use crate::engine_provisioner::container::{self, Contained, Container};
use crate::engine_provisioner::guardian::Guardian;
use crate::engine_provisioner::kept::KeptContainer;
use crate::engine_provisioner::options::Orphans;
use crate::engine_provisioner::output::EngineLog;
use crate::engine_provisioner::plan::{Config, Plan};
use crate::engine_provisioner::preflight;
use crate::engine_provisioner::process::{Cgroup, Engine};
use crate::engine_provisioner::publish::Published;
use crate::engine_provisioner::steps::Kind;
use crate::engine_provisioner::supervision::{Input, InstanceId, SpecId};
use crate::reactor::Descriptor;
use crate::reactor::token::Token;
use crate::service::machine::process;
use crate::settings::Exit;
use crate::time::Mono;
use crate::wire::handoff::Handoff;
use crate::wire::id::ReplicaKey;

/// How long it is tried to reach a port of this machine, only to see whether somebody listens there.
const LOCAL_CONNECT: Duration = Duration::from_millis(100);

/// An instance's processes and files.
pub(super) struct Running {
    pub(super) config: Arc<Config>,
    pub(super) plan: Plan,
    pub(super) engine: Engine,
    pub(super) log: EngineLog,
    pub(super) handoff: Handoff,
    pub(super) published: Option<Published>,
    pub(super) watch: Option<Token>,
    /// It answered once, and was told of.
    pub(super) was_healthy: bool,
    pub(super) began: Mono,
    pub(super) progress: Option<f64>,
    pub(super) leaving_since: Option<Mono>,
    pub(super) was_replaced: bool,
    /// Start of the process that leads its group: that of the handoff may be another one's.
    started: Option<u64>,
    pub(super) contained: Option<Contained>,
}

/// Whose end a descriptor tells.
pub(super) enum Watched {
    Engine(InstanceId, Descriptor),
    Guardian(Descriptor),
}

impl Daemon {
    pub(super) fn start(
        &mut self,
        id: InstanceId,
        key: &ReplicaKey,
        spec: SpecId,
        now: Mono,
    ) -> Result<(), String> {
        let config = Arc::clone(self.specs.get(&spec).ok_or("nobody knows what to start")?);
        if let Some(container) = self.kept.as_ref().and_then(|kept| kept.left_behind(&config)) {
            log::warn!("{key}: its container outlived its client, and is killed");
            self.kill_one(container.clone());
            container.forget();
        }
        let port = preflight::choose_port(config.port).map_err(|exit| exit.message)?;
        let mut plan = Plan::new(&config, port).map_err(|exit| exit.message)?;
        let id_file =
            std::path::absolute(config.log_file.with_extension(format!("{}-{id}.cid", std::process::id())));
        let id_file = id_file.map_err(|error| format!("where is {}? {error}", config.log_file.display()))?;
        let container = Container::of(&mut plan.command, config.container.as_deref(), id_file);
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
            let container = container.as_ref().map(|container| KeptContainer { container, main: None });
            kept.remember(&config, &handoff, engine.cgroup(), container)?;
        }
        self.book.steps.begin(Kind::PoolWarmup, key, "loading");
        log::info!("started {key} as pid {}, output in {}", engine.pid(), log.path.display());
        self.report("spawned", Some(key), json!({"pid": engine.pid(), "at_ns": at_ns}));
        self.add(id, config, plan, engine, log, handoff, now)?;
        if let Some(container) = container {
            self.look_into(id, container);
        }
        Ok(())
    }

    /// Has somebody find a container's main process: that takes other programs, and perhaps an image.
    fn look_into(&mut self, id: InstanceId, container: Container) {
        let Some(running) = self.running.get_mut(&id) else { return };
        let stop = Arc::new(AtomicBool::new(false));
        let contained = Contained { container: container.clone(), pid: None, stop: Arc::clone(&stop) };
        running.contained = Some(contained);
        if let (Some(guardian), Some(file)) = (&mut self.guardian, container.id_file()) {
            guardian.contains(running.engine.pid(), &container.tool, file);
        }
        let (sender, waker) = (self.contained.0.clone(), self.waker.clone());
        let search = move || {
            if let Some(pid) = container.find(&stop) {
                let _ = sender.try_send((id, pid));
                let _ = waker.wake();
            }
        };
        let thread = std::thread::Builder::new().name("container".into()).spawn(search);
        if let Err(error) = thread {
            // It is handed over with its client.
            log::error!("cannot start a thread: {error}");
            running.contained = None;
        }
    }

    /// Takes what was found: the handoff names the engine's own process.
    pub(super) fn take_contained(&mut self, now: Mono) {
        while let Ok((id, pid)) = self.contained.1.try_recv() {
            let Some(running) = self.running.get_mut(&id) else { continue };
            let Some(contained) = &mut running.contained else { continue };
            contained.pid = Some(pid);
            let key = running.config.key();
            match process(pid) {
                Some((_, start)) => {
                    let client = Handoff {
                        pid: Some(running.engine.pid()),
                        pid_start: running.started,
                        ..running.handoff.clone()
                    };
                    let known = KeptContainer { container: &contained.container, main: Some((pid, start)) };
                    let cgroup = running.engine.cgroup();
                    if let Some(kept) = &self.kept
                        && let Err(why) = kept.remember(&running.config, &client, cgroup, Some(known))
                    {
                        // It is looked for again.
                        log::warn!("{key}: {why}");
                    }
                    (running.handoff.pid, running.handoff.pid_start) = (Some(pid), Some(start));
                    log::info!("{key}: its container's main process is {pid}");
                }
                None => log::warn!("{key}: process {pid} of its container is not to be seen from here"),
            }
            self.report("contained", Some(&key), json!({"pid": pid}));
            self.tell(Input::Time, now);
        }
    }

    /// Kills an instance's container, if it has one that still runs.
    fn kill_container(&mut self, id: InstanceId) {
        let contained = self.running.get(&id).and_then(|running| running.contained.as_ref());
        if let Some(container) = contained.map(|contained| contained.container.clone()) {
            self.kill_one(container);
        }
    }

    fn kill_one(&mut self, container: Container) {
        let Some(id) = container.id() else { return };
        let kill = move || container::kill(&container.tool, &id);
        self.killers.retain(|killer| !killer.is_finished());
        match std::thread::Builder::new().name("container".into()).spawn(kill) {
            Ok(killer) => self.killers.push(killer),
            Err(error) => log::error!("cannot start a thread: {error}"),
        }
    }

    /// An engine that an earlier run of this program started and left behind.
    pub(super) fn take_over(
        &mut self,
        id: InstanceId,
        key: &ReplicaKey,
        spec: SpecId,
        now: Mono,
    ) -> Result<(), String> {
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
        self.add(id, config, plan, engine, log, handoff, now)?;
        match (found.container, found.main) {
            (None, _) => {}
            (Some(container), None) => self.look_into(id, container),
            (Some(container), Some((pid, start))) => {
                let Some(running) = self.running.get_mut(&id) else { return Ok(()) };
                // What watches the handoff watches the engine, not the client.
                (running.handoff.pid, running.handoff.pid_start) = (Some(pid), Some(start));
                running.contained = Some(Contained { container, pid: Some(pid), stop: Arc::default() });
            }
        }
        Ok(())
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
        let started = handoff.pid_start;
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
                started,
                contained: None,
            },
        );
        Ok(())
    }

    pub(super) fn publish(&mut self, id: InstanceId, now: Mono) -> Result<(), String> {
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

    pub(super) fn withdraw(&mut self, id: InstanceId, now: Mono) {
        let Some(running) = self.running.get_mut(&id) else { return };
        if running.published.take().is_some() {
            self.notices.changed(&running.handoff, false, now);
        }
    }

    pub(super) fn signal(&mut self, id: InstanceId, signal: Signal) {
        if let Some(running) = self.running.get(&id) {
            running.engine.signal(signal);
        }
        if signal == Signal::KILL {
            self.kill_container(id);
        }
    }

    /// A process ended.
    pub(super) fn ended(&mut self, token: Token, now: Mono) {
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

    pub(super) fn reap(&mut self, id: InstanceId) {
        let is_left = |running: &Running| {
            let contained = running.contained.as_ref().and_then(|contained| contained.pid);
            contained.and_then(process).is_some_and(|(_, start)| running.handoff.pid_start == Some(start))
        };
        if self.running.get(&id).is_some_and(is_left) {
            // Its client was killed.
            self.kill_container(id);
        }
        let Some(mut running) = self.running.remove(&id) else { return };
        let key = running.config.key();
        let (pid, how) = (running.engine.pid(), running.engine.ending());
        self.emptied.extend(running.engine.reap());
        if let Some(contained) = &running.contained {
            contained.container.forget();
        }
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
    pub(super) fn guard(&mut self) -> Result<(), Exit> {
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
            if let Some(start) = running.started {
                guardian.keep(running.engine.pid(), start, running.engine.cgroup());
            }
            let container = running.contained.as_ref().map(|contained| &contained.container);
            if let Some((container, file)) = container.and_then(|one| Some((one, one.id_file()?))) {
                guardian.contains(running.engine.pid(), &container.tool, file);
            }
        }
        self.guardian = Some(guardian);
        Ok(())
    }
}
