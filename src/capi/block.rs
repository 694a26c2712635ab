// SPDX-License-Identifier: MIT OR Apache-2.0
//! A block, for C.

use super::structs::{self, *};
use super::{block_of, give, gmem_block, gmem_vm, guarded, null, vm_of, BLOCKS};
use crate::block::{Block, BlockConfig};
use crate::Attribute;
use std::ffi::{c_int, c_void, CStr};
use std::os::fd::AsRawFd;

/// Creates a block: its files and the mapping of its shared bytes. Ends with gmem_block_free(). May
/// block in the kernel; waits for a rebuild of the VM.
///
/// The files are close-on-exec, here and after gmem_vm_attach(). The kernel makes a guest_memfd without
/// (KVM_CREATE_GUEST_MEMFD has no flag for it), and the library sets it right after: a child that
/// another thread forks in between, and that executes a program without closing what it does not know,
/// has the guest_memfd and with it the VM. So does a child that executes nothing, which also has the
/// memory: madvise(2) with MADV_DONTFORK on the addresses of gmem_block_host() keeps it from that, and
/// MADV_DONTDUMP keeps core dumps small. Neither is done here; both are to be done again after
/// gmem_vm_attach().
///
/// A memfd's size is sealed, and so are its seals (F_SEAL_GROW, F_SEAL_SHRINK, F_SEAL_SEAL): whoever
/// gets it by gmem_block_shared_fd() can't truncate it. A guest_memfd has no seals, and a fixed size.
///
/// -EBUSY: the VM is detached.
/// -EINVAL, -ENOTSUP: the configuration makes no sense, isn't in this version, or the kernel can't
/// serve it; the sentence says which and what to do. -ENOMEM, -EMFILE, …: creating or mapping the
/// files failed (KVM_CREATE_GUEST_MEMFD, memfd_create, mmap). Nothing is left behind.
///
/// # Safety
/// `config` is NULL or points to a structure of `struct_size` bytes, whose `name` is NULL or a
/// NUL-terminated string and whose `policy_nodes` has `policy_words` words; `block` is NULL or points to memory for a pointer.
#[no_mangle]
pub unsafe extern "C" fn gmem_block_new(
    vm: *mut gmem_vm,
    config: *const gmem_block_config,
    block: *mut *mut gmem_block,
) -> c_int {
    guarded(|| {
        let vm = vm_of(vm)?;
        // SAFETY: the caller's promise is `read`'s.
        let config = unsafe { structs::read(config)? };
        let name: String = if config.name.is_null() {
            "memory".into()
        } else {
            // SAFETY: the caller promises a NUL-terminated string.
            let name = unsafe { CStr::from_ptr(config.name) }.to_string_lossy();
            // `check` has it in its own messages.
            name.replace(char::is_control, "?")
        };
        // SAFETY: the caller promises so many words.
        let nodes = unsafe { config.policy_nodes()? };
        let config: BlockConfig = config.check(&name, &nodes)?;
        // SAFETY: the caller's promise is `give`'s.
        unsafe { give(block, || Ok(BLOCKS.insert(Block::new(&vm, &config)?))) }
    })
}

/// Ends a block and frees its memory; pointers and file descriptors got from it are void. Its
/// memory slots must be gone. NULL is fine. Waits for a rebuild of the VM.
///
/// -EBUSY: it is bound, in a DMA window or listened to; nothing happened. So it is while a window that
/// gmem_window_new() could not make can't be closed: try again. -EINVAL: no such block (any more).
#[no_mangle]
pub extern "C" fn gmem_block_free(block: *mut gmem_block) -> c_int {
    guarded(|| {
        if block.is_null() {
            return Ok(());
        }
        block_of(block)?.check_unused()?;
        BLOCKS.remove(block as usize, "block").map(drop)
    })
}

/// Address of the block's shared bytes: `size` bytes, page aligned, valid as long as the block.
/// NULL for a handle that is not a block's. In a split block the address of a private page reads
/// and writes memory that the guest never sees: see gmem_block_check_access().
#[no_mangle]
pub extern "C" fn gmem_block_host(block: *const gmem_block) -> *mut c_void {
    let mut host = std::ptr::null_mut();
    guarded(|| {
        host = block_of(block)?.host().cast();
        Ok(())
    });
    host
}

