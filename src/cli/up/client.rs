//! Asking a daemon over HTTP: a small answer as a whole, a streamed one piece by piece.
//!
//! Blocking sockets with short read timeouts: between two reads whoever asks looks whether to go on.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::Halt;
use super::timeline::AnswerTimes;
use crate::http::client::{ResponseReader, encode_request_head};
use crate::http::fields::FieldLines;
use crate::http::sse;

/// Longest connect; daemons of this machine take it in less than a millisecond.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// Longest that a small answer may take as a whole.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);
/// Longest silence of a streamed answer: large prompts are read for minutes before the first token.
const SILENCE_MAX: Duration = Duration::from_secs(900);
/// How often a silent stream looks whether anybody still wants it.
const LOOK: Duration = Duration::from_millis(20);
/// Largest answer that is collected, in bytes: a thousand events with their texts.
const ANSWER_BYTES_MAX: usize = 2 * 1024 * 1024;
/// Bytes of one read.
const READ_BYTES: usize = 16 * 1024;
/// Characters of an error's body that are shown.
const ERROR_CHARS_MAX: usize = 300;

/// One daemon, asked again and again.
pub(super) struct Client {
    address: SocketAddr,
    idle: Option<TcpStream>,
}

impl Client {
    pub(super) fn new(address: SocketAddr) -> Client {
        Client { address, idle: None }
    }

    /// Status and body of `target`. A connection that is left from before may have been closed
    /// meanwhile, so an error on it is tried once more on a fresh one.
    pub(super) fn get(&mut self, target: &str) -> Result<(u16, Vec<u8>), String> {
        if let Some(stream) = self.idle.take()
            && let Ok(answer) = self.get_on(stream, target)
        {
            return Ok(answer);
        }
        let stream = dial(self.address)?;
        self.get_on(stream, target)
    }

    /// The JSON of `target`, if its status is 200.
    pub(super) fn get_json<T: serde::de::DeserializeOwned>(&mut self, target: &str) -> Result<T, String> {
        match self.get(target)? {
            (200, body) => serde_json::from_slice(&body).map_err(|error| format!("{target}: {error}")),
            (status, _) => Err(format!("{target} is answered {status}")),
        }
    }

    fn get_on(&mut self, stream: TcpStream, target: &str) -> Result<(u16, Vec<u8>), String> {
        let started = Instant::now();
        let mut exchange = Exchange::send(stream, self.address, "GET", target, b"")?;
        let mut body = Vec::new();
        while !exchange.is_over() {
            if started.elapsed() > ANSWER_TIMEOUT || body.len() > ANSWER_BYTES_MAX {
                return Err(format!("{target} is not answered"));
            }
            exchange.read(&mut body)?;
        }
        if exchange.keep_alive {
            self.idle = Some(exchange.stream);
        }
        Ok((exchange.status.unwrap_or(0), body))
    }
}

fn dial(address: SocketAddr) -> Result<TcpStream, String> {
    let failed = |error: std::io::Error| format!("{address}: {error}");
    let stream = TcpStream::connect_timeout(&address, CONNECT_TIMEOUT).map_err(failed)?;
    stream.set_nodelay(true).map_err(failed)?;
    stream.set_read_timeout(Some(LOOK)).map_err(failed)?;
    stream.set_write_timeout(Some(ANSWER_TIMEOUT)).map_err(failed)?;
    Ok(stream)
}

/// One request and its answer as it comes.
struct Exchange {
    stream: TcpStream,
    reader: ResponseReader,
    /// Received, not yet understood.
    input: Vec<u8>,
    status: Option<u16>,
    keep_alive: bool,
}

impl Exchange {
    fn send(
        mut stream: TcpStream,
        host: SocketAddr,
        method: &str,
        target: &str,
        body: &[u8],
    ) -> Result<Exchange, String> {
        let mut out = Vec::new();
        let mut fields = FieldLines::new();
        if !body.is_empty() {
            fields.push("Content-Type", "application/json");
        }
        encode_request_head(&mut out, method, ["", target], &host.to_string(), &fields, body.len());
        out.extend_from_slice(body);
        stream.write_all(&out).map_err(|error| format!("{host}: {error}"))?;
        let reader = ResponseReader::new(false);
        Ok(Exchange { stream, reader, input: Vec::new(), status: None, keep_alive: false })
    }

