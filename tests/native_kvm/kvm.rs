// SPDX-License-Identifier: MIT OR Apache-2.0
//! As much of a VMM as a guest of three instructions needs: one vCPU in real mode.

use crate::common::skipped;
use gmem::kernel::Probe;
use gmem::{Memslot, Vm};
use libc::{c_int, c_ulong};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// No guest here has more to do than a few instructions, even on an emulated machine.
const LIMIT: Duration = Duration::from_secs(15);

const KVM_CREATE_VM: c_ulong = 0xae01;
const KVM_CHECK_EXTENSION: c_ulong = 0xae03;
const KVM_CAP_VM_TYPES: c_ulong = 235;
const KVM_GET_VCPU_MMAP_SIZE: c_ulong = 0xae04;
const KVM_CREATE_VCPU: c_ulong = 0xae41;
const KVM_SET_USER_MEMORY_REGION2: c_ulong = 0x40a0_ae49;
const KVM_RUN: c_ulong = 0xae80;
const KVM_GET_REGS: c_ulong = 0x8090_ae81;
const KVM_SET_REGS: c_ulong = 0x4090_ae82;
const KVM_GET_SREGS: c_ulong = 0x8138_ae83;
const KVM_SET_SREGS: c_ulong = 0x4138_ae84;
const KVM_ENABLE_CAP: c_ulong = 0x4068_aea3;
const KVM_CAP_EXIT_HYPERCALL: u32 = 201;
const KVM_MEM_GUEST_MEMFD: u32 = 1 << 2;
const KVM_X86_DEFAULT_VM: c_ulong = 0;
const KVM_X86_SW_PROTECTED_VM: c_ulong = 1;

const KVM_EXIT_IO: u32 = 2;
const KVM_EXIT_HYPERCALL: u32 = 3;
const KVM_EXIT_HLT: u32 = 5;
const KVM_EXIT_MEMORY_FAULT: u32 = 39;

pub const KVM_HC_MAP_GPA_RANGE: u64 = 12;
pub const KVM_MAP_GPA_RANGE_ENCRYPTED: u64 = 1 << 4;

/// `struct kvm_userspace_memory_region2`.
#[repr(C)]
#[derive(Default)]
struct Region {
    slot: u32,
    flags: u32,
    guest_phys_addr: u64,
    memory_size: u64,
    userspace_addr: u64,
    guest_memfd_offset: u64,
    guest_memfd: u32,
    pad1: u32,
    pad2: [u64; 14],
}

/// `struct kvm_regs`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Regs {
    pub rax: u64,
    pub rbx: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rsi_to_r15: [u64; 12],
    pub rip: u64,
    pub rflags: u64,
}

/// `struct kvm_sregs`: what begins with `cs` and is no concern of ours otherwise.
#[repr(C, align(8))]
struct Sregs([u8; 312]);

/// `struct kvm_enable_cap`.
#[repr(C)]
struct EnableCap {
    cap: u32,
    flags: u32,
    args: [u64; 4],
    pad: [u8; 64],
}

const _: () = {
    assert!(size_of::<Region>() == (KVM_SET_USER_MEMORY_REGION2 >> 16 & 0x3fff) as usize);
    assert!(size_of::<Regs>() == (KVM_SET_REGS >> 16 & 0x3fff) as usize);
    assert!(size_of::<Sregs>() == (KVM_SET_SREGS >> 16 & 0x3fff) as usize);
    assert!(size_of::<EnableCap>() == (KVM_ENABLE_CAP >> 16 & 0x3fff) as usize);
};

fn checked(result: c_int) -> io::Result<c_int> {
    match result {
        -1 => Err(io::Error::last_os_error()),
        fine => Ok(fine),
    }
}

fn ioctl<T>(file: &impl AsRawFd, request: c_ulong, argument: &mut T) -> io::Result<c_int> {
    // SAFETY: every caller passes the structure whose size the request encodes (checked above).
    checked(unsafe { libc::ioctl(file.as_raw_fd(), request, &raw mut *argument) })
}

