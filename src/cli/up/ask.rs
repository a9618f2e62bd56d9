//! A blocking HTTP client for this machine's own daemons: one JSON answer, or one stream of tokens.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::http::client::ResponseReader;
use crate::http::sse::Events;

/// A daemon on this machine connects at once or not at all.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(500);
/// Longest silence of a short answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// How often a stream looks up from its socket to see whether it was interrupted.
const LOOK_UP_EVERY: Duration = Duration::from_millis(100);
/// Longest silence of a stream: a large model may read a prompt for a long time.
const SILENCE_MAX: Duration = Duration::from_secs(600);

/// What a streamed answer was like, in milliseconds since the request was sent.
#[derive(Debug, Default)]
pub(super) struct Streamed {
    pub(super) first_byte_ms: f64,
    pub(super) last_byte_ms: f64,
    pub(super) tokens: u64,
}

/// `GET path` as JSON; `None` if nobody answers, or not so.
pub(super) fn get(port: u16, path: &str) -> Option<Value> {
    let mut stream = connect(port, ANSWER_TIMEOUT)?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).ok()?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).ok()?;
    let mut reader = ResponseReader::new(false);
    let (used, head) = reader.head(&answer).ok()?;
    if head?.status != 200 {
        return None;
    }
    let body = reader.body()?.next(&answer[used..]).ok()?;
    serde_json::from_slice(&answer[used..][body.data]).ok()
}

/// Asks for a streamed chat completion and hands every piece of text to `show` as it comes.
pub(super) fn stream(
    port: u16,
    body: &str,
    interrupted: &AtomicBool,
    mut show: impl FnMut(&str),
) -> Result<Streamed, String> {
    let mut stream = connect(port, LOOK_UP_EVERY).ok_or("orchestratord does not answer")?;
    let request = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    let sent = Instant::now();
    stream.write_all(request.as_bytes()).map_err(|error| error.to_string())?;
    let (mut reader, mut unread, mut head) = (ResponseReader::new(false), Vec::new(), None);
    let (mut events, mut streamed, mut failure) = (Events::default(), Streamed::default(), None);
    let (mut heard, mut buffer) = (Instant::now(), vec![0; 16 * 1024]);
    while !reader.finished() {
        if interrupted.load(Ordering::Relaxed) {
            return Err("interrupted".into());
        }
        match stream.read(&mut buffer) {
            Ok(0) => return Err("the answer ended early".into()),
            Ok(length) => unread.extend_from_slice(&buffer[..length]),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                if heard.elapsed() > SILENCE_MAX {
                    return Err(format!("no byte for {} s", SILENCE_MAX.as_secs()));
                }
                continue;
            }
            Err(error) => return Err(error.to_string()),
        }
        heard = Instant::now();
        if head.is_none() {
            let (used, parsed) = reader.head(&unread).map_err(|error| error.to_string())?;
            unread.drain(..used);
            head = parsed;
        }
        let (Some(head), Some(decoder)) = (&head, reader.body()) else { continue };
        while !unread.is_empty() && !decoder.finished() {
            let piece = decoder.next(&unread).map_err(|error| error.to_string())?;
            let data = &unread[piece.data];
            if !data.is_empty() && streamed.first_byte_ms == 0.0 {
                streamed.first_byte_ms = sent.elapsed().as_secs_f64() * 1e3;
            }
            if head.status != 200 {
                return Err(format!("status {}: {}", head.status, String::from_utf8_lossy(data)));
            }
            let each = |event: crate::http::sse::Event| match text_of(&event.data) {
                Ok(Some(text)) => {
                    streamed.tokens += 1;
                    show(&text);
                }
                Ok(None) => {}
                Err(error) => failure = Some(error),
            };
            events.feed(data, each).map_err(|_| "an event is larger than 1 MiB".to_string())?;
            unread.drain(..piece.consumed);
        }
    }
    streamed.last_byte_ms = sent.elapsed().as_secs_f64() * 1e3;
    match failure {
        Some(error) => Err(error),
        None => Ok(streamed),
    }
}

fn connect(port: u16, read_timeout: Duration) -> Option<TcpStream> {
    let address = SocketAddr::from(([127, 0, 0, 1], port));
    let stream = TcpStream::connect_timeout(&address, CONNECT_TIMEOUT).ok()?;
    stream.set_read_timeout(Some(read_timeout)).ok()?;
    stream.set_nodelay(true).ok()?;
    Some(stream)
}

/// The text that an event of a chat completion adds, or the error that it carries.
fn text_of(data: &[u8]) -> Result<Option<String>, String> {
    let Ok(event) = serde_json::from_slice::<Value>(data) else { return Ok(None) };
    if let Some(message) = event["error"]["message"].as_str() {
        return Err(message.to_string());
    }
    let text = event["choices"][0]["delta"]["content"].as_str().filter(|text| !text.is_empty());
    Ok(text.map(str::to_string))
}
