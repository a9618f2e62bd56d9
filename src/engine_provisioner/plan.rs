//! From configuration to what will be started and written. PURE.
//!
//! Two steps, because the port may come from the kernel in between: [`Config`] is what the operator
//! asked for, checked; [`Plan`] is the same with the port filled in: the exact command line, the
//! variables added to its environment, and the handoff as far as it is known before there is a
//! process. A request that cannot work is refused here, before anything is started.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::docker_run;
use super::models::{self, Digest};
use super::source::SourceSpec;
use crate::settings::{Exit, Setting, Settings, boolean, flag, number};
use crate::wire::handoff::{Handoff, SLOTS_MAX, TEXT_BYTES_MAX};
use crate::wire::id::{PoolId, ReplicaId, ReplicaKey};
use crate::wire::url::BaseUrl;

/// Where engines listen: the safe default, which only this machine reaches.
pub const HOST: &str = "127.0.0.1";
/// Longest time that any step may be given, in milliseconds: a day is more than the largest model needs to
/// load.
pub const STEP_MS_MAX: u64 = 24 * 3600 * 1000;
/// Shortest pause between health probes of an engine that serves, in milliseconds: llama-server looks for
/// clients that left anew with each request, so a faster pace would keep it from noticing them.
pub const HEALTH_EVERY_MS_MIN: u64 = 2_000;

/// What [`run`](super::run) takes beside the settings of the whole program.
pub static RUN_TABLE: &[Setting] = &[
    flag("pool", Some("default"), "ID", "Pool that the engine joins"),
    flag("replica", Some("r0"), "ID", "Name of the engine within its pool"),
    flag(
        "slots",
        None,
        "N",
        "Requests that the engine serves at once, 1 to 65536; without it as many as the engine says, or 1",
    ),
    flag("engine", Some("llamacpp"), "NAME", "Kind of engine: llamacpp, vllm, sglang, tgi, openai"),
    flag("engine-version", None, "TEXT", "Version of the engine, for display"),
    flag(
        "model",
        None,
        "REF",
        "Model: a path, file:PATH, hf:ORG/REPO, hf:ORG/REPO:QUANTISATION, an http(s) URL, or a name; fetched if it is not here; fills {model}. Without it the engine is asked for its models",
    ),
    flag("digest", None, "SHA256", "What the model's file has to be: sha256: and 64 digits"),
    flag(
        "source-ref",
        None,
        "REF",
        "Build the engine from this branch, tag or commit; the program's path fills {binary}",
    ),
    flag(
        "source-repository",
        Some("https://github.com/ggml-org/llama.cpp"),
        "URL",
        "Git repository that it is built from, a URL or a path",
    ),
    flag("source-cmake-flags", None, "FLAG,...", "Flags for cmake, such as -DGGML_CUDA=ON"),
    flag("source-generator", None, "NAME", "cmake's generator, such as Ninja; without it cmake chooses"),
    flag("source-target", Some("llama-server"), "NAME", "What is built: target and name of the program"),
    flag("source-submodules", Some("false"), "BOOL", "Fetch submodules too"),
    flag("model-name", None, "NAME", "Name that clients use, where it is not the model's own"),
    flag("port", Some("0"), "PORT", "Port that the engine listens on; 0 takes a free one"),
    flag("health-path", Some("/health"), "PATH", "Path that answers 200 once the engine can serve"),
    flag(
        "health-timeout-ms",
        None,
        "MS",
        "How long the engine may take to become healthy, 1 to 86400000 milliseconds; without it ten minutes, and more for a large model",
    ),
    flag(
        "health-interval-ms",
        Some("5000"),
        "MS",
        "Pause between health probes once it serves, 2000 to 86400000 milliseconds",
    ),
    flag(
        "health-failures",
        Some("3"),
        "N",
        "Refused probes in a row (or twice as many slow ones or errors) that make it broken, 1 to 1000; 0 for never",
    ),
    flag(
        "drain-ms",
        Some("30000"),
        "MS",
        "How long running requests may take before the engine is stopped, 0 to 86400000 milliseconds",
    ),
    flag(
        "stop-ms",
        Some("4000"),
        "MS",
        "From SIGTERM to the second SIGTERM, 1 to 86400000 milliseconds; SIGKILL follows a second later",
    ),
    flag("restart", Some("always"), "WHEN", "Whether a failed engine is started again: always or never"),
    Setting {
        flag: "device-mask",
        env: "ENGINE_PROVISIONER_GPU_MASK",
        aliases: &[],
        default: None,
        value: "MASK",
        help: "GPUs for the engine, such as 0 or 0,1: becomes its CUDA_VISIBLE_DEVICES",
    },
    flag("gpu", None, "MASK", "The same, shorter"),
    flag(
        "container",
        None,
        "NAME",
        "Container of the engine, where the command is none of docker's or podman's `run`: its name, or the path of its --cidfile",
    ),
    flag("auth-file", None, "FILE", "File with the engine's own API key; its absolute path is handed over"),
    flag("log-file", None, "FILE", "What the engine prints; without it POOL-REPLICA.log in --log-dir"),
];

