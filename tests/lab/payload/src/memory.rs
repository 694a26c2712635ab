// SPDX-License-Identifier: MIT OR Apache-2.0
//! Guest physical memory, by address: all of it is mapped one to one.

use crate::boot::MAPPED_BYTES;
use crate::handover::CALL_PORT;
use crate::protocol::{pattern, KVM_HC_MAP_GPA_RANGE, MAP_GPA_RETRY, SHARED_FOR_EVER_END};
use crate::started::PORT_CALL;
use core::arch::asm;
use core::sync::atomic::Ordering::Relaxed;

/// Where memory differs from what was expected.
pub struct Difference {
    /// Address of the first word that differs.
    pub address: u64,
    /// What is there.
    pub found: u64,
    /// How many words differ in all.
    pub words: u64,
}

/// Whether [address, address + bytes) is memory that a request may touch: word-aligned, mapped, not the payload's own.
pub fn allowed(address: u64, bytes: u64) -> Result<(), &'static str> {
    if (address | bytes) & 7 != 0 {
        return Err("address and length must be multiples of 8");
    }
    match address.checked_add(bytes) {
        Some(end) if end <= MAPPED_BYTES => {}
        _ => return Err("that is beyond what is mapped"),
    }
    match address < SHARED_FOR_EVER_END {
        true => Err("that is the payload's own memory"),
        false => Ok(()),
    }
}

/// Reads a word. The address must be allowed.
pub fn read(address: u64) -> u64 {
    // SAFETY: callers checked that the address is mapped, aligned and not the payload's own.
    unsafe { (address as *const u64).read_volatile() }
}

/// Writes a word. The address must be allowed.
pub fn write(address: u64, value: u64) {
    // SAFETY: callers checked that the address is mapped, aligned and not the payload's own.
    unsafe { (address as *mut u64).write_volatile(value) }
}

/// Writes the pattern of `seed`.
pub fn fill(address: u64, bytes: u64, seed: u64) {
    for at in (address..address + bytes).step_by(8) {
        write(at, pattern(seed, at));
    }
}

/// Writes an even count of numbers of 4 bytes, each one more than the one before: pages, as a balloon wants them.
pub fn page_numbers(address: u64, first: u64, count: u64) {
    for index in (0..count).step_by(2) {
        let number = first + index;
        write(address + 4 * index, number | (number + 1) << 32);
    }
}

/// Writes zeros.
pub fn zero(address: u64, bytes: u64) {
    for at in (address..address + bytes).step_by(8) {
        write(at, 0);
    }
}

/// Compares with what `expected` says for each address.
pub fn compare(address: u64, bytes: u64, expected: impl Fn(u64) -> u64) -> Option<Difference> {
    let mut difference: Option<Difference> = None;
    for at in (address..address + bytes).step_by(8) {
        let found = read(at);
        if found != expected(at) {
            difference
                .get_or_insert(Difference {
                    address: at,
                    found,
                    words: 0,
                })
                .words += 1;
        }
    }
    difference
}

/// Asks the host to convert; what the hypercall, or the port call in its place, left in RAX.
pub fn convert(address: u64, pages: u64, attributes: u64) -> u64 {
    if PORT_CALL.load(Relaxed) {
        return convert_by_port(address, pages, attributes);
    }
    let result;
    // SAFETY: the hypercall takes numbers, not pointers; what it may take away is memory that the caller named.
    unsafe {
        asm!(
            "xchg rbx, {address}",
            "vmmcall",
            "xchg rbx, {address}",
            address = inout(reg) address => _,
            inout("rax") KVM_HC_MAP_GPA_RANGE => result,
            inout("rcx") pages => _,
            inout("rdx") attributes => _,
            inout("rsi") 0u64 => _,
        )
    };
    result
}

