//! `llorch adopt` and `llorch withdraw`: hand over an engine that something else runs, and take that back.
//!
//! Adopting writes a handoff file; the daemon that watches the directory does the rest. What is not said
//! is asked from the engine, which may be silent while it loads: then the daemon asks it later. Withdrawing
//! removes the files that name a replica: it gets no new work, and what runs there finishes.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, fchown};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use crate::replicas::{AllowList, EnginePolicy, probe};
use crate::service::machine;
use crate::service::tls::Files;
use crate::settings::{Alias, Exit, Setting, Settings, Words, boolean, flag, number};
use crate::wire::handoff::{self, Handoff, HandoffFile, SLOTS_MAX};
use crate::wire::id::{PoolId, ReplicaId, ReplicaKey};
use crate::wire::url::BaseUrl;

use super::adopt_process;
use super::remote::{self, EXIT_NOT_FOUND, EXIT_REFUSED, EXIT_UNREACHABLE, Remote};
use super::terminal::{Screen, Tone, clean};

/// How long an engine may take to say what it is.
const ASK_TIMEOUT: Duration = Duration::from_secs(3);

/// Where handoffs are.
pub(super) const RUNTIME_DIR: Setting = Setting {
    flag: "runtime-dir",
    env: "LLORCH_RUNTIME_DIR",
    aliases: &[Alias::same("POOL_MANAGERD_RUNTIME_DIR"), Alias::same("ORCHD_RUNTIME_DIR")],
    default: None,
    value: "DIR",
    help: "The directory that the daemon watches; without it .runtime/engines, or /run/llama-orch/engines where only that is there",
};

/// What the daemon may dial beside its own machine.
pub(super) const ALLOW: Setting = Setting {
    flag: "allow-engine-hosts",
    env: "LLORCH_ALLOW_ENGINE_HOSTS",
    aliases: &[
        Alias::same("POOL_MANAGERD_ALLOW_ENGINE_HOSTS"),
        Alias::same("ORCHESTRATORD_ALLOW_ENGINE_HOSTS"),
    ],
    default: None,
    value: "HOSTS",
    help: "Hosts or CIDRs, separated by commas, that the daemon allows beside its own machine",
};

/// The directory of handoffs.
pub(super) fn runtime_dir(settings: &Settings) -> Result<PathBuf, Exit> {
    let named = settings.get(RUNTIME_DIR.flag, |text| Ok(PathBuf::from(text)))?;
    Ok(named.unwrap_or_else(machine::runtime_dir))
}

pub(super) static ADOPT_TABLE: &[Setting] = &[
    RUNTIME_DIR,
    flag("pool", Some("default"), "POOL", "Pool that it joins"),
    flag("replica", Some("r0"), "REPLICA", "Its name within the pool"),
    flag("slots", None, "N", "Requests that it serves at once, 1 to 65536; asked from the engine otherwise"),
    flag("model", None, "NAME,...", "Models that it serves; asked from the engine otherwise"),
    flag("engine", None, "KIND", "llamacpp, vllm, sglang, tgi or another; asked from the engine otherwise"),
    flag("gpu", None, "MASK", "GPUs that it uses, as 0,1 or a UUID"),
    flag("pid", None, "PID", "Its process on this machine: when that ends, so does the replica"),
    flag(
        "container",
        None,
        "NAME",
        "The same by docker's name or id of its container, or by the path of its --cidfile",
    ),
    flag("unit", None, "UNIT", "The same by the systemd unit that runs it"),
    flag("health-path", Some("/health"), "PATH", "What is probed until it answers 200"),
    flag("auth-file", None, "FILE", "File with the engine's own API key, an absolute path"),
    remote::TLS_CA,
    remote::TLS_CERT,
    remote::TLS_KEY,
    ALLOW,
    flag("replace", Some("false"), "BOOL", "Take the place of a handoff of another engine"),
    flag("dry-run", Some("false"), "BOOL", "Print the handoff instead of writing it"),
];
pub(super) static WITHDRAW_TABLE: &[Setting] = &[RUNTIME_DIR];
pub(super) const ADOPT_ABOUT: &str = "Hand over an engine that something else runs: write its handoff file";
pub(super) const WITHDRAW_ABOUT: &str = "Take a handed over engine back: remove its handoff file";
pub(super) const ENGINE: Words = Words::Given {
    name: "URL",
    help: "Where the engine listens, such as http://127.0.0.1:8081",
    min: 1,
    max: 1,
};
pub(super) const REPLICA: Words =
    Words::Given { name: "POOL/REPLICA", help: "The replica, such as default/r0", min: 1, max: 1 };

