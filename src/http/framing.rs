//! Where a body's bytes begin and end, whichever way they are framed.
//!
//! A [`BodyDecoder`] is fed whatever arrived and returns pieces: how much it consumed and which part
//! of that was data. It holds no bytes. A relay that keeps the peer's framing forwards what was
//! consumed; one that changes it forwards the data only.

use std::ops::Range;

use super::head::{BadMessage, Framing};

/// Longest chunk-size line, extensions included and its end not, in bytes. Extensions have no known use.
pub const CHUNK_LINE_BYTES_MAX: u32 = 256;
/// Most bytes of trailer fields, line ends not counted.
pub const TRAILER_BYTES_MAX: u32 = 8 * 1024;

/// What one call of [`BodyDecoder::next`] found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Bytes of the input that belong to this body; the rest has not been looked at.
    pub consumed: usize,
    /// The part of them that is data.
    pub data: Range<usize>,
}

/// Follows one body.
#[derive(Clone, Debug)]
pub struct BodyDecoder {
    state: State,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Done,
    Length(u64),
    UntilClose,
    /// In a chunk-size line: value so far, hex digits, bytes of the line.
    Size {
        value: u64,
        digits: u8,
        line: u32,
        in_extension: bool,
    },
    SizeLf(u64),
    Data(u64),
    DataCr,
    DataLf,
    /// In a trailer line: whether nothing of it has come, whether its colon has, bytes of all trailers.
    Trailer {
        is_empty: bool,
        in_value: bool,
        total: u32,
    },
    TrailerLf {
        is_empty: bool,
        total: u32,
    },
}

const fn bad(reason: &'static str) -> BadMessage {
    BadMessage { status: 400, reason }
}

impl BodyDecoder {
    /// A decoder for a body that is framed so.
    #[must_use]
    pub fn new(framing: Framing) -> BodyDecoder {
        let state = match framing {
            Framing::Empty | Framing::Length(0) => State::Done,
            Framing::Length(length) => State::Length(length),
            Framing::UntilClose => State::UntilClose,
            Framing::Chunked => State::Size { value: 0, digits: 0, line: 0, in_extension: false },
        };
        BodyDecoder { state }
    }

    /// Whether the body has ended.
    #[must_use]
    pub fn finished(&self) -> bool {
        self.state == State::Done
    }

    /// Whether a chunk could be put in here by a third party: between two chunks of a chunked body.
    #[must_use]
    pub fn between_chunks(&self) -> bool {
        matches!(self.state, State::Size { line: 0, .. })
    }

    /// Whether the end of a chunked body has been told: no data follows, whatever its framing still owes.
    #[must_use]
    pub fn is_ending(&self) -> bool {
        matches!(self.state, State::SizeLf(0) | State::Trailer { .. } | State::TrailerLf { .. } | State::Done)
    }

    /// Bytes that the last chunk of data still lacks to be followed by another one: its line end.
    #[must_use]
    pub fn chunk_end_owed(&self) -> usize {
        match self.state {
            State::DataCr => 2,
            State::DataLf => 1,
            _ => 0,
        }
    }

    /// The peer closed. True if that is where the body may end.
    pub fn close(&mut self) -> bool {
        if self.state == State::UntilClose {
            self.state = State::Done;
        }
        self.finished()
    }

    /// Takes the next piece of `input`: framing bytes up to and including one run of data. Call it
    /// until everything is consumed or the body has [finished](Self::finished).
    ///
    /// # Errors
    /// [`BadMessage`] if the framing is broken; the connection cannot be used any further.
    pub fn next(&mut self, input: &[u8]) -> Result<Piece, BadMessage> {
        let mut at = 0;
        while at < input.len() {
            match self.state {
                State::Done => break,
                State::UntilClose => return Ok(Piece { consumed: input.len(), data: at..input.len() }),
                State::Length(left) => {
                    let end = at + run(left, input.len() - at);
                    let left = left - (end - at) as u64;
                    self.state = if left == 0 { State::Done } else { State::Length(left) };
                    return Ok(Piece { consumed: end, data: at..end });
                }
                State::Data(left) => {
                    let end = at + run(left, input.len() - at);
                    let left = left - (end - at) as u64;
                    self.state = if left == 0 { State::DataCr } else { State::Data(left) };
                    return Ok(Piece { consumed: end, data: at..end });
                }
                _ => {
                    self.framing_byte(input[at])?;
                    at += 1;
                }
            }
        }
        Ok(Piece { consumed: at, data: at..at })
    }

    fn framing_byte(&mut self, byte: u8) -> Result<(), BadMessage> {
        self.state = match (self.state, byte) {
            (State::Size { digits: 0, .. }, b) if !b.is_ascii_hexdigit() => {
                return Err(bad("a chunk size is missing"));
            }
            (State::Size { value, .. }, b'\r') => State::SizeLf(value),
            (State::Size { line, .. }, _) if line >= CHUNK_LINE_BYTES_MAX => {
                return Err(bad("a chunk-size line is longer than 256 bytes"));
            }
            (State::Size { value, digits, line, in_extension: true }, b) if is_text(b) => {
                State::Size { value, digits, line: line + 1, in_extension: true }
            }
            (State::Size { value, digits, line, in_extension: false }, b';') => {
                State::Size { value, digits, line: line + 1, in_extension: true }
            }
            (State::Size { value, digits, line, in_extension: false }, b) if b.is_ascii_hexdigit() => {
                if digits >= 15 {
                    return Err(bad("a chunk is too large"));
                }
                let digit = u64::from(char::from(b).to_digit(16).unwrap_or(0));
                State::Size {
                    value: value * 16 + digit,
                    digits: digits + 1,
                    line: line + 1,
                    in_extension: false,
                }
            }
            (State::Size { .. }, _) => return Err(bad("a chunk size is malformed")),
            (State::SizeLf(0), b'\n') => State::Trailer { is_empty: true, in_value: false, total: 0 },
            (State::SizeLf(size), b'\n') => State::Data(size),
            (State::DataCr, b'\r') => State::DataLf,
            (State::DataLf, b'\n') => State::Size { value: 0, digits: 0, line: 0, in_extension: false },
            (State::Trailer { is_empty, in_value, total }, b'\r') if is_empty || in_value => {
                State::TrailerLf { is_empty, total }
            }
            (State::Trailer { total, .. }, _) if total >= TRAILER_BYTES_MAX => {
                return Err(bad("the trailer is larger than 8 KiB"));
            }
            (State::Trailer { is_empty: false, in_value: false, total }, b':') => {
                State::Trailer { is_empty: false, in_value: true, total: total + 1 }
            }
            (State::Trailer { in_value, total, .. }, b)
                if if in_value { is_text(b) } else { is_token(b) } =>
            {
                State::Trailer { is_empty: false, in_value, total: total + 1 }
            }
            (State::Trailer { .. }, _) => return Err(bad("a trailer field is malformed")),
            (State::TrailerLf { is_empty: true, .. }, b'\n') => State::Done,
            (State::TrailerLf { total, .. }, b'\n') => {
                State::Trailer { is_empty: true, in_value: false, total }
            }
            _ => return Err(bad("chunked framing is broken")),
        };
        Ok(())
    }
}

fn run(left: u64, available: usize) -> usize {
    usize::try_from(left).unwrap_or(usize::MAX).min(available)
}

/// What a field's name consists of.
fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

fn is_text(byte: u8) -> bool {
    byte == b'\t' || byte >= b' ' && byte != 0x7f
}
