//! `engine-provisioner` with real processes: what is visible in the handoff directory and in the
//! process table, from the engine's start to its end by signal, by accident and by failure.

#[path = "provisioner/harness.rs"]
#[allow(dead_code, reason = "shared with another test, which uses other parts")]
mod harness;

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use harness::{Provisioner, client, group, pid, until, until_group_is_gone};
use rustix::process::Signal;
use tempfile::TempDir;

const LLORCH: &str = env!("CARGO_BIN_EXE_llorch");

fn root() -> TempDir {
    tempfile::tempdir().expect("a temporary directory")
}

fn demo_engine<'a>(flags: &[&'a str]) -> Vec<&'a str> {
    [&[LLORCH, "demo-engine", "--port", "{port}"], flags].concat()
}

/// A shell that runs the demonstration engine as its child, after `first`.
fn shell_around_demo_engine(first: &str) -> [String; 3] {
    ["sh".into(), "-c".into(), format!("{first}; '{LLORCH}' demo-engine --port {{port}} & wait")]
}

/// Nothing is left: no process of the engine, no handoff, no temporary file.
fn assert_nothing_left(provisioner: &Provisioner) {
    until_group_is_gone(provisioner.engine());
    assert_eq!(provisioner.files(), [""; 0]);
}

#[test]
fn the_handoff_appears_when_the_engine_is_healthy_and_not_before() {
    let root = root();
    let flags = ["--slots=3", "--model=demo", "--engine-version=v1", "--device-mask=1,0"];
    let mut provisioner = Provisioner::start(root.path(), &flags, &demo_engine(&["--load-ms", "300"]));
    let spawned = provisioner.event("spawned");
    let handoff = until("a handoff", || provisioner.handoff());
    let health = client().get(format!("{}/health", handoff.url)).call().expect("the engine answers");
    assert_eq!(health.status(), 200);
    let healthy = provisioner.event("healthy");
    let written = provisioner.event("handoff_written");
    let at_ns = |event: &serde_json::Value| event["at_ns"].as_u64().expect("a time");
    assert!(at_ns(&healthy) >= at_ns(&spawned) + 300_000_000, "it was still loading");
    assert!(at_ns(&written) < at_ns(&healthy) + 250_000_000, "the handoff came late");

    assert_eq!(handoff.key().to_string(), "pool-0/r0");
    assert_eq!((handoff.slots, handoff.slots_free, handoff.ready), (3, 3, true));
    assert_eq!(
        (handoff.models.clone(), handoff.engine_version.as_deref()),
        (vec!["demo".into()], Some("v1"))
    );
    assert_eq!((handoff.device_mask.as_deref(), handoff.gpu_device()), (Some("1,0"), Some(1)));
    assert_eq!(handoff.pid, Some(provisioner.engine()));
    let stat = fs::read_to_string(format!("/proc/{}/stat", provisioner.engine())).expect("it runs");
    let start = handoff.pid_start.expect("a start time").to_string();
    assert!(stat.split(' ').any(|field| field == start), "{start} in {stat}");
    let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id").expect("a boot id");
    assert_eq!(handoff.boot_id.as_deref(), Some(boot_id.trim()));
    assert_eq!(healthy["url"], handoff.url.to_string());
    assert_eq!(written["path"], provisioner.handoff_file().to_string_lossy().as_ref());
    assert_eq!(provisioner.files(), ["pool-0-r0.json"]);
    let mode = |path: &Path| fs::metadata(path).expect("it exists").permissions().mode() & 0o7777;
    assert_eq!(mode(&provisioner.handoff_file()), 0o640);
    assert_eq!(mode(&provisioner.handoff_dir) & 0o027, 0, "others may look, or the group may write");
}

