//! An engine's answer, whichever dialect it is in, read as it comes: text, then how it ended. Pure.
//!
//! The first byte that is not white space says which form it has: a `{` begins one JSON document, all
//! else is a stream of events. Within events these dialects are told apart by their fields:
//!
//! - OpenAI completions (`choices[].text`) and chat (`choices[].delta`), ended by `[DONE]`;
//! - llama-server's own `/completion` (`content`, ended by `"stop": true`);
//! - named events: `token` (`t`), `end` (`tokens_out`) and `error`.
//!
//! Only the first choice counts: a task has one answer. An answer that stops without having said that it
//! is complete is broken, however cleanly its connection was closed: a process that ends, ends its
//! connections cleanly too.

use serde_json::Value;

use crate::http::sse::{self, Event};

/// Largest answer that comes as one JSON document, in bytes: the longest one that a task may ask for is
/// far below it.
const DOCUMENT_BYTES_MAX: usize = 4 * 1024 * 1024;
/// What is kept of an answer that is an error, in bytes.
const ERROR_BYTES_MAX: usize = 4 * 1024;
/// What of it is shown, in characters.
const ERROR_CHARS_MAX: usize = 500;

/// Why there is no (whole) answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// What clients act on.
    pub code: &'static str,
    /// For people.
    pub message: String,
    /// Whether the same request may succeed later.
    pub retriable: bool,
}

impl Failure {
    fn new(code: &'static str, message: impl Into<String>, retriable: bool) -> Failure {
        Failure { code, message: message.into(), retriable }
    }

    /// The engine stopped in the middle of its answer.
    #[must_use]
    pub fn reset(message: impl Into<String>) -> Failure {
        Failure::new("WORKER_RESET", message, true)
    }

    /// What the engine or the way to it did must not happen.
    #[must_use]
    pub fn internal(message: impl Into<String>) -> Failure {
        Failure::new("INTERNAL", message, true)
    }
}

/// What the engine counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Generated tokens.
    pub tokens_out: Option<u64>,
    /// Tokens of the prompt.
    pub tokens_in: Option<u64>,
    /// Of these, taken from its cache.
    pub cached_tokens: Option<u64>,
}

/// An answer that comes.
#[derive(Debug)]
pub struct Answer {
    form: Form,
    status: u16,
    totals: Totals,
    finish_reason: Option<String>,
    /// It said that nothing follows.
    is_done: bool,
    failure: Option<Failure>,
}

#[derive(Debug)]
enum Form {
    /// Nothing has come.
    Unknown,
    Events(sse::Events),
    Document(Vec<u8>),
    /// Of a status that is not 200.
    Error(Vec<u8>),
}

impl Default for Answer {
    fn default() -> Self {
        Answer {
            form: Form::Unknown,
            status: 200,
            totals: Totals::default(),
            finish_reason: None,
            is_done: false,
            failure: None,
        }
    }
}

impl Answer {
    /// The head came.
    pub fn head(&mut self, status: u16) {
        self.status = status;
        if !(200..300).contains(&status) {
            self.form = Form::Error(Vec::new());
        }
    }

    /// Bytes came; hands every piece of text to `each`. After a failure, or once the answer is done,
    /// nothing is read any more.
    pub fn feed(&mut self, bytes: &[u8], each: &mut dyn FnMut(&str)) {
        let bytes = match &self.form {
            // A byte order mark counts as white space too.
            Form::Unknown => {
                let is_blank = |b: &u8| b.is_ascii_whitespace() || matches!(b, 0xef | 0xbb | 0xbf);
                let Some(begin) = bytes.iter().position(|b| !is_blank(b)) else { return };
                self.form = match bytes[begin] {
                    b'{' => Form::Document(Vec::new()),
                    _ => Form::Events(sse::Events::default()),
                };
                &bytes[begin..]
            }
            _ => bytes,
        };
        match &mut self.form {
            Form::Unknown => {}
            Form::Error(kept) => {
                let room = ERROR_BYTES_MAX.saturating_sub(kept.len());
                kept.extend_from_slice(&bytes[..bytes.len().min(room)]);
            }
            Form::Document(kept) if kept.len() + bytes.len() > DOCUMENT_BYTES_MAX => {
                let message = format!("the engine's answer is larger than {DOCUMENT_BYTES_MAX} bytes");
                self.fail(Failure::internal(message));
            }
            Form::Document(kept) => kept.extend_from_slice(bytes),
            Form::Events(events) => {
                let mut events = std::mem::take(events);
                let fed = events.feed(bytes, |event| self.event(&event, each));
                self.form = Form::Events(events);
                if fed.is_err() {
                    let limit = sse::EVENT_BYTES_MAX;
                    self.fail(Failure::internal(format!("the engine sent an event above {limit} bytes")));
                }
            }
        }
    }

