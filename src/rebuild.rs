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
use crate::sync::Arc;
use crate::vm::Vm;
use log::{error, info};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};

/// See [`Vm::detach`].
pub(crate) fn detach(vm: &Vm) -> Result<()> {
    // Declared before the guard: should one of these be a block's last owner, the block ends when
    // the VM may be rebuilt again, since its end keeps it from that.
    let blocks;
    let _rebuild = vm.rebuild();
    blocks = vm.blocks();
    let _ranges = vm.ranges.lock(all_of(&blocks));
    if vm.is_detached() {
        return Ok(());
    }
    let nothing = empty_file(vm)?;
    if let Err(error) = conceal(&blocks) {
        blocks.iter().for_each(|block| block.readmit(block.span()));
        return Err(error);
    }
    vm.bindings().clear();
    vm.set_detached(true);
    let_go(vm, &blocks, nothing.as_fd());
    info!(
        "the VM's file is closed: {} blocks wait for the next",
        blocks.len()
    );
    Ok(())
}

/// See [`Vm::attach`].
pub(crate) fn attach(vm: &Vm, fd: RawFd) -> Result<()> {
    let blocks;
    let _rebuild = vm.rebuild();
    blocks = vm.blocks();
    let _ranges = vm.ranges.lock(all_of(&blocks));
    if !vm.is_detached() {
        return Err(Error::Busy("the VM has its file: detach that first".into()));
    }
    let nothing = empty_file(vm)?;
    let fd = vm
        .kernel()
        .duplicate(fd)
        .doing(|| "keeping the new VM's file open".into())?;
    if Probe::of(&**vm.kernel(), fd.as_fd())? != vm.probe() {
        return Err(Error::Unsupported(
            "the new VM is of another kind than the old one: its kernel offers other things for it"
                .into(),
        ));
    }
    let result = take_up(vm, &blocks, &fd);
    if result.is_err() {
        vm.set_detached(true);
        for block in &blocks {
            block.close_all();
            let gone = block.withdraw(block.span());
            if let Err(error) = gone.and(block.planes().hide()) {
                error!("while giving up a new VM: {error}");
            }
        }
        let_go(vm, &blocks, nothing.as_fd());
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

fn empty_file(vm: &Vm) -> Result<OwnedFd> {
    vm.kernel()
        .create_memfd("detached", 0)
        .doing(|| "creating what stands for the files of a VM that has none".into())
}

/// Takes the blocks away from devices, and from who goes by address. On failure addresses are as before,
/// or, if that fails as well, closed, and devices may miss something.
fn conceal(blocks: &[Arc<Block>]) -> Result<()> {
    for block in blocks {
        block.withdraw(block.span())?;
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
fn let_go(vm: &Vm, blocks: &[Arc<Block>], nothing: BorrowedFd) {
    for block in blocks {
        block.merge_runs();
        if let Err(error) = block.planes().close(nothing) {
            error!("{error}: the old VM lives on until the new one is there");
        }
        block.forget();
    }
    if let Err(error) = vm.kernel().replace(vm.fd(), nothing) {
        error!("closing the VM's file: {error}");
    }
}

fn take_up(vm: &Vm, blocks: &[Arc<Block>], fd: &OwnedFd) -> Result<()> {
    for block in blocks {
        // An earlier attempt may have left something in a window, which is of that VM.
        block.withdraw(block.span())?;
        block.expect_runs();
        block.planes().reopen(fd.as_fd())?;
        block.planes().allocate_initial(block.initial())?;
    }
    vm.kernel()
        .replace(vm.fd(), fd.as_fd())
        .doing(|| "taking the new VM's file".into())?;
    vm.set_detached(false);
    for block in blocks {
        block.open_again();
        for run in block.admissible_runs(block.span()) {
            block.admit(run)?;
        }
    }
    Ok(())
}
