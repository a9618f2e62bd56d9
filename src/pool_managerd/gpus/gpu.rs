//! One GPU: how it stands, why, and what makes a difference to that. Pure.

use std::collections::BTreeMap;

use super::reading::{Process, Values};
use super::xid::{Class, Pci, Source, Xid};
use super::{GpuId, XIDS_REMEMBERED_MAX, happening};
use crate::service::events::Happening;
use crate::time::{Mono, Now, Wall};

/// Within this time, in milliseconds, the same XID on the same GPU from the other source is the same.
pub(super) const SAME_XID_MS: u64 = 5_000;
/// Different XIDs that are counted for one GPU; NVIDIA's catalogue has fewer than 200.
const XID_NUMBERS_MAX: usize = 64;

/// How a GPU stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum GpuState {
    /// Nothing is wrong.
    Ok,
    /// The driver lists it and could not be asked about it this time.
    Unreadable,
    /// An XID said that it cannot be relied on.
    Faulty,
    /// The driver has lost it.
    Lost,
}

impl GpuState {
    /// Every state, in the order of the metrics.
    pub const ALL: [GpuState; 4] = [GpuState::Ok, GpuState::Unreadable, GpuState::Faulty, GpuState::Lost];

    /// The state as the API spells it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            GpuState::Ok => "ok",
            GpuState::Unreadable => "unreadable",
            GpuState::Faulty => "faulty",
            GpuState::Lost => "lost",
        }
    }

    /// Whether its replicas are held.
    pub(super) fn is_out(self) -> bool {
        matches!(self, GpuState::Faulty | GpuState::Lost)
    }
}

#[derive(Debug)]
pub(super) struct Gpu {
    pub(super) id: GpuId,
    pub(super) index: u32,
    /// The last values; `None` for a GPU that could not be read since this process started.
    pub(super) values: Option<Values>,
    pub(super) is_listed: bool,
    pub(super) lost: Option<String>,
    pub(super) unreadable: Option<String>,
    /// The first XID of the fault, and the numbers of those that followed.
    pub(super) fault: Option<(String, Vec<u32>)>,
    pub(super) since: Wall,
    pub(super) xids: BTreeMap<u32, u64>,
    recent: Vec<(u32, Source, Mono)>,
}

impl Gpu {
    /// One of which only the number is known.
    pub(super) fn unread(id: GpuId, index: u32, now: Now) -> Gpu {
        Gpu {
            id,
            index,
            values: None,
            is_listed: true,
            lost: None,
            unreadable: None,
            fault: None,
            since: now.wall,
            xids: BTreeMap::new(),
            recent: Vec::new(),
        }
    }

    pub(super) fn uuid(&self) -> Option<&str> {
        self.values.as_ref().map(|values| values.uuid.as_str())
    }

    pub(super) fn pci(&self) -> Option<Pci> {
        self.values.as_ref().and_then(|values| values.pci)
    }

    pub(super) fn processes(&self) -> &[Process] {
        self.values.as_ref().map_or(&[], |values| &values.processes)
    }

    pub(super) fn state(&self) -> GpuState {
        match self {
            Gpu { lost: Some(_), .. } => GpuState::Lost,
            Gpu { fault: Some(_), .. } => GpuState::Faulty,
            Gpu { unreadable: Some(_), .. } => GpuState::Unreadable,
            _ => GpuState::Ok,
        }
    }

    /// Why it stands so, for people; empty where nothing is wrong. What went before a loss is told too.
    pub(super) fn reason(&self) -> String {
        let fault = self.fault.as_ref().map(|(first, later)| {
            later.iter().fold(first.clone(), |text, number| format!("{text}, then XID {number}"))
        });
        let unreadable = self.unreadable.clone().filter(|_| self.lost.is_none());
        [self.lost.clone(), fault, unreadable].into_iter().flatten().collect::<Vec<_>>().join("; ")
    }

    /// Makes a change and reports it where it makes a difference.
    pub(super) fn change(&mut self, now: Now, out: &mut Vec<Happening>, make: impl FnOnce(&mut Gpu)) {
        let (state, reason) = (self.state(), self.reason());
        make(self);
        let (to, why) = (self.state(), self.reason());
        if (state, &reason) == (to, &why) {
            return;
        }
        let text = if state == to {
            format!("GPU {}: still {}: {why}", self.index, to.as_str())
        } else {
            self.since = now.wall;
            let why = if to == GpuState::Ok { format!("over: {reason}") } else { why };
            format!("GPU {}: {} -> {}: {why}", self.index, state.as_str(), to.as_str())
        };
        out.push(happening(&self.index.to_string(), to.as_str(), text, to != GpuState::Ok));
    }

    /// Whether the other source has told of this XID a moment ago.
    pub(super) fn is_told_again(&mut self, xid: &Xid, now: Mono) -> bool {
        self.recent.retain(|(.., at)| now.ms_since(*at) <= SAME_XID_MS);
        let is_same =
            |(number, source, _): &(u32, Source, Mono)| *number == xid.number && *source != xid.source;
        if let Some(position) = self.recent.iter().position(is_same) {
            // Each telling has one counterpart.
            self.recent.remove(position);
            return true;
        }
        if self.recent.len() >= XIDS_REMEMBERED_MAX {
            self.recent.remove(0);
        }
        self.recent.push((xid.number, xid.source, now));
        false
    }

    /// Takes an XID. Whether it makes the GPU unusable.
    pub(super) fn suffer(&mut self, xid: &Xid, now: Now, out: &mut Vec<Happening>) -> bool {
        if self.xids.len() < XID_NUMBERS_MAX || self.xids.contains_key(&xid.number) {
            *self.xids.entry(xid.number).or_default() += 1;
        }
        let detail = if xid.detail.is_empty() { String::new() } else { format!(": {}", xid.detail) };
        if xid.class() != Class::Fault {
            let text = format!("GPU {}: {xid}{detail}", self.index);
            out.push(happening(&self.index.to_string(), "xid", text, false));
            return false;
        }
        self.change(now, out, |gpu| match &mut gpu.fault {
            Some((first, later)) => {
                let is_new = !later.contains(&xid.number) && !first.starts_with(&xid.to_string());
                if is_new && later.len() < XIDS_REMEMBERED_MAX {
                    later.push(xid.number);
                }
            }
            None => gpu.fault = Some((format!("{xid}{detail}"), Vec::new())),
        });
        true
    }
}
