//! Tables that fit a terminal: columns as wide as what is in them; where that is too wide, the columns that
//! matter least go, then long cells are cut. What must be read as a whole (a reason) is a note: it stands
//! below its row, in as many lines as it takes.

use super::terminal::{Screen, Tone, clean, wrapped};

/// Blanks between two columns.
const GAP: usize = 2;
/// Narrowest that a column is cut to, in characters.
const CELL_MIN: usize = 8;
/// Blanks before a note.
const INDENT: usize = 4;

/// A column: its heading, and whether it may go where the terminal is narrow: 0 never, then the highest
/// number first.
#[derive(Clone, Copy, Debug)]
pub(super) struct Column(pub(super) &'static str, pub(super) u8);

/// What stands in one place.
#[derive(Clone, Debug)]
pub(super) struct Cell {
    text: String,
    tone: Tone,
}

impl Cell {
    pub(super) fn new(tone: Tone, text: &str) -> Cell {
        Cell { text: clean(text), tone }
    }

    pub(super) fn plain(text: impl ToString) -> Cell {
        Cell::new(Tone::Plain, &text.to_string())
    }
}

/// A table; a row has a cell for each column.
#[derive(Debug)]
pub(super) struct Table {
    columns: &'static [Column],
    rows: Vec<(Vec<Cell>, Option<String>)>,
}

impl Table {
    pub(super) fn new(columns: &'static [Column]) -> Table {
        Table { columns, rows: Vec::new() }
    }

    pub(super) fn row(&mut self, cells: Vec<Cell>, note: Option<String>) {
        self.rows.push((cells, note.map(|note| clean(&note)).filter(|note| !note.is_empty())));
    }

    /// The table in lines, the last one ended; nothing where there is no row.
    pub(super) fn text(&self, screen: &Screen) -> String {
        if self.rows.is_empty() {
            return String::new();
        }
        let mut widths: Vec<usize> = self.columns.iter().map(|column| column.0.chars().count()).collect();
        for (cells, _) in &self.rows {
            for (width, cell) in widths.iter_mut().zip(cells) {
                *width = (*width).max(cell.text.chars().count());
            }
        }
        let shown = fit(&mut widths, self.columns, screen.width);
        let mut text = String::new();
        let headings: Vec<Cell> = self.columns.iter().map(|c| Cell::new(Tone::Faint, c.0)).collect();
        line(&mut text, screen, &headings, &widths, &shown);
        for (cells, note) in &self.rows {
            line(&mut text, screen, cells, &widths, &shown);
            for part in note.iter().flat_map(|note| wrapped(note, screen.width - INDENT)) {
                text.push_str(&format!("{:INDENT$}{}\n", "", screen.paint(Tone::Warning, &part)));
            }
        }
        text
    }
}

/// Decides which columns are shown, and narrows their widths.
fn fit(widths: &mut [usize], columns: &[Column], width: usize) -> Vec<usize> {
    let mut shown: Vec<usize> = (0..columns.len()).collect();
    let total = |shown: &[usize], widths: &[usize]| {
        shown.iter().map(|index| widths[*index]).sum::<usize>() + GAP * shown.len().saturating_sub(1)
    };
    while total(&shown, widths) > width {
        let least = shown.iter().copied().filter(|i| columns[*i].1 > 0).max_by_key(|i| columns[*i].1);
        match least {
            Some(least) => shown.retain(|index| *index != least),
            None => break,
        }
    }
    while total(&shown, widths) > width {
        let widest = shown.iter().copied().max_by_key(|index| widths[*index]);
        match widest.filter(|widest| widths[*widest] > CELL_MIN) {
            Some(widest) => widths[widest] -= 1,
            None => break,
        }
    }
    shown
}

fn line(text: &mut String, screen: &Screen, cells: &[Cell], widths: &[usize], shown: &[usize]) {
    let mut line = String::new();
    let mut blanks = 0;
    for index in shown {
        let cell = &cells[*index];
        let length = cell.text.chars().count();
        let cut: String = match length > widths[*index] {
            true => cell.text.chars().take(widths[*index] - 1).chain(['…']).collect(),
            false => cell.text.clone(),
        };
        line.push_str(&" ".repeat(blanks));
        line.push_str(&screen.paint(cell.tone, &cut));
        blanks = widths[*index] - length.min(widths[*index]) + GAP;
    }
    text.push_str(line.trim_end());
    text.push('\n');
}

#[cfg(test)]
mod tests {
    use super::*;

    const COLUMNS: &[Column] =
        &[Column("NAME", 0), Column("STATE", 0), Column("ENGINE", 1), Column("SINCE", 2)];

    fn screen(width: usize) -> Screen {
        Screen { is_terminal: false, coloured: false, width }
    }

    fn table() -> Table {
        let mut table = Table::new(COLUMNS);
        let row = |cells: [&str; 4]| cells.iter().map(Cell::plain).collect::<Vec<_>>();
        table.row(row(["gpu-1/pool-0/r0", "ready", "llamacpp", "3m"]), None);
        table.row(row(["gpu-2/a-pool/r1", "broken", "vllm", "2h"]), Some("its process has ended".into()));
        table
    }

    #[test]
    fn columns_stand_under_each_other_and_the_least_go_first() {
        assert_eq!(
            table().text(&screen(80)),
            "NAME             STATE   ENGINE    SINCE\n\
             gpu-1/pool-0/r0  ready   llamacpp  3m\n\
             gpu-2/a-pool/r1  broken  vllm      2h\n    its process has ended\n"
        );
        assert!(!table().text(&screen(38)).contains("SINCE"));
        assert!(!table().text(&screen(30)).contains("ENGINE"));
        let narrow = table().text(&screen(20));
        assert!(narrow.contains("gpu-1/pool-…") || narrow.contains("gpu-1/poo…"), "{narrow}");
        assert!(narrow.lines().all(|line| line.chars().count() <= 20), "{narrow}");
        assert!(narrow.contains("its process has\n    ended"), "{narrow}");
    }

    #[test]
    fn colours_change_no_widths() {
        let coloured = Screen { is_terminal: true, coloured: true, width: 80 };
        let plain: String = {
            let mut text = table().text(&coloured);
            while let Some(at) = text.find('\x1b') {
                let end = text[at..].find('m').expect("an end") + at;
                text.replace_range(at..=end, "");
            }
            text
        };
        assert_eq!(plain, table().text(&screen(80)));
    }
}
