// SPDX-License-Identifier: MIT OR Apache-2.0
//! The C ABI: converts types, catches panics, and has no logic of its own. `include/gmem.h` is
//! generated from here.
//!
//! Handles are never dereferenced: each names an entry in a table, so that a stale, foreign or null
//! handle is an error and not a crash. Every function returns 0 or a negative errno, unless it
//! says otherwise, and leaves a sentence for [`gmem_last_error`]. A function may be called from any
//! thread, at any time: also in exit handlers, when the thread's own variables are gone.
#![allow(non_camel_case_types)]

mod handles;
mod last_error;
mod structs;

pub use structs::*;

use crate::block::{Block, BlockConfig};
use crate::error::{Error, Result};
use crate::faults::MemoryFault;
use crate::listeners::{Change, Listener, ListenerId};
use crate::vm::Vm;
use crate::{Attribute, Window, WindowConfig};
use handles::Table;
use last_error::Last;
use std::ffi::{c_char, c_int, c_void, CStr, CString};
use std::os::fd::AsRawFd;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::{Arc, LazyLock};

/// One KVM VM.
#[derive(Debug)]
pub struct gmem_vm {
    _opaque: [u8; 0],
}

/// One backend instance: guest memory of one size.
#[derive(Debug)]
pub struct gmem_block {
    _opaque: [u8; 0],
}

/// One IOAS, and the range of IOVAs in it that shows part of a block.
#[derive(Debug)]
pub struct gmem_window {
    _opaque: [u8; 0],
}

/// One registration of a listener.
#[derive(Debug)]
pub struct gmem_listener {
    _opaque: [u8; 0],
}

static VMS: LazyLock<Table<Vm>> = LazyLock::new(Table::default);
static BLOCKS: LazyLock<Table<Block>> = LazyLock::new(Table::default);
static WINDOWS: LazyLock<Table<(Arc<Block>, Arc<Window>)>> = LazyLock::new(Table::default);
static LISTENERS: LazyLock<Table<(Arc<Block>, ListenerId)>> = LazyLock::new(Table::default);

/// Runs `body` so that neither a panic nor an error crosses the boundary as anything but an errno.
fn guarded(body: impl FnOnce() -> Result<()>) -> c_int {
    let error = match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(())) => return 0,
        Ok(Err(error)) => (error.errno(), Last::Error(error)),
        Err(panic) => {
            let what = panic
                .downcast_ref::<String>()
                .map(String::as_str)
                .or_else(|| panic.downcast_ref::<&str>().copied())
                .unwrap_or("no message");
            let text = format!("a bug in gmem: {what}");
            log::error!("{text}");
            (libc::EIO, Last::Text(text))
        }
    };
    last_error::set(error.1);
    -error.0
}

fn null(what: &str) -> Error {
    Error::Invalid(format!("{what} is NULL"))
}

fn vm_of(vm: *const gmem_vm) -> Result<Arc<Vm>> {
    VMS.get(vm as usize, "VM")
}

fn block_of(block: *const gmem_block) -> Result<Arc<Block>> {
    BLOCKS.get(block as usize, "block")
}

/// Stores a handle for the caller.
///
/// # Safety
/// `out` is null or points to memory for a pointer.
unsafe fn give<T>(out: *mut *mut T, handle: impl FnOnce() -> Result<usize>) -> Result<()> {
    if out.is_null() {
        return Err(null("the place for the new handle"));
    }
    let handle = handle()?;
    // SAFETY: not null, and the caller vouches for the rest.
    unsafe { out.write(handle as *mut T) };
    Ok(())
}

/// Version of the library as "major.minor.patch"; static.
#[no_mangle]
pub extern "C" fn gmem_version() -> *const c_char {
    concat!(env!("CARGO_PKG_VERSION"), "\0").as_ptr().cast()
}

/// What the last gmem call of this thread that failed has to say: a sentence for the user, in
/// UTF-8, without a newline. Empty if none has failed. Valid until this thread's next failing gmem
/// call, or the thread's end. Never NULL. As all calls, it may also be made in exit handlers, and in
/// destructors of thread-specific data (pthread_key_create). The sentence is made when it is asked for: to
/// name who holds a page that can't become private (EAGAIN) takes a look at all files of the process, a tenth of
/// a second for 4,000. So ask if it is to be printed, and without a lock that others wait for.
///
/// C evaluates the arguments of one call in any order: printf("%d: %s", gmem_convert(…),
/// gmem_last_error()) may ask before there is an answer. Keep the errno in a variable first.
#[no_mangle]
pub extern "C" fn gmem_last_error() -> *const c_char {
    // A panic in making the sentence would be a bug of its own.
    let last = catch_unwind(last_error::get).unwrap_or(std::ptr::null());
    if last.is_null() {
        return c"".as_ptr();
    }
    last
}

/// Receives one message: a level (GMEM_LOG_…) and a NUL-terminated line without a newline. It may
/// be called on any thread, with locks of the library held, and must not call the library.
pub type gmem_log_fn =
    Option<unsafe extern "C" fn(opaque: *mut c_void, level: u32, message: *const c_char)>;

struct Log {
    function: unsafe extern "C" fn(*mut c_void, u32, *const c_char),
    opaque: *mut c_void,
}

// SAFETY: `gmem_set_log` makes its caller promise that the function may run on any thread.
unsafe impl Send for Log {}
// SAFETY: as above.
unsafe impl Sync for Log {}

