//! What the control plane remembers over a restart: who registered, and which engines they had.
//!
//! ```text
//!   registry ──saved()──▶ Pieces ──Writer──▶ the file ──read()──▶ Saved ──restore()──▶ registry
//! ```
//!
//! The file is a help, never an authority: whatever it says is in doubt until the node itself has been
//! heard, and a control plane without it merely waits for the first heartbeats. So a file that is not
//! understood as a whole is not used at all. It holds no secrets, but addresses and names of models.
//!
//! What is written comes in [`Piece`]s of a few nodes, one a turn of the loop, so that thousands of nodes
//! hold up nobody; each node is whole, and as it was when its piece was made. Turning them into text is
//! done elsewhere than on the loop.

use std::collections::BTreeSet;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::time::Wall;
use crate::wire::id::{NodeId, PoolId, ReplicaId, ReplicaKey};
use crate::wire::node::{Capabilities, POOLS_MAX};
use crate::wire::url::BaseUrl;

use super::service_registry::{
    GPUS_MAX, Limits, MODEL_BYTES_MAX, MODELS_MAX, NODE_REPLICAS_MAX, REPLICAS_TOTAL_MAX,
};

/// Name of the file in the state directory.
pub const FILE_NAME: &str = "registry.json";
/// The shape that this version writes, and the only one that it reads.
const VERSION: u32 = 1;

/// The file's contents.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Saved {
    version: u32,
    /// When it was written, in milliseconds since the Unix epoch.
    written_ms: u64,
    /// The nodes, by name.
    pub nodes: Vec<SavedNode>,
}

/// One node, with what changes without anything else changing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedNode {
    /// What it was last known to do.
    pub standing: Standing,
    /// When it last sent a heartbeat, in milliseconds since the Unix epoch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub heard_ms: Option<u64>,
    /// The rest.
    pub node: NodeRecord,
}

/// A part of what is to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// It is the first part, and that was begun at this time.
    pub begins: Option<Wall>,
    /// The next nodes, by name.
    pub nodes: Vec<SavedNode>,
    /// It is the last part.
    pub ends: bool,
}

/// Makes the file's text out of pieces.
#[derive(Debug, Default)]
pub struct Writer {
    has_nodes: bool,
}

impl Writer {
    /// The text of the next piece.
    pub fn text(&mut self, piece: &Piece) -> Vec<u8> {
        let mut text = Vec::new();
        if let Some(at) = piece.begins {
            self.has_nodes = false;
            let head = format!(r#"{{"version":{VERSION},"written_ms":{},"nodes":["#, at.unix_ms());
            text.extend_from_slice(head.as_bytes());
        }
        for node in &piece.nodes {
            if std::mem::replace(&mut self.has_nodes, true) {
                text.push(b',');
            }
            // Writing into memory does not fail, and neither does any of these values.
            let _ = serde_json::to_writer(&mut text, node);
        }
        if piece.ends {
            text.extend_from_slice(b"]}\n");
        }
        text
    }
}

/// What a node was last known to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Standing {
    /// It held a lease.
    Serving,
    /// It held a lease, and asked for no new work.
    Draining,
    /// Its lease had ended.
    Silent,
}

/// A node as it registered, and what its last heartbeat named.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeRecord {
    /// Its name.
    pub id: NodeId,
    /// Its machine's name.
    pub machine_id: String,
    /// Where its agent is reached.
    pub address: BaseUrl,
    /// Version of its agent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// What its machine has.
    #[serde(default)]
    pub capabilities: Arc<Capabilities>,
    /// Start of its agent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub incarnation: Option<u64>,
    /// Boot of its machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot_id: Option<String>,
    /// When it registered, in milliseconds since the Unix epoch.
    #[serde(default)]
    pub registered_ms: u64,
    /// Its pools.
    #[serde(default)]
    pub pools: Vec<PoolRecord>,
    /// Its replicas, by pool and name.
    #[serde(default)]
    pub replicas: Vec<ReplicaRecord>,
}

/// A pool as its node reported it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolRecord {
    /// Its name.
    pub pool: PoolId,
    /// Whether at least one replica took work.
    pub ready: bool,
    /// Whether it took no new work.
    pub draining: bool,
    /// Slots of all its replicas, where the node said so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slots_total: Option<u32>,
    /// Free GPU memory when the record was made, 0 where unknown.
    #[serde(default)]
    pub vram_free_bytes: u64,
    /// Kind of engine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub engine: Option<String>,
    /// Its version.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub engine_version: Option<String>,
    /// Models of its replicas.
    #[serde(default)]
    pub models: Vec<String>,
    /// Whether the node's heartbeats list the replicas.
    pub listed: bool,
}

