// SPDX-License-Identifier: MIT OR Apache-2.0
//! What KVM itself writes to guest memory: the clock, above all, of whose page it keeps a translation. It lands in the page
//! that the guest has there, shared and of whichever kind, and nowhere else: not in a page that has turned private, was
//! punched, or lost its slot or its file.
//!
//! No released kernel finds these pages by the file: `kvm.gmem_pfncache` of the lab's is switched on here. What is seen while
//! it is off shows that each check can fail.

use crate::direct_map::{Offered, NO_DIRECT_MAP};
use crate::sys::{
    errno, ioctl, ioctl_number, pipe, Attributes1, Gmem, Map, Region, Vm,
    KVM_SET_MEMORY_ATTRIBUTES, KVM_SET_USER_MEMORY_REGION2,
};
use crate::{
    convert, convert_soon, in_place, name_of, probe, skip, split, Converted, DEFAULT, INIT_SHARED,
    MMAP, PAGE, PRIVATE, SHARED, SW_PROTECTED,
};
use libc::c_ulong;
use std::fs;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

const KVM_GET_SUPPORTED_CPUID: c_ulong = 0xc008_ae05;
const KVM_CREATE_VCPU: c_ulong = 0xae41;
const KVM_RUN: c_ulong = 0xae80;
const KVM_SET_REGS: c_ulong = 0x4090_ae82;
const KVM_GET_SREGS: c_ulong = 0x8138_ae83;
const KVM_SET_SREGS: c_ulong = 0x4138_ae84;
const KVM_SET_MSRS: c_ulong = 0x4008_ae89;
const KVM_SET_CPUID2: c_ulong = 0x4008_ae90;
const KVM_KVMCLOCK_CTRL: c_ulong = 0xaead;
const KVM_EXIT_HLT: u32 = 5;
const KVM_EXIT_INTERNAL_ERROR: u32 = 17;

const MSR_KVM_WALL_CLOCK_NEW: u32 = 0x4b56_4d00;
const MSR_KVM_SYSTEM_TIME_NEW: u32 = 0x4b56_4d01;
const MSR_KVM_STEAL_TIME: u32 = 0x4b56_4d03;
const MSR_VM_HSAVE_PA: u32 = 0xc001_0117;
const ENABLED: u64 = 1;

const PARAMETER: &str = "/sys/module/kvm/parameters/gmem_pfncache";

/// Where the memory is that is tried; the program is elsewhere, and stays.
const MEMORY: u64 = 0x10000;
const PAGES: u64 = 16;
/// The page of the clock.
const CLOCK: u64 = 3;
/// Where in it. Bytes 0 to 31 are the clock's.
const CLOCK_BYTES: usize = 32;

/// mov [bx], al; hlt
const WRITE: [u8; 3] = [0x88, 0x07, 0xf4];
/// hlt
const HALT: [u8; 1] = [0xf4];
const WRITE_AT: u64 = 0x200;
const HALT_AT: u64 = 0x300;
const VMRUN_AT: u64 = 0x400;

/// Whether KVM finds pages by the file, while this lives. The parameter is the whole kernel's: one test at a time.
struct ByFile(String, #[allow(dead_code)] MutexGuard<'static, ()>);

impl ByFile {
    /// `None`, with a printed reason, on a kernel that has no such parameter.
    fn on(test: &str) -> Option<Self> {
        static TURN: Mutex<()> = Mutex::new(());
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let before = match fs::read_to_string(PARAMETER) {
            Ok(before) => before,
            Err(error) => return skip(test, format_args!("{PARAMETER}: {error}")),
        };
        let by_file = Self(before, turn);
        by_file.turn(true);
        Some(by_file)
    }

    fn turn(&self, on: bool) {
        fs::write(PARAMETER, if on { "Y" } else { "N" }).unwrap();
    }
}

impl Drop for ByFile {
    fn drop(&mut self) {
        fs::write(PARAMETER, self.0.trim()).unwrap();
    }
}

/// Memory of this process, of no file that matters here.
fn anonymous(pages: u64) -> *mut u8 {
    // SAFETY: a new mapping, at an address of the kernel's choice. It lives as long as the process.
    let start = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            (pages * PAGE) as usize,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    };
    assert_ne!(start, libc::MAP_FAILED);
    start.cast()
}

fn region(vm: &Vm, region: &mut Region) {
    ioctl(vm.fd(), KVM_SET_USER_MEMORY_REGION2, region).unwrap();
}

/// A vCPU whose program is in plain memory, so that anything can happen to the rest.
struct Vcpu {
    fd: OwnedFd,
    run: *const u32,
    program: *mut u8,
}

