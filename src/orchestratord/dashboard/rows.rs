//! A node with its replicas and the memory of its GPUs, as a watcher is shown it. Pure.
//!
//! Whatever engines and nodes say is cut to a length, so that no row is without bounds.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use crate::wire::gpu_load::GpuLoad;
use crate::wire::id::{NodeId, PoolId, ReplicaId};
use crate::wire::node::Capabilities;

use super::super::service_registry::{Node, NodeStatus, Obstacle, Replica, ServiceRegistry};

/// Replicas of one node that are shown; of further ones, only their number.
pub const REPLICAS_SHOWN_MAX: usize = 128;
/// Models of one replica that are shown.
const MODELS_SHOWN_MAX: usize = 3;
/// Longest text that is shown, in characters: a sentence.
const TEXT_CHARS_MAX: usize = 240;
/// Longest name that is shown, in characters.
const NAME_CHARS_MAX: usize = 96;

/// A node.
#[derive(Debug, Serialize)]
pub struct NodeRow<'a> {
    id: &'a NodeId,
    status: &'static str,
    takes_work: bool,
    reason: String,
    since_ms: u64,
    address: Option<String>,
    version: Option<String>,
    /// Each GPU whose agent tells its memory; of other agents, those that a pool uses together.
    memory: Vec<Memory<'a>>,
    replicas: Vec<ReplicaRow<'a>>,
    /// Replicas that are not shown.
    hidden: usize,
}

/// The memory of some GPUs.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Memory<'a> {
    gpus: Vec<u32>,
    name: String,
    total_bytes: u64,
    /// `None` where nobody uses them, or nobody told.
    free_bytes: Option<u64>,
    pools: BTreeSet<&'a PoolId>,
    /// Share of time in which it computed, in percent.
    #[serde(skip_serializing_if = "Option::is_none")]
    utilization_percent: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    temperature_celsius: Option<u32>,
}

#[derive(Debug, Serialize)]
struct ReplicaRow<'a> {
    pool: &'a PoolId,
    id: &'a ReplicaId,
    state: &'static str,
    reason: Option<String>,
    since_ms: u64,
    slots: u32,
    free: u32,
    running: u32,
    models: Vec<String>,
    models_more: usize,
    engine: Option<String>,
    devices: Option<String>,
}

/// Sums over replicas.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Sums {
    /// All of them.
    pub replicas: u64,
    /// Those that take work.
    pub routable: u64,
    /// Slots of those that take work.
    pub slots: u64,
    /// Of these, free.
    pub free: u64,
}

impl Sums {
    /// Adds a node's replicas. Returns how many they are.
    pub fn add(&mut self, registry: &ServiceRegistry, node: &Node) -> usize {
        let mut count = 0;
        for replica in registry.replicas_of(node).filter_map(|replica| registry.replica(replica)) {
            count += 1;
            self.replicas += 1;
            if replica.obstacle().is_none() {
                self.routable += 1;
                self.slots += u64::from(replica.slots_total);
                self.free += u64::from(replica.slots_free());
            }
        }
        count
    }
}

impl<'a> NodeRow<'a> {
    /// What is known of a node.
    #[must_use]
    pub fn new(registry: &'a ServiceRegistry, node: &'a Node) -> NodeRow<'a> {
        let known: Vec<&Replica> =
            registry.replicas_of(node).filter_map(|replica| registry.replica(replica)).collect();
        NodeRow {
            id: &node.id,
            status: node.status.as_str(),
            takes_work: node.status.takes_work(),
            reason: cut(&node.reason, TEXT_CHARS_MAX),
            since_ms: node.since.unix_ms(),
            address: node.address.as_ref().map(|address| cut(&address.to_string(), NAME_CHARS_MAX)),
            version: node.version.as_deref().map(|version| cut(version, NAME_CHARS_MAX)),
            memory: memory(&node.capabilities, loads(node), &known),
            replicas: known.iter().take(REPLICAS_SHOWN_MAX).map(|known| ReplicaRow::new(known)).collect(),
            hidden: known.len().saturating_sub(REPLICAS_SHOWN_MAX),
        }
    }
}