/// The file with the shared bytes, at the same offsets: for vhost-user, never for VFIO, which goes
/// by gmem_window_new(). Stays the library's: don't close it. -EINVAL: no such block.
///
/// A process that maps it and touches a page that the guest has turned private gets SIGBUS in place,
/// and in split from a pool of huge pages that is empty: don't give it away there, if the process
/// can't bear that. In split in small pages it gets what the page left, while that is kept, and then a
/// page of zeros, which is freed after the next conversion to private.
#[no_mangle]
pub extern "C" fn gmem_block_shared_fd(block: *const gmem_block) -> c_int {
    file_of(block, Attribute::Shared)
}

/// The file with the private bytes: the guest_memfd, for memory slots. In-place it is the file of
/// gmem_block_shared_fd(). Stays the library's: don't close it. -EINVAL: no such block.
#[no_mangle]
pub extern "C" fn gmem_block_private_fd(block: *const gmem_block) -> c_int {
    file_of(block, Attribute::Private)
}

fn file_of(block: *const gmem_block, attribute: Attribute) -> c_int {
    let mut fd = -1;
    match guarded(|| {
        fd = block_of(block)?.file(attribute).as_raw_fd();
        Ok(())
    }) {
        0 => fd,
        error => error,
    }
}

/// What KVM_SET_USER_MEMORY_REGION2 needs for a slot in address space 0 that shows the block from
/// `offset` on, with KVM_MEM_GUEST_MEMFD set. Slots in other address spaces (SMM) are plain: the
/// same userspace_addr and no guest_memfd, since KVM refuses to bind an offset twice. Neither may
/// have KVM_MEM_LOG_DIRTY_PAGES or KVM_MEM_READONLY together with KVM_MEM_GUEST_MEMFD.
///
/// -EINVAL: an unaligned offset or one beyond the block, a NULL, a stale block, a `struct_size` of
/// no version.
///
/// # Safety
/// `slot` is NULL or points to a structure of `struct_size` bytes.
#[no_mangle]
pub unsafe extern "C" fn gmem_block_get_memslot(
    block: *const gmem_block,
    offset: u64,
    slot: *mut gmem_memslot,
) -> c_int {
    guarded(|| {
        let block = block_of(block)?;
        let memslot = gmem_memslot::from(block.memslot(offset)?);
        // SAFETY: the caller's promise is `fill`'s.
        unsafe { structs::fill(slot, memslot) }
    })
}

/// Fills the memory of every page, in the plane that its attribute selects, with `threads` threads
/// (0 counts as 1). Blocks until it is done; conversions in the block wait.
///
/// -ENOMEM, -ENOSPC: there isn't enough; part of it is filled. -EINVAL: no such block.
#[no_mangle]
pub extern "C" fn gmem_block_preallocate(block: *mut gmem_block, threads: u32) -> c_int {
    guarded(|| block_of(block)?.preallocate(threads as usize))
}

/// Gives every page its initial attribute again, for a reset of the VM; no vCPU may run. Private pages
/// that become shared lose their bytes before anybody can see them: host and devices find zeroes. In
/// place, so do the shared pages of a huge page that has a private part; all other shared pages keep
/// their bytes, and what shared ones hold that become private is undefined. Windows and the kernel
/// follow. Poisoned pages get fresh memory; those that can't are left alone, attribute included, and all
/// others are reset. Waits for conversions in the block; takes bindings and
/// range like gmem_convert(), whose errors it shares. It works in pieces and goes on where one fails, unless
/// somebody holds pages in many of them: in one that failed bytes may be gone, but no private one is shown. At last
/// devices are to have again what is shared and quarantined; what they still can't have stays so.
#[no_mangle]
pub extern "C" fn gmem_block_reset(block: *mut gmem_block) -> c_int {
    guarded(|| block_of(block)?.reset())
}

