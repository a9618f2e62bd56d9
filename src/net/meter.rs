//! How many tokens an answer took, and whether it is complete, as its engine told: from the end of the
//! answer, pure.
//!
//! Engines of OpenAI's dialect put `usage` into the last event of a stream, or to the end of a JSON body;
//! llama.cpp adds `timings` also where nobody asked for usage. Only the last [`TAIL_BYTES`] are kept, and
//! nothing is parsed until the answer is over.

use memchr::{memchr_iter, memchr2_iter, memrchr_iter};

use crate::http::sse::holds_finish;

/// What is kept of an answer's end, in bytes: the last event with its `usage` and `timings`, and `[DONE]`.
pub const TAIL_BYTES: usize = 2048;

/// Tokens of an exchange, where told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tokens {
    /// Of the prompt.
    pub prompt: Option<u64>,
    /// Of the answer.
    pub completion: Option<u64>,
}

/// The end of one answer.
#[derive(Debug, Default)]
pub struct Meter {
    /// Up to twice [`TAIL_BYTES`], so that most pieces are appended and nothing is moved.
    tail: Vec<u8>,
    /// What an answer told that passed as a whole.
    told: Option<Tokens>,
}

impl Meter {
    /// The last of the answer's data passed. Mostly that is all of it, and nothing needs to be kept.
    pub fn ended(&mut self, data: &[u8]) {
        if self.tail.is_empty() {
            self.told = Some(told(&data[data.len().saturating_sub(TAIL_BYTES)..]));
        } else {
            self.passed(data);
        }
    }

    /// More of the answer's data passed.
    pub fn passed(&mut self, data: &[u8]) {
        let data = &data[data.len().saturating_sub(TAIL_BYTES)..];
        if self.tail.len() + data.len() > 2 * TAIL_BYTES {
            let surplus = (self.tail.len() + data.len()).saturating_sub(TAIL_BYTES);
            self.tail.drain(..surplus.min(self.tail.len()));
        }
        self.tail.extend_from_slice(data);
    }

    /// Whether the end of the answer holds a reason to finish, or an error in the place of an event.
    #[must_use]
    pub fn told_finish(&self) -> bool {
        // Text that was generated cannot hold this either.
        holds_finish(&self.tail) || memchr::memmem::find(&self.tail, b"data: {\"error\"").is_some()
    }

    /// What the engine told.
    #[must_use]
    pub fn tokens(&self) -> Tokens {
        self.told.unwrap_or_else(|| told(&self.tail))
    }
}

fn told(tail: &[u8]) -> Tokens {
    let usage = object(tail, b"\"usage\"").map(|usage| {
        counts(usage, &[b"prompt_tokens", b"input_tokens"], &[b"completion_tokens", b"output_tokens"])
    });
    let told = usage.unwrap_or_default();
    if told.prompt.is_some() && told.completion.is_some() {
        return told;
    }
    let timings = object(tail, b"\"timings\"");
    let timed = timings.map(|timings| counts(timings, &[b"prompt_n"], &[b"predicted_n"])).unwrap_or_default();
    Tokens { prompt: told.prompt.or(timed.prompt), completion: told.completion.or(timed.completion) }
}

/// What follows the last `key`, quotes included, whose value is an object.
fn object<'a>(tail: &'a [u8], key: &[u8]) -> Option<&'a [u8]> {
    // A letter of both keys that is in no other name near the end of an answer, where they mostly stand.
    let offset = key.iter().position(|byte| *byte == b'g')?;
    let value = memrchr_iter(b'g', tail).find_map(|at| {
        let start = at.checked_sub(offset)?;
        let value = after_colon(tail[start..].strip_prefix(key)?)?;
        value.starts_with(b"{").then_some(value)
    })?;
    Some(&value[..end_of_object(value)?])
}

/// The length of the object with which `text` begins. No string in it holds a brace: they are counts.
fn end_of_object(text: &[u8]) -> Option<usize> {
    let mut depth = 0usize;
    for at in memchr2_iter(b'{', b'}', text) {
        match text[at] {
            b'{' => depth += 1,
            _ if depth <= 1 => return Some(at + 1),
            _ => depth -= 1,
        }
    }
    None
}

