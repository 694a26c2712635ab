// SPDX-License-Identifier: MIT OR Apache-2.0
//! How the payload was started, by the words of the start info's command line: firmware of SNP and TDX guests passes some.

use crate::handover::COMMAND_LINE_BYTES;
use core::ptr;
use core::sync::atomic::{AtomicBool, Ordering::Relaxed};

const MAGIC: u32 = 0x336e_c578;
const COMMAND_LINE: u64 = 24;

/// Requests for conversions go by the port call; else by VMMCALL.
pub static PORT_CALL: AtomicBool = AtomicBool::new(false);
/// Nothing tells of a byte that COM1 has received.
static POLL: AtomicBool = AtomicBool::new(false);
/// Other processors wait for an address in the mailbox; else for INIT and SIPI.
static MAILBOX: AtomicBool = AtomicBool::new(false);
/// Memory below the payload is private.
static PRIVATE: AtomicBool = AtomicBool::new(false);

/// The start info, if there is one with these and later fields: the words of it.
pub fn info(start_info: u64, version: u32) -> Option<impl Fn(u64) -> u32> {
    // SAFETY: the loader passes the address of a start info (PVH ABI); the version says what is there.
    let word =
        move |offset: u64| unsafe { ptr::read_unaligned((start_info + offset) as *const u32) };
    (word(0) == MAGIC && word(4) >= version).then_some(word)
}

/// Reads the command line.
pub fn read(start_info: u64) {
    let Some(word) = info(start_info, 0) else {
        return;
    };
    let line = u64::from(word(COMMAND_LINE)) | u64::from(word(COMMAND_LINE + 4)) << 32;
    if line == 0 {
        return;
    }
    let mut bytes = [0; COMMAND_LINE_BYTES as usize];
    let mut length = 0;
    while length < bytes.len() {
        // SAFETY: it is a string that ends with a zero, and nobody reads on after that.
        let byte = unsafe { ((line + length as u64) as *const u8).read() };
        if byte == 0 {
            break;
        }
        bytes[length] = byte;
        length += 1;
    }
    let text = core::str::from_utf8(&bytes[..length]).unwrap_or("");
    for word in text.split_ascii_whitespace() {
        match word {
            "port-call" => {
                PORT_CALL.store(true, Relaxed);
                PRIVATE.store(true, Relaxed);
            }
            "poll" => POLL.store(true, Relaxed),
            "mailbox" => MAILBOX.store(true, Relaxed),
            _ => {}
        }
    }
}

/// Whether COM1 has to be looked at.
pub fn polls() -> bool {
    POLL.load(Relaxed)
}

/// Whether other processors wait at the mailbox.
pub fn by_mailbox() -> bool {
    MAILBOX.load(Relaxed)
}

/// Whether memory below the payload was private at the start.
pub fn in_private_memory() -> bool {
    PRIVATE.load(Relaxed)
}
