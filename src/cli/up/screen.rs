//! What `llorch up` shows: one short line as each thing happens, an answer as it comes, a table.
//!
//! Plain text in columns; colour only for a terminal whose owner did not refuse it. A reader that went
//! away (`llorch up | head`) is no reason to stop anything, so errors of writing are dropped.

use std::env;
use std::io::{self, IsTerminal, Write};

use super::timeline::Row;

/// Width of the first column: the longest subject, `pool-managerd`, and two blanks.
const SUBJECT_WIDTH: usize = 15;
/// Longest text of one line, in characters: an engine's command may be long, and a line should not wrap
/// many times.
const TEXT_CHARS_MAX: usize = 400;

/// Standard output.
pub(super) struct Screen {
    coloured: bool,
    in_answer: bool,
}

impl Screen {
    pub(super) fn new() -> Screen {
        let refused = env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        Screen { coloured: io::stdout().is_terminal() && !refused, in_answer: false }
    }

    /// One thing that happened, or is so.
    pub(super) fn line(&mut self, subject: &str, text: &str) {
        let text: String = clean(text).chars().take(TEXT_CHARS_MAX).collect();
        self.write(&format!("{}{text}\n", self.subject(subject)));
    }

    fn subject(&self, name: &str) -> String {
        let padded = format!("{name:SUBJECT_WIDTH$}");
        if self.coloured { format!("\x1b[36m{padded}\x1b[0m") } else { padded }
    }

    pub(super) fn blank(&mut self) {
        self.write("\n");
    }

    /// A piece of the answer, shown at once.
    pub(super) fn token(&mut self, text: &str) {
        let text = clean(text);
        if self.in_answer {
            self.write(&text.replace('\n', &format!("\n{:SUBJECT_WIDTH$}", "")));
        } else if !text.trim_start().is_empty() {
            self.write(&format!("{}{}", self.subject("answer"), text.trim_start()));
            self.in_answer = true;
        }
    }

    /// Ends the answer's line, whether or not the answer is complete.
    pub(super) fn end_answer(&mut self) {
        if std::mem::take(&mut self.in_answer) {
            self.write("\n");
        }
    }

    /// What was measured, numbers under each other.
    pub(super) fn table(&mut self, rows: &[Row]) {
        let label = rows.iter().map(|row| row.label.len()).max().unwrap_or(0);
        let cells: Vec<String> = rows.iter().map(|row| milliseconds(row.ns)).collect();
        let cell = cells.iter().map(String::len).max().unwrap_or(0);
        for (row, number) in rows.iter().zip(&cells) {
            let text = format!("{:label$}  {number:>cell$} ms  {}", row.label, row.note);
            self.write(&format!("{}\n", text.trim_end()));
        }
    }

    fn write(&self, text: &str) {
        let mut out = io::stdout().lock();
        let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
    }
}

/// Two decimals for all, so that the points stand under each other: the fastest step takes a tenth of one.
fn milliseconds(ns: Option<u64>) -> String {
    match ns {
        Some(ns) => format!("{:.2}", ns as f64 / 1e6),
        None => "-".to_string(),
    }
}

/// Without what could command a terminal: engines and files say what they like.
fn clean(text: &str) -> String {
    text.chars().filter(|c| !c.is_control() || *c == '\n').collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_milliseconds_and_what_is_unknown_is_not_a_number() {
        assert_eq!(milliseconds(Some(1_234_567)), "1.23");
        assert_eq!(milliseconds(Some(98_765_432_100)), "98765.43");
        assert_eq!(milliseconds(None), "-");
    }

    #[test]
    fn a_terminal_is_not_commanded_by_an_engine() {
        assert_eq!(clean("a\x1b[2Jb\r\u{7}\nc"), "a[2Jb\nc");
    }
}
