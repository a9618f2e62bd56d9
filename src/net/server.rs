//! The clients' side: accept, read whole requests, write answers.
//!
//! A client is always in one of the states of [`ClientNext`], which says who acts next. It is read
//! while it has no request outstanding; otherwise only as far as needed to notice that it left.

use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::sync::Arc;

use crate::http::fields::FieldLines;
use crate::http::head::{BadMessage, Fields, Framing, RequestHead};
use crate::http::server::{
    AnswerTo, CONTINUE, LAST_CHUNK, Progress, RequestReader, Response, encode_chunk, encode_response,
    encode_stream_head,
};
use crate::http::sse::KEEP_ALIVE;
use crate::reactor::Registry;
use crate::reactor::stream::{Listener, ReadResult, Stream};
use crate::reactor::token::{Kind, Table, Token};
use crate::time::{Deadline, Mono};

use super::budget::{BodyBudget, BodyHold};
use super::buffer::{HIGH_WATER_BYTES, LOW_WATER_BYTES, OutBuffer};
use super::{Net, NetEvent, Outcome, SCRATCH_BYTES};

/// Connections accepted in one turn; more wait for the next.
const ACCEPTS_PER_TURN: usize = 64;
/// Pause after the process ran out of descriptors: accepting at once again would spin.
const ACCEPT_PAUSE_MS: u64 = 250;
/// Bytes kept of what a client sends while its response is owed; beyond them it is not read.
const PIPELINED_BYTES_MAX: usize = 64 * 1024;
/// How long a client that was refused may take to notice; what it sends meanwhile is thrown away.
const LINGER_MS: u64 = 2_000;
/// When a client may try again whose body found no room, in milliseconds: bodies go once their engines
/// begin to answer.
const RETRY_MS: u64 = 1_000;
/// The refusal of a body that would fit if others were not there.
const NO_ROOM: BadMessage =
    BadMessage { status: 503, reason: "too many large requests at once; try again shortly" };
/// What a connection is told that is one too many.
const CROWDED: &[u8] =
    b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
/// The same within TLS, where it has a place of its own until it has been told.
const CROWDED_WITHIN_TLS: BadMessage =
    BadMessage { status: 503, reason: "too many connections at once; try again shortly" };
/// Places that are kept for connections within TLS that are only told that they are one too many: a handshake comes
/// first, which takes memory and time, so only so many are told at a time and the others are just closed.
const TOLD_MAX: usize = 64;
/// One place in so many, where all of them are few.
const TOLD_PER_CLIENTS: usize = 16;
/// With pieces of so many streams in two turns one behind the other, a piece waits for the next.
const OUTPACED_MIN: usize = 8;
/// Bytes of an unread head that count for no budget: most heads are smaller.
const SMALL_HEAD_BYTES: usize = 4 * 1024;
/// Length of an id that is made here: 32 digits and four hyphens.
const ID_BYTES: usize = 36;
/// Room for an id that a client which waits for nothing keeps for its next request, in bytes: more than our own
/// ids need.
const ID_KEPT_BYTES: usize = 64;
/// Longest correlation id taken over from a client.
const CORRELATION_BYTES_MAX: usize = 128;

/// Who acts next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ClientNext {
    /// The client: a request is awaited.
    Client,
    /// The owner: a response is owed.
    Owner,
    /// The owner, piece by piece.
    OwnerStream,
    /// The engine at the other end of this exchange.
    Relay(Token),
    /// Nobody: what is buffered is written, then the connection is closed.
    Close,
    /// The client: everything was written and the connection is closed once it has seen that. Closing
    /// on unread bytes would reset it, and the reset would overtake the answer.
    Linger,
}

