// SPDX-License-Identifier: MIT OR Apache-2.0
//! Pages that the host is said to have lost. It has not: who wants to see a guest meet one must
//! break it (MADV_HWPOISON), which is for the lab's machine.

use crate::guest::Guest;
use crate::kvm::Machine;
use crate::name_of;
use gmem::{Attribute, Block, BlockConfig};
use Attribute::{Private, Shared};

const PAGE: u64 = 4096;
const SIZE: u64 = 2 << 20;
const DATA: u64 = 0x8000;

#[test]
fn a_reset_brings_fresh_memory_for_lost_pages_alone() {
    let test = name_of(a_reset_brings_fresh_memory_for_lost_pages_alone);
    let Some(machine) = Machine::private(test) else {
        return;
    };
    let config = BlockConfig::confidential("ram", SIZE, Shared);
    let block = Block::new(&machine.vm, &config).unwrap();
    let guest = Guest::on(machine, block);
    let vm = &guest.machine.vm;
    for page in 0..4 {
        guest.stores(DATA + page * PAGE, 0x1000 + page as u16);
    }
    vm.convert(DATA + 2 * PAGE, 2 * PAGE, Private).unwrap();
    for page in 2..4 {
        guest.stores(DATA + page * PAGE, 0x1000 + page as u16);
    }
    // One of each kind.
    vm.poison(DATA + PAGE, 1).unwrap();
    guest.block.poison(DATA + 2 * PAGE + 5, 1).unwrap();
    assert_eq!(guest.block.stats().bytes_poisoned, 2 * PAGE);
    let error = vm.convert(DATA, 4 * PAGE, Shared).unwrap_err();
    assert_eq!(error.errno(), libc::EIO, "{error}");
    assert_eq!(guest.loads(DATA), 0x1000);
    assert_eq!(guest.loads(DATA + 3 * PAGE), 0x1003);

    guest.block.reset().unwrap();
    assert_eq!(guest.block.stats().bytes_poisoned, 0);
    assert_eq!(guest.block.run_at(0).unwrap(), (Shared, SIZE));
    assert_eq!(guest.loads(DATA), 0x1000, "it was never lost");
    assert_eq!(guest.loads(DATA + PAGE), 0);
    assert_eq!(guest.loads(DATA + 2 * PAGE), 0);
    guest.stores(DATA + PAGE, 0x2222);
    assert_eq!(guest.loads(DATA + PAGE), 0x2222);
    vm.convert(DATA, 4 * PAGE, Private).unwrap();
}
