//! From configuration to what will be started and written. PURE.
//!
//! Two steps, because the port may come from the kernel in between: [`Config`] is what the operator
//! asked for, checked; [`Plan`] is the same with the port filled in: the exact command line, the
//! variables added to its environment, and the handoff as far as it is known before there is a
//! process. A request that cannot work is refused here, before anything is started.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use crate::settings::{Exit, Setting, Settings, boolean, flag, number};
use crate::wire::handoff::{Handoff, SLOTS_MAX, TEXT_BYTES_MAX};
use crate::wire::id::{PoolId, ReplicaId};
use crate::wire::url::BaseUrl;

/// Where engines listen: the safe default, which only this machine reaches.
pub const HOST: &str = "127.0.0.1";
/// Longest health timeout, in milliseconds: a day is more than the largest model needs to load.
pub const HEALTH_TIMEOUT_MS_MAX: u64 = 24 * 3600 * 1000;

/// The settings of `engine-provisioner`.
pub static TABLE: &[Setting] = &[
    flag("pool", Some("default"), "ID", "Pool that the engine joins"),
    flag("replica", Some("r0"), "ID", "Name of the engine within its pool"),
    Setting {
        flag: "handoff-dir",
        env: "ENGINE_PROVISIONER_HANDOFF_DIR",
        aliases: &[],
        default: Some(".runtime/engines"),
        value: "DIR",
        help: "Directory of handoff files, the one that pool-managerd watches; created if missing",
    },
    flag("slots", Some("1"), "N", "Requests that the engine serves at once, 1 to 65536"),
    flag("engine", Some("llamacpp"), "NAME", "Kind of engine: llamacpp, vllm, sglang, tgi"),
    flag("engine-version", None, "TEXT", "Version of the engine, for display"),
    flag("model", None, "NAME", "Model name; without it the engine is asked for its models"),
    flag("port", Some("0"), "PORT", "Port that the engine listens on; 0 takes a free one"),
    flag("health-path", Some("/health"), "PATH", "Path that answers 200 once the engine can serve"),
    flag(
        "health-timeout-ms",
        Some("120000"),
        "MS",
        "How long the engine may take to become healthy, 1 to 86400000 milliseconds",
    ),
    Setting {
        flag: "device-mask",
        env: "ENGINE_PROVISIONER_GPU_MASK",
        aliases: &[],
        default: None,
        value: "MASK",
        help: "GPUs for the engine, such as 0 or 0,1: becomes its CUDA_VISIBLE_DEVICES",
    },
    flag("auth-file", None, "FILE", "File with the engine's own API key; its absolute path is handed over"),
    flag(
        "log-file",
        None,
        "FILE",
        "What the engine prints; without it POOL-REPLICA.log in `logs` beside the handoff directory",
    ),
    flag("report", Some("false"), "BOOL", "Print what happens as JSON lines on standard output"),
];

/// What the operator asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Directory of the handoff file.
    pub handoff_dir: PathBuf,
    /// Pool of the replica.
    pub pool_id: PoolId,
    /// The replica that is started.
    pub replica_id: ReplicaId,
    /// Requests that it serves at once.
    pub slots: u32,
    /// Kind of engine.
    pub engine: String,
    /// Its version, for display.
    pub engine_version: Option<String>,
    /// Model name as clients use it.
    pub model: Option<String>,
    /// Port of the engine; 0 for one that the kernel picks.
    pub port: u16,
    /// Path that answers 200 once the engine can serve.
    pub health_path: String,
    /// Longest time from start to health, in milliseconds.
    pub health_timeout_ms: u64,
    /// GPUs, as `CUDA_VISIBLE_DEVICES` says it.
    pub device_mask: Option<String>,
    /// File with the engine's API key.
    pub auth_file: Option<String>,
    /// Where the engine's output goes.
    pub log_file: PathBuf,
    /// Whether events are printed on standard output.
    pub report: bool,
    /// Program and arguments, placeholders and all; never empty.
    pub command: Vec<OsString>,
}

/// What will be started and, once it is healthy, written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Program and arguments.
    pub command: Vec<OsString>,
    /// Variables set in the engine's environment, beyond those inherited.
    pub env: Vec<(&'static str, String)>,
    /// Where the engine will answer its health probe.
    pub health_url: String,
    /// The handoff, but for `pid`, `pid_start`, `boot_id` and `generation`, which only a running
    /// process has.
    pub handoff: Handoff,
    /// Where the handoff goes.
    pub handoff_file: PathBuf,
}