#[derive(Debug)]
pub(super) struct Client {
    pub(super) stream: Stream,
    pub(super) out: OutBuffer,
    pub(super) next: ClientNext,
    pub(super) deadline: Deadline,
    /// If it has another than its request's id.
    correlation: Option<String>,
    pub(super) request_id: String,
    /// Fields that its owner adds to whatever the answer is.
    pub(super) added: FieldLines,
    peer: SocketAddr,
    /// Its IP address, as text; made once, for requests that follow each other.
    pub(super) address: Arc<str>,
    reader: RequestReader,
    unread: Vec<u8>,
    to: AnswerTo,
    /// Room for the body of the request that arrives, or is answered.
    pub(super) body: BodyHold,
    /// Room for what it has sent behind that request.
    ahead: BodyHold,
    /// A request has begun to arrive, and its deadline runs.
    receiving: bool,
    /// Nothing of a request has come yet.
    is_new: bool,
    /// The answer that its owner streams consists of events.
    streams_events: bool,
    /// When the request began to arrive that is answered now.
    pub(super) began: Mono,
    /// Its exchange waits until enough has been written.
    pub(super) above_high_water: bool,
    /// What was put out for it in this turn is written at its end, or at that of the next.
    flush_owed: bool,
    /// The last turn in which something was written to it, as [`Server`] counts them.
    flushed_in: u64,
    /// Not all that it sent has been read.
    refused: bool,
    /// It is one too many, and told so once it can be.
    is_crowd: bool,
}

impl Client {
    /// Whether an end now would cut it off: an answer is owed or not yet written, or a request arrives or,
    /// the connection being new, is likely to.
    fn awaits(&self) -> bool {
        self.owed() || !self.out.is_empty() || self.receiving || self.is_new
    }

    /// Whether a response is owed or not yet complete.
    pub(super) fn owed(&self) -> bool {
        matches!(self.next, ClientNext::Owner | ClientNext::OwnerStream | ClientNext::Relay(_))
    }

    /// Whether its answer comes in pieces, as they are made.
    fn streams(&self) -> bool {
        matches!(self.next, ClientNext::OwnerStream | ClientNext::Relay(_))
    }

    pub(super) fn answer_to(&self) -> AnswerTo {
        self.to
    }

    /// Adds the fields that every answer to this client carries.
    pub(super) fn echo(&self, fields: &mut FieldLines) {
        fields.push("X-Correlation-Id", self.correlation());
        fields.push("X-Request-Id", &self.request_id);
        fields.extend(&self.added);
    }

    fn echoed(&self) -> FieldLines {
        let mut fields = FieldLines::new();
        self.echo(&mut fields);
        fields
    }

    pub(super) fn correlation(&self) -> &str {
        self.correlation.as_deref().unwrap_or(&self.request_id)
    }

    /// Takes over the names that the client gave its request, or makes one. Several requests may share a
    /// correlation id, so it does not name one of them.
    fn name_request(&mut self, fields: Option<&Fields>) {
        let given = |name| fields.and_then(|fields| fields.get(name)).filter(|id| is_acceptable_id(id));
        self.request_id.clear();
        match given("x-request-id") {
            Some(id) => self.request_id.push_str(id),
            None => self.request_id.push_str(new_id(&mut [0; ID_BYTES])),
        }
        self.correlation = given("x-correlation-id").map(str::to_string);
        self.added = FieldLines::new();
    }

    pub(super) fn respond(&mut self, response: &Response) {
        if !matches!(self.next, ClientNext::Owner) {
            return;
        }
        let echoed = self.echoed();
        encode_response(self.out.end(), response, &echoed, self.to);
        self.answered(self.to.keep_alive);
    }

    pub(super) fn stream_begin(&mut self, content_type: &str, mut fields: FieldLines) {
        if self.next != ClientNext::Owner {
            return;
        }
        self.echo(&mut fields);
        encode_stream_head(self.out.end(), 200, content_type, &fields, self.to);
        self.streams_events = content_type == "text/event-stream";
        self.next = ClientNext::OwnerStream;
    }

    pub(super) fn stream_push(&mut self, piece: &[u8]) {
        if self.next != ClientNext::OwnerStream || self.to.head_only {
            return;
        }
        match self.to.version {
            crate::http::head::Version::Http11 => encode_chunk(self.out.end(), piece),
            crate::http::head::Version::Http10 => self.out.end().extend_from_slice(piece),
        }
    }

    pub(super) fn stream_end(&mut self) {
        if self.next != ClientNext::OwnerStream {
            return;
        }
        let chunked = self.to.version == crate::http::head::Version::Http11;
        if chunked && !self.to.head_only {
            self.out.end().extend_from_slice(LAST_CHUNK);
        }
        self.answered(self.to.keep_alive && chunked);
    }

    /// The response is complete; the next request may come.
    pub(super) fn answered(&mut self, keep_alive: bool) {
        self.next = if keep_alive { ClientNext::Client } else { ClientNext::Close };
    }

