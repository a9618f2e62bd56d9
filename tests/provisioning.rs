//! `engine-provisioner` with models that have to be fetched and programs that have to be built before an engine
//! can be started: what is got, what is refused, and that nothing waits for it.

#[path = "models/server.rs"]
#[allow(dead_code, reason = "shared with another test, which uses other parts")]
mod server;

#[path = "provisioner/harness.rs"]
#[allow(dead_code, reason = "shared with other tests, which use other parts")]
mod harness;

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use harness::{Provisioner, pid, until};
use rustix::process::Signal;
use server::{Reply, Server};
use tempfile::TempDir;

const LLORCH: &str = env!("CARGO_BIN_EXE_llorch");
const PROGRAM: &str = env!("CARGO_BIN_EXE_engine-provisioner");
const MIB: usize = 1 << 20;

fn root() -> TempDir {
    tempfile::tempdir().expect("a temporary directory")
}

/// An engine that says its model's path as its model's name.
fn engine() -> [&'static str; 6] {
    [LLORCH, "demo-engine", "--port", "{port}", "--model", "{model}"]
}

/// A server that takes minutes for a file.
fn slow() -> Server {
    let content = vec![7; 64 * MIB];
    Server::start(move |ask, _| Reply::of(&content, "\"v1\"", ask).slow(64 << 10, Duration::from_millis(100)))
}

fn provisioner(root: &Path, args: &[&str]) -> Output {
    Command::new(PROGRAM)
        .args(args)
        .env("ENGINE_PROVISIONER_CACHE_DIR", root.join("cache"))
        .env("ENGINE_PROVISIONER_HANDOFF_DIR", root.join("engines"))
        .env_remove("LLORCH_REQUIRE_GPU")
        .output()
        .expect("it runs")
}

#[test]
fn a_model_is_fetched_given_to_the_engine_and_kept_while_that_runs() {
    let root = root();
    let server = Server::good(&vec![1; MIB]);
    let url = server.url("/tiny.bin");
    let mut one = Provisioner::start(root.path(), &[&format!("--model={url}")], &engine());
    for event in ["spawned", "healthy", "handoff_written"] {
        one.event(event);
    }
    let handoff = one.handoff().expect("it was written");
    assert_eq!(handoff.models, ["tiny"]);
    assert_eq!(handoff.model_bytes, Some(MIB as u64));
    let line = fs::read(format!("/proc/{}/cmdline", one.engine())).expect("it runs");
    let line = String::from_utf8_lossy(&line).into_owned();
    let path =
        line.split('\0').find(|word| word.ends_with("/tiny.bin")).expect("the model's path").to_string();
    assert!(path.starts_with(&root.path().display().to_string()), "{path}");
    // Nobody takes it from under a running engine.
    let refused = provisioner(root.path(), &["models", "rm", &url]);
    assert!(!refused.status.success(), "{refused:?}");
    assert!(String::from_utf8_lossy(&refused.stderr).contains("in use by an engine"), "{refused:?}");
    for words in [&["models", "retire", &url][..], &["models", "gc"]] {
        assert!(provisioner(root.path(), words).status.success(), "{words:?}");
    }
    let blobs = || fs::read_dir(root.path().join("cache/models/blobs")).expect("blobs").count();
    assert_eq!(blobs(), 1, "the model of a running engine was removed");
    one.signal(Signal::TERM);
    one.event("stopped");
    assert_eq!(one.end().0, 0);
    assert!(provisioner(root.path(), &["models", "gc"]).status.success());
    assert_eq!(blobs(), 0, "nobody uses it any more");
}

#[test]
fn a_signal_stops_a_fetch_that_would_take_minutes() {
    let (root, server) = (root(), slow());
    let flag = format!("--model={}", server.url("/large.bin"));
    let mut one = Provisioner::start(root.path(), &[&flag], &engine());
    // More connections than the first one: it knows by then how much there is.
    until("the fetch has begun", || (server.asks().len() > 1).then_some(()));
    let asked = Instant::now();
    one.signal(Signal::TERM);
    let (code, said) = one.end();
    assert_eq!(code, 0, "{said}");
    assert!(asked.elapsed() < Duration::from_secs(20), "{:?}", asked.elapsed());
    assert!(said.contains("large.bin"), "it says what it fetches: {said}");
    assert_eq!(one.files(), [""; 0]);
}

