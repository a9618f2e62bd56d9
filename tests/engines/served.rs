//! An engine for tests: a small server that answers as real ones do, and can be made to stand still.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

/// An engine: pages by path, perhaps with a key, and streams that can be made to stand still.
#[derive(Default)]
pub(crate) struct Engine {
    pub(crate) pages: BTreeMap<&'static str, (u16, &'static str)>,
    /// Wanted from everything but `/health`.
    pub(crate) key: Option<&'static str>,
    pub(crate) hangs: AtomicBool,
    /// Methods and paths, in the order in which they came.
    pub(crate) asked: Mutex<Vec<String>>,
}

impl Engine {
    pub(crate) fn start(self) -> (Arc<Engine>, u16) {
        self.listen(crate::harness::listen_on_free_port())
    }

    /// On another address of this machine than loopback.
    #[allow(dead_code, reason = "shared with tests that stay on loopback")]
    pub(crate) fn start_on(self, address: IpAddr) -> (Arc<Engine>, u16) {
        self.listen(TcpListener::bind((address, 0)).expect("a port"))
    }

    fn listen(self, listener: TcpListener) -> (Arc<Engine>, u16) {
        let port = listener.local_addr().expect("an address").port();
        let engine = Arc::new(self);
        let shared = engine.clone();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let (engine, stream) = (shared.clone(), stream.expect("a connection"));
                thread::spawn(move || engine.serve(stream));
            }
        });
        (engine, port)
    }

    /// One request a connection. Whoever leaves is left alone.
    fn serve(&self, mut stream: TcpStream) {
        let mut reader = BufReader::new(stream.try_clone().expect("a socket"));
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            if reader.read_line(&mut head).unwrap_or(0) == 0 {
                return;
            }
        }
        let field = |name: &str| {
            head.lines().find_map(|line| {
                let (field, value) = line.split_once(':')?;
                field.eq_ignore_ascii_case(name).then(|| value.trim().to_string())
            })
        };
        let length = field("content-length").and_then(|length| length.parse().ok()).unwrap_or(0);
        let mut body = vec![0; length];
        if reader.read_exact(&mut body).is_err() {
            return;
        }
        let mut words = head.split(' ');
        let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        self.asked.lock().expect("nobody panics with it").push(format!("{method} {path}"));
        let has_key = self.key.is_none_or(|key| field("authorization") == Some(format!("Bearer {key}")));
        if path != "/health" && !has_key {
            return respond(&mut stream, 401, r#"{"error":{"message":"Invalid API Key","code":401}}"#);
        }
        if method == "POST" {
            return self.generate(&mut stream, &String::from_utf8_lossy(&body));
        }
        let (status, text) = self.pages.get(path).copied().unwrap_or((404, "{}"));
        respond(&mut stream, status, text);
    }

    fn generate(&self, stream: &mut TcpStream, body: &str) {
        if !body.contains(r#""stream":true"#) {
            self.wait_while_hanging();
            return respond(stream, 200, r#"{"choices":[{"text":"x","finish_reason":"length"}]}"#);
        }
        let _ = stream
            .write_all(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n");
        for _ in 0..10_000 {
            if stream.write_all(b"data: {\"choices\":[{\"text\":\"x\"}]}\n\n").is_err() {
                return;
            }
            thread::sleep(Duration::from_millis(20));
            self.wait_while_hanging();
        }
    }

    fn wait_while_hanging(&self) {
        while self.hangs.load(Ordering::Relaxed) {
            thread::sleep(Duration::from_millis(20));
        }
    }
}

fn respond(stream: &mut TcpStream, status: u16, text: &str) {
    let head = format!("HTTP/1.1 {status} X\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", text.len());
    let _ = stream.write_all((head + text).as_bytes());
}

/// An engine with these pages: path, status, body.
pub(crate) fn engine(pages: &[(&'static str, u16, &'static str)]) -> Engine {
    let pages = pages.iter().map(|(path, status, text)| (*path, (*status, *text))).collect();
    Engine { pages, ..Engine::default() }
}
