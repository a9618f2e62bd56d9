//! `llorch explain`: why a request went where it went, or waits, and what each phase took; as sentences.

use std::ffi::OsString;

use serde_json::Value;

use crate::service::credentials;
use crate::settings::{Exit, Setting, Settings, Words, boolean, flag};

use super::remote::{self, Remote, Service};
use super::status::words;
use super::table::{Cell, Column, Table};
use super::terminal::{Screen, Tone, wrapped};

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
    flag("json", Some("false"), "BOOL", "The daemon's own answer"),
];
pub(super) const ABOUT: &str =
    "Say why a request went where it went, or waits; without an ID, list the last ones";
pub(super) const ID: Words = Words::Given {
    name: "ID",
    help: "The request's id, as its answer's x-request-id says, or a task's",
    min: 0,
    max: 1,
};

/// Runs `llorch explain`.
pub(super) fn run(args: Vec<OsString>) -> Result<(), Exit> {
    let settings =
        Settings::read_words("llorch explain", ABOUT, TABLE, ID, args, |name| std::env::var_os(name))?;
    let remote = Remote::from_settings(&settings)?;
    if remote.service()?.0 == Service::Agent {
        return Err(Exit::runtime(format!(
            "{} is a pool-managerd: requests are placed, and explained, by orchestratord; name one with --url",
            remote.url()
        )));
    }
    let id = settings.rest.first().map(|id| id.to_string_lossy().into_owned());
    if id
        .as_ref()
        .is_some_and(|id| !id.bytes().all(|b| b.is_ascii_graphic() && !matches!(b, b'?' | b'#' | b'%')))
    {
        return Err(Exit::usage("ID: allowed are visible ASCII characters without ?, # and %"));
    }
    let answer = match &id {
        Some(id) => remote.get(&format!("/v2/explain/{id}"))?,
        None => remote.get("/v2/explain")?,
    };
    let screen = Screen::new();
    screen.write(&match (settings.need("json", boolean)?, id) {
        (true, _) => format!("{answer}\n"),
        (false, Some(_)) => one(&answer, &screen),
        (false, None) => listing(&answer, &screen),
    });
    Ok(())
}

fn listing(answer: &Value, screen: &Screen) -> String {
    let mut table = Table::new(&[
        Column("REQUEST", 0),
        Column("STATE", 0),
        Column("QUEUE", 2),
        Column("TOTAL", 1),
        Column("ON", 3),
        Column("MODEL", 4),
    ]);
    let requests = answer["requests"].as_array().map_or(&[][..], Vec::as_slice);
    for request in requests {
        let (tone, state) = state(request);
        let last = request["attempts"].as_array().and_then(|attempts| attempts.last());
        table.row(
            vec![
                Cell::plain(words(&request["request_id"])),
                Cell::new(tone, &state),
                Cell::plain(ms(&request["queue_ms"])),
                Cell::plain(ms(&request["total_ms"])),
                Cell::plain(last.map_or("-".to_string(), place)),
                Cell::plain(words(&request["model"])),
            ],
            None,
        );
    }
    match requests {
        [] => "no request is remembered\n".to_string(),
        _ => table.text(screen),
    }
}

fn state(request: &Value) -> (Tone, String) {
    match request["outcome"].as_str() {
        Some("answered") => (Tone::Good, "answered".into()),
        Some("withdrawn") => (Tone::Warning, "withdrawn".into()),
        Some(other) => (Tone::Bad, super::terminal::clean(other)),
        None => (Tone::Warning, words(&request["state"])),
    }
}

fn place(attempt: &Value) -> String {
    format!("{}/{}/{}", words(&attempt["node"]), words(&attempt["pool"]), words(&attempt["replica"]))
}

fn ms(value: &Value) -> String {
    value.as_f64().map_or("-".to_string(), |ms| format!("{ms:.1} ms"))
}

