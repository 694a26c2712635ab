// SPDX-License-Identifier: MIT OR Apache-2.0
//! One backend instance: its planes, attributes, windows and listeners.

mod config;
mod discard;
mod erase;
mod heal;
mod merge;
mod place;
mod poison;
mod release;
mod telling;
mod unhealed;
mod windows;

pub use config::{BackingChoice, BlockConfig, ConvertUnit};

use crate::attributes::{Attribute, Attributes};
use crate::convert;
use crate::dma::{DmaPath, DmaSplit, StrategyKind, Window, PIECE};
use crate::error::{Error, Result};
use crate::listeners::{Listener, ListenerId, Listeners};
use crate::plane::{preallocate, Backing, Planes, PlanesConfig};
use crate::range_locks::{addresses, RangeGuard};
use crate::run_set::RunSet;
use crate::stats::{BlockCounters, BlockStats};
use crate::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use crate::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use crate::throttle::limited;
use crate::units::{Gpa, Offset, Span, PAGE_SIZE};
use crate::upkeep::Chore;
use crate::vm::Vm;
use log::info;
use std::os::fd::BorrowedFd;

use unhealed::Unhealed;

/// Of [`Block::check_access`]: nothing may be touched.
const ALL_CLOSED: u64 = u64::MAX;

/// What KVM_SET_USER_MEMORY_REGION2 needs to know for a memory slot in address space 0.
///
/// Other address spaces (x86's SMM) get a plain slot at the same address: KVM refuses to bind an
/// offset twice, and takes the pages from the mapping just as well.
#[derive(Clone, Copy, Debug)]
pub struct Memslot<'a> {
    /// `userspace_addr`.
    pub userspace_addr: *mut u8,
    /// `guest_memfd`.
    pub guest_memfd: BorrowedFd<'a>,
    /// `guest_memfd_offset`, in bytes.
    pub guest_memfd_offset: u64,
}

/// Guest memory of one size, on files of its own, bound to any number of guest physical addresses.
///
/// Dropping the last reference to a block and its [`Window`]s ends them and its bindings and frees
/// its memory; a memory slot that still uses it must be gone by then.
#[derive(Debug)]
pub struct Block {
    vm: Arc<Vm>,
    number: u64,
    name: String,
    span: Span<Offset>,
    initial: Attribute,
    confidential: bool,
    convert_unit: ConvertUnit,
    max_runs: u64,
    max_request: u64,
    dma_path: DmaPath,
    dma_split: DmaSplit,
    planes: Arc<Planes>,
    releaser: Arc<release::Releaser>,
    healer: Arc<heal::Healer>,
    attributes: RwLock<Attributes>,
    /// How many bytes the VMM may not touch, private or poisoned, or [`ALL_CLOSED`]: for the one question
    /// that every access of the VMM asks. Changes with `attributes` locked for writing.
    closed_bytes: AtomicU64,
    quarantine: Mutex<RunSet>,
    /// Bytes of it: most often there are none, and every conversion asks.
    quarantined: AtomicU64,
    unhealed: Unhealed,
    poisoned: poison::Poisoned,
    /// Its file may be closed as it is: see [`merge`].
    merged: AtomicBool,
    /// How many there are: to be told without waiting for those who change them.
    bindings: AtomicU64,
    /// Replaced as a whole, so that who goes through it keeps nobody from that: it shows him all windows
    /// that have a page of the ranges that he holds, since those come and go with theirs locked.
    windows: Mutex<Arc<[Arc<Window>]>>,
    /// How many there are: who has a range locked need not look for those of its pages if there are none.
    window_count: AtomicUsize,
    pub(crate) listeners: Listeners,
    pub(crate) counters: Arc<BlockCounters>,
}

