//! What the demonstration engine says, in llama-server's shapes. PURE.
//!
//! A token is a word. The first one is the marker `[demo]`; the others are the prompt's words in an
//! order that its seed decides, over and over. A request that names a number of tokens gets exactly
//! that many (finish reason `length`); one that names none gets 32 and ends by itself (`stop`). The
//! context bounds both.

use serde_json::{Value, json};

/// First word of every answer.
const MARKER: &str = "[demo]";
/// Tokens of an answer whose request names no number.
const TOKENS_DEFAULT: u64 = 32;
/// Numbers in an embedding: enough to be compared, few enough to be read.
const EMBEDDING_DIMENSIONS: usize = 16;
/// Most inputs of one embedding request: OpenAI's limit.
const EMBEDDING_INPUTS_MAX: usize = 2048;
/// Longest model name that is repeated, in characters.
const MODEL_CHARS_MAX: usize = 200;

/// The three ways to ask for text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Endpoint {
    /// `/v1/chat/completions`.
    Chat,
    /// `/v1/completions`.
    Completion,
    /// llama-server's own `/completion`.
    Native,
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Finish {
    /// The number of tokens, or the context, was used up.
    Length,
    /// It had nothing more to say.
    Stop,
}

/// An error answer.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    pub(super) status: u16,
    /// llama-server's `type`.
    pub(super) kind: &'static str,
    pub(super) message: String,
}

impl Refusal {
    pub(super) fn overloaded() -> Refusal {
        Refusal { status: 429, kind: "overloaded", message: "Model is overloaded".into() }
    }

    fn invalid(message: impl Into<String>) -> Refusal {
        Refusal { status: 400, kind: "invalid_request_error", message: message.into() }
    }
}

/// llama-server's error body.
pub(super) fn error_body(status: u16, kind: &str, message: &str) -> Value {
    json!({"error": {"code": status, "message": message, "type": kind}})
}

/// A request for text, understood.
#[derive(Debug)]
pub(super) struct Ask {
    endpoint: Endpoint,
    model: String,
    /// The prompt's words.
    words: Vec<String>,
    /// Words of the answer.
    pub(super) tokens: u64,
    finish: Finish,
    pub(super) stream: bool,
    include_usage: bool,
    seed: u64,
}

impl Ask {
    /// Reads a request's body. `context` is in words, `model` the name for requests without one.
    pub(super) fn read(endpoint: Endpoint, body: &[u8], context: u64, model: &str) -> Result<Ask, Refusal> {
        let fields = object(body)?;
        let prompt = match endpoint {
            Endpoint::Chat => chat_prompt(&fields["messages"])?,
            Endpoint::Completion | Endpoint::Native => text_of(&fields["prompt"], "prompt")?,
        };
        if fields["n"].as_u64().is_some_and(|n| n > 1) {
            return Err(Refusal::invalid("the demonstration engine gives one answer: n must be 1"));
        }
        let words: Vec<String> = prompt.split_whitespace().map(str::to_string).collect();
        let room = room(words.len(), context)?;
        let names: &[&str] = match endpoint {
            Endpoint::Chat => &["max_completion_tokens", "max_tokens", "n_predict"],
            Endpoint::Completion | Endpoint::Native => &["n_predict", "max_tokens"],
        };
        let named = names.iter().map(|name| &fields[*name]).find(|value| !value.is_null());
        let (wanted, finish) = match named {
            None => (TOKENS_DEFAULT, Finish::Stop),
            Some(value) => match value.as_i64() {
                // -1 is llama-server's word for "as many as fit".
                Some(count) => (u64::try_from(count).unwrap_or(u64::MAX), Finish::Length),
                None => return Err(Refusal::invalid("the number of tokens must be a whole number")),
            },
        };
        Ok(Ask {
            endpoint,
            model: model_of(&fields, model),
            words,
            tokens: wanted.min(room),
            finish: if wanted > room { Finish::Length } else { finish },
            stream: fields["stream"].as_bool().unwrap_or(false),
            include_usage: fields["stream_options"]["include_usage"].as_bool().unwrap_or(false),
            seed: fields["seed"].as_i64().map_or(0, i64::cast_unsigned),
        })
    }
}

/// Times of an answer, in milliseconds.
pub(super) struct Progress {
    /// From its slot to the first token.
    pub(super) prompt_ms: f64,
    /// From the first token to the last.
    pub(super) predicted_ms: f64,
}

/// An answer under way.
pub(super) struct Answer {
    pub(super) ask: Ask,
    slot: usize,
    id: String,
    created: u64,
    /// The words in the order of the answer.
    said: Vec<String>,
}

