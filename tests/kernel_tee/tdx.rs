// SPDX-License-Identifier: MIT OR Apache-2.0
//! The launch of a TD: order and errors as in Linux's vmx/tdx.c.

use crate::guest::{
    tdx, Cpuid, CpuidEntry, Exit, Guest, Program, Source, Vcpu, KVM_GET_REGS, PAGES, ROM,
};
use crate::lab::{fail, Offered};
use crate::sys::{ioctl, ioctl_number};
use crate::{name_of, NOWHERE, PAGE, TDX};
use libc::c_ulong;

const KVM_CREATE_IRQCHIP: c_ulong = 0xae60;
const KVM_GET_FPU: c_ulong = 0x81a0_ae8c;

const CAPABILITIES: u32 = 0;
const INIT_VM: u32 = 1;
const INIT_VCPU: u32 = 2;
const INIT_MEM_REGION: u32 = 3;
const FINALIZE_VM: u32 = 4;
const GET_CPUID: u32 = 5;

/// The one attribute that the kernel takes.
const SEPT_VE_DISABLE: u64 = 1 << 28;
/// Where the TD_HOB is said to be.
const HOB: u64 = 0x80_9000;

/// `struct kvm_tdx_capabilities`.
#[repr(C)]
struct Capabilities {
    attributes: u64,
    xfam: u64,
    calls: [u64; 4],
    reserved: [u64; 250],
    cpuid: Cpuid,
}

/// `struct kvm_tdx_init_vm`.
#[repr(C)]
struct InitVm {
    attributes: u64,
    xfam: u64,
    digests: [u64; 18],
    reserved: [u64; 12],
    cpuid: Cpuid,
}

/// `struct kvm_tdx_init_mem_region`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct MemRegion {
    source: u64,
    gpa: u64,
    pages: u64,
}

fn capabilities(guest: &Guest, room: u32) -> Result<Capabilities, i32> {
    let mut caps = Capabilities {
        attributes: 0,
        xfam: 0,
        calls: [0; 4],
        reserved: [0; 250],
        cpuid: Cpuid::new(&[]),
    };
    caps.cpuid.nent = room;
    guest.tdx(CAPABILITIES, 0, &mut caps).map(|()| caps)
}

/// Addresses of 48 bits, which every TDX has, and features of the first leaf.
fn leaves() -> Vec<CpuidEntry> {
    let leaf = |function, eax, ecx| CpuidEntry {
        function,
        eax,
        ecx,
        ..Default::default()
    };
    vec![
        leaf(1, 0x1234, 1 << 21),
        leaf(0x8000_0008, 48 << 16 | 40, 0),
    ]
}

fn init_vm(attributes: u64, xfam: u64, cpuid: &[CpuidEntry]) -> InitVm {
    InitVm {
        attributes,
        xfam,
        digests: [0; 18],
        reserved: [0; 12],
        cpuid: Cpuid::new(cpuid),
    }
}

fn init(guest: &Guest) -> Result<(), i32> {
    guest.tdx(INIT_VM, 0, &mut init_vm(SEPT_VE_DISABLE, 3, &leaves()))
}

fn init_vcpu(vcpu: &Vcpu) -> Result<(), i32> {
    tdx(vcpu.fd(), INIT_VCPU, 0, HOB)
}

/// Up to where pages can be added.
pub fn start(guest: &Guest) -> Vcpu {
    init(guest).unwrap();
    guest.split_irqchip();
    let vcpu = Vcpu::new(guest, 0);
    init_vcpu(&vcpu).unwrap();
    vcpu
}

fn add_region(vcpu: &Vcpu, region: &mut MemRegion) -> Result<(), i32> {
    tdx(vcpu.fd(), INIT_MEM_REGION, 1, &raw mut *region as u64)
}

pub fn add(vcpu: &Vcpu, gpa: u64, page: &mut Source) -> Result<(), i32> {
    let mut region = MemRegion {
        source: page.address(),
        gpa,
        pages: 1,
    };
    add_region(vcpu, &mut region)
}

pub fn finish(guest: &Guest) -> Result<(), i32> {
    tdx(guest.vm.fd(), FINALIZE_VM, 0, 0)
}

#[test]
fn capabilities_need_room() {
    let Some(_offered) = Offered::new(name_of(capabilities_need_room), 2) else {
        return;
    };
    let guest = Guest::new(TDX);
    // What programs begin with is too little.
    assert_eq!(capabilities(&guest, 6).map(drop), Err(libc::E2BIG));
    let caps = capabilities(&guest, 64).unwrap();
    assert_eq!(caps.attributes, SEPT_VE_DISABLE);
    assert_eq!(caps.xfam & 3, 3);
    assert!(caps.cpuid.nent > 6 && caps.cpuid.nent <= 64);
    let nent = caps.cpuid.nent;
    assert_eq!(capabilities(&guest, nent - 1).map(drop), Err(libc::E2BIG));
    assert!(capabilities(&guest, nent).is_ok());
    let fd = guest.vm.fd();
    assert_eq!(tdx(fd, CAPABILITIES, 1, 0), Err(libc::EINVAL));
    assert_eq!(tdx(fd, CAPABILITIES, 0, NOWHERE), Err(libc::EFAULT));
}

