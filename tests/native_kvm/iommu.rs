// SPDX-License-Identifier: MIT OR Apache-2.0
//! DMA windows on the real iommufd, as far as they can be tested without a device: the kernel keeps
//! its areas, and pins nothing.

use crate::common::skipped;
use crate::kvm::Machine;
use crate::name_of;
use gmem::{Attribute, Block, BlockConfig, DmaPath, StrategyKind, WindowConfig};
use libc::c_ulong;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

const PAGE: u64 = 4096;
const MIB: u64 = 1 << 20;
const IOVA: u64 = 0x1000_0000;

const IOMMU_IOAS_ALLOC: c_ulong = 0x3b81;
const IOMMU_IOAS_UNMAP: c_ulong = 0x3b86;

/// `struct iommu_ioas_alloc`.
#[repr(C)]
struct IoasAlloc {
    size: u32,
    flags: u32,
    out_ioas_id: u32,
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

impl Iommu {
    fn new(test: &str) -> Option<Self> {
        let file = match File::options().read(true).write(true).open("/dev/iommu") {
            Ok(file) => file,
            Err(error) => {
                skipped(test, format_args!("/dev/iommu: {error}"));
                return None;
            }
        };
        let mut alloc = IoasAlloc {
            size: size_of::<IoasAlloc>() as u32,
            flags: 0,
            out_ioas_id: 0,
        };
        // SAFETY: the structure that this request takes.
        let result = unsafe { libc::ioctl(file.as_raw_fd(), IOMMU_IOAS_ALLOC, &raw mut alloc) };
        assert_eq!(result, 0, "{}", io::Error::last_os_error());
        Some(Self {
            file,
            ioas_id: alloc.out_ioas_id,
        })
    }

    fn window(&self, offset: u64, length: u64) -> WindowConfig {
        WindowConfig {
            iommufd: self.file.as_raw_fd(),
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
    let window = block.add_window(&iommu.window(MIB, 2 * MIB)).unwrap();
    let stats = block.stats();
    assert_eq!(block.strategy(), Some(StrategyKind::Whole));
    assert_eq!((stats.windows, stats.dma_areas), (1, 1));
    assert_eq!(stats.bytes_dma_mapped, 2 * MIB);
    assert_ne!(block.dma_path(), DmaPath::Auto);

    let error = block.add_window(&iommu.window(0, MIB)).unwrap_err();
    assert_eq!(error.errno(), libc::EEXIST, "{error}");
    let mut nowhere = iommu.window(0, MIB);
    nowhere.ioas_id = 0x7fff_ffff;
    let error = block.add_window(&nowhere).unwrap_err();
    assert_eq!(error.errno(), libc::ENOENT, "{error}");
    assert_eq!(block.stats().windows, 1);
    assert!(block.check_unused().is_err());

    block.remove_window(&window).unwrap();
    assert_eq!(
        block.remove_window(&window).unwrap_err().errno(),
        libc::EINVAL
    );
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
    let _window = other.add_window(&iommu.window(0, 4 * MIB)).unwrap();
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
    let window = block.add_window(&iommu.window(0, MIB)).unwrap();
    drop(iommu);
    block.remove_window(&window).unwrap();
}

#[test]
fn a_private_page_has_no_area() {
    let test = name_of(a_private_page_has_no_area);
    let Some(machine) = Machine::confidential(test) else {
        return;
    };
    let Some(iommu) = Iommu::new(test) else {
        return;
    };
    let config = BlockConfig::confidential("ram", MIB, Attribute::Shared);
    let block = Block::new(&machine.vm, &config).unwrap();
    let slot = block.memslot(0).unwrap();
    machine.add_slot(0, 0, MIB, &slot).unwrap();
    block.bind(0, MIB, 0).unwrap();
    machine.vm.convert(0, 2 * PAGE, Attribute::Private).unwrap();
    let pages = MIB / PAGE;
    let _window = block.add_window(&iommu.window(0, MIB)).unwrap();
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
