// SPDX-License-Identifier: MIT OR Apache-2.0
//! What should be the case: which pages are private and what the guest has written where. No measurement in here;
//! scenarios compare it with what QEMU, the kernel and the guest say.

use crate::monitor::protocol::pattern;
use std::collections::BTreeMap;
use std::ops::Range;

pub const PAGE: u64 = 4096;

/// Where RAM goes on that is not below the hole of a PC.
const HIGH: u64 = 4 << 30;

/// Where a part of a block appears in guest physical memory.
#[derive(Clone, Debug)]
struct Part {
    block: usize,
    offset: u64,
    gpa: u64,
    bytes: u64,
}

/// A block as the scenario configured it.
#[derive(Clone, Debug)]
pub struct Block {
    pub id: &'static str,
    pub bytes: u64,
    /// Size of the pages that its shared bytes are in.
    pub page_bytes: u64,
}

impl Block {
    /// A block whose shared bytes are in small pages.
    pub fn small(id: &'static str, bytes: u64) -> Self {
        Self::huge(id, bytes, PAGE)
    }

    /// A block whose shared bytes are in huge pages.
    pub fn huge(id: &'static str, bytes: u64, page_bytes: u64) -> Self {
        Self {
            id,
            bytes,
            page_bytes,
        }
    }
}

/// A guest's memory as it should be.
pub struct Ledger {
    pub blocks: Vec<Block>,
    parts: Vec<Part>,
    /// One flag per page of each block.
    private: Vec<Vec<bool>>,
    /// What each page holds, by guest physical address: the seed of its pattern.
    contents: BTreeMap<u64, u64>,
    /// Where RAM starts private: what is not, by guest physical address.
    open: Option<Range<u64>>,
}

impl Ledger {
    /// Blocks that follow one another from address 0 on, all of them shared.
    pub fn new(blocks: Vec<Block>) -> Self {
        Self::around(blocks, u64::MAX, u64::MAX)
    }

    /// The same, but what is beyond the first `low` bytes begins at 4 GiB.
    pub fn with_hole(blocks: Vec<Block>, low: u64) -> Self {
        Self::around(blocks, low, HIGH)
    }

    fn around(blocks: Vec<Block>, low: u64, high: u64) -> Self {
        let mut parts = Vec::new();
        let mut start = 0;
        for (block, Block { bytes, .. }) in blocks.iter().enumerate() {
            let below = low.saturating_sub(start).min(*bytes);
            let mut part = |offset, gpa, bytes| {
                parts.push(Part {
                    block,
                    offset,
                    gpa,
                    bytes,
                });
            };
            if below > 0 {
                part(0, start, below);
            }
            if below < *bytes {
                part(below, start + below - low + high, bytes - below);
            }
            start += bytes;
        }
        let private = blocks
            .iter()
            .map(|block| vec![false; (block.bytes / PAGE) as usize])
            .collect();
        Self {
            blocks,
            parts,
            private,
            contents: BTreeMap::new(),
            open: None,
        }
    }

    /// RAM starts private, now and after each reset and where it is plugged, but for a range of guest physical addresses.
    pub fn private_but(mut self, open: Range<u64>) -> Self {
        self.open = Some(open);
        self.reset();
        self
    }

    /// A block comes to the guest, all of it shared; or private, where RAM starts so.
    pub fn plug(&mut self, block: Block, gpa: u64) {
        self.parts.push(Part {
            block: self.blocks.len(),
            offset: 0,
            gpa,
            bytes: block.bytes,
        });
        self.private
            .push(vec![self.open.is_some(); (block.bytes / PAGE) as usize]);
        self.blocks.push(block);
    }

    /// The block that came last goes.
    pub fn unplug(&mut self) {
        let last = self.blocks.len() - 1;
        self.parts.retain(|part| part.block != last);
        self.private.pop();
        self.blocks.pop();
        let known = std::mem::take(&mut self.contents);
        self.contents = known
            .into_iter()
            .filter(|&(page, _)| self.place(page).is_some())
            .collect();
    }

    /// Where there is memory, in order.
    pub fn places(&self) -> Vec<Range<u64>> {
        let mut places: Vec<_> = self
            .parts
            .iter()
            .map(|part| part.gpa..part.gpa + part.bytes)
            .collect();
        places.sort_by_key(|place| place.start);
        places.dedup_by(|next, last| {
            let joins = last.end == next.start;
            if joins {
                last.end = next.end;
            }
            joins
        });
        places
    }

    /// The block and offset behind a guest physical address.
    pub fn place(&self, gpa: u64) -> Option<(usize, u64)> {
        self.parts
            .iter()
            .find(|part| (part.gpa..part.gpa + part.bytes).contains(&gpa))
            .map(|part| (part.block, part.offset + (gpa - part.gpa)))
    }

    /// A conversion succeeded: pages whose attribute changes lose their contents; the others keep them.
    pub fn convert(&mut self, gpa: u64, bytes: u64, private: bool) {
        for page in pages(gpa, bytes) {
            let Some((block, offset)) = self.place(page) else {
                continue;
            };
            let flag = &mut self.private[block][(offset / PAGE) as usize];
            if *flag != private {
                *flag = private;
                self.contents.remove(&page);
            }
        }
    }

    /// The guest wrote the pattern of `seed`.
    pub fn fill(&mut self, gpa: u64, bytes: u64, seed: u64) {
        for page in pages(gpa, bytes) {
            self.contents.insert(page, seed);
        }
    }

    /// What was written there is lost.
    pub fn forget(&mut self, gpa: u64, bytes: u64) {
        for page in pages(gpa, bytes) {
            self.contents.remove(&page);
        }
    }

