//! Whose manners the demonstration engine has: its pages, its loading, its answer to a full house and
//! to a missing key. PURE.
//!
//! | | while loading | health | pages | full | open without the key |
//! |---|---|---|---|---|---|
//! | llama.cpp | every path 503, before the key | 200 with a status | props, slots, models | waits | health, models |
//! | vLLM | does not listen | 200, empty | models with a context length | waits | all outside `/v1` |
//! | SGLang | health 503, models 200, text waits | 200, empty, after 1 s | models with a context length | waits | health |
//! | TGI | does not listen | 200, empty | info, models | 429 | health, info, models |
//! | OpenAI's alone | does not listen | none: 404 | models | waits | nothing |

use std::time::Duration;

use serde_json::{Value, json};

use super::answers::{Endpoint, error_body};

/// How long SGLang's health path takes: it generates a token first.
const SGLANG_HEALTH: Duration = Duration::from_secs(1);

/// An engine whose manners are shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Dialect {
    LlamaCpp,
    Vllm,
    Sglang,
    Tgi,
    OpenAi,
}

/// Names of the dialects, in the order of their declaration.
const NAMES: [(&str, Dialect); 5] = [
    ("llamacpp", Dialect::LlamaCpp),
    ("vllm", Dialect::Vllm),
    ("sglang", Dialect::Sglang),
    ("tgi", Dialect::Tgi),
    ("openai", Dialect::OpenAi),
];

/// What the pages tell.
pub(super) struct About<'a> {
    pub(super) model: &'a str,
    /// In words, prompt and answer together.
    pub(super) context: u64,
    /// Which slots are busy.
    pub(super) busy: &'a [bool],
    /// In seconds since 1970.
    pub(super) now_s: u64,
}

/// What is done about a request.
#[derive(Debug, PartialEq)]
pub(super) enum Reply {
    /// An answer at once.
    Now(u16, Value),
    /// An answer without a body, after a while.
    Empty(u16, Duration),
    /// Text is generated.
    Generate(Endpoint),
    /// A vector for each input.
    Embed,
}

impl Dialect {
    /// The dialect of a name.
    pub(super) fn named(name: &str) -> Result<Dialect, String> {
        let found = NAMES.iter().find(|(known, _)| *known == name);
        found
            .map(|(_, dialect)| *dialect)
            .ok_or_else(|| format!("allowed are {}", NAMES.map(|(known, _)| known).join(", ")))
    }

    /// Whether it listens before it has loaded.
    pub(super) fn listens_while_loading(self) -> bool {
        matches!(self, Dialect::LlamaCpp | Dialect::Sglang)
    }

    /// Whether a request beyond the slots is refused instead of made to wait.
    pub(super) fn refuses_when_full(self) -> bool {
        self == Dialect::Tgi
    }

    /// What is done about a request. `is_authorized`: it showed the key, or none is wanted.
    pub(super) fn reply(
        self,
        (method, path): (&str, &str),
        is_loading: bool,
        is_authorized: bool,
        about: &About,
    ) -> Reply {
        if is_loading && self == Dialect::LlamaCpp {
            return self.refusal(503, "unavailable_error", "Loading model");
        }
        if !is_authorized && self.wants_key(path) {
            return match self {
                Dialect::LlamaCpp => self.refusal(401, "authentication_error", "Invalid API Key"),
                Dialect::Vllm | Dialect::Sglang => Reply::Now(401, json!({"error": "Unauthorized"})),
                Dialect::Tgi => Reply::Empty(401, Duration::ZERO),
                Dialect::OpenAi => self.refusal(401, "invalid_request_error", "Incorrect API key provided"),
            };
        }
        let is_llama = self == Dialect::LlamaCpp;
        match (method, path) {
            ("POST", "/v1/chat/completions") => Reply::Generate(Endpoint::Chat),
            ("POST", "/v1/completions") => Reply::Generate(Endpoint::Completion),
            ("POST", "/v1/embeddings") => Reply::Embed,
            ("POST", "/chat/completions") if is_llama => Reply::Generate(Endpoint::Chat),
            ("POST", "/completion" | "/completions") if is_llama => Reply::Generate(Endpoint::Native),
            ("POST", "/embeddings") if is_llama => Reply::Embed,
            ("GET", path) => {
                self.page(path, is_loading, about).unwrap_or_else(|| self.refusal(404, NOT_FOUND, MISSING))
            }
            _ => self.refusal(404, NOT_FOUND, MISSING),
        }
    }