#[test]
fn what_runs_is_kept_while_a_reload_fetches() {
    let (root, server) = (root(), slow());
    let file = root.path().join("engines.toml");
    let write = |more: &str| {
        let words = format!("[\"{LLORCH}\", \"demo-engine\", \"--port\", \"{{port}}\"]");
        let text = format!("[[pools]]\nid = \"pool-0\"\ncommand = {words}\n{more}");
        fs::write(&file, text).expect("written");
    };
    write("");
    let mut command = harness::program();
    command.args(["up", "-c"]).arg(&file);
    command.env("ENGINE_PROVISIONER_CACHE_DIR", root.path().join("cache"));
    command.env("ENGINE_PROVISIONER_HANDOFF_DIR", root.path().join("engines"));
    command.env("POOL_MANAGERD_URL", "http://127.0.0.1:1").env_remove("LLORCH_REQUIRE_GPU");
    let mut up = command.spawn().expect("it starts");
    let handoff = root.path().join("engines/pool-0-r0.json");
    let read = || -> Option<serde_json::Value> { serde_json::from_slice(&fs::read(&handoff).ok()?).ok() };
    let first = until("the engine", read);
    write(&format!(
        "[[pools]]\nid = \"more\"\ncommand = [\"true\", \"{{port}}\", \"{{model}}\"]\nmodel = \"{}\"\n",
        server.url("/m.bin")
    ));
    rustix::process::kill_process(pid(up.id()), Signal::HUP).expect("it runs");
    until("the fetch has begun", || (!server.asks().is_empty()).then_some(()));
    let engine = u32::try_from(first["pid"].as_u64().expect("a pid")).expect("a pid");
    rustix::process::kill_process(pid(engine), Signal::KILL).expect("it runs");
    // Started again although the fetch goes on.
    until("another engine", || read().filter(|next| next["pid"] != first["pid"]));
    rustix::process::kill_process(pid(up.id()), Signal::TERM).expect("it runs");
    let status = until("its end", || up.try_wait().expect("a child"));
    assert!(status.success(), "{status:?}");
}

#[test]
fn what_cannot_be_had_is_refused_with_what_to_do_and_nothing_starts() {
    let root = root();
    let server = Server::good(&vec![1; MIB]);
    let missing = Server::start(|_, _| Reply::status(404));
    let wrong = format!("--digest=sha256:{}", "0".repeat(64));
    let page = root.path().join("page.gguf");
    fs::write(&page, "<html>").expect("written");
    for (flags, why) in [
        (vec![format!("--model={}", server.url("/m.bin")), wrong.clone()], "nothing was kept"),
        (vec![format!("--model={}", server.url("/n.bin")), "--offline".into()], "--offline is set"),
        (vec![format!("--model={}", missing.url("/m.bin"))], "check its name"),
        (vec!["--model=/no/such.gguf".into()], "give the path of a model file"),
        (vec![format!("--model={}", page.display())], "no GGUF file"),
        (vec!["--model=hf:repo".into()], "ORG/REPO"),
        (vec!["--model=name".into(), wrong], "name its file"),
    ] {
        let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
        let mut one = Provisioner::start(root.path(), &flags, &engine());
        let (found, said) = one.end();
        assert!(said.contains(why) && said.contains("pool-0/r0"), "{flags:?}: {said}");
        assert!(found == 1 || found == 78, "{found}: {said}");
        assert_eq!(one.files(), [""; 0]);
    }
    let logs = fs::read_dir(root.path().join("logs")).map_or(0, Iterator::count);
    assert_eq!(logs, 0, "something was started");
}

#[test]
fn looking_fetches_nothing() {
    let root = root();
    let server = Server::good(&vec![1; MIB]);
    let file = root.path().join("engines.toml");
    let text = format!(
        "[[pools]]\nid = \"p\"\nbinary = \"{LLORCH}\"\nmodel = \"{}\"\n[[pools]]\nid = \"q\"\nmodel = \"{}\"\nsource = {{ ref = \"b6000\" }}\n",
        server.url("/m.gguf"),
        server.url("/m.gguf"),
    );
    fs::write(&file, text).expect("written");
    let plan = provisioner(root.path(), &["plan", "-c", &file.display().to_string()]);
    let said = String::from_utf8_lossy(&plan.stdout).into_owned();
    assert!(plan.status.success(), "{plan:?}");
    assert!(said.contains("it is fetched at the start"), "{said}");
    assert!(said.contains("built from b6000 of https://github.com/ggml-org/llama.cpp"), "{said}");
    assert!(server.asks().is_empty(), "it was fetched");
}

