//! The engines' side: dial, send, receive, keep.
//!
//! An exchange is one request and its answer; a connection carries exchanges one after the other and
//! rests in the idle pool in between. An idle connection may be closed by its peer at any moment, also
//! just as a request is written to it; such a request goes out once more on a fresh connection,
//! provided that no byte of an answer came.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;

use crate::http::client::encode_request_head;
use crate::http::head::head_end;
use crate::reactor::stream::{ReadResult, Stream};
use crate::reactor::tls::Handshake;
use crate::reactor::token::{Kind, Table, Token};
use crate::time::{Deadline, Mono};
use crate::wire::url::BaseUrl;

use super::budget::{BodyHold, SMALL_BODY_BYTES};
use super::buffer::{HIGH_WATER_BYTES, Spares};
use super::relay::{Forward, Relay, Step};
use super::resolve::Resolved;
use super::server::ClientNext;
use super::{
    DialRule, Fault, FaultKind, Net, NetEvent, Outbound, Outcome, Patience, Progress, SCRATCH_BYTES, Sink,
    Timing,
};

/// Room for the request line, `Host` and `Content-Length`, in bytes.
const HEAD_LINES_BYTES: usize = 256;
/// Bodies up to this size are sent in one write with their head.
const JOINED_BODY_BYTES_MAX: usize = 64 * 1024;

#[derive(Debug)]
pub(super) struct Exchange {
    /// Until it has a connection; then that one's counts.
    pub(super) deadline: Deadline,
    to: BaseUrl,
    /// Where it may go, if not where everything may.
    rule: Option<DialRule>,
    /// Head, and the body too where it is small.
    head: Vec<u8>,
    body: Option<Arc<Vec<u8>>>,
    sent: usize,
    relay: Relay,
    sink: SinkState,
    patience: Patience,
    keep_ms: Option<u64>,
    timing: Timing,
    connection: Option<Token>,
    /// The answer has begun to arrive.
    received: bool,
    /// When its last byte came.
    last_byte: Option<Mono>,
    head_announced: bool,
    retried: bool,
    resolving: bool,
}

impl Exchange {
    /// How long its engine may be silent once the answer has begun. Engines send heads, and comments, before
    /// they read a long prompt.
    fn silence_ms(&self) -> u64 {
        if self.last_byte.is_some() { self.patience.idle_ms } else { self.patience.first_byte_ms }
    }

    pub(super) fn is_answered(&self) -> bool {
        self.relay.status().is_some()
    }
}

#[derive(Debug)]
enum SinkState {
    Client(Token),
    Collect { bytes_max: usize, bytes: Vec<u8>, room: Option<BodyHold> },
    Owner { paused: bool },
}

#[derive(Debug)]
pub(super) struct Connection {
    pub(super) stream: Stream,
    /// That of its exchange, or how long it is kept without one. A queue of one entry a connection stays short;
    /// one a request would hold all requests of the last seconds.
    pub(super) deadline: Deadline,
    origin: Origin,
    pub(super) exchange: Option<Token>,
    connected: bool,
    /// It has carried an exchange before, so its peer may have closed it.
    used: bool,
}

#[derive(Debug)]
pub(super) struct Upstreams {
    pub(super) connections: Table<Connection>,
    pub(super) exchanges: Table<Exchange>,
    /// Idle connections by where they lead, the most recently used last.
    idle: BTreeMap<Origin, Vec<Token>>,
    /// Those with a request that goes out as the next turn begins.
    pub(super) to_send: Vec<Token>,
}

/// Where a connection leads: an address, and within TLS the name that was proved there.
type Origin = (SocketAddr, Option<Arc<str>>);

impl Exchange {
    fn request_len(&self) -> usize {
        self.head.len() + self.body.as_ref().map_or(0, |body| body.len())
    }

    /// The answer has begun: what was sent is not needed again. A large body would else stay in memory as
    /// long as its answer streams.
    fn forget_request(&mut self, spares: &mut Spares) {
        if self.sent == self.request_len() {
            spares.give(std::mem::take(&mut self.head));
            (self.body, self.sent) = (None, 0);
        }
    }
}

impl Upstreams {
    pub(super) fn new() -> Upstreams {
        Upstreams {
            connections: Table::new(Kind::Upstream),
            exchanges: Table::new(Kind::Exchange),
            idle: BTreeMap::new(),
            to_send: Vec::new(),
        }
    }