impl Config {
    /// Reads and checks the settings of [`TABLE`] and the words after `--`.
    ///
    /// # Errors
    /// [`Exit`] with code 78 (2 for a missing command) and one line that names what is not usable.
    pub fn from_settings(settings: &Settings) -> Result<Config, Exit> {
        let id_error = |e: crate::wire::id::IdError| e.to_string();
        let pool_id = settings.need("pool", |s| PoolId::new(s).map_err(id_error))?;
        let replica_id = settings.need("replica", |s| ReplicaId::new(s).map_err(id_error))?;
        let handoff_dir = settings.need("handoff-dir", path)?;
        let log_file = match settings.get("log-file", path)? {
            Some(file) => file,
            None => default_log_file(&handoff_dir, &pool_id, &replica_id),
        };
        let config = Config {
            slots: narrow(settings.need("slots", number(1, SLOTS_MAX.into()))?),
            engine: settings.need("engine", text)?,
            engine_version: settings.get("engine-version", text)?,
            model: settings.get("model", text)?,
            port: narrow(settings.need("port", number(0, u16::MAX.into()))?),
            health_path: settings.need("health-path", health_path)?,
            health_timeout_ms: settings.need("health-timeout-ms", number(1, HEALTH_TIMEOUT_MS_MAX))?,
            device_mask: settings.get("device-mask", device_mask)?,
            auth_file: settings.get("auth-file", absolute)?,
            report: settings.need("report", boolean)?,
            command: settings.rest.clone(),
            handoff_dir,
            pool_id,
            replica_id,
            log_file,
        };
        config.check_command()?;
        Ok(config)
    }

    fn check_command(&self) -> Result<(), Exit> {
        if self.command.first().is_none_or(|program| program.is_empty()) {
            return Err(Exit::usage(
                "the engine's command is missing: put it after `--`, for example -- llama-server -m model.gguf --port {port}",
            ));
        }
        let uses = |name| self.command.iter().any(|word| word.to_string_lossy().contains(name));
        if self.port == 0 && !uses("{port}") {
            return Err(Exit::config(
                "nothing tells the engine its port: write {port} in its command, or give --port the one that it listens on",
            ));
        }
        if self.model.is_none() && uses("{model}") {
            return Err(Exit::config("the engine's command says {model}, but --model is not given"));
        }
        Ok(())
    }
}

impl Plan {
    /// Fills `port` into what `config` asks for.
    ///
    /// # Errors
    /// [`Exit`] with code 78 for a port that makes no URL (0).
    pub fn new(config: &Config, port: u16) -> Result<Plan, Exit> {
        let url = BaseUrl::new(&format!("http://{HOST}:{port}")).map_err(|e| Exit::config(e.to_string()))?;
        let model = config.model.as_deref().unwrap_or_default();
        let handoff = Handoff {
            pool_id: config.pool_id.clone(),
            replica_id: config.replica_id.clone(),
            engine: config.engine.clone(),
            engine_version: config.engine_version.clone(),
            slots: config.slots,
            slots_given: true,
            model_bytes: None,
            slots_free: config.slots,
            ready: true,
            device_mask: config.device_mask.clone(),
            models: config.model.iter().cloned().collect(),
            pid: None,
            pid_start: None,
            boot_id: None,
            pid_ns: None,
            generation: 0,
            health_path: config.health_path.clone(),
            auth_file: config.auth_file.clone(),
            url,
        };
        Ok(Plan {
            command: config.command.iter().map(|word| fill_in(word, port, model)).collect(),
            env: config.device_mask.iter().map(|mask| ("CUDA_VISIBLE_DEVICES", mask.clone())).collect(),
            health_url: format!("{}{}", handoff.url, config.health_path),
            handoff_file: config.handoff_dir.join(handoff.file_name()),
            handoff,
        })
    }
}

/// The model's name goes in last: braces in it are its own. A word that is not UTF-8 stays as it is.
fn fill_in(word: &OsStr, port: u16, model: &str) -> OsString {
    match word.to_str() {
        Some(text) => {
            text.replace("{port}", &port.to_string()).replace("{host}", HOST).replace("{model}", model).into()
        }
        None => word.to_os_string(),
    }
}

fn default_log_file(handoff_dir: &Path, pool: &PoolId, replica: &ReplicaId) -> PathBuf {
    handoff_dir.parent().unwrap_or(handoff_dir).join("logs").join(format!("{pool}-{replica}.log"))
}

/// `number` has checked the range; the ends of it are those of `T`.
fn narrow<T: TryFrom<u64> + Default>(checked: u64) -> T {
    T::try_from(checked).unwrap_or_default()
}

fn text(text: &str) -> Result<String, String> {
    let good = (1..=TEXT_BYTES_MAX).contains(&text.len()) && !text.chars().any(char::is_control);
    if good {
        Ok(text.to_string())
    } else {
        Err(format!("allowed are 1 to {TEXT_BYTES_MAX} printable bytes"))
    }
}

fn path(text: &str) -> Result<PathBuf, String> {
    if text.is_empty() { Err("a path is needed".into()) } else { Ok(text.into()) }
}

fn absolute(path: &str) -> Result<String, String> {
    if path.starts_with('/') { text(path) } else { Err("allowed is an absolute path".into()) }
}

fn health_path(path: &str) -> Result<String, String> {
    let good = path.starts_with('/')
        && path.len() <= TEXT_BYTES_MAX
        && path.bytes().all(|b| b.is_ascii_graphic() && b != b'#');
    if good { Ok(path.to_string()) } else { Err("allowed is a path such as /health".into()) }
}

