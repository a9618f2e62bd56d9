//! `llorch up`: the whole road on one machine, from nothing to streamed tokens.
//!
//! It starts itself as `orchestratord`, `pool-managerd` and `engine-provisioner` (HOME profile), follows
//! the control plane's events until the engine is routable, asks one question, and shows what came and
//! how long each stretch of the road took. With `--once` that is all; otherwise it stays, shows state
//! changes, and ends everything at Ctrl-C. Whatever happens, no process and no temporary directory is
//! left: [`home::Home`] owns them.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::settings::{Exit, Setting, Settings, boolean, number};

mod ask;
mod home;

use ask::Streamed;
use home::Home;

/// Exit code of a program that Ctrl-C ended before it was done.
const EXIT_INTERRUPTED: u8 = 130;
/// How long the daemons may take to answer.
const DAEMONS_WAIT: Duration = Duration::from_secs(5);
/// How often state changes are asked for while nothing is measured.
const WATCH_PAUSE: Duration = Duration::from_millis(250);
/// How often they are asked for while the road is measured; event times do not depend on it.
const MEASURE_PAUSE: Duration = Duration::from_millis(1);
/// The replica that `up` starts.
const REPLICA: &str = "pool-0/r0";

static TABLE: &[Setting] = &[
    Setting {
        flag: "once",
        env: "",
        aliases: &[],
        default: Some("false"),
        value: "BOOL",
        help: "Answer one request, show what was measured, end everything",
    },
    Setting {
        flag: "dir",
        env: "",
        aliases: &[],
        default: None,
        value: "DIR",
        help: "Where handoffs, state and logs go; a temporary directory if absent",
    },
    Setting {
        flag: "port",
        env: "",
        aliases: &[],
        default: None,
        value: "PORT",
        help: "Port of orchestratord; 8080 if absent, a free one with --once",
    },
    Setting {
        flag: "slots",
        env: "",
        aliases: &[],
        default: Some("4"),
        value: "COUNT",
        help: "Requests that the engine serves at once; 1 to 1024",
    },
    Setting {
        flag: "prompt",
        env: "",
        aliases: &[],
        default: Some("Tell me how a handoff file becomes streamed tokens"),
        value: "TEXT",
        help: "What to ask",
    },
    Setting {
        flag: "max-tokens",
        env: "",
        aliases: &[],
        default: Some("24"),
        value: "COUNT",
        help: "Longest answer, in tokens; 1 to 100000",
    },
    Setting {
        flag: "engine-wait-secs",
        env: "",
        aliases: &[],
        default: Some("600"),
        value: "SECS",
        help: "How long the engine may take to load; 1 to 86400",
    },
];

/// The command line, checked.
struct Options {
    once: bool,
    dir: Option<PathBuf>,
    port: Option<u16>,
    slots: u32,
    prompt: String,
    max_tokens: u32,
    engine_wait: Duration,
    /// The engine's command; empty for the demonstration engine.
    engine: Vec<OsString>,
}

/// Runs `llorch up`.
///
/// # Errors
/// [`Exit`]: what failed, and where the log is.
pub fn run(args: Vec<OsString>) -> Result<(), Exit> {
    let options = read(args)?;
    let interrupted = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        signal_hook::flag::register(signal, interrupted.clone())
            .map_err(|error| Exit::runtime(format!("cannot watch for signals: {error}")))?;
    }
    let mut home = Home::new(options.dir.clone(), interrupted.clone())?;
    let done = road(&options, &mut home);
    let stopped = interrupted.load(Ordering::Relaxed);
    if done.is_err() && !stopped {
        home.keep_directory();
    }
    if !options.once && stopped {
        print("\nending every process\n");
    }
    home.end();
    match done {
        _ if stopped && options.once => Err(Exit { code: EXIT_INTERRUPTED, message: "interrupted".into() }),
        _ if stopped => Ok(()),
        done => done,
    }
}

