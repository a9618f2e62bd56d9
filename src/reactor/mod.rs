//! The event loop's mechanism, and the only room that names mio.
//!
//! The mental model: the kernel tells *edges* ("became readable"), a program with a fairness budget
//! needs *levels* ("still readable"). [`ready`] remembers; [`stream`] reads and writes through that
//! memory, and through [`tls`] where that is asked for. Everything else here is a source of edges: a directory ([`dirwatch`]), signals
//! ([`signal`]), the kernel's log ([`kmsg`]), helper threads that finished something ([`offload`]).
//!
//! A turn of a daemon's loop: [`Reactor::wait`] until an event or a deadline, one clock sample, then
//! everything that became possible at that one time.
//!
//! A processor that expects nothing before the kernel's next tick stops its tick and sleeps deeper, and is slower to
//! wake: in a virtual machine a third of the time that a request took where one came every 5 ms. An owner that
//! is likely to be needed soon therefore waits in naps ([`Reactor::nap_until`]), of which it sees nothing.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use mio::unix::SourceFd;

use crate::time::{Mono, Now, Wall};

pub mod dirwatch;
pub mod kmsg;
pub mod offload;
pub mod ready;
pub mod signal;
pub mod stream;
pub mod tls;
pub mod token;

pub use mio::Registry;
use token::Token;

/// Events taken from the kernel in one turn. More wait for the next one.
const EVENTS_PER_TURN: usize = 512;
/// Length of a nap, in milliseconds: half of the tick of a kernel with 250 Hz, as a tick may be half over when the
/// nap begins.
const NAP_MS: u64 = 2;
/// A wait that comes back so much too late, in milliseconds, was not only scheduled late; nor are sockets read for
/// so long.
const HELD_UP_MS: u64 = 10;

/// Wakes a loop from a helper thread.
pub type Waker = Arc<mio::Waker>;

/// What a source became.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Edge {
    /// Bytes, connections or an end of file can be read.
    pub readable: bool,
    /// Bytes can be written, or a connect has ended.
    pub writable: bool,
    /// The peer has closed its side, or the connection is broken: reading will reach the end.
    pub hangup: bool,
}

/// A descriptor that is only waited for until it becomes readable.
#[derive(Debug)]
pub struct Descriptor(OwnedFd);

impl Descriptor {
    /// Waits for it under `token`.
    ///
    /// # Errors
    /// Where the kernel cannot wait for such a descriptor, or for one more.
    pub fn register(descriptor: OwnedFd, registry: &Registry, token: Token) -> io::Result<Descriptor> {
        registry.register(&mut SourceFd(&descriptor.as_raw_fd()), token.into(), mio::Interest::READABLE)?;
        Ok(Descriptor(descriptor))
    }

    /// Leaves the poll before it is dropped.
    pub fn deregister(&self, registry: &Registry) {
        let _ = registry.deregister(&mut SourceFd(&self.0.as_raw_fd()));
    }
}

/// The poll and its events.
#[derive(Debug)]
pub struct Reactor {
    poll: mio::Poll,
    events: mio::Events,
    naps_until: Mono,
    /// When the last wait ended.
    woke: Mono,
    held_up: bool,
}

impl Reactor {
    /// A reactor without sources.
    ///
    /// # Errors
    /// Where the kernel gives no epoll descriptor.
    pub fn new() -> io::Result<Reactor> {
        Ok(Reactor {
            poll: mio::Poll::new()?,
            events: mio::Events::with_capacity(EVENTS_PER_TURN),
            naps_until: Mono::default(),
            woke: Mono::default(),
            held_up: false,
        })
    }

    /// Where sources register.
    ///
    /// # Errors
    /// Where the descriptor cannot be duplicated.
    pub fn registry(&self) -> io::Result<Registry> {
        self.poll.registry().try_clone()
    }

    /// A waker whose events carry `token`.
    ///
    /// # Errors
    /// Where the kernel gives no eventfd.
    pub fn waker(&self, token: Token) -> io::Result<Waker> {
        Ok(Arc::new(mio::Waker::new(self.poll.registry(), token.into())?))
    }

    /// Until `at`, waits are made of naps of 2 ms, each of which costs a wake-up.
    pub fn nap_until(&mut self, at: Mono) {
        self.naps_until = at;
    }

