// SPDX-License-Identifier: MIT OR Apache-2.0
//! Conversions: a request becomes a [`plan`], which is data, and [`run`] is the one place that
//! carries plans out and undoes them.
//!
//! Blocks and VMs know nothing of it: [`Vm::convert`] and [`Block::reset`] are defined here, on top of
//! them.

mod file;
mod plan;
mod reset;
mod run;
mod single;

use crate::attributes::Attribute;
use crate::bindings::Bound;
use crate::block::{Block, ConvertUnit};
use crate::echoes::UnderWay;
use crate::error::{Error, Result};
use crate::range_locks::RangeGuard;
use crate::run_set::RunSet;
use crate::sync::{Arc, Instant};
use crate::throttle::Class;
use crate::units::{Gpa, Offset, Span};
use crate::vm::Vm;
use log::warn;
use plan::{Plan, Purpose};
use smallvec::SmallVec;

/// What is asked of books that a guest can make long is asked for so many bytes of a request at once.
const LOOK_BYTES: u64 = 64 << 20;

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

impl Vm {
    /// Serves a guest's request to make `size` bytes at `gpa` [`Attribute::Shared`] or
    /// [`Attribute::Private`], as a whole or not at all. It may cross bindings and blocks. Pages
    /// that have the attribute already cost nothing. Bytes that are no memory of a block are
    /// ignored and counted ([`VmStats::ignored_bytes`](crate::VmStats::ignored_bytes)) when they
    /// are to be shared, since they are (a TDX firmware shares MMIO and holes to be safe), and
    /// refused when they are to be private.
    ///
    /// Before anything changes, pages that have the attribute already and are quarantined are
    /// healed: devices get shared ones again, and lose what they may still have behind private
    /// ones. If the kernel still refuses that, the request fails.
    ///
    /// Takes the range: waits for requests that overlap, while disjoint ones run in parallel. What
    /// becomes shared in a split block has memory in both planes until the request is done: all
    /// requests of the VM together 1 GiB at most, or the largest
    /// [`BlockConfig::max_request`](crate::BlockConfig::max_request) if that is more, and who finds
    /// no room waits for those before it. Listeners are called with the range held, and must not
    /// call this. It takes its time in the kernel (KVM_SET_MEMORY_ATTRIBUTES, in place
    /// KVM_SET_MEMORY_ATTRIBUTES2; IOMMU_IOAS_MAP and UNMAP; fallocate(2)): call it without a lock
    /// that others wait for.
    ///
    /// # Errors
    /// - EBUSY: the VM is detached, or at its end.
    /// - EINVAL: the range is empty, not page aligned, or wraps; it is not whole units of
    ///   [`BlockConfig::convert_unit`](crate::BlockConfig::convert_unit); it is to be private and
    ///   has something that can't be.
    /// - ENOSPC: more than [`BlockConfig::max_runs`](crate::BlockConfig::max_runs) or
    ///   [`BlockConfig::max_request`](crate::BlockConfig::max_request) allow.
    /// - ENOMEM: there is no memory for the pages, or for the library's books, or a pool of huge
    ///   pages is empty.
    /// - EIO: the host's hardware has lost the memory of a page, or the memory that it would have.
    /// - EAGAIN: somebody holds a page that is to become private in place.
    /// - Another errno is the kernel's, or that of a listener that refused.
    ///
    /// Attributes, backing and DMA are as they were then, but for the bytes of pages that convert
    /// in place, which are undefined. Where undoing failed, the range is quarantined, and the log
    /// says so.
    pub fn convert(&self, gpa: u64, size: u64, attribute: Attribute) -> Result<()> {
        let start = Instant::now();
        let result = request(self, gpa, size, attribute);
        self.counters.requests.add(1);
        self.counters.took(start.elapsed());
        if let Err(error) = &result {
            self.counters.failures.add(1);
            // A guest chooses how often this happens.
            if let Some(note) = self.machine().voices.pass(Class::Request) {
                warn!(
                    "a request to make gpa {gpa:#x}, {size:#x} bytes, {} failed: {error}{note}",
                    attribute.name(),
                );
            }
        }
        result
    }
}

/// Serves a guest's request; see [`Vm::convert`].
fn request(vm: &Vm, gpa: u64, size: u64, attribute: Attribute) -> Result<()> {
    let gpas = Span::new(Gpa(gpa), size).ok_or_else(|| {
        Error::invalid(format!(
            "{size:#x} bytes at gpa {gpa:#x} {}",
            Span::<Gpa>::flaw(gpa, size)
        ))
    })?;
    vm.machine().check_not_ended()?;
    if let Some(done) = single::convert(vm, gpas, attribute) {
        return done;
    }
    let machine = vm.machine();
    let (mut segments, mut version) = vm.segments(gpas);
    loop {
        let allowed = machine
            .check_attached()
            .and_then(|()| check_request(gpas, &segments, attribute));
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
            if !vm.bindings().are(version) {
                let now = vm.segments(gpas);
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
                    segment.block.counters().failures.add(1);
                }
                return Err(error);
            }
        }
    }
}

/// Converts what is bound at `gpas`, all of which the caller has locked.
fn convert(vm: &Vm, gpas: Span<Gpa>, parts: &[Part], attribute: Attribute) -> Result<()> {
    vm.machine().check_attached()?;
    if attribute == Attribute::Shared {
        let found = parts.iter().map(|part| part.offsets.size_bytes());
        let missing = gpas.size_bytes() - found.sum::<u64>();
        vm.counters.ignored_bytes.add(missing);
    }
    check_sound(parts, attribute)?;
    check_units(parts, attribute)?;
    // Before anything changes: what has the attribute already is to be as it should, too.
    let mut healed = parts.iter();
    healed.try_for_each(|part| part.block.windows().heal_for_guest(part.offsets, attribute))?;
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
    // Nobody looks for who holds a page with a range locked.
    let voices = &block.machine().voices;
    voices.say(module_path!(), Class::Trouble, || {
        format!("undoing a conversion failed: {error:#}")
    });
    block.windows().quarantine(span);
}

/// Whether a guest may ask for this at all.
fn check_request(
    request: Span<Gpa>,
    segments: &[Bound<Block>],
    attribute: Attribute,
) -> Result<()> {
    if attribute == Attribute::Shared {
        return Ok(());
    }
    let found: u64 = segments.iter().map(|s| s.gpas.size_bytes()).sum();
    let missing = request.size_bytes() - found;
    if missing != 0 {
        return Err(Error::invalid(format!(
            "{missing:#x} bytes of {request} are no memory that can be private"
        )));
    }
    for Bound { block, .. } in segments {
        if !block.is_confidential() {
            return Err(
                Error::invalid("it belongs to an ordinary VM and has no private pages")
                    .of(block.name()),
            );
        }
    }
    Ok(())
}

fn lock<'a>(vm: &'a Vm, parts: &[Part]) -> RangeGuard<'a> {
    let range = |part: &Part| (part.block.number(), part.block.lock_hull(part.offsets));
    match parts {
        [part] => vm.machine().ranges.lock(range(part)),
        _ => vm
            .machine()
            .ranges
            .lock(parts.iter().map(range).collect::<Vec<_>>()),
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

/// Holds a request against the blocks' `convert_unit`. The ranges are locked, so that what needs no
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
        return Err(Error::invalid(format!(
            "{offsets} can't become {}: convert-unit allows {allowed}",
            attribute.name()
        ))
        .of(block.name()));
    }
    Ok(())
}
