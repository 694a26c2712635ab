// SPDX-License-Identifier: MIT OR Apache-2.0
//! A VM without a VMM: KVM, a guest_memfd, a memfd and an IOAS with a device, and the calls that a conversion makes of them.

use crate::failure::{Attempt, Failure};
use memmap2::{MmapOptions, MmapRaw};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;

const KVM_CREATE_VM: u64 = 0xae01;
const KVM_X86_SW_PROTECTED_VM: u64 = 1;
const KVM_CREATE_VCPU: u64 = 0xae41;
const KVM_GET_VCPU_MMAP_SIZE: u64 = 0xae04;
const KVM_GET_SREGS: u64 = 0x8138_ae83;
const KVM_SET_SREGS: u64 = 0x4138_ae84;
const KVM_SET_REGS: u64 = 0x4090_ae82;
const KVM_RUN: u64 = 0xae80;
const KVM_EXIT_IO: u32 = 2;
const KVM_CREATE_GUEST_MEMFD: u64 = 0xc040_aed4;
const KVM_SET_USER_MEMORY_REGION2: u64 = 0x40a0_ae49;
const KVM_MEM_GUEST_MEMFD: u32 = 4;
const KVM_MEMORY_ATTRIBUTE_PRIVATE: u64 = 8;
const IOMMU_IOAS_ALLOC: u64 = 0x3b81;
const IOMMU_OPTION: u64 = 0x3b87;
const IOMMU_OPTION_HUGE_PAGES: u32 = 1;
const IOMMU_VFIO_IOAS_SET: u16 = 1;
const IOMMU_IOAS_MAP_FLAGS: u32 = 7; // fixed IOVA, writeable, readable
const VFIO_DEVICE_BIND_IOMMUFD: u64 = 0x3b76;
const VFIO_DEVICE_ATTACH_IOMMUFD_PT: u64 = 0x3b77;

use super::calls::{
    IOMMU_IOAS_MAP_FILE, IOMMU_IOAS_UNMAP, IOMMU_VFIO_IOAS, KVM_SET_MEMORY_ATTRIBUTES,
    KVM_SET_MEMORY_ATTRIBUTES2, VFIO_IOMMU_UNMAP_DMA,
};

const GUEST_MEMFD_FLAG_MMAP: u64 = 1;
const GUEST_MEMFD_FLAG_INIT_SHARED: u64 = 2;
const GUEST_MEMFD_FLAG_HUGETLB: u64 = 4;
/// Of 2 MiB pages, in the lowest byte.
const PAGE_ORDER: u64 = 9;

#[repr(C)]
struct CreateGuestMemfd {
    size: u64,
    flags: u64,
    /// Its order is in the lowest byte, the rest reserved.
    page_order: u64,
    reserved: [u64; 5],
}

#[repr(C)]
struct MemoryRegion2 {
    slot: u32,
    flags: u32,
    guest_phys_addr: u64,
    memory_size: u64,
    userspace_addr: u64,
    guest_memfd_offset: u64,
    guest_memfd: u32,
    pad1: u32,
    pad2: [u64; 14],
}

#[repr(C)]
struct MemoryAttributes {
    address: u64,
    size: u64,
    attributes: u64,
    flags: u64,
}

#[repr(C)]
struct MemoryAttributes2 {
    offset: u64,
    size: u64,
    attributes: u64,
    flags: u64,
    error_offset: u64,
    reserved: [u64; 11],
}

#[repr(C)]
struct IoasAlloc {
    size: u32,
    flags: u32,
    out_ioas_id: u32,
}

#[repr(C)]
struct IommuOption {
    size: u32,
    option_id: u32,
    op: u16,
    reserved: u16,
    object_id: u32,
    value: u64,
}

#[repr(C)]
struct VfioIoas {
    size: u32,
    ioas_id: u32,
    op: u16,
    reserved: u16,
}

#[repr(C)]
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
struct IoasUnmap {
    size: u32,
    ioas_id: u32,
    iova: u64,
    length: u64,
}

#[repr(C)]
struct DmaUnmap {
    argsz: u32,
    flags: u32,
    iova: u64,
    size: u64,
}

