// SPDX-License-Identifier: MIT OR Apache-2.0
//! How what went wrong between a block and its devices is put right.

use super::Block;
use crate::attributes::Attribute;
use crate::dma::PIECE;
use crate::error::Result;
use crate::sync::{Arc, Instant, Mutex, PoisonError, Weak};
use crate::throttle::limited;
use crate::units::{Offset, Span};
use crate::upkeep::Chore;
use std::time::Duration;

/// When what was quarantined is tried again for the first time, and how long it waits at most from one time
/// to the next: each is twice as long as the one before.
const FIRST: Duration = Duration::from_secs(1);
const LAST: Duration = Duration::from_secs(60);

/// Who converts a page next to what is put right waits for one piece of it.
const SMALL_PIECE: u64 = 64 << 20;

/// What somebody has for longer is left for the next time: memory of other blocks is to be released meanwhile.
const PATIENCE: Duration = Duration::from_millis(10);

/// Heals a block from time to time.
#[derive(Debug)]
pub(super) struct Healer {
    /// It must not be kept: for a moment, this may be the last to have it, and then it ends here.
    block: Weak<Block>,
    next: Mutex<Option<Next>>,
}

#[derive(Clone, Copy, Debug)]
struct Next {
    at: Instant,
    pause: Duration,
}

impl Healer {
    pub(super) fn of(block: &Weak<Block>) -> Arc<Self> {
        Arc::new(Self {
            block: block.clone(),
            next: Mutex::new(None),
        })
    }
}

impl Chore for Healer {
    fn tend(&self, now: Instant) -> Option<Instant> {
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        let block = self.block.upgrade()?;
        if block.quarantine().bytes() == 0 {
            *next = None;
            return None;
        }
        let after = match *next {
            None => Next {
                at: now + FIRST,
                pause: FIRST,
            },
            Some(next) if now < next.at => next,
            Some(Next { pause, .. }) => {
                block.lock_and_heal_in(block.span, Some(PATIENCE));
                let pause = (pause * 2).min(LAST);
                Next {
                    at: Instant::now() + pause,
                    pause,
                }
            }
        };
        *next = Some(after);
        Some(after.at)
    }
}

impl Block {
    /// Ends what is wrong with those pages of `span` that have `attribute` and are quarantined: devices
    /// get shared ones, and lose what they may still have behind private ones. Every run of them is
    /// tried; one that the kernel still refuses stays quarantined.
    ///
    /// The caller holds the hull, so that attributes stay what they are.
    pub(crate) fn heal(&self, span: Span<Offset>, attribute: Attribute) -> Result<()> {
        // At the end of the VM pages are shared that no guest has shown.
        if !self.is_quarantined(span) || self.vm.check_attached().is_err() {
            return Ok(());
        }
        let mut result = Ok(());
        for part in self.quarantined_in(span) {
            let runs = self.attributes().runs(part, attribute);
            for run in runs {
                result = result.and(match attribute {
                    Attribute::Shared => self.heal_shared(run),
                    Attribute::Private => self.withdraw(run).map(|()| self.private_has_left(run)),
                });
            }
        }
        if !self.is_quarantined(span) {
            self.counters.heals.add(1);
        }
        result
    }

    /// No device has any of `run`, all of which is private, any more.
    pub(super) fn private_has_left(&self, run: Span<Offset>) {
        self.lift_quarantine(run);
        let unused = self.releasable(run, Attribute::Shared);
        self.release(unused, Attribute::Shared);
    }

    /// Devices get all of `run`, or of a piece of it nothing: then that stays quarantined.
    fn heal_shared(&self, run: Span<Offset>) -> Result<()> {
        let windows = self.windows();
        let mut result = Ok(());
        for piece in run.pieces(PIECE) {
            let mut admitted = Ok(());
            for part in self.sound_parts(piece) {
                for window in windows.iter() {
                    let shown = self.with_neighbours(|neighbours| window.admit(part, neighbours));
                    admitted = admitted.and(shown.map_err(|error| self.explain(error)));
                }
            }
            match &admitted {
                Ok(()) => self.lift_quarantine(piece),
                // In an ordinary VM no page is kept from the devices that can have it.
                Err(_) if !self.confidential => {}
                Err(_) => {
                    if let Err(error) = self.withdraw(piece) {
                        limited!(error, "{error}");
                    }
                }
            }
            result = result.and(admitted);
        }
        result
    }

    /// All that is quarantined, in pieces: whoever converts elsewhere goes on.
    pub(super) fn lock_and_heal(&self) {
        self.lock_and_heal_in(self.span, None);
    }

    /// The same of `span`, but for what others have locked for longer than its `patience`.
    pub(super) fn lock_and_heal_in(&self, span: Span<Offset>, patience: Option<Duration>) {
        // An ordinary block's windows are mapped in pieces of this size.
        let unit = match self.confidential {
            true => SMALL_PIECE,
            false => PIECE,
        };
        let mut from = span.first();
        loop {
            let quarantined = {
                let quarantine = self.quarantine();
                match quarantine.at(from, span.end()) {
                    (true, end) => Some((from, end)),
                    (false, start) if start < span.end() => {
                        Some((start, quarantine.at(start, span.end()).1))
                    }
                    _ => None,
                }
            };
            let Some((start, end)) = quarantined else {
                return;
            };
            let end = end.min((start / unit + 1) * unit);
            let piece = Span::between(start, end);
            let range = (self.number, self.lock_hull(piece));
            let locked = match patience {
                None => Some(self.vm.ranges.lock(range)),
                Some(time) => self.vm.ranges.lock_until(range, Instant::now() + time),
            };
            if locked.is_some() {
                self.try_to_heal(piece);
            }
            drop(locked);
            from = end;
            if from >= span.end() {
                return;
            }
        }
    }

    /// All of them, for who has no error to give.
    pub(super) fn try_to_heal(&self, span: Span<Offset>) {
        for attribute in [Attribute::Private, Attribute::Shared] {
            if let Err(error) = self.heal(span, attribute) {
                limited!(error, "{error}");
            }
        }
    }
}
