// SPDX-License-Identifier: MIT OR Apache-2.0
//! A VM of one of these types, its memory, and a vCPU that runs a few lines of 32-bit code.

use crate::sys::{
    errno, ioctl, ioctl_number, Attributes1, Attributes2, Gmem, Map, Region, Vm,
    KVM_SET_MEMORY_ATTRIBUTES, KVM_SET_USER_MEMORY_REGION2,
};
use crate::{MMAP, PAGE, PRIVATE, SNP, TDX};
use libc::c_ulong;
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

pub const KVM_MEMORY_ENCRYPT_OP: c_ulong = 0xc008_aeba;
pub const KVM_CREATE_VCPU: c_ulong = 0xae41;
pub const KVM_RUN: c_ulong = 0xae80;
pub const KVM_GET_REGS: c_ulong = 0x8090_ae81;
const KVM_SET_REGS: c_ulong = 0x4090_ae82;
const KVM_GET_SREGS: c_ulong = 0x8138_ae83;
const KVM_SET_SREGS: c_ulong = 0x4138_ae84;
const KVM_SET_CPUID2: c_ulong = 0x4008_ae90;
const KVM_ENABLE_CAP: c_ulong = 0x4068_aea3;

const KVM_CAP_SPLIT_IRQCHIP: u64 = 121;
const KVM_CAP_EXIT_HYPERCALL: u64 = 201;

const KVM_EXIT_IO: u32 = 2;
const KVM_EXIT_HYPERCALL: u32 = 3;
const KVM_EXIT_MEMORY_FAULT: u32 = 39;

/// `struct kvm_run` and the page for port I/O.
const RUN_SIZE: usize = 2 * PAGE as usize;

/// Memory at 0, and a page below 4 GiB whose last 16 bytes are where a vCPU begins.
pub const PAGES: u64 = 64;
pub const ROM: u64 = 0xffff_f000;
const BEGIN: usize = 0xff0;

/// `struct kvm_sev_cmd`.
#[repr(C)]
#[derive(Default, Debug)]
pub struct SevCmd {
    pub id: u32,
    pub pad: u32,
    pub data: u64,
    pub error: u32,
    pub fd: u32,
}

/// `struct kvm_tdx_cmd`.
#[repr(C)]
#[derive(Default, Debug)]
pub struct TdxCmd {
    pub id: u32,
    pub flags: u32,
    pub data: u64,
    pub hw_error: u64,
}

/// `struct kvm_cpuid_entry2`.
#[repr(C)]
#[derive(Default, Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuidEntry {
    pub function: u32,
    pub index: u32,
    pub flags: u32,
    pub eax: u32,
    pub ebx: u32,
    pub ecx: u32,
    pub edx: u32,
    pub padding: [u32; 3],
}

/// `struct kvm_cpuid2` with room for some.
#[repr(C)]
#[derive(Clone)]
pub struct Cpuid {
    pub nent: u32,
    pub padding: u32,
    pub entries: [CpuidEntry; 64],
}

impl Cpuid {
    pub fn new(entries: &[CpuidEntry]) -> Self {
        let mut cpuid = Self {
            nent: entries.len() as u32,
            padding: 0,
            entries: [CpuidEntry::default(); 64],
        };
        cpuid.entries[..entries.len()].copy_from_slice(entries);
        cpuid
    }
}

/// A page-aligned buffer, for what the guest is to find.
pub struct Source(Vec<u8>);

impl Source {
    pub fn new(pages: u64) -> Self {
        Self(vec![0; ((pages + 1) * PAGE) as usize])
    }

    pub fn address(&self) -> u64 {
        (self.0.as_ptr() as u64).next_multiple_of(PAGE)
    }

    pub fn bytes(&mut self) -> &mut [u8] {
        let skip = (self.address() - self.0.as_ptr() as u64) as usize;
        let size = self.0.len() - PAGE as usize;
        &mut self.0[skip..skip + size]
    }
}

/// How a vCPU left the guest.
#[derive(Debug, PartialEq, Eq)]
pub enum Exit {
    /// It wrote this to port 0x10.
    Told(u32),
    /// It wrote a byte to port 0x11: the end of its program.
    Done,
    /// It used another port.
    Port(u16),
    /// KVM_HC_MAP_GPA_RANGE: address, pages, attributes.
    Map(u64, u64, u64),
    /// The flags and the address of a memory fault.
    Fault(u64, u64),
    /// KVM_RUN failed.
    Error(i32),
    Other(u32),
}

