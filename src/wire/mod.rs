//! What processes say to each other, as types: the handoff file between an engine's starter and the
//! node agent, and the JSON bodies between node agent and control plane.
//!
//! This is the only room that `pool_managerd`, `orchestratord` and `engine_provisioner` share, and
//! so the only place where they can agree or disagree. Readers are tolerant (unknown fields are
//! ignored, `null` means absent, fields that older peers lack have defaults); writers are strict.

pub mod activity;
pub mod certificate;
pub mod drain;
pub mod gpu_load;
pub mod handoff;
pub mod id;
pub mod json_place;
pub mod node;
pub mod pool;
pub mod preparation;
pub mod url;
