// SPDX-License-Identifier: MIT OR Apache-2.0
//! The second processor: woken by INIT and SIPI for one job, asleep again after it.

use crate::interrupts;
use crate::platform::wait_until;
use core::arch::{asm, global_asm};
use core::ptr;
use core::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};

const APIC: u64 = 0xfee0_0000;
const SPURIOUS: u64 = 0xf0;
const COMMAND_LOW: u64 = 0x300;
const COMMAND_HIGH: u64 = 0x310;
const INIT: u32 = 0x4500;
const STARTUP: u32 = 0x4600;
const SECOND: u32 = 1 << 24;
/// A page below 1 MiB that nobody needs any more; its number is the startup vector.
const TRAMPOLINE: u64 = 0x8000;
const BOOT_MILLISECONDS: u64 = 5000;

global_asm!(
    r#"
    .section .rodata.trampoline, "a", @progbits
    .balign 16
trampoline:
    .code16
    cli
    mov ax, cs
    mov ds, ax
    .byte 0x66, 0x0f, 0x01, 0x16        // lgdt, 32-bit base, from an address in this segment
    .word second_gdt - trampoline
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
    .long second_start
    .word 8
    .balign 4
second_gdt:
    .word 23
    .long gdt
trampoline_end:

    .section .text
    .code64
second_start:
    mov eax, 16
    mov ds, eax
    mov es, eax
    mov ss, eax
    xor eax, eax
    mov fs, eax
    mov gs, eax
    lea rsp, [rip + second_stack_end]
    xor ebp, ebp
    call second_main
1:  cli
    hlt
    jmp 1b

    .section .bss.second, "aw", @nobits
    .balign 4096
second_stack:
    .skip 65536
second_stack_end:
"#
);

extern "C" {
    static trampoline: u8;
    static trampoline_end: u8;
}

static JOB: AtomicUsize = AtomicUsize::new(0);
static RUNNING: AtomicBool = AtomicBool::new(false);
static DONE: AtomicBool = AtomicBool::new(false);

#[no_mangle]
extern "C" fn second_main() {
    interrupts::load();
    RUNNING.store(true, SeqCst);
    // SAFETY: `with_second` put a function there.
    let job: fn() = unsafe { core::mem::transmute(JOB.load(SeqCst)) };
    job();
    DONE.store(true, SeqCst);
}

fn apic(register: u64, value: u32) {
    // SAFETY: the local APIC's page; every processor of a lab guest has it there.
    unsafe { ((APIC + register) as *mut u32).write_volatile(value) }
}

/// Runs `job` on the second processor and `meanwhile` here; returns when both are done.
pub fn with_second<T>(job: fn(), meanwhile: impl FnOnce() -> T) -> Result<T, &'static str> {
    let length = (&raw const trampoline_end) as usize - (&raw const trampoline) as usize;
    // SAFETY: the page is free: firmware is done, and the payload's own memory begins at 2 MiB.
    unsafe { ptr::copy_nonoverlapping(&raw const trampoline, TRAMPOLINE as *mut u8, length) };
    JOB.store(job as usize, SeqCst);
    RUNNING.store(false, SeqCst);
    DONE.store(false, SeqCst);
    apic(SPURIOUS, 0x1ff);
    apic(COMMAND_HIGH, SECOND);
    apic(COMMAND_LOW, INIT);
    wait_until(10, || false);
    apic(COMMAND_HIGH, SECOND);
    apic(COMMAND_LOW, STARTUP | (TRAMPOLINE >> 12) as u32);
    if !wait_until(BOOT_MILLISECONDS, || RUNNING.load(SeqCst)) {
        return Err("the second processor did not start");
    }
    let result = meanwhile();
    while !DONE.load(SeqCst) {
        pause();
    }
    Ok(result)
}

/// In a loop that waits for the other processor.
pub fn pause() {
    // SAFETY: a hint.
    unsafe { asm!("pause", options(nomem, nostack)) };
}
