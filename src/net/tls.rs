//! TLS on both sides: who gets a session, and how much a turn spends on handshakes.
//!
//! A handshake costs about as much as a hundred requests, and anybody may ask for one. So handshakes wait in
//! a list of their own, from which every turn takes a few; while many wait, no further connection is
//! accepted: it is better off in the kernel's queue. One that is not complete in time is closed. When too
//! many are unfinished at once, the oldest goes: whoever means it is done within milliseconds. A connection that
//! is one too many can be told so within TLS only, so the last places are for those who are told and leave; once
//! these are taken too, connections are closed as they come.
//!
//! Configurations are handed in, and may be replaced at any time: what is connected goes on with the one
//! that it began with.

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;

use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, ServerConfig, ServerConnection};

use crate::http::head::BadMessage;
use crate::reactor::ready::ReadyList;
use crate::reactor::tls::{Handshake, Session};
use crate::reactor::token::{Kind, Token};
use crate::time::Mono;

use super::Net;

/// A client's handshake must be complete after this long, in milliseconds: a few round trips round the world.
pub const HANDSHAKE_MS: u64 = 10_000;
/// Handshakes of clients that are unfinished at once: about 10 KiB each.
pub const HANDSHAKES_MAX: usize = 4_096;
/// What one turn spends on handshakes: four with work on keys, at up to a millisecond each, or as many more
/// that only hold a piece of a message.
const WORK_PER_TURN: u32 = 32;
/// Of that, a step with work on keys.
const WORK_OF_KEYS: u32 = 8;
/// With so many handshakes to go on with, no further connection is accepted.
const BEHIND_AT: usize = 64;
/// The answer to a client that speaks HTTP in the clear where TLS is spoken.
const CLEAR_TEXT: BadMessage =
    BadMessage { status: 400, reason: "this port speaks TLS and the request came in clear text; use https" };

/// How handshakes of clients ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Complete.
    pub completed: u64,
    /// Not agreed: no common version, a certificate that is not accepted, an end before it.
    pub failed: u64,
    /// Not complete in time.
    pub expired: u64,
    /// The oldest of too many.
    pub crowded_out: u64,
    /// A request in clear text.
    pub clear_text: u64,
}

/// Makes the configuration of this process as a client, when the first `https` URL is dialled.
#[derive(Clone)]
pub struct ClientTls(Arc<Make>);

type Make = dyn Fn() -> Result<Arc<ClientConfig>, String> + Send + Sync;

impl ClientTls {
    /// `make` says in its error which file cannot be used, and why.
    pub fn new(make: impl Fn() -> Result<Arc<ClientConfig>, String> + Send + Sync + 'static) -> ClientTls {
        ClientTls(Arc::new(make))
    }
}

impl fmt::Debug for ClientTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ClientTls")
    }
}

/// Both sides' configurations, and the handshakes that can go on.
#[derive(Debug, Default)]
pub(super) struct Tls {
    server: Option<Arc<ServerConfig>>,
    client: Option<Arc<ClientConfig>>,
    make_client: Option<ClientTls>,
    pub(super) handshakes: ReadyList,
    /// Clients whose handshakes began, the oldest first. Some of them are complete, or gone.
    begun: VecDeque<Token>,
    unfinished: usize,
    counts: Counts,
}

impl Tls {
    /// A session for a connection that was accepted; `None` where clients speak in the clear.
    pub(super) fn incoming(&self) -> Result<Option<Session>, rustls::Error> {
        let Some(config) = &self.server else { return Ok(None) };
        Ok(Some(Session::new(ServerConnection::new(config.clone())?.into())))
    }

    /// A session with whoever proves to be `host`.
    pub(super) fn outgoing(&mut self, host: &str) -> Result<Session, String> {
        let config = match &self.client {
            Some(config) => config.clone(),
            None => {
                let Some(ClientTls(make)) = &self.make_client else {
                    return Err("https is not spoken by this program".into());
                };
                self.client.insert(make()?).clone()
            }
        };
        let name = ServerName::try_from(host.to_string())
            .map_err(|_| format!("{host} is no name that a certificate can prove"))?;
        let connection = ClientConnection::new(config, name).map_err(|error| format!("TLS: {error}"))?;
        Ok(Session::new(connection.into()))
    }

