//! Where in a JSON text something stands: `pools[3].replicas[0].url`.
//!
//! A parser says at which line and column it gave up; people who send a snapshot of hundreds of engines
//! want to know which of them is meant.

use serde::de::DeserializeOwned;

/// Deepest nesting that is followed: the parser itself goes no deeper.
const DEPTH_MAX: usize = 128;
/// Names are cut at this length, in characters.
const NAME_CHARS_MAX: usize = 64;
/// Explanations are cut at this length, in characters: parsers repeat what they found.
const REASON_CHARS_MAX: usize = 300;

/// Reads JSON. What cannot be read is explained together with its place.
///
/// # Errors
/// A sentence that begins with the place, unless that is the whole text.
pub fn read<T: DeserializeOwned>(text: &[u8]) -> Result<T, String> {
    serde_json::from_slice(text).map_err(|error| {
        let mut reason: String = error.to_string().chars().take(REASON_CHARS_MAX).collect();
        if reason.len() < error.to_string().len() {
            reason.push_str("...");
        }
        match place(text, error.line(), error.column()) {
            place if place.is_empty() => reason,
            place => format!("{place}: {reason}"),
        }
    })
}

/// What a parser says of a text that may be a prompt: where it gave up and why, without the text that it
/// found there.
#[must_use]
pub fn discreet(error: &serde_json::Error) -> String {
    let said = error.to_string();
    match (said.find('"'), said.rfind('"')) {
        (Some(first), Some(last)) if first < last => {
            format!("{}\"...\"{}", &said[..first], &said[last + 1..])
        }
        _ => said,
    }
}

/// Object or array that is open at some point of the text.
enum Open {
    /// The name whose value comes or came last, and whether a name is expected.
    Object(String, bool),
    /// The element that comes or came last.
    Array(usize),
}

/// The path to what ends or stands at a line and column, both counted from 1.
fn place(text: &[u8], line: usize, column: usize) -> String {
    let start = text.split_inclusive(|b| *b == b'\n').take(line.saturating_sub(1)).map(<[u8]>::len).sum();
    let end = text.len().min(usize::saturating_add(start, column));
    let mut open: Vec<Open> = Vec::new();
    let mut at = 0;
    while at < end {
        match text[at] {
            b'"' => {
                let after = end_of_string(text, at);
                if let Some(Open::Object(name, true)) = open.last_mut() {
                    let inner = &text[at + 1..after.saturating_sub(1).max(at + 1).min(text.len())];
                    *name = String::from_utf8_lossy(inner).chars().take(NAME_CHARS_MAX).collect();
                }
                at = after;
                continue;
            }
            b'{' if open.len() < DEPTH_MAX => open.push(Open::Object(String::new(), true)),
            b'[' if open.len() < DEPTH_MAX => open.push(Open::Array(0)),
            b'}' | b']' => drop(open.pop()),
            b':' => {
                if let Some(Open::Object(_, expects_name)) = open.last_mut() {
                    *expects_name = false;
                }
            }
            b',' => match open.last_mut() {
                Some(Open::Object(name, expects_name)) => {
                    name.clear();
                    *expects_name = true;
                }
                Some(Open::Array(index)) => *index += 1,
                None => {}
            },
            _ => {}
        }
        at += 1;
    }
    let mut path = String::new();
    for level in &open {
        match level {
            Open::Object(name, _) if name.is_empty() => {}
            Open::Object(name, _) => {
                path.push_str(if path.is_empty() { "" } else { "." });
                path.extend(name.chars().map(|c| if c.is_control() { ' ' } else { c }));
            }
            Open::Array(index) => path.push_str(&format!("[{index}]")),
        }
    }
    path
}

/// The index behind the closing quote of the string that begins at `at`.
fn end_of_string(text: &[u8], at: usize) -> usize {
    let mut at = at + 1;
    while at < text.len() {
        match text[at] {
            b'\\' => at += 2,
            b'"' => return at + 1,
            _ => at += 1,
        }
    }
    text.len()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::node::{Heartbeat, RegisterRequest};

    #[test]
    fn the_place_of_a_mistake_is_named() {
        for (body, start, reason) in [
            (r#"{"pools":[{"pool_id":"p"},{"pool_id":"a/b"}]}"#, "pools[1].pool_id: ", "is not an id"),
            (r#"{"pools":[{"pool_id":"p","slots_free":-1}]}"#, "pools[0].slots_free: ", "-1"),
            (r#"{"pools":[{"pool_id":"p","slots_free":4294967296}]}"#, "pools[0].slots_free: ", "4294967296"),
            (r#"{"seq":18446744073709551616}"#, "seq: ", "e+19"),
            (r#"{"incarnation":"1","pools":[]}"#, "incarnation: ", "invalid type"),
            ("{\"pools\":[\n{\"pool_id\":\"p\",\n\"ready\":\n1}]}", "pools[0].ready: ", "invalid type"),
            (r#"{"pools":[{"ready":true}]}"#, "pools[0]: ", "missing field `pool_id`"),
            (r#"{"pools":7}"#, "pools: ", "invalid type"),
            (
                r#"{"pools":[{"pool_id":"p","replicas":[{"replica_id":"r","url":"http://u@h:1"}]}]}"#,
                "pools[0].replicas[0].url: ",
                "user name or password",
            ),
            (r#"{"pools":[{"pool_id":"p","pool_id":"q"}]}"#, "pools[0]", "duplicate field `pool_id`"),
            (r#"{"pools":[{"pool_id":"#, "pools[0].pool_id: ", "EOF"),
            ("", "EOF", ""),
            ("[1,", "", ""),
        ] {
            let error = read::<Heartbeat>(body.as_bytes()).expect_err(body);
            assert!(error.starts_with(start) && error.contains(reason), "{body}: {error}");
        }
        let error = read::<RegisterRequest>(br#"{"node_id":"n"}"#).expect_err("no address");
        assert!(error.starts_with("missing field `address`"), "{error}");
    }

    #[test]
    fn what_was_sent_is_not_repeated_at_length() {
        let long = format!(r#"{{"seq":"{}"}}"#, "x".repeat(100_000));
        let error = read::<Heartbeat>(long.as_bytes()).expect_err("no number");
        assert!(error.len() < 1_000 && error.starts_with("seq: "), "{error}");
        let deep = "[".repeat(100_000);
        assert!(read::<Heartbeat>(deep.as_bytes()).expect_err("no heartbeat").len() < 1_000);
        let deep = format!(r#"{{"pools":{}"#, "[".repeat(100_000));
        assert!(read::<Heartbeat>(deep.as_bytes()).expect_err("no heartbeat").len() < 2_000);
    }

    proptest::proptest! {
        /// Whatever is sent, there is an explanation of bounded length.
        #[test]
        fn anything_is_explained(text in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..200)) {
            if let Err(error) = read::<Heartbeat>(&text) {
                proptest::prop_assert!(!error.is_empty() && error.len() < 20_000);
            }
        }

        #[test]
        fn any_part_of_a_heartbeat_is_explained(length in 0usize..90) {
            let whole = br#"{"seq":1,"pools":[{"pool_id":"p","replicas":[{"replica_id":"r","url":"http://h:1","x":[1,2]}]}]}"#;
            let error = read::<Heartbeat>(&whole[..length]).expect_err("a part");
            proptest::prop_assert!(error.contains("EOF"), "{}", error);
        }
    }
}
