//! What is shown to those who watch, and when. Pure: the core and the time in, pieces of event streams out.
//!
//! ```text
//!   a watcher comes ──▶ `begin`: who this is, the last minutes, the last events
//!                       `nodes` ...: every node, a slice at a time, then `whole`
//!   every second    ──▶ `now`: sums, queue, the present bin
//!   a pass          ──▶ `nodes`: rows that are not what they were; `gone`
//!   something happened ▶ `news`, and the rows of its node, in the same turn
//! ```
//!
//! One pass over the registry serves all watchers: a hash of each row says whether it was shown already. No
//! turn looks at more than a slice, slices keep a distance, and a pass that had much to say is followed by a
//! longer pause. Nothing is kept for a watcher but where it stands: one that does not read as fast is left
//! out until it has read what it was sent, and then begins anew. While nobody watches, nothing happens here.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash, Hasher};

use serde::Serialize;

use crate::service::events::Happening;
use crate::time::{Mono, Now, earliest};
use crate::wire::id::NodeId;

use super::super::admission::Priority;
use super::super::core::Core;
use super::super::service_registry::Node;
use super::history::{BIN_MS, History, Sample};
use super::rows::{NodeRow, Sums};

/// Watchers at once: an operator's screens, not the public.
pub const WATCHERS_MAX: usize = 32;
/// From one `now` to the next, in milliseconds.
pub const FRAME_MS: u64 = 1_000;
/// A slice ends behind the node with which it has looked at so many replicas: about a millisecond's work.
const SLICE_REPLICAS_MAX: usize = 500;
/// Nodes of a slice, most of which may have no replicas.
const SLICE_NODES_MAX: usize = 500;
/// A slice ends behind the row with which it has so many bytes.
const SLICE_BYTES_MAX: usize = 48 * 1024;
/// Distance of two slices, in milliseconds: a twentieth of the loop's time at most.
const SLICE_MS: u64 = 20;
/// Distance of two pushes of what has just happened, in milliseconds: a storm of changes is not a storm of
/// frames. The first change waits for nothing.
const PUSH_MS: u64 = 50;
/// Nodes of which something has just happened; with more, the next pass finds them.
const HAPPENED_MAX: usize = 64;
/// Bytes for which a pass is followed by a millisecond of pause: 256 KB a second to each watcher.
const BYTES_PER_MS: u64 = 256;
/// Events that a watcher is told at first, and at most at once.
const NEWS_MAX: usize = 50;
/// Agents with trouble that are shown.
const AGENTS_MAX: usize = 50;

/// What the board does not find in the core.
#[derive(Clone, Copy, Debug)]
pub struct About<'a> {
    /// Whether nodes register, rather than this machine being the only one.
    pub cloud: bool,
    /// When this process started, in seconds since the Unix epoch.
    pub started: u64,
    /// The last minutes.
    pub history: &'a History,
    /// What is counted now.
    pub sample: Sample,
}

/// Whom a piece is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum To<W> {
    /// Everybody who keeps up.
    All,
    /// One watcher.
    One(W),
}

/// A watcher's place.
#[derive(Debug, Default)]
struct Watcher {
    /// It was told how things stand: then it is shown changes.
    has_begun: bool,
    /// Nodes up to this one have been shown to it; `None` before the first.
    shown: Option<NodeId>,
    /// It has been shown all of them once.
    is_whole: bool,
    /// It was sent more than it has read.
    is_behind: bool,
    /// Others were told something meanwhile.
    has_missed: bool,
}

/// A walk over all nodes, a slice at a time.
#[derive(Debug, Default)]
struct Pass {
    after: Option<NodeId>,
    sums: Sums,
    by_status: BTreeMap<&'static str, u64>,
    bytes: u64,
}

/// The board; `W` is what its owner knows watchers by. See the introduction of this file.
#[derive(Debug)]
pub struct Board<W> {
    watchers: BTreeMap<W, Watcher>,
    /// What was last shown of each node, and the pass that last saw it.
    rows: BTreeMap<NodeId, (u64, u64)>,
    pass: Option<Pass>,
    passes: u64,
    pass_at: Mono,
    slice_at: Mono,
    now_at: Mono,
    push_at: Mono,
    /// Nodes of which something has just happened.
    happened: BTreeSet<NodeId>,
    has_news: bool,
    next_event: u64,
    sums: Sums,
    by_status: BTreeMap<&'static str, u64>,
}

