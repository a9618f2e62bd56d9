//! What both daemons have in common beside their cores: who may call them ([`guard`], with [`auth`],
//! [`credentials`], [`attempts`], [`hosts`] and [`routes`]), whose certificates they show and believe
//! ([`tls`]), what they keep on disk ([`durable`]) and that it is theirs ([`state_lock`]), what happened lately ([`events`]), how far their loops lag
//! behind ([`lag`]), on which machine they run ([`machine`]), how they log ([`logging`]), what their shells
//! start with ([`shell`]), and how they get on with the service manager ([`activation`], [`supervisor`]).

pub mod activation;
pub mod attempts;
pub mod auth;
pub mod bodies;
pub mod credentials;
pub mod durable;
pub mod events;
pub mod guard;
pub mod hosts;
pub mod lag;
pub mod logging;
pub mod machine;
pub mod memory;
pub mod routes;
pub mod shell;
pub mod state_lock;
pub mod supervisor;
pub mod tls;
