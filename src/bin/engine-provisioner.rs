//! Starts one engine and hands it over: see `llama_orch::engine_provisioner`.

use std::process::ExitCode;

#[allow(clippy::print_stdout, clippy::print_stderr, reason = "a command's last words are its job")]
fn main() -> ExitCode {
    let Err(exit) = llama_orch::engine_provisioner::run(std::env::args_os().skip(1).collect()) else {
        return ExitCode::SUCCESS;
    };
    match exit.code {
        0 => println!("{exit}"),
        _ => eprintln!("{}: {exit}", llama_orch::engine_provisioner::PROGRAM),
    }
    ExitCode::from(exit.code)
}
