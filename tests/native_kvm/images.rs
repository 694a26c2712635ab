// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the VMM places into a guest's memory, private or out of the kernel's direct map.

use crate::common::skipped;
use crate::guest::Guest;
use crate::held::Ring;
use crate::kvm::Machine;
use crate::name_of;
use gmem::{Attribute, Backing, Block, BlockConfig, WindowConfig};
use Attribute::{Private, Shared};

const PAGE: u64 = 4096;
const SIZE: u64 = 2 << 20;
/// The page that is private; the guest's code is in others.
const DATA: u64 = 0x8000;

#[test]
fn a_guest_finds_an_image_in_private_memory() {
    let test = name_of(a_guest_finds_an_image_in_private_memory);
    let Some(machine) = Machine::in_place(test) else {
        return;
    };
    let config = BlockConfig::confidential("ram", SIZE, Shared);
    let block = Block::new(&machine.vm, &config).unwrap();
    assert_eq!(block.backing(), Backing::InPlace);
    let guest = Guest::on(machine, block);
    let vm = &guest.machine.vm;
    vm.convert(DATA, SIZE - DATA, Private).unwrap();
    let image: Vec<u8> = (0..3 * PAGE).map(|byte| (byte >> 4) as u8).collect();
    // In the middle of pages, in memory that has been used and in memory that has not.
    guest.stores(DATA, 0x1111);
    guest.block.place(DATA + 0x800, &image).unwrap();
    assert_eq!(guest.block.run_at(DATA).unwrap(), (Private, SIZE));
    for at in [0, 2, 0x7fe, 0x800, 0x1800, image.len() - 2] {
        let word = u16::from_le_bytes([image[at], image[at + 1]]);
        assert_eq!(guest.loads(DATA + 0x800 + at as u64), word, "at {at:#x}");
    }
    // This VM type keeps what a page holds when it converts.
    assert_eq!(guest.loads(DATA), 0x1111);
    let stats = guest.block.stats();
    assert_eq!((stats.to_private, stats.to_shared), (1, 0));
    assert_eq!(stats.bytes_quarantined, 0);
    // Shared memory needs no conversion.
    let calls = stats.attribute_calls;
    guest.block.place(0x4000, &[1, 2]).unwrap();
    assert_eq!(guest.loads(0x4000), 0x201);
    assert_eq!(guest.block.stats().attribute_calls, calls);
}

#[test]
fn memory_out_of_the_direct_map_serves_the_guest_and_nobody_else() {
    let test = name_of(memory_out_of_the_direct_map_serves_the_guest_and_nobody_else);
    let Some(machine) = Machine::private(test) else {
        return;
    };
    if !machine.vm.probe().no_direct_map {
        skipped(test, format_args!("{}", machine.vm.probe()));
        return;
    }
    let config = BlockConfig {
        direct_map: false,
        ..BlockConfig::confidential("ram", SIZE, Shared)
    };
    let block = Block::new(&machine.vm, &config).unwrap();
    block.preallocate(2).unwrap();
    let guest = Guest::on(machine, block);
    guest.stores(DATA, 0x2222);
    assert_eq!(guest.loads(DATA), 0x2222);
    guest.machine.vm.convert(DATA, PAGE, Private).unwrap();
    guest.block.place(DATA, &[0x33, 0x33]).unwrap();
    assert_eq!(guest.loads(DATA), 0x3333);
    let config = WindowConfig {
        ioas_id: 0,
        offset: 0,
        length: SIZE,
        iova: 0,
        readonly: false,
    };
    let error = guest
        .block
        .add_window(guest.machine.file(), &config)
        .unwrap_err();
    assert_eq!(error.errno(), libc::ENOTSUP);
    match Ring::new() {
        Ok(ring) => {
            let registered = ring.register(guest.block.host(), PAGE);
            assert_eq!(registered, Err(libc::EFAULT));
        }
        Err(error) => skipped(test, format_args!("in part: io_uring: {error}")),
    }
}
