// SPDX-License-Identifier: MIT OR Apache-2.0
//! What is known of each page: its attribute, whether the host has lost its memory, and so whether the VMM
//! may touch it.

use super::poisoned::Poisoned;
use crate::attributes::{Attribute, Attributes};
use crate::plane::Backing;
use crate::run_set::Spans;
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use crate::units::{Offset, Span};

/// Of [`Pages::closed`]: nothing may be touched.
const ALL: u64 = u64::MAX;

/// Whether the VMM may touch memory, by one load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Closed {
    /// All of it.
    Nothing,
    /// There are private or poisoned pages, which it may not.
    Some,
    /// No page, since there may be no memory behind addresses.
    All,
}

/// Attributes, lost memory, and what follows. Invariant: `closed` is the bytes of pages that are private, and
/// of those that are lost, or [`ALL`].
#[derive(Debug)]
pub(crate) struct Pages {
    attributes: RwLock<Attributes>,
    pub(super) poisoned: Poisoned,
    /// How many bytes the VMM may not touch, private or poisoned, or [`ALL`]: for the one question that every
    /// access of the VMM asks. Changes with `attributes` locked for writing.
    closed: AtomicU64,
}

impl Pages {
    pub(super) fn new(
        block: Span<Offset>,
        initial: Attribute,
        huge_page: Option<u64>,
        backing: Backing,
    ) -> Self {
        let attributes = Attributes::new(block, initial, huge_page);
        Self {
            closed: AtomicU64::new(attributes.private_bytes()),
            attributes: RwLock::new(attributes),
            poisoned: Poisoned::new(backing),
        }
    }

    /// For a moment: never across a call.
    pub(crate) fn attributes(&self) -> RwLockReadGuard<'_, Attributes> {
        self.attributes
            .read()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives pages an attribute, in the books. The caller has their range; by how many the huge pages that are
    /// private as a whole have become more.
    pub(super) fn set(&self, span: Span<Offset>, attribute: Attribute) -> i64 {
        let mut attributes = self.attributes_mut();
        let before = attributes.private_huge_pages();
        attributes.set(span, attribute);
        self.count(&attributes);
        attributes.private_huge_pages() as i64 - before as i64
    }

    /// Notes what the host has lost, or has replaced.
    pub(super) fn change_poisoned(&self, change: impl FnOnce(&Poisoned)) {
        let attributes = self.attributes_mut();
        change(&self.poisoned);
        self.count(&attributes);
    }

    /// Whether any page has lost its memory.
    pub(crate) fn has_poisoned(&self) -> bool {
        self.poisoned.bytes() != 0
    }

    /// The parts of `span` that have not lost their shared memory.
    pub(super) fn sound_parts(&self, span: Span<Offset>) -> Spans<Offset> {
        match self.has_poisoned() {
            false => Spans::from_elem(span, 1),
            true => self.poisoned.outside(span, Attribute::Shared),
        }
    }

    pub(super) fn closed(&self) -> Closed {
        match self.closed.load(Ordering::Acquire) {
            0 => Closed::Nothing,
            ALL => Closed::All,
            _ => Closed::Some,
        }
    }

    /// Addresses are about to have no memory: nobody is told any more that they may be touched.
    pub(super) fn close_all(&self) {
        let _attributes = self.attributes_mut();
        self.closed.store(ALL, Ordering::Release);
    }

    /// They have it.
    pub(super) fn open_again(&self) {
        let attributes = self.attributes_mut();
        self.store_closed(&attributes);
    }

    /// The caller has the attributes locked for writing.
    fn count(&self, attributes: &Attributes) {
        if self.closed.load(Ordering::Acquire) != ALL {
            self.store_closed(attributes);
        }
    }

    fn store_closed(&self, attributes: &Attributes) {
        let closed = attributes.private_bytes() + self.poisoned.bytes();
        self.closed.store(closed, Ordering::Release);
    }

    fn attributes_mut(&self) -> RwLockWriteGuard<'_, Attributes> {
        self.attributes
            .write()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests {
    use super::*;

    fn span(first: u64, end: u64) -> Span<Offset> {
        Span::between(first << 12, end << 12)
    }

    #[test]
    fn what_is_closed_is_what_is_private_or_lost() {
        let pages = Pages::new(span(0, 8), Attribute::Shared, None, Backing::Split);
        assert_eq!(pages.closed(), Closed::Nothing);
        pages.set(span(2, 4), Attribute::Private);
        assert_eq!(pages.closed(), Closed::Some);
        pages.change_poisoned(|poisoned| poisoned.insert(span(5, 6), Attribute::Shared));
        pages.set(span(2, 4), Attribute::Shared);
        assert_eq!(pages.closed(), Closed::Some, "one is lost");
        assert_eq!(
            pages.sound_parts(span(4, 8)).to_vec(),
            [span(4, 5), span(6, 8)]
        );
        pages.change_poisoned(|poisoned| poisoned.forget(span(0, 8)));
        assert_eq!(pages.closed(), Closed::Nothing);
    }

    #[test]
    fn what_has_no_memory_stays_closed_whatever_is_noted_meanwhile() {
        let pages = Pages::new(span(0, 8), Attribute::Private, None, Backing::InPlace);
        pages.close_all();
        pages.set(span(0, 8), Attribute::Shared);
        assert_eq!(pages.closed(), Closed::All);
        pages.open_again();
        assert_eq!(pages.closed(), Closed::Nothing);
    }

    #[test]
    fn huge_pages_that_become_private_as_a_whole_are_counted() {
        let all = Span::between(0, 4 << 20);
        let pages = Pages::new(all, Attribute::Private, Some(2 << 20), Backing::InPlace);
        assert_eq!(pages.set(span(1, 2), Attribute::Shared), -1);
        assert_eq!(pages.set(span(1, 2), Attribute::Private), 1);
    }
}