    /// Bytes that are kept until the answer, or its next event, is complete.
    #[must_use]
    pub fn kept_bytes(&self) -> usize {
        match &self.form {
            Form::Unknown => 0,
            Form::Document(kept) | Form::Error(kept) => kept.capacity(),
            Form::Events(events) => events.kept_bytes(),
        }
    }

    /// The connection said that this was all.
    ///
    /// # Errors
    /// What is wrong with the answer.
    pub fn conclude(&mut self, each: &mut dyn FnMut(&str)) -> Result<Totals, Failure> {
        match std::mem::replace(&mut self.form, Form::Unknown) {
            Form::Error(body) => {
                let failure = refused(self.status, &body);
                self.fail(failure);
            }
            Form::Document(document) if self.failure.is_none() => match read(&document) {
                Some(value) => {
                    self.object(&value, each);
                    self.is_done = true;
                }
                None => self.fail(Failure::reset("the engine ended in the middle of its answer")),
            },
            Form::Events(mut events) => {
                let was_failed = self.failure.is_some();
                // The last event may lack its empty line.
                let _ = events.feed(b"\n\n", |event| self.event(&event, each));
                if !was_failed && self.failure.as_ref().is_some_and(|failure| failure.message == NO_JSON) {
                    self.failure = Some(Failure::reset("the engine ended in the middle of an event"));
                }
            }
            Form::Document(_) | Form::Unknown => {}
        }
        if !self.is_complete() {
            self.fail(Failure::reset("the engine ended its answer without saying that it is complete"));
        }
        match self.failure.clone() {
            Some(failure) => Err(failure),
            None => Ok(self.totals),
        }
    }

    /// Whether the answer has said that its text is complete; totals may follow.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.failure.is_none() && (self.is_done || self.finish_reason.is_some())
    }

    /// Whether nothing can follow any more.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.is_done && self.failure.is_none()
    }

    /// What is wrong with it.
    #[must_use]
    pub fn failure(&self) -> Option<&Failure> {
        self.failure.as_ref()
    }

    /// What the engine has counted so far.
    #[must_use]
    pub fn totals(&self) -> Totals {
        self.totals
    }

    /// Why the engine stopped: `stop`, `length` or a word of its own.
    #[must_use]
    pub fn finish_reason(&self) -> Option<&str> {
        self.finish_reason.as_deref()
    }

    /// What breaks behind a complete answer breaks nothing.
    fn fail(&mut self, failure: Failure) {
        if !self.is_complete() {
            self.failure.get_or_insert(failure);
        }
    }

    fn event(&mut self, event: &Event, each: &mut dyn FnMut(&str)) {
        if self.is_done || self.failure.is_some() {
            return;
        }
        if event.data.trim_ascii() == b"[DONE]" {
            self.is_done = true;
            return;
        }
        let value = read(&event.data);
        if event.name == b"error" {
            let text = String::from_utf8_lossy(&event.data);
            return self.fail(reported(value.as_ref().unwrap_or(&Value::Null), &text));
        }
        match value {
            Some(value) => match event.name.as_slice() {
                b"token" => say(value.get("t"), each),
                b"end" => {
                    self.totals.tokens_out = number(value.get("tokens_out")).or(self.totals.tokens_out);
                    self.is_done = true;
                }
                b"started" | b"metrics" => {}
                _ => self.object(&value, each),
            },
            None => self.fail(Failure::internal(NO_JSON)),
        }
    }

    /// A chunk of a stream, or a whole answer.
    fn object(&mut self, value: &Value, each: &mut dyn FnMut(&str)) {
        if let Some(error) = value.get("error").filter(|error| !error.is_null()) {
            return self.fail(reported(error, "the engine reported an error"));
        }
        self.count(value);
        let Some(choices) = value.get("choices").and_then(Value::as_array) else {
            say(value.get("content"), each);
            if value.get("stop") == Some(&Value::Bool(true)) {
                self.finish_reason = Some(words(value.get("stop_type")).unwrap_or("stop").to_string());
                self.is_done = true;
            }
            return;
        };
        let is_first = |choice: &&Value| number(choice.get("index")).unwrap_or(0) == 0;
        for choice in choices.iter().filter(is_first) {
            let part = choice.get("delta").or_else(|| choice.get("message"));
            say(choice.get("text").or_else(|| part?.get("content")), each);
            if let Some(reason) = words(choice.get("finish_reason")) {
                self.finish_reason = Some(reason.to_string());
            }
        }
    }

    fn count(&mut self, value: &Value) {
        let of = |object: &str, field: &str| number(value.get(object)?.get(field));
        let totals = &mut self.totals;
        let own = |field: &str| number(value.get(field));
        let out = of("usage", "completion_tokens").or_else(|| own("tokens_predicted"));
        totals.tokens_out = out.or_else(|| of("timings", "predicted_n")).or(totals.tokens_out);
        let tokens_in = of("usage", "prompt_tokens").or_else(|| own("tokens_evaluated"));
        totals.tokens_in = tokens_in.or(totals.tokens_in);
        let details = value.get("usage").and_then(|usage| usage.get("prompt_tokens_details"));
        let cached = details.and_then(|details| number(details.get("cached_tokens")));
        totals.cached_tokens = cached.or_else(|| of("timings", "cache_n")).or(totals.cached_tokens);
    }
}

