// SPDX-License-Identifier: MIT OR Apache-2.0
//! Lays out the firmware images of the lab's SNP and TDX guests: the payload, the code of `tests/lab/tee-firmware`, and the tables
//! by which QEMU knows what to add to a guest at its launch.
//!
//! ```text
//!  4 GiB - image   the payload, as it lies in memory
//!  4 GiB - 64 KiB  code; its header says where it begins, and is told where the payload is
//!       …          SNP: "ASEV", pages to launch.  TDX: "TDVF", sections to launch
//!  4 GiB - …       OVMF's table, read from its end: data, length, GUID of each entry
//!  4 GiB - 32      its end
//!  4 GiB - 16      where processors begin: a jump, by 16 bits or by 32
//! ```
//!
//! What QEMU reads is in its hw/i386/pc_sysfw_ovmf.c, target/i386/sev.c and hw/i386/tdvf.c.

use anyhow::{bail, ensure, Context, Result};
use handover::{SNP_HASHES_BYTES, SNP_HASHES_OFFSET, SNP_HASHES_PAGE, SNP_PAGES, TDX_PAGES};
use std::path::Path;

// The firmware takes the rest of it.
#[allow(dead_code)]
#[path = "../payload/src/handover.rs"]
mod handover;

const TOP: u64 = 1 << 32;
const BLOCK: usize = 64 << 10;

/// In the code's header, from its begin: how it is known; where the payload is, by four words; a command line.
const MAGIC: &[u8; 8] = b"gmem-tee";
const REAL_MODE: usize = 8;
const FLAT: usize = 12;
const PAYLOAD: usize = 16;
const COMMAND_LINE: usize = 32;

/// From the image's end.
const TABLE_END: usize = 32;
const RESET_VECTOR: usize = 16;

const TABLE_FOOTER: Guid = Guid(0x96b5_82de, 0x1fb2, 0x45f7, 0xbaea_a366_c55a_082d);
const SEV_METADATA_OFFSET: Guid = Guid(0xdc88_6566, 0x984a, 0x4798, 0xa75e_5585_a7bf_67cc);
const SEV_ES_RESET_BLOCK: Guid = Guid(0x00f7_71de, 0x1a7e, 0x4fcb, 0x890e_68c7_7e2f_b44e);
const SEV_HASH_TABLE: Guid = Guid(0x7255_371f, 0x3a3b, 0x4b04, 0x927b_1da6_efa8_d454);
const TDX_METADATA_OFFSET: Guid = Guid(0xe47a_6535, 0x984a, 0x4798, 0x865e_4685_a7bf_8ec2);

/// Type and attribute of the section that is the image itself (TDVF design guide).
const TDVF_FIRMWARE: u32 = 0;
const TDVF_MEASURED: u32 = 1;

/// Whose guest an image is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Snp,
    Tdx,
}

impl Kind {
    pub const ALL: [Kind; 2] = [Kind::Snp, Kind::Tdx];

    /// What the image is called.
    pub fn file(self) -> &'static str {
        match self {
            Kind::Snp => "snp.fd",
            Kind::Tdx => "tdx.fd",
        }
    }

    /// What the payload is told: how it asks for conversions, that no interrupt comes for COM1, and how other processors start.
    fn command_line(self) -> &'static str {
        match self {
            Kind::Snp => "port-call",
            Kind::Tdx => "port-call poll mailbox",
        }
    }
}

/// An image of the firmware and the payload in these files.
pub fn image(kind: Kind, firmware: &Path, payload: &Path) -> Result<Vec<u8>> {
    let read = |path: &Path| {
        let bytes =
            std::fs::read(path).with_context(|| format!("can't read {}", path.display()))?;
        Program::of(&bytes)
            .with_context(|| format!("{} is no program as it should be", path.display()))
    };
    lay_out(kind, &read(firmware)?, &read(payload)?)
}

