//! The node agent's settings.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::PathBuf;

use crate::replicas::AllowList;
use crate::replicas::directory::{FILE_BYTES, FILES_MAX};
use crate::service::auth::{self, Scope};
use crate::service::bodies::{self, BodyLimits};
use crate::service::credentials::{self, Credentials};
use crate::service::guard::{self, GuardConfig};
use crate::service::logging::LogFormat;
use crate::service::machine;
use crate::service::memory::{self, Fixed, Given};
use crate::service::tls::{self, Files};
use crate::settings::{Alias, Exit, Setting, Settings, boolean, flag, listen_address, number};
use crate::wire::id::{NodeId, PoolId};
use crate::wire::url::BaseUrl;

/// Memory of the program (8 MiB), and of what is small beside the files and their replicas (8 MiB): a thousand events,
/// callbacks that wait, guessers' addresses, names that were resolved, and what it knows of the GPUs.
const FIXED_BYTES: usize = 16 << 20;
/// What files may take of memory that is given: one part in so many.
const FILES_SHARE: usize = 4;

/// Every setting, in the order of the help.
pub static TABLE: &[Setting] = &[
    Setting {
        flag: "addr",
        env: "POOL_MANAGERD_ADDR",
        aliases: &[Alias::same("POOL_MANAGERD_BIND_ADDR")],
        default: Some("127.0.0.1:9200"),
        value: "IP:PORT",
        help: "Where to listen",
    },
    Setting {
        flag: "cloud-profile",
        env: "POOL_MANAGERD_CLOUD_PROFILE",
        aliases: &[],
        default: Some("false"),
        value: "BOOL",
        help: "Register with control planes and send them heartbeats",
    },
    Setting {
        flag: "node-id",
        env: "POOL_MANAGERD_NODE_ID",
        aliases: &[],
        default: None,
        value: "ID",
        help: "Name of this node; the host name if absent",
    },
    Setting {
        flag: "machine-id",
        env: "POOL_MANAGERD_MACHINE_ID",
        aliases: &[],
        default: None,
        value: "ID",
        help: "Name of this machine; the node's if absent",
    },
    Setting {
        flag: "address",
        env: "POOL_MANAGERD_ADDRESS",
        aliases: &[],
        default: None,
        value: "URL",
        help: "Where control planes reach this agent; required with --cloud-profile unless --addr is a concrete address",
    },
    Setting {
        flag: "orchestratord-url",
        env: "ORCHESTRATORD_URL",
        aliases: &[],
        default: None,
        value: "URLS",
        help: "Control planes, separated by commas; the node registers with every one; required with --cloud-profile",
    },
    Setting {
        flag: "register-on-startup",
        env: "ORCHESTRATORD_REGISTER_ON_STARTUP",
        aliases: &[],
        default: Some("true"),
        value: "BOOL",
        help: "With --cloud-profile: register at once; false only watches and relays",
    },
    Setting {
        flag: "pools",
        env: "POOL_MANAGERD_POOLS",
        aliases: &[],
        default: Some("pool-0"),
        value: "IDS",
        help: "Pools of this node, separated by commas; handoffs may add others",
    },
    Setting {
        flag: "heartbeat-interval-secs",
        env: "POOL_MANAGERD_HEARTBEAT_INTERVAL_SECS",
        aliases: &[Alias::same("ORCHESTRATORD_HEARTBEAT_INTERVAL_SECS")],
        default: Some("10"),
        value: "SECS",
        help: "Between heartbeats, where the control plane does not say; 1 to 60",
    },
    Setting {
        flag: "runtime-dir",
        env: "POOL_MANAGERD_RUNTIME_DIR",
        aliases: &[],
        default: Some(".runtime/engines"),
        value: "DIR",
        help: "Where handoff files appear",
    },
    Setting {
        flag: "watch-interval-ms",
        env: "POOL_MANAGERD_WATCH_INTERVAL_MS",
        aliases: &[],
        default: Some("1000"),
        value: "MS",
        help: "Longest that a handoff goes unseen where the kernel reports no changes; 100 to 10000",
    },
    Setting {
        flag: "auto-delete-handoff",
        env: "POOL_MANAGERD_AUTO_DELETE_HANDOFF",
        aliases: &[],
        default: Some("false"),
        value: "BOOL",
        help: "Delete a handoff file once it is accepted and what it says is saved in the state directory",
    },
    Setting {
        flag: "state-dir",
        env: "POOL_MANAGERD_STATE_DIR",
        aliases: &[],
        default: Some(".runtime/state"),
        value: "DIR",
        help: "Where the agent keeps its incarnation and the handoffs that it accepted",
    },
    Setting {
        flag: "allow-engine-hosts",
        env: "POOL_MANAGERD_ALLOW_ENGINE_HOSTS",
        aliases: &[],
        default: None,
        value: "HOSTS",
        help: "Hosts or CIDRs, separated by commas, on which engines may be beside this machine",
    },
    Setting {
        flag: "gpu-discovery-interval-ms",
        env: "POOL_MANAGERD_GPU_DISCOVERY_INTERVAL_MS",
        aliases: &[],
        default: Some("10000"),
        value: "MS",
        help: "Between readings of the GPUs; 1000 to 60000",
    },
    Setting {
        flag: "kmsg",
        env: "POOL_MANAGERD_KMSG",
        aliases: &[],
        default: Some("/dev/kmsg"),
        value: "FILE",
        help: "The kernel's log, where GPU faults appear; off: it is not read",
    },
    Setting {
        flag: "hang-suspect-ms",
        env: "POOL_MANAGERD_HANG_SUSPECT_MS",
        aliases: &[],
        default: Some("60000"),
        value: "MS",
        help: "How long all answers of an engine may stand still before it is sent a trial request; 1000 to 3600000",
    },
    Setting {
        flag: "drain-timeout-ms",
        env: "POOL_MANAGERD_DRAIN_TIMEOUT_MS",
        aliases: &[],
        default: Some("30000"),
        value: "MS",
        help: "How long running requests may take to finish at shutdown; 0 to 3600000",
    },
    bodies::each_setting("POOL_MANAGERD_MAX_BODY_MIB"),
    bodies::all_setting(
        "POOL_MANAGERD_BODY_BUDGET_MIB",
        "Memory for the bodies of all relayed requests together; 2 to 65536",
    ),
    memory::setting("POOL_MANAGERD_MEMORY_MAX"),
    Setting {
        flag: "callback-enabled",
        env: "POOL_MANAGERD_CALLBACK_ENABLED",
        aliases: &[],
        default: Some("true"),
        value: "BOOL",
        help: "Tell registered callbacks when a replica becomes ready or stops being ready",
    },
    Setting {
        flag: "orchestratord-callback-url",
        env: "POOL_MANAGERD_ORCHESTRATORD_CALLBACK_URL",
        aliases: &[Alias::same("ORCHESTRATORD_CALLBACK_URL")],
        default: None,
        value: "URL",
        help: "A callback that is registered at start, for every pool",
    },
    credentials::API_TOKEN,
    credentials::API_TOKEN_FILE,
    credentials::NODE_TOKEN,
    credentials::NODE_TOKEN_FILE,
    credentials::ADMIN_TOKEN,
    credentials::ADMIN_TOKEN_FILE,
    credentials::CORE_DUMPS,
    guard::hosts_setting("POOL_MANAGERD_ALLOW_HOSTS"),
    Setting {
        flag: "require-auth",
        env: "POOL_MANAGERD_REQUIRE_AUTH",
        aliases: &[],
        default: Some("false"),
        value: "BOOL",
        help: "Refuse to start without a token",
    },
    tls::cert_setting("POOL_MANAGERD_TLS_CERT"),
    tls::key_setting("POOL_MANAGERD_TLS_KEY"),
    tls::client_ca_setting(
        "POOL_MANAGERD_TLS_CLIENT_CA",
        "Roots, in PEM, of the certificates of those who may call this agent: with it everything but /health, /ready and /metrics needs one",
    ),
    tls::CA_SETTING,
    tls::CLIENT_CERT_SETTING,
    tls::CLIENT_KEY_SETTING,
    Setting {
        flag: "log-level",
        env: "POOL_MANAGERD_LOG_LEVEL",
        aliases: &[],
        default: Some("info"),
        value: "LEVEL",
        help: "error, warn, info, debug or trace; RUST_LOG beats it",
    },
    Setting {
        flag: "log-format",
        env: "POOL_MANAGERD_LOG_FORMAT",
        aliases: &[],
        default: Some("text"),
        value: "FORMAT",
        help: "text, or json for one object a line; the journal gets a priority either way",
    },
    flag("check-config", Some("false"), "BOOL", "Only say whether it would start with this configuration"),
];

