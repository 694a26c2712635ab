// SPDX-License-Identifier: MIT OR Apache-2.0
//! Bytes that must be gone before anybody but the guest can see them.

use super::Block;
use crate::attributes::Attribute;
use crate::backoff::Backoff;
use crate::error::Result;
use crate::units::{Offset, Span};

impl Block {
    /// Takes the bytes of private pages away, in place, where they would be seen once the pages are
    /// shared. The pages stay private, and no vCPU runs that could write new ones. Of huge pages go
    /// all that have a part in `span`, with the bytes of their shared pages, which devices lose for a
    /// moment: they would keep the old memory.
    ///
    /// The caller has the hull locked. On failure bytes may be gone, or devices may miss shared pages
    /// of a huge page, which are quarantined then.
    pub(crate) fn erase(&self, span: Span<Offset>) -> Result<()> {
        let pages = self.core.planes.pages_around(span, Attribute::Private);
        if pages == span {
            return self.punch(span);
        }
        let erased = self
            .windows
            .withdraw(pages)
            .and_then(|()| self.punch(pages));
        erased.and(self.windows.try_readmit(pages))
    }

    fn punch(&self, pages: Span<Offset>) -> Result<()> {
        // A huge page is put together first, which waits for who refers to a part of it.
        let mut backoff = Backoff::default();
        loop {
            match self.core.planes.discard(pages, Attribute::Private) {
                Err(error) if error.errno() == libc::EAGAIN && backoff.wait() => {
                    self.core.counters.retries.add(1);
                }
                Ok(()) if self.core.planes.must_allocate_initially(Attribute::Shared) => {
                    return self.core.planes.allocate(pages, Attribute::Private);
                }
                done => return done,
            }
        }
    }
}
