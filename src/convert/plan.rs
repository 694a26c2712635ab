// SPDX-License-Identifier: MIT OR Apache-2.0
//! The steps of a conversion, in the order that keeps every invariant at every moment.
//!
//! ```text
//! to private          listeners begin, DMA out, kernel, free the shared bytes (split), listeners end
//! to shared (split)   listeners begin, reserve shared memory, DMA in, kernel, free the private
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

use super::Part;
use crate::attributes::Attribute;
use crate::block::Block;
use crate::error::{Error, Result};
use crate::listeners::Frozen;
use crate::plane::Backing;
use crate::run_set::Spans;
use crate::sync::Arc;
use crate::units::{Gpa, Offset, Span};
use smallvec::SmallVec;
use std::fmt;
use std::ops::Range;

/// A range of one block that changes, all of it.
#[derive(Debug)]
pub(super) struct Target {
    pub(super) block: Arc<Block>,
    pub(super) span: Span<Offset>,
    /// Where the guest sees it, if it does.
    pub(super) gpas: Option<Span<Gpa>>,
    /// None if nobody listens: then the steps for them are left out.
    listeners: Option<Arc<Frozen>>,
}

/// What the kernel is told at once, and the targets in it.
#[derive(Debug)]
pub(super) struct Announcement {
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

/// One step, on one target or announcement, by index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Listeners let go.
    Begin(usize),
    /// Every window loses the range.
    DmaOut(usize),
    /// The plane that the range goes to is given memory for it, if that is wanted and no device's
    /// mapping will do it. Undone, what either has allocated is freed.
    Reserve(usize),
    /// Every window gets the range.
    DmaIn(usize),
    /// The range loses its private bytes. Can't be undone, and is only done to what a reset ends.
    Erase(usize),
    /// The kernel changes the attribute, and the library's follows.
    Kernel(usize),
    /// The plane that the range has left gives its memory back, if it isn't the same one. Can't fail
    /// the conversion.
    Release(usize),
    /// Listeners may take the range again. Can't fail.
    End(usize),
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.block.name(), self.span)
    }
}

impl Target {
    pub(super) fn begin(&self, attribute: Attribute) -> Result<()> {
        match &self.listeners {
            Some(listeners) => listeners.begin(self.span, attribute),
            None => Ok(()),
        }
    }

    /// Whether it is to be used as having `attribute`. With one private page in it, no page of it is to
    /// be used as shared.
    pub(super) fn counts_as(&self, attribute: Attribute) -> bool {
        let has_private = self.block.attributes().has_private(self.span);
        has_private == (attribute == Attribute::Private)
    }

