// SPDX-License-Identifier: MIT OR Apache-2.0
//! One area for all of a window, with the largest IOMMU entries that its memory allows. For
//! ordinary VMs, whose memory never changes its attribute.

use super::{uncut_removals, Ledger, Removals, Strategy};
use crate::units::{Iova, Offset, Span};

#[derive(Debug)]
pub(super) struct Whole;

impl Strategy for Whole {
    fn areas(&self, gap: Span<Offset>) -> Box<dyn Iterator<Item = Span<Offset>>> {
        Box::new(std::iter::once(gap))
    }

    fn removals(&self, ledger: &Ledger, span: Span<Iova>) -> Option<Removals> {
        uncut_removals(ledger, span)
    }
}
