//! What a daemon tells the service manager that started it (systemd, or whatever speaks its protocol):
//! that it is ready, how it is, that it reads its configuration again, that it stops, and that it lives.
//!
//! Each message is a datagram to the socket that `NOTIFY_SOCKET` names. A manager that does not read must
//! not hold the loop up, so nothing here blocks: what finds no room is kept and sent by a later turn.
//!
//! The state in words (`STATUS=`) is looked at when the loop has woken for something else, and once a
//! second at most: it costs no wake-up of its own. Only a watchdog that was asked for does,
//! because silence would otherwise be taken for a hang. It is fed by whole turns of the loop alone.

use std::env;
use std::io::{self, ErrorKind};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

use sd_notify::NotifyState;

use crate::time::{Mono, earliest};

/// Shortest time between two looks at the state in words, in milliseconds: people read it.
const STATUS_INTERVAL_MS: u64 = 1_000;
/// When a message that found no room is sent again, in milliseconds.
const RETRY_MS: u64 = 250;
/// Messages that are kept for a manager that does not read: what it hears later is still true.
const UNSENT_MAX: usize = 16;

/// The connection to the service manager; without one, everything here does nothing.
#[derive(Debug, Default)]
pub struct Supervisor {
    socket: Option<UnixDatagram>,
    /// Messages that found no room, oldest first.
    unsent: Vec<String>,
    retry_at: Option<Mono>,
    is_ready: bool,
    is_stopping: bool,
    status: String,
    status_at: Option<Mono>,
    watchdog: Option<Watchdog>,
}

#[derive(Debug)]
struct Watchdog {
    /// How often it is fed, in milliseconds: half of what the manager waits for.
    every_ms: u64,
    due: Mono,
}

impl Supervisor {
    /// The connection that the environment names. One that cannot be had is a line in the log: the manager
    /// will say the rest.
    #[must_use]
    pub fn from_environment() -> Supervisor {
        let Some(path) = env::var_os("NOTIFY_SOCKET").filter(|path| !path.is_empty()) else {
            return Supervisor::default();
        };
        match connect(path.as_bytes()) {
            Ok(socket) => {
                let limit = sd_notify::watchdog_enabled().map(|limit| limit.as_millis() / 2);
                let every_ms = limit.and_then(|ms| u64::try_from(ms).ok()).filter(|ms| *ms > 0);
                let watchdog = every_ms.map(|every_ms| Watchdog { every_ms, due: Mono(0) });
                Supervisor { socket: Some(socket), watchdog, ..Supervisor::default() }
            }
            Err(error) => {
                log::warn!("NOTIFY_SOCKET={}: {error}: nothing is told to it", path.display());
                Supervisor::default()
            }
        }
    }

    /// Says once that the daemon is ready, with its state in words.
    pub fn ready(&mut self, status: impl FnOnce() -> String, now: Mono) {
        if self.is_ready || self.socket.is_none() {
            return;
        }
        self.is_ready = true;
        self.status = status();
        self.status_at = Some(now);
        let status = self.status.clone();
        self.send(&[NotifyState::Ready, NotifyState::Status(&status)], now);
    }

    /// A whole turn of the loop has ended, and with it what it had to do.
    pub fn turned(&mut self, status: impl FnOnce() -> String, now: Mono) {
        if self.socket.is_none() {
            return;
        }
        if self.retry_at.is_some_and(|at| at <= now) {
            self.send_kept(now);
        }
        let is_due = self.status_at.is_some_and(|at| now.ms_since(at) >= STATUS_INTERVAL_MS);
        if is_due && !self.is_stopping {
            self.status_at = Some(now);
            let status = status();
            if status != self.status {
                self.send(&[NotifyState::Status(&status)], now);
                self.status = status;
            }
        }
        if let Some(watchdog) = &mut self.watchdog
            && watchdog.due <= now
        {
            watchdog.due = now.plus_ms(watchdog.every_ms);
            self.send(&[NotifyState::Watchdog], now);
        }
    }

    /// When the loop must come round for this at the latest.
    #[must_use]
    pub fn deadline(&self) -> Option<Mono> {
        earliest(self.watchdog.as_ref().map(|watchdog| watchdog.due), self.retry_at)
    }

    /// What was configured is read again, by `read`, which returns when that is done.
    pub fn reload(&mut self, now: Mono, read: impl FnOnce()) {
        let at_us = i128::from(now.0 / 1_000);
        self.send(&[NotifyState::Reloading, NotifyState::MonotonicUsec(at_us)], now);
        read();
        self.send(&[NotifyState::Ready], now);
    }

    /// The daemon is about to end; `status` says what it waits for.
    pub fn stopping(&mut self, status: &str, now: Mono) {
        self.is_stopping = true;
        self.send(&[NotifyState::Stopping, NotifyState::Status(status)], now);
    }

