//! Logs go to stderr, one line a change. Under systemd a priority prefix replaces the timestamp,
//! which the journal has anyway.

use std::env;
use std::io::Write;
use std::os::fd::AsFd;

use log::Level;

use crate::settings::Exit;

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
            writeln!(out, "<{priority}>{}", record.args())
        });
    } else {
        builder.format(|out, record| {
            writeln!(out, "{} {:5} {}", out.timestamp_millis(), record.level(), record.args())
        });
    }
    // A second logger in one process (tests, `up`) is no reason to fail.
    let _ = builder.try_init();
    Ok(())
}

/// `JOURNAL_STREAM` names device and inode of the stream that systemd connected; it is inherited, so
/// only a match says that it is ours.
fn stderr_is_journal() -> bool {
    let Ok(stream) = env::var("JOURNAL_STREAM") else { return false };
    let Ok(stat) = rustix::fs::fstat(std::io::stderr().as_fd()) else { return false };
    stream == format!("{}:{}", stat.st_dev, stat.st_ino)
}
