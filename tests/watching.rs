//! The runtime directory under fire: real files on a real file system, real daemons, and writers that
//! do everything wrong.
//!
//! `SOAK=1` makes the long ones run as long as they should.

#[expect(dead_code, reason = "the harness serves other tests too")]
#[path = "daemons/harness.rs"]
mod harness;

#[path = "watching/directory.rs"]
mod directory;
#[path = "watching/engines.rs"]
mod engines;
#[path = "watching/events.rs"]
mod events;
#[path = "watching/files.rs"]
mod files;
#[path = "watching/kept.rs"]
mod kept;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use harness::{POOL_MANAGERD, Process, free_port, get, hand_over, metric, until};
use serde_json::Value;

/// Whether this process may do everything.
pub(crate) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// A process that sleeps in a mount namespace of its own, in which something is mounted. It ends with
/// the test, and the mount with it.
pub(crate) struct Namespace {
    child: Child,
    directory: tempfile::TempDir,
}

impl Namespace {
    /// `mount` is a shell command that mounts something on the directory `$1`. `None`, with a word to the
    /// tests' reader, where that is not permitted.
    pub(crate) fn with(mount: &str) -> Option<Namespace> {
        let directory = tempfile::tempdir().expect("a directory");
        let script = format!("{mount} && touch \"$2\" && exec sleep 600");
        let ready = directory.path().join("ready");
        let inner = directory.path().join("mounted");
        fs::create_dir(&inner).expect("made");
        let child = Command::new("unshare")
            .args(["-m", "--propagation", "private", "sh", "-c", &script, "sh"])
            .args([&inner, &ready])
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        let mut child = child.ok()?;
        let is_ready = until("a mount", || {
            (ready.exists() || child.try_wait().expect("a child").is_some()).then(|| ready.exists())
        });
        if !is_ready {
            skip("nothing can be mounted here");
            return None;
        }
        Some(Namespace { child, directory })
    }

    /// The mounted directory, seen from outside.
    pub(crate) fn directory(&self) -> PathBuf {
        self.inside(&self.directory.path().join("mounted"))
    }

    /// A path within the namespace, seen from outside.
    pub(crate) fn inside(&self, path: &Path) -> PathBuf {
        let root = PathBuf::from(format!("/proc/{}/root", self.child.id()));
        root.join(path.strip_prefix("/").expect("an absolute path"))
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// How often something is done: `usually`, and with `SOAK=1` as often as it should be.
pub(crate) fn times(usually: u32, soak: u32) -> u32 {
    if std::env::var_os("SOAK").is_some() { soak } else { usually }
}

/// A node agent in the HOME profile, with its directory.
pub(crate) struct Agent {
    pub(crate) directory: tempfile::TempDir,
    pub(crate) port: u16,
    pub(crate) daemon: Process,
}

impl Agent {
    pub(crate) fn start(env: &[(&str, &str)]) -> Agent {
        let directory = tempfile::tempdir().expect("a directory");
        fs::create_dir_all(directory.path().join(".runtime/engines")).expect("made");
        Agent::start_in(directory, &[POOL_MANAGERD], env)
    }

    /// `command` starts the daemon, itself or in other circumstances.
    pub(crate) fn start_in(directory: tempfile::TempDir, command: &[&str], env: &[(&str, &str)]) -> Agent {
        let port = free_port();
        let daemon = Agent::launch(port, &directory, command, env);
        Agent { directory, port, daemon }
    }

    fn launch(port: u16, directory: &tempfile::TempDir, command: &[&str], env: &[(&str, &str)]) -> Process {
        let addr = format!("127.0.0.1:{port}");
        let env = [&[("POOL_MANAGERD_ADDR", addr.as_str())], env].concat();
        let daemon = Process::start(command[0], &command[1..], &env, directory.path());
        until("pool-managerd", || get(port, "/health").filter(|answer| answer.status == 200));
        daemon
    }

    /// Ends it without a warning and starts it again.
    pub(crate) fn restart(&mut self, env: &[(&str, &str)]) {
        self.daemon.kill();
        self.daemon = Agent::launch(self.port, &self.directory, &[POOL_MANAGERD], env);
    }

    pub(crate) fn engines(&self) -> PathBuf {
        self.directory.path().join(".runtime/engines")
    }

    /// Writes a handoff as its writers should.
    pub(crate) fn hand_over(&self, file: &str, text: &str) {
        hand_over(&self.engines(), file, text);
    }

    pub(crate) fn json(&self, path: &str) -> Value {
        get(self.port, path).expect("an answer").json()
    }

    pub(crate) fn metric(&self, name: &str) -> f64 {
        metric(self.port, name).expect("a metric")
    }

    /// The state of every file and why, by name.
    pub(crate) fn files(&self) -> BTreeMap<String, (String, String)> {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_string();
        let handoffs = self.json("/v2/handoffs");
        let files = handoffs["files"].as_array().expect("files");
        files.iter().map(|f| (text(&f["file"]), (text(&f["state"]), text(&f["error"])))).collect()
    }

    pub(crate) fn file(&self, name: &str) -> Option<(String, String)> {
        self.files().remove(name)
    }

    /// Waits until a file is in a state, and returns why.
    pub(crate) fn until_file(&self, name: &str, state: &str) -> String {
        until(&format!("{name} to be {state}"), || {
            self.file(name).filter(|(is, _)| is == state).map(|(_, error)| error)
        })
    }

    /// A replica, as its pool's status shows it.
    pub(crate) fn replica(&self, pool: &str, replica: &str) -> Option<Value> {
        let status = get(self.port, &format!("/v2/pools/{pool}/status"))?;
        let status = (status.status == 200).then(|| status.json())?;
        status["replicas"].as_array()?.iter().find(|r| r["replica_id"] == replica).cloned()
    }

    pub(crate) fn until_state(&self, replica: &str, state: &str) -> Value {
        until(&format!("{replica} to be {state}"), || {
            self.replica("pool-0", replica).filter(|replica| replica["state"] == state)
        })
    }

    pub(crate) fn until_gone(&self, replica: &str) {
        until(&format!("{replica} to be gone"), || self.replica("pool-0", replica).is_none().then_some(()));
    }

    /// Waits until so many replicas are known, and tells how long that took.
    pub(crate) fn until_known(&self, count: f64) -> Duration {
        let begun = Instant::now();
        until(&format!("{count} replicas"), || {
            (self.metric("pool_managerd_replicas") == count).then_some(())
        });
        begun.elapsed()
    }

    /// What the log of events says since `next`, and where it goes on.
    pub(crate) fn events(&self, since: u64) -> (Vec<String>, u64) {
        let said = self.json(&format!("/v2/events?since={since}"));
        let events = said["events"].as_array().expect("events");
        let text = |event: &Value| event["text"].as_str().expect("a text").to_string();
        (events.iter().map(text).collect(), said["next"].as_u64().expect("a number"))
    }

    pub(crate) fn descriptors(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.daemon.pid())).expect("its descriptors").count()
    }

