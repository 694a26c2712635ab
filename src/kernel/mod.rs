// SPDX-License-Identifier: MIT OR Apache-2.0
//! Everything this library asks of the kernel, as one trait.
//!
//! [`linux::Linux`] is the real one and holds the only system calls; the tests' `fake::FakeKernel`
//! keeps the kernel's rules in memory, so that a test can make any single call fail. A method that
//! returns an error has changed nothing, unless its own text says otherwise.

pub mod abi;
pub mod abi_coming;
#[cfg(any(test, feature = "fake-kernel"))]
pub mod fake;
pub(crate) mod holders;
pub mod linux;
mod mapping;
#[cfg(any(test, feature = "fake-kernel"))]
pub mod null;
mod policy;
pub(crate) mod probe;

pub use mapping::Mapping;
pub use policy::{NumaPolicy, PolicyMode};
pub use probe::Probe;

use crate::attributes::Attribute;
use crate::error::errno_text;
use crate::units::{Gpa, Iova, Offset, Span};
use std::fmt;
use std::os::fd::{BorrowedFd, OwnedFd, RawFd};

/// A system call that failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CallError {
    /// The call or ioctl, by the name the kernel's headers give it.
    pub call: &'static str,
    /// Positive errno.
    pub errno: i32,
}

impl fmt::Display for CallError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.call, errno_text(self.errno))
    }
}

/// A conversion in place that the kernel has not finished.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stopped {
    /// KVM_SET_MEMORY_ATTRIBUTES2 and its errno.
    pub call: CallError,
    /// The offset that it stopped at, if the kernel said: of the first page that is in the way for
    /// EAGAIN. In a file of single pages nothing has changed. In one of huge pages, those before the
    /// one with this offset have converted.
    pub at: Option<u64>,
}

/// Result of one kernel call.
pub type CallResult<T> = Result<T, CallError>;

/// The I/O address space that a call is about.
#[derive(Clone, Copy, Debug)]
pub struct Ioas<'a> {
    /// /dev/iommu, as its user opened it.
    pub iommufd: BorrowedFd<'a>,
    /// Object id of the IOAS in it.
    pub id: u32,
}

/// What a device may do with a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceAccess {
    /// Read only.
    Read,
    /// Read and write.
    ReadWrite,
}

/// Who could get at memory beside those who are given it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outsider {
    /// Children that fork(2) makes: MADV_DONTFORK.
    Children,
    /// Core dumps: MADV_DONTDUMP.
    CoreDumps,
}

/// The kernel, as far as this library uses it. Every method may block in the kernel; none takes a
/// lock of this library.
///
/// What opens a file gives it close-on-exec, at once where the kernel has a flag for it. For
/// KVM_CREATE_GUEST_MEMFD it has none: then right after.
pub trait Kernel: Send + Sync + fmt::Debug {
    /// dup(2) with close-on-exec. EBADF for a number that is no open file.
    fn duplicate(&self, fd: RawFd) -> CallResult<OwnedFd>;

    /// Whether `fd` is a KVM VM, and not /dev/kvm or a vCPU, which answer some of the same ioctls.
    fn is_vm(&self, fd: BorrowedFd) -> bool;

    /// KVM_CHECK_EXTENSION on a VM: kvm_vm_ioctl_check_extension_generic.
    fn check_extension(&self, vm: BorrowedFd, capability: i32) -> CallResult<i32>;

    /// KVM_CREATE_GUEST_MEMFD: kvm_gmem_create. The file's size is fixed. `page_order` is that of its
    /// huge pages, 0 for single pages; kernels that have none don't look at it.
    fn create_guest_memfd(
        &self,
        vm: BorrowedFd,
        size: u64,
        flags: u64,
        page_order: u8,
    ) -> CallResult<OwnedFd>;

    /// KVM_SET_MEMORY_ATTRIBUTES2 on a guest_memfd, once: after EINTR and EAGAIN it is the caller who
    /// knows from where to go on. ENOTTY where the kernel has no conversion in place or it is off,
    /// EINVAL if the VM's type has no private memory. Pages that have the attribute are passed over,
    /// but in files of huge pages the guest's mappings of those in `span` go, and on TDX with them
    /// what they hold: ask for changes only.
    fn convert_in_place(
        &self,
        file: BorrowedFd,
        span: Span<Offset>,
        attribute: Attribute,
    ) -> Result<(), Stopped>;

