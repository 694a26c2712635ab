// SPDX-License-Identifier: MIT OR Apache-2.0
//! The system calls of these tests, with errno as it is.

use crate::{MMAP, PAGE};
use libc::{c_int, c_ulong, c_void};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;

pub const KVM_CREATE_VM: c_ulong = 0xae01;
pub const KVM_CHECK_EXTENSION: c_ulong = 0xae03;
pub const KVM_CREATE_GUEST_MEMFD: c_ulong = 0xc040_aed4;
pub const KVM_SET_MEMORY_ATTRIBUTES: c_ulong = 0x4020_aed2;
pub const KVM_SET_MEMORY_ATTRIBUTES2: c_ulong = 0xc080_aed2;
pub const KVM_SET_USER_MEMORY_REGION2: c_ulong = 0x40a0_ae49;

/// `struct kvm_memory_attributes2`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Attributes2 {
    pub offset: u64,
    pub size: u64,
    pub attributes: u64,
    pub flags: u64,
    pub error_offset: u64,
    pub reserved: [u64; 11],
}

/// `struct kvm_memory_attributes`: the VM's, by guest address.
#[repr(C)]
#[derive(Default)]
pub struct Attributes1 {
    pub address: u64,
    pub size: u64,
    pub attributes: u64,
    pub flags: u64,
}

/// `struct kvm_create_guest_memfd`.
#[repr(C)]
#[derive(Default)]
struct Create {
    size: u64,
    flags: u64,
    reserved: [u64; 6],
}

/// `struct kvm_userspace_memory_region2`.
#[repr(C)]
#[derive(Default)]
pub struct Region {
    pub slot: u32,
    pub flags: u32,
    pub guest_phys_addr: u64,
    pub memory_size: u64,
    pub userspace_addr: u64,
    pub guest_memfd_offset: u64,
    pub guest_memfd: u32,
    pub pad1: u32,
    pub pad2: [u64; 14],
}

/// `struct kvm_pre_fault_memory`.
#[repr(C)]
#[derive(Default)]
pub struct PreFault {
    pub gpa: u64,
    pub size: u64,
    pub flags: u64,
    pub padding: [u64; 5],
}

const fn encoded(request: c_ulong) -> usize {
    (request >> 16 & 0x3fff) as usize
}

const _: () = {
    assert!(size_of::<Attributes2>() == encoded(KVM_SET_MEMORY_ATTRIBUTES2));
    assert!(size_of::<Attributes1>() == encoded(KVM_SET_MEMORY_ATTRIBUTES));
    assert!(size_of::<Create>() == encoded(KVM_CREATE_GUEST_MEMFD));
    assert!(size_of::<Region>() == encoded(KVM_SET_USER_MEMORY_REGION2));
};

pub fn errno() -> i32 {
    io::Error::last_os_error().raw_os_error().unwrap()
}

fn checked(result: c_int) -> Result<c_int, i32> {
    match result {
        -1 => Err(errno()),
        fine => Ok(fine),
    }
}

pub fn ioctl<T>(fd: RawFd, request: c_ulong, argument: &mut T) -> Result<c_int, i32> {
    // SAFETY: every caller passes the structure that the request takes.
    checked(unsafe { libc::ioctl(fd, request, &raw mut *argument) })
}

pub fn ioctl_number(fd: RawFd, request: c_ulong, argument: u64) -> Result<c_int, i32> {
    // SAFETY: these requests take a number, or a pointer that the kernel is to find bad.
    checked(unsafe { libc::ioctl(fd, request, argument) })
}

