//! The relay within TLS on both sides: everything that is asserted of it in the clear, once more, and what
//! only TLS can break.

#![allow(clippy::duplicate_mod, reason = "three tests, each with what it shares")]

#[path = "relay.rs"]
mod secured;
#[path = "relay_flow.rs"]
mod secured_flow;
#[path = "streams.rs"]
mod secured_streams;

use std::io::Write;

use llama_orch::net::Limits;
use secured::relay_support::{Client, Engine, Gateway, PATIENT, eventually};

/// An engine that vanishes without a farewell has not ended its answer, however whole it looks.
#[test]
fn an_end_without_a_farewell_is_no_end_of_an_answer() {
    let head = "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\n";
    for says_farewell in [true, false] {
        let engine = Engine::start(move |line| {
            if line.request().is_some() {
                line.write(format!("{head}half of it").as_bytes());
                if !says_farewell {
                    line.tcp.forget_farewell();
                }
            }
        });
        let gateway = Gateway::start(engine.address);
        let mut client = gateway.client();
        client.send("GET / HTTP/1.0\r\n\r\n");
        let received = client.receive();
        assert_eq!((received.text().as_str(), received.clean), ("half of it", says_farewell));
        drop(client);
        gateway.settle();
    }
}

/// Records may be cut anywhere, and many may come at once.
#[test]
fn records_of_any_size_are_one_stream() {
    let engine = Engine::answering("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok");
    let gateway = Gateway::start(engine.address);
    let mut client = Client::connect(gateway.address);
    let body = "x".repeat(70_000);
    let request = format!("POST /a HTTP/1.1\r\nHost: g\r\nContent-Length: {}\r\n\r\n{body}", body.len());
    for size in [1, 7, 16_384, 100_000] {
        // A record for every piece.
        let pieces = if size == 1 { &request.as_bytes()[..200] } else { request.as_bytes() };
        for piece in pieces.chunks(size) {
            client.tcp.write_all(piece).expect("taken");
        }
        if size == 1 {
            client.tcp.write_all(&request.as_bytes()[200..]).expect("taken");
        }
        assert_eq!(client.receive().text(), "ok");
    }
    assert!(engine.requests().iter().all(|request| request.body.len() == 70_000));
    drop(client);
    gateway.settle();
}

/// What is one too many cannot be told so before its handshake, for which there are two places here.
#[test]
fn one_connection_too_many_is_told_so_as_long_as_there_is_a_place_to_tell_it() {
    let engine = Engine::answering("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok");
    let limits = Limits { clients_max: 32, ..Limits::default() };
    let gateway = Gateway::with(engine.address, limits, PATIENT);
    let mut served: Vec<Client> = (0..30).map(|_| gateway.client()).collect();
    served.iter_mut().for_each(|client| assert_eq!(client.get("/").status, 200));
    // Whether they have asked for something already or not.
    let mut told: Vec<Client> = (0..2).map(|_| gateway.client()).collect();
    let _ = told[0].tcp.write_all(b"GET / HTTP/1.1\r\nHost: g\r\n\r\n");
    for client in &mut told {
        let answer = client.receive();
        assert_eq!((answer.status, answer.field("retry-after")), (503, Some("1")), "{}", answer.head);
        assert!(answer.text().contains("too many connections"), "{}", answer.text());
    }
    let mut closed = gateway.client();
    assert!(closed.is_closed(), "there is no place to tell it");
    assert_eq!(engine.requests().len(), 30, "none of them got through");
    drop(told);
    eventually("places to tell it are free again", || gateway.clients() == 30);
    assert_eq!(gateway.client().receive().status, 503);
    eventually("the last one left", || gateway.clients() == 30);
    served.pop();
    eventually("a place is free", || gateway.clients() == 29);
    assert_eq!(gateway.client().get("/").status, 200);
    drop(served);
    gateway.settle();
}
