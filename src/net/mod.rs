//! HTTP over the reactor: accept, dial, keep, relay.
//!
//! ```text
//!   client ── Server ──┐                        ┌── Exchange ── engine or peer
//!   (server.rs)        ├── Net (this file) ─────┤   (upstream.rs, relay.rs)
//!   NetEvent::Request ─┘                        └─ NetEvent::Finished
//! ```
//!
//! The owner, a daemon's shell, takes [`NetEvent`]s and answers each [`NetEvent::Request`] in one of
//! three ways: [`Net::respond`] with a whole response, [`Net::stream_begin`] and its kin for a
//! response of its own making that comes piece by piece, or [`Net::start`] with the client as the
//! sink, after which bytes move between the two sockets without the owner seeing them. An exchange may
//! also collect a small answer for the owner (probes), or hand it the pieces (translation).
//!
//! Every exchange that was started ends with exactly one [`NetEvent::Finished`]. Nothing here decides
//! where a request goes or what a failure means for an engine; that is the cores' business.

use std::borrow::Cow;
use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use crate::http::fields::{FieldLines, same_name};
use crate::http::head::{RequestHead, is_hop_by_hop};
use crate::http::server::{Request, Response};
use crate::metrics::Histogram;
use crate::reactor::ready::{CARRIED_ON_BYTES, ReadyList, SHARE_BYTES, TURN_BUDGET_BYTES};
use crate::reactor::stream::Listener;
use crate::reactor::token::{Kind, Token};
use crate::reactor::{Edge, Registry, Waker};
use crate::time::{DeadlineQueue, Mono, earliest};
use crate::wire::url::BaseUrl;

pub mod budget;
pub mod buffer;
pub mod meter;
pub mod relay;
pub mod resolve;
mod server;
pub mod tls;
mod upstream;

use budget::BodyHold;
use meter::Tokens;
use relay::Forward;
use resolve::Resolver;
use server::{ClientNext, Server};
use tls::Tls;
use upstream::Upstreams;

/// Sizes and times; each has a default that suits both daemons.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Connections from clients at once; more are told 503 and closed. Where clients speak TLS, the last few of
    /// these are for those that are told.
    pub clients_max: usize,
    /// Largest request body, in bytes.
    pub body_bytes_max: usize,
    /// All request bodies together, in bytes; above it new ones are refused with 503. See [`budget`].
    pub bodies_bytes_max: usize,
    /// A request, head and body, must have arrived after this long.
    pub request_ms: u64,
    /// A kept-alive connection without a request is closed after this long.
    pub idle_ms: u64,
    /// A client that takes no byte of its response for this long is closed.
    pub write_stall_ms: u64,
    /// Idle connections to an engine or peer are closed after this long; llama-server closes its side
    /// after 5 s, and a request must never meet that close.
    pub upstream_idle_ms: u64,
    /// Idle connections kept for one address.
    pub upstream_idle_max: usize,
    /// Exchanges at once.
    pub exchanges_max: usize,
    /// After this long without a byte for the client, a stream of events gets a comment, so that nobody
    /// on the way takes it for dead; 0 for never.
    pub keep_alive_ms: u64,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            clients_max: 24_576,
            body_bytes_max: 64 << 20,
            bodies_bytes_max: 256 << 20,
            request_ms: 60_000,
            idle_ms: 75_000,
            write_stall_ms: 60_000,
            upstream_idle_ms: 2_000,
            upstream_idle_max: 512,
            exchanges_max: 24_576,
            keep_alive_ms: 0,
        }
    }
}

/// Descriptors left to everything but connections.
const DESCRIPTORS_RESERVED: u64 = 64;

impl Limits {
    /// The defaults, lowered where the process may not open as many descriptors: every client may need
    /// one for itself and one for its engine. Running out would stop more than connections.
    #[must_use]
    pub fn within_descriptors(limit: Option<u64>) -> Limits {
        let mut limits = Limits::default();
        let pairs = limit.unwrap_or(u64::MAX).saturating_sub(DESCRIPTORS_RESERVED) / 2;
        let most = usize::try_from(pairs).unwrap_or(usize::MAX).max(16);
        limits.clients_max = limits.clients_max.min(most);
        limits.exchanges_max = limits.exchanges_max.min(most);
        limits
    }
}