// SAFETY: one thread at a time runs it; the mapping is the kernel's.
unsafe impl Send for Vcpu {}

impl Vcpu {
    fn new(vm: &Vm) -> Self {
        let program = anonymous(1);
        for (place, code) in [(WRITE_AT, &WRITE[..]), (HALT_AT, &HALT[..])] {
            // SAFETY: in the page.
            unsafe {
                let place = program.add(place as usize);
                place.copy_from_nonoverlapping(code.as_ptr(), code.len());
            }
        }
        let mut plain = Region {
            slot: 9,
            memory_size: PAGE,
            userspace_addr: program as u64,
            ..Default::default()
        };
        region(vm, &mut plain);
        let fd = ioctl_number(vm.fd(), KVM_CREATE_VCPU, 0).unwrap();
        // SAFETY: the kernel just gave this number to us.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        // SAFETY: a new mapping, at an address of the kernel's choice.
        let run = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                PAGE as usize,
                libc::PROT_READ,
                libc::MAP_SHARED,
                fd.as_raw_fd(),
                0,
            )
        };
        assert_ne!(run, libc::MAP_FAILED);
        let vcpu = Self {
            fd,
            run: run.cast(),
            program,
        };
        // Real mode, with the code segment at 0 and data at the memory. A segment is its base, then limit and selector.
        let mut sregs = vcpu.sregs();
        sregs[0] = 0;
        sregs[1] &= !(0xffff << 32);
        sregs[3] = MEMORY;
        vcpu.set_sregs(&mut sregs);
        vcpu
    }

    fn sregs(&self) -> [u64; 39] {
        let mut sregs = [0; 39];
        ioctl(self.fd.as_raw_fd(), KVM_GET_SREGS, &mut sregs).unwrap();
        sregs
    }

    fn set_sregs(&self, sregs: &mut [u64; 39]) {
        ioctl(self.fd.as_raw_fd(), KVM_SET_SREGS, sregs).unwrap();
    }

    /// Writes the register as KVM does for a VMM.
    fn msr(&self, index: u32, value: u64) {
        let mut list = [1, u64::from(index), value];
        assert_eq!(ioctl(self.fd.as_raw_fd(), KVM_SET_MSRS, &mut list), Ok(1));
    }

    /// The exit's reason, or errno.
    fn start(&self, rip: u64, rax: u64, rbx: u64) -> Result<u32, i32> {
        let mut regs = [0u64; 18];
        regs[0] = rax;
        regs[1] = rbx;
        regs[16] = rip;
        regs[17] = 2;
        ioctl(self.fd.as_raw_fd(), KVM_SET_REGS, &mut regs).unwrap();
        ioctl_number(self.fd.as_raw_fd(), KVM_RUN, 0)?;
        // SAFETY: `exit_reason` in the mapping; the vCPU does not run.
        Ok(unsafe { self.run.add(2).read_volatile() })
    }

    /// Has the guest write a byte to a page.
    fn write(&self, page: u64, byte: u8) {
        let exit = self.start(WRITE_AT, byte.into(), page * PAGE);
        assert_eq!(exit, Ok(KVM_EXIT_HLT));
    }

    /// Has KVM tell the guest of its clock.
    fn tick(&self) {
        ioctl_number(self.fd.as_raw_fd(), KVM_KVMCLOCK_CTRL, 0).unwrap();
        assert_eq!(self.start(HALT_AT, 0, 0), Ok(KVM_EXIT_HLT));
    }

    fn set_clock(&self) {
        self.set_clock_at(CLOCK);
    }

    fn set_clock_at(&self, page: u64) {
        self.msr(MSR_KVM_SYSTEM_TIME_NEW, (MEMORY + page * PAGE) | ENABLED);
        self.tick();
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        // SAFETY: our own mapping.
        unsafe { libc::munmap(self.run.cast_mut().cast(), PAGE as usize) };
    }
}

/// The memory that is tried.
fn slot(vm: &Vm, gmem: &Gmem, host: *mut u8, offset: u64, pages: u64) {
    let mut with_file = Region {
        flags: 1 << 2,
        guest_phys_addr: MEMORY,
        memory_size: pages * PAGE,
        userspace_addr: host as u64,
        guest_memfd_offset: offset * PAGE,
        guest_memfd: gmem.fd() as u32,
        ..Default::default()
    };
    region(vm, &mut with_file);
}

fn no_slot(vm: &Vm, gmem: &Gmem) {
    slot(vm, gmem, std::ptr::null_mut(), 0, 0);
}

