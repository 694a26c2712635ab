// SPDX-License-Identifier: MIT OR Apache-2.0
//! How much memory requests have twice at once.
//!
//! What becomes shared has memory in both planes of a split block for a while: shared memory is reserved
//! before the kernel's step, and private memory freed after it. One request has as much as `max_request`
//! lets it change; but guests have many vCPUs, so all requests of a VM together have a budget, and one
//! that finds it used up waits for earlier ones.
//!
//! Who waits has its ranges locked. Nobody who has a part of the budget ever waits for a range, or for
//! anybody who does: it has all of its ranges by then, and listeners, which it calls, must not wait for who
//! has one. So it ends, and who waits for it goes on.

use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::collections::VecDeque;

/// What a VM may have twice, but for a request that is larger and allowed all the same.
const DEFAULT_BYTES: u64 = 1 << 30;

/// Most requests find room at once: nothing is locked for that.
#[derive(Debug)]
pub(crate) struct Budget {
    most: AtomicU64,
    taken: AtomicU64,
    /// Of `waiters`: while there are some, nobody overtakes them.
    waiting: AtomicU64,
    waiters: Mutex<VecDeque<Arc<Waiter>>>,
}

#[derive(Debug)]
struct Waiter {
    bytes: u64,
    served: Mutex<bool>,
    changed: Condvar,
}

impl Default for Budget {
    fn default() -> Self {
        Self {
            most: AtomicU64::new(DEFAULT_BYTES),
            taken: AtomicU64::new(0),
            waiting: AtomicU64::new(0),
            waiters: Mutex::default(),
        }
    }
}

impl Budget {
    /// There are requests of so many bytes.
    pub(crate) fn allow(&self, bytes: u64) {
        self.most.fetch_max(bytes, Ordering::Relaxed);
    }

    /// Waits until so many bytes are left, after all who came earlier.
    pub(crate) fn take(&self, bytes: u64) -> Share<'_> {
        let share = Share {
            budget: self,
            bytes,
        };
        let overtakes = self.waiting.load(Ordering::SeqCst) != 0;
        if bytes != 0 && (overtakes || !self.try_take(bytes)) {
            self.wait(bytes);
        }
        share
    }

    /// What is more than all there is gets it when nobody else has any.
    fn try_take(&self, bytes: u64) -> bool {
        let most = self.most.load(Ordering::Relaxed);
        let take = |taken: u64| {
            let fits = taken == 0 || taken.saturating_add(bytes) <= most;
            fits.then(|| taken.saturating_add(bytes))
        };
        let order = Ordering::SeqCst;
        self.taken.fetch_update(order, order, take).is_ok()
    }

    #[cold]
    fn wait(&self, bytes: u64) {
        let waiter = Arc::new(Waiter {
            bytes,
            served: Mutex::new(false),
            changed: Condvar::new(),
        });
        let mut waiters = self.waiters();
        waiters.push_back(waiter.clone());
        self.waiting.fetch_add(1, Ordering::SeqCst);
        // Somebody may have given back what was missing before that could be seen.
        self.serve(&mut waiters);
        drop(waiters);
        let served = lock(&waiter.served);
        let served = waiter.changed.wait_while(served, |served| !*served);
        drop(served.unwrap_or_else(PoisonError::into_inner));
    }

    /// Gives those who wait what there is, in order.
    fn serve(&self, waiters: &mut VecDeque<Arc<Waiter>>) {
        while let Some(waiter) = waiters.front() {
            if !self.try_take(waiter.bytes) {
                return;
            }
            *lock(&waiter.served) = true;
            waiter.changed.notify_one();
            waiters.pop_front();
            self.waiting.fetch_sub(1, Ordering::SeqCst);
        }
    }

    fn waiters(&self) -> MutexGuard<'_, VecDeque<Arc<Waiter>>> {
        lock(&self.waiters)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A part of the budget, until it is dropped.
#[derive(Debug)]
pub(crate) struct Share<'a> {
    budget: &'a Budget,
    bytes: u64,
}

impl Drop for Share<'_> {
    fn drop(&mut self) {
        if self.bytes == 0 {
            return;
        }
        self.budget.taken.fetch_sub(self.bytes, Ordering::SeqCst);
        if self.budget.waiting.load(Ordering::SeqCst) != 0 {
            let mut waiters = self.budget.waiters();
            self.budget.serve(&mut waiters);
        }
    }
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[test]
    fn no_more_than_the_budget_is_taken_at_once() {
        let budget = Budget::default();
        let most = AtomicU64::new(0);
        let taken = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for thread in 0..8u64 {
                let (budget, most, taken) = (&budget, &most, &taken);
                scope.spawn(move || {
                    for round in 0..200 {
                        let bytes = (1 + (thread * 7 + round * 3) % 16) * (DEFAULT_BYTES / 16);
                        let share = budget.take(bytes);
                        let now = taken.fetch_add(bytes, Ordering::SeqCst) + bytes;
                        most.fetch_max(now, Ordering::SeqCst);
                        std::thread::yield_now();
                        taken.fetch_sub(bytes, Ordering::SeqCst);
                        drop(share);
                    }
                });
            }
        });
        assert!(most.into_inner() <= DEFAULT_BYTES);
        assert_eq!(budget.taken.into_inner(), 0);
    }

    #[test]
    fn who_came_first_is_served_first_and_nobody_overtakes() {
        let budget = Budget::default();
        let first = budget.take(DEFAULT_BYTES / 2);
        let (served, order) = mpsc::channel();
        std::thread::scope(|scope| {
            let (budget, served) = (&budget, &served);
            for (number, bytes) in [(0, DEFAULT_BYTES), (1, 4096), (2, DEFAULT_BYTES)] {
                scope.spawn(move || {
                    let share = budget.take(bytes);
                    served.send(number).unwrap();
                    drop(share);
                });
                while budget.waiting.load(Ordering::SeqCst) != number + 1 {
                    std::thread::yield_now();
                }
            }
            assert!(
                order.try_recv().is_err(),
                "4096 bytes are there, but not their turn"
            );
            drop(first);
        });
        let order: Vec<u64> = order.try_iter().collect();
        assert_eq!(order, [0, 1, 2]);
    }

    #[test]
    fn a_request_that_is_larger_than_all_there_is_gets_its_turn() {
        let budget = Budget::default();
        drop(budget.take(2 * DEFAULT_BYTES));
        let one = budget.take(4096);
        std::thread::scope(|scope| {
            let larger = scope.spawn(|| drop(budget.take(2 * DEFAULT_BYTES)));
            while budget.waiting.load(Ordering::SeqCst) != 1 {
                std::thread::yield_now();
            }
            drop(one);
            larger.join().unwrap();
        });
        budget.allow(4 * DEFAULT_BYTES);
        let _both = [
            budget.take(2 * DEFAULT_BYTES),
            budget.take(2 * DEFAULT_BYTES),
        ];
    }
}
