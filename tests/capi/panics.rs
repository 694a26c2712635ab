// SPDX-License-Identifier: MIT OR Apache-2.0
//! A Rust static library that panics and catches it: the second one of a program, and, through
//! build-aux/static-library.sh, one in libgmem.a's form.

use std::ffi::c_int;
use std::panic::catch_unwind;

/// The length of the message of a panic that this library caught.
#[cfg_attr(feature = "gmem", export_name = "gmem_caught")]
#[cfg_attr(not(feature = "gmem"), export_name = "second_caught")]
pub extern "C" fn caught(index: c_int) -> c_int {
    // Something to drop, so that unwinding has more to do than to end.
    let held = vec![index; 7];
    let panic = catch_unwind(move || {
        let held = held;
        let index = held.iter().sum::<c_int>() as usize;
        held[index]
    });
    match panic {
        Ok(_) => -1,
        Err(message) => message.downcast_ref::<String>().map_or(-2, |text| text.len() as c_int),
    }
}