impl log::Log for Log {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &log::Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        if let Ok(message) = CString::new(record.args().to_string()) {
            // SAFETY: the string lives across the call; the caller of `gmem_set_log` vouches for
            // the function and its argument.
            unsafe { (self.function)(self.opaque, record.level() as u32, message.as_ptr()) };
        }
    }

    fn flush(&self) {}
}

/// Sends the library's messages up to `max_level` (GMEM_LOG_ERROR … GMEM_LOG_TRACE) to `log`, and
/// also those of a panic, which is a bug. Once per process; without it messages are dropped.
///
/// -EINVAL: `log` is NULL or the level unknown. -EBUSY: there is a receiver already.
///
/// # Safety
/// `log` and `opaque` stay valid for the rest of the process, for any thread.
#[no_mangle]
pub unsafe extern "C" fn gmem_set_log(
    log: gmem_log_fn,
    opaque: *mut c_void,
    max_level: u32,
) -> c_int {
    guarded(|| {
        let function = log.ok_or_else(|| null("the log function"))?;
        let level = match max_level {
            GMEM_LOG_ERROR => log::LevelFilter::Error,
            GMEM_LOG_WARN => log::LevelFilter::Warn,
            GMEM_LOG_INFO => log::LevelFilter::Info,
            GMEM_LOG_DEBUG => log::LevelFilter::Debug,
            GMEM_LOG_TRACE => log::LevelFilter::Trace,
            other => return Err(Error::Invalid(format!("{other} is no log level"))),
        };
        log::set_boxed_logger(Box::new(Log { function, opaque }))
            .map_err(|_| Error::Busy("messages have a receiver already".into()))?;
        log::set_max_level(level);
        std::panic::set_hook(Box::new(|panic| log::error!("{panic}")));
        Ok(())
    })
}

/// Opens the VM behind a KVM VM file, which is duplicated: close yours whenever you like. Ends with
/// gmem_vm_free().
///
/// -EBADF: `vm_fd` isn't open. -ENOTTY: it isn't a KVM VM. -EINVAL: `vm` is NULL.
///
/// # Safety
/// `vm` is NULL or points to memory for a pointer, which is written on success only.
#[no_mangle]
pub unsafe extern "C" fn gmem_vm_new(vm_fd: c_int, vm: *mut *mut gmem_vm) -> c_int {
    // SAFETY: the caller's promise is `give`'s.
    guarded(|| unsafe { give(vm, || Ok(VMS.insert(Vm::new(vm_fd)?))) })
}

/// Ends a VM: the library's file of it is closed. NULL is fine.
///
/// -EBUSY: it has blocks; nothing happened. -EINVAL: no such VM (any more).
#[no_mangle]
pub extern "C" fn gmem_vm_free(vm: *mut gmem_vm) -> c_int {
    guarded(|| {
        if vm.is_null() {
            return Ok(());
        }
        let inner = vm_of(vm)?;
        if BLOCKS.any(|block| Arc::ptr_eq(block.vm(), &inner)) {
            return Err(Error::Busy("the VM still has blocks".into()));
        }
        VMS.remove(vm as usize, "VM").map(drop)
    })
}

/// Lets go of a VM whose KVM file is about to be rebuilt, as on a reset of some confidential guests:
/// DMA out of all windows, bindings ended, guest_memfds closed, and the library's file of the VM.
/// Windows, listeners and blocks stay, and so do the addresses of gmem_block_host(), which can't be
/// touched now where they were a guest_memfd. Memory slots must be gone and no vCPU may run. Bytes
/// and attributes are lost. Takes bindings and every range: waits for all conversions.
///
/// Until gmem_vm_attach(), what needs the VM fails with -EBUSY: conversions, bindings, new blocks,
/// preallocation. Blocks and windows may end, and windows come, which show nothing yet. Listeners
/// are told of pages that have another attribute than at first. Does nothing the second time.
///
/// -EINVAL: no such VM. -EMFILE, -ENOMEM, or the errno of a window that refused to unmap: the VM is
/// attached, as before.
#[no_mangle]
pub extern "C" fn gmem_vm_detach(vm: *mut gmem_vm) -> c_int {
    guarded(|| vm_of(vm)?.detach())
}

/// Gives a detached VM its new KVM file, which is duplicated: new files for all blocks, at the same
/// addresses and with the same file numbers; every page has its initial attribute; windows are filled
/// again. Whatever is at the addresses by then, such as zeros that the caller showed meanwhile, is
/// replaced. Bindings and memory slots are the caller's to make, and so is advice (madvise) on the
/// memory, whose mapping is a new one.
///
/// -EINVAL: no such VM. -EBUSY: it isn't detached. -EBADF, -ENOTTY: `new_vm_fd` is no KVM VM.
/// -ENOTSUP: it is of another kind. -ENOMEM, …: creating, mapping or pinning failed. The
/// VM stays detached then.
#[no_mangle]
pub extern "C" fn gmem_vm_attach(vm: *mut gmem_vm, new_vm_fd: c_int) -> c_int {
    guarded(|| vm_of(vm)?.attach(new_vm_fd))
}

