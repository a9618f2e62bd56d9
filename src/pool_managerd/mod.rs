//! The node agent: what engines are on this machine, and are they alive? It tells every control plane
//! and relays their requests to engines that listen on this machine only.
//!
//! [`core`] decides, [`daemon`] does. Below them: [`crate::replicas`] (the directory and the probes),
//! [`gpus`] (which GPUs there are and what breaks on them) and [`membership`] (registration and
//! heartbeats); beside them [`operations`] (drains, as operators ask for them), [`callbacks`] (who is told
//! when a replica becomes ready) and [`saved`] (what outlives a restart).

use std::ffi::OsString;

use crate::settings::Exit;

pub mod api;
mod callback_client;
pub mod callbacks;
pub mod config;
pub(crate) mod control_client;
pub mod core;
pub mod daemon;
mod gpu_reader;
pub mod gpus;
pub mod membership;
pub mod operations;
mod provisioner_client;
pub mod saved;
mod status;

/// Runs the daemon until a signal ends it.
///
/// # Errors
/// [`Exit`] with the code and the last words of a failure, `--help` included.
pub fn run(args: Vec<OsString>) -> Result<(), Exit> {
    let config = config::Config::read(args, |name| std::env::var_os(name))?;
    if config.check_only {
        return Err(Exit::checked(&config.notes));
    }
    let node = Some(config.node_id.as_str());
    crate::service::logging::install(&config.log_level, config.log_format, "pool-managerd", node)?;
    daemon::Daemon::start(config)?.run()
}