/// As Linux does in a TD: told to retry it goes on where KVM stopped, a few times at one place.
fn convert_by_port(address: u64, pages: u64, attributes: u64) -> u64 {
    const MOST_RETRIES: u32 = 3;
    let (mut at, mut left, mut retries) = (address, pages, 0);
    loop {
        let (result, stopped) = port_call(KVM_HC_MAP_GPA_RANGE, at, left, attributes);
        if result != MAP_GPA_RETRY {
            return result;
        }
        let done = stopped.wrapping_sub(at) >> 12;
        if done > left {
            return result;
        }
        retries = if done == 0 { retries + 1 } else { 0 };
        if retries == MOST_RETRIES {
            return result;
        }
        (at, left) = (stopped, left - done);
    }
}

/// A call of the host's that KVM need not decode: a function with three arguments, and what it left in RAX and RBX.
pub fn port_call(function: u64, first: u64, second: u64, third: u64) -> (u64, u64) {
    let (result, stopped);
    // SAFETY: as for the hypercall.
    unsafe {
        asm!(
            "xchg rbx, {first}",
            "out dx, eax",
            "xchg rbx, {first}",
            first = inout(reg) first => stopped,
            inout("rax") function => result,
            inout("rcx") second => _,
            inout("rsi") third => _,
            inout("rdx") u64::from(CALL_PORT) => _,
        )
    };
    (result, stopped)
}

/// Runs code that somebody else has put there: it gets a number and returns one, as a C function does. In private memory it
/// may only compute, and use memory and plain port I/O: what KVM would have to decode it can't read there.
pub fn call(address: u64, argument: u64) -> u64 {
    // SAFETY: whoever asks for it has put code there; it keeps the C calling convention.
    let code: extern "C" fn(u64) -> u64 = unsafe { core::mem::transmute(address) };
    code(argument)
}

/// What the compiler calls for copies. String instructions on RAM are not intercepted.
mod compiler {
    use core::arch::asm;

    #[no_mangle]
    unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, bytes: usize) -> *mut u8 {
        // SAFETY: the compiler passes ranges that are valid and do not overlap.
        unsafe {
            asm!("rep movsb", inout("rdi") to => _, inout("rsi") from => _, inout("rcx") bytes => _, options(nostack))
        };
        to
    }

    #[no_mangle]
    unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, bytes: usize) -> *mut u8 {
        if (to as usize).wrapping_sub(from as usize) >= bytes {
            // SAFETY: a forward copy reads each byte before it overwrites it when the target is not inside the source.
            return unsafe { memcpy(to, from, bytes) };
        }
        // SAFETY: the ranges are valid; backwards, with the direction flag restored, since the target starts inside the source.
        unsafe {
            asm!("std", "rep movsb", "cld",
                inout("rdi") to.add(bytes).sub(1) => _, inout("rsi") from.add(bytes).sub(1) => _, inout("rcx") bytes => _,
                options(nostack))
        };
        to
    }

    #[no_mangle]
    unsafe extern "C" fn memset(to: *mut u8, value: i32, bytes: usize) -> *mut u8 {
        // SAFETY: the compiler passes a valid range.
        unsafe {
            asm!("rep stosb", inout("rdi") to => _, in("al") value as u8, inout("rcx") bytes => _, options(nostack))
        };
        to
    }

    #[no_mangle]
    unsafe extern "C" fn memcmp(left: *const u8, right: *const u8, bytes: usize) -> i32 {
        for index in 0..bytes {
            // SAFETY: the compiler passes ranges of `bytes` valid bytes.
            let (a, b) = unsafe {
                (
                    left.add(index).read_volatile(),
                    right.add(index).read_volatile(),
                )
            };
            if a != b {
                return i32::from(a) - i32::from(b);
            }
        }
        0
    }

    #[no_mangle]
    unsafe extern "C" fn bcmp(left: *const u8, right: *const u8, bytes: usize) -> i32 {
        // SAFETY: same contract.
        unsafe { memcmp(left, right, bytes) }
    }
}