const NO_JSON: &str = "the engine sent an event that is no JSON object";

/// JSON of an engine, broken characters replaced.
fn read(bytes: &[u8]) -> Option<Value> {
    serde_json::from_str::<Value>(&String::from_utf8_lossy(bytes)).ok().filter(Value::is_object)
}

fn number(value: Option<&Value>) -> Option<u64> {
    value?.as_u64()
}

fn words(value: Option<&Value>) -> Option<&str> {
    value?.as_str().filter(|text| !text.is_empty())
}

fn say(text: Option<&Value>, each: &mut dyn FnMut(&str)) {
    if let Some(text) = words(text) {
        each(text);
    }
}

/// An error that came within an answer.
fn reported(error: &Value, otherwise: &str) -> Failure {
    let error = error.get("error").filter(|inner| inner.is_object()).unwrap_or(error);
    let message = words(error.get("message")).or_else(|| words(Some(error))).unwrap_or(otherwise);
    let message: String = message.chars().take(ERROR_CHARS_MAX).collect();
    let kind = words(error.get("type")).unwrap_or_default();
    let is_clients = matches!(number(error.get("code")), Some(400 | 413 | 422))
        || matches!(kind, "invalid_request_error" | "exceed_context_size_error" | "validation");
    if is_clients { Failure::new("INVALID_PARAMS", message, false) } else { Failure::internal(message) }
}