#[test]
fn a_signal_ends_the_engine_and_withdraws_its_handoff() {
    for signal in [Signal::TERM, Signal::INT] {
        let root = root();
        let mut provisioner = Provisioner::start(root.path(), &[], &demo_engine(&[]));
        for event in ["spawned", "healthy", "handoff_written"] {
            provisioner.event(event);
        }
        assert!(provisioner.handoff().is_some() && !group(provisioner.engine()).is_empty());
        provisioner.signal(signal);
        let stopped = provisioner.event("stopped");
        assert_eq!(stopped["pid"], provisioner.engine());
        let (code, said) = provisioner.end();
        assert_eq!(code, 0, "{said}");
        assert_nothing_left(&provisioner);
    }
}

#[test]
fn the_handoff_goes_first_and_the_whole_process_group_after_it() {
    let root = root();
    let seen = root.path().join("seen");
    let look = format!("ls '{}' > '{}'", root.path().join("engines").display(), seen.display());
    let engine = shell_around_demo_engine(&format!("trap \"{look}; exit 0\" TERM"));
    let mut provisioner = Provisioner::start(root.path(), &[], &engine);
    for event in ["spawned", "healthy", "handoff_written"] {
        provisioner.event(event);
    }
    assert_eq!(group(provisioner.engine()).len(), 2, "a shell and its child");
    provisioner.signal(Signal::TERM);
    let (code, said) = provisioner.end();
    assert_eq!(code, 0, "{said}");
    assert_eq!(fs::read_to_string(&seen).expect("the shell was asked to end"), "", "the handoff was there");
    assert_nothing_left(&provisioner);
}

#[test]
fn an_engine_that_ignores_sigterm_is_killed_at_the_second_signal() {
    let root = root();
    let mut provisioner = Provisioner::start(root.path(), &[], &shell_around_demo_engine("trap '' TERM"));
    for event in ["spawned", "healthy", "handoff_written"] {
        provisioner.event(event);
    }
    provisioner.signal(Signal::TERM);
    until("the handoff is gone", || provisioner.handoff().is_none().then_some(()));
    assert!(!group(provisioner.engine()).is_empty(), "it ignores the signal");
    let asked = Instant::now();
    provisioner.signal(Signal::TERM);
    assert_eq!(provisioner.event("stopped")["status"], "killed by signal 9 (SIGKILL)");
    assert!(asked.elapsed() < Duration::from_secs(4), "the grace period was waited for");
    assert_eq!(provisioner.end().0, 0);
    assert_nothing_left(&provisioner);
}

#[test]
fn a_signal_while_the_engine_loads_ends_it_too() {
    let root = root();
    let mut provisioner = Provisioner::start(root.path(), &[], &demo_engine(&["--load-ms", "60000"]));
    provisioner.event("spawned");
    provisioner.signal(Signal::TERM);
    provisioner.event("stopped");
    assert_eq!(provisioner.end().0, 0);
    assert_nothing_left(&provisioner);
}

#[test]
fn a_killed_engine_takes_its_handoff_along() {
    let root = root();
    let mut provisioner = Provisioner::start(root.path(), &[], &demo_engine(&[]));
    for event in ["spawned", "healthy", "handoff_written"] {
        provisioner.event(event);
    }
    rustix::process::kill_process(pid(provisioner.engine()), Signal::KILL).expect("the engine runs");
    provisioner.event("stopped");
    let (code, said) = provisioner.end();
    assert_eq!(code, 1);
    assert!(
        said.contains("engine-provisioner: the engine ended by itself: killed by signal 9 (SIGKILL)"),
        "{said}"
    );
    assert!(said.contains("demonstration engine (no model) listening on"), "its output is shown: {said}");
    assert_nothing_left(&provisioner);
}

#[test]
fn a_dead_parent_leaves_no_children_behind() {
    let root = root();
    let mut provisioner = Provisioner::start(root.path(), &[], &shell_around_demo_engine("true"));
    for event in ["spawned", "healthy", "handoff_written"] {
        provisioner.event(event);
    }
    rustix::process::kill_process(pid(provisioner.engine()), Signal::KILL).expect("the shell runs");
    assert_eq!(provisioner.end().0, 1);
    assert_nothing_left(&provisioner);
}