/// Copies `size` bytes at `data` to `offset` of the block, for what a guest finds in memory at its
/// start: firmware, a kernel. In place, private pages are made shared for it and private again, also
/// if it is only a part of them that is written; what the guest then finds in them depends on the VM's
/// type: its launch commands (SNP, TDX) take the page as it is and encrypt it. All pages have their
/// attributes of before afterwards. No vCPU may run. Waits for conversions of the pages.
///
/// -EINVAL: not in the block, empty, a NULL, or no such block. -ENOTSUP: private pages of a split
/// block, whose bytes the VMM can't reach. -EBUSY: the VM is detached. -EIO: poisoned pages. -EAGAIN:
/// somebody holds one of the pages. -ENOMEM, -ENOSPC: no memory.
///
/// # Safety
/// `data` is NULL or points to `size` bytes, which are not the block's own.
#[no_mangle]
pub unsafe extern "C" fn gmem_block_place(
    block: *mut gmem_block,
    offset: u64,
    data: *const c_void,
    size: u64,
) -> c_int {
    guarded(|| {
        let block = block_of(block)?;
        if data.is_null() {
            return Err(null("what is to be placed"));
        }
        // Before the bytes are looked at: a size that is garbage must not make anyone read so far.
        block.pages_of(offset, size)?;
        // SAFETY: not null, and the caller vouches for so many bytes, which fit into the block.
        let data = unsafe { std::slice::from_raw_parts(data.cast::<u8>(), size as usize) };
        block.place(offset, data)
    })
}

/// Frees at once the memory that pages have left and that is kept for a while (see gmem_block_config's
/// `release_delay_ms`). What can't be freed is logged, and counted in `release_failures`. Waits for
/// conversions where it is; takes no other lock of the library, and doesn't need QEMU's big lock.
///
/// -EINVAL: no such block.
#[no_mangle]
pub extern "C" fn gmem_block_release_pending(block: *mut gmem_block) -> c_int {
    guarded(|| {
        block_of(block)?.release_pending();
        Ok(())
    })
}

/// Gives the memory of `size` bytes at `offset`, whole pages, back to the host, as when a guest inflates
/// a balloon or reports pages free. They keep their attributes, and who touches one next gets new
/// memory. Shared pages read zero on return. What a guest finds in a private one is for the VM's type
/// to say: zeros on KVM_X86_SW_PROTECTED_VM; on TDX and SNP the page must be accepted or validated anew,
/// so only a guest that does so may be offered this.
///
/// Huge pages from a pool go as a whole, and those of a split block only with `no_reserve`; what else is
/// shared is zeroed and keeps its memory. In place they stay set aside for the block. Under a NUMA
/// policy, new private memory comes from where the vCPU's own policy says.
///
/// Who has pages pinned, other than by DMA windows, keeps the old memory: don't discard beside those.
/// Works in pieces of 64 MiB, or of one huge page if that is larger: waits for conversions in each, widened
/// to whole huge pages and DMA units, and leaves all as the books say; others go on meanwhile. Takes no
/// other lock. May run with QEMU's big lock: what is zeroed and frees nothing is bounded by 32 MiB in all.
/// Listeners are not told.
///
/// -EINVAL: empty, not page aligned, not in the block, or no such block. -EBUSY: a DMA window maps a page
/// of it, or the VM is detached. -EIO: a page is poisoned. -ENOSPC: more than 32 MiB of it would have to
/// be zeroed: ask for less, or for whole huge pages. Nothing has happened then, unless it came to that
/// between two pieces. Another errno is fallocate(2)'s. Parts of the range may be gone, attributes are as
/// before; it may be asked for again.
#[no_mangle]
pub extern "C" fn gmem_block_discard(block: *mut gmem_block, offset: u64, size: u64) -> c_int {
    guarded(|| block_of(block)?.discard(offset, size))
}

/// The host's hardware has lost the memory that gmem_block_host() shows for `size` bytes at `offset`, as a
/// SIGBUS says: of whole pages around them. In a split block that is shared memory, also behind pages that
/// are private now, which stay usable. No device reaches lost pages any more, conversions that include one,
/// or would lead to one, get -EIO, so do gmem_max_order() and gmem_block_check_access(), and preallocation
/// leaves them out, until gmem_block_reset() has given them fresh memory or the VM is rebuilt. Twice is as
/// good as once. Waits for conversions in the block.
///
/// -EINVAL: empty or not in the block, or no such block. -EBUSY: the VM is detached. Another errno: a
/// DMA window refused to let go of them, or to take back what had to leave it for a moment, which is
/// quarantined then; they are poisoned all the same.
#[no_mangle]
pub extern "C" fn gmem_block_poison(block: *mut gmem_block, offset: u64, size: u64) -> c_int {
    guarded(|| block_of(block)?.poison(offset, size))
}

