//! Starts engines, hands each over once it is healthy, and keeps them.
//!
//! The handoff file is the product: it appears once the engine answers its health path with 200, by
//! a rename, so that a reader sees all of it or nothing; and it is gone before the engine is told to
//! stop, so that nobody is routed to an engine on its way out. An engine that ends or breaks is withdrawn
//! in the same moment and started again, in measure.
//!
//! Each engine runs in a process group of its own, and the whole group is ended with it: engines are
//! trees of processes whose children keep the GPU when only the parent is killed. Even a SIGKILL of this
//! program leaves nothing behind, unless engines are to be taken over by its next start.
//!
//! ```text
//!   run -- CMD          plan ──┐                            ┌── guardian  (ends orphans)
//!   up -c FILE   file, flags ──┼─ preflight ── daemon ──────┼── process, publish, output, kept
//!   plan, check    devices ────┘                 │          └── asking, notify (over net)
//!                           │               supervision
//!                        provide ── models, source
//! ```
//!
//! [`supervision`] decides what becomes of engines, [`plan`], [`mod@file`] and [`flags`] what is started; these,
//! with `asking`, `notify` and `devices`, are pure. `daemon` is the loop that carries out.
//! [`models`] and [`source`] make ready what an engine needs before it can be started: the model, and
//! where it is not installed, the engine's own program.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use crate::service::auth::Scope;
use crate::service::credentials::Credentials;
use crate::service::{logging, machine};
use crate::settings::{Exit, Setting, Settings, flag};
use control::Book;
use daemon::Wish;
use options::Options;
use plan::{Config, Directories, Plan};
use preflight::How;
use provide::{Effort, Provider};

pub mod asking;
mod container;
pub mod control;
mod daemon;
pub mod devices;
pub mod docker_run;
pub mod file;
pub mod flags;
mod gpus;
mod guardian;
mod kept;
pub mod model_ref;
pub mod models;
pub mod notify;
pub mod options;
mod output;
pub mod plan;
mod preflight;
mod process;
mod progress;
mod provide;
mod publish;
pub mod source;
mod steps;
pub mod supervision;

/// Name of the program.
pub const PROGRAM: &str = "engine-provisioner";

/// What `up`, `plan` and `check` take beside the settings of the whole program.
static FILE_TABLE: &[Setting] = &[flag("config", None, "FILE", "File that names the engines, TOML or JSON")];

const USAGE: &str = "Commands:
  run [FLAGS] -- COMMAND...   start one engine and keep it (`run` may be left out)
  up -c FILE                  start and keep the engines of a file; SIGHUP reads it again
  plan -c FILE                show what would be started
  check -c FILE               say whether the file can be used here
  models ACTION               fetch, list and remove models
  build                       build an engine from source

engine-provisioner COMMAND --help names the flags of each.";

/// The program: `args` without its name. Returns when the engines were stopped by a signal.
///
/// # Errors
/// [`Exit`] with code 2 or 78 for what cannot be started as asked, 1 for an engine that failed, and
/// 0 with the text of `--help` or `--version`.
pub fn run(mut args: Vec<OsString>) -> Result<(), Exit> {
    let command = args.first().and_then(|word| word.to_str()).unwrap_or_default().to_string();
    if !command.is_empty() && !command.starts_with('-') {
        args.remove(0);
    }
    match command.as_str() {
        guardian::COMMAND => guardian::run(),
        gpus::COMMAND => gpus::print(),
        "up" | "plan" | "check" => with_file(&command, args),
        "run" => run_one(args),
        "models" => models::command::run(args),
        "build" => source::command::run(args),
        "help" => Err(Exit { code: 0, message: USAGE.into() }),
        word if word.is_empty() || word.starts_with('-') => run_one(args),
        word => Err(Exit::usage(format!("unknown command {word:?}\n{USAGE}"))),
    }
}

fn run_one(args: Vec<OsString>) -> Result<(), Exit> {
    let settings = Settings::read_tables(
        PROGRAM,
        "Start an inference engine, wait for its health, write its handoff file, keep it, and stop it cleanly (`up`, `plan` and `check` do so for a file of many: see `help`)",
        &[plan::RUN_TABLE, options::TABLE, models::TABLE],
        Some("COMMAND"),
        args,
        |name| std::env::var_os(name),
    )?;
    let options = Options::from_settings(&settings, machine::runtime_dir())?;
    let config = Config::from_settings(&settings, &options.directories())?;
    let base = std::env::current_dir().unwrap_or_default();
    keep(&settings, options, move || Ok((vec![config.clone()], base.clone())), true)
}

fn with_file(command: &str, args: Vec<OsString>) -> Result<(), Exit> {
    // The one short flag, and a file without a flag.
    let args = args.into_iter().map(|word| if word == "-c" { "--config".into() } else { word });
    let settings = Settings::read_tables(
        PROGRAM,
        "Start, keep, show or check the engines that a file names",
        &[FILE_TABLE, options::TABLE, models::TABLE],
        None,
        args,
        |name| std::env::var_os(name),
    )?;
    let path = settings
        .get("config", plan::path)?
        .ok_or_else(|| Exit::usage("the file is missing: name it with -c FILE"))?;
    let options = Options::from_settings(&settings, machine::runtime_dir())?;
    let directories = options.directories();
    let read = move || read_file(&path, &directories);
    match command {
        "up" => keep(&settings, options, read, false),
        _ => show(&options, &Provider::from_settings(&settings)?, read()?, command == "plan"),
    }
}

