//! The node agent: `pool-managerd`.

pub mod membership;