    pub(super) fn begin(
        &mut self,
        outbound: Outbound<'_>,
        forward: Option<Forward>,
        rule: Option<DialRule>,
        spares: &mut Spares,
        now: Mono,
    ) -> Token {
        let mut head = spares.take();
        let body_bytes = outbound.body.len().min(JOINED_BODY_BYTES_MAX);
        head.reserve(HEAD_LINES_BYTES + outbound.fields.as_bytes().len() + body_bytes);
        let target = [outbound.to.path(), &outbound.target];
        let (host, fields) = (outbound.to.authority(), &outbound.fields);
        encode_request_head(&mut head, &outbound.method, target, host, fields, outbound.body.len());
        let mut body = Some(outbound.body);
        if let Some(small) = body.take_if(|body| body.len() <= JOINED_BODY_BYTES_MAX) {
            head.extend_from_slice(&small);
        }
        self.exchanges.insert(Exchange {
            deadline: Deadline::default(),
            to: outbound.to,
            rule,
            head,
            body,
            sent: 0,
            relay: Relay::new(&outbound.method, &outbound.target, forward, outbound.sink.hold_back()),
            sink: match outbound.sink {
                Sink::Client { client, .. } => SinkState::Client(client),
                Sink::Collect { bytes_max } => {
                    SinkState::Collect { bytes_max, bytes: Vec::new(), room: None }
                }
                Sink::Owner { .. } => SinkState::Owner { paused: false },
            },
            patience: outbound.patience,
            keep_ms: outbound.keep_ms,
            timing: Timing { started: now, ended: now, ..Timing::default() },
            connection: None,
            received: false,
            last_byte: None,
            head_announced: false,
            retried: false,
            resolving: false,
        })
    }

    pub(super) fn client_of(&self, exchange: Token) -> Option<Token> {
        match self.exchanges.get(exchange)?.sink {
            SinkState::Client(client) => Some(client),
            _ => None,
        }
    }

    pub(super) fn progress(&self, exchange: Token) -> Option<Progress> {
        let session = self.exchanges.get(exchange)?;
        Some(Progress { started: session.timing.started, last_byte: session.last_byte })
    }

    /// The answer's status, if it is a stream that said that it is done.
    pub(super) fn said_done(&self, exchange: Token) -> Option<u16> {
        self.exchanges.get(exchange).filter(|exchange| exchange.relay.said_done())?.relay.status()
    }

    fn connected(&mut self, exchange: Token, now: Mono) {
        if let Some(session) = self.exchanges.get_mut(exchange) {
            session.timing.connected.get_or_insert(now);
        }
    }

    pub(super) fn connection_of(&self, exchange: Token) -> Option<Token> {
        self.exchanges.get(exchange)?.connection
    }

    pub(super) fn pause(&mut self, exchange: Token, pause: bool) -> Option<Token> {
        let exchange = self.exchanges.get_mut(exchange)?;
        if let SinkState::Owner { paused } = &mut exchange.sink {
            *paused = pause;
        }
        exchange.connection
    }

    /// Puts a comment into a stream that stands between two events. False where none fits.
    pub(super) fn keep_alive(&mut self, exchange: Token, out: &mut Vec<u8>) -> bool {
        self.exchanges.get_mut(exchange).is_some_and(|exchange| exchange.relay.keep_alive(out))
    }

    fn take_idle(&mut self, origin: &Origin) -> Option<Token> {
        let pool = self.idle.get_mut(origin)?;
        let connection = pool.pop();
        if pool.is_empty() {
            self.idle.remove(origin);
        }
        connection
    }

    fn forget_idle(&mut self, connection: Token, origin: &Origin) {
        if let Some(pool) = self.idle.get_mut(origin) {
            pool.retain(|other| *other != connection);
            if pool.is_empty() {
                self.idle.remove(origin);
            }
        }
    }

    /// Idle connections within TLS.
    pub(super) fn idle_secured(&self) -> Vec<Token> {
        let secured = self.idle.iter().filter(|((_, name), _)| name.is_some());
        secured.flat_map(|(_, pool)| pool.iter().copied()).collect()
    }
}