/// What the operator asked for, of one engine.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Directory of the handoff file.
    pub handoff_dir: PathBuf,
    /// Pool of the replica.
    pub pool_id: PoolId,
    /// The replica that is started.
    pub replica_id: ReplicaId,
    /// Requests that it serves at once, where the operator says it.
    pub slots: Option<u32>,
    /// Kind of engine.
    pub engine: String,
    /// Its version, for display.
    pub engine_version: Option<String>,
    /// Model as the operator names it: a reference or a name.
    pub model: Option<String>,
    /// Model name as clients use it.
    pub model_name: Option<String>,
    /// What the model's file has to be.
    pub digest: Option<Digest>,
    /// Where the model lies, once that is known, and its size in bytes.
    pub model_file: Option<(PathBuf, u64)>,
    /// Keeps that from being removed.
    pub lease: Lease,
    /// What the engine's program is built from, where it is.
    pub source: Option<SourceSpec>,
    /// The program that was built.
    pub program: Option<PathBuf>,
    /// Whether the command was made here, for llama-server, and may be added to.
    pub is_made: bool,
    /// Port of the engine; 0 for one that the kernel picks.
    pub port: u16,
    /// Path that answers 200 once the engine can serve.
    pub health_path: String,
    /// Longest time from start to health, in milliseconds, where the operator says it.
    pub health_timeout_ms: Option<u64>,
    /// Pause between probes of a serving engine, in milliseconds.
    pub health_every_ms: u64,
    /// Refused probes in a row that make it broken; 0 for never.
    pub health_failures: u32,
    /// How long its requests may take at its end, in milliseconds.
    pub drain_ms: u64,
    /// From SIGTERM to the second one, in milliseconds.
    pub stop_ms: u64,
    /// Whether it is started again when it failed.
    pub restart: bool,
    /// GPUs, as `CUDA_VISIBLE_DEVICES` says it.
    pub device_mask: Option<String>,
    /// The share of the model that each of them takes.
    pub tensor_split: Vec<f64>,
    /// The container that it runs in, where the command does not say.
    pub container: Option<String>,
    /// File with the engine's API key.
    pub auth_file: Option<String>,
    /// Where the engine's output goes.
    pub log_file: PathBuf,
    /// Further variables of its environment.
    pub env: BTreeMap<String, String>,
    /// Program and arguments, placeholders and all; never empty.
    pub command: Vec<OsString>,
}

/// Holds something for as long as a configuration is used, and is no part of what it says.
#[derive(Clone, Default)]
pub struct Lease(#[expect(dead_code, reason = "held, not read")] Option<Arc<dyn Send + Sync>>);

impl Lease {
    /// Holds `what`.
    #[must_use]
    pub fn on(what: impl Send + Sync + 'static) -> Lease {
        Lease(Some(Arc::new(what)))
    }
}

impl PartialEq for Lease {
    fn eq(&self, _: &Lease) -> bool {
        true
    }
}

impl fmt::Debug for Lease {
    /// The same for all: configurations are told apart by their text.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Lease")
    }
}

