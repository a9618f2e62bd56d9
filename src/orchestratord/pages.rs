//! `GET /v2/nodes` and `GET /v2/pools`: nodes, pools and replicas as people and programs see them. Pure.
//!
//! The loop does nothing else while it answers, so an answer is a page of at most [`PAGE_MAX`] entries, and
//! ends early where those have very many replicas. What is shown is borrowed from the registry and written
//! straight to bytes. A page names the one behind it in `next`; entries are in the order of their ids, so
//! that pages of a registry that changes meanwhile neither repeat nor skip what stays.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;

use serde::{Serialize, Serializer};

use crate::http::head::RequestHead;
use crate::http::server::Response;
use crate::time::Now;
use crate::wire::gpu_load::GpuLoad;
use crate::wire::id::{NodeId, PoolId, ReplicaId};
use crate::wire::node::Capabilities;
use crate::wire::preparation::PoolPreparation;
use crate::wire::url::BaseUrl;

use super::poller::Poller;
use super::refusal::Refusal;
use super::service_registry::{Circuit, Confirmation, Node, Obstacle, Replica, ServiceRegistry};

/// Entries of one page, at most and unless told otherwise: 1,000 nodes of a few replicas are a megabyte.
pub const PAGE_MAX: usize = 1_000;
/// A page ends behind the entry with which it has so many replicas: some ten milliseconds of writing.
const PAGE_REPLICAS_MAX: usize = 4_000;

/// Which part of a listing is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Page<'a> {
    /// Entries, at most.
    pub limit: usize,
    /// Only what comes behind this id.
    pub after: Option<&'a str>,
}

impl<'a> Page<'a> {
    /// Reads `?limit=` and `?after=`.
    ///
    /// # Errors
    /// [`Refusal::Invalid`] for a limit that is none.
    pub fn of(head: &'a RequestHead) -> Result<Page<'a>, Refusal> {
        let limit = limit_of(head, PAGE_MAX, PAGE_MAX)?;
        Ok(Page { limit, after: head.query("after").filter(|after| !after.is_empty()) })
    }

    /// Whether an entry with this id comes behind.
    #[must_use]
    pub fn is_behind(&self, id: &str) -> bool {
        self.after.is_none_or(|after| id > after)
    }
}

/// Reads `?limit=`. More than `max` is taken as `max`.
///
/// # Errors
/// [`Refusal::Invalid`] where it is no whole number above 0.
pub fn limit_of(head: &RequestHead, default: usize, max: usize) -> Result<usize, Refusal> {
    let Some(text) = head.query("limit") else { return Ok(default) };
    let limit = text.parse::<usize>().ok().filter(|limit| *limit > 0);
    limit
        .map(|limit| limit.min(max))
        .ok_or_else(|| Refusal::Invalid(format!("limit must be a whole number from 1 to {max}")))
}

/// One page of nodes; only those with `status` (any case), if it is given.
#[must_use]
pub fn nodes(
    registry: &ServiceRegistry,
    poller: &Poller,
    status: Option<&str>,
    page: Page<'_>,
    now: Now,
) -> Response {
    #[derive(Serialize)]
    struct Nodes<'a> {
        count: usize,
        #[serde(skip_serializing_if = "Option::is_none")]
        next: Option<&'a NodeId>,
        nodes: Vec<NodeView<'a>>,
        #[serde(skip_serializing_if = "Option::is_none")]
        polled: Option<Vec<serde_json::Value>>,
    }
    let wanted = registry
        .nodes()
        .filter(|node| status.is_none_or(|status| node.status.as_str().eq_ignore_ascii_case(status)));
    let (mut count, mut shown, mut next, mut replicas) = (0, Vec::new(), None, 0);
    for node in wanted {
        count += 1;
        if !page.is_behind(node.id.as_str()) {
            continue;
        }
        if shown.len() < page.limit && replicas < PAGE_REPLICAS_MAX {
            let view = NodeView::new(registry, node, now);
            replicas += view.replicas.len();
            shown.push(view);
        } else if next.is_none() {
            next = shown.last().map(|last: &NodeView<'_>| last.node_id);
        }
    }
    let polled = page.after.is_none().then(|| poller.to_json());
    Response::json(200, &Nodes { count, next, nodes: shown, polled })
}

/// One node.
#[must_use]
pub fn node(registry: &ServiceRegistry, node: &Node, now: Now) -> Response {
    Response::json(200, &NodeView::new(registry, node, now))
}

/// One page of pools, each over all nodes.
#[must_use]
pub fn pools(registry: &ServiceRegistry, page: Page<'_>, now: Now) -> Response {
    #[derive(Serialize)]
    struct Pools<'a> {
        count: usize,
        #[serde(skip_serializing_if = "Option::is_none")]
        next: Option<&'a PoolId>,
        pools: Vec<PoolView<'a>>,
    }
    let names: BTreeSet<&PoolId> =
        registry.nodes().flat_map(|node| node.pools.iter().map(|pool| &pool.pool_id)).collect();
    let behind = names.iter().filter(|name| page.is_behind(name.as_str()));
    let on_page = behind.take(page.limit).map(|name| (*name, PoolView::new(name)));
    let mut found: BTreeMap<&PoolId, PoolView<'_>> = on_page.collect();
    for node in registry.nodes() {
        for pool in &node.pools {
            if let Some(view) = found.get_mut(&pool.pool_id) {
                view.nodes.push(&node.id);
            }
        }
        for replica in registry.replicas_of(node).filter_map(|replica| registry.replica(replica)) {
            if let Some(view) = found.get_mut(&replica.key.pool) {
                view.add(replica, now);
            }
        }
    }
    let (mut shown, mut replicas) = (Vec::new(), 0);
    for view in found.into_values() {
        if replicas >= PAGE_REPLICAS_MAX {
            break;
        }
        replicas += view.replicas.len();
        shown.push(view);
    }
    let last = shown.last().map(|view| view.pool_id);
    let next = last.filter(|last| names.last().is_some_and(|end| end > last));
    Response::json(200, &Pools { count: names.len(), next, pools: shown })
}