/// Prepares the end of the process, as an exit handler does: in blocks that convert in place all
/// private bytes are lost, and with them the files' record of what is private, which the host's kernel
/// is spared to take apart (a guest can make it such that Linux 7.3 fails at that). Threads may still
/// run: memory stays mapped, and shared bytes stay what they are but in huge pages that have a private
/// part; devices keep what they reach but in blocks of huge pages. What a vCPU that still runs writes
/// to a private page between the two calls that end it goes as well, but for a moment in between host
/// threads, and who else has the file mapped, could read it: stop the vCPUs first, and no private byte
/// is ever shown. Nothing converts any more: what
/// needs the VM fails with -EBUSY. Does nothing for blocks of other kinds, nor for those with 16 private
/// runs or fewer, which no kernel fails at: their private bytes stay private, in the file. Called again, it does what it
/// could not do before, and nothing else; so does the end of each block.
///
/// Takes the range of each block that converts in place, and waits a second for all of
/// them at most. What can't be done in a block is logged.
///
/// -EINVAL: no such VM. -EBUSY: conversions under way did not end in time, and the files are as they
/// were; or what else was under way in some blocks did not, such as gmem_block_preallocate(), and their
/// files are. gmem_last_error() says which. Nothing converts all the same.
#[no_mangle]
pub extern "C" fn gmem_vm_end(vm: *mut gmem_vm) -> c_int {
    guarded(|| vm_of(vm)?.end())
}

/// What the kernel can do for this VM.
///
/// -EINVAL: a NULL, a stale VM, or a `struct_size` of no version.
///
/// # Safety
/// `probe` is NULL or points to a structure of `struct_size` bytes.
#[no_mangle]
pub unsafe extern "C" fn gmem_vm_probe(vm: *const gmem_vm, probe: *mut gmem_probe) -> c_int {
    // SAFETY: the caller's promise is `fill`'s.
    guarded(|| unsafe { structs::fill(probe, gmem_probe::from(vm_of(vm)?.probe())) })
}

/// Counts of the VM's conversion requests.
///
/// -EINVAL: a NULL, a stale VM, or a `struct_size` of no version.
///
/// # Safety
/// `stats` is NULL or points to a structure of `struct_size` bytes.
#[no_mangle]
pub unsafe extern "C" fn gmem_vm_get_stats(vm: *const gmem_vm, stats: *mut gmem_vm_stats) -> c_int {
    // SAFETY: the caller's promise is `fill`'s.
    guarded(|| unsafe { structs::fill(stats, gmem_vm_stats::from(vm_of(vm)?.stats())) })
}

/// Creates a block: its files and the mapping of its shared bytes. Ends with gmem_block_free(). May
/// block in the kernel; waits for a rebuild of the VM.
///
/// The files are close-on-exec, here and after gmem_vm_attach(). The kernel makes a guest_memfd without
/// (KVM_CREATE_GUEST_MEMFD has no flag for it), and the library sets it right after: a child that
/// another thread forks in between, and that executes a program without closing what it does not know,
/// has the guest_memfd and with it the VM. So does a child that executes nothing, which also has the
/// memory: madvise(2) with MADV_DONTFORK on the addresses of gmem_block_host() keeps it from that, and
/// MADV_DONTDUMP keeps core dumps small. Neither is done here; both are to be done again after
/// gmem_vm_attach().
///
/// A memfd's size is sealed, and so are its seals (F_SEAL_GROW, F_SEAL_SHRINK, F_SEAL_SEAL): whoever
/// gets it by gmem_block_shared_fd() can't truncate it. A guest_memfd has no seals, and a fixed size.
///
/// -EBUSY: the VM is detached.
/// -EINVAL, -ENOTSUP: the configuration makes no sense, isn't in this version, or the kernel can't
/// serve it; the sentence says which and what to do. -ENOMEM, -EMFILE, …: creating or mapping the
/// files failed (KVM_CREATE_GUEST_MEMFD, memfd_create, mmap). Nothing is left behind.
///
/// # Safety
/// `config` is NULL or points to a structure of `struct_size` bytes, whose `name` is NULL or a
/// NUL-terminated string and whose `policy_nodes` has `policy_words` words; `block` is NULL or points to memory for a pointer.
#[no_mangle]
pub unsafe extern "C" fn gmem_block_new(
    vm: *mut gmem_vm,
    config: *const gmem_block_config,
    block: *mut *mut gmem_block,
) -> c_int {
    guarded(|| {
        let vm = vm_of(vm)?;
        // SAFETY: the caller's promise is `read`'s.
        let config = unsafe { structs::read(config)? };
        let name: String = if config.name.is_null() {
            "memory".into()
        } else {
            // SAFETY: the caller promises a NUL-terminated string.
            let name = unsafe { CStr::from_ptr(config.name) }.to_string_lossy();
            // `check` has it in its own messages.
            name.replace(char::is_control, "?")
        };
        // SAFETY: the caller promises so many words.
        let nodes = unsafe { config.policy_nodes()? };
        let config: BlockConfig = config.check(&name, &nodes)?;
        // SAFETY: the caller's promise is `give`'s.
        unsafe { give(block, || Ok(BLOCKS.insert(Block::new(&vm, &config)?))) }
    })
}

/// Ends a block and frees its memory; pointers and file descriptors got from it are void. Its
/// memory slots must be gone. NULL is fine. Waits for a rebuild of the VM.
///
/// -EBUSY: it is bound, in a DMA window or listened to; nothing happened. So it is while a window that
/// gmem_window_new() could not make can't be closed: try again. -EINVAL: no such block (any more).
#[no_mangle]
pub extern "C" fn gmem_block_free(block: *mut gmem_block) -> c_int {
    guarded(|| {
        if block.is_null() {
            return Ok(());
        }
        block_of(block)?.check_unused()?;
        BLOCKS.remove(block as usize, "block").map(drop)
    })
}

