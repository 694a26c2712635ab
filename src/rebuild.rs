// SPDX-License-Identifier: MIT OR Apache-2.0
//! A VM whose KVM file is closed and made anew, as some confidential VMs need to be reset.
//!
//! Every open guest_memfd and every mapping of one keeps the old VM alive (kvm_gmem_release is what
//! lets go of it), and so does the library's own file of the VM. All of these end; what the VMM has
//! in its hands stays: blocks and windows, the addresses of the memory, the numbers of the files,
//! which name an empty file in between.

use crate::block::Block;
use crate::error::{Doing, Error, Result};
use crate::kernel::Probe;
use crate::machine::Machine;
use crate::sync::Arc;
use crate::vm::Vm;
use log::{error, info};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

impl Vm {
    /// Lets go of a KVM VM that is about to be made anew, as on a reset of some confidential
    /// guests: DMA out of all windows, all bindings ended, all guest_memfds closed, and the
    /// library's file of the VM. Blocks, windows and listeners stay, and so do the addresses of the
    /// blocks' memory ([`Block::host`]), which can't be touched where they showed a guest_memfd;
    /// the numbers of files stay open, but on an empty file. All pages have their first attribute
    /// again, and have lost their bytes; listeners are told of those that change.
    ///
    /// Until [`Vm::attach`], whatever needs the VM fails with EBUSY: conversions, bindings, new
    /// blocks, preallocation. Blocks and windows may end, and windows may come, which show nothing
    /// yet. The second time nothing happens. No vCPU may run, and no memory slot use the blocks.
    /// Takes all ranges: waits for all conversions.
    ///
    /// # Errors
    /// - EBUSY: the VM is at its end, and nothing has happened.
    /// - Another errno is that of keeping the files' numbers (EMFILE, ENOMEM), or of a window's unmap.
    ///
    /// The VM is attached then, as before. Should the memory of a block not be mapped again, the
    /// error names it, and [`Block::check_access`] refuses it until a rebuild works.
    ///
    /// # Example
    /// ```
    /// # use gmem::kernel::fake::{FakeKernel, VmKind};
    /// # fn main() -> gmem::Result<()> {
    /// # let file = std::fs::File::open("/dev/null").unwrap();
    /// # let kernel = std::sync::Arc::new(FakeKernel::new(VmKind::Confidential));
    /// # let vm = gmem::Vm::with_kernel(kernel.clone(), &file)?;
    /// use gmem::{Attribute, Block, BlockConfig};
    /// # let ram = Block::new(&vm, &BlockConfig::confidential("ram", 1 << 20, Attribute::Shared))?;
    /// let binding = ram.bind(0, 1 << 20, 0)?;
    /// // The vCPUs stand still, and the memory slots are gone.
    /// vm.detach()?;
    /// // The last file of the old VM is closed, and a new VM made.
    /// # kernel.rebuild_vm();
    /// # let new_vm = &file;
    /// vm.attach(new_vm)?;
    /// // The old binding ended with the old VM.
    /// let binding = ram.bind(0, 1 << 20, 0)?;
    /// # Ok(()) }
    /// ```
    pub fn detach(&self) -> Result<()> {
        detach(self)
    }

    /// Goes on with a new KVM VM of the same kind, whose file is duplicated: new guest_memfds at
    /// the old addresses and under the old numbers, every page with its first attribute, and
    /// windows filled again. Whatever else is at these addresses by then, such as zeros that the
    /// VMM showed meanwhile, is replaced. Bindings and memory slots are to be made anew, and so is
    /// the VMM's own advice on the memory (madvise(2)), whose mapping is a new one in place. Takes
    /// what [`Vm::detach`] takes.
    ///
    /// # Errors
    /// - EBUSY: the VM isn't detached, or is at its end.
    /// - ENOTTY: it isn't that of a KVM VM.
    /// - ENOTSUP: it is that of a VM of another kind.
    /// - Another errno is that of creating, mapping, allocating or pinning memory.
    ///
    /// The VM is detached then, as before.
    pub fn attach(&self, vm_fd: impl AsFd) -> Result<()> {
        attach(self, vm_fd.as_fd())
    }
}

/// See [`Vm::detach`].
fn detach(vm: &Vm) -> Result<()> {
    let machine = vm.machine();
    // Declared before the guard: should one of these be a block's last owner, the block ends when
    // the VM may be rebuilt again, since its end keeps it from that.
    let blocks;
    let _rebuild = machine.rebuild();
    blocks = vm.blocks();
    let _ranges = machine.ranges.lock(all_of(&blocks));
    machine.check_not_ended()?;
    if machine.is_detached() {
        return Ok(());
    }
    let nothing = empty_file(machine)?;
    if let Err(error) = conceal(&blocks) {
        blocks
            .iter()
            .for_each(|block| block.windows().readmit(block.span()));
        return Err(error);
    }
    vm.bindings().lock().clear();
    machine.set_detached(true);
    let_go(machine, &blocks, nothing.as_fd());
    info!(
        "the VM's file is closed: {} blocks wait for the next",
        blocks.len()
    );
    Ok(())
}

