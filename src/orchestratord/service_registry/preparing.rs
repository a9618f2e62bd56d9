//! Pools that nodes prepare: which of them a request may be waiting for. What a node tells of them is shown and
//! waited for, and decides nothing else.

use crate::orchestratord::placement::Ask;
use crate::wire::id::NodeId;
use crate::wire::preparation::{POOL_STEPS_MAX, PREPARED_POOLS_MAX, PoolPreparation, PreparationStep};

use super::snapshot::cut;
use super::{Node, ServiceRegistry};

impl ServiceRegistry {
    /// What is under way in the pools that could serve `ask`, by node.
    pub fn preparations<'a>(
        &'a self,
        ask: &'a Ask,
    ) -> impl Iterator<Item = (&'a NodeId, &'a PoolPreparation)> {
        self.preparing
            .iter()
            .filter_map(|index| self.nodes.get(*index))
            .filter(|node| node.status.leased() && ask.node.as_ref().is_none_or(|wanted| *wanted == node.id))
            .flat_map(|node| node.preparation.iter().map(move |pool| (node, pool)))
            .filter(|(node, pool)| self.may_serve(node, pool, ask))
            .map(|(node, pool)| (&node.id, pool))
    }

    /// Whether somebody who waits for that may get it soon.
    #[must_use]
    pub fn is_prepared(&self, ask: &Ask) -> bool {
        self.preparations(ask).next().is_some()
    }

    /// Takes what a node tells.
    pub(super) fn set_preparation(&mut self, index: usize, told: &[PoolPreparation]) {
        match told {
            [] => self.preparing.remove(&index),
            _ => self.preparing.insert(index),
        };
        self.nodes[index].preparation = kept(told);
    }

    /// A pool whose models are not known yet may have the one that is asked for.
    fn may_serve(&self, node: &Node, pool: &PoolPreparation, ask: &Ask) -> bool {
        let is_of_pool = ask.pool.as_ref().is_none_or(|wanted| *wanted == pool.pool_id);
        if !is_of_pool || ask.avoid_pools.contains(&pool.pool_id) {
            return false;
        }
        let Some(model) = ask.model.as_ref().filter(|model| !model.is_empty()) else { return true };
        let own = node.replicas.iter().filter(|(key, _)| key.pool == pool.pool_id);
        let mut known = own.filter_map(|(_, replica)| self.table.get(*replica)).peekable();
        known.peek().is_none() || known.any(|own| own.models.is_empty() || own.models.contains(model))
    }
}

/// What is kept of what a node tells: within limits, and with texts that can be shown.
fn kept(told: &[PoolPreparation]) -> Vec<PoolPreparation> {
    let step = |step: &PreparationStep| PreparationStep {
        kind: cut(&step.kind),
        id: cut(&step.id),
        status: cut(&step.status),
        detail: cut(&step.detail),
        ..step.clone()
    };
    let pool = |pool: &PoolPreparation| PoolPreparation {
        pool_id: pool.pool_id.clone(),
        steps: pool.steps.iter().take(POOL_STEPS_MAX).map(step).collect(),
    };
    told.iter().take(PREPARED_POOLS_MAX).map(pool).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::orchestratord::service_registry::Limits;
    use crate::time::Now;
    use crate::wire::id::PoolId;
    use crate::wire::node::Heartbeat;
    use serde_json::{Value, json};

    /// A node that serves `a` in pool `p`, and tells what it prepares.
    fn registry(preparation: &Value) -> ServiceRegistry {
        let mut registry = ServiceRegistry::new(Limits::default(), 1);
        let node = NodeId::new("n").expect("an id");
        let register = json!({"node_id": "n", "address": "http://10.0.0.1:9200"});
        let register = serde_json::from_value(register).expect("a registration");
        let mut changes = Vec::new();
        registry.register(&register, "peer", Now::default(), &mut changes).expect("registered");
        let replica = json!({
            "replica_id": "r0", "url": "http://10.0.0.1:8000", "ready": true, "slots_free": 1, "slots_total": 1, "models": ["a"],
        });
        let beat = json!({"pools": [{"pool_id": "p", "ready": true, "replicas": [replica]}], "preparation": preparation});
        let beat: Heartbeat = serde_json::from_value(beat).expect("a heartbeat");
        registry.heartbeat(&node, &beat, "peer", Now::default(), &mut changes).expect("accepted");
        registry
    }

    fn ask(pool: Option<&str>, model: Option<&str>) -> Ask {
        let pool = pool.map(|name| PoolId::new(name).expect("an id"));
        Ask { pool, model: model.map(String::from), ..Ask::default() }
    }

    #[test]
    fn what_is_prepared_is_shown_to_whom_it_may_serve() {
        let step = json!({"kind": "model_fetch", "status": "running"});
        let told = json!([{"pool_id": "p", "steps": [step]}, {"pool_id": "new", "steps": [step]}]);
        let registry = registry(&told);
        for (pool, model, seen) in [
            (None, None, &["p", "new"][..]),
            (None, Some("a"), &["p", "new"]),
            (None, Some("b"), &["new"]),
            (Some("p"), None, &["p"]),
            (Some("p"), Some("b"), &[]),
            (Some("other"), None, &[]),
        ] {
            let ask = ask(pool, model);
            let found: Vec<&str> =
                registry.preparations(&ask).map(|(_, pool)| pool.pool_id.as_str()).collect();
            assert_eq!(found, seen, "{pool:?} {model:?}");
            assert_eq!(registry.is_prepared(&ask), !seen.is_empty());
        }
        let elsewhere = Ask { node: Some(NodeId::new("m").expect("an id")), ..ask(None, None) };
        assert!(!registry.is_prepared(&elsewhere));
    }

    #[test]
    fn more_than_anybody_needs_is_not_kept() {
        let step = json!({"kind": "k".repeat(9_999), "detail": "a\nb".repeat(9_999), "status": "running"});
        let pool = |n: usize| json!({"pool_id": format!("p{n}"), "steps": vec![step.clone(); 2]});
        let many: Vec<Value> = (0..2 * PREPARED_POOLS_MAX).map(pool).collect();
        let registry = registry(&json!(many));
        let all = ask(None, None);
        assert_eq!(registry.preparations(&all).count(), PREPARED_POOLS_MAX);
        let (_, first) = registry.preparations(&all).next().expect("one");
        assert!(first.steps[0].kind.len() < 1_000 && !first.steps[0].detail.contains('\n'));
        let told: Vec<PoolPreparation> =
            serde_json::from_value(json!([{"pool_id": "p", "steps": vec![step; 2 * POOL_STEPS_MAX]}]))
                .expect("a preparation");
        assert_eq!(kept(&told)[0].steps.len(), POOL_STEPS_MAX);
    }
}
