//! What both daemons have in common beside their cores: who may call them ([`auth`]), whose certificates they
//! show and believe ([`tls`]), what they keep on disk ([`durable`]), what happened lately ([`events`]), how far
//! their loops lag behind ([`lag`]), on which machine they run ([`machine`]), how they log ([`logging`]), and
//! what their shells start with ([`shell`]).

pub mod auth;
pub mod durable;
pub mod events;
pub mod lag;
pub mod logging;
pub mod machine;
pub mod shell;
pub mod tls;
