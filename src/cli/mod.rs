//! The operator's command, one file a subcommand.

pub mod demo_engine;