/// Longest piece that may be nothing but a comment and its framing, in bytes.
const COMMENT_BYTES_MAX: usize = 64;

/// Whether a piece of an answer says something: it goes on after the head, and is more than comments of a
/// stream (`:` lines) with their chunk sizes.
fn is_progress(piece: &[u8], after_head: bool) -> bool {
    let body = if after_head {
        piece
    } else {
        match head_end(piece) {
            Some(end) => &piece[end..],
            None => return false,
        }
    };
    let says_something = |line: &[u8]| {
        let line = line.trim_ascii();
        !(line.is_empty() || line[0] == b':' || line.iter().all(u8::is_ascii_hexdigit))
    };
    body.len() > COMMENT_BYTES_MAX || body.split(|byte| *byte == b'\n').any(says_something)
}

impl Net {
    /// Finds a connection for an exchange: an idle one, or a new one.
    pub(super) fn dial(&mut self, exchange: Token, now: Mono) {
        let Some(session) = self.upstreams.exchanges.get_mut(exchange) else { return };
        let until = now.plus_ms(session.patience.connect_ms);
        session.deadline.disarm();
        session.resolving = false;
        let retried = session.retried;
        let name: Option<Arc<str>> = session.to.https().then(|| session.to.host().into());
        let address = match self.resolver.resolve(&session.to, now) {
            Resolved::Address(address) => address,
            Resolved::Asked => {
                session.resolving = true;
                return self.timers.arm(exchange, &mut session.deadline, until);
            }
            Resolved::Failed(reason) => {
                return self.fail_exchange(exchange, FaultKind::Connect, &reason, now);
            }
        };
        if let Some(DialRule(check)) = session.rule.as_ref().or(self.dial_rule.as_ref())
            && let Err(why) = check(&session.to, address.ip())
        {
            return self.fail_exchange(exchange, FaultKind::Connect, &why, now);
        }
        let origin = (address, name);
        while !retried && let Some(idle) = self.upstreams.take_idle(&origin) {
            let latch = self.upstreams.connections.get(idle).map(|line| line.stream.latch());
            if latch.is_some_and(|latch| !latch.readable) {
                return self.assign(idle, exchange, now);
            }
            // It has just been closed, or said something that nobody asked for.
            self.close_connection(idle);
        }
        let tls = match origin.1.as_deref().map(|name| self.tls.outgoing(name)).transpose() {
            Ok(tls) => tls,
            Err(why) => return self.fail_exchange(exchange, FaultKind::Connect, &why, now),
        };
        let made = self.upstreams.connections.insert_with(|token| {
            Ok::<Connection, std::io::Error>(Connection {
                stream: Stream::connect(address, &self.registry, token)?.secured(tls),
                deadline: Deadline::default(),
                origin,
                exchange: Some(exchange),
                connected: false,
                used: false,
            })
        });
        match made {
            Ok(connection) => {
                if let Some(session) = self.upstreams.exchanges.get_mut(exchange) {
                    session.connection = Some(connection);
                }
                self.limit(exchange, until);
            }
            Err(error) => {
                use rustix::io::Errno;
                let own = [Errno::MFILE, Errno::NFILE, Errno::NOBUFS, Errno::NOMEM, Errno::ADDRNOTAVAIL];
                let is_own = own.iter().any(|own| error.raw_os_error() == Some(own.raw_os_error()));
                let kind = if is_own { FaultKind::Local } else { FaultKind::Connect };
                self.fail_exchange(exchange, kind, &error.to_string(), now);
            }
        }
    }

    pub(super) fn take_resolved(&mut self, now: Mono) {
        while let Some(name) = self.resolver.take(now) {
            let waiting: Vec<Token> = self
                .upstreams
                .exchanges
                .iter()
                .filter(|(_, exchange)| exchange.resolving && exchange.to.host() == name)
                .map(|(token, _)| token)
                .collect();
            for exchange in waiting {
                self.dial(exchange, now);
            }
        }
    }

