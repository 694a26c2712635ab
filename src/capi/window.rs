// SPDX-License-Identifier: MIT OR Apache-2.0
//! A block's DMA windows, for C.

use super::structs::{self, *};
use super::{block_of, give, gmem_block, gmem_window, guarded, opened, WINDOWS};
use crate::WindowConfig;
use std::ffi::c_int;
use std::sync::Arc;

/// [`prepare_ioas`](crate::prepare_ioas) for C.
///
/// # Errors
/// - EBADF: `iommufd` isn't open.
#[no_mangle]
pub extern "C" fn gmem_ioas_prepare(iommufd: c_int, ioas_id: u32) -> c_int {
    guarded(|| crate::dma::prepare_ioas(opened(iommufd, "the iommufd")?, ioas_id))
}

/// [`Block::add_window`](crate::Block::add_window) for C. Ends with gmem_window_free().
///
/// # Errors
/// - EBADF: the iommufd isn't open.
///
/// # Safety
/// `config` points to a structure of `struct_size` bytes; `window` points to memory for a pointer. NULL for
/// either is -EINVAL.
#[no_mangle]
pub unsafe extern "C" fn gmem_window_new(
    block: *mut gmem_block,
    config: *const gmem_window_config,
    window: *mut *mut gmem_window,
) -> c_int {
    guarded(|| {
        let block = block_of(block)?;
        // SAFETY: the caller's promise is `read`'s.
        let config = unsafe { structs::read(config)? };
        let iommufd = opened(config.iommufd, "the iommufd")?;
        let config: WindowConfig = config.check()?;
        let open = || {
            let window = block.add_window(iommufd, &config)?;
            Ok(WINDOWS.insert(Arc::new(window)))
        };
        // SAFETY: the caller's promise is `give`'s.
        unsafe { give(window, open) }
    })
}

/// [`Window::reshape`](crate::Window::reshape) for C. The iommufd is not looked at.
///
/// # Safety
/// `config` points to a structure of `struct_size` bytes; NULL is -EINVAL.
#[no_mangle]
pub unsafe extern "C" fn gmem_window_reshape(
    window: *mut gmem_window,
    config: *const gmem_window_config,
) -> c_int {
    guarded(|| {
        let window = WINDOWS.get(window as usize, "window")?;
        // SAFETY: the caller's promise is `read`'s.
        let config: WindowConfig = unsafe { structs::read(config)? }.check()?;
        window.reshape(&config)
    })
}

/// [`Window::remove`](crate::Window::remove) for C. Closes the library's iommufd, too.
#[no_mangle]
pub extern "C" fn gmem_window_free(window: *mut gmem_window) -> c_int {
    guarded(|| {
        if window.is_null() {
            return Ok(());
        }
        WINDOWS.get(window as usize, "window")?.remove()?;
        WINDOWS.remove(window as usize, "window").map(drop)
    })
}
