//! A few rows on a terminal while engines start, one for each: who, since when, and a bar where the engine tells.
//!
//! The rows are drawn over themselves, below what was logged: a line of the log takes them away first, and they
//! come back below it. None is longer than the terminal is wide: a row that wraps could not be drawn over.

use std::io::{self, IsTerminal, Write, stderr};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::time::Mono;
use crate::wire::id::ReplicaKey;

/// Between two drawings, in milliseconds.
const DRAW_EVERY_MS: u64 = 200;
/// Rows at most, the last of which counts the engines that have none: the log above them stays in view.
const ROWS_MAX: usize = 8;
/// Columns where the terminal does not tell.
const COLUMNS: usize = 80;
/// Cells of a bar.
const BAR_CELLS: usize = 20;

/// Rows that are drawn now. Whoever writes to standard error holds it meanwhile.
static DRAWN: Mutex<usize> = Mutex::new(0);

fn drawn() -> MutexGuard<'static, usize> {
    DRAWN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Standard error for the log.
pub(super) struct AboveRows;

impl Write for AboveRows {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let mut drawn = drawn();
        match std::mem::take(&mut *drawn) {
            0 => stderr().write_all(line)?,
            rows => stderr().write_all(&[erase(rows).as_bytes(), line].concat())?,
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        stderr().flush()
    }
}

/// Standard error, if it is a terminal.
pub(super) struct Screen {
    is_terminal: bool,
    next: Option<Mono>,
}

impl Screen {
    pub(super) fn new() -> Screen {
        Screen { is_terminal: stderr().is_terminal(), next: None }
    }

    /// Whether there was a terminal, and it has been closed.
    pub(super) fn lost_its_terminal(&self) -> bool {
        self.is_terminal && !stderr().is_terminal()
    }

    /// When it wants to draw again.
    pub(super) fn deadline(&self) -> Option<Mono> {
        self.next
    }

    /// Shows what starts: name, milliseconds since then, share that is done.
    pub(super) fn show(&mut self, starting: impl Iterator<Item = (ReplicaKey, u64, Option<f64>)>, now: Mono) {
        if !self.is_terminal || self.next.is_some_and(|at| at > now) {
            return;
        }
        let all: Vec<_> = starting.collect();
        if all.is_empty() {
            return self.hide();
        }
        self.next = Some(now.plus_ms(DRAW_EVERY_MS));
        let columns = rustix::termios::tcgetwinsize(stderr()).map_or(0, |size| usize::from(size.ws_col));
        let rows = rows(&all, if columns == 0 { COLUMNS } else { columns });
        let mut drawn = drawn();
        let text = erase(*drawn) + &rows.join("\r\n");
        *drawn = rows.len();
        // Without a terminal any more there is nobody to see it.
        let _ = stderr().write_all(text.as_bytes());
    }

    /// Shows nothing until it is told to again.
    pub(super) fn hide(&mut self) {
        self.next = None;
        let mut drawn = drawn();
        match std::mem::take(&mut *drawn) {
            0 => {}
            rows => {
                let _ = stderr().write_all(erase(rows).as_bytes());
            }
        }
    }
}

/// Goes to the first of so many rows, and takes away what is from there on.
fn erase(drawn: usize) -> String {
    match drawn {
        0 | 1 => "\r\x1b[J".into(),
        _ => format!("\r\x1b[{}A\x1b[J", drawn - 1),
    }
}

fn rows(all: &[(ReplicaKey, u64, Option<f64>)], columns: usize) -> Vec<String> {
    let one = |(key, ms, share): &(ReplicaKey, u64, Option<f64>)| {
        let bar = share.map(|share| {
            let full = (share * BAR_CELLS as f64).round() as usize;
            let cells = "#".repeat(full) + &".".repeat(BAR_CELLS.saturating_sub(full));
            format!(" [{cells}] {:.0} %", share * 100.0)
        });
        format!("{key} starting {} s{}", ms / 1_000, bar.unwrap_or_default())
    };
    let shown = if all.len() > ROWS_MAX { ROWS_MAX - 1 } else { all.len() };
    let mut rows: Vec<String> = all.iter().take(shown).map(one).collect();
    if all.len() > shown {
        rows.push(format!("and {} more", all.len() - shown));
    }
    // The last column stays free: some terminals go on to the next row there.
    rows.iter().map(|row| row.chars().take(columns.saturating_sub(1)).collect()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::id::{PoolId, ReplicaId};

    #[test]
    fn a_row_names_state_seconds_and_the_share_where_there_is_one() {
        let key = |replica| ReplicaKey {
            pool: PoolId::new("p").expect("an id"),
            replica: ReplicaId::new(replica).expect("an id"),
        };
        let all = vec![(key("r0"), 12_300, Some(0.5)), (key("r1"), 900, None)];
        assert_eq!(rows(&all, 80), ["p/r0 starting 12 s [##########..........] 50 %", "p/r1 starting 0 s"]);
        assert_eq!(rows(&all, 12), ["p/r0 starti", "p/r1 starti"], "no row wraps");
        let many = rows(&vec![(key("r0"), 0, None); ROWS_MAX + 3], 80);
        assert_eq!((many.len(), many.last().map(String::as_str)), (ROWS_MAX, Some("and 4 more")));
        assert_eq!(rows(&vec![(key("r0"), 0, None); ROWS_MAX], 80).len(), ROWS_MAX);
    }
}
