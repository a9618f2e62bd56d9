//! The operator's command, `llorch`: one file a subcommand.
//!
//! Nothing here decides anything about engines or requests: a subcommand starts processes, asks the
//! daemons over HTTP what they know, and shows it.

use std::ffi::{OsStr, OsString};

use crate::settings::Exit;

pub mod demo_engine;
pub mod up;

const HELP: &str = concat!(
    "llorch ",
    env!("CARGO_PKG_VERSION"),
    ": the operator's command of llama-orch

Usage: llorch COMMAND [OPTIONS]

Commands:
  up           Start everything on this machine with one engine, ask it, show what happens
  models       Fetch, list and remove the models of this machine
  demo-engine  Serve as a demonstration engine: llama-server's API without a model

`llorch COMMAND --help` tells the options of a command, `llorch --version` the version."
);

/// Runs the subcommand `command`; `args` are the words behind it.
///
/// # Errors
/// [`Exit`] of the subcommand; with code 2 for a word that is none, and 0 with the text of `--help`
/// or `--version`.
pub fn run(command: &OsStr, args: Vec<OsString>) -> Result<(), Exit> {
    let text = |message: &str| Err(Exit { code: 0, message: message.to_string() });
    match command.to_string_lossy().as_ref() {
        "up" => up::run(args),
        "demo-engine" => demo_engine::run(args),
        "--help" | "-h" | "help" => text(HELP),
        "--version" | "-V" => text(concat!("llorch ", env!("CARGO_PKG_VERSION"))),
        "" => Err(Exit::usage("a command is missing: up or demo-engine (llorch --help tells more)")),
        other => Err(Exit::usage(format!(
            "{other:?} is no command: there are up and demo-engine (llorch --help tells more)"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::EXIT_USAGE;

    #[test]
    fn a_word_that_is_no_command_is_answered_with_those_that_are() {
        for word in ["", "upp", "--once"] {
            let exit = run(OsStr::new(word), Vec::new()).expect_err("no command");
            assert_eq!(exit.code, EXIT_USAGE);
            assert!(exit.message.contains("up") && exit.message.contains("demo-engine"), "{exit}");
            assert_eq!(exit.message.lines().count(), 1, "{exit}");
        }
    }

    #[test]
    fn help_names_the_commands_and_the_version() {
        let exit = run(OsStr::new("--help"), Vec::new()).expect_err("help ends the program");
        assert_eq!(exit.code, 0);
        for part in ["  up ", "  demo-engine ", env!("CARGO_PKG_VERSION")] {
            assert!(exit.message.contains(part), "{part}: {exit}");
        }
    }
}