    /// A client's connection is closed, or its handshake is over.
    pub(super) fn left(&mut self, was_handshaking: bool) {
        self.unfinished = self.unfinished.saturating_sub(usize::from(was_handshaking));
    }

    /// Whether clients speak TLS.
    pub(super) fn is_served(&self) -> bool {
        self.server.is_some()
    }

    /// Whether so many handshakes wait that no further connection should be accepted.
    pub(super) fn is_behind(&self) -> bool {
        self.handshakes.len() >= BEHIND_AT
    }
}

impl Net {
    /// Connections that are accepted from now on speak TLS so; with `None` they are in the clear.
    pub fn set_server_tls(&mut self, config: Option<Arc<ServerConfig>>) {
        self.tls.server = config;
    }

    /// `https` URLs are dialled so from now on. Idle connections are closed: they belong to who this process
    /// was.
    pub fn set_client_tls(&mut self, make: ClientTls) {
        self.tls.make_client = Some(make);
        self.tls.client = None;
        for connection in self.upstreams.idle_secured() {
            self.close_connection(connection);
        }
    }

    /// The certificate that a client has shown, in DER.
    #[must_use]
    pub fn client_certificate(&self, client: Token) -> Option<&[u8]> {
        self.server.clients.get(client)?.stream.peer_certificate()
    }

    /// How handshakes of clients ended.
    #[must_use]
    pub fn handshake_counts(&self) -> Counts {
        self.tls.counts
    }

    /// Handshakes of clients that are unfinished.
    #[must_use]
    pub fn handshakes_unfinished(&self) -> usize {
        self.tls.unfinished
    }

    pub(super) fn turn_handshakes(&mut self, now: Mono) {
        let mut work = WORK_PER_TURN;
        for _ in 0..self.tls.handshakes.len() {
            if work == 0 {
                return;
            }
            let Some(token) = self.tls.handshakes.pop() else { return };
            let worked = match token.kind() {
                Kind::Client => self.client_handshake(token, now),
                _ => self.upstream_handshake(token, now),
            };
            work = work.saturating_sub(if worked { WORK_OF_KEYS } else { 1 });
        }
    }

    pub(super) fn await_handshake(&mut self, client: Token, now: Mono) {
        self.arm_client(client, HANDSHAKE_MS, now);
        self.tls.unfinished += 1;
        self.tls.begun.push_back(client);
        self.tls.handshakes.push(client);
        // What is complete or gone makes room first.
        let clients = &self.server.clients;
        let is_unfinished =
            |client: &Token| clients.get(*client).is_some_and(|session| session.stream.is_handshaking());
        while self.tls.begun.front().is_some_and(|oldest| !is_unfinished(oldest)) {
            self.tls.begun.pop_front();
        }
        if self.tls.begun.len() > 2 * HANDSHAKES_MAX {
            self.tls.begun.retain(is_unfinished);
        }
        if self.tls.unfinished > HANDSHAKES_MAX
            && let Some(oldest) = self.tls.begun.pop_front()
        {
            self.tls.counts.crowded_out += 1;
            self.close_client(oldest, now);
        }
    }

    /// Goes on with a client's handshake. True if that was work.
    fn client_handshake(&mut self, client: Token, now: Mono) -> bool {
        let Some(session) = self.server.clients.get_mut(client) else { return false };
        match session.stream.handshake() {
            Ok(Handshake::Waits) => return false,
            Ok(Handshake::Worked) => {}
            Ok(Handshake::Done) => {
                self.tls.left(true);
                self.tls.counts.completed += 1;
                if self.turn_crowd_away(client, now) {
                    return true;
                }
                self.arm_client(client, self.limits.request_ms, now);
                self.client_ready(client, now);
            }
            Ok(Handshake::ClearText) => {
                self.tls.left(true);
                self.tls.counts.clear_text += 1;
                self.refuse(client, CLEAR_TEXT, now);
            }
            Err(_) => {
                self.tls.counts.failed += 1;
                self.close_client(client, now);
            }
        }
        true
    }

    pub(super) fn handshake_expired(&mut self, client: Token, now: Mono) {
        self.tls.counts.expired += 1;
        self.close_client(client, now);
    }
}
