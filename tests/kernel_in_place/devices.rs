// SPDX-License-Identifier: MIT OR Apache-2.0
//! Pins of an assigned device, and mapping a guest_memfd by its file. The device is whatever `edu` the machine has; it
//! does nothing, its IOMMU domain makes iommufd pin.

use crate::sys::{errno, ioctl, ioctl_number, Gmem, Map, Ring};
use crate::{
    busy, convert, convert_soon, in_place, name_of, skip, split, Converted, INIT_SHARED, MMAP,
    PAGE, PRIVATE, SHARED,
};
use libc::c_ulong;
use std::fs::{self, File};
use std::os::fd::{AsRawFd, RawFd};
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

const IOMMU_DESTROY: c_ulong = 0x3b80;
const IOMMU_IOAS_ALLOC: c_ulong = 0x3b81;
const IOMMU_IOAS_COPY: c_ulong = 0x3b83;
const IOMMU_IOAS_MAP: c_ulong = 0x3b85;
const IOMMU_IOAS_UNMAP: c_ulong = 0x3b86;
const IOMMU_OPTION: c_ulong = 0x3b87;
const IOMMU_VFIO_IOAS: c_ulong = 0x3b88;
const IOMMU_IOAS_MAP_FILE: c_ulong = 0x3b8f;
const VFIO_IOMMU_UNMAP_DMA: c_ulong = 0x3b72;
const VFIO_DEVICE_BIND_IOMMUFD: c_ulong = 0x3b76;
const VFIO_DEVICE_ATTACH_IOMMUFD_PT: c_ulong = 0x3b77;
const VFIO_DEVICE_DETACH_IOMMUFD_PT: c_ulong = 0x3b78;

/// IOMMU_IOAS_MAP_FIXED_IOVA, WRITEABLE and READABLE
const MAP_FLAGS: u32 = 1 | 2 | 4;
const IOVA: u64 = 0x1000_0000;
const PAGES: u64 = 16;

const EDU: (&str, &str) = ("0x1234", "0x11e8");
const PCI: &str = "/sys/bus/pci";

#[repr(C)]
#[derive(Default)]
struct IoasAlloc {
    size: u32,
    flags: u32,
    out_ioas_id: u32,
}

#[repr(C)]
#[derive(Default)]
struct IoasMap {
    size: u32,
    flags: u32,
    ioas_id: u32,
    reserved: u32,
    user_va: u64,
    length: u64,
    iova: u64,
}

#[repr(C)]
#[derive(Default)]
struct IoasMapFile {
    size: u32,
    flags: u32,
    ioas_id: u32,
    fd: i32,
    start: u64,
    length: u64,
    iova: u64,
}

#[repr(C)]
#[derive(Default)]
struct IoasUnmap {
    size: u32,
    ioas_id: u32,
    iova: u64,
    length: u64,
}

#[repr(C)]
#[derive(Default)]
struct IoasCopy {
    size: u32,
    flags: u32,
    dst_ioas_id: u32,
    src_ioas_id: u32,
    length: u64,
    dst_iova: u64,
    src_iova: u64,
}

#[repr(C)]
#[derive(Default)]
struct IommuOption {
    size: u32,
    option_id: u32,
    op: u16,
    reserved: u16,
    object_id: u32,
    val64: u64,
}

/// `struct iommu_vfio_ioas`; op 1 sets.
#[repr(C)]
#[derive(Default)]
struct VfioIoas {
    size: u32,
    ioas_id: u32,
    op: u16,
    reserved: u16,
}

#[repr(C)]
#[derive(Default)]
struct VfioUnmap {
    argsz: u32,
    flags: u32,
    iova: u64,
    size: u64,
}

#[repr(C)]
#[derive(Default)]
struct VfioBind {
    argsz: u32,
    flags: u32,
    iommufd: i32,
    out_devid: u32,
}

#[repr(C)]
#[derive(Default)]
struct VfioAttach {
    argsz: u32,
    flags: u32,
    pt_id: u32,
}

/// A PCI device on vfio-pci, for as long as this lives.
pub struct Device {
    name: String,
    file: File,
    /// It had no driver before.
    claimed: bool,
    _turn: MutexGuard<'static, ()>,
}

