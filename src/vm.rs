// SPDX-License-Identifier: MIT OR Apache-2.0
//! One KVM VM: which blocks it has.
//!
//! What is done to all of them at once, or wherever a guest says, is added from above: conversions in
//! [`convert`](crate::convert), the VM made anew in [`rebuild`](crate::rebuild), memory faults in
//! [`faults`](crate::faults).

use crate::bindings::{Bound, VmBindings};
use crate::block::{Block, BlockConfig};
use crate::budget::Budget;
use crate::echoes::Echoes;
use crate::error::{Doing, Error, Result};
use crate::kernel::linux::Linux;
use crate::kernel::{Kernel, Probe};
use crate::machine::Machine;
use crate::stats::{VmCounters, VmStats};
use crate::sync::{Arc, Instant, Mutex, MutexGuard, PoisonError, Weak};
use crate::units::{pages_around, Gpa, Span, PAGE_SIZE};
use log::info;
use smallvec::SmallVec;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::time::Duration;

/// How long the end of a process waits for conversions: some that meet a page that somebody holds take
/// a tenth of this.
const END_PATIENCE: Duration = Duration::from_secs(1);

/// A VM whose memory is in blocks of this library.
///
/// # In Rust
/// Blocks don't keep it: what has been dropped converts nothing any more.
#[derive(Debug)]
pub struct Vm {
    machine: Arc<Machine>,
    pub(crate) counters: VmCounters,
    pub(crate) echoes: Echoes,
    pub(crate) budget: Budget,
    bindings: Arc<VmBindings<Block>>,
    /// In order of creation.
    blocks: Mutex<Vec<Weak<Block>>>,
}

/// The parts of one request, mostly one.
pub(crate) type Segments = SmallVec<[Bound<Block>; 1]>;

impl Vm {
    /// Opens the VM behind a KVM VM file, which is duplicated: the caller may close its own
    /// whenever it likes. Finds out what the kernel can do for such a VM, also by trying it on files of
    /// it that are closed again.
    ///
    /// # Errors
    /// - ENOTTY: it isn't that of a KVM VM.
    /// - ENOTSUP: the pages of this host's kernel are not of 4 KiB.
    /// - Another errno is that of dup(2), or of what was tried (KVM_CHECK_EXTENSION,
    ///   KVM_CREATE_GUEST_MEMFD).
    pub fn new(vm_fd: impl AsFd) -> Result<Arc<Self>> {
        Self::on(Arc::new(Linux), vm_fd.as_fd())
    }

    /// The same on a kernel of the caller's choice: the seam that tests use.
    #[cfg(any(test, feature = "fake-kernel"))]
    pub fn with_kernel(kernel: Arc<dyn Kernel>, vm_fd: impl AsFd) -> Result<Arc<Self>> {
        Self::on(kernel, vm_fd.as_fd())
    }

    fn on(kernel: Arc<dyn Kernel>, vm_fd: BorrowedFd) -> Result<Arc<Self>> {
        let fd = kernel
            .duplicate(vm_fd.as_raw_fd())
            .doing(|| "keeping the VM's file open".into())?;
        let page = kernel.host_page_size();
        if page != PAGE_SIZE {
            return Err(Error::unsupported(format!(
                "this host's kernel has pages of {} KiB, and guests convert pages of 4 KiB",
                page >> 10
            ))
            .with_remedy("boot a kernel with such pages"));
        }
        let probe = Probe::of(&*kernel, fd.as_fd())?;
        info!("what the kernel has for this VM: {probe}");
        Ok(Arc::new(Self {
            machine: Machine::new(kernel, fd, probe),
            counters: VmCounters::default(),
            echoes: Echoes::default(),
            budget: Budget::default(),
            bindings: VmBindings::new(),
            blocks: Mutex::default(),
        }))
    }

    /// What the kernel can do for this VM, as it was found when the VM was opened.
    pub fn probe(&self) -> Probe {
        self.machine.probe()
    }

    /// Counts since the VM was opened. Takes no lock, so that some may have a conversion that
    /// others don't have yet.
    pub fn stats(&self) -> VmStats {
        self.counters.snapshot()
    }

    /// The host's hardware has lost memory that the guest uses, private or shared: that of whole
    /// pages around `size` bytes at `gpa`, as when KVM_RUN fails with EHWPOISON and a memory-fault
    /// exit that says where. What follows is that of [`Block::poison`]. The range may cross
    /// bindings; bytes that are no memory of a block are left out. Waits for conversions around it.
    /// No memory slot may come or go meanwhile. Not from a signal handler.
    ///
    /// # Errors
    /// - EBUSY: the VM is detached, or at its end.
    /// - EINVAL: the range is empty, wraps, or has no memory of a block.
    /// - Another errno is as with [`Block::poison`]: all that could be done is done.
    pub fn poison(&self, gpa: u64, size: u64) -> Result<()> {
        let gpas = pages_around(gpa, size).ok_or_else(|| {
            Error::invalid(format!(
                "{size:#x} bytes at gpa {gpa:#x} are empty or wrap around"
            ))
        })?;
        self.machine.check_not_ended()?;
        let rebuilds = self.machine.rebuilds();
        self.machine.check_attached()?;
        let (segments, _) = self.segments(gpas);
        if segments.is_empty() {
            return Err(Error::invalid(format!("{gpas} is no memory of a block")));
        }
        let mut result = Ok(());
        for segment in &segments {
            result = result.and(segment.block.poison_pages(segment.offsets, rebuilds));
        }
        result
    }

