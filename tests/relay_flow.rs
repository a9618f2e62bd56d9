//! The relay between a client and an engine of different speeds: who reads slowly slows its engine alone, and
//! who reads fast delays nobody.

#[allow(dead_code, reason = "shared with another test, which uses other parts")]
pub(crate) mod relay_support;

use std::io::Read;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use relay_support::{Client, Engine, Gateway, eventually, flood, tide};

const JSON: &str =
    "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 12\r\n\r\n{\"a\": \"b\"} \n";

/// Checks that everything came to rest, once the clients are gone.
fn settle(gateway: Gateway, client: Client) {
    drop(client);
    gateway.settle();
}

#[test]
fn a_slow_client_holds_its_engine_back_and_loses_nothing() {
    const TOTAL: u64 = 64 << 20;
    let written = Arc::new(AtomicU64::new(0));
    let count = written.clone();
    let engine = Engine::start(move |line| {
        while let Some(request) = line.request() {
            if request.head.starts_with("GET /flood") {
                flood(line, &count, TOTAL);
            } else {
                line.write(JSON.as_bytes());
            }
        }
    });
    let gateway = Gateway::start(engine.address);
    let mut slow = gateway.client();
    slow.send("GET /flood HTTP/1.1\r\nHost: a\r\n\r\n");
    // Once the count rests for a while, all buffers between the two are full.
    let (mut last, mut since) = (0, Instant::now());
    eventually("the engine is held back", || {
        let now = written.load(Ordering::SeqCst);
        if now != last {
            (last, since) = (now, Instant::now());
        }
        last > 0 && since.elapsed() > Duration::from_millis(150)
    });
    // Both sockets' kernel buffers grow to several MiB; the gateway itself adds a fraction of one.
    assert!(last < TOTAL / 2, "the engine wrote {last} bytes to a client that reads none");
    let mut other = gateway.client();
    for _ in 0..20 {
        assert_eq!(other.get("/").status, 200, "others are served meanwhile");
    }
    let answer = slow.receive();
    assert!(answer.clean && answer.body.len() as u64 == TOTAL);
    let wrong = answer.body.iter().zip(0..).position(|(byte, at)| *byte != tide(at));
    assert_eq!(wrong, None, "the first wrong byte");
    drop(slow);
    settle(gateway, other);
}

#[test]
fn a_fast_stream_does_not_delay_the_others() {
    let engine = Engine::start(|line| {
        while let Some(request) = line.request() {
            if request.head.starts_with("GET /flood") {
                return flood(line, &AtomicU64::new(0), u64::MAX);
            }
            line.write(JSON.as_bytes());
        }
    });
    let gateway = Gateway::start(engine.address);
    let mut fast = gateway.client();
    fast.send("GET /flood HTTP/1.1\r\nHost: a\r\n\r\n");
    let mut reader = fast.tcp.try_clone().expect("a second handle");
    let read = Arc::new(AtomicU64::new(0));
    let total = read.clone();
    let reading = std::thread::spawn(move || {
        let mut buffer = vec![0; 64 * 1024];
        while let Ok(length @ 1..) = reader.read(&mut buffer) {
            total.fetch_add(length as u64, Ordering::SeqCst);
        }
    });
    eventually("the stream flows", || read.load(Ordering::SeqCst) > 1 << 20);
    let before = read.load(Ordering::SeqCst);
    let mut other = gateway.client();
    let mut took: Vec<Duration> = (0..200)
        .map(|_| {
            let began = Instant::now();
            assert_eq!(other.get("/").status, 200);
            began.elapsed()
        })
        .collect();
    took.sort_unstable();
    // Generous, as tests share two cores; a starved client would wait for ever.
    assert!(took[100] < Duration::from_millis(100), "the median is {:?}", took[100]);
    eventually("the stream flows on", || read.load(Ordering::SeqCst) > before);
    fast.tcp.shutdown(std::net::Shutdown::Both).expect("an open connection");
    reading.join().expect("the reader did not panic");
    drop(fast);
    settle(gateway, other);
}
