//! The declarative file: many engines, as TOML or JSON. PURE.
//!
//! A list of pools, each with the replicas that it has. What a replica does not say its pool says, and what
//! that does not say stands in `defaults`; variables of `env` are added up. Everything else is as with
//! [`run`](super::run): the file becomes a [`Config`] for each replica, and nothing that cannot work gets past
//! here. A key that is not known is an error: a misspelt limit must not count as none.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;

use serde::Deserialize;
use serde_json::{Map, Value};

use super::flags::{self, Wanted};
use super::models::Digest;
use super::plan::{self, Config, Directories, HEALTH_EVERY_MS_MIN, Lease, STEP_MS_MAX};
use super::source::SourceSpec;
use crate::replicas::profile::Engine as Profile;
use crate::wire::handoff::SLOTS_MAX;
use crate::wire::id::{PoolId, ReplicaId, ReplicaKey};

/// Most engines of one file: several for each GPU of the largest machine.
pub const ENGINES_MAX: usize = 256;
/// Largest file, in bytes.
pub const FILE_BYTES_MAX: usize = 1 << 20;

/// One replica, with what its pool and the defaults say.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    id: String,
    pool: String,
    #[serde(default = "llamacpp")]
    engine: String,
    engine_version: Option<String>,
    model: Option<String>,
    model_name: Option<String>,
    digest: Option<String>,
    binary: Option<String>,
    source: Option<Source>,
    command: Option<Vec<String>>,
    #[serde(default)]
    flags: Vec<String>,
    #[serde(default)]
    env: BTreeMap<String, String>,
    devices: Option<Devices>,
    #[serde(default)]
    tensor_split: Vec<f64>,
    slots: Option<u32>,
    ctx: Option<u64>,
    #[serde(default)]
    port: u16,
    container: Option<String>,
    auth_file: Option<String>,
    log_file: Option<String>,
    #[serde(default = "health_path")]
    health_path: String,
    health_timeout_ms: Option<u64>,
    #[serde(default = "health_interval_ms")]
    health_interval_ms: u64,
    #[serde(default = "health_failures")]
    health_failures: u32,
    #[serde(default = "drain_ms")]
    drain_ms: u64,
    #[serde(default = "stop_ms")]
    stop_ms: u64,
    #[serde(default = "always")]
    restart: String,
}

/// What the engine's program is built from.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Source {
    #[serde(default = "llama_cpp")]
    repository: String,
    #[serde(rename = "ref")]
    revision: String,
    #[serde(default)]
    cmake_flags: Vec<String>,
    generator: Option<String>,
    #[serde(default = "llama_server")]
    target: String,
    #[serde(default)]
    submodules: bool,
}

/// `"0,1"` or `[0, 1]`.
#[derive(Deserialize)]
#[serde(untagged)]
enum Devices {
    Mask(String),
    Numbers(Vec<Value>),
}

fn llama_cpp() -> String {
    SourceSpec::llama_cpp("", false).repository
}

fn llama_server() -> String {
    SourceSpec::llama_cpp("", false).target
}

fn llamacpp() -> String {
    "llamacpp".into()
}

fn health_path() -> String {
    "/health".into()
}

fn health_interval_ms() -> u64 {
    5_000
}

fn health_failures() -> u32 {
    3
}

fn drain_ms() -> u64 {
    30_000
}

fn stop_ms() -> u64 {
    4_000
}

fn always() -> String {
    "always".into()
}

