// SPDX-License-Identifier: MIT OR Apache-2.0
//! What is due later: a thread of the VM's own that looks after its blocks from time to time.
//!
//! It polls. Who converts a page never wakes it, since that is a system call on a vCPU's way; so it looks
//! as often as there was something to do, and less and less often, once a second at last, where there was
//! not. A chore is never done for somebody: whoever needs it done at once does it himself.

use crate::kernel::linux::block_signals;
use crate::sync::{Arc, Condvar, Instant, Mutex, MutexGuard, PoisonError};
use crate::throttle::limited;
use std::fmt;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::thread::{Builder, JoinHandle, ThreadId};
use std::time::Duration;

/// How soon the thread looks again where there was nothing to do, at first and at last.
const SOON: Duration = Duration::from_millis(50);
const LATE: Duration = Duration::from_secs(1);

/// Something that is due from time to time.
pub(crate) trait Chore: Send + Sync + fmt::Debug {
    /// Does what is due now. When more will be; `None` if there is nothing to do, as far as can be seen.
    ///
    /// It may wait for ranges, and must not wait for who ends a block.
    fn tend(&self, now: Instant) -> Option<Instant>;

    /// Memory is short: frees what it can without waiting for anybody. Whether that was any.
    fn relieve(&self) -> bool {
        false
    }
}

/// The chores of a VM, and the thread that does them, once one is needed.
#[derive(Debug, Default)]
pub(crate) struct Upkeep {
    shared: Arc<Shared>,
    thread: Mutex<Thread>,
}

#[derive(Debug, Default)]
enum Thread {
    #[default]
    None,
    Running {
        thread: JoinHandle<()>,
        /// Of the process that has it: a child that was forked has not.
        process: u32,
    },
    /// Nobody looks after anything here.
    Refused,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    /// The thread is to look whether it is to stop, or has left a chore.
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    chores: Vec<Arc<dyn Chore>>,
    /// The one that the thread is at, by its address.
    at: Option<usize>,
    /// Threads that go through all of them, by numbers that only grow.
    relieving: Vec<u64>,
    next_relief: u64,
    stop: bool,
}

/// A thread goes through all chores.
struct Relief<'a> {
    shared: &'a Shared,
    number: u64,
}

impl Drop for Relief<'_> {
    fn drop(&mut self) {
        let mut state = self.shared.state();
        state.relieving.retain(|&number| number != self.number);
        drop(state);
        self.shared.changed.notify_all();
    }
}

fn address(chore: &Arc<dyn Chore>) -> usize {
    Arc::as_ptr(chore).cast::<()>() as usize
}

impl Upkeep {
    pub(crate) fn add(&self, chore: Arc<dyn Chore>) {
        self.shared.state().chores.push(chore);
    }

    /// Takes a chore out, and waits until nobody is at it, unless that is the thread itself, which asks.
    pub(crate) fn remove(&self, chore: &Arc<dyn Chore>) {
        let which = address(chore);
        let mut state = self.shared.state();
        state.chores.retain(|chore| address(chore) != which);
        if self.is_upkeep() {
            return;
        }
        // Who begins from now on does not find it any more.
        let end = state.next_relief;
        let left = |state: &mut State| {
            state.at == Some(which) || state.relieving.iter().any(|&number| number < end)
        };
        let left = self.shared.changed.wait_while(state, left);
        drop(left.unwrap_or_else(PoisonError::into_inner));
    }

    /// Whether somebody looks after the chores from now on. A process that may have no more threads goes
    /// without.
    pub(crate) fn start(&self) -> bool {
        let mut thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        // Schedules do the chores themselves.
        if cfg!(feature = "shuttle") {
            return false;
        }
        if let Thread::None = *thread {
            let shared = self.shared.clone();
            let name = Builder::new().name("gmem-upkeep".into());
            *thread = match name.spawn(move || shared.look_after()) {
                Ok(thread) => Thread::Running {
                    thread,
                    process: std::process::id(),
                },
                Err(error) => {
                    limited!(
                        warn,
                        "no thread is to be had for what is due later ({error}): memory is given back at \
                         once, and quarantined pages wait for the next conversion or reset"
                    );
                    Thread::Refused
                }
            };
        }
        matches!(*thread, Thread::Running { .. })
    }

    /// Does all chores, as its thread would at that time.
    #[cfg(any(test, feature = "fake-kernel"))]
    pub(crate) fn tend(&self, now: Instant) {
        let chores = self.shared.state().chores.clone();
        for chore in chores {
            chore.tend(now);
        }
    }

    /// Has all chores free what they can at once. Whether that was any.
    pub(crate) fn relieve(&self) -> bool {
        let mut state = self.shared.state();
        let number = state.next_relief;
        state.next_relief += 1;
        state.relieving.push(number);
        let chores = state.chores.clone();
        drop(state);
        // Declared before what it is about: their share of a chore goes first.
        let _relief = Relief {
            shared: &self.shared,
            number,
        };
        let chores = chores;
        let freed: Vec<bool> = chores.iter().map(|chore| chore.relieve()).collect();
        freed.contains(&true)
    }