impl Answer {
    /// `id` without its prefix; `created` in seconds since 1970.
    pub(super) fn new(ask: Ask, slot: usize, id: String, created: u64) -> Answer {
        let mut said = if ask.words.is_empty() { vec![MARKER.to_string()] } else { ask.words.clone() };
        fastrand::Rng::with_seed(hash(ask.words.iter().map(String::as_str)) ^ ask.seed).shuffle(&mut said);
        Answer { ask, slot, id, created, said }
    }

    /// The token at `index`, with the blank before it.
    pub(super) fn token(&self, index: u64) -> String {
        match usize::try_from(index).unwrap_or(0).checked_sub(1) {
            None => MARKER.to_string(),
            Some(index) => format!(" {}", self.said[index % self.said.len()]),
        }
    }

    /// The event before the first token, which only the chat endpoint has.
    pub(super) fn opening(&self) -> Option<String> {
        let delta = json!({"role": "assistant", "content": null});
        (self.ask.endpoint == Endpoint::Chat).then(|| event(&self.chunk(json!({"delta": delta}), None)))
    }

    /// The event of one token.
    pub(super) fn token_event(&self, index: u64, token: &str) -> String {
        event(&match self.ask.endpoint {
            Endpoint::Chat => self.chunk(json!({"delta": {"content": token}}), None),
            Endpoint::Completion => self.chunk(json!({"text": token, "logprobs": null}), None),
            Endpoint::Native => json!({
                "index": 0, "content": token, "tokens": [], "stop": false, "id_slot": self.slot,
                "tokens_predicted": index + 1, "tokens_evaluated": self.ask.words.len(),
            }),
        })
    }

    /// The last events, with the finish reason, the usage where it was asked for, and the end mark of
    /// the dialects that have one.
    pub(super) fn closing(&self, progress: &Progress) -> String {
        let content = match self.ask.endpoint {
            Endpoint::Chat => json!({"delta": {}}),
            Endpoint::Completion => json!({"text": "", "logprobs": null}),
            Endpoint::Native => return event(&self.native("", progress)),
        };
        let mut last = self.chunk(content, Some(self.ask.finish));
        last["timings"] = self.timings(progress);
        let mut events = event(&last);
        if self.ask.include_usage {
            let mut usage = self.chunk(json!({}), None);
            usage["choices"] = json!([]);
            usage["usage"] = self.usage();
            events.push_str(&event(&usage));
        }
        events.push_str("data: [DONE]\n\n");
        events
    }

    /// The answer as one object, for a request that did not ask for a stream.
    pub(super) fn whole(&self, text: &str, progress: &Progress) -> Value {
        let (content, object) = match self.ask.endpoint {
            Endpoint::Chat => (json!({"message": {"role": "assistant", "content": text}}), "chat.completion"),
            Endpoint::Completion => (json!({"text": text, "logprobs": null}), "text_completion"),
            Endpoint::Native => return self.native(text, progress),
        };
        let mut whole = self.chunk(content, Some(self.ask.finish));
        whole["object"] = json!(object);
        whole["usage"] = self.usage();
        whole["timings"] = self.timings(progress);
        whole
    }

    fn chunk(&self, mut choice: Value, finish: Option<Finish>) -> Value {
        choice["index"] = json!(0);
        choice["finish_reason"] = match finish {
            None => Value::Null,
            Some(Finish::Length) => json!("length"),
            Some(Finish::Stop) => json!("stop"),
        };
        let (prefix, object) = match self.ask.endpoint {
            Endpoint::Chat => ("chatcmpl", "chat.completion.chunk"),
            Endpoint::Completion | Endpoint::Native => ("cmpl", "text_completion"),
        };
        json!({
            "id": format!("{prefix}-{}", self.id), "object": object, "created": self.created,
            "model": self.ask.model, "choices": [choice],
        })
    }

    fn native(&self, text: &str, progress: &Progress) -> Value {
        let stop_type = if self.ask.finish == Finish::Stop { "eos" } else { "limit" };
        json!({
            "index": 0, "content": text, "tokens": [], "id_slot": self.slot, "stop": true,
            "stop_type": stop_type, "model": self.ask.model, "tokens_predicted": self.ask.tokens,
            "tokens_evaluated": self.ask.words.len(), "truncated": false, "timings": self.timings(progress),
        })
    }

