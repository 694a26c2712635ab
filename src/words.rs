// SPDX-License-Identifier: MIT OR Apache-2.0
//! A sparse array of 64-bit words.

use std::alloc::{handle_alloc_error, Layout};
use std::collections::TryReserveError;

/// Words by number; most numbers have none.
///
/// A tree of nodes with 64 places each, of which only those in use take memory: six bits of a number
/// say where to go at each level. Neighbours share nodes, so that a look-up touches little memory
/// however many words there are.
///
/// As long as there were only a few words there is no tree: most sets hold a page or two for a moment, and
/// that is to take no memory.
#[derive(Clone, Debug, Default)]
pub(crate) struct Words {
    /// All words, while the tree is empty.
    few: Few,
    root: Node,
    /// Levels below the root: as few as the largest number needs.
    height: u32,
    /// Memory of all lists below the root.
    bytes: usize,
}

/// A few words and their numbers, in order.
#[derive(Clone, Debug, Default)]
struct Few {
    words: [(u64, u64); MOST_FEW],
    count: usize,
}

const MOST_FEW: usize = 4;

const PLACE_BITS: u32 = 6;

/// Entries that a list gets room for when it is full, after its first: doubling would leave half of it
/// empty.
const ROOM: usize = 4;
/// What malloc adds to a list.
const MALLOC_BYTES: usize = 16;

#[derive(Clone, Debug, Default)]
struct Node {
    /// Which places are in use.
    present: u64,
    below: Below,
}

/// What is in a node's places, in order.
#[derive(Clone, Debug)]
enum Below {
    Words(Vec<u64>),
    Nodes(Vec<Node>),
}

impl Default for Below {
    fn default() -> Self {
        Self::Words(Vec::new())
    }
}

impl PartialEq for Words {
    /// The same words, in a tree or not.
    fn eq(&self, other: &Self) -> bool {
        self.range(0, u64::MAX).eq(other.range(0, u64::MAX))
    }
}

impl Eq for Words {}

/// The places from `place` on.
fn from(place: u32) -> u64 {
    u64::MAX << place
}

/// The places to `place`, itself included.
fn to(place: u32) -> u64 {
    u64::MAX >> (63 - place)
}

/// Where a number is in a node with so many levels below it.
fn place(number: u64, height: u32) -> u32 {
    (number >> (PLACE_BITS * height)) as u32 % 64
}

/// Whether a tree with so many levels below its root has a place for a number.
fn fits(number: u64, height: u32) -> bool {
    let bits = PLACE_BITS * (height + 1);
    bits >= u64::BITS || number >> bits == 0
}

fn list_bytes<T>(list: &Vec<T>) -> usize {
    match list.capacity() {
        0 => 0,
        capacity => capacity * size_of::<T>() + MALLOC_BYTES,
    }
}

/// Inserts; says how much memory that took.
fn insert<T>(list: &mut Vec<T>, index: usize, value: T) -> Result<usize, TryReserveError> {
    let before = list_bytes(list);
    if list.len() == list.capacity() {
        list.try_reserve_exact(if before == 0 { 1 } else { ROOM })?;
    }
    list.insert(index, value);
    Ok(list_bytes(list) - before)
}

/// Gives room back, if there is much; says how much that was.
fn shrink<T>(list: &mut Vec<T>) -> usize {
    let before = list_bytes(list);
    if list.is_empty() || list.capacity() > list.len() + 2 * ROOM {
        list.shrink_to_fit();
    }
    before - list_bytes(list)
}

impl Node {
    fn has(&self, place: u32) -> bool {
        self.present >> place & 1 == 1
    }

    fn index(&self, place: u32) -> usize {
        (self.present & !from(place)).count_ones() as usize
    }

    fn nodes(&self) -> &[Node] {
        match &self.below {
            Below::Nodes(nodes) => nodes,
            Below::Words(_) => &[],
        }
    }

