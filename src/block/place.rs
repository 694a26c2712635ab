// SPDX-License-Identifier: MIT OR Apache-2.0
//! Bytes that the VMM puts into guest memory before the guest runs: firmware, kernels, tables.

use super::pages::Closed;
use super::Block;
use crate::attributes::Attribute;
use crate::error::{Error, Result};
use crate::plane::Backing;
use crate::units::{pages_around, Offset, Span};

impl Block {
    /// Copies bytes to `offset`, for what a guest finds in memory at its start: firmware, a kernel.
    /// Pages that have a part in it have memory afterwards, and the attribute that they had before:
    /// in place, private ones are shared for the copy, by a conversion that devices and listeners
    /// don't see. What the guest then finds in these is for the VM's type to say, also in the rest
    /// of a page that is written in part: launch commands (SNP, TDX) take the page as it is and
    /// encrypt it. No vCPU may run. Waits for conversions of these pages.
    ///
    /// # Errors
    /// - EBUSY: the VM is detached or at its end, or a rebuild of it could not map the memory
    ///   again.
    /// - EINVAL: no bytes, or not in the block.
    /// - ENOTSUP: private pages of a split block, which the VMM can't reach.
    /// - EIO: a page is poisoned.
    /// - ENOMEM, ENOSPC: there is no memory.
    /// - Another errno is the kernel's, which refused to share a page.
    ///
    /// Nothing is copied then, and all attributes are as before. If the kernel refuses to make a
    /// page private again (EAGAIN: somebody holds it), the bytes are there, and the page is shared
    /// and quarantined.
    ///
    /// # Example
    /// ```
    /// # use gmem::kernel::fake::{FakeKernel, VmKind};
    /// # fn main() -> gmem::Result<()> {
    /// # let file = std::fs::File::open("/dev/null").unwrap();
    /// # let kernel = std::sync::Arc::new(FakeKernel::new(VmKind::InPlace));
    /// # let vm = gmem::Vm::with_kernel(kernel.clone(), &file)?;
    /// use gmem::{Attribute, Block, BlockConfig};
    /// let ram = Block::new(&vm, &BlockConfig::confidential("ram", 1 << 20, Attribute::Private))?;
    /// ram.place(0xf0000, b"what the guest is to find")?;
    /// assert_eq!(ram.run_at(0xf0000)?.0, Attribute::Private);
    /// # Ok(()) }
    /// ```
    pub fn place(&self, offset: u64, data: &[u8]) -> Result<()> {
        let pages = self.pages_of(offset, data.len() as u64)?;
        let _range = self.core.lock(pages);
        self.core.machine.check_attached()?;
        self.check_open()?;
        self.check_sound(pages)?;
        let private = self.attributes().runs(pages, Attribute::Private);
        if !private.is_empty() && self.backing() == Backing::Split {
            return Err(Error::unsupported(format!(
                "{pages} has private pages, whose bytes in a split block only the guest can write"
            ))
            .of(&self.core.name)
            .with_remedy(
                "have them measured and copied by the VM's launch commands, or start with initial=shared",
            ));
        }
        // An access that finds no memory would end in SIGBUS.
        self.core.planes.allocate(pages, Attribute::Shared)?;
        for (shared, &run) in private.iter().enumerate() {
            if let Err(error) = self.tell_file(run, Attribute::Shared) {
                return Err(self
                    .make_private_again(&private[..shared])
                    .err()
                    .unwrap_or(error));
            }
        }
        self.core.planes.mapping().write(offset, data);
        self.make_private_again(&private)
    }

    /// Refuses to touch addresses without memory: who rebuilt the VM failed, and could not map it again.
    pub(super) fn check_open(&self) -> Result<()> {
        match self.core.pages.closed() {
            Closed::All => Err(self.not_shown_again()),
            _ => Ok(()),
        }
    }

    pub(super) fn not_shown_again(&self) -> Error {
        Error::busy("its memory could not be mapped again when the VM was to be rebuilt")
            .of(&self.core.name)
            .with_remedy("rebuild the VM")
    }

    /// Makes what was shared for a moment private again. No window has it.
    fn make_private_again(&self, runs: &[Span<Offset>]) -> Result<()> {
        let mut result = Ok(());
        for &run in runs {
            let closed = self.tell_file(run, Attribute::Private);
            if closed.is_err() {
                self.windows.quarantine(run);
            }
            result = result.and(closed);
        }
        result
    }

    /// The pages that `size` bytes at `offset` have a part in, or EINVAL.
    pub(crate) fn pages_of(&self, offset: u64, size: u64) -> Result<Span<Offset>> {
        pages_around(offset, size)
            .filter(|pages| self.core.span.contains(pages))
            .ok_or_else(|| self.not_in_it(offset, size))
    }
}