/// How long the parts of an exchange may take.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// Until connected.
    pub connect_ms: u64,
    /// From the request's end to the response's first byte, and from its head to the first byte that says
    /// something: a long prompt takes minutes, before the head or behind it.
    pub first_byte_ms: u64,
    /// Between two bytes of the response from then on. A response that is collected has no such limit: all of it must
    /// come within `first_byte_ms`.
    pub idle_ms: u64,
}

/// A request to an engine or a peer.
pub struct Outbound<'a> {
    /// Scheme, host, port and base path.
    pub to: BaseUrl,
    /// Method.
    pub method: Cow<'a, str>,
    /// Path and query below the base path.
    pub target: Cow<'a, str>,
    /// Fields, without `Host`, `Content-Length` and hop-by-hop ones.
    pub fields: FieldLines,
    /// Body; shared with whoever may have to send it again elsewhere.
    pub body: Arc<Vec<u8>>,
    /// Where the answer goes.
    pub sink: Sink,
    /// Time limits.
    pub patience: Patience,
    /// How long the connection may rest afterwards until it carries another exchange, in milliseconds;
    /// [`Limits::upstream_idle_ms`] where the peer is an engine and `None`.
    pub keep_ms: Option<u64>,
}

impl fmt::Debug for Outbound<'_> {
    /// Without the values of fields, which may be keys, and the body, which may be a prompt.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Outbound")
            .field("to", &self.to)
            .field("method", &self.method)
            .field("fields", &self.fields)
            .field("body_bytes", &self.body.len())
            .field("sink", &self.sink)
            .finish_non_exhaustive()
    }
}

/// Where an answer goes.
#[derive(Debug)]
pub enum Sink {
    /// To this client, as it comes. Statuses in `hold_back` end the exchange before a byte of the
    /// answer is forwarded, so that another engine may be tried.
    Client {
        /// The client, whose request must be unanswered.
        client: Token,
        /// Statuses that are not forwarded.
        hold_back: &'static [u16],
        /// Fields to add to the answer.
        fields: FieldLines,
    },
    /// Collected, up to this many bytes, and returned with [`NetEvent::Finished`].
    Collect {
        /// Larger answers are an error.
        bytes_max: usize,
    },
    /// Handed to the owner as it comes, decoded, in [`NetEvent::Data`]. Statuses in `hold_back` end the
    /// exchange before the owner hears of an answer.
    Owner {
        /// Statuses that are not handed over.
        hold_back: &'static [u16],
    },
}

impl Sink {
    /// Statuses that end the exchange without an answer.
    fn hold_back(&self) -> &'static [u16] {
        match self {
            Sink::Client { hold_back, .. } | Sink::Owner { hold_back } => hold_back,
            Sink::Collect { .. } => &[],
        }
    }
}

/// What happened.
#[derive(Debug)]
pub enum NetEvent {
    /// A client sent a request, which must be answered.
    Request {
        /// The client.
        client: Token,
        /// Its request.
        request: Box<Request>,
        /// Its address.
        peer: SocketAddr,
    },
    /// A client left before its response was complete. Its exchange, if it had one, ends with
    /// [`Outcome::ClientGone`] by itself.
    ClientGone {
        /// The client; it is dead already.
        client: Token,
    },
    /// A streamed response drained below its low-water mark.
    Drained {
        /// The client.
        client: Token,
    },
    /// The answer's head came.
    Head {
        /// The exchange.
        exchange: Token,
        /// Its status.
        status: u16,
    },
    /// Part of an answer to [`Sink::Owner`].
    Data {
        /// The exchange.
        exchange: Token,
        /// Decoded bytes.
        bytes: Vec<u8>,
    },
    /// The exchange is over.
    Finished {
        /// The exchange; it is dead already.
        exchange: Token,
        /// How it ended.
        outcome: Outcome,
        /// When what happened.
        timing: Timing,
    },
}

