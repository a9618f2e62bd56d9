//! The node agent. Everything is in [`llama_orch::pool_managerd`].

use std::process::ExitCode;

fn main() -> ExitCode {
    llama_orch::settings::finish(
        "pool-managerd",
        llama_orch::pool_managerd::run(std::env::args_os().skip(1).collect()),
    )
}
