//! Being a node of a control plane, from another program: register, send heartbeats, say goodbye.
//!
//! A program that runs engines in a way of its own is a node as good as one with `pool-managerd`: it says
//! who it is, and a closure says what its pools are like whenever a heartbeat is due. Heartbeats leave on a
//! thread of their own. When they leave is decided as in the node agent ([`crate::pool_managerd::membership`]):
//! at the interval that the control plane asks for, with some jitter; at once where
//! [`HeartbeatHandle::beat_now`] says that something has changed; one at a time; after failures with growing
//! pauses. A control plane that has forgotten the node is told anew who it is, and where another program owns
//! the node id this one steps back.
//!
//! ```
//! use llama_orch::node_registration::{HeartbeatPoolStatus, NodeRegistration, NodeRegistrationConfig};
//!
//! # // A control plane, and what the program knows of its engines.
//! # let port = llama_orch::service::machine::listen_on_free_port()?.local_addr()?.port();
//! # let orchestratord_url = format!("http://127.0.0.1:{port}");
//! # let args = [format!("--addr=127.0.0.1:{port}"), "--cloud-profile=true".into()].map(Into::into);
//! # std::thread::spawn(|| llama_orch::orchestratord::run(args.into()));
//! # let until = |is_so: &dyn Fn() -> bool| {
//! #     let begun = std::time::Instant::now();
//! #     while !is_so() {
//! #         assert!(begun.elapsed().as_secs() < 20, "waited in vain");
//! #         std::thread::sleep(std::time::Duration::from_millis(5));
//! #     }
//! # };
//! # until(&|| std::net::TcpStream::connect(("127.0.0.1", port)).is_ok());
//! # struct Health { ready: bool }
//! # struct Snapshot { pool_id: String, health: Health, slots_free: Option<i32> }
//! # #[derive(Clone)] struct Registry;
//! # impl Registry {
//! #     fn snapshots(&self) -> Vec<Snapshot> {
//! #         vec![Snapshot { pool_id: "pool-0".into(), health: Health { ready: true }, slots_free: Some(4) }]
//! #     }
//! # }
//! # let reg = Registry;
//! let registration = NodeRegistration::new(NodeRegistrationConfig {
//!     node_id: "gpu-node-1".into(),
//!     machine_id: "machine-alpha".into(),
//!     address: "http://192.168.1.100:9200".into(),
//! #   /*
//!     orchestratord_url: "http://192.168.1.1:8080".into(),
//! #   */ orchestratord_url,
//!     pools: vec!["pool-0".into(), "pool-1".into()],
//!     heartbeat_interval_secs: 10,
//!     ..NodeRegistrationConfig::default()
//! });
//! registration.register()?;
//!
//! let heartbeat = registration.spawn_heartbeat(move || {
//!     let snapshots = reg.snapshots();
//!     snapshots.into_iter().map(|snap| {
//!         HeartbeatPoolStatus {
//!             pool_id: snap.pool_id,
//!             ready: snap.health.ready,
//!             slots_free: snap.slots_free.unwrap_or(0) as u32,
//!             ..HeartbeatPoolStatus::default()
//!         }
//!     }).collect()
//! });
//!
//! // Heartbeats go on in the background. An engine became ready: the control plane hears of it at once.
//! heartbeat.beat_now();
//! # until(&|| heartbeat.status().heartbeats > 0);
//! # assert!(heartbeat.status().is_registered);
//!
//! // At shutdown:
//! heartbeat.stop();
//! registration.deregister()?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::pool_managerd::core::CallBody;
use crate::pool_managerd::membership::{
    Answer, Call, DEREGISTER_TIMEOUT_MS, INTERVAL_MS_MAX, INTERVAL_MS_MIN, Order, explain,
};
use crate::service::auth::Tokens;
use crate::service::machine;
use crate::service::tls::Files;
use crate::time::Wall;
use crate::wire::id::{NodeId, PoolId};
use crate::wire::node::RegisterRequest;
use crate::wire::url::BaseUrl;

pub use crate::pool_registry_types::{
    GpuInfo, InvalidStatus, NodeCapabilities, PoolStatus as HeartbeatPoolStatus, ReplicaStatus,
};

mod heartbeat;
mod line;

pub use heartbeat::{HeartbeatHandle, HeartbeatStatus};
use line::Line;

