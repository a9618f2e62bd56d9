//! `GET /v2/meta/version` and `GET /v2/meta/capabilities`: what this program is, and what can be asked of the
//! engines behind it. Pure.
//!
//! Capabilities are what replicas that take work have told, by kind of engine. Nothing is promised that nobody
//! has told: where no engine takes work there are none.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;
use serde_json::{Value, json};

use crate::time::Wall;

use super::service_registry::{Replica, ServiceRegistry};
use super::tasks::MAX_TOKENS_MAX;

/// Version of the interface: what its paths begin with.
const API_VERSION: &str = "v2";
/// The workload that tasks serve.
const WORKLOADS: [&str; 1] = ["completion"];
/// Models and versions that one kind of engine names, at most: enough for people.
const NAMES_MAX: usize = 100;
/// What an engine is called whose kind nobody tells.
const UNKNOWN: &str = "unknown";

/// What this program was built from. What its builder did not say is null: nothing else would make the same
/// program of the same sources.
#[must_use]
pub fn version() -> Value {
    let epoch_s = option_env!("SOURCE_DATE_EPOCH").and_then(|text| text.parse::<u64>().ok());
    let built_ns = epoch_s.and_then(|seconds| seconds.checked_mul(1_000_000_000));
    json!({
        "api_version": API_VERSION,
        "version": env!("CARGO_PKG_VERSION"),
        "build_commit": option_env!("LLAMA_ORCH_BUILD_COMMIT").filter(|commit| !commit.is_empty()),
        "build_time": built_ns.map(|ns| Wall(ns).rfc3339()),
    })
}

#[derive(Default, Serialize)]
struct Engine<'a> {
    engine: &'a str,
    ctx_max: Option<u64>,
    supported_workloads: [&'static str; 1],
    rate_limits: BTreeMap<&'static str, u64>,
    features: Features<'a>,
    concurrency: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    engine_version: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    max_tokens_out: Option<u64>,
    /// Sets of models that were looked at: replicas share them.
    #[serde(skip)]
    sets: BTreeSet<u32>,
}

#[derive(Default, Serialize)]
struct Features<'a> {
    replicas: usize,
    models: BTreeSet<&'a str>,
    engine_versions: BTreeSet<&'a str>,
}

impl<'a> Engine<'a> {
    fn add(&mut self, replica: &'a Replica, models: u32) {
        self.ctx_max = self.ctx_max.max(replica.context_length);
        self.concurrency += u64::from(replica.slots_total);
        let features = &mut self.features;
        features.replicas += 1;
        if self.sets.insert(models) {
            replica.models.iter().for_each(|model| add_name(&mut features.models, model));
        }
        if let Some(version) = &replica.engine_version {
            add_name(&mut features.engine_versions, version);
        }
    }

    /// What follows from all of them.
    fn finish(&mut self) {
        self.supported_workloads = WORKLOADS;
        let versions = &self.features.engine_versions;
        self.engine_version = versions.first().copied().filter(|_| versions.len() == 1);
        let tokens_max = MAX_TOKENS_MAX.unsigned_abs();
        self.max_tokens_out = self.ctx_max.map(|context| context.min(tokens_max));
    }
}

fn add_name<'a>(names: &mut BTreeSet<&'a str>, name: &'a str) {
    if names.len() < NAMES_MAX {
        names.insert(name);
    }
}

/// What the engines that take work can be asked.
#[must_use]
pub fn capabilities(registry: &ServiceRegistry) -> Value {
    let table = registry.table();
    let mut engines: BTreeMap<&str, Engine<'_>> = BTreeMap::new();
    for (index, hot) in table.hot().iter().enumerate().filter(|(_, hot)| hot.exists && hot.placeable) {
        if let Some((_, replica)) = table.at(index) {
            engines
                .entry(replica.engine.as_deref().unwrap_or(UNKNOWN))
                .or_default()
                .add(replica, hot.model_set);
        }
    }
    for (name, engine) in &mut engines {
        engine.engine = name;
        engine.finish();
    }
    json!({"api_version": API_VERSION, "engines": engines.into_values().collect::<Vec<_>>()})
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::orchestratord::service_registry::Limits;
    use crate::time::Now;
    use crate::wire::id::NodeId;

    #[test]
    fn capabilities_are_those_of_engines_that_take_work() {
        let mut registry = ServiceRegistry::new(Limits::default(), 1);
        assert_eq!(capabilities(&registry), json!({"api_version": "v2", "engines": []}));
        let mut changes = Vec::new();
        let read = |body| serde_json::from_value(body).expect("a registration");
        let request = read(json!({"node_id": "n", "address": "http://n:9200"}));
        registry.register(&request, "peer", Now::default(), &mut changes).expect("registered");
        let replica = |name: &str, engine: &str, version: &str, context: u64, ready: bool| {
            json!({"replica_id": name, "url": format!("http://n:80/{name}"), "ready": ready, "slots_total": 4,
                "slots_free": 4, "engine": engine, "engine_version": version, "context_length": context, "models": [name]})
        };
        let pools = json!([{"pool_id": "p", "ready": true, "replicas": [
            replica("a", "llamacpp", "b1", 4096, true), replica("b", "llamacpp", "b1", 131_072, true),
            replica("c", "llamacpp", "b2", 1 << 20, false), replica("d", "vllm", "1", 8192, true)]}]);
        let beat = serde_json::from_value(json!({"pools": pools})).expect("a heartbeat");
        let node = NodeId::new("n").expect("an id");
        registry.heartbeat(&node, &beat, "peer", Now::default(), &mut changes).expect("accepted");
        let told = capabilities(&registry);
        let engines = told["engines"].as_array().expect("a list");
        assert_eq!(engines.len(), 2, "{told}");
        let first = &engines[0];
        assert_eq!((&first["engine"], &first["ctx_max"]), (&json!("llamacpp"), &json!(131_072)), "{told}");
        assert_eq!((&first["concurrency"], &first["engine_version"]), (&json!(8), &json!("b1")), "{told}");
        assert_eq!(
            (&first["max_tokens_out"], &first["features"]["models"]),
            (&json!(50_000), &json!(["a", "b"]))
        );
        assert_eq!((&engines[1]["engine"], &engines[1]["max_tokens_out"]), (&json!("vllm"), &json!(8192)));
    }

    #[test]
    fn the_version_has_its_fields_even_where_nobody_told_them() {
        let told = version();
        assert_eq!(told["version"], env!("CARGO_PKG_VERSION"));
        for name in ["api_version", "build_commit", "build_time"] {
            assert!(told.get(name).is_some_and(|value| value.is_string() || value.is_null()), "{told}");
        }
    }
}
