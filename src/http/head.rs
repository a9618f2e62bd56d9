//! Message heads: request line or status line, fields, and what they say about the body and the
//! connection.
//!
//! A parsed head owns one copy of its bytes and a table of ranges into it, so names keep their case,
//! and order and duplicates survive to be forwarded. Everything that decides framing is settled
//! here, once: whoever holds a [`RequestHead`] or [`ResponseHead`] can trust its [`Framing`].

use std::fmt;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::sync::LazyLock;

use memchr::{memchr_iter, memmem};

use super::fields::{name_bit, push_field, same_name};

/// Largest head, line ends included, in bytes. nginx and HAProxy allow 8 to 32 KiB.
pub const HEAD_BYTES_MAX: usize = 32 * 1024;
/// Most fields in a head.
pub const FIELDS_MAX: usize = 96;
/// Where a field is takes four numbers, each below [`HEAD_BYTES_MAX`].
const RANGE_BYTES: usize = 4 * size_of::<u16>();
const _: () = assert!(HEAD_BYTES_MAX <= u16::MAX as usize);

/// Finds the empty line behind the fields; made once, because making it costs more than most searches.
static HEAD_END: LazyLock<memmem::Finder<'static>> = LazyLock::new(|| memmem::Finder::new(b"\r\n\r\n"));

/// How a body is delimited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// There is none.
    Empty,
    /// This many bytes.
    Length(u64),
    /// Chunked transfer coding.
    Chunked,
    /// Everything until the peer closes; responses only.
    UntilClose,
}

/// HTTP/1.0 or HTTP/1.1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// No chunked coding, closes by default.
    Http10,
    /// Keeps the connection by default.
    Http11,
}

/// Why bytes are no acceptable head, with the status that says so to a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadMessage {
    /// 4xx or 5xx; the connection is closed after it.
    pub status: u16,
    /// For the error body and the log; never repeats what the peer sent.
    pub reason: &'static str,
}

impl fmt::Display for BadMessage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.reason)
    }
}

const TOO_LARGE: BadMessage = BadMessage { status: 431, reason: "the head is larger than 32 KiB" };

const fn bad(reason: &'static str) -> BadMessage {
    BadMessage { status: 400, reason }
}

/// The fields of a head, in order.
#[derive(Clone, Default)]
pub struct Fields {
    /// The head, and behind it where its fields are: start and end of each name and of its value.
    bytes: Vec<u8>,
    head_bytes: usize,
    /// The bits of all names here, so that most questions for a name need no search.
    name_bits: u64,
    /// A `Connection` field says more than that the connection is kept or closed.
    connection_names_some: bool,
}

