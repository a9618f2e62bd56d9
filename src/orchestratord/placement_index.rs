//! Which replica is best at the moment, kept up to date as replicas change, so that placement asks
//! instead of looking at all of them.
//!
//! Replicas are kept in **groups**: one of all of them, one for each set of models, and one for each
//! [cohort](super::cohorts). A request for a model concerns the few groups whose set contains it, one with pins
//! the few cohorts that pass.
//!
//! Each group is a **tournament**: a complete binary tree whose leaves are its members in any order and
//! whose every other node names the better one of its two children. The root is the best member. When a
//! replica changes, the nodes above its leaf are played again until one is reached that it neither wins
//! nor won before; a replica that is not among the best costs two or three comparisons, however many
//! there are. What "better" means, the configured [`Strategy`] says. Members that take work and have a
//! free slot are better than any other; the rest is in an order that gives the reason of a refusal: if
//! nobody in the group takes work, the root is the first by name of those that may yet.
//!
//! Who wants several slots at once does not fit everywhere where one is free. Each group counts its members by
//! how many they have free, so that it is known at once if none has enough.
//!
//! Two strategies need more. For [`Strategy::Random`] a second tree counts members with a free slot,
//! from which the n-th is found by descending; for [`Strategy::RoundRobin`] those members are also kept
//! by name. Prefix affinity adds a [`Ring`] of the members that take work.
//!
//! The index reads [`Hot`] and nothing else. It does not know what a request is: who asks says by a
//! predicate which replicas fit, and after [`LOOKS_MAX`] that do not it gives up, because a pass over
//! all replicas is cheaper then.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BinaryHeap};

use super::cohorts::{Membership, Serves};
use super::placement::Strategy;
use super::replica_table::{Hot, NO_MODELS};
use super::ring::Ring;

/// Replicas that are looked at in vain before the index gives up. Each costs some 200 ns in a large
/// group, so that this many cost less than a pass over a thousand replicas.
pub const LOOKS_MAX: usize = 24;
/// Smallest number of leaves: below that, growing step by step costs more than it saves.
const LEAVES_MIN: usize = 4;
/// Numbers of free slots that are told apart; those with more are counted as having this many.
const ROOMS_MAX: usize = 8;
/// A leaf without a member.
const NOBODY: u32 = u32::MAX;
/// The group of all replicas.
const EVERYBODY: usize = 0;

/// What came of looking for a replica.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// The best one, by its index in the table.
    Replica(usize),
    /// None fits.
    Nobody,
    /// Too many did not fit; the others were not looked at.
    GaveUp,
}

/// Sums over the members of one group, or of several.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// All.
    pub members: u32,
    /// Of these, take work, full ones included.
    pub placeable: u32,
    /// Of these, have a free slot.
    pub with_room: u32,
    /// Members whose models nobody knows and whose node is offline.
    pub lost: u32,
    /// Slots of the ones that take work.
    pub slots: u64,
    /// Of these, taken.
    pub used: u64,
}

impl Tally {
    fn of(hot: &Hot) -> Tally {
        let placeable = u32::from(hot.placeable);
        Tally {
            members: 1,
            placeable,
            with_room: u32::from(has_slot(hot)),
            lost: u32::from(is_lost(hot)),
            slots: u64::from(placeable * hot.slots_total),
            used: u64::from(placeable * hot.slots_used),
        }
    }

    fn add(&mut self, other: Tally) {
        self.members += other.members;
        self.placeable += other.placeable;
        self.with_room += other.with_room;
        self.lost += other.lost;
        self.slots += other.slots;
        self.used += other.used;
    }

    fn subtract(&mut self, other: Tally) {
        self.members -= other.members;
        self.placeable -= other.placeable;
        self.with_room -= other.with_room;
        self.lost -= other.lost;
        self.slots -= other.slots;
        self.used -= other.used;
    }
}

/// Names a group of the index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupId(u32);

