//! `llorch check`: what a daemon would make of handoff files, or of its configuration, before it sees them.
//!
//! Files pass through the same reader, rules and comparison as in a daemon, so that what is said here is
//! what would be said there. Who runs this command stands for the daemon's user, to whom, or to root, files must
//! belong; root, whom daemons are not, asks for the user to whom the directory belongs.

use std::ffi::OsString;
use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use crate::reactor;
use crate::replicas::scan::Scanner;
use crate::replicas::{AllowList, EnginePolicy, FileState, Registry};
use crate::service::machine;
use crate::settings::{Exit, Setting, Settings, Words, boolean, flag};

use super::adopt::{self, ALLOW};
use super::remote::EXIT_NOT_FOUND;
use super::table::{Cell, Column, Table};
use super::terminal::{Screen, Tone, clean};

/// The daemons whose configuration can be checked.
const DAEMONS: [&str; 2] = ["orchestratord", "pool-managerd"];

pub(super) static TABLE: &[Setting] = &[
    flag(
        "config",
        Some("false"),
        "BOOL",
        "Check the daemons' configuration instead: variables and files that they name",
    ),
    flag(
        "env-file",
        None,
        "FILE",
        "With --config, variables as systemd reads them, such as /etc/default/orchestratord",
    ),
    flag("daemon", None, "NAME", "With --config, only orchestratord or only pool-managerd"),
    adopt::RUNTIME_DIR,
    ALLOW,
    flag("quiet", Some("false"), "BOOL", "Say nothing; the exit code tells"),
];
pub(super) const ABOUT: &str =
    "Say which handoff files would be accepted, and why not; or check a configuration";
pub(super) const PATH: Words = Words::Given {
    name: "FILE",
    help: "Handoff files, or directories of them; --runtime-dir if there is none",
    min: 0,
    max: 1_000,
};

/// Runs `llorch check`.
pub(super) fn run(args: Vec<OsString>) -> Result<(), Exit> {
    let env = |name: &str| std::env::var_os(name);
    let settings = Settings::read_words("llorch check", ABOUT, TABLE, PATH, args, env)?;
    let quiet = settings.need("quiet", boolean)?;
    let env_file = settings.get("env-file", |text| Ok(PathBuf::from(text)))?;
    let only = settings.get("daemon", |text| match DAEMONS.iter().find(|name| **name == text) {
        Some(name) => Ok(*name),
        None => Err(format!("allowed are {}", DAEMONS.join(" and "))),
    })?;
    match (settings.need("config", boolean)?, settings.rest.as_slice()) {
        (true, []) => check_config(env_file.as_deref(), only, quiet),
        (true, _) => Err(Exit::usage("--config takes no FILE; variables are read from --env-file")),
        (false, _) if env_file.is_some() || only.is_some() => {
            Err(Exit::usage("--env-file and --daemon belong to --config"))
        }
        (false, []) => {
            let allow = settings.get("allow-engine-hosts", AllowList::parse)?.unwrap_or_default();
            check_files(&[adopt::runtime_dir(&settings)?.into_os_string()], &allow, quiet)
        }
        (false, paths) => {
            let allow = settings.get("allow-engine-hosts", AllowList::parse)?.unwrap_or_default();
            check_files(paths, &allow, quiet)
        }
    }
}

fn check_files(paths: &[OsString], allow: &AllowList, quiet: bool) -> Result<(), Exit> {
    let screen = Screen::new();
    let (mut good, mut bad) = (0, 0);
    let mut table = Table::new(&[Column("FILE", 0), Column("VERDICT", 0), Column("REPLICA", 1)]);
    for path in paths {
        for verdict in verdicts(Path::new(path), allow)? {
            let (tone, told) = match verdict.is_good {
                true => (Tone::Good, verdict.state),
                false => (Tone::Bad, verdict.state),
            };
            if verdict.is_good {
                good += 1
            } else {
                bad += 1
            }
            let cells = vec![
                Cell::plain(verdict.file),
                Cell::new(tone, told),
                Cell::plain(verdict.replica.unwrap_or_else(|| "-".to_string())),
            ];
            table.row(cells, verdict.why);
        }
    }
    if !quiet {
        screen.write(&table.text(&screen));
    }
    match (good, bad) {
        (_, 0) => Ok(()),
        (good, bad) => Err(Exit::runtime(format!("{bad} of {} files would not be used", good + bad))),
    }
}

struct Verdict {
    file: String,
    state: &'static str,
    is_good: bool,
    replica: Option<String>,
    why: Option<String>,
}

