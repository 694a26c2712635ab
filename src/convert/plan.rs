// SPDX-License-Identifier: MIT OR Apache-2.0
//! The steps of a conversion, in the order that keeps every invariant at every moment.
//!
//! ```text
//! to private          listeners begin, DMA out, kernel, free the shared bytes, listeners end
//! to shared (split)   listeners begin, reserve shared memory, DMA in, kernel, free the private
//!                     bytes, listeners end
//! ```
//!
//! To private, devices let go before the kernel hears of it (invariant 2). To shared, in a split
//! block, the shared bytes are another file's: devices may have them early, and so everything that
//! can fail comes before the kernel's step, after which there is no way back that keeps contents.

use super::Part;
use crate::attributes::Attribute;
use crate::block::Block;
use crate::error::{Error, Result};
use crate::listeners::Frozen;
use crate::run_set::Spans;
use crate::units::{Gpa, Offset, Span};
use smallvec::SmallVec;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

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

/// A range of guest physical addresses that the kernel is told about at once, and the targets in it.
#[derive(Debug)]
pub(super) struct Announcement {
    pub(super) gpas: Option<Span<Gpa>>,
    pub(super) targets: Range<usize>,
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
    /// The kernel changes the attribute, and the library's follows.
    Kernel(usize),
    /// The plane that the range has left gives its memory back. Can't fail the conversion.
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
        };
        // Whether no hole lies between the last announcement and the part in hand.
        let mut connected = false;
        let mut last_part_end = None;
        for part in parts {
            let adjoins =
                last_part_end.is_some() && last_part_end == part.gpas.map(|gpas| gpas.first());
            connected &= adjoins;
            let changes = part.block.attributes().changes(part.offsets, attribute);
            if !changes.is_empty() {
                if purpose == Purpose::Request && part.block.max_runs() != u64::MAX {
                    check_runs(part, &changes, attribute)?;
                }
                plan.add(part, changes, connected);
                connected = true;
            }
            last_part_end = part.gpas.map(|gpas| gpas.end());
        }
        plan.order_steps();
        Ok(plan)
    }

    /// Adds the changed runs of a part. If it is `connected` with the last announcement, by memory
    /// that has or gets the attribute, the kernel hears of both in one call.
    fn add(&mut self, part: &Part, changes: Spans<Offset>, connected: bool) {
        let listeners = part.block.listeners.freeze();
        let first = changes[0];
        let last = changes[changes.len() - 1];
        let from = self.targets.len();
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
        let gpas = part.gpas.map(|gpas| {
            let changed = Span::between(first.first(), last.end());
            part.offsets.translate(&changed, gpas.start())
        });
        if let (true, Some(previous), Some(gpas)) = (connected, self.announcements.last_mut(), gpas)
        {
            if let Some(earlier) = previous.gpas {
                previous.gpas = Some(Span::between(earlier.first(), gpas.end()));
                previous.targets.end = targets.end;
                return;
            }
        }
        self.announcements.push(Announcement { gpas, targets });
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
        steps.extend(targets.clone().filter(heard).map(Step::Begin));
        match self.attribute {
            Attribute::Private => {
                let reserving = targets
                    .clone()
                    .filter(|&target| self.reserves(&self.targets[target]));
                steps.extend(reserving.map(Step::Reserve));
                steps.extend(targets.clone().map(Step::DmaOut));
            }
            Attribute::Shared => {
                steps.extend(targets.clone().map(Step::Reserve));
                steps.extend(targets.clone().map(Step::DmaIn));
            }
        }
        steps.extend((0..self.announcements.len()).map(Step::Kernel));
        steps.extend(targets.clone().map(Step::Release));
        steps.extend(targets.filter(heard).map(Step::End));
        self.steps = steps;
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
