//! What is read of a client's request before its bytes go to an engine as they came. Pure.
//!
//! A body is passed once, from its first byte to its last: it is checked to be one JSON object, and on
//! the way the few fields that admission and placement need are picked out. No tree is built and nothing
//! is copied but short names, so a body of megabytes (a long prompt, an image in base64) costs its
//! length in a few comparisons for every eight bytes.
//!
//! What counts as JSON is the grammar of RFC 8259 with at most [`DEPTH_MAX`] levels. What is well formed
//! but means nothing to the engine (a lone surrogate, a number beyond any range) is the engine's to
//! refuse. Where a key stands twice the last one counts, as in the parsers of llama.cpp and of the
//! engines in Python, so that the model that is placed is the model that the engine reads.
//!
//! The beginning of the conversation becomes a number, [`Peek::prefix_hash`]: requests that share it
//! probably share a prefix that some engine has in its cache. It covers what comes after the system's and
//! the developer's messages, which whole fleets share, up to and including the first message of the
//! user, so that every later turn of a conversation has the number of its first; and at most
//! [`PREFIX_BYTES`] bytes. It is computed from the bytes as they were sent, escapes included.

use std::borrow::Cow;
use std::fmt;
use std::ops::Range;

/// Levels of lists and objects, the outermost included; parsers of engines end near 1,000, serde's at 128.
pub const DEPTH_MAX: u32 = 128;
/// Bytes of the conversation's beginning that make its number: some 250 tokens, more than the openings
/// that different conversations have in common.
pub const PREFIX_BYTES: usize = 1024;
/// Longest name of a model, in bytes: names are repeated in refusals and in the log.
pub const MODEL_BYTES_MAX: usize = 512;
/// Bytes kept of a user's or a session's name: it is only compared. OpenAI allows 64 characters.
pub const NAME_BYTES_MAX: usize = 256;
/// Most answers that one request may ask for.
pub const ANSWERS_MAX: u32 = 128;

/// What was read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Peek<'a> {
    /// `model`, where it is not empty.
    pub model: Option<Cow<'a, str>>,
    /// Where its value lies in the body, quotes included.
    pub model_span: Option<Range<usize>>,
    /// `stream`.
    pub stream: bool,
    /// `n`: answers wanted.
    pub n: Option<u32>,
    /// `user`, cut at [`NAME_BYTES_MAX`].
    pub user: Option<Cow<'a, str>>,
    /// `session_id`, or else `prompt_cache_key`; cut at [`NAME_BYTES_MAX`].
    pub session: Option<Cow<'a, str>>,
    /// `max_completion_tokens`, or else `max_tokens`, or else `max_output_tokens`. Negative ones, which
    /// mean no limit, are `None`.
    pub tokens_max: Option<u64>,
    /// Stands for the beginning of the conversation; `None` where there is none.
    pub prefix_hash: Option<u64>,
}

/// Why a body is no usable request. Displayed to the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PeekError {
    /// Not JSON.
    Syntax {
        /// Offset of the byte that does not fit; the length where more was expected.
        at: usize,
        /// What was expected there.
        wanted: &'static str,
    },
    /// JSON, but no object.
    NotAnObject,
    /// More than [`DEPTH_MAX`] levels.
    TooDeep,
    /// A field that is read has another type, or a value out of its range.
    Field {
        /// Its name.
        name: &'static str,
        /// What it must be.
        wanted: &'static str,
    },
}

impl fmt::Display for PeekError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PeekError::Syntax { at, wanted } => {
                write!(f, "the body is not JSON: {wanted} was expected at byte {at}")
            }
            PeekError::NotAnObject => f.write_str("the body is not a JSON object"),
            PeekError::TooDeep => write!(f, "the body is nested more than {DEPTH_MAX} levels deep"),
            PeekError::Field { name, wanted } => write!(f, "{name} must be {wanted}"),
        }
    }
}

impl std::error::Error for PeekError {}

/// Reads a body.
///
/// # Errors
/// [`PeekError`]: that it is not JSON (or too deep to tell) comes before what is wrong with JSON, and of the
/// fields that are wrong the first is named.
pub fn peek(body: &[u8]) -> Result<Peek<'_>, PeekError> {
    let mut scan = Scan { bytes: body, at: 0 };
    let (mut found, mut wrong) = (Found::default(), None);
    scan.blanks();
    if scan.next() == Some(b'{') {
        scan.object(|scan, key| match found.take(scan, &key) {
            // Its value has been passed, so that the rest can be looked at all the same.
            Err(field @ PeekError::Field { .. }) => {
                wrong.get_or_insert(field);
                Ok(())
            }
            other => other,
        })?;
    } else {
        scan.value(0)?;
        wrong = Some(PeekError::NotAnObject);
    }
    scan.blanks();
    if scan.at < body.len() {
        return Err(scan.wants("the end"));
    }
    wrong.map_or_else(|| Ok(found.into_peek()), Err)
}

