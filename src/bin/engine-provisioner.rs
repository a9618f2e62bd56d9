//! Starts one engine and hands it over. Everything is in [`llama_orch::engine_provisioner`].

use std::process::ExitCode;

use llama_orch::engine_provisioner::{PROGRAM, run};

fn main() -> ExitCode {
    llama_orch::settings::finish(PROGRAM, run(std::env::args_os().skip(1).collect()))
}
