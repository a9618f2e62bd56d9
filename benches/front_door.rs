//! What the front door adds to a request: reading its body (500 bytes, 16 KiB, 1 MiB, as text and as an
//! image in base64), noting what became of it, and what a page of a listing costs the loop.

use std::fmt::Write;
use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use llama_orch::orchestratord::explain::{Considered, Explain, Outcome, Received};
use llama_orch::orchestratord::pages::{PAGE_MAX, Page, nodes, pools};
use llama_orch::orchestratord::peek::peek;
use llama_orch::orchestratord::poller::Poller;
use llama_orch::orchestratord::service_registry::{Limits, ServiceRegistry};
use llama_orch::time::Now;
use llama_orch::wire::id::{NodeId, PoolId, ReplicaId, ReplicaKey};
use llama_orch::wire::node::{Heartbeat, RegisterRequest};

/// A chat whose body has about `length` bytes, in turns of some words with line ends and quotes.
fn chat(length: usize) -> String {
    let mut body = String::from(
        r#"{"model":"org/model","stream":true,"temperature":0.7,"messages":[{"role":"system","content":"You are helpful."}"#,
    );
    let mut turn = 0;
    while body.len() + 60 < length {
        let role = if turn % 2 == 0 { "user" } else { "assistant" };
        let words = "the quick brown fox said \\\"jumps\\\" over the lazy dog\\n".repeat(8);
        let room = length.saturating_sub(body.len() + 60).min(words.len());
        // Not in the middle of an escape.
        let end = words[..room].rfind(' ').unwrap_or(0);
        let _ = write!(body, r#",{{"role":"{role}","content":"{} "}}"#, &words[..end]);
        turn += 1;
    }
    body + r#"],"max_tokens":256}"#
}

fn image(length: usize) -> String {
    format!(
        r#"{{"model":"m","messages":[{{"role":"user","content":[{{"type":"image_url","image_url":{{"url":"data:image/png;base64,{}"}}}}]}}]}}"#,
        "iVBORw0KGgoAAAANSUhEUgAAAAUA".repeat(length / 28)
    )
}

fn bodies(c: &mut Criterion) {
    let mut group = c.benchmark_group("peek");
    let table = [
        ("chat_500_bytes", chat(500)),
        ("chat_16_kib", chat(16 << 10)),
        ("chat_1_mib", chat(1 << 20)),
        ("image_1_mib", image(1 << 20)),
    ];
    for (name, body) in table {
        let read = peek(body.as_bytes()).expect("a usable body");
        assert!(read.model.is_some() && read.prefix_hash.is_some(), "{name}");
        group.throughput(Throughput::Bytes(body.len() as u64));
        group.bench_function(name, |b| b.iter(|| peek(black_box(body.as_bytes())).is_ok()));
    }
    group.finish();
}

fn explain(c: &mut Criterion) {
    let node = NodeId::new("gpu-00001").expect("an id");
    let (pool, replica) = (PoolId::new("pool-0").expect("an id"), ReplicaId::new("r0").expect("an id"));
    let key = ReplicaKey { pool, replica };
    let (now, mut number) = (Now::default(), 0);
    let received = Received {
        id: "6f1c1d1e-2f7e-4a2c-9a57-0d3a5d6c7b8f",
        path: "/v1/chat/completions",
        model: Some("org/model"),
        alias: None,
        stream: true,
        slots: 1,
        began: now.mono,
    };
    let considered = Some(Considered { replicas: 9, fitting: 5, placeable: 3, with_room: 2 });
    let mut explain = Explain::default();
    c.bench_function("explain/whole_request", |b| {
        b.iter(|| {
            number += 1;
            explain.begin(number, black_box(&received), now);
            explain.dispatched(number, &node, &key, considered, now.mono);
            explain.answering(number, 200, now.mono);
            explain.attempt_ended(number, Some(now.mono), None, now.mono);
            explain.ended(number, Outcome::Answered, "", "", now.mono);
        });
    });
}

fn listings(c: &mut Criterion) {
    let mut registry = ServiceRegistry::new(Limits::default(), 1);
    let (mut changes, now) = (Vec::new(), Now::default());
    for n in 0..10_000 {
        let name = format!("gpu-{n:05}");
        let body = format!(r#"{{"node_id":"{name}","address":"http://{name}:9200","incarnation":1}}"#);
        let request: RegisterRequest = serde_json::from_str(&body).expect("a registration");
        registry.register(&request, "10.0.0.1", now, &mut changes).expect("registered");
        // One pool that all share, and one of their own.
        let pools: Vec<String> = ["all".to_string(), format!("pool-{n}")]
            .iter()
            .map(|pool| {
                format!(
                    r#"{{"pool_id":"{pool}","replicas":[{{"replica_id":"r0","url":"http://127.0.0.1:8080","ready":true,"slots_free":4,"slots_total":4,"models":["m"]}}]}}"#
                )
            })
            .collect();
        let body = format!(r#"{{"incarnation":1,"seq":1,"pools":[{}]}}"#, pools.join(","));
        let beat: Heartbeat = serde_json::from_str(&body).expect("a heartbeat");
        let id = NodeId::new(&name).expect("an id");
        registry.heartbeat(&id, &beat, "10.0.0.1", now, &mut changes).expect("accepted");
    }
    let poller = Poller::new(&[], 1_000, 1, now);
    let mut group = c.benchmark_group("page_of_10000_nodes");
    group.sample_size(20);
    let first = Page { limit: PAGE_MAX, after: None };
    let later = Page { limit: PAGE_MAX, after: Some("pool-3") };
    group.bench_function("nodes", |b| b.iter(|| nodes(black_box(&registry), &poller, None, first, now)));
    group.bench_function("pools_with_a_pool_on_all", |b| {
        b.iter(|| pools(black_box(&registry), first, Now::default()))
    });
    group.bench_function("pools", |b| b.iter(|| pools(black_box(&registry), later, Now::default())));
    group.finish();
}

criterion_group!(benches, bodies, explain, listings);
criterion_main!(benches);
