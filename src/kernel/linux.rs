// SPDX-License-Identifier: MIT OR Apache-2.0
//! The real kernel: the library's only system calls.

use super::abi::*;
use super::abi_coming::{KvmMemoryAttributes2, KVM_SET_MEMORY_ATTRIBUTES2};
use super::mapping::last_errno;
use super::{
    CallError, CallResult, DeviceAccess, Ioas, Kernel, Mapping, NumaPolicy, Outsider, Stopped,
};
use crate::attributes::Attribute;
use crate::units::{Address, Gpa, Iova, Offset, Span, PAGE_SIZE};
use libc::{c_int, c_long, c_uint, c_ulong};
use std::ffi::CString;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// Linux, called directly.
#[derive(Debug, Default)]
pub struct Linux;

/// A call that a signal interrupts is made again this often before EINTR is reported: no signal
/// storm may keep a thread here for ever.
const INTERRUPTIONS: u32 = 1000;

/// Who gets a memfd (a vhost-user back end) can't change its size, which would be SIGBUS for everybody,
/// and can't seal it further, against writing, say. Holes can be punched all the same: only F_SEAL_WRITE
/// and F_SEAL_FUTURE_WRITE forbid that (shmem_fallocate, hugetlbfs_punch_hole). udmabuf demands
/// F_SEAL_SHRINK and refuses F_SEAL_WRITE.
const SEALS: c_int = libc::F_SEAL_GROW | libc::F_SEAL_SHRINK | libc::F_SEAL_SEAL;

/// Makes `call` until it isn't interrupted; -1 and errno become an error under `name`.
fn uninterrupted(name: &'static str, mut call: impl FnMut() -> c_int) -> CallResult<c_int> {
    let mut errno = libc::EINTR;
    for _ in 0..INTERRUPTIONS {
        let result = call();
        if result >= 0 {
            return Ok(result);
        }
        errno = last_errno();
        if errno != libc::EINTR {
            break;
        }
    }
    Err(CallError { call: name, errno })
}

/// The same for syscall(2), which answers in a long.
fn uninterrupted_long(name: &'static str, mut call: impl FnMut() -> c_long) -> CallResult<()> {
    uninterrupted(name, || if call() < 0 { -1 } else { 0 }).map(drop)
}

/// An ioctl whose argument the kernel reads, and may write back, as a `T`.
fn ioctl<T>(
    name: &'static str,
    fd: BorrowedFd,
    request: c_ulong,
    argument: &mut T,
) -> CallResult<c_int> {
    // SAFETY: each request constant in `abi` is used with the structure that the kernel's header
    // gives it, `argument` is a live, exclusive reference to one, and the kernel keeps no pointer.
    uninterrupted(name, || unsafe {
        libc::ioctl(fd.as_raw_fd(), request, &raw mut *argument)
    })
}

