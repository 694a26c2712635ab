// SPDX-License-Identifier: MIT OR Apache-2.0
//! Which areas the kernel has in an IOAS on our behalf.
//!
//! The kernel removes an area whole or not at all unless it is cut, and areas never merge, so they
//! never merge here either: the ledger is what tells a harmless ENOENT from a device that goes on
//! writing.

use super::seams::Seams;
use crate::run_set::{RunSet, Spans};
use crate::units::{Iova, Span, PAGE_SIZE};

/// Disjoint areas, kept as what is mapped and where areas meet.
///
/// A seam that is noted is one in the kernel. The kernel may have more of them, where it is known to have
/// been asked for one: a cut that failed may have split areas already.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    mapped: RunSet<Iova>,
    /// Addresses where an area begins although the page before it is mapped too.
    seams: Seams,
    /// Addresses where an area may be divided: the ends of cuts that failed.
    torn: Seams,
    /// What may be gone: a call failed half-way, and so did asking. It counts as mapped, since
    /// taking it for unmapped is how a device gets to write private pages.
    doubtful: RunSet<Iova>,
}

impl Ledger {
    pub(crate) fn bytes(&self) -> u64 {
        self.mapped.bytes()
    }

    /// Number of areas.
    pub(crate) fn len(&self) -> u64 {
        self.mapped.runs() as u64 + self.seams.count()
    }

    /// Memory that the ledger takes at most, but for a constant.
    pub(crate) fn footprint(&self) -> u64 {
        let seams = self.seams.footprint() + self.torn.footprint();
        self.mapped.footprint() + seams + self.doubtful.footprint()
    }

    /// Enters an area that the kernel has just made. It overlaps no other: the kernel would have
    /// refused it.
    pub(crate) fn insert(&mut self, area: Span<Iova>) {
        debug_assert!(!self.mapped.touches(area));
        let (before, after) = match self.mapped.near(area) {
            Some(near) => (near.before, near.after),
            None => (
                self.is_mapped_before(area.first()),
                self.is_mapped(area.end()),
            ),
        };
        if before {
            self.seams.insert(area.first());
        }
        if after {
            self.seams.insert(area.end());
        }
        self.mapped.insert(area);
    }

    /// Strikes out all of `span`. Areas that reach beyond it have been cut there.
    pub(crate) fn remove(&mut self, span: Span<Iova>) {
        self.seams.remove_to_end(span);
        self.torn.remove_to_end(span);
        self.mapped.remove(span);
        self.doubtful.remove(span);
    }

    /// Whether no area reaches across an end of `span`, as far as is known.
    pub(crate) fn is_whole(&self, span: Span<Iova>) -> bool {
        !self.is_inside_area(span.first()) && !self.is_inside_area(span.end())
    }

    /// Notes whether it is certain that the kernel still has `area`.
    pub(crate) fn set_doubtful(&mut self, area: Span<Iova>, doubtful: bool) {
        if doubtful {
            self.doubtful.insert(area);
        } else {
            self.doubtful.remove(area);
        }
    }

    /// Whether all of `span` is mapped, or nothing of it; `None` if it is more complicated, or in doubt.
    pub(crate) fn look(&self, span: Span<Iova>) -> Option<bool> {
        if self.doubtful.runs() != 0 {
            return None;
        }
        let (mapped, end) = self.mapped.at(span.first(), u64::MAX);
        (span.end() <= end).then_some(mapped)
    }

    /// The same, and whether [no area reaches across](Self::is_whole) an end of what is mapped.
    pub(crate) fn look_at_ends(&self, span: Span<Iova>) -> Option<(bool, bool)> {
        let Some(near) = self.mapped.near(span).filter(|_| self.is_certain()) else {
            let mapped = self.look(span)?;
            return Some((mapped, mapped && self.is_whole(span)));
        };
        let parted = |joined: bool, at| !joined || self.seams.contains(at);
        let whole = || parted(near.before, span.first()) && parted(near.after, span.end());
        Some((near.is_in, near.is_in && whole()))
    }

    /// The parts of `span` that are mapped.
    pub(crate) fn mapped(&self, span: Span<Iova>) -> Spans<Iova> {
        self.mapped.inside(span)
    }

    /// Whether any of `span` is mapped.
    pub(crate) fn maps(&self, span: Span<Iova>) -> bool {
        self.mapped.touches(span)
    }

    /// A cut of `span` failed: areas may be divided at its ends.
    pub(crate) fn note_failed_cut(&mut self, span: Span<Iova>) {
        for at in [span.first(), span.end()] {
            if self.is_inside_area(at) {
                self.torn.insert(at);
            }
        }
    }

    /// Whether anything is doubtful.
    pub(crate) fn is_certain(&self) -> bool {
        self.doubtful.runs() == 0
    }

