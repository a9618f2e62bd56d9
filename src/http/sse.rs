//! Server-sent events: where they end, and what they carry.
//!
//! A relay forwards event bytes unchanged and needs to know two things only: whether it stands
//! between two events (so that an event of its own may be put in) and whether the stream said that
//! it is done. [`Tail`] answers both from the last bytes that passed. A reader of events ([`Events`])
//! is needed where tokens are translated into another dialect.

/// Longest event that [`Events`] collects, in bytes.
pub const EVENT_BYTES_MAX: usize = 1024 * 1024;

/// A comment, which every reader of events skips: it shows whoever is on the way that a silent stream lives.
pub const KEEP_ALIVE: &[u8] = b": keep-alive\n\n";

/// The last bytes of a stream. O(1) a piece, whatever the piece's size.
#[derive(Clone, Debug, Default)]
pub struct Tail {
    bytes: [u8; Tail::LENGTH],
    length: usize,
    finished: bool,
}

/// How a chunk of OpenAI's dialect tells why its answer ends: as a word, where `null` stands before. Text
/// that was generated cannot hold this, as its quotes are escaped.
const FINISHES: [&[u8]; 2] = [b"\"finish_reason\":\"", b"\"finish_reason\": \""];

/// Whether part of a stream in OpenAI's dialect tells a reason to finish.
#[must_use]
pub fn holds_finish(data: &[u8]) -> bool {
    FINISHES.iter().any(|word| memchr::memmem::find(data, word).is_some())
}

impl Tail {
    /// Enough for `data: [DONE]` with its line ends.
    const LENGTH: usize = 24;

    /// More of the stream passed.
    pub fn passed(&mut self, data: &[u8]) {
        if data.len() >= Self::LENGTH {
            self.bytes.copy_from_slice(&data[data.len() - Self::LENGTH..]);
            self.length = Self::LENGTH;
            return;
        }
        let keep = self.length.min(Self::LENGTH - data.len());
        self.bytes.copy_within(self.length - keep..self.length, 0);
        self.bytes[keep..keep + data.len()].copy_from_slice(data);
        self.length = keep + data.len();
    }

    /// Whether the stream stands between two events (or has not begun).
    #[must_use]
    pub fn between_events(&self) -> bool {
        let tail = &self.bytes[..self.length];
        tail.is_empty() || tail.ends_with(b"\n\n") || tail.ends_with(b"\r\n\r\n") || tail.ends_with(b"\r\r")
    }

    /// Whether a chunk that was [looked at](Self::look_for_finish) told a reason to finish (or the last event was `[DONE]`).
    #[must_use]
    pub fn finished(&self) -> bool {
        self.finished || self.done()
    }

    /// Looks for such a chunk in what is about to pass: for streams whose end is not told otherwise.
    pub fn look_for_finish(&mut self, data: &[u8]) {
        let mut seam = [0; 2 * Self::LENGTH];
        let begins = data.len().min(Self::LENGTH);
        seam[..self.length].copy_from_slice(&self.bytes[..self.length]);
        seam[self.length..self.length + begins].copy_from_slice(&data[..begins]);
        self.finished = self.finished || holds_finish(&seam[..self.length + begins]) || holds_finish(data);
    }

    /// Whether the last event was `[DONE]`, with which OpenAI's dialect ends a stream.
    #[must_use]
    pub fn done(&self) -> bool {
        let tail = self.bytes[..self.length].trim_ascii_end();
        let before = tail.strip_suffix(b"[DONE]").map(|rest| rest.strip_suffix(b" ").unwrap_or(rest));
        // At the start of a line: generated text may hold these words.
        let before = before.and_then(|rest| rest.strip_suffix(b"data:"));
        before.is_some_and(|rest| matches!(rest.last(), None | Some(b'\n' | b'\r')))
    }
}

/// Reads events off a stream: feed bytes, take the `data` of each event.
#[derive(Debug, Default)]
pub struct Events {
    line: Vec<u8>,
    data: Vec<u8>,
    name: Vec<u8>,
    has_data: bool,
    after_cr: bool,
}

/// One event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// The `event` field; empty where there was none.
    pub name: Vec<u8>,
    /// The `data` lines, joined by line feeds.
    pub data: Vec<u8>,
}

/// An event was longer than [`EVENT_BYTES_MAX`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooLong;

impl Events {
    /// Bytes that are kept until the next event is complete.
    #[must_use]
    pub fn kept_bytes(&self) -> usize {
        self.line.capacity() + self.data.capacity() + self.name.capacity()
    }

