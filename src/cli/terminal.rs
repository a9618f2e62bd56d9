//! What a terminal is: how wide, whether it shows colours, and how to draw on it without flicker.
//!
//! Texts of peers and files may hold anything, so they pass through [`clean`] before they are shown.
//! A reader that went away (`llorch status | head`) is no failure, so errors of writing end the program
//! quietly through [`Screen::write`].

use std::env;
use std::io::{self, IsTerminal, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::settings::Exit;

/// Width where neither a terminal nor `COLUMNS` tells one.
const WIDTH_DEFAULT: usize = 100;
/// Narrowest and widest that is believed.
const WIDTHS: std::ops::RangeInclusive<usize> = 20..=1_000;
/// How often a pause looks for a signal, in milliseconds.
const LOOK_MS: u64 = 25;

/// How something is to be felt about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tone {
    Plain,
    Good,
    Warning,
    Bad,
    Faint,
    Strong,
}

/// Standard output.
#[derive(Clone, Copy, Debug)]
pub(super) struct Screen {
    pub(super) is_terminal: bool,
    pub(super) coloured: bool,
    pub(super) width: usize,
}

impl Screen {
    pub(super) fn new() -> Screen {
        let is_terminal = io::stdout().is_terminal();
        let set = |name| env::var_os(name).is_some_and(|value| !value.is_empty());
        let is_dumb = env::var_os("TERM").is_some_and(|term| term == "dumb");
        Screen { is_terminal, coloured: is_terminal && !set("NO_COLOR") && !is_dumb, width: width() }
    }

    /// `text` in its tone.
    pub(super) fn paint(&self, tone: Tone, text: &str) -> String {
        let code = match tone {
            Tone::Plain => return text.to_string(),
            _ if !self.coloured => return text.to_string(),
            Tone::Good => "32",
            Tone::Warning => "33",
            Tone::Bad => "31",
            Tone::Faint => "2",
            Tone::Strong => "1",
        };
        format!("\x1b[{code}m{text}\x1b[0m")
    }

    /// Writes at once. `false` where nobody reads any more.
    pub(super) fn write(&self, text: &str) -> bool {
        let mut out = io::stdout().lock();
        out.write_all(text.as_bytes()).and_then(|()| out.flush()).is_ok()
    }
}

/// How wide the terminal is now; `COLUMNS` where there is none.
fn width() -> usize {
    let told = env::var("COLUMNS").ok().and_then(|columns| columns.trim().parse().ok());
    let real = rustix::termios::tcgetwinsize(io::stdout()).ok().map(|size| usize::from(size.ws_col));
    let width = real.filter(|columns| *columns > 0).or(told).unwrap_or(WIDTH_DEFAULT);
    width.clamp(*WIDTHS.start(), *WIDTHS.end())
}

/// Without what could command a terminal.
pub(super) fn clean(text: &str) -> String {
    text.chars().map(|c| if is_command(c) { '\u{fffd}' } else { c }).collect()
}

fn is_command(c: char) -> bool {
    c.is_control() || matches!(c, '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// `text` in lines of at most `width` characters, broken between words where there are any.
pub(super) fn wrapped(text: &str, width: usize) -> Vec<String> {
    let (mut lines, mut line, mut length) = (Vec::new(), String::new(), 0);
    for word in text.split(' ').filter(|word| !word.is_empty()) {
        let mut rest: Vec<char> = word.chars().collect();
        if length > 0 && length + 1 + rest.len() > width {
            lines.push(std::mem::take(&mut line));
            length = 0;
        }
        if length > 0 {
            line.push(' ');
            length += 1;
        }
        while length + rest.len() > width.max(1) {
            let cut = width.max(1) - length;
            line.extend(rest.drain(..cut));
            lines.push(std::mem::take(&mut line));
            length = 0;
        }
        length += rest.len();
        line.extend(rest);
    }
    if !line.is_empty() {
        lines.push(line);
    }
    lines
}

/// Notices SIGINT and SIGTERM from now on, instead of ending by them.
#[derive(Clone, Debug)]
pub(super) struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    pub(super) fn watch() -> Result<Interrupt, Exit> {
        let flag = Arc::new(AtomicBool::new(false));
        for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
            signal_hook::flag::register(signal, Arc::clone(&flag))
                .map_err(|error| Exit::runtime(format!("cannot listen for signals: {error}")))?;
        }
        Ok(Interrupt(flag))
    }

    pub(super) fn came(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// Waits, unless it comes. Whether it came.
    pub(super) fn pause(&self, ms: u64) -> bool {
        let begun = Instant::now();
        let pause = Duration::from_millis(ms);
        while !self.came() && begun.elapsed() < pause {
            thread::sleep(Duration::from_millis(LOOK_MS).min(pause.saturating_sub(begun.elapsed())));
        }
        self.came()
    }
}

/// A picture that is drawn again and again. A terminal shows it on a page of its own, each picture over the
/// last in one write, and gets its own page back when this is dropped.
#[derive(Debug)]
pub(super) struct Picture {
    screen: Screen,
}

impl Picture {
    pub(super) fn begin(screen: Screen) -> Picture {
        if screen.is_terminal {
            // The other page, without wrapping and without a cursor.
            screen.write("\x1b[?1049h\x1b[?7l\x1b[?25l");
        }
        Picture { screen }
    }

    /// Draws. `false` where nobody looks any more.
    pub(super) fn draw(&self, text: &str) -> bool {
        if !self.screen.is_terminal {
            return self.screen.write(&format!("{text}\n"));
        }
        let rows = rustix::termios::tcgetwinsize(io::stdout()).map_or(0, |size| usize::from(size.ws_row));
        let rows = if rows == 0 { usize::MAX } else { rows };
        // To the corner; the rest of each line and of the page is cleared behind what is new.
        let mut frame = String::from("\x1b[H");
        for (row, line) in text.lines().take(rows).enumerate() {
            if row > 0 {
                frame.push_str("\r\n");
            }
            frame.push_str(line);
            frame.push_str("\x1b[K");
        }
        frame.push_str("\x1b[J");
        self.screen.write(&frame)
    }
}

impl Drop for Picture {
    fn drop(&mut self) {
        if self.screen.is_terminal {
            self.screen.write("\x1b[?25h\x1b[?7h\x1b[?1049l");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_peers_say_commands_no_terminal() {
        assert_eq!(clean("a\x1b[2J\nb\u{9b}\u{202e}é"), "a\u{fffd}[2J\u{fffd}b\u{fffd}\u{fffd}é");
    }

    #[test]
    fn lines_are_broken_between_words_and_long_words_anywhere() {
        assert_eq!(wrapped("one two  three", 7), ["one two", "three"]);
        assert_eq!(wrapped("a abcdefghij b", 4), ["a", "abcd", "efgh", "ij b"]);
        assert_eq!(wrapped("", 4), Vec::<String>::new());
    }

    proptest::proptest! {
        #[test]
        fn no_line_is_too_wide_and_no_word_is_lost(text in "[a-zé ]{0,200}", width in 1usize..30) {
            let lines = wrapped(&text, width);
            proptest::prop_assert!(lines.iter().all(|line| (1..=width).contains(&line.chars().count())), "{lines:?}");
            let letters = |text: &str| text.chars().filter(|c| *c != ' ').collect::<String>();
            proptest::prop_assert_eq!(letters(&lines.concat()), letters(&text));
        }
    }
}
