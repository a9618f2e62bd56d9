//! How fast is a model fetched and hashed, held against `curl` that only fetches it? Both from the same
//! server on this machine, onto the same disk, by turns.
//!
//! `DOWNLOAD_MIB=2048 cargo bench --bench model_download`; 256 MiB without the variable. The server keeps
//! the content in memory and knows ranges. What counts is the best of a few turns: other work on the
//! machine only ever makes it slower.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

/// Turns of each.
const TURNS: usize = 3;

fn main() {
    // `cargo test --benches` only asks whether it runs.
    let testing =
        std::env::args().any(|arg| arg == "--test") || !std::env::args().any(|arg| arg == "--bench");
    let default = if testing { 4 } else { 256 };
    let mib: usize = std::env::var("DOWNLOAD_MIB").ok().and_then(|text| text.parse().ok()).unwrap_or(default);
    let root = tempfile::tempdir().expect("a directory");
    let url = serve(Arc::new((0..mib << 20).map(|n| (n >> 3) as u8 ^ (n >> 13) as u8).collect()));
    let mut best = [Duration::MAX; 2];
    for _ in 0..TURNS {
        let curl = root.path().join("curl.bin");
        best[0] = best[0].min(timed(Command::new("curl").args(["-sS", "-o"]).arg(&curl).arg(&url)));
        fs::remove_file(&curl).expect("curl left its file");
        let cache = root.path().join("cache");
        best[1] = best[1].min(timed(&mut fetch(&cache, &url)));
        fs::remove_dir_all(&cache).expect("the cache can be removed");
    }
    let rate = |took: Duration| mib as f64 / took.as_secs_f64();
    report(mib, rate(best[0]), rate(best[1]));
}

#[allow(clippy::print_stdout, reason = "the result of a benchmark")]
fn report(mib: usize, curl: f64, ours: f64) {
    println!(
        "{mib} MiB: curl {curl:.0} MiB/s, fetched and hashed {ours:.0} MiB/s: {:.2} of curl",
        ours / curl
    );
}

fn fetch(cache: &Path, url: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_engine-provisioner"));
    command.args(["models", "fetch", url, "--cache-dir"]).arg(cache);
    command.env_remove("ENGINE_PROVISIONER_CONNECTIONS").env("RUST_LOG", "warn");
    command
}

fn timed(command: &mut Command) -> Duration {
    let start = Instant::now();
    let status = command.stdin(Stdio::null()).stdout(Stdio::null()).status().expect("it starts");
    assert!(status.success(), "{command:?}");
    start.elapsed()
}

fn serve(content: Arc<Vec<u8>>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = listener.local_addr().expect("an address").port();
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let content = Arc::clone(&content);
            thread::spawn(move || converse(&stream, &content));
        }
    });
    format!("http://127.0.0.1:{port}/model.bin")
}

fn converse(mut stream: &TcpStream, content: &[u8]) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut input = BufReader::new(stream);
    loop {
        let (mut line, mut range) = (String::new(), None);
        if input.read_line(&mut line)? == 0 {
            return Ok(());
        }
        while line.trim_end() != "" {
            if let Some(span) = line.to_ascii_lowercase().strip_prefix("range: bytes=") {
                let (first, last) = span.trim_end().split_once('-').unwrap_or(("0", ""));
                let last = last.parse().unwrap_or(usize::MAX).min(content.len() - 1);
                range = Some((first.parse().unwrap_or(0), last));
            }
            line.clear();
            input.read_line(&mut line)?;
        }
        let (first, last) = range.unwrap_or((0, content.len() - 1));
        let head = match range {
            Some(_) => {
                format!("HTTP/1.1 206 Part\r\nContent-Range: bytes {first}-{last}/{}\r\n", content.len())
            }
            None => "HTTP/1.1 200 OK\r\n".to_string(),
        };
        let head = format!("{head}ETag: \"v1\"\r\nContent-Length: {}\r\n\r\n", last + 1 - first);
        stream.write_all(head.as_bytes())?;
        stream.write_all(&content[first..=last])?;
    }
}
