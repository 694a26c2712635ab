// SPDX-License-Identifier: MIT OR Apache-2.0
//! DMA windows on the real iommufd, as far as they can be tested without a device: the kernel keeps
//! its areas, and pins nothing.

use crate::common::skipped;
use crate::kvm::Machine;
use crate::name_of;
use gmem::kernel::linux::Linux;
use gmem::kernel::{Ioas, Kernel};
use gmem::{
    prepare_ioas, Attribute, Block, BlockConfig, DmaPath, DmaSplit, Iova, Span, StrategyKind,
    WindowConfig,
};
use libc::c_ulong;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

const PAGE: u64 = 4096;
const MIB: u64 = 1 << 20;
const IOVA: u64 = 0x1000_0000;

const IOMMU_IOAS_ALLOC: c_ulong = 0x3b81;
const IOMMU_IOAS_MAP: c_ulong = 0x3b85;
const IOMMU_IOAS_UNMAP: c_ulong = 0x3b86;
/// IOMMU_IOAS_MAP_FIXED_IOVA | IOMMU_IOAS_MAP_READABLE
const FIXED_AND_READABLE: u32 = 1 | 4;

/// `struct iommu_ioas_alloc`.
#[repr(C)]
struct IoasAlloc {
    size: u32,
    flags: u32,
    out_ioas_id: u32,
}

/// `struct iommu_ioas_map`.
#[repr(C)]
struct IoasMap {
    size: u32,
    flags: u32,
    ioas_id: u32,
    reserved: u32,
    user_va: u64,
    length: u64,
    iova: u64,
}

/// `struct iommu_ioas_unmap`.
#[repr(C)]
struct IoasUnmap {
    size: u32,
    ioas_id: u32,
    iova: u64,
    length: u64,
}

/// An open /dev/iommu with one IOAS.
struct Iommu {
    file: File,
    ioas_id: u32,
}

