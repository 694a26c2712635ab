// SPDX-License-Identifier: MIT OR Apache-2.0
//! A VM and its conversions, for C.

use super::last_error::{self, Last};
use super::structs::{self, *};
use super::{give, gmem_vm, guarded, null, vm_of, BLOCKS, VMS};
use crate::error::Error;
use crate::faults::MemoryFault;
use crate::vm::Vm;
use std::ffi::c_int;
use std::sync::Arc;

/// Opens the VM behind a KVM VM file, which is duplicated: close yours whenever you like. Ends with
/// gmem_vm_free().
///
/// -EBADF: `vm_fd` isn't open. -ENOTTY: it isn't a KVM VM. -EINVAL: `vm` is NULL.
///
/// # Safety
/// `vm` is NULL or points to memory for a pointer, which is written on success only.
#[no_mangle]
pub unsafe extern "C" fn gmem_vm_new(vm_fd: c_int, vm: *mut *mut gmem_vm) -> c_int {
    // SAFETY: the caller's promise is `give`'s.
    guarded(|| unsafe { give(vm, || Ok(VMS.insert(Vm::new(vm_fd)?))) })
}

/// Ends a VM: the library's file of it is closed. NULL is fine.
///
/// -EBUSY: it has blocks; nothing happened. -EINVAL: no such VM (any more).
#[no_mangle]
pub extern "C" fn gmem_vm_free(vm: *mut gmem_vm) -> c_int {
    guarded(|| {
        if vm.is_null() {
            return Ok(());
        }
        let inner = vm_of(vm)?;
        if BLOCKS.any(|block| Arc::ptr_eq(block.machine(), inner.machine())) {
            return Err(Error::busy("the VM still has blocks"));
        }
        VMS.remove(vm as usize, "VM").map(drop)
    })
}

/// Lets go of a VM whose KVM file is about to be rebuilt, as on a reset of some confidential guests:
/// DMA out of all windows, bindings ended, guest_memfds closed, and the library's file of the VM.
/// Windows, listeners and blocks stay, and so do the addresses of gmem_block_host(), which can't be
/// touched now where they were a guest_memfd. Memory slots must be gone and no vCPU may run. Bytes
/// and attributes are lost. Takes bindings and every range: waits for all conversions.
///
/// Until gmem_vm_attach(), what needs the VM fails with -EBUSY: conversions, bindings, new blocks,
/// preallocation. Blocks and windows may end, and windows come, which show nothing yet. Listeners
/// are told of pages that have another attribute than at first. Does nothing the second time.
///
/// -EINVAL: no such VM. -EMFILE, -ENOMEM, or the errno of a window that refused to unmap: the VM is
/// attached, as before.
#[no_mangle]
pub extern "C" fn gmem_vm_detach(vm: *mut gmem_vm) -> c_int {
    guarded(|| vm_of(vm)?.detach())
}

/// Gives a detached VM its new KVM file, which is duplicated: new files for all blocks, at the same
/// addresses and with the same file numbers; every page has its initial attribute; windows are filled
/// again. Whatever is at the addresses by then, such as zeros that the caller showed meanwhile, is
/// replaced. Bindings and memory slots are the caller's to make, and so is advice (madvise) on the
/// memory, whose mapping is a new one.
///
/// -EINVAL: no such VM. -EBUSY: it isn't detached. -EBADF, -ENOTTY: `new_vm_fd` is no KVM VM.
/// -ENOTSUP: it is of another kind. -ENOMEM, …: creating, mapping or pinning failed. The
/// VM stays detached then.
#[no_mangle]
pub extern "C" fn gmem_vm_attach(vm: *mut gmem_vm, new_vm_fd: c_int) -> c_int {
    guarded(|| vm_of(vm)?.attach(new_vm_fd))
}

