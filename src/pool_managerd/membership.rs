//! How a node stays a member of one control plane: register, heartbeat, deregister.
//!
//! ```text
//!                  ok              404: it forgot us, 409: did it?
//!   Unregistered ------> Registered ---------------------------> Unregistered
//!        |   ^               |  heartbeats, whatever fails
//!    409 v   | later         | shutdown
//!     SteppedBack         Leaving -----> Left
//! ```
//!
//! A node has one [`Plane`] per control plane, and none knows of the others. A plane decides *when*
//! which call is made; the daemon builds the body, sends it and hands the answer back. One call is under way at a time, so heartbeats never overtake each other. What changed is
//! told at once; what changes during a call goes into the next one. Failures only ever lengthen the
//! pauses: a node whose control plane is away goes on serving and goes on asking.
//!
//! A 409 to a registration means that another node owns the name. To a heartbeat it may only mean that
//! a copy of it, repeated by something on the way, was faster: the node registers again and goes by
//! that answer, for a pause as after a real conflict would cost it the lease.

use std::fmt;

use crate::time::{Mono, Now, Wall};
use crate::wire::url::BaseUrl;

#[cfg(test)]
mod tests;

/// Shortest interval of heartbeats that a control plane may ask for, in milliseconds.
pub const INTERVAL_MS_MIN: u64 = 1_000;
/// Longest interval of heartbeats that a control plane may ask for, in milliseconds: beyond it a dead
/// node would be noticed too late by anyone.
pub const INTERVAL_MS_MAX: u64 = 60_000;
/// Jitter of the interval in percent, either way: nodes that started together drift apart.
pub const JITTER_PERCENT: u64 = 20;
/// First pause after a failure, in milliseconds.
pub const BACKOFF_MS_MIN: u64 = 500;
/// Longest pause after failures, in milliseconds.
pub const BACKOFF_MS_MAX: u64 = 30_000;
/// Spread of the registrations after a control plane forgot its nodes, in milliseconds.
pub const REREGISTER_SPREAD_MS: u64 = 250;
/// First pause after another node was found to own our name, in milliseconds: about the time after
/// which its registration would lapse if it were dead.
pub const CONFLICT_PAUSE_MS_MIN: u64 = 30_000;
/// Longest pause after repeated conflicts, in milliseconds.
pub const CONFLICT_PAUSE_MS_MAX: u64 = 300_000;
/// Shortest pause between two heartbeats, in milliseconds: a burst of changes becomes one.
pub const CHANGE_GAP_MS: u64 = 1;
/// So many replicas make that pause a millisecond longer: each costs some microseconds on either side of
/// every heartbeat.
pub const REPLICAS_PER_GAP_MS: u64 = 32;
/// How long the deregistration may take, in milliseconds: nobody waits for it longer at shutdown.
pub const DEREGISTER_TIMEOUT_MS: u64 = 2_000;
/// Heartbeats that fail in a row before that is worth a sentence in the log.
pub const FAILURES_NOTED: u32 = 3;

/// A call to the control plane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// `POST /v2/nodes/register`
    Register,
    /// `POST /v2/nodes/{id}/heartbeat`
    Heartbeat {
        /// Grows by one with every heartbeat to this control plane.
        seq: u64,
    },
    /// `DELETE /v2/nodes/{id}`
    Deregister,
}

/// A call to make now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Order {
    /// Which call.
    pub call: Call,
    /// How long it may take in all, in milliseconds.
    pub timeout_ms: u64,
}

/// How a call ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Any 2xx.
    Ok {
        /// When the control plane wants the next heartbeat at the latest.
        next_heartbeat_ms: Option<u64>,
        /// How long the registration lasts without one.
        ttl_ms: Option<u64>,
        /// Which start of the control plane answered.
        registry_epoch: Option<u64>,
    },
    /// 404: it does not know this node.
    UnknownNode,
    /// 409, and what it said.
    Conflict(String),
    /// 503 because it runs without node agents.
    CloudDisabled,
    /// 401 or 403.
    Unauthorized,
    /// 421: it does not go by the name under which it was asked.
    ForeignName,
    /// No answer, or any other.
    Failed(String),
}