/// What will be started and, once it is healthy, written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Program and arguments.
    pub command: Vec<OsString>,
    /// Variables set in the engine's environment, beyond those inherited.
    pub env: Vec<(String, String)>,
    /// Where the engine will answer its health probe.
    pub health_url: String,
    /// The handoff, but for `pid`, `pid_start`, `boot_id` and `generation`, which only a running
    /// process has.
    pub handoff: Handoff,
    /// Where the handoff goes.
    pub handoff_file: PathBuf,
}

/// Where files of engines go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Directories {
    /// Handoffs.
    pub handoffs: PathBuf,
    /// What engines print.
    pub logs: PathBuf,
}

impl Config {
    /// Reads and checks the settings of [`RUN_TABLE`] and the words after `--`.
    ///
    /// # Errors
    /// [`Exit`] with code 78 (2 for a missing command) and one line that names what is not usable.
    pub fn from_settings(settings: &Settings, directories: &Directories) -> Result<Config, Exit> {
        let id_error = |e: crate::wire::id::IdError| e.to_string();
        let pool_id = settings.need("pool", |s| PoolId::new(s).map_err(id_error))?;
        let replica_id = settings.need("replica", |s| ReplicaId::new(s).map_err(id_error))?;
        let log_file = match settings.get("log-file", path)? {
            Some(file) => file,
            None => directories.log_file(&pool_id, &replica_id),
        };
        let device_mask = match settings.get("gpu", device_mask)? {
            Some(mask) => Some(mask),
            None => settings.get("device-mask", device_mask)?,
        };
        let step = |min| number(min, STEP_MS_MAX);
        let config = Config {
            slots: settings.get("slots", number(1, SLOTS_MAX.into()))?.map(narrow),
            engine: settings.need("engine", text)?,
            engine_version: settings.get("engine-version", text)?,
            model: settings.get("model", text)?,
            model_name: settings.get("model-name", text)?,
            digest: settings.get("digest", Digest::parse)?,
            model_file: None,
            lease: Lease::default(),
            source: source(settings)?,
            program: None,
            is_made: false,
            port: narrow(settings.need("port", number(0, u16::MAX.into()))?),
            health_path: settings.need("health-path", health_path)?,
            health_timeout_ms: settings.get("health-timeout-ms", step(1))?,
            health_every_ms: settings.need("health-interval-ms", step(HEALTH_EVERY_MS_MIN))?,
            health_failures: narrow(settings.need("health-failures", number(0, 1_000))?),
            drain_ms: settings.need("drain-ms", step(0))?,
            stop_ms: settings.need("stop-ms", step(1))?,
            restart: settings.need("restart", restart)?,
            device_mask,
            tensor_split: Vec::new(),
            container: settings.get("container", container)?,
            auth_file: settings.get("auth-file", absolute)?,
            env: BTreeMap::new(),
            command: settings.rest.clone(),
            handoff_dir: directories.handoffs.clone(),
            pool_id,
            replica_id,
            log_file,
        };
        config.check_command()?;
        Ok(config)
    }

    /// The replica that it describes.
    #[must_use]
    pub fn key(&self) -> ReplicaKey {
        ReplicaKey { pool: self.pool_id.clone(), replica: self.replica_id.clone() }
    }

    /// Longest time from start to health, in milliseconds: a large model takes longer to read.
    #[must_use]
    pub fn start_ms(&self) -> u64 {
        let bytes = self.model_file.as_ref().map_or(0, |(_, bytes)| *bytes);
        self.health_timeout_ms.unwrap_or_else(|| models::ready_within_ms(bytes))
    }

    /// The name that clients use for its model, where it is known before the engine is asked.
    #[must_use]
    pub fn shown_model(&self) -> Option<String> {
        let stem = |path: &Path| path.file_stem().map(|stem| stem.to_string_lossy().into_owned());
        self.model_name
            .clone()
            .or_else(|| self.model_file.as_ref().and_then(|(path, _)| stem(path)))
            .or_else(|| self.model.clone())
    }

    /// The mask's devices.
    #[must_use]
    pub fn devices(&self) -> Vec<&str> {
        self.device_mask.iter().flat_map(|mask| mask.split(',')).map(str::trim).collect()
    }