impl Fields {
    /// Name and value of every field as sent; values without surrounding blanks.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &[u8])> {
        self.ranges().map(|range| (self.name_at(range), self.value_at(range)))
    }

    /// The same with names as they are in memory, for whoever only compares and copies them.
    pub fn raw(&self) -> impl Iterator<Item = Field<'_>> {
        self.ranges().map(|range| {
            let [start, name_end, value_start, value_end] = range;
            let is_usual = value_start == name_end + 2
                && self.slice(name_end, value_start) == b": "
                && self.bytes.get(value_end..).is_some_and(|rest| rest.starts_with(b"\r\n"));
            Field {
                name: self.slice(start, name_end),
                value: self.value_at(range),
                line: is_usual.then(|| self.slice(start, value_end + 2)),
            }
        })
    }

    /// Length of the whole head, in bytes.
    #[must_use]
    pub fn bytes_len(&self) -> usize {
        self.head_bytes
    }

    /// The first field of this name (any case), if its value is text.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&str> {
        self.of(name).next().and_then(|value| std::str::from_utf8(value).ok())
    }

    /// The value of the first field of this name (any case), whatever it is.
    #[must_use]
    pub fn value(&self, name: &str) -> Option<&[u8]> {
        self.of(name).next()
    }

    /// Whether a `Connection` field (there may be several) says that fields of this name concern one
    /// connection only. No field can take the message's length away like that.
    #[must_use]
    pub fn connection_names(&self, name: &[u8]) -> bool {
        self.connection_names_some
            && !name.eq_ignore_ascii_case(b"content-length")
            && self.of("connection").any(|list| {
                list.split(|b| *b == b',').any(|token| token.trim_ascii().eq_ignore_ascii_case(name))
            })
    }

    /// How many fields have this name (any case).
    #[must_use]
    pub fn count(&self, name: &str) -> usize {
        self.of(name).count()
    }

    /// The values of all fields of this name (any case).
    fn of(&self, name: &str) -> impl Iterator<Item = &[u8]> {
        let may_be = self.name_bits & name_bit(name.as_bytes()) != 0;
        let is_named = |range: &[usize; 4]| {
            range[1] - range[0] == name.len() && same_name(self.slice(range[0], range[1]), name.as_bytes())
        };
        let ranges = self.ranges_in(if may_be { self.head_bytes } else { self.bytes.len() });
        ranges.filter(is_named).map(|range| self.value_at(range))
    }

    fn ranges(&self) -> impl Iterator<Item = [usize; 4]> {
        self.ranges_in(self.head_bytes)
    }

    fn ranges_in(&self, start: usize) -> impl Iterator<Item = [usize; 4]> {
        self.bytes[start..].as_chunks::<RANGE_BYTES>().0.iter().map(|range| {
            let [a, b, c, d, e, f, g, h] = *range;
            [[a, b], [c, d], [e, f], [g, h]].map(|place| usize::from(u16::from_ne_bytes(place)))
        })
    }

    fn slice(&self, start: usize, end: usize) -> &[u8] {
        &self.bytes[start..end]
    }

    fn name_at(&self, [start, end, ..]: [usize; 4]) -> &str {
        // httparse admits only token characters here, which are ASCII.
        std::str::from_utf8(self.slice(start, end)).unwrap_or_default()
    }

    fn value_at(&self, [.., start, end]: [usize; 4]) -> &[u8] {
        self.slice(start, end)
    }
}

/// A field of a head that was parsed: its name is a token, and nothing in its value could end its line early.
pub struct Field<'a> {
    /// As sent.
    pub name: &'a [u8],
    /// Without surrounding blanks.
    pub value: &'a [u8],
    /// The whole line, where it has the form in which we would write it.
    line: Option<&'a [u8]>,
}

impl Field<'_> {
    /// Writes it to another head.
    pub fn copy_to(&self, out: &mut Vec<u8>) {
        match self.line {
            Some(line) => out.extend_from_slice(line),
            None => push_field(out, self.name, self.value),
        }
    }
}

impl fmt::Debug for Fields {
    /// Names only: values may be secrets.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter().map(|(name, _)| name)).finish()
    }
}

/// A request's head.
#[derive(Clone)]
pub struct RequestHead {
    /// Method and target, one behind the other.
    line: Box<str>,
    target: usize,
    query: usize,
    /// Protocol version.
    pub version: Version,
    /// How the body is delimited.
    pub framing: Framing,
    /// Whether the connection may serve another request.
    pub keep_alive: bool,
    /// The client waits for `100 Continue`.
    pub expects_continue: bool,
    /// All fields.
    pub fields: Fields,
}

impl RequestHead {
    /// The method, as sent.
    #[must_use]
    pub fn method(&self) -> &str {
        &self.line[..self.target]
    }

    /// Path and query, as sent.
    #[must_use]
    pub fn target(&self) -> &str {
        &self.line[self.target..]
    }

    /// The target without its query.
    #[must_use]
    pub fn path(&self) -> &str {
        &self.line[self.target..self.query]
    }

    /// The value of a query parameter, undecoded; empty for a bare name.
    #[must_use]
    pub fn query(&self, name: &str) -> Option<&str> {
        let query = self.line[self.query..].strip_prefix('?')?;
        query.split('&').find_map(|pair| match pair.split_once('=') {
            Some((n, value)) if n == name => Some(value),
            None if pair == name => Some(""),
            _ => None,
        })
    }
}

