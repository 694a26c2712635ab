// SPDX-License-Identifier: MIT OR Apache-2.0
//! Memory that the guest says it can do without: a balloon, pages that it reports free.

use super::Block;
use crate::attributes::Attribute;
use crate::error::{Cause, Error, Result};
use crate::plane::Backing;
use crate::range_locks::RangeGuard;
use crate::run_set::{RunSet, Spans};
use crate::units::{Offset, Span, PAGE_SIZE};

/// Conversions wait for one piece, not for all of it. Of huge pages that are larger, one is a piece.
const PIECE: u64 = 64 << 20;

/// A guest chooses the range, and the VMM's main loop waits: so much is zeroed for nothing, and no more.
const MOST_ZEROED: u64 = 32 << 20;

impl Block {
    /// Gives the memory of `size` bytes at `offset`, whole pages, back to the host, as when a guest
    /// inflates a balloon or reports pages free. They keep their attributes, and whoever touches
    /// one next gets new memory. Shared pages read zero on return. What a guest finds in a private
    /// one is for the VM's type to say: zeros on KVM_X86_SW_PROTECTED_VM; on TDX and SNP the page
    /// must be accepted or validated anew, so only a guest that does so may be offered this.
    ///
    /// Huge pages from a pool go as a whole, and those of a split block only where nobody was
    /// promised that a shared page has its memory (see
    /// [`BlockConfig::reserve`](crate::BlockConfig::reserve)); other shared pages are zeroed and
    /// keep it. In place they stay set aside for the block, and shared pages of one that does not
    /// go as a whole have memory afterwards. Under a NUMA policy, new private memory comes from
    /// where the vCPU's own policy says.
    ///
    /// Nothing that a device has mapped is discarded: it would go on with the old memory, or,
    /// mapped anew, have new memory at once, for nothing. Who else has pages pinned keeps the old
    /// ones: the VMM must not discard beside those. Listeners are not told.
    ///
    /// It works in pieces of 64 MiB, or of one huge page if that is larger, and waits for
    /// conversions in each, widened to whole huge pages and DMA units: what converts elsewhere
    /// meanwhile does not wait, and before and after each piece all is as the books say. Zeroing
    /// frees nothing and takes its time, for which the VMM's main loop may have to wait, so no more
    /// than 32 MiB are zeroed: a range in which that is not enough is refused.
    ///
    /// # Errors
    /// - EBUSY: the VM is detached or at its end, or a DMA window maps a page of the range.
    /// - EINVAL: the range is empty, not page aligned, or not in the block.
    /// - EIO: a page is poisoned.
    /// - ENOSPC: more than 32 MiB would have to be zeroed: ask for less, or for whole huge pages.
    /// - Another errno is that of fallocate(2).
    ///
    /// Nothing has happened then, unless it came to that between two pieces, or in one: parts of
    /// the range may be gone, attributes are as before, and it may be asked for again.
    pub fn discard(&self, offset: u64, size: u64) -> Result<()> {
        let span = self.span_of(offset, size)?;
        {
            let _range = self.lock_to_discard(span)?;
            let zeroed = self.only_zeroed(span).iter().map(Span::size_bytes).sum();
            self.check_zeroed(span, zeroed)?;
        }
        let mut zeroed = 0;
        let unit = PIECE.max(self.core.planes.pool_page().unwrap_or(PAGE_SIZE));
        let pieces = span.hull(unit).chunks(unit);
        for piece in pieces.filter_map(|piece| piece.intersection(&span)) {
            let _range = self.lock_to_discard(piece)?;
            let to_zero = self.only_zeroed(piece);
            zeroed += to_zero.iter().map(Span::size_bytes).sum::<u64>();
            // What was private a moment ago may be shared by now.
            self.check_zeroed(span, zeroed)?;
            self.discard_piece(piece, &to_zero)?;
        }
        Ok(())
    }

