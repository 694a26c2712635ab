// SPDX-License-Identifier: MIT OR Apache-2.0
//! Exceptions print a line and stop, but for machine checks, which have a handler of their own. An interrupt just ends a sleep: that
//! of COM1, the local timer's, one processor's to another.

use crate::machine_check;
use crate::port::out8;
use crate::serial::Serial;
use core::arch::{asm, global_asm};
use core::fmt::Write;
use core::ptr::addr_of_mut;

const CODE_SELECTOR: u64 = 8;
const INTERRUPT_GATE: u64 = 0x8e;
const EXCEPTIONS: usize = 32;
const MACHINE_CHECK: usize = 18;
const PIC_BASE: usize = 32;
const PIC_LINES: usize = 16;
const GATES_COUNT: usize = PIC_BASE + PIC_LINES + 1;
/// What local APICs wake their processors with.
pub const WAKE_VECTOR: u8 = (PIC_BASE + PIC_LINES) as u8;
const APIC: u64 = 0xfee0_0000;
/// Switched on, and its first local interrupt the interrupt controller's: what firmware does, where some runs.
const APIC_ON: [(u64, u32); 2] = [(0xf0, 0x1ff), (0x350, 0x700)];

global_asm!(
    r#"
    .section .text
    .altmacro
    .macro exception_stub number
    .balign 16
    .if (\number == 8) || (\number >= 10 && \number <= 14) || (\number == 17) || (\number == 21) || (\number == 29) || (\number == 30)
    .else
    push 0
    .endif
    push \number
    jmp exception_common
    .endm

    .balign 16
exception_stubs:
    .set number, 0
    .rept 32
    exception_stub %number
    .set number, number + 1
    .endr

exception_common:
    mov rdi, rsp
    and rsp, -16
    call exception
1:  hlt
    jmp 1b

    .balign 16
interrupt_stub:
    push rax
    mov al, 0x20
    out 0x20, al
    pop rax
    iretq

    .balign 16
wake_stub:
    push rax
    mov eax, 0xfee000b0         // the local APIC's end of an interrupt
    mov dword ptr [rax], 0
    pop rax
    iretq

    .balign 16
wake_stub_by_msr:
    push rax
    push rcx
    push rdx
    xor eax, eax
    xor edx, edx
    mov ecx, 0x80b
    wrmsr
    pop rdx
    pop rcx
    pop rax
    iretq
"#
);

extern "C" {
    static exception_stubs: u8;
    static interrupt_stub: u8;
    static wake_stub: u8;
    static wake_stub_by_msr: u8;
}

#[repr(C)]
struct Frame {
    vector: u64,
    error: u64,
    rip: u64,
    cs: u64,
    flags: u64,
    rsp: u64,
}

#[repr(C, align(16))]
struct Gate(u64, u64);

const NO_GATE: Gate = Gate(0, 0);
static mut GATES: [Gate; GATES_COUNT] = [NO_GATE; GATES_COUNT];

#[repr(C, packed)]
struct TablePointer {
    limit: u16,
    base: u64,
}

fn gate(handler: u64) -> Gate {
    Gate(
        (handler & 0xffff)
            | CODE_SELECTOR << 16
            | INTERRUPT_GATE << 40
            | (handler >> 16 & 0xffff) << 48,
        handler >> 32,
    )
}

/// Has this processor use the table.
pub fn load() {
    let pointer = TablePointer {
        limit: (size_of::<Gate>() * GATES_COUNT - 1) as u16,
        base: addr_of_mut!(GATES) as u64,
    };
    // SAFETY: the table is static, and whoever runs first fills it.
    unsafe { asm!("lidt [{}]", in(reg) &pointer, options(nostack)) };
}

