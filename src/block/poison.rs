// SPDX-License-Identifier: MIT OR Apache-2.0
//! Pages whose memory the host's hardware has lost.
//!
//! The kernel keeps such a page in its file, where nobody can use it, until a hole is punched there:
//! then the next use gets fresh memory. Before that nothing may touch it, and no device may have it,
//! since what a device reads from it brings down the host.

use super::Block;
use crate::attributes::{Attribute, Attributes};
use crate::error::{Cause, Error, Result};
use crate::plane::Backing;
use crate::run_set::{RunSet, Spans};
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::{Mutex, MutexGuard, PoisonError};
use crate::throttle::{limited, Class};
use crate::units::{pages_around, Offset, Span};

/// Which pages are lost, in which plane: with a huge page of the shared plane are lost the shared bytes of
/// every page in it, but no private ones, which have another file.
#[derive(Debug)]
pub(super) struct Poisoned {
    /// In place the first one is all there is.
    planes: Mutex<[RunSet; 2]>,
    backing: Backing,
    /// Of `planes`: most often there are none, and every conversion asks.
    bytes: AtomicU64,
}

impl Poisoned {
    pub(super) fn new(backing: Backing) -> Self {
        Self {
            planes: Mutex::default(),
            backing,
            bytes: AtomicU64::new(0),
        }
    }

