//! Engines behind the files: processes that end, were never there or are others, and streams that run
//! when their file goes.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use llama_orch::service::machine;
use rustix::process::Signal;
use serde_json::Value;

use super::harness::{PATIENCE, demo_engine, free_port, handoff, open, until};
use super::{Agent, as_another_user, skip, unused};

/// The fields that name a process of this boot.
fn process(pid: u32) -> String {
    let (_, start) = machine::process(pid).expect("it runs");
    let boot = machine::boot_id().expect("a boot id");
    format!(r#","pid":{pid},"pid_start":{start},"boot_id":"{boot}""#)
}

/// A control plane that says yes to everything and passes on each heartbeat, with its time.
fn recording_control_plane() -> (String, Receiver<(Instant, Value)>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let url = format!("http://{}", listener.local_addr().expect("an address"));
    let (tell, told) = channel();
    thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let tell = tell.clone();
            thread::spawn(move || -> std::io::Result<()> {
                let mut reader = BufReader::new(stream.try_clone()?);
                let mut stream = stream;
                loop {
                    let (mut first, mut length) = (String::new(), 0);
                    if reader.read_line(&mut first)? == 0 {
                        return Ok(());
                    }
                    loop {
                        let mut line = String::new();
                        reader.read_line(&mut line)?;
                        if line.trim().is_empty() {
                            break;
                        }
                        if let Some((name, value)) = line.split_once(':')
                            && name.eq_ignore_ascii_case("content-length")
                        {
                            length = value.trim().parse().unwrap_or(0);
                        }
                    }
                    let mut body = vec![0; length];
                    reader.read_exact(&mut body)?;
                    let at = Instant::now();
                    let answer = if first.contains("/heartbeat") {
                        let _ = tell.send((at, serde_json::from_slice(&body).unwrap_or_default()));
                        r#"{"success":true,"next_heartbeat_ms":60000}"#
                    } else {
                        r#"{"success":true,"message":"","node_id":"n","ttl_ms":90000,"next_heartbeat_ms":60000,"registry_epoch":1}"#
                    };
                    write!(
                        stream,
                        "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{answer}",
                        answer.len()
                    )?;
                }
            });
        }
    });
    (url, told)
}

#[test]
fn an_engine_that_is_killed_is_out_of_use_at_once_and_control_planes_hear_of_it_at_once() {
    let (url, told) = recording_control_plane();
    let agent = Agent::start(&[
        ("POOL_MANAGERD_CLOUD_PROFILE", "true"),
        ("POOL_MANAGERD_NODE_ID", "n"),
        ("ORCHESTRATORD_URL", &url),
        ("POOL_MANAGERD_HEARTBEAT_INTERVAL_SECS", "60"),
    ]);
    let port = free_port();
    let engine = demo_engine(port, &[], agent.directory.path());
    let text = handoff(port, "r0", 4).replace('}', &format!("{}}}", process(engine.pid())));
    agent.hand_over("a.json", &text);
    agent.until_state("r0", "ready");
    let replica = |beat: &Value| -> Option<Value> {
        let pools = beat["pools"].as_array()?;
        let replicas = pools.iter().filter_map(|pool| pool["replicas"].as_array()).flatten();
        replicas.into_iter().find(|replica| replica["replica_id"] == "r0").cloned()
    };
    let next = |wanted: bool| loop {
        let (at, beat) = told.recv_timeout(PATIENCE).expect("a heartbeat");
        if let Some(replica) = replica(&beat).filter(|replica| replica["ready"] == wanted) {
            return (at, replica);
        }
    };
    next(true);
    let descriptors = agent.descriptors();
    let killed = Instant::now();
    engine.signal(Signal::KILL);
    let (at, replica) = next(false);
    assert!(at - killed < Duration::from_millis(250), "{:?} from the kill to the wire", at - killed);
    let why = replica["reason"].as_str().expect("a reason");
    assert_eq!(why, format!("process {} ended", engine.pid()));
    assert_eq!(agent.until_state("r0", "broken")["reason"], *why);
    let status = agent.json("/v2/pools/pool-0/status");
    assert!(status["ready"] == false && status["last_error"] == *why, "{status}");
    let warned = agent.daemon.log();
    assert!(warned.lines().any(|line| line.contains("WARN") && line.contains(why)), "{warned}");
    agent.until_descriptors(descriptors - 1);
    // Another process on its port is not it; a new handoff is.
    drop(engine);
    let engine = demo_engine(port, &[], agent.directory.path());
    agent.hand_over("a.json", &text);
    agent.until_looked_at();
    assert_eq!(agent.replica("pool-0", "r0").expect("a replica")["state"], "broken");
    let text = handoff(port, "r0", 4).replace('}', &format!("{}}}", process(engine.pid())));
    agent.hand_over("a.json", &text);
    agent.until_state("r0", "ready");
    next(true);
}

