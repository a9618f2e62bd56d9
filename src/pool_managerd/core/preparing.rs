//! What provisioners of this machine tell of pools that they prepare: passed on to control planes, at once where
//! a step begins or ends, and with the next heartbeat where it only went on. Pure.

use crate::wire::id::PoolId;
use crate::wire::preparation::PoolPreparation;

/// A step that went on by so many percent is worth a heartbeat of its own.
const NEWS_PERCENT: u64 = 10;

/// The pools that are being prepared.
#[derive(Debug, Default)]
pub(super) struct Preparing {
    pools: Vec<PoolPreparation>,
    /// Grows with everything that is to be told at once.
    revision: u64,
}

impl Preparing {
    /// Takes what is under way now.
    pub(super) fn set(&mut self, pools: Vec<PoolPreparation>) {
        if self.pools == pools {
            return;
        }
        self.revision += u64::from(!gist(&self.pools).eq(gist(&pools)));
        self.pools = pools;
    }

    /// See [`Preparing`].
    pub(super) fn revision(&self) -> u64 {
        self.revision
    }

    /// The pools, and what is done for each.
    pub(super) fn pools(&self) -> &[PoolPreparation] {
        &self.pools
    }

    /// Whether it is one of them.
    pub(super) fn has(&self, pool: &PoolId) -> bool {
        self.pools.iter().any(|preparation| preparation.pool_id == *pool)
    }
}

/// What somebody waits to hear of.
fn gist(pools: &[PoolPreparation]) -> impl Iterator<Item = (&PoolId, &str, &str, &str, Option<u64>)> {
    pools.iter().flat_map(|pool| {
        let share = |pct: Option<u64>| pct.map(|pct| pct / NEWS_PERCENT);
        let steps = pool.steps.iter();
        steps.map(move |one| {
            (&pool.pool_id, one.kind.as_str(), one.id.as_str(), one.status.as_str(), share(one.pct))
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::preparation::PreparationStep;

    #[test]
    fn what_only_goes_on_is_no_news_until_it_went_on_by_a_tenth() {
        let pool = |status: &str, pct| PoolPreparation {
            pool_id: PoolId::new("p").expect("an id"),
            steps: vec![PreparationStep {
                kind: "model_fetch".into(),
                status: status.into(),
                pct: Some(pct),
                ..PreparationStep::default()
            }],
        };
        let mut preparing = Preparing::default();
        let told = [(0, 1), (0, 1), (9, 1), (10, 2), (19, 2), (100, 3)];
        for (pct, revision) in told {
            preparing.set(vec![pool("running", pct)]);
            assert_eq!(preparing.revision(), revision, "{pct} %");
            assert_eq!(preparing.pools()[0].steps[0].pct, Some(pct));
        }
        preparing.set(vec![pool("completed", 100)]);
        preparing.set(Vec::new());
        assert_eq!((preparing.revision(), preparing.pools().len()), (5, 0));
    }
}