#[test]
fn the_order_is_kept() {
    let Some(_offered) = Offered::new(name_of(the_order_is_kept), 2) else {
        return;
    };
    let guest = Guest::new(TDX);
    guest.split_irqchip();
    assert_eq!(Vcpu::create(&guest, 0).err(), Some(libc::EIO));
    assert_eq!(finish(&guest), Err(libc::EINVAL));
    assert_eq!(tdx(guest.vm.fd(), 99, 0, 0), Err(libc::EINVAL));

    let bad = |request: InitVm| {
        let mut request = request;
        guest.tdx(INIT_VM, 0, &mut request)
    };
    let fine = || init_vm(SEPT_VE_DISABLE, 3, &leaves());
    assert_eq!(tdx(guest.vm.fd(), INIT_VM, 0, NOWHERE), Err(libc::EFAULT));
    assert_eq!(guest.tdx(INIT_VM, 1, &mut fine()), Err(libc::EINVAL));
    assert_eq!(bad(init_vm(1, 3, &leaves())), Err(libc::EINVAL));
    assert_eq!(bad(init_vm(0, 1 << 62, &leaves())), Err(libc::EINVAL));
    let mut reserved = fine();
    reserved.reserved[3] = 1;
    assert_eq!(bad(reserved), Err(libc::EINVAL));
    let mut many = fine();
    many.cpuid.nent = 100_000;
    assert_eq!(bad(many), Err(libc::E2BIG));
    // Without an address width, with one that there is not, and a leaf that is not to be configured.
    assert_eq!(bad(init_vm(0, 3, &leaves()[..1])), Err(libc::EINVAL));
    let mut width = leaves();
    width[1].eax = 33 << 16;
    assert_eq!(bad(init_vm(0, 3, &width)), Err(libc::EINVAL));
    let mut other = leaves();
    other[0].function = 0x7777;
    assert_eq!(bad(init_vm(0, 3, &other)), Err(libc::EINVAL));
    assert_eq!(init(&guest), Ok(()));
    assert_eq!(init(&guest), Err(libc::EINVAL));

    let vcpu = Vcpu::new(&guest, 0);
    let mut page = Source::new(1);
    assert_eq!(vcpu.run(), Exit::Error(libc::EINVAL));
    assert_eq!(add(&vcpu, 0, &mut page), Err(libc::EINVAL));
    assert_eq!(tdx(vcpu.fd(), INIT_VCPU, 1, HOB), Err(libc::EINVAL));
    assert_eq!(tdx(vcpu.fd(), FINALIZE_VM, 0, 0), Err(libc::EINVAL));
    assert_eq!(init_vcpu(&vcpu), Ok(()));
    assert_eq!(init_vcpu(&vcpu), Err(libc::EINVAL));
    assert_eq!(vcpu.run(), Exit::Error(libc::EINVAL));

    // The configured leaves, if there is room.
    let mut cpuid = Cpuid::new(&[]);
    let get = |cpuid: &mut Cpuid| tdx(vcpu.fd(), GET_CPUID, 0, &raw mut *cpuid as u64);
    assert_eq!(get(&mut cpuid), Err(libc::E2BIG));
    assert_eq!(cpuid.nent, 2);
    assert_eq!(get(&mut cpuid), Ok(()));
    assert_eq!(cpuid.entries[..2], leaves());
    assert_eq!(tdx(vcpu.fd(), GET_CPUID, 0, NOWHERE), Err(libc::EFAULT));

    assert_eq!(add(&vcpu, ROM, &mut Program::default().page()), Ok(()));
    // A vCPU that nobody initialized can't run, the others can.
    let other = Vcpu::new(&guest, 1);
    assert_eq!(finish(&guest), Ok(()));
    assert_eq!(finish(&guest), Err(libc::EINVAL));
    assert_eq!(add(&vcpu, 0, &mut page), Err(libc::EINVAL));
    assert_eq!(init_vcpu(&other), Err(libc::EINVAL));
    assert_eq!(get(&mut cpuid), Err(libc::EINVAL));
    assert_eq!(other.run(), Exit::Error(libc::EINVAL));
    assert_eq!(vcpu.run(), Exit::Done);
    assert_eq!(Vcpu::create(&guest, 2).err(), Some(libc::EIO));
    let get_regs = ioctl(vcpu.fd(), KVM_GET_REGS, &mut [0u64; 18]);
    let get_fpu = ioctl(vcpu.fd(), KVM_GET_FPU, &mut [0u64; 52]);
    assert_eq!((get_regs, get_fpu), (Err(libc::EINVAL), Err(libc::EINVAL)));
}

