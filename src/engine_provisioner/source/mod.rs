//! Where an engine's program comes from: a path, the search path, or its source.
//!
//! A build is kept under a name made of its commit and its recipe, and used again for as long as it is
//! there. Two processes that want the same build build it once: the second waits for the lock. What
//! git, cmake and the compilers print goes into a log, whose end is in the error when they fail. A build
//! says by a file of its own that it is whole, so that one which was interrupted is never taken for one;
//! it is not moved, because programs remember where the libraries beside them were built.
//!
//! [`plan`] is pure and says what to run; this runs it. Blocking, for a helper thread.

use std::ffi::OsStr;
use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};
use rustix::process::{Pid, Signal};

use super::models::Digest;
use crate::settings::Exit;

pub mod command;
pub mod plan;

pub use plan::{HostCompiler, SourceSpec};

/// Pause between attempts to get a lock, and between looks at whether to stop.
const PAUSE: Duration = Duration::from_millis(100);
/// Lines of the log that an error shows.
const TAIL_LINES: usize = 15;
/// Longest line shown of them, in characters.
const LINE_CHARS_MAX: usize = 300;
/// Longest line that is read at once from what is printed, in bytes.
const LINE_BYTES_MAX: usize = 64 << 10;
/// Where CUDA is installed, beside what variables say.
const CUDA_ROOTS: [&str; 3] = ["/opt/cuda", "/usr/local/cuda", "/usr/lib/cuda"];
/// Compilers that CUDA accepts longer than the newest: tried once, in this order.
const HOST_COMPILERS: [(&str, &str); 4] =
    [("gcc-13", "g++-13"), ("gcc-12", "g++-12"), ("clang", "clang++"), ("gcc-11", "g++-11")];

/// What an operator says about where the program is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Binary {
    /// A path, or a name to be found on the search path.
    Named(String),
    /// To be built.
    Source(SourceSpec),
}

/// A program that is here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Program {
    /// Where.
    pub path: PathBuf,
    /// What it is called in a handoff; known for what was built.
    pub version: Option<String>,
    /// Whether it was built just now.
    pub built: bool,
}

/// What happens meanwhile.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step<'a> {
    /// Another process builds the same; this one waits.
    Waiting,
    /// A step begins.
    Began(&'a str),
    /// So much of it is done, in percent.
    Percent(u8),
    /// It is tried once more with another compiler.
    Retrying(&'a str),
}

/// Why there is no program: one line that says what to do, and below it the end of a log.
#[derive(Debug, PartialEq, Eq)]
pub enum SourceError {
    /// What was asked for cannot be meant, or a tool is missing.
    Request(String),
    /// A step failed.
    Failed(String),
    /// The caller asked to stop.
    Cancelled,
}

impl fmt::Display for SourceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SourceError::Request(text) | SourceError::Failed(text) => f.write_str(text),
            SourceError::Cancelled => f.write_str("the build was stopped: run it again to begin anew"),
        }
    }
}

impl std::error::Error for SourceError {}

impl From<SourceError> for Exit {
    fn from(error: SourceError) -> Exit {
        match error {
            SourceError::Request(text) => Exit::config(text),
            error => Exit::runtime(error.to_string()),
        }
    }
}

