// SPDX-License-Identifier: MIT OR Apache-2.0
//! One KVM VM: what its kernel can do, what is bound where, and its conversions.

use crate::attributes::Attribute;
use crate::bindings::{Bindings, Segments};
use crate::block::Block;
use crate::convert;
use crate::error::{Cause, Doing, Error, Result};
use crate::faults::Echoes;
use crate::kernel::linux::Linux;
use crate::kernel::{Kernel, Probe};
use crate::range_locks::RangeLocks;
use crate::rebuild;
use crate::stats::{VmCounters, VmStats};
use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use crate::sync::{
    Arc, Instant, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, Weak,
};
use crate::throttle::{Class, Voices};
use crate::units::{pages_around, Gpa, Span, PAGE_SIZE};
use crate::upkeep::Upkeep;
use log::{info, warn};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::time::Duration;

/// How long the end of a process waits for conversions: some that meet a page that somebody holds take
/// a tenth of this.
const END_PATIENCE: Duration = Duration::from_secs(1);

/// A VM whose memory is in blocks of this library.
///
/// Lock order, outermost first: whether the VM is being rebuilt, ranges, then what is locked for
/// moments only and never across a system call: bindings, the list of blocks, and inside one block the
/// list of windows, a window's ledger, attributes, quarantine, of which none is held while another
/// block's is taken. Innermost is the lock of an iommufd context, which blocks and VMs may share.
#[derive(Debug)]
pub struct Vm {
    kernel: Arc<dyn Kernel>,
    fd: OwnedFd,
    probe: Probe,
    bindings: Mutex<Bindings>,
    /// Of the bindings.
    bindings_version: Arc<AtomicU64>,
    /// Locked for writing to detach and attach, which need all blocks there are, and for reading by who
    /// makes a block or ends one. No conversion takes it.
    rebuilding: RwLock<()>,
    pub(crate) ranges: Arc<RangeLocks>,
    /// What looks after the blocks.
    pub(crate) upkeep: Upkeep,
    pub(crate) counters: VmCounters,
    pub(crate) echoes: Echoes,
    pub(crate) budget: convert::Budget,
    /// What a guest can make us say of it.
    pub(crate) voices: Voices,
    next_block: AtomicU64,
    blocks: Mutex<Vec<Weak<Block>>>,
    /// Between [`Vm::detach`] and [`Vm::attach`]. Changes with all ranges of all blocks locked: who has
    /// one of these sees one state.
    detached: AtomicBool,
    /// How often that has changed: what was heard of memory before is not true of what is there now.
    rebuilds: AtomicU64,
    /// After [`Vm::end`]: for good.
    ended: AtomicBool,
}

impl Vm {
    /// Opens the VM behind a KVM VM file. The file is duplicated: the library's own stays valid when
    /// the caller closes its number.
    ///
    /// # Errors
    /// EBADF; ENOTTY when it isn't a KVM VM; ENOTSUP on a host whose pages are not of 4 KiB.
    pub fn new(vm_fd: RawFd) -> Result<Arc<Self>> {
        Self::on(Arc::new(Linux), vm_fd)
    }

    /// The same on a kernel of the caller's choice: the seam that tests use.
    #[cfg(any(test, feature = "fake-kernel"))]
    pub fn with_kernel(kernel: Arc<dyn Kernel>, vm_fd: RawFd) -> Result<Arc<Self>> {
        Self::on(kernel, vm_fd)
    }