#[test]
fn a_program_that_does_not_exist_is_named_in_one_line() {
    let root = root();
    let mut provisioner = Provisioner::start(root.path(), &[], &["no-such-engine", "{port}"]);
    let (code, said) = provisioner.end();
    assert_eq!(code, 1);
    assert_eq!(
        said,
        "engine-provisioner: the engine's program \"no-such-engine\" does not exist or is not in PATH: install it, or give its path\n"
    );
    assert_eq!(provisioner.files(), [""; 0]);
}

#[test]
fn an_engine_that_ends_at_once_is_reported_with_its_status_and_last_words() {
    let root = root();
    let engine = ["sh", "-c", "echo mask=$CUDA_VISIBLE_DEVICES port={port} >&2; exit 3"];
    let mut provisioner = Provisioner::start(root.path(), &["--device-mask=0,1"], &engine);
    provisioner.event("spawned");
    let (code, said) = provisioner.end();
    assert_eq!(code, 1);
    assert!(said.contains("the engine ended before it was healthy: exit status 3"), "{said}");
    assert!(said.contains("\n  mask=0,1 port="), "{said}");
    assert_nothing_left(&provisioner);

    // Each run shows its own words only, and silence is said to be silence.
    let mut silent = Provisioner::start(root.path(), &[], &["sh", "-c", "exit 0 # {port}"]);
    silent.event("spawned");
    let (code, said) = silent.end();
    assert_eq!(code, 1);
    assert!(said.contains("exit status 0 (it printed nothing)") && !said.contains("mask="), "{said}");
}

#[test]
fn an_engine_that_does_not_become_healthy_in_time_is_killed() {
    let root = root();
    let engine = demo_engine(&["--load-ms", "60000"]);
    let mut provisioner = Provisioner::start(root.path(), &["--health-timeout-ms=300"], &engine);
    provisioner.event("spawned");
    let (code, said) = provisioner.end();
    assert_eq!(code, 1);
    assert!(said.contains("not healthy within 300 ms") && said.contains("last said: HTTP 503"), "{said}");
    assert_nothing_left(&provisioner);
}

#[test]
fn a_port_that_is_taken_is_refused_before_anything_starts() {
    let root = root();
    let holder = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let port = holder.local_addr().expect("a bound socket").port();
    let mut provisioner =
        Provisioner::start(root.path(), &[&format!("--port={port}")], &["sh", "-c", "echo started"]);
    let (code, said) = provisioner.end();
    assert_eq!(code, 1);
    assert!(said.contains(&format!("port {port} is already in use")), "{said}");
    assert!(!root.path().join("logs").exists(), "something was started");
}

#[test]
fn one_name_has_one_engine_and_only_its_own_handoff_is_removed() {
    let root = root();
    let mut first = Provisioner::start(root.path(), &[], &demo_engine(&[]));
    for event in ["spawned", "healthy", "handoff_written"] {
        first.event(event);
    }
    let mut second = Provisioner::start(root.path(), &[], &demo_engine(&[]));
    let (code, said) = second.end();
    assert_eq!(code, 1);
    assert!(said.contains(&format!("pool-0/r0 already runs as pid {}", first.engine())), "{said}");
    assert!(first.handoff().is_some(), "the refused one removed the other's handoff");

    // What somebody else wrote there since is not ours to remove.
    let other = r#"{"pool_id":"pool-0","replica_id":"r0","url":"http://127.0.0.1:9","pid":1}"#;
    fs::write(first.handoff_file(), other).expect("the directory is ours");
    first.signal(Signal::TERM);
    assert_eq!(first.end().0, 0);
    assert_eq!(fs::read_to_string(first.handoff_file()).expect("still there"), other);
}

