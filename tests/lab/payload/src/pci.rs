// SPDX-License-Identifier: MIT OR Apache-2.0
//! PCI configuration through ports 0xcf8 and 0xcfc: bus 0, and slot 0 behind each of its bridges, which is where root
//! ports have their device.

use crate::port::{in32, out32};

/// A function: bus, slot and function number as in configuration addresses.
#[derive(Clone, Copy, PartialEq)]
pub struct Function(u32);

/// Offset of command and status.
pub const COMMAND: u32 = 0x04;
/// Offset of the first base address register.
pub const BAR0: u32 = 0x10;
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

    /// The memory of the first BAR. What was plugged in after the firmware ran gets the first addresses that its
    /// bridge forwards: a port has one device, and a lab device one BAR.
    pub fn memory(self) -> Option<u64> {
        let bar = self.read(BAR0);
        if bar & 1 != 0 {
            return None;
        }
        if bar & !0xf == 0 && self.0 < ON_ROOT_BUS {
            self.write(BAR0, PLUGGED_BAR);
        } else if bar & !0xf == 0 {
            let bridge = self.bridge()?;
            let window = bridge.read(MEMORY_WINDOW);
            let (base, limit) = (window & 0xfff0, window >> 16 & 0xfff0);
            if base == 0 || limit < base {
                return None;
            }
            bridge.enable();
            self.write(BAR0, base << 16);
        }
        Some(u64::from(self.read(BAR0) & !0xf))
    }
}
