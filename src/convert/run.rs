// SPDX-License-Identifier: MIT OR Apache-2.0
//! Carries a plan out; if a step fails, undoes it and all before it, last first.

use super::plan::{KernelCall, Plan, Purpose, Step, Target, Told};
use crate::attributes::Attribute;
use crate::error::{Error, Result};
use crate::units::{Offset, Span};

/// Where a step stopped: earlier targets are done, and of this one the runs that end at `end` or before,
/// the last of them perhaps half-way.
#[derive(Clone, Copy, Debug)]
struct Reached {
    target: usize,
    end: u64,
}

/// Why, and where.
type Halted = (Error, Reached);

/// All of `plan`, or nothing of it, but for devices that could not be given what is shared in place:
/// that is quarantined, and an error all the same. The caller has the ranges of its targets locked.
pub(super) fn run(plan: &Plan) -> Result<()> {
    let steps = Step::to_decision(plan.attribute);
    for (index, &step) in steps.iter().enumerate() {
        if let Err((error, reached)) = apply(plan, step) {
            undo_all(plan, &steps[..=index], reached);
            return Err(error);
        }
    }
    let mut result = Ok(());
    for &step in Step::after_decision(plan.attribute) {
        result = result.and(finish(plan, step));
    }
    count(plan);
    result
}

fn count(plan: &Plan) {
    let mut counted = None;
    for target in &plan.targets {
        let block = target.block();
        // Targets of one block are neighbours: the conversion counts once in it.
        if counted.replace(block.number()) != Some(block.number()) {
            match plan.attribute {
                Attribute::Private => block.counters().to_private.add(1),
                Attribute::Shared => block.counters().to_shared.add(1),
            }
        }
    }
}

/// The attribute that the plan's targets had before it.
fn before(plan: &Plan) -> Attribute {
    plan.attribute.other()
}

/// Goes through what `next` finds from one place to the next in each target that the step is for.
fn each<'p>(
    plan: &'p Plan,
    step: Step,
    next: impl Fn(&Target, u64) -> Option<Span<Offset>>,
    mut act: impl FnMut(&'p Target, Span<Offset>) -> Result<()>,
) -> std::result::Result<(), Halted> {
    let targets = plan.targets.iter().enumerate();
    for (index, target) in targets.filter(|(_, target)| plan.has(step, target)) {
        let mut at = 0;
        while let Some(found) = next(target, at) {
            at = found.end();
            act(target, found).map_err(|error| {
                // Who refused told its own listeners: only completed ones need to hear of it.
                let end = match step {
                    Step::Begin => found.first(),
                    _ => at,
                };
                (error, Reached { target: index, end })
            })?;
        }
    }
    Ok(())
}

fn each_run<'p>(
    plan: &'p Plan,
    step: Step,
    act: impl FnMut(&'p Target, Span<Offset>) -> Result<()>,
) -> std::result::Result<(), Halted> {
    each(plan, step, |target, at| target.changed.first_from(at), act)
}

/// As many runs at once as one call can be made for.
fn each_piece<'p>(
    plan: &'p Plan,
    step: Step,
    act: impl FnMut(&'p Target, Span<Offset>) -> Result<()>,
) -> std::result::Result<(), Halted> {
    each(plan, step, |target, at| target.piece_from(at), act)
}

fn apply(plan: &Plan, step: Step) -> std::result::Result<(), Halted> {
    match step {
        Step::Begin => each_run(plan, step, |target, run| target.begin(run, plan.attribute)),
        Step::DmaOut => each_piece(plan, step, |target, piece| {
            target.block().windows().withdraw(piece)
        }),
        Step::Populate => {
            let mut repeats = Repeats::default();
            each_run(plan, step, |target, run| {
                // Its huge pages may be those of the run before it.
                let pages = target.block().planes().allocated_for(run, plan.attribute);
                match repeats.covers(target, pages) {
                    true => Ok(()),
                    false => {
                        let wanted = plan.must_populate(target);
                        target.block().populate(run, plan.attribute, wanted)
                    }
                }
            })
        }
        Step::DmaIn => each_run(plan, step, |target, run| {
            target.block().quarantine().lift(run);
            target.block().windows().admit(run)
        }),
        Step::Erase => {
            let mut repeats = Repeats::default();
            each_run(plan, step, |target, run| {
                // With a huge page went what other runs have in it.
                let planes = target.block().planes();
                match repeats.covers(target, planes.pages_around(run, before(plan))) {
                    true => Ok(()),
                    false => target.block().erase(run),
                }
            })
        }
        Step::Kernel => plan
            .kernel_calls
            .iter()
            .try_for_each(|call| tell_kernel(plan, call)),
        Step::DmaInLate | Step::Release | Step::End => {
            unreachable!("these come after the decision")
        }
    }
}

/// A step that can't change any more what has been decided.
fn finish(plan: &Plan, step: Step) -> Result<()> {
    let mut result = Ok(());
    let done = match step {
        Step::DmaInLate => each_run(plan, step, |target, run| {
            target.block().quarantine().lift(run);
            let admitted = target.block().windows().admit(run);
            if admitted.is_err() {
                target.block().windows().quarantine(run);
                let so_far = std::mem::replace(&mut result, Ok(()));
                result = so_far.and(admitted);
            }
            Ok(())
        }),
        Step::Release => each_piece(plan, step, |target, piece| {
            if plan.attribute == Attribute::Private {
                target.block().quarantine().lift(piece);
            }
            if target.is_split() {
                release(plan, target, piece);
            }
            Ok(())
        }),
        Step::End => each_run(plan, step, |target, run| {
            target.end(run, plan.attribute, true);
            Ok(())
        }),
        _ => unreachable!("the others come before the decision"),
    };
    debug_assert!(done.is_ok());
    result
}

