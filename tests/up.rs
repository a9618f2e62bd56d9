//! `llorch up` as an operator meets it: the real binary, real daemons, the demonstration engine.
//!
//! Every run gets a directory of its own as `TMPDIR`. That variable marks each process that descends
//! from it, engine included, so "nothing is left" is asked of the process table and of the directory.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal};
use tempfile::TempDir;

/// Far longer than anything here takes, so that only a hang reaches it.
const PATIENCE: Duration = Duration::from_secs(40);
/// How long `up` may take to end everything.
const END_LIMIT: Duration = Duration::from_secs(10);
/// Pause between two looks at a condition.
const LOOK: Duration = Duration::from_millis(5);

/// Every row that `--once` measures.
const ROWS: [&str; 10] = [
    "start of up -> daemons answer",
    "engine spawned -> healthy",
    "handoff written -> seen",
    "seen -> ready",
    "ready -> routable",
    "request -> first byte",
    "request -> first token",
    "first byte -> last byte",
    "start of up -> first token",
    "without the engine's own",
];

struct Up {
    child: Child,
    lines: Receiver<String>,
    seen: String,
    errors: Option<JoinHandle<String>>,
    temporary: TempDir,
}

impl Up {
    fn start(args: &[&str]) -> Up {
        let temporary = tempfile::tempdir().expect("a temporary directory");
        let mut child = Command::new(env!("CARGO_BIN_EXE_llorch"))
            .arg("up")
            .args(args)
            .env("TMPDIR", temporary.path())
            // What configures daemons elsewhere must not reach these.
            .env("ORCHESTRATORD_CLOUD_PROFILE", "nonsense")
            .env("POOL_MANAGERD_RUNTIME_DIR", "/nonexistent")
            .env("LLORCH_API_TOKEN", "a token that nobody here sends along")
            .env_remove("RUST_LOG")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the binary under test starts");
        let (sender, lines) = channel();
        let out = BufReader::new(child.stdout.take().expect("a piped stdout"));
        thread::spawn(move || {
            for line in out.lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        let mut err = child.stderr.take().expect("a piped stderr");
        let errors = thread::spawn(move || {
            let mut text = String::new();
            let _ = err.read_to_string(&mut text);
            text
        });
        Up { child, lines, seen: String::new(), errors: Some(errors), temporary }
    }

    /// The next line that begins with `subject` and holds `part`.
    fn line(&mut self, subject: &str, part: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) => {
                    self.seen.push_str(&line);
                    self.seen.push('\n');
                    if line.starts_with(subject) && line.contains(part) {
                        return line;
                    }
                }
                Err(error) => {
                    let _ = self.child.kill();
                    let errors = self.errors.take().and_then(|reader| reader.join().ok()).unwrap_or_default();
                    panic!("no line {subject:?} with {part:?} ({error}) behind:\n{}\n{errors}", self.seen)
                }
            }
        }
    }

    fn signal(&self, signal: Signal) {
        rustix::process::kill_process(pid(self.child.id()), signal).expect("it runs");
    }

    /// Waits for its end: exit code, standard output, standard error.
    fn end(&mut self, limit: Duration) -> (Option<i32>, String, String) {
        let deadline = Instant::now() + limit;
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("a child can be waited for") {
                break status;
            }
            assert!(Instant::now() < deadline, "it did not end within {limit:?}:\n{}", self.seen);
            thread::sleep(LOOK);
        };
        while let Ok(line) = self.lines.recv_timeout(PATIENCE) {
            self.seen.push_str(&line);
            self.seen.push('\n');
        }
        let errors = self.errors.take().expect("only asked once").join().expect("the reader has ended");
        (status.code(), self.seen.clone(), errors)
    }

    /// Processes that descend from this run and still run, whatever they are called.
    fn processes(&self) -> Vec<u32> {
        let marker = format!("TMPDIR={}", self.temporary.path().display());
        let entries = fs::read_dir("/proc").expect("/proc is mounted").flatten();
        let pids = entries.filter_map(|entry| entry.file_name().to_string_lossy().parse::<u32>().ok());
        pids.filter(|pid| {
            let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
            environment.split(|byte| *byte == 0).any(|variable| variable == marker.as_bytes())
        })
        .collect()
    }

    fn assert_nothing_is_left(&self) {
        assert_eq!(self.processes(), [0u32; 0], "processes are left");
        let left: Vec<_> = fs::read_dir(self.temporary.path()).expect("it exists").flatten().collect();
        assert!(left.is_empty(), "files are left: {left:?}");
    }
}