/// Address of the block's shared bytes: `size` bytes, page aligned, valid as long as the block.
/// NULL for a handle that is not a block's. In a split block the address of a private page reads
/// and writes memory that the guest never sees: see gmem_block_check_access().
#[no_mangle]
pub extern "C" fn gmem_block_host(block: *const gmem_block) -> *mut c_void {
    let mut host = std::ptr::null_mut();
    guarded(|| {
        host = block_of(block)?.host().cast();
        Ok(())
    });
    host
}

/// The file with the shared bytes, at the same offsets: for vhost-user, never for VFIO, which goes
/// by gmem_window_new(). Stays the library's: don't close it. -EINVAL: no such block.
///
/// A process that maps it and touches a page that the guest has turned private gets SIGBUS in place,
/// and in split from a pool of huge pages that is empty: don't give it away there, if the process
/// can't bear that. In split in small pages it gets what the page left, while that is kept, and then a
/// page of zeros, which is freed after the next conversion to private.
#[no_mangle]
pub extern "C" fn gmem_block_shared_fd(block: *const gmem_block) -> c_int {
    file_of(block, Attribute::Shared)
}

/// The file with the private bytes: the guest_memfd, for memory slots. In-place it is the file of
/// gmem_block_shared_fd(). Stays the library's: don't close it. -EINVAL: no such block.
#[no_mangle]
pub extern "C" fn gmem_block_private_fd(block: *const gmem_block) -> c_int {
    file_of(block, Attribute::Private)
}

fn file_of(block: *const gmem_block, attribute: Attribute) -> c_int {
    let mut fd = -1;
    match guarded(|| {
        fd = block_of(block)?.file(attribute).as_raw_fd();
        Ok(())
    }) {
        0 => fd,
        error => error,
    }
}

/// What KVM_SET_USER_MEMORY_REGION2 needs for a slot in address space 0 that shows the block from
/// `offset` on, with KVM_MEM_GUEST_MEMFD set. Slots in other address spaces (SMM) are plain: the
/// same userspace_addr and no guest_memfd, since KVM refuses to bind an offset twice. Neither may
/// have KVM_MEM_LOG_DIRTY_PAGES or KVM_MEM_READONLY together with KVM_MEM_GUEST_MEMFD.
///
/// -EINVAL: an unaligned offset or one beyond the block, a NULL, a stale block, a `struct_size` of
/// no version.
///
/// # Safety
/// `slot` is NULL or points to a structure of `struct_size` bytes.
#[no_mangle]
pub unsafe extern "C" fn gmem_block_get_memslot(
    block: *const gmem_block,
    offset: u64,
    slot: *mut gmem_memslot,
) -> c_int {
    guarded(|| {
        let block = block_of(block)?;
        let memslot = gmem_memslot::from(block.memslot(offset)?);
        // SAFETY: the caller's promise is `fill`'s.
        unsafe { structs::fill(slot, memslot) }
    })
}

/// Fills the memory of every page, in the plane that its attribute selects, with `threads` threads
/// (0 counts as 1). Blocks until it is done; conversions in the block wait.
///
/// -ENOMEM, -ENOSPC: there isn't enough; part of it is filled. -EINVAL: no such block.
#[no_mangle]
pub extern "C" fn gmem_block_preallocate(block: *mut gmem_block, threads: u32) -> c_int {
    guarded(|| block_of(block)?.preallocate(threads as usize))
}

/// Gives every page its initial attribute again, for a reset of the VM; no vCPU may run. Private pages
/// that become shared lose their bytes before anybody can see them: host and devices find zeroes. In
/// place, so do the shared pages of a huge page that has a private part; all other shared pages keep
/// their bytes, and what shared ones hold that become private is undefined. Windows and the kernel
/// follow. Poisoned pages get fresh memory; those that can't are left alone, attribute included, and all
/// others are reset. Waits for conversions in the block; takes bindings and
/// range like gmem_convert(), whose errors it shares. It works in pieces and goes on where one fails, unless
/// somebody holds pages in many of them: in one that failed bytes may be gone, but no private one is shown. At last
/// devices are to have again what is shared and quarantined; what they still can't have stays so.
#[no_mangle]
pub extern "C" fn gmem_block_reset(block: *mut gmem_block) -> c_int {
    guarded(|| block_of(block)?.reset())
}

/// Copies `size` bytes at `data` to `offset` of the block, for what a guest finds in memory at its
/// start: firmware, a kernel. In place, private pages are made shared for it and private again, also
/// if it is only a part of them that is written; what the guest then finds in them depends on the VM's
/// type: its launch commands (SNP, TDX) take the page as it is and encrypt it. All pages have their
/// attributes of before afterwards. No vCPU may run. Waits for conversions of the pages.
///
/// -EINVAL: not in the block, empty, a NULL, or no such block. -ENOTSUP: private pages of a split
/// block, whose bytes the VMM can't reach. -EBUSY: the VM is detached. -EIO: poisoned pages. -EAGAIN:
/// somebody holds one of the pages. -ENOMEM, -ENOSPC: no memory.
///
/// # Safety
/// `data` is NULL or points to `size` bytes, which are not the block's own.
#[no_mangle]
pub unsafe extern "C" fn gmem_block_place(
    block: *mut gmem_block,
    offset: u64,
    data: *const c_void,
    size: u64,
) -> c_int {
    guarded(|| {
        let block = block_of(block)?;
        if data.is_null() {
            return Err(null("what is to be placed"));
        }
        // Before the bytes are looked at: a size that is garbage must not make anyone read so far.
        block.pages_of(offset, size)?;
        // SAFETY: not null, and the caller vouches for so many bytes, which fit into the block.
        let data = unsafe { std::slice::from_raw_parts(data.cast::<u8>(), size as usize) };
        block.place(offset, data)
    })
}

