//! Many nodes in one thread: each is a membership of the node agent, with a kept connection and real
//! messages, but without engines.
//!
//! Time and sockets are real. What a node sends, and when, is decided by the agent's own `Plane`; only
//! the bytes are moved here.

use std::collections::BTreeSet;
use std::io::{ErrorKind, Read, Write};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use llama_orch::pool_managerd::membership::{Answer, Call, Plane, PlaneState};
use llama_orch::reactor::now;
use llama_orch::service::machine;
use llama_orch::time::{Mono, Now};
use llama_orch::wire::id::NodeId;
use llama_orch::wire::node::{
    Capabilities, GpuInfo, Heartbeat, HeartbeatReply, PoolBeat, RegisterReply, RegisterRequest,
};
use llama_orch::wire::url::BaseUrl;
use mio::net::TcpStream;
use mio::{Events, Interest, Poll, Token};

/// Pools of each node.
pub(crate) const POOLS: usize = 4;
/// Descriptors for everything but the nodes' connections.
const DESCRIPTORS_RESERVED: usize = 128;
/// Longest time for which the thread does not look whether it is to stop, in milliseconds.
const STOP_LATENCY_MS: u64 = 20;

/// What the nodes have seen so far.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    /// When each registration was confirmed.
    pub(crate) registered_at: Vec<Mono>,
    /// Heartbeats that were confirmed.
    pub(crate) beats: u64,
    /// Calls that failed, or were not answered in time.
    pub(crate) failures: u64,
    /// Calls that were answered with a conflict.
    pub(crate) conflicts: u64,
    /// From the first byte of each heartbeat to the end of its answer, in microseconds.
    pub(crate) beat_us: Vec<u32>,
}

impl Seen {
    /// Most registrations within `window_ms` since `since`.
    pub(crate) fn registrations_within(&self, window_ms: u64, since: Mono) -> usize {
        let mut at: Vec<Mono> = self.registered_at.iter().copied().filter(|at| *at >= since).collect();
        at.sort_unstable();
        (0..at.len())
            .map(|i| at[i..].partition_point(|other| *other < at[i].plus_ms(window_ms)))
            .max()
            .unwrap_or(0)
    }
}

/// The nodes; they fall silent when this is dropped.
pub(crate) struct Swarm {
    stop: Arc<AtomicBool>,
    seen: Arc<Mutex<Seen>>,
    thread: Option<JoinHandle<()>>,
}

impl Swarm {
    /// `nodes` nodes that join the control plane on `port` one after another within `spread_ms`.
    pub(crate) fn start(nodes: usize, port: u16, interval_ms: u64, spread_ms: u64) -> Swarm {
        let (stop, seen) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Seen::default())));
        let mut hive = Hive::new(nodes, port, interval_ms, spread_ms, seen.clone());
        let is_over = stop.clone();
        let thread = thread::spawn(move || {
            while !is_over.load(Ordering::Relaxed) {
                hive.turn();
            }
        });
        Swarm { stop, seen, thread: Some(thread) }
    }

    pub(crate) fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().expect("the swarm does not panic")
    }
}

impl Drop for Swarm {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let ended = thread.join();
            assert!(ended.is_ok() || thread::panicking(), "the swarm panicked");
        }
    }
}

/// So many nodes, or as many as this process may open connections for.
pub(crate) fn affordable(nodes: usize) -> usize {
    let descriptors = machine::raise_descriptor_limit().unwrap_or(u64::MAX);
    nodes.min(usize::try_from(descriptors).unwrap_or(usize::MAX).saturating_sub(DESCRIPTORS_RESERVED))
}

/// The name of a node.
pub(crate) fn name(node: usize) -> String {
    format!("gpu-{node:05}")
}

/// Four pools with one replica each.
pub(crate) fn pools() -> Vec<PoolBeat> {
    let pools: Vec<String> = (0..POOLS)
        .map(|pool| {
            format!(
                r#"{{"pool_id":"pool-{pool}","ready":true,"slots_free":4,"slots_total":4,
                "vram_free_bytes":20000000000,"engine":"llamacpp","engine_version":"b6000",
                "models_available":["model-{pool}"],"replicas":[{{"replica_id":"r0",
                "url":"http://127.0.0.1:808{pool}","ready":true,"slots_free":4,"slots_total":4,
                "generation":1,"models":["model-{pool}"],"engine":"llamacpp","engine_version":"b6000",
                "device_mask":"{pool}"}}]}}"#
            )
        })
        .collect();
    serde_json::from_str(&format!("[{}]", pools.join(","))).expect("pools")
}

/// The machine of a node.
fn capabilities() -> Capabilities {
    let gpu = |device_id| GpuInfo {
        device_id,
        name: "NVIDIA H100 80GB HBM3".into(),
        vram_total_bytes: 85_520_809_984,
        compute_capability: "9.0".into(),
    };
    Capabilities {
        gpus: (0..POOLS as u32).map(gpu).collect(),
        cpu_cores: Some(64),
        ram_total_bytes: Some(1 << 40),
    }
}

