//! The shell's part of requests that go straight to engines: agents are told what they do not see.

use std::sync::Arc;

use super::{Daemon, Running};
use crate::http::fields::FieldLines;
use crate::net::{Outbound, Outcome, Patience, Sink};
use crate::orchestratord::core::Dispatch;
use crate::orchestratord::direct::Engine;
use crate::orchestratord::service_registry::Target;
use crate::reactor::token::Token;
use crate::time::Now;

/// What telling an agent may take: it answers from memory.
const PATIENCE: Patience = Patience { connect_ms: 2_000, first_byte_ms: 5_000, idle_ms: 5_000 };
/// Largest answer of an agent, in bytes: an error in words.
const ANSWER_BYTES_MAX: usize = 64 * 1024;

impl Daemon {
    /// A request was sent to an engine.
    pub(super) fn note_direct(&mut self, exchange: Token, dispatch: &Dispatch, now: Now) {
        // This machine's own engines are judged here.
        if self.watch.is_none() && matches!(dispatch.target, Target::Direct(_)) {
            let engine = (dispatch.node.clone(), dispatch.key.clone(), dispatch.generation);
            self.direct.began(exchange, engine, now.mono);
        }
    }

    /// Tells agents whose engines have fallen silent.
    pub(super) fn tell_of_silence(&mut self, now: Now) {
        let net = &self.net;
        let progress = |exchange| net.progress(exchange).map(|known| (known.started, known.last_byte));
        for (engine, report) in self.direct.look(now, progress) {
            let (node, key, _) = &engine;
            let agent = self.core.registry().node(node).and_then(|node| node.address.clone());
            let (Some(to), Ok(body)) = (agent, serde_json::to_vec(&report)) else {
                self.direct.told(&engine);
                continue;
            };
            let mut fields = FieldLines::new().with("Content-Type", "application/json");
            if let Some(bearer) = self.guard.bearer(now.mono) {
                fields.push("Authorization", bearer);
            }
            let outbound = Outbound {
                to,
                method: "POST".into(),
                target: format!("/v2/pools/{}/replicas/{}/activity", key.pool, key.replica).into(),
                fields,
                body: Arc::new(body),
                sink: Sink::Collect { bytes_max: ANSWER_BYTES_MAX },
                patience: PATIENCE,
                keep_ms: None,
            };
            let exchange = self.net.start(outbound, now.mono);
            self.exchanges.insert(exchange, Running::Told(engine));
        }
    }

    /// An agent was told. One that does not know of this, or knows the engine no more, has no use for it.
    pub(super) fn agent_told(&mut self, engine: &Engine, outcome: &Outcome) {
        if let Outcome::Failed(fault) = outcome {
            let (node, key, _) = engine;
            log::debug!("{node} could not be told that {key} is silent: {}", fault.reason);
        }
        self.direct.told(engine);
    }
}
