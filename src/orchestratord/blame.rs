//! What a failed exchange says about the engine. Pure.
//!
//! | what happened | the request | the engine's circuit |
//! |---|---|---|
//! | no connection, in time or at all | goes elsewhere | opens |
//! | reset, cut off before any byte of an answer | goes elsewhere | opens |
//! | the same behind a byte of an answer, no HTTP | ends with 502, or an error event | opens |
//! | 502, 503, 504 | goes elsewhere | opens |
//! | 503 with `Retry-After` | goes elsewhere | pauses for that long, no failure |
//! | 409 of a node's agent: another engine has the name, or none | goes elsewhere | pauses until the node has told |
//! | no first byte, or no next byte, in time | ends with 504, or an error event | stays |
//! | any other status | the client gets it as it came | closes |
//! | nothing tried: this process is at a limit | ends with 503 | stays |

use crate::net::{Fault, FaultKind};

use super::core::Ending;

/// How long a replica is left alone whose node says that another engine has its name, or none: its next heartbeat,
/// which comes at once on such a change, tells of that.
pub const RENAMED_PAUSE_MS: u64 = 1_000;

/// How an exchange ended that failed with `fault`.
#[must_use]
pub fn ending(fault: Fault) -> Ending {
    let (answered, reason) = (fault.answered, fault.reason);
    let failed = |connect, timeout| Ending::Failed { reason: reason.clone(), connect, timeout, answered };
    match (fault.kind, fault.retry_after_s) {
        (FaultKind::Local, _) => Ending::NotTried(reason),
        (FaultKind::Aborted, _) => Ending::Aborted { answered },
        (FaultKind::Connect | FaultKind::Unreached, _) => failed(true, false),
        (FaultKind::Timeout, _) if !fault.sent => failed(true, false),
        (FaultKind::Timeout, _) => failed(false, true),
        (FaultKind::Status(409), _) => Ending::NotReady { reason, pause_ms: RENAMED_PAUSE_MS },
        (FaultKind::Status(503), Some(after_s)) => {
            Ending::NotReady { reason, pause_ms: after_s.saturating_mul(1_000) }
        }
        (FaultKind::Reset | FaultKind::Protocol | FaultKind::Status(_), _) if fault.begun && !answered => {
            Ending::BrokenOff(reason)
        }
        (FaultKind::Reset | FaultKind::Protocol | FaultKind::Status(_), _) => failed(false, false),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_fault_is_blamed_on_whom_it_concerns() {
        let of = |kind, sent, retry_after_s| {
            ending(Fault { kind, reason: "r".into(), answered: false, sent, begun: false, retry_after_s })
        };
        let failed =
            |connect, timeout| Ending::Failed { reason: "r".into(), connect, timeout, answered: false };
        let not_ready = |pause_ms| Ending::NotReady { reason: "r".into(), pause_ms };
        for (kind, sent, after, expected) in [
            (FaultKind::Local, false, None, Ending::NotTried("r".into())),
            (FaultKind::Connect, false, None, failed(true, false)),
            (FaultKind::Unreached, false, None, failed(true, false)),
            (FaultKind::Timeout, false, None, failed(true, false)),
            (FaultKind::Timeout, true, None, failed(false, true)),
            (FaultKind::Reset, true, None, failed(false, false)),
            (FaultKind::Protocol, true, None, failed(false, false)),
            (FaultKind::Status(502), true, None, failed(false, false)),
            (FaultKind::Status(503), true, None, failed(false, false)),
            (FaultKind::Status(503), true, Some(7), not_ready(7_000)),
            (FaultKind::Status(503), true, Some(u64::MAX), not_ready(u64::MAX)),
            (FaultKind::Status(504), true, Some(7), failed(false, false)),
            (FaultKind::Status(409), true, None, not_ready(RENAMED_PAUSE_MS)),
            (FaultKind::Aborted, true, None, Ending::Aborted { answered: false }),
        ] {
            assert_eq!(of(kind, sent, after), expected, "{kind:?} {sent} {after:?}");
        }
        for kind in [FaultKind::Reset, FaultKind::Protocol, FaultKind::Status(502)] {
            let fault = |answered| {
                ending(Fault {
                    kind,
                    reason: "r".into(),
                    answered,
                    sent: true,
                    begun: true,
                    retry_after_s: None,
                })
            };
            assert_eq!(fault(false), Ending::BrokenOff("r".into()), "{kind:?}");
            assert!(matches!(fault(true), Ending::Failed { answered: true, .. }), "{kind:?}");
        }
    }
}
