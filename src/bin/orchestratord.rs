//! The control plane. Everything is in [`llama_orch::orchestratord`].

use std::process::ExitCode;

fn main() -> ExitCode {
    llama_orch::settings::finish(
        "orchestratord",
        llama_orch::orchestratord::run(std::env::args_os().skip(1).collect()),
    )
}
