// SPDX-License-Identifier: MIT OR Apache-2.0
//! Pages whose memory the host's hardware has lost.
//!
//! The kernel keeps such a page in its file, where nobody can use it, until a hole is punched there:
//! then the next use gets fresh memory. Before that nothing may touch it, and no device may have it,
//! since what a device reads from it brings down the host.

use super::Block;
use crate::attributes::Attribute;
use crate::dma::{StrategyKind, Window};
use crate::error::{Error, Result};
use crate::run_set::{RunSet, Spans};
use crate::units::{pages_around, Offset, Span};
use log::{error, info};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Which pages are lost.
#[derive(Debug, Default)]
pub(super) struct Poisoned {
    pages: Mutex<RunSet>,
    /// Of `pages`: most often there are none, and every conversion asks.
    bytes: AtomicU64,
}

impl Poisoned {
    pub(super) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Acquire)
    }

    /// The parts of `span` that are not lost.
    pub(super) fn outside(&self, span: Span<Offset>) -> Spans<Offset> {
        self.pages().outside(span)
    }

    pub(super) fn remove(&self, span: Span<Offset>) {
        self.change(|pages| pages.remove(span));
    }

    fn insert(&self, span: Span<Offset>) {
        self.change(|pages| pages.insert(span));
    }

    fn change(&self, change: impl FnOnce(&mut RunSet)) {
        let mut pages = self.pages();
        change(&mut pages);
        self.bytes.store(pages.bytes(), Ordering::Release);
    }

    fn pages(&self) -> MutexGuard<'_, RunSet> {
        self.pages.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Block {
    /// The host's hardware has lost the memory of `size` bytes at `offset`, whole pages of it: no
    /// device reaches them any more, the guest can't convert them, preallocation leaves them out, and
    /// [`Block::check_access`] refuses them, until [`Block::reset`] gives them fresh memory or the VM
    /// is rebuilt. Twice is as good as once. A window that is mapped whole is out for a moment: its
    /// devices fault.
    ///
    /// Waits for conversions in the block. Listeners are not told.
    ///
    /// # Errors
    /// EINVAL for a range that is empty or not in the block; EBUSY while the VM is detached. The errno
    /// of a window's unmap, when devices may still reach some of it; the pages are poisoned all the
    /// same.
    pub fn poison(&self, offset: u64, size: u64) -> Result<()> {
        self.poison_pages(self.pages_of(offset, size)?)
    }

    pub(crate) fn poison_pages(&self, pages: Span<Offset>) -> Result<()> {
        // All of it: a window that is mapped whole goes and comes back as a whole.
        let _range = self.vm.ranges.lock((self.number, self.span));
        self.vm.check_attached()?;
        self.change_poisoned(|poisoned| poisoned.insert(pages));
        error!(
            "{}: the host has lost the memory of {pages} (poisoned): nothing uses it until a reset",
            self.name
        );
        let is_whole = |window: &Arc<Window>| window.strategy() == StrategyKind::Whole;
        let gone = match self.windows().iter().any(is_whole) {
            true => self.span,
            false => pages,
        };
        let result = self.withdraw(gone);
        self.readmit(gone);
        result
    }

    fn change_poisoned(&self, change: impl FnOnce(&Poisoned)) {
        let attributes = self.attributes_mut();
        change(&self.poisoned);
        self.count_closed(&attributes);
    }

    /// Refuses a range with a poisoned page.
    pub(crate) fn check_sound(&self, span: Span<Offset>) -> Result<()> {
        if self.poisoned.bytes() == 0 {
            return Ok(());
        }
        let lost = self.poisoned.pages().inside(span);
        match lost.first() {
            None => Ok(()),
            Some(lost) => Err(Error::Poisoned(format!(
                "{}: the host has lost the memory of {lost} (poisoned); a reset of the VM replaces it",
                self.name
            ))),
        }
    }

    /// The part of `run` without poisoned pages around `offset`, which is in it.
    pub(super) fn sound_around(&self, offset: u64, run: Span<Offset>) -> Result<Span<Offset>> {
        if self.poisoned.bytes() == 0 {
            return Ok(run);
        }
        let page = pages_around(offset, 1).expect("an offset of the block has a page");
        self.check_sound(page)?;
        let gap = self.poisoned.pages().around_offset(offset, self.span);
        Ok(run.intersection(&gap).expect("both have the offset"))
    }

    /// Gives poisoned pages fresh memory. They keep their attributes. Every run of them is tried;
    /// one that fails stays poisoned.
    pub(super) fn heal(&self) -> Result<()> {
        if self.poisoned.bytes() == 0 {
            return Ok(());
        }
        let _range = self.vm.ranges.lock((self.number, self.span));
        self.vm.check_attached()?;
        let lost = self.poisoned.pages().inside(self.span);
        let mut result = Ok(());
        for attribute in [Attribute::Shared, Attribute::Private] {
            for &run in &lost {
                let parts = self.attributes().runs(run, attribute);
                for part in parts {
                    let replaced = self.replace(part, attribute);
                    if let Err(error) = &replaced {
                        error!("{}: {part} stays poisoned: {error}", self.name);
                    }
                    result = result.and(replaced);
                }
            }
        }
        result
    }

    /// Punches a hole where poisoned pages are. With a huge page goes all of it: what else was in it
    /// is lost, as a reset may lose it.
    fn replace(&self, part: Span<Offset>, attribute: Attribute) -> Result<()> {
        let pages = self.planes.pages_around(part, attribute);
        // A page that a device has pinned would be the device's and no longer the file's.
        let replaced = self.withdraw(pages).and_then(|()| {
            self.planes.renew(pages, attribute)?;
            match self.planes.must_allocate(attribute) {
                true => self.planes.allocate(part, attribute),
                false => Ok(()),
            }
        });
        if replaced.is_ok() {
            self.change_poisoned(|poisoned| poisoned.remove(pages));
            info!("{}: {part} has fresh memory", self.name);
        }
        self.readmit(pages);
        replaced
    }
}