#[derive(Serialize)]
struct NodeView<'a> {
    node_id: &'a NodeId,
    machine_id: &'a str,
    address: Option<&'a BaseUrl>,
    pools: Vec<&'a PoolId>,
    capabilities: &'a Capabilities,
    version: Option<&'a str>,
    status: &'static str,
    via: &'static str,
    reason: &'a str,
    since_ms: u64,
    registered_at_ms: u64,
    last_heartbeat_ms: u64,
    lease_left_ms: Option<u64>,
    last_address: &'a str,
    incarnation: Option<u64>,
    unconfirmed: bool,
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    preparation: &'a [PoolPreparation],
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    gpu_loads: &'a [GpuLoad],
    replicas: Vec<ReplicaView<'a>>,
}

impl<'a> NodeView<'a> {
    fn new(registry: &'a ServiceRegistry, node: &'a Node, now: Now) -> NodeView<'a> {
        let replicas = registry.replicas_of(node).filter_map(|replica| registry.replica(replica));
        NodeView {
            node_id: &node.id,
            machine_id: &node.machine_id,
            address: node.address.as_ref(),
            pools: node.pools.iter().map(|pool| &pool.pool_id).collect(),
            capabilities: &node.capabilities,
            version: node.version.as_deref(),
            status: node.status.as_str(),
            via: node.via().as_str(),
            reason: &node.reason,
            since_ms: node.since.unix_ms(),
            registered_at_ms: node.registered_at.unix_ms(),
            last_heartbeat_ms: node.last_heartbeat_at.map_or(0, |at| at.unix_ms()),
            lease_left_ms: node.lease_left_ms(now),
            last_address: &node.peer,
            incarnation: node.incarnation,
            unconfirmed: node.restored,
            preparation: &node.preparation,
            gpu_loads: &node.gpu_loads,
            replicas: replicas.map(|replica| ReplicaView::new(replica, now)).collect(),
        }
    }
}

#[derive(Serialize)]
struct PoolView<'a> {
    pool_id: &'a PoolId,
    nodes: Vec<&'a NodeId>,
    live: bool,
    ready: bool,
    slots_total: u32,
    slots_free: u32,
    replicas: Vec<ReplicaView<'a>>,
}