fn own(fd: c_int) -> OwnedFd {
    // SAFETY: the kernel just gave this number to us and nobody else knows it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// A descriptor that the kernel made without close-on-exec. A child that another thread forks before
/// this has it all the same: the ioctls that need this take no flag.
fn own_inherited(fd: c_int) -> CallResult<OwnedFd> {
    let fd = own(fd);
    // SAFETY: numbers only.
    uninterrupted("fcntl(F_SETFD)", || unsafe {
        libc::fcntl(fd.as_raw_fd(), libc::F_SETFD, libc::FD_CLOEXEC)
    })?;
    Ok(fd)
}

fn fallocate(fd: BorrowedFd, mode: c_int, span: Span<Offset>) -> CallResult<()> {
    let out_of_range = |_| CallError {
        call: "fallocate",
        errno: libc::EFBIG,
    };
    let offset = libc::off_t::try_from(span.first()).map_err(out_of_range)?;
    let length = libc::off_t::try_from(span.size_bytes()).map_err(out_of_range)?;
    // SAFETY: no memory of ours is passed. A repeat after EINTR is right because both modes are
    // idempotent: kvm_gmem_allocate and hugetlbfs_fallocate stop midway at any signal and keep what they
    // have done (shmem_fallocate only at a fatal one, and takes its work back).
    uninterrupted("fallocate", || unsafe {
        libc::fallocate(fd.as_raw_fd(), mode, offset, length)
    })
    .map(drop)
}

fn create_memfd(name: &str, size: u64, flags: c_uint) -> CallResult<OwnedFd> {
    let too_large = |_| CallError {
        call: "ftruncate",
        errno: libc::EFBIG,
    };
    let length = libc::off_t::try_from(size).map_err(too_large)?;
    // memfd names are decoration, at most 249 bytes: what doesn't fit is no reason to fail.
    let name: String = name.chars().filter(|&c| c != '\0').take(60).collect();
    let name = CString::new(name).expect("NULs were taken out");
    // SAFETY: `name` is a NUL-terminated string that outlives the call.
    let file = uninterrupted("memfd_create", || unsafe {
        let always = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
        libc::memfd_create(name.as_ptr(), always | flags)
    })
    .map(own)?;
    // SAFETY: no memory of ours is passed.
    uninterrupted("ftruncate", || unsafe {
        libc::ftruncate(file.as_raw_fd(), length)
    })?;
    // SAFETY: numbers only.
    uninterrupted("fcntl(F_ADD_SEALS)", || unsafe {
        libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, SEALS)
    })?;
    Ok(file)
}

fn attribute_bits(attribute: Attribute) -> u64 {
    match attribute {
        Attribute::Shared => 0,
        Attribute::Private => KVM_MEMORY_ATTRIBUTE_PRIVATE,
    }
}

fn map_flags(access: DeviceAccess) -> u32 {
    let write = match access {
        DeviceAccess::Read => 0,
        DeviceAccess::ReadWrite => IOMMU_IOAS_MAP_WRITEABLE,
    };
    IOMMU_IOAS_MAP_FIXED_IOVA | IOMMU_IOAS_MAP_READABLE | write
}

fn huge_pages(ioas: Ioas, op: u16) -> IommuOption {
    IommuOption {
        size: size_of::<IommuOption>() as u32,
        option_id: IOMMU_OPTION_HUGE_PAGES,
        op,
        reserved: 0,
        object_id: ioas.id,
        val64: 0,
    }
}

