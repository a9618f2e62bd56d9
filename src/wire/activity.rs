//! What a control plane tells a node's agent of requests that the agent does not see, because they go straight
//! to an engine: `POST /v2/pools/{pool}/replicas/{replica}/activity`. Times are ages, as clocks differ.

use serde::{Deserialize, Serialize};

/// What the requests on one engine have been doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ActivityReport {
    /// The engine's generation.
    pub generation: u64,
    /// Requests whose answers have begun.
    #[serde(default)]
    pub begun: u32,
    /// How long ago the last byte of any of these came, in milliseconds.
    #[serde(default)]
    pub last_byte_age_ms: Option<u64>,
    /// For how long the request has waited that has waited longest for its first byte, in milliseconds.
    #[serde(default)]
    pub waiting_ms: Option<u64>,
}
