// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the last call of a thread that failed has to say.
//!
//! It is thread-specific data of POSIX and not a variable of Rust's: glibc destroys those before it
//! calls exit handlers and the destructors of such data (__run_exit_handlers, start_thread), all of
//! which may call the library as anybody. Data that such a destructor sets is destroyed after it, and
//! exit() destroys none.

use std::ffi::{c_char, c_void, CString};
use std::ptr::null_mut;
use std::sync::LazyLock;

/// `None`: the process has used up its keys, and errors have no sentence.
static KEY: LazyLock<Option<libc::pthread_key_t>> = LazyLock::new(|| {
    let mut key = 0;
    // SAFETY: `free` takes what `set` stores.
    let error = unsafe { libc::pthread_key_create(&mut key, Some(free)) };
    (error == 0).then_some(key)
});

/// # Safety
/// `text` is from [`CString::into_raw`], and nobody uses it any more.
unsafe extern "C" fn free(text: *mut c_void) {
    // SAFETY: as the caller promises.
    drop(unsafe { CString::from_raw(text.cast()) });
}

/// Replaces what this thread has to say.
pub(super) fn set(text: String) {
    let Some(key) = *KEY else { return };
    // A NUL can only come from a name of the caller's, which has none.
    let text = CString::new(text).unwrap_or_default().into_raw();
    let old = get();
    // SAFETY: the key is never deleted.
    let error = unsafe { libc::pthread_setspecific(key, text.cast()) };
    // It can fail (ENOMEM) where the thread has had nothing to say so far.
    let unused = if error == 0 { old } else { text };
    if !unused.is_null() {
        // SAFETY: from `into_raw`, here or in an earlier call, whose text its caller may use until now.
        unsafe { free(unused.cast()) };
    }
}

/// What this thread has to say, until the next call of [`set`]; null if nothing.
pub(super) fn get() -> *mut c_char {
    // SAFETY: the key is never deleted.
    KEY.map_or(null_mut(), |key| unsafe {
        libc::pthread_getspecific(key).cast()
    })
}
