// SPDX-License-Identifier: MIT OR Apache-2.0
//! Memory of a split block's planes that pages come to: what is kept for them comes back, or new memory is
//! allocated.

use super::Block;
use crate::attributes::Attribute;
use crate::error::Result;
use crate::plane::{Back, Which};
use crate::units::{Offset, Span};

impl Block {
    /// Frees at once the memory that pages have left and that is kept for a while, of both planes:
    /// see [`BlockConfig::release_delay`](crate::BlockConfig::release_delay). What can't be freed
    /// is logged, and counted
    /// ([`BlockStats::release_failures`](crate::BlockStats::release_failures)). Waits for
    /// conversions where it is, so not in a call of a listener; takes no other lock, and needs none of
    /// its caller's.
    pub fn release_pending(&self) {
        self.releaser.release_all(Which::All, None);
    }

    /// Makes `span` have memory in the plane of `attribute`, which it is about to get: what is kept for
    /// it there comes back, and else, if it is `wanted` before somebody touches it, new memory is
    /// allocated. The caller has the hull locked.
    pub(crate) fn populate(
        &self,
        span: Span<Offset>,
        attribute: Attribute,
        wanted: bool,
    ) -> Result<()> {
        let planes = &self.core.planes;
        if planes.may_keep(attribute) {
            let back = planes.take_back(planes.allocated_for(span, attribute), attribute);
            if back != Back::Gone {
                self.core.counters.releases_cancelled.add(1);
            }
            if back == Back::There && attribute == Attribute::Shared {
                return Ok(());
            }
        }
        if !wanted || self.huge_page_is_there(span, attribute) {
            return Ok(());
        }
        let allocate = || {
            // Pinning allocates: one walk over the pages instead of two.
            match attribute == Attribute::Shared
                && planes.pinning_allocates()
                && self.windows.pins(span)
            {
                true => planes.allocate_huge(span),
                false => planes.allocate(span, attribute),
            }
        };
        self.core.machine.relieved(allocate)
    }

    /// Whether it has a huge page that stays as long as any page of it is shared, and one is.
    fn huge_page_is_there(&self, span: Span<Offset>, attribute: Attribute) -> bool {
        if attribute == Attribute::Private {
            return false;
        }
        let Some(page) = self.core.planes.promised_page() else {
            return false;
        };
        let hull = span.hull(page);
        // One that was lost and could not be replaced is gone, whoever else has a page of it.
        let sound = || self.core.pages.sound_parts(hull).as_slice() == [hull];
        hull.size_bytes() == page && !self.attributes().is_private(hull) && sound()
    }
}
