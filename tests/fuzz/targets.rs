//! What each fuzz target holds of any bytes. Shared by the targets of cargo-fuzz and by the test that replays the
//! corpus.

use std::io::Cursor;

use llama_orch::engine_provisioner::models::gguf;
use llama_orch::http::client::ResponseReader;
use llama_orch::http::server::{Progress, RequestReader};
use llama_orch::http::sse::Events;
use llama_orch::orchestratord::peek::{PeekError, peek};
use llama_orch::wire::handoff::{self, HandoffFile};
use llama_orch::wire::node::Heartbeat;

/// Body limit of the reader of requests, in bytes: small, so that it is reached.
const BODY_BYTES_MAX: usize = 4096;

/// Fails where something does not hold of these bytes.
type Check = fn(&[u8]);

/// Name and check of each.
pub(crate) const TARGETS: [(&str, Check); 7] = [
    ("request", request),
    ("response", response),
    ("handoff", handoff),
    ("heartbeat", heartbeat),
    ("peek", peek_body),
    ("gguf", gguf_header),
    ("sse", sse),
];

/// The two pieces into which the first two bytes cut the rest.
fn cut(data: &[u8]) -> Option<(&[u8], [&[u8]; 2])> {
    let (at, rest) = data.split_first_chunk::<2>()?;
    let (one, two) = rest.split_at(usize::from(u16::from_be_bytes(*at)) % (rest.len() + 1));
    Some((rest, [one, two]))
}

fn requests(pieces: &[&[u8]]) -> Vec<String> {
    let (mut reader, mut unread, mut seen) = (RequestReader::new(BODY_BYTES_MAX), Vec::new(), Vec::new());
    for piece in pieces {
        unread.extend_from_slice(piece);
        loop {
            match reader.advance(&unread) {
                Ok((used, progress)) => {
                    unread.drain(..used);
                    match progress {
                        Progress::More => break,
                        Progress::WantsContinue => seen.push("continue".to_string()),
                        Progress::Request(request) => {
                            let head = &request.head;
                            let fields: Vec<_> = head.fields.iter().collect();
                            assert!(request.body.len() <= BODY_BYTES_MAX);
                            seen.push(format!(
                                "{} {} {fields:?} {:?}",
                                head.method(),
                                head.target(),
                                request.body
                            ));
                        }
                    }
                }
                Err(error) => {
                    assert!((400..=505).contains(&error.status));
                    seen.push(error.status.to_string());
                    return seen;
                }
            }
        }
    }
    seen
}

/// Heads and bodies of requests: no cut changes what is read.
pub(crate) fn request(data: &[u8]) {
    let Some((whole, pieces)) = cut(data) else { return };
    assert_eq!(requests(&pieces), requests(&[whole]));
}

fn answer(pieces: &[&[u8]]) -> (Option<u16>, Vec<u8>, bool, bool) {
    let mut reader = ResponseReader::new(false);
    let (mut unread, mut status, mut body): (Vec<u8>, _, _) = (Vec::new(), None, Vec::new());
    for piece in pieces {
        unread.extend_from_slice(piece);
        if status.is_none() {
            match reader.head(&unread) {
                Ok((used, head)) => {
                    unread.drain(..used);
                    status = head.map(|head| head.status);
                }
                Err(_) => return (None, body, false, true),
            }
        }
        let Some(decoder) = reader.body() else { continue };
        while !unread.is_empty() && !decoder.finished() {
            let Ok(piece) = decoder.next(&unread) else { return (status, body, false, true) };
            assert!(piece.consumed > 0, "it makes progress");
            body.extend_from_slice(&unread[piece.data]);
            unread.drain(..piece.consumed);
        }
    }
    let finished = reader.body().is_some_and(|decoder| decoder.close());
    (status, body, finished, false)
}

/// Heads and framing of answers: no cut changes what is read.
pub(crate) fn response(data: &[u8]) {
    let Some((whole, pieces)) = cut(data) else { return };
    assert_eq!(answer(&pieces), answer(&[whole]));
}

/// Handoffs: what was read is written so that it is read again, and then written the same.
pub(crate) fn handoff(data: &[u8]) {
    let Ok(HandoffFile::Engine(read)) = handoff::parse(data) else { return };
    let written = read.to_json();
    // Escapes may make it longer than what is read at all.
    if written.len() > handoff::HANDOFF_BYTES_MAX {
        return;
    }
    match handoff::parse(written.as_bytes()) {
        Ok(HandoffFile::Engine(again)) => assert_eq!(again.to_json(), written),
        other => panic!("what we write we cannot read: {other:?}"),
    }
}

/// Heartbeats: what was read is written and read again as the same; limits are looked at without a panic.
pub(crate) fn heartbeat(data: &[u8]) {
    let Ok(beat) = serde_json::from_slice::<Heartbeat>(data) else { return };
    let written = serde_json::to_vec(&beat).expect("it can be written");
    assert_eq!(serde_json::from_slice::<Heartbeat>(&written).expect("what we write we can read"), beat);
    let _ = beat.within_limits();
    assert!(beat.pools.iter().all(|pool| pool.slots_total() >= pool.slots_free));
}

/// Bodies: what is accepted, or refused for what it says, is JSON.
pub(crate) fn peek_body(data: &[u8]) {
    let read = peek(data);
    if matches!(read, Ok(_) | Err(PeekError::Field { .. } | PeekError::NotAnObject)) {
        let json = std::str::from_utf8(data).expect("text");
        serde_json::from_str::<serde::de::IgnoredAny>(json).expect("JSON");
    }
    if let Some(span) = read.ok().and_then(|read| read.model_span) {
        serde_json::from_slice::<String>(&data[span]).expect("a string");
    }
}

/// Headers of GGUF files.
pub(crate) fn gguf_header(data: &[u8]) {
    let _ = gguf::read(Cursor::new(data));
}

/// Streams of events: no cut changes what is read.
pub(crate) fn sse(data: &[u8]) {
    let Some((whole, pieces)) = cut(data) else { return };
    let read = |pieces: &[&[u8]]| {
        let (mut events, mut seen) = (Events::default(), Vec::new());
        let ended = pieces.iter().all(|piece| {
            events.feed(piece, |event| seen.push((event.name.clone(), event.data.clone()))).is_ok()
        });
        (seen, ended)
    };
    assert_eq!(read(&pieces), read(&[whole]));
}
