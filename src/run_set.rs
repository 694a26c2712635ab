// SPDX-License-Identifier: MIT OR Apache-2.0
//! A set of page ranges that merges neighbours, in memory that a guest can't make grow: in
//! proportion to runs where they are few, and a bit for each page where they are many.
//!
//! Pages are bits of 64-bit words. A word is kept only where something changes: where a run begins
//! or ends in it, or at its first page. All pages from the end of a kept word to the next one are as
//! that word's last page is, and before the first word nothing is in the set. So a set has one
//! representation only, a run costs two words however long it is, and a page a bit at worst.

use crate::units::{Address, Offset, Span, PAGE_SIZE};
use crate::words::Words;
use smallvec::SmallVec;
use std::collections::TryReserveError;
use std::marker::PhantomData;

/// A few ranges: most conversions are of one, and need no memory for a list of it.
pub(crate) type Spans<A> = SmallVec<[Span<A>; 2]>;

/// Ranges of one kind of address, disjoint and with a gap between any two.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RunSet<A = Offset> {
    words: Words,
    runs: usize,
    pages: u64,
    kind: PhantomData<A>,
}

impl<A> Default for RunSet<A> {
    fn default() -> Self {
        Self {
            words: Words::default(),
            runs: 0,
            pages: 0,
            kind: PhantomData,
        }
    }
}

/// What [`RunSet::near`] sees: whether they are in the set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Near {
    /// The page before a range.
    pub(crate) before: bool,
    /// All of its pages, or none.
    pub(crate) is_in: bool,
    /// The page after it.
    pub(crate) after: bool,
}

const BITS: u64 = u64::BITS as u64;

/// A word of pages that are all as `state` says.
fn uniform(state: bool) -> u64 {
    if state {
        u64::MAX
    } else {
        0
    }
}

/// How a word's last page is.
fn last(word: u64) -> bool {
    word >> (BITS - 1) == 1
}

/// The pages of a word that are not as the page before them.
fn changes(word: u64, before: bool) -> u64 {
    word ^ (word << 1 | u64::from(before))
}

/// The bits from that of `page` on.
fn from(page: u64) -> u64 {
    u64::MAX << (page % BITS)
}

/// The bits to that of `page`, itself included.
fn to(page: u64) -> u64 {
    u64::MAX >> (BITS - 1 - page % BITS)
}

/// First page and end.
fn pages<A: Address>(span: Span<A>) -> (u64, u64) {
    (span.first() / PAGE_SIZE, span.end() / PAGE_SIZE)
}

impl<A: Address> RunSet<A> {
    /// All of some ranges.
    pub(crate) fn of(spans: &[Span<A>]) -> Self {
        let mut set = Self::default();
        spans.iter().for_each(|&span| set.insert(span));
        set
    }

    /// Memory that the set takes at most, but for a constant.
    pub(crate) fn footprint(&self) -> u64 {
        self.words.footprint()
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.pages * PAGE_SIZE
    }

    /// How many bytes of `span` are in the set.
    pub(crate) fn bytes_in(&self, span: Span<A>) -> u64 {
        let (first, end) = pages(span);
        self.pages_in(first, end) * PAGE_SIZE
    }

    pub(crate) fn runs(&self) -> usize {
        self.runs
    }

    /// Adds `span`, merging it with every run that it overlaps or touches.
    pub(crate) fn insert(&mut self, span: Span<A>) {
        if !self.assign_in_word(span, true) {
            self.runs = self.runs_after_insert(span);
            self.assign(span, true);
        }
    }

    /// Takes `span` out, splitting runs that reach beyond it.
    pub(crate) fn remove(&mut self, span: Span<A>) {
        if !self.assign_in_word(span, false) {
            self.runs = self.runs_after_remove(span);
            self.assign(span, false);
        }
    }

