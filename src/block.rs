// SPDX-License-Identifier: MIT OR Apache-2.0
//! One backend instance: its planes, attributes, windows and listeners.

mod binding;
mod config;
mod core;
mod discard;
mod erase;
mod heal;
mod merge;
mod pages;
mod place;
mod poison;
mod poisoned;
mod populate;
mod quarantine;
mod releaser;
mod telling;
mod unhealed;
mod window_set;
mod windows;

pub use binding::Binding;
pub use config::{BackingChoice, BlockConfig, ConvertUnit};
pub use windows::Window;

use crate::attributes::{Attribute, Attributes};
use crate::bindings::VmBindings;
use crate::dma::{DmaPath, StrategyKind};
use crate::error::{Error, Result};
use crate::listeners::{Listener, Listeners, Registration};
use crate::machine::Machine;
use crate::plane::{preallocate, Backing, Planes, PlanesConfig};
use crate::range_locks::RangeGuard;
use crate::stats::{BlockCounters, BlockStats};
use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use crate::sync::{Arc, RwLockReadGuard};
use crate::throttle::limited;
use crate::units::{Offset, Span, PAGE_SIZE};
use crate::upkeep::Chore;
use log::info;
use std::os::fd::BorrowedFd;

use self::core::Core;
use heal::Healer;
use pages::{Closed, Pages};
use quarantine::Quarantine;
use releaser::Releaser;
use window_set::WindowSet;

/// What KVM_SET_USER_MEMORY_REGION2 needs to know for a memory slot in address space 0.
///
/// Other address spaces (x86's SMM) get a plain slot at the same address, without a guest_memfd:
/// KVM refuses to bind an offset twice, and takes the pages from the mapping just as well.
///
/// # Example
/// ```
/// # use gmem::kernel::fake::{FakeKernel, VmKind};
/// # fn main() -> gmem::Result<()> {
/// # let file = std::fs::File::open("/dev/null").unwrap();
/// # let kernel = std::sync::Arc::new(FakeKernel::new(VmKind::Confidential));
/// # let vm = gmem::Vm::with_kernel(kernel.clone(), &file)?;
/// use gmem::{Attribute, Block, BlockConfig};
/// use std::os::fd::AsRawFd;
/// # #[allow(non_camel_case_types)]
/// # #[derive(Default)]
/// # struct kvm_userspace_memory_region2 {
/// #     slot: u32, flags: u32, guest_phys_addr: u64, memory_size: u64, userspace_addr: u64,
/// #     guest_memfd_offset: u64, guest_memfd: u32, pad1: u32, pad2: [u64; 14],
/// # }
/// # const KVM_MEM_GUEST_MEMFD: u32 = 1 << 2;
/// # let ram = Block::new(&vm, &BlockConfig::confidential("ram", 1 << 20, Attribute::Shared))?;
/// let slot = ram.memslot(0)?;
/// let region = kvm_userspace_memory_region2 {
///     slot: 0,
///     flags: KVM_MEM_GUEST_MEMFD,
///     guest_phys_addr: 0,
///     memory_size: 1 << 20,
///     userspace_addr: slot.userspace_addr as u64,
///     guest_memfd_offset: slot.guest_memfd_offset,
///     guest_memfd: slot.guest_memfd.as_raw_fd() as u32,
///     ..Default::default()
/// };
/// # assert_eq!(region.guest_memfd_offset, 0);
/// # Ok(()) }
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Memslot<'a> {
    /// Its `userspace_addr`.
    pub userspace_addr: *mut u8,
    /// Its `guest_memfd`.
    pub guest_memfd: BorrowedFd<'a>,
    /// Its `guest_memfd_offset`, in bytes.
    pub guest_memfd_offset: u64,
}

