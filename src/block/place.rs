// SPDX-License-Identifier: MIT OR Apache-2.0
//! Bytes that the VMM puts into guest memory before the guest runs: firmware, kernels, tables.

use super::Block;
use crate::attributes::Attribute;
use crate::error::{Error, Result};
use crate::units::{pages_around, Offset, Span};

impl Block {
    /// Copies `data` to `offset`. Pages that have a part in it have memory afterwards, and the
    /// attribute that they had before. No vCPU may run. Waits for conversions of that range.
    ///
    /// # Errors
    /// EINVAL if it isn't in the block; EBUSY while the VM is detached; EIO for poisoned pages; ENOTSUP
    /// for private pages of a split block, which the VMM can't reach. ENOMEM or ENOSPC if there is no
    /// memory. Nothing is copied then.
    pub fn place(&self, offset: u64, data: &[u8]) -> Result<()> {
        let pages = self.pages_of(offset, data.len() as u64)?;
        let _range = self.vm.ranges.lock((self.number, self.lock_hull(pages)));
        self.vm.check_attached()?;
        self.check_sound(pages)?;
        if self.attributes().has_private(pages) {
            return Err(Error::Unsupported(format!(
                "{}: {pages} has private pages, which only the guest can write in a {} block: make \
                 them shared first, or let the VM's launch commands measure and copy them",
                self.name,
                self.backing()
            )));
        }
        // An access that finds no memory would end in SIGBUS.
        self.planes.allocate(pages, Attribute::Shared)?;
        self.planes.mapping().write(offset, data);
        Ok(())
    }
    /// The pages that `size` bytes at `offset` have a part in, or EINVAL.
    pub(crate) fn pages_of(&self, offset: u64, size: u64) -> Result<Span<Offset>> {
        pages_around(offset, size)
            .filter(|pages| self.span.contains(pages))
            .ok_or_else(|| self.not_in_it(offset, size))
    }
}
