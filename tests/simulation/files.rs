//! Runtime directories and how an agent's watcher sees them: events that are lost, repeated, late or
//! too many, writers that write in place and die midway, renames, a directory that goes away.
//!
//! What looks at real files is no part of this world, so here a model keeps its contract: what the
//! kernel names is looked at first, a pass looks at every name in pieces while the directory goes on
//! changing, a file that ends too early gets a moment. What follows from the listings is the real
//! core's work, as is reading the bytes. The real watcher has its own story in `directory.rs`.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;
use std::sync::Arc;

use llama_orch::pool_managerd::core::Input;
use llama_orch::replicas::{FileContent, ListedFile, Listing, Span, Trouble};
use llama_orch::time::{Mono, Wall};
use llama_orch::wire::handoff::{Handoff, HandoffFile, parse};

use crate::world::{EnginePhase, Event, World};

/// Between looks at every name, where no event tells of a change.
const RELIST_MS: u64 = 5_000;
/// Between looks for a directory that is away.
const AWAY_MS: u64 = 1_000;
/// How long a file may end too early.
const WRITING_MS: u64 = 250;

/// A runtime directory.
pub(crate) struct Directory {
    /// `None` while it is away; another number after it was made again.
    pub(crate) inode: Option<u64>,
    pub(crate) files: BTreeMap<Arc<str>, SimFile>,
}

/// A file in it.
#[derive(Clone, Debug)]
pub(crate) struct SimFile {
    pub(crate) bytes: Vec<u8>,
    pub(crate) modified: Wall,
    /// Another one with every change.
    version: u64,
}

type Pass = (BTreeSet<Arc<str>>, Bound<Arc<str>>);

/// What an agent has seen of its directory.
#[derive(Default)]
pub(crate) struct Watcher {
    /// The directory that sends its events here.
    armed: Option<u64>,
    hints: BTreeSet<Arc<str>>,
    again: bool,
    /// Names that are still to be looked at, and from where on.
    pass: Option<Pass>,
    known: BTreeMap<Arc<str>, (u64, Option<ListedFile>)>,
    /// Files that end too early, and when that counts.
    unfinished: BTreeMap<Arc<str>, Mono>,
    is_blind: bool,
}

impl Directory {
    pub(crate) fn new() -> Directory {
        Directory { inode: Some(1), files: BTreeMap::new() }
    }

    /// The handoffs that count: of those that name one replica the highest generation, then the newest,
    /// then the first by name.
    fn handoffs(&self) -> Vec<Handoff> {
        let mut best: Vec<(Wall, Box<Handoff>)> = Vec::new();
        for file in self.files.values() {
            let Ok(HandoffFile::Engine(handoff)) = parse(&file.bytes) else { continue };
            match best.iter_mut().find(|(_, other)| other.key() == handoff.key()) {
                None => best.push((file.modified, handoff)),
                Some(other) => {
                    if (handoff.generation, file.modified) > (other.1.generation, other.0) {
                        *other = (file.modified, handoff);
                    }
                }
            }
        }
        best.into_iter().map(|(_, handoff)| *handoff).collect()
    }
}

impl World {
    /// The handoffs that count on a node, and with each whether its engine serves.
    pub(crate) fn announced(&self, node: usize) -> Vec<(Handoff, bool)> {
        let node = &self.nodes[node];
        let serves = |handoff: &Handoff| {
            let engine = node.engines.get(&handoff.url.port());
            handoff.ready && engine.is_some_and(|engine| engine.phase == EnginePhase::Healthy)
        };
        node.directory.handoffs().into_iter().map(|handoff| (handoff.clone(), serves(&handoff))).collect()
    }

    // Writers.

    /// Writes a file: under another name first, or in place, where its writer may die midway.
    pub(crate) fn write_file(&mut self, node: usize, name: &str, bytes: Vec<u8>) {
        let version = self.number();
        if self.nodes[node].directory.inode.is_none() {
            return;
        }
        self.note(&format!("n{node} {name} says {}", String::from_utf8_lossy(&bytes)));
        if self.chaos && self.chance(30) {
            self.totals.count("files half written");
            let half = bytes[..self.random.usize(0..bytes.len())].to_vec();
            self.put(node, name, half, version);
            if self.chance(70) {
                let pause_ms = self.random.u64(0..400);
                let name = name.to_string();
                self.after(pause_ms, Event::WriteGoesOn { node, name, bytes, version });
            }
        } else {
            self.put(node, name, bytes, version);
        }
    }

