// SPDX-License-Identifier: MIT OR Apache-2.0
//! Conversions: a request becomes a [`plan`], which is data, and [`run`] is the one place that
//! carries plans out and undoes them.

mod budget;
mod plan;
mod run;
mod single;

pub(crate) use budget::Budget;

use crate::attributes::Attribute;
use crate::bindings::{Segment, Segments};
use crate::block::{Block, ConvertUnit};
use crate::error::{Error, Result};
use crate::faults::UnderWay;
use crate::range_locks::RangeGuard;
use crate::run_set::RunSet;
use crate::sync::Arc;
use crate::throttle::Class;
use crate::units::{Gpa, Offset, Span};
use crate::vm::Vm;
use plan::{Plan, Purpose};
use smallvec::SmallVec;

/// A reset frees one plane's memory before it needs as much of the other's, in steps of this size:
/// a multiple of a huge page, or one.
fn reset_piece_bytes(block: &Block) -> u64 {
    block.planes().huge_page().unwrap_or(0).max(64 << 20)
}

/// What is asked of books that a guest can make long is asked for so many bytes of a request at once.
const LOOK_BYTES: u64 = 64 << 20;

/// In a reset that has failed in so many pieces because somebody holds pages, each of which takes its time,
/// all that is left will be held as well.
const MOST_HELD_PIECES: usize = 16;

/// A part of a conversion: a range of one block, and where the guest sees it, if it does.
#[derive(Clone, Debug)]
struct Part {
    block: Arc<Block>,
    offsets: Span<Offset>,
    gpas: Option<Span<Gpa>>,
}

impl Part {
    /// The part of it that has these offsets.
    fn of(&self, offsets: Span<Offset>) -> Self {
        Self {
            block: self.block.clone(),
            offsets,
            gpas: self
                .gpas
                .map(|gpas| self.offsets.translate(&offsets, gpas.start())),
        }
    }
}

/// Serves a guest's request; see [`Vm::convert`].
pub(crate) fn request(vm: &Vm, gpa: u64, size: u64, attribute: Attribute) -> Result<()> {
    let gpas = Span::new(Gpa(gpa), size).ok_or_else(|| {
        Error::Invalid(format!(
            "{size:#x} bytes at gpa {gpa:#x} {}",
            Span::<Gpa>::flaw(gpa, size)
        ))
    })?;
    vm.check_not_ended()?;
    if let Some(done) = single::convert(vm, gpas, attribute) {
        return done;
    }
    let (mut segments, mut version) = look(vm, gpas);
    loop {
        let allowed = vm
            .check_attached()
            .and_then(|()| admissible(gpas, &segments, attribute));
        let result = allowed.and_then(|()| {
            let parts: SmallVec<[Part; 1]> = segments
                .iter()
                .map(|segment| Part {
                    block: segment.block.clone(),
                    offsets: segment.offsets,
                    gpas: Some(segment.gpas),
                })
                .collect();
            let _ranges = lock(vm, &parts);
            // What is bound there can't change from now on, since who binds or unbinds offsets locks
            // them; only where nothing is bound, something may be in a moment.
            if !vm.bindings_are(version) {
                let now = look(vm, gpas);
                if now.0 != segments {
                    return Ok(Some(now));
                }
            }
            convert(vm, gpas, &parts, attribute).map(|()| None)
        });
        match result {
            Ok(None) => return Ok(()),
            // Now that no range is locked: this may drop the last owner of a block, whose end may have
            // to wait for somebody who waits for one.
            Ok(Some(now)) => (segments, version) = now,
            Err(error) => {
                for segment in &segments {
                    segment.block.counters.failures.add(1);
                }
                return Err(error);
            }
        }
    }
}

/// Converts what is bound at `gpas`, all of which the caller has locked.
fn convert(vm: &Vm, gpas: Span<Gpa>, parts: &[Part], attribute: Attribute) -> Result<()> {
    vm.check_attached()?;
    if attribute == Attribute::Shared {
        let found = parts.iter().map(|part| part.offsets.size_bytes());
        let missing = gpas.size_bytes() - found.sum::<u64>();
        vm.counters.ignored_bytes.add(missing);
    }
    check_sound(parts, attribute)?;
    check_units(parts, attribute)?;
    // Before anything changes: what has the attribute already is to be as it should, too.
    let mut healed = parts.iter();
    healed.try_for_each(|part| part.block.heal_for_guest(part.offsets, attribute))?;
    let plan = Plan::new(parts, attribute, Purpose::Request)?;
    let _share = vm.budget.take(plan.bytes_in_both_planes());
    let _heard: SmallVec<[UnderWay; 1]> = parts
        .iter()
        .filter_map(|part| part.gpas)
        .map(|gpas| vm.echoes.convert(gpas))
        .collect();
    run::run(&plan)
}

/// A step on `span` can't be undone.
fn give_up(block: &Block, span: Span<Offset>, error: &Error) {
    let vm = block.vm();
    // Nobody looks for who holds a page with a range locked.
    vm.voices.say(Class::Trouble, || {
        format!("undoing a conversion failed: {error:#}")
    });
    block.quarantine_span(span);
}

/// What is bound at `gpas`, and the bindings' version.
fn look(vm: &Vm, gpas: Span<Gpa>) -> (Segments, u64) {
    let bindings = vm.bindings();
    (bindings.segments(gpas), bindings.version())
}

