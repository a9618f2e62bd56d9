//! The dashboard, as the shell sees it: watchers are clients whose answer is a stream that does not end by
//! itself.

use crate::http::fields::FieldLines;
use crate::net::buffer::HIGH_WATER_BYTES;
use crate::orchestratord::dashboard::board::{About, To, WATCHERS_MAX};
use crate::orchestratord::dashboard::history::Sample;
use crate::orchestratord::refusal::Refusal;
use crate::reactor::token::Token;
use crate::time::Now;

use super::Daemon;

impl Daemon {
    pub(super) fn watch_board(&mut self, client: Token, now: Now) {
        if self.ends_by.is_some() {
            return self.net.respond(client, &Refusal::ShuttingDown.response(false), now.mono);
        }
        if !self.board.watch(client, &self.core, now.mono) {
            let text = format!("{WATCHERS_MAX} already watch; close a page that nobody looks at");
            return self.net.respond(client, &Refusal::Overloaded(text).response(false), now.mono);
        }
        let fields = FieldLines::new().with("Cache-Control", "no-cache").with("X-Accel-Buffering", "no");
        self.net.stream_begin(client, "text/event-stream", fields, now.mono);
    }

    /// A client has read what it was sent.
    pub(super) fn drained(&mut self, client: Token) {
        if !self.board.caught_up(client) {
            self.resume_task(client);
        }
    }

    /// Before anything is counted in a turn.
    pub(super) fn note_history(&mut self, now: Now) {
        let Daemon { history, core, net, .. } = self;
        history.turn(now, || sample(core, net));
    }

    /// Sends watchers what is due.
    pub(super) fn show_board(&mut self, now: Now) {
        if self.board.deadline().is_none_or(|at| at > now.mono) {
            return;
        }
        let about = About {
            cloud: self.config.cloud,
            started: self.started,
            history: &self.history,
            sample: sample(&self.core, &self.net),
        };
        for (to, bytes) in self.board.turn(&self.core, &about, now) {
            let watchers: Vec<Token> = match to {
                To::All => self.board.in_step().collect(),
                To::One(watcher) => vec![watcher],
            };
            for watcher in watchers {
                if self.net.stream_push(watcher, &bytes, now.mono) >= HIGH_WATER_BYTES {
                    self.board.is_behind(watcher);
                }
            }
        }
    }

    /// The process ends: nobody waits for the end of a stream that has none.
    pub(super) fn close_board(&mut self, now: Now) {
        let watchers: Vec<Token> = self.board.watchers().collect();
        for watcher in watchers {
            self.board.left(watcher);
            self.net.stream_end(watcher, now.mono);
        }
    }
}

fn sample(core: &super::Core, net: &crate::net::Net) -> Sample {
    let counts = core.counts();
    Sample {
        answered: counts.answered,
        refused: counts.refused.values().sum(),
        broken: counts.broken,
        pieces: net.token_gaps().count(),
        waiting: core.waiting() as u64,
        running: core.in_flight() as u64,
    }
}
