//! Who is told of handoffs beside the directory. PURE.
//!
//! The file is the truth, and a notice only its copy for those who cannot see it. So each place is told the
//! *latest* state of a replica, ready or withdrawn, until it takes it: what is outdated before it could be
//! delivered is never sent. A place is a pool-managerd (a URL without a path), which takes a handoff as
//! `POST /v2/pools/{pool}/ready` and its end as a `DELETE`, or any URL with a path, which is posted every
//! handoff, with `"ready": false` at its end.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::json;

use super::supervision::restarts::{BACKOFF_MS_MAX, BACKOFF_MS_MIN};
use crate::http::fields::FieldLines;
use crate::net::{Outbound, Patience, Sink};
use crate::time::Mono;
use crate::wire::handoff::Handoff;
use crate::wire::id::ReplicaKey;
use crate::wire::url::BaseUrl;

/// How long one notice may take, in milliseconds.
const NOTICE_MS: u64 = 5_000;
/// Longest answer that is read, in bytes: a sentence about a refusal.
const ANSWER_BYTES_MAX: usize = 64 * 1024;
/// Times that a withdrawal is offered while this program ends; nobody waits longer for a place that is away.
const LAST_ATTEMPTS: u32 = 2;

/// Names a notice that is under way: the place, and the replica.
pub type NoticeId = (usize, ReplicaKey);

/// What is still to be told.
#[derive(Debug)]
pub struct Notices {
    places: Vec<BaseUrl>,
    pending: BTreeMap<NoticeId, Pending>,
}

#[derive(Debug)]
struct Pending {
    handoff: Handoff,
    is_ready: bool,
    due: Mono,
    attempts: u32,
    under_way: bool,
    /// It changed while it was under way.
    changed: bool,
}

impl Notices {
    /// For these places.
    #[must_use]
    pub fn new(places: Vec<BaseUrl>) -> Notices {
        Notices { places, pending: BTreeMap::new() }
    }

    /// A handoff was written, or withdrawn.
    pub fn changed(&mut self, handoff: &Handoff, is_ready: bool, now: Mono) {
        for place in 0..self.places.len() {
            let pending = self.pending.entry((place, handoff.key())).or_insert_with(|| Pending {
                handoff: handoff.clone(),
                is_ready,
                due: now,
                attempts: 0,
                under_way: false,
                changed: false,
            });
            pending.changed = pending.under_way;
            (pending.handoff, pending.is_ready) = (handoff.clone(), is_ready);
            (pending.due, pending.attempts) = (now, 0);
        }
    }

    /// The notices to be sent now.
    pub fn due(&mut self, token: Option<&str>, now: Mono) -> Vec<(NoticeId, Outbound<'static>)> {
        let mut out = Vec::new();
        for (id, pending) in self.pending.iter_mut().filter(|(_, p)| !p.under_way && p.due <= now) {
            pending.under_way = true;
            pending.attempts += 1;
            out.push((id.clone(), request(&self.places[id.0], pending, token)));
        }
        out
    }

    /// When [`Notices::due`] has something again.
    #[must_use]
    pub fn deadline(&self) -> Option<Mono> {
        self.pending.values().filter(|pending| !pending.under_way).map(|pending| pending.due).min()
    }

    /// One is over, with the answer's status and body, or why there was none. What is worth a line of the log
    /// is returned.
    pub fn ended(
        &mut self,
        id: &NoticeId,
        answer: Result<(u16, &[u8]), String>,
        now: Mono,
    ) -> Option<String> {
        let pending = self.pending.get_mut(id)?;
        pending.under_way = false;
        if std::mem::take(&mut pending.changed) {
            return None;
        }
        let place = &self.places[id.0];
        let result = match answer {
            Ok((status, body)) => verdict(status, body, pending.is_ready),
            Err(why) => Err((why, true)),
        };
        match result {
            Ok(()) => {
                self.pending.remove(id);
                None
            }
            Err((why, false)) => {
                self.pending.remove(id);
                Some(format!("{place} refuses the notice of {}: {why}", id.1))
            }
            Err((why, true)) => {
                let first = pending.attempts == 1;
                let pause = BACKOFF_MS_MIN.saturating_mul(1 << (pending.attempts - 1).min(16));
                pending.due = now.plus_ms(pause.min(BACKOFF_MS_MAX));
                first.then(|| format!("{place} cannot take the notice of {} ({why}): trying again", id.1))
            }
        }
    }

