//! The operator's command, one file a subcommand.

use std::ffi::OsString;

use crate::settings::Exit;

pub mod demo_engine;
pub mod up;

/// What `llorch --help` says.
pub const HELP: &str = "\
The operator's command of llama-orch

Usage: llorch COMMAND [OPTIONS]

Commands:
  up           Start everything on this machine and answer a request; --once measures and ends
  demo-engine  A demonstration engine: words made from the prompt, no model

`llorch COMMAND --help` tells a command's options. `llorch --version` tells the version.";

/// Runs a command that belongs to this room, or says which ones there are.
///
/// # Errors
/// [`Exit`], also for `--help` and `--version`.
pub fn run(command: Option<&str>, args: Vec<OsString>) -> Result<(), Exit> {
    match command {
        Some("up") => up::run(args),
        Some("demo-engine") => demo_engine::run(args),
        Some("--help" | "-h" | "help") => Err(Exit { code: 0, message: HELP.into() }),
        Some("--version" | "-V") => {
            Err(Exit { code: 0, message: concat!("llorch ", env!("CARGO_PKG_VERSION")).into() })
        }
        Some(other) => {
            Err(Exit::usage(format!("{other:?} is no command: use up or demo-engine; --help tells more")))
        }
        None => Err(Exit::usage("a command is missing: use up or demo-engine; --help tells more")),
    }
}
