// SPDX-License-Identifier: MIT OR Apache-2.0
//! A block, for C.

use super::structs::{self, *};
use super::{block_of, give, gmem_block, gmem_vm, guarded, null, vm_of, BLOCKS};
use crate::block::{Block, BlockConfig};
use crate::Attribute;
use std::ffi::{c_int, c_void, CStr};
use std::os::fd::AsRawFd;

/// [`Block::new`] for C.
///
/// Ends with gmem_block_free().
///
/// # Safety
/// `config` points to a structure of `struct_size` bytes, whose `name` is NULL or a NUL-terminated string and
/// whose `policy_nodes` has `policy_words` words; `block` points to memory for a pointer. NULL for either is
/// -EINVAL.
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
/// memory slots must be gone. Waits for a rebuild of the VM.
///
/// # Errors
/// - EBUSY: it is bound, in a DMA window or listened to; nothing happened. So it is while a window that
///   gmem_window_new() could not make can't be closed: try again.
///
/// Only in C: in Rust its last owner ends it.
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

/// [`Block::host`] for C. NULL for a handle that is not a block's, with a sentence for gmem_last_error().
#[no_mangle]
pub extern "C" fn gmem_block_host(block: *const gmem_block) -> *mut c_void {
    let mut host = std::ptr::null_mut();
    guarded(|| {
        host = block_of(block)?.host().cast();
        Ok(())
    });
    host
}

/// [`Block::file`] for C, begun anew.
///
/// The file with the shared bytes, at their offsets: for vhost-user, never for VFIO, which goes by
/// [`Block::add_window`]. In place it is the guest_memfd. A file descriptor, or a negative errno. Stays the
/// library's: don't close it.
#[no_mangle]
pub extern "C" fn gmem_block_shared_fd(block: *const gmem_block) -> c_int {
    file_of(block, Attribute::Shared)
}

/// The file with the private bytes, at their offsets: the guest_memfd, for memory slots. In place it is that
/// of gmem_block_shared_fd(). A file descriptor, or a negative errno. Stays the library's: don't close it.
///
/// Only in C: in Rust [`Block::file`] has both.
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

/// [`Block::memslot`] for C.
///
/// # Safety
/// `slot` points to a structure of `struct_size` bytes; NULL is -EINVAL.
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

/// [`Block::preallocate`] for C.
#[no_mangle]
pub extern "C" fn gmem_block_preallocate(block: *mut gmem_block, threads: u32) -> c_int {
    guarded(|| block_of(block)?.preallocate(threads as usize))
}

/// [`Block::reset`] for C.
#[no_mangle]
pub extern "C" fn gmem_block_reset(block: *mut gmem_block) -> c_int {
    guarded(|| block_of(block)?.reset())
}

/// [`Block::place`] for C. The bytes are `size` at `data`.
///
/// # Safety
/// `data` points to `size` bytes, which are not the block's own; NULL is -EINVAL.
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

/// [`Block::release_pending`] for C.
#[no_mangle]
pub extern "C" fn gmem_block_release_pending(block: *mut gmem_block) -> c_int {
    guarded(|| {
        block_of(block)?.release_pending();
        Ok(())
    })
}

/// [`Block::discard`] for C.
#[no_mangle]
pub extern "C" fn gmem_block_discard(block: *mut gmem_block, offset: u64, size: u64) -> c_int {
    guarded(|| block_of(block)?.discard(offset, size))
}

/// [`Block::poison`] for C.
#[no_mangle]
pub extern "C" fn gmem_block_poison(block: *mut gmem_block, offset: u64, size: u64) -> c_int {
    guarded(|| block_of(block)?.poison(offset, size))
}

/// [`Block::stats`] for C.
///
/// # Safety
/// `stats` points to a structure of `struct_size` bytes; NULL is -EINVAL.
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

/// [`Block::run_at`] for C. `attribute` gets the one, GMEM_SHARED or GMEM_PRIVATE, `end` the other.
///
/// # Safety
/// `end` and `attribute` point to memory for their types. NULL for either is -EINVAL.
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

/// [`Block::max_order`] for C.
///
/// # Safety
/// `order` points to memory for its type; NULL is -EINVAL.
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

/// [`Block::check_access`] for C.
#[no_mangle]
pub extern "C" fn gmem_block_check_access(
    block: *const gmem_block,
    offset: u64,
    size: u64,
) -> c_int {
    guarded(|| block_of(block)?.check_access(offset, size))
}

/// [`Block::bind`] for C.
#[no_mangle]
pub extern "C" fn gmem_bind(block: *mut gmem_block, offset: u64, size: u64, gpa: u64) -> c_int {
    guarded(|| {
        block_of(block)?.bind(offset, size, gpa)?.keep();
        Ok(())
    })
}

/// [`Block::unbind`] for C.
#[no_mangle]
pub extern "C" fn gmem_unbind(block: *mut gmem_block, offset: u64, size: u64, gpa: u64) -> c_int {
    guarded(|| block_of(block)?.unbind(offset, size, gpa))
}
