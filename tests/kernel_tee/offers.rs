// SPDX-License-Identifier: MIT OR Apache-2.0
//! What is offered, and that nothing is with the parameter at 0.

use crate::guest::{Exit, Guest, Program, Vcpu, KVM_MEMORY_ENCRYPT_OP, ROM};
use crate::lab::{fail, failing, offer, Offered};
use crate::sys::{ioctl, ioctl_number, Vm, KVM_CHECK_EXTENSION};
use crate::{name_of, NOWHERE, PAGE, SNP, SW_PROTECTED, TDX};
use libc::c_ulong;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;

const KVM_GET_DEVICE_ATTR: c_ulong = 0x4018_aee2;
const KVM_CAP_VM_TYPES: u64 = 235;
const KVM_CAP_READONLY_MEM: u64 = 81;
const SEV_ISSUE_CMD: c_ulong = 0xc010_5300;
const DEVICE: &str = "/dev/sev";

fn kvm() -> File {
    File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .unwrap()
}

fn types() -> i32 {
    ioctl_number(kvm().as_raw_fd(), KVM_CHECK_EXTENSION, KVM_CAP_VM_TYPES).unwrap()
}

fn refused(kind: u64) -> Option<i32> {
    Vm::new(kind)
        .err()
        .map(|error| error.raw_os_error().unwrap())
}

/// Of the group SEV.
fn attribute(number: u64) -> Result<u64, i32> {
    let mut value = 0u64;
    // `struct kvm_device_attr`: flags and group, attr, addr.
    let mut request = [1 << 32, number, &raw mut value as u64];
    ioctl(kvm().as_raw_fd(), KVM_GET_DEVICE_ATTR, &mut request).map(|_| value)
}

#[test]
fn nothing_is_offered_by_default() {
    let Some(_offered) = Offered::new(name_of(nothing_is_offered_by_default), 0) else {
        return;
    };
    assert_eq!(types() & 0b11_0000, 0);
    assert_eq!(refused(SNP), Some(libc::EINVAL));
    assert_eq!(refused(TDX), Some(libc::EINVAL));
    assert!(!Path::new(DEVICE).exists());
    assert_eq!(attribute(0), Err(libc::ENXIO));
    let vm = Vm::new(SW_PROTECTED).unwrap();
    assert_eq!(
        ioctl_number(vm.fd(), KVM_MEMORY_ENCRYPT_OP, 0),
        Err(libc::ENOTTY)
    );
    assert_eq!(vm.extension(KVM_CAP_READONLY_MEM), 1);
}

#[test]
fn each_bit_offers_one() {
    let Some(_offered) = Offered::new(name_of(each_bit_offers_one), 1) else {
        return;
    };
    assert_eq!(types() & 0b11_0000, 1 << SNP);
    assert_eq!((refused(SNP), refused(TDX)), (None, Some(libc::EINVAL)));
    assert!(Path::new(DEVICE).exists());
    assert_eq!(attribute(0), Ok(0));
    // The policy's bits that QEMU asks for.
    assert_eq!(attribute(1).unwrap() & 0x3_0000, 0x3_0000);
    assert_eq!(attribute(9), Err(libc::ENXIO));
    offer(2).unwrap();
    assert_eq!(types() & 0b11_0000, 1 << TDX);
    assert_eq!((refused(SNP), refused(TDX)), (Some(libc::EINVAL), None));
    assert!(!Path::new(DEVICE).exists());
    assert_eq!(attribute(0), Err(libc::ENXIO));
    offer(3).unwrap();
    assert_eq!((refused(SNP), refused(TDX)), (None, None));
    assert_eq!(offer(4).unwrap_err().raw_os_error(), Some(libc::EINVAL));
    let vm = Vm::new(SNP).unwrap();
    assert_eq!(vm.extension(KVM_CAP_READONLY_MEM), 0);
    // Other types are what they were.
    let vm = Vm::new(SW_PROTECTED).unwrap();
    assert_eq!(
        ioctl_number(vm.fd(), KVM_MEMORY_ENCRYPT_OP, 0),
        Err(libc::ENOTTY)
    );
}