    /// Whether the command can work at all.
    ///
    /// # Errors
    /// [`Exit`] with what is missing in it.
    pub(super) fn check_command(&self) -> Result<(), Exit> {
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
        if let Some(tool) = self.detaching_tool() {
            return Err(Exit::config(format!(
                "{tool} run would leave the container to itself (-d, --detach), where nobody keeps it: leave that flag out, its output goes to a log file anyway; a container that something else starts is handed over with llorch adopt URL --container NAME"
            )));
        }
        match (&self.source, uses("{binary}")) {
            (None, true) => {
                return Err(Exit::config(
                    "the engine's command says {binary}, but nothing is built: say from what, with --source-ref or `source`",
                ));
            }
            (Some(_), false) => {
                return Err(Exit::config(
                    "the engine's command does not use what is to be built: write {binary} for its program",
                ));
            }
            _ => {}
        }
        if let Some(source) = &self.source {
            source.check().map_err(Exit::config)?;
        }
        if self.digest.is_some() && self.model.is_none() {
            return Err(Exit::config("a digest is given, but no model that it could be of"));
        }
        if self.model.is_none() && uses("{model}") {
            return Err(Exit::config("the engine's command says {model}, but --model is not given"));
        }
        Ok(())
    }

    /// The program of the command, where that runs a container and does not stay with it.
    fn detaching_tool(&self) -> Option<&str> {
        let tool = Path::new(self.command.first()?).file_name()?.to_str()?;
        let run = self.command.iter().position(|word| word == "run")?;
        let flags = self.command[run + 1..].iter().map(|word| word.to_str().unwrap_or_default());
        (docker_run::TOOLS.contains(&tool) && docker_run::is_detached(flags)).then_some(tool)
    }
}

impl Plan {
    /// Fills `port` into what `config` asks for.
    ///
    /// # Errors
    /// [`Exit`] with code 78 for a port that makes no URL (0).
    pub fn new(config: &Config, port: u16) -> Result<Plan, Exit> {
        let url = BaseUrl::new(&format!("http://{HOST}:{port}")).map_err(|e| Exit::config(e.to_string()))?;
        let model = match &config.model_file {
            Some((path, _)) => path.to_string_lossy().into_owned(),
            None => config.model.clone().unwrap_or_default(),
        };
        let slots = config.slots.unwrap_or(1);
        let handoff = Handoff {
            pool_id: config.pool_id.clone(),
            replica_id: config.replica_id.clone(),
            engine: config.engine.clone(),
            engine_version: config.engine_version.clone(),
            slots,
            slots_given: true,
            model_bytes: config.model_file.as_ref().map(|(_, bytes)| *bytes),
            slots_free: slots,
            ready: true,
            device_mask: config.device_mask.clone(),
            models: config.shown_model().into_iter().collect(),
            pid: None,
            pid_start: None,
            boot_id: None,
            pid_ns: None,
            generation: 0,
            health_path: config.health_path.clone(),
            auth_file: config.auth_file.clone(),
            url,
        };
        let mut env: Vec<(String, String)> = config.env.clone().into_iter().collect();
        env.extend(config.device_mask.iter().map(|mask| ("CUDA_VISIBLE_DEVICES".into(), mask.clone())));
        let program = config.program.as_deref().map(Path::to_string_lossy).unwrap_or_default();
        let fill = |word: &OsString| fill_in(word, port, &model, &program, config.slots);
        Ok(Plan {
            command: config.command.iter().map(fill).collect(),
            env,
            health_url: format!("{}{}", handoff.url, config.health_path),
            handoff_file: config.handoff_dir.join(handoff.file_name()),
            handoff,
        })
    }
}

/// The model's name goes in last: braces in it are its own. A word that is not UTF-8 stays as it is.
fn fill_in(word: &OsStr, port: u16, model: &str, program: &str, slots: Option<u32>) -> OsString {
    match word.to_str() {
        Some(text) => text
            .replace("{port}", &port.to_string())
            .replace("{host}", HOST)
            .replace("{slots}", &slots.unwrap_or(1).to_string())
            .replace("{binary}", program)
            .replace("{model}", model)
            .into(),
        None => word.to_os_string(),
    }
}

