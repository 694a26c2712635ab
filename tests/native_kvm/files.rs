// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the library's files are to others: to a program that the VMM executes, nothing at all; to a
//! process that is given one, memory whose size nobody can change.

use crate::kvm::Machine;
use crate::pool::{Pool, POOL};
use crate::stand_in::StandIn;
use crate::{allocated, name_of};
use gmem::{Attribute, Block, BlockConfig, Vm};
use libc::c_int;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;
use Attribute::{Private, Shared};

const PAGE: u64 = 4096;
const MIB: u64 = 1 << 20;
const HUGE: u64 = 2 << 20;
/// What memfds are called; with the block's name in it, so that a child's are told from others.
const NAME: &str = "files-of-a-test";

fn fcntl(file: BorrowedFd, command: c_int, argument: c_int) -> io::Result<c_int> {
    // SAFETY: these commands take numbers.
    match unsafe { libc::fcntl(file.as_raw_fd(), command, argument) } {
        -1 => Err(io::Error::last_os_error()),
        answer => Ok(answer),
    }
}

fn resize(file: BorrowedFd, size: u64) -> io::Result<()> {
    // SAFETY: numbers only.
    match unsafe { libc::ftruncate(file.as_raw_fd(), size as libc::off_t) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn errno<T>(result: io::Result<T>) -> Option<i32> {
    result.err().and_then(|error| error.raw_os_error())
}

/// What a program that this process executes has open: the names of the files.
fn inherited() -> Vec<String> {
    let listing = Command::new("/bin/ls")
        .args(["-l", "/proc/self/fd"])
        .output()
        .expect("there is an ls");
    assert!(listing.status.success(), "{listing:?}");
    let text = String::from_utf8_lossy(&listing.stdout).into_owned();
    let names = text.lines().filter_map(|line| line.split_once(" -> "));
    names.map(|(_, name)| name.to_string()).collect()
}

fn is_ours(name: &str) -> bool {
    ["kvm-gmem", "kvm-vm", NAME, "detached"]
        .iter()
        .any(|part| name.contains(part))
}

fn are_closed_in_children(block: &Block, when: &str) {
    for attribute in [Shared, Private] {
        let flags = fcntl(block.file(attribute), libc::F_GETFD, 0).unwrap();
        assert_eq!(
            flags & libc::FD_CLOEXEC,
            libc::FD_CLOEXEC,
            "{when}: the file of {attribute:?} pages"
        );
    }
    let left: Vec<_> = inherited().into_iter().filter(|n| is_ours(n)).collect();
    assert_eq!(left, [""; 0], "{when}: what a child has");
}

/// A VM with two planes, which KVM may not know of.
fn split(machine: &Machine) -> Arc<Vm> {
    match machine.vm.probe().private_attribute {
        true => machine.vm.clone(),
        false => Vm::with_kernel(Arc::new(StandIn), machine.file()).unwrap(),
    }
}

#[test]
fn no_file_is_inherited_by_a_program() {
    let test = name_of(no_file_is_inherited_by_a_program);
    let mut config = BlockConfig::new(NAME, MIB);
    let Some(mut machine) = Machine::ordinary(test) else {
        return;
    };
    let block = Block::new(&machine.vm, &config).unwrap();
    are_closed_in_children(&block, "new");
    machine.rebuild(|_| are_closed_in_children(&block, "without a VM"));
    are_closed_in_children(&block, "rebuilt");
    drop(block);

    config = BlockConfig {
        release_delay: Duration::ZERO,
        ..BlockConfig::confidential(NAME, MIB, Shared)
    };
    let block = Block::new(&split(&machine), &config).unwrap();
    are_closed_in_children(&block, "split");
}

#[test]
fn no_file_with_both_halves_is_inherited_by_a_program() {
    let test = name_of(no_file_with_both_halves_is_inherited_by_a_program);
    let Some(mut machine) = Machine::in_place(test) else {
        return;
    };
    let config = BlockConfig {
        release_delay: Duration::ZERO,
        ..BlockConfig::confidential(NAME, MIB, Shared)
    };
    let block = Block::new(&machine.vm, &config).unwrap();
    are_closed_in_children(&block, "new");
    machine.rebuild(|_| are_closed_in_children(&block, "without a VM"));
    are_closed_in_children(&block, "rebuilt");
}

/// What the kernel says of the mapping at an address (proc(5): VmFlags).
fn flags_of(address: *mut u8) -> Vec<String> {
    let maps = std::fs::read_to_string("/proc/self/smaps").expect("there is one");
    let begins = |line: &&str| line.starts_with(&format!("{:x}-", address as usize));
    let mut lines = maps.lines().skip_while(|line| !begins(line));
    let flags = lines.find_map(|line| line.strip_prefix("VmFlags:"));
    let flags = flags.expect("it is mapped").split_whitespace();
    flags.map(str::to_string).collect()
}

#[test]
fn children_and_core_dumps_see_the_memory_unless_they_are_not_to() {
    let test = name_of(children_and_core_dumps_see_the_memory_unless_they_are_not_to);
    let Some(mut machine) = Machine::ordinary(test) else {
        return;
    };
    for hidden in [false, true] {
        let config = BlockConfig {
            not_in_children: hidden,
            not_in_core_dumps: hidden,
            ..BlockConfig::new(NAME, MIB)
        };
        let block = Block::new(&machine.vm, &config).unwrap();
        let check = |when: &str| {
            let flags = flags_of(block.host());
            let has = |flag: &str| flags.iter().any(|found| found == flag);
            assert_eq!(
                (has("dc"), has("dd")),
                (hidden, hidden),
                "{when}: {flags:?}"
            );
        };
        check("new");
        machine.rebuild(|_| ());
        check("rebuilt");
    }
}

/// Punches by the library go on, and so does memory by touch.
fn is_sealed(vm: &Vm, block: &Arc<Block>, size: u64, page: u64) {
    let file = block.file(Shared);
    let seals = libc::F_SEAL_GROW | libc::F_SEAL_SHRINK | libc::F_SEAL_SEAL;
    assert_eq!(fcntl(file, libc::F_GET_SEALS, 0).unwrap(), seals);
    for other in [0, size - page, size + page] {
        assert_eq!(errno(resize(file, other)), Some(libc::EPERM), "{other:#x}");
    }
    // With F_SEAL_FUTURE_WRITE one of several back ends would keep the others from mapping it.
    for seal in [libc::F_SEAL_WRITE, libc::F_SEAL_FUTURE_WRITE] {
        let added = fcntl(file, libc::F_ADD_SEALS, seal);
        assert_eq!(errno(added), Some(libc::EPERM));
    }

    block.bind(0, size, 0).unwrap().keep();
    block.preallocate(1).unwrap();
    assert_eq!(allocated(file.as_raw_fd()), size);
    vm.convert(page, size - page, Private).unwrap();
    assert_eq!(allocated(file.as_raw_fd()), page, "a hole was punched");
    vm.convert(page, page, Shared).unwrap();
    // SAFETY: a page of the mapping, which is shared.
    unsafe { block.host().add(page as usize).write_volatile(1) };
    assert_eq!(allocated(file.as_raw_fd()), 2 * page, "memory came back");
    block.unbind(0, size, 0).unwrap();
}

#[test]
fn shared_memory_keeps_its_size() {
    let test = name_of(shared_memory_keeps_its_size);
    let Some(machine) = Machine::any(test) else {
        return;
    };
    let vm = split(&machine);
    let config = BlockConfig {
        release_delay: Duration::ZERO,
        ..BlockConfig::confidential(NAME, MIB, Shared)
    };
    match Block::new(&vm, &config) {
        Ok(block) => is_sealed(&vm, &block, MIB, PAGE),
        Err(error) => crate::common::skipped(test, error),
    }
}

#[test]
fn shared_huge_pages_keep_their_size() {
    let test = name_of(shared_huge_pages_keep_their_size);
    let Some(_pool) = Pool::with_free(test, POOL, 3) else {
        return;
    };
    let Some(machine) = Machine::any(test) else {
        return;
    };
    let vm = split(&machine);
    let config = BlockConfig {
        hugetlb: Some(HUGE),
        release_delay: Duration::ZERO,
        ..BlockConfig::confidential(NAME, 3 * HUGE, Shared)
    };
    match Block::new(&vm, &config) {
        Ok(block) => is_sealed(&vm, &block, 3 * HUGE, HUGE),
        Err(error) => crate::common::skipped(test, error),
    }
}

/// A process that has a split page mapped and touches it when it is private gets a page of zeros, which
/// the next conversion takes away again: no SIGBUS, and nothing of what is private.
#[test]
fn who_has_mapped_a_split_page_survives_its_conversion() {
    let test = name_of(who_has_mapped_a_split_page_survives_its_conversion);
    let Some(machine) = Machine::any(test) else {
        return;
    };
    let vm = split(&machine);
    let config = BlockConfig {
        release_delay: Duration::ZERO,
        ..BlockConfig::confidential(NAME, MIB, Shared)
    };
    let Ok(block) = Block::new(&vm, &config) else {
        return crate::common::skipped(test, "no split block");
    };
    block.bind(0, MIB, 0).unwrap().keep();
    let file = block.file(Shared);
    // SAFETY: a new mapping at an address of the kernel's choice.
    let other = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            MIB as usize,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
            file.as_raw_fd(),
            0,
        )
    };
    assert_ne!(other, libc::MAP_FAILED);
    let other = other.cast::<u8>();
    // SAFETY: the first byte of this mapping, and of the block's.
    unsafe {
        block.host().write_volatile(0x5a);
        assert_eq!(other.read_volatile(), 0x5a);
        vm.convert(0, PAGE, Private).unwrap();
        assert_eq!(other.read_volatile(), 0);
        other.write_volatile(0x66);
        assert_eq!(allocated(file.as_raw_fd()), PAGE);
        vm.convert(0, PAGE, Shared).unwrap();
        vm.convert(0, PAGE, Private).unwrap();
        assert_eq!(allocated(file.as_raw_fd()), 0);
        libc::munmap(other.cast(), MIB as usize);
    }
}

/// It has no seals (fcntl: EINVAL) and needs none.
#[test]
fn a_guest_memfd_has_a_fixed_size() {
    let test = name_of(a_guest_memfd_has_a_fixed_size);
    let Some(machine) = Machine::ordinary(test) else {
        return;
    };
    let block = Block::new(&machine.vm, &BlockConfig::new(NAME, MIB)).unwrap();
    let file = block.file(Shared);
    for size in [0, MIB - PAGE, MIB + PAGE] {
        assert_eq!(errno(resize(file, size)), Some(libc::EINVAL), "{size:#x}");
    }
    let seals = fcntl(file, libc::F_GET_SEALS, 0);
    assert_eq!(errno(seals), Some(libc::EINVAL));
}
