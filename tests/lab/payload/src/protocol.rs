// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the monitor and whoever talks to it must agree on. Used by both, so it needs nothing but `core`.
//!
//! A request is a line `ID VERB [ARGUMENT…]`, numbers decimal or 0x-hexadecimal. The answer is a line `ID ok [WORD…]` or
//! `ID error SENTENCE`. Lines that start otherwise come by themselves: `READY`, `exception …`, `panic …`.

/// The first line after each start, a reset's included.
pub const READY: &str = "gmem-payload ready";

/// Below this address lie the payload, its page tables and the firmware's data: never to be converted.
pub const SHARED_FOR_EVER_END: u64 = 4 << 20;

/// KVM's hypercall, and a function of the port call, that asks for a conversion; arguments: guest physical address, pages, attributes.
pub const KVM_HC_MAP_GPA_RANGE: u64 = 12;

/// Attribute bit of that hypercall: encrypted, which is private here. The low bits are a page size, 0 = 4 KiB.
pub const MAP_GPA_ENCRYPTED: u64 = 1 << 4;

/// What a TD is told whose request was not carried out to its end: to go on where KVM stopped.
pub const MAP_GPA_RETRY: u64 = 1;
/// And what if it is refused.
pub const MAP_GPA_INVALID_OPERAND: u64 = 2;

/// Functions of the port call beside the hypercall's: accesses to a range are of one kind, whatever its attributes; and what KVM
/// has for a page. Kinds: by attribute again, private, shared.
pub const CALL_SET_KIND: u64 = 0x100;
pub const CALL_GET_KIND: u64 = 0x101;
pub const KIND_BY_ATTRIBUTE: u64 = 0;
pub const KIND_PRIVATE: u64 = 1;
pub const KIND_SHARED: u64 = 2;

/// The word that a pattern has at an address: depends on every bit of both, and is never the same at two addresses.
pub fn pattern(seed: u64, address: u64) -> u64 {
    let word = (address >> 3) ^ seed.wrapping_mul(0xd1b5_4a32_d192_ed03);
    let word = word.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    word ^ (word >> 29)
}
