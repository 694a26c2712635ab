// SPDX-License-Identifier: MIT OR Apache-2.0
//! What `dump-guest-memory` wrote: ELF cores and the kdump format, as makedumpfile flattens it or as it is on disk.

use crate::failure::{Attempt, Failure};
use std::fs;
use std::ops::Range;
use std::path::Path;

const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
/// More program headers than 16 bits can count: the first section header has the number.
const PN_XNUM: u64 = 0xffff;
const FLAT_HEADER_BYTES: usize = 4096;
const KDUMP_ZLIB: u32 = 1;

/// A piece of guest memory.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Part {
    pub gpa: u64,
    pub address: u64,
    pub bytes: u64,
    /// In `Core::bytes`.
    at: usize,
}

/// A dump in memory.
pub struct Core {
    /// All of an ELF file; the pages of a kdump, one after the other.
    pub bytes: Vec<u8>,
    /// In the file's order.
    pub parts: Vec<Part>,
    /// Bytes of the file.
    pub file_bytes: u64,
}

impl Core {
    pub fn elf(path: &Path) -> Result<Self, Failure> {
        let bytes = fs::read(path).attempt(|| format!("reading {}", path.display()))?;
        let parts = elf_parts(&bytes)?;
        Ok(Self {
            file_bytes: bytes.len() as u64,
            bytes,
            parts,
        })
    }

    /// Flattened, unless it is `raw`.
    pub fn kdump(path: &Path, raw: bool) -> Result<Self, Failure> {
        let file = fs::read(path).attempt(|| format!("reading {}", path.display()))?;
        let file_bytes = file.len() as u64;
        let disk = match raw {
            true => file,
            false => unflattened(&file)?,
        };
        let (bytes, parts) = kdump_pages(&disk)?;
        Ok(Self {
            bytes,
            parts,
            file_bytes,
        })
    }

    /// The bytes of a part, as many as the file has.
    pub fn contents(&self, part: &Part) -> &[u8] {
        &self.bytes[part.at..part.at + part.bytes as usize]
    }

    /// All memory that is in the file. In front of it are headers, and notes with the vCPUs' registers, which may hold
    /// what the guest has just written somewhere.
    pub fn memory(&self) -> &[u8] {
        let filled = self.parts.iter().filter(|part| part.bytes > 0);
        let first = filled.map(|part| part.at).min();
        &self.bytes[first.unwrap_or(self.bytes.len())..]
    }

    /// What the guest has at an address, if that is in the dump.
    pub fn at(&self, gpa: u64, bytes: u64) -> Option<&[u8]> {
        let part = self
            .parts
            .iter()
            .find(|part| part.gpa <= gpa && gpa + bytes <= part.gpa + part.bytes)?;
        let from = (gpa - part.gpa) as usize;
        Some(&self.contents(part)[from..from + bytes as usize])
    }

    /// Guest physical ranges with contents, in order; neighbours are one.
    pub fn ranges(&self) -> Vec<Range<u64>> {
        let mut all: Vec<_> = self
            .parts
            .iter()
            .filter(|part| part.bytes > 0)
            .map(|part| part.gpa..part.gpa + part.bytes)
            .collect();
        all.sort_by_key(|range| range.start);
        let mut ranges: Vec<Range<u64>> = Vec::new();
        for next in all {
            match ranges.last_mut() {
                Some(last) if next.start <= last.end => last.end = last.end.max(next.end),
                _ => ranges.push(next),
            }
        }
        ranges
    }
}

fn field<const N: usize>(bytes: &[u8], at: usize) -> Result<[u8; N], Failure> {
    bytes
        .get(at..at + N)
        .and_then(|slice| slice.try_into().ok())
        .attempt(|| format!("the dump ends before byte {at}"))
}

fn word16(bytes: &[u8], at: usize) -> Result<u64, Failure> {
    field(bytes, at).map(|bytes| u16::from_le_bytes(bytes).into())
}

fn word32(bytes: &[u8], at: usize) -> Result<u32, Failure> {
    field(bytes, at).map(u32::from_le_bytes)
}

fn word64(bytes: &[u8], at: usize) -> Result<u64, Failure> {
    field(bytes, at).map(u64::from_le_bytes)
}

