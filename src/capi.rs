// SPDX-License-Identifier: MIT OR Apache-2.0
//! The C ABI: converts types, catches panics, and has no logic of its own. `include/gmem.h` is
//! generated from here.
//!
//! What is ``[`Vm::new`] for C`` has that item's contract, whose text is in the header, with its links
//! and errnos as they are in C (`tests/header`); here is said only what C adds. What has no such item says why,
//! after “Only in C: ”, which is not in the header.
//!
//! Handles are never dereferenced: each names an entry in a table, so that a stale, foreign or null
//! handle is an error and not a crash. Every function returns 0 or a negative errno, unless it
//! says otherwise, and leaves a sentence for [`gmem_last_error`]. A function may be called from any
//! thread, at any time: also in exit handlers, when the thread's own variables are gone.
#![allow(non_camel_case_types)]

mod block;
mod handles;
mod last_error;
mod listener;
mod structs;
mod vm;
mod window;

pub use block::*;
pub use listener::*;
pub use structs::*;
pub use vm::*;
pub use window::*;

use crate::block::Block;
use crate::error::{Doing, Error, Result};
use crate::kernel::linux::check_open;
use crate::listeners::Registration;
use crate::vm::Vm;
use crate::Window;
use handles::Table;
use last_error::Last;
use std::ffi::{c_char, c_int, c_void, CString};
use std::os::fd::BorrowedFd;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::{Arc, LazyLock};

/// [`Vm`] for C.
#[derive(Debug)]
pub struct gmem_vm {
    _opaque: [u8; 0],
}

/// [`Block`] for C.
#[derive(Debug)]
pub struct gmem_block {
    _opaque: [u8; 0],
}

/// [`Window`] for C.
#[derive(Debug)]
pub struct gmem_window {
    _opaque: [u8; 0],
}

/// [`Registration`] for C.
#[derive(Debug)]
pub struct gmem_listener {
    _opaque: [u8; 0],
}

static VMS: LazyLock<Table<Vm>> = LazyLock::new(Table::default);
static BLOCKS: LazyLock<Table<Block>> = LazyLock::new(Table::default);
static WINDOWS: LazyLock<Table<Window>> = LazyLock::new(Table::default);
static LISTENERS: LazyLock<Table<Registration>> = LazyLock::new(Table::default);

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
    Error::invalid(format!("{what} is NULL"))
}

/// A file of the caller's, by a number that may be none. It takes no number of its own: there may be none left
/// but the one that whoever keeps the file needs.
fn opened<'a>(fd: c_int, what: &str) -> Result<BorrowedFd<'a>> {
    check_open(fd).doing(|| format!("keeping {what} open"))?;
    // SAFETY: it is an open file, and the caller keeps that open as long as the call lasts.
    Ok(unsafe { BorrowedFd::borrow_raw(fd) })
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
///
/// Only in C: Cargo knows the version that a Rust program is built with.
#[no_mangle]
pub extern "C" fn gmem_version() -> *const c_char {
    concat!(env!("CARGO_PKG_VERSION"), "\0").as_ptr().cast()
}

/// What the last gmem call of this thread that failed has to say, or the last gmem_memory_fault() with a
/// verdict other than GMEM_FAULT_SERVED or GMEM_FAULT_ECHO, if that was later: a sentence for the user, in
/// UTF-8, without a newline. Empty if there was none. Never NULL. Valid until this thread's next gmem call
/// that fails, or gmem_memory_fault() with such a verdict, or the thread's end; copy it if you keep it. As
/// all calls, it may also be made in exit handlers, and in destructors of thread-specific data
/// (pthread_key_create). The sentence is made when it is asked for: to name who
/// holds a page that can't become private (EAGAIN) takes a look at all files of the process, a tenth of a
/// second for 4,000. So ask if it is to be printed, and without a lock that others wait for.
///
/// C evaluates the arguments of one call in any order: printf("%d: %s", gmem_convert(…),
/// gmem_last_error()) may ask before there is an answer. Keep the errno in a variable first.
///
/// Only in C: an [`Error`] has its sentence with it.
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
///
/// Only in C: a Rust program has a [`log::Log`].
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
/// # Errors
/// - EINVAL: the level is unknown.
/// - EBUSY: there is a receiver already.
///
/// # Safety
/// `log` and `opaque` stay valid for the rest of the process, for any thread; a NULL for `log` is -EINVAL.
///
/// Only in C: a Rust program has a [`log::Log`].
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
            other => return Err(Error::invalid(format!("{other} is no log level"))),
        };
        log::set_boxed_logger(Box::new(Log { function, opaque }))
            .map_err(|_| Error::busy("messages have a receiver already"))?;
        log::set_max_level(level);
        std::panic::set_hook(Box::new(|panic| log::error!("{panic}")));
        Ok(())
    })
}
