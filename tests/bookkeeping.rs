// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the library's own memory can grow to.

#[path = "../benches/common/mod.rs"]
#[allow(dead_code)]
mod common;
#[path = "../benches/counting/mod.rs"]
mod counting;

use common::Rig;
use counting::in_use;
use gmem::{Attribute, PAGE_SIZE};
use std::time::Duration;

const BLOCK_BYTES: u64 = 64 << 20;

/// Every other page private, then each of its neighbours shared anew: as many runs and as many
/// areas of the IOMMU as can be.
#[test]
fn a_guest_that_alternates_pages_can_not_make_the_books_exceed_a_thousandth_of_the_block() {
    let before = in_use();
    // Nothing is released by itself: what is kept takes books, too.
    let rig = Rig::keeping(BLOCK_BYTES, Duration::from_secs(3600));
    for parity in [0, 1] {
        for page in (parity..BLOCK_BYTES / PAGE_SIZE).step_by(2) {
            rig.convert(page * PAGE_SIZE, PAGE_SIZE, Attribute::Private);
            if parity == 1 {
                rig.convert((page - 1) * PAGE_SIZE, PAGE_SIZE, Attribute::Shared);
            }
        }
        let grown = (in_use() - before) as u64;
        assert!(grown * 1000 <= BLOCK_BYTES, "{grown} bytes");
        // What statistics say is not less than what the lists take, but for the rest of a rig, of which 4 KiB are what a VM
        // remembers of conversions that its vCPUs may have met.
        let told = rig.block.stats().bookkeeping_bytes;
        assert!(told * 1000 <= BLOCK_BYTES, "{told} bytes");
        assert!(
            grown <= told + (13 << 10),
            "{grown} bytes where {told} are said"
        );
    }
    let stats = rig.block.stats();
    assert_eq!(stats.runs, BLOCK_BYTES / PAGE_SIZE / 2);
    assert!(stats.dma_areas_max >= BLOCK_BYTES / PAGE_SIZE / 2);
}
