//! What do many nodes cost a control plane: memory a node, processor time, and how far its loop lags?
//!
//! Real daemons and real connections; prints its figures instead of statistics.
//!
//! ```text
//! cargo bench --bench membership             # memory, then 1,000 heartbeats a second
//! cargo bench --bench membership -- memory   # only one of them: memory, load
//! ```

#[path = "support/mod.rs"]
mod support;
#[path = "../tests/membership/swarm.rs"]
#[allow(dead_code, reason = "tests ask more of it")]
mod swarm;

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use llama_orch::orchestratord::service_registry::{Limits, ServiceRegistry};
use llama_orch::service::machine;
use llama_orch::time::Now;
use llama_orch::wire::node::{Heartbeat, RegisterRequest};
use support::{Process, free_port, get, get_text, start, until};
use swarm::Swarm;

/// Nodes whose memory is measured: fewer than a process may have connections.
const NODES: usize = 9_900;
/// Seconds of the load.
const LOAD_S: u64 = 20;

struct Control {
    process: Process,
    port: u16,
    _state: tempfile::TempDir,
}

impl Control {
    fn start(interval_s: u64) -> Control {
        let port = free_port();
        let (addr, interval) = (format!("127.0.0.1:{port}"), interval_s.to_string());
        let state = tempfile::tempdir().expect("a directory");
        let state_dir = state.path().display().to_string();
        let args = [
            "--cloud-profile",
            "--state-dir",
            &state_dir,
            "--addr",
            &addr,
            "--heartbeat-interval-secs",
            &interval,
            "--node-timeout-ms",
            "180000",
            "--log-level",
            "error",
        ];
        let process = start(env!("CARGO_BIN_EXE_orchestratord"), &args);
        until("the control plane", || get(port, "/ready"));
        Control { process, port, _state: state }
    }

    fn metric(&self, name: &str) -> f64 {
        let text = get_text(self.port, "/metrics").expect("metrics");
        let line = text.lines().find(|line| line.starts_with(&format!("{name} ")));
        line.and_then(|line| line.rsplit_once(' ')?.1.parse().ok()).unwrap_or(0.0)
    }

    /// Upper bounds of buckets with how many turns took at most so long.
    fn turns(&self) -> Vec<(f64, f64)> {
        let text = get_text(self.port, "/metrics").expect("metrics");
        let buckets = text.lines().filter_map(|line| {
            let rest = line.strip_prefix("orchestratord_loop_turn_seconds_bucket{le=\"")?;
            let (bound, count) = rest.split_once("\"} ")?;
            Some((bound.parse().unwrap_or(f64::INFINITY), count.parse().ok()?))
        });
        buckets.collect()
    }

    fn until_online(&self, nodes: usize) {
        let begun = Instant::now();
        while self.metric("orchestratord_nodes{status=\"Online\"}") < nodes as f64 {
            assert!(begun.elapsed() < Duration::from_secs(120), "not all nodes came");
            thread::sleep(Duration::from_millis(200));
        }
    }

    /// Resident memory, in bytes.
    fn memory(&self) -> u64 {
        let text = fs::read_to_string(format!("/proc/{}/status", self.process.pid())).expect("a status");
        let line = text.lines().find(|line| line.starts_with("VmRSS:")).expect("its memory");
        line.split_whitespace().nth(1).and_then(|kib| kib.parse::<u64>().ok()).expect("a number") * 1024
    }

    /// Processor time so far, in seconds.
    fn cpu_s(&self) -> f64 {
        let text = fs::read_to_string(format!("/proc/{}/stat", self.process.pid())).expect("a stat");
        let fields: Vec<&str> = text.rsplit_once(") ").expect("a name").1.split(' ').collect();
        let ticks: u64 = fields[11..13].iter().map(|n| n.parse::<u64>().expect("a number")).sum();
        ticks as f64 / rustix::param::clock_ticks_per_second() as f64
    }
}

