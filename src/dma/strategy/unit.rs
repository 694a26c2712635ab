// SPDX-License-Identifier: MIT OR Apache-2.0
//! Areas of a unit at most, with the largest IOMMU entries that fit. What becomes private takes its
//! area with it for a moment, in which devices that use the neighbours fault: for those who know
//! that theirs don't, or that convert whole units.

use super::{uncut_removals, whole_areas, How, Ledger, Removal, Removals, Strategy};
use crate::run_set::Spans;
use crate::units::{Iova, Offset, Span};

#[derive(Debug)]
pub(super) struct Unit {
    /// A power of two. No area crosses a multiple of it, so whoever holds a whole unit holds all
    /// areas in it.
    pub(super) bytes: u64,
}

impl Strategy for Unit {
    fn areas(&self, gap: Span<Offset>) -> Box<dyn Iterator<Item = Span<Offset>>> {
        Box::new(gap.pieces(self.bytes))
    }

    fn removals(&self, ledger: &Ledger, span: Span<Iova>) -> Option<Removals> {
        // What comes back has to be told from what was not there: no call for several then.
        if let Some(removals) = uncut_removals(ledger, span) {
            return Some(removals);
        }
        let mut removals = Removals::new();
        for run in ledger.runs(span) {
            let before =
                (run.first() < span.first()).then(|| Span::between(run.first(), span.first()));
            let after = (span.end() < run.end()).then(|| Span::between(span.end(), run.end()));
            let remap: Spans<Iova> = before.into_iter().chain(after).collect();
            removals.push(if remap.is_empty() {
                whole_areas(run)
            } else {
                Removal {
                    span: run,
                    how: How::Remap(remap),
                }
            });
        }
        Some(removals)
    }
}
