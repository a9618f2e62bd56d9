//! `llorch up`: everything on this machine, with one engine, and one question to it.
//!
//! It starts `orchestratord`, `pool-managerd` and an `engine-provisioner` as processes of its own and
//! then only watches and asks, as anybody could: the provisioner's report lines, orchestratord's events,
//! one chat completion. It prints each thing as it happens, measures from outside, and ends what it
//! started. Without `--once` it stays and shows state changes until Ctrl-C.
//!
//! One thread, and `Up` holds it all: `children` starts and ends processes, `client` speaks HTTP,
//! `timeline` makes a table of times, `screen` prints.

use std::ffi::{OsStr, OsString};
use std::io::{BufRead, BufReader, ErrorKind};
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::process::ChildStdout;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal};
use serde_json::Value;

use crate::service::{credentials, machine};
use crate::settings::{Exit, Setting, Settings, boolean, flag, number};
use children::{Children, DRAIN_TIMEOUT_MS, Home};
use client::Client;
use screen::Screen;
use timeline::{Event, EventPage, REPLICA, Report, Timeline};

mod children;
mod client;
mod screen;
mod timeline;

/// Exit code after a SIGINT, as shells count it.
const EXIT_INTERRUPTED: u8 = 130;
/// Names the parent of a child of `up`.
const PARENT_VARIABLE: &str = "LLORCH_UP_PID";
/// Model name that the demonstration engine goes by.
const DEMO_MODEL: &str = "llorch-demo";
/// Daemons answer within milliseconds of their start; one that does not within this never will.
const DAEMON_TIMEOUT: Duration = Duration::from_secs(5);
/// Pause between looks at a daemon that starts.
const DAEMON_PAUSE: Duration = Duration::from_millis(2);
/// From a written handoff to a replica that takes work: milliseconds, unless something refuses it.
const ROUTABLE_TIMEOUT: Duration = Duration::from_secs(30);
/// Pause between looks while an engine loads.
const LOADING_PAUSE: Duration = Duration::from_millis(50);
/// Pause between looks at a handoff on its way: fine enough to ask the moment it is routable.
const HANDOFF_PAUSE: Duration = Duration::from_millis(1);
/// Pause between looks once all is up.
const WATCH_PAUSE: Duration = Duration::from_millis(250);
/// Report lines that may wait to be read; a provisioner writes five in its life.
const REPORTS_MAX: usize = 16;
/// Times that free ports are chosen before it is called impossible.
const PORT_ATTEMPTS_MAX: u32 = 2;

pub(super) static TABLE: &[Setting] = &[
    flag("once", Some("false"), "BOOL", "Ask one question, print what was measured, end everything"),
    flag("dir", None, "DIR", "Directory for handoffs, logs and state, kept; a temporary one if absent"),
    flag("port", Some("8080"), "PORT", "Port of orchestratord; 0, or --once without it, takes a free one"),
    flag(
        "prompt",
        Some("Which engines are there, and which of them takes the next request?"),
        "TEXT",
        "What the engine is asked",
    ),
    flag("max-tokens", Some("32"), "N", "Longest answer, 1 to 1000000 tokens"),
    flag("slots", Some("4"), "N", "Requests that the engine serves at once, 1 to 65536"),
    flag("engine-wait-secs", Some("600"), "SECS", "How long the engine may take to load, 1 to 86400 seconds"),
    flag("verbose", Some("false"), "BOOL", "Show every event with its text, and let the daemons log more"),
    flag(
        "engine",
        None,
        "COMMAND...",
        "Engine to start, {port} filled in; takes everything behind it. The demonstration engine if absent",
    ),
];

/// Runs until the answer is there (`--once`) or a signal comes; `args` are the words behind `up`.
///
/// # Errors
/// [`Exit`] with code 1 and what failed, 2 or 78 for a command line that is not usable, 130 for an
/// interrupted `--once`.
pub fn run(args: Vec<OsString>) -> Result<(), Exit> {
    let started = Instant::now();
    let options = Options::read(args)?;
    let interrupt =
        Interrupt::install().map_err(|error| Exit::runtime(format!("cannot watch for signals: {error}")))?;
    let ports = options.ports()?;
    let program = std::env::current_exe()
        .map_err(|error| Exit::runtime(format!("cannot tell which program this is: {error}")))?;
    let home = Home::create(options.dir.as_deref()).map_err(Exit::runtime)?;
    let children = Children::new(program, home.path.join("logs"), interrupt.clone());
    let mut up = Up {
        orchestratord: Client::new(SocketAddr::from(([127, 0, 0, 1], ports.orchestratord))),
        options,
        ports,
        home,
        children,
        interrupt,
        screen: Screen::new(),
        timeline: Timeline::default(),
        next_event: 0,
        started,
    };
    let outcome = up.run();
    up.end(outcome)
}

