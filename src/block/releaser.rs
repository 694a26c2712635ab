// SPDX-License-Identifier: MIT OR Apache-2.0
//! Memory of a split block's planes that pages have left: kept for a while, or freed.
//!
//! What may be kept, and why, is in `src/plane/kept.rs`; when it is freed by itself, here.

use super::core::Core;
use crate::attributes::Attribute;
use crate::error::Result;
use crate::plane::{Backing, Which};
use crate::sync::{Arc, Instant};
use crate::throttle::{limited, Class};
use crate::units::{Offset, Span};
use crate::upkeep::Chore;
use std::time::Duration;

/// Whoever converts pages next to what is released waits for so much of it.
const PIECE: u64 = 1 << 20;

/// What somebody has for longer is left for the next time: other blocks have something to be done, too.
const PATIENCE: Duration = Duration::from_millis(10);

/// Frees what pages have left, at once or when it has been kept long enough.
#[derive(Debug)]
pub(crate) struct Releaser(Arc<Core>);

impl Releaser {
    /// Answers how many bytes that were. Those in ranges that others have for longer than its `patience` are
    /// left; `None` waits for all.
    pub(super) fn release_all(&self, which: Which, patience: Option<Duration>) -> u64 {
        let core = &self.0;
        let planes = &core.planes;
        let unit = PIECE.max(planes.huge_page().unwrap_or(0));
        let mut released = 0;
        for plane in [Attribute::Shared, Attribute::Private] {
            let mut from = 0;
            while let Some(first) = planes.first_kept(from, plane, which) {
                let end = (first / unit + 1) * unit;
                let piece = Span::between(first & !(unit - 1), end);
                let piece = piece.intersection(&planes.block()).unwrap_or(piece);
                from = end;
                let range = (core.number, piece);
                let ranges = &core.machine.ranges;
                let locked = match patience {
                    None => Some(ranges.lock(range)),
                    Some(time) => ranges.lock_until(range, Instant::now() + time),
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
        if let Err(error) = self.0.planes.release_kept(part, plane) {
            self.0.counters.release_failures.add(1);
            limited!(error, "double memory: {error}");
        }
    }
}

/// What pages have left.
impl Releaser {
    pub(super) fn of(core: &Arc<Core>) -> Arc<Self> {
        Arc::new(Self(core.clone()))
    }

    /// What the plane of `attribute` can do without once no page of `span` has it. With a huge page
    /// at either end goes the rest of it, if that holds nothing shared and nothing that a device may
    /// still have: the page would be the device's and no longer the file's.
    ///
    /// The caller has the hull locked.
    pub(crate) fn releasable(&self, span: Span<Offset>, attribute: Attribute) -> Span<Offset> {
        let pages = self.0.planes.pages_around(span, attribute);
        if pages == span {
            return span;
        }
        let attributes = self.0.pages.attributes();
        let idle = |first, end| {
            first == end || {
                let rest = Span::between(first, end);
                attributes.is_private(rest) && !self.0.quarantine.touches(rest)
            }
        };
        let first = match idle(pages.first(), span.first()) {
            true => pages.first(),
            false => span.first(),
        };
        let end = match idle(span.end(), pages.end()) {
            true => pages.end(),
            false => span.end(),
        };
        Span::between(first, end)
    }

    /// Frees at once what is kept of `span`, all of which the caller has locked, and says what failed.
    pub(super) fn release_kept(&self, span: Span<Offset>) -> Result<()> {
        for plane in [Attribute::Shared, Attribute::Private] {
            // With a part of a huge page goes all of it.
            let pages = self.0.planes.pages_around(span, plane);
            let mut kept = self.0.planes.kept(pages, plane, Which::All).into_iter();
            let released = kept.try_for_each(|part| self.0.planes.release_kept(part, plane));
            // It is there, and no longer among what is kept.
            released.inspect_err(|_| self.0.counters.release_failures.add(1))?;
        }
        Ok(())
    }

    /// `span` has just left the plane of `attribute` for another file: what it has there is kept for a while, or
    /// freed.
    pub(crate) fn leave(&self, span: Span<Offset>, attribute: Attribute) {
        let left = self.releasable(span, attribute);
        if !self.keep(span, left, attribute) {
            self.release(left, attribute);
        }
    }

    /// Keeps what `span` has left, with what else is [releasable](Releaser::releasable) by that. False if that
    /// is to be freed. Where the kernel finds huge pages by itself it is: neighbours that have left already
    /// need not have memory, or have been kept for long.
    pub(crate) fn keep(
        &self,
        span: Span<Offset>,
        left: Span<Offset>,
        attribute: Attribute,
    ) -> bool {
        let known = left == span || self.0.planes.pool_page().is_some();
        known && self.0.planes.keep(left, attribute)
    }

    /// Frees at once what the plane of `attribute` has for `span`, which no page of it has any more, if the
    /// other plane is another file. Should that fail, the next conversion there tries again: no guest can
    /// tell.
    pub(crate) fn release(&self, span: Span<Offset>, attribute: Attribute) {
        if self.0.backing() == Backing::InPlace {
            return;
        }
        let released = match self.0.planes.may_keep(attribute) {
            // Parts of huge pages are not zeroed: what is kept isn't, either.
            true => self.0.planes.release_kept(span, attribute),
            false => self.0.planes.release(span, attribute),
        };
        if let Err(error) = released {
            self.0.counters.release_failures.add(1);
            let voices = &self.0.machine.voices;
            voices.say(module_path!(), Class::Trouble, || {
                format!("double memory: {error}")
            });
        }
    }
}

impl Chore for Releaser {
    fn tend(&self, now: Instant) -> Option<Instant> {
        let planes = &self.0.planes;
        let due = planes.next_age()?;
        if now < due {
            return Some(due);
        }
        self.release_all(Which::Due, Some(PATIENCE));
        planes.age(now)
    }

    fn relieve(&self) -> bool {
        self.0.planes.kept_bytes() != 0 && self.release_all(Which::All, Some(Duration::ZERO)) != 0
    }
}
