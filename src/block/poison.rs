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
use crate::throttle::{limited, Class};
use crate::units::{pages_around, Offset, Span};

impl Block {
    /// The host's hardware has lost the memory that [`Block::host`] shows for `size` bytes at
    /// `offset`, as a SIGBUS says: of whole pages around them. In a split block that is shared
    /// memory, also behind pages that are private now, which stay usable.
    /// [`Vm::poison`](crate::Vm::poison) is for what a guest uses. Not from the SIGBUS handler
    /// itself, which may have interrupted the library: hand the address to a thread.
    ///
    /// No device reaches lost pages any more, the guest can't convert them, nor others to them,
    /// [`Block::check_access`] and [`Block::max_order`] refuse them, and preallocation leaves them
    /// out, until [`Block::reset`] gives them fresh memory or the VM is rebuilt. Twice is as good
    /// as once. In a block of an ordinary VM the 1 GiB around them is out for a moment, as far as
    /// windows show it: devices that use it fault.
    ///
    /// Waits for conversions around them. Should the VM be rebuilt meanwhile, the memory is
    /// another, and nothing happens. Listeners are not told.
    ///
    /// # Errors
    /// - EBUSY: the VM is detached, or at its end.
    /// - EINVAL: the range is empty, or not in the block.
    /// - Another errno is that of a window's unmap, when devices may still reach some of it, or of
    ///   a map, when what left with it could not be put back. The pages are poisoned all the same.
    ///   Either is quarantined, and the VM's own attempts go on.
    pub fn poison(&self, offset: u64, size: u64) -> Result<()> {
        let pages = self.pages_of(offset, size)?;
        let rebuilds = self.core.machine.rebuilds();
        self.core.machine.check_attached()?;
        self.poison_runs(pages, rebuilds, |_| vec![(pages, Attribute::Shared)])
    }

