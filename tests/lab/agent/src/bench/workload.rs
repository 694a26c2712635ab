// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a case asks of a guest and of the replay: the payload's verb, and the same requests as a list.

use crate::monitor::sequence::{self, Flavour, Request, WorkingSet};

/// Requests that the guest makes for one verb.
pub struct Batch {
    pub verb: String,
    /// By vCPU.
    pub requests: Vec<Vec<Request>>,
}

impl Batch {
    pub fn linear(address: u64, count: u64, pages: u64, private: bool) -> Self {
        Self {
            verb: format!(
                "bench-linear {address:#x} {count} {pages} {}",
                u64::from(private)
            ),
            requests: vec![sequence::linear(address, count, pages, private).collect()],
        }
    }

    pub fn once(set: WorkingSet, private: bool) -> Self {
        Self {
            verb: format!("bench-once {} {}", place(&set), u64::from(private)),
            requests: vec![set.once(private).collect()],
        }
    }

    pub fn churn(set: WorkingSet, count: u64, seed: u64) -> Self {
        Self {
            verb: format!("bench-churn {} {count} {seed}", place(&set)),
            requests: vec![set.churn(count, seed).collect()],
        }
    }

    /// As `churn`, to `first` and back, and the guest writes to a page as soon as it is converted.
    pub fn turns(set: WorkingSet, count: u64, seed: u64, first: bool) -> Self {
        Self {
            verb: format!(
                "bench-turns {} {count} {seed} {}",
                place(&set),
                u64::from(first)
            ),
            requests: vec![set.turns(count, seed, first).collect()],
        }
    }

    pub fn boot(
        flavour: Flavour,
        ram_bytes: u64,
        swiotlb: u64,
        high: u64,
        allocations: u64,
    ) -> Self {
        let number = match flavour {
            Flavour::Tdx => 0,
            Flavour::Snp => 1,
        };
        let requests = sequence::boot(flavour, ram_bytes, swiotlb, high, allocations);
        Self {
            verb: format!(
                "bench-boot {number} {ram_bytes:#x} {swiotlb:#x} {high:#x} {allocations}"
            ),
            requests: vec![requests.collect()],
        }
    }

    /// Churn on two processors, each in its half; the second half begins right after the first.
    pub fn two(first: WorkingSet, count: u64, seed: u64) -> Self {
        let second = second_half(&first);
        Self {
            verb: format!(
                "bench-two {:#x} {} {} {count} {seed}",
                first.address, first.region_pages, first.set
            ),
            requests: vec![
                first.churn(count, seed).collect(),
                second.churn(count, seed.wrapping_mul(3)).collect(),
            ],
        }
    }

    /// Churn, while the second processor has the device write beside it.
    pub fn neighbours(set: WorkingSet, count: u64, seed: u64, source: u64) -> Self {
        Self {
            verb: format!(
                "bench-neighbours {} {count} {seed} {source:#x}",
                place(&set)
            ),
            requests: vec![set.churn(count, seed).collect()],
        }
    }

    pub fn count(&self) -> usize {
        self.requests.iter().map(Vec::len).sum()
    }
}

pub fn second_half(first: &WorkingSet) -> WorkingSet {
    WorkingSet {
        address: first.address + first.region_pages * 4096,
        ..*first
    }
}

fn place(set: &WorkingSet) -> String {
    format!(
        "{:#x} {} {} {}",
        set.address, set.region_pages, set.set, set.spread
    )
}

/// A case's requests.
pub struct Workload {
    /// Once, when the device is plugged in.
    pub setup: Vec<Batch>,
    pub timed: Batch,
    /// After each run: back to where it began.
    pub undo: Vec<Batch>,
    /// Whether L1 gives memfds 2 MiB pages where it can.
    pub huge_shmem: bool,
    /// Whether the bare calls include those that free memory, where ours puts them off.
    pub bare_frees: bool,
    /// Timed runs.
    pub runs: usize,
}

#[cfg(test)]
mod tests {
    use crate::monitor::sequence::{boot, swiotlb_bytes, Flavour, WorkingSet};
    use std::collections::BTreeSet;

    const GIB: u64 = 1 << 30;

    #[test]
    fn a_working_set_has_no_page_twice_and_keeps_its_distance() {
        let set = WorkingSet {
            address: 0x1000_0000,
            region_pages: 1024,
            set: 512,
            spread: 4,
        };
        let pages: BTreeSet<u64> = (0..512).map(|index| set.page(index)).collect();
        assert_eq!(pages.len(), 512);
        assert!(pages.iter().all(|page| page % 0x4000 == 0x3000));
        assert!(pages
            .last()
            .is_some_and(|page| *page < 0x1000_0000 + 4096 * 4096));
    }

    #[test]
    fn a_boot_shares_the_swiotlb_once_and_gives_back_what_it_took() {
        assert_eq!(swiotlb_bytes(8 * GIB) >> 20, 491);
        for flavour in [Flavour::Tdx, Flavour::Snp] {
            let (low, high) = (GIB, 4 * GIB);
            let mut shared = BTreeSet::new();
            for request in boot(flavour, 8 * GIB, low, high, 3000) {
                assert!(request.pages <= 32_768);
                for page in 0..request.pages {
                    let page = request.address / 4096 + page;
                    match request.private {
                        true => assert!(shared.remove(&page)),
                        false => assert!(shared.insert(page)),
                    }
                }
            }
            let pool = shared.range(..high / 4096).count() as u64;
            assert_eq!(pool * 4096, swiotlb_bytes(8 * GIB));
        }
    }

    #[test]
    fn an_snp_guest_has_few_large_requests_and_a_tdx_guest_many_of_2_mib() {
        let largest = |flavour| {
            boot(flavour, 8 * GIB, GIB, 4 * GIB, 0)
                .map(|r| r.pages)
                .max()
        };
        assert_eq!(largest(Flavour::Snp), Some(32_768));
        assert_eq!(largest(Flavour::Tdx), Some(512));
        assert_eq!(boot(Flavour::Tdx, 8 * GIB, GIB, 4 * GIB, 0).count(), 246);
        assert_eq!(boot(Flavour::Snp, 8 * GIB, GIB, 4 * GIB, 0).count(), 12);
    }
}
