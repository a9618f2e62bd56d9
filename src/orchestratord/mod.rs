//! The control plane: which nodes and replicas exist, where a request goes, who waits.

pub mod admission;
pub mod config;
pub mod placement;
pub mod refusal;
pub mod replica_table;
pub mod service_registry;