    /// `head` is that of the request that is refused, where it was understood.
    fn refuse(&mut self, error: BadMessage, head: Option<&RequestHead>) {
        self.name_request(head.map(|head| &head.fields));
        let response = refusal(error, head.is_some_and(|head| head.path().starts_with("/v1/")));
        let echoed = self.echoed();
        encode_response(self.out.end(), &response, &echoed, AnswerTo::BROKEN);
        self.next = ClientNext::Close;
        self.refused = true;
    }
}

#[derive(Debug)]
pub(super) struct Server {
    pub(super) clients: Table<Client>,
    listeners: Vec<Listener>,
    accept_again_at: Option<Mono>,
    pub(super) bodies: BodyBudget,
    /// Clients to which something is written at the end of the turn.
    pub(super) to_flush: Vec<Token>,
    /// Turns so far.
    turns: u64,
    /// The last turn left pieces to this one, which leaves none.
    held: bool,
}

impl Server {
    pub(super) fn new(bodies_bytes_max: usize) -> Server {
        Server {
            clients: Table::new(Kind::Client),
            listeners: Vec::new(),
            accept_again_at: None,
            bodies: BodyBudget::new(bodies_bytes_max),
            to_flush: Vec::new(),
            turns: 0,
            held: false,
        }
    }

    pub(super) fn listen(&mut self, address: SocketAddr, registry: &Registry) -> io::Result<SocketAddr> {
        self.listen_on(Listener::bind(address, registry, Token::only(Kind::Listener))?)
    }

    pub(super) fn listen_on(&mut self, listener: Listener) -> io::Result<SocketAddr> {
        let bound = listener.local_address()?;
        self.listeners.push(listener);
        Ok(bound)
    }

    pub(super) fn stop_listening(&mut self, registry: &Registry) {
        for mut listener in self.listeners.drain(..) {
            listener.deregister(registry);
        }
        self.accept_again_at = None;
    }

    pub(super) fn awaited(&self) -> bool {
        self.clients.iter().any(|(_, client)| client.awaits())
    }

    pub(super) fn accept_again_at(&self) -> Option<Mono> {
        self.accept_again_at
    }

    /// Whether engines put out pieces of many streams faster than the loop turns: so many clients were written to
    /// in the last turn, and are owed a piece again. Two pieces of a stream then go in one write, a turn later.
    /// That turn waits for nothing: what is held keeps the loop busy.
    fn is_outpaced(&self) -> bool {
        let again = |client: &&Token| {
            let session = self.clients.get(**client);
            session.is_some_and(|session| session.streams() && session.flushed_in + 1 >= self.turns)
        };
        self.to_flush.len() >= OUTPACED_MIN && self.to_flush.iter().filter(again).count() >= OUTPACED_MIN
    }
}

impl Net {
    pub(super) fn accept(&mut self, now: Mono) {
        self.server.accept_again_at = None;
        for index in 0..self.server.listeners.len() {
            for turn in 0.. {
                if turn == ACCEPTS_PER_TURN || self.tls.is_behind() {
                    self.ready.push(Token::only(Kind::Listener));
                    break;
                }
                match self.server.listeners[index].accept() {
                    Ok(Some((tcp, peer))) => self.admit(tcp, peer, now),
                    Ok(None) => break,
                    Err(_) => {
                        self.server.accept_again_at = Some(now.plus_ms(ACCEPT_PAUSE_MS));
                        break;
                    }
                }
            }
        }
    }

    fn admit(&mut self, tcp: mio::net::TcpStream, peer: SocketAddr, now: Mono) {
        let (count, most) = (self.server.clients.len(), self.limits.clients_max);
        if count >= most {
            return self.turn_away(tcp);
        }
        let told = if self.tls.is_served() { TOLD_MAX.min(most / TOLD_PER_CLIENTS) } else { 0 };
        let Ok(session) = self.tls.incoming() else { return };
        let is_secured = session.is_some();
        let admitted = self.server.clients.insert_with(|token| {
            Ok::<Client, io::Error>(Client {
                stream: Stream::accepted(tcp, &self.registry, token)?.secured(session),
                out: OutBuffer::default(),
                next: ClientNext::Client,
                deadline: Deadline::default(),
                correlation: None,
                request_id: String::new(),
                added: FieldLines::new(),
                peer,
                address: peer.ip().to_string().into(),
                reader: RequestReader::new(self.limits.body_bytes_max),
                unread: Vec::new(),
                to: AnswerTo::BROKEN,
                body: self.server.bodies.hold(),
                ahead: self.server.bodies.hold(),
                receiving: false,
                is_new: true,
                streams_events: false,
                began: now,
                above_high_water: false,
                flush_owed: false,
                flushed_in: 0,
                refused: false,
                is_crowd: count >= most - told,
            })
        });
        if let Ok(client) = admitted {
            if is_secured {
                return self.await_handshake(client, now);
            }
            self.arm_client(client, self.limits.request_ms, now);
            self.client_ready(client, now);
        }
    }

