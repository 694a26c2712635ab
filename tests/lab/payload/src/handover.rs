// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the firmware of SNP and TDX guests, the payload that it starts and the builder of its images agree on. Needs nothing but
//! `core`; who uses it takes what it needs.

/// The range that the firmware makes shared, and the payload runs in.
pub const SHARED_BEGIN: u32 = 2 << 20;
pub const SHARED_END: u32 = 4 << 20;

/// The firmware's end of it: the payload ends before.
pub const TABLES: u32 = 0x3f_c000;
/// Where the command line begins, and how many bytes it may have, its end included.
pub const COMMAND_LINE: u32 = TABLES;
pub const COMMAND_LINE_BYTES: u32 = 64;
/// The firmware's stack grows down to here; above, it scribbles.
pub const STACK: u32 = TABLES + 0x1000;
/// PVH's start info, and the memory map that it points to.
pub const START_INFO: u32 = TABLES + 0x2000;
pub const MAP_ENTRIES: u32 = START_INFO + 0x40;
pub const MOST_MAP_ENTRIES: u32 = 32;
/// A TD's processors but the first wait for an address here, each for the word of its number: to begin there as they are, in
/// 32-bit flat mode without paging, their number in ESI.
pub const MAILBOX: u32 = 0x3f_f000;

/// A call of the host's that needs no decoding: `out dx, eax` with this port, the function in EAX, its arguments in RBX, RCX and
/// RSI; the result is in RAX.
pub const CALL_PORT: u16 = 0x7e0;

/// What an SNP guest's launch adds of RAM, beside the image: address, bytes, and kind of page (`ovmf_sev_metadata_desc_type` of
/// QEMU's), in order.
pub const SNP_PAGES: &[(u32, u32, u32)] = &[
    (0x80_0000, 0x4000, SNP_ZERO),
    (SNP_SECRETS_PAGE, 0x1000, SNP_SECRETS),
    (SNP_CPUID_PAGE, 0x1000, SNP_CPUID),
    (SNP_HASHES_PAGE, 0x1000, SNP_HASHES),
    (0x80_7000, 0x2000, SNP_ZERO),
];
pub const SNP_ZERO: u32 = 1;
pub const SNP_SECRETS: u32 = 2;
pub const SNP_CPUID: u32 = 3;
pub const SNP_HASHES: u32 = 0x10;
pub const SNP_SECRETS_PAGE: u32 = 0x80_4000;
pub const SNP_CPUID_PAGE: u32 = 0x80_5000;
pub const SNP_HASHES_PAGE: u32 = 0x80_6000;
/// Where in its page the table of a kernel's hashes is, and its room.
pub const SNP_HASHES_OFFSET: u32 = 0xc00;
pub const SNP_HASHES_BYTES: u32 = 0x400;

/// What a TD's launch adds: address, bytes, and type of section (TDVF design guide), in order.
pub const TDX_PAGES: &[(u32, u32, u32)] = &[
    (TDX_HOB_PAGE, 0x2000, TDX_HOB),
    (0x80_b000, 0x2000, TDX_TEMPORARY),
];
pub const TDX_HOB: u32 = 2;
pub const TDX_TEMPORARY: u32 = 3;
pub const TDX_HOB_PAGE: u32 = 0x80_9000;
