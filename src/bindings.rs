// SPDX-License-Identifier: MIT OR Apache-2.0
//! Where offsets of blocks appear in guest physical address space.

use crate::error::{Cause, Error, Result};
use crate::run_set::{RunSet, Spans};
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use crate::units::{Gpa, Offset, Span};
use std::collections::BTreeMap;

/// The bindings of one VM, which it shares with its blocks. What a block is, `B`, is not looked at here: who
/// asks what is bound gets it along with the answer, since every request asks.
#[derive(Debug)]
pub(crate) struct VmBindings<B> {
    /// Of the bindings.
    version: Arc<AtomicU64>,
    bindings: Mutex<Bindings<B>>,
}

impl<B> VmBindings<B> {
    pub(crate) fn new() -> Arc<Self> {
        let bindings = Bindings::default();
        Arc::new(Self {
            version: bindings.version.clone(),
            bindings: Mutex::new(bindings),
        })
    }

    /// For a moment.
    pub(crate) fn lock(&self) -> MutexGuard<'_, Bindings<B>> {
        self.bindings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether they have not changed since they had that version, as far as pages are concerned whose
    /// range the caller has locked.
    pub(crate) fn are(&self, version: u64) -> bool {
        self.version.load(Ordering::Acquire) == version
    }
}

/// One range of a block at one guest physical address.
#[derive(Debug)]
struct Binding<B> {
    block: Weak<B>,
    /// The block's.
    number: u64,
    offsets: Span<Offset>,
    /// Nobody else's, ever.
    id: u64,
}

/// A part of a request that lies in one binding.
#[derive(Debug)]
pub(crate) struct Bound<B> {
    /// Its end takes ranges, and the bindings: who drops it must have none of them.
    pub(crate) block: Arc<B>,
    pub(crate) offsets: Span<Offset>,
    pub(crate) gpas: Span<Gpa>,
}

impl<B> PartialEq for Bound<B> {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.block, &other.block)
            && (self.offsets, self.gpas) == (other.offsets, other.gpas)
    }
}

/// All bindings of a VM: disjoint in guest physical addresses, and no offset of a block in two.
///
/// Locked for moments only, never across a call. What keeps a binding for longer is the range of its
/// offsets: who has a page of it locked sees it stay.
#[derive(Debug)]
pub(crate) struct Bindings<B> {
    /// Grows with every change. Who has a range locked sees all changes there without a lock.
    version: Arc<AtomicU64>,
    by_gpa: BTreeMap<u64, Binding<B>>,
    /// Addresses without a binding that the VM may hold for private, since telling it otherwise has
    /// failed. They count as private for nobody who binds them next.
    left_private: RunSet<Gpa>,
}

impl<B> Default for Bindings<B> {
    fn default() -> Self {
        Self {
            version: Arc::default(),
            by_gpa: BTreeMap::new(),
            left_private: RunSet::default(),
        }
    }
}

impl<B> Bindings<B> {
    /// Enters a binding of the block with that number, if neither its addresses nor its offsets are bound already (a second
    /// binding of an offset is EEXIST for KVM too: kvm_gmem_bind). What it returns names it, and no other one
    /// of this VM.
    pub(crate) fn insert(
        &mut self,
        (block, number): (Weak<B>, u64),
        name: &str,
        offsets: Span<Offset>,
        gpas: Span<Gpa>,
    ) -> Result<u64> {
        for (&start, bound) in &self.by_gpa {
            let bound_gpas = Span::between(start, start + bound.offsets.size_bytes());
            if gpas.overlaps(&bound_gpas) {
                let what = format!("{gpas} is taken: {bound_gpas} is bound already");
                return Err(Error::new(Cause::Exists, what).of(name));
            }
            if bound.number == number && offsets.overlaps(&bound.offsets) {
                let what = format!(
                    "{offsets} can't appear at {gpas} too: {} is bound at {bound_gpas}",
                    bound.offsets
                );
                return Err(Error::new(Cause::Exists, what).of(name));
            }
        }
        let id = self.version.fetch_add(1, Ordering::Release);
        let binding = Binding {
            block,
            number,
            offsets,
            id,
        };
        self.by_gpa.insert(gpas.first(), binding);
        Ok(id)
    }