    /// Whether nothing is left that is worth waiting for at the end.
    #[must_use]
    pub fn may_end(&self) -> bool {
        self.pending.values().all(|pending| pending.is_ready || pending.attempts >= LAST_ATTEMPTS)
    }
}

fn request(place: &BaseUrl, pending: &Pending, token: Option<&str>) -> Outbound<'static> {
    let key = pending.handoff.key();
    let body = || {
        let mut body = pending.handoff.to_value();
        body["ready"] = json!(pending.is_ready);
        body.to_string().into_bytes()
    };
    let (method, target, body) = match (place.path(), pending.is_ready) {
        ("" | "/", true) => ("POST", format!("/v2/pools/{}/ready", key.pool), body()),
        ("" | "/", false) => ("DELETE", format!("/v2/pools/{}/replicas/{}", key.pool, key.replica), vec![]),
        _ => ("POST", String::new(), body()),
    };
    let mut fields = FieldLines::new().with("Connection", "close");
    if !body.is_empty() {
        fields.push("Content-Type", "application/json");
    }
    if let Some(token) = token {
        fields.push("Authorization", format!("Bearer {token}"));
    }
    Outbound {
        to: place.clone(),
        method: method.into(),
        target: target.into(),
        fields,
        body: Arc::new(body),
        sink: Sink::Collect { bytes_max: ANSWER_BYTES_MAX },
        patience: Patience { connect_ms: NOTICE_MS, first_byte_ms: NOTICE_MS, idle_ms: NOTICE_MS },
        keep_ms: None,
    }
}

/// What an answer's status says: taken, or not, and whether it may be later. Who does not know a withdrawn
/// replica has nothing to forget.
fn verdict(status: u16, body: &[u8], is_ready: bool) -> Result<(), (String, bool)> {
    match status {
        200..=299 => Ok(()),
        404 | 409 if !is_ready => Ok(()),
        _ => {
            let text: String = String::from_utf8_lossy(body).chars().filter(|c| !c.is_control()).collect();
            let short: String = text.chars().take(200).collect();
            Err((
                format!("HTTP {status} {short}").trim_end().to_string(),
                matches!(status, 401 | 429 | 500..),
            ))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::handoff::{HandoffFile, parse};

    fn handoff() -> Handoff {
        match parse(br#"{"url":"http://127.0.0.1:1","pool_id":"p","generation":7}"#) {
            Ok(HandoffFile::Engine(handoff)) => *handoff,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_place_is_told_the_latest_until_it_takes_it() {
        let url = |text| BaseUrl::new(text).expect("a URL");
        let mut notices = Notices::new(vec![url("http://a:9200"), url("http://b/hook")]);
        let mut now = Mono(0);
        notices.changed(&handoff(), true, now);
        let sent = notices.due(Some("secret"), now);
        assert_eq!(sent[0].1.target, "/v2/pools/p/ready");
        assert_eq!((&*sent[1].1.method, &*sent[1].1.target), ("POST", ""));
        assert!(sent.iter().all(|(_, out)| out.fields.holds(b"Authorization")));
        assert!(notices.due(None, now).is_empty(), "one at a time");
        // One takes it; the other is away, and by the time it is back the replica is gone.
        assert_eq!(notices.ended(&sent[1].0, Ok((200, b"")), now), None);
        assert!(notices.ended(&sent[0].0, Err("refused".into()), now).is_some());
        assert_eq!(notices.deadline(), Some(now.plus_ms(1_000)));
        now = now.plus_ms(10);
        notices.changed(&handoff(), false, now);
        let sent = notices.due(None, now);
        assert_eq!(sent[0].1.method, "DELETE");
        assert!(!notices.may_end());
        for (id, _) in sent {
            notices.ended(&id, Ok((404, b"")), now);
        }
        assert!(notices.may_end() && notices.deadline().is_none());
    }

    #[test]
    fn what_changes_under_way_is_told_again() {
        let mut notices = Notices::new(vec![BaseUrl::new("http://a").expect("a URL")]);
        notices.changed(&handoff(), true, Mono(0));
        let sent = notices.due(None, Mono(0));
        notices.changed(&handoff(), false, Mono(1));
        assert_eq!(notices.ended(&sent[0].0, Ok((200, b"")), Mono(2)), None);
        assert_eq!(notices.due(None, Mono(2))[0].1.method, "DELETE");
        assert!(verdict(400, b"no", true).is_err_and(|(why, again)| why == "HTTP 400 no" && !again));
        assert!(verdict(503, b"", true).is_err_and(|(_, again)| again));
    }
}
