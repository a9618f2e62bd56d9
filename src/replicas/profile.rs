//! What is asked of each kind of engine, and what its answers say. Pure.
//!
//! Readiness is the health path alone: some engines list their models long before they serve. What else
//! is worth knowing (slots, context length, models) is asked once a start, after the first good answer
//! and before any work; not later, for these paths block while an engine decodes. An engine that wants a
//! key for it is asked again while it is idle: keys are read anew each time. What an engine does not tell
//! stays unknown, and that keeps nobody out.
//!
//! | engine | after health |
//! |---|---|
//! | llama.cpp | `/props`: slots, context length; `/v1/models` where no model is named |
//! | vLLM, SGLang | `/v1/models`: models, context length |
//! | TGI | `/info`: model, context length, slots |
//! | any other | `/v1/models` where no model is named; it also stands in for a missing health path |

use serde_json::Value;

use super::probing::ProbeKind;
use crate::wire::handoff::{Handoff, MODELS_MAX, SLOTS_MAX, TEXT_BYTES_MAX};

/// Longest context length that is believed, in tokens.
const CONTEXT_LENGTH_MAX: u64 = 1 << 32;

/// A kind of engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// llama.cpp's llama-server.
    LlamaCpp,
    /// vLLM.
    Vllm,
    /// SGLang.
    Sglang,
    /// Hugging Face's text-generation-inference.
    Tgi,
    /// Anything that speaks OpenAI's dialect.
    OpenAi,
}

/// What an engine told about itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// Models that it serves.
    pub models: Vec<String>,
    /// Requests that it serves at once.
    pub slots: Option<u32>,
    /// Longest prompt and answer together, in tokens.
    pub context_length: Option<u64>,
}

impl Engine {
    /// The kind that a handoff names, in any usual spelling.
    #[must_use]
    pub fn named(name: &str) -> Engine {
        let plain: String = name.chars().filter(char::is_ascii_alphanumeric).collect();
        match plain.to_ascii_lowercase().as_str() {
            "llamacpp" | "llamaserver" | "llamacppserver" | "llama" => Engine::LlamaCpp,
            "vllm" => Engine::Vllm,
            "sglang" => Engine::Sglang,
            "tgi" | "textgenerationinference" | "textgenerationserver" => Engine::Tgi,
            _ => Engine::OpenAi,
        }
    }

    /// What is asked once a start, in this order.
    #[must_use]
    pub fn questions(self, handoff: &Handoff) -> &'static [ProbeKind] {
        match (self, handoff.models.is_empty()) {
            (Engine::LlamaCpp, true) => &[ProbeKind::Props, ProbeKind::Models],
            (Engine::LlamaCpp, false) => &[ProbeKind::Props],
            (Engine::Vllm | Engine::Sglang, _) | (Engine::OpenAi, true) => &[ProbeKind::Models],
            (Engine::Tgi, _) => &[ProbeKind::Info],
            (Engine::OpenAi, false) => &[],
        }
    }

    /// Whether a list of models may stand in for a health path that does not exist.
    #[must_use]
    pub fn lists_models_as_health(self) -> bool {
        self == Engine::OpenAi
    }
}

impl Facts {
    /// Reads the answer to a question. What cannot be read is unknown.
    #[must_use]
    pub fn read(kind: ProbeKind, body: &[u8]) -> Facts {
        let Ok(answer) = serde_json::from_slice::<Value>(body) else { return Facts::default() };
        match kind {
            ProbeKind::Props => Facts {
                models: Vec::new(),
                slots: slots(&answer["total_slots"]),
                context_length: context_length(&answer["default_generation_settings"]["n_ctx"]),
            },
            ProbeKind::Info => Facts {
                models: names(std::iter::once(&answer["model_id"])),
                slots: slots(&answer["max_concurrent_requests"]),
                context_length: context_length(&answer["max_total_tokens"])
                    .or_else(|| context_length(&answer["max_total_length"])),
            },
            ProbeKind::Models => {
                let list = answer["data"].as_array().map_or(&[][..], Vec::as_slice);
                // Of several models the shortest context is what any request may count on.
                let lengths = list.iter().filter_map(|model| context_length(&model["max_model_len"]));
                Facts {
                    models: names(list.iter().map(|model| &model["id"])),
                    slots: None,
                    context_length: lengths.min(),
                }
            }
            ProbeKind::Health | ProbeKind::Canary => Facts::default(),
        }
    }

