//! What `engine-provisioner` shows on a terminal while engines start: state, seconds and a bar where the engine
//! tells, one row for each engine, and nothing that stays when they serve.

#[path = "provisioner/harness.rs"]
#[allow(dead_code, reason = "shared with other tests, which use other parts")]
mod harness;

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use harness::{PATIENCE, pid, until};
use rustix::process::Signal;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};

/// Variables of the engine that stands in: its port, and the file that says how far it is.
const PORT: &str = "STAND_IN_PORT";
const STATE: &str = "STAND_IN_STATE";
const COLUMNS: usize = 70;

/// No test, but the engine that the others start: it serves once its file says `ready`, and tells the share in it
/// before that.
#[test]
#[ignore = "the engine that other tests start"]
fn stand_in() {
    let (Ok(port), Ok(state)) = (std::env::var(PORT), std::env::var(STATE)) else { return };
    let listener = TcpListener::bind(("127.0.0.1", port.parse().expect("a port"))).expect("its own port");
    for mut stream in listener.incoming().map_while(Result::ok) {
        let lines = BufReader::new(stream.try_clone().expect("cloned")).lines();
        let _ = lines.map_while(Result::ok).take_while(|line| !line.is_empty()).count();
        let told = fs::read_to_string(&state).unwrap_or_default();
        let (status, body) = match told.trim() {
            "ready" => ("200 OK", "{}".to_string()),
            share => ("503 Service Unavailable", format!(r#"{{"error":{{"progress":{share}}}}}"#)),
        };
        let head =
            format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len());
        let _ = stream.write_all((head + &body).as_bytes());
    }
}

/// The stand-in's command, as a shell has it.
fn engine(state: &Path) -> String {
    let program = std::env::current_exe().expect("this program");
    format!(
        "{STATE}='{}' {PORT}={{port}} exec '{}' --exact stand_in --ignored",
        state.display(),
        program.display()
    )
}

/// Says how far an engine is, all at once.
fn say(state: &Path, told: &str) {
    let new = state.with_extension("new");
    fs::write(&new, told).expect("written");
    fs::rename(new, state).expect("renamed");
}

/// What is to be seen on a terminal that understands what is used here of its language.
struct Picture {
    rows: Vec<Vec<char>>,
    row: usize,
    column: usize,
    /// An escape sequence that has not ended yet.
    escape: Option<String>,
    /// Whether something was written beyond the last column.
    has_wrapped: bool,
}

impl Picture {
    fn new() -> Picture {
        Picture { rows: vec![Vec::new()], row: 0, column: 0, escape: None, has_wrapped: false }
    }

    fn put(&mut self, text: &str) {
        for c in text.chars() {
            if let Some(mut escape) = self.escape.take() {
                escape.push(c);
                match c {
                    '[' => self.escape = Some(escape),
                    c if c.is_ascii_alphabetic() => self.obey(&escape),
                    _ => self.escape = Some(escape),
                }
                continue;
            }
            match c {
                '\x1b' => self.escape = Some(String::new()),
                '\r' => self.column = 0,
                '\n' => self.down(),
                c => self.print(c),
            }
        }
    }

    fn obey(&mut self, escape: &str) {
        let number =
            escape.trim_start_matches('[').trim_end_matches(char::is_alphabetic).parse().unwrap_or(1);
        match escape.chars().last() {
            Some('A') => self.row = self.row.saturating_sub(number),
            Some('J') => {
                self.rows.truncate(self.row + 1);
                self.rows[self.row].truncate(self.column);
            }
            Some('K') => self.rows[self.row].truncate(self.column),
            _ => {}
        }
    }

    fn down(&mut self) {
        self.row += 1;
        if self.rows.len() <= self.row {
            self.rows.push(Vec::new());
        }
    }

    fn print(&mut self, c: char) {
        let row = &mut self.rows[self.row];
        row.resize(row.len().max(self.column + 1), ' ');
        row[self.column] = c;
        self.column += 1;
        self.has_wrapped |= self.column > COLUMNS && row.iter().collect::<String>().contains("starting");
    }

    fn lines(&self) -> Vec<String> {
        self.rows.iter().map(|row| row.iter().collect()).collect()
    }

    /// Rows that tell of an engine that starts.
    fn starting(&self) -> Vec<String> {
        self.lines().into_iter().filter(|line| line.contains(" starting ")).collect()
    }
}

/// `engine-provisioner` on a terminal.
struct Terminal {
    child: Child,
    seen: mpsc::Receiver<Vec<u8>>,
    picture: Picture,
}

impl Terminal {
    fn run(root: &Path, args: &[&str]) -> Terminal {
        let controller = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).expect("a terminal");
        grantpt(&controller).expect("granted");
        unlockpt(&controller).expect("unlocked");
        let columns = u16::try_from(COLUMNS).expect("few");
        let size = rustix::termios::Winsize { ws_row: 40, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        rustix::termios::tcsetwinsize(&controller, size).expect("sized");
        let name = ptsname(&controller, Vec::new()).expect("a name");
        let open = || -> Stdio {
            let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NOCTTY;
            let end: OwnedFd =
                rustix::fs::open(name.as_c_str(), flags, rustix::fs::Mode::empty()).expect("opened");
            Stdio::from(end)
        };
        let mut command = Command::new(env!("CARGO_BIN_EXE_engine-provisioner"));
        command
            .args(args)
            .env("ENGINE_PROVISIONER_HANDOFF_DIR", root.join("engines"))
            .env("ENGINE_PROVISIONER_CACHE_DIR", root.join("cache"))
            .env("POOL_MANAGERD_URL", "http://127.0.0.1:1")
            .env_remove("LLORCH_REQUIRE_GPU")
            .env_remove("RUST_LOG")
            .env("TERM", "xterm")
            .stdin(open())
            .stdout(open())
            .stderr(open());
        let child = command.spawn().expect("it starts");
        drop(command);
        let (send, seen) = mpsc::channel();
        let mut file = File::from(controller);
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(length @ 1..) = file.read(&mut bytes) {
                let _ = send.send(bytes[..length].to_vec());
            }
        });
        Terminal { child, seen, picture: Picture::new() }
    }

    fn until(&mut self, what: &str, is_there: impl Fn(&Picture) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            for bytes in self.seen.try_iter() {
                self.picture.put(&String::from_utf8_lossy(&bytes));
            }
            if is_there(&self.picture) {
                return;
            }
            assert!(Instant::now() < deadline, "waited in vain for {what}: {:#?}", self.picture.lines());
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Stops it; returns what is left on the terminal.
    fn stop(mut self) -> Vec<String> {
        rustix::process::kill_process(pid(self.child.id()), Signal::TERM).expect("it runs");
        let status = until("the end", || self.child.try_wait().expect("a child"));
        assert!(status.success(), "{status}: {:?}", self.picture.lines());
        while let Ok(bytes) = self.seen.recv_timeout(Duration::from_secs(1)) {
            self.picture.put(&String::from_utf8_lossy(&bytes));
        }
        self.picture.lines()
    }
}

