// SPDX-License-Identifier: MIT OR Apache-2.0
//! Private or shared, per page of a block.

use crate::run_set::{RunSet, Spans};
use crate::units::{Offset, Span};
use std::collections::TryReserveError;

/// The attribute of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Attribute {
    /// Host and devices may reach the page.
    Shared,
    /// Nobody but the guest may reach the page.
    Private,
}

impl Attribute {
    /// The opposite.
    pub(crate) fn other(self) -> Self {
        match self {
            Attribute::Shared => Attribute::Private,
            Attribute::Private => Attribute::Shared,
        }
    }

    /// The word that messages use.
    pub fn name(self) -> &'static str {
        match self {
            Attribute::Shared => "shared",
            Attribute::Private => "private",
        }
    }
}

/// The attributes of a block's pages, kept as the set of its private runs.
///
/// For a bound page this is what the kernel has been told (invariant 1): only the conversion that
/// told it, or the binding that showed it, writes here.
#[derive(Debug)]
pub(crate) struct Attributes {
    private: RunSet,
    block: Span<Offset>,
    huge: Option<HugePages>,
}

/// Which huge pages hold no shared page, so that the shared plane needs no memory for them.
#[derive(Debug)]
struct HugePages {
    size_bytes: u64,
    private: u64,
}

/// Which pages a conversion changes: one run, as nearly always, or some, kept as a bit a page at worst.
#[derive(Debug)]
pub(crate) enum Changed {
    One(Span<Offset>),
    Many {
        /// From the first run to the last.
        hull: Span<Offset>,
        runs: RunSet,
    },
}

impl Changed {
    /// From the first page to the last.
    pub(crate) fn hull(&self) -> Span<Offset> {
        match self {
            Changed::One(run) => *run,
            Changed::Many { hull, .. } => *hull,
        }
    }

    pub(crate) fn bytes(&self) -> u64 {
        match self {
            Changed::One(run) => run.size_bytes(),
            Changed::Many { runs, .. } => runs.bytes(),
        }
    }

    /// The first run that begins at `at` or later.
    pub(crate) fn first_from(&self, at: u64) -> Option<Span<Offset>> {
        match self {
            Changed::One(run) => (at <= run.first()).then_some(*run),
            Changed::Many { hull, runs } => runs.first_in(at.max(hull.first()), hull.end(), true),
        }
    }

    /// The last run that ends at `end` or earlier, of whole runs.
    pub(crate) fn last_to(&self, end: u64) -> Option<Span<Offset>> {
        match self {
            Changed::One(run) => (run.end() <= end).then_some(*run),
            Changed::Many { hull, runs } => runs.last_in(hull.first(), end.min(hull.end()), true),
        }
    }

    /// From the run that [`first_from`](Self::first_from) finds on, as many as lie in so many bytes: their
    /// hull. A run is never divided.
    pub(crate) fn piece_from(&self, at: u64, bytes: u64) -> Option<Span<Offset>> {
        let first = self.first_from(at)?;
        let Changed::Many { hull, runs } = self else {
            return Some(first);
        };
        let limit = hull.end().min(first.first().saturating_add(bytes));
        if limit <= first.end() {
            return Some(first);
        }
        let last = runs.last_in(first.first(), limit, true).unwrap_or(first);
        // The last one may go on beyond the limit: it is the next piece's then.
        let end = match last.end() == limit && runs.has_page(limit) {
            false => last.end(),
            true => runs
                .last_in(first.first(), last.first(), true)
                .map_or(first.end(), |run| run.end()),
        };
        Some(Span::between(first.first(), end.max(first.end())))
    }
}

impl Attributes {
    /// Of a `block` whose shared plane has huge pages of so many bytes, if it has any.
    pub(crate) fn new(block: Span<Offset>, initial: Attribute, huge_page: Option<u64>) -> Self {
        let mut new = Self {
            private: RunSet::default(),
            block,
            huge: huge_page.map(|size_bytes| HugePages {
                size_bytes,
                private: 0,
            }),
        };
        new.set(block, initial);
        new
    }

    pub(crate) fn set(&mut self, span: Span<Offset>, attribute: Attribute) {
        let before = self.private_huge_pages_around(span);
        match attribute {
            Attribute::Private => self.private.insert(span),
            Attribute::Shared => self.private.remove(span),
        }
        let after = self.private_huge_pages_around(span);
        if let Some(huge) = &mut self.huge {
            huge.private = huge.private + after - before;
        }
    }