impl<'a> ReplicaRow<'a> {
    fn new(replica: &'a Replica) -> ReplicaRow<'a> {
        let obstacle = replica.obstacle();
        let shown = replica.models.len().min(MODELS_SHOWN_MAX);
        ReplicaRow {
            pool: &replica.key.pool,
            id: &replica.key.replica,
            state: word(obstacle.as_ref()),
            reason: obstacle.map(|obstacle| cut(&obstacle.to_string(), TEXT_CHARS_MAX)),
            since_ms: replica.since.unix_ms(),
            slots: replica.slots_total,
            free: replica.slots_free(),
            running: replica.in_flight,
            models: replica.models[..shown].iter().map(|model| cut(model, NAME_CHARS_MAX)).collect(),
            models_more: replica.models.len() - shown,
            engine: replica.engine.as_deref().map(|engine| cut(engine, NAME_CHARS_MAX)),
            devices: replica.device_mask.as_deref().map(|mask| cut(mask, NAME_CHARS_MAX)),
        }
    }
}

/// What keeps a replica from work, in a word.
fn word(obstacle: Option<&Obstacle>) -> &'static str {
    match obstacle {
        None => "routable",
        Some(Obstacle::Draining) => "draining",
        Some(Obstacle::Trying(_) | Obstacle::TryingRestored) => "trying",
        Some(Obstacle::Unconfirmed | Obstacle::AddressUnknown) => "awaited",
        Some(Obstacle::CircuitOpen(_)) => "failed",
        Some(Obstacle::Node(..)) => "node",
        Some(Obstacle::NotReady(_) | Obstacle::AddressForbidden | Obstacle::NoSlots) => "out",
    }
}

/// How a node's GPUs are used now: of one that is silent nothing is known any more.
fn loads(node: &Node) -> &[GpuLoad] {
    match node.status {
        NodeStatus::Suspect | NodeStatus::Offline => &[],
        NodeStatus::Registering | NodeStatus::Online | NodeStatus::Draining => &node.gpu_loads,
    }
}

/// A bar for each GPU whose free memory is told. Agents that tell none of it tell it per pool, over all GPUs of
/// the pool: these are shown together.
fn memory<'a>(machine: &Capabilities, loads: &[GpuLoad], replicas: &[&'a Replica]) -> Vec<Memory<'a>> {
    let told: BTreeMap<u32, &GpuLoad> = loads.iter().rev().map(|load| (load.device_id, load)).collect();
    let is_told = |gpu: &u32| told.get(gpu).is_some_and(|load| load.memory().is_some());
    let mut of_pool: BTreeMap<&PoolId, (BTreeSet<u32>, u64)> = BTreeMap::new();
    for replica in replicas {
        let (gpus, free_bytes) = of_pool.entry(&replica.key.pool).or_default();
        gpus.extend(replica.device_mask.as_deref().into_iter().flat_map(numbers));
        *free_bytes = (*free_bytes).max(replica.vram_free_bytes);
    }
    let mut of_gpus: BTreeMap<BTreeSet<u32>, (u64, BTreeSet<&PoolId>)> = BTreeMap::new();
    for (pool, (gpus, free_bytes)) in of_pool {
        let is_known = |gpu: &u32| is_told(gpu) || machine.gpus.iter().any(|known| known.device_id == *gpu);
        if gpus.is_empty() || !gpus.iter().all(is_known) {
            continue;
        }
        let each: Vec<BTreeSet<u32>> = match gpus.iter().all(is_told) {
            true => gpus.into_iter().map(|gpu| BTreeSet::from([gpu])).collect(),
            false => vec![gpus],
        };
        for gpus in each {
            let (most, pools) = of_gpus.entry(gpus).or_default();
            *most = (*most).max(free_bytes);
            pools.insert(pool);
        }
    }
    let used: BTreeSet<u32> = of_gpus.keys().flatten().copied().collect();
    let all = machine.gpus.iter().map(|gpu| gpu.device_id).chain(told.keys().copied());
    for gpu in all.filter(|gpu| !used.contains(gpu)) {
        of_gpus.entry(BTreeSet::from([gpu])).or_default();
    }
    let described = of_gpus.into_iter().map(|(gpus, (free_bytes, pools))| {
        let infos = machine.gpus.iter().filter(|gpu| gpus.contains(&gpu.device_id));
        let total_bytes = infos.clone().fold(0u64, |sum, gpu| sum.saturating_add(gpu.vram_total_bytes));
        let alone = gpus.first().filter(|_| gpus.len() == 1).and_then(|gpu| told.get(gpu));
        let of_pools = !pools.is_empty() && free_bytes > 0 && free_bytes <= total_bytes;
        let (total_bytes, free_bytes) = match alone.and_then(|load| load.memory()) {
            Some((total_bytes, free_bytes)) => (total_bytes, Some(free_bytes)),
            None => (total_bytes, of_pools.then_some(free_bytes)),
        };
        Memory {
            name: infos.map(|gpu| gpu.name.as_str()).next().map_or(String::new(), |name| cut(name, 64)),
            gpus: gpus.into_iter().collect(),
            total_bytes,
            free_bytes,
            pools,
            utilization_percent: alone.and_then(|load| load.utilization_percent),
            temperature_celsius: alone.and_then(|load| load.temperature_celsius),
        }
    });
    described.collect()
}