/// What the flags say about a build.
fn source(settings: &Settings) -> Result<Option<SourceSpec>, Exit> {
    let Some(revision) = settings.get("source-ref", text)? else { return Ok(None) };
    let flags = settings.get("source-cmake-flags", |flags| {
        Ok(flags.split(',').map(str::trim).filter(|flag| !flag.is_empty()).map(String::from).collect())
    })?;
    Ok(Some(SourceSpec {
        repository: settings.need("source-repository", text)?,
        revision,
        cmake_flags: flags.unwrap_or_default(),
        generator: settings.get("source-generator", text)?,
        target: settings.need("source-target", text)?,
        submodules: settings.need("source-submodules", boolean)?,
    }))
}

impl Directories {
    /// The usual ones beside that of the handoffs.
    #[must_use]
    pub fn beside(handoffs: PathBuf) -> Directories {
        let logs = handoffs.parent().unwrap_or(&handoffs).join("logs");
        Directories { handoffs, logs }
    }

    /// What an engine prints, where it has no file of its own.
    pub(super) fn log_file(&self, pool: &PoolId, replica: &ReplicaId) -> PathBuf {
        self.logs.join(format!("{pool}-{replica}.log"))
    }
}

/// `number` has checked the range; the ends of it are those of `T`.
pub(super) fn narrow<T: TryFrom<u64> + Default>(checked: u64) -> T {
    T::try_from(checked).unwrap_or_default()
}

pub(super) fn text(text: &str) -> Result<String, String> {
    let good = (1..=TEXT_BYTES_MAX).contains(&text.len()) && !text.chars().any(char::is_control);
    if good {
        Ok(text.to_string())
    } else {
        Err(format!("allowed are 1 to {TEXT_BYTES_MAX} printable bytes"))
    }
}

pub(super) fn path(text: &str) -> Result<PathBuf, String> {
    if text.is_empty() { Err("a path is needed".into()) } else { Ok(text.into()) }
}

pub(super) fn absolute(path: &str) -> Result<String, String> {
    if path.starts_with('/') { text(path) } else { Err("allowed is an absolute path".into()) }
}

/// A name that no command takes for a flag, or a path.
pub(super) fn container(name: &str) -> Result<String, String> {
    let is_name = !name.starts_with('-') && !name.contains(char::is_whitespace);
    text(name).ok().filter(|_| is_name).ok_or_else(|| "allowed is a container's name, id or --cidfile".into())
}

fn restart(text: &str) -> Result<bool, String> {
    match text {
        "always" => Ok(true),
        "never" => Ok(false),
        _ => Err("allowed are always and never".into()),
    }
}

pub(super) fn health_path(path: &str) -> Result<String, String> {
    let good = path.starts_with('/')
        && path.len() <= TEXT_BYTES_MAX
        && path.bytes().all(|b| b.is_ascii_graphic() && b != b'#');
    if good { Ok(path.to_string()) } else { Err("allowed is a path such as /health".into()) }
}

/// Numbers and UUIDs (`GPU-...`, `MIG-...`), separated by commas.
pub(super) fn device_mask(mask: &str) -> Result<String, String> {
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
        let settings = Settings::read("t", "about", RUN_TABLE, Some("COMMAND"), args, none)?;
        Config::from_settings(&settings, &Directories::beside("run/engines".into()))
    }

    fn words(plan: &Plan) -> Vec<&str> {
        plan.command.iter().map(|word| word.to_str().expect("UTF-8")).collect()
    }

    #[test]
    fn the_port_and_the_model_reach_the_command_and_the_handoff() {
        let config = config(&[
            "--pool=pool-0",
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
        assert_eq!(plan.env, [("CUDA_VISIBLE_DEVICES".to_string(), "0,1".to_string())]);
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
            (&["--restart=sometimes", "--", "e", "{port}"], 78, "always and never"),
            (&["--health-interval-ms=1", "--", "e", "{port}"], 78, "2000"),
            (&["--health-timeout-ms=0", "--", "e", "{port}"], 78, "--health-timeout-ms"),
            (&["--device-mask=0;rm", "--", "e", "{port}"], 78, "--device-mask"),
            (&["--device-mask=0,", "--", "e", "{port}"], 78, "--device-mask"),
            (&["--container=--all", "--", "e", "{port}"], 78, "--cidfile"),
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