    /// The handshake of a connection that is one too many is complete. True if there was such.
    pub(super) fn turn_crowd_away(&mut self, client: Token, now: Mono) -> bool {
        let is_crowd = self.server.clients.get(client).is_some_and(|session| session.is_crowd);
        if is_crowd {
            self.refuse(client, CROWDED_WITHIN_TLS, now);
        }
        is_crowd
    }

    /// One connection too many: it is told so where that takes neither memory nor time, and closed.
    fn turn_away(&mut self, mut tcp: mio::net::TcpStream) {
        if !self.tls.is_served() {
            // A request that is there already would make the close a reset, which overtakes the answer.
            let _ = tcp.read(&mut self.scratch);
            let _ = tcp.write(CROWDED);
        }
    }

    pub(super) fn arm_client(&mut self, client: Token, after_ms: u64, now: Mono) {
        if let Some(session) = self.server.clients.get_mut(client) {
            self.timers.arm(client, &mut session.deadline, now.plus_ms(after_ms));
        }
    }

    /// Something about the client's socket changed, or it may send its next request.
    pub(super) fn client_ready(&mut self, client: Token, now: Mono) {
        let Some(session) = self.server.clients.get(client) else { return };
        if session.stream.is_handshaking() {
            return self.tls.handshakes.push(client);
        }
        if !session.out.is_empty() && session.stream.latch().writable {
            self.client_flush(client, now);
        }
        let Some(session) = self.server.clients.get_mut(client) else { return };
        match session.next {
            ClientNext::Linger => self.discard(client, now),
            // A client that takes no answers gets no further ones made, or they would pile up here.
            ClientNext::Client | ClientNext::Close if !session.out.is_empty() => {}
            ClientNext::Client => self.read_requests(client, now),
            // A client that has sent everything and closed waits for nothing any more.
            _ if session.stream.latch().hangup => self.close_client(client, now),
            _ => self.read_ahead(client, now),
        }
    }

    fn read_requests(&mut self, client: Token, now: Mono) {
        let mut budget = self.share_bytes;
        loop {
            if !self.parse_unread(client, now) {
                return;
            }
            if budget == 0 {
                return self.ready.push_behind(client);
            }
            let Some(session) = self.server.clients.get_mut(client) else { return };
            match session.stream.read(&mut self.scratch[..budget.min(SCRATCH_BYTES)]) {
                Ok(ReadResult::Data(length)) => {
                    budget = budget.saturating_sub(length);
                    self.moved_bytes += length;
                    if session.unread.capacity() == 0 {
                        session.unread = self.spares.take();
                    }
                    session.unread.extend_from_slice(&self.scratch[..length]);
                }
                Ok(ReadResult::Empty) => return,
                Ok(ReadResult::Closed) | Err(_) => return self.close_client(client, now),
            }
        }
    }

