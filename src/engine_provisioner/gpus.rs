//! What the NVIDIA driver says about GPUs, asked by a process of its own.
//!
//! The driver's library is large, and a call into it may hang. A process that asks once and ends costs this
//! program no memory, and can be left alone when it does not answer.

use std::ffi::OsString;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nvml_wrapper::Nvml;

use super::devices::Gpu;
use crate::settings::Exit;

/// First word of the asking process's command line.
pub(super) const COMMAND: &str = "list-gpus";
/// How long it may take: a driver that is not loaded yet takes seconds.
const LIMIT: Duration = Duration::from_secs(15);
/// Longest answer, in bytes: dozens of GPUs.
const ANSWER_BYTES_MAX: usize = 64 * 1024;

/// Prints the GPUs as JSON; this is the asking process.
///
/// # Errors
/// [`Exit`] with why there are none.
#[allow(clippy::print_stdout, reason = "its parent reads it")]
pub(super) fn print() -> Result<(), Exit> {
    let gpus = list().map_err(Exit::runtime)?;
    println!("{}", serde_json::to_string(&gpus).map_err(|error| Exit::runtime(error.to_string()))?);
    Ok(())
}

fn list() -> Result<Vec<Gpu>, String> {
    let nvml = Nvml::init().map_err(|error| format!("no NVIDIA driver: {error}"))?;
    let count = nvml.device_count().map_err(|error| error.to_string())?;
    let mut gpus = Vec::new();
    for index in 0..count {
        let read = || {
            let device = nvml.device_by_index(index)?;
            let memory = device.memory_info()?;
            Ok::<Gpu, nvml_wrapper::error::NvmlError>(Gpu {
                index,
                uuid: device.uuid()?,
                name: device.name()?,
                memory_bytes: memory.total,
                free_bytes: memory.free,
            })
        };
        // One that is broken is as good as absent.
        gpus.extend(read().ok());
    }
    Ok(gpus)
}

/// Asks such a process; `prefix` are the words that make this executable an engine-provisioner.
///
/// # Errors
/// Why nothing is known about GPUs.
pub(super) fn read(prefix: &[OsString]) -> Result<Vec<Gpu>, String> {
    let program = std::env::current_exe().map_err(|error| error.to_string())?;
    let mut words = prefix.to_vec();
    words.push(COMMAND.into());
    let (success, answer) = ask(Command::new(program).args(words), LIMIT)?;
    if success {
        serde_json::from_str(&answer).map_err(|error| format!("the driver's answer is not usable: {error}"))
    } else {
        Err(answer.trim().trim_start_matches("engine-provisioner: ").to_string())
    }
}

/// Runs a command that answers and ends: whether it succeeded, and all that it printed. One that takes longer
/// than `limit` is killed.
///
/// # Errors
/// It could not be run, or took too long.
pub(super) fn ask(command: &mut Command, limit: Duration) -> Result<(bool, String), String> {
    let deadline = Instant::now() + limit;
    let (mut ours, theirs) = UnixStream::pair().map_err(|error| error.to_string())?;
    let out = || theirs.try_clone().map(|end| Stdio::from(OwnedFd::from(end))).map_err(|e| e.to_string());
    let mut child = command
        .stdin(Stdio::null())
        .stdout(out()?)
        .stderr(out()?)
        .spawn()
        .map_err(|error| format!("cannot be run: {error}"))?;
    // The command holds the other ends, too: without this the answer would have no end.
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    drop(theirs);
    let mut answer = Vec::new();
    let mut buffer = [0; 4096];
    let is_over = loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() || answer.len() > ANSWER_BYTES_MAX || ours.set_read_timeout(Some(left)).is_err() {
            break false;
        }
        match ours.read(&mut buffer) {
            Ok(0) => break true,
            Ok(length) => answer.extend_from_slice(&buffer[..length]),
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(_) => break false,
        }
    };
    if !is_over {
        let _ = child.kill();
    }
    let status = child.wait().map_err(|error| error.to_string())?;
    if is_over {
        Ok((status.success(), String::from_utf8_lossy(&answer).into_owned()))
    } else {
        Err(format!("no answer within {} s", limit.as_secs()))
    }
}

/// Whether an engine's binary computes on GPUs at all, as llama-server tells it; `None` where it does not.
pub(super) fn lists_devices(program: &std::path::Path) -> Option<bool> {
    let (_, answer) = ask(Command::new(program).arg("--list-devices"), LIMIT).ok()?;
    let mut lines = answer.lines().skip_while(|line| !line.starts_with("Available devices"));
    lines.next()?;
    Some(lines.any(|line| line.starts_with(' ') && line.contains(':')))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_has_an_end_and_silence_a_limit() {
        let (success, answer) =
            ask(Command::new("sh").args(["-c", "echo a; echo b >&2"]), LIMIT).expect("it answers");
        assert!(success && answer.contains('a') && answer.contains('b'), "{answer}");
        let error = ask(Command::new("sleep").arg("600"), Duration::from_millis(50)).expect_err("silent");
        assert!(error.contains("no answer"), "{error}");
    }

    #[test]
    fn a_build_without_devices_is_recognised() {
        let root = tempfile::tempdir().expect("a directory");
        let script = |name: &str, text: &str| {
            let path = root.path().join(name);
            std::fs::write(&path, format!("#!/bin/sh\n{text}\n")).expect("written");
            std::os::unix::fs::PermissionsExt::set_mode(
                &mut std::fs::metadata(&path).expect("there").permissions(),
                0o755,
            );
            let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
            std::fs::set_permissions(&path, mode).expect("executable");
            path
        };
        assert_eq!(lists_devices(&script("cpu", "echo 'Available devices:'")), Some(false));
        let cuda = "echo 'Available devices:'; echo '  CUDA0: NVIDIA H100 (80000 MiB, 79000 MiB free)'";
        assert_eq!(lists_devices(&script("cuda", cuda)), Some(true));
        assert_eq!(lists_devices(&script("other", "echo usage; exit 2")), None);
    }
}