/// How an exchange ended.
#[derive(Debug)]
pub enum Outcome {
    /// The whole answer came; `body` holds it for [`Sink::Collect`].
    Complete {
        /// Status.
        status: u16,
        /// Collected body.
        body: Vec<u8>,
    },
    /// The client left first.
    ClientGone,
    /// The owner called [`Net::cancel`].
    Cancelled,
    /// The engine or peer failed.
    Failed(Fault),
}

/// How an engine or peer failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// What went wrong.
    pub kind: FaultKind,
    /// For people: what happened to what.
    pub reason: String,
    /// Whether a byte of the answer has reached the client: then nothing else can be tried, and the
    /// client's connection has been dealt with.
    pub answered: bool,
    /// Whether a byte of the request may have reached the engine.
    pub sent: bool,
    /// Whether a byte of an answer came, other than one that was held back for its status: the request must
    /// not be sent again, even if its client has seen nothing.
    pub begun: bool,
    /// After how many seconds the peer wants to be asked again, if its status was held back and it said so.
    pub retry_after_s: Option<u64>,
}

/// Kinds of fault, as they differ in what may be done next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultKind {
    /// No connection: refused, unreachable, no such name.
    Connect,
    /// This process could not even try: too many exchanges, no descriptor. The peer has no part in it.
    Local,
    /// No connection in time: nothing was sent. The peer's machine may be gone, or its queue full.
    Unreached,
    /// No first byte or no next byte in time.
    Timeout,
    /// The connection broke.
    Reset,
    /// What came is not HTTP, or more than was allowed.
    Protocol,
    /// A status that was held back.
    Status(u16),
    /// The owner called [`Net::abort`].
    Aborted,
}

/// Points in an exchange's life, and what it took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Timing {
    /// [`Net::start`] was called.
    pub started: Mono,
    /// There was a connection.
    pub connected: Option<Mono>,
    /// The answer's head was complete.
    pub first_byte: Option<Mono>,
    /// The first piece of a stream that said something came: no head, no comment. `None` for what is no stream
    /// of events.
    pub first_token: Option<Mono>,
    /// It ended.
    pub ended: Mono,
    /// What the engine told at its answer's end.
    pub tokens: Tokens,
}

/// How far an exchange has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// [`Net::start`] was called.
    pub started: Mono,
    /// When its answer last went on. Neither its head counts, which comes before the first token, nor
    /// comments, which engines write to keep a silent stream open.
    pub last_byte: Option<Mono>,
}

/// Says why an address must not be dialled for a URL, where that is so.
#[derive(Clone)]
pub struct DialRule(Arc<Verdict>);

type Verdict = dyn Fn(&BaseUrl, IpAddr) -> Result<(), String> + Send + Sync;

impl DialRule {
    /// A rule.
    pub fn new(verdict: impl Fn(&BaseUrl, IpAddr) -> Result<(), String> + Send + Sync + 'static) -> DialRule {
        DialRule(Arc::new(verdict))
    }
}

impl fmt::Debug for DialRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DialRule")
    }
}

/// Both sides and what is between them.
#[derive(Debug)]
pub struct Net {
    registry: Registry,
    ready: ReadyList,
    timers: DeadlineQueue<Token>,
    server: Server,
    upstreams: Upstreams,
    resolver: Resolver,
    tls: Tls,
    dial_rule: Option<DialRule>,
    events: VecDeque<NetEvent>,
    scratch: Vec<u8>,
    spares: buffer::Spares,
    /// What a session may move at the moment before others have their turn.
    share_bytes: usize,
    /// What sessions that carry on have moved in this turn.
    moved_bytes: usize,
    limits: Limits,
    token_gaps: Histogram,
    /// Request to or bytes from an engine, for a client or the owner: when the last ones were.
    relayed_at: Mono,
}

