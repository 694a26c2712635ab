// SPDX-License-Identifier: MIT OR Apache-2.0
//! A byte for each page of a plane: when the page has left it, and whether it has memory.
//!
//! Every conversion writes one, right after a VM exit, so it is an array and nothing cleverer: no search,
//! no memory to ask for. The kernel gives an array memory where it is written to first: a byte a page at
//! worst, a four-thousandth of the block.

use super::kept::Which;
use crate::units::{Offset, Span, PAGE_SIZE};
use memmap2::MmapMut;

/// The page has memory, as far as is known.
const BACKED: u8 = 1 << 7;
/// In which delay it was kept: a number from 1 to this one, 0 if it isn't. They come round: what was left for so
/// many delays has to wait for one more.
const AGES: u8 = BACKED - 1;

/// So many pages have a count of those that are kept, so that whoever looks for these looks there only.
const CHUNK: usize = 512;

/// What the kernel gives memory to at once.
const WRITTEN: usize = PAGE_SIZE as usize;

#[derive(Debug)]
pub(super) struct Stamps {
    pages: MmapMut,
    /// By chunk.
    kept: Box<[u16]>,
    /// Which parts of `pages` were written to.
    written: Box<[bool]>,
    /// The number of this delay.
    now: u8,
}

/// First page and end.
fn pages(span: Span<Offset>) -> (usize, usize) {
    let page = |at: u64| (at / PAGE_SIZE) as usize;
    (page(span.first()), page(span.end()))
}

fn offset(page: usize) -> u64 {
    page as u64 * PAGE_SIZE
}

impl Stamps {
    /// None are kept and none has memory. `None` if the kernel has no addresses or memory for them.
    pub(super) fn new(block: Span<Offset>) -> Option<Self> {
        let (_, end) = pages(block);
        let chunks = end.div_ceil(CHUNK);
        Some(Self {
            pages: MmapMut::map_anon(end).ok()?,
            kept: vec![0; chunks].into(),
            written: vec![false; end.div_ceil(WRITTEN)].into(),
            now: 1,
        })
    }

    /// Memory that they take at most, but for a constant.
    pub(super) fn footprint(&self) -> u64 {
        let written = self.written.iter().filter(|&&written| written).count();
        (written * WRITTEN + self.kept.len() * 2 + self.written.len()) as u64
    }

    /// The part of `span` that has stamps: what is beyond the block, as a part of a huge page may be, has
    /// none.
    fn range(&self, span: Span<Offset>) -> (usize, usize) {
        let (first, end) = pages(span);
        (first.min(self.pages.len()), end.min(self.pages.len()))
    }

    /// Stamps pages as kept now; answers how many bytes were not before.
    pub(super) fn keep(&mut self, span: Span<Offset>) -> u64 {
        let (first, end) = self.range(span);
        let mut more = 0;
        for page in first..end {
            let stamp = &mut self.pages[page];
            let new = u16::from(*stamp & AGES == 0);
            *stamp = *stamp & BACKED | self.now;
            self.kept[page / CHUNK] += new;
            more += u64::from(new);
        }
        self.write(first, end);
        more * PAGE_SIZE
    }

    /// Pages are kept no more; answers how many bytes were.
    pub(super) fn take(&mut self, span: Span<Offset>) -> u64 {
        let (first, end) = self.range(span);
        let mut less = 0;
        let mut at = first;
        while at < end {
            let next = ((at / CHUNK + 1) * CHUNK).min(end);
            if self.kept[at / CHUNK] != 0 {
                for page in at..next {
                    let was = u16::from(self.pages[page] & AGES != 0);
                    self.pages[page] &= BACKED;
                    self.kept[page / CHUNK] -= was;
                    less += u64::from(was);
                }
            }
            at = next;
        }
        less * PAGE_SIZE
    }

    pub(super) fn are_backed(&self, span: Span<Offset>) -> bool {
        let (first, end) = self.range(span);
        self.pages[first..end]
            .iter()
            .all(|stamp| stamp & BACKED != 0)
    }

    pub(super) fn set_backed(&mut self, span: Span<Offset>, backed: bool) {
        let (first, end) = self.range(span);
        let mut at = first;
        while at < end {
            let next = ((at / WRITTEN + 1) * WRITTEN).min(end);
            // What was never written to says no.
            if backed || self.written[at / WRITTEN] {
                for stamp in &mut self.pages[at..next] {
                    *stamp = *stamp & AGES | if backed { BACKED } else { 0 };
                }
            }
            at = next;
        }
        if backed {
            self.write(first, end);
        }
    }