/// In a child of `up`: asks the kernel for a SIGTERM should `up` be killed. Nothing elsewhere.
pub fn end_with_parent() {
    let is_parent = |parent: Pid| {
        std::env::var(PARENT_VARIABLE).is_ok_and(|pid| pid == parent.as_raw_nonzero().to_string())
    };
    if rustix::process::getppid().is_some_and(is_parent) {
        // Where the kernel refuses, the child outlives a killed `up`, as any other would.
        let _ = rustix::process::set_parent_process_death_signal(Some(Signal::TERM));
    }
}

/// Why `up` does not go on.
#[derive(Debug)]
enum Halt {
    /// Somebody wants it to end.
    Interrupted,
    /// Something failed, in words.
    Failed(String),
}

impl From<String> for Halt {
    fn from(message: String) -> Halt {
        Halt::Failed(message)
    }
}

/// SIGINT, SIGTERM or SIGHUP came.
#[derive(Clone)]
struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    fn install() -> std::io::Result<Interrupt> {
        use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
        let flag = Arc::new(AtomicBool::new(false));
        for signal in [SIGINT, SIGTERM, SIGHUP] {
            signal_hook::flag::register(signal, Arc::clone(&flag))?;
        }
        Ok(Interrupt(flag))
    }

    fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    fn clear(&self) {
        self.0.store(false, Ordering::Relaxed);
    }

    fn check(&self) -> Result<(), Halt> {
        if self.is_set() { Err(Halt::Interrupted) } else { Ok(()) }
    }
}

/// What the operator asked for.
struct Options {
    once: bool,
    verbose: bool,
    dir: Option<PathBuf>,
    /// Port of orchestratord; 0 for any free one.
    port: u16,
    prompt: String,
    tokens_max: u64,
    slots: u64,
    /// Longest load of the engine, in milliseconds.
    engine_wait_ms: u64,
    /// Empty for the demonstration engine.
    engine: Vec<OsString>,
    /// The port in the engine's command where it says one instead of `{port}`.
    engine_port: Option<u16>,
    notes: Vec<String>,
}

impl Options {
    fn read(mut args: Vec<OsString>) -> Result<Options, Exit> {
        // Everything behind it is the engine's, dashes and all.
        let behind = args.iter().position(|word| word == "--").unwrap_or(args.len());
        if let Some(at) = args[..behind].iter().position(|word| word == "--engine") {
            args[at] = "--".into();
        }
        let about = "Start everything on this machine with one engine, ask it, show what happens";
        let settings = Settings::read("llorch up", about, TABLE, Some("COMMAND"), args, |_| None)?;
        let once = settings.need("once", boolean)?;
        let port = settings.need("port", number(0, u16::MAX.into()))?;
        let text = |text: &str| Ok(text.to_string());
        let engine_port = match settings.rest.is_empty() {
            true => None,
            false => engine_port(&settings.rest)?,
        };
        let token = credentials::VARIABLES.iter().copied().find(|name| std::env::var_os(name).is_some());
        let note =
            |name| format!("{name} is not used: nothing here listens beyond 127.0.0.1, and asks no token");
        Ok(Options {
            once,
            verbose: settings.need("verbose", boolean)?,
            dir: settings.get("dir", |path| Ok(PathBuf::from(path)))?,
            port: if once && !settings.given("port") { 0 } else { u16::try_from(port).unwrap_or(0) },
            prompt: settings.need("prompt", text)?,
            tokens_max: settings.need("max-tokens", number(1, 1_000_000))?,
            slots: settings.need("slots", number(1, crate::wire::handoff::SLOTS_MAX.into()))?,
            engine_wait_ms: settings.need("engine-wait-secs", number(1, 86_400))? * 1000,
            engine: settings.rest,
            engine_port,
            notes: token.map(note).into_iter().collect(),
        })
    }