/// Runs `llorch adopt`.
pub(super) fn run_adopt(args: Vec<OsString>) -> Result<(), Exit> {
    let env = |name: &str| std::env::var_os(name);
    let settings = Settings::read_words("llorch adopt", ADOPT_ABOUT, ADOPT_TABLE, ENGINE, args, env)?;
    let url = settings.rest[0].to_string_lossy().into_owned();
    let url = BaseUrl::lenient(&url).map_err(|why| Exit::usage(why.to_string()))?;
    let allow = settings.get("allow-engine-hosts", AllowList::parse)?.unwrap_or_default();
    EnginePolicy::new(machine::own_addresses(), None, allow, ALLOW.env)
        .check(&url)
        .map_err(|why| Exit { code: EXIT_REFUSED, message: why })?;
    let mut handoff = given(&settings, url)?;
    let asked = ask(&handoff, remote::files(&settings)?);
    complete(&mut handoff, &settings, asked.as_ref().ok());
    // What is written must be read: the writer checks itself by the reader's rules.
    let text = handoff.to_json();
    handoff::parse(text.as_bytes()).map_err(|why| Exit::usage(why.to_string()))?;
    let screen = Screen::new();
    if settings.need("dry-run", boolean)? {
        screen.write(&text);
        return Ok(());
    }
    let directory = runtime_dir(&settings)?;
    if !settings.need("replace", boolean)? {
        refuse_others(&directory, &handoff)?;
    }
    let path = directory.join(handoff.file_name());
    write(&directory, &handoff.file_name(), text.as_bytes()).map_err(|error| {
        Exit::runtime(format!(
            "cannot write {}: {error}; run this as the daemon's user or as root, or name its directory with --runtime-dir",
            path.display()
        ))
    })?;
    let slots =
        if handoff.slots_given { handoff.slots.to_string() } else { "as many as it tells".to_string() };
    let models =
        if handoff.models.is_empty() { "as it tells".to_string() } else { handoff.models.join(", ") };
    screen.write(&format!(
        "{}: {} handed over in {} (slots: {slots}, models: {})\n",
        screen.paint(Tone::Good, &handoff.key().to_string()),
        handoff.url,
        path.display(),
        clean(&models)
    ));
    if let Err(why) = asked {
        screen.write(&format!(
            "{}\n",
            screen.paint(
                Tone::Warning,
                &format!("it gets no work before it answers {}: {}", handoff.health_path, clean(&why))
            )
        ));
    }
    Ok(())
}

/// The handoff as far as flags say it.
fn given(settings: &Settings, url: BaseUrl) -> Result<Handoff, Exit> {
    let slots = settings.get("slots", number(1, SLOTS_MAX.into()))?.and_then(|n| u32::try_from(n).ok());
    let pid = settings.get("pid", number(1, u64::from(u32::MAX >> 1)))?.and_then(|n| u32::try_from(n).ok());
    let text = |text: &str| Ok(text.to_string());
    let pid = match (pid, settings.get("container", text)?, settings.get("unit", text)?) {
        (pid, None, None) => pid,
        (None, Some(container), None) => Some(adopt_process::of_container(&container)?),
        (None, None, Some(unit)) => Some(adopt_process::of_unit(&unit)?),
        _ => return Err(Exit::usage("give one of --pid, --container and --unit")),
    };
    let start = match pid.map(machine::process) {
        Some(Some((false, start))) => Some(start),
        Some(_) => {
            return Err(Exit {
                code: EXIT_NOT_FOUND,
                message: "--pid: there is no such process".to_string(),
            });
        }
        None => None,
    };
    let models = settings.get("model", |text| {
        Ok(text.split(',').map(str::trim).filter(|name| !name.is_empty()).map(str::to_string).collect())
    })?;
    Ok(Handoff {
        pool_id: settings.need("pool", |text| PoolId::new(text).map_err(|why| why.to_string()))?,
        replica_id: settings.need("replica", |text| ReplicaId::new(text).map_err(|why| why.to_string()))?,
        url,
        engine: settings.get("engine", |text| Ok(text.to_string()))?.unwrap_or_default(),
        engine_version: None,
        slots: slots.unwrap_or(1),
        slots_given: slots.is_some(),
        slots_free: slots.unwrap_or(1),
        ready: true,
        device_mask: settings.get("gpu", |text| Ok(text.to_string()))?,
        models: models.unwrap_or_default(),
        model_bytes: None,
        pid,
        pid_start: start,
        boot_id: pid.and_then(|_| machine::boot_id()),
        pid_ns: pid.and_then(|_| machine::pid_namespace()),
        generation: 0,
        health_path: settings.need("health-path", |text| Ok(text.to_string()))?,
        auth_file: settings.get("auth-file", |text| Ok(text.to_string()))?,
    })
}