/// The settings, checked.
#[derive(Debug)]
pub struct Config {
    /// Where to listen.
    pub addr: SocketAddr,
    /// This node.
    pub node_id: NodeId,
    /// Membership; `None` in the HOME profile.
    pub cloud: Option<Cloud>,
    /// Pools that are announced in any case.
    pub pools: Vec<PoolId>,
    /// Where handoffs appear.
    pub runtime_dir: PathBuf,
    /// Listing interval without events.
    pub watch_interval_ms: u64,
    /// Delete handoff files once they are accepted and saved.
    pub auto_delete: bool,
    /// Where the incarnation and the accepted handoffs are kept.
    pub state_dir: PathBuf,
    /// Hosts of engines beside this machine's own.
    pub allow_engine_hosts: AllowList,
    /// Between readings of the GPUs.
    pub gpu_discovery_interval_ms: u64,
    /// The kernel's log; `None`: it is not read.
    pub kmsg: Option<PathBuf>,
    /// How long all answers of an engine may stand still before it is suspected.
    pub hang_suspect_ms: u64,
    /// Limit of a graceful shutdown.
    pub drain_timeout_ms: u64,
    /// Of request bodies.
    pub bodies: BodyLimits,
    /// All that the process may take.
    pub memory: Option<Given>,
    /// Whether callbacks are told.
    pub callback_enabled: bool,
    /// A callback from the start.
    pub callback_url: Option<BaseUrl>,
    /// Who may call.
    pub guard: GuardConfig,
    /// Only the configuration is to be looked at.
    pub check_only: bool,
    /// Certificates and keys.
    pub tls: Files,
    /// For the logger.
    pub log_level: String,
    /// For the logger.
    pub log_format: LogFormat,
    /// Sentences for the log.
    pub notes: Vec<String>,
}