    /// What most conversions are: a few pages, with little to look up. False if they are in
    /// several words.
    fn assign_in_word(&mut self, span: Span<A>, state: bool) -> bool {
        if self.runs == 0 && !state {
            return true;
        }
        let (first, end) = pages(span);
        let number = first / BITS;
        if number != (end - 1) / BITS {
            return false;
        }
        let old = self.word(number);
        let pages = from(first) & to(end - 1);
        let new = if state { old | pages } else { old & !pages };
        let changed = old ^ new;
        if changed == 0 {
            return true;
        }
        // A run begins where a page follows one that isn't in the set. Where the word's first page
        // stays as it is, so does whether a run begins there.
        let before = match changed & 1 {
            0 => old & 1 == 1,
            _ => self.words.before(number).is_some_and(last),
        };
        let begun = |word: u64| (word & changes(word, before)).count_ones() as usize;
        let (mut less, mut more) = (begun(old), begun(new));
        if last(changed) {
            let next = self.word(number + 1);
            let begun = |word: u64| usize::from(next & 1 == 1 && !last(word));
            (less, more) = (less + begun(old), more + begun(new));
            self.put(number, new);
            self.put(number + 1, next);
        } else if new == uniform(last(new)) {
            self.put(number, new);
        } else {
            self.words.set(number, new);
        }
        self.runs = self.runs + more - less;
        self.pages += u64::from(new.count_ones());
        self.pages -= u64::from(old.count_ones());
        true
    }

    fn assign(&mut self, span: Span<A>, state: bool) {
        let (first, end) = pages(span);
        let (low, high) = (first / BITS, (end - 1) / BITS);
        let (low_old, high_old) = (self.word(low), self.word(high));
        let was_in = self.pages_in(first, end);
        let set = |word: u64, bits: u64| if state { word | bits } else { word & !bits };
        let last_now = if low == high {
            let new = set(low_old, from(first) & to(end - 1));
            self.put(low, new);
            last(new)
        } else {
            if high - low > 1 {
                self.words.clear(low + 1, high - 1);
            }
            self.put(low, set(low_old, from(first)));
            let new = set(high_old, to(end - 1));
            self.put(high, new);
            last(new)
        };
        // What follows was as the last page was, unless it has a word.
        if last_now != last(high_old) {
            let next = self.words.get(high + 1);
            self.put(high + 1, next.unwrap_or(uniform(last(high_old))));
        }
        self.pages -= was_in;
        if state {
            self.pages += end - first;
        }
    }

    /// Keeps a word if anything changes in it.
    fn put(&mut self, number: u64, word: u64) {
        if word == uniform(self.words.before(number).is_some_and(last)) {
            self.words.clear(number, number);
        } else {
            self.words.set(number, word);
        }
    }

    /// A word, kept or not.
    fn word(&self, number: u64) -> u64 {
        match self.words.last_to(number) {
            Some((found, word)) if found == number => word,
            before => uniform(before.is_some_and(|(_, word)| last(word))),
        }
    }

    fn has(&self, page: u64) -> bool {
        self.word(page / BITS) >> (page % BITS) & 1 == 1
    }

