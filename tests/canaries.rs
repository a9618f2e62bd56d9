//! What must not be told is told nowhere: tokens, keys of engines, prompts and answers are marked, the
//! daemons are driven through success and failure while they log all they can, and everything that they
//! say, write and show is searched for the marks.

#[path = "daemons/harness.rs"]
#[allow(dead_code, reason = "shared with other tests")]
mod harness;

use std::ffi::OsString;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::sync::Arc;
use std::thread;

use harness::*;
use llama_orch::http::fields::FieldLines;
use llama_orch::http::head::parse_request;
use llama_orch::http::server::Request;
use llama_orch::net::{Outbound, Patience, Sink};
use llama_orch::wire::url::BaseUrl;
use rustix::process::Signal;

const CLIENT: &str = "canary-client-0123456789abcdef0123456789";
const NODE: &str = "canary-node-0123456789abcdef0123456789abc";
const ADMIN: &str = "canary-admin-0123456789abcdef0123456789ab";
const KEY: &str = "canary-key-0123456789abcdef";
const PROMPT: &str = "canary-prompt";
const ANSWER: &str = "canary-answer";
const GUESS: &str = "canary-guess-0123456789abcdef0123456789ab";
/// What all of them have in common.
const MARK: &str = "canary-";

/// What an engine does with a request.
#[derive(Clone, Copy)]
enum Manner {
    Answers,
    /// Repeats the whole request in an error of its own.
    Repeats,
    /// Answers with what is no HTTP, and repeats the request in it.
    Babbles,
    /// Breaks in the middle of a stream.
    Breaks,
    Closes,
}

fn engine(manner: Manner) -> u16 {
    let listener = harness::listen_on_free_port();
    let port = listener.local_addr().expect("an address").port();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let stream = stream.expect("a connection");
            thread::spawn(move || serve(stream, manner));
        }
    });
    port
}

fn serve(mut stream: TcpStream, manner: Manner) -> Option<()> {
    let mut reader = BufReader::new(stream.try_clone().ok()?);
    let mut text = String::new();
    while !text.ends_with("\r\n\r\n") {
        (reader.read_line(&mut text).ok()? > 0).then_some(())?;
    }
    let length =
        text.lines().find_map(|l| l.to_ascii_lowercase().strip_prefix("content-length: ")?.parse().ok());
    let mut body = vec![0; length.unwrap_or(0)];
    reader.read_exact(&mut body).ok()?;
    text.push_str(&String::from_utf8_lossy(&body));
    let whole = |status: u16, body: &str| {
        format!(
            "HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
            body.len()
        )
    };
    let events = format!(
        "data: {{\"choices\":[{{\"delta\":{{\"content\":\"{ANSWER}\"}},\"text\":\"{ANSWER}\"}}]}}\n\n"
    );
    let head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n";
    let answer = match manner {
        _ if text.starts_with("GET /health") => whole(200, "{}"),
        _ if text.starts_with("GET") => whole(404, "{}"),
        Manner::Repeats => whole(500, &text),
        Manner::Babbles => format!("HTP {text}"),
        Manner::Closes => return None,
        Manner::Breaks => format!("{head}{events}data: {{\"{ANSWER}"),
        Manner::Answers if text.contains("\"stream\":true") => format!("{head}{events}data: [DONE]\n\n"),
        Manner::Answers => {
            whole(200, &format!(r#"{{"choices":[{{"text":"{ANSWER}","finish_reason":"stop"}}]}}"#))
        }
    };
    stream.write_all(answer.as_bytes()).ok()
}

/// Sends bytes and reads all that comes.
fn exchange(port: u16, bytes: &[u8]) -> String {
    let Ok(mut stream) = TcpStream::connect(("127.0.0.1", port)) else { return String::new() };
    stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    let _ = stream.write_all(bytes);
    let _ = stream.shutdown(std::net::Shutdown::Write);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}

/// Every file below a directory.
fn files_below(directory: &Path, found: &mut Vec<(String, String)>) {
    for entry in fs::read_dir(directory).expect("a directory") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            files_below(&path, found);
        } else {
            let text = String::from_utf8_lossy(&fs::read(&path).expect("a file")).into_owned();
            found.push((path.display().to_string(), text));
        }
    }
}

