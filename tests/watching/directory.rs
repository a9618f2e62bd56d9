//! The scanner over a real directory, without a daemon: whatever happened to the files and whichever
//! hints were lost, after quiet and one pass the listings say what the directory says.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use llama_orch::reactor;
use llama_orch::replicas::scan::{Scanner, WRITING_MS_MAX};
use llama_orch::replicas::{
    AllowList, Change, EnginePolicy, FileContent, FileState, ListedFile, Listing, Registry, Span,
};
use proptest::prelude::*;

use super::{Namespace, is_root};

/// What listings say when they are taken in order.
#[derive(Default)]
pub(crate) struct Reader {
    files: BTreeMap<Arc<str>, ListedFile>,
    truncated: bool,
    /// How often it began to be.
    alarms: u32,
}

impl Reader {
    pub(crate) fn take(&mut self, listings: Vec<Listing>) {
        for listing in listings {
            let is_listed = |name: &Arc<str>| listing.files.iter().any(|file| file.name == *name);
            assert!(listing.files.is_sorted_by(|a, b| a.name < b.name), "sorted, each name once");
            match &listing.span {
                Span::Names(names) => {
                    assert!(listing.files.iter().all(|file| names.contains(&file.name)), "within its scope");
                    self.files.retain(|name, _| !names.contains(name) || is_listed(name));
                }
                Span::Range(from, to) => {
                    let scope = (from.as_ref(), to.as_ref());
                    let within = |name: &Arc<str>| std::ops::RangeBounds::contains(&scope, name);
                    assert!(listing.files.iter().all(|file| within(&file.name)), "within its scope");
                    self.files.retain(|name, _| !within(name) || is_listed(name));
                }
            }
            self.files.extend(listing.files.into_iter().map(|file| (file.name.clone(), file)));
            self.alarms += u32::from(listing.truncated && !self.truncated);
            self.truncated = listing.truncated;
        }
    }

    /// The port that each file names, or why it names none.
    fn says(&self) -> BTreeMap<String, Result<u16, String>> {
        let say = |content: &FileContent| match content {
            FileContent::Handoff(handoff) => Ok(handoff.url.port()),
            FileContent::ModelOnly => Err("model".into()),
            FileContent::Refused(why) => Err(why.clone()),
        };
        self.files.iter().map(|(name, file)| (name.to_string(), say(&file.content))).collect()
    }
}

fn text(port: u16) -> String {
    format!(r#"{{"url":"http://127.0.0.1:{port:05}"}}"#).replace(":0", ":1")
}

/// What a directory says, read in the plainest way.
fn plainly(directory: &Path) -> BTreeMap<String, Result<u16, &'static str>> {
    let mut said = BTreeMap::new();
    for entry in fs::read_dir(directory).expect("listed") {
        let entry = entry.expect("an entry");
        let name = entry.file_name().into_string().expect("UTF-8");
        if !name.ends_with(".json") || name.starts_with('.') {
            continue;
        }
        let kind = entry.file_type().expect("a kind");
        let links =
            std::os::unix::fs::MetadataExt::nlink(&fs::symlink_metadata(entry.path()).expect("there"));
        let says = if kind.is_symlink() {
            Err("symbolic link")
        } else if !kind.is_file() {
            Err("not a regular file")
        } else if links > 1 {
            Err("second hard link")
        } else {
            let bytes = fs::read(entry.path()).expect("read");
            let port = serde_json::from_slice::<serde_json::Value>(&bytes)
                .ok()
                .and_then(|value| value["url"].as_str()?.rsplit(':').next()?.parse().ok());
            port.ok_or(if bytes.is_empty() { "empty file" } else { "JSON" })
        };
        said.insert(name, says);
    }
    said
}

#[derive(Clone, Debug)]
enum Op {
    /// A temporary file, renamed into place.
    Replace {
        file: u8,
        port: u16,
    },
    /// Written in place; of `part` tenths of its length.
    Write {
        file: u8,
        port: u16,
        part: u8,
    },
    Rename {
        from: u8,
        to: u8,
    },
    Remove {
        file: u8,
    },
    Link {
        file: u8,
    },
    Symlink {
        file: u8,
    },
    Mkdir {
        file: u8,
    },
    Hint {
        file: u8,
    },
    Pass,
    Step,
    Wait {
        ms: u64,
    },
}