/// Most sessions that are ended in one turn because their time is over: thousands may have begun together.
const EXPIRED_PER_TURN_MAX: usize = 32;
/// Bytes that are allocated at first for the fields of a request to an engine.
const FORWARDED_FIRST_ALLOCATION_BYTES: usize = 512;
/// Bytes read from a socket at once.
const SCRATCH_BYTES: usize = 64 * 1024;
/// What malloc does not take from its heap, in bytes: beyond its threshold of 128 KiB.
const FRESH_PAGES_BYTES: usize = 256 * 1024;

impl Net {
    /// No listeners, no connections.
    #[must_use]
    pub fn new(registry: Registry, waker: Waker, limits: Limits) -> Net {
        Net {
            registry,
            ready: ReadyList::default(),
            timers: DeadlineQueue::default(),
            server: Server::new(limits.bodies_bytes_max),
            upstreams: Upstreams::new(),
            resolver: Resolver::new(waker),
            tls: Tls::default(),
            dial_rule: None,
            events: VecDeque::new(),
            scratch: scratch(),
            spares: buffer::Spares::default(),
            share_bytes: SHARE_BYTES,
            moved_bytes: 0,
            limits,
            token_gaps: Histogram::default(),
            relayed_at: Mono::default(),
        }
    }

    /// Dials only what `rule` allows from now on; it is asked with every address that a URL names or was
    /// resolved to.
    pub fn set_dial_rule(&mut self, rule: DialRule) {
        self.dial_rule = Some(rule);
    }

    /// From now on silent streams of events get comments, see [`Limits::keep_alive_ms`].
    pub fn keep_streams_alive(&mut self, every_ms: u64) {
        self.limits.keep_alive_ms = every_ms;
    }

    /// Listens on `address`; port 0 takes a free one. Returns the bound address.
    ///
    /// # Errors
    /// Address in use, no permission, no such address.
    pub fn listen(&mut self, address: SocketAddr) -> io::Result<SocketAddr> {
        self.server.listen(address, &self.registry)
    }

    /// Accepts connections on a socket that listens already and does not block. Returns its address.
    ///
    /// # Errors
    /// Where the kernel cannot wait for one more descriptor.
    pub fn listen_on(&mut self, listener: std::net::TcpListener) -> io::Result<SocketAddr> {
        let listener = Listener::adopt(listener, &self.registry, Token::only(Kind::Listener))?;
        self.server.listen_on(listener)
    }

    /// Accepts no further connection; those that are open go on.
    pub fn stop_listening(&mut self) {
        self.server.stop_listening(&self.registry);
    }

    /// The reactor reported on one of this room's tokens.
    pub fn on_edge(&mut self, token: Token, edge: Edge) {
        let known = match token.kind() {
            Kind::Listener => true,
            Kind::Client => self.server.clients.get_mut(token).map(|c| c.stream.on_edge(edge)).is_some(),
            Kind::Upstream => {
                self.upstreams.connections.get_mut(token).map(|c| c.stream.on_edge(edge)).is_some()
            }
            _ => false,
        };
        if known {
            self.ready.push(token);
        }
    }

    /// Does what became possible: one round over the sessions that are ready, then over the timers.
    pub fn turn(&mut self, now: Mono) {
        self.take_resolved(now);
        self.send_owed(now);
        let carry_on = self.ready.behind();
        for _ in 0..self.ready.len() {
            let Some(token) = self.ready.pop() else { break };
            self.advance(token, now);
        }
        (self.share_bytes, self.moved_bytes) = (TURN_BUDGET_BYTES, 0);
        for _ in 0..carry_on {
            if self.moved_bytes >= CARRIED_ON_BYTES {
                break;
            }
            let Some(token) = self.ready.pop_behind() else { break };
            self.advance(token, now);
        }
        self.share_bytes = SHARE_BYTES;
        self.turn_handshakes(now);
        self.flush_owed(now);
        self.expire(now);
    }

    fn advance(&mut self, token: Token, now: Mono) {
        match token.kind() {
            Kind::Listener => self.accept(now),
            Kind::Client => self.client_ready(token, now),
            Kind::Upstream => self.upstream_ready(token, now),
            _ => {}
        }
    }

    /// The next event, if there is one. Handle all before the loop waits again.
    pub fn next_event(&mut self) -> Option<NetEvent> {
        self.events.pop_front()
    }