impl Block {
    /// Creates a block in `vm`. Whatever fails, nothing is left behind.
    ///
    /// # Errors
    /// EBUSY while the VM is detached.
    /// EINVAL or ENOTSUP for a configuration that makes no sense, that this version doesn't offer
    /// or that the kernel can't serve: the sentence says which, and what to do. Else the errno of
    /// creating or mapping the files (ENOMEM, EMFILE, …).
    pub fn new(vm: &Arc<Vm>, config: &BlockConfig) -> Result<Arc<Self>> {
        // The name goes into messages of one line.
        let config = &BlockConfig {
            name: config.name.replace(char::is_control, "?"),
            ..config.clone()
        };
        let span = config.check()?;
        // A VM isn't detached in the middle of this, and finds the block afterwards.
        let _kept = vm.keep();
        vm.check_attached()?;
        let backing = config.backing_on(&vm.probe())?;
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
        let planes = Planes::new(vm.kernel().clone(), vm.fd(), &planes)?;
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
        let attributes = Attributes::new(span, config.initial, config.hugetlb);
        let planes = Arc::new(planes);
        let number = vm.number_block();
        let counters = Arc::default();
        let releaser = Self::releaser(&vm.ranges, number, &planes, &counters);
        let block = Arc::new_cyclic(|block| Self {
            vm: vm.clone(),
            number,
            name: config.name.clone(),
            span,
            initial: config.initial,
            confidential: config.confidential,
            convert_unit: config.convert_unit,
            max_runs: config.max_runs(backing),
            max_request: config.max_request(),
            dma_path: config.dma,
            dma_split: config.dma_split,
            planes,
            releaser,
            healer: heal::Healer::of(block),
            closed_bytes: AtomicU64::new(attributes.private_bytes()),
            attributes: RwLock::new(attributes),
            quarantine: Mutex::default(),
            quarantined: AtomicU64::new(0),
            unhealed: Unhealed::default(),
            poisoned: poison::Poisoned::new(backing),
            merged: AtomicBool::new(false),
            bindings: AtomicU64::new(0),
            windows: Mutex::new(Arc::new([])),
            window_count: AtomicUsize::new(0),
            listeners: Listeners::default(),
            counters,
        });
        vm.budget.allow(block.max_request);
        vm.register(&block);
        vm.upkeep.add(block.releaser.clone());
        vm.upkeep.add(block.healer.clone());
        // Schedules do without the thread.
        let looked_after = !block.planes.may_keep(Attribute::Shared) || vm.upkeep.start();
        if !looked_after && !cfg!(feature = "shuttle") {
            block.planes.keep_nothing();
        }
        Ok(block)
    }

    /// What messages call it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// How its halves are kept.
    pub fn backing(&self) -> Backing {
        self.planes.backing()
    }

    /// All of its offsets.
    pub fn span(&self) -> Span<Offset> {
        self.span
    }

    /// Where its shared bytes are mapped: as long as the block lives, page aligned. In a split
    /// block the shared address of a private page reads and writes memory that the guest never
    /// sees: ask [`Block::check_access`] first.
    pub fn host(&self) -> *mut u8 {
        self.planes.mapping().host()
    }

