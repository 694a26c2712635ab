// SPDX-License-Identifier: MIT OR Apache-2.0
//! The launch of an SNP guest: order and errors as in Linux's svm/sev.c.

use crate::guest::{
    Exit, Guest, Program, Source, Vcpu, KVM_GET_REGS, KVM_MEMORY_ENCRYPT_OP, PAGES, ROM,
};
use crate::lab::{fail, Offered};
use crate::sys::{ioctl, ioctl_number, PreFault};
use crate::{name_of, NOWHERE, PAGE, SNP};
use libc::c_ulong;

const KVM_PRE_FAULT_MEMORY: c_ulong = 0xc040_aed5;

const INIT: u32 = 0;
const LAUNCH_START: u32 = 2;
const INIT2: u32 = 22;
const START: u32 = 100;
const UPDATE: u32 = 101;
const FINISH: u32 = 102;

const NORMAL: u8 = 1;
const ZERO: u8 = 3;
const CPUID: u8 = 6;

/// Of the policy: reserved and to be set, and SMT.
const POLICY: u64 = 0x3_0000;
/// SEV_RET_INVALID_GUEST_STATE
const INVALID_GUEST_STATE: u32 = 2;

/// `struct kvm_sev_init`.
#[repr(C)]
#[derive(Default)]
struct Init2 {
    features: u64,
    flags: u32,
    ghcb_version: u16,
    pad1: u16,
    pad2: [u32; 8],
}

/// `struct kvm_sev_snp_launch_start`.
#[repr(C)]
#[derive(Default)]
struct Start {
    policy: u64,
    gosvw: [u8; 16],
    flags: u16,
    pad0: [u8; 6],
    pad1: [u64; 4],
}

/// `struct kvm_sev_snp_launch_update`.
#[repr(C)]
#[derive(Default, Debug, Clone, Copy, PartialEq, Eq)]
struct Update {
    gfn: u64,
    source: u64,
    size: u64,
    kind: u8,
    pad0: u8,
    flags: u16,
    pad1: u32,
    pad2: [u64; 4],
}

/// `struct kvm_sev_snp_launch_finish`.
#[repr(C)]
#[derive(Default)]
struct Finish {
    id_block: u64,
    id_auth: u64,
    id_block_en: u8,
    auth_key_en: u8,
    vcek_disabled: u8,
    host_data: [u8; 32],
    pad0: [u8; 3],
    flags: u16,
    pad1: [u64; 4],
}

const _: () = assert!(size_of::<Finish>() == 88 && size_of::<Update>() == 64);

type Answer = Result<(), (i32, u32)>;

pub fn init(guest: &Guest) -> Answer {
    guest.sev(INIT2, &mut Init2::default())
}

/// Up to where pages can be added.
pub fn start(guest: &Guest) {
    init(guest).unwrap();
    start_with(guest, POLICY, 0).unwrap();
}

fn start_with(guest: &Guest, policy: u64, flags: u16) -> Answer {
    let mut start = Start {
        policy,
        flags,
        ..Default::default()
    };
    guest.sev(START, &mut start)
}

fn update(guest: &Guest, update: &mut Update) -> Answer {
    guest.sev(UPDATE, update)
}

pub fn add(guest: &Guest, gpa: u64, page: &mut Source) {
    let mut request = pages(gpa / PAGE, 1, page.address());
    update(guest, &mut request).unwrap();
}

fn pages(gfn: u64, count: u64, source: u64) -> Update {
    Update {
        gfn,
        source,
        size: count * PAGE,
        kind: NORMAL,
        ..Default::default()
    }
}

pub fn finish(guest: &Guest) -> Answer {
    guest.sev(FINISH, &mut Finish::default())
}

fn refused(errno: i32) -> Answer {
    Err((errno, 0))
}

