//! Who is told at once when a replica becomes ready or stops being ready.
//!
//! A callback is a URL that somebody registered, for one pool or for all. Every change of readiness
//! becomes a [`Notice`] with a number of its own; each callback keeps the newest notice of every replica
//! that it has not confirmed yet, so what waits is bounded by the replicas and not by their changes. One
//! delivery is under way for a callback at a time; one that fails is repeated with growing pauses under
//! the same event id, so that receivers can tell a repetition from a change.
//!
//! Input: registrations, readiness, outcomes, the time. Output: [`Delivery`]s, and what happened. How a
//! delivery becomes a request is `callback_client.rs`'s business; the addresses behind a host name are held
//! against the [`Policy`] where they are dialled.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::replicas::EnginePolicy;
use crate::service::events::Happening;
use crate::time::{Mono, Now, Wall, earliest};
use crate::wire::id::{NodeId, PoolId, ReplicaKey};
use crate::wire::node::REPLICAS_MAX;
use crate::wire::pool::ReplicaStatus;
use crate::wire::url::BaseUrl;

/// Most callbacks: a few control planes and tools, not every client.
pub const CALLBACKS_MAX: usize = 64;
/// Most notices that wait for one callback, one a replica: four times what a pool may hold.
pub const PENDING_MAX: usize = 4 * REPLICAS_MAX;
/// Deliveries under way at once: some receivers may hang without delaying others.
pub const DELIVERIES_MAX: usize = 4;
/// Pause after the first failure, in milliseconds; it doubles with every further one.
pub const RETRY_MS_MIN: u64 = 500;
/// Longest pause, in milliseconds.
pub const RETRY_MS_MAX: u64 = 60_000;
/// Failures in a row after which what waits is given up: about a quarter of an hour.
pub const ATTEMPTS_MAX: u32 = 20;
/// Longest error that is shown, in characters.
const ERROR_CHARS_MAX: usize = 200;

/// Which URLs may be called back.
///
/// Whoever may command this agent could otherwise make it knock anywhere: so only this machine, private
/// networks and the configured control planes are called, and never link-local addresses, where metadata
/// services live.
#[derive(Clone, Debug)]
pub struct Policy {
    rules: EnginePolicy,
    planes: Vec<BaseUrl>,
}

/// A change of one replica's readiness.
#[derive(Debug, PartialEq, Eq)]
pub struct Notice {
    /// Its number: higher ones are newer.
    pub event: u64,
    /// The replica.
    pub key: ReplicaKey,
    /// Where its engine listens.
    pub url: BaseUrl,
    /// Whether it takes work.
    pub ready: bool,
    /// Changes when another engine process stands behind the same name.
    pub generation: u64,
    /// Its state as the API spells it, or `gone`.
    pub state: String,
    /// Why it is not ready.
    pub reason: Option<String>,
    /// When it changed.
    pub at: Wall,
}

/// A notice to be posted. Its outcome is handed to [`Notifier::delivered`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Delivery {
    /// The callback.
    pub callback: u64,
    /// Number of the notice.
    pub event: u64,
    /// Where to post it.
    pub url: BaseUrl,
    /// The same for every repetition of a notice, and for no other notice.
    pub event_id: String,
    /// Whether the receiver is a configured control plane, which is shown this agent's token.
    pub is_trusted: bool,
    /// The notice as JSON.
    pub body: String,
}

/// A callback as it is kept over a restart.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredCallback {
    /// Where notices are posted.
    pub url: BaseUrl,
    /// The pool that it is about; every pool if absent.
    #[serde(default)]
    pub pool_id: Option<PoolId>,
}

/// Why a callback is not registered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NotRegistered {
    /// Callbacks are switched off.
    Disabled,
    /// The URL must not be called, and why.
    Url(String),
    /// There are [`CALLBACKS_MAX`] callbacks already.
    TooMany,
}

/// Counters for the metrics.
#[derive(Clone, Copy, Debug, Default)]
pub struct CallbackCounts {
    /// Notices that a receiver took.
    pub delivered: u64,
    /// Attempts that failed.
    pub failed: u64,
    /// Notices that were given up.
    pub given_up: u64,
    /// Notices that found no room.
    pub dropped: u64,
}