/// The engines that a file's bytes name.
///
/// # Errors
/// Where the file is wrong, and what is allowed there.
pub fn read(bytes: &[u8], is_json: bool, directories: &Directories) -> Result<Vec<Config>, String> {
    if bytes.len() > FILE_BYTES_MAX {
        return Err(format!("it is larger than {FILE_BYTES_MAX} bytes"));
    }
    let text = std::str::from_utf8(bytes).map_err(|_| "it is not UTF-8".to_string())?;
    let whole: Value = match is_json {
        true => serde_json::from_str(text).map_err(|error| error.to_string())?,
        false => toml::from_str(text).map_err(|error| error.to_string().trim_end().to_string())?,
    };
    let Value::Object(mut whole) = whole else { return Err("it must be an object with `pools`".into()) };
    let defaults = table(whole.remove("defaults"), "defaults")?;
    let pools = list(whole.remove("pools"), "pools")?;
    if let Some(name) = whole.keys().next() {
        return Err(format!("unknown key `{name}`: allowed are defaults and pools"));
    }
    let (mut configs, mut seen) = (Vec::new(), BTreeSet::new());
    for pool in pools {
        let mut pool = table(Some(pool), "pools[]")?;
        let id = pool.remove("id").and_then(|id| id.as_str().map(str::to_string));
        let id = id.ok_or("a pool has no `id`")?;
        let replicas = match pool.remove("replicas") {
            None => vec![Value::Object(Map::new())],
            some => list(some, "replicas")?,
        };
        for (index, replica) in replicas.into_iter().enumerate() {
            let replica = table(Some(replica), "replicas[]")?;
            let mut merged = merge(merge(defaults.clone(), pool.clone()), replica);
            merged.insert("pool".into(), Value::String(id.clone()));
            merged.entry("id").or_insert_with(|| Value::String(format!("r{index}")));
            let name = format!("{id}/{}", merged["id"].as_str().unwrap_or("?"));
            let entry: Entry =
                serde_json::from_value(Value::Object(merged)).map_err(|error| format!("{name}: {error}"))?;
            let config = config(entry, directories).map_err(|why| format!("{name}: {why}"))?;
            if !seen.insert(config.key()) {
                return Err(format!("{name} is there twice: give each replica its own `id`"));
            }
            configs.push(config);
            if configs.len() > ENGINES_MAX {
                return Err(format!("it names more than {ENGINES_MAX} engines"));
            }
        }
    }
    if configs.is_empty() {
        return Err("it names no engines: add [[pools]]".into());
    }
    Ok(configs)
}

fn table(value: Option<Value>, name: &str) -> Result<Map<String, Value>, String> {
    match value {
        None => Ok(Map::new()),
        Some(Value::Object(table)) => Ok(table),
        Some(_) => Err(format!("`{name}` must be a table")),
    }
}

fn list(value: Option<Value>, name: &str) -> Result<Vec<Value>, String> {
    match value {
        None => Ok(Vec::new()),
        Some(Value::Array(list)) => Ok(list),
        Some(_) => Err(format!("`{name}` must be a list")),
    }
}

/// What `inner` says beats what `outer` says; variables are added up.
fn merge(mut outer: Map<String, Value>, inner: Map<String, Value>) -> Map<String, Value> {
    for (name, value) in inner {
        match (outer.get_mut(&name), value) {
            (Some(Value::Object(all)), Value::Object(more)) if name == "env" => all.extend(more),
            (_, value) => {
                outer.insert(name, value);
            }
        }
    }
    outer
}