impl Drop for Up {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        for left in self.processes() {
            let _ = rustix::process::kill_process(pid(left), Signal::KILL);
        }
    }
}

fn pid(raw: u32) -> Pid {
    i32::try_from(raw).ok().and_then(Pid::from_raw).expect("a process id")
}

/// The number behind `label` in the table, in milliseconds.
fn measured(text: &str, label: &str) -> Option<f64> {
    let row = text.lines().find(|line| line.trim_start().starts_with(label))?;
    row.trim_start().strip_prefix(label)?.split_whitespace().next()?.parse().ok()
}

#[test]
fn once_answers_measures_and_leaves_nothing_behind() {
    let mut up = Up::start(&["--once", "--max-tokens", "12", "--prompt", "alpha beta gamma"]);
    let (code, out, errors) = up.end(PATIENCE);
    assert_eq!(code, Some(0), "{out}{errors}");
    assert!(out.contains("demonstration engine: words made from the prompt, no model"), "{out}");
    let answer = out.lines().find(|line| line.starts_with("answer")).expect("an answer");
    assert!(answer.contains("[demo]") && answer.contains("gamma"), "{answer}");
    assert_eq!(answer.split_whitespace().count(), 1 + 12, "{answer}");
    let tokens = out.lines().find(|line| line.starts_with("tokens")).expect("a count");
    assert_eq!(tokens.split_whitespace().nth(1), Some("12"), "{tokens}");
    for step in ["found", "probing", "ready", "routable"] {
        assert!(out.contains(&format!("pool-0/r0 {step}")), "{step}: {out}");
    }
    for label in ROWS {
        let ms = measured(&out, label).unwrap_or_else(|| panic!("no number for {label}: {out}"));
        assert!((0.0..60_000.0).contains(&ms), "{label}: {ms}");
    }
    let [byte, token, all] =
        ["request -> first byte", "request -> first token", "start of up -> first token"]
            .map(|label| measured(&out, label).expect("checked above"));
    assert!(byte <= token && token < all, "{out}");
    assert!(token >= 20.0, "the demonstration engine reads for 20 ms: {out}");
    assert!(out.contains("left nothing behind"), "{out}");
    assert!(!out.contains('\u{1b}'), "no colour where nobody sees it: {out}");
    up.assert_nothing_is_left();
}

#[test]
fn an_engine_that_fails_is_told_and_its_log_is_kept() {
    let mut up = Up::start(&["--once", "--engine", "sh", "-c", "echo no such model; exit 3 # {port}"]);
    let (code, out, errors) = up.end(PATIENCE);
    assert_eq!(code, Some(1), "{out}{errors}");
    for part in ["the engine ended before it was healthy: exit status 3", "no such model", "the logs are in "]
    {
        assert!(errors.contains(part), "{part}: {errors}");
    }
    let logs = errors.split("the logs are in ").nth(1).expect("checked").lines().next().expect("a path");
    let log = fs::read_to_string(format!("{logs}/pool-0-r0.log")).expect("the engine's log is kept");
    assert_eq!(log, "no such model\n");
    assert_eq!(up.processes(), [0u32; 0], "processes are left");
}

#[test]
fn an_engine_without_a_port_is_refused_before_anything_starts() {
    let mut up = Up::start(&["--once", "--engine", "false"]);
    let (code, out, errors) = up.end(PATIENCE);
    assert_eq!((code, out.as_str()), (Some(1), ""), "{errors}");
    assert!(errors.contains("{port}") && errors.contains("false"), "{errors}");
    up.assert_nothing_is_left();
}

