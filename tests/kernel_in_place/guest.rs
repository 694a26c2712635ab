// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a guest's access finds: one vCPU in real mode with a program of two instructions.

use crate::sys::{in_child, ioctl, ioctl_number, Gmem, Map, PreFault, Vm};
use crate::{
    convert, in_place, name_of, Converted, DEFAULT, INIT_SHARED, MMAP, PAGE, PRIVATE, SHARED,
    SW_PROTECTED,
};
use libc::c_ulong;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

const KVM_CREATE_VCPU: c_ulong = 0xae41;
const KVM_RUN: c_ulong = 0xae80;
const KVM_SET_REGS: c_ulong = 0x4090_ae82;
const KVM_GET_SREGS: c_ulong = 0x8138_ae83;
const KVM_SET_SREGS: c_ulong = 0x4138_ae84;
const KVM_PRE_FAULT_MEMORY: c_ulong = 0xc040_aed5;

const KVM_EXIT_IO: u32 = 2;
const KVM_EXIT_HLT: u32 = 5;
const KVM_EXIT_MMIO: u32 = 6;
const KVM_EXIT_MEMORY_FAULT: u32 = 39;

/// What a vCPU's mapping holds at most of what is read here.
const RUN_SIZE: usize = 4096;

/// `struct kvm_regs`: rax, rbx, 14 more, rip, rflags.
type Regs = [u64; 18];

/// mov al, [bx]; out 0x10, al; hlt
const READ: [u8; 5] = [0x8a, 0x07, 0xe6, 0x10, 0xf4];
/// mov [bx], al; hlt
const WRITE: [u8; 3] = [0x88, 0x07, 0xf4];
const READ_AT: u64 = 0x100;
const WRITE_AT: u64 = 0x200;

const PAGES: u64 = 16;

#[derive(Debug, PartialEq, Eq)]
enum Exit {
    /// The byte that it read.
    Read(u8),
    Halt,
    Mmio {
        gpa: u64,
    },
    /// KVM_RUN failed with this errno; the flags and address of the memory fault.
    Fault {
        errno: i32,
        flags: u64,
        gpa: u64,
    },
    Other(u32),
}

/// A vCPU and the memory that it runs in, at guest address 0. Page 0 is its program's.
struct Guest {
    vm: Vm,
    gmem: Gmem,
    map: Map,
    vcpu: OwnedFd,
    run: *mut u8,
}

impl Guest {
    fn new(vm: Vm, flags: u64) -> Self {
        let gmem = vm.gmem(PAGES * PAGE, flags).unwrap();
        let map = gmem.map(PAGES);
        if flags & INIT_SHARED == 0 {
            assert_eq!(convert(&gmem, 0, PAGES, SHARED), Converted::Yes);
        }
        let host = map.page(0);
        Self::with(vm, gmem, map, host)
    }

    /// With `host` as the slot's userspace_addr.
    fn with(vm: Vm, gmem: Gmem, map: Map, host: *mut u8) -> Self {
        for (place, code) in [(READ_AT, &READ[..]), (WRITE_AT, &WRITE[..])] {
            // SAFETY: in the first page of both.
            unsafe {
                for memory in [map.page(0), host] {
                    let place = memory.add(place as usize);
                    place.copy_from_nonoverlapping(code.as_ptr(), code.len());
                }
            }
        }
        Self::without_program(vm, gmem, map, host)
    }

