//! The operator's command against real daemons, into pipes and on a terminal.

#[path = "daemons/harness.rs"]
#[allow(dead_code, reason = "each file of tests uses a part of it")]
mod harness;

use std::fs::{self, File};
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use harness::{
    Home, ORCHESTRATORD, POOL_MANAGERD, Process, ask, demo_engine, free_port, get, hand_over, handoff, open,
    until,
};
use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use serde_json::Value;

const LLORCH: &str = env!("CARGO_BIN_EXE_llorch");

/// A command with nothing of this process's surroundings that it would heed.
fn command(args: &[&str], env: &[(&str, &str)], directory: &Path) -> Command {
    let mut command = Command::new(LLORCH);
    for name in ["NO_COLOR", "COLUMNS", "LLORCH_URL", "ORCHESTRATORD_URL", "LLORCH_API_TOKEN"] {
        command.env_remove(name);
    }
    command.args(args).envs(env.iter().copied()).current_dir(directory).stdin(Stdio::null());
    command
}

fn llorch(args: &[&str], env: &[(&str, &str)], directory: &Path) -> Output {
    command(args, env, directory).output().expect("it runs")
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).expect("UTF-8")
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).expect("UTF-8")
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"))
}

/// A control plane in the CLOUD profile and one agent with one engine of four slots.
struct Cluster {
    directory: tempfile::TempDir,
    plane: u16,
    agent: u16,
    url: String,
    _processes: Vec<Process>,
}

impl Cluster {
    fn start() -> Cluster {
        let directory = tempfile::tempdir().expect("a directory");
        let (plane, agent, engine) = (free_port(), free_port(), free_port());
        let mut processes = vec![demo_engine(engine, &["--slots", "4"], directory.path())];
        hand_over(&directory.path().join(".runtime/engines"), "a.json", &handoff(engine, "r0", 4));
        let (url, address) = (format!("http://127.0.0.1:{plane}"), format!("http://127.0.0.1:{agent}"));
        let state = |name: &str| directory.path().join(name).display().to_string();
        let (plane_state, agent_state) = (state("plane"), state("agent"));
        let env = [
            ("ORCHESTRATORD_CLOUD_PROFILE", "true"),
            ("ORCHESTRATORD_ADDR", url.trim_start_matches("http://")),
            ("ORCHESTRATORD_STATE_DIR", &plane_state),
        ];
        processes.push(Process::start(ORCHESTRATORD, &[], &env, directory.path()));
        let env = [
            ("POOL_MANAGERD_CLOUD_PROFILE", "true"),
            ("POOL_MANAGERD_ADDR", address.trim_start_matches("http://")),
            ("POOL_MANAGERD_ADDRESS", &address),
            ("POOL_MANAGERD_NODE_ID", "gpu-1"),
            ("POOL_MANAGERD_STATE_DIR", &agent_state),
            ("ORCHESTRATORD_URL", &url),
        ];
        processes.push(Process::start(POOL_MANAGERD, &[], &env, directory.path()));
        until("a replica", || {
            harness::metric(plane, "orchestratord_replicas_routable").filter(|n| *n == 1.0)
        });
        Cluster { directory, plane, agent, url, _processes: processes }
    }

    fn run(&self, args: &[&str]) -> Output {
        llorch(args, &[("LLORCH_URL", &self.url)], self.directory.path())
    }

    fn agent_url(&self) -> String {
        format!("http://127.0.0.1:{}", self.agent)
    }
}

#[test]
fn status_shows_either_daemon_at_any_width_and_as_json() {
    let cluster = Cluster::start();
    let agent = cluster.agent_url();
    for (url, parts) in [
        (cluster.url.as_str(), ["orchestratord", "gpu-1", "Online", "pool-0", "routable", "4/4"]),
        (agent.as_str(), ["pool-managerd", "node gpu-1", "pool-0/r0", "ready", "4/4", "no GPU"]),
    ] {
        for columns in [40, 60, 80, 160] {
            let env = [("COLUMNS", columns.to_string())];
            let env = [("COLUMNS", env[0].1.as_str())];
            let output = llorch(&["status", "--url", url], &env, cluster.directory.path());
            let text = stdout(&output);
            assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
            for part in parts {
                assert!(text.contains(part) || columns < 60, "{part} at {columns}: {text}");
            }
            // The first lines are sentences; the tables fit.
            let widest = text.lines().skip(2).map(|line| line.chars().count()).max().unwrap_or(0);
            assert!(widest <= columns, "{widest} of {columns}: {text}");
            assert!(!text.contains('\x1b'), "a pipe is no terminal: {text}");
        }
    }
    let status = json(&cluster.run(&["status", "--json"]));
    assert_eq!((&status["service"], &status["queue"]["waiting"]), (&"orchestratord".into(), &0.into()));
    assert_eq!(status["nodes"][0]["replicas"][0]["routable"], true);
}