    fn on(kernel: Arc<dyn Kernel>, vm_fd: RawFd) -> Result<Arc<Self>> {
        let fd = kernel
            .duplicate(vm_fd)
            .doing(|| "keeping the VM's file open".into())?;
        let page = kernel.host_page_size();
        if page != PAGE_SIZE {
            return Err(Error::Unsupported(format!(
                "this host's kernel has pages of {} KiB, and guests convert pages of 4 KiB: boot a kernel \
                 with such pages",
                page >> 10
            )));
        }
        let probe = Probe::of(&*kernel, fd.as_fd())?;
        info!("what the kernel has for this VM: {probe}");
        let bindings = Bindings::default();
        Ok(Arc::new(Self {
            kernel,
            fd,
            probe,
            bindings_version: bindings.shared_version(),
            bindings: Mutex::new(bindings),
            rebuilding: RwLock::default(),
            ranges: Arc::default(),
            upkeep: Upkeep::default(),
            counters: VmCounters::default(),
            echoes: Echoes::default(),
            budget: convert::Budget::default(),
            voices: Voices::default(),
            next_block: AtomicU64::new(0),
            blocks: Mutex::default(),
            detached: AtomicBool::new(false),
            rebuilds: AtomicU64::new(0),
            ended: AtomicBool::new(false),
        }))
    }

    /// What the kernel can do for this VM.
    pub fn probe(&self) -> Probe {
        self.probe
    }

    /// Counts since the VM was opened.
    pub fn stats(&self) -> VmStats {
        self.counters.snapshot()
    }

    /// Serves a guest's request to make `size` bytes at `gpa` shared or private.
    ///
    /// The request may cross bindings and blocks. It is done as a whole or not at all. Pages that
    /// have the attribute already cost nothing. Bytes that are no memory of a block are ignored
    /// when they are to be shared, since they are (a TDX firmware shares MMIO and holes to be
    /// safe), and refused when they are to be private.
    ///
    /// Before anything changes, pages that have the attribute already and are quarantined are healed:
    /// devices get shared ones again, and lose what they may still have behind private ones.
    ///
    /// Blocks while another request changes an overlapping range; disjoint ones run in parallel. What becomes
    /// shared in a split block has memory in both planes until the request is done: all requests together
    /// 1 GiB at most, or the largest `max_request` if that is more, and who finds no room waits for those
    /// before it.
    /// Takes the range, and calls listeners with it. Must not be called from a listener.
    ///
    /// # Errors
    /// EBUSY for a detached VM. EINVAL for a request that is empty, not page aligned, wrapping, against
    /// the block's
    /// `convert_unit`, or to make something private that can't be; ENOSPC past `max_runs` or
    /// `max_request`; ENOMEM if the library has no memory for the request; a
    /// listener's or the kernel's errno (ENOMEM, EAGAIN). Attributes, backing and DMA are then as
    /// they were, or, where undoing failed, the range is quarantined and the log says so.
    pub fn convert(&self, gpa: u64, size: u64, attribute: Attribute) -> Result<()> {
        let start = Instant::now();
        let result = convert::request(self, gpa, size, attribute);
        self.counters.requests.add(1);
        self.counters.took(start.elapsed());
        if let Err(error) = &result {
            self.counters.failures.add(1);
            // A guest chooses how often this happens.
            if let Some(note) = self.voices.pass(Class::Request) {
                warn!(
                    "a request to make gpa {gpa:#x}, {size:#x} bytes, {} failed: {error}{note}",
                    attribute.name(),
                );
            }
        }
        result
    }

    /// The host's hardware has lost memory of a guest, as KVM_RUN says (EHWPOISON): see
    /// [`Block::poison`]. Bytes that are no memory of a block are left out. Waits for conversions in the
    /// blocks.
    ///
    /// # Errors
    /// EBUSY for a detached VM; EINVAL for a range that is empty, wraps, or has no memory of a block;
    /// else as [`Block::poison`], when all that could be done is done.
    pub fn poison(&self, gpa: u64, size: u64) -> Result<()> {
        let gpas = pages_around(gpa, size).ok_or_else(|| {
            Error::Invalid(format!(
                "{size:#x} bytes at gpa {gpa:#x} are empty or wrap around"
            ))
        })?;
        self.check_not_ended()?;
        let rebuilds = self.rebuilds();
        self.check_attached()?;
        let segments = self.segments(gpas);
        if segments.is_empty() {
            return Err(Error::Invalid(format!("{gpas} is no memory of a block")));
        }
        let mut result = Ok(());
        for segment in &segments {
            result = result.and(segment.block.poison_pages(segment.offsets, rebuilds));
        }
        result
    }