impl Device {
    pub fn new(test: &str) -> Option<Self> {
        static TURN: Mutex<()> = Mutex::new(());
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let Some((name, free)) = edu() else {
            return skip(test, "no edu device without driver or on vfio-pci");
        };
        if free {
            if let Err(error) = claim(&name) {
                return skip(test, format_args!("{name} on vfio-pci: {error}"));
            }
        }
        let node = PathBuf::from(format!("{PCI}/devices/{name}/vfio-dev"));
        let node = match fs::read_dir(&node).map(|mut nodes| nodes.next()) {
            Ok(Some(Ok(node))) => node.file_name().into_string().unwrap(),
            other => return skip(test, format_args!("{}: {other:?}", node.display())),
        };
        let path = format!("/dev/vfio/devices/{node}");
        match File::options().read(true).write(true).open(&path) {
            Ok(file) => Some(Self {
                name,
                file,
                claimed: free,
                _turn: turn,
            }),
            Err(error) => skip(test, format_args!("{path}: {error}")),
        }
    }

    /// The device's DMA goes through this address space, whose pages are pinned from now on.
    fn attach(&self, ioas: &Ioas) -> Result<(), i32> {
        let mut attach = VfioAttach {
            argsz: size_of::<VfioAttach>() as u32,
            flags: 0,
            pt_id: ioas.id,
        };
        self.ioctl(VFIO_DEVICE_ATTACH_IOMMUFD_PT, &mut attach)
    }

    fn detach(&self) {
        let mut detach = [8u32, 0];
        self.ioctl(VFIO_DEVICE_DETACH_IOMMUFD_PT, &mut detach)
            .unwrap();
    }

    fn ioctl<T>(&self, request: c_ulong, argument: &mut T) -> Result<(), i32> {
        ioctl(self.file.as_raw_fd(), request, argument).map(drop)
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // The driver lets go once nobody has the file open.
        self.file = File::open("/dev/null").unwrap();
        if !self.claimed {
            return;
        }
        let _ = fs::write(
            format!("{PCI}/devices/{}/driver/unbind", self.name),
            &self.name,
        );
        let _ = fs::write(format!("{PCI}/devices/{}/driver_override", self.name), "\n");
    }
}

/// Its name, and whether it has no driver.
fn edu() -> Option<(String, bool)> {
    let devices = fs::read_dir(format!("{PCI}/devices")).ok()?;
    devices.flatten().find_map(|device| {
        let id = |what| fs::read_to_string(device.path().join(what)).unwrap_or_default();
        let found = id("vendor").trim() == EDU.0 && id("device").trim() == EDU.1;
        let driver = fs::read_link(device.path().join("driver")).ok();
        let ours = driver
            .as_ref()
            .is_none_or(|path| path.ends_with("vfio-pci"));
        (found && ours).then(|| (device.file_name().into_string().unwrap(), driver.is_none()))
    })
}

fn claim(name: &str) -> std::io::Result<()> {
    fs::write(format!("{PCI}/devices/{name}/driver_override"), "vfio-pci")?;
    fs::write(format!("{PCI}/drivers_probe"), name)
}

/// An address space of /dev/iommu.
pub struct Ioas {
    file: File,
    id: u32,
}

impl Ioas {
    /// One that the device is bound to, but not attached.
    fn bound(device: &Device) -> Self {
        let file = File::options().read(true).write(true).open("/dev/iommu");
        let file = file.unwrap();
        let mut bind = VfioBind {
            argsz: size_of::<VfioBind>() as u32,
            iommufd: file.as_raw_fd(),
            ..Default::default()
        };
        device.ioctl(VFIO_DEVICE_BIND_IOMMUFD, &mut bind).unwrap();
        let mut alloc = IoasAlloc {
            size: size_of::<IoasAlloc>() as u32,
            ..Default::default()
        };
        ioctl(file.as_raw_fd(), IOMMU_IOAS_ALLOC, &mut alloc).unwrap();
        Self {
            file,
            id: alloc.out_ioas_id,
        }
    }

    pub fn attached(device: &Device) -> Self {
        let ioas = Self::bound(device);
        device.attach(&ioas).unwrap();
        ioas
    }

    fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    pub fn map(&self, map: &Map, first: u64, count: u64) -> Result<(), i32> {
        let mut request = IoasMap {
            size: size_of::<IoasMap>() as u32,
            flags: MAP_FLAGS,
            ioas_id: self.id,
            user_va: map.page(first) as u64,
            length: count * PAGE,
            iova: IOVA + first * PAGE,
            ..Default::default()
        };
        ioctl(self.fd(), IOMMU_IOAS_MAP, &mut request).map(drop)
    }

    pub fn map_file(&self, gmem: &Gmem, first: u64, count: u64) -> Result<(), i32> {
        let mut request = IoasMapFile {
            size: size_of::<IoasMapFile>() as u32,
            flags: MAP_FLAGS,
            ioas_id: self.id,
            fd: gmem.fd(),
            start: first * PAGE,
            length: count * PAGE,
            iova: IOVA + first * PAGE,
        };
        ioctl(self.fd(), IOMMU_IOAS_MAP_FILE, &mut request).map(drop)
    }

    fn unmap(&self, first: u64, count: u64) -> Result<(), i32> {
        let mut request = IoasUnmap {
            size: size_of::<IoasUnmap>() as u32,
            ioas_id: self.id,
            iova: IOVA + first * PAGE,
            length: count * PAGE,
        };
        ioctl(self.fd(), IOMMU_IOAS_UNMAP, &mut request).map(drop)
    }

    /// What the kernel says of a copy of pages to where they are.
    fn copy_onto_itself(&self, first: u64, count: u64) -> i32 {
        let mut request = IoasCopy {
            size: size_of::<IoasCopy>() as u32,
            // FIXED_IOVA and READABLE
            flags: 1 | 4,
            dst_ioas_id: self.id,
            src_ioas_id: self.id,
            length: count * PAGE,
            dst_iova: IOVA + first * PAGE,
            src_iova: IOVA + first * PAGE,
        };
        ioctl(self.fd(), IOMMU_IOAS_COPY, &mut request).unwrap_err()
    }

    /// From now on areas can be cut by the VFIO type 1 interface. Before anything is mapped.
    fn allow_cuts(&self) {
        let mut option = IommuOption {
            size: size_of::<IommuOption>() as u32,
            option_id: 1,
            object_id: self.id,
            ..Default::default()
        };
        ioctl(self.fd(), IOMMU_OPTION, &mut option).unwrap();
        let mut set = VfioIoas {
            size: size_of::<VfioIoas>() as u32,
            ioas_id: self.id,
            op: 1,
            ..Default::default()
        };
        ioctl(self.fd(), IOMMU_VFIO_IOAS, &mut set).unwrap();
    }

    fn cut(&self, first: u64, count: u64) -> Result<(), i32> {
        let mut request = VfioUnmap {
            argsz: size_of::<VfioUnmap>() as u32,
            iova: IOVA + first * PAGE,
            size: count * PAGE,
            ..Default::default()
        };
        ioctl(self.fd(), VFIO_IOMMU_UNMAP_DMA, &mut request).map(drop)
    }
}

/// By address or by file: what follows is the same.
type Mapper = fn(&Ioas, &Gmem, &Map, u64, u64) -> Result<(), i32>;
const BY_ADDRESS: Mapper = |ioas, _, map, first, count| ioas.map(map, first, count);
const BY_FILE: Mapper = |ioas, gmem, _, first, count| ioas.map_file(gmem, first, count);

/// Whether this kernel has MAP_FILE for a guest_memfd; it tells once something is pinned. And whether it does what
/// mapping by address does: keeps pages from being converted, and takes no private ones. There is a public proposal
/// that does neither, and who uses it takes pages out before they convert, as the library does anyway.
fn takes_files(test: &str, ioas: &Ioas, gmem: &Gmem) -> Option<()> {
    match ioas.map_file(gmem, 0, 1) {
        Ok(()) => {}
        Err(libc::EINVAL | libc::EOPNOTSUPP) => {
            return skip(test, "this kernel maps no guest_memfd by its file")
        }
        Err(errno) => panic!("errno {errno}"),
    }
    let pinned = convert(gmem, 0, 1, PRIVATE);
    ioas.unmap(0, 1).unwrap();
    let loose = pinned == Converted::Yes && ioas.map_file(gmem, 0, 1) == Ok(());
    if loose {
        ioas.unmap(0, 1).unwrap();
    }
    convert_soon(gmem, 0, 1, SHARED);
    match (pinned, loose) {
        (Converted::Failed(libc::EAGAIN, 0), _) => Some(()),
        (Converted::Yes, true) => skip(
            test,
            "MAP_FILE of a guest_memfd is there, pins nothing, and takes private pages",
        ),
        (Converted::Yes, false) => skip(
            test,
            "MAP_FILE of a guest_memfd is there, and does not keep pages from being converted",
        ),
        (other, _) => panic!("a page that is mapped by file: {other:?}"),
    }
}

