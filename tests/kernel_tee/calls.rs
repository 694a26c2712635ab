// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a guest asks for through the port, and accesses that say their kind themselves.

use crate::guest::{Exit, Guest, Program, PAGES};
use crate::lab::Offered;
use crate::{name_of, PAGE, SNP, TDX};

const MAP_GPA_RANGE: u32 = 12;
const SET_KIND: u32 = 0x100;
const GET_KIND: u32 = 0x101;

/// KVM_MAP_GPA_RANGE_ENCRYPTED
const ENCRYPTED: u64 = 1 << 4;
/// KVM_MEMORY_EXIT_FLAG_PRIVATE
const FAULT_PRIVATE: u64 = 1 << 3;

const PRIVATE: u32 = 1;
const SHARED: u32 = 2;

const RETRY: u32 = 1;
const INVALID: u32 = 2;
const MISALIGNED: u32 = 3;

const MIB2: u32 = 2 << 20;

#[test]
fn an_snp_guests_request_is_one_exit() {
    let Some(_offered) = Offered::new(name_of(an_snp_guests_request_is_one_exit), 1) else {
        return;
    };
    let program = Program::default()
        .call(MAP_GPA_RANGE, MIB2, 3 * 512 + 1, 0)
        .call(MAP_GPA_RANGE, MIB2, 1, ENCRYPTED as u32)
        .call(MAP_GPA_RANGE, 8, 1, 0)
        .call(MAP_GPA_RANGE, MIB2, 0, 0)
        .call(0x99, 0, 0, 0)
        .call(MAP_GPA_RANGE, MIB2, 1, 0)
        .call(MAP_GPA_RANGE, MIB2, 1, 0);
    let guest = Guest::new(SNP);
    let vcpu = guest.launch(program);
    assert_eq!(vcpu.run(), Exit::Map(MIB2.into(), 3 * 512 + 1, 0));
    assert_eq!(vcpu.answer(0), Exit::Told(0));
    assert_eq!(vcpu.told(), MIB2);
    assert_eq!(vcpu.run(), Exit::Map(MIB2.into(), 1, ENCRYPTED));
    // What user space says, as it is.
    assert_eq!(
        vcpu.answer(libc::EINVAL as u64),
        Exit::Told(libc::EINVAL as u32)
    );
    vcpu.told();
    for error in [libc::EINVAL, libc::EINVAL, 1000] {
        assert_eq!(vcpu.told(), -error as u32);
        vcpu.told();
    }
    // It learns that it failed, and not why.
    assert_eq!(vcpu.run(), Exit::Map(MIB2.into(), 1, 0));
    let again = vcpu.answer(libc::EAGAIN as u64);
    assert_eq!(again, Exit::Told(libc::EINVAL as u32));
    vcpu.told();
    // An answer that there is not is a fault of user space's.
    assert_eq!(vcpu.run(), Exit::Map(MIB2.into(), 1, 0));
    assert_eq!(vcpu.answer(libc::ENOSPC as u64), Exit::Error(libc::EINVAL));
}

#[test]
fn a_tds_request_goes_in_pieces() {
    let Some(_offered) = Offered::new(name_of(a_tds_request_goes_in_pieces), 2) else {
        return;
    };
    let begin = MIB2 + 0x5000;
    let program = Program::default()
        .call(MAP_GPA_RANGE, begin, 2 * 512 + 3, ENCRYPTED as u32)
        .call(MAP_GPA_RANGE, begin, 2 * 512, 0)
        .call(MAP_GPA_RANGE, begin, 512, 0)
        .call(MAP_GPA_RANGE, 8, 1, 0)
        .call(MAP_GPA_RANGE, begin, 0, 0)
        .call(MAP_GPA_RANGE, begin, u32::MAX, 0)
        .call(MAP_GPA_RANGE, begin, 1, 0);
    let guest = Guest::new(TDX);
    let vcpu = guest.launch(program);
    let at = u64::from(begin);
    let mib2 = u64::from(MIB2);
    assert_eq!(vcpu.run(), Exit::Map(at, 512, ENCRYPTED));
    assert_eq!(vcpu.answer(0), Exit::Map(at + mib2, 512, ENCRYPTED));
    assert_eq!(vcpu.answer(0), Exit::Map(at + 2 * mib2, 3, ENCRYPTED));
    assert_eq!(vcpu.answer(0), Exit::Told(0));
    vcpu.told();
    // Not now: it says where to go on.
    assert_eq!(vcpu.run(), Exit::Map(at, 512, 0));
    assert_eq!(vcpu.answer(0), Exit::Map(at + mib2, 512, 0));
    assert_eq!(vcpu.answer(libc::EAGAIN as u64), Exit::Told(RETRY));
    assert_eq!(vcpu.told(), begin + MIB2);
    assert_eq!(vcpu.run(), Exit::Map(at, 512, 0));
    assert_eq!(vcpu.answer(libc::EINVAL as u64), Exit::Told(INVALID));
    assert_eq!(vcpu.told(), begin);
    assert_eq!((vcpu.told(), vcpu.told()), (MISALIGNED, 8));
    assert_eq!((vcpu.told(), vcpu.told()), (INVALID, begin));
    assert_eq!((vcpu.told(), vcpu.told()), (INVALID, begin));
    // An answer that there is not is a fault of user space's.
    assert_eq!(vcpu.run(), Exit::Map(at, 1, 0));
    assert_eq!(vcpu.answer(libc::ENOSPC as u64), Exit::Error(libc::EINVAL));
}