impl<'a> PoolView<'a> {
    fn new(pool_id: &'a PoolId) -> PoolView<'a> {
        let (nodes, replicas) = (Vec::new(), Vec::new());
        PoolView { pool_id, nodes, live: false, ready: false, slots_total: 0, slots_free: 0, replicas }
    }

    fn add(&mut self, replica: &'a Replica, now: Now) {
        let view = ReplicaView::new(replica, now);
        self.live |= replica.ready;
        if view.routable {
            self.ready = true;
            self.slots_total += view.slots_total;
            self.slots_free += view.slots_free;
        }
        self.replicas.push(view);
    }
}

#[derive(Serialize)]
struct ReplicaView<'a> {
    node_id: &'a NodeId,
    pool_id: &'a PoolId,
    replica_id: &'a ReplicaId,
    url: Option<&'a BaseUrl>,
    routable: bool,
    #[serde(serialize_with = "displayed")]
    reason: Option<Obstacle>,
    since_ms: u64,
    circuit: CircuitView<'a>,
    ready: bool,
    draining: bool,
    generation: u64,
    unconfirmed: bool,
    slots_total: u32,
    slots_free: u32,
    in_flight: u32,
    models: &'a [String],
    engine: Option<&'a str>,
    engine_version: Option<&'a str>,
    device_mask: Option<&'a str>,
    vram_free_bytes: u64,
}

impl<'a> ReplicaView<'a> {
    fn new(replica: &'a Replica, now: Now) -> ReplicaView<'a> {
        let reason = replica.obstacle();
        ReplicaView {
            node_id: &replica.node,
            pool_id: &replica.key.pool,
            replica_id: &replica.key.replica,
            url: replica.target.engine(),
            routable: reason.is_none(),
            reason,
            since_ms: replica.since.unix_ms(),
            circuit: CircuitView::new(&replica.circuit, now),
            ready: replica.ready,
            draining: replica.draining,
            generation: replica.generation,
            unconfirmed: replica.confirmation != Confirmation::Beaten,
            slots_total: replica.slots_total,
            slots_free: replica.slots_free(),
            in_flight: replica.in_flight,
            models: &replica.models,
            engine: replica.engine.as_deref(),
            engine_version: replica.engine_version.as_deref(),
            device_mask: replica.device_mask.as_deref(),
            vram_free_bytes: replica.vram_free_bytes,
        }
    }
}

/// Whether requests reach it, as the control plane's own attempts have shown.
#[derive(Default, Serialize)]
struct CircuitView<'a> {
    state: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    failures: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tried_again_in_ms: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    trying: Option<bool>,
}

