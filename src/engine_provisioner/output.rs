//! What an engine prints: the file that takes it, and its last lines where they explain a failure.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::publish::create_directory;
use crate::settings::Exit;

/// Lines of the engine's output that an error shows: a stack trace's end and the message before it.
const LOG_TAIL_LINES: usize = 20;
/// Bytes of the engine's output that are searched for those lines.
const LOG_TAIL_BYTES: u64 = 16 * 1024;
/// Longest line shown of them, in characters.
const LOG_LINE_CHARS_MAX: usize = 300;
/// Size from which a log file is set aside (as `.1`, one generation) when the next engine starts, in
/// bytes.
const LOG_FILE_BYTES_MAX: u64 = 64 * 1024 * 1024;

/// The file that takes the engine's output, and where this run's part of it begins.
pub(super) struct EngineLog {
    pub(super) path: PathBuf,
    pub(super) file: File,
    start: u64,
}

impl EngineLog {
    pub(super) fn open(path: &Path) -> Result<EngineLog, Exit> {
        if let Some(parent) = path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
            create_directory(parent)?;
        }
        let failed = |e: io::Error| Exit::runtime(format!("cannot open log file {}: {e}", path.display()));
        if fs::metadata(path).is_ok_and(|meta| meta.is_file() && meta.len() > LOG_FILE_BYTES_MAX) {
            let mut aside = path.as_os_str().to_os_string();
            aside.push(".1");
            fs::rename(path, aside).map_err(failed)?;
        }
        let file =
            OpenOptions::new().append(true).read(true).create(true).mode(0o640).open(path).map_err(failed)?;
        let start = file.metadata().map_err(failed)?.len();
        Ok(EngineLog { path: path.to_path_buf(), file, start })
    }

    /// What failed, with the last lines that this run's engine printed.
    pub(super) fn explain(&self, message: &str) -> String {
        let lines = self.tail().unwrap_or_default();
        if lines.is_empty() {
            return format!("{message} (it printed nothing)");
        }
        let mut text = format!("{message}; the end of {}:", self.path.display());
        for line in lines {
            text.push_str("\n  ");
            text.push_str(&line);
        }
        text
    }

    fn tail(&self) -> io::Result<Vec<String>> {
        let mut file = &self.file;
        let from = self.start.max(file.metadata()?.len().saturating_sub(LOG_TAIL_BYTES));
        file.seek(SeekFrom::Start(from))?;
        let mut bytes = Vec::new();
        file.take(LOG_TAIL_BYTES).read_to_end(&mut bytes)?;
        Ok(last_lines(&String::from_utf8_lossy(&bytes)))
    }
}

/// The last lines of `text` as they may be shown on a terminal: no control characters, no blank lines.
fn last_lines(text: &str) -> Vec<String> {
    let shown = |line: &str| -> String {
        line.chars()
            .filter(|c| !c.is_control())
            .take(LOG_LINE_CHARS_MAX)
            .collect::<String>()
            .trim_end()
            .into()
    };
    let lines: Vec<String> = text.lines().map(shown).filter(|line| !line.is_empty()).collect();
    lines[lines.len().saturating_sub(LOG_TAIL_LINES)..].to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shown_log_ends_with_the_last_words_and_moves_no_cursor() {
        let text: String = (0..100).map(|n| format!("line {n}\n\n")).collect();
        let lines = last_lines(&(text + "\u{1b}[31mout of memory\u{1b}[0m\r\n"));
        assert_eq!(lines.len(), LOG_TAIL_LINES);
        assert_eq!(lines.last().map(String::as_str), Some("[31mout of memory[0m"));
        assert!(last_lines(&"x".repeat(10_000))[0].len() <= LOG_LINE_CHARS_MAX);
    }
}
