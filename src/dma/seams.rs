// SPDX-License-Identifier: MIT OR Apache-2.0
//! Where one kernel area ends and the next begins, in memory that a guest can't make grow.
//!
//! A guest that alternates pages ends up with an area for every page. A list of areas would then
//! weigh as much as one hundredth of its memory; one bit a page is 64 bytes for 2 MiB.

use crate::units::{Iova, Span, PAGE_SIZE};
use std::collections::BTreeMap;

const PAGES_PER_CHUNK: u64 = 512;
const WORDS: usize = (PAGES_PER_CHUNK / 64) as usize;

/// What a chunk costs at most, in half-full nodes: a leaf of 11 × 72 + 16 bytes holds six.
const CHUNK_FOOTPRINT: u64 = (11 * 72 + 16) / 6 + 48;

/// A set of page addresses.
#[derive(Debug, Default)]
pub(super) struct Seams {
    /// By chunk number; none is empty.
    chunks: BTreeMap<u64, [u64; WORDS]>,
    count: u64,
}

/// The chunk of an address, and its bit there.
fn place(address: u64) -> (u64, usize) {
    let page = address / PAGE_SIZE;
    (page / PAGES_PER_CHUNK, (page % PAGES_PER_CHUNK) as usize)
}

fn address(chunk: u64, bit: usize) -> u64 {
    (chunk * PAGES_PER_CHUNK + bit as u64) * PAGE_SIZE
}

/// The bits of word `word` that lie in `from..=to` of a chunk.
fn mask(word: usize, from: usize, to: usize) -> u64 {
    let (low, high) = (word * 64, word * 64 + 63);
    if to < low || from > high {
        return 0;
    }
    let above = u64::MAX << (from.max(low) - low);
    let below = u64::MAX >> (high - to.min(high));
    above & below
}

impl Seams {
    pub(super) fn count(&self) -> u64 {
        self.count
    }

    /// Memory that the set takes at most, but for a constant.
    pub(super) fn footprint(&self) -> u64 {
        self.chunks.len() as u64 * CHUNK_FOOTPRINT
    }

    pub(super) fn insert(&mut self, at: u64) {
        let (chunk, bit) = place(at);
        let word = &mut self.chunks.entry(chunk).or_default()[bit / 64];
        let added = 1 << (bit % 64);
        self.count += u64::from(*word & added == 0);
        *word |= added;
    }

    pub(super) fn contains(&self, at: u64) -> bool {
        let (chunk, bit) = place(at);
        self.chunks
            .get(&chunk)
            .is_some_and(|words| words[bit / 64] >> (bit % 64) & 1 == 1)
    }

    /// Strikes out all from the first address of `span` to its end, the end included.
    pub(super) fn remove_to_end(&mut self, span: Span<Iova>) {
        let (first, from) = place(span.first());
        let (last, to) = place(span.end());
        let mut emptied = Vec::new();
        for (&number, words) in self.chunks.range_mut(first..=last) {
            let from = if number == first { from } else { 0 };
            let to = if number == last {
                to
            } else {
                PAGES_PER_CHUNK as usize - 1
            };
            for (index, word) in words.iter_mut().enumerate() {
                let gone = *word & mask(index, from, to);
                self.count -= u64::from(gone.count_ones());
                *word &= !gone;
            }
            if words.iter().all(|&word| word == 0) {
                emptied.push(number);
            }
        }
        for number in emptied {
            self.chunks.remove(&number);
        }
    }

    /// The last one at or below `at`, if it isn't below `limit`.
    pub(super) fn last_to(&self, at: u64, limit: u64) -> Option<u64> {
        if at < limit {
            return None;
        }
        let (chunk, to) = place(at);
        let (first, _) = place(limit);
        for (&number, words) in self.chunks.range(first..=chunk).rev() {
            let to = if number == chunk {
                to
            } else {
                PAGES_PER_CHUNK as usize - 1
            };
            for index in (0..WORDS).rev() {
                let found = words[index] & mask(index, 0, to);
                if found != 0 {
                    let bit = index * 64 + 63 - found.leading_zeros() as usize;
                    return Some(address(number, bit)).filter(|&seam| seam >= limit);
                }
            }
        }
        None
    }

    /// The first one at or above `at` and below `limit`.
    pub(super) fn first_from(&self, at: u64, limit: u64) -> Option<u64> {
        if at >= limit {
            return None;
        }
        let (chunk, from) = place(at);
        let (last, _) = place(limit - 1);
        for (&number, words) in self.chunks.range(chunk..=last) {
            let from = if number == chunk { from } else { 0 };
            for (index, &word) in words.iter().enumerate() {
                let found = word & mask(index, from, PAGES_PER_CHUNK as usize - 1);
                if found != 0 {
                    let bit = index * 64 + found.trailing_zeros() as usize;
                    return Some(address(number, bit)).filter(|&seam| seam < limit);
                }
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    const PAGES: u64 = 1500;

    proptest! {
        #[test]
        fn seams_are_a_set_of_pages(
            ops in prop::collection::vec((any::<bool>(), 0..PAGES, 1..700u64), 1..80),
            at in 0..PAGES,
            limit in 0..PAGES,
        ) {
            let mut seams = Seams::default();
            let mut set = BTreeSet::new();
            for (insert, first, count) in ops {
                let (start, end) = (first * PAGE_SIZE, (first + count) * PAGE_SIZE);
                if insert {
                    seams.insert(start);
                    set.insert(start);
                } else {
                    seams.remove_to_end(Span::between(start, end));
                    set.retain(|&seam| seam < start || seam > end);
                }
                prop_assert_eq!(seams.count(), set.len() as u64);
            }
            let (at, limit) = (at * PAGE_SIZE, limit * PAGE_SIZE);
            prop_assert_eq!(seams.contains(at), set.contains(&at));
            prop_assert_eq!(
                seams.first_from(at, limit),
                set.iter().copied().find(|&seam| seam >= at && seam < limit)
            );
            prop_assert_eq!(
                seams.last_to(at, limit),
                set.iter().rev().copied().find(|&seam| seam <= at && seam >= limit)
            );
        }
    }
}
