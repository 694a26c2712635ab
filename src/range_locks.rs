// SPDX-License-Identifier: MIT OR Apache-2.0
//! Conversions of disjoint ranges run in parallel, overlapping ones queue (invariant 7).

use crate::sync::{Arc, Condvar, Instant, Mutex, PoisonError};
use crate::units::{Gpa, Offset, Span};
use smallvec::SmallVec;
use std::collections::VecDeque;

/// A range of one block, the block named by its number.
pub(crate) type BlockRange = (u64, Span<Offset>);

/// What no block has for a number: such a range is one of guest physical addresses.
const ADDRESSES: u64 = u64::MAX;

/// To lock addresses against others who bind there, or end a binding. Conversions go by offsets.
pub(crate) fn addresses(gpas: Span<Gpa>) -> BlockRange {
    (ADDRESSES, Span::between(gpas.first(), gpas.end()))
}

/// The ranges of a VM that are being changed, in order of arrival.
#[derive(Debug, Default)]
pub(crate) struct RangeLocks {
    queue: Mutex<Queue>,
    /// How often somebody who waited has looked whether that is over.
    #[cfg(test)]
    looks: std::sync::atomic::AtomicUsize,
}

#[derive(Debug, Default)]
struct Queue {
    tickets: VecDeque<Ticket>,
    next: u64,
}

/// What is locked at once.
#[derive(Debug)]
pub(crate) enum Ranges {
    /// As nearly always.
    One(BlockRange),
    Several(Vec<BlockRange>),
}

impl From<BlockRange> for Ranges {
    fn from(range: BlockRange) -> Self {
        Self::One(range)
    }
}

impl From<Vec<BlockRange>> for Ranges {
    fn from(ranges: Vec<BlockRange>) -> Self {
        Self::Several(ranges)
    }
}

impl Ranges {
    fn all(&self) -> &[BlockRange] {
        match self {
            Self::One(range) => std::slice::from_ref(range),
            Self::Several(ranges) => ranges,
        }
    }
}

#[derive(Debug)]
struct Ticket {
    number: u64,
    ranges: Ranges,
    /// Earlier tickets that have or want a page of the same.
    before: usize,
    /// Who waits for these to go, and for nobody else's.
    waiter: Option<Arc<Condvar>>,
}

impl Ticket {
    fn conflicts(&self, ranges: &Ranges) -> bool {
        self.ranges.all().iter().any(|(block, span)| {
            ranges
                .all()
                .iter()
                .any(|(other, range)| block == other && span.overlaps(range))
        })
    }
}

impl RangeLocks {
    /// Locks all of `ranges` at once: waits until nobody who came earlier has or wants any page of
    /// them. Nobody holds a part while waiting for the rest, so there is no order to get wrong, and
    /// nobody is overtaken for ever.
    pub(crate) fn lock(&self, ranges: impl Into<Ranges>) -> RangeGuard<'_> {
        let locked = self.lock_by(ranges.into(), None);
        locked.expect("who has all the time in the world gets them")
    }

    /// The same, unless that takes longer than to `deadline`.
    pub(crate) fn lock_until(
        &self,
        ranges: impl Into<Ranges>,
        deadline: Instant,
    ) -> Option<RangeGuard<'_>> {
        self.lock_by(ranges.into(), Some(deadline))
    }

    fn lock_by(&self, ranges: Ranges, deadline: Option<Instant>) -> Option<RangeGuard<'_>> {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        let number = queue.next;
        queue.next += 1;
        let conflicting = queue.tickets.iter().filter(|t| t.conflicts(&ranges));
        let before = conflicting.count();
        let waiter = (before != 0).then(Arc::<Condvar>::default);
        queue.tickets.push_back(Ticket {
            number,
            ranges,
            before,
            waiter: waiter.clone(),
        });
        let guard = RangeGuard {
            locks: self,
            number,
        };
        let Some(waiter) = waiter else {
            return Some(guard);
        };
        let blocked = |queue: &mut Queue| {
            #[cfg(test)]
            self.looks.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
            let mine = queue.tickets.iter().find(|t| t.number == number);
            mine.expect("only its guard takes a ticket out").before != 0
        };
        let (queue, in_vain) = match deadline {
            None => {
                let queue = waiter.wait_while(queue, blocked);
                (queue.unwrap_or_else(PoisonError::into_inner), false)
            }
            Some(deadline) => {
                let left = deadline.saturating_duration_since(Instant::now());
                let waited = waiter.wait_timeout_while(queue, left, blocked);
                let (queue, waited) = waited.unwrap_or_else(PoisonError::into_inner);
                (queue, waited.timed_out())
            }
        };
        // Before the guard, which takes its ticket out, goes.
        drop(queue);
        (!in_vain).then_some(guard)
    }
}