fn boot_id(node: usize) -> String {
    format!("00000000-0000-0000-0000-{node:012}")
}

/// What a node says when it registers.
pub(crate) fn registration(node: usize) -> RegisterRequest {
    let id = NodeId::new(&name(node)).expect("an id");
    RegisterRequest {
        machine_id: Some(id.to_string()),
        address: BaseUrl::new(&format!("http://10.1.{}.{}:9200", node / 256, node % 256)).expect("a URL"),
        pools: pools().into_iter().map(|pool| pool.pool_id).collect(),
        capabilities: capabilities(),
        gpu_loads: Vec::new(),
        version: Some("0.1.0".into()),
        incarnation: Some(1),
        boot_id: Some(boot_id(node)),
        node_id: id,
    }
}

struct Node {
    plane: Plane,
    registration: Vec<u8>,
    path: String,
    socket: Option<TcpStream>,
    out: Vec<u8>,
    input: Vec<u8>,
    call: Option<(Call, Mono, Mono)>,
    timer: Option<Mono>,
}

struct Hive {
    poll: Poll,
    events: Events,
    address: SocketAddr,
    nodes: Vec<Node>,
    timers: BTreeSet<(Mono, usize)>,
    beat: Heartbeat,
    seen: Arc<Mutex<Seen>>,
}

impl Hive {
    fn new(nodes: usize, port: u16, interval_ms: u64, spread_ms: u64, seen: Arc<Mutex<Seen>>) -> Hive {
        let at = now();
        let url = BaseUrl::new(&format!("http://127.0.0.1:{port}")).expect("a URL");
        let beat = Heartbeat {
            timestamp: Some(at.wall.rfc3339()),
            pools: pools(),
            incarnation: Some(1),
            boot_id: None,
            seq: None,
            draining: false,
            preparation: Vec::new(),
            gpu_loads: Vec::new(),
        };
        let mut hive = Hive {
            poll: Poll::new().expect("a poll"),
            events: Events::with_capacity(1024),
            address: SocketAddr::from(([127, 0, 0, 1], port)),
            nodes: Vec::new(),
            timers: BTreeSet::new(),
            beat,
            seen,
        };
        for n in 0..nodes {
            let request = registration(n);
            let begins = at.plus_ms(n as u64 * spread_ms / nodes as u64);
            hive.nodes.push(Node {
                plane: Plane::new(url.clone(), interval_ms, begins),
                registration: serde_json::to_vec(&request).expect("JSON"),
                path: format!("/v2/nodes/{}/heartbeat", request.node_id),
                socket: None,
                out: Vec::new(),
                input: Vec::new(),
                call: None,
                timer: Some(begins.mono),
            });
            hive.timers.insert((begins.mono, n));
        }
        hive
    }

    fn turn(&mut self) {
        let wait_ns = self.timers.first().map_or(u64::MAX, |(at, _)| at.ns_since(now().mono));
        let wait = Duration::from_nanos(wait_ns).min(Duration::from_millis(STOP_LATENCY_MS));
        if let Err(error) = self.poll.poll(&mut self.events, Some(wait)) {
            assert_eq!(error.kind(), ErrorKind::Interrupted, "{error}");
            return;
        }
        let tokens: Vec<usize> = self.events.iter().map(|event| event.token().0).collect();
        for node in tokens {
            self.move_bytes(node);
            self.act(node);
        }
        let at = now();
        while let Some(&(due, node)) = self.timers.first()
            && due <= at.mono
        {
            self.timers.pop_first();
            self.nodes[node].timer = None;
            if self.nodes[node].call.is_some_and(|(_, give_up, _)| give_up <= at.mono) {
                self.failed(node, "not answered in time");
            }
            self.act(node);
        }
    }

    /// Makes the call that is due, and sets the timer.
    fn act(&mut self, index: usize) {
        let at = now();
        if let Some(order) = self.nodes[index].plane.poll(at) {
            self.send(index, order.call, at.mono.plus_ms(order.timeout_ms), at);
        }
        let node = &mut self.nodes[index];
        let due = match node.call {
            Some((_, give_up, _)) => Some(give_up),
            None => node.plane.deadline(),
        };
        if due != node.timer {
            node.timer.map(|old| self.timers.remove(&(old, index)));
            node.timer = due;
            due.map(|due| self.timers.insert((due, index)));
        }
    }