/// Frees at once the memory that pages have left and that is kept for a while (see gmem_block_config's
/// `release_delay_ms`). What can't be freed is logged, and counted in `release_failures`. Waits for
/// conversions where it is; takes no other lock of the library, and doesn't need QEMU's big lock.
///
/// -EINVAL: no such block.
#[no_mangle]
pub extern "C" fn gmem_block_release_pending(block: *mut gmem_block) -> c_int {
    guarded(|| {
        block_of(block)?.release_pending();
        Ok(())
    })
}

/// Gives the memory of `size` bytes at `offset`, whole pages, back to the host, as when a guest inflates
/// a balloon or reports pages free. They keep their attributes, and who touches one next gets new
/// memory. Shared pages read zero on return. What a guest finds in a private one is for the VM's type
/// to say: zeros on KVM_X86_SW_PROTECTED_VM; on TDX and SNP the page must be accepted or validated anew,
/// so only a guest that does so may be offered this.
///
/// Huge pages from a pool go as a whole, and those of a split block only with `no_reserve`; what else is
/// shared is zeroed and keeps its memory. In place they stay set aside for the block. Under a NUMA
/// policy, new private memory comes from where the vCPU's own policy says.
///
/// Who has pages pinned, other than by DMA windows, keeps the old memory: don't discard beside those.
/// Works in pieces of 64 MiB, or of one huge page if that is larger: waits for conversions in each, widened
/// to whole huge pages and DMA units, and leaves all as the books say; others go on meanwhile. Takes no
/// other lock. May run with QEMU's big lock: what is zeroed and frees nothing is bounded by 32 MiB in all.
/// Listeners are not told.
///
/// -EINVAL: empty, not page aligned, not in the block, or no such block. -EBUSY: a DMA window maps a page
/// of it, or the VM is detached. -EIO: a page is poisoned. -ENOSPC: more than 32 MiB of it would have to
/// be zeroed: ask for less, or for whole huge pages. Nothing has happened then, unless it came to that
/// between two pieces. Another errno is fallocate(2)'s. Parts of the range may be gone, attributes are as
/// before; it may be asked for again.
#[no_mangle]
pub extern "C" fn gmem_block_discard(block: *mut gmem_block, offset: u64, size: u64) -> c_int {
    guarded(|| block_of(block)?.discard(offset, size))
}

/// The host's hardware has lost the memory that gmem_block_host() shows for `size` bytes at `offset`, as a
/// SIGBUS says: of whole pages around them. In a split block that is shared memory, also behind pages that
/// are private now, which stay usable. No device reaches lost pages any more, conversions that include one,
/// or would lead to one, get -EIO, so do gmem_max_order() and gmem_block_check_access(), and preallocation
/// leaves them out, until gmem_block_reset() has given them fresh memory or the VM is rebuilt. Twice is as
/// good as once. Waits for conversions in the block.
///
/// -EINVAL: empty or not in the block, or no such block. -EBUSY: the VM is detached. Another errno: a
/// DMA window refused to let go of them, or to take back what had to leave it for a moment, which is
/// quarantined then; they are poisoned all the same.
#[no_mangle]
pub extern "C" fn gmem_block_poison(block: *mut gmem_block, offset: u64, size: u64) -> c_int {
    guarded(|| block_of(block)?.poison(offset, size))
}

/// The same for the memory that the guest uses at guest physical addresses, private or shared, as when
/// KVM_RUN fails with EHWPOISON and a memory-fault exit that says where. It may cross bindings; what is no
/// memory of a block is left out. Waits for conversions around it. No memory slot may come or go meanwhile.
///
/// -EINVAL: empty, wrapping, nothing of it is memory of a block, or no such VM. Else as
/// gmem_block_poison().
#[no_mangle]
pub extern "C" fn gmem_vm_poison(vm: *mut gmem_vm, gpa: u64, size: u64) -> c_int {
    guarded(|| vm_of(vm)?.poison(gpa, size))
}

/// State and counts of a block.
///
/// -EINVAL: a NULL, a stale block, or a `struct_size` of no version.
///
/// # Safety
/// `stats` is NULL or points to a structure of `struct_size` bytes.
#[no_mangle]
pub unsafe extern "C" fn gmem_block_get_stats(
    block: *const gmem_block,
    stats: *mut gmem_block_stats,
) -> c_int {
    guarded(|| {
        let block = block_of(block)?;
        // SAFETY: the caller's promise is `fill`'s.
        unsafe { structs::fill(stats, gmem_block_stats::of(&block)) }
    })
}