impl fmt::Debug for RequestHead {
    /// Without the target: a query may hold a secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RequestHead")
            .field("method", &self.method())
            .field("framing", &self.framing)
            .field("fields", &self.fields)
            .finish_non_exhaustive()
    }
}

/// A response's head.
#[derive(Clone, Debug)]
pub struct ResponseHead {
    /// Status code, 100 to 999.
    pub status: u16,
    /// Protocol version.
    pub version: Version,
    /// How the body is delimited.
    pub framing: Framing,
    /// Whether the connection may serve another request once the body has ended.
    pub keep_alive: bool,
    /// All fields.
    pub fields: Fields,
}

impl ResponseHead {
    /// Whether the body is a server-sent event stream.
    #[must_use]
    pub fn is_event_stream(&self) -> bool {
        self.fields.value("content-type").is_some_and(|value| {
            value.get(..17).is_some_and(|start| start.eq_ignore_ascii_case(b"text/event-stream"))
        })
    }
}

/// Where the first head in `bytes` ends, behind its empty line.
#[must_use]
pub fn head_end(bytes: &[u8]) -> Option<usize> {
    HEAD_END.find(bytes).map(|at| at + 4)
}

/// Length of the head at the start of `bytes`, its empty line included. `scanned` carries how far
/// earlier calls looked, so that a head that drips in is not searched from its start every time.
///
/// # Errors
/// 431 when [`HEAD_BYTES_MAX`] is passed without an end, 400 for a line that ends with a bare LF or CR.
pub fn head_length(bytes: &[u8], scanned: &mut usize) -> Result<Option<usize>, BadMessage> {
    let from = scanned.saturating_sub(3).min(bytes.len());
    let window = &bytes[from..bytes.len().min(HEAD_BYTES_MAX)];
    if let Some(end) = head_end(window) {
        *scanned = 0;
        return Ok(Some(from + end));
    }
    // Without this a client that ends its lines with bare LF or CR would wait for an answer for ever. At the
    // window's start the byte before is known only where the window is the head's start.
    let lf_alone =
        memchr_iter(b'\n', window).any(|at| if at == 0 { from == 0 } else { window[at - 1] != b'\r' });
    let cr_alone = memchr_iter(b'\r', window).any(|at| window.get(at + 1).is_some_and(|next| *next != b'\n'));
    if lf_alone || cr_alone {
        return Err(bad("lines must end with CR LF"));
    }
    if bytes.len() >= HEAD_BYTES_MAX {
        return Err(TOO_LARGE);
    }
    *scanned = bytes.len();
    Ok(None)
}

