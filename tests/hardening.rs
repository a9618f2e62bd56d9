//! The daemons under what their units allow them of the kernel: every system call that the shipped
//! `SystemCallFilter=` refuses is refused here too, with the error that the unit names, and every socket is held
//! against `RestrictAddressFamilies=`. Without the service manager: `systemd-analyze` says what its sets consist of,
//! and `strace` refuses the calls. What the filter could break is used: names are resolved, handoffs noticed,
//! an engine's death by its pidfd, tokens as credentials, TLS, state, reload and the end.
//!
//! Runs where both programs are and processes may be traced; `REQUIRE_HARDENING=1` makes their lack a failure.

#[path = "daemons/harness.rs"]
#[allow(dead_code, reason = "shared with other tests")]
mod harness;
mod tls_support;

use std::collections::BTreeSet;
use std::fs;
use std::net::TcpStream;
use std::path::Path;
use std::process::Command;

use harness::*;
use rustix::process::Signal;
use tls_support::{Pki, Socket};

const TOKEN: &str = "good-0123456789abcdef0123456789abcdef";

/// The values of a unit's setting, in order.
fn settings(unit: &str, key: &str) -> Vec<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("packaging/systemd").join(unit);
    let text = fs::read_to_string(path).expect("a unit");
    let lines = text.lines().filter_map(|line| line.strip_prefix(key)?.strip_prefix('='));
    lines.map(str::to_string).collect()
}

/// The system calls of a set, those of the sets in it included.
fn calls_of(name: &str) -> Option<BTreeSet<String>> {
    if !name.starts_with('@') {
        return Some(BTreeSet::from([name.to_string()]));
    }
    let output =
        Command::new("systemd-analyze").args(["--no-pager", "syscall-filter", name]).output().ok()?;
    let text = String::from_utf8(output.stdout).ok().filter(|_| output.status.success())?;
    let members =
        text.lines().skip(1).map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    let sets: Option<Vec<_>> = members.map(calls_of).collect();
    Some(sets?.into_iter().flatten().collect())
}

/// What a unit's filter lets through.
fn allowed(unit: &str) -> Option<BTreeSet<String>> {
    let mut allowed = BTreeSet::new();
    for line in settings(unit, "SystemCallFilter") {
        let (is_denial, names) = match line.strip_prefix('~') {
            Some(names) => (true, names),
            None => (false, line.as_str()),
        };
        for name in names.split_whitespace() {
            let calls = calls_of(name)?;
            match is_denial {
                true => allowed.retain(|call| !calls.contains(call)),
                false => allowed.extend(calls),
            }
        }
    }
    Some(allowed)
}

fn can_trace() -> bool {
    Command::new("strace")
        .args(["-qq", "-o", "/dev/null", "true"])
        .status()
        .is_ok_and(|status| status.success())
}

#[test]
#[allow(clippy::print_stderr, reason = "a test that is skipped says so")]
fn the_daemons_need_no_system_call_that_their_units_refuse() {
    for (program, unit, state) in [
        (ORCHESTRATORD, "orchestratord.service", "ORCHESTRATORD_STATE_DIR"),
        (POOL_MANAGERD, "pool-managerd.service", "POOL_MANAGERD_STATE_DIR"),
    ] {
        let Some(allowed) = allowed(unit).filter(|_| can_trace()) else {
            assert!(std::env::var("REQUIRE_HARDENING").is_err(), "systemd-analyze or strace is of no use");
            return eprintln!("skipped: it takes systemd-analyze, strace, and leave to trace");
        };
        assert!(allowed.contains("pidfd_open") && !allowed.contains("mount"), "{unit}: {allowed:?}");
        assert_eq!(settings(unit, "SystemCallErrorNumber"), ["EPERM"]);
        run(program, unit, state, &allowed);
    }
}