fn lay_out(kind: Kind, code: &Program, payload: &Program) -> Result<Vec<u8>> {
    let end = payload.address + payload.bytes.len() as u64;
    ensure!(
        payload.address == u64::from(handover::SHARED_BEGIN) && end <= u64::from(handover::TABLES),
        "the payload is not in the range that the firmware shares"
    );
    let mut payload_bytes = payload.bytes.clone();
    payload_bytes.resize(payload_bytes.len().next_multiple_of(4), 0);

    let mut block = code.bytes.clone();
    ensure!(
        code.address == TOP - BLOCK as u64 && block.get(..MAGIC.len()) == Some(MAGIC),
        "the firmware's code does not begin with its header"
    );
    let size = (payload_bytes.len() + BLOCK).next_multiple_of(BLOCK);
    let start = (TOP - size as u64) as u32;
    let payload_place = [
        start,
        payload.address as u32,
        (payload_bytes.len() / 4) as u32,
        payload.entry as u32,
    ];
    put(&mut block, PAYLOAD, &words(&payload_place))?;
    let command_line = kind.command_line().as_bytes();
    ensure!(
        command_line.len() < handover::COMMAND_LINE_BYTES as usize,
        "the command line is too long"
    );
    put(&mut block, COMMAND_LINE, command_line)?;
    let real_mode = word(&block, REAL_MODE)?;
    let flat = word(&block, FLAT)?;

    let metadata_at = block.len().next_multiple_of(16);
    block.resize(metadata_at, 0);
    let metadata_offset = (BLOCK - metadata_at) as u32;
    let table = match kind {
        Kind::Snp => {
            block.extend(sev_metadata());
            Table::new()
                .entry(SEV_ES_RESET_BLOCK, &[real_mode])
                .entry(
                    SEV_HASH_TABLE,
                    &[SNP_HASHES_PAGE + SNP_HASHES_OFFSET, SNP_HASHES_BYTES],
                )
                .entry(SEV_METADATA_OFFSET, &[metadata_offset])
                .finish()
        }
        Kind::Tdx => {
            block.extend(tdx_metadata(size as u32, start));
            Table::new()
                .entry(TDX_METADATA_OFFSET, &[metadata_offset])
                .finish()
        }
    };
    let table_at = BLOCK - TABLE_END - table.len();
    ensure!(
        block.len() <= table_at,
        "code and tables need more than {BLOCK} bytes"
    );
    block.resize(BLOCK, 0);
    put(&mut block, table_at, &table)?;
    let jump = match kind {
        Kind::Snp => jump_of_16_bits(real_mode),
        Kind::Tdx => jump_of_32_bits(flat),
    };
    put(&mut block, BLOCK - RESET_VECTOR, &jump)?;

    payload_bytes.resize(size - BLOCK, 0);
    payload_bytes.extend(block);
    Ok(payload_bytes)
}

/// "ASEV": its length, version 1, how many entries; of each address, bytes, kind.
fn sev_metadata() -> Vec<u8> {
    let entries: Vec<u32> = SNP_PAGES
        .iter()
        .flat_map(|&(address, bytes, kind)| [address, bytes, kind])
        .collect();
    metadata(b"ASEV", SNP_PAGES.len(), &entries)
}

/// "TDVF": the same; of each section where it is in the image, address and bytes in memory, type and attributes. The first is the
/// image itself.
fn tdx_metadata(size: u32, start: u32) -> Vec<u8> {
    let mut entries = vec![0, size, start, 0, size, 0, TDVF_FIRMWARE, TDVF_MEASURED];
    for &(address, bytes, kind) in TDX_PAGES {
        entries.extend([0, 0, address, 0, bytes, 0, kind, 0]);
    }
    metadata(b"TDVF", TDX_PAGES.len() + 1, &entries)
}

fn metadata(signature: &[u8; 4], count: usize, entries: &[u32]) -> Vec<u8> {
    const VERSION: u32 = 1;
    let length = 16 + 4 * entries.len() as u32;
    let mut bytes = signature.to_vec();
    bytes.extend(words(&[length, VERSION, count as u32]));
    bytes.extend(words(entries));
    bytes
}