/// Parses a request head; `bytes` is exactly the head, as [`head_length`] measured it.
///
/// # Errors
/// [`BadMessage`]: 400 for bytes that break or bend the grammar, 417 for an unknown expectation, 431
/// for too many fields, 501 for methods that a gateway must not take, 505 for another version.
pub fn parse_request(bytes: &[u8]) -> Result<RequestHead, BadMessage> {
    only_crlf(bytes)?;
    let mut slots = [const { MaybeUninit::uninit() }; FIELDS_MAX];
    let mut parsed = httparse::Request::new(&mut []);
    match parsed.parse_with_uninit_headers(bytes, &mut slots) {
        Ok(httparse::Status::Complete(length)) if length == bytes.len() => {}
        Ok(_) => return Err(bad("the request line or a field is malformed")),
        Err(error) => return Err(explain(error)),
    }
    let version = version(parsed.version)?;
    let (method, target) = (parsed.method.unwrap_or_default(), parsed.path.unwrap_or_default());
    if matches!(method, "CONNECT" | "TRACE") {
        return Err(BadMessage { status: 501, reason: "this method is not served" });
    }
    let asterisk = method == "OPTIONS" && target == "*";
    if !(target.starts_with('/') || asterisk) || !is_target(target) {
        return Err(bad("the target must be a path"));
    }
    let facts = Facts::gather(parsed.headers)?;
    facts.check_host(version)?;
    let framing = match (facts.chunked, facts.length) {
        (true, Some(_)) => return Err(bad("Content-Length beside Transfer-Encoding")),
        (true, None) if version == Version::Http10 => return Err(bad("Transfer-Encoding in HTTP/1.0")),
        (true, None) => Framing::Chunked,
        (false, Some(0) | None) => Framing::Empty,
        (false, Some(length)) => Framing::Length(length),
    };
    let expects_continue = match facts.expect {
        None => false,
        Some(value) if value.eq_ignore_ascii_case(b"100-continue") => version == Version::Http11,
        Some(_) => return Err(BadMessage { status: 417, reason: "only 100-continue can be expected" }),
    };
    Ok(RequestHead {
        query: method.len() + target.find('?').unwrap_or(target.len()),
        target: method.len(),
        line: line(method, target),
        version,
        framing,
        keep_alive: facts.keep_alive(version),
        expects_continue: expects_continue && framing != Framing::Empty,
        fields: facts.into_fields(bytes),
    })
}

/// Parses a response head; `to_head` says that it answers a HEAD request, which has no body
/// whatever its fields say.
///
/// # Errors
/// [`BadMessage`] with status 502: the peer is not to be believed.
pub fn parse_response(bytes: &[u8], to_head: bool) -> Result<ResponseHead, BadMessage> {
    let upstream = |error: BadMessage| BadMessage { status: 502, ..error };
    only_crlf(bytes).map_err(upstream)?;
    let mut slots = [const { MaybeUninit::uninit() }; FIELDS_MAX];
    let mut parsed = httparse::Response::new(&mut []);
    let parser = httparse::ParserConfig::default();
    match parser.parse_response_with_uninit_headers(&mut parsed, bytes, &mut slots) {
        Ok(httparse::Status::Complete(length)) if length == bytes.len() => {}
        Ok(_) => return Err(upstream(bad("the status line or a field is malformed"))),
        Err(error) => return Err(upstream(explain(error))),
    }
    let version = version(parsed.version).map_err(upstream)?;
    let status = parsed.code.unwrap_or_default();
    if !(100..=999).contains(&status) {
        return Err(upstream(bad("the status is not a status code")));
    }
    let facts = Facts::gather(parsed.headers).map_err(upstream)?;
    let framing = match (facts.chunked, facts.length) {
        _ if to_head || status < 200 || status == 204 || status == 304 => Framing::Empty,
        (true, Some(_)) => return Err(upstream(bad("Content-Length beside Transfer-Encoding"))),
        (true, None) => Framing::Chunked,
        (false, Some(0)) => Framing::Empty,
        (false, Some(length)) => Framing::Length(length),
        (false, None) => Framing::UntilClose,
    };
    Ok(ResponseHead {
        status,
        version,
        framing,
        keep_alive: facts.keep_alive(version) && framing != Framing::UntilClose,
        fields: facts.into_fields(bytes),
    })
}

/// Fields that concern one connection only (RFC 9110, 7.6.1) and are never forwarded;
/// [`Fields::connection_names`] tells which others a message adds to them.
#[must_use]
pub fn is_hop_by_hop(name: &[u8]) -> bool {
    const ALWAYS: [&str; 9] = [
        "connection",
        "keep-alive",
        "proxy-connection",
        "proxy-authenticate",
        "proxy-authorization",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    ];
    ALWAYS.iter().any(|known| same_name(name, known.as_bytes()))
}

/// Both in one allocation of just their size.
fn line(method: &str, target: &str) -> Box<str> {
    let mut line = String::with_capacity(method.len() + target.len());
    line.push_str(method);
    line.push_str(target);
    line.into_boxed_str()
}