/// The callbacks of one agent. See the file's text.
#[derive(Debug, Default)]
pub struct Notifier {
    /// `None`: callbacks are switched off.
    origin: Option<Origin>,
    callbacks: BTreeMap<u64, Callback>,
    /// Replicas that are ready, with the notice that said so.
    ready: BTreeMap<ReplicaKey, Arc<Notice>>,
    last_id: u64,
    last_event: u64,
    under_way: usize,
    revision: u64,
    counts: CallbackCounts,
}

/// What is the same in every notice.
#[derive(Debug)]
struct Origin {
    node_id: NodeId,
    incarnation: u64,
    policy: Policy,
}

#[derive(Debug)]
struct Callback {
    url: BaseUrl,
    pool: Option<PoolId>,
    /// From the configuration, which brings it back at the next start.
    is_configured: bool,
    pending: BTreeMap<ReplicaKey, Arc<Notice>>,
    under_way: Option<Arc<Notice>>,
    /// Failures in a row.
    failures: u32,
    /// When the next delivery is due, if anything waits.
    next_at: Option<Now>,
    delivered: u64,
    last: Option<(Wall, Result<(), String>)>,
}

impl Policy {
    /// `rules` say what is never called; `planes` are the configured control planes and the configured
    /// callback.
    #[must_use]
    pub fn new(rules: EnginePolicy, planes: Vec<BaseUrl>) -> Policy {
        Policy { rules, planes }
    }

    /// Whether a callback may be registered for `url`. A host name passes: the address behind it is
    /// judged whenever it is resolved.
    ///
    /// # Errors
    /// A sentence that names the URL and the rule.
    pub fn check(&self, url: &BaseUrl) -> Result<(), String> {
        url.ip().map_or(Ok(()), |ip| self.check_address(url, ip))
    }

    /// Whether an address that `url` names or resolved to may be called.
    ///
    /// # Errors
    /// As [`Policy::check`].
    pub fn check_address(&self, url: &BaseUrl, ip: IpAddr) -> Result<(), String> {
        self.rules.check_address(url, ip)?;
        let ip = ip.to_canonical();
        let is_plane = self.planes.iter().any(|plane| plane.host() == url.host());
        if ip.is_loopback() || is_private(ip) || is_plane {
            Ok(())
        } else {
            Err(format!(
                "{url}: {ip} is neither on this machine nor in a private network nor a control plane of ORCHESTRATORD_URL"
            ))
        }
    }

    /// Whether `url` belongs to a configured control plane or is the configured callback: only those see
    /// this agent's token. Another port of the same host is another program.
    #[must_use]
    pub fn is_trusted(&self, url: &BaseUrl) -> bool {
        self.planes.iter().any(|plane| (plane.host(), plane.port()) == (url.host(), url.port()))
    }
}

fn is_private(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(v4) => v4.is_private(),
        IpAddr::V6(v6) => v6.is_unique_local(),
    }
}

impl Notifier {
    /// Switches callbacks on. `incarnation` keeps the event ids of one start apart from those of others.
    pub fn enable(&mut self, node_id: NodeId, incarnation: u64, policy: Policy) {
        self.origin = Some(Origin { node_id, incarnation, policy });
    }

    /// Whether callbacks are switched on.
    #[must_use]
    pub fn is_enabled(&self) -> bool {
        self.origin.is_some()
    }

