// SPDX-License-Identifier: MIT OR Apache-2.0
//! Counters: what did happen, for whoever has to find out afterwards.

use crossbeam::utils::CachePadded;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// A number that only grows; on a cache line of its own, since every vCPU counts.
#[derive(Debug, Default)]
pub(crate) struct Counter(CachePadded<AtomicU64>);

impl Counter {
    pub(crate) fn add(&self, count: u64) {
        self.0.fetch_add(count, Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    /// Answers what it was.
    fn raise_to(&self, value: u64) -> u64 {
        // It rarely does.
        match self.get() {
            most if most >= value => most,
            _ => self.0.fetch_max(value, Ordering::Relaxed),
        }
    }
}

/// What a VM counts.
#[derive(Debug, Default)]
pub(crate) struct VmCounters {
    pub(crate) requests: Counter,
    pub(crate) failures: Counter,
    pub(crate) ignored_bytes: Counter,
    convert_ns_total: Counter,
    convert_ns_max: Counter,
}

impl VmCounters {
    pub(crate) fn took(&self, time: Duration) {
        let ns = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        self.convert_ns_total.add(ns);
        self.convert_ns_max.raise_to(ns);
    }

    pub(crate) fn snapshot(&self) -> VmStats {
        VmStats {
            requests: self.requests.get(),
            failures: self.failures.get(),
            ignored_bytes: self.ignored_bytes.get(),
            convert_ns_total: self.convert_ns_total.get(),
            convert_ns_max: self.convert_ns_max.get(),
        }
    }
}

/// What a block counts.
#[derive(Debug, Default)]
pub(crate) struct BlockCounters {
    pub(crate) to_private: Counter,
    pub(crate) to_shared: Counter,
    pub(crate) failures: Counter,
    pub(crate) map_file_calls: Counter,
    pub(crate) map_address_calls: Counter,
    pub(crate) unmap_calls: Counter,
    pub(crate) attribute_calls: Counter,
    pub(crate) access_refused: Counter,
    pub(crate) release_failures: Counter,
    pub(crate) cut_calls: Counter,
    pub(crate) set_calls: Counter,
    pub(crate) remap_windows: Counter,
    pub(crate) retries: Counter,
    pub(crate) quarantines: Counter,
    pub(crate) huge_page_splits: Counter,
    pub(crate) huge_page_merges: Counter,
    pub(crate) resumed: Counter,
    pub(crate) runs_refused: Counter,
    pub(crate) releases_cancelled: Counter,
    pub(crate) heals: Counter,
    pub(crate) requests_refused: Counter,
    pub(crate) windows_lost: Counter,
    areas: AtomicU64,
    pub(crate) dma_areas_max: Counter,
}

impl BlockCounters {
    /// Notes that one window's areas went from so many to so many. Whether the block never had that
    /// many, by the next power of two: so a guest that goes up and down is told of once.
    pub(crate) fn areas_changed(&self, before: u64, after: u64) -> bool {
        let change = after.wrapping_sub(before);
        let all = self
            .areas
            .fetch_add(change, Ordering::Relaxed)
            .wrapping_add(change);
        let most = self.dma_areas_max.raise_to(all);
        all.leading_zeros() < most.leading_zeros()
    }
}

/// The numbers of one VM, since it was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct VmStats {
    /// Conversion requests of the guest, senseless ones included.
    pub requests: u64,
    /// Those that got an error.
    pub failures: u64,
    /// Bytes of requests to share what is no memory of a block, which were ignored.
    pub ignored_bytes: u64,
    /// Nanoseconds in all requests together.
    pub convert_ns_total: u64,
    /// Nanoseconds of the longest request.
    pub convert_ns_max: u64,
}

/// The numbers of one block: its state now, and counts since it was created.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct BlockStats {
    /// Size in bytes.
    pub size: u64,
    /// Bytes that are private now.
    pub bytes_private: u64,
    /// Bytes that are shared now; with the private ones they make up the size.
    pub bytes_shared: u64,
    /// Bytes that a device can reach now; a byte that two windows show counts twice.
    pub bytes_dma_mapped: u64,
    /// Bytes that no device may reach after an undo that failed; of an ordinary VM's block, that
    /// some window lacks.
    pub bytes_quarantined: u64,
    /// Private runs now.
    pub runs: u64,
    /// Bindings now.
    pub bindings: u64,
    /// DMA windows now.
    pub windows: u64,
    /// Kernel areas of all windows now.
    pub dma_areas: u64,
    /// Conversions to private that changed a page here.
    pub to_private: u64,
    /// Conversions to shared that changed a page here.
    pub to_shared: u64,
    /// Conversions of a range of this block that got an error.
    pub failures: u64,
    /// Mappings of the block that IOMMU_IOAS_MAP_FILE made: not those that it refused, nor what is tried
    /// on pages of no meaning.
    pub map_file_calls: u64,
    /// Mappings of the block that IOMMU_IOAS_MAP made.
    pub map_address_calls: u64,
    /// IOMMU_IOAS_UNMAP calls.
    pub unmap_calls: u64,
    /// KVM_SET_MEMORY_ATTRIBUTES calls.
    pub attribute_calls: u64,
    /// Accesses of the VMM to private pages that
    /// [`Block::check_access`](crate::Block::check_access) refused.
    pub access_refused: u64,
    /// Times that memory of the other plane could not be freed after a conversion: double memory
    /// until the page converts again.
    pub release_failures: u64,
    /// VFIO_IOMMU_UNMAP_DMA calls: unmaps that may cut areas.
    pub cut_calls: u64,
    /// IOMMU_VFIO_IOAS SET calls, which those need.
    pub set_calls: u64,
    /// Times that pages which stayed shared were out of a window for a moment.
    pub remap_windows: u64,
    /// Most kernel areas that all windows together ever had.
    pub dma_areas_max: u64,
    /// Times that the kernel said EAGAIN and was asked again.
    pub retries: u64,
    /// Huge pages that hold shared memory now; hugetlb only.
    pub huge_pages_shared: u64,
    /// Memory of the library, in bytes, that grows with fragmentation.
    pub bookkeeping_bytes: u64,
    /// Times that a range was quarantined.
    pub quarantines: u64,
    /// Huge pages that are one page now; in-place with hugetlb only.
    pub huge_pages_whole: u64,
    /// Huge pages that the kernel has split now, since some of their pages are shared; in-place with
    /// hugetlb only.
    pub huge_pages_split: u64,
    /// Times that a conversion had a huge page split.
    pub huge_page_splits: u64,
    /// Times that a conversion made a huge page one page again.
    pub huge_page_merges: u64,
    /// Times that a conversion went on where the kernel had stopped half-way.
    pub resumed: u64,
    /// Requests that [`BlockConfig::max_runs`](crate::BlockConfig::max_runs) forbade.
    pub runs_refused: u64,
    /// Bytes of memory that the host has [lost](crate::Block::poison), in either plane.
    pub bytes_poisoned: u64,
    /// Bytes of memory that pages have left and that are not released yet, in both planes: at most so
    /// much is held twice for it. See [`BlockConfig::release_delay`](crate::BlockConfig::release_delay).
    pub double_bytes: u64,
    /// Times that a conversion got back what was not released yet.
    pub releases_cancelled: u64,
    /// Times that quarantined pages were put right without a conversion.
    pub heals: u64,
    /// Requests that [`BlockConfig::max_request`](crate::BlockConfig::max_request) forbade.
    pub requests_refused: u64,
    /// The bound [`BlockConfig::max_runs`](crate::BlockConfig::max_runs) as it holds, given or by default. 0: any
    /// number. In a block that is not confidential this and the next three are 0.
    pub max_runs: u64,
    /// The bound [`BlockConfig::max_request`](crate::BlockConfig::max_request) as it holds.
    pub max_request: u64,
    /// Whole milliseconds of [`BlockConfig::release_delay`](crate::BlockConfig::release_delay) as it holds, so that
    /// less than one is 0. Also 0 in place, where no page leaves memory.
    pub release_delay_ms: u64,
    /// The bound [`BlockConfig::max_pending`](crate::BlockConfig::max_pending) as it holds. 0: nothing is kept.
    pub max_pending: u64,
    /// DMA windows that ended with their IOAS, which was destroyed before they were removed.
    pub windows_lost: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_order_of_areas_is_told_once() {
        let counters = BlockCounters::default();
        assert!(counters.areas_changed(0, 5));
        assert!(!counters.areas_changed(5, 7));
        assert!(counters.areas_changed(7, 8));
        for _ in 0..3 {
            assert!(!counters.areas_changed(8, 7));
            assert!(!counters.areas_changed(7, 8));
        }
        // Another window of the block.
        assert!(counters.areas_changed(0, 8));
        assert_eq!(counters.dma_areas_max.get(), 16);
    }
}