impl GroupId {
    /// All replicas.
    pub const ALL: GroupId = GroupId(EVERYBODY as u32);

    /// The replicas that serve a set of models.
    #[must_use]
    pub fn of_set(set: u32) -> GroupId {
        GroupId(set + 1)
    }

    /// The members of a cohort, which is one of those by devices or not.
    #[must_use]
    pub fn of_cohort(number: u32, by_devices: bool) -> GroupId {
        GroupId(number | COHORT | if by_devices { BY_DEVICES } else { 0 })
    }

    /// The number of the cohort, if it is one.
    #[must_use]
    pub fn cohort(self) -> Option<u32> {
        (self.0 & COHORT != 0).then_some(self.0 & !(COHORT | BY_DEVICES))
    }

    /// Which of its groups it is for a member: [`SIDES`] of them.
    fn side(self) -> usize {
        match self {
            GroupId::ALL => 0,
            GroupId(id) if id & COHORT == 0 => 1,
            GroupId(id) if id & BY_DEVICES == 0 => 2,
            GroupId(_) => 3,
        }
    }
}

/// Marks the name of a cohort's group.
const COHORT: u32 = 1 << 31;
/// Of these, one by devices.
const BY_DEVICES: u32 = 1 << 30;
/// Groups that a replica is in at most: all, its set's, its cohort's, and that by devices.
const SIDES: usize = 4;

/// The index. See the introduction of this file.
#[derive(Debug)]
pub struct PlacementIndex {
    strategy: Strategy,
    with_rings: bool,
    /// That of all, and one for each set.
    groups: Vec<Group>,
    /// By number.
    cohorts: Vec<Group>,
    /// By index in the table.
    places: Vec<Place>,
}

/// Where a replica is in its groups.
#[derive(Clone, Copy, Debug, Default)]
struct Place {
    /// Its point on rings.
    point: u64,
    membership: Membership,
    /// Its leaf in each of its groups.
    leaves: [u32; SIDES],
}

impl Place {
    /// The groups of a replica that serves `model_set`, but for that of all.
    fn groups(&self, model_set: u32) -> impl Iterator<Item = GroupId> + use<> {
        let (of_set, cohorts) = (GroupId::of_set(model_set), self.membership);
        [Some(of_set), cohorts.of_pool, cohorts.of_devices].into_iter().flatten()
    }
}

#[derive(Debug, Default)]
struct Group {
    /// Indices in the table. Node `n` has the children `2n` and `2n + 1`; 1 is the root; the second half
    /// are the leaves, of which the first `tally.members` have members.
    tree: Vec<u32>,
    tally: Tally,
    /// How many members can give one slot, two, and so on: see [`rooms`].
    rooms: [u32; ROOMS_MAX],
    /// For [`Strategy::Random`]: how many below each node have a free slot.
    counts: Vec<u32>,
    /// For [`Strategy::RoundRobin`]: who has a free slot, by order label.
    turns: BTreeMap<u64, u32>,
    ring: Ring,
}

/// What the order in a tournament depends on beside the replicas.
#[derive(Clone, Copy)]
struct Rules {
    strategy: Strategy,
    /// Lost replicas are no reason to wait.
    ignore_lost: bool,
}

impl Default for PlacementIndex {
    fn default() -> Self {
        PlacementIndex {
            strategy: Strategy::default(),
            with_rings: false,
            groups: vec![Group::default()],
            cohorts: Vec::new(),
            places: Vec::new(),
        }
    }
}

impl PlacementIndex {
    /// The strategy that is answered.
    #[must_use]
    pub fn strategy(&self) -> Strategy {
        self.strategy
    }

    /// Sums over groups that have no members in common.
    #[must_use]
    pub fn tally(&self, groups: &[GroupId]) -> Tally {
        let mut sum = Tally::default();
        groups.iter().filter_map(|group| self.group(*group)).for_each(|group| sum.add(group.tally));
        sum
    }