/// See [`Vm::attach`].
fn attach(vm: &Vm, fd: BorrowedFd) -> Result<()> {
    let machine = vm.machine();
    let blocks;
    let _rebuild = machine.rebuild();
    blocks = vm.blocks();
    let _ranges = machine.ranges.lock(all_of(&blocks));
    machine.check_not_ended()?;
    if !machine.is_detached() {
        return Err(Error::busy("the VM has its file").with_remedy("detach that first"));
    }
    let nothing = empty_file(machine)?;
    let fd = machine
        .kernel()
        .duplicate(fd.as_raw_fd())
        .doing(|| "keeping the new VM's file open".into())?;
    if Probe::of(&**machine.kernel(), fd.as_fd())? != vm.probe() {
        return Err(Error::unsupported(
            "the new VM is of another kind than the old one: its kernel offers other things for it",
        ));
    }
    let result = take_up(machine, &blocks, &fd);
    if result.is_err() {
        machine.set_detached(true);
        for block in &blocks {
            block.close_all();
            let gone = block.windows().withdraw(block.span());
            if let Err(error) = gone.and(block.planes().hide()) {
                error!("while giving up a new VM: {error}");
            }
        }
        let_go(machine, &blocks, nothing.as_fd());
    } else {
        info!(
            "the VM has a new file, and {} blocks their memory",
            blocks.len()
        );
    }
    result
}

fn all_of(blocks: &[Arc<Block>]) -> Vec<crate::range_locks::BlockRange> {
    let range = |block: &Arc<Block>| (block.number(), block.span());
    blocks.iter().map(range).collect()
}

fn empty_file(machine: &Machine) -> Result<OwnedFd> {
    machine
        .kernel()
        .create_memfd("detached", 0)
        .doing(|| "creating what stands for the files of a VM that has none".into())
}

/// Takes the blocks away from devices, and from who goes by address. On failure addresses are as before,
/// or, if that fails as well, closed, and devices may miss something.
fn conceal(blocks: &[Arc<Block>]) -> Result<()> {
    for block in blocks {
        block.windows().withdraw(block.span())?;
    }
    blocks.iter().for_each(|block| block.close_all());
    let hidden = |block: &Arc<Block>| block.planes().hide();
    let Some((failed, error)) = first_error(blocks, hidden) else {
        return Ok(());
    };
    // The one that failed may be hidden all the same.
    let (touched, untouched) = blocks.split_at(failed + 1);
    untouched.iter().for_each(|block| block.open_again());
    let mut result = Err(error);
    for block in touched {
        match block.planes().show_again() {
            Ok(()) => block.open_again(),
            Err(error) => {
                let name = block.name();
                error!("{name}: nobody may touch its memory until the VM is rebuilt: {error}");
                result = result.map_err(|first| {
                    first.with_remedy(format!(
                    "nobody may touch the memory of {name} until the VM is rebuilt, since it could \
                     not be mapped again"
                ))
                });
            }
        }
    }
    result
}

fn first_error(
    blocks: &[Arc<Block>],
    change: impl Fn(&Arc<Block>) -> Result<()>,
) -> Option<(usize, Error)> {
    let mut changed = blocks.iter().map(change).enumerate();
    changed.find_map(|(number, changed)| Some((number, changed.err()?)))
}

/// Closes what keeps the old VM alive, and forgets what it was.
fn let_go(machine: &Machine, blocks: &[Arc<Block>], nothing: BorrowedFd) {
    for block in blocks {
        block.merge_runs();
        if let Err(error) = block.planes().close(nothing) {
            error!("{error}: the old VM lives on until the new one is there");
        }
        block.forget();
    }
    if let Err(error) = machine.kernel().replace(machine.fd(), nothing) {
        error!("closing the VM's file: {error}");
    }
}

fn take_up(machine: &Machine, blocks: &[Arc<Block>], fd: &OwnedFd) -> Result<()> {
    for block in blocks {
        // An earlier attempt may have left something in a window, which is of that VM.
        block.windows().withdraw(block.span())?;
        block.expect_runs();
        block.planes().reopen(fd.as_fd())?;
        block.planes().allocate_initial(block.initial())?;
    }
    machine
        .kernel()
        .replace(machine.fd(), fd.as_fd())
        .doing(|| "taking the new VM's file".into())?;
    machine.set_detached(false);
    for block in blocks {
        block.open_again();
        for run in block.windows().admissible_runs(block.span()) {
            block.windows().admit(run)?;
        }
    }
    Ok(())
}
