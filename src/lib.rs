//! The control plane for LLM engines on machines of your own.
//!
//! One sentence: **bytes and clocks enter at the reactor, become inputs to a pure core, and leave as
//! a short list of effects.**
//!
#![warn(missing_docs)]

pub mod cli;
pub mod engine_provisioner;
pub mod http;
pub mod metrics;
pub mod net;
pub mod orchestratord;
pub mod pool_managerd;
pub mod reactor;
pub mod replicas;
pub mod service;
pub mod settings;
pub mod time;
pub mod wire;
