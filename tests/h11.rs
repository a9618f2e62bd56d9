//! What is accepted here, h11 (the parser of Python's servers) accepts too, and reads the same from it: method,
//! target, fields and body. The inputs are good and hostile requests that were changed a little, by a fixed seed.
//! Where we refuse and h11 does not, that is our right; where we accept and h11 does not, [`ON_PURPOSE`] says why.
//!
//! Opt-in, because the first run downloads h11: `REQUIRE_H11=1 cargo test --test h11`.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use llama_orch::http::server::{Progress, Request, RequestReader};
use serde_json::{Value, json};

const PACKAGE: &str = "h11>=0.16,<1";
const SEED: u64 = 0x6c6c_6f72_6368;
/// Inputs that are tried, unless the time is over before.
const INPUTS: usize = 200_000;
const BUDGET: Duration = Duration::from_secs(20);
/// Inputs that must have been accepted and compared, so that the test says something.
const COMPARED_MIN: usize = 2_000;
const BODY_BYTES_MAX: usize = 1 << 20;

/// What is accepted here though h11 refuses it: part of h11's message, and why.
const ON_PURPOSE: &[(&str, &str)] = &[(
    "Only Transfer-Encoding: chunked is supported",
    "in a trailer, which is thrown away here unread; in a head we refuse it ourselves",
)];