#[repr(C)]
struct BindIommufd {
    argsz: u32,
    flags: u32,
    iommufd: i32,
    out_devid: u32,
}

#[repr(C)]
struct AttachPt {
    argsz: u32,
    flags: u32,
    pt_id: u32,
}

/// struct kvm_regs: sixteen registers, then these.
const RIP: usize = 16;
const RFLAGS: usize = 17;
/// Where the guest of a replay has its one instruction, and the end of what stays shared for it.
const CODE: u64 = 0x1000;
pub const CODE_END: u64 = 0x2000;
/// out 0x10, al; and again.
const EXIT_FOR_EVER: [u8; 4] = [0xe6, 0x10, 0xeb, 0xfc];

/// The two files of a split block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plane {
    Private,
    Shared,
}

/// What a VM's memory is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Memory {
    /// A memfd for what is shared, a guest_memfd for what is private.
    Split,
    /// One guest_memfd.
    InPlace,
    /// The same, of 2 MiB pages from the pool.
    InPlaceHuge,
}

/// A VM that can have private memory, with nothing in it.
pub fn new_vm() -> Result<OwnedFd, Failure> {
    let kvm = open("/dev/kvm")?;
    owned(
        call(&kvm, KVM_CREATE_VM, KVM_X86_SW_PROTECTED_VM),
        "KVM_CREATE_VM",
    )
}

/// Guest physical address, IOVA and offset in each file are one number here.
pub struct Kernel {
    vm: OwnedFd,
    memory: Memory,
    private: OwnedFd,
    /// In place the same file once more.
    shared: File,
    mapping: MmapRaw,
    iommufd: Option<Ioas>,
}

/// An IOAS with a device.
pub struct Ioas {
    iommufd: File,
    id: u32,
    // Attached for as long as it is open.
    _device: File,
}

impl Kernel {
    /// A split VM with one slot. Its IOAS gets the device of this PCI address, if one is given.
    pub fn new(bytes: u64, device: Option<(&str, bool)>) -> Result<Self, Failure> {
        Self::of(Memory::Split, bytes, device)
    }

    /// As `new`, of memory of any kind.
    pub fn of(memory: Memory, bytes: u64, device: Option<(&str, bool)>) -> Result<Self, Failure> {
        let vm = new_vm()?;
        let private = create_guest_memfd(&vm, memory, bytes)?;
        let shared = match memory {
            Memory::Split => create_memfd(bytes)?,
            _ => File::from(
                private
                    .try_clone()
                    .attempt(|| "duplicating the guest_memfd".into())?,
            ),
        };
        let mapping = MmapRaw::map_raw(&shared).attempt(|| "mapping the shared bytes".into())?;
        if memory == Memory::Split {
            // SAFETY: all of the mapping, whose bytes stay as they are.
            let advised = unsafe {
                let start = mapping.as_mut_ptr().cast();
                libc::madvise(start, mapping.len(), libc::MADV_HUGEPAGE)
            };
            result(advised.into()).attempt(|| "advising huge pages, as QEMU does".into())?;
        }
        add_slot(&vm, bytes, mapping.as_mut_ptr(), 0, &private)?;
        let iommufd = match device {
            Some((address, huge_pages)) => Some(Ioas::new(address, huge_pages)?),
            None => None,
        };
        let kernel = Self {
            vm,
            memory,
            private,
            shared,
            mapping,
            iommufd,
        };
        if memory == Memory::InPlaceHuge {
            // Such a file begins private.
            kernel
                .set_attributes(0, CODE_END, false)
                .attempt(|| "sharing the code".into())?;
        }
        // SAFETY: the mapping is larger, its beginning is shared, and nobody else has it yet.
        unsafe { write_code(kernel.mapping.as_mut_ptr()) };
        kernel
            .set_attributes(CODE_END, bytes - CODE_END, true)
            .attempt(|| "turning the memory private".into())?;
        Ok(kernel)
    }

    /// A vCPU whose guest does nothing but leave.
    pub fn vcpu(&self, number: u64) -> Result<Vcpu, Failure> {
        Vcpu::new(&self.vm, number)
    }

