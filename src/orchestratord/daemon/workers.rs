//! The shell's part of workers: who registers them, and what they are told.

use std::net::SocketAddr;

use super::{Daemon, engine_rules};
use crate::orchestratord::config::Config;
use crate::orchestratord::core::{Core, Input};
use crate::orchestratord::refusal::Refusal;
use crate::orchestratord::workers::{self, WorkerOrder};
use crate::reactor::token::Token;
use crate::service::auth::Fingerprint;
use crate::settings::Exit;
use crate::time::Now;
use crate::wire::certificate::Certificate;
use crate::wire::id::{NodeId, ReplicaKey};

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
        let response = match order {
            WorkerOrder::Join(worker) if !self.has_worker(&worker.key()) => {
                self.core.handle(Input::Worker(WorkerOrder::Leave(worker.key())), now, &mut self.effects);
                let why = "as many nodes, pools or replicas as may be are known".into();
                Refusal::Overloaded(why).response(false)
            }
            order => workers::done(&order, identity),
        };
        self.net.respond(client, &response, now.mono);
    }

    /// Whether a worker has found room among all that is known.
    fn has_worker(&self, key: &ReplicaKey) -> bool {
        let registry = self.core.registry();
        let node = self.core.local_node().and_then(|node| registry.node(node));
        let mut replicas = node.into_iter().flat_map(|node| registry.replicas_of(node));
        replicas.any(|replica| registry.replica(replica).is_some_and(|replica| replica.key == *key))
    }
}
