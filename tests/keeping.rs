//! `engine-provisioner` over a longer time, with real processes: engines that crash, hang, refuse to end, are
//! replaced, lose their keeper, and the files that name many of them.

#[path = "provisioner/harness.rs"]
#[allow(dead_code, reason = "shared with another test, which uses other parts")]
mod harness;

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use harness::{PATIENCE, Provisioner, group, pid, until, until_group_is_gone};
use llama_orch::wire::handoff::{self, Handoff, HandoffFile};
use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;

const LLORCH: &str = env!("CARGO_BIN_EXE_llorch");
const PROGRAM: &str = env!("CARGO_BIN_EXE_engine-provisioner");
/// Engines that fail are started again.
const KEEP: &str = "--restart=always";

fn root() -> TempDir {
    tempfile::tempdir().expect("a temporary directory")
}

fn demo_engine<'a>(flags: &[&'a str]) -> Vec<&'a str> {
    [&[LLORCH, "demo-engine", "--port", "{port}"], flags].concat()
}

fn kill(process: u32) {
    rustix::process::kill_process(pid(process), Signal::KILL).expect("it runs");
}

/// Prints what was measured. The limit is for a machine that is busy with other things.
#[allow(clippy::print_stdout, reason = "a figure for whoever runs the test by itself")]
fn measured(what: &str, since: Instant) {
    let took = since.elapsed();
    println!("{what}: {took:?}");
    assert!(took < Duration::from_secs(5), "{what}: {took:?}");
}

fn serve(provisioner: &mut Provisioner) -> Handoff {
    for event in ["spawned", "healthy", "handoff_written"] {
        provisioner.event(event);
    }
    provisioner.handoff().expect("it was written")
}

#[test]
fn a_crash_is_withdrawn_within_milliseconds_and_the_engine_comes_back() {
    let root = root();
    let mut provisioner = Provisioner::start(root.path(), &[KEEP], &demo_engine(&[]));
    let first = serve(&mut provisioner);
    assert_eq!(first.slots, 4, "nobody said a number, so the engine's own counts");
    assert_eq!(first.models, ["llorch-demo"]);
    let file = provisioner.handoff_file();
    let killed = Instant::now();
    kill(provisioner.engine());
    while file.exists() {
        assert!(killed.elapsed() < PATIENCE, "it is still there");
        std::hint::spin_loop();
    }
    measured("kill -9 to handoff withdrawn", killed);
    let failed = provisioner.event("failed");
    assert_eq!(failed["reason"], "the engine ended by itself: killed by signal 9 (SIGKILL)");
    let retry_ms = failed["retry_ms"].as_u64().expect("a pause");
    assert!((500..=1_000).contains(&retry_ms), "{failed}");
    provisioner.event("stopped");
    let second = serve(&mut provisioner);
    assert!(second.generation > first.generation && second.pid != first.pid);
    provisioner.signal(Signal::TERM);
    assert_eq!(provisioner.event("stopped")["pid"], provisioner.engine());
    assert_eq!(provisioner.end().0, 0);
}

#[test]
fn ready_to_handed_over_takes_milliseconds() {
    let root = root();
    let mut provisioner = Provisioner::start(root.path(), &[], &demo_engine(&["--load-ms", "500"]));
    provisioner.event("spawned");
    // The engine's own readiness, as seen by somebody who looks all the time.
    let port = until("the engine says where it listens", || {
        let log = fs::read_to_string(root.path().join("logs/pool-0-r0.log")).ok()?;
        log.trim_end().rsplit_once(':')?.1.parse::<u16>().ok()
    });
    let ready = loop {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).expect("it listens");
        stream.write_all(b"GET /health HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").expect("sent");
        let mut answer = String::new();
        let _ = stream.read_to_string(&mut answer);
        if answer.starts_with("HTTP/1.1 200") {
            break Instant::now();
        }
    };
    let file = provisioner.handoff_file();
    while !file.exists() {
        assert!(ready.elapsed() < PATIENCE, "it does not come");
        std::hint::spin_loop();
    }
    measured("engine ready to handoff written", ready);
}

