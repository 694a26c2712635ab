// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the last call of a thread that failed has to say.
//!
//! It is thread-specific data of POSIX and not a variable of Rust's: glibc destroys those before it
//! calls exit handlers and the destructors of such data (__run_exit_handlers, start_thread), all of
//! which may call the library as anybody. Data that such a destructor sets is destroyed after it, and
//! exit() destroys none.
//!
//! The sentence is made when somebody asks for it: that may take its time, and most failing calls of a guest's
//! are of no interest to anybody. Who does that may come back here, by way of a search that calls the
//! library, or a panic hook: so nothing is borrowed, and nothing freed, while a sentence is made.

use crate::error::Error;
use std::cell::{Cell, OnceCell};
use std::ffi::{c_char, c_void, CString};
use std::ptr::null;
use std::rc::Rc;
use std::sync::LazyLock;

/// `None`: the process has used up its keys, and errors have no sentence.
static KEY: LazyLock<Option<libc::pthread_key_t>> = LazyLock::new(|| {
    let mut key = 0;
    // SAFETY: `free` takes what `put` stores.
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
    /// From then on. It stays so if the sentence can't be made.
    begun: Cell<bool>,
    /// What there is to say without a search.
    brief: OnceCell<CString>,
}

impl Said {
    /// For who asks while the sentence is made, and for the next one if that has panicked, it is the brief
    /// one.
    fn sentence(&self) -> *const c_char {
        let sentence = match (self.sentence.get(), self.begun.replace(true)) {
            (Some(sentence), _) => sentence,
            (None, true) => self.brief.get_or_init(|| self.made(true)),
            (None, false) => {
                let made = self.made(false);
                self.sentence.get_or_init(|| made)
            }
        };
        sentence.as_ptr()
    }

    fn made(&self, brief: bool) -> CString {
        let text = match &self.last {
            Last::Error(error) if brief => format!("{error:#}"),
            Last::Error(error) => error.to_string(),
            Last::Text(text) => text.clone(),
        };
        // A NUL can only come from a name of the caller's, which has none.
        CString::new(text).unwrap_or_default()
    }
}

/// # Safety
/// `said` is from [`Rc::into_raw`], and whoever had that owner has it no more.
unsafe extern "C" fn free(said: *mut c_void) {
    // SAFETY: as the caller promises.
    drop(unsafe { Rc::from_raw(said.cast_const().cast::<Said>()) });
}

/// Replaces what this thread has to say.
pub(super) fn set(last: Last) {
    put(Rc::new(Said {
        last,
        sentence: OnceCell::new(),
        begun: Cell::new(false),
        brief: OnceCell::new(),
    }));
}

fn put(said: Rc<Said>) {
    let Some(key) = *KEY else { return };
    let said = Rc::into_raw(said);
    let old = said_last();
    // SAFETY: the key is never deleted.
    let error = unsafe { libc::pthread_setspecific(key, said.cast()) };
    // It can fail (ENOMEM) where the thread has had nothing to say so far.
    let unused = if error == 0 { old } else { said };
    if !unused.is_null() {
        // SAFETY: from `into_raw`, here or in an earlier call, whose text its caller may use until now.
        unsafe { free(unused.cast_mut().cast()) };
    }
}

fn said_last() -> *const Said {
    // SAFETY: the key is never deleted.
    KEY.map_or(null(), |key| unsafe {
        libc::pthread_getspecific(key).cast_const().cast()
    })
}

/// What this thread has to say, until the next call of [`set`]; null if nothing.
pub(super) fn get() -> *const c_char {
    let asked = said_last();
    if asked.is_null() {
        return null();
    }
    // SAFETY: from `into_raw`, with the owner that this thread has stored.
    let said = unsafe {
        Rc::increment_strong_count(asked);
        Rc::from_raw(asked)
    };
    let sentence = said.sentence();
    if said_last() != asked {
        // A call failed while the sentence was made. Who asked gets that of the one before.
        put(said);
    }
    sentence
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Cause;
    use crate::kernel::{holders::looking, CallError};
    use std::cell::RefCell;
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

    /// Who asks, or fails, while the sentence is made finds neither a cell in use nor freed memory.
    #[test]
    fn a_sentence_that_is_being_made_can_be_asked_for_and_be_followed_by_another() {
        // SAFETY: what this thread has to say is asked for just before.
        let text = |said| unsafe { CStr::from_ptr(said) }.to_str().unwrap();
        let heard = Rc::new(RefCell::new(Vec::new()));
        let hears = heard.clone();
        looking::then(move || {
            let mut heard = hears.borrow_mut();
            heard.push(text(get()).to_string());
            set(Last::Text("another call".into()));
            heard.push(text(get()).to_string());
        });
        set(Last::Error(held()));
        let said = text(get());
        assert!(said.contains("no holder found in this process"), "{said}");
        let brief = "ram: making offset 0x0..0x1000 private, stopped at offset 0x0: \
                     KVM_SET_MEMORY_ATTRIBUTES2: Resource temporarily unavailable";
        assert_eq!(*heard.borrow(), [brief, "another call"]);
        // And once more, it is what was asked for.
        assert_eq!(text(get()), said);
        assert_eq!(heard.borrow().len(), 2);
        set(Last::Text("something else".into()));
        assert_eq!(text(get()), "something else");
    }

    /// A sentence that can't be made is not tried again, and is not nothing.
    #[test]
    fn a_panic_in_the_search_leaves_what_is_known_without_it() {
        looking::then(|| panic!("on purpose"));
        set(Last::Error(held()));
        assert!(std::panic::catch_unwind(get).is_err());
        // SAFETY: valid until the next failing call of this thread.
        let text = unsafe { CStr::from_ptr(get()) }.to_str().unwrap();
        assert!(text.ends_with("Resource temporarily unavailable"), "{text}");
    }
}
