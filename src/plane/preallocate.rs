// SPDX-License-Identifier: MIT OR Apache-2.0
//! Filling memory before the guest needs it, with several threads.
//!
//! Memory with a mapping can be filled in two ways, of which either may be several times the faster:
//! fallocate(2) has no page tables to fill, and leaves clearing a page to its first access in shmem
//! and guest_memfd, but takes a lock per file in shmem; page faults (MADV_POPULATE_WRITE) run side by
//! side. Which one wins depends on the file, the threads, the CPUs and whether all this is a guest
//! itself, so both are tried on a small part and the better one does the rest. Private memory has no
//! mapping.

use super::Planes;
use crate::attributes::Attribute;
use crate::error::{Cause, Doing, Error, Of, Result};
use crate::kernel::linux::block_signals;
use crate::units::{Offset, Span, PAGE_SIZE};
use log::debug;
use std::collections::VecDeque;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Work is handed out in pieces of this size: large enough that one costs a single system call for
/// thousands of pages, small enough that threads end together.
const PIECE_BYTES: u64 = 16 << 20;

/// Each way is tried on one part of so many, so that the slower one costs little even if it is much
/// slower...
const TRIAL_PARTS: u64 = 128;

/// ...but not on less than this for a thread, of which nothing could be told.
const MIN_PIECE_BYTES: u64 = 1 << 20;

/// For memory that leaves the kernel's direct map: each page that does may cost every CPU its TLB,
/// and a kernel that saves up such flushes can do so within a call, not between two.
const BATCH_BYTES: u64 = 1 << 30;

#[derive(Clone, Copy, Debug)]
enum Way {
    Allocate,
    Populate,
}

/// Fills, for each of `runs`, the plane that its attribute selects. The first failure stops all
/// threads; what was filled by then stays filled.
pub(crate) fn preallocate(
    planes: &Planes,
    runs: &[(Span<Offset>, Attribute)],
    threads: usize,
) -> Result<()> {
    let of = |attribute| {
        let runs = runs.iter().filter(move |(_, of)| *of == attribute);
        runs.map(|&(run, _)| run)
    };
    // More threads than pieces would find nothing to do.
    let total: u64 = runs.iter().map(|(run, _)| run.size_bytes()).sum();
    let pieces = usize::try_from(total / MIN_PIECE_BYTES).unwrap_or(usize::MAX);
    let work = Work {
        planes,
        threads: threads.min(pieces).max(1),
    };
    work.fill(
        of(Attribute::Private).collect(),
        Attribute::Private,
        Way::Allocate,
    )?;
    work.fill_the_better_way(of(Attribute::Shared).collect())
}

struct Work<'a> {
    planes: &'a Planes,
    threads: usize,
}

