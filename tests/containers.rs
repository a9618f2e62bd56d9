//! `engine-provisioner` with engines in containers: whose end is watched, and what is left when a client or the
//! provisioner itself is killed. A script stands in for docker; what it runs is outside of the client's group.

#[path = "provisioner/harness.rs"]
#[allow(dead_code, reason = "shared with other tests, which use other parts")]
mod harness;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use harness::{Provisioner, pid, until, until_group_is_gone};
use rustix::process::Signal;

const LLORCH: &str = env!("CARGO_BIN_EXE_llorch");

/// `docker run --cidfile=FILE ... image COMMAND...`, `docker inspect --format FORMAT ID`, `docker kill ID`.
const DOCKER: &str = r#"#!/bin/sh
state=$(dirname "$0")
case $1 in
run)
    for word in "$@"; do
        case $word in --cidfile=*) cidfile=${word#*=} ;; esac
    done
    [ -e "$cidfile" ] && { echo "container ID file found" >&2; exit 125; }
    while [ "$1" != image ]; do shift; done
    shift
    setsid "$@" &
    main=$!
    echo "$main" > "$state/c$main"
    printf 'c%s' "$main" > "$cidfile.new"
    mv "$cidfile.new" "$cidfile"
    trap 'kill -TERM "$main"' TERM
    while kill -0 "$main" 2> /dev/null; do wait "$main"; done
    ;;
inspect)
    [ "$2 $3" = '--format {{.State.Pid}}' ] || exit 9
    cat "$state/$4"
    ;;
kill)
    kill -KILL "$(cat "$state/$2")"
    echo "$2" >> "$state/killed"
    ;;
esac
"#;

/// The stand-in's path.
fn docker(root: &Path) -> PathBuf {
    let path = root.join("docker");
    if path.exists() {
        return path;
    }
    fs::write(&path, DOCKER).expect("written");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("set");
    path
}

/// What runs `engine` in a container.
fn command(root: &Path, engine: &[&str]) -> Vec<String> {
    let docker = docker(root).display().to_string();
    [&[docker.as_str(), "run", "--rm", "image"], engine].concat().into_iter().map(String::from).collect()
}

fn start(root: &Path, flags: &[&str], engine: &[&str]) -> Provisioner {
    let mut provisioner = Provisioner::start(root, flags, &command(root, engine));
    serve(&mut provisioner);
    provisioner
}

/// Waits until it is handed over: the main process of its container may be known before or after it is healthy.
fn serve(provisioner: &mut Provisioner) {
    for event in ["spawned", "contained", "healthy", "handoff_written"] {
        provisioner.event(event);
    }
}

/// Process of the engine as the handoff names it.
fn main_process(provisioner: &Provisioner) -> u32 {
    provisioner.handoff().and_then(|handoff| handoff.pid).expect("a handoff with a process")
}

fn runs(process: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    !stat.is_empty() && !stat.contains(") Z ")
}

fn id_files(root: &Path) -> usize {
    let entries = fs::read_dir(root.join("logs")).expect("listed").flatten();
    entries.filter(|entry| entry.path().extension().is_some_and(|extension| extension == "cid")).count()
}

#[test]
fn the_handoff_names_the_main_process_of_the_container() {
    let root = tempfile::tempdir().expect("a directory");
    let mut provisioner = start(root.path(), &[], &[LLORCH, "demo-engine", "--port", "{port}"]);
    let handoff = provisioner.handoff().expect("a handoff");
    let main = handoff.pid.expect("a process");
    assert_eq!(
        fs::read_to_string(root.path().join(format!("c{main}"))).expect("its state").trim(),
        main.to_string()
    );
    let stat = fs::read_to_string(format!("/proc/{main}/stat")).expect("it runs");
    let start =
        stat.rsplit_once(')').and_then(|(_, rest)| rest.split_ascii_whitespace().nth(19)?.parse().ok());
    assert_eq!(handoff.pid_start, start, "{stat}");
    assert_eq!(id_files(root.path()), 1);
    // SIGTERM reaches the container by its client.
    provisioner.signal(Signal::TERM);
    provisioner.event("stopped");
    assert_eq!(provisioner.end().0, 0);
    assert!(!runs(main) && provisioner.handoff().is_none());
    assert_eq!(id_files(root.path()), 0);
    assert!(!root.path().join("killed").exists(), "there was nothing to kill");
}

