//! Starts one engine, waits until it is healthy, writes its handoff and stays with it.
//!
//! The handoff file is the product: it appears once the engine answers its health path with 200, by
//! a rename, so that a reader sees all of it or nothing; and it is gone before the engine is told to
//! stop, so that nobody is routed to an engine on its way out. In between this program only waits:
//! for a signal, or for the engine to end by itself, which is a failure.
//!
//! The engine runs in a process group of its own, and the whole group is ended with it: engines are
//! trees of processes whose children keep the GPU when only the parent is killed. Whatever goes
//! wrong, nothing stays behind, neither process nor file. The one exception is a SIGKILL of this
//! program: the engine then serves on, and its handoff names its pid for whoever watches.
//!
//! [`plan`] is pure and holds every rule about the configuration; [`run`](mod@run) does the work.

use std::ffi::OsString;

use crate::settings::{Exit, Settings};

pub mod plan;
pub mod supervision;
pub mod run;

/// Name of the program.
pub const PROGRAM: &str = "engine-provisioner";

/// The program: `args` without its name. Returns when the engine was stopped by a signal.
///
/// # Errors
/// [`Exit`] with code 2 or 78 for what cannot be started as asked, 1 for an engine that failed, and
/// 0 with the text of `--help` or `--version`.
pub fn run(args: Vec<OsString>) -> Result<(), Exit> {
    let settings = Settings::read(
        PROGRAM,
        "Start an inference engine, wait for its health, write its handoff file, and stop it cleanly",
        plan::TABLE,
        Some("COMMAND"),
        args,
        |name| std::env::var_os(name),
    )?;
    let config = plan::Config::from_settings(&settings)?;
    let level = env_logger::Env::default().default_filter_or("info");
    // An error only says that a logger is there already.
    let _ = env_logger::Builder::from_env(level).try_init();
    for note in &settings.notes {
        log::warn!("{note}");
    }
    run::supervise(&config)
}