/// The numbers of an object that stand behind the first of these names for the prompt's and the answer's tokens.
fn counts(object: &[u8], prompt: &[&[u8]], completion: &[&[u8]]) -> Tokens {
    let mut tokens = Tokens::default();
    let mut quotes = memchr_iter(b'"', object);
    while let (Some(open), Some(close)) = (quotes.next(), quotes.next()) {
        let name = &object[open + 1..close];
        let place = if prompt.contains(&name) {
            &mut tokens.prompt
        } else if completion.contains(&name) {
            &mut tokens.completion
        } else {
            continue;
        };
        if place.is_none() {
            *place = after_colon(&object[close + 1..]).and_then(number);
        }
    }
    tokens
}

/// The number with which `text` begins.
fn number(text: &[u8]) -> Option<u64> {
    let digits = text.iter().take_while(|byte| byte.is_ascii_digit());
    let add = |sum: u64, digit: &u8| sum.checked_mul(10)?.checked_add(u64::from(digit - b'0'));
    text.first().filter(|first| first.is_ascii_digit())?;
    digits.copied().try_fold(0, |sum, digit| add(sum, &digit))
}

fn after_colon(text: &[u8]) -> Option<&[u8]> {
    Some(text.trim_ascii_start().strip_prefix(b":")?.trim_ascii_start())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(pieces: &[&[u8]]) -> (Option<u64>, Option<u64>) {
        let (mut meter, mut ended) = (Meter::default(), Meter::default());
        pieces.iter().for_each(|piece| meter.passed(piece));
        let (last, others) = pieces.split_last().expect("a piece");
        others.iter().for_each(|piece| ended.passed(piece));
        ended.ended(last);
        assert_eq!(meter.tokens(), ended.tokens());
        (meter.tokens().prompt, meter.tokens().completion)
    }

    #[test]
    fn tokens_are_read_as_engines_tell_them() {
        let openai = br#"{"choices":[{"text":"\"usage\":{\"prompt_tokens\":9}"}],"usage": {"prompt_tokens":12,"prompt_tokens_details":{"cached_tokens":3},"completion_tokens" : 7,"total_tokens":19}}"#;
        assert_eq!(tokens(&[openai]), (Some(12), Some(7)));
        let stream = b"data: {\"usage\":null}\n\ndata: {\"choices\":[],\"usage\":{\"completion_tokens\":5,\"prompt_tokens\":6},\"timings\":{\"prompt_n\":1}}\n\ndata: [DONE]\n\n";
        assert_eq!(tokens(&[stream]), (Some(6), Some(5)));
        let llama = br#"data: {"choices":[{"finish_reason":"stop"}],"usage":null,"timings":{"prompt_n":4,"prompt_ms":8.5,"predicted_n":16}}"#;
        assert_eq!(tokens(&[llama]), (Some(4), Some(16)));
        let messages = br#"data: {"type":"message_delta","usage":{"input_tokens":3,"output_tokens":2}}"#;
        assert_eq!(tokens(&[messages]), (Some(3), Some(2)));
        let embeddings = br#""usage":{"prompt_tokens":8,"total_tokens":8}}"#;
        assert_eq!(tokens(&[embeddings]), (Some(8), None));
        for none in
            [&b""[..], b"data: hello", b"\"usage\":", b"\"usage\":{\"prompt_tokens\":1", b"\"usage\":7}"]
        {
            assert_eq!(tokens(&[none]), (None, None), "{none:?}");
        }
    }

    #[test]
    fn the_end_is_kept_however_the_bytes_were_cut() {
        let mut answer = b"data: x\n\n".repeat(1000);
        answer.extend_from_slice(br#"data: {"usage":{"prompt_tokens":1,"completion_tokens":2}}"#);
        for size in [1, 7, 100, TAIL_BYTES - 1, TAIL_BYTES, TAIL_BYTES + 1, 2 * TAIL_BYTES, answer.len()] {
            let mut meter = Meter::default();
            for piece in answer.chunks(size) {
                meter.passed(piece);
                assert!(meter.tail.len() <= 2 * TAIL_BYTES);
            }
            assert_eq!((meter.tokens().prompt, meter.tokens().completion), (Some(1), Some(2)), "{size}");
        }
    }
}
