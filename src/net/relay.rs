//! The pure core of an exchange's answer: bytes of an engine in, bytes for the client (or the owner)
//! out, and what that means.
//!
//! An engine's body is forwarded as it came, chunk framing included, so nothing is copied twice and no
//! byte changes; the framing is followed all the same, because its end is the answer's end. Where the
//! client cannot take that framing (HTTP/1.0, or an engine that delimits by closing) it is changed,
//! never the data. After a failure in the middle of a stream the client must notice: its connection
//! ends without its framing's end, and behind an error event if one fits between two events.
//!
//! A client of OpenAI's takes a stream that ends for the whole answer. An engine that frames its answer
//! by closing says no more by that than one that was killed; such a stream has ended only if it said so.
//! Neither does one that ends the framing of its chunks: engines that are told to stop do that in the middle of
//! a text. The last chunk of such a stream is not passed on, so that it fails for its client.

use crate::http::client::ResponseReader;
use crate::http::fields::{FieldLines, push_field};
use crate::http::head::{BadMessage, Framing, ResponseHead, Version, is_hop_by_hop};
use crate::http::server::{AnswerTo, LAST_CHUNK, begin_head, encode_chunk, push_connection};
use crate::http::sse::{KEEP_ALIVE, Tail};

use super::meter::{Meter, Tokens};

/// How to forward an answer to a client.
#[derive(Debug)]
pub struct Forward {
    /// What the client's request asked of an answer.
    pub to: AnswerTo,
    /// Fields to add.
    pub fields: FieldLines,
}

/// What some input led to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// More of the answer is to come.
    More,
    /// The answer is complete. Any bytes behind it make the connection unusable.
    Complete,
    /// The status is one of those to hold back; nothing was put out.
    HeldBack(u16),
}

/// How the client's framing relates to the engine's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Body {
    /// The same bytes.
    Same,
    /// Data put into chunks of our own.
    Rechunked,
    /// Data alone: for the owner, and for clients that know no chunks.
    Data,
}

/// One answer on its way.
#[derive(Debug)]
pub struct Relay {
    reader: ResponseReader,
    forward: Option<Forward>,
    /// The answer's dialect ends a stream with `[DONE]`.
    says_done: bool,
    hold_back: &'static [u16],
    /// Part of a head that has not ended yet.
    held: Vec<u8>,
    head: Option<Answer>,
    /// An answer that was held back says [`BEGUN_FIELD`].
    told_begun: bool,
    /// `Retry-After` of an answer that was held back.
    retry_after_s: Option<u64>,
}

#[derive(Debug)]
struct Answer {
    status: u16,
    upstream_keeps_alive: bool,
    client_keeps_alive: bool,
    body: Body,
    events: Option<Tail>,
    /// The body ends where the connection does, and its dialect tells the end in words too.
    must_say_end: bool,
    /// The framing's end came and was kept back, because the stream had not said that it is complete.
    is_mute: bool,
    /// The last piece of the body began with an error event, as a relay puts one behind a broken stream.
    error_told: bool,
    meter: Meter,
}

impl Answer {
    /// Whether a stream of events has told its end in the words of its dialect, or an error. What is no such
    /// stream has nothing to tell.
    fn has_said_end(&self) -> bool {
        let Some(tail) = self.events.as_ref().filter(|_| self.status == 200) else { return true };
        tail.finished() || self.meter.told_finish()
    }
}

/// With this field a relay says of its 502 that the engine broke within its answer, so that nobody before it
/// sends the request once more.
pub const BEGUN_FIELD: &str = "x-llorch-begun";
/// Bytes that a forwarded head may be longer than that of the engine, beside the fields that are added.
const HEAD_SURPLUS_BYTES: usize = 96;
/// Why a stream is broken whose framing ended and whose text did not.
const MUTE_END: &str = "the engine ended its answer without saying that it is complete";
/// Paths, below any prefix, whose streams end with `[DONE]`.
const DONE_PATHS: [&str; 2] = ["/chat/completions", "/v1/completions"];
/// How the error event of a relay begins.
const ERROR_EVENT_START: &[u8] = b"data: {\"error\":";