fn op() -> impl Strategy<Value = Op> {
    let file = || 0u8..5;
    prop_oneof![
        4 => (file(), 10_000u16..10_009).prop_map(|(file, port)| Op::Replace { file, port }),
        5 => (file(), 10_000u16..10_009, 3u8..20).prop_map(|(file, port, part)| Op::Write { file, port, part }),
        2 => (file(), file()).prop_map(|(from, to)| Op::Rename { from, to }),
        2 => file().prop_map(|file| Op::Remove { file }),
        1 => file().prop_map(|file| Op::Link { file }),
        1 => file().prop_map(|file| Op::Symlink { file }),
        1 => file().prop_map(|file| Op::Mkdir { file }),
        4 => file().prop_map(|file| Op::Hint { file }),
        2 => Just(Op::Pass),
        6 => Just(Op::Step),
        2 => (0u64..400).prop_map(|ms| Op::Wait { ms }),
    ]
}

/// Carries out what is no matter of the scanner; what cannot be done is not.
fn change(directory: &Path, op: &Op) {
    let path = |file: u8| directory.join(format!("{file}.json"));
    let clear = |file: u8| {
        let _ = fs::remove_file(path(file));
        let _ = fs::remove_dir(path(file));
    };
    let _ = match *op {
        Op::Replace { file, port } => {
            let temporary = directory.join(".new");
            fs::write(&temporary, text(port)).expect("written");
            fs::rename(&temporary, path(file))
        }
        Op::Write { file, port, part } => {
            if path(file).is_symlink() {
                clear(file);
            }
            let text = text(port);
            let end = text.len().min(text.len() * usize::from(part) / 10);
            fs::write(path(file), &text[..end])
        }
        Op::Rename { from, to } => fs::rename(path(from), path(to)),
        Op::Remove { file } => {
            clear(file);
            Ok(())
        }
        Op::Link { file } => {
            let other = directory.join(format!("other-{file}"));
            match fs::remove_file(&other) {
                Ok(()) => Ok(()),
                Err(_) => fs::hard_link(path(file), other),
            }
        }
        Op::Symlink { file } => {
            clear(file);
            std::os::unix::fs::symlink("/etc/passwd", path(file))
        }
        Op::Mkdir { file } => {
            clear(file);
            fs::create_dir(path(file))
        }
        Op::Hint { .. } | Op::Pass | Op::Step | Op::Wait { .. } => Ok(()),
    };
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]
    #[test]
    fn after_quiet_and_one_pass_the_listings_say_what_the_directory_says(
        ops in proptest::collection::vec(op(), 1..80),
    ) {
        let directory = tempfile::tempdir().expect("a directory");
        follows_the_directory(directory.path(), &ops)?;
    }
}

/// The same on a file system with coarse times.
#[test]
fn listings_say_what_a_directory_with_coarse_times_says() {
    let Some(namespace) = Namespace::with(COARSE) else { return };
    let config = ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() };
    let mut runner = proptest::test_runner::TestRunner::new(config);
    let outcome = runner.run(&proptest::collection::vec(op(), 1..80), |ops| {
        let directory = tempfile::tempdir_in(namespace.directory()).expect("a directory");
        follows_the_directory(directory.path(), &ops)
    });
    outcome.unwrap_or_else(|why| panic!("{why}"));
}

/// Carries out `ops` in an empty directory, with a scanner that looks on.
fn follows_the_directory(directory: &Path, ops: &[Op]) -> Result<(), TestCaseError> {
    let mut scanner = Scanner::new(directory.into());
    let mut reader = Reader::default();
    let mut now = reactor::now().mono;
    for op in ops {
        match op {
            Op::Hint { file } => scanner.hint(&format!("{file}.json")),
            Op::Pass => scanner.want_pass(),
            Op::Step => reader.take(scanner.step(now).expect("a step")),
            Op::Wait { ms } => now = now.plus_ms(*ms),
            other => change(directory, other),
        }
    }
    scanner.want_pass();
    reader.take(scanner.finish(now).expect("a pass"));
    // What ended too early counts once its writer had its time; nobody says so but the scanner.
    reader.take(scanner.step(now.plus_ms(WRITING_MS_MAX)).expect("a step"));
    let (says, plainly) = (reader.says(), plainly(directory));
    prop_assert_eq!(says.keys().collect::<Vec<_>>(), plainly.keys().collect::<Vec<_>>());
    for (name, expected) in &plainly {
        match (&says[name], expected) {
            (Ok(port), Ok(expected)) => prop_assert_eq!(port, expected, "{}", name),
            (Err(why), Err(part)) => prop_assert!(why.contains(part), "{name}: {why}"),
            other => prop_assert!(false, "{name}: {other:?}"),
        }
    }
    prop_assert!(scanner.deadline().is_none() && !scanner.is_busy(), "it is quiet");
    Ok(())
}