    /// Registers a callback for a pool, or for every pool. What is ready now is delivered at once, also
    /// when the callback was registered before: its receiver may have forgotten.
    ///
    /// # Errors
    /// [`NotRegistered`].
    pub fn register(
        &mut self,
        url: &BaseUrl,
        pool: Option<PoolId>,
        is_configured: bool,
        now: Now,
        happenings: &mut Vec<Happening>,
    ) -> Result<(), NotRegistered> {
        let origin = self.origin.as_ref().ok_or(NotRegistered::Disabled)?;
        origin.policy.check(url).map_err(NotRegistered::Url)?;
        let known = self.callbacks.iter().find(|(_, known)| known.url == *url && known.pool == pool);
        let id = match known.map(|(id, _)| *id) {
            Some(id) => id,
            None if self.callbacks.len() >= CALLBACKS_MAX => return Err(NotRegistered::TooMany),
            None => {
                self.last_id += 1;
                self.revision += 1;
                let text = format!("callback {url} registered for {}", pool_text(pool.as_ref()));
                happenings.push(happening(url, "registered", text, false));
                self.callbacks.insert(self.last_id, Callback::new(url.clone(), pool, is_configured));
                self.last_id
            }
        };
        let Some(callback) = self.callbacks.get_mut(&id) else { return Ok(()) };
        callback.failures = 0;
        callback.next_at = None;
        for notice in self.ready.values() {
            self.counts.dropped += u64::from(!callback.queue(notice, now));
        }
        if !callback.pending.is_empty() {
            callback.next_at = Some(now);
        }
        Ok(())
    }

    /// Removes the callbacks of a URL, of all pools or of one. Returns how many there were.
    pub fn unregister(
        &mut self,
        url: &BaseUrl,
        pool: Option<&PoolId>,
        happenings: &mut Vec<Happening>,
    ) -> usize {
        let before = self.callbacks.len();
        let meant =
            |known: &Callback| known.url == *url && pool.is_none_or(|pool| known.pool.as_ref() == Some(pool));
        self.callbacks.retain(|_, known| !meant(known));
        let removed = before - self.callbacks.len();
        if removed > 0 {
            self.revision += 1;
            happenings.push(happening(url, "removed", format!("callback {url} removed"), false));
        }
        removed
    }

    /// Takes how a replica stands now; `None` if it is gone.
    pub fn observe(&mut self, key: &ReplicaKey, status: Option<ReplicaStatus>, now: Now) {
        if self.origin.is_none() {
            return;
        }
        let known = self.ready.get(key);
        let is_ready = status.as_ref().is_some_and(|status| status.ready);
        let is_news = match (known, &status) {
            (Some(known), Some(status)) if is_ready => {
                (known.generation, &known.url) != (status.generation, &status.url)
            }
            (known, _) => known.is_some() != is_ready,
        };
        if !is_news {
            return;
        }
        let notice = match (status, known) {
            (Some(status), _) => Notice {
                event: self.last_event + 1,
                key: key.clone(),
                url: status.url,
                ready: status.ready,
                generation: status.generation,
                state: status.state,
                reason: (!status.ready).then_some(status.reason),
                at: now.wall,
            },
            (None, Some(known)) => Notice {
                event: self.last_event + 1,
                key: key.clone(),
                url: known.url.clone(),
                ready: false,
                generation: known.generation,
                state: "gone".into(),
                reason: Some("nothing announces it any more".into()),
                at: now.wall,
            },
            (None, None) => return,
        };
        self.last_event += 1;
        let notice = Arc::new(notice);
        if notice.ready {
            self.ready.insert(key.clone(), notice.clone());
        } else {
            self.ready.remove(key);
        }
        for callback in self.callbacks.values_mut() {
            self.counts.dropped += u64::from(!callback.queue(&notice, now));
        }
    }

    /// Hands out the deliveries that are due, one a callback and [`DELIVERIES_MAX`] in all at once.
    pub fn poll(&mut self, now: Now) -> Vec<Delivery> {
        let mut due = Vec::new();
        let Some(origin) = &self.origin else { return due };
        while self.under_way < DELIVERIES_MAX {
            let waiting = self.callbacks.iter_mut().filter_map(|(id, callback)| {
                let at = callback.due_at().filter(|at| *at <= now.mono)?;
                Some((at, *id, callback))
            });
            let Some((_, id, callback)) = waiting.min_by_key(|(at, id, _)| (*at, *id)) else { break };
            // The oldest first, so that a receiver sees changes in their order.
            let Some(notice) = callback.pending.values().min_by_key(|notice| notice.event).cloned() else {
                break;
            };
            callback.under_way = Some(notice.clone());
            self.under_way += 1;
            due.push(origin.delivery(id, &callback.url, &notice));
        }
        due
    }

