// SPDX-License-Identifier: MIT OR Apache-2.0
//! Which conversions a vCPU's memory fault may be the echo of.
//!
//! The kernel notices a conversion of another vCPU half-way, and its fault then asks for what that one has just
//! changed: to convert on it would take that back. See [`Vm::memory_fault`](crate::Vm::memory_fault).

use crate::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use crate::units::{Gpa, Span};

/// Addresses that share an entry of [`Echoes`].
const REGION_BYTES: u64 = 64 << 10;
const REGIONS: usize = 256;

/// Which conversions the vCPUs may have met on their way: for each region of guest physical address
/// space when the last one ended, by a number that only grows, and how many are under way. Regions
/// share entries, and conversions of neighbours count: an echo too many costs one more KVM_RUN.
#[derive(Debug)]
pub(crate) struct Echoes {
    sequence: AtomicU64,
    entries: Box<[Entry]>,
}

#[derive(Debug, Default)]
struct Entry {
    ended: AtomicU64,
    under_way: AtomicU32,
}

impl Default for Echoes {
    fn default() -> Self {
        let mut entries = Vec::with_capacity(REGIONS);
        entries.resize_with(REGIONS, Entry::default);
        Self {
            sequence: AtomicU64::new(0),
            entries: entries.into(),
        }
    }
}

impl Echoes {
    /// Grows whenever a conversion ends.
    pub(crate) fn sequence(&self) -> &AtomicU64 {
        &self.sequence
    }

    fn entries_of(&self, gpas: Span<Gpa>) -> impl Iterator<Item = &Entry> {
        let first = gpas.first() / REGION_BYTES;
        let count = (gpas.end() - 1) / REGION_BYTES - first + 1;
        let entry = move |index| &self.entries[((first + index) % REGIONS as u64) as usize];
        (0..count.min(REGIONS as u64)).map(entry)
    }

    /// A conversion of `gpas` is under way until the guard is dropped.
    pub(crate) fn convert(&self, gpas: Span<Gpa>) -> UnderWay<'_> {
        for entry in self.entries_of(gpas) {
            entry.under_way.fetch_add(1, Ordering::SeqCst);
        }
        UnderWay { echoes: self, gpas }
    }

    /// Whether a vCPU that entered KVM_RUN when the sequence was `entered` may have met a conversion
    /// of `gpas`.
    pub(crate) fn may_have_met(&self, gpas: Span<Gpa>, entered: u64) -> bool {
        // In this order: what isn't under way any more has its number.
        let mut entries = self.entries_of(gpas);
        entered != u64::MAX
            && entries.any(|entry| {
                entry.under_way.load(Ordering::SeqCst) != 0
                    || entry.ended.load(Ordering::SeqCst) > entered
            })
    }
}

/// A conversion that vCPUs may notice.
#[derive(Debug)]
pub(crate) struct UnderWay<'a> {
    echoes: &'a Echoes,
    gpas: Span<Gpa>,
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        let sequence = self.echoes.sequence.fetch_add(1, Ordering::SeqCst) + 1;
        for entry in self.echoes.entries_of(self.gpas) {
            entry.ended.fetch_max(sequence, Ordering::SeqCst);
            entry.under_way.fetch_sub(1, Ordering::SeqCst);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(first: u64, size: u64) -> Span<Gpa> {
        Span::new(Gpa(first), size).unwrap()
    }

    #[test]
    fn a_conversion_is_met_by_who_entered_before_its_end_and_touches_its_region() {
        let echoes = Echoes::default();
        let (here, far) = (span(1 << 30, 4096), span(2 << 30 | 1 << 20, 4096));
        let before = echoes.sequence.load(Ordering::SeqCst);
        assert!(!echoes.may_have_met(here, before));
        let under_way = echoes.convert(here);
        assert!(echoes.may_have_met(here, u64::MAX - 1));
        assert!(!echoes.may_have_met(here, u64::MAX));
        assert!(!echoes.may_have_met(far, before));
        drop(under_way);
        let after = echoes.sequence.load(Ordering::SeqCst);
        assert!(echoes.may_have_met(here, before));
        assert!(!echoes.may_have_met(far, before));
        assert!(!echoes.may_have_met(here, after));
        assert!(!echoes.may_have_met(here, u64::MAX));
    }

    #[test]
    fn a_conversion_of_all_there_is_counts_everywhere() {
        let echoes = Echoes::default();
        let all = span(0, !0xffff);
        drop(echoes.convert(all));
        assert!(echoes.may_have_met(span(77 << 20, 4096), 0));
        let entry = &echoes.entries[3];
        assert_eq!(entry.under_way.load(Ordering::SeqCst), 0);
    }
}