/// The fields as they are come upon, before one is preferred to another.
#[derive(Default)]
struct Found<'a> {
    peek: Peek<'a>,
    session_id: Option<Cow<'a, str>>,
    prompt_cache_key: Option<Cow<'a, str>>,
    max_completion_tokens: Option<i64>,
    max_tokens: Option<i64>,
    max_output_tokens: Option<i64>,
    messages: Option<u64>,
    prompt: Option<u64>,
    input: Option<u64>,
}

impl<'a> Found<'a> {
    fn take(&mut self, scan: &mut Scan<'a>, key: &[u8]) -> Result<(), PeekError> {
        match key {
            b"model" => {
                let from = scan.at;
                let model = scan.text("model")?.filter(|model| !model.is_empty());
                if model.as_ref().is_some_and(|model| model.len() > MODEL_BYTES_MAX) {
                    return Err(PeekError::Field { name: "model", wanted: "at most 512 bytes long" });
                }
                self.peek.model_span = model.is_some().then_some(from..scan.at);
                self.peek.model = model;
            }
            b"stream" => self.peek.stream = scan.boolean("stream")?,
            b"n" => {
                const WANTED: PeekError =
                    PeekError::Field { name: "n", wanted: "a whole number from 1 to 128" };
                let n = scan.whole_number("n", "a whole number from 1 to 128")?;
                let within = |n: i64| u32::try_from(n).ok().filter(|n| (1..=ANSWERS_MAX).contains(n));
                self.peek.n = n.map(|n| within(n).ok_or(WANTED)).transpose()?;
            }
            b"user" => self.peek.user = scan.text("user")?.map(shorten),
            b"session_id" => self.session_id = scan.text("session_id")?.map(shorten),
            b"prompt_cache_key" => self.prompt_cache_key = scan.text("prompt_cache_key")?.map(shorten),
            b"max_completion_tokens" => {
                self.max_completion_tokens = scan.whole_number("max_completion_tokens", "a whole number")?;
            }
            b"max_tokens" => self.max_tokens = scan.whole_number("max_tokens", "a whole number")?,
            b"max_output_tokens" => {
                self.max_output_tokens = scan.whole_number("max_output_tokens", "a whole number")?;
            }
            b"messages" => {
                if !matches!(scan.next(), Some(b'[' | b'n')) {
                    // Broken JSON is not a list either, and says so itself.
                    scan.value(1)?;
                    return Err(PeekError::Field { name: "messages", wanted: "a list" });
                }
                self.messages = scan.conversation()?;
            }
            b"prompt" => self.prompt = scan.conversation()?,
            b"input" => self.input = scan.conversation()?,
            _ => scan.value(1)?,
        }
        Ok(())
    }

    fn into_peek(self) -> Peek<'a> {
        let named = |name: &Cow<'_, str>| !name.is_empty();
        let tokens_max = self.max_completion_tokens.or(self.max_tokens).or(self.max_output_tokens);
        Peek {
            user: self.peek.user.filter(named),
            session: self.session_id.filter(named).or(self.prompt_cache_key.filter(named)),
            tokens_max: tokens_max.and_then(|tokens| u64::try_from(tokens).ok()),
            prefix_hash: self.messages.or(self.prompt).or(self.input),
            ..self.peek
        }
    }
}

/// The beginning of a text, without a part of a character at its end.
pub(super) fn cut(text: &str, bytes_max: usize) -> &str {
    let end = (0..=text.len().min(bytes_max)).rev().find(|end| text.is_char_boundary(*end));
    &text[..end.unwrap_or(0)]
}

fn shorten(name: Cow<'_, str>) -> Cow<'_, str> {
    let end = cut(&name, NAME_BYTES_MAX).len();
    match name {
        Cow::Borrowed(name) => Cow::Borrowed(&name[..end]),
        Cow::Owned(mut name) => {
            name.truncate(end);
            Cow::Owned(name)
        }
    }
}

/// A place in the body. Every method that reads a value expects its first byte at `at`, and leaves `at`
/// behind its last.
struct Scan<'a> {
    bytes: &'a [u8],
    at: usize,
}

