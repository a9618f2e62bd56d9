//! Nonblocking TCP streams read and written through a [`Latch`], in the clear or through TLS.
//!
//! Every stream has `TCP_NODELAY`: a token that waits for the next one to share a segment is a token
//! that is late.
//!
//! What the kernel keeps of a stream is bounded too: by itself it would keep megabytes of an answer for a client that
//! reads slowly, and as many of an engine's for us.

use std::io::{self, Read, Write};
use std::net::SocketAddr;

use rustix::net::sockopt;

use super::ready::Latch;
use super::tls::{Handshake, Session};
use super::token::Token;
use super::{Edge, Registry};

/// What the kernel may keep, in bytes, for a client that does not read, and of an engine that is not read. It takes up
/// to twice as much memory for it. Enough for 2 MB a second to a client that is 100 ms away.
const KERNEL_BUFFER_BYTES: usize = 192 * 1024;

/// What a read found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadResult {
    /// This many bytes.
    Data(usize),
    /// Nothing for now.
    Empty,
    /// The peer has closed its side.
    Closed,
}

/// One connection.
#[derive(Debug)]
pub struct Stream {
    tcp: mio::net::TcpStream,
    /// Of the socket.
    latch: Latch,
    /// `None`: in the clear.
    tls: Option<Box<Session>>,
}

impl Stream {
    /// Begins to connect; writability tells that it ended, [`Stream::connect_result`] how.
    ///
    /// # Errors
    /// Errors that show at once: no route, no descriptors.
    pub fn connect(address: SocketAddr, registry: &Registry, token: Token) -> io::Result<Stream> {
        let mut tcp = mio::net::TcpStream::connect(address)?;
        let _ = tcp.set_nodelay(true);
        let _ = sockopt::set_socket_recv_buffer_size(&tcp, KERNEL_BUFFER_BYTES);
        registry.register(&mut tcp, token.into(), BOTH)?;
        Ok(Stream { tcp, latch: Latch::default(), tls: None })
    }

    /// Takes over an accepted connection.
    ///
    /// # Errors
    /// Where it cannot be registered.
    pub fn accepted(mut tcp: mio::net::TcpStream, registry: &Registry, token: Token) -> io::Result<Stream> {
        let _ = tcp.set_nodelay(true);
        registry.register(&mut tcp, token.into(), BOTH)?;
        Ok(Stream { tcp, latch: Latch::OPTIMISTIC, tls: None })
    }

    /// Speaks TLS from the first byte on.
    #[must_use]
    pub fn secured(mut self, session: Option<Session>) -> Stream {
        self.tls = session.map(Box::new);
        self
    }

    /// Whether a TLS handshake has to be completed first, by [`Stream::handshake`].
    #[must_use]
    pub fn is_handshaking(&self) -> bool {
        self.tls.as_ref().is_some_and(|tls| tls.is_handshaking())
    }

    /// Goes on with the handshake as far as the socket allows. After [`Handshake::ClearText`] the stream is
    /// one in the clear, whose first bytes are lost.
    ///
    /// # Errors
    /// The peer speaks no TLS that can be agreed on, or shows a certificate that is not accepted; it has
    /// been told so where that is possible.
    pub fn handshake(&mut self) -> io::Result<Handshake> {
        let Some(tls) = &mut self.tls else { return Ok(Handshake::Done) };
        let step = tls.handshake(&mut self.tcp, &mut self.latch)?;
        if step == Handshake::ClearText {
            self.tls = None;
        }
        Ok(step)
    }

    /// The certificate that the peer has shown within TLS, in DER.
    #[must_use]
    pub fn peer_certificate(&self) -> Option<&[u8]> {
        self.tls.as_ref()?.peer_certificate()
    }

    /// The kernel reported.
    pub fn on_edge(&mut self, edge: Edge) {
        self.latch.on_edge(edge);
    }

    /// What is known of it.
    #[must_use]
    pub fn latch(&self) -> Latch {
        match &self.tls {
            None => self.latch,
            Some(tls) => Latch { readable: self.latch.readable || tls.is_readable(), ..self.latch },
        }
    }

