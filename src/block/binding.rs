// SPDX-License-Identifier: MIT OR Apache-2.0
//! Where the guest sees a block, and what the VM is told of its attributes there.

use super::Block;
use crate::attributes::Attribute;
use crate::error::{Error, Result};
use crate::plane::Backing;
use crate::range_locks::{addresses, RangeGuard};
use crate::sync::atomic::Ordering;
use crate::sync::{Arc, Weak};
use crate::throttle::limited;
use crate::units::{Gpa, Offset, Span};

/// A part of a block at a guest physical address, until this is dropped: for the kernel its addresses are
/// shared then, so its memory slot must be gone. [`Binding::unbind`] says what went wrong, and
/// [`Binding::keep`] has the block keep it.
///
/// It names this very binding: when the VM is made anew ([`Vm::detach`](crate::Vm::detach)) that has ended,
/// and nothing happens any more, whatever is bound there by then. It keeps no block.
///
/// Dropping it waits for conversions of these pages: not in a call of a [`Listener`](crate::Listener).
#[derive(Debug)]
#[must_use = "the binding ends when this is dropped: keep it, or let the block keep it"]
pub struct Binding {
    block: Weak<Block>,
    id: u64,
    offsets: Span<Offset>,
    gpas: Span<Gpa>,
}

impl Binding {
    /// Which part of the block.
    pub fn offsets(&self) -> Span<Offset> {
        self.offsets
    }

    /// Where the guest sees it.
    pub fn gpas(&self) -> Span<Gpa> {
        self.gpas
    }

    /// Ends it, as [`Block::unbind`] does. Where it has ended already, nothing happens.
    ///
    /// # Errors
    /// The errno of KVM_SET_MEMORY_ATTRIBUTES, and then it has ended all the same, as there.
    pub fn unbind(mut self) -> Result<()> {
        self.end()
    }

    /// It goes on without this: until [`Block::unbind`], or the block's end.
    pub fn keep(mut self) {
        self.block = Weak::new();
    }

    fn end(&mut self) -> Result<()> {
        match std::mem::take(&mut self.block).upgrade() {
            Some(block) => block
                .end_binding(self.offsets, self.gpas, Some(self.id))
                .map(drop),
            None => Ok(()),
        }
    }
}

impl Drop for Binding {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            limited!(error, "{error}");
        }
    }
}

impl Block {
    /// Shows `size` bytes of the block from `offset` on at `gpa`, and tells the kernel their
    /// attributes (KVM_SET_MEMORY_ATTRIBUTES; in place it knows them by the file). Their memory
    /// slot may exist or follow: KVM keeps attributes by address. Waits for conversions of these
    /// pages, and for who binds or unbinds at these addresses.
    ///
    /// # In Rust
    /// Until what this returns is dropped.
    ///
    /// # Errors
    /// - EBUSY: the VM is detached, or at its end.
    /// - EINVAL: the range is empty, not page aligned, wraps, or is not in the block.
    /// - EEXIST: an address or an offset is bound already.
    /// - Another errno is that of KVM_SET_MEMORY_ATTRIBUTES, also for what an earlier binding has
    ///   left private at these addresses.
    ///
    /// Nothing is bound then, and the addresses are shared for the kernel, or will be when they are
    /// bound next.
    pub fn bind(self: &Arc<Self>, offset: u64, size: u64, gpa: u64) -> Result<Binding> {
        let offsets = self.span_of(offset, size)?;
        let gpas = self.gpas(gpa, size)?;
        let _ranges = self.lock_binding(offsets, gpas);
        let machine = &self.core.machine;
        machine.check_attached()?;
        // Who finds it before the VM has been told wants its range first.
        let (number, name) = (self.core.number, &self.core.name);
        let named = (Arc::downgrade(self), number);
        let id = self.vm_bindings.lock().insert(named, name, offsets, gpas)?;
        self.warn_of_small_mappings(offsets, gpas);
        if let Err(error) = self.tell_bound(offsets, gpas) {
            self.vm_bindings.lock().remove(gpas.start());
            return Err(error);
        }
        self.bindings.fetch_add(1, Ordering::Relaxed);
        Ok(Binding {
            block: Arc::downgrade(self),
            id,
            offsets,
            gpas,
        })
    }

    /// Tells the VM what attributes a new binding has. On failure its addresses are shared, or noted.
    fn tell_bound(&self, offsets: Span<Offset>, gpas: Span<Gpa>) -> Result<()> {
        // What an earlier binding could not take back is none of this one's.
        let left = self.vm_bindings.lock().left_private(gpas);
        for left in left {
            self.share_in_vm(left)?;
        }
        let mut at = offsets.first();
        let private = |at| {
            let attributes = self.attributes();
            attributes.first_run(at, offsets.end(), Attribute::Private)
        };
        while let Some(run) = private(at) {
            let run_gpas = offsets.translate(&run, gpas.start());
            if let Err(error) = self.tell_vm(run_gpas, Attribute::Private) {
                if at > offsets.first() {
                    self.forget_in_vm(gpas);
                }
                return Err(error);
            }
            at = run.end();
        }
        Ok(())
    }

