// SPDX-License-Identifier: MIT OR Apache-2.0
//! Carries a plan out; if a step fails, undoes it and all before it, last first.

use super::plan::{Plan, Purpose, Step, Target, Told};
use crate::attributes::Attribute;
use crate::error::{Error, Result};
use crate::plane::Backing;
use crate::sync::Arc;
use crate::units::{Offset, Span};
use std::ops::Range;

/// All of `plan`, or nothing of it, but for devices that could not be given what is shared in place:
/// that is quarantined, and an error all the same. The caller has the ranges of its targets locked.
pub(super) fn run(plan: &Plan) -> Result<()> {
    let mut result = Ok(());
    for (index, &step) in plan.steps.iter().enumerate() {
        let Err(error) = apply(plan, step) else {
            continue;
        };
        if index < plan.decided {
            undo_all(plan, &plan.steps[..=index]);
            return Err(error);
        }
        for target in &plan.targets[targets_of(plan, step)] {
            target.block.quarantine_span(target.span);
        }
        result = result.and(Err(error));
    }
    count(plan);
    result
}

fn count(plan: &Plan) {
    let mut counted = None;
    for target in &plan.targets {
        // Targets of one block are neighbours: the conversion counts once in it.
        if counted.replace(target.block.number()) != Some(target.block.number()) {
            match plan.attribute {
                Attribute::Private => target.block.counters.to_private.add(1),
                Attribute::Shared => target.block.counters.to_shared.add(1),
            }
        }
    }
}

/// The attribute that the plan's targets had before it.
fn before(plan: &Plan) -> Attribute {
    plan.attribute.other()
}

fn apply(plan: &Plan, step: Step) -> Result<()> {
    match step {
        Step::Begin(target) => plan.targets[target].begin(plan.attribute),
        Step::DmaOut(target) => {
            let target = &plan.targets[target];
            target.block.withdraw(target.span)
        }
        Step::Reserve(target) => {
            let Target { block, span, .. } = &plan.targets[target];
            // Its huge pages may be those of the target before it.
            let pages = |target: &Target| {
                let planes = target.block.planes();
                planes.allocated_for(target.span, plan.attribute)
            };
            if repeats(plan, target, pages) {
                return Ok(());
            }
            let wanted = plan.reserves(&plan.targets[target]);
            block.reserve(*span, plan.attribute, wanted)
        }
        Step::DmaIn(target) => {
            let target = &plan.targets[target];
            target.block.lift_quarantine(target.span);
            target.block.admit(target.span)
        }
        Step::Erase(index) => {
            let target = &plan.targets[index];
            // With a huge page went what other targets have in it.
            let erased = |target: &Target| {
                let planes = target.block.planes();
                planes.pages_around(target.span, before(plan))
            };
            match repeats(plan, index, erased) {
                true => Ok(()),
                false => target.block.erase(target.span),
            }
        }
        Step::Kernel(announcement) => announce(plan, announcement, plan.attribute),
        Step::Release(index) => {
            let target = &plan.targets[index];
            if plan.attribute == Attribute::Private {
                target.block.lift_quarantine(target.span);
            }
            if target.block.backing() == Backing::InPlace {
                return Ok(());
            }
            // With a huge page goes what other targets have in it.
            let releasable = |target: &Target| target.block.releasable(target.span, before(plan));
            if repeats(plan, index, releasable) {
                return Ok(());
            }
            // The conversion is done even if this fails.
            let at_once = plan.purpose == Purpose::Reset;
            let released = releasable(target);
            target.block.release(released, before(plan), at_once);
            Ok(())
        }
        Step::End(target) => {
            plan.targets[target].end(plan.attribute, true);
            Ok(())
        }
    }
}

/// Whether the target before this one was in the same block and `range` of it covers this one's.
fn repeats(plan: &Plan, target: usize, range: impl Fn(&Target) -> Span<Offset>) -> bool {
    let Some(previous) = target.checked_sub(1).map(|index| &plan.targets[index]) else {
        return false;
    };
    let target = &plan.targets[target];
    Arc::ptr_eq(&previous.block, &target.block) && range(previous).contains(&range(target))
}