    /// Locks a range and finds nothing in it that must not go.
    fn lock_to_discard(&self, span: Span<Offset>) -> Result<RangeGuard<'_>> {
        let range = self.core.lock(span);
        self.core.machine.check_attached()?;
        self.check_sound(span)?;
        self.check_unmapped(span)?;
        Ok(range)
    }

    /// The shared parts of `span` that keep their memory, by huge pages of a pool that are there to
    /// stay or don't go as a whole.
    fn only_zeroed(&self, span: Span<Offset>) -> Spans<Offset> {
        let attributes = self.attributes();
        let shared = |part| attributes.runs(part, Attribute::Shared);
        match (self.backing(), self.core.planes.pool_page()) {
            (Backing::InPlace, Some(page)) => {
                let parts = parts_of_pages(span, page);
                parts.into_iter().flat_map(shared).collect()
            }
            (Backing::Split, Some(_)) if self.core.planes.promised_page().is_some() => shared(span),
            // A hole in a part of a huge page makes zeros of it, whatever else the page is.
            (Backing::Split, Some(page)) => {
                let runs = shared(span).into_iter();
                runs.flat_map(|run| parts_of_pages(run, page)).collect()
            }
            _ => Spans::new(),
        }
    }

    fn check_zeroed(&self, span: Span<Offset>, bytes: u64) -> Result<()> {
        match bytes > MOST_ZEROED {
            false => Ok(()),
            true => {
                let most = MOST_ZEROED;
                let cause = Cause::MaxZeroed { bytes, most };
                Err(Error::new(cause, format!("discarding {span}"))
                    .of(&self.core.name)
                    .with_remedy("discard smaller ranges, or whole huge pages"))
            }
        }
    }

    /// The caller has it locked, and nothing in it must stay.
    fn discard_piece(&self, span: Span<Offset>, to_zero: &[Span<Offset>]) -> Result<()> {
        match (self.backing(), self.core.planes.pool_page()) {
            (Backing::InPlace, None) => self.core.planes.discard(span, Attribute::Shared),
            (Backing::InPlace, Some(page)) => self.discard_huge_in_place(span, page, to_zero),
            (Backing::Split, _) => self.discard_split(span),
        }
    }

    /// Refuses pages that a device reaches, or may.
    pub(super) fn check_unmapped(&self, span: Span<Offset>) -> Result<()> {
        match self.windows.maps(span) {
            false => Ok(()),
            true => Err(Error::busy(format!(
                "a device has pages of {span} mapped, whose memory can't be given back"
            ))
            .of(&self.core.name)),
        }
    }

    fn discard_split(&self, span: Span<Offset>) -> Result<()> {
        // What is kept behind the pages is the host's, too.
        self.releaser.release_kept(span)?;
        for attribute in [Attribute::Private, Attribute::Shared] {
            let runs = self.attributes().runs(span, attribute);
            for run in runs {
                match (attribute, self.core.planes.promised_page()) {
                    (Attribute::Shared, Some(page)) => self.zero_and_keep(run, page)?,
                    _ => self.core.planes.discard(run, attribute)?,
                }
            }
        }
        Ok(())
    }

    /// Holes that have no huge page as a whole: the kernel zeroes these parts and frees nothing.
    fn zero_and_keep(&self, run: Span<Offset>, page: u64) -> Result<()> {
        let halves = run.hull(page).chunks(page / 2);
        let mut parts = halves.filter_map(|half| half.intersection(&run));
        parts.try_for_each(|part| self.core.planes.discard(part, Attribute::Shared))
    }

    /// The kernel takes whole huge pages only. Of others, what is shared is mapped here by small pages.
    fn discard_huge_in_place(
        &self,
        span: Span<Offset>,
        page: u64,
        to_zero: &[Span<Offset>],
    ) -> Result<()> {
        const ZEROES: [u8; PAGE_SIZE as usize] = [0; PAGE_SIZE as usize];
        if let Some(whole) = span.whole(page) {
            self.core.planes.discard(whole, Attribute::Shared)?;
        }
        if !to_zero.is_empty() {
            self.check_open()?;
        }
        for &run in to_zero {
            // An access that finds no memory would end in SIGBUS.
            self.core.planes.allocate(run, Attribute::Shared)?;
            for at in run.chunks(PAGE_SIZE) {
                self.core.planes.mapping().write(at.first(), &ZEROES);
            }
        }
        Ok(())
    }
}

/// What of `span` is not a page of that size as a whole.
fn parts_of_pages(span: Span<Offset>, page: u64) -> Spans<Offset> {
    let mut rest = RunSet::default();
    rest.insert(span);
    if let Some(whole) = span.whole(page) {
        rest.remove(whole);
    }
    rest.inside(span)
}