/// Who registers, and with whom.
#[derive(Clone, PartialEq, Eq)]
pub struct NodeRegistrationConfig {
    /// The node's name, 1 to 128 of `A-Z a-z 0-9 . _ -`; default: the host name.
    pub node_id: String,
    /// The machine's name; the node's where empty.
    pub machine_id: String,
    /// Where the control plane reaches this program, `http://HOST:PORT`. It dials engines that listen on
    /// other addresses than loopback directly; for the others, whoever listens here relays
    /// `/v2/pools/{pool}/replicas/{replica}/engine/...`.
    pub address: String,
    /// The control plane, `http://HOST:PORT` or `https://HOST:PORT`. For several, make a registration each.
    pub orchestratord_url: String,
    /// Pools that the node announces.
    pub pools: Vec<String>,
    /// What the machine has; default: its processors and memory, and no GPU.
    pub capabilities: NodeCapabilities,
    /// Seconds between heartbeats where the control plane does not say, 1 to 60, default 10. A call is
    /// given up after half of it.
    pub heartbeat_interval_secs: u64,
    /// The token that the control plane wants to see, if it wants one. Never shown.
    pub api_token: Option<String>,
    /// File with the roots, in PEM, that an `https` control plane must come from; the system's where absent.
    pub tls_ca: Option<PathBuf>,
    /// Files with the certificate and the key, in PEM, that a control plane is shown if it asks for one; it
    /// may serve a node only under the name in its certificate.
    pub tls_client: Option<(PathBuf, PathBuf)>,
}

impl Default for NodeRegistrationConfig {
    fn default() -> NodeRegistrationConfig {
        NodeRegistrationConfig {
            node_id: machine::host_name(),
            machine_id: String::new(),
            address: String::new(),
            orchestratord_url: String::new(),
            pools: Vec::new(),
            capabilities: machine::capabilities(),
            heartbeat_interval_secs: 10,
            api_token: None,
            tls_ca: None,
            tls_client: None,
        }
    }
}

impl fmt::Debug for NodeRegistrationConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NodeRegistrationConfig")
            .field("node_id", &self.node_id)
            .field("machine_id", &self.machine_id)
            .field("address", &self.address)
            .field("orchestratord_url", &self.orchestratord_url)
            .field("pools", &self.pools)
            .field("capabilities", &self.capabilities)
            .field("heartbeat_interval_secs", &self.heartbeat_interval_secs)
            .field("api_token", &self.api_token.as_ref().map(|_| "(hidden)"))
            .field("tls_ca", &self.tls_ca)
            .field("tls_client", &self.tls_client)
            .finish()
    }
}

/// Why a call did not do what it is for. Displays as a sentence that says what happened, to what, and what
/// to do; never with the token.
#[derive(Debug)]
pub enum RegistrationError {
    /// A value of the configuration cannot be used.
    Config {
        /// Which.
        field: &'static str,
        /// What is wrong with it.
        why: String,
    },
    /// No answer from the control plane, or one that makes no sense.
    Failed {
        /// The control plane.
        url: String,
        /// The node.
        node_id: String,
        /// What happened.
        why: String,
    },
    /// Another program owns the node id.
    Conflict {
        /// The control plane.
        url: String,
        /// The node id.
        node_id: String,
        /// What the control plane says of the other.
        why: String,
    },
    /// The token is missing or wrong.
    Unauthorized {
        /// The control plane.
        url: String,
        /// Whether a token was sent.
        had_token: bool,
    },
    /// The control plane runs without nodes.
    CloudDisabled {
        /// The control plane.
        url: String,
    },
    /// Heartbeats of this node run already.
    AlreadyBeating {
        /// The node.
        node_id: String,
    },
    /// The kernel gives no thread or descriptor.
    System(io::Error),
}

impl fmt::Display for RegistrationError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RegistrationError::Config { field, why } => write!(f, "NodeRegistrationConfig.{field}: {why}"),
            RegistrationError::Failed { url, node_id, why } => write!(
                f,
                "{url}: a call for node {node_id} failed: {why}; see that orchestratord runs there and that orchestratord_url is right"
            ),
            RegistrationError::Conflict { url, node_id, why } => {
                write!(
                    f,
                    "{url}: the node id {node_id} belongs to another program: {why}; set another node_id, or end the other one"
                )
            }
            RegistrationError::Unauthorized { url, had_token: true } => {
                write!(f, "{url}: it refuses the token: set api_token to its LLORCH_API_TOKEN")
            }
            RegistrationError::Unauthorized { url, had_token: false } => {
                write!(f, "{url}: it wants a token: set api_token to its LLORCH_API_TOKEN")
            }
            RegistrationError::CloudDisabled { url } => {
                write!(f, "{url}: it runs without nodes: start it with ORCHESTRATORD_CLOUD_PROFILE=true")
            }
            RegistrationError::AlreadyBeating { node_id } => {
                write!(f, "heartbeats of node {node_id} run already: stop their handle first")
            }
            RegistrationError::System(error) => {
                write!(f, "the kernel gives no thread or descriptor: {error}")
            }
        }
    }
}

impl std::error::Error for RegistrationError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            RegistrationError::System(error) => Some(error),
            _ => None,
        }
    }
}