/// Whole requests, and pieces that are put into them.
const WHOLE: &[&[u8]] = &[
    b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET /a?b=c%20d&e HTTP/1.1\r\nhost: a.example:8080\r\nAccept: */*\r\nX-Empty:\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: [::1]:80\r\n\r\n",
    b"GET /old HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
    b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello",
    b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length:  5 \t\r\nX-A: b\r\nX-A: c\r\n\r\nhelloGET /2 HTTP/1.1\r\n\r\n",
    b"POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    b"POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: Chunked\r\nTrailer: T\r\n\r\n0a;n=v;m=\"q\"\r\n0123456789\r\n1\r\nz\r\n000\r\nT: 1\r\n\r\n",
    b"POST /x HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\nhi",
    b"PUT /x HTTP/1.1\r\nHost: a\r\nConnection: close, X-A\r\nX-A: \xc3\xa9\xff\r\nUpgrade: h2c\r\nContent-Length: 1\r\n\r\nx",
];
const PIECES: &[&[u8]] = &[
    b"\r\n",
    b"\n",
    b"\r",
    b" ",
    b"\t",
    b"\0",
    b":",
    b",",
    b";",
    b"0",
    b"1",
    b"5",
    b"a",
    b"f",
    b"+",
    b"-",
    b"_",
    b"\"",
    b"Content-Length: 5\r\n",
    b"Content-Length: 0\r\n",
    b"Transfer-Encoding: chunked\r\n",
    b"Host: b\r\n",
    b"X: y\r\n",
    b"Transfer-Encoding: identity\r\n",
    b"0\r\n\r\n",
    b"5\r\nhello\r\n",
    b"HTTP/1.0",
    b"HTTP/1.1",
    b"\x0b",
    b"\x7f",
    b"\x80",
    b"#",
];

fn mutated(random: &mut fastrand::Rng) -> Vec<u8> {
    let mut bytes = WHOLE[random.usize(..WHOLE.len())].to_vec();
    for _ in 0..random.usize(0..4) {
        let at = random.usize(..=bytes.len());
        let to = (at + random.usize(0..4)).min(bytes.len());
        let piece = PIECES[random.usize(..PIECES.len())];
        match random.u8(..5) {
            0 => drop(bytes.drain(at..to)),
            1 => drop(bytes.splice(at..to, piece.iter().copied())),
            2 => drop(bytes.splice(at..at, piece.iter().copied())),
            3 => bytes.get_mut(at).into_iter().for_each(|byte| *byte = random.u8(..)),
            _ => bytes.get_mut(at).into_iter().for_each(|byte| *byte ^= 1 << random.u8(..8)),
        }
    }
    bytes
}

/// The first request in `bytes`, if it is accepted and complete.
fn ours(bytes: &[u8]) -> Option<Box<Request>> {
    let (mut reader, mut at) = (RequestReader::new(BODY_BYTES_MAX), 0);
    loop {
        let (used, progress) = reader.advance(&bytes[at..]).ok()?;
        at += used;
        match progress {
            Progress::More => return None,
            Progress::WantsContinue => {}
            Progress::Request(request) => return Some(request),
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn shown(request: &Request) -> Value {
    // h11 shows this one value in small letters.
    let plain = |name: &str, value: &[u8]| match name.eq_ignore_ascii_case("transfer-encoding") {
        true => value.to_ascii_lowercase(),
        false => value.to_vec(),
    };
    let fields = request.head.fields.iter();
    json!({
        "method": hex(request.head.method().as_bytes()),
        "target": hex(request.head.target().as_bytes()),
        "fields": fields.map(|(name, value)| json!([hex(name.as_bytes()), hex(&plain(name, value))])).collect::<Vec<_>>(),
        "body": hex(&request.body),
    })
}

fn run(program: &Path, args: &[&str], directory: &Path) {
    let output = Command::new(program).args(args).current_dir(directory).output().expect("it runs");
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// What h11 makes of each input.
fn theirs(inputs: &[Vec<u8>]) -> Vec<Value> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/h11");
    let python = root.join("venv/bin/python");
    std::fs::create_dir_all(&root).expect("a directory");
    if !python.exists() {
        run(Path::new("python3"), &["-m", "venv", "venv"], &root);
    }
    let found = Command::new(&python).args(["-c", "import h11"]).output().expect("Python runs");
    if !found.status.success() {
        run(&python, &["-m", "pip", "install", "--quiet", "--disable-pip-version-check", PACKAGE], &root);
    }
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/h11/parse.py");
    let mut child = Command::new(&python)
        .arg(script)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("Python starts");
    let mut stdin = child.stdin.take().expect("piped");
    let lines: String = inputs.iter().map(|input| hex(input) + "\n").collect();
    let writer = std::thread::spawn(move || stdin.write_all(lines.as_bytes()));
    let output = child.wait_with_output().expect("Python ends");
    writer.join().expect("no panic").expect("Python reads");
    assert!(output.status.success());
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
}

#[test]
#[allow(clippy::print_stderr, reason = "a skipped test has to say so")]
fn what_is_accepted_here_h11_reads_the_same() {
    if std::env::var_os("REQUIRE_H11").is_none_or(|value| value != "1") {
        eprintln!("skipped: set REQUIRE_H11=1 to fetch h11 and compare with it");
        return;
    }
    let mut random = fastrand::Rng::with_seed(SEED);
    let (begun, mut inputs, mut accepted) = (Instant::now(), Vec::new(), Vec::new());
    for _ in 0..INPUTS {
        let input = mutated(&mut random);
        // An empty line in front of a request is overlooked here, as RFC 9112 (2.2) says, and not by h11.
        let input = &input[input.iter().take_while(|byte| matches!(byte, b'\r' | b'\n')).count()..];
        if let Some(request) = ours(input) {
            inputs.push(input.to_vec());
            accepted.push(shown(&request));
        }
        if begun.elapsed() > BUDGET {
            break;
        }
    }
    assert!(inputs.len() >= COMPARED_MIN, "{} inputs", inputs.len());
    let mut wrong = Vec::new();
    let answers = theirs(&inputs);
    assert_eq!(answers.len(), inputs.len());
    for ((input, ours), theirs) in inputs.iter().zip(&accepted).zip(&answers) {
        let on_purpose = theirs["error"]
            .as_str()
            .is_some_and(|error| ON_PURPOSE.iter().any(|(part, _)| error.contains(part)));
        if theirs != ours && !on_purpose {
            wrong.push(format!("{:?}: {theirs} instead of {ours}", String::from_utf8_lossy(input)));
        }
    }
    wrong.truncate(20);
    assert!(wrong.is_empty(), "of {} inputs: {wrong:#?}", inputs.len());
    eprintln!("{} of {INPUTS} inputs were accepted and compared", inputs.len());
}