/// Mounts a file system that stamps its files with the time of the last tick only, as older kernels do
/// with all of them.
const COARSE: &str = "mount -t ramfs none \"$1\"";

/// Two writings within a tick look the same in every way.
#[test]
fn a_change_within_one_tick_of_the_clock_is_seen() {
    let Some(namespace) = Namespace::with(COARSE) else {
        return;
    };
    let directory = namespace.directory();
    let mut scanner = Scanner::new(directory.clone());
    let mut reader = Reader::default();
    let now = reactor::now().mono;
    for round in 0..300u16 {
        for (write, port) in [(0, 10_000 + round), (1, 20_000 + round)] {
            let path = directory.join("a.json");
            if round % 2 == 0 || write == 0 {
                fs::write(&path, text(port)).expect("written");
            } else {
                fs::write(directory.join(".new"), text(port)).expect("written");
                fs::rename(directory.join(".new"), &path).expect("renamed");
            }
            scanner.hint("a.json");
            reader.take(scanner.finish(now).expect("a look"));
            assert_eq!(reader.says()["a.json"], Ok(port), "round {round}");
        }
    }
}

#[test]
fn a_file_is_deleted_only_if_it_says_what_was_accepted() {
    let directory = tempfile::tempdir().expect("a directory");
    deletes_what_was_accepted(directory.path());
    if let Some(namespace) = Namespace::with(COARSE) {
        deletes_what_was_accepted(&namespace.directory());
    }
}

fn deletes_what_was_accepted(directory: &Path) {
    let path = directory.join("a.json");
    let mut scanner = Scanner::new(directory.into());
    let now = reactor::now().mono;
    let accept = |scanner: &mut Scanner| {
        scanner.want_pass();
        let listings = scanner.finish(now).expect("a pass");
        listings.last().and_then(|listing| listing.files.first().cloned()).expect("a file")
    };
    let names = || {
        let mut names: Vec<String> = fs::read_dir(directory)
            .expect("listed")
            .map(|entry| entry.expect("an entry").file_name().into_string().expect("UTF-8"))
            .collect();
        names.sort();
        names
    };
    fs::write(&path, text(10_001)).expect("written");
    let file = accept(&mut scanner);
    // The same length, the same inode, perhaps the same tick.
    fs::write(&path, text(10_002)).expect("written");
    scanner.delete(&file.name, &file.content).expect("no error");
    assert_eq!(fs::read_to_string(&path).expect("kept"), text(10_002));
    assert_eq!(names(), ["a.json"]);
    let file = accept(&mut scanner);
    scanner.delete(&file.name, &file.content).expect("deleted");
    assert!(names().is_empty(), "{:?}", names());
    scanner.delete(&file.name, &file.content).expect("once more is no error");
}

#[test]
fn what_was_being_deleted_when_its_process_was_killed_is_put_back_unless_replaced() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = |name: &str| directory.path().join(name);
    fs::write(path(".lost.json.accepted"), text(10_001)).expect("written");
    fs::write(path(".old.json.accepted"), text(10_002)).expect("written");
    fs::write(path("old.json"), text(10_003)).expect("written");
    fs::write(path(".other.accepted"), "x").expect("written");
    let mut scanner = Scanner::new(directory.path().into());
    let mut reader = Reader::default();
    scanner.want_pass();
    reader.take(scanner.finish(reactor::now().mono).expect("a pass"));
    let expected = [("lost.json".to_string(), Ok(10_001)), ("old.json".to_string(), Ok(10_003))];
    assert_eq!(reader.says(), BTreeMap::from(expected));
    assert!(path(".other.accepted").exists(), "no name of ours");
    assert!(!path(".lost.json.accepted").exists() && !path(".old.json.accepted").exists());
}

#[test]
fn a_file_that_ends_too_early_is_reported_though_the_directory_was_away_meanwhile() {
    let directory = tempfile::tempdir().expect("a directory");
    let inner = directory.path().join("engines");
    fs::create_dir(&inner).expect("made");
    fs::write(inner.join("a.json"), "{").expect("written");
    let mut scanner = Scanner::new(inner.clone());
    let mut reader = Reader::default();
    let mut now = reactor::now().mono;
    scanner.want_pass();
    reader.take(scanner.finish(now).expect("a pass"));
    assert!(reader.says().is_empty(), "its writer has its time");
    fs::rename(&inner, directory.path().join("away")).expect("renamed");
    scanner.want_pass();
    assert!(scanner.step(now).is_err());
    fs::rename(directory.path().join("away"), &inner).expect("renamed");
    scanner.want_pass();
    reader.take(scanner.finish(now).expect("a pass"));
    now = now.plus_ms(WRITING_MS_MAX);
    reader.take(scanner.step(now).expect("a step"));
    assert!(matches!(&reader.says()["a.json"], Err(why) if why.contains("JSON")), "{:?}", reader.says());
}