    /// Lets go of a KVM VM that is about to be made anew: DMA out of all windows, all bindings ended,
    /// all guest_memfds closed, and the library's file of the VM. Blocks, windows and listeners stay,
    /// and so do the addresses of the blocks' memory, which can't be touched where it was a
    /// guest_memfd; the numbers of files stay open, but on an empty file. All pages have their first
    /// attribute again, and have lost their bytes; listeners are told of those that change.
    ///
    /// Until [`Vm::attach`], whatever needs the VM is refused: EBUSY. Blocks and windows may end,
    /// windows may come and show nothing yet. The second time nothing happens. No vCPU may run and
    /// no memory slot use the blocks. Takes all ranges: waits for all conversions.
    ///
    /// # Errors
    /// EMFILE, ENOMEM, or the errno of a window's unmap. The VM is attached then, as before; should the
    /// memory of a block not be mapped again, the error names it, and [`Block::check_access`] refuses it until a
    /// rebuild works.
    pub fn detach(&self) -> Result<()> {
        rebuild::detach(self)
    }

    /// Goes on with a new KVM VM of the same kind, whose file is duplicated: new guest_memfds at the
    /// old addresses and under the old numbers, and windows filled again. Whatever else is at these
    /// addresses by then is replaced. Bindings and memory slots are to be made anew, and so is advice
    /// on the memory, whose mapping is a new one. Takes what [`Vm::detach`] takes.
    ///
    /// # Errors
    /// EBUSY if the VM isn't detached; ENOTTY for a file that is no VM; ENOTSUP for one of another
    /// kind; else the errno of creating, mapping, allocating or pinning memory. The VM is detached
    /// then, as before.
    pub fn attach(&self, vm_fd: RawFd) -> Result<()> {
        rebuild::attach(self, vm_fd)
    }

    /// Prepares the end of the process, while its threads may still run: what is converted in place
    /// loses its private bytes, and the files the record of them, which a kernel with the faults of
    /// Linux 7.3's maple tree had better not take apart. Memory stays mapped, shared bytes stay what
    /// they are but in huge pages with a private part, and devices keep what they reach but in blocks
    /// of huge pages. A vCPU that runs on may write to a private page just before that is shared: the
    /// bytes go too, but can be seen for a moment. From now on nothing converts: EBUSY, as for all that needs the VM. Called again,
    /// it does what it could not do before, and nothing else.
    ///
    /// Takes of each block that converts in place all ranges, but waits a second for all of them
    /// together at most, since nobody may keep a process from its end. A process that is killed can't do
    /// this.
    ///
    /// # Errors
    /// EBUSY if it didn't get the range of some blocks, which are named: their files are as they were.
    /// Nothing converts all the same. What can't be done
    /// in one block is logged, and tried again when that block ends.
    pub fn end(&self) -> Result<()> {
        self.ended.store(true, Ordering::Release);
        let deadline = Instant::now() + END_PATIENCE;
        let blocks = self.blocks();
        let mut busy = Vec::new();
        for block in blocks.iter().filter(|block| block.may_have_runs()) {
            // What changes a file may have begun before: who has its range looks again whether the VM
            // is at its end.
            let range = (block.number(), block.span());
            match self.ranges.lock_until(range, deadline) {
                Some(_range) if self.is_detached() => {}
                Some(_range) => block.merge_runs(),
                None => busy.push(block.name()),
            }
        }
        match busy.is_empty() {
            true => Ok(()),
            false => Err(Error::Busy(format!(
                "{}: something is under way there since {END_PATIENCE:?}: private runs stay in the \
                 file if that is closed now",
                busy.join(", ")
            ))),
        }
    }

