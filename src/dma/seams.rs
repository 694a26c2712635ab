// SPDX-License-Identifier: MIT OR Apache-2.0
//! Where one kernel area ends and the next begins, in memory that a guest can't make grow.
//!
//! A guest that alternates pages ends up with an area for every page. A list of areas would then
//! weigh as much as one hundredth of its memory; one bit a page is 64 bytes for 2 MiB.

use crate::units::{Iova, Span, PAGE_SIZE};
use crate::words::Words;

const BITS: u64 = u64::BITS as u64;

/// A set of page addresses.
#[derive(Debug, Default)]
pub(super) struct Seams {
    /// A bit for each page; no word is 0.
    words: Words,
    count: u64,
}

/// The word of an address, and its bit there.
fn place(address: u64) -> (u64, u64) {
    let page = address / PAGE_SIZE;
    (page / BITS, page % BITS)
}

fn address(word: u64, bit: u32) -> u64 {
    (word * BITS + u64::from(bit)) * PAGE_SIZE
}

impl Seams {
    pub(super) fn count(&self) -> u64 {
        self.count
    }

    /// Memory that the set takes.
    pub(super) fn footprint(&self) -> u64 {
        self.words.footprint()
    }

    pub(super) fn insert(&mut self, at: u64) {
        let (number, bit) = place(at);
        let word = self.words.get(number).unwrap_or(0);
        self.count += u64::from(word >> bit & 1 == 0);
        self.words.set(number, word | 1 << bit);
    }

    pub(super) fn contains(&self, at: u64) -> bool {
        let (number, bit) = place(at);
        let word = self.words.get(number);
        word.is_some_and(|word| word >> bit & 1 == 1)
    }

    /// Strikes out all from the first address of `span` to its end, the end included.
    pub(super) fn remove_to_end(&mut self, span: Span<Iova>) {
        let (first, low) = place(span.first());
        let (last, high) = place(span.end());
        // Nearly always: nothing to search for.
        if self.count == 0 || first == last && self.words.get(first).is_none() {
            return;
        }
        let mut next = first;
        while let Some((number, word)) = self.words.first_from(next) {
            if number > last {
                break;
            }
            let mut gone = word;
            if number == first {
                gone &= u64::MAX << low;
            }
            if number == last {
                gone &= u64::MAX >> (BITS - 1 - high);
            }
            self.count -= u64::from(gone.count_ones());
            match word & !gone {
                0 => self.words.clear(number, number),
                left => self.words.set(number, left),
            }
            if number == last {
                break;
            }
            next = number + 1;
        }
    }

    /// The last one at or below `at`, if it isn't below `limit`.
    pub(super) fn last_to(&self, at: u64, limit: u64) -> Option<u64> {
        let (number, bit) = place(at);
        let here = self.words.get(number).unwrap_or(0) & u64::MAX >> (BITS - 1 - bit);
        let (number, word) = match here {
            0 => self.words.last_to(number.checked_sub(1)?)?,
            word => (number, word),
        };
        Some(address(number, 63 - word.leading_zeros())).filter(|&seam| seam >= limit)
    }

    /// The first one at or above `at` and below `limit`.
    pub(super) fn first_from(&self, at: u64, limit: u64) -> Option<u64> {
        let (number, bit) = place(at);
        let here = self.words.get(number).unwrap_or(0) & u64::MAX << bit;
        let (number, word) = match here {
            0 => self.words.after(number)?,
            word => (number, word),
        };
        Some(address(number, word.trailing_zeros())).filter(|&seam| seam < limit)
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
