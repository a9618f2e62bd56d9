//! What it costs to find out who may call: a route by table, and a token held against six accepted ones
//! (three scopes, each with a current and a previous token). Both run once a request.

use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use llama_orch::http::head::parse_request;
use llama_orch::service::auth::{Given, Keys, Policy, Scope, Tokens};
use llama_orch::service::routes;

/// As long as `llorch token new` makes them.
fn token(name: &str) -> String {
    format!("{name:0<64}")
}

fn bearer(c: &mut Criterion) {
    let tokens = |scope: &str| {
        let text = format!("{}\n{}", token(&format!("{scope}current")), token(&format!("{scope}previous")));
        Tokens::parse(&text).expect("tokens")
    };
    let own = Scope::ALL.map(|scope| tokens(scope.as_str()));
    let keys = Keys::resolve(Given { all: Tokens::default(), own }, &Scope::ALL).expect("keys");
    let head = |token: &str| {
        let text = format!(
            "POST /v1/chat/completions HTTP/1.1\r\nHost: gateway.example:8080\r\nAccept: application/json\r\nUser-Agent: OpenAI/Python 3.0.0\r\nContent-Type: application/json\r\nAuthorization: Bearer {token}\r\nX-Stainless-Lang: python\r\nContent-Length: 0\r\n\r\n"
        );
        parse_request(text.as_bytes()).expect("a good head")
    };
    let mut group = c.benchmark_group("bearer");
    for (name, shown, passes) in
        [("current", "clientcurrent", true), ("previous", "clientprevious", true), ("bad", "x", false)]
    {
        let head = head(&token(shown));
        assert_eq!(keys.check(Policy::Client, &head.fields).is_ok(), passes);
        group.bench_function(name, |b| {
            b.iter(|| keys.check(black_box(Policy::Client), black_box(&head.fields)));
        });
    }
    group.finish();
}

fn route(c: &mut Criterion) {
    let mut group = c.benchmark_group("route");
    for (name, line) in [
        ("first", "POST /v1/chat/completions"),
        ("last", "GET /v2/explain/2eb79cb9-12ee-47a8-99c8-d05c31a37b58"),
        ("none", "GET /favicon.ico"),
    ] {
        let head =
            parse_request(format!("{line} HTTP/1.1\r\nHost: a\r\n\r\n").as_bytes()).expect("a good head");
        group.bench_function(name, |b| {
            b.iter(|| routes::find(llama_orch::orchestratord::api::ROUTES, black_box(&head), head.path()));
        });
    }
    group.finish();
}

criterion_group!(benches, bearer, route);
criterion_main!(benches);