/// Makes a whole block what it was at first; see [`Block::reset`].
pub(crate) fn reset(block: &Arc<Block>) -> Result<()> {
    if !block.is_confidential() {
        return Ok(());
    }
    let vm = block.vm();
    let mut result = Ok(());
    let mut held = 0;
    for piece in block.span().chunks(reset_piece_bytes(block)) {
        let _range = vm.ranges.lock((block.number(), block.lock_hull(piece)));
        // For each piece: the end of a process doesn't wait for them all.
        vm.check_not_ended()?;
        let reset = reset_piece(block, piece);
        let is_held = |error: &Error| error.errno() == libc::EAGAIN;
        held += usize::from(reset.as_ref().is_err_and(is_held));
        result = result.and(reset);
        if held == MOST_HELD_PIECES {
            break;
        }
    }
    if result.is_err() {
        block.counters.failures.add(1);
    }
    result
}

/// All that can be done of it: what fails in one binding keeps no other from it.
fn reset_piece(block: &Arc<Block>, piece: Span<Offset>) -> Result<()> {
    let mut result = Ok(());
    for part in parts_of(block, piece) {
        let sound = block.convertible(part.offsets, block.initial());
        let parts: SmallVec<[Part; 1]> = sound.iter().map(|&o| part.of(o)).collect();
        let plan = Plan::new(&parts, block.initial(), Purpose::Reset);
        result = result.and(plan.and_then(|plan| run::run(&plan)));
    }
    result
}

/// The parts of `piece` by binding, and what is not bound. The caller has it locked.
fn parts_of(block: &Arc<Block>, piece: Span<Offset>) -> Vec<Part> {
    let bound = block.vm().bindings().of_block(block.number());
    let mut unbound = RunSet::default();
    unbound.insert(piece);
    let mut parts = Vec::new();
    for (offsets, gpas) in bound {
        if let Some(part) = offsets.intersection(&piece) {
            unbound.remove(part);
            parts.push(Part {
                block: block.clone(),
                offsets: part,
                gpas: Some(offsets.translate(&part, gpas.start())),
            });
        }
    }
    let unbound = unbound.inside(piece).into_iter();
    parts.extend(unbound.map(|offsets| Part {
        block: block.clone(),
        offsets,
        gpas: None,
    }));
    parts
}

/// Whether a guest may ask for this at all.
fn admissible(request: Span<Gpa>, segments: &[Segment], attribute: Attribute) -> Result<()> {
    if attribute == Attribute::Shared {
        return Ok(());
    }
    let found: u64 = segments.iter().map(|s| s.gpas.size_bytes()).sum();
    let missing = request.size_bytes() - found;
    if missing != 0 {
        return Err(Error::Invalid(format!(
            "{missing:#x} bytes of {request} are no memory that can be private"
        )));
    }
    for Segment { block, .. } in segments {
        if !block.is_confidential() {
            return Err(Error::Invalid(format!(
                "{}: it belongs to an ordinary VM and has no private pages",
                block.name()
            )));
        }
    }
    Ok(())
}

fn lock<'a>(vm: &'a Vm, parts: &[Part]) -> RangeGuard<'a> {
    let range = |part: &Part| (part.block.number(), part.block.lock_hull(part.offsets));
    match parts {
        [part] => vm.ranges.lock(range(part)),
        _ => vm.ranges.lock(parts.iter().map(range).collect::<Vec<_>>()),
    }
}

/// Refuses a request that includes lost pages, or would lead to some: a kernel that converts one would
/// touch it.
fn check_sound(parts: &[Part], attribute: Attribute) -> Result<()> {
    for Part { block, offsets, .. } in parts {
        if block.is_poisoned() {
            let mut pieces = offsets.pieces(LOOK_BYTES);
            pieces.try_for_each(|piece| block.check_conversion(piece, Some(attribute)))?;
        }
    }
    Ok(())
}

/// Holds a request against the blocks' convert-unit. The ranges are locked, so that what needs no
/// change now, and so no permission, still needs none when it is carried out.
fn check_units(parts: &[Part], attribute: Attribute) -> Result<()> {
    for Part { block, offsets, .. } in parts {
        if matches!(block.convert_unit(), ConvertUnit::Bytes(unit) if offsets.is_aligned(unit)) {
            continue;
        }
        if !block.attributes().any_change(*offsets, attribute) {
            continue;
        }
        // A unit may be bound in pieces (PAM registers cut the first megabyte): what counts is
        // what the request has of the block, not of the binding.
        let mut requested = RunSet::default();
        for part in parts.iter().filter(|p| Arc::ptr_eq(&p.block, block)) {
            requested.insert(part.offsets);
        }
        let allowed = match block.convert_unit() {
            ConvertUnit::Off => "nothing".to_string(),
            ConvertUnit::Bytes(unit) => {
                let whole = requested.around(*offsets);
                if whole.is_some_and(|run| run.is_aligned(unit)) {
                    continue;
                }
                format!("only whole units of {unit:#x} bytes")
            }
        };
        return Err(Error::Invalid(format!(
            "{}: {offsets} can't become {}: convert-unit allows {allowed}",
            block.name(),
            attribute.name()
        )));
    }
    Ok(())
}