/// What an engine says of itself.
#[derive(Debug, Default, PartialEq, Eq)]
struct About {
    models: Vec<String>,
    slots: Option<u32>,
    engine: Option<&'static str>,
}

/// Asks `/v1/models` and `/props`. An engine may not know the second one.
fn ask(handoff: &Handoff, files: Files) -> Result<About, String> {
    let key = handoff.auth_file.as_deref().map(probe::read_key).transpose()?;
    let bearer = key.map(|key| format!("Bearer {key}"));
    let engine = Remote::stranger(handoff.url.clone(), bearer, ASK_TIMEOUT, files);
    let told = |exit: Exit| match exit.code {
        EXIT_UNREACHABLE => format!("{} does not answer yet", handoff.url),
        _ => exit.message,
    };
    let (status, models) = engine.ask("GET", "/v1/models", None).map_err(told)?;
    if status != 200 {
        return Err(format!("{}: /v1/models is answered {status}", handoff.url));
    }
    let props = engine.ask("GET", "/props", None).map_err(told)?;
    Ok(understood(&models, Some(&props.1).filter(|_| props.0 == 200)))
}

fn understood(models: &Value, props: Option<&Value>) -> About {
    let listed = models["data"].as_array().map_or(&[][..], Vec::as_slice);
    let owner = |name: &str| listed.iter().any(|model| model["owned_by"] == name);
    let slots = props.and_then(|props| props["total_slots"].as_u64());
    let engine = if props.is_some_and(|props| props["default_generation_settings"].is_object()) {
        Some("llamacpp")
    } else {
        ["vllm", "sglang", "llamacpp"].into_iter().find(|name| owner(name))
    };
    About {
        models: listed.iter().filter_map(|model| model["id"].as_str()).map(str::to_string).collect(),
        slots: slots.and_then(|n| u32::try_from(n).ok()).filter(|n| (1..=SLOTS_MAX).contains(n)),
        engine,
    }
}

/// Adds what the engine said where flags said nothing.
fn complete(handoff: &mut Handoff, settings: &Settings, about: Option<&About>) {
    if !settings.given("model")
        && let Some(about) = about
    {
        handoff.models = about.models.clone();
    }
    if !handoff.slots_given
        && let Some(slots) = about.and_then(|about| about.slots)
    {
        (handoff.slots, handoff.slots_free, handoff.slots_given) = (slots, slots, true);
    }
    if handoff.engine.is_empty() {
        handoff.engine = about.and_then(|about| about.engine).unwrap_or("llamacpp").to_string();
    }
}

/// Files of the directory that name a replica, with what they say.
fn files_of(directory: &Path, key: &ReplicaKey) -> io::Result<Vec<(PathBuf, Handoff)>> {
    let mut found = Vec::new();
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(found),
        entries => entries?,
    };
    for entry in entries {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if name.starts_with('.') || !name.ends_with(".json") {
            continue;
        }
        // What cannot be read or understood names no replica.
        let Ok(bytes) = fs::read(&path) else { continue };
        if let Ok(HandoffFile::Engine(handoff)) = handoff::parse(&bytes)
            && handoff.key() == *key
        {
            found.push((path, *handoff));
        }
    }
    found.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(found)
}

/// Another engine's handoff is not replaced unasked.
fn refuse_others(directory: &Path, handoff: &Handoff) -> Result<(), Exit> {
    let found = files_of(directory, &handoff.key())
        .map_err(|error| Exit::runtime(format!("{}: {error}", directory.display())))?;
    match found.iter().find(|(_, known)| known.url != handoff.url) {
        None => Ok(()),
        Some((path, known)) => Err(Exit {
            code: EXIT_REFUSED,
            message: format!(
                "{} is {} already, in {}; choose another --replica, withdraw it first, or say --replace",
                handoff.key(),
                known.url,
                path.display()
            ),
        }),
    }
}

