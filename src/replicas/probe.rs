//! Probes as exchanges: how an order becomes a request, and an ending becomes an outcome.

use std::fs;
use std::sync::Arc;

use serde::Deserialize;

use crate::net::{self, FaultKind, Outbound, Patience, Sink};

use super::probing::{ProbeKind, ProbeOrder, ProbeOutcome};

/// Largest answer to a probe, in bytes: lists of models are the longest.
const ANSWER_BYTES_MAX: usize = 1024 * 1024;
/// Largest key file, in bytes.
const KEY_BYTES_MAX: u64 = 8 * 1024;

/// The request that carries out an order.
#[must_use]
pub fn outbound(order: &ProbeOrder) -> Outbound {
    // The next probe comes long after an engine has closed an idle connection: none is kept.
    let mut fields = vec![
        ("Accept".to_string(), b"application/json".to_vec()),
        ("Connection".to_string(), b"close".to_vec()),
    ];
    if let Some(key) = order.auth_file.as_deref().and_then(read_key) {
        fields.push(("Authorization".to_string(), format!("Bearer {key}").into_bytes()));
    }
    Outbound {
        to: order.url.clone(),
        method: "GET".into(),
        target: order.path.clone(),
        fields,
        body: Arc::default(),
        sink: Sink::Collect { bytes_max: ANSWER_BYTES_MAX },
        patience: Patience {
            connect_ms: order.timeout_ms,
            first_byte_ms: order.timeout_ms,
            idle_ms: order.timeout_ms,
        },
        keep_ms: None,
    }
}

/// What an exchange's ending says about the engine.
#[must_use]
pub fn outcome(kind: ProbeKind, ended: net::Outcome) -> ProbeOutcome {
    match ended {
        net::Outcome::Complete { status: 200, body } => match kind {
            ProbeKind::Health => ProbeOutcome::Healthy,
            ProbeKind::Models => models(&body),
        },
        net::Outcome::Complete { status: status @ 500..=599, .. } => ProbeOutcome::Loading(status),
        net::Outcome::Complete { status, .. } => ProbeOutcome::Unhealthy { status },
        net::Outcome::Failed(fault) => match fault.kind {
            FaultKind::Connect | FaultKind::Reset => ProbeOutcome::Refused(fault.reason),
            FaultKind::Timeout => ProbeOutcome::Slow,
            FaultKind::Protocol | FaultKind::Status(_) | FaultKind::Aborted => {
                ProbeOutcome::Broken(fault.reason)
            }
        },
        net::Outcome::ClientGone | net::Outcome::Cancelled => ProbeOutcome::Slow,
    }
}

/// The engine's own API key. Small local files are read on the loop: they take microseconds, and the
/// key may change between two probes.
#[must_use]
pub fn read_key(file: &str) -> Option<String> {
    let small = fs::metadata(file).ok().filter(|meta| meta.is_file() && meta.len() <= KEY_BYTES_MAX);
    let text = small.and_then(|_| fs::read_to_string(file).ok())?;
    let key = text.lines().next()?.trim();
    (!key.is_empty()).then(|| key.to_string())
}

fn models(body: &[u8]) -> ProbeOutcome {
    #[derive(Deserialize)]
    struct List {
        #[serde(default)]
        data: Vec<Model>,
    }
    #[derive(Deserialize)]
    struct Model {
        id: String,
    }
    match serde_json::from_slice::<List>(body) {
        Ok(list) => ProbeOutcome::Models(list.data.into_iter().map(|model| model.id).collect()),
        Err(_) => ProbeOutcome::Broken("its list of models cannot be read".into()),
    }
}
