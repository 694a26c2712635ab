// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the blocks of one VM have in common: the kernel, the VM's file, who has which range locked, and who
//! looks after them. It knows no block but by its number. What is bound where they share too, but with their
//! names: [`bindings`](crate::bindings).
//!
//! Blocks keep it, and so it lives as long as the last of them: a VM that its owner has dropped converts
//! nothing any more, but what a block leaves behind in the kernel is still cleaned up.

use crate::error::{Cause, Error, Result};
use crate::kernel::{Kernel, Probe};
use crate::range_locks::RangeLocks;
use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use crate::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use crate::throttle::Voices;
use crate::upkeep::Upkeep;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// See the module's comment.
///
/// Lock order, outermost first: whether the VM is being rebuilt, ranges, then what is locked for
/// moments only and never across a system call: bindings, the list of blocks, and inside one block the
/// list of windows, a window's ledger, attributes, quarantine, of which none is held while another
/// block's is taken. Innermost is the lock of an iommufd context, which blocks and VMs may share.
#[derive(Debug)]
pub(crate) struct Machine {
    kernel: Arc<dyn Kernel>,
    fd: OwnedFd,
    probe: Probe,
    /// Locked for writing to detach and attach, which need all blocks there are, and for reading by who
    /// makes a block or ends one. No conversion takes it.
    rebuilding: RwLock<()>,
    pub(crate) ranges: Arc<RangeLocks>,
    /// What looks after the blocks.
    pub(crate) upkeep: Upkeep,
    /// What a guest can make us say of it.
    pub(crate) voices: Voices,
    next_number: AtomicU64,
    /// Between [`Vm::detach`](crate::Vm::detach) and [`Vm::attach`](crate::Vm::attach). Changes with all
    /// ranges of all blocks locked: who has one of these sees one state.
    detached: AtomicBool,
    /// How often that has changed: what was heard of memory before is not true of what is there now.
    rebuilds: AtomicU64,
    /// After [`Vm::end`](crate::Vm::end): for good.
    ended: AtomicBool,
}

impl Machine {
    /// Behind a KVM VM's file.
    pub(crate) fn new(kernel: Arc<dyn Kernel>, fd: OwnedFd, probe: Probe) -> Arc<Self> {
        Arc::new(Self {
            kernel,
            fd,
            probe,
            rebuilding: RwLock::default(),
            ranges: Arc::default(),
            upkeep: Upkeep::default(),
            voices: Voices::default(),
            next_number: AtomicU64::new(0),
            detached: AtomicBool::new(false),
            rebuilds: AtomicU64::new(0),
            ended: AtomicBool::new(false),
        })
    }

    pub(crate) fn kernel(&self) -> &Arc<dyn Kernel> {
        &self.kernel
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    pub(crate) fn probe(&self) -> Probe {
        self.probe
    }

    /// What no block and no window of this VM has had before: it orders locks and names ranges.
    pub(crate) fn number(&self) -> u64 {
        self.next_number.fetch_add(1, Ordering::Relaxed)
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

    /// Refuses what needs the VM's file while there is none. The caller has a range, or keeps the VM.
    pub(crate) fn check_attached(&self) -> Result<()> {
        self.check_not_ended()?;
        self.check_has_file()
    }

    /// Refuses what a guest asks for at its end. So that a vCPU that asks without pause doesn't queue with
    /// [`Vm::end`](crate::Vm::end), this comes before a range is taken as well as after.
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

    /// From now on nothing converts.
    pub(crate) fn end(&self) {
        self.ended.store(true, Ordering::Release);
    }

    /// Tries again what has failed for want of memory, if some block keeps memory that nobody needs now.
    pub(crate) fn relieved<T>(&self, mut attempt: impl FnMut() -> Result<T>) -> Result<T> {
        match attempt() {
            Err(error) if [libc::ENOMEM, libc::ENOSPC].contains(&error.errno()) => {
                match self.upkeep.relieve() {
                    true => attempt(),
                    false => Err(error),
                }
            }
            done => done,
        }
    }
}
