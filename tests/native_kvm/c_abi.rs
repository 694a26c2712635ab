// SPDX-License-Identifier: MIT OR Apache-2.0
//! The C ABI where pages do change their attribute, which C programs can't test on every kernel:
//! listeners, limits, access, counts.

use crate::common::skipped;
use crate::kvm::Machine;
use crate::{allocated, name_of};
use gmem::capi::*;
use gmem::Memslot;
use std::ffi::{c_int, c_void, CStr};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::null_mut;
use std::sync::Mutex;

const PAGE: u64 = 4096;
const BLOCK: u64 = 64 * PAGE;
const SLOT: u32 = 0;

/// A zeroed structure that knows its size.
fn sized<T>() -> T {
    // SAFETY: every structure of the ABI is integers, pointers, bools and nullable functions, and
    // begins with its size.
    unsafe {
        let mut value = MaybeUninit::<T>::zeroed();
        value.as_mut_ptr().cast::<usize>().write(size_of::<T>());
        value.assume_init()
    }
}

fn last_error() -> String {
    // SAFETY: a string, until this thread's next failing call.
    let text = unsafe { CStr::from_ptr(gmem_last_error()) };
    text.to_string_lossy().into_owned()
}

#[track_caller]
fn ok(result: c_int) {
    assert_eq!(result, 0, "{}", last_error());
}

#[track_caller]
fn fails(result: c_int, errno: c_int, part: &str) {
    let text = last_error();
    assert_eq!(result, -errno, "{text}");
    assert!(text.contains(part), "{text}");
}

/// A confidential VM and a block of BLOCK bytes at guest physical address 0, by handles.
struct Handles {
    machine: Machine,
    vm: *mut gmem_vm,
    block: *mut gmem_block,
}

impl Handles {
    fn new(test: &str, change: impl FnOnce(&mut gmem_block_config)) -> Option<Self> {
        let machine = Machine::private(test)?;
        let (mut vm, mut block) = (null_mut(), null_mut());
        // SAFETY: places and structures that are there.
        unsafe {
            ok(gmem_vm_new(machine.file().as_raw_fd(), &mut vm));
            let mut config: gmem_block_config = sized();
            config.name = c"ram7".as_ptr();
            config.size = BLOCK;
            config.confidential = 1;
            change(&mut config);
            ok(gmem_block_new(vm, &config, &mut block));
            let mut slot: gmem_memslot = sized();
            ok(gmem_block_get_memslot(block, 0, &mut slot));
            let slot = Memslot {
                userspace_addr: slot.userspace_addr.cast(),
                guest_memfd: BorrowedFd::borrow_raw(slot.guest_memfd),
                guest_memfd_offset: slot.guest_memfd_offset,
            };
            machine.add_slot(SLOT, 0, BLOCK, &slot).unwrap();
        }
        ok(gmem_bind(block, 0, BLOCK, 0));
        Some(Self { machine, vm, block })
    }

    fn stats(&self) -> gmem_block_stats {
        let mut stats = sized();
        // SAFETY: a structure that is there.
        ok(unsafe { gmem_block_get_stats(self.block, &mut stats) });
        stats
    }

    fn run_at(&self, offset: u64) -> (u32, u64) {
        let (mut end, mut attribute) = (0, 0);
        // SAFETY: places that are there.
        ok(unsafe { gmem_block_get_run(self.block, offset, &mut end, &mut attribute) });
        (attribute, end)
    }
}