/// The numbers in a device mask: `0,1` and `GPU0` have some, a UUID has none.
fn numbers(mask: &str) -> impl Iterator<Item = u32> + '_ {
    mask.split(',').filter_map(|part| {
        let part = part.trim();
        part.strip_prefix("GPU").unwrap_or(part).parse().ok()
    })
}

fn cut(text: &str, chars_max: usize) -> String {
    match text.char_indices().nth(chars_max) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_string(),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::orchestratord::service_registry::Limits;
    use crate::time::Now;
    use crate::wire::node::{Heartbeat, RegisterRequest};
    use serde_json::{Value, json};

    /// Registers a node and lets it beat once.
    pub(in super::super) fn join(
        registry: &mut ServiceRegistry,
        id: &str,
        gpus: Value,
        pools: Value,
        seq: u64,
    ) {
        let node = NodeId::new(id).expect("an id");
        let mut changes = Vec::new();
        if registry.node(&node).is_none() {
            let register: RegisterRequest = serde_json::from_value(json!({
                "node_id": id, "machine_id": id, "address": "http://10.0.0.1:9200", "pools": [],
                "capabilities": {"gpus": gpus}, "incarnation": 1,
            }))
            .expect("a registration");
            registry.register(&register, "10.0.0.1", Now::default(), &mut changes).expect("registered");
        }
        let beat: Heartbeat = serde_json::from_value(json!({
            "timestamp": "2026-01-01T00:00:00Z", "incarnation": 1, "seq": seq, "pools": pools,
        }))
        .expect("a heartbeat");
        registry.heartbeat(&node, &beat, "10.0.0.1", Now::default(), &mut changes).expect("beaten");
    }

    pub(in super::super) fn pool(id: &str, masks: &[&str], free_bytes: u64) -> Value {
        let replicas: Vec<Value> = masks
            .iter()
            .enumerate()
            .map(|(n, mask)| {
                json!({"replica_id": format!("r{n}"), "url": format!("http://127.0.0.1:{}", 8000 + n),
                    "ready": true, "slots_total": 4, "slots_free": 4, "generation": 1, "device_mask": mask})
            })
            .collect();
        json!({"pool_id": id, "ready": true, "draining": false, "slots_free": 4, "slots_total": 4,
            "vram_free_bytes": free_bytes, "models_available": [], "replicas": replicas})
    }

    fn row(gpus: Value, pools: Value) -> Value {
        let mut registry = ServiceRegistry::new(Limits::default(), 1);
        join(&mut registry, "n", gpus, pools, 1);
        let node = registry.nodes().next().expect("a node");
        serde_json::to_value(NodeRow::new(&registry, node)).expect("JSON")
    }

    fn gpu(n: u32) -> Value {
        json!({"device_id": n, "name": "A100", "vram_total_bytes": 80, "compute_capability": "8.0"})
    }

    #[test]
    fn memory_is_told_for_the_gpus_that_a_pool_uses_together() {
        let pools = json!([pool("a", &["0", "1"], 60), pool("b", &["GPU2"], 10)]);
        let shown = row(json!([gpu(0), gpu(1), gpu(2), gpu(3)]), pools);
        let told: Vec<String> = shown["memory"]
            .as_array()
            .expect("a list")
            .iter()
            .map(|m| format!("{} {} {}", m["gpus"], m["total_bytes"], m["free_bytes"]))
            .collect();
        assert_eq!(told, ["[0,1] 160 60", "[2] 80 10", "[3] 80 null"]);
    }

    #[test]
    fn each_gpu_whose_use_is_told_has_a_bar_of_its_own_until_its_node_is_silent() {
        let mut registry = ServiceRegistry::new(Limits::default(), 1);
        let pools = json!([pool("a", &["0", "1"], 60), pool("b", &["1"], 10), pool("c", &["3"], 30)]);
        join(&mut registry, "n", json!([gpu(0), gpu(1), gpu(2), gpu(3)]), pools.clone(), 1);
        let load =
            |n: u32, free: u64| json!({"device_id": n, "vram_total_bytes": 80, "vram_free_bytes": free});
        let mut loads =
            json!([load(0, 20), load(1, 30), load(2, 80), {"device_id": 3, "utilization_percent": 7}]);
        // One that the registration did not name is shown too.
        loads.as_array_mut().expect("a list").push(load(5, 90));
        let beat: Heartbeat =
            serde_json::from_value(json!({"incarnation": 1, "seq": 2, "pools": pools, "gpu_loads": loads}))
                .expect("a heartbeat");
        let node = NodeId::new("n").expect("an id");
        let now = Now::default();
        registry.heartbeat(&node, &beat, "10.0.0.1", now, &mut Vec::new()).expect("beaten");
        let told = |registry: &ServiceRegistry| -> Vec<String> {
            let node = registry.nodes().next().expect("a node");
            let shown = serde_json::to_value(NodeRow::new(registry, node)).expect("JSON");
            let bar =
                |m: &Value| format!("{} {} {} {}", m["gpus"], m["total_bytes"], m["free_bytes"], m["pools"]);
            shown["memory"].as_array().expect("a list").iter().map(bar).collect()
        };
        let expected = [
            r#"[0] 80 20 ["a"]"#,
            r#"[1] 80 30 ["a","b"]"#,
            "[2] 80 80 []",
            r#"[3] 80 30 ["c"]"#,
            "[5] 0 null []",
        ];
        assert_eq!(told(&registry), expected, "of one that tells only how busy it is, what its pool tells");
        registry.expire(now.plus_ms(60_000), &mut Vec::new());
        assert!(registry.nodes().all(|node| !node.status.takes_work()));
        let silent = ["[0,1] 160 60 [\"a\"]", "[1] 80 10 [\"b\"]", "[2] 80 null []", "[3] 80 30 [\"c\"]"];
        assert_eq!(told(&registry), silent);
    }

    #[test]
    fn masks_of_gpus_that_are_not_there_make_none_up() {
        let shown = row(json!([gpu(0)]), json!([pool("a", &["GPU-77ae", "7"], 60)]));
        assert_eq!(shown["memory"].as_array().map(Vec::len), Some(1));
        assert_eq!(shown["memory"][0]["free_bytes"], Value::Null);
    }

    #[test]
    fn a_row_is_bounded_whatever_a_node_says() {
        let masks: Vec<String> = (0..1000).map(|n| n.to_string()).collect();
        let masks: Vec<&str> = masks.iter().map(String::as_str).collect();
        let mut pools = json!([pool("a", &masks, 60)]);
        for replica in pools[0]["replicas"].as_array_mut().expect("a list") {
            replica["models"] = (0..200).map(|n| format!("{n}{}", "m".repeat(400))).collect();
            replica["ready"] = false.into();
            replica["reason"] = "\u{1F600}".repeat(5_000).into();
        }
        let shown = row(json!([gpu(0)]), pools);
        assert_eq!(
            (shown["hidden"].as_u64(), shown["replicas"][0]["models_more"].as_u64()),
            (Some(872), Some(197))
        );
        assert_eq!(shown["replicas"][0]["state"], "out");
        assert!(shown.to_string().len() < REPLICAS_SHOWN_MAX * 2_000);
    }
}