/// Unlocks its ranges when dropped.
#[derive(Debug)]
pub(crate) struct RangeGuard<'a> {
    locks: &'a RangeLocks,
    number: u64,
}

impl Drop for RangeGuard<'_> {
    fn drop(&mut self) {
        let mut queue = self
            .locks
            .queue
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let mine = queue.tickets.iter().position(|t| t.number == self.number);
        let Some(mine) = mine else { return };
        let Some(ticket) = queue.tickets.remove(mine) else {
            return;
        };
        let mut free: SmallVec<[Arc<Condvar>; 4]> = SmallVec::new();
        for later in queue.tickets.range_mut(mine..) {
            // One that waits for nobody conflicts with none before it.
            if later.before != 0 && later.conflicts(&ticket.ranges) {
                later.before -= 1;
                if later.before == 0 {
                    free.extend(later.waiter.take());
                }
            }
        }
        drop(queue);
        // With the queue locked, each would wake only to wait for that.
        free.iter().for_each(|waiter| waiter.notify_one());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::sync::mpsc;

    fn range(block: u64, first: u64, end: u64) -> Vec<BlockRange> {
        vec![(block, Span::between(first * 4096, end * 4096))]
    }

    #[test]
    fn disjoint_ranges_are_held_together() {
        let locks = RangeLocks::default();
        let _a = locks.lock(range(0, 0, 4));
        let _b = locks.lock(range(0, 4, 8));
        let _c = locks.lock(range(1, 0, 4));
    }

    #[test]
    fn who_waits_in_vain_keeps_nobody_waiting() {
        let locks = RangeLocks::default();
        let held = locks.lock(range(0, 0, 4));
        assert!(locks.lock_until(range(0, 3, 8), Instant::now()).is_none());
        let _later = locks.lock(range(0, 4, 8));
        drop(held);
        let at_once = locks.lock_until(range(0, 3, 4), Instant::now());
        assert!(at_once.is_some(), "what is free is to be had at any time");
    }

    #[test]
    fn an_overlapping_range_waits_for_the_earlier_one() {
        let locks = RangeLocks::default();
        let held = locks.lock(range(0, 0, 4));
        let released = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let (about_to_lock, ready) = mpsc::channel();
            let waiter = scope.spawn({
                let (locks, released) = (&locks, &released);
                move || {
                    about_to_lock.send(()).unwrap();
                    let _guard = locks.lock(range(0, 3, 5));
                    released.load(Ordering::SeqCst)
                }
            });
            ready.recv().unwrap();
            // A disjoint range gets through while the other waits.
            drop(locks.lock(range(0, 8, 9)));
            released.store(true, Ordering::SeqCst);
            drop(held);
            assert!(waiter.join().unwrap(), "locked before the holder let go");
        });
    }

    #[test]
    fn a_release_wakes_only_whom_it_frees() {
        const WAITERS: usize = 8;
        let locks = RangeLocks::default();
        let first = locks.lock(range(0, 0, 4));
        let second = locks.lock(range(0, 4, 8));
        std::thread::scope(|scope| {
            for _ in 0..WAITERS {
                scope.spawn(|| drop(locks.lock(range(0, 3, 5))));
            }
            let looks = || locks.looks.load(Ordering::SeqCst);
            while looks() != WAITERS {
                std::thread::yield_now();
            }
            // Neither who had nothing of theirs, nor the one of two.
            for _ in 0..100 {
                drop(locks.lock(range(0, 8, 9)));
                // What wakes for nothing has the time to look.
                std::thread::yield_now();
            }
            drop(first);
            drop(second);
        });
        // Each once more when it is free; and a few may wake for no reason at all.
        let looks = locks.looks.load(Ordering::SeqCst);
        assert!(looks <= 3 * WAITERS, "{looks}");
    }
}