#[test]
fn a_vm_outlives_the_offer() {
    let Some(_offered) = Offered::new(name_of(a_vm_outlives_the_offer), 3) else {
        return;
    };
    for kind in [SNP, TDX] {
        offer(3).unwrap();
        let guest = Guest::new(kind);
        offer(0).unwrap();
        let vcpu = guest.launch(Program::default());
        assert_eq!(vcpu.run(), Exit::Done);
    }
}

#[test]
fn another_vms_port_is_a_port() {
    let Some(_offered) = Offered::new(name_of(another_vms_port_is_a_port), 3) else {
        return;
    };
    let guest = Guest::new(SW_PROTECTED);
    guest.convert(ROM / PAGE, 1, false).unwrap();
    let program = Program::default().call(12, 0, 1, 0).page();
    // SAFETY: a page each.
    unsafe {
        let source = program.address() as *const u8;
        source.copy_to_nonoverlapping(guest.rom_shared.page(0), PAGE as usize);
    }
    let vcpu = Vcpu::new(&guest, 0);
    vcpu.flat();
    assert_eq!(vcpu.run(), Exit::Port(0x7e0));
}

#[test]
fn the_platform_has_a_status() {
    let Some(_offered) = Offered::new(name_of(the_platform_has_a_status), 1) else {
        return;
    };
    let device = File::options().read(true).write(true).open(DEVICE).unwrap();
    let ask = |command: u32, data: u64| {
        // `struct sev_issue_cmd`, packed.
        let mut request = [0u32; 4];
        request[0] = command;
        request[1] = data as u32;
        request[2] = (data >> 32) as u32;
        ioctl(device.as_raw_fd(), SEV_ISSUE_CMD, &mut request).map(drop)
    };
    let mut status = [0u8; 12];
    let place = status.as_mut_ptr() as u64;
    assert_eq!(ask(1, place), Ok(()));
    assert!(
        status[..2] >= [1, 51][..],
        "{status:?}: SNP begins with 1.51"
    );
    assert_eq!(ask(1, NOWHERE), Err(libc::EFAULT));
    assert_eq!(ask(0, place), Err(libc::EINVAL));
    assert_eq!(
        ioctl_number(device.as_raw_fd(), 0xae00, 0),
        Err(libc::EINVAL)
    );
    fail("snp-platform-status,1,5").unwrap();
    assert_eq!(ask(1, place), Err(libc::EIO));
    assert_eq!(ask(1, place), Ok(()));
    // Open when it goes.
    offer(0).unwrap();
    assert_eq!(ask(1, place), Ok(()));
}

#[test]
fn failures_are_counted() {
    let Some(_offered) = Offered::new(name_of(failures_are_counted), 1) else {
        return;
    };
    assert_eq!(failing(), "none");
    for bad in [
        "snp-init2",
        "snp-init2,1",
        "snp-init2,0,5",
        "snp-init2,1,0",
        "snp-init2,1,5000",
        "snp-init,1,5",
        ",1,5",
    ] {
        assert_eq!(fail(bad), Err(libc::EINVAL), "{bad}");
    }
    fail("snp-init2,2,12").unwrap();
    assert_eq!(failing(), "snp-init2,2,12");
    let init = || crate::snp::init(&Guest::new(SNP));
    assert_eq!(init(), Ok(()));
    assert_eq!(failing(), "snp-init2,1,12");
    assert_eq!(init(), Err((libc::ENOMEM, 0)));
    assert_eq!(failing(), "none");
    assert_eq!(init(), Ok(()));
    fail("snp-init2,1,12").unwrap();
    fail("none").unwrap();
    assert_eq!(init(), Ok(()));
}