    /// Ports for the daemons that are free at this moment.
    fn ports(&self) -> Result<Ports, Exit> {
        // Both are held until both are chosen.
        let orchestratord = listen(self.port).map_err(|error| {
            let port = self.port;
            Exit::runtime(match error.kind() {
                ErrorKind::AddrInUse => format!(
                    "port {port} on 127.0.0.1 is taken: stop what listens there, or choose another one for orchestratord with --port N"
                ),
                _ => format!("port {port} on 127.0.0.1 cannot be used: {error}; choose another one with --port N"),
            })
        })?;
        // Any free one, always: were it the usual 9200, a second `up` would be answered by this one's.
        let agent = listen(0)
            .map_err(|error| Exit::runtime(format!("no port is free for pool-managerd: {error}")))?;
        let port_of = |listener: TcpListener| listener.local_addr().map_or(0, |address| address.port());
        Ok(Ports { orchestratord: port_of(orchestratord), agent: port_of(agent) })
    }

    /// The engine's command line; `program` is this one.
    fn engine_command(&self, program: &OsStr) -> Vec<OsString> {
        if !self.engine.is_empty() {
            return self.engine.clone();
        }
        let slots = self.slots.to_string();
        let words = ["demo-engine", "--port", "{port}", "--slots", &slots, "--model", DEMO_MODEL];
        [program.to_os_string()].into_iter().chain(words.map(OsString::from)).collect()
    }
}

/// The port that an engine's command names: `None` for `{port}`.
fn engine_port(command: &[OsString]) -> Result<Option<u16>, Exit> {
    let words: Vec<_> = command.iter().map(|word| word.to_string_lossy()).collect();
    if words.iter().any(|word| word.contains("{port}")) {
        return Ok(None);
    }
    let separate = words.windows(2).find(|pair| pair[0] == "--port").map(|pair| pair[1].as_ref());
    let joined = words.iter().find_map(|word| word.strip_prefix("--port="));
    match separate.or(joined).and_then(|port| port.parse().ok()).filter(|port| *port > 0) {
        Some(port) => Ok(Some(port)),
        None => Err(Exit::runtime(format!(
            "the engine's command does not say where its port goes: write {{port}} in it, for example --engine llama-server -m model.gguf --port {{port}} (given: {})",
            words.join(" ")
        ))),
    }
}

fn listen(port: u16) -> std::io::Result<TcpListener> {
    match port {
        0 => machine::listen_on_free_port(),
        port => TcpListener::bind(("127.0.0.1", port)),
    }
}

/// Where the daemons listen.
#[derive(Clone, Copy)]
struct Ports {
    orchestratord: u16,
    agent: u16,
}

/// One run.
struct Up {
    options: Options,
    ports: Ports,
    // Before `home`: what is dropped first is ended first.
    children: Children,
    home: Home,
    interrupt: Interrupt,
    screen: Screen,
    orchestratord: Client,
    timeline: Timeline,
    next_event: u64,
    started: Instant,
}

impl Up {
    fn run(&mut self) -> Result<(), Halt> {
        for note in self.options.notes.clone() {
            self.screen.line("note", &note);
        }
        if self.options.verbose {
            let place = self.home.path.display().to_string();
            self.screen.line("directory", &place);
        }
        self.start_daemons()?;
        self.timeline.daemons_answer(client::nanoseconds(self.started.elapsed()));
        let reports = self.start_engine()?;
        self.wait_for_replica(&reports)?;
        self.ask()?;
        if self.options.once {
            return Ok(());
        }
        self.tell_how_to_use();
        self.watch(&reports)
    }

    /// Ends everything and says how it went.
    fn end(mut self, outcome: Result<(), Halt>) -> Result<(), Exit> {
        self.screen.end_answer();
        match &outcome {
            Ok(()) => self.screen.blank(),
            Err(Halt::Interrupted) => {
                self.screen.blank();
                self.screen.line("stopping", "the daemons, then the engine");
            }
            Err(Halt::Failed(_)) => {}
        }
        let killed = self.children.end();
        for name in killed {
            self.screen.line("killed", &format!("{name}: it did not end in time"));
        }
        match outcome {
            Err(Halt::Failed(message)) => {
                let logs = self.home.path.join("logs");
                Err(Exit::runtime(format!(
                    "{message}\neverything was ended; the logs are in {}",
                    logs.display()
                )))
            }
            Ok(()) | Err(Halt::Interrupted) => {
                let left = self.home.remove();
                self.screen.line("ended", &format!("orchestratord, pool-managerd, the engine; {left}"));
                match (outcome, self.options.once) {
                    (Err(_), true) => {
                        Err(Exit { code: EXIT_INTERRUPTED, message: "interrupted".to_string() })
                    }
                    _ => Ok(()),
                }
            }
        }
    }

