//! Failed attempts: counted by address, slowed, and told to the log now and then. Pure.
//!
//! Guessing a good token takes longer than anybody has, so this is not what keeps guessers out. It keeps
//! them, and clients that go on with a token that was withdrawn, from filling the log and the loop, and it
//! shows operators who they are. Only refusals are slowed: whoever shows a good token from the same
//! address is answered at once.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr};

use crate::metrics::Scrape;
use crate::time::Mono;

use super::auth::Denied;

/// Addresses that are remembered; the one that was quiet for longest makes room. At about 64 bytes each.
const ADDRESSES_MAX: usize = 4_096;
/// An address without an attempt for this long starts anew, in milliseconds.
const FORGET_MS: u64 = 60_000;
/// Attempts that are not slowed: a typing error should not hurt.
const FREE_ATTEMPTS: u64 = 3;
/// The first delay, doubled with each attempt, and the longest, in milliseconds. The longest is below the
/// shortest patience of a node (half a second), which must be told that its token is bad.
const DELAY_MS: (u64, u64) = (25, 400);
/// Between two lines of the log about one address, in milliseconds.
const LINE_EVERY_MS: u64 = 30_000;
/// Lines of the log about all addresses together, for each [`LINE_EVERY_MS`].
const LINES_MAX: u32 = 20;

/// What becomes of an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// How much later its answer leaves, in milliseconds.
    pub delay_ms: u64,
    /// Whether the log is told; then of so many attempts from this address since the last line.
    pub tell: Option<u64>,
}

#[derive(Debug)]
struct Record {
    last: Mono,
    bad: u64,
    told: Option<Mono>,
    untold: u64,
}

/// All that is remembered.
#[derive(Debug, Default)]
pub struct Attempts {
    by_address: BTreeMap<IpAddr, Record>,
    /// Missing, bad, and of another scope.
    denied: [u64; 3],
    delayed: u64,
    lines: (Option<Mono>, u32),
    silenced: u64,
}

impl Attempts {
    /// Takes note of a refusal.
    pub fn note(&mut self, from: IpAddr, denied: Denied, now: Mono) -> Verdict {
        let kind = match denied {
            Denied::Missing => 0,
            Denied::Bad(_) => 1,
            Denied::Scope => 2,
        };
        self.denied[kind] += 1;
        if kind == 0 {
            // Somebody who shows nothing guesses nothing.
            return Verdict { delay_ms: 0, tell: None };
        }
        let from = network(from);
        self.make_room(from, now);
        let fresh = Record { last: now, bad: 0, told: None, untold: 0 };
        let record = self.by_address.entry(from).or_insert(fresh);
        record.last = now;
        record.untold += 1;
        record.bad += u64::from(kind == 1);
        let beyond = record.bad.saturating_sub(FREE_ATTEMPTS);
        let delay_ms = match beyond {
            0 => 0,
            _ if kind != 1 => 0,
            n => DELAY_MS.0.saturating_mul(1 << (n - 1).min(16)).min(DELAY_MS.1),
        };
        self.delayed += u64::from(delay_ms > 0);
        let due = record.told.is_none_or(|at| now.ms_since(at) >= LINE_EVERY_MS);
        if !due || !take_line(&mut self.lines, now) {
            self.silenced += u64::from(due);
            return Verdict { delay_ms, tell: None };
        }
        record.told = Some(now);
        Verdict { delay_ms, tell: Some(std::mem::take(&mut record.untold)) }
    }

    /// Lines that were due since the last call, and one too many.
    pub fn take_silenced(&mut self) -> u64 {
        std::mem::take(&mut self.silenced)
    }

    /// Addresses that are remembered.
    #[must_use]
    pub fn addresses(&self) -> usize {
        self.by_address.len()
    }

    /// Writes the metrics; `program` is their prefix.
    pub fn scrape(&self, program: &str, scrape: &mut Scrape) {
        let [missing, bad, scope] = self.denied;
        scrape.counter(
            &format!("{program}_auth_failures_total"),
            "Requests refused for their token, or for want of one.",
            &[("reason=\"missing\"", missing), ("reason=\"bad\"", bad), ("reason=\"scope\"", scope)],
        );
        scrape.counter(
            &format!("{program}_auth_delayed_total"),
            "Of these, answered late on purpose.",
            &[("", self.delayed)],
        );
    }