/// A replica as its node reported it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplicaRecord {
    /// Its pool.
    pub pool: PoolId,
    /// Its name there.
    pub replica: ReplicaId,
    /// The engine process behind the name.
    pub generation: u64,
    /// The engine as its node sees it; `None` where the node was still being asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub url: Option<BaseUrl>,
    /// Whether it took work.
    pub ready: bool,
    /// Whether it took no new work.
    pub draining: bool,
    /// Its node's agent had restarted and not reported it again.
    #[serde(default)]
    pub doubted: bool,
    /// Requests that it serves at once.
    pub slots_total: u32,
    /// Models that it serves.
    pub models: Arc<[String]>,
    /// Kind of engine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub engine: Option<Arc<str>>,
    /// Its version.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub engine_version: Option<Arc<str>>,
    /// GPUs that it uses.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device_mask: Option<Arc<str>>,
    /// Free GPU memory of its pool when the record was made, 0 where unknown.
    #[serde(default)]
    pub vram_free_bytes: u64,
}

impl ReplicaRecord {
    /// Its name within its node.
    #[must_use]
    pub fn key(&self) -> ReplicaKey {
        ReplicaKey { pool: self.pool.clone(), replica: self.replica.clone() }
    }
}

impl Saved {
    /// What is to be remembered, as of `at`.
    #[must_use]
    pub fn new(nodes: Vec<SavedNode>, at: Wall) -> Saved {
        Saved { version: VERSION, written_ms: at.unix_ms(), nodes }
    }

    /// The file's text. Takes long where there are many nodes.
    #[must_use]
    pub fn text(&self) -> Vec<u8> {
        let mut text = serde_json::to_vec(self).unwrap_or_default();
        text.push(b'\n');
        text
    }

    /// Reads the file's bytes. What is older than [`Limits::forget_ms`] is refused: by then every node
    /// would have been forgotten.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn read(bytes: &[u8], limits: &Limits, now: Wall) -> Result<Saved, String> {
        #[derive(Deserialize)]
        struct Versioned {
            version: u32,
        }
        let read: Result<Saved, _> = serde_json::from_slice(bytes);
        // Another version may have another shape; its number says more than the first missing field.
        let version = match &read {
            Ok(saved) => Some(saved.version),
            Err(_) => serde_json::from_slice::<Versioned>(bytes).ok().map(|head| head.version),
        };
        if let Some(version) = version.filter(|version| *version != VERSION) {
            return Err(format!("it has version {version}, and this program reads {VERSION}"));
        }
        let saved = read.map_err(|error| error.to_string())?;
        let age_ms = saved.age_ms(now);
        if age_ms > limits.forget_ms {
            return Err(format!("it was written {} h ago", age_ms / 3_600_000));
        }
        saved.check(limits)?;
        Ok(saved)
    }

    /// Milliseconds since it was written; 0 where the clock has been set back since.
    #[must_use]
    pub fn age_ms(&self, now: Wall) -> u64 {
        now.unix_ms().saturating_sub(self.written_ms)
    }

    /// Holds the counts against the limits of what the registry would have taken from nodes.
    fn check(&self, limits: &Limits) -> Result<(), String> {
        within("nodes", self.nodes.len(), limits.nodes_max)?;
        let mut ids = BTreeSet::new();
        let mut total = 0;
        for SavedNode { node, .. } in &self.nodes {
            if !ids.insert(&node.id) {
                return Err(format!("it names node {} twice", node.id));
            }
            total += node.replicas.len();
            node.check().map_err(|why| format!("node {}: {why}", node.id))?;
        }
        within("replicas", total, REPLICAS_TOTAL_MAX)
    }
}

impl NodeRecord {
    fn check(&self) -> Result<(), String> {
        within("pools", self.pools.len(), POOLS_MAX)?;
        within("GPUs", self.capabilities.gpus.len(), GPUS_MAX)?;
        within("replicas", self.replicas.len(), NODE_REPLICAS_MAX)?;
        let mut keys = BTreeSet::new();
        for replica in &self.replicas {
            if !keys.insert((&replica.pool, &replica.replica)) {
                return Err(format!("replica {} stands there twice", replica.key()));
            }
            check_models(&replica.models)?;
        }
        self.pools.iter().try_for_each(|pool| check_models(&pool.models))
    }
}

fn check_models(models: &[String]) -> Result<(), String> {
    within("models", models.len(), MODELS_MAX)?;
    let longest = models.iter().map(String::len).max().unwrap_or(0);
    within("bytes in the name of a model", longest, MODEL_BYTES_MAX)
}