    fn assign(&mut self, connection: Token, exchange: Token, now: Mono) {
        let sessions =
            (self.upstreams.connections.get_mut(connection), self.upstreams.exchanges.get_mut(exchange));
        if let (Some(line), Some(session)) = sessions {
            line.exchange = Some(exchange);
            session.connection = Some(connection);
            self.timers.arm(connection, &mut line.deadline, now.plus_ms(session.patience.connect_ms));
            if line.connected {
                session.timing.connected.get_or_insert(now);
            }
            if self.events.is_empty() {
                self.upstream_ready(connection, now);
            } else {
                self.upstreams.to_send.push(connection);
            }
        }
    }

    /// Writes the requests that came together with others. An engine that is woken up by the first of them finds
    /// the others there.
    pub(super) fn send_owed(&mut self, now: Mono) {
        let mut connections = std::mem::take(&mut self.upstreams.to_send);
        for connection in connections.drain(..) {
            self.upstream_ready(connection, now);
        }
        // Nobody is added meanwhile: whoever fails here dials anew.
        self.upstreams.to_send = connections;
    }

    /// Something about an upstream connection changed, or its sink has room again.
    pub(super) fn upstream_ready(&mut self, connection: Token, now: Mono) {
        let Some(line) = self.upstreams.connections.get_mut(connection) else { return };
        let Some(exchange) = line.exchange else {
            // Idle: whatever comes now, an end or bytes that nobody asked for, ends it.
            if line.stream.latch().readable
                && !matches!(line.stream.read(&mut self.scratch[..1]), Ok(ReadResult::Empty))
            {
                self.close_connection(connection);
            }
            return;
        };
        if !line.connected {
            match line.stream.connect_result() {
                Ok(true) if line.stream.is_handshaking() => return self.tls.handshakes.push(connection),
                Ok(true) => {
                    line.connected = true;
                    self.upstreams.connected(exchange, now);
                }
                Ok(false) => return,
                Err(error) => {
                    let reason = error.to_string();
                    return self.fail_exchange(exchange, FaultKind::Connect, &reason, now);
                }
            }
        }
        if self.send_request(connection, exchange, now) {
            self.receive(connection, exchange, now);
        }
    }

    /// Writes what remains of the request. False if the exchange is over.
    fn send_request(&mut self, connection: Token, exchange: Token, now: Mono) -> bool {
        let Some(session) = self.upstreams.exchanges.get_mut(exchange) else { return false };
        let total = session.request_len();
        if session.sent == total {
            return true;
        }
        let Some(line) = self.upstreams.connections.get_mut(connection) else { return false };
        while session.sent < total {
            let rest = match session.sent.checked_sub(session.head.len()) {
                None => &session.head[session.sent..],
                Some(offset) => session.body.as_ref().map_or(&[][..], |body| &body[offset..]),
            };
            match line.stream.write(rest) {
                Ok(0) => break,
                Ok(length) => session.sent += length,
                // An engine may answer (413, say) and close before it has read everything: its answer,
                // if there is one, is still to be read.
                Err(_) if line.stream.latch().readable => return true,
                Err(error) => {
                    let reason = format!("the connection broke while the request was sent: {error}");
                    self.fail_exchange(exchange, FaultKind::Reset, &reason, now);
                    return false;
                }
            }
        }
        let wait_ms =
            if session.sent == total { session.patience.first_byte_ms } else { session.patience.idle_ms };
        self.timers.arm(connection, &mut line.deadline, now.plus_ms(wait_ms));
        true
    }

    /// How long an exchange may go on without anything new.
    fn limit(&mut self, exchange: Token, until: Mono) {
        let Some(session) = self.upstreams.exchanges.get_mut(exchange) else { return };
        if let Some(connection) = session.connection
            && let Some(line) = self.upstreams.connections.get_mut(connection)
        {
            self.timers.arm(connection, &mut line.deadline, until);
        } else {
            self.timers.arm(exchange, &mut session.deadline, until);
        }
    }

