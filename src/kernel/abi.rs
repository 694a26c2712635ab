// SPDX-License-Identifier: MIT OR Apache-2.0
//! Numbers and structures of the kernel's ABI, as in the UAPI headers of Linux 7.3.
//!
//! Kept to what is used. `tests/kernel_headers.rs` holds every line of this file against the headers
//! that are installed.

#![allow(missing_docs)]

use libc::{c_int, c_ulong};

pub const KVM_GET_API_VERSION: c_ulong = 0xae00;
pub const KVM_CHECK_EXTENSION: c_ulong = 0xae03;
pub const KVM_SET_MEMORY_ATTRIBUTES: c_ulong = 0x4020_aed2;
pub const KVM_CREATE_GUEST_MEMFD: c_ulong = 0xc040_aed4;

pub const KVM_CAP_USER_MEMORY2: c_int = 231;
pub const KVM_CAP_MEMORY_ATTRIBUTES: c_int = 233;
pub const KVM_CAP_GUEST_MEMFD: c_int = 234;
pub const KVM_CAP_GUEST_MEMFD_FLAGS: c_int = 244;

pub const KVM_MEMORY_ATTRIBUTE_PRIVATE: u64 = 1 << 3;
pub const GUEST_MEMFD_FLAG_MMAP: u64 = 1 << 0;
pub const GUEST_MEMFD_FLAG_INIT_SHARED: u64 = 1 << 1;

/// `struct kvm_memory_attributes`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct KvmMemoryAttributes {
    pub address: u64,
    pub size: u64,
    pub attributes: u64,
    pub flags: u64,
}

/// `struct kvm_create_guest_memfd`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct KvmCreateGuestMemfd {
    pub size: u64,
    pub flags: u64,
    pub reserved: [u64; 6],
}

pub const IOMMU_IOAS_COPY: c_ulong = 0x3b83;
pub const IOMMU_IOAS_MAP: c_ulong = 0x3b85;
pub const IOMMU_IOAS_UNMAP: c_ulong = 0x3b86;
pub const IOMMU_OPTION: c_ulong = 0x3b87;
pub const IOMMU_VFIO_IOAS: c_ulong = 0x3b88;
pub const IOMMU_IOAS_MAP_FILE: c_ulong = 0x3b8f;
pub const VFIO_IOMMU_UNMAP_DMA: c_ulong = 0x3b72;

pub const IOMMU_OPTION_HUGE_PAGES: u32 = 1;
pub const IOMMU_OPTION_OP_SET: u16 = 0;
pub const IOMMU_OPTION_OP_GET: u16 = 1;
pub const IOMMU_VFIO_IOAS_SET: u16 = 1;
pub const KCMP_FILE: c_int = 0;

pub const IOMMU_IOAS_MAP_FIXED_IOVA: u32 = 1 << 0;
pub const IOMMU_IOAS_MAP_WRITEABLE: u32 = 1 << 1;
pub const IOMMU_IOAS_MAP_READABLE: u32 = 1 << 2;

/// `struct iommu_ioas_copy`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct IommuIoasCopy {
    pub size: u32,
    pub flags: u32,
    pub dst_ioas_id: u32,
    pub src_ioas_id: u32,
    pub length: u64,
    pub dst_iova: u64,
    pub src_iova: u64,
}

/// `struct iommu_ioas_map`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct IommuIoasMap {
    pub size: u32,
    pub flags: u32,
    pub ioas_id: u32,
    pub reserved: u32,
    pub user_va: u64,
    pub length: u64,
    pub iova: u64,
}

/// `struct iommu_ioas_map_file`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct IommuIoasMapFile {
    pub size: u32,
    pub flags: u32,
    pub ioas_id: u32,
    pub fd: i32,
    pub start: u64,
    pub length: u64,
    pub iova: u64,
}

/// `struct iommu_ioas_unmap`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct IommuIoasUnmap {
    pub size: u32,
    pub ioas_id: u32,
    pub iova: u64,
    pub length: u64,
}

/// `struct iommu_option`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct IommuOption {
    pub size: u32,
    pub option_id: u32,
    pub op: u16,
    pub reserved: u16,
    pub object_id: u32,
    pub val64: u64,
}

/// `struct iommu_vfio_ioas`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct IommuVfioIoas {
    pub size: u32,
    pub ioas_id: u32,
    pub op: u16,
    pub reserved: u16,
}

/// `struct vfio_iommu_type1_dma_unmap`, without the data that follows it for a flag not used here.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct VfioIommuType1DmaUnmap {
    pub argsz: u32,
    pub flags: u32,
    pub iova: u64,
    pub size: u64,
}