/// An answer with a status that is not success.
fn refused(status: u16, body: &[u8]) -> Failure {
    let told = read(body).map(|value| match value.get("error") {
        Some(error) => reported(error, "").message,
        None => words(value.get("message")).unwrap_or_default().to_string(),
    });
    let told = told
        .filter(|told| !told.is_empty())
        .unwrap_or_else(|| String::from_utf8_lossy(body).chars().take(ERROR_CHARS_MAX).collect::<String>());
    let message = format!("the engine answered {status}: {told}");
    match status {
        400 | 413 | 422 => Failure::new("INVALID_PARAMS", message, false),
        429 => Failure::new("REPLICA_EXHAUSTED", message, true),
        408 | 504 => Failure::new("DECODE_TIMEOUT", message, true),
        // Its key, its paths: nothing that the client could change or that passes by itself.
        status if status < 500 => Failure::new("INTERNAL", message, false),
        _ => Failure::internal(message),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The text in its pieces, and how it ended.
    fn all(status: u16, pieces: &[&[u8]]) -> (Vec<String>, Result<Totals, Failure>) {
        let (mut answer, mut said) = (Answer::default(), Vec::new());
        answer.head(status);
        let mut each = |text: &str| said.push(text.to_string());
        for piece in pieces {
            answer.feed(piece, &mut each);
        }
        let result = answer.conclude(&mut each);
        (said, result)
    }

    fn whole(text: &str) -> (Vec<String>, Result<Totals, Failure>) {
        all(200, &[text.as_bytes()])
    }

    fn totals(tokens_out: Option<u64>) -> Totals {
        Totals { tokens_out, ..Totals::default() }
    }

    #[test]
    fn every_dialect_is_read() {
        let usage = r#"data: {"choices":[],"usage":{"completion_tokens":9,"prompt_tokens":4,"prompt_tokens_details":{"cached_tokens":3}}}"#;
        let counted = Totals { tokens_out: Some(9), tokens_in: Some(4), cached_tokens: Some(3) };
        let cases = [
            // Completions, without and with usage.
            (r#"data: {"choices":[{"text":"a"}]}|data: {"choices":[{"text":"b","finish_reason":"stop"}]}|data: [DONE]"#.to_string(), totals(None)),
            (format!(r#"data: {{"choices":[{{"text":"a"}}]}}|data: {{"choices":[{{"text":"b","finish_reason":"length"}}]}}|{usage}|data: [DONE]"#), counted),
            // Chat; the last event lacks its empty line, and the stream `[DONE]`.
            (r#"data: {"choices":[{"delta":{"role":"assistant","content":null}}]}|data: {"choices":[{"delta":{"content":"a"}}]}|: comment|data:{"choices":[{"delta":{"content":"b"}}]}|data: {"choices":[{"delta":{},"finish_reason":"stop"}]}"#.to_string(), totals(None)),
            // A second choice is not part of the answer.
            (r#"data: {"choices":[{"index":0,"text":"a"},{"index":1,"text":"x"}]}|data: {"choices":[{"index":1,"text":"y","finish_reason":"stop"}]}|data: {"choices":[{"index":0,"text":"b","finish_reason":"stop"}]}"#.to_string(), totals(None)),
            // llama-server's own.
            (r#"data: {"content":"a","stop":false}|data: {"content":"b","stop":false}|data: {"content":"","stop":true,"tokens_predicted":2,"tokens_evaluated":5,"timings":{"cache_n":1}}"#.to_string(), Totals { tokens_out: Some(2), tokens_in: Some(5), cached_tokens: Some(1) }),
            // Named events.
            ("event: started\ndata: {\"queue_position\":0}|event: token\ndata: {\"t\":\"a\",\"i\":0}|event: metrics\ndata: {}|event: token\ndata: {\"t\":\"b\",\"i\":1}|event: end\ndata: {\"tokens_out\":2}".to_string(), totals(Some(2))),
        ];
        for (stream, expected) in cases {
            for line in ["\n", "\r\n", "\r"] {
                let stream = stream.replace('\n', line).replace('|', &line.repeat(2)) + line;
                assert_eq!(whole(&stream), (vec!["a".into(), "b".into()], Ok(expected)), "{stream}");
            }
        }
        for document in [
            r#" {"choices":[{"text":"ab","finish_reason":null}],"usage":{"completion_tokens":7}}"#,
            "\u{feff}{\"choices\":[{\"message\":{\"content\":\"ab\"}}],\"usage\":{\"completion_tokens\":7}}",
            r#"{"content":"ab","stop":true,"tokens_predicted":7}"#,
        ] {
            assert_eq!(whole(document), (vec!["ab".into()], Ok(totals(Some(7)))), "{document}");
        }
    }

    #[test]
    fn what_breaks_off_is_no_answer() {
        let token = r#"data: {"choices":[{"text":"a"}]}"#;
        for broken in [
            String::new(),
            ": waiting\n\n".into(),
            format!("{token}\n\n"),
            format!("{token}\n\ndata: {{\"choices\":[{{\"te"),
            r#"{"choices":[{"text":"a"#.into(),
            r#"data: {"content":"a","stop":false}"#.into(),
        ] {
            let failure = whole(&broken).1.expect_err(&broken);
            assert_eq!((failure.code, failure.retriable), ("WORKER_RESET", true), "{broken}");
        }
    }

    #[test]
    fn errors_are_told_with_the_code_that_fits() {
        let said = r#"data: {"choices":[{"text":"a"}]}"#;
        let late = r#"data: {"choices":[{"text":"late","finish_reason":"stop"}]}"#;
        for (stream, code, message) in [
            (
                format!(
                    "{said}\n\ndata: {{\"error\":{{\"message\":\"out of memory\",\"code\":500}}}}\n\n{late}\n\n"
                ),
                "INTERNAL",
                "out of memory",
            ),
            (
                format!("{said}\n\nerror: {{\"code\":500,\"message\":\"out of memory\"}}\n\n{late}\n\n"),
                "INTERNAL",
                "out of memory",
            ),
            (
                format!("{said}\n\nevent: error\ndata: out of memory\n\n{late}\n\n"),
                "INTERNAL",
                "out of memory",
            ),
            (format!("{said}\n\ndata: {{\"error\":\"out of memory\"}}\n\n"), "INTERNAL", "out of memory"),
            (
                format!(
                    "{said}\n\ndata: {{\"error\":{{\"message\":\"too long\",\"type\":\"exceed_context_size_error\"}}}}\n\n"
                ),
                "INVALID_PARAMS",
                "too long",
            ),
            (format!("{said}\n\ndata: 7\n\n{late}\n\n"), "INTERNAL", NO_JSON),
            (
                format!("{said}\n\ndata: {}", "x".repeat(sse::EVENT_BYTES_MAX)),
                "INTERNAL",
                "above 1048576 bytes",
            ),
        ] {
            let (text, result) = whole(&stream);
            let failure = result.expect_err(code);
            assert_eq!((text, failure.code), (vec!["a".to_string()], code));
            assert!(failure.message.contains(message), "{}", failure.message);
        }
        for (status, code, retriable) in [
            (400, "INVALID_PARAMS", false),
            (401, "INTERNAL", false),
            (429, "REPLICA_EXHAUSTED", true),
            (500, "INTERNAL", true),
            (504, "DECODE_TIMEOUT", true),
        ] {
            let failure = all(status, &[br#"{"error":{"message":"no"}}"#]).1.expect_err(code);
            assert_eq!((failure.code, failure.retriable), (code, retriable));
            assert_eq!(failure.message, format!("the engine answered {status}: no"));
        }
        let endless = vec![b'x'; 10 * ERROR_BYTES_MAX];
        assert!(all(500, &[&endless]).1.expect_err("an error").message.len() < 2 * ERROR_CHARS_MAX);
    }

    #[test]
    fn nothing_is_read_behind_the_end() {
        let (text, result) = whole(
            "data: {\"content\":\"a\",\"stop\":true}\n\ndata: {\"content\":\"b\"}\n\ndata: {\"error\":\"no\"}\n\n",
        );
        assert_eq!((text, result.is_ok()), (vec!["a".to_string()], true));
    }

    #[test]
    fn broken_characters_are_replaced_and_whole_ones_survive_any_cut() {
        let stream = "data: {\"content\":\"\u{1f600}é\",\"stop\":true}\n\n".as_bytes();
        for cut in 0..stream.len() {
            let (text, _) = all(200, &[&stream[..cut], &stream[cut..]]);
            assert_eq!(text, ["\u{1f600}é"], "cut at {cut}");
        }
        let (text, result) = all(200, &[b"data: {\"content\":\"a\xff\",\"stop\":true}\n\n"]);
        assert_eq!((text, result.is_ok()), (vec!["a\u{fffd}".to_string()], true));
    }

    /// Bytes as an engine might send them: parts of real answers, and anything.
    pub(in super::super) fn engine_bytes() -> impl Strategy<Value = Vec<u8>> {
        let part = prop_oneof![
            4 => proptest::sample::select(vec![
                "data: {\"choices\":[{\"text\":\"a\"}]}\n\n", "data: {\"choices\":[{\"delta\":{\"content\":\"é\"}}]}\r\n\r\n",
                "data: {\"content\":\"b\",\"stop\":false}\n\n", "data: {\"content\":\"\",\"stop\":true}\r\r", "data: [DONE]\n\n",
                "event: token\ndata: {\"t\":\"c\"}\n\n", "event: end\ndata: {}\n\n", ": comment\n\n", "error: {\"message\":\"x\"}\n\n",
                "data: {\"choices\":[{\"text\":\"\",\"finish_reason\":\"stop\"}]}\n\n", "data: {\"error\":null}\n\n", "data: {\"error\":{}}\n\n",
                "{\"choices\":[{\"text\":\"d\"}]}", "{", "\u{feff}", "\n", "data: ",
                "data: {\"usage\":{\"completion_tokens\":3}}\n\n",
            ]).prop_map(|text| text.as_bytes().to_vec()),
            1 => proptest::collection::vec(any::<u8>(), 0..12),
        ];
        proptest::collection::vec(part, 0..14).prop_map(|parts| parts.concat())
    }

    proptest! {
        /// An answer means the same however its bytes were cut.
        #[test]
        fn cuts_change_nothing(bytes in engine_bytes(), size in 1usize..9, status in proptest::sample::select(vec![200u16, 400, 503])) {
            let pieces: Vec<&[u8]> = bytes.chunks(size).collect();
            prop_assert_eq!(all(status, &pieces), all(status, &[&bytes]));
        }
    }
}