fn run(program: &str, unit: &str, state: &str, allowed: &BTreeSet<String>) {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path();
    fs::create_dir(path.join("state")).expect("made");
    fs::write(path.join("llorch-api-token"), TOKEN).expect("written");
    let pki = Pki::new();
    pki.issue(&["localhost"]).save(path, "own");
    // Names that this machine's kernel does not know are passed over.
    let set = |calls: &mut dyn Iterator<Item = &String>| {
        let names: Vec<String> = calls.map(|call| format!("?{call}")).collect();
        format!("!{}", names.join(","))
    };
    let refused = format!("inject={}:error=EPERM", set(&mut allowed.iter()));
    let shown = format!("trace={}", set(&mut allowed.iter().filter(|call| *call != "socket")));
    let trace = path.join("trace");
    let text = |path: &Path| path.to_str().expect("UTF-8").to_string();
    let start = |port: u16, env: &[(&str, &str)]| {
        let addr = format!("127.0.0.1:{port}");
        let trace = text(&trace);
        // The daemon is the child, and the tracer its.
        let words =
            ["-D", "-f", "-qq", "-A", "-o", &trace, "-e", &shown, "-e", &refused, program, "--addr", &addr];
        let (state_dir, credentials) = (text(&path.join("state")), text(path));
        let common = [(state, state_dir.as_str()), ("CREDENTIALS_DIRECTORY", credentials.as_str())];
        Process::start("strace", &words, &[&common, env].concat(), path)
    };

    let port = free_port();
    let mut daemon = start(port, &[]);
    until("a daemon", || get(port, "/health").filter(|answer| answer.status == 200));
    let status = |token| ask(port, "GET", "/v2/pools", token, "").expect("an answer").status;
    assert_eq!((status(None), status(Some(TOKEN))), (401, 200), "{unit}");

    // By its name, and with its process.
    let engine_port = free_port();
    let mut engine = demo_engine(engine_port, &[], path);
    let pid = engine.pid();
    let handoff = format!(
        r#"{{"pool_id":"p","replica_id":"r0","url":"http://localhost:{engine_port}","slots":4,"model":"m","pid":{pid}}}"#
    );
    hand_over(&path.join(".runtime/engines"), "r0.json", &handoff);
    let says = |daemon: &Process, what: &str| {
        let log = daemon.log();
        log.lines().any(|line| line.contains("p/r0") && line.contains(what)).then_some(())
    };
    until("an engine by its name", || says(&daemon, "ready"));
    engine.kill();
    until("the end of its process", || says(&daemon, &format!("process {pid} ended")));

    let renewed = TOKEN.replace("good", "best");
    fs::write(path.join("llorch-api-token"), format!("{renewed}\n{TOKEN}\n")).expect("written");
    daemon.signal(Signal::HUP);
    until("a new token", || (status(Some(&renewed)) == 200).then_some(()));
    daemon.signal(Signal::TERM);
    assert_eq!(daemon.end(), Some(0), "{}", daemon.log());

    let prefix = state.trim_end_matches("_STATE_DIR");
    let (cert, key) = (format!("{prefix}_TLS_CERT"), format!("{prefix}_TLS_KEY"));
    let port = free_port();
    let mut daemon =
        start(port, &[(&cert, "own.crt"), (&key, "own.key"), ("ORCHESTRATORD_CLOUD_PROFILE", "true")]);
    let config = pki.client(None);
    until("a handshake", || {
        let tcp = TcpStream::connect(("127.0.0.1", port)).ok()?;
        Socket::client(tcp, "localhost", &config).handshake().ok()
    });
    daemon.signal(Signal::TERM);
    assert_eq!(daemon.end(), Some(0), "{}", daemon.log());

    assert!(fs::read_dir(path.join("state")).expect("a directory").next().is_some(), "{unit} kept nothing");

    let families = settings(unit, "RestrictAddressFamilies").join(" ");
    let traced = fs::read_to_string(&trace).expect("a trace");
    let mut sockets = 0;
    for line in traced.lines().filter(|line| !line.contains("--- ") && !line.contains("+++ ")) {
        assert!(!line.contains("(INJECTED)"), "{unit} refuses what was wanted: {line}");
        if let Some((_, of)) = line.split_once("socket(") {
            let family = of.split(',').next().expect("a family");
            assert!(families.split(' ').any(|known| known == family), "{unit} refuses the family: {line}");
            sockets += 1;
        }
    }
    assert!(sockets > 0, "{traced}");
}