    /// What the VM's own thread does from time to time, as if `later` had passed: for tests that don't wait.
    #[cfg(any(test, feature = "fake-kernel"))]
    pub fn look_after(&self, later: std::time::Duration) {
        self.upkeep.tend(crate::sync::Instant::now() + later);
    }

    /// Refuses what needs the VM's file while there is none. The caller has a range, or keeps the VM.
    pub(crate) fn check_attached(&self) -> Result<()> {
        self.check_not_ended()?;
        self.check_has_file()
    }

    /// Refuses what a guest asks for at its end. So that a vCPU that asks without pause doesn't queue with
    /// [`Vm::end`], this comes before a range is taken as well as after.
    pub(crate) fn check_not_ended(&self) -> Result<()> {
        match self.ended.load(Ordering::Acquire) {
            true => Err(Error::new(Cause::Ended, "the VM is at its end")),
            false => Ok(()),
        }
    }

    /// Refuses what needs the memory of a VM that is being rebuilt.
    pub(crate) fn check_has_file(&self) -> Result<()> {
        match self.is_detached() {
            true => Err(Error::new(
                Cause::Detached,
                "the VM has no file until it is rebuilt",
            )),
            false => Ok(()),
        }
    }

    /// Another number when the VM's memory is another.
    pub(crate) fn rebuilds(&self) -> u64 {
        self.rebuilds.load(Ordering::Acquire)
    }

    pub(crate) fn is_detached(&self) -> bool {
        self.detached.load(Ordering::Acquire)
    }

    pub(crate) fn set_detached(&self, detached: bool) {
        self.rebuilds.fetch_add(1, Ordering::AcqRel);
        self.detached.store(detached, Ordering::Release);
    }

    /// All blocks that live. Who drops the last owner of one must have no range and not the bindings locked.
    pub(crate) fn blocks(&self) -> Vec<Arc<Block>> {
        let blocks = self.blocks.lock().unwrap_or_else(PoisonError::into_inner);
        blocks.iter().filter_map(Weak::upgrade).collect()
    }

    pub(crate) fn register(&self, block: &Arc<Block>) {
        let mut blocks = self.blocks.lock().unwrap_or_else(PoisonError::into_inner);
        blocks.retain(|block| block.strong_count() > 0);
        blocks.push(Arc::downgrade(block));
    }

    /// Counts a request that no conversion could be made of.
    #[cfg(feature = "capi")]
    pub(crate) fn count_senseless(&self) {
        self.counters.requests.add(1);
        self.counters.failures.add(1);
    }

    pub(crate) fn kernel(&self) -> &Arc<dyn Kernel> {
        &self.kernel
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Blocks that were ever created: their numbers order locks and name ranges.
    pub(crate) fn number_block(&self) -> u64 {
        self.next_block.fetch_add(1, Ordering::Relaxed)
    }

    /// For a moment, and the innermost lock but for those of contexts. Who holds it must not drop the
    /// last owner of a block, whose end takes it.
    pub(crate) fn bindings(&self) -> MutexGuard<'_, Bindings> {
        self.bindings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the bindings have not changed since they had that version, as far as pages are concerned whose
    /// range the caller has locked.
    pub(crate) fn bindings_are(&self, version: u64) -> bool {
        self.bindings_version.load(Ordering::Acquire) == version
    }

    /// What is bound at `gpas` at this moment.
    pub(crate) fn segments(&self, gpas: Span<Gpa>) -> Segments {
        self.bindings().segments(gpas)
    }

    /// The VM isn't detached or attached while this is held. Comes before all ranges.
    pub(crate) fn keep(&self) -> RwLockReadGuard<'_, ()> {
        self.rebuilding
            .read()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// For who does that.
    pub(crate) fn rebuild(&self) -> RwLockWriteGuard<'_, ()> {
        self.rebuilding
            .write()
            .unwrap_or_else(PoisonError::into_inner)
    }
}
