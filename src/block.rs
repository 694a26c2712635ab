// SPDX-License-Identifier: MIT OR Apache-2.0
//! One backend instance: its planes, attributes, windows and listeners.

mod config;
mod discard;
mod erase;
mod merge;
mod place;
mod poison;
mod telling;

pub use config::{BackingChoice, BlockConfig, ConvertUnit};

use crate::attributes::{Attribute, Attributes};
use crate::convert;
use crate::dma::{DmaPath, DmaSplit, StrategyKind, Window, WindowConfig, Withdrawal, PIECE};
use crate::error::{Error, Result};
use crate::listeners::{Listener, ListenerId, Listeners};
use crate::plane::{preallocate, Backing, Planes, PlanesConfig};
use crate::range_locks::{addresses, RangeGuard};
use crate::run_set::{RunSet, Spans};
use crate::stats::{BlockCounters, BlockStats};
use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use crate::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use crate::throttle::limited;
use crate::units::{Gpa, Offset, Span, PAGE_SIZE};
use crate::vm::Vm;
use log::{error, info};
use std::os::fd::BorrowedFd;

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
    dma_path: DmaPath,
    dma_split: DmaSplit,
    planes: Arc<Planes>,
    attributes: RwLock<Attributes>,
    /// How many bytes the VMM may not touch, private or poisoned, or [`ALL_CLOSED`]: for the one question
    /// that every access of the VMM asks. Changes with `attributes` locked for writing.
    closed_bytes: AtomicU64,
    quarantine: Mutex<RunSet>,
    poisoned: poison::Poisoned,
    /// Its file may be closed as it is: see [`merge`].
    merged: AtomicBool,
    /// How many there are: to be told without waiting for those who change them.
    bindings: AtomicU64,
    /// Replaced as a whole, so that who goes through it keeps nobody from that: it shows him all windows
    /// that have a page of the ranges that he holds, since those come and go with theirs locked.
    windows: Mutex<Arc<[Arc<Window>]>>,
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
        let block = Arc::new(Self {
            vm: vm.clone(),
            number: vm.number_block(),
            name: config.name.clone(),
            span,
            initial: config.initial,
            confidential: config.confidential,
            convert_unit: config.convert_unit,
            max_runs: config.max_runs(backing),
            dma_path: config.dma,
            dma_split: config.dma_split,
            planes: Arc::new(planes),
            closed_bytes: AtomicU64::new(attributes.private_bytes()),
            attributes: RwLock::new(attributes),
            quarantine: Mutex::default(),
            poisoned: poison::Poisoned::new(backing),
            merged: AtomicBool::new(false),
            bindings: AtomicU64::new(0),
            windows: Mutex::new(Arc::new([])),
            listeners: Listeners::default(),
            counters: Arc::default(),
        });
        vm.register(&block);
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
    /// As [`Vm::convert`]. Pieces before the one that failed are done; in that one, bytes may be gone. Poisoned pages that no fresh
    /// memory was to be had for stay poisoned, all others are reset all the same, and the error is the
    /// errno of freeing or allocating memory. They keep their attribute: a kernel that converts one
    /// would touch it. EIO if some were lost only meanwhile.
    pub fn reset(self: &Arc<Self>) -> Result<()> {
        let replaced = self.replace_lost();
        self.lock_and_heal();
        let reset = convert::reset(self);
        self.lock_and_heal();
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
                return Err(Error::Busy("the VM has no file until it is rebuilt".into()));
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
        let private = self.attributes().runs(offsets, Attribute::Private);
        for (done, run) in private.iter().enumerate() {
            let run_gpas = offsets.translate(run, gpas.start());
            if let Err(error) = self.tell_vm(run_gpas, Attribute::Private) {
                if done > 0 {
                    self.forget_in_vm(gpas);
                }
                return Err(error);
            }
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

    /// Shows a part of the block to the devices of an IOAS: all of its shared pages now, and from
    /// now on whatever becomes shared. Waits for conversions of that part.
    ///
    /// # Errors
    /// EINVAL for a range that isn't in the block; ENOENT if there is no such IOAS, ENOTTY if `iommufd`
    /// is none; EEXIST if the IOAS has something there; ENOTSUP if `dma` or `dma-split` insists on a way
    /// that the kernel refuses, or the memory is out of the direct map; ENOMEM when pages can't be pinned
    /// (RLIMIT_MEMLOCK counts them). Nothing is mapped then. Should the kernel refuse even to take back
    /// what was mapped, those pages can't become private, and the next window and
    /// [`Block::check_unused`] try again.
    pub fn add_window(self: &Arc<Self>, config: &WindowConfig) -> Result<Arc<Window>> {
        if !self.planes.is_in_direct_map() {
            return Err(Error::Unsupported(format!(
                "{}: direct-map=off: the kernel lets nobody pin such memory, so no passed-through \
                 device can reach it; leave direct-map on, or use a device that copies (virtio, \
                 vhost-user)",
                self.name
            )));
        }
        let parts = crate::dma::WindowParts {
            kernel: self.vm.kernel().clone(),
            planes: self.planes.clone(),
            counters: self.counters.clone(),
            confidential: self.confidential,
            split: self.dma_split,
            // What an earlier window found out holds for this one: it is the same file.
            path: self.dma_path(),
        };
        let span = config.span_in(self.span)?;
        // One that could not be made may be where this one is to be.
        if let Err(error) = self.close_abandoned() {
            limited!(warn, "{error}");
        }
        let _range = self.vm.ranges.lock((self.number, self.lock_hull(span)));
        let window = Window::new(parts, config).map_err(|error| match error.errno() {
            libc::ENOMEM => self.explain(error),
            _ => error,
        })?;
        let shown = self.admissible_runs(span);
        if shown.is_empty() {
            // Else the guest's first conversions would find out.
            window.check_ioas()?;
        }
        let window = Arc::new(window);
        // Listed before anything is mapped: whatever goes wrong, conversions find what is left.
        self.change_windows(|windows| windows.push(window.clone()));
        for run in shown {
            if let Err(error) = window.admit(run) {
                self.close_window(&window).unwrap_or_else(|error| {
                    limited!(error, "{}: {error}", self.name);
                    window.abandon();
                });
                return Err(self.explain(error));
            }
        }
        // Whatever kept devices from it may be over.
        self.try_to_heal(span);
        Ok(window)
    }

    /// Closes windows that could not be made and were not to be closed then.
    fn close_abandoned(&self) -> Result<()> {
        let windows = self.windows();
        let mut result = Ok(());
        for window in windows.iter().filter(|window| window.is_abandoned()) {
            let _range = self.lock_window(window, None);
            let closed = self.close_window(window).map_err(|error| {
                Error::Busy(format!(
                    "{}: a DMA window that could not be made is still there: {error}",
                    self.name
                ))
            });
            result = result.and(closed);
        }
        result
    }

    /// Makes a window show another part of the block, as when a guest's address map changes around
    /// it. What both parts have in common stays mapped all the time and costs nothing, except where
    /// it is one kernel area with what goes. `config` names the same IOAS and access, and the same
    /// IOVA for each offset. Waits for conversions of either part.
    ///
    /// # Errors
    /// EINVAL if it isn't a window of this block, or `config` differs in more than the range; else as
    /// [`Block::add_window`]. The window shows what it showed before, or, if the kernel refused to
    /// unmap, both parts. What it can't show again is quarantined, until it converts, is asked for, a
    /// window comes, goes or is reshaped there, or the block is reset.
    pub fn reshape_window(&self, window: &Arc<Window>, config: &WindowConfig) -> Result<()> {
        let new = config.span_in(self.span)?;
        let _range = self.lock_window(window, Some(new));
        if !self.windows().iter().any(|w| Arc::ptr_eq(w, window)) {
            return Err(self.no_such_window());
        }
        let shared = self.admissible_runs(new);
        let old = window.span();
        match window.reshape(config, &shared) {
            Ok(()) => {
                self.try_to_heal(old);
                self.try_to_heal(new);
                Ok(())
            }
            Err(error) => {
                self.mend(window);
                Err(self.explain(error))
            }
        }
    }

    /// Puts back what a window lost when it could not be reshaped, or quarantines that.
    fn mend(&self, window: &Window) {
        for run in self.admissible_runs(window.span()) {
            for part in window.missing(run) {
                if let Err(error) = window.admit(part) {
                    limited!(error, "{}: {error}", self.name);
                    self.quarantine_span(part);
                }
            }
        }
    }

    /// Locks all that a window shows, and with it `also`.
    fn lock_window(&self, window: &Window, also: Option<Span<Offset>>) -> RangeGuard<'_> {
        loop {
            let shown = window.span();
            // What is quarantined leaves other windows, too, with its unit.
            let range = |span| (self.number, self.lock_hull(span));
            let mut ranges = vec![range(shown)];
            ranges.extend(also.map(range));
            let guard = self.vm.ranges.lock(ranges);
            // Waiting, it may have been reshaped.
            if window.span() == shown {
                return guard;
            }
        }
    }

    /// Closes a window of the list. If areas of it are left, so is the window: conversions to
    /// private go on having to take their pages out of it first. The caller holds its range.
    fn close_window(&self, window: &Arc<Window>) -> Result<()> {
        window.close()?;
        self.change_windows(|windows| windows.retain(|w| !Arc::ptr_eq(w, window)));
        Ok(())
    }

    /// Ends a window: devices reach nothing through it any more. Waits for conversions of its part.
    ///
    /// # Errors
    /// EINVAL if it isn't a window of this block. The kernel's errno if it refused to unmap: the
    /// window stays, takes nothing in any more, and its pages can't become private until they are
    /// out of it. Try again once whoever holds them in the IOAS is gone.
    pub fn remove_window(&self, window: &Arc<Window>) -> Result<()> {
        let _range = self.lock_window(window, None);
        if !self.windows().iter().any(|w| Arc::ptr_eq(w, window)) {
            return Err(self.no_such_window());
        }
        self.close_window(window)?;
        // It may have been the one that refused what others can have.
        self.try_to_heal(window.span());
        Ok(())
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
            bookkeeping_bytes: books + attributes.footprint() + quarantine.footprint(),
            quarantines: counters.quarantines.get(),
            huge_pages_whole: whole,
            huge_pages_split: split,
            huge_page_splits: counters.huge_page_splits.get(),
            huge_page_merges: counters.huge_page_merges.get(),
            resumed: counters.resumed.get(),
            runs_refused: counters.runs_refused.get(),
            bytes_poisoned: self.poisoned.bytes(),
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

    pub(crate) fn convert_unit(&self) -> ConvertUnit {
        self.convert_unit
    }

    pub(crate) fn max_runs(&self) -> u64 {
        self.max_runs
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
        self.quarantine().remove(self.span);
        self.poisoned.forget(self.span);
        let listeners = self.listeners.freeze();
        let changes = self.attributes().changes(self.span, self.initial);
        for run in changes {
            let Some(listeners) = &listeners else {
                self.record(run, self.initial);
                continue;
            };
            let told = listeners.impose(run, self.initial, || self.record(run, self.initial));
            if let Err(error) = told {
                // Who refuses hears of it from the VMM.
                error!("{}: the VM is rebuilt, although {error}", self.name);
            }
        }
    }

    /// Takes `span` out of every window. Every one is tried.
    pub(crate) fn withdraw(&self, span: Span<Offset>) -> Result<()> {
        let mut lost = Vec::new();
        let mut result = Ok(());
        for window in self.windows().iter() {
            let withdrawn = window.withdraw(span).map_err(|withdrawal| {
                lost.extend(withdrawal.lost);
                self.explain(withdrawal.error)
            });
            result = result.and(withdrawn);
        }
        for span in lost {
            self.quarantine_span(span);
        }
        result
    }

    /// Whether some window pins every page of `span` that it maps: then mapping it allocates.
    pub(crate) fn pins(&self, span: Span<Offset>) -> bool {
        self.windows().iter().any(|window| window.pins(span))
    }

    /// Puts `span` back into every window, but for what is quarantined or poisoned. Every window is
    /// tried.
    pub(crate) fn admit(&self, span: Span<Offset>) -> Result<()> {
        let windows = self.windows();
        let mut result = Ok(());
        for part in self.dma_parts(span) {
            for window in windows.iter() {
                let admitted = window.admit(part).map_err(|error| self.explain(error));
                result = result.and(admitted);
            }
        }
        result
    }

    /// Puts all of `span` that devices may reach back into every window. What can't be is quarantined.
    pub(crate) fn readmit(&self, span: Span<Offset>) {
        if let Err(error) = self.try_readmit(span) {
            limited!(error, "{error}");
        }
    }

    /// The same, for who can say that something is quarantined. Every run is tried, in pieces: one that
    /// can't be mapped keeps no other from devices.
    pub(crate) fn try_readmit(&self, span: Span<Offset>) -> Result<()> {
        let mut result = Ok(());
        let runs = self.admissible_runs(span).into_iter();
        for run in runs.flat_map(|run| run.pieces(PIECE)) {
            let admitted = self.admit(run);
            if admitted.is_err() {
                self.quarantine_span(run);
            }
            result = result.and(admitted);
        }
        result
    }

    /// Ends what is wrong with those pages of `span` that have `attribute` and are quarantined: devices
    /// get shared ones, and lose what they may still have behind private ones. Every run of them is
    /// tried; one that the kernel still refuses stays quarantined.
    ///
    /// The caller holds the hull, so that attributes stay what they are.
    pub(crate) fn heal(&self, span: Span<Offset>, attribute: Attribute) -> Result<()> {
        // At the end of the VM pages are shared that no guest has shown.
        if !self.is_quarantined(span) || self.vm.check_attached().is_err() {
            return Ok(());
        }
        let mut result = Ok(());
        for part in self.quarantined_in(span) {
            let runs = self.attributes().runs(part, attribute);
            for run in runs {
                result = result.and(match attribute {
                    Attribute::Shared => {
                        self.lift_quarantine(run);
                        self.try_readmit(run)
                    }
                    Attribute::Private => self.withdraw(run).map(|()| {
                        self.lift_quarantine(run);
                        self.release(self.releasable(run, Attribute::Shared), Attribute::Shared);
                    }),
                });
            }
        }
        result
    }

    fn lock_and_heal(&self) {
        let _range = self.vm.ranges.lock((self.number, self.span));
        self.try_to_heal(self.span);
    }

    /// All of them, for who has no error to give.
    fn try_to_heal(&self, span: Span<Offset>) {
        for attribute in [Attribute::Private, Attribute::Shared] {
            if let Err(error) = self.heal(span, attribute) {
                limited!(error, "{error}");
            }
        }
    }

    /// Frees what the plane of `attribute` has for `span`, which no page of it has, if the other plane
    /// is another file. Should that fail, the next conversion there tries again: no guest can tell.
    pub(crate) fn release(&self, span: Span<Offset>, attribute: Attribute) {
        if self.backing() == Backing::InPlace {
            return;
        }
        if let Err(error) = self.planes.release(span, attribute) {
            self.counters.release_failures.add(1);
            self.vm.complain(|| format!("double memory: {error}"));
        }
    }

    /// Nobody may reach `span` by DMA until it converts or is [healed](Block::heal): an undo failed.
    /// Where the kernel refuses even to unmap, the span can't become private either, since that too
    /// unmaps it first. What it takes along of its unit is quarantined as well.
    ///
    /// In an ordinary VM, whose pages are never to be kept from devices, it is what some window lacks;
    /// others keep it.
    pub(crate) fn quarantine_span(&self, span: Span<Offset>) {
        let mut spans = vec![span];
        while let Some(span) = spans.pop() {
            self.quarantine().insert(span);
            self.counters.quarantines.add(1);
            self.vm.tell_quarantine(|| {
                let reach = match self.confidential {
                    true => "no device reaches it until it converts again",
                    false => "a device does not reach it until the VM is reset",
                };
                format!("{}: {span} is quarantined: {reach}", self.name)
            });
            if !self.confidential {
                return;
            }
            for window in self.windows().iter() {
                if let Err(Withdrawal { error, lost }) = window.withdraw(span) {
                    self.vm.tell_quarantine(|| {
                        format!("{}: but for one DMA window: {error}", self.name)
                    });
                    let known = self.quarantine();
                    spans.extend(lost.into_iter().flat_map(|lost| known.outside(lost)));
                }
            }
        }
    }

    /// Whether a page of `span` is quarantined.
    pub(crate) fn is_quarantined(&self, span: Span<Offset>) -> bool {
        self.quarantine().touches(span)
    }

    pub(crate) fn quarantined_in(&self, span: Span<Offset>) -> Spans<Offset> {
        self.quarantine().inside(span)
    }

    /// `span` has converted: what was wrong with it is over.
    pub(crate) fn lift_quarantine(&self, span: Span<Offset>) {
        self.quarantine().remove(span);
    }

    fn dma_parts(&self, span: Span<Offset>) -> Spans<Offset> {
        let parts = self.quarantine().outside(span);
        if self.poisoned.bytes() == 0 {
            return parts;
        }
        let sound = |part| self.poisoned.outside(part, Attribute::Shared);
        parts.into_iter().flat_map(sound).collect()
    }

    /// The parts of `span` that devices may reach: shared, and neither quarantined nor poisoned.
    pub(crate) fn admissible_runs(&self, span: Span<Offset>) -> Spans<Offset> {
        if self.vm.is_detached() {
            return Spans::new();
        }
        let shared = self.attributes().runs(span, Attribute::Shared);
        shared
            .into_iter()
            .flat_map(|run| self.dma_parts(run))
            .collect()
    }

    fn no_such_window(&self) -> Error {
        Error::Invalid(format!(
            "{}: that DMA window is not one of this block",
            self.name
        ))
    }

    fn quarantine(&self) -> MutexGuard<'_, RunSet> {
        self.quarantine
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Its windows at this moment. Who is the last to have one that has been closed meanwhile ends it.
    fn windows(&self) -> Arc<[Arc<Window>]> {
        self.windows_locked().clone()
    }

    fn change_windows(&self, change: impl FnOnce(&mut Vec<Arc<Window>>)) {
        let mut windows = self.windows_locked();
        let mut changed = windows.to_vec();
        change(&mut changed);
        // Ended after the lock, should it be the last of some window.
        let before = std::mem::replace(&mut *windows, changed.into());
        drop(windows);
        drop(before);
    }

    fn windows_locked(&self) -> MutexGuard<'_, Arc<[Arc<Window>]>> {
        self.windows.lock().unwrap_or_else(PoisonError::into_inner)
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

    /// Adds to an error of mapping what its user can do about it.
    fn explain(&self, error: Error) -> Error {
        let Error::Kernel { doing, call } = error else {
            return error;
        };
        match (call.errno, self.dma_path, self.backing()) {
            (libc::EINVAL, DmaPath::Fd, Backing::InPlace) => Error::Unsupported(format!(
                "{}: {doing}: {call}: this kernel can't map a {} block for devices by fd; leave \
                 dma=auto",
                self.name,
                self.backing()
            )),
            (libc::ENOMEM, ..) => Error::Kernel {
                doing: format!(
                    "{}: {doing} (pinned memory counts against RLIMIT_MEMLOCK: see ulimit -l)",
                    self.name
                ),
                call,
            },
            _ => Error::Kernel {
                doing: format!("{}: {doing}", self.name),
                call,
            }
            .of_iommufd(),
        }
    }
}

impl Drop for Block {
    fn drop(&mut self) {
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