impl<W> Default for Board<W> {
    fn default() -> Self {
        Board {
            watchers: BTreeMap::new(),
            rows: BTreeMap::new(),
            pass: None,
            passes: 0,
            pass_at: Mono::default(),
            slice_at: Mono::default(),
            now_at: Mono::default(),
            push_at: Mono::default(),
            happened: BTreeSet::new(),
            has_news: false,
            next_event: 0,
            sums: Sums::default(),
            by_status: BTreeMap::new(),
        }
    }
}

#[derive(Serialize)]
struct News<'a> {
    seq: u64,
    at_ms: u64,
    kind: &'a str,
    subject: &'a str,
    state: &'a str,
    text: &'a str,
    is_warning: bool,
}

impl<W: Copy + Ord> Board<W> {
    /// Lets somebody watch; `false` if too many do.
    #[must_use]
    pub fn watch(&mut self, watcher: W, core: &Core, now: Mono) -> bool {
        if self.watchers.len() >= WATCHERS_MAX {
            return false;
        }
        if self.watchers.is_empty() {
            // What was known before is as old as the last watcher.
            let next_event = core.events().next_seq();
            *self = Board { pass_at: now, slice_at: now, now_at: now, next_event, ..Board::default() };
        }
        self.watchers.insert(watcher, Watcher::default());
        true
    }

    /// A watcher has left. Returns whether it was one.
    pub fn left(&mut self, watcher: W) -> bool {
        self.watchers.remove(&watcher).is_some()
    }

    /// A watcher was sent more than it has read: nothing more until [`Board::caught_up`].
    pub fn is_behind(&mut self, watcher: W) {
        if let Some(known) = self.watchers.get_mut(&watcher) {
            known.is_behind = true;
        }
    }

    /// A watcher has read what it was sent. If it has missed something it begins anew, once it has been shown
    /// every node: so it comes to an end, however slow it is. Returns whether it is a watcher.
    pub fn caught_up(&mut self, watcher: W) -> bool {
        let Some(known) = self.watchers.get_mut(&watcher) else { return false };
        known.is_behind = false;
        if known.is_whole && known.has_missed {
            *known = Watcher::default();
        }
        true
    }

