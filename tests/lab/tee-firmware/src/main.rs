// SPDX-License-Identifier: MIT OR Apache-2.0
//! The firmware of the lab's SNP and TDX guests, up to the payload's entry. All memory is private when it begins.
//!
//! An SNP guest begins in real mode, a TD's processors all in 32-bit flat mode, with their number in ESI; the images differ in
//! their last 16 bytes, their tables and the command line. All of those are the builder's (`tests/lab/src/tee_firmware.rs`),
//! which finds its way by the header. Code in private memory computes, and uses memory and plain port I/O: an instruction that
//! KVM has to decode it can't read there. So [2, 4) MiB is made shared, and everything else happens in that range, by the
//! payload.
//!
//! In an ordinary VM, where nobody answers the port call, it does the same.
#![no_std]
#![no_main]

#[path = "../../payload/src/handover.rs"]
// The payload and the builder take the rest of it.
#[allow(dead_code)]
mod handover;

use core::arch::global_asm;
use handover::{
    CALL_PORT, COMMAND_LINE, COMMAND_LINE_BYTES, MAILBOX, MAP_ENTRIES, MOST_MAP_ENTRIES,
    SHARED_BEGIN, SHARED_END, STACK, START_INFO, TABLES,
};

/// KVM's hypercall for conversions, as a port call has it.
const MAP_GPA_RANGE: u32 = 12;
/// What KVM answers a TD whose request did not get to its end: go on at EBX.
const RETRY: u32 = 1;

const START_INFO_MAGIC: u32 = 0x336e_c578;
/// QEMU's fw_cfg: a selector, data byte by byte, and the file that lists files.
const FW_CFG_SELECTOR: u32 = 0x510;
const FW_CFG_FILES: u32 = 0x19;
/// A file's entry: size and selector in network order, two bytes, name.
const FILE_ENTRY_BYTES: u32 = 64;
const FILE_SELECTOR: u32 = 4;
const FILE_NAME: u32 = 8;
/// `etc/e820` as two words and its end.
const NAME_LOW: u32 = u32::from_le_bytes(*b"etc/");
const NAME_HIGH: u32 = u32::from_le_bytes(*b"e820");
/// An entry there, and in the memory map of a start info.
const E820_BYTES: u32 = 20;
const MAP_ENTRY_BYTES: u32 = 24;

const COM1: u32 = 0x3f8;