    /// KVM_SET_MEMORY_ATTRIBUTES: kvm_vm_set_mem_attributes, which reserves what it needs before it
    /// changes anything, so that a failure (ENOMEM) leaves every attribute as it was.
    fn set_memory_attributes(
        &self,
        vm: BorrowedFd,
        span: Span<Gpa>,
        attribute: Attribute,
    ) -> CallResult<()>;

    /// memfd_create(2) and ftruncate(2) to `size` bytes of ordinary pages. The size is sealed
    /// (F_SEAL_GROW, F_SEAL_SHRINK), and the seals are (F_SEAL_SEAL).
    fn create_memfd(&self, name: &str, size: u64) -> CallResult<OwnedFd>;

    /// memfd_create(2) with MFD_HUGETLB, and ftruncate(2) to `size` bytes, sealed in the same way: pages come from the host's
    /// pool of huge pages of `page` bytes, when they are needed. ENODEV or EINVAL if the host has no
    /// such pool.
    fn create_huge_memfd(&self, name: &str, size: u64, page: u64) -> CallResult<OwnedFd>;

    /// Maps all of `file`, shared, readable and writable, at a multiple of `alignment`, a power of two
    /// and at least a page. Nothing is taken from a pool of huge pages for it: without MAP_NORESERVE,
    /// hugetlb_reserve_pages would set all of them aside.
    fn map(&self, file: BorrowedFd, size: u64, alignment: u64) -> CallResult<Mapping>;

    /// Leaves nothing behind a mapping's addresses but the reservation of them: who touches one gets
    /// SIGSEGV. On failure the file is still there, or the reservation is.
    fn hide(&self, mapping: &Mapping) -> CallResult<()>;

    /// Maps `file` at the addresses of a mapping, in place of what is there now. On failure that is
    /// still there, or a reservation. Should another thread have taken addresses in the instant that
    /// they had neither, they stay that thread's: this and [`Kernel::hide`] are EADDRNOTAVAIL for good.
    fn map_over(&self, mapping: &Mapping, file: BorrowedFd) -> CallResult<()>;

    /// dup3(2): `number`, which closes, is another name of `by` afterwards. Whoever uses the number at
    /// that moment gets the one file or the other.
    fn replace(&self, number: BorrowedFd, by: BorrowedFd) -> CallResult<()>;

    /// mbind(2) on a whole mapping. Files of ordinary pages take the policy over and keep it
    /// (shmem_set_policy), with hugetlbfs it is that of page faults by this mapping. EINVAL if the
    /// host has none of the nodes.
    fn set_mapping_policy(&self, mapping: &Mapping, policy: &NumaPolicy) -> CallResult<()>;

    /// set_mempolicy(2) for the calling thread. EINVAL if the host has none of the nodes.
    fn set_thread_policy(&self, policy: &NumaPolicy) -> CallResult<()>;

    /// fallocate(2): every page of `span` has memory after it. On failure some of them may. In a file
    /// of huge pages, it is the whole huge page (hugetlbfs_fallocate rounds outwards), and ENOSPC if
    /// the pool has none.
    fn allocate(&self, file: BorrowedFd, span: Span<Offset>) -> CallResult<()>;

    /// fallocate(2) with FALLOC_FL_PUNCH_HOLE: no page of `span` has memory after it, and the next
    /// reader finds zeroes. On failure some may be gone. A page pinned by a device is not freed
    /// and no longer the file's: take DMA out first. Of a huge page that lies in `span` in part, that
    /// part is zeroed and keeps its memory (hugetlbfs_punch_hole).
    fn punch_hole(&self, file: BorrowedFd, span: Span<Offset>) -> CallResult<()>;

    /// fstat(2): st_blksize, which is the size of a file's pages.
    fn page_size(&self, file: BorrowedFd) -> CallResult<u64>;

    /// pwrite(2) of zeroes over the first page. EINVAL for a guest_memfd that can't be written so, which
    /// is all to Linux 7.3.
    fn write_page(&self, file: BorrowedFd) -> CallResult<()>;

    /// vmsplice(2) of the first page of a mapping into a pipe, where it stays for a moment. Takes a
    /// reference as who pins pages does (get_user_pages). EFAULT if it may not be had.
    fn refer(&self, mapping: &Mapping) -> CallResult<()>;

