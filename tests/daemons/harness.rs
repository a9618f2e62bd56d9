//! Real daemons for tests: started on ports from the kernel, asked over real sockets, killed with the
//! test.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

/// Longest that anything in these tests may take.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// Asks until there is an answer; fails by its own deadline.
pub(crate) fn until<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(found) = ask() {
            return found;
        }
        assert!(begun.elapsed() < PATIENCE, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Listens on a port that no other test of this process gets, not even later.
pub(crate) fn listen_on_free_port() -> TcpListener {
    static GIVEN: Mutex<BTreeSet<u16>> = Mutex::new(BTreeSet::new());
    loop {
        let listener = llama_orch::service::machine::listen_on_free_port().expect("a port");
        let port = listener.local_addr().expect("an address").port();
        if GIVEN.lock().unwrap_or_else(PoisonError::into_inner).insert(port) {
            return listener;
        }
    }
}

/// A port that is free. A child that another test starts at the moment has inherited the listener, and holds it
/// until it runs its program: only behind that can a daemon listen there.
pub(crate) fn free_port() -> u16 {
    let address = listen_on_free_port().local_addr().expect("an address");
    until("a port to become free", || TcpStream::connect(address).is_err().then_some(()));
    address.port()
}

/// A process, killed with the test.
pub(crate) struct Process {
    child: Child,
    log: PathBuf,
}

impl Process {
    pub(crate) fn start(program: &str, args: &[&str], env: &[(&str, &str)], directory: &Path) -> Process {
        let name = Path::new(program).file_name().expect("a name").to_string_lossy().into_owned();
        let log = directory.join(format!("{name}-{}.log", free_port()));
        let file = fs::File::create(&log).expect("a log");
        let child = Command::new(program)
            .args(args)
            .envs(env.iter().copied())
            .current_dir(directory)
            .stdin(Stdio::null())
            .stdout(file.try_clone().expect("a log"))
            .stderr(file)
            .spawn()
            .expect("the program starts");
        Process { child, log }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(&self.log).expect("a log")
    }

    pub(crate) fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(self.pid().cast_signed()).expect("a pid");
        kill_process(pid, signal).expect("signalled");
    }

    /// Waits for the end and returns the exit code.
    pub(crate) fn end(&mut self) -> Option<i32> {
        until("a process to end", || self.child.try_wait().expect("a child")).code()
    }

    pub(crate) fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Process {
    #[allow(clippy::print_stderr, reason = "a test fails, and the log says more than its message")]
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            eprintln!("{}:\n{}", self.log.display(), fs::read_to_string(&self.log).unwrap_or_default());
        }
    }
}

pub(crate) const ORCHESTRATORD: &str = env!("CARGO_BIN_EXE_orchestratord");
pub(crate) const POOL_MANAGERD: &str = env!("CARGO_BIN_EXE_pool-managerd");

/// A demonstration engine that answers on `port`.
pub(crate) fn demo_engine(port: u16, args: &[&str], directory: &Path) -> Process {
    let number = port.to_string();
    let all = [&["demo-engine", "--port", &number], args].concat();
    let engine = Process::start(env!("CARGO_BIN_EXE_llorch"), &all, &[], directory);
    until("the engine", || get(port, "/health").filter(|answer| answer.status == 200));
    engine
}

/// An answer.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) head: String,
    pub(crate) body: String,
}

impl Answer {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    pub(crate) fn field(&self, name: &str) -> Option<&str> {
        self.head.lines().find_map(|line| {
            let (field, value) = line.split_once(':')?;
            field.eq_ignore_ascii_case(name).then(|| value.trim())
        })
    }
}

/// A request on its way: the head has been read, the body comes.
pub(crate) struct Open {
    pub(crate) status: u16,
    pub(crate) head: String,
    reader: BufReader<TcpStream>,
}

impl Open {
    /// The `data` of the next event of a stream; `None` at its end.
    pub(crate) fn event(&mut self) -> Option<String> {
        loop {
            let mut line = String::new();
            if self.reader.read_line(&mut line).expect("a stream") == 0 {
                return None;
            }
            if let Some(data) = line.strip_prefix("data: ") {
                return Some(data.trim_end().to_string());
            }
        }
    }
}