    /// When [`Notifier::poll`] is wanted next.
    #[must_use]
    pub fn deadline(&self) -> Option<Mono> {
        if self.under_way >= DELIVERIES_MAX {
            return None;
        }
        self.callbacks.values().fold(None, |at, callback| earliest(at, callback.due_at()))
    }

    /// Takes the outcome of a delivery. `random` draws a number below its argument.
    pub fn delivered(
        &mut self,
        id: u64,
        event: u64,
        outcome: Result<(), String>,
        now: Now,
        random: &mut dyn FnMut(u64) -> u64,
        happenings: &mut Vec<Happening>,
    ) {
        self.under_way = self.under_way.saturating_sub(1);
        match outcome {
            Ok(()) => self.counts.delivered += 1,
            Err(_) => self.counts.failed += 1,
        }
        let Some(callback) = self.callbacks.get_mut(&id) else { return };
        let Some(notice) = callback.under_way.take_if(|notice| notice.event == event) else { return };
        match &outcome {
            Ok(()) => {
                if callback.pending.get(&notice.key).is_some_and(|waits| waits.event == event) {
                    callback.pending.remove(&notice.key);
                }
                if callback.failures > 0 {
                    let text = format!("callback {} takes notices again", callback.url);
                    happenings.push(happening(&callback.url, "delivered", text, false));
                }
                callback.delivered += 1;
                callback.failures = 0;
                callback.next_at = (!callback.pending.is_empty()).then_some(now);
            }
            Err(error) => {
                let error: String = error.chars().filter(|c| !c.is_control()).take(ERROR_CHARS_MAX).collect();
                callback.failures += 1;
                if callback.failures == 1 {
                    let text = format!("callback {}: {error}; it is tried again", callback.url);
                    happenings.push(happening(&callback.url, "failing", text, true));
                }
                callback.next_at = Some(now.plus_ms(pause_ms(callback.failures, random)));
                if callback.failures >= ATTEMPTS_MAX {
                    let waiting = callback.pending.len();
                    let text = format!(
                        "callback {}: {waiting} notices given up after {ATTEMPTS_MAX} attempts: {error}",
                        callback.url
                    );
                    happenings.push(happening(&callback.url, "given-up", text, true));
                    self.counts.given_up += waiting as u64;
                    callback.pending.clear();
                    callback.failures = 0;
                    callback.next_at = None;
                }
            }
        }
        callback.last = Some((now.wall, outcome));
    }

    /// Counters for the metrics.
    #[must_use]
    pub fn counts(&self) -> CallbackCounts {
        self.counts
    }

    /// Callbacks, and notices that wait for them.
    #[must_use]
    pub fn sizes(&self) -> (usize, usize) {
        (self.callbacks.len(), self.callbacks.values().map(|callback| callback.pending.len()).sum())
    }

    /// The answer to `GET /v2/callbacks`.
    #[must_use]
    pub fn to_json(&self) -> serde_json::Value {
        let callbacks: Vec<serde_json::Value> = self.callbacks.values().map(Callback::to_json).collect();
        serde_json::json!({"enabled": self.is_enabled(), "callbacks": callbacks})
    }

    /// Grows with everything that [`Notifier::export`] would tell differently.
    #[must_use]
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// The callbacks that a restart must not forget; those of the configuration come back by themselves.
    #[must_use]
    pub fn export(&self) -> Vec<StoredCallback> {
        let asked = self.callbacks.values().filter(|callback| !callback.is_configured);
        asked.map(|known| StoredCallback { url: known.url.clone(), pool_id: known.pool.clone() }).collect()
    }

    /// Takes back what [`Notifier::export`] gave to an earlier process. What the policy no longer allows
    /// is left out.
    pub fn restore(&mut self, stored: &[StoredCallback], now: Now, happenings: &mut Vec<Happening>) {
        for callback in stored {
            if let Err(NotRegistered::Url(why)) =
                self.register(&callback.url, callback.pool_id.clone(), false, now, happenings)
            {
                happenings.push(happening(
                    &callback.url,
                    "removed",
                    format!("callback left out: {why}"),
                    true,
                ));
            }
        }
    }
}

