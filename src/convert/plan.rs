// SPDX-License-Identifier: MIT OR Apache-2.0
//! The steps of a conversion, in the order that keeps every invariant at every moment.
//!
//! ```text
//! to private          listeners begin, populate private memory (split: what is kept for it comes back; all
//!                     of it under a NUMA policy), DMA out, kernel, free the shared bytes (split),
//!                     listeners end
//! to shared (split)   listeners begin, populate shared memory, DMA in, kernel, free the private
//!                     bytes, listeners end
//! to shared in place  listeners begin, erase (in a reset), kernel, DMA in, listeners end
//! ```
//!
//! To private, devices let go before the kernel hears of it (invariant 2). To shared, in a split
//! block, the shared bytes are another file's: devices may have them early, and so everything that
//! can fail comes before the kernel's step, after which there is no way back that keeps contents.
//! In place a page keeps its bytes. A guest that asks knows which ones it shows; a reset takes them away
//! first, while nobody else can see them. A page can't be mapped for devices before it is shared. If that fails then, the page stays
//! shared, is quarantined, and the guest gets an error; it may ask again.
//!
//! Each step is done to all that changes before the next one begins: in pieces that were converted one
//! after the other, private bytes would be gone when a later piece fails, and nothing brings them back. So
//! the memory that a request to shared has in both planes is as much as it changes, until its last step;
//! [`budget`](crate::budget) bounds what all requests of a VM have.
//!
//! A guest chooses how many runs change. A plan takes a bit for each page of them at most: runs are found
//! again in every step, and none has a place in a list.

use super::Part;
use crate::attributes::{Attribute, Changed};
use crate::block::Block;
use crate::error::{Cause, Error, Of, Result};
use crate::listeners::Frozen;
use crate::plane::Backing;
use crate::sync::Arc;
use crate::units::{Gpa, Offset, Span};
use smallvec::SmallVec;
use std::ops::Range;

/// Runs that a call may have in common lie in so many bytes: what is noted of a call that fails is bounded
/// by it, and so is how long others wait for what the kernel locks for one.
const PIECE_BYTES: u64 = 64 << 20;

/// What changes of one part.
#[derive(Debug)]
pub(super) struct Target<'a> {
    part: &'a Part,
    pub(super) changed: Changed,
    /// None if nobody listens: then the steps for them are left out.
    listeners: Option<Frozen>,
}

/// What the kernel is told at once, and the targets in it.
#[derive(Debug)]
pub(super) struct KernelCall {
    pub(super) told: Told,
    pub(super) targets: Range<usize>,
}

/// Who is told, and of what.
#[derive(Clone, Copy, Debug)]
pub(super) enum Told {
    /// The VM, of guest physical addresses.
    Vm(Span<Gpa>),
    /// The file of the targets' block, of offsets.
    File(Span<Offset>),
    /// That file, of each run by itself.
    FileByRuns,
    /// Nobody: nothing is bound there.
    Nobody,
}

impl Told {
    /// Both at once, if what lies between needs no telling.
    fn join(self, later: Self) -> Option<Self> {
        match (self, later) {
            (Told::Vm(one), Told::Vm(other)) => {
                Some(Told::Vm(Span::between(one.first(), other.end())))
            }
            (Told::File(one), Told::File(other)) => {
                Some(Told::File(Span::between(one.first(), other.end())))
            }
            _ => None,
        }
    }
}

/// One step, on all targets that it is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Listeners let go.
    Begin,
    /// Every window loses what changes.
    DmaOut,
    /// The plane that the pages go to is given memory for them, if that is wanted and no device's
    /// mapping will do it. Undone, what either has allocated is freed.
    Populate,
    /// Every window gets what changes.
    DmaIn,
    /// Private bytes are taken away. Can't be undone, and is only done to what a reset ends.
    Erase,
    /// The kernel changes the attribute, and the library's follows.
    Kernel,
    /// Every window gets what could not be mapped before. The conversion is done even if this fails.
    DmaInLate,
    /// The plane that the pages have left gives its memory back, if it isn't the same one. Can't fail
    /// the conversion.
    Release,
    /// Listeners may take the pages again. Can't fail.
    End,
}