/// The engines of a file, and the directory from which its paths count.
fn read_file(path: &Path, directories: &Directories) -> Result<(Vec<Config>, PathBuf), Exit> {
    let shown = path.display();
    let cannot = |error: std::io::Error| Exit::config(format!("cannot read {shown}: {error}"));
    let text = crate::service::durable::read(path).map_err(cannot)?;
    let text = text.ok_or_else(|| Exit::config(format!("{shown} does not exist: correct -c")))?;
    let is_json = path.extension().is_some_and(|extension| extension == "json");
    let configs = file::read(&text, is_json, directories)
        .map_err(|why| Exit::config(format!("{shown} is not usable: {why}")))?;
    let absolute = std::path::absolute(path).map_err(cannot)?;
    Ok((configs, absolute.parent().unwrap_or(Path::new("/")).to_path_buf()))
}

fn keep(
    settings: &Settings,
    options: Options,
    read: impl Fn() -> Result<(Vec<Config>, PathBuf), Exit> + Send + Sync + 'static,
    replace_all: bool,
) -> Result<(), Exit> {
    let target = env_logger::Target::Pipe(Box::new(progress::AboveRows));
    logging::install_into(target, &options.log_level, options.log_format, PROGRAM, None)?;
    for note in &settings.notes {
        log::warn!("{note}");
    }
    let systemd = std::env::var_os("CREDENTIALS_DIRECTORY");
    let mut notes = Vec::new();
    let credentials = Credentials::read(settings, systemd, &[Scope::Node], &mut notes)?;
    for note in notes {
        log::warn!("{note}");
    }
    let prefix = prefix();
    let (own, words) = (options.clone(), prefix.clone());
    let provider = Provider::from_settings(settings)?;
    let book = Book::new(provider.steps.clone());
    let last: Mutex<Option<(Vec<Config>, PathBuf)>> = Mutex::new(None);
    let prepare = move |wish: &Wish| {
        let known = || last.lock().unwrap_or_else(PoisonError::into_inner);
        let kept = known().clone().filter(|_| wish.is_order);
        let (mut configs, base) = match kept {
            Some(kept) => kept,
            None => read()?,
        };
        let as_read = (configs.clone(), base.clone());
        wish.orders.apply(&mut configs);
        let how = How {
            base: &base,
            prefix: &words,
            is_first: wish.is_first,
            effort: Effort::Get,
            cancel: &wish.cancel,
            on_looked: &*wish.on_looked,
        };
        let mut prepared = preflight::prepare(configs, &own, &provider, how)?;
        *known() = Some(as_read);
        prepared.replace_all = replace_all && !wish.is_order;
        Ok(prepared)
    };
    daemon::run(options, credentials, prefix, Arc::new(prepare), book)
}

/// Words that make this executable an engine-provisioner: `llorch` holds several programs.
fn prefix() -> Vec<OsString> {
    let first = std::env::args_os().nth(1);
    first.filter(|word| word == PROGRAM).into_iter().collect()
}

/// What would be started, or only whether it could be.
#[allow(clippy::print_stdout, reason = "the command's job is to print")]
fn show(
    options: &Options,
    provider: &Provider,
    read: (Vec<Config>, PathBuf),
    in_full: bool,
) -> Result<(), Exit> {
    let ((configs, base), prefix) = (read, prefix());
    let cancel = Arc::default();
    let how = How {
        base: &base,
        prefix: &prefix,
        is_first: true,
        effort: Effort::Look,
        cancel: &cancel,
        on_looked: &|| (),
    };
    let mut prepared = preflight::prepare(configs, options, provider, how)?;
    for config in &mut prepared.configs {
        if let (Some(source), true) = (&config.source, in_full) {
            println!("{}\n  program   built from {} of {}", config.key(), source.revision, source.repository);
            config.program = Some("BINARY".into());
        }
        let is_open = config.model_file.is_none();
        if let Some(model) = config.model.as_ref().filter(|model| is_open && model_ref::is_reference(model)) {
            println!("{}: {model} is not here yet: it is fetched at the start", config.key());
        }
        if in_full {
            // Free ports are chosen at the start; until then nobody can say more.
            let plan = Plan::new(config, config.port.max(1))?;
            let port = |text: String| match config.port {
                0 => text.replace("127.0.0.1:1/", "127.0.0.1:PORT/"),
                _ => text,
            };
            let words = plan.command.iter().zip(&config.command).map(|(word, template)| {
                let has_port = config.port == 0 && template.to_string_lossy().contains("{port}");
                if has_port {
                    template.to_string_lossy().replace("{port}", "PORT")
                } else {
                    word.to_string_lossy().into_owned()
                }
            });
            println!("{}", config.key());
            println!("  command   {}", words.collect::<Vec<_>>().join(" "));
            for (name, value) in &plan.env {
                println!("  variable  {name}={value}");
            }
            println!("  health    {} within {} s", port(plan.health_url), config.start_ms() / 1_000);
            if let Some((path, bytes)) = &config.model_file {
                println!("  model     {} ({bytes} bytes)", path.display());
            }
            println!("  handoff   {}", plan.handoff_file.display());
            println!("  output    {}", config.log_file.display());
        }
    }
    if !in_full {
        println!("{} engines can be started", prepared.configs.len());
    }
    Ok(())
}
