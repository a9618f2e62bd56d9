//! How changes are noticed: storms of events, none at all, directories that come and go.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use super::harness::{POOL_MANAGERD, until};
use super::{Agent, skip, times, unused};

/// How much slower the development profile may be than what is promised of the release profile.
const SLOWER: u32 = if cfg!(debug_assertions) { 4 } else { 1 };
/// Pools that so many files are spread over.
const POOLS: u32 = 10;

fn write_many(agent: &Agent, count: u32, slots: u32) {
    let engines = agent.engines();
    for n in 0..count {
        let text = format!(
            r#"{{"pool_id":"pool-{}","replica_id":"r{n}","url":"http://127.0.0.1:9","ready":false,"slots":{slots}}}"#,
            n % POOLS
        );
        fs::write(engines.join(".new"), text).expect("written");
        fs::rename(engines.join(".new"), engines.join(format!("{n:05}.json"))).expect("renamed");
    }
}

fn slots(agent: &Agent) -> f64 {
    let pools = agent.json("/v2/pools");
    pools["pools"].as_array().expect("pools").iter().filter_map(|pool| pool["slots_total"].as_f64()).sum()
}

#[test]
fn ten_thousand_files_written_while_the_daemon_was_stopped_are_known_soon_after_it_goes_on() {
    let agent = Agent::start(&[]);
    let count = 10_000;
    for (round, slots_each) in [1u32, 3].into_iter().enumerate() {
        agent.until_looked_at();
        let listings = agent.metric("pool_managerd_listings_total");
        agent.daemon.signal(Signal::STOP);
        write_many(&agent, count, slots_each);
        let begun = Instant::now();
        agent.daemon.signal(Signal::CONT);
        let wanted = f64::from(count * slots_each);
        until("every file", || (slots(&agent) == wanted).then_some(()));
        let took = begun.elapsed();
        assert!(took < Duration::from_secs(2) * SLOWER, "round {round}: {took:?}");
        assert_eq!(agent.metric("pool_managerd_replicas"), f64::from(count));
        agent.until_looked_at();
        let more = agent.metric("pool_managerd_listings_total") - listings;
        // One for the events that were lost, and perhaps one for what changed meanwhile.
        assert!((1.0..=4.0).contains(&more), "{more} looks at everything");
    }
    assert_eq!(agent.files().len(), count as usize);
}

#[test]
fn ten_thousand_files_are_known_soon_after_a_start() {
    let mut agent = Agent::start(&[]);
    agent.daemon.kill();
    write_many(&agent, 10_000, 1);
    let begun = Instant::now();
    agent.restart(&[]);
    agent.until_known(10_000.0);
    let took = begun.elapsed();
    assert!(took < Duration::from_secs(1) * SLOWER, "{took:?}");
}

