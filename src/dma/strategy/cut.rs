// SPDX-License-Identifier: MIT OR Apache-2.0
//! One area per converted range; what becomes private is cut out of it, and no neighbour ever
//! faults. The IOMMU's entries are single pages, and the cut areas never merge again.

use super::{whole_areas, How, Ledger, Removal, Removals, Strategy};
use crate::units::{Iova, Offset, Span};

#[derive(Debug)]
pub(super) struct Cut;

impl Strategy for Cut {
    fn areas(&self, gap: Span<Offset>) -> Box<dyn Iterator<Item = Span<Offset>>> {
        Box::new(std::iter::once(gap))
    }

    fn removals(&self, ledger: &Ledger, span: Span<Iova>) -> Option<Removals> {
        let removal = |span| {
            if ledger.is_whole(span) {
                // Areas that were cut before, or go as they came: one call less, and no lock.
                whole_areas(span)
            } else {
                Removal {
                    span,
                    how: How::Cut,
                }
            }
        };
        Some(ledger.mapped(span).into_iter().map(removal).collect())
    }
}