    pub(crate) fn write_goes_on(&mut self, node: usize, name: &str, bytes: Vec<u8>, version: u64) {
        let file = self.nodes[node].directory.files.get(name);
        if file.is_some_and(|file| file.version == version) {
            let version = self.number();
            self.put(node, name, bytes, version);
        }
    }

    fn put(&mut self, node: usize, name: &str, bytes: Vec<u8>, version: u64) {
        let file = SimFile { bytes, modified: self.now.wall, version };
        self.nodes[node].directory.files.insert(name.into(), file);
        self.directory_changed(node, name);
    }

    pub(crate) fn remove_file(&mut self, node: usize, name: &str) {
        self.note(&format!("n{node} {name} is removed"));
        self.nodes[node].directory.files.remove(name);
        self.directory_changed(node, name);
    }

    pub(crate) fn rename_file(&mut self, node: usize, from: &str, to: &str) {
        self.note(&format!("n{node} {from} is renamed {to}"));
        if let Some(file) = self.nodes[node].directory.files.remove(from) {
            self.nodes[node].directory.files.insert(to.into(), file);
            self.directory_changed(node, from);
            self.directory_changed(node, to);
        }
    }

    /// The directory is removed, or another one takes its name.
    pub(crate) fn directory_goes(&mut self, node: usize) {
        self.note(&format!("n{node} its directory is away"));
        self.totals.count("directories away");
        let directory = &mut self.nodes[node].directory;
        directory.inode = None;
        if self.random.bool() {
            self.nodes[node].directory.files.clear();
        }
        let pause_ms = self.random.u64(0..8_000);
        self.after(pause_ms, Event::DirectoryReturns { node });
    }

    pub(crate) fn directory_returns(&mut self, node: usize) {
        if self.nodes[node].directory.inode.is_none() {
            self.note(&format!("n{node} its directory is back"));
            self.nodes[node].directory.inode = Some(self.number());
        }
    }

    // The watcher.

    /// The kernel tells of a change, unless it forgets to.
    fn directory_changed(&mut self, node: usize, name: &str) {
        let delay_ms = self.random.u64(0..3);
        let fate = if self.chaos { self.random.u64(0..100) } else { 99 };
        let inode = self.nodes[node].directory.inode;
        let Some(agent) = &mut self.nodes[node].agent else { return };
        if inode.is_none() || agent.watcher.armed != inode {
            return;
        }
        let life = agent.life;
        match fate {
            0..15 => return self.totals.count("events lost"),
            15..20 => {
                // The queue is full: which names changed is lost, and that they were is told.
                agent.watcher.hints.clear();
                agent.watcher.again = true;
                self.totals.count("events overflowed");
            }
            20..30 => {
                agent.watcher.hints.insert(name.into());
                let again_ms = self.random.u64(0..50);
                self.after(again_ms, Event::Watch { node, life });
                self.totals.count("events repeated");
            }
            _ => {
                agent.watcher.hints.insert(name.into());
            }
        }
        self.after(delay_ms, Event::Watch { node, life });
    }

    /// It is time for a look at every name: the watch is armed first.
    pub(crate) fn relist(&mut self, node: usize, life: u64) {
        let inode = self.nodes[node].directory.inode;
        let Some(agent) = self.agent(node, life) else { return };
        agent.watcher.armed = inode;
        agent.watcher.again = true;
        let pause_ms = if inode.is_some() { RELIST_MS } else { AWAY_MS };
        self.after(pause_ms, Event::Relist { node, life });
        self.watch(node, life);
    }

