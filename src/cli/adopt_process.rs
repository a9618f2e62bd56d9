//! The process behind an engine that something else runs: a container's, or a systemd unit's.
//!
//! Whoever runs it is asked by its own command: `docker inspect`, `systemctl show`. What they know changes with
//! every start, so the answer holds for the engine that runs now.

use std::ffi::OsStr;
use std::path::Path;
use std::process::{Command, Stdio};

use super::remote::EXIT_NOT_FOUND;
use crate::settings::Exit;

/// Longest word that an error repeats of a command's own, in characters.
const SAID_CHARS_MAX: usize = 300;

/// The main process of a container on this machine. `container` is its name or id, or the path of a file that
/// holds the id, as `docker run --cidfile` writes it.
///
/// # Errors
/// [`Exit`] where there is none, or it does not run.
pub(super) fn of_container(container: &str) -> Result<u32, Exit> {
    let id = match container.starts_with(['/', '.']) {
        true => std::fs::read_to_string(Path::new(container))
            .map_err(|error| Exit::config(format!("--container: cannot read {container}: {error}")))?,
        false => container.to_string(),
    };
    let id = word("--container", id.trim())?;
    let said = ask("docker", &["inspect", "--format", "{{.State.Pid}}", id])?;
    running(&said, &format!("container {id} does not run: docker start {id}"))
}

/// The main process of a systemd unit.
///
/// # Errors
/// [`Exit`] where there is none.
pub(super) fn of_unit(unit: &str) -> Result<u32, Exit> {
    let unit = word("--unit", unit)?;
    let said = ask("systemctl", &["show", "--property=MainPID", "--value", unit])?;
    running(&said, &format!("unit {unit} does not run: systemctl start {unit}"))
}

/// A name that no command takes for an option.
fn word<'a>(flag: &str, text: &'a str) -> Result<&'a str, Exit> {
    let is_bad =
        text.is_empty() || text.starts_with('-') || text.contains(|c: char| c.is_control() || c == ' ');
    match is_bad {
        true => Err(Exit::usage(format!("{flag}: {text:?} is no name"))),
        false => Ok(text),
    }
}

fn ask(program: &str, args: &[&str]) -> Result<String, Exit> {
    let output = Command::new(OsStr::new(program)).args(args).stdin(Stdio::null()).output();
    let output = output.map_err(|error| {
        Exit::runtime(format!("cannot run {program}: {error}; install it, or give the process with --pid"))
    })?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let said: String = said.trim().chars().filter(|c| !c.is_control()).take(SAID_CHARS_MAX).collect();
        return Err(Exit { code: EXIT_NOT_FOUND, message: format!("{program} {}: {said}", args.join(" ")) });
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_string())
}

/// 0 is what both say of what does not run.
fn running(said: &str, otherwise: &str) -> Result<u32, Exit> {
    match said.parse::<u32>() {
        Ok(pid) if pid > 0 => Ok(pid),
        _ => Err(Exit { code: EXIT_NOT_FOUND, message: otherwise.to_string() }),
    }
}