#[test]
fn a_crash_loop_waits_longer_each_time_and_says_why() {
    let root = root();
    let mut provisioner =
        Provisioner::start(root.path(), &[KEEP], &["sh", "-c", "echo out of memory >&2; exit 7 # {port}"]);
    let mut longest = [1_000, 2_000].into_iter();
    for failures in 1..=2 {
        provisioner.event("spawned");
        let failed = provisioner.event("failed");
        assert_eq!(failed["failures"], failures);
        let longest = longest.next().expect("two");
        assert!((longest / 2..=longest).contains(&failed["retry_ms"].as_u64().expect("a pause")));
        provisioner.event("stopped");
    }
    provisioner.signal(Signal::TERM);
    let (code, said) = provisioner.end();
    assert_eq!(code, 0, "{said}");
    assert!(said.contains("exit status 7") && said.contains("  out of memory\n"), "{said}");
    assert!(said.contains("started again in"), "{said}");
}

#[test]
fn who_ignores_sigterm_is_asked_twice_and_killed() {
    let root = root();
    let engine = [
        "sh".to_string(),
        "-c".into(),
        format!("trap '' TERM; '{LLORCH}' demo-engine --port {{port}} & wait; wait"),
    ];
    let mut provisioner = Provisioner::start(root.path(), &["--stop-ms=200"], &engine);
    serve(&mut provisioner);
    provisioner.signal(Signal::TERM);
    provisioner.event("stubborn");
    assert_eq!(provisioner.event("stopped")["status"], "killed by signal 9 (SIGKILL)");
    assert_eq!(provisioner.end().0, 0);
    until_group_is_gone(provisioner.engine());
}

#[test]
fn a_hangup_replaces_the_engine_without_a_gap() {
    let root = root();
    let mut provisioner = Provisioner::start(root.path(), &[KEEP], &demo_engine(&["--load-ms", "300"]));
    let first = serve(&mut provisioner);
    // Somebody uses the old one.
    let user = TcpStream::connect(("127.0.0.1", first.url.port())).expect("it listens");
    provisioner.signal(Signal::HUP);
    provisioner.event("replacing");
    provisioner.event("spawned");
    // The new one loads for as long as the demo engine was told to.
    assert_eq!(provisioner.handoff().expect("no gap").pid, first.pid);
    provisioner.event("healthy");
    provisioner.handoff().expect("no gap");
    provisioner.event("handoff_written");
    let second = provisioner.handoff().expect("no gap");
    assert!(second.generation > first.generation && second.url != first.url);
    provisioner.event("replaced");
    assert!(!group(first.pid.expect("a pid")).is_empty(), "it is still used");
    drop(user);
    assert_eq!(provisioner.event("stopped")["pid"], first.pid.expect("a pid"));
    assert_eq!(provisioner.handoff().expect("untouched").pid, second.pid);
    provisioner.signal(Signal::TERM);
    provisioner.event("stopped");
    assert_eq!(provisioner.end().0, 0);
    assert_eq!(provisioner.files(), [""; 0]);
}

#[test]
fn what_nohup_started_outlives_its_terminal() {
    let root = root();
    let mut nohup = Command::new("nohup");
    nohup.arg(PROGRAM);
    let mut provisioner = Provisioner::start_by(nohup, root.path(), &[KEEP], &demo_engine(&[]), &[]);
    let first = serve(&mut provisioner);
    provisioner.signal(Signal::HUP);
    kill(provisioner.engine());
    // Events come in the order in which things happen: nothing happened before.
    provisioner.event("failed");
    provisioner.event("stopped");
    assert_ne!(serve(&mut provisioner).pid, first.pid);
    provisioner.signal(Signal::TERM);
    provisioner.event("stopped");
    assert_eq!(provisioner.end().0, 0);
}

#[test]
fn a_replacement_that_fails_changes_nothing() {
    let root = root();
    let engine = format!(
        "[ -e '{0}/broken' ] && exit 9; exec '{LLORCH}' demo-engine --port {{port}}",
        root.path().display()
    );
    let mut provisioner = Provisioner::start(root.path(), &[KEEP], &["sh", "-c", &engine]);
    let first = serve(&mut provisioner);
    fs::write(root.path().join("broken"), "").expect("written");
    provisioner.signal(Signal::HUP);
    for event in ["replacing", "spawned"] {
        provisioner.event(event);
    }
    let kept = provisioner.event("kept_old");
    assert!(kept["reason"].as_str().expect("a reason").contains("exit status 9"), "{kept}");
    provisioner.event("stopped");
    assert_eq!(provisioner.handoff(), Some(first.clone()));
    assert!(!group(first.pid.expect("a pid")).is_empty());
    rustix::process::kill_process_group(pid(first.pid.expect("a pid")), Signal::TERM).expect("it runs");
    provisioner.event("failed");
    provisioner.event("stopped");
}