#[test]
fn exit_codes_say_what_kind_of_failure_it_was() {
    let cluster = Cluster::start();
    let token = [("LLORCH_API_TOKEN", "secret")];
    let locked = Home::start(&token);
    let locked_url = format!("http://127.0.0.1:{}", locked.port);
    let nobody = format!("http://127.0.0.1:{}", free_port());
    let directory = cluster.directory.path();
    let cases: &[(&[&str], i32, &str)] = &[
        (&["status"], 0, ""),
        (&["status", "--nonsense"], 2, "--nonsense"),
        (&["drain", "everything"], 2, "there are node, gpu N"),
        (&["drain", "pool", "none"], 3, "there is no pool none"),
        (&["resume", "replica", "pool-0/r9", "--node", "gpu-1"], 3, "there is no replica pool-0/r9"),
        (&["explain", "unknown"], 3, "no request \"unknown\""),
        (&["check", "nowhere.json"], 3, "there is no such file"),
        (&["withdraw", "pool-0/r9"], 3, "no handoff in"),
        (&["status", "--url", &nobody], 4, "cannot reach"),
        (&["events", "--follow", "--url", &nobody], 4, "cannot reach"),
        (&["status", "--url", &locked_url], 5, "wants a token"),
        (&["status", "--url", &locked_url, "--api-token", "other"], 5, "does not accept the token"),
        (&["adopt", "http://10.255.1.1:1"], 5, "is not this machine"),
        (&["status", "--url", "ftp://x"], 78, "--url"),
    ];
    for (args, code, part) in cases {
        let output = cluster.run(args);
        let told = stderr(&output);
        assert_eq!(output.status.code(), Some(*code), "{args:?}: {told}");
        assert!(told.contains(part), "{args:?}: {told}");
        assert!(*code == 2 || told.lines().count() <= 1, "one line: {told}");
    }
    let file = directory.join("token");
    fs::write(&file, "secret\n").expect("written");
    let env = [("LLORCH_API_TOKEN_FILE", file.to_str().expect("a path")), ("LLORCH_URL", &locked_url)];
    assert_eq!(llorch(&["status"], &env, directory).status.code(), Some(0), "the daemon's own variables");
    let home = llorch(&["drain", "node"], &env, directory);
    assert_eq!(home.status.code(), Some(0), "it drains its own machine: {}", stderr(&home));
    let unknown = llorch(&["drain", "pool", "none"], &env, directory);
    assert_eq!(unknown.status.code(), Some(3), "{}", stderr(&unknown));
}