    fn receive(&mut self, connection: Token, exchange: Token, now: Mono) {
        let mut budget = self.share_bytes;
        loop {
            let Some(session) = self.upstreams.exchanges.get_mut(exchange) else { return };
            let Some(line) = self.upstreams.connections.get_mut(connection) else { return };
            let room = match &session.sink {
                SinkState::Client(client) => self
                    .server
                    .clients
                    .get(*client)
                    .map_or(0, |c| HIGH_WATER_BYTES.saturating_sub(c.out.len())),
                SinkState::Owner { paused: true } => 0,
                SinkState::Owner { paused: false } | SinkState::Collect { .. } => SCRATCH_BYTES,
            };
            if room == 0 {
                return;
            }
            if budget == 0 {
                return self.ready.push_behind(connection);
            }
            let length = match line.stream.read(&mut self.scratch[..room.min(budget).min(SCRATCH_BYTES)]) {
                Ok(ReadResult::Data(length)) => length,
                Ok(ReadResult::Empty) => return,
                Ok(ReadResult::Closed) => return self.upstream_closed(exchange, now),
                Err(_) if session.relay.said_done() => return self.upstream_closed(exchange, now),
                Err(error) => {
                    let reason = format!("the connection broke: {error}");
                    return self.fail_exchange(exchange, FaultKind::Reset, &reason, now);
                }
            };
            budget = budget.saturating_sub(length);
            self.moved_bytes += length;
            session.received = true;
            if is_progress(&self.scratch[..length], session.relay.status().is_some()) {
                let before = session.last_byte.replace(now);
                session.timing.first_token.get_or_insert(now);
                if let Some(before) = before.filter(|_| session.relay.is_event_stream()) {
                    self.token_gaps.observe_ns(now.ns_since(before));
                }
            }
            if !matches!(session.sink, SinkState::Collect { .. }) {
                self.relayed_at = now;
                let until = now.plus_ms(session.silence_ms());
                self.timers.arm(connection, &mut line.deadline, until);
            }
            if !self.pass_on(exchange, length, now) {
                return;
            }
        }
    }

    /// Gives `length` bytes of the scratch buffer to the exchange's relay, and what it puts out to the
    /// sink. False if the exchange is over.
    fn pass_on(&mut self, exchange: Token, length: usize, now: Mono) -> bool {
        let Some(session) = self.upstreams.exchanges.get_mut(exchange) else { return false };
        let input = &self.scratch[..length];
        let (client, result) = match &mut session.sink {
            SinkState::Client(client) => {
                let Some(sink) = self.server.clients.get_mut(*client) else { return false };
                (Some(*client), session.relay.received(input, sink.out.end_with(&mut self.spares)))
            }
            SinkState::Collect { bytes_max, bytes, room } => {
                let result = session.relay.received(input, bytes);
                // What is smaller counts as the exchange's own.
                if bytes.len() > SMALL_BODY_BYTES {
                    let bodies = &mut self.server.bodies;
                    let room = room.get_or_insert_with(|| bodies.hold());
                    if !bodies.grow(room, bytes.len()) {
                        let reason = "there is no room in memory for an answer of this size at the moment";
                        self.fail_exchange(exchange, FaultKind::Local, reason, now);
                        return false;
                    }
                }
                if bytes.len() > *bytes_max {
                    let reason = format!("the answer is larger than {bytes_max} bytes");
                    self.fail_exchange(exchange, FaultKind::Protocol, &reason, now);
                    return false;
                }
                (None, result)
            }
            SinkState::Owner { .. } => {
                let mut bytes = Vec::new();
                let result = session.relay.received(input, &mut bytes);
                if !session.head_announced
                    && let Some(status) = session.relay.status()
                {
                    session.head_announced = true;
                    self.events.push_back(NetEvent::Head { exchange, status });
                }
                if !bytes.is_empty() {
                    self.events.push_back(NetEvent::Data { exchange, bytes });
                }
                (None, result)
            }
        };
        if let Some(status) = session.relay.status() {
            session.timing.first_byte.get_or_insert(now);
            session.forget_request(&mut self.spares);
            if !std::mem::replace(&mut session.head_announced, true) {
                self.events.push_back(NetEvent::Head { exchange, status });
            }
        }
        match result {
            Ok(Step::More) => {
                if let Some(client) = client {
                    self.client_flush_soon(client, now);
                }
                self.upstreams.exchanges.get(exchange).is_some()
            }
            Ok(Step::Complete) => {
                self.complete(exchange, now);
                false
            }
            Ok(Step::HeldBack(status)) => {
                let reason = format!("the engine answered {status}");
                self.fail_exchange(exchange, FaultKind::Status(status), &reason, now);
                false
            }
            Err(error) => {
                self.fail_exchange(exchange, FaultKind::Protocol, error.reason, now);
                false
            }
        }
    }