    /// Sets a word; says how much memory that took.
    fn set(&mut self, number: u64, height: u32, word: u64) -> Result<usize, TryReserveError> {
        let place = place(number, height);
        let (index, is_new) = (self.index(place), !self.has(place));
        if height == 0 {
            let Below::Words(words) = &mut self.below else {
                unreachable!("the lowest level has words");
            };
            if is_new {
                let taken = insert(words, index, word)?;
                self.present |= 1 << place;
                return Ok(taken);
            }
            words[index] = word;
            return Ok(0);
        }
        if self.nodes().is_empty() {
            self.below = Below::Nodes(Vec::new());
        }
        let Below::Nodes(nodes) = &mut self.below else {
            unreachable!("other levels have nodes");
        };
        let mut taken = 0;
        if is_new {
            taken = insert(nodes, index, Node::default())?;
            self.present |= 1 << place;
        }
        Ok(taken + nodes[index].set(number, height - 1, word)?)
    }

    /// Strikes out the words `first..=last`; says how much memory that gave back.
    fn clear(&mut self, first: u64, last: u64, height: u32) -> usize {
        let (low, high) = (place(first, height), place(last, height));
        let asked = self.present & from(low) & to(high);
        if asked == 0 {
            return 0;
        }
        let start = self.index(asked.trailing_zeros());
        let end = start + asked.count_ones() as usize;
        match &mut self.below {
            Below::Words(words) => {
                words.drain(start..end);
                self.present &= !asked;
                shrink(words)
            }
            Below::Nodes(nodes) => {
                let (mut left, mut freed) = (asked, 0);
                for node in &mut nodes[start..end] {
                    let place = left.trailing_zeros();
                    left &= left - 1;
                    let first = if place == low { first } else { 0 };
                    let last = if place == high { last } else { u64::MAX };
                    freed += node.clear(first, last, height - 1);
                    if node.present == 0 {
                        self.present &= !(1 << place);
                    }
                }
                nodes.retain(|node| node.present != 0);
                freed + shrink(nodes)
            }
        }
    }
}

impl Few {
    fn all(&self) -> &[(u64, u64)] {
        &self.words[..self.count]
    }

    /// Where a word is, or belongs.
    fn place(&self, number: u64) -> usize {
        let words = self.all().iter();
        words.take_while(|&&(other, _)| other < number).count()
    }

    /// False if there is no room for it.
    fn set(&mut self, number: u64, word: u64) -> bool {
        let place = self.place(number);
        if self.all().get(place).is_some_and(|found| found.0 == number) {
            self.words[place].1 = word;
            return true;
        }
        if self.count == MOST_FEW {
            return false;
        }
        self.words.copy_within(place..self.count, place + 1);
        self.words[place] = (number, word);
        self.count += 1;
        true
    }

    fn clear(&mut self, first: u64, last: u64) {
        let start = self.place(first);
        let gone = self.all()[start..].iter();
        let gone = gone.take_while(|&&(number, _)| number <= last).count();
        self.words.copy_within(start + gone..self.count, start);
        self.count -= gone;
    }
}

/// A word's number and value.
type Found = Option<(u64, u64)>;

impl Words {
    /// Memory that they take.
    pub(crate) fn footprint(&self) -> u64 {
        self.bytes as u64
    }

    pub(crate) fn get(&self, number: u64) -> Option<u64> {
        if self.has_no_tree() {
            let mut few = self.few.all().iter();
            return few.find(|found| found.0 == number).map(|found| found.1);
        }
        fits(number, self.height).then_some(())?;
        let (mut node, mut height) = (&self.root, self.height);
        loop {
            let here = place(number, height);
            node.has(here).then_some(())?;
            match &node.below {
                Below::Words(words) => return Some(words[node.index(here)]),
                Below::Nodes(nodes) => node = &nodes[node.index(here)],
            }
            height -= 1;
        }
    }

    /// The value of the last word below `number`.
    pub(crate) fn before(&self, number: u64) -> Option<u64> {
        self.last_to(number.checked_sub(1)?).map(|(_, word)| word)
    }