    /// Adds what another answer told.
    pub(super) fn add(&mut self, other: Facts) {
        if !other.models.is_empty() {
            self.models = other.models;
        }
        self.slots = other.slots.or(self.slots);
        self.context_length = other.context_length.or(self.context_length);
    }
}

fn slots(value: &Value) -> Option<u32> {
    value.as_u64().and_then(|slots| u32::try_from(slots).ok()).filter(|slots| (1..=SLOTS_MAX).contains(slots))
}

fn context_length(value: &Value) -> Option<u64> {
    value.as_u64().filter(|length| (1..=CONTEXT_LENGTH_MAX).contains(length))
}

/// Model names within the limits that handoffs keep, each once.
fn names<'a>(values: impl Iterator<Item = &'a Value>) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    for name in values.filter_map(Value::as_str).take(MODELS_MAX) {
        if !name.is_empty() && name.len() <= TEXT_BYTES_MAX && !names.iter().any(|known| known == name) {
            names.push(name.to_string());
        }
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn engines_are_known_by_their_usual_names() {
        for (engine, names) in [
            (Engine::LlamaCpp, &["llamacpp", "llama.cpp", "llama-server", "LLaMA.cpp"][..]),
            (Engine::Vllm, &["vllm", "vLLM"]),
            (Engine::Sglang, &["sglang", "SGLang"]),
            (Engine::Tgi, &["tgi", "text-generation-inference"]),
            (Engine::OpenAi, &["openai", "mlx", "", "something else"]),
        ] {
            for name in names {
                assert_eq!(Engine::named(name), engine, "{name}");
            }
        }
    }

    #[test]
    fn answers_are_read_as_the_engines_write_them() {
        let read = |kind, text: &str| Facts::read(kind, text.as_bytes());
        let props = read(
            ProbeKind::Props,
            r#"{"default_generation_settings":{"id":0,"n_ctx":8192,"params":{}},"total_slots":4,"model_path":"/m.gguf"}"#,
        );
        assert_eq!(props, Facts { models: vec![], slots: Some(4), context_length: Some(8192) });
        let vllm = read(
            ProbeKind::Models,
            r#"{"object":"list","data":[{"id":"a","max_model_len":4096},{"id":"lora","max_model_len":2048},{"id":"a"}]}"#,
        );
        assert_eq!(
            vllm,
            Facts { models: vec!["a".into(), "lora".into()], slots: None, context_length: Some(2048) }
        );
        let tgi = read(
            ProbeKind::Info,
            r#"{"model_id":"org/model","max_concurrent_requests":128,"max_total_tokens":2048,"version":"3"}"#,
        );
        assert_eq!(
            tgi,
            Facts { models: vec!["org/model".into()], slots: Some(128), context_length: Some(2048) }
        );
        for nonsense in ["", "[]", "{", r#"{"data":7,"total_slots":-1}"#, r#"{"total_slots":1e99}"#] {
            for kind in [ProbeKind::Props, ProbeKind::Info, ProbeKind::Models] {
                assert_eq!(read(kind, nonsense), Facts::default(), "{nonsense}");
            }
        }
    }

    proptest::proptest! {
        #[test]
        fn no_answer_panics(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..200)) {
            for kind in [ProbeKind::Props, ProbeKind::Info, ProbeKind::Models] {
                let _ = Facts::read(kind, &bytes);
            }
        }
    }
}
