// SPDX-License-Identifier: MIT OR Apache-2.0
//! One area per page. Exact, on every kernel, and dear: 512 map calls and about 200 KiB of kernel
//! memory for 2 MiB.

use super::{uncut_removals, Ledger, Removals, Strategy};
use crate::units::{Iova, Offset, Span, PAGE_SIZE};

#[derive(Debug)]
pub(super) struct Page;

impl Strategy for Page {
    fn areas(&self, gap: Span<Offset>) -> Box<dyn Iterator<Item = Span<Offset>>> {
        let pages = gap.size_bytes() / PAGE_SIZE;
        Box::new((0..pages).map(move |page| {
            let start = gap.first() + page * PAGE_SIZE;
            Span::between(start, start + PAGE_SIZE)
        }))
    }

    fn removals(&self, ledger: &Ledger, span: Span<Iova>) -> Option<Removals> {
        uncut_removals(ledger, span)
    }
}