    /// What the guest uses of `pages` is lost, of memory that the VM had at that number of
    /// [rebuilds](crate::machine::Machine::rebuilds).
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
        let _range = self.core.lock(pages);
        self.core.machine.check_attached()?;
        if self.core.machine.rebuilds() != rebuilds {
            // Gone with the old VM.
            return Ok(());
        }
        let lost = lost(&self.attributes());
        let known = lost
            .iter()
            .all(|&(run, attribute)| self.core.pages.poisoned.outside(run, attribute).is_empty());
        let is_mapped = || self.windows.maps(pages);
        if known && !is_mapped() {
            return Ok(());
        }
        if !known {
            self.core.pages.change_poisoned(|poisoned| {
                for (run, attribute) in lost {
                    poisoned.insert(run, attribute);
                    // Of an ordinary block, nothing else is wrong with it.
                    if !self.core.confidential {
                        self.core.quarantine.lift(run);
                    }
                }
            });
            // A guest that has lost many pages meets them as fast as it likes; and what else it makes
            // us complain of must not hold this back.
            self.core.machine.voices.say(module_path!(), Class::Poison, || {
                format!(
                    "{}: the host has lost the memory of {pages} (poisoned): nothing uses it until a reset",
                    self.core.name
                )
            });
        }
        let left = self.windows.leave_lost(pages);
        self.windows.quarantine_lost(pages);
        left
    }

    /// Whether any page is.
    pub(crate) fn is_poisoned(&self) -> bool {
        self.core.pages.poisoned.bytes() != 0
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
        if self.core.pages.poisoned.bytes() == 0 {
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
                    .of(&self.core.name)
                    .with_remedy("a reset of the VM replaces it"))
            }
        }
    }

    /// The parts of `span` that can be given an attribute, which is all but what is lost.
    pub(crate) fn convertible(&self, span: Span<Offset>, wanted: Attribute) -> Spans<Offset> {
        if self.core.pages.poisoned.bytes() == 0 {
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
            let lost = self.core.pages.poisoned.inside(run, attribute).into_iter();
            lost.map(move |lost| (lost, attribute))
        })
        .collect()
    }

    /// The part of `run` without lost pages around `offset`, which is in it. All of it has one attribute.
    pub(super) fn sound_around(&self, offset: u64, run: Span<Offset>) -> Result<Span<Offset>> {
        if self.core.pages.poisoned.bytes() == 0 {
            return Ok(run);
        }
        let page = pages_around(offset, 1).expect("an offset of the block has a page");
        self.check_sound(page)?;
        let (attribute, _) = self.attributes().run_at(offset);
        let plane = self.core.pages.poisoned.plane_of(attribute);
        let gap = self.core.pages.poisoned.planes()[plane].around_offset(offset, self.core.span);
        // It may have converted meanwhile; then the answer is of a moment ago.
        Ok(run.intersection(&gap).unwrap_or(page))
    }

    /// Gives poisoned pages fresh memory. They keep their attributes. Every run of them is tried;
    /// one that fails stays poisoned.
    pub(crate) fn replace_lost(&self) -> Result<()> {
        if self.core.pages.poisoned.bytes() == 0 {
            return Ok(());
        }
        let _range = self.core.lock(self.core.span);
        self.core.machine.check_attached()?;
        let mut result = Ok(());
        for attribute in [Attribute::Shared, Attribute::Private] {
            for run in self.core.pages.poisoned.inside(self.core.span, attribute) {
                let parts = match self.backing() {
                    Backing::InPlace => self.attributes().runs(run, attribute),
                    Backing::Split => Spans::from_elem(run, 1),
                };
                for part in parts {
                    let replaced = self.replace(part, attribute);
                    if let Err(error) = &replaced {
                        limited!(error, "{}: {part} stays poisoned: {error}", self.core.name);
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
        let hole = self.core.planes.pages_around(part, attribute);
        let pages = hole.intersection(&self.core.span).unwrap_or(part);
        let gone = self.core.going_with(pages);
        // A page that a device has pinned would be the device's and no longer the file's.
        let replaced = self.windows.withdraw(gone).and_then(|()| {
            self.core.planes.renew(hole, attribute)?;
            // Behind pages of the other kind there is no memory.
            let used = match self.core.planes.must_allocate(attribute) {
                true => self.attributes().runs(pages, attribute),
                false => Spans::new(),
            };
            let allocate = |&run| self.core.planes.allocate(run, attribute);
            used.iter().try_for_each(allocate)
        });
        if replaced.is_ok() {
            self.core
                .pages
                .change_poisoned(|poisoned| poisoned.remove(pages, attribute));
            limited!(info, "{}: {part} has fresh memory", self.core.name);
        }
        self.windows.readmit(self.core.lock_hull(gone));
        replaced
    }
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests {
    use super::*;
    use crate::block::BlockConfig;
    use crate::kernel::fake::{FakeKernel, VmKind};
    use crate::sync::Arc;
    use crate::vm::Vm;

    /// Who heard of it, and gets its range only after a rebuild, is late.
    #[test]
    fn memory_lost_before_a_rebuild_is_not_lost_after_it() {
        let kernel = Arc::new(FakeKernel::new(VmKind::Ordinary));
        let fd = std::fs::File::open("/dev/null").unwrap();
        let vm = Vm::with_kernel(kernel, &fd).unwrap();
        let block = Block::new(&vm, &BlockConfig::new("ram", 4 << 20)).unwrap();
        let page = Span::between(0, 4096);
        let heard = vm.machine().rebuilds();
        vm.detach().unwrap();
        let error = block.poison_pages(page, heard).unwrap_err();
        assert_eq!(error.errno(), libc::EBUSY, "{error}");
        vm.attach(&fd).unwrap();
        block.poison_pages(page, heard).unwrap();
        assert_eq!(block.stats().bytes_poisoned, 0);
        block.poison_pages(page, vm.machine().rebuilds()).unwrap();
        assert_eq!(block.stats().bytes_poisoned, 4096);
    }
}
