// SPDX-License-Identifier: MIT OR Apache-2.0
//! What several threads do at once, in any order that shuttle thinks of.
//!
//! Each schedule makes a VM with two blocks on the kernel in memory, has three threads do a few things to
//! it, of kinds that the test names, and then holds the library's books, the kernel and devices against
//! each other; and whatever happened, the VM must be led back to a state without a flaw. A change of
//! thread can come at each lock, atomic and call of the kernel. A schedule that fails prints what it was
//! about, and a string that `shuttle::replay` takes.
//!
//! `GMEM_SCHEDULES_STEPS=10000000 cargo test --release -p gmem-schedules at_length -- --nocapture` goes on for so many
//! steps, by other seeds each time.

mod rig;

use gmem_schedules::Attribute;
use rig::{explore, explore_steps, Backing, Kind, Op, Rig, Setup, BLOCKS};
use std::sync::Arc;

const THREADS: usize = 3;
const CONFIDENTIAL: &[Backing] = &[Backing::Split, Backing::InPlace];
const ALL: &[Backing] = &[Backing::Split, Backing::InPlace, Backing::Ordinary];

/// What threads do: two of them convert, and the third does something of `kinds`, or all do anything of
/// `mixed`.
#[derive(Clone, Copy)]
enum Mix {
    Against(&'static [Kind]),
    Anything(&'static [Kind]),
}

impl Mix {
    fn kinds(&self) -> &'static [Kind] {
        match self {
            Mix::Against(kinds) | Mix::Anything(kinds) => kinds,
        }
    }

    /// What each thread is to do.
    fn draw(&self, setup: &Setup) -> Vec<Vec<Op>> {
        let blocks = match self.kinds().contains(&Kind::Block) {
            true => BLOCKS + 1,
            false => BLOCKS,
        };
        let pages = setup.pages * blocks as u64;
        let convert = &[Kind::Convert];
        let draw = |kinds, count| (0..count).map(|_| Op::draw(kinds, pages)).collect();
        match self {
            Mix::Against(kinds) => vec![draw(convert, 2), draw(convert, 2), draw(kinds, 1)],
            Mix::Anything(kinds) => (0..THREADS).map(|_| draw(kinds, 2)).collect(),
        }
    }

    /// With what a call may fail though no call of the kernel does.
    fn allowed(&self, setup: &Setup) -> Vec<i32> {
        let mut allowed = Vec::new();
        if setup.vm == Backing::Ordinary {
            // Nothing there can be private.
            allowed.push(libc::EINVAL);
        }
        for kind in self.kinds() {
            allowed.extend(match kind {
                // The addresses may have no block.
                Kind::Rebind | Kind::Block => &[libc::EINVAL][..],
                // There may be no VM, and no binding of what was bound before.
                Kind::Rebuild => &[libc::EBUSY, libc::EINVAL],
                Kind::End => &[libc::EBUSY],
                Kind::Poison => &[libc::EIO],
                Kind::Listen => &[libc::EPERM],
                // Devices have the pages.
                Kind::Discard => &[libc::EBUSY],
                Kind::Place => &[libc::ENOTSUP],
                // Two in one IOAS; one that another thread has removed.
                Kind::Window => &[libc::EEXIST],
                _ => &[],
            });
        }
        allowed
    }

    fn play(self, mut setup: Setup) {
        setup.resets = self.kinds().contains(&Kind::Reset);
        let programs = self.draw(&setup);
        rig::begin_story(format!("{setup:?}"));
        let allowed: Arc<[i32]> = self.allowed(&setup).into();
        let rig = Rig::new(setup);
        let threads: Vec<_> = programs
            .iter()
            .enumerate()
            .map(|(number, program)| {
                let (rig, program, allowed) = (rig.clone(), program.clone(), allowed.clone());
                shuttle::thread::spawn(move || {
                    let run = |op: Op| (op, op.run(&rig, number, &allowed));
                    program.into_iter().map(run).collect::<Vec<_>>()
                })
            })
            .collect();
        let done: Vec<Vec<(Op, bool)>> = threads.into_iter().map(|t| t.join().unwrap()).collect();
        // Among others, requests may be for what is elsewhere, or nowhere.
        let converts = self.kinds().iter().all(|kind| *kind == Kind::Convert);
        if setup.failures.is_none() && converts {
            check_order(&rig, &done);
        }
        rig.check();
        rig.lead_back();
    }
}

/// Conversions have followed one another, in an order in which each thread's own come as it made them.
fn check_order(rig: &Rig, done: &[Vec<(Op, bool)>]) {
    let pages = rig.setup.pages;
    let attribute = |page: u64| {
        let block = &rig.blocks[(page / pages) as usize];
        block.run_at(page % pages * rig.setup.grain).unwrap().0
    };
    let found: Vec<_> = (0..BLOCKS as u64 * pages).map(attribute).collect();
    let lists: Vec<Vec<Op>> = done
        .iter()
        .map(|list| {
            list.iter()
                .filter(|(_, done)| *done)
                .map(|(op, _)| *op)
                .collect()
        })
        .collect();
    let before = vec![rig.setup.initial; found.len()];
    assert!(
        is_an_order(&before, &lists, &found),
        "no order leads to {found:?}"
    );
}

fn is_an_order(before: &[Attribute], lists: &[Vec<Op>], found: &[Attribute]) -> bool {
    if lists.iter().all(Vec::is_empty) {
        return before == found;
    }
    (0..lists.len()).any(|next| {
        let Some(op) = lists[next].first() else {
            return false;
        };
        let mut after = before.to_vec();
        after[op.first as usize..(op.first + op.count) as usize].fill(op.attribute);
        let mut rest = lists.to_vec();
        rest[next].remove(0);
        is_an_order(&after, &rest, found)
    })
}

const SCHEDULES: usize = 800;

fn against(backings: &'static [Backing], kinds: &'static [Kind]) {
    explore(SCHEDULES, move || {
        Mix::Against(kinds).play(Setup::draw(backings).may_fail());
    });
}

#[test]
fn conversions_follow_one_another() {
    against(CONFIDENTIAL, &[Kind::Convert]);
}

#[test]
fn conversions_and_memory_faults() {
    against(CONFIDENTIAL, &[Kind::Fault]);
}

/// A request that waits for its pages looks again where they are bound: if `Machine::bindings_are` always says
/// that nothing has changed, this fails.
#[test]
fn conversions_and_bindings() {
    against(CONFIDENTIAL, &[Kind::Rebind]);
}

#[test]
fn conversions_and_windows_that_come_and_go() {
    against(CONFIDENTIAL, &[Kind::Window]);
}

#[test]
fn conversions_and_windows_that_are_reshaped() {
    against(CONFIDENTIAL, &[Kind::Reshape]);
}

#[test]
fn conversions_and_a_vm_that_is_rebuilt() {
    against(CONFIDENTIAL, &[Kind::Rebuild]);
}

#[test]
fn conversions_and_lost_memory() {
    against(ALL, &[Kind::Poison]);
}

#[test]
fn conversions_and_resets() {
    against(CONFIDENTIAL, &[Kind::Reset]);
}

#[test]
fn conversions_and_memory_that_is_given_back() {
    against(CONFIDENTIAL, &[Kind::Discard]);
}

#[test]
fn conversions_and_bytes_that_are_placed() {
    against(CONFIDENTIAL, &[Kind::Place]);
}

#[test]
fn conversions_and_listeners() {
    against(CONFIDENTIAL, &[Kind::Listen]);
}

#[test]
fn conversions_and_what_is_due_later() {
    against(CONFIDENTIAL, &[Kind::Tend]);
}

#[test]
fn conversions_and_blocks_that_come_and_go() {
    against(CONFIDENTIAL, &[Kind::Block]);
}

#[test]
fn conversions_and_the_end_of_the_process() {
    against(CONFIDENTIAL, &[Kind::End]);
}

const ANYTHING: &[Kind] = &[
    Kind::Convert,
    Kind::Convert,
    Kind::Convert,
    Kind::Fault,
    Kind::Rebind,
    Kind::Window,
    Kind::Reshape,
    Kind::Rebuild,
    Kind::Poison,
    Kind::Reset,
    Kind::Discard,
    Kind::Place,
    Kind::Listen,
    Kind::Block,
    Kind::Tend,
];

fn anything() {
    Mix::Anything(ANYTHING).play(Setup::draw(ALL).may_fail());
}

#[test]
fn anything_at_once() {
    explore(SCHEDULES, anything);
}

/// Fewer, as each takes its time.
const HUGE_SCHEDULES: usize = SCHEDULES / 4;

fn huge(mix: Mix) {
    explore(HUGE_SCHEDULES, move || {
        mix.play(Setup::draw(CONFIDENTIAL).huge().may_fail());
    });
}

#[test]
fn conversions_of_huge_pages() {
    huge(Mix::Against(&[Kind::Convert, Kind::Tend]));
}

#[test]
fn anything_at_once_with_huge_pages() {
    huge(Mix::Anything(ANYTHING));
}

#[test]
fn anything_at_once_at_length() {
    let steps = std::env::var("GMEM_SCHEDULES_STEPS");
    explore_steps(
        steps.map_or(200_000, |steps| steps.parse().expect("a number")),
        anything,
    );
}
