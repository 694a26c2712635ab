// SPDX-License-Identifier: MIT OR Apache-2.0
//! The way of nearly all requests: one range of one block, all of which changes, with nothing out of the
//! ordinary.
//!
//! A guest waits for it right after a VM exit, with cold caches, so what counts is how much code and data
//! it touches: no plan, no list, a look at each lock. The order of steps is that of
//! [`plan`](super::plan), and whatever isn't as simple as this goes by one.

use super::give_up;
use crate::attributes::Attribute;
use crate::bindings::Bound;
use crate::block::Block;
use crate::error::{Error, Result};
use crate::plane::Backing;
use crate::units::{Gpa, Offset, Span};
use crate::vm::Vm;

/// What guests ask for at once where they ask often. More takes its time anyway.
const MOST: u64 = 2 << 20;

/// `None` if the request is not such a one: then nothing has happened.
pub(super) fn convert(vm: &Vm, gpas: Span<Gpa>, attribute: Attribute) -> Option<Result<()>> {
    if gpas.size_bytes() > MOST {
        return None;
    }
    let machine = vm.machine();
    // Dropped after the range: it may be the last one of a block, whose end may have to wait for that.
    let (Bound { block, offsets, .. }, version) = vm.bindings().lock().single(gpas)?;
    if !block.is_usual(offsets) {
        return None;
    }
    let _range = block.lock(offsets);
    // It may be bound elsewhere by now; and with the range, the VM stays what it is.
    let usual = vm.bindings().are(version)
        && machine.check_attached().is_ok()
        && block.has_nothing_wrong()
        && block.listeners.is_empty();
    if !usual {
        return None;
    }
    if !block.changes_as_a_whole(offsets, attribute)? {
        return Some(Ok(()));
    }
    // Before vCPUs are told that something is under way: it may wait.
    let allocates = block.backing() == Backing::Split
        && (attribute == Attribute::Shared || block.planes().must_allocate(attribute));
    let twice = if allocates { offsets.size_bytes() } else { 0 };
    let _share = vm.budget.take(twice);
    let _heard = vm.echoes.convert(gpas);
    let changed = match attribute {
        Attribute::Private => to_private(&block, offsets, gpas),
        Attribute::Shared => to_shared(&block, offsets, gpas),
    };
    let counters = block.counters();
    if changed.is_err() {
        counters.failures.add(1);
    }
    // In place it may be shared although devices could not be given it.
    let in_place = block.backing() == Backing::InPlace;
    match attribute {
        Attribute::Private if changed.is_ok() => counters.to_private.add(1),
        Attribute::Shared
            if changed.is_ok() || (in_place && !block.attributes().has_private(offsets)) =>
        {
            counters.to_shared.add(1);
        }
        _ => {}
    }
    Some(changed)
}

fn to_private(block: &Block, offsets: Span<Offset>, gpas: Span<Gpa>) -> Result<()> {
    let to = Attribute::Private;
    let allocates = block.planes().must_allocate(to);
    let populated = allocates || block.planes().may_keep(to);
    let done = match populated {
        false => Ok(()),
        true => block.populate(offsets, to, allocates),
    };
    let done = done
        .and_then(|()| block.windows().withdraw(offsets))
        .and_then(|()| tell(block, offsets, gpas, to));
    if let Err(error) = done {
        undo(block, offsets, to, populated);
        return Err(error);
    }
    if block.backing() == Backing::Split {
        block.releaser().leave(offsets, Attribute::Shared);
    }
    Ok(())
}

fn to_shared(block: &Block, offsets: Span<Offset>, gpas: Span<Gpa>) -> Result<()> {
    let to = Attribute::Shared;
    if block.backing() == Backing::InPlace {
        tell(block, offsets, gpas, to)?;
        // There is no way back: it is shared, and what devices can't have of it is quarantined.
        let admitted = block.windows().admit(offsets);
        if admitted.is_err() {
            block.windows().quarantine(offsets);
        }
        return admitted;
    }
    let done = block
        .populate(offsets, to, block.planes().must_allocate(to))
        .and_then(|()| block.windows().admit(offsets))
        .and_then(|()| tell(block, offsets, gpas, to));
    if let Err(error) = done {
        undo(block, offsets, to, true);
        return Err(error);
    }
    block.releaser().leave(offsets, Attribute::Private);
    Ok(())
}

/// The kernel hears of it, and the books follow.
fn tell(block: &Block, offsets: Span<Offset>, gpas: Span<Gpa>, to: Attribute) -> Result<()> {
    if block.backing() == Backing::InPlace {
        return block.tell_file(offsets, to);
    }
    block.tell_vm(gpas, to)?;
    block.record(offsets, to);
    Ok(())
}

/// Devices and memory are as before; the kernel has changed nothing. Every step is idempotent.
#[cold]
fn undo(block: &Block, offsets: Span<Offset>, to: Attribute, populated: bool) {
    let devices = match to {
        Attribute::Private => block.windows().admit(offsets),
        Attribute::Shared => block.windows().withdraw(offsets),
    };
    let given_up = |error: Error| give_up(block, offsets, &error);
    let _ = devices.map_err(given_up);
    // A page that a device may still hold must stay the file's, or device and guest part.
    if populated && !block.quarantine().touches(offsets) {
        let unused = block.releaser().releasable(offsets, to);
        let _ = block.planes().release(unused, to).map_err(given_up);
    }
}