impl Step {
    /// Those before which nothing is decided, in order: all of them happen, or none.
    pub(super) fn to_decision(attribute: Attribute) -> &'static [Step] {
        match attribute {
            Attribute::Private => &[Step::Begin, Step::Populate, Step::DmaOut, Step::Kernel],
            Attribute::Shared => &[
                Step::Begin,
                Step::Populate,
                Step::DmaIn,
                Step::Erase,
                Step::Kernel,
            ],
        }
    }

    /// And those from which there is no way back.
    pub(super) fn after_decision(attribute: Attribute) -> &'static [Step] {
        match attribute {
            Attribute::Private => &[Step::Release, Step::End],
            Attribute::Shared => &[Step::DmaInLate, Step::Release, Step::End],
        }
    }
}

impl<'a> Target<'a> {
    pub(super) fn block(&self) -> &'a Arc<Block> {
        &self.part.block
    }

    /// Where the guest sees a part of what changes, if it does.
    pub(super) fn gpas(&self, run: Span<Offset>) -> Option<Span<Gpa>> {
        let gpas = self.part.gpas?;
        Some(self.part.offsets.translate(&run, gpas.start()))
    }

    pub(super) fn is_split(&self) -> bool {
        self.block().backing() == Backing::Split
    }

    pub(super) fn begin(&self, run: Span<Offset>, attribute: Attribute) -> Result<()> {
        match &self.listeners {
            Some(listeners) => listeners.begin(run, attribute).of(self.block().name()),
            None => Ok(()),
        }
    }

    pub(super) fn end(&self, run: Span<Offset>, attribute: Attribute, changed: bool) {
        if let Some(listeners) = &self.listeners {
            listeners.end(run, attribute, changed);
        }
    }

    /// The next runs from `at` on that one call can be made for, as their hull. What lies between them has the attribute
    /// that they get: to private no device has it, and in neither direction does the plane that they leave
    /// hold anything of it; unless something is wrong there. Then it is one run.
    pub(super) fn piece_from(&self, at: u64) -> Option<Span<Offset>> {
        let piece = self.changed.piece_from(at, PIECE_BYTES)?;
        match &self.changed {
            Changed::Many { .. } if !self.block().is_plain(piece) => self.changed.first_from(at),
            _ => Some(piece),
        }
    }
}

/// What a conversion is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// A guest asked, and is bound by the block's limits.
    Request,
    /// A reset of the VM: it must get through.
    Reset,
}

/// A conversion, ready to be carried out: nothing has happened yet.
#[derive(Debug)]
pub(super) struct Plan<'a> {
    pub(super) attribute: Attribute,
    pub(super) purpose: Purpose,
    pub(super) targets: SmallVec<[Target<'a>; 1]>,
    pub(super) kernel_calls: SmallVec<[KernelCall; 1]>,
}

impl<'a> Plan<'a> {
    /// Plans to give all of `parts` an attribute. The caller has their ranges locked.
    ///
    /// Pages that have it already appear in no step, but lie in the kernel's range where they are
    /// between pages that don't: one call for all is what makes it all or nothing. They keep their
    /// bytes; on VM types without a separate private page table the guest's mappings of them go and
    /// come back (kvm_arch_pre_set_memory_attributes).
    pub(super) fn new(parts: &'a [Part], attribute: Attribute, purpose: Purpose) -> Result<Self> {
        let mut plan = Self {
            attribute,
            purpose,
            targets: SmallVec::new(),
            kernel_calls: SmallVec::new(),
        };
        if purpose == Purpose::Request {
            check_size(parts, attribute)?;
        }
        // Whether no hole lies between the last kernel call and the part in hand.
        let mut connected = false;
        let mut previous: Option<&Part> = None;
        for part in parts {
            connected &= previous.is_some_and(|previous| adjoin(previous, part));
            let changed = part.block.attributes().changed(part.offsets, attribute);
            if let Some(changed) = changed.map_err(|_| no_memory(part, attribute))? {
                if purpose == Purpose::Request && part.block.max_runs() != u64::MAX {
                    check_runs(part, changed.hull(), attribute)?;
                }
                plan.add(part, changed, connected);
                connected = true;
            }
            previous = Some(part);
        }
        Ok(plan)
    }

    /// Adds what changes of a part. If it is `connected` with the last kernel call, by memory
    /// that has or gets the attribute, the kernel hears of both in one call.
    fn add(&mut self, part: &'a Part, changed: Changed, connected: bool) {
        let hull = changed.hull();
        let target = Target {
            part,
            changed,
            listeners: part.block.listeners.freeze(),
        };
        let in_place = !target.is_split();
        let told = match target.gpas(hull) {
            // What has the attribute must not be named there: see Kernel::convert_in_place.
            _ if in_place && part.block.planes().huge_page().is_some() => Told::FileByRuns,
            _ if in_place => Told::File(hull),
            Some(gpas) => Told::Vm(gpas),
            None => Told::Nobody,
        };
        let index = self.targets.len();
        self.targets.push(target);
        if let (true, Some(previous)) = (connected, self.kernel_calls.last_mut()) {
            if let Some(both) = previous.told.join(told) {
                previous.told = both;
                previous.targets.end = index + 1;
                return;
            }
        }
        let targets = index..index + 1;
        self.kernel_calls.push(KernelCall { told, targets });
    }

