// SPDX-License-Identifier: MIT OR Apache-2.0
//! A sparse array of 64-bit words.

use std::collections::BTreeMap;

/// Words that one node of the tree holds together: those that look-ups of neighbours share.
const REGION: u64 = 64;

/// Words by number; most numbers have none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Words {
    /// None is empty.
    regions: BTreeMap<u64, Region>,
    count: u64,
}

/// What a region costs without its words: its pair in a half-full leaf of the tree with six of
/// eleven, the node above it, and malloc's part.
const REGION_BYTES: u64 = (11 * (8 + 32) + 16) / 6 + (11 * 40 + 12 * 8 + 16) / 36 + 24;
/// Words that a region has room for beyond those that it holds.
const ROOM: usize = 4;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Region {
    /// Which words of the region there are.
    present: u64,
    /// Those, in order.
    words: Vec<u64>,
}

/// The region of a word, and its bit there.
fn place(word: u64) -> (u64, u32) {
    (word / REGION, (word % REGION) as u32)
}

impl Region {
    fn index(&self, bit: u32) -> usize {
        (self.present & ((1 << bit) - 1)).count_ones() as usize
    }

    fn get(&self, bit: u32) -> Option<u64> {
        (self.present >> bit & 1 == 1).then(|| self.words[self.index(bit)])
    }

    /// The last word of `bits`, of which there is one, and its number in all; this is region `number`.
    fn last(&self, number: u64, bits: u64) -> (u64, u64) {
        let bit = 63 - (self.present & bits).leading_zeros();
        (
            number * REGION + u64::from(bit),
            self.words[self.index(bit)],
        )
    }

    /// The first one.
    fn first(&self, number: u64, bits: u64) -> (u64, u64) {
        let bit = (self.present & bits).trailing_zeros();
        (
            number * REGION + u64::from(bit),
            self.words[self.index(bit)],
        )
    }

    fn set(&mut self, bit: u32, value: u64) -> bool {
        let index = self.index(bit);
        if self.present >> bit & 1 == 1 {
            self.words[index] = value;
            return false;
        }
        if self.words.len() == self.words.capacity() {
            self.words.reserve_exact(ROOM);
        }
        self.words.insert(index, value);
        self.present |= 1 << bit;
        true
    }

    /// Strikes out the words of `bits`; says how many there were.
    fn clear(&mut self, bits: u64) -> u64 {
        let gone = self.present & bits;
        if gone == 0 {
            return 0;
        }
        let first = self.index(gone.trailing_zeros());
        let count = gone.count_ones() as usize;
        // Bits of a range are words in a row.
        self.words.drain(first..first + count);
        self.present &= !gone;
        if self.words.capacity() > self.words.len() + 2 * ROOM {
            self.words.shrink_to(self.words.len() + ROOM);
        }
        count as u64
    }
}

impl Words {
    /// Memory that it takes at most, but for a constant.
    pub(super) fn footprint(&self) -> u64 {
        let room = REGION_BYTES + 2 * ROOM as u64 * 8;
        self.regions.len() as u64 * room + self.count * 8
    }

    pub(super) fn get(&self, word: u64) -> Option<u64> {
        let (region, bit) = place(word);
        self.regions.get(&region)?.get(bit)
    }

    /// The last word below `word`: its value.
    pub(super) fn before(&self, word: u64) -> Option<u64> {
        let (region, bit) = place(word);
        self.last_of(region, (1 << bit) - 1).map(|(_, value)| value)
    }

    /// `word` if it is there, and else the last below it: its number and value.
    pub(super) fn last_to(&self, word: u64) -> Option<(u64, u64)> {
        let (region, bit) = place(word);
        self.last_of(region, u64::MAX >> (63 - bit))
    }

    /// The last word of a region that is one of `bits`, or else of those before it.
    fn last_of(&self, region: u64, bits: u64) -> Option<(u64, u64)> {
        // Mostly it is there, and a range of a tree takes twice as long to find.
        match self.regions.get(&region) {
            Some(found) if found.present & bits != 0 => Some(found.last(region, bits)),
            _ => {
                let (&number, found) = self.regions.range(..region).next_back()?;
                Some(found.last(number, u64::MAX))
            }
        }
    }

    /// The first word above `word`: its number and value.
    pub(super) fn after(&self, word: u64) -> Option<(u64, u64)> {
        let (region, bit) = place(word);
        let above = (u64::MAX << bit) << 1;
        match self.regions.get(&region) {
            Some(found) if found.present & above != 0 => Some(found.first(region, above)),
            _ => {
                let (&number, found) = self.regions.range(region + 1..).next()?;
                Some(found.first(number, u64::MAX))
            }
        }
    }

    pub(super) fn set(&mut self, word: u64, value: u64) {
        let (region, bit) = place(word);
        let added = self.regions.entry(region).or_default().set(bit, value);
        self.count += u64::from(added);
    }

    /// Strikes out the words `first..=last`.
    pub(super) fn clear(&mut self, first: u64, last: u64) {
        if self.count == 0 {
            return;
        }
        let ((first, low), (last, high)) = (place(first), place(last));
        let bits = |number: u64| {
            let above = if number == first {
                u64::MAX << low
            } else {
                u64::MAX
            };
            let below = if number == last {
                u64::MAX >> (63 - high)
            } else {
                u64::MAX
            };
            above & below
        };
        let mut emptied = Vec::new();
        for (&number, region) in self.regions.range_mut(first..=last) {
            self.count -= region.clear(bits(number));
            if region.present == 0 {
                emptied.push(number);
            }
        }
        for number in emptied {
            self.regions.remove(&number);
        }
    }

    /// The words of `first..=last`, in order, with their numbers.
    pub(super) fn range(&self, first: u64, last: u64) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.regions
            .range(place(first).0..=place(last).0)
            .flat_map(|(&number, region)| {
                let mut left = region.present;
                region.words.iter().map(move |&value| {
                    let bit = left.trailing_zeros();
                    left &= left - 1;
                    (number * REGION + u64::from(bit), value)
                })
            })
            .skip_while(move |&(number, _)| number < first)
            .take_while(move |&(number, _)| number <= last)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn words_are_a_map(
            ops in prop::collection::vec((any::<bool>(), 0..400u64, 0..150u64, any::<u64>()), 1..200),
            (from, length) in (0..400u64, 0..400u64),
        ) {
            let mut words = Words::default();
            let mut map = BTreeMap::new();
            for (set, at, length, value) in ops {
                if set {
                    words.set(at, value);
                    map.insert(at, value);
                } else {
                    words.clear(at, at + length);
                    map.retain(|&number, _| number < at || number > at + length);
                }
                prop_assert_eq!(words.count, map.len() as u64);
                prop_assert!(words.regions.values().all(|region| region.present != 0));
            }
            prop_assert_eq!(words.get(from), map.get(&from).copied());
            prop_assert_eq!(words.before(from), map.range(..from).next_back().map(|(_, &v)| v));
            let last = map.range(..=from).next_back().map(|(&n, &v)| (n, v));
            prop_assert_eq!(words.last_to(from), last);
            let next = map.range(from + 1..).next().map(|(&n, &v)| (n, v));
            prop_assert_eq!(words.after(from), next);
            let range: Vec<_> = words.range(from, from + length).collect();
            let expected: Vec<_> = map.range(from..=from + length).map(|(&n, &v)| (n, v)).collect();
            prop_assert_eq!(range, expected);
        }
    }
}
