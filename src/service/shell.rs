//! What every daemon's shell starts with: the reactor, its signals, and the sockets.

use std::io;
use std::net::SocketAddr;

use crate::net::{Limits, Net};
use crate::reactor::signal::Signals;
use crate::reactor::token::{Kind, Token};
use crate::reactor::{Reactor, Registry, Waker};
use crate::settings::Exit;

use super::auth::Keys;
use super::memory::{Fixed, Given};
use super::supervisor::Supervisor;
use super::{activation, machine, memory};

/// The parts of a shell that do not differ between daemons.
#[derive(Debug)]
pub struct Shell {
    /// Waits.
    pub reactor: Reactor,
    /// Where further sources register.
    pub registry: Registry,
    /// For helper threads.
    pub waker: Waker,
    /// SIGTERM, SIGINT and SIGHUP.
    pub signals: Signals,
    /// Clients and upstreams.
    pub net: Net,
    /// Where it listens; the first address where there are several.
    pub bound: SocketAddr,
    /// Whom to tell how it is.
    pub supervisor: Supervisor,
}

impl Shell {
    /// Takes what the kernel has to give, and listens on `addr`, or on the sockets that the service manager
    /// handed over instead; `variable` is the setting to name where that fails.
    ///
    /// `adjust` changes the limits of the sockets; together with what is `fixed` they must fit into `memory`.
    ///
    /// # Errors
    /// [`Exit`] that says what could not be had and what to do.
    pub fn start(
        addr: SocketAddr,
        variable: &str,
        adjust: impl FnOnce(&mut Limits),
        fixed: Fixed,
        memory: Option<Given>,
    ) -> Result<Shell, Exit> {
        let kernel = |what: &'static str| {
            move |error: io::Error| Exit::runtime(format!("the kernel gives no {what}: {error}"))
        };
        // Before there are threads: it takes variables out of the environment.
        let handed_over = activation::listeners()?;
        let descriptors = machine::raise_descriptor_limit();
        machine::prepare_descriptors(descriptors);
        let reactor = Reactor::new().map_err(kernel("epoll descriptor"))?;
        let registry = reactor.registry().map_err(kernel("descriptor"))?;
        let waker = reactor.waker(Token::only(Kind::Waker)).map_err(kernel("eventfd"))?;
        let signals = Signals::install(&registry).map_err(kernel("socket pair"))?;
        let net_registry = reactor.registry().map_err(kernel("descriptor"))?;
        let mut limits = Limits::within_descriptors(descriptors);
        adjust(&mut limits);
        if let Some(lowered) = memory::fit(&mut limits, fixed, memory)? {
            log::warn!("{lowered}");
        }
        let mut net = Net::new(net_registry, waker.clone(), limits);
        let mut bound = None;
        for listener in handed_over {
            let address = net.listen_on(listener).map_err(kernel("place among what is waited for"))?;
            log::info!("listening on {address}, as the service manager says; {variable} is not used");
            bound = bound.or(Some(address));
        }
        let bound = bound.map_or_else(|| net.listen(addr), Ok).map_err(|error| {
            Exit::runtime(format!(
                "cannot listen on {addr}: {error}; stop what listens there or set {variable}"
            ))
        })?;
        let supervisor = Supervisor::from_environment();
        Ok(Shell { reactor, registry, waker, signals, net, bound, supervisor })
    }
}

/// Warns where the service manager chose an address that is open while the configured one is not.
pub fn note_other_address(configured: SocketAddr, bound: SocketAddr, keys: &Keys) {
    if keys.is_empty() && configured.ip().is_loopback() && !bound.ip().is_loopback() {
        log::warn!(
            "NO TOKEN IS SET and {bound} is reachable from other machines: anybody there can use and command this daemon; set LLORCH_API_TOKEN_FILE"
        );
    }
}