/// Guest memory of one size, on files of its own, bound to any number of guest physical addresses.
///
/// # In Rust
/// Who drops the last reference to a block ends it, with its bindings, and its memory is freed; a memory slot
/// that still uses it must be gone by then. A [`Window`] is such a reference: devices have the block's memory until
/// that is dropped, too. A [`Binding`] and a [`Registration`] are none.
///
/// What it is made of keeps its own invariants: `Pages`, `Quarantine`, `Planes`, `WindowSet`,
/// `Releaser`. Here they are put together; what a conversion does with them is added from above.
#[derive(Debug)]
pub struct Block {
    core: Arc<Core>,
    initial: Attribute,
    convert_unit: ConvertUnit,
    max_runs: u64,
    max_request: u64,
    releaser: Arc<Releaser>,
    windows: Arc<WindowSet>,
    healer: Arc<Healer>,
    /// Its file may be closed as it is: see [`merge`].
    merged: AtomicBool,
    /// How many there are: to be told without waiting for those who change them.
    /// Of all blocks of the VM.
    pub(crate) vm_bindings: Arc<VmBindings<Block>>,
    bindings: AtomicU64,
    pub(crate) listeners: Arc<Listeners>,
}

impl Block {
    /// A block of a VM that isn't rebuilt meanwhile; see [`Block::new`].
    pub(crate) fn on(
        machine: &Arc<Machine>,
        bindings: &Arc<VmBindings<Block>>,
        config: &BlockConfig,
    ) -> Result<Arc<Self>> {
        // The name goes into messages of one line.
        let config = &BlockConfig {
            name: config.name.replace(char::is_control, "?"),
            ..config.clone()
        };
        let span = config.check()?;
        machine.check_attached()?;
        let backing = config.backing_on(&machine.probe())?;
        let planes = PlanesConfig {
            name: &config.name,
            block: span,
            backing,
            initial: config.initial,
            huge_page: config.hugetlb,
            reserve: config.reserve,
            policy: config.policy.clone(),
            direct_map: config.direct_map,
            keeping: config.keeping(),
            kept_from: &config.kept_from(),
        };
        let planes = Planes::new(machine.kernel().clone(), machine.fd(), &planes)?;
        planes.allocate_initial(config.initial)?;
        info!(
            "{}: {:#x} bytes, {backing}{}, {} at first",
            config.name,
            config.size,
            match config.backing {
                BackingChoice::Auto if config.confidential => ": the VM is confidential",
                BackingChoice::Auto => ": the VM is ordinary",
                _ => ", as asked",
            },
            config.initial.name(),
        );
        let core = Arc::new(Core {
            machine: machine.clone(),
            number: machine.number(),
            name: config.name.clone(),
            span,
            confidential: config.confidential,
            dma_split: config.dma_split,
            planes: Arc::new(planes),
            pages: Pages::new(span, config.initial, config.hugetlb, backing),
            quarantine: Quarantine::default(),
            counters: Arc::default(),
        });
        let releaser = Releaser::of(&core);
        let windows = WindowSet::new(&core, &releaser, config.dma);
        let block = Arc::new(Self {
            initial: config.initial,
            convert_unit: config.convert_unit,
            max_runs: config.max_runs_on(backing),
            max_request: config.request_bound(),
            healer: Healer::of(&windows),
            windows,
            releaser,
            merged: AtomicBool::new(false),
            vm_bindings: bindings.clone(),
            bindings: AtomicU64::new(0),
            listeners: Arc::default(),
            core,
        });
        for chore in block.chores() {
            machine.upkeep.add(chore);
        }
        // Schedules do without the thread.
        let planes = &block.core.planes;
        let looked_after = !planes.may_keep(Attribute::Shared) || machine.upkeep.start();
        if !looked_after && !cfg!(feature = "shuttle") {
            planes.keep_nothing();
        }
        Ok(block)
    }

    fn chores(&self) -> [Arc<dyn Chore>; 2] {
        [self.releaser.clone(), self.healer.clone()]
    }

    /// What messages call it.
    pub fn name(&self) -> &str {
        &self.core.name
    }

    /// How its halves are kept.
    pub fn backing(&self) -> Backing {
        self.core.planes.backing()
    }

    /// All of its offsets.
    pub fn span(&self) -> Span<Offset> {
        self.core.span
    }

    /// Where its shared bytes are mapped: page aligned, for as long as the block lives. In a split
    /// block the address of a private page reads and writes memory that the guest never sees, and
    /// in place it is a SIGBUS: ask [`Block::check_access`] first.
    pub fn host(&self) -> *mut u8 {
        self.core.planes.mapping().host()
    }

