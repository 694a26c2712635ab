// SPDX-License-Identifier: MIT OR Apache-2.0
//! Blocks of ordinary VMs: one guest_memfd, every page of it shared.

use crate::kvm::{Exit, Machine, Regs};
use crate::{about, alone, name_of, unevictable};
use gmem::{Attribute, Backing, Block, BlockConfig, Cause, NumaPolicy, PolicyMode, Vm};
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::sync::Arc;

const PAGE: u64 = 4096;
const MIB: u64 = 1 << 20;
const CODE: u64 = 0x1000;
const INPUT: u64 = 0x2000;
const OUTPUT: u64 = 0x3000;

/// mov ax,[INPUT]; out 0x10,ax; not ax; mov [OUTPUT],ax; hlt
const PROGRAM: [u8; 11] = [
    0xa1, 0x00, 0x20, 0xe7, 0x10, 0xf7, 0xd0, 0xa3, 0x00, 0x30, 0xf4,
];

fn block(machine: &Machine, size: u64) -> Arc<Block> {
    Block::new(&machine.vm, &BlockConfig::new("ram", size)).unwrap()
}

fn write(block: &Block, offset: u64, bytes: &[u8]) {
    assert!(offset + bytes.len() as u64 <= block.span().end());
    // SAFETY: within the mapping, and no vCPU runs.
    unsafe {
        std::ptr::copy_nonoverlapping(
            bytes.as_ptr(),
            block.host().add(offset as usize),
            bytes.len(),
        );
    }
}

fn read(block: &Block, offset: u64) -> u16 {
    assert!(offset + 2 <= block.span().end());
    // SAFETY: within the mapping, and no vCPU runs.
    unsafe { block.host().add(offset as usize).cast::<u16>().read() }
}

/// Whether the block has `wanted` bytes of memory, cleared already or not yet: cachestat(2), or on a
/// kernel built without it what the whole system has since it had `before`. (mincore(2) passes over
/// pages that nobody has touched.)
fn has_memory(block: &Block, wanted: u64, before: u64) -> bool {
    // Since Linux 6.5, on every architecture.
    const SYS_CACHESTAT: libc::c_long = 451;
    let range = [0u64; 2];
    let mut found = [0u64; 5];
    let fd = block.file(Attribute::Shared).as_raw_fd();
    // SAFETY: `struct cachestat_range` is two words, `struct cachestat` five.
    match unsafe { libc::syscall(SYS_CACHESTAT, fd, &range, &mut found, 0) } {
        0 => found[0] * PAGE == wanted,
        _ => {
            let grown = unevictable().saturating_sub(before);
            grown.abs_diff(wanted) < wanted / 8 + MIB
        }
    }
}

/// Runs PROGRAM on whatever shows the block's `offset` at guest physical address 0.
fn guest_answers(machine: &Machine, block: &Block, offset: u64, value: u16) {
    write(block, offset + CODE, &PROGRAM);
    write(block, offset + INPUT, &value.to_le_bytes());
    let vcpu = machine.add_vcpu();
    let exit = vcpu.start(Regs {
        rip: CODE,
        ..Default::default()
    });
    let value_out = value.into();
    assert_eq!(
        exit,
        Exit::Out {
            port: 0x10,
            value: value_out
        }
    );
    assert_eq!(
        read(block, offset + OUTPUT),
        0,
        "the guest is not there yet"
    );
    assert_eq!(vcpu.go_on(), Exit::Halt);
    assert_eq!(read(block, offset + OUTPUT), !value);
}

