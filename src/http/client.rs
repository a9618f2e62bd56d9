//! The client's half of a connection: an encoded request out, a response's head and body pieces in.

use super::fields::{FieldLines, push_field, push_number_field};
use super::framing::BodyDecoder;
use super::head::{self, BadMessage, ResponseHead};

/// Interim (1xx) responses that are skipped before the peer is called broken.
const INTERIM_MAX: u8 = 8;

/// Writes the head of a request with a body of `body_length` bytes. Its target comes in two parts: a base
/// path, and what is below it. `Host` and `Content-Length` are written here; `fields` must not hold them, nor
/// anything hop by hop.
pub fn encode_request_head(
    out: &mut Vec<u8>,
    method: &str,
    target: [&str; 2],
    host: &str,
    fields: &FieldLines,
    body_length: usize,
) {
    out.extend_from_slice(method.as_bytes());
    out.push(b' ');
    for part in target {
        out.extend_from_slice(part.as_bytes());
    }
    out.extend_from_slice(b" HTTP/1.1\r\n");
    push_field(out, "Host", host);
    out.extend_from_slice(fields.as_bytes());
    if body_length > 0 || matches!(method, "POST" | "PUT" | "PATCH") {
        push_number_field(out, "Content-Length", body_length as u64);
    }
    out.extend_from_slice(b"\r\n");
}

/// Reads one response.
#[derive(Debug)]
pub struct ResponseReader {
    to_head: bool,
    scanned: usize,
    interim: u8,
    body: Option<BodyDecoder>,
}

impl ResponseReader {
    /// A reader for the answer to a request; `to_head` if that request's method was HEAD.
    #[must_use]
    pub fn new(to_head: bool) -> ResponseReader {
        ResponseReader { to_head, scanned: 0, interim: 0, body: None }
    }

    /// Reads the head, interim responses skipped. Returns how many bytes of `input` it used, and the
    /// head once it is complete. Unused bytes are to be offered again with more behind them, or, once
    /// there is a head, to the [body](Self::body).
    ///
    /// # Errors
    /// [`BadMessage`]: the peer does not speak HTTP/1.
    pub fn head(&mut self, input: &[u8]) -> Result<(usize, Option<ResponseHead>), BadMessage> {
        let mut used = 0;
        loop {
            let Some(length) = head::head_length(&input[used..], &mut self.scanned)
                .map_err(|error| BadMessage { status: 502, ..error })?
            else {
                return Ok((used, None));
            };
            let head = head::parse_response(&input[used..used + length], self.to_head)?;
            used += length;
            if head.status >= 200 {
                self.body = Some(BodyDecoder::new(head.framing));
                return Ok((used, Some(head)));
            }
            self.interim += 1;
            if self.interim > INTERIM_MAX || head.status == 101 {
                return Err(BadMessage { status: 502, reason: "interim responses without an end" });
            }
        }
    }

    /// The body's decoder once the head is known.
    pub fn body(&mut self) -> Option<&mut BodyDecoder> {
        self.body.as_mut()
    }

    /// Whether the whole response has been read.
    #[must_use]
    pub fn finished(&self) -> bool {
        self.body.as_ref().is_some_and(BodyDecoder::finished)
    }
}
