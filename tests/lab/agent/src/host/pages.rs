// SPDX-License-Identifier: MIT OR Apache-2.0
//! How much memory is in guest_memfds, machine-wide: the kernel counts their pages as file pages but not as shmem.
//!
//! A guest_memfd reports no blocks of its own, so this difference is the only count there is. It holds as long as
//! nothing else caches files: the lab's root is a tmpfs (shmem) and its disks are read with O_DIRECT.

use crate::failure::{Attempt, Failure};
use crate::place;
use std::fs;

const PAGE_BYTES: u64 = 4096;

/// Bytes of file pages that are not shmem, now. Compare two of these. Where others cache files as well it says nothing, see
/// `can_tell`.
pub fn outside_shmem() -> Result<u64, Failure> {
    if !can_tell() {
        return Ok(0);
    }
    // The counters are kept per processor and folded now and then; this folds them at once.
    fs::write("/proc/sys/vm/stat_refresh", "1")
        .attempt(|| "writing /proc/sys/vm/stat_refresh".into())?;
    let text = fs::read_to_string("/proc/vmstat").attempt(|| "reading /proc/vmstat".into())?;
    let file = counter(&text, "nr_file_pages")?;
    let shmem = counter(&text, "nr_shmem")?;
    Ok((file - shmem.min(file)) * PAGE_BYTES)
}

/// Whether the machine's count is that of our guests.
pub fn can_tell() -> bool {
    place::is_lab()
}

/// One of the counters of /proc/vmstat.
pub fn count(name: &str) -> Result<u64, Failure> {
    let text = fs::read_to_string("/proc/vmstat").attempt(|| "reading /proc/vmstat".into())?;
    counter(&text, name)
}

/// A counter of a file like /proc/vmstat.
pub fn counter(text: &str, name: &str) -> Result<u64, Failure> {
    text.lines()
        .filter_map(|line| line.split_once(' '))
        .find(|(key, _)| *key == name)
        .and_then(|(_, value)| value.trim().parse().ok())
        .attempt(|| format!("/proc/vmstat has no counter {name}"))
}

#[cfg(test)]
mod tests {
    use super::counter;

    #[test]
    fn a_counter_is_found_by_its_whole_name() {
        let text = "nr_shmem_hugepages 7\nnr_shmem 42\n";
        assert_eq!(counter(text, "nr_shmem").unwrap(), 42);
        assert!(counter(text, "nr_file_pages").is_err());
    }
}
