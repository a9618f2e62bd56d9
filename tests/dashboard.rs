//! The dashboard as an operator sees it: its page, what it is told, and, in a headless Chromium, what it
//! shows.
//!
//! The browser is opt-in, because it is large: `REQUIRE_CHROMIUM=1 cargo test --test dashboard` with Debian's
//! `chromium` installed, or `CHROMIUM=PATH`. Where there is one it is used without being asked for; without,
//! those tests say that they were skipped. `SCREENSHOTS=DIRECTORY` keeps pictures.

#[path = "daemons/harness.rs"]
#[allow(dead_code, reason = "shared with other tests, which use other parts")]
mod harness;

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use harness::*;
use rustix::process::Signal;
use serde_json::{Value, json};

const EVENTS: &str = "/v2/dashboard/events";
const ADMIN: &str = "admin-0123456789abcdef0123456789abcdef";
const CLIENT: &str = "client-0123456789abcdef0123456789abcdef";
/// A token for each scope.
const SCOPED: [(&str, &str); 3] = [
    ("LLORCH_ADMIN_TOKEN", ADMIN),
    ("LLORCH_CLIENT_TOKEN", CLIENT),
    ("LLORCH_NODE_TOKEN", "node-0123456789abcdef0123456789abcdef"),
];
/// Largest page: it is part of every binary, and loads over any line.
const PAGE_BYTES_MAX: usize = 60_000;
/// Longest that a browser may take for anything: it is a large program on a small machine.
const BROWSER_SECONDS: u64 = 90;

/// What a watcher is told.
struct Watch {
    status: u16,
    reader: BufReader<TcpStream>,
}

impl Watch {
    fn open(port: u16, fields: &str) -> Watch {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).expect("a connection");
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        // Without chunks, lines are lines.
        write!(stream, "GET {EVENTS} HTTP/1.0\r\nHost: localhost\r\n{fields}\r\n").expect("sent");
        let mut reader = BufReader::new(stream);
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            assert_ne!(reader.read_line(&mut head).expect("a head"), 0, "{head}");
        }
        let status = head.split(' ').nth(1).and_then(|code| code.parse().ok()).expect("a status");
        Watch { status, reader }
    }

    /// The next event with its data; `None` at the end.
    fn next(&mut self) -> Option<(String, Value)> {
        let (mut name, mut data) = (String::new(), String::new());
        loop {
            let mut line = String::new();
            if self.reader.read_line(&mut line).expect("a stream") == 0 {
                return None;
            }
            if let Some(text) = line.strip_prefix("event: ") {
                name = text.trim_end().to_string();
            } else if let Some(text) = line.strip_prefix("data: ") {
                data = text.trim_end().to_string();
            } else if line == "\n" && !name.is_empty() {
                return Some((name, serde_json::from_str(&data).expect("JSON")));
            }
        }
    }

    /// Reads on until `found` has what it looks for.
    fn until<T>(&mut self, what: &str, mut found: impl FnMut(&str, &Value) -> Option<T>) -> T {
        let begun = Instant::now();
        loop {
            assert!(begun.elapsed() < PATIENCE, "waited in vain for {what}");
            let (name, data) = self.next().expect("the stream goes on");
            if let Some(found) = found(&name, &data) {
                return found;
            }
        }
    }

    fn until_state(&mut self, node: &str, state: &str) -> Value {
        self.until(state, |name, data| {
            let rows = data.as_array().filter(|_| name == "nodes")?;
            let row = rows.iter().find(|row| row["id"] == node)?;
            (row["replicas"][0]["state"] == state).then(|| row["replicas"][0].clone())
        })
    }
}

/// A handoff whose engine's end the kernel tells.
fn watched_handoff(port: u16, engine: &Process) -> String {
    let pid = engine.pid();
    format!(
        r#"{{"pool_id":"pool-0","replica_id":"r0","url":"http://127.0.0.1:{port}","slots":4,"pid":{pid}}}"#
    )
}