fn within(what: &str, count: usize, limit: usize) -> Result<(), String> {
    if count > limit { Err(format!("{count} {what}, and at most {limit} are taken")) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const AT: Wall = Wall(1_700_000_000_000_000_000);

    fn node(n: usize) -> SavedNode {
        let record = serde_json::json!({
            "id": format!("n{n}"), "machine_id": "m", "address": "http://10.0.0.1:9200", "incarnation": 7,
            "pools": [{"pool": "p", "ready": true, "draining": false, "listed": true}],
            "replicas": [{"pool": "p", "replica": "r", "generation": 3, "url": "http://127.0.0.1:1",
                "ready": true, "draining": false, "slots_total": 4, "models": ["m"]}],
        });
        let node = serde_json::from_value(record).expect("a record");
        SavedNode { standing: Standing::Serving, heard_ms: Some(5), node }
    }

    fn read(text: &[u8]) -> Result<Saved, String> {
        Saved::read(text, &Limits::default(), AT)
    }

    #[test]
    fn another_version_is_named_whatever_its_shape() {
        for text in [r#"{"version":2,"cluster":{}}"#, r#"{"version":0,"written_ms":1,"nodes":[]}"#] {
            let why = read(text.as_bytes()).expect_err("another version");
            assert!(why.contains("version") && why.contains("reads 1"), "{why}");
        }
        for foreign in ["", "[]", "{}", r#"{"version":1,"handoffs":[]}"#, r#"{"nodes":[],"written_ms":1}"#] {
            assert!(!read(foreign.as_bytes()).expect_err(foreign).is_empty());
        }
    }

    #[test]
    fn what_is_too_old_is_refused_and_a_clock_set_back_is_not() {
        let text = Saved::new(vec![node(0)], AT).text();
        let limits = Limits::default();
        let at = |ms: u64| Wall(AT.0 + ms * 1_000_000);
        assert!(Saved::read(&text, &limits, at(limits.forget_ms)).is_ok());
        let why = Saved::read(&text, &limits, at(limits.forget_ms + 1)).expect_err("too old");
        assert!(why.contains("24 h ago"), "{why}");
        assert!(Saved::read(&text, &limits, Wall(0)).is_ok(), "written in what is now the future");
    }

    #[test]
    fn what_no_registry_would_have_held_is_refused() {
        let refused = |nodes: Vec<SavedNode>, part: &str| {
            let why = read(&Saved::new(nodes, AT).text()).expect_err(part);
            assert!(why.contains(part), "{why}");
        };
        let changed = |change: &dyn Fn(&mut NodeRecord)| {
            let mut saved = node(0);
            change(&mut saved.node);
            vec![saved]
        };
        refused(vec![node(1), node(1)], "n1 twice");
        refused((0..=Limits::default().nodes_max).map(node).collect(), "10001 nodes");
        refused(changed(&|n| n.replicas.push(n.replicas[0].clone())), "p/r stands there twice");
        refused(changed(&|n| n.pools = vec![n.pools[0].clone(); POOLS_MAX + 1]), "257 pools");
        let many = || (0..=NODE_REPLICAS_MAX).map(|i| ReplicaId::new(&i.to_string()).expect("an id"));
        let copies = |n: &NodeRecord| {
            many().map(|replica| ReplicaRecord { replica, ..n.replicas[0].clone() }).collect()
        };
        refused(changed(&|n| n.replicas = copies(n)), "4097 replicas");
        refused(changed(&|n| n.replicas[0].models = vec!["m".into(); MODELS_MAX + 1].into()), "257 models");
        refused(changed(&|n| n.pools[0].models = vec!["x".repeat(MODEL_BYTES_MAX + 1)]), "name of a model");
    }

    proptest! {
        /// Whatever a disk or a person did to the file: refused with a reason, or understood; no panic.
        #[test]
        fn damaged_text_is_refused_with_a_reason(
            nodes in 1usize..4,
            damage in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
            end in any::<prop::sample::Index>(),
        ) {
            let mut text = Saved::new((0..nodes).map(node).collect(), AT).text();
            let whole = text.len() - 1;
            let cut = end.index(whole);
            prop_assert!(!read(&text[..cut]).expect_err("an end is missing").is_empty());
            for (at, byte) in damage {
                let at = at.index(text.len());
                text[at] = byte;
            }
            if let Err(why) = read(&text) {
                prop_assert!(!why.is_empty());
            }
        }

        #[test]
        fn random_bytes_are_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(read(&bytes).is_err());
        }
    }
}
