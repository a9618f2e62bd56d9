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
//! Beside these stands Broken: a replica whose process ended, whose GPU failed or whose engine hangs is
//! held there until the cause is gone, whatever its probes say.
//!
//! Every change is returned as a [`Change`], once. The registry opens no file and no socket and asks
//! no clock: listings, probe outcomes and the time are handed in, probes are handed out as orders.
//! The shells around it are [`watch`] with [`scan`] (the directory), [`probe`] (the engines) and
//! [`liveness`] (their processes).
//!
//! Both daemons use this room: the node agent always, the control plane where it runs on the same
//! machine as the engines (HOME profile).

pub mod change;
pub mod directory;
pub mod drain_routes;
pub mod drains;
pub mod hang;
pub mod health;
pub mod liveness;
pub mod policy;
pub mod probe;
pub mod probing;
pub mod process;
pub mod profile;
pub mod registry;
mod report;
pub mod scan;
pub mod watch;

pub use change::{Cause, Change, FileState, FileView, Refused, State};
pub use directory::{FileContent, ListedFile, Listing, Span};
pub use drains::{DrainChange, DrainEvent};
pub use hang::Activity;
pub use liveness::Processes;
pub use policy::{AllowList, EnginePolicy};
pub use probing::{Fault, ProbeId, ProbeKind, ProbeOrder, ProbeOutcome};
pub use process::{ProcessOrder, ProcessSeen};
pub use profile::Facts;
pub use registry::{Registry, ReplicaLease};
pub use report::PoolCounts;
pub use watch::{Trouble, Watch};

#[cfg(test)]
mod tests;