    // Starting.

    fn start_daemons(&mut self) -> Result<(), Halt> {
        let mut attempt = 1;
        loop {
            match self.try_daemons() {
                // Somebody was faster at a port that was free a moment ago: others may be free.
                Err(Halt::Failed(message))
                    if message.contains("cannot listen on")
                        && self.options.port == 0
                        && attempt < PORT_ATTEMPTS_MAX =>
                {
                    attempt += 1;
                    self.children.end();
                    self.ports = self.options.ports().map_err(|exit| exit.message)?;
                }
                other => return other,
            }
        }
    }

    fn try_daemons(&mut self) -> Result<(), Halt> {
        let Ports { orchestratord, agent } = self.ports;
        self.orchestratord = Client::new(local(orchestratord));
        let engines = self.home.path.join("engines").into_os_string();
        let state = self.home.path.join("state").into_os_string();
        let level = if self.options.verbose { "debug" } else { "info" };
        let common = |port: u16| -> Vec<OsString> {
            let address = local(port).to_string();
            let drain = DRAIN_TIMEOUT_MS.to_string();
            let mut args: Vec<OsString> =
                ["--addr", &address, "--drain-timeout-ms", &drain, "--log-level", level]
                    .map(OsString::from)
                    .into();
            args.extend(["--runtime-dir".into(), engines.clone()]);
            args
        };
        self.children.spawn("orchestratord", common(orchestratord), false)?;
        let mut args = common(agent);
        args.extend(["--node-id".into(), "local".into(), "--state-dir".into(), state]);
        self.children.spawn("pool-managerd", args, false)?;
        self.wait_for_daemon("orchestratord", local(orchestratord))?;
        self.wait_for_daemon("pool-managerd", local(agent))
    }

    fn wait_for_daemon(&mut self, name: &str, address: SocketAddr) -> Result<(), Halt> {
        let mut client = Client::new(address);
        let deadline = Instant::now() + DAEMON_TIMEOUT;
        loop {
            let answers = client.get("/health").is_ok_and(|(status, _)| status == 200);
            // After the answer, so that it is not somebody else's on a port that the child did not get.
            self.children.check()?;
            self.interrupt.check()?;
            if answers {
                self.screen.line(name, &format!("ready on http://{address}"));
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err(Halt::Failed(format!(
                    "{name} does not answer http://{address}/health within {} s",
                    DAEMON_TIMEOUT.as_secs()
                )));
            }
            thread::sleep(DAEMON_PAUSE);
        }
    }

    fn start_engine(&mut self) -> Result<Receiver<Report>, Halt> {
        let program = std::env::current_exe().map_err(|error| error.to_string())?;
        let slots = self.options.slots.to_string();
        let limit = self.options.engine_wait_ms.to_string();
        let (pool, replica) = REPLICA.split_once('/').unwrap_or((REPLICA, "r0"));
        let words = [
            "--report",
            "--restart",
            "never",
            "--pool",
            pool,
            "--replica",
            replica,
            "--slots",
            &slots,
            "--health-timeout-ms",
            &limit,
        ];
        let mut args: Vec<OsString> = words.map(OsString::from).into();
        args.extend(["--handoff-dir".into(), self.home.path.join("engines").into_os_string()]);
        if let Some(port) = self.options.engine_port {
            args.extend(["--port".into(), port.to_string().into()]);
        }
        if self.options.engine.is_empty() {
            args.extend(["--model".into(), DEMO_MODEL.into()]);
            self.screen.line("engine", "demonstration engine: words made from the prompt, no model");
        }
        args.push("--".into());
        args.extend(self.options.engine_command(program.as_os_str()));
        let output = self.children.spawn("engine-provisioner", args, true)?;
        let output = output.ok_or_else(|| "the provisioner has no output".to_string())?;
        read_reports(output).map_err(|error| Halt::Failed(format!("cannot read the provisioner: {error}")))
    }