/// What a control plane says when it registers a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Registered {
    /// How long the registration lasts without a heartbeat, in milliseconds, where it says so.
    pub ttl_ms: Option<u64>,
    /// When it wants the first heartbeat at the latest, in milliseconds from now, where it says so.
    pub next_heartbeat_ms: Option<u64>,
    /// Differs after every start of the control plane, where it says so.
    pub registry_epoch: Option<u64>,
}

/// One node of one control plane. All calls block, none longer than half of the heartbeat interval, and may
/// be made from any thread.
///
/// The control plane tells a program that was started again from its own past by an incarnation, which is
/// the time of [`NodeRegistration::new`]. It ends with the heartbeats or with
/// [`NodeRegistration::deregister`]; what comes after that begins another.
#[derive(Debug)]
pub struct NodeRegistration {
    plan: Result<Arc<Plan>, (&'static str, String)>,
    life: Arc<Mutex<Life>>,
}

/// A configuration that can be used.
#[derive(Debug)]
struct Plan {
    node_id: NodeId,
    machine_id: Option<String>,
    address: BaseUrl,
    control_plane: BaseUrl,
    pools: Vec<PoolId>,
    capabilities: NodeCapabilities,
    interval_ms: u64,
    tokens: Tokens,
    tls: Files,
    boot_id: Option<String>,
}

/// The present incarnation.
#[derive(Debug)]
struct Life {
    incarnation: u64,
    /// Nothing that this incarnation says counts any more.
    is_over: bool,
    /// What the control plane said to [`NodeRegistration::register`], until heartbeats go by it.
    registered: Option<Answer>,
    heartbeats: Option<Arc<heartbeat::Shared>>,
}

impl NodeRegistration {
    /// A node that nobody knows of yet. A configuration that cannot be used is reported by the first call.
    #[must_use]
    pub fn new(config: NodeRegistrationConfig) -> NodeRegistration {
        let incarnation = crate::reactor::now().wall.unix_ms();
        let life = Life { incarnation, is_over: false, registered: None, heartbeats: None };
        NodeRegistration { plan: Plan::new(config).map(Arc::new), life: Arc::new(Mutex::new(life)) }
    }

    /// Registers the node, or registers it again: `POST /v2/nodes/register`. Heartbeats would do so by
    /// themselves; this says what became of it.
    ///
    /// # Errors
    /// [`RegistrationError`]; after half of the heartbeat interval at the latest.
    pub fn register(&self) -> Result<Registered, RegistrationError> {
        let plan = self.plan()?;
        let incarnation = self.life().incarnation(crate::reactor::now().wall);
        let order = Order { call: Call::Register, timeout_ms: plan.interval_ms / 2 };
        let answer = Line::open(plan)?.call(plan, incarnation, order, &plan.introduction(incarnation))?;
        let Answer::Ok { next_heartbeat_ms, ttl_ms, registry_epoch } = answer else {
            return Err(plan.error(answer));
        };
        let mut life = self.life();
        if life.incarnation == incarnation && !life.is_over {
            life.registered = Some(answer);
        }
        Ok(Registered { ttl_ms, next_heartbeat_ms, registry_epoch })
    }

    /// Starts the thread that sends heartbeats. Each tells what `pools` returns then: all pools of the
    /// node, for what is not named is gone. A pool whose names cannot be used is left out, and the log says
    /// so. A closure that takes long delays heartbeats, and the node's lease may end.
    ///
    /// # Panics
    /// Where [`NodeRegistration::try_spawn_heartbeat`] returns an error.
    #[must_use = "dropping the handle ends heartbeats"]
    pub fn spawn_heartbeat<F>(&self, pools: F) -> HeartbeatHandle
    where
        F: FnMut() -> Vec<HeartbeatPoolStatus> + Send + 'static,
    {
        match self.try_spawn_heartbeat(pools) {
            Ok(handle) => handle,
            Err(error) => panic!("{error}"),
        }
    }

    /// As [`NodeRegistration::spawn_heartbeat`].
    ///
    /// # Errors
    /// [`RegistrationError::Config`], [`RegistrationError::AlreadyBeating`] or
    /// [`RegistrationError::System`]. What a control plane says is no error here: the thread deals with it,
    /// and [`HeartbeatHandle::status`] shows it.
    pub fn try_spawn_heartbeat<F>(&self, pools: F) -> Result<HeartbeatHandle, RegistrationError>
    where
        F: FnMut() -> Vec<HeartbeatPoolStatus> + Send + 'static,
    {
        heartbeat::spawn(self.plan()?, &self.life, pools)
    }