    fn page(self, path: &str, is_loading: bool, about: &About) -> Option<Reply> {
        let About { model, context, busy, now_s } = *about;
        let page = match (self, path) {
            (Dialect::LlamaCpp, "/health" | "/v1/health") => json!({"status": "ok"}),
            (Dialect::Sglang, "/health" | "/health_generate") if is_loading => {
                return Some(Reply::Empty(503, Duration::ZERO));
            }
            (Dialect::Sglang, "/health" | "/health_generate") => {
                return Some(Reply::Empty(200, SGLANG_HEALTH));
            }
            (Dialect::Vllm | Dialect::Tgi, "/health") => return Some(Reply::Empty(200, Duration::ZERO)),
            (Dialect::LlamaCpp, "/props") => json!({
                "default_generation_settings": {"n_ctx": context},
                "total_slots": busy.len(),
                "model_alias": model,
                "model_path": "demonstration engine: no model",
                "build_info": BUILD,
            }),
            (Dialect::LlamaCpp, "/slots") => {
                let slot = |(id, busy)| json!({"id": id, "n_ctx": context, "is_processing": busy});
                busy.iter().enumerate().map(slot).collect()
            }
            (Dialect::Tgi, "/info") => json!({
                "model_id": model,
                "max_concurrent_requests": busy.len(),
                "max_total_tokens": context,
                "max_input_tokens": context - 1,
                "version": BUILD,
            }),
            (_, "/v1/models") | (Dialect::LlamaCpp, "/models") => {
                let mut own =
                    json!({"id": model, "object": "model", "created": now_s, "owned_by": "llorch-demo"});
                match self {
                    Dialect::LlamaCpp => own["meta"] = json!({"n_ctx_train": context}),
                    Dialect::Vllm | Dialect::Sglang => own["max_model_len"] = json!(context),
                    Dialect::Tgi | Dialect::OpenAi => {}
                }
                json!({"object": "list", "data": [own]})
            }
            _ => return None,
        };
        Some(Reply::Now(200, page))
    }

    /// Whether a path is closed to who does not show the key.
    fn wants_key(self, path: &str) -> bool {
        match self {
            Dialect::LlamaCpp => !matches!(path, "/health" | "/v1/health" | "/models" | "/v1/models"),
            Dialect::Vllm => path.starts_with("/v1"),
            Dialect::Sglang => !path.starts_with("/health"),
            Dialect::Tgi => !matches!(path, "/health" | "/info" | "/v1/models"),
            Dialect::OpenAi => true,
        }
    }

    fn refusal(self, status: u16, kind: &str, message: &str) -> Reply {
        Reply::Now(status, error_body(status, kind, message))
    }
}

const NOT_FOUND: &str = "not_found_error";
const MISSING: &str = "File Not Found";
const BUILD: &str = concat!("llorch demo-engine ", env!("CARGO_PKG_VERSION"));

#[cfg(test)]
mod tests {
    use super::*;
    use crate::replicas::ProbeKind;
    use crate::replicas::profile::{Engine, Facts};

    const ABOUT: About = About { model: "m", context: 512, busy: &[false, true, false], now_s: 7 };

    fn get(dialect: Dialect, path: &str) -> Reply {
        dialect.reply(("GET", path), false, true, &ABOUT)
    }

    fn status(reply: &Reply) -> u16 {
        match reply {
            Reply::Now(status, _) | Reply::Empty(status, _) => *status,
            Reply::Generate(_) | Reply::Embed => 200,
        }
    }