/// A string in the body: where its content lies, without the quotes, and whether escapes are in it.
struct Quoted {
    content: Range<usize>,
    escaped: bool,
}

impl<'a> Scan<'a> {
    fn next(&self) -> Option<u8> {
        self.bytes.get(self.at).copied()
    }

    fn wants(&self, wanted: &'static str) -> PeekError {
        PeekError::Syntax { at: self.at, wanted }
    }

    fn blanks(&mut self) {
        while matches!(self.next(), Some(b' ' | b'\n' | b'\r' | b'\t')) {
            self.at += 1;
        }
    }

    fn expect(&mut self, byte: u8, wanted: &'static str) -> Result<(), PeekError> {
        if self.next() != Some(byte) {
            return Err(self.wants(wanted));
        }
        self.at += 1;
        Ok(())
    }

    /// An object; `member` is handed each key and must read the value that follows.
    fn object(
        &mut self,
        mut member: impl FnMut(&mut Self, Cow<'a, [u8]>) -> Result<(), PeekError>,
    ) -> Result<(), PeekError> {
        self.expect(b'{', "an object")?;
        self.blanks();
        if self.next() == Some(b'}') {
            self.at += 1;
            return Ok(());
        }
        loop {
            let key = self.key()?;
            member(self, key)?;
            self.blanks();
            match self.next() {
                Some(b',') => self.at += 1,
                Some(b'}') => {
                    self.at += 1;
                    return Ok(());
                }
                _ => return Err(self.wants("a comma or the object's end")),
            }
            self.blanks();
        }
    }

    /// A key with its colon, and the blanks behind it. Of a key that is no text only its shape counts.
    fn key(&mut self) -> Result<Cow<'a, [u8]>, PeekError> {
        let quoted = self.string("a key")?;
        let key = if quoted.escaped {
            Cow::Owned(self.unescaped(&quoted).unwrap_or_default().into_owned().into_bytes())
        } else {
            Cow::Borrowed(&self.bytes[quoted.content])
        };
        self.blanks();
        self.expect(b':', "a colon")?;
        self.blanks();
        Ok(key)
    }

    /// A value of any kind below `outer` levels.
    fn value(&mut self, outer: u32) -> Result<(), PeekError> {
        // One bit a level: set where it is an object.
        let (mut depth, mut objects) = (0u32, 0u128);
        loop {
            match self.next() {
                Some(b'"') => {
                    self.string("a string")?;
                }
                Some(open @ (b'{' | b'[')) => {
                    if outer + depth >= DEPTH_MAX {
                        return Err(PeekError::TooDeep);
                    }
                    self.at += 1;
                    depth += 1;
                    objects = objects << 1 | u128::from(open == b'{');
                    self.blanks();
                    let is_empty = self.next() == Some(if open == b'{' { b'}' } else { b']' });
                    if !is_empty {
                        if open == b'{' {
                            self.skip_key()?;
                        }
                        continue;
                    }
                }
                Some(b'-' | b'0'..=b'9') => self.number()?,
                Some(b't') => self.word(b"true")?,
                Some(b'f') => self.word(b"false")?,
                Some(b'n') => self.word(b"null")?,
                _ => return Err(self.wants("a value")),
            }
            loop {
                if depth == 0 {
                    return Ok(());
                }
                self.blanks();
                let in_object = objects & 1 == 1;
                match self.next() {
                    Some(b',') => {
                        self.at += 1;
                        self.blanks();
                        if in_object {
                            self.skip_key()?;
                        }
                        break;
                    }
                    Some(b'}') if in_object => {}
                    Some(b']') if !in_object => {}
                    _ => return Err(self.wants("a comma, or the end of a list or an object")),
                }
                self.at += 1;
                depth -= 1;
                objects >>= 1;
            }
        }
    }

    fn skip_key(&mut self) -> Result<(), PeekError> {
        self.string("a key")?;
        self.blanks();
        self.expect(b':', "a colon")?;
        self.blanks();
        Ok(())
    }

    fn word(&mut self, word: &'static [u8]) -> Result<(), PeekError> {
        if !self.bytes[self.at..].starts_with(word) {
            return Err(self.wants("a value"));
        }
        self.at += word.len();
        Ok(())
    }

    fn digits(&mut self) -> Result<(), PeekError> {
        let from = self.at;
        while matches!(self.next(), Some(b'0'..=b'9')) {
            self.at += 1;
        }
        if self.at == from { Err(self.wants("a digit")) } else { Ok(()) }
    }

