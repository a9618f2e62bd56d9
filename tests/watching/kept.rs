//! Handoffs that stand without a file: deleted once accepted, handed over by HTTP, kept over a restart.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::harness::{ask, demo_engine, free_port, get, post, until};
use super::{Agent, as_another_user, times, unused};

const DELETE: (&str, &str) = ("POOL_MANAGERD_AUTO_DELETE_HANDOFF", "true");

/// Everything in the runtime directory.
fn names(agent: &Agent) -> Vec<String> {
    let entries = fs::read_dir(agent.engines()).expect("listed");
    entries.map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned()).collect()
}

fn state_file(agent: &Agent) -> std::path::PathBuf {
    agent.directory.path().join(".runtime/state/agent.json")
}

#[test]
fn an_accepted_file_is_deleted_once_it_is_saved_and_its_replica_outlives_a_kill() {
    let mut agent = Agent::start(&[DELETE]);
    agent.hand_over("a.json", &unused("r0", r#","slots":5,"generation":3,"model":"m""#));
    fs::write(agent.engines().join("bad.json"), "[]").expect("written");
    fs::write(agent.engines().join("model.json"), r#"{"model":"m"}"#).expect("written");
    until("the file to be deleted", || (!names(&agent).contains(&"a.json".to_string())).then_some(()));
    let saved = fs::read_to_string(state_file(&agent)).expect("saved before it is deleted");
    assert!(saved.contains("\"r0\""), "{saved}");
    agent.until_file("bad.json", "refused");
    let before = agent.replica("pool-0", "r0").expect("a replica");
    assert_eq!((&before["slots_total"], &before["handoff_file"]), (&5.into(), &serde_json::Value::Null));
    for _ in 0..3 {
        agent.restart(&[DELETE]);
        let after = agent.until_state("r0", "found");
        assert_eq!((&after["slots_total"], &after["models"][0]), (&5.into(), &"m".into()));
    }
    let mut left = names(&agent);
    left.sort();
    assert_eq!(left, ["bad.json", "model.json"], "what was not accepted stays");
    // Without the setting it is known still: there is no file any more.
    agent.restart(&[]);
    agent.until_state("r0", "found");
    // The same file again is accepted and deleted again, another one changes the replica.
    agent.restart(&[DELETE]);
    let (_, next) = agent.events(0);
    for slots in [5, 6] {
        agent.hand_over("b.json", &unused("r0", &format!(r#","slots":{slots},"generation":3,"model":"m""#)));
        until("the file to be deleted", || (!names(&agent).contains(&"b.json".to_string())).then_some(()));
        assert_eq!(agent.replica("pool-0", "r0").expect("a replica")["slots_total"], slots);
    }
    let (said, _) = agent.events(next);
    assert!(!said.iter().any(|text| text.contains("gone")), "{said:?}");
    // Taken back, it stays away.
    assert_eq!(
        ask(agent.port, "DELETE", "/v2/pools/pool-0/replicas/r0", None, "").expect("an answer").status,
        204
    );
    agent.until_gone("r0");
    until("it to be saved", || {
        (!fs::read_to_string(state_file(&agent)).expect("saved").contains("\"r0\"")).then_some(())
    });
    agent.restart(&[DELETE]);
    agent.until_looked_at_deleting();
    assert!(agent.replica("pool-0", "r0").is_none());
}

impl Agent {
    /// As [`Agent::until_looked_at`], where files are deleted.
    fn until_looked_at_deleting(&self) {
        self.hand_over("zz-last.json", &unused("zz-last", ""));
        until("the file to be deleted", || {
            names(self).iter().all(|name| name != "zz-last.json").then_some(())
        });
        self.until_state("zz-last", "found");
    }
}

#[test]
fn many_files_are_kept_through_kills_at_any_moment() {
    let mut agent = Agent::start(&[DELETE]);
    let count = 300;
    for n in 0..count {
        agent.hand_over(&format!("{n}.json"), &unused(&format!("r{n}"), &format!(r#","slots":{}"#, n + 1)));
        if n % 60 == 59 {
            agent.restart(&[DELETE]);
        }
    }
    agent.until_known(f64::from(count));
    until("every file to be deleted", || names(&agent).is_empty().then_some(()));
    agent.restart(&[DELETE]);
    agent.until_known(f64::from(count));
    for n in 0..count {
        assert_eq!(agent.replica("pool-0", &format!("r{n}")).expect("a replica")["slots_total"], n + 1);
    }
}

#[test]
fn a_daemon_that_deletes_many_files_answers_meanwhile() {
    let mut agent = Agent::start(&[]);
    agent.daemon.kill();
    let count = 3000;
    for n in 0..count {
        let text = format!(
            r#"{{"pool_id":"pool-{}","replica_id":"r{n}","url":"http://127.0.0.1:9","ready":false}}"#,
            n % 5
        );
        fs::write(agent.engines().join(format!("{n}.json")), text).expect("written");
    }
    agent.restart(&[DELETE]);
    let mut slowest = Duration::ZERO;
    until("every file to be deleted", || {
        let begun = Instant::now();
        assert_eq!(get(agent.port, "/health").expect("an answer").status, 200);
        slowest = slowest.max(begun.elapsed());
        names(&agent).is_empty().then_some(())
    });
    assert!(slowest < Duration::from_millis(500), "{slowest:?}");
    agent.until_known(f64::from(count));
}

#[test]
fn a_writer_that_replaces_the_file_while_it_is_deleted_loses_nothing() {
    let mut agent = Agent::start(&[DELETE]);
    for round in 0..times(5, 60) {
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, engines) = (stop.clone(), agent.engines());
        let writer = thread::spawn(move || {
            let mut slots = 1000;
            while !stopped.load(Ordering::Relaxed) {
                slots = 1000 + (slots + 1) % 1000;
                // Always of one length: only the words differ.
                super::hand_over(&engines, "a.json", &unused("r0", &format!(r#","slots":{slots}"#)));
            }
            slots
        });
        thread::sleep(Duration::from_millis(200));
        stop.store(true, Ordering::Relaxed);
        let last = writer.join().expect("written");
        if round % 2 == 1 {
            agent.restart(&[DELETE]);
        }
        until("the last one", || (agent.replica("pool-0", "r0")?["slots_total"] == last).then_some(()));
        until("the file to be deleted", || names(&agent).is_empty().then_some(()));
        assert_eq!(agent.replica("pool-0", "r0").expect("a replica")["slots_total"], last);
    }
}

#[test]
fn a_state_file_that_cannot_be_read_is_set_aside_and_named_and_the_start_goes_on() {
    for bad in [&b"{\"version\":1,\"handoffs\":["[..], b"", b"\xff\xfe", br#"{"version":99}"#, b"[]"] {
        let mut agent = Agent::start(&[]);
        agent.daemon.kill();
        fs::write(state_file(&agent), bad).expect("written");
        agent.restart(&[DELETE]);
        let aside = agent.directory.path().join(".runtime/state/agent.json.unusable");
        assert_eq!(fs::read(&aside).expect("set aside"), bad);
        let log = agent.daemon.log();
        assert!(log.contains("agent.json.unusable"), "{log}");
        agent.hand_over("a.json", &unused("r0", ""));
        agent.until_state("r0", "found");
        until("it to be saved", || {
            fs::read_to_string(state_file(&agent)).ok().filter(|s| s.contains("\"r0\""))
        });
    }
}

#[test]
fn what_was_saved_in_another_boot_is_not_taken_up() {
    let mut agent = Agent::start(&[DELETE]);
    agent.hand_over("a.json", &unused("r0", ""));
    until("the file to be deleted", || names(&agent).is_empty().then_some(()));
    agent.daemon.kill();
    let saved = fs::read_to_string(state_file(&agent)).expect("saved");
    let boot = llama_orch::service::machine::boot_id().expect("a boot id");
    assert!(saved.contains(&boot), "{saved}");
    fs::write(state_file(&agent), saved.replace(&boot, "another")).expect("written");
    agent.restart(&[DELETE]);
    agent.until_looked_at_deleting();
    assert!(agent.replica("pool-0", "r0").is_none());
    let (said, _) = agent.events(0);
    assert!(said.iter().any(|text| text.contains("1 saved handoffs are of an earlier boot")), "{said:?}");
}

#[test]
fn where_nothing_can_be_saved_no_file_is_deleted_and_the_log_says_why() {
    // Not even root can make a directory there.
    let agent = Agent::start(&[DELETE, ("POOL_MANAGERD_STATE_DIR", "/proc/llama-orch")]);
    agent.hand_over("a.json", &unused("r0", ""));
    agent.until_state("r0", "found");
    let told = "the accepted handoffs cannot be saved";
    until("the reason", || agent.daemon.log().contains(told).then_some(()));
    let log = agent.daemon.log();
    assert!(log.contains("/proc/llama-orch") && log.contains("POOL_MANAGERD_STATE_DIR"), "{log}");
    // Longer than the first pause, after which it is tried again.
    thread::sleep(Duration::from_millis(1500));
    agent.hand_over("b.json", &unused("r1", ""));
    agent.until_state("r1", "found");
    assert_eq!(names(&agent).len(), 2);
    assert_eq!(agent.daemon.log().matches(told).count(), 1, "told once");
}

#[test]
fn a_pool_is_announced_by_http_with_a_handoff_and_asked_without_one() {
    let mut agent = Agent::start(&[]);
    let ready = |body: &str| post(agent.port, "/v2/pools/pool-0/ready", body);
    let port = free_port();
    let handoff = format!(r#"{{"replica_id":"r0","url":"http://127.0.0.1:{port}","slots":2,"model":"m"}}"#);
    let answer = ready(&handoff);
    assert_eq!(answer.status, 202, "{answer:?}");
    agent.until_state("r0", "probing");
    // Its engine starts, and a word makes the agent ask at once.
    let _engine = demo_engine(port, &[], agent.directory.path());
    assert_eq!(ready("").status, 202);
    agent.until_state("r0", "ready");
    for (path, body, status, part) in [
        ("/v2/pools/pool-0/ready", "{", 400, "JSON"),
        ("/v2/pools/pool-0/ready", "{\"model\":\"m\"}", 400, "`url` is missing"),
        ("/v2/pools/pool-0/ready", r#"{"url":"http://169.254.169.254/"}"#, 400, "169.254.169.254"),
        ("/v2/pools/pool-0/ready", r#"{"url":"http://127.0.0.1:1","pool_id":"other"}"#, 400, "pool_id"),
        ("/v2/pools/nobody/ready", "", 404, "not found"),
        ("/v2/pools/a%2Fb/ready", "", 400, "INVALID_PARAMS"),
    ] {
        let answer = post(agent.port, path, body);
        assert!(answer.status == status && answer.body.contains(part), "{path} {body}: {answer:?}");
    }
    assert_eq!(get(agent.port, "/v2/pools/pool-0/ready").expect("an answer").status, 405);
    // It was saved, so a restart loses nothing.
    until("it to be saved", || fs::read_to_string(state_file(&agent)).ok().filter(|s| s.contains("\"r0\"")));
    agent.restart(&[]);
    agent.until_state("r0", "ready");
    let delete = |replica: &str| {
        let path = format!("/v2/pools/pool-0/replicas/{replica}");
        ask(agent.port, "DELETE", &path, None, "").expect("an answer")
    };
    assert_eq!(delete("nobody").status, 404);
    agent.hand_over("f.json", &unused("r1", ""));
    agent.until_state("r1", "found");
    let answer = delete("r1");
    assert!(answer.status == 409 && answer.body.contains("f.json"), "{answer:?}");
    assert_eq!(delete("r0").status, 204);
    agent.until_gone("r0");
    assert_eq!(delete("r0").status, 404);
}

/// A file that cannot be deleted is neither forgotten nor a reason to do nothing else.
#[test]
fn where_files_cannot_be_deleted_their_replicas_are_used_and_the_log_says_so_once() {
    let directory = tempfile::tempdir().expect("a directory");
    let Some(command) = as_another_user(&directory) else { return };
    let engines = directory.path().join(".runtime/engines");
    let mode = |mode| {
        fs::set_permissions(&engines, std::os::unix::fs::PermissionsExt::from_mode(mode)).expect("changed");
    };
    fs::write(engines.join("a.json"), unused("r0", "")).expect("written");
    mode(0o555);
    let command: Vec<&str> = command.iter().map(String::as_str).collect();
    let agent = Agent::start_in(directory, &command, &[DELETE]);
    agent.until_state("r0", "found");
    until("a warning", || agent.daemon.log().contains("cannot be deleted").then_some(()));
    let listings = agent.metric("pool_managerd_listings_total");
    let ticks = || {
        let stat = fs::read_to_string(format!("/proc/{}/stat", agent.daemon.pid())).expect("its times");
        let fields: Vec<i64> =
            stat.rsplit(')').next().expect("fields").split(' ').flat_map(str::parse).collect();
        // User and system time are the fields 14 and 15, in hundredths of a second.
        fields[10] + fields[11]
    };
    let before = ticks();
    thread::sleep(Duration::from_secs(1));
    assert!(ticks() - before < 25, "it spins: {} ticks in a second", ticks() - before);
    assert!(agent.metric("pool_managerd_listings_total") - listings < 5.0);
    assert_eq!(agent.daemon.log().matches("cannot be deleted").count(), 1, "told once");
    mode(0o755);
    // The next look at everything tries again; a change of the directory itself brings it about.
    until("the file to be deleted", || names(&agent).is_empty().then_some(()));
    agent.until_state("r0", "found");
}
