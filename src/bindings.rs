// SPDX-License-Identifier: MIT OR Apache-2.0
//! Where offsets of blocks appear in guest physical address space.

use crate::block::Block;
use crate::error::{Error, Result};
use crate::run_set::{RunSet, Spans};
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::{Arc, Weak};
use crate::units::{Gpa, Offset, Span};
use smallvec::SmallVec;
use std::collections::BTreeMap;

/// One range of a block at one guest physical address.
#[derive(Clone, Debug)]
struct Binding {
    block: Weak<Block>,
    block_number: u64,
    offsets: Span<Offset>,
}

/// A part of a request that lies in one binding.
#[derive(Clone, Debug)]
pub(crate) struct Segment {
    pub(crate) block: Arc<Block>,
    pub(crate) offsets: Span<Offset>,
    pub(crate) gpas: Span<Gpa>,
}

impl PartialEq for Segment {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.block, &other.block)
            && (self.offsets, self.gpas) == (other.offsets, other.gpas)
    }
}

/// The parts of one request, mostly one.
pub(crate) type Segments = SmallVec<[Segment; 1]>;

/// All bindings of a VM: disjoint in guest physical addresses, and no offset of a block in two.
///
/// Locked for moments only, never across a call. What keeps a binding for longer is the range of its
/// offsets: who has a page of it locked sees it stay.
#[derive(Debug, Default)]
pub(crate) struct Bindings {
    /// Grows with every change. Who has a range locked sees all changes there without a lock.
    version: Arc<AtomicU64>,
    by_gpa: BTreeMap<u64, Binding>,
    /// Addresses without a binding that the VM may hold for private, since telling it otherwise has
    /// failed. They count as private for nobody who binds them next.
    left_private: RunSet<Gpa>,
}

impl Bindings {
    /// Enters a binding, if neither its addresses nor its offsets are bound already (a second
    /// binding of an offset is EEXIST for KVM too: kvm_gmem_bind).
    pub(crate) fn insert(
        &mut self,
        block: &Arc<Block>,
        offsets: Span<Offset>,
        gpas: Span<Gpa>,
    ) -> Result<()> {
        for (&start, bound) in &self.by_gpa {
            let bound_gpas = Span::between(start, start + bound.offsets.size_bytes());
            if gpas.overlaps(&bound_gpas) {
                return Err(Error::Exists(format!(
                    "{}: {gpas} is taken: {bound_gpas} is bound already",
                    block.name()
                )));
            }
            if bound.block_number == block.number() && offsets.overlaps(&bound.offsets) {
                return Err(Error::Exists(format!(
                    "{}: {offsets} can't appear at {gpas} too: {} is bound at {bound_gpas}",
                    block.name(),
                    bound.offsets
                )));
            }
        }
        let binding = Binding {
            block: Arc::downgrade(block),
            block_number: block.number(),
            offsets,
        };
        self.by_gpa.insert(gpas.first(), binding);
        self.version.fetch_add(1, Ordering::Release);
        Ok(())
    }

    /// Whether exactly this binding is there.
    pub(crate) fn has(&self, block: &Block, offsets: Span<Offset>, gpa: Gpa) -> bool {
        self.by_gpa
            .get(&gpa.0)
            .is_some_and(|b| b.block_number == block.number() && b.offsets == offsets)
    }

    /// Takes the binding that starts at `gpa` out.
    pub(crate) fn remove(&mut self, gpa: Gpa) {
        self.by_gpa.remove(&gpa.0);
        self.version.fetch_add(1, Ordering::Release);
    }

    /// While this is the same, so are all bindings.
    pub(crate) fn version(&self) -> u64 {
        self.version.load(Ordering::Acquire)
    }

    /// For who asks often.
    pub(crate) fn shared_version(&self) -> Arc<AtomicU64> {
        self.version.clone()
    }

    /// Takes all of them out: the VM has ended.
    pub(crate) fn clear(&mut self) {
        self.by_gpa.clear();
        self.version.fetch_add(1, Ordering::Release);
        self.left_private = RunSet::default();
    }

    /// Notes addresses that could not be made shared for the VM.
    pub(crate) fn leave_private(&mut self, gpas: Span<Gpa>) {
        self.left_private.insert(gpas);
    }

    /// The parts of `gpas` that could not be.
    pub(crate) fn left_private(&self, gpas: Span<Gpa>) -> Spans<Gpa> {
        self.left_private.inside(gpas)
    }

    /// Now they are.
    pub(crate) fn are_shared(&mut self, gpas: Span<Gpa>) {
        self.left_private.remove(gpas);
    }

    /// The bindings of one block.
    pub(crate) fn of_block(&self, block_number: u64) -> Vec<(Span<Offset>, Span<Gpa>)> {
        self.by_gpa
            .iter()
            .filter(|(_, b)| b.block_number == block_number)
            .map(|(&start, b)| {
                let end = start + b.offsets.size_bytes();
                (b.offsets, Span::between(start, end))
            })
            .collect()
    }

    /// The block that all of `request` is a part of, where that is in it, and the bindings' version. `None` if
    /// there is no such one.
    pub(crate) fn single(&self, request: Span<Gpa>) -> Option<(Arc<Block>, Span<Offset>, u64)> {
        let (&start, binding) = self.by_gpa.range(..=request.first()).next_back()?;
        let bound = Span::between(start, start + binding.offsets.size_bytes());
        if request.end() > bound.end() {
            return None;
        }
        let offsets = bound.translate(&request, binding.offsets.start());
        Some((binding.block.upgrade()?, offsets, self.version()))
    }

    /// Cuts a request into its parts by binding, in order of address. What is missing between them
    /// is no memory of a block.
    pub(crate) fn segments(&self, request: Span<Gpa>) -> Segments {
        let first = self
            .by_gpa
            .range(..=request.first())
            .next_back()
            .map_or(request.first(), |(&start, _)| start);
        self.by_gpa
            .range(first..request.end())
            .filter_map(|(&start, binding)| {
                let bound = Span::between(start, start + binding.offsets.size_bytes());
                let gpas = bound.intersection(&request)?;
                Some(Segment {
                    block: binding.block.upgrade()?,
                    offsets: bound.translate(&gpas, binding.offsets.start()),
                    gpas,
                })
            })
            .collect()
    }
}