fn pins_are_respected(test: &str, mapper: Mapper, by_file: bool) {
    let (Some(vm), Some(device)) = (in_place(test), Device::new(test)) else {
        return;
    };
    let ioas = Ioas::attached(&device);
    let (gmem, map) = vm.mapped(PAGES, INIT_SHARED);
    if by_file && takes_files(test, &ioas, &gmem).is_none() {
        return;
    }
    (0..PAGES).for_each(|page| map.write(page, page as u8));
    mapper(&ioas, &gmem, &map, 5, 4).unwrap();
    mapper(&ioas, &gmem, &map, 12, 1).unwrap();
    assert_eq!(convert(&gmem, 0, PAGES, PRIVATE), busy(5 * PAGE));
    assert_eq!(convert(&gmem, 7, 6, PRIVATE), busy(7 * PAGE));
    assert_eq!(convert(&gmem, 9, 7, PRIVATE), busy(12 * PAGE));
    assert!((0..PAGES).all(|page| map.read(page) == page as u8));
    assert_eq!(convert(&gmem, 0, 5, PRIVATE), Converted::Yes);
    // Nobody's mapping matters, the device's does.
    ioas.unmap(5, 4).unwrap();
    assert_eq!(convert(&gmem, 0, 12, PRIVATE), Converted::Yes);
    ioas.unmap(12, 1).unwrap();
    assert_eq!(convert(&gmem, 0, PAGES, PRIVATE), Converted::Yes);
    assert_eq!(convert(&gmem, 0, PAGES, SHARED), Converted::Yes);
    for _ in 0..200 {
        mapper(&ioas, &gmem, &map, 0, PAGES).unwrap();
        ioas.unmap(0, PAGES).unwrap();
        assert_eq!(convert(&gmem, 0, PAGES, PRIVATE), Converted::Yes);
        assert_eq!(convert(&gmem, 0, PAGES, SHARED), Converted::Yes);
    }
}

#[test]
fn a_page_mapped_by_address_is_in_use() {
    let test = name_of(a_page_mapped_by_address_is_in_use);
    pins_are_respected(test, BY_ADDRESS, false);
}

#[test]
fn a_page_mapped_by_file_is_in_use() {
    let test = name_of(a_page_mapped_by_file_is_in_use);
    pins_are_respected(test, BY_FILE, true);
}

fn private_pages_are_refused(test: &str, mapper: Mapper, by_file: bool) {
    let (Some(vm), Some(device)) = (in_place(test), Device::new(test)) else {
        return;
    };
    let ioas = Ioas::attached(&device);
    // Long enough for several rounds of pinning in one request.
    let pages = 2048;
    let (gmem, map) = vm.mapped(pages, INIT_SHARED);
    if by_file && takes_files(test, &ioas, &gmem).is_none() {
        return;
    }
    for private in [0, 6, pages - 1] {
        assert_eq!(convert(&gmem, private, 1, PRIVATE), Converted::Yes);
        let all = mapper(&ioas, &gmem, &map, 0, pages);
        assert_eq!(all, Err(libc::EFAULT), "page {private}");
        // Not one pin is left: everything converts.
        convert_soon(&gmem, 0, pages, PRIVATE);
        assert_eq!(convert(&gmem, 0, pages, SHARED), Converted::Yes);
        // And the place in the address space is free.
        mapper(&ioas, &gmem, &map, 0, pages).unwrap();
        ioas.unmap(0, pages).unwrap();
    }
}

#[test]
fn nothing_is_mapped_by_address_over_a_private_page() {
    let test = name_of(nothing_is_mapped_by_address_over_a_private_page);
    private_pages_are_refused(test, BY_ADDRESS, false);
}