fn owned(fd: c_int) -> OwnedFd {
    // SAFETY: the kernel just gave this number to us.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

pub struct Vm(pub OwnedFd);

impl Vm {
    pub fn new(vm_type: u64) -> io::Result<Self> {
        let kvm = File::options().read(true).write(true).open("/dev/kvm")?;
        ioctl_number(kvm.as_raw_fd(), KVM_CREATE_VM, vm_type)
            .map(|fd| Self(owned(fd)))
            .map_err(io::Error::from_raw_os_error)
    }

    pub fn fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }

    pub fn extension(&self, cap: u64) -> c_int {
        ioctl_number(self.fd(), KVM_CHECK_EXTENSION, cap).unwrap()
    }

    pub fn gmem(&self, size: u64, flags: u64) -> Result<Gmem, i32> {
        let mut create = Create {
            size,
            flags,
            ..Default::default()
        };
        let fd = ioctl(self.fd(), KVM_CREATE_GUEST_MEMFD, &mut create)?;
        Ok(Gmem(owned(fd).into()))
    }

    /// One of huge pages of 2 MiB that can be mapped. EINVAL also where bit 2 means something else.
    pub fn huge_gmem(&self, size: u64) -> Result<Gmem, i32> {
        let mut create = Create {
            size,
            flags: MMAP | 1 << 2,
            // `page_order` is the first byte of what is reserved elsewhere.
            reserved: [9, 0, 0, 0, 0, 0],
        };
        let fd = ioctl(self.fd(), KVM_CREATE_GUEST_MEMFD, &mut create)?;
        Ok(Gmem(owned(fd).into()))
    }

    /// A file that can be mapped, and its mapping.
    pub fn mapped(&self, pages: u64, flags: u64) -> (Gmem, Map) {
        let gmem = self.gmem(pages * PAGE, MMAP | flags).unwrap();
        let map = gmem.map(pages);
        (gmem, map)
    }

    /// A slot over all of the file. Size 0 deletes it.
    pub fn slot(&self, gpa: u64, size: u64, gmem: &Gmem, host: *mut u8) -> Result<(), i32> {
        let mut region = Region {
            slot: 0,
            flags: 1 << 2,
            guest_phys_addr: gpa,
            memory_size: size,
            userspace_addr: host as u64,
            guest_memfd: gmem.fd() as u32,
            ..Default::default()
        };
        ioctl(self.fd(), KVM_SET_USER_MEMORY_REGION2, &mut region).map(drop)
    }
}

/// A guest_memfd.
pub struct Gmem(pub File);

impl Gmem {
    pub fn fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }

    pub fn set_attributes(&self, request: &mut Attributes2) -> Result<(), i32> {
        ioctl(self.fd(), KVM_SET_MEMORY_ATTRIBUTES2, request).map(drop)
    }

    pub fn map(&self, pages: u64) -> Map {
        self.map_with(pages, 0)
    }

    pub fn map_with(&self, pages: u64, flags: c_int) -> Map {
        let size = (pages * PAGE) as usize;
        // SAFETY: a new mapping, at an address of the kernel's choice.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | flags,
                self.fd(),
                0,
            )
        };
        assert_ne!(start, libc::MAP_FAILED, "{}", io::Error::last_os_error());
        Map {
            start: start.cast(),
            size,
        }
    }

    pub fn allocate(&self, first: u64, count: u64) -> Result<(), i32> {
        self.fallocate(libc::FALLOC_FL_KEEP_SIZE, first, count)
    }

    pub fn punch(&self, first: u64, count: u64) -> Result<(), i32> {
        let mode = libc::FALLOC_FL_KEEP_SIZE | libc::FALLOC_FL_PUNCH_HOLE;
        self.fallocate(mode, first, count)
    }

    fn fallocate(&self, mode: c_int, first: u64, count: u64) -> Result<(), i32> {
        let (offset, length) = ((first * PAGE) as i64, (count * PAGE) as i64);
        loop {
            // SAFETY: only numbers are passed.
            let result = unsafe { libc::fallocate(self.fd(), mode, offset, length) };
            match checked(result) {
                // A ring's work counts as a signal, and what was done stays done.
                Err(libc::EINTR) => {}
                other => return other.map(drop),
            }
        }
    }
}

/// Host memory, read and written as a device or another process would: no reference to it is ever made.
pub struct Map {
    start: *mut u8,
    size: usize,
}

// SAFETY: only raw accesses, of memory that anybody may use at any time.
unsafe impl Sync for Map {}

impl Map {
    pub fn page(&self, page: u64) -> *mut u8 {
        assert!((page * PAGE) < self.size as u64);
        // SAFETY: in the mapping.
        unsafe { self.start.add((page * PAGE) as usize) }
    }

    /// Only of shared pages: SIGBUS ends the test otherwise.
    pub fn read(&self, page: u64) -> u8 {
        // SAFETY: in the mapping; other users are expected.
        unsafe { self.page(page).read_volatile() }
    }

    /// Only to shared pages.
    pub fn write(&self, page: u64, byte: u8) {
        // SAFETY: as above.
        unsafe { self.page(page).write_volatile(byte) }
    }

    /// Whether this process's page tables have the page.
    pub fn present(&self, page: u64) -> bool {
        self.pagemap(page) >> 63 == 1
    }

    /// The page's entry in /proc/self/pagemap.
    pub fn pagemap(&self, page: u64) -> u64 {
        let pagemap = File::open("/proc/self/pagemap").unwrap();
        let mut entry = [0; 8];
        let place = self.page(page) as u64 / PAGE * 8;
        pagemap.read_exact_at(&mut entry, place).unwrap();
        u64::from_ne_bytes(entry)
    }

