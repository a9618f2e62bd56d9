//! Properties of the reader, held against a parser that builds trees.

use proptest::prelude::*;
use serde_json::{Map, Value, json};

use super::*;

fn hash_of(body: &Value) -> Option<u64> {
    peek(body.to_string().as_bytes()).expect("a usable body").prefix_hash
}

fn said(role: &str, content: &str) -> Value {
    json!({"role": role, "content": content})
}

/// JSON by another reader: its grammar, without limits and without building anything.
fn is_json(bytes: &[u8]) -> bool {
    std::str::from_utf8(bytes).is_ok_and(|text| serde_json::from_str::<serde::de::IgnoredAny>(text).is_ok())
}

/// Documents of every kind, some levels deep.
fn any_value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        any::<String>().prop_map(Value::from),
        "[ -~]{0,40}".prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 32, 5, |inner| {
        let name = prop_oneof!["[a-z_]{0,8}", Just("model".to_string()), any::<String>()];
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
            prop::collection::btree_map(name, inner, 0..5)
                .prop_map(|map| Value::Object(map.into_iter().collect::<Map<_, _>>())),
        ]
    })
}

/// A value for a field that is read: often of the right type.
fn field_value(name: &'static str) -> impl Strategy<Value = Value> {
    let right = match name {
        "model" | "user" | "session_id" | "prompt_cache_key" => {
            prop_oneof!["[a-z/é\"\\\\]{0,12}", any::<String>()].prop_map(Value::from).boxed()
        }
        "stream" => any::<bool>().prop_map(Value::from).boxed(),
        "n" => (-1i64..200).prop_map(Value::from).boxed(),
        "messages" => prop::collection::vec(any_value(), 0..3).prop_map(Value::from).boxed(),
        "prompt" | "input" => any_value().boxed(),
        _ => (-3i64..100_000).prop_map(Value::from).boxed(),
    };
    prop_oneof![6 => right, 1 => Just(Value::Null), 1 => any_value()]
}

const FIELDS: [&str; 12] = [
    "model",
    "stream",
    "n",
    "user",
    "session_id",
    "prompt_cache_key",
    "max_tokens",
    "max_completion_tokens",
    "max_output_tokens",
    "messages",
    "prompt",
    "input",
];

fn document() -> impl Strategy<Value = Map<String, Value>> {
    let field = prop::sample::select(&FIELDS[..])
        .prop_flat_map(|name| field_value(name).prop_map(move |value| (name.to_string(), value)));
    let other = ("[a-zé\"]{0,6}", any_value());
    prop::collection::vec(prop_oneof![3 => field, 1 => other], 0..8)
        .prop_map(|members| members.into_iter().collect())
}

/// Whether the tree has the types and ranges that the reader asks for.
fn is_usable(tree: &Map<String, Value>) -> bool {
    tree.iter().all(|(name, value)| {
        value.is_null()
            || match name.as_str() {
                "model" => value.as_str().is_some_and(|model| model.len() <= MODEL_BYTES_MAX),
                "user" | "session_id" | "prompt_cache_key" => value.is_string(),
                "stream" => value.is_boolean(),
                "n" => value.as_u64().is_some_and(|n| (1..=u64::from(ANSWERS_MAX)).contains(&n)),
                "max_tokens" | "max_completion_tokens" | "max_output_tokens" => value.is_i64(),
                "messages" => value.is_array(),
                _ => true,
            }
    })
}

fn text_in(tree: &Map<String, Value>, name: &str) -> Option<String> {
    tree.get(name)?.as_str().filter(|text| !text.is_empty()).map(str::to_string)
}