fn bytes(map: &Map, page: u64) -> Vec<u8> {
    let start = map.page(page);
    // SAFETY: in the mapping; other users are expected.
    (0..CLOCK_BYTES)
        .map(|at| unsafe { start.add(at).read_volatile() })
        .collect()
}

fn is_clear(map: &Map, page: u64) -> bool {
    bytes(map, page).iter().all(|byte| *byte == 0)
}

/// Whether the page holds a clock: a version that says that it is whole, and a rate.
fn has_clock(map: &Map, page: u64) -> bool {
    let bytes = bytes(map, page);
    let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
    let (version, rate) = (word(0), word(24));
    assert_eq!(version % 2, 0, "half a clock: {bytes:?}");
    version != 0 && rate != 0
}

const PATTERN: u8 = 0x5b;

fn fill(map: &Map, page: u64) {
    let start = map.page(page);
    // SAFETY: as above.
    (0..CLOCK_BYTES).for_each(|at| unsafe { start.add(at).write_volatile(PATTERN) });
}

fn is_filled(map: &Map, page: u64) -> bool {
    bytes(map, page).iter().all(|byte| *byte == PATTERN)
}

/// Does it with files in the direct map, and out of it where the kernel offers that.
fn of_both_kinds(test: &str, job: impl Fn(u64)) {
    job(0);
    match Offered::new() {
        Ok(_offered) => job(NO_DIRECT_MAP),
        Err(reason) => {
            let _: Option<()> = skip(&format!("{test} out of the direct map"), reason);
        }
    }
}

/// What userspace has at the slot's address: the file, so that the kernel also hears of it in other ways, or something else.
#[derive(Clone, Copy)]
enum Seen {
    There,
    Elsewhere,
}

impl Seen {
    fn host(self, map: &Map, pages: u64) -> *mut u8 {
        match self {
            Seen::There => map.page(0),
            Seen::Elsewhere => anonymous(pages),
        }
    }
}

/// As `of_both_kinds`, with either at the slot's address.
fn of_all_kinds(test: &str, job: impl Fn(u64, Seen)) {
    of_both_kinds(test, |kind| {
        for seen in [Seen::There, Seen::Elsewhere] {
            job(kind, seen);
        }
    });
}

#[test]
fn it_is_in_the_guests_page() {
    let test = name_of(it_is_in_the_guests_page);
    let Some(by_file) = ByFile::on(test) else {
        return;
    };
    of_both_kinds(test, |kind| {
        for vm_type in [DEFAULT, SW_PROTECTED] {
            let Ok(vm) = Vm::new(vm_type) else { continue };
            let Ok(gmem) = vm.gmem(PAGES * PAGE, MMAP | INIT_SHARED | kind) else {
                continue;
            };
            let map = gmem.map(PAGES);
            slot(&vm, &gmem, map.page(0), 0, PAGES);
            let vcpu = Vcpu::new(&vm);
            // Without it, what can't be pinned has no clock.
            by_file.turn(false);
            vcpu.set_clock();
            assert_eq!(has_clock(&map, CLOCK), kind == 0, "{vm_type} {kind}");
            by_file.turn(true);
            vcpu.set_clock();
            assert!(has_clock(&map, CLOCK), "{vm_type} {kind}");
            let first = bytes(&map, CLOCK);
            vcpu.tick();
            assert_ne!(bytes(&map, CLOCK), first);
            assert!(has_clock(&map, CLOCK));
            // And back, with a translation of the other kind left over.
            by_file.turn(false);
            vcpu.tick();
            by_file.turn(true);
            vcpu.tick();
            assert!(has_clock(&map, CLOCK));
        }
    });
}

/// Nobody has the file mapped, or something else is where the slot says that it is.
#[test]
fn what_userspace_has_mapped_is_not_asked() {
    let test = name_of(what_userspace_has_mapped_is_not_asked);
    let Some(by_file) = ByFile::on(test) else {
        return;
    };
    of_both_kinds(test, |kind| {
        let vm = Vm::new(DEFAULT).unwrap();
        let gmem = vm.gmem(PAGES * PAGE, MMAP | INIT_SHARED | kind).unwrap();
        let (_other, elsewhere) = vm.mapped(PAGES, INIT_SHARED);
        slot(&vm, &gmem, elsewhere.page(0), 0, PAGES);
        let vcpu = Vcpu::new(&vm);
        by_file.turn(false);
        vcpu.set_clock();
        assert!(has_clock(&elsewhere, CLOCK), "the check can fail");
        fill(&elsewhere, CLOCK);
        by_file.turn(true);
        vcpu.msr(MSR_KVM_SYSTEM_TIME_NEW, 0);
        vcpu.set_clock();
        assert!(is_filled(&elsewhere, CLOCK));
        assert!(has_clock(&gmem.map(PAGES), CLOCK));
    });
}