impl Drop for Handles {
    fn drop(&mut self) {
        if std::thread::panicking() {
            return;
        }
        ok(gmem_unbind(self.block, 0, BLOCK, 0));
        self.machine.remove_slot(SLOT);
        ok(gmem_block_free(self.block));
        ok(gmem_vm_free(self.vm));
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Call {
    Begin(u8, u64, u64, u32),
    End(u8, u64, u64, u32, bool),
}

/// What a listener was told, and the errno that it answers.
struct Ear<'a> {
    name: u8,
    answer: c_int,
    heard: &'a Mutex<Vec<(Call, u64)>>,
}

unsafe extern "C" fn begin(
    ear: *mut c_void,
    offset: u64,
    size: u64,
    attribute: u32,
    sequence: u64,
) -> c_int {
    // SAFETY: the test passes an `Ear` that outlives the registration.
    let ear = unsafe { &*ear.cast::<Ear>() };
    let call = Call::Begin(ear.name, offset, size, attribute);
    ear.heard.lock().unwrap().push((call, sequence));
    ear.answer
}

unsafe extern "C" fn end(
    ear: *mut c_void,
    offset: u64,
    size: u64,
    attribute: u32,
    changed: bool,
    sequence: u64,
) {
    // SAFETY: as above.
    let ear = unsafe { &*ear.cast::<Ear>() };
    let call = Call::End(ear.name, offset, size, attribute, changed);
    ear.heard.lock().unwrap().push((call, sequence));
}

fn listen(block: *mut gmem_block, ear: &mut Ear) -> *mut gmem_listener {
    let mut ops: gmem_listener_ops = sized();
    ops.begin = Some(begin);
    ops.end = Some(end);
    let mut listener = null_mut();
    // SAFETY: the functions fit the argument, which outlives the registration.
    ok(unsafe { gmem_listener_add(block, &ops, (&raw mut *ear).cast(), &mut listener) });
    listener
}

#[test]
fn listeners_hear_begin_and_end_of_each_changed_run() {
    let test = name_of(listeners_hear_begin_and_end_of_each_changed_run);
    let Some(handles) = Handles::new(test, |_| {}) else {
        return;
    };
    let (vm, block) = (handles.vm, handles.block);
    let heard: Mutex<Vec<(Call, u64)>> = Mutex::default();
    let take = || -> (Vec<Call>, Vec<u64>) { heard.lock().unwrap().drain(..).unzip() };
    let mut first = Ear {
        name: 1,
        answer: 0,
        heard: &heard,
    };
    let listener = listen(block, &mut first);

    ok(gmem_convert(vm, 2 * PAGE, PAGE, GMEM_PRIVATE));
    let (calls, one) = take();
    let private = |from, pages| Call::Begin(1, from * PAGE, pages * PAGE, GMEM_PRIVATE);
    let done = |from, pages| Call::End(1, from * PAGE, pages * PAGE, GMEM_PRIVATE, true);
    assert_eq!(calls, [private(2, 1), done(2, 1)]);
    assert_eq!(one[0], one[1]);

    // Page 2 is private already: its neighbours change, it doesn't.
    ok(gmem_convert(vm, PAGE, 4 * PAGE, GMEM_PRIVATE));
    let (calls, two) = take();
    assert_eq!(
        calls,
        [private(1, 1), private(3, 2), done(1, 1), done(3, 2)]
    );
    assert!(two[0] > one[0] && two.iter().all(|&sequence| sequence == two[0]));
    ok(gmem_convert(vm, PAGE, 4 * PAGE, GMEM_PRIVATE));
    assert_eq!(take().0, []);

    // One that refuses: those asked before it hear that nothing changed, itself it hears no more.
    let mut second = Ear {
        name: 2,
        answer: -libc::EAGAIN,
        heard: &heard,
    };
    let refusing = listen(block, &mut second);
    fails(
        gmem_convert(vm, PAGE, PAGE, GMEM_SHARED),
        libc::EAGAIN,
        "a listener refused",
    );
    let expected = [
        Call::Begin(1, PAGE, PAGE, GMEM_SHARED),
        Call::Begin(2, PAGE, PAGE, GMEM_SHARED),
        Call::End(1, PAGE, PAGE, GMEM_SHARED, false),
    ];
    assert_eq!(take().0, expected);
    assert_eq!(handles.run_at(PAGE), (GMEM_PRIVATE, 5 * PAGE));
    assert_eq!(handles.stats().failures, 1);
    ok(gmem_listener_remove(refusing));
    ok(gmem_listener_remove(listener));
    ok(gmem_convert(vm, PAGE, 4 * PAGE, GMEM_SHARED));
    assert_eq!(take().0, []);
}

#[test]
fn private_pages_are_closed_to_the_vmm() {
    let test = name_of(private_pages_are_closed_to_the_vmm);
    let Some(handles) = Handles::new(test, |_| {}) else {
        return;
    };
    let (vm, block) = (handles.vm, handles.block);
    ok(gmem_convert(vm, 8 * PAGE, 8 * PAGE, GMEM_PRIVATE));
    ok(gmem_block_check_access(block, 0, 8 * PAGE));
    ok(gmem_block_check_access(block, 16 * PAGE, BLOCK - 16 * PAGE));
    for (offset, size) in [
        (8 * PAGE, 1),
        (8 * PAGE - 1, 2),
        (16 * PAGE - 1, 1),
        (0, BLOCK),
    ] {
        let result = gmem_block_check_access(block, offset, size);
        fails(result, libc::EACCES, "ram7: ");
    }
    let result = gmem_block_check_access(block, BLOCK, 1);
    fails(result, libc::EINVAL, "ram7: ");
    assert_eq!(handles.stats().access_refused, 4);
    assert_eq!(handles.run_at(0), (GMEM_SHARED, 8 * PAGE));
    assert_eq!(handles.run_at(9 * PAGE), (GMEM_PRIVATE, 16 * PAGE));
    assert_eq!(handles.run_at(BLOCK - 1), (GMEM_SHARED, BLOCK));
    fails(gmem_block_free(block), libc::EBUSY, "bound");
}

#[test]
fn max_runs_bounds_the_books() {
    let test = name_of(max_runs_bounds_the_books);
    let Some(handles) = Handles::new(test, |config| config.max_runs = 3) else {
        return;
    };
    let vm = handles.vm;
    for page in [0, 2, 4] {
        ok(gmem_convert(vm, page * PAGE, PAGE, GMEM_PRIVATE));
    }
    let result = gmem_convert(vm, 6 * PAGE, PAGE, GMEM_PRIVATE);
    fails(result, libc::ENOSPC, "max-runs is 3");
    ok(gmem_convert(vm, 5 * PAGE, PAGE, GMEM_PRIVATE));
    ok(gmem_convert(vm, PAGE, PAGE, GMEM_PRIVATE));
    ok(gmem_convert(vm, 8 * PAGE, PAGE, GMEM_PRIVATE));
    assert_eq!(handles.stats().runs, 3);
    // To shared, a run may fall in two as well.
    let result = gmem_convert(vm, PAGE, PAGE, GMEM_SHARED);
    fails(result, libc::ENOSPC, "max-runs is 3");
    assert_eq!(handles.run_at(0), (GMEM_PRIVATE, 3 * PAGE));
    ok(gmem_convert(vm, 0, BLOCK, GMEM_SHARED));
    assert_eq!(handles.stats().runs, 0);
    assert_eq!(handles.stats().failures, 2);
}

#[test]
fn convert_unit_bounds_what_a_guest_may_ask() {
    let test = name_of(convert_unit_bounds_what_a_guest_may_ask);
    let unit = 16 * PAGE;
    let Some(handles) = Handles::new(test, |config| config.convert_unit = unit) else {
        return;
    };
    let vm = handles.vm;
    for (gpa, size) in [(0, PAGE), (PAGE, unit), (0, unit + PAGE)] {
        let result = gmem_convert(vm, gpa, size, GMEM_PRIVATE);
        fails(result, libc::EINVAL, "convert-unit");
    }
    ok(gmem_convert(vm, PAGE, PAGE, GMEM_SHARED));
    ok(gmem_convert(vm, unit, 2 * unit, GMEM_PRIVATE));
    assert_eq!(handles.stats().bytes_private, 2 * unit);
}

#[test]
fn convert_unit_off_leaves_changes_to_resets() {
    let test = name_of(convert_unit_off_leaves_changes_to_resets);
    let Some(handles) = Handles::new(test, |config| {
        config.convert_unit = GMEM_CONVERT_UNIT_OFF;
        config.initial = GMEM_PRIVATE;
    }) else {
        return;
    };
    let result = gmem_convert(handles.vm, 0, BLOCK, GMEM_SHARED);
    fails(result, libc::EINVAL, "convert-unit allows nothing");
    ok(gmem_convert(handles.vm, 0, BLOCK, GMEM_PRIVATE));
    assert_eq!(handles.run_at(0), (GMEM_PRIVATE, BLOCK));
    ok(gmem_block_reset(handles.block));
    assert_eq!(handles.stats().bytes_private, BLOCK);
    let in_place = handles.machine.vm.probe().in_place_conversion;
    let backing = match in_place {
        true => GMEM_BACKING_IN_PLACE,
        false => GMEM_BACKING_SPLIT,
    };
    assert_eq!(handles.stats().backing, backing);
}

#[test]
fn without_reserve_shared_memory_comes_with_the_first_touch() {
    let test = name_of(without_reserve_shared_memory_comes_with_the_first_touch);
    for no_reserve in [true, false] {
        let Some(handles) = Handles::new(test, |config| config.no_reserve = no_reserve.into())
        else {
            return;
        };
        if handles.stats().backing == GMEM_BACKING_IN_PLACE {
            return skipped(test, "in place, a page keeps its memory when it converts");
        }
        ok(gmem_convert(handles.vm, 0, BLOCK, GMEM_PRIVATE));
        ok(gmem_convert(handles.vm, 0, BLOCK, GMEM_SHARED));
        let file = gmem_block_shared_fd(handles.block);
        assert_eq!(allocated(file), if no_reserve { 0 } else { BLOCK });
    }
}

#[test]
fn an_image_goes_into_private_pages_in_place_only() {
    let test = name_of(an_image_goes_into_private_pages_in_place_only);
    let Some(handles) = Handles::new(test, |config| config.initial = GMEM_PRIVATE) else {
        return;
    };
    let image = [7u8; 5000];
    // SAFETY: so many bytes are there.
    let place = || unsafe {
        let data = image.as_ptr().cast();
        gmem_block_place(handles.block, PAGE + 1, data, image.len() as u64)
    };
    match handles.stats().backing {
        GMEM_BACKING_IN_PLACE => ok(place()),
        _ => fails(place(), libc::ENOTSUP, "ram7: "),
    }
    assert_eq!(handles.run_at(0), (GMEM_PRIVATE, BLOCK));
    ok(gmem_vm_poison(handles.vm, 2 * PAGE, 1));
    fails(place(), libc::EIO, "poisoned");
    let access = gmem_block_check_access(handles.block, 2 * PAGE, 1);
    fails(access, libc::EACCES, "ram7: ");
    assert_eq!(handles.stats().bytes_poisoned, PAGE);
    let result = gmem_convert(handles.vm, 0, BLOCK, GMEM_SHARED);
    fails(result, libc::EIO, "poisoned");
    ok(gmem_block_reset(handles.block));
    assert_eq!(handles.stats().bytes_poisoned, 0);
    assert_eq!(handles.run_at(0), (GMEM_PRIVATE, BLOCK));
    ok(gmem_convert(handles.vm, 0, BLOCK, GMEM_SHARED));
}