    /// The file with the bytes of pages that have `attribute`. In-place it is one file.
    pub fn file(&self, attribute: Attribute) -> BorrowedFd<'_> {
        self.planes.file(attribute)
    }

    /// How its windows are mapped, if it has any; they can differ when their IOASes do, and this is
    /// the oldest one's.
    pub fn strategy(&self) -> Option<StrategyKind> {
        self.windows().first().map(|window| window.strategy())
    }

    /// How its windows name memory; [`DmaPath::Auto`] while no window has found out.
    pub fn dma_path(&self) -> DmaPath {
        let windows = self.windows();
        windows
            .iter()
            .map(|window| window.path())
            .find(|&path| path != DmaPath::Auto)
            .unwrap_or(self.dma_path)
    }

    /// The memory slot that shows the block from `offset` on.
    ///
    /// # Errors
    /// EINVAL if the offset isn't page aligned or isn't in the block; EBUSY while the VM is
    /// detached.
    pub fn memslot(&self, offset: u64) -> Result<Memslot<'_>> {
        self.vm.check_attached()?;
        let rest = self.span_of(offset, self.span.end().saturating_sub(offset))?;
        Ok(Memslot {
            userspace_addr: self.host().wrapping_add(rest.first() as usize),
            guest_memfd: self.file(Attribute::Private),
            guest_memfd_offset: rest.first(),
        })
    }

    /// Fills each page's memory in the plane that its attribute selects, with `threads` threads (0
    /// counts as 1); poisoned pages are left out. Memory is there afterwards; whether it has been cleared already depends on which
    /// way of filling it was the quicker one. No conversion runs in the block meanwhile. On failure
    /// part of it is filled.
    ///
    /// # Errors
    /// ENOMEM or ENOSPC when there isn't enough, EFAULT when a page can't be touched, EBUSY while the
    /// VM is detached.
    pub fn preallocate(&self, threads: usize) -> Result<()> {
        let _range = self.vm.ranges.lock((self.number, self.span));
        self.vm.check_attached()?;
        let attributes = self.attributes();
        let runs: Vec<_> = [Attribute::Shared, Attribute::Private]
            .into_iter()
            .flat_map(|attribute| {
                let runs = attributes.runs(self.span, attribute).into_iter();
                let sound = runs.flat_map(move |run| self.poisoned.outside(run, attribute));
                sound.map(move |run| (run, attribute))
            })
            .collect();
        drop(attributes);
        preallocate(&self.planes, &runs, threads)
    }

    /// Makes every page what it was at first, as a VM's reset asks. Pages that become shared lose
    /// their bytes before anybody can see them, in place too, where so do shared pages of a huge page
    /// that has a private part; DMA windows follow. No vCPU may run. Waits for conversions in the
    /// block. It works in pieces, so that the block's memory is never needed twice; shared memory is
    /// not reserved, but for huge pages. Poisoned pages get fresh memory first, and devices get at last
    /// what is quarantined; what they can't be given even now stays so, which is no error of a reset.
    ///
    /// # Errors
    /// As [`Vm::convert`]. All pieces are tried, unless somebody holds pages in many of them: what could be done is
    /// done, and where it failed, bytes may be gone. Poisoned pages that no fresh
    /// memory was to be had for stay poisoned, all others are reset all the same, and the error is the
    /// errno of freeing or allocating memory. They keep their attribute: a kernel that converts one
    /// would touch it. EIO if some were lost only meanwhile.
    pub fn reset(self: &Arc<Self>) -> Result<()> {
        self.release_pending();
        let replaced = self.replace_lost();
        self.lock_and_heal();
        let reset = convert::reset(self);
        // In an ordinary block nothing has changed since.
        if self.confidential {
            self.lock_and_heal();
        }
        reset?;
        replaced?;
        // What was lost only now was left out as well.
        self.check_sound(self.span)
    }

    /// The attribute of the page at `offset`, and the offset where the run of pages with the same
    /// attribute ends.
    ///
    /// # Errors
    /// EINVAL if the offset isn't in the block.
    pub fn run_at(&self, offset: u64) -> Result<(Attribute, u64)> {
        self.check_offset(offset)?;
        Ok(self.attributes().run_at(offset))
    }

    fn check_offset(&self, offset: u64) -> Result<()> {
        if offset < self.span.end() {
            return Ok(());
        }
        Err(Error::Invalid(format!(
            "{}: offset {offset:#x} is beyond its {:#x} bytes",
            self.name,
            self.span.end()
        )))
    }

    /// How large a mapping may be that holds the page at `offset` and pages of one attribute only:
    /// log2 of the pages in the largest naturally aligned range of the block around it. Of this
    /// moment, unless a listener asks about its own range.
    ///
    /// # Errors
    /// EINVAL if the offset isn't in the block, EIO if the page is poisoned.
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
        Ok((1..self.span.end().ilog2() - PAGE_SIZE.ilog2() + 1)
            .take_while(fits)
            .last()
            .unwrap_or(0))
    }

    /// Asks whether the VMM may touch `size` bytes at `offset` by the mapping: all of them are
    /// shared, and none is poisoned. One atomic load while the block has no such page.
    ///
    /// The answer is of this moment: a conversion may follow at once.
    ///
    /// # Errors
    /// EACCES if a page is private; it is counted. EIO if one is poisoned. EBUSY while the VM is
    /// detached. EINVAL beyond the block.
    pub fn check_access(&self, offset: u64, size: u64) -> Result<()> {
        let end = offset
            .checked_add(size)
            .filter(|&end| end <= self.span.end())
            .ok_or_else(|| self.not_in_it(offset, size))?;
        match self.closed_bytes.load(Ordering::Acquire) {
            _ if size == 0 => return Ok(()),
            0 => return Ok(()),
            ALL_CLOSED => {
                self.vm.check_has_file()?;
                return Err(self.not_shown_again());
            }
            _ => {}
        }
        let page = PAGE_SIZE - 1;
        let pages = Span::between(offset & !page, ((end - 1) | page) + 1);
        if self.attributes().has_private(pages) {
            self.counters.access_refused.add(1);
            return Err(Error::Denied(format!(
                "{}: {size:#x} bytes at offset {offset:#x} are private to the guest",
                self.name
            )));
        }
        self.check_sound(pages)
    }

    /// Shows `size` bytes from `offset` at `gpa`: tells the kernel their attributes. Their memory
    /// slot may exist or follow. Waits for conversions of these pages.
    ///
    /// # Errors
    /// EINVAL for a range that isn't in the block; EEXIST if an address or an offset is bound
    /// already; EBUSY while the VM is detached; the errno of KVM_SET_MEMORY_ATTRIBUTES. Nothing is
    /// bound then, and the addresses are shared for the kernel, or will be when they are bound next.
    pub fn bind(self: &Arc<Self>, offset: u64, size: u64, gpa: u64) -> Result<()> {
        let offsets = self.span_of(offset, size)?;
        let gpas = self.gpas(gpa, size)?;
        let _ranges = self.lock_binding(offsets, gpas);
        self.vm.check_attached()?;
        // Who finds it before the VM has been told wants its range first.
        self.vm.bindings().insert(self, offsets, gpas)?;
        self.warn_of_small_mappings(offsets, gpas);
        if let Err(error) = self.tell_bound(offsets, gpas) {
            self.vm.bindings().remove(gpas.start());
            return Err(error);
        }
        self.bindings.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// Tells the VM what attributes a new binding has. On failure its addresses are shared, or noted.
    fn tell_bound(&self, offsets: Span<Offset>, gpas: Span<Gpa>) -> Result<()> {
        // What an earlier binding could not take back is none of this one's.
        let left = self.vm.bindings().left_private(gpas);
        for left in left {
            self.share_in_vm(left)?;
        }
        let mut at = offsets.first();
        let private = |at| {
            let attributes = self.attributes();
            attributes.first_run(at, offsets.end(), Attribute::Private)
        };
        while let Some(run) = private(at) {
            let run_gpas = offsets.translate(&run, gpas.start());
            if let Err(error) = self.tell_vm(run_gpas, Attribute::Private) {
                if at > offsets.first() {
                    self.forget_in_vm(gpas);
                }
                return Err(error);
            }
            at = run.end();
        }
        Ok(())
    }

    /// KVM maps a huge page as one where file and guest address are aligned alike.
    fn warn_of_small_mappings(&self, offsets: Span<Offset>, gpas: Span<Gpa>) {
        let page = match (self.backing(), self.planes.huge_page()) {
            (Backing::InPlace, Some(page)) => page,
            _ => return,
        };
        if (offsets.first() ^ gpas.first()) & (page - 1) != 0 {
            limited!(
                warn,
                "{}: {offsets} is bound at {gpas}, which is not aligned to {page:#x} bytes as the \
                 offset is: the guest's private memory there is mapped by 4 KiB pages",
                self.name
            );
        }
    }

    /// Ends a binding: these very numbers were bound. For the kernel its addresses are shared
    /// afterwards, so its memory slot is gone: a vCPU would find shared memory where it left a
    /// private page. Waits for conversions of these pages.
    ///
    /// # Errors
    /// EINVAL if there is no such binding; the errno of KVM_SET_MEMORY_ATTRIBUTES, in which case the
    /// binding has ended all the same, and the kernel holds its addresses for private until some are
    /// bound again: that makes them shared first, or fails.
    pub fn unbind(&self, offset: u64, size: u64, gpa: u64) -> Result<()> {
        let offsets = self.span_of(offset, size)?;
        let gpas = self.gpas(gpa, size)?;
        let _ranges = self.lock_binding(offsets, gpas);
        if !self.vm.bindings().has(self, offsets, gpas.start()) {
            return Err(Error::Invalid(format!(
                "{}: {offsets} isn't bound at {gpas}",
                self.name
            )));
        }
        self.vm.bindings().remove(gpas.start());
        self.bindings.fetch_sub(1, Ordering::Relaxed);
        if self.attributes().has_private(offsets) {
            self.share_in_vm(gpas)?;
        }
        Ok(())
    }

    /// Locks what a binding has on either side: its pages against conversions, and its addresses
    /// against who binds or unbinds another block there, of which the VM must hear one after the other.
    fn lock_binding(&self, offsets: Span<Offset>, gpas: Span<Gpa>) -> RangeGuard<'_> {
        let pages = (self.number, self.lock_hull(offsets));
        self.vm.ranges.lock(vec![pages, addresses(gpas)])
    }

    /// Tells `listener` of every conversion in this block from now on. Waits for those under way, of
    /// which it would hear nothing.
    pub fn add_listener(&self, listener: Arc<dyn Listener>) -> ListenerId {
        let _range = self.vm.ranges.lock((self.number, self.span));
        self.listeners.add(listener)
    }

    /// Tells it no more; waits until calls under way have returned.
    ///
    /// # Errors
    /// EINVAL if it isn't a listener of this block.
    pub fn remove_listener(&self, id: &ListenerId) -> Result<()> {
        if self.listeners.remove(id) {
            return Ok(());
        }
        Err(Error::Invalid(format!(
            "{}: that listener is not one of this block",
            self.name
        )))
    }

    /// Whether nothing uses the block any more; if not, what does. Windows that could not be made are
    /// closed for it, if they could not be before: waits for conversions in them.
    ///
    /// # Errors
    /// EBUSY.
    pub fn check_unused(&self) -> Result<()> {
        self.close_abandoned()?;
        let users = [
            ("bound", self.bindings.load(Ordering::Relaxed) as usize),
            ("shown in DMA windows", self.windows().len()),
            ("listened to", usize::from(!self.listeners.is_empty())),
        ];
        match users.iter().find(|(_, count)| *count != 0) {
            None => Ok(()),
            Some((how, _)) => Err(Error::Busy(format!("{}: it is still {how}", self.name))),
        }
    }

    /// Its numbers.
    pub fn stats(&self) -> BlockStats {
        let windows = self.windows();
        let mapped: Vec<(u64, u64)> = windows.iter().map(|window| window.mapped()).collect();
        let books = windows.iter().map(|window| window.footprint());
        let books: u64 = books.sum();
        let attributes = self.attributes();
        let quarantine = self.quarantine().clone();
        let (whole, split) = match self.backing() {
            Backing::Split => (0, 0),
            Backing::InPlace => (
                attributes.private_huge_pages(),
                attributes.shared_huge_pages(),
            ),
        };
        let counters = &self.counters;
        BlockStats {
            size: self.span.end(),
            bytes_private: attributes.private_bytes(),
            bytes_shared: self.span.end() - attributes.private_bytes(),
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
                + self.planes.footprint(),
            quarantines: counters.quarantines.get(),
            huge_pages_whole: whole,
            huge_pages_split: split,
            huge_page_splits: counters.huge_page_splits.get(),
            huge_page_merges: counters.huge_page_merges.get(),
            resumed: counters.resumed.get(),
            runs_refused: counters.runs_refused.get(),
            requests_refused: counters.requests_refused.get(),
            bytes_poisoned: self.poisoned.bytes(),
            double_bytes: self.planes.kept_bytes(),
            releases_cancelled: counters.releases_cancelled.get(),
            heals: counters.heals.get(),
        }
    }
}