    /// Of the huge pages that `span` has a part of, those that are private as a whole.
    fn private_huge_pages_around(&self, span: Span<Offset>) -> u64 {
        let Some(HugePages { size_bytes, .. }) = self.huge else {
            return 0;
        };
        let hull = span.hull(size_bytes);
        let (first, end) = (hull.first(), hull.end());
        if hull.size_bytes() == size_bytes {
            return u64::from(self.is_private(hull));
        }
        // Those at the ends may have any number of runs, which are none of this change's business.
        let at_ends = [(first, first + size_bytes), (end - size_bytes, end)]
            .into_iter()
            .filter(|&(first, end)| self.is_private(Span::between(first, end)))
            .count() as u64;
        if hull.size_bytes() == 2 * size_bytes {
            return at_ends;
        }
        let between = Span::between(first + size_bytes, end - size_bytes);
        let runs = self.private.inside(between);
        at_ends
            + runs
                .iter()
                .map(|run| run.whole_units(size_bytes))
                .sum::<u64>()
    }

    /// Huge pages with a shared page in them.
    pub(crate) fn shared_huge_pages(&self) -> u64 {
        self.huge.as_ref().map_or(0, |huge| {
            self.block.whole_units(huge.size_bytes) - huge.private
        })
    }

    /// Huge pages without a shared page.
    pub(crate) fn private_huge_pages(&self) -> u64 {
        self.huge.as_ref().map_or(0, |huge| huge.private)
    }

    /// Whether all of `span` is private.
    pub(crate) fn is_private(&self, span: Span<Offset>) -> bool {
        self.private.around(span).is_some()
    }

    /// The parts of `span` whose attribute is `attribute`.
    pub(crate) fn runs(&self, span: Span<Offset>, attribute: Attribute) -> Spans<Offset> {
        match attribute {
            Attribute::Private => self.private.inside(span),
            Attribute::Shared => self.private.outside(span),
        }
    }

    /// The parts of `span` that a conversion to `wanted` changes.
    pub(crate) fn changes(&self, span: Span<Offset>, wanted: Attribute) -> Spans<Offset> {
        match wanted {
            Attribute::Private => self.private.outside(span),
            Attribute::Shared => self.private.inside(span),
        }
    }

    /// Whether a conversion of `span` to `wanted` changes a page.
    pub(crate) fn any_change(&self, span: Span<Offset>, wanted: Attribute) -> bool {
        let changing = wanted == Attribute::Shared;
        self.private
            .first_in(span.first(), span.end(), changing)
            .is_some()
    }

    /// All pages of `span` that a conversion to `wanted` changes, for who goes through them when the
    /// attributes say something else already. Fails if there is no memory for that.
    pub(crate) fn changed(
        &self,
        span: Span<Offset>,
        wanted: Attribute,
    ) -> Result<Option<Changed>, TryReserveError> {
        let Some(hull) = self.change_hull(span, wanted) else {
            return Ok(None);
        };
        let changing = wanted == Attribute::Shared;
        let first = self.private.first_in(hull.first(), hull.end(), changing);
        Ok(Some(match first == Some(hull) {
            true => Changed::One(hull),
            false => Changed::Many {
                hull,
                runs: self.private.copy_of(hull, changing)?,
            },
        }))
    }

    /// The first run from `from` on that has `attribute`: for who goes through all of a block, which can be
    /// more than there is memory to list.
    pub(crate) fn first_run(
        &self,
        from: u64,
        end: u64,
        attribute: Attribute,
    ) -> Option<Span<Offset>> {
        let private = attribute == Attribute::Private;
        self.private.first_in(from, end, private)
    }

    /// From the first page of `span` that a conversion to `wanted` changes to the last one.
    pub(crate) fn change_hull(
        &self,
        span: Span<Offset>,
        wanted: Attribute,
    ) -> Option<Span<Offset>> {
        let changing = wanted == Attribute::Shared;
        let first = self.private.first_in(span.first(), span.end(), changing)?;
        if first.end() == span.end() {
            return Some(first);
        }
        let last = self.private.last_in(first.first(), span.end(), changing);
        Some(Span::between(first.first(), last.unwrap_or(first).end()))
    }

    /// The attribute at `offset` and where its run ends.
    pub(crate) fn run_at(&self, offset: u64) -> (Attribute, u64) {
        match self.private.at(offset, self.block.end()) {
            (true, end) => (Attribute::Private, end),
            (false, end) => (Attribute::Shared, end),
        }
    }