    /// How many members of groups that have none in common have room for `slots` at once. Exact up to
    /// `ROOMS_MAX`, and otherwise an upper bound.
    #[must_use]
    pub fn with_room_for(&self, groups: &[GroupId], slots: u32) -> u32 {
        let least = (slots.max(1) as usize).min(ROOMS_MAX) - 1;
        let rooms = groups.iter().filter_map(|group| Some(&self.group(*group)?.rooms[least..]));
        rooms.flatten().sum()
    }

    /// The members of a group, by their indices in the table, in any order.
    #[must_use]
    pub fn members(&self, group: GroupId) -> &[u32] {
        self.group(group).map_or(&[], Group::leaves)
    }

    /// Whether a replica is in one of some groups.
    #[must_use]
    pub fn is_among(&self, index: usize, groups: &[GroupId], hot: &[Hot]) -> bool {
        groups == [GroupId::ALL]
            || self.places[index].groups(hot[index].model_set).any(|group| groups.contains(&group))
    }

    /// The cohorts of a replica.
    #[must_use]
    pub fn membership(&self, index: usize) -> Membership {
        self.places.get(index).map_or_else(Membership::default, |place| place.membership)
    }

    /// The best replica of some groups that `fits`. `last` is the order label of the replica chosen last
    /// and `random` a source of random numbers, for the strategies that want them.
    pub fn find(
        &self,
        groups: &[GroupId],
        hot: &[Hot],
        last: u64,
        random: impl FnMut() -> u64,
        fits: impl FnMut(usize) -> bool,
    ) -> Found {
        if self.tally(groups).with_room == 0 {
            return Found::Nobody;
        }
        match self.strategy {
            Strategy::LeastLoaded | Strategy::MostVram => self.best(groups, hot, fits),
            Strategy::RoundRobin => self.next_turn(groups, last, fits),
            Strategy::Random => self.draw(groups, random, fits),
        }
    }

    /// The first by name of those that may yet take work. Only for groups in which few have a free slot, because
    /// all of these are passed by.
    #[must_use]
    pub fn first_out(&self, groups: &[GroupId], hot: &[Hot]) -> Option<usize> {
        let out = |id: &GroupId| self.group(*id)?.first_out(1, hot, self.rules(*id));
        groups.iter().filter_map(out).min_by_key(|index| hot[*index].order)
    }

    /// The rings of some groups; empty ones where affinity is off.
    pub fn rings<'a>(&'a self, groups: &'a [GroupId]) -> impl Iterator<Item = &'a Ring> {
        groups.iter().filter_map(|group| Some(&self.group(*group)?.ring))
    }

    /// Answers another strategy from now on, with or without rings. Linear.
    pub(super) fn configure(&mut self, strategy: Strategy, with_rings: bool, hot: &[Hot]) {
        let places = std::mem::take(&mut self.places);
        *self = PlacementIndex { strategy, with_rings, ..PlacementIndex::default() };
        for (index, place) in places.into_iter().enumerate().filter(|(index, _)| hot[*index].exists) {
            self.insert(index, place.point, place.membership, hot);
        }
    }

    /// Takes in a replica that was added to the table. `point` is its point on rings.
    pub(super) fn insert(&mut self, index: usize, point: u64, membership: Membership, hot: &[Hot]) {
        if self.places.len() <= index {
            self.places.resize(index + 1, Place::default());
        }
        self.places[index] = Place { point, membership, leaves: [0; SIDES] };
        self.join(GroupId::ALL, index, hot);
        self.places[index].groups(hot[index].model_set).for_each(|group| self.join(group, index, hot));
    }

    /// Takes out a replica that is about to be removed from the table.
    pub(super) fn remove(&mut self, index: usize, hot: &[Hot]) {
        self.leave(GroupId::ALL, index, hot);
        self.places[index].groups(hot[index].model_set).for_each(|group| self.leave(group, index, hot));
    }