#[test]
fn a_killed_client_leaves_no_container_behind() {
    let root = tempfile::tempdir().expect("a directory");
    let engine = [LLORCH, "demo-engine", "--port", "{port}"];
    let mut provisioner = start(root.path(), &["--restart=always"], &engine);
    let main = main_process(&provisioner);
    rustix::process::kill_process(pid(provisioner.spawned()), Signal::KILL).expect("its client runs");
    provisioner.event("failed");
    provisioner.event("stopped");
    until("the container's end", || (!runs(main)).then_some(()));
    serve(&mut provisioner);
    assert_ne!(main_process(&provisioner), main);
    assert_eq!(id_files(root.path()), 1);
    provisioner.signal(Signal::TERM);
    provisioner.event("stopped");
    assert_eq!(provisioner.end().0, 0);
}

#[test]
fn a_killed_provisioner_leaves_no_container_behind() {
    let root = tempfile::tempdir().expect("a directory");
    // It does not care for what its client passes on.
    let script = format!("trap '' TERM; exec '{LLORCH}' demo-engine --port {{port}}");
    let provisioner = start(root.path(), &[], &["sh", "-c", &script]);
    let main = main_process(&provisioner);
    provisioner.signal(Signal::KILL);
    until("the container's end", || (!runs(main)).then_some(()));
    until_group_is_gone(provisioner.spawned());
    let killed = until("who was killed", || fs::read_to_string(root.path().join("killed")).ok());
    assert_eq!(killed.trim(), format!("c{main}"));
}

#[test]
fn a_container_that_is_taken_over_is_handed_over_with_its_main_process() {
    let root = tempfile::tempdir().expect("a directory");
    let flags = ["--restart=always", "--orphans=keep"];
    let engine = [LLORCH, "demo-engine", "--port", "{port}"];
    let mut provisioner = start(root.path(), &flags, &engine);
    let (main, client) = (main_process(&provisioner), provisioner.spawned());
    let before = provisioner.handoff();
    provisioner.signal(Signal::KILL);
    until("it is gone", || provisioner.is_gone().then_some(()));
    let command = command(root.path(), &engine);
    let mut next = Provisioner::start(root.path(), &flags, &command);
    assert_eq!(next.event("adopted")["pid"], client);
    next.event("healthy");
    next.event("handoff_written");
    assert_eq!(next.handoff(), before, "whoever watches sees the very engine");
    assert_eq!(main_process(&next), main);
    // Its end is seen as that of any other.
    rustix::process::kill_process(pid(main), Signal::KILL).expect("it runs");
    next.event("failed");
    next.event("stopped");
    serve(&mut next);
    assert!(main_process(&next) != main && id_files(root.path()) == 1);
    next.signal(Signal::TERM);
    next.event("stopped");
    assert_eq!(next.end().0, 0);
    assert_eq!(id_files(root.path()), 0);
}

#[test]
fn a_container_whose_client_ended_while_nobody_kept_it_does_not_stay() {
    let root = tempfile::tempdir().expect("a directory");
    let flags = ["--restart=always", "--orphans=keep"];
    let engine = [LLORCH, "demo-engine", "--port", "{port}"];
    let mut provisioner = start(root.path(), &flags, &engine);
    let (main, client) = (main_process(&provisioner), provisioner.spawned());
    provisioner.signal(Signal::KILL);
    until("it is gone", || provisioner.is_gone().then_some(()));
    rustix::process::kill_process(pid(client), Signal::KILL).expect("its client runs");
    until("the client's end", || (!runs(client)).then_some(()));
    assert!(runs(main), "docker's container does not need its client");
    let mut next = Provisioner::start(root.path(), &flags, &command(root.path(), &engine));
    serve(&mut next);
    until("the container's end", || (!runs(main)).then_some(()));
    assert_ne!(main_process(&next), main);
    assert_eq!(id_files(root.path()), 1);
    next.signal(Signal::TERM);
    next.event("stopped");
    assert_eq!(next.end().0, 0);
}

#[test]
fn a_container_that_would_be_left_to_itself_is_refused_with_what_to_do() {
    let root = tempfile::tempdir().expect("a directory");
    let docker = docker(root.path()).display().to_string();
    let command = [&docker, "run", "--rm", "-dp", "{port}:80", "image", LLORCH, "demo-engine"];
    let (code, said) = Provisioner::start(root.path(), &[], &command).end();
    assert_eq!(code, 78, "{said}");
    assert!(
        said.contains("leave that flag out") && said.contains("llorch adopt URL --container NAME"),
        "{said}"
    );
    assert!(!root.path().join("logs").exists(), "nothing was started");
}