    /// The pages of `first + 1 .. end` that are not as the page before them.
    fn changes(&self, first: u64, end: u64) -> impl Iterator<Item = u64> + '_ {
        let mut before = None;
        self.words
            .range(first / BITS, (end - 1) / BITS)
            .flat_map(move |(number, word)| {
                let previous = before
                    .replace(last(word))
                    .unwrap_or_else(|| self.words.before(number).is_some_and(last));
                let mut left = changes(word, previous);
                std::iter::from_fn(move || {
                    let bit = left.trailing_zeros();
                    left &= left.wrapping_sub(1);
                    (bit < u64::BITS).then(|| number * BITS + u64::from(bit))
                })
            })
            .skip_while(move |&page| page <= first)
            .take_while(move |&page| page < end)
    }

    fn pages_in(&self, first: u64, end: u64) -> u64 {
        let (mut state, mut at, mut count) = (self.has(first), first, 0);
        for page in self.changes(first, end).chain([end]) {
            count += if state { page - at } else { 0 };
            (state, at) = (!state, page);
        }
        count
    }

    /// The parts of `span` that are in the set or, for `wanted` false, are not, in order.
    fn parts(&self, span: Span<A>, wanted: bool) -> Spans<A> {
        let (first, end) = pages(span);
        let mut parts = Spans::new();
        if end - first == 1 {
            // The most frequent question of all.
            if self.has(first) == wanted {
                parts.push(span);
            }
            return parts;
        }
        let (mut state, mut at) = (self.has(first), first);
        for page in self.changes(first, end).chain([end]) {
            if state == wanted {
                parts.push(Span::between(at * PAGE_SIZE, page * PAGE_SIZE));
            }
            (state, at) = (!state, page);
        }
        parts
    }

    /// The parts of `span` that are in the set, in order.
    pub(crate) fn inside(&self, span: Span<A>) -> Spans<A> {
        self.parts(span, true)
    }

    /// The parts of `span` that are not in the set, in order.
    pub(crate) fn outside(&self, span: Span<A>) -> Spans<A> {
        self.parts(span, false)
    }

    /// What [`inside`](Self::inside) or, for `wanted` false, [`outside`](Self::outside) has of `span`, as a
    /// set: a bit a page at worst, and not a range for each run. Fails if there is no memory for that.
    pub(crate) fn copy_of(&self, span: Span<A>, wanted: bool) -> Result<Self, TryReserveError> {
        let (first, end) = pages(span);
        let (low, high) = (first / BITS, (end - 1) / BITS);
        let mut copy = Self::default();
        let mut before = false;
        let mut next = low;
        let mut append = |number: u64, word: u64| -> Result<(), TryReserveError> {
            let word = if wanted { word } else { !word };
            let above = if number == low { from(first) } else { u64::MAX };
            let below = if number == high {
                to(end - 1)
            } else {
                u64::MAX
            };
            // Behind the last word nothing is in the set.
            let word = if number > high {
                0
            } else {
                word & above & below
            };
            if before {
                copy.pages += (number - next) * BITS;
            }
            copy.pages += u64::from(word.count_ones());
            copy.runs += (word & changes(word, before)).count_ones() as usize;
            if word != uniform(before) {
                copy.words.try_set(number, word)?;
            }
            (before, next) = (last(word), number + 1);
            Ok(())
        };
        append(low, self.word(low))?;
        if high > low {
            for (number, word) in self.words.range(low + 1, high - 1) {
                append(number, word)?;
            }
            append(high, self.word(high))?;
        }
        append(high + 1, 0)?;
        Ok(copy)
    }

    /// The first run, or gap, with a page from `first` on and before `end`, as far as it is there.
    pub(crate) fn first_in(&self, first: u64, end: u64, wanted: bool) -> Option<Span<A>> {
        if first >= end {
            return None;
        }
        let (state, change) = self.at(first, u64::MAX);
        let (start, change) = match state == wanted {
            true => (first, change),
            false if change >= end => return None,
            false => (change, self.at(change, u64::MAX).1),
        };
        Some(Span::between(start, change.min(end)))
    }

    /// The last one.
    pub(crate) fn last_in(&self, first: u64, end: u64, wanted: bool) -> Option<Span<A>> {
        if first >= end {
            return None;
        }
        let start_of = |end: u64| {
            let change = self.last_change(end / PAGE_SIZE - 1);
            change.map_or(0, |page| page * PAGE_SIZE)
        };
        let mut end = end;
        if self.has_page(end - PAGE_SIZE) != wanted {
            end = start_of(end);
        }
        (end > first).then(|| Span::between(start_of(end).max(first), end))
    }

    /// The run that `span` lies in, if it lies in one.
    pub(crate) fn around(&self, span: Span<A>) -> Option<Span<A>> {
        let (is_in, end) = self.at(span.first(), u64::MAX);
        (is_in && span.end() <= end).then(|| {
            let start = self.last_change(span.first() / PAGE_SIZE);
            Span::between(start.unwrap_or(0) * PAGE_SIZE, end)
        })
    }

    /// Whether the pages of `span` are in the set, and those next to it, with one look: what most conversions
    /// ask. `None` if it takes more than that.
    pub(crate) fn near(&self, span: Span<A>) -> Option<Near> {
        let (first, end) = pages(span);
        if first % BITS == 0 || first / BITS != end / BITS {
            return None;
        }
        let word = self.word(first / BITS);
        let asked = from(first) & to(end - 1);
        let found = word & asked;
        (found == 0 || found == asked).then_some(Near {
            before: word >> ((first - 1) % BITS) & 1 == 1,
            is_in: found != 0,
            after: word >> (end % BITS) & 1 == 1,
        })
    }

    /// Whether any page of `span` is in the set.
    pub(crate) fn touches(&self, span: Span<A>) -> bool {
        if self.has_page(span.first()) {
            return true;
        }
        span.size_bytes() > PAGE_SIZE && self.at(span.first(), u64::MAX).1 < span.end()
    }

    /// Whether the page at `address` is in the set.
    pub(crate) fn has_page(&self, address: u64) -> bool {
        self.has(address / PAGE_SIZE)
    }

    /// Whether `offset` is in the set, and where the run or gap that it lies in ends; `limit` ends
    /// the last gap.
    pub(crate) fn at(&self, offset: u64, limit: u64) -> (bool, u64) {
        let page = offset / PAGE_SIZE;
        let number = page / BITS;
        let word = self.word(number);
        let state = word >> (page % BITS) & 1 == 1;
        let after = (word ^ uniform(state)) & from(page);
        let end = match after {
            0 => self.words.after(number).map(|(number, word)| {
                let change = changes(word, state).trailing_zeros();
                number * BITS + u64::from(change)
            }),
            bits => Some(number * BITS + u64::from(bits.trailing_zeros())),
        };
        (state, end.map_or(limit, |end| end * PAGE_SIZE))
    }

    /// The run or gap that `offset` lies in; `limits` ends the first and the last gap.
    pub(crate) fn around_offset(&self, offset: u64, limits: Span<A>) -> Span<A> {
        let (_, end) = self.at(offset, limits.end());
        let start = self.last_change(offset / PAGE_SIZE);
        Span::between(start.map_or(limits.first(), |page| page * PAGE_SIZE), end)
    }

    /// The last page at or before `page` that is not as the page before it.
    fn last_change(&self, page: u64) -> Option<u64> {
        let mut to = to(page);
        let mut number = page / BITS;
        loop {
            let (found, word) = self.words.last_to(number)?;
            if found != number {
                to = u64::MAX;
            }
            let before = self.words.before(found).is_some_and(last);
            let changes = changes(word, before) & to;
            if changes != 0 {
                let bit = BITS - 1 - u64::from(changes.leading_zeros());
                return Some(found * BITS + bit);
            }
            to = u64::MAX;
            number = found.checked_sub(1)?;
        }
    }

    /// How many runs there would be after [`insert`](Self::insert) of `span`.
    pub(crate) fn runs_after_insert(&self, span: Span<A>) -> usize {
        let (first, end) = pages(span);
        let (is_in, others) = self.runs_in(first, end);
        let touched_before = !is_in && first > 0 && self.has(first - 1);
        let touched_after = self.has(end) && !self.has(end - 1);
        self.runs - others - usize::from(touched_before) - usize::from(touched_after) + 1
    }

    /// How many runs there would be after [`remove`](Self::remove) of `span`.
    pub(crate) fn runs_after_remove(&self, span: Span<A>) -> usize {
        let (first, end) = pages(span);
        let (is_in, gone) = self.runs_in(first, end);
        let left_before = is_in && first > 0 && self.has(first - 1);
        let left_after = self.has(end) && self.has(end - 1);
        self.runs - gone + usize::from(left_before) + usize::from(left_after)
    }

    /// Whether the first page is in the set, and how many runs have a page in the range.
    fn runs_in(&self, first: u64, end: u64) -> (bool, usize) {
        let is_in = self.has(first);
        if end - first == 1 {
            return (is_in, usize::from(is_in));
        }
        let changes = self.changes(first, end).count();
        // Every other change begins a run.
        let begun = if is_in {
            changes / 2
        } else {
            changes.div_ceil(2)
        };
        (is_in, begun + usize::from(is_in))
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
                for (first, end) in [(first, first + count), (first, first + 1)] {
                    let asked = &array[first as usize..end as usize];
                    let alike = asked.iter().all(|&p| p == asked[0]);
                    let expected = (first != 0 && alike).then(|| Near {
                        before: array[first as usize - 1],
                        is_in: asked[0],
                        after: array.get(end as usize).is_some_and(|&p| p),
                    });
                    prop_assert_eq!(set.near(pages(first, end - first)), expected);
                }
                let part = pages(first, count);
                for wanted in [true, false] {
                    let copy = set.copy_of(part, wanted).unwrap();
                    let expected = set.parts(part, wanted).to_vec();
                    let mut again = RunSet::default();
                    expected.iter().for_each(|&run| again.insert(run));
                    prop_assert_eq!(&copy, &again);
                    let (first, end) = (part.first(), part.end());
                    prop_assert_eq!(set.first_in(first, end, wanted), expected.first().copied());
                    prop_assert_eq!(set.last_in(first, end, wanted), expected.last().copied());
                }
                let all = pages(0, PAGES);
                let total: u64 = set.inside(all).iter().chain(&set.outside(all)).map(|s| s.size_bytes()).sum();
                prop_assert_eq!(total, all.size_bytes());
                for (page, &is_in) in array.iter().enumerate() {
                    let (found, end) = set.at(page as u64 * 4096, all.end());
                    prop_assert_eq!(found, is_in);
                    let run = array[page..].iter().take_while(|&&p| p == is_in).count();
                    prop_assert_eq!(end, (page + run) as u64 * 4096);
                    let before = array[..page].iter().rev().take_while(|&&p| p == is_in).count();
                    let around = set.around_offset(page as u64 * 4096, all);
                    prop_assert_eq!(around, pages((page - before) as u64, (before + run) as u64));
                    let run = is_in.then_some(around);
                    prop_assert_eq!(set.around(pages(page as u64, 1)), run);
                }
            }
        }

        #[test]
        fn words_and_regions_do_not_show(
            ops in prop::collection::vec((any::<bool>(), 0..40u64, 0..4u64, 1..40u64, 0..4u64), 1..60)
        ) {
            // Edges near those of words and regions, far apart.
            let page = |coarse: u64, fine: u64| (coarse * 1024 + 1 + fine).saturating_sub(2);
            let mut set = RunSet::default();
            let mut list: std::collections::BTreeMap<u64, u64> = Default::default();
            for (insert, coarse, fine, length, more) in ops {
                let (first, end) = (page(coarse, fine), page(coarse + length, more));
                let span = pages(first, end - first);
                let touched: Vec<_> = list.range(..=end).map(|(&s, &e)| (s, e))
                    .filter(|&(_, e)| e >= first).collect();
                let (mut low, mut high) = (first, end);
                for (s, e) in touched {
                    list.remove(&s);
                    if insert {
                        (low, high) = (low.min(s), high.max(e));
                    } else {
                        if s < first { list.insert(s, e.min(first)); }
                        if e > end { list.insert(s.max(end), e); }
                    }
                }
                if insert {
                    list.insert(low, high);
                    set.insert(span);
                } else {
                    set.remove(span);
                }
                let all = pages(0, 100 * 1024);
                let expected: Vec<_> = list.iter().map(|(&s, &e)| pages(s, e - s)).collect();
                prop_assert_eq!(set.runs(), expected.len());
                prop_assert_eq!(set.bytes(), expected.iter().map(|run| run.size_bytes()).sum::<u64>());
                prop_assert_eq!(set.inside(all).to_vec(), expected.clone());
                for wanted in [true, false] {
                    let copy = set.copy_of(span, wanted).unwrap();
                    let mut again = RunSet::default();
                    set.parts(span, wanted).iter().for_each(|&run| again.insert(run));
                    prop_assert_eq!(&copy, &again);
                    let (first, end) = (span.first(), span.end());
                    let parts = set.parts(span, wanted);
                    prop_assert_eq!(set.first_in(first, end, wanted), parts.first().copied());
                    prop_assert_eq!(set.last_in(first, end, wanted), parts.last().copied());
                }
                let mut again = RunSet::default();
                for run in expected {
                    again.insert(run);
                    prop_assert_eq!(set.around(run), Some(run));
                }
                prop_assert_eq!(&set, &again);
            }
        }
    }

    #[test]
    fn alternating_pages_cost_little_more_than_a_bit_each() {
        const PAGES: u64 = 1 << 16;
        let mut set = RunSet::default();
        for page in (0..PAGES).step_by(2) {
            set.insert(pages(page, 1));
        }
        assert_eq!(set.runs(), PAGES as usize / 2);
        assert!(
            set.footprint() * 20_000 < PAGES * 4096,
            "{}",
            set.footprint()
        );
    }

    #[test]
    fn a_long_run_costs_two_words() {
        let mut set = RunSet::default();
        set.insert(pages(70, 1 << 28));
        let alone = set.footprint();
        set.remove(pages(70, 1 << 28));
        assert_eq!(set, RunSet::default());
        assert_eq!(set.footprint(), 0);
        assert!(alone < 1024, "{alone}");
    }
}