    fn without_program(vm: Vm, gmem: Gmem, map: Map, host: *mut u8) -> Self {
        vm.slot(0, PAGES * PAGE, &gmem, host).unwrap();
        let fd = ioctl_number(vm.fd(), KVM_CREATE_VCPU, 0).unwrap();
        // SAFETY: the kernel just gave this number to us.
        let vcpu = unsafe { OwnedFd::from_raw_fd(fd) };
        // SAFETY: a new mapping, at an address of the kernel's choice.
        let run = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                RUN_SIZE,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                fd,
                0,
            )
        };
        assert_ne!(run, libc::MAP_FAILED);
        // Real mode, with the code segment at 0.
        let mut sregs = [0u64; 39];
        ioctl(fd, KVM_GET_SREGS, &mut sregs).unwrap();
        // `cs` is first: its base, then limit and selector.
        sregs[0] = 0;
        sregs[1] &= !(0xffff << 32);
        ioctl(fd, KVM_SET_SREGS, &mut sregs).unwrap();
        Self {
            vm,
            gmem,
            map,
            vcpu,
            run: run.cast(),
        }
    }

    fn field<T: Copy>(&self, offset: usize) -> T {
        assert!(offset + size_of::<T>() <= RUN_SIZE);
        // SAFETY: in the mapping, and the kernel writes there only while the vCPU runs.
        unsafe { self.run.add(offset).cast::<T>().read_unaligned() }
    }

    fn start(&self, rip: u64, page: u64, byte: u8) -> Exit {
        let mut regs: Regs = [0; 18];
        regs[0] = byte.into();
        regs[1] = page * PAGE;
        regs[16] = rip;
        regs[17] = 2;
        ioctl(self.vcpu.as_raw_fd(), KVM_SET_REGS, &mut regs).unwrap();
        self.go_on()
    }

    fn go_on(&self) -> Exit {
        let result = ioctl_number(self.vcpu.as_raw_fd(), KVM_RUN, 0);
        match (result, self.field::<u32>(8)) {
            (Err(errno), KVM_EXIT_MEMORY_FAULT) => Exit::Fault {
                errno,
                flags: self.field(32),
                gpa: self.field(40),
            },
            (Err(errno), reason) => panic!("KVM_RUN: errno {errno}, exit {reason}"),
            (Ok(_), KVM_EXIT_IO) => {
                let data = self.field::<u64>(40) as usize;
                // The page behind `struct kvm_run`; mapped by itself, since only this needs it.
                Exit::Read(self.port_data(data))
            }
            (Ok(_), KVM_EXIT_HLT) => Exit::Halt,
            (Ok(_), KVM_EXIT_MMIO) => Exit::Mmio {
                gpa: self.field(32),
            },
            (Ok(_), other) => Exit::Other(other),
        }
    }

    fn port_data(&self, offset: usize) -> u8 {
        let first = offset / PAGE as usize * PAGE as usize;
        // SAFETY: a page of the vCPU's mapping, mapped, read and unmapped.
        unsafe {
            let page = libc::mmap(
                std::ptr::null_mut(),
                PAGE as usize,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                self.vcpu.as_raw_fd(),
                first as i64,
            );
            assert_ne!(page, libc::MAP_FAILED);
            let byte = page.cast::<u8>().add(offset - first).read();
            libc::munmap(page, PAGE as usize);
            byte
        }
    }

    fn read(&self, page: u64) -> Exit {
        self.start(READ_AT, page, 0)
    }

    fn write(&self, page: u64, byte: u8) -> Exit {
        self.start(WRITE_AT, page, byte)
    }

    fn convert(&self, page: u64, count: u64, attributes: u64) {
        crate::convert_soon(&self.gmem, page, count, attributes);
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // SAFETY: our own mapping.
        unsafe { libc::munmap(self.run.cast(), RUN_SIZE) };
    }
}

#[test]
fn the_guest_uses_a_page_as_what_it_is() {
    let Some(vm) = in_place(name_of(the_guest_uses_a_page_as_what_it_is)) else {
        return;
    };
    let guest = Guest::new(vm, MMAP);
    guest.map.write(3, 0x5a);
    assert_eq!(guest.read(3), Exit::Read(0x5a));
    // This VM type has one kind of memory in truth: the bytes stay, and the guest sees no difference.
    guest.convert(3, 1, PRIVATE);
    assert_eq!(guest.read(3), Exit::Read(0x5a));
    assert_eq!(guest.write(3, 0x77), Exit::Halt);
    guest.convert(3, 1, SHARED);
    assert_eq!(guest.map.read(3), 0x77);
    assert_eq!(guest.write(3, 0x78), Exit::Halt);
    assert_eq!(guest.map.read(3), 0x78);
    // Faulted in by the guest as private, and punched.
    guest.convert(4, 2, PRIVATE);
    assert_eq!(guest.write(4, 1), Exit::Halt);
    guest.gmem.punch(4, 1).unwrap();
    assert_eq!(guest.read(4), Exit::Read(0));
}

/// The layout of two kinds of memory behind one slot has no place there.
#[test]
fn the_slots_other_memory_is_not_used() {
    if in_place(name_of(the_slots_other_memory_is_not_used)).is_none() {
        return;
    }
    for flags in [0, INIT_SHARED] {
        let vm = Vm::new(SW_PROTECTED).unwrap();
        // Made mappable in any case: something has to write the program.
        let (gmem, map) = vm.mapped(PAGES, flags);
        assert_eq!(convert(&gmem, 0, PAGES, SHARED), Converted::Yes);
        let (_other_gmem, other) = vm.mapped(PAGES, INIT_SHARED);
        (0..PAGES).for_each(|page| other.write(page, 0x22));
        map.write(3, 0x33);
        let guest = Guest::with(vm, gmem, map, other.page(0));
        assert_eq!(guest.read(3), Exit::Read(0x33), "flags {flags}");
        assert_eq!(guest.write(3, 0x44), Exit::Halt);
        assert_eq!((guest.map.read(3), other.read(3)), (0x44, 0x22));
    }
}