    fn upstream_closed(&mut self, exchange: Token, now: Mono) {
        let Some(session) = self.upstreams.exchanges.get_mut(exchange) else { return };
        let closed = match &mut session.sink {
            SinkState::Client(client) => match self.server.clients.get_mut(*client) {
                Some(sink) => session.relay.closed(sink.out.end()),
                None => return,
            },
            SinkState::Collect { .. } | SinkState::Owner { .. } => session.relay.closed(&mut Vec::new()),
        };
        match closed {
            Ok(()) => self.complete(exchange, now),
            Err(error) => self.fail_exchange(exchange, FaultKind::Reset, error.reason, now),
        }
    }

    fn complete(&mut self, exchange: Token, now: Mono) {
        let Some(session) = self.upstreams.exchanges.get_mut(exchange) else { return };
        let sent_all = session.sent == session.request_len();
        let keep = sent_all && session.relay.upstream_keeps_alive();
        let status = session.relay.status().unwrap_or_default();
        let body = match &mut session.sink {
            SinkState::Collect { bytes, .. } => std::mem::take(bytes),
            SinkState::Client(_) | SinkState::Owner { .. } => Vec::new(),
        };
        let client_keeps_alive = session.relay.client_keeps_alive();
        let client = self.upstreams.client_of(exchange);
        if keep {
            self.rest(exchange, now);
        }
        if let Some(client) = client
            && let Some(session) = self.server.clients.get_mut(client)
        {
            session.answered(client_keeps_alive);
            self.client_flush_soon(client, now);
        }
        self.finish_exchange(exchange, Outcome::Complete { status, body }, now);
    }

    /// Puts an exchange's connection into the idle pool.
    fn rest(&mut self, exchange: Token, now: Mono) {
        let Some(session) = self.upstreams.exchanges.get_mut(exchange) else { return };
        let Some(connection) = session.connection else { return };
        let Some(line) = self.upstreams.connections.get_mut(connection) else { return };
        if line.stream.latch().hangup {
            return;
        }
        let pool = self.upstreams.idle.entry(line.origin.clone()).or_default();
        if pool.len() >= self.limits.upstream_idle_max {
            return;
        }
        pool.push(connection);
        session.connection = None;
        line.exchange = None;
        line.used = true;
        let keep_ms = session.keep_ms.unwrap_or(self.limits.upstream_idle_ms);
        self.timers.arm(connection, &mut line.deadline, now.plus_ms(keep_ms));
    }

    pub(super) fn exchange_expired(&mut self, exchange: Token, now: Mono) {
        let Some(session) = self.upstreams.exchanges.get_mut(exchange) else { return };
        let patience = session.patience;
        let held_by_sink = match &session.sink {
            SinkState::Client(client) => self.server.clients.get(*client).is_some_and(|c| c.above_high_water),
            SinkState::Owner { paused } => *paused,
            SinkState::Collect { .. } => false,
        };
        let line = session.connection.and_then(|token| self.upstreams.connections.get(token));
        let unread = line.is_some_and(|line| line.stream.latch().readable);
        if held_by_sink || unread {
            // The client is slow (it has a limit of its own) or this loop is, not the engine.
            let until = now.plus_ms(session.silence_ms());
            if let Some(connection) = session.connection.filter(|_| !held_by_sink) {
                self.ready.push(connection);
            }
            self.limit(exchange, until);
            return;
        }
        let is_connected = line.is_some_and(|line| line.connected);
        let reason = if session.received && matches!(session.sink, SinkState::Collect { .. }) {
            format!("no whole answer within {} ms", patience.first_byte_ms)
        } else if session.received {
            format!("no byte for {} ms in the middle of the answer", session.silence_ms())
        } else if session.sent > 0 {
            format!("no answer within {} ms", patience.first_byte_ms)
        } else {
            format!("no connection within {} ms", patience.connect_ms)
        };
        let kind = if is_connected { FaultKind::Timeout } else { FaultKind::Unreached };
        self.fail_exchange(exchange, kind, &reason, now);
    }