/// OVMF's table: entries, each behind its data, and as the last one the length of all.
struct Table(Vec<u8>);

impl Table {
    const ENTRY_BYTES: usize = 18;

    fn new() -> Self {
        Table(Vec::new())
    }

    fn entry(mut self, guid: Guid, data: &[u32]) -> Self {
        let data = words(data);
        self.0.extend(&data);
        self.close(guid, data.len() + Self::ENTRY_BYTES)
    }

    fn close(mut self, guid: Guid, length: usize) -> Self {
        self.0.extend((length as u16).to_le_bytes());
        self.0.extend(guid.bytes());
        self
    }

    fn finish(self) -> Vec<u8> {
        let length = self.0.len() + Self::ENTRY_BYTES;
        self.close(TABLE_FOOTER, length).0
    }
}

/// The first three parts are numbers, and little-endian; the rest are bytes.
struct Guid(u32, u16, u16, u64);

impl Guid {
    fn bytes(&self) -> Vec<u8> {
        let mut bytes = self.0.to_le_bytes().to_vec();
        bytes.extend(self.1.to_le_bytes());
        bytes.extend(self.2.to_le_bytes());
        bytes.extend(self.3.to_be_bytes());
        bytes
    }
}

/// What a processor finds at the reset vector to get to an address in the same 64 KiB.
fn jump_of_16_bits(to: u32) -> Vec<u8> {
    let from = RESET_VECTOR.wrapping_neg() as u16;
    let mut bytes = vec![0xe9];
    bytes.extend((to as u16).wrapping_sub(from).wrapping_sub(3).to_le_bytes());
    bytes
}

fn jump_of_32_bits(to: u32) -> Vec<u8> {
    let from = RESET_VECTOR.wrapping_neg() as u32;
    let mut bytes = vec![0xe9];
    bytes.extend(to.wrapping_sub(from).wrapping_sub(5).to_le_bytes());
    bytes
}

fn words(values: &[u32]) -> Vec<u8> {
    values
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect()
}

fn word(bytes: &[u8], at: usize) -> Result<u32> {
    let word = bytes.get(at..at + 4).context("it is too short")?;
    Ok(u32::from_le_bytes(word.try_into()?))
}

fn put(to: &mut [u8], at: usize, bytes: &[u8]) -> Result<()> {
    to.get_mut(at..at + bytes.len())
        .context("it is too short")?
        .copy_from_slice(bytes);
    Ok(())
}

/// What an ELF file has loaded, without the zeros at its end.
struct Program {
    address: u64,
    entry: u64,
    bytes: Vec<u8>,
}

