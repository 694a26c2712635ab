// SPDX-License-Identifier: MIT OR Apache-2.0
//! Conversions: a request becomes a [`plan`], which is data, and [`run`] is the one place that
//! carries plans out and undoes them.

mod plan;
mod run;

use crate::attributes::Attribute;
use crate::bindings::Segment;
use crate::block::{Block, ConvertUnit};
use crate::error::{Error, Result};
use crate::units::{Gpa, Offset, Span};
use crate::vm::Vm;
use plan::Plan;
use std::sync::Arc;

/// A part of a conversion: a range of one block, and where the guest sees it, if it does.
#[derive(Clone, Debug)]
struct Part {
    block: Arc<Block>,
    offsets: Span<Offset>,
    gpas: Option<Span<Gpa>>,
}

/// Serves a guest's request; see [`Vm::convert`].
pub(crate) fn request(vm: &Vm, gpa: u64, size: u64, attribute: Attribute) -> Result<()> {
    let gpas = Span::new(Gpa(gpa), size).ok_or_else(|| {
        Error::Invalid(format!(
            "{size:#x} bytes at gpa {gpa:#x} are empty, not page aligned, or wrap around"
        ))
    })?;
    // Declared before the guard: should one of these be a block's last owner, the block ends when
    // the bindings are unlocked again, since its end locks them.
    let segments;
    let bindings = vm.bindings();
    segments = bindings.segments(gpas);
    let result = admissible(vm, gpas, &segments, attribute).and_then(|()| {
        let parts: Vec<Part> = segments
            .iter()
            .map(|segment| Part {
                block: segment.block.clone(),
                offsets: segment.offsets,
                gpas: Some(segment.gpas),
            })
            .collect();
        convert(vm, &parts, attribute)
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
    let mut unbound = crate::run_set::RunSet::default();
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
    let result = convert(vm, &parts, block.initial());
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
    for Segment { block, offsets, .. } in segments {
        if attribute == Attribute::Private && !block.is_confidential() {
            return Err(Error::Invalid(format!(
                "{}: it belongs to an ordinary VM and has no private pages",
                block.name()
            )));
        }
        let unit = match block.convert_unit() {
            ConvertUnit::Bytes(unit) if offsets.is_aligned(unit) => continue,
            ConvertUnit::Bytes(unit) => format!("only whole units of {unit:#x} bytes"),
            ConvertUnit::Off => "nothing".to_string(),
        };
        // What needs no change needs no permission.
        if !block.attributes().changes(*offsets, attribute).is_empty() {
            return Err(Error::Invalid(format!(
                "{}: {offsets} can't become {}: convert-unit allows {unit}",
                block.name(),
                attribute.name()
            )));
        }
    }
    Ok(())
}

/// Locks the parts, plans, and carries the plan out.
fn convert(vm: &Vm, parts: &[Part], attribute: Attribute) -> Result<()> {
    let ranges = parts
        .iter()
        .map(|p| (p.block.number(), p.offsets))
        .collect();
    let _ranges = vm.ranges.lock(ranges);
    let plan = Plan::new(parts, attribute)?;
    run::run(&plan)
}
