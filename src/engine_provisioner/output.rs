//! What an engine prints: the file that takes it, and its last lines where they explain a failure.
//!
//! An engine writes into its file itself, for months. So a file that has grown to its limit is copied aside and
//! begins anew while the engine goes on writing: it only ever appends, wherever the end is by then.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;

use super::publish::create_directory;
use crate::settings::Exit;
use crate::time::Mono;

/// Lines of the engine's output that an error shows: a stack trace's end and the message before it.
const LOG_TAIL_LINES: usize = 20;
/// Bytes of the engine's output that are searched for those lines.
const LOG_TAIL_BYTES: u64 = 16 * 1024;
/// Longest line shown of them, in characters.
const LOG_LINE_CHARS_MAX: usize = 300;
/// Size from which a log file is set aside (as `.1`, one generation), in bytes: days of an engine that tells of
/// every request.
const LOG_FILE_BYTES_MAX: u64 = 64 * 1024 * 1024;
/// Between two looks at the sizes of logs, in milliseconds: what an engine prints meanwhile is beyond the limit.
const LOOK_EVERY_MS: u64 = 10_000;
/// Copies at most of what came during the copy before: one that never catches up would never empty the file.
const CATCH_UPS_MAX: usize = 8;

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
            fs::rename(path, aside(path)).map_err(failed)?;
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
        let length = file.metadata()?.len();
        // A file that is shorter than it was at the start has begun anew since.
        let start = if length < self.start { 0 } else { self.start };
        let from = start.max(length.saturating_sub(LOG_TAIL_BYTES));
        file.seek(SeekFrom::Start(from))?;
        let mut bytes = Vec::new();
        file.take(LOG_TAIL_BYTES).read_to_end(&mut bytes)?;
        Ok(last_lines(&String::from_utf8_lossy(&bytes)))
    }
}

/// The logs that are being set aside, each by a thread: disks are slow, and an engine may end meanwhile.
#[derive(Debug, Default)]
pub(super) struct Rotations {
    under_way: BTreeMap<PathBuf, JoinHandle<()>>,
    next: Option<Mono>,
}

impl Rotations {
    /// When it wants to look again.
    pub(super) fn deadline(&self) -> Option<Mono> {
        self.next
    }

    /// Looks at the sizes of what engines write now, where it is time to.
    pub(super) fn look<'a>(&mut self, logs: impl Iterator<Item = &'a mut EngineLog>, now: Mono) {
        if self.next.is_some_and(|at| at > now) {
            return;
        }
        self.under_way.retain(|_, thread| !thread.is_finished());
        self.next = None;
        for log in logs {
            self.next = Some(now.plus_ms(LOOK_EVERY_MS));
            let is_full =
                log.file.metadata().is_ok_and(|meta| meta.is_file() && meta.len() > LOG_FILE_BYTES_MAX);
            if !is_full || self.under_way.contains_key(&log.path) {
                continue;
            }
            log.start = 0;
            let path = log.path.clone();
            let set_aside = move || match begin_anew(&path) {
                Ok(()) => {
                    log::info!("{} was full: what it held is in {}", path.display(), aside(&path).display())
                }
                Err(error) => log::warn!("{} cannot be set aside: {error}", path.display()),
            };
            match std::thread::Builder::new().name("rotate".into()).spawn(set_aside) {
                Ok(thread) => {
                    self.under_way.insert(log.path.clone(), thread);
                }
                Err(error) => log::warn!("cannot start a thread: {error}"),
            }
        }
    }
}

/// Where the one generation before this goes.
fn aside(path: &Path) -> PathBuf {
    let mut aside = path.as_os_str().to_os_string();
    aside.push(".1");
    aside.into()
}

/// Copies a file aside, and empties it. What is written between the last look and the emptying is lost: an engine
/// that writes line by line loses a line at most.
fn begin_anew(path: &Path) -> io::Result<()> {
    let mut from = OpenOptions::new().read(true).write(true).open(path)?;
    let new = path.with_extension("new");
    let copy = |from: &mut File| -> io::Result<()> {
        let mut to = OpenOptions::new().write(true).create(true).truncate(true).mode(0o640).open(&new)?;
        for _ in 0..CATCH_UPS_MAX {
            if io::copy(from, &mut to)? == 0 {
                break;
            }
        }
        fs::rename(&new, aside(path))
    };
    let copied = copy(&mut from);
    if copied.is_err() {
        let _ = fs::remove_file(&new);
    }
    // Also where there is no room for a copy: the disk is what counts.
    from.set_len(0)?;
    copied
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
    use std::io::Write;

    #[test]
    fn a_file_begins_anew_under_whoever_writes_it_and_nothing_is_lost() {
        let root = tempfile::tempdir().expect("a directory");
        let path = root.path().join("logs/p-r0.log");
        let mut log = EngineLog::open(&path).expect("opened");
        let mut engine = log.file.try_clone().expect("as an engine has it");
        engine.write_all(b"before\n").expect("written");
        let mut rotations = Rotations::default();
        rotations.look([&mut log].into_iter(), Mono(0));
        assert!(rotations.under_way.is_empty(), "it is small");
        engine.set_len(LOG_FILE_BYTES_MAX + 1).expect("a sparse file");
        engine.write_all(b"the last\n").expect("written");
        rotations.look([&mut log].into_iter(), Mono(0).plus_ms(LOOK_EVERY_MS - 1));
        assert!(rotations.under_way.is_empty(), "it is not time yet");
        rotations.look([&mut log].into_iter(), Mono(0).plus_ms(LOOK_EVERY_MS));
        let thread = rotations.under_way.remove(&path).expect("it is set aside");
        thread.join().expect("no panic");
        engine.write_all(b"after\n").expect("written");
        assert_eq!(fs::read(&path).expect("there"), b"after\n", "appended, wherever the end is");
        let before = fs::read(aside(&path)).expect("there");
        assert!(before.starts_with(b"before\n") && before.ends_with(b"\0the last\n"));
        assert!(log.explain("it failed").ends_with("\n  after"), "{}", log.explain("it failed"));
        assert_eq!(fs::read_dir(root.path().join("logs")).expect("listed").count(), 2);
        rotations.look([].into_iter(), Mono(u64::MAX / 2));
        assert_eq!(rotations.deadline(), None, "nobody writes, nobody looks");
    }

    #[test]
    fn a_shown_log_ends_with_the_last_words_and_moves_no_cursor() {
        let text: String = (0..100).map(|n| format!("line {n}\n\n")).collect();
        let lines = last_lines(&(text + "\u{1b}[31mout of memory\u{1b}[0m\r\n"));
        assert_eq!(lines.len(), LOG_TAIL_LINES);
        assert_eq!(lines.last().map(String::as_str), Some("[31mout of memory[0m"));
        assert!(last_lines(&"x".repeat(10_000))[0].len() <= LOG_LINE_CHARS_MAX);
    }
}
