// SPDX-License-Identifier: MIT OR Apache-2.0
//! How a program finds out, on both sides of the module parameter. Off is Linux 7.3 for all that a program can see.

use crate::sys::{
    ioctl, ioctl_number, Attributes1, Attributes2, Vm, KVM_CHECK_EXTENSION,
    KVM_SET_MEMORY_ATTRIBUTES, KVM_SET_MEMORY_ATTRIBUTES2,
};
use crate::{
    in_place, name_of, probe, split, Converted, DEFAULT, INIT_SHARED, MMAP, PAGE, PRIVATE, SHARED,
};
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;

const PARAMETER: &str = "/sys/module/kvm/parameters/gmem_in_place_conversion";
const KVM_CAP_MEMORY_ATTRIBUTES: u64 = 233;
const KVM_CAP_GUEST_MEMFD_FLAGS: u64 = 244;

/// A creation flag that nobody has claimed.
const UNKNOWN_FLAG: u64 = 1 << 40;

fn system_extension(cap: u64) -> i32 {
    let kvm = File::options().read(true).write(true).open("/dev/kvm");
    ioctl_number(kvm.unwrap().as_raw_fd(), KVM_CHECK_EXTENSION, cap).unwrap()
}

#[test]
fn a_conversion_that_changes_nothing_tells() {
    let Some(vm) = in_place(name_of(a_conversion_that_changes_nothing_tells)) else {
        return;
    };
    assert_eq!(probe(&vm), Converted::Yes);
    // A VM without private memory, on the same kernel.
    let ordinary = Vm::new(DEFAULT).unwrap();
    assert_eq!(probe(&ordinary), Converted::Refused(libc::EINVAL));
}

#[test]
fn the_parameter_agrees_and_is_for_reading() {
    let test = name_of(the_parameter_agrees_and_is_for_reading);
    let Some(_vm) = in_place(test) else {
        return;
    };
    assert_eq!(fs::read_to_string(PARAMETER).unwrap().trim(), "Y");
    let mode = fs::metadata(PARAMETER).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o444);
    assert!(fs::write(PARAMETER, "N").is_err());
}

#[test]
fn the_vm_has_no_attributes_any_more() {
    let Some(vm) = in_place(name_of(the_vm_has_no_attributes_any_more)) else {
        return;
    };
    assert_eq!(vm.extension(KVM_CAP_MEMORY_ATTRIBUTES), 0);
    assert_eq!(system_extension(KVM_CAP_MEMORY_ATTRIBUTES), 0);
    let set = |attributes| {
        let mut request = Attributes1 {
            size: PAGE,
            attributes,
            ..Default::default()
        };
        ioctl(vm.fd(), KVM_SET_MEMORY_ATTRIBUTES, &mut request)
    };
    match set(SHARED) {
        Ok(_) => assert_eq!(set(PRIVATE), Err(libc::EINVAL)),
        // Built without CONFIG_KVM_VM_MEMORY_ATTRIBUTES.
        Err(errno) => {
            assert_eq!(errno, libc::ENOTTY);
            assert_eq!(set(PRIVATE), Err(libc::ENOTTY));
        }
    }
}

#[test]
fn each_request_belongs_to_one_kind_of_file() {
    let Some(vm) = in_place(name_of(each_request_belongs_to_one_kind_of_file)) else {
        return;
    };
    let mut request = Attributes2::default();
    let on_vm = ioctl(vm.fd(), KVM_SET_MEMORY_ATTRIBUTES2, &mut request);
    assert_eq!(on_vm, Err(libc::ENOTTY));
    let gmem = vm.gmem(PAGE, 0).unwrap();
    let mut request = Attributes1::default();
    let on_gmem = ioctl(gmem.fd(), KVM_SET_MEMORY_ATTRIBUTES, &mut request);
    assert_eq!(on_gmem, Err(libc::ENOTTY));
}

#[test]
fn files_can_begin_shared() {
    let Some(vm) = in_place(name_of(files_can_begin_shared)) else {
        return;
    };
    let known = MMAP | INIT_SHARED;
    let flags = vm.extension(KVM_CAP_GUEST_MEMFD_FLAGS) as u64;
    assert_eq!(flags & known, known);
    for flags in [0, MMAP, INIT_SHARED, known] {
        vm.gmem(PAGE, flags).unwrap();
    }
    assert_eq!(vm.gmem(PAGE, UNKNOWN_FLAG).err(), Some(libc::EINVAL));
}

/// The same rows on a kernel that has the code and the parameter off, and on one that has neither.
#[test]
fn off_is_as_if_it_had_never_been_written() {
    let Some(vm) = split(name_of(off_is_as_if_it_had_never_been_written)) else {
        return;
    };
    assert!(fs::read_to_string(PARAMETER).map_or(true, |text| text.trim() == "N"));
    assert_eq!(vm.extension(KVM_CAP_MEMORY_ATTRIBUTES) as u64, PRIVATE);
    assert_eq!(
        system_extension(KVM_CAP_MEMORY_ATTRIBUTES) as u64 & PRIVATE,
        PRIVATE
    );
    assert_eq!(vm.extension(KVM_CAP_GUEST_MEMFD_FLAGS) as u64, MMAP);
    let ordinary = Vm::new(DEFAULT).unwrap();
    let both = MMAP | INIT_SHARED;
    assert_eq!(ordinary.extension(KVM_CAP_GUEST_MEMFD_FLAGS) as u64, both);
    assert_eq!(system_extension(KVM_CAP_GUEST_MEMFD_FLAGS) as u64, both);

    assert_eq!(probe(&ordinary), Converted::Refused(libc::ENOTTY));
    let gmem = vm.gmem(PAGE, MMAP).unwrap();
    let bad = ioctl_number(gmem.fd(), KVM_SET_MEMORY_ATTRIBUTES2, 8);
    assert_eq!(bad, Err(libc::ENOTTY));
    for flags in [INIT_SHARED, both, 1 << 2, UNKNOWN_FLAG] {
        assert_eq!(vm.gmem(PAGE, flags).err(), Some(libc::EINVAL), "{flags:#x}");
    }
}