impl Program {
    fn of(elf: &[u8]) -> Result<Self> {
        const LOAD: u64 = 1;
        let number = |at: usize, bytes: usize| -> Result<u64> {
            let field = elf.get(at..at + bytes).context("it ends too early")?;
            Ok(field
                .iter()
                .rev()
                .fold(0, |sum, byte| sum << 8 | u64::from(*byte)))
        };
        if elf.get(..5) != Some(b"\x7fELF\x02") {
            bail!("it is not ELF of 64 bits");
        }
        let (headers, size, count) = (number(32, 8)?, number(54, 2)?, number(56, 2)?);
        let mut program: Option<Program> = None;
        for index in 0..count {
            let header = (headers + index * size) as usize;
            if number(header, 4)? != LOAD {
                continue;
            }
            let (offset, address, length) = (
                number(header + 8, 8)? as usize,
                number(header + 24, 8)?,
                number(header + 32, 8)? as usize,
            );
            let bytes = elf
                .get(offset..offset + length)
                .context("it ends too early")?;
            let program = program.get_or_insert(Program {
                address,
                entry: number(24, 8)?,
                bytes: Vec::new(),
            });
            let at = address
                .checked_sub(program.address)
                .filter(|at| *at < BLOCK as u64 * 32 && *at >= program.bytes.len() as u64)
                .context("its segments are not in order")?;
            program.bytes.resize(at as usize, 0);
            program.bytes.extend(bytes);
        }
        program.context("it loads nothing")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CODE_BYTES: usize = 0x201;
    const REAL_MODE_AT: u32 = 0xffff_0084;
    const FLAT_AT: u32 = 0xffff_00a7;

    fn code() -> Program {
        let mut bytes = vec![0x90; CODE_BYTES];
        put(&mut bytes, 0, MAGIC).unwrap();
        put(&mut bytes, REAL_MODE, &words(&[REAL_MODE_AT, FLAT_AT])).unwrap();
        put(&mut bytes, COMMAND_LINE, &[0; 64]).unwrap();
        Program {
            address: 0xffff_0000,
            entry: 0xffff_0000,
            bytes,
        }
    }

    fn payload(length: usize) -> Program {
        Program {
            address: 2 << 20,
            entry: 0x20_0020,
            bytes: vec![0x55; length],
        }
    }

    fn laid_out(kind: Kind) -> Vec<u8> {
        lay_out(kind, &code(), &payload(70_001)).unwrap()
    }

    /// As QEMU finds it: from the table's end backwards.
    fn found(image: &[u8], guid: Guid) -> Option<Vec<u8>> {
        let entry = |end: usize| {
            let length = u16::from_le_bytes(image[end - 18..end - 16].try_into().unwrap());
            (image[end - 16..end].to_vec(), usize::from(length))
        };
        let footer_end = image.len() - 32;
        let (footer, total) = entry(footer_end);
        assert_eq!(footer, TABLE_FOOTER.bytes());
        let mut end = footer_end - 18;
        while end > footer_end - total {
            let (id, length) = entry(end);
            if id == guid.bytes() {
                return Some(image[end - length..end - 18].to_vec());
            }
            end -= length;
        }
        assert_eq!(end, footer_end - total);
        None
    }

    fn metadata_of(image: &[u8], guid: Guid) -> Vec<u32> {
        let offset = word(&found(image, guid).unwrap(), 0).unwrap() as usize;
        let at = image.len() - offset;
        let length = word(image, at + 4).unwrap() as usize;
        image[at..at + length]
            .chunks(4)
            .map(|word| u32::from_le_bytes(word.try_into().unwrap()))
            .collect()
    }

    #[test]
    fn a_guid_is_as_it_is_in_memory() {
        let text = [
            0xde, 0x82, 0xb5, 0x96, 0xb2, 0x1f, 0xf7, 0x45, 0xba, 0xea, 0xa3, 0x66, 0xc5, 0x5a,
            0x08, 0x2d,
        ];
        assert_eq!(TABLE_FOOTER.bytes(), text);
    }

    #[test]
    fn an_image_is_whole_blocks_with_the_payload_in_front() {
        for kind in Kind::ALL {
            let image = laid_out(kind);
            assert_eq!(image.len(), 3 * BLOCK);
            assert!(image[..70_001].iter().all(|byte| *byte == 0x55));
            let header = image.len() - BLOCK;
            let place = [PAYLOAD, PAYLOAD + 4, PAYLOAD + 8, PAYLOAD + 12]
                .map(|at| word(&image, header + at).unwrap());
            assert_eq!(place, [0xfffd_0000, 0x20_0000, 70_004 / 4, 0x20_0020]);
            let line = kind.command_line();
            let at = header + COMMAND_LINE;
            assert_eq!(&image[at..at + line.len()], line.as_bytes());
            assert_eq!(image[at + line.len()], 0);
        }
    }

    #[test]
    fn processors_begin_with_a_jump() {
        let of = |kind| {
            let image = laid_out(kind);
            image[image.len() - RESET_VECTOR..][..5].to_vec()
        };
        // 0xfff3 and 0x91 make 0x84 in 16 bits, 0xfffffff5 and 0xffff00b2 make 0xffff00a7 in 32.
        assert_eq!(of(Kind::Snp)[..3], [0xe9, 0x91, 0x00]);
        assert_eq!(of(Kind::Tdx), [0xe9, 0xb2, 0x00, 0xff, 0xff]);
    }

    #[test]
    fn snp_finds_its_pages_and_where_processors_begin() {
        let image = laid_out(Kind::Snp);
        assert_eq!(
            found(&image, SEV_ES_RESET_BLOCK).unwrap(),
            words(&[REAL_MODE_AT])
        );
        assert_eq!(
            found(&image, SEV_HASH_TABLE).unwrap(),
            words(&[0x80_6c00, 0x400])
        );
        assert!(found(&image, TDX_METADATA_OFFSET).is_none());
        let metadata = metadata_of(&image, SEV_METADATA_OFFSET);
        assert_eq!(metadata[..4], [u32::from_le_bytes(*b"ASEV"), 76, 1, 5]);
        assert_eq!(metadata[4 + 3 * 2..][..3], [0x80_5000, 0x1000, 3]);
        assert_eq!(metadata.len(), 4 + 3 * 5);
    }

    #[test]
    fn tdx_finds_the_image_as_its_first_section() {
        let image = laid_out(Kind::Tdx);
        assert!(found(&image, SEV_METADATA_OFFSET).is_none());
        let metadata = metadata_of(&image, TDX_METADATA_OFFSET);
        assert_eq!(metadata[..4], [u32::from_le_bytes(*b"TDVF"), 112, 1, 3]);
        assert_eq!(
            metadata[4..12],
            [0, 0x3_0000, 0xfffd_0000, 0, 0x3_0000, 0, 0, 1]
        );
        assert_eq!(metadata[12..20], [0, 0, 0x80_9000, 0, 0x2000, 0, 2, 0]);
        assert_eq!(metadata.len(), 4 + 8 * 3);
    }

    #[test]
    fn pages_that_a_launch_adds_are_whole_and_do_not_overlap() {
        for pages in [SNP_PAGES, TDX_PAGES] {
            for pair in pages.windows(2) {
                assert!(pair[0].0 + pair[0].1 <= pair[1].0);
            }
            assert!(pages
                .iter()
                .all(|page| (page.0 | page.1) % 4096 == 0 && page.0 >= handover::SHARED_END));
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let mut elsewhere = payload(16);
        elsewhere.address += 4096;
        assert!(lay_out(Kind::Snp, &code(), &elsewhere).is_err());
        assert!(lay_out(Kind::Snp, &code(), &payload(2 << 20)).is_err());
        let mut nameless = code();
        nameless.bytes[0] = 0;
        assert!(lay_out(Kind::Snp, &nameless, &payload(16)).is_err());
        let mut large = code();
        large.bytes.resize(BLOCK - 64, 0);
        assert!(lay_out(Kind::Tdx, &large, &payload(16)).is_err());
    }

    #[test]
    fn an_elf_file_becomes_its_segments() {
        let mut elf = b"\x7fELF\x02".to_vec();
        elf.resize(64, 0);
        put(&mut elf, 24, &0x20_0020u64.to_le_bytes()).unwrap();
        put(&mut elf, 32, &64u64.to_le_bytes()).unwrap();
        put(&mut elf, 54, &[56, 0, 2, 0]).unwrap();
        for (offset, address, bytes) in [(200u64, 0x20_0000u64, 4u64), (204, 0x20_0010, 2)] {
            let mut header = vec![0; 56];
            header[0] = 1;
            put(&mut header, 8, &offset.to_le_bytes()).unwrap();
            put(&mut header, 24, &address.to_le_bytes()).unwrap();
            put(&mut header, 32, &bytes.to_le_bytes()).unwrap();
            elf.extend(header);
        }
        elf.resize(200, 0);
        elf.extend([1, 2, 3, 4, 5, 6]);
        let program = Program::of(&elf).unwrap();
        assert_eq!((program.address, program.entry), (0x20_0000, 0x20_0020));
        assert_eq!(
            program.bytes,
            [1, 2, 3, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 5, 6]
        );
        elf.truncate(205);
        assert!(Program::of(&elf).is_err());
        assert!(Program::of(b"MZ").is_err());
    }
}
