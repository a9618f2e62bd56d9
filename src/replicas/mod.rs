//! What a machine's runtime directory announces, and whether each engine behind it really answers.
//!
//! Two facts about a replica come from two places. A handoff file *announces* it: the directory's
//! full listing is handed in, compared with the last one, and what differs is acted on, so that a
//! missed event or a deletion needs no special case. A probe *confirms* it: only an engine that
//! answered its health path takes work. The registry joins both with a third, local fact, the slots
//! that requests occupy now.
//!
//! ```text
//!             file                  first good answer
//!   (nothing) ----> Found --------> Probing ---------> Ready <-----> Suspect
//!                     |                |                 |   fails      |
//!                     +----------------+--------+--------+--------------+
//!                                               | drained, or the file vanished
//!                                               v
//!                                           Draining ----> (gone, when its last request ended)
//! ```
//!
//! Every change is returned as a [`Change`], once. Nothing here opens a file or a socket or asks a
//! clock: listings, probe outcomes and the time are handed in, probes are handed out as orders.

pub mod change;
pub mod directory;
pub mod health;
pub mod policy;
pub mod probing;
pub mod registry;
mod report;

pub use change::{Change, FileState, FileView, Refused, State};
pub use directory::{FileContent, ListedFile};
pub use policy::{AllowList, EnginePolicy};
pub use probing::{Fault, ProbeId, ProbeKind, ProbeOrder, ProbeOutcome};
pub use registry::{Registry, ReplicaLease};

#[cfg(test)]
mod tests;