    /// What was written outside of `kept` needs no looking at any more.
    pub fn forget_outside(&mut self, kept: Range<u64>) {
        self.contents.retain(|page, _| kept.contains(page));
    }

    /// Every page is shared again, or private where RAM starts so, and nobody knows what is in it.
    pub fn reset(&mut self) {
        for block in &mut self.private {
            block.fill(self.open.is_some());
        }
        if let Some(open) = self.open.clone() {
            self.convert(open.start, open.end - open.start, false);
        }
        self.contents.clear();
    }

    pub fn is_private(&self, gpa: u64) -> bool {
        self.place(gpa)
            .is_some_and(|(block, offset)| self.private[block][(offset / PAGE) as usize])
    }

    /// Private bytes of one block.
    pub fn private_bytes(&self, block: usize) -> u64 {
        self.private[block].iter().filter(|flag| **flag).count() as u64 * PAGE
    }

    /// Private bytes of all blocks.
    pub fn all_private_bytes(&self) -> u64 {
        (0..self.blocks.len())
            .map(|block| self.private_bytes(block))
            .sum()
    }

    /// Private runs of one block, as ranges of offsets that are as long as can be.
    pub fn private_runs(&self, block: usize) -> Vec<Range<u64>> {
        let mut runs: Vec<Range<u64>> = Vec::new();
        for (index, _) in self.private[block]
            .iter()
            .enumerate()
            .filter(|(_, flag)| **flag)
        {
            let offset = index as u64 * PAGE;
            match runs.last_mut() {
                Some(run) if run.end == offset => run.end += PAGE,
                _ => runs.push(offset..offset + PAGE),
            }
        }
        runs
    }

    /// How many pages of the size that the block's shared bytes are in hold a shared byte.
    pub fn live_pages(&self, block: usize) -> u64 {
        let small = (self.blocks[block].page_bytes / PAGE) as usize;
        let live = |pages: &&[bool]| pages.iter().any(|private| !private);
        self.private[block].chunks(small).filter(live).count() as u64
    }

    /// What the guest should find: neighbouring pages of one seed, private or not, as one range (gpa, bytes, seed).
    pub fn contents(&self) -> Vec<(u64, u64, u64)> {
        let mut ranges: Vec<(u64, u64, u64)> = Vec::new();
        for (&page, &seed) in &self.contents {
            match ranges.last_mut() {
                Some((start, bytes, last)) if *start + *bytes == page && *last == seed => {
                    *bytes += PAGE
                }
                _ => ranges.push((page, PAGE, seed)),
            }
        }
        ranges
    }

    /// The first words of all private pages with known contents: what the host must find nowhere.
    pub fn secrets(&self) -> impl Iterator<Item = u64> + '_ {
        self.contents
            .iter()
            .filter(|(page, _)| self.is_private(**page))
            .map(|(page, seed)| pattern(*seed, *page))
    }
}

fn pages(gpa: u64, bytes: u64) -> impl Iterator<Item = u64> {
    (gpa..gpa + bytes).step_by(PAGE as usize)
}

#[cfg(test)]
mod tests {
    use super::{Block, Ledger, PAGE};

    /// Block 0 at 0, block 1 in two parts: right after it, and far above.
    fn ledger() -> Ledger {
        let block = |id| Block::small(id, 4 * PAGE);
        Ledger::around(vec![block("ram0"), block("ram1")], 6 * PAGE, 100 * PAGE)
    }

    /// Private runs in pages.
    fn runs(ledger: &Ledger, block: usize) -> Vec<(u64, u64)> {
        let runs = ledger.private_runs(block);
        runs.iter()
            .map(|run| (run.start / PAGE, run.end / PAGE))
            .collect()
    }

    #[test]
    fn a_range_over_two_blocks_lands_in_both() {
        let mut ledger = ledger();
        ledger.convert(3 * PAGE, 2 * PAGE, true);
        assert_eq!(runs(&ledger, 0), [(3, 4)]);
        assert_eq!(runs(&ledger, 1), [(0, 1)]);
        assert_eq!(ledger.all_private_bytes(), 2 * PAGE);
    }

    #[test]
    fn runs_are_by_offset_and_not_by_address() {
        let mut ledger = ledger();
        ledger.convert(5 * PAGE, PAGE, true);
        ledger.convert(100 * PAGE, PAGE, true);
        assert_eq!(runs(&ledger, 1), [(1, 3)]);
    }

    #[test]
    fn what_starts_private_is_so_again_after_a_reset() {
        let mut ledger = ledger().private_but(PAGE..2 * PAGE);
        for _ in 0..2 {
            assert_eq!(runs(&ledger, 0), [(0, 1), (2, 4)]);
            assert_eq!(runs(&ledger, 1), [(0, 4)]);
            ledger.fill(0, PAGE, 1);
            ledger.convert(0, 3 * PAGE, false);
            ledger.reset();
            assert!(ledger.contents().is_empty());
        }
        ledger.plug(Block::small("ram2", 2 * PAGE), 200 * PAGE);
        assert_eq!(runs(&ledger, 2), [(0, 2)]);
    }

    #[test]
    fn a_conversion_that_changes_nothing_keeps_contents() {
        let mut ledger = ledger();
        ledger.fill(0, 2 * PAGE, 7);
        ledger.convert(0, PAGE, false);
        assert_eq!(ledger.contents(), [(0, 2 * PAGE, 7)]);
        ledger.convert(0, PAGE, true);
        assert_eq!(ledger.contents(), [(PAGE, PAGE, 7)]);
        assert_eq!(ledger.secrets().count(), 0);
        ledger.fill(0, PAGE, 7);
        assert_eq!(ledger.contents(), [(0, 2 * PAGE, 7)]);
        assert_eq!(ledger.secrets().count(), 1);
    }
}