#[test]
fn nothing_is_mapped_by_file_over_a_private_page() {
    let test = name_of(nothing_is_mapped_by_file_over_a_private_page);
    private_pages_are_refused(test, BY_FILE, true);
}

fn nothing_is_pinned_before_attaching(test: &str, mapper: Mapper, by_file: bool) {
    let (Some(vm), Some(device)) = (in_place(test), Device::new(test)) else {
        return;
    };
    let ioas = Ioas::bound(&device);
    let (gmem, map) = vm.mapped(PAGES, INIT_SHARED);
    if by_file {
        device.attach(&ioas).unwrap();
        let takes = takes_files(test, &ioas, &gmem);
        device.detach();
        if takes.is_none() {
            return;
        }
    }
    mapper(&ioas, &gmem, &map, 0, PAGES).unwrap();
    assert_eq!(convert(&gmem, 0, PAGES, PRIVATE), Converted::Yes);
    assert_eq!(device.attach(&ioas), Err(libc::EFAULT));
    assert_eq!(convert(&gmem, 0, PAGES, SHARED), Converted::Yes);
    device.attach(&ioas).unwrap();
    assert_eq!(convert(&gmem, 0, PAGES, PRIVATE), busy(0));
    device.detach();
    convert_soon(&gmem, 0, PAGES, PRIVATE);
}

#[test]
fn an_address_space_without_device_pins_nothing() {
    let test = name_of(an_address_space_without_device_pins_nothing);
    nothing_is_pinned_before_attaching(test, BY_ADDRESS, false);
}

#[test]
fn an_address_space_without_device_pins_nothing_by_file() {
    let test = name_of(an_address_space_without_device_pins_nothing_by_file);
    nothing_is_pinned_before_attaching(test, BY_FILE, true);
}

/// Pages that are not there yet come into being, and the host sees the same ones.
#[test]
fn mapping_by_file_allocates() {
    let test = name_of(mapping_by_file_allocates);
    let (Some(vm), Some(device)) = (in_place(test), Device::new(test)) else {
        return;
    };
    let ioas = Ioas::attached(&device);
    let (gmem, map) = vm.mapped(PAGES, INIT_SHARED);
    if takes_files(test, &ioas, &gmem).is_none() {
        return;
    }
    ioas.map_file(&gmem, 0, PAGES).unwrap();
    assert!((0..PAGES).all(|page| map.read(page) == 0));
    // The host's page is the pinned one.
    assert_eq!(convert(&gmem, 0, PAGES, PRIVATE), busy(0));
    ioas.unmap(0, PAGES).unwrap();
    assert_eq!(convert(&gmem, 0, PAGES, PRIVATE), Converted::Yes);
    assert_eq!(convert(&gmem, 0, PAGES, SHARED), Converted::Yes);
    // Behind the end is nothing. Whether the host can map the file does not matter.
    assert_eq!(ioas.map_file(&gmem, 0, PAGES + 1), Err(libc::EINVAL));
    let unmapped = vm.gmem(PAGES * PAGE, INIT_SHARED).unwrap();
    ioas.map_file(&unmapped, 0, PAGES).unwrap();
    assert_eq!(convert(&unmapped, 3, 1, PRIVATE), busy(3 * PAGE));
}

const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";

/// Only what is shared of a huge page comes in pieces, and only pieces are pinned.
#[test]
fn pieces_of_huge_pages_are_mapped_by_file() {
    let test = name_of(pieces_of_huge_pages_are_mapped_by_file);
    const NR: u64 = 512;
    let (Some(vm), Some(device)) = (in_place(test), Device::new(test)) else {
        return;
    };
    let before = match fs::read_to_string(POOL) {
        Ok(before) => before,
        Err(error) => return skip(test, format_args!("{POOL}: {error}")).unwrap_or(()),
    };
    let more = before.trim().parse::<u64>().unwrap() + 2;
    fs::write(POOL, more.to_string()).unwrap();
    let ioas = Ioas::attached(&device);
    match vm.huge_gmem(2 * NR * PAGE) {
        Ok(gmem) => {
            if takes_files(test, &ioas, &vm.mapped(1, INIT_SHARED).0).is_some() {
                pin_pieces(&ioas, &gmem, NR);
            }
        }
        Err(errno) => {
            skip(test, format_args!("no file of huge pages: errno {errno}")).unwrap_or(())
        }
    }
    fs::write(POOL, before.trim()).unwrap();
}