/// A registry of so many nodes as the control plane would have it, each message read from JSON.
fn registry_of(nodes: usize) -> ServiceRegistry {
    let mut registry = ServiceRegistry::new(Limits::default(), 1);
    let mut changes = Vec::new();
    for n in 0..nodes {
        let request = serde_json::to_vec(&swarm::registration(n)).expect("JSON");
        let request: RegisterRequest = serde_json::from_slice(&request).expect("a registration");
        registry.register(&request, "127.0.0.1", Now::default(), &mut changes).expect("registered");
        let beat = Heartbeat {
            timestamp: None,
            pools: swarm::pools(),
            incarnation: Some(1),
            boot_id: None,
            seq: Some(1),
            draining: false,
            preparation: Vec::new(),
            gpu_loads: Vec::new(),
        };
        registry
            .heartbeat(&request.node_id, &beat, "127.0.0.1", Now::default(), &mut changes)
            .expect("accepted");
        changes.clear();
    }
    registry
}

#[allow(clippy::print_stdout, reason = "its figures are what a benchmark is for")]
fn memory() {
    let empty = machine::resident_bytes().expect("a number");
    let registry = registry_of(NODES);
    let alone = machine::resident_bytes().expect("a number") - empty;
    println!("the registry alone: {:.2} KiB a node", alone as f64 / NODES as f64 / 1024.0);
    drop(registry);
    let control = Control::start(60);
    let before = control.memory();
    assert_eq!(swarm::affordable(NODES), NODES, "too few descriptors for as many connections");
    let swarm = Swarm::start(NODES, control.port, 60_000, 8_000);
    control.until_online(NODES);
    let with_connections = control.memory();
    drop(swarm);
    until("connections to end", || (control.metric("orchestratord_client_connections") < 3.0).then_some(()));
    let after = control.memory();
    let each = |bytes: u64| (bytes.saturating_sub(before)) as f64 / NODES as f64 / 1024.0;
    println!("memory of {NODES} nodes, 4 pools and 4 replicas each (empty: {} KiB):", before / 1024);
    println!("  {:.2} KiB a node with its kept connection", each(with_connections));
    println!("  {:.2} KiB a node after the connections ended", each(after));
}

#[allow(clippy::print_stdout, reason = "its figures are what a benchmark is for")]
fn load() {
    for (nodes, interval_s) in [(1_000, 1), (5_000, 5), (NODES, 10)] {
        let nodes = swarm::affordable(nodes);
        let control = Control::start(interval_s);
        let swarm = Swarm::start(nodes, control.port, interval_s * 1000, interval_s * 1000);
        control.until_online(nodes);
        let (cpu, turns, begun) = (control.cpu_s(), control.turns(), Instant::now());
        let beats = swarm.seen().beats;
        swarm.seen().beat_us.clear();
        thread::sleep(Duration::from_secs(LOAD_S));
        let seconds = begun.elapsed().as_secs_f64();
        let share = (control.cpu_s() - cpu) / seconds;
        let (mut latency, rate) = {
            let seen = swarm.seen();
            (seen.beat_us.clone(), (seen.beats - beats) as f64 / seconds)
        };
        latency.sort_unstable();
        let quantile = |q: f64| f64::from(latency[(latency.len() as f64 * q) as usize]) / 1000.0;
        let taken: Vec<(f64, f64)> =
            control.turns().iter().zip(&turns).map(|((bound, n), (_, old))| (*bound, n - old)).collect();
        let all = taken.last().map_or(0.0, |(_, n)| *n);
        let p99 = taken.iter().find(|(_, n)| *n >= 0.99 * all).map_or(f64::INFINITY, |(bound, _)| *bound);
        println!("{nodes} nodes, a heartbeat every {interval_s} s: {rate:.0} heartbeats/s");
        println!("  loop: {all:.0} turns, p99 at most {:.2} ms, longest {:.2} ms", p99 * 1e3, {
            control.metric("orchestratord_loop_turn_seconds_max") * 1e3
        });
        println!(
            "  heartbeat to answer: p50 {:.2} ms, p99 {:.2} ms, max {:.2} ms",
            quantile(0.5),
            quantile(0.99),
            quantile(0.9999)
        );
        println!("  processor: {:.1} % of one core, {:.1} us a heartbeat", share * 100.0, share / rate * 1e6);
        let seen = swarm.seen();
        assert_eq!((seen.failures, seen.conflicts), (0, 0));
    }
}

fn main() {
    let wanted: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with("--")).collect();
    let is_wanted = |name: &str| wanted.is_empty() || wanted.iter().any(|arg| arg == name);
    if is_wanted("memory") {
        memory();
    }
    if is_wanted("load") {
        load();
    }
}
