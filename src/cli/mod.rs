//! The operator's command, `llorch`: one file a subcommand, or two that belong together.
//!
//! Nothing here decides anything about engines or requests: a subcommand starts processes, writes and
//! checks files, asks the daemons over HTTP what they know, and shows it. `COMMANDS` is the list of them,
//! from which help and completions are made. What they share: `remote` asks a daemon, `terminal` and `table`
//! show what it said.
//!
//! Exit codes are for scripts: 0 fine, 1 failed, 2 the command line is wrong, 3 what was named is not there,
//! 4 nobody answers, 5 refused (for lack of a token too), 78 a variable or a configuration is wrong.

use std::ffi::{OsStr, OsString};

use crate::settings::{Exit, Setting, Words, command};

mod adopt;
mod adopt_process;
mod check;
pub mod demo_engine;
mod drain;
mod events;
mod explain;
pub mod remote;
mod status;
mod table;
mod terminal;
mod token;
pub mod up;

/// A subcommand.
struct Subcommand {
    name: &'static str,
    about: &'static str,
    table: &'static [Setting],
    words: Words,
    run: fn(Vec<OsString>) -> Result<(), Exit>,
}

/// A command that belongs to one of the programs, and that `llorch` has too.
pub struct Beside {
    /// Its name.
    pub name: &'static str,
    /// What it does, for the help.
    pub about: &'static str,
    /// Runs it.
    pub run: fn(Vec<OsString>) -> Result<(), Exit>,
}

const fn subcommand(
    name: &'static str,
    about: &'static str,
    table: &'static [Setting],
    words: Words,
    run: fn(Vec<OsString>) -> Result<(), Exit>,
) -> Subcommand {
    Subcommand { name, about, table, words, run }
}

/// All of them, in the order of the help.
static COMMANDS: &[Subcommand] = &[
    subcommand(
        "up",
        "Start everything on this machine with one engine, ask it, show what happens",
        up::TABLE,
        Words::Behind("COMMAND"),
        up::run,
    ),
    subcommand("status", status::ABOUT, status::TABLE, Words::None, status::run),
    subcommand("adopt", adopt::ADOPT_ABOUT, adopt::ADOPT_TABLE, adopt::ENGINE, adopt::run_adopt),
    subcommand("withdraw", adopt::WITHDRAW_ABOUT, adopt::WITHDRAW_TABLE, adopt::REPLICA, adopt::run_withdraw),
    subcommand("check", check::ABOUT, check::TABLE, check::PATH, check::run),
    subcommand("drain", drain::DRAIN_ABOUT, drain::DRAIN_TABLE, drain::SCOPE, drain::run_drain),
    subcommand("resume", drain::RESUME_ABOUT, drain::RESUME_TABLE, drain::SCOPE, drain::run_resume),
    subcommand("explain", explain::ABOUT, explain::TABLE, explain::ID, explain::run),
    subcommand("events", events::ABOUT, events::TABLE, Words::None, events::run),
    subcommand("token", token::TOKEN_ABOUT, token::TABLE, token::NEW, token::run_token),
    subcommand(
        "demo-engine",
        "Serve as a demonstration engine: llama-server's API without a model",
        demo_engine::TABLE,
        Words::None,
        demo_engine::run,
    ),
];

/// Runs the subcommand `command`; `args` are the words behind it.
///
/// # Errors
/// [`Exit`] of the subcommand; with code 2 for a word that is none, and 0 with the text of `--help`
/// or `--version`.
pub fn run(command: &OsStr, args: Vec<OsString>, beside: &[Beside]) -> Result<(), Exit> {
    let text = |message: String| Err(Exit { code: 0, message });
    let name = command.to_string_lossy();
    if let Some(known) = COMMANDS.iter().find(|known| known.name == name) {
        return (known.run)(args);
    }
    if let Some(known) = beside.iter().find(|known| known.name == name) {
        return (known.run)(args);
    }
    if name == "completions" {
        return run_completions(args, beside);
    }
    match name.as_ref() {
        "--help" | "-h" | "help" => text(help(beside)),
        "--version" | "-V" => text(concat!("llorch ", env!("CARGO_PKG_VERSION")).to_string()),
        "" => Err(Exit::usage(format!("a command is missing: {} (llorch --help tells more)", names(beside)))),
        other => Err(Exit::usage(format!(
            "{other:?} is no command: there are {} (llorch --help tells more)",
            names(beside)
        ))),
    }
}

/// Every command and what it does, in the order of the help.
fn listed(beside: &[Beside]) -> Vec<(&'static str, &'static str)> {
    let own = COMMANDS.iter().map(|known| (known.name, known.about));
    let completions = std::iter::once(("completions", token::COMPLETIONS_ABOUT));
    own.chain(beside.iter().map(|known| (known.name, known.about))).chain(completions).collect()
}

fn names(beside: &[Beside]) -> String {
    let names: Vec<&str> = listed(beside).iter().map(|(name, _)| *name).collect();
    match names.split_last() {
        Some((last, others)) => format!("{} and {last}", others.join(", ")),
        None => String::new(),
    }
}

fn help(beside: &[Beside]) -> String {
    let mut text = concat!(
        "llorch ",
        env!("CARGO_PKG_VERSION"),
        ": the operator's command of llama-orch\n\nUsage: llorch COMMAND [OPTIONS]\n\nCommands:\n"
    )
    .to_string();
    let listed = listed(beside);
    let width = listed.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    for (name, about) in listed {
        text.push_str(&format!("  {name:width$}  {about}\n"));
    }
    text.push_str(
        "\nExit codes: 0 fine, 1 failed, 2 usage, 3 not found, 4 unreachable, 5 refused, 78 configuration.\n\
         `llorch COMMAND --help` tells the options of a command, `llorch --version` the version.",
    );
    text
}

fn run_completions(args: Vec<OsString>, beside: &[Beside]) -> Result<(), Exit> {
    let mut whole = clap::Command::new("llorch")
        .about("The operator's command of llama-orch")
        .version(env!("CARGO_PKG_VERSION"));
    for known in COMMANDS {
        whole = whole.subcommand(command(known.name, known.about, known.table, known.words));
    }
    for known in beside {
        whole = whole.subcommand(clap::Command::new(known.name).about(known.about));
    }
    let shells = ["bash", "elvish", "fish", "powershell", "zsh"];
    let own = command("completions", token::COMPLETIONS_ABOUT, token::TABLE, token::SHELL);
    whole = whole.subcommand(own.mut_arg("rest", |arg| arg.value_parser(shells)));
    token::run_completions(whole, args)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::EXIT_USAGE;

    #[test]
    fn a_word_that_is_no_command_is_answered_with_those_that_are() {
        for word in ["", "upp", "--once"] {
            let exit = run(OsStr::new(word), Vec::new(), &[]).expect_err("no command");
            assert_eq!(exit.code, EXIT_USAGE);
            assert!(exit.message.contains("up") && exit.message.contains("demo-engine"), "{exit}");
            assert_eq!(exit.message.lines().count(), 1, "{exit}");
        }
    }

    #[test]
    fn help_names_the_commands_and_the_version() {
        let exit = run(OsStr::new("--help"), Vec::new(), &[]).expect_err("help ends the program");
        assert_eq!(exit.code, 0);
        for part in ["  up ", "  status ", "  demo-engine ", env!("CARGO_PKG_VERSION")] {
            assert!(exit.message.contains(part), "{part}: {exit}");
        }
    }
}
