// SPDX-License-Identifier: MIT OR Apache-2.0
//! Windows as their users see them: each call locks the pages that it is about, and has the
//! [`WindowSet`] do the rest.

use super::window_set::WindowSet;
use super::Block;
use crate::dma::{self, DmaPath, StrategyKind, WindowConfig};
use crate::error::{Error, Of, Result};
use crate::range_locks::RangeGuard;
use crate::run_set::{RunSet, Spans};
use crate::sync::{Arc, Instant};
use crate::throttle::limited;
use crate::units::{Offset, Span, PAGE_SIZE};
use std::os::fd::AsFd;
use std::time::Duration;

/// One IOAS and the range of IOVAs in it that shows part of a block.
///
/// # In Rust
/// Until this is dropped: devices reach nothing by it then. What could not be unmapped is logged, can't become
/// private, and is tried again from time to time, by the block's next window and by [`Block::check_unused`];
/// [`Window::remove`] says so to who can do something about it.
///
/// It keeps its block.
///
/// Dropping it waits for conversions of its part: not in a call of a [`Listener`](crate::Listener).
#[derive(Debug)]
#[must_use = "the window ends when this is dropped"]
pub struct Window {
    /// None once the block keeps it.
    block: Option<Arc<Block>>,
    inner: Arc<dma::Window>,
}

impl Window {
    /// The part of the block that it shows.
    pub fn span(&self) -> Span<Offset> {
        self.inner.span()
    }

    /// How mappings name memory: [`DmaPath::Auto`] until the first one.
    pub fn path(&self) -> DmaPath {
        self.inner.path()
    }

    /// In which areas it is mapped.
    pub fn strategy(&self) -> StrategyKind {
        self.inner.strategy()
    }

    /// Bytes that devices can reach through it, and the kernel areas that it takes.
    pub fn mapped(&self) -> (u64, u64) {
        self.inner.mapped()
    }

    /// Makes a window show another part of the block, as when a guest's address map changes around
    /// it. What both parts have in common stays mapped all the time and costs nothing, except where
    /// it is one kernel area with what goes. The new configuration has the same IOAS and access,
    /// and the same IOVA for each offset. Waits for conversions of
    /// what comes and what goes, and for who changes the same window.
    ///
    /// # Errors
    /// - EINVAL: it has ended, the configuration differs in more than the range, or the two parts
    ///   are apart.
    /// - Another errno is as with [`Block::add_window`].
    ///
    /// The window shows what it showed before then, or, if the kernel refused to unmap, both parts.
    /// What it can't show again is quarantined
    /// ([`BlockStats::bytes_quarantined`](crate::BlockStats::bytes_quarantined)) until it converts
    /// or is asked for, a window comes, goes or is reshaped there, the block is reset, or the VM's
    /// own attempts succeed.
    ///
    /// # Example
    /// ```
    /// # use gmem::kernel::fake::{FakeKernel, VmKind};
    /// # fn main() -> gmem::Result<()> {
    /// # let file = std::fs::File::open("/dev/null").unwrap();
    /// # let kernel = std::sync::Arc::new(FakeKernel::new(VmKind::Confidential));
    /// # let vm = gmem::Vm::with_kernel(kernel.clone(), &file)?;
    /// use gmem::{Attribute, Block, BlockConfig, WindowConfig};
    /// # let (iommufd, ioas_id) = (file, 1);
    /// # let ram = Block::new(&vm, &BlockConfig::confidential("ram", 1 << 20, Attribute::Shared))?;
    /// let all = WindowConfig { ioas_id, offset: 0, length: 1 << 20, iova: 0, readonly: false };
    /// let window = ram.add_window(&iommufd, &all)?;
    /// // The guest moves something over the upper half. It keeps its IOVAs, so the iova is that of the offset.
    /// window.reshape(&WindowConfig { length: 1 << 19, ..all })?;
    /// assert_eq!(window.span().size_bytes(), 1 << 19);
    /// window.remove()?;
    /// # Ok(()) }
    /// ```
    pub fn reshape(&self, config: &WindowConfig) -> Result<()> {
        let block = self.block();
        let new = config.span_in(block.core.span).of(block.name())?;
        let old = block.reshape_locked(&self.inner, config, new)?;
        // Whatever kept devices from it may be over.
        block.windows.lock_and_heal(old, None);
        block.windows.lock_and_heal(new, None);
        Ok(())
    }

