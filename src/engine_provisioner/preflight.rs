//! What is looked at before anything is started: program, port, model, directories, GPUs.
//!
//! Whatever can be known to fail is refused here, with what to do about it, and nothing has happened yet. What
//! costs nothing is looked at for all engines before the first model is fetched.

use std::fs;
use std::io;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::devices::{self, Gpu};
use super::gpus;
use super::options::{Options, Orphans};
use super::plan::{Config, HOST, Plan};
use super::provide::{Effort, Provider};
use super::publish::{create_directory, refuse_a_living_predecessor};
use crate::replicas::probe;
use crate::replicas::profile::Engine as Profile;
use crate::service::machine;
use crate::settings::Exit;

/// Room that handoffs, logs and state need at least, in bytes: a full disk is found out about before an
/// engine was loaded for minutes.
const DISK_BYTES_MIN: u64 = 1 << 20;

/// Engines whose models are fetched at the same time: each fetch has several connections, and all share one line.
const FILLS_AT_ONCE: usize = 4;

/// Engines that may be started.
#[derive(Debug)]
pub(super) struct Prepared {
    /// Each with its model found.
    pub(super) configs: Vec<Config>,
    /// Memory of GPUs that nobody uses, where there is a driver: the least of what any engine's GPUs have.
    pub(super) free_vram_bytes: Option<u64>,
    /// Whether those that did not change are replaced too.
    pub(super) replace_all: bool,
}

/// How thoroughly it is looked.
#[derive(Clone, Copy)]
pub(super) struct How<'a> {
    /// Where relative paths of models count from.
    pub(super) base: &'a Path,
    /// Words that make this executable an engine-provisioner.
    pub(super) prefix: &'a [std::ffi::OsString],
    /// Nothing of it runs yet.
    pub(super) is_first: bool,
    /// Whether what is not here is fetched.
    pub(super) effort: Effort,
    /// Stops what takes long.
    pub(super) cancel: &'a Arc<AtomicBool>,
    /// Called when all that costs nothing was looked at, and what takes long begins.
    pub(super) on_looked: &'a (dyn Fn() + Sync),
}

/// Looks at everything, and gets what has to be got.
///
/// # Errors
/// [`Exit`] for the first thing that cannot work.
pub(super) fn prepare(
    mut configs: Vec<Config>,
    options: &Options,
    provider: &Provider,
    how: How<'_>,
) -> Result<Prepared, Exit> {
    for (at, config) in configs.iter().enumerate() {
        if let Some(other) = configs[..at].iter().find(|other| other.port == config.port && config.port != 0)
        {
            return Err(Exit::config(format!(
                "{} and {} have the same port {}: give each its own, or none",
                other.key(),
                config.key(),
                config.port
            )));
        }
    }
    for config in &mut configs {
        if config.source.is_none() {
            find_program(config)?;
        }
        if let Some(file) = &config.auth_file {
            probe::read_key(file).map_err(|why| Exit::config(format!("{}: {why}", config.key())))?;
        }
        if how.is_first {
            let port = choose_port(config.port)?;
            if options.orphans == Orphans::End {
                refuse_a_living_predecessor(&Plan::new(config, port)?.handoff_file)?;
            }
        }
    }
    is_usable(&options.handoff_dir, "--handoff-dir")?;
    if configs.iter().any(|config| config.log_file.parent() == Some(&options.log_dir)) {
        is_usable(&options.log_dir, "--log-dir")?;
    }
    let needs_gpus = options.require_gpu || configs.iter().any(devices::concern);
    let inherited = std::env::var("CUDA_VISIBLE_DEVICES").ok();
    // Devices that do not exist are found out about before, models that do not fit after they are here.
    let found: Result<Vec<Gpu>, String> = match needs_gpus {
        true => gpus::read(how.prefix),
        false => Err("nobody asked".into()),
    };
    let check = |configs: &[Config]| match needs_gpus {
        true => configs
            .iter()
            .try_for_each(|config| devices::check(config, &found, options.require_gpu, inherited.as_deref()))
            .map_err(Exit::config),
        false => Ok(()),
    };
    check(&configs)?;
    (how.on_looked)();
    fill_all(&mut configs, provider, how)?;
    for config in &configs {
        let program = match (&config.source, &config.program) {
            (Some(_), None) => continue,
            (Some(_), Some(program)) => program.clone(),
            (None, _) => find_program(config)?,
        };
        let is_llama = Profile::named(&config.engine) == Profile::LlamaCpp;
        if options.require_gpu && is_llama && gpus::lists_devices(&program) == Some(false) {
            return Err(Exit::config(format!(
                "GPU-only enforcement: {} was built for the CPU alone; build it with -DGGML_CUDA=ON, or lift the rule for a test with --allow-cpu",
                program.display()
            )));
        }
    }
    check(&configs)?;
    let masked = configs.iter().filter(|config| config.device_mask.is_some());
    let free_vram_bytes =
        found.as_ref().ok().and_then(|gpus| masked.map(|config| devices::free_bytes(config, gpus)).min());
    Ok(Prepared { configs, free_vram_bytes, replace_all: false })
}

