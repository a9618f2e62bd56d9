//! Logs go to stderr, one line a change, as text or as JSON. Under systemd a priority prefix replaces the
//! timestamp of a text, which the journal has anyway.
//!
//! A text is a sentence, and behind it `node=` with the node's name where the program is one. What is said while
//! a request is looked at also carries the request's name, `correlation_id=`, by which its client knows it: see
//! [`about`]. Loggers have no other way to learn of it, as pure code does not log.

use std::borrow::Cow;
use std::cell::RefCell;
use std::env;
use std::io::Write;
use std::os::fd::AsFd;
use std::str::FromStr;

use env_logger::Target;
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
    /// is known: `kind`, `subject` and `state` of a change, the `correlation_id` of a request.
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

thread_local! {
    /// The request that this thread looks at; empty where it looks at none. Its room is used again and again.
    static CORRELATION: RefCell<String> = const { RefCell::new(String::new()) };
}

/// For as long as it lives, lines of this thread are about a request.
#[derive(Debug)]
#[must_use]
pub struct About(());

/// Lines of this thread are about the request that its client calls `correlation`, if it has a name.
pub fn about(correlation: Option<&str>) -> About {
    CORRELATION.with_borrow_mut(|name| {
        name.clear();
        name.push_str(correlation.unwrap_or_default());
    });
    About(())
}

impl Drop for About {
    fn drop(&mut self) {
        CORRELATION.with_borrow_mut(String::clear);
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
    install_into(Target::Stderr, level, format, program, node)
}

/// The same, writing to `target`: for a program that has more on its terminal than lines.
///
/// # Errors
/// As [`install`].
pub fn install_into(
    target: Target,
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
    builder.filter_level(filter).parse_env("RUST_LOG").target(target);
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
            (LogFormat::Text, true) => writeln!(out, "{}", as_text(record, node.as_deref())),
            (LogFormat::Text, false) => {
                let text = as_text(record, node.as_deref());
                writeln!(out, "{} {:5} {text}", out.timestamp_millis(), record.level())
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

/// The request that this thread looks at.
fn correlation() -> Option<String> {
    CORRELATION.with_borrow(|name| (!name.is_empty()).then(|| name.clone()))
}

fn as_text(record: &Record<'_>, node: Option<&str>) -> String {
    let mut text = one_line(&record.args().to_string()).into_owned();
    let correlation = correlation();
    for (name, value) in [("node", node), ("correlation_id", correlation.as_deref())] {
        if let Some(value) = value {
            text.push_str(&format!(" {name}={}", one_line(value)));
        }
    }
    text
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
    if let Some(correlation) = correlation() {
        line.insert("correlation_id".into(), json!(correlation));
    }
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
    let (kind, subject) = (happening.kind, happening.subject.as_str());
    match happening.state {
        "" => log::log!(level, kind = kind, subject = subject; "{}", happening.text),
        state => log::log!(level, kind = kind, subject = subject, state = state; "{}", happening.text),
    }
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
    fn lines_about_a_request_name_it_and_others_do_not() {
        let (args, none) = (format_args!("refused"), format_args!("and then"));
        let record = Record::builder().args(args).level(Level::Warn).build();
        {
            let _about = about(Some("c-1 \n"));
            assert_eq!(as_text(&record, Some("gpu-1")), "refused node=gpu-1 correlation_id=c-1 \\n");
            let line: serde_json::Value =
                serde_json::from_str(&as_json(&record, "", "p", None)).expect("JSON");
            assert_eq!(line["correlation_id"], "c-1 \n");
        }
        assert_eq!(as_text(&Record::builder().args(none).build(), None), "and then");
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
