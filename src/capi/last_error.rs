// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the last call of a thread that failed has to say.
//!
//! It is thread-specific data of POSIX and not a variable of Rust's: glibc destroys those before it
//! calls exit handlers and the destructors of such data (__run_exit_handlers, start_thread), all of
//! which may call the library as anybody. Data that such a destructor sets is destroyed after it, and
//! exit() destroys none.
//!
//! The sentence is made when somebody asks for it: that may take its time, and most failing calls of a guest's
//! are of no interest to anybody.

use crate::error::Error;
use std::cell::OnceCell;
use std::ffi::{c_char, c_void, CString};
use std::ptr::{null, null_mut};
use std::sync::LazyLock;

/// `None`: the process has used up its keys, and errors have no sentence.
static KEY: LazyLock<Option<libc::pthread_key_t>> = LazyLock::new(|| {
    let mut key = 0;
    // SAFETY: `free` takes what `set` stores.
    let error = unsafe { libc::pthread_key_create(&mut key, Some(free)) };
    (error == 0).then_some(key)
});

/// What a call that failed has to say.
pub(super) enum Last {
    Error(Error),
    Text(String),
}

struct Said {
    last: Last,
    /// Once somebody has asked.
    sentence: OnceCell<CString>,
}

impl Said {
    fn sentence(&self) -> &CString {
        self.sentence.get_or_init(|| {
            let text = match &self.last {
                Last::Error(error) => error.to_string(),
                Last::Text(text) => text.clone(),
            };
            // A NUL can only come from a name of the caller's, which has none.
            CString::new(text).unwrap_or_default()
        })
    }
}

/// # Safety
/// `said` is from [`Box::into_raw`], and nobody uses it any more.
unsafe extern "C" fn free(said: *mut c_void) {
    // SAFETY: as the caller promises.
    drop(unsafe { Box::from_raw(said.cast::<Said>()) });
}

/// Replaces what this thread has to say.
pub(super) fn set(last: Last) {
    let Some(key) = *KEY else { return };
    let sentence = OnceCell::new();
    let said = Box::into_raw(Box::new(Said { last, sentence }));
    let old = said_last();
    // SAFETY: the key is never deleted.
    let error = unsafe { libc::pthread_setspecific(key, said.cast()) };
    // It can fail (ENOMEM) where the thread has had nothing to say so far.
    let unused = if error == 0 { old } else { said };
    if !unused.is_null() {
        // SAFETY: from `into_raw`, here or in an earlier call, whose text its caller may use until now.
        unsafe { free(unused.cast()) };
    }
}

fn said_last() -> *mut Said {
    // SAFETY: the key is never deleted.
    KEY.map_or(null_mut(), |key| unsafe {
        libc::pthread_getspecific(key).cast()
    })
}

/// What this thread has to say, until the next call of [`set`]; null if nothing.
pub(super) fn get() -> *const c_char {
    // SAFETY: null, or what this thread has stored and goes on to have.
    match unsafe { said_last().as_ref() } {
        Some(said) => said.sentence().as_ptr(),
        None => null(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Cause;
    use crate::kernel::{holders::looking, CallError};
    use std::cell::Cell;
    use std::ffi::CStr;
    use std::rc::Rc;

    fn held() -> Error {
        let cause = Cause::Held {
            offset: 0,
            host: 0x1000,
            call: CallError {
                call: "KVM_SET_MEMORY_ATTRIBUTES2",
                errno: libc::EAGAIN,
            },
        };
        Error::new(cause, "making offset 0x0..0x1000 private").of("ram")
    }

    #[test]
    fn who_holds_a_page_is_looked_for_when_somebody_asks_and_once() {
        let looks = Rc::new(Cell::new(0));
        let counted = looks.clone();
        looking::then(move || counted.set(counted.get() + 1));
        for _ in 0..1000 {
            set(Last::Error(held()));
        }
        assert_eq!(looks.get(), 0);
        let first = get();
        // SAFETY: valid until the next failing call of this thread.
        let text = unsafe { CStr::from_ptr(first) }.to_str().unwrap();
        assert!(text.contains("no holder found in this process"), "{text}");
        assert_eq!((get(), looks.get()), (first, 1));
        set(Last::Text("something else".into()));
        // SAFETY: as above.
        assert_eq!(unsafe { CStr::from_ptr(get()) }, c"something else");
        assert_eq!(looks.get(), 1);
    }
}