    /// Those who watch.
    pub fn watchers(&self) -> impl Iterator<Item = W> + '_ {
        self.watchers.keys().copied()
    }

    /// Those who watch and keep up.
    pub fn in_step(&self) -> impl Iterator<Item = W> + '_ {
        let in_step = |known: &Watcher| known.has_begun && !known.is_behind;
        self.watchers.iter().filter(move |(_, known)| in_step(known)).map(|(watcher, _)| *watcher)
    }

    /// Something happened that people are told of.
    pub fn happened(&mut self, what: &Happening) {
        if self.watchers.is_empty() {
            return;
        }
        self.has_news = true;
        // `gpu-1/pool-0/r0`, or the node's name alone.
        let name = what.subject.split('/').next().unwrap_or_default();
        if matches!(what.kind, "node" | "replica")
            && self.happened.len() < HAPPENED_MAX
            && let Ok(node) = NodeId::new(name)
        {
            self.happened.insert(node);
        }
    }

    /// When [`Board::turn`] is wanted next.
    #[must_use]
    pub fn deadline(&self) -> Option<Mono> {
        if self.watchers.is_empty() {
            return None;
        }
        let mut at = Some(self.now_at);
        let is_walking = self.watchers.values().any(|known| !known.is_behind && !known.is_whole);
        if self.pass.is_some() || is_walking {
            at = earliest(at, Some(self.slice_at));
        } else {
            at = earliest(at, Some(self.pass_at.max(self.slice_at)));
        }
        if self.has_news || !self.happened.is_empty() {
            at = earliest(at, Some(self.push_at));
        }
        at
    }

    /// What is due, in its order. No turn makes more than one slice of a pass, one of a newcomer's walk, and
    /// the rows of those of whom something has just happened.
    pub fn turn(&mut self, core: &Core, about: &About<'_>, now: Now) -> Vec<(To<W>, Vec<u8>)> {
        let mut out = Vec::new();
        if self.watchers.is_empty() {
            return out;
        }
        self.begin(core, about, &mut out);
        if (self.has_news || !self.happened.is_empty()) && now.mono >= self.push_at {
            self.push_at = now.mono.plus_ms(PUSH_MS);
            self.tell_what_happened(core, &mut out);
            self.pass_at = self.pass_at.min(now.mono);
        }
        if now.mono >= self.slice_at {
            let has_worked = self.walk_one(core, &mut out);
            if self.pass.is_none() && now.mono >= self.pass_at {
                self.pass = Some(Pass::default());
                self.pass_at = now.mono.plus_ms(FRAME_MS);
            }
            let has_passed = self.pass_slice(core, now.mono, &mut out);
            if has_worked || has_passed {
                self.slice_at = now.mono.plus_ms(SLICE_MS);
            }
        }
        if now.mono >= self.now_at {
            self.now_at = now.mono.plus_ms(FRAME_MS);
            out.push((To::All, self.now(core, about, now)));
        }
        if out.iter().any(|(to, _)| *to == To::All) {
            self.watchers
                .values_mut()
                .filter(|known| known.is_behind)
                .for_each(|known| known.has_missed = true);
        }
        out
    }

    /// Tells newcomers who this is and what has been.
    fn begin(&mut self, core: &Core, about: &About<'_>, out: &mut Vec<(To<W>, Vec<u8>)>) {
        for (watcher, known) in self.watchers.iter_mut().filter(|(_, w)| !w.has_begun && !w.is_behind) {
            known.has_begun = true;
            self.now_at = Mono::default();
            let news = news(core, core.events().next_seq().saturating_sub(NEWS_MAX as u64));
            let begin = serde_json::json!({
                "version": env!("CARGO_PKG_VERSION"),
                "profile": if about.cloud { "CLOUD" } else { "HOME" },
                "started_ms": about.started * 1000,
                "bin_ms": BIN_MS,
                "bins": about.history.bins(&about.sample),
                "news": news,
            });
            out.push((To::One(*watcher), event("begin", &begin)));
        }
    }

    fn tell_what_happened(&mut self, core: &Core, out: &mut Vec<(To<W>, Vec<u8>)>) {
        if std::mem::take(&mut self.has_news) {
            let news = news(core, self.next_event);
            self.next_event = core.events().next_seq();
            if news.as_array().is_some_and(|list| !list.is_empty()) {
                out.push((To::All, event("news", &news)));
            }
        }
        let (mut rows, mut gone) = (Rows::default(), Vec::new());
        // What does not fit into one frame, the next pass finds.
        for id in std::mem::take(&mut self.happened) {
            match core.registry().node(&id) {
                Some(node) if rows.has_room() => self.show_if_new(core, node, &mut rows),
                Some(_) => {}
                None => gone.extend(self.rows.remove(&id).map(|_| id)),
            }
        }
        out.extend(rows.finish().map(|bytes| (To::All, bytes)));
        if !gone.is_empty() {
            out.push((To::All, event("gone", &gone)));
        }
    }

    /// Shows a slice to the watcher that has been shown least. Returns whether there was one.
    fn walk_one(&mut self, core: &Core, out: &mut Vec<(To<W>, Vec<u8>)>) -> bool {
        let walking = |known: &&mut Watcher| known.has_begun && !known.is_behind && !known.is_whole;
        let newcomer = self.watchers.iter_mut().map(|(watcher, known)| (*watcher, known));
        let least = newcomer.filter(|(_, known)| walking(&known)).min_by(|a, b| a.1.shown.cmp(&b.1.shown));
        let Some((watcher, known)) = least else { return false };
        let (mut rows, mut replicas, mut nodes) = (Rows::default(), 0, 0);
        let mut rest = core.registry().nodes_after(known.shown.as_ref());
        known.is_whole = loop {
            if nodes >= SLICE_NODES_MAX || replicas >= SLICE_REPLICAS_MAX || !rows.has_room() {
                break false;
            }
            let Some(node) = rest.next() else { break true };
            nodes += 1;
            replicas += core.registry().replicas_of(node).count();
            rows.add(&row(core, node));
            known.shown = Some(node.id.clone());
        };
        out.extend(rows.finish().map(|bytes| (To::One(watcher), bytes)));
        if known.is_whole {
            out.push((To::One(watcher), event("whole", &serde_json::json!({}))));
            if known.has_missed {
                *known = Watcher::default();
            }
        }
        true
    }

    /// Goes on with the pass, if there is one. Returns whether there was.
    fn pass_slice(&mut self, core: &Core, now: Mono, out: &mut Vec<(To<W>, Vec<u8>)>) -> bool {
        let Some(mut pass) = self.pass.take() else { return false };
        let (mut rows, mut replicas, mut nodes) = (Rows::default(), 0, 0);
        let mut rest = core.registry().nodes_after(pass.after.as_ref());
        let is_over = loop {
            if nodes >= SLICE_NODES_MAX || replicas >= SLICE_REPLICAS_MAX || !rows.has_room() {
                break false;
            }
            let Some(node) = rest.next() else { break true };
            nodes += 1;
            replicas += pass.sums.add(core.registry(), node);
            *pass.by_status.entry(node.status.as_str()).or_default() += 1;
            self.show_if_new(core, node, &mut rows);
            pass.after = Some(node.id.clone());
        };
        if let Some(bytes) = rows.finish() {
            pass.bytes += bytes.len() as u64;
            out.push((To::All, bytes));
        }
        if !is_over {
            self.pass = Some(pass);
            return true;
        }
        // What this pass did not see is gone.
        let passes = self.passes;
        let gone: Vec<NodeId> =
            self.rows.iter().filter(|(_, (_, seen))| *seen != passes).map(|(id, _)| id.clone()).collect();
        for part in gone.chunks(SLICE_NODES_MAX) {
            out.push((To::All, event("gone", &part)));
        }
        self.rows.retain(|_, (_, seen)| *seen == passes);
        self.passes += 1;
        if (self.sums, &self.by_status) != (pass.sums, &pass.by_status) {
            (self.sums, self.by_status) = (pass.sums, pass.by_status);
            self.now_at = Mono::default();
        }
        self.pass_at = self.pass_at.max(now.plus_ms(pass.bytes / BYTES_PER_MS));
        true
    }

    /// Adds a node's row if it is not what was last shown.
    fn show_if_new(&mut self, core: &Core, node: &Node, rows: &mut Rows) {
        let row = row(core, node);
        let mut hasher = DefaultHasher::new();
        row.hash(&mut hasher);
        let hash = hasher.finish();
        match self.rows.get_mut(&node.id) {
            Some((shown, seen)) => {
                *seen = self.passes;
                if std::mem::replace(shown, hash) != hash {
                    rows.add(&row);
                }
            }
            None => {
                self.rows.insert(node.id.clone(), (hash, self.passes));
                rows.add(&row);
            }
        }
    }

    /// How things stand.
    fn now(&self, core: &Core, about: &About<'_>, now: Now) -> Vec<u8> {
        let agents: Vec<_> = core
            .poller()
            .troubled()
            .take(AGENTS_MAX)
            .map(|(url, state, error)| {
                serde_json::json!({"url": url, "state": state.as_str(), "error": error})
            })
            .collect();
        let waiting: BTreeMap<&str, usize> =
            Priority::ALL.iter().map(|priority| (priority.as_str(), core.waiting_of(*priority))).collect();
        event(
            "now",
            &serde_json::json!({
                "at_ms": now.wall.unix_ms(),
                "trouble": core.ready().err(),
                "nodes": self.by_status,
                "sums": self.sums,
                "running": about.sample.running,
                "waiting": waiting,
                "oldest_wait_ms": core.oldest_wait_ms(now.mono),
                "agents": agents,
                "bins": about.history.newest(&about.sample),
            }),
        )
    }
}

