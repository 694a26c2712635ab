// SPDX-License-Identifier: MIT OR Apache-2.0
//! Files whose pages are not in the kernel's direct map, where the kernel offers them: creation flag bit 2, which says
//! something else on other kernels.

use crate::devices::{Device, Ioas};
use crate::sys::{errno, pipe, Map, Ring, Vm};
use crate::{
    confidential, convert, name_of, probe, skip, Converted, DEFAULT, INIT_SHARED, MMAP, PAGE,
    PRIVATE,
};
use std::fs;
use std::os::fd::AsRawFd;
use std::sync::{Mutex, MutexGuard, PoisonError};

pub const NO_DIRECT_MAP: u64 = 1 << 2;
const PARAMETER: &str = "/sys/module/kvm/parameters/gmem_no_direct_map";
const KVM_CAP_GUEST_MEMFD_FLAGS: u64 = 244;
const PAGES: u64 = 16;

/// While this lives, the kernel makes such files. The parameter is the whole kernel's: one test at a time.
pub struct Offered(bool, #[allow(dead_code)] MutexGuard<'static, ()>);

impl Offered {
    pub fn new() -> Result<Self, String> {
        static TURN: Mutex<()> = Mutex::new(());
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let tell = |error| format!("{PARAMETER}: {error}");
        let before = fs::read_to_string(PARAMETER).map_err(tell)?.trim() == "Y";
        if !before {
            fs::write(PARAMETER, "Y").map_err(tell)?;
        }
        Ok(Self(before, turn))
    }
}

impl Drop for Offered {
    fn drop(&mut self) {
        if !self.0 {
            fs::write(PARAMETER, "N").unwrap();
        }
    }
}

/// An ordinary VM on a kernel with such files, or a printed reason.
fn offered(test: &str) -> Option<(Offered, Vm)> {
    let offered = match Offered::new() {
        Ok(offered) => offered,
        Err(reason) => return skip(test, reason),
    };
    match Vm::new(DEFAULT) {
        Ok(vm) => Some((offered, vm)),
        Err(error) => skip(test, error),
    }
}

/// Where the direct map begins with page tables of four levels and of five, unless it is randomised.
const DIRECT_MAPS: [u64; 2] = [0xffff_8880_0000_0000, 0xff11_0000_0000_0000];
const TRACING: &str = "/sys/kernel/tracing";

/// Reads kernel memory: a probe on a system call that takes a value from there.
struct Look {
    direct_map: u64,
}

impl Look {
    /// `None`: no probe finds this page, which is one like any other.
    fn new(frame: u64) -> Option<Self> {
        let looks = DIRECT_MAPS.map(|direct_map| Self { direct_map });
        looks
            .into_iter()
            .find(|look| look.reads(frame) == Some(true))
    }

    /// Whether the kernel can read this page by its direct map.
    fn reads(&self, frame: u64) -> Option<bool> {
        // A number that can't be read would be 0, a string says so.
        let place = format!("@{:#x}:string", self.direct_map + frame * PAGE);
        taken(&place).map(|value| value != "(fault)")
    }
}

fn taken(place: &str) -> Option<String> {
    let file = |name: &str| format!("{TRACING}/{name}");
    let probe = format!("p:gmem/look __x64_sys_getppid value={place}");
    fs::write(file("kprobe_events"), probe).ok()?;
    fs::write(file("trace"), "").unwrap();
    fs::write(file("events/gmem/look/enable"), "1").unwrap();
    // SAFETY: has no preconditions.
    unsafe { libc::getppid() };
    fs::write(file("events/gmem/look/enable"), "0").unwrap();
    let trace = fs::read(file("trace")).unwrap();
    fs::write(file("kprobe_events"), "").unwrap();
    let trace = String::from_utf8_lossy(&trace);
    let value = trace.split("value=").nth(1)?.lines().next()?;
    Some(value.trim().to_string())
}

fn frame(map: &Map, page: u64) -> u64 {
    let frame = map.pagemap(page) & ((1 << 55) - 1);
    assert_ne!(frame, 0, "frame numbers are root's to see");
    frame
}

#[test]
fn the_flag_is_offered() {
    let Some((_offered, vm)) = offered(name_of(the_flag_is_offered)) else {
        return;
    };
    let flags = vm.extension(KVM_CAP_GUEST_MEMFD_FLAGS) as u64;
    assert_eq!(flags & NO_DIRECT_MAP, NO_DIRECT_MAP);
    for others in [0, MMAP, MMAP | INIT_SHARED] {
        vm.gmem(PAGE, others | NO_DIRECT_MAP).unwrap();
    }
}

/// Which is all that most of a VMM needs.
#[test]
fn the_host_reads_and_writes_through_its_mapping() {
    let test = name_of(the_host_reads_and_writes_through_its_mapping);
    let Some((_offered, vm)) = offered(test) else {
        return;
    };
    let (_gmem, map) = vm.mapped(PAGES, INIT_SHARED | NO_DIRECT_MAP);
    assert!((0..PAGES).all(|page| map.read(page) == 0));
    map.write(3, 0x5a);
    // The kernel's own copies go through the mapping as well.
    let (from, to) = pipe();
    // SAFETY: pages of ours.
    unsafe {
        assert_eq!(libc::write(to.as_raw_fd(), map.page(3).cast(), 8), 8);
        assert_eq!(libc::read(from.as_raw_fd(), map.page(4).cast(), 8), 8);
    }
    assert_eq!(map.read(4), 0x5a);
}

#[test]
fn nobody_can_pin_its_pages() {
    let test = name_of(nobody_can_pin_its_pages);
    let Some((_offered, vm)) = offered(test) else {
        return;
    };
    let (gmem, map) = vm.mapped(PAGES, INIT_SHARED | NO_DIRECT_MAP);
    map.write(3, 1);
    if let Ok(ring) = Ring::new() {
        assert_eq!(ring.register(&[map.iovec(3)]), Err(libc::EFAULT));
        // Not there yet.
        assert_eq!(ring.register(&[map.iovec(5)]), Err(libc::EFAULT));
    }
    let (_from, to) = pipe();
    // SAFETY: a page of ours.
    let spliced = unsafe { libc::vmsplice(to.as_raw_fd(), &map.iovec(3), 1, 0) };
    assert_eq!((spliced, errno()), (-1, libc::EFAULT));
    // Populating goes the same way in the kernel: allocate by fallocate, or by touching.
    for advice in [libc::MADV_POPULATE_READ, libc::MADV_POPULATE_WRITE] {
        assert_eq!(map.madvise(0, PAGES, advice), Err(libc::EINVAL));
    }
    gmem.allocate(0, PAGES).unwrap();

    let Some(device) = Device::new(test) else {
        return;
    };
    let ioas = Ioas::attached(&device);
    assert_eq!(ioas.map(&map, 0, PAGES), Err(libc::EFAULT));
    // By file: refused as well, or such files are not known to iommufd.
    let by_file = ioas.map_file(&gmem, 0, PAGES).unwrap_err();
    assert!(
        [libc::EFAULT, libc::EINVAL].contains(&by_file),
        "errno {by_file}"
    );
}

#[test]
fn pages_leave_the_direct_map_and_come_back() {
    let test = name_of(pages_leave_the_direct_map_and_come_back);
    let Some((_offered, vm)) = offered(test) else {
        return;
    };
    let (gmem, map) = vm.mapped(4, INIT_SHARED | NO_DIRECT_MAP);
    let (_other, others) = vm.mapped(1, INIT_SHARED);
    others.write(0, 1);
    let Some(look) = Look::new(frame(&others, 0)) else {
        return skip(test, "no kernel probe finds the direct map").unwrap_or(());
    };
    gmem.allocate(0, 4).unwrap();
    (0..4).for_each(|page| map.write(page, 1));
    let frames: Vec<u64> = (0..4).map(|page| frame(&map, page)).collect();
    for frame in &frames {
        assert_eq!(look.reads(*frame), Some(false));
    }
    gmem.punch(3, 1).unwrap();
    assert_eq!(look.reads(frames[3]), Some(true));
    drop((gmem, map));
    for frame in &frames {
        assert_eq!(look.reads(*frame), Some(true));
    }
}

/// Private or shared, and from one to the other.
#[test]
fn it_converts_like_any_other() {
    let test = name_of(it_converts_like_any_other);
    let Some((_offered, _)) = offered(test) else {
        return;
    };
    let Some(vm) = confidential(test) else {
        return;
    };
    if probe(&vm) != Converted::Yes {
        return skip(test, "this kernel does not convert in place").unwrap_or(());
    }
    let (gmem, map) = vm.mapped(PAGES, INIT_SHARED | NO_DIRECT_MAP);
    (0..PAGES).for_each(|page| map.write(page, 7));
    for _ in 0..3 {
        assert_eq!(convert(&gmem, 0, PAGES, PRIVATE), Converted::Yes);
        assert_eq!(convert(&gmem, 0, PAGES, 0), Converted::Yes);
    }
    assert!((0..PAGES).all(|page| map.read(page) == 7));
}