    pub fn count_present(&self) -> u64 {
        let pages = self.size as u64 / PAGE;
        (0..pages).filter(|page| self.present(*page)).count() as u64
    }

    pub fn iovec(&self, page: u64) -> libc::iovec {
        libc::iovec {
            iov_base: self.page(page).cast(),
            iov_len: PAGE as usize,
        }
    }

    pub fn madvise(&self, first: u64, count: u64, advice: c_int) -> Result<(), i32> {
        // SAFETY: in the mapping, and nothing in it belongs to Rust.
        let result =
            unsafe { libc::madvise(self.page(first).cast(), (count * PAGE) as usize, advice) };
        checked(result).map(drop)
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: our own mapping.
        unsafe { libc::munmap(self.start.cast(), self.size) };
    }
}

/// A ring that does nothing but hold buffers, which pins their pages.
pub struct Ring(OwnedFd);

const IORING_REGISTER_BUFFERS: c_int = 0;
const IORING_UNREGISTER_BUFFERS: c_int = 1;

impl Ring {
    pub fn new() -> io::Result<Self> {
        // `struct io_uring_params`, all of it for the kernel to choose.
        let mut parameters = [0u64; 15];
        // SAFETY: the structure that the call takes.
        let fd =
            unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, parameters.as_mut_ptr()) } as c_int;
        match fd {
            -1 => Err(io::Error::last_os_error()),
            fd => Ok(Self(owned(fd))),
        }
    }

    pub fn register(&self, buffers: &[libc::iovec]) -> Result<(), i32> {
        self.call(
            IORING_REGISTER_BUFFERS,
            buffers.as_ptr().cast(),
            buffers.len() as u32,
        )
    }

    pub fn unregister(&self) -> Result<(), i32> {
        self.call(IORING_UNREGISTER_BUFFERS, std::ptr::null(), 0)
    }

    fn call(&self, operation: c_int, argument: *const c_void, count: u32) -> Result<(), i32> {
        // SAFETY: the array that the operation takes.
        checked(unsafe {
            libc::syscall(
                libc::SYS_io_uring_register,
                self.0.as_raw_fd(),
                operation,
                argument,
                count,
            )
        } as c_int)
        .map(drop)
    }
}

/// Both ends of a pipe: to read from, to write to.
pub fn pipe() -> (OwnedFd, OwnedFd) {
    let mut ends = [0; 2];
    // SAFETY: an array for two numbers.
    assert_eq!(unsafe { libc::pipe(ends.as_mut_ptr()) }, 0);
    (owned(ends[0]), owned(ends[1]))
}

/// Runs `job` in a child process and returns what it returned. `job` may make system calls and nothing that a lock or
/// an allocation is needed for: other threads are not there to give them back.
pub fn in_child(job: impl FnOnce() -> u8) -> Child {
    // SAFETY: the child only runs `job` and leaves.
    match unsafe { libc::fork() } {
        0 => {
            let code = job();
            // SAFETY: ends this process at once.
            unsafe { libc::_exit(code.into()) }
        }
        -1 => panic!("fork: {}", io::Error::last_os_error()),
        pid => Child(pid),
    }
}

pub struct Child(libc::pid_t);

impl Child {
    pub fn result(self) -> u8 {
        let mut status = 0;
        // SAFETY: a child of ours that nobody else waits for.
        assert_eq!(unsafe { libc::waitpid(self.0, &mut status, 0) }, self.0);
        assert!(libc::WIFEXITED(status), "child: wait status {status:#x}");
        libc::WEXITSTATUS(status) as u8
    }
}

/// What `in_child` returns where the job was ended by SIGBUS at an address that has no page to give (BUS_ADRERR).
pub const NO_SUCH_PAGE: u8 = 201;
/// Another kind of SIGBUS.
const OTHER_SIGBUS: u8 = 202;

/// From now on, SIGBUS ends this process with one of the codes above. For children.
pub fn end_at_sigbus() {
    extern "C" fn handler(_: c_int, info: *mut libc::siginfo_t, _: *mut c_void) {
        // SAFETY: the kernel passes it; _exit may be called here.
        unsafe {
            let code = match (*info).si_code {
                libc::BUS_ADRERR => NO_SUCH_PAGE,
                _ => OTHER_SIGBUS,
            };
            libc::_exit(code.into());
        }
    }
    let handler: extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) = handler;
    // SAFETY: a zeroed sigaction is valid.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler as libc::sighandler_t;
        action.sa_flags = libc::SA_SIGINFO;
        libc::sigaction(libc::SIGBUS, &action, std::ptr::null_mut());
    }
}
