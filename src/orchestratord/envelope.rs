//! What travels beside a body: the fields of a client's request that go to an engine, and those that an
//! engine's answer gets on its way back. Pure.
//!
//! The engine is sent the client's fields without what concerns one connection, our credentials, and
//! whatever only we may say; the names of the request, as the client will read them; and its trace, if
//! that is well formed. The answer keeps every field of the engine, and says which replica gave it.

use crate::http::fields::{FieldLines, same_name};
use crate::http::head::{Fields, RequestHead};
use crate::net::{HOPS_FIELD, forwardable};

use super::core::Dispatch;

/// A request that has passed so many control planes is refused: one behind another is somebody's wish, one
/// more is a circle, in which every request would take all slots there are.
pub const HOPS_MAX: u32 = 2;

/// Bytes that are allocated at first for the fields that an answer gets.
const ANSWER_FIRST_ALLOCATION_BYTES: usize = 384;

/// How many control planes a request has passed. What is no number, or stands twice, counts as too many.
#[must_use]
pub fn hops(fields: &Fields) -> u32 {
    match (fields.count(HOPS_FIELD), fields.get(HOPS_FIELD)) {
        (0, _) => 0,
        (1, Some(value)) => value.parse().unwrap_or(HOPS_MAX),
        _ => HOPS_MAX,
    }
}

/// Fields for an engine. `request_id` and `correlation` are the names under which the request is known
/// here, whether the client gave them or not.
#[must_use]
pub fn to_engine(head: &RequestHead, request_id: &str, correlation: &str) -> FieldLines {
    let trace = has_good_trace(&head.fields);
    let mut fields = forwardable(head, |name| {
        let is = |other: &str| same_name(name, other.as_bytes());
        is(HOPS_FIELD)
            || is("x-request-id")
            || is("x-correlation-id")
            || !trace && (is("traceparent") || is("tracestate"))
    });
    fields.push_number(HOPS_FIELD, hops(&head.fields).saturating_add(1).into());
    fields.push("X-Request-Id", request_id);
    fields.push("X-Correlation-Id", correlation);
    fields
}

/// Fields for the answer. `queue_ms`: from the request's arrival until it was sent to the engine that
/// answers, vain attempts included.
#[must_use]
pub fn to_client(dispatch: &Dispatch, queue_ms: u64, attempts: u32) -> FieldLines {
    let mut fields = FieldLines::with_capacity(ANSWER_FIRST_ALLOCATION_BYTES);
    fields.push("x-llorch-node", dispatch.node.as_str());
    fields.push("x-llorch-pool", dispatch.key.pool.as_str());
    fields.push("x-llorch-replica", dispatch.key.replica.as_str());
    fields.push_number("x-llorch-queue-ms", queue_ms);
    fields.push_number("x-llorch-attempts", attempts.into());
    fields
}

/// Whether there is one `traceparent`, and it has the shape that W3C Trace Context gives it: a version, the
/// ids of the trace and of the caller, and flags. Later versions may go on behind them.
fn has_good_trace(fields: &Fields) -> bool {
    let Some(value) = fields.get("traceparent").filter(|_| fields.count("traceparent") == 1) else {
        return false;
    };
    let parts: Vec<&str> = value.splitn(5, '-').collect();
    let hex = |part: &str, length: usize| {
        part.len() == length && part.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
    };
    let named = |part: &str, length: usize| hex(part, length) && part.bytes().any(|b| b != b'0');
    match parts.as_slice() {
        [version, trace, parent, flags, rest @ ..] => {
            hex(version, 2)
                && *version != "ff"
                && named(trace, 32)
                && named(parent, 16)
                && hex(flags, 2)
                && (rest.is_empty() || *version != "00")
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::head::parse_request;

    const TRACE: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    fn sent(fields: &str) -> String {
        let head = format!("POST /v1/completions HTTP/1.1\r\nHost: a\r\n{fields}\r\n");
        let head = parse_request(head.as_bytes()).expect("a head");
        let fields = to_engine(&head, "id-1", "c-1");
        String::from_utf8_lossy(fields.as_bytes()).replace('\r', "")
    }

    #[test]
    fn the_request_is_named_once_and_only_we_speak_for_ourselves() {
        let fields = sent(
            "X-Request-ID: theirs\r\nx-correlation-id: theirs\r\nX-Llorch-Slots: 99\r\nx-llorch-node: n\r\nAuthorization: Bearer t\r\nX-Custom: kept\r\nUser-Agent: u\r\n",
        );
        assert_eq!(
            fields,
            "X-Custom: kept\nUser-Agent: u\nX-LLorch-Hops: 1\nX-Request-Id: id-1\nX-Correlation-Id: c-1\n"
        );
    }

    #[test]
    fn control_planes_are_counted_and_nonsense_counts_as_too_many() {
        let count = |fields: &str| {
            let head = format!("POST / HTTP/1.1\r\nHost: a\r\n{fields}\r\n");
            hops(&parse_request(head.as_bytes()).expect("a head").fields)
        };
        for (fields, expected) in [
            ("", 0),
            ("x-llorch-hops: 1\r\n", 1),
            ("X-LLORCH-HOPS: 7\r\n", 7),
            ("X-LLorch-Hops: -1\r\n", HOPS_MAX),
            ("X-LLorch-Hops:\r\n", HOPS_MAX),
            ("X-LLorch-Hops: 0\r\nX-LLorch-Hops: 0\r\n", HOPS_MAX),
        ] {
            assert_eq!(count(fields), expected, "{fields}");
        }
        assert!(sent("X-LLorch-Hops: 1\r\n").contains("X-LLorch-Hops: 2\n"));
    }

    #[test]
    fn good_traces_go_on_and_bad_ones_end_with_their_state() {
        let good = [TRACE.to_string(), format!("cc-{}-and-more", &TRACE[3..])];
        for good in good {
            let fields = sent(&format!("traceparent: {good}\r\ntracestate: a=1\r\n"));
            assert!(fields.contains(&good) && fields.contains("tracestate: a=1"), "{fields}");
        }
        let bad = [
            "1".to_string(),
            TRACE.to_uppercase(),
            TRACE.replace("4bf92f3577b34da6a3ce929d0e0e4736", &"0".repeat(32)),
            TRACE.replace("00f067aa0ba902b7", &"0".repeat(16)),
            TRACE.replacen("00", "ff", 1),
            format!("{TRACE}-more"),
            format!("{TRACE}\r\ntraceparent: {TRACE}"),
        ];
        for bad in bad {
            let fields = sent(&format!("traceparent: {bad}\r\ntracestate: a=1\r\n"));
            assert!(!fields.contains("trace"), "{bad}: {fields}");
        }
    }
}