/// Settings of the CLOUD profile.
#[derive(Debug)]
pub struct Cloud {
    /// Where control planes reach this agent.
    pub address: BaseUrl,
    /// This machine.
    pub machine_id: String,
    /// Every control plane.
    pub control_planes: Vec<BaseUrl>,
    /// Between heartbeats.
    pub heartbeat_interval_ms: u64,
}

impl Config {
    /// Reads flags and environment.
    ///
    /// # Errors
    /// [`Exit`], see [`crate::settings`].
    pub fn read(
        args: impl IntoIterator<Item = OsString>,
        env: impl Fn(&str) -> Option<OsString>,
    ) -> Result<Config, Exit> {
        let about = "Watches the engines of one machine and reports them to control planes";
        let systemd = env("CREDENTIALS_DIRECTORY");
        let settings = Settings::read("pool-managerd", about, TABLE, None, args, env)?;
        let addr = settings.need("addr", listen_address)?;
        let node_id = settings
            .get("node-id", |text| NodeId::new(text).map_err(|error| error.to_string()))?
            .map_or_else(default_node_id, Ok)?;
        let cloud = if settings.need("cloud-profile", boolean)? {
            Some(cloud(&settings, addr, &node_id)?)
        } else {
            None
        };
        let register = settings.need("register-on-startup", boolean)?;
        let mut notes = settings.notes.clone();
        let served = [Scope::Node, Scope::Admin];
        let credentials = Credentials::read(&settings, systemd, &served, &mut notes)?;
        auth::check_exposure(
            addr,
            credentials.keys(),
            settings.need("require-auth", boolean)?,
            "POOL_MANAGERD",
            &mut notes,
        )?;
        let is_plain = cloud.as_ref().is_some_and(|cloud| !cloud.address.https());
        if is_plain && settings.given("tls-cert") {
            notes.push(
                "POOL_MANAGERD_ADDRESS begins with http, but this agent speaks TLS: control planes will not reach it; use https"
                    .into(),
            );
        }
        Ok(Config {
            addr,
            node_id,
            cloud: cloud.filter(|_| register),
            pools: settings.need("pools", pools)?,
            runtime_dir: settings.need("runtime-dir", |text| Ok(PathBuf::from(text)))?,
            watch_interval_ms: settings.need("watch-interval-ms", number(100, 10_000))?,
            auto_delete: settings.need("auto-delete-handoff", boolean)?,
            state_dir: settings.need("state-dir", |text| Ok(PathBuf::from(text)))?,
            allow_engine_hosts: settings.get("allow-engine-hosts", AllowList::parse)?.unwrap_or_default(),
            gpu_discovery_interval_ms: settings.need("gpu-discovery-interval-ms", number(1_000, 60_000))?,
            kmsg: settings.need("kmsg", |text| Ok((!matches!(text, "" | "off")).then(|| text.into())))?,
            hang_suspect_ms: settings.need("hang-suspect-ms", number(1_000, 3_600_000))?,
            drain_timeout_ms: settings.need("drain-timeout-ms", number(0, 3_600_000))?,
            bodies: BodyLimits::read(&settings, "POOL_MANAGERD_MAX_BODY_MIB")?,
            memory: memory::given(&settings)?,
            callback_enabled: settings.need("callback-enabled", boolean)?,
            callback_url: settings.get("orchestratord-callback-url", lenient_url)?,
            guard: GuardConfig::read(&settings, credentials)?,
            check_only: settings.need("check-config", boolean)?,
            tls: Files::from_settings(
                &settings,
                ["POOL_MANAGERD_TLS_CERT", "POOL_MANAGERD_TLS_KEY", "POOL_MANAGERD_TLS_CLIENT_CA"],
            )?,
            log_level: settings.need("log-level", |text| Ok(text.to_string()))?,
            log_format: settings.need("log-format", str::parse)?,
            notes,
        })
    }
}

