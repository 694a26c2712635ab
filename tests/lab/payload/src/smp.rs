// SPDX-License-Identifier: MIT OR Apache-2.0
//! The other processors: woken by INIT and SIPI when there is a first job for them, or by the firmware's mailbox; between jobs they
//! sleep until an interrupt from here.

use crate::handover::MAILBOX;
use crate::interrupts::{self, WAKE_VECTOR};
use crate::memory;
use crate::platform::wait_until;
use crate::protocol::MAP_GPA_ENCRYPTED;
use crate::real_mode::{self, TRAMPOLINE};
use crate::started;
use core::arch::{asm, global_asm};
use core::sync::atomic::{AtomicU32, AtomicUsize, Ordering::SeqCst};

/// The most processors that a guest's jobs can use, the first one included.
pub const MOST: usize = 4;

const FIXED: u32 = 0x4000;
const INIT: u32 = 0x4500;
const STARTUP: u32 = 0x4600;
const BOOT_MILLISECONDS: u64 = 5000;

global_asm!(
    r#"
    .section .text
    .code32
    // From the mailbox: flat, no paging, no stack.
    .global other_flat
other_flat:
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
    and eax, 0x9ffffffb
    or eax, 0x80000003
    mov cr0, eax
    lgdt [gdt_pointer]
    mov edi, esi                        // its number
    .byte 0xea                          // jmp far
    .long 2f
    .word 8

    .code64
    .global other_start
other_start:
    mov eax, 16
    mov ds, eax
    mov eax, 0xfee00020                 // the local APIC's number is the processor's
    mov edi, [rax]
    shr edi, 24
2:  mov eax, 16
    mov ds, eax
    mov es, eax
    mov ss, eax
    xor eax, eax
    mov fs, eax
    mov gs, eax
    xor ebp, ebp
    cmp edi, {most}
    jae 1f
    mov eax, edi
    shl eax, 16
    lea rsp, [rip + other_stacks]
    add rsp, rax
    call other_main
1:  cli
    hlt
    jmp 1b

    .section .bss.others, "aw", @nobits
    .balign 4096
other_stacks:
    .skip ({most} - 1) * 65536
"#,
    most = const MOST,
);

extern "C" {
    static other_flat: u8;
    static other_start: u8;
}

/// What a processor is at.
const ABSENT: u32 = 0;
const ASLEEP: u32 = 1;
const ASKED: u32 = 2;
const AT_WORK: u32 = 3;
static STATE: [AtomicU32; MOST] = [const { AtomicU32::new(ABSENT) }; MOST];
static JOB: AtomicUsize = AtomicUsize::new(0);

#[no_mangle]
extern "C" fn other_main(number: u32) {
    interrupts::load();
    interrupts::switch_on();
    let state = &STATE[number as usize];
    state.store(ASLEEP, SeqCst);
    loop {
        if state
            .compare_exchange(ASKED, AT_WORK, SeqCst, SeqCst)
            .is_ok()
        {
            // SAFETY: `with_others` put a function there.
            let job: fn(usize) = unsafe { core::mem::transmute(JOB.load(SeqCst)) };
            job(number as usize);
            state.store(ASLEEP, SeqCst);
        }
        interrupts::sleep();
    }
}

/// Has all that wait at the mailbox sleep until there is a job for them: there they look at it all the time.
pub fn invite() {
    if !started::by_mailbox() {
        return;
    }
    for number in 1..MOST as u64 {
        let word = (u64::from(MAILBOX) + 4 * number) as *mut u32;
        // SAFETY: a word of the firmware's, for this.
        unsafe { word.write_volatile((&raw const other_flat) as u32) };
    }
}

/// Has processors 1 to `count` wait for jobs.
fn start(count: usize) -> Result<(), &'static str> {
    let absent = |number: &usize| STATE[*number].load(SeqCst) == ABSENT;
    let mut missing = (1..=count).filter(absent).peekable();
    if missing.peek().is_none() {
        return Ok(());
    }
    interrupts::switch_on();
    if !started::by_mailbox() {
        // KVM decodes there what brings a processor to long mode, and can't in private memory.
        if started::in_private_memory() && memory::convert(TRAMPOLINE, 1, 0) != 0 {
            return Err("the host does not share the page where processors start");
        }
        real_mode::lead_to((&raw const other_start) as u64);
        for number in missing {
            interrupts::tell(number as u32, INIT);
            wait_until(10, || false);
            interrupts::tell(number as u32, STARTUP | (TRAMPOLINE >> 12) as u32);
        }
    }
    let started = await_all(count, ABSENT);
    let trampoline_is_shared = !started::by_mailbox() && started::in_private_memory();
    if trampoline_is_shared && memory::convert(TRAMPOLINE, 1, MAP_GPA_ENCRYPTED) != 0 {
        return Err("the host does not take back the page where processors start");
    }
    started
}

/// Until none of them is in this state any more.
fn await_all(count: usize, state: u32) -> Result<(), &'static str> {
    let left = || STATE[1..=count].iter().all(|at| at.load(SeqCst) != state);
    match wait_until(BOOT_MILLISECONDS, left) {
        true => Ok(()),
        false => Err("a processor did not start"),
    }
}

/// Runs `job` on `count` other processors, with their numbers from 1 on, and `meanwhile` here; returns when all are done.
pub fn with_others<T>(
    count: usize,
    job: fn(usize),
    meanwhile: impl FnOnce() -> T,
) -> Result<T, &'static str> {
    if count >= MOST {
        return Err("there are not that many processors");
    }
    start(count)?;
    JOB.store(job as usize, SeqCst);
    for (number, state) in STATE.iter().enumerate().skip(1).take(count) {
        state.store(ASKED, SeqCst);
        interrupts::tell(number as u32, FIXED | u32::from(WAKE_VECTOR));
    }
    await_all(count, ASKED)?;
    let result = meanwhile();
    while STATE[1..=count]
        .iter()
        .any(|state| state.load(SeqCst) != ASLEEP)
    {
        pause();
    }
    Ok(result)
}

/// Runs `job` on the second processor and `meanwhile` here; returns when both are done.
pub fn with_second<T>(job: fn(usize), meanwhile: impl FnOnce() -> T) -> Result<T, &'static str> {
    with_others(1, job, meanwhile)
}

/// The machine was reset around this processor: the others are where it put them.
pub fn forget() {
    for state in &STATE {
        state.store(ABSENT, SeqCst);
    }
}

/// In a loop that waits for the other processor.
pub fn pause() {
    // SAFETY: a hint.
    unsafe { asm!("pause", options(nomem, nostack)) };
}