    // Waiting.

    fn wait_for_replica(&mut self, reports: &Receiver<Report>) -> Result<(), Halt> {
        let mut deadline = None;
        while !self.timeline.is_routable() {
            let pause = if self.timeline.is_handed_over() { HANDOFF_PAUSE } else { LOADING_PAUSE };
            self.turn(reports, pause, true)?;
            if self.timeline.is_handed_over() {
                let deadline = *deadline.get_or_insert(Instant::now() + ROUTABLE_TIMEOUT);
                if Instant::now() > deadline {
                    return Err(Halt::Failed(format!(
                        "{REPLICA} was handed over, but takes no work after {} s",
                        ROUTABLE_TIMEOUT.as_secs()
                    )));
                }
            }
        }
        Ok(())
    }

    /// Shows state changes until somebody ends it.
    fn watch(&mut self, reports: &Receiver<Report>) -> Result<(), Halt> {
        loop {
            self.turn(reports, WATCH_PAUSE, false)?;
        }
    }

    /// Waits for a report, `pause` at most, then looks at everything else.
    fn turn(&mut self, reports: &Receiver<Report>, pause: Duration, starting: bool) -> Result<(), Halt> {
        self.interrupt.check()?;
        match reports.recv_timeout(pause) {
            Ok(report) => {
                self.show_report(&report);
                self.timeline.report(&report);
            }
            Err(RecvTimeoutError::Timeout) => {}
            // It is about to end, and `check` will tell of it.
            Err(RecvTimeoutError::Disconnected) => thread::sleep(DAEMON_PAUSE),
        }
        self.interrupt.check()?;
        self.children.check()?;
        // A daemon that is busy for a moment is asked again in the next turn.
        if let Ok(page) =
            self.orchestratord.get_json::<EventPage>(&format!("/v2/events?since={}", self.next_event))
        {
            self.next_event = page.next;
            for event in page.events {
                self.timeline.event(&event);
                self.show_event(&event, starting);
            }
        }
        Ok(())
    }

    fn show_report(&mut self, report: &Report) {
        match (report.event.as_str(), report.pid) {
            ("spawned", Some(pid)) => {
                self.children.note_engine(pid);
                let program = std::env::current_exe().unwrap_or_default();
                let program = program.file_name().unwrap_or_default();
                let words = self.options.engine_command(program);
                let words: Vec<_> = words.iter().map(|word| word.to_string_lossy()).collect();
                self.screen.line("engine", &format!("started, pid {pid}: {}", words.join(" ")));
            }
            ("healthy", _) => {
                let url = report.url.as_deref().unwrap_or("its URL");
                self.screen.line("engine", &format!("healthy at {url}"));
            }
            ("handoff_written", _) => {
                let path = PathBuf::from(report.path.as_deref().unwrap_or_default());
                let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                self.screen.line("handoff", &format!("written: {name}"));
            }
            _ => {}
        }
    }

    /// While starting, a step is a word; later a change is told with its reason.
    fn show_event(&mut self, event: &Event, starting: bool) {
        let is_step = matches!(event.state.as_str(), "found" | "probing" | "ready" | "routable");
        if self.options.verbose || !starting {
            self.screen.line(&event.kind, &event.text);
        } else if event.is_ours() && is_step {
            // The registry's own words say on which node.
            let told = if event.state == "routable" { format!(" ({})", event.text) } else { String::new() };
            self.screen.line("replica", &format!("{REPLICA} {}{told}", event.state));
        } else if event.kind == "replica" && event.state != "known" || event.state == "refused" {
            self.screen.line(&event.kind, &event.text);
        }
    }

    // Asking.

