// SPDX-License-Identifier: MIT OR Apache-2.0
//! Which part of a block devices see, and at which IOVAs: the arithmetic of windows, without a call.
//!
//! Invariant: all IOVAs of a view lie in the address space, and differ from its offsets by one number. So what
//! two views that [agree](View::agrees) show of a block is at the same IOVAs, and an IOVA names an offset for the
//! life of a window, however that is reshaped.

use crate::error::{Error, Result};
use crate::kernel::DeviceAccess;
use crate::units::{Iova, Offset, Span};

/// Where a window is to be.
#[derive(Clone, Copy, Debug)]
pub struct WindowConfig {
    /// The id of the IOAS in the iommufd. A device must be attached already: without one the kernel maps
    /// lazily, and refusals come when it is too late to act on them.
    ///
    /// It has to outlive the window: the kernel gives the id of an IOAS that is destroyed to the
    /// next one, and guest memory would go to the devices of that. So remove the window first. If
    /// that comes too late it is still well, as long as the id is nobody's.
    pub ioas_id: u32,
    /// First byte of the block that the window shows.
    pub offset: u64,
    /// Its length in bytes.
    pub length: u64,
    /// Where devices see it. All addresses of the window are its own, also where nothing is mapped because a page
    /// is private: one unmap may go across these.
    pub iova: u64,
    /// Devices may read only.
    pub readonly: bool,
}

impl WindowConfig {
    /// The part of `block` that it names. EINVAL if that makes no sense.
    pub(crate) fn span_in(&self, block: Span<Offset>) -> Result<Span<Offset>> {
        Ok(View::of(self, block)?.span)
    }

    /// What devices may do there.
    pub(super) fn access(&self) -> DeviceAccess {
        match self.readonly {
            true => DeviceAccess::Read,
            false => DeviceAccess::ReadWrite,
        }
    }
}

/// Which part of the block devices see, and where.
#[derive(Clone, Copy, Debug)]
pub(super) struct View {
    pub(super) span: Span<Offset>,
    pub(super) iova: Iova,
}

impl View {
    pub(super) fn of(config: &WindowConfig, block: Span<Offset>) -> Result<Self> {
        let span = Span::new(Offset(config.offset), config.length)
            .filter(|span| block.contains(span))
            .ok_or_else(|| {
                Error::invalid(format!(
                    "a DMA window of {:#x} bytes at offset {:#x} is empty, not page aligned, or \
                     not in the block",
                    config.length, config.offset
                ))
            })?;
        if Span::new(Iova(config.iova), config.length).is_none() {
            return Err(Error::invalid(format!(
                "a DMA window of {:#x} bytes can't be at iova {:#x}",
                config.length, config.iova
            )));
        }
        Ok(Self {
            span,
            iova: Iova(config.iova),
        })
    }

    pub(super) fn all_iovas(&self) -> Span<Iova> {
        self.span.translate(&self.span, self.iova)
    }

    pub(super) fn iovas(&self, span: Span<Offset>) -> Option<Span<Iova>> {
        let part = self.span.intersection(&span)?;
        Some(self.span.translate(&part, self.iova))
    }

    /// What to add to an offset for its IOVA.
    pub(super) fn shift(&self) -> u64 {
        self.iova.0.wrapping_sub(self.span.first())
    }

    /// Whether what both show is at the same IOVAs.
    pub(super) fn agrees(&self, other: &Self) -> bool {
        self.shift() == other.shift()
    }

    /// Both, and what lies between them.
    pub(super) fn hull(&self, other: &Self) -> Self {
        let start = self.span.first().min(other.span.first());
        let end = self.span.end().max(other.span.end());
        Self {
            span: Span::between(start, end),
            iova: Iova(self.iova.0.min(other.iova.0)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: u64 = 4096;
    const BLOCK: u64 = 16;

    fn pages(first: u64, end: u64) -> Span<Offset> {
        Span::between(first * PAGE, end * PAGE)
    }

    fn config(offset: u64, length: u64, iova: u64) -> WindowConfig {
        WindowConfig {
            ioas_id: 0,
            offset,
            length,
            iova,
            readonly: false,
        }
    }

    /// Pages `first` to `end`, such that the block's first page would be at `base`.
    fn view(first: u64, end: u64, base: u64) -> View {
        let config = config(first * PAGE, (end - first) * PAGE, base + first * PAGE);
        View::of(&config, pages(0, BLOCK)).unwrap()
    }

    #[test]
    fn a_view_is_of_whole_pages_of_the_block_and_of_the_address_space() {
        let last = u64::MAX - PAGE + 1;
        for (offset, length, iova) in [
            (0, 0, 0),
            (0, PAGE + 1, 0),
            (1, PAGE, 0),
            (0, PAGE, 1),
            (15 * PAGE, 2 * PAGE, 0),
            (0, u64::MAX, 0),
            (0, PAGE, last),
            (0, 2 * PAGE, last),
        ] {
            let error = View::of(&config(offset, length, iova), pages(0, BLOCK)).unwrap_err();
            assert_eq!(
                error.errno(),
                libc::EINVAL,
                "{offset:#x} {length:#x} {iova:#x}"
            );
        }
    }

    #[test]
    fn a_view_shows_what_lies_in_it_and_nothing_else() {
        let view = view(4, 8, 1 << 30);
        let iovas = |first, end| view.iovas(pages(first, end)).map(|iovas| iovas.first());
        assert_eq!(iovas(0, 16), Some((1 << 30) + 4 * PAGE));
        assert_eq!(iovas(7, 9), Some((1 << 30) + 7 * PAGE));
        assert_eq!((iovas(0, 4), iovas(8, 16)), (None, None));
        assert_eq!(view.all_iovas().size_bytes(), 4 * PAGE);
    }

    #[test]
    fn views_agree_whose_offsets_have_the_same_iovas_also_below_themselves() {
        // Page 4 at IOVA 0: the block's first page would be below the address space.
        let low = View::of(&config(4 * PAGE, PAGE, 0), pages(0, BLOCK)).unwrap();
        let next = View::of(&config(5 * PAGE, PAGE, PAGE), pages(0, BLOCK)).unwrap();
        assert!(low.agrees(&next));
        assert!(!low.agrees(&view(5, 6, 0)));
        let hull = low.hull(&next);
        assert_eq!((hull.span, hull.iova), (pages(4, 6), Iova(0)));
        assert_eq!(hull.shift(), low.shift());
    }

    #[test]
    fn the_hull_of_views_has_what_lies_between_them() {
        let hull = view(2, 4, 1 << 20).hull(&view(6, 7, 1 << 20));
        assert_eq!(hull.span, pages(2, 7));
        assert!(hull.agrees(&view(0, 1, 1 << 20)));
    }
}