#[test]
fn a_file_that_is_replaced_all_the_time_converges_to_its_last_contents_and_costs_nothing() {
    let agent = Agent::start(&[]);
    agent.hand_over("a.json", &unused("r0", ""));
    agent.until_file("a.json", "accepted");
    let descriptors = agent.descriptors();
    let until_time = Instant::now() + Duration::from_secs(times(2, 60).into());
    let mut slots = 1;
    while Instant::now() < until_time {
        slots = slots % 1000 + 1;
        agent.hand_over("a.json", &unused("r0", &format!(r#","slots":{slots}"#)));
        thread::sleep(Duration::from_micros(900));
    }
    let last = Instant::now();
    until("the last one", || (agent.replica("pool-0", "r0")?["slots_total"] == slots).then_some(()));
    assert!(last.elapsed() < Duration::from_millis(900), "by an event, not by polling: {:?}", last.elapsed());
    agent.until_descriptors(descriptors);
}

#[test]
fn the_same_event_again_and_again_is_no_news() {
    let agent = Agent::start(&[]);
    agent.hand_over("a.json", &unused("r0", ""));
    agent.until_file("a.json", "accepted");
    agent.until_looked_at();
    let before = agent.replica("pool-0", "r0").expect("a replica");
    let (_, next) = agent.events(0);
    let path = agent.engines().join("a.json");
    let file = fs::File::options().write(true).open(&path).expect("opened");
    for n in 0..1000 {
        // Touched, written again with the same words, replaced by the same words.
        match n % 3 {
            0 => file.set_modified(std::time::SystemTime::now()).expect("touched"),
            1 => fs::write(&path, unused("r0", "")).expect("written"),
            _ => agent.hand_over("a.json", &unused("r0", "")),
        }
    }
    agent.until_looked_at();
    let (said, _) = agent.events(next);
    let about: Vec<&String> =
        said.iter().filter(|text| text.contains("pool-0/r0") || text.contains("a.json")).collect();
    // A file caught between truncation and writing is given time, so not even that is seen.
    assert!(about.is_empty(), "{about:?}");
    let after = agent.replica("pool-0", "r0").expect("a replica");
    assert_eq!(before, after);
    assert_eq!(agent.metric("pool_managerd_handoffs_refused_total"), 0.0);
}

#[test]
fn a_directory_that_is_removed_and_recreated_is_watched_again_within_a_second() {
    let agent = Agent::start(&[]);
    agent.hand_over("a.json", &unused("r0", ""));
    agent.until_file("a.json", "accepted");
    let descriptors = agent.descriptors();
    for round in 0..times(25, 1000) {
        if round % 2 == 0 {
            fs::remove_dir_all(agent.engines()).expect("removed");
        } else {
            // Away as a whole, and long enough to be noticed: what was known stays.
            let away = agent.directory.path().join("away");
            let _ = fs::remove_dir_all(&away);
            fs::rename(agent.engines(), away).expect("renamed");
            until("the trouble", || super::get(agent.port, "/ready").filter(|answer| answer.status == 503));
            assert!(agent.replica("pool-0", "r0").is_some(), "what was known stays known");
        }
        let begun = Instant::now();
        agent.hand_over("a.json", &unused("r0", &format!(r#","slots":{}"#, round + 2)));
        until("the new file", || (agent.replica("pool-0", "r0")?["slots_total"] == round + 2).then_some(()));
        assert!(begun.elapsed() < Duration::from_millis(1100), "round {round}: {:?}", begun.elapsed());
    }
    until("events to be watched again", || {
        (agent.json("/v2/handoffs")["watch_mode"] == "inotify").then_some(())
    });
    agent.until_descriptors(descriptors);
}

#[test]
fn a_directory_that_was_renamed_away_is_no_longer_listened_to() {
    let agent = Agent::start(&[]);
    agent.hand_over("a.json", &unused("r0", ""));
    agent.until_file("a.json", "accepted");
    let away = agent.directory.path().join("away");
    // Once itself, once one above it, of which the kernel reports nothing.
    let runtime = agent.directory.path().join(".runtime");
    for (round, moved) in [agent.engines(), runtime].into_iter().enumerate() {
        let _ = fs::remove_dir_all(&away);
        fs::rename(&moved, &away).expect("renamed");
        let inside = if round == 0 { away.clone() } else { away.join("engines") };
        fs::write(inside.join("b.json"), unused("r-old", "")).expect("written");
        fs::remove_file(inside.join("a.json")).expect("removed");
        let begun = Instant::now();
        let slots = 2 + round;
        agent.hand_over("a.json", &unused("r0", &format!(r#","slots":{slots}"#)));
        until("the new directory", || (agent.replica("pool-0", "r0")?["slots_total"] == slots).then_some(()));
        assert!(begun.elapsed() < Duration::from_millis(2100), "{:?}", begun.elapsed());
        agent.until_looked_at();
        assert!(agent.replica("pool-0", "r-old").is_none(), "not from the old directory");
    }
}

#[test]
fn without_inotify_files_are_found_by_polling_until_it_can_be_had() {
    let directory = tempfile::tempdir().expect("a directory");
    fs::create_dir_all(directory.path().join(".runtime/engines")).expect("made");
    let limit = "/proc/sys/user/max_inotify_instances";
    let script = format!("echo 0 > {limit} && exec \"$1\"");
    let may = std::process::Command::new("unshare")
        .args(["-U", "-r", "sh", "-c", &format!("echo 0 > {limit}")])
        .stderr(std::process::Stdio::null())
        .status();
    if !may.is_ok_and(|status| status.success()) {
        return skip("no user namespaces here");
    }
    let command = ["unshare", "-U", "-r", "sh", "-c", &script, "sh", POOL_MANAGERD];
    let agent = Agent::start_in(directory, &command, &[("POOL_MANAGERD_WATCH_INTERVAL_MS", "300")]);
    let mode = || agent.json("/v2/handoffs")["watch_mode"].clone();
    assert_eq!(mode(), "poll");
    assert!(super::get(agent.port, "/ready").expect("an answer").status == 200, "it does its job");
    let log = agent.daemon.log();
    assert!(log.contains("WARN") && log.contains("inotify limits may be too low"), "{log}");
    for n in 0..3 {
        let begun = Instant::now();
        agent.hand_over("a.json", &unused("r0", &format!(r#","slots":{}"#, n + 1)));
        until("the file", || (agent.replica("pool-0", "r0")?["slots_total"] == n + 1).then_some(()));
        assert!(begun.elapsed() < Duration::from_millis(700), "{:?}", begun.elapsed());
    }
    let warnings = agent.daemon.log().matches("inotify limits").count();
    assert_eq!(warnings, 1, "told once");
    // The limit is raised again, from within.
    let pid = agent.daemon.pid().to_string();
    let raised = std::process::Command::new("nsenter")
        .args(["-U", "--preserve-credentials", "-t", &pid, "sh", "-c", &format!("echo 100 > {limit}")])
        .status();
    assert!(raised.is_ok_and(|status| status.success()), "the limit can be raised");
    until("inotify", || (mode() == "inotify").then_some(()));
    until("the good news", || agent.daemon.log().contains("is watched again").then_some(()));
}

#[test]
fn where_the_kernel_reports_nothing_files_are_found_by_polling_and_the_log_says_so() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = |name: &str| {
        let path = directory.path().join(name);
        fs::create_dir_all(&path).expect("made");
        path
    };
    let (lower, upper, work, merged) = (path("lower"), path("upper"), path("work"), path("merged"));
    let mount = format!(
        "mount -t overlay overlay -o lowerdir={},upperdir={},workdir={} {}",
        lower.display(),
        upper.display(),
        work.display(),
        merged.display()
    );
    let private = ["unshare", "-m", "--propagation", "private", "sh", "-c"];
    let mut may = std::process::Command::new("unshare");
    may.args(&private[1..]).arg(&mount).stderr(std::process::Stdio::null());
    if !may.status().is_ok_and(|status| status.success()) {
        return skip("no overlay can be mounted here");
    }
    let script = format!("{mount} && exec \"$1\"");
    let command = [&private[..], &[&script, "sh", POOL_MANAGERD]].concat();
    let merged = merged.to_string_lossy().into_owned();
    let env = [("POOL_MANAGERD_WATCH_INTERVAL_MS", "300"), ("POOL_MANAGERD_RUNTIME_DIR", merged.as_str())];
    let agent = Agent::start_in(directory, &command, &env);
    until("a warning", || agent.daemon.log().contains("does not report what").then_some(()));
    assert_eq!(agent.json("/v2/handoffs")["watch_mode"], "inotify+poll");
    for n in 0..3 {
        let begun = Instant::now();
        super::hand_over(&lower, &format!("{n}.json"), &unused(&format!("r{n}"), ""));
        until("the file", || agent.replica("pool-0", &format!("r{n}")));
        assert!(begun.elapsed() < Duration::from_millis(800), "{:?}", begun.elapsed());
    }
    assert_eq!(agent.daemon.log().matches("does not report what").count(), 1, "told once");
}

#[test]
fn a_daemon_whose_directory_is_busy_answers_meanwhile() {
    let agent = Agent::start(&[]);
    let engines = agent.engines();
    let (stop, stopped) = std::sync::mpsc::channel::<()>();
    let writer = thread::spawn(move || {
        let mut n = 0u32;
        while n < 500 || stopped.try_recv() == Err(std::sync::mpsc::TryRecvError::Empty) {
            super::hand_over(&engines, &format!("{}.json", n % 500), &unused(&format!("r{}", n % 500), ""));
            n += 1;
        }
    });
    let mut slowest = Duration::ZERO;
    for _ in 0..100 {
        let begun = Instant::now();
        assert_eq!(super::get(agent.port, "/health").expect("an answer").status, 200);
        slowest = slowest.max(begun.elapsed());
    }
    drop(stop);
    writer.join().expect("written");
    assert!(slowest < Duration::from_millis(500), "{slowest:?}");
    agent.until_known(500.0);
}

#[test]
fn a_runtime_directory_that_cannot_be_had_is_told_and_the_daemon_goes_on() {
    let directory = tempfile::tempdir().expect("a directory");
    fs::write(directory.path().join("file"), "x").expect("written");
    let env = [("POOL_MANAGERD_RUNTIME_DIR", "file/engines"), ("POOL_MANAGERD_WATCH_INTERVAL_MS", "200")];
    let agent = Agent::start_in(directory, &[POOL_MANAGERD], &env);
    let answer =
        until("the trouble", || super::get(agent.port, "/ready").filter(|answer| answer.status == 503));
    assert!(answer.body.contains("--runtime-dir"), "{answer:?}");
    fs::remove_file(agent.directory.path().join("file")).expect("removed");
    until("the directory", || super::get(agent.port, "/ready").filter(|answer| answer.status == 200));
}