/// A look at a directory as the daemon takes it.
fn scanner(directory: &Path) -> Scanner {
    let own = rustix::process::geteuid();
    let owner = fs::metadata(directory).ok().filter(|_| own.is_root()).map(|metadata| metadata.uid());
    Scanner::of_user(directory.to_path_buf(), owner.unwrap_or(own.as_raw()))
}

/// What a daemon would say of each file.
fn verdicts(path: &Path, allow: &AllowList) -> Result<Vec<Verdict>, Exit> {
    let shown = path.display();
    let metadata = fs::metadata(path).map_err(|error| match error.kind() {
        ErrorKind::NotFound => {
            Exit { code: EXIT_NOT_FOUND, message: format!("{shown}: there is no such file") }
        }
        _ => Exit::runtime(format!("{shown}: {error}")),
    })?;
    let failed = |error: std::io::Error| Exit::runtime(format!("{shown}: {error}"));
    let (mut scanner, prefix) = if metadata.is_dir() {
        let mut scanner = scanner(path);
        scanner.want_pass();
        (scanner, path.to_path_buf())
    } else {
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let mut scanner = scanner(parent);
        scanner.hint(&name);
        if !scanner.is_busy() {
            return Ok(vec![Verdict {
                file: clean(&shown.to_string()),
                state: "ignored",
                is_good: false,
                replica: None,
                why: Some(
                    "its name must end with .json and not begin with a dot, or it is not looked at".into(),
                ),
            }]);
        }
        (scanner, parent.to_path_buf())
    };
    let policy = EnginePolicy::new(machine::own_addresses(), None, allow.clone(), ALLOW.env);
    let mut registry = Registry::new(policy, 1);
    let mut changes = Vec::new();
    loop {
        let now = reactor::now();
        for listing in scanner.finish(now.mono).map_err(failed)? {
            registry.listing(&listing, now, &mut changes);
        }
        // A file that ends too early gets the moment that a daemon would give its writer.
        let Some(until) = scanner.deadline() else { break };
        thread::sleep(Duration::from_nanos(until.ns_since(now.mono)));
        for listing in scanner.step(reactor::now().mono).map_err(failed)? {
            registry.listing(&listing, reactor::now(), &mut changes);
        }
    }
    Ok(registry
        .files()
        .map(|file| {
            let stands = file.replica.as_ref().filter(|_| file.state == FileState::Accepted);
            let dead = stands.and_then(|key| registry.handoff(key)).and_then(dead_process);
            let is_good = matches!(file.state, FileState::Accepted | FileState::Skipped) && dead.is_none();
            Verdict {
                file: clean(&prefix.join(file.name).display().to_string()),
                state: if dead.is_some() { "outdated" } else { file.state.as_str() },
                is_good,
                replica: file.replica.as_ref().map(ToString::to_string),
                why: file.error.as_ref().map(ToString::to_string).or(dead),
            }
        })
        .collect())
}

/// A handoff whose process is not there any more stands for nothing.
fn dead_process(handoff: &crate::wire::handoff::Handoff) -> Option<String> {
    let pid = handoff.pid?;
    if handoff.pid_ns.is_some_and(|ns| Some(ns) != machine::pid_namespace()) {
        return None;
    }
    if handoff.boot_id.is_some() && handoff.boot_id != machine::boot_id() {
        return Some(format!("its process {pid} belongs to another boot of this machine"));
    }
    match machine::process(pid) {
        None | Some((true, _)) => Some(format!("its process {pid} is not running")),
        Some((false, start)) if handoff.pid_start.is_some_and(|told| told != start) => {
            Some(format!("its process {pid} has ended, and another one has that number now"))
        }
        Some(_) => None,
    }
}

