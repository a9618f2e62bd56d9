//! `engine-provisioner build`: an engine's program from its source; prints where it is.

use std::ffi::OsString;
use std::io::IsTerminal;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use signal_hook::consts::{SIGINT, SIGTERM};

use super::{Binary, SourceSpec, Step, provide};
use crate::engine_provisioner::PROGRAM;
use crate::engine_provisioner::models;
use crate::service::logging::{self, LogFormat};
use crate::settings::{Exit, Setting, Settings, boolean, flag};

/// The settings that say what is built.
static TABLE: [Setting; 6] = [
    flag(
        "repository",
        Some("https://github.com/ggml-org/llama.cpp"),
        "URL",
        "Git repository, a URL or a path",
    ),
    flag("ref", Some("master"), "REF", "Branch, tag or commit"),
    flag(
        "cmake-flags",
        None,
        "FLAG,...",
        "Flags for cmake, such as -DGGML_CUDA=ON; also as several --cmake-flags=...",
    ),
    flag("generator", None, "NAME", "cmake's generator, such as Ninja; without it cmake chooses"),
    flag("target", Some("llama-server"), "NAME", "What is built: target and name of the program"),
    flag("submodules", Some("false"), "BOOL", "Fetch submodules too"),
];

/// Everything that it can be told.
fn table() -> &'static [Setting] {
    static ALL: std::sync::OnceLock<Vec<Setting>> = std::sync::OnceLock::new();
    let shared = models::TABLE.iter().filter(|setting| setting.flag == "cache-dir");
    ALL.get_or_init(|| TABLE.iter().chain(shared).copied().collect())
}

/// Runs it: `args` are the words behind `build`.
///
/// # Errors
/// [`Exit`]: 2 for a line that does not parse, 78 for what cannot be built here, 1 for what failed, and
/// 0 with the text of `--help`.
#[allow(clippy::print_stdout, reason = "the answer to the command")]
pub fn run(args: Vec<OsString>) -> Result<(), Exit> {
    let env = |name: &str| std::env::var_os(name);
    let about = "Build an engine from its source; the same commit with the same flags is built once";
    let settings = Settings::read("engine-provisioner build", about, table(), None, args, env)?;
    logging::install("info", LogFormat::Text, PROGRAM, None)?;
    let text = |text: &str| Ok(text.to_string());
    let flags = settings.get("cmake-flags", |text| {
        Ok(text.split(',').map(str::trim).filter(|flag| !flag.is_empty()).map(String::from).collect())
    })?;
    let spec = SourceSpec {
        repository: settings.need("repository", text)?,
        revision: settings.need("ref", text)?,
        cmake_flags: flags.unwrap_or_default(),
        generator: settings.get("generator", text)?,
        target: settings.need("target", text)?,
        submodules: settings.need("submodules", boolean)?,
    };
    let directory = models::cache_directory(&settings, env)?.join("source");
    let cancel = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        let registered = signal_hook::flag::register(signal, Arc::clone(&cancel));
        registered.map_err(|error| Exit::runtime(format!("cannot watch for signals: {error}")))?;
    }
    let mut display = Display::new();
    let program = provide(&Binary::Source(spec), &directory, &env, &cancel, &mut |step| display.show(&step))?;
    display.end();
    println!("{}", program.path.display());
    Ok(())
}

/// Shows the steps of a build: a bar on a terminal, lines in a log.
pub struct Display {
    bar: Option<ProgressBar>,
    quarter: u8,
}

impl Default for Display {
    fn default() -> Display {
        Display::new()
    }
}

impl Display {
    /// A bar where standard error is a terminal, log lines elsewhere.
    #[must_use]
    pub fn new() -> Display {
        let style = ProgressStyle::with_template("{msg} {wide_bar} {pos} % {elapsed}");
        let style = style.unwrap_or_else(|_| ProgressStyle::default_bar());
        let bar = std::io::stderr().is_terminal().then(|| {
            ProgressBar::with_draw_target(Some(100), ProgressDrawTarget::stderr_with_hz(10)).with_style(style)
        });
        Display { bar, quarter: 0 }
    }

    /// Shows a step.
    pub fn show(&mut self, step: &Step<'_>) {
        match (step, &self.bar) {
            (Step::Percent(percent), Some(bar)) => bar.set_position((*percent).into()),
            (Step::Percent(percent), None) if percent / 25 > self.quarter => {
                self.quarter = percent / 25;
                log::info!("built {percent} %");
            }
            (Step::Percent(_), None) => {}
            (Step::Began(name), Some(bar)) => {
                bar.set_position(0);
                bar.set_message((*name).to_string());
            }
            (Step::Began(name), None) => {
                self.quarter = 0;
                log::info!("{name}");
            }
            (Step::Waiting, _) => self.line("another process builds the same: waiting"),
            (Step::Retrying(with), _) => self.line(&format!("it failed: once more with {with}")),
        }
    }

    /// Takes the bar away.
    pub fn end(&self) {
        self.bar.iter().for_each(ProgressBar::finish_and_clear);
    }

    fn line(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.println(text),
            None => log::info!("{text}"),
        }
    }
}