    /// madvise(2) with MADV_POPULATE_WRITE on `span` of a mapping.
    fn populate(&self, mapping: &Mapping, span: Span<Offset>) -> CallResult<()>;

    /// madvise(2) with MADV_DONTNEED_LOCKED on `span` of a mapping of a file: the file keeps its bytes, and
    /// page tables show them no more. What a memory error left there goes, too, which a punched hole
    /// leaves alone (zap_nonpresent_ptes): without this the next access would be a signal again.
    fn forget_mapped(&self, mapping: &Mapping, span: Span<Offset>) -> CallResult<()>;

    /// IOMMU_IOAS_MAP_FILE: iopt_map_file_pages. EINVAL for a file that memfd_pin_folios doesn't
    /// take, once a device is attached.
    fn dma_map_file(
        &self,
        ioas: Ioas,
        file: BorrowedFd,
        span: Span<Offset>,
        iova: Iova,
        access: DeviceAccess,
    ) -> CallResult<()>;

    /// IOMMU_IOAS_MAP of `span` of a mapping: iopt_map_user_pages, which pins by address.
    fn dma_map_address(
        &self,
        ioas: Ioas,
        mapping: &Mapping,
        span: Span<Offset>,
        iova: Iova,
        access: DeviceAccess,
    ) -> CallResult<()>;

    /// IOMMU_IOAS_UNMAP: iopt_unmap_iova. The kernel removes whole areas only: ENOENT says that
    /// `span` begins in one (nothing was done), ends in one (areas before it are gone), or has none.
    fn dma_unmap(&self, ioas: Ioas, span: Span<Iova>) -> CallResult<()>;

    /// Whether all of `span` is mapped: IOMMU_IOAS_COPY of it to the same addresses of the same IOAS, which
    /// changes nothing. EEXIST there means that it is (iopt_check_iova), ENOENT that some of it is not
    /// (iopt_get_pages) or that there is no such IOAS.
    fn dma_is_mapped(&self, ioas: Ioas, span: Span<Iova>) -> CallResult<bool>;

    /// Whether the kernel could convert in place, and the module parameter
    /// kvm.gmem_in_place_conversion says no. False as well where that can't be read.
    fn in_place_is_switched_off(&self) -> bool;

    /// sysconf(3): the size of its pages.
    fn host_page_size(&self) -> u64;

    /// Size of the huge pages that the kernel may give memfds by itself, if it does
    /// (/sys/kernel/mm/transparent_hugepage/shmem_enabled is neither never nor deny). `None` as well
    /// where that can't be read.
    fn transparent_huge_page(&self) -> Option<u64>;

    /// madvise(2) with MADV_HUGEPAGE on all of a mapping: what is populated may become huge pages.
    fn advise_huge_pages(&self, mapping: &Mapping) -> CallResult<()>;

    /// madvise(2) on all of a mapping, which holds as long as that is what is mapped there.
    fn keep_from(&self, mapping: &Mapping, whom: Outsider) -> CallResult<()>;

    /// kcmp(2) with KCMP_FILE: whether both are one open file. `None` if the kernel doesn't say
    /// (built without kcmp, or a sandbox).
    fn same_file(&self, one: BorrowedFd, other: BorrowedFd) -> Option<bool>;

    /// IOMMU_OPTION_HUGE_PAGES, asked: whether pages of an IOAS may be mapped together.
    fn ioas_huge_pages(&self, ioas: Ioas) -> CallResult<bool>;

    /// IOMMU_OPTION_HUGE_PAGES := 0: iopt_disable_large_pages. EINVAL once it has both domains and
    /// areas, unless it is so already.
    fn ioas_disable_huge_pages(&self, ioas: Ioas) -> CallResult<()>;

    /// IOMMU_VFIO_IOAS_SET: points the whole iommufd context at an IOAS, for
    /// [`Kernel::vfio_unmap`].
    fn vfio_ioas_set(&self, ioas: Ioas) -> CallResult<()>;

    /// VFIO_IOMMU_UNMAP_DMA on the IOAS that the context points at: iommufd_vfio_unmap_dma. Without
    /// huge pages areas are cut at both ends of `span` (iopt_cut_iova), then those in it go. Answers
    /// the bytes that were mapped; none at all is no error here. ENODEV if the context points
    /// nowhere. On failure areas may be cut, and some at the front may be gone.
    fn vfio_unmap(&self, iommufd: BorrowedFd, span: Span<Iova>) -> CallResult<u64>;
}
