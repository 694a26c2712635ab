// SPDX-License-Identifier: MIT OR Apache-2.0
//! How large KVM maps it for a guest, by KVM's own statistics.

use crate::sys::{ioctl, ioctl_number, Gmem, PreFault, Region, Vm, KVM_SET_USER_MEMORY_REGION2};
use crate::{convert_all, huge, huge_pages, name_of, HUGE, NR, PAGE, PRIVATE, SHARED};
use libc::c_ulong;
use std::fs;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

const KVM_CREATE_VCPU: c_ulong = 0xae41;
const KVM_PRE_FAULT_MEMORY: c_ulong = 0xc040_aed5;

/// Base pages `[first, first + count)` of the file at `gpa`.
pub fn slot(
    vm: &Vm,
    number: u32,
    gpa: u64,
    count: u64,
    file: &Gmem,
    first: u64,
    host: u64,
) -> Result<(), i32> {
    let mut region = Region {
        slot: number,
        flags: 1 << 2,
        guest_phys_addr: gpa,
        memory_size: count * PAGE,
        userspace_addr: host,
        guest_memfd_offset: first * PAGE,
        guest_memfd: file.fd() as u32,
        ..Default::default()
    };
    ioctl(vm.fd(), KVM_SET_USER_MEMORY_REGION2, &mut region).map(drop)
}

/// A vCPU, which never runs, and the guest's page tables by it.
pub struct Guest<'a> {
    vm: &'a Vm,
    vcpu: OwnedFd,
    /// The thread that made the VM, by which KVM names the VM's statistics.
    maker: i32,
}

/// Entries of the guest's page tables that are in use, by what they map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapped {
    pub huge: u64,
    pub base: u64,
}

pub const fn mapped(huge: u64, base: u64) -> Mapped {
    Mapped { huge, base }
}

impl<'a> Guest<'a> {
    /// In the thread that made the VM.
    pub fn new(vm: &'a Vm) -> Self {
        let vcpu = ioctl_number(vm.fd(), KVM_CREATE_VCPU, 0).unwrap();
        // SAFETY: the kernel just gave this number to us.
        let vcpu = unsafe { OwnedFd::from_raw_fd(vcpu) };
        // SAFETY: no more than a number is asked for.
        let maker = unsafe { libc::gettid() };
        Self { vm, vcpu, maker }
    }

    /// Faults pages in as the guest's first access to each would.
    pub fn fault(&self, gpa: u64, count: u64) -> Result<(), i32> {
        let mut request = PreFault {
            gpa,
            size: count * PAGE,
            ..Default::default()
        };
        while request.size > 0 {
            match ioctl(self.vcpu.as_raw_fd(), KVM_PRE_FAULT_MEMORY, &mut request) {
                // A conversion came in between.
                Ok(_) | Err(libc::EINTR | libc::EAGAIN) => {}
                Err(errno) => return Err(errno),
            }
        }
        Ok(())
    }

    pub fn mapped(&self) -> Mapped {
        mapped(self.statistic("pages_2m"), self.statistic("pages_4k"))
    }

    /// What KVM counts for this VM.
    pub fn statistic(&self, name: &str) -> u64 {
        let folder = format!("/sys/kernel/debug/kvm/{}-{}", self.maker, self.vm.fd());
        let text = fs::read_to_string(format!("{folder}/{name}")).unwrap();
        text.trim().parse().unwrap()
    }
}

const GPA: u64 = 1 << 30;

