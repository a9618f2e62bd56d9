//! Signals as readable sources: each arrives as a byte on a socket pair.
//!
//! Not a signalfd, because that needs a blocked signal mask, which children would inherit.

use std::io::{self, Read};

use super::Registry;
use super::token::{Kind, Token};

/// SIGTERM and SIGINT under [`Kind::Stop`], SIGHUP under [`Kind::Reload`].
#[derive(Debug)]
pub struct Signals {
    stop: mio::net::UnixStream,
    reload: mio::net::UnixStream,
}

impl Signals {
    /// Installs the handlers.
    ///
    /// # Errors
    /// Where no socket pair can be had.
    pub fn install(registry: &Registry) -> io::Result<Signals> {
        use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
        Ok(Signals {
            stop: source(registry, Token::only(Kind::Stop), &[SIGTERM, SIGINT])?,
            reload: source(registry, Token::only(Kind::Reload), &[SIGHUP])?,
        })
    }

    /// How many SIGTERM and SIGINT arrived since the last call.
    pub fn stops(&mut self) -> usize {
        drain(&mut self.stop)
    }

    /// How many SIGHUP arrived since the last call.
    pub fn reloads(&mut self) -> usize {
        drain(&mut self.reload)
    }
}

fn source(registry: &Registry, token: Token, signals: &[i32]) -> io::Result<mio::net::UnixStream> {
    let (write, read) = std::os::unix::net::UnixStream::pair()?;
    write.set_nonblocking(true)?;
    read.set_nonblocking(true)?;
    for signal in signals {
        signal_hook::low_level::pipe::register(*signal, write.try_clone()?)?;
    }
    let mut read = mio::net::UnixStream::from_std(read);
    registry.register(&mut read, token.into(), mio::Interest::READABLE)?;
    Ok(read)
}

fn drain(source: &mut mio::net::UnixStream) -> usize {
    let (mut count, mut buffer) = (0, [0; 64]);
    loop {
        match source.read(&mut buffer) {
            Ok(0) | Err(_) => return count,
            Ok(length) => count += length,
        }
    }
}