    /// How a connect ended: `Ok(false)` while it has not.
    ///
    /// # Errors
    /// Why it failed.
    pub fn connect_result(&mut self) -> io::Result<bool> {
        if let Some(error) = self.tcp.take_error()? {
            return Err(error);
        }
        match self.tcp.peer_addr() {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotConnected => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Reads into `buffer`, which must not be empty.
    ///
    /// # Errors
    /// The connection is broken.
    pub fn read(&mut self, buffer: &mut [u8]) -> io::Result<ReadResult> {
        if let Some(tls) = &mut self.tls {
            return tls.read(&mut self.tcp, &mut self.latch, buffer);
        }
        if !self.latch.readable {
            return Ok(ReadResult::Empty);
        }
        loop {
            match self.tcp.read(buffer) {
                Ok(0) => return Ok(ReadResult::Closed),
                Ok(length) => {
                    // A short read has emptied the socket: more bytes make a new edge. After a hangup
                    // no further edge comes, and the end is still to be read.
                    self.latch.readable = length == buffer.len() || self.latch.hangup;
                    return Ok(ReadResult::Data(length));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.latch.readable = false;
                    return Ok(ReadResult::Empty);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Writes what the socket takes of `bytes`; 0 for nothing at the moment. What was not taken must come
    /// again before anything else: part of it may be encrypted already.
    ///
    /// # Errors
    /// The connection is broken.
    pub fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if let Some(tls) = &mut self.tls {
            return tls.write(&mut self.tcp, &mut self.latch, bytes);
        }
        if !self.latch.writable {
            return Ok(0);
        }
        loop {
            match self.tcp.write(bytes) {
                Ok(length) => {
                    self.latch.writable = length == bytes.len();
                    return Ok(length);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.latch.writable = false;
                    return Ok(0);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Tells the peer that nothing more comes; it can still be read.
    pub fn shut_down_write(&mut self) {
        self.say_farewell();
        let _ = self.tcp.shutdown(std::net::Shutdown::Write);
    }

    /// From now on a close is a reset, which no peer takes for the end of a message.
    pub fn reset_on_close(&mut self) {
        if let Some(tls) = &mut self.tls {
            tls.break_off();
        }
        let _ = rustix::net::sockopt::set_socket_linger(&self.tcp, Some(std::time::Duration::ZERO));
    }

    /// Leaves the poll before it is dropped. Within TLS the peer is told that this end is meant, unless the
    /// connection is to be reset.
    pub fn deregister(&mut self, registry: &Registry) {
        self.say_farewell();
        let _ = registry.deregister(&mut self.tcp);
    }

    fn say_farewell(&mut self) {
        if let Some(tls) = &mut self.tls {
            tls.say_farewell(&mut self.tcp, &mut self.latch);
        }
    }
}

const BOTH: mio::Interest = mio::Interest::READABLE.add(mio::Interest::WRITABLE);

/// A listening socket.
#[derive(Debug)]
pub struct Listener {
    tcp: mio::net::TcpListener,
}

impl Listener {
    /// Binds and registers. Port 0 takes a free one.
    ///
    /// # Errors
    /// Address in use, no permission, no such address.
    pub fn bind(address: SocketAddr, registry: &Registry, token: Token) -> io::Result<Listener> {
        Listener::register(mio::net::TcpListener::bind(address)?, registry, token)
    }

    /// Registers a socket that listens already and does not block.
    ///
    /// # Errors
    /// Where the kernel cannot wait for one more descriptor.
    pub fn adopt(tcp: std::net::TcpListener, registry: &Registry, token: Token) -> io::Result<Listener> {
        Listener::register(mio::net::TcpListener::from_std(tcp), registry, token)
    }

    fn register(mut tcp: mio::net::TcpListener, registry: &Registry, token: Token) -> io::Result<Listener> {
        // Accepted connections inherit it.
        let _ = sockopt::set_socket_send_buffer_size(&tcp, KERNEL_BUFFER_BYTES);
        registry.register(&mut tcp, token.into(), mio::Interest::READABLE)?;
        Ok(Listener { tcp })
    }

    /// The bound address.
    ///
    /// # Errors
    /// Where the kernel does not tell.
    pub fn local_address(&self) -> io::Result<SocketAddr> {
        self.tcp.local_addr()
    }

    /// The next waiting connection, if there is one.
    ///
    /// # Errors
    /// Out of descriptors or memory; a connection that died while it waited is skipped.
    pub fn accept(&self) -> io::Result<Option<(mio::net::TcpStream, SocketAddr)>> {
        loop {
            match self.tcp.accept() {
                Ok(accepted) => return Ok(Some(accepted)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) if is_transient(&error) => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Leaves the poll: no further connection is accepted.
    pub fn deregister(&mut self, registry: &Registry) {
        let _ = registry.deregister(&mut self.tcp);
    }
}

fn is_transient(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset
    )
}
