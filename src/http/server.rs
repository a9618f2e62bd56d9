//! The server's half of a connection: whole requests in, encoded responses out.
//!
//! A [`RequestReader`] is fed what the client sent and yields one request at a time, body included,
//! within the limits that its owner sets. Pipelined bytes stay with the caller until it asks again.

use std::fmt;

use super::fields::{FieldLines, push_field, push_number_field};
use super::framing::BodyDecoder;
use super::head::{self, BadMessage, Framing, RequestHead, Version};

/// A whole request.
pub struct Request {
    /// Method, target, fields.
    pub head: RequestHead,
    /// The body, decoded; empty where there is none.
    pub body: Vec<u8>,
}

impl fmt::Debug for Request {
    /// Without the body, which is a prompt.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Request").field("head", &self.head).field("body_bytes", &self.body.len()).finish()
    }
}

/// What the reader wants or has after some input.
#[derive(Debug)]
pub enum Progress {
    /// More bytes.
    More,
    /// The client waits for leave to send its body: write [`CONTINUE`], then go on.
    WantsContinue,
    /// A request, complete.
    Request(Box<Request>),
}

/// The interim response that lets a client send its body.
pub const CONTINUE: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n";

/// Bytes that are allocated for a body before any of it has arrived.
const BODY_FIRST_ALLOCATION_BYTES: u64 = 64 * 1024;

/// Reads requests off one connection.
#[derive(Debug)]
pub struct RequestReader {
    body_bytes_max: usize,
    scanned: usize,
    partial: Option<Partial>,
}

#[derive(Debug)]
struct Partial {
    request: Box<Request>,
    decoder: BodyDecoder,
}

impl RequestReader {
    /// A reader that refuses bodies above `body_bytes_max` with 413.
    #[must_use]
    pub fn new(body_bytes_max: usize) -> RequestReader {
        RequestReader { body_bytes_max, scanned: 0, partial: None }
    }

    /// Whether a request has begun: some of it was read, or `pending` unread bytes wait.
    #[must_use]
    pub fn mid_request(&self, pending: usize) -> bool {
        self.partial.is_some() || pending > 0
    }

    /// Bytes allocated for a body that is not complete, for the owner's memory budget.
    #[must_use]
    pub fn body_bytes(&self) -> usize {
        self.partial.as_ref().map_or(0, |partial| partial.request.body.capacity())
    }

    /// The head of the request whose body is being read, or was refused.
    #[must_use]
    pub fn head(&self) -> Option<&RequestHead> {
        self.partial.as_ref().map(|partial| &partial.request.head)
    }

    /// Takes what it can from `input` and says how many bytes that was. While it returns
    /// [`Progress::More`], unconsumed bytes (part of a head) are to be offered again with more behind
    /// them.
    ///
    /// # Errors
    /// [`BadMessage`]: answer with its status and close.
    pub fn advance(&mut self, input: &[u8]) -> Result<(usize, Progress), BadMessage> {
        let mut used = 0;
        if self.partial.is_none() {
            // An empty line before a request is a known client mistake that a server overlooks.
            while input[used..].starts_with(b"\r\n") {
                used += 2;
                self.scanned = 0;
            }
            let Some(length) = head::head_length(&input[used..], &mut self.scanned)? else {
                return Ok((used, Progress::More));
            };
            let head = head::parse_request(&input[used..used + length])?;
            used += length;
            let wants_continue = head.expects_continue;
            self.begin(head)?;
            if wants_continue {
                return Ok((used, Progress::WantsContinue));
            }
        }
        used += self.read_body(&input[used..])?;
        match self.partial.take_if(|partial| partial.decoder.finished()) {
            Some(partial) => Ok((used, Progress::Request(partial.request))),
            None => Ok((used, Progress::More)),
        }
    }

    fn begin(&mut self, head: RequestHead) -> Result<(), BadMessage> {
        let mut body = Vec::new();
        let (decoder, framing) = (BodyDecoder::new(head.framing), head.framing);
        let is_too_large = matches!(framing, Framing::Length(length) if length > self.body_bytes_max as u64);
        if let Framing::Length(length) = framing
            && !is_too_large
        {
            body.reserve_exact(length.min(BODY_FIRST_ALLOCATION_BYTES) as usize);
        }
        self.partial = Some(Partial { request: Box::new(Request { head, body }), decoder });
        if is_too_large { Err(too_large()) } else { Ok(()) }
    }

    fn read_body(&mut self, input: &[u8]) -> Result<usize, BadMessage> {
        let Some(partial) = &mut self.partial else { return Ok(0) };
        let mut used = 0;
        while used < input.len() && !partial.decoder.finished() {
            let piece = partial.decoder.next(&input[used..])?;
            let data = &input[used..][piece.data];
            if partial.request.body.len() + data.len() > self.body_bytes_max {
                return Err(too_large());
            }
            make_room(&mut partial.request, data.len(), self.body_bytes_max);
            partial.request.body.extend_from_slice(data);
            used += piece.consumed;
        }
        Ok(used)
    }
}

/// Doubles what is allocated, but never beyond what the body can become.
fn make_room(request: &mut Request, more: usize, body_bytes_max: usize) {
    let (length, capacity) = (request.body.len(), request.body.capacity());
    if length + more > capacity {
        let most = match request.head.framing {
            Framing::Length(length) => usize::try_from(length).unwrap_or(usize::MAX),
            _ => body_bytes_max,
        };
        let wanted = capacity.saturating_mul(2).min(most).max(length + more);
        request.body.reserve_exact(wanted - length);
    }
}

fn too_large() -> BadMessage {
    BadMessage { status: 413, reason: "the request body is larger than allowed here" }
}