/// Lets each daemon read its configuration, and nothing else.
fn check_config(env_file: Option<&Path>, only: Option<&'static str>, quiet: bool) -> Result<(), Exit> {
    let variables = env_file.map(read_variables).transpose()?.unwrap_or_default();
    let program = std::env::current_exe()
        .map_err(|error| Exit::runtime(format!("cannot find this program's own file: {error}")))?;
    let screen = Screen::new();
    let mut bad = Vec::new();
    for daemon in DAEMONS.into_iter().filter(|daemon| only.is_none_or(|only| only == *daemon)) {
        let ended = Command::new(&program)
            .args([daemon, "--check-config"])
            .envs(variables.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .output()
            .map_err(|error| Exit::runtime(format!("{}: {error}", program.display())))?;
        let told = if ended.status.success() { &ended.stdout } else { &ended.stderr };
        let told = String::from_utf8_lossy(told);
        let mut lines =
            told.trim().lines().map(|line| clean(line.trim_start_matches(&format!("{daemon}: "))));
        let first = lines.next().unwrap_or_default();
        let tone = if ended.status.success() { Tone::Good } else { Tone::Bad };
        let mut text = format!("{daemon}: {}\n", screen.paint(tone, &first));
        for line in lines {
            text.push_str(&format!("{}\n", screen.paint(Tone::Warning, &line)));
        }
        if !quiet {
            screen.write(&text);
        }
        if !ended.status.success() {
            bad.push(daemon);
        }
    }
    match bad.is_empty() {
        true => Ok(()),
        false => Err(Exit::config(format!("{} would not start", bad.join(" and ")))),
    }
}

/// `NAME=value` a line, as systemd's `EnvironmentFile=` has it; comments begin with `#` or `;`.
fn read_variables(file: &Path) -> Result<Vec<(String, String)>, Exit> {
    let shown = file.display();
    let text = fs::read_to_string(file).map_err(|error| match error.kind() {
        ErrorKind::NotFound => {
            Exit { code: EXIT_NOT_FOUND, message: format!("{shown}: there is no such file") }
        }
        _ => Exit::runtime(format!("{shown}: {error}")),
    })?;
    let mut variables = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with(['#', ';']) {
            continue;
        }
        let read = line.split_once('=').filter(|(name, _)| {
            !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
        });
        let Some((name, value)) = read else {
            return Err(Exit::config(format!("{shown}, line {}: expected NAME=value", number + 1)));
        };
        let bare = ['"', '\''].iter().find_map(|quote| value.strip_prefix(*quote)?.strip_suffix(*quote));
        variables.push((name.to_string(), bare.unwrap_or(value).to_string()));
    }
    Ok(variables)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_are_read_as_systemd_does() {
        let directory = tempfile::tempdir().expect("a directory");
        let file = directory.path().join("default");
        fs::write(&file, "# a comment\n\nA=1\nB=\"two words\"\n ; C=3\nD='x'\nE=\n").expect("written");
        let read = read_variables(&file).expect("variables");
        let pair = |name: &str, value: &str| (name.to_string(), value.to_string());
        assert_eq!(read, [pair("A", "1"), pair("B", "two words"), pair("D", "x"), pair("E", "")]);
        fs::write(&file, "A=1\nexport B=2\n").expect("written");
        assert!(read_variables(&file).expect_err("no name").message.contains("line 2"));
        assert_eq!(read_variables(&directory.path().join("none")).expect_err("none").code, EXIT_NOT_FOUND);
    }

    #[test]
    fn root_judges_for_the_user_of_the_directory() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let directory = tempfile::tempdir().expect("a directory");
        let give = |path: &Path, uid| std::os::unix::fs::chown(path, Some(uid), None).expect("given away");
        let file = directory.path().join("a.json");
        fs::write(&file, r#"{"url":"http://127.0.0.1:1"}"#).expect("written");
        give(directory.path(), 4_711);
        for (owner, is_good) in [(0, true), (4_711, true), (4_712, false)] {
            give(&file, owner);
            let all = verdicts(directory.path(), &AllowList::default()).expect("read");
            assert_eq!(all.iter().map(|v| v.is_good).collect::<Vec<_>>(), [is_good], "{owner}");
        }
    }

    #[test]
    fn files_are_judged_as_a_daemon_would() {
        let directory = tempfile::tempdir().expect("a directory");
        let write = |name: &str, text: &str| fs::write(directory.path().join(name), text).expect("written");
        write("a.json", r#"{"url":"http://127.0.0.1:1","pool_id":"p"}"#);
        write("b.json", r#"{"url":"http://10.9.8.7:1","replica_id":"far"}"#);
        write("c.json", r#"{"url":"http://127.0.0.1:2","slots":0}"#);
        write("d.json", r#"{"url":"http://127.0.0.1:3","replica_id":"old","pid":1,"boot_id":"another"}"#);
        write("e.txt", "{");
        let judged = |path: &Path, allow: &str| {
            verdicts(path, &AllowList::parse(allow).expect("a list")).expect("read")
        };
        let all = judged(directory.path(), "");
        assert_eq!(all.iter().map(|v| v.is_good).collect::<Vec<_>>(), [true, false, false, false]);
        let why = |index: usize| all[index].why.clone().unwrap_or_default();
        assert!(
            why(1).contains("is not this machine") && why(2).contains("`slots`"),
            "{} {}",
            why(1),
            why(2)
        );
        assert!(why(3).contains("another boot"), "{}", why(3));
        assert!(judged(&directory.path().join("b.json"), "10.0.0.0/8")[0].is_good);
        assert_eq!(judged(&directory.path().join("e.txt"), "")[0].state, "ignored");
        let none = verdicts(&directory.path().join("x.json"), &AllowList::default());
        assert_eq!(none.err().map(|exit| exit.code), Some(EXIT_NOT_FOUND));
    }
}
