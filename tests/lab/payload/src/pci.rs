// SPDX-License-Identifier: MIT OR Apache-2.0
//! PCI configuration through ports 0xcf8 and 0xcfc, bus 0 only: all of a lab guest's devices are there.

use crate::port::{in32, out32};

/// A function on bus 0.
#[derive(Clone, Copy)]
pub struct Function(u32);

/// Offset of command and status.
pub const COMMAND: u32 = 0x04;
/// Offset of the first base address register.
pub const BAR0: u32 = 0x10;
/// Command bits: decode ports, decode memory, be a bus master.
pub const COMMAND_ALL: u32 = 0x7;

impl Function {
    /// Every slot and function number, present or not.
    pub fn all() -> impl Iterator<Item = Function> {
        (0..256).map(Function)
    }

    /// Slot and function number.
    pub fn place(self) -> (u32, u32) {
        (self.0 >> 3, self.0 & 7)
    }

    /// Vendor and device id; None if nothing is there.
    pub fn ids(self) -> Option<(u16, u16)> {
        match self.read(0) {
            u32::MAX => None,
            ids => Some((ids as u16, (ids >> 16) as u16)),
        }
    }

    /// The first function with these ids.
    pub fn find(vendor: u16, device: u16) -> Option<Function> {
        Function::all().find(|function| function.ids() == Some((vendor, device)))
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
}