/// For the conversions of [`convert`].
impl Block {
    pub(crate) fn vm(&self) -> &Arc<Vm> {
        &self.vm
    }

    pub(crate) fn number(&self) -> u64 {
        self.number
    }

    pub(crate) fn initial(&self) -> Attribute {
        self.initial
    }

    pub(crate) fn is_confidential(&self) -> bool {
        self.confidential
    }

    /// What to lock for a change of `span`: what the change may touch besides it. By `unit`, those
    /// are the areas in its units; a huge page of the shared plane comes and goes as a whole, and so do
    /// the pieces that windows of an ordinary block are mapped in.
    pub(crate) fn lock_hull(&self, span: Span<Offset>) -> Span<Offset> {
        let unit = match self.confidential {
            true => self.dma_split.unit().unwrap_or(PAGE_SIZE),
            false => PIECE,
        };
        let hull = span.hull(unit.max(self.planes.huge_page().unwrap_or(PAGE_SIZE)));
        hull.intersection(&self.span).unwrap_or(span)
    }

    /// What the plane of `attribute` can do without once no page of `span` has it. With a huge page
    /// at either end goes the rest of it, if that holds nothing shared and nothing that a device may
    /// still have: the page would be the device's and no longer the file's.
    ///
    /// The caller has the hull locked.
    pub(crate) fn releasable(&self, span: Span<Offset>, attribute: Attribute) -> Span<Offset> {
        let pages = self.planes.pages_around(span, attribute);
        if pages == span {
            return span;
        }
        let attributes = self.attributes();
        let quarantine = self.quarantine();
        let idle = |first, end| {
            first == end || {
                let rest = Span::between(first, end);
                attributes.is_private(rest) && !quarantine.touches(rest)
            }
        };
        let first = match idle(pages.first(), span.first()) {
            true => pages.first(),
            false => span.first(),
        };
        let end = match idle(span.end(), pages.end()) {
            true => pages.end(),
            false => span.end(),
        };
        Span::between(first, end)
    }