    /// A replica serves this from now on, and is in these cohorts.
    pub(super) fn regroup(&mut self, index: usize, serves: Serves, membership: Membership, hot: &mut [Hot]) {
        let set = hot[index].model_set;
        let stays = (set == serves.model_set).then_some(GroupId::of_set(set));
        let goes = |group: &GroupId| Some(*group) != stays;
        self.places[index].groups(set).filter(goes).for_each(|group| self.leave(group, index, hot));
        let before = Tally::of(&hot[index]);
        (hot[index].model_set, hot[index].context_tokens) = (serves.model_set, serves.context_tokens);
        // In the tournament of all, sets count for nothing; in its sums they do.
        let everybody = &mut self.groups[EVERYBODY].tally;
        everybody.subtract(before);
        everybody.add(Tally::of(&hot[index]));
        self.places[index].membership = membership;
        let place = self.places[index];
        place.groups(serves.model_set).filter(goes).for_each(|group| self.join(group, index, hot));
    }

    /// A replica has changed and was `before`.
    pub(super) fn update(&mut self, index: usize, before: &Hot, hot: &[Hot]) {
        let place = self.places[index];
        let (old, new) = (Tally::of(before), Tally::of(&hot[index]));
        let (old_rooms, new_rooms) = (rooms(before), rooms(&hot[index]));
        // Mostly a request has come or gone, and all else is as it was.
        let only_used = Tally { used: new.used, ..old } == new;
        for group in [GroupId::ALL].into_iter().chain(place.groups(hot[index].model_set)) {
            let (rules, with_rings) = (self.rules(group), self.with_rings);
            let Some(known) = self.group_mut(group) else { continue };
            if only_used {
                known.tally.used = known.tally.used - old.used + new.used;
            } else {
                known.tally.subtract(old);
                known.tally.add(new);
            }
            if old_rooms != new_rooms {
                known.count_room(old_rooms, false);
                known.count_room(new_rooms, true);
            }
            let leaf = place.leaves[group.side()] as usize;
            // Nobody plays against who is alone.
            if known.tally.members > 1 {
                known.replay(leaf, index as u32, hot, rules);
            }
            if has_slot(before) != has_slot(&hot[index]) {
                known.show_room(leaf, index, hot, rules.strategy);
            }
            if with_rings && before.placeable != hot[index].placeable {
                known.ring.set(place.point, index as u32, hot[index].placeable);
            }
        }
    }

    /// Order labels were dealt anew, in the same order.
    pub(super) fn relabel(&mut self, hot: &[Hot]) {
        for group in self.groups.iter_mut().chain(&mut self.cohorts) {
            group.turns = group.turns.values().map(|index| (hot[*index as usize].order, *index)).collect();
        }
    }