    /// The attribute of all pages of `span`, if it is one.
    pub(crate) fn of_all(&self, span: Span<Offset>) -> Option<Attribute> {
        let is_private = match self.private.near(span) {
            Some(near) => near.is_in,
            None => {
                let (is_private, end) = self.private.at(span.first(), self.block.end());
                (end >= span.end()).then_some(is_private)?
            }
        };
        Some(match is_private {
            true => Attribute::Private,
            false => Attribute::Shared,
        })
    }

    /// The run that the page at `offset`, which is in the block, lies in.
    pub(crate) fn run_around(&self, offset: u64) -> Span<Offset> {
        self.private.around_offset(offset, self.block)
    }

    /// Memory that this takes at most, but for a constant.
    pub(crate) fn footprint(&self) -> u64 {
        self.private.footprint()
    }

    pub(crate) fn has_private(&self, span: Span<Offset>) -> bool {
        self.private.touches(span)
    }

    pub(crate) fn private_bytes(&self) -> u64 {
        self.private.bytes()
    }

    /// Number of private runs: what the bookkeeping costs.
    pub(crate) fn private_runs(&self) -> u64 {
        self.private.runs() as u64
    }

    /// Number of private runs once `span` had `attribute`.
    pub(crate) fn private_runs_after(&self, span: Span<Offset>, attribute: Attribute) -> u64 {
        match attribute {
            Attribute::Private => self.private.runs_after_insert(span) as u64,
            Attribute::Shared => self.private.runs_after_remove(span) as u64,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PAGES: u64 = 200;

    fn pages(first: u64, count: u64) -> Span<Offset> {
        Span::between(first * 4096, (first + count) * 4096)
    }

    proptest! {
        #[test]
        fn what_changes_is_found_again_run_by_run_in_either_direction_and_in_pieces(
            ops in prop::collection::vec((any::<bool>(), 0..PAGES, 1..24u64), 0..60),
            (first, count) in (0..PAGES, 1..PAGES),
            most in 1..40u64,
            private in any::<bool>(),
        ) {
            let mut attributes = Attributes::new(pages(0, PAGES), Attribute::Shared, None);
            let attribute = |private| match private {
                true => Attribute::Private,
                false => Attribute::Shared,
            };
            for (private, first, count) in ops {
                attributes.set(pages(first, count.min(PAGES - first)), attribute(private));
            }
            let span = pages(first, count.min(PAGES - first));
            let wanted = attribute(private);
            let expected = attributes.changes(span, wanted).to_vec();
            prop_assert_eq!(attributes.any_change(span, wanted), !expected.is_empty());
            let Some(changed) = attributes.changed(span, wanted).unwrap() else {
                prop_assert!(expected.is_empty());
                return Ok(());
            };
            // When the attributes say something else.
            attributes.set(span, wanted);
            let hull = Span::between(expected[0].first(), expected[expected.len() - 1].end());
            prop_assert_eq!(changed.hull(), hull);
            prop_assert_eq!(changed.bytes(), expected.iter().map(Span::size_bytes).sum::<u64>());
            let mut at = 0;
            let forth: Vec<_> = std::iter::from_fn(|| {
                let run = changed.first_from(at)?;
                at = run.end();
                Some(run)
            }).collect();
            prop_assert_eq!(&forth, &expected);
            let mut end = u64::MAX;
            let mut back: Vec<_> = std::iter::from_fn(|| {
                let run = changed.last_to(end)?;
                end = run.first();
                Some(run)
            }).collect();
            back.reverse();
            prop_assert_eq!(&back, &expected);
            let mut at = 0;
            let mut left = expected.as_slice();
            while let Some(piece) = changed.piece_from(at, most * 4096) {
                at = piece.end();
                let inside = left.iter().take_while(|run| piece.contains(run)).count();
                prop_assert!(inside > 0 && left[0].first() == piece.first());
                prop_assert_eq!(left[inside - 1].end(), piece.end());
                prop_assert!(inside == 1 || piece.size_bytes() <= most * 4096);
                left = &left[inside..];
                // No smaller than it need be.
                if let Some(next) = left.first() {
                    prop_assert!(next.end() - piece.first() > most * 4096);
                }
            }
            prop_assert!(left.is_empty());
        }
    }
}
