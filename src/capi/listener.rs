// SPDX-License-Identifier: MIT OR Apache-2.0
//! A block's listeners, for C.

use super::structs::{self, *};
use super::{block_of, give, gmem_block, gmem_listener, guarded, LISTENERS};
use crate::listeners::{Change, Listener};
use std::ffi::{c_int, c_void};
use std::sync::Arc;

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

/// [`Block::add_listener`](crate::Block::add_listener) for C. Ends with gmem_listener_remove().
///
/// # Safety
/// `ops` points to a structure of `struct_size` bytes, which is copied; its functions and `opaque` stay
/// valid, for any thread, until gmem_listener_remove() has returned. `listener` points to memory for a
/// pointer. NULL for either is -EINVAL.
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
            let registration = block.add_listener(Arc::new(COps { ops, opaque }));
            Ok(LISTENERS.insert(Arc::new(registration)))
        };
        // SAFETY: the caller's promise is `give`'s.
        unsafe { give(listener, add) }
    })
}

/// Ends a registration. No call of it is under way when this returns: it waits for those, and must
/// not be called from one.
///
/// Only in C: in Rust a [`Registration`](crate::Registration) ends when it is dropped.
#[no_mangle]
pub extern "C" fn gmem_listener_remove(listener: *mut gmem_listener) -> c_int {
    guarded(|| {
        if listener.is_null() {
            return Ok(());
        }
        LISTENERS.remove(listener as usize, "listener").map(drop)
    })
}