/// The attribute (GMEM_SHARED or GMEM_PRIVATE) of the page at `offset`, and the offset at which
/// the run of pages with that attribute ends, exclusive. Right at this moment: a conversion may
/// follow at once, unless the caller is a listener and its range is asked for.
///
/// -EINVAL: an offset beyond the block, a NULL, a stale block.
///
/// # Safety
/// `end` and `attribute` are NULL or point to memory for their types.
#[no_mangle]
pub unsafe extern "C" fn gmem_block_get_run(
    block: *const gmem_block,
    offset: u64,
    end: *mut u64,
    attribute: *mut u32,
) -> c_int {
    guarded(|| {
        if end.is_null() || attribute.is_null() {
            return Err(null("the place for the run"));
        }
        let (found, run_end) = block_of(block)?.run_at(offset)?;
        // SAFETY: neither is null, and the caller vouches for the rest.
        unsafe {
            end.write(run_end);
            attribute.write(structs::attribute_number(found));
        }
        Ok(())
    })
}

/// How large a mapping may be that holds the page at `offset` and pages of one attribute only: log2
/// of the pages in the largest naturally aligned range of the block around it. Right at this
/// moment, unless the caller is a listener and asks about its range. Takes no lock that a conversion
/// holds while it waits.
///
/// -EINVAL: an offset beyond the block, a NULL, a stale block. -EIO: the page is poisoned.
///
/// # Safety
/// `order` is NULL or points to memory for its type.
#[no_mangle]
pub unsafe extern "C" fn gmem_max_order(
    block: *const gmem_block,
    offset: u64,
    order: *mut u32,
) -> c_int {
    guarded(|| {
        if order.is_null() {
            return Err(null("the place for the order"));
        }
        let found = block_of(block)?.max_order(offset)?;
        // SAFETY: not null, and the caller vouches for the rest.
        unsafe { order.write(found) };
        Ok(())
    })
}

/// Asks before the VMM touches `size` bytes at `offset` of gmem_block_host(). 0: all of them are
/// shared, at this moment. Costs a look-up and one atomic load while the block has no private page.
///
/// -EACCES: a page is private; it is counted (access_refused). -EIO: a page is poisoned. -EINVAL:
/// beyond the block, or no such block.
#[no_mangle]
pub extern "C" fn gmem_block_check_access(
    block: *const gmem_block,
    offset: u64,
    size: u64,
) -> c_int {
    guarded(|| block_of(block)?.check_access(offset, size))
}

/// Shows `size` bytes of a block from `offset` at `gpa` and tells the kernel their attributes. The
/// memory slot may exist or follow: KVM keeps attributes by address. Waits for conversions of these pages.
///
/// -EINVAL: a range that is empty, unaligned, wrapping or not in the block, or no such block.
/// -EEXIST: an address or an offset is bound already. -ENOMEM: KVM_SET_MEMORY_ATTRIBUTES, also of what
/// an earlier gmem_unbind() left private there. Nothing is bound then.
#[no_mangle]
pub extern "C" fn gmem_bind(block: *mut gmem_block, offset: u64, size: u64, gpa: u64) -> c_int {
    guarded(|| block_of(block)?.bind(offset, size, gpa))
}

/// Ends a binding, given exactly as it was made. Its memory slot must be gone: for KVM the addresses
/// are shared afterwards, and a vCPU would find shared memory where it left a private page.
/// Waits for conversions of these pages.
///
/// -EINVAL: there is no such binding or block. -ENOMEM: KVM_SET_MEMORY_ATTRIBUTES failed; the
/// binding has ended, but the kernel still holds its addresses for private, and a vCPU finds no memory
/// there. gmem_bind() over them makes them shared before all else.
#[no_mangle]
pub extern "C" fn gmem_unbind(block: *mut gmem_block, offset: u64, size: u64, gpa: u64) -> c_int {
    guarded(|| block_of(block)?.unbind(offset, size, gpa))
}

/// Serves a guest's request to make `size` bytes at `gpa` GMEM_SHARED or GMEM_PRIVATE, all of it or
/// nothing. It may cross bindings, blocks and, to shared, anything else, which is ignored and
/// counted (ignored_bytes). Pages that have the attribute already cost nothing.
///
/// Takes the range: waits for requests that overlap, not for others, unless all together would have more than
/// 1 GiB, or the largest max_request, in both planes of split blocks: then for those before it.
/// Calls listeners with the range held. Call it without QEMU's big lock.
///
/// -EINVAL: empty, unaligned, wrapping, against the convert-unit, to make something private that
/// can't be, or no such VM. -ENOSPC: max_runs or max_request. -ENOMEM: the library has no memory for it.
/// -ENOMEM, -EAGAIN or another errno of the kernel or a listener. -EIO: a page of it is poisoned. Attributes, backing and DMA are as they were, or where
/// undoing failed, quarantined. gmem_hypercall_result() turns the errno into what a guest may be told.
#[no_mangle]
pub extern "C" fn gmem_convert(vm: *mut gmem_vm, gpa: u64, size: u64, attribute: u32) -> c_int {
    guarded(|| {
        let vm = vm_of(vm)?;
        let attribute = structs::attribute_of(attribute).inspect_err(|_| vm.count_senseless())?;
        vm.convert(gpa, size, attribute)
    })
}

