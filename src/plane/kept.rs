// SPDX-License-Identifier: MIT OR Apache-2.0
//! Memory that pages have left, kept for a moment.
//!
//! A guest that shares a page for a transfer takes it back right after, and shares it again for the next
//! one. Each way costs a hole in one file and new, cleared memory in the other. So what a page leaves
//! behind is kept for a delay: if the page comes back, it finds its old memory, and nothing was to be
//! freed, allocated or cleared; if not, it is freed, together with its neighbours, by a thread of the
//! VM's own.
//!
//! What the page finds is what it left. In the shared plane host and devices have seen these bytes, and
//! the guest has written them or let them be written. In the private plane they are the guest's own, and
//! nobody else reaches them there; but whether a page may come back with them is for the VM's type to
//! say, and so they are kept for those only of which that is known.
//!
//! How much memory two planes hold is bounded by bytes and by age: memory that nobody comes back for is
//! freed after one to two delays.

use super::stamps::Stamps;
use crate::attributes::Attribute;
use crate::run_set::Spans;
use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use crate::sync::{Instant, Mutex, MutexGuard, PoisonError};
use crate::units::{Offset, Span};
use std::time::Duration;

/// How long memory is kept, and how much of it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Keeping {
    /// Zero: not at all.
    pub(crate) delay: Duration,
    /// Bytes, of both planes.
    pub(crate) most: u64,
    /// Private memory, too.
    pub(crate) private: bool,
}

impl Keeping {
    pub(crate) const NONE: Self = Self {
        delay: Duration::ZERO,
        most: 0,
        private: false,
    };
}

/// What the two planes of a split block hold for pages that have left them.
///
/// Who keeps, takes back or frees memory has the range of its pages locked; the lock in here is held for
/// moments only.
#[derive(Debug)]
pub(super) struct Kept {
    keeping: Keeping,
    block: Span<Offset>,
    /// Shared pages are to have memory, so that it is known of them whether they do.
    promised: bool,
    /// There is nobody to release anything.
    stopped: AtomicBool,
    state: Mutex<State>,
    /// Of both planes: most often there is none, and who takes pages back asks.
    bytes: AtomicU64,
}

#[derive(Debug, Default)]
struct State {
    /// By plane; see [`index`]. None as long as none is needed.
    planes: [Option<Stamps>; 2],
    /// Since when pages are kept that were not in the delay before.
    since: Option<Instant>,
    /// The kernel had no memory for stamps: nothing is kept any more.
    refused: bool,
}

/// Which of what is kept.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Which {
    /// What has been long enough.
    Due,
    All,
}

fn index(plane: Attribute) -> usize {
    match plane {
        Attribute::Shared => 0,
        Attribute::Private => 1,
    }
}

/// What became of memory that was to be taken back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Back {
    /// Some of it was not kept.
    Gone,
    /// It was kept, but somebody may have to allocate it still.
    Unbacked,
    /// It is there.
    There,
}

impl Kept {
    /// For the planes of `block`. Where shared pages are `promised` memory, nobody knows yet whether
    /// they have any.
    pub(super) fn new(keeping: Keeping, block: Span<Offset>, promised: bool) -> Self {
        // As good as for ever, and no moment is too far away.
        const LONGEST: Duration = Duration::from_secs(365 * 24 * 3600);
        let keeping = Keeping {
            delay: keeping.delay.min(LONGEST),
            ..keeping
        };
        Self {
            keeping,
            block,
            promised,
            stopped: AtomicBool::new(false),
            state: Mutex::default(),
            bytes: AtomicU64::new(0),
        }
    }

    /// Whether memory of that plane may be kept at all.
    pub(super) fn may(&self, plane: Attribute) -> bool {
        let allowed = plane == Attribute::Shared || self.keeping.private;
        allowed && !self.keeping.delay.is_zero() && !self.stopped.load(Ordering::Relaxed)
    }

    pub(super) fn keeping(&self) -> Keeping {
        self.keeping
    }

    /// Nothing is kept from now on.
    pub(super) fn stop(&self) {
        self.stopped.store(true, Ordering::Relaxed);
    }