#[test]
fn on_a_fixed_port_a_failed_replacement_brings_the_old_one_back() {
    let root = root();
    let port = llama_orch::service::machine::listen_on_free_port().expect("a port");
    let number = port.local_addr().expect("bound").port();
    drop(port);
    let marker = root.path().join("broken");
    let engine = format!(
        "[ -e '{0}' ] && rm '{0}' && exit 9; exec '{LLORCH}' demo-engine --port {number}",
        marker.display()
    );
    let flag = format!("--port={number}");
    let mut provisioner = Provisioner::start(root.path(), &[KEEP, &flag], &["sh", "-c", &engine]);
    serve(&mut provisioner);
    fs::write(&marker, "").expect("written");
    provisioner.signal(Signal::HUP);
    for event in ["replacing", "stopped", "spawned", "kept_old", "stopped"] {
        provisioner.event(event);
    }
    let back = serve(&mut provisioner);
    assert_eq!(back.url.port(), number);
}

#[test]
fn killed_outright_it_takes_its_engines_along() {
    let root = root();
    let engine = ["sh".to_string(), "-c".into(), format!("'{LLORCH}' demo-engine --port {{port}} & wait")];
    let mut provisioner = Provisioner::start(root.path(), &[KEEP], &engine);
    serve(&mut provisioner);
    let leader = provisioner.engine();
    assert_eq!(group(leader).len(), 2, "a tree of processes");
    let killed = Instant::now();
    provisioner.signal(Signal::KILL);
    until_group_is_gone(leader);
    measured("kill -9 of the provisioner to the end of its engine", killed);
}

/// Memory of a process by its line in /proc/PID/status, in KiB.
fn memory_kib(process: u32, line: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{process}/status")).expect("it runs");
    let line = status.lines().find(|text| text.starts_with(line)).expect("the kernel tells");
    line.split_whitespace().nth(1).and_then(|number| number.parse().ok()).expect("a number")
}

#[test]
#[allow(clippy::print_stdout, reason = "a figure for whoever runs the test by itself")]
fn who_keeps_an_engine_is_small() {
    let root = root();
    let mut provisioner = Provisioner::start(root.path(), &[], &demo_engine(&[]));
    serve(&mut provisioner);
    let (resident, own) = (memory_kib(provisioner.id(), "VmRSS:"), memory_kib(provisioner.id(), "RssAnon:"));
    println!("resident: {resident} KiB, of which {own} KiB are no file's");
    // What is a file's is the program and the C library, as much as the kernel likes to map of them: it shares
    // these and takes them back. They are several times as large where nothing was optimised.
    let limit = if cfg!(debug_assertions) { 32 << 10 } else { 8 << 10 };
    assert!(own < 2 << 10 && resident < limit, "{resident} KiB, {own} KiB");
}

#[test]
fn kept_engines_are_taken_over_by_the_next_start() {
    let root = root();
    let flags = [KEEP, "--orphans=keep"];
    let mut provisioner = Provisioner::start(root.path(), &flags, &demo_engine(&[]));
    let before = serve(&mut provisioner);
    let engine = provisioner.engine();
    provisioner.signal(Signal::KILL);
    until("it is gone", || provisioner.is_gone().then_some(()));
    assert!(!group(engine).is_empty(), "the engine outlives its keeper");
    let mut next = Provisioner::start(root.path(), &flags, &demo_engine(&[]));
    assert_eq!(next.event("adopted")["pid"], engine);
    next.event("healthy");
    next.event("handoff_written");
    let after = next.handoff().expect("written");
    assert_eq!((after.pid, after.generation, &after.url), (before.pid, before.generation, &before.url));
    // Another keeper of the same engines is refused.
    let mut third = Provisioner::start(root.path(), &flags, &demo_engine(&[]));
    let (code, said) = third.end();
    assert!(code == 1 && said.contains("another engine-provisioner keeps"), "{said}");
    // It is kept as if it had been started here.
    kill(engine);
    assert_eq!(next.event("failed")["failures"], 1);
    next.event("stopped");
    serve(&mut next);
    next.signal(Signal::TERM);
    next.event("stopped");
    assert_eq!(next.end().0, 0);
    until_group_is_gone(engine);
}