/// Frees or keeps what a piece has left behind. Between its runs nothing is that could be kept, but a hole may
/// go across.
fn release(plan: &Plan, target: &Target, piece: Span<Offset>) {
    let (block, plane) = (target.block(), before(plan));
    let mut rest = Some(piece);
    if plan.purpose != Purpose::Reset && block.planes().may_keep(plane) {
        let mut repeats = Repeats::default();
        let mut at = piece.first();
        rest = None;
        while let Some(run) = target.changed.first_from(at) {
            if run.first() >= piece.end() {
                break;
            }
            at = run.end();
            // With a huge page goes what other runs have in it.
            let left = block.releaser().releasable(run, plane);
            if !repeats.covers(target, left) && !block.releaser().keep(run, left, plane) {
                rest = Some(Span::between(run.first(), piece.end()));
                break;
            }
        }
    }
    if let Some(rest) = rest {
        block
            .releaser()
            .release(block.releaser().releasable(rest, plane), plane);
    }
}

/// What was done last, to do it only once to a huge page.
#[derive(Default)]
struct Repeats(Option<(u64, Span<Offset>)>);

impl Repeats {
    /// Whether the last one was in the same block and covers this one.
    fn covers(&mut self, target: &Target, range: Span<Offset>) -> bool {
        let number = target.block().number();
        let last = self.0.replace((number, range));
        last.is_some_and(|(block, last)| block == number && last.contains(&range))
    }
}

fn tell_kernel(plan: &Plan, call: &KernelCall) -> std::result::Result<(), Halted> {
    let first = call.targets.start;
    let target = &plan.targets[first];
    let not_this = |error| {
        let reached = Reached {
            target: first,
            end: 0,
        };
        (error, reached)
    };
    match call.told {
        Told::File(offsets) => {
            let told = target.block().tell_file(offsets, plan.attribute);
            return told.map_err(not_this);
        }
        Told::FileByRuns => {
            let mut at = 0;
            while let Some(run) = target.changed.first_from(at) {
                at = run.end();
                let told = target.block().tell_file(run, plan.attribute);
                told.map_err(|error| {
                    let end = run.first();
                    (error, Reached { target: first, end })
                })?;
            }
            return Ok(());
        }
        Told::Vm(gpas) => {
            let told = target.block().tell_vm(gpas, plan.attribute);
            told.map_err(not_this)?;
        }
        Told::Nobody => {}
    }
    for target in &plan.targets[call.targets.clone()] {
        // What lies between has the attribute.
        target.block().record(target.changed.hull(), plan.attribute);
    }
    Ok(())
}

/// Undoes the kernel's step for a run: between runs lie pages that had the attribute before. One that
/// fails keeps what it has, in the kernel and here.
fn revert(plan: &Plan, target: &Target, run: Span<Offset>) -> Result<()> {
    let (block, attribute) = (target.block(), before(plan));
    if !target.is_split() {
        return block.tell_file(run, attribute);
    }
    if let Some(gpas) = target.gpas(run) {
        block.tell_vm(gpas, attribute)?;
    }
    block.record(run, attribute);
    Ok(())
}

/// A step on `run` can't be undone.
fn give_up(target: &Target, run: Span<Offset>, error: &Error) {
    super::give_up(target.block(), run, error);
}

/// Undoes steps, last first; the last one failed where it says, perhaps half-way, so every undo is
/// idempotent.
fn undo_all(plan: &Plan, steps: &[Step], reached: Reached) {
    let failed = steps.len() - 1;
    for (index, &step) in steps.iter().enumerate().rev() {
        let all = plan.targets.len();
        let targets = match index == failed {
            true => &plan.targets[..all.min(reached.target + 1)],
            false => &plan.targets[..],
        };
        for (number, target) in targets.iter().enumerate().rev() {
            if !plan.has(step, target) {
                continue;
            }
            let mut end = match index == failed && number == reached.target {
                true => reached.end,
                false => u64::MAX,
            };
            while let Some(run) = target.changed.last_to(end) {
                end = run.first();
                if let Err(error) = undo(plan, step, target, run) {
                    give_up(target, run, &error);
                }
            }
        }
    }
}

fn undo(plan: &Plan, step: Step, target: &Target, run: Span<Offset>) -> Result<()> {
    let block = target.block();
    match step {
        Step::Begin => {
            // Undoing the kernel's step may have failed. With one private page in it, no page of it is to
            // be used as shared.
            let has_private = block.attributes().has_private(run);
            let changed = has_private == (plan.attribute == Attribute::Private);
            target.end(run, plan.attribute, changed);
        }
        Step::DmaOut => block.windows().admit(run)?,
        Step::Populate => {
            // A page that a device may still hold must stay the file's, or device and guest part.
            if !block.quarantine().touches(run) {
                let released = block.releaser().releasable(run, plan.attribute);
                block.planes().release(released, plan.attribute)?;
            }
        }
        Step::DmaIn => block.windows().withdraw(run)?,
        // The bytes are gone, and the pages are as private as before.
        Step::Erase => {}
        Step::Kernel => revert(plan, target, run)?,
        Step::DmaInLate | Step::Release | Step::End => {
            unreachable!("what comes after the decision is never undone")
        }
    }
    Ok(())
}