/// The page that was there is somebody else's. A pipe holds it, if it can be held, and shows what is written to it.
#[test]
fn a_hole_has_a_clock_of_its_own() {
    let test = name_of(a_hole_has_a_clock_of_its_own);
    let Some(_by_file) = ByFile::on(test) else {
        return;
    };
    of_all_kinds(test, |kind, seen| {
        let vm = Vm::new(DEFAULT).unwrap();
        let gmem = vm.gmem(PAGES * PAGE, MMAP | INIT_SHARED | kind).unwrap();
        let map = gmem.map(PAGES);
        slot(&vm, &gmem, seen.host(&map, PAGES), 0, PAGES);
        let vcpu = Vcpu::new(&vm);
        for _ in 0..20 {
            vcpu.set_clock();
            assert!(has_clock(&map, CLOCK));
            let held = Held::new(&map, CLOCK);
            assert_eq!(held.is_some(), kind == 0);
            gmem.punch(CLOCK, 1).unwrap();
            assert!(is_clear(&map, CLOCK));
            let before = held.as_ref().map(Held::look);
            vcpu.tick();
            assert!(has_clock(&map, CLOCK));
            assert_eq!(held.as_ref().map(Held::look), before);
        }
    });
}

/// A page that its file may give away.
struct Held {
    from: OwnedFd,
    aside: (OwnedFd, OwnedFd),
}

impl Held {
    /// `None` if it can't be held.
    fn new(map: &Map, page: u64) -> Option<Self> {
        let (from, to) = pipe();
        // SAFETY: a page of ours.
        match unsafe { libc::vmsplice(to.as_raw_fd(), &map.iovec(page), 1, 0) } {
            -1 => {
                assert_eq!(errno(), libc::EFAULT);
                None
            }
            length => {
                assert_eq!(length, PAGE as isize);
                Some(Self {
                    from,
                    aside: pipe(),
                })
            }
        }
    }

    /// What is in the page now; it stays in the pipe.
    fn look(&self) -> Vec<u8> {
        let mut bytes = vec![0u8; CLOCK_BYTES];
        let (aside_from, aside_to) = (&self.aside.0, &self.aside.1);
        // SAFETY: numbers, and a buffer of that length.
        unsafe {
            let copied = libc::tee(
                self.from.as_raw_fd(),
                aside_to.as_raw_fd(),
                PAGE as usize,
                0,
            );
            assert_eq!(copied, PAGE as isize);
            let mut rest = vec![0u8; PAGE as usize];
            let read = libc::read(
                aside_from.as_raw_fd(),
                rest.as_mut_ptr().cast(),
                PAGE as usize,
            );
            assert_eq!(read, PAGE as isize);
            bytes.copy_from_slice(&rest[..CLOCK_BYTES]);
        }
        bytes
    }
}

#[test]
fn a_private_page_is_the_guests_alone() {
    let test = name_of(a_private_page_is_the_guests_alone);
    if in_place(test).is_none() {
        return;
    }
    let Some(_by_file) = ByFile::on(test) else {
        return;
    };
    of_all_kinds(test, |kind, seen| {
        let vm = Vm::new(SW_PROTECTED).unwrap();
        let (gmem, map) = vm.mapped(PAGES, INIT_SHARED | kind);
        slot(&vm, &gmem, seen.host(&map, PAGES), 0, PAGES);
        let vcpu = Vcpu::new(&vm);
        vcpu.set_clock();
        for _ in 0..20 {
            vcpu.tick();
            assert!(has_clock(&map, CLOCK));
            fill(&map, CLOCK);
            // The translation holds nobody up.
            assert_eq!(convert(&gmem, CLOCK, 1, PRIVATE), Converted::Yes);
            for _ in 0..3 {
                vcpu.tick();
            }
            // Asked for again while it is private, as a guest may.
            vcpu.set_clock();
            vcpu.write(CLOCK, PATTERN);
            assert_eq!(convert(&gmem, CLOCK, 1, SHARED), Converted::Yes);
            assert!(is_filled(&map, CLOCK), "{:?}", bytes(&map, CLOCK));
            vcpu.tick();
            assert!(!is_filled(&map, CLOCK));
            map.write(CLOCK, 0);
            fill(&map, CLOCK);
            clear(&map, CLOCK);
        }
    });
}

