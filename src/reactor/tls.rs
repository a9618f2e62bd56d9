//! TLS between a socket and whoever reads and writes a [`super::stream::Stream`]: rustls' state machine,
//! fed through the stream's latch.
//!
//! Reading: what has been decrypted is handed out first; only then is the socket read, one bounded piece at
//! a time, so that decrypted bytes never pile up. The socket may be silent while decrypted bytes wait:
//! [`Session::is_readable`] says so, and the stream counts as readable.
//!
//! Writing: one record is encrypted, and it counts as written when the socket has taken all of it. Until
//! then no further byte is taken, and the caller must come back with the same bytes, as it does
//! with any bytes that were not taken. So no more than one record waits in here, and whoever sees its
//! buffer empty knows that everything is with the kernel.
//!
//! The end: a peer that closes its connection without having said so within TLS may not be the one who
//! closed it. Such an end is an error, never [`ReadResult::Closed`].

use std::io::{self, Read, Write};

use rustls::Connection;

use super::ready::Latch;
use super::stream::ReadResult;

/// Most bytes that are encrypted and not yet taken by the socket: one record of the largest size.
const RECORD_BYTES_MAX: usize = 16 * 1024;

/// What a step of a handshake led to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Handshake {
    /// It is complete.
    Done,
    /// The peer's next message is awaited, after work with keys.
    Worked,
    /// Nothing whole has come.
    Waits,
    /// The peer does not speak TLS, but something in clear text: the stream can be used in the clear.
    ClearText,
}

/// One side of one connection's encryption.
pub struct Session {
    connection: Connection,
    /// Bytes of the caller that are encrypted, of which not all have been taken by the socket.
    claimed: usize,
    /// Decrypted bytes that were not read yet.
    plaintext: usize,
    /// The peer has said within TLS that nothing more comes.
    has_ended: bool,
    /// First byte that came from the peer: no message of TLS begins with a letter, and all of HTTP do.
    first: Option<u8>,
    /// No farewell is said: the peer must not take what it has for the whole.
    is_broken: bool,
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session").field("handshaking", &self.is_handshaking()).finish_non_exhaustive()
    }
}

/// The socket as rustls reads it: remembers what a latch needs to know.
struct Tap<'a> {
    tcp: &'a mut mio::net::TcpStream,
    latch: &'a mut Latch,
    first: &'a mut Option<u8>,
}

impl Read for Tap<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.tcp.read(buffer) {
                Ok(length) => {
                    // As for a stream without TLS: a short read has emptied the socket.
                    self.latch.readable = length == buffer.len() || self.latch.hangup || length == 0;
                    if length > 0 {
                        self.first.get_or_insert(buffer[0]);
                    }
                    return Ok(length);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    self.latch.readable &= error.kind() != io::ErrorKind::WouldBlock;
                    return Err(error);
                }
            }
        }
    }
}

impl Session {
    /// Takes over a connection of which nothing has been exchanged yet.
    #[must_use]
    pub fn new(mut connection: Connection) -> Session {
        connection.set_buffer_limit(Some(RECORD_BYTES_MAX));
        Session { connection, claimed: 0, plaintext: 0, has_ended: false, first: None, is_broken: false }
    }

    /// Whether the peers have not agreed yet.
    #[must_use]
    pub fn is_handshaking(&self) -> bool {
        self.connection.is_handshaking()
    }

    /// Whether there is something to be read, bytes or an end, whatever the socket says.
    #[must_use]
    pub fn is_readable(&self) -> bool {
        self.plaintext > 0 || self.has_ended
    }

    /// The certificate that the peer has shown, in DER.
    #[must_use]
    pub fn peer_certificate(&self) -> Option<&[u8]> {
        self.connection.peer_certificates()?.first().map(|certificate| certificate.as_ref())
    }