    /// Writes to each page, which must be shared.
    pub fn touch(&self, address: u64, bytes: u64) {
        // SAFETY: callers name a shared part of the mapping, of which nobody has a reference.
        unsafe { touch(self.mapping.as_mut_ptr().add(address as usize), bytes) };
    }

    pub fn set_attributes(&self, address: u64, bytes: u64, private: bool) -> io::Result<()> {
        let attributes = if private {
            KVM_MEMORY_ATTRIBUTE_PRIVATE
        } else {
            0
        };
        if self.memory != Memory::Split {
            let mut attributes = MemoryAttributes2 {
                offset: address,
                size: bytes,
                attributes,
                flags: 0,
                error_offset: 0,
                reserved: [0; 11],
            };
            return call(
                &self.private,
                KVM_SET_MEMORY_ATTRIBUTES2,
                &raw mut attributes as u64,
            )
            .map(|_| ());
        }
        let attributes = MemoryAttributes {
            address,
            size: bytes,
            attributes,
            flags: 0,
        };
        call(
            &self.vm,
            KVM_SET_MEMORY_ATTRIBUTES,
            &raw const attributes as u64,
        )
        .map(|_| ())
    }

    pub fn map(&self, address: u64, bytes: u64) -> io::Result<()> {
        let ioas = self.ioas()?;
        let map = IoasMapFile {
            size: size_of::<IoasMapFile>() as u32,
            flags: IOMMU_IOAS_MAP_FLAGS,
            ioas_id: ioas.id,
            fd: self.shared.as_raw_fd(),
            start: address,
            length: bytes,
            iova: address,
        };
        call(&ioas.iommufd, IOMMU_IOAS_MAP_FILE, &raw const map as u64).map(|_| ())
    }

    /// Whole areas only.
    pub fn unmap(&self, address: u64, bytes: u64) -> io::Result<()> {
        let ioas = self.ioas()?;
        let unmap = IoasUnmap {
            size: size_of::<IoasUnmap>() as u32,
            ioas_id: ioas.id,
            iova: address,
            length: bytes,
        };
        call(&ioas.iommufd, IOMMU_IOAS_UNMAP, &raw const unmap as u64).map(|_| ())
    }

    /// Any part of areas, of the IOAS that `name_ioas` named.
    pub fn cut(&self, address: u64, bytes: u64) -> io::Result<()> {
        let ioas = self.ioas()?;
        let unmap = DmaUnmap {
            argsz: size_of::<DmaUnmap>() as u32,
            flags: 0,
            iova: address,
            size: bytes,
        };
        call(&ioas.iommufd, VFIO_IOMMU_UNMAP_DMA, &raw const unmap as u64).map(|_| ())
    }

    pub fn name_ioas(&self) -> io::Result<()> {
        let ioas = self.ioas()?;
        let set = VfioIoas {
            size: size_of::<VfioIoas>() as u32,
            ioas_id: ioas.id,
            op: IOMMU_VFIO_IOAS_SET,
            reserved: 0,
        };
        call(&ioas.iommufd, IOMMU_VFIO_IOAS, &raw const set as u64).map(|_| ())
    }

    pub fn fallocate(&self, plane: Plane, mode: i32, offset: u64, bytes: u64) -> io::Result<()> {
        let fd = match plane {
            Plane::Private => self.private.as_raw_fd(),
            Plane::Shared => self.shared.as_raw_fd(),
        };
        // SAFETY: no memory of ours is involved: nobody looks at the mapping.
        result(unsafe { libc::fallocate(fd, mode, offset as i64, bytes as i64) }.into()).map(|_| ())
    }

    pub fn madvise(&self, advice: i32, offset: u64, bytes: u64) -> io::Result<()> {
        // SAFETY: the range lies in the mapping, which nobody reads.
        let done = unsafe {
            let start = self.mapping.as_mut_ptr().add(offset as usize);
            libc::madvise(start.cast(), bytes as usize, advice)
        };
        result(done.into()).map(|_| ())
    }

    fn ioas(&self) -> io::Result<&Ioas> {
        self.iommufd
            .as_ref()
            .ok_or_else(|| io::Error::from_raw_os_error(libc::ENODEV))
    }
}

