//! Which of the addresses that nodes name this process may dial, and how an engine is reached.
//!
//! A node says where its agent and its engines are. It must not make the control plane ask a metadata
//! service, or itself. What is refused here is refused whatever is configured; a name is judged again
//! when it has been resolved.

use crate::replicas::EnginePolicy;
use crate::wire::url::BaseUrl;

use super::Target;

/// The rules; by default everything may be dialled.
#[derive(Debug, Default)]
pub(super) struct Addresses(pub(super) Option<EnginePolicy>);

impl Addresses {
    /// Whether an agent may be at `url`.
    pub(super) fn check(&self, url: &BaseUrl) -> Result<(), String> {
        match (&self.0, url.ip()) {
            (Some(rules), Some(ip)) => rules.check_address(url, ip),
            _ => Ok(()),
        }
    }

    /// An engine on its node's loopback is reached through the node's agent; one on this machine, or on
    /// an address of its own, is dialled directly.
    pub(super) fn target_of(&self, engine: &BaseUrl, agent: Option<&BaseUrl>) -> Target {
        let ip = engine.ip();
        let hidden = ip.is_some_and(|ip| ip.is_loopback() || ip.is_unspecified());
        if let Some(agent) = agent.filter(|_| hidden) {
            return Target::Relay { agent: agent.clone(), engine: engine.clone() };
        }
        match (&self.0, ip) {
            (Some(rules), Some(ip)) if agent.is_some() && rules.check_address(engine, ip).is_err() => {
                Target::Forbidden(engine.clone())
            }
            _ => Target::Direct(engine.clone()),
        }
    }
}