fn ioctl_number(file: &impl AsRawFd, request: c_ulong, argument: c_ulong) -> io::Result<c_int> {
    // SAFETY: these requests take a number.
    checked(unsafe { libc::ioctl(file.as_raw_fd(), request, argument) })
}

/// A KVM VM, without memory so far.
pub struct Machine {
    pub vm: Arc<Vm>,
    file: OwnedFd,
    vm_type: c_ulong,
    vcpu_mmap_size: usize,
}

impl Machine {
    fn new(test: &str, vm_type: c_ulong) -> Option<Self> {
        let kvm = match File::options().read(true).write(true).open("/dev/kvm") {
            Ok(kvm) => kvm,
            Err(error) => {
                skipped(test, format_args!("/dev/kvm: {error}"));
                return None;
            }
        };
        match ioctl_number(&kvm, KVM_CREATE_VM, vm_type) {
            Ok(fd) => {
                // SAFETY: the kernel just gave this number to us.
                let file = unsafe { OwnedFd::from_raw_fd(fd) };
                let vcpu_mmap_size =
                    ioctl_number(&kvm, KVM_GET_VCPU_MMAP_SIZE, 0).unwrap() as usize;
                Some(Self {
                    vm: Vm::new(&file).unwrap(),
                    file,
                    vm_type,
                    vcpu_mmap_size,
                })
            }
            Err(error) => {
                skipped(
                    test,
                    format_args!("KVM_CREATE_VM of type {vm_type}: {error}"),
                );
                None
            }
        }
    }

    fn require(self, test: &str, what: &str, has: impl Fn(&Probe) -> bool) -> Option<Self> {
        if has(&self.vm.probe()) {
            return Some(self);
        }
        skipped(test, format_args!("this kernel has no {what}"));
        None
    }

    /// A VM of the default type whose memory can be a guest_memfd.
    pub fn ordinary(test: &str) -> Option<Self> {
        let what = "guest_memfd for ordinary VMs (Linux 6.18)";
        Self::new(test, KVM_X86_DEFAULT_VM)?.require(test, what, |probe| {
            probe.user_memory2 && probe.guest_memfd_mmap && probe.guest_memfd_init_shared
        })
    }

    /// A VM that has private memory, or else one that hasn't.
    pub fn any(test: &str) -> Option<Self> {
        let kvm = File::options().read(true).write(true).open("/dev/kvm");
        let types = kvm.as_ref().map_or(Ok(0), |kvm| {
            ioctl_number(kvm, KVM_CHECK_EXTENSION, KVM_CAP_VM_TYPES)
        });
        match types {
            Ok(types) if types & 1 << KVM_X86_SW_PROTECTED_VM != 0 => {
                Self::new(test, KVM_X86_SW_PROTECTED_VM)
            }
            _ => Self::new(test, KVM_X86_DEFAULT_VM),
        }
    }

    /// The kernel's own VM type for tests of private memory.
    pub fn confidential(test: &str) -> Option<Self> {
        let what = "private attribute for SW_PROTECTED VMs";
        Self::new(test, KVM_X86_SW_PROTECTED_VM)?.require(test, what, |probe| {
            probe.user_memory2 && probe.guest_memfd && probe.private_attribute
        })
    }

    /// The same on a kernel that converts its pages in place.
    pub fn in_place(test: &str) -> Option<Self> {
        let what = "conversion in place for SW_PROTECTED VMs";
        Self::new(test, KVM_X86_SW_PROTECTED_VM)?
            .require(test, what, |probe| probe.in_place_conversion)
    }

    /// One that has private pages, by whichever way.
    pub fn private(test: &str) -> Option<Self> {
        let what = "private pages for SW_PROTECTED VMs";
        Self::new(test, KVM_X86_SW_PROTECTED_VM)?.require(test, what, |probe| {
            probe.private_attribute || probe.in_place_conversion
        })
    }