fn read(args: Vec<OsString>) -> Result<Options, Exit> {
    // `--engine CMD...` reads better than a bare `--` and means the same.
    let mut words = args;
    if let Some(at) = words.iter().position(|word| word == "--engine" || word == "--") {
        words[at] = "--".into();
    }
    let about = "Starts the whole road on this machine: control plane, node agent and an engine";
    let settings = Settings::read("llorch up", about, TABLE, Some("ENGINE"), words, |_| None)?;
    let small = |flag, max| settings.need(flag, number(1, max)).map(|n| u32::try_from(n).unwrap_or(u32::MAX));
    let port = settings.get("port", number(1, 65_535))?;
    Ok(Options {
        once: settings.need("once", boolean)?,
        dir: settings.get("dir", |text| Ok(PathBuf::from(text)))?,
        port: port.and_then(|port| u16::try_from(port).ok()),
        slots: small("slots", 1024)?,
        prompt: settings.need("prompt", |text| Ok(text.to_string()))?,
        max_tokens: small("max-tokens", 100_000)?,
        engine_wait: Duration::from_secs(settings.need("engine-wait-secs", number(1, 86_400))?),
        engine: settings.rest,
    })
}

/// Times of the road, in nanoseconds since the Unix epoch, as they become known.
#[derive(Default)]
struct Marks {
    spawned: Option<u64>,
    healthy: Option<u64>,
    written: Option<u64>,
    seen: Option<u64>,
    ready: Option<u64>,
    routable: Option<u64>,
}

fn road(options: &Options, home: &mut Home) -> Result<(), Exit> {
    let started = Instant::now();
    let (control, agent) = home.start_daemons(options.once, options.port, DAEMONS_WAIT)?;
    let daemons_ms = started.elapsed().as_secs_f64() * 1e3;
    say("orchestratord", &format!("answers on http://127.0.0.1:{control}"));
    say("pool-managerd", &format!("answers on http://127.0.0.1:{agent}"));
    if options.engine.is_empty() {
        say("engine", "demonstration engine: words made from the prompt, no model");
    }
    home.start_engine(&options.engine, options.slots, options.engine_wait)?;

    let mut marks = Marks::default();
    let mut next_event = 0;
    let deadline = Instant::now() + options.engine_wait + DAEMONS_WAIT;
    while marks.routable.is_none() {
        follow(home, control, &mut next_event, &mut marks)?;
        if Instant::now() > deadline {
            return Err(home.failure("the engine did not become routable in time"));
        }
        home.pause(MEASURE_PAUSE)?;
    }

    let streamed = ask(options, home, control)?;
    table(&marks, daemons_ms, &streamed);
    if options.once {
        return Ok(());
    }
    print("\n");
    say("chat", &format!("http://127.0.0.1:{control}/v1/chat/completions"));
    say("look", &format!("http://127.0.0.1:{control}/v2/pools  http://127.0.0.1:{agent}/v2/handoffs"));
    say("events", &format!("http://127.0.0.1:{control}/v2/events"));
    say("metrics", &format!("http://127.0.0.1:{control}/metrics  http://127.0.0.1:{agent}/metrics"));
    say("handoffs", &home.engines().display().to_string());
    say(
        "try",
        &format!(
            "curl -N http://127.0.0.1:{control}/v1/chat/completions -d '{{\"messages\":[{{\"role\":\"user\",\"content\":\"Hello\"}}],\"stream\":true}}'"
        ),
    );
    say("", "state changes follow; Ctrl-C ends everything");
    loop {
        follow(home, control, &mut next_event, &mut marks)?;
        home.pause(WATCH_PAUSE)?;
    }
}