    /// Takes `bytes` and hands every event that they complete to `each`.
    ///
    /// # Errors
    /// [`TooLong`]; the stream cannot be read any further.
    pub fn feed(&mut self, bytes: &[u8], mut each: impl FnMut(Event)) -> Result<(), TooLong> {
        let mut rest = bytes;
        while !rest.is_empty() {
            if std::mem::take(&mut self.after_cr) && rest[0] == b'\n' {
                rest = &rest[1..];
                continue;
            }
            let Some(end) = memchr::memchr2(b'\n', b'\r', rest) else {
                self.line.extend_from_slice(rest);
                break;
            };
            self.line.extend_from_slice(&rest[..end]);
            self.after_cr = rest[end] == b'\r';
            rest = &rest[end + 1..];
            self.end_line(&mut each);
            if self.line.len() + self.data.len() > EVENT_BYTES_MAX {
                return Err(TooLong);
            }
        }
        if self.line.len() + self.data.len() > EVENT_BYTES_MAX { Err(TooLong) } else { Ok(()) }
    }

    fn end_line(&mut self, each: &mut impl FnMut(Event)) {
        let line = std::mem::take(&mut self.line);
        if line.is_empty() {
            let event = Event { name: std::mem::take(&mut self.name), data: std::mem::take(&mut self.data) };
            if std::mem::take(&mut self.has_data) {
                each(event);
            }
            return;
        }
        let (name, value) = match memchr::memchr(b':', &line) {
            Some(colon) => {
                (&line[..colon], line[colon + 1..].strip_prefix(b" ").unwrap_or(&line[colon + 1..]))
            }
            None => (&line[..], &[][..]),
        };
        match name {
            b"data" => {
                if std::mem::replace(&mut self.has_data, true) {
                    self.data.push(b'\n');
                }
                self.data.extend_from_slice(value);
            }
            b"event" => self.name = value.to_vec(),
            // Not of the standard: builds of llama-server report an error so, without `event` and `data`.
            b"error" => {
                self.name = b"error".to_vec();
                self.has_data = true;
                self.data.extend_from_slice(value);
            }
            _ => {}
        }
    }
}

/// Writes one event with JSON data.
pub fn encode_event(out: &mut Vec<u8>, name: &str, data: &impl serde::Serialize) {
    out.extend_from_slice(b"event: ");
    out.extend_from_slice(name.as_bytes());
    out.extend_from_slice(b"\ndata: ");
    // JSON text holds no raw line ends, so one `data` line is enough.
    let _ = serde_json::to_writer(&mut *out, data);
    out.extend_from_slice(b"\n\n");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(pieces: &[&[u8]]) -> Vec<(String, String)> {
        let (mut events, mut out) = (Events::default(), Vec::new());
        for piece in pieces {
            let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("text");
            events.feed(piece, |event| out.push((text(event.name), text(event.data)))).expect("short events");
        }
        out
    }

    #[test]
    fn events_are_the_same_however_the_bytes_were_cut() {
        let stream =
            b": comment\r\n\r\ndata: a\ndata:b\n\nevent: token\rdata: {\"t\":\"x\"}\r\rdata: [DONE]\r\n\r\n";
        let whole = all(&[stream]);
        assert_eq!(
            whole,
            [("", "a\nb"), ("token", "{\"t\":\"x\"}"), ("", "[DONE]")]
                .map(|(n, d)| (n.to_string(), d.to_string()))
        );
        for cut in 0..=stream.len() {
            assert_eq!(all(&[&stream[..cut], &stream[cut..]]), whole, "cut at {cut}");
        }
        assert_eq!(all(&stream.chunks(1).collect::<Vec<_>>()), whole);
    }

    #[test]
    fn the_tail_knows_event_ends_and_done_at_every_cut() {
        let stream = b"data: {\"a\":1}\n\ndata: [DONE]\n\n";
        for cut in 0..=stream.len() {
            let mut tail = Tail::default();
            tail.passed(&stream[..cut]);
            assert_eq!(tail.between_events(), matches!(cut, 0 | 15 | 29), "cut at {cut}");
            tail.passed(&stream[cut..]);
            assert!(tail.between_events() && tail.done(), "cut at {cut}");
        }
        let mut quoted = Tail::default();
        quoted.passed(b"data: {\"text\":\"data: [DONE]");
        assert!(!quoted.done());
    }

    #[test]
    fn the_tail_knows_a_reason_to_finish_at_every_cut() {
        let finish = b"data: {\"choices\":[{\"delta\":{},\"finish_reason\": \"stop\"}]}\n\ndata: {}\n\n";
        let running = b"data: {\"choices\":[{\"delta\":{\"content\":\"\\\"finish_reason\\\":\\\"stop\\\"\"},\"finish_reason\":null}]}\n\n";
        for (stream, finished) in [(&finish[..], true), (&running[..], false)] {
            for cut in 0..=stream.len() {
                let mut tail = Tail::default();
                for piece in [&stream[..cut], &stream[cut..]] {
                    tail.look_for_finish(piece);
                    tail.passed(piece);
                }
                assert_eq!(tail.finished(), finished, "cut at {cut}");
            }
        }
    }

    #[test]
    fn an_endless_event_is_refused() {
        let mut events = Events::default();
        let piece = vec![b'x'; 64 * 1024];
        let result = (0..17).try_for_each(|_| events.feed(&piece, |_| {}));
        assert_eq!(result, Err(TooLong));
    }
}
