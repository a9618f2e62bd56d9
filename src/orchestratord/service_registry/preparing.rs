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