/// Rows on their way into one event.
#[derive(Default)]
struct Rows {
    text: String,
}

impl Rows {
    fn has_room(&self) -> bool {
        self.text.len() < SLICE_BYTES_MAX
    }

    fn add(&mut self, row: &str) {
        self.text.push(if self.text.is_empty() { '[' } else { ',' });
        self.text.push_str(row);
    }

    fn finish(self) -> Option<Vec<u8>> {
        (!self.text.is_empty()).then(|| format!("event: nodes\ndata: {}]\n\n", self.text).into_bytes())
    }
}

fn row(core: &Core, node: &Node) -> String {
    serde_json::to_string(&NodeRow::new(core.registry(), node)).unwrap_or_default()
}

fn event(name: &str, data: &impl Serialize) -> Vec<u8> {
    // JSON has no line ends of its own.
    format!("event: {name}\ndata: {}\n\n", serde_json::to_string(data).unwrap_or_default()).into_bytes()
}

/// The newest events since `seq`, oldest first.
fn news(core: &Core, seq: u64) -> serde_json::Value {
    let told: Vec<serde_json::Value> = core
        .events()
        .newest(seq, NEWS_MAX)
        .map(|(seq, at, what)| {
            let what = what.happening();
            let Happening { kind, subject, state, text, is_warning } = &*what;
            let news = News { seq, at_ms: at.unix_ms(), kind, subject, state, text, is_warning: *is_warning };
            serde_json::to_value(news).unwrap_or_default()
        })
        .collect();
    serde_json::Value::Array(told)
}
