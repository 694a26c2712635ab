// SPDX-License-Identifier: MIT OR Apache-2.0
//! A guest of some hundred bytes that is its own firmware: it writes and reads memory when it is told to, by COM1.
//!
//! It needs no firmware, no device and only instructions of the 386, so it runs wherever there is any KVM at all, and what it
//! does is all that is timed.

use crate::failure::{Attempt, Failure};
use crate::lines::Lines;
use crate::machine::Machine;
use crate::place;
use serde_json::json;
use std::arch::global_asm;
use std::fs;
use std::path::Path;
use std::time::Duration;

/// What of its memory it writes and reads: a word in every 64 bytes.
pub const START: u64 = 1 << 20;
pub const END: u64 = 65 << 20;
pub const RAM_BYTES: u64 = 128 << 20;
const PATIENCE: Duration = Duration::from_secs(180);
/// Of the image, which ends at 4 GiB.
const ROM_BYTES: usize = 64 << 10;
const RESET: usize = 0xfff0;

global_asm!(
    r#"
    .section .rodata.small_guest, "a", @progbits
    .global small_guest_start
    .global small_guest_end
    .code16
small_guest_start:
    cli
    .byte 0x2e, 0x66, 0x0f, 0x01, 0x16          // lgdt cs:[…], 32 bits of base
    .word 3f - small_guest_start
    mov eax, cr0
    or al, 1
    mov cr0, eax
    .byte 0x66, 0xea                            // a far jump to 32-bit code
    .long 0xffff0000 + 4f - small_guest_start
    .word 8
    .balign 8
2:  .quad 0
    .quad 0x00cf9b000000ffff
    .quad 0x00cf93000000ffff
3:  .word 23
    .long 0xffff0000 + 2b - small_guest_start
    .code32
4:  mov eax, 16
    mov ds, eax
    mov es, eax
    mov ss, eax
    xor ebx, ebx
    mov cl, 82                                  // R: ready
5:  mov dx, 0x3fd                               // says the letter and a newline
6:  in al, dx
    test al, 0x20
    jz 6b
    mov dx, 0x3f8
    mov al, cl
    out dx, al
    mov al, 10
    out dx, al
7:  mov dx, 0x3fd
    in al, dx
    test al, 1
    jz 7b
    mov dx, 0x3f8
    in al, dx
    cmp al, 119                                 // w
    je 8f
    cmp al, 114                                 // r
    jne 7b
    mov edi, {start}
9:  mov eax, edi
    xor eax, ebx
    mov cl, 88                                  // X: not what was written
    cmp dword ptr [edi], eax
    jne 5b
    add edi, 64
    cmp edi, {end}
    jb 9b
    mov cl, 75                                  // K: as it was written
    jmp 5b
8:  add ebx, 0x01010101
    mov edi, {start}
9:  mov eax, edi
    xor eax, ebx
    mov dword ptr [edi], eax
    add edi, 64
    cmp edi, {end}
    jb 9b
    mov cl, 87                                  // W: written
    jmp 5b
    .code64
small_guest_end:
    .text
"#,
    start = const START,
    end = const END,
);

extern "C" {
    static small_guest_start: u8;
    static small_guest_end: u8;
}

/// The image that ends at 4 GiB: the code at its beginning, and the jump there where a processor starts.
fn rom() -> Vec<u8> {
    // SAFETY: the assembler's own labels, the second behind the first, in memory that never changes.
    let code = unsafe {
        let (start, end) = (&raw const small_guest_start, &raw const small_guest_end);
        std::slice::from_raw_parts(start, end.offset_from(start) as usize)
    };
    let mut rom = vec![0xf4; ROM_BYTES];
    rom[..code.len()].copy_from_slice(code);
    // jmp, relative to the next instruction, wrapping around to the beginning.
    rom[RESET..RESET + 3].copy_from_slice(&[0xe9, 0x0d, 0x00]);
    rom
}

/// One under way.
pub struct SmallGuest {
    pub machine: Machine,
    serial: Lines,
}

impl SmallGuest {
    /// Its memory is `backend`, an object without id and size, which become `ram0` and [`RAM_BYTES`].
    pub fn start(directory: &Path, backend: &str, more: &[&str]) -> Result<Self, Failure> {
        fs::create_dir_all(directory).attempt(|| format!("creating {}", directory.display()))?;
        let path = directory.join("guest.rom");
        fs::write(&path, rom()).attempt(|| format!("writing {}", path.display()))?;
        let path = path.to_string_lossy();
        let object = format!("{backend},id=ram0,size={RAM_BYTES}");
        let size = format!("{}M", RAM_BYTES >> 20);
        let mut arguments = vec!["-object", &object, "-m", &size, "-bios", &path];
        arguments.extend(more);
        let (machine, serial) = Machine::start(directory, &arguments)?;
        let guest = Self { machine, serial };
        guest.is_ready()?;
        Ok(guest)
    }

    /// Waits for its first word, which it says after each reset.
    pub fn is_ready(&self) -> Result<(), Failure> {
        self.says("R", "the small guest's first word")
    }

    /// It writes all of its memory, something else each time.
    pub fn write(&mut self) -> Result<(), Failure> {
        self.serial.send("w")?;
        self.says("W", "the small guest to write its memory")
    }

    /// It finds what it wrote.
    pub fn read(&mut self) -> Result<(), Failure> {
        self.serial.send("r")?;
        self.says("K", "the small guest to find what it wrote")
    }

    pub fn end(mut self) -> Result<(), Failure> {
        self.machine.qmp.execute("quit", json!({}))?;
        self.machine.wait_for_exit(place::patience(PATIENCE))
    }

    fn says(&self, word: &str, what: &str) -> Result<(), Failure> {
        let said = self.serial.find(place::patience(PATIENCE), what, |line| {
            Some(line.to_string())
        })?;
        match said == word {
            true => Ok(()),
            false => Err(Failure::new(format!(
                "waiting for {what}: it says {said:?} and not {word:?}"
            ))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{rom, RESET};

    #[test]
    fn the_processors_first_instruction_leads_to_the_code() {
        let rom = rom();
        let jump = i16::from_le_bytes([rom[RESET + 1], rom[RESET + 2]]);
        let target = (RESET as u16 + 3).wrapping_add(jump as u16);
        assert_eq!((rom[RESET], target), (0xe9, 0));
        assert_eq!(rom[0], 0xfa, "cli");
        let length = rom
            .iter()
            .rposition(|byte| ![0xf4, 0xe9, 0x0d, 0].contains(byte));
        assert!(length.is_some_and(|length| length < 512), "{length:?}");
    }
}
