//! Logs go to stderr, one line a change, as text or as JSON. Under systemd a priority prefix replaces the
//! timestamp of a text, which the journal has anyway.

use std::borrow::Cow;
use std::env;
use std::io::Write;
use std::os::fd::AsFd;
use std::str::FromStr;

use log::kv::{self, Key, Value, VisitSource};
use log::{Level, Record};
use serde_json::{Map, json};

use crate::settings::Exit;

use super::events::Tell;

/// How a line of the log is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// Time, level, and a sentence.
    #[default]
    Text,
    /// One JSON object: `ts`, `level`, `program`, `node` where the program is one, `message`, and what else
    /// is known.
    Json,
}

impl FromStr for LogFormat {
    type Err = String;

    fn from_str(text: &str) -> Result<LogFormat, String> {
        match text {
            "text" => Ok(LogFormat::Text),
            "json" => Ok(LogFormat::Json),
            _ => Err("allowed are text and json".into()),
        }
    }
}

/// Installs the logger of `program`, which may be a `node`. `level`: `error`, `warn`, `info`, `debug` or
/// `trace`, or whatever `RUST_LOG` says if that is set.
///
/// # Errors
/// [`Exit`] with code 78 for another level.
pub fn install(
    level: &str,
    format: LogFormat,
    program: &'static str,
    node: Option<&str>,
) -> Result<(), Exit> {
    let filter = level.parse().map_err(|_| {
        Exit::config(format!(
            "log level {level:?} is not usable: allowed are error, warn, info, debug, trace"
        ))
    })?;
    let mut builder = env_logger::Builder::new();
    builder.filter_level(filter).parse_env("RUST_LOG");
    let is_journal = stderr_is_journal();
    let node = node.map(str::to_string);
    builder.format(move |out, record| {
        if is_journal {
            write!(out, "<{}>", priority(record.level()))?;
        }
        match (format, is_journal) {
            (LogFormat::Json, _) => {
                let at = out.timestamp_millis().to_string();
                writeln!(out, "{}", as_json(record, &at, program, node.as_deref()))
            }
            (LogFormat::Text, true) => writeln!(out, "{}", one_line(&record.args().to_string())),
            (LogFormat::Text, false) => {
                let text = record.args().to_string();
                writeln!(out, "{} {:5} {}", out.timestamp_millis(), record.level(), one_line(&text))
            }
        }
    });
    // A second logger in one process (tests, `up`) is no reason to fail.
    let _ = builder.try_init();
    Ok(())
}

/// As `syslog` numbers them.
fn priority(level: Level) -> u8 {
    match level {
        Level::Error => 3,
        Level::Warn => 4,
        Level::Info => 6,
        Level::Debug | Level::Trace => 7,
    }
}

fn as_json(record: &Record<'_>, at: &str, program: &str, node: Option<&str>) -> String {
    struct Pairs<'a>(&'a mut Map<String, serde_json::Value>);
    impl<'kvs> VisitSource<'kvs> for Pairs<'_> {
        fn visit_pair(&mut self, key: Key<'kvs>, value: Value<'kvs>) -> Result<(), kv::Error> {
            self.0.entry(key.as_str()).or_insert_with(|| json!(value.to_string()));
            Ok(())
        }
    }
    let mut line = Map::new();
    line.insert("ts".into(), json!(at));
    line.insert("level".into(), json!(record.level().as_str().to_ascii_lowercase()));
    line.insert("program".into(), json!(program));
    if let Some(node) = node {
        line.insert("node".into(), json!(node));
    }
    line.insert("message".into(), json!(record.args().to_string()));
    // What cannot be shown is left out.
    let _ = record.key_values().visit(&mut Pairs(&mut line));
    serde_json::Value::Object(line).to_string()
}

/// Puts a change into words, if the log takes any.
pub fn tell(what: &dyn Tell) {
    if log::max_level() < Level::Warn {
        return;
    }
    let happening = what.happening();
    let level = if happening.is_warning { Level::Warn } else { Level::Info };
    log::log!(level, "{}", happening.text);
}

/// The text with its control characters escaped: what comes from files and peers must not end a line of
/// the log, nor speak to a terminal.
fn one_line(text: &str) -> Cow<'_, str> {
    // These change how what follows them is shown.
    let is_unsafe =
        |c: char| c.is_control() || matches!(c, '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    if !text.contains(is_unsafe) {
        return Cow::Borrowed(text);
    }
    let mut line = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        if is_unsafe(c) { line.extend(c.escape_default()) } else { line.push(c) }
    }
    Cow::Owned(line)
}

/// `JOURNAL_STREAM` names device and inode of the stream that systemd connected; it is inherited, so
/// only a match says that it is ours.
fn stderr_is_journal() -> bool {
    let Ok(stream) = env::var("JOURNAL_STREAM") else { return false };
    let Ok(stat) = rustix::fs::fstat(std::io::stderr().as_fd()) else { return false };
    stream == format!("{}:{}", stat.st_dev, stat.st_ino)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_json_holds_the_message_whatever_it_says() {
        let args = format_args!("a\n\"b\"\u{1b}[31m");
        let pairs = [("correlation_id", "c-1"), ("message", "not this one")];
        let record = Record::builder().args(args).level(Level::Warn).key_values(&pairs).build();
        let line = as_json(&record, "2026-01-31T12:00:00.000Z", "pool-managerd", Some("gpu-1"));
        assert_eq!(line.lines().count(), 1, "{line}");
        let read: serde_json::Value = serde_json::from_str(&line).expect("JSON");
        assert_eq!(
            read,
            json!({"ts": "2026-01-31T12:00:00.000Z", "level": "warn", "program": "pool-managerd",
                "node": "gpu-1", "message": "a\n\"b\"\u{1b}[31m", "correlation_id": "c-1"})
        );
    }

    #[test]
    fn a_message_is_one_line_without_control_characters() {
        assert_eq!(one_line("plain, ünïcode"), "plain, ünïcode");
        assert_eq!(
            one_line("a\nERROR b\u{1b}[31m\u{9b}c\u{202e}d\0"),
            "a\\nERROR b\\u{1b}[31m\\u{9b}c\\u{202e}d\\u{0}"
        );
    }
}
