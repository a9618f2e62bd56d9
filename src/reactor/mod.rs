//! The event loop's mechanism, and the only room that names mio.
//!
//! The mental model: the kernel tells *edges* ("became readable"), a program with a fairness budget
//! needs *levels* ("still readable"). [`ready`] remembers; [`stream`] reads and writes through that
//! memory, and through [`tls`] where that is asked for. Everything else here is a source of edges: a directory ([`dirwatch`]), signals
//! ([`signal`]), the kernel's log ([`kmsg`]), helper threads that finished something ([`offload`]).
//!
//! A turn of a daemon's loop: [`Reactor::wait`] until an event or a deadline, one clock sample, then
//! everything that became possible at that one time.

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
/// A wait that comes back so much too late, in milliseconds, was not only scheduled late.
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

    /// Blocks until an event or `deadline`, or not at all if `busy`; then samples the clocks.
    ///
    /// # Errors
    /// A failing poll, interruption excepted.
    pub fn wait(&mut self, deadline: Option<Mono>, busy: bool) -> io::Result<Now> {
        let began = now().mono;
        let timeout = match (busy, deadline) {
            (true, _) => Some(Duration::ZERO),
            (false, None) => None,
            // mio rounds up to whole milliseconds, so the loop never wakes just before a deadline.
            (false, Some(at)) => Some(Duration::from_nanos(at.ns_since(began))),
        };
        let polled = self.poll.poll(&mut self.events, timeout);
        let back = now();
        let was_interrupted = match polled {
            Ok(()) => false,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => true,
            Err(error) => return Err(error),
        };
        let expected = if busy { Some(began) } else { deadline.map(|at| at.max(began)) };
        let is_late = expected.is_some_and(|at| back.mono.ms_since(at) > HELD_UP_MS);
        self.held_up = was_interrupted || is_late;
        Ok(back)
    }

    /// Whether the last [`Reactor::wait`] may know less than its time suggests: it was interrupted, or
    /// came back late, as after the process was stopped. The kernel may hold events that are older than
    /// that time, so nothing should be taken for silent before the next wait.
    #[must_use]
    pub fn was_held_up(&self) -> bool {
        self.held_up
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
