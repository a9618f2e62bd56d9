//! The control plane: which nodes and replicas exist, where a request goes, who waits.

pub mod admission;
pub mod placement;
pub mod replica_table;
pub mod service_registry;
