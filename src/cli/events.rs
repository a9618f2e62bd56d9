//! `llorch events`: the last state changes of a daemon, and with `--follow` those to come.
//!
//! A daemon numbers its events from 0. Whoever follows asks again from the last one that it saw, and so
//! notices both a gap (more happened than the daemon remembers) and a restart (that number is another
//! event by now, or none): after a restart it begins with the new process's first event.

use std::ffi::OsString;

use serde_json::Value;

use crate::service::credentials;
use crate::settings::{Exit, Setting, Settings, Words, boolean, flag, number};
use crate::time::Wall;

use super::remote::{self, EXIT_UNREACHABLE, Remote};
use super::status::words;
use super::terminal::{Interrupt, Screen, Tone, clean};

/// Longest pause between two attempts to reach a daemon that is away, in milliseconds.
const AWAY_MS_MAX: u64 = 5_000;

pub(super) static TABLE: &[Setting] = &[
    remote::URL,
    credentials::API_TOKEN,
    credentials::API_TOKEN_FILE,
    credentials::ADMIN_TOKEN,
    credentials::ADMIN_TOKEN_FILE,
    remote::TLS_CA,
    remote::TLS_CERT,
    remote::TLS_KEY,
    remote::TIMEOUT,
    flag("follow", Some("false"), "BOOL", "Show what happens from now on, too; over restarts of the daemon"),
    flag("since", Some("0"), "SEQ", "Begin with the event of this number"),
    flag("interval-ms", Some("500"), "MS", "How often it is asked with --follow; 50 to 60000"),
    flag("json", Some("false"), "BOOL", "One JSON object a line: the daemon's own"),
];
pub(super) const ABOUT: &str = "Show the last state changes of a daemon";

/// Where a reader is in a daemon's events.
#[derive(Debug, Default, PartialEq, Eq)]
struct Place {
    /// The event that was seen last, and when it happened.
    last: Option<(u64, u64)>,
    /// The first one that is wanted.
    since: u64,
}

/// What an answer holds for a reader.
#[derive(Debug, Default, PartialEq, Eq)]
struct News<'a> {
    events: Vec<&'a Value>,
    /// So many were forgotten before they could be read.
    missed: u64,
    /// The daemon is another process now: its events have to be asked for from the first one on.
    restarted: bool,
}

impl Place {
    /// What to ask for: the event that was seen last, so that it can be recognized, and all behind it.
    fn ask_from(&self) -> u64 {
        self.last.map_or(self.since, |(seq, _)| seq)
    }

    fn take<'a>(&mut self, answer: &'a Value) -> News<'a> {
        let mut events: Vec<&Value> =
            answer["events"].as_array().map_or(Vec::new(), |all| all.iter().collect());
        let next = answer["next"].as_u64().unwrap_or(0);
        let seq = |event: &Value| event["seq"].as_u64().unwrap_or(0);
        let mut missed = 0;
        if let Some((last, at_ns)) = self.last {
            let first = events.first().copied();
            let is_same = first.is_some_and(|event| seq(event) == last && event["at_ns"] == at_ns);
            let is_forgotten = first.is_some_and(|event| seq(event) > last);
            if is_same {
                events.remove(0);
            } else if is_forgotten {
                missed = first.map_or(0, seq) - last - 1;
            } else {
                *self = Place { last: None, since: 0 };
                return News { events: Vec::new(), missed: 0, restarted: true };
            }
        } else if next < self.since {
            *self = Place::default();
            return News { events: Vec::new(), missed: 0, restarted: true };
        }
        if let Some(event) = events.last() {
            self.last = Some((seq(event), event["at_ns"].as_u64().unwrap_or(0)));
        }
        News { events, missed, restarted: false }
    }
}

