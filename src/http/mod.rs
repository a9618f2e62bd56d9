//! HTTP/1.1 as state machines: bytes in, decisions out. No socket, no clock, no buffer of its own
//! beyond what one message needs.
//!
//! ```text
//!             head.rs           framing.rs
//!   bytes -> [ head ] -> how is the body delimited? -> [ body pieces ] -> end
//!             \______ server.rs: whole requests ______/
//!             \______ client.rs: a response's head, then its pieces as they come
//! ```
//!
//! The parser refuses whatever two implementations could read differently (bare line feeds, two
//! lengths, a length beside a transfer coding, folded lines, blanks before a colon): a proxy that
//! guesses is how requests are smuggled. `httparse` finds the fields; the rules on top are in
//! [`head`]. What is to be sent is gathered in [`fields`].

pub mod client;
pub mod fields;
pub mod framing;
pub mod head;
pub mod server;
pub mod sse;