#[test]
fn files_from_before_a_reboot_and_pids_of_others_are_believed_by_nobody() {
    let agent = Agent::start(&[]);
    // It answers, so that only the process can tell that it is not meant.
    let port = free_port();
    let _engine = demo_engine(port, &[], agent.directory.path());
    let (_, start) = machine::process(agent.daemon.pid()).expect("it runs");
    let (pid, boot) = (agent.daemon.pid(), machine::boot_id().expect("a boot id"));
    let gone = {
        let mut child = std::process::Command::new("true").spawn().expect("a process");
        child.wait().expect("reaped");
        child.id()
    };
    let count = 500;
    for n in 0..count {
        let more = match n % 4 {
            0 => format!(r#","pid":{pid},"pid_start":{start},"boot_id":"of-another-time""#),
            1 => format!(r#","pid":{pid},"pid_start":{},"boot_id":"{boot}""#, start + 1),
            2 => format!(r#","pid":{gone},"pid_start":7"#),
            _ => r#","pid":2147483647"#.to_string(),
        };
        let text = handoff(port, &format!("r{n}"), 1).replace('}', &format!("{more}}}"));
        agent.hand_over(&format!("{n}.json"), &text);
    }
    agent.hand_over("good.json", &handoff(port, "good", 1).replace('}', &format!("{}}}", process(pid))));
    agent.until_state("good", "ready");
    agent.until_looked_at();
    let status = agent.json("/v2/pools/pool-0/status");
    let replicas = status["replicas"].as_array().expect("replicas");
    assert_eq!(replicas.len(), count + 1);
    for replica in replicas.iter().filter(|replica| replica["replica_id"] != "good") {
        assert_eq!(replica["state"], "broken", "{replica}");
        let n: usize = replica["replica_id"].as_str().expect("an id")[1..].parse().expect("a number");
        let part = [
            "earlier boot",
            "another one than the handoff means",
            "there is no process",
            "there is no process",
        ][n % 4];
        assert!(replica["reason"].as_str().is_some_and(|why| why.contains(part)), "{replica}");
    }
}

#[test]
fn an_engine_that_ends_while_its_file_is_read_is_never_used() {
    let agent = Agent::start(&[]);
    let port = free_port();
    let _engine = demo_engine(port, &[], agent.directory.path());
    for n in 0..40 {
        let mut child = std::process::Command::new("sleep").arg("600").spawn().expect("a process");
        let text = handoff(port, &format!("r{n}"), 1).replace('}', &format!("{}}}", process(child.id())));
        agent.hand_over(&format!("{n}.json"), &text);
        if n % 2 == 0 {
            thread::sleep(Duration::from_micros(100 * n));
        }
        child.kill().expect("killed");
        child.wait().expect("reaped");
    }
    for n in 0..40 {
        agent.until_state(&format!("r{n}"), "broken");
    }
}

#[test]
fn a_process_in_another_pid_namespace_is_judged_by_its_probes() {
    let agent = Agent::start(&[]);
    let port = free_port();
    let _engine = demo_engine(port, &[], agent.directory.path());
    let text = handoff(port, "r0", 1).replace('}', r#","pid":1,"pid_start":1,"pid_ns":1}"#);
    agent.hand_over("a.json", &text);
    agent.until_state("r0", "ready");
    let (said, _) = agent.events(0);
    assert!(said.iter().any(|text| text.contains("another pid namespace")), "{said:?}");
}

#[test]
fn a_process_that_the_daemon_may_not_see_is_judged_by_its_probes() {
    let directory = tempfile::tempdir().expect("a directory");
    let Some(command) = as_another_user(&directory) else { return };
    let mount = "mount -t proc -o hidepid=2 proc /proc";
    let private = ["unshare", "-m", "--propagation", "private", "sh", "-c"];
    let mut may = std::process::Command::new("unshare");
    may.args(&private[1..]).arg(mount).stderr(std::process::Stdio::null());
    if command.len() == 1 || !may.status().is_ok_and(|status| status.success()) {
        return skip("nothing can be mounted here");
    }
    let port = free_port();
    let engine = demo_engine(port, &[], directory.path());
    let script = format!("{mount} && exec \"$@\"");
    let mut all = [&private[..], &[&script, "sh"]].concat();
    all.extend(command.iter().map(String::as_str));
    let agent = Agent::start_in(directory, &all, &[]);
    let text = handoff(port, "r0", 1).replace('}', &format!("{}}}", process(engine.pid())));
    agent.hand_over("a.json", &text);
    agent.until_state("r0", "ready");
    let (said, _) = agent.events(0);
    assert!(said.iter().any(|text| text.contains("/proc does not show process")), "{said:?}");
}

#[test]
fn a_stream_that_runs_when_its_file_is_deleted_ends_whole_and_then_the_replica_goes() {
    let agent = Agent::start(&[]);
    let port = free_port();
    let _engine = demo_engine(port, &["--tokens-per-second", "40"], agent.directory.path());
    agent.hand_over("a.json", &handoff(port, "r0", 1));
    agent.until_state("r0", "ready");
    let path = "/v2/pools/pool-0/replicas/r0/engine/v1/chat/completions";
    let body = r#"{"messages":[{"role":"user","content":"x y"}],"stream":true,"max_tokens":40}"#;
    let mut stream = open(agent.port, "POST", path, None, body).expect("an answer");
    assert_eq!(stream.status, 200);
    stream.event().expect("a first token");
    fs::remove_file(agent.engines().join("a.json")).expect("removed");
    let replica = agent.until_state("r0", "draining");
    assert!(replica["reason"].as_str().is_some_and(|why| why.contains("handoff file is gone")), "{replica}");
    let refused = open(agent.port, "POST", path, None, body).expect("an answer");
    assert_eq!(refused.status, 503, "no new work");
    let events: Vec<String> = std::iter::from_fn(|| stream.event()).collect();
    assert!(events.len() >= 40 && events.last().is_some_and(|last| last == "[DONE]"), "{events:?}");
    agent.until_gone("r0");
}

#[test]
fn processes_that_come_and_go_leave_no_descriptors_behind() {
    let agent = Agent::start(&[]);
    agent.hand_over("a.json", &unused("r0", ""));
    agent.until_state("r0", "found");
    let descriptors = agent.descriptors();
    for _ in 0..30 {
        let mut child = std::process::Command::new("sleep").arg("600").spawn().expect("a process");
        agent.hand_over("a.json", &unused("r0", &process(child.id())));
        until("its process", || (agent.descriptors() > descriptors).then_some(()));
        child.kill().expect("killed");
        child.wait().expect("reaped");
        agent.until_state("r0", "broken");
    }
    let mut child = std::process::Command::new("sleep").arg("600").spawn().expect("a process");
    agent.hand_over("a.json", &unused("r0", &process(child.id())));
    agent.until_state("r0", "found");
    fs::remove_file(agent.engines().join("a.json")).expect("removed");
    agent.until_gone("r0");
    agent.until_descriptors(descriptors);
    child.kill().expect("killed");
    child.wait().expect("reaped");
}