/// Serves HTTP, a request a connection: `say` is told the number, the request line and the body.
fn answer(listener: &TcpListener, mut say: impl FnMut(usize, &str, &[u8]) -> (&'static str, String)) {
    for (n, stream) in listener.incoming().map_while(Result::ok).enumerate() {
        let mut reader = BufReader::new(stream);
        let (mut first, mut length) = (String::new(), 0);
        let _ = reader.read_line(&mut first);
        loop {
            let mut line = String::new();
            if reader.read_line(&mut line).unwrap_or(0) <= 2 {
                break;
            }
            if let Some(text) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                length = text.trim().parse().expect("a number");
            }
        }
        let mut body = vec![0; length];
        reader.read_exact(&mut body).expect("a body");
        let (status, text) = say(n, &first, &body);
        let _ = write!(
            reader.get_mut(),
            "HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{text}",
            text.len()
        );
    }
}

#[test]
fn a_stop_waits_until_pool_managerd_says_that_the_replica_is_drained() {
    let root = root();
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let flag = format!("--pool-managerd=http://{}", listener.local_addr().expect("bound"));
    let mut provisioner = Provisioner::start(root.path(), &[&flag], &demo_engine(&[]));
    let handoff = serve(&mut provisioner);
    let (engine, file) = (provisioner.engine(), provisioner.handoff_file());
    let (sender, asked) = channel();
    thread::spawn(move || {
        answer(&listener, |n, line, _| {
            let lives = !group(engine).is_empty();
            let _ = sender.send((line.trim_end().to_string(), lives && !file.exists()));
            let replica = format!(r#"{{"replica_id":"r0","url":"{}","ready":false}}"#, handoff.url);
            match n {
                0..3 => ("200 OK", format!(r#"{{"pool_id":"pool-0","replicas":[{replica}]}}"#)),
                _ => ("404 Not Found", "{}".into()),
            }
        });
    });
    provisioner.signal(Signal::TERM);
    for _ in 0..4 {
        let (line, is_withdrawn_and_lives) = asked.recv_timeout(PATIENCE).expect("a question");
        assert_eq!(line, "GET /v2/pools/pool-0/status HTTP/1.1");
        assert!(is_withdrawn_and_lives, "withdrawn first, ended last");
    }
    provisioner.event("stopped");
    assert_eq!(provisioner.end().0, 0);
}

#[test]
fn the_file_that_the_readme_shows_works_as_it_stands_there() {
    let root = root();
    let readme = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/README.md")).expect("a README");
    let (_, text) = readme.split_once("```toml\n").expect("an example");
    let file = root.path().join("engines.toml");
    fs::write(&file, text.split("```").next().expect("its end")).expect("written");
    let up = Up::start(root.path(), &file);
    for _ in 0..2 {
        up.event("handoff_written", "");
    }
    let slots = |name| up.handoff(name).expect("written").slots;
    assert_eq!((slots("chat-r0.json"), slots("chat-r1.json")), (4, 2));
}

#[test]
fn a_place_that_is_notified_hears_of_the_handoff_until_it_takes_it() {
    let root = root();
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let url = format!("http://{}/hook", listener.local_addr().expect("bound"));
    let (sender, bodies): (_, Receiver<Value>) = channel();
    thread::spawn(move || {
        answer(&listener, |n, _, body| {
            let _ = sender.send(serde_json::from_slice(body).expect("JSON"));
            (if n == 0 { "503 Busy" } else { "200 OK" }, String::new())
        });
    });
    let mut provisioner =
        Provisioner::start(root.path(), &[&format!("--notify={url}"), "--gpu=0"], &demo_engine(&[]));
    let written = serve(&mut provisioner);
    for _ in 0..2 {
        let told = bodies.recv_timeout(PATIENCE).expect("a notice, and again after a refusal");
        assert_eq!((told["pid"].as_u64(), &told["ready"]), (written.pid.map(u64::from), &Value::Bool(true)));
        assert_eq!((&told["slots"], &told["device_mask"]), (&4.into(), &"0".into()));
    }
    provisioner.signal(Signal::TERM);
    let told = bodies.recv_timeout(PATIENCE).expect("a last notice");
    assert_eq!(told["ready"], false);
    provisioner.event("stopped");
    assert_eq!(provisioner.end().0, 0);
}

/// `engine-provisioner up` with a file.
struct Up {
    child: Child,
    events: Receiver<Value>,
    directory: std::path::PathBuf,
}

impl Up {
    fn start(root: &Path, file: &Path) -> Up {
        let directory = root.join("engines");
        let mut child = harness::program()
            .args(["up", "--report", "-c"])
            .arg(file)
            .arg("--handoff-dir")
            .arg(&directory)
            .env("POOL_MANAGERD_URL", "http://127.0.0.1:1")
            .env_remove("LLORCH_REQUIRE_GPU")
            .env("PATH", Path::new(LLORCH).parent().expect("a directory"))
            .stdout(Stdio::piped())
            .spawn()
            .expect("the binary under test starts");
        let (sender, events) = channel();
        let out = BufReader::new(child.stdout.take().expect("piped"));
        thread::spawn(move || {
            for line in out.lines().map_while(Result::ok) {
                if sender.send(serde_json::from_str(&line).expect("JSON")).is_err() {
                    return;
                }
            }
        });
        Up { child, events, directory }
    }

    /// Waits for an event of a replica; others may come before.
    fn event(&self, name: &str, replica: &str) -> Value {
        loop {
            let event =
                self.events.recv_timeout(PATIENCE).unwrap_or_else(|_| panic!("no {name} of {replica}"));
            if event["event"] == name && (replica.is_empty() || event["replica"] == replica) {
                return event;
            }
        }
    }

    fn handoff(&self, name: &str) -> Option<Handoff> {
        match handoff::parse(&fs::read(self.directory.join(name)).ok()?).expect("complete") {
            HandoffFile::Engine(handoff) => Some(*handoff),
            HandoffFile::ModelOnly => None,
        }
    }

    fn signal(&self, signal: Signal) {
        rustix::process::kill_process(pid(self.child.id()), signal).expect("it runs");
    }
}

impl Drop for Up {
    fn drop(&mut self) {
        // Its guardian ends what it leaves.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_file_names_many_engines_and_only_what_changed_is_restarted() {
    let root = root();
    let file = root.path().join("engines.toml");
    let pool = |id: &str, extra: &str| {
        format!(
            "[[pools]]\nid = \"{id}\"\ncommand = [\"{LLORCH}\", \"demo-engine\", \"--port\", \"{{port}}\"{extra}]\n"
        )
    };
    fs::write(&file, [pool("a", ""), pool("b", ""), pool("c", "")].concat()).expect("written");
    let mut up = Up::start(root.path(), &file);
    for _ in 0..3 {
        up.event("handoff_written", "");
    }
    let names = ["a-r0.json", "b-r0.json", "c-r0.json", "d-r0.json"];
    let before: Vec<Option<Handoff>> = names.iter().map(|name| up.handoff(name)).collect();
    // `a` stays, `b` changes, `c` goes, `d` comes.
    fs::write(&file, [pool("a", ""), pool("b", ", \"--slots\", \"2\""), pool("d", "")].concat())
        .expect("written");
    up.signal(Signal::HUP);
    for _ in 0..2 {
        up.event("handoff_written", "");
    }
    until("c is withdrawn", || up.handoff("c-r0.json").is_none().then_some(()));
    let after: Vec<Option<Handoff>> = names.iter().map(|name| up.handoff(name)).collect();
    assert_eq!(after[0], before[0], "untouched");
    assert_eq!(after[1].as_ref().map(|b| b.slots), Some(2));
    assert!(after[2].is_none() && after[3].is_some());
    // A file that is wrong changes nothing.
    fs::write(&file, "[[pools]]\nid = 7\n").expect("written");
    up.signal(Signal::HUP);
    let refused = up.event("refused", "");
    assert!(refused["reason"].as_str().expect("a reason").contains("no `id`"), "{refused}");
    assert_eq!(up.handoff("a-r0.json"), before[0]);
    up.signal(Signal::TERM);
    assert_eq!(until("its end", || up.child.try_wait().expect("a child")).code(), Some(0));
    assert_eq!(fs::read_dir(&up.directory).expect("listed").count(), 0);
}

fn once(args: &[&str], path: &str) -> (i32, String, String) {
    let output = Command::new(PROGRAM)
        .args(args)
        .env("PATH", path)
        .env_remove("LLORCH_REQUIRE_GPU")
        .env_remove("LLORCH_ALLOW_CPU")
        .output()
        .expect("it ends");
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    (output.status.code().unwrap_or(-1), text(output.stdout), text(output.stderr))
}

#[test]
fn a_plan_is_shown_and_nothing_started() {
    let root = root();
    let path = |name: &str| root.path().join(name).display().to_string();
    // A header without tensors, which says nothing of a context.
    fs::write(path("m.gguf"), [&b"GGUF\x03\0\0\0"[..], &[0; 56]].concat()).expect("written");
    let server = root.path().join("llama-server");
    fs::write(&server, "#!/bin/sh\nexit 1\n").expect("written");
    fs::set_permissions(&server, fs::Permissions::from_mode(0o755)).expect("executable");
    fs::write(
        path("f.toml"),
        "[[pools]]\nid = \"p\"\nmodel = \"./m.gguf\"\nctx = 512\nflags = [\"-ngl\", \"9\"]\n",
    )
    .expect("written");
    let search = format!("{}:/usr/bin:/bin", root.path().display());
    let (code, out, err) = once(&["plan", "-c", &path("f.toml"), "--handoff-dir", &path("engines")], &search);
    assert_eq!(code, 0, "{err}");
    let line = "llama-server --model ROOT/m.gguf --host 127.0.0.1 --port PORT --parallel 1 --ctx-size 512 --n-gpu-layers 9 --no-cont-batching --metrics --no-webui";
    assert!(out.contains(&line.replace("ROOT", &root.path().display().to_string())), "{out}");
    let (code, out, _) = once(&["check", "-c", &path("f.toml"), "--handoff-dir", &path("engines")], &search);
    assert_eq!((code, out.trim()), (0, "1 engines can be started"));
}

#[test]
fn what_cannot_work_is_refused_before_anything_is_started() {
    let root = root();
    let path = |name: &str| root.path().join(name).display().to_string();
    fs::write(path("empty.gguf"), "").expect("written");
    fs::write(path("plain"), "x").expect("written");
    fs::write(path("in-the-way"), "x").expect("written");
    let cpu_build = root.path().join("llama-cpu");
    fs::write(&cpu_build, "#!/bin/sh\necho 'Available devices:'\n").expect("written");
    fs::set_permissions(&cpu_build, fs::Permissions::from_mode(0o755)).expect("executable");
    let holder = TcpListener::bind("127.0.0.1:0").expect("a port");
    let taken = format!("--port={}", holder.local_addr().expect("bound").port());
    let engines = format!("--handoff-dir={}", path("engines"));
    let (empty, absent) = (format!("--model={}", path("empty.gguf")), format!("--model={}", path("no.gguf")));
    let (plain, in_the_way) = (path("plain"), format!("--handoff-dir={}", path("in-the-way/engines")));
    let cpu_build = cpu_build.display().to_string();
    for (flags, program, why) in [
        (&[engines.as_str()][..], "no-such-engine", "install it"),
        (&[&engines], "/no/such/engine", "correct its path"),
        (&[&engines], &plain, "mode +x"),
        (&[&engines, &taken], "sh", "give --port 0"),
        (&[&engines, &absent], "sh", "give the path of a model file"),
        (&[&engines, &empty], "sh", "fetch it again"),
        (&[&engines, "--offline", "--model=hf:org/repo"], "sh", "give its path"),
        (&[&in_the_way], "sh", "cannot create"),
        (&[&engines, "--require-gpu"], &cpu_build, "GPU-only enforcement"),
    ] {
        let args = [&["run"], flags, &["--", program, "{port}"]].concat();
        let (code, _, err) = once(&args, "/usr/bin:/bin");
        assert!(code == 1 || code == 78, "{args:?}: {code} {err}");
        assert!(err.contains(why) && err.trim_end().lines().count() == 1, "{args:?}: {err}");
        let logs = fs::read_dir(path("logs")).map_or(0, Iterator::count);
        assert_eq!(logs, 0, "{args:?}: something was started");
    }
}