impl Relay {
    /// A relay for the answer to a request with `method` and `target`; without `forward` the decoded
    /// body is put out alone. Nothing is put out of an answer with a status in `hold_back`.
    #[must_use]
    pub fn new(method: &str, target: &str, forward: Option<Forward>, hold_back: &'static [u16]) -> Relay {
        let path = target.split('?').next().unwrap_or_default();
        let says_done = DONE_PATHS.iter().any(|known| path.ends_with(known));
        Relay {
            reader: ResponseReader::new(method == "HEAD"),
            forward,
            says_done,
            hold_back,
            held: Vec::new(),
            head: None,
            told_begun: false,
            retry_after_s: None,
        }
    }

    /// The status, once the head is known.
    #[must_use]
    pub fn status(&self) -> Option<u16> {
        self.head.as_ref().map(|answer| answer.status)
    }

    /// Whether the client's connection may serve another request after the answer.
    #[must_use]
    pub fn client_keeps_alive(&self) -> bool {
        self.head.as_ref().is_some_and(|answer| answer.client_keeps_alive)
    }

    /// Whether the answer is a stream of events whose last one said that there are no more.
    #[must_use]
    pub fn said_done(&self) -> bool {
        self.head.as_ref().and_then(|answer| answer.events.as_ref()).is_some_and(Tail::done)
    }

    /// Whether the answer is a stream of events.
    #[must_use]
    pub fn is_event_stream(&self) -> bool {
        self.head.as_ref().is_some_and(|answer| answer.events.is_some())
    }

    /// The tokens that the engine told of so far.
    #[must_use]
    pub fn tokens(&self) -> Tokens {
        self.head.as_ref().map_or_else(Tokens::default, |answer| answer.meter.tokens())
    }

    /// After how many seconds the engine wants to be asked again, if its answer was held back and says so.
    #[must_use]
    pub fn retry_after_s(&self) -> Option<u64> {
        self.retry_after_s
    }

    /// Whether an answer that was held back says that another one had begun behind it.
    #[must_use]
    pub fn told_begun(&self) -> bool {
        self.told_begun
    }

    /// Whether the engine's connection may serve another request after the answer.
    #[must_use]
    pub fn upstream_keeps_alive(&self) -> bool {
        self.head.as_ref().is_some_and(|answer| answer.upstream_keeps_alive)
    }

    /// Takes bytes of the engine and puts out what they become.
    ///
    /// # Errors
    /// [`BadMessage`]: the engine is not to be believed any further.
    pub fn received(&mut self, input: &[u8], out: &mut Vec<u8>) -> Result<Step, BadMessage> {
        if self.head.is_some() {
            return self.body(input, out);
        }
        // Mostly the whole head comes at once and needs no copy.
        if self.held.is_empty() {
            let (used, head) = self.reader.head(input)?;
            let Some(head) = head else {
                self.held.extend_from_slice(&input[used..]);
                return Ok(Step::More);
            };
            return self.begin(&head, &input[used..], out);
        }
        self.held.extend_from_slice(input);
        let held = std::mem::take(&mut self.held);
        let (used, head) = self.reader.head(&held)?;
        match head {
            Some(head) => self.begin(&head, &held[used..], out),
            None => {
                self.held = held[used..].to_vec();
                Ok(Step::More)
            }
        }
    }