/// Memory that has its page to itself.
#[repr(align(4096))]
struct Page(#[allow(dead_code)] [u8; PAGE as usize]);
static NOBODYS: Page = Page([0; PAGE as usize]);

impl Iommu {
    /// Another IOAS of the same context.
    fn sibling(&self) -> Self {
        Self::with_file(self.file.try_clone().unwrap())
    }

    fn new(test: &str) -> Option<Self> {
        let file = match File::options().read(true).write(true).open("/dev/iommu") {
            Ok(file) => file,
            Err(error) => {
                skipped(test, format_args!("/dev/iommu: {error}"));
                return None;
            }
        };
        Some(Self::with_file(file))
    }

    fn with_file(file: File) -> Self {
        let mut alloc = IoasAlloc {
            size: size_of::<IoasAlloc>() as u32,
            flags: 0,
            out_ioas_id: 0,
        };
        // SAFETY: the structure that this request takes.
        let result = unsafe { libc::ioctl(file.as_raw_fd(), IOMMU_IOAS_ALLOC, &raw mut alloc) };
        assert_eq!(result, 0, "{}", io::Error::last_os_error());
        Self {
            file,
            ioas_id: alloc.out_ioas_id,
        }
    }

    /// Whether the kernel maps the page at `iova`: it won't map anything else there then, and says the same
    /// when it is asked, which changes nothing.
    fn maps(&self, iova: u64) -> bool {
        let ioas = Ioas {
            iommufd: self.file.as_fd(),
            id: self.ioas_id,
        };
        let page = Span::new(Iova(iova), PAGE).unwrap();
        let asked = Linux.dma_is_mapped(ioas, page).unwrap();
        let maps = self.keeps_others_out(iova);
        assert_eq!(asked, maps, "{page}");
        maps
    }

    fn keeps_others_out(&self, iova: u64) -> bool {
        let mut map = IoasMap {
            size: size_of::<IoasMap>() as u32,
            flags: FIXED_AND_READABLE,
            ioas_id: self.ioas_id,
            reserved: 0,
            user_va: &raw const NOBODYS as u64,
            length: PAGE,
            iova,
        };
        // SAFETY: the structure that this request takes; the page is as old as the program.
        let result = unsafe { libc::ioctl(self.file.as_raw_fd(), IOMMU_IOAS_MAP, &raw mut map) };
        let error = io::Error::last_os_error();
        if result == 0 {
            assert!(self.takes_out(iova, PAGE));
            return false;
        }
        assert_eq!(error.raw_os_error(), Some(libc::EEXIST), "{error}");
        true
    }

    fn window(&self, offset: u64, length: u64) -> WindowConfig {
        WindowConfig {
            ioas_id: self.ioas_id,
            offset,
            length,
            iova: IOVA,
            readonly: false,
        }
    }

    /// Whether the kernel has an area of exactly this place. It is gone afterwards.
    fn takes_out(&self, iova: u64, length: u64) -> bool {
        let mut unmap = IoasUnmap {
            size: size_of::<IoasUnmap>() as u32,
            ioas_id: self.ioas_id,
            iova,
            length,
        };
        // SAFETY: the structure that this request takes.
        let result =
            unsafe { libc::ioctl(self.file.as_raw_fd(), IOMMU_IOAS_UNMAP, &raw mut unmap) };
        let error = io::Error::last_os_error();
        assert!(
            result == 0 || error.raw_os_error() == Some(libc::ENOENT),
            "{error}"
        );
        result == 0
    }
}

#[test]
fn an_ordinary_window_is_one_area() {
    let test = name_of(an_ordinary_window_is_one_area);
    let (Some(machine), Some(iommu)) = (Machine::ordinary(test), Iommu::new(test)) else {
        return;
    };
    let block = Block::new(&machine.vm, &BlockConfig::new("ram", 4 * MIB)).unwrap();
    let window = block
        .add_window(&iommu.file, &iommu.window(MIB, 2 * MIB))
        .unwrap();
    let stats = block.stats();
    assert_eq!(block.strategy(), Some(StrategyKind::Whole));
    assert_eq!((stats.windows, stats.dma_areas), (1, 1));
    assert_eq!(stats.bytes_dma_mapped, 2 * MIB);
    assert_ne!(block.dma_path(), DmaPath::Auto);

    let error = block
        .add_window(&iommu.file, &iommu.window(0, MIB))
        .unwrap_err();
    assert_eq!(error.errno(), libc::EEXIST, "{error}");
    let mut nowhere = iommu.window(0, MIB);
    nowhere.ioas_id = 0x7fff_ffff;
    let error = block.add_window(&iommu.file, &nowhere).unwrap_err();
    assert_eq!(error.errno(), libc::ENOENT, "{error}");
    assert_eq!(block.stats().windows, 1);
    assert!(block.check_unused().is_err());

    window.remove().unwrap();
    assert_eq!(window.remove().unwrap_err().errno(), libc::EINVAL);
    assert!(
        !iommu.takes_out(IOVA, 2 * MIB),
        "an area outlived its window"
    );
    block.check_unused().unwrap();

    // The same place by address.
    let config = BlockConfig {
        dma: DmaPath::Address,
        ..BlockConfig::new("other", 4 * MIB)
    };
    let other = Block::new(&machine.vm, &config).unwrap();
    let _window = other
        .add_window(&iommu.file, &iommu.window(0, 4 * MIB))
        .unwrap();
    assert_eq!(other.dma_path(), DmaPath::Address);
    assert_eq!(
        (
            other.stats().map_address_calls,
            other.stats().map_file_calls
        ),
        (1, 0)
    );
    assert!(iommu.takes_out(IOVA, 4 * MIB));
}

#[test]
fn the_callers_iommufd_may_go() {
    let test = name_of(the_callers_iommufd_may_go);
    let (Some(machine), Some(iommu)) = (Machine::ordinary(test), Iommu::new(test)) else {
        return;
    };
    let block = Block::new(&machine.vm, &BlockConfig::new("ram", MIB)).unwrap();
    let window = block
        .add_window(&iommu.file, &iommu.window(0, MIB))
        .unwrap();
    drop(iommu);
    window.remove().unwrap();
}

#[test]
fn a_private_page_has_no_area() {
    let test = name_of(a_private_page_has_no_area);
    let Some(machine) = Machine::private(test) else {
        return;
    };
    let Some(iommu) = Iommu::new(test) else {
        return;
    };
    let config = BlockConfig {
        dma_split: DmaSplit::Page,
        release_delay: Duration::ZERO,
        ..BlockConfig::confidential("ram", MIB, Attribute::Shared)
    };
    let block = Block::new(&machine.vm, &config).unwrap();
    let slot = block.memslot(0).unwrap();
    machine.add_slot(0, 0, MIB, &slot).unwrap();
    block.bind(0, MIB, 0).unwrap().keep();
    machine.vm.convert(0, 2 * PAGE, Attribute::Private).unwrap();
    let pages = MIB / PAGE;
    let _window = block
        .add_window(&iommu.file, &iommu.window(0, MIB))
        .unwrap();
    assert_eq!(block.strategy(), Some(StrategyKind::Page));
    assert_eq!(block.dma_path(), DmaPath::Fd);
    assert_eq!(block.stats().dma_areas, pages - 2);

    machine
        .vm
        .convert(8 * PAGE, PAGE, Attribute::Private)
        .unwrap();
    assert_eq!(block.stats().dma_areas, pages - 3);
    assert_eq!(block.stats().bytes_dma_mapped, MIB - 3 * PAGE);
    machine.vm.convert(0, PAGE, Attribute::Shared).unwrap();
    machine.vm.convert(0, PAGE, Attribute::Shared).unwrap();
    assert_eq!(block.stats().dma_areas, pages - 2);

    // What the kernel has, page by page.
    for page in 0..pages {
        let there = iommu.takes_out(IOVA + page * PAGE, PAGE);
        assert_eq!(there, ![1, 8].contains(&page), "page {page}");
    }
}

/// A block of 256 pages in windows of two IOASes of one context, mapped as `split` says.
fn converts_as_the_kernel_sees_it(test: &str, split: DmaSplit, kind: StrategyKind) {
    const PAGES: u64 = 256;
    const THREADS: u64 = 4;
    let Some(machine) = Machine::private(test) else {
        return;
    };
    let Some(iommu) = Iommu::new(test) else {
        return;
    };
    let iommus = [iommu.sibling(), iommu];
    for iommu in &iommus {
        prepare_ioas(&iommu.file, iommu.ioas_id).unwrap();
    }
    let config = BlockConfig {
        dma_split: split,
        release_delay: Duration::ZERO,
        ..BlockConfig::confidential("ram", PAGES * PAGE, Attribute::Shared)
    };
    let block = Block::new(&machine.vm, &config).unwrap();
    let slot = block.memslot(0).unwrap();
    machine.add_slot(0, 0, PAGES * PAGE, &slot).unwrap();
    block.bind(0, PAGES * PAGE, 0).unwrap().keep();
    let windows = iommus.each_ref().map(|iommu| {
        block
            .add_window(&iommu.file, &iommu.window(0, PAGES * PAGE))
            .unwrap()
    });
    assert!(windows.iter().all(|window| window.strategy() == kind));

    for round in 0..8 {
        std::thread::scope(|scope| {
            for thread in 0..THREADS {
                let vm = &machine.vm;
                scope.spawn(move || {
                    let mut random = 1 + round * THREADS + thread;
                    for _ in 0..40 {
                        // Numerical Recipes' generator: any will do.
                        random = random.wrapping_mul(1664525).wrapping_add(1013904223);
                        let bits = random >> 8;
                        // Every fourth page is this thread's, so that threads meet in every area; now and
                        // then a range of everyone's.
                        let (page, pages) = match bits % 8 {
                            0 => (bits / 8 % 240, 1 + bits / 4096 % 16),
                            _ => (bits / 8 % 64 * THREADS + thread, 1),
                        };
                        let attribute = match bits / 65536 % 2 {
                            0 => Attribute::Private,
                            _ => Attribute::Shared,
                        };
                        vm.convert(page * PAGE, pages * PAGE, attribute).unwrap();
                    }
                });
            }
        });
        for page in 0..PAGES {
            let shared = block.run_at(page * PAGE).unwrap().0 == Attribute::Shared;
            for iommu in &iommus {
                let mapped = iommu.maps(IOVA + page * PAGE);
                assert_eq!(mapped, shared, "round {round}, page {page}");
            }
        }
    }
    let stats = block.stats();
    assert_eq!(stats.bytes_dma_mapped, 2 * stats.bytes_shared);
    assert_eq!(stats.quarantines, 0);
    assert_eq!(stats.cut_calls != 0, kind == StrategyKind::Cut);
    assert_eq!(stats.remap_windows != 0, kind != StrategyKind::Cut);
    for window in &windows {
        window.remove().unwrap();
    }
    for iommu in &iommus {
        assert!((0..PAGES).all(|page| !iommu.maps(IOVA + page * PAGE)));
    }
}

#[test]
fn what_is_cut_out_of_an_area_is_out_and_nothing_else() {
    let test = name_of(what_is_cut_out_of_an_area_is_out_and_nothing_else);
    converts_as_the_kernel_sees_it(test, DmaSplit::Cut, StrategyKind::Cut);
}

#[test]
fn what_leaves_a_unit_is_out_and_nothing_else() {
    let test = name_of(what_leaves_a_unit_is_out_and_nothing_else);
    let unit = 16 * PAGE;
    converts_as_the_kernel_sees_it(test, DmaSplit::Unit(unit), StrategyKind::Unit(unit));
}

#[test]
fn an_ioas_with_huge_mappings_is_not_cut() {
    let test = name_of(an_ioas_with_huge_mappings_is_not_cut);
    let (Some(machine), Some(iommu)) = (Machine::private(test), Iommu::new(test)) else {
        return;
    };
    let config = BlockConfig {
        dma_split: DmaSplit::Cut,
        release_delay: Duration::ZERO,
        ..BlockConfig::confidential("ram", MIB, Attribute::Shared)
    };
    let block = Block::new(&machine.vm, &config).unwrap();
    let error = block
        .add_window(&iommu.file, &iommu.window(0, MIB))
        .unwrap_err();
    assert_eq!(error.errno(), libc::ENOTSUP, "{error}");
    assert!(!iommu.maps(IOVA));
    prepare_ioas(&iommu.file, iommu.ioas_id).unwrap();
    let window = block
        .add_window(&iommu.file, &iommu.window(0, MIB))
        .unwrap();
    assert_eq!(window.strategy(), StrategyKind::Cut);
}