#[test]
fn an_engine_is_adopted_checked_asked_and_withdrawn() {
    let cluster = Cluster::start();
    let engine = free_port();
    let _engine = demo_engine(engine, &["--slots", "3", "--model", "tiny"], cluster.directory.path());
    let url = format!("http://127.0.0.1:{engine}");
    let adopted = cluster.run(&["adopt", &url, "--pool", "extra", "--replica", "r1"]);
    assert_eq!(adopted.status.code(), Some(0), "{}", stderr(&adopted));
    assert!(stdout(&adopted).contains("slots: 3, models: tiny"), "{}", stdout(&adopted));
    let file = cluster.directory.path().join(".runtime/engines/extra-r1.json");
    let written: Value = serde_json::from_slice(&fs::read(&file).expect("a file")).expect("JSON");
    assert_eq!(
        (&written["slots"], &written["model"], &written["engine"]),
        (&3.into(), &"tiny".into(), &"llamacpp".into())
    );
    assert_eq!(fs::metadata(&file).expect("a file").mode() & 0o137, 0, "closed to others");
    until("both", || harness::metric(cluster.plane, "orchestratord_replicas_routable").filter(|n| *n == 2.0));
    let checked = cluster.run(&["check", ".runtime/engines"]);
    assert_eq!(checked.status.code(), Some(0), "{}", stdout(&checked));
    assert!(stdout(&checked).contains("extra/r1"));

    let other = cluster.run(&["adopt", "http://127.0.0.1:1", "--pool", "extra", "--replica", "r1"]);
    assert_eq!(other.status.code(), Some(5), "{}", stderr(&other));
    let silent = cluster.run(&[
        "adopt",
        "http://127.0.0.1:1",
        "--pool=extra",
        "--replica=r1",
        "--replace",
        "--dry-run",
    ]);
    assert_eq!(json(&silent)["url"], "http://127.0.0.1:1");

    let withdrawn = cluster.run(&["withdraw", "extra/r1"]);
    assert!(withdrawn.status.success() && !file.exists(), "{}", stderr(&withdrawn));
    until("one", || harness::metric(cluster.plane, "orchestratord_replicas_routable").filter(|n| *n == 1.0));

    hand_over(&cluster.directory.path().join(".runtime/engines"), "bad.json", r#"{"url":"x"}"#);
    let checked = cluster.run(&["check", ".runtime/engines"]);
    assert_eq!(checked.status.code(), Some(1));
    assert!(stdout(&checked).contains("not a usable URL"), "{}", stdout(&checked));
}

#[test]
fn a_drain_waits_for_what_runs_and_stays_when_it_is_interrupted() {
    let cluster = Cluster::start();
    let body = r#"{"messages":[{"role":"user","content":"one two three"}],"max_tokens":1500,"stream":true}"#;
    let mut stream = open(cluster.plane, "POST", "/v1/chat/completions", None, body).expect("an answer");
    stream.event().expect("it runs");
    let mut child =
        command(&["drain", "pool", "pool-0"], &[("LLORCH_URL", &cluster.url)], cluster.directory.path())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("it starts");
    let path = "/v2/pools/pool-0/drain";
    until("the drain", || get(cluster.agent, path).filter(|answer| answer.json()["in_flight"] == 1));
    std::thread::sleep(Duration::from_millis(100));
    assert!(child.try_wait().expect("a child").is_none(), "it waits");
    interrupt(&child);
    let ended = child.wait_with_output().expect("it ends");
    let told = stderr(&ended);
    assert_eq!(ended.status.code(), Some(1), "{told}");
    assert!(
        told.contains("goes on draining, with 1 running") && told.contains("llorch resume pool pool-0"),
        "{told}"
    );
    assert_eq!(get(cluster.agent, path).expect("an answer").json()["draining"], true);

    // With a deadline, directly at the agent: what still runs is cut.
    let url = cluster.agent_url();
    let cut = cluster.run(&["drain", "replica", "pool-0/r0", "--deadline-ms", "200", "--url", &url]);
    assert_eq!(cut.status.code(), Some(0), "{}", stderr(&cut));
    assert!(
        stdout(&cut).ends_with("replica pool-0/r0: drained (0 running, 0 finished, 1 cut)\n"),
        "{}",
        stdout(&cut)
    );
    for scope in [["pool", "pool-0"], ["replica", "pool-0/r0"]] {
        let resumed = cluster.run(&["resume", scope[0], scope[1]]);
        assert_eq!(resumed.status.code(), Some(0), "{}", stderr(&resumed));
    }
    until("work", || harness::metric(cluster.plane, "orchestratord_replicas_routable").filter(|n| *n == 1.0));
}

fn interrupt(child: &Child) {
    let pid = Pid::from_raw(child.id().cast_signed()).expect("a pid");
    kill_process(pid, Signal::INT).expect("signalled");
}

#[test]
fn a_request_is_explained() {
    let cluster = Cluster::start();
    let body = r#"{"messages":[{"role":"user","content":"hello"}],"max_tokens":2}"#;
    let answer = ask(cluster.plane, "POST", "/v1/chat/completions", None, body).expect("an answer");
    let id = answer.field("x-request-id").expect("an id").to_string();
    let told = stdout(&cluster.run(&["explain", &id]));
    for part in
        [id.as_str(), "answered after", "attempt 1: gpu-1/pool-0/r0, chosen by placement", "status 200"]
    {
        assert!(told.contains(part), "{part}: {told}");
    }
    assert!(stdout(&cluster.run(&["explain"])).contains(&id));
    assert_eq!(json(&cluster.run(&["explain", &id, "--json"]))["outcome"], "answered");
}

/// Lines of a process, as they come.
fn lines(child: &mut Child) -> mpsc::Receiver<String> {
    let mut out = child.stdout.take().expect("a pipe");
    let (send, receive) = mpsc::channel();
    std::thread::spawn(move || {
        let (mut bytes, mut text) = ([0; 1024], String::new());
        while let Ok(length @ 1..) = out.read(&mut bytes) {
            text.push_str(&String::from_utf8_lossy(&bytes[..length]));
            while let Some((line, rest)) = text.split_once('\n') {
                let _ = send.send(line.to_string());
                text = rest.to_string();
            }
        }
    });
    receive
}

#[test]
fn events_are_followed_over_a_restart_of_the_daemon() {
    let mut home = Home::start(&[]);
    let url = format!("http://127.0.0.1:{}", home.port);
    let args = ["events", "--follow", "--json", "--interval-ms", "50", "--url", &url];
    let mut child = command(&args, &[], home.directory.path())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("it starts");
    let lines = lines(&mut child);
    let mut seen: Vec<String> = Vec::new();
    let mut wait_for = |part: &str| {
        until(part, || {
            seen.extend(lines.try_iter());
            seen.iter().position(|line| line.contains(part)).map(|index| seen.remove(index))
        })
    };
    hand_over(&home.engines(), "one.json", &handoff(free_port(), "one", 1));
    let first: Value = serde_json::from_str(&wait_for("accepted for pool-0/one")).expect("JSON");
    assert!(first["seq"].is_u64());
    home.daemon.kill();
    let addr = format!("127.0.0.1:{}", home.port);
    let env = [("ORCHESTRATORD_ADDR", addr.as_str())];
    std::thread::sleep(Duration::from_millis(150));
    home.daemon = Process::start(ORCHESTRATORD, &[], &env, home.directory.path());
    wait_for("accepted for pool-0/one");
    hand_over(&home.engines(), "two.json", &handoff(free_port(), "two", 1));
    wait_for("accepted for pool-0/two");
    interrupt(&child);
    let ended = child.wait_with_output().expect("it ends");
    assert_eq!(ended.status.code(), Some(0));
    let told = stderr(&ended);
    assert!(told.contains("cannot reach") && told.contains("has started anew"), "{told}");
    let twice = seen.iter().filter(|line| line.contains("accepted for")).count();
    assert_eq!(twice, 0, "nothing is told twice: {seen:?}");
}

/// A terminal of so many columns and a command that runs on it.
struct Terminal {
    child: Child,
    seen: mpsc::Receiver<Vec<u8>>,
    text: String,
}

impl Terminal {
    fn run(args: &[&str], env: &[(&str, &str)], columns: u16, directory: &Path) -> Terminal {
        let controller = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).expect("a terminal");
        grantpt(&controller).expect("granted");
        unlockpt(&controller).expect("unlocked");
        let size = rustix::termios::Winsize { ws_row: 40, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        rustix::termios::tcsetwinsize(&controller, size).expect("sized");
        let name = ptsname(&controller, Vec::new()).expect("a name");
        let open = || -> Stdio {
            let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NOCTTY;
            let end: OwnedFd =
                rustix::fs::open(name.as_c_str(), flags, rustix::fs::Mode::empty()).expect("opened");
            Stdio::from(end)
        };
        let mut command = command(args, env, directory);
        command.env("TERM", "xterm").stdin(open()).stdout(open()).stderr(open());
        let child = command.spawn().expect("it starts");
        drop(command);
        let (send, seen) = mpsc::channel();
        let mut file = File::from(controller);
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(length @ 1..) = file.read(&mut bytes) {
                let _ = send.send(bytes[..length].to_vec());
            }
        });
        Terminal { child, seen, text: String::new() }
    }

    fn until(&mut self, what: &str, mut is_there: impl FnMut(&str) -> bool) {
        until(what, || {
            for bytes in self.seen.try_iter() {
                self.text.push_str(&String::from_utf8_lossy(&bytes));
            }
            is_there(&self.text).then_some(())
        });
    }

    fn end(mut self) -> (Option<i32>, String) {
        let status = until("the end", || self.child.try_wait().expect("a child"));
        while let Ok(bytes) = self.seen.recv_timeout(Duration::from_secs(1)) {
            self.text.push_str(&String::from_utf8_lossy(&bytes));
        }
        (status.code(), std::mem::take(&mut self.text))
    }
}

