//! A control plane, node agents with an engine each, and clients that ask all the time.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::harness::*;

pub(crate) const CHAT: &str = "/v1/chat/completions";
pub(crate) const SHORT: &str = r#"{"messages":[{"role":"user","content":"one two"}],"max_tokens":3}"#;

/// A streamed question for so many tokens.
pub(crate) fn stream_of(tokens: u32) -> String {
    format!(r#"{{"messages":[{{"role":"user","content":"x y"}}],"stream":true,"max_tokens":{tokens}}}"#)
}

/// The control plane.
pub(crate) struct Control {
    pub(crate) port: u16,
    pub(crate) process: Process,
    settings: Vec<(String, String)>,
    directory: tempfile::TempDir,
}

impl Control {
    /// `env` adds to what makes it a control plane of nodes with heartbeats every second.
    pub(crate) fn start(env: &[(&str, &str)]) -> Control {
        let directory = tempfile::tempdir().expect("a directory");
        let port = free_port();
        let addr = format!("127.0.0.1:{port}");
        let own = [
            ("ORCHESTRATORD_CLOUD_PROFILE", "true"),
            ("ORCHESTRATORD_ADDR", addr.as_str()),
            ("ORCHESTRATORD_HEARTBEAT_INTERVAL_SECS", "1"),
        ];
        let settings: Vec<(String, String)> =
            [&own[..], env].concat().iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
        let process = run(&settings, directory.path());
        until("the control plane", || get(port, "/ready").filter(|answer| answer.status == 200));
        Control { port, process, settings, directory }
    }

    /// Starts it again after its end, on the same port.
    pub(crate) fn start_again(&mut self) {
        self.process.kill();
        self.process = run(&self.settings, self.directory.path());
        until("the control plane", || get(self.port, "/ready").filter(|answer| answer.status == 200));
    }

    pub(crate) fn nodes(&self) -> Vec<Value> {
        let nodes = get(self.port, "/v2/nodes").expect("an answer").json();
        nodes["nodes"].as_array().expect("a list").clone()
    }

    pub(crate) fn node(&self, name: &str) -> Option<Value> {
        // By its name: a listing has pages.
        let answer = get(self.port, &format!("/v2/nodes/{name}")).expect("an answer");
        (answer.status == 200).then(|| answer.json())
    }

    pub(crate) fn status(&self, name: &str) -> String {
        let node = self.node(name).unwrap_or_default();
        node["status"].as_str().unwrap_or_default().to_string()
    }

    pub(crate) fn online(&self) -> f64 {
        metric(self.port, "orchestratord_nodes{status=\"Online\"}").unwrap_or(0.0)
    }

    pub(crate) fn until_online(&self, nodes: f64) {
        until("every node to be online", || (self.online() == nodes).then_some(()));
    }

    pub(crate) fn until_routable(&self, replicas: f64) {
        until("replicas", || metric(self.port, "orchestratord_replicas_routable").filter(|n| *n == replicas));
    }

    /// States of events of a kind, with their subjects: the last thousand.
    pub(crate) fn events(&self, kind: &str) -> Vec<(String, String)> {
        let text = |event: &Value, name: &str| event[name].as_str().expect("a text").to_string();
        let events = get(self.port, "/v2/events").expect("events").json();
        let events = events["events"].as_array().expect("a list").clone();
        let meant = events.iter().filter(|event| event["kind"] == kind);
        meant.map(|event| (text(event, "subject"), text(event, "state"))).collect()
    }

    /// Fails if a node ever lost its lease, or expiry was held, as far as events go back.
    pub(crate) fn assert_nobody_expired(&self) {
        let lost = |(_, state): &(String, String)| matches!(state.as_str(), "Suspect" | "Offline" | "gone");
        let expired: Vec<_> = self.events("node").into_iter().filter(lost).collect();
        assert!(expired.is_empty(), "{expired:?}");
        let mut daemon = self.events("daemon");
        daemon.retain(|(_, state)| state != "restored");
        assert_eq!(daemon, [], "no mass expiry either");
    }
}

fn run(settings: &[(String, String)], directory: &Path) -> Process {
    let env: Vec<(&str, &str)> = settings.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
    Process::start(ORCHESTRATORD, &[], &env, directory)
}

/// A node agent and its engine.
pub(crate) struct Node {
    pub(crate) name: String,
    pub(crate) port: u16,
    pub(crate) agent: Process,
    pub(crate) engine: Option<Process>,
    pub(crate) directory: tempfile::TempDir,
}

impl Node {
    /// An agent without an engine.
    pub(crate) fn bare(name: &str, control: u16, env: &[(&str, &str)]) -> Node {
        Node::within(tempfile::tempdir().expect("a directory"), name, control, env)
    }

    pub(crate) fn within(
        directory: tempfile::TempDir,
        name: &str,
        control: u16,
        env: &[(&str, &str)],
    ) -> Node {
        let port = free_port();
        let (addr, url) = (format!("127.0.0.1:{port}"), format!("http://127.0.0.1:{control}"));
        let own = [
            ("POOL_MANAGERD_CLOUD_PROFILE", "true"),
            ("POOL_MANAGERD_NODE_ID", name),
            ("POOL_MANAGERD_ADDR", addr.as_str()),
            ("ORCHESTRATORD_URL", url.as_str()),
            ("POOL_MANAGERD_HEARTBEAT_INTERVAL_SECS", "1"),
        ];
        let agent = Process::start(POOL_MANAGERD, &[], &[&own[..], env].concat(), directory.path());
        Node { name: name.to_string(), port, agent, engine: None, directory }
    }

    /// An agent with an engine that is so many replicas.
    pub(crate) fn start(
        name: &str,
        control: u16,
        replicas: usize,
        speed: &str,
        env: &[(&str, &str)],
    ) -> Node {
        let mut node = Node::bare(name, control, env);
        let engine = free_port();
        let args = ["--prefill-ms", "0", "--tokens-per-second", speed, "--slots", "64"];
        node.engine = Some(demo_engine(engine, &args, node.directory.path()));
        let engines = node.directory.path().join(".runtime/engines");
        for n in 0..replicas {
            hand_over(&engines, &format!("r{n}.json"), &handoff(engine, &format!("r{n}"), 4));
        }
        node
    }

    /// The state of its membership, by its own account.
    pub(crate) fn ready_replicas(&self) -> usize {
        let status = get(self.port, "/v2/pools/pool-0/status").filter(|answer| answer.status == 200);
        let status = status.map_or(Value::Null, |answer| answer.json());
        let replicas = status["replicas"].as_array().cloned().unwrap_or_default();
        replicas.iter().filter(|replica| replica["ready"] == true).count()
    }
}

/// What became of one request.
#[derive(Clone, Debug)]
pub(crate) struct Asked {
    pub(crate) begun: Instant,
    pub(crate) ended: Instant,
    pub(crate) outcome: Result<(), String>,
}

/// Clients that ask one question after another until they are stopped; each answer is read to its end
/// and checked.
pub(crate) struct Traffic {
    stop: Arc<AtomicBool>,
    asked: Arc<Mutex<Vec<Asked>>>,
    clients: Vec<JoinHandle<()>>,
}

impl Traffic {
    pub(crate) fn start(port: u16, clients: usize) -> Traffic {
        let (stop, asked) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Vec::new())));
        let clients = (0..clients)
            .map(|_| {
                let (stop, asked) = (stop.clone(), asked.clone());
                thread::spawn(move || {
                    while !stop.load(Ordering::Relaxed) {
                        let begun = Instant::now();
                        let outcome = question(port);
                        let is_error = outcome.is_err();
                        let one = Asked { begun, ended: Instant::now(), outcome };
                        asked.lock().expect("nobody panics with it").push(one);
                        // Nobody listens for a moment: asking at once again would only fill the list.
                        thread::sleep(Duration::from_millis(if is_error { 20 } else { 4 }));
                    }
                })
            })
            .collect();
        Traffic { stop, asked, clients }
    }

    /// What was asked so far.
    pub(crate) fn asked(&self) -> Vec<Asked> {
        self.asked.lock().expect("nobody panics with it").clone()
    }

    /// Waits until so many requests that began after `since` have been answered well.
    pub(crate) fn until_answered(&self, count: usize, since: Instant) {
        let is_good = |asked: &&Asked| asked.begun >= since && asked.outcome.is_ok();
        until("requests to be answered", || {
            (self.asked().iter().filter(is_good).count() >= count).then_some(())
        });
    }

    /// Stops asking and returns everything that was asked.
    pub(crate) fn end(mut self) -> Vec<Asked> {
        self.stop.store(true, Ordering::Relaxed);
        for client in self.clients.drain(..) {
            client.join().expect("a client does not panic");
        }
        self.asked()
    }
}

impl Drop for Traffic {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// One question; an error says what is wrong with the answer.
fn question(port: u16) -> Result<(), String> {
    let Some(answer) = ask(port, "POST", CHAT, None, SHORT) else {
        return Err("no connection, or closed before the answer's end".into());
    };
    if answer.status != 200 {
        return Err(format!("status {}: {}", answer.status, answer.body));
    }
    let body: Value =
        serde_json::from_str(&answer.body).map_err(|error| format!("{error}: {:?}", answer.body))?;
    let choice = &body["choices"][0];
    let is_whole = choice["finish_reason"].is_string()
        && choice["message"]["content"].as_str().is_some_and(|text| text.contains("[demo]"));
    if is_whole { Ok(()) } else { Err(format!("not a whole answer: {body}")) }
}

/// The failures among what was asked.
pub(crate) fn failures<'a>(asked: impl IntoIterator<Item = &'a Asked>) -> Vec<&'a str> {
    asked.into_iter().filter_map(|asked| asked.outcome.as_ref().err().map(String::as_str)).collect()
}