/// Where a node stands with a control plane.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PlaneState {
    /// Not registered, and trying.
    Unregistered,
    /// The registration is under way.
    Registering,
    /// A member.
    Registered {
        /// When the control plane last confirmed it.
        confirmed: Wall,
        /// Heartbeats that failed since.
        failures: u32,
        /// Interval of heartbeats in use, in milliseconds.
        interval_ms: u64,
        /// Which start of the control plane registered the node, where it says so.
        registry_epoch: Option<u64>,
    },
    /// Another node owns the name: waiting before asking again.
    SteppedBack,
    /// Saying goodbye.
    Leaving,
    /// Done.
    Left,
}

impl PlaneState {
    /// The state as the API spells it.
    #[must_use]
    pub fn as_str(&self) -> &'static str {
        match self {
            PlaneState::Unregistered => "unregistered",
            PlaneState::Registering => "registering",
            PlaneState::Registered { .. } => "registered",
            PlaneState::SteppedBack => "stepped-back",
            PlaneState::Leaving => "leaving",
            PlaneState::Left => "left",
        }
    }
}

/// A sentence for the log; each is returned once a transition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Note {
    /// Whether an operator should look at it.
    pub is_warning: bool,
    /// The sentence.
    pub text: String,
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// Membership of one control plane. See the file's text.
#[derive(Debug)]
pub struct Plane {
    url: BaseUrl,
    state: PlaneState,
    reason: String,
    since: Wall,
    own_interval_ms: u64,
    ttl_ms: Option<u64>,
    interval_ms: u64,
    under_way: Option<UnderWay>,
    /// When the next call is due, unless one is under way.
    due_at: Mono,
    /// When leaving is over, whatever is under way.
    left_by: Option<Mono>,
    /// The newest revision of what heartbeats tell, and the last one that was confirmed.
    revision: u64,
    told: Option<u64>,
    seq: u64,
    /// When the last heartbeat left, and how soon after it the next may.
    beat_sent_at: Option<Mono>,
    gap_ms: u64,
    /// Failed calls in a row; a registration that no heartbeat confirmed does not end the row.
    failures: u32,
    conflicts: u32,
    ever_registered: bool,
    beaten_since_registered: bool,
    /// What a registration tells has changed since the last one that was taken; a member registers
    /// again without ceasing to be one.
    introduction: Introduction,
    /// The trouble that the log knows of.
    noted: Option<Trouble>,
}