    /// What of `span` is doubtful, in [`Ledger::pieces`].
    pub(crate) fn doubtful(&self, span: Span<Iova>) -> Spans<Iova> {
        let doubtful = self.doubtful.inside(span).into_iter();
        doubtful.flat_map(|part| self.pieces(part)).collect()
    }

    /// The parts of `span` that are mapped, each of them in one area of the kernel's whatever cuts have
    /// failed: all of it is still there, or nothing.
    pub(crate) fn pieces(&self, span: Span<Iova>) -> Spans<Iova> {
        let mut pieces = Spans::new();
        for area in self.overlapping(span) {
            let Some(mut rest) = area.intersection(&span) else {
                continue;
            };
            while let Some(at) = self.torn.first_from(rest.first() + PAGE_SIZE, rest.end()) {
                pieces.push(Span::between(rest.first(), at));
                rest = Span::between(at, rest.end());
            }
            pieces.push(rest);
        }
        pieces
    }

    /// The areas that share an address with `span`, whole, in order.
    pub(crate) fn overlapping(&self, span: Span<Iova>) -> Spans<Iova> {
        let mut areas = Spans::new();
        for run in self.runs(span) {
            let mut start = run.first();
            while start < run.end() {
                let end = self.seams.first_from(start + PAGE_SIZE, run.end());
                let end = end.unwrap_or(run.end());
                areas.push(Span::between(start, end));
                start = end;
            }
        }
        areas
    }

    /// The areas of [`Ledger::overlapping`], neighbours taken together: what may be unmapped by one
    /// call each without touching what others have in the IOAS.
    pub(crate) fn runs(&self, span: Span<Iova>) -> Spans<Iova> {
        let mut runs = self.mapped.inside(span);
        if let Some(first) = runs.first_mut() {
            *first = Span::between(self.area_start(first.first()), first.end());
        }
        if let Some(last) = runs.last_mut() {
            *last = Span::between(last.first(), self.area_end(last.end()));
        }
        runs
    }

    /// From the first area of [`Ledger::overlapping`] to the last one, whole.
    pub(crate) fn hull(&self, span: Span<Iova>) -> Option<Span<Iova>> {
        let mapped = self.mapped_hull(span)?;
        let start = self.area_start(mapped.first());
        Some(Span::between(start, self.area_end(mapped.end())))
    }

    /// From the first address of `span` that is mapped to the last one.
    pub(crate) fn mapped_hull(&self, span: Span<Iova>) -> Option<Span<Iova>> {
        let (first, end) = (span.first(), span.end());
        let run = self.mapped.first_in(first, end, true)?;
        if run.end() == end {
            return Some(run);
        }
        let last = self.mapped.last_in(run.first(), end, true).unwrap_or(run);
        Some(Span::between(run.first(), last.end()))
    }

    /// How many bytes of `span` are mapped.
    pub(crate) fn mapped_bytes(&self, span: Span<Iova>) -> u64 {
        self.mapped.bytes_in(span)
    }

    /// The parts of `span` without an area, in order.
    pub(crate) fn gaps(&self, span: Span<Iova>) -> Spans<Iova> {
        self.mapped.outside(span)
    }

    fn is_mapped(&self, at: u64) -> bool {
        self.mapped.has_page(at)
    }

    fn is_mapped_before(&self, at: u64) -> bool {
        at != 0 && self.is_mapped(at - PAGE_SIZE)
    }

    fn is_inside_area(&self, at: u64) -> bool {
        !self.seams.contains(at) && self.is_mapped_before(at) && self.is_mapped(at)
    }

    /// Where the area begins that the mapped page at `at` is in.
    fn area_start(&self, at: u64) -> u64 {
        let page = Span::between(at, at + PAGE_SIZE);
        let run = self.mapped.around(page).map_or(at, |run| run.first());
        self.seams.last_to(at, run).unwrap_or(run)
    }

