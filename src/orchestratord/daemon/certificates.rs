//! Which node speaks: where a client CA is configured, the certificate of a connection says so, and a
//! message about another node is refused.
//!
//! Only messages of nodes need a certificate. Clients of the other routes show a token, and may show a
//! certificate too, which is then checked against the client CA in the handshake.

use super::Daemon;
use crate::orchestratord::api::Action;
use crate::orchestratord::refusal::Refusal;
use crate::reactor::token::Token;
use crate::wire::certificate::Certificate;
use crate::wire::id::NodeId;

impl Daemon {
    /// Why a request may not say what it says about a node, where that is so.
    pub(super) fn uncertified(&self, client: Token, action: &Action) -> Option<Refusal> {
        if !self.tls.knows_clients() {
            return None;
        }
        let node = match action {
            Action::Register(body) => &body.node_id,
            Action::Heartbeat(node, _) | Action::Deregister(node, _) => node,
            Action::PoolReady(notice) => match &notice.node_id {
                Some(node) => node,
                // It names nobody, so anybody's will do.
                None if self.net.client_certificate(client).is_some() => return None,
                None => return Some(Refusal::Certificate("notices of nodes need a certificate".into())),
            },
            // Nor does it.
            Action::Worker(_) if self.net.client_certificate(client).is_some() => return None,
            Action::Worker(_) => {
                return Some(Refusal::Certificate("messages about workers need a certificate".into()));
            }
            _ => return None,
        };
        mismatch(node, self.net.client_certificate(client)).map(Refusal::Certificate)
    }
}

/// What is wrong with a certificate, or with there being none, for a message about `node`.
fn mismatch(node: &NodeId, der: Option<&[u8]>) -> Option<String> {
    let Some(der) = der else {
        return Some(format!(
            "messages about node {node} need its certificate: set LLORCH_TLS_CLIENT_CERT and LLORCH_TLS_CLIENT_KEY there"
        ));
    };
    match Certificate::read(der) {
        Some(certificate) if certificate.is_of(node.as_str()) => None,
        Some(certificate) => {
            Some(format!("the certificate is that of {}, not of node {node}", certificate.names.join(", ")))
        }
        None => Some(format!("no name can be read in the certificate that was shown for node {node}")),
    }
}