fn clear(map: &Map, page: u64) {
    let start = map.page(page);
    // SAFETY: in the mapping.
    (0..CLOCK_BYTES).for_each(|at| unsafe { start.add(at).write_volatile(0) });
}

/// While the vCPU is told of its clock all the time.
#[test]
fn conversions_and_holes_beside_the_clock() {
    let test = name_of(conversions_and_holes_beside_the_clock);
    if in_place(test).is_none() {
        return;
    }
    let Some(_by_file) = ByFile::on(test) else {
        return;
    };
    of_all_kinds(test, |kind, seen| {
        let vm = Vm::new(SW_PROTECTED).unwrap();
        let (gmem, map) = vm.mapped(PAGES, INIT_SHARED | kind);
        slot(&vm, &gmem, seen.host(&map, PAGES), 0, PAGES);
        let vcpu = Vcpu::new(&vm);
        vcpu.set_clock();
        let ticks = beside(vcpu, || {
            for _ in 0..300 {
                convert_soon(&gmem, CLOCK - 1, 3, PRIVATE);
                convert_soon(&gmem, CLOCK - 1, 3, SHARED);
                gmem.punch(CLOCK, 1).unwrap();
            }
        });
        println!("{ticks} ticks beside 600 conversions and 300 holes");
    });
}

/// Runs the job while the vCPU ticks; how often it did, which is at least once.
fn beside(vcpu: Vcpu, job: impl FnOnce()) -> u64 {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let stop = &stop;
        let runner = scope.spawn(move || {
            let vcpu = vcpu;
            let mut ticks = 0;
            loop {
                vcpu.tick();
                ticks += 1;
                if stop.load(Ordering::Relaxed) {
                    return ticks;
                }
            }
        });
        let _stop = OnDrop(stop);
        job();
        drop(_stop);
        runner.join().unwrap()
    })
}

/// Also when the job panics.
struct OnDrop<'a>(&'a AtomicBool);

impl Drop for OnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn it_does_not_outlive_the_slot() {
    let test = name_of(it_does_not_outlive_the_slot);
    let Some(_by_file) = ByFile::on(test) else {
        return;
    };
    of_all_kinds(test, |kind, seen| {
        let vm = Vm::new(DEFAULT).unwrap();
        let (gmem, map) = vm.mapped(2 * PAGES, INIT_SHARED | kind);
        let host = seen.host(&map, PAGES);
        slot(&vm, &gmem, host, 0, PAGES);
        let vcpu = Vcpu::new(&vm);
        vcpu.set_clock();
        assert!(has_clock(&map, CLOCK));
        no_slot(&vm, &gmem);
        fill(&map, CLOCK);
        vcpu.tick();
        assert!(is_filled(&map, CLOCK));
        // Nobody tells of this hole: the file is in no slot.
        let held = Held::new(&map, CLOCK);
        gmem.punch(CLOCK, 1).unwrap();
        // With the same addresses as before: of the guest, of the host, in the file.
        slot(&vm, &gmem, host, 0, PAGES);
        vcpu.tick();
        assert!(has_clock(&map, CLOCK));
        if let Some(held) = held {
            assert!(held.look().iter().all(|byte| *byte == PATTERN));
        }
        // Another part of the file, seen at the same addresses.
        no_slot(&vm, &gmem);
        fill(&map, CLOCK);
        slot(&vm, &gmem, host, PAGES, PAGES);
        vcpu.tick();
        assert!(is_filled(&map, CLOCK));
        assert!(has_clock(&map, PAGES + CLOCK));
        // And plain memory.
        no_slot(&vm, &gmem);
        fill(&map, PAGES + CLOCK);
        let plain = anonymous(PAGES);
        let mut without_file = Region {
            guest_phys_addr: MEMORY,
            memory_size: PAGES * PAGE,
            userspace_addr: plain as u64,
            ..Default::default()
        };
        region(&vm, &mut without_file);
        vcpu.tick();
        assert!(is_filled(&map, PAGES + CLOCK));
        // SAFETY: in the mapping.
        let version = unsafe { plain.add((CLOCK * PAGE) as usize).cast::<u32>().read() };
        assert_ne!(version, 0);
    });
}

/// Another slot, of another file, with the same address of the host's, which so tells nothing of the page.
fn slot_beside(vm: &Vm, gmem: &Gmem, host: *mut u8) {
    let mut with_file = Region {
        slot: 1,
        flags: 1 << 2,
        guest_phys_addr: MEMORY + PAGES * PAGE,
        memory_size: PAGES * PAGE,
        userspace_addr: host as u64,
        guest_memfd: gmem.fd() as u32,
        ..Default::default()
    };
    region(vm, &mut with_file);
}