    /// Goes on with the handshake as far as the socket allows.
    pub(super) fn handshake(
        &mut self,
        tcp: &mut mio::net::TcpStream,
        latch: &mut Latch,
    ) -> io::Result<Handshake> {
        let mut worked = false;
        loop {
            let is_flushed = self.flush(tcp, latch)?;
            if !self.is_handshaking() {
                return Ok(Handshake::Done);
            }
            if !latch.readable || !is_flushed {
                return Ok(if worked { Handshake::Worked } else { Handshake::Waits });
            }
            match self.receive(tcp, latch) {
                Ok(Some(0)) => {
                    let why = "the peer closed the connection during the TLS handshake";
                    return Err(io::Error::new(io::ErrorKind::UnexpectedEof, why));
                }
                Ok(Some(_)) => worked |= self.connection.wants_write() || !self.is_handshaking(),
                Ok(None) => {}
                Err(_) if self.first.is_some_and(|byte| byte.is_ascii_alphabetic()) => {
                    return Ok(Handshake::ClearText);
                }
                Err(error) => {
                    self.is_broken = true;
                    let _ = self.flush(tcp, latch);
                    return Err(error);
                }
            }
        }
    }

    pub(super) fn read(
        &mut self,
        tcp: &mut mio::net::TcpStream,
        latch: &mut Latch,
        buffer: &mut [u8],
    ) -> io::Result<ReadResult> {
        loop {
            match self.connection.reader().read(buffer) {
                Ok(0) => return Ok(ReadResult::Closed),
                Ok(length) => {
                    self.plaintext = self.plaintext.saturating_sub(length);
                    return Ok(ReadResult::Data(length));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.plaintext = 0,
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                    let why = "the connection was closed without a farewell (TLS close_notify)";
                    return Err(io::Error::new(io::ErrorKind::UnexpectedEof, why));
                }
                Err(error) => return Err(error),
            }
            if !latch.readable {
                return Ok(ReadResult::Empty);
            }
            match self.receive(tcp, latch) {
                Ok(Some(_)) => {}
                Ok(None) => return Ok(ReadResult::Empty),
                Err(error) => {
                    self.is_broken = true;
                    // An alert tells the peer what was wrong.
                    let _ = self.flush(tcp, latch);
                    return Err(error);
                }
            }
            if self.connection.wants_write() {
                self.flush(tcp, latch)?;
            }
        }
    }

    /// Reads one piece from the socket and decrypts it. `None` where there was none, `Some(0)` at the end.
    fn receive(&mut self, tcp: &mut mio::net::TcpStream, latch: &mut Latch) -> io::Result<Option<usize>> {
        let length = match self.connection.read_tls(&mut Tap { tcp, latch, first: &mut self.first }) {
            Ok(length) => length,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(error) => return Err(error),
        };
        let state = self
            .connection
            .process_new_packets()
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, format!("TLS: {error}")))?;
        self.plaintext = state.plaintext_bytes_to_read();
        self.has_ended = state.peer_has_closed();
        Ok(Some(length))
    }

    pub(super) fn write(
        &mut self,
        tcp: &mut mio::net::TcpStream,
        latch: &mut Latch,
        bytes: &[u8],
    ) -> io::Result<usize> {
        if self.is_handshaking() {
            return Ok(0);
        }
        loop {
            if !self.flush(tcp, latch)? {
                return Ok(0);
            }
            if self.claimed > 0 || bytes.is_empty() {
                return Ok(std::mem::take(&mut self.claimed).min(bytes.len()));
            }
            let piece = &bytes[..bytes.len().min(RECORD_BYTES_MAX)];
            self.claimed = self.connection.writer().write(piece)?;
            if self.claimed == 0 {
                return Ok(0);
            }
        }
    }

    /// Writes what is encrypted. False if the socket does not take all of it at the moment.
    fn flush(&mut self, tcp: &mut mio::net::TcpStream, latch: &mut Latch) -> io::Result<bool> {
        while self.connection.wants_write() {
            if !latch.writable {
                return Ok(false);
            }
            match self.connection.write_tls(tcp) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => latch.writable = false,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    /// From now on the peer is not told that the end is meant.
    pub(super) fn break_off(&mut self) {
        self.is_broken = true;
    }

    /// Tells the peer that the end is meant, as far as the socket takes that at once.
    pub(super) fn say_farewell(&mut self, tcp: &mut mio::net::TcpStream, latch: &mut Latch) {
        // In a handshake there is nothing yet that could be ended.
        if !std::mem::replace(&mut self.is_broken, true) && !self.is_handshaking() {
            self.connection.send_close_notify();
            let _ = self.flush(tcp, latch);
        }
    }
}