    /// The watcher does a bounded piece of what is to be done.
    pub(crate) fn watch(&mut self, node: usize, life: u64) {
        let (now, looks) = (self.now.mono, self.random.usize(1..=6));
        let known = &mut self.nodes[node];
        let Some(agent) = known.agent.as_mut().filter(|agent| agent.life == life && !agent.stalled) else {
            return;
        };
        let watcher = &mut agent.watcher;
        let Some(inode) = known.directory.inode else {
            watcher.pass = None;
            watcher.hints.clear();
            watcher.unfinished.clear();
            if !std::mem::replace(&mut watcher.is_blind, true) {
                let trouble = Trouble { text: "the directory is away".into(), is_blind: true };
                self.agent_told(node, Input::WatchTrouble(Some(trouble)));
            }
            return;
        };
        if watcher.armed != Some(inode) {
            // Looked at by path, it is another one: everything counts anew.
            watcher.armed = Some(inode);
            watcher.again = true;
        }
        let mut inputs = Vec::new();
        if std::mem::take(&mut watcher.is_blind) {
            inputs.push(Input::WatchTrouble(None));
        }
        inputs.extend(watcher.step(&known.directory, looks, now).map(Input::Listing));
        let busy = !watcher.hints.is_empty() || watcher.again || watcher.pass.is_some();
        let unfinished = watcher.unfinished.values().min().copied();
        if !inputs.is_empty() {
            self.agent_turn(node, inputs);
        }
        if busy {
            let pause_ms = self.random.u64(0..3);
            self.after(pause_ms, Event::Watch { node, life });
        } else if let Some(at) = unfinished {
            self.after(at.ms_since(now) + 1, Event::Watch { node, life });
        }
    }
}

impl Watcher {
    fn step(&mut self, directory: &Directory, looks: usize, now: Mono) -> Option<Listing> {
        let due = self.unfinished.iter().filter(|(_, at)| **at <= now).map(|(name, _)| name.clone());
        self.hints.extend(due.collect::<Vec<_>>());
        if !self.hints.is_empty() {
            let mut names = Vec::new();
            while names.len() < looks
                && let Some(name) = self.hints.pop_first()
            {
                names.push(name);
            }
            let files: Vec<ListedFile> =
                names.iter().filter_map(|name| self.look_at(directory, name, now)).collect();
            if let Some((ahead, done)) = &mut self.pass {
                // A pass that took its names before these existed must not miss them.
                let is_ahead = |name: &Arc<str>| match done {
                    Bound::Excluded(done) => name > done,
                    _ => true,
                };
                ahead.extend(files.iter().map(|file| file.name.clone()).filter(is_ahead));
            }
            return Some(Listing { span: Span::Names(names), files, truncated: false, completes: false });
        }
        if self.pass.is_none() && std::mem::take(&mut self.again) {
            let names = directory.files.keys().chain(self.known.keys()).cloned().collect();
            self.pass = Some((names, Bound::Unbounded));
        }
        let (mut names, from) = self.pass.take()?;
        let (mut files, mut last) = (Vec::new(), None);
        for _ in 0..looks {
            let Some(name) = names.pop_first() else { break };
            files.extend(self.look_at(directory, &name, now));
            last = Some(name);
        }
        let completes = names.is_empty();
        let to = match last.filter(|_| !completes) {
            Some(last) => {
                self.pass = Some((names, Bound::Excluded(last.clone())));
                Bound::Included(last)
            }
            None => Bound::Unbounded,
        };
        Some(Listing { span: Span::Range(from, to), files, truncated: false, completes })
    }

    fn look_at(&mut self, directory: &Directory, name: &Arc<str>, now: Mono) -> Option<ListedFile> {
        let Some(file) = directory.files.get(name) else {
            self.unfinished.remove(name);
            self.known.remove(name);
            return None;
        };
        let counts = self.unfinished.get(name).is_some_and(|at| *at <= now);
        let before = self.known.get(name).cloned();
        if let Some((version, listed)) = &before
            && *version == file.version
            && !counts
        {
            return listed.clone();
        }
        let content = match parse(&file.bytes) {
            Ok(HandoffFile::Engine(handoff)) => FileContent::Handoff(handoff.into()),
            Ok(HandoffFile::ModelOnly) => FileContent::ModelOnly,
            Err(error) if error.is_incomplete() && !counts => {
                self.unfinished.entry(name.clone()).or_insert_with(|| now.plus_ms(WRITING_MS));
                let listed = before.and_then(|(_, listed)| listed);
                self.known.insert(name.clone(), (file.version, listed.clone()));
                return listed;
            }
            Err(error) => FileContent::Refused(error.to_string()),
        };
        self.unfinished.remove(name);
        let listed = ListedFile { name: name.clone(), modified: file.modified, content: Arc::new(content) };
        self.known.insert(name.clone(), (file.version, Some(listed.clone())));
        Some(listed)
    }
}