    fn send(&mut self, index: usize, call: Call, give_up: Mono, at: Now) {
        let node = &mut self.nodes[index];
        let (path, body) = match call {
            Call::Register => ("/v2/nodes/register", node.registration.clone()),
            Call::Heartbeat { seq } => {
                self.beat.seq = Some(seq);
                self.beat.boot_id = Some(boot_id(index));
                for pool in &mut self.beat.pools {
                    pool.slots_free = (seq % 5) as u32;
                    pool.replicas.iter_mut().flatten().for_each(|r| r.slots_free = (seq % 5) as u32);
                }
                (node.path.as_str(), serde_json::to_vec(&self.beat).expect("JSON"))
            }
            Call::Deregister => unreachable!("these nodes never leave"),
        };
        node.out.clear();
        node.input.clear();
        let length = body.len();
        write!(
            node.out,
            "POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
        )
        .expect("memory");
        node.out.extend_from_slice(&body);
        node.call = Some((call, give_up, at.mono));
        if node.socket.is_none() {
            let both = Interest::READABLE | Interest::WRITABLE;
            let connected = TcpStream::connect(self.address).and_then(|mut socket| {
                let _ = socket.set_nodelay(true);
                self.poll.registry().register(&mut socket, Token(index), both).map(|()| socket)
            });
            match connected {
                Ok(socket) => node.socket = Some(socket),
                Err(error) => return self.failed(index, &error.to_string()),
            }
        }
        self.move_bytes(index);
    }

    fn move_bytes(&mut self, index: usize) {
        let node = &mut self.nodes[index];
        let Some(socket) = &mut node.socket else { return };
        let mut broken = None;
        while !node.out.is_empty() && broken.is_none() {
            match socket.write(&node.out) {
                Ok(written) => drop(node.out.drain(..written)),
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::NotConnected) => {
                    break;
                }
                Err(error) => broken = Some(error.to_string()),
            }
        }
        let mut piece = [0; 4096];
        while broken.is_none() {
            match socket.read(&mut piece) {
                Ok(0) => broken = Some("the connection was closed".into()),
                Ok(length) => node.input.extend_from_slice(&piece[..length]),
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::NotConnected) => {
                    break;
                }
                Err(error) => broken = Some(error.to_string()),
            }
        }
        if let Some((status, body)) = whole_answer(&node.input) {
            self.answered(index, status, &body);
        }
        if let Some(reason) = broken {
            self.failed(index, &reason);
        }
    }

    fn answered(&mut self, index: usize, status: u16, body: &[u8]) {
        let node = &mut self.nodes[index];
        node.input.clear();
        let Some((call, _, sent)) = node.call.take() else { panic!("an answer to nothing: {status}") };
        let at = now();
        let answer = match (status, call) {
            (200, Call::Register) => {
                let reply: RegisterReply = serde_json::from_slice(body).expect("a reply");
                Answer::Ok {
                    next_heartbeat_ms: reply.next_heartbeat_ms,
                    ttl_ms: reply.ttl_ms,
                    registry_epoch: reply.registry_epoch,
                }
            }
            (200, _) => {
                let reply: HeartbeatReply = serde_json::from_slice(body).expect("a reply");
                let next_heartbeat_ms = reply.next_heartbeat_ms;
                Answer::Ok { next_heartbeat_ms, ttl_ms: None, registry_epoch: None }
            }
            (404, _) => Answer::UnknownNode,
            (409, _) => Answer::Conflict("so it says".into()),
            _ => Answer::Failed(format!("status {status}")),
        };
        let mut seen = self.seen.lock().expect("nobody panics with it");
        match (&answer, call) {
            (Answer::Ok { .. }, Call::Register) => seen.registered_at.push(at.mono),
            (Answer::Ok { .. }, _) => {
                seen.beats += 1;
                seen.beat_us.push(u32::try_from(at.mono.ns_since(sent) / 1000).unwrap_or(u32::MAX));
            }
            (Answer::Conflict(_), _) => seen.conflicts += 1,
            (Answer::Failed(_), _) => seen.failures += 1,
            _ => {}
        }
        drop(seen);
        let node = &mut self.nodes[index];
        node.plane.answered(call, answer, at, &mut |n| fastrand::u64(..n), &mut Vec::new());
        assert_ne!(node.plane.state(), &PlaneState::Left);
    }

    /// The connection is of no use any more, and with it the call that it carries.
    fn failed(&mut self, index: usize, reason: &str) {
        let node = &mut self.nodes[index];
        if let Some(mut socket) = node.socket.take() {
            let _ = self.poll.registry().deregister(&mut socket);
        }
        node.out.clear();
        node.input.clear();
        if let Some((call, _, _)) = node.call.take() {
            self.seen.lock().expect("nobody panics with it").failures += 1;
            let answer = Answer::Failed(reason.to_string());
            node.plane.answered(call, answer, now(), &mut |n| fastrand::u64(..n), &mut Vec::new());
        }
    }
}

/// Status and body, once all of it is there.
fn whole_answer(input: &[u8]) -> Option<(u16, Vec<u8>)> {
    let end = input.windows(4).position(|window| window == b"\r\n\r\n")? + 4;
    let head = String::from_utf8_lossy(&input[..end]);
    let status = head.get(9..12)?.parse().ok()?;
    let length = head.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse::<usize>().ok())?
    })?;
    let body = input.get(end..end + length)?;
    Some((status, body.to_vec()))
}