/// The limits on lines that httparse does not set, and that on the whole.
fn only_crlf(bytes: &[u8]) -> Result<(), BadMessage> {
    if bytes.len() > HEAD_BYTES_MAX {
        return Err(TOO_LARGE);
    }
    let (Some(first), Some(last)) = (bytes.first(), bytes.last()) else { return Ok(()) };
    // Every CR is followed by an LF, and every LF follows a CR. Without a branch, so that it is done for many
    // bytes at a time.
    let pairs = bytes.iter().zip(&bytes[1..]);
    let alone = pairs.fold(0, |alone, (a, b)| alone | (u8::from(*a == b'\r') ^ u8::from(*b == b'\n')));
    if alone == 0 && *first != b'\n' && *last != b'\r' {
        Ok(())
    } else {
        Err(bad("lines must end with CR LF"))
    }
}

/// Whether a target holds only what one may hold.
fn is_target(target: &str) -> bool {
    target.bytes().fold(true, |good, byte| good & byte.is_ascii_graphic() & (byte != b'#'))
}

fn explain(error: httparse::Error) -> BadMessage {
    match error {
        httparse::Error::TooManyHeaders => BadMessage { status: 431, reason: "more than 96 fields" },
        httparse::Error::Version => {
            BadMessage { status: 505, reason: "only HTTP/1.0 and HTTP/1.1 are served" }
        }
        httparse::Error::HeaderName => bad("a field name is malformed"),
        httparse::Error::HeaderValue => bad("a field value is malformed"),
        _ => bad("the request line or a field is malformed"),
    }
}

fn version(minor: Option<u8>) -> Result<Version, BadMessage> {
    match minor {
        Some(0) => Ok(Version::Http10),
        Some(1) => Ok(Version::Http11),
        _ => Err(BadMessage { status: 505, reason: "only HTTP/1.0 and HTTP/1.1 are served" }),
    }
}

fn range_in(whole: &[u8], part: &[u8]) -> Range<usize> {
    let start = part.as_ptr() as usize - whole.as_ptr() as usize;
    start..start + part.len()
}

/// What the fields say about framing and connection, gathered in one pass.
struct Facts<'h, 'b> {
    headers: &'h [httparse::Header<'b>],
    length: Option<u64>,
    chunked: bool,
    close: bool,
    keep: bool,
    connection_names_some: bool,
    hosts: usize,
    host_good: bool,
    expect: Option<&'b [u8]>,
}

