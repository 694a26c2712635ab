// SPDX-License-Identifier: MIT OR Apache-2.0
//! Where a block's bytes live.
//!
//! *In-place*: one guest_memfd, mapped here, holds every page. *Split*: a memfd, mapped here, holds
//! the shared pages and a guest_memfd without a mapping the private ones; a page has memory in one
//! of them at most (invariant 4).

mod preallocate;

use crate::attributes::Attribute;
use crate::error::{Doing, Result};
use crate::kernel::abi::{GUEST_MEMFD_FLAG_INIT_SHARED, GUEST_MEMFD_FLAG_MMAP};
use crate::kernel::{Kernel, Mapping};
use crate::units::{Offset, Span};
use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

pub(crate) use preallocate::preallocate;

/// How a block's two halves are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    /// One guest_memfd for everything. On Linux 7.3 every page of it is shared for good.
    InPlace,
    /// A memfd for shared pages, a guest_memfd for private ones.
    Split,
}

impl fmt::Display for Backing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Backing::InPlace => "in-place",
            Backing::Split => "split",
        })
    }
}

/// The files of a block, and the mapping of its shared bytes.
#[derive(Debug)]
pub(crate) struct Planes {
    kernel: Arc<dyn Kernel>,
    /// Before the files, so that it is unmapped before they are closed.
    mapping: Mapping,
    shared: OwnedFd,
    /// Split only: in-place keeps both halves in `shared`.
    private: Option<OwnedFd>,
    block: Span<Offset>,
}

impl Planes {
    /// Creates the files for `block` bytes of guest memory. What fails leaves nothing behind.
    pub(crate) fn new(
        kernel: Arc<dyn Kernel>,
        vm: BorrowedFd,
        backing: Backing,
        name: &str,
        block: Span<Offset>,
    ) -> Result<Self> {
        let size = block.size_bytes();
        let guest_memfd = |flags| {
            kernel.create_guest_memfd(vm, size, flags).doing(|| {
                format!("{name}: creating a guest_memfd of {size:#x} bytes, flags {flags:#x}")
            })
        };
        let (shared, private) = match backing {
            Backing::InPlace => (
                guest_memfd(GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED)?,
                None,
            ),
            // No MMAP flag: it would make the slot gmem-only, and the guest's shared accesses would
            // never reach the memfd (kvm_gmem_get_pfn is used for all of a slot whose file has it).
            Backing::Split => {
                let private = guest_memfd(0)?;
                let shared = kernel
                    .create_memfd(name, size)
                    .doing(|| format!("{name}: creating a memfd of {size:#x} bytes"))?;
                (shared, Some(private))
            }
        };
        let mapping = kernel
            .map(shared.as_fd(), size)
            .doing(|| format!("{name}: mapping its {size:#x} shared bytes"))?;
        Ok(Self {
            kernel,
            mapping,
            shared,
            private,
            block,
        })
    }

    pub(crate) fn backing(&self) -> Backing {
        match self.private {
            None => Backing::InPlace,
            Some(_) => Backing::Split,
        }
    }

    pub(crate) fn mapping(&self) -> &Mapping {
        &self.mapping
    }

    /// All offsets.
    pub(crate) fn block(&self) -> Span<Offset> {
        self.block
    }

    /// The file with the bytes of pages that have `attribute`.
    pub(crate) fn file(&self, attribute: Attribute) -> BorrowedFd<'_> {
        match (attribute, &self.private) {
            (Attribute::Private, Some(private)) => private.as_fd(),
            _ => self.shared.as_fd(),
        }
    }

    /// Gives every page of `span` memory in the plane of `attribute`.
    pub(crate) fn allocate(&self, span: Span<Offset>, attribute: Attribute) -> Result<()> {
        self.kernel
            .allocate(self.file(attribute), span)
            .doing(|| format!("reserving {} memory for {span}", attribute.name()))
    }

    /// Frees what `span` holds in the plane of `attribute`. Split only: in-place both attributes
    /// share the bytes.
    pub(crate) fn release(&self, span: Span<Offset>, attribute: Attribute) -> Result<()> {
        debug_assert_eq!(self.backing(), Backing::Split);
        self.kernel
            .punch_hole(self.file(attribute), span)
            .doing(|| format!("releasing {} memory of {span}", attribute.name()))
    }
}
