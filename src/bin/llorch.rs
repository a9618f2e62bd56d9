//! The operator's command: see `llama_orch::cli`.

use std::process::ExitCode;

use llama_orch::cli;
use llama_orch::settings::Exit;

#[allow(clippy::print_stdout, clippy::print_stderr, reason = "a command's last words are its job")]
fn main() -> ExitCode {
    let mut args = std::env::args_os().skip(1);
    let ended = match args.next().as_deref().and_then(|command| command.to_str()) {
        Some("demo-engine") => cli::demo_engine::run(args.collect()),
        _ => Err(Exit::usage("usage: llorch demo-engine --port PORT [--help]")),
    };
    let Err(exit) = ended else { return ExitCode::SUCCESS };
    match exit.code {
        0 => println!("{exit}"),
        _ => eprintln!("llorch: {exit}"),
    }
    ExitCode::from(exit.code)
}