#[test]
fn it_follows_the_guest_to_another_file() {
    let test = name_of(it_follows_the_guest_to_another_file);
    let Some(_by_file) = ByFile::on(test) else {
        return;
    };
    of_all_kinds(test, |kind, seen| {
        let vm = Vm::new(DEFAULT).unwrap();
        let (first, map) = vm.mapped(PAGES, INIT_SHARED | kind);
        let (second, other) = vm.mapped(PAGES, INIT_SHARED | kind);
        let host = seen.host(&map, PAGES);
        slot(&vm, &first, host, 0, PAGES);
        slot_beside(&vm, &second, host);
        let vcpu = Vcpu::new(&vm);
        for _ in 0..3 {
            clear(&other, CLOCK);
            vcpu.set_clock();
            assert!(has_clock(&map, CLOCK));
            assert!(is_clear(&other, CLOCK));
            fill(&map, CLOCK);
            vcpu.set_clock_at(PAGES + CLOCK);
            assert!(is_filled(&map, CLOCK), "{:?}", bytes(&map, CLOCK));
            assert!(has_clock(&other, CLOCK));
            // The page that it left may be somebody else's now.
            let held = Held::new(&map, CLOCK);
            first.punch(CLOCK, 1).unwrap();
            vcpu.tick();
            assert!(is_clear(&map, CLOCK));
            if let Some(held) = held {
                assert!(held.look().iter().all(|byte| *byte == PATTERN));
            }
        }
    });
}

#[test]
fn it_does_not_outlive_the_file() {
    let test = name_of(it_does_not_outlive_the_file);
    let Some(_by_file) = ByFile::on(test) else {
        return;
    };
    of_all_kinds(test, |kind, seen| {
        let vm = Vm::new(DEFAULT).unwrap();
        let (gmem, map) = vm.mapped(PAGES, INIT_SHARED | kind);
        slot(&vm, &gmem, seen.host(&map, PAGES), 0, PAGES);
        let vcpu = Vcpu::new(&vm);
        vcpu.set_clock();
        assert!(has_clock(&map, CLOCK));
        let held = Held::new(&map, CLOCK);
        let before = held.as_ref().map(Held::look);
        drop((gmem, map));
        for _ in 0..3 {
            vcpu.tick();
        }
        vcpu.msr(MSR_KVM_SYSTEM_TIME_NEW, (MEMORY + CLOCK * PAGE) | ENABLED);
        vcpu.tick();
        assert_eq!(held.as_ref().map(Held::look), before);
        // The vCPU may go first, or the file, with a translation that is in use.
        let (gmem, map) = vm.mapped(PAGES, INIT_SHARED | kind);
        no_slot(&vm, &gmem);
        slot(&vm, &gmem, seen.host(&map, PAGES), 0, PAGES);
        vcpu.tick();
        assert!(has_clock(&map, CLOCK));
        drop(vcpu);
        drop(vm);
    });
}

/// Shared bytes in a memfd, private ones in a guest_memfd.
struct Split {
    vm: Vm,
    memfd: Gmem,
    map: Map,
    vcpu: Vcpu,
    #[allow(dead_code)]
    private: Gmem,
}

impl Split {
    fn new(vm: Vm) -> Self {
        // SAFETY: the name is a string.
        let fd = unsafe { libc::memfd_create(c"clock".as_ptr(), 0) };
        assert_ne!(fd, -1);
        // SAFETY: the kernel just gave this number to us.
        let memfd = Gmem(unsafe { OwnedFd::from_raw_fd(fd) }.into());
        memfd.0.set_len(PAGES * PAGE).unwrap();
        let map = memfd.map(PAGES);
        let private = vm.gmem(PAGES * PAGE, 0).unwrap();
        slot(&vm, &private, map.page(0), 0, PAGES);
        let vcpu = Vcpu::new(&vm);
        Self {
            vm,
            memfd,
            map,
            vcpu,
            private,
        }
    }

    fn convert(&self, page: u64, count: u64, attributes: u64) {
        let mut request = Attributes1 {
            address: MEMORY + page * PAGE,
            size: count * PAGE,
            attributes,
            flags: 0,
        };
        ioctl(self.vm.fd(), KVM_SET_MEMORY_ATTRIBUTES, &mut request).unwrap();
    }

    /// Whether the memfd has memory at all.
    fn has_memory(&self) -> bool {
        // SAFETY: only numbers are passed.
        let at = unsafe { libc::lseek(self.memfd.fd(), 0, libc::SEEK_DATA) };
        at != -1
    }
}