#[derive(Clone, Copy, Debug)]
struct UnderWay {
    call: Call,
    sent_at: Mono,
    revision: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Introduction {
    Told,
    Sent,
    Outdated,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trouble {
    Failing,
    Unauthorized,
    ForeignName,
    CloudDisabled,
    Unknown,
    Conflict,
}

impl Plane {
    /// A control plane that is to be joined at once. `interval_ms`: between heartbeats, where the
    /// control plane does not say.
    #[must_use]
    pub fn new(url: BaseUrl, interval_ms: u64, now: Now) -> Plane {
        let interval_ms = interval_ms.clamp(INTERVAL_MS_MIN, INTERVAL_MS_MAX);
        Plane {
            url,
            state: PlaneState::Unregistered,
            reason: "not asked yet".into(),
            since: now.wall,
            own_interval_ms: interval_ms,
            ttl_ms: None,
            interval_ms,
            under_way: None,
            due_at: now.mono,
            left_by: None,
            revision: 0,
            told: None,
            seq: 0,
            beat_sent_at: None,
            gap_ms: CHANGE_GAP_MS,
            failures: 0,
            conflicts: 0,
            ever_registered: false,
            beaten_since_registered: false,
            introduction: Introduction::Outdated,
            noted: None,
        }
    }

    /// The control plane.
    #[must_use]
    pub fn url(&self) -> &BaseUrl {
        &self.url
    }

    /// Where the node stands with it.
    #[must_use]
    pub fn state(&self) -> &PlaneState {
        &self.state
    }

    /// Why, for people.
    #[must_use]
    pub fn reason(&self) -> &str {
        &self.reason
    }

    /// Since when.
    #[must_use]
    pub fn since(&self) -> Wall {
        self.since
    }

    /// The newest revision that the control plane has confirmed.
    #[must_use]
    pub fn told(&self) -> Option<u64> {
        self.told
    }

    /// What heartbeats tell is now at `revision`, about so many replicas: told at once if that is news.
    pub fn on_change(&mut self, revision: u64, replicas: usize, now: Now) {
        if revision == self.revision {
            return;
        }
        self.revision = revision;
        self.gap_ms = CHANGE_GAP_MS + replicas as u64 / REPLICAS_PER_GAP_MS;
        if self.under_way.is_none() {
            self.hurry(self.beat_sent_at.map_or(now.mono, |at| at.plus_ms(self.gap_ms)), now.mono);
        }
    }

    /// What a registration tells (the machine's GPUs) has changed: told at once.
    pub fn introduce_again(&mut self, now: Now) {
        self.introduction = Introduction::Outdated;
        if self.under_way.is_none() && matches!(self.state, PlaneState::Registered { .. }) {
            self.hurry(now.mono, now.mono);
        }
    }

    /// The call that is due, if one is. Its answer must be handed to [`Plane::answered`].
    pub fn poll(&mut self, now: Now) -> Option<Order> {
        if self.left_by.is_some_and(|at| at <= now.mono) {
            self.leave(now, "gave up waiting for an answer");
            return None;
        }
        if self.under_way.is_some() || self.due_at > now.mono {
            return None;
        }
        let mut timeout_ms = self.interval_ms / 2;
        let call = match self.state {
            PlaneState::Unregistered | PlaneState::SteppedBack => {
                self.enter(PlaneState::Registering, now);
                Call::Register
            }
            PlaneState::Registered { .. } if self.introduction == Introduction::Outdated => Call::Register,
            PlaneState::Registered { .. } => {
                self.seq += 1;
                self.beat_sent_at = Some(now.mono);
                Call::Heartbeat { seq: self.seq }
            }
            PlaneState::Leaving => {
                timeout_ms = DEREGISTER_TIMEOUT_MS;
                Call::Deregister
            }
            PlaneState::Registering | PlaneState::Left => return None,
        };
        if call == Call::Register {
            self.introduction = Introduction::Sent;
        }
        self.under_way = Some(UnderWay { call, sent_at: now.mono, revision: self.revision });
        Some(Order { call, timeout_ms })
    }

    /// Takes the answer to the call under way; any other is ignored. `jitter(n)` returns a random
    /// number below `n`, which is at least 1.
    pub fn answered(
        &mut self,
        call: Call,
        answer: Answer,
        now: Now,
        jitter: &mut impl FnMut(u64) -> u64,
        notes: &mut Vec<Note>,
    ) {
        let Some(sent) = self.under_way.take_if(|sent| sent.call == call) else { return };
        match call {
            Call::Register => self.registered(answer, now, jitter, notes),
            Call::Heartbeat { .. } => self.beaten(sent, answer, now, jitter, notes),
            Call::Deregister => {
                let reason = match answer {
                    Answer::Ok { .. } | Answer::UnknownNode => "deregistered".to_string(),
                    other => format!("the deregistration failed: {}", explain(&other, &self.url)),
                };
                self.leave(now, &reason);
            }
        }
    }

    /// When [`Plane::poll`] has something to do.
    #[must_use]
    pub fn deadline(&self) -> Option<Mono> {
        match self.state {
            PlaneState::Left => None,
            _ if self.under_way.is_some() => self.left_by,
            _ => Some(self.left_by.map_or(self.due_at, |at| at.min(self.due_at))),
        }
    }

    /// Begins to leave: one deregistration, if a registration ever succeeded. Ends in
    /// [`PlaneState::Left`] within twice [`DEREGISTER_TIMEOUT_MS`].
    pub fn shutdown(&mut self, now: Now) {
        if matches!(self.state, PlaneState::Leaving | PlaneState::Left) {
            return;
        }
        // A registration under way may succeed yet: its answer decides. One that stepped back has
        // nothing to withdraw: the name belongs to another node.
        let may_be_known = self.ever_registered && self.state != PlaneState::SteppedBack;
        if !may_be_known && self.under_way.is_none() {
            self.leave(now, "was not registered");
            return;
        }
        self.reason = "shutting down".into();
        self.enter(PlaneState::Leaving, now);
        self.due_at = now.mono;
        self.left_by = Some(now.mono.plus_ms(2 * DEREGISTER_TIMEOUT_MS));
    }

    fn registered(
        &mut self,
        answer: Answer,
        now: Now,
        jitter: &mut impl FnMut(u64) -> u64,
        notes: &mut Vec<Note>,
    ) {
        if self.state == PlaneState::Leaving {
            if matches!(answer, Answer::Ok { .. }) || self.ever_registered {
                self.due_at = now.mono;
            } else {
                self.leave(now, "was not registered");
            }
            return;
        }
        let Answer::Ok { next_heartbeat_ms, ttl_ms, registry_epoch } = answer else {
            return self.failed(answer, now, jitter, notes);
        };
        let url = &self.url;
        let again = match self.state {
            PlaneState::Registered { .. } => " again, with what this machine has now",
            _ => "",
        };
        notes.push(Note { is_warning: false, text: format!("{url}: registered{again}") });
        if self.introduction == Introduction::Sent {
            self.introduction = Introduction::Told;
        }
        self.ever_registered = true;
        self.beaten_since_registered = false;
        self.ttl_ms = ttl_ms;
        self.set_interval(next_heartbeat_ms);
        self.reason = "registered".into();
        let interval_ms = self.interval_ms;
        let state = PlaneState::Registered { confirmed: now.wall, failures: 0, interval_ms, registry_epoch };
        self.enter(state, now);
        self.due_at = now.mono;
    }

    fn beaten(
        &mut self,
        sent: UnderWay,
        answer: Answer,
        now: Now,
        jitter: &mut impl FnMut(u64) -> u64,
        notes: &mut Vec<Note>,
    ) {
        if self.state == PlaneState::Leaving {
            self.due_at = now.mono;
            return;
        }
        let Answer::Ok { next_heartbeat_ms, .. } = answer else {
            return self.failed(answer, now, jitter, notes);
        };
        if self.noted.take().is_some() {
            let text = format!("{}: takes heartbeats again", self.url);
            notes.push(Note { is_warning: false, text });
        }
        self.failures = 0;
        self.conflicts = 0;
        self.beaten_since_registered = true;
        self.told = Some(sent.revision);
        self.set_interval(next_heartbeat_ms);
        self.reason = "registered".into();
        let own_interval_ms = self.interval_ms;
        if let PlaneState::Registered { confirmed, failures, interval_ms, .. } = &mut self.state {
            *confirmed = now.wall;
            *failures = 0;
            *interval_ms = own_interval_ms;
        }
        let spread_ms = self.interval_ms * JITTER_PERCENT / 100;
        let pause_ms = self.interval_ms - spread_ms + jitter(2 * spread_ms + 1);
        self.due_at = sent.sent_at.plus_ms(pause_ms).max(now.mono);
        self.hurry(sent.sent_at.plus_ms(self.gap_ms), now.mono);
        if self.introduction == Introduction::Sent {
            // The control plane refused it and takes heartbeats: those come first, it comes next.
            self.introduction = Introduction::Outdated;
        }
    }

    /// What every answer but `Ok` means for the next call; the only place that lengthens pauses.
    fn failed(
        &mut self,
        answer: Answer,
        now: Now,
        jitter: &mut impl FnMut(u64) -> u64,
        notes: &mut Vec<Note>,
    ) {
        let was_registered = matches!(self.state, PlaneState::Registered { .. });
        let trouble = match &answer {
            Answer::UnknownNode => Trouble::Unknown,
            Answer::Conflict(_) => Trouble::Conflict,
            Answer::CloudDisabled => Trouble::CloudDisabled,
            Answer::Unauthorized => Trouble::Unauthorized,
            Answer::ForeignName => Trouble::ForeignName,
            Answer::Ok { .. } | Answer::Failed(_) => Trouble::Failing,
        };
        self.reason = explain(&answer, &self.url);
        // Whether the node is still a member, a registration settles.
        let is_doubtful = was_registered && self.beaten_since_registered;
        if trouble == Trouble::Conflict && !is_doubtful {
            let pause_ms = doubled(CONFLICT_PAUSE_MS_MIN, self.conflicts, CONFLICT_PAUSE_MS_MAX);
            self.conflicts = self.conflicts.saturating_add(1);
            self.note(trouble, "the node steps back and asks again later", notes);
            self.enter(PlaneState::SteppedBack, now);
            self.due_at = now.mono.plus_ms(pause_ms + jitter(pause_ms / 5 + 1));
            return;
        }
        if matches!(trouble, Trouble::Unknown | Trouble::Conflict) && is_doubtful {
            if trouble == Trouble::Unknown {
                self.note(trouble, "the node registers again", notes);
            }
            self.enter(PlaneState::Unregistered, now);
            self.due_at = now.mono.plus_ms(jitter(REREGISTER_SPREAD_MS + 1));
            return;
        }
        let mut pause_ms = doubled(BACKOFF_MS_MIN, self.failures, BACKOFF_MS_MAX);
        self.failures = self.failures.saturating_add(1);
        if let (PlaneState::Registered { failures, .. }, true) =
            (&mut self.state, trouble != Trouble::Unknown)
        {
            *failures = self.failures;
            // The registration may still stand: renew it no later than a heartbeat would.
            pause_ms = pause_ms.min(self.interval_ms);
            if trouble != Trouble::Failing || self.failures >= FAILURES_NOTED {
                self.note(trouble, "heartbeats go on, and engines keep serving", notes);
            }
        } else {
            self.note(trouble, "the node tries again with growing pauses", notes);
            self.enter(PlaneState::Unregistered, now);
        }
        // Half of the pause is certain, half is chance: nodes that failed together return apart.
        self.due_at = now.mono.plus_ms(pause_ms / 2 + jitter(pause_ms / 2 + 1));
    }

    /// Brings the next heartbeat forward to `at` (not before `now`) if there is news. During a row of
    /// failures the pauses stand.
    fn hurry(&mut self, at: Mono, now: Mono) {
        let is_news = self.told != Some(self.revision) || self.introduction == Introduction::Outdated;
        if is_news && self.failures == 0 && matches!(self.state, PlaneState::Registered { .. }) {
            self.due_at = self.due_at.min(at.max(now));
        }
    }

    fn set_interval(&mut self, wanted_ms: Option<u64>) {
        // Where only the lease is known, two lost heartbeats must not cost the registration.
        let own_ms = self.ttl_ms.map_or(self.own_interval_ms, |ttl_ms| self.own_interval_ms.min(ttl_ms / 3));
        self.interval_ms = wanted_ms.unwrap_or(own_ms).clamp(INTERVAL_MS_MIN, INTERVAL_MS_MAX);
    }

    fn note(&mut self, trouble: Trouble, then: &str, notes: &mut Vec<Note>) {
        if self.noted != Some(trouble) {
            self.noted = Some(trouble);
            let text = format!("{}: {}; {then}", self.url, self.reason);
            notes.push(Note { is_warning: true, text });
        }
    }

    fn leave(&mut self, now: Now, reason: &str) {
        self.reason = reason.to_string();
        self.left_by = None;
        self.under_way = None;
        self.enter(PlaneState::Left, now);
    }

    fn enter(&mut self, state: PlaneState, now: Now) {
        if std::mem::discriminant(&self.state) != std::mem::discriminant(&state) {
            self.since = now.wall;
        }
        self.state = state;
    }
}

/// What an answer means, for people.
pub(crate) fn explain(answer: &Answer, url: &BaseUrl) -> String {
    match answer {
        Answer::Ok { .. } => "it agreed".into(),
        Answer::UnknownNode => "it does not know this node".into(),
        Answer::Conflict(why) => format!("another node owns this name: {why}"),
        Answer::CloudDisabled => {
            "it runs without node agents (ORCHESTRATORD_CLOUD_PROFILE=false there)".into()
        }
        Answer::Unauthorized => "it refuses this node's token".into(),
        Answer::ForeignName => {
            let host = url.host();
            format!(
                "it does not go by the name {host} (421): set ORCHESTRATORD_ALLOW_HOSTS={host} there, or name it here by its IP address"
            )
        }
        Answer::Failed(why) => why.clone(),
    }
}

/// `min` doubled `times` times, at most `max`.
fn doubled(min: u64, times: u32, max: u64) -> u64 {
    min.saturating_mul(1u64.checked_shl(times.min(32)).unwrap_or(u64::MAX)).min(max)
}