    /// The engine failed: try a fresh connection if only a kept one was stale, else end the exchange.
    pub(super) fn fail_exchange(&mut self, exchange: Token, kind: FaultKind, reason: &str, now: Mono) {
        let Some(session) = self.upstreams.exchanges.get_mut(exchange) else { return };
        let line = session.connection.and_then(|token| self.upstreams.connections.get(token));
        let stale = line.is_some_and(|line| line.used) && !session.received && !session.retried;
        if stale && kind == FaultKind::Reset {
            session.retried = true;
            session.sent = 0;
            if let Some(connection) = session.connection.take() {
                self.close_connection(connection);
            }
            return self.dial(exchange, now);
        }
        let answered = match session.sink {
            SinkState::Client(client) => {
                let answered = session.relay.status().is_some();
                if let Some(sink) = self.server.clients.get_mut(client) {
                    if answered {
                        if !session.relay.failed(reason, sink.out.end()) {
                            sink.stream.reset_on_close();
                        }
                        sink.next = ClientNext::Close;
                    } else {
                        sink.next = ClientNext::Owner;
                    }
                }
                answered
            }
            SinkState::Collect { .. } | SinkState::Owner { .. } => session.relay.status().is_some(),
        };
        let sent = session.sent > 0 || session.received;
        let retry_after_s = session.relay.retry_after_s();
        let begun = match kind {
            FaultKind::Status(_) => session.relay.told_begun(),
            _ => session.received,
        };
        let fault = Fault { kind, reason: reason.to_string(), answered, sent, begun, retry_after_s };
        let client = self.upstreams.client_of(exchange);
        self.finish_exchange(exchange, Outcome::Failed(fault), now);
        if answered && let Some(client) = client {
            self.client_flush(client, now);
        }
    }

    /// Removes an exchange, closes its connection if it still has one, and tells the owner.
    pub(super) fn finish_exchange(&mut self, exchange: Token, outcome: Outcome, now: Mono) {
        let Some(session) = self.upstreams.exchanges.remove(exchange) else { return };
        if let Some(connection) = session.connection {
            self.close_connection(connection);
        }
        let first_token = session.timing.first_token.filter(|_| session.relay.is_event_stream());
        let tokens = session.relay.tokens();
        let timing = Timing { ended: now, first_token, tokens, ..session.timing };
        self.events.push_back(NetEvent::Finished { exchange, outcome, timing });
    }

    /// A handshake with an engine or a peer went on.
    pub(super) fn upstream_handshake(&mut self, connection: Token, now: Mono) -> bool {
        let Some(line) = self.upstreams.connections.get_mut(connection) else { return false };
        let step = line.stream.handshake();
        let exchange = line.exchange;
        match step {
            Ok(Handshake::Done) => {
                self.upstream_ready(connection, now);
                true
            }
            Ok(Handshake::Worked) => true,
            Ok(Handshake::Waits) => false,
            Ok(Handshake::ClearText) => {
                self.upstream_unsafe(connection, exchange, "it does not speak TLS", now)
            }
            Err(error) => self.upstream_unsafe(connection, exchange, &error.to_string(), now),
        }
    }

    fn upstream_unsafe(&mut self, connection: Token, exchange: Option<Token>, why: &str, now: Mono) -> bool {
        match exchange {
            Some(exchange) => self.fail_exchange(exchange, FaultKind::Connect, why, now),
            None => self.close_connection(connection),
        }
        true
    }

    pub(super) fn close_connection(&mut self, connection: Token) {
        let Some(mut line) = self.upstreams.connections.remove(connection) else { return };
        line.stream.deregister(&self.registry);
        if line.exchange.is_none() {
            self.upstreams.forget_idle(connection, &line.origin);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::is_progress;

    #[test]
    fn heads_and_comments_are_no_progress() {
        for silent in [&b"3\r\n:\n\n\r\n"[..], b":\n\n", b": ping\n\n", b"\r\n", b""] {
            assert!(!is_progress(silent, true), "{silent:?}");
        }
        for said in
            [&b"data: x\n\n"[..], b"9\r\ndata: x\n\n\r\n", b"3\r\n:\n\n\r\n9\r\ndata: x\n\n\r\n", &[b'a'; 65]]
        {
            assert!(is_progress(said, true), "{said:?}");
        }
        let head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n";
        assert!(!is_progress(head, false));
        assert!(!is_progress(&head[..20], false));
        assert!(is_progress(&[&head[..], b"data: x\n\n"].concat(), false));
    }
}