/// A whole response, made by this process.
#[derive(Clone, Debug)]
pub struct Response {
    /// Status code.
    pub status: u16,
    /// `Content-Type`; empty for none.
    pub content_type: &'static str,
    /// Further fields. Values must be free of control characters; others are dropped.
    pub fields: Vec<(&'static str, String)>,
    /// The body.
    pub body: Vec<u8>,
}

impl Response {
    /// A JSON answer.
    #[must_use]
    pub fn json(status: u16, value: &impl serde::Serialize) -> Response {
        let body = serde_json::to_vec(value).unwrap_or_default();
        Response { status, content_type: "application/json", fields: Vec::new(), body }
    }

    /// A JSON document as it is.
    #[must_use]
    pub fn document(json: &str) -> Response {
        let body = json.as_bytes().to_vec();
        Response { status: 200, content_type: "application/json", fields: Vec::new(), body }
    }

    /// A plain text answer.
    #[must_use]
    pub fn text(status: u16, text: impl Into<String>) -> Response {
        let body = text.into().into_bytes();
        Response { status, content_type: "text/plain; charset=utf-8", fields: Vec::new(), body }
    }

    /// An answer without a body.
    #[must_use]
    pub fn empty(status: u16) -> Response {
        Response { status, content_type: "", fields: Vec::new(), body: Vec::new() }
    }

    /// Adds a field.
    #[must_use]
    pub fn with(mut self, name: &'static str, value: impl Into<String>) -> Response {
        self.fields.push((name, value.into()));
        self
    }
}

/// What an answer must know of the request that it answers.
#[derive(Clone, Copy, Debug)]
pub struct AnswerTo {
    /// The client's version.
    pub version: Version,
    /// The connection stays open after the answer.
    pub keep_alive: bool,
    /// The request's method was HEAD: length and fields, but no body.
    pub head_only: bool,
}

impl AnswerTo {
    /// For answers to bytes that were no request.
    pub const BROKEN: AnswerTo = AnswerTo { version: Version::Http11, keep_alive: false, head_only: false };

    /// For an answer to `head`.
    #[must_use]
    pub fn request(head: &RequestHead) -> AnswerTo {
        AnswerTo { version: head.version, keep_alive: head.keep_alive, head_only: head.method() == "HEAD" }
    }
}

/// Writes a whole response behind what `out` holds.
/// `more` are further fields.
pub fn encode_response(out: &mut Vec<u8>, response: &Response, more: &FieldLines, to: AnswerTo) {
    begin_head(out, response.status);
    if !response.content_type.is_empty() {
        push_field(out, "Content-Type", response.content_type);
    }
    for (name, value) in &response.fields {
        push_field(out, name, value);
    }
    out.extend_from_slice(more.as_bytes());
    if response.status >= 200 && response.status != 204 {
        push_number_field(out, "Content-Length", response.body.len() as u64);
    }
    push_connection(out, to);
    out.extend_from_slice(b"\r\n");
    if !to.head_only {
        out.extend_from_slice(&response.body);
    }
}

/// Writes the head of a response whose body follows piece by piece: chunked for HTTP/1.1, until
/// close for HTTP/1.0 (`to.keep_alive` is then taken as false).
pub fn encode_stream_head(
    out: &mut Vec<u8>,
    status: u16,
    content_type: &str,
    fields: &FieldLines,
    to: AnswerTo,
) {
    begin_head(out, status);
    push_field(out, "Content-Type", content_type);
    out.extend_from_slice(fields.as_bytes());
    match to.version {
        Version::Http11 => push_field(out, "Transfer-Encoding", b"chunked"),
        Version::Http10 => {}
    }
    push_connection(out, AnswerTo { keep_alive: to.keep_alive && to.version == Version::Http11, ..to });
    out.extend_from_slice(b"\r\n");
}

/// Writes one chunk of a chunked body; nothing for empty data, which would end the body.
pub fn encode_chunk(out: &mut Vec<u8>, data: &[u8]) {
    if data.is_empty() {
        return;
    }
    push_hex(out, data.len());
    out.extend_from_slice(b"\r\n");
    out.extend_from_slice(data);
    out.extend_from_slice(b"\r\n");
}

/// Ends a chunked body.
pub const LAST_CHUNK: &[u8] = b"0\r\n\r\n";

/// Writes the status line.
pub fn begin_head(out: &mut Vec<u8>, status: u16) {
    out.extend_from_slice(b"HTTP/1.1 ");
    let digits = [status / 100 % 10, status / 10 % 10, status % 10].map(|digit| b'0' + digit as u8);
    out.extend_from_slice(&digits);
    out.push(b' ');
    out.extend_from_slice(reason_phrase(status).as_bytes());
    out.extend_from_slice(b"\r\n");
}

/// Writes what the version does not already imply about the connection.
pub fn push_connection(out: &mut Vec<u8>, to: AnswerTo) {
    match (to.version, to.keep_alive) {
        (Version::Http11, true) => {}
        (Version::Http10, true) => push_field(out, "Connection", b"keep-alive"),
        (_, false) => push_field(out, "Connection", b"close"),
    }
}

fn push_hex(out: &mut Vec<u8>, number: usize) {
    let digits = (usize::BITS - number.leading_zeros()).div_ceil(4).max(1);
    for place in (0..digits).rev() {
        out.push(b"0123456789abcdef"[number >> (4 * place) & 15]);
    }
}

fn reason_phrase(status: u16) -> &'static str {
    ::http::StatusCode::from_u16(status).ok().and_then(|code| code.canonical_reason()).unwrap_or("Status")
}