impl Work<'_> {
    /// Shared memory.
    fn fill_the_better_way(&self, mut runs: VecDeque<Span<Offset>>) -> Result<()> {
        let total: u64 = runs.iter().map(Span::size_bytes).sum();
        let shared = Attribute::Shared;
        let trial = (total / TRIAL_PARTS / MIN_PIECE_BYTES).max(self.threads as u64);
        let trial = trial * MIN_PIECE_BYTES;
        // Pages of a pool are cleared either way, which takes nearly all of the time, but by
        // hugetlbfs_fallocate one at a time. Transparent huge pages come by page faults, and only
        // where a whole one is wanted: allocating knows where.
        let known = match () {
            // Page faults would be one batch each, and MADV_POPULATE_WRITE is refused as whoever
            // pins pages is.
            () if !self.planes.is_in_direct_map() => Some(Way::Allocate),
            () if self.planes.has_pool() => Some(Way::Populate),
            () if self.planes.huge_pages_are_transparent() => Some(Way::Allocate),
            () if 4 * trial > total => Some(Way::Allocate),
            () => None,
        };
        if let Some(way) = known {
            return self.fill(runs, shared, way).map(drop);
        }
        let allocating = self.fill(take(&mut runs, trial), shared, Way::Allocate)?;
        let populating = self.fill(take(&mut runs, trial), shared, Way::Populate)?;
        // Page faults clear memory and fill page tables, which fallocate leaves to the first access:
        // where both are as quick, they have done more.
        let way = match populating < allocating + allocating / 10 {
            true => Way::Populate,
            false => Way::Allocate,
        };
        debug!(
            "{}: {trial:#x} bytes took {allocating:?} by fallocate and {populating:?} by page \
             faults: {way:?}",
            self.planes.name
        );
        self.fill(runs, shared, way).map(drop)
    }

    /// Size of the pages that a plane is made of: no piece is less.
    fn page_size(&self, attribute: Attribute) -> u64 {
        match attribute {
            Attribute::Shared => self.planes.huge_page().unwrap_or(PAGE_SIZE),
            Attribute::Private => PAGE_SIZE,
        }
    }

    /// How long it took.
    fn fill(
        &self,
        runs: VecDeque<Span<Offset>>,
        attribute: Attribute,
        way: Way,
    ) -> Result<Duration> {
        if runs.is_empty() {
            return Ok(Duration::ZERO);
        }
        let start = Instant::now();
        let total: u64 = runs.iter().map(Span::size_bytes).sum();
        let share = total / self.threads as u64 / MIN_PIECE_BYTES * MIN_PIECE_BYTES;
        let most = match self.planes.is_in_direct_map() {
            true => PIECE_BYTES,
            false => BATCH_BYTES,
        };
        let piece = share
            .clamp(MIN_PIECE_BYTES, most)
            .next_multiple_of(self.page_size(attribute));
        let pieces: VecDeque<_> = runs
            .into_iter()
            .flat_map(|run| pieces_of(run, piece))
            .collect();
        let threads = self.threads.min(pieces.len());
        let pieces = Mutex::new(pieces);
        let failure: Mutex<Option<Error>> = Mutex::new(None);
        let fail = |error| {
            pieces.lock().expect("no thread panics here").clear();
            let mut failure = failure.lock().expect("no thread panics here");
            failure.get_or_insert(error);
        };
        let worker = || loop {
            let next = pieces.lock().expect("no thread panics here").pop_front();
            let Some(span) = next else { break };
            if let Err(error) = self.fill_piece(span, attribute, way) {
                fail(error);
            }
        };
        // This thread works too, unless a policy is to be set: its own is not ours to change.
        let policy = self.planes.policy.as_ref();
        let own = usize::from(policy.is_none());
        let scope = crossbeam::thread::scope(|scope| {
            let mut helpers = 0;
            while helpers + own < threads {
                let helper = scope.builder().spawn(|_| {
                    block_signals();
                    match self.planes.enter_policy() {
                        Ok(()) => worker(),
                        Err(error) => fail(error),
                    }
                });
                // Where the system has no more threads, those that run do all of the work.
                match helper {
                    Ok(_) => helpers += 1,
                    Err(_) => break,
                }
            }
            match policy {
                None => worker(),
                Some(_) if helpers == 0 => fail(
                    Error::new(
                        Cause::NoThread,
                        "there is no thread that could allocate by its NUMA policy",
                    )
                    .of(&self.planes.name),
                ),
                Some(_) => {}
            }
        });
        scope.expect("a worker only makes system calls");
        match failure.into_inner().expect("all threads have ended") {
            Some(error) => Err(error),
            None => Ok(start.elapsed()),
        }
    }

    fn fill_piece(&self, span: Span<Offset>, attribute: Attribute, way: Way) -> Result<()> {
        let planes = self.planes;
        if let Way::Populate = way {
            let populated = planes.kernel.populate(planes.mapping(), span);
            let no_huge_page = |errno| errno == libc::EFAULT && planes.has_pool();
            if !matches!(&populated, Err(call) if no_huge_page(call.errno)) {
                return populated
                    .doing(|| format!("preallocating shared memory for {span}"))
                    .of(&planes.name);
            }
            // The other way has a better word for an empty pool.
        }
        planes.allocate_here(span, attribute)
    }
}

/// Cuts a run at multiples of `piece`, so that no huge page is in two pieces.
fn pieces_of(run: Span<Offset>, piece: u64) -> impl Iterator<Item = Span<Offset>> {
    let first = run.first() / piece;
    let last = (run.end() - 1) / piece;
    (first..=last).map(move |number| {
        let whole = Span::between(number * piece, (number + 1) * piece);
        whole
            .intersection(&run)
            .expect("each has a part of the run")
    })
}

/// Takes about `bytes` off the front of `runs`.
fn take(runs: &mut VecDeque<Span<Offset>>, mut bytes: u64) -> VecDeque<Span<Offset>> {
    let mut taken = VecDeque::new();
    while let Some(run) = runs.pop_front() {
        if run.size_bytes() > bytes {
            if bytes > 0 {
                taken.push_back(Span::between(run.first(), run.first() + bytes));
            }
            runs.push_front(Span::between(run.first() + bytes, run.end()));
            break;
        }
        bytes -= run.size_bytes();
        taken.push_back(run);
    }
    taken
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_end_at_multiples_and_are_all_of_a_run() {
        let run = Span::between(0x3000, 0x11000);
        let pieces: Vec<_> = pieces_of(run, 0x4000).collect();
        let ends = [0x3000, 0x4000, 0x8000, 0xc000, 0x10000, 0x11000];
        let expected = ends.windows(2).map(|two| Span::between(two[0], two[1]));
        assert_eq!(pieces, expected.collect::<Vec<_>>());
    }

    #[test]
    fn what_is_taken_and_what_is_left_are_all_there_was() {
        let runs = || VecDeque::from([Span::between(0, 0x3000), Span::between(0x5000, 0x9000)]);
        for pages in 0..9 {
            let mut left = runs();
            let mut all = take(&mut left, pages * 0x1000);
            let taken: u64 = all.iter().map(Span::size_bytes).sum();
            assert_eq!(taken, pages.min(7) * 0x1000);
            all.extend(left);
            let mut merged = crate::run_set::RunSet::default();
            all.into_iter().for_each(|run| merged.insert(run));
            let merged = merged.inside(Span::between(0, 0x10000));
            assert_eq!(VecDeque::from(merged.to_vec()), runs());
        }
    }
}
