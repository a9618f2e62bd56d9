//! What is asked of engines and about them, and what the answers mean. PURE.
//!
//! Four kinds of question: whether an engine serves, what it serves (once, after its first good answer),
//! whether pool-managerd still knows a replica, and, where no pool-managerd answers, whether anybody is
//! connected to its port.

use serde_json::Value;

use super::supervision::Seen;
use crate::http::fields::FieldLines;
use crate::net::{Outbound, Patience, Sink};
use crate::replicas::profile::Engine;
use crate::replicas::{Facts, ProbeKind, ProbeOrder, ProbeOutcome};
use crate::wire::handoff::Handoff;
use crate::wire::id::ReplicaKey;
use crate::wire::url::BaseUrl;

/// Longest health probe, in milliseconds. Engines have been seen to take almost 7 s for their first answer.
const HEALTH_MS: u64 = 10_000;
/// Longest wait for what an engine tells about itself, in milliseconds: its first requests wait as long.
const FACTS_MS: u64 = 2_000;
/// Longest wait for pool-managerd, in milliseconds.
const AGENT_MS: u64 = 2_000;
/// Largest answer of pool-managerd, in bytes: a pool with its replicas.
const AGENT_BYTES_MAX: usize = 1024 * 1024;

/// The probe of `handoff`'s engine.
#[must_use]
pub fn order(handoff: &Handoff, kind: ProbeKind, serial: u64) -> ProbeOrder {
    let path = match kind {
        ProbeKind::Props => "/props",
        ProbeKind::Info => "/info",
        ProbeKind::Models => "/v1/models",
        ProbeKind::Health | ProbeKind::Canary => &handoff.health_path,
    };
    ProbeOrder {
        id: crate::replicas::ProbeId { key: handoff.key(), serial, seq: 0 },
        url: handoff.url.clone(),
        path: path.to_string(),
        body: None,
        kind,
        timeout_ms: if kind == ProbeKind::Health { HEALTH_MS } else { FACTS_MS },
        auth_file: handoff.auth_file.clone(),
    }
}

/// What a health probe's outcome means; `None` where the list of models has to stand in for it.
#[must_use]
pub fn seen(outcome: ProbeOutcome, handoff: &Handoff) -> Option<Seen> {
    Some(match outcome {
        ProbeOutcome::Healthy | ProbeOutcome::Facts(_) => Seen::Ready,
        ProbeOutcome::Unhealthy { status: 404 }
            if Engine::named(&handoff.engine).lists_models_as_health() =>
        {
            return None;
        }
        ProbeOutcome::Loading(status) | ProbeOutcome::Unhealthy { status } => {
            Seen::Soft(format!("HTTP {status}"))
        }
        ProbeOutcome::Unauthorized { status, why } => Seen::Soft(format!("HTTP {status}: {why}")),
        ProbeOutcome::Slow => Seen::Soft("no answer in time".into()),
        ProbeOutcome::Refused(why) | ProbeOutcome::Broken(why) => Seen::Hard(why),
        ProbeOutcome::NotAsked(why) => Seen::Unknown(why),
    })
}

/// How far an engine says that it has come with its start, from 0 to 1.
#[must_use]
pub fn progress(body: &[u8]) -> Option<f64> {
    let body: Value = serde_json::from_slice(body).ok()?;
    let told = [&body["progress"], &body["error"]["progress"]].into_iter().find_map(Value::as_f64)?;
    let share = if told > 1.0 { told / 100.0 } else { told };
    (0.0..=1.0).contains(&share).then_some(share)
}

/// Adds what an engine told to its handoff. Of two numbers of slots the smaller counts: the operator may
/// give less than the engine has, not more. Something worth a warning is returned.
pub fn learn(handoff: &mut Handoff, slots_wanted: Option<u32>, facts: Facts) -> Option<String> {
    if handoff.models.is_empty() {
        handoff.models = facts.models;
    }
    let told = facts.slots?;
    handoff.slots = slots_wanted.map_or(told, |wanted| wanted.min(told));
    handoff.slots_free = handoff.slots;
    let too_many = slots_wanted.filter(|wanted| *wanted > told)?;
    Some(format!("{} was to have {too_many} slots, but its engine says {told}", handoff.key()))
}