    fn number(&mut self) -> Result<(), PeekError> {
        if self.next() == Some(b'-') {
            self.at += 1;
        }
        match self.next() {
            Some(b'0') => self.at += 1,
            _ => self.digits()?,
        }
        if self.next() == Some(b'.') {
            self.at += 1;
            self.digits()?;
        }
        if matches!(self.next(), Some(b'e' | b'E')) {
            self.at += 1;
            if matches!(self.next(), Some(b'+' | b'-')) {
                self.at += 1;
            }
            self.digits()?;
        }
        Ok(())
    }

    fn string(&mut self, wanted: &'static str) -> Result<Quoted, PeekError> {
        self.expect(b'"', wanted)?;
        let from = self.at;
        let (mut escaped, mut beyond_ascii) = (false, false);
        loop {
            beyond_ascii |= self.plain();
            match self.next() {
                Some(b'"') => break,
                Some(b'\\') => {
                    escaped = true;
                    self.escape()?;
                }
                Some(_) => return Err(self.wants("an escape in place of a control character")),
                None => return Err(self.wants("the end of a string")),
            }
        }
        let content = from..self.at;
        if beyond_ascii && let Err(error) = std::str::from_utf8(&self.bytes[content.clone()]) {
            return Err(PeekError::Syntax { at: from + error.valid_up_to(), wanted: "UTF-8" });
        }
        self.at += 1;
        Ok(Quoted { content, escaped })
    }

    /// Passes what needs no further look: all but quotes, backslashes and control characters. Says whether
    /// bytes beyond ASCII were among it.
    fn plain(&mut self) -> bool {
        const EACH: u64 = 0x0101_0101_0101_0101;
        const HIGH: u64 = 0x8080_8080_8080_8080;
        let mut beyond = 0;
        while let Some(chunk) = self.bytes[self.at..].first_chunk::<8>() {
            let word = u64::from_le_bytes(*chunk);
            // A byte's high bit is set where it is zero; above the first such byte the bits may lie.
            let zero_in = |word: u64| word.wrapping_sub(EACH) & !word & HIGH;
            let control = word.wrapping_sub(EACH * 0x20) & !word & HIGH;
            let is = |byte: u8| zero_in(word ^ (EACH * u64::from(byte)));
            let special = control | is(b'"') | is(b'\\');
            if special != 0 {
                let plain = special.trailing_zeros() / 8;
                self.at += plain as usize;
                return (beyond | word & HIGH & !(u64::MAX << (8 * plain))) != 0;
            }
            beyond |= word & HIGH;
            self.at += 8;
        }
        while let Some(byte) = self.next().filter(|byte| *byte >= 0x20 && !matches!(byte, b'"' | b'\\')) {
            beyond |= u64::from(byte & 0x80);
            self.at += 1;
        }
        beyond != 0
    }

    fn escape(&mut self) -> Result<(), PeekError> {
        self.at += 1;
        match self.next() {
            Some(b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't') => self.at += 1,
            Some(b'u') => {
                self.at += 1;
                for _ in 0..4 {
                    if !self.next().is_some_and(|byte| byte.is_ascii_hexdigit()) {
                        return Err(self.wants("a hexadecimal digit"));
                    }
                    self.at += 1;
                }
            }
            _ => return Err(self.wants("an escape")),
        }
        Ok(())
    }