    fn is_upkeep(&self) -> bool {
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        match &*thread {
            Thread::Running { thread, .. } => thread.thread().id() == this_thread(),
            Thread::None | Thread::Refused => false,
        }
    }
}

fn this_thread() -> ThreadId {
    std::thread::current().id()
}

impl Drop for Upkeep {
    fn drop(&mut self) {
        self.shared.state().stop = true;
        self.shared.changed.notify_all();
        let itself = self.is_upkeep();
        let thread = self
            .thread
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner);
        match std::mem::take(thread) {
            // A chore may have been the last to have the VM.
            Thread::Running { thread, process } if !itself && process == std::process::id() => {
                // A panic of it was reported when it happened.
                let _ = thread.join();
            }
            _ => {}
        }
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn look_after(&self) {
        block_signals();
        let mut idle = SOON;
        let mut state = self.state();
        while !state.stop {
            let mut next: Option<Instant> = None;
            let mut index = 0;
            // Of none but the one that it is at does it have a share: who takes one out has it alone.
            while let (Some(chore), false) = (state.chores.get(index).cloned(), state.stop) {
                let which = address(&chore);
                state.at = Some(which);
                drop(state);
                // Whatever goes wrong with one, who takes it out must not wait for ever.
                let tended = catch_unwind(AssertUnwindSafe(|| chore.tend(Instant::now())));
                drop(chore);
                state = self.state();
                state.at = None;
                self.changed.notify_all();
                next = next.into_iter().chain(tended.unwrap_or(None)).min();
                // Those before it may have been taken out meanwhile: then one has to wait for the next time.
                let now_at = state
                    .chores
                    .iter()
                    .position(|chore| address(chore) == which);
                index = now_at.map_or(index, |at| at + 1);
            }
            let pause = match next {
                Some(due) => {
                    idle = SOON;
                    // So that no chore keeps a processor, and others that get something to do don't wait for it.
                    let due = due.saturating_duration_since(Instant::now());
                    due.clamp(Duration::from_millis(1), LATE)
                }
                None => {
                    let pause = idle;
                    idle = (idle * 2).min(LATE);
                    pause
                }
            };
            let going = |state: &mut State| !state.stop;
            let waited = self.changed.wait_timeout_while(state, pause, going);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc;

    #[derive(Debug, Default)]
    struct Counted {
        times: AtomicUsize,
        again: Option<Duration>,
    }

    impl Chore for Counted {
        fn tend(&self, now: Instant) -> Option<Instant> {
            self.times.fetch_add(1, Ordering::SeqCst);
            self.again.map(|pause| now + pause)
        }
    }

    fn wait_for(counted: &Counted, times: usize) {
        let patience = Instant::now() + Duration::from_secs(60);
        while counted.times.load(Ordering::SeqCst) < times {
            assert!(Instant::now() < patience, "it is not looked after");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn what_is_due_is_done_and_what_was_taken_out_no_more() {
        let upkeep = Upkeep::default();
        let busy = Arc::new(Counted {
            again: Some(Duration::from_millis(1)),
            ..Counted::default()
        });
        let idle = Arc::new(Counted::default());
        upkeep.add(busy.clone());
        upkeep.add(idle.clone());
        assert!(upkeep.start() && upkeep.start());
        wait_for(&busy, 20);
        wait_for(&idle, 1);
        upkeep.remove(&(busy.clone() as Arc<dyn Chore>));
        let done = busy.times.load(Ordering::SeqCst);
        wait_for(&idle, idle.times.load(Ordering::SeqCst) + 1);
        assert_eq!(busy.times.load(Ordering::SeqCst), done);
        drop(upkeep);
        assert_eq!(Arc::strong_count(&idle), 1, "the thread is gone");
    }

    /// Holds the thread until it is told to go on.
    #[derive(Debug)]
    struct Held {
        at: Mutex<mpsc::Sender<()>>,
        go_on: Mutex<mpsc::Receiver<()>>,
    }

    impl Chore for Held {
        fn tend(&self, _: Instant) -> Option<Instant> {
            self.at.lock().unwrap().send(()).unwrap();
            let _ = self.go_on.lock().unwrap().recv();
            None
        }
    }

    #[test]
    fn who_takes_a_chore_out_waits_until_it_is_left() {
        let upkeep = Upkeep::default();
        let ((at, is_at), (go_on, told)) = (mpsc::channel(), mpsc::channel());
        let held: Arc<dyn Chore> = Arc::new(Held {
            at: Mutex::new(at),
            go_on: Mutex::new(told),
        });
        upkeep.add(held.clone());
        assert!(upkeep.start());
        is_at.recv().unwrap();
        let gone = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            let remover = scope.spawn(|| {
                upkeep.remove(&held);
                gone.store(1, Ordering::SeqCst);
            });
            for _ in 0..100 {
                std::thread::yield_now();
                assert_eq!(gone.load(Ordering::SeqCst), 0);
            }
            go_on.send(()).unwrap();
            remover.join().unwrap();
        });
    }
}
