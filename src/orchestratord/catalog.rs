//! `GET /v2/catalog/availability`: which models are on which nodes. Pure.
//!
//! Two views of the same replicas. `nodes` has what each node serves; `models` has where each model is, and
//! with how many slots. A model counts where its node is online; its slots count where its replica takes work.
//! A model that only nodes have that are not online is listed with no nodes.
//!
//! Totals are of all nodes, for one pass over the replicas' hot rows. What grows with the fleet comes in pages:
//! `nodes`, and with it the `nodes` of each model, behind `?after=`; `models` behind `?after_model=`.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use crate::http::head::RequestHead;
use crate::http::server::Response;
use crate::wire::id::{NodeId, PoolId};
use crate::wire::url::BaseUrl;

use super::pages::Page;
use super::refusal::Refusal;
use super::service_registry::{Node, NodeStatus, ServiceRegistry};

/// Models of one answer, at most: some hundred kilobytes of names.
pub const MODELS_SHOWN_MAX: usize = 1_000;
/// A page of nodes ends behind the one with which so many models of replicas were read: a few milliseconds.
const PAGE_READ_MAX: usize = 10_000;

#[derive(Serialize)]
struct Availability<'a> {
    nodes: BTreeMap<&'a NodeId, NodeModels<'a>>,
    total_nodes: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    next: Option<&'a NodeId>,
    total_models: usize,
    replicated_models: Vec<&'a str>,
    single_node_models: Vec<&'a str>,
    models: Vec<ModelNodes<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    next_model: Option<&'a str>,
}

#[derive(Serialize)]
struct NodeModels<'a> {
    node_id: &'a NodeId,
    address: Option<&'a BaseUrl>,
    online: bool,
    models: BTreeSet<&'a str>,
    pools: Vec<PoolModels<'a>>,
}

#[derive(Serialize)]
struct PoolModels<'a> {
    pool_id: &'a PoolId,
    ready: bool,
    models: BTreeSet<&'a str>,
}

#[derive(Serialize)]
struct ModelNodes<'a> {
    model_id: &'a str,
    nodes: Vec<&'a NodeId>,
    total_nodes: usize,
    total_capacity: u64,
}

/// One page of what is where. `head` is asked for `?limit=`, `?after=` and `?after_model=`.
///
/// # Errors
/// [`Refusal::Invalid`] for a limit that is none.
pub fn availability(registry: &ServiceRegistry, head: &RequestHead) -> Result<Response, Refusal> {
    let page = Page::of(head)?;
    let after_model = head.query("after_model").filter(|after| !after.is_empty());
    Ok(Response::json(200, &of(registry, page, after_model)))
}

fn of<'a>(registry: &'a ServiceRegistry, page: Page<'_>, after_model: Option<&str>) -> Availability<'a> {
    let all = totals(registry);
    let total_models = all.len();
    let mut models: BTreeMap<&str, ModelNodes<'_>> = BTreeMap::new();
    let mut behind = all.into_iter().filter(|model| after_model.is_none_or(|after| model.model_id > after));
    models.extend(behind.by_ref().take(MODELS_SHOWN_MAX).map(|model| (model.model_id, model)));
    let next_model = behind.next().and_then(|_| models.keys().next_back().copied());

    let (mut nodes, mut next, mut read) = (BTreeMap::new(), None, 0);
    for node in registry.nodes().filter(|node| page.is_behind(node.id.as_str())) {
        if nodes.len() >= page.limit || read >= PAGE_READ_MAX {
            next = nodes.keys().next_back().copied();
            break;
        }
        let shown = node_models(registry, node, &mut read);
        if shown.online {
            for model in &shown.models {
                if let Some(model) = models.get_mut(model) {
                    model.nodes.push(&node.id);
                }
            }
        }
        nodes.insert(&node.id, shown);
    }
    let with = |fits: fn(usize) -> bool| {
        models.values().filter(|model| fits(model.total_nodes)).map(|model| model.model_id).collect()
    };
    Availability {
        nodes,
        total_nodes: registry.nodes_len(),
        next,
        total_models,
        replicated_models: with(|nodes| nodes > 1),
        single_node_models: with(|nodes| nodes == 1),
        models: models.into_values().collect(),
        next_model,
    }
}

fn is_online(node: &Node) -> bool {
    node.status == NodeStatus::Online
}

