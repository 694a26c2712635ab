// SPDX-License-Identifier: MIT OR Apache-2.0
//! What all parts of a block refer to.

use super::pages::Pages;
use super::quarantine::Quarantine;
use crate::attributes::Attribute;
use crate::dma::{DmaSplit, PIECE};
use crate::machine::Machine;
use crate::plane::{Backing, Planes};
use crate::range_locks::RangeGuard;
use crate::stats::BlockCounters;
use crate::sync::{Arc, Instant};
use crate::units::{Offset, Span, PAGE_SIZE};

#[derive(Debug)]
pub(super) struct Core {
    pub(super) machine: Arc<Machine>,
    pub(super) number: u64,
    pub(super) name: String,
    pub(super) span: Span<Offset>,
    pub(super) confidential: bool,
    pub(super) dma_split: DmaSplit,
    pub(super) planes: Arc<Planes>,
    pub(super) pages: Pages,
    pub(super) quarantine: Quarantine,
    pub(super) counters: Arc<BlockCounters>,
}

impl Core {
    pub(super) fn backing(&self) -> Backing {
        self.planes.backing()
    }

    /// What to lock for a change of `span`: what the change may touch besides it. By `unit`, those
    /// are the areas in its units; a huge page of the shared plane comes and goes as a whole, and so do
    /// the pieces that windows of an ordinary block are mapped in.
    pub(super) fn lock_hull(&self, span: Span<Offset>) -> Span<Offset> {
        let unit = match self.confidential {
            true => self.dma_split.unit().unwrap_or(PAGE_SIZE),
            false => PIECE,
        };
        let hull = span.hull(unit.max(self.planes.huge_page().unwrap_or(PAGE_SIZE)));
        hull.intersection(&self.span).unwrap_or(span)
    }

    /// What has to leave the windows for `pages` to, and come back with what is in one unit with it, which
    /// an unmap that fails may have taken along: in an ordinary block, the pieces that windows are mapped
    /// in.
    pub(super) fn going_with(&self, pages: Span<Offset>) -> Span<Offset> {
        match self.confidential {
            true => pages,
            false => self.lock_hull(pages),
        }
    }

    /// Keeps `span`, and what a change of it may touch, from who else changes it.
    pub(super) fn lock(&self, span: Span<Offset>) -> RangeGuard<'_> {
        self.machine
            .ranges
            .lock((self.number, self.lock_hull(span)))
    }

    /// The same, for who has something else to do if somebody has it for long.
    pub(super) fn lock_until(
        &self,
        span: Span<Offset>,
        deadline: Instant,
    ) -> Option<RangeGuard<'_>> {
        let range = (self.number, self.lock_hull(span));
        self.machine.ranges.lock_until(range, deadline)
    }

    /// Notes what the kernel has just been told.
    pub(super) fn record(&self, span: Span<Offset>, attribute: Attribute) {
        let whole = self.pages.set(span, attribute);
        if self.backing() == Backing::InPlace {
            let counters = &self.counters;
            counters.huge_page_merges.add(whole.max(0).unsigned_abs());
            counters.huge_page_splits.add(whole.min(0).unsigned_abs());
        }
    }

    /// Whether no page of the block is quarantined or poisoned. With a range, none of it will be.
    pub(super) fn has_nothing_wrong(&self) -> bool {
        self.quarantine.is_empty() && !self.pages.has_poisoned()
    }
}
