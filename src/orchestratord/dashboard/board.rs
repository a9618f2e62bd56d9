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

    /// Whether anybody watches.
    #[must_use]
    pub fn is_watched(&self) -> bool {
        !self.watchers.is_empty()
    }

    /// Something happened that people are told of. Not wanted while nobody watches.
    pub fn happened(&mut self, what: &Happening) {
        if !self.is_watched() {
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
        let least = newcomer.filter(|(_, known)| walking(known)).min_by(|a, b| a.1.shown.cmp(&b.1.shown));
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::orchestratord::core::{Input, Options};
    use crate::orchestratord::placement::Strategy;
    use crate::orchestratord::service_registry::Limits;
    use crate::wire::node::{Heartbeat, RegisterRequest};
    use proptest::prelude::*;
    use serde_json::{Value, json};

    /// A control plane whose nodes come and go as a test says.
    struct Plane {
        core: Core,
        board: Board<u32>,
        history: History,
        now: Now,
        seq: u64,
    }

    impl Plane {
        fn new() -> Plane {
            let now = Now::default().plus_ms(1_000);
            let options = Options {
                limits: Limits::default(),
                strategy: Strategy::LeastLoaded,
                prefix_affinity: false,
                admission_capacity: 10,
                admission_timeout_ms: 1_000,
                drain_timeout_ms: 1_000,
                hang_suspect_ms: 1_000,
                served_sessions_max: 16,
                local: None,
                polled: Vec::new(),
                addresses: None,
                seed: 1,
            };
            let core = Core::new(options, now);
            Plane { core, board: Board::default(), history: History::new(now), now, seq: 0 }
        }

        fn tell(&mut self, input: Input) {
            let mut effects = Vec::new();
            self.core.handle(input, self.now, &mut effects);
            for effect in effects {
                if let crate::orchestratord::core::Effect::Log(what) = effect {
                    self.board.happened(&what.happening());
                }
            }
        }

        fn beat(&mut self, n: u8, replicas: usize, ready: bool) {
            let id = NodeId::new(&format!("n{n:03}")).expect("an id");
            if self.core.registry().node(&id).is_none() {
                let body: RegisterRequest = serde_json::from_value(json!({"node_id": id, "machine_id": "m",
                    "address": "http://10.0.0.1:9200", "pools": [], "capabilities": {}, "incarnation": 1}))
                .expect("a registration");
                self.tell(Input::Register { reply: 1, peer: "10.0.0.1".into(), body: Box::new(body) });
            }
            self.seq += 1;
            let list: Vec<Value> = (0..replicas)
                .map(|r| {
                    json!({"replica_id": format!("r{r}"), "url": "http://127.0.0.1:1", "ready": ready,
                    "slots_total": 2, "slots_free": 2, "generation": 1})
                })
                .collect();
            let body: Heartbeat = serde_json::from_value(json!({"timestamp": "t", "incarnation": 1, "seq": self.seq,
                "pools": [{"pool_id": "p", "ready": ready, "draining": false, "slots_free": 2, "slots_total": 2,
                    "vram_free_bytes": 0, "models_available": [], "replicas": list}]}))
            .expect("a heartbeat");
            self.tell(Input::Heartbeat { reply: 1, peer: "10.0.0.1".into(), node: id, body: Box::new(body) });
        }

        fn leave(&mut self, n: u8) {
            let node = NodeId::new(&format!("n{n:03}")).expect("an id");
            self.tell(Input::Deregister { reply: 1, node, incarnation: None });
        }

        /// Does what is due, and hands it to those whom it is for.
        fn turn(&mut self, screens: &mut BTreeMap<u32, Screen>) -> usize {
            let about = About { cloud: true, started: 1, history: &self.history, sample: Sample::default() };
            let mut bytes = 0;
            for (to, piece) in self.board.turn(&self.core, &about, self.now) {
                bytes += piece.len();
                let watchers: Vec<u32> = match to {
                    To::All => self.board.in_step().collect(),
                    To::One(watcher) => vec![watcher],
                };
                for watcher in watchers {
                    screens.entry(watcher).or_default().take(&piece);
                }
            }
            bytes
        }

        /// Lets time pass until nothing is new.
        fn settle(&mut self, screens: &mut BTreeMap<u32, Screen>) {
            let end = self.now.plus_ms(8_000);
            while let Some(at) = self.board.deadline() {
                let wait_ms = at.ms_since(self.now.mono).max(1);
                self.now = self.now.plus_ms(wait_ms);
                if self.now.mono > end.mono {
                    break;
                }
                self.turn(screens);
            }
        }

        fn rows(&self) -> BTreeMap<String, Value> {
            let row = |node| serde_json::from_str(&row(&self.core, node)).expect("JSON");
            self.core.registry().nodes().map(|node| (node.id.to_string(), row(node))).collect()
        }
    }

    /// What a page does with what it is told.
    #[derive(Default)]
    struct Screen {
        walk: u32,
        rows: BTreeMap<String, (Value, u32)>,
        routable: Option<u64>,
        news: usize,
    }

    impl Screen {
        fn take(&mut self, piece: &[u8]) {
            let text = std::str::from_utf8(piece).expect("text");
            let (name, rest) = text.strip_prefix("event: ").and_then(|t| t.split_once('\n')).expect("a name");
            let data: Value = serde_json::from_str(
                rest.strip_prefix("data: ").and_then(|t| t.strip_suffix("\n\n")).expect("one line of data"),
            )
            .expect("JSON");
            match name {
                "begin" => self.walk += 1,
                "nodes" => {
                    for row in data.as_array().expect("rows") {
                        let id = row["id"].as_str().expect("an id").to_string();
                        self.rows.insert(id, (row.clone(), self.walk));
                    }
                }
                "whole" => self.rows.retain(|_, (_, walk)| *walk == self.walk),
                "gone" => {
                    for id in data.as_array().expect("ids") {
                        self.rows.remove(id.as_str().expect("an id"));
                    }
                }
                "now" => self.routable = data["sums"]["routable"].as_u64(),
                "news" => self.news += data.as_array().map_or(0, Vec::len),
                other => panic!("{other}"),
            }
        }

        fn shown(&self) -> BTreeMap<String, Value> {
            self.rows.iter().map(|(id, (row, _))| (id.clone(), row.clone())).collect()
        }
    }

    #[test]
    fn while_nobody_watches_nothing_is_due() {
        let mut plane = Plane::new();
        plane.beat(1, 3, true);
        assert_eq!(plane.board.deadline(), None);
        assert_eq!(plane.turn(&mut BTreeMap::new()), 0);
        assert!(plane.board.watch(1, &plane.core, plane.now.mono) && plane.board.left(1));
        assert_eq!(plane.board.deadline(), None);
    }

    #[test]
    fn a_change_is_shown_in_the_turn_in_which_it_happens_and_a_storm_is_not() {
        let (mut plane, mut screens) = (Plane::new(), BTreeMap::new());
        plane.beat(1, 1, true);
        assert!(plane.board.watch(1, &plane.core, plane.now.mono));
        plane.settle(&mut screens);
        plane.beat(1, 1, false);
        assert!(plane.board.deadline().is_some_and(|at| at <= plane.now.mono));
        plane.turn(&mut screens);
        assert_eq!(screens[&1].shown(), plane.rows());
        assert_eq!(screens[&1].rows["n001"].0["replicas"][0]["state"], "out");
        let news = screens[&1].news;
        plane.now = plane.now.plus_ms(5);
        for n in 0..100 {
            plane.beat(1, 1, n % 2 == 0);
            plane.turn(&mut screens);
        }
        assert_eq!(screens[&1].news, news, "all of it in {PUSH_MS} ms");
        plane.settle(&mut screens);
        assert!(screens[&1].news > news && screens[&1].news <= news + NEWS_MAX);
    }

    #[test]
    fn no_turn_shows_or_looks_at_more_than_a_slice() {
        let (mut plane, mut screens) = (Plane::new(), BTreeMap::new());
        for n in 0..60 {
            plane.beat(n, 40, true);
        }
        for watcher in 0..4 {
            assert!(plane.board.watch(watcher, &plane.core, plane.now.mono));
        }
        let row_bytes_max = plane.rows().values().map(|row| row.to_string().len()).max().unwrap_or(0);
        let most = 2 * (SLICE_BYTES_MAX + row_bytes_max) + 64 * 1024;
        for _ in 0..800 {
            plane.now = plane.now.plus_ms(5);
            let bytes = plane.turn(&mut screens);
            assert!(bytes <= most, "{bytes} in one turn");
        }
        assert!(screens.values().all(|screen| screen.shown() == plane.rows()));
        assert!(screens.values().all(|screen| screen.routable == Some(2_400)));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        /// Whoever watches, however slowly, sees in the end what there is.
        #[test]
        fn screens_show_what_there_is_in_the_end(
            steps in proptest::collection::vec((0u8..9, 0u8..12, 0usize..4, any::<bool>(), 0u64..400), 1..80)
        ) {
            let (mut plane, mut screens) = (Plane::new(), BTreeMap::new());
            let mut watching = BTreeSet::new();
            for (what, n, replicas, ready, pause_ms) in steps {
                let watcher = u32::from(n % 3);
                match what {
                    0..=3 => plane.beat(n, replicas, ready),
                    4 => plane.leave(n),
                    5 if !watching.contains(&watcher) => {
                        prop_assert!(plane.board.watch(watcher, &plane.core, plane.now.mono));
                        watching.insert(watcher);
                        screens.insert(watcher, Screen::default());
                    }
                    6 => plane.board.is_behind(watcher),
                    7 => prop_assert_eq!(plane.board.caught_up(watcher), watching.contains(&watcher)),
                    8 if ready => {
                        prop_assert_eq!(plane.board.left(watcher), watching.remove(&watcher));
                        screens.remove(&watcher);
                    }
                    _ => {}
                }
                plane.now = plane.now.plus_ms(pause_ms);
                plane.turn(&mut screens);
            }
            for watcher in &watching {
                plane.board.caught_up(*watcher);
            }
            plane.settle(&mut screens);
            let routable: u64 = plane.core.registry().replicas().filter(|(_, r)| r.obstacle().is_none()).count() as u64;
            for watcher in &watching {
                prop_assert_eq!(screens[watcher].shown(), plane.rows());
                prop_assert_eq!(screens[watcher].routable, Some(routable));
            }
        }
    }
}