#[test]
fn it_stays_serves_and_ends_everything_when_interrupted() {
    let mut up = Up::start(&["--port", "0", "--max-tokens", "2"]);
    let chat = up.line("chat", "http://").split_whitespace().nth(1).expect("a URL").to_string();
    let dashboard = up.line("dashboard", "http://").split_whitespace().nth(1).expect("a URL").to_string();
    let curl = up.line("try", "curl");
    let body = curl.split("-d '").nth(1).and_then(|rest| rest.strip_suffix('\'')).expect("a body");
    up.line("watching", "Ctrl-C");
    let agent = ureq::Agent::config_builder().timeout_global(Some(PATIENCE)).proxy(None).build().new_agent();
    let mut answer = agent.post(&chat).header("Content-Type", "application/json").send(body).expect("200");
    let text = answer.body_mut().read_to_string().expect("a stream to its end");
    let page = agent.get(&dashboard).call().expect("200").body_mut().read_to_string().expect("a page");
    assert!(page.contains("<title>llama-orch</title>"), "{page}");
    assert!(curl.contains(&chat) && text.contains("[demo]") && text.contains("[DONE]"), "{text}");
    assert!(up.processes().len() >= 5, "up, two daemons, the provisioner, the engine");
    up.signal(Signal::INT);
    let (code, out, errors) = up.end(END_LIMIT);
    assert_eq!(code, Some(0), "{out}{errors}");
    assert!(out.contains("stopping") && out.contains("left nothing behind"), "{out}");
    up.assert_nothing_is_left();
}

#[test]
fn an_interrupted_question_is_told_from_an_answered_one() {
    let mut up = Up::start(&["--once", "--engine", "sh", "-c", "sleep 60 # {port}"]);
    up.line("engine", "started, pid");
    up.signal(Signal::INT);
    let (code, out, errors) = up.end(END_LIMIT);
    assert_eq!(code, Some(130), "{out}{errors}");
    up.assert_nothing_is_left();
}

#[test]
fn an_engine_that_dies_later_ends_it_with_the_reason() {
    let mut up = Up::start(&["--port", "0", "--max-tokens", "2"]);
    let started = up.line("engine", "started, pid ");
    let engine = started.split("pid ").nth(1).and_then(|rest| rest.split(':').next()).expect("a pid");
    up.line("watching", "");
    let engine = pid(engine.parse().expect("a number"));
    rustix::process::kill_process(engine, Signal::KILL).expect("it runs");
    let (code, out, errors) = up.end(END_LIMIT);
    assert_eq!(code, Some(1), "{out}{errors}");
    assert!(errors.contains("the engine ended by itself: killed by signal 9"), "{errors}");
    assert_eq!(up.processes(), [0u32; 0], "processes are left");
}

#[test]
fn killed_outright_it_still_takes_its_processes_with_it() {
    let mut up = Up::start(&["--port", "0", "--max-tokens", "2"]);
    up.line("watching", "");
    assert!(up.processes().len() >= 5, "up, two daemons, the provisioner, the engine");
    up.signal(Signal::KILL);
    up.end(END_LIMIT);
    let deadline = Instant::now() + END_LIMIT;
    while !up.processes().is_empty() {
        assert!(Instant::now() < deadline, "left: {:?}", up.processes());
        thread::sleep(LOOK);
    }
}

#[test]
fn a_taken_port_is_named_with_what_to_do() {
    let holder = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let port = holder.local_addr().expect("bound").port().to_string();
    for args in [&["--port", &port][..], &["--once", "--port", &port]] {
        let mut up = Up::start(args);
        let (code, out, errors) = up.end(PATIENCE);
        assert_eq!((code, out.as_str()), (Some(1), ""), "{errors}");
        assert!(errors.contains(&port) && errors.contains("--port N"), "{errors}");
        up.assert_nothing_is_left();
    }
}

#[test]
fn a_given_directory_is_kept_and_can_be_used_again() {
    let kept = tempfile::tempdir().expect("a temporary directory");
    let dir = kept.path().join("home");
    for _ in 0..2 {
        let mut up = Up::start(&["--once", "--max-tokens", "2", "--dir", dir.to_str().expect("UTF-8")]);
        let (code, out, errors) = up.end(PATIENCE);
        assert_eq!(code, Some(0), "{out}{errors}");
        up.assert_nothing_is_left();
    }
    let log = fs::read_to_string(dir.join("logs/orchestratord.log")).expect("logs are kept");
    assert_eq!(log.matches("HOME profile").count(), 2, "{log}");
    let handoffs = fs::read_dir(dir.join("engines")).expect("it is kept").count();
    assert_eq!(handoffs, 0, "handoffs are withdrawn");
}

#[test]
fn a_word_that_is_no_command_is_answered_with_those_that_are() {
    let output = Command::new(env!("CARGO_BIN_EXE_llorch")).arg("upp").output().expect("it starts");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2));
    assert!(errors.contains("there are up, ") && errors.contains(" and completions"), "{errors}");
}