impl Config {
    /// What it takes of memory beside connections, bodies and exchanges.
    #[must_use]
    pub fn fixed(&self) -> Fixed {
        Fixed { bytes: FIXED_BYTES + self.files_max() * FILE_BYTES, tls: self.tls.serves() }
    }

    /// Files of the runtime directory that are looked at.
    #[must_use]
    pub fn files_max(&self) -> usize {
        self.memory.map_or(FILES_MAX, |given| FILES_MAX.min(given.bytes / FILES_SHARE / FILE_BYTES))
    }
}

fn default_node_id() -> Result<NodeId, Exit> {
    let name = machine::host_name();
    NodeId::new(&name).map_err(|error| {
        Exit::config(format!(
            "the host name cannot serve as the node's name: {error}; set POOL_MANAGERD_NODE_ID"
        ))
    })
}

fn cloud(settings: &Settings, addr: SocketAddr, node_id: &NodeId) -> Result<Cloud, Exit> {
    let address = match settings.get("address", lenient_url)? {
        Some(address) => address,
        None if !addr.ip().is_unspecified() => {
            let scheme = if settings.given("tls-cert") { "https" } else { "http" };
            lenient_url(&format!("{scheme}://{addr}")).map_err(Exit::config)?
        }
        None => {
            return Err(Exit::config(
                "POOL_MANAGERD_ADDRESS is missing: with POOL_MANAGERD_CLOUD_PROFILE=true it must say where control planes reach this node, such as http://192.168.1.100:9200",
            ));
        }
    };
    let control_planes = settings
        .get("orchestratord-url", |text| text.split(',').map(|url| lenient_url(url.trim())).collect())?
        .ok_or_else(|| {
            Exit::config(
                "ORCHESTRATORD_URL is missing: with POOL_MANAGERD_CLOUD_PROFILE=true it must name the control planes, such as http://192.168.1.1:8080",
            )
        })?;
    let machine_id = settings.get("machine-id", |text| Ok(text.to_string()))?;
    Ok(Cloud {
        address,
        machine_id: machine_id.unwrap_or_else(|| node_id.to_string()),
        control_planes,
        heartbeat_interval_ms: settings.need("heartbeat-interval-secs", number(1, 60))? * 1000,
    })
}

fn lenient_url(text: &str) -> Result<BaseUrl, String> {
    BaseUrl::lenient(text).map_err(|error| error.to_string())
}