impl<'h, 'b> Facts<'h, 'b> {
    fn gather(headers: &'h [httparse::Header<'b>]) -> Result<Self, BadMessage> {
        let mut facts = Facts {
            headers,
            length: None,
            chunked: false,
            close: false,
            keep: false,
            connection_names_some: false,
            hosts: 0,
            host_good: false,
            expect: None,
        };
        for header in headers {
            // The few names that matter differ in length, which rules most fields out cheaply.
            match header.name.len() {
                4 if same_name(header.name.as_bytes(), b"host") => {
                    facts.hosts += 1;
                    facts.host_good = good_host(header.value);
                }
                6 if same_name(header.name.as_bytes(), b"expect") => {
                    // Two of them are a list, and no list can be met.
                    facts.expect = Some(if facts.expect.is_some() { b"" } else { header.value });
                }
                10 if same_name(header.name.as_bytes(), b"connection") => {
                    for token in header.value.split(|b| *b == b',').map(<[u8]>::trim_ascii) {
                        let (close, keep) =
                            (token.eq_ignore_ascii_case(b"close"), token.eq_ignore_ascii_case(b"keep-alive"));
                        facts.close |= close;
                        facts.keep |= keep;
                        facts.connection_names_some |= !close && !keep && !token.is_empty();
                    }
                }
                14 if same_name(header.name.as_bytes(), b"content-length") => {
                    if facts.length.is_some() {
                        return Err(bad("two Content-Length fields"));
                    }
                    facts.length = Some(content_length(header.value)?);
                }
                17 if same_name(header.name.as_bytes(), b"transfer-encoding") => {
                    if facts.chunked || !header.value.eq_ignore_ascii_case(b"chunked") {
                        return Err(bad("the only Transfer-Encoding served is chunked"));
                    }
                    facts.chunked = true;
                }
                _ => {}
            }
        }
        Ok(facts)
    }

    fn check_host(&self, version: Version) -> Result<(), BadMessage> {
        match self.hosts {
            0 if version == Version::Http10 => Ok(()),
            0 => Err(bad("the Host field is missing")),
            1 if self.host_good => Ok(()),
            1 => Err(bad("the Host field is malformed")),
            _ => Err(bad("two Host fields")),
        }
    }

    fn keep_alive(&self, version: Version) -> bool {
        !self.close && (version == Version::Http11 || self.keep)
    }

    fn into_fields(self, bytes: &[u8]) -> Fields {
        let mut copy = Vec::with_capacity(bytes.len() + self.headers.len() * RANGE_BYTES);
        copy.extend_from_slice(bytes);
        for header in self.headers {
            let (name, value) =
                (range_in(bytes, header.name.as_bytes()), range_in_or_empty(bytes, header.value));
            // Within a head, which is not longer.
            let place = |at: usize| (at as u16).to_ne_bytes();
            let ([a, b], [c, d]) = (place(name.start), place(name.end));
            let ([e, f], [g, h]) = (place(value.start), place(value.end));
            copy.extend_from_slice(&[a, b, c, d, e, f, g, h]);
        }
        Fields {
            bytes: copy,
            head_bytes: bytes.len(),
            name_bits: self.headers.iter().fold(0, |bits, header| bits | name_bit(header.name.as_bytes())),
            connection_names_some: self.connection_names_some,
        }
    }
}

fn range_in_or_empty(whole: &[u8], part: &[u8]) -> Range<usize> {
    // An empty value may be a constant that lies outside of `whole`.
    if part.is_empty() { 0..0 } else { range_in(whole, part) }
}

fn good_host(value: &[u8]) -> bool {
    !value.is_empty()
        && value
            .iter()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_' | b':' | b'[' | b']'))
}

fn content_length(value: &[u8]) -> Result<u64, BadMessage> {
    // 18 digits stay far below u64::MAX, so the sum cannot overflow.
    if value.is_empty() || value.len() > 18 || !value.iter().all(u8::is_ascii_digit) {
        return Err(bad("Content-Length is not a number"));
    }
    Ok(value.iter().fold(0, |length, digit| length * 10 + u64::from(digit - b'0')))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_copied_as_they_came_or_as_they_should_have_come() {
        let text = "GET / HTTP/1.1\r\nHost: a\r\nA:1\r\nB:  2 \r\nC: \r\nD:\r\nE: 3\t\r\nF: 4 5\r\n\r\n";
        let head = parse_request(text.as_bytes()).expect("a head");
        let mut copy = Vec::new();
        head.fields.raw().for_each(|field| field.copy_to(&mut copy));
        assert_eq!(
            String::from_utf8_lossy(&copy),
            "Host: a\r\nA: 1\r\nB: 2\r\nC: \r\nD: \r\nE: 3\r\nF: 4 5\r\n"
        );
        let large = format!("GET / HTTP/1.1\r\nHost: a\r\nA: {}\r\n\r\n", "x".repeat(HEAD_BYTES_MAX));
        assert_eq!(parse_request(large.as_bytes()).map(|_| ()), Err(TOO_LARGE));
    }

    #[test]
    fn printing_shows_neither_the_target_nor_a_value() {
        let head =
            b"GET /v1/models?token=secret-1 HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer secret-2\r\n\r\n";
        let shown = format!("{:?}", parse_request(head).expect("a head"));
        assert!(shown.contains("GET") && shown.contains("Authorization"), "{shown}");
        assert!(!shown.contains("secret"), "{shown}");
    }
}