/// Runs `llorch events`.
pub(super) fn run(args: Vec<OsString>) -> Result<(), Exit> {
    let env = |name: &str| std::env::var_os(name);
    let settings = Settings::read_words("llorch events", ABOUT, TABLE, Words::None, args, env)?;
    let remote = Remote::from_settings(&settings)?;
    let as_json = settings.need("json", boolean)?;
    let follow = settings.need("follow", boolean)?;
    let interval_ms = settings.need("interval-ms", number(50, 60_000))?;
    let since = settings.need("since", number(0, u64::MAX))?;
    let screen = Screen::new();
    if !follow {
        let answer = remote.get(&format!("/v2/events?since={since}"))?;
        for event in answer["events"].as_array().map_or(&[][..], Vec::as_slice) {
            if !screen.write(&line(event, as_json, &screen)) {
                break;
            }
        }
        return Ok(());
    }
    let interrupt = Interrupt::watch()?;
    let mut place = Place { last: None, since };
    let mut away_ms = 0;
    loop {
        let pause_ms = match remote.get(&format!("/v2/events?since={}", place.ask_from())) {
            Ok(answer) => {
                if away_ms > 0 {
                    away_ms = 0;
                    aside(&screen, &format!("{} answers again", remote.url()));
                }
                let news = place.take(&answer);
                if news.missed > 0 {
                    aside(
                        &screen,
                        &format!("{} events were forgotten before they could be read", news.missed),
                    );
                }
                for event in &news.events {
                    if !screen.write(&line(event, as_json, &screen)) {
                        return Ok(());
                    }
                }
                if news.restarted {
                    aside(&screen, &format!("{} has started anew", remote.url()));
                    0
                } else {
                    interval_ms
                }
            }
            // Whoever never answered is more likely not there at all.
            Err(exit) if exit.code != EXIT_UNREACHABLE || (place.last.is_none() && away_ms == 0) => {
                return Err(exit);
            }
            Err(exit) => {
                if away_ms == 0 {
                    aside(&screen, &exit.message);
                }
                away_ms = (away_ms * 2).clamp(interval_ms, AWAY_MS_MAX.max(interval_ms));
                away_ms
            }
        };
        if interrupt.pause(pause_ms) {
            return Ok(());
        }
    }
}

fn line(event: &Value, as_json: bool, screen: &Screen) -> String {
    if as_json {
        return format!("{event}\n");
    }
    let at = Wall(event["at_ns"].as_u64().unwrap_or(0)).rfc3339();
    let tone = match event["state"].as_str() {
        Some("broken" | "refused" | "Offline" | "failed") => Tone::Bad,
        Some("suspect" | "Suspect" | "draining" | "Draining") => Tone::Warning,
        Some("ready" | "accepted" | "Online" | "routable") => Tone::Good,
        _ => Tone::Plain,
    };
    format!("{} {}\n", screen.paint(Tone::Faint, &at), screen.paint(tone, &words(&event["text"])))
}

/// What is no event goes to stderr, where it is in nobody's way.
#[allow(clippy::print_stderr, reason = "a remark of the command itself, for its terminal")]
fn aside(screen: &Screen, text: &str) {
    eprintln!("llorch: {}", screen.paint(Tone::Warning, &clean(text)));
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn answer(events: std::ops::Range<u64>, born: u64) -> Value {
        let next = events.end;
        let events: Vec<Value> =
            events.map(|seq| json!({"seq": seq, "at_ns": born + seq, "text": "t"})).collect();
        json!({"events": events, "next": next})
    }

    fn seqs(news: &News<'_>) -> Vec<u64> {
        news.events.iter().map(|event| event["seq"].as_u64().expect("a number")).collect()
    }

    #[test]
    fn a_reader_goes_on_where_it_was_and_notices_gaps_and_restarts() {
        let mut place = Place::default();
        assert_eq!(seqs(&place.take(&answer(0..3, 100))), [0, 1, 2]);
        assert_eq!(place.ask_from(), 2);
        let same = answer(2..3, 100);
        assert_eq!(place.take(&same), News::default());
        assert_eq!(seqs(&place.take(&answer(2..5, 100))), [3, 4]);
        let gap = answer(9..11, 100);
        let news = place.take(&gap);
        assert_eq!((seqs(&news), news.missed), (vec![9, 10], 4));
        // Another process: the number is somebody else's, or has not been reached yet.
        for after in [answer(10..12, 900), answer(10..10, 900)] {
            let mut place = Place { last: place.last, since: 0 };
            assert!(place.take(&after).restarted);
            assert_eq!((place.ask_from(), seqs(&place.take(&answer(0..2, 900)))), (0, vec![0, 1]));
        }
    }
}