    /// Prepares the end of the process, as an exit handler does, while its threads may still run.
    /// In blocks that convert in place, private bytes are lost, and with them the files' record of
    /// what is private, which a kernel with the faults of Linux 7.3's maple tree had better not
    /// take apart. Memory stays mapped, shared bytes stay what they are but in huge pages with a
    /// private part, and devices keep what they reach but in blocks of huge pages. From now on
    /// nothing converts: what needs the VM fails with EBUSY, [`Vm::detach`] and [`Vm::attach`] too.
    /// What needs nothing of it works as before: to ask, to free what is kept, to end bindings,
    /// windows, listeners and blocks; and so [`Block::reset`] of a block that is not confidential, where
    /// nothing changes, returns 0. Nothing is done to other blocks, nor to those with 16 private
    /// runs or fewer, which no kernel fails at. Called again, it does what it could not do before,
    /// and nothing else; so does the end of each block.
    ///
    /// A vCPU that runs on may write to a private page between the two calls to the kernel that free and share it. What it
    /// writes goes as well, but for a moment in between, host threads and who else has the file
    /// mapped could read it: stop the vCPUs first, and no private byte is ever shown.
    ///
    /// Takes the range of each block that converts in place, but waits a second for all of them
    /// together at most, since nobody may keep a process from its end. A process that is killed
    /// can't do this.
    ///
    /// # Errors
    /// - EBUSY: somebody had the range of some blocks, which the error names, such as a conversion
    ///   or a preallocation. Their files are as they were, and nothing converts all the same.
    ///
    /// What can't be done in one block is no error: it is logged, and tried again when that block
    /// ends.
    pub fn end(&self) -> Result<()> {
        self.machine.end();
        let deadline = Instant::now() + END_PATIENCE;
        let blocks = self.blocks();
        let mut busy = Vec::new();
        for block in blocks.iter().filter(|block| block.may_have_runs()) {
            // What changes a file may have begun before: who has its range looks again whether the VM
            // is at its end.
            let range = (block.number(), block.span());
            match self.machine.ranges.lock_until(range, deadline) {
                Some(_range) if self.machine.is_detached() => {}
                Some(_range) => block.merge_runs(),
                None => busy.push(block.name()),
            }
        }
        match busy.is_empty() {
            true => Ok(()),
            false => Err(Error::busy(format!(
                "something is under way there since {END_PATIENCE:?}: private runs stay in the file if that \
                 is closed now"
            ))
            .of(&busy.join(", "))),
        }
    }

    /// What the VM's own thread does from time to time, as if `later` had passed: for tests that don't wait.
    #[cfg(any(test, feature = "fake-kernel"))]
    pub fn look_after(&self, later: std::time::Duration) {
        self.machine.upkeep.tend(Instant::now() + later);
    }

    pub(crate) fn machine(&self) -> &Arc<Machine> {
        &self.machine
    }

    /// All blocks that live. Who drops the last owner of one must have no range and not the bindings locked.
    pub(crate) fn blocks(&self) -> Vec<Arc<Block>> {
        self.registered().iter().filter_map(Weak::upgrade).collect()
    }

    pub(crate) fn bindings(&self) -> &VmBindings<Block> {
        &self.bindings
    }

    /// What is bound at `gpas` at this moment, and the bindings' version.
    pub(crate) fn segments(&self, gpas: Span<Gpa>) -> (Segments, u64) {
        let bindings = self.bindings.lock();
        let version = bindings.version();
        (bindings.parts(gpas).collect(), version)
    }

    /// Counts a request that no conversion could be made of.
    #[cfg(feature = "capi")]
    pub(crate) fn count_senseless(&self) {
        self.counters.requests.add(1);
        self.counters.failures.add(1);
    }

    fn registered(&self) -> MutexGuard<'_, Vec<Weak<Block>>> {
        self.blocks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Block {
    /// Creates a block in a VM: its files (KVM_CREATE_GUEST_MEMFD; in split also memfd_create(2)),
    /// and the mapping of its shared bytes. May block in the kernel; waits for a rebuild of the VM.
    ///
    /// The files are close-on-exec, here and after [`Vm::attach`]. The kernel makes a guest_memfd
    /// without (KVM_CREATE_GUEST_MEMFD has no flag for it), and the library sets it right after: a
    /// child that another thread forks in between, and that executes a program without closing what
    /// it does not know, has the guest_memfd and with it the VM. So does a child that executes
    /// nothing, which also has the memory, unless [`BlockConfig::not_in_children`] says otherwise.
    ///
    /// A memfd's size is sealed, and so are its seals (F_SEAL_GROW, F_SEAL_SHRINK, F_SEAL_SEAL):
    /// whoever is given it can't truncate it. A guest_memfd has no seals, and a fixed size.
    ///
    /// # Errors
    /// - EBUSY: the VM is detached, or at its end.
    /// - EINVAL: the configuration makes no sense. The sentence says which part of it, and what to
    ///   do.
    /// - ENOTSUP: the kernel, or this version, can't serve it. So does that sentence.
    /// - Another errno is that of creating, mapping or allocating the files (ENOMEM, ENOSPC,
    ///   EMFILE).
    ///
    /// Nothing is left behind then.
    pub fn new(vm: &Vm, config: &BlockConfig) -> Result<Arc<Self>> {
        // A VM isn't detached in the middle of this, and finds the block afterwards.
        let _kept = vm.machine.keep();
        let block = Block::on(&vm.machine, &vm.bindings, config)?;
        vm.budget.allow(block.max_request());
        let mut blocks = vm.registered();
        blocks.retain(|block| block.strong_count() > 0);
        blocks.push(Arc::downgrade(&block));
        Ok(block)
    }
}
