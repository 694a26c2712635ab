// SPDX-License-Identifier: MIT OR Apache-2.0
//! A CD-ROM at the second channel of a PIIX IDE controller: a read by DMA that is begun and looked at later.

use crate::pci::Function;
use crate::platform::wait_until;
use crate::port::{in8, out16, out32, out8};
use core::ptr::addr_of_mut;

const VENDOR: u16 = 0x8086;
/// PIIX3's and PIIX4's IDE function.
const DEVICES: [u16; 2] = [0x7010, 0x7111];
/// The base address register of the bus master's ports; the second channel's come after those of the first.
const BAR4: u32 = 0x20;
const SECOND: u16 = 8;
const DATA: u16 = 0x170;
const FEATURES: u16 = 0x171;
const DEVICE: u16 = 0x176;
const COMMAND: u16 = 0x177;
const CONTROL: u16 = 0x376;
const BUSY: u8 = 0x80;
const DATA_REQUEST: u8 = 0x08;
const ERROR: u8 = 0x01;
const NO_INTERRUPT: u8 = 0x02;
const BY_DMA: u8 = 0x01;
const PACKET: u8 = 0xa0;
const READ_10: u8 = 0x28;
/// Bus master: command, and status with bits that are cleared by writing them.
const START_TO_MEMORY: u8 = 0x09;
const TO_MEMORY: u8 = 0x08;
const STATUS_CLEAR: u8 = 0x06;
const STATUS_ACTIVE: u8 = 0x01;
const SECTOR_BYTES: u64 = 2048;
const PIECE_BYTES: u64 = 64 << 10;
const PIECES: usize = 64;
const LAST_PIECE: u32 = 1 << 31;
const PATIENCE_MILLISECONDS: u64 = 60_000;

#[repr(C, align(4096))]
struct Table([[u32; 2]; PIECES]);
static mut TABLE: Table = Table([[0; 2]; PIECES]);

fn bus_master() -> Result<u16, &'static str> {
    let function = DEVICES
        .into_iter()
        .find_map(|device| Function::find(VENDOR, device))
        .ok_or("there is no PIIX IDE controller")?;
    function.enable();
    match function.read(BAR4) & 0xfffc {
        0 => Err("the IDE controller has no ports for DMA"),
        base => Ok(base as u16 + SECOND),
    }
}

/// Begins to read the first `bytes` of the disc into memory.
pub fn begin(address: u64, bytes: u64) -> Result<(), &'static str> {
    let pieces = bytes.div_ceil(PIECE_BYTES) as usize;
    if !(1..=PIECES).contains(&pieces) || (address | bytes) & (PIECE_BYTES - 1) != 0 {
        return Err("the CD-ROM reads from 1 to 64 times 64 KiB, to a multiple of that");
    }
    let bus_master = bus_master()?;
    let table = addr_of_mut!(TABLE);
    for piece in 0..pieces {
        let at = address as u32 + (piece as u64 * PIECE_BYTES) as u32;
        // A size of 0 means 64 KiB.
        let last = if piece + 1 == pieces { LAST_PIECE } else { 0 };
        // SAFETY: in bounds, and nothing is in flight that reads it.
        unsafe { (*table).0[piece] = [at, last] };
    }
    out8(DEVICE, 0xa0);
    out8(CONTROL, NO_INTERRUPT);
    wait_for(0)?;
    out8(FEATURES, BY_DMA);
    out8(COMMAND, PACKET);
    wait_for(DATA_REQUEST)?;
    out8(bus_master, TO_MEMORY);
    out8(bus_master + 2, STATUS_CLEAR);
    out32(bus_master + 4, table as u64 as u32);
    let sectors = (bytes / SECTOR_BYTES) as u16;
    let mut packet = [0; 12];
    packet[0] = READ_10;
    packet[7..9].copy_from_slice(&sectors.to_be_bytes());
    for word in packet.chunks_exact(2) {
        out16(DATA, u16::from_le_bytes([word[0], word[1]]));
    }
    out8(bus_master, START_TO_MEMORY);
    Ok(())
}

/// Waits for what was begun; whether it ended.
pub fn ends_within(milliseconds: u64) -> Result<bool, &'static str> {
    let bus_master = bus_master()?;
    let ended = wait_until(milliseconds, || {
        in8(bus_master + 2) & STATUS_ACTIVE == 0 && in8(COMMAND) & BUSY == 0
    });
    match ended && in8(COMMAND) & ERROR != 0 {
        true => Err("the CD-ROM reports an error"),
        false => Ok(ended),
    }
}

fn wait_for(wanted: u8) -> Result<(), &'static str> {
    let ready = wait_until(PATIENCE_MILLISECONDS, || {
        let status = in8(COMMAND);
        status & BUSY == 0 && status & wanted == wanted
    });
    match ready {
        true => Ok(()),
        false => Err("the CD-ROM does not answer"),
    }
}