    /// Where the area ends that the mapped page before `end` is in.
    fn area_end(&self, end: u64) -> u64 {
        let page = Span::between(end - PAGE_SIZE, end);
        let run = self.mapped.around(page).map_or(end, |run| run.end());
        self.seams.first_from(end, run).unwrap_or(run)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    fn span(first: u64, end: u64) -> Span<Iova> {
        Span::between(first * 4096, end * 4096)
    }

    #[test]
    fn neighbouring_areas_stay_apart() {
        let mut ledger = Ledger::default();
        ledger.insert(span(0, 2));
        ledger.insert(span(2, 3));
        assert_eq!(ledger.len(), 2);
        assert_eq!(
            ledger.overlapping(span(1, 3)).to_vec(),
            [span(0, 2), span(2, 3)]
        );
        ledger.remove(span(0, 2));
        assert_eq!((ledger.len(), ledger.bytes()), (1, 4096));
    }

    #[test]
    fn gaps_are_what_areas_leave() {
        let mut ledger = Ledger::default();
        ledger.insert(span(2, 4));
        ledger.insert(span(6, 7));
        assert_eq!(
            ledger.gaps(span(0, 8)).to_vec(),
            [span(0, 2), span(4, 6), span(7, 8)]
        );
        assert_eq!(ledger.gaps(span(3, 6)).to_vec(), [span(4, 6)]);
        assert!(ledger.gaps(span(2, 4)).to_vec().is_empty());
    }

    #[test]
    fn a_cut_leaves_two_areas() {
        let mut ledger = Ledger::default();
        ledger.insert(span(0, 8));
        assert!(!ledger.is_whole(span(3, 4)));
        ledger.remove(span(3, 4));
        assert_eq!(
            ledger.overlapping(span(0, 8)).to_vec(),
            [span(0, 3), span(4, 8)]
        );
        ledger.insert(span(3, 4));
        assert!(ledger.is_whole(span(3, 4)));
        assert_eq!(ledger.len(), 3);
    }

    #[test]
    fn a_cut_that_failed_may_have_divided_an_area_at_its_ends() {
        let mut ledger = Ledger::default();
        ledger.insert(span(0, 8));
        ledger.note_failed_cut(span(2, 5));
        ledger.note_failed_cut(span(0, 3));
        assert_eq!(ledger.len(), 1, "as far as is known");
        let pieces = [(0, 2), (2, 3), (3, 5), (5, 8)].map(|(first, end)| span(first, end));
        assert_eq!(ledger.pieces(span(0, 8)).to_vec(), pieces);
        ledger.set_doubtful(span(1, 4), true);
        let pieces = [(1, 2), (2, 3), (3, 4)].map(|(first, end)| span(first, end));
        assert_eq!(ledger.doubtful(span(0, 8)).to_vec(), pieces);
        assert_eq!(ledger.doubtful(span(2, 3)).to_vec(), [span(2, 3)]);
        // What was mapped anew is known.
        ledger.remove(span(0, 8));
        ledger.insert(span(0, 8));
        assert_eq!(ledger.pieces(span(0, 8)).to_vec(), [span(0, 8)]);
        assert!(ledger.is_certain());
    }

    #[test]
    fn a_guest_that_alternates_pages_costs_no_more_than_a_bit_a_page() {
        const PAGES: u64 = 1 << 16;
        let mut ledger = Ledger::default();
        ledger.insert(span(0, PAGES));
        for page in 0..PAGES {
            ledger.remove(span(page, page + 1));
            ledger.insert(span(page, page + 1));
        }
        assert_eq!(ledger.len(), PAGES);
        assert!(ledger.footprint() * 10_000 < PAGES * 4096);
    }

    const PAGES: u64 = 600;

    proptest! {
        #[test]
        fn the_ledger_says_what_a_list_of_areas_says(
            ops in prop::collection::vec((any::<bool>(), 0..PAGES, 1..40u64), 1..120),
            asked in (0..PAGES, 1..300u64),
        ) {
            let mut ledger = Ledger::default();
            let mut list: BTreeMap<u64, u64> = BTreeMap::new();
            for (insert, first, count) in ops {
                let (first, end) = (first, first + count);
                if insert {
                    for gap in ledger.gaps(span(first, end)).to_vec() {
                        ledger.insert(gap);
                        list.insert(gap.first() / 4096, gap.end() / 4096);
                    }
                } else {
                    ledger.remove(span(first, end));
                    let cut: Vec<_> = list.iter().map(|(&s, &e)| (s, e))
                        .filter(|&(s, e)| s < end && e > first).collect();
                    for (s, e) in cut {
                        list.remove(&s);
                        if s < first { list.insert(s, first); }
                        if e > end { list.insert(end, e); }
                    }
                }
            }
            let all: Vec<_> = list.iter().map(|(&s, &e)| span(s, e)).collect();
            prop_assert_eq!(ledger.len(), all.len() as u64);
            prop_assert_eq!(ledger.bytes(), all.iter().map(|a| a.size_bytes()).sum::<u64>());
            let asked = span(asked.0, asked.0 + asked.1);
            let expected: Vec<_> = all.iter().copied().filter(|a| a.overlaps(&asked)).collect();
            prop_assert_eq!(ledger.overlapping(asked).to_vec(), expected.clone());
            prop_assert_eq!(ledger.is_whole(asked), expected.iter().all(|a| asked.contains(a)));
            let mapped = ledger.mapped(asked);
            let expected = match mapped.as_slice() {
                [] => Some((false, false)),
                [all] if *all == asked => Some((true, ledger.is_whole(asked))),
                _ => None,
            };
            prop_assert_eq!(ledger.look_at_ends(asked), expected);
            prop_assert_eq!(ledger.look(asked), expected.map(|(is_mapped, _)| is_mapped));
        }
    }
}
