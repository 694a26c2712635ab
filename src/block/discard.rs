// SPDX-License-Identifier: MIT OR Apache-2.0
//! Memory that the guest says it can do without: a balloon, pages that it reports free.

use super::Block;
use crate::attributes::Attribute;
use crate::error::{Error, Result};
use crate::plane::Backing;
use crate::run_set::RunSet;
use crate::units::{Offset, Span, PAGE_SIZE};

impl Block {
    /// Gives the memory of `size` bytes at `offset`, whole pages, back to the host. They keep their
    /// attributes, and whoever touches one next gets new memory. Shared pages read zero on return. What
    /// a guest finds in a private one is for the VM's type to say: zeros on KVM_X86_SW_PROTECTED_VM; on
    /// TDX and SNP the page must be accepted or validated anew, so only a guest that does so may be
    /// offered this.
    ///
    /// Huge pages from a pool go as a whole, and those of a split block only without `reserve`, which
    /// promises that a shared page has its memory; other shared pages are zeroed and keep it. In place
    /// they stay set aside for the block, and shared pages of one that does not go as a whole have memory
    /// afterwards. Under a NUMA policy, new private memory comes from where the vCPU's own policy says.
    ///
    /// Nothing that a device has mapped is discarded: it would go on with the old memory, or, mapped
    /// anew, have new memory at once, for nothing. Who else has pages pinned keeps the old ones:
    /// the VMM must not discard beside those. Waits for conversions in the range, widened to whole
    /// huge pages and DMA units. Listeners are not told.
    ///
    /// # Errors
    /// EINVAL for a range that is empty, not page aligned or not in the block. EBUSY while the VM is
    /// detached, and if a DMA window maps a page of it; EIO if one is poisoned: nothing has happened
    /// then. The errno of fallocate(2), when parts of the range may be gone; asking again is well.
    pub fn discard(&self, offset: u64, size: u64) -> Result<()> {
        let span = self.span_of(offset, size)?;
        let _range = self.vm.ranges.lock((self.number, self.lock_hull(span)));
        self.vm.check_attached()?;
        self.check_sound(span)?;
        self.check_unmapped(span)?;
        match (self.backing(), self.planes.pool_page()) {
            (Backing::InPlace, None) => self.planes.discard(span, Attribute::Shared),
            (Backing::InPlace, Some(page)) => self.discard_huge_in_place(span, page),
            (Backing::Split, _) => self.discard_split(span),
        }
    }

    /// Refuses pages that a device reaches, or may.
    pub(super) fn check_unmapped(&self, span: Span<Offset>) -> Result<()> {
        match self.windows().iter().any(|window| window.maps(span)) {
            false => Ok(()),
            true => Err(Error::Busy(format!(
                "{}: a device has pages of {span} mapped, whose memory can't be given back",
                self.name
            ))),
        }
    }

    fn discard_split(&self, span: Span<Offset>) -> Result<()> {
        for attribute in [Attribute::Private, Attribute::Shared] {
            let runs = self.attributes().runs(span, attribute);
            for run in runs {
                match (attribute, self.planes.promised_page()) {
                    (Attribute::Shared, Some(page)) => self.zero_and_keep(run, page)?,
                    _ => self.planes.discard(run, attribute)?,
                }
            }
        }
        Ok(())
    }

    /// Holes that have no huge page as a whole: the kernel zeroes these parts and frees nothing.
    fn zero_and_keep(&self, run: Span<Offset>, page: u64) -> Result<()> {
        let halves = run.hull(page).chunks(page / 2);
        let mut parts = halves.filter_map(|half| half.intersection(&run));
        parts.try_for_each(|part| self.planes.discard(part, Attribute::Shared))
    }

    /// The kernel takes whole huge pages only. Of others, what is shared is mapped here by small pages.
    fn discard_huge_in_place(&self, span: Span<Offset>, page: u64) -> Result<()> {
        const ZEROES: [u8; PAGE_SIZE as usize] = [0; PAGE_SIZE as usize];
        let whole = span.whole(page);
        if let Some(whole) = whole {
            self.planes.discard(whole, Attribute::Shared)?;
        }
        let mut rest = RunSet::default();
        rest.insert(span);
        if let Some(whole) = whole {
            rest.remove(whole);
        }
        for part in rest.inside(span) {
            let shared = self.attributes().runs(part, Attribute::Shared);
            for run in shared {
                // An access that finds no memory would end in SIGBUS.
                self.planes.allocate(run, Attribute::Shared)?;
                for at in run.chunks(PAGE_SIZE) {
                    self.planes.mapping().write(at.first(), &ZEROES);
                }
            }
        }
        Ok(())
    }
}
