// SPDX-License-Identifier: MIT OR Apache-2.0
//! Areas of 1 GiB, with the largest IOMMU entries that their memory allows. For ordinary VMs, whose
//! memory never changes its attribute: a page only leaves when the host's hardware has lost it, and
//! then its piece goes and comes back without it.

use super::{uncut_removals, Ledger, Removals, Strategy};
use crate::units::{Iova, Offset, Span};

/// What an area is at most, and where areas end at the latest: offsets that are multiples of it. No IOMMU
/// entry is larger that a host has memory for.
pub(crate) const PIECE: u64 = 1 << 30;

#[derive(Debug)]
pub(super) struct Whole;

impl Strategy for Whole {
    fn areas(&self, gap: Span<Offset>) -> Box<dyn Iterator<Item = Span<Offset>>> {
        Box::new(gap.pieces(PIECE))
    }

    fn removals(&self, ledger: &Ledger, span: Span<Iova>) -> Option<Removals> {
        uncut_removals(ledger, span)
    }
}