    /// Feeds the reader what has been read. True if it wants more.
    fn parse_unread(&mut self, client: Token, now: Mono) -> bool {
        let Some(session) = self.server.clients.get_mut(client) else { return false };
        if session.unread.is_empty() {
            return true;
        }
        let begins = session.reader.head().is_none();
        let advanced = session.reader.advance(&session.unread);
        // Refused at once where it cannot fit, rather than after most of it has been sent.
        let announced = session.reader.head().filter(|_| begins).map_or(0, |head| match head.framing {
            Framing::Length(length) => usize::try_from(length).unwrap_or(usize::MAX),
            _ => 0,
        });
        if advanced.is_ok() && announced > 0 && !self.server.bodies.admits(announced) {
            self.refuse(client, NO_ROOM, now);
            return false;
        }
        let Some(session) = self.server.clients.get_mut(client) else { return false };
        match advanced {
            Ok((used, progress)) => {
                session.unread.drain(..used);
                if session.unread.is_empty() && session.unread.capacity() > PIPELINED_BYTES_MAX {
                    session.unread = Vec::new();
                }
                match progress {
                    Progress::More => {
                        let head_bytes = session.unread.len().saturating_sub(SMALL_HEAD_BYTES);
                        let bytes = session.reader.body_bytes() + head_bytes;
                        if !self.server.bodies.grow(&mut session.body, bytes) {
                            self.refuse(client, NO_ROOM, now);
                            return false;
                        }
                        let began = session.reader.mid_request(session.unread.len());
                        session.is_new &= !began;
                        if began && !std::mem::replace(&mut session.receiving, true) {
                            session.began = now;
                            self.arm_client(client, self.limits.request_ms, now);
                        }
                        true
                    }
                    Progress::WantsContinue => {
                        session.began = now;
                        session.out.end().extend_from_slice(CONTINUE);
                        self.client_flush(client, now);
                        self.server.clients.get(client).is_some_and(|c| c.next == ClientNext::Client)
                    }
                    Progress::Request(request) => {
                        if !self.server.bodies.grow(&mut session.body, request.body.capacity()) {
                            self.refuse_request(client, NO_ROOM, Some(&request.head), now);
                            return false;
                        }
                        if !session.receiving {
                            session.began = now;
                        }
                        session.to = AnswerTo::request(&request.head);
                        session.name_request(Some(&request.head.fields));
                        session.next = ClientNext::Owner;
                        session.receiving = false;
                        session.is_new = false;
                        session.deadline.disarm();
                        if session.stream.latch().hangup {
                            // Its farewell came along, and no further event will tell of it.
                            self.ready.push(client);
                        }
                        let peer = session.peer;
                        self.events.push_back(NetEvent::Request { client, request, peer });
                        false
                    }
                }
            }
            Err(error) => {
                self.refuse(client, error, now);
                false
            }
        }
    }

    pub(super) fn refuse(&mut self, client: Token, error: BadMessage, now: Mono) {
        let head = self.server.clients.get(client).and_then(|session| session.reader.head().cloned());
        self.refuse_request(client, error, head.as_ref(), now);
    }

    fn refuse_request(&mut self, client: Token, error: BadMessage, head: Option<&RequestHead>, now: Mono) {
        if let Some(session) = self.server.clients.get_mut(client) {
            session.unread = Vec::new();
            session.refuse(error, head);
            // What had come of it goes at once: others wait for the room.
            session.reader = RequestReader::new(0);
            session.body = self.server.bodies.hold();
            self.client_flush(client, now);
        }
    }

    /// While a response is owed: notice that the client left, and keep a little of what it sends.
    fn read_ahead(&mut self, client: Token, now: Mono) {
        let Some(session) = self.server.clients.get_mut(client) else { return };
        while session.unread.len() < PIPELINED_BYTES_MAX {
            let bytes = session.unread.len().saturating_sub(SMALL_HEAD_BYTES);
            if !self.server.bodies.grow(&mut session.ahead, bytes) {
                return; // It is read once its answer is complete.
            }
            match session.stream.read(&mut self.scratch) {
                Ok(ReadResult::Data(length)) => session.unread.extend_from_slice(&self.scratch[..length]),
                Ok(ReadResult::Empty) => return,
                Ok(ReadResult::Closed) | Err(_) => return self.close_client(client, now),
            }
        }
    }

    /// Everything was said to a client that may still be sending.
    fn linger(&mut self, client: Token, now: Mono) {
        let Some(session) = self.server.clients.get_mut(client) else { return };
        session.next = ClientNext::Linger;
        session.unread = Vec::new();
        session.stream.shut_down_write();
        session.deadline.disarm();
        self.arm_client(client, LINGER_MS, now);
        self.ready.push(client);
    }

    fn discard(&mut self, client: Token, now: Mono) {
        let Some(session) = self.server.clients.get_mut(client) else { return };
        let mut budget = self.share_bytes;
        while budget > 0 {
            match session.stream.read(&mut self.scratch) {
                Ok(ReadResult::Data(length)) => {
                    budget = budget.saturating_sub(length);
                    self.moved_bytes += length;
                }
                Ok(ReadResult::Empty) => return,
                Ok(ReadResult::Closed) | Err(_) => return self.close_client(client, now),
            }
        }
        self.ready.push_behind(client);
    }

