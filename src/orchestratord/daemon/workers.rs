//! The shell's part of workers: who registers them, and what they are told.

use std::net::SocketAddr;

use super::{Daemon, engine_rules};
use crate::orchestratord::config::Config;
use crate::orchestratord::core::{Core, Input};
use crate::orchestratord::workers::{self, WorkerOrder};
use crate::reactor::token::Token;
use crate::service::auth::Fingerprint;
use crate::settings::Exit;
use crate::time::Now;
use crate::wire::certificate::Certificate;
use crate::wire::id::NodeId;

/// Name of the node that workers are of where this process has no engines of its own.
const WORKERS_NODE: &str = "workers";

/// Lets workers register in every profile.
pub(super) fn accept(core: &mut Core, config: &Config, bound: SocketAddr, now: Now) -> Result<(), Exit> {
    let node = NodeId::new(WORKERS_NODE).map_err(|error| Exit::runtime(error.to_string()))?;
    core.accept_workers(node, engine_rules(config, bound), config.hang_suspect_ms, now);
    Ok(())
}

impl Daemon {
    /// Carries out an order about a worker and answers whoever gave it.
    pub(super) fn worker(&mut self, client: Token, order: WorkerOrder, key: Option<Fingerprint>, now: Now) {
        let certificate = self.net.client_certificate(client).and_then(Certificate::read);
        let names = certificate.map(|certificate| certificate.names.join(", "));
        let identity = names.or(key.map(|key| format!("token {key}")));
        self.core.handle(Input::Worker(order.clone()), now, &mut self.effects);
        self.net.respond(client, &workers::done(&order, identity), now.mono);
    }
}
