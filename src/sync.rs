// SPDX-License-Identifier: MIT OR Apache-2.0
//! Locks, atomics, threads and time: the standard library's.
//!
//! The package `tests/schedules` builds these sources with the feature `shuttle`, which the library itself
//! hasn't: there it is shuttle that decides, at each of these, who runs next, and time passes only for who
//! sleeps. What is locked for moments only and never together with anything else, as counters and the log's
//! throttles, is the standard library's there too.

#[cfg(not(feature = "shuttle"))]
pub(crate) use real::*;
#[cfg(feature = "shuttle")]
pub(crate) use scheduled::*;

#[cfg(not(feature = "shuttle"))]
mod real {
    #[allow(unused_imports)]
    pub(crate) use std::{
        sync::{
            atomic, Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard,
            RwLockWriteGuard, Weak,
        },
        thread,
        time::Instant,
    };

    /// Statics that hold locks of this module.
    macro_rules! statics {
        ($($item:item)+) => { $($item)+ };
    }
    pub(crate) use statics;
}

#[cfg(feature = "shuttle")]
mod scheduled {
    use std::cell::Cell;
    use std::ops::Add;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::sync::LockResult;
    use std::time::Duration;

    #[allow(unused_imports)]
    pub(crate) use shuttle::sync::{
        atomic, Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard,
        Weak,
    };

    /// One of each for every schedule: nothing of one reaches the next, or one on another thread.
    macro_rules! statics {
        ($($(#[$about:meta])* static $name:ident: $type:ty = $value:expr;)+) => {
            shuttle::lazy_static! { $($(#[$about])* static ref $name: $type = $value;)+ }
        };
    }
    pub(crate) use statics;

    std::thread_local! {
        /// All threads of a schedule run on one of the system's.
        static SLEPT: Cell<Duration> = const { Cell::new(Duration::ZERO) };
    }

    /// A moment in a time that passes only for who sleeps.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
    pub(crate) struct Instant(Duration);

    impl Instant {
        pub(crate) fn now() -> Self {
            Self(SLEPT.get())
        }

        pub(crate) fn elapsed(&self) -> Duration {
            Self::now().saturating_duration_since(*self)
        }

        pub(crate) fn saturating_duration_since(&self, earlier: Self) -> Duration {
            self.0.saturating_sub(earlier.0)
        }
    }

    impl Add<Duration> for Instant {
        type Output = Self;

        fn add(self, time: Duration) -> Self {
            Self(self.0 + time)
        }
    }

    pub(crate) mod thread {
        use std::time::Duration;

        pub(crate) fn sleep(time: Duration) {
            super::SLEPT.set(super::SLEPT.get() + time);
            shuttle::thread::yield_now();
        }
    }

    /// A condition variable whose timeouts pass at any moment; shuttle's never do.
    #[derive(Debug, Default)]
    pub(crate) struct Condvar(Arc<shuttle::sync::Condvar>);

    /// Whether a wait ended since its time was over.
    pub(crate) struct TimedOut(bool);

    impl TimedOut {
        pub(crate) fn timed_out(&self) -> bool {
            self.0
        }
    }

    impl Condvar {
        pub(crate) fn new() -> Self {
            Self::default()
        }

        pub(crate) fn notify_one(&self) {
            self.0.notify_one();
        }

        pub(crate) fn notify_all(&self) {
            self.0.notify_all();
        }

        pub(crate) fn wait_while<'a, T>(
            &self,
            guard: MutexGuard<'a, T>,
            condition: impl FnMut(&mut T) -> bool,
        ) -> LockResult<MutexGuard<'a, T>> {
            self.0.wait_while(guard, condition)
        }

        /// Ends at any moment, however long `time` is.
        pub(crate) fn wait_timeout_while<'a, T>(
            &self,
            mut guard: MutexGuard<'a, T>,
            time: Duration,
            mut condition: impl FnMut(&mut T) -> bool,
        ) -> LockResult<(MutexGuard<'a, T>, TimedOut)> {
            if !condition(&mut guard) || time.is_zero() {
                let timed_out = TimedOut(condition(&mut guard));
                return Ok((guard, timed_out));
            }
            let (over, done) = (Arc::<AtomicBool>::default(), Arc::<AtomicBool>::default());
            let clock = shuttle::thread::spawn({
                let (condvar, over, done) = (self.0.clone(), over.clone(), done.clone());
                move || {
                    over.store(true, Ordering::SeqCst);
                    // It may be about to wait.
                    while !done.load(Ordering::SeqCst) {
                        condvar.notify_all();
                        shuttle::thread::yield_now();
                    }
                }
            });
            let waited = self.0.wait_while(guard, |inner| {
                condition(inner) && !over.load(Ordering::SeqCst)
            });
            done.store(true, Ordering::SeqCst);
            drop(clock);
            let mut finish = |mut guard: MutexGuard<'a, T>| {
                let timed_out = TimedOut(condition(&mut guard));
                (guard, timed_out)
            };
            match waited {
                Ok(guard) => Ok(finish(guard)),
                Err(poisoned) => Err(PoisonError::new(finish(poisoned.into_inner()))),
            }
        }
    }
}
