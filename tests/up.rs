//! `llorch up` as an operator meets it: what it prints, how it ends, what it leaves behind.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::net::TcpListener;
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

/// Longest that any of these runs may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// A running `llorch up`, killed with the test.
struct Up {
    child: Child,
    lines: Receiver<String>,
    directory: tempfile::TempDir,
}

impl Up {
    fn start(args: &[&str]) -> Up {
        let directory = tempfile::tempdir().expect("a directory");
        let mut child = Command::new(env!("CARGO_BIN_EXE_llorch"))
            .arg("up")
            .arg("--dir")
            .arg(directory.path().join("home"))
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("llorch starts");
        let (send, lines) = channel();
        let stdout = child.stdout.take().expect("a pipe");
        std::thread::spawn(move || {
            BufReader::new(stdout).lines().map_while(Result::ok).try_for_each(|line| send.send(line))
        });
        Up { child, lines, directory }
    }

    /// Lines until one holds `part`.
    fn until(&self, part: &str) -> Vec<String> {
        let (begun, mut seen) = (Instant::now(), Vec::new());
        while begun.elapsed() < PATIENCE {
            let Ok(line) = self.lines.recv_timeout(PATIENCE) else { break };
            let found = line.contains(part);
            seen.push(line);
            if found {
                return seen;
            }
        }
        panic!("{part:?} was not printed: {seen:#?}");
    }

    fn interrupt(&self) {
        let pid = rustix::process::Pid::from_raw(self.child.id().cast_signed()).expect("a pid");
        rustix::process::kill_process(pid, rustix::process::Signal::INT).expect("signalled");
    }

    /// Waits for the end: exit code and what was printed to stderr.
    fn end(&mut self) -> (Option<i32>, String) {
        let begun = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().expect("a child") {
                let mut errors = String::new();
                let stderr = self.child.stderr.as_mut().expect("a pipe");
                stderr.read_to_string(&mut errors).expect("text");
                return (status.code(), errors);
            }
            assert!(begun.elapsed() < PATIENCE, "it does not end");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Processes that name this run's directory in their command line.
    fn left_behind(&self) -> Vec<String> {
        let directory = self.directory.path().to_string_lossy().into_owned();
        let own = self.child.id().to_string();
        fs::read_dir("/proc")
            .expect("proc")
            .filter_map(|entry| Some(entry.ok()?.file_name().to_string_lossy().into_owned()))
            .filter(|pid| pid.bytes().all(|b| b.is_ascii_digit()) && *pid != own)
            .filter_map(|pid| fs::read_to_string(format!("/proc/{pid}/cmdline")).ok())
            .filter(|line| line.contains(&directory))
            .collect()
    }
}

impl Drop for Up {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            self.interrupt();
            let begun = Instant::now();
            while matches!(self.child.try_wait(), Ok(None)) && begun.elapsed() < PATIENCE {
                std::thread::sleep(Duration::from_millis(10));
            }
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

fn run(args: &[&str]) -> Output {
    let child = Command::new(env!("CARGO_BIN_EXE_llorch")).args(args).stdin(Stdio::null()).output();
    child.expect("llorch runs")
}

#[test]
fn once_answers_measures_and_leaves_nothing() {
    let mut up = Up::start(&["--once", "--prompt", "alpha beta gamma", "--max-tokens", "6"]);
    let printed = up.until("tokens  ").join("\n");
    for part in ["demonstration engine", "question       alpha beta gamma", "[demo]", "alpha", "beta"] {
        assert!(printed.contains(part), "{part:?} is missing in\n{printed}");
    }
    for row in [
        "daemons started -> answering",
        "engine spawned -> healthy",
        "handoff written -> seen",
        "seen -> ready",
        "ready -> routable",
        "request -> first byte",
        "first byte -> last",
    ] {
        let line = printed.lines().find(|line| line.contains(row));
        let value = line.and_then(|line| line.trim_end_matches(" ms").split_whitespace().last());
        let ms: f64 = value.and_then(|ms| ms.parse().ok()).unwrap_or_else(|| panic!("{row}: {line:?}"));
        assert!((0.0..10_000.0).contains(&ms), "{row}: {ms} ms");
    }
    assert_eq!(up.end().0, Some(0));
    assert_eq!(up.left_behind(), Vec::<String>::new());
    let engines = up.directory.path().join("home/engines");
    let handoffs = fs::read_dir(engines).expect("the directory that was asked for stays").count();
    assert_eq!(handoffs, 0, "the handoff went with its engine");
}

#[test]
fn a_temporary_home_is_removed() {
    let temporary = tempfile::tempdir().expect("a directory");
    let mut command = Command::new(env!("CARGO_BIN_EXE_llorch"));
    command.args(["up", "--once", "--max-tokens", "1"]).env("TMPDIR", temporary.path());
    let output = command.output().expect("llorch runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(fs::read_dir(temporary.path()).expect("listed").count(), 0);
}

#[test]
fn without_once_it_stays_serves_and_ends_at_ctrl_c() {
    let port = TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a port").port();
    let mut up = Up::start(&["--port", &port.to_string(), "--max-tokens", "2"]);
    let printed = up.until("Ctrl-C ends everything");
    let curl = printed.iter().find(|line| line.starts_with("try")).expect("a curl line");
    let curl = curl.trim_start_matches("try").trim();
    let has_curl = Command::new("curl").arg("--version").output().is_ok();
    if has_curl {
        let answer = Command::new("sh").args(["-c", &format!("{curl} -s -m 10")]).output();
        let text = String::from_utf8_lossy(&answer.expect("a shell").stdout).into_owned();
        assert!(text.contains("[demo]") && text.contains("data: [DONE]"), "{curl}\n{text}");
    }
    up.interrupt();
    assert_eq!(up.end().0, Some(0));
    assert_eq!(up.left_behind(), Vec::<String>::new());
}

#[test]
fn an_engine_that_fails_is_said_plainly() {
    let mut up = Up::start(&["--once", "--engine", "sh", "-c", "echo no such model >&2; exit 3", "{port}"]);
    let (code, errors) = up.end();
    assert_eq!(code, Some(1), "{errors}");
    for part in ["engine-provisioner ended", "no such model", "logs are in"] {
        assert!(errors.contains(part), "{part:?} is missing in\n{errors}");
    }
    assert_eq!(up.left_behind(), Vec::<String>::new());
}

#[test]
fn a_port_in_use_and_bad_words_are_refused() {
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = taken.local_addr().expect("an address").port();
    let mut up = Up::start(&["--once", "--port", &port.to_string()]);
    let (code, errors) = up.end();
    assert!(code == Some(1) && errors.contains(&port.to_string()) && errors.contains("--port"), "{errors}");
    assert_eq!(run(&["nonsense"]).status.code(), Some(2));
    assert_eq!(run(&["up", "--slots", "0"]).status.code(), Some(78));
    let help = run(&["--help"]);
    assert!(help.status.success() && String::from_utf8_lossy(&help.stdout).contains("demo-engine"));
}