impl Drop for Terminal {
    /// Its guardian ends the engines.
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn an_engine_that_starts_is_shown_with_state_seconds_and_a_bar() {
    let root = tempfile::tempdir().expect("a directory");
    let state = root.path().join("state");
    say(&state, "null");
    let command = engine(&state);
    let args = ["run", "--pool", "p", "--replica", "r0", "--restart=never", "--", "sh", "-c", &command];
    let mut terminal = Terminal::run(root.path(), &args);
    terminal.until("its state", |seen| {
        matches!(&seen.starting()[..], [row] if row.starts_with("p/r0 starting ") && row.ends_with(" s"))
    });
    terminal.until("its seconds", |seen| {
        seen.starting().iter().any(|row| row.starts_with("p/r0 starting ") && !row.contains(" 0 s"))
    });
    say(&state, "0.45");
    terminal.until("its bar", |seen| {
        seen.starting().iter().any(|row| row.ends_with(" s [#########...........] 45 %"))
    });
    say(&state, "90");
    terminal.until("its bar goes on", |seen| seen.starting().iter().any(|row| row.ends_with("] 90 %")));
    say(&state, "ready");
    terminal.until("its end", |seen| {
        seen.starting().is_empty() && seen.lines().iter().any(|line| line.contains("p/r0 serves"))
    });
    let left = terminal.stop();
    assert!(!left.iter().any(|line| line.contains('#')), "bars do not stay: {left:?}");
}

#[test]
fn the_engines_of_a_file_are_shown_together() {
    let root = tempfile::tempdir().expect("a directory");
    let mut file = String::new();
    let state = |n: usize| root.path().join(format!("state-{n}"));
    for n in 0..3 {
        say(&state(n), &format!("0.{}", n + 1));
        let command = serde_json::json!(["sh", "-c", engine(&state(n))]);
        file.push_str(&format!("[[pools]]\nid = \"p{n}\"\ncommand = {command}\n"));
    }
    let config = root.path().join("engines.toml");
    fs::write(&config, file).expect("written");
    let mut terminal = Terminal::run(root.path(), &["up", "-c", &config.display().to_string()]);
    let shares = ["10 %", "20 %", "30 %"];
    terminal.until("three rows at once", |seen| {
        let rows = seen.starting();
        let is_it =
            |(n, row): (usize, &String)| row.starts_with(&format!("p{n}/r0 ")) && row.ends_with(shares[n]);
        rows.len() == 3 && rows.iter().enumerate().all(is_it)
    });
    // One after the other leaves; what is logged of it stands above the rest.
    say(&state(1), "ready");
    terminal.until("two rows below the news", |seen| {
        let lines = seen.lines();
        let news = lines.iter().position(|line| line.contains("p1/r0 serves"));
        let first = lines.iter().position(|line| line.starts_with("p0/r0 starting"));
        seen.starting().len() == 2 && news.is_some() && news < first
    });
    say(&state(0), "ready");
    say(&state(2), "ready");
    terminal.until("all serve", |seen| {
        let lines = seen.lines();
        let serves = |n: usize| lines.iter().any(|line| line.contains(&format!("p{n}/r0 serves")));
        seen.starting().is_empty() && (0..3).all(serves)
    });
    assert!(!terminal.picture.has_wrapped);
    let left = terminal.stop();
    assert!(!left.iter().any(|line| line.contains('#')), "bars do not stay: {left:?}");
}
