// SPDX-License-Identifier: MIT OR Apache-2.0
//! Runs a body in many orders.

use shuttle::scheduler::{PctScheduler, RandomScheduler, Schedule, Scheduler, Task, TaskId};
use shuttle::{Config, Runner};
use std::cell::RefCell;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

/// Every one of this many schedules is the same each time, unless `GMEM_SCHEDULES_SEED` says otherwise.
const SEED: u64 = 0x676d_656d;
/// Changes of priority in a schedule: faults that take so many changes of thread at the right places
/// are found soon.
const DEPTH: usize = 4;

std::thread_local! {
    /// What the schedule that runs on this thread is about, for who has to read that it failed.
    static STORY: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) };
}

/// Begins the story of a schedule.
pub fn begin_story(about: String) {
    STORY.set(vec![about]);
}

/// Goes on with it.
pub fn tell(line: std::fmt::Arguments) {
    let thread = usize::from(shuttle::thread::current().id());
    STORY.with_borrow_mut(|story| story.push(format!("{thread}: {line}")));
}

/// What the library logs is a part of the story.
struct Teller;

impl log::Log for Teller {
    fn enabled(&self, _: &log::Metadata) -> bool {
        true
    }

    fn log(&self, record: &log::Record) {
        tell(format_args!("{}", record.args()));
    }

    fn flush(&self) {}
}

/// Runs `body` in so many orders: half of them at random, half with priorities that change at a few
/// random places.
pub fn explore(schedules: usize, body: impl Fn() + Send + Sync + 'static) {
    let body = Arc::new(body);
    let seed = std::env::var("GMEM_SCHEDULES_SEED");
    let seed = seed.map_or(SEED, |seed| seed.parse().expect("a number"));
    let steps = Arc::new(AtomicU64::new(0));
    let random = RandomScheduler::new_from_seed(seed, schedules / 2);
    run(random, &body, &steps, u64::MAX);
    let pct = PctScheduler::new_from_seed(seed, DEPTH, schedules - schedules / 2);
    run(pct, &body, &steps, u64::MAX);
    println!(
        "{schedules} schedules, {} steps",
        steps.load(Ordering::Relaxed)
    );
}

/// The same for so many steps, by seeds that nobody has chosen.
pub fn explore_steps(most: u64, body: impl Fn() + Send + Sync + 'static) {
    let body = Arc::new(body);
    let steps = Arc::new(AtomicU64::new(0));
    run(RandomScheduler::new(usize::MAX), &body, &steps, most / 2);
    run(PctScheduler::new(DEPTH, usize::MAX), &body, &steps, most);
    println!("{} steps", steps.load(Ordering::Relaxed));
}

fn run(
    scheduler: impl Scheduler + 'static,
    body: &Arc<impl Fn() + Send + Sync + 'static>,
    steps: &Arc<AtomicU64>,
    most: u64,
) {
    // Another test may have been the first.
    let _ = log::set_logger(&Teller);
    log::set_max_level(log::LevelFilter::Warn);
    let mut config = Config::new();
    config.stack_size = 256 << 10;
    config.silence_warnings = true;
    let counted = Counted {
        scheduler,
        steps: steps.clone(),
        most,
    };
    let body = body.clone();
    let ran = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        Runner::new(counted, config).run(move || body());
    }));
    if let Err(panic) = ran {
        STORY.with_borrow(|story| eprintln!("{}", story.join("\n")));
        std::panic::resume_unwind(panic);
    }
}

/// Counts the steps of a scheduler, and ends it after so many.
struct Counted<S> {
    scheduler: S,
    steps: Arc<AtomicU64>,
    most: u64,
}

impl<S: Scheduler> Scheduler for Counted<S> {
    fn new_execution(&mut self) -> Option<Schedule> {
        match self.steps.load(Ordering::Relaxed) >= self.most {
            true => None,
            false => self.scheduler.new_execution(),
        }
    }

    fn next_task(
        &mut self,
        runnable: &[&Task],
        current: Option<TaskId>,
        is_yielding: bool,
    ) -> Option<TaskId> {
        self.steps.fetch_add(1, Ordering::Relaxed);
        self.scheduler.next_task(runnable, current, is_yielding)
    }

    fn next_u64(&mut self) -> u64 {
        self.scheduler.next_u64()
    }
}
