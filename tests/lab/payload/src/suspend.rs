// SPDX-License-Identifier: MIT OR Apache-2.0
//! ACPI S3: the firmware's tables are told where to go on, the chipset's port puts the machine to sleep. Whoever wakes up
//! finds all it had, its stack included, or never gets back here.

use crate::platform;
use crate::real_mode::{self, TRAMPOLINE};
use crate::{interrupts, serial, smp};
use core::arch::global_asm;
use core::ptr;

/// Where firmware leaves the pointer to its tables, and how it is aligned.
const POINTERS: core::ops::Range<u64> = 0xe_0000..0x10_0000;
const POINTER_STEP: usize = 16;
const POINTER_SIGNATURE: &[u8] = b"RSD PTR ";
/// In the pointer: the 32-bit address of the root table.
const ROOT: u64 = 16;
/// In a table: its length, and what follows the header; in the root table those are 32-bit addresses of others.
const LENGTH: u64 = 4;
const BODY: u64 = 36;
/// In the fixed table: the 32-bit address of the firmware's control structure; and in that one, where to go on.
const CONTROL: u64 = 36;
const WAKING_VECTOR: u64 = 12;

global_asm!(
    r#"
    .section .text
    .code64
    // edi: a port; esi: what is written there. eax: 1 after sleep, 0 if the machine did not fall asleep.
    .global suspend_by_port, suspend_woken
suspend_by_port:
    push rbx
    push rbp
    push r12
    push r13
    push r14
    push r15
    mov [rip + suspended_stack], rsp
    mov edx, edi
    mov eax, esi
    out dx, ax
    xor eax, eax
    jmp 1f
suspend_woken:
    mov eax, 16
    mov ds, eax
    mov es, eax
    mov ss, eax
    xor eax, eax
    mov fs, eax
    mov gs, eax
    mov rsp, [rip + suspended_stack]
    mov eax, 1
1:  pop r15
    pop r14
    pop r13
    pop r12
    pop rbp
    pop rbx
    ret

    .section .bss.suspend, "aw", @nobits
    .balign 8
suspended_stack:
    .skip 8
    .section .text
"#
);

extern "C" {
    static suspend_woken: u8;
    fn suspend_by_port(port: u32, value: u32) -> u32;
}

fn read32(address: u64) -> u32 {
    // SAFETY: mapped one to one, and reading memory or ROM changes nothing.
    unsafe { ptr::read_unaligned(address as *const u32) }
}

fn has_signature(address: u64, signature: &[u8]) -> bool {
    let byte = |at: u64| {
        // SAFETY: as in read32.
        unsafe { ptr::read_volatile(at as *const u8) }
    };
    (address..)
        .zip(signature)
        .all(|(at, wanted)| byte(at) == *wanted)
}

/// The firmware's control structure, if there was firmware.
fn control_structure() -> Option<u64> {
    let pointer = POINTERS
        .step_by(POINTER_STEP)
        .find(|at| has_signature(*at, POINTER_SIGNATURE))?;
    let root = u64::from(read32(pointer + ROOT));
    let length = u64::from(read32(root + LENGTH));
    let fixed = (root + BODY..root + length)
        .step_by(4)
        .map(|at| u64::from(read32(at)))
        .find(|at| has_signature(*at, b"FACP"))?;
    let control = u64::from(read32(fixed + CONTROL));
    has_signature(control, b"FACS").then_some(control)
}

/// Whether the machine fell asleep, and was woken up.
pub fn suspend() -> Result<bool, &'static str> {
    let (port, value) = platform::sleep_control().ok_or("there is no power management")?;
    real_mode::lead_to((&raw const suspend_woken) as u64);
    if let Some(control) = control_structure() {
        // SAFETY: the field is there for us to write.
        unsafe { ((control + WAKING_VECTOR) as *mut u32).write_volatile(TRAMPOLINE as u32) };
    }
    // SAFETY: it comes back as a function does, now or when the machine wakes up; all devices may have been reset then.
    let woken = unsafe { suspend_by_port(u32::from(port), u32::from(value)) } != 0;
    if woken {
        smp::forget();
        serial::start();
        interrupts::start();
    }
    Ok(woken)
}