/// Prepares the end of the process, as an exit handler does: in blocks that convert in place all
/// private bytes are lost, and with them the files' record of what is private, which the host's kernel
/// is spared to take apart (a guest can make it such that Linux 7.3 fails at that). Threads may still
/// run: memory stays mapped, and shared bytes stay what they are but in huge pages that have a private
/// part; devices keep what they reach but in blocks of huge pages. What a vCPU that still runs writes
/// to a private page between the two calls that end it goes as well, but for a moment in between host
/// threads, and who else has the file mapped, could read it: stop the vCPUs first, and no private byte
/// is ever shown. Nothing converts any more: what
/// needs the VM fails with -EBUSY. Does nothing for blocks of other kinds, nor for those with 16 private
/// runs or fewer, which no kernel fails at: their private bytes stay private, in the file. Called again, it does what it
/// could not do before, and nothing else; so does the end of each block.
///
/// Takes the range of each block that converts in place, and waits a second for all of
/// them at most. What can't be done in a block is logged.
///
/// -EINVAL: no such VM. -EBUSY: conversions under way did not end in time, and the files are as they
/// were; or what else was under way in some blocks did not, such as gmem_block_preallocate(), and their
/// files are. gmem_last_error() says which. Nothing converts all the same.
#[no_mangle]
pub extern "C" fn gmem_vm_end(vm: *mut gmem_vm) -> c_int {
    guarded(|| vm_of(vm)?.end())
}

/// What the kernel can do for this VM.
///
/// -EINVAL: a NULL, a stale VM, or a `struct_size` of no version.
///
/// # Safety
/// `probe` is NULL or points to a structure of `struct_size` bytes.
#[no_mangle]
pub unsafe extern "C" fn gmem_vm_probe(vm: *const gmem_vm, probe: *mut gmem_probe) -> c_int {
    // SAFETY: the caller's promise is `fill`'s.
    guarded(|| unsafe { structs::fill(probe, gmem_probe::from(vm_of(vm)?.probe())) })
}

/// Counts of the VM's conversion requests.
///
/// -EINVAL: a NULL, a stale VM, or a `struct_size` of no version.
///
/// # Safety
/// `stats` is NULL or points to a structure of `struct_size` bytes.
#[no_mangle]
pub unsafe extern "C" fn gmem_vm_get_stats(vm: *const gmem_vm, stats: *mut gmem_vm_stats) -> c_int {
    // SAFETY: the caller's promise is `fill`'s.
    guarded(|| unsafe { structs::fill(stats, gmem_vm_stats::from(vm_of(vm)?.stats())) })
}

/// The same for the memory that the guest uses at guest physical addresses, private or shared, as when
/// KVM_RUN fails with EHWPOISON and a memory-fault exit that says where. It may cross bindings; what is no
/// memory of a block is left out. Waits for conversions around it. No memory slot may come or go meanwhile.
///
/// -EINVAL: empty, wrapping, nothing of it is memory of a block, or no such VM. Else as
/// gmem_block_poison().
#[no_mangle]
pub extern "C" fn gmem_vm_poison(vm: *mut gmem_vm, gpa: u64, size: u64) -> c_int {
    guarded(|| vm_of(vm)?.poison(gpa, size))
}

/// Serves a guest's request to make `size` bytes at `gpa` GMEM_SHARED or GMEM_PRIVATE, all of it or
/// nothing. It may cross bindings, blocks and, to shared, anything else, which is ignored and
/// counted (ignored_bytes). Pages that have the attribute already cost nothing.
///
/// Takes the range: waits for requests that overlap, not for others, unless all together would have more than
/// 1 GiB, or the largest max_request, in both planes of split blocks: then for those before it.
/// Calls listeners with the range held. Call it without QEMU's big lock.
///
/// -EINVAL: empty, unaligned, wrapping, against the convert-unit, to make something private that
/// can't be, or no such VM. -ENOSPC: max_runs or max_request. -ENOMEM: the library has no memory for it.
/// -ENOMEM, -EAGAIN or another errno of the kernel or a listener. -EIO: a page of it is poisoned. Attributes, backing and DMA are as they were, or where
/// undoing failed, quarantined. gmem_hypercall_result() turns the errno into what a guest may be told.
#[no_mangle]
pub extern "C" fn gmem_convert(vm: *mut gmem_vm, gpa: u64, size: u64, attribute: u32) -> c_int {
    guarded(|| {
        let vm = vm_of(vm)?;
        let attribute = structs::attribute_of(attribute).inspect_err(|_| vm.count_senseless())?;
        vm.convert(gpa, size, attribute)
    })
}