    /// The engine closed.
    ///
    /// # Errors
    /// [`BadMessage`] if the answer had not ended.
    pub fn closed(&mut self, out: &mut Vec<u8>) -> Result<(), BadMessage> {
        let early = BadMessage { status: 502, reason: "the connection closed before the answer's end" };
        let said_done = self.said_done();
        let (Some(answer), Some(body)) = (&mut self.head, self.reader.body()) else { return Err(early) };
        answer.upstream_keeps_alive = false;
        // A stream that said that it is done has ended, even if its framing's end is still owed; one
        // that stops within an event has not, even if closing would be its framing's end.
        let between_chunks = body.between_chunks();
        let mute = |tail: &Tail| !tail.between_events() || answer.must_say_end && !tail.finished();
        if !said_done && answer.events.as_ref().is_some_and(mute) {
            return Err(early);
        }
        let ended = body.close() || said_done && between_chunks;
        match answer.body {
            _ if !ended => return Err(early),
            Body::Rechunked => out.extend_from_slice(LAST_CHUNK),
            Body::Same if between_chunks => out.extend_from_slice(LAST_CHUNK),
            Body::Same | Body::Data => {}
        }
        Ok(())
    }

    /// The engine failed after its head was forwarded. Puts out an error event where one fits; the
    /// client's connection must be closed behind it either way. False if a close would look like the
    /// answer's end, so that the connection must be reset.
    #[must_use]
    pub fn failed(&mut self, message: &str, out: &mut Vec<u8>) -> bool {
        let Some(answer) = &self.head else { return true };
        if !answer.events.as_ref().is_some_and(Tail::between_events) {
            return answer.body != Body::Data;
        }
        if answer.error_told {
            // A relay on the way knows better what happened.
            return true;
        }
        let error = serde_json::json!({"error": {
            "message": message, "type": "upstream_error", "param": null, "code": "upstream_error",
        }});
        // Without the framing's end: not every client reads error events.
        self.insert_event(format!("data: {error}\n\n").as_bytes(), out);
        true
    }

    /// Puts out a comment, which clients skip, where the answer is a stream of events that stands between
    /// two of them. False where none fits.
    pub fn keep_alive(&mut self, out: &mut Vec<u8>) -> bool {
        let between_events = self.head.as_ref().and_then(|answer| answer.events.as_ref());
        between_events.is_some_and(Tail::between_events) && self.insert_event(KEEP_ALIVE, out)
    }

    /// Puts an event of our own between two of the engine's, if the framing has a place for it.
    fn insert_event(&mut self, event: &[u8], out: &mut Vec<u8>) -> bool {
        let between_chunks = self.reader.body().is_some_and(|body| body.between_chunks());
        let Some(answer) = &self.head else { return false };
        match answer.body {
            Body::Same if !between_chunks && !answer.is_mute => return false,
            Body::Same | Body::Rechunked => encode_chunk(out, event),
            Body::Data => out.extend_from_slice(event),
        }
        true
    }

    fn begin(&mut self, head: &ResponseHead, rest: &[u8], out: &mut Vec<u8>) -> Result<Step, BadMessage> {
        let is_event_stream = head.is_event_stream();
        let mut answer = Answer {
            status: head.status,
            upstream_keeps_alive: head.keep_alive,
            client_keeps_alive: false,
            body: Body::Data,
            events: (is_event_stream && !is_encoded(head)).then(Tail::default),
            must_say_end: self.says_done && head.status == 200 && head.framing == Framing::UntilClose,
            is_mute: false,
            error_told: false,
            meter: Meter::default(),
        };
        if self.hold_back.contains(&head.status) {
            let after = head.fields.get("retry-after");
            self.told_begun = head.fields.get(BEGUN_FIELD).is_some();
            self.retry_after_s = after.and_then(|seconds| seconds.trim().parse().ok());
            return Ok(Step::HeldBack(head.status));
        }
        if let Some(forward) = &self.forward {
            answer.body = match (head.framing, forward.to.version) {
                (Framing::Empty | Framing::Length(_), _) | (Framing::Chunked, Version::Http11) => Body::Same,
                (Framing::UntilClose, Version::Http11) => Body::Rechunked,
                (_, Version::Http10) => Body::Data,
            };
            answer.client_keeps_alive = forward.to.keep_alive && answer.body != Body::Data;
            let added = forward.fields.as_bytes().len() + HEAD_SURPLUS_BYTES;
            out.reserve(head.fields.bytes_len() + added + rest.len());
            encode_forwarded_head(
                head,
                is_event_stream,
                answer.body,
                answer.client_keeps_alive,
                forward,
                out,
            );
        }
        self.head = Some(answer);
        self.body(rest, out)
    }