    /// The name of exactly this binding, if it is there.
    pub(crate) fn find(&self, number: u64, offsets: Span<Offset>, gpa: Gpa) -> Option<u64> {
        let binding = self.by_gpa.get(&gpa.0)?;
        let same = binding.number == number && binding.offsets == offsets;
        same.then_some(binding.id)
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

    /// The bindings of the block with that number.
    pub(crate) fn of_block(&self, number: u64) -> Vec<(Span<Offset>, Span<Gpa>)> {
        self.by_gpa
            .iter()
            .filter(|(_, b)| b.number == number)
            .map(|(&start, b)| {
                let end = start + b.offsets.size_bytes();
                (b.offsets, Span::between(start, end))
            })
            .collect()
    }

    /// What all of `request` is a part of, where that is in it, and the bindings' version. `None` if there is
    /// no such one, or its block is at its end.
    pub(crate) fn single(&self, request: Span<Gpa>) -> Option<(Bound<B>, u64)> {
        let (&start, binding) = self.by_gpa.range(..=request.first()).next_back()?;
        let bound = Span::between(start, start + binding.offsets.size_bytes());
        if request.end() > bound.end() {
            return None;
        }
        let single = Bound {
            block: binding.block.upgrade()?,
            offsets: bound.translate(&request, binding.offsets.start()),
            gpas: request,
        };
        Some((single, self.version()))
    }

    /// Cuts a request into its parts by binding, in order of address. What is missing between them
    /// is no memory of a block, or of one at its end.
    pub(crate) fn parts(&self, request: Span<Gpa>) -> impl Iterator<Item = Bound<B>> + '_ {
        let first = self
            .by_gpa
            .range(..=request.first())
            .next_back()
            .map_or(request.first(), |(&start, _)| start);
        let bindings = self.by_gpa.range(first..request.end());
        bindings.filter_map(move |(&start, binding)| {
            let bound = Span::between(start, start + binding.offsets.size_bytes());
            let gpas = bound.intersection(&request)?;
            Some(Bound {
                block: binding.block.upgrade()?,
                offsets: bound.translate(&gpas, binding.offsets.start()),
                gpas,
            })
        })
    }
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests {
    use super::*;

    fn offsets(first: u64, end: u64) -> Span<Offset> {
        Span::between(first << 12, end << 12)
    }

    fn gpas(first: u64, end: u64) -> Span<Gpa> {
        Span::between(first << 12, end << 12)
    }

    #[test]
    fn no_address_and_no_offset_is_bound_twice() {
        let blocks = [(); 3].map(Arc::new);
        let named = |number: usize| (Arc::downgrade(&blocks[number]), number as u64);
        let mut bindings = Bindings::default();
        let first = bindings
            .insert(named(1), "one", offsets(0, 4), gpas(16, 20))
            .unwrap();
        for (block, offsets, gpas) in [
            (2, offsets(0, 4), gpas(19, 23)),
            (2, offsets(0, 8), gpas(12, 20)),
            (1, offsets(3, 5), gpas(32, 34)),
        ] {
            let error = bindings
                .insert(named(block), "two", offsets, gpas)
                .unwrap_err();
            assert_eq!(error.errno(), libc::EEXIST, "{error}");
        }
        let version = bindings.version();
        bindings
            .insert(named(2), "two", offsets(0, 4), gpas(20, 24))
            .unwrap();
        assert_ne!(bindings.version(), version);
        bindings.remove(gpas(16, 20).start());
        let again = bindings
            .insert(named(2), "two", offsets(4, 8), gpas(16, 20))
            .unwrap();
        assert_ne!(again, first);
        assert_eq!(
            bindings.find(2, offsets(4, 8), gpas(16, 20).start()),
            Some(again)
        );
        assert_eq!(bindings.find(1, offsets(4, 8), gpas(16, 20).start()), None);
    }

    #[test]
    fn a_request_falls_into_what_is_bound_of_it() {
        let blocks = [(); 3].map(Arc::new);
        let named = |number: usize| (Arc::downgrade(&blocks[number]), number as u64);
        let mut bindings = Bindings::default();
        bindings
            .insert(named(1), "one", offsets(8, 12), gpas(16, 20))
            .unwrap();
        bindings
            .insert(named(2), "two", offsets(0, 4), gpas(24, 28))
            .unwrap();
        let parts: Vec<_> = bindings.parts(gpas(18, 25)).collect();
        let expected = [
            Bound {
                block: blocks[1].clone(),
                offsets: offsets(10, 12),
                gpas: gpas(18, 20),
            },
            Bound {
                block: blocks[2].clone(),
                offsets: offsets(0, 1),
                gpas: gpas(24, 25),
            },
        ];
        assert_eq!(parts, expected);
        assert_eq!(bindings.parts(gpas(20, 24)).count(), 0);
        assert_eq!(bindings.single(gpas(18, 25)), None);
        let (single, version) = bindings.single(gpas(18, 20)).expect("one binding");
        assert_eq!((&single, version), (&expected[0], bindings.version()));

        drop((parts, expected, single));
        let [_, _, last] = blocks;
        drop(last);
        assert_eq!(bindings.parts(gpas(18, 28)).count(), 1, "one is at its end");
        assert!(bindings.single(gpas(24, 25)).is_none());
    }
}
