// SPDX-License-Identifier: MIT OR Apache-2.0
//! One area for all of a window, with the largest IOMMU entries that its memory allows. For
//! ordinary VMs, whose memory never changes its attribute.

use super::{uncut_removals, Ledger, Strategy, StrategyKind};
use crate::units::{Iova, Span};

#[derive(Debug)]
pub(super) struct Whole;

impl Strategy for Whole {
    fn kind(&self) -> StrategyKind {
        StrategyKind::Whole
    }

    fn areas(&self, gap: Span<Iova>) -> Box<dyn Iterator<Item = Span<Iova>>> {
        Box::new(std::iter::once(gap))
    }

    fn removals(&self, ledger: &Ledger, span: Span<Iova>) -> Option<Vec<Span<Iova>>> {
        uncut_removals(ledger, span)
    }
}
