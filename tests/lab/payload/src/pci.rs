// SPDX-License-Identifier: MIT OR Apache-2.0
//! PCI configuration through ports 0xcf8 and 0xcfc: bus 0, and slot 0 behind each of its bridges, which is where root
//! ports have their device.

use crate::boot::MAPPED_BYTES;
use crate::port::{in32, out32};

/// A function: bus, slot and function number as in configuration addresses.
#[derive(Clone, Copy, PartialEq)]
pub struct Function(u32);

/// Offset of command and status.
pub const COMMAND: u32 = 0x04;
/// The bit of status that says that there are capabilities, and the offset of the first one's.
const STATUS_CAPABILITIES: u32 = 0x10;
const CAPABILITIES: u32 = 0x34;
const MOST_CAPABILITIES: usize = 48;
/// Offset of the first base address register.
pub const BAR0: u32 = 0x10;
/// The low bits of one that is of memory, and goes on in the next.
const BAR_64_BIT: u32 = 4;
/// Command bits: decode ports, decode memory, be a bus master.
pub const COMMAND_ALL: u32 = 0x7;
/// Offset of the header's type, in the third byte.
const HEADER: u32 = 0x0c;
const HEADER_BRIDGE: u32 = 1;
/// Offsets of a bridge's bus numbers and of the memory addresses that it forwards.
const BUS_NUMBERS: u32 = 0x18;
const MEMORY_WINDOW: u32 = 0x20;
/// A megabyte below 4 GiB that is neither RAM nor anything that QEMU or the firmware puts there: for the one device on
/// bus 0 itself that the firmware did not see, plugged in since (the pc machine allows it) or because there is none.
const PLUGGED_BAR: u32 = 0xe000_0000;
/// Functions on bus 0, and those of slot 0 on any other.
const ON_ROOT_BUS: u32 = 256;
const ON_PORT: u32 = 8;

impl Function {
    /// Every slot and function number of bus 0, present or not, each bridge followed by what may be behind it.
    pub fn all() -> impl Iterator<Item = Function> {
        (0..ON_ROOT_BUS).map(Function).flat_map(|function| {
            let behind = match function.secondary_bus() {
                Some(bus) => (bus << 8)..(bus << 8) + ON_PORT,
                None => 0..0,
            };
            core::iter::once(function).chain(behind.map(Function))
        })
    }

    /// Bus, slot and function number.
    pub fn place(self) -> (u32, u32, u32) {
        (self.0 >> 8, self.0 >> 3 & 31, self.0 & 7)
    }

    /// The bus behind it, if it is a bridge to which the firmware gave one.
    fn secondary_bus(self) -> Option<u32> {
        // What is not there reads as all ones, which is no bridge.
        let bridge = self.read(HEADER) >> 16 & 0x7f == HEADER_BRIDGE;
        let bus = self.read(BUS_NUMBERS) >> 8 & 0xff;
        (bridge && bus != 0).then_some(bus)
    }

    /// The bridge in front of a function that is not on bus 0.
    fn bridge(self) -> Option<Function> {
        let bus = self.0 >> 8;
        let bridge = |function: &Function| function.secondary_bus() == Some(bus);
        (bus != 0)
            .then(|| (0..ON_ROOT_BUS).map(Function).find(bridge))
            .flatten()
    }

    /// Vendor and device id; None if nothing is there.
    pub fn ids(self) -> Option<(u16, u16)> {
        match self.read(0) {
            u32::MAX => None,
            ids => Some((ids as u16, (ids >> 16) as u16)),
        }
    }

    /// The first function on bus 0 with these ids.
    pub fn find(vendor: u16, device: u16) -> Option<Function> {
        (0..ON_ROOT_BUS)
            .map(Function)
            .find(|function| function.ids() == Some((vendor, device)))
    }

    /// The function with these ids, on any bus, that has `index` such before it.
    pub fn find_nth(vendor: u16, device: u16, index: usize) -> Option<Function> {
        Function::all()
            .filter(|function| function.ids() == Some((vendor, device)))
            .nth(index)
    }

    /// A configuration word at a multiple of 4.
    pub fn read(self, offset: u32) -> u32 {
        out32(0xcf8, 0x8000_0000 | self.0 << 8 | offset);
        in32(0xcfc)
    }

    /// Writes a configuration word at a multiple of 4.
    pub fn write(self, offset: u32, value: u32) {
        out32(0xcf8, 0x8000_0000 | self.0 << 8 | offset);
        out32(0xcfc, value);
    }

    /// Lets it decode its BARs and do DMA. The status half is written as zeros, which clears nothing.
    pub fn enable(self) {
        let command = self.read(COMMAND) & 0xffff;
        self.write(COMMAND, command | COMMAND_ALL);
    }

    /// The offsets of its capabilities with this id.
    pub fn capabilities(self, id: u32) -> impl Iterator<Item = u32> {
        let next = |at: u32| (at != 0).then_some(at);
        let first = match self.read(COMMAND) >> 16 & STATUS_CAPABILITIES {
            0 => None,
            _ => next(self.read(CAPABILITIES) & 0xfc),
        };
        // No more than fit, whatever they say.
        core::iter::successors(first, move |&at| next(self.read(at) >> 8 & 0xfc))
            .take(MOST_CAPABILITIES)
            .filter(move |&at| self.read(at) & 0xff == id)
    }

    /// The memory of a BAR. What was plugged in after the firmware ran gets the first addresses that its bridge forwards: a
    /// port has one device, of which one BAR is used. None too if it is where nothing is mapped.
    pub fn memory(self, bar: u32) -> Option<u64> {
        let register = BAR0 + 4 * bar;
        let is_wide = self.read(register) & 7 == BAR_64_BIT;
        let address = || {
            let high = if is_wide { self.read(register + 4) } else { 0 };
            u64::from(self.read(register) & !0xf) | u64::from(high) << 32
        };
        if self.read(register) & 1 != 0 {
            return None;
        }
        if address() == 0 && self.0 < ON_ROOT_BUS {
            self.write(register, PLUGGED_BAR);
        } else if address() == 0 {
            let bridge = self.bridge()?;
            let window = bridge.read(MEMORY_WINDOW);
            let (base, limit) = (window & 0xfff0, window >> 16 & 0xfff0);
            if base == 0 || limit < base {
                return None;
            }
            bridge.enable();
            self.write(register, base << 16);
        }
        Some(address()).filter(|&address| address < MAPPED_BYTES)
    }
}