#[test]
fn vcpus_want_the_split_interrupt_controller() {
    let test = name_of(vcpus_want_the_split_interrupt_controller);
    let Some(_offered) = Offered::new(test, 2) else {
        return;
    };
    let guest = Guest::new(TDX);
    let whole = ioctl_number(guest.vm.fd(), KVM_CREATE_IRQCHIP, 0);
    assert_eq!(whole, Err(libc::ENOTTY));
    init(&guest).unwrap();
    assert_eq!(Vcpu::create(&guest, 0).err(), Some(libc::EINVAL));
}

#[test]
fn pages_are_added_once() {
    let Some(_offered) = Offered::new(name_of(pages_are_added_once), 2) else {
        return;
    };
    let guest = Guest::new(TDX);
    let vcpu = start(&guest);
    let mut source = Source::new(3);
    for (page, bytes) in source.bytes().chunks_mut(PAGE as usize).enumerate() {
        bytes.fill(0xb0 + page as u8);
    }
    let from = source.address();
    let good = MemRegion {
        source: from,
        gpa: 2 * PAGE,
        pages: 2,
    };
    for bad in [
        MemRegion { source: 0, ..good },
        MemRegion {
            source: from + 8,
            ..good
        },
        MemRegion { gpa: 8, ..good },
        MemRegion { pages: 0, ..good },
        MemRegion {
            pages: 1 << 52,
            ..good
        },
        // No slot.
        MemRegion {
            gpa: PAGES * PAGE,
            ..good
        },
    ] {
        assert_eq!(
            add_region(&vcpu, &mut bad.clone()),
            Err(libc::EINVAL),
            "{bad:x?}"
        );
    }
    assert_eq!(
        tdx(vcpu.fd(), INIT_MEM_REGION, 1, NOWHERE),
        Err(libc::EFAULT)
    );
    assert_eq!(
        tdx(vcpu.fd(), INIT_MEM_REGION, 2, NOWHERE),
        Err(libc::EINVAL)
    );
    let mut nowhere = MemRegion {
        source: NOWHERE,
        ..good
    };
    assert_eq!(add_region(&vcpu, &mut nowhere), Err(libc::EFAULT));
    guest.convert(2, 1, false).unwrap();
    assert_eq!(add_region(&vcpu, &mut good.clone()), Err(libc::EINVAL));
    guest.convert(2, 1, true).unwrap();

    let mut request = good;
    assert_eq!(add_region(&vcpu, &mut request), Ok(()));
    let done = MemRegion {
        source: from + 2 * PAGE,
        gpa: 4 * PAGE,
        pages: 0,
    };
    assert_eq!(request, done);
    assert_eq!(add_region(&vcpu, &mut good.clone()), Err(libc::EIO));
    // Up to one that is there: the region says how far it got, and there is an error.
    let mut request = MemRegion { gpa: PAGE, ..good };
    assert_eq!(add_region(&vcpu, &mut request), Err(libc::EIO));
    assert_eq!((request.gpa, request.pages), (2 * PAGE, 1));
    // Shared, and private again: the page is another.
    guest.convert(2, 1, false).unwrap();
    guest.convert(2, 1, true).unwrap();
    let mut request = MemRegion {
        source: from + 2 * PAGE,
        pages: 1,
        ..good
    };
    assert_eq!(add_region(&vcpu, &mut request), Ok(()));

    let program = Program::default()
        .registers()
        .read(0x1000)
        .read(0x2000)
        .read(0x3fff);
    add(&vcpu, ROM, &mut program.page()).unwrap();
    finish(&guest).unwrap();
    for told in [0, HOB as u32, 0xb0, 0xb2, 0xb1] {
        assert_eq!(vcpu.told(), told);
    }
    assert_eq!(vcpu.run(), Exit::Done);
}

#[test]
fn each_command_can_fail() {
    let Some(_offered) = Offered::new(name_of(each_command_can_fail), 2) else {
        return;
    };
    let guest = Guest::new(TDX);
    let once = |name: &str, command: &dyn Fn() -> Result<(), i32>| {
        fail(&format!("{name},1,{}", libc::EBUSY)).unwrap();
        assert_eq!(command(), Err(libc::EBUSY), "{name}");
        // And nothing was done.
        assert_eq!(command(), Ok(()), "{name}");
    };
    once("tdx-capabilities", &|| capabilities(&guest, 64).map(drop));
    once("tdx-init-vm", &|| init(&guest));
    guest.split_irqchip();
    let vcpu = Vcpu::new(&guest, 0);
    once("tdx-init-vcpu", &|| init_vcpu(&vcpu));
    once("tdx-get-cpuid", &|| {
        let mut cpuid = Cpuid::new(&leaves());
        tdx(vcpu.fd(), GET_CPUID, 0, &raw mut cpuid as u64)
    });
    once("tdx-init-mem-region", &|| {
        add(&vcpu, PAGE, &mut Source::new(1))
    });
    once("tdx-finalize-vm", &|| finish(&guest));
}