/// The memory that a page has left is not written to, nor allocated again when it was freed.
#[test]
fn what_a_private_page_has_left_stays_as_it_is() {
    let test = name_of(what_a_private_page_has_left_stays_as_it_is);
    let Some(vm) = split(test) else {
        return;
    };
    let Some(by_file) = ByFile::on(test) else {
        return;
    };
    let guest = Split::new(vm);
    let vcpu = &guest.vcpu;
    // Steal time is written whenever the vCPU runs, the wall clock when it is asked for.
    let steal = MEMORY + CLOCK * PAGE + 64;
    let wall = MEMORY + CLOCK * PAGE + 128;
    vcpu.msr(MSR_KVM_STEAL_TIME, steal | ENABLED);
    for on in [false, true] {
        by_file.turn(on);
        vcpu.set_clock();
        assert!(has_clock(&guest.map, CLOCK));
        guest.convert(CLOCK, 1, PRIVATE);
        fill(&guest.map, CLOCK);
        vcpu.tick();
        assert_eq!(is_filled(&guest.map, CLOCK), on, "stale writes while {on}");
        guest.memfd.punch(0, PAGES).unwrap();
        assert!(!guest.has_memory());
        vcpu.tick();
        assert_eq!(
            guest.has_memory(),
            !on,
            "memory for stale writes while {on}"
        );
        guest.memfd.punch(0, PAGES).unwrap();
        vcpu.msr(MSR_KVM_WALL_CLOCK_NEW, wall);
        assert_eq!(guest.has_memory(), !on, "a wall clock while {on}");
        guest.memfd.punch(0, PAGES).unwrap();
        guest.convert(CLOCK, 1, SHARED);
        vcpu.tick();
        assert!(has_clock(&guest.map, CLOCK));
    }
}

/// Nor when the guest asks for its clock in a page that is private, at the address of one that is not.
#[test]
fn a_private_page_has_no_clock_by_its_address() {
    let test = name_of(a_private_page_has_no_clock_by_its_address);
    let Some(vm) = split(test) else {
        return;
    };
    let Some(by_file) = ByFile::on(test) else {
        return;
    };
    let guest = Split::new(vm);
    let beside = guest.vm.gmem(PAGES * PAGE, 0).unwrap();
    slot_beside(&guest.vm, &beside, guest.map.page(0));
    guest.convert(PAGES + CLOCK, 1, PRIVATE);
    for on in [false, true] {
        by_file.turn(on);
        guest.vcpu.set_clock();
        assert!(has_clock(&guest.map, CLOCK));
        fill(&guest.map, CLOCK);
        guest.vcpu.set_clock_at(PAGES + CLOCK);
        assert_eq!(is_filled(&guest.map, CLOCK), on, "written to while {on}");
    }
}

/// Once the attribute is set nothing is written any more, not even by who was about to.
#[test]
fn no_write_follows_the_attribute() {
    let test = name_of(no_write_follows_the_attribute);
    let Some(vm) = split(test) else {
        return;
    };
    let Some(_by_file) = ByFile::on(test) else {
        return;
    };
    let guest = Split::new(vm);
    let steal = MEMORY + CLOCK * PAGE + 64;
    guest.vcpu.msr(MSR_KVM_STEAL_TIME, steal | ENABLED);
    guest.vcpu.set_clock();
    let Split {
        vm,
        memfd,
        map,
        vcpu,
        private,
    } = guest;
    // The other half of the same guest, without the vCPU.
    let convert = |attributes| {
        let mut request = Attributes1 {
            address: MEMORY + CLOCK * PAGE,
            size: PAGE,
            attributes,
            flags: 0,
        };
        ioctl(vm.fd(), KVM_SET_MEMORY_ATTRIBUTES, &mut request).unwrap();
    };
    let mut clocks = 0;
    let ticks = beside(vcpu, || {
        for round in 0..300 {
            convert(PRIVATE);
            memfd.punch(CLOCK, 1).unwrap();
            for _ in 0..round % 8 * 100 {
                std::hint::spin_loop();
            }
            // SAFETY: only numbers are passed.
            let data = unsafe { libc::lseek(memfd.fd(), (CLOCK * PAGE) as i64, libc::SEEK_DATA) };
            assert_eq!(data, -1, "round {round}: memory behind a private page");
            convert(SHARED);
            clocks += u32::from(!is_clear(&map, CLOCK));
        }
    });
    println!("{ticks} ticks beside 600 conversions, {clocks} clocks seen at once");
    drop(private);
}