    /// KVM maps a huge page as one where file and guest address are aligned alike.
    fn warn_of_small_mappings(&self, offsets: Span<Offset>, gpas: Span<Gpa>) {
        let page = match (self.backing(), self.core.planes.huge_page()) {
            (Backing::InPlace, Some(page)) => page,
            _ => return,
        };
        if (offsets.first() ^ gpas.first()) & (page - 1) != 0 {
            limited!(
                warn,
                "{}: {offsets} is bound at {gpas}, which is not aligned to {page:#x} bytes as the \
                 offset is: the guest's private memory there is mapped by 4 KiB pages",
                self.core.name
            );
        }
    }

    /// Ends a binding, given exactly as it was made. For the kernel its addresses are shared
    /// afterwards, so its memory slot has to be gone: a vCPU would find shared memory where it left
    /// a private page. Waits for conversions of these pages, and for who binds or unbinds at these
    /// addresses.
    ///
    /// # Errors
    /// - EINVAL: there is no such binding.
    /// - Another errno is that of KVM_SET_MEMORY_ATTRIBUTES. The binding has ended all the same,
    ///   but the kernel holds its addresses for private, and a vCPU finds no memory there, until
    ///   some are bound again: that makes them shared before all else, or fails.
    pub fn unbind(&self, offset: u64, size: u64, gpa: u64) -> Result<()> {
        let offsets = self.span_of(offset, size)?;
        let gpas = self.gpas(gpa, size)?;
        match self.end_binding(offsets, gpas, None)? {
            true => Ok(()),
            false => {
                let what = format!("{offsets} isn't bound at {gpas}");
                Err(Error::invalid(what).of(self.name()))
            }
        }
    }

    /// Ends what is bound there, if it has this name or none is asked for. Whether it was.
    fn end_binding(&self, offsets: Span<Offset>, gpas: Span<Gpa>, id: Option<u64>) -> Result<bool> {
        let _ranges = self.lock_binding(offsets, gpas);
        let number = self.core.number;
        let found = self.vm_bindings.lock().find(number, offsets, gpas.start());
        if found.is_none() || id.is_some_and(|id| found != Some(id)) {
            return Ok(false);
        }
        self.vm_bindings.lock().remove(gpas.start());
        self.bindings.fetch_sub(1, Ordering::Relaxed);
        if self.attributes().has_private(offsets) {
            self.share_in_vm(gpas)?;
        }
        Ok(true)
    }

    /// Locks what a binding has on either side: its pages against conversions, and its addresses
    /// against who binds or unbinds another block there, of which the VM must hear one after the other.
    fn lock_binding(&self, offsets: Span<Offset>, gpas: Span<Gpa>) -> RangeGuard<'_> {
        let pages = (self.core.number, self.core.lock_hull(offsets));
        self.core.machine.ranges.lock(vec![pages, addresses(gpas)])
    }

    /// Makes addresses without a binding shared for the VM. Should that fail, it is made up for when
    /// they are bound again.
    /// The caller has the addresses locked.
    fn share_in_vm(&self, gpas: Span<Gpa>) -> Result<()> {
        let told = self.tell_vm(gpas, Attribute::Shared);
        let mut bindings = self.vm_bindings.lock();
        match told {
            Ok(()) => bindings.are_shared(gpas),
            Err(_) => bindings.leave_private(gpas),
        }
        told
    }

    /// The same, for who has no error to give.
    fn forget_in_vm(&self, gpas: Span<Gpa>) {
        if let Err(error) = self.share_in_vm(gpas) {
            limited!(
                error,
                "{error}: the kernel keeps attributes for addresses that nothing is bound at"
            );
        }
    }

    /// Ends all that are left: nobody has a page of the block locked any more.
    pub(super) fn unbind_all(&self) {
        let _kept = self.core.machine.keep();
        let bound = self.vm_bindings.lock().of_block(self.core.number);
        for (offsets, gpas) in bound {
            let _range = self.core.machine.ranges.lock(addresses(gpas));
            self.vm_bindings.lock().remove(gpas.start());
            if self.attributes().has_private(offsets) {
                self.forget_in_vm(gpas);
            }
        }
    }

    fn gpas(&self, gpa: u64, size: u64) -> Result<Span<Gpa>> {
        Span::new(Gpa(gpa), size).ok_or_else(|| {
            let flaw = Span::<Gpa>::flaw(gpa, size);
            let what = format!("{size:#x} bytes can't be bound at gpa {gpa:#x}: they {flaw}");
            Error::invalid(what).of(self.name())
        })
    }
}