    /// Panics where the index is not what would be built anew. For tests and simulations; linear.
    pub(super) fn check_invariants(&self, hot: &[Hot]) {
        let mut sums: BTreeMap<u32, (Tally, [u32; ROOMS_MAX])> = BTreeMap::new();
        for (index, hot) in hot.iter().enumerate().filter(|(_, hot)| hot.exists) {
            let place = self.places[index];
            for group in [GroupId::ALL].into_iter().chain(place.groups(hot.model_set)) {
                let (tally, in_rooms) = sums.entry(group.0).or_default();
                tally.add(Tally::of(hot));
                rooms(hot).into_iter().for_each(|room| in_rooms[room] += 1);
                let known = self.group(group).expect("a member's group exists");
                let leaf = place.leaves[group.side()] as usize;
                assert_eq!(known.tree[known.tree.len() / 2 + leaf], index as u32, "on another's leaf");
                let on_ring = known.ring.contains(place.point, index as u32);
                assert_eq!(on_ring, self.with_rings && hot.placeable, "on the ring or not");
            }
        }
        let named = (0..self.groups.len()).map(|id| GroupId(id as u32));
        let cohorts = (0..self.cohorts.len() as u32).map(|number| {
            let by_devices = GroupId::of_cohort(number, true);
            if sums.contains_key(&by_devices.0) { by_devices } else { GroupId::of_cohort(number, false) }
        });
        let all: Vec<GroupId> = named.chain(cohorts).collect();
        for (id, group) in all.into_iter().filter_map(|id| Some((id, self.group(id)?))) {
            let rules = self.rules(id);
            let expected = sums.remove(&id.0).unwrap_or_default();
            assert_eq!((group.tally, group.rooms), expected, "wrong sums");
            for node in 1..group.tree.len() / 2 {
                let winner = rules.winner(group.tree[2 * node], group.tree[2 * node + 1], hot);
                assert_eq!(group.tree[node], winner, "an outdated match");
            }
            let leaves = group.leaves();
            let with_room = leaves.iter().filter(|index| has_slot(&hot[**index as usize]));
            match self.strategy {
                Strategy::Random if !group.tree.is_empty() => {
                    assert_eq!(group.counts[1], with_room.count() as u32, "wrong counts");
                }
                Strategy::RoundRobin => {
                    let turns = with_room.map(|index| (hot[*index as usize].order, *index));
                    assert_eq!(group.turns, turns.collect(), "wrong turns");
                }
                _ => assert!(group.turns.is_empty(), "turns that nobody takes"),
            }
        }
        assert!(sums.is_empty(), "a group that is not found by its name");
    }

    fn group(&self, id: GroupId) -> Option<&Group> {
        match id.cohort() {
            Some(number) => self.cohorts.get(number as usize),
            None => self.groups.get(id.0 as usize),
        }
    }

    fn group_mut(&mut self, id: GroupId) -> Option<&mut Group> {
        match id.cohort() {
            Some(number) => self.cohorts.get_mut(number as usize),
            None => self.groups.get_mut(id.0 as usize),
        }
    }

    fn rules(&self, group: GroupId) -> Rules {
        Rules { strategy: self.strategy, ignore_lost: group != GroupId::ALL }
    }

    fn join(&mut self, id: GroupId, index: usize, hot: &[Hot]) {
        let (groups, at) = match id.cohort() {
            Some(number) => (&mut self.cohorts, number as usize),
            None => (&mut self.groups, id.0 as usize),
        };
        if groups.len() <= at {
            groups.resize_with(at + 1, Group::default);
        }
        let (rules, with_rings) = (self.rules(id), self.with_rings);
        let Some(group) = self.group_mut(id) else { return };
        let leaf = group.tally.members as usize;
        if leaf >= group.tree.len() / 2 {
            group.resize((leaf * 2).max(LEAVES_MIN), hot, rules);
        }
        group.tally.add(Tally::of(&hot[index]));
        group.count_room(rooms(&hot[index]), true);
        let leaves = group.tree.len() / 2;
        group.tree[leaves + leaf] = index as u32;
        group.replay(leaf, index as u32, hot, rules);
        if has_slot(&hot[index]) {
            group.show_room(leaf, index, hot, rules.strategy);
        }
        let point = self.places[index].point;
        if with_rings
            && hot[index].placeable
            && let Some(group) = self.group_mut(id)
        {
            group.ring.set(point, index as u32, true);
        }
        self.places[index].leaves[id.side()] = leaf as u32;
    }