impl Kernel for Linux {
    fn duplicate(&self, fd: RawFd) -> CallResult<OwnedFd> {
        // SAFETY: fcntl takes any number and answers EBADF for one that is not open.
        uninterrupted("fcntl(F_DUPFD_CLOEXEC)", || unsafe {
            libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 0)
        })
        .map(own)
    }

    fn is_vm(&self, fd: BorrowedFd) -> bool {
        // SAFETY: neither request takes a pointer.
        let answers = |request: c_ulong| unsafe { libc::ioctl(fd.as_raw_fd(), request, 0) >= 0 };
        // All but a vCPU know the one, none but /dev/kvm the other.
        answers(KVM_CHECK_EXTENSION) && !answers(KVM_GET_API_VERSION)
    }

    fn check_extension(&self, vm: BorrowedFd, capability: i32) -> CallResult<i32> {
        // SAFETY: the argument is a number, not a pointer.
        uninterrupted("KVM_CHECK_EXTENSION", || unsafe {
            libc::ioctl(
                vm.as_raw_fd(),
                KVM_CHECK_EXTENSION,
                c_ulong::from(capability as u32),
            )
        })
    }

    fn create_guest_memfd(
        &self,
        vm: BorrowedFd,
        size: u64,
        flags: u64,
        page_order: u8,
    ) -> CallResult<OwnedFd> {
        let mut create = KvmCreateGuestMemfd {
            size,
            flags,
            // Where there are huge pages, the first of these bytes is `page_order`, the rest reserved.
            reserved: [u64::from(page_order), 0, 0, 0, 0, 0],
        };
        ioctl(
            "KVM_CREATE_GUEST_MEMFD",
            vm,
            KVM_CREATE_GUEST_MEMFD,
            &mut create,
        )
        // kvm_gmem_create: get_unused_fd_flags(0)
        .and_then(own_inherited)
    }

    fn set_memory_attributes(
        &self,
        vm: BorrowedFd,
        span: Span<Gpa>,
        attribute: Attribute,
    ) -> CallResult<()> {
        let mut attributes = KvmMemoryAttributes {
            address: span.first(),
            size: span.size_bytes(),
            attributes: attribute_bits(attribute),
            flags: 0,
        };
        ioctl(
            "KVM_SET_MEMORY_ATTRIBUTES",
            vm,
            KVM_SET_MEMORY_ATTRIBUTES,
            &mut attributes,
        )
        .map(drop)
    }

    fn convert_in_place(
        &self,
        file: BorrowedFd,
        span: Span<Offset>,
        attribute: Attribute,
    ) -> Result<(), Stopped> {
        /// No page begins here, so the kernel has not written it.
        const UNSAID: u64 = u64::MAX;
        let mut attributes = KvmMemoryAttributes2 {
            offset: span.first(),
            size: span.size_bytes(),
            attributes: attribute_bits(attribute),
            error_offset: UNSAID,
            ..Default::default()
        };
        // SAFETY: the request's structure is this one, live and exclusive, and the kernel keeps no
        // pointer to it.
        let result = unsafe {
            libc::ioctl(
                file.as_raw_fd(),
                KVM_SET_MEMORY_ATTRIBUTES2,
                &raw mut attributes,
            )
        };
        if result >= 0 {
            return Ok(());
        }
        Err(Stopped {
            call: CallError {
                call: "KVM_SET_MEMORY_ATTRIBUTES2",
                errno: last_errno(),
            },
            at: (attributes.error_offset != UNSAID).then_some(attributes.error_offset),
        })
    }

    fn create_memfd(&self, name: &str, size: u64) -> CallResult<OwnedFd> {
        create_memfd(name, size, 0)
    }

    fn create_huge_memfd(&self, name: &str, size: u64, page: u64) -> CallResult<OwnedFd> {
        // The kernel wants the page's size as its logarithm, in the flags' upper bits.
        let flags = libc::MFD_HUGETLB | page.ilog2() << libc::MFD_HUGE_SHIFT;
        create_memfd(name, size, flags)
    }

    fn map(&self, file: BorrowedFd, size: u64, alignment: u64) -> CallResult<Mapping> {
        Mapping::new(file, size, alignment)
    }

    fn hide(&self, mapping: &Mapping) -> CallResult<()> {
        mapping.hide()
    }

    fn map_over(&self, mapping: &Mapping, file: BorrowedFd) -> CallResult<()> {
        mapping.map_over(file)
    }

    fn replace(&self, number: BorrowedFd, by: BorrowedFd) -> CallResult<()> {
        // SAFETY: no memory is passed. Both are open, and the number stays so: who borrows it finds
        // an open file at any time.
        uninterrupted("dup3", || unsafe {
            libc::dup3(by.as_raw_fd(), number.as_raw_fd(), libc::O_CLOEXEC)
        })
        .map(drop)
    }

    fn set_mapping_policy(&self, mapping: &Mapping, policy: &NumaPolicy) -> CallResult<()> {
        // SAFETY: the range is the mapping's own, no byte of which changes, and the kernel reads as
        // many bits of nodes as it is told of, less one.
        uninterrupted_long("mbind", || unsafe {
            libc::syscall(
                libc::SYS_mbind,
                mapping.host(),
                mapping.size(),
                c_long::from(policy.mode_number()),
                policy.node_words().as_ptr(),
                policy.max_node(),
                c_long::from(0),
            )
        })
    }

    fn set_thread_policy(&self, policy: &NumaPolicy) -> CallResult<()> {
        // SAFETY: the kernel reads as many bits of nodes as it is told of, less one.
        uninterrupted_long("set_mempolicy", || unsafe {
            libc::syscall(
                libc::SYS_set_mempolicy,
                c_long::from(policy.mode_number()),
                policy.node_words().as_ptr(),
                policy.max_node(),
            )
        })
    }

    fn allocate(&self, file: BorrowedFd, span: Span<Offset>) -> CallResult<()> {
        fallocate(file, libc::FALLOC_FL_KEEP_SIZE, span)
    }

    fn punch_hole(&self, file: BorrowedFd, span: Span<Offset>) -> CallResult<()> {
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        fallocate(file, mode, span)
    }

    fn page_size(&self, file: BorrowedFd) -> CallResult<u64> {
        let mut stat = std::mem::MaybeUninit::<libc::stat>::zeroed();
        // SAFETY: the kernel writes one such structure, and zeroes are one as well.
        uninterrupted("fstat", || unsafe {
            libc::fstat(file.as_raw_fd(), stat.as_mut_ptr())
        })?;
        // SAFETY: as above.
        Ok(unsafe { stat.assume_init() }.st_blksize as u64)
    }

    fn write_page(&self, file: BorrowedFd) -> CallResult<()> {
        const CALL: &str = "pwrite";
        let zeroes = [0u8; PAGE_SIZE as usize];
        let mut written = 0;
        // SAFETY: so many bytes are there to be read.
        uninterrupted(CALL, || unsafe {
            written = libc::pwrite(file.as_raw_fd(), zeroes.as_ptr().cast(), zeroes.len(), 0);
            written.min(1) as c_int
        })?;
        if written as usize != zeroes.len() {
            let errno = libc::EIO;
            return Err(CallError { call: CALL, errno });
        }
        Ok(())
    }

    fn refer(&self, mapping: &Mapping) -> CallResult<()> {
        let mut ends = [0; 2];
        // SAFETY: the kernel writes two numbers.
        uninterrupted("pipe2", || unsafe {
            libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC | libc::O_NONBLOCK)
        })?;
        let [_reading, writing] = ends.map(own);
        let page = libc::iovec {
            iov_base: mapping.host().cast(),
            iov_len: PAGE_SIZE as usize,
        };
        // SAFETY: the page is the mapping's own; the pipe, which refers to it, ends here unread.
        uninterrupted("vmsplice", || unsafe {
            libc::vmsplice(writing.as_raw_fd(), &page, 1, 0).min(1) as c_int
        })
        .map(drop)
    }

    fn populate(&self, mapping: &Mapping, span: Span<Offset>) -> CallResult<()> {
        let address = mapping.address(span);
        // SAFETY: the range is the mapping's own, and populating changes no byte of it.
        uninterrupted("madvise(MADV_POPULATE_WRITE)", || unsafe {
            libc::madvise(
                address as *mut libc::c_void,
                span.size_bytes() as usize,
                libc::MADV_POPULATE_WRITE,
            )
        })
        .map(drop)
    }

    fn forget_mapped(&self, mapping: &Mapping, span: Span<Offset>) -> CallResult<()> {
        let address = mapping.address(span);
        // SAFETY: the range is the mapping's own, and the bytes stay in its file.
        uninterrupted("madvise(MADV_DONTNEED_LOCKED)", || unsafe {
            libc::madvise(
                address as *mut libc::c_void,
                span.size_bytes() as usize,
                libc::MADV_DONTNEED_LOCKED,
            )
        })
        .map(drop)
    }

    fn dma_map_file(
        &self,
        ioas: Ioas,
        file: BorrowedFd,
        span: Span<Offset>,
        iova: Iova,
        access: DeviceAccess,
    ) -> CallResult<()> {
        let mut map = IommuIoasMapFile {
            size: size_of::<IommuIoasMapFile>() as u32,
            flags: map_flags(access),
            ioas_id: ioas.id,
            fd: file.as_raw_fd(),
            start: span.first(),
            length: span.size_bytes(),
            iova: iova.get(),
        };
        ioctl(
            "IOMMU_IOAS_MAP_FILE",
            ioas.iommufd,
            IOMMU_IOAS_MAP_FILE,
            &mut map,
        )
        .map(drop)
    }

    fn dma_map_address(
        &self,
        ioas: Ioas,
        mapping: &Mapping,
        span: Span<Offset>,
        iova: Iova,
        access: DeviceAccess,
    ) -> CallResult<()> {
        let mut map = IommuIoasMap {
            size: size_of::<IommuIoasMap>() as u32,
            flags: map_flags(access),
            ioas_id: ioas.id,
            reserved: 0,
            user_va: mapping.address(span),
            length: span.size_bytes(),
            iova: iova.get(),
        };
        ioctl("IOMMU_IOAS_MAP", ioas.iommufd, IOMMU_IOAS_MAP, &mut map).map(drop)
    }

    fn dma_unmap(&self, ioas: Ioas, span: Span<Iova>) -> CallResult<()> {
        let mut unmap = IommuIoasUnmap {
            size: size_of::<IommuIoasUnmap>() as u32,
            ioas_id: ioas.id,
            iova: span.first(),
            length: span.size_bytes(),
        };
        ioctl(
            "IOMMU_IOAS_UNMAP",
            ioas.iommufd,
            IOMMU_IOAS_UNMAP,
            &mut unmap,
        )
        .map(drop)
    }

    fn dma_is_mapped(&self, ioas: Ioas, span: Span<Iova>) -> CallResult<bool> {
        let mut copy = IommuIoasCopy {
            size: size_of::<IommuIoasCopy>() as u32,
            flags: map_flags(DeviceAccess::Read),
            dst_ioas_id: ioas.id,
            src_ioas_id: ioas.id,
            length: span.size_bytes(),
            dst_iova: span.first(),
            src_iova: span.first(),
        };
        match ioctl("IOMMU_IOAS_COPY", ioas.iommufd, IOMMU_IOAS_COPY, &mut copy) {
            Err(call) if call.errno == libc::EEXIST => Ok(true),
            Err(call) if call.errno == libc::ENOENT => Ok(false),
            copied => copied.map(|_| true),
        }
    }

    fn in_place_is_switched_off(&self) -> bool {
        const PARAMETER: &str = "/sys/module/kvm/parameters/gmem_in_place_conversion";
        std::fs::read_to_string(PARAMETER).is_ok_and(|text| text.trim() == "N")
    }

    fn host_page_size(&self) -> u64 {
        // SAFETY: numbers only.
        let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
        u64::try_from(size).unwrap_or(PAGE_SIZE)
    }

    fn transparent_huge_page(&self) -> Option<u64> {
        let read = |name| {
            let path = format!("/sys/kernel/mm/transparent_hugepage/{name}");
            std::fs::read_to_string(path).ok()
        };
        let enabled = read("shmem_enabled")?;
        if enabled.contains("[never]") || enabled.contains("[deny]") {
            return None;
        }
        let bytes: u64 = read("hpage_pmd_size")?.trim().parse().ok()?;
        bytes.is_power_of_two().then_some(bytes)
    }

    fn advise_huge_pages(&self, mapping: &Mapping) -> CallResult<()> {
        // SAFETY: the range is the mapping's own, and the advice changes no byte of it.
        uninterrupted("madvise(MADV_HUGEPAGE)", || unsafe {
            libc::madvise(mapping.host().cast(), mapping.size(), libc::MADV_HUGEPAGE)
        })
        .map(drop)
    }

    fn keep_from(&self, mapping: &Mapping, whom: Outsider) -> CallResult<()> {
        let (call, advice) = match whom {
            Outsider::Children => ("madvise(MADV_DONTFORK)", libc::MADV_DONTFORK),
            Outsider::CoreDumps => ("madvise(MADV_DONTDUMP)", libc::MADV_DONTDUMP),
        };
        // SAFETY: the range is the mapping's own, and the advice changes no byte of it.
        uninterrupted(call, || unsafe {
            libc::madvise(mapping.host().cast(), mapping.size(), advice)
        })
        .map(drop)
    }

    fn same_file(&self, one: BorrowedFd, other: BorrowedFd) -> Option<bool> {
        // SAFETY: kcmp takes numbers only; both processes are this one.
        let order = unsafe {
            let process = libc::getpid();
            libc::syscall(
                libc::SYS_kcmp,
                process,
                process,
                KCMP_FILE,
                one.as_raw_fd() as c_ulong,
                other.as_raw_fd() as c_ulong,
            )
        };
        (order >= 0).then_some(order == 0)
    }

    fn ioas_huge_pages(&self, ioas: Ioas) -> CallResult<bool> {
        let mut option = huge_pages(ioas, IOMMU_OPTION_OP_GET);
        ioctl("IOMMU_OPTION", ioas.iommufd, IOMMU_OPTION, &mut option)?;
        Ok(option.val64 != 0)
    }

    fn ioas_disable_huge_pages(&self, ioas: Ioas) -> CallResult<()> {
        let mut option = huge_pages(ioas, IOMMU_OPTION_OP_SET);
        ioctl("IOMMU_OPTION", ioas.iommufd, IOMMU_OPTION, &mut option).map(drop)
    }

    fn vfio_ioas_set(&self, ioas: Ioas) -> CallResult<()> {
        let mut set = IommuVfioIoas {
            size: size_of::<IommuVfioIoas>() as u32,
            ioas_id: ioas.id,
            op: IOMMU_VFIO_IOAS_SET,
            reserved: 0,
        };
        ioctl("IOMMU_VFIO_IOAS", ioas.iommufd, IOMMU_VFIO_IOAS, &mut set).map(drop)
    }

    fn vfio_unmap(&self, iommufd: BorrowedFd, span: Span<Iova>) -> CallResult<u64> {
        let mut unmap = VfioIommuType1DmaUnmap {
            argsz: size_of::<VfioIommuType1DmaUnmap>() as u32,
            flags: 0,
            iova: span.first(),
            size: span.size_bytes(),
        };
        ioctl(
            "VFIO_IOMMU_UNMAP_DMA",
            iommufd,
            VFIO_IOMMU_UNMAP_DMA,
            &mut unmap,
        )?;
        Ok(unmap.size)
    }
}

/// EBADF for a number that is no open file.
#[cfg(feature = "capi")]
pub(crate) fn check_open(fd: RawFd) -> CallResult<()> {
    // SAFETY: fcntl takes any number and answers EBADF for one that is not open.
    uninterrupted("fcntl(F_GETFD)", || unsafe {
        libc::fcntl(fd, libc::F_GETFD)
    })
    .map(drop)
}

/// Keeps signals from the calling thread, one of ours: a program's handlers are for its own. What a thread's own
/// fault raises is not kept from it, or the process would end without a word.
pub(crate) fn block_signals() {
    // SAFETY: the set is filled before it is read, and the old one is not asked for.
    unsafe {
        let mut all = std::mem::MaybeUninit::uninit();
        libc::sigfillset(all.as_mut_ptr());
        for own in [
            libc::SIGSEGV,
            libc::SIGBUS,
            libc::SIGFPE,
            libc::SIGILL,
            libc::SIGTRAP,
        ] {
            libc::sigdelset(all.as_mut_ptr(), own);
        }
        libc::pthread_sigmask(libc::SIG_BLOCK, all.as_ptr(), std::ptr::null_mut());
    }
}