/// A vCPU of the replay.
pub struct Vcpu {
    fd: OwnedFd,
    run: MmapRaw,
}

impl Vcpu {
    /// Its guest begins at `CODE`, which must hold what `write_code` writes.
    pub fn new(vm: &OwnedFd, number: u64) -> Result<Self, Failure> {
        let kvm = open("/dev/kvm")?;
        let bytes =
            call(&kvm, KVM_GET_VCPU_MMAP_SIZE, 0).attempt(|| "KVM_GET_VCPU_MMAP_SIZE".into())?;
        let fd = owned(call(vm, KVM_CREATE_VCPU, number), "KVM_CREATE_VCPU")?;
        let run = MmapOptions::new()
            .len(bytes as usize)
            .map_raw(&fd)
            .attempt(|| "mapping a vCPU".into())?;
        let mut special = [0u64; 39];
        call(&fd, KVM_GET_SREGS, special.as_mut_ptr() as u64).attempt(|| "KVM_GET_SREGS".into())?;
        // struct kvm_segment begins with the base; behind that and the limit is the selector.
        special[0] = 0;
        special[1] &= !(0xffff << 32);
        call(&fd, KVM_SET_SREGS, special.as_ptr() as u64).attempt(|| "KVM_SET_SREGS".into())?;
        let mut registers = [0u64; 18];
        registers[RIP] = CODE;
        registers[RFLAGS] = 2;
        call(&fd, KVM_SET_REGS, registers.as_ptr() as u64).attempt(|| "KVM_SET_REGS".into())?;
        Ok(Self { fd, run })
    }

    /// Into the guest and out again.
    pub fn visit(&self) -> Result<(), Failure> {
        call(&self.fd, KVM_RUN, 0).attempt(|| "the replay's KVM_RUN".into())?;
        // SAFETY: struct kvm_run is longer; the kernel writes to it only during KVM_RUN.
        let reason = unsafe { self.run.as_ptr().add(8).cast::<u32>().read_volatile() };
        match reason {
            KVM_EXIT_IO => Ok(()),
            _ => Err(Failure::new(format!(
                "the replay's guest left for reason {reason}"
            ))),
        }
    }
}

impl Ioas {
    /// With the device of this PCI address. Without `huge_pages` any part of a mapping can be taken out of it.
    pub fn new(device: &str, huge_pages: bool) -> Result<Self, Failure> {
        let iommufd = open("/dev/iommu")?;
        let mut alloc = IoasAlloc {
            size: size_of::<IoasAlloc>() as u32,
            flags: 0,
            out_ioas_id: 0,
        };
        call(&iommufd, IOMMU_IOAS_ALLOC, &raw mut alloc as u64)
            .attempt(|| "IOMMU_IOAS_ALLOC".into())?;
        let id = alloc.out_ioas_id;
        if !huge_pages {
            let option = IommuOption {
                size: size_of::<IommuOption>() as u32,
                option_id: IOMMU_OPTION_HUGE_PAGES,
                op: 0,
                reserved: 0,
                object_id: id,
                value: 0,
            };
            call(&iommufd, IOMMU_OPTION, &raw const option as u64)
                .attempt(|| "IOMMU_OPTION".into())?;
        }
        let node = character_device(device)?;
        let cdev = open(&node)?;
        let mut bind = BindIommufd {
            argsz: size_of::<BindIommufd>() as u32,
            flags: 0,
            iommufd: iommufd.as_raw_fd(),
            out_devid: 0,
        };
        call(&cdev, VFIO_DEVICE_BIND_IOMMUFD, &raw mut bind as u64)
            .attempt(|| format!("VFIO_DEVICE_BIND_IOMMUFD of {node}"))?;
        let attach = AttachPt {
            argsz: size_of::<AttachPt>() as u32,
            flags: 0,
            pt_id: id,
        };
        call(
            &cdev,
            VFIO_DEVICE_ATTACH_IOMMUFD_PT,
            &raw const attach as u64,
        )
        .attempt(|| format!("VFIO_DEVICE_ATTACH_IOMMUFD_PT of {node}"))?;
        Ok(Self {
            iommufd,
            id,
            _device: cdev,
        })
    }

    pub fn iommufd(&self) -> &File {
        &self.iommufd
    }

