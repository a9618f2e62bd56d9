//! HTTP/1.1 byte tables: what the machines in `http` make of a message must not depend on how its
//! bytes were cut, and whatever two implementations could read differently is refused.
//!
//! Each vector runs whole, split in two at every byte, and a byte at a time; all three must agree.

use llama_orch::http::client::ResponseReader;
use llama_orch::http::framing::{BodyDecoder, CHUNK_LINE_BYTES_MAX, TRAILER_BYTES_MAX};
use llama_orch::http::head::{FIELDS_MAX, Fields, Framing, HEAD_BYTES_MAX, Version};
use llama_orch::http::server::{Progress, RequestReader};
use proptest::prelude::*;

/// Body limit of the readers here, in bytes: small, so that its edge can be tried.
const BODY_BYTES_MAX: usize = 1000;

type FieldList = Vec<(String, Vec<u8>)>;

/// What a peer of the server's half observes of one input.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Seen {
    Continue,
    Request {
        line: String,
        version: Version,
        keep_alive: bool,
        fields: FieldList,
        body: Vec<u8>,
    },
    Refused(u16),
    /// Bytes that wait for more behind them.
    Pending(usize),
}

fn listed(fields: &Fields) -> FieldList {
    fields.iter().map(|(name, value)| (name.to_string(), value.to_vec())).collect()
}

/// Feeds `pieces` as a connection would: what is not consumed is offered again with the next piece.
fn serve(pieces: &[&[u8]]) -> Vec<Seen> {
    let (mut reader, mut unread, mut seen) = (RequestReader::new(BODY_BYTES_MAX), Vec::new(), Vec::new());
    for piece in pieces {
        unread.extend_from_slice(piece);
        loop {
            match reader.advance(&unread) {
                Ok((used, progress)) => {
                    unread.drain(..used);
                    match progress {
                        Progress::More => break,
                        Progress::WantsContinue => seen.push(Seen::Continue),
                        Progress::Request(request) => seen.push(Seen::Request {
                            line: format!("{} {}", request.head.method(), request.head.target()),
                            version: request.head.version,
                            keep_alive: request.head.keep_alive,
                            fields: listed(&request.head.fields),
                            body: request.body,
                        }),
                    }
                }
                Err(error) => {
                    seen.push(Seen::Refused(error.status));
                    return seen;
                }
            }
        }
    }
    seen.push(Seen::Pending(unread.len()));
    seen
}

/// What a peer of the client's half observes: the answer, or a refusal.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Answer {
    head: Option<(u16, Framing, bool, FieldList)>,
    data: Vec<u8>,
    finished: bool,
    refused: bool,
    /// Bytes behind the answer's end.
    extra: usize,
}

fn fetch(pieces: &[&[u8]], to_head: bool) -> Answer {
    let mut reader = ResponseReader::new(to_head);
    let mut answer = Answer { head: None, data: Vec::new(), finished: false, refused: false, extra: 0 };
    let mut unread: Vec<u8> = Vec::new();
    for piece in pieces {
        unread.extend_from_slice(piece);
        if answer.head.is_none() {
            match reader.head(&unread) {
                Ok((used, head)) => {
                    unread.drain(..used);
                    answer.head = head.map(|h| (h.status, h.framing, h.keep_alive, listed(&h.fields)));
                }
                Err(error) => {
                    assert_eq!(error.status, 502, "a broken answer is the engine's fault: {error}");
                    answer.refused = true;
                    return answer;
                }
            }
        }
        let Some(body) = reader.body() else { continue };
        if decode(body, &mut unread, &mut answer.data).is_err() {
            answer.refused = true;
            return answer;
        }
    }
    answer.finished = reader.body().is_some_and(|body| body.close());
    answer.extra = if answer.finished { unread.len() } else { 0 };
    answer
}

fn decode(body: &mut BodyDecoder, unread: &mut Vec<u8>, data: &mut Vec<u8>) -> Result<(), u16> {
    while !unread.is_empty() && !body.finished() {
        let piece = body.next(unread).map_err(|error| error.status)?;
        assert!(piece.consumed > 0, "the decoder makes progress on {unread:?}");
        data.extend_from_slice(&unread[piece.data]);
        unread.drain(..piece.consumed);
    }
    Ok(())
}

