//! What reading HTTP costs: heads of a usual and of a large size, a chunked event stream, and a whole
//! small request. These run once a request, or once for every 64 KiB of a relayed stream.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use llama_orch::http::framing::BodyDecoder;
use llama_orch::http::head::{Framing, parse_request, parse_response};
use llama_orch::http::server::{LAST_CHUNK, Progress, RequestReader, encode_chunk};

/// A head as an OpenAI client sends it, padded to `length` bytes with further fields.
fn request_head(length: usize, body_bytes: usize) -> Vec<u8> {
    let mut head = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nHost: gateway.example:8080\r\nAccept: application/json\r\nAccept-Encoding: gzip, deflate\r\nConnection: keep-alive\r\nContent-Type: application/json\r\nUser-Agent: OpenAI/Python 3.0.0\r\nAuthorization: Bearer 0123456789abcdef0123456789abcdef\r\nX-Stainless-Lang: python\r\nContent-Length: {body_bytes}\r\n"
    )
    .into_bytes();
    let mut number = 0;
    while head.len() + 80 < length {
        number += 1;
        head.extend_from_slice(format!("X-Field-{number:03}: {}\r\n", "v".repeat(60)).as_bytes());
    }
    let frame = "X-Pad: \r\n\r\n".len();
    let pad = "p".repeat(length.saturating_sub(head.len() + frame));
    head.extend_from_slice(format!("X-Pad: {pad}\r\n\r\n").as_bytes());
    head
}

fn heads(c: &mut Criterion) {
    let mut group = c.benchmark_group("head");
    for length in [400, 2048] {
        let head = request_head(length, 0);
        assert_eq!(head.len(), length, "the bench says what it measures");
        group.throughput(Throughput::Bytes(head.len() as u64));
        group.bench_function(format!("request_{length}_bytes"), |b| {
            b.iter(|| parse_request(black_box(&head)).expect("a good head"));
        });
    }
    let head = b"HTTP/1.1 200 OK\r\nServer: llama.cpp\r\nAccess-Control-Allow-Origin: \r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\nKeep-Alive: timeout=5, max=100\r\n\r\n";
    group.throughput(Throughput::Bytes(head.len() as u64));
    group.bench_function("response", |b| {
        b.iter(|| parse_response(black_box(head), false).expect("a good head"));
    });
    group.finish();
}

fn bodies(c: &mut Criterion) {
    let event = b"data: {\"id\":\"chatcmpl-1\",\"object\":\"chat.completion.chunk\",\"choices\":[{\"index\":0,\"delta\":{\"content\":\" token\"}}]}\n\n";
    let mut stream = Vec::new();
    while stream.len() < 64 * 1024 {
        encode_chunk(&mut stream, event);
    }
    stream.extend_from_slice(LAST_CHUNK);
    let mut group = c.benchmark_group("body");
    group.throughput(Throughput::Bytes(stream.len() as u64));
    group.bench_function("chunked_events_64_kib", |b| {
        b.iter(|| {
            let mut decoder = BodyDecoder::new(Framing::Chunked);
            let (mut at, mut data) = (0, 0);
            while !decoder.finished() {
                let piece = decoder.next(black_box(&stream[at..])).expect("good chunks");
                at += piece.consumed;
                data += piece.data.len();
            }
            data
        });
    });
    group.finish();
}

fn requests(c: &mut Criterion) {
    let mut request = request_head(400, 100);
    request.extend_from_slice(&[b'b'; 100]);
    let mut group = c.benchmark_group("reader");
    group.throughput(Throughput::Bytes(request.len() as u64));
    group.bench_function("post_500_bytes", |b| {
        let mut reader = RequestReader::new(1 << 20);
        b.iter(|| match reader.advance(black_box(&request)).expect("a good request") {
            (used, Progress::Request(request)) => (used, request),
            (used, other) => panic!("a request, not {other:?} after {used} bytes"),
        });
    });
    group.finish();
}

criterion_group!(benches, heads, bodies, requests);
criterion_main!(benches);
