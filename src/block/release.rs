// SPDX-License-Identifier: MIT OR Apache-2.0
//! Memory of the plane that pages come to or have left, in a split block: reserved, kept for a while,
//! released.
//!
//! What may be kept, and why, is in [`Kept`](crate::plane::Kept); when it is released by itself, here.

use super::Block;
use crate::attributes::Attribute;
use crate::error::Result;
use crate::plane::{Back, Backing, Planes, Which};
use crate::range_locks::RangeLocks;
use crate::stats::BlockCounters;
use crate::sync::{Arc, Instant};
use crate::throttle::{limited, Class};
use crate::units::{Offset, Span};
use crate::upkeep::Chore;
use std::time::Duration;

/// Whoever converts pages next to what is released waits for so much of it.
const PIECE: u64 = 1 << 20;

/// What somebody has for longer is left for the next time: other blocks have something to be done, too.
const PATIENCE: Duration = Duration::from_millis(10);

/// Releases memory that a block has kept long enough.
#[derive(Debug)]
pub(super) struct Releaser {
    ranges: Arc<RangeLocks>,
    number: u64,
    planes: Arc<Planes>,
    counters: Arc<BlockCounters>,
}

impl Releaser {
    /// Answers how many bytes that were. Those in ranges that others have for longer than its `patience` are
    /// left; `None` waits for all.
    fn release(&self, which: Which, patience: Option<Duration>) -> u64 {
        let planes = &self.planes;
        let unit = PIECE.max(planes.huge_page().unwrap_or(0));
        let mut released = 0;
        for plane in [Attribute::Shared, Attribute::Private] {
            let mut from = 0;
            while let Some(first) = planes.first_kept(from, plane, which) {
                let end = (first / unit + 1) * unit;
                let piece = Span::between(first & !(unit - 1), end);
                let piece = piece.intersection(&planes.block()).unwrap_or(piece);
                from = end;
                let range = (self.number, piece);
                let locked = match patience {
                    None => Some(self.ranges.lock(range)),
                    Some(time) => self.ranges.lock_until(range, Instant::now() + time),
                };
                let Some(_range) = locked else { continue };
                // Some may have come back meanwhile.
                for part in planes.kept(piece, plane, which) {
                    self.release_part(part, plane);
                    released += part.size_bytes();
                }
            }
        }
        released
    }

    /// The caller has its range.
    fn release_part(&self, part: Span<Offset>, plane: Attribute) {
        if let Err(error) = self.planes.release_kept(part, plane) {
            self.counters.release_failures.add(1);
            limited!(error, "double memory: {error}");
        }
    }
}

impl Chore for Releaser {
    fn tend(&self, now: Instant) -> Option<Instant> {
        let due = self.planes.next_age()?;
        if now < due {
            return Some(due);
        }
        self.release(Which::Due, Some(PATIENCE));
        self.planes.age(now)
    }

    fn relieve(&self) -> bool {
        self.planes.kept_bytes() != 0 && self.release(Which::All, Some(Duration::ZERO)) != 0
    }
}

impl Block {
    pub(super) fn releaser(
        ranges: &Arc<RangeLocks>,
        number: u64,
        planes: &Arc<Planes>,
        counters: &Arc<BlockCounters>,
    ) -> Arc<Releaser> {
        Arc::new(Releaser {
            ranges: ranges.clone(),
            number,
            planes: planes.clone(),
            counters: counters.clone(),
        })
    }

    /// Frees at once what waits to be freed, of both planes: see
    /// [`BlockConfig::release_delay`](crate::BlockConfig::release_delay). Waits for conversions where it
    /// is. What can't be freed is logged and counted (`release_failures`).
    pub fn release_pending(&self) {
        self.releaser.release(Which::All, None);
    }

