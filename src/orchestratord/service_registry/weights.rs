//! What nodes take of memory by what they tell of themselves. Counts alone do not limit that: a model's name may be
//! one letter or half a kilobyte, and a replica may have one or hundreds.
//!
//! Each part is weighed as it comes, by the length of its texts and what holds them. The sum over all nodes has a
//! limit, and whoever would pass it is refused and stays what it was. A node that tells less than before is never
//! refused.

use crate::wire::gpu_load::GpuLoad;
use crate::wire::node::{PoolBeat, RegisterRequest};

use super::{Fenced, ServiceRegistry};
use crate::orchestratord::saved::NodeRecord;

/// Most bytes of all nodes: far above what ten thousand ordinary nodes tell.
pub const BYTES_MAX: usize = 256 << 20;
/// A node with its short texts.
const NODE_BYTES: usize = 2 * 1024;
/// A GPU beside its name.
const GPU_BYTES: usize = 128;
/// A pool beside its models.
const POOL_BYTES: usize = 384;
/// A replica in all tables, beside its address and models.
const REPLICA_BYTES: usize = 640;
/// A name beside its letters.
const NAME_BYTES: usize = 32;

/// What one node takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Weight {
    /// By its registration.
    pub(super) registered: usize,
    /// By its pools and replicas.
    pub(super) pools: usize,
    /// By how its GPUs are used.
    pub(super) gpu_loads: usize,
}

impl Weight {
    pub(super) fn total(self) -> usize {
        self.registered + self.pools + self.gpu_loads
    }
}

fn names<'a>(names: impl IntoIterator<Item = &'a String>) -> usize {
    names.into_iter().map(|name| NAME_BYTES + name.len()).sum()
}

pub(super) fn of_registration(request: &RegisterRequest) -> usize {
    let gpus = request.capabilities.gpus.iter();
    let gpus: usize = gpus.map(|gpu| GPU_BYTES + gpu.name.len() + gpu.compute_capability.len()).sum();
    NODE_BYTES + gpus + request.pools.len() * POOL_BYTES
}

pub(super) fn of_pools(pools: &[PoolBeat]) -> usize {
    let of_replicas = |pool: &PoolBeat| -> usize {
        let replicas = pool.replicas.as_deref().unwrap_or_default().iter();
        replicas.map(|r| REPLICA_BYTES + r.url.host().len() + r.url.path().len() + names(&r.models)).sum()
    };
    pools.iter().map(|pool| POOL_BYTES + names(&pool.models_available) + of_replicas(pool)).sum()
}

pub(super) fn of_gpu_loads(loads: &[GpuLoad]) -> usize {
    std::mem::size_of_val(loads)
}

pub(super) fn of_record(record: &NodeRecord) -> Weight {
    let gpus = record.capabilities.gpus.iter();
    let gpus: usize = gpus.map(|gpu| GPU_BYTES + gpu.name.len() + gpu.compute_capability.len()).sum();
    let pools: usize = record.pools.iter().map(|pool| POOL_BYTES + names(&pool.models)).sum();
    let replicas: usize = record.replicas.iter().map(|r| REPLICA_BYTES + names(r.models.iter())).sum();
    Weight { registered: NODE_BYTES + gpus, pools: pools + replicas, gpu_loads: 0 }
}

impl ServiceRegistry {
    /// What all nodes take, in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Whether a node, known or new, may weigh so much.
    pub(super) fn check_weight(&self, index: Option<usize>, new: Weight) -> Result<(), Fenced> {
        let old = index.map_or(0, |index| self.nodes[index].weight.total());
        let limit = self.limits.bytes_max;
        if new.total() > old && self.bytes - old + new.total() > limit {
            return Err(Fenced::TooMany { what: "bytes of what nodes tell", limit });
        }
        Ok(())
    }

    /// A node weighs so much from now on.
    pub(super) fn weighs(&mut self, index: usize, new: Weight) {
        let old = std::mem::replace(&mut self.nodes[index].weight, new);
        self.bytes = self.bytes - old.total() + new.total();
    }
}

#[cfg(test)]
mod tests {
    use super::super::Limits;
    use super::*;
    use crate::time::{Mono, Now, Wall};
    use crate::wire::id::NodeId;
    use crate::wire::node::Heartbeat;

    fn now() -> Now {
        Now { mono: Mono(1), wall: Wall(1) }
    }