global_asm!(
    r#"
    .section .firmware, "awx", @progbits
    .code32
    .global header
header:
    .ascii "gmem-tee"
    .long real_mode
    .long flat
    // What follows is filled in by the builder.
payload_source:
    .long 0
payload_target:
    .long 0
payload_words:
    .long 0
payload_entry:
    .long 0
command_line:
    .skip {command_line_bytes}

    .balign 8
gdt:
    .quad 0
    .quad 0x00cf9b000000ffff
    .quad 0x00cf93000000ffff
gdt_pointer:
    .word 23
    .long gdt
    .balign 4
released:
    .long 0

    .code16
real_mode:
    cli
    xor esi, esi
    .byte 0x2e, 0x66, 0x0f, 0x01, 0x16  // lgdt cs:, 32-bit base
    .word gdt_pointer - header
    mov eax, cr0
    and eax, 0x9fffffff                 // caches on
    or eax, 1
    mov cr0, eax
    .byte 0x66, 0xea                    // jmp far, 32-bit offset
    .long flat
    .word 8

    .code32
flat:
    cli
    cld
    lgdt [gdt_pointer]
    mov eax, 16
    mov ds, eax
    mov es, eax
    mov ss, eax
    .byte 0xea
    .long 1f
    .word 8

1:  test esi, esi
    jnz park

    mov ebx, {shared_begin}
2:  mov ecx, {shared_end}
    sub ecx, ebx
    shr ecx, 12
    xor esi, esi                        // shared
    mov eax, {map_gpa_range}
    mov edx, {call_port}
    out dx, eax
    cmp eax, {retry}
    je 2b
    test eax, eax
    jz 3f
    cmp eax, {map_gpa_range}            // nobody answers: an ordinary VM
    jne refused

    // What a page holds that has just been shared is undefined.
3:  mov edi, {tables}
    mov ecx, ({shared_end} - {tables}) / 4
    xor eax, eax
    rep stosd
    mov esp, {stack}
    mov esi, [payload_source]
    mov edi, [payload_target]
    mov ecx, [payload_words]
    rep movsd
    mov esi, offset command_line
    mov edi, {command_line}
    mov ecx, {command_line_bytes} / 4
    rep movsd

    call memory_map
    mov ebx, {start_info}
    mov dword ptr [ebx], {magic}
    mov dword ptr [ebx + 4], 1          // version: has a memory map
    mov dword ptr [ebx + 24], {command_line}
    mov dword ptr [ebx + 40], {map_entries}
    mov [ebx + 48], eax

    mov dword ptr [released], 1
    jmp [payload_entry]

    // The other processors of a TD. The mailbox is shared, and looked at when it is.
park:
4:  cmp dword ptr [released], 0
    je 4b
5:  mov eax, [{mailbox} + esi * 4]
    test eax, eax
    jz 5b
    jmp eax

    // Copies `etc/e820` to the start info's memory map. eax: entries.
memory_map:
    mov eax, {fw_cfg_files}
    call select
    mov edi, {stack}                    // a scratch page, from its begin
    mov ecx, 4
    call read
    mov ebx, [{stack}]
    bswap ebx
6:  dec ebx
    js no_map
    mov edi, {stack}
    mov ecx, {file_entry_bytes}
    call read
    cmp dword ptr [{stack} + {file_name}], {name_low}
    jne 6b
    cmp dword ptr [{stack} + {file_name} + 4], {name_high}
    jne 6b
    cmp byte ptr [{stack} + {file_name} + 8], 0
    jne 6b
    mov al, [{stack} + {file_selector} + 1]
    mov ah, [{stack} + {file_selector}]
    call select
    mov eax, [{stack}]
    bswap eax
    xor edx, edx
    mov ecx, {e820_bytes}
    div ecx
    cmp eax, {most_map_entries}
    jbe 7f
    mov eax, {most_map_entries}
7:  push eax
    mov ebx, eax
    mov edi, {map_entries}
8:  dec ebx
    js 9f
    mov ecx, {e820_bytes}
    call read
    add edi, {map_entry_bytes} - {e820_bytes}
    jmp 8b
9:  pop eax
    ret
no_map:
    xor eax, eax
    ret

select:
    mov edx, {fw_cfg_selector}
    out dx, ax
    ret

    // ecx bytes to edi. No string form: KVM decodes those.
read:
    mov edx, {fw_cfg_selector} + 1
10: in al, dx
    stosb
    dec ecx
    jnz 10b
    ret

    // Without a shared range there is no stack, and nowhere to go on: says so, with the result.
refused:
    mov ebx, eax
    mov esi, offset complaint
11: mov ah, [esi]
    inc esi
    test ah, ah
    jz 13f
    mov edx, {com1} + 5
12: in al, dx
    test al, 0x20
    jz 12b
    mov edx, {com1}
    mov al, ah
    out dx, al
    jmp 11b
13: mov edi, 8
14: rol ebx, 4
    mov edx, {com1} + 5
15: in al, dx
    test al, 0x20
    jz 15b
    mov al, bl
    and al, 15
    add al, 0x30
    cmp al, 0x39
    jbe 16f
    add al, 0x27
16: mov edx, {com1}
    out dx, al
    dec edi
    jnz 14b
    mov al, 10
    out dx, al
17: jmp 17b
complaint:
    .asciz "\nfirmware: the host does not share [2, 4) MiB: 0x"
"#,
    command_line_bytes = const COMMAND_LINE_BYTES,
    shared_begin = const SHARED_BEGIN,
    shared_end = const SHARED_END,
    map_gpa_range = const MAP_GPA_RANGE,
    call_port = const CALL_PORT,
    retry = const RETRY,
    tables = const TABLES,
    stack = const STACK,
    command_line = const COMMAND_LINE,
    start_info = const START_INFO,
    magic = const START_INFO_MAGIC,
    map_entries = const MAP_ENTRIES,
    most_map_entries = const MOST_MAP_ENTRIES,
    mailbox = const MAILBOX,
    fw_cfg_selector = const FW_CFG_SELECTOR,
    fw_cfg_files = const FW_CFG_FILES,
    file_entry_bytes = const FILE_ENTRY_BYTES,
    file_selector = const FILE_SELECTOR,
    file_name = const FILE_NAME,
    name_low = const NAME_LOW,
    name_high = const NAME_HIGH,
    e820_bytes = const E820_BYTES,
    map_entry_bytes = const MAP_ENTRY_BYTES,
    com1 = const COM1,
);

#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    loop {}
}
