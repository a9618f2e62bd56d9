//! The operator's command, which can also be each of the daemons: `llorch up` starts itself as them, so
//! that one binary is enough. Everything is in [`llama_orch::cli`].

use std::process::ExitCode;

use llama_orch::{cli, engine_provisioner, orchestratord, pool_managerd, settings};

fn main() -> ExitCode {
    let mut args = std::env::args_os().skip(1);
    let command = args.next().map(|command| command.to_string_lossy().into_owned());
    let args = args.collect();
    match command.as_deref() {
        Some("orchestratord") => settings::finish("orchestratord", orchestratord::run(args)),
        Some("pool-managerd") => settings::finish("pool-managerd", pool_managerd::run(args)),
        Some("engine-provisioner") => settings::finish("engine-provisioner", engine_provisioner::run(args)),
        command => settings::finish("llorch", cli::run(command, args)),
    }
}