#[test]
fn the_page_is_one_small_file_that_asks_nobody_else() {
    let home = Home::start(&[("LLORCH_API_TOKEN", ADMIN)]);
    let page = get(home.port, "/").expect("the page, without a token");
    assert_eq!((page.status, page.field("content-type")), (200, Some("text/html; charset=utf-8")));
    assert!(page.body.len() < PAGE_BYTES_MAX, "{} bytes", page.body.len());
    let policy = page.field("content-security-policy").expect("a policy");
    for rule in [
        "default-src 'none'",
        "script-src 'sha256-",
        "style-src 'sha256-",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
    ] {
        assert!(policy.contains(rule), "{rule} is missing in {policy}");
    }
    assert!(!policy.contains("unsafe") && !policy.contains('*'), "{policy}");
    assert_eq!(page.field("x-content-type-options"), Some("nosniff"));
    assert_eq!(page.field("referrer-policy"), Some("no-referrer"));
    // The only address in it names a language.
    for (at, _) in page.body.match_indices("://") {
        let around = &page.body[at.saturating_sub(5)..(at + 21).min(page.body.len())];
        assert!(
            around.ends_with("://www.w3.org/2000/svg") || around.contains("://www.w3.org/2000"),
            "{around}"
        );
    }
    for word in ["@import", "url(", "<link rel=\"stylesheet", "<script src", "<img", "<iframe", "import("] {
        assert!(!page.body.contains(word), "{word}");
    }
    let head = ask(home.port, "HEAD", "/", None, "").expect("an answer");
    assert_eq!((head.status, head.body.as_str()), (200, ""));
    assert!(
        !page.body.contains(ADMIN) && !page.body.contains(env!("CARGO_PKG_VERSION")),
        "it says nothing of this server"
    );
}

#[test]
fn what_it_shows_is_for_operators_only() {
    let home = Home::start(&SCOPED);
    let with = |token: &str| Watch::open(home.port, &format!("Authorization: Bearer {token}\r\n"));
    assert_eq!(Watch::open(home.port, "").status, 401);
    assert_eq!(with("x").status, 401);
    assert_eq!(with(CLIENT).status, 403);
    let mut watch = with(ADMIN);
    assert_eq!(watch.status, 200);
    watch.until("its beginning", |name, _| (name == "begin").then_some(()));
    // A browser that was led here by another name is not served, with a token or without.
    let open = Home::start(&[]);
    let mut stream = TcpStream::connect(("127.0.0.1", open.port)).expect("a connection");
    write!(stream, "GET {EVENTS} HTTP/1.1\r\nHost: rebound.example\r\n\r\n").expect("sent");
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).expect("a line");
    assert!(line.contains(" 421 "), "{line}");
    // A HEAD is answered, rather than left without an end.
    assert_eq!(ask(open.port, "HEAD", EVENTS, None, "").map(|answer| answer.status), Some(200));
}