/// 32-bit code, in pieces.
#[derive(Default)]
pub struct Program(Vec<u8>);

impl Program {
    /// A call through the port, after which it tells EAX and EBX.
    pub fn call(self, function: u32, first: u32, second: u32, third: u32) -> Self {
        self.bytes(&[0xb8])
            .word(function)
            .bytes(&[0xbb])
            .word(first)
            .bytes(&[0xb9])
            .word(second)
            .bytes(&[0xbe])
            .word(third)
            // mov edx, 0x7e0; out dx, eax; out 0x10, eax; mov eax, ebx; out 0x10, eax
            .bytes(&[
                0xba, 0xe0, 7, 0, 0, 0xef, 0xe7, 0x10, 0x89, 0xd8, 0xe7, 0x10,
            ])
    }

    /// Tells the byte there.
    pub fn read(self, address: u32) -> Self {
        // xor eax, eax; mov al, [address]; out 0x10, eax
        self.bytes(&[0x31, 0xc0, 0xa0])
            .word(address)
            .bytes(&[0xe7, 0x10])
    }

    pub fn write(self, address: u32, byte: u8) -> Self {
        // mov al, byte; mov [address], al
        self.bytes(&[0xb0, byte, 0xa2]).word(address)
    }

    /// Tells what it began with: ESI, ECX.
    pub fn registers(self) -> Self {
        self.bytes(&[0x89, 0xf0, 0xe7, 0x10, 0x89, 0xc8, 0xe7, 0x10])
    }

    fn word(self, word: u32) -> Self {
        self.bytes(&word.to_le_bytes())
    }

    fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    /// The page with it.
    pub fn page(self) -> Source {
        // out 0x11, al; jmp to itself
        let code = self.bytes(&[0xe6, 0x11, 0xeb, 0xfe]).0;
        assert!(code.len() < BEGIN);
        let mut page = Source::new(1);
        page.bytes()[..code.len()].copy_from_slice(&code);
        // jmp to the beginning of the page.
        let distance = -(BEGIN as i32 + 5);
        page.bytes()[BEGIN] = 0xe9;
        page.bytes()[BEGIN + 1..BEGIN + 5].copy_from_slice(&distance.to_le_bytes());
        page
    }
}

/// A VM with its slots, of pages that are all private.
pub struct Guest {
    pub vm: Vm,
    pub kind: u64,
    pub in_place: bool,
    pub gmem: Gmem,
    rom: Gmem,
    /// What the host and the guest share, in split and in place.
    pub shared: Map,
    pub rom_shared: Map,
    /// SNP: the platform's device.
    pub device: Option<File>,
}

impl Guest {
    pub fn new(kind: u64) -> Self {
        let vm = Vm::new(kind).unwrap();
        let in_place = converts_in_place(&vm);
        // Where one file is both it is mapped; else the shared bytes are another VM's, which converts nothing.
        let flags = if in_place { MMAP } else { 0 };
        let gmem = vm.gmem(PAGES * PAGE, flags).unwrap();
        let rom = vm.gmem(PAGE, flags).unwrap();
        let (shared, rom_shared) = if in_place {
            (gmem.map(PAGES), rom.map(1))
        } else {
            (memfd(PAGES), memfd(1))
        };
        let guest = Self {
            vm,
            kind,
            in_place,
            gmem,
            rom,
            shared,
            rom_shared,
            device: (kind == SNP).then(device),
        };
        guest.slot(0, 0, PAGES, &guest.gmem, guest.shared.page(0));
        guest.slot(1, ROM, 1, &guest.rom, guest.rom_shared.page(0));
        guest.convert(0, PAGES, true).unwrap();
        guest.convert(ROM / PAGE, 1, true).unwrap();
        guest
    }

    fn slot(&self, slot: u32, gpa: u64, pages: u64, gmem: &Gmem, host: *mut u8) {
        let mut region = Region {
            slot,
            flags: 1 << 2,
            guest_phys_addr: gpa,
            memory_size: pages * PAGE,
            userspace_addr: host as u64,
            guest_memfd: gmem.fd() as u32,
            ..Default::default()
        };
        ioctl(self.vm.fd(), KVM_SET_USER_MEMORY_REGION2, &mut region).unwrap();
    }