    /// The last word that isn't above `number`.
    ///
    /// Every conversion asks this some times, and most often that word is there.
    pub(crate) fn last_to(&self, number: u64) -> Found {
        match self.get(number) {
            Some(word) => Some((number, word)),
            None => self.last_below(number),
        }
    }

    /// The last word below `number`, which has none. No recursion: what is found on the way down is where to
    /// turn to if there is nothing at its end.
    fn last_below(&self, number: u64) -> Found {
        if self.has_no_tree() {
            let mut few = self.few.all().iter().rev();
            return few.find(|found| found.0 <= number).copied();
        }
        let (mut node, mut height) = (&self.root, self.height);
        // Nodes whose last place is asked for, and the places of `node` to choose from.
        let mut turn = None;
        let mut places = u64::MAX;
        let mut exact = fits(number, height);
        let mut path = 0;
        loop {
            if exact {
                let here = place(number, height);
                let below = node.present & !from(here);
                if below != 0 {
                    turn = Some((node, height, below, path));
                }
                places = node.present & 1 << here;
            } else {
                places &= node.present;
            }
            if places == 0 {
                (node, height, places, path) = turn.take()?;
                exact = false;
            }
            let place = 63 - places.leading_zeros();
            let index = node.index(place);
            path |= u64::from(place) << (PLACE_BITS * height);
            match &node.below {
                Below::Words(words) => return Some((path, words[index])),
                Below::Nodes(nodes) => node = &nodes[index],
            }
            height -= 1;
            places = u64::MAX;
        }
    }

    /// The first word above `number`.
    pub(crate) fn after(&self, number: u64) -> Found {
        self.first_from(number + 1)
    }

    /// The first word that isn't below `number`.
    pub(crate) fn first_from(&self, number: u64) -> Found {
        if self.has_no_tree() {
            let mut few = self.few.all().iter();
            return few.find(|found| found.0 >= number).copied();
        }
        fits(number, self.height).then_some(())?;
        let (mut node, mut height) = (&self.root, self.height);
        let mut turn = None;
        let mut places = u64::MAX;
        let mut exact = true;
        let mut path = 0;
        loop {
            if exact {
                let here = place(number, height);
                let above = node.present & !to(here);
                if above != 0 {
                    turn = Some((node, height, above, path));
                }
                places = node.present & 1 << here;
            } else {
                places &= node.present;
            }
            if places == 0 {
                (node, height, places, path) = turn.take()?;
                exact = false;
            }
            let place = places.trailing_zeros();
            let index = node.index(place);
            path |= u64::from(place) << (PLACE_BITS * height);
            match &node.below {
                Below::Words(words) => return Some((path, words[index])),
                Below::Nodes(nodes) => node = &nodes[index],
            }
            height -= 1;
            places = u64::MAX;
        }
    }

    /// What a word more takes is as little as what anybody allocates: if that is not to be had, the
    /// process ends, as for anybody else.
    pub(crate) fn set(&mut self, number: u64, word: u64) {
        if self.try_set(number, word).is_err() {
            handle_alloc_error(Layout::new::<[u64; ROOM]>());
        }
    }

    /// A word that is in the tree.
    fn find(&mut self, number: u64) -> Option<&mut u64> {
        fits(number, self.height).then_some(())?;
        let (mut node, mut height) = (&mut self.root, self.height);
        loop {
            let here = place(number, height);
            node.has(here).then_some(())?;
            let index = node.index(here);
            match &mut node.below {
                Below::Words(words) => return Some(&mut words[index]),
                Below::Nodes(nodes) => node = &mut nodes[index],
            }
            height -= 1;
        }
    }

    /// For who sets many. After a failure there are no words to be relied on.
    pub(crate) fn try_set(&mut self, number: u64, word: u64) -> Result<(), TryReserveError> {
        // It is there already, most often.
        if let Some(found) = self.find(number) {
            *found = word;
            return Ok(());
        }
        if self.has_no_tree() {
            if self.few.set(number, word) {
                return Ok(());
            }
            let few = std::mem::take(&mut self.few);
            for &(number, word) in few.all() {
                self.set_in_tree(number, word)?;
            }
        }
        self.set_in_tree(number, word)
    }