    /// Whether there is something to do, so that the loop must not block.
    #[must_use]
    pub fn busy(&self) -> bool {
        self.is_behind() || !self.upstreams.to_send.is_empty()
    }

    /// Whether what has come is not all dealt with: sessions are ready, or events have come about behind the last
    /// [`Net::next_event`] (what the owner ended itself, say).
    #[must_use]
    pub fn is_behind(&self) -> bool {
        !self.ready.is_empty()
            || !self.tls.handshakes.is_empty()
            || !self.events.is_empty()
            || !self.server.to_flush.is_empty()
    }

    /// When [`Net::turn`] must run at the latest.
    #[must_use]
    pub fn deadline(&mut self) -> Option<Mono> {
        let Net { timers, server, upstreams, .. } = self;
        timers.forget_orphans(|token| match token.kind() {
            Kind::Client => server.clients.get(token).is_some(),
            Kind::Upstream => upstreams.connections.get(token).is_some(),
            _ => upstreams.exchanges.get(token).is_some(),
        });
        earliest(timers.next(), server.accept_again_at())
    }

    /// Whether a client would be cut off by an end now: one that is owed an answer, or that is likely to be
    /// sending its request.
    #[must_use]
    pub fn is_awaited(&self) -> bool {
        self.server.awaited()
    }

    /// Clients that are connected.
    #[must_use]
    pub fn clients(&self) -> usize {
        self.server.clients.len()
    }

    /// Exchanges in flight.
    #[must_use]
    pub fn exchanges(&self) -> usize {
        self.upstreams.exchanges.len()
    }

    /// When a request was sent to an engine, or part of its answer came, the last time. What is
    /// [collected](Sink::Collect), probes say, does not count.
    #[must_use]
    pub fn relayed_at(&self) -> Mono {
        self.relayed_at
    }

    /// Times between two pieces of one relayed stream, of all streams.
    #[must_use]
    pub fn token_gaps(&self) -> &Histogram {
        &self.token_gaps
    }

    /// Whether the head of an exchange's answer has come.
    #[must_use]
    pub fn is_answered(&self, exchange: Token) -> bool {
        self.upstreams.exchanges.get(exchange).is_some_and(|session| session.is_answered())
    }

    /// Answers a request. Nothing happens if the client has left.
    pub fn respond(&mut self, client: Token, response: &Response, now: Mono) {
        let Some(session) = self.server.clients.get_mut(client) else { return };
        session.respond(response);
        self.client_flush(client, now);
    }

    /// Begins a response that comes piece by piece.
    pub fn stream_begin(&mut self, client: Token, content_type: &str, fields: FieldLines, now: Mono) {
        let Some(session) = self.server.clients.get_mut(client) else { return };
        session.stream_begin(content_type, fields);
        self.client_flush(client, now);
    }

    /// Sends a piece. Returns the bytes that wait for the client; above [`buffer::HIGH_WATER_BYTES`] the
    /// owner should pause its source until [`NetEvent::Drained`].
    pub fn stream_push(&mut self, client: Token, piece: &[u8], now: Mono) -> usize {
        let Some(session) = self.server.clients.get_mut(client) else { return 0 };
        session.stream_push(piece);
        self.client_flush(client, now);
        self.server.clients.get(client).map_or(0, |session| session.out.len())
    }

    /// Ends a streamed response.
    pub fn stream_end(&mut self, client: Token, now: Mono) {
        let Some(session) = self.server.clients.get_mut(client) else { return };
        session.stream_end();
        self.client_flush(client, now);
    }

    /// Adds fields to the answer of the request that a client waits on, whatever it will be.
    pub fn add_fields(&mut self, client: Token, fields: FieldLines) {
        if let Some(session) = self.server.clients.get_mut(client) {
            session.added = fields;
        }
    }

    /// The IP address that a client is connected from, as text.
    #[must_use]
    pub fn address(&self, client: Token) -> Option<&Arc<str>> {
        self.server.clients.get(client).map(|session| &session.address)
    }

