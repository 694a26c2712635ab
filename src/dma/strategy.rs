// SPDX-License-Identifier: MIT OR Apache-2.0
//! In which areas a window is mapped, and so how a part of it can leave again.
//!
//! A strategy decides; [`super::window`] does. To add one, add a module here and a line to
//! [`StrategyKind::strategy`].

mod cut;
mod page;
mod unit;
mod whole;

pub(crate) use whole::PIECE;

use super::ledger::Ledger;
use crate::run_set::Spans;
use crate::units::{Iova, Offset, Span, PAGE_SIZE};
use smallvec::SmallVec;
use std::fmt;

/// How a window is mapped.
pub(crate) trait Strategy: Sync + Send + fmt::Debug {
    /// Cuts `gap`, a range without areas, into the areas that it is to be mapped by.
    fn areas(&self, gap: Span<Offset>) -> Box<dyn Iterator<Item = Span<Offset>>>;

    /// How to unmap `span` so that no area is left in it and every page outside stays mapped, or
    /// comes back. `None` if areas reach beyond `span` and nothing can be done about it.
    fn removals(&self, ledger: &Ledger, span: Span<Iova>) -> Option<Removals>;
}

/// The unmap calls for one range.
pub(crate) type Removals = SmallVec<[Removal; 1]>;

/// One unmap call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Removal {
    /// What it takes out, mapped at either end.
    pub(crate) span: Span<Iova>,
    pub(crate) how: How,
}

/// What an unmap call does with areas that reach beyond its range. Between areas, nothing need be mapped:
/// the kernel takes out what there is (iopt_unmap_iova_range).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum How {
    /// There are none.
    Whole,
    /// It cuts them, and so many bytes are mapped.
    Cut { mapped_bytes: u64 },
    /// There are none since the range was widened: these parts of it are to be mapped again.
    Remap(Spans<Iova>),
}

/// Names of the strategies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StrategyKind {
    /// Areas of 1 GiB at most: nothing in them ever becomes private.
    Whole,
    /// One area per 4 KiB page: any page can leave by itself, at a map call for each.
    Page,
    /// One area per converted range, and any part of it can leave by itself. Needs an IOAS that was
    /// [prepared](crate::prepare_ioas).
    Cut,
    /// Areas of a unit at most, with large IOMMU entries. For a part to leave, all of its area
    /// leaves, and the rest comes back: devices that touch the rest meanwhile fault.
    Unit(u64),
}

impl StrategyKind {
    /// The word that `query-gmem` shows.
    pub fn name(self) -> &'static str {
        match self {
            StrategyKind::Whole => "whole",
            StrategyKind::Page => "page",
            StrategyKind::Cut => "cut",
            StrategyKind::Unit(_) => "unit",
        }
    }

    /// Whether a range without areas is mapped by one.
    pub(crate) fn is_one_area(self, gap: Span<Offset>) -> bool {
        let unit = match self {
            StrategyKind::Cut => return true,
            StrategyKind::Page => PAGE_SIZE,
            StrategyKind::Unit(bytes) => bytes,
            StrategyKind::Whole => PIECE,
        };
        gap.hull(unit).size_bytes() == unit
    }

    pub(crate) fn strategy(self) -> Box<dyn Strategy> {
        match self {
            StrategyKind::Whole => Box::new(whole::Whole),
            StrategyKind::Page => Box::new(page::Page),
            StrategyKind::Cut => Box::new(cut::Cut),
            StrategyKind::Unit(bytes) => Box::new(unit::Unit { bytes }),
        }
    }
}

impl fmt::Display for StrategyKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What any strategy without cuts does: one call for all areas, provided that `span` cuts none.
fn uncut_removals(ledger: &Ledger, span: Span<Iova>) -> Option<Removals> {
    let Some(hull) = ledger.hull(span) else {
        return Some(Removals::new());
    };
    span.contains(&hull)
        .then(|| Removals::from_elem(whole_areas(hull), 1))
}

fn whole_areas(span: Span<Iova>) -> Removal {
    Removal {
        span,
        how: How::Whole,
    }
}