#[test]
fn a_watcher_is_told_at_once_what_happens_and_every_second_how_things_stand() {
    let mut home = Home::start(&[]);
    let mut watch = Watch::open(home.port, "");
    let begin = watch.until("the beginning", |name, data| (name == "begin").then(|| data.clone()));
    assert_eq!((&begin["profile"], &begin["bin_ms"]), (&json!("HOME"), &json!(5_000)));
    watch.until("all nodes", |name, _| (name == "whole").then_some(()));
    let port = free_port();
    let mut engine = demo_engine(port, &["--model", "<b>model</b>"], home.directory.path());
    hand_over(&home.engines(), "pool-0-r0.json", &watched_handoff(port, &engine));
    let replica = watch.until_state("local", "routable");
    assert_eq!((&replica["slots"], &replica["free"]), (&json!(4), &json!(4)));
    assert_eq!(replica["models"], json!(["<b>model</b>"]), "as it is: the page makes no markup of it");
    let chat = r#"{"messages":[{"role":"user","content":"a b"}],"max_tokens":5,"stream":true}"#;
    assert_eq!(post(home.port, "/v1/chat/completions", chat).status, 200);
    let bin = watch.until("a request", |name, data| {
        let bins = data["bins"].as_array().filter(|_| name == "now")?;
        bins.iter().find(|bin| bin["answered"] == 1).cloned()
    });
    assert!(bin["tokens"].as_u64().is_some_and(|n| n >= 3), "{bin}");
    assert!(bin["first_token_p50_ms"].as_u64().is_some_and(|ms| ms >= 1), "{bin}");
    let sums = watch.until("sums", |name, data| (name == "now").then(|| data["sums"].clone()));
    assert_eq!(sums, json!({"replicas": 1, "routable": 1, "slots": 4, "free": 4}));
    engine.kill();
    let told = watch.until("news", |name, data| {
        let news = data.as_array().filter(|_| name == "news")?;
        news.iter().find(|news| news["is_warning"] == true).cloned()
    });
    assert!(told["subject"].as_str().is_some_and(|subject| subject.contains("pool-0/r0")), "{told}");
    let replica = watch.until_state("local", "out");
    assert!(replica["reason"].as_str().is_some_and(|why| why.contains("ended")), "{replica}");
    // Nobody waits for the end of a stream that has none.
    home.daemon.signal(Signal::TERM);
    while watch.next().is_some() {}
    assert_eq!(home.daemon.end(), Some(0));
}

#[test]
fn there_is_room_for_so_many_watchers_and_for_another_when_one_leaves() {
    let home = Home::start(&[]);
    let max = llama_orch::orchestratord::dashboard::board::WATCHERS_MAX;
    let mut watching: Vec<Watch> = (0..max).map(|_| Watch::open(home.port, "")).collect();
    assert!(watching.iter().all(|watch| watch.status == 200));
    let refused = get(home.port, EVENTS).expect("an answer");
    assert_eq!((refused.status, &refused.json()["retriable"]), (503, &json!(true)));
    assert!(refused.field("retry-after").is_some());
    // The others are served as before.
    watching[max - 1].until("a frame", |name, _| (name == "now").then_some(()));
    watching.pop();
    until("a place", || Some(Watch::open(home.port, "")).filter(|watch| watch.status == 200));
}

/// A control plane with nodes that are played by the test.
struct Plane {
    directory: tempfile::TempDir,
    port: u16,
    daemon: Process,
}

impl Plane {
    fn start(env: &[(&str, &str)]) -> Plane {
        let directory = tempfile::tempdir().expect("a directory");
        let port = free_port();
        let addr = format!("127.0.0.1:{port}");
        let own = [("ORCHESTRATORD_CLOUD_PROFILE", "true"), ("ORCHESTRATORD_ADDR", &addr)];
        let daemon = Process::start(ORCHESTRATORD, &[], &[&own[..], env].concat(), directory.path());
        until("orchestratord", || get(port, "/ready").filter(|answer| answer.status == 200));
        Plane { directory, port, daemon }
    }

    fn agent(&self, id: &str, env: &[(&str, &str)]) -> (Process, PathBuf) {
        let (port, root) = (free_port(), self.directory.path().join(id));
        fs::create_dir(&root).expect("a directory");
        let (addr, address) = (format!("127.0.0.1:{port}"), format!("http://localhost:{port}"));
        let url = format!("http://localhost:{}", self.port);
        let own = [
            ("POOL_MANAGERD_CLOUD_PROFILE", "true"),
            ("POOL_MANAGERD_NODE_ID", id),
            ("POOL_MANAGERD_ADDRESS", &address),
            ("ORCHESTRATORD_URL", &url),
            ("POOL_MANAGERD_ADDR", &addr),
        ];
        let agent = Process::start(POOL_MANAGERD, &[], &[&own[..], env].concat(), &root);
        (agent, root.join(".runtime/engines"))
    }

