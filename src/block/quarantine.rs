// SPDX-License-Identifier: MIT OR Apache-2.0
//! Pages about which books and kernel, or devices, may disagree, since undoing something failed.
//!
//! In a confidential block no device is given such a page until it converts or is healed; in an ordinary
//! one, whose pages are never to be kept from devices, it is what some window lacks.

use crate::run_set::{RunSet, Spans};
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::{Mutex, MutexGuard, PoisonError};
use crate::units::{Offset, Span};

/// The set, and how large it is. Invariant: `bytes` is what the set had when its lock was last let go of.
/// Most often that is 0, and every conversion asks: an answer for a range that the caller has locked is right
/// without the lock, since pages come and go with their range locked.
#[derive(Debug, Default)]
pub(crate) struct Quarantine {
    set: Mutex<RunSet>,
    bytes: AtomicU64,
}

impl Quarantine {
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Acquire)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.bytes() == 0
    }

    /// Memory that it takes at most, but for a constant.
    pub(super) fn footprint(&self) -> u64 {
        self.set().footprint()
    }

    /// Puts `span` in; false if all of it was.
    pub(super) fn insert(&self, span: Span<Offset>) -> bool {
        self.change(|set| {
            let is_new = !set.outside(span).is_empty();
            set.insert(span);
            is_new
        })
    }

    /// Whatever was wrong with `span` is over: it has converted, or is healed.
    pub(crate) fn lift(&self, span: Span<Offset>) {
        if !self.is_empty() {
            self.change(|set| set.remove(span));
        }
    }

    /// Whether a page of `span` is in it.
    pub(crate) fn touches(&self, span: Span<Offset>) -> bool {
        !self.is_empty() && self.set().touches(span)
    }

    /// The parts of `span` that are in it.
    pub(super) fn inside(&self, span: Span<Offset>) -> Spans<Offset> {
        match self.is_empty() {
            true => Spans::new(),
            false => self.set().inside(span),
        }
    }

    /// The parts of `span` that are not.
    pub(super) fn outside(&self, span: Span<Offset>) -> Spans<Offset> {
        match self.is_empty() {
            true => Spans::from_elem(span, 1),
            false => self.set().outside(span),
        }
    }

    /// The first run of it in `span`.
    pub(super) fn first_in(&self, span: Span<Offset>) -> Option<Span<Offset>> {
        match self.is_empty() {
            true => None,
            false => self.set().first_in(span.first(), span.end(), true),
        }
    }

    fn change<T>(&self, change: impl FnOnce(&mut RunSet) -> T) -> T {
        let mut set = self.set();
        let changed = change(&mut set);
        self.bytes.store(set.bytes(), Ordering::Release);
        changed
    }

    fn set(&self) -> MutexGuard<'_, RunSet> {
        self.set.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests {
    use super::*;

    fn span(first: u64, end: u64) -> Span<Offset> {
        Span::between(first << 12, end << 12)
    }

    #[test]
    fn it_knows_what_is_new_and_what_is_left() {
        let quarantine = Quarantine::default();
        assert!(quarantine.is_empty() && !quarantine.touches(span(0, 100)));
        assert_eq!(quarantine.outside(span(0, 4)).to_vec(), [span(0, 4)]);
        assert!(quarantine.insert(span(2, 4)));
        assert!(!quarantine.insert(span(3, 4)), "all of it is there");
        assert!(quarantine.insert(span(3, 6)), "a part of it is new");
        assert_eq!(quarantine.bytes(), 4 << 12);
        quarantine.lift(span(3, 5));
        assert_eq!(
            quarantine.inside(span(0, 8)).to_vec(),
            [span(2, 3), span(5, 6)]
        );
        assert_eq!(quarantine.first_in(span(3, 8)), Some(span(5, 6)));
        assert_eq!(quarantine.first_in(span(5, 8)), Some(span(5, 6)));
        assert_eq!(quarantine.first_in(span(6, 8)), None);
        quarantine.lift(span(0, 8));
        assert!(quarantine.is_empty());
    }
}
