// SPDX-License-Identifier: MIT OR Apache-2.0
//! A kernel that says yes and keeps nothing: what a conversion costs on it is what the library
//! itself costs.

use super::abi::*;
use super::linux::Linux;
use super::{
    CallError, CallResult, DeviceAccess, Ioas, Kernel, Mapping, NumaPolicy, Outsider, Stopped,
};
use crate::attributes::Attribute;
use crate::units::{Gpa, Iova, Offset, Span, PAGE_SIZE};
use std::os::fd::{BorrowedFd, OwnedFd, RawFd};

/// The kernel of benchmarks. Its VMs are confidential; files and mappings are real but never touched, so
/// that a block may be far larger than the machine.
#[derive(Debug, Default)]
pub struct NullKernel;

impl Kernel for NullKernel {
    fn duplicate(&self, fd: RawFd) -> CallResult<OwnedFd> {
        Linux.duplicate(fd)
    }

    fn is_vm(&self, _fd: BorrowedFd) -> bool {
        true
    }

    fn check_extension(&self, _vm: BorrowedFd, capability: i32) -> CallResult<i32> {
        Ok(match capability {
            KVM_CAP_USER_MEMORY2 | KVM_CAP_GUEST_MEMFD => 1,
            KVM_CAP_GUEST_MEMFD_FLAGS => GUEST_MEMFD_FLAG_MMAP as i32,
            KVM_CAP_MEMORY_ATTRIBUTES => KVM_MEMORY_ATTRIBUTE_PRIVATE as i32,
            _ => 0,
        })
    }

    fn create_guest_memfd(
        &self,
        _vm: BorrowedFd,
        size: u64,
        _flags: u64,
        _page_order: u8,
    ) -> CallResult<OwnedFd> {
        Linux.create_memfd("null guest_memfd", size)
    }

    fn set_memory_attributes(
        &self,
        _vm: BorrowedFd,
        _span: Span<Gpa>,
        _attribute: Attribute,
    ) -> CallResult<()> {
        Ok(())
    }

    fn convert_in_place(
        &self,
        _file: BorrowedFd,
        _span: Span<Offset>,
        _attribute: Attribute,
    ) -> Result<(), Stopped> {
        Err(Stopped {
            call: CallError {
                call: "KVM_SET_MEMORY_ATTRIBUTES2",
                errno: libc::ENOTTY,
            },
            at: None,
        })
    }

    fn create_memfd(&self, name: &str, size: u64) -> CallResult<OwnedFd> {
        Linux.create_memfd(name, size)
    }

    fn create_huge_memfd(&self, name: &str, size: u64, _page: u64) -> CallResult<OwnedFd> {
        Linux.create_memfd(name, size)
    }

    fn map(&self, file: BorrowedFd, size: u64, alignment: u64) -> CallResult<Mapping> {
        Linux.map(file, size, alignment)
    }

    fn hide(&self, _mapping: &Mapping) -> CallResult<()> {
        Ok(())
    }

    fn map_over(&self, _mapping: &Mapping, _file: BorrowedFd) -> CallResult<()> {
        Ok(())
    }

    fn replace(&self, number: BorrowedFd, by: BorrowedFd) -> CallResult<()> {
        Linux.replace(number, by)
    }

    fn set_mapping_policy(&self, _mapping: &Mapping, _policy: &NumaPolicy) -> CallResult<()> {
        Ok(())
    }

    fn set_thread_policy(&self, _policy: &NumaPolicy) -> CallResult<()> {
        Ok(())
    }

    fn allocate(&self, _file: BorrowedFd, _span: Span<Offset>) -> CallResult<()> {
        Ok(())
    }

    fn punch_hole(&self, _file: BorrowedFd, _span: Span<Offset>) -> CallResult<()> {
        Ok(())
    }

    fn page_size(&self, _file: BorrowedFd) -> CallResult<u64> {
        Ok(PAGE_SIZE)
    }

    fn write_page(&self, _file: BorrowedFd) -> CallResult<()> {
        Ok(())
    }

    fn refer(&self, _mapping: &Mapping) -> CallResult<()> {
        Ok(())
    }

    fn populate(&self, _mapping: &Mapping, _span: Span<Offset>) -> CallResult<()> {
        Ok(())
    }

    fn dma_map_file(
        &self,
        _ioas: Ioas,
        _file: BorrowedFd,
        _span: Span<Offset>,
        _iova: Iova,
        _access: DeviceAccess,
    ) -> CallResult<()> {
        Ok(())
    }

    fn dma_map_address(
        &self,
        _ioas: Ioas,
        _mapping: &Mapping,
        _span: Span<Offset>,
        _iova: Iova,
        _access: DeviceAccess,
    ) -> CallResult<()> {
        Ok(())
    }

    fn dma_unmap(&self, _ioas: Ioas, _span: Span<Iova>) -> CallResult<()> {
        Ok(())
    }

    fn dma_is_mapped(&self, _ioas: Ioas, _span: Span<Iova>) -> CallResult<bool> {
        // It is asked after what it has unmapped.
        Ok(false)
    }

    fn forget_mapped(&self, _mapping: &Mapping, _span: Span<Offset>) -> CallResult<()> {
        Ok(())
    }

    fn in_place_is_switched_off(&self) -> bool {
        false
    }

    fn host_page_size(&self) -> u64 {
        PAGE_SIZE
    }

    fn transparent_huge_page(&self) -> Option<u64> {
        None
    }

    fn advise_huge_pages(&self, _mapping: &Mapping) -> CallResult<()> {
        Ok(())
    }

    fn keep_from(&self, _mapping: &Mapping, _whom: Outsider) -> CallResult<()> {
        Ok(())
    }

    fn same_file(&self, one: BorrowedFd, other: BorrowedFd) -> Option<bool> {
        Linux.same_file(one, other)
    }

    fn ioas_huge_pages(&self, _ioas: Ioas) -> CallResult<bool> {
        Ok(false)
    }

    fn ioas_disable_huge_pages(&self, _ioas: Ioas) -> CallResult<()> {
        Ok(())
    }

    fn vfio_ioas_set(&self, _ioas: Ioas) -> CallResult<()> {
        Ok(())
    }

    fn vfio_unmap(&self, _iommufd: BorrowedFd, span: Span<Iova>) -> CallResult<u64> {
        Ok(span.size_bytes())
    }
}