    pub fn id(&self) -> u32 {
        self.id
    }
}

fn create_guest_memfd(vm: &OwnedFd, memory: Memory, bytes: u64) -> Result<OwnedFd, Failure> {
    let (flags, page_order) = match memory {
        Memory::Split => (0, 0),
        Memory::InPlace => (GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED, 0),
        Memory::InPlaceHuge => (GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_HUGETLB, PAGE_ORDER),
    };
    let mut create = CreateGuestMemfd {
        size: bytes,
        flags,
        page_order,
        reserved: [0; 5],
    };
    owned(
        call(vm, KVM_CREATE_GUEST_MEMFD, &raw mut create as u64),
        "KVM_CREATE_GUEST_MEMFD",
    )
}

fn create_memfd(bytes: u64) -> Result<File, Failure> {
    // SAFETY: a literal name; the descriptor is new and ours.
    let memfd = unsafe { libc::memfd_create(c"bare".as_ptr(), libc::MFD_CLOEXEC) };
    let file = File::from(owned(result(memfd.into()), "memfd_create")?);
    file.set_len(bytes)
        .attempt(|| "giving the memfd its size".into())?;
    Ok(file)
}

/// Shows a guest_memfd, and the mapping of its shared bytes, from guest physical address 0 on.
pub fn add_slot(
    vm: &OwnedFd,
    bytes: u64,
    mapping: *mut u8,
    offset: u64,
    guest_memfd: &impl AsRawFd,
) -> Result<(), Failure> {
    let region = MemoryRegion2 {
        slot: 0,
        flags: KVM_MEM_GUEST_MEMFD,
        guest_phys_addr: 0,
        memory_size: bytes,
        userspace_addr: mapping as u64,
        guest_memfd_offset: offset,
        guest_memfd: guest_memfd.as_raw_fd() as u32,
        pad1: 0,
        pad2: [0; 14],
    };
    call(vm, KVM_SET_USER_MEMORY_REGION2, &raw const region as u64)
        .map(|_| ())
        .attempt(|| "KVM_SET_USER_MEMORY_REGION2".into())
}

/// Puts the guest of a vCPU where it begins.
///
/// # Safety
/// `memory` is the mapping of guest physical address 0, up to `CODE_END` at least, and shared.
pub unsafe fn write_code(memory: *mut u8) {
    // SAFETY: by the contract.
    unsafe {
        let code = memory.add(CODE as usize);
        code.copy_from_nonoverlapping(EXIT_FOR_EVER.as_ptr(), EXIT_FOR_EVER.len());
    }
}

/// Writes to each page.
///
/// # Safety
/// So many bytes are mapped there, they are shared, and nobody has a reference to them.
pub unsafe fn touch(memory: *mut u8, bytes: u64) {
    for at in (0..bytes as usize).step_by(4096) {
        // SAFETY: by the contract.
        unsafe { memory.add(at).write_volatile(1) };
    }
}

/// /dev/vfio/devices/vfioN of a device that vfio-pci has.
fn character_device(address: &str) -> Result<String, Failure> {
    let folder = format!("/sys/bus/pci/devices/{address}/vfio-dev");
    fs::read_dir(&folder)
        .attempt(|| format!("reading {folder}"))?
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .next()
        .map(|name| format!("/dev/vfio/devices/{name}"))
        .attempt(|| format!("{folder} is empty"))
}

fn open(path: &str) -> Result<File, Failure> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .open(Path::new(path))
        .attempt(|| format!("opening {path}"))
}

fn call(fd: &impl AsRawFd, command: u64, argument: u64) -> io::Result<i64> {
    // SAFETY: each caller passes a number or a structure of the command's that outlives the call.
    result(unsafe { libc::ioctl(fd.as_raw_fd(), command, argument) }.into())
}

fn result(value: i64) -> io::Result<i64> {
    match value {
        0.. => Ok(value),
        _ => Err(io::Error::last_os_error()),
    }
}

fn owned(fd: io::Result<i64>, what: &str) -> Result<OwnedFd, Failure> {
    let fd = fd.attempt(|| what.to_string())?;
    // SAFETY: the kernel has just returned it, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}