    /// Writes what was put out for a client once all that can be read has been: a peer that is woken up by the
    /// first of many writes finds the others there. What is much goes at once.
    pub(super) fn client_flush_soon(&mut self, client: Token, now: Mono) {
        let Some(session) = self.server.clients.get_mut(client) else { return };
        if session.out.len() > LOW_WATER_BYTES {
            return self.client_flush(client, now);
        }
        if !std::mem::replace(&mut session.flush_owed, true) {
            self.server.to_flush.push(client);
        }
    }

    /// Writes what is owed to clients, or leaves it to the next turn where that makes fewer writes.
    pub(super) fn flush_owed(&mut self, now: Mono) {
        self.server.turns += 1;
        self.server.held = !self.server.held && self.server.is_outpaced();
        let held = self.server.held;
        let mut clients = std::mem::take(&mut self.server.to_flush);
        clients.retain(|client| {
            let Some(session) = self.server.clients.get(*client).filter(|session| session.flush_owed) else {
                return false;
            };
            // Whoever's time is over is judged by what could not be written, not by what was held.
            let is_due = session.deadline.at().is_some_and(|at| at <= now);
            let stays = held && session.streams() && !is_due;
            if !stays {
                self.client_flush(*client, now);
            }
            stays
        });
        // What was owed meanwhile is so few that it may wait for the next turn.
        let owed = std::mem::replace(&mut self.server.to_flush, clients);
        self.server.to_flush.extend(owed);
    }

    /// Writes what the client takes, and acts on what that makes possible.
    pub(super) fn client_flush(&mut self, client: Token, now: Mono) {
        let Some(session) = self.server.clients.get_mut(client) else { return };
        session.flush_owed = false;
        session.flushed_in = self.server.turns;
        let Ok(written) = session.out.flush(&mut session.stream) else {
            return self.close_client(client, now);
        };
        if !session.out.is_empty() {
            session.above_high_water |= session.out.len() >= HIGH_WATER_BYTES;
            if written > 0 || session.deadline.at().is_none() {
                self.arm_client(client, self.limits.write_stall_ms, now);
            }
        } else {
            match session.next {
                ClientNext::Close if session.refused || !session.unread.is_empty() => {
                    return self.linger(client, now);
                }
                ClientNext::Close => return self.close_client(client, now),
                ClientNext::Linger => return,
                ClientNext::Client => self.await_next_request(client, now),
                ClientNext::Relay(_) | ClientNext::OwnerStream if self.limits.keep_alive_ms > 0 => {
                    self.arm_client(client, self.limits.keep_alive_ms, now);
                }
                _ => session.deadline.disarm(),
            }
        }
        self.below_low_water(client);
    }

    fn await_next_request(&mut self, client: Token, now: Mono) {
        let Some(session) = self.server.clients.get_mut(client) else { return };
        session.body = self.server.bodies.hold();
        session.ahead = self.server.bodies.hold();
        // Most connections rest most of the time: one that does holds no memory but its own.
        if session.unread.is_empty() {
            self.spares.give(std::mem::take(&mut session.unread));
            session.out.rest(&mut self.spares);
            session.correlation = None;
            if session.request_id.capacity() > ID_KEPT_BYTES {
                session.request_id = String::new();
            }
        }
        let mid_request = session.reader.mid_request(session.unread.len());
        if !session.unread.is_empty() || session.stream.latch().readable {
            self.ready.push(client);
        }
        let patience_ms = if mid_request { self.limits.request_ms } else { self.limits.idle_ms };
        self.arm_client(client, patience_ms, now);
    }

    fn below_low_water(&mut self, client: Token) {
        let Some(session) = self.server.clients.get_mut(client) else { return };
        if !session.above_high_water || session.out.len() > LOW_WATER_BYTES {
            return;
        }
        session.above_high_water = false;
        match session.next {
            ClientNext::Relay(exchange) => {
                if let Some(connection) = self.upstreams.connection_of(exchange) {
                    self.ready.push(connection);
                }
            }
            ClientNext::OwnerStream => self.events.push_back(NetEvent::Drained { client }),
            _ => {}
        }
    }

    pub(super) fn client_expired(&mut self, client: Token, now: Mono) {
        let Some(session) = self.server.clients.get_mut(client) else { return };
        if session.stream.is_handshaking() {
            return self.handshake_expired(client, now);
        }
        if session.next == ClientNext::Client
            && session.out.is_empty()
            && session.reader.mid_request(session.unread.len())
        {
            let reason = "the request did not arrive in time";
            self.refuse(client, BadMessage { status: 408, reason }, now);
        } else if session.out.is_empty() && session.streams() {
            self.keep_stream_alive(client, now);
        } else {
            self.close_client(client, now);
        }
    }