    /// Says goodbye: `DELETE /v2/nodes/{id}`. Heartbeats that still run end. A node that the control plane
    /// does not know (any more) is no error.
    ///
    /// # Errors
    /// [`RegistrationError`]. A later start of the same node is not removed: that is a
    /// [`RegistrationError::Conflict`].
    pub fn deregister(&self) -> Result<(), RegistrationError> {
        let plan = self.plan()?;
        let incarnation = {
            let mut life = self.life();
            if let Some(heartbeats) = life.heartbeats.take() {
                heartbeats.stop();
            }
            life.registered = None;
            life.is_over = true;
            life.incarnation
        };
        let order = Order { call: Call::Deregister, timeout_ms: DEREGISTER_TIMEOUT_MS };
        match Line::open(plan)?.call(plan, incarnation, order, &CallBody::Deregister { incarnation })? {
            Answer::Ok { .. } | Answer::UnknownNode => Ok(()),
            other => Err(plan.error(other)),
        }
    }

    fn plan(&self) -> Result<&Arc<Plan>, RegistrationError> {
        self.plan.as_ref().map_err(|(field, why)| RegistrationError::Config { field, why: why.clone() })
    }

    fn life(&self) -> MutexGuard<'_, Life> {
        self.life.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Life {
    /// The present incarnation; another one where the last is over.
    fn incarnation(&mut self, now: Wall) -> u64 {
        if self.is_over {
            self.is_over = false;
            self.registered = None;
            self.incarnation = now.unix_ms().max(self.incarnation + 1);
        }
        self.incarnation
    }
}

impl Plan {
    fn new(config: NodeRegistrationConfig) -> Result<Plan, (&'static str, String)> {
        let text = |field| move |why: &dyn fmt::Display| (field, why.to_string());
        let control_plane =
            BaseUrl::new(&config.orchestratord_url).map_err(|why| text("orchestratord_url")(&why))?;
        let tls = Files::of_client(config.tls_ca, config.tls_client);
        if control_plane.https() {
            // Files that cannot be used are reported now, although they are read again for every line.
            tls.client().map_err(|why| text("tls_ca, tls_client")(&why))?;
        }
        let pools = config.pools.iter().map(|pool| PoolId::new(pool));
        let tokens = config.api_token.as_deref().map(Tokens::parse).transpose();
        Ok(Plan {
            node_id: NodeId::new(&config.node_id).map_err(|why| text("node_id")(&why))?,
            machine_id: Some(config.machine_id).filter(|id| !id.is_empty()),
            address: BaseUrl::lenient(&config.address).map_err(|why| text("address")(&why))?,
            control_plane,
            pools: pools.collect::<Result<_, _>>().map_err(|why| text("pools")(&why))?,
            capabilities: config.capabilities,
            interval_ms: config
                .heartbeat_interval_secs
                .saturating_mul(1000)
                .clamp(INTERVAL_MS_MIN, INTERVAL_MS_MAX),
            tokens: tokens.map_err(|why| text("api_token")(&why))?.unwrap_or_default(),
            tls,
            boot_id: machine::boot_id(),
        })
    }

    fn introduction(&self, incarnation: u64) -> CallBody {
        CallBody::Register(Box::new(RegisterRequest {
            node_id: self.node_id.clone(),
            machine_id: self.machine_id.clone(),
            address: self.address.clone(),
            pools: self.pools.clone(),
            capabilities: self.capabilities.clone(),
            gpu_loads: Vec::new(),
            version: Some(env!("CARGO_PKG_VERSION").to_string()),
            incarnation: Some(incarnation),
            boot_id: self.boot_id.clone(),
        }))
    }

    /// What a peer said, without the token, which it may have repeated.
    fn discreet(&self, answer: Answer) -> Answer {
        let Some(bearer) = self.tokens.bearer() else { return answer };
        let token = bearer.trim_start_matches("Bearer ");
        match answer {
            Answer::Failed(why) => Answer::Failed(why.replace(token, "(hidden)")),
            Answer::Conflict(why) => Answer::Conflict(why.replace(token, "(hidden)")),
            other => other,
        }
    }

    fn error(&self, answer: Answer) -> RegistrationError {
        let (url, node_id) = (self.control_plane.to_string(), self.node_id.to_string());
        match answer {
            Answer::Conflict(why) => RegistrationError::Conflict { url, node_id, why },
            Answer::Unauthorized => {
                RegistrationError::Unauthorized { url, had_token: !self.tokens.is_empty() }
            }
            Answer::CloudDisabled => RegistrationError::CloudDisabled { url },
            Answer::Failed(why) => RegistrationError::Failed { url, node_id, why },
            Answer::ForeignName => {
                let why = explain(&answer, &self.control_plane);
                RegistrationError::Failed { url, node_id, why }
            }
            Answer::UnknownNode | Answer::Ok { .. } => {
                let why = "nothing is at this path (status 404)".to_string();
                RegistrationError::Failed { url, node_id, why }
            }
        }
    }
}