    pub(super) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Acquire)
    }

    /// The parts of `span` that are not lost in the plane of `attribute`.
    pub(super) fn outside(&self, span: Span<Offset>, attribute: Attribute) -> Spans<Offset> {
        self.planes()[self.plane_of(attribute)].outside(span)
    }

    /// The parts of `span` that are.
    fn inside(&self, span: Span<Offset>, attribute: Attribute) -> Spans<Offset> {
        self.planes()[self.plane_of(attribute)].inside(span)
    }

    /// Nothing of `span` is lost any more, in any plane.
    pub(super) fn forget(&self, span: Span<Offset>) {
        for attribute in [Attribute::Shared, Attribute::Private] {
            self.remove(span, attribute);
        }
    }

    fn remove(&self, span: Span<Offset>, attribute: Attribute) {
        self.change(attribute, |pages| pages.remove(span));
    }

    fn insert(&self, span: Span<Offset>, attribute: Attribute) {
        self.change(attribute, |pages| pages.insert(span));
    }

    fn change(&self, attribute: Attribute, change: impl FnOnce(&mut RunSet)) {
        let mut planes = self.planes();
        change(&mut planes[self.plane_of(attribute)]);
        let bytes = planes.iter().map(RunSet::bytes).sum();
        self.bytes.store(bytes, Ordering::Release);
    }

    fn plane_of(&self, attribute: Attribute) -> usize {
        match (self.backing, attribute) {
            (Backing::InPlace, _) | (_, Attribute::Shared) => 0,
            (Backing::Split, Attribute::Private) => 1,
        }
    }

    fn planes(&self) -> MutexGuard<'_, [RunSet; 2]> {
        self.planes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Block {
    /// The host's hardware has lost the memory that [`Block::host`] shows for `size` bytes at `offset`:
    /// of whole pages around them. In a split block that is shared memory, also behind pages that are
    /// private now, which stay as they are. [`Vm::poison`](crate::Vm::poison) is for what a guest uses.
    ///
    /// No device reaches lost pages any more, the guest can't convert them, nor others to them,
    /// preallocation leaves them out, and [`Block::check_access`] refuses them, until [`Block::reset`]
    /// gives them fresh memory or the VM is rebuilt. Twice is as good as once. In an ordinary block the
    /// 1 GiB around them is out for a moment, as far as windows show it: devices that use it fault.
    ///
    /// Waits for conversions around them. Should the VM be rebuilt meanwhile, the memory is another, and
    /// nothing happens. Listeners are not told.
    ///
    /// # Errors
    /// EINVAL for a range that is empty or not in the block; EBUSY while the VM is detached. The errno
    /// of a window's unmap, when devices may still reach some of it, or of a map, when what left with it
    /// could not be put back and is quarantined; the pages are poisoned all the same.
    pub fn poison(&self, offset: u64, size: u64) -> Result<()> {
        let pages = self.pages_of(offset, size)?;
        let rebuilds = self.vm.rebuilds();
        self.vm.check_attached()?;
        self.poison_runs(pages, rebuilds, |_| vec![(pages, Attribute::Shared)])
    }

    /// What the guest uses of `pages` is lost, of memory that the VM had at that number of
    /// [rebuilds](crate::Vm::rebuilds).
    pub(crate) fn poison_pages(&self, pages: Span<Offset>, rebuilds: u64) -> Result<()> {
        self.poison_runs(pages, rebuilds, |attributes| {
            let of = |attribute| {
                let runs = attributes.runs(pages, attribute).into_iter();
                runs.map(move |run| (run, attribute))
            };
            let shared = of(Attribute::Shared);
            shared.chain(of(Attribute::Private)).collect()
        })
    }

    fn poison_runs(
        &self,
        pages: Span<Offset>,
        rebuilds: u64,
        lost: impl FnOnce(&Attributes) -> Vec<(Span<Offset>, Attribute)>,
    ) -> Result<()> {
        let _range = self.vm.ranges.lock((self.number, self.lock_hull(pages)));
        self.vm.check_attached()?;
        if self.vm.rebuilds() != rebuilds {
            // Gone with the old VM.
            return Ok(());
        }
        let lost = lost(&self.attributes());
        let known = lost
            .iter()
            .all(|&(run, attribute)| self.poisoned.outside(run, attribute).is_empty());
        let is_mapped = || self.windows().iter().any(|window| window.maps(pages));
        if known && !is_mapped() {
            return Ok(());
        }
        if !known {
            self.change_poisoned(|poisoned| {
                for (run, attribute) in lost {
                    poisoned.insert(run, attribute);
                    // Of an ordinary block, nothing else is wrong with it.
                    if !self.confidential {
                        self.lift_quarantine(run);
                    }
                }
            });
            // A guest that has lost many pages meets them as fast as it likes; and what else it makes
            // us complain of must not hold this back.
            self.vm.voices.say(Class::Poison, || {
                format!(
                    "{}: the host has lost the memory of {pages} (poisoned): nothing uses it until a reset",
                    self.name
                )
            });
        }
        let gone = self.going_with(pages);
        let withdrawn = self.withdraw(gone);
        let put_back = self.try_readmit(self.lock_hull(gone));
        withdrawn.and(put_back)
    }

    fn change_poisoned(&self, change: impl FnOnce(&Poisoned)) {
        let attributes = self.attributes_mut();
        change(&self.poisoned);
        self.count_closed(&attributes);
    }

    /// Whether any page is.
    pub(crate) fn is_poisoned(&self) -> bool {
        self.poisoned.bytes() != 0
    }

    /// Refuses a range with a page whose bytes are lost.
    pub(crate) fn check_sound(&self, span: Span<Offset>) -> Result<()> {
        self.check_conversion(span, None)
    }

    /// Refuses to give pages an attribute if bytes that they have now are lost, or memory that they
    /// would have then.
    pub(crate) fn check_conversion(
        &self,
        span: Span<Offset>,
        wanted: Option<Attribute>,
    ) -> Result<()> {
        if self.poisoned.bytes() == 0 {
            return Ok(());
        }
        let first = self.lost_in(span, wanted).into_iter().next();
        match first {
            None => Ok(()),
            Some((lost, attribute)) => {
                let what = format!(
                    "the host has lost the {} memory of {lost} (poisoned)",
                    attribute.name()
                );
                Err(Error::new(Cause::Poisoned { lost }, what)
                    .of(&self.name)
                    .with_remedy("a reset of the VM replaces it"))
            }
        }
    }

    /// The parts of `span` that can be given an attribute, which is all but what is lost.
    pub(crate) fn convertible(&self, span: Span<Offset>, wanted: Attribute) -> Spans<Offset> {
        if self.poisoned.bytes() == 0 {
            return Spans::from_elem(span, 1);
        }
        let mut sound = RunSet::default();
        sound.insert(span);
        for (lost, _) in self.lost_in(span, Some(wanted)) {
            sound.remove(lost);
        }
        sound.inside(span)
    }

    /// The pages of `span` that are lost in the plane that they use now, and then those that are in the
    /// one that they would use.
    fn lost_in(
        &self,
        span: Span<Offset>,
        wanted: Option<Attribute>,
    ) -> Vec<(Span<Offset>, Attribute)> {
        let attributes = self.attributes();
        let used = [Attribute::Shared, Attribute::Private].map(|attribute| {
            let runs = attributes.runs(span, attribute).into_iter();
            runs.map(move |run| (run, attribute))
        });
        let to_be_used = wanted.into_iter().flat_map(|wanted| {
            let runs = attributes.changes(span, wanted).into_iter();
            runs.map(move |run| (run, wanted))
        });
        let runs = used.into_iter().flatten().chain(to_be_used);
        runs.flat_map(|(run, attribute)| {
            let lost = self.poisoned.inside(run, attribute).into_iter();
            lost.map(move |lost| (lost, attribute))
        })
        .collect()
    }

    /// The part of `run` without lost pages around `offset`, which is in it. All of it has one attribute.
    pub(super) fn sound_around(&self, offset: u64, run: Span<Offset>) -> Result<Span<Offset>> {
        if self.poisoned.bytes() == 0 {
            return Ok(run);
        }
        let page = pages_around(offset, 1).expect("an offset of the block has a page");
        self.check_sound(page)?;
        let (attribute, _) = self.attributes().run_at(offset);
        let plane = self.poisoned.plane_of(attribute);
        let gap = self.poisoned.planes()[plane].around_offset(offset, self.span);
        // It may have converted meanwhile; then the answer is of a moment ago.
        Ok(run.intersection(&gap).unwrap_or(page))
    }

    /// Gives poisoned pages fresh memory. They keep their attributes. Every run of them is tried;
    /// one that fails stays poisoned.
    pub(super) fn replace_lost(&self) -> Result<()> {
        if self.poisoned.bytes() == 0 {
            return Ok(());
        }
        let _range = self.vm.ranges.lock((self.number, self.span));
        self.vm.check_attached()?;
        let mut result = Ok(());
        for attribute in [Attribute::Shared, Attribute::Private] {
            for run in self.poisoned.inside(self.span, attribute) {
                let parts = match self.backing() {
                    Backing::InPlace => self.attributes().runs(run, attribute),
                    Backing::Split => Spans::from_elem(run, 1),
                };
                for part in parts {
                    let replaced = self.replace(part, attribute);
                    if let Err(error) = &replaced {
                        limited!(error, "{}: {part} stays poisoned: {error}", self.name);
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
        let hole = self.planes.pages_around(part, attribute);
        let pages = hole.intersection(&self.span).unwrap_or(part);
        let gone = self.going_with(pages);
        // A page that a device has pinned would be the device's and no longer the file's.
        let replaced = self.withdraw(gone).and_then(|()| {
            self.planes.renew(hole, attribute)?;
            // Behind pages of the other kind there is no memory.
            let used = match self.planes.must_allocate(attribute) {
                true => self.attributes().runs(pages, attribute),
                false => Spans::new(),
            };
            let allocate = |&run| self.planes.allocate(run, attribute);
            used.iter().try_for_each(allocate)
        });
        if replaced.is_ok() {
            self.change_poisoned(|poisoned| poisoned.remove(pages, attribute));
            limited!(info, "{}: {part} has fresh memory", self.name);
        }
        self.readmit(self.lock_hull(gone));
        replaced
    }

    /// What has to leave the windows for `pages` to, and come back with what is in one unit with it, which
    /// an unmap that fails may have taken along: in an ordinary block, the pieces that windows are mapped
    /// in.
    fn going_with(&self, pages: Span<Offset>) -> Span<Offset> {
        match self.confidential {
            true => pages,
            false => self.lock_hull(pages),
        }
    }
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests {
    use super::*;
    use crate::block::BlockConfig;
    use crate::kernel::fake::{FakeKernel, VmKind};
    use crate::sync::Arc;
    use crate::vm::Vm;
    use std::os::fd::AsRawFd;

    /// Who heard of it, and gets its range only after a rebuild, is late.
    #[test]
    fn memory_lost_before_a_rebuild_is_not_lost_after_it() {
        let kernel = Arc::new(FakeKernel::new(VmKind::Ordinary));
        let fd = std::fs::File::open("/dev/null").unwrap();
        let vm = Vm::with_kernel(kernel, fd.as_raw_fd()).unwrap();
        let block = Block::new(&vm, &BlockConfig::new("ram", 4 << 20)).unwrap();
        let page = Span::between(0, 4096);
        let heard = vm.rebuilds();
        vm.detach().unwrap();
        let error = block.poison_pages(page, heard).unwrap_err();
        assert_eq!(error.errno(), libc::EBUSY, "{error}");
        vm.attach(fd.as_raw_fd()).unwrap();
        block.poison_pages(page, heard).unwrap();
        assert_eq!(block.stats().bytes_poisoned, 0);
        block.poison_pages(page, vm.rebuilds()).unwrap();
        assert_eq!(block.stats().bytes_poisoned, 4096);
    }
}