/// Shows what happened since the last call, and notes when.
fn follow(home: &mut Home, control: u16, next_event: &mut u64, marks: &mut Marks) -> Result<(), Exit> {
    for line in home.engine_reports() {
        let at = line["at_ns"].as_u64();
        match line["event"].as_str() {
            Some("spawned") => {
                marks.spawned = at;
                say("engine", &format!("started, pid {}", line["pid"]));
            }
            Some("healthy") => {
                marks.healthy = at;
                say("engine", &format!("answers on {}", line["url"].as_str().unwrap_or_default()));
            }
            Some("handoff_written") => {
                marks.written = at;
                say("handoff", &format!("written: {}", line["path"].as_str().unwrap_or_default()));
            }
            Some("stopped") => say("engine", "stopped"),
            _ => {}
        }
    }
    home.check_children()?;
    let Some(answer) = ask::get(control, &format!("/v2/events?since={next_event}")) else { return Ok(()) };
    for event in answer["events"].as_array().into_iter().flatten() {
        let (subject, state) =
            (event["subject"].as_str().unwrap_or_default(), event["state"].as_str().unwrap_or_default());
        let local = subject == REPLICA;
        let mark = match state {
            "found" if local => &mut marks.seen,
            "ready" if local => &mut marks.ready,
            "routable" if subject.ends_with(REPLICA) => &mut marks.routable,
            _ => &mut None,
        };
        *mark = mark.or(event["at_ns"].as_u64());
        if event["kind"] != "node" {
            say(event["kind"].as_str().unwrap_or_default(), event["text"].as_str().unwrap_or_default());
        }
    }
    *next_event = answer["next"].as_u64().unwrap_or(*next_event);
    Ok(())
}

/// Asks the question and prints the answer as it comes.
fn ask(options: &Options, home: &Home, control: u16) -> Result<Streamed, Exit> {
    let mut body = json!({
        "messages": [{"role": "user", "content": options.prompt}],
        "stream": true,
        "max_tokens": options.max_tokens,
    });
    let models = ask::get(control, "/v1/models").unwrap_or(Value::Null);
    if let Some(model) = models["data"][0]["id"].as_str() {
        body["model"] = json!(model);
    }
    say("question", &options.prompt);
    print(&format!("{:<14} ", "answer"));
    let streamed = ask::stream(control, &body.to_string(), home.interrupted(), print);
    print("\n");
    streamed.map_err(|error| home.failure(&format!("the request failed: {error}")))
}

fn table(marks: &Marks, daemons_ms: f64, streamed: &Streamed) {
    let between = |from: Option<u64>, to: Option<u64>| match (from, to) {
        (Some(from), Some(to)) => format!("{:10.3} ms", (to as f64 - from as f64) / 1e6),
        _ => format!("{:>13}", "not seen"),
    };
    let ms = |value: f64| format!("{value:10.3} ms");
    let rows = [
        ("daemons started -> answering", ms(daemons_ms)),
        ("engine spawned -> healthy", between(marks.spawned, marks.healthy)),
        ("handoff written -> seen", between(marks.written, marks.seen)),
        ("seen -> ready", between(marks.seen, marks.ready)),
        ("ready -> routable", between(marks.ready, marks.routable)),
        ("request -> first byte", ms(streamed.first_byte_ms)),
        ("first byte -> last", ms(streamed.last_byte_ms - streamed.first_byte_ms)),
    ];
    let mut text = String::from("\nmeasured\n");
    for (name, value) in rows {
        let _ = writeln!(text, "  {name:<30} {value}");
    }
    let seconds = (streamed.last_byte_ms - streamed.first_byte_ms) / 1e3;
    let rate = if seconds > 0.0 { streamed.tokens as f64 / seconds } else { 0.0 };
    let _ = writeln!(text, "  {:<30} {:10} ({rate:.0} a second)", "tokens", streamed.tokens);
    print(&text);
}

fn say(what: &str, text: &str) {
    print(&format!("{what:<14} {text}\n"));
}

#[allow(clippy::print_stdout, reason = "showing what happens is this command's job")]
fn print(text: &str) {
    print!("{text}");
    // Tokens are to be seen as they come. A closed terminal is no reason to leave processes behind.
    let _ = std::io::stdout().flush();
}