#[test]
fn the_order_is_kept() {
    let Some(_offered) = Offered::new(name_of(the_order_is_kept), 1) else {
        return;
    };
    let guest = Guest::new(SNP);
    // How a program asks whether there is SEV at all.
    assert_eq!(ioctl_number(guest.vm.fd(), KVM_MEMORY_ENCRYPT_OP, 0), Ok(0));
    assert_eq!(
        ioctl_number(guest.vm.fd(), KVM_MEMORY_ENCRYPT_OP, NOWHERE),
        Err(libc::EFAULT)
    );
    let mut page = Source::new(1);
    assert_eq!(start_with(&guest, POLICY, 0), refused(libc::ENOTTY));
    let mut request = pages(0, 1, page.address());
    assert_eq!(update(&guest, &mut request), refused(libc::EINVAL));
    assert_eq!(finish(&guest), refused(libc::ENOTTY));
    assert_eq!(guest.sev_at(INIT, 0), refused(libc::EINVAL));
    assert_eq!(guest.sev_at(LAUNCH_START, 0), refused(libc::ENOTTY));
    assert_eq!(guest.sev_at(200, 0), refused(libc::EINVAL));

    let init2 = |features, flags, ghcb_version| {
        let mut init = Init2 {
            features,
            flags,
            ghcb_version,
            ..Default::default()
        };
        guest.sev(INIT2, &mut init)
    };
    assert_eq!(guest.sev_at(INIT2, NOWHERE), refused(libc::EFAULT));
    assert_eq!(init2(1, 0, 0), refused(libc::EINVAL));
    assert_eq!(init2(0, 1, 0), refused(libc::EINVAL));
    assert_eq!(init2(0, 0, 1), refused(libc::EINVAL));
    assert_eq!(init2(0, 0, 3), refused(libc::EINVAL));
    assert_eq!(init2(0, 0, 2), Ok(()));
    assert_eq!(init2(0, 0, 2), refused(libc::EPERM));
    assert_eq!(guest.sev_at(LAUNCH_START, 0), refused(libc::EPERM));

    assert_eq!(update(&guest, &mut request), refused(libc::EINVAL));
    assert_eq!(finish(&guest), refused(libc::EINVAL));
    assert_eq!(guest.sev_at(START, NOWHERE), refused(libc::EFAULT));
    assert_eq!(start_with(&guest, POLICY, 1), refused(libc::EINVAL));
    assert_eq!(start_with(&guest, 0, 0), refused(libc::EINVAL));
    assert_eq!(
        start_with(&guest, POLICY | 1 << 63, 0),
        refused(libc::EINVAL)
    );
    assert_eq!(start_with(&guest, POLICY, 0), Ok(()));
    assert_eq!(start_with(&guest, POLICY, 0), refused(libc::EINVAL));

    let vcpu = Vcpu::new(&guest, 0);
    let get_regs = || ioctl(vcpu.fd(), KVM_GET_REGS, &mut [0u64; 18]);
    let pre_fault = || {
        let mut request = PreFault {
            size: PAGE,
            ..Default::default()
        };
        ioctl(vcpu.fd(), KVM_PRE_FAULT_MEMORY, &mut request)
    };
    vcpu.flat();
    assert_eq!(vcpu.run(), Exit::Error(libc::EINVAL));
    assert_eq!(get_regs(), Ok(0));
    assert_eq!(pre_fault(), Err(libc::EOPNOTSUPP));

    let with_block = |id_block| Finish {
        id_block_en: 1,
        id_block,
        ..Default::default()
    };
    assert_eq!(guest.sev_at(FINISH, NOWHERE), refused(libc::EFAULT));
    let mut flags = Finish {
        flags: 1,
        ..Default::default()
    };
    assert_eq!(guest.sev(FINISH, &mut flags), refused(libc::EINVAL));
    assert_eq!(guest.sev(FINISH, &mut with_block(0)), refused(libc::EINVAL));
    assert_eq!(
        guest.sev(FINISH, &mut with_block(NOWHERE)),
        refused(libc::EFAULT)
    );
    assert_eq!(finish(&guest), Ok(()));
    assert_eq!(finish(&guest), Err((libc::EIO, INVALID_GUEST_STATE)));
    page.bytes()[0] = 1;
    assert_eq!(
        update(&guest, &mut request),
        Err((libc::EIO, INVALID_GUEST_STATE))
    );
    assert_eq!(get_regs(), Err(libc::EINVAL));
    assert_eq!(pre_fault(), Ok(0));
}

#[test]
fn the_first_vcpu_comes_after_init2() {
    let Some(_offered) = Offered::new(name_of(the_first_vcpu_comes_after_init2), 1) else {
        return;
    };
    let guest = Guest::new(SNP);
    let vcpu = Vcpu::new(&guest, 0);
    assert_eq!(init(&guest), refused(libc::EINVAL));
    assert_eq!(vcpu.run(), Exit::Error(libc::EINVAL));
}

#[test]
fn commands_go_through_the_device() {
    let Some(_offered) = Offered::new(name_of(commands_go_through_the_device), 1) else {
        return;
    };
    let mut guest = Guest::new(SNP);
    init(&guest).unwrap();
    let source = Source::new(1);
    let mut start = Start {
        policy: POLICY,
        ..Default::default()
    };
    let mut page = pages(1, 1, source.address());
    let (start, page) = (&raw mut start as u64, &raw mut page as u64);
    for fd in [guest.vm.fd(), -1] {
        assert_eq!(guest.sev_through(fd, START, start), refused(libc::ENOTTY));
    }
    assert_eq!(guest.sev_at(START, start), Ok(()));
    for fd in [guest.vm.fd(), -1] {
        assert_eq!(guest.sev_through(fd, UPDATE, page), refused(libc::EIO));
    }
    assert_eq!(guest.sev_at(UPDATE, page), Ok(()));
    // The one that the launch was started with has to be there to its end.
    drop(guest.device.take());
    let mut finish = Finish::default();
    let finish = guest.sev_through(-1, FINISH, &raw mut finish as u64);
    assert_eq!(finish, refused(libc::EBADF));
}