/// A vCPU and its guest, of each type.
fn of_each(test: &str, program: impl Fn() -> Program, job: impl Fn(&Guest, &crate::guest::Vcpu)) {
    let Some(_offered) = Offered::new(test, 3) else {
        return;
    };
    for kind in [SNP, TDX] {
        let guest = Guest::new(kind);
        let vcpu = guest.launch(program());
        job(&guest, &vcpu);
        assert_eq!(vcpu.run(), Exit::Done);
    }
}

#[test]
fn the_guest_reads_and_writes_what_it_shared() {
    let program = || {
        Program::default()
            .call(GET_KIND, 0x3000, 0, 0)
            .write(0x3000, 0x55)
            .call(MAP_GPA_RANGE, 0x3000, 1, 0)
            .call(GET_KIND, 0x3000, 0, 0)
            .write(0x3000, 0x66)
            .read(0x3000)
    };
    let test = name_of(the_guest_reads_and_writes_what_it_shared);
    of_each(test, program, |guest, vcpu| {
        assert_eq!((vcpu.told(), vcpu.told()), (1, 0x3000));
        assert_eq!(vcpu.run(), Exit::Map(0x3000, 1, 0));
        guest.convert(3, 1, false).unwrap();
        assert_eq!(vcpu.answer(0), Exit::Told(0));
        vcpu.told();
        assert_eq!((vcpu.told(), vcpu.told()), (0, 0x3000));
        assert_eq!(vcpu.told(), 0x66);
        assert_eq!(guest.shared.read(3), 0x66);
    });
}

#[test]
fn accesses_have_a_kind() {
    let program = || {
        Program::default()
            // Mapped before it has another kind.
            .write(0x4000, 0x11)
            .call(SET_KIND, 0x4000, 2, SHARED)
            .write(0x4000, 0x22)
            .call(SET_KIND, 0x4000, 2, PRIVATE)
            .read(0x5000)
            .write(0x4000, 0x33)
            .call(SET_KIND, 0x4000, 2, 0)
            .read(0x4000)
    };
    of_each(name_of(accesses_have_a_kind), program, |guest, vcpu| {
        assert_eq!((vcpu.told(), vcpu.told()), (0, 0x4000));
        // Nothing comes of it by itself.
        assert_eq!(vcpu.run(), Exit::Fault(0, 0x4000));
        assert_eq!(vcpu.run(), Exit::Fault(0, 0x4000));
        guest.convert(4, 1, false).unwrap();
        assert_eq!((vcpu.told(), vcpu.told()), (0, 0x4000));
        assert_eq!(guest.shared.read(4), 0x22);
        // The other page of the range is private still.
        vcpu.told();
        assert_eq!(vcpu.run(), Exit::Fault(FAULT_PRIVATE, 0x4000));
        guest.convert(4, 1, true).unwrap();
        assert_eq!((vcpu.told(), vcpu.told()), (0, 0x4000));
        // By attribute again: no exit in either state.
        assert_eq!(vcpu.told(), 0x33);
    });
}

#[test]
fn sixteen_ranges_have_a_kind() {
    let program = || {
        let each_second =
            |program: Program, page: u32| program.call(SET_KIND, page << 13, 1, SHARED);
        (0..17)
            .fold(Program::default(), each_second)
            // One for all of them, and its middle taken out.
            .call(SET_KIND, 0, PAGES as u32, PRIVATE)
            .call(SET_KIND, 0x8000, 1, 0)
            .call(SET_KIND, 8, 1, 0)
            .call(SET_KIND, 0, 0, 0)
            .call(SET_KIND, 0, 1, 3)
            .call(SET_KIND, 0, u32::MAX, 0)
    };
    of_each(
        name_of(sixteen_ranges_have_a_kind),
        program,
        |guest, vcpu| {
            for _ in 0..16 {
                assert_eq!(vcpu.told(), 0);
                vcpu.told();
            }
            assert_eq!(vcpu.told(), -libc::ENOSPC as u32);
            vcpu.told();
            assert_eq!(crate::view::kinds(guest).len(), 16);
            assert_eq!((vcpu.told(), vcpu.told()), (0, 0));
            assert_eq!(crate::view::kinds(guest), ["kind 0 40 private"]);
            assert_eq!((vcpu.told(), vcpu.told()), (0, 0x8000));
            let halves = ["kind 0 8 private", "kind 9 37 private"];
            assert_eq!(crate::view::kinds(guest), halves);
            for _ in 0..3 {
                assert_eq!(vcpu.told(), -libc::EINVAL as u32);
                vcpu.told();
            }
            assert_eq!((vcpu.told(), vcpu.told()), (0, 0));
            assert!(crate::view::kinds(guest).is_empty());
        },
    );
    assert_eq!(PAGES * PAGE, 0x4_0000);
}