/// A number that grows whenever a conversion ends. Read it (with acquire semantics) each time before a
/// vCPU enters KVM_RUN, and hand what was read to gmem_memory_fault() if the vCPU comes out with a memory
/// fault. Valid as long as the VM. NULL for a handle that is not a VM's.
#[no_mangle]
pub extern "C" fn gmem_vm_sequence(vm: *const gmem_vm) -> *const u64 {
    // The table keeps the VM as long as the handle.
    vm_of(vm).map_or(std::ptr::null(), |vm| vm.sequence().as_ptr().cast_const())
}

/// Serves a KVM_EXIT_MEMORY_FAULT: a vCPU accessed `size` bytes at `gpa` as if they were `attribute`
/// (GMEM_PRIVATE if the exit's flags have KVM_MEMORY_EXIT_FLAG_PRIVATE). Converts them where that is what
/// the guest means; `verdict` (GMEM_FAULT_…) says what the caller is to do with the vCPU, and
/// gmem_last_error() why, unless it is GMEM_FAULT_SERVED or GMEM_FAULT_ECHO.
///
/// `converts`: 0 if the kind of an access follows the attribute (KVM_X86_SW_PROTECTED_VM), so that a fault
/// asks for nothing; else 1. `entered`: what *gmem_vm_sequence() was before the vCPU entered KVM_RUN, or
/// UINT64_MAX for a fault that has been GMEM_FAULT_ECHO again and again.
///
/// No memory slot may come or go meanwhile. Else as gmem_convert(): it waits for requests that overlap;
/// call it without QEMU's big lock.
///
/// -EINVAL: no such VM, an unknown attribute or `converts`, or a NULL.
///
/// # Safety
/// `verdict` is NULL or points to memory for its type.
#[no_mangle]
pub unsafe extern "C" fn gmem_memory_fault(
    vm: *mut gmem_vm,
    gpa: u64,
    size: u64,
    attribute: u32,
    converts: u32,
    entered: u64,
    verdict: *mut u32,
) -> c_int {
    guarded(|| {
        if verdict.is_null() {
            return Err(null("the place for the verdict"));
        }
        let vm = vm_of(vm)?;
        let attribute = structs::attribute_of(attribute)?;
        if converts > 1 {
            return Err(Error::Invalid(format!(
                "converts is {converts}, not 0 or 1"
            )));
        }
        let (number, error) = match vm.memory_fault(gpa, size, attribute, converts == 1, entered) {
            MemoryFault::Served => (GMEM_FAULT_SERVED, None),
            MemoryFault::Echo => (GMEM_FAULT_ECHO, None),
            MemoryFault::Unexplained(error) => (GMEM_FAULT_UNEXPLAINED, Some(error)),
            MemoryFault::Later(error) => (GMEM_FAULT_LATER, Some(error)),
            MemoryFault::Never(error) => (GMEM_FAULT_NEVER, Some(error)),
        };
        if let Some(error) = error {
            last_error::set(Last::Error(error));
        }
        // SAFETY: not null, and the caller vouches for the rest.
        unsafe { verdict.write(number) };
        Ok(())
    })
}

/// What `hypercall.ret` of a KVM_HC_MAP_GPA_RANGE exit may hold, which is 0, EINVAL or EAGAIN,
/// positive, and nothing else (kvm_is_valid_map_gpa_range_ret). `error` is 0 or the negative errno of
/// gmem_convert(). `can_retry`: not 0 if the guest takes EAGAIN for "ask again" (TDX); for others it is
/// fatal.
#[no_mangle]
pub extern "C" fn gmem_hypercall_result(error: c_int, can_retry: u32) -> u64 {
    match error.checked_neg() {
        Some(0) => 0,
        Some(libc::EAGAIN | libc::ENOMEM) if can_retry != 0 => libc::EAGAIN as u64,
        _ => libc::EINVAL as u64,
    }
}

/// Makes a new IOAS fit for windows that are cut (GMEM_STRATEGY_CUT): its mappings are single pages in
/// the IOMMU, so that any part of one can be unmapped by itself. To be called between IOMMU_IOAS_ALLOC
/// and the first mapping. Takes no lock.
///
/// -EBADF: `iommufd` isn't open. -ENOTTY: it is no iommufd. -ENOENT: no such IOAS. -EINVAL: too late,
/// devices and mappings are there. Then nothing changed, and windows take another strategy.
#[no_mangle]
pub extern "C" fn gmem_ioas_prepare(iommufd: c_int, ioas_id: u32) -> c_int {
    guarded(|| crate::dma::prepare_ioas(iommufd, ioas_id))
}

/// Shows a part of a block to the devices of an IOAS: all of its shared pages, now and after every
/// conversion. Ends with gmem_window_free(). Takes the window's range: waits for conversions in it.
/// Pins memory, which the kernel counts against RLIMIT_MEMLOCK.
///
/// -EINVAL: a range that makes no sense, or that the IOAS reserves, a NULL, a stale block. -EBADF:
/// `iommufd` isn't open. -ENOTTY: it is no iommufd. -ENOENT: no such IOAS. -EEXIST: the IOAS has something
/// there, where pages are shared; elsewhere a conversion finds that out. -ENOTSUP: `dma=fd` or
/// `dma-split=cut` and the kernel can't. -ENOMEM: pinning. Nothing is mapped then; should the kernel refuse
/// to take back what was, which is logged, these pages can't become private, and the block's next window
/// and gmem_block_free() try again.
///
/// # Safety
/// `config` is NULL or points to a structure of `struct_size` bytes; `window` is NULL or points to
/// memory for a pointer.
#[no_mangle]
pub unsafe extern "C" fn gmem_window_new(
    block: *mut gmem_block,
    config: *const gmem_window_config,
    window: *mut *mut gmem_window,
) -> c_int {
    guarded(|| {
        let block = block_of(block)?;
        // SAFETY: the caller's promise is `read`'s.
        let config: WindowConfig = unsafe { structs::read(config)? }.check()?;
        let open = || {
            let inner = block.add_window(&config)?;
            Ok(WINDOWS.insert(Arc::new((block.clone(), inner))))
        };
        // SAFETY: the caller's promise is `give`'s.
        unsafe { give(window, open) }
    })
}

