// SPDX-License-Identifier: MIT OR Apache-2.0
//! Memory errors as the machine tells of them: a read that meets one is given up and answered with what the banks say.

use crate::interrupts;
use crate::serial::Serial;
use core::arch::{asm, global_asm};
use core::fmt::Write;
use core::ptr::addr_of_mut;

const MCG_CAP: u32 = 0x179;
const MCG_STATUS: u32 = 0x17a;
/// Control, status, address and miscellaneous register of the first bank; those of the others follow.
const BANK_STATUS: u32 = 0x401;
const BANK_REGISTERS: u32 = 4;
const STATUS_VALID: u64 = 1 << 63;
const STATUS_ADDRESS_VALID: u64 = 1 << 58;
const STATUS_MISCELLANEOUS_VALID: u64 = 1 << 59;

/// What a bank said.
#[derive(Clone, Copy)]
pub struct MachineCheck {
    /// Of all banks: whether it can go on where it was, and that this is one.
    pub global: u64,
    pub bank: u32,
    pub status: u64,
    /// 0 where the bank has none.
    pub address: u64,
    /// Likewise.
    pub miscellaneous: u64,
}

/// What became of a read.
pub enum Touched {
    Value(u64),
    MachineCheck(MachineCheck),
}

const NONE: MachineCheck = MachineCheck {
    global: 0,
    bank: 0,
    status: 0,
    address: 0,
    miscellaneous: 0,
};
/// What the last one was. One processor takes them, and reads it after the handler is done.
static mut LAST: MachineCheck = NONE;

global_asm!(
    r#"
    .section .text
    .global machine_check_entry, guarded_read, guarded_read_begin, guarded_read_end, guarded_read_failed
    .balign 16
machine_check_entry:
    .irp register, rax, rcx, rdx, rbx, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15
    push \register
    .endr
    mov rbx, rsp
    sub rsp, 512
    and rsp, -16
    fxsave64 [rsp]              // compiled code uses SSE
    lea rdi, [rbx + 15 * 8]
    call machine_check
    fxrstor64 [rsp]
    mov rsp, rbx
    .irp register, r15, r14, r13, r12, r11, r10, r9, r8, rdi, rsi, rbp, rbx, rdx, rcx, rax
    pop \register
    .endr
    iretq

    // The one read that may meet an error. rdi: where from; rax: what was there; rdx: 0 if nothing happened.
    .balign 16
guarded_read:
    xor edx, edx
guarded_read_begin:
    mov rax, [rdi]
guarded_read_end:
    ret
guarded_read_failed:
    mov edx, 1
    ret
"#
);

extern "C" {
    static machine_check_entry: u8;
    static guarded_read_begin: u8;
    static guarded_read_end: u8;
    static guarded_read_failed: u8;
}

/// Where the processor goes; for the interrupt table.
pub fn entry() -> u64 {
    (&raw const machine_check_entry) as u64
}

/// What the processor pushed.
#[repr(C)]
struct Frame {
    rip: u64,
    cs: u64,
    flags: u64,
    rsp: u64,
    ss: u64,
}

/// Reads a word, which may meet a memory error. The address must be allowed.
pub fn touch(address: u64) -> Touched {
    let (value, failed): (u64, u64);
    // SAFETY: callers checked the address. The handler changes nothing but where the read goes on; it puts registers and
    // its frame on the stack, as a call does.
    unsafe {
        asm!(
            "call guarded_read",
            inout("rdi") address => _,
            out("rax") value,
            out("rdx") failed,
        )
    };
    match failed {
        0 => Touched::Value(value),
        // SAFETY: the handler that wrote it is done, and there is one processor that takes machine checks.
        _ => Touched::MachineCheck(unsafe { *addr_of_mut!(LAST) }),
    }
}

#[no_mangle]
extern "C" fn machine_check(frame: &mut Frame) {
    let check = first_bank();
    let guarded = (&raw const guarded_read_begin) as u64..(&raw const guarded_read_end) as u64;
    let global = check.global;
    if !guarded.contains(&frame.rip) {
        let _ = writeln!(
            Serial,
            "\nexception vector=18 rip={:#x} global={global:#x} bank={} status={:#x} address={:#x}",
            frame.rip, check.bank, check.status, check.address
        );
        interrupts::stop()
    }
    // SAFETY: nobody reads it before this returns.
    unsafe { *addr_of_mut!(LAST) = check };
    frame.rip = (&raw const guarded_read_failed) as u64;
    // A second one while this is not cleared resets the machine.
    write_msr(MCG_STATUS, 0);
}

/// The first bank that has something valid, which is emptied.
fn first_bank() -> MachineCheck {
    let mut check = NONE;
    check.global = read_msr(MCG_STATUS);
    for bank in 0..read_msr(MCG_CAP) as u32 & 0xff {
        let register = BANK_STATUS + BANK_REGISTERS * bank;
        let status = read_msr(register);
        if status & STATUS_VALID == 0 {
            continue;
        }
        check.bank = bank;
        check.status = status;
        if status & STATUS_ADDRESS_VALID != 0 {
            check.address = read_msr(register + 1);
        }
        if status & STATUS_MISCELLANEOUS_VALID != 0 {
            check.miscellaneous = read_msr(register + 2);
        }
        write_msr(register, 0);
        break;
    }
    check
}

fn read_msr(register: u32) -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: a register of the machine-check architecture, which every processor of the lab has.
    unsafe {
        asm!("rdmsr", in("ecx") register, out("eax") low, out("edx") high, options(nomem, nostack))
    };
    u64::from(high) << 32 | u64::from(low)
}

/// A register that the processor does not have is an exception.
pub fn write_msr(register: u32, value: u64) {
    // SAFETY: memory that the register makes somebody write to is not this program's, or as above.
    unsafe {
        asm!("wrmsr", in("ecx") register, in("eax") value as u32, in("edx") (value >> 32) as u32,
            options(nostack))
    };
}