#[test]
fn pages_are_added_once() {
    let Some(_offered) = Offered::new(name_of(pages_are_added_once), 1) else {
        return;
    };
    let guest = Guest::new(SNP);
    start(&guest);
    let mut source = Source::new(4);
    for (page, bytes) in source.bytes().chunks_mut(PAGE as usize).enumerate() {
        bytes.fill(0xa0 + page as u8);
    }
    let from = source.address();
    let good = pages(2, 2, from);
    for bad in [
        Update { size: 0, ..good },
        Update { size: 100, ..good },
        Update { kind: 2, ..good },
        Update { kind: 0, ..good },
        Update { flags: 1, ..good },
        Update { source: 0, ..good },
        Update {
            source: from + 8,
            ..good
        },
        // No slot.
        Update { gfn: PAGES, ..good },
    ] {
        assert_eq!(
            update(&guest, &mut bad.clone()),
            refused(libc::EINVAL),
            "{bad:x?}"
        );
    }
    assert_eq!(guest.sev_at(UPDATE, NOWHERE), refused(libc::EFAULT));
    // What populate finds wrong is EIO, whatever it is.
    let mut nowhere = pages(2, 2, NOWHERE);
    assert_eq!(update(&guest, &mut nowhere), refused(libc::EIO));
    guest.convert(2, 1, false).unwrap();
    assert_eq!(update(&guest, &mut good.clone()), refused(libc::EIO));
    guest.convert(2, 1, true).unwrap();

    let mut request = good;
    assert_eq!(update(&guest, &mut request), Ok(()));
    let done = Update {
        gfn: 4,
        source: from + 2 * PAGE,
        size: 0,
        ..good
    };
    assert_eq!(request, done);
    assert_eq!(update(&guest, &mut good.clone()), refused(libc::EIO));
    // Up to one that is there: what is left is in the request.
    let mut request = pages(1, 2, from);
    assert_eq!(update(&guest, &mut request), Ok(()));
    assert_eq!(
        (request.gfn, request.source, request.size),
        (2, from + PAGE, PAGE)
    );
    assert_eq!(update(&guest, &mut request), refused(libc::EIO));
    // A slot's end is one too.
    let mut request = pages(PAGES - 1, 2, from);
    assert_eq!(update(&guest, &mut request), Ok(()));
    assert_eq!((request.gfn, request.size), (PAGES, PAGE));
    // Zeros need no source, and a table of CPUID one that can be written.
    let mut zero = Update {
        kind: ZERO,
        ..pages(8, 1, 0)
    };
    assert_eq!(update(&guest, &mut zero), Ok(()));
    assert_eq!((zero.gfn, zero.source, zero.size), (9, 0, 0));
    let mut cpuid = Update {
        kind: CPUID,
        ..pages(9, 1, from + PAGE)
    };
    assert_eq!(update(&guest, &mut cpuid), Ok(()));
    // Given back and private again: another page.
    guest.gmem.punch(2, 1).unwrap();
    assert_eq!(update(&guest, &mut pages(2, 1, from + 3 * PAGE)), Ok(()));

    let program = Program::default()
        .read(0x1000)
        .read(0x2fff)
        .read(0x3000)
        .read(0x8000)
        .read(0x9000)
        .read((PAGES as u32 - 1) << 12);
    let vcpu = Vcpu::new(&guest, 0);
    vcpu.flat();
    add(&guest, ROM, &mut program.page());
    finish(&guest).unwrap();
    for byte in [0xa0, 0xa3, 0xa1, 0, 0xa1, 0xa0] {
        assert_eq!(vcpu.told(), byte);
    }
    assert_eq!(vcpu.run(), Exit::Done);
}

#[test]
fn each_command_can_fail() {
    let Some(_offered) = Offered::new(name_of(each_command_can_fail), 1) else {
        return;
    };
    let guest = Guest::new(SNP);
    let source = Source::new(1);
    let once = |name: &str, command: &dyn Fn() -> Answer| {
        fail(&format!("{name},1,{}", libc::EBUSY)).unwrap();
        assert_eq!(command(), refused(libc::EBUSY), "{name}");
        // And nothing was done.
        assert_eq!(command(), Ok(()), "{name}");
    };
    once("snp-init2", &|| init(&guest));
    once("snp-launch-start", &|| start_with(&guest, POLICY, 0));
    once("snp-launch-update", &|| {
        update(&guest, &mut pages(3, 1, source.address()))
    });
    once("snp-launch-finish", &|| finish(&guest));
}
