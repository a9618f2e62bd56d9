//! Engines in containers: the process that counts is not the client that was started.
//!
//! `docker run` in the foreground is a client. It passes SIGTERM on and ends with its container, but the engine
//! is the container's main process, a child of somebody else. So the client is told to write down the container's
//! id, that is asked for its main process, and the handoff names that one: whoever watches it sees the engine's
//! own end. A killed client leaves its container running, which is then killed by its id. Names are never used
//! for that: they may be somebody else's.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::{Value, json};

use super::docker_run::TOOLS;
use super::gpus::ask;

/// How long such a program may take for an answer.
const LIMIT: Duration = Duration::from_secs(10);
/// Pause between two questions: an image may have to be fetched first.
const ASK_EVERY: Duration = Duration::from_millis(100);

/// The container of an engine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Container {
    /// Whom to ask about it.
    pub(super) tool: OsString,
    /// The file to which its id is written, or its name.
    by: By,
    /// The file is of this instance alone, and goes with it.
    is_own_file: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum By {
    IdFile(PathBuf),
    Name(String),
}

impl Container {
    /// The container that `command` runs, if it does. `given` names it (a name, an id, or the path of a file with
    /// its id); where nobody does, the command is told to write its id to `own_file`.
    pub(super) fn of(
        command: &mut Vec<OsString>,
        given: Option<&str>,
        own_file: PathBuf,
    ) -> Option<Container> {
        let first = command.first().cloned().unwrap_or_default();
        let is_tool =
            Path::new(&first).file_name().and_then(OsStr::to_str).is_some_and(|name| TOOLS.contains(&name));
        let tool = if is_tool { first } else { TOOLS[0].into() };
        let container = |by, is_own_file| Some(Container { tool: tool.clone(), by, is_own_file });
        match given {
            Some(path) if path.starts_with(['/', '.']) => return container(By::IdFile(path.into()), false),
            Some(name) => return container(By::Name(name.into()), false),
            None => {}
        }
        let run = command.iter().position(|word| word == "run").filter(|_| is_tool)?;
        let mut words = command[run..].iter().filter_map(|word| word.to_str());
        while let Some(word) = words.next() {
            let path = match word.strip_prefix("--cidfile") {
                Some("") => words.next(),
                Some(rest) => rest.strip_prefix('='),
                None => continue,
            };
            return container(By::IdFile(path?.into()), false);
        }
        let mut flag = OsString::from("--cidfile=");
        flag.push(&own_file);
        command.insert(run + 1, flag);
        // Of an earlier process with this number: the client refuses to write over it.
        let _ = fs::remove_file(&own_file);
        container(By::IdFile(own_file), true)
    }

    /// As it is written down.
    pub(super) fn to_value(&self) -> Value {
        let (id_file, name) = match &self.by {
            By::IdFile(path) => (path.to_str(), None),
            By::Name(name) => (None, Some(name)),
        };
        let tool = self.tool.to_string_lossy();
        json!({"tool": tool, "id_file": id_file, "name": name, "is_own_file": self.is_own_file})
    }

    /// One that was written down.
    pub(super) fn from_value(value: &Value) -> Option<Container> {
        let by = match (value["id_file"].as_str(), value["name"].as_str()) {
            (Some(path), _) => By::IdFile(path.into()),
            (None, name) => By::Name(name?.into()),
        };
        let is_own_file = value["is_own_file"].as_bool()?;
        Some(Container { tool: value["tool"].as_str()?.into(), by, is_own_file })
    }

    /// The container's main process.
    ///
    /// # Errors
    /// Why it is not known yet.
    fn process(&self) -> Result<u32, String> {
        let id = match &self.by {
            By::Name(name) => name.clone(),
            By::IdFile(path) => self.id().ok_or_else(|| format!("{} holds no id yet", path.display()))?,
        };
        let mut command = Command::new(&self.tool);
        let (success, said) = ask(command.args(["inspect", "--format", "{{.State.Pid}}", &id]), LIMIT)?;
        match said.trim().parse::<u32>() {
            Ok(pid) if success && pid > 0 => Ok(pid),
            _ => Err(format!("{} says {:?} of it", self.tool.to_string_lossy(), said.trim())),
        }
    }