#[test]
fn what_a_crash_left_behind_is_taken_over() {
    let root = root();
    let directory = root.path().join("engines");
    fs::create_dir(&directory).expect("an empty root");
    // This very process lives, but it is not the one that the file speaks of.
    let stale = format!(
        r#"{{"pool_id":"pool-0","replica_id":"r0","url":"http://127.0.0.1:9","pid":{},"pid_start":1}}"#,
        std::process::id()
    );
    fs::write(directory.join("pool-0-r0.json"), stale).expect("a writable directory");
    let mut provisioner = Provisioner::start(root.path(), &[], &demo_engine(&[]));
    for event in ["spawned", "healthy", "handoff_written"] {
        provisioner.event(event);
    }
    assert_eq!(provisioner.handoff().and_then(|handoff| handoff.pid), Some(provisioner.engine()));
}

#[test]
fn an_engine_that_cannot_be_handed_over_is_not_left_running() {
    let root = root();
    fs::create_dir_all(root.path().join("engines/pool-0-r0.json/in-the-way")).expect("an empty root");
    let mut provisioner = Provisioner::start(root.path(), &[], &demo_engine(&[]));
    provisioner.event("spawned");
    provisioner.event("healthy");
    let (code, said) = provisioner.end();
    assert_eq!(code, 1);
    assert!(said.contains("cannot write") && said.contains("pool-0-r0.json"), "{said}");
    until_group_is_gone(provisioner.engine());
    assert_eq!(provisioner.files(), ["pool-0-r0.json"], "a temporary file was left");
}

#[test]
fn a_port_that_somebody_else_took_meanwhile_costs_another_start_and_no_more() {
    let root = root();
    let file = |name: &str| root.path().join(name).display().to_string();
    let (port, go) = (file("port"), file("go"));
    // Between the choice of the port and its use: that is where somebody may come in between.
    let script = format!(
        "echo {{port}} > '{port}.new'; mv '{port}.new' '{port}'; until [ -e '{go}' ]; do sleep 0.01; done; exec '{LLORCH}' demo-engine --port {{port}}"
    );
    let mut provisioner = Provisioner::start(root.path(), &[], &["sh", "-c", &script]);
    provisioner.event("spawned");
    let lost = until("the first port", || fs::read_to_string(&port).ok()?.trim().parse::<u16>().ok());
    let _thief = TcpListener::bind(("127.0.0.1", lost)).expect("nobody has it yet");
    fs::write(&go, "").expect("written");
    for event in ["port_lost", "stopped", "spawned", "healthy", "handoff_written"] {
        provisioner.event(event);
    }
    let handoff = provisioner.handoff().expect("it is handed over after all");
    assert_ne!(handoff.url.port(), lost);
    provisioner.signal(Signal::TERM);
    provisioner.event("stopped");
    assert_eq!(provisioner.end().0, 0);
}

/// Where this process may make cgroups whose processes can be killed together; why not otherwise.
fn own_cgroup() -> Result<PathBuf, &'static str> {
    let own = fs::read_to_string("/proc/self/cgroup").map_err(|_| "there are no cgroups")?;
    let own = own.lines().find_map(|line| line.strip_prefix("0::/")).ok_or("there are none of version 2")?;
    let mounts = fs::read_to_string("/proc/self/mounts").map_err(|_| "/proc is not mounted")?;
    let mount = mounts.lines().find(|line| line.split(' ').nth(2) == Some("cgroup2"));
    let mount = mount.and_then(|line| line.split(' ').nth(1)).ok_or("version 2 is not mounted")?;
    let directory = Path::new(mount).join(own);
    let trial = directory.join(format!("trial-{}", std::process::id()));
    fs::create_dir(&trial).map_err(|_| "this process may not make any")?;
    let can_kill = trial.join("cgroup.kill").exists();
    fs::remove_dir(&trial).expect("nobody is in it");
    if can_kill { Ok(directory) } else { Err("this kernel cannot kill one") }
}