    fn leave(&mut self, id: GroupId, index: usize, hot: &[Hot]) {
        let (rules, place) = (self.rules(id), self.places[index]);
        let Some(group) = self.group_mut(id) else { return };
        group.tally.subtract(Tally::of(&hot[index]));
        group.count_room(rooms(&hot[index]), false);
        group.ring.set(place.point, index as u32, false);
        group.turns.remove(&hot[index].order);
        let (leaf, last) = (place.leaves[id.side()] as usize, group.tally.members as usize);
        let leaves = group.tree.len() / 2;
        let moved = std::mem::replace(&mut group.tree[leaves + last], NOBODY);
        group.replay(last, moved, hot, rules);
        group.count(last, 0);
        if leaf != last {
            group.tree[leaves + leaf] = moved;
            // The nodes above may still name the one that left: it must count as having changed.
            group.replay(leaf, index as u32, hot, rules);
            group.count(leaf, u32::from(has_slot(&hot[moved as usize])));
            self.places[moved as usize].leaves[id.side()] = leaf as u32;
        }
        let Some(group) = self.group_mut(id) else { return };
        if last == 0 {
            *group = Group::default();
        } else if last * 4 <= leaves && leaves > LEAVES_MIN {
            group.resize(leaves / 2, hot, rules);
        }
    }

    fn best(&self, groups: &[GroupId], hot: &[Hot], mut fits: impl FnMut(usize) -> bool) -> Found {
        let mut open: BinaryHeap<Node<'_>> = BinaryHeap::new();
        let roots = groups.iter().filter_map(|id| {
            let group = self.group(*id)?;
            let index = group.best().filter(|index| has_slot(&hot[*index]))?;
            Some(Node { hot: &hot[index], index, group, node: 1, strategy: self.strategy })
        });
        // Nearly always the very best one fits, and no heap is needed.
        let Some(first) = roots.clone().max() else { return Found::Nobody };
        if fits(first.index) {
            return Found::Replica(first.index);
        }
        open.extend(roots);
        for look in 0..LOOKS_MAX {
            let Some(top) = open.pop() else { return Found::Nobody };
            if look > 0 && fits(top.index) {
                return Found::Replica(top.index);
            }
            // Without it, the best below this node is one of those that lost against it on its way up.
            let leaves = top.group.tree.len() / 2;
            let mut node = top.node;
            while node < leaves {
                let won =
                    if top.group.tree[2 * node] as usize == top.index { 2 * node } else { 2 * node + 1 };
                let index = top.group.tree[won ^ 1];
                if index != NOBODY && has_slot(&hot[index as usize]) {
                    let index = index as usize;
                    open.push(Node { hot: &hot[index], index, node: won ^ 1, ..top });
                }
                node = won;
            }
        }
        if open.is_empty() { Found::Nobody } else { Found::GaveUp }
    }

    fn next_turn(&self, groups: &[GroupId], last: u64, mut fits: impl FnMut(usize) -> bool) -> Found {
        // First those after the last one, then the others from the beginning.
        let mut looks = 0;
        for round in [(last.saturating_add(1), u64::MAX), (0, last)] {
            let mut from = Some(round.0).filter(|_| round.0 <= round.1);
            while let Some(least) = from {
                let firsts = groups.iter().filter_map(|group| {
                    self.group(*group)?
                        .turns
                        .range(least..=round.1)
                        .next()
                        .map(|(order, index)| (*order, *index))
                });
                let Some((order, index)) = firsts.min() else { break };
                if fits(index as usize) {
                    return Found::Replica(index as usize);
                }
                looks += 1;
                if looks >= LOOKS_MAX {
                    return Found::GaveUp;
                }
                from = order.checked_add(1).filter(|next| *next <= round.1);
            }
        }
        Found::Nobody
    }

    /// Draws with replacement: every fitting replica has the same chance at each draw, and so at the end.
    fn draw(
        &self,
        groups: &[GroupId],
        mut random: impl FnMut() -> u64,
        mut fits: impl FnMut(usize) -> bool,
    ) -> Found {
        let with_room = self.tally(groups).with_room;
        for _ in 0..LOOKS_MAX {
            let drawn = (u128::from(random()) * u128::from(with_room)) >> 64;
            let mut rest = drawn as u32;
            for group in groups.iter().filter_map(|group| self.group(*group)) {
                match rest.checked_sub(group.tally.with_room) {
                    Some(less) => rest = less,
                    None => {
                        let index = group.nth_with_room(rest);
                        if fits(index) {
                            return Found::Replica(index);
                        }
                        break;
                    }
                }
            }
        }
        Found::GaveUp
    }
}