    /// The correlation id of the request that a client waits on.
    #[must_use]
    pub fn correlation(&self, client: Token) -> Option<&str> {
        self.server.clients.get(client).map(|session| session.correlation())
    }

    /// The name of the request that a client waits on: its `x-request-id`, or one that was made.
    #[must_use]
    pub fn request_id(&self, client: Token) -> Option<&str> {
        self.server.clients.get(client).map(|session| session.request_id.as_str())
    }

    /// When the request began to arrive that a client waits on.
    #[must_use]
    pub fn began(&self, client: Token) -> Option<Mono> {
        self.server.clients.get(client).map(|session| session.began)
    }

    /// Takes over the room that a request's body has in the budget: for whoever keeps the body for longer
    /// or for a shorter time than its client waits. Otherwise it is given back when the answer is complete.
    pub fn take_body(&mut self, client: Token) -> Option<BodyHold> {
        let session = self.server.clients.get_mut(client)?;
        Some(std::mem::replace(&mut session.body, self.server.bodies.hold()))
    }

    /// Makes room in the budget of bodies for so many bytes of something else that is kept, which may take half of it;
    /// with none of them, gives it back. False if there is none; then it is as it was.
    pub fn keep(&mut self, room: &mut Option<BodyHold>, bytes: usize) -> bool {
        if bytes == 0 {
            *room = None;
            return true;
        }
        let bodies = &mut self.server.bodies;
        let room = room.get_or_insert_with(|| bodies.hold());
        bodies.keep(room, bytes)
    }

    /// Bytes of request bodies in memory.
    #[must_use]
    pub fn bodies_bytes(&self) -> usize {
        self.server.bodies.held_bytes()
    }

    /// Requests that were refused because their bodies found no room.
    #[must_use]
    pub fn bodies_refused(&self) -> u64 {
        self.server.bodies.refused()
    }

    /// Starts an exchange. It ends with [`NetEvent::Finished`], also when it fails at once.
    pub fn start(&mut self, outbound: Outbound<'_>, now: Mono) -> Token {
        self.start_judged(outbound, None, now)
    }

    /// The same under a rule of its own, in the place of the one for all.
    pub fn start_judged(&mut self, mut outbound: Outbound<'_>, rule: Option<DialRule>, now: Mono) -> Token {
        if !matches!(outbound.sink, Sink::Collect { .. }) {
            self.relayed_at = now;
        }
        let (client, forward) = match &mut outbound.sink {
            Sink::Client { client, fields, .. } => {
                let session = self.server.clients.get(*client);
                let forward = session.map(|session| {
                    let mut fields = std::mem::take(fields);
                    session.echo(&mut fields);
                    Forward { to: session.answer_to(), fields }
                });
                (Some(*client), forward)
            }
            Sink::Collect { .. } | Sink::Owner { .. } => (None, None),
        };
        let exchange = self.upstreams.begin(outbound, forward, rule, &mut self.spares, now);
        if let Some(session) = client.and_then(|client| self.server.clients.get_mut(client)) {
            session.next = ClientNext::Relay(exchange);
        } else if client.is_some() {
            self.finish_exchange(exchange, Outcome::ClientGone, now);
            return exchange;
        }
        if self.upstreams.exchanges.len() > self.limits.exchanges_max {
            self.fail_exchange(exchange, FaultKind::Local, "too many exchanges at once", now);
        } else {
            self.dial(exchange, now);
        }
        exchange
    }

    /// How far an exchange has come, if it runs and nothing but its engine keeps it.
    #[must_use]
    pub fn progress(&self, exchange: Token) -> Option<Progress> {
        let is_held =
            |client| self.server.clients.get(client).is_some_and(|session| session.above_high_water);
        self.upstreams.progress(exchange).filter(|_| !self.upstreams.client_of(exchange).is_some_and(is_held))
    }

    /// Ends an exchange at the owner's wish; its client, if it has one, is still owed an answer.
    pub fn cancel(&mut self, exchange: Token, now: Mono) {
        if let Some(client) = self.upstreams.client_of(exchange)
            && let Some(session) = self.server.clients.get_mut(client)
            && session.next == ClientNext::Relay(exchange)
        {
            session.next = ClientNext::Owner;
        }
        self.finish_exchange(exchange, Outcome::Cancelled, now);
    }

