// SPDX-License-Identifier: MIT OR Apache-2.0
//! The real kernel, but for attributes, which its VMs keep and do nothing with: for tests of two
//! planes on hosts whose VMs have no private memory, or have it in place.

use gmem::kernel::abi::{KVM_CAP_MEMORY_ATTRIBUTES, KVM_MEMORY_ATTRIBUTE_PRIVATE};
use gmem::kernel::linux::Linux;
use gmem::kernel::{
    CallError, CallResult, DeviceAccess, Ioas, Kernel, Mapping, NumaPolicy, Outsider, Stopped,
};
use gmem::{Attribute, Gpa, Iova, Offset, Span};
use std::os::fd::{BorrowedFd, OwnedFd, RawFd};

#[derive(Debug)]
pub struct StandIn;

macro_rules! as_linux {
    ($(fn $name:ident($($argument:ident: $kind:ty),* $(,)?) $(-> $result:ty)?;)*) => {
        $(fn $name(&self, $($argument: $kind),*) $(-> $result)? {
            Linux.$name($($argument),*)
        })*
    };
}

impl Kernel for StandIn {
    fn check_extension(&self, vm: BorrowedFd, capability: i32) -> CallResult<i32> {
        match capability {
            KVM_CAP_MEMORY_ATTRIBUTES => Ok(KVM_MEMORY_ATTRIBUTE_PRIVATE as i32),
            other => Linux.check_extension(vm, other),
        }
    }

    fn set_memory_attributes(&self, _: BorrowedFd, _: Span<Gpa>, _: Attribute) -> CallResult<()> {
        Ok(())
    }

    fn convert_in_place(
        &self,
        _: BorrowedFd,
        _: Span<Offset>,
        _: Attribute,
    ) -> Result<(), Stopped> {
        let (call, errno) = ("KVM_SET_MEMORY_ATTRIBUTES2", libc::ENOTTY);
        let call = CallError { call, errno };
        Err(Stopped { call, at: None })
    }

    as_linux! {
        fn duplicate(fd: RawFd) -> CallResult<OwnedFd>;
        fn is_vm(fd: BorrowedFd) -> bool;
        fn create_guest_memfd(
            vm: BorrowedFd, size: u64, flags: u64, page_order: u8,
        ) -> CallResult<OwnedFd>;
        fn create_memfd(name: &str, size: u64) -> CallResult<OwnedFd>;
        fn create_huge_memfd(name: &str, size: u64, page: u64) -> CallResult<OwnedFd>;
        fn map(file: BorrowedFd, size: u64, alignment: u64) -> CallResult<Mapping>;
        fn hide(mapping: &Mapping) -> CallResult<()>;
        fn map_over(mapping: &Mapping, file: BorrowedFd) -> CallResult<()>;
        fn replace(number: BorrowedFd, by: BorrowedFd) -> CallResult<()>;
        fn set_mapping_policy(mapping: &Mapping, policy: &NumaPolicy) -> CallResult<()>;
        fn set_thread_policy(policy: &NumaPolicy) -> CallResult<()>;
        fn allocate(file: BorrowedFd, span: Span<Offset>) -> CallResult<()>;
        fn punch_hole(file: BorrowedFd, span: Span<Offset>) -> CallResult<()>;
        fn page_size(file: BorrowedFd) -> CallResult<u64>;
        fn write_page(file: BorrowedFd) -> CallResult<()>;
        fn refer(mapping: &Mapping) -> CallResult<()>;
        fn populate(mapping: &Mapping, span: Span<Offset>) -> CallResult<()>;
        fn forget_mapped(mapping: &Mapping, span: Span<Offset>) -> CallResult<()>;
        fn dma_map_file(
            ioas: Ioas, file: BorrowedFd, span: Span<Offset>, iova: Iova, access: DeviceAccess,
        ) -> CallResult<()>;
        fn dma_map_address(
            ioas: Ioas, mapping: &Mapping, span: Span<Offset>, iova: Iova, access: DeviceAccess,
        ) -> CallResult<()>;
        fn dma_unmap(ioas: Ioas, span: Span<Iova>) -> CallResult<()>;
        fn dma_is_mapped(ioas: Ioas, span: Span<Iova>) -> CallResult<bool>;
        fn in_place_is_switched_off() -> bool;
        fn host_page_size() -> u64;
        fn transparent_huge_page() -> Option<u64>;
        fn advise_huge_pages(mapping: &Mapping) -> CallResult<()>;
        fn keep_from(mapping: &Mapping, whom: Outsider) -> CallResult<()>;
        fn same_file(one: BorrowedFd, other: BorrowedFd) -> Option<bool>;
        fn ioas_huge_pages(ioas: Ioas) -> CallResult<bool>;
        fn ioas_disable_huge_pages(ioas: Ioas) -> CallResult<()>;
        fn vfio_ioas_set(ioas: Ioas) -> CallResult<()>;
        fn vfio_unmap(iommufd: BorrowedFd, span: Span<Iova>) -> CallResult<u64>;
    }
}
