//! What files may do to the daemon that reads them: nothing but announce an engine.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use rustix::fs::{FileType, Mode};

use super::harness::{POOL_MANAGERD, get, until};
use super::{Agent, as_another_user, is_root, skip, unused};

/// Everything that the daemon shows to anybody.
fn shown(agent: &Agent) -> String {
    let paths = ["/v2/handoffs", "/v2/pools", "/v2/pools/pool-0/status", "/v2/events", "/metrics", "/ready"];
    let answers = paths.map(|path| get(agent.port, path).expect("an answer").body);
    answers.concat() + &agent.daemon.log()
}

fn file_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("changed");
}

#[test]
fn a_file_written_slowly_in_place_is_never_half_a_record() {
    let agent = Agent::start(&[]);
    agent.hand_over("a.json", &unused("r0", r#","slots":7"#));
    agent.until_file("a.json", "accepted");
    let (_, next) = agent.events(0);
    let text = unused("r0", r#","slots":8"#);
    let mut file =
        fs::File::options().write(true).truncate(true).open(agent.engines().join("a.json")).expect("opened");
    // Its writing sends no event, but others make the daemon look. Empty is not deleted.
    let look = |mode| file_mode(&agent.engines().join("a.json"), mode);
    look(0o640);
    let why = agent.until_file("a.json", "keeping-last-good");
    assert!(why.contains("empty file"), "{why}");
    for (n, byte) in text.as_bytes()[..text.len() - 1].iter().enumerate() {
        file.write_all(&[*byte]).expect("written");
        look(if n % 2 == 0 { 0o600 } else { 0o640 });
        assert_eq!(agent.replica("pool-0", "r0").expect("a replica")["slots_total"], 7);
    }
    // Its writer dies.
    drop(file);
    let why = until("what is wrong", || {
        agent.file("a.json").filter(|(state, why)| state == "keeping-last-good" && why.contains("EOF"))
    });
    let replica = agent.replica("pool-0", "r0").expect("a replica");
    assert!(replica["slots_total"] == 7 && replica["generation"].is_u64(), "{why:?} {replica}");
    let (said, _) = agent.events(next);
    assert!(!said.iter().any(|text| text.contains("gone") || text.contains("announces another")), "{said:?}");
    // The rest follows.
    fs::write(agent.engines().join("a.json"), &text).expect("written");
    agent.until_file("a.json", "accepted");
    assert_eq!(agent.replica("pool-0", "r0").expect("a replica")["slots_total"], 8);
}

#[test]
fn a_file_that_is_truncated_for_a_moment_is_neither_gone_nor_wrong() {
    let agent = Agent::start(&[]);
    agent.hand_over("a.json", &unused("r0", ""));
    agent.until_file("a.json", "accepted");
    let (_, next) = agent.events(0);
    for n in 1..=20u32 {
        let path = agent.engines().join("a.json");
        let mut file = fs::File::create(&path).expect("truncated");
        file_mode(&path, if n % 2 == 0 { 0o600 } else { 0o640 });
        agent.until_looked_at();
        file.write_all(unused("r0", &format!(r#","slots":{n}"#)).as_bytes()).expect("written");
        drop(file);
        until("the words", || (agent.replica("pool-0", "r0")?["slots_total"] == n).then_some(()));
    }
    let (said, _) = agent.events(next);
    assert!(!said.iter().any(|text| text.contains("pool-0/r0: gone")), "{said:?}");
}

#[test]
fn a_file_moved_in_from_elsewhere_is_found_and_links_are_refused_without_being_read() {
    let agent = Agent::start(&[]);
    let elsewhere = agent.directory.path().join("elsewhere");
    fs::create_dir(&elsewhere).expect("made");
    fs::write(elsewhere.join("x"), unused("moved", "")).expect("written");
    fs::rename(elsewhere.join("x"), agent.engines().join("moved.json")).expect("renamed");
    agent.until_state("moved", "found");

    let secret = elsewhere.join("secret");
    fs::write(&secret, "CANARY-5b1f {\"url\":\"CANARY-5b1f\"").expect("written");
    fs::hard_link(&secret, agent.engines().join("hard.json")).expect("linked");
    symlink(&secret, agent.engines().join("soft.json")).expect("linked");
    fs::write(elsewhere.join("good"), unused("linked", "")).expect("written");
    symlink(elsewhere.join("good"), agent.engines().join("good.json")).expect("linked");
    symlink("/etc/shadow", agent.engines().join("shadow.json")).expect("linked");
    symlink("/dev/zero", agent.engines().join("zero.json")).expect("linked");
    symlink("/nonexistent", agent.engines().join("dangling.json")).expect("linked");
    for name in ["soft.json", "good.json", "shadow.json", "zero.json", "dangling.json"] {
        let why = agent.until_file(name, "refused");
        assert!(why.contains("symbolic link"), "{name}: {why}");
    }
    let why = agent.until_file("hard.json", "refused");
    assert!(why.contains("second hard link"), "{why}");
    assert!(agent.replica("pool-0", "linked").is_none());
    let shown = shown(&agent);
    assert!(!shown.contains("CANARY"), "{shown}");
    if let Ok(shadow) = fs::read_to_string("/etc/shadow") {
        assert!(!shadow.lines().filter(|line| line.len() > 8).any(|line| shown.contains(line)));
    }
    // Once the other link is gone it is a file like any other; nothing but a look can tell.
    fs::write(elsewhere.join("good2"), unused("r9", "")).expect("written");
    fs::hard_link(elsewhere.join("good2"), agent.engines().join("two.json")).expect("linked");
    agent.until_file("two.json", "refused");
    fs::remove_file(elsewhere.join("good2")).expect("removed");
    agent.until_file("two.json", "accepted");
}

#[test]
fn pipes_sockets_devices_and_directories_are_refused_and_block_nothing() {
    let agent = Agent::start(&[]);
    let path = |name: &str| agent.engines().join(name);
    let make = |name: &str, kind: FileType, device: u64| {
        rustix::fs::mknodat(rustix::fs::CWD, path(name), kind, Mode::RUSR | Mode::WUSR, device)
    };
    make("fifo.json", FileType::Fifo, 0).expect("a pipe");
    let _socket = std::os::unix::net::UnixListener::bind(path("socket.json")).expect("a socket");
    fs::create_dir(path("directory.json")).expect("made");
    let mut names = vec!["fifo.json", "socket.json", "directory.json"];
    if is_root() && make("device.json", FileType::CharacterDevice, rustix::fs::makedev(1, 5)).is_ok() {
        names.push("device.json");
    }
    for name in names {
        let why = agent.until_file(name, "refused");
        assert!(why.contains("not a regular file"), "{name}: {why}");
    }
    agent.hand_over("a.json", &unused("r0", ""));
    agent.until_state("r0", "found");
}

#[test]
fn bad_contents_are_refused_each_for_its_own_reason_and_read_no_further_than_the_limit() {
    let agent = Agent::start(&[]);
    let engines = agent.engines();
    let sparse = fs::File::create(engines.join("sparse.json")).expect("created");
    sparse.set_len(4 << 30).expect("sparse");
    let mut large = unused("large", "").into_bytes();
    large.resize(64 * 1024 + 1, b' ');
    let own = format!(r#"{{"url":"http://127.0.0.1:{}"}}"#, agent.port);
    for (name, bytes, part) in [
        ("large.json", large.as_slice(), "larger than 65536"),
        ("deep.json", &[b'['; 60_000], "recursion limit"),
        ("deeper.json", &[b'['; 100_000], "larger than 65536"),
        ("latin.json", b"{\"url\":\"http://127.0.0.1:1\",\"engine\":\"\xe9\"}", "not UTF-8 at byte"),
        ("bom.json", b"\xef\xbb\xbf{}", "byte order mark"),
        ("twice.json", br#"{"url":"http://127.0.0.1:1","url":"http://127.0.0.1:2"}"#, "there twice"),
        ("huge.json", br#"{"url":"http://127.0.0.1:1","generation":18446744073709551616}"#, "`generation`"),
        ("meta.json", br#"{"url":"http://169.254.169.254/"}"#, "169.254.169.254"),
        ("any.json", br#"{"url":"http://0.0.0.0:81"}"#, "0.0.0.0"),
        ("own.json", own.as_bytes(), "this very process"),
        ("cut.json", br#"{"url":"http://127.0"#, "EOF"),
    ] {
        fs::write(engines.join(name), bytes).expect("written");
        let why = agent.until_file(name, "refused");
        assert!(why.contains(part), "{name}: {why}");
    }
    assert!(agent.until_file("sparse.json", "refused").contains("larger than 65536"));
    let resident = agent.metric("process_resident_memory_bytes");
    assert!(resident < 200e6, "{resident} bytes");
    // Each is told once, however often it is looked at.
    agent.until_looked_at();
    let log = agent.daemon.log();
    for name in ["large.json", "twice.json", "sparse.json"] {
        assert_eq!(log.matches(name).count(), 1, "{log}");
    }
}

#[test]
fn a_file_that_the_daemon_may_not_read_is_read_once_it_may() {
    let directory = tempfile::tempdir().expect("a directory");
    let Some(command) = as_another_user(&directory) else { return };
    let command: Vec<&str> = command.iter().map(String::as_str).collect();
    let agent = Agent::start_in(directory, &command, &[]);
    let engines = agent.engines();
    let path = engines.join("a.json");
    let mut file = fs::File::options().write(true).create_new(true).mode(0o000).open(&path).expect("created");
    file.write_all(unused("r0", "").as_bytes()).expect("written");
    drop(file);
    let why = agent.until_file("a.json", "refused");
    assert!(why.contains("cannot be opened") && why.contains("denied"), "{why}");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).expect("opened");
    agent.until_file("a.json", "accepted");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o000)).expect("closed");
    agent.until_file("a.json", "keeping-last-good");
    agent.until_state("r0", "found");
    // The directory itself.
    fs::set_permissions(&engines, fs::Permissions::from_mode(0o000)).expect("closed");
    let answer = until("the trouble", || get(agent.port, "/ready").filter(|answer| answer.status == 503));
    assert!(answer.body.contains("give the user of this daemon access"), "{answer:?}");
    agent.until_state("r0", "found");
    fs::set_permissions(&engines, fs::Permissions::from_mode(0o755)).expect("opened");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).expect("opened");
    until("the directory", || get(agent.port, "/ready").filter(|answer| answer.status == 200));
    agent.until_file("a.json", "accepted");
}

/// The disk fails below one file: reading it ends in EIO, as reading the first page of a process's memory
/// does, which is mounted over the file.
#[test]
fn a_file_on_a_failing_disk_keeps_what_it_said_and_is_read_once_it_can_be() {
    let directory = tempfile::tempdir().expect("a directory");
    let private = ["unshare", "-U", "-r", "-m", "--propagation", "private"];
    let target = directory.path().join("probe");
    fs::write(&target, "").expect("written");
    let mut may = Command::new(private[0]);
    may.args(&private[1..]).args(["sh", "-c", "mount --bind /proc/$$/mem \"$1\"", "sh"]).arg(&target);
    if !may.stderr(Stdio::null()).status().is_ok_and(|status| status.success()) {
        return skip("nothing can be mounted here");
    }
    let command = [&private[..], &[POOL_MANAGERD]].concat();
    fs::create_dir_all(directory.path().join(".runtime/engines")).expect("made");
    let agent = Agent::start_in(directory, &command, &[("POOL_MANAGERD_WATCH_INTERVAL_MS", "100")]);
    let pid = agent.daemon.pid().to_string();
    let inside = |command: &[&str]| {
        let enter = ["-U", "-m", "--preserve-credentials", "-t", &pid];
        let status = Command::new("nsenter").args(enter).args(command).status();
        assert!(status.is_ok_and(|status| status.success()), "{command:?}");
    };
    let memory = format!("/proc/{pid}/mem");
    let path = |name: &str| agent.engines().join(name).to_string_lossy().into_owned();
    agent.hand_over("known.json", &unused("r-known", ""));
    agent.until_file("known.json", "accepted");
    inside(&["mount", "--bind", &memory, &path("known.json")]);
    let why = agent.until_file("known.json", "keeping-last-good");
    assert!(why.contains("cannot be read: Input/output error"), "{why}");
    agent.until_state("r-known", "found");
    // One of which nothing is known yet; beside both, others are read.
    fs::write(path("new.json"), "").expect("written");
    inside(&["mount", "--bind", &memory, &path("new.json")]);
    until("the reason", || agent.file("new.json")?.1.contains("Input/output error").then_some(()));
    agent.until_looked_at();
    let log = agent.daemon.log();
    assert_eq!(log.matches("Input/output error").count(), 2, "each is told once: {log}");
    // The disk is well again.
    inside(&["umount", &path("known.json")]);
    inside(&["umount", &path("new.json")]);
    agent.until_file("known.json", "accepted");
    agent.hand_over("new.json", &unused("r-new", ""));
    agent.until_state("r-new", "found");
}

#[test]
fn a_file_that_is_swapped_with_a_link_all_the_time_is_never_followed() {
    let agent = Agent::start(&[]);
    let engines = agent.engines();
    let outside = agent.directory.path().join("outside");
    fs::write(&outside, unused("CANARY", "")).expect("written");
    let stop = std::sync::Arc::new(AtomicBool::new(false));
    let stopped = stop.clone();
    let swapper = thread::spawn(move || {
        while !stopped.load(Ordering::Relaxed) {
            fs::write(engines.join(".file"), unused("r0", "")).expect("written");
            fs::rename(engines.join(".file"), engines.join("a.json")).expect("renamed");
            symlink(&outside, engines.join(".link")).expect("linked");
            fs::rename(engines.join(".link"), engines.join("a.json")).expect("renamed");
        }
        super::hand_over(&engines, "a.json", &unused("r0", r#","slots":9"#));
    });
    for _ in 0..100 {
        let pools = get(agent.port, "/v2/pools").expect("an answer").body;
        assert!(!pools.contains("CANARY"), "{pools}");
        thread::sleep(Duration::from_millis(10));
    }
    stop.store(true, Ordering::Relaxed);
    swapper.join().expect("swapped");
    until("the last one", || (agent.replica("pool-0", "r0")?["slots_total"] == 9).then_some(()));
    agent.until_file("a.json", "accepted");
    let shown = shown(&agent);
    assert!(!shown.contains("CANARY"), "{shown}");
}

#[test]
fn odd_names_are_escaped_and_hidden_ones_are_left_alone() {
    let agent = Agent::start(&[]);
    let engines = agent.engines();
    let long = format!("{}.json", "l".repeat(250));
    let odd = ["new\nline.json", "\u{1b}[31mred.json", "quote\"\\.json", "ümläut.json", &long];
    for (n, name) in odd.iter().enumerate() {
        fs::write(engines.join(name), unused(&format!("odd{n}"), "")).expect("written");
    }
    let bytes = std::os::unix::ffi::OsStrExt::from_bytes(b"latin\xe9.json".as_slice());
    fs::write(engines.join::<&std::ffi::OsStr>(bytes), unused("latin", "")).expect("written");
    for name in [".hidden.json", "x.json.tmp", "x.json~", ".json", "x.JSON", "x"] {
        fs::write(engines.join(name), unused("hidden", "")).expect("written");
    }
    // What files say is shown to people too.
    let evil = "{\"url\":\"http://127.0.0.1:1\",\"a\\n2026-01-01 ERROR forged \\u001b[2J\":1,\"a\\n2026-01-01 ERROR forged \\u001b[2J\":2}";
    fs::write(engines.join("evil.json"), evil).expect("written");
    agent.until_file("evil.json", "refused");
    let wrong = "{\"url\":\"http://127.0.0.1:1\",\"slots\":\"\u{9b}2J\u{7f}\"}";
    fs::write(engines.join("wrong.json"), wrong).expect("written");
    agent.until_file("wrong.json", "refused");
    for (n, name) in odd.iter().enumerate() {
        agent.until_file(name, "accepted");
        agent.until_state(&format!("odd{n}"), "found");
    }
    agent.until_looked_at();
    assert!(agent.replica("pool-0", "hidden").is_none() && agent.replica("pool-0", "latin").is_none());
    assert_eq!(agent.files().len(), odd.len() + 2);
    let log = agent.daemon.log();
    assert!(!log.contains(|c: char| c.is_control() && c != '\n'), "{log:?}");
    for line in log.lines() {
        assert!(line.starts_with("20") && line.contains('Z'), "a line that nobody logged: {line:?}");
        assert!(!line.starts_with("2026-01-01 ERROR"), "forged: {line:?}");
    }
}

#[test]
fn between_two_files_for_a_replica_the_higher_generation_wins_until_it_is_gone() {
    let agent = Agent::start(&[]);
    agent.hand_over("b.json", &unused("r0", r#","generation":2,"slots":2"#));
    agent.until_file("b.json", "accepted");
    agent.hand_over("a.json", &unused("r0", r#","generation":1,"slots":1"#));
    let why = agent.until_file("a.json", "shadowed");
    assert!(why.contains("b.json") && why.contains("generation 2"), "{why}");
    agent.hand_over("c.json", &unused("r0", r#","generation":2,"slots":3"#));
    agent.until_file("c.json", "accepted");
    assert!(agent.until_file("b.json", "shadowed").contains("written later"));
    assert_eq!(agent.replica("pool-0", "r0").expect("a replica")["slots_total"], 3);
    fs::remove_file(agent.engines().join("c.json")).expect("removed");
    agent.until_file("b.json", "accepted");
    fs::remove_file(agent.engines().join("b.json")).expect("removed");
    agent.until_file("a.json", "accepted");
    assert_eq!(agent.replica("pool-0", "r0").expect("a replica")["slots_total"], 1);
    fs::remove_file(agent.engines().join("a.json")).expect("removed");
    agent.until_gone("r0");
}

#[test]
fn of_too_many_replicas_the_first_by_name_are_used_and_an_alarm_is_given() {
    let agent = Agent::start(&[]);
    let most = llama_orch::wire::node::REPLICAS_MAX;
    let text = |n: usize| unused(&format!("r{n:05}"), "");
    // From the last to the first, so that the cut moves all the time.
    for n in (0..most + 50).rev() {
        agent.hand_over(&format!("{n:05}.json"), &text(n));
    }
    agent.until_looked_at();
    agent.until_known(most as f64);
    assert!(agent.replica("pool-0", "r00000").is_some());
    assert!(agent.replica("pool-0", &format!("r{most:05}")).is_none());
    assert!(agent.until_file(&format!("{most:05}.json"), "refused").contains("beyond the limit"));
    let log = agent.daemon.log();
    assert_eq!(log.matches("the first by name are used").count(), 1, "{log}");
    for n in 0..50 {
        fs::remove_file(agent.engines().join(format!("{n:05}.json"))).expect("removed");
    }
    until("the last one", || agent.replica("pool-0", &format!("r{:05}", most + 49)));
    until("the good news", || agent.daemon.log().contains("within its limits again").then_some(()));
}