#[test]
fn a_watched_status_redraws_in_place_and_gives_the_terminal_back() {
    let cluster = Cluster::start();
    let args = ["status", "--watch", "--interval-ms", "100", "--url", &cluster.url];
    let mut terminal = Terminal::run(&args, &[], 70, cluster.directory.path());
    terminal.until("three pictures", |text| text.matches("\x1b[H").count() >= 3 && text.contains("routable"));
    interrupt(&terminal.child);
    let (code, text) = terminal.end();
    assert_eq!(code, Some(0));
    assert!(text.starts_with("\x1b[?1049h\x1b[?7l\x1b[?25l"), "a page of its own: {text:?}");
    assert!(text.trim_end().ends_with("\x1b[?25h\x1b[?7h\x1b[?1049l"), "given back: {text:?}");
    assert!(!text.contains("\x1b[2J"), "never cleared as a whole, which flickers");
    assert!(text.contains("\x1b[32mroutable\x1b[0m"), "coloured: {text:?}");
}

#[test]
fn colours_are_for_terminals_that_want_them() {
    let cluster = Cluster::start();
    let on_terminal = |env: &[(&str, &str)]| {
        let terminal = Terminal::run(&["status", "--url", &cluster.url], env, 50, cluster.directory.path());
        let (code, text) = terminal.end();
        assert_eq!(code, Some(0), "{text}");
        text
    };
    assert!(on_terminal(&[]).contains("\x1b[32m"));
    let plain = on_terminal(&[("NO_COLOR", "1")]);
    assert!(!plain.contains('\x1b') && plain.contains("routable"), "{plain:?}");
    // The terminal's own width counts, whatever a variable says.
    let narrow = on_terminal(&[("NO_COLOR", "1"), ("COLUMNS", "200")]);
    assert!(narrow.lines().skip(2).all(|line| line.trim_end().chars().count() <= 50), "{narrow}");
}