    /// Ends an exchange at the owner's wish as if its engine had failed: a client that has part of the
    /// answer sees an error event or a broken connection, never a clean end; one that has none is still
    /// owed an answer. It ends with [`FaultKind::Aborted`] and `reason`, which the client may be told.
    pub fn abort(&mut self, exchange: Token, reason: &str, now: Mono) {
        self.fail_exchange(exchange, FaultKind::Aborted, reason, now);
    }

    /// Stops or resumes reading an exchange whose pieces go to the owner.
    pub fn pause(&mut self, exchange: Token, paused: bool) {
        if let Some(connection) = self.upstreams.pause(exchange, paused)
            && !paused
        {
            self.ready.push(connection);
        }
    }

    fn expire(&mut self, now: Mono) {
        if self.server.accept_again_at().is_some_and(|at| at <= now) {
            self.accept(now);
        }
        // What is left over is due at the next turn, which then comes at once.
        for _ in 0..EXPIRED_PER_TURN_MAX {
            let Some(entry) = self.timers.pop_due(now) else { return };
            let token = entry.1;
            let deadline = match token.kind() {
                Kind::Client => self.server.clients.get_mut(token).map(|client| &mut client.deadline),
                Kind::Upstream => self.upstreams.connections.get_mut(token).map(|c| &mut c.deadline),
                Kind::Exchange => self.upstreams.exchanges.get_mut(token).map(|e| &mut e.deadline),
                _ => None,
            };
            if deadline.is_none_or(|deadline| !self.timers.confirm(entry, deadline, now)) {
                continue;
            }
            match token.kind() {
                Kind::Client => self.client_expired(token, now),
                Kind::Upstream => match self.upstreams.connections.get(token).and_then(|c| c.exchange) {
                    Some(exchange) => self.exchange_expired(exchange, now),
                    None => self.close_connection(token),
                },
                _ => self.exchange_expired(token, now),
            }
        }
    }
}

/// A buffer of which only what is used takes memory: as much comes from the kernel in pages of its own, which are
/// there once they are written to.
fn scratch() -> Vec<u8> {
    let mut scratch = vec![0; FRESH_PAGES_BYTES];
    scratch.truncate(SCRATCH_BYTES);
    scratch
}

/// The field in which control planes count each other on a request's way. It is passed on whatever else is said of
/// it: without it a circle of control planes would not be noticed.
pub const HOPS_FIELD: &str = "X-LLorch-Hops";

/// The fields of a client's request that may go to an engine: nothing hop by hop, no credentials of
/// ours, nothing that the client cannot vouch for, and none of those that `replaced` names because the
/// caller adds its own.
pub fn forwardable(head: &RequestHead, replaced: impl Fn(&[u8]) -> bool) -> FieldLines {
    // `x-conversation-id` makes llama-server go on after its client has left.
    const NOT_FORWARDED: [&str; 7] =
        ["host", "content-length", "expect", "authorization", "x-conversation-id", "forwarded", "x-real-ip"];
    const NOT_FORWARDED_PREFIXES: [&str; 2] = ["x-llorch-", "x-forwarded-"];
    let mut lines = FieldLines::with_capacity(FORWARDED_FIRST_ALLOCATION_BYTES);
    for field in head.fields.raw() {
        let name = field.name;
        let is = |known: &&str| same_name(name, known.as_bytes());
        let starts_with = |prefix: &&str| {
            name.get(..prefix.len()).is_some_and(|s| s.eq_ignore_ascii_case(prefix.as_bytes()))
        };
        let is_ours = NOT_FORWARDED_PREFIXES.iter().any(starts_with) || head.fields.connection_names(name);
        let may_pass = !is_ours || is(&HOPS_FIELD);
        if may_pass && !is_hop_by_hop(name) && !NOT_FORWARDED.iter().any(is) && !replaced(name) {
            lines.copy(&field);
        }
    }
    lines
}
