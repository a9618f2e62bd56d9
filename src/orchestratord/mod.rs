//! The control plane: which engines are there, on this machine or on many, and which one takes the
//! next request?
//!
//! [`core`] decides with the help of its pure neighbours: [`service_registry`] (nodes, leases, slots),
//! [`placement`] and [`affinity`] (where), [`admission`] (who waits), [`refusal`] (how to say no). Two
//! front doors turn HTTP into asks: [`openai`], which reads bodies through [`peek`] and knows [`aliases`],
//! and [`tasks`]. [`forecast`] says when a waiting request may start, [`sessions`] records which requests
//! belong together, and [`served_sessions`] where the next of them should go. [`explain`] remembers why
//! requests went where they went, [`pages`] shows nodes and pools, [`catalog`] models, [`meta`] what can be
//! asked; [`pool_orders`] go to agents, and [`workers`] come without one. [`daemon`] does what was decided.

use std::ffi::OsString;

use crate::settings::Exit;

pub mod admission;
pub mod affinity;
pub mod aliases;
pub mod api;
pub mod blame;
pub mod catalog;
pub mod cohorts;
pub mod config;
pub mod core;
pub mod daemon;
pub mod dashboard;
pub mod direct;
pub mod drain_rate;
pub mod drains;
pub mod envelope;
pub mod explain;
pub mod forecast;
pub mod messages;
pub mod meta;
pub mod meters;
pub mod model_sets;
pub mod openai;
pub mod pages;
pub mod patience;
pub mod peek;
pub mod placement;
pub mod placement_index;
pub mod poller;
pub mod pool_orders;
pub mod refusal;
pub mod replica_table;
pub mod report;
pub mod ring;
pub mod saved;
pub mod served_sessions;
pub mod service_registry;
pub mod sessions;
mod status;
pub mod tables;
pub mod tasks;
pub mod workers;

/// Runs the daemon until a signal ends it.
///
/// # Errors
/// [`Exit`] with the code and the last words of a failure, `--help` included.
pub fn run(args: Vec<OsString>) -> Result<(), Exit> {
    let config = config::Config::read(args, |name| std::env::var_os(name))?;
    if config.check_only {
        return Err(Exit::checked(&config.notes));
    }
    crate::service::logging::install(&config.log_level, config.log_format, "orchestratord", None)?;
    daemon::Daemon::start(config)?.run()
}