    /// Whether a request for `offsets` needs no look at this block's limits.
    pub(crate) fn is_usual(&self, offsets: Span<Offset>) -> bool {
        let fits = match self.convert_unit {
            ConvertUnit::Off => false,
            ConvertUnit::Bytes(PAGE_SIZE) => true,
            ConvertUnit::Bytes(unit) => offsets.is_aligned(unit),
        };
        self.confidential && fits && offsets.size_bytes() <= self.max_request
    }

    /// Whether no page of the block is quarantined or poisoned. With a range, none of it will be.
    pub(crate) fn has_nothing_wrong(&self) -> bool {
        self.quarantined.load(Ordering::Acquire) == 0 && self.poisoned.bytes() == 0
    }

    /// Whether a conversion changes all of `span`, or nothing of it; `None` if a part, or if `max_runs` would
    /// have to be looked at.
    pub(crate) fn changes_as_a_whole(
        &self,
        span: Span<Offset>,
        attribute: Attribute,
    ) -> Option<bool> {
        let attributes = self.attributes();
        let (is, end) = attributes.run_at(span.first());
        if end < span.end() {
            return None;
        }
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

    pub(crate) fn planes(&self) -> &Planes {
        &self.planes
    }

    pub(crate) fn attributes(&self) -> RwLockReadGuard<'_, Attributes> {
        self.attributes
            .read()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn attributes_mut(&self) -> RwLockWriteGuard<'_, Attributes> {
        self.attributes
            .write()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes what the kernel has just been told.
    pub(crate) fn record(&self, span: Span<Offset>, attribute: Attribute) {
        let mut attributes = self.attributes_mut();
        let whole = attributes.private_huge_pages();
        attributes.set(span, attribute);
        if self.backing() == Backing::InPlace {
            let now = attributes.private_huge_pages();
            let counters = &self.counters;
            counters.huge_page_merges.add(now.saturating_sub(whole));
            counters.huge_page_splits.add(whole.saturating_sub(now));
        }
        self.count_closed(&attributes);
    }

    /// The caller has the attributes locked for writing.
    fn count_closed(&self, attributes: &Attributes) {
        if self.closed_bytes.load(Ordering::Acquire) != ALL_CLOSED {
            self.open(attributes);
        }
    }

    fn open(&self, attributes: &Attributes) {
        let closed = attributes.private_bytes() + self.poisoned.bytes();
        self.closed_bytes.store(closed, Ordering::Release);
    }

    /// Its addresses are about to have no memory: nobody is told any more that they may be touched.
    pub(crate) fn close_all(&self) {
        let _attributes = self.attributes_mut();
        self.closed_bytes.store(ALL_CLOSED, Ordering::Release);
    }

    /// They have it.
    pub(crate) fn open_again(&self) {
        let attributes = self.attributes_mut();
        self.open(&attributes);
    }

    /// The VM has ended, and with it all that the block's pages were. The caller has the whole block
    /// locked, out of all windows, all of it closed, and all bindings cleared.
    pub(crate) fn forget(&self) {
        self.bindings.store(0, Ordering::Relaxed);
        self.lift_quarantine(self.span);
        self.poisoned.forget(self.span);
        let Some(listeners) = self.listeners.freeze() else {
            self.record(self.span, self.initial);
            return;
        };
        let mut at = 0;
        let other = |at| {
            let attributes = self.attributes();
            attributes.first_run(at, self.span.end(), self.initial.other())
        };
        while let Some(run) = other(at) {
            at = run.end();
            let told = listeners.impose(run, self.initial, || self.record(run, self.initial));
            if let Err(error) = told {
                // Who refuses hears of it from the VMM.
                limited!(error, "{}: the VM is rebuilt, although {error}", self.name);
            }
        }
    }

    fn not_in_it(&self, offset: u64, size: u64) -> Error {
        let flaw = match size {
            0 => "are none".to_string(),
            _ => format!("are not in its {:#x} bytes", self.span.end()),
        };
        Error::Invalid(format!(
            "{}: {size:#x} bytes at offset {offset:#x} {flaw}",
            self.name
        ))
    }

    fn span_of(&self, offset: u64, size: u64) -> Result<Span<Offset>> {
        let Some(span) = Span::new(Offset(offset), size) else {
            return Err(Error::Invalid(format!(
                "{}: {size:#x} bytes at offset {offset:#x} {}",
                self.name,
                Span::<Offset>::flaw(offset, size)
            )));
        };
        if !self.span.contains(&span) {
            return Err(self.not_in_it(offset, size));
        }
        Ok(span)
    }

    fn gpas(&self, gpa: u64, size: u64) -> Result<Span<Gpa>> {
        Span::new(Gpa(gpa), size).ok_or_else(|| {
            Error::Invalid(format!(
                "{}: {size:#x} bytes can't be bound at gpa {gpa:#x}: they {}",
                self.name,
                Span::<Gpa>::flaw(gpa, size)
            ))
        })
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        let chores: [Arc<dyn Chore>; 2] = [self.releaser.clone(), self.healer.clone()];
        chores.iter().for_each(|chore| self.vm.upkeep.remove(chore));
        let kept = self.vm.keep();
        // Nobody has a page of it locked any more.
        let bound = self.vm.bindings().of_block(self.number);
        for (offsets, gpas) in bound {
            let _range = self.vm.ranges.lock(addresses(gpas));
            self.vm.bindings().remove(gpas.start());
            if self.attributes().has_private(offsets) {
                self.forget_in_vm(gpas);
            }
        }
        drop(kept);
        // By what was done to this block, not to its VM: who ended or detached that may have missed it.
        self.merge_runs();
    }
}