/// Makes a window show another part of its block: what both parts have in common stays mapped all
/// the time, except where it is one kernel area with what goes. `config` has the IOAS, the access
/// and, for each offset, the iova of before; its iommufd is not looked at. Takes both ranges: waits
/// for conversions in them.
///
/// -EINVAL: `config` differs in more than the range, a NULL, or no such window. Else as
/// gmem_window_new(). The window shows what it showed before, or, if the kernel refused to unmap,
/// both parts. What it can't show again is quarantined (bytes_quarantined), and tried again when the
/// window is reshaped or the block reset; in a confidential VM also when it converts.
///
/// # Safety
/// `config` is NULL or points to a structure of `struct_size` bytes.
#[no_mangle]
pub unsafe extern "C" fn gmem_window_reshape(
    window: *mut gmem_window,
    config: *const gmem_window_config,
) -> c_int {
    guarded(|| {
        let entry = WINDOWS.get(window as usize, "window")?;
        // SAFETY: the caller's promise is `read`'s.
        let config: WindowConfig = unsafe { structs::read(config)? }.check()?;
        entry.0.reshape_window(&entry.1, &config)
    })
}

/// Ends a window: unmaps all of it and closes the library's iommufd. NULL is fine. Takes the
/// window's range: waits for conversions in it.
///
/// An IOAS that has been destroyed has nothing mapped: that is no error.
///
/// -EINVAL: no such window (any more). Another errno: the kernel refused to unmap; the window stays,
/// takes nothing in any more, and its pages can't become private. Try again.
#[no_mangle]
pub extern "C" fn gmem_window_free(window: *mut gmem_window) -> c_int {
    guarded(|| {
        if window.is_null() {
            return Ok(());
        }
        let entry = WINDOWS.get(window as usize, "window")?;
        entry.0.remove_window(&entry.1)?;
        WINDOWS.remove(window as usize, "window").map(drop)
    })
}

struct COps {
    ops: gmem_listener_ops,
    opaque: *mut c_void,
}

// SAFETY: `gmem_listener_add` makes its caller promise that the functions may run on any thread.
unsafe impl Send for COps {}
// SAFETY: as above.
unsafe impl Sync for COps {}

impl Listener for COps {
    fn begin(&self, change: &Change) -> std::result::Result<(), i32> {
        let Some(begin) = self.ops.begin else {
            return Ok(());
        };
        let attribute = structs::attribute_number(change.attribute);
        // SAFETY: the caller of `gmem_listener_add` vouches for the function and its argument.
        let result = unsafe {
            begin(
                self.opaque,
                change.span.first(),
                change.span.size_bytes(),
                attribute,
                change.sequence,
            )
        };
        match result {
            0 => Ok(()),
            error => Err(error.checked_neg().filter(|&e| e > 0).unwrap_or(libc::EIO)),
        }
    }

    fn end(&self, change: &Change, changed: bool) {
        let Some(end) = self.ops.end else { return };
        let attribute = structs::attribute_number(change.attribute);
        // SAFETY: as in `begin`.
        unsafe {
            end(
                self.opaque,
                change.span.first(),
                change.span.size_bytes(),
                attribute,
                changed,
                change.sequence,
            );
        }
    }
}

/// Tells `ops` of every conversion of the block from now on. Ends with gmem_listener_remove().
///
/// -EINVAL: a NULL, a stale block, or a `struct_size` of no version.
///
/// # Safety
/// `ops` is NULL or points to a structure of `struct_size` bytes, which is copied; its functions
/// and `opaque` stay valid, for any thread, until gmem_listener_remove() has returned. `listener`
/// is NULL or points to memory for a pointer.
#[no_mangle]
pub unsafe extern "C" fn gmem_listener_add(
    block: *mut gmem_block,
    ops: *const gmem_listener_ops,
    opaque: *mut c_void,
    listener: *mut *mut gmem_listener,
) -> c_int {
    guarded(|| {
        let block = block_of(block)?;
        // SAFETY: the caller's promise is `read`'s.
        let ops = unsafe { structs::read(ops)? };
        let add = || {
            let id = block.add_listener(Arc::new(COps { ops, opaque }));
            Ok(LISTENERS.insert(Arc::new((block.clone(), id))))
        };
        // SAFETY: the caller's promise is `give`'s.
        unsafe { give(listener, add) }
    })
}

/// Ends a registration; no call of it is under way when this returns, so it must not be called from
/// one. NULL is fine. -EINVAL: no such listener (any more).
#[no_mangle]
pub extern "C" fn gmem_listener_remove(listener: *mut gmem_listener) -> c_int {
    guarded(|| {
        if listener.is_null() {
            return Ok(());
        }
        let entry = LISTENERS.remove(listener as usize, "listener")?;
        entry.0.remove_listener(&entry.1)
    })
}