    fn is_over(&self) -> bool {
        self.reader.finished()
    }

    /// One read: what it brought of the body goes behind `body`. Whether there was anything.
    fn read(&mut self, body: &mut Vec<u8>) -> Result<bool, String> {
        let mut bytes = [0; READ_BYTES];
        match self.stream.read(&mut bytes) {
            Ok(0) if self.reader.body().is_some_and(|decoder| decoder.close()) => return Ok(true),
            Ok(0) => return Err("the connection was closed in the middle of an answer".into()),
            Ok(length) => self.input.extend_from_slice(&bytes[..length]),
            Err(error) => match error.kind() {
                ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted => return Ok(false),
                _ => return Err(error.to_string()),
            },
        }
        let mut used = 0;
        if self.status.is_none() {
            let (length, head) = self.reader.head(&self.input).map_err(|error| error.to_string())?;
            used = length;
            if let Some(head) = head {
                self.status = Some(head.status);
                self.keep_alive = head.keep_alive;
            }
        }
        while let Some(decoder) = self.reader.body()
            && used < self.input.len()
            && !decoder.finished()
        {
            let piece = decoder.next(&self.input[used..]).map_err(|error| error.to_string())?;
            body.extend_from_slice(&self.input[used..][piece.data]);
            used += piece.consumed;
        }
        self.input.drain(..used);
        Ok(true)
    }
}

/// A chat completion that was streamed to its end.
#[derive(Debug, Default)]
pub(super) struct Answered {
    pub(super) times: AnswerTimes,
    /// Tokens as the engine counts them, or pieces of text where it does not say.
    pub(super) tokens: u64,
    /// From the first to the last piece of text, in nanoseconds.
    pub(super) decoding: u64,
}

/// Asks for one chat completion and hands every piece of its text to `token` when it comes. `go_on` is
/// called now and then while nothing comes.
pub(super) fn chat(
    address: SocketAddr,
    model: Option<&str>,
    prompt: &str,
    tokens_max: u64,
    mut go_on: impl FnMut() -> Result<(), Halt>,
    mut token: impl FnMut(&str),
) -> Result<Answered, Halt> {
    let mut request = json!({
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": tokens_max,
        "stream": true,
        "stream_options": {"include_usage": true},
    });
    if let Some(model) = model {
        request["model"] = model.into();
    }
    let stream = dial(address)?;
    let sent = Instant::now();
    let mut exchange =
        Exchange::send(stream, address, "POST", "/v1/chat/completions", request.to_string().as_bytes())?;
    let (mut body, mut chat, mut answered) = (Vec::new(), Chat::default(), Answered::default());
    let (mut heard, mut is_first_byte) = (sent, true);
    while !exchange.is_over() {
        go_on()?;
        if !exchange.read(&mut body)? {
            if heard.elapsed() > SILENCE_MAX {
                return Err(Halt::Failed(format!("no answer within {} s of silence", SILENCE_MAX.as_secs())));
            }
            continue;
        }
        heard = Instant::now();
        let at = nanoseconds(heard - sent);
        if std::mem::take(&mut is_first_byte) {
            answered.times.first_byte = at;
        }
        answered.times.last_byte = at;
        if exchange.status != Some(200) {
            continue;
        }
        let first_token = &mut answered.times.first_token;
        let decoding = &mut answered.decoding;
        chat.take(&body, |text| {
            let first = *first_token.get_or_insert(at);
            *decoding = at - first;
            token(text);
        })?;
        body.clear();
    }
    match exchange.status {
        Some(200) if chat.is_complete => {}
        Some(200) => return Err(Halt::Failed("the answer ended before it was complete".into())),
        status => {
            let text = String::from_utf8_lossy(&body);
            let told = serde_json::from_str(&text).ok().and_then(|body: Value| message_of(&body["error"]));
            let told: String = told.unwrap_or(text.into_owned()).chars().take(ERROR_CHARS_MAX).collect();
            return Err(Halt::Failed(format!("the request is answered {}: {told}", status.unwrap_or(0))));
        }
    }
    answered.tokens = chat.counted.unwrap_or(chat.pieces);
    answered.times.prefill = chat.prefill;
    Ok(answered)
}

