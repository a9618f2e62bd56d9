//! Probes as exchanges: how an order becomes a request, and an ending becomes an outcome.

use std::fs::File;
use std::io::Read;
use std::sync::Arc;

use crate::http::fields::FieldLines;
use crate::net::{self, FaultKind, Outbound, Patience, Sink};

use super::probing::{ProbeKind, ProbeOrder, ProbeOutcome};
use super::profile::Facts;

/// Largest answer to a probe, in bytes: lists of models are the longest.
const ANSWER_BYTES_MAX: usize = 1024 * 1024;
/// Largest key file, in bytes.
const KEY_BYTES_MAX: u64 = 8 * 1024;

/// The request that carries out an order.
#[must_use]
pub fn outbound(order: &ProbeOrder) -> Outbound<'static> {
    // The next probe comes long after an engine has closed an idle connection: none is kept.
    let mut fields = FieldLines::new().with("Accept", "application/json").with("Connection", "close");
    if let Some(Ok(key)) = order.auth_file.as_deref().map(read_key) {
        fields.push("Authorization", format!("Bearer {key}"));
    }
    if order.body.is_some() {
        fields.push("Content-Type", "application/json");
    }
    Outbound {
        to: order.url.clone(),
        method: if order.body.is_some() { "POST" } else { "GET" }.into(),
        target: order.path.clone().into(),
        fields,
        body: Arc::new(order.body.clone().unwrap_or_default().into_bytes()),
        sink: Sink::Collect { bytes_max: ANSWER_BYTES_MAX },
        patience: Patience {
            connect_ms: order.timeout_ms,
            first_byte_ms: order.timeout_ms,
            idle_ms: order.timeout_ms,
        },
        keep_ms: None,
    }
}

/// What an exchange's ending says about the engine.
#[must_use]
pub fn outcome(order: &ProbeOrder, ended: net::Outcome) -> ProbeOutcome {
    match ended {
        net::Outcome::Complete { status: 200, body } => match order.kind {
            ProbeKind::Health | ProbeKind::Canary => ProbeOutcome::Healthy,
            kind => ProbeOutcome::Facts(Facts::read(kind, &body)),
        },
        net::Outcome::Complete { status: status @ (401 | 403), .. } => {
            ProbeOutcome::Unauthorized { status, why: key_trouble(order.auth_file.as_deref()) }
        }
        net::Outcome::Complete { status: status @ 500..=599, .. } => ProbeOutcome::Loading(status),
        net::Outcome::Complete { status, .. } => ProbeOutcome::Unhealthy { status },
        net::Outcome::Failed(fault) => match fault.kind {
            FaultKind::Connect => ProbeOutcome::Refused(fault.reason),
            FaultKind::Local => ProbeOutcome::NotAsked(fault.reason),
            FaultKind::Unreached | FaultKind::Timeout | FaultKind::Aborted => ProbeOutcome::Slow,
            FaultKind::Reset | FaultKind::Protocol | FaultKind::Status(_) => {
                ProbeOutcome::Broken(fault.reason)
            }
        },
        net::Outcome::ClientGone | net::Outcome::Cancelled => ProbeOutcome::Slow,
    }
}

/// The engine's own API key: the first line of its file. Small local files are read on the loop: they
/// take microseconds, and the key may change between two requests.
///
/// # Errors
/// Why there is none, without any of the file's contents.
pub fn read_key(file: &str) -> Result<String, String> {
    let cannot = |error: std::io::Error| format!("the key file {file} cannot be read: {error}");
    // Without blocking: a FIFO of that name must not stop the loop.
    let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::NONBLOCK | rustix::fs::OFlags::CLOEXEC;
    let opened =
        rustix::fs::open(file, flags, rustix::fs::Mode::empty()).map_err(|error| cannot(error.into()))?;
    let opened = File::from(opened);
    let metadata = opened.metadata().map_err(cannot)?;
    if !metadata.is_file() {
        return Err(format!("the key file {file} is no plain file"));
    }
    let mut text = String::new();
    opened.take(KEY_BYTES_MAX + 1).read_to_string(&mut text).map_err(cannot)?;
    if text.len() as u64 > KEY_BYTES_MAX {
        return Err(format!("the key file {file} is larger than {KEY_BYTES_MAX} bytes"));
    }
    match text.lines().next().map(str::trim).filter(|key| !key.is_empty()) {
        Some(key) if key.bytes().all(|byte| byte.is_ascii_graphic()) => Ok(key.to_string()),
        Some(_) => Err(format!("the first line of the key file {file} holds characters that no key has")),
        None => Err(format!("the first line of the key file {file} is empty")),
    }
}

fn key_trouble(file: Option<&str>) -> String {
    match file.map(|file| (file, read_key(file))) {
        None => "it wants a key, and the handoff names no file with one (`auth.file`)".into(),
        Some((_, Err(why))) => why,
        Some((file, Ok(_))) => format!("it does not accept the key in {file}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn a_key_is_the_first_line_of_a_small_plain_file_and_never_part_of_an_error() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = |name: &str| directory.path().join(name).display().to_string();
        fs::write(path("good"), "  sk-secret \nsecond line\n").expect("written");
        assert_eq!(read_key(&path("good")), Ok("sk-secret".into()));
        fs::write(path("empty"), "\n").expect("written");
        fs::write(path("huge"), "sk-secret".repeat(1000)).expect("written");
        fs::write(path("odd"), "sk-secret\u{7}x\n").expect("written");
        fs::create_dir(path("directory")).expect("made");
        let fifo = rustix::fs::FileType::Fifo;
        rustix::fs::mknodat(rustix::fs::CWD, path("fifo"), fifo, rustix::fs::Mode::RUSR, 0).expect("a fifo");
        for (name, why) in [
            ("empty", "is empty"),
            ("huge", "larger than"),
            ("odd", "no key has"),
            ("directory", "no plain file"),
            ("fifo", "no plain file"),
            ("missing", "cannot be read"),
        ] {
            let error = read_key(&path(name)).expect_err(name);
            assert!(error.contains(why) && error.contains(name) && !error.contains("secret"), "{error}");
        }
    }
}