    /// A node of which nothing is real. What it says of itself may be anything.
    fn play(&self, id: &str, token: Option<&str>, gpus: &Value, pools: &Value, seq: u64) {
        let post = |path: &str, body: Value| {
            let answer = ask(self.port, "POST", path, token, &body.to_string()).expect("an answer");
            assert_eq!(answer.status, 200, "{answer:?}");
        };
        if seq == 1 {
            post(
                "/v2/nodes/register",
                json!({"node_id": id, "machine_id": id, "address": "http://192.0.2.1:9200",
                "pools": [], "capabilities": {"gpus": gpus}, "incarnation": 1, "version": "0.1.0"}),
            );
        }
        let beat = json!({"timestamp": "2026-01-01T00:00:00Z", "incarnation": 1, "seq": seq, "pools": pools});
        post(&format!("/v2/nodes/{id}/heartbeat"), beat);
    }

    /// The same, of an agent that tells how each GPU is used.
    fn play_loads(&self, id: &str, loads: &Value, pools: &Value, seq: u64) {
        let beat = json!({"incarnation": 1, "seq": seq, "pools": pools, "gpu_loads": loads});
        let answer = post(self.port, &format!("/v2/nodes/{id}/heartbeat"), &beat.to_string());
        assert_eq!(answer.status, 200, "{answer:?}");
    }
}

fn played_pool(
    id: &str,
    replicas: &[(&str, bool, &str)],
    model: &str,
    reason: &str,
    free_bytes: u64,
) -> Value {
    let replicas: Vec<Value> = replicas
        .iter()
        .enumerate()
        .map(|(n, (name, ready, mask))| {
            json!({"replica_id": name, "url": format!("http://127.0.0.1:{}", 8000 + n), "ready": ready,
                "slots_total": 8, "slots_free": 8, "generation": 1, "models": [model], "engine": "vllm",
                "device_mask": mask, "reason": if *ready { Value::Null } else { json!(reason) }})
        })
        .collect();
    json!({"pool_id": id, "ready": true, "draining": false, "slots_free": 8, "slots_total": 8,
        "vram_free_bytes": free_bytes, "models_available": [model], "replicas": replicas})
}

/// A headless Chromium.
struct Browser {
    child: Child,
    orders: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
    _directory: tempfile::TempDir,
}