    /// Bytes that are kept.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Acquire)
    }

    /// Memory that the books take at most, but for a constant.
    pub(super) fn footprint(&self) -> u64 {
        let state = self.state();
        let planes = state.planes.iter().flatten();
        planes.map(Stamps::footprint).sum()
    }

    /// Keeps what `span`, which has just left the plane, holds there. False if that is not to be, or would
    /// be too much: then the caller frees it.
    pub(super) fn keep(&self, span: Span<Offset>, plane: Attribute) -> bool {
        if !self.may(plane) {
            return false;
        }
        let mut state = self.state();
        if self.bytes() + span.size_bytes() > self.keeping.most {
            return false;
        }
        let Some(stamps) = self.stamps(&mut state, plane) else {
            return false;
        };
        let kept = stamps.keep(span);
        if state.since.is_none() {
            state.since = Some(Instant::now());
        }
        self.bytes.fetch_add(kept, Ordering::AcqRel);
        true
    }

    /// `span` comes back to its plane: whatever is kept there is its own again.
    pub(super) fn take_back(&self, span: Span<Offset>, plane: Attribute) -> Back {
        if self.bytes() == 0 {
            return Back::Gone;
        }
        let mut state = self.state();
        let Some(stamps) = &mut state.planes[index(plane)] else {
            return Back::Gone;
        };
        let taken = stamps.take(span);
        let backed = !self.promised || plane == Attribute::Private || stamps.are_backed(span);
        self.bytes.fetch_sub(taken, Ordering::AcqRel);
        match taken == span.size_bytes() {
            false => Back::Gone,
            true if backed => Back::There,
            true => Back::Unbacked,
        }
    }

    /// Shared pages of `span` have memory now.
    pub(super) fn is_backed(&self, span: Span<Offset>) {
        if self.promised && self.may(Attribute::Shared) {
            let mut state = self.state();
            if let Some(stamps) = self.stamps(&mut state, Attribute::Shared) {
                stamps.set_backed(span, true);
            }
        }
    }

    /// Nothing of `span` has memory in the plane any more, or nobody knows.
    pub(super) fn is_freed(&self, span: Span<Offset>, plane: Attribute) {
        if self.keeping.delay.is_zero() {
            return;
        }
        let mut state = self.state();
        if let Some(stamps) = &mut state.planes[index(plane)] {
            let taken = stamps.take(span);
            stamps.set_backed(span, false);
            self.bytes.fetch_sub(taken, Ordering::AcqRel);
        }
    }

    /// What of `span` is kept.
    pub(super) fn inside(
        &self,
        span: Span<Offset>,
        plane: Attribute,
        which: Which,
    ) -> Spans<Offset> {
        let mut found = Spans::new();
        if self.bytes() == 0 {
            return found;
        }
        let state = self.state();
        let Some(stamps) = &state.planes[index(plane)] else {
            return found;
        };
        let mut at = span.first();
        while let Some(run) = stamps.next(at, span.end(), which) {
            at = run.end();
            found.push(run);
        }
        found
    }

    /// The first page from `from` on that is. Nobody who converts waits for all of the search.
    pub(super) fn first_from(&self, from: u64, plane: Attribute, which: Which) -> Option<u64> {
        const PIECE: u64 = 1 << 30;
        let mut from = from;
        while self.bytes() != 0 && from < self.block.end() {
            let end = (from + PIECE).min(self.block.end());
            let state = self.state();
            let stamps = state.planes[index(plane)].as_ref()?;
            if let Some(first) = stamps.first(from, end, which) {
                return Some(first);
            }
            from = end;
        }
        None
    }

    /// When a delay has passed since the last time; `None` if nothing is kept.
    pub(super) fn next_age(&self) -> Option<Instant> {
        self.state().since.map(|since| since + self.keeping.delay)
    }

    /// A delay has passed: what was kept in it is due when the next one has. What was due and was not
    /// released stays due. When that will be; `None` if nothing is kept.
    pub(super) fn age(&self, now: Instant) -> Option<Instant> {
        let mut state = self.state();
        state.since = (self.bytes() != 0).then_some(now);
        state.since?;
        state.planes.iter_mut().flatten().for_each(Stamps::age);
        Some(now + self.keeping.delay)
    }

    /// The stamps of a plane, which are made when they are needed first.
    fn stamps<'a>(&self, state: &'a mut State, plane: Attribute) -> Option<&'a mut Stamps> {
        let slot = &mut state.planes[index(plane)];
        if slot.is_none() && !state.refused {
            *slot = Stamps::new(self.block);
            state.refused = slot.is_none();
        }
        slot.as_mut()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
