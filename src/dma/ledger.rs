// SPDX-License-Identifier: MIT OR Apache-2.0
//! Which areas the kernel has in an IOAS on our behalf.
//!
//! The kernel removes an area whole or not at all, so areas never merge here either: the ledger is
//! what tells a harmless ENOENT from a device that goes on writing.

use crate::units::{Iova, Span};
use std::collections::{BTreeMap, BTreeSet};

/// Disjoint areas, by IOVA.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    /// First address to end, exclusive.
    areas: BTreeMap<u64, u64>,
    bytes: u64,
    /// First addresses of areas that may be gone: a call failed half-way, and so did asking. They
    /// count as mapped, since taking them for unmapped is how a device gets to write private pages.
    doubtful: BTreeSet<u64>,
}

impl Ledger {
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(crate) fn len(&self) -> u64 {
        self.areas.len() as u64
    }

    /// Enters an area that the kernel has just made. It overlaps no other: the kernel would have
    /// refused it.
    pub(crate) fn insert(&mut self, area: Span<Iova>) {
        debug_assert!(self.overlapping(area).is_empty());
        self.areas.insert(area.first(), area.end());
        self.bytes += area.size_bytes();
    }

    /// Strikes out the areas that lie in `span`.
    pub(crate) fn remove(&mut self, span: Span<Iova>) {
        for area in self.overlapping(span) {
            debug_assert!(span.contains(&area));
            self.areas.remove(&area.first());
            self.doubtful.remove(&area.first());
            self.bytes -= area.size_bytes();
        }
    }

    /// Notes whether it is certain that the kernel still has `area`.
    pub(crate) fn set_doubtful(&mut self, area: Span<Iova>, doubtful: bool) {
        if doubtful {
            self.doubtful.insert(area.first());
        } else {
            self.doubtful.remove(&area.first());
        }
    }

    /// The doubtful ones of [`Ledger::overlapping`].
    pub(crate) fn doubtful(&self, span: Span<Iova>) -> Vec<Span<Iova>> {
        if self.doubtful.is_empty() {
            return Vec::new();
        }
        let mut areas = self.overlapping(span);
        areas.retain(|area| self.doubtful.contains(&area.first()));
        areas
    }

    /// The areas that share an address with `span`, whole, in order.
    pub(crate) fn overlapping(&self, span: Span<Iova>) -> Vec<Span<Iova>> {
        let first = self
            .areas
            .range(..=span.first())
            .next_back()
            .filter(|&(_, &end)| end > span.first())
            .map_or(span.first(), |(&start, _)| start);
        self.areas
            .range(first..span.end())
            .map(|(&start, &end)| Span::between(start, end))
            .collect()
    }

    /// The areas of [`Ledger::overlapping`], neighbours taken together: what may be unmapped by one
    /// call each without touching what others have in the IOAS.
    pub(crate) fn runs(&self, span: Span<Iova>) -> Vec<Span<Iova>> {
        let mut runs: Vec<Span<Iova>> = Vec::new();
        for area in self.overlapping(span) {
            match runs.last_mut() {
                Some(run) if run.end() == area.first() => {
                    *run = Span::between(run.first(), area.end());
                }
                _ => runs.push(area),
            }
        }
        runs
    }

    /// The parts of `span` without an area, in order.
    pub(crate) fn gaps(&self, span: Span<Iova>) -> Vec<Span<Iova>> {
        let mut gaps = Vec::new();
        let mut at = span.first();
        for area in self.overlapping(span) {
            if at < area.first() {
                gaps.push(Span::between(at, area.first()));
            }
            at = area.end();
        }
        if at < span.end() {
            gaps.push(Span::between(at, span.end()));
        }
        gaps
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(first: u64, end: u64) -> Span<Iova> {
        Span::between(first * 4096, end * 4096)
    }

    #[test]
    fn neighbouring_areas_stay_apart() {
        let mut ledger = Ledger::default();
        ledger.insert(span(0, 2));
        ledger.insert(span(2, 3));
        assert_eq!(ledger.len(), 2);
        assert_eq!(ledger.overlapping(span(1, 3)), [span(0, 2), span(2, 3)]);
        ledger.remove(span(0, 2));
        assert_eq!((ledger.len(), ledger.bytes()), (1, 4096));
    }

    #[test]
    fn gaps_are_what_areas_leave() {
        let mut ledger = Ledger::default();
        ledger.insert(span(2, 4));
        ledger.insert(span(6, 7));
        assert_eq!(
            ledger.gaps(span(0, 8)),
            [span(0, 2), span(4, 6), span(7, 8)]
        );
        assert_eq!(ledger.gaps(span(3, 6)), [span(4, 6)]);
        assert!(ledger.gaps(span(2, 4)).is_empty());
    }
}
