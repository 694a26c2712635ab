// SPDX-License-Identifier: MIT OR Apache-2.0
//! A set of page ranges that merges neighbours: memory in proportion to runs, not to pages.

use crate::units::{Address, Offset, Span};
use std::collections::BTreeMap;
use std::marker::PhantomData;

/// Ranges of one kind of address, disjoint and with a gap between any two.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RunSet<A = Offset> {
    /// Start to end, exclusive.
    runs: BTreeMap<u64, u64>,
    bytes: u64,
    kind: PhantomData<A>,
}

impl<A> Default for RunSet<A> {
    fn default() -> Self {
        Self {
            runs: BTreeMap::new(),
            bytes: 0,
            kind: PhantomData,
        }
    }
}

/// What a run costs at most: insertion in order leaves the nodes of a B-tree half full, so that a
/// leaf of 192 bytes holds six of eleven pairs, and an inner node of 288 bytes stands above six
/// leaves.
const RUN_BYTES: u64 = 192 / 6 + 288 / 36;

impl<A: Address> RunSet<A> {
    /// Memory that the set takes at most, but for a constant.
    pub(crate) fn footprint(&self) -> u64 {
        self.runs.len() as u64 * RUN_BYTES
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(crate) fn runs(&self) -> usize {
        self.runs.len()
    }

    /// Adds `span`, merging it with every run that it overlaps or touches.
    pub(crate) fn insert(&mut self, span: Span<A>) {
        let (mut start, mut end) = (span.first(), span.end());
        // Runs are disjoint, so those to swallow are the last that starts at or before `end`, and
        // backwards from there while they still reach `start`.
        while let Some((&s, &e)) = self.runs.range(..=end).next_back() {
            if e < start {
                break;
            }
            start = start.min(s);
            end = end.max(e);
            self.bytes -= e - s;
            self.runs.remove(&s);
        }
        self.bytes += end - start;
        self.runs.insert(start, end);
    }

    /// Takes `span` out, splitting runs that reach beyond it.
    pub(crate) fn remove(&mut self, span: Span<A>) {
        while let Some((&s, &e)) = self.runs.range(..span.end()).next_back() {
            if e <= span.first() {
                break;
            }
            self.runs.remove(&s);
            self.bytes -= e - s;
            if s < span.first() {
                self.runs.insert(s, span.first());
                self.bytes += span.first() - s;
            }
            if span.end() < e {
                self.runs.insert(span.end(), e);
                self.bytes += e - span.end();
            }
        }
    }

    /// The parts of `span` that are in the set, in order.
    pub(crate) fn inside(&self, span: Span<A>) -> Vec<Span<A>> {
        let first = self
            .runs
            .range(..=span.first())
            .next_back()
            .filter(|&(_, &end)| end > span.first())
            .map_or(span.first(), |(&start, _)| start);
        self.runs
            .range(first..span.end())
            .filter_map(|(&s, &e)| Span::between(s, e).intersection(&span))
            .collect()
    }

    /// The parts of `span` that are not in the set, in order.
    pub(crate) fn outside(&self, span: Span<A>) -> Vec<Span<A>> {
        let mut gaps = Vec::new();
        let mut at = span.first();
        for run in self.inside(span) {
            if at < run.first() {
                gaps.push(Span::between(at, run.first()));
            }
            at = run.end();
        }
        if at < span.end() {
            gaps.push(Span::between(at, span.end()));
        }
        gaps
    }

    /// The run that `span` lies in, if it lies in one.
    pub(crate) fn around(&self, span: Span<A>) -> Option<Span<A>> {
        let (&start, &end) = self.runs.range(..=span.first()).next_back()?;
        (span.end() <= end).then(|| Span::between(start, end))
    }

    /// Whether any page of `span` is in the set.
    pub(crate) fn touches(&self, span: Span<A>) -> bool {
        self.runs
            .range(..span.end())
            .next_back()
            .is_some_and(|(_, &end)| end > span.first())
    }

    /// Whether `offset` is in the set, and where the run or gap that it lies in ends; `limit` ends
    /// the last gap.
    pub(crate) fn at(&self, offset: u64, limit: u64) -> (bool, u64) {
        if let Some((_, &end)) = self.runs.range(..=offset).next_back() {
            if end > offset {
                return (true, end);
            }
        }
        let end = self.runs.range(offset..).next().map_or(limit, |(&s, _)| s);
        (false, end)
    }

    /// The run or gap that `offset` lies in; `limits` ends the first and the last gap.
    pub(crate) fn around_offset(&self, offset: u64, limits: Span<A>) -> Span<A> {
        let next = |from| self.runs.range(from..).next().map(|(&start, _)| start);
        match self.runs.range(..=offset).next_back() {
            Some((&start, &end)) if end > offset => Span::between(start, end),
            before => Span::between(
                before.map_or(limits.first(), |(_, &end)| end),
                next(offset).unwrap_or(limits.end()),
            ),
        }
    }

    /// How many runs there would be after [`insert`](Self::insert) of `span`.
    pub(crate) fn runs_after_insert(&self, span: Span<A>) -> usize {
        let swallowed = self
            .runs
            .range(..=span.end())
            .rev()
            .take_while(|&(_, &end)| end >= span.first())
            .count();
        self.runs.len() - swallowed + 1
    }

    /// How many runs there would be after [`remove`](Self::remove) of `span`.
    pub(crate) fn runs_after_remove(&self, span: Span<A>) -> usize {
        let mut runs = self.runs.len();
        for (&s, &e) in self.runs.range(..span.end()).rev() {
            if e <= span.first() {
                break;
            }
            runs -= 1;
            runs += usize::from(s < span.first()) + usize::from(span.end() < e);
        }
        runs
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PAGES: u64 = 48;

    fn pages(first: u64, count: u64) -> Span<Offset> {
        Span::between(first * 4096, (first + count) * 4096)
    }

    fn from_pages(set: &[bool]) -> RunSet {
        let mut runs = RunSet::default();
        for (page, _) in set.iter().enumerate().filter(|&(_, &is_in)| is_in) {
            runs.insert(pages(page as u64, 1));
        }
        runs
    }

    proptest! {
        #[test]
        fn a_run_set_says_what_an_array_of_pages_says(
            ops in prop::collection::vec((any::<bool>(), 0..PAGES, 1..PAGES), 1..60)
        ) {
            let mut set = RunSet::default();
            let mut array = vec![false; PAGES as usize];
            for (insert, first, count) in ops {
                let count = count.min(PAGES - first);
                let span = pages(first, count);
                let touched = array[first as usize..(first + count) as usize].iter().any(|&p| p);
                prop_assert_eq!(set.touches(span), touched);
                let expected_runs = if insert {
                    set.runs_after_insert(span)
                } else {
                    set.runs_after_remove(span)
                };
                array[first as usize..(first + count) as usize].fill(insert);
                if insert { set.insert(span) } else { set.remove(span) }
                prop_assert_eq!(set.runs(), expected_runs);
                prop_assert_eq!(&set, &from_pages(&array));
                prop_assert_eq!(set.bytes(), array.iter().filter(|&&p| p).count() as u64 * 4096);
                let all = pages(0, PAGES);
                let total: u64 = set.inside(all).iter().chain(&set.outside(all)).map(|s| s.size_bytes()).sum();
                prop_assert_eq!(total, all.size_bytes());
                for (page, &is_in) in array.iter().enumerate() {
                    let (found, end) = set.at(page as u64 * 4096, all.end());
                    prop_assert_eq!(found, is_in);
                    let run = array[page..].iter().take_while(|&&p| p == is_in).count();
                    prop_assert_eq!(end, (page + run) as u64 * 4096);
                }
            }
        }
    }
}