    /// The same where the caller has all of `span` locked and hears of it.
    pub(super) fn release_kept(&self, span: Span<Offset>) -> Result<()> {
        for plane in [Attribute::Shared, Attribute::Private] {
            // With a part of a huge page goes all of it.
            let pages = self.planes.pages_around(span, plane);
            let mut kept = self.planes.kept(pages, plane, Which::All).into_iter();
            kept.try_for_each(|part| self.planes.release_kept(part, plane))?;
        }
        Ok(())
    }

    /// Makes `span` have memory in the plane of `attribute`, which it is about to get: what is kept for
    /// it there comes back, and else, if it is `wanted` before somebody touches it, new memory is
    /// allocated. The caller has the hull locked.
    pub(crate) fn reserve(
        &self,
        span: Span<Offset>,
        attribute: Attribute,
        wanted: bool,
    ) -> Result<()> {
        let planes = &self.planes;
        if planes.may_keep(attribute) {
            let back = planes.take_back(planes.allocated_for(span, attribute), attribute);
            if back != Back::Gone {
                self.counters.releases_cancelled.add(1);
            }
            if back == Back::There && attribute == Attribute::Shared {
                return Ok(());
            }
        }
        if !wanted || self.huge_page_is_there(span, attribute) {
            return Ok(());
        }
        let allocate = || {
            // Pinning allocates: one walk over the pages instead of two.
            match attribute == Attribute::Shared && planes.pinning_allocates() && self.pins(span) {
                true => planes.allocate_huge(span),
                false => planes.allocate(span, attribute),
            }
        };
        self.relieved(allocate)
    }

    /// Whether it has a huge page that stays as long as any page of it is shared, and one is.
    fn huge_page_is_there(&self, span: Span<Offset>, attribute: Attribute) -> bool {
        if attribute == Attribute::Private {
            return false;
        }
        let Some(page) = self.planes.promised_page() else {
            return false;
        };
        let hull = span.hull(page);
        // One that was lost and could not be replaced is gone, whoever else has a page of it.
        let sound = || self.sound_parts(hull).as_slice() == [hull];
        hull.size_bytes() == page && !self.attributes().is_private(hull) && sound()
    }

    /// Tries again what has failed for want of memory, if the VM keeps some that nobody needs now.
    pub(super) fn relieved<T>(&self, mut attempt: impl FnMut() -> Result<T>) -> Result<T> {
        match attempt() {
            Err(error) if [libc::ENOMEM, libc::ENOSPC].contains(&error.errno()) => {
                match self.vm.upkeep.relieve() {
                    true => attempt(),
                    false => Err(error),
                }
            }
            done => done,
        }
    }

    /// `span` has just left the plane of `attribute` for another file: what it has there is kept for a while, or
    /// freed.
    pub(crate) fn leave(&self, span: Span<Offset>, attribute: Attribute) {
        let left = self.releasable(span, attribute);
        if !self.keep(span, left, attribute) {
            self.release(left, attribute);
        }
    }

    /// Keeps what `span` has left, with what else is [releasable](Block::releasable) by that. False if that
    /// is to be freed. Where the kernel finds huge pages by itself it is: neighbours that have left already
    /// need not have memory, or have been kept for long.
    pub(crate) fn keep(
        &self,
        span: Span<Offset>,
        left: Span<Offset>,
        attribute: Attribute,
    ) -> bool {
        let known = left == span || self.planes.pool_page().is_some();
        known && self.planes.keep(left, attribute)
    }

    /// Frees at once what the plane of `attribute` has for `span`, which no page of it has any more, if the
    /// other plane is another file. Should that fail, the next conversion there tries again: no guest can
    /// tell.
    pub(crate) fn release(&self, span: Span<Offset>, attribute: Attribute) {
        if self.backing() == Backing::InPlace {
            return;
        }
        let released = match self.planes.may_keep(attribute) {
            // Parts of huge pages are not zeroed: what is kept isn't, either.
            true => self.planes.release_kept(span, attribute),
            false => self.planes.release(span, attribute),
        };
        if let Err(error) = released {
            self.counters.release_failures.add(1);
            self.vm
                .voices
                .say(Class::Trouble, || format!("double memory: {error}"));
        }
    }
}
