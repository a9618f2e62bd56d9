//! The control plane for LLM engines on machines of your own.
//!
//! One sentence: **bytes and clocks enter at the reactor, become inputs to a pure core, and leave as a
//! short list of effects.**
//!
//! Four programs share this library. `pool-managerd` runs on every machine with engines: it watches
//! the directory in which handoff files appear, probes the engines behind them, and tells control
//! planes. `orchestratord` is the control plane: it knows every replica, gives each request a slot,
//! and streams the answer. `engine-provisioner` starts an engine and writes its handoff. `llorch` is
//! the operator's command. On one machine (HOME profile) `orchestratord` watches the directory itself;
//! over many (CLOUD profile) node agents register with it.
//!
//! # Rooms
//!
//! ```text
//!   bin/                          a few lines each: arguments, run(), exit code
//!    │                            node_registration, service_registry: for other programs
//!    │
//!   pool_managerd   orchestratord   engine_provisioner   cli      never import each other
//!    │               │                handoff_watcher             for other programs, as are
//!    │               │                                            the plain values of pool_registry_types
//!    │               │
//!   replicas        (both)        what a runtime directory announces, and whether it answers
//!    │
//!   service         (both)        tokens, certificates, events, logs, facts of the machine, what shells start with
//!    │
//!   net                           accept, dial, keep, relay
//!    │        │
//!   http     reactor              PURE state machines    the only room besides net that names mio
//!    │        │
//!   wire     time, settings, metrics
//! ```
//!
//! Dependencies run downward only. A *pure* file names no socket, file, thread, clock or environment,
//! and does not log: it is handed inputs and the time, and returns what happened. `tests/architecture.rs`
//! holds both rules by reading the sources.
//!
//! Where to find what decides: [`pool_managerd::core`], [`orchestratord::core`] and their pure
//! neighbours. Where to find what does: [`pool_managerd::daemon`] and [`orchestratord::daemon`], each
//! with a visible loop and one flat match over effects.
//!
//! # A handoff becomes routable
//!
//! 1. Something writes `<dir>/pool-0-r0.json`: a temporary name, then a rename.
//! 2. [`reactor::dirwatch`] names it: a hint. Start-up, overflow and the periodic safety net are a pass
//!    over every name instead.
//! 3. [`replicas::watch`] decides that it is time, [`replicas::scan`] looks, a bounded piece a turn, and
//!    reads what changed, without following links.
//! 4. [`wire::handoff`] parses every known shape.
//! 5. The daemon hands what was found to its core as `Input::Listing`: the truth about the names that it
//!    covers. [`replicas::registry`] compares it with what is known, so a missed event or a deletion
//!    needs no special case.
//! 6. The replica is *found*. Where its handoff names a process, [`replicas::liveness`] opens it: from now
//!    on the kernel tells of its end. Then it is *probing*: `Effect::Probe`. [`net`] carries the probe out
//!    without blocking, [`replicas::probe`] says what its ending means, [`replicas::profile`] what else is
//!    asked, [`replicas::health`] when the next is due.
//! 7. The engine answers: *ready*. The registry's revision grows, and
//!    - in the HOME profile the same turn shows it to [`orchestratord::service_registry`];
//!    - in the CLOUD profile [`pool_managerd::membership`] sends a heartbeat at once, from the loop itself on
//!      a kept connection; [`orchestratord::api`] reads it, and the lease is renewed.
//! 8. The service registry reports `ReplicaReady`, and [`orchestratord::core`] gives its slots to whoever
//!    waits, in the same turn.
//!
//! # A request is placed and streamed
//!
//! 1. [`net`] hands over a whole request: head and bounded body.
//! 2. [`orchestratord::api`] routes it; [`orchestratord::openai`] or [`orchestratord::tasks`] reads the
//!    little that placement needs, of a client's body through [`orchestratord::peek`]. It becomes
//!    `Input::Ask`.
//! 3. [`orchestratord::core`] asks [`orchestratord::affinity`] and [`orchestratord::placement`]; a slot is
//!    taken, or the request waits in [`orchestratord::admission`], or [`orchestratord::refusal`] says no.
//!    [`orchestratord::explain`] remembers why.
//! 4. `Effect::Dispatch`: the daemon dials the engine, or the node agent that relays to an engine which
//!    listens on its own machine only (`pool_managerd` checks generation and slots before it does).
//! 5. Bytes move between the two sockets inside [`net`], through [`net::relay`], bounded and unchanged: what
//!    a turn has read of engines, it writes to their clients at its end. The core sees none of them.
//! 6. The exchange ends: `Input::Ended`. The slot is free, and the next waiter has it.
//!
//! # A GPU breaks
//!
//! 1. The driver writes a line to the kernel's log: [`reactor::kmsg`] reads it, [`pool_managerd::gpus::xid`]
//!    finds the XID in it. Or the driver tells the thread that reads the GPUs, which wakes the loop.
//! 2. `Input::Gpu`: [`pool_managerd::gpus`] decides what the XID says about the GPU, and which replicas
//!    use it.
//! 3. The core holds these in [`replicas::registry`]; a heartbeat tells the control planes at once, and
//!    no new request goes there.

#![warn(missing_docs)]

pub mod cli;
pub mod engine_provisioner;
pub mod handoff_watcher;
pub mod http;
pub mod metrics;
pub mod net;
pub mod node_registration;
pub mod orchestratord;
pub mod pool_managerd;
pub mod pool_registry_types;
pub mod reactor;
pub mod replicas;
pub mod service;
pub mod service_registry;
pub mod settings;
pub mod time;
pub mod wire;
