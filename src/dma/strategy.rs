// SPDX-License-Identifier: MIT OR Apache-2.0
//! In which areas a window is mapped, and so how a part of it can leave again.
//!
//! A strategy decides; [`super::window`] does. To add one, add a module here and a line to
//! [`choose`].

mod page;
mod whole;

use super::ledger::Ledger;
use crate::units::{Iova, Span};
use std::fmt;

/// How a block's windows are mapped.
pub(crate) trait Strategy: Sync + fmt::Debug {
    /// The word that `query-gmem` shows.
    fn kind(&self) -> StrategyKind;

    /// Cuts `gap`, a range without areas, into the areas that it is to be mapped by.
    fn areas(&self, gap: Span<Iova>) -> Box<dyn Iterator<Item = Span<Iova>>>;

    /// The ranges to unmap so that no area is left in `span` and every area outside stays. `None`
    /// if areas reach beyond `span` and can't be cut.
    fn removals(&self, ledger: &Ledger, span: Span<Iova>) -> Option<Vec<Span<Iova>>>;
}

/// Names of the strategies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StrategyKind {
    /// One area per window: nothing in it ever becomes private.
    Whole,
    /// One area per 4 KiB page: any page can leave by itself, at a map call for each.
    Page,
}

impl fmt::Display for StrategyKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            StrategyKind::Whole => "whole",
            StrategyKind::Page => "page",
        })
    }
}

/// The strategy for a block whose pages `may_be_private`.
pub(crate) fn choose(may_be_private: bool) -> &'static dyn Strategy {
    if may_be_private {
        &page::Page
    } else {
        &whole::Whole
    }
}

/// What any strategy without cuts does: a call for each run of areas, provided that `span` cuts none.
fn uncut_removals(ledger: &Ledger, span: Span<Iova>) -> Option<Vec<Span<Iova>>> {
    let runs = ledger.runs(span);
    runs.iter().all(|run| span.contains(run)).then_some(runs)
}