    /// Waits until it has no more descriptors than that: connections of ours close a little later.
    pub(crate) fn until_descriptors(&self, most: usize) {
        until("descriptors to be closed", || (self.descriptors() <= most).then_some(()));
    }

    /// Waits until whatever was changed before this call has been looked at: a file written after it is.
    pub(crate) fn until_looked_at(&self) {
        self.hand_over("zz-last.json", r#"{"pool_id":"last","url":"http://127.0.0.1:9","ready":false}"#);
        self.until_file("zz-last.json", "accepted");
        fs::remove_file(self.engines().join("zz-last.json")).expect("removed");
        until("it to be gone", || self.file("zz-last.json").is_none().then_some(()));
    }
}

/// A handoff that nobody is to use, so that no probe is sent; `more` is further JSON, each field after a comma.
pub(crate) fn unused(replica: &str, more: &str) -> String {
    format!(
        r#"{{"pool_id":"pool-0","replica_id":"{replica}","url":"http://127.0.0.1:9","ready":false{more}}}"#
    )
}

/// A command that starts the daemon as a user who is not root, in a directory that it owns. To root every
/// file is readable and every process visible. `None`, with a word, where that is not to be had.
pub(crate) fn as_another_user(directory: &tempfile::TempDir) -> Option<Vec<String>> {
    use std::os::unix::fs::{PermissionsExt, chown};
    let engines = directory.path().join(".runtime/engines");
    fs::create_dir_all(&engines).expect("made");
    if !is_root() {
        return Some(vec![POOL_MANAGERD.to_string()]);
    }
    if !Path::new("/usr/bin/setpriv").exists() {
        skip("no setpriv here");
        return None;
    }
    let user = 4711;
    for path in [directory.path(), &directory.path().join(".runtime"), &engines] {
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).expect("opened");
        chown(path, Some(user), Some(user)).expect("given away");
    }
    // Where it was built may be closed to others.
    let program = directory.path().join("pool-managerd");
    fs::copy(POOL_MANAGERD, &program).expect("copied");
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).expect("opened");
    let user = user.to_string();
    let wrapper = ["setpriv", "--reuid", &user, "--regid", &user, "--clear-groups"];
    let mut command = wrapper.map(String::from).to_vec();
    command.push(program.to_string_lossy().into_owned());
    Some(command)
}

/// Says that a test cannot be run here.
#[allow(clippy::print_stderr, reason = "the reader of the tests' output should know")]
pub(crate) fn skip(why: &str) {
    eprintln!("skipped: {why}");
}