fn config(entry: Entry, directories: &Directories) -> Result<Config, String> {
    let pool_id = PoolId::new(&entry.pool).map_err(|error| error.to_string())?;
    let replica_id = ReplicaId::new(&entry.id).map_err(|error| error.to_string())?;
    let key = ReplicaKey { pool: pool_id.clone(), replica: replica_id.clone() };
    let within = |name: &str, value: u64, min: u64, max: u64| match (min..=max).contains(&value) {
        true => Ok(()),
        false => Err(format!("`{name}` must be from {min} to {max}, found {value}")),
    };
    within("slots", entry.slots.unwrap_or(1).into(), 1, SLOTS_MAX.into())?;
    within("health_timeout_ms", entry.health_timeout_ms.unwrap_or(1), 1, STEP_MS_MAX)?;
    within("health_interval_ms", entry.health_interval_ms, HEALTH_EVERY_MS_MIN, STEP_MS_MAX)?;
    within("health_failures", entry.health_failures.into(), 0, 1_000)?;
    within("drain_ms", entry.drain_ms, 0, STEP_MS_MAX)?;
    within("stop_ms", entry.stop_ms, 1, STEP_MS_MAX)?;
    let named = |name: &str, result: Result<String, String>| result.map_err(|why| format!("`{name}`: {why}"));
    let device_mask = match &entry.devices {
        None => None,
        Some(devices) => Some(named("devices", plan::device_mask(&devices.mask()))?),
    };
    if let Some(name) = entry.env.keys().find(|name| name.is_empty() || name.contains(['=', '\0'])) {
        return Err(format!("`env`: {name:?} is no name of a variable"));
    }
    let cpu_only = matches!(&entry.devices, Some(Devices::Numbers(list)) if list.is_empty());
    let (command, slots) = command(&entry, cpu_only)?;
    let config = Config {
        log_file: match &entry.log_file {
            Some(file) => plan::path(file).map_err(|why| format!("`log_file`: {why}"))?,
            None => directories.log_file(&key.pool, &key.replica),
        },
        handoff_dir: directories.handoffs.clone(),
        slots,
        engine: named("engine", plan::text(&entry.engine))?,
        engine_version: entry.engine_version,
        model: entry.model,
        model_name: entry.model_name,
        digest: entry
            .digest
            .map(|text| Digest::parse(&text).map_err(|why| format!("`digest`: {why}")))
            .transpose()?,
        model_file: None,
        lease: Lease::default(),
        is_made: entry.command.is_none(),
        source: entry.source.map(|source| SourceSpec {
            repository: source.repository,
            revision: source.revision,
            cmake_flags: source.cmake_flags,
            generator: source.generator,
            target: source.target,
            submodules: source.submodules,
        }),
        program: None,
        port: entry.port,
        health_path: named("health_path", plan::health_path(&entry.health_path))?,
        health_timeout_ms: entry.health_timeout_ms,
        health_every_ms: entry.health_interval_ms,
        health_failures: entry.health_failures,
        drain_ms: entry.drain_ms,
        stop_ms: entry.stop_ms,
        restart: match entry.restart.as_str() {
            "always" => true,
            "never" => false,
            other => return Err(format!("`restart` must be always or never, found {other:?}")),
        },
        device_mask,
        tensor_split: entry.tensor_split,
        container: entry.container.map(|name| named("container", plan::container(&name))).transpose()?,
        auth_file: entry.auth_file.map(|file| named("auth_file", plan::absolute(&file))).transpose()?,
        env: entry.env,
        command,
        pool_id,
        replica_id,
    };
    for (name, text) in [
        ("engine_version", &config.engine_version),
        ("model", &config.model),
        ("model_name", &config.model_name),
    ] {
        if let Some(text) = text {
            named(name, plan::text(text))?;
        }
    }
    config.check_command().map_err(|exit| exit.message)?;
    Ok(config)
}

/// The command line, and the slots that it asks for.
fn command(entry: &Entry, cpu_only: bool) -> Result<(Vec<OsString>, Option<u32>), String> {
    let words = |words: &[String]| words.iter().map(OsString::from).collect::<Vec<_>>();
    if entry.binary.is_some() && entry.source.is_some() {
        return Err("give either `binary` or `source`, not both".into());
    }
    match (&entry.command, &entry.binary) {
        (Some(_), Some(_)) => Err("give either `command` or `binary`, not both".into()),
        (Some(command), None) => {
            let mut all = words(command);
            all.extend(words(&entry.flags));
            Ok((all, entry.slots))
        }
        (None, binary) => {
            if Profile::named(&entry.engine) != Profile::LlamaCpp {
                return Err(format!(
                    "`command` is missing: only llama-server's is made here, not that of {:?}",
                    entry.engine
                ));
            }
            if entry.model.is_none() {
                return Err("`model` is missing: llama-server needs one".into());
            }
            if let Some(flag) = flags::overruled(&entry.flags).first() {
                return Err(format!(
                    "`flags` hold {flag}, which is given by `model`, `port` and this program itself: take it out"
                ));
            }
            let split: Vec<String> = entry.tensor_split.iter().map(f64::to_string).collect();
            let split = split.join(",");
            let wanted = Wanted {
                slots: entry.slots,
                context: entry.ctx,
                cpu_only,
                tensor_split: Some(split.as_str()).filter(|split| !split.is_empty()),
            };
            let made = flags::llama_server(&entry.flags, &wanted);
            let slots = flags::slots(&made).filter(|slots| (1..=SLOTS_MAX).contains(slots));
            let default = if entry.source.is_some() { "{binary}" } else { "llama-server" };
            let mut all = vec![OsString::from(binary.as_deref().unwrap_or(default))];
            all.extend(words(&made));
            Ok((all, slots.or(entry.slots)))
        }
    }
}