/// Stale exits come with the race and go by running the vCPU again.
#[test]
fn a_running_vcpu_is_never_in_the_way() {
    let Some(vm) = in_place(name_of(a_running_vcpu_is_never_in_the_way)) else {
        return;
    };
    let guest = Guest::new(vm, MMAP | INIT_SHARED);
    let stop = AtomicBool::new(false);
    let stale = std::thread::scope(|scope| {
        // The raw parts: the guest belongs to the thread that runs it.
        struct Whole<'a>(&'a Guest);
        // SAFETY: the other thread only converts, for which the kernel has its locks.
        unsafe impl Send for Whole<'_> {}
        let whole = Whole(&guest);
        let (gmem, stop) = (&guest.gmem, &stop);
        let runner = scope.spawn(move || {
            let whole = whole;
            let mut stale = 0u32;
            while !stop.load(Ordering::Relaxed) {
                let mut exit = whole.0.write(5, 9);
                loop {
                    match exit {
                        Exit::Halt => break,
                        Exit::Fault {
                            errno: libc::EFAULT,
                            gpa,
                            ..
                        } if gpa / PAGE == 5 => stale += 1,
                        other => panic!("{other:?}"),
                    }
                    exit = whole.0.go_on();
                }
            }
            stale
        });
        let mut refused = 0;
        for _ in 0..1000 {
            loop {
                match convert(gmem, 5, 1, PRIVATE) {
                    Converted::Yes => break,
                    other => assert_eq!(other, crate::busy(5 * PAGE)),
                }
                refused += 1;
            }
            assert_eq!(convert(gmem, 5, 1, SHARED), Converted::Yes);
        }
        stop.store(true, Ordering::Relaxed);
        println!("{refused} of 1000 conversions had to be repeated");
        assert!(refused < 100, "{refused} of 1000");
        runner.join().unwrap()
    });
    println!("{stale} stale exits");
    assert_eq!(guest.read(5), Exit::Read(9));
}

#[test]
fn without_its_slot_a_private_page_is_no_memory() {
    let test = name_of(without_its_slot_a_private_page_is_no_memory);
    let Some(vm) = in_place(test) else {
        return;
    };
    let guest = Guest::new(vm, MMAP);
    guest.convert(3, 1, PRIVATE);
    assert_eq!(guest.write(3, 1), Exit::Halt);
    // Again, and only the program's page.
    guest
        .vm
        .slot(0, 0, &guest.gmem, std::ptr::null_mut())
        .unwrap();
    guest
        .vm
        .slot(0, PAGE, &guest.gmem, guest.map.page(0))
        .unwrap();
    assert_eq!(guest.read(3), Exit::Mmio { gpa: 3 * PAGE });
}

#[test]
fn a_file_that_is_gone_is_a_memory_fault() {
    let Some(vm) = in_place(name_of(a_file_that_is_gone_is_a_memory_fault)) else {
        return;
    };
    let mut guest = Guest::new(vm, MMAP);
    assert_eq!(guest.read(3), Exit::Read(0));
    // Nobody has it any more, except the slot, which does not count.
    guest.gmem = guest.vm.gmem(PAGE, 0).unwrap();
    let (_, unmapped) = guest.vm.mapped(1, INIT_SHARED);
    drop(std::mem::replace(&mut guest.map, unmapped));
    match guest.read(3) {
        Exit::Fault { errno, flags, .. } => assert_eq!((errno, flags), (libc::EFAULT, 0)),
        other => panic!("{other:?}"),
    }
}

/// There, an attribute that nobody can change is a wrong one.
#[test]
fn an_ordinary_vm_needs_memory_that_begins_shared() {
    let test = name_of(an_ordinary_vm_needs_memory_that_begins_shared);
    if in_place(test).is_none() {
        return;
    }
    let vm = Vm::new(DEFAULT).unwrap();
    let guest = Guest::new(vm, MMAP | INIT_SHARED);
    guest.map.write(3, 5);
    assert_eq!(guest.read(3), Exit::Read(5));

    let vm = Vm::new(DEFAULT).unwrap();
    let (gmem, map) = vm.mapped(PAGES, 0);
    let host = map.page(0);
    let guest = Guest::without_program(vm, gmem, map, host);
    let fault = Exit::Fault {
        errno: libc::EFAULT,
        flags: 0,
        gpa: 0,
    };
    assert_eq!(guest.read(3), fault);
}

#[test]
fn both_kinds_can_be_faulted_in_ahead() {
    let Some(vm) = in_place(name_of(both_kinds_can_be_faulted_in_ahead)) else {
        return;
    };
    let guest = Guest::new(vm, MMAP);
    guest.convert(8, 4, PRIVATE);
    for page in [4, 8] {
        let mut request = PreFault {
            gpa: page * PAGE,
            size: 4 * PAGE,
            ..Default::default()
        };
        let vcpu = guest.vcpu.as_raw_fd();
        assert_eq!(ioctl(vcpu, KVM_PRE_FAULT_MEMORY, &mut request), Ok(0));
        assert_eq!(request.size, 0);
    }
    // Nothing of it is in the way.
    assert_eq!(convert(&guest.gmem, 4, 4, PRIVATE), Converted::Yes);
}

/// The child has the guest's memory too, and loses the page with everybody else.
#[test]
fn a_forked_host_sees_the_guests_writes_and_no_private_page() {
    let test = name_of(a_forked_host_sees_the_guests_writes_and_no_private_page);
    let Some(vm) = in_place(test) else {
        return;
    };
    let guest = Guest::new(vm, MMAP);
    assert_eq!(guest.write(3, 0x66), Exit::Halt);
    assert_eq!(in_child(|| guest.map.read(3)).result(), 0x66);
    guest.convert(3, 1, PRIVATE);
    let child = in_child(|| {
        crate::sys::end_at_sigbus();
        guest.map.read(3)
    });
    assert_eq!(child.result(), crate::sys::NO_SUCH_PAGE);
}
