// SPDX-License-Identifier: MIT OR Apache-2.0
//! An iommufd that we share with QEMU: whoever has the descriptor can put mappings of his own among QEMU's.

use crate::failure::{Attempt, Failure};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, RawFd};

const IOMMU_IOAS_ALLOC: libc::c_ulong = 0x3b81;
const IOMMU_VFIO_IOAS: libc::c_ulong = 0x3b88;
const SET: u16 = 1;
const IOMMU_IOAS_MAP: libc::c_ulong = 0x3b85;
const IOMMU_IOAS_UNMAP: libc::c_ulong = 0x3b86;
const FIXED_READ_WRITE: u32 = 7;

/// struct iommu_ioas_map (linux/iommufd.h).
#[repr(C)]
struct Map {
    size: u32,
    flags: u32,
    ioas_id: u32,
    reserved: u32,
    user_va: u64,
    length: u64,
    iova: u64,
}

/// struct iommu_ioas_unmap.
#[repr(C)]
struct Unmap {
    size: u32,
    ioas_id: u32,
    iova: u64,
    length: u64,
}

/// struct iommu_ioas_alloc.
#[repr(C)]
struct Alloc {
    size: u32,
    flags: u32,
    out_ioas_id: u32,
}

/// struct iommu_vfio_ioas.
#[repr(C)]
struct VfioIoas {
    size: u32,
    ioas_id: u32,
    op: u16,
    reserved: u16,
}

/// One context.
pub struct Iommufd(File);

impl Iommufd {
    pub fn open() -> Result<Self, Failure> {
        OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/iommu")
            .map(Self)
            .attempt(|| "opening /dev/iommu".into())
    }

    pub fn descriptor(&self) -> RawFd {
        self.0.as_raw_fd()
    }

    /// A new IOAS beside QEMU's; its id.
    pub fn allocate(&self) -> io::Result<u32> {
        let mut allocated = Alloc {
            size: size_of::<Alloc>() as u32,
            flags: 0,
            out_ioas_id: 0,
        };
        // SAFETY: the structure is what this ioctl reads and writes and outlives the call.
        match unsafe { libc::ioctl(self.0.as_raw_fd(), IOMMU_IOAS_ALLOC, &mut allocated) } {
            0 => Ok(allocated.out_ioas_id),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Makes it the IOAS that VFIO's own calls, and so QEMU's cuts, apply to.
    pub fn point_at(&self, ioas_id: u32) -> io::Result<()> {
        let set = VfioIoas {
            size: size_of::<VfioIoas>() as u32,
            ioas_id,
            op: SET,
            reserved: 0,
        };
        // SAFETY: the structure is what this ioctl reads and outlives the call.
        match unsafe { libc::ioctl(self.0.as_raw_fd(), IOMMU_VFIO_IOAS, &set) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Shows a page of ours at `iova` in an IOAS, QEMU's too.
    pub fn map(&self, ioas_id: u32, iova: u64, page: &Page) -> io::Result<()> {
        self.map_address(ioas_id, iova, page.0 as u64)
    }

    /// As `map`, for the page at an address of this process.
    pub fn map_address(&self, ioas_id: u32, iova: u64, address: u64) -> io::Result<()> {
        let map = Map {
            size: size_of::<Map>() as u32,
            flags: FIXED_READ_WRITE,
            ioas_id,
            reserved: 0,
            user_va: address,
            length: PAGE_BYTES as u64,
            iova,
        };
        // SAFETY: the structure is what this ioctl reads and outlives the call; the kernel pins the page by itself.
        match unsafe { libc::ioctl(self.0.as_raw_fd(), IOMMU_IOAS_MAP, &map) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Unmaps whole areas, whoever made them.
    pub fn unmap(&self, ioas_id: u32, iova: u64, length: u64) -> io::Result<()> {
        let unmap = Unmap {
            size: size_of::<Unmap>() as u32,
            ioas_id,
            iova,
            length,
        };
        // SAFETY: as in map.
        match unsafe { libc::ioctl(self.0.as_raw_fd(), IOMMU_IOAS_UNMAP, &unmap) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// The id of the one IOAS that has something mapped at `iova`: ids are small numbers, and a second mapping at the
    /// same place is refused in that one and in no other.
    pub fn ioas_with(&self, iova: u64, page: &Page) -> Result<u32, Failure> {
        for id in 1..64 {
            match self.map(id, iova, page) {
                Err(error) if error.raw_os_error() == Some(libc::EEXIST) => return Ok(id),
                Err(_) => {}
                Ok(()) => self
                    .unmap(id, iova, PAGE_BYTES as u64)
                    .attempt(|| format!("unmapping a page again in IOAS {id}"))?,
            }
        }
        Err(Failure::new(format!(
            "no IOAS of QEMU's iommufd has {iova:#x} mapped"
        )))
    }
}

const PAGE_BYTES: usize = 4096;

/// A page of our own memory.
pub struct Page(*mut libc::c_void);

impl Page {
    pub fn new() -> Result<Self, Failure> {
        // SAFETY: a new mapping, wherever the kernel likes.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                PAGE_BYTES,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        match address {
            libc::MAP_FAILED => Err(io::Error::last_os_error()).attempt(|| "mapping a page".into()),
            address => Ok(Self(address)),
        }
    }
}

impl Page {
    /// What it holds now. A device may write to it at any time, so each word is loaded by itself.
    pub fn words(&self) -> Vec<u64> {
        let words = self.0.cast::<u64>();
        (0..PAGE_BYTES / 8)
            // SAFETY: inside the mapping, which is readable and aligned for words.
            .map(|index| unsafe { words.add(index).read_volatile() })
            .collect()
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        // SAFETY: this very mapping, of which no reference is given out.
        unsafe { libc::munmap(self.0, PAGE_BYTES) };
    }
}