impl Devices {
    /// No device at all is the mask `-1`, which hides every GPU.
    fn mask(&self) -> String {
        match self {
            Devices::Mask(mask) => mask.clone(),
            Devices::Numbers(list) if list.is_empty() => "-1".into(),
            Devices::Numbers(list) => {
                let word = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_string);
                list.iter().map(word).collect::<Vec<_>>().join(",")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = r#"
        [defaults]
        slots = 4
        env = { A = "1" }

        [[pools]]
        id = "chat"
        model = "file:/models/chat.gguf"
        flags = ["-ngl", "99", "--flash-attn", "on"]
        ctx = 8192
        replicas = [{ devices = [0] }, { devices = [1], slots = 2, env = { B = "2" } }]

        [[pools]]
        id = "embed"
        engine = "vllm"
        command = ["vllm", "serve", "org/embed", "--port", "{port}"]
    "#;

    fn read(text: &str) -> Result<Vec<Config>, String> {
        super::read(text.as_bytes(), false, &Directories::beside("run/engines".into()))
    }

    fn line(config: &Config) -> String {
        config.command.iter().map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn replicas_take_what_pools_and_defaults_say() {
        let configs = read(FILE).expect("a usable file");
        let names: Vec<String> = configs.iter().map(|config| config.key().to_string()).collect();
        assert_eq!(names, ["chat/r0", "chat/r1", "embed/r0"]);
        assert_eq!(
            line(&configs[0]),
            "llama-server --model {model} --host {host} --port {port} --parallel 4 --ctx-size 8192 --n-gpu-layers 99 --metrics --no-webui --flash-attn on"
        );
        assert!(line(&configs[1]).contains("--parallel 2"));
        assert_eq!((configs[1].slots, configs[1].device_mask.as_deref()), (Some(2), Some("1")));
        assert_eq!(configs[1].env.keys().collect::<Vec<_>>(), ["A", "B"]);
        assert_eq!(line(&configs[2]), "vllm serve org/embed --port {port}");
        let same = super::read(
            &serde_json::to_vec(&toml::from_str::<Value>(FILE).expect("TOML")).expect("JSON"),
            true,
            &Directories::beside("run/engines".into()),
        );
        assert_eq!(same.expect("the same as JSON"), configs);
    }

    #[test]
    fn what_is_wrong_is_named_with_its_place() {
        let pool = |rest: &str| format!("[[pools]]\nid = \"p\"\nmodel = \"m\"\n{rest}");
        for (text, why) in [
            (String::new(), "no engines"),
            (pool("slot = 4"), "p/r0: unknown field `slot`"),
            (pool("slots = 0"), "p/r0: `slots`"),
            (pool("devices = \"0;1\""), "`devices`"),
            (pool("flags = [\"--port\", \"1\"]"), "take it out"),
            (pool("restart = \"no\""), "always or never"),
            (pool("env = { \"A=B\" = \"1\" }"), "no name of a variable"),
            (pool("command = [\"e\"]"), "{port}"),
            (pool("command = [\"e\", \"{port}\"]\nbinary = \"x\""), "not both"),
            (pool("engine = \"vllm\""), "`command` is missing"),
            (pool("replicas = [{ id = \"a\" }, { id = \"a\" }]"), "twice"),
            (pool("health_interval_ms = 10"), "2000"),
            ("[[pools]]\nid = \"p\"".into(), "`model` is missing"),
            ("pools = 7".into(), "must be a list"),
            ("[[pool]]\nid = \"p\"".into(), "unknown key `pool`"),
            ("[[pools]]\nmodel = \"m\"".into(), "no `id`"),
            ("a = ".into(), "line 1"),
        ] {
            let error = read(&text).expect_err(&text);
            assert!(error.contains(why), "{text}: {error}");
        }
    }

    #[test]
    fn no_devices_at_all_means_the_cpu() {
        let configs = read("[[pools]]\nid = \"p\"\nmodel = \"m\"\ndevices = []\n").expect("usable");
        assert_eq!(configs[0].device_mask.as_deref(), Some("-1"));
        assert!(line(&configs[0]).contains("--n-gpu-layers 0"));
    }

    proptest::proptest! {
        #[test]
        fn no_file_panics(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..200), is_json: bool) {
            let _ = super::read(&bytes, is_json, &Directories::beside("d".into()));
        }
    }
}