/// State and counts of a block.
///
/// -EINVAL: a NULL, a stale block, or a `struct_size` of no version.
///
/// # Safety
/// `stats` is NULL or points to a structure of `struct_size` bytes.
#[no_mangle]
pub unsafe extern "C" fn gmem_block_get_stats(
    block: *const gmem_block,
    stats: *mut gmem_block_stats,
) -> c_int {
    guarded(|| {
        let block = block_of(block)?;
        // SAFETY: the caller's promise is `fill`'s.
        unsafe { structs::fill(stats, gmem_block_stats::of(&block)) }
    })
}

/// The attribute (GMEM_SHARED or GMEM_PRIVATE) of the page at `offset`, and the offset at which
/// the run of pages with that attribute ends, exclusive. Right at this moment: a conversion may
/// follow at once, unless the caller is a listener and its range is asked for.
///
/// -EINVAL: an offset beyond the block, a NULL, a stale block.
///
/// # Safety
/// `end` and `attribute` are NULL or point to memory for their types.
#[no_mangle]
pub unsafe extern "C" fn gmem_block_get_run(
    block: *const gmem_block,
    offset: u64,
    end: *mut u64,
    attribute: *mut u32,
) -> c_int {
    guarded(|| {
        if end.is_null() || attribute.is_null() {
            return Err(null("the place for the run"));
        }
        let (found, run_end) = block_of(block)?.run_at(offset)?;
        // SAFETY: neither is null, and the caller vouches for the rest.
        unsafe {
            end.write(run_end);
            attribute.write(structs::attribute_number(found));
        }
        Ok(())
    })
}

/// How large a mapping may be that holds the page at `offset` and pages of one attribute only: log2
/// of the pages in the largest naturally aligned range of the block around it. Right at this
/// moment, unless the caller is a listener and asks about its range. Takes no lock that a conversion
/// holds while it waits.
///
/// -EINVAL: an offset beyond the block, a NULL, a stale block. -EIO: the page is poisoned.
///
/// # Safety
/// `order` is NULL or points to memory for its type.
#[no_mangle]
pub unsafe extern "C" fn gmem_max_order(
    block: *const gmem_block,
    offset: u64,
    order: *mut u32,
) -> c_int {
    guarded(|| {
        if order.is_null() {
            return Err(null("the place for the order"));
        }
        let found = block_of(block)?.max_order(offset)?;
        // SAFETY: not null, and the caller vouches for the rest.
        unsafe { order.write(found) };
        Ok(())
    })
}

/// Asks before the VMM touches `size` bytes at `offset` of gmem_block_host(). 0: all of them are
/// shared, at this moment. Costs a look-up and one atomic load while the block has no private page.
///
/// -EACCES: a page is private; it is counted (access_refused). -EIO: a page is poisoned. -EINVAL:
/// beyond the block, or no such block.
#[no_mangle]
pub extern "C" fn gmem_block_check_access(
    block: *const gmem_block,
    offset: u64,
    size: u64,
) -> c_int {
    guarded(|| block_of(block)?.check_access(offset, size))
}

/// Shows `size` bytes of a block from `offset` at `gpa` and tells the kernel their attributes. The
/// memory slot may exist or follow: KVM keeps attributes by address. Waits for conversions of these pages.
///
/// -EINVAL: a range that is empty, unaligned, wrapping or not in the block, or no such block.
/// -EEXIST: an address or an offset is bound already. -ENOMEM: KVM_SET_MEMORY_ATTRIBUTES, also of what
/// an earlier gmem_unbind() left private there. Nothing is bound then.
#[no_mangle]
pub extern "C" fn gmem_bind(block: *mut gmem_block, offset: u64, size: u64, gpa: u64) -> c_int {
    guarded(|| block_of(block)?.bind(offset, size, gpa))
}

/// Ends a binding, given exactly as it was made. Its memory slot must be gone: for KVM the addresses
/// are shared afterwards, and a vCPU would find shared memory where it left a private page.
/// Waits for conversions of these pages.
///
/// -EINVAL: there is no such binding or block. -ENOMEM: KVM_SET_MEMORY_ATTRIBUTES failed; the
/// binding has ended, but the kernel still holds its addresses for private, and a vCPU finds no memory
/// there. gmem_bind() over them makes them shared before all else.
#[no_mangle]
pub extern "C" fn gmem_unbind(block: *mut gmem_block, offset: u64, size: u64, gpa: u64) -> c_int {
    guarded(|| block_of(block)?.unbind(offset, size, gpa))
}
