//! Callbacks as exchanges: how a notice becomes a request, and an ending an outcome. They leave from the
//! loop itself: a receiver that hangs keeps its own exchange waiting and nothing else.

use std::sync::Arc;

use crate::http::fields::FieldLines;
use crate::net::{self, DialRule, Outbound, Patience, Sink};

use super::callbacks::{Delivery, Policy};

/// What looking a name up and connecting may take, in milliseconds: receivers are in the same networks.
const CONNECT_MS: u64 = 2_000;
/// What the whole answer may take, in milliseconds: a receiver only has to note what it is told.
const ANSWER_MS: u64 = 5_000;
/// Largest answer that is read, in bytes. Nothing of it matters but its status.
const ANSWER_BYTES_MAX: usize = 16 * 1024;

/// Lets only those addresses pass that the policy allows: what is dialled is what was judged.
pub(super) fn dial_rule(policy: Policy) -> DialRule {
    DialRule::new(move |url, ip| policy.check_address(url, ip))
}

/// The request that delivers a notice. `bearer` is shown to trusted receivers only.
pub(super) fn outbound(delivery: &Delivery, bearer: Option<String>) -> Outbound<'static> {
    let mut fields = FieldLines::new()
        .with("User-Agent", concat!("pool-managerd/", env!("CARGO_PKG_VERSION")))
        .with("Content-Type", "application/json")
        .with("Idempotency-Key", &delivery.event_id);
    if let Some(bearer) = bearer.filter(|_| delivery.is_trusted) {
        fields.push("Authorization", bearer);
    }
    let target = if delivery.url.path().is_empty() { "/" } else { "" };
    Outbound {
        to: delivery.url.clone(),
        method: "POST".into(),
        target: target.into(),
        fields,
        body: Arc::new(delivery.body.clone().into_bytes()),
        sink: Sink::Collect { bytes_max: ANSWER_BYTES_MAX },
        patience: Patience { connect_ms: CONNECT_MS, first_byte_ms: ANSWER_MS, idle_ms: ANSWER_MS },
        keep_ms: None,
    }
}

/// What an exchange's ending says. A redirection is a failure: it may lead anywhere.
pub(super) fn outcome(ended: net::Outcome) -> Result<(), String> {
    match ended {
        net::Outcome::Complete { status: 200..=299, .. } => Ok(()),
        net::Outcome::Complete { status, .. } => Err(format!("status {status}")),
        net::Outcome::Failed(fault) => Err(fault.reason),
        net::Outcome::ClientGone | net::Outcome::Cancelled => Err("given up".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::replicas::{AllowList, EnginePolicy};
    use crate::wire::url::BaseUrl;

    fn delivery(url: &str, is_trusted: bool) -> Delivery {
        Delivery {
            callback: 1,
            event: 1,
            url: BaseUrl::new(url).expect("a URL"),
            event_id: "n-1-1".into(),
            is_trusted,
            body: "{}".into(),
        }
    }

    #[test]
    fn only_trusted_receivers_see_the_token_and_every_notice_has_its_number() {
        for (url, is_trusted, path) in [("http://h:1/x", true, "/x"), ("http://h:1", false, "/")] {
            let outbound = outbound(&delivery(url, is_trusted), Some("Bearer secret".into()));
            let field = |name: &str| outbound.fields.get(name);
            assert_eq!(format!("{}{}", outbound.to.path(), outbound.target), path);
            assert_eq!(field("Authorization"), is_trusted.then_some(&b"Bearer secret"[..]));
            assert_eq!(field("Idempotency-Key"), Some(&b"n-1-1"[..]));
        }
    }

    #[test]
    fn a_redirection_is_not_followed_but_a_failure() {
        let ended = |status| net::Outcome::Complete { status, body: Vec::new() };
        assert_eq!(outcome(ended(204)), Ok(()));
        assert_eq!(outcome(ended(307)), Err("status 307".into()));
    }

    #[test]
    fn the_policy_judges_what_a_name_leads_to() {
        let rules = EnginePolicy::new(Vec::new(), None, AllowList::default(), "");
        let policy = Policy::new(rules, Vec::new());
        let url = BaseUrl::new("http://receiver:1").expect("a URL");
        for (ip, allowed) in
            [("127.0.0.1", true), ("10.0.0.1", true), ("8.8.8.8", false), ("169.254.1.1", false)]
        {
            assert_eq!(policy.check_address(&url, ip.parse().expect("an address")).is_ok(), allowed, "{ip}");
        }
    }
}
