// SPDX-License-Identifier: MIT OR Apache-2.0
//! Which build of a program a file is: the linker's hash of it, a note in the ELF file.

use crate::failure::{Attempt, Failure};
use std::fs;
use std::path::Path;

const PT_NOTE: u32 = 4;
const NT_GNU_BUILD_ID: u32 = 3;

/// The build id of a program, in hex.
pub fn build_id(path: &Path) -> Result<String, Failure> {
    let bytes = fs::read(path).attempt(|| format!("reading {}", path.display()))?;
    let id = find(&bytes).attempt(|| format!("{} has no build id", path.display()))?;
    Ok(id.iter().map(|byte| format!("{byte:02x}")).collect())
}

fn find(elf: &[u8]) -> Option<&[u8]> {
    if !elf.starts_with(b"\x7fELF") {
        return None;
    }
    let table = number(elf, 0x20, 8)?;
    let entry_bytes = number(elf, 0x36, 2)?;
    (0..number(elf, 0x38, 2)?).find_map(|index| {
        let entry = table.checked_add(index * entry_bytes)?;
        if number(elf, entry, 4)? != PT_NOTE as usize {
            return None;
        }
        let start = number(elf, entry + 8, 8)?;
        let end = start.checked_add(number(elf, entry + 0x20, 8)?)?;
        build_id_note(elf.get(start..end)?)
    })
}

/// Notes: the lengths of name and contents, a type, both padded to four bytes.
fn build_id_note(mut notes: &[u8]) -> Option<&[u8]> {
    loop {
        let (name, contents) = (number(notes, 0, 4)?, number(notes, 4, 4)?);
        let kind = number(notes, 8, 4)?;
        let start = 12 + name.next_multiple_of(4);
        let found = notes.get(start..start.checked_add(contents)?)?;
        if kind == NT_GNU_BUILD_ID as usize && notes.get(12..12 + name)? == b"GNU\0" {
            return Some(found);
        }
        notes = notes.get(start + contents.next_multiple_of(4)..)?;
    }
}

/// A little-endian number of that many bytes.
fn number(bytes: &[u8], at: usize, size: usize) -> Option<usize> {
    let field = bytes.get(at..at.checked_add(size)?)?;
    let mut word = [0; 8];
    word[..size].copy_from_slice(field);
    usize::try_from(u64::from_le_bytes(word)).ok()
}

#[cfg(test)]
mod tests {
    use super::{build_id_note, find};

    fn note(name: &[u8], kind: u32, contents: &[u8]) -> Vec<u8> {
        let mut note = Vec::new();
        for word in [name.len() as u32, contents.len() as u32, kind] {
            note.extend(word.to_le_bytes());
        }
        for part in [name, contents] {
            note.extend(part);
            note.resize(note.len().next_multiple_of(4), 0);
        }
        note
    }

    #[test]
    fn the_build_id_is_found_among_other_notes() {
        let mut notes = note(b"GNU\0", 5, &[1, 2, 3]);
        notes.extend(note(b"Other\0", 3, &[9]));
        assert_eq!(build_id_note(&notes), None);
        notes.extend(note(b"GNU\0", 3, &[0xab, 0xcd]));
        assert_eq!(build_id_note(&notes), Some(&[0xab, 0xcd][..]));
    }

    #[test]
    fn what_is_no_program_has_none() {
        assert_eq!(find(b""), None);
        let mut cut_off = b"\x7fELF".to_vec();
        cut_off.resize(64, 0xff);
        assert_eq!(find(&cut_off), None);
    }
}
