//! One line on a terminal while engines start: who, since when, and a bar where the engine tells.

use std::io::{IsTerminal, Write, stderr};

use crate::time::Mono;
use crate::wire::id::ReplicaKey;

/// Between two drawings, in milliseconds.
const DRAW_EVERY_MS: u64 = 200;
/// Engines that one line has room for; of more the number is shown.
const SHOWN_MAX: usize = 3;
/// Cells of a bar.
const BAR_CELLS: usize = 20;

/// Standard error, if it is a terminal.
pub(super) struct Screen {
    is_terminal: bool,
    is_drawn: bool,
    next: Option<Mono>,
}

impl Screen {
    pub(super) fn new() -> Screen {
        Screen { is_terminal: stderr().is_terminal(), is_drawn: false, next: None }
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
            self.next = None;
            return self.clear();
        }
        self.next = Some(now.plus_ms(DRAW_EVERY_MS));
        self.is_drawn = true;
        // Without a terminal any more there is nobody to see it.
        let _ = write!(stderr(), "\r\x1b[K{}", line(&all)).and_then(|()| stderr().flush());
    }

    /// Makes room for a line of the log.
    pub(super) fn clear(&mut self) {
        if std::mem::take(&mut self.is_drawn) {
            let _ = write!(stderr(), "\r\x1b[K").and_then(|()| stderr().flush());
        }
    }
}

fn line(all: &[(ReplicaKey, u64, Option<f64>)]) -> String {
    let one = |(key, ms, share): &(ReplicaKey, u64, Option<f64>)| {
        let bar = share.map(|share| {
            let full = (share * BAR_CELLS as f64).round() as usize;
            let cells = "#".repeat(full) + &".".repeat(BAR_CELLS.saturating_sub(full));
            format!(" [{cells}] {:.0} %", share * 100.0)
        });
        format!("{key} starting {} s{}", ms / 1_000, bar.unwrap_or_default())
    };
    let mut parts: Vec<String> = all.iter().take(SHOWN_MAX).map(one).collect();
    if all.len() > SHOWN_MAX {
        parts.push(format!("and {} more", all.len() - SHOWN_MAX));
    }
    parts.join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::id::{PoolId, ReplicaId};

    #[test]
    fn a_line_names_state_seconds_and_the_share_where_there_is_one() {
        let key = |replica| ReplicaKey {
            pool: PoolId::new("p").expect("an id"),
            replica: ReplicaId::new(replica).expect("an id"),
        };
        let all = vec![(key("r0"), 12_300, Some(0.5)), (key("r1"), 900, None)];
        assert_eq!(line(&all), "p/r0 starting 12 s [##########..........] 50 %; p/r1 starting 0 s");
        let many = vec![(key("r0"), 0, None); 5];
        assert!(line(&many).ends_with("and 2 more"));
    }
}
