// SPDX-License-Identifier: MIT OR Apache-2.0
//! A block made what it was at first, as a VM's reset asks.

use super::plan::{Plan, Purpose};
use super::{run, Part};
use crate::block::Block;
use crate::error::{Error, Result};
use crate::run_set::RunSet;
use crate::sync::Arc;
use crate::units::{Offset, Span};
use smallvec::SmallVec;

/// A reset frees one plane's memory before it needs as much of the other's, in steps of this size:
/// a multiple of a huge page, or one.
fn reset_piece_bytes(block: &Block) -> u64 {
    block.planes().huge_page().unwrap_or(0).max(64 << 20)
}

/// In a reset that has failed in so many pieces because somebody holds pages, each of which takes its time,
/// all that is left will be held as well.
const MOST_HELD_PIECES: usize = 16;

impl Block {
    /// Makes every page what it was at first, as a reset of the VM asks. Pages that become shared
    /// lose their bytes before anybody can see them, and host and devices find zeros. In place so
    /// do the shared pages of a huge page that has a private part; all other shared pages keep
    /// their bytes, and what shared ones hold that become private is undefined. DMA windows follow.
    /// Poisoned pages get fresh memory first, and devices get at last what is shared and
    /// quarantined; what they can't be given even now stays so, which is no error of a reset. What
    /// is kept ([`BlockConfig::release_delay`](crate::BlockConfig::release_delay)) is freed.
    ///
    /// No vCPU may run. It works in pieces, so that the block's memory is never needed twice, and
    /// waits for conversions in each; listeners are called as by
    /// [`Vm::convert`](crate::Vm::convert). Shared memory is not reserved, but for huge pages.
    ///
    /// # Errors
    /// - EBUSY: the VM is at its end, and the block is confidential or has poisoned pages. In one that
    ///   is detached there is nothing to reset.
    /// - EIO: memory was lost meanwhile.
    /// - Another errno is as with [`Vm::convert`](crate::Vm::convert), or that of freeing or
    ///   allocating memory for poisoned pages.
    ///
    /// All pieces are tried, unless somebody holds pages in many of them: what could be done is
    /// done. Where it failed, bytes may be gone, but no private one is shown. Poisoned pages
    /// without fresh memory stay poisoned and keep their attribute, since a kernel that converts
    /// one would touch it.
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
    /// # let binding = ram.bind(0, 1 << 20, 0)?;
    /// vm.convert(0, 1 << 20, Attribute::Private)?;
    /// // The vCPUs stand still.
    /// ram.reset()?;
    /// assert_eq!(ram.stats().bytes_private, 0);
    /// # Ok(()) }
    /// ```
    pub fn reset(self: &Arc<Self>) -> Result<()> {
        self.release_pending();
        let replaced = self.replace_lost();
        self.windows().lock_and_heal(self.span(), None);
        let reset = reset(self);
        // In an ordinary block nothing has changed since.
        if self.is_confidential() {
            self.windows().lock_and_heal(self.span(), None);
        }
        reset?;
        replaced?;
        // What was lost only now was left out as well.
        self.check_sound(self.span())
    }
}

/// Makes a whole block what it was at first; see [`Block::reset`].
fn reset(block: &Arc<Block>) -> Result<()> {
    if !block.is_confidential() {
        return Ok(());
    }
    let machine = block.machine();
    let mut result = Ok(());
    let mut held = 0;
    for piece in block.span().chunks(reset_piece_bytes(block)) {
        let _range = block.lock(piece);
        // For each piece: the end of a process doesn't wait for them all.
        machine.check_not_ended()?;
        let reset = reset_piece(block, piece);
        // Of the kernel's: a listener's own takes no time.
        let is_held = |error: &Error| error.call().is_some_and(|call| call.errno == libc::EAGAIN);
        held += usize::from(reset.as_ref().is_err_and(is_held));
        result = result.and(reset);
        if held == MOST_HELD_PIECES {
            break;
        }
    }
    if result.is_err() {
        block.counters().failures.add(1);
    }
    result
}

/// All that can be done of it: what fails in one binding keeps no other from it.
fn reset_piece(block: &Arc<Block>, piece: Span<Offset>) -> Result<()> {
    let mut result = Ok(());
    for part in parts_of(block, piece) {
        let sound = block.convertible(part.offsets, block.initial());
        let parts: SmallVec<[Part; 1]> = sound.iter().map(|&o| part.of(o)).collect();
        let plan = Plan::new(&parts, block.initial(), Purpose::Reset);
        result = result.and(plan.and_then(|plan| run::run(&plan)));
    }
    result
}

/// The parts of `piece` by binding, and what is not bound. The caller has it locked.
fn parts_of(block: &Arc<Block>, piece: Span<Offset>) -> Vec<Part> {
    let bound = block.vm_bindings.lock().of_block(block.number());
    let mut unbound = RunSet::default();
    unbound.insert(piece);
    let mut parts = Vec::new();
    for (offsets, gpas) in bound {
        if let Some(part) = offsets.intersection(&piece) {
            unbound.remove(part);
            parts.push(Part {
                block: block.clone(),
                offsets: part,
                gpas: Some(offsets.translate(&part, gpas.start())),
            });
        }
    }
    let unbound = unbound.inside(piece).into_iter();
    parts.extend(unbound.map(|offsets| Part {
        block: block.clone(),
        offsets,
        gpas: None,
    }));
    parts
}