proptest! {
    /// The reader sees what a tree shows.
    #[test]
    fn it_reads_what_a_tree_has(tree in document(), pretty in any::<bool>()) {
        let body = if pretty {
            serde_json::to_vec_pretty(&tree)
        } else {
            serde_json::to_vec(&tree)
        }
        .expect("encodes");
        let read = peek(&body);
        prop_assert_eq!(read.is_ok(), is_usable(&tree), "{:?}", read);
        if let Ok(read) = read {
            prop_assert_eq!(read.model.as_deref().map(str::to_string), text_in(&tree, "model"));
            let spanned = read.model_span.map(|span| body[span].to_vec());
            let quoted = text_in(&tree, "model").map(|model| serde_json::to_vec(&model).expect("encodes"));
            prop_assert_eq!(spanned, quoted);
            prop_assert_eq!(read.stream, tree.get("stream").and_then(Value::as_bool).unwrap_or(false));
            prop_assert_eq!(read.n.map(u64::from), tree.get("n").and_then(Value::as_u64));
            let cut = |text: String| super::cut(&text, NAME_BYTES_MAX).to_string();
            prop_assert_eq!(read.user.map(Cow::into_owned), text_in(&tree, "user").map(cut));
            let session = text_in(&tree, "session_id").or_else(|| text_in(&tree, "prompt_cache_key"));
            prop_assert_eq!(read.session.map(Cow::into_owned), session.map(cut));
            let limits = ["max_completion_tokens", "max_tokens", "max_output_tokens"];
            let limit = limits.iter().find_map(|name| tree.get(*name)?.as_i64());
            prop_assert_eq!(read.tokens_max, limit.and_then(|limit| u64::try_from(limit).ok()));
        }
    }

    /// Neither more nor less is JSON here than elsewhere, also after a few bytes were changed, cut or
    /// doubled.
    #[test]
    fn it_takes_exactly_what_is_json(
        tree in any_value(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), 0..4u8, any::<u8>()), 0..3),
    ) {
        let mut body = json!({"x": tree}).to_string().into_bytes();
        for (index, kind, byte) in changes {
            if body.is_empty() {
                break;
            }
            let at = index.index(body.len());
            match kind {
                0 => body[at] = byte,
                1 => drop(body.remove(at)),
                2 => body.insert(at, byte),
                _ => body[at] = b"{}[]\",:\\0-e.tn "[usize::from(byte) % 15],
            }
        }
        let read = peek(&body);
        if matches!(read, Err(PeekError::TooDeep | PeekError::NotAnObject | PeekError::Field { .. })) {
            prop_assert!(is_json(&body), "{:?} {:?}", read, String::from_utf8_lossy(&body));
        } else {
            prop_assert_eq!(read.is_ok(), is_json(&body), "{:?} {:?}", read, String::from_utf8_lossy(&body));
        }
    }

    /// Whatever comes, it ends without a panic.
    #[test]
    fn no_bytes_break_it(body in prop::collection::vec(any::<u8>(), 0..200)) {
        let body = [b"{\"a\":", body.as_slice()].concat();
        let usable = peek(&body).is_ok();
        prop_assert!(!usable || is_json(&body));
    }

    /// Every later turn of a conversation has the number of the first, whatever the system says.
    #[test]
    fn turns_share_their_number(
        opening in "[ -~é]{1,300}",
        later in prop::collection::vec("[ -~]{0,50}", 0..6),
        system in "[ -~]{0,50}",
    ) {
        let first = json!({"messages": [said("user", &opening)]});
        let mut turns = vec![said("system", &system), said("developer", "be kind"), said("user", &opening)];
        turns.extend(later.iter().enumerate().map(|(n, text)| {
            said(if n % 2 == 0 { "assistant" } else { "user" }, text)
        }));
        prop_assert_eq!(hash_of(&first), hash_of(&json!({"model": "m", "messages": turns})));
        let other = json!({"messages": [said("user", &format!("{opening}."))]});
        prop_assert_ne!(hash_of(&first), hash_of(&other));
    }
}