#[test]
fn a_program_is_built_and_run() {
    let root = root();
    let repository = root.path().join("repository");
    fs::create_dir(&repository).expect("created");
    let git = |args: &[&str]| {
        let who = ["-c", "user.name=t", "-c", "user.email=t@localhost", "-c", "commit.gpgsign=false"];
        let run =
            Command::new("git").args(who).args(args).current_dir(&repository).output().expect("git runs");
        assert!(run.status.success(), "{run:?}");
    };
    git(&["init", "--quiet", "--initial-branch=main"]);
    fs::write(repository.join("CMakeLists.txt"), "").expect("written");
    git(&["add", "."]);
    git(&["commit", "--quiet", "-m", "Begin"]);
    // What a build leaves behind, without a compiler.
    let tools = root.path().join("tools");
    fs::create_dir(&tools).expect("created");
    let cmake = tools.join("cmake");
    let script = format!(
        "#!/bin/sh\n[ \"$1\" = --build ] || exit 0\nmkdir -p \"$2/bin\"\nprintf '#!/bin/sh\\nexec {LLORCH} \"$@\"\\n' > \"$2/bin/llama-server\"\nchmod +x \"$2/bin/llama-server\"\n"
    );
    fs::write(&cmake, script).expect("written");
    fs::set_permissions(&cmake, fs::Permissions::from_mode(0o755)).expect("set");
    let inherited = std::env::var_os("PATH").expect("a search path");
    let all = std::iter::once(tools).chain(std::env::split_paths(&inherited));
    let path: OsString = std::env::join_paths(all).expect("plain names");
    let flags = ["--source-ref=main".to_string(), format!("--source-repository={}", repository.display())];
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    let words = ["{binary}", "demo-engine", "--port", "{port}"];
    let mut one = Provisioner::start_with(root.path(), &flags, &words, &[("PATH", &path)]);
    for event in ["spawned", "healthy", "handoff_written"] {
        one.event(event);
    }
    let version = one.handoff().expect("it was written").engine_version;
    assert_eq!(version.as_deref(), Some("llamacpp-source:main-cpu"));
    let unused = Provisioner::start(root.path(), &flags, &engine()).end();
    assert!(unused.0 == 78 && unused.1.contains("write {binary}"), "{unused:?}");
}

#[test]
fn several_models_are_fetched_at_once_but_not_all() {
    const AT_ONCE: usize = 4;
    let root = root();
    let asked = Arc::new((Mutex::new(BTreeSet::new()), Condvar::new()));
    let known = Arc::clone(&asked);
    let content = vec![1; 1000];
    // Nobody gets anything before as many were asked for as are fetched at once.
    let server = Server::start(move |ask, _| {
        let (paths, changed) = &*known;
        let mut paths = paths.lock().expect("no panic");
        paths.insert(ask.path.clone());
        changed.notify_all();
        let few = |paths: &mut BTreeSet<String>| paths.len() < AT_ONCE;
        let (paths, limit) = changed.wait_timeout_while(paths, harness::PATIENCE, few).expect("no panic");
        assert!(!limit.timed_out(), "one after the other: {paths:?}");
        drop(paths);
        Reply::of(&content, "\"v1\"", ask)
    });
    let replica = |n: usize| {
        format!(
            "[[pools]]\nid = \"p{n}\"\nmodel = \"{}\"\ncommand = [\"{LLORCH}\", \"demo-engine\", \"--port\", \"{{port}}\", \"--model\", \"{{model}}\"]\n",
            server.url(&format!("/{n}.bin"))
        )
    };
    let file = root.path().join("engines.toml");
    fs::write(&file, (0..AT_ONCE + 2).map(replica).collect::<String>()).expect("written");
    let mut child = Command::new(PROGRAM)
        .args(["up", "-c"])
        .arg(&file)
        .env("ENGINE_PROVISIONER_CACHE_DIR", root.path().join("cache"))
        .env("ENGINE_PROVISIONER_HANDOFF_DIR", root.path().join("engines"))
        .env("POOL_MANAGERD_URL", "http://127.0.0.1:1")
        .env_remove("LLORCH_REQUIRE_GPU")
        .spawn()
        .expect("it starts");
    let handoffs = || (0..AT_ONCE + 2).all(|n| root.path().join(format!("engines/p{n}-r0.json")).exists());
    let served = std::panic::catch_unwind(|| until("all handoffs", || handoffs().then_some(())));
    rustix::process::kill_process(pid(child.id()), Signal::TERM).expect("it runs");
    assert!(child.wait().expect("it ends").success());
    served.expect("all were served");
}

#[test]
fn one_model_that_cannot_be_had_ends_the_other_fetches() {
    let root = root();
    let slow = slow();
    let missing = Server::start(|_, _| Reply::status(404));
    let replica = |n: usize, url: String| {
        format!(
            "[[pools]]\nid = \"p{n}\"\nmodel = \"{url}\"\ncommand = [\"{LLORCH}\", \"demo-engine\", \"--port\", \"{{port}}\", \"--model\", \"{{model}}\"]\n"
        )
    };
    let file = root.path().join("engines.toml");
    fs::write(&file, replica(0, slow.url("/m.bin")) + &replica(1, missing.url("/n.bin"))).expect("written");
    let output = provisioner(root.path(), &["up", "-c", &file.display().to_string()]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains("p1/r0") && said.contains("404"), "{said}");
    let logs = fs::read_dir(root.path().join("logs")).map_or(0, Iterator::count);
    assert_eq!(logs, 0, "something was started");
}