    fn make_room(&mut self, from: IpAddr, now: Mono) {
        if self.by_address.get(&from).is_some_and(|record| now.ms_since(record.last) >= FORGET_MS) {
            self.by_address.remove(&from);
        }
        if self.by_address.len() < ADDRESSES_MAX || self.by_address.contains_key(&from) {
            return;
        }
        self.by_address.retain(|_, record| now.ms_since(record.last) < FORGET_MS);
        if self.by_address.len() >= ADDRESSES_MAX {
            let quietest = self.by_address.iter().min_by_key(|(_, record)| record.last);
            if let Some(address) = quietest.map(|(address, _)| *address) {
                self.by_address.remove(&address);
            }
        }
    }
}

/// Whether one more line may be written; `lines` is when the present period began, and its lines.
fn take_line(lines: &mut (Option<Mono>, u32), now: Mono) -> bool {
    if lines.0.is_none_or(|began| now.ms_since(began) >= LINE_EVERY_MS) {
        *lines = (Some(now), 0);
    }
    lines.1 += 1;
    lines.1 <= LINES_MAX
}

/// Whoever has one address of an IPv6 network has all of its 64 low bits.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => IpAddr::V6(Ipv6Addr::from(u128::from(v6) >> 64 << 64)),
        v4 => v4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::head::parse_request;
    use crate::service::auth::{Keys, Policy, Tokens};

    fn bad() -> Denied {
        let head =
            parse_request(b"GET / HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer x\r\n\r\n").expect("a head");
        let keys = Keys::one(&Tokens::parse("t").expect("a token"));
        keys.check(Policy::Admin, &head.fields).expect_err("it is bad")
    }

    fn at(ms: u64) -> Mono {
        Mono(1).plus_ms(ms)
    }

    #[test]
    fn guessers_are_slowed_up_to_a_limit_and_forgotten_when_quiet() {
        let mut attempts = Attempts::default();
        let address = IpAddr::from([10, 0, 0, 7]);
        let delays: Vec<u64> = (0..10).map(|n| attempts.note(address, bad(), at(n)).delay_ms).collect();
        assert_eq!(delays, [0, 0, 0, 25, 50, 100, 200, 400, 400, 400]);
        assert_eq!(attempts.note(IpAddr::from([10, 0, 0, 8]), bad(), at(20)).delay_ms, 0);
        // What guesses nothing is not slowed.
        assert_eq!(attempts.note(address, Denied::Missing, at(30)).delay_ms, 0);
        assert_eq!(attempts.note(address, Denied::Scope, at(30)).delay_ms, 0);
        assert_eq!(attempts.note(address, bad(), at(30 + FORGET_MS)).delay_ms, 0);
    }

    #[test]
    fn the_log_hears_of_an_address_now_and_then_and_of_few_addresses_at_once() {
        let mut attempts = Attempts::default();
        let address = IpAddr::from([10, 0, 0, 7]);
        assert_eq!(attempts.note(address, bad(), at(0)).tell, Some(1));
        for n in 1..50 {
            assert_eq!(attempts.note(address, bad(), at(n)).tell, None);
        }
        assert_eq!(attempts.note(address, bad(), at(LINE_EVERY_MS)).tell, Some(50));
        let told = (0..1_000u32).filter(|n| {
            attempts.note(IpAddr::from(n.to_be_bytes()), bad(), at(LINE_EVERY_MS)).tell.is_some()
        });
        assert!(told.count() < LINES_MAX as usize);
        assert!(attempts.take_silenced() > 900);
        assert_eq!(attempts.take_silenced(), 0);
    }

    #[test]
    fn the_table_is_bounded_and_a_v6_network_is_one_address() {
        let mut attempts = Attempts::default();
        for n in 0..3 * ADDRESSES_MAX as u32 {
            attempts.note(IpAddr::from(n.to_be_bytes()), bad(), at(u64::from(n) / 1_000));
            assert!(attempts.addresses() <= ADDRESSES_MAX);
        }
        let mut attempts = Attempts::default();
        for n in 0..100u16 {
            attempts.note(IpAddr::from([0x2001, 0xdb8, 0, 0, n, 0, 0, n]), bad(), at(0));
        }
        assert_eq!(attempts.addresses(), 1);
    }
}