    /// Ends the KVM VM, whose slots are gone, and puts another in its place; `between` runs while
    /// there is none.
    pub fn rebuild(&mut self, between: impl FnOnce(&Vm)) {
        self.vm.detach().unwrap();
        let kvm = File::options().read(true).write(true).open("/dev/kvm");
        // The old VM's file closes here.
        self.file = File::open("/dev/null").unwrap().into();
        between(&self.vm);
        let fd = ioctl_number(&kvm.unwrap(), KVM_CREATE_VM, self.vm_type).unwrap();
        // SAFETY: the kernel just gave this number to us.
        self.file = unsafe { OwnedFd::from_raw_fd(fd) };
        self.vm.attach(&self.file).unwrap();
    }

    /// The VM's file.
    pub fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// A memory slot on the block's file.
    pub fn add_slot(&self, slot: u32, gpa: u64, size: u64, memory: &Memslot) -> io::Result<()> {
        let mut region = Region {
            slot,
            flags: KVM_MEM_GUEST_MEMFD,
            guest_phys_addr: gpa,
            memory_size: size,
            userspace_addr: memory.userspace_addr as u64,
            guest_memfd_offset: memory.guest_memfd_offset,
            guest_memfd: memory.guest_memfd.as_raw_fd() as u32,
            ..Default::default()
        };
        ioctl(&self.file, KVM_SET_USER_MEMORY_REGION2, &mut region).map(drop)
    }

    /// A memory slot on the block's mapping alone, as other address spaces get it.
    pub fn add_plain_slot(&self, slot: u32, gpa: u64, size: u64, host: *mut u8) -> io::Result<()> {
        let mut region = Region {
            slot,
            guest_phys_addr: gpa,
            memory_size: size,
            userspace_addr: host as u64,
            ..Default::default()
        };
        ioctl(&self.file, KVM_SET_USER_MEMORY_REGION2, &mut region).map(drop)
    }

    pub fn remove_slot(&self, slot: u32) {
        let mut region = Region {
            slot,
            ..Default::default()
        };
        ioctl(&self.file, KVM_SET_USER_MEMORY_REGION2, &mut region).unwrap();
    }

    /// The guest's KVM_HC_MAP_GPA_RANGE shall come out as exits.
    pub fn exit_on_hypercalls(&self) {
        let mut cap = EnableCap {
            cap: KVM_CAP_EXIT_HYPERCALL,
            flags: 0,
            args: [1 << KVM_HC_MAP_GPA_RANGE, 0, 0, 0],
            pad: [0; 64],
        };
        ioctl(&self.file, KVM_ENABLE_CAP, &mut cap).unwrap();
    }

    pub fn add_vcpu(&self) -> Vcpu {
        let fd = ioctl_number(&self.file, KVM_CREATE_VCPU, 0).unwrap();
        // SAFETY: the kernel just gave this number to us.
        let file = unsafe { OwnedFd::from_raw_fd(fd) };
        // SAFETY: a new mapping, at an address of the kernel's choice.
        let run = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                self.vcpu_mmap_size,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                fd,
                0,
            )
        };
        assert_ne!(run, libc::MAP_FAILED);
        extern "C" fn interrupt_only(_: c_int) {}
        let handler: extern "C" fn(c_int) = interrupt_only;
        // SAFETY: the handler does nothing; a zeroed sigaction is valid and doesn't restart calls.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = handler as libc::sighandler_t;
            libc::sigaction(libc::SIGUSR1, &action, std::ptr::null_mut());
        }
        let vcpu = Vcpu {
            file,
            run: run.cast(),
            size: self.vcpu_mmap_size,
        };
        // Real mode, and all segments from address 0.
        let mut sregs = Sregs([0; 312]);
        ioctl(&vcpu.file, KVM_GET_SREGS, &mut sregs).unwrap();
        sregs.0[..8].fill(0);
        sregs.0[12..14].fill(0);
        ioctl(&vcpu.file, KVM_SET_SREGS, &mut sregs).unwrap();
        vcpu
    }
}