    /// Asks until the main process is known, or `stop` is set.
    pub(super) fn find(&self, stop: &AtomicBool) -> Option<u32> {
        let mut told = None;
        while !stop.load(Ordering::Relaxed) {
            match self.process() {
                Ok(pid) => return Some(pid),
                Err(why) if told.as_ref() != Some(&why) => {
                    log::debug!("the container's main process: {why}");
                    told = Some(why);
                }
                Err(_) => {}
            }
            std::thread::sleep(ASK_EVERY);
        }
        None
    }

    /// Its id, where the client has written it: only then is it certain that the container is this instance's.
    pub(super) fn id(&self) -> Option<String> {
        self.id_file().and_then(id_in)
    }

    /// The file that holds its id.
    pub(super) fn id_file(&self) -> Option<&Path> {
        match &self.by {
            By::IdFile(path) => Some(path),
            By::Name(_) => None,
        }
    }

    /// Nobody asks for it any more.
    pub(super) fn forget(&self) {
        if let (By::IdFile(path), true) = (&self.by, self.is_own_file) {
            let _ = fs::remove_file(path);
        }
    }
}

/// The id that a client has written to a file.
pub(super) fn id_in(path: &Path) -> Option<String> {
    let id = fs::read_to_string(path).ok()?.trim().to_string();
    let is_id = !id.is_empty() && id.bytes().all(|byte| byte.is_ascii_alphanumeric());
    is_id.then_some(id)
}

/// Kills a container, for whom its client cannot any more.
pub(super) fn kill(tool: &OsStr, id: &str) {
    // One that has ended already is none.
    let _ = ask(Command::new(tool).args(["kill", id]), LIMIT);
}

/// What is known of an instance's container.
pub(super) struct Contained {
    pub(super) container: Container,
    /// Its main process, once that is known.
    pub(super) pid: Option<u32>,
    /// Ends the search for it.
    pub(super) stop: Arc<AtomicBool>,
}

impl Drop for Contained {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(command: &str, given: Option<&str>) -> (String, Option<Container>) {
        let mut words: Vec<OsString> = command.split(' ').map(OsString::from).collect();
        let container = Container::of(&mut words, given, "/run/own.cid".into());
        let words: Vec<_> = words.iter().map(|word| word.to_string_lossy()).collect();
        (words.join(" "), container)
    }

    #[test]
    fn a_client_is_told_where_to_write_the_containers_id() {
        let (command, container) = of("/usr/bin/docker run --rm --name x image --port 1", None);
        assert_eq!(command, "/usr/bin/docker run --cidfile=/run/own.cid --rm --name x image --port 1");
        let container = container.expect("a container");
        assert_eq!((container.tool.to_str(), container.is_own_file), (Some("/usr/bin/docker"), true));
        for (command, file) in
            [("podman run --cidfile /a image", "/a"), ("docker run --cidfile=b image", "b")]
        {
            let (unchanged, container) = of(command, None);
            assert_eq!(unchanged, command);
            assert_eq!(container.expect("a container").by, By::IdFile(file.into()));
        }
        for other in ["llama-server run", "docker start x", "docker run --cidfile"] {
            assert_eq!(of(other, None), (other.to_string(), None));
        }
    }

    #[test]
    fn what_is_written_down_is_read_as_it_was() {
        for (command, given) in
            [("podman run image", None), ("x", Some("vllm")), ("docker start x", Some("/a b"))]
        {
            let (_, container) = of(command, given);
            let container = container.expect("a container");
            assert_eq!(Container::from_value(&container.to_value()), Some(container));
        }
        assert_eq!(Container::from_value(&Value::Null), None);
    }

    #[test]
    fn a_container_that_is_named_is_asked_for_and_never_killed_by_its_name() {
        let (command, container) = of("./start.sh x", Some("vllm"));
        let container = container.expect("a container");
        assert_eq!((command.as_str(), container.id()), ("./start.sh x", None));
        assert_eq!((container.by, container.tool.to_str()), (By::Name("vllm".into()), Some("docker")));
        let (_, container) = of("podman start -a x", Some("/run/x.cid"));
        let container = container.expect("a container");
        assert_eq!((container.by, container.is_own_file), (By::IdFile("/run/x.cid".into()), false));
    }
}