/// `struct kvm_cpuid2` with room for what KVM has to say.
#[repr(C)]
struct Cpuid {
    entries: u32,
    padding: u32,
    list: [[u32; 10]; 200],
}

/// A nested guest's control block, which KVM maps while it reads and writes it.
#[test]
fn a_nested_guests_structures_can_be_anywhere() {
    let test = name_of(a_nested_guests_structures_can_be_anywhere);
    let Some(by_file) = ByFile::on(test) else {
        return;
    };
    let converts = Vm::new(SW_PROTECTED).is_ok_and(|vm| probe(&vm) == Converted::Yes);
    let kvm = fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .unwrap();
    let mut cpuid = Cpuid {
        entries: 200,
        padding: 0,
        list: [[0; 10]; 200],
    };
    ioctl(kvm.as_raw_fd(), KVM_GET_SUPPORTED_CPUID, &mut cpuid).unwrap();
    // Function, index, flags, then eax, ebx, ecx, edx.
    let listed = &cpuid.list[..cpuid.entries as usize];
    if !listed
        .iter()
        .any(|entry| entry[0] == 0x8000_0001 && entry[5] & 1 << 2 != 0)
    {
        return skip(test, "no nested SVM").unwrap_or(());
    }
    of_both_kinds(test, |kind| {
        let vm = Vm::new(if converts { SW_PROTECTED } else { DEFAULT }).unwrap();
        let (gmem, map) = vm.mapped(PAGES, INIT_SHARED | kind);
        slot(&vm, &gmem, map.page(0), 0, PAGES);
        let vcpu = Vcpu::new(&vm);
        ioctl(vcpu.fd.as_raw_fd(), KVM_SET_CPUID2, &mut cpuid_copy(&cpuid)).unwrap();
        // vmrun; hlt. A control block of zeros is one that the processor refuses, and writes so into it.
        let code = [0x0f, 0x01, 0xd8, 0xf4];
        // SAFETY: in the page; the first word is the directory.
        unsafe {
            vcpu.program.cast::<u32>().write(0x83);
            let place = vcpu.program.add(VMRUN_AT as usize);
            place.copy_from_nonoverlapping(code.as_ptr(), code.len());
        }
        let real_mode = vcpu.sregs();
        vcpu.msr(MSR_VM_HSAVE_PA, MEMORY + (CLOCK + 1) * PAGE);
        let run = || {
            let mut flat = real_mode;
            // Limit, selector; then type 0xb of a code segment, present, dpl, db, s, l, g.
            flat[0] = 0;
            flat[1] = 0x0008_ffff_ffff | 0x0b << 48 | 1 << 56;
            flat[2] = 1 << 8 | 1 << 16 | 1 << 32;
            // Protected mode with paging, without which there is no SVM: the first 4 MiB, by a directory at 0.
            flat[CR0] |= 1 | 1 << 31;
            flat[CR3] = 0;
            flat[CR4] |= 1 << 4;
            // EFER.SVME
            flat[EFER] |= 1 << 12;
            vcpu.set_sregs(&mut flat);
            vcpu.start(VMRUN_AT, MEMORY + CLOCK * PAGE, 0)
        };
        // SAFETY: the block's exit code, in the mapping.
        let exit_code = || unsafe { map.page(CLOCK).add(0x70).cast::<u64>().read_volatile() };
        by_file.turn(false);
        let without = run();
        assert_eq!(without == Ok(KVM_EXIT_HLT), kind == 0, "{without:?}");
        by_file.turn(true);
        if without == Ok(KVM_EXIT_INTERNAL_ERROR) {
            assert_eq!(exit_code(), 0);
        }
        clear(&map, CLOCK);
        assert_eq!(run(), Ok(KVM_EXIT_HLT));
        assert_eq!(exit_code(), u64::MAX);
        if converts {
            // Nothing is held any more, and what is private is not found.
            assert_eq!(convert(&gmem, CLOCK, 1, PRIVATE), Converted::Yes);
            assert_eq!(run(), Ok(KVM_EXIT_INTERNAL_ERROR));
        }
    });
}

/// Of `struct kvm_sregs`, in words: after 8 segments of three each, two tables of two.
const CR0: usize = 8 * 3 + 2 * 2;
const CR3: usize = CR0 + 2;
const CR4: usize = CR0 + 3;
/// After CR8.
const EFER: usize = CR0 + 5;

fn cpuid_copy(cpuid: &Cpuid) -> Cpuid {
    Cpuid {
        entries: cpuid.entries,
        padding: 0,
        list: cpuid.list,
    }
}