/// Gets what engines need, some of them at once. The first that fails ends the others, which keep what they have
/// fetched so far.
fn fill_all(configs: &mut [Config], provider: &Provider, how: How<'_>) -> Result<(), Exit> {
    let helpers = configs.len().min(FILLS_AT_ONCE) - usize::from(!configs.is_empty());
    let (left, failed) = (Mutex::new(configs.iter_mut()), Mutex::new(None));
    let work = || {
        loop {
            let next = left.lock().unwrap_or_else(PoisonError::into_inner).next();
            let Some(config) = next.filter(|_| !how.cancel.load(Ordering::Relaxed)) else { return };
            if let Err(exit) = provider.fill(config, how.base, how.effort, how.cancel) {
                failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(exit);
                how.cancel.store(true, Ordering::Relaxed);
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..helpers {
            // Without one there are the others, and this thread.
            let _ = std::thread::Builder::new().name("fetch".into()).spawn_scoped(scope, work);
        }
        work();
    });
    let is_cancelled = how.cancel.load(Ordering::Relaxed);
    match failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(exit) => Err(exit),
        None if is_cancelled => Err(Exit::runtime("it was stopped")),
        None => Ok(()),
    }
}

/// The program as the kernel would find it.
fn find_program(config: &Config) -> Result<PathBuf, Exit> {
    let word = config.command.first().cloned().unwrap_or_default();
    let shown = word.to_string_lossy().into_owned();
    let is_executable = |path: &Path| {
        fs::metadata(path).is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0)
    };
    let path = PathBuf::from(&word);
    if shown.contains('/') {
        return match fs::metadata(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Err(Exit::runtime(format!("the engine's program {shown:?} does not exist: correct its path")))
            }
            _ if is_executable(&path) => Ok(path),
            _ => Err(Exit::runtime(format!(
                "the engine's program {shown:?} may not be executed: it needs to be a file with mode +x"
            ))),
        };
    }
    let directories = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&directories).map(|directory| directory.join(&path)).find(|path| is_executable(path)).ok_or_else(
        || {
            Exit::runtime(format!(
                "the engine's program {shown:?} does not exist or is not in PATH: install it, or give its path"
            ))
        },
    )
}

/// Whether files can be written there; `flag` names another place.
fn is_usable(directory: &Path, flag: &str) -> Result<(), Exit> {
    create_directory(directory)
        .map_err(|exit| Exit { message: format!("{}; give another {flag}", exit.message), ..exit })?;
    let shown = directory.display();
    let trial = directory.join(format!(".trial.{}", std::process::id()));
    let tried = fs::write(&trial, b"{}");
    let _ = fs::remove_file(&trial);
    if let Err(error) = tried {
        let advice = match error.kind() {
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
                format!("give this user the right to write there, or another {flag}")
            }
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                format!("make room, or give another {flag}")
            }
            _ => format!("give another {flag}"),
        };
        return Err(Exit::runtime(format!("cannot write in {shown}: {error}; {advice}")));
    }
    let free = rustix::fs::statvfs(directory).map_or(u64::MAX, |disk| disk.f_bavail * disk.f_frsize);
    if free < DISK_BYTES_MIN {
        return Err(Exit::runtime(format!(
            "the disk of {shown} is full ({free} bytes are left): make room, or give another {flag}"
        )));
    }
    Ok(())
}

/// A port that is free right now. It may be gone when the engine asks for it; the engine is then started
/// again with another one.
pub(super) fn choose_port(wanted: u16) -> Result<u16, Exit> {
    let listener = match wanted {
        0 => machine::listen_on_free_port(),
        wanted => TcpListener::bind((HOST, wanted)),
    };
    let bound = listener.and_then(|listener| listener.local_addr());
    bound.map(|address| address.port()).map_err(|error| match error.kind() {
        io::ErrorKind::AddrInUse => Exit::runtime(format!(
            "port {wanted} is already in use: stop what listens there, or give --port 0 for a free one"
        )),
        _ => Exit::runtime(format!("cannot use port {wanted}: {error}")),
    })
}

/// Memory of this machine that can be had without swapping, in bytes.
pub(super) fn available_memory() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("MemAvailable:"))?;
    Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? * 1024)
}