    fn register(registry: &mut ServiceRegistry, name: &str, gpus: usize) -> Result<(), Fenced> {
        let gpu = serde_json::json!({"device_id": 0, "name": "x".repeat(100)});
        let request = serde_json::json!({
            "node_id": name, "address": "http://10.0.0.1:9200", "capabilities": {"gpus": vec![gpu; gpus]},
        });
        let request: RegisterRequest = serde_json::from_value(request).expect("a registration");
        registry.register(&request, "10.0.0.1", now(), &mut Vec::new()).map(|_| ())
    }

    fn beat(registry: &mut ServiceRegistry, name: &str, models: usize) -> Result<(), Fenced> {
        let names: Vec<String> = (0..models).map(|n| format!("{n:0500}")).collect();
        let replica = serde_json::json!({"replica_id": "r", "url": "http://127.0.0.1:1", "ready": true,
            "slots_free": 1, "slots_total": 1, "models": names});
        let beat = serde_json::json!({"pools": [{"pool_id": "p", "replicas": [replica]}]});
        let beat: Heartbeat = serde_json::from_value(beat).expect("a heartbeat");
        let name = NodeId::new(name).expect("an id");
        registry.heartbeat(&name, &beat, "10.0.0.1", now(), &mut Vec::new()).map(|_| ())
    }

    #[test]
    fn whoever_would_pass_the_limit_is_refused_and_stays_what_it_was() {
        let limits = Limits { bytes_max: 100_000, ..Limits::default() };
        let mut registry = ServiceRegistry::new(limits, 1);
        register(&mut registry, "a", 2).expect("little");
        let alone = registry.bytes();
        beat(&mut registry, "a", 100).expect("half of what there is");
        let much = registry.bytes();
        assert!(much > alone + 50_000, "{much}");
        register(&mut registry, "b", 0).expect("little");
        let both = registry.bytes();
        let refused = beat(&mut registry, "b", 100).expect_err("too much together");
        assert!(refused.to_string().contains("100000 bytes of what nodes tell"), "{refused}");
        assert_eq!(registry.bytes(), both);
        assert!(register(&mut registry, "c", 200).is_err() && registry.nodes_len() == 2);
        // The same again, and less, is no more than before.
        beat(&mut registry, "a", 100).expect("the same");
        beat(&mut registry, "a", 1).expect("less");
        beat(&mut registry, "b", 100).expect("there is room now");
        for name in ["a", "b"] {
            let name = NodeId::new(name).expect("an id");
            registry.deregister(&name, None, now(), &mut Vec::new()).expect("known");
        }
        assert_eq!(registry.bytes(), 0);
    }

    #[test]
    fn the_use_of_gpus_weighs_what_the_last_message_told_of_it() {
        let mut registry = ServiceRegistry::new(Limits { bytes_max: 20_000, ..Limits::default() }, 1);
        register(&mut registry, "a", 0).expect("little");
        let node = NodeId::new("a").expect("an id");
        let mut tell = |gpus: usize| {
            let loads: Vec<_> = (0..gpus).map(|n| serde_json::json!({"device_id": n})).collect();
            let beat = serde_json::json!({"pools": [], "gpu_loads": loads});
            let beat: Heartbeat = serde_json::from_value(beat).expect("a heartbeat");
            let told = registry.heartbeat(&node, &beat, "10.0.0.1", now(), &mut Vec::new()).map(|_| ());
            (told, registry.bytes(), registry.node(&node).expect("known").gpu_loads.len())
        };
        let (_, alone, _) = tell(0);
        let (told, bytes, known) = tell(200);
        assert!(told.is_ok() && bytes >= alone + 200 * size_of::<GpuLoad>() && known == 200, "{bytes}");
        let (told, same, known) = tell(crate::wire::gpu_load::GPU_LOADS_MAX + 1);
        assert!(told.is_err() && same == bytes && known == 200, "more than a machine has");
        assert_eq!(tell(0), (Ok(()), alone, 0));
    }

    #[test]
    fn what_is_restored_weighs_as_much_as_before() {
        let mut registry = ServiceRegistry::new(Limits::default(), 1);
        register(&mut registry, "a", 3).expect("little");
        beat(&mut registry, "a", 20).expect("little");
        let mut restored = ServiceRegistry::new(Limits::default(), 2);
        restored.restore(&registry.saved(Wall(1)), now(), &mut Vec::new());
        let (before, after) = (registry.bytes(), restored.bytes());
        assert!(before.abs_diff(after) < 200, "{before} and {after}");
        let limits = Limits { bytes_max: after - 1, ..Limits::default() };
        let mut small = ServiceRegistry::new(limits, 3);
        small.restore(&registry.saved(Wall(1)), now(), &mut Vec::new());
        assert_eq!((small.nodes_len(), small.bytes()), (0, 0), "no room for it");
    }
}
