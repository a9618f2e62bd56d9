//! Who may pass: every request stands before a [`Guard`] once its route is known, and before anything is
//! done for it. The guard holds the request's `Host` and `Origin` against the lists of [`hosts`], and its
//! token against the route's policy; what it refuses is counted, told to the log now and then, and answered
//! late where somebody guesses. It has no other influence on an answer than fields for web pages that may
//! read it.
//!
//! [`hosts`]: super::hosts

use std::collections::BTreeMap;
use std::net::SocketAddr;

use crate::http::fields::FieldLines;
use crate::http::head::RequestHead;
use crate::http::server::Response;
use crate::metrics::Scrape;
use crate::reactor::Registry;
use crate::reactor::token::Token;
use crate::settings::{Exit, Setting, Settings};
use crate::time::{Mono, earliest};

use super::attempts::Attempts;
use super::auth::{Denied, Fingerprint, Policy, Scope};
use super::credentials::Credentials;
use super::hosts::{Hosts, Origins};

/// Answers that wait at once; beyond them none waits. Each is a connection of somebody who guesses.
const HELD_MAX: usize = 1_024;

/// A setting of names that this server goes by.
#[must_use]
pub const fn hosts_setting(env: &'static str) -> Setting {
    Setting {
        flag: "allow-hosts",
        env,
        aliases: &[],
        default: None,
        value: "NAME,...",
        help: "Names by which clients reach this server beside addresses, localhost and the host's own name; * for any",
    }
}

/// A setting of web pages that may use this server.
#[must_use]
pub const fn origins_setting(env: &'static str) -> Setting {
    Setting {
        flag: "cors-origins",
        env,
        aliases: &[],
        default: None,
        value: "ORIGIN,...",
        help: "Origins of web pages that may use this server, such as https://chat.example; * for any; none if absent",
    }
}

/// Why a request may not pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Barred {
    /// Its token.
    Denied(Denied),
    /// Its `Host` is none of this server's names.
    Host,
    /// It was made by a web page of another origin.
    Origin,
}

impl Barred {
    /// What the caller is told; `prefix` is that of the program's variables.
    #[must_use]
    pub fn message(self, prefix: &str) -> String {
        match self {
            Barred::Denied(Denied::Missing) => "MISSING_TOKEN".into(),
            Barred::Denied(Denied::Bad(_)) => "BAD_TOKEN".into(),
            Barred::Denied(Denied::Scope) => "WRONG_SCOPE: the token is good, but not for this route".into(),
            Barred::Host => {
                format!("the Host is none of this server's names; {prefix}_ALLOW_HOSTS adds some")
            }
            Barred::Origin => {
                format!(
                    "web pages of other origins may not use this server; {prefix}_CORS_ORIGINS lists those that may"
                )
            }
        }
    }

    /// The number that stands in the place of a code in the flat envelope, where there is one.
    #[must_use]
    pub fn number(self) -> Option<u32> {
        match self {
            Barred::Denied(Denied::Missing) => Some(40101),
            Barred::Denied(Denied::Bad(_)) => Some(40102),
            _ => None,
        }
    }
}

/// What the guard says.
#[derive(Clone, Debug)]
pub enum Admission {
    /// It may pass.
    Pass {
        /// Its answer gets these fields.
        fields: FieldLines,
        /// The token that opened its route, where one was needed.
        key: Option<Fingerprint>,
    },
    /// It was a browser's question whether it may ask; this is the answer.
    Preflight(Response),
    /// It may not pass; its answer leaves so many milliseconds later.
    Barred(Barred, u64),
}

/// Stands before the routes of a daemon.
#[derive(Debug)]
pub struct Guard {
    /// The tokens.
    pub credentials: Credentials,
    hosts: Hosts,
    origins: Origins,
    attempts: Attempts,
    held: BTreeMap<(Mono, u64), (Token, Response)>,
    next_held: u64,
    foreign: [u64; 2],
}

/// What a guard goes by, as it was configured.
#[derive(Debug, Default)]
pub struct GuardConfig {
    /// The tokens.
    pub credentials: Credentials,
    /// Names of this server.
    pub hosts: Hosts,
    /// Pages that may use it.
    pub origins: Origins,
    /// Whether core dumps are allowed in any case.
    pub core_dumps: bool,
}

impl GuardConfig {
    /// Reads names and origins from settings, where the program has them.
    ///
    /// # Errors
    /// [`Exit`], see [`crate::settings`].
    pub fn read(settings: &Settings, credentials: Credentials) -> Result<GuardConfig, Exit> {
        Ok(GuardConfig {
            credentials,
            hosts: settings.get("allow-hosts", Hosts::parse)?.unwrap_or_default(),
            origins: settings.get("cors-origins", Origins::parse)?.unwrap_or_default(),
            core_dumps: settings.get("core-dumps", crate::settings::boolean)?.unwrap_or(false),
        })
    }
}