/// Why the guest came out.
#[derive(Debug, PartialEq, Eq)]
pub enum Exit {
    Halt,
    /// It wrote `value` to `port`.
    Out {
        port: u16,
        value: u32,
    },
    Hypercall {
        number: u64,
        arguments: [u64; 3],
    },
    Other(u32),
}

pub struct Vcpu {
    file: OwnedFd,
    run: *mut u8,
    size: usize,
}

impl Vcpu {
    /// A field of `struct kvm_run`.
    fn field<T: Copy>(&self, offset: usize) -> T {
        assert!(offset + size_of::<T>() <= self.size);
        // SAFETY: in the mapping, and the kernel writes there only while the vCPU runs.
        unsafe { self.run.add(offset).cast::<T>().read_unaligned() }
    }

    /// What the hypercall that just came out returns to the guest.
    pub fn answer(&self, result: u64) {
        // SAFETY: `hypercall.ret` is in the mapping.
        unsafe { self.run.add(88).cast::<u64>().write_unaligned(result) }
    }

    pub fn regs(&self) -> Regs {
        let mut regs = Regs::default();
        ioctl(&self.file, KVM_GET_REGS, &mut regs).unwrap();
        regs
    }

    /// Begins at `rip` with these registers.
    pub fn start(&self, regs: Regs) -> Exit {
        self.set(regs);
        self.go_on()
    }

    /// What it begins with when it runs next.
    pub fn set(&self, mut regs: Regs) {
        regs.rflags = 2;
        ioctl(&self.file, KVM_SET_REGS, &mut regs).unwrap();
    }

    /// Runs the guest until it comes out. One that never does fails the test instead of hanging it.
    pub fn go_on(&self) -> Exit {
        let entered = Instant::now();
        self.try_to_go_on()
            .unwrap_or_else(|error| panic!("KVM_RUN: {error} after {:?}", entered.elapsed()))
    }

    /// The same where KVM_RUN may fail.
    pub fn try_to_go_on(&self) -> io::Result<Exit> {
        let entered = Instant::now();
        // SAFETY: has no preconditions.
        let this_thread = unsafe { libc::pthread_self() };
        let result = std::thread::scope(|scope| {
            let (out, is_out) = mpsc::channel::<()>();
            scope.spawn(move || {
                if is_out.recv_timeout(LIMIT) == Err(RecvTimeoutError::Timeout) {
                    // SAFETY: that thread waits for this one, and the signal has a handler.
                    unsafe { libc::pthread_kill(this_thread, libc::SIGUSR1) };
                }
            });
            let mut result = ioctl_number(&self.file, KVM_RUN, 0);
            while entered.elapsed() < LIMIT
                && matches!(&result, Err(e) if e.kind() == io::ErrorKind::Interrupted)
            {
                result = ioctl_number(&self.file, KVM_RUN, 0);
            }
            drop(out);
            result
        });
        result?;
        Ok(match self.field::<u32>(8) {
            KVM_EXIT_HLT => Exit::Halt,
            KVM_EXIT_IO => {
                let data = self.field::<u64>(40) as usize;
                Exit::Out {
                    port: self.field(34),
                    value: match self.field::<u8>(33) {
                        1 => self.field::<u8>(data).into(),
                        2 => self.field::<u16>(data).into(),
                        _ => self.field::<u32>(data),
                    },
                }
            }
            KVM_EXIT_HYPERCALL => Exit::Hypercall {
                number: self.field(32),
                arguments: self.field(40),
            },
            other => Exit::Other(other),
        })
    }

    /// Address and size of the memory fault that made KVM_RUN fail.
    pub fn memory_fault(&self) -> (u64, u64) {
        assert_eq!(self.field::<u32>(8), KVM_EXIT_MEMORY_FAULT);
        (self.field(40), self.field(48))
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        // SAFETY: our own mapping, whose address nobody else has.
        unsafe { libc::munmap(self.run.cast(), self.size) };
    }
}