#[test]
fn a_huge_page_is_mapped_as_one_while_all_of_it_is_private() {
    let test = name_of(a_huge_page_is_mapped_as_one_while_all_of_it_is_private);
    let Some((vm, pool)) = huge_pages(test) else {
        return;
    };
    pool.fill(3);
    let file = huge(&vm, 3);
    let map = file.map(3 * NR);
    slot(&vm, 0, GPA, 3 * NR, &file, 0, map.page(0) as u64).unwrap();
    let guest = Guest::new(&vm);
    guest.fault(GPA, 3 * NR).unwrap();
    assert_eq!(guest.mapped(), mapped(3, 0));
    pool.expect(0, 0, "all faulted in");

    // One base page of the second.
    convert_all(&file, &[(NR + 7, 1)], SHARED);
    assert_eq!(guest.mapped(), mapped(2, 0));
    guest.fault(GPA, 3 * NR).unwrap();
    assert_eq!(guest.mapped(), mapped(2, NR));
    map.write(NR + 7, 0x42);

    // More of it, and not all back.
    convert_all(&file, &[(NR + 8, 2)], SHARED);
    convert_all(&file, &[(NR + 7, 2)], PRIVATE);
    guest.fault(GPA, 3 * NR).unwrap();
    assert_eq!(guest.mapped(), mapped(2, NR));

    convert_all(&file, &[(NR + 9, 1)], PRIVATE);
    guest.fault(GPA, 3 * NR).unwrap();
    assert_eq!(guest.mapped(), mapped(3, 0));

    // This VM type keeps the bytes.
    convert_all(&file, &[(0, 3 * NR)], SHARED);
    assert_eq!(map.read(NR + 7), 0x42);
    guest.fault(GPA, 3 * NR).unwrap();
    assert_eq!(guest.mapped(), mapped(0, 3 * NR));
    convert_all(&file, &[(0, 3 * NR)], PRIVATE);
    guest.fault(GPA, 3 * NR).unwrap();
    assert_eq!(guest.mapped(), mapped(3, 0));
    file.punch(NR, NR).unwrap();
    assert_eq!(guest.mapped(), mapped(2, 0));
}

/// It does not matter where the mapping of the file lies, or that there is one.
#[test]
fn the_offset_in_the_file_decides_whether_huge_mappings_fit() {
    let test = name_of(the_offset_in_the_file_decides_whether_huge_mappings_fit);
    let Some((vm, pool)) = huge_pages(test) else {
        return;
    };
    pool.fill(3);
    let file = huge(&vm, 3);
    let guest = Guest::new(&vm);
    // Address and offset agree within a huge page; the ends of the slot cut one each.
    slot(&vm, 0, GPA + 16 * PAGE, 2 * NR, &file, 16, 0).unwrap();
    guest.fault(GPA + 16 * PAGE, 2 * NR).unwrap();
    assert_eq!(guest.mapped(), mapped(1, NR));
    slot(&vm, 0, GPA + 16 * PAGE, 0, &file, 16, 0).unwrap();
    assert_eq!(guest.mapped(), mapped(0, 0));
    // One page off.
    slot(&vm, 0, GPA, 2 * NR, &file, 1, 0).unwrap();
    guest.fault(GPA, 2 * NR).unwrap();
    assert_eq!(guest.mapped(), mapped(0, 2 * NR));
}

/// Two slots that share a huge page of the file, as below and above a hole in the guest's addresses.
#[test]
fn a_conversion_reaches_each_slot_that_has_a_part_of_the_huge_page() {
    let test = name_of(a_conversion_reaches_each_slot_that_has_a_part_of_the_huge_page);
    let Some((vm, pool)) = huge_pages(test) else {
        return;
    };
    pool.fill(3);
    let file = huge(&vm, 3);
    let guest = Guest::new(&vm);
    let low = NR + NR / 2;
    slot(&vm, 0, GPA, low, &file, 0, 0).unwrap();
    slot(&vm, 1, 4 * GPA + HUGE / 2, 3 * NR - low, &file, low, 0).unwrap();
    guest.fault(GPA, low).unwrap();
    guest.fault(4 * GPA + HUGE / 2, 3 * NR - low).unwrap();
    assert_eq!(guest.mapped(), mapped(2, NR));
    convert_all(&file, &[(NR, 1)], SHARED);
    assert_eq!(guest.mapped(), mapped(2, 0));
    convert_all(&file, &[(3 * NR - 1, 1)], SHARED);
    assert_eq!(guest.mapped(), mapped(1, 0));
}