    pub(super) fn end(&self, attribute: Attribute, changed: bool) {
        if let Some(listeners) = &self.listeners {
            listeners.end(self.span, attribute, changed);
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
pub(super) struct Plan {
    pub(super) attribute: Attribute,
    pub(super) purpose: Purpose,
    pub(super) targets: SmallVec<[Target; 1]>,
    pub(super) announcements: SmallVec<[Announcement; 1]>,
    pub(super) steps: SmallVec<[Step; 8]>,
    /// Index of the first step after the kernel's: from there on there is no way back.
    pub(super) decided: usize,
}

impl Plan {
    /// Plans to give all of `parts` an attribute. The caller has their ranges locked.
    ///
    /// Pages that have it already appear in no step, but lie in the kernel's range where they are
    /// between pages that don't: one call for all is what makes it all or nothing. They keep their
    /// bytes; on VM types without a separate private page table the guest's mappings of them go and
    /// come back (kvm_arch_pre_set_memory_attributes).
    pub(super) fn new(parts: &[Part], attribute: Attribute, purpose: Purpose) -> Result<Self> {
        let mut plan = Self {
            attribute,
            purpose,
            targets: SmallVec::new(),
            announcements: SmallVec::new(),
            steps: SmallVec::new(),
            decided: 0,
        };
        // Whether no hole lies between the last announcement and the part in hand.
        let mut connected = false;
        let mut previous: Option<&Part> = None;
        for part in parts {
            connected &= previous.is_some_and(|previous| adjoin(previous, part));
            let changes = part.block.attributes().changes(part.offsets, attribute);
            if !changes.is_empty() {
                if purpose == Purpose::Request && part.block.max_runs() != u64::MAX {
                    check_runs(part, &changes, attribute)?;
                }
                plan.add(part, changes, connected);
                connected = true;
            }
            previous = Some(part);
        }
        plan.order_steps();
        Ok(plan)
    }

    /// Adds the changed runs of a part. If it is `connected` with the last announcement, by memory
    /// that has or gets the attribute, the kernel hears of both in one call.
    fn add(&mut self, part: &Part, changes: Spans<Offset>, connected: bool) {
        let listeners = part.block.listeners.freeze();
        let changed = Span::between(changes[0].first(), changes[changes.len() - 1].end());
        let from = self.targets.len();
        let in_place = part.block.backing() == Backing::InPlace;
        // What has the attribute must not be named there: see Kernel::convert_in_place.
        let one_by_one = in_place && part.block.planes().huge_page().is_some();
        self.targets.extend(changes.into_iter().map(|span| {
            Target {
                block: part.block.clone(),
                span,
                gpas: part
                    .gpas
                    .map(|gpas| part.offsets.translate(&span, gpas.start())),
                listeners: listeners.clone(),
            }
        }));
        let targets = from..self.targets.len();
        if one_by_one {
            let alone = targets.map(|index| Announcement {
                told: Told::File(self.targets[index].span),
                targets: index..index + 1,
            });
            self.announcements.extend(alone);
            return;
        }
        let told = match part.gpas {
            _ if in_place => Told::File(changed),
            Some(gpas) => Told::Vm(part.offsets.translate(&changed, gpas.start())),
            None => Told::Nobody,
        };
        if let (true, Some(previous)) = (connected, self.announcements.last_mut()) {
            if let Some(both) = previous.told.join(told) {
                previous.told = both;
                previous.targets.end = targets.end;
                return;
            }
        }
        self.announcements.push(Announcement { told, targets });
    }

    /// Whether a target's new plane must have memory before the kernel's step.
    pub(super) fn reserves(&self, target: &Target) -> bool {
        let planes = target.block.planes();
        match self.purpose {
            Purpose::Request => planes.must_allocate(self.attribute),
            // As for a new block. Ordinary shared memory must not be needed while the private plane
            // still holds what it is to be instead.
            Purpose::Reset => planes.must_allocate_initially(self.attribute),
        }
    }

    fn order_steps(&mut self) {
        let targets = 0..self.targets.len();
        let mut steps = SmallVec::with_capacity(5 * targets.len() + self.announcements.len());
        let heard = |&target: &usize| self.targets[target].listeners.is_some();
        let split = |&target: &usize| self.targets[target].block.backing() == Backing::Split;
        steps.extend(targets.clone().filter(heard).map(Step::Begin));
        match self.attribute {
            Attribute::Private => {
                let reserving = targets.clone().filter(|&target| {
                    let target = &self.targets[target];
                    let planes = target.block.planes();
                    self.reserves(target) || planes.may_keep(Attribute::Private)
                });
                steps.extend(reserving.map(Step::Reserve));
                steps.extend(targets.clone().map(Step::DmaOut));
            }
            Attribute::Shared => {
                steps.extend(targets.clone().filter(split).map(Step::Reserve));
                steps.extend(targets.clone().filter(split).map(Step::DmaIn));
                let erased = |target: &usize| self.purpose == Purpose::Reset && !split(target);
                steps.extend(targets.clone().filter(erased).map(Step::Erase));
            }
        }
        steps.extend((0..self.announcements.len()).map(Step::Kernel));
        self.decided = steps.len();
        if self.attribute == Attribute::Shared {
            let late = |target: &usize| !split(target);
            steps.extend(targets.clone().filter(late).map(Step::DmaIn));
        }
        steps.extend(targets.clone().map(Step::Release));
        steps.extend(targets.filter(heard).map(Step::End));
        self.steps = steps;
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

/// Refuses a conversion that would make the block's books too long.
fn check_runs(part: &Part, changes: &[Span<Offset>], attribute: Attribute) -> Result<()> {
    let block = &part.block;
    let span = Span::between(changes[0].first(), changes[changes.len() - 1].end());
    let attributes = block.attributes();
    let after = attributes.private_runs_after(span, attribute);
    if after > attributes.private_runs() && after > block.max_runs() {
        block.counters.runs_refused.add(1);
        return Err(Error::Exhausted(format!(
            "{}: making {} {} would leave {after} private runs; max-runs is {}",
            block.name(),
            part.offsets,
            attribute.name(),
            block.max_runs()
        )));
    }
    Ok(())
}
