//! The shell's part of the state file: what an earlier start saved is taken up, and what is to be saved
//! is encoded and written by a helper thread.

use std::io;
use std::path::PathBuf;

use super::Daemon;
use crate::orchestratord::core::Input;
use crate::orchestratord::saved::{FILE_NAME, Piece, Saved, Writer};
use crate::reactor::offload::Offload;
use crate::service::durable::{self, Replacement};
use crate::time::Now;

/// Encodes pieces, and writes them all with the last one.
pub(super) type Saver = Offload<Piece, Option<Result<(), String>>>;

/// Pieces that wait to be encoded: those of the largest fleet.
const PIECES_MAX: usize = 128;

impl Daemon {
    /// Takes up what an earlier start saved. What cannot be used is put aside and named, and so is a
    /// directory in which nothing can be kept.
    pub(super) fn restore(&mut self, now: Now) {
        if !self.config.cloud {
            return;
        }
        let path = self.config.state_dir.join(FILE_NAME);
        let directory = durable::check_private(&self.config.state_dir);
        let read = match durable::read(&path) {
            Ok(Some(bytes)) => Some(Saved::read(&bytes, &self.config.registry, now.wall)),
            Err(error) if directory.is_ok() => Some(Err(error.to_string())),
            // Nothing to read, or no place to read it from: told below.
            Ok(None) | Err(_) => None,
        };
        match read {
            None => {}
            Some(Ok(saved)) => {
                self.core.handle(Input::Restore(saved), now, &mut self.effects);
                self.tell_restored();
            }
            Some(Err(why)) => {
                let aside = match durable::set_aside(&path) {
                    Ok(aside) => format!("it is now {}", aside.display()),
                    Err(error) => format!("and it cannot be renamed: {error}"),
                };
                let text = format!("{}: {why}: starting without it, {aside}", path.display());
                self.core.handle(Input::StateTrouble(text), now, &mut self.effects);
            }
        }
        if let Err(error) = directory {
            let text = format!(
                "state directory {}: {error}: after a restart, nodes would get work only once they have been heard; set ORCHESTRATORD_STATE_DIR",
                self.config.state_dir.display()
            );
            self.core.handle(Input::StateTrouble(text), now, &mut self.effects);
        }
    }

    fn tell_restored(&self) {
        for node in self.core.registry().nodes().filter(|node| node.restored) {
            let replicas = self.core.registry().replicas_of(node).count();
            log::debug!("node {} restored: {replicas} replicas, awaiting its heartbeat", node.id);
        }
    }

    pub(super) fn save(&mut self, piece: Piece, now: Now) {
        let submitted = match &self.saver {
            Some(saver) => saver.submit(piece).map_err(|_| "earlier saves still hang".to_string()),
            None => self.start_saver().and_then(|saver| {
                let submitted = saver.submit(piece).map_err(|_| "its helper takes nothing".to_string());
                self.saver = Some(saver);
                submitted
            }),
        };
        if let Err(why) = submitted {
            self.core.handle(Input::Saved(Err(why)), now, &mut self.effects);
        }
    }

    pub(super) fn take_saved(&mut self, now: Now) {
        while let Some(result) = self.saver.as_ref().and_then(Offload::take) {
            if let Some(result) = result {
                self.core.handle(Input::Saved(result), now, &mut self.effects);
            }
        }
    }

    /// A control plane without nodes never saves anything, so the helper is started for the first save.
    fn start_saver(&self) -> Result<Saver, String> {
        let mut file = Keeping::new(self.config.state_dir.join(FILE_NAME));
        Offload::spawn("state", PIECES_MAX, self.waker.clone(), move |piece: Piece| file.take(&piece))
            .map_err(|error| format!("cannot start a helper thread: {error}"))
    }
}

/// The state file as it is being written.
struct Keeping {
    path: PathBuf,
    writer: Writer,
    /// `Err` from the first failure on, until the next one begins.
    under_way: Option<Result<Replacement, String>>,
}

impl Keeping {
    fn new(path: PathBuf) -> Keeping {
        Keeping { path, writer: Writer::default(), under_way: None }
    }

    /// Writes a piece. With the last one it says how all of it went.
    fn take(&mut self, piece: &Piece) -> Option<Result<(), String>> {
        let path = self.path.clone();
        let explain = |error: io::Error| format!("{}: {error}", path.display());
        let text = self.writer.text(piece);
        if piece.begins.is_some() {
            self.under_way = Some(Replacement::private(&self.path).map_err(explain));
        }
        if let Some(Ok(replacement)) = &mut self.under_way
            && let Err(error) = replacement.add(&text)
        {
            self.under_way = Some(Err(explain(error)));
        }
        if !piece.ends {
            return None;
        }
        let whole = self.under_way.take()?;
        Some(whole.and_then(|whole| whole.finish().map_err(explain)))
    }
}
