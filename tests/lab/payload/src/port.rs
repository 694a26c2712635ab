// SPDX-License-Identifier: MIT OR Apache-2.0
//! Plain port I/O: the one kind of exit that KVM serves without decoding an instruction. No string forms, therefore.

use core::arch::asm;

/// Reads a byte.
pub fn in8(port: u16) -> u8 {
    let value;
    // SAFETY: the payload owns the machine; a port access touches no memory of ours.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack)) };
    value
}

/// Reads four bytes.
pub fn in32(port: u16) -> u32 {
    let value;
    // SAFETY: as in8.
    unsafe { asm!("in eax, dx", in("dx") port, out("eax") value, options(nomem, nostack)) };
    value
}

/// Writes a byte. Ordered with memory accesses: a device may look at memory because of it.
pub fn out8(port: u16, value: u8) {
    // SAFETY: as in8.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nostack)) };
}

/// Writes two bytes.
pub fn out16(port: u16, value: u16) {
    // SAFETY: as in8.
    unsafe { asm!("out dx, ax", in("dx") port, in("ax") value, options(nostack)) };
}

/// Writes four bytes.
pub fn out32(port: u16, value: u32) {
    // SAFETY: as in8.
    unsafe { asm!("out dx, eax", in("dx") port, in("eax") value, options(nostack)) };
}