/// Finds or builds it. `directory` keeps sources and builds; `env` reads the environment.
///
/// # Errors
/// [`SourceError`].
pub fn provide(
    binary: &Binary,
    directory: &Path,
    env: &dyn Fn(&str) -> Option<std::ffi::OsString>,
    cancel: &AtomicBool,
    tell: &mut dyn FnMut(Step<'_>),
) -> Result<Program, SourceError> {
    match binary {
        Binary::Named(name) => find_program(name, env("PATH").as_deref()).map(|path| Program {
            path,
            version: None,
            built: false,
        }),
        Binary::Source(spec) => {
            spec.check().map_err(SourceError::Request)?;
            Build { spec, directory, env, cancel }.run(tell)
        }
    }
}

/// A program by its path, or by its name on the search path.
///
/// # Errors
/// [`SourceError::Request`] that says what is missing.
pub fn find_program(name: &str, search: Option<&OsStr>) -> Result<PathBuf, SourceError> {
    let request = |text: String| Err(SourceError::Request(text));
    let is_program = |path: &Path| {
        fs::metadata(path).is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
    };
    if name.contains('/') {
        let path = Path::new(name);
        return match fs::metadata(path) {
            Err(error) => {
                request(format!("there is no program {name} ({error}): give its path, or its name on PATH"))
            }
            Ok(_) if is_program(path) => {
                std::path::absolute(path).map_err(|e| SourceError::Request(e.to_string()))
            }
            Ok(_) => {
                request(format!("{name} is no program: make it executable (chmod +x), or give another path"))
            }
        };
    }
    let found = search.into_iter().flat_map(std::env::split_paths).map(|directory| directory.join(name));
    match found.into_iter().find(|path| is_program(path)) {
        Some(path) => Ok(path),
        None => request(format!(
            "there is no program {name:?} on PATH: install it, give its path, or build it from source"
        )),
    }
}

/// The root of CUDA: where variables say, where its compiler is on the search path, or where it usually is.
#[must_use]
pub fn cuda_root(env: &dyn Fn(&str) -> Option<std::ffi::OsString>) -> Option<PathBuf> {
    let has_compiler = |root: &PathBuf| root.join("bin/nvcc").is_file();
    let named =
        ["CUDAToolkit_ROOT", "CUDA_HOME", "CUDA_PATH"].iter().filter_map(|name| env(name)).map(PathBuf::from);
    // .../bin/nvcc
    let up_two = |path: PathBuf| Some(path.parent()?.parent()?.to_path_buf());
    let compiler = env("CUDACXX").map(PathBuf::from).filter(|path| path.is_absolute()).and_then(up_two);
    let on_path = find_program("nvcc", env("PATH").as_deref()).ok();
    let on_path = on_path.and_then(|path| fs::canonicalize(path).ok()).and_then(up_two);
    let mut versions: Vec<PathBuf> =
        fs::read_dir("/usr/local").into_iter().flatten().flatten().map(|e| e.path()).collect();
    versions.retain(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("cuda-")));
    versions.sort();
    let usual = CUDA_ROOTS.iter().map(PathBuf::from).chain(versions.into_iter().rev());
    named.chain(compiler).chain(on_path).chain(usual).find(has_compiler)
}

struct Build<'a> {
    spec: &'a SourceSpec,
    directory: &'a Path,
    env: &'a dyn Fn(&str) -> Option<std::ffi::OsString>,
    cancel: &'a AtomicBool,
}

