//! What both daemons have in common beside their cores: who may call them ([`auth`]), what happened
//! lately ([`events`]), on which machine they run ([`machine`]), how they log and how they start
//! ([`logging`]).

pub mod auth;
pub mod events;
pub mod logging;
pub mod machine;