/// The loads of a 64-bit ELF core. Every byte behind the headers belongs to what a header names.
fn elf_parts(bytes: &[u8]) -> Result<Vec<Part>, Failure> {
    if bytes.get(..5) != Some(b"\x7fELF\x02") {
        return Err(Failure::new("the dump is no 64-bit ELF file"));
    }
    let headers = word64(bytes, 0x20)? as usize;
    let sections = word64(bytes, 0x28)? as usize;
    let mut count = word16(bytes, 0x38)?;
    if count == PN_XNUM {
        count = word32(bytes, sections + 0x2c)?.into();
    }
    let mut parts = Vec::new();
    let mut notes = 0;
    for index in 0..count as usize {
        let header = headers + index * 56;
        match word32(bytes, header)? {
            PT_LOAD => {}
            PT_NOTE => {
                notes += 1;
                continue;
            }
            kind => {
                return Err(Failure::new(format!(
                    "program header {index} is of kind {kind:#x}"
                )))
            }
        }
        let file = word64(bytes, header + 0x20)?;
        let at = match file {
            // Device memory, which has an address and no contents.
            0 => 0,
            _ => word64(bytes, header + 8)? as usize,
        };
        if at + file as usize > bytes.len() {
            return Err(Failure::new(format!(
                "program header {index} is about {file:#x} bytes at {at:#x} of a file with {:#x}",
                bytes.len()
            )));
        }
        parts.push(Part {
            gpa: word64(bytes, header + 0x18)?,
            address: word64(bytes, header + 0x10)?,
            bytes: file,
            at,
        });
    }
    match notes {
        1 => Ok(parts),
        _ => Err(Failure::new(format!(
            "the dump has {notes} headers of notes"
        ))),
    }
}

/// Puts the records of a flattened file where they belong.
fn unflattened(file: &[u8]) -> Result<Vec<u8>, Failure> {
    if file.get(..12) != Some(b"makedumpfile") {
        return Err(Failure::new("the dump is no flattened file"));
    }
    let number = |at| field(file, at).map(i64::from_be_bytes);
    let mut disk = Vec::new();
    let mut at = FLAT_HEADER_BYTES;
    loop {
        let (offset, bytes) = (number(at)?, number(at + 8)?);
        if (offset, bytes) == (-1, -1) {
            break;
        }
        let (offset, bytes) = (offset as usize, bytes as usize);
        let record = file
            .get(at + 16..at + 16 + bytes)
            .attempt(|| "a record of the flattened file is cut off".into())?;
        if disk.len() < offset + bytes {
            disk.resize(offset + bytes, 0);
        }
        disk[offset..offset + bytes].copy_from_slice(record);
        at += 16 + bytes;
    }
    match at + 16 == file.len() {
        true => Ok(disk),
        false => Err(Failure::new(
            "something follows the end of the flattened file",
        )),
    }
}

/// The pages of a kdump, and where each is.
fn kdump_pages(disk: &[u8]) -> Result<(Vec<u8>, Vec<Part>), Failure> {
    if disk.get(..8) != Some(b"KDUMP   ") {
        return Err(Failure::new("the dump is no kdump"));
    }
    // Behind the signature, the version, six names of 65 bytes and 22 bytes of time.
    const STATUS: usize = 8 + 4 + 6 * 65 + 22;
    let block = word32(disk, STATUS + 4)? as usize;
    let sub_header = word32(disk, STATUS + 8)? as usize;
    let bitmaps = word32(disk, STATUS + 12)? as usize;
    let bitmap = (1 + sub_header) * block;
    let descriptors = bitmap + bitmaps * block;
    let bits = disk
        .get(bitmap..bitmap + bitmaps * block / 2)
        .attempt(|| "the dump has no bitmap".into())?;
    let present = (0..bits.len() * 8).filter(|pfn| bits[pfn / 8] >> (pfn % 8) & 1 == 1);

    let (mut bytes, mut parts) = (Vec::new(), Vec::new());
    for (index, pfn) in present.enumerate() {
        let descriptor = descriptors + index * 24;
        let from = word64(disk, descriptor)? as usize;
        let size = word32(disk, descriptor + 8)? as usize;
        let flags = word32(disk, descriptor + 12)?;
        let data = disk
            .get(from..from + size)
            .attempt(|| format!("the dump does not have the page {pfn:#x}"))?;
        let at = bytes.len();
        match flags {
            0 => bytes.extend_from_slice(data),
            KDUMP_ZLIB => bytes.extend(
                miniz_oxide::inflate::decompress_to_vec_zlib(data)
                    .attempt(|| format!("page {pfn:#x} of the dump"))?,
            ),
            _ => return Err(Failure::new(format!("page {pfn:#x} has flags {flags:#x}"))),
        }
        if bytes.len() - at != block {
            return Err(Failure::new(format!(
                "page {pfn:#x} of the dump has {} bytes",
                bytes.len() - at
            )));
        }
        let gpa = (pfn * block) as u64;
        parts.push(Part {
            gpa,
            address: gpa,
            bytes: block as u64,
            at,
        });
    }
    Ok((bytes, parts))
}