/// The events of a chat completion, understood as far as it takes to show and count them.
#[derive(Default)]
struct Chat {
    events: sse::Events,
    pieces: u64,
    counted: Option<u64>,
    prefill: Option<u64>,
    is_complete: bool,
}

impl Chat {
    fn take(&mut self, bytes: &[u8], mut token: impl FnMut(&str)) -> Result<(), Halt> {
        let mut found = Vec::new();
        self.events
            .feed(bytes, |event| found.push(event.data))
            .map_err(|_| Halt::Failed("an event of the answer is longer than 1 MiB".into()))?;
        for data in found {
            if data == b"[DONE]" {
                self.is_complete = true;
                continue;
            }
            let chunk: Value = serde_json::from_slice(&data)
                .map_err(|error| Halt::Failed(format!("an event of the answer is no JSON: {error}")))?;
            if let Some(message) = message_of(&chunk["error"]) {
                return Err(Halt::Failed(format!("the answer broke off: {message}")));
            }
            let choice = &chunk["choices"][0];
            self.is_complete |= choice["finish_reason"].is_string();
            for field in ["reasoning_content", "content"] {
                if let Some(text) = choice["delta"][field].as_str().filter(|text| !text.is_empty()) {
                    self.pieces += 1;
                    token(text);
                }
            }
            self.counted = chunk["usage"]["completion_tokens"].as_u64().or(self.counted);
            let prefill_ms = chunk["timings"]["prompt_ms"].as_f64().filter(|ms| (0.0..1e9).contains(ms));
            self.prefill = prefill_ms.map(|ms| (ms * 1e6) as u64).or(self.prefill);
        }
        Ok(())
    }
}

/// What an error object says; some engines give only a string.
fn message_of(error: &Value) -> Option<String> {
    match error {
        Value::Null => None,
        Value::String(text) => Some(text.clone()),
        other => Some(other["message"].as_str().map_or_else(|| other.to_string(), str::to_string)),
    }
}

/// A duration as a number; `up` does not run for centuries.
pub(super) fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const STREAM: &str = "data: {\"choices\":[{\"delta\":{\"role\":\"assistant\",\"content\":null}}]}\n\n\
        : a comment\n\n\
        data: {\"choices\":[{\"delta\":{\"content\":\"Hel\"}}]}\n\n\
        data: {\"choices\":[{\"delta\":{\"content\":\"lo \\u00e9\"}}]}\r\n\r\n\
        data: {\"choices\":[{\"delta\":{},\"finish_reason\":\"stop\"}],\"timings\":{\"prompt_ms\":1.5}}\n\n\
        data: {\"choices\":[],\"usage\":{\"completion_tokens\":7}}\n\n\
        data: [DONE]\n\n";

    #[test]
    fn an_answer_reads_the_same_however_its_bytes_come() {
        for size in [1, 2, 7, 64, STREAM.len()] {
            let (mut chat, mut text) = (Chat::default(), String::new());
            for bytes in STREAM.as_bytes().chunks(size) {
                chat.take(bytes, |piece| text.push_str(piece)).expect("a good stream");
            }
            assert_eq!(text, "Hello \u{e9}");
            assert_eq!((chat.pieces, chat.counted, chat.prefill), (2, Some(7), Some(1_500_000)));
            assert!(chat.is_complete);
        }
    }

    #[test]
    fn an_error_in_the_stream_is_a_failure_and_a_cut_is_not_complete() {
        for (event, part) in [
            (r#"data: {"error":{"message":"out of memory","code":500}}"#, "out of memory"),
            (r#"data: {"error":"gone"}"#, "gone"),
            ("data: <html>", "no JSON"),
        ] {
            match Chat::default().take(format!("{event}\n\n").as_bytes(), |_| {}) {
                Err(Halt::Failed(message)) => assert!(message.contains(part), "{message}"),
                other => panic!("{event}: {other:?}"),
            }
        }
        let mut chat = Chat::default();
        let half = &STREAM[..STREAM.find("finish").expect("in the text")];
        chat.take(half.as_bytes(), |_| {}).expect("good so far");
        assert!(!chat.is_complete);
    }
}