fn announce(plan: &Plan, announcement: usize, attribute: Attribute) -> Result<()> {
    let announcement = &plan.announcements[announcement];
    let targets = &plan.targets[announcement.targets.clone()];
    let Some(first) = targets.first() else {
        return Ok(());
    };
    match announcement.told {
        Told::File(offsets) => return first.block.tell_file(offsets, attribute),
        Told::Vm(gpas) => first.block.tell_vm(gpas, attribute)?,
        Told::Nobody => {}
    }
    for target in targets {
        target.block.record(target.span, attribute);
    }
    Ok(())
}

/// Undoes an announcement, target by target: between them lie pages that had the attribute before.
/// All are tried; those that fail keep what they have, in the kernel and here, and are quarantined.
fn take_back(plan: &Plan, announcement: usize) {
    for target in &plan.targets[plan.announcements[announcement].targets.clone()] {
        let told = match (target.block.backing(), target.gpas) {
            (Backing::InPlace, _) => target.block.tell_file(target.span, before(plan)),
            (Backing::Split, Some(gpas)) => target.block.tell_vm(gpas, before(plan)),
            (Backing::Split, None) => Ok(()),
        };
        match told {
            Err(error) => give_up(target, &error),
            Ok(()) if target.block.backing() == Backing::Split => {
                target.block.record(target.span, before(plan));
            }
            Ok(()) => {}
        }
    }
}

/// A step on `target` can't be undone.
fn give_up(target: &Target, error: &Error) {
    super::give_up(&target.block, target.span, error);
}

/// Undoes steps, last first; the last one failed, perhaps half-way, so every undo is idempotent.
fn undo_all(plan: &Plan, steps: &[Step]) {
    let failed = steps.len() - 1;
    for (index, &step) in steps.iter().enumerate().rev() {
        if let Err(error) = undo(plan, step, index == failed) {
            for target in &plan.targets[targets_of(plan, step)] {
                give_up(target, &error);
            }
        }
    }
}

fn undo(plan: &Plan, step: Step, failed: bool) -> Result<()> {
    match step {
        // A step that refused told its own listeners; only completed ones need to hear of it.
        Step::Begin(target) if !failed => {
            // Undoing the kernel's step may have failed.
            let target = &plan.targets[target];
            target.end(plan.attribute, target.counts_as(plan.attribute));
        }
        Step::Begin(_) => {}
        Step::DmaOut(target) => {
            let target = &plan.targets[target];
            target.block.admit(target.span)?;
        }
        Step::Reserve(target) => {
            let target = &plan.targets[target];
            // A page that a device may still hold must stay the file's, or device and guest part.
            if !target.block.is_quarantined(target.span) {
                let released = target.block.releasable(target.span, plan.attribute);
                target.block.planes().release(released, plan.attribute)?;
            }
        }
        Step::DmaIn(target) => {
            let target = &plan.targets[target];
            target.block.withdraw(target.span)?;
        }
        // The bytes are gone, and the pages are as private as before.
        Step::Erase(_) => {}
        Step::Kernel(_) if failed => {}
        Step::Kernel(announcement) => take_back(plan, announcement),
        Step::Release(_) | Step::End(_) => {
            unreachable!("nothing after the kernel's step fails, so these are never undone")
        }
    }
    Ok(())
}

fn targets_of(plan: &Plan, step: Step) -> Range<usize> {
    match step {
        Step::Kernel(announcement) => plan.announcements[announcement].targets.clone(),
        Step::Begin(target)
        | Step::DmaOut(target)
        | Step::Reserve(target)
        | Step::DmaIn(target)
        | Step::Erase(target)
        | Step::Release(target)
        | Step::End(target) => target..target + 1,
    }
}
