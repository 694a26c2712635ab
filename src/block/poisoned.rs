// SPDX-License-Identifier: MIT OR Apache-2.0
//! Which pages have lost their memory.

use crate::attributes::Attribute;
use crate::plane::Backing;
use crate::run_set::{RunSet, Spans};
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::{Mutex, MutexGuard, PoisonError};
use crate::units::{Offset, Span};

/// Which pages are lost, in which plane: with a huge page of the shared plane are lost the shared bytes of
/// every page in it, but no private ones, which have another file.
#[derive(Debug)]
pub(super) struct Poisoned {
    /// In place the first one is all there is.
    planes: Mutex<[RunSet; 2]>,
    backing: Backing,
    /// Of `planes`: most often there are none, and every conversion asks.
    bytes: AtomicU64,
}

impl Poisoned {
    pub(super) fn new(backing: Backing) -> Self {
        Self {
            planes: Mutex::default(),
            backing,
            bytes: AtomicU64::new(0),
        }
    }

    pub(super) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Acquire)
    }

    /// The parts of `span` that are not lost in the plane of `attribute`.
    pub(super) fn outside(&self, span: Span<Offset>, attribute: Attribute) -> Spans<Offset> {
        self.planes()[self.plane_of(attribute)].outside(span)
    }

    /// The parts of `span` that are.
    pub(super) fn inside(&self, span: Span<Offset>, attribute: Attribute) -> Spans<Offset> {
        self.planes()[self.plane_of(attribute)].inside(span)
    }

    /// Nothing of `span` is lost any more, in any plane.
    pub(super) fn forget(&self, span: Span<Offset>) {
        for attribute in [Attribute::Shared, Attribute::Private] {
            self.remove(span, attribute);
        }
    }

    pub(super) fn remove(&self, span: Span<Offset>, attribute: Attribute) {
        self.change(attribute, |pages| pages.remove(span));
    }

    pub(super) fn insert(&self, span: Span<Offset>, attribute: Attribute) {
        self.change(attribute, |pages| pages.insert(span));
    }

    fn change(&self, attribute: Attribute, change: impl FnOnce(&mut RunSet)) {
        let mut planes = self.planes();
        change(&mut planes[self.plane_of(attribute)]);
        let bytes = planes.iter().map(RunSet::bytes).sum();
        self.bytes.store(bytes, Ordering::Release);
    }

    pub(super) fn plane_of(&self, attribute: Attribute) -> usize {
        match (self.backing, attribute) {
            (Backing::InPlace, _) | (_, Attribute::Shared) => 0,
            (Backing::Split, Attribute::Private) => 1,
        }
    }

    pub(super) fn planes(&self) -> MutexGuard<'_, [RunSet; 2]> {
        self.planes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
