// SPDX-License-Identifier: MIT OR Apache-2.0
//! Filling memory before the guest needs it, with several threads.

use super::Planes;
use crate::attributes::Attribute;
use crate::error::{Doing, Error, Result};
use crate::units::{Offset, Span};
use std::collections::VecDeque;
use std::sync::Mutex;

/// Work is handed out in pieces of this size: large enough that one costs a single system call for
/// thousands of pages, small enough that threads end together.
const PIECE_BYTES: u64 = 64 << 20;

/// Fills, for each of `runs`, the plane that its attribute selects. The first failure stops all
/// threads; what was filled by then stays filled.
pub(crate) fn preallocate(
    planes: &Planes,
    runs: &[(Span<Offset>, Attribute)],
    threads: usize,
) -> Result<()> {
    let pieces = pieces(runs);
    let threads = threads.clamp(1, pieces.len().max(1));
    let work = Mutex::new(pieces);
    let failure: Mutex<Option<Error>> = Mutex::new(None);
    let worker = || loop {
        let next = work.lock().expect("no thread panics here").pop_front();
        let Some((span, attribute)) = next else { break };
        if let Err(error) = fill(planes, span, attribute) {
            work.lock().expect("no thread panics here").clear();
            failure
                .lock()
                .expect("no thread panics here")
                .get_or_insert(error);
        }
    };
    let scope = crossbeam::thread::scope(|scope| {
        for _ in 1..threads {
            // Where the system has no more threads, those that run do all of the work.
            if scope.builder().spawn(|_| worker()).is_err() {
                break;
            }
        }
        worker();
    });
    scope.expect("a worker only makes system calls");
    match failure.into_inner().expect("all threads have ended") {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

fn pieces(runs: &[(Span<Offset>, Attribute)]) -> VecDeque<(Span<Offset>, Attribute)> {
    let pieces = |&(run, attribute): &(Span<Offset>, _)| {
        run.chunks(PIECE_BYTES).map(move |piece| (piece, attribute))
    };
    runs.iter().flat_map(pieces).collect()
}

fn fill(planes: &Planes, span: Span<Offset>, attribute: Attribute) -> Result<()> {
    match attribute {
        Attribute::Private => planes.allocate(span, attribute),
        // By way of the mapping, so that a NUMA policy set on it holds and the first access of the
        // VMM doesn't fault either.
        Attribute::Shared => planes
            .kernel
            .populate(planes.mapping(), span)
            .doing(|| format!("{}: preallocating shared memory for {span}", planes.name)),
    }
}