impl Build<'_> {
    fn run(&self, tell: &mut dyn FnMut(Step<'_>)) -> Result<Program, SourceError> {
        let git = self.tool("git")?;
        let cmake = self.tool("cmake")?;
        let cuda = cuda_root(self.env);
        if self.spec.wants_cuda() && cuda.is_none() {
            return Err(SourceError::Request(
                "the build is to have CUDA, but there is no nvcc: install the CUDA toolkit or name its root in CUDAToolkit_ROOT, or leave -DGGML_CUDA=ON out".into(),
            ));
        }
        let key: String = Digest::of(self.spec.repository.as_bytes()).hex().chars().take(16).collect();
        let root = self.directory.join(&key);
        create(&root)?;
        let _lock = self.lock(&root.join("lock"), tell)?;
        let source = root.join("source");
        let log_path = root.join("build.log");
        let log = OpenOptions::new().create(true).write(true).truncate(true).mode(0o640).open(&log_path);
        let mut log = Log { file: log.map_err(|error| failed(&log_path, "write", &error))?, path: log_path };

        let commit = self.fetch(&git, &source, &mut log, tell)?;
        let recipe = Digest::of(self.spec.recipe().as_bytes()).hex();
        let name = format!("{}-{}", &commit[..commit.len().min(16)], &recipe[..16]);
        let place = root.join("builds").join(&name);
        let program = place.join("bin").join(&self.spec.target);
        let version = Some(self.spec.version());
        let complete = place.join(".complete");
        if complete.is_file() && program.is_file() {
            return Ok(Program { path: program, version, built: false });
        }
        if place.exists() {
            // An earlier build was interrupted, perhaps in the middle of writing an object.
            fs::remove_dir_all(&place).map_err(|error| failed(&place, "remove", &error))?;
        }
        create(&place)?;
        self.compile(&cmake, &source, &place, cuda.as_deref(), &mut log, tell)?;
        if !program.is_file() {
            // A project that does not say where programs go puts them beside its build files.
            let beside = place.join(&self.spec.target);
            if !beside.is_file() {
                return Err(log.failure(&format!(
                    "the build ended well but left no bin/{} behind: name another target",
                    self.spec.target
                )));
            }
            create(&place.join("bin"))?;
            fs::rename(&beside, &program).map_err(|error| failed(&beside, "move", &error))?;
        }
        fs::write(&complete, &commit).map_err(|error| failed(&complete, "write", &error))?;
        Ok(Program { path: program, version, built: true })
    }

    fn tool(&self, name: &str) -> Result<PathBuf, SourceError> {
        find_program(name, (self.env)("PATH").as_deref()).map_err(|_| {
            SourceError::Request(format!(
                "building needs {name}, which is not on PATH: install it, or give the path of an engine that is built already"
            ))
        })
    }

    fn lock(&self, path: &Path, tell: &mut dyn FnMut(Step<'_>)) -> Result<File, SourceError> {
        let opened = OpenOptions::new().write(true).create(true).truncate(false).mode(0o640).open(path);
        let file = opened.map_err(|error| failed(path, "lock", &error))?;
        let mut told = false;
        loop {
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(file),
                Err(rustix::io::Errno::WOULDBLOCK | rustix::io::Errno::INTR) => {
                    if !std::mem::replace(&mut told, true) {
                        tell(Step::Waiting);
                    }
                    if self.cancel.load(Ordering::Relaxed) {
                        return Err(SourceError::Cancelled);
                    }
                    thread::sleep(PAUSE);
                }
                Err(errno) => return Err(failed(path, "lock", &errno.into())),
            }
        }
    }

    /// Brings the revision into `source`, and says which commit it is.
    fn fetch(
        &self,
        git: &Path,
        source: &Path,
        log: &mut Log,
        tell: &mut dyn FnMut(Step<'_>),
    ) -> Result<String, SourceError> {
        let run = |words: &[&str], log: &mut Log| {
            let mut command = Command::new(git);
            command.arg("-C").arg(source).args(words);
            // A question that nobody answers would hang.
            command.env("GIT_TERMINAL_PROMPT", "0");
            command.env_remove("GIT_DIR").env_remove("GIT_WORK_TREE").env_remove("GIT_INDEX_FILE");
            self.perform(command, log, &mut |_| {})
        };
        if !source.join(".git").is_dir() {
            tell(Step::Began("git-clone"));
            create(source)?;
            run(&["init", "--quiet"], log)?.or_failure(log, "git cannot make a repository")?;
        }
        let spec = self.spec;
        // A commit that is here needs no network.
        let known = spec.revision.len() == 40
            && run(&["cat-file", "-e", &format!("{}^{{commit}}", spec.revision)], log)?.0;
        let target = if known {
            spec.revision.clone()
        } else {
            tell(Step::Began("git-fetch"));
            let fetched = run(
                &["fetch", "--quiet", "--depth", "1", "--force", "--", &spec.repository, &spec.revision],
                log,
            )?;
            fetched.or_failure(
                log,
                &format!(
                    "git cannot fetch {} of {}: check both, and the network",
                    spec.revision, spec.repository
                ),
            )?;
            "FETCH_HEAD".to_string()
        };
        run(&["checkout", "--quiet", "--force", "--detach", &target], log)?
            .or_failure(log, "git cannot check it out")?;
        if spec.submodules {
            run(&["submodule", "update", "--quiet", "--init", "--recursive", "--depth", "1"], log)?
                .or_failure(log, "git cannot fetch the submodules")?;
        }
        let head =
            Command::new(git).arg("-C").arg(source).args(["rev-parse", "HEAD"]).stdin(Stdio::null()).output();
        let head = head.map_err(|error| failed(git, "run", &error))?;
        let commit = String::from_utf8_lossy(&head.stdout).trim().to_string();
        match commit.len() >= 40 && commit.bytes().all(|b| b.is_ascii_hexdigit()) {
            true => Ok(commit),
            false => Err(log.failure("git does not say which commit it checked out")),
        }
    }

    /// Configures and builds; once more with another compiler where the first attempt fails.
    fn compile(
        &self,
        cmake: &Path,
        source: &Path,
        build: &Path,
        cuda: Option<&Path>,
        log: &mut Log,
        tell: &mut dyn FnMut(Step<'_>),
    ) -> Result<(), SourceError> {
        if plan::names_cublas(&self.spec.cmake_flags) {
            // Its cache may remember the old name, and then refuses the new one.
            let _ = fs::remove_file(build.join("CMakeCache.txt"));
        }
        let first = match self.attempt(cmake, source, build, cuda, None, log, tell) {
            Err(SourceError::Failed(message)) => message,
            other => return other,
        };
        let Some(host) = self.other_compiler() else {
            return Err(SourceError::Failed(first));
        };
        tell(Step::Retrying(&host.cxx.display().to_string()));
        // A compiler cannot be exchanged within a configuration.
        fs::remove_dir_all(build).map_err(|error| failed(build, "remove", &error))?;
        create(build)?;
        self.attempt(cmake, source, build, cuda, Some(&host), log, tell)
    }

    #[allow(
        clippy::too_many_arguments,
        reason = "what one attempt differs in, and where it leaves its traces"
    )]
    fn attempt(
        &self,
        cmake: &Path,
        source: &Path,
        build: &Path,
        cuda: Option<&Path>,
        host: Option<&HostCompiler>,
        log: &mut Log,
        tell: &mut dyn FnMut(Step<'_>),
    ) -> Result<(), SourceError> {
        let jobs = thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let steps = [
            ("cmake-configure", plan::configure(self.spec, source, build, cuda, host)),
            ("cmake-build", plan::build(self.spec, build, jobs)),
        ];
        for (name, words) in steps {
            tell(Step::Began(name));
            let mut command = Command::new(cmake);
            command.args(&words);
            let mut last = None;
            let mut line = |line: &str| {
                let percent = plan::percent(line);
                if percent.is_some() && percent != last {
                    last = percent;
                    percent.into_iter().for_each(|percent| tell(Step::Percent(percent)));
                }
            };
            self.perform(command, log, &mut line)?
                .or_failure(log, &format!("{name} failed: the end of the log says why"))?;
        }
        Ok(())
    }

    fn other_compiler(&self) -> Option<HostCompiler> {
        let path = (self.env)("PATH");
        let find = |name: &str| find_program(name, path.as_deref()).ok();
        HOST_COMPILERS.iter().find_map(|(c, cxx)| Some(HostCompiler { c: find(c)?, cxx: find(cxx)? }))
    }

    /// Runs one command with its output in the log, in a process group that ends with a stop.
    fn perform(
        &self,
        mut command: Command,
        log: &mut Log,
        line: &mut dyn FnMut(&str),
    ) -> Result<Performed, SourceError> {
        let program = PathBuf::from(command.get_program());
        let broken = |error: &io::Error| failed(&program, "run", error);
        let (reader, writer) = io::pipe().map_err(|error| broken(&error))?;
        let second = writer.try_clone().map_err(|error| broken(&error))?;
        log.line(&format!("$ {command:?}"));
        let child = command.stdin(Stdio::null()).stdout(writer).stderr(second).process_group(0).spawn();
        // Until it goes, this side of the pipe is open too.
        drop(command);
        let mut child = child.map_err(|error| broken(&error))?;
        let (sender, lines) = mpsc::sync_channel::<String>(64);
        thread::scope(|scope| {
            scope.spawn(move || read_lines(reader, &sender));
            let mut stopped = false;
            loop {
                match lines.recv_timeout(PAUSE) {
                    Ok(text) => {
                        log.line(&text);
                        line(&text);
                    }
                    Err(mpsc::RecvTimeoutError::Timeout) => {}
                    Err(mpsc::RecvTimeoutError::Disconnected) => break,
                }
                if !stopped && self.cancel.load(Ordering::Relaxed) {
                    stopped = true;
                    if let Some(group) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) {
                        // Compilers have nothing to clean up that the next build minds.
                        let _ = rustix::process::kill_process_group(group, Signal::KILL);
                    }
                }
            }
            let status = child.wait().map_err(|error| broken(&error))?;
            if stopped { Err(SourceError::Cancelled) } else { Ok(Performed(status.success())) }
        })
    }
}