    fn send(&mut self, states: &[NotifyState<'_>], now: Mono) {
        if self.socket.is_none() {
            return;
        }
        let lines: Vec<String> = states.iter().map(|state| one_line(&state.to_string())).collect();
        self.unsent.push(lines.join("\n"));
        self.send_kept(now);
    }

    fn send_kept(&mut self, now: Mono) {
        let Some(socket) = &self.socket else { return };
        while let Some(message) = self.unsent.first() {
            match socket.send(message.as_bytes()) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                // Whoever listened is gone, and a new one has another address.
                Err(error) => {
                    log::warn!("the service manager cannot be told anything any more: {error}");
                    return *self = Supervisor::default();
                }
                Ok(_) => {
                    self.unsent.remove(0);
                }
            }
        }
        let too_many = self.unsent.len().saturating_sub(UNSENT_MAX);
        // The oldest may say that the daemon is ready: it stays, and those behind it go.
        self.unsent.drain(1.min(too_many)..too_many + 1.min(too_many));
        self.retry_at = (!self.unsent.is_empty()).then(|| now.plus_ms(RETRY_MS));
    }
}

/// A name that begins with `@` is one in the kernel's own space of names.
fn connect(path: &[u8]) -> io::Result<UnixDatagram> {
    let address = match path.strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(std::ffi::OsStr::from_bytes(path))?,
    };
    let socket = UnixDatagram::unbound()?;
    socket.set_nonblocking(true)?;
    socket.connect_addr(&address)?;
    Ok(socket)
}

/// A line of the protocol ends where the text does.
fn one_line(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (Supervisor, UnixDatagram) {
        let (ours, manager) = UnixDatagram::pair().expect("a pair");
        ours.set_nonblocking(true).expect("set");
        manager.set_nonblocking(true).expect("set");
        (Supervisor { socket: Some(ours), ..Supervisor::default() }, manager)
    }

    fn heard(manager: &UnixDatagram) -> Vec<String> {
        let mut heard = Vec::new();
        let mut bytes = [0; 4096];
        while let Ok(length) = manager.recv(&mut bytes) {
            heard.push(String::from_utf8_lossy(&bytes[..length]).into_owned());
        }
        heard
    }

    fn at(ms: u64) -> Mono {
        Mono(0).plus_ms(ms)
    }

    #[test]
    fn it_is_ready_once_and_tells_its_state_when_that_changed() {
        let (mut supervisor, manager) = pair();
        supervisor.turned(|| unreachable!("nothing is told before it is ready"), at(0));
        supervisor.ready(|| "1\nreplica".into(), at(5));
        supervisor.ready(|| unreachable!("said once"), at(6));
        assert_eq!(heard(&manager), ["READY=1\nSTATUS=1 replica"]);
        supervisor.turned(|| unreachable!("too soon"), at(500));
        supervisor.turned(|| "1\nreplica".into(), at(1_100));
        assert!(heard(&manager).is_empty(), "nothing changed");
        supervisor.turned(|| "2 replicas".into(), at(2_200));
        assert_eq!(heard(&manager), ["STATUS=2 replicas"]);
        assert_eq!(supervisor.deadline(), None, "it asks for no wake-up");
        supervisor.stopping("2 requests may finish", at(2_300));
        supervisor.turned(|| unreachable!("it stops"), at(9_000));
        assert_eq!(heard(&manager), ["STOPPING=1\nSTATUS=2 requests may finish"]);
    }

    #[test]
    fn a_watchdog_is_fed_at_half_its_time() {
        let (mut supervisor, manager) = pair();
        supervisor.watchdog = Some(Watchdog { every_ms: 500, due: Mono(0) });
        for ms in [0, 100, 499, 500, 999, 1_000, 5_000] {
            supervisor.turned(String::new, at(ms));
        }
        assert_eq!(heard(&manager), ["WATCHDOG=1"; 4]);
        assert_eq!(supervisor.deadline(), Some(at(5_500)));
    }

    #[test]
    fn a_manager_that_does_not_read_holds_nothing_up_and_hears_the_first_word_later() {
        let (mut supervisor, manager) = pair();
        supervisor.ready(|| "begun".into(), at(0));
        for ms in 0..2_000 {
            supervisor.reload(at(ms), || ());
        }
        assert!(supervisor.deadline().is_some() && supervisor.unsent.len() <= UNSENT_MAX);
        let mut all = heard(&manager);
        for turn in 0..10 {
            supervisor.turned(|| "begun".into(), at(10_000 + turn * RETRY_MS));
            all.extend(heard(&manager));
        }
        assert_eq!(all[0], "READY=1\nSTATUS=begun");
        assert_eq!(all.last().map(String::as_str), Some("READY=1"));
        assert!(supervisor.unsent.is_empty() && supervisor.deadline().is_none());
        drop(manager);
        supervisor.stopping("", at(20_000));
        assert!(supervisor.socket.is_none(), "nobody listens any more");
    }
}