    fn has_no_tree(&self) -> bool {
        self.root.present == 0
    }

    fn set_in_tree(&mut self, number: u64, word: u64) -> Result<(), TryReserveError> {
        while !fits(number, self.height) {
            self.height += 1;
            if self.root.present != 0 {
                let mut nodes = Vec::new();
                self.bytes += insert(&mut nodes, 0, std::mem::take(&mut self.root))?;
                self.root = Node {
                    present: 1,
                    below: Below::Nodes(nodes),
                };
            }
        }
        self.bytes += self.root.set(number, self.height, word)?;
        Ok(())
    }

    /// Strikes out the words `first..=last`.
    pub(crate) fn clear(&mut self, first: u64, last: u64) {
        if self.has_no_tree() {
            self.few.clear(first, last);
            return;
        }
        if !fits(first, self.height) {
            return;
        }
        let last = if fits(last, self.height) {
            last
        } else {
            u64::MAX
        };
        self.bytes -= self.root.clear(first, last, self.height);
        if self.root.present == 0 {
            *self = Self::default();
        }
        while self.root.present == 1 && self.height > 0 {
            let Below::Nodes(nodes) = &mut self.root.below else {
                unreachable!("only the lowest level has no nodes");
            };
            let only = std::mem::take(&mut nodes[0]);
            self.bytes -= list_bytes(nodes);
            self.root = only;
            self.height -= 1;
        }
    }

    /// The words of `first..=last`, in order, with their numbers.
    pub(crate) fn range(&self, first: u64, last: u64) -> impl Iterator<Item = (u64, u64)> + '_ {
        let mut from = first;
        std::iter::from_fn(move || {
            let found = self
                .first_from(from)
                .filter(|&(number, _)| number <= last)?;
            from = found.0 + 1;
            Some(found)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    /// Numbers near each other and far apart, on both sides of the borders of nodes.
    fn number() -> impl Strategy<Value = u64> {
        (0..5u64, 0..4u64, 0..4u64).prop_map(|(far, near, bit)| {
            let far = [0, 1 << 6, 1 << 12, 1 << 30, 1 << 51][far as usize];
            (far + near * 63 + bit).saturating_sub(1)
        })
    }

    fn memory(node: &Node) -> usize {
        match &node.below {
            Below::Words(words) => list_bytes(words),
            Below::Nodes(nodes) => list_bytes(nodes) + nodes.iter().map(memory).sum::<usize>(),
        }
    }

    proptest! {
        #[test]
        fn words_are_a_map(
            ops in prop::collection::vec((any::<bool>(), number(), number(), any::<u64>()), 1..200),
            (asked, last) in (number(), number()),
        ) {
            let mut words = Words::default();
            let mut map = BTreeMap::new();
            for (set, at, end, value) in ops {
                if set {
                    words.set(at, value);
                    map.insert(at, value);
                } else {
                    let (at, end) = (at.min(end), at.max(end));
                    words.clear(at, end);
                    map.retain(|&number, _| number < at || number > end);
                }
                prop_assert_eq!(words.bytes, memory(&words.root));
            }
            let mut again = Words::default();
            for (&number, &value) in map.iter().rev() {
                again.set(number, value);
            }
            prop_assert_eq!(&words, &again);
            let pair = |(&number, &value): (&u64, &u64)| (number, value);
            prop_assert_eq!(words.get(asked), map.get(&asked).copied());
            prop_assert_eq!(words.before(asked), map.range(..asked).next_back().map(|(_, &v)| v));
            prop_assert_eq!(words.last_to(asked), map.range(..=asked).next_back().map(pair));
            prop_assert_eq!(words.after(asked), map.range(asked + 1..).next().map(pair));
            let (first, last) = (asked.min(last), asked.max(last));
            let range: Vec<_> = words.range(first, last).collect();
            let expected: Vec<_> = map.range(first..=last).map(pair).collect();
            prop_assert_eq!(range, expected);
        }
    }
}