impl<'a> CircuitView<'a> {
    fn new(circuit: &'a Circuit, now: Now) -> CircuitView<'a> {
        match circuit {
            Circuit::Closed => CircuitView { state: "closed", ..CircuitView::default() },
            Circuit::Open { until, failures, reason } => CircuitView {
                state: "open",
                failures: Some(*failures),
                reason: Some(reason),
                tried_again_in_ms: Some(until.ms_since(now.mono)),
                trying: None,
            },
            Circuit::HalfOpen { failures, reason, trying, .. } => CircuitView {
                state: "half_open",
                failures: Some(*failures),
                reason: Some(reason),
                tried_again_in_ms: None,
                trying: Some(*trying),
            },
        }
    }
}

/// Text, or null.
fn displayed<S: Serializer>(value: &Option<impl Display>, serializer: S) -> Result<S::Ok, S::Error> {
    match value {
        Some(value) => serializer.collect_str(value),
        None => serializer.serialize_none(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::orchestratord::service_registry::Limits;
    use crate::wire::node::{Heartbeat, RegisterRequest};
    use serde_json::{Value, json};

    /// Nodes with `pools` pools of one replica each; pool `n` has `replicas` on each node.
    fn registry(nodes: usize, pools: usize, replicas: usize) -> ServiceRegistry {
        let mut registry = ServiceRegistry::new(Limits::default(), 1);
        let mut changes = Vec::new();
        for n in 0..nodes {
            let name = format!("n{n:04}");
            let body = json!({"node_id": name, "address": format!("http://{name}:9200")});
            let request: RegisterRequest = serde_json::from_value(body).expect("a registration");
            registry.register(&request, "peer", Now::default(), &mut changes).expect("registered");
            let pools: Vec<Value> = (0..pools)
                .map(|p| {
                    let replica = |r: usize| {
                        json!({"replica_id": format!("r{r}"), "url": "http://127.0.0.1:1", "ready": p != 1,
                            "slots_free": 3, "slots_total": 4, "models": ["m"]})
                    };
                    json!({"pool_id": format!("p{p:02}"),
                        "replicas": (0..replicas).map(replica).collect::<Vec<_>>()})
                })
                .collect();
            let beat: Heartbeat = serde_json::from_value(json!({"pools": pools})).expect("a heartbeat");
            let node = NodeId::new(&name).expect("an id");
            registry.heartbeat(&node, &beat, "peer", Now::default(), &mut changes).expect("accepted");
        }
        registry
    }

    /// Every page of a listing, one after the other.
    fn all(limit: usize, list: &str, show: impl Fn(Page<'_>) -> Response) -> (Vec<Value>, usize) {
        let (mut entries, mut pages, mut after) = (Vec::new(), 0, None::<String>);
        loop {
            let response = show(Page { limit, after: after.as_deref() });
            let body: Value = serde_json::from_slice(&response.body).expect("JSON");
            let listed = body[list].as_array().expect("a list").clone();
            assert!(listed.len() <= limit);
            entries.extend(listed);
            pages += 1;
            match body.get("next") {
                Some(next) => after = Some(next.as_str().expect("an id").to_string()),
                None => {
                    assert_eq!(body["count"].as_u64(), Some(entries.len() as u64));
                    return (entries, pages);
                }
            }
        }
    }

    #[test]
    fn pages_of_nodes_are_the_whole() {
        let registry = registry(25, 2, 1);
        let poller = Poller::new(&[], 1_000, 1, Now::default());
        for (limit, pages) in [(1, 25), (10, 3), (25, 1), (1_000, 1)] {
            let show = |page: Page<'_>| nodes(&registry, &poller, Some("online"), page, Now::default());
            let (listed, seen) = all(limit, "nodes", show);
            assert_eq!((listed.len(), seen), (25, pages), "pages of {limit}");
            assert_eq!(listed[24]["node_id"], "n0024");
            assert_eq!(listed[3]["replicas"][0]["slots_free"], 3);
        }
        let page = Page { limit: 5, after: None };
        let none = nodes(&registry, &poller, Some("offline"), page, Now::default());
        let none: Value = serde_json::from_slice(&none.body).expect("JSON");
        assert_eq!((&none["count"], &none["polled"], none.get("next")), (&json!(0), &json!([]), None));
    }

    #[test]
    fn pages_of_pools_are_the_whole_and_add_up() {
        let registry = registry(6, 5, 2);
        for (limit, pages) in [(1, 5), (2, 3), (5, 1)] {
            let (listed, seen) = all(limit, "pools", |page| super::pools(&registry, page, Now::default()));
            assert_eq!((listed.len(), seen), (5, pages), "pages of {limit}");
            let (ready, unready) = (&listed[0], &listed[1]);
            assert_eq!(
                (&ready["slots_total"], &ready["slots_free"], &ready["ready"]),
                (&json!(48), &json!(36), &json!(true))
            );
            assert_eq!(
                (&unready["slots_total"], &unready["ready"], &unready["live"]),
                (&json!(0), &json!(false), &json!(false))
            );
            assert_eq!(
                (ready["nodes"].as_array().map(Vec::len), ready["replicas"].as_array().map(Vec::len)),
                (Some(6), Some(12))
            );
            assert!(unready["replicas"][0]["reason"].as_str().is_some_and(|why| why.contains("not ready")));
        }
    }

    #[test]
    fn pages_with_many_replicas_are_short() {
        let registry = registry(90, 3, 30);
        let (listed, pages) = all(PAGE_MAX, "pools", |page| super::pools(&registry, page, Now::default()));
        assert_eq!((listed.len(), pages), (3, 2), "two pools of 2,700 replicas, then the third");
    }
}