    fn write(&mut self, first: usize, end: usize) {
        if first < end {
            self.written[first / WRITTEN..=(end - 1) / WRITTEN].fill(true);
        }
    }

    fn counts(&self, page: usize, which: Which) -> bool {
        let age = self.pages[page] & AGES;
        match which {
            Which::All => age != 0,
            Which::Due => age != 0 && age != self.now,
        }
    }

    /// The first page from `from` on that is kept, before `end`.
    pub(super) fn first(&self, from: u64, end: u64, which: Which) -> Option<u64> {
        let end = ((end / PAGE_SIZE) as usize).min(self.pages.len());
        let mut at = (from / PAGE_SIZE) as usize;
        while at < end {
            let next = ((at / CHUNK + 1) * CHUNK).min(end);
            if self.kept[at / CHUNK] != 0 {
                let found = (at..next).find(|&page| self.counts(page, which));
                if let Some(page) = found {
                    return Some(offset(page));
                }
            }
            at = next;
        }
        None
    }

    /// The first run from `from` on that is, as far as it goes before `end`.
    pub(super) fn next(&self, from: u64, end: u64, which: Which) -> Option<Span<Offset>> {
        let first = self.first(from, end, which)?;
        let last = ((end / PAGE_SIZE) as usize).min(self.pages.len());
        let mut page = (first / PAGE_SIZE) as usize;
        while page < last && self.counts(page, which) {
            page += 1;
        }
        Some(Span::between(first, offset(page)))
    }

    /// A delay has passed: what is kept in the next one is told from what was kept before.
    pub(super) fn age(&mut self) {
        self.now = self.now % AGES + 1;
    }
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests {
    use super::*;

    fn span(first: u64, end: u64) -> Span<Offset> {
        Span::between(first * PAGE_SIZE, end * PAGE_SIZE)
    }

    fn stamps() -> Stamps {
        Stamps::new(span(0, 3 * CHUNK as u64 - 7)).unwrap()
    }

    fn all(stamps: &Stamps, which: Which) -> Vec<Span<Offset>> {
        let end = offset(stamps.pages.len());
        let mut at = 0;
        std::iter::from_fn(|| {
            let run = stamps.next(at, end, which)?;
            at = run.end();
            Some(run)
        })
        .collect()
    }

    #[test]
    fn pages_are_kept_once_and_taken_once() {
        let mut stamps = stamps();
        let chunk = CHUNK as u64;
        assert_eq!(stamps.keep(span(chunk - 2, chunk + 3)), 5 * PAGE_SIZE);
        assert_eq!(stamps.keep(span(chunk, chunk + 4)), PAGE_SIZE);
        assert_eq!(all(&stamps, Which::All), [span(chunk - 2, chunk + 4)]);
        assert_eq!(stamps.take(span(chunk, chunk + 1)), PAGE_SIZE);
        assert_eq!(stamps.take(span(0, 2 * chunk)), 5 * PAGE_SIZE);
        assert_eq!(all(&stamps, Which::All), []);
        assert!(stamps.kept.iter().all(|&kept| kept == 0));
    }

    #[test]
    fn what_was_kept_before_the_last_delay_is_due_and_stays_so() {
        let mut stamps = stamps();
        stamps.keep(span(1, 2));
        assert_eq!(all(&stamps, Which::Due), []);
        stamps.age();
        stamps.keep(span(5, 6));
        assert_eq!(all(&stamps, Which::Due), [span(1, 2)]);
        for _ in 0..3 {
            stamps.age();
            assert_eq!(all(&stamps, Which::Due), [span(1, 2), span(5, 6)]);
        }
        // Kept anew, it isn't any more.
        stamps.keep(span(1, 2));
        assert_eq!(all(&stamps, Which::Due), [span(5, 6)]);
    }

    #[test]
    fn what_has_memory_is_told_apart_from_what_is_kept() {
        let mut stamps = stamps();
        stamps.set_backed(span(1, 4), true);
        stamps.keep(span(2, 6));
        assert!(stamps.are_backed(span(1, 4)) && !stamps.are_backed(span(3, 5)));
        stamps.take(span(2, 6));
        assert!(stamps.are_backed(span(1, 4)));
        stamps.set_backed(span(0, 3 * CHUNK as u64), false);
        assert!(!stamps.are_backed(span(1, 2)));
    }

    #[test]
    fn what_reaches_beyond_the_block_is_left_out() {
        let mut stamps = stamps();
        let end = stamps.pages.len() as u64;
        assert_eq!(stamps.keep(span(end - 1, end + 9)), PAGE_SIZE);
        assert_eq!(stamps.take(span(end - 1, end + 9)), PAGE_SIZE);
    }
}
