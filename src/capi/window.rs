// SPDX-License-Identifier: MIT OR Apache-2.0
//! A block's DMA windows, for C.

use super::structs::{self, *};
use super::{block_of, give, gmem_block, gmem_window, guarded, WINDOWS};
use crate::WindowConfig;
use std::ffi::c_int;
use std::sync::Arc;

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
