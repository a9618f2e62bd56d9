//! HTTP/1.1 over one blocking socket: requests in, answers and event streams out.
//!
//! It reads what clients of engines send (bodies with a length or chunked, keep-alive, pipelining)
//! within limits on size and time, and answers a broken request with the reason before closing.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::RecvFlags;
use serde_json::Value;

/// Largest request head, in bytes: cookies and tracing headers of a chain of proxies fit.
const HEAD_BYTES_MAX: usize = 16 * 1024;
/// Most headers of a request.
const HEADERS_MAX: usize = 64;
/// Largest request body, in bytes: a long conversation with a few images.
const BODY_BYTES_MAX: usize = 8 * 1024 * 1024;
/// Longest chunk-size line or trailer line, in bytes.
const CHUNK_LINE_BYTES_MAX: usize = 4 * 1024;
/// Bytes asked for in one read.
const READ_BYTES: usize = 16 * 1024;
/// How long a connection may rest between requests; llama-server's own limit.
const IDLE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a request may take to arrive, from its first byte.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a refused client may take to see the answer.
const LINGER_TIMEOUT: Duration = Duration::from_secs(1);
/// How long a client may leave a full socket unread.
const WRITE_TIMEOUT: Duration = Duration::from_secs(30);

/// One request, body included.
pub(super) struct Request {
    pub(super) method: String,
    /// Without the query.
    pub(super) path: String,
    /// The last header of that name.
    pub(super) authorization: Option<String>,
    pub(super) body: Vec<u8>,
    pub(super) keep_alive: bool,
}

/// Why there is no further request.
pub(super) enum Ended {
    /// The client closed, was silent for too long, or broke off.
    Closed,
    /// It sent what cannot be served: status and reason.
    Refused(u16, &'static str),
}

/// How the body's end is known.
enum Body {
    Length(usize),
    Chunked,
}

/// A client's connection.
pub(super) struct Connection {
    stream: TcpStream,
    /// Read, but not consumed.
    input: Vec<u8>,
}

impl Connection {
    pub(super) fn new(stream: TcpStream) -> io::Result<Connection> {
        stream.set_nodelay(true)?;
        stream.set_write_timeout(Some(WRITE_TIMEOUT))?;
        Ok(Connection { stream, input: Vec::new() })
    }

    /// The next request, as soon as all of it has arrived.
    pub(super) fn read_request(&mut self) -> Result<Request, Ended> {
        if self.input.is_empty() {
            self.fill(Instant::now() + IDLE_TIMEOUT)?;
        }
        let deadline = Instant::now() + REQUEST_TIMEOUT;
        let (mut request, body, expects_continue) = loop {
            if let Some((head_len, found)) = parse_head(&self.input)? {
                self.input.drain(..head_len);
                break found;
            }
            if self.input.len() >= HEAD_BYTES_MAX {
                return Err(Ended::Refused(431, "The request head is larger than 16 KiB"));
            }
            self.fill(deadline)?;
        };
        if expects_continue && self.input.is_empty() {
            self.stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").map_err(|_| Ended::Closed)?;
        }
        request.body = match body {
            Body::Length(length) => self.take(length, deadline)?,
            Body::Chunked => self.read_chunked(deadline)?,
        };
        Ok(request)
    }

    fn read_chunked(&mut self, deadline: Instant) -> Result<Vec<u8>, Ended> {
        let mut body = Vec::new();
        loop {
            let line = self.line(deadline)?;
            let size = match httparse::parse_chunk_size(&line) {
                Ok(httparse::Status::Complete((_, size))) => usize::try_from(size).unwrap_or(usize::MAX),
                _ => return Err(Ended::Refused(400, "A chunk has no usable size")),
            };
            if size == 0 {
                break;
            }
            if size > BODY_BYTES_MAX - body.len() {
                return Err(TOO_LARGE);
            }
            body.extend(self.take(size, deadline)?);
            if self.take(2, deadline)? != b"\r\n" {
                return Err(Ended::Refused(400, "A chunk is longer than its size"));
            }
        }
        // Trailers are read and dropped.
        for _ in 0..HEADERS_MAX {
            if self.line(deadline)? == b"\r\n" {
                return Ok(body);
            }
        }
        Err(Ended::Refused(431, "Too many trailers"))
    }

    /// Bytes up to and including the next line feed.
    fn line(&mut self, deadline: Instant) -> Result<Vec<u8>, Ended> {
        loop {
            if let Some(end) = memchr::memchr(b'\n', &self.input) {
                return Ok(self.input.drain(..=end).collect());
            }
            if self.input.len() > CHUNK_LINE_BYTES_MAX {
                return Err(Ended::Refused(400, "A chunk's head is too long"));
            }
            self.fill(deadline)?;
        }
    }

    fn take(&mut self, length: usize, deadline: Instant) -> Result<Vec<u8>, Ended> {
        while self.input.len() < length {
            self.fill(deadline)?;
        }
        let rest = self.input.split_off(length);
        Ok(std::mem::replace(&mut self.input, rest))
    }