/// Numbers and UUIDs (`GPU-...`, `MIG-...`), separated by commas.
fn device_mask(mask: &str) -> Result<String, String> {
    let device = |name: &str| {
        !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'/' | b'_'))
    };
    if mask.len() <= TEXT_BYTES_MAX && mask.split(',').all(device) {
        Ok(mask.to_string())
    } else {
        Err("allowed are GPU numbers or UUIDs separated by commas, such as 0,1".into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::handoff::{self, HandoffFile};

    fn config(args: &[&str]) -> Result<Config, Exit> {
        let args = args.iter().map(OsString::from);
        let none = |_: &str| None;
        Config::from_settings(&Settings::read("t", "about", TABLE, Some("COMMAND"), args, none)?)
    }

    fn words(plan: &Plan) -> Vec<&str> {
        plan.command.iter().map(|word| word.to_str().expect("UTF-8")).collect()
    }

    #[test]
    fn the_port_and_the_model_reach_the_command_and_the_handoff() {
        let config = config(&[
            "--pool=pool-0",
            "--handoff-dir=run/engines",
            "--slots=4",
            "--model=m{host}",
            "--device-mask=0,1",
            "--",
            "llama-server",
            "--port",
            "{port}",
            "--host={host}",
            "-a",
            "{model}",
            "{other}",
        ])
        .expect("a usable configuration");
        let plan = Plan::new(&config, 4711).expect("a port");
        assert_eq!(
            words(&plan),
            ["llama-server", "--port", "4711", "--host=127.0.0.1", "-a", "m{host}", "{other}"]
        );
        assert_eq!(plan.env, [("CUDA_VISIBLE_DEVICES", "0,1".to_string())]);
        assert_eq!(plan.health_url, "http://127.0.0.1:4711/health");
        assert_eq!(plan.handoff_file, Path::new("run/engines/pool-0-r0.json"));
        assert_eq!(config.log_file, Path::new("run/logs/pool-0-r0.log"));
        let written = plan.handoff.to_json();
        assert_eq!(handoff::parse(written.as_bytes()), Ok(HandoffFile::Engine(Box::new(plan.handoff))));
    }

    #[test]
    fn a_fixed_port_needs_no_placeholder() {
        let config = config(&["--port=8081", "--", "engine"]).expect("a usable configuration");
        assert_eq!((config.port, config.device_mask.as_deref()), (8081, None));
        assert!(Plan::new(&config, config.port).expect("a port").env.is_empty());
    }

    #[test]
    fn what_cannot_work_is_refused_before_anything_starts() {
        for (args, code, names) in [
            (&["--port=1"][..], 2, "after `--`"),
            (&["--port=1", "--"], 2, "after `--`"),
            (&["--port=1", "--", ""], 2, "after `--`"),
            (&["--", "engine"], 78, "{port}"),
            (&["--", "engine", "{port}", "{model}"], 78, "--model"),
            (&["--port=65536", "--", "e"], 78, "--port=\"65536\""),
            (&["--slots=0", "--", "e", "{port}"], 78, "--slots=\"0\""),
            (&["--pool=../x", "--", "e", "{port}"], 78, "not an id"),
            (&["--health-path=health", "--", "e", "{port}"], 78, "/health"),
            (&["--health-timeout-ms=0", "--", "e", "{port}"], 78, "--health-timeout-ms"),
            (&["--device-mask=0;rm", "--", "e", "{port}"], 78, "--device-mask"),
            (&["--device-mask=0,", "--", "e", "{port}"], 78, "--device-mask"),
            (&["--auth-file=key", "--", "e", "{port}"], 78, "absolute"),
            (&["--model=a\u{7}b", "--", "e", "{port}"], 78, "printable"),
        ] {
            let exit = config(args).expect_err(names);
            assert_eq!(exit.code, code, "{args:?}: {exit}");
            assert!(exit.message.contains(names) && exit.message.lines().count() == 1, "{args:?}: {exit}");
        }
    }

    proptest::proptest! {
        /// What the plan hands over, a reader of handoff files understands and reads the same.
        #[test]
        fn every_accepted_configuration_makes_a_readable_handoff(
            model in "[ -~]{1,40}", path in "/[!-~]{0,20}", mask in "[0-9,A-Za-z/-]{1,12}", version in "[ -~]{1,20}", slots in 1u32..=SLOTS_MAX, port in 1u16..,
        ) {
            let flags = [format!("--model={model}"), format!("--health-path={path}"), format!("--device-mask={mask}"), format!("--engine-version={version}"), format!("--slots={slots}")];
            let args: Vec<&str> = flags.iter().map(String::as_str).chain(["--", "e", "{port}"]).collect();
            if let Ok(config) = config(&args) {
                let plan = Plan::new(&config, port).expect("a port");
                proptest::prop_assert_eq!(
                    handoff::parse(plan.handoff.to_json().as_bytes()),
                    Ok(HandoffFile::Engine(Box::new(plan.handoff)))
                );
            }
        }
    }
}