    pub fn convert(&self, page: u64, count: u64, private: bool) -> Result<(), i32> {
        let attributes = if private { PRIVATE } else { 0 };
        if !self.in_place {
            let mut request = Attributes1 {
                address: page * PAGE,
                size: count * PAGE,
                attributes,
                ..Default::default()
            };
            return ioctl(self.vm.fd(), KVM_SET_MEMORY_ATTRIBUTES, &mut request).map(drop);
        }
        let (file, offset) = match page * PAGE {
            ROM => (&self.rom, 0),
            address => (&self.gmem, address),
        };
        let mut request = Attributes2 {
            offset,
            size: count * PAGE,
            attributes,
            ..Default::default()
        };
        file.set_attributes(&mut request)
    }

    /// A command of this VM. For SNP the firmware's error comes with it.
    pub fn sev<T>(&self, id: u32, data: &mut T) -> Result<(), (i32, u32)> {
        self.sev_at(id, &raw mut *data as u64)
    }

    pub fn sev_at(&self, id: u32, data: u64) -> Result<(), (i32, u32)> {
        let device = self.device.as_ref().expect("an SNP guest with its device");
        self.sev_through(device.as_raw_fd(), id, data)
    }

    /// The same with another file for the device.
    pub fn sev_through(&self, fd: i32, id: u32, data: u64) -> Result<(), (i32, u32)> {
        let fd = fd as u32;
        let mut cmd = SevCmd {
            id,
            data,
            fd,
            ..Default::default()
        };
        ioctl(self.vm.fd(), KVM_MEMORY_ENCRYPT_OP, &mut cmd)
            .map(drop)
            .map_err(|errno| (errno, cmd.error))
    }

    pub fn tdx<T>(&self, id: u32, flags: u32, data: &mut T) -> Result<(), i32> {
        tdx(self.vm.fd(), id, flags, &raw mut *data as u64)
    }

    /// Launched, with a vCPU at the beginning of the program.
    pub fn launch(&self, program: Program) -> Vcpu {
        self.enable_conversions();
        let mut page = program.page();
        match self.kind {
            SNP => {
                crate::snp::start(self);
                let vcpu = Vcpu::new(self, 0);
                vcpu.flat();
                crate::snp::add(self, ROM, &mut page);
                crate::snp::finish(self).unwrap();
                vcpu
            }
            _ => {
                let vcpu = crate::tdx::start(self);
                crate::tdx::add(&vcpu, ROM, &mut page).unwrap();
                crate::tdx::finish(self).unwrap();
                vcpu
            }
        }
    }

    pub fn enable_conversions(&self) {
        // KVM_HC_MAP_GPA_RANGE
        self.enable(KVM_CAP_EXIT_HYPERCALL, 1 << 12);
    }

    pub fn split_irqchip(&self) {
        self.enable(KVM_CAP_SPLIT_IRQCHIP, 24);
    }

    fn enable(&self, cap: u64, argument: u64) {
        // `struct kvm_enable_cap`: cap, flags, arguments, padding.
        let mut request = [0u64; 13];
        request[0] = cap;
        request[1] = argument;
        ioctl(self.vm.fd(), KVM_ENABLE_CAP, &mut request).unwrap();
    }
}

pub fn device() -> File {
    let mut options = File::options();
    options.read(true).write(true).open("/dev/sev").unwrap()
}

pub fn tdx(fd: i32, id: u32, flags: u32, data: u64) -> Result<(), i32> {
    let mut cmd = TdxCmd {
        id,
        flags,
        data,
        ..Default::default()
    };
    ioctl(fd, KVM_MEMORY_ENCRYPT_OP, &mut cmd).map(drop)
}

/// Whether a page of a file turns private, which it is.
fn converts_in_place(vm: &Vm) -> bool {
    let mut request = Attributes2 {
        size: PAGE,
        attributes: PRIVATE,
        ..Default::default()
    };
    vm.gmem(PAGE, 0)
        .unwrap()
        .set_attributes(&mut request)
        .is_ok()
}

fn memfd(pages: u64) -> Map {
    // SAFETY: a new file of ours.
    let file = unsafe {
        let fd = libc::memfd_create(c"shared".as_ptr(), libc::MFD_CLOEXEC);
        assert!(fd >= 0, "errno {}", errno());
        File::from_raw_fd(fd)
    };
    file.set_len(pages * PAGE).unwrap();
    Gmem(file).map(pages)
}