/// Sends a request; `None` if nobody listens.
pub(crate) fn open(port: u16, method: &str, path: &str, token: Option<&str>, body: &str) -> Option<Open> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).ok()?;
    stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    let token = token.map_or(String::new(), |token| format!("Authorization: Bearer {token}\r\n"));
    write!(
        stream,
        "{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{token}Content-Length: {}\r\n\r\n{body}",
        body.len()
    )
    .ok()?;
    let mut reader = BufReader::new(stream);
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        if reader.read_line(&mut head).ok()? == 0 {
            return None;
        }
    }
    let status = head.split(' ').nth(1).and_then(|code| code.parse().ok()).expect("a status");
    Some(Open { status, head, reader })
}

/// Sends a request and reads the answer to its end, chunks undone.
pub(crate) fn ask(port: u16, method: &str, path: &str, token: Option<&str>, body: &str) -> Option<Answer> {
    let mut open = open(port, method, path, token, body)?;
    let mut raw = String::new();
    open.reader.read_to_string(&mut raw).ok()?;
    let body = if open.head.to_ascii_lowercase().contains("transfer-encoding: chunked") {
        dechunk(&raw)
    } else {
        raw
    };
    Some(Answer { status: open.status, head: open.head, body })
}

fn dechunk(mut raw: &str) -> String {
    let mut body = String::new();
    while let Some((size, rest)) = raw.split_once("\r\n") {
        let size = usize::from_str_radix(size, 16).expect("a chunk size");
        if size == 0 {
            break;
        }
        body.push_str(&rest[..size]);
        raw = &rest[size + 2..];
    }
    body
}

pub(crate) fn get(port: u16, path: &str) -> Option<Answer> {
    ask(port, "GET", path, None, "")
}

pub(crate) fn post(port: u16, path: &str, body: &str) -> Answer {
    ask(port, "POST", path, None, body).expect("an answer")
}

/// A value of a metric without labels.
pub(crate) fn metric(port: u16, name: &str) -> Option<f64> {
    let answer = get(port, "/metrics")?;
    let line = answer.body.lines().find(|line| line.starts_with(&format!("{name} ")))?.to_string();
    line.rsplit_once(' ')?.1.parse().ok()
}

/// Writes a handoff as its writers should: under a temporary name, then renamed.
pub(crate) fn hand_over(engines: &Path, file: &str, text: &str) {
    fs::create_dir_all(engines).expect("a directory");
    let temporary = engines.join(format!(".{file}.tmp"));
    fs::write(&temporary, text).expect("written");
    fs::rename(temporary, engines.join(file)).expect("renamed");
}

/// The handoff of an engine on `port`.
pub(crate) fn handoff(port: u16, replica: &str, slots: u32) -> String {
    format!(
        r#"{{"pool_id":"pool-0","replica_id":"{replica}","url":"http://127.0.0.1:{port}","slots":{slots}}}"#
    )
}

/// A control plane in the HOME profile, with its directory.
pub(crate) struct Home {
    pub(crate) directory: tempfile::TempDir,
    pub(crate) port: u16,
    pub(crate) daemon: Process,
}

impl Home {
    pub(crate) fn start(env: &[(&str, &str)]) -> Home {
        let directory = tempfile::tempdir().expect("a directory");
        let port = free_port();
        let addr = format!("127.0.0.1:{port}");
        let env = [&[("ORCHESTRATORD_ADDR", addr.as_str())], env].concat();
        let daemon = Process::start(ORCHESTRATORD, &[], &env, directory.path());
        until("orchestratord", || get(port, "/ready").filter(|answer| answer.status == 200));
        Home { directory, port, daemon }
    }

    pub(crate) fn engines(&self) -> PathBuf {
        self.directory.path().join(".runtime/engines")
    }

    /// Waits until so many replicas take work.
    pub(crate) fn until_routable(&self, count: f64) {
        until("replicas", || metric(self.port, "orchestratord_replicas_routable").filter(|n| *n == count));
    }
}