#[test]
fn guest_host_and_file_see_the_same_bytes() {
    let test = name_of(guest_host_and_file_see_the_same_bytes);
    let Some(machine) = Machine::ordinary(test) else {
        return;
    };
    let block = block(&machine, 2 * MIB);
    assert_eq!(block.backing(), Backing::InPlace);
    let slot = block.memslot(0).unwrap();
    machine.add_slot(0, 0, 2 * MIB, &slot).unwrap();
    block.bind(0, 2 * MIB, 0).unwrap().keep();
    guest_answers(&machine, &block, 0, 0x1234);

    // A second mapping of the file is what another process would have.
    let file = block.file(Attribute::Shared);
    // SAFETY: a new mapping, at an address of the kernel's choice, read once and unmapped.
    let other = unsafe {
        let map = libc::mmap(
            std::ptr::null_mut(),
            PAGE as usize,
            libc::PROT_READ,
            libc::MAP_SHARED,
            file.as_raw_fd(),
            OUTPUT as i64,
        );
        assert_ne!(map, libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
        let value = map.cast::<u16>().read();
        libc::munmap(map, PAGE as usize);
        value
    };
    assert_eq!(other, !0x1234);
    block.unbind(0, 2 * MIB, 0).unwrap();
    machine.remove_slot(0);
}

#[test]
fn a_slot_may_begin_anywhere_in_a_block() {
    let test = name_of(a_slot_may_begin_anywhere_in_a_block);
    let Some(machine) = Machine::ordinary(test) else {
        return;
    };
    let block = block(&machine, 2 * MIB);
    let slot = block.memslot(MIB).unwrap();
    machine.add_slot(0, 0, MIB, &slot).unwrap();
    guest_answers(&machine, &block, MIB, 0xbeef);
    assert_eq!(read(&block, OUTPUT), 0);
    machine.remove_slot(0);
}

/// What slots in other address spaces (SMM) rely on.
#[test]
fn a_plain_slot_on_the_mapping_reaches_the_same_memory() {
    let test = name_of(a_plain_slot_on_the_mapping_reaches_the_same_memory);
    let Some(machine) = Machine::ordinary(test) else {
        return;
    };
    let block = block(&machine, 2 * MIB);
    machine.add_plain_slot(0, 0, MIB, block.host()).unwrap();
    let slot = block.memslot(0).unwrap();
    machine.add_slot(1, 16 * MIB, 2 * MIB, &slot).unwrap();
    guest_answers(&machine, &block, 0, 0x55aa);
    machine.remove_slot(0);
    machine.remove_slot(1);
}

#[test]
fn an_offset_is_bound_once_for_the_library_and_for_kvm() {
    let test = name_of(an_offset_is_bound_once_for_the_library_and_for_kvm);
    let Some(machine) = Machine::ordinary(test) else {
        return;
    };
    let block = block(&machine, 2 * MIB);
    let slot = block.memslot(0).unwrap();
    machine.add_slot(0, 0, 2 * MIB, &slot).unwrap();
    block.bind(0, 2 * MIB, 0).unwrap().keep();
    let again = machine.add_slot(1, 16 * MIB, 2 * MIB, &slot).unwrap_err();
    // kvm_gmem_bind: Linux 6.18 says EINVAL, 7.3 EEXIST.
    let errno = again.raw_os_error().unwrap();
    assert!([libc::EINVAL, libc::EEXIST].contains(&errno), "{again}");
    let again = block.bind(0, 2 * MIB, 16 * MIB).unwrap_err();
    assert_eq!(again.errno(), libc::EEXIST);
    guest_answers(&machine, &block, 0, 0x0ff0);
    machine.remove_slot(0);
}

#[test]
fn a_block_belongs_to_its_vm() {
    let test = name_of(a_block_belongs_to_its_vm);
    let (Some(machine), Some(other)) = (Machine::ordinary(test), Machine::ordinary(test)) else {
        return;
    };
    let block = block(&machine, MIB);
    let slot = block.memslot(0).unwrap();
    let error = other.add_slot(0, 0, MIB, &slot).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
    let null = File::open("/dev/null").unwrap();
    assert_eq!(Vm::new(&null).unwrap_err().errno(), libc::ENOTTY);
}

#[test]
fn memory_is_there_when_touched_or_preallocated() {
    let test = name_of(memory_is_there_when_touched_or_preallocated);
    let _turn = alone();
    let Some(machine) = Machine::ordinary(test) else {
        return;
    };
    for threads in [1, 3] {
        let before = unevictable();
        let block = block(&machine, 160 * MIB);
        assert!(has_memory(&block, 0, before));
        write(&block, 5 * PAGE, &[1]);
        assert!(has_memory(&block, PAGE, before));
        block.preallocate(threads).unwrap();
        assert!(has_memory(&block, 160 * MIB, before));
        assert_eq!(read(&block, 5 * PAGE), 1, "what was there stays");
    }
}

#[test]
fn what_is_discarded_is_the_hosts_and_reads_zero() {
    let test = name_of(what_is_discarded_is_the_hosts_and_reads_zero);
    let _turn = alone();
    let Some(machine) = Machine::ordinary(test) else {
        return;
    };
    let block = block(&machine, 64 * MIB);
    let slot = block.memslot(0).unwrap();
    machine.add_slot(0, 0, 64 * MIB, &slot).unwrap();
    block.bind(0, 64 * MIB, 0).unwrap().keep();
    block.preallocate(1).unwrap();
    for offset in [INPUT, OUTPUT, 32 * MIB] {
        write(&block, offset, &[1, 1]);
    }
    let before = unevictable();
    block.discard(OUTPUT, PAGE).unwrap();
    assert_eq!(read(&block, OUTPUT), 0, "a byte survived");
    assert_ne!(read(&block, INPUT), 0, "a neighbour's byte is gone");
    block.discard(0, 48 * MIB).unwrap();
    assert!(about(before - unevictable(), 48 * MIB), "memory is held");
    for offset in [INPUT, OUTPUT, 32 * MIB] {
        assert_eq!(read(&block, offset), 0, "a byte survived");
    }
    guest_answers(&machine, &block, 0, 0x4321);
    block.unbind(0, 64 * MIB, 0).unwrap();
    machine.remove_slot(0);
}

#[test]
fn under_a_policy_memory_is_there_from_the_start() {
    let test = name_of(under_a_policy_memory_is_there_from_the_start);
    let _turn = alone();
    let Some(machine) = Machine::ordinary(test) else {
        return;
    };
    for mode in [
        PolicyMode::Preferred,
        PolicyMode::Bind,
        PolicyMode::Interleave,
    ] {
        let config = |nodes: &[u64]| BlockConfig {
            policy: NumaPolicy::new(mode, nodes),
            ..BlockConfig::new("ram", 64 * MIB)
        };
        let before = unevictable();
        let block = Block::new(&machine.vm, &config(&[1])).unwrap();
        assert!(has_memory(&block, 64 * MIB, before));
        // No machine has that many.
        let error = Block::new(&machine.vm, &config(&[0, 1 << 63])).unwrap_err();
        assert_eq!(error.errno(), libc::EINVAL);
        assert!(error.to_string().contains("nodes 127"), "{error}");
    }
}

#[test]
fn the_mapping_behind_ram_is_a_guest_memfd() {
    let test = name_of(the_mapping_behind_ram_is_a_guest_memfd);
    let Some(machine) = Machine::ordinary(test) else {
        return;
    };
    let block = block(&machine, 16 * MIB);
    for page in 0..16 * MIB / PAGE {
        write(&block, page * PAGE, &[1]);
    }
    let (start, end) = (block.host() as u64, block.host() as u64 + 16 * MIB);
    let smaps = fs::read_to_string("/proc/self/smaps").unwrap();
    let head = format!("{start:x}-{end:x} rw-s ");
    let found = smaps.lines().position(|line| line.starts_with(&head));
    let lines: Vec<&str> = smaps.lines().skip(found.expect(&smaps)).take(25).collect();
    assert!(
        lines[0].contains("guest_memfd") || lines[0].contains("kvm-gmem"),
        "{}",
        lines[0]
    );
    let rss = lines.iter().find(|line| line.starts_with("Rss:")).unwrap();
    let kib: u64 = rss.split_whitespace().nth(1).unwrap().parse().unwrap();
    assert_eq!(kib << 10, 16 * MIB);
}

#[test]
fn a_dropped_block_gives_its_memory_back() {
    let test = name_of(a_dropped_block_gives_its_memory_back);
    let _turn = alone();
    let Some(machine) = Machine::ordinary(test) else {
        return;
    };
    let size = 128 * MIB;
    // The system's counter knows other processes too; one quiet round is proof enough.
    let proof = (0..10).any(|_| {
        let before = unevictable();
        let block = block(&machine, size);
        block.preallocate(2).unwrap();
        let with = unevictable();
        let fd = block.file(Attribute::Shared).as_raw_fd();
        let host = format!("{:x}-", block.host() as u64);
        let vm = Arc::downgrade(&block);
        drop(block);
        let after = unevictable();
        assert!(vm.upgrade().is_none());
        // Tests beside this one may be given the same number and the same address at once.
        let maps = fs::read_to_string("/proc/self/maps").unwrap();
        let unmapped = !maps.lines().any(|line| line.starts_with(&host));
        let closed = fs::read_link(format!("/proc/self/fd/{fd}"))
            .map_or(true, |file| !file.to_string_lossy().contains("gmem"));
        unmapped
            && closed
            && about(with.saturating_sub(before), size)
            && about(with.saturating_sub(after), size)
    });
    assert!(proof, "{size:#x} bytes did not come and go in ten rounds");
}

/// The line of the mapping at the block's address. A reservation may be one with its neighbours.
fn mapping_of(block: &Block) -> String {
    let host = block.host() as u64;
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let address = |text: Option<&str>| u64::from_str_radix(text.unwrap(), 16).unwrap();
    let here = |line: &&str| {
        let mut ends = line.split(['-', ' ']);
        address(ends.next()) <= host && host < address(ends.next())
    };
    maps.lines().find(here).expect(&maps).to_string()
}

#[test]
fn a_vm_is_rebuilt_and_its_memory_is_new_at_the_old_address() {
    let test = name_of(a_vm_is_rebuilt_and_its_memory_is_new_at_the_old_address);
    let _turn = alone();
    let Some(mut machine) = Machine::ordinary(test) else {
        return;
    };
    let size = 64 * MIB;
    let block = block(&machine, size);
    let host = block.host();
    let file = block.file(Attribute::Shared).as_raw_fd();
    let target = || fs::read_link(format!("/proc/self/fd/{file}")).unwrap();
    let guest_memfd = target();
    // The system's counter knows other processes too; one quiet round is proof enough.
    let mut freed = false;
    for value in 0x1234..0x123e {
        let slot = block.memslot(0).unwrap();
        machine.add_slot(0, 0, size, &slot).unwrap();
        block.bind(0, size, 0).unwrap().keep();
        // Which looks for zeroes where the answer is to be.
        guest_answers(&machine, &block, 0, value);
        block.preallocate(1).unwrap();
        let full = unevictable();
        machine.remove_slot(0);
        machine.rebuild(|vm| {
            let line = mapping_of(&block);
            assert!(line.contains(" ---p "), "{line}");
            assert_ne!(target(), guest_memfd);
            freed |= about(full.saturating_sub(unevictable()), size);
            let error = vm.convert(0, PAGE, Attribute::Shared).unwrap_err();
            assert!(matches!(error.cause(), Cause::Detached), "{error}");
        });
        assert_eq!(block.host(), host);
        assert_eq!(target(), guest_memfd);
        assert!(mapping_of(&block).contains(" rw-s "));
        assert!(has_memory(&block, 0, unevictable()));
        if freed && value > 0x1234 {
            break;
        }
    }
    assert!(freed, "the old VM's memory stays");
}

#[test]
fn a_vm_can_end_while_it_is_detached() {
    let test = name_of(a_vm_can_end_while_it_is_detached);
    let Some(machine) = Machine::ordinary(test) else {
        return;
    };
    let block = block(&machine, MIB);
    machine.vm.detach().unwrap();
    drop(block);
    drop(machine);
}

#[test]
fn private_pages_are_refused_by_name() {
    let test = name_of(private_pages_are_refused_by_name);
    let Some(machine) = Machine::ordinary(test) else {
        return;
    };
    for initial in [Attribute::Shared, Attribute::Private] {
        let config = BlockConfig::confidential("ram", MIB, initial);
        let error = Block::new(&machine.vm, &config).unwrap_err();
        assert_eq!(error.errno(), libc::ENOTSUP);
        assert!(error.to_string().contains("PRIVATE"), "{error}");
    }
    let block = block(&machine, MIB);
    block.bind(0, MIB, 0).unwrap().keep();
    let error = machine.vm.convert(0, PAGE, Attribute::Private).unwrap_err();
    assert!(matches!(error.cause(), Cause::Invalid), "{error:?}");
    machine.vm.convert(0, MIB, Attribute::Shared).unwrap();
    assert_eq!(block.stats().attribute_calls, 0);
}