/// Writes a file beside its place, flushes it, and renames it. Written by root it belongs to whom the
/// directory belongs to, who must be able to read it.
fn write(directory: &Path, name: &str, bytes: &[u8]) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o750).create(directory)?;
    let temporary = directory.join(format!(".{name}.{}", std::process::id()));
    let _ = fs::remove_file(&temporary);
    let written = || {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o640).open(&temporary)?;
        let owner = fs::metadata(directory)?;
        if rustix::process::geteuid().is_root() && owner.uid() != 0 {
            fchown(&file, Some(owner.uid()), Some(owner.gid()))?;
        }
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, directory.join(name))?;
        File::open(directory)?.sync_all()
    };
    written().inspect_err(|_| {
        let _ = fs::remove_file(&temporary);
    })
}

/// Runs `llorch withdraw`.
pub(super) fn run_withdraw(args: Vec<OsString>) -> Result<(), Exit> {
    let env = |name: &str| std::env::var_os(name);
    let settings =
        Settings::read_words("llorch withdraw", WITHDRAW_ABOUT, WITHDRAW_TABLE, REPLICA, args, env)?;
    let name = settings.rest[0].to_string_lossy().into_owned();
    let key = name
        .split_once('/')
        .and_then(|(pool, replica)| {
            Some(ReplicaKey { pool: PoolId::new(pool).ok()?, replica: ReplicaId::new(replica).ok()? })
        })
        .ok_or_else(|| {
            Exit::usage(format!("{name:?}: a replica is named POOL/REPLICA, such as default/r0"))
        })?;
    let directory = runtime_dir(&settings)?;
    let found = files_of(&directory, &key)
        .map_err(|error| Exit::runtime(format!("{}: {error}", directory.display())))?;
    if found.is_empty() {
        return Err(Exit {
            code: EXIT_NOT_FOUND,
            message: format!(
                "no handoff in {} names {key}; is it the daemon's directory (--runtime-dir)? An agent that deletes accepted handoffs is told by DELETE /v2/pools/{}/replicas/{}",
                directory.display(),
                key.pool,
                key.replica
            ),
        });
    }
    for (path, handoff) in found {
        fs::remove_file(&path)
            .map_err(|error| Exit::runtime(format!("cannot remove {}: {error}", path.display())))?;
        Screen::new().write(&format!("{key}: {} withdrawn, {} removed\n", handoff.url, path.display()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn engines_are_known_by_what_they_say() {
        let models = json!({"data": [{"id": "m", "owned_by": "vllm"}, {"id": "lora", "owned_by": "vllm"}]});
        let about = understood(&models, None);
        assert_eq!((about.models.len(), about.slots, about.engine), (2, None, Some("vllm")));
        let props = json!({"total_slots": 4, "default_generation_settings": {"n_ctx": 1}});
        let about = understood(&json!({"data": [{"id": "m"}]}), Some(&props));
        assert_eq!(
            (about.models, about.slots, about.engine),
            (vec!["m".to_string()], Some(4), Some("llamacpp"))
        );
        assert_eq!(understood(&json!("<html>"), Some(&json!({"total_slots": 0}))), About::default());
    }

    #[test]
    fn a_file_is_written_as_a_whole_and_closed_to_others() {
        let root = tempfile::tempdir().expect("a directory");
        let directory = root.path().join("engines");
        write(&directory, "a.json", b"{}").expect("written");
        let metadata = fs::metadata(directory.join("a.json")).expect("there");
        assert_eq!(metadata.mode() & 0o777 & !0o640, 0);
        assert_eq!(fs::read_dir(&directory).expect("listed").count(), 1, "nothing else");
        // Root writes for whoever the directory belongs to.
        if rustix::process::geteuid().is_root() {
            std::os::unix::fs::chown(&directory, Some(4_711), Some(4_712)).expect("given away");
            write(&directory, "a.json", b"{}").expect("written");
            let metadata = fs::metadata(directory.join("a.json")).expect("there");
            assert_eq!((metadata.uid(), metadata.gid()), (4_711, 4_712));
        }
    }
}