    fn body(&mut self, input: &[u8], out: &mut Vec<u8>) -> Result<Step, BadMessage> {
        let (Some(answer), Some(decoder)) = (&mut self.head, self.reader.body()) else {
            return Ok(Step::More);
        };
        // A task's answer is judged by who reads it.
        let must_say = self.says_done && self.forward.is_some();
        let mut rest = input;
        while !rest.is_empty() && !decoder.finished() {
            let (between_chunks, owed) = (decoder.between_chunks(), decoder.chunk_end_owed());
            let piece = decoder.next(rest).map_err(|error| BadMessage { status: 502, ..error })?;
            let data = &rest[piece.data];
            if data.is_empty() && decoder.is_ending() && must_say && !answer.has_said_end() {
                // What its last chunk of data lacks of its framing comes at once with the end, or came before.
                answer.is_mute = between_chunks || owed > 0;
                if answer.body == Body::Same {
                    out.extend_from_slice(&rest[..owed]);
                }
                return Err(BadMessage { status: 502, reason: MUTE_END });
            }
            match answer.body {
                Body::Same => out.extend_from_slice(&rest[..piece.consumed]),
                Body::Rechunked => encode_chunk(out, data),
                Body::Data => out.extend_from_slice(data),
            }
            if let Some(tail) = &mut answer.events
                && !data.is_empty()
            {
                answer.error_told = tail.between_events() && data.starts_with(ERROR_EVENT_START);
                if answer.must_say_end {
                    tail.look_for_finish(data);
                }
                tail.passed(data);
            }
            if decoder.finished() {
                answer.meter.ended(data);
            } else {
                answer.meter.passed(data);
            }
            rest = &rest[piece.consumed..];
        }
        if !decoder.finished() {
            return Ok(Step::More);
        }
        answer.upstream_keeps_alive &= rest.is_empty();
        Ok(Step::Complete)
    }
}

/// Whether the body is compressed: then nobody but its reader knows where an event ends.
fn is_encoded(head: &ResponseHead) -> bool {
    head.fields.get("content-encoding").is_some_and(|coding| !coding.trim().eq_ignore_ascii_case("identity"))
}

/// Which web pages may read an answer is for this process to say, not for the engine, which lets all.
fn speaks_to_pages(name: &[u8]) -> bool {
    const PREFIX: &[u8] = b"access-control-";
    name.get(..PREFIX.len()).is_some_and(|start| start.eq_ignore_ascii_case(PREFIX))
}

fn encode_forwarded_head(
    head: &ResponseHead,
    is_event_stream: bool,
    body: Body,
    keep_alive: bool,
    forward: &Forward,
    out: &mut Vec<u8>,
) {
    begin_head(out, head.status);
    for field in head.fields.raw() {
        let name = field.name;
        // A length beside a status that has no body would make the next answer part of this one.
        let vain = head.status == 204 && name.eq_ignore_ascii_case(b"content-length");
        if !is_hop_by_hop(name)
            && !head.fields.connection_names(name)
            && !forward.fields.holds(name)
            && !vain
            && !speaks_to_pages(name)
        {
            field.copy_to(out);
        }
    }
    if body == Body::Rechunked || head.framing == Framing::Chunked && body == Body::Same {
        push_field(out, "Transfer-Encoding", "chunked");
    }
    if is_event_stream && head.fields.get("x-accel-buffering").is_none() {
        push_field(out, "X-Accel-Buffering", "no");
    }
    out.extend_from_slice(forward.fields.as_bytes());
    push_connection(out, AnswerTo { keep_alive, ..forward.to });
    out.extend_from_slice(b"\r\n");
}