    fn usage(&self) -> Value {
        let (prompt, completion) = (self.ask.words.len() as u64, self.ask.tokens);
        json!({"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion})
    }

    fn timings(&self, progress: &Progress) -> Value {
        json!({
            "prompt_n": self.ask.words.len(), "prompt_ms": progress.prompt_ms,
            "predicted_n": self.ask.tokens, "predicted_ms": progress.predicted_ms,
        })
    }
}

/// Answers `/v1/embeddings`: unit vectors drawn from the hash of each input. The same input always
/// gives the same vector, and that is all they mean.
pub(super) fn embeddings(body: &[u8], context: u64, model: &str) -> Result<Value, Refusal> {
    let fields = object(body)?;
    let inputs: Vec<&str> = match &fields["input"] {
        Value::String(one) => vec![one],
        Value::Array(many) if (1..=EMBEDDING_INPUTS_MAX).contains(&many.len()) => many
            .iter()
            .map(|input| input.as_str().ok_or_else(|| Refusal::invalid("every input must be a string")))
            .collect::<Result<_, _>>()?,
        _ => return Err(Refusal::invalid("input must be a string or a list of at most 2048 strings")),
    };
    let (mut data, mut tokens) = (Vec::new(), 0);
    for (index, input) in inputs.iter().enumerate() {
        let words = input.split_whitespace().count();
        room(words, context)?;
        tokens += words;
        data.push(json!({"object": "embedding", "index": index, "embedding": unit_vector(input)}));
    }
    Ok(json!({
        "object": "list", "model": model_of(&fields, model), "data": data,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }))
}

fn unit_vector(input: &str) -> Vec<f64> {
    let mut random = fastrand::Rng::with_seed(hash([input]));
    let numbers: Vec<f64> = (0..EMBEDDING_DIMENSIONS).map(|_| random.f64() - 0.5).collect();
    let length = numbers.iter().map(|x| x * x).sum::<f64>().sqrt().max(f64::MIN_POSITIVE);
    numbers.iter().map(|x| x / length).collect()
}

fn object(body: &[u8]) -> Result<Value, Refusal> {
    match serde_json::from_slice(body) {
        Ok(fields @ Value::Object(_)) => Ok(fields),
        Ok(_) => Err(Refusal::invalid("the body must be a JSON object")),
        Err(error) => Err(Refusal::invalid(format!("the body is not JSON: {error}"))),
    }
}

fn chat_prompt(messages: &Value) -> Result<String, Refusal> {
    let Some(messages) = messages.as_array().filter(|list| !list.is_empty()) else {
        return Err(Refusal::invalid("messages must be a list of at least one message"));
    };
    let mut prompt = String::new();
    for message in messages {
        match &message["content"] {
            Value::Null => {}
            // Parts other than text, images say, are passed over.
            Value::Array(parts) => {
                for text in parts.iter().filter_map(|part| part["text"].as_str()) {
                    prompt.push_str(text);
                    prompt.push('\n');
                }
            }
            content => prompt.push_str(&text_of(content, "content")?),
        }
        prompt.push('\n');
    }
    Ok(prompt)
}

fn text_of(value: &Value, name: &str) -> Result<String, Refusal> {
    let strings = match value {
        Value::String(text) => return Ok(text.clone()),
        Value::Array(list) if !list.is_empty() => list.iter().map(Value::as_str).collect::<Option<Vec<_>>>(),
        _ => None,
    };
    strings
        .map(|list| list.join("\n"))
        .ok_or_else(|| Refusal::invalid(format!("{name} must be a string or a list of strings")))
}

/// Words that an answer may have beside a prompt of `words`.
fn room(words: usize, context: u64) -> Result<u64, Refusal> {
    let prompt = words as u64;
    context.checked_sub(prompt).filter(|room| *room > 0).ok_or_else(|| Refusal {
        status: 400,
        kind: "exceed_context_size_error",
        message: format!(
            "the request ({prompt} tokens) exceeds the available context size ({context} tokens)"
        ),
    })
}

fn model_of(fields: &Value, default: &str) -> String {
    fields["model"].as_str().unwrap_or(default).chars().take(MODEL_CHARS_MAX).collect()
}

fn event(data: &Value) -> String {
    format!("data: {data}\n\n")
}

/// FNV-1a over the parts and their ends: the same on every machine.
fn hash<'a>(parts: impl IntoIterator<Item = &'a str>) -> u64 {
    parts
        .into_iter()
        .flat_map(|part| part.bytes().chain([0xff]))
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PROGRESS: Progress = Progress { prompt_ms: 1.0, predicted_ms: 2.0 };

    fn answer(endpoint: Endpoint, body: &Value) -> Answer {
        let ask = Ask::read(endpoint, body.to_string().as_bytes(), 64, "m").expect("a usable request");
        Answer::new(ask, 0, "x".into(), 1)
    }

    fn text(answer: &Answer) -> String {
        (0..answer.ask.tokens).map(|index| answer.token(index)).collect()
    }

    #[test]
    fn an_answer_is_the_marker_and_the_prompts_words_in_the_seeds_order() {
        let ask = |seed| json!({"messages": [{"role": "user", "content": [{"type": "text", "text": "a b c d e f"}]}], "max_tokens": 7, "seed": seed});
        let said = text(&answer(Endpoint::Chat, &ask(1)));
        let mut words: Vec<&str> = said.split(' ').collect();
        assert_eq!(words.remove(0), "[demo]");
        words.sort_unstable();
        assert_eq!(words, ["a", "b", "c", "d", "e", "f"]);
        assert_eq!(said, text(&answer(Endpoint::Chat, &ask(1))));
        assert!((2..20).any(|seed| text(&answer(Endpoint::Chat, &ask(seed))) != said));
    }

    #[test]
    fn the_number_of_tokens_decides_the_finish() {
        for (fields, tokens, finish) in [
            (json!({}), 32, Finish::Stop),
            (json!({"max_tokens": 5}), 5, Finish::Length),
            (json!({"max_tokens": null, "n_predict": 6}), 6, Finish::Length),
            (json!({"n_predict": -1}), 62, Finish::Length),
            (json!({"max_tokens": 1000}), 62, Finish::Length),
        ] {
            let mut body = fields.clone();
            body["prompt"] = json!("two words");
            let answer = answer(Endpoint::Native, &body);
            assert_eq!((answer.ask.tokens, answer.ask.finish), (tokens, finish), "{fields}");
        }
    }

    #[test]
    fn what_cannot_be_answered_is_refused_with_the_reason() {
        let long = format!("{{\"prompt\":{:?}}}", "w ".repeat(64));
        for (endpoint, body, reason) in [
            (Endpoint::Chat, "{", "not JSON"),
            (Endpoint::Chat, "[]", "JSON object"),
            (Endpoint::Chat, "{}", "messages"),
            (Endpoint::Chat, r#"{"messages":[]}"#, "messages"),
            (Endpoint::Chat, r#"{"messages":[{"content":7}]}"#, "content"),
            (Endpoint::Completion, r#"{"prompt":[1,2]}"#, "prompt"),
            (Endpoint::Completion, r#"{"prompt":"a","n":2}"#, "n must be 1"),
            (Endpoint::Native, r#"{"prompt":"a","n_predict":"x"}"#, "whole number"),
            (Endpoint::Native, &long, "context size"),
        ] {
            let refusal = Ask::read(endpoint, body.as_bytes(), 64, "m").expect_err(body);
            assert_eq!(refusal.status, 400);
            assert!(refusal.message.contains(reason), "{body}: {}", refusal.message);
        }
    }

    #[test]
    fn every_endpoint_closes_as_llama_server_does() {
        let body = json!({"prompt": "p", "messages": [{"content": "p"}], "stream": true, "stream_options": {"include_usage": true}});
        let chat = answer(Endpoint::Chat, &body).closing(&PROGRESS);
        let events: Vec<&str> = chat.split_terminator("\n\n").collect();
        assert!(events[0].contains(r#""finish_reason":"stop""#) && events[0].contains(r#""delta":{}"#));
        assert!(events[1].contains(r#""choices":[]"#) && events[1].contains(r#""total_tokens":33"#));
        assert_eq!(events[2..], ["data: [DONE]"]);
        let native = answer(Endpoint::Native, &body).closing(&PROGRESS);
        assert!(native.contains(r#""stop":true"#) && !native.contains("[DONE]"));
    }

    #[test]
    fn embeddings_are_unit_vectors_that_tell_inputs_apart() {
        let read = |input: Value| embeddings(json!({ "input": input }).to_string().as_bytes(), 64, "m");
        let answer = read(json!(["a", "b", "a"])).expect("three inputs");
        let vector = |index: usize| -> Vec<f64> {
            serde_json::from_value(answer["data"][index]["embedding"].clone()).expect("numbers")
        };
        assert!((vector(0).iter().map(|x| x * x).sum::<f64>() - 1.0).abs() < 1e-9);
        assert_eq!(vector(0), vector(2));
        assert_ne!(vector(0), vector(1));
        assert!(read(json!([])).is_err() && read(json!([7])).is_err() && read(json!(null)).is_err());
    }
}