    /// Ends a window: devices reach nothing through it any more. An IOAS that has been destroyed
    /// has nothing mapped: that is no error. Waits for conversions of its part.
    ///
    /// # Errors
    /// - EINVAL: it has ended already.
    /// - Another errno is that of the kernel, which refused to unmap. The window stays, takes
    ///   nothing in any more, and its pages can't become private until they are out of it. Try
    ///   again once whoever holds them in the IOAS is gone.
    pub fn remove(&self) -> Result<()> {
        self.block().close_window(&self.inner)
    }

    /// It goes on without this, until the block's end.
    pub fn keep(mut self) {
        self.block = None;
    }

    fn block(&self) -> &Arc<Block> {
        let block = self.block.as_ref();
        block.expect("it is taken when nobody has the window any more")
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        let Some(block) = &self.block else {
            return;
        };
        if !block.windows.has(&self.inner) {
            return;
        }
        if let Err(error) = block.close_window(&self.inner) {
            limited!(error, "{error}");
            block.windows.abandon(&self.inner);
        }
    }
}

impl Block {
    /// Shows a part of the block to the devices of an IOAS: all of its shared pages now, and from
    /// now on whatever becomes shared. Pins memory, which the kernel counts against RLIMIT_MEMLOCK.
    /// Waits for conversions of that part.
    ///
    /// # In Rust
    /// Until what this returns is dropped. The iommufd is an open /dev/iommu, and is duplicated.
    ///
    /// # Errors
    /// - EINVAL: the range is empty, not page aligned, or not in the block; the IOVAs wrap, or the
    ///   IOAS reserves some.
    /// - ENOTTY, or what else that file answers: it is no iommufd.
    /// - ENOENT: it has no such IOAS.
    /// - EEXIST: another window, of whichever block, has some of these addresses of the IOAS; or the IOAS
    ///   has something else there, where pages are shared; elsewhere a conversion finds that out.
    /// - EBUSY: the kernel refuses to unmap what was left at these addresses, or somebody is having it unmapped: try
    ///   again.
    /// - ENOTSUP: [`BlockConfig::dma`](crate::BlockConfig::dma) or
    ///   [`BlockConfig::dma_split`](crate::BlockConfig::dma_split) insists on a way that the kernel
    ///   refuses, or the memory is out of the kernel's direct map.
    /// - ENOMEM: pages can't be pinned.
    ///
    /// Nothing is mapped then. Should the kernel refuse even to take back what was mapped, which is
    /// logged, those pages can't become private, and that is tried again from time to time, by the block's next
    /// window and at its end. What is left even then, and pages of no meaning that were mapped to try a cut, are
    /// unmapped by who next wants these addresses of the IOAS, or when the library's last window of the iommufd ends:
    /// destroy no IOAS in which something is left, nor have another get its number, before that. Where one has, what
    /// it has at the end of what was left can't be told from it, and is unmapped.
    pub fn add_window(
        self: &Arc<Self>,
        iommufd: impl AsFd,
        config: &WindowConfig,
    ) -> Result<Window> {
        if !self.core.planes.is_in_direct_map() {
            return Err(Error::unsupported(
                "direct-map=off: the kernel lets nobody pin such memory, so no passed-through device can \
                 reach it",
            )
            .of(self.name())
            .with_remedy("leave direct-map on, or use a device that copies (virtio, vhost-user)"));
        }
        let span = config.span_in(self.core.span).of(self.name())?;
        // One that could not be closed may be where this one is to be.
        if let Err(error) = self.windows.close_abandoned(None) {
            limited!(warn, "{error}");
        }
        let _range = self.core.lock(span);
        let window = self.windows.open(iommufd.as_fd(), config, span)?;
        // Whatever kept devices from it may be over.
        self.windows.try_to_heal(span);
        Ok(Window {
            block: Some(self.clone()),
            inner: window,
        })
    }