/// A number that grows whenever a conversion ends. Read it (with acquire semantics) each time before a
/// vCPU enters KVM_RUN, and hand what was read to gmem_memory_fault() if the vCPU comes out with a memory
/// fault. Valid as long as the VM. NULL for a handle that is not a VM's.
#[no_mangle]
pub extern "C" fn gmem_vm_sequence(vm: *const gmem_vm) -> *const u64 {
    // The table keeps the VM as long as the handle.
    vm_of(vm).map_or(std::ptr::null(), |vm| vm.sequence().as_ptr().cast_const())
}

/// Serves a KVM_EXIT_MEMORY_FAULT: a vCPU accessed `size` bytes at `gpa` as if they were `attribute`
/// (GMEM_PRIVATE if the exit's flags have KVM_MEMORY_EXIT_FLAG_PRIVATE). Converts them where that is what
/// the guest means; `verdict` (GMEM_FAULT_…) says what the caller is to do with the vCPU, and
/// gmem_last_error() why, unless it is GMEM_FAULT_SERVED or GMEM_FAULT_ECHO.
///
/// `converts`: 0 if the kind of an access follows the attribute (KVM_X86_SW_PROTECTED_VM), so that a fault
/// asks for nothing; else 1. `entered`: what *gmem_vm_sequence() was before the vCPU entered KVM_RUN, or
/// UINT64_MAX for a fault that has been GMEM_FAULT_ECHO again and again.
///
/// No memory slot may come or go meanwhile. Else as gmem_convert(): it waits for requests that overlap;
/// call it without QEMU's big lock.
///
/// -EINVAL: no such VM, an unknown attribute or `converts`, or a NULL.
///
/// # Safety
/// `verdict` is NULL or points to memory for its type.
#[no_mangle]
pub unsafe extern "C" fn gmem_memory_fault(
    vm: *mut gmem_vm,
    gpa: u64,
    size: u64,
    attribute: u32,
    converts: u32,
    entered: u64,
    verdict: *mut u32,
) -> c_int {
    guarded(|| {
        if verdict.is_null() {
            return Err(null("the place for the verdict"));
        }
        let vm = vm_of(vm)?;
        let attribute = structs::attribute_of(attribute)?;
        if converts > 1 {
            return Err(Error::invalid(format!(
                "converts is {converts}, not 0 or 1"
            )));
        }
        let (number, error) = match vm.memory_fault(gpa, size, attribute, converts == 1, entered) {
            MemoryFault::Served => (GMEM_FAULT_SERVED, None),
            MemoryFault::Echo => (GMEM_FAULT_ECHO, None),
            MemoryFault::Unexplained(error) => (GMEM_FAULT_UNEXPLAINED, Some(error)),
            MemoryFault::Later(error) => (GMEM_FAULT_LATER, Some(error)),
            MemoryFault::Never(error) => (GMEM_FAULT_NEVER, Some(error)),
        };
        if let Some(error) = error {
            last_error::set(Last::Error(error));
        }
        // SAFETY: not null, and the caller vouches for the rest.
        unsafe { verdict.write(number) };
        Ok(())
    })
}

/// What `hypercall.ret` of a KVM_HC_MAP_GPA_RANGE exit may hold, which is 0, EINVAL or EAGAIN,
/// positive, and nothing else (kvm_is_valid_map_gpa_range_ret). `error` is 0 or the negative errno of
/// gmem_convert(). `can_retry`: not 0 if the guest takes EAGAIN for "ask again" (TDX); for others it is
/// fatal.
#[no_mangle]
pub extern "C" fn gmem_hypercall_result(error: c_int, can_retry: u32) -> u64 {
    match error.checked_neg() {
        Some(0) => 0,
        Some(libc::EAGAIN | libc::ENOMEM) if can_retry != 0 => libc::EAGAIN as u64,
        _ => libc::EINVAL as u64,
    }
}