    #[test]
    fn each_name_is_known_and_the_daemons_know_it_too() {
        for (name, dialect) in NAMES {
            assert_eq!(Dialect::named(name), Ok(dialect));
            let expected = match dialect {
                Dialect::LlamaCpp => Engine::LlamaCpp,
                Dialect::Vllm => Engine::Vllm,
                Dialect::Sglang => Engine::Sglang,
                Dialect::Tgi => Engine::Tgi,
                Dialect::OpenAi => Engine::OpenAi,
            };
            assert_eq!(Engine::named(name), expected);
        }
        let error = Dialect::named("ollama").expect_err("no such manners");
        assert!(error.contains("llamacpp, vllm, sglang, tgi, openai"), "{error}");
    }

    #[test]
    fn the_daemons_read_what_the_pages_tell() {
        let facts = |slots, context_length| Facts { models: vec!["m".into()], slots, context_length };
        for (dialect, path, kind, told) in [
            (
                Dialect::LlamaCpp,
                "/props",
                ProbeKind::Props,
                Facts { models: vec![], slots: Some(3), context_length: Some(512) },
            ),
            (Dialect::LlamaCpp, "/v1/models", ProbeKind::Models, facts(None, None)),
            (Dialect::Vllm, "/v1/models", ProbeKind::Models, facts(None, Some(512))),
            (Dialect::Sglang, "/v1/models", ProbeKind::Models, facts(None, Some(512))),
            (Dialect::Tgi, "/info", ProbeKind::Info, facts(Some(3), Some(512))),
            (Dialect::OpenAi, "/v1/models", ProbeKind::Models, facts(None, None)),
        ] {
            let Reply::Now(200, page) = get(dialect, path) else { panic!("{dialect:?} {path}") };
            assert_eq!(Facts::read(kind, page.to_string().as_bytes()), told, "{dialect:?} {path}");
        }
        for (_, dialect) in NAMES {
            let has = |path: &str| status(&get(dialect, path)) == 200;
            assert_eq!(has("/props"), dialect == Dialect::LlamaCpp, "{dialect:?}");
            assert_eq!(has("/info"), dialect == Dialect::Tgi, "{dialect:?}");
            assert_eq!(has("/health"), dialect != Dialect::OpenAi, "{dialect:?}");
            let canary = dialect.reply(("POST", "/v1/completions"), false, true, &ABOUT);
            assert_eq!(canary, Reply::Generate(Endpoint::Completion));
        }
        assert_eq!(get(Dialect::Sglang, "/health"), Reply::Empty(200, SGLANG_HEALTH));
    }

    #[test]
    fn loading_comes_before_the_key_and_models_say_nothing_about_readiness() {
        let loading = |dialect: Dialect, path| status(&dialect.reply(("GET", path), true, false, &ABOUT));
        for path in ["/health", "/v1/models", "/props", "/nothing"] {
            assert_eq!(loading(Dialect::LlamaCpp, path), 503, "{path}");
        }
        assert_eq!(loading(Dialect::Sglang, "/health"), 503);
        let models = Dialect::Sglang.reply(("GET", "/v1/models"), true, true, &ABOUT);
        assert_eq!(status(&models), 200);
    }

    #[test]
    fn without_the_key_only_what_the_engine_leaves_open_is_answered() {
        for (dialect, open) in [
            (Dialect::LlamaCpp, &["/health", "/v1/models"][..]),
            (Dialect::Vllm, &["/health"]),
            (Dialect::Sglang, &["/health"]),
            (Dialect::Tgi, &["/health", "/info", "/v1/models"]),
            (Dialect::OpenAi, &[]),
        ] {
            let asked = |method, path| status(&dialect.reply((method, path), false, false, &ABOUT));
            for path in open {
                assert_eq!(asked("GET", path), 200, "{dialect:?} {path}");
            }
            for (method, path) in [("POST", "/v1/chat/completions"), ("POST", "/v1/embeddings")] {
                assert_eq!(asked(method, path), 401, "{dialect:?} {path}");
            }
        }
        let props = Dialect::LlamaCpp.reply(("GET", "/props"), false, false, &ABOUT);
        assert_eq!(status(&props), 401);
    }
}