fn pin_pieces(ioas: &Ioas, gmem: &Gmem, nr: u64) {
    assert_eq!(ioas.map_file(gmem, 0, 1), Err(libc::EFAULT));
    assert_eq!(convert(gmem, 3, 2, SHARED), Converted::Yes);
    assert_eq!(ioas.map_file(gmem, 2, 3), Err(libc::EFAULT));
    ioas.map_file(gmem, 3, 2).unwrap();
    assert_eq!(convert(gmem, 0, nr, PRIVATE), busy(3 * PAGE));
    // Another piece is not concerned.
    assert_eq!(convert(gmem, 5, 1, SHARED), Converted::Yes);
    assert_eq!(convert(gmem, 5, 1, PRIVATE), Converted::Yes);
    // The other huge page, all of it, which is not there yet.
    assert_eq!(convert(gmem, nr, nr, SHARED), Converted::Yes);
    ioas.map_file(gmem, nr, nr).unwrap();
    assert_eq!(convert(gmem, nr, nr, PRIVATE), busy(nr * PAGE));
    assert_eq!(gmem.punch(nr, nr), Err(libc::EAGAIN));
    ioas.unmap(nr, nr).unwrap();
    ioas.unmap(3, 2).unwrap();
    convert_soon(gmem, 0, 2 * nr, PRIVATE);
    gmem.punch(0, 2 * nr).unwrap();
}

fn cutting_lets_go_of_exactly_that(test: &str, mapper: Mapper, by_file: bool) {
    let (Some(vm), Some(device)) = (in_place(test), Device::new(test)) else {
        return;
    };
    let ioas = Ioas::bound(&device);
    ioas.allow_cuts();
    device.attach(&ioas).unwrap();
    let (gmem, map) = vm.mapped(PAGES, INIT_SHARED);
    if by_file && takes_files(test, &ioas, &gmem).is_none() {
        return;
    }
    mapper(&ioas, &gmem, &map, 0, PAGES).unwrap();
    assert_eq!(convert(&gmem, 6, 3, PRIVATE), busy(6 * PAGE));
    ioas.cut(6, 3).unwrap();
    assert_eq!(convert(&gmem, 6, 3, PRIVATE), Converted::Yes);
    assert_eq!(convert(&gmem, 5, 4, PRIVATE), busy(5 * PAGE));
    assert_eq!(convert(&gmem, 6, 4, PRIVATE), busy(9 * PAGE));
    assert_eq!(convert(&gmem, 6, 3, SHARED), Converted::Yes);
    mapper(&ioas, &gmem, &map, 6, 3).unwrap();
    assert_eq!(convert(&gmem, 6, 3, PRIVATE), busy(6 * PAGE));
    ioas.unmap(0, PAGES).unwrap();
    assert_eq!(convert(&gmem, 0, PAGES, PRIVATE), Converted::Yes);
}

#[test]
fn areas_by_address_can_be_cut() {
    let test = name_of(areas_by_address_can_be_cut);
    cutting_lets_go_of_exactly_that(test, BY_ADDRESS, false);
}

#[test]
fn areas_by_file_can_be_cut() {
    let test = name_of(areas_by_file_can_be_cut);
    cutting_lets_go_of_exactly_that(test, BY_FILE, true);
}

