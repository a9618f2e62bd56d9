//! The control plane's settings.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::PathBuf;

use crate::replicas::AllowList;
use crate::service::auth::{self, Scope};
use crate::service::bodies::{self, BodyLimits};
use crate::service::credentials::{self, Credentials};
use crate::service::guard::{self, GuardConfig};
use crate::service::logging::LogFormat;
use crate::service::memory::{self, Fixed, Given};
use crate::service::tls::{self, Files};
use crate::settings::{Alias, Exit, Setting, Settings, boolean, flag, listen_address, number};
use crate::wire::url::BaseUrl;

use super::aliases::Aliases;
use super::placement::Strategy;
use super::poller::POLLED_MAX;
use super::service_registry::{LEASE_POLLS, Limits};
use super::tables::Tables;

/// Memory of the program (8 MiB), and of what is small or short-lived beside its [`Tables`] (4 MiB): a thousand
/// events, guessers' addresses, names that were resolved, goodbyes, rates and labels by model.
const FIXED_BYTES: usize = 12 << 20;
/// Memory of a waiting request beside its body, in bytes: its names, its place in the queue, some of its head.
const WAITING_BYTES: usize = 2 * 1024;

/// Every setting, in the order of the help.
pub static TABLE: &[Setting] = &[
    Setting {
        flag: "addr",
        env: "ORCHESTRATORD_ADDR",
        aliases: &[
            Alias::same("ORCHESTRATORD_BIND_ADDR"),
            Alias::same("ORCHD_ADDR"),
            Alias::same("ORCHD_BIND_ADDR"),
        ],
        default: None,
        value: "IP:PORT",
        help: "Where to listen; 127.0.0.1:8080 if absent, 0.0.0.0:8080 with --cloud-profile",
    },
    Setting {
        flag: "cloud-profile",
        env: "ORCHESTRATORD_CLOUD_PROFILE",
        aliases: &[Alias { env: "ORCHD_PROFILE", convert: |profile| (profile == "cloud").to_string() }],
        default: Some("false"),
        value: "BOOL",
        help: "Serve nodes that register; otherwise watch this machine's runtime directory",
    },
    Setting {
        flag: "node-timeout-ms",
        env: "ORCHESTRATORD_NODE_TIMEOUT_MS",
        aliases: &[Alias::seconds("ORCHESTRATORD_NODE_TIMEOUT_SECS")],
        default: Some("30000"),
        value: "MS",
        help: "A node without a heartbeat for this long gets no new work; 1000 to 300000",
    },
    Setting {
        flag: "stale-check-interval-secs",
        env: "ORCHESTRATORD_STALE_CHECK_INTERVAL_SECS",
        aliases: &[],
        default: Some("10"),
        value: "SECS",
        help: "A node without new work counts as offline this much later; 1 to 60",
    },
    Setting {
        flag: "heartbeat-interval-secs",
        env: "ORCHESTRATORD_HEARTBEAT_INTERVAL_SECS",
        aliases: &[],
        default: Some("10"),
        value: "SECS",
        help: "Interval of heartbeats that nodes are told; 1 to 60",
    },
    Setting {
        flag: "placement-strategy",
        env: "ORCHESTRATORD_PLACEMENT_STRATEGY",
        aliases: &[],
        default: Some("least-loaded"),
        value: "NAME",
        help: "least-loaded, round-robin, random or most-vram",
    },
    Setting {
        flag: "prefix-affinity",
        env: "ORCHESTRATORD_PREFIX_AFFINITY",
        aliases: &[],
        default: Some("true"),
        value: "BOOL",
        help: "Send conversations that begin alike to the same replica, which has them in its cache, while it is not more loaded than others",
    },
    Setting {
        flag: "admission-capacity",
        env: "ORCHD_ADMISSION_CAPACITY",
        aliases: &[],
        default: Some("1000"),
        value: "COUNT",
        help: "Requests that may wait for a slot; 0 to 100000",
    },
    Setting {
        flag: "admission-timeout-ms",
        env: "ORCHD_ADMISSION_TIMEOUT_MS",
        aliases: &[],
        default: Some("60000"),
        value: "MS",
        help: "How long a request waits for a slot; 0 to 3600000",
    },
    Setting {
        flag: "model-alias",
        env: "ORCHESTRATORD_MODEL_ALIASES",
        aliases: &[],
        default: None,
        value: "ALIAS=MODEL,...",
        help: "Other names of models: requests for ALIAS go to engines that serve MODEL, and say so",
    },
    bodies::each_setting("ORCHESTRATORD_MAX_BODY_MIB"),
    bodies::all_setting(
        "ORCHESTRATORD_BODY_BUDGET_MIB",
        "Memory for all request bodies together, those of waiting requests included; 2 to 65536",
    ),
    memory::setting("ORCHESTRATORD_MEMORY_MAX"),
    Setting {
        flag: "first-byte-timeout-ms",
        env: "ORCHESTRATORD_FIRST_BYTE_TIMEOUT_MS",
        aliases: &[],
        default: Some("900000"),
        value: "MS",
        help: "How long an engine may take from the request to the first byte of its answer; 100 to 86400000",
    },
    Setting {
        flag: "idle-timeout-ms",
        env: "ORCHESTRATORD_IDLE_TIMEOUT_MS",
        aliases: &[],
        default: Some("300000"),
        value: "MS",
        help: "How long an answer may pause between two bytes; 100 to 86400000",
    },
    Setting {
        flag: "request-timeout-ms",
        env: "ORCHESTRATORD_REQUEST_TIMEOUT_MS",
        aliases: &[],
        default: Some("0"),
        value: "MS",
        help: "How long a request may take altogether, its wait included; 0 to 86400000, 0 for no limit",
    },
    Setting {
        flag: "runtime-dir",
        env: "ORCHD_RUNTIME_DIR",
        aliases: &[],
        default: Some(".runtime/engines"),
        value: "DIR",
        help: "Where handoff files appear (without --cloud-profile)",
    },
    Setting {
        flag: "watch-interval-ms",
        env: "ORCHD_HANDOFF_WATCH_INTERVAL_MS",
        aliases: &[],
        default: Some("1000"),
        value: "MS",
        help: "Longest that a handoff goes unseen where the kernel reports no changes; 100 to 10000",
    },
    Setting {
        flag: "pool-managerd-url",
        env: "POOL_MANAGERD_URL",
        aliases: &[Alias::same("ORCHD_POOL_MANAGERS")],
        default: None,
        value: "URLS",
        help: "Agents to poll, separated by commas, such as http://127.0.0.1:9200; without --cloud-profile the runtime directory is then not watched",
    },
    Setting {
        flag: "pool-poll-interval-ms",
        env: "ORCHD_POOL_POLL_INTERVAL_MS",
        aliases: &[Alias::same("ORCHESTRATORD_POOL_POLL_INTERVAL_MS")],
        default: Some("5000"),
        value: "MS",
        help: "How often an agent is polled whose node sends no heartbeats; 100 to 300000",
    },
    Setting {
        flag: "state-dir",
        env: "ORCHESTRATORD_STATE_DIR",
        aliases: &[],
        default: Some(".runtime/state"),
        value: "DIR",
        help: "Where the nodes and their engines are remembered over a restart (with --cloud-profile)",
    },
    Setting {
        flag: "allow-engine-hosts",
        env: "ORCHESTRATORD_ALLOW_ENGINE_HOSTS",
        aliases: &[],
        default: None,
        value: "HOSTS",
        help: "Hosts or CIDRs, separated by commas, on which handoffs and workers may place engines beside this machine",
    },
    Setting {
        flag: "hang-suspect-ms",
        env: "ORCHESTRATORD_HANG_SUSPECT_MS",
        aliases: &[],
        default: Some("60000"),
        value: "MS",
        help: "How long all answers of an engine may stand still before it is sent a trial request; 1000 to 3600000",
    },
    Setting {
        flag: "stream-keepalive-ms",
        env: "ORCHESTRATORD_STREAM_KEEPALIVE_MS",
        aliases: &[],
        default: Some("15000"),
        value: "MS",
        help: "A stream that is silent for this long gets a comment, so that proxies keep it open; 0 for never, or 100 to 3600000",
    },
    Setting {
        flag: "drain-timeout-ms",
        env: "ORCHESTRATORD_DRAIN_TIMEOUT_MS",
        aliases: &[],
        default: Some("30000"),
        value: "MS",
        help: "How long running requests may take to finish at shutdown; 0 to 3600000",
    },
    credentials::API_TOKEN,
    credentials::API_TOKEN_FILE,
    credentials::CLIENT_TOKEN,
    credentials::CLIENT_TOKEN_FILE,
    credentials::NODE_TOKEN,
    credentials::NODE_TOKEN_FILE,
    credentials::ADMIN_TOKEN,
    credentials::ADMIN_TOKEN_FILE,
    credentials::CORE_DUMPS,
    guard::hosts_setting("ORCHESTRATORD_ALLOW_HOSTS"),
    guard::origins_setting("ORCHESTRATORD_CORS_ORIGINS"),
    Setting {
        flag: "require-auth",
        env: "ORCHESTRATORD_REQUIRE_AUTH",
        aliases: &[],
        default: Some("false"),
        value: "BOOL",
        help: "Refuse to start without a token",
    },
    tls::cert_setting("ORCHESTRATORD_TLS_CERT"),
    tls::key_setting("ORCHESTRATORD_TLS_KEY"),
    tls::client_ca_setting(
        "ORCHESTRATORD_TLS_CLIENT_CA",
        "Roots, in PEM, of the certificates of nodes: with it a node may only register, send heartbeats and say goodbye under the name in its certificate",
    ),
    tls::CA_SETTING,
    tls::CLIENT_CERT_SETTING,
    tls::CLIENT_KEY_SETTING,
    Setting {
        flag: "log-level",
        env: "ORCHESTRATORD_LOG_LEVEL",
        aliases: &[],
        default: Some("info"),
        value: "LEVEL",
        help: "error, warn, info, debug or trace; RUST_LOG beats it",
    },
    Setting {
        flag: "log-format",
        env: "ORCHESTRATORD_LOG_FORMAT",
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
    /// Nodes register; otherwise this machine's runtime directory is watched.
    pub cloud: bool,
    /// Times of the registry.
    pub registry: Limits,
    /// How replicas are chosen.
    pub strategy: Strategy,
    /// Whether conversations that begin alike go to the same replica.
    pub prefix_affinity: bool,
    /// Requests that may wait.
    pub admission_capacity: usize,
    /// How long one waits.
    pub admission_timeout_ms: u64,
    /// Other names of models.
    pub aliases: Aliases,
    /// Of request bodies.
    pub bodies: BodyLimits,
    /// All that the process may take.
    pub memory: Option<Given>,
    /// How large tables may grow.
    pub tables: Tables,
    /// From a request to the first byte of its answer.
    pub first_byte_timeout_ms: u64,
    /// Between two bytes of an answer.
    pub idle_timeout_ms: u64,
    /// From a request to the last byte of its answer; 0 for no limit.
    pub request_timeout_ms: u64,
    /// Where handoffs appear in the HOME profile.
    pub runtime_dir: PathBuf,
    /// Listing interval without events.
    pub watch_interval_ms: u64,
    /// Agents that are polled.
    pub pool_managers: Vec<BaseUrl>,
    /// Where the registry is kept in the CLOUD profile.
    pub state_dir: PathBuf,
    /// Hosts of engines beside this machine's own.
    pub allow_engine_hosts: AllowList,
    /// How long all answers of an engine may stand still before it is suspected.
    pub hang_suspect_ms: u64,
    /// Silence after which a stream gets a comment; 0 for never.
    pub stream_keepalive_ms: u64,
    /// Limit of a graceful shutdown.
    pub drain_timeout_ms: u64,
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

impl Config {
    /// Reads flags and environment.
    ///
    /// # Errors
    /// [`Exit`], see [`crate::settings`].
    pub fn read(
        args: impl IntoIterator<Item = OsString>,
        env: impl Fn(&str) -> Option<OsString>,
    ) -> Result<Config, Exit> {
        let about = "Places requests on the engines of many machines and streams their answers";
        let systemd = env("CREDENTIALS_DIRECTORY");
        let settings = Settings::read("orchestratord", about, TABLE, None, args, env)?;
        let cloud = settings.need("cloud-profile", boolean)?;
        let default_ip = if cloud { [0, 0, 0, 0] } else { [127, 0, 0, 1] };
        let addr = settings.get("addr", listen_address)?.unwrap_or(SocketAddr::from((default_ip, 8080)));
        let mut notes = settings.notes.clone();
        let credentials = Credentials::read(&settings, systemd, &Scope::ALL, &mut notes)?;
        let required = settings.need("require-auth", boolean)?;
        auth::check_exposure(addr, credentials.keys(), required, "ORCHESTRATORD", &mut notes)?;
        let seconds = |flag| settings.need(flag, number(1, 60)).map(|seconds| seconds * 1000);
        let memory = memory::given(&settings)?;
        let tables = Tables::within(memory.map(|given| given.bytes));
        let registry = Limits {
            bytes_max: tables.registry_bytes_max,
            node_timeout_ms: settings.need("node-timeout-ms", number(1_000, 300_000))?,
            offline_grace_ms: seconds("stale-check-interval-secs")?,
            heartbeat_interval_ms: seconds("heartbeat-interval-secs")?,
            poll_interval_ms: settings.need("pool-poll-interval-ms", number(100, 300_000))?,
            ..Limits::default()
        };
        if registry.heartbeat_interval_ms >= registry.node_timeout_ms {
            notes.push(format!(
                "ORCHESTRATORD_NODE_TIMEOUT_MS={} is not longer than the heartbeat interval of {} ms: every node will be suspect between two heartbeats",
                registry.node_timeout_ms, registry.heartbeat_interval_ms
            ));
        }
        let pool_managers = settings.get("pool-managerd-url", agents)?.unwrap_or_default();
        note_polls(&pool_managers, cloud, &registry, &mut notes);
        let capacity = settings.need("admission-capacity", number(0, 100_000))?;
        let bodies = BodyLimits::read(&settings, "ORCHESTRATORD_MAX_BODY_MIB")?;
        Ok(Config {
            addr,
            cloud,
            registry,
            strategy: settings.need("placement-strategy", str::parse)?,
            prefix_affinity: settings.need("prefix-affinity", boolean)?,
            admission_capacity: usize::try_from(capacity).unwrap_or(usize::MAX),
            admission_timeout_ms: settings.need("admission-timeout-ms", number(0, 3_600_000))?,
            aliases: settings.get("model-alias", Aliases::parse)?.unwrap_or_default(),
            bodies,
            memory,
            tables,
            first_byte_timeout_ms: settings.need("first-byte-timeout-ms", number(100, 86_400_000))?,
            idle_timeout_ms: settings.need("idle-timeout-ms", number(100, 86_400_000))?,
            request_timeout_ms: settings.need("request-timeout-ms", number(0, 86_400_000))?,
            runtime_dir: settings.need("runtime-dir", |text| Ok(PathBuf::from(text)))?,
            watch_interval_ms: settings.need("watch-interval-ms", number(100, 10_000))?,
            pool_managers,
            state_dir: settings.need("state-dir", |text| Ok(PathBuf::from(text)))?,
            allow_engine_hosts: settings.get("allow-engine-hosts", AllowList::parse)?.unwrap_or_default(),
            hang_suspect_ms: settings.need("hang-suspect-ms", number(1_000, 3_600_000))?,
            stream_keepalive_ms: settings.need("stream-keepalive-ms", zero_or_number(100, 3_600_000))?,
            drain_timeout_ms: settings.need("drain-timeout-ms", number(0, 3_600_000))?,
            guard: GuardConfig::read(&settings, credentials)?,
            check_only: settings.need("check-config", boolean)?,
            tls: Files::from_settings(
                &settings,
                ["ORCHESTRATORD_TLS_CERT", "ORCHESTRATORD_TLS_KEY", "ORCHESTRATORD_TLS_CLIENT_CA"],
            )?,
            log_level: settings.need("log-level", |text| Ok(text.to_string()))?,
            log_format: settings.need("log-format", str::parse)?,
            notes,
        })
    }
}

impl Config {
    /// Whether this machine's runtime directory is watched: in the HOME profile, unless agents are polled
    /// that do so.
    #[must_use]
    pub fn watches(&self) -> bool {
        !self.cloud && self.pool_managers.is_empty()
    }

    /// What it takes of memory beside connections, bodies and exchanges.
    #[must_use]
    pub fn fixed(&self) -> Fixed {
        let waiting = self.admission_capacity * WAITING_BYTES;
        Fixed { bytes: FIXED_BYTES + self.tables.bytes() + waiting, tls: self.tls.serves() }
    }
}

/// 0, which turns something off, or a number within limits.
fn zero_or_number(least: u64, most: u64) -> impl Fn(&str) -> Result<u64, String> {
    move |text| match number(0, most)(text) {
        Ok(value) if value == 0 || value >= least => Ok(value),
        _ => Err(format!("allowed is 0 or a number from {least} to {most}")),
    }
}

/// Each URL once.
fn agents(text: &str) -> Result<Vec<BaseUrl>, String> {
    let mut urls: Vec<BaseUrl> = Vec::new();
    for text in text.split(',').map(str::trim).filter(|text| !text.is_empty()) {
        let url = BaseUrl::lenient(text).map_err(|error| error.to_string())?;
        if !urls.contains(&url) {
            urls.push(url);
        }
    }
    if urls.len() > POLLED_MAX {
        return Err(format!("it names {} agents; allowed are {POLLED_MAX}", urls.len()));
    }
    Ok(urls)
}

/// Says what polling changes.
fn note_polls(agents: &[BaseUrl], cloud: bool, limits: &Limits, notes: &mut Vec<String>) {
    if agents.is_empty() {
        return;
    }
    if !cloud {
        notes.push(format!(
            "POOL_MANAGERD_URL names {} agents: they are polled, and this machine's runtime directory is not watched by orchestratord",
            agents.len()
        ));
    }
    let lease_ms = limits.poll_interval_ms * LEASE_POLLS;
    if lease_ms > limits.node_timeout_ms {
        notes.push(format!(
            "ORCHD_POOL_POLL_INTERVAL_MS={}: a polled node gets no new work after {lease_ms} ms without an answer, rather than ORCHESTRATORD_NODE_TIMEOUT_MS={}",
            limits.poll_interval_ms, limits.node_timeout_ms
        ));
    }
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
    fn the_profile_decides_the_default_address() {
        assert_eq!(read(&[]).expect("HOME").addr.to_string(), "127.0.0.1:8080");
        let cloud = read(&[("ORCHD_PROFILE", "cloud")]).expect("CLOUD by its older name");
        assert_eq!((cloud.addr.to_string().as_str(), cloud.cloud), ("0.0.0.0:8080", true));
        assert!(cloud.notes.iter().any(|note| note.contains("use ORCHESTRATORD_CLOUD_PROFILE")));
    }

    #[test]
    fn agents_to_poll_replace_the_directory_and_lengthen_leases() {
        let home = read(&[("POOL_MANAGERD_URL", "")]).expect("HOME");
        assert!(home.watches() && home.pool_managers.is_empty() && home.notes.is_empty(), "{:?}", home.notes);
        let urls = "10.0.0.1:9200, http://b:9200/,http://10.0.0.1:9200,";
        let home = read(&[("POOL_MANAGERD_URL", urls)]).expect("agents");
        let named: Vec<String> = home.pool_managers.iter().map(ToString::to_string).collect();
        assert_eq!((named.join(" ").as_str(), home.watches()), ("http://10.0.0.1:9200 http://b:9200", false));
        assert!(home.notes.iter().any(|note| note.contains("is not watched")), "{:?}", home.notes);
        let slow = [
            ("ORCHESTRATORD_CLOUD_PROFILE", "true"),
            ("ORCHD_POOL_MANAGERS", urls),
            ("ORCHESTRATORD_POOL_POLL_INTERVAL_MS", "20000"),
        ];
        let cloud = read(&slow).expect("a list in the CLOUD profile");
        assert_eq!((cloud.pool_managers.len(), cloud.registry.poll_interval_ms), (2, 20_000));
        for part in ["use POOL_MANAGERD_URL", "use ORCHD_POOL_POLL_INTERVAL_MS", "after 60000 ms without"] {
            assert!(cloud.notes.iter().any(|note| note.contains(part)), "{part}: {:?}", cloud.notes);
        }
    }

    #[test]
    fn aliases_come_in_one_list_or_in_many_flags() {
        let listed = read(&[("ORCHESTRATORD_MODEL_ALIASES", "a=m,b=a")]).expect("aliases").aliases;
        let flags = ["--model-alias", "a=m", "--model-alias=b=a"].map(OsString::from);
        let flagged = Config::read(flags, |_| None).expect("aliases").aliases;
        assert_eq!((listed.resolve("b"), &listed), (Some("m"), &flagged));
        let large = [("ORCHESTRATORD_BODY_BUDGET_MIB", "86")];
        assert_eq!(read(&large).expect("it fits").bodies.all_bytes, 86 << 20);
    }

    #[test]
    fn bad_values_name_themselves() {
        for (name, value, part) in [
            ("ORCHESTRATORD_ADDR", "localhost", "allowed is an address"),
            ("ORCHESTRATORD_NODE_TIMEOUT_MS", "x", "from 1000 to 300000"),
            ("ORCHESTRATORD_STREAM_KEEPALIVE_MS", "99", "0 or a number from 100 to 3600000"),
            ("ORCHESTRATORD_PLACEMENT_STRATEGY", "best", "least-loaded"),
            ("ORCHD_ADMISSION_CAPACITY", "-1", "from 0 to 100000"),
            ("ORCHESTRATORD_MODEL_ALIASES", "a=b,b=a", "circle"),
            ("ORCHESTRATORD_MAX_BODY_MIB", "0", "from 1 to 1024"),
            ("ORCHESTRATORD_BODY_BUDGET_MIB", "85", "allowed is 86 and more"),
            ("POOL_MANAGERD_URL", "http://a:9200,ftp://b", "neither http nor https"),
            ("ORCHD_POOL_MANAGERS", "http://a:9200,http://b:x", "its port is not a number"),
            ("ORCHD_POOL_POLL_INTERVAL_MS", "99", "from 100 to 300000"),
            ("ORCHESTRATORD_ALLOW_ENGINE_HOSTS", "10.0.0.0/99", "10.0.0.0/99"),
        ] {
            let exit = read(&[(name, value)]).expect_err(value);
            assert!(exit.code == 78 && exit.message.contains(part) && exit.message.contains(name), "{exit}");
        }
    }
}