#[test]
#[allow(clippy::print_stderr, reason = "a skipped test has to say so")]
fn who_leaves_the_process_group_is_ended_by_the_cgroup() {
    let cgroups = match own_cgroup() {
        Ok(directory) => directory,
        Err(why) => return eprintln!("skipped: engines get no cgroup of their own here: {why}"),
    };
    let left = |provisioner: &str| -> Vec<PathBuf> {
        let entries = fs::read_dir(&cgroups).expect("listed").flatten().map(|entry| entry.path());
        entries.filter(|path| path.to_string_lossy().contains(provisioner)).collect()
    };
    for is_killed in [false, true] {
        let root = root();
        let leaver = root.path().join("leaver").display().to_string();
        // A worker with a session of its own: no signal to the group reaches it.
        let script = format!(
            "until grep -q engine-pool-0 /proc/self/cgroup; do sleep 0.01; done; setsid sh -c 'echo $$ > \"{leaver}.new\"; mv \"{leaver}.new\" \"{leaver}\"; exec sleep 600' & exec '{LLORCH}' demo-engine --port {{port}}"
        );
        let mut provisioner = Provisioner::start(root.path(), &[], &["sh", "-c", &script]);
        for event in ["spawned", "healthy", "handoff_written"] {
            provisioner.event(event);
        }
        let leaver = until("the leaver", || fs::read_to_string(&leaver).ok()?.trim().parse::<u32>().ok());
        assert!(!group(provisioner.engine()).contains(&leaver), "it has left the group");
        let cgroup = fs::read_to_string(format!("/proc/{leaver}/cgroup")).expect("it runs");
        assert!(cgroup.contains("engine-pool-0-r0"), "{cgroup}");
        let own = format!("-{}", provisioner.id());
        assert_eq!(left(&own).len(), 1, "{cgroup}");
        provisioner.signal(if is_killed { Signal::KILL } else { Signal::TERM });
        let runs = || {
            let stat = fs::read_to_string(format!("/proc/{leaver}/stat")).unwrap_or_default();
            stat.contains("sleep") && !stat.contains(") Z ")
        };
        until("the leaver's end", || (!runs()).then_some(()));
        until_group_is_gone(provisioner.engine());
        if !is_killed {
            provisioner.event("stopped");
            assert_eq!(provisioner.end().0, 0);
        }
        until("the cgroup is removed", || left(&own).is_empty().then_some(()));
    }
}

#[test]
fn a_directory_for_logs_that_cannot_be_used_is_named_before_anything_starts() {
    let root = root();
    fs::write(root.path().join("taken"), "a file").expect("written");
    let flag = format!("--log-dir={}", root.path().join("taken").display());
    let (code, said) = Provisioner::start(root.path(), &[&flag], &demo_engine(&[])).end();
    assert!(code == 1 && said.contains("/taken") && said.contains("give another --log-dir"), "{said}");
    let flag = format!("--log-dir={}", root.path().join("elsewhere").display());
    let mut provisioner = Provisioner::start(root.path(), &[&flag], &demo_engine(&[]));
    provisioner.event("spawned");
    provisioner.event("healthy");
    provisioner.event("handoff_written");
    assert!(root.path().join("elsewhere/pool-0-r0.log").exists() && !root.path().join("logs").exists());
}

#[test]
fn what_an_engine_prints_is_bounded_while_it_runs() {
    let root = root();
    // As much as one file may hold, and more.
    let script = format!("yes engine | head -c 70000000; exec '{LLORCH}' demo-engine --port {{port}}");
    let mut provisioner = Provisioner::start(root.path(), &[], &["sh", "-c", &script]);
    for event in ["spawned", "healthy", "handoff_written"] {
        provisioner.event(event);
    }
    let logs = root.path().join("logs");
    let size = |name: &str| fs::metadata(logs.join(name)).map(|meta| meta.len()).unwrap_or_default();
    until("the log begins anew", || {
        (size("pool-0-r0.log.1") > 0 && size("pool-0-r0.log") < 1 << 20).then_some(())
    });
    assert!(size("pool-0-r0.log.1") >= 70_000_000, "what it held is kept");
    assert!(provisioner.handoff().is_some(), "and the engine serves");
    provisioner.signal(Signal::TERM);
    provisioner.event("stopped");
    assert_eq!(provisioner.end().0, 0);
}
