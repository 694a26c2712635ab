// SPDX-License-Identifier: MIT OR Apache-2.0
//! Which NUMA node memory is on: shared bytes page by page, private ones by the kernel's counters per node.

use super::memory::SharedFile;
use super::pages::counter;
use crate::failure::{Attempt, Failure};
use std::fs;
use std::io;
use std::ops::Range;

const PAGE_BYTES: u64 = 4096;

/// Bytes of file pages on a node that are not shmem, now: those of guest_memfds. Compare two of these.
pub fn outside_shmem(node: usize) -> Result<u64, Failure> {
    fs::write("/proc/sys/vm/stat_refresh", "1")
        .attempt(|| "writing /proc/sys/vm/stat_refresh".into())?;
    let path = format!("/sys/devices/system/node/node{node}/vmstat");
    let text = fs::read_to_string(&path).attempt(|| format!("reading {path}"))?;
    let file = counter(&text, "nr_file_pages")?;
    let shmem = counter(&text, "nr_shmem")?;
    Ok((file - shmem.min(file)) * PAGE_BYTES)
}

/// How many pages of a shared range are on each of the two nodes. Every page of the range must be allocated.
pub fn of_pages(file: &SharedFile, range: Range<u64>) -> Result<[u64; 2], Failure> {
    let map = file.map(range.clone())?;
    let mut pages: Vec<*mut libc::c_void> = (0..range.end - range.start)
        .step_by(PAGE_BYTES as usize)
        .map(|offset| {
            map.address()
                .wrapping_add(offset as usize)
                .cast_mut()
                .cast()
        })
        .collect();
    for page in &pages {
        // SAFETY: inside the mapping; reading a page that the file has makes it present here.
        unsafe { page.cast::<u8>().read_volatile() };
    }
    let mut nodes = vec![0i32; pages.len()];
    // SAFETY: both arrays have as many elements as are named; without target nodes nothing moves.
    let result = unsafe {
        libc::syscall(
            libc::SYS_move_pages,
            0,
            pages.len(),
            pages.as_mut_ptr(),
            std::ptr::null::<i32>(),
            nodes.as_mut_ptr(),
            0,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error()).attempt(|| "asking for the nodes of pages".into());
    }
    let mut counts = [0; 2];
    for node in nodes {
        let count = usize::try_from(node)
            .ok()
            .and_then(|node| counts.get_mut(node))
            .attempt(|| format!("move_pages says {node} of a page"))?;
        *count += 1;
    }
    Ok(counts)
}
