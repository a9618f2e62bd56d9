//! Host names to addresses, on a helper thread that exists only once a name had to be asked for.
//!
//! Literals and `localhost` never leave the loop. Answers are remembered for a while; a failure is
//! remembered briefly, so that a dead name server is not asked for every request.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};

use crate::reactor::Waker;
use crate::reactor::offload::Offload;
use crate::time::Mono;
use crate::wire::url::BaseUrl;

/// How long an answer is used.
const ANSWER_MS: u64 = 30_000;
/// How long a failure is used.
const FAILURE_MS: u64 = 2_000;
/// Names remembered at once.
const NAMES_MAX: usize = 4096;
/// Names that wait for the helper.
const QUEUE_MAX: usize = 256;

type Answer = Result<IpAddr, String>;

/// What is known about a name now.
#[derive(Debug, PartialEq, Eq)]
pub enum Resolved {
    /// An address.
    Address(SocketAddr),
    /// The helper was asked; [`Resolver::take`] will tell.
    Asked,
    /// No address, and why.
    Failed(String),
}

/// The names and their addresses.
#[derive(Debug)]
pub struct Resolver {
    waker: Waker,
    helper: Option<Offload<String, (String, Answer)>>,
    known: BTreeMap<String, (Answer, Mono)>,
    asked: BTreeMap<String, ()>,
}

impl Resolver {
    /// Knows nothing yet.
    #[must_use]
    pub fn new(waker: Waker) -> Resolver {
        Resolver { waker, helper: None, known: BTreeMap::new(), asked: BTreeMap::new() }
    }

    /// The address behind `url`.
    pub fn resolve(&mut self, url: &BaseUrl, now: Mono) -> Resolved {
        if let Some(ip) = url.ip() {
            return Resolved::Address(SocketAddr::new(ip, url.port()));
        }
        match self.known.get(url.host()) {
            Some((answer, until)) if *until > now => match answer {
                Ok(ip) => Resolved::Address(SocketAddr::new(*ip, url.port())),
                Err(error) => Resolved::Failed(error.clone()),
            },
            _ => self.ask(url.host()),
        }
    }

    /// Takes an answer of the helper: a name that can be resolved again now.
    pub fn take(&mut self, now: Mono) -> Option<String> {
        let (name, answer) = self.helper.as_ref()?.take()?;
        self.asked.remove(&name);
        if self.known.len() >= NAMES_MAX {
            self.known.retain(|_, (_, until)| *until > now);
        }
        if self.known.len() >= NAMES_MAX {
            // Some name must go: an answer that is not kept would be asked for again and again.
            self.known.pop_first();
        }
        let until = now.plus_ms(if answer.is_ok() { ANSWER_MS } else { FAILURE_MS });
        self.known.insert(name.clone(), (answer, until));
        Some(name)
    }

    fn ask(&mut self, name: &str) -> Resolved {
        if self.asked.contains_key(name) {
            return Resolved::Asked;
        }
        if self.helper.is_none() {
            match Offload::spawn("resolver", QUEUE_MAX, self.waker.clone(), look_up) {
                Ok(helper) => self.helper = Some(helper),
                Err(error) => return Resolved::Failed(format!("no thread for name resolution: {error}")),
            }
        }
        match self.helper.as_ref().map(|helper| helper.submit(name.to_string())) {
            Some(Ok(())) => {
                self.asked.insert(name.to_string(), ());
                Resolved::Asked
            }
            _ => Resolved::Failed("too many names wait for the name server".into()),
        }
    }
}

fn look_up(name: String) -> (String, Answer) {
    let answer = match (name.as_str(), 0).to_socket_addrs() {
        // IPv4 first: engines that listen on one family only mostly choose that one.
        Ok(found) => {
            let found: Vec<IpAddr> = found.map(|address| address.ip()).collect();
            let first = found.iter().find(|ip| ip.is_ipv4()).or(found.first()).copied();
            first.ok_or_else(|| format!("{name} has no address"))
        }
        Err(error) => Err(format!("{name} cannot be resolved: {error}")),
    };
    (name, answer)
}
