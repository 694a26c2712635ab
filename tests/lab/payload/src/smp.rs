// SPDX-License-Identifier: MIT OR Apache-2.0
//! The second processor: woken by INIT and SIPI for one job, asleep again after it.

use crate::interrupts;
use crate::platform::wait_until;
use crate::real_mode::{self, TRAMPOLINE};
use core::arch::{asm, global_asm};
use core::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};

const APIC: u64 = 0xfee0_0000;
const SPURIOUS: u64 = 0xf0;
const COMMAND_LOW: u64 = 0x300;
const COMMAND_HIGH: u64 = 0x310;
const INIT: u32 = 0x4500;
const STARTUP: u32 = 0x4600;
const SECOND: u32 = 1 << 24;
const BOOT_MILLISECONDS: u64 = 5000;

global_asm!(
    r#"
    .section .text
    .code64
    .global second_start
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
    static second_start: u8;
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
    real_mode::lead_to((&raw const second_start) as u64);
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