fn node_models<'a>(registry: &'a ServiceRegistry, node: &'a Node, read: &mut usize) -> NodeModels<'a> {
    let empty = |pool_id| PoolModels { pool_id, ready: false, models: BTreeSet::new() };
    let mut pools: BTreeMap<&PoolId, PoolModels<'_>> =
        node.pools.iter().map(|pool| (&pool.pool_id, empty(&pool.pool_id))).collect();
    let mut models = BTreeSet::new();
    for replica in registry.replicas_of(node).filter_map(|replica| registry.replica(replica)) {
        let pool = pools.entry(&replica.key.pool).or_insert_with_key(|pool| empty(pool));
        *read += 1 + replica.models.len();
        pool.ready |= replica.obstacle().is_none();
        pool.models.extend(replica.models.iter().map(String::as_str));
        models.extend(replica.models.iter().map(String::as_str));
    }
    let (node_id, address) = (&node.id, node.address.as_ref());
    NodeModels { node_id, address, online: is_online(node), models, pools: pools.into_values().collect() }
}

/// Every model by name, with how many nodes and slots it has. Replicas are counted by their sets of models, of
/// which there are few.
fn totals(registry: &ServiceRegistry) -> Vec<ModelNodes<'_>> {
    let (table, sets) = (registry.table(), registry.table().sets());
    let mut models = Vec::new();
    let mut of_set: Vec<Vec<usize>> = vec![Vec::new(); sets.end()];
    for (model, (model_id, within)) in sets.models().enumerate() {
        models.push(ModelNodes { model_id, nodes: Vec::new(), total_nodes: 0, total_capacity: 0 });
        within.iter().for_each(|set| of_set[*set as usize].push(model));
    }
    // Which node was the last one to count for a set, and for a model; no node is number 0.
    let (mut set_seen, mut model_seen) = (vec![0; of_set.len()], vec![0; models.len()]);
    let mut slots = vec![0u64; of_set.len()];
    for (number, node) in registry.nodes().enumerate().filter(|(_, node)| is_online(node)) {
        for hot in registry.replicas_of(node).filter_map(|replica| table.get_hot(replica)) {
            let set = hot.model_set as usize;
            slots[set] += if hot.placeable { u64::from(hot.slots_total) } else { 0 };
            if std::mem::replace(&mut set_seen[set], number + 1) == number + 1 {
                continue;
            }
            for model in &of_set[set] {
                let is_first = std::mem::replace(&mut model_seen[*model], number + 1) != number + 1;
                models[*model].total_nodes += usize::from(is_first);
            }
        }
    }
    for (of, slots) in of_set.iter().zip(slots) {
        of.iter().for_each(|model| models[*model].total_capacity += slots);
    }
    models
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::orchestratord::service_registry::Limits;
    use crate::time::{Mono, Now};
    use crate::wire::node::{Heartbeat, RegisterRequest};
    use serde_json::{Value, json};

    /// Nodes by number, each with so many pools of one replica; what a replica serves is up to both.
    fn registry(nodes: usize, pools: usize, models: impl Fn(usize, usize) -> Vec<String>) -> ServiceRegistry {
        let mut registry = ServiceRegistry::new(Limits::default(), 1);
        let mut changes = Vec::new();
        for n in 0..nodes {
            let name = format!("n{n:05}");
            let body = json!({"node_id": name, "address": format!("http://{name}:9200")});
            let request: RegisterRequest = serde_json::from_value(body).expect("a registration");
            registry.register(&request, &name, Now::default(), &mut changes).expect("registered");
            let pool = |p: usize| {
                json!({"pool_id": format!("p{p}"), "ready": true, "replicas": [{"replica_id": "r0", "ready": p != 1,
                    "url": format!("http://{name}:80{p:02}"), "slots_free": 3, "slots_total": 4, "models": models(n, p)}]})
            };
            let pools: Vec<Value> = (0..pools).map(pool).collect();
            let beat: Heartbeat = serde_json::from_value(json!({"pools": pools})).expect("a heartbeat");
            let node = NodeId::new(&name).expect("an id");
            registry.heartbeat(&node, &beat, &name, Now::default(), &mut changes).expect("accepted");
            changes.clear();
        }
        registry
    }

    fn shown(registry: &ServiceRegistry, limit: usize, after: Option<&str>, model: Option<&str>) -> Value {
        serde_json::to_value(of(registry, Page { limit, after }, model)).expect("JSON")
    }

    fn model<'a>(shown: &'a Value, name: &str) -> &'a Value {
        let models = shown["models"].as_array().expect("a list");
        models.iter().find(|model| model["model_id"] == name).expect(name)
    }

    /// `all` everywhere, `one` on the first node twice, `half` where nothing takes work.
    fn mixed() -> ServiceRegistry {
        registry(3, 3, |n, p| match (n, p) {
            (_, 0) => vec!["all".into()],
            (_, 1) => vec!["half".into(), "all".into()],
            (0, _) => vec!["one".into(), "all".into()],
            _ => Vec::new(),
        })
    }

    #[test]
    fn both_views_tell_the_same() {
        let registry = mixed();
        let shown = shown(&registry, 10, None, None);
        assert_eq!(shown["total_models"], 3, "{shown}");
        assert_eq!(shown["replicated_models"], json!(["all", "half"]), "{shown}");
        assert_eq!(shown["single_node_models"], json!(["one"]), "{shown}");
        let all = model(&shown, "all");
        assert_eq!((&all["total_nodes"], &all["total_capacity"]), (&json!(3), &json!(16)), "{shown}");
        assert_eq!(all["nodes"], json!(["n00000", "n00001", "n00002"]));
        assert_eq!(model(&shown, "one")["total_capacity"], 4);
        assert_eq!(model(&shown, "half")["total_capacity"], 0, "no replica that has it takes work");
        let first = &shown["nodes"]["n00000"];
        assert_eq!((&first["node_id"], &first["online"]), (&json!("n00000"), &json!(true)));
        assert_eq!(first["models"], json!(["all", "half", "one"]));
        assert_eq!(first["pools"][1], json!({"pool_id": "p1", "ready": false, "models": ["all", "half"]}));
        assert_eq!(shown["nodes"]["n00001"]["pools"][2]["models"], json!([]));
    }

    #[test]
    fn what_is_not_online_is_listed_and_does_not_count() {
        let mut registry = mixed();
        let mut changes = Vec::new();
        let later = Now { mono: Mono(0).plus_ms(Limits::default().node_timeout_ms + 1), ..Now::default() };
        for n in 1..3 {
            let (name, beat) = (format!("n{n:05}"), json!({"pools": []}));
            let beat: Heartbeat = serde_json::from_value(beat).expect("a heartbeat");
            let node = NodeId::new(&name).expect("an id");
            registry.heartbeat(&node, &beat, &name, later, &mut changes).expect("accepted");
        }
        registry.expire(later, &mut changes);
        let shown = shown(&registry, 10, None, None);
        assert_eq!(shown["nodes"]["n00000"]["online"], false, "{shown}");
        assert_eq!(shown["nodes"]["n00000"]["models"], json!(["all", "half", "one"]));
        assert_eq!((&shown["total_models"], &shown["single_node_models"]), (&json!(3), &json!([])));
        let all = model(&shown, "all");
        assert_eq!((&all["nodes"], &all["total_nodes"]), (&json!([]), &json!(0)), "{shown}");
    }

    #[test]
    fn pages_are_the_whole() {
        let registry = registry(25, 2, |n, p| vec![format!("m{p}"), format!("own-{n:02}")]);
        let (mut nodes, mut of_m0, mut after, mut pages) = (Vec::new(), Vec::new(), None::<String>, 0);
        loop {
            let shown = shown(&registry, 10, after.as_deref(), None);
            pages += 1;
            assert_eq!(model(&shown, "m0")["total_nodes"], 25, "totals are of all");
            nodes.extend(shown["nodes"].as_object().expect("nodes").keys().cloned());
            of_m0.extend(model(&shown, "m0")["nodes"].as_array().expect("nodes").clone());
            match shown.get("next") {
                Some(next) => after = next.as_str().map(str::to_string),
                None => break,
            }
        }
        assert_eq!((pages, nodes.len(), of_m0.len()), (3, 25, 25));
        let behind = shown(&registry, 10, None, Some("own-22"));
        assert_eq!(
            (behind["models"].as_array().map(Vec::len), &behind["total_models"]),
            (Some(2), &json!(27))
        );
    }

    #[test]
    fn many_models_are_cut_and_the_rest_is_behind_them() {
        let name = |n: usize, p: usize| (0..200).map(|m| format!("m-{n}-{p}-{m:03}")).collect();
        let registry = registry(3, 2, name);
        let first = shown(&registry, 10, None, None);
        assert_eq!(first["models"].as_array().map(Vec::len), Some(MODELS_SHOWN_MAX));
        let rest = shown(&registry, 10, None, first["next_model"].as_str());
        assert_eq!((rest["models"].as_array().map(Vec::len), rest.get("next_model")), (Some(200), None));
    }
}