fn pools(text: &str) -> Result<Vec<PoolId>, String> {
    let ids = text.split(',').map(str::trim).filter(|id| !id.is_empty());
    ids.map(|id| PoolId::new(id).map_err(|error| error.to_string())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    fn read(env: &[(&str, &str)]) -> Result<Config, Exit> {
        let env: BTreeMap<String, OsString> = env.iter().map(|(k, v)| (k.to_string(), v.into())).collect();
        Config::read([], |name| env.get(name).cloned())
    }

    #[test]
    fn home_needs_nothing() {
        let config = read(&[]).expect("defaults are enough");
        assert_eq!(config.addr.to_string(), "127.0.0.1:9200");
        assert!(config.cloud.is_none() && config.guard.credentials.keys().is_empty());
        assert_eq!((config.pools[0].as_str(), config.watch_interval_ms), ("pool-0", 1000));
    }

    #[test]
    fn cloud_needs_to_know_where_everybody_is() {
        let cloud = ("POOL_MANAGERD_CLOUD_PROFILE", "true");
        let wildcard = ("POOL_MANAGERD_ADDR", "0.0.0.0:9200");
        let missing = read(&[cloud, wildcard, ("ORCHESTRATORD_URL", "http://c:1")]).expect_err("no address");
        assert!(missing.message.starts_with("POOL_MANAGERD_ADDRESS is missing"), "{missing}");
        let missing = read(&[cloud, ("POOL_MANAGERD_ADDRESS", "http://n:1")]).expect_err("no control plane");
        assert!(
            missing.message.starts_with("ORCHESTRATORD_URL is missing") && missing.code == 78,
            "{missing}"
        );
        let config = read(&[cloud, ("ORCHESTRATORD_URL", "http://a:1, b:2"), ("POOL_MANAGERD_NODE_ID", "n")])
            .expect("a concrete bind address serves as the address");
        let cloud = config.cloud.expect("the CLOUD profile");
        assert_eq!(
            (cloud.control_planes.len(), cloud.address.port(), cloud.machine_id.as_str()),
            (2, 9200, "n")
        );
    }

    #[test]
    fn bad_values_name_themselves() {
        for (name, value, part) in [
            ("POOL_MANAGERD_ADDR", "nowhere", "allowed is an address"),
            ("POOL_MANAGERD_WATCH_INTERVAL_MS", "5", "from 100 to 10000"),
            ("POOL_MANAGERD_HEARTBEAT_INTERVAL_SECS", "0", "from 1 to 60"),
            ("POOL_MANAGERD_GPU_DISCOVERY_INTERVAL_MS", "999", "from 1000 to 60000"),
            ("POOL_MANAGERD_CLOUD_PROFILE", "maybe", "true and false"),
            ("POOL_MANAGERD_NODE_ID", "a b", "is not an id"),
            ("POOL_MANAGERD_POOLS", "a,b/c", "is not an id"),
            ("POOL_MANAGERD_AUTO_DELETE_HANDOFF", "perhaps", "true and false"),
            ("POOL_MANAGERD_MAX_BODY_MIB", "1025", "from 1 to 1024"),
            (
                "POOL_MANAGERD_BODY_BUDGET_MIB",
                "85",
                "POOL_MANAGERD_MAX_BODY_MIB=64 must fit in; allowed is 86",
            ),
        ] {
            let cloud = [("POOL_MANAGERD_CLOUD_PROFILE", "true"), ("ORCHESTRATORD_URL", "http://c:1")];
            let exit = read(&[&cloud[..], &[(name, value)]].concat()).expect_err(value);
            assert!(exit.code == 78 && exit.message.contains(part), "{exit}");
            assert!(exit.message.contains(name) && exit.message.contains(value), "{exit}");
        }
    }

    #[test]
    fn files_of_tls_come_in_pairs() {
        let cert = ("POOL_MANAGERD_TLS_CERT", "/etc/cert.pem");
        let key = ("POOL_MANAGERD_TLS_KEY", "/etc/key.pem");
        for (env, text) in [
            (&[cert][..], "POOL_MANAGERD_TLS_CERT is set, but POOL_MANAGERD_TLS_KEY is not"),
            (&[key], "POOL_MANAGERD_TLS_KEY is set, but POOL_MANAGERD_TLS_CERT is not"),
            (
                &[("POOL_MANAGERD_TLS_CLIENT_CA", "/etc/ca.pem")],
                "POOL_MANAGERD_TLS_CLIENT_CA is set, but POOL_MANAGERD_TLS_CERT is not",
            ),
            (
                &[("LLORCH_TLS_CLIENT_KEY", "/etc/key.pem")],
                "LLORCH_TLS_CLIENT_KEY is set, but LLORCH_TLS_CLIENT_CERT is not",
            ),
        ] {
            let exit = read(env).expect_err(text);
            assert_eq!((exit.code, exit.message.as_str()), (78, text));
        }
        let cloud = [("POOL_MANAGERD_CLOUD_PROFILE", "true"), ("ORCHESTRATORD_URL", "https://c")];
        let config = read(&[&cloud[..], &[cert, key]].concat()).expect("usable");
        let address = config.cloud.expect("the CLOUD profile").address;
        assert!(config.tls.serves() && address.https(), "{address}");
        let plain = ("POOL_MANAGERD_ADDRESS", "http://node:9200");
        let config = read(&[&cloud[..], &[cert, key, plain]].concat()).expect("usable");
        assert!(config.notes.iter().any(|note| note.contains("this agent speaks TLS")), "{:?}", config.notes);
    }

    #[test]
    fn a_required_token_must_be_there_and_a_wildcard_without_one_is_a_warning() {
        assert_eq!(read(&[("POOL_MANAGERD_REQUIRE_AUTH", "true")]).expect_err("no token").code, 78);
        let open = read(&[("POOL_MANAGERD_ADDR", "0.0.0.0:9200")]).expect("allowed");
        assert!(open.notes.iter().any(|note| note.starts_with("NO TOKEN IS SET")), "{:?}", open.notes);
    }
}