    /// The file with the bytes of pages of one attribute, at their offsets; in place it is one file
    /// for both. That with the private bytes is a guest_memfd, for memory slots. That with the
    /// shared ones is for vhost-user, never for VFIO, which goes by [`Block::add_window`].
    ///
    /// A process that maps the file with the shared bytes and touches a page that the guest has
    /// turned private gets SIGBUS in place, and in split from a pool of huge pages that is empty:
    /// don't give it away there, if the process can't bear that. In split in small pages it gets
    /// what the page left, while that is kept, and then a page of zeros, which is freed after the
    /// next conversion to private.
    pub fn file(&self, attribute: Attribute) -> BorrowedFd<'_> {
        self.core.planes.file(attribute)
    }

    /// How its windows are mapped, if it has any. They can differ when their IOASes do, and this is
    /// the oldest one's.
    pub fn strategy(&self) -> Option<StrategyKind> {
        let windows = self.windows.all();
        windows.first().map(|window| window.strategy())
    }

    /// How its windows name memory; [`DmaPath::Auto`] while none has found out.
    pub fn dma_path(&self) -> DmaPath {
        self.windows.path()
    }

    /// What KVM_SET_USER_MEMORY_REGION2 needs for the memory slot, in address space 0, that shows
    /// the block from `offset` on, with KVM_MEM_GUEST_MEMFD set. Neither KVM_MEM_LOG_DIRTY_PAGES
    /// nor KVM_MEM_READONLY may be set with it. Its size is the caller's choice: whole pages, to
    /// the block's end at most.
    ///
    /// # Errors
    /// - EBUSY: the VM is detached, or at its end.
    /// - EINVAL: the offset isn't page aligned, or not in the block.
    pub fn memslot(&self, offset: u64) -> Result<Memslot<'_>> {
        self.core.machine.check_attached()?;
        let rest = self.span_of(offset, self.core.span.end().saturating_sub(offset))?;
        Ok(Memslot {
            userspace_addr: self.host().wrapping_add(rest.first() as usize),
            guest_memfd: self.file(Attribute::Private),
            guest_memfd_offset: rest.first(),
        })
    }

    /// Fills each page's memory in the plane that its attribute selects, with `threads` threads (0
    /// counts as 1); poisoned pages are left out. Memory is there afterwards; whether it has been
    /// cleared already depends on which way of filling it was the quicker one. Locks the block
    /// until it is done: conversions in it wait.
    ///
    /// # Errors
    /// - EBUSY: the VM is detached, or at its end.
    /// - ENOMEM, ENOSPC: there isn't enough memory.
    /// - EFAULT: a page can't be touched.
    ///
    /// Part of it is filled then.
    pub fn preallocate(&self, threads: usize) -> Result<()> {
        let _range = self.core.lock(self.core.span);
        self.core.machine.check_attached()?;
        let attributes = self.attributes();
        let runs: Vec<_> = [Attribute::Shared, Attribute::Private]
            .into_iter()
            .flat_map(|attribute| {
                let runs = attributes.runs(self.core.span, attribute).into_iter();
                let sound =
                    runs.flat_map(move |run| self.core.pages.poisoned.outside(run, attribute));
                sound.map(move |run| (run, attribute))
            })
            .collect();
        drop(attributes);
        preallocate(&self.core.planes, &runs, threads)
    }

    /// The attribute of the page at `offset`, and the offset where the run of pages with the same
    /// attribute ends. Of this moment: a conversion may follow at once, unless a listener asks
    /// about its own range.
    ///
    /// # Errors
    /// - EINVAL: the offset isn't in the block.
    pub fn run_at(&self, offset: u64) -> Result<(Attribute, u64)> {
        self.check_offset(offset)?;
        Ok(self.attributes().run_at(offset))
    }

    fn check_offset(&self, offset: u64) -> Result<()> {
        if offset < self.core.span.end() {
            return Ok(());
        }
        let size = self.core.span.end();
        let what = format!("offset {offset:#x} is beyond its {size:#x} bytes");
        Err(Error::invalid(what).of(self.name()))
    }

    /// How large a mapping may be that holds the page at `offset` and pages of one attribute only:
    /// log2 of the pages in the largest naturally aligned range of the block around it. Of this
    /// moment, unless a listener asks about its own range. Takes no lock that a conversion holds
    /// while it waits.
    ///
    /// # Errors
    /// - EINVAL: the offset isn't in the block.
    /// - EIO: the page is poisoned.
    pub fn max_order(&self, offset: u64) -> Result<u32> {
        self.check_offset(offset)?;
        let run = self.attributes().run_around(offset);
        let run = self.sound_around(offset, run)?;
        let range = |order: u32| {
            let size = PAGE_SIZE << order;
            let first = offset & !(size - 1);
            first.checked_add(size).map(|end| (first, end))
        };
        let fits = |&order: &u32| {
            range(order).is_some_and(|(first, end)| run.first() <= first && end <= run.end())
        };
        // Each range lies in the next larger one.
        Ok((1..self.core.span.end().ilog2() - PAGE_SIZE.ilog2() + 1)
            .take_while(fits)
            .last()
            .unwrap_or(0))
    }

    /// Asks whether the VMM may touch `size` bytes at `offset` of [`Block::host`]: all of them are
    /// shared, and none is poisoned. One atomic load while the block has no such page. The answer
    /// is of this moment: a conversion may follow at once.
    ///
    /// # Errors
    /// - EACCES: a page is private; it is counted ([`BlockStats::access_refused`]).
    /// - EIO: a page is poisoned.
    /// - EBUSY: the VM is detached, or a rebuild of it could not map the memory again.
    /// - EINVAL: the range is not in the block.
    pub fn check_access(&self, offset: u64, size: u64) -> Result<()> {
        let end = offset
            .checked_add(size)
            .filter(|&end| end <= self.core.span.end())
            .ok_or_else(|| self.not_in_it(offset, size))?;
        match self.core.pages.closed() {
            _ if size == 0 => return Ok(()),
            Closed::Nothing => return Ok(()),
            Closed::All => {
                self.core.machine.check_has_file()?;
                return Err(self.not_shown_again());
            }
            Closed::Some => {}
        }
        let page = PAGE_SIZE - 1;
        let pages = Span::between(offset & !page, ((end - 1) | page) + 1);
        if self.attributes().has_private(pages) {
            self.core.counters.access_refused.add(1);
            let what = format!("{size:#x} bytes at offset {offset:#x} are private to the guest");
            return Err(Error::denied(what).of(self.name()));
        }
        self.check_sound(pages)
    }

    /// Tells a listener of every conversion in the block from now on. Locks the block: waits for
    /// conversions under way, of which it would hear nothing.
    ///
    /// # In Rust
    /// Until what this returns is dropped.
    pub fn add_listener(&self, listener: Arc<dyn Listener>) -> Registration {
        let _range = self.core.lock(self.core.span);
        self.listeners.add(listener)
    }

    /// Whether nothing uses the block any more; if not, what does. Windows that could not be made, or were dropped, and
    /// could not be closed then are closed for it: waits for conversions in them.
    ///
    /// # Errors
    /// EBUSY.
    pub fn check_unused(&self) -> Result<()> {
        self.windows.close_abandoned(None)?;
        let users = [
            ("bound", self.bindings.load(Ordering::Relaxed) as usize),
            ("shown in DMA windows", self.windows.all().len()),
            ("listened to", usize::from(!self.listeners.is_empty())),
        ];
        match users.iter().find(|(_, count)| *count != 0) {
            None => Ok(()),
            Some((how, _)) => Err(Error::busy(format!("it is still {how}")).of(self.name())),
        }
    }

    /// The block's numbers: its state now, and counts since it was created. Locks for moments only,
    /// so that some may have a conversion that others don't have yet.
    pub fn stats(&self) -> BlockStats {
        let windows = self.windows.all();
        let mapped: Vec<(u64, u64)> = windows.iter().map(|window| window.mapped()).collect();
        let books = windows.iter().map(|window| window.footprint());
        let books: u64 = books.sum();
        let attributes = self.attributes();
        let quarantine = &self.core.quarantine;
        let (whole, split) = match self.backing() {
            Backing::Split => (0, 0),
            Backing::InPlace => (
                attributes.private_huge_pages(),
                attributes.shared_huge_pages(),
            ),
        };
        let counters = &self.core.counters;
        let keeping = self.core.planes.keeping();
        let (max_runs, max_request) = match self.is_confidential() {
            true => (self.max_runs, self.max_request),
            false => (u64::MAX, 0),
        };
        BlockStats {
            size: self.core.span.end(),
            bytes_private: attributes.private_bytes(),
            bytes_shared: self.core.span.end() - attributes.private_bytes(),
            bytes_dma_mapped: mapped.iter().map(|(bytes, _)| bytes).sum(),
            bytes_quarantined: quarantine.bytes(),
            runs: attributes.private_runs(),
            bindings: self.bindings.load(Ordering::Relaxed),
            windows: windows.len() as u64,
            dma_areas: mapped.iter().map(|(_, areas)| areas).sum(),
            to_private: counters.to_private.get(),
            to_shared: counters.to_shared.get(),
            failures: counters.failures.get(),
            map_file_calls: counters.map_file_calls.get(),
            map_address_calls: counters.map_address_calls.get(),
            unmap_calls: counters.unmap_calls.get(),
            attribute_calls: counters.attribute_calls.get(),
            access_refused: counters.access_refused.get(),
            release_failures: counters.release_failures.get(),
            cut_calls: counters.cut_calls.get(),
            set_calls: counters.set_calls.get(),
            remap_windows: counters.remap_windows.get(),
            dma_areas_max: counters.dma_areas_max.get(),
            retries: counters.retries.get(),
            huge_pages_shared: attributes.shared_huge_pages(),
            bookkeeping_bytes: books
                + attributes.footprint()
                + quarantine.footprint()
                + self.core.planes.footprint(),
            quarantines: counters.quarantines.get(),
            huge_pages_whole: whole,
            huge_pages_split: split,
            huge_page_splits: counters.huge_page_splits.get(),
            huge_page_merges: counters.huge_page_merges.get(),
            resumed: counters.resumed.get(),
            runs_refused: counters.runs_refused.get(),
            requests_refused: counters.requests_refused.get(),
            max_runs: if max_runs == u64::MAX { 0 } else { max_runs },
            max_request,
            release_delay_ms: keeping.delay.as_millis() as u64,
            max_pending: if keeping.delay.is_zero() {
                0
            } else {
                keeping.most
            },
            bytes_poisoned: self.core.pages.poisoned.bytes(),
            double_bytes: self.core.planes.kept_bytes(),
            releases_cancelled: counters.releases_cancelled.get(),
            heals: counters.heals.get(),
            windows_lost: counters.windows_lost.get(),
        }
    }
}