/// So whether an area is there can be asked without memory, and nothing changes: pins stay what they are, and
/// an area is one area.
#[test]
fn a_copy_to_where_it_is_tells_whether_an_area_is_there() {
    let test = name_of(a_copy_to_where_it_is_tells_whether_an_area_is_there);
    let (Some(vm), Some(device)) = (in_place(test), Device::new(test)) else {
        return;
    };
    let ioas = Ioas::bound(&device);
    ioas.allow_cuts();
    device.attach(&ioas).unwrap();
    let (gmem, map) = vm.mapped(PAGES, INIT_SHARED);
    assert_eq!(ioas.copy_onto_itself(0, 1), libc::ENOENT);
    ioas.map(&map, 0, PAGES).unwrap();
    for (first, count) in [(0, 1), (6, 3), (PAGES - 1, 1), (0, PAGES)] {
        assert_eq!(ioas.copy_onto_itself(first, count), libc::EEXIST);
    }
    // Not all of it is.
    assert_eq!(ioas.copy_onto_itself(PAGES - 1, 2), libc::ENOENT);
    assert_eq!(ioas.unmap(0, 1), Err(libc::ENOENT), "it is one area");
    ioas.cut(6, 3).unwrap();
    assert_eq!(ioas.copy_onto_itself(6, 1), libc::ENOENT);
    assert_eq!(ioas.copy_onto_itself(5, 1), libc::EEXIST);
    assert_eq!(ioas.copy_onto_itself(9, 1), libc::EEXIST);
    assert_eq!(convert(&gmem, 6, 3, PRIVATE), Converted::Yes);
    assert_eq!(convert(&gmem, 5, 4, PRIVATE), busy(5 * PAGE));
    ioas.unmap(0, PAGES).unwrap();
    assert_eq!(ioas.copy_onto_itself(0, 1), libc::ENOENT);
    assert_eq!(convert(&gmem, 0, PAGES, PRIVATE), Converted::Yes);
}

/// A pin of the file does not need the address any more, nor the file.
#[test]
fn pins_outlive_the_hosts_mapping() {
    let test = name_of(pins_outlive_the_hosts_mapping);
    let (Some(vm), Some(device)) = (in_place(test), Device::new(test)) else {
        return;
    };
    let ioas = Ioas::attached(&device);
    let (gmem, map) = vm.mapped(PAGES, INIT_SHARED);
    ioas.map(&map, 0, PAGES).unwrap();
    drop(map);
    assert_eq!(convert(&gmem, 0, PAGES, PRIVATE), busy(0));
    // All of iommufd goes at once, the device first.
    device.detach();
    let mut destroy = [8u32, ioas.id];
    ioctl(ioas.fd(), IOMMU_DESTROY, &mut destroy).unwrap();
    convert_soon(&gmem, 0, PAGES, PRIVATE);
}

#[test]
fn where_memory_is_split_no_guest_memfd_is_mapped_by_file() {
    let test = name_of(where_memory_is_split_no_guest_memfd_is_mapped_by_file);
    let (Some(_split), Some(device)) = (split(test), Device::new(test)) else {
        return;
    };
    let ioas = Ioas::attached(&device);
    // An ordinary VM's, which has no private page at all.
    let vm = crate::sys::Vm::new(crate::DEFAULT).unwrap();
    let gmem = vm.gmem(PAGES * PAGE, MMAP | INIT_SHARED).unwrap();
    assert_eq!(ioas.map_file(&gmem, 0, PAGES), Err(libc::EINVAL));
}

/// Two holders: the first to go is not the last.
#[test]
fn each_pin_counts() {
    let test = name_of(each_pin_counts);
    let (Some(vm), Some(device)) = (in_place(test), Device::new(test)) else {
        return;
    };
    let Ok(ring) = Ring::new() else {
        return skip(test, format_args!("io_uring: errno {}", errno())).unwrap_or(());
    };
    let ioas = Ioas::attached(&device);
    let (gmem, map) = vm.mapped(PAGES, INIT_SHARED);
    ioas.map(&map, 0, PAGES).unwrap();
    ring.register(&[map.iovec(9)]).unwrap();
    ioas.unmap(0, PAGES).unwrap();
    assert_eq!(convert(&gmem, 0, PAGES, PRIVATE), busy(9 * PAGE));
    ring.unregister().unwrap();
    convert_soon(&gmem, 0, PAGES, PRIVATE);
}

/// The number, which nothing above would notice if it were another's.
#[test]
fn map_file_is_iommufds() {
    let Ok(iommu) = File::options().read(true).write(true).open("/dev/iommu") else {
        skip::<()>(name_of(map_file_is_iommufds), "no /dev/iommu");
        return;
    };
    let none = ioctl_number(iommu.as_raw_fd(), IOMMU_IOAS_MAP_FILE, 8);
    assert_eq!(none, Err(libc::EFAULT));
}
