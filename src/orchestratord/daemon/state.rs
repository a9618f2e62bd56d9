//! The shell's part of the state file: what an earlier start saved is taken up, and what is to be saved
//! is encoded and written by a helper thread.

use std::path::Path;

use super::Daemon;
use crate::orchestratord::core::Input;
use crate::orchestratord::saved::{FILE_NAME, Piece, Saved, Writer};
use crate::reactor::offload::Offload;
use crate::service::durable;
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
        let path = self.config.state_dir.join(FILE_NAME);
        let mut writer = Writer::default();
        let work = move |piece: Piece| writer.add(&piece).map(|text| write(&path, &text));
        Offload::spawn("state", PIECES_MAX, self.waker.clone(), work)
            .map_err(|error| format!("cannot start a helper thread: {error}"))
    }
}

fn write(path: &Path, text: &[u8]) -> Result<(), String> {
    durable::replace_private(path, text).map_err(|error| format!("{}: {error}", path.display()))
}
