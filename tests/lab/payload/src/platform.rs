// SPDX-License-Identifier: MIT OR Apache-2.0
//! Time, reset and power-off by the chipset's ports (ICH9).

use crate::pci::Function;
use crate::port::{in32, out16, out8};

const LPC_VENDOR: u16 = 0x8086;
const LPC_DEVICE: u16 = 0x2918;
const PM_BASE: u32 = 0x40;
const TICKS_PER_SECOND: u64 = 3_579_545;

fn pm_base() -> Option<u16> {
    let lpc = Function::find(LPC_VENDOR, LPC_DEVICE)?;
    Some((lpc.read(PM_BASE) & 0xff80) as u16)
}

/// Looks at `done` until it says yes or the time is over; says which.
pub fn wait_until(milliseconds: u64, mut done: impl FnMut() -> bool) -> bool {
    let Some(base) = pm_base() else {
        return done();
    };
    let limit = milliseconds * TICKS_PER_SECOND / 1000;
    let mut elapsed = 0u64;
    let mut last = in32(base + 8);
    loop {
        if done() {
            return true;
        }
        // 24 bits are what every such timer has; it wraps after 4.7 s, which no single look takes.
        let now = in32(base + 8);
        elapsed += u64::from(now.wrapping_sub(last) & 0xff_ffff);
        last = now;
        if elapsed > limit {
            return done();
        }
    }
}

/// A hard reset of the whole machine.
pub fn reset() {
    out8(0xcf9, 0x02);
    out8(0xcf9, 0x06);
}

/// ACPI S5: the VMM exits with success.
pub fn power_off() {
    if let Some(base) = pm_base() {
        out16(base + 4, 0x2000);
    }
}