    /// Whether a step is for a target.
    pub(super) fn has(&self, step: Step, target: &Target) -> bool {
        match step {
            Step::Begin | Step::End => target.listeners.is_some(),
            // What is kept for it comes back, if nothing else.
            Step::Populate if self.attribute == Attribute::Private => {
                let planes = target.block().planes();
                self.must_populate(target) || planes.may_keep(Attribute::Private)
            }
            Step::Populate | Step::DmaIn => target.is_split(),
            Step::Erase => self.purpose == Purpose::Reset && !target.is_split(),
            Step::DmaInLate => !target.is_split(),
            Step::DmaOut | Step::Kernel | Step::Release => true,
        }
    }

    /// Whether a target's new plane must have memory before the kernel's step.
    pub(super) fn must_populate(&self, target: &Target) -> bool {
        let planes = target.block().planes();
        match self.purpose {
            Purpose::Request => planes.must_allocate(self.attribute),
            // As for a new block. Ordinary shared memory must not be needed while the private plane
            // still holds what it is to be instead.
            Purpose::Reset => planes.must_allocate_initially(self.attribute),
        }
    }

    /// Bytes that may be given memory in one plane before they lose that in the other. What is kept there for
    /// a while after that is bounded by itself.
    pub(super) fn bytes_in_both_planes(&self) -> u64 {
        let targets = self.targets.iter();
        let allocating =
            targets.filter(|target| target.is_split() && self.has(Step::Populate, target));
        allocating.map(|target| target.changed.bytes()).sum()
    }
}

/// Whether who is told of one part could be told of the other in the same breath: the VM, if guest
/// addresses go on from the one to the other, or a file, if it is the same one and its offsets do too.
fn adjoin(one: &Part, other: &Part) -> bool {
    let in_guest = match (one.gpas, other.gpas) {
        (Some(one), Some(other)) => one.end() == other.first(),
        _ => false,
    };
    let in_file =
        Arc::ptr_eq(&one.block, &other.block) && one.offsets.end() == other.offsets.first();
    in_guest
        && match (one.block.backing(), other.block.backing()) {
            (Backing::Split, Backing::Split) => true,
            _ => in_file,
        }
}

/// Refuses a request that changes more than a block allows: time, memory for the plan, and memory that is
/// there twice, all go by that.
fn check_size(parts: &[Part], attribute: Attribute) -> Result<()> {
    let mut changing = 0;
    for part in parts {
        let block = &part.block;
        let hull = block.attributes().change_hull(part.offsets, attribute);
        let Some(hull) = hull else { continue };
        changing += hull.size_bytes();
        if changing > block.max_request() {
            block.counters().requests_refused.add(1);
            let cause = Cause::MaxRequest {
                bytes: changing,
                most: block.max_request(),
            };
            return Err(Error::new(cause, making(part, attribute))
                .of(block.name())
                .with_remedy("ask for less at once, or give the block a larger one"));
        }
    }
    Ok(())
}

/// Refuses a conversion that would make the block's books too long.
fn check_runs(part: &Part, hull: Span<Offset>, attribute: Attribute) -> Result<()> {
    let block = &part.block;
    let attributes = block.attributes();
    let after = attributes.private_runs_after(hull, attribute);
    if after > attributes.private_runs() && after > block.max_runs() {
        block.counters().runs_refused.add(1);
        let cause = Cause::MaxRuns {
            runs: after,
            most: block.max_runs(),
        };
        return Err(Error::new(cause, making(part, attribute))
            .of(block.name())
            .with_remedy("a larger one takes more memory of the host"));
    }
    Ok(())
}

fn no_memory(part: &Part, attribute: Attribute) -> Error {
    let what = format!(
        "{} takes a bit of memory for each page, which there is not",
        making(part, attribute)
    );
    Error::new(Cause::OutOfMemory, what)
        .of(part.block.name())
        .with_remedy("free some, or ask for less at once")
}

fn making(part: &Part, attribute: Attribute) -> String {
    format!("making {} {}", part.offsets, attribute.name())
}