impl Origin {
    fn delivery(&self, callback: u64, url: &BaseUrl, notice: &Notice) -> Delivery {
        let event_id = format!("{}-{}-{}", self.node_id, self.incarnation, notice.event);
        let mut body = serde_json::json!({
            "node_id": self.node_id,
            "pool_id": notice.key.pool,
            "replica_id": notice.key.replica,
            "url": notice.url,
            "ready": notice.ready,
            "generation": notice.generation,
            "state": notice.state,
            "at_ms": notice.at.unix_ms(),
            "event_id": event_id,
        });
        if let Some(reason) = &notice.reason {
            body["reason"] = serde_json::json!(reason);
        }
        Delivery {
            callback,
            event: notice.event,
            url: url.clone(),
            event_id,
            is_trusted: self.policy.is_trusted(url),
            body: body.to_string(),
        }
    }
}

impl Callback {
    fn new(url: BaseUrl, pool: Option<PoolId>, is_configured: bool) -> Callback {
        Callback {
            url,
            pool,
            is_configured,
            pending: BTreeMap::new(),
            under_way: None,
            failures: 0,
            next_at: None,
            delivered: 0,
            last: None,
        }
    }

    /// Adds a notice that concerns it. False if there is no room.
    fn queue(&mut self, notice: &Arc<Notice>, now: Now) -> bool {
        if self.pool.as_ref().is_some_and(|pool| *pool != notice.key.pool) {
            return true;
        }
        if self.pending.len() >= PENDING_MAX && !self.pending.contains_key(&notice.key) {
            return false;
        }
        self.pending.insert(notice.key.clone(), notice.clone());
        self.next_at.get_or_insert(now);
        true
    }

    fn due_at(&self) -> Option<Mono> {
        let waits = self.under_way.is_none() && !self.pending.is_empty();
        self.next_at.filter(|_| waits).map(|at| at.mono)
    }

    fn to_json(&self) -> serde_json::Value {
        let state = match (&self.under_way, self.failures, self.pending.is_empty()) {
            (Some(_), ..) => "delivering",
            (None, 1.., _) => "waiting",
            (None, 0, false) => "pending",
            (None, 0, true) => "idle",
        };
        let last = self.last.as_ref().map(|(at, outcome)| {
            serde_json::json!({
                "at_ms": at.unix_ms(),
                "outcome": if outcome.is_ok() { "delivered" } else { "failed" },
                "error": outcome.as_ref().err(),
            })
        });
        serde_json::json!({
            "url": self.url,
            "pool_id": self.pool,
            "configured": self.is_configured,
            "state": state,
            "pending": self.pending.len(),
            "failures": self.failures,
            "delivered": self.delivered,
            "last": last,
            "next_attempt_at_ms": self.next_at.filter(|_| !self.pending.is_empty()).map(|at| at.wall.unix_ms()),
        })
    }
}

/// Half of the pause is fixed, half is drawn, so that agents that failed together do not come back
/// together.
fn pause_ms(failures: u32, random: &mut dyn FnMut(u64) -> u64) -> u64 {
    let doubled = RETRY_MS_MIN.saturating_mul(1 << failures.saturating_sub(1).min(16));
    let pause = doubled.min(RETRY_MS_MAX);
    pause / 2 + random(pause / 2 + 1)
}

fn pool_text(pool: Option<&PoolId>) -> String {
    pool.map_or_else(|| "every pool".into(), |pool| format!("pool {pool}"))
}

fn happening(url: &BaseUrl, state: &'static str, text: String, is_warning: bool) -> Happening {
    Happening { kind: "callback", subject: url.to_string(), state, text, is_warning }
}

impl fmt::Display for NotRegistered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NotRegistered::Disabled => f.write_str(
                "callbacks are switched off: POOL_MANAGERD_CALLBACK_ENABLED=true switches them on",
            ),
            NotRegistered::Url(why) => write!(f, "`callback_url`: {why}"),
            NotRegistered::TooMany => {
                write!(f, "there are {CALLBACKS_MAX} callbacks already: remove some of them")
            }
        }
    }
}

#[cfg(test)]
mod tests;