    /// Blocks until an event or `deadline`, or not at all if `busy`; then samples the clocks.
    ///
    /// # Errors
    /// A failing poll, interruption excepted.
    pub fn wait(&mut self, deadline: Option<Mono>, busy: bool) -> io::Result<Now> {
        let began = now().mono;
        let mut at = began;
        let polled = loop {
            // mio rounds up to whole milliseconds, so the loop never wakes just before a deadline.
            let left_ns = if busy { Some(0) } else { deadline.map(|deadline| deadline.ns_since(at)) };
            let is_nap = at < self.naps_until && left_ns.is_none_or(|ns| ns > NAP_MS * 1_000_000);
            let timeout =
                if is_nap { Some(Duration::from_millis(NAP_MS)) } else { left_ns.map(Duration::from_nanos) };
            let polled = self.poll.poll(&mut self.events, timeout);
            if !is_nap || polled.is_err() || !self.events.is_empty() {
                break polled;
            }
            at = now().mono;
        };
        let back = now();
        let was_interrupted = match polled {
            Ok(()) => false,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => true,
            Err(error) => return Err(error),
        };
        let expected = if busy { Some(began) } else { deadline.map(|at| at.max(began)) };
        let is_late = expected.is_some_and(|at| back.mono.ms_since(at) > HELD_UP_MS);
        self.held_up = was_interrupted || is_late;
        self.woke = back.mono;
        Ok(back)
    }

    /// Whether the kernel may hold events that are older than `now`: the last [`Reactor::wait`] was interrupted,
    /// came back late, or was long ago, as after the process was stopped. Nothing should be taken for silent then
    /// before the next wait.
    #[must_use]
    pub fn was_held_up(&self, now: Mono) -> bool {
        self.held_up || now.ms_since(self.woke) > HELD_UP_MS
    }

    /// Whether the last [`Reactor::wait`] returned as many events as it can: the kernel may hold more.
    #[must_use]
    pub fn has_more(&self) -> bool {
        self.events.iter().count() >= EVENTS_PER_TURN
    }

    /// The events of the last [`Reactor::wait`].
    pub fn events(&self) -> impl Iterator<Item = (Token, Edge)> + '_ {
        self.events.iter().map(|event| {
            let hangup = event.is_read_closed() || event.is_error();
            let edge =
                Edge { readable: event.is_readable() || hangup, writable: event.is_writable(), hangup };
            (Token::from(event.token()), edge)
        })
    }
}

/// Samples both clocks. Called once a turn by [`Reactor::wait`], and by programs without a loop.
#[must_use]
pub fn now() -> Now {
    let ns = |id| {
        let at = rustix::time::clock_gettime(id);
        u64::try_from(at.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(at.tv_nsec).unwrap_or(0)
    };
    Now { mono: Mono(ns(rustix::time::ClockId::Monotonic)), wall: Wall(ns(rustix::time::ClockId::Realtime)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How often this thread has gone to sleep of its own accord.
    fn sleeps() -> u64 {
        let status = std::fs::read_to_string("/proc/thread-self/status").expect("a status");
        let count = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
        count.and_then(|count| count.trim().parse().ok()).expect("a number")
    }

    #[test]
    fn naps_end_at_their_time_and_show_only_as_wake_ups() {
        let mut reactor = Reactor::new().expect("a poll");
        let mut wait = |naps_ms, deadline_ms| {
            let (began, slept) = (now().mono, sleeps());
            reactor.nap_until(began.plus_ms(naps_ms));
            let deadline = began.plus_ms(deadline_ms);
            let back = reactor.wait(Some(deadline), false).expect("the poll works").mono;
            assert!(back >= deadline, "back {} ns before the deadline", deadline.ns_since(back));
            assert_eq!(reactor.events().count(), 0);
            sleeps() - slept
        };
        assert!((1..=5).contains(&wait(0, 100)), "one wait");
        // As many as have room; few where the machine is busy.
        let naps = wait(100, 300);
        assert!((5..=60).contains(&naps), "{naps} sleeps");
        assert!(wait(300, 30) <= 20, "no nap goes beyond the deadline");
    }

    #[test]
    fn who_is_busy_does_not_nap() {
        let mut reactor = Reactor::new().expect("a poll");
        let began = now().mono;
        reactor.nap_until(began.plus_ms(60_000));
        let back = reactor.wait(None, true).expect("the poll works").mono;
        assert!(back < began.plus_ms(30_000));
    }

    #[test]
    fn a_nap_ends_with_the_first_event() {
        let mut reactor = Reactor::new().expect("a poll");
        let waker = reactor.waker(Token::only(token::Kind::Waker)).expect("a waker");
        let began = now().mono;
        reactor.nap_until(began.plus_ms(60_000));
        // Its descriptor must outlive the wait.
        let waker_there = Arc::clone(&waker);
        let thread = std::thread::spawn(move || waker_there.wake().expect("it wakes"));
        reactor.wait(None, false).expect("the poll works");
        assert_eq!(reactor.events().count(), 1);
        thread.join().expect("no panic");
    }
}