#[test]
fn what_must_not_be_told_is_told_nowhere() {
    let directory = tempfile::tempdir().expect("a directory");
    let secrets = tempfile::tempdir().expect("a directory");
    let secret = |name: &str, text: &str| {
        let path = secrets.path().join(name);
        fs::write(&path, text).expect("written");
        path.to_string_lossy().into_owned()
    };
    let (node, admin, key) = (secret("node", NODE), secret("admin", ADMIN), secret("key", KEY));
    let [cloud, agent, home] = [free_port(), free_port(), free_port()];
    let [cloud_addr, agent_addr, home_addr] = [cloud, agent, home].map(|port| format!("127.0.0.1:{port}"));
    let url = format!("http://{cloud_addr}");
    let all = [
        ("LLORCH_NODE_TOKEN_FILE", node.as_str()),
        ("LLORCH_ADMIN_TOKEN_FILE", &admin),
        ("RUST_LOG", "trace"),
    ];
    let own = |own: &[(&'static str, &'static str)], addr: (&'static str, String)| {
        let mut env: Vec<(String, String)> =
            own.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
        env.push((addr.0.into(), addr.1));
        env
    };
    let start = |program: &str, env: &[(String, String)]| {
        let own: Vec<(&str, &str)> = env.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
        Process::start(program, &[], &[&all[..], &own].concat(), directory.path())
    };
    let client = ("LLORCH_CLIENT_TOKEN", CLIENT);
    let mut daemons = vec![
        start(
            ORCHESTRATORD,
            &own(
                &[
                    client,
                    ("ORCHESTRATORD_CLOUD_PROFILE", "true"),
                    ("ORCHESTRATORD_STATE_DIR", "cloud"),
                    ("ORCHD_ADMISSION_TIMEOUT_MS", "500"),
                ],
                ("ORCHESTRATORD_ADDR", cloud_addr),
            ),
        ),
        start(
            ORCHESTRATORD,
            &own(&[client, ("ORCHD_ADMISSION_TIMEOUT_MS", "500")], ("ORCHESTRATORD_ADDR", home_addr)),
        ),
        start(POOL_MANAGERD, &{
            let mut env = own(
                &[("POOL_MANAGERD_CLOUD_PROFILE", "true"), ("POOL_MANAGERD_NODE_ID", "n")],
                ("POOL_MANAGERD_ADDR", agent_addr),
            );
            env.push(("ORCHESTRATORD_URL".into(), url));
            env
        }),
    ];
    let manners = [
        ("answers", Manner::Answers),
        ("repeats", Manner::Repeats),
        ("babbles", Manner::Babbles),
        ("breaks", Manner::Breaks),
        ("closes", Manner::Closes),
    ];
    for (model, manner) in manners {
        let port = engine(manner);
        let text = format!(
            r#"{{"pool_id":"{model}","url":"http://127.0.0.1:{port}","slots":4,"model":"{model}","auth":{{"file":"{key}"}}}}"#
        );
        hand_over(&directory.path().join(".runtime/engines"), &format!("{model}.json"), &text);
    }
    for port in [cloud, home] {
        until("all engines", || {
            let models =
                ask(port, "GET", "/v1/models", Some(CLIENT), "").filter(|answer| answer.status == 200)?;
            manners.iter().all(|(model, _)| models.body.contains(model)).then_some(())
        });
    }

    // What comes back is searched too, unless it is an engine's own word.
    let mut said: Vec<(String, String)> = Vec::new();
    let mut answered = 0;
    for port in [cloud, home] {
        for (model, _) in manners {
            for stream in ["false", "true"] {
                let body = format!(
                    r#"{{"model":"{model}","stream":{stream},"messages":[{{"role":"user","content":"{PROMPT}"}}],"prompt":"{PROMPT}"}}"#
                );
                for path in ["/v1/chat/completions", "/v1/completions"] {
                    let answer = ask(port, "POST", path, Some(CLIENT), &body).expect("an answer");
                    answered += u32::from(answer.body.contains(ANSWER));
                    if answer.status > 500 {
                        said.push((format!("{model} at {path}"), answer.head + &answer.body));
                    }
                }
            }
            let task = format!(
                r#"{{"task_id":"{model}","model_ref":"{model}","prompt":"{PROMPT}","max_tokens":3}}"#
            );
            let created = ask(port, "POST", "/v2/tasks", Some(CLIENT), &task).expect("an answer");
            said.push((format!("task {model}"), created.head + &created.body));
            let _ = ask(port, "GET", &format!("/v2/tasks/{model}/events?verbose=true"), Some(CLIENT), "");
        }
        for (path, body) in [
            ("/v1/chat/completions", format!(r#"{{"messages":[{{"content":"{PROMPT}""#)),
            ("/v1/chat/completions", format!(r#"{{"messages":"{PROMPT}","model":["{PROMPT}"]}}"#)),
            (
                "/v1/chat/completions",
                format!(r#"{{"prompt":"{PROMPT}\u0001","stream":"{PROMPT}","n":"{PROMPT}"}}"#),
            ),
            ("/v1/completions", format!("\"{PROMPT}\"")),
            ("/v1/completions", PROMPT.to_string()),
            ("/v2/tasks", format!(r#"{{"task_id":"x","prompt":["{PROMPT}"]}}"#)),
            ("/v2/tasks", format!(r#"{{"task_id":"x","messages":"{PROMPT}"}}"#)),
            ("/v2/tasks", format!(r#"{{"task_id":"x","prompt":"{PROMPT}","max_tokens":"{PROMPT}"}}"#)),
            ("/v2/tasks", format!(r#"{{"task_id":"x","prompt":"{PROMPT}"#)),
            ("/v2/tasks", format!(r#"{{"{PROMPT}":1}}"#)),
            ("/v2/nodes/register", format!(r#"{{"{PROMPT}":1}}"#)),
            ("/no/such/path", PROMPT.to_string()),
        ] {
            for token in [CLIENT, NODE] {
                let answer = ask(port, "POST", path, Some(token), &body).expect("an answer");
                if answer.status >= 400 {
                    said.push((format!("{path} {body}"), answer.head + &answer.body));
                }
            }
        }
    }
    assert!(answered >= 4, "{answered} whole answers");
    for port in [cloud, home, agent] {
        for text in [
            format!("GET /v2/pools HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {GUESS}\r\n\r\n"),
            format!("GET /v2/pools?token={GUESS} HTTP/1.1\r\nHost: localhost\r\n\r\n"),
            format!(
                "GET /v2/pools HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {ADMIN}\r\nBad Field: {ADMIN}\r\n\r\n"
            ),
            format!("GET /v2/pools HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {ADMIN}\0\r\n\r\n"),
            format!(
                "GET /{GUESS} HTTP/1.1\r\nHost: {GUESS}.example\r\nAuthorization: Bearer {GUESS}\r\n\r\n"
            ),
            format!("{GUESS} /v2/pools HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {GUESS}\r\n\r\n"),
            format!(
                "POST /v2/tasks HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {CLIENT}\r\nTransfer-Encoding: chunked\r\n\r\nzz{PROMPT}\r\n"
            ),
            format!(
                "POST /v2/tasks HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {CLIENT}\r\nContent-Length: 99\r\n\r\n{PROMPT}"
            ),
            format!("{PROMPT}\r\n\r\n"),
        ] {
            said.push((text.clone(), exchange(port, text.as_bytes())));
        }
    }
    // A file of no use must not be quoted.
    fs::write(&node, format!("{GUESS} {GUESS}\n")).expect("written");
    daemons.iter().for_each(|daemon| daemon.signal(Signal::HUP));
    for daemon in &daemons {
        until("the warning", || daemon.log().contains("they stay as they are").then_some(()));
    }
    let pages = [
        "/health",
        "/ready",
        "/metrics",
        "/v2/events",
        "/v2/handoffs",
        "/v2/pools",
        "/v2/nodes",
        "/v2/explain?limit=1000",
        "/v2/gpus",
        "/v2/callbacks",
        "/v2/drains",
    ];
    for (port, page) in [cloud, home, agent].into_iter().flat_map(|port| pages.map(|page| (port, page))) {
        let answer = ask(port, "GET", page, Some(ADMIN), "").expect("an answer");
        if page.starts_with("/v2/explain") && answer.status == 200 {
            let listed = answer.json();
            let requests = listed["requests"].as_array().expect("requests");
            assert!(requests.len() > 20, "{listed}");
            for request in requests {
                let id = request["request_id"].as_str().or(request["id"].as_str()).expect("an id");
                let one = ask(port, "GET", &format!("/v2/explain/{id}"), Some(ADMIN), "").expect("an answer");
                said.push((format!("explain {id}"), one.body));
            }
        }
        said.push((format!("{port} {page}"), answer.head + &answer.body));
    }
    for daemon in &daemons {
        let line = fs::read(format!("/proc/{}/cmdline", daemon.pid())).expect("a command line");
        said.push((format!("command line of {}", daemon.pid()), String::from_utf8_lossy(&line).into_owned()));
    }
    for daemon in daemons.iter_mut().rev() {
        daemon.signal(Signal::TERM);
        assert_eq!(daemon.end(), Some(0));
    }
    for daemon in &daemons {
        let log = daemon.log();
        assert!(log.contains("refused 127.0.0.1") || log.contains("pool-managerd"), "{log}");
        for line in log.lines() {
            assert!(line.starts_with("20") && line.contains('Z'), "every line is one of the log: {line}");
        }
    }
    // Logs are files there as well.
    files_below(directory.path(), &mut said);
    assert!(said.len() > 100 && said.iter().any(|(name, _)| name.ends_with(".log")), "{}", said.len());
    for (what, text) in &said {
        let found = text.find(MARK).map(|at| &text[at.saturating_sub(200)..(at + 100).min(text.len())]);
        assert_eq!(found, None, "in what was said to or kept for: {what}");
    }
}

#[test]
fn nothing_that_prints_itself_prints_a_secret() {
    let env = |name: &str| match name {
        "LLORCH_API_TOKEN" => Some(OsString::from(ADMIN)),
        "LLORCH_NODE_TOKEN" => Some(OsString::from(NODE)),
        _ => None,
    };
    let head =
        format!("POST / HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {CLIENT}\r\nContent-Length: 0\r\n\r\n");
    let head = parse_request(head.as_bytes()).expect("a head");
    let request = Request { head, body: PROMPT.into() };
    let outbound = Outbound {
        to: BaseUrl::new("http://127.0.0.1:1").expect("a URL"),
        method: "POST".into(),
        target: "/".into(),
        fields: FieldLines::new().with("Authorization", KEY),
        body: Arc::new(PROMPT.into()),
        sink: Sink::Owner { hold_back: &[] },
        patience: Patience { connect_ms: 1, first_byte_ms: 1, idle_ms: 1 },
        keep_ms: None,
    };
    let printed = [
        format!("{:?}", llama_orch::orchestratord::config::Config::read([], env).expect("settings")),
        format!("{:?}", llama_orch::pool_managerd::config::Config::read([], env).expect("settings")),
        format!("{request:?}"),
        format!("{outbound:?}"),
    ];
    // As text, and as the numbers that bytes print as.
    let numbers = format!("{:?}", MARK.as_bytes()).trim_matches(['[', ']']).to_string();
    for text in printed {
        assert!(!text.contains(MARK) && !text.contains(&numbers), "{text}");
    }
}

/// Names that would end a line of the log or of the metrics, and very many of them.
#[test]
fn names_from_outside_neither_forge_lines_nor_fill_the_metrics() {
    const NAMES: usize = 100_000;
    const STATUS: &[u8] = b"HTTP/1.1 404 ";
    let home = Home::start(&[("RUST_LOG", "trace")]);
    let port = engine(Manner::Answers);
    hand_over(
        &home.engines(),
        "a.json",
        &format!(r#"{{"url":"http://127.0.0.1:{port}","slots":4,"model":"m"}}"#),
    );
    home.until_routable(1.0);
    let forged = "m\\n2026-01-01T00:00:00.000Z ERROR forged\\r\\u001b[31m\\u2028\\\"} 1\\nforged_total 1";
    let body = |model: &str| format!(r#"{{"model":"{model}","prompt":"x"}}"#);
    assert_eq!(post(home.port, "/v1/completions", &body("m")).status, 200);
    assert_eq!(post(home.port, "/v1/completions", &body(forged)).status, 404);
    let head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nx-request-id: a\u{1b}[31m\r\nConnection: close\r\nContent-Length: 0\r\n\r\n";
    exchange(home.port, head.as_bytes());
    let before = get(home.port, "/metrics").expect("metrics").body;

    let mut stream = TcpStream::connect(("127.0.0.1", home.port)).expect("a connection");
    let mut writer = stream.try_clone().expect("a socket");
    let sender = thread::spawn(move || {
        for start in (0..NAMES).step_by(100) {
            let mut batch = String::new();
            for n in start..start + 100 {
                let body = body(&format!("unknown-{n}"));
                let close = if n + 1 == NAMES { "Connection: close\r\n" } else { "" };
                batch += &format!(
                    "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n{close}Content-Length: {}\r\n\r\n{body}",
                    body.len()
                );
            }
            writer.write_all(batch.as_bytes()).expect("sent");
        }
    });
    let (mut refused, mut buffer, mut tail) = (0, vec![0; 1 << 16], Vec::new());
    loop {
        let length = stream.read(&mut buffer).expect("answers");
        if length == 0 {
            break;
        }
        tail.extend_from_slice(&buffer[..length]);
        // What is looked for may come in two parts.
        let found = tail.windows(STATUS.len()).filter(|window| *window == STATUS).count();
        refused += found;
        let last = tail.windows(STATUS.len()).rposition(|window| window == STATUS);
        let seen = last.map_or(0, |at| at + STATUS.len()).max(tail.len().saturating_sub(STATUS.len()));
        tail.drain(..seen);
    }
    sender.join().expect("sent");
    assert_eq!(refused, NAMES);
    let after = get(home.port, "/metrics").expect("metrics").body;
    assert_eq!(before.lines().count(), after.lines().count(), "no name became a line of its own");
    assert!(after.len() < before.len() + 2_000 && !after.contains("unknown-"), "{} bytes", after.len());
    for line in after.lines().filter(|line| !line.starts_with('#')) {
        assert!(line.starts_with("orchestratord_") || line.starts_with("process_"), "{line}");
    }
    let log = home.daemon.log();
    for line in log.lines() {
        assert!(
            line.starts_with("20") && !line.contains('\u{1b}') && !line.contains("Z ERROR forged"),
            "{line}"
        );
    }
    assert!(log.len() < 1 << 20, "a hundred thousand refusals are no megabyte of log: {}", log.len());
}
