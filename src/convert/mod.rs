// SPDX-License-Identifier: MIT OR Apache-2.0
//! Conversions: a request becomes a [`plan`], which is data, and [`run`] is the one place that
//! carries plans out and undoes them.

mod plan;
mod run;

use crate::attributes::Attribute;
use crate::bindings::Segment;
use crate::block::{Block, ConvertUnit};
use crate::error::{Error, Result};
use crate::faults::UnderWay;
use crate::range_locks::RangeGuard;
use crate::run_set::RunSet;
use crate::units::{Gpa, Offset, Span};
use crate::vm::Vm;
use plan::{Plan, Purpose};
use smallvec::SmallVec;
use std::sync::Arc;

/// A reset frees one plane's memory before it needs as much of the other's, in steps of this size:
/// a multiple of a huge page, or one.
fn reset_piece_bytes(block: &Block) -> u64 {
    block.planes().huge_page().unwrap_or(0).max(64 << 20)
}

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
    // Declared before the guard: should one of these be a block's last owner, the block ends when
    // the bindings are unlocked again, since its end locks them.
    let segments;
    let bindings = vm.bindings();
    segments = bindings.segments(gpas);
    let allowed = vm
        .check_attached()
        .and_then(|()| admissible(vm, gpas, &segments, attribute));
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
        check_sound(&parts, attribute)?;
        check_units(&parts, attribute)?;
        // Before anything changes: what has the attribute already is to be as it should, too.
        let mut healed = parts.iter();
        healed.try_for_each(|part| part.block.heal(part.offsets, attribute))?;
        let _heard: SmallVec<[UnderWay; 1]> = segments
            .iter()
            .map(|segment| vm.echoes.convert(segment.gpas))
            .collect();
        run::run(&Plan::new(&parts, attribute, Purpose::Request)?)
    });
    if result.is_err() {
        for segment in &segments {
            segment.block.counters.failures.add(1);
        }
    }
    drop(bindings);
    result
}

/// Makes a whole block what it was at first; see [`Block::reset`].
pub(crate) fn reset(block: &Arc<Block>) -> Result<()> {
    if !block.is_confidential() {
        return Ok(());
    }
    let vm = block.vm();
    let bindings = vm.bindings();
    let mut parts: Vec<Part> = bindings
        .of_block(block.number())
        .into_iter()
        .map(|(offsets, gpas)| Part {
            block: block.clone(),
            offsets,
            gpas: Some(gpas),
        })
        .collect();
    let mut unbound = RunSet::default();
    unbound.insert(block.span());
    for part in &parts {
        unbound.remove(part.offsets);
    }
    parts.extend(
        unbound
            .inside(block.span())
            .into_iter()
            .map(|offsets| Part {
                block: block.clone(),
                offsets,
                gpas: None,
            }),
    );
    let pieces = parts.iter().flat_map(|part| {
        let chunks = part.offsets.chunks(reset_piece_bytes(block));
        chunks.map(|offsets| part.of(offsets))
    });
    let result = pieces.into_iter().try_for_each(|piece| {
        // For each piece: the end of a process doesn't wait for them all.
        vm.check_not_ended()?;
        let _ranges = lock(vm, std::slice::from_ref(&piece));
        let sound = block.convertible(piece.offsets, block.initial());
        let parts: SmallVec<[Part; 1]> = sound.iter().map(|&offsets| piece.of(offsets)).collect();
        run::run(&Plan::new(&parts, block.initial(), Purpose::Reset)?)
    });
    if result.is_err() {
        block.counters.failures.add(1);
    }
    drop(bindings);
    result
}

/// Whether a guest may ask for this at all.
fn admissible(
    vm: &Vm,
    request: Span<Gpa>,
    segments: &[Segment],
    attribute: Attribute,
) -> Result<()> {
    let found: u64 = segments.iter().map(|s| s.gpas.size_bytes()).sum();
    let missing = request.size_bytes() - found;
    match attribute {
        Attribute::Shared => vm.counters.ignored_bytes.add(missing),
        Attribute::Private if missing != 0 => {
            return Err(Error::Invalid(format!(
                "{missing:#x} bytes of {request} are no memory that can be private"
            )));
        }
        Attribute::Private => {}
    }
    for Segment { block, .. } in segments {
        if attribute == Attribute::Private && !block.is_confidential() {
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
    let mut parts = parts.iter();
    parts.try_for_each(|part| part.block.check_conversion(part.offsets, Some(attribute)))
}

/// Holds a request against the blocks' convert-unit. The ranges are locked, so that what needs no
/// change now, and so no permission, still needs none when it is carried out.
fn check_units(parts: &[Part], attribute: Attribute) -> Result<()> {
    for Part { block, offsets, .. } in parts {
        if matches!(block.convert_unit(), ConvertUnit::Bytes(unit) if offsets.is_aligned(unit)) {
            continue;
        }
        if block.attributes().changes(*offsets, attribute).is_empty() {
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