/// Loads the interrupt table and opens the line of COM1, and no other, at the interrupt controller.
pub fn start() {
    let gates = addr_of_mut!(GATES);
    // SAFETY: one processor, interrupts off: nobody else looks at the table. The stubs are 16 bytes apart, as aligned.
    unsafe {
        for vector in 0..EXCEPTIONS {
            (*gates)[vector] = gate((&raw const exception_stubs) as u64 + 16 * vector as u64);
        }
        (*gates)[MACHINE_CHECK] = gate(machine_check::entry());
        for line in 0..PIC_LINES {
            (*gates)[PIC_BASE + line] = gate((&raw const interrupt_stub) as u64);
        }
        let stub = match apic_is_by_msr() {
            false => &raw const wake_stub,
            true => &raw const wake_stub_by_msr,
        };
        (*gates)[usize::from(WAKE_VECTOR)] = gate(stub as u64);
    }
    load();
    for (register, value) in APIC_ON {
        apic(register, value);
    }
    for (port, value) in [
        (0x20, 0x11),
        (0xa0, 0x11),
        (0x21, PIC_BASE as u8),
        (0xa1, PIC_BASE as u8 + 8),
        (0x21, 4),
        (0xa1, 2),
        (0x21, 1),
        (0xa1, 1),
        (0x21, !(1 << 4)),
        (0xa1, 0xff),
    ] {
        out8(port, value);
    }
}

/// Whether the local APIC has been put into the mode in which its registers are MSRs, as that of a TD is.
fn apic_is_by_msr() -> bool {
    const APIC_BASE: u32 = 0x1b;
    const BY_MSR: u32 = 1 << 10;
    let low: u32;
    // SAFETY: every processor of a lab guest has it, and reading it has no side effect.
    unsafe {
        asm!("rdmsr", in("ecx") APIC_BASE, out("eax") low, out("edx") _, options(nomem, nostack))
    };
    low & BY_MSR != 0
}

fn apic_msr(register: u64, high: u32, low: u32) {
    let number = 0x800 + (register >> 4) as u32;
    // SAFETY: a register of the local APIC, in the mode in which it is there.
    unsafe { asm!("wrmsr", in("ecx") number, in("eax") low, in("edx") high, options(nostack)) };
}

fn apic(register: u64, value: u32) {
    if apic_is_by_msr() {
        return apic_msr(register, 0, value);
    }
    // SAFETY: the local APIC's page, where every processor of a lab guest has it.
    unsafe { ((APIC + register) as *mut u32).write_volatile(value) };
}

/// Sends an interrupt command to another processor.
pub fn tell(processor: u32, what: u32) {
    const COMMAND_LOW: u64 = 0x300;
    const COMMAND_HIGH: u64 = 0x310;
    if apic_is_by_msr() {
        return apic_msr(COMMAND_LOW, processor, what);
    }
    apic(COMMAND_HIGH, processor << 24);
    apic(COMMAND_LOW, what);
}

/// Has this processor's local APIC take interrupts.
pub fn switch_on() {
    let (register, value) = APIC_ON[0];
    apic(register, value);
}

/// The local APIC wakes this processor once after this many ticks of its timer.
pub fn set_alarm(ticks: u32) {
    const TIMER: u64 = 0x320;
    const DIVIDER: u64 = 0x3e0;
    const BY_ONE: u32 = 0b1011;
    const COUNT: u64 = 0x380;
    apic(TIMER, u32::from(WAKE_VECTOR));
    apic(DIVIDER, BY_ONE);
    apic(COUNT, ticks);
}

/// Until an interrupt. One that came since interrupts were off ends it at once: sti takes effect after the following instruction.
pub fn sleep() {
    // SAFETY: interrupts are on only here, and their handlers save what they use.
    unsafe { asm!("sti", "hlt", "cli", options(nomem, nostack)) };
}

#[no_mangle]
extern "C" fn exception(frame: &Frame) -> ! {
    let address: u64;
    // SAFETY: reading CR2 has no side effect.
    unsafe { asm!("mov {}, cr2", out(reg) address, options(nomem, nostack)) };
    let _ = writeln!(
        Serial,
        "\nexception vector={} error={:#x} rip={:#x} cr2={:#x} rsp={:#x} cs={:#x} flags={:#x}",
        frame.vector, frame.error, frame.rip, address, frame.rsp, frame.cs, frame.flags
    );
    stop()
}

/// Nothing more to do until somebody resets the machine.
pub fn stop() -> ! {
    loop {
        // SAFETY: sleeping with interrupts off touches nothing.
        unsafe { asm!("cli", "hlt", options(nomem, nostack)) };
    }
}