/// More files than are taken from a directory: the first by name, whatever order the kernel tells them
/// in, and the same again after files came and went on both sides of the cut.
#[test]
fn beyond_the_limit_of_files_the_first_by_name_are_used_and_an_alarm_is_given() {
    use llama_orch::replicas::directory::FILES_MAX;
    if std::env::var_os("SOAK").is_none() {
        return beyond_the_limit_in_values();
    }
    let directory = tempfile::tempdir().expect("a directory");
    let name = |n: usize| format!("{n:06}.json");
    for n in 0..FILES_MAX + 500 {
        fs::write(directory.path().join(name(n)), r#"{"model":"m"}"#).expect("written");
    }
    let mut scanner = Scanner::new(directory.path().into());
    let mut reader = Reader::default();
    let now = reactor::now().mono;
    let mut pass = |scanner: &mut Scanner| {
        scanner.want_pass();
        let mut hints = (0..200).map(name);
        while scanner.is_busy() {
            reader.take(scanner.step(now).expect("a step"));
            if let Some(name) = hints.next() {
                scanner.hint(&name);
            }
        }
        assert!(reader.files.len() <= FILES_MAX && reader.alarms <= 1, "{} alarms", reader.alarms);
        let last = reader.files.keys().next_back().expect("files").to_string();
        (reader.files.len(), last, reader.truncated)
    };
    assert_eq!(pass(&mut scanner), (FILES_MAX, name(FILES_MAX - 1), true));
    for n in 0..300 {
        fs::remove_file(directory.path().join(name(n))).expect("removed");
        scanner.hint(&name(n));
    }
    assert_eq!(pass(&mut scanner), (FILES_MAX, name(FILES_MAX + 299), true));
    for n in 300..500 {
        fs::remove_file(directory.path().join(name(n))).expect("removed");
    }
    assert_eq!(pass(&mut scanner), (FILES_MAX, name(FILES_MAX + 499), false));
}

fn beyond_the_limit_in_values() {
    use llama_orch::replicas::directory::FILES_MAX;
    let content = Arc::new(FileContent::ModelOnly);
    let file = |n: usize| ListedFile {
        name: format!("{n:06}.json").into(),
        modified: llama_orch::time::Wall(1),
        content: content.clone(),
    };
    let policy = EnginePolicy::new(Vec::new(), None, AllowList::default(), "ALLOW");
    let mut registry = Registry::new(policy, 1);
    let mut changes = Vec::new();
    let listing = Listing::whole((0..FILES_MAX + 10).map(file).collect());
    for _ in 0..2 {
        registry.listing(&listing, llama_orch::time::Now::default(), &mut changes);
    }
    assert_eq!(registry.files().count(), FILES_MAX);
    assert!(registry.files().all(|file| file.state == FileState::Skipped));
    let alarms: Vec<&Change> =
        changes.iter().filter(|change| matches!(change, Change::LimitReached { .. })).collect();
    assert_eq!(alarms.len(), 1, "{alarms:?}");
    let listing = Listing::whole((10..FILES_MAX + 10).map(file).collect());
    registry.listing(&listing, llama_orch::time::Now::default(), &mut changes);
    assert!(changes.contains(&Change::LimitCleared));
}

#[test]
fn files_of_other_users_and_directories_that_all_may_write_are_not_trusted() {
    if !is_root() {
        return;
    }
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("a.json");
    fs::write(&path, text(10_001)).expect("written");
    std::os::unix::fs::chown(&path, Some(4711), None).expect("given away");
    let mut scanner = Scanner::new(directory.path().into());
    let mut reader = Reader::default();
    scanner.want_pass();
    reader.take(scanner.finish(reactor::now().mono).expect("a pass"));
    assert!(matches!(&reader.says()["a.json"], Err(why) if why.contains("belongs to user 4711")));
    let all = std::os::unix::fs::PermissionsExt::from_mode(0o777);
    fs::set_permissions(directory.path(), all).expect("opened to all");
    scanner.want_pass();
    let error = scanner.step(reactor::now().mono).expect_err("not to be trusted").to_string();
    assert!(error.contains("every user may write"), "{error}");
}