    /// The text that a string stands for; `None` where its escapes make no text.
    fn unescaped(&self, quoted: &Quoted) -> Option<Cow<'a, str>> {
        let bytes = self.bytes;
        if quoted.escaped {
            let whole = &bytes[quoted.content.start - 1..=quoted.content.end];
            serde_json::from_slice::<String>(whole).ok().map(Cow::Owned)
        } else {
            std::str::from_utf8(&bytes[quoted.content.clone()]).ok().map(Cow::Borrowed)
        }
    }

    /// A string or null. A value of another kind is passed first: that it is broken comes before that it
    /// is of the wrong kind.
    fn text(&mut self, name: &'static str) -> Result<Option<Cow<'a, str>>, PeekError> {
        let wrong = PeekError::Field { name, wanted: "a string" };
        match self.next() {
            Some(b'"') => {
                let quoted = self.string("a string")?;
                self.unescaped(&quoted).map(Some).ok_or(wrong)
            }
            Some(b'n') => self.word(b"null").map(|()| None),
            _ => self.value(1).and(Err(wrong)),
        }
    }

    fn boolean(&mut self, name: &'static str) -> Result<bool, PeekError> {
        match self.next() {
            Some(b't') => self.word(b"true").map(|()| true),
            Some(b'f') => self.word(b"false").map(|()| false),
            Some(b'n') => self.word(b"null").map(|()| false),
            _ => self.value(1).and(Err(PeekError::Field { name, wanted: "true or false" })),
        }
    }

    /// A whole number within 64 bits, or null.
    fn whole_number(&mut self, name: &'static str, wanted: &'static str) -> Result<Option<i64>, PeekError> {
        if self.next() == Some(b'n') {
            return self.word(b"null").map(|()| None);
        }
        let from = self.at;
        self.value(1)?;
        let text = std::str::from_utf8(&self.bytes[from..self.at]).unwrap_or_default();
        text.parse().map(Some).map_err(|_| PeekError::Field { name, wanted })
    }

    /// What a conversation, a prompt or an input begins with.
    fn conversation(&mut self) -> Result<Option<u64>, PeekError> {
        let from = self.at;
        if self.next() != Some(b'[') {
            let is_text = self.next() == Some(b'"');
            self.value(1)?;
            let text = &self.bytes[from + usize::from(is_text)..self.at - usize::from(is_text)];
            return Ok((is_text && !text.is_empty()).then(|| {
                let mut prefix = Prefix::default();
                prefix.add(text);
                prefix.finish()
            }));
        }
        self.at += 1;
        self.blanks();
        if self.next() == Some(b']') {
            self.at += 1;
            return Ok(None);
        }
        if self.next() != Some(b'{') {
            // Tokens, or texts: a list without roles begins with its first bytes.
            self.at = from;
            self.value(1)?;
            let mut prefix = Prefix::default();
            prefix.add(&self.bytes[from..self.at]);
            return Ok(Some(prefix.finish()));
        }
        let (mut prefix, mut over) = (Prefix::default(), false);
        loop {
            if over || self.next() != Some(b'{') {
                self.value(2)?;
            } else {
                over = self.message(&mut prefix)? || prefix.is_full();
            }
            self.blanks();
            match self.next() {
                Some(b',') => self.at += 1,
                Some(b']') => {
                    self.at += 1;
                    return Ok((!prefix.is_empty()).then(|| prefix.finish()));
                }
                _ => return Err(self.wants("a comma or the list's end")),
            }
            self.blanks();
        }
    }

    /// A message. True if it is the user's.
    fn message(&mut self, prefix: &mut Prefix) -> Result<bool, PeekError> {
        let (mut role, mut content) = (0..0, 0..0);
        self.object(|scan, key| {
            let from = scan.at;
            scan.value(3)?;
            match &*key {
                b"role" => role = from..scan.at,
                b"content" => content = from..scan.at,
                _ => {}
            }
            Ok(())
        })?;
        let (role, content) = (&self.bytes[role], &self.bytes[content]);
        if matches!(role, b"\"system\"" | b"\"developer\"") {
            return Ok(false);
        }
        prefix.add(role);
        prefix.add(content);
        Ok(role == b"\"user\"")
    }
}

/// Makes a number of at most [`PREFIX_BYTES`] bytes, eight at a time. The same bytes give the same number
/// in every process; where pieces end counts.
struct Prefix {
    state: u64,
    room: usize,
}

impl Default for Prefix {
    fn default() -> Prefix {
        Prefix { state: 0x9e37_79b9_7f4a_7c15, room: PREFIX_BYTES }
    }
}

impl Prefix {
    fn add(&mut self, bytes: &[u8]) {
        let bytes = &bytes[..bytes.len().min(self.room)];
        self.room -= bytes.len();
        let mut chunks = bytes.chunks_exact(8);
        for chunk in &mut chunks {
            let mut word = [0; 8];
            word.copy_from_slice(chunk);
            self.mix(u64::from_le_bytes(word));
        }
        let mut last = [0; 8];
        let rest = chunks.remainder();
        last[..rest.len()].copy_from_slice(rest);
        last[7] = rest.len() as u8 | 0x80;
        self.mix(u64::from_le_bytes(last));
    }

    fn mix(&mut self, word: u64) {
        let product = u128::from(self.state ^ word) * 0xa076_1d64_78bd_642f;
        self.state = (product as u64 ^ (product >> 64) as u64).wrapping_add(0x9e37_79b9_7f4a_7c15);
    }

    fn is_full(&self) -> bool {
        self.room == 0
    }

    fn is_empty(&self) -> bool {
        self.room == PREFIX_BYTES
    }

    fn finish(self) -> u64 {
        let mut x = self.state;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }
}

#[cfg(test)]
mod tests;