    /// Nothing has been written to a client for a while that reads a stream: a comment goes out if the
    /// stream stands between two events, and the wait begins anew.
    fn keep_stream_alive(&mut self, client: Token, now: Mono) {
        let Some(session) = self.server.clients.get_mut(client) else { return };
        match session.next {
            ClientNext::Relay(exchange) => {
                self.upstreams.keep_alive(exchange, session.out.end());
            }
            _ if session.streams_events => session.stream_push(KEEP_ALIVE),
            _ => {}
        }
        self.client_flush(client, now);
    }

    /// Closes a client's connection and ends whatever ran for it.
    pub(super) fn close_client(&mut self, client: Token, now: Mono) {
        let Some(mut session) = self.server.clients.remove(client) else { return };
        self.tls.left(session.stream.is_handshaking());
        if session.owed() && session.to.version == crate::http::head::Version::Http10 {
            // Its answer may end by closing, and this is not its end.
            session.stream.reset_on_close();
        }
        session.stream.deregister(&self.registry);
        match session.next {
            ClientNext::Relay(exchange) => {
                // Clients leave as soon as they read that a stream is done.
                let outcome = match self.upstreams.said_done(exchange) {
                    Some(status) if session.out.is_empty() => Outcome::Complete { status, body: Vec::new() },
                    _ => Outcome::ClientGone,
                };
                self.finish_exchange(exchange, outcome, now);
            }
            ClientNext::Owner | ClientNext::OwnerStream => {
                self.events.push_back(NetEvent::ClientGone { client });
            }
            ClientNext::Client | ClientNext::Close | ClientNext::Linger => {}
        }
    }
}

/// The answer to a request that is not read to its end, in OpenAI's dialect or in our own.
fn refusal(error: BadMessage, openai: bool) -> Response {
    let retriable = error.status == 503;
    let code = match error.status {
        413 => "TOO_LARGE",
        503 => "OVERLOADED",
        _ => "INVALID_PARAMS",
    };
    let mut response = if openai {
        let kind = if retriable { "server_error" } else { "invalid_request_error" };
        let body = serde_json::json!({"error": {
            "message": error.reason, "type": kind, "param": null, "code": code.to_ascii_lowercase(),
        }});
        Response::json(error.status, &body).with("x-should-retry", retriable.to_string())
    } else {
        let mut body = serde_json::json!({
            "code": code, "message": error.reason, "error": error.reason, "retriable": retriable,
        });
        if retriable {
            body["retry_after_ms"] = RETRY_MS.into();
        }
        Response::json(error.status, &body)
    };
    if retriable {
        let seconds = RETRY_MS.div_ceil(1_000).to_string();
        response = response.with("Retry-After", seconds).with("X-Backoff-Ms", RETRY_MS.to_string());
    }
    response
}

fn is_acceptable_id(id: &str) -> bool {
    (1..=CORRELATION_BYTES_MAX).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_graphic())
}

/// Two hexadecimal digits of each byte: a request has an id, and digit by digit that takes as long as its head.
static HEX: [[u8; 2]; 256] = {
    let (digits, mut pairs, mut byte) = (b"0123456789abcdef", [[0; 2]; 256], 0);
    while byte < pairs.len() {
        pairs[byte] = [digits[byte >> 4], digits[byte & 15]];
        byte += 1;
    }
    pairs
};

/// A random (version 4) UUID. It names a request in logs and is no secret.
fn new_id(text: &mut [u8; ID_BYTES]) -> &str {
    const PLACES: [usize; 16] = [0, 2, 4, 6, 9, 11, 14, 16, 19, 21, 24, 26, 28, 30, 32, 34];
    let bits = fastrand::u128(..) & !(0xf << 76) & !(0x3 << 62) | 0x4 << 76 | 0x2 << 62;
    *text = [b'-'; ID_BYTES];
    for (place, byte) in PLACES.into_iter().zip(bits.to_be_bytes()) {
        text[place..place + 2].copy_from_slice(&HEX[usize::from(byte)]);
    }
    std::str::from_utf8(text).unwrap_or_default()
}
