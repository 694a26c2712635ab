// SPDX-License-Identifier: MIT OR Apache-2.0
//! Time, reset, power-off and unplugging by the chipset's ports (ICH9, PIIX4).

use crate::pci::Function;
use crate::port::{in32, out16, out32, out8};

const VENDOR: u16 = 0x8086;
/// ICH9's LPC function of the q35 machine, and PIIX4's power management of the pc machine.
const PM_FUNCTIONS: [u16; 2] = [0x2918, 0x7113];
const PM_BASE: u32 = 0x40;
/// Where it is put when no firmware has run: the ports, bit 0 for ports; and the register that switches them on.
const PM_PORTS: u32 = 0x601;
const PM_CONTROL: u32 = 0x44;
const PM_ENABLE: u32 = 0x80;
/// The pc machine's ports for hot-plug (QEMU's docs/specs/acpi_pci_hotplug.rst).
const EJECT: u16 = 0xae08;
const BUS_SELECT: u16 = 0xae10;
const TICKS_PER_SECOND: u64 = 3_579_545;

fn pm_base() -> Option<u16> {
    let function = PM_FUNCTIONS
        .into_iter()
        .find_map(|device| Function::find(VENDOR, device))?;
    if function.read(PM_BASE) & 0xffc0 == 0 {
        function.write(PM_BASE, PM_PORTS);
        function.write(PM_CONTROL, PM_ENABLE);
    }
    Some((function.read(PM_BASE) & 0xffc0) as u16)
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

/// How many of `cycles` pass in a millisecond of the PM timer.
pub fn cycles_per_millisecond(cycles: impl Fn() -> u64) -> Option<u64> {
    const TICKS: u32 = (TICKS_PER_SECOND / 50) as u32;
    let timer = pm_base()? + 8;
    let (begin, first) = (in32(timer), cycles());
    loop {
        let (now, last) = (in32(timer), cycles());
        let ticks = now.wrapping_sub(begin) & 0xff_ffff;
        if ticks >= TICKS {
            return Some(((last - first) * TICKS_PER_SECOND / 1000 / u64::from(ticks)).max(1));
        }
    }
}

/// Says that a slot of bus 0 may be unplugged, as an operating system's ACPI code would (pc machine).
pub fn eject(slot: u32) {
    out32(BUS_SELECT, 0);
    out32(EJECT, 1 << slot);
}

/// A hard reset of the whole machine.
pub fn reset() {
    out8(0xcf9, 0x02);
    out8(0xcf9, 0x06);
}

/// The port, and what is written there for ACPI S3.
pub fn sleep_control() -> Option<(u16, u16)> {
    const TYPE_S3: u16 = 1 << 10;
    const ENABLE: u16 = 1 << 13;
    Some((pm_base()? + 4, TYPE_S3 | ENABLE))
}

/// ACPI S5: the VMM exits with success.
pub fn power_off() {
    if let Some(base) = pm_base() {
        out16(base + 4, 0x2000);
    }
}