    fn fill(&mut self, deadline: Instant) -> Result<(), Ended> {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() || self.stream.set_read_timeout(Some(left)).is_err() {
            return Err(Ended::Closed);
        }
        let mut bytes = [0; READ_BYTES];
        match self.stream.read(&mut bytes) {
            Ok(0) => Err(Ended::Closed),
            Ok(length) => {
                self.input.extend_from_slice(&bytes[..length]);
                Ok(())
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(()),
            Err(_) => Err(Ended::Closed),
        }
    }

    /// An error once the client has closed, even only its sending half: llama-server, too, takes that
    /// for a disconnect.
    pub(super) fn check_client(&self) -> io::Result<()> {
        let mut byte = [0u8; 1];
        match rustix::net::recv(&self.stream, &mut byte, RecvFlags::PEEK | RecvFlags::DONTWAIT) {
            Ok((0, _)) => Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) | Err(Errno::AGAIN | Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Reads away what a refused client still sends: closing over unread bytes resets the connection,
    /// and the client may then lose the answer that says why.
    pub(super) fn linger(&mut self) {
        let deadline = Instant::now() + LINGER_TIMEOUT;
        if self.stream.shutdown(Shutdown::Write).is_ok() {
            while self.fill(deadline).is_ok() {
                self.input.clear();
            }
        }
    }

    /// Sends a whole answer; returns `keep_alive` for the caller to go by.
    pub(super) fn respond(&mut self, status: u16, body: &Value, keep_alive: bool) -> io::Result<bool> {
        let body = body.to_string();
        let connection = if keep_alive { "keep-alive" } else { "close" };
        let answer = format!(
            "HTTP/1.1 {status} {}\r\nContent-Type: application/json; charset=utf-8\r\nContent-Length: {}\r\nConnection: {connection}\r\n\r\n{body}",
            reason(status),
            body.len(),
        );
        self.stream.write_all(answer.as_bytes())?;
        Ok(keep_alive)
    }

    /// As [`Connection::respond`], without a body.
    pub(super) fn respond_empty(&mut self, status: u16, keep_alive: bool) -> io::Result<bool> {
        let connection = if keep_alive { "keep-alive" } else { "close" };
        let answer = format!(
            "HTTP/1.1 {status} {}\r\nContent-Length: 0\r\nConnection: {connection}\r\n\r\n",
            reason(status)
        );
        self.stream.write_all(answer.as_bytes())?;
        Ok(keep_alive)
    }

    /// The head of an event stream, after which the connection closes.
    pub(super) fn start_stream(&mut self) -> io::Result<()> {
        self.stream.write_all(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nCache-Control: no-cache\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n",
        )
    }

    /// One chunk in one write.
    pub(super) fn write_chunk(&mut self, data: &str) -> io::Result<()> {
        self.stream.write_all(format!("{:x}\r\n{data}\r\n", data.len()).as_bytes())
    }

    pub(super) fn end_stream(&mut self) -> io::Result<()> {
        self.stream.write_all(b"0\r\n\r\n")
    }
}

const TOO_LARGE: Ended = Ended::Refused(413, "The request body is larger than 8 MiB");

type Head = (Request, Body, bool);

/// The head at the start of `input` with its length, and whether the client waits for a 100; `None`
/// until it is complete.
fn parse_head(input: &[u8]) -> Result<Option<(usize, Head)>, Ended> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut parsed = httparse::Request::new(&mut headers);
    let length = match parsed.parse(input) {
        Ok(httparse::Status::Complete(length)) if length <= HEAD_BYTES_MAX => length,
        Ok(httparse::Status::Complete(_)) | Err(httparse::Error::TooManyHeaders) => {
            return Err(Ended::Refused(431, "The request head is too large"));
        }
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(_) => return Err(Ended::Refused(400, "The request head is not HTTP/1.1")),
    };
    let (mut lengths, mut chunked, mut hosts) = (Vec::new(), false, 0);
    let new = parsed.version == Some(1);
    let (mut keep_alive, mut expects_continue, mut authorization) = (new, false, None);
    for header in parsed.headers.iter() {
        let value = std::str::from_utf8(header.value).unwrap_or_default().trim();
        match header.name.to_ascii_lowercase().as_str() {
            "content-length" => lengths.push(value),
            "transfer-encoding" if value.eq_ignore_ascii_case("chunked") && new && !chunked => chunked = true,
            "transfer-encoding" => return Err(Ended::Refused(501, "Only one chunked coding is supported")),
            "host" => hosts += 1,
            "authorization" => authorization = Some(value.to_string()),
            "connection" if has_token(value, "close") => keep_alive = false,
            "expect" => expects_continue = value.eq_ignore_ascii_case("100-continue"),
            _ => {}
        }
    }
    if hosts != 1 && new {
        return Err(Ended::Refused(400, "One Host header is required"));
    }
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    let body = match lengths.as_slice() {
        [] if chunked => Body::Chunked,
        [] => Body::Length(0),
        [one] if digits(one) && !chunked => match one.parse() {
            Ok(length) if length <= BODY_BYTES_MAX => Body::Length(length),
            _ => return Err(TOO_LARGE),
        },
        _ => return Err(Ended::Refused(400, "The body's length is ambiguous")),
    };
    let target = parsed.path.unwrap_or_default();
    let path = target.split(['?', '#']).next().unwrap_or_default().to_string();
    let method = parsed.method.unwrap_or_default().to_string();
    let request = Request { method, path, authorization, body: Vec::new(), keep_alive };
    Ok(Some((length, (request, body, expects_continue))))
}

fn has_token(list: &str, token: &str) -> bool {
    list.split(',').any(|word| word.trim().eq_ignore_ascii_case(token))
}

fn reason(status: u16) -> &'static str {
    match status {
        200 => "OK",
        400 => "Bad Request",
        401 => "Unauthorized",
        404 => "Not Found",
        413 => "Content Too Large",
        429 => "Too Many Requests",
        431 => "Request Header Fields Too Large",
        501 => "Not Implemented",
        503 => "Service Unavailable",
        _ => "Error",
    }
}