#[test]
fn only_the_beginning_counts() {
    let long = "x".repeat(PREFIX_BYTES);
    let prompt = |text: &str| hash_of(&json!({"prompt": text}));
    assert_eq!(prompt(&format!("{long}a")), prompt(&format!("{long}b")));
    assert_ne!(prompt("a"), prompt("b"));
    let parts = |text: &str| {
        hash_of(&json!({"messages": [{"role": "user", "content": [{"type": "text", "text": text}]}]}))
    };
    assert_ne!(parts("a"), parts("b"));
    for without in [json!({}), json!({"messages": []}), json!({"messages": [said("system", "x")]})] {
        assert_eq!(hash_of(&without), None, "{without}");
    }
    let input = json!({"input": [said("user", "a")], "instructions": "b"});
    assert_eq!(hash_of(&input), hash_of(&json!({"messages": [said("user", "a")]})));
}

#[test]
fn the_last_of_two_keys_counts_and_names_may_be_escaped() {
    let body = br#"{"model":"a","m\u006fdel":"b\/c","n":2,"n":null}"#;
    let read = peek(body).expect("usable");
    assert_eq!((read.model.as_deref(), read.n), (Some("b/c"), None));
    assert_eq!(&body[read.model_span.expect("a model")], br#""b\/c""#);
    let read = peek(br#"{"model":"a","model":null}"#).expect("usable");
    assert_eq!((read.model, read.model_span), (None, None));
}

#[test]
fn wrong_types_are_named() {
    for (body, name) in [
        (r#"{"model":7}"#, "model must be a string"),
        (r#"{"model":"\ud800"}"#, "model must be a string"),
        (r#"{"stream":"yes"}"#, "stream must be true or false"),
        (r#"{"n":0}"#, "n must be a whole number from 1 to 128"),
        (r#"{"n":1.5}"#, "n must be"),
        (r#"{"n":"1"}"#, "n must be"),
        (r#"{"max_tokens":1e3}"#, "max_tokens must be a whole number"),
        (r#"{"max_output_tokens":[]}"#, "max_output_tokens must be"),
        (r#"{"user":{}}"#, "user must be a string"),
        (r#"{"session_id":1}"#, "session_id must be a string"),
        (r#"{"messages":"hi"}"#, "messages must be a list"),
        ("[1]", "not a JSON object"),
        ("", "not JSON"),
        (r#"{"a":1}x"#, "the end was expected at byte 7"),
    ] {
        let error = peek(body.as_bytes()).expect_err(body).to_string();
        assert!(error.contains(name), "{body}: {error}");
    }
}

#[test]
fn what_is_not_json_is_called_so_whatever_its_fields_are() {
    for body in [
        "{\"n\":{}\0",
        "{\"n\":{}",
        r#"{"model":7,"stream":"#,
        r#"{"messages":"hi","x":[}"#,
        r#"{"user":{}}x"#,
        r#"{"model":"\ud800" "n":1}"#,
        "[1]x",
        "1 2",
    ] {
        assert!(matches!(peek(body.as_bytes()), Err(PeekError::Syntax { .. })), "{body:?}");
    }
    let first = peek(br#"{"stream":1,"n":0,"x":[1]}"#);
    assert!(matches!(first, Err(PeekError::Field { name: "stream", .. })), "{first:?}");
}

#[test]
fn depth_is_limited_exactly() {
    for key in ["x", "messages", "prompt"] {
        let nested = |levels: usize| format!(r#"{{"{key}":{}{}}}"#, "[".repeat(levels), "]".repeat(levels));
        let most = DEPTH_MAX as usize - 1;
        assert!(peek(nested(most).as_bytes()).is_ok(), "{key}");
        assert_eq!(peek(nested(most + 1).as_bytes()), Err(PeekError::TooDeep), "{key}");
        // So deep that anything recursive would end the process.
        assert_eq!(peek(nested(1_000_000).as_bytes()), Err(PeekError::TooDeep), "{key}");
    }
    let deep_message = format!(r#"{{"messages":[{{"content":{}1{}}}]}}"#, "[".repeat(125), "]".repeat(125));
    assert!(peek(deep_message.as_bytes()).is_ok());
    assert_eq!(peek(deep_message.replacen(":[[", ":[[[", 1).as_bytes()), Err(PeekError::TooDeep));
}