    /// Answers what the window showed before.
    fn reshape_locked(
        &self,
        window: &Arc<dma::Window>,
        config: &WindowConfig,
        new: Span<Offset>,
    ) -> Result<Span<Offset>> {
        let difference = |old: Span<Offset>| {
            let mut hulls = RunSet::default();
            for (one, other) in [(old, new), (new, old)] {
                let mut beyond = RunSet::of(&[one]);
                beyond.remove(other);
                for part in beyond.inside(one) {
                    hulls.insert(self.core.lock_hull(part));
                }
            }
            hulls.inside(self.core.span)
        };
        let _range = self.windows.lock_window(window, difference, None);
        if !self.windows.has(window) {
            return Err(self.no_such_window());
        }
        let old = window.span();
        // Areas that are in one with what goes lie in these, too.
        let locked = difference(old);
        let within = |span: Span<Offset>| {
            let parts = locked
                .iter()
                .filter_map(move |part| part.intersection(&span));
            parts.collect::<Spans<Offset>>()
        };
        self.windows.reshape(window, config, new, within)?;
        Ok(old)
    }

    /// Ends one of its windows.
    fn close_window(&self, window: &Arc<dma::Window>) -> Result<()> {
        let _range = self.windows.lock_shown(window, None);
        if !self.windows.has(window) {
            return Err(self.no_such_window());
        }
        self.windows.close(window)?;
        // It may have been the one that refused what others can have.
        self.windows.try_to_heal(window.span());
        Ok(())
    }

    fn no_such_window(&self) -> Error {
        Error::invalid("that DMA window has ended").of(self.name())
    }
}

impl WindowSet {
    /// Closes windows that nobody has: those that could not be made, or were dropped, and were not to be closed
    /// then. But for those that others have locked for longer than its `patience`.
    pub(super) fn close_abandoned(&self, patience: Option<Duration>) -> Result<()> {
        let core = self.core();
        let mut result = Ok(());
        for window in self.all().iter().filter(|window| window.is_abandoned()) {
            let locked = self.lock_shown(window, patience);
            // Somebody else may have closed it meanwhile.
            if locked.is_none() || !self.has(window) {
                continue;
            }
            let closed = self.close(window).map_err(|error| {
                Error::busy("a DMA window that could not be closed is still there")
                    .of(&core.name)
                    .because(error)
                    .with_remedy("it is tried again by itself: try again later")
            });
            result = result.and(closed);
        }
        result
    }

    /// Locks a window against who else changes it, and with it those `pages` that depend on what it shows;
    /// `None` if that took longer than the `patience` for each attempt.
    fn lock_window(
        &self,
        window: &dma::Window,
        pages: impl Fn(Span<Offset>) -> Spans<Offset>,
        patience: Option<Duration>,
    ) -> Option<RangeGuard<'_>> {
        let core = self.core();
        loop {
            let shown = window.span();
            let mut ranges = vec![(window.number(), Span::between(0, PAGE_SIZE))];
            ranges.extend(pages(shown).into_iter().map(|span| (core.number, span)));
            let locks = &core.machine.ranges;
            let guard = match patience {
                None => locks.lock(ranges),
                Some(time) => locks.lock_until(ranges, Instant::now() + time)?,
            };
            // Waiting, it may have been reshaped.
            if window.span() == shown {
                return Some(guard);
            }
        }
    }

    /// The same, with all that it shows.
    fn lock_shown(
        &self,
        window: &dma::Window,
        patience: Option<Duration>,
    ) -> Option<RangeGuard<'_>> {
        // What is quarantined leaves other windows, too, with its unit.
        let pages = |shown| Spans::from_elem(self.core().lock_hull(shown), 1);
        self.lock_window(window, pages, patience)
    }
}
