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
        let Some(mapped) = ledger.mapped_hull(span) else {
            return Some(Removals::new());
        };
        let removal = if ledger.is_whole(mapped) {
            // Areas that were cut before, or go as they came: one call less, and no lock.
            whole_areas(mapped)
        } else {
            Removal {
                span: mapped,
                how: How::Cut {
                    mapped_bytes: ledger.mapped_bytes(mapped),
                },
            }
        };
        Some(Removals::from_elem(removal, 1))
    }
}