    fn ask(&mut self) -> Result<(), Halt> {
        let models: Value = self.orchestratord.get_json("/v1/models").unwrap_or_default();
        let model = models["data"][0]["id"].as_str();
        self.screen.blank();
        self.screen.line("prompt", &self.options.prompt);
        let (screen, children, interrupt) = (&mut self.screen, &mut self.children, &self.interrupt);
        let go_on = || {
            interrupt.check()?;
            Ok(children.check()?)
        };
        let asked = Instant::now();
        let answered = client::chat(
            local(self.ports.orchestratord),
            model,
            &self.options.prompt,
            self.options.tokens_max,
            go_on,
            |text| screen.token(text),
        )?;
        self.screen.end_answer();
        self.screen.blank();
        let before = client::nanoseconds(asked - self.started);
        let to_first_token = answered.times.first_token.map(|after| before + after);
        self.screen.table(&self.timeline.rows(&answered.times, to_first_token));
        self.screen.blank();
        let seconds = answered.decoding as f64 / 1e9;
        let rate = match answered.tokens {
            // Between two tokens is one gap.
            tokens @ 2.. if seconds > 0.0 => format!("  ({:.1} a second)", (tokens - 1) as f64 / seconds),
            _ => String::new(),
        };
        self.screen.line("tokens", &format!("{}{rate}", answered.tokens));
        Ok(())
    }

    fn tell_how_to_use(&mut self) {
        let (base, agent) = (format!("http://{}", local(self.ports.orchestratord)), local(self.ports.agent));
        let logs = self.home.path.join("logs").display().to_string();
        self.screen.blank();
        for (subject, text) in [
            ("chat", format!("{base}/v1/chat/completions")),
            ("dashboard", format!("{base}/")),
            ("events", format!("{base}/v2/events")),
            ("metrics", format!("{base}/metrics")),
            ("pool-managerd", format!("http://{agent}/v2/pools")),
            ("handoffs", self.home.path.join("engines").display().to_string()),
            ("logs", logs),
            (
                "try",
                format!(
                    r#"curl -N {base}/v1/chat/completions -H 'Content-Type: application/json' -d '{{"messages":[{{"role":"user","content":"Hello"}}],"stream":true}}'"#
                ),
            ),
        ] {
            self.screen.line(subject, &text);
        }
        self.screen.blank();
        self.screen.line("watching", "state changes appear here; Ctrl-C ends everything");
    }
}

fn local(port: u16) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], port))
}

/// A thread that reads report lines until the provisioner closes them, so that waiting for one can end.
fn read_reports(output: ChildStdout) -> std::io::Result<Receiver<Report>> {
    let (sender, receiver) = sync_channel(REPORTS_MAX);
    thread::Builder::new().name("reports".into()).spawn(move || {
        for line in BufReader::new(output).lines().map_while(Result::ok) {
            if let Ok(report) = serde_json::from_str(&line)
                && sender.send(report).is_err()
            {
                return;
            }
        }
    })?;
    Ok(receiver)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(args: &[&str]) -> Result<Options, Exit> {
        Options::read(args.iter().map(OsString::from).collect())
    }

    #[test]
    fn everything_behind_engine_is_the_engines() {
        let options = read(&["--once", "--engine", "e", "--once=no", "--port", "{port}", "--", "x"])
            .expect("a usable line");
        assert!(options.once && options.port == 0 && options.engine_port.is_none());
        assert_eq!(options.engine, ["e", "--once=no", "--port", "{port}", "--", "x"]);
        let options = read(&["--", "e", "--engine", "{port}"]).expect("a usable line");
        assert_eq!(options.engine, ["e", "--engine", "{port}"]);
        assert!(!options.once && options.port == 8080);
    }

    #[test]
    fn a_port_in_the_engines_command_serves_and_none_is_refused() {
        for (command, port) in [
            (&["e", "--port", "8081"][..], Some(8081)),
            (&["e", "--port=8082"], Some(8082)),
            (&["e", "--port", "{port}"], None),
            (&["sh", "-c", "exec e {port}"], None),
        ] {
            let args = [&["--engine"], command].concat();
            assert_eq!(read(&args).expect("a usable line").engine_port, port, "{command:?}");
        }
        for command in [&["false"][..], &["e", "--port"], &["e", "--port", "0"], &["e", "--port=x"]] {
            let exit = read(&[&["--engine"], command].concat()).err().expect("no port");
            assert!(exit.message.contains("{port}") && exit.message.contains(command[0]), "{exit}");
        }
    }

    #[test]
    fn a_taken_port_is_named_with_what_to_do() {
        let holder = listen(0).expect("a free port");
        let port = holder.local_addr().expect("bound").port();
        let options = read(&["--port", &port.to_string()]).expect("a usable line");
        let exit = options.ports().err().expect("it is taken");
        assert!(
            exit.message.contains(&format!("port {port}")) && exit.message.contains("--port N"),
            "{exit}"
        );
    }
}
