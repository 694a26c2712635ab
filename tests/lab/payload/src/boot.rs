// SPDX-License-Identifier: MIT OR Apache-2.0
//! From the PVH entry point (32 bits, no paging) to long mode with an identity map.

use core::arch::global_asm;

/// How much guest physical address space is mapped one to one: RAM above 4 GiB and all 32-bit BARs are inside.
pub const MAPPED_BYTES: u64 = 16 << 30;

global_asm!(
    r#"
    .section .note.pvh, "a", @note
    .balign 4
    .long 4                 // size of the name
    .long 8                 // size of the value
    .long 18                // XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .quad start

    .section .text.boot, "ax", @progbits
    .code32
    .global start
start:
    cli
    cld
    // A reset enters here again with whatever the last run left in memory.
    mov edi, offset bss_begin
    mov ecx, offset bss_end
    sub ecx, edi
    shr ecx, 2
    xor eax, eax
    rep stosd
    mov esp, offset stack_end

    mov eax, offset page_directory_pointers
    or eax, 3
    mov dword ptr [page_map], eax

    mov edi, offset page_directory_pointers
    mov eax, offset page_directories
    or eax, 3
    mov ecx, {directories}
2:  mov dword ptr [edi], eax
    add eax, 4096
    add edi, 8
    dec ecx
    jnz 2b

    mov edi, offset page_directories
    mov eax, 0x83           // present, writable, 2 MiB
    xor edx, edx
    mov ecx, {directories} * 512
3:  mov dword ptr [edi], eax
    mov dword ptr [edi + 4], edx
    add eax, 0x200000
    adc edx, 0
    add edi, 8
    dec ecx
    jnz 3b

    mov eax, offset page_map
    mov cr3, eax
    mov eax, cr4
    or eax, 0x660           // PAE, OSFXSR, OSXMMEXCPT: compiled code uses SSE; MCE: memory errors are told, not fatal
    mov cr4, eax
    mov ecx, 0xc0000080     // EFER
    rdmsr
    or eax, 0x100           // LME
    wrmsr
    mov eax, cr0
    and eax, 0xfffffffb     // not EM
    or eax, 0x80000003      // PG, MP, PE
    mov cr0, eax
    lgdt [gdt_pointer]
    mov eax, 8
    push eax
    mov eax, offset long_mode
    push eax
    retf

    .code64
long_mode:
    mov eax, 16
    mov ds, eax
    mov es, eax
    mov ss, eax
    xor eax, eax
    mov fs, eax
    mov gs, eax
    lea rsp, [rip + stack_end]
    mov edi, ebx            // start info; ebx was not touched since the entry
    xor ebp, ebp
    call main
4:  hlt
    jmp 4b

    .section .rodata.gdt, "a", @progbits
    .balign 8
    .global gdt
gdt:
    .quad 0
    .quad 0x00af9b000000ffff
    .quad 0x00cf93000000ffff
    .global gdt_pointer
gdt_pointer:
    .word 23
    .long gdt
    .long 0

    .section .bss.boot, "aw", @nobits
    .balign 4096
    .global page_map
page_map:
    .skip 4096
page_directory_pointers:
    .skip 4096
page_directories:
    .skip {directories} * 4096
stack:
    .skip 65536
stack_end:
"#,
    directories = const MAPPED_BYTES >> 30,
);