impl Group {
    fn best(&self) -> Option<usize> {
        self.tree.get(1).filter(|index| **index != NOBODY).map(|index| *index as usize)
    }

    /// The first by name of those below a node that may yet take work.
    fn first_out(&self, node: usize, hot: &[Hot], rules: Rules) -> Option<usize> {
        let winner = *self.tree.get(node).filter(|index| **index != NOBODY)? as usize;
        match rules.class(&hot[winner]) {
            Class::Out => Some(winner),
            Class::Room if node < self.tree.len() / 2 => {
                let below = [2 * node, 2 * node + 1].into_iter();
                below
                    .filter_map(|node| self.first_out(node, hot, rules))
                    .min_by_key(|index| hot[*index].order)
            }
            _ => None,
        }
    }

    fn leaves(&self) -> &[u32] {
        let first = self.tree.len() / 2;
        &self.tree[first..first + self.tally.members as usize]
    }

    /// Plays the matches above a leaf again, because `changed` is another or came or went there.
    fn replay(&mut self, leaf: usize, changed: u32, hot: &[Hot], rules: Rules) {
        let mut node = (self.tree.len() / 2 + leaf) / 2;
        while node > 0 {
            let winner = rules.winner(self.tree[2 * node], self.tree[2 * node + 1], hot);
            // Who neither wins here nor won before is not seen further up.
            if std::mem::replace(&mut self.tree[node], winner) == winner && winner != changed {
                return;
            }
            node /= 2;
        }
    }

    /// One more member can give so much, or one less.
    fn count_room(&mut self, room: Option<usize>, is_more: bool) {
        match (room, is_more) {
            (Some(room), true) => self.rooms[room] += 1,
            (Some(room), false) => self.rooms[room] -= 1,
            (None, _) => {}
        }
    }

    /// A member has a free slot now, or none any more.
    fn show_room(&mut self, leaf: usize, index: usize, hot: &[Hot], strategy: Strategy) {
        let has_slot = has_slot(&hot[index]);
        match strategy {
            Strategy::Random => self.count(leaf, u32::from(has_slot)),
            Strategy::RoundRobin if has_slot => {
                self.turns.insert(hot[index].order, index as u32);
            }
            Strategy::RoundRobin => {
                self.turns.remove(&hot[index].order);
            }
            Strategy::LeastLoaded | Strategy::MostVram => {}
        }
    }

    /// Sets the count of a leaf, where counts are kept.
    fn count(&mut self, leaf: usize, count: u32) {
        let mut node = self.counts.len() / 2 + leaf;
        if node >= self.counts.len() || self.counts[node] == count {
            return;
        }
        self.counts[node] = count;
        while node > 1 {
            node /= 2;
            self.counts[node] = self.counts[2 * node] + self.counts[2 * node + 1];
        }
    }

    fn nth_with_room(&self, mut nth: u32) -> usize {
        let leaves = self.counts.len() / 2;
        let mut node = 1;
        while node < leaves {
            node *= 2;
            if nth >= self.counts[node] {
                nth -= self.counts[node];
                node += 1;
            }
        }
        self.tree[node] as usize
    }

    /// Another number of leaves, a power of two: everything is played anew.
    fn resize(&mut self, leaves: usize, hot: &[Hot], rules: Rules) {
        let old = self.leaves().to_vec();
        self.tree = vec![NOBODY; 2 * leaves];
        self.tree[leaves..leaves + old.len()].copy_from_slice(&old);
        for node in (1..leaves).rev() {
            self.tree[node] = rules.winner(self.tree[2 * node], self.tree[2 * node + 1], hot);
        }
        if rules.strategy == Strategy::Random {
            self.counts = vec![0; 2 * leaves];
            for (leaf, index) in old.iter().enumerate() {
                self.counts[leaves + leaf] = u32::from(has_slot(&hot[*index as usize]));
            }
            for node in (1..leaves).rev() {
                self.counts[node] = self.counts[2 * node] + self.counts[2 * node + 1];
            }
        }
    }
}