/// Asks pool-managerd about a pool.
#[must_use]
pub fn about_pool(agent: &BaseUrl, key: &ReplicaKey, token: Option<&str>) -> Outbound<'static> {
    let mut fields = FieldLines::new().with("Connection", "close");
    if let Some(token) = token {
        fields.push("Authorization", format!("Bearer {token}"));
    }
    Outbound {
        to: agent.clone(),
        method: "GET".into(),
        target: format!("/v2/pools/{}/status", key.pool).into(),
        fields,
        body: std::sync::Arc::default(),
        sink: Sink::Collect { bytes_max: AGENT_BYTES_MAX },
        patience: Patience { connect_ms: AGENT_MS, first_byte_ms: AGENT_MS, idle_ms: AGENT_MS },
        keep_ms: None,
    }
}

/// Whether pool-managerd still has a replica in use, from its answer; `None` where that does not tell.
#[must_use]
pub fn is_known(status: u16, body: &[u8], key: &ReplicaKey) -> Option<bool> {
    match status {
        200 => {
            // Of any version: only the names matter.
            let pool: Value = serde_json::from_slice(body).ok()?;
            let replicas = pool["replicas"].as_array()?;
            Some(replicas.iter().any(|replica| replica["replica_id"].as_str() == Some(key.replica.as_str())))
        }
        404 => Some(false),
        _ => None,
    }
}

/// Connections that are open to `port` of this machine, in the text of `/proc/net/tcp` and its like.
#[must_use]
pub fn connections(table: &str, port: u16) -> usize {
    const ESTABLISHED: &str = "01";
    let is_ours = |line: &&str| {
        let mut fields = line.split_ascii_whitespace().skip(1);
        let local = fields.next().and_then(|address| address.rsplit_once(':'));
        let is_port = local.and_then(|(_, hex)| u16::from_str_radix(hex, 16).ok()) == Some(port);
        is_port && fields.nth(1) == Some(ESTABLISHED)
    };
    table.lines().skip(1).filter(is_ours).count()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::handoff::{HandoffFile, parse};

    fn handoff(text: &str) -> Handoff {
        match parse(text.as_bytes()) {
            Ok(HandoffFile::Engine(handoff)) => *handoff,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_engines_slots_count_and_the_operator_may_give_fewer() {
        let facts = || Facts { models: vec!["m".into()], slots: Some(4), context_length: None };
        for (wanted, slots, warns) in [(None, 4, false), (Some(2), 2, false), (Some(9), 4, true)] {
            let mut handoff = handoff(r#"{"url":"http://127.0.0.1:1"}"#);
            let warning = learn(&mut handoff, wanted, facts());
            assert_eq!((handoff.slots, handoff.slots_free, warning.is_some()), (slots, slots, warns));
            assert_eq!(handoff.models, ["m"]);
        }
    }

    #[test]
    fn only_a_plain_openai_engine_may_lack_a_health_path() {
        let missing = || ProbeOutcome::Unhealthy { status: 404 };
        let openai = handoff(r#"{"url":"http://127.0.0.1:1","engine":"mlx"}"#);
        assert_eq!(seen(missing(), &openai), None);
        let llama = handoff(r#"{"url":"http://127.0.0.1:1"}"#);
        assert_eq!(seen(missing(), &llama), Some(Seen::Soft("HTTP 404".into())));
    }

    #[test]
    fn progress_is_believed_within_bounds() {
        for (body, expected) in [
            (r#"{"progress":0.5}"#, Some(0.5)),
            (r#"{"error":{"progress":45}}"#, Some(0.45)),
            (r#"{"progress":-1}"#, None),
            (r#"{"progress":1e9}"#, None),
            ("[", None),
        ] {
            assert_eq!(progress(body.as_bytes()), expected, "{body}");
        }
    }

    #[test]
    fn connections_to_a_port_are_counted_on_its_own_side() {
        let table = "  sl  local_address rem_address   st tx_queue\n   0: 0100007F:1F90 00000000:0000 0A 0:0\n   1: 0100007F:1F90 0100007F:D431 01 0:0\n   2: 0100007F:D431 0100007F:1F90 01 0:0\n   3: 0100007F:1F90 0100007F:D432 06 0:0\n";
        assert_eq!(connections(table, 8080), 1);
        assert_eq!(connections(table, 80), 0);
        assert_eq!(connections("", 80), 0);
    }
}