/// The result of `run` on `bytes` whole, having checked that every cut gives the same.
fn at_every_cut<T: PartialEq + std::fmt::Debug>(bytes: &[u8], run: impl Fn(&[&[u8]]) -> T) -> T {
    let whole = run(&[bytes]);
    for cut in 0..=bytes.len() {
        let split = run(&[&bytes[..cut], &bytes[cut..]]);
        assert_eq!(split, whole, "cut at {cut}: {:?}", String::from_utf8_lossy(bytes));
    }
    let single: Vec<&[u8]> = bytes.chunks(1).collect();
    assert_eq!(run(&single), whole, "byte by byte: {:?}", String::from_utf8_lossy(bytes));
    whole
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// `METHOD target|body` of each request in `bytes`, every cut tried; panics unless all is consumed.
fn requests(bytes: &[u8]) -> Vec<String> {
    let seen = at_every_cut(bytes, serve);
    assert_eq!(seen.last(), Some(&Seen::Pending(0)), "everything is consumed of {:?}", text(bytes));
    let line = |seen: &Seen| match seen {
        Seen::Request { line, body, .. } => Some(format!("{line}|{}", text(body))),
        Seen::Continue => Some("continue".into()),
        _ => None,
    };
    seen.iter().filter_map(line).collect()
}

fn refusal(bytes: &[u8]) -> Option<u16> {
    at_every_cut(bytes, serve).into_iter().find_map(|seen| match seen {
        Seen::Refused(status) => Some(status),
        _ => None,
    })
}

#[test]
fn valid_requests_are_the_same_however_they_were_cut() {
    let table: &[(&[u8], &[&str])] = &[
        (b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", &["GET /|"]),
        (b"GET /a?b=c%20d HTTP/1.1\r\nhOsT: a.example:8080\r\n\r\n", &["GET /a?b=c%20d|"]),
        (b"GET / HTTP/1.1\r\nHost: [::1]:80\r\n\r\n", &["GET /|"]),
        (b"GET / HTTP/1.0\r\n\r\n", &["GET /|"]),
        (b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n", &["OPTIONS *|"]),
        (b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello", &["POST /x|hello"]),
        (b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n", &["POST /x|"]),
        (b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 0005\r\n\r\nhello", &["POST /x|hello"]),
        (b"POST /x HTTP/1.1\r\nHost:a\r\nContent-Length:  5 \t\r\n\r\nhello", &["POST /x|hello"]),
        (
            b"POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
            &["POST /x|hello"],
        ),
        (
            b"POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: Chunked \r\n\r\n0A;n=\"v\";x\r\n0123456789\r\n1\r\nz\r\n000\r\n\r\n",
            &["POST /x|0123456789z"],
        ),
        (
            b"POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\nX-Sum: 1\r\nX-B: \xc3\xa9\r\n\r\n",
            &["POST /x|x"],
        ),
        // Leading empty lines are overlooked, before a first request and between two.
        (b"\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n\r\nGET /2 HTTP/1.1\r\nHost: a\r\n\r\n", &["GET /|", "GET /2|"]),
        // Pipelined, with and without bodies.
        (
            b"POST /1 HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhiPOST /2 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nyo\r\n0\r\n\r\nGET /3 HTTP/1.1\r\nHost: a\r\n\r\n",
            &["POST /1|hi", "POST /2|yo", "GET /3|"],
        ),
        // A body that looks like a request is a body.
        (
            b"POST /1 HTTP/1.1\r\nHost: a\r\nContent-Length: 28\r\n\r\nGET /x HTTP/1.1\r\nHost: b\r\n\r\n",
            &["POST /1|GET /x HTTP/1.1\r\nHost: b\r\n\r\n"],
        ),
        (
            b"POST /x HTTP/1.1\r\nHost: a\r\nExpect: 100-Continue\r\nContent-Length: 2\r\n\r\nhi",
            &["continue", "POST /x|hi"],
        ),
        (
            b"POST /x HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n",
            &["continue", "POST /x|hi"],
        ),
        // Nothing to wait for, and nobody who would understand the interim answer.
        (b"GET / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\n\r\n", &["GET /|"]),
        (b"POST / HTTP/1.0\r\nExpect: 100-continue\r\nContent-Length: 1\r\n\r\nx", &["POST /|x"]),
    ];
    for (bytes, expected) in table {
        assert_eq!(requests(bytes), *expected, "{}", text(bytes));
    }
}

#[test]
fn fields_keep_their_case_order_and_duplicates() {
    let seen = at_every_cut(
        b"GET / HTTP/1.1\r\nHost: a\r\nX-B: 1\r\nx-a:\r\nX-B:\t two words \r\nX-C: \xff\r\n\r\n",
        serve,
    );
    let Some(Seen::Request { fields, .. }) = seen.first() else { panic!("a request, not {seen:?}") };
    let expected: &[(&str, &[u8])] =
        &[("Host", b"a"), ("X-B", b"1"), ("x-a", b""), ("X-B", b"two words"), ("X-C", b"\xff")];
    let found: Vec<(&str, &[u8])> = fields.iter().map(|(n, v)| (n.as_str(), v.as_slice())).collect();
    assert_eq!(found, expected);
}

#[test]
fn version_and_connection_field_decide_on_keeping_the_connection() {
    let table: &[(&str, bool)] = &[
        ("GET / HTTP/1.1\r\nHost: a\r\n", true),
        ("GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n", false),
        ("GET / HTTP/1.1\r\nHost: a\r\nConnection: x, CLOSE\r\n", false),
        ("GET / HTTP/1.1\r\nHost: a\r\nConnection: x\r\nConnection: close\r\n", false),
        ("GET / HTTP/1.1\r\nHost: a\r\nConnection: keep-alive, close\r\n", false),
        ("GET / HTTP/1.0\r\nHost: a\r\n", false),
        ("GET / HTTP/1.0\r\nConnection: Keep-Alive\r\n", true),
        ("GET / HTTP/1.0\r\nConnection: keep-alive, close\r\n", false),
    ];
    for (head, expected) in table {
        let seen = at_every_cut(format!("{head}\r\n").as_bytes(), serve);
        let Some(Seen::Request { keep_alive, .. }) = seen.first() else { panic!("{head}: {seen:?}") };
        assert_eq!(keep_alive, expected, "{head}");
    }
}

#[test]
fn what_could_be_read_in_two_ways_is_refused() {
    let with = |fields: &str| format!("POST / HTTP/1.1\r\nHost: a\r\n{fields}\r\n\r\n").into_bytes();
    let mut table: Vec<(Vec<u8>, u16)> = [
        // Two lengths.
        "Content-Length: 5\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding: chunked\r\nContent-Length: 5",
        "Content-Length: 0\r\nTransfer-Encoding: chunked",
        "Content-Length: 5\r\nContent-Length: 5",
        "Content-Length: 5\r\ncontent-length: 6",
        "Content-Length: 5, 5",
        // Lengths that are none.
        "Content-Length: +1",
        "Content-Length: -0",
        "Content-Length: 0x1",
        "Content-Length: 1_0",
        "Content-Length: 1 0",
        "Content-Length: 1.0",
        "Content-Length:",
        "Content-Length: \u{0661}",
        "Content-Length: 18446744073709551616",
        "Content-Length: 9999999999999999999",
        // Codings.
        "Transfer-Encoding: ,chunked",
        "Transfer-Encoding: chunked,",
        "Transfer-Encoding: xchunked",
        "Transfer-Encoding: chunked, chunked",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding: identity",
        "Transfer-Encoding: gzip, chunked",
        "Transfer-Encoding: chunked, identity",
        "Transfer-Encoding: \"chunked\"",
        "Transfer-Encoding: chunked;q=1",
        "Transfer-Encoding:",
        "Transfer-Encoding: \x0bchunked",
        // Grammar.
        "X: a\r\n b",
        "X: a\r\n\tb",
        " X: a",
        "Content-Length : 5",
        "Transfer-Encoding : chunked",
        "X Y: a",
        "X",
        ": a",
        "X\0: a",
        "X: a\0b",
        "X: a\x7f",
        "X: a\rb",
        "X: a\nY: b",
        "X: a\n",
        "X: \r\r\nY: b",
        "X\u{e9}: a",
        // Hosts.
        "Host: a",
        "host: b",
    ]
    .iter()
    .map(|fields| (with(fields), 400))
    .collect();
    let whole: &[(&[u8], u16)] = &[
        (b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost:\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: user@a\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a/b\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a, b\r\n\r\n", 400),
        (b"GET / HTTP/1.0\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        (b"GET / HTTP/1.0\r\nHost: u@a\r\n\r\n", 400),
        // Line ends.
        (b"GET / HTTP/1.1\nHost: a\n\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\n\r\n", 400),
        (b"GET / HTTP/1.1\nHost: a\r\n\r\n", 400),
        (b"\nGET / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"\r\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"GET / HTTP/1.1\rHost: a\r\r\n\r\n", 400),
        // Request lines.
        (b"GET  / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b" GET / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"GET / HTTP/1.1 \r\nHost: a\r\n\r\n", 400),
        (b"GET\t/ HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"GET /a b HTTP/1.1\r\nHost: a\r\n\r\n", 505),
        (b"GET /\x00 HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"GET /\xc3\xa9 HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"GET /a#b HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"GET * HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"GET a HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"GET http://a/ HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"G@T / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"G\"T / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"GET / http/1.1\r\nHost: a\r\n\r\n", 505),
        (b"GET /\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\r\n\r\n", 400),
        // Other protocols and methods that a gateway must not take.
        (b"GET / HTTP/2.0\r\nHost: a\r\n\r\n", 505),
        (b"GET / HTTP/1.2\r\nHost: a\r\n\r\n", 505),
        (b"GET / HTTP/0.9\r\nHost: a\r\n\r\n", 505),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
        (b"CONNECT a:443 HTTP/1.1\r\nHost: a:443\r\n\r\n", 501),
        (b"TRACE / HTTP/1.1\r\nHost: a\r\n\r\n", 501),
        // Expectations.
        (b"POST / HTTP/1.1\r\nHost: a\r\nExpect: 200-ok\r\nContent-Length: 1\r\n\r\nx", 417),
        (b"POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue, x\r\nContent-Length: 1\r\n\r\nx", 417),
        (
            b"POST / HTTP/1.1\r\nHost: a\r\nExpect: x\r\nExpect: 100-continue\r\nContent-Length: 1\r\n\r\nx",
            417,
        ),
        // A refused body is not asked for.
        (b"POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 1001\r\n\r\n", 413),
    ];
    table.extend(whole.iter().map(|(bytes, status)| (bytes.to_vec(), *status)));
    let mut wrong = Vec::new();
    for (bytes, status) in &table {
        let seen = at_every_cut(bytes, serve);
        if seen != [Seen::Refused(*status)] {
            wrong.push(format!("{:?}: {seen:?} instead of {status}", text(bytes)));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn an_upgrade_is_answered_in_the_protocol_that_it_came_in() {
    let bytes = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: x\r\n\r\n";
    assert_eq!(requests(bytes), ["GET /|"]);
}

#[test]
fn broken_chunks_are_refused() {
    let long = |length: usize| format!("1;{}\r\nx\r\n0\r\n\r\n", "e".repeat(length));
    let trailer = |length: usize| format!("0\r\nX: {}\r\n\r\n", "t".repeat(length));
    let (line_max, trailer_max) = (CHUNK_LINE_BYTES_MAX as usize, TRAILER_BYTES_MAX as usize);
    let table: &[(String, Option<u16>)] = &[
        ("".into(), None),
        ("\r\n".into(), Some(400)),
        (";\r\n".into(), Some(400)),
        ("g\r\n".into(), Some(400)),
        ("0x1\r\nx\r\n0\r\n\r\n".into(), Some(400)),
        ("1_0\r\n".into(), Some(400)),
        ("+1\r\nx\r\n".into(), Some(400)),
        ("-1\r\nx\r\n".into(), Some(400)),
        (" 1\r\nx\r\n".into(), Some(400)),
        ("1 \r\nx\r\n".into(), Some(400)),
        ("1\nx\n0\n\n".into(), Some(400)),
        ("1\rx\r\n".into(), Some(400)),
        ("1\r\nxx\r\n0\r\n\r\n".into(), Some(400)),
        ("1\r\nx0\r\n\r\n".into(), Some(400)),
        ("1\r\nx\n0\r\n\r\n".into(), Some(400)),
        ("1;a\x00b\r\nx\r\n".into(), Some(400)),
        ("1;a\nx\r\n0\r\n\r\n".into(), Some(400)),
        ("10000000000000000\r\n".into(), Some(400)),
        ("ffffffffffffffff\r\n".into(), Some(400)),
        ("fffffffffffffffff\r\n".into(), Some(400)),
        ("0000000000000001\r\nx\r\n0\r\n\r\n".into(), Some(400)),
        ("0\r\nX: a\nY: b\r\n\r\n".into(), Some(400)),
        ("0\r\nX: a\x00\r\n\r\n".into(), Some(400)),
        ("0\r\nX: a\rb\r\n\r\n".into(), Some(400)),
        ("0\r\n\n".into(), Some(400)),
        (long(line_max - 2), None),
        (long(line_max - 1), Some(400)),
        (long(64 * 1024), Some(400)),
        (trailer(trailer_max - 4), None),
        (trailer(trailer_max), Some(400)),
    ];
    for (body, status) in table {
        let bytes = format!("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n{body}");
        // Cutting the long ones at every byte would be slow and show nothing more.
        let seen = if body.len() > 1000 {
            let seen = serve(&[bytes.as_bytes()]);
            assert_eq!(serve(&bytes.as_bytes().chunks(1).collect::<Vec<_>>()), seen, "{} bytes", body.len());
            seen
        } else {
            at_every_cut(bytes.as_bytes(), serve)
        };
        let refused = seen.iter().find_map(|seen| match seen {
            Seen::Refused(status) => Some(*status),
            _ => None,
        });
        assert_eq!(refused, *status, "{:.60?} of {} bytes", body, body.len());
    }
}

/// A request whose head is exactly this long.
fn head_of(length: usize) -> Vec<u8> {
    let frame = "GET / HTTP/1.1\r\nHost: a\r\nX: \r\n\r\n";
    format!("GET / HTTP/1.1\r\nHost: a\r\nX: {}\r\n\r\n", "x".repeat(length - frame.len())).into_bytes()
}

#[test]
fn limits_hold_to_the_byte() {
    for (length, status) in
        [(HEAD_BYTES_MAX - 1, None), (HEAD_BYTES_MAX, None), (HEAD_BYTES_MAX + 1, Some(431))]
    {
        let mut bytes = head_of(length);
        let whole = serve(&[&bytes]);
        assert_eq!(whole == [Seen::Refused(431)], status.is_some(), "a head of {length} bytes");
        assert_eq!(serve(&bytes.chunks(1).collect::<Vec<_>>()), whole, "a head of {length} bytes, dripping");
        for cut in length - 6..bytes.len() {
            assert_eq!(
                serve(&[&bytes[..cut], &bytes[cut..]]),
                whole,
                "a head of {length} bytes cut at {cut}"
            );
        }
        // What is pipelined behind it does not count.
        bytes.extend_from_slice(b"GET /2 HTTP/1.1\r\nHost: a\r\n\r\n");
        assert_eq!(serve(&[&bytes]).len(), if status.is_some() { 1 } else { 3 }, "{length} bytes, pipelined");
    }
    assert_eq!(serve(&[&[b'x'; HEAD_BYTES_MAX - 1]]), [Seen::Pending(HEAD_BYTES_MAX - 1)]);
    assert_eq!(serve(&[&[b'x'; HEAD_BYTES_MAX]]), [Seen::Refused(431)], "a head that never ends");

    for (count, status) in [(FIELDS_MAX - 1, None), (FIELDS_MAX, None), (FIELDS_MAX + 1, Some(431))] {
        let fields = "X: y\r\n".repeat(count - 1);
        let bytes = format!("GET / HTTP/1.1\r\nHost: a\r\n{fields}\r\n");
        assert_eq!(refusal(bytes.as_bytes()), status, "{count} fields");
    }

    for (length, status) in
        [(BODY_BYTES_MAX - 1, None), (BODY_BYTES_MAX, None), (BODY_BYTES_MAX + 1, Some(413))]
    {
        let body = "b".repeat(length);
        let sized = format!("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: {length}\r\n\r\n{body}");
        assert_eq!(refusal(sized.as_bytes()), status, "a body of {length} bytes");
        let chunked = "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n";
        let one = format!("{chunked}{length:x}\r\n{body}\r\n0\r\n\r\n");
        assert_eq!(refusal(one.as_bytes()), status, "a chunk of {length} bytes");
        let many = format!("{chunked}{}0\r\n\r\n", "1\r\nb\r\n".repeat(length));
        assert_eq!(serve(&[many.as_bytes()])[0] == Seen::Refused(413), status.is_some(), "{length} chunks");
    }
}

#[test]
fn a_line_feed_alone_is_refused_whatever_the_head_grows_to() {
    let mut bytes = b"GET / HTTP/1.1\nX: ".to_vec();
    bytes.resize(HEAD_BYTES_MAX + 10, b'x');
    assert_eq!(serve(&[&bytes]), [Seen::Refused(400)]);
    assert_eq!(serve(&bytes.chunks(1000).collect::<Vec<_>>()), [Seen::Refused(400)]);
}

#[test]
fn answers_are_the_same_however_they_were_cut() {
    // (bytes, to a HEAD request, status, framing, kept alive, data, complete at close, bytes behind)
    type Row = (&'static [u8], bool, u16, Framing, bool, &'static [u8], bool, usize);
    let table: &[Row] = &[
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", false, 200, Framing::Length(2), true, b"hi", true, 0),
        (b"HTTP/1.1 200\r\nContent-Length: 2\r\n\r\nhi", false, 200, Framing::Length(2), true, b"hi", true, 0),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nhi", false, 200, Framing::Length(3), true, b"hi", false, 0),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", false, 200, Framing::Empty, true, b"", true, 0),
        (b"HTTP/1.1 200 OK\r\n\r\nhi", false, 200, Framing::UntilClose, false, b"hi", true, 0),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nhi", false, 200, Framing::Length(2), false, b"hi", true, 0),
        (
            b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 2\r\n\r\nhi",
            false,
            200,
            Framing::Length(2),
            true,
            b"hi",
            true,
            0,
        ),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n3;x\r\nyou\r\n0\r\nT: v\r\n\r\n",
            false,
            200,
            Framing::Chunked,
            true,
            b"hiyou",
            true,
            0,
        ),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n",
            false,
            200,
            Framing::Chunked,
            true,
            b"hi",
            false,
            0,
        ),
        // Interim answers are skipped.
        (
            b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 201 Created\r\nContent-Length: 1\r\n\r\nx",
            false,
            201,
            Framing::Length(1),
            true,
            b"x",
            true,
            0,
        ),
        // Answers that have no body whatever they say; what follows is not theirs.
        (b"HTTP/1.1 204 No Content\r\nContent-Length: 2\r\n\r\nhi", false, 204, Framing::Empty, true, b"", true, 2),
        (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 2\r\n\r\n", false, 304, Framing::Empty, true, b"", true, 0),
        (
            b"HTTP/1.1 204 No Content\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            false,
            204,
            Framing::Empty,
            true,
            b"",
            true,
            5,
        ),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 20\r\n\r\n", true, 200, Framing::Empty, true, b"", true, 0),
        (b"HTTP/1.1 200 OK\r\n\r\n", true, 200, Framing::Empty, true, b"", true, 0),
        // Bytes behind the end are left alone.
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhiHTTP/1.1", false, 200, Framing::Length(2), true, b"hi", true, 8),
        (
            b"HTTP/1.1 500 Internal Server Error\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n0\r\n\r\nxyz",
            false,
            500,
            Framing::Chunked,
            false,
            b"",
            true,
            3,
        ),
    ];
    for (bytes, to_head, status, framing, keep_alive, data, finished, extra) in table {
        let answer = at_every_cut(bytes, |pieces| fetch(pieces, *to_head));
        let name = text(bytes);
        let (found, found_framing, kept, _) = answer.head.clone().expect("a head");
        assert_eq!((found, found_framing, kept), (*status, *framing, *keep_alive), "{name}");
        assert_eq!((answer.data.as_slice(), answer.finished), (*data, *finished), "{name}");
        assert_eq!((answer.refused, answer.extra), (false, *extra), "{name}");
    }
}

#[test]
fn answers_that_are_no_answers_are_refused() {
    let table: &[&[u8]] = &[
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\nx",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length : 1\r\n\r\nx",
        b"HTTP/1.1 200 OK\r\nX: a\r\n b\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\nContent-Length: 0\n\n",
        b"HTTP/2 200\r\n\r\n",
        b"HTTP/1.1 099 x\r\n\r\n",
        b"HTTP/1.1 20 OK\r\n\r\n",
        b"HTTP/1.1 2000 OK\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n",
        b"ICY 200 OK\r\n\r\n",
        b"\r\n\r\n",
        b"garbage\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ];
    for bytes in table {
        let answer = at_every_cut(bytes, |pieces| fetch(pieces, false));
        assert!(answer.refused, "{:?} gave {answer:?}", text(bytes));
    }
    let endless = b"HTTP/1.1 100 Continue\r\n\r\n".repeat(9);
    assert!(at_every_cut(&endless, |pieces| fetch(pieces, false)).refused, "interim answers without an end");
    let mut long = b"HTTP/1.1 200 OK\r\nX: ".to_vec();
    long.resize(HEAD_BYTES_MAX, b'x');
    assert!(fetch(&[&long], false).refused, "a head without an end");
}

#[test]
fn only_the_gap_between_two_chunks_takes_a_foreign_chunk() {
    let body = b"3\r\nabc\r\nA;e\r\n0123456789\r\n0\r\nT: v\r\n\r\n";
    let gaps: Vec<usize> = (0..body.len())
        .filter(|at| {
            let mut decoder = BodyDecoder::new(Framing::Chunked);
            let mut unread = body[..*at].to_vec();
            decode(&mut decoder, &mut unread, &mut Vec::new()).expect("good chunks");
            decoder.between_chunks()
        })
        .collect();
    assert_eq!(gaps, [0, 8, 25]);
}

/// Bytes that get further into the machines than noise does.
fn fragment() -> impl Strategy<Value = Vec<u8>> {
    const KNOWN: &[&[u8]] = &[
        b"GET / HTTP/1.1\r\n",
        b"POST /x HTTP/1.1\r\nHost: a\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc",
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n",
        b"Host: a\r\n",
        b"Content-Length: 10\r\n",
        b"Transfer-Encoding: chunked\r\n",
        b"Expect: 100-continue\r\n",
        b"Connection: close\r\n",
        b"\r\n",
        b"\r\n\r\n",
        b"\n",
        b"\r",
        b"0\r\n\r\n",
        b"5\r\nhello\r\n",
        b"3;x=y\r\nabc\r\n",
        b"3e8\r\n",
        b"0\r\n",
        b"X: y\r\n",
        b"\0",
        b" ",
    ];
    prop_oneof![
        6 => proptest::sample::select(KNOWN).prop_map(<[u8]>::to_vec),
        1 => proptest::collection::vec(any::<u8>(), 0..40),
        1 => proptest::collection::vec(Just(b'b'), 990..1010),
    ]
}

fn cut_at<'b>(bytes: &'b [u8], cuts: &[prop::sample::Index]) -> Vec<&'b [u8]> {
    let mut at: Vec<usize> = cuts.iter().map(|cut| cut.index(bytes.len() + 1)).collect();
    at.sort_unstable();
    at.push(bytes.len());
    let mut from = 0;
    at.into_iter().map(|to| &bytes[std::mem::replace(&mut from, to)..to]).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn no_bytes_panic_and_no_cut_changes_what_is_read(
        fragments in proptest::collection::vec(fragment(), 0..12),
        cuts in proptest::collection::vec(any::<prop::sample::Index>(), 0..8),
        to_head in any::<bool>(),
    ) {
        let bytes = fragments.concat();
        let pieces = cut_at(&bytes, &cuts);
        prop_assert_eq!(serve(&pieces), serve(&[&bytes]));
        prop_assert_eq!(fetch(&pieces, to_head), fetch(&[&bytes], to_head));
    }

    #[test]
    fn a_body_survives_any_chunking_and_any_cut(
        chunks in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 1..60), 0..12),
        cuts in proptest::collection::vec(any::<prop::sample::Index>(), 0..8),
    ) {
        let mut bytes = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n".to_vec();
        for chunk in &chunks {
            llama_orch::http::server::encode_chunk(&mut bytes, chunk);
        }
        bytes.extend_from_slice(llama_orch::http::server::LAST_CHUNK);
        let seen = serve(&cut_at(&bytes, &cuts));
        let Some(Seen::Request { body, .. }) = seen.first() else { panic!("a request, not {seen:?}") };
        prop_assert_eq!(body, &chunks.concat());
    }
}
