//! How it goes, and how that is shown: a bar on a terminal, lines in a log.

use std::io::IsTerminal;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::error::size;

/// How often a log hears of a download, at most.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// What happens while a model is made ready.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Progress<'a> {
    /// Another process fetches the same file; this one waits for it.
    Waiting {
        /// The file.
        name: &'a str,
    },
    /// Bytes are about to come.
    Started {
        /// The file.
        name: &'a str,
        /// Its length, where that is known.
        total_bytes: Option<u64>,
        /// What an earlier attempt left.
        kept_bytes: u64,
    },
    /// So much is there.
    Bytes {
        /// What is there.
        done_bytes: u64,
        /// The whole, where that is known.
        total_bytes: Option<u64>,
    },
    /// Something failed and is tried again.
    Retrying {
        /// What failed.
        why: &'a str,
        /// When it is tried again.
        pause: Duration,
    },
    /// Something worth a line.
    Note(&'a str),
    /// A file is there, checked and named.
    Finished {
        /// The file.
        name: &'a str,
        /// Its length.
        bytes: u64,
    },
}

/// Shows [`Progress`] to whoever started this program.
pub struct Display {
    bar: Option<ProgressBar>,
    name: String,
    started: Instant,
    kept_bytes: u64,
    line: Instant,
}

/// All bars of this program, one below the other: several models may be fetched at once.
fn bars() -> &'static MultiProgress {
    static BARS: OnceLock<MultiProgress> = OnceLock::new();
    BARS.get_or_init(|| MultiProgress::with_draw_target(ProgressDrawTarget::stderr_with_hz(10)))
}

impl Drop for Display {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
            bars().remove(bar);
        }
    }
}

impl Default for Display {
    fn default() -> Display {
        Display::new()
    }
}

impl Display {
    /// A bar where standard error is a terminal, log lines elsewhere.
    #[must_use]
    pub fn new() -> Display {
        let now = Instant::now();
        let bar =
            std::io::stderr().is_terminal().then(|| bars().add(ProgressBar::new(0)).with_style(style(false)));
        Display { bar, name: String::new(), started: now, kept_bytes: 0, line: now }
    }

    /// Shows it.
    pub fn show(&mut self, progress: Progress<'_>) {
        match progress {
            Progress::Started { name, total_bytes, kept_bytes } => {
                self.name = name.to_string();
                self.started = Instant::now();
                self.line = self.started;
                self.kept_bytes = kept_bytes;
                match &self.bar {
                    Some(bar) => {
                        bar.reset();
                        bar.set_style(style(total_bytes.is_some()));
                        bar.set_message(short(name));
                        bar.set_length(total_bytes.unwrap_or(0));
                        bar.set_position(kept_bytes);
                        bar.reset_eta();
                    }
                    None => {
                        let total = total_bytes.map_or("unknown size".into(), size);
                        match kept_bytes {
                            0 => log::info!("{name}: fetching {total}"),
                            kept => log::info!("{name}: fetching {total}, of which {} are there", size(kept)),
                        }
                    }
                }
            }
            Progress::Bytes { done_bytes, total_bytes } => match &self.bar {
                Some(bar) => bar.set_position(done_bytes),
                None if self.line.elapsed() >= LINE_EVERY => {
                    self.line = Instant::now();
                    log::info!(
                        "{}: {}{}",
                        self.name,
                        self.so_far(done_bytes),
                        portion(done_bytes, total_bytes)
                    );
                }
                None => {}
            },
            Progress::Waiting { name } => self.line(&format!("{name}: another process fetches it: waiting")),
            Progress::Retrying { why, pause } => {
                self.line(&format!("{}: {why}: again in {:.1} s", self.name, pause.as_secs_f64()));
            }
            Progress::Note(text) if self.name.is_empty() => self.line(text),
            Progress::Note(text) => self.line(&format!("{}: {text}", self.name)),
            Progress::Finished { name, bytes } => {
                let told = format!("{name}: {}", self.so_far(bytes));
                match &self.bar {
                    Some(bar) => {
                        bar.finish_and_clear();
                        bar.println(told);
                    }
                    None => log::info!("{told}"),
                }
            }
        }
    }

    fn so_far(&self, done_bytes: u64) -> String {
        let seconds = self.started.elapsed().as_secs_f64().max(0.001);
        let rate = Duration::from_secs_f64(seconds).as_millis().max(1);
        let rate = u128::from(done_bytes.saturating_sub(self.kept_bytes)) * 1000 / rate;
        format!(
            "{} in {seconds:.1} s ({}/s)",
            size(done_bytes),
            size(u64::try_from(rate).unwrap_or(u64::MAX))
        )
    }

    fn line(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.println(text),
            None => log::info!("{text}"),
        }
    }
}

fn portion(done: u64, total: Option<u64>) -> String {
    match total {
        Some(total) if total > 0 => {
            format!(" of {}, {} %", size(total), u128::from(done) * 100 / u128::from(total))
        }
        _ => String::new(),
    }
}

/// The end of a name, which is what tells files apart.
fn short(name: &str) -> String {
    let name = name.rsplit('/').next().unwrap_or(name);
    name.chars().take(40).collect()
}

fn style(total_known: bool) -> ProgressStyle {
    let template = if total_known {
        "{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}"
    } else {
        "{msg} {spinner} {bytes} {bytes_per_sec}"
    };
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}
