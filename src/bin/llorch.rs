//! The operator's command, and every program in one binary: `up` starts the daemons as children of its
//! own kind, so that one build is enough to run it.

use llama_orch::{cli, engine_provisioner, orchestratord, pool_managerd, settings};

const MODELS: cli::Beside = cli::Beside {
    name: "models",
    about: "Fetch, list and remove the models of this machine",
    run: engine_provisioner::models::command::run,
};

fn main() -> std::process::ExitCode {
    let mut args = std::env::args_os().skip(1);
    let command = args.next().unwrap_or_default();
    let args = args.collect();
    cli::up::end_with_parent();
    let (program, ended) = match command.to_str() {
        Some("orchestratord") => ("orchestratord", orchestratord::run(args)),
        Some("pool-managerd") => ("pool-managerd", pool_managerd::run(args)),
        Some("engine-provisioner") => ("engine-provisioner", engine_provisioner::run(args)),
        _ => ("llorch", cli::run(&command, args, &[MODELS])),
    };
    settings::finish(program, ended)
}