/// How a command ended.
struct Performed(bool);

impl Performed {
    fn or_failure(self, log: &Log, message: &str) -> Result<(), SourceError> {
        if self.0 { Ok(()) } else { Err(log.failure(message)) }
    }
}

/// Lines as they come, the longest ones in pieces.
fn read_lines(reader: impl io::Read, sender: &mpsc::SyncSender<String>) {
    let mut reader = BufReader::new(reader);
    let mut bytes = Vec::new();
    loop {
        bytes.clear();
        let limited = io::Read::take(&mut reader, LINE_BYTES_MAX as u64).read_until(b'\n', &mut bytes);
        match limited {
            Ok(0) | Err(_) => return,
            Ok(_) if sender.send(String::from_utf8_lossy(&bytes).trim_end().to_string()).is_err() => return,
            Ok(_) => {}
        }
    }
}

/// What the steps printed.
struct Log {
    file: File,
    path: PathBuf,
}

impl Log {
    /// A log that cannot be written is no reason to stop a build.
    fn line(&mut self, text: &str) {
        let _ = writeln!(self.file, "{text}");
    }

    fn failure(&self, message: &str) -> SourceError {
        let text = fs::read(&self.path).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<String> = text
            .lines()
            .map(|line| line.chars().filter(|c| !c.is_control()).take(LINE_CHARS_MAX).collect::<String>())
            .filter(|line| !line.trim().is_empty())
            .collect();
        let mut told = format!("{message}; the end of {}:", self.path.display());
        for line in &lines[lines.len().saturating_sub(TAIL_LINES)..] {
            told.push_str("\n  ");
            told.push_str(line);
        }
        SourceError::Failed(told)
    }
}

fn create(directory: &Path) -> Result<(), SourceError> {
    let made = fs::DirBuilder::new().recursive(true).mode(0o750).create(directory);
    made.map_err(|error| failed(directory, "create", &error))
}

fn failed(path: &Path, doing: &str, error: &io::Error) -> SourceError {
    SourceError::Failed(format!(
        "cannot {doing} {}: {error}: check permissions and room, or give another --cache-dir",
        path.display()
    ))
}