impl Guard {
    /// A guard for a server that also goes by `names`. Forbids core dumps where there are tokens.
    #[must_use]
    pub fn new(config: GuardConfig, names: &[String]) -> Guard {
        let GuardConfig { credentials, mut hosts, origins, core_dumps } = config;
        names.iter().for_each(|name| hosts.add(name));
        if !credentials.keys().is_empty() && !core_dumps {
            super::credentials::forbid_core_dumps();
        }
        Guard {
            credentials,
            hosts,
            origins,
            attempts: Attempts::default(),
            held: BTreeMap::new(),
            next_held: 0,
            foreign: [0; 2],
        }
    }

    /// Judges a request for `route`, whose policy it is.
    pub fn judge(
        &mut self,
        head: &RequestHead,
        policy: Policy,
        route: &str,
        peer: SocketAddr,
        now: Mono,
    ) -> Admission {
        let fields = &head.fields;
        let open = self.credentials.keys().is_empty();
        // Machines reach machines by many names, and no browser has their token.
        let by_machine = matches!(policy, Policy::Node | Policy::NodeOrAdmin) && !open;
        if policy != Policy::Public && !by_machine && !self.hosts.admit(fields) {
            self.foreign[0] += 1;
            return Admission::Barred(Barred::Host, 0);
        }
        if let Some(fields) = self.origins.preflight(head) {
            return Admission::Preflight(Response { fields, ..Response::empty(204) });
        }
        // Without a token, a page could otherwise command this server although it cannot read the answer.
        let harmless = policy.is_open() || matches!(head.method(), "GET" | "HEAD" | "OPTIONS");
        if open && !harmless && self.origins.is_foreign(fields) {
            self.foreign[1] += 1;
            return Admission::Barred(Barred::Origin, 0);
        }
        match self.credentials.keys().check(policy, fields) {
            Ok(key) => Admission::Pass { fields: self.origins.answer_fields(fields), key },
            Err(denied) => {
                Admission::Barred(Barred::Denied(denied), self.note(denied, head, route, peer, now))
            }
        }
    }

    fn note(&mut self, denied: Denied, head: &RequestHead, route: &str, peer: SocketAddr, now: Mono) -> u64 {
        let verdict = self.attempts.note(peer.ip(), denied, now);
        if let Some(count) = verdict.tell {
            let what = match denied {
                Denied::Missing => "no token".to_string(),
                Denied::Bad(fingerprint) => {
                    format!("an unknown token (its SHA-256 begins with {fingerprint})")
                }
                Denied::Scope => "the token of another scope".to_string(),
            };
            let method = match head.method() {
                known @ ("GET" | "HEAD" | "POST" | "PUT" | "PATCH" | "DELETE" | "OPTIONS") => known,
                _ => "another method",
            };
            let more = match (count, self.attempts.take_silenced()) {
                (0 | 1, 0) => String::new(),
                (count, 0) => format!("; {count} attempts since the last line"),
                (count, others) => {
                    format!("; {count} attempts since the last line, {others} lines about others left out")
                }
            };
            log::warn!("refused {}: {what} for {method} {route}{more}", peer.ip());
        }
        verdict.delay_ms
    }

    /// Keeps an answer back for so many milliseconds. Returns it where it is to leave at once.
    #[must_use]
    pub fn hold(&mut self, client: Token, response: Response, delay_ms: u64, now: Mono) -> Option<Response> {
        if delay_ms == 0 || self.held.len() >= HELD_MAX {
            return Some(response);
        }
        self.next_held += 1;
        self.held.insert((now.plus_ms(delay_ms), self.next_held), (client, response));
        None
    }

    /// An answer whose time has come.
    pub fn due(&mut self, now: Mono) -> Option<(Token, Response)> {
        let entry = self.held.first_entry().filter(|entry| entry.key().0 <= now)?;
        Some(entry.remove())
    }

    /// When [`Guard::due`] or [`Guard::turn`] is to be called at the latest.
    #[must_use]
    pub fn deadline(&self) -> Option<Mono> {
        let held = self.held.first_key_value().map(|((at, _), _)| *at);
        earliest(held, self.credentials.deadline())
    }

    /// Looks after the tokens. `changed`: a watch on their directories reported something.
    pub fn turn(&mut self, changed: bool, now: Mono, registry: &Registry) {
        self.credentials.turn(changed, now, registry);
    }

    /// The `Authorization` value that nodes and control planes are shown. A secret.
    #[must_use]
    pub fn bearer(&self, now: Mono) -> Option<String> {
        self.credentials.bearer(now)
    }

    /// Writes the metrics; `program` is their prefix.
    pub fn scrape(&self, program: &str, scrape: &mut Scrape) {
        self.attempts.scrape(program, scrape);
        self.credentials.scrape(program, scrape);
        let [hosts, origins] = self.foreign;
        scrape.counter(
            &format!("{program}_foreign_requests_total"),
            "Requests refused for their Host, or for the origin of the web page that made them.",
            &[("reason=\"host\"", hosts), ("reason=\"origin\"", origins)],
        );
    }

    /// Scopes that a token of its own opens, for the log: `client, node` say.
    #[must_use]
    pub fn shown(&self) -> String {
        let keys = self.credentials.keys();
        let set: Vec<&str> = Scope::ALL
            .iter()
            .filter(|scope| !keys.of(**scope).is_empty())
            .map(|scope| scope.as_str())
            .collect();
        if set.is_empty() { "no token".into() } else { format!("tokens for {}", set.join(", ")) }
    }
}
