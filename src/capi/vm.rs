// SPDX-License-Identifier: MIT OR Apache-2.0
//! A VM and its conversions, for C.

use super::last_error::{self, Last};
use super::structs::{self, *};
use super::{give, gmem_vm, guarded, null, opened, vm_of, BLOCKS, VMS};
use crate::error::Error;
use crate::faults::MemoryFault;
use crate::vm::Vm;
use std::ffi::c_int;
use std::sync::Arc;

/// [`Vm::new`] for C. Ends with gmem_vm_free().
///
/// # Errors
/// - EBADF: `vm_fd` isn't open.
///
/// # Safety
/// `vm` points to memory for a pointer, which is written on success only; NULL is -EINVAL.
#[no_mangle]
pub unsafe extern "C" fn gmem_vm_new(vm_fd: c_int, vm: *mut *mut gmem_vm) -> c_int {
    // SAFETY: the caller's promise is `give`'s.
    guarded(|| unsafe {
        give(vm, || {
            Ok(VMS.insert(Vm::new(opened(vm_fd, "the VM's file")?)?))
        })
    })
}

/// Ends a VM: the library's file of it is closed.
///
/// # Errors
/// - EBUSY: it has blocks; nothing happened.
///
/// Only in C: in Rust its last owner ends it.
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

/// [`Vm::detach`] for C.
#[no_mangle]
pub extern "C" fn gmem_vm_detach(vm: *mut gmem_vm) -> c_int {
    guarded(|| vm_of(vm)?.detach())
}

/// [`Vm::attach`] for C.
///
/// # Errors
/// - EBADF: `new_vm_fd` isn't open.
#[no_mangle]
pub extern "C" fn gmem_vm_attach(vm: *mut gmem_vm, new_vm_fd: c_int) -> c_int {
    guarded(|| vm_of(vm)?.attach(opened(new_vm_fd, "the new VM's file")?))
}

/// [`Vm::end`] for C.
#[no_mangle]
pub extern "C" fn gmem_vm_end(vm: *mut gmem_vm) -> c_int {
    guarded(|| vm_of(vm)?.end())
}

/// [`Vm::probe`] for C.
///
/// # Safety
/// `probe` points to a structure of `struct_size` bytes; NULL is -EINVAL.
#[no_mangle]
pub unsafe extern "C" fn gmem_vm_probe(vm: *const gmem_vm, probe: *mut gmem_probe) -> c_int {
    // SAFETY: the caller's promise is `fill`'s.
    guarded(|| unsafe { structs::fill(probe, gmem_probe::from(vm_of(vm)?.probe())) })
}

/// [`Vm::stats`] for C.
///
/// # Safety
/// `stats` points to a structure of `struct_size` bytes; NULL is -EINVAL.
#[no_mangle]
pub unsafe extern "C" fn gmem_vm_get_stats(vm: *const gmem_vm, stats: *mut gmem_vm_stats) -> c_int {
    // SAFETY: the caller's promise is `fill`'s.
    guarded(|| unsafe { structs::fill(stats, gmem_vm_stats::from(vm_of(vm)?.stats())) })
}

/// [`Vm::poison`] for C.
#[no_mangle]
pub extern "C" fn gmem_vm_poison(vm: *mut gmem_vm, gpa: u64, size: u64) -> c_int {
    guarded(|| vm_of(vm)?.poison(gpa, size))
}

/// [`Vm::convert`] for C.
///
/// gmem_hypercall_result() turns the errno into what a guest may be told.
#[no_mangle]
pub extern "C" fn gmem_convert(vm: *mut gmem_vm, gpa: u64, size: u64, attribute: u32) -> c_int {
    guarded(|| {
        let vm = vm_of(vm)?;
        let attribute = structs::attribute_of(attribute).inspect_err(|_| vm.count_senseless())?;
        vm.convert(gpa, size, attribute)
    })
}

/// [`Vm::convert_file`] for C.
///
/// # Errors
/// - EBADF: `guest_memfd` isn't open.
#[no_mangle]
pub extern "C" fn gmem_vm_convert_file(
    vm: *mut gmem_vm,
    guest_memfd: c_int,
    offset: u64,
    size: u64,
    attribute: u32,
) -> c_int {
    guarded(|| {
        let vm = vm_of(vm)?;
        let attribute = structs::attribute_of(attribute)?;
        let file = opened(guest_memfd, "the guest_memfd")?;
        vm.convert_file(file, offset, size, attribute)
    })
}

/// [`Vm::sequence`] for C. Read it by `__atomic_load_n(p, __ATOMIC_ACQUIRE)`. Valid as long as the VM. NULL for
/// a handle that is not a VM's, with a sentence for gmem_last_error().
#[no_mangle]
pub extern "C" fn gmem_vm_sequence(vm: *const gmem_vm) -> *const u64 {
    let mut sequence = std::ptr::null();
    guarded(|| {
        // The table keeps the VM as long as the handle.
        sequence = vm_of(vm)?.sequence().as_ptr().cast_const();
        Ok(())
    });
    sequence
}

/// [`Vm::memory_fault`] for C.
///
/// `verdict` gets the GMEM_FAULT_…, and gmem_last_error() says why, unless it is GMEM_FAULT_SERVED or
/// GMEM_FAULT_ECHO.
/// `converts` is 0 or 1.
///
/// # Errors
/// - EINVAL: an unknown attribute or `converts`. Whatever else is wrong is in the verdict.
///
/// # Safety
/// `verdict` points to memory for its type; NULL is -EINVAL.
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

/// What `hypercall.ret` of a KVM_HC_MAP_GPA_RANGE exit is to hold (kvm_is_valid_map_gpa_range_ret), for what
/// gmem_convert() returned as `error`: 0 for 0; with `can_retry` not 0, EAGAIN for -EAGAIN and -ENOMEM, for
/// guests that take that for "ask again" (TDX); EINVAL for all else. Positive.
///
/// Only in C: in Rust [`Error::hypercall_result`] says it of an error.
#[no_mangle]
pub extern "C" fn gmem_hypercall_result(error: c_int, can_retry: u32) -> u64 {
    match error.checked_neg() {
        Some(errno) => crate::error::hypercall_result(errno, can_retry != 0),
        None => libc::EINVAL as u64,
    }
}