#[test]
fn a_drain_on_a_terminal_has_a_bar() {
    let cluster = Cluster::start();
    let terminal =
        Terminal::run(&["drain", "node", "--url", &cluster.url], &[], 80, cluster.directory.path());
    let (code, text) = terminal.end();
    assert_eq!(code, Some(0), "{text}");
    assert!(text.contains("[########################]") && text.contains("node: drained"), "{text:?}");
}

#[test]
fn a_token_is_256_bits_and_alone_on_stdout() {
    let directory = tempfile::tempdir().expect("a directory");
    let tokens: Vec<String> = (0..3)
        .map(|_| {
            let output = llorch(&["token", "new"], &[], directory.path());
            assert!(output.status.success() && output.stderr.is_empty());
            stdout(&output)
        })
        .collect();
    for token in &tokens {
        let token = token.strip_suffix('\n').expect("a line");
        assert_eq!(token.len(), 43, "{token}");
        assert!(token.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_'), "{token}");
    }
    assert_ne!(tokens[0], tokens[1]);
    let file = directory.path().join("token");
    fs::write(&file, &tokens[0]).expect("written");
    let env = [("LLORCH_API_TOKEN_FILE", file.to_str().expect("a path"))];
    let checked = llorch(&["check", "--config"], &env, directory.path());
    assert!(checked.status.success(), "a daemon takes it: {}", stdout(&checked));
    assert!(!stdout(&checked).contains("shorter"), "{}", stdout(&checked));
}

#[test]
fn shells_get_completions_that_they_can_read() {
    let directory = tempfile::tempdir().expect("a directory");
    for shell in ["bash", "elvish", "fish", "powershell", "zsh"] {
        let output = llorch(&["completions", shell], &[], directory.path());
        let text = stdout(&output);
        assert!(output.status.success() && text.contains("withdraw"), "{shell}: {text}");
        assert!(text.contains("runtime-dir"), "{shell}");
    }
    let script = r#"eval "$("$0" completions bash)"; COMP_WORDS=(llorch dra); COMP_CWORD=1
        _llorch llorch dra llorch; echo "${COMPREPLY[@]}""#;
    let output = Command::new("bash").args(["-c", script, LLORCH]).output().expect("bash");
    assert_eq!(stdout(&output).trim(), "drain", "{}", stderr(&output));
}

#[test]
fn a_configuration_is_checked_as_the_daemons_would_read_it() {
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("default");
    fs::write(&file, "# comment\nORCHESTRATORD_ADDR=\"127.0.0.1:x\"\n").expect("written");
    let file = file.to_str().expect("a path");
    let output = llorch(&["check", "--config", "--env-file", file], &[], directory.path());
    assert_eq!(output.status.code(), Some(78));
    let told = stdout(&output);
    assert!(
        told.contains("orchestratord: ORCHESTRATORD_ADDR=") && told.contains("allowed is an address"),
        "{told}"
    );
    assert!(told.contains("pool-managerd: the configuration is usable"), "{told}");
    let quiet = ["check", "--config", "--daemon", "pool-managerd", "--quiet"];
    let output = llorch(&quiet, &[], directory.path());
    assert!(output.status.success() && output.stdout.is_empty());
    assert_eq!(fs::read_dir(directory.path()).expect("listed").count(), 1, "nothing was started");
}

#[test]
fn the_process_of_a_container_or_a_unit_is_found_by_who_runs_it() {
    use std::os::unix::fs::PermissionsExt;
    let directory = tempfile::tempdir().expect("a directory");
    let tools = directory.path().join("tools");
    fs::create_dir(&tools).expect("created");
    let own = std::process::id();
    let script = |name: &str, text: String| {
        fs::write(tools.join(name), format!("#!/bin/sh\n{text}\n")).expect("written");
        fs::set_permissions(tools.join(name), fs::Permissions::from_mode(0o755)).expect("set");
    };
    // What they print of one that runs, of one that does not, and of one that they do not know.
    script(
        "docker",
        format!(
            "[ \"$1 $2 $3\" = 'inspect --format {{{{.State.Pid}}}}' ] || exit 9\ncase $4 in engine) echo {own};; ended) echo 0;; *) echo \"no such object: $4\" >&2; exit 1;; esac"
        ),
    );
    script(
        "systemctl",
        format!("[ \"$1\" = show ] || exit 9\ncase $4 in vllm.service) echo {own};; *) echo 0;; esac"),
    );
    let cid = directory.path().join("cid");
    fs::write(&cid, "engine\n").expect("written");
    let cid = format!("--container={}", cid.display());
    let path = format!("{}:/usr/bin:/bin", tools.display());
    let adopt = |flags: &[&str]| {
        let args = [&["adopt", "http://127.0.0.1:1", "--dry-run"], flags].concat();
        llorch(&args, &[("PATH", &path)], directory.path())
    };
    for flag in ["--container=engine", &cid, "--unit=vllm.service"] {
        let written = json(&adopt(&[flag]));
        assert_eq!(written["pid"], own, "{flag}");
        assert!(written["pid_start"].is_u64() && written["boot_id"].is_string(), "{flag}: {written}");
    }
    for (flags, code, why) in [
        (&["--container=ended"][..], 3, "docker start ended"),
        (&["--container=other"], 3, "no such object: other"),
        (&["--unit=none.service"], 3, "systemctl start none.service"),
        (&["--container=--all"], 2, "no name"),
        (&["--container=engine", "--pid=1"], 2, "give one of"),
    ] {
        let refused = adopt(flags);
        assert_eq!(refused.status.code(), Some(code), "{flags:?}: {}", stderr(&refused));
        assert!(stderr(&refused).contains(why), "{flags:?}: {}", stderr(&refused));
    }
}