/// For what is above: conversions, rebuilds.
impl Block {
    /// Names its ranges, and orders locks.
    pub(crate) fn number(&self) -> u64 {
        self.core.number
    }

    pub(crate) fn machine(&self) -> &Arc<Machine> {
        &self.core.machine
    }

    pub(crate) fn counters(&self) -> &BlockCounters {
        &self.core.counters
    }

    pub(crate) fn planes(&self) -> &Planes {
        &self.core.planes
    }

    /// What pages have left.
    pub(crate) fn releaser(&self) -> &Releaser {
        &self.releaser
    }

    /// Which devices reach what.
    pub(crate) fn windows(&self) -> &WindowSet {
        &self.windows
    }

    pub(crate) fn quarantine(&self) -> &Quarantine {
        &self.core.quarantine
    }

    pub(crate) fn initial(&self) -> Attribute {
        self.initial
    }

    pub(crate) fn is_confidential(&self) -> bool {
        self.core.confidential
    }

    /// See [`Core::lock`].
    pub(crate) fn lock(&self, span: Span<Offset>) -> RangeGuard<'_> {
        self.core.lock(span)
    }

    /// See [`Core::lock_hull`].
    pub(crate) fn lock_hull(&self, span: Span<Offset>) -> Span<Offset> {
        self.core.lock_hull(span)
    }

    /// Whether a request for `offsets` needs no look at this block's limits.
    pub(crate) fn is_usual(&self, offsets: Span<Offset>) -> bool {
        let fits = match self.convert_unit {
            ConvertUnit::Off => false,
            ConvertUnit::Bytes(PAGE_SIZE) => true,
            ConvertUnit::Bytes(unit) => offsets.is_aligned(unit),
        };
        self.core.confidential && fits && offsets.size_bytes() <= self.max_request
    }

    /// See [`Core::has_nothing_wrong`].
    pub(crate) fn has_nothing_wrong(&self) -> bool {
        self.core.has_nothing_wrong()
    }

    /// Whether nothing is wrong with any page of `span`.
    pub(crate) fn is_plain(&self, span: Span<Offset>) -> bool {
        !self.is_poisoned() && !self.core.quarantine.touches(span)
    }

    /// Whether a conversion changes all of `span`, or nothing of it; `None` if a part, or if `max_runs` would
    /// have to be looked at.
    pub(crate) fn changes_as_a_whole(
        &self,
        span: Span<Offset>,
        attribute: Attribute,
    ) -> Option<bool> {
        let attributes = self.attributes();
        let is = attributes.of_all(span)?;
        if is == attribute {
            return Some(false);
        }
        // One run more is the most that it can make.
        let few = self.max_runs == u64::MAX || attributes.private_runs() < self.max_runs;
        few.then_some(true)
    }

    pub(crate) fn convert_unit(&self) -> ConvertUnit {
        self.convert_unit
    }

    pub(crate) fn max_runs(&self) -> u64 {
        self.max_runs
    }

    pub(crate) fn max_request(&self) -> u64 {
        self.max_request
    }

    /// For a moment: never across a call.
    pub(crate) fn attributes(&self) -> RwLockReadGuard<'_, Attributes> {
        self.core.pages.attributes()
    }

    /// Notes what the kernel has just been told.
    pub(crate) fn record(&self, span: Span<Offset>, attribute: Attribute) {
        self.core.record(span, attribute);
    }

    /// Its addresses are about to have no memory: nobody is told any more that they may be touched.
    pub(crate) fn close_all(&self) {
        self.core.pages.close_all();
    }

    /// They have it.
    pub(crate) fn open_again(&self) {
        self.core.pages.open_again();
    }

    /// The VM has ended, and with it all that the block's pages were. The caller has the whole block
    /// locked, out of all windows, all of it closed, and all bindings cleared.
    pub(crate) fn forget(&self) {
        self.bindings.store(0, Ordering::Relaxed);
        self.core.quarantine.lift(self.core.span);
        let pages = &self.core.pages;
        pages.change_poisoned(|poisoned| poisoned.forget(self.core.span));
        let Some(listeners) = self.listeners.freeze() else {
            self.record(self.core.span, self.initial);
            return;
        };
        let mut at = 0;
        let other = |at| {
            let attributes = self.attributes();
            attributes.first_run(at, self.core.span.end(), self.initial.other())
        };
        while let Some(run) = other(at) {
            at = run.end();
            let told = listeners.impose(run, self.initial, || self.record(run, self.initial));
            if let Err(error) = told {
                // Who refuses hears of it from the VMM.
                limited!(
                    error,
                    "{}: the VM is rebuilt, although {error}",
                    self.core.name
                );
            }
        }
    }

    fn not_in_it(&self, offset: u64, size: u64) -> Error {
        let flaw = match size {
            0 => "are none".to_string(),
            _ => format!("are not in its {:#x} bytes", self.core.span.end()),
        };
        Error::invalid(format!("{size:#x} bytes at offset {offset:#x} {flaw}")).of(self.name())
    }

    fn span_of(&self, offset: u64, size: u64) -> Result<Span<Offset>> {
        let Some(span) = Span::new(Offset(offset), size) else {
            let flaw = Span::<Offset>::flaw(offset, size);
            let what = format!("{size:#x} bytes at offset {offset:#x} {flaw}");
            return Err(Error::invalid(what).of(self.name()));
        };
        if !self.core.span.contains(&span) {
            return Err(self.not_in_it(offset, size));
        }
        Ok(span)
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        let upkeep = &self.core.machine.upkeep;
        self.chores().iter().for_each(|chore| upkeep.remove(chore));
        self.unbind_all();
        // By what was done to this block, not to its VM: who ended or detached that may have missed it.
        self.merge_runs();
    }
}