fn one(request: &Value, screen: &Screen) -> String {
    let mut text = String::new();
    let mut say = |tone: Tone, indent: usize, sentence: &str| {
        for line in wrapped(sentence, screen.width.saturating_sub(indent).max(20)) {
            text.push_str(&format!("{:indent$}{}\n", "", screen.paint(tone, &line)));
        }
    };
    let (tone, state) = state(request);
    say(Tone::Strong, 0, &format!("{} {}", words(&request["request_id"]), words(&request["path"])));
    let mut asked = match request["model"].as_str() {
        Some(model) => format!("asked for model {model:?}"),
        None => "asked for any model".to_string(),
    };
    if let Some(alias) = request["alias"].as_str() {
        asked.push_str(&format!(" by its alias {alias:?}"));
    }
    if let Some(slots) = request["slots"].as_u64().filter(|slots| *slots != 1) {
        asked.push_str(&format!(", {slots} slots at once"));
    }
    if request["stream"] == true {
        asked.push_str(", as a stream");
    }
    say(Tone::Plain, 0, &asked);
    let mut over = format!("{state} after {}", ms(&request["total_ms"]));
    if let Some(reason) = request["reason"].as_str() {
        over.push_str(&format!(": {reason}"));
    }
    say(tone, 0, &over);
    if let Some(behind) = request["queued_behind"].as_u64() {
        say(
            Tone::Plain,
            0,
            &format!("waited {} in the queue, behind {behind} others", ms(&request["queue_ms"])),
        );
    }
    if !request["considered"].is_null() {
        say(Tone::Plain, 2, &format!("when it began to wait: {}", considered(&request["considered"])));
    }
    let attempts = request["attempts"].as_array().map_or(&[][..], Vec::as_slice);
    for (number, attempt) in attempts.iter().enumerate() {
        let how = match attempt["chosen_by"].as_str() {
            Some("placement") => "chosen by placement".to_string(),
            Some(other) => format!("chosen by {}", other.replace('_', " ")),
            None => "chosen".to_string(),
        };
        say(
            Tone::Plain,
            0,
            &format!("attempt {}: {}, {how}, after {}", number + 1, place(attempt), ms(&attempt["wait_ms"])),
        );
        if !attempt["considered"].is_null() {
            say(Tone::Faint, 2, &considered(&attempt["considered"]));
        }
        say(
            Tone::Plain,
            2,
            &format!(
                "connected {}, first byte {}, last byte {}, status {}",
                ms(&attempt["connect_ms"]),
                ms(&attempt["first_byte_ms"]),
                ms(&attempt["last_byte_ms"]),
                words(&attempt["status"])
            ),
        );
        if let Some(failure) = attempt["failure"].as_str() {
            say(Tone::Bad, 2, failure);
        }
    }
    let survey = &request["waiting_for"];
    if !survey.is_null() {
        let refused = survey["refused"].as_object().into_iter().flatten();
        let reasons: Vec<String> =
            refused.map(|(why, count)| format!("{count} {}", why.replace('_', " "))).collect();
        say(
            Tone::Plain,
            0,
            &format!("waits; of {} replicas: {}", words(&survey["replicas"]), reasons.join(", ")),
        );
        for named in survey["named"].as_array().map_or(&[][..], Vec::as_slice) {
            say(Tone::Warning, 2, &format!("{}: {}", words(&named["replica"]), words(&named["reason"])));
        }
    }
    text
}

fn considered(value: &Value) -> String {
    let refused = &value["refused"];
    let count = |name: &str| refused[name].as_u64().unwrap_or(0);
    let mut parts = vec![format!("{} with room", words(&value["with_room"]))];
    for (name, told) in [
        ("other_model_or_place", "of another model or place"),
        ("takes_no_work", "that take no work"),
        ("full", "full"),
    ] {
        if count(name) > 0 {
            parts.push(format!("{} {told}", count(name)));
        }
    }
    format!("of {} replicas: {}", words(&value["replicas"]), parts.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_request_is_told_in_sentences_that_fit() {
        let request = json!({"request_id": "id-1", "path": "/v1/chat/completions", "model": "m", "alias": "gpt",
            "stream": true, "slots": 2, "state": "over", "outcome": "answered", "queue_ms": 12.0,
            "total_ms": 101.99, "queued_behind": 3, "attempts": [
                {"node": "n", "pool": "p", "replica": "r", "chosen_by": "placement", "wait_ms": 12.0,
                 "considered": {"replicas": 9, "refused": {"other_model_or_place": 4, "takes_no_work": 0, "full": 3}, "with_room": 2},
                 "connect_ms": 0.5, "first_byte_ms": 20.0, "last_byte_ms": 89.0, "status": 503, "failure": "it is full"}]});
        for width in [40, 80, 160] {
            let screen = Screen { is_terminal: false, coloured: false, width };
            let text = one(&request, &screen);
            assert!(text.lines().all(|line| line.chars().count() <= width), "{width}: {text}");
            let flat = text.split_whitespace().collect::<Vec<_>>().join(" ");
            for part in [
                "asked for model \"m\" by its alias \"gpt\", 2 slots at once, as a stream",
                "answered after 102.0 ms",
                "waited 12.0 ms in the queue, behind 3 others",
                "attempt 1: n/p/r, chosen by placement, after 12.0 ms",
                "of 9 replicas: 2 with room, 4 of another model or place, 3 full",
                "first byte 20.0 ms",
                "it is full",
            ] {
                assert!(flat.contains(part), "{part}: {flat}");
            }
        }
    }
}