/// Kinds of members, best first.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Class {
    /// Takes work, and has a free slot.
    Room,
    /// Takes no work.
    Out,
    /// Takes no work, and is not worth waiting for.
    Lost,
    /// Takes work, and is full.
    Full,
}

impl Rules {
    fn class(self, hot: &Hot) -> Class {
        match hot.placeable {
            true if has_slot(hot) => Class::Room,
            true => Class::Full,
            false if self.ignore_lost && is_lost(hot) => Class::Lost,
            false => Class::Out,
        }
    }

    fn winner(self, a: u32, b: u32, hot: &[Hot]) -> u32 {
        if a == NOBODY || b == NOBODY {
            return a.min(b);
        }
        let (one, other) = (&hot[a as usize], &hot[b as usize]);
        let (class, other_class) = (self.class(one), self.class(other));
        let a_wins = match class.cmp(&other_class) {
            Ordering::Equal if class == Class::Room => is_better(self.strategy, one, other),
            Ordering::Equal => one.order < other.order,
            unequal => unequal == Ordering::Less,
        };
        if a_wins { a } else { b }
    }
}

/// A node of a tournament whose winner has not been looked at. The greatest is the best.
#[derive(Clone, Copy)]
struct Node<'a> {
    hot: &'a Hot,
    index: usize,
    group: &'a Group,
    node: usize,
    strategy: Strategy,
}

impl Ord for Node<'_> {
    fn cmp(&self, other: &Self) -> Ordering {
        match self.hot.order == other.hot.order {
            true => Ordering::Equal,
            false if is_better(self.strategy, self.hot, other.hot) => Ordering::Greater,
            false => Ordering::Less,
        }
    }
}

impl PartialOrd for Node<'_> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Node<'_> {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Node<'_> {}

/// Whether `a` goes before `b`, both having a free slot. Strategies that depend on more than the two
/// have them by name.
pub(super) fn is_better(strategy: Strategy, a: &Hot, b: &Hot) -> bool {
    match strategy {
        Strategy::LeastLoaded => {
            (cross_load(a, b), b.vram_free_bytes, a.order) < (cross_load(b, a), a.vram_free_bytes, b.order)
        }
        Strategy::MostVram => {
            (b.vram_free_bytes, cross_load(a, b), a.order) < (a.vram_free_bytes, cross_load(b, a), b.order)
        }
        Strategy::RoundRobin | Strategy::Random => a.order < b.order,
    }
}

/// Stands for `a`'s share of slots in use when compared with `cross_load(b, a)`: no division, no floats.
fn cross_load(a: &Hot, b: &Hot) -> u64 {
    u64::from(a.slots_used) * u64::from(b.slots_total)
}

fn has_slot(hot: &Hot) -> bool {
    hot.placeable && hot.slots_used < hot.slots_total
}

/// Nobody knows what it serves, and its node has been silent for long.
fn is_lost(hot: &Hot) -> bool {
    !hot.placeable && hot.offline && hot.model_set == NO_MODELS
}

/// Which of [`ROOMS_MAX`] counts a replica is in: the most slots that it gives at once, less one. An idle one
/// gives all that it has to whoever wants more.
fn rooms(hot: &Hot) -> Option<usize> {
    let free = if hot.slots_used == 0 { u32::MAX } else { hot.slots_total.saturating_sub(hot.slots_used) };
    has_slot(hot).then(|| (free as usize).min(ROOMS_MAX) - 1)
}
