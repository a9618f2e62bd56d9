//! Logs go to stderr, one line a change. Under systemd a priority prefix replaces the timestamp,
//! which the journal has anyway.

use std::borrow::Cow;
use std::env;
use std::io::Write;
use std::os::fd::AsFd;

use log::Level;

use crate::settings::Exit;

use super::events::Tell;

/// Installs the logger. `level`: `error`, `warn`, `info`, `debug` or `trace`, or whatever `RUST_LOG`
/// says if that is set.
///
/// # Errors
/// [`Exit`] with code 78 for another level.
pub fn install(level: &str) -> Result<(), Exit> {
    let filter = level.parse().map_err(|_| {
        Exit::config(format!(
            "log level {level:?} is not usable: allowed are error, warn, info, debug, trace"
        ))
    })?;
    let mut builder = env_logger::Builder::new();
    builder.filter_level(filter).parse_env("RUST_LOG");
    if stderr_is_journal() {
        builder.format(|out, record| {
            let priority = match record.level() {
                Level::Error => 3,
                Level::Warn => 4,
                Level::Info => 6,
                Level::Debug | Level::Trace => 7,
            };
            writeln!(out, "<{priority}>{}", one_line(&record.args().to_string()))
        });
    } else {
        builder.format(|out, record| {
            let text = record.args().to_string();
            writeln!(out, "{} {:5} {}", out.timestamp_millis(), record.level(), one_line(&text))
        });
    }
    // A second logger in one process (tests, `up`) is no reason to fail.
    let _ = builder.try_init();
    Ok(())
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
    fn a_message_is_one_line_without_control_characters() {
        assert_eq!(one_line("plain, ünïcode"), "plain, ünïcode");
        assert_eq!(
            one_line("a\nERROR b\u{1b}[31m\u{9b}c\u{202e}d\0"),
            "a\\nERROR b\\u{1b}[31m\\u{9b}c\\u{202e}d\\u{0}"
        );
    }
}