#[cfg(test)]
mod tests {
    use super::{elf_parts, kdump_pages, unflattened, Core};

    fn put(bytes: &mut Vec<u8>, at: usize, value: &[u8]) {
        if bytes.len() < at + value.len() {
            bytes.resize(at + value.len(), 0);
        }
        bytes[at..at + value.len()].copy_from_slice(value);
    }

    fn elf() -> Vec<u8> {
        let mut bytes = b"\x7fELF\x02".to_vec();
        put(&mut bytes, 0x20, &64u64.to_le_bytes());
        put(&mut bytes, 0x38, &3u16.to_le_bytes());
        for (index, words) in [
            [4, 0, 0, 0, 0],
            [1, 0x1f0, 0, 0x3000, 8],
            [1, u64::MAX, 0, 0xa0000, 0],
        ]
        .iter()
        .enumerate()
        {
            for (word, value) in words.iter().enumerate() {
                put(&mut bytes, 64 + index * 56 + word * 8, &value.to_le_bytes());
            }
        }
        put(&mut bytes, 0x1f0, b"contents");
        bytes
    }

    #[test]
    fn the_loads_of_a_core_are_found() {
        let bytes = elf();
        let parts = elf_parts(&bytes).unwrap();
        assert_eq!(parts.len(), 2);
        let core = Core {
            file_bytes: 0,
            bytes,
            parts,
        };
        assert_eq!(core.at(0x3000, 8).unwrap(), b"contents");
        assert_eq!(core.at(0x3004, 8), None);
        assert_eq!(core.memory(), b"contents");
        assert_eq!(core.ranges().len(), 1);
        assert_eq!(core.ranges()[0], 0x3000..0x3008);
    }

    #[test]
    fn a_core_that_is_cut_off_is_refused() {
        let mut bytes = elf();
        bytes.truncate(0x1f4);
        assert!(elf_parts(&bytes).is_err());
        assert!(elf_parts(b"\x7fELF\x01").is_err());
    }

    /// Pages 1 and 3 of 16 bytes each: one plain, one compressed.
    fn kdump() -> Vec<u8> {
        let block = 512;
        let mut disk = b"KDUMP   ".to_vec();
        for (index, value) in [0u32, block, 1, 2].iter().enumerate() {
            put(&mut disk, 424 + index * 4, &value.to_le_bytes());
        }
        let block = block as usize;
        put(&mut disk, 2 * block, &[0b1010]);
        let packed = miniz_oxide::deflate::compress_to_vec_zlib(&[7; 512], 6);
        let data = 4 * block + 48;
        for (index, (at, size, flags)) in [(data, block, 0u32), (data + block, packed.len(), 1)]
            .into_iter()
            .enumerate()
        {
            let at_descriptor = 4 * block + index * 24;
            put(&mut disk, at_descriptor, &(at as u64).to_le_bytes());
            put(&mut disk, at_descriptor + 8, &(size as u32).to_le_bytes());
            put(&mut disk, at_descriptor + 12, &flags.to_le_bytes());
            put(&mut disk, at_descriptor + 16, &[0; 8]);
        }
        put(&mut disk, data, &[5; 512]);
        put(&mut disk, data + block, &packed);
        disk
    }

    #[test]
    fn the_pages_of_a_kdump_are_found() {
        let (bytes, parts) = kdump_pages(&kdump()).unwrap();
        let at: Vec<_> = parts.iter().map(|part| part.gpa).collect();
        assert_eq!(at, [512, 3 * 512]);
        assert_eq!(bytes[..512], [5; 512]);
        assert_eq!(bytes[512..], [7; 512]);
    }

    #[test]
    fn records_go_where_they_belong() {
        let mut file = b"makedumpfile".to_vec();
        file.resize(4096, 0);
        for (offset, text) in [(4i64, "last"), (0, "1st ")] {
            file.extend(offset.to_be_bytes());
            file.extend(4i64.to_be_bytes());
            file.extend(text.as_bytes());
        }
        assert!(unflattened(&file).is_err());
        file.extend([0xff; 16]);
        assert_eq!(unflattened(&file).unwrap(), b"1st last");
    }
}
