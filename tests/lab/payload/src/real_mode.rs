// SPDX-License-Identifier: MIT OR Apache-2.0
//! From real mode at the page where a processor is told to start, to long mode with the payload's tables.

use core::arch::global_asm;
use core::ptr;

/// A page below 1 MiB that nobody needs any more; its number is a startup vector.
pub const TRAMPOLINE: u64 = 0x8000;

global_asm!(
    r#"
    .section .rodata.trampoline, "a", @progbits
    .global trampoline, trampoline_target, trampoline_end
    .balign 16
trampoline:
    .code16
    cli
    mov ax, cs
    mov ds, ax
    .byte 0x66, 0x0f, 0x01, 0x16        // lgdt, 32-bit base, from an address in this segment
    .word trampoline_gdt - trampoline
    mov eax, cr4
    or eax, 0x660
    mov cr4, eax
    mov eax, offset page_map
    mov cr3, eax
    mov ecx, 0xc0000080
    rdmsr
    or eax, 0x100
    wrmsr
    mov eax, cr0
    and eax, 0x9ffffffb                 // caches on, not EM
    or eax, 0x80000003
    mov cr0, eax
    .byte 0x66, 0xea                    // jmp far, 32-bit offset
trampoline_target:
    .long 0
    .word 8
    .balign 4
trampoline_gdt:
    .word 23
    .long gdt
trampoline_end:
    .section .text
    .code64
"#
);

extern "C" {
    static trampoline: u8;
    static trampoline_target: u8;
    static trampoline_end: u8;
}

/// Has the page lead to `target`: 64-bit code that sets its own segments and stack.
pub fn lead_to(target: u64) {
    let start = (&raw const trampoline) as usize;
    let length = (&raw const trampoline_end) as usize - start;
    let operand = (&raw const trampoline_target) as usize - start;
    // SAFETY: the page is free: firmware is done, and the payload's own memory begins at 2 MiB. All code is below 4 GiB.
    unsafe {
        ptr::copy_nonoverlapping(&raw const trampoline, TRAMPOLINE as *mut u8, length);
        ptr::write_unaligned((TRAMPOLINE as usize + operand) as *mut u32, target as u32);
    }
}