impl Browser {
    /// `None` where there is none and none is required.
    #[allow(clippy::print_stderr, reason = "a skipped test has to say so")]
    fn start() -> Option<Browser> {
        let named = std::env::var("CHROMIUM").ok().map(PathBuf::from);
        let usual = ["/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome"];
        let program = named.or_else(|| usual.iter().map(PathBuf::from).find(|path| path.exists()));
        let Some(program) = program else {
            let required = std::env::var_os("REQUIRE_CHROMIUM").is_some_and(|value| value == "1");
            assert!(!required, "REQUIRE_CHROMIUM=1, and there is no chromium: apt-get install chromium");
            eprintln!("skipped: there is no chromium (apt-get install chromium; REQUIRE_CHROMIUM=1 insists)");
            return None;
        };
        let directory = tempfile::tempdir().expect("a directory");
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/dashboard/browser.py");
        let mut child = Command::new("python3")
            .arg(script)
            .arg(program)
            .arg(directory.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("python3 runs");
        let orders = child.stdin.take();
        let answers = BufReader::new(child.stdout.take().expect("a pipe"));
        Some(Browser { child, orders, answers, _directory: directory })
    }

    fn obey(&mut self, order: Value) -> Value {
        writeln!(self.orders.as_ref().expect("open"), "{order}").expect("the script reads");
        let mut line = String::new();
        self.answers.read_line(&mut line).expect("the script answers");
        let mut answer: Value = serde_json::from_str(&line).unwrap_or_else(|_| panic!("{order}: {line:?}"));
        assert!(answer.get("error").is_none(), "{order}: {}", answer["error"]);
        answer["value"].take()
    }

    fn open(&mut self, port: u16, width: u32, height: u32, dark: bool) {
        let url = format!("http://127.0.0.1:{port}/");
        self.obey(json!({"do": "open", "url": url, "width": width, "height": height, "dark": dark}));
    }

    fn look(&mut self, width: u32, height: u32, dark: bool) {
        self.obey(json!({"do": "open", "width": width, "height": height, "dark": dark}));
    }

    fn eval(&mut self, js: &str) -> Value {
        self.obey(json!({"do": "eval", "js": js}))
    }

    fn until(&mut self, js: &str) -> Value {
        self.obey(json!({"do": "until", "js": js, "seconds": BROWSER_SECONDS}))
    }

    fn until_state(&mut self, replica: &str, state: &str) {
        let row = format!("document.querySelector('tr[data-replica=\"{replica}\"]')");
        self.until(&format!("{row} && {row}.dataset.state === '{state}'"));
    }

    fn keys(&mut self, text: &str) {
        self.obey(json!({"do": "keys", "text": text}));
    }

    fn press(&mut self, key: &str) {
        self.obey(json!({"do": "press", "key": key}));
    }

    fn shot(&mut self, name: &str) {
        if let Some(directory) = std::env::var_os("SCREENSHOTS") {
            let path = Path::new(&directory).join(name);
            self.obey(json!({"do": "shot", "path": path}));
        }
    }

    /// Nothing was complained about, and nobody else was asked.
    fn is_content(&mut self, port: u16) {
        let report = self.obey(json!({"do": "report"}));
        assert_eq!(report["console"], json!([]), "the browser complains");
        let own = format!("http://127.0.0.1:{port}/");
        for url in report["requests"].as_array().expect("a list") {
            let url = url.as_str().expect("a URL");
            assert!(url.starts_with(&own) || url.starts_with("data:"), "the page asked {url}");
        }
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // The script ends the browser when nobody orders anything any more.
        self.orders = None;
        let _ = self.child.wait();
    }
}

const GIB: u64 = 1 << 30;

#[test]
fn two_nodes_are_shown_and_a_killed_engine_within_a_second() {
    let Some(mut browser) = Browser::start() else { return };
    let plane = Plane::start(&[]);
    let (_first, first_engines) = plane.agent("gpu-1", &[]);
    let (_second, second_engines) = plane.agent("gpu-2", &[]);
    let root = plane.directory.path().to_path_buf();
    let ports = [free_port(), free_port()];
    let mut engine = demo_engine(ports[0], &[], &root);
    let other = demo_engine(ports[1], &["--model", "qwen2.5-7b"], &root);
    hand_over(&first_engines, "a.json", &watched_handoff(ports[0], &engine));
    hand_over(&second_engines, "a.json", &watched_handoff(ports[1], &other));
    // A third one whose names are none that anybody should trust.
    let gpu = |n: u32, name: &str| json!({"device_id": n, "name": name, "vram_total_bytes": 80 * GIB, "compute_capability": "9.0"});
    let hostile = "<img src=x onerror=\"document.title='owned'\">\u{202e}";
    let gpus = json!([gpu(0, "NVIDIA H100 80GB"), gpu(1, "NVIDIA H100 80GB"), gpu(2, hostile)]);
    let replicas = [("r0", true, "0,1"), ("r1", false, "0,1")];
    plane.play("gpu-3", None, &gpus, &json!([played_pool("chat", &replicas, hostile, hostile, 37 * GIB)]), 1);

    browser.open(plane.port, 1280, 900, false);
    browser.until_state("gpu-1/pool-0/r0", "routable");
    browser.until_state("gpu-2/pool-0/r0", "routable");
    browser.until_state("gpu-3/chat/r1", "out");
    browser.until("document.getElementById('link').textContent.includes('live')");
    for _ in 0..6 {
        let chat = json!({"model": "qwen2.5-7b", "stream": true, "max_tokens": 30,
            "messages": [{"role": "user", "content": "a b c"}]});
        assert_eq!(post(plane.port, "/v1/chat/completions", &chat.to_string()).status, 200);
    }
    browser.until("document.querySelectorAll('.tile .lineA').length >= 3");
    assert_eq!(browser.eval("document.title"), "llama-orch", "text is text");
    assert_eq!(browser.eval("document.querySelectorAll('#nodes img').length"), 0);
    assert!(
        browser.eval("document.body.textContent.includes('onerror')") == true,
        "it is shown as what it is"
    );
    assert_eq!(browser.eval("document.body.textContent.includes('\\u202e')"), false);
    assert_eq!(
        browser.eval("document.querySelector('.memory .words .num').textContent"),
        "123 GiB of 160 GiB"
    );
    let words =
        "[...document.querySelectorAll('.memory .words .num')].map(words => words.textContent).join()";
    assert_eq!(browser.eval(words), "123 GiB of 160 GiB,80 GiB, use not told");
    // The agent is a newer one now: each GPU has a bar of its own, also where nobody uses it.
    let load = |n: u32, free: u64, busy: u32| {
        json!({"device_id": n, "vram_total_bytes": 80 * GIB, "vram_free_bytes": free * GIB,
            "utilization_percent": busy, "temperature_celsius": 40 + n})
    };
    let pools = json!([played_pool("chat", &replicas, hostile, hostile, 37 * GIB)]);
    plane.play_loads("gpu-3", &json!([load(0, 20, 97), load(1, 17, 100), load(2, 80, 0)]), &pools, 2);
    let bars = "60 GiB of 80 GiB · 97 % busy · 40 °C,63 GiB of 80 GiB · 100 % busy · 41 °C,0 MiB of 80 GiB · 0 % busy · 42 °C";
    browser.until(&format!("{words} === {bars:?}"));
    let said =
        browser.eval("document.querySelectorAll('.memory [role=\"img\"]')[1].getAttribute('aria-label')");
    assert_eq!(said, "GPU 1 · NVIDIA H100 80GB: 63 GiB of 80 GiB · 100 % busy · 41 °C", "to a screen reader");
    browser.shot("light.png");

    // Best of a few: the machine may be busy.
    let mut best = Duration::MAX;
    for attempt in 0..5 {
        let begun = Instant::now();
        engine.kill();
        browser.until_state("gpu-1/pool-0/r0", "out");
        best = best.min(begun.elapsed());
        if best < Duration::from_secs(1) {
            break;
        }
        engine = demo_engine(ports[0], &[], &root);
        hand_over(&first_engines, "a.json", &watched_handoff(ports[0], &engine));
        browser.until_state("gpu-1/pool-0/r0", "routable");
        assert!(attempt < 4, "a killed engine is shown after {best:?}");
    }
    browser.until("document.getElementById('say').textContent.includes('gpu-1')");
    browser.until(
        "[...document.querySelectorAll('#news li')].some(li => li.textContent.includes('gpu-1/pool-0/r0'))",
    );
    browser.shot("killed.png");

    browser.look(1280, 900, true);
    browser.until("!document.querySelector('tr.flash')");
    let dark = browser.eval("getComputedStyle(document.documentElement).backgroundColor");
    assert_eq!(dark, "rgb(16, 20, 25)");
    browser.shot("dark.png");
    for width in [390, 320] {
        browser.look(width, 844, width == 320);
        let overflow =
            browser.eval("document.documentElement.scrollWidth - document.documentElement.clientWidth");
        assert_eq!(overflow, 0, "{width} pixels are enough");
        browser.shot(&format!("narrow-{width}.png"));
    }
    // By keyboard alone: to the filter, and what does not fit goes.
    browser.look(1280, 900, false);
    browser.press("/");
    browser.keys("qwen");
    browser.until("document.querySelectorAll('details.node').length === 1");
    browser
        .eval("document.activeElement.value = ''; document.activeElement.dispatchEvent(new Event('input'))");
    browser.until("document.querySelectorAll('details.node').length === 3");
    browser.is_content(plane.port);
    // Gone, and back.
    let mut plane = plane;
    plane.daemon.signal(Signal::TERM);
    browser.until("document.getElementById('link').textContent.includes('trying again')");
    assert_eq!(plane.daemon.end(), Some(0));
}

#[test]
fn a_token_is_asked_for_kept_for_the_tab_and_forgotten() {
    let Some(mut browser) = Browser::start() else { return };
    let home = Home::start(&SCOPED);
    browser.open(home.port, 1280, 800, true);
    browser.until("document.getElementById('ask').open && document.activeElement.id === 'token'");
    browser.shot("token.png");
    for (token, says) in [("wrong", "not accepted"), (CLIENT, "not an operator")] {
        browser.keys(token);
        browser.press("Enter");
        browser.until(&format!("document.getElementById('ask-why').textContent.includes({:?})", says));
    }
    browser.keys(ADMIN);
    browser.press("Enter");
    browser.until("document.getElementById('link').textContent.includes('live')");
    browser.until("!!document.querySelector('#nodes .empty')");
    browser.shot("home-empty.png");
    assert_eq!(browser.eval("sessionStorage.getItem('llorch-token')"), ADMIN);
    assert_eq!(browser.eval("localStorage.length + document.cookie.length"), 0);
    // The next page of the same tab has it.
    browser.eval("window.isOld = true; location.reload()");
    browser.until(
        "!window.isOld && document.readyState === 'complete' && document.getElementById('link').textContent.includes('live')",
    );
    browser.eval("document.getElementById('key').click()");
    browser.until("document.getElementById('ask').open");
    assert_eq!(browser.eval("sessionStorage.length"), 0);
}

#[test]
fn hundreds_of_nodes_are_found_by_filter_and_shown_in_part() {
    let Some(mut browser) = Browser::start() else { return };
    let plane = Plane::start(&[]);
    let gpus =
        json!([{"device_id": 0, "name": "L40S", "vram_total_bytes": 48 * GIB, "compute_capability": "8.9"}]);
    for n in 0..300 {
        let replicas = [("r0", true, "0"), ("r1", n % 50 != 0, "0")];
        let pool = played_pool(
            &format!("pool-{}", n % 7),
            &replicas,
            &format!("model-{}", n % 7),
            "it loads",
            20 * GIB,
        );
        plane.play(&format!("node-{n:03}"), None, &gpus, &json!([pool]), 1);
    }
    browser.open(plane.port, 1280, 900, false);
    browser.until("document.getElementById('nodes-sum').textContent.includes('300 online')");
    browser
        .until("document.getElementById('nodes-sum').textContent.includes('594 of 600 replicas routable')");
    assert_eq!(browser.eval("document.querySelectorAll('details.node').length"), 40);
    assert_eq!(browser.eval("document.getElementById('more').textContent"), "Show 40 more of 260");
    browser.until("document.querySelectorAll('#pools tbody tr').length === 7");
    browser.shot("many.png");
    browser.press("/");
    browser.keys("node-27 model-4");
    browser.until("document.querySelectorAll('details.node').length === 2");
    browser.eval("document.getElementById('filter').value = ''");
    browser.eval("which.value = 'care'; which.dispatchEvent(new Event('change'))");
    browser.until("document.querySelectorAll('details.node').length === 6");
    // A node that leaves goes from the page.
    let left = ask(plane.port, "DELETE", "/v2/nodes/node-050", None, "").expect("an answer");
    assert_eq!(left.status, 204);
    browser.until("document.querySelectorAll('details.node').length === 5");
    browser.is_content(plane.port);
}