pub struct Vcpu {
    pub fd: OwnedFd,
    run: *mut u8,
}

impl Vcpu {
    pub fn new(guest: &Guest, number: u64) -> Self {
        Self::create(guest, number).unwrap()
    }

    pub fn create(guest: &Guest, number: u64) -> Result<Self, i32> {
        let fd = ioctl_number(guest.vm.fd(), KVM_CREATE_VCPU, number)?;
        // SAFETY: the kernel just gave this number to us.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        // SAFETY: a new mapping, at an address of the kernel's choice.
        let run = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                RUN_SIZE,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                fd.as_raw_fd(),
                0,
            )
        };
        assert_ne!(run, libc::MAP_FAILED);
        let vcpu = Self {
            fd,
            run: run.cast(),
        };
        if guest.kind == TDX {
            // A TD has x2APIC from its beginning.
            vcpu.cpuid(&[CpuidEntry {
                function: 1,
                ecx: 1 << 21,
                ..Default::default()
            }]);
        }
        Ok(vcpu)
    }

    pub fn cpuid(&self, entries: &[CpuidEntry]) {
        ioctl(self.fd(), KVM_SET_CPUID2, &mut Cpuid::new(entries)).unwrap();
    }

    /// In the state that a TD's begins in.
    pub fn flat(&self) {
        // `struct kvm_sregs`: cs, ds, es, fs, gs, ss, each 24 bytes, tr, ldt, two tables, then cr0.
        let mut sregs = [0u64; 39];
        ioctl(self.fd(), KVM_GET_SREGS, &mut sregs).unwrap();
        for segment in 0..6 {
            let code = segment == 0;
            let (selector, kind) = if code { (8, 0xb) } else { (16, 3) };
            // base; limit and selector and type; present, dpl, db, s, l, g, avl, unusable.
            sregs[segment * 3] = 0;
            sregs[segment * 3 + 1] = 0xffff_ffff | selector << 32 | kind << 48 | 1 << 56;
            sregs[segment * 3 + 2] = 1 << 8 | 1 << 16 | 1 << 32;
        }
        sregs[28] |= 1;
        ioctl(self.fd(), KVM_SET_SREGS, &mut sregs).unwrap();
        let mut regs = [0u64; 18];
        regs[16] = ROM + BEGIN as u64;
        regs[17] = 2;
        ioctl(self.fd(), KVM_SET_REGS, &mut regs).unwrap();
    }

    pub fn fd(&self) -> i32 {
        self.fd.as_raw_fd()
    }

    fn field<T: Copy>(&self, offset: usize) -> T {
        assert!(offset + size_of::<T>() <= RUN_SIZE);
        // SAFETY: in the mapping, and the kernel writes there only while the vCPU runs.
        unsafe { self.run.add(offset).cast::<T>().read_unaligned() }
    }

    pub fn run(&self) -> Exit {
        let result = ioctl_number(self.fd(), KVM_RUN, 0);
        match (result, self.field::<u32>(8)) {
            (Err(libc::EFAULT), KVM_EXIT_MEMORY_FAULT) => {
                Exit::Fault(self.field(32), self.field(40))
            }
            (Err(errno), _) => Exit::Error(errno),
            (Ok(_), KVM_EXIT_IO) => match self.field::<u16>(34) {
                0x10 => Exit::Told(self.field(self.field::<u64>(40) as usize)),
                0x11 => Exit::Done,
                port => Exit::Port(port),
            },
            (Ok(_), KVM_EXIT_HYPERCALL) => {
                assert_eq!(self.field::<u64>(32), 12);
                Exit::Map(self.field(40), self.field(48), self.field(56))
            }
            (Ok(_), other) => Exit::Other(other),
        }
    }

    /// What the request that it left with comes to, and on.
    pub fn answer(&self, result: u64) -> Exit {
        // SAFETY: in the mapping: the hypercall's `ret`.
        unsafe { self.run.add(88).cast::<u64>().write_unaligned(result) };
        self.run()
    }

    /// What it tells next.
    pub fn told(&self) -> u32 {
        match self.run() {
            Exit::Told(value) => value,
            other => panic!("{other:x?}"),
        }
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        // SAFETY: our own mapping.
        unsafe { libc::munmap(self.run.cast(), RUN_SIZE) };
    }
}
